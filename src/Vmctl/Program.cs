// SPDX-License-Identifier: BSD-2-Clause
namespace Vmctl;

internal static class Program
{
    private static int Main()
    {
        return 64;
    }
}

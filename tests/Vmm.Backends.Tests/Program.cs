// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Globalization;
using Vmm.Backends.Tests.Block;

namespace Vmm.Backends.Tests;

/// <summary>The test assembly is also the child that tests start in order to kill it.</summary>
internal static class Program
{
    private static int Main(string[] arguments)
    {
        if (arguments is ["torture", string path, string seed, string start])
        {
            return Torture.Run(
                path, int.Parse(seed, CultureInfo.InvariantCulture), int.Parse(start, CultureInfo.InvariantCulture));
        }

        Console.Error.WriteLine("usage: torture IMAGE SEED START");
        return 64;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Globalization;
using Vmm.Bench;
using Vmm.Core;

try
{
    switch (args)
    {
        case ["exitpath", string loop]:
            ExitPath.Run(loop);
            return 0;
        default:
            Console.Error.WriteLine("usage: vmbench exitpath PROGRAM   (PROGRAM: tests/abi/exitbench.c, compiled)");
            return 64;
    }
}
catch (HypervisorException exception)
{
    Console.Error.WriteLine(string.Create(CultureInfo.InvariantCulture, $"vmbench: {exception.Message}"));
    return 69;
}

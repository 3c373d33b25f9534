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
        case ["startup", string vmctl, string payload, string accel]:
            StartUp.Run(vmctl, payload, accel);
            return 0;
        default:
            Console.Error.WriteLine("usage: vmbench exitpath PROGRAM   (tests/abi/exitbench.c, compiled)\n       vmbench startup VMCTL PAYLOAD kvm|soft");
            return 64;
    }
}
catch (HypervisorException exception)
{
    Console.Error.WriteLine(string.Create(CultureInfo.InvariantCulture, $"vmbench: {exception.Message}"));
    return 69;
}

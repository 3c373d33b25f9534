// SPDX-License-Identifier: BSD-2-Clause
using System;
using Vmm.Core;

namespace Vmm.Devices.Pci;

/// <summary>
/// Where firmware put the memory BARs of a bus. A host bridge's ACPI description must cover them, or an operating system
/// moves them; each firmware has its own idea of the place (SeaBIOS: from the top of RAM's hole, OVMF: from 2 GiB and
/// high above RAM), so that the tables are made after it has decided.
/// </summary>
/// <param name="LowStart">Lowest address of a BAR below 4 GiB; 0 when there is none.</param>
/// <param name="HighStart">Lowest address of a BAR above 4 GiB; 0 when there is none.</param>
/// <param name="HighEnd">One past the last byte of the BARs above 4 GiB.</param>
public readonly record struct PciApertures(uint LowStart, ulong HighStart, ulong HighEnd)
{
    private const ulong Low = 1UL << 32;

    /// <summary>Looks at every function that decodes memory.</summary>
    public static PciApertures Find(PciBus bus)
    {
        ArgumentNullException.ThrowIfNull(bus);
        ulong lowStart = Low;
        ulong highStart = ulong.MaxValue;
        ulong highEnd = 0;
        foreach (PciFunction function in bus.Functions)
        {
            if ((function.ReadConfig(PciConfig.Command, AccessWidth.Word) & PciConfig.CommandMemory) == 0)
            {
                continue;
            }

            foreach ((int index, PciBarKind kind, ulong lengthBytes) in function.Bars())
            {
                ulong start = Address(function, index, kind);
                if (start == 0 || start > ulong.MaxValue - lengthBytes)
                {
                    continue;
                }

                if (start < Low)
                {
                    lowStart = Math.Min(lowStart, start);
                }
                else
                {
                    highStart = Math.Min(highStart, start);
                    highEnd = Math.Max(highEnd, start + lengthBytes);
                }
            }
        }

        return new PciApertures(lowStart < Low ? (uint)lowStart : 0, highEnd == 0 ? 0 : highStart, highEnd);
    }

    private static ulong Address(PciFunction function, int index, PciBarKind kind)
    {
        if (kind == PciBarKind.Io)
        {
            return 0;
        }

        int register = PciConfig.Bar0 + (4 * index);
        ulong address = function.ReadConfig(register, AccessWidth.Dword) & ~0xFUL;
        return kind is PciBarKind.Memory64 or PciBarKind.Memory64Prefetchable
            ? address | ((ulong)function.ReadConfig(register + 4, AccessWidth.Dword) << 32)
            : address;
    }
}

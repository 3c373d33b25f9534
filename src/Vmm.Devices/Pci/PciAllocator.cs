// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Vmm.Core;
using Vmm.Devices.Legacy;

namespace Vmm.Devices.Pci;

/// <summary>
/// Does for a machine without firmware what a BIOS does for the bus: gives each BAR a place, turns decoding on, routes
/// the interrupt inputs and writes the interrupt line registers. Everything goes through configuration space, so what
/// a guest finds is what it could have done itself.
/// </summary>
public static class PciAllocator
{
    /// <summary>ISA lines that the router's four inputs are led to.</summary>
    public static ReadOnlySpan<byte> PirqIrqs => [10, 10, 11, 11];

    /// <summary>Assigns the resources of all functions.</summary>
    /// <param name="bus">The bus, after reset.</param>
    /// <param name="memoryStart">First address for memory BARs, below 4 GiB.</param>
    /// <param name="memoryEnd">One past the last.</param>
    /// <param name="high64Start">Where 64-bit BARs go that do not fit below; 0 for nowhere.</param>
    /// <param name="ioStart">First port for I/O BARs.</param>
    /// <returns>Names of functions with a BAR that found no place; they stay disabled.</returns>
    public static IReadOnlyList<string> Assign(
        PciBus bus, uint memoryStart, ulong memoryEnd, ulong high64Start = 0, uint ioStart = 0xC000)
    {
        ArgumentNullException.ThrowIfNull(bus);
        var wanted = new List<(PciFunction Function, int Index, PciBarKind Kind, ulong LengthBytes)>();
        foreach (PciFunction function in bus.Functions)
        {
            foreach ((int index, PciBarKind kind, ulong lengthBytes) in function.Bars())
            {
                wanted.Add((function, index, kind, lengthBytes));
            }
        }

        // Large ones first: natural alignment then wastes nothing. The sort key makes the order repeatable.
        wanted.Sort((a, b) =>
        {
            int order = b.LengthBytes.CompareTo(a.LengthBytes);
            order = order != 0 ? order : a.Function.DeviceNumber.CompareTo(b.Function.DeviceNumber);
            order = order != 0 ? order : a.Function.FunctionNumber.CompareTo(b.Function.FunctionNumber);
            return order != 0 ? order : a.Index.CompareTo(b.Index);
        });

        ulong memory = memoryStart;
        ulong high = high64Start;
        ulong io = ioStart;
        var failed = new HashSet<PciFunction>();
        foreach ((PciFunction function, int index, PciBarKind kind, ulong lengthBytes) in wanted)
        {
            int register = PciConfig.Bar0 + (4 * index);
            bool is64 = kind is PciBarKind.Memory64 or PciBarKind.Memory64Prefetchable;
            ulong place;
            if (kind == PciBarKind.Io)
            {
                place = Take(ref io, lengthBytes, 0x1_0000);
            }
            else
            {
                place = Take(ref memory, lengthBytes, memoryEnd);
                if (place == 0 && is64 && high64Start != 0)
                {
                    place = Take(ref high, lengthBytes, 1UL << 46);
                }
            }

            if (place == 0)
            {
                failed.Add(function);
                continue;
            }

            function.WriteConfig(register, AccessWidth.Dword, (uint)place);
            if (is64)
            {
                function.WriteConfig(register + 4, AccessWidth.Dword, (uint)(place >> 32));
            }
        }

        var names = new List<string>();
        foreach (PciFunction function in bus.Functions)
        {
            if (failed.Contains(function))
            {
                names.Add(function.Id);
                continue;
            }

            uint command = function.ReadConfig(PciConfig.Command, AccessWidth.Word);
            function.WriteConfig(
                PciConfig.Command, AccessWidth.Word, command | PciConfig.CommandIo | PciConfig.CommandMemory);
            if (function.InterruptPin != 0 && function is not AcpiPm)
            {
                int input = PciBus.PirqOf(function.DeviceNumber, function.InterruptPin);
                function.WriteConfig(PciConfig.InterruptLine, AccessWidth.Byte, PirqIrqs[input]);
            }

            if (function is AcpiPm pm)
            {
                pm.Enable();
            }
            else if (function is Piix3IsaBridge)
            {
                for (int i = 0; i < 4; i++)
                {
                    function.WriteConfig(0x60 + i, AccessWidth.Byte, PirqIrqs[i]);
                }
            }
        }

        return names;
    }

    private static ulong Take(ref ulong next, ulong lengthBytes, ulong end)
    {
        ulong place = (next + lengthBytes - 1) & ~(lengthBytes - 1);
        if (place < next || place > end || lengthBytes > end - place)
        {
            return 0;
        }

        next = place + lengthBytes;
        return place;
    }
}

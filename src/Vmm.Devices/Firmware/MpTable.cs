// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using Vmm.Devices.Pci;

namespace Vmm.Devices.Firmware;

/// <summary>
/// The table of the MultiProcessor Specification 1.4, which systems older than ACPI read: processors, the two buses, the
/// I/O APIC and who is wired to its pins. For machines without firmware; SeaBIOS makes its own.
/// </summary>
public static class MpTable
{
    private const byte IsaBus = 1;
    private const byte PciRoot = 0;
    private const uint LocalApicAddress = 0xFEE00000;
    private const uint IoApicAddress = 0xFEC00000;

    // PO and EL of an interrupt entry (§4.3.4): as the bus has it, and active high with level trigger.
    private const ushort AsBus = 0;
    private const ushort LevelHigh = 0x0D;

    /// <summary>Builds the floating pointer (§4.1) with the table behind it.</summary>
    /// <param name="address">Where it will lie: a multiple of 16 in 0xF0000..0xFFFFF.</param>
    /// <param name="cpus">vCPUs; APIC identifiers are 0 to count - 1, at most 254.</param>
    /// <param name="cpuSignature">CPUID leaf 1's EAX.</param>
    /// <param name="pciRoutes">ISA lines of the router's four inputs.</param>
    /// <param name="bus">Whose functions have interrupt pins.</param>
    public static byte[] Build(uint address, int cpus, uint cpuSignature, ReadOnlySpan<byte> pciRoutes, PciBus bus)
    {
        ArgumentNullException.ThrowIfNull(bus);
        var entries = new List<byte>();
        int count = 0;
        for (int i = 0; i < Math.Min(cpus, 254); i++)
        {
            // §4.3.1: enabled, the first one is the boot processor.
            entries.AddRange([0, (byte)i, 0x14, (byte)(i == 0 ? 3 : 1)]);
            Append32(entries, cpuSignature);
            Append32(entries, 0x201);
            Append32(entries, 0);
            Append32(entries, 0);
            count++;
        }

        entries.AddRange([1, PciRoot, .. "PCI   "u8]);
        entries.AddRange([1, IsaBus, .. "ISA   "u8]);
        byte ioApicId = (byte)Math.Min(cpus, 254);
        entries.AddRange([2, ioApicId, 0x11, 1]);
        Append32(entries, IoApicAddress);
        count += 3;
        foreach (PciFunction function in bus.Functions)
        {
            if (function.InterruptPin != 0)
            {
                byte line = pciRoutes[PciBus.PirqOf(function.DeviceNumber, function.InterruptPin)];
                byte source = (byte)((function.DeviceNumber << 2) | (function.InterruptPin - 1));
                Interrupt(entries, ref count, 0, LevelHigh, PciRoot, source, ioApicId, line);
            }
        }

        for (byte irq = 0; irq < 16; irq++)
        {
            if (irq != 2 && !pciRoutes.Contains(irq))
            {
                Interrupt(entries, ref count, 0, irq == 9 ? LevelHigh : AsBus, IsaBus, irq, ioApicId, irq == 0 ? (byte)2 : irq);
            }
        }

        // §4.3.5: the 8259 pair at LINT0 of the boot processor, NMI at LINT1 of all.
        entries.AddRange([4, 3, 0, 0, IsaBus, 0, 0, 0, 4, 1, 0, 0, IsaBus, 0, 0xFF, 1]);
        count += 2;

        const int PointerBytes = 16;
        const int HeaderBytes = 44;
        byte[] all = new byte[PointerBytes + HeaderBytes + entries.Count];
        "_MP_"u8.CopyTo(all);
        BinaryPrimitives.WriteUInt32LittleEndian(all.AsSpan(4), address + PointerBytes);
        all[8] = 1;
        all[9] = 4;
        all[10] = AcpiTables.Checksum(all.AsSpan(0, PointerBytes));

        Span<byte> table = all.AsSpan(PointerBytes);
        "PCMP"u8.CopyTo(table);
        BinaryPrimitives.WriteUInt16LittleEndian(table[4..], (ushort)table.Length);
        table[6] = 4;
        "VMCTL   "u8.CopyTo(table[8..]);
        "VMM         "u8.CopyTo(table[16..]);
        BinaryPrimitives.WriteUInt16LittleEndian(table[34..], (ushort)count);
        BinaryPrimitives.WriteUInt32LittleEndian(table[36..], LocalApicAddress);
        entries.CopyTo(all, PointerBytes + HeaderBytes);
        table[7] = AcpiTables.Checksum(table);
        return all;
    }

    private static void Interrupt(
        List<byte> entries, ref int count, byte kind, ushort flags, byte bus, byte source, byte ioApic, byte pin)
    {
        entries.AddRange([3, kind, (byte)flags, (byte)(flags >> 8), bus, source, ioApic, pin]);
        count++;
    }

    private static void Append32(List<byte> bytes, uint value) =>
        bytes.AddRange([(byte)value, (byte)(value >> 8), (byte)(value >> 16), (byte)(value >> 24)]);
}

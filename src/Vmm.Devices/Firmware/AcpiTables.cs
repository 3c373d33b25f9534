// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using Vmm.Devices.Legacy;

namespace Vmm.Devices.Firmware;

// Theory. The tables tell a guest what it cannot probe: processors and interrupt controllers (MADT), the power-management
// registers (FADT), the PCI root with its windows and interrupt links, and the ISA devices (DSDT). They are built once
// from an AcpiSpec into one blob with symbolic pointers, and used in two ways: a machine without firmware gets them at a
// fixed address (AcpiBlob.PlaceAt), SeaBIOS and OVMF get the same blob over fw_cfg together with the pointers and
// checksums that they have to patch.
//
// A guest enters ACPI mode by writing ACPI_ENABLE to the APM port (§4.8.2.5); no SMI is involved.

/// <summary>Adds what a device wants to be in the namespace, inside \_SB.</summary>
public interface IAcpiNode
{
    /// <summary>Emits the node's terms.</summary>
    void Describe(Aml systemBus);
}

/// <summary>What the tables describe.</summary>
public sealed record AcpiSpec
{
    /// <summary>vCPUs; APIC identifiers are 0 to count - 1.</summary>
    public required int Cpus { get; init; }

    /// <summary>First port of the power management block (see AcpiPm for what lies in it).</summary>
    public ushort PmBase { get; init; } = AcpiPm.DefaultPort;

    /// <summary>The system control interrupt.</summary>
    public byte SciIrq { get; init; } = 9;

    /// <summary>There is an HPET at 0xFED00000.</summary>
    public bool HasHpet { get; init; }

    /// <summary>There is an 8042.</summary>
    public bool HasKeyboardController { get; init; }

    /// <summary>There is a VGA.</summary>
    public bool HasVga { get; init; }

    /// <summary>Number of 16550s at the standard places, 0 to 4.</summary>
    public int SerialPorts { get; init; } = 1;

    /// <summary>There is a floppy controller.</summary>
    public bool HasFloppy { get; init; }

    /// <summary>First address of the PCI memory window below 4 GiB.</summary>
    public uint PciWindowStart { get; init; } = 0xC0000000;

    /// <summary>Last address of that window.</summary>
    public uint PciWindowLast { get; init; } = 0xFEBFFFFF;

    /// <summary>PCI memory window above RAM; 0 for none.</summary>
    public ulong PciWindow64Start { get; init; }

    /// <summary>Its length.</summary>
    public ulong PciWindow64Bytes { get; init; }

    /// <summary>Further nodes.</summary>
    public IReadOnlyList<IAcpiNode> Nodes { get; init; } = [];
}

/// <summary>A 32- or 64-bit field in the blob that holds a table's address.</summary>
/// <param name="Offset">Where the field is.</param>
/// <param name="Bytes">4 or 8.</param>
/// <param name="Target">Offset of the table that it points at.</param>
public readonly record struct AcpiPointer(int Offset, int Bytes, int Target);

/// <summary>A table whose bytes must add up to 0.</summary>
/// <param name="Start">First byte.</param>
/// <param name="Length">Bytes.</param>
/// <param name="At">Where the checksum byte is.</param>
public readonly record struct AcpiChecksum(int Start, int Length, int At);

/// <summary>All tables but the root pointer, with what must be patched when their address is known.</summary>
public sealed class AcpiBlob
{
    internal AcpiBlob(byte[] tables, int rsdt, int xsdt, List<AcpiPointer> pointers, List<AcpiChecksum> checksums)
    {
        Tables = tables;
        RsdtOffset = rsdt;
        XsdtOffset = xsdt;
        Pointers = pointers;
        Checksums = checksums;
    }

    /// <summary>The bytes; pointer fields hold target offsets, checksum bytes are 0.</summary>
    public byte[] Tables { get; }

    /// <summary>Offset of the RSDT.</summary>
    public int RsdtOffset { get; }

    /// <summary>Offset of the XSDT.</summary>
    public int XsdtOffset { get; }

    /// <summary>Fields to which the blob's address is to be added.</summary>
    public IReadOnlyList<AcpiPointer> Pointers { get; }

    /// <summary>Checksums to compute after that.</summary>
    public IReadOnlyList<AcpiChecksum> Checksums { get; }

    /// <summary>The root pointer (§5.2.5.3) for tables at an address; 36 bytes.</summary>
    public byte[] RootPointer(ulong tablesAddress)
    {
        var rsdp = new byte[36];
        "RSD PTR "u8.CopyTo(rsdp);
        AcpiTables.OemId.CopyTo(rsdp.AsSpan(9));
        rsdp[15] = 2;
        BinaryPrimitives.WriteUInt32LittleEndian(rsdp.AsSpan(16), (uint)(tablesAddress + (uint)RsdtOffset));
        BinaryPrimitives.WriteUInt32LittleEndian(rsdp.AsSpan(20), 36);
        BinaryPrimitives.WriteUInt64LittleEndian(rsdp.AsSpan(24), tablesAddress + (uint)XsdtOffset);
        rsdp[8] = AcpiTables.Checksum(rsdp.AsSpan(0, 20));
        rsdp[32] = AcpiTables.Checksum(rsdp);
        return rsdp;
    }

    /// <summary>The tables, patched for an address below 4 GiB.</summary>
    public byte[] PlaceAt(ulong address)
    {
        byte[] placed = (byte[])Tables.Clone();
        foreach (AcpiPointer pointer in Pointers)
        {
            Span<byte> field = placed.AsSpan(pointer.Offset);
            ulong value = address + (uint)pointer.Target;
            if (pointer.Bytes == 4)
            {
                BinaryPrimitives.WriteUInt32LittleEndian(field, (uint)value);
            }
            else
            {
                BinaryPrimitives.WriteUInt64LittleEndian(field, value);
            }
        }

        foreach (AcpiChecksum checksum in Checksums)
        {
            placed[checksum.At] = AcpiTables.Checksum(placed.AsSpan(checksum.Start, checksum.Length));
        }

        return placed;
    }
}

/// <summary>Builds the ACPI tables (ACPI 6.5 chapter 5).</summary>
public static class AcpiTables
{
    private const int HeaderBytes = 36;
    /// <summary>Where the HPET's registers lie.</summary>
    public const uint HpetAddress = 0xFED00000;
    private const uint IoApicAddress = 0xFEC00000;
    private const uint LocalApicAddress = 0xFEE00000;

    // Lines that PCI interrupts can be led to; the MADT says that they are level-triggered, active high.
    private static readonly byte[] s_pciIrqs = [5, 10, 11];

    internal static ReadOnlySpan<byte> OemId => "VMCTL "u8;

    /// <summary>Builds.</summary>
    public static AcpiBlob Build(AcpiSpec spec)
    {
        ArgumentNullException.ThrowIfNull(spec);
        var builder = new Builder();
        int facs = builder.AddFacs();
        int dsdt = builder.Add("DSDT", 2, Dsdt(spec));
        int fadt = builder.Add("FACP", 6, Fadt(spec));
        builder.Point(fadt + 36, 4, facs);
        builder.Point(fadt + 40, 4, dsdt);
        builder.Point(fadt + 132, 8, facs);
        builder.Point(fadt + 140, 8, dsdt);
        var roots = new List<int> { fadt, builder.Add("APIC", 5, Madt(spec)) };
        if (spec.HasHpet)
        {
            roots.Add(builder.Add("HPET", 1, Hpet()));
        }

        int rsdt = builder.Add("RSDT", 1, new byte[roots.Count * 4]);
        int xsdt = builder.Add("XSDT", 1, new byte[roots.Count * 8]);
        for (int i = 0; i < roots.Count; i++)
        {
            builder.Point(rsdt + HeaderBytes + (i * 4), 4, roots[i]);
            builder.Point(xsdt + HeaderBytes + (i * 8), 8, roots[i]);
        }

        return builder.Finish(rsdt, xsdt);
    }

    internal static byte Checksum(ReadOnlySpan<byte> bytes)
    {
        byte sum = 0;
        foreach (byte b in bytes)
        {
            sum += b;
        }

        return (byte)-sum;
    }

    // §5.2.9, offsets less the header's 36 bytes.
    private static byte[] Fadt(AcpiSpec spec)
    {
        var fadt = new byte[276];
        fadt[46] = spec.SciIrq;
        Put32(fadt, 48, AcpiPm.ApmPort);
        fadt[52] = AcpiPm.AcpiEnable;
        fadt[53] = AcpiPm.AcpiDisable;
        Put32(fadt, 56, spec.PmBase + AcpiPm.Pm1Event);
        Put32(fadt, 64, spec.PmBase + AcpiPm.Pm1Control);
        Put32(fadt, 76, spec.PmBase + AcpiPm.PmTimer);
        Put32(fadt, 80, spec.PmBase + AcpiPm.Gpe0);
        fadt[88] = 4;
        fadt[89] = 2;
        fadt[91] = 4;
        fadt[92] = 4;
        BinaryPrimitives.WriteUInt16LittleEndian(fadt.AsSpan(96), 0xFFF);
        BinaryPrimitives.WriteUInt16LittleEndian(fadt.AsSpan(98), 0xFFF);
        fadt[108] = 0x32;

        // IAPC_BOOT_ARCH: legacy devices, 8042, no VGA.
        int bootArch = 1 | (spec.HasKeyboardController ? 2 : 0) | (spec.HasVga ? 0 : 4);
        BinaryPrimitives.WriteUInt16LittleEndian(fadt.AsSpan(109), (ushort)bootArch);

        // WBINVD, C1, no sleep button, reset register; the timer has 24 bits.
        Put32(fadt, 112, (1 << 0) | (1 << 2) | (1 << 5) | (1 << 10));
        Generic(fadt, 116, 0xCF9, 8);
        fadt[128] = 6;
        fadt[131] = 5;
        Generic(fadt, 148, spec.PmBase + AcpiPm.Pm1Event, 32);
        Generic(fadt, 172, spec.PmBase + AcpiPm.Pm1Control, 16);
        Generic(fadt, 208, spec.PmBase + AcpiPm.PmTimer, 32);
        Generic(fadt, 220, spec.PmBase + AcpiPm.Gpe0, 32);
        return fadt[HeaderBytes..];
    }

    // §5.2.12.
    private static byte[] Madt(AcpiSpec spec)
    {
        var madt = new List<byte>();
        Append32(madt, LocalApicAddress);
        Append32(madt, 1);
        for (int i = 0; i < spec.Cpus; i++)
        {
            if (i < 255)
            {
                madt.AddRange([0, 8, (byte)i, (byte)i, 1, 0, 0, 0]);
            }
            else
            {
                madt.AddRange([9, 16, 0, 0]);
                Append32(madt, (uint)i);
                Append32(madt, 1);
                Append32(madt, (uint)i);
            }
        }

        madt.AddRange([1, 12, 0, 0]);
        Append32(madt, IoApicAddress);
        Append32(madt, 0);
        Override(madt, 0, 2, 0);
        Override(madt, spec.SciIrq, spec.SciIrq, 0xD);
        foreach (byte irq in s_pciIrqs)
        {
            Override(madt, irq, irq, 0xD);
        }

        madt.AddRange([4, 6, 0xFF, 0, 0, 1]);
        return [.. madt];
    }

    private static void Override(List<byte> madt, byte irq, byte gsi, byte flags) =>
        madt.AddRange([2, 10, 0, irq, gsi, 0, 0, 0, flags, 0]);

    // IA-PC HPET specification 1.0a §3.2.4.
    private static byte[] Hpet()
    {
        var hpet = new byte[20];
        Put32(hpet, 0, Legacy.Hpet.BlockId());
        hpet[4] = 0;
        hpet[5] = 64;
        BinaryPrimitives.WriteUInt64LittleEndian(hpet.AsSpan(8), HpetAddress);
        BinaryPrimitives.WriteUInt16LittleEndian(hpet.AsSpan(17), 0x80);
        return hpet;
    }

    private static byte[] Dsdt(AcpiSpec spec)
    {
        var aml = new Aml();
        aml.Name("\\_S5_", term => term.Package(4, p => p.Integer(AcpiPm.SleepTypeS5).Integer(AcpiPm.SleepTypeS5).Integer(0).Integer(0)));
        aml.Scope("\\_SB_", bus =>
        {
            for (int i = 0; i < spec.Cpus; i++)
            {
                int id = i;
                bus.Device($"C{id:X3}", cpu => cpu.Name("_HID", "ACPI0007").Name("_UID", (ulong)id));
            }

            bus.Device("PCI0", pci => PciRoot(pci, spec));
            for (int link = 0; link < 4; link++)
            {
                InterruptLink(bus, link);
            }

            if (spec.HasHpet)
            {
                bus.Device("HPET", hpet => hpet
                    .NameEisaId("_HID", "PNP0103")
                    .Name("_CRS", term => term.Resources(r => r.Memory32(HpetAddress, 0x400))));
            }

            foreach (IAcpiNode node in spec.Nodes)
            {
                node.Describe(bus);
            }
        });
        return aml.ToArray();
    }

    private static void PciRoot(Aml pci, AcpiSpec spec)
    {
        pci.NameEisaId("_HID", "PNP0A03");
        pci.Name("_ADR", 0);
        pci.Name("_UID", 0);
        pci.Name("_CRS", term => term.Resources(r =>
        {
            r.BusNumbers(0, 0xFF).Io(0xCF8, 8).IoWindow(0, 0xCF7).IoWindow(0xD00, 0xFFFF);
            r.MemoryWindow(0xA0000, 0xBFFFF).MemoryWindow(spec.PciWindowStart, spec.PciWindowLast);
            if (spec.PciWindow64Bytes > 0)
            {
                r.MemoryWindow64(spec.PciWindow64Start, spec.PciWindow64Start + spec.PciWindow64Bytes - 1);
            }
        }));

        // §6.2.13: device, pin (0 = INTA), link. The PIIX3 swizzle: device d, pin p use link (d + p - 1) mod 4.
        pci.Name("_PRT", term => term.Package(128, table =>
        {
            for (int device = 0; device < 32; device++)
            {
                for (int pin = 0; pin < 4; pin++)
                {
                    ulong address = ((ulong)device << 16) | 0xFFFF;
                    ulong number = (ulong)pin;
                    char link = (char)('A' + ((device + pin + 3) & 3));
                    table.Package(4, row => row.Integer(address).Integer(number).Reference($"\\_SB.LNK{link}").Integer(0));
                }
            }
        }));
        pci.Device("ISA_", isa =>
        {
            isa.Name("_ADR", 0x00010000);
            isa.OperationRegion("PIRQ", 2, 0x60, 4);
            isa.Field("PIRQ", 0x01, ("PRQA", 8), ("PRQB", 8), ("PRQC", 8), ("PRQD", 8));
            isa.Device("RTC_", rtc => rtc.NameEisaId("_HID", "PNP0B00")
                .Name("_CRS", term => term.Resources(r => r.Io(0x70, 8).Irq(8))));
            if (spec.HasKeyboardController)
            {
                isa.Device("KBD_", keyboard => keyboard.NameEisaId("_HID", "PNP0303")
                    .Name("_CRS", term => term.Resources(r => r.Io(0x60, 1).Io(0x64, 1).Irq(1))));
                isa.Device("MOU_", mouse => mouse.NameEisaId("_HID", "PNP0F13")
                    .Name("_CRS", term => term.Resources(r => r.Irq(12))));
            }

            if (spec.HasFloppy)
            {
                isa.Device("FDC0", floppy => floppy.NameEisaId("_HID", "PNP0700")
                    .Name("_CRS", term => term.Resources(r => r.Io(0x3F2, 4).Io(0x3F7, 1).Irq(6).Dma(2))));
            }

            for (int i = 0; i < spec.SerialPorts; i++)
            {
                int port = i;
                isa.Device($"COM{port + 1}", com => com.NameEisaId("_HID", "PNP0501").Name("_UID", (ulong)port + 1)
                    .Name("_CRS", term => term.Resources(r => r.Io(SerialPort(port), 8).Irq((port & 1) == 0 ? 4 : 3))));
            }
        });
    }

    private static ushort SerialPort(int index) => index switch
    {
        0 => 0x3F8,
        1 => 0x2F8,
        2 => 0x3E8,
        _ => 0x2E8,
    };

    // A PIIX3 PIRQ route register as an interrupt link (§6.2.13, 82371SB §2.2.5): bit 7 disables, bits 3:0 are the line.
    private static void InterruptLink(Aml bus, int link)
    {
        char letter = (char)('A' + link);
        string route = $"\\_SB.PCI0.ISA_.PRQ{letter}";
        bus.Device($"LNK{letter}", device =>
        {
            device.NameEisaId("_HID", "PNP0C0F");
            device.Name("_UID", (ulong)link + 1);
            device.Name("_PRS", term => term.Resources(r => r.Interrupts(5, 10, 11)));
            device.Method("_STA", 0, body => body
                .If(p => p.And(l => l.Reference(route), r => r.Integer(0x80)), then => then.Return(v => v.Integer(0x09)))
                .Return(v => v.Integer(0x0B)));
            device.Method("_DIS", 0, body => body.Or(l => l.Reference(route), r => r.Integer(0x80), t => t.Reference(route)));
            device.Method(
                "_CRS",
                0,
                body => body
                    .Name("RES0", term => term.Resources(r => r.Interrupts(0)))
                    .CreateDwordField(b => b.Reference("RES0"), 5, "INTR")
                    .And(l => l.Reference(route), r => r.Integer(0x0F), t => t.Reference("INTR"))
                    .Return(v => v.Reference("RES0")),
                serialized: true);
            device.Method(
                "_SRS",
                1,
                body => body
                    .CreateDwordField(b => b.Arg(0), 5, "INTR")
                    .Store(s => s.Reference("INTR"), t => t.Reference(route)),
                serialized: true);
        });
    }

    private static void Generic(byte[] table, int at, uint address, int bits)
    {
        table[at] = 1;
        table[at + 1] = (byte)bits;
        table[at + 3] = (byte)(bits switch { 8 => 1, 16 => 2, _ => 3 });
        Put32(table, at + 4, address);
    }

    private static void Put32(byte[] bytes, int at, uint value) =>
        BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(at), value);

    private static void Append32(List<byte> bytes, uint value) =>
        bytes.AddRange([(byte)value, (byte)(value >> 8), (byte)(value >> 16), (byte)(value >> 24)]);

    private sealed class Builder
    {
        private readonly List<byte> _bytes = [];
        private readonly List<AcpiPointer> _pointers = [];
        private readonly List<AcpiChecksum> _checksums = [];

        public int AddFacs()
        {
            Align(64);
            int at = _bytes.Count;
            var facs = new byte[64];
            "FACS"u8.CopyTo(facs);
            Put32(facs, 4, 64);
            facs[32] = 2;
            _bytes.AddRange(facs);
            return at;
        }

        public int Add(string signature, byte revision, byte[] body)
        {
            Align(16);
            int at = _bytes.Count;
            var header = new byte[HeaderBytes];
            Encoding.ASCII.GetBytes(signature, header);
            Put32(header, 4, (uint)(HeaderBytes + body.Length));
            header[8] = revision;
            OemId.CopyTo(header.AsSpan(10));
            "VMCTL   "u8.CopyTo(header.AsSpan(16));
            Put32(header, 24, 1);
            "VMM "u8.CopyTo(header.AsSpan(28));
            Put32(header, 32, 1);
            _bytes.AddRange(header);
            _bytes.AddRange(body);
            _checksums.Add(new AcpiChecksum(at, HeaderBytes + body.Length, at + 9));
            return at;
        }

        public void Point(int field, int bytes, int target)
        {
            _pointers.Add(new AcpiPointer(field, bytes, target));
            for (int i = 0; i < bytes; i++)
            {
                _bytes[field + i] = (byte)((ulong)target >> (8 * i));
            }
        }

        public AcpiBlob Finish(int rsdt, int xsdt)
        {
            Align(64);
            return new AcpiBlob([.. _bytes], rsdt, xsdt, _pointers, _checksums);
        }

        private void Align(int alignment)
        {
            while (_bytes.Count % alignment != 0)
            {
                _bytes.Add(0);
            }
        }
    }
}

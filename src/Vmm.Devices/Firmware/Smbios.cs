// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Globalization;
using System.Text;

namespace Vmm.Devices.Firmware;

// Theory. SMBIOS (DMTF DSP0134 3.6) tells a guest what it runs on: names, the machine's UUID, sockets, memory. It is a
// list of structures, each a formatted part followed by its strings, and an entry point of 31 bytes that a guest finds at
// a multiple of 16 in 0xF0000..0xFFFFF. A machine without firmware gets both in place (PlaceAt); SeaBIOS and OVMF get
// them as two fw_cfg files and put them where they like, with a BIOS structure (type 0) of their own.

/// <summary>What the tables tell.</summary>
public sealed record SmbiosSpec
{
    /// <summary>The machine's UUID.</summary>
    public required Guid Uuid { get; init; }

    /// <summary>Name of the VM; its serial number here.</summary>
    public required string Name { get; init; }

    /// <summary>Version of this program.</summary>
    public required string Version { get; init; }

    /// <summary>Sockets.</summary>
    public int Sockets { get; init; } = 1;

    /// <summary>Cores of a socket.</summary>
    public int Cores { get; init; } = 1;

    /// <summary>Threads of a socket.</summary>
    public int Threads { get; init; } = 1;

    /// <summary>CPUID leaf 1's EAX.</summary>
    public uint CpuSignature { get; init; }

    /// <summary>RAM from address 0, in bytes.</summary>
    public required ulong LowBytes { get; init; }

    /// <summary>RAM from 4 GiB, in bytes.</summary>
    public ulong HighBytes { get; init; }

    /// <summary>With a BIOS structure; not where firmware adds its own.</summary>
    public bool HasBios { get; init; }
}

/// <summary>SMBIOS tables.</summary>
public sealed class Smbios
{
    /// <summary>fw_cfg file of the entry point.</summary>
    public const string AnchorFile = "etc/smbios/smbios-anchor";

    /// <summary>fw_cfg file of the structures.</summary>
    public const string TablesFile = "etc/smbios/smbios-tables";

    private const int AnchorBytes = 31;
    private const string Maker = "vmctl";

    // Most that one memory device says without the extended field, and what sizes of memory are counted in.
    private const ulong LargestDevice = 16UL << 30;

    private readonly List<byte> _bytes = [];
    private int _count;
    private int _largest;

    private Smbios()
    {
    }

    /// <summary>The structures.</summary>
    public byte[] Tables => [.. _bytes];

    /// <summary>Builds.</summary>
    public static Smbios Build(SmbiosSpec spec)
    {
        ArgumentNullException.ThrowIfNull(spec);
        var tables = new Smbios();
        if (spec.HasBios)
        {
            tables.Bios(spec);
        }

        tables.System(spec);
        tables.Chassis(spec);
        for (int i = 0; i < spec.Sockets; i++)
        {
            tables.Processor(spec, i);
        }

        tables.Memory(spec);

        // §7.33: no errors detected at boot. §7.46: the end.
        tables.Add(32, 0x2000, new byte[7]);
        tables.Add(127, 0x7F00, []);
        return tables;
    }

    /// <summary>The entry point (§5.2.1) for structures at an address; firmware corrects it for another place.</summary>
    public byte[] Anchor(uint tablesAddress)
    {
        byte[] anchor = new byte[AnchorBytes];
        "_SM_"u8.CopyTo(anchor);
        anchor[5] = AnchorBytes;
        anchor[6] = 2;
        anchor[7] = 8;
        BinaryPrimitives.WriteUInt16LittleEndian(anchor.AsSpan(8), (ushort)_largest);
        "_DMI_"u8.CopyTo(anchor.AsSpan(16));
        BinaryPrimitives.WriteUInt16LittleEndian(anchor.AsSpan(22), (ushort)_bytes.Count);
        BinaryPrimitives.WriteUInt32LittleEndian(anchor.AsSpan(24), tablesAddress);
        BinaryPrimitives.WriteUInt16LittleEndian(anchor.AsSpan(28), (ushort)_count);
        anchor[30] = 0x28;
        anchor[21] = AcpiTables.Checksum(anchor.AsSpan(16, 15));
        anchor[4] = AcpiTables.Checksum(anchor);
        return anchor;
    }

    /// <summary>Entry point and structures in one piece for an address below 4 GiB, a multiple of 16.</summary>
    public byte[] PlaceAt(uint address)
    {
        const int Gap = 32;
        byte[] placed = new byte[Gap + _bytes.Count];
        Anchor(address + Gap).CopyTo(placed, 0);
        _bytes.CopyTo(placed, Gap);
        return placed;
    }

    /// <summary>Gives the tables to firmware.</summary>
    public void AddTo(FwCfg fwCfg)
    {
        ArgumentNullException.ThrowIfNull(fwCfg);
        fwCfg.AddFile(AnchorFile, Anchor(0));
        fwCfg.AddFile(TablesFile, Tables);
    }

    // §7.1. The ROM size byte says 64 KiB; no feature but "is a virtual machine" (extension byte 2, bit 4) and ACPI.
    private void Bios(SmbiosSpec spec)
    {
        byte[] body = new byte[20];
        body[0] = 1;
        body[1] = 2;
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(2), 0xF000);
        body[4] = 3;
        BinaryPrimitives.WriteUInt64LittleEndian(body.AsSpan(6), 1 << 3);
        body[14] = 1;
        body[15] = 1 << 4;
        body.AsSpan(16, 4).Fill(0xFF);
        Add(0, 0x0000, body, Maker, spec.Version, "01/01/2026");
    }

    // §7.2. Wake-up type: power switch.
    private void System(SmbiosSpec spec)
    {
        byte[] body = new byte[23];
        body[0] = 1;
        body[1] = 2;
        body[2] = 3;
        body[3] = 4;
        spec.Uuid.TryWriteBytes(body.AsSpan(4, 16));
        body[20] = 6;
        Add(1, 0x0100, body, Maker, "Virtual machine", spec.Version, spec.Name);
    }

    // §7.4. Type "other"; all states safe.
    private void Chassis(SmbiosSpec spec)
    {
        byte[] body = new byte[18];
        body[0] = 1;
        body[1] = 1;
        body[2] = 2;
        body[5] = body[6] = body[7] = 3;
        body[8] = 2;
        Add(3, 0x0300, body, Maker, spec.Version);
    }

    // §7.5. Central processor, populated and enabled; 64-bit and multi-core capabilities.
    private void Processor(SmbiosSpec spec, int index)
    {
        byte[] body = new byte[44];
        body[0] = 1;
        body[1] = 3;
        body[2] = 1;
        body[3] = 2;
        BinaryPrimitives.WriteUInt32LittleEndian(body.AsSpan(4), spec.CpuSignature);
        body[20] = 0x41;
        body[21] = 1;
        body.AsSpan(22, 6).Fill(0xFF);
        byte cores = (byte)Math.Min(spec.Cores, 255);
        body[31] = cores;
        body[32] = cores;
        body[33] = (byte)Math.Min(spec.Threads, 255);
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(34), 1 << 2 | 1 << 3);
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(36), 0x01);
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(38), (ushort)spec.Cores);
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(40), (ushort)spec.Cores);
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(42), (ushort)spec.Threads);
        Add(4, (ushort)(0x0400 + index), body, string.Create(CultureInfo.InvariantCulture, $"CPU {index}"), Maker);
    }

    // §7.17 array, §7.18 devices, §7.20 mapped addresses.
    private void Memory(SmbiosSpec spec)
    {
        ulong total = spec.LowBytes + spec.HighBytes;
        int devices = (int)((total + LargestDevice - 1) / LargestDevice);
        byte[] array = new byte[19];
        array[0] = 1;
        array[1] = 3;
        array[2] = 3;
        BinaryPrimitives.WriteUInt32LittleEndian(array.AsSpan(3), 0x8000_0000);
        BinaryPrimitives.WriteUInt16LittleEndian(array.AsSpan(7), 0xFFFE);
        BinaryPrimitives.WriteUInt16LittleEndian(array.AsSpan(9), (ushort)devices);
        BinaryPrimitives.WriteUInt64LittleEndian(array.AsSpan(11), total);
        Add(16, 0x1000, array);
        for (int i = 0; i < devices; i++)
        {
            ulong size = Math.Min(total - ((ulong)i * LargestDevice), LargestDevice);
            byte[] device = new byte[36];
            BinaryPrimitives.WriteUInt16LittleEndian(device, 0x1000);
            BinaryPrimitives.WriteUInt16LittleEndian(device.AsSpan(2), 0xFFFE);
            device.AsSpan(4, 4).Fill(0xFF);

            // In MiB, or in KiB with bit 15 where it is not whole.
            bool whole = size % (1 << 20) == 0;
            BinaryPrimitives.WriteUInt16LittleEndian(
                device.AsSpan(8), whole ? (ushort)(size >> 20) : (ushort)(0x8000 | (size >> 10)));
            device[10] = 9;
            device[12] = 1;
            device[14] = 7;
            BinaryPrimitives.WriteUInt16LittleEndian(device.AsSpan(15), 1 << 1);
            device[19] = 2;
            Add(17, (ushort)(0x1100 + i), device, string.Create(CultureInfo.InvariantCulture, $"DIMM {i}"), Maker);
        }

        Mapped(0, 0, spec.LowBytes);
        if (spec.HighBytes > 0)
        {
            Mapped(1, 1UL << 32, spec.HighBytes);
        }
    }

    private void Mapped(int index, ulong start, ulong lengthBytes)
    {
        byte[] body = new byte[27];
        ulong last = start + lengthBytes - 1;
        bool isExtended = last >> 10 >= uint.MaxValue;
        BinaryPrimitives.WriteUInt32LittleEndian(body, isExtended ? uint.MaxValue : (uint)(start >> 10));
        BinaryPrimitives.WriteUInt32LittleEndian(body.AsSpan(4), isExtended ? uint.MaxValue : (uint)(last >> 10));
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(8), 0x1000);
        body[10] = 1;
        if (isExtended)
        {
            BinaryPrimitives.WriteUInt64LittleEndian(body.AsSpan(11), start);
            BinaryPrimitives.WriteUInt64LittleEndian(body.AsSpan(19), last);
        }

        Add(19, (ushort)(0x1300 + index), body);
    }

    // §6.1.2: type, length, handle, the rest, then strings that end with NUL and an empty one.
    private void Add(byte type, ushort handle, ReadOnlySpan<byte> body, params ReadOnlySpan<string> strings)
    {
        int start = _bytes.Count;
        _bytes.AddRange([type, (byte)(4 + body.Length), (byte)handle, (byte)(handle >> 8)]);
        _bytes.AddRange(body);
        foreach (string text in strings)
        {
            _bytes.AddRange(Encoding.ASCII.GetBytes(text));
            _bytes.Add(0);
        }

        if (strings.Length == 0)
        {
            _bytes.Add(0);
        }

        _bytes.Add(0);
        _count++;
        _largest = Math.Max(_largest, _bytes.Count - start);
    }
}

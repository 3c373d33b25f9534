// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;

namespace Vmm.Devices.Firmware;

/// <summary>
/// Writes the script ("etc/table-loader") by which firmware places ACPI tables that it got through fw_cfg: allocate a
/// file, add its address to a pointer in another, compute a checksum. The format is QEMU's linker/loader: commands of
/// 128 bytes, little-endian.
/// </summary>
public sealed class TableLoader
{
    /// <summary>Name of the script's file.</summary>
    public const string FileName = "etc/table-loader";

    private const int CommandBytes = 128;
    private const int NameBytes = 56;

    private readonly List<byte> _script = [];

    /// <summary>Loads a file somewhere.</summary>
    /// <param name="file">fw_cfg file name.</param>
    /// <param name="alignment">A power of two.</param>
    /// <param name="inLowMemory">In 0xE0000..0xFFFFF, where an RSDP is searched for.</param>
    public void Allocate(string file, uint alignment, bool inLowMemory)
    {
        Span<byte> command = stackalloc byte[CommandBytes];
        BinaryPrimitives.WriteUInt32LittleEndian(command, 1);
        Name(command[4..], file);
        BinaryPrimitives.WriteUInt32LittleEndian(command[60..], alignment);
        command[64] = inLowMemory ? (byte)2 : (byte)1;
        Append(command);
    }

    /// <summary>Adds the address of <paramref name="source"/> to the number at a place in <paramref name="target"/>.</summary>
    public void AddPointer(string target, string source, uint offset, byte sizeBytes)
    {
        Span<byte> command = stackalloc byte[CommandBytes];
        BinaryPrimitives.WriteUInt32LittleEndian(command, 2);
        Name(command[4..], target);
        Name(command[60..], source);
        BinaryPrimitives.WriteUInt32LittleEndian(command[116..], offset);
        command[120] = sizeBytes;
        Append(command);
    }

    /// <summary>Makes the sum of a range zero through the byte at <paramref name="offset"/>.</summary>
    public void AddChecksum(string file, uint offset, uint start, uint lengthBytes)
    {
        Span<byte> command = stackalloc byte[CommandBytes];
        BinaryPrimitives.WriteUInt32LittleEndian(command, 3);
        Name(command[4..], file);
        BinaryPrimitives.WriteUInt32LittleEndian(command[60..], offset);
        BinaryPrimitives.WriteUInt32LittleEndian(command[64..], start);
        BinaryPrimitives.WriteUInt32LittleEndian(command[68..], lengthBytes);
        Append(command);
    }

    /// <summary>Writes the address of a file plus an offset back into a writable fw_cfg file.</summary>
    public void WritePointer(string target, uint targetOffset, byte sizeBytes, string source, uint sourceOffset)
    {
        Span<byte> command = stackalloc byte[CommandBytes];
        BinaryPrimitives.WriteUInt32LittleEndian(command, 4);
        Name(command[4..], target);
        Name(command[60..], source);
        BinaryPrimitives.WriteUInt32LittleEndian(command[116..], targetOffset);
        BinaryPrimitives.WriteUInt32LittleEndian(command[120..], sourceOffset);
        command[124] = sizeBytes;
        Append(command);
    }

    /// <summary>The script.</summary>
    public byte[] ToArray() => _script.ToArray();

    private static void Name(Span<byte> into, string name)
    {
        if (Encoding.ASCII.GetByteCount(name) >= NameBytes)
        {
            throw new ArgumentException($"fw_cfg file name is too long: {name}", nameof(name));
        }

        Encoding.ASCII.GetBytes(name, into);
    }

    private void Append(ReadOnlySpan<byte> command) => _script.AddRange(command);
}

/// <summary>Gives ACPI tables to firmware.</summary>
public static class FwCfgAcpi
{
    private const string Tables = "etc/acpi/tables";
    private const string Root = "etc/acpi/rsdp";
    private const int RootBytes = 36;

    /// <summary>Adds the tables, their root pointer and the script that places them. Before the machine runs.</summary>
    /// <param name="fwCfg">Takes the files.</param>
    /// <param name="slackBytes">How many bytes the tables may grow by after this call.</param>
    /// <param name="build">
    /// Makes the tables; called now for their size, and again whenever a guest selects one of the files, because the tables
    /// tell of registers that firmware has set by then. The results must differ only while firmware is at work.
    /// </param>
    public static void AddTo(FwCfg fwCfg, int slackBytes, Func<AcpiBlob> build)
    {
        ArgumentNullException.ThrowIfNull(fwCfg);
        ArgumentNullException.ThrowIfNull(build);
        AcpiBlob now = build();
        fwCfg.AddComputedFile(Tables, now.Tables.Length + slackBytes, () => build().Tables);
        fwCfg.AddComputedFile(Root, RootBytes, () => build().RootPointer(0));

        // A command of zeroes is none, so that the script can be longer than it needs to be.
        fwCfg.AddComputedFile(TableLoader.FileName, Script(now).Length, () => Script(build()));
    }

    private static byte[] Script(AcpiBlob blob)
    {
        var loader = new TableLoader();
        loader.Allocate(Tables, 64, inLowMemory: false);
        loader.Allocate(Root, 16, inLowMemory: true);
        foreach (AcpiPointer pointer in blob.Pointers)
        {
            loader.AddPointer(Tables, Tables, (uint)pointer.Offset, (byte)pointer.Bytes);
        }

        foreach (AcpiChecksum checksum in blob.Checksums)
        {
            loader.AddChecksum(Tables, (uint)checksum.At, (uint)checksum.Start, (uint)checksum.Length);
        }

        // Root pointer (ACPI 6.5 §5.2.5.3): RSDT at 16, XSDT at 24, checksums over 20 and over 36 bytes.
        loader.AddPointer(Root, Tables, 16, 4);
        loader.AddPointer(Root, Tables, 24, 8);
        loader.AddChecksum(Root, 8, 0, 20);
        loader.AddChecksum(Root, 32, 0, 36);
        return loader.ToArray();
    }
}

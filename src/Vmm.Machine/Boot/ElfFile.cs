// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;

namespace Vmm.Machine.Boot;

/// <summary>One program header.</summary>
internal readonly record struct ElfSegment(
    uint Type, ulong Offset, ulong VirtualAddress, ulong PhysicalAddress, ulong FileBytes, ulong MemoryBytes, ulong Align);

/// <summary>Reads the parts of an x86 ELF executable that a loader needs (System V gABI, chapter 5).</summary>
internal sealed class ElfFile
{
    /// <summary>PT_LOAD.</summary>
    public const uint Load = 1;

    /// <summary>PT_NOTE.</summary>
    public const uint Note = 4;

    private const int MaxSegments = 64;

    private ElfFile(bool is64, ulong entry, List<ElfSegment> segments)
    {
        Is64 = is64;
        Entry = entry;
        Segments = segments;
    }

    /// <summary>ELFCLASS64.</summary>
    public bool Is64 { get; }

    /// <summary>Entry point, a virtual address.</summary>
    public ulong Entry { get; }

    /// <summary>Program headers.</summary>
    public IReadOnlyList<ElfSegment> Segments { get; }

    /// <summary>Recognises the magic number.</summary>
    public static bool Recognises(byte[] head) =>
        head.Length >= 52 && head[0] == 0x7F && head[1] == (byte)'E' && head[2] == (byte)'L' && head[3] == (byte)'F';

    /// <summary>Parses the headers.</summary>
    public static ElfFile Parse(BootFile file, byte[] head)
    {
        bool is64 = head[4] == 2;
        ushort machine = BinaryPrimitives.ReadUInt16LittleEndian(head.AsSpan(18));
        if (head[5] != 1 || (machine != 3 && machine != 62) || (is64 && head.Length < 64))
        {
            throw new BootException($"kernel {file.Path}: is an ELF file, but not for x86");
        }

        ulong entry = is64 ? Read64(head, 24) : Read32(head, 24);
        ulong table = is64 ? Read64(head, 32) : Read32(head, 28);
        int entryBytes = BinaryPrimitives.ReadUInt16LittleEndian(head.AsSpan(is64 ? 54 : 42));
        int count = BinaryPrimitives.ReadUInt16LittleEndian(head.AsSpan(is64 ? 56 : 44));
        int expected = is64 ? 56 : 32;
        if (entryBytes < expected || count == 0 || count > MaxSegments || table > (ulong)file.LengthBytes)
        {
            throw new BootException($"kernel {file.Path}: has no usable ELF program headers");
        }

        var segments = new List<ElfSegment>(count);
        var bytes = new byte[entryBytes];
        for (int i = 0; i < count; i++)
        {
            file.Read((long)table + ((long)i * entryBytes), bytes);
            segments.Add(is64
                ? new ElfSegment(
                    Read32(bytes, 0), Read64(bytes, 8), Read64(bytes, 16), Read64(bytes, 24), Read64(bytes, 32), Read64(bytes, 40), Read64(bytes, 48))
                : new ElfSegment(
                    Read32(bytes, 0), Read32(bytes, 4), Read32(bytes, 8), Read32(bytes, 12), Read32(bytes, 16), Read32(bytes, 20), Read32(bytes, 28)));
        }

        return new ElfFile(is64, entry, segments);
    }

    /// <summary>Copies the PT_LOAD segments to their physical addresses.</summary>
    /// <returns>One past the highest address used.</returns>
    public ulong LoadSegments(BootTarget target)
    {
        ulong end = 0;
        foreach (ElfSegment segment in Segments)
        {
            if (segment.Type != Load || segment.MemoryBytes == 0)
            {
                continue;
            }

            if (segment.FileBytes > segment.MemoryBytes || segment.Offset > long.MaxValue
                || !target.FitsLow(segment.PhysicalAddress, segment.MemoryBytes))
            {
                throw new BootException(
                    $"kernel {target.Kernel.Path}: a segment of {segment.MemoryBytes >> 10} KiB at 0x{segment.PhysicalAddress:x} does not "
                    + $"fit into {target.Layout.LowBytes >> 20} MiB below 4 GiB");
            }

            if (BootTarget.IsTaken(segment.PhysicalAddress, segment.MemoryBytes))
            {
                throw new BootException(
                    $"kernel {target.Kernel.Path}: a segment of {segment.MemoryBytes >> 10} KiB at 0x{segment.PhysicalAddress:x} lies where "
                    + "its parameters go; boot it through firmware");
            }

            target.Kernel.CopyTo(target.Memory, (long)segment.Offset, (long)segment.FileBytes, segment.PhysicalAddress);
            target.Clear(segment.PhysicalAddress + segment.FileBytes, segment.MemoryBytes - segment.FileBytes);
            end = Math.Max(end, segment.PhysicalAddress + segment.MemoryBytes);
        }

        return end;
    }

    /// <summary>Finds a note of the Xen name.</summary>
    public static bool TryFindXenNote(BootFile file, ElfSegment segment, uint type, out ulong value)
    {
        value = 0;
        if (segment.Type != Note || segment.FileBytes > 1 << 20 || segment.Offset > long.MaxValue)
        {
            return false;
        }

        var notes = new byte[(int)segment.FileBytes];
        file.Read((long)segment.Offset, notes);
        long at = 0;
        while (at + 12 <= notes.Length)
        {
            uint nameBytes = Read32(notes, (int)at);
            uint descriptionBytes = Read32(notes, (int)at + 4);
            uint noteType = Read32(notes, (int)at + 8);
            long name = at + 12;
            long description = name + ((nameBytes + 3L) & ~3L);
            long next = description + ((descriptionBytes + 3L) & ~3L);
            if (next > notes.Length)
            {
                return false;
            }

            bool xen = nameBytes == 4 && notes.AsSpan((int)name, 4).SequenceEqual("Xen\0"u8);
            if (xen && noteType == type && descriptionBytes is 4 or 8)
            {
                value = descriptionBytes == 4 ? Read32(notes, (int)description) : Read64(notes, (int)description);
                return true;
            }

            at = next;
        }

        return false;
    }

    private static ulong Read64(byte[] bytes, int at) => BinaryPrimitives.ReadUInt64LittleEndian(bytes.AsSpan(at));

    private static uint Read32(byte[] bytes, int at) => BinaryPrimitives.ReadUInt32LittleEndian(bytes.AsSpan(at));
}

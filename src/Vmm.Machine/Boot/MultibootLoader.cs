// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;

namespace Vmm.Machine.Boot;

/// <summary>
/// Multiboot 1 (GNU Multiboot Specification 0.6.96): a header in the first 8 KiB; load addresses from the header (flag 16)
/// or from ELF; entered in flat 32-bit mode with the magic number in EAX and the information structure in EBX.
/// </summary>
internal static class MultibootLoader
{
    private const uint HeaderMagic = 0x1BADB002;
    private const uint BootMagic = 0x2BADB002;
    private const uint HasAddresses = 1 << 16;
    private const uint WantsVideo = 1 << 2;
    private const ulong Modules = LowMemory.Parameters + 0x100;
    private const ulong MemoryMap = LowMemory.Parameters + 0x200;
    private const ulong LoaderName = LowMemory.Parameters + 0x180;

    /// <summary>Looks for the header: magic, flags and checksum add up to 0 (§3.1.1).</summary>
    public static bool TryFindHeader(byte[] head, out int at)
    {
        for (at = 0; at + 12 <= Math.Min(head.Length, 8192); at += 4)
        {
            uint magic = Read(head, at);
            if (magic == HeaderMagic && unchecked(magic + Read(head, at + 4) + Read(head, at + 8)) == 0)
            {
                return true;
            }
        }

        return false;
    }

    /// <summary>Loads and sets the entry state.</summary>
    public static void Load(BootTarget target, int headerAt)
    {
        byte[] head = target.Head;
        uint flags = Read(head, headerAt + 4);
        if ((flags & 0xFFF8 & ~WantsVideo) != 0)
        {
            throw new BootException($"kernel {target.Kernel.Path}: asks for multiboot features 0x{flags & 0xFFF8:x} that are not known");
        }

        ulong entry;
        ulong end;
        if ((flags & HasAddresses) != 0)
        {
            (entry, end) = LoadByHeader(target, headerAt);
        }
        else if (ElfFile.Recognises(head))
        {
            ElfFile elf = ElfFile.Parse(target.Kernel, head);
            entry = elf.Entry;
            foreach (ElfSegment segment in elf.Segments)
            {
                if (segment.Type == ElfFile.Load && elf.Entry - segment.VirtualAddress < segment.MemoryBytes)
                {
                    entry = elf.Entry - segment.VirtualAddress + segment.PhysicalAddress;
                }
            }

            end = elf.LoadSegments(target);
        }
        else
        {
            throw new BootException($"kernel {target.Kernel.Path}: multiboot header without load addresses in a file that is not ELF");
        }

        ulong module = target.LoadInitrd((end + 0xFFF) & ~0xFFFUL, MemoryLayout.HoleStart);
        target.WriteCommandLine(0xFFFF);
        WriteInformation(target, module);
        target.EnterProtectedMode(entry);
        target.Cpu.Gpr[0] = BootMagic;
        target.Cpu.Gpr[3] = LowMemory.Parameters;
    }

    private static (ulong Entry, ulong End) LoadByHeader(BootTarget target, int headerAt)
    {
        byte[] head = target.Head;
        if (headerAt + 32 > head.Length)
        {
            throw target.Kernel.Truncated();
        }

        uint headerAddress = Read(head, headerAt + 12);
        uint load = Read(head, headerAt + 16);
        uint loadEnd = Read(head, headerAt + 20);
        uint bssEnd = Read(head, headerAt + 24);
        uint entry = Read(head, headerAt + 28);
        long offset = headerAt - ((long)headerAddress - load);
        long length = loadEnd == 0 ? target.Kernel.LengthBytes - offset : (long)loadEnd - load;
        if (load > headerAddress || offset < 0 || length <= 0 || !target.FitsLow(load, (ulong)length))
        {
            throw new BootException($"kernel {target.Kernel.Path}: its multiboot header has impossible load addresses");
        }

        target.Kernel.CopyTo(target.Memory, offset, length, load);
        ulong end = load + (ulong)length;
        if (bssEnd > end)
        {
            if (!target.FitsLow(load, bssEnd - load))
            {
                throw new BootException($"kernel {target.Kernel.Path}: its bss does not fit into the guest's memory");
            }

            target.Clear(end, bssEnd - end);
            end = bssEnd;
        }

        return (entry, end);
    }

    // §3.3: mem_* (flag 0), cmdline (2), modules (3), memory map (6), boot loader name (9).
    private static void WriteInformation(BootTarget target, ulong module)
    {
        var info = new byte[0x400];
        uint flags = (1 << 0) | (1 << 2) | (1 << 6) | (1 << 9);
        BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(4), (uint)(MemoryLayout.ConventionalEnd >> 10));
        BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(8), (uint)((target.Layout.LowBytes - 0x10_0000) >> 10));
        BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(16), (uint)LowMemory.CommandLine);
        if (target.Initrd is not null)
        {
            flags |= 1 << 3;
            BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(20), 1);
            BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(24), (uint)Modules);
            BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(0x100), (uint)module);
            BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(0x104), (uint)(module + (ulong)target.Initrd.LengthBytes));
            BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(0x108), (uint)LowMemory.CommandLine);
        }

        IReadOnlyList<E820Entry> map = target.Layout.DirectBootMap();
        BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(44), (uint)map.Count * 24);
        BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(48), (uint)MemoryMap);
        for (int i = 0; i < map.Count; i++)
        {
            Span<byte> at = info.AsSpan(0x200 + (i * 24));
            BinaryPrimitives.WriteUInt32LittleEndian(at, 20);
            BinaryPrimitives.WriteUInt64LittleEndian(at[4..], map[i].Start);
            BinaryPrimitives.WriteUInt64LittleEndian(at[12..], map[i].LengthBytes);
            BinaryPrimitives.WriteUInt32LittleEndian(at[20..], (uint)map[i].Kind);
        }

        BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(64), (uint)LoaderName);
        "vmctl\0"u8.CopyTo(info.AsSpan(0x180));
        BinaryPrimitives.WriteUInt32LittleEndian(info, flags);
        target.Write(LowMemory.Parameters, info);
    }

    private static uint Read(byte[] bytes, int at) => BinaryPrimitives.ReadUInt32LittleEndian(bytes.AsSpan(at));
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;

namespace Vmm.Machine.Boot;

/// <summary>
/// The PVH boot protocol (Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h): an ELF file with the note
/// XEN_ELFNOTE_PHYS32_ENTRY, entered in flat 32-bit mode with EBX at a start-info structure.
/// </summary>
internal static class PvhLoader
{
    private const uint Phys32Entry = 18;
    private const uint StartMagic = 0x336EC578;
    private const ulong ModuleList = LowMemory.Parameters + 0x100;
    private const ulong MemoryMap = LowMemory.Parameters + 0x200;

    /// <summary>Loads and sets the entry state.</summary>
    public static void Load(BootTarget target)
    {
        ElfFile elf = ElfFile.Parse(target.Kernel, target.Head);
        ulong entry = 0;
        bool found = false;
        foreach (ElfSegment segment in elf.Segments)
        {
            found = found || ElfFile.TryFindXenNote(target.Kernel, segment, Phys32Entry, out entry);
        }

        if (!found)
        {
            throw new BootException(
                $"kernel {target.Kernel.Path}: is an ELF file without a PVH entry note; use its bzImage or boot it through firmware");
        }

        ulong end = elf.LoadSegments(target);
        ulong initrd = target.LoadInitrd(end, MemoryLayout.HoleStart);
        target.WriteCommandLine(0xFFFF);

        IReadOnlyList<E820Entry> map = target.Layout.DirectBootMap();
        var info = new byte[0x400];
        BinaryPrimitives.WriteUInt32LittleEndian(info, StartMagic);
        BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(4), 1);
        BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(12), initrd == 0 ? 0u : 1u);
        BinaryPrimitives.WriteUInt64LittleEndian(info.AsSpan(16), initrd == 0 ? 0 : ModuleList);
        BinaryPrimitives.WriteUInt64LittleEndian(info.AsSpan(24), LowMemory.CommandLine);
        BinaryPrimitives.WriteUInt64LittleEndian(info.AsSpan(32), target.RsdpAddress);
        BinaryPrimitives.WriteUInt64LittleEndian(info.AsSpan(40), MemoryMap);
        BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(48), (uint)map.Count);
        if (target.Initrd is not null)
        {
            BinaryPrimitives.WriteUInt64LittleEndian(info.AsSpan(0x100), initrd);
            BinaryPrimitives.WriteUInt64LittleEndian(info.AsSpan(0x108), (ulong)target.Initrd.LengthBytes);
        }

        for (int i = 0; i < map.Count; i++)
        {
            Span<byte> at = info.AsSpan(0x200 + (i * 24));
            BinaryPrimitives.WriteUInt64LittleEndian(at, map[i].Start);
            BinaryPrimitives.WriteUInt64LittleEndian(at[8..], map[i].LengthBytes);
            BinaryPrimitives.WriteUInt32LittleEndian(at[16..], (uint)map[i].Kind);
        }

        target.Write(LowMemory.Parameters, info);
        target.EnterProtectedMode(entry);
        target.Cpu.Gpr[3] = LowMemory.Parameters;
    }
}

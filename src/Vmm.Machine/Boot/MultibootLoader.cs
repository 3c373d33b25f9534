// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using Vmm.Config;

namespace Vmm.Machine.Boot;

/// <summary>
/// Multiboot 1 (GNU Multiboot Specification 0.6.96): a header in the first 8 KiB; load addresses from the header (flag 16)
/// or from ELF; entered in flat 32-bit mode with the magic number in EAX and the information structure in EBX. Modules
/// follow the kernel page by page, as GRUB and QEMU place them: a kernel that maps only low memory directly reaches them.
/// </summary>
internal static class MultibootLoader
{
    /// <summary>How many modules the information structure has room for.</summary>
    public const int MaxModules = (MapAt - ModulesAt) / ModuleBytes;

    private const uint HeaderMagic = 0x1BADB002;
    private const uint BootMagic = 0x2BADB002;

    // Header flags (§3.1.2). A loader must know bits 0 to 15 or refuse; it gives pages and memory to all and no video mode to any.
    private const uint WantsPages = 1 << 0;
    private const uint WantsMemory = 1 << 1;
    private const uint WantsVideo = 1 << 2;
    private const uint MustKnow = 0xFFFF;
    private const uint HasAddresses = 1 << 16;

    // What lies at LowMemory.Parameters: the structure of §3.3, and behind it what it points at.
    private const int LoaderNameAt = 0x80;
    private const int ModulesAt = 0x100;
    private const int MapAt = 0x200;
    private const int InfoBytes = 0x400;
    private const int ModuleBytes = 16;
    private const int MapEntryBytes = 24;

    // Flags of the structure (§3.3).
    private const uint InfoMemory = 1 << 0;
    private const uint InfoCommandLine = 1 << 2;
    private const uint InfoModules = 1 << 3;
    private const uint InfoMap = 1 << 6;
    private const uint InfoLoaderName = 1 << 9;

    private readonly record struct PlacedModule(ulong Start, ulong End, ulong CommandLine);

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
    public static void Load(BootTarget target, int headerAt, IReadOnlyList<BootModuleSpec> modules)
    {
        byte[] head = target.Head;
        uint flags = Read(head, headerAt + 4);
        uint unknown = flags & MustKnow & ~(WantsPages | WantsMemory | WantsVideo);
        if (unknown != 0)
        {
            throw new BootException($"kernel {target.Kernel.Path}: asks for multiboot features 0x{unknown:x} that are not known");
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

        target.WriteCommandLine(LowMemory.CommandLineBytes - 1);
        WriteInformation(target, PlaceModules(target, modules, end));
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

        ulong loaded = load + (ulong)length;
        ulong end = Math.Max(loaded, bssEnd);
        if (!target.FitsLow(load, end - load))
        {
            throw new BootException($"kernel {target.Kernel.Path}: its bss does not fit into the guest's memory; give the VM more with memory:");
        }

        if (BootTarget.IsTaken(load, end - load))
        {
            throw new BootException(
                $"kernel {target.Kernel.Path}: its load address 0x{load:x} lies where its parameters go; boot it through firmware");
        }

        target.Kernel.CopyTo(target.Memory, offset, length, load);
        target.Clear(loaded, end - loaded);
        return (entry, end);
    }

    // Pages after the kernel and never below 1 MiB, where the BIOS's areas and the tables lie. A file longer than the memory is
    // refused by its length before any of it is read.
    private static List<PlacedModule> PlaceModules(BootTarget target, IReadOnlyList<BootModuleSpec> modules, ulong kernelEnd)
    {
        var placed = new List<PlacedModule>();
        ulong next = Math.Max(PageUp(kernelEnd), MemoryLayout.TablesEnd);
        if (target.Initrd is not null)
        {
            Place(target, target.Initrd, "initrd", LowMemory.CommandLine, ref next, placed);
        }

        if (placed.Count + modules.Count > MaxModules)
        {
            throw new BootException($"modules: there are {placed.Count + modules.Count}; a kernel can be given {MaxModules}");
        }

        ulong text = LowMemory.ModuleCommandLines;
        foreach (BootModuleSpec module in modules)
        {
            byte[] line = Encoding.UTF8.GetBytes(module.Cmdline + "\0");
            if (text + (uint)line.Length > LowMemory.ModuleCommandLines + LowMemory.CommandLineBytes)
            {
                throw new BootException($"modules: their command lines take more than {LowMemory.CommandLineBytes >> 10} KiB");
            }

            target.Write(text, line);
            using BootFile file = BootFile.Open(module.Path, "module");
            Place(target, file, "module", text, ref next, placed);
            text += (uint)line.Length;
        }

        return placed;
    }

    private static void Place(
        BootTarget target, BootFile file, string what, ulong commandLine, ref ulong next, List<PlacedModule> placed)
    {
        ulong size = (ulong)file.LengthBytes;
        if (!target.FitsLow(next, size))
        {
            throw new BootException(
                $"{what} {file.Path}: {size >> 20} MiB do not fit behind the kernel into "
                    + $"{target.Layout.LowBytes >> 20} MiB below 4 GiB; give the VM more with memory:");
        }

        file.CopyTo(target.Memory, 0, file.LengthBytes, next);
        placed.Add(new PlacedModule(next, next + size, commandLine));
        next = PageUp(next + size);
    }

    private static void WriteInformation(BootTarget target, List<PlacedModule> modules)
    {
        var info = new byte[InfoBytes];
        Write(info, 0, InfoMemory | InfoCommandLine | InfoMap | InfoLoaderName | (modules.Count > 0 ? InfoModules : 0));
        Write(info, 4, MemoryLayout.ConventionalEnd >> 10);
        Write(info, 8, (target.Layout.LowBytes - MemoryLayout.TablesEnd) >> 10);
        Write(info, 16, LowMemory.CommandLine);
        if (modules.Count > 0)
        {
            Write(info, 20, (uint)modules.Count);
            Write(info, 24, LowMemory.Parameters + ModulesAt);
        }

        for (int i = 0; i < modules.Count; i++)
        {
            int at = ModulesAt + (i * ModuleBytes);
            Write(info, at, modules[i].Start);
            Write(info, at + 4, modules[i].End);
            Write(info, at + 8, modules[i].CommandLine);
        }

        IReadOnlyList<E820Entry> map = target.Layout.DirectBootMap();
        Write(info, 44, (uint)(map.Count * MapEntryBytes));
        Write(info, 48, LowMemory.Parameters + MapAt);
        for (int i = 0; i < map.Count; i++)
        {
            int at = MapAt + (i * MapEntryBytes);
            Write(info, at, MapEntryBytes - 4);
            BinaryPrimitives.WriteUInt64LittleEndian(info.AsSpan(at + 4), map[i].Start);
            BinaryPrimitives.WriteUInt64LittleEndian(info.AsSpan(at + 12), map[i].LengthBytes);
            Write(info, at + 20, (uint)map[i].Kind);
        }

        Write(info, 64, LowMemory.Parameters + LoaderNameAt);
        "vmctl\0"u8.CopyTo(info.AsSpan(LoaderNameAt));
        target.Write(LowMemory.Parameters, info);
    }

    // Everything that a 32-bit kernel is pointed at lies below 4 GiB.
    private static void Write(byte[] info, int at, ulong value) =>
        BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(at), checked((uint)value));

    private static ulong PageUp(ulong address) => (address + 0xFFF) & ~0xFFFUL;

    private static uint Read(byte[] bytes, int at) => BinaryPrimitives.ReadUInt32LittleEndian(bytes.AsSpan(at));
}

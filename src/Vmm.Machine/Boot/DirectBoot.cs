// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using Vmm.Config;
using Vmm.Core;
using Vmm.Memory;

namespace Vmm.Machine.Boot;

// Theory. Direct boot starts a kernel without firmware: the file is recognised by content, copied to where it wants to
// be, and the boot processor is put into the state that its boot protocol asks for. Three protocols are known:
//   bzImage      Linux/x86 boot protocol 2.06 and later; 64-bit entry where the kernel has one, else 32-bit
//   PVH          ELF with a XEN_ELFNOTE_PHYS32_ENTRY note (Xen's docs/misc/pvh); Linux vmlinux, FreeBSD, and others
//   multiboot 1  GNU Multiboot Specification 0.6.96; a.out kludge or ELF
// Low memory below the video window holds what the protocols hand over; the addresses are in LowMemory. Everything in a
// file is untrusted: sizes and addresses are checked against the file and against guest memory before use.

/// <summary>Addresses in guest memory that direct boot uses.</summary>
internal static class LowMemory
{
    /// <summary>A flat GDT: null, unused, code, data.</summary>
    public const ulong Gdt = 0x1000;

    /// <summary>Its size.</summary>
    public const int GdtBytes = 32;

    /// <summary>Boot parameters, start info or multiboot information.</summary>
    public const ulong Parameters = 0x7000;

    /// <summary>Room for them: the largest is Linux's zero page.</summary>
    public const ulong ParameterBytes = 0x1000;

    /// <summary>Identity page tables: PML4, PDPT, four page directories.</summary>
    public const ulong PageTables = 0x9000;

    /// <summary>Command line, up to <see cref="CommandLineBytes"/> with its zero.</summary>
    public const ulong CommandLine = 0x2_0000;

    /// <summary>Room for the command line; as much again follows for those of modules.</summary>
    public const uint CommandLineBytes = 0x1_0000;

    /// <summary>Command lines of multiboot modules, one after the other.</summary>
    public const ulong ModuleCommandLines = CommandLine + CommandLineBytes;

    /// <summary>Initial stack for protocols that want one.</summary>
    public const ulong StackTop = 0x8000;
}

/// <summary>What to boot.</summary>
/// <param name="KernelPath">Kernel image.</param>
/// <param name="InitrdPath">Initial RAM disk; for a multiboot kernel its only module, which gets the kernel's command line.</param>
/// <param name="CommandLine">Command line.</param>
public sealed record DirectBootRequest(string KernelPath, string? InitrdPath, string CommandLine)
{
    /// <summary>Modules of a multiboot kernel; none when there is an initial RAM disk.</summary>
    public IReadOnlyList<BootModuleSpec> Modules { get; init; } = [];
}

/// <summary>Loads a kernel into guest memory and prepares the boot processor.</summary>
public static class DirectBoot
{
    /// <summary>What <see cref="Load"/> returns for a multiboot kernel.</summary>
    public const string Multiboot = "multiboot";

    private const int HeadBytes = 64 * 1024;

    /// <summary>Loads.</summary>
    /// <param name="request">What to boot.</param>
    /// <param name="memory">Guest memory, RAM mapped.</param>
    /// <param name="layout">Its layout.</param>
    /// <param name="rsdpAddress">Where the ACPI root pointer lies, 0 for none.</param>
    /// <param name="cpu">The boot processor's state after reset; changed to the entry state.</param>
    /// <returns>The protocol's name.</returns>
    /// <exception cref="BootException">The kernel cannot be booted.</exception>
    public static string Load(
        DirectBootRequest request, GuestMemory memory, MemoryLayout layout, ulong rsdpAddress, CpuState cpu)
    {
        ArgumentNullException.ThrowIfNull(request);
        ArgumentNullException.ThrowIfNull(memory);
        ArgumentNullException.ThrowIfNull(layout);
        ArgumentNullException.ThrowIfNull(cpu);
        if (layout.LowBytes < 0x10_0000)
        {
            throw new BootException("memory: direct boot needs at least 1M");
        }

        using BootFile kernel = BootFile.Open(request.KernelPath, "kernel");
        using BootFile? initrd = request.InitrdPath is null ? null : BootFile.Open(request.InitrdPath, "initrd");
        byte[] head = kernel.ReadHead(HeadBytes);
        var target = new BootTarget(kernel, head, initrd, request.CommandLine, memory, layout, rsdpAddress, cpu);
        bool isLinux = LinuxLoader.Recognises(head);
        if (!isLinux && MultibootLoader.TryFindHeader(head, out int at))
        {
            MultibootLoader.Load(target, at, request.Modules);
            return Multiboot;
        }

        if (request.Modules.Count > 0)
        {
            throw new BootException($"kernel {kernel.Path}: is not a multiboot kernel; it takes an initrd: and no modules:");
        }

        if (isLinux)
        {
            LinuxLoader.Load(target);
            return "bzImage";
        }

        if (ElfFile.Recognises(head))
        {
            PvhLoader.Load(target);
            return "PVH";
        }

        string compressed = head is [0x1F, 0x8B, ..] ? "; it is compressed, decompress it with gunzip" : string.Empty;
        throw new BootException(
            $"kernel {kernel.Path}: is neither a Linux bzImage, nor an ELF file with a PVH note, nor a multiboot 1 kernel{compressed}");
    }
}

/// <summary>Everything that a loader works on.</summary>
internal sealed record BootTarget(
    BootFile Kernel,
    byte[] Head,
    BootFile? Initrd,
    string CommandLine,
    GuestMemory Memory,
    MemoryLayout Layout,
    ulong RsdpAddress,
    CpuState Cpu)
{
    private const uint MtrrDefaultType = 0x2FF;
    private const ulong MtrrEnabled = 1 << 11;
    private const ulong MtrrWriteBack = 6;

    /// <summary>Writes; the address must be RAM.</summary>
    public void Write(ulong address, ReadOnlySpan<byte> bytes)
    {
        if (!Memory.TryWrite(address, bytes))
        {
            throw new BootException($"kernel {Kernel.Path}: does not fit into the guest's memory; give the VM more with memory:");
        }
    }

    /// <summary>Writes zeroes.</summary>
    public void Clear(ulong address, ulong lengthBytes)
    {
        var zeroes = new byte[65536];
        while (lengthBytes > 0)
        {
            int count = (int)Math.Min(lengthBytes, (ulong)zeroes.Length);
            Write(address, zeroes.AsSpan(0, count));
            address += (uint)count;
            lengthBytes -= (uint)count;
        }
    }

    /// <summary>True when the range lies in RAM below the hole.</summary>
    public bool FitsLow(ulong address, ulong lengthBytes) => address <= Layout.LowBytes && lengthBytes <= Layout.LowBytes - address;

    /// <summary>True when a part of a kernel would lie under what the loader hands over or under the ACPI tables.</summary>
    public static bool IsTaken(ulong address, ulong lengthBytes)
    {
        ReadOnlySpan<(ulong Start, ulong End)> taken =
        [
            (LowMemory.Gdt, LowMemory.Gdt + LowMemory.GdtBytes),
            (LowMemory.Parameters, LowMemory.Parameters + LowMemory.ParameterBytes),
            (LowMemory.CommandLine, LowMemory.ModuleCommandLines + LowMemory.CommandLineBytes),
            (MemoryLayout.TablesStart, MemoryLayout.TablesEnd),
        ];
        foreach ((ulong start, ulong end) in taken)
        {
            if (lengthBytes != 0 && address < end && address + lengthBytes > start)
            {
                return true;
            }
        }

        return false;
    }

    /// <summary>Writes the command line with its terminating zero.</summary>
    /// <exception cref="BootException">It is longer than the kernel takes.</exception>
    public void WriteCommandLine(uint maximumBytes)
    {
        byte[] text = Encoding.UTF8.GetBytes(CommandLine);
        uint most = Math.Min(maximumBytes, LowMemory.CommandLineBytes - 1);
        if ((uint)text.Length > most)
        {
            throw new BootException($"cmdline: has {text.Length} bytes; this kernel takes at most {most}");
        }

        Write(LowMemory.CommandLine, text);
        Write(LowMemory.CommandLine + (ulong)text.Length, [0]);
    }

    /// <summary>Puts the initrd as high as allowed.</summary>
    /// <param name="floor">First address above the kernel.</param>
    /// <param name="ceiling">Last address allowed plus one.</param>
    /// <returns>Its address; 0 when there is none.</returns>
    public ulong LoadInitrd(ulong floor, ulong ceiling)
    {
        if (Initrd is null)
        {
            return 0;
        }

        ulong size = (ulong)Initrd.LengthBytes;
        ulong top = Math.Min(ceiling, Layout.LowBytes);
        if (size > top || ((top - size) & ~0xFFFUL) < floor)
        {
            throw new BootException(
                $"initrd {Initrd.Path}: {size >> 20} MiB do not fit beside the kernel into "
                    + $"{Layout.LowBytes >> 20} MiB below 4 GiB; give the VM more with memory:");
        }

        ulong address = (top - size) & ~0xFFFUL;
        Initrd.CopyTo(Memory, 0, Initrd.LengthBytes, address);
        return address;
    }

    /// <summary>Writes the flat GDT and loads the segment registers: CS 0x10, others 0x18.</summary>
    public void SetFlatSegments(bool longMode)
    {
        Span<byte> gdt = stackalloc byte[LowMemory.GdtBytes];
        gdt.Clear();
        BinaryPrimitives.WriteUInt64LittleEndian(gdt[16..], longMode ? 0x00AF9B000000FFFFUL : 0x00CF9B000000FFFFUL);
        BinaryPrimitives.WriteUInt64LittleEndian(gdt[24..], 0x00CF93000000FFFFUL);
        Write(LowMemory.Gdt, gdt);
        Cpu.GdtBase = LowMemory.Gdt;
        Cpu.GdtLimit = LowMemory.GdtBytes - 1;
        Cpu.IdtBase = 0;
        Cpu.IdtLimit = 0;
        for (int i = 0; i < 6; i++)
        {
            Cpu.Segments[i] = new SegmentState { Selector = 0x18, Limit = uint.MaxValue, Rights = 0xC093 };
        }

        Cpu.Segments[1] = new SegmentState
        {
            Selector = 0x10,
            Limit = uint.MaxValue,
            Rights = longMode ? 0xA09Bu : 0xC09Bu,
        };
        Cpu.Tr = new SegmentState { Limit = 0xFFFF, Rights = 0x8B };
        Cpu.Rflags = 2;
        Array.Clear(Cpu.Gpr);

        // IA32_MTRR_DEF_TYPE: enabled, write-back (SDM 3A 12.11.2.1), as firmware leaves it for RAM. A guest that finds the
        // MTRRs off also turns PAT off.
        Cpu.Msrs[MtrrDefaultType] = MtrrEnabled | MtrrWriteBack;
    }

    /// <summary>Flat 32-bit protected mode without paging.</summary>
    public void EnterProtectedMode(ulong entry)
    {
        SetFlatSegments(longMode: false);
        Cpu.Cr0 = 0x11;
        Cpu.Cr4 = 0;
        Cpu.Efer = 0;
        Cpu.Rip = entry;
    }

    /// <summary>Long mode with the first 4 GiB identity-mapped by 2 MiB pages.</summary>
    public void EnterLongMode(ulong entry)
    {
        SetFlatSegments(longMode: true);
        var tables = new byte[6 * 4096];
        BinaryPrimitives.WriteUInt64LittleEndian(tables, (LowMemory.PageTables + 0x1000) | 3);
        for (int gib = 0; gib < 4; gib++)
        {
            ulong directory = LowMemory.PageTables + 0x2000 + ((ulong)gib * 0x1000);
            BinaryPrimitives.WriteUInt64LittleEndian(tables.AsSpan(0x1000 + (gib * 8)), directory | 3);
        }

        for (int i = 0; i < 2048; i++)
        {
            BinaryPrimitives.WriteUInt64LittleEndian(tables.AsSpan(0x2000 + (i * 8)), ((ulong)i << 21) | 0x83);
        }

        Write(LowMemory.PageTables, tables);
        Cpu.Cr3 = LowMemory.PageTables;
        Cpu.Cr4 = 0x20;
        Cpu.Cr0 = 0x80000011;
        Cpu.Efer = 0x500;
        Cpu.Rip = entry;
    }
}

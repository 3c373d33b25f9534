// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;

namespace Vmm.Machine.Boot;

/// <summary>
/// The Linux/x86 boot protocol (the kernel's Documentation/arch/x86/boot.rst), protocols 2.06 and later: the "zero page" is
/// filled from the file's setup header, the protected-mode part goes to its preferred address.
/// </summary>
internal static class LinuxLoader
{
    // Offsets in the file's first sectors and, alike, in the zero page.
    private const int SetupSects = 0x1F1;
    private const int BootFlag = 0x1FE;
    private const int HeaderMagic = 0x202;
    private const int Version = 0x206;
    private const int TypeOfLoader = 0x210;
    private const int LoadFlags = 0x211;
    private const int RamdiskImage = 0x218;
    private const int RamdiskSize = 0x21C;
    private const int CmdLinePtr = 0x228;
    private const int InitrdAddrMax = 0x22C;
    private const int RelocatableKernel = 0x234;
    private const int XLoadFlags = 0x236;
    private const int CmdlineSize = 0x238;
    private const int PrefAddress = 0x258;
    private const int InitSize = 0x260;
    private const int HeaderEndByte = 0x201;

    // Offsets in the zero page alone.
    private const int AcpiRsdpAddr = 0x070;
    private const int E820Entries = 0x1E8;
    private const int E820Table = 0x2D0;

    private const ulong HighLoad = 0x10_0000;
    private const ushort Kernel64 = 1;

    /// <summary>Recognises a bzImage by its two magic numbers.</summary>
    public static bool Recognises(byte[] head) =>
        head.Length > HeaderMagic + 4
        && BinaryPrimitives.ReadUInt16LittleEndian(head.AsSpan(BootFlag)) == 0xAA55
        && BinaryPrimitives.ReadUInt32LittleEndian(head.AsSpan(HeaderMagic)) == 0x53726448;

    /// <summary>Loads and sets the entry state.</summary>
    public static void Load(BootTarget target)
    {
        byte[] head = target.Head;
        string path = target.Kernel.Path;
        if (head.Length < 0x400)
        {
            throw target.Kernel.Truncated();
        }

        ushort version = BinaryPrimitives.ReadUInt16LittleEndian(head.AsSpan(Version));
        if (version < 0x206 || (head[LoadFlags] & 1) == 0)
        {
            throw new BootException(
                $"kernel {path}: boot protocol {version >> 8}.{version & 0xFF:D2} is too old "
                    + "(2.06 with a high-loaded kernel is needed); boot it through firmware");
        }

        int setupSectors = head[SetupSects] == 0 ? 4 : head[SetupSects];
        long payloadOffset = (setupSectors + 1) * 512L;
        long payloadBytes = target.Kernel.LengthBytes - payloadOffset;
        if (payloadBytes <= 0)
        {
            throw target.Kernel.Truncated();
        }

        bool relocatable = head[RelocatableKernel] != 0;
        ulong preferred = version >= 0x20A ? BinaryPrimitives.ReadUInt64LittleEndian(head.AsSpan(PrefAddress)) : HighLoad;
        ulong initBytes = version >= 0x20A ? BinaryPrimitives.ReadUInt32LittleEndian(head.AsSpan(InitSize)) : 0;
        ulong needed = Math.Max(initBytes, (ulong)payloadBytes);
        ulong load = preferred;
        if (!target.FitsLow(load, needed) || load < HighLoad)
        {
            load = relocatable ? HighLoad : preferred;
        }

        if (load < HighLoad || !target.FitsLow(load, needed))
        {
            throw new BootException(
                $"kernel {path}: needs {(load + needed) >> 20} MiB to start, the VM has "
                    + $"{target.Layout.LowBytes >> 20} MiB below 4 GiB; give it more with memory:");
        }

        target.Kernel.CopyTo(target.Memory, payloadOffset, payloadBytes, load);
        uint initrdMax = BinaryPrimitives.ReadUInt32LittleEndian(head.AsSpan(InitrdAddrMax));
        ulong initrd = target.LoadInitrd(load + needed, (ulong)initrdMax + 1);
        uint cmdlineMax = BinaryPrimitives.ReadUInt32LittleEndian(head.AsSpan(CmdlineSize));
        target.WriteCommandLine(cmdlineMax == 0 ? 255 : cmdlineMax);
        WriteZeroPage(target, initrd);

        bool has64 = (BinaryPrimitives.ReadUInt16LittleEndian(head.AsSpan(XLoadFlags)) & Kernel64) != 0 && version >= 0x20C;
        if (has64)
        {
            target.EnterLongMode(load + 0x200);
        }
        else
        {
            target.EnterProtectedMode(load);
        }

        target.Cpu.Gpr[6] = LowMemory.Parameters;
    }

    private static void WriteZeroPage(BootTarget target, ulong initrd)
    {
        var page = new byte[4096];
        int headerEnd = Math.Min(0x202 + target.Head[HeaderEndByte], 0x290);
        target.Head.AsSpan(SetupSects, headerEnd - SetupSects).CopyTo(page.AsSpan(SetupSects));
        page[TypeOfLoader] = 0xFF;
        BinaryPrimitives.WriteUInt32LittleEndian(page.AsSpan(CmdLinePtr), (uint)LowMemory.CommandLine);
        if (target.Initrd is not null)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(page.AsSpan(RamdiskImage), (uint)initrd);
            BinaryPrimitives.WriteUInt32LittleEndian(page.AsSpan(RamdiskSize), (uint)target.Initrd.LengthBytes);
        }

        BinaryPrimitives.WriteUInt64LittleEndian(page.AsSpan(AcpiRsdpAddr), target.RsdpAddress);
        IReadOnlyList<E820Entry> map = target.Layout.DirectBootMap();
        page[E820Entries] = (byte)map.Count;
        for (int i = 0; i < map.Count; i++)
        {
            Span<byte> entry = page.AsSpan(E820Table + (i * 20));
            BinaryPrimitives.WriteUInt64LittleEndian(entry, map[i].Start);
            BinaryPrimitives.WriteUInt64LittleEndian(entry[8..], map[i].LengthBytes);
            BinaryPrimitives.WriteUInt32LittleEndian(entry[16..], (uint)map[i].Kind);
        }

        target.Write(LowMemory.Parameters, page);
    }
}

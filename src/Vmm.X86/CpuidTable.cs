// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Runtime.Intrinsics.X86;
using System.Text;
using Vmm.Core;

namespace Vmm.X86;

/// <summary>Features that handlers and MSRs ask for; bits of CpuContext.Features.</summary>
internal static class CpuFeature
{
    public const ulong LongMode = 1UL << 0;
    public const ulong NoExecute = 1UL << 1;
    public const ulong Syscall = 1UL << 2;
    public const ulong FsGsBase = 1UL << 3;
    public const ulong Smep = 1UL << 4;
    public const ulong Smap = 1UL << 5;
    public const ulong Umip = 1UL << 6;
    public const ulong Pku = 1UL << 7;
    public const ulong Pcid = 1UL << 8;
    public const ulong La57 = 1UL << 9;
    public const ulong Xsave = 1UL << 10;
    public const ulong Xsaves = 1UL << 11;
    public const ulong SpecCtrl = 1UL << 12;
    public const ulong Ibpb = 1UL << 13;
    public const ulong Monitor = 1UL << 14;
    public const ulong Pse36 = 1UL << 15;
    public const ulong Avx = 1UL << 16;
    public const ulong Sep = 1UL << 17;
    public const ulong Xsaveopt = 1UL << 18;
    public const ulong Xsavec = 1UL << 19;
    public const ulong Xgetbv1 = 1UL << 20;
    public const ulong Invpcid = 1UL << 21;
    public const ulong Rdtscp = 1UL << 22;
    public const ulong Ffxsr = 1UL << 23;
    public const ulong Vme = 1UL << 24;
    public const ulong Page1G = 1UL << 25;
    public const ulong AutoIbrs = 1UL << 26;
    public const ulong Amd = 1UL << 27;
}

/// <summary>
/// What CPUID may show: exactly what is implemented. Vector and x87 instructions execute the host's own, so their bits
/// also need the host's. The vendor is AMD's, so that a guest needs no page-table isolation and takes SYSCALL in 64-bit
/// and the AMD paths elsewhere; the model number is that of a Zen 3 server part.
/// </summary>
internal static class CpuidTable
{
    /// <summary>CPUID.1:EAX: family 19h, model 01h, stepping 1.</summary>
    public const uint FamilyModelStepping = 0x00A00F11;

    /// <summary>MAXPHYADDR.</summary>
    public const int PhysicalBits = 46;

    private const string Brand = "AMD EPYC compatible software processor";

    /// <summary>All leaves; APIC identifiers and topology are filled in by the machine.</summary>
    public static List<CpuidEntry> Build(bool hasVectorUnit)
    {
        var host = new HostFeatures();
        var leaves = new List<CpuidEntry>();
        uint maximum = 0x16;
        (uint b, uint d, uint c) = Vendor();
        Add(leaves, 0, maximum, b, c, d);

        uint c1 = 0;
        c1 |= host.Leaf1C & Bits(0, 1, 9, 12, 19, 20, 25, 28, 29);   // SSE3 PCLMUL SSSE3 FMA SSE4.1 SSE4.2 AES AVX F16C
        c1 |= Bits(3, 13, 17, 21, 22, 23, 24, 26, 30, 31);           // MONITOR CX16 PCID x2APIC MOVBE POPCNT TSCDL XSAVE
        uint d1 = Bits(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26);
        if (!hasVectorUnit)
        {
            c1 &= ~Bits(0, 1, 9, 12, 13, 19, 20, 25, 26, 28, 29);
            d1 &= ~Bits(0, 23, 24, 25, 26);
        }

        Add(leaves, 1, FamilyModelStepping, 0x00010800, c1, d1);
        Add(leaves, 2, 0x00000001, 0, 0, 0);
        AddIndexed(leaves, 4, 0, 0, 0, 0, 0);
        Add(leaves, 5, 64, 64, 3, 0);
        Add(leaves, 6, 0x4, 0, 0, 0);                                // ARAT

        uint b7 = Bits(0, 1, 3, 7, 8, 9, 10, 18, 19, 20, 23);        // FSGSBASE TSC_ADJUST BMI1 SMEP BMI2 ERMS INVPCID RDSEED ADX SMAP CLFLUSHOPT
        b7 |= Bits(22, 24) | (host.Leaf7B & Bits(5, 29));                // PCOMMIT CLWB; AVX2 SHA
        uint c7 = Bits(2, 3, 16, 22);                                // UMIP PKU LA57 RDPID
        c7 |= host.Leaf7C & Bits(8, 9, 10);                          // GFNI VAES VPCLMULQDQ
        uint d7 = Bits(4);                                           // FSRM
        if (!hasVectorUnit)
        {
            b7 &= ~Bits(5, 29);
            c7 &= ~Bits(8, 9, 10);
        }

        AddIndexed(leaves, 7, 0, 0, b7, c7, d7);

        bool avx = (c1 & Bits(28)) != 0;
        uint xcr0 = avx ? 0x207U : 0x203;
        const uint size = CpuState.PkruOffset + 8;
        AddIndexed(leaves, 0xD, 0, xcr0, size, size, 0);
        AddIndexed(leaves, 0xD, 1, 0x7, 0, 0, 0);                    // XSAVEOPT XSAVEC XGETBV(1)
        if (avx)
        {
            AddIndexed(leaves, 0xD, 2, 256, XsaveState.AvxOffset, 0, 0);
        }

        AddIndexed(leaves, 0xD, 9, 8, CpuState.PkruOffset, 0, 0);

        Add(leaves, 0x80000000, 0x80000021, b, c, d);
        uint c81 = Bits(0, 4, 5, 8);                                 // LAHF CR8_LEGACY ABM(LZCNT) 3DNOWPREFETCH
        c81 |= hasVectorUnit ? host.Leaf81C & Bits(6) : 0;                               // SSE4A
        uint d81 = (d1 & 0x0183F3FF) | Bits(11, 20, 22, 26, 27, 29); // SYSCALL NX MMXEXT 1G RDTSCP LM
        Add(leaves, 0x80000001, FamilyModelStepping, 0, c81, d81);
        AddBrand(leaves);
        Add(leaves, 0x80000005, 0xFF40FF40, 0xFF40FF40, 0x20080140, 0x20080140);
        Add(leaves, 0x80000006, 0x48002200, 0x68004200, 0x02006140, 0x01009140);
        Add(leaves, 0x80000007, 0, 0, 0, Bits(8));                   // invariant TSC
        Add(leaves, 0x80000008, PhysicalBits | (57U << 8), Bits(2, 26, 29), 0, 0);  // XSAVEERPTR, no SSB, no BTC
        Add(leaves, 0x80000021, Bits(0, 2, 6, 8, 29), 0, Bits(1, 2), 0);
        // ^ no nested breakpoints, LFENCE serialises, null selector clears base, automatic IBRS, no SRSO, no TSA
        return leaves;
    }

    /// <summary>Features of a CPUID table as handlers need them.</summary>
    public static ulong Features(Func<uint, uint, CpuidEntry> find)
    {
        CpuidEntry one = find(1, 0);
        CpuidEntry seven = find(7, 0);
        CpuidEntry xsave = find(0xD, 1);
        CpuidEntry extended = find(0x80000001, 0);
        CpuidEntry eight = find(0x80000008, 0);
        CpuidEntry twentyOne = find(0x80000021, 0);
        ulong features = find(0, 0).Ebx == Vendor().B ? CpuFeature.Amd : 0;
        Set(ref features, CpuFeature.LongMode, extended.Edx, 29);
        Set(ref features, CpuFeature.NoExecute, extended.Edx, 20);
        Set(ref features, CpuFeature.Syscall, extended.Edx, 11);
        Set(ref features, CpuFeature.Rdtscp, extended.Edx, 27);
        Set(ref features, CpuFeature.Ffxsr, extended.Edx, 25);
        Set(ref features, CpuFeature.Page1G, extended.Edx, 26);
        Set(ref features, CpuFeature.FsGsBase, seven.Ebx, 0);
        Set(ref features, CpuFeature.Smep, seven.Ebx, 7);
        Set(ref features, CpuFeature.Invpcid, seven.Ebx, 10);
        Set(ref features, CpuFeature.Smap, seven.Ebx, 20);
        Set(ref features, CpuFeature.Umip, seven.Ecx, 2);
        Set(ref features, CpuFeature.Pku, seven.Ecx, 3);
        Set(ref features, CpuFeature.La57, seven.Ecx, 16);
        Set(ref features, CpuFeature.SpecCtrl, seven.Edx, 26);
        Set(ref features, CpuFeature.SpecCtrl, eight.Ebx, 14);
        Set(ref features, CpuFeature.Ibpb, seven.Edx, 26);
        Set(ref features, CpuFeature.Ibpb, eight.Ebx, 12);
        Set(ref features, CpuFeature.Monitor, one.Ecx, 3);
        Set(ref features, CpuFeature.Pcid, one.Ecx, 17);
        Set(ref features, CpuFeature.Xsave, one.Ecx, 26);
        Set(ref features, CpuFeature.Avx, one.Ecx, 28);
        Set(ref features, CpuFeature.AutoIbrs, twentyOne.Eax, 8);
        Set(ref features, CpuFeature.Vme, one.Edx, 1);
        Set(ref features, CpuFeature.Sep, one.Edx, 11);
        Set(ref features, CpuFeature.Xsaveopt, xsave.Eax, 0);
        Set(ref features, CpuFeature.Xsavec, xsave.Eax, 1);
        Set(ref features, CpuFeature.Xgetbv1, xsave.Eax, 2);
        Set(ref features, CpuFeature.Xsaves, xsave.Eax, 3);
        return features;
    }

    /// <summary>EFER bits that may be written.</summary>
    public static ulong EferBits(ulong features)
    {
        ulong bits = 0;
        bits |= (features & CpuFeature.Syscall) != 0 ? Efer.Sce : 0;
        bits |= (features & CpuFeature.LongMode) != 0 ? Efer.Lme : 0;
        bits |= (features & CpuFeature.NoExecute) != 0 ? Efer.Nxe : 0;
        bits |= (features & CpuFeature.AutoIbrs) != 0 ? Efer.AutoIbrs : 0;
        return bits;
    }

    private static void Set(ref ulong features, ulong feature, uint register, int bit) =>
        features |= ((register >> bit) & 1) != 0 ? feature : 0;

    private static (uint B, uint D, uint C) Vendor()
    {
        ReadOnlySpan<byte> name = "AuthenticAMD"u8;
        return (Word(name, 0), Word(name, 4), Word(name, 8));
    }

    private static uint Word(ReadOnlySpan<byte> text, int at) => BitConverter.ToUInt32(text.Slice(at, 4));

    private static void AddBrand(List<CpuidEntry> leaves)
    {
        Span<byte> text = stackalloc byte[48];
        text.Clear();
        Encoding.ASCII.GetBytes(Brand, text);
        for (uint i = 0; i < 3; i++)
        {
            int at = (int)i * 16;
            Add(leaves, 0x80000002 + i, Word(text, at), Word(text, at + 4), Word(text, at + 8), Word(text, at + 12));
        }
    }

    private static void Add(List<CpuidEntry> leaves, uint function, uint a, uint b, uint c, uint d) =>
        leaves.Add(new CpuidEntry(function, 0, false, a, b, c, d));

    private static void AddIndexed(List<CpuidEntry> leaves, uint function, uint index, uint a, uint b, uint c, uint d) =>
        leaves.Add(new CpuidEntry(function, index, true, a, b, c, d));

    private static uint Bits(params ReadOnlySpan<int> positions)
    {
        uint bits = 0;
        foreach (int position in positions)
        {
            bits |= 1U << position;
        }

        return bits;
    }

    private readonly struct HostFeatures
    {
        public readonly uint Leaf1C;
        public readonly uint Leaf7B;
        public readonly uint Leaf7C;
        public readonly uint Leaf81C;

        public HostFeatures()
        {
            if (!X86Base.IsSupported)
            {
                return;
            }

            Leaf1C = (uint)X86Base.CpuId(1, 0).Ecx;
            if ((uint)X86Base.CpuId(0, 0).Eax >= 7)
            {
                (_, int ebx, int ecx, _) = X86Base.CpuId(7, 0);
                Leaf7B = (uint)ebx;
                Leaf7C = (uint)ecx;
            }

            Leaf81C = (uint)X86Base.CpuId(unchecked((int)0x80000001), 0).Ecx;
        }
    }
}

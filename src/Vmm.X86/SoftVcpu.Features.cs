// SPDX-License-Identifier: BSD-2-Clause
using System;
using Iced.Intel;

namespace Vmm.X86;

// Which instructions the guest's CPUID offers: what it does not name raises #UD.
public sealed unsafe partial class SoftVcpu
{
    private readonly byte[] _offered = new byte[8192];

    /// <summary>Whatever this processor can execute is offered, CPUID or not (<see cref="InstructionCompleter"/>).</summary>
    internal bool OffersAll { get; set; }

    /// <summary>XCR0 names state that is not carried here: the XSAVE family raises #UD (<see cref="InstructionCompleter"/>).</summary>
    internal bool RefusesComponents { get; set; }

    /// <summary>True when CPUID offers everything that a code needs.</summary>
    internal bool IsOffered(Code code)
    {
        if (OffersAll)
        {
            return true;
        }

        byte known = _offered[(int)code];
        if (known == 0)
        {
            bool all = true;
            foreach (CpuidFeature feature in code.CpuidFeatures())
            {
                all &= HasFeature(feature);
            }

            known = all ? (byte)1 : (byte)2;
            _offered[(int)code] = known;
        }

        return known == 1;
    }

    private void ResetOffered()
    {
        Array.Clear(_offered);
        ulong low = FindCpuid(0xD, 0).Eax;
        AllowedXcr0 = low == 0 ? 3 : low & XsaveState.Supported;
    }

    private bool Bit1C(int bit) => ((FindCpuid(1, 0).Ecx >> bit) & 1) != 0;

    private bool Bit1D(int bit) => ((FindCpuid(1, 0).Edx >> bit) & 1) != 0;

    private bool Bit7B(int bit) => ((FindCpuid(7, 0).Ebx >> bit) & 1) != 0;

    private bool Bit7C(int bit) => ((FindCpuid(7, 0).Ecx >> bit) & 1) != 0;

    private bool BitX1C(int bit) => ((FindCpuid(0x80000001, 0).Ecx >> bit) & 1) != 0;

    private bool BitX1D(int bit) => ((FindCpuid(0x80000001, 0).Edx >> bit) & 1) != 0;

    private bool HasFeature(CpuidFeature feature)
    {
        switch (feature)
        {
            case CpuidFeature.INTEL8086:
            case CpuidFeature.INTEL186:
            case CpuidFeature.INTEL286:
            case CpuidFeature.INTEL386:
            case CpuidFeature.INTEL486:
            case CpuidFeature.FPU:
            case CpuidFeature.FPU287:
            case CpuidFeature.FPU387:
            case CpuidFeature.CPUID:
            case CpuidFeature.MULTIBYTENOP:
            case CpuidFeature.PAUSE:
            case CpuidFeature.RDPMC:
            case CpuidFeature.CET_IBT:

            // Hints that processors without the feature execute as no operation.
            case CpuidFeature.PREFETCHWT1:
            case CpuidFeature.PREFETCHITI:
            case CpuidFeature.CLDEMOTE:
                return true;
            case CpuidFeature.X64:
                return BitX1D(29);
            case CpuidFeature.CMOV:
                return Bit1D(15);
            case CpuidFeature.CX8:
                return Bit1D(8);
            case CpuidFeature.CMPXCHG16B:
                return Bit1C(13);
            case CpuidFeature.CLFSH:
                return Bit1D(19);
            case CpuidFeature.CLFLUSHOPT:
                return Bit7B(23);
            case CpuidFeature.CLWB:
                return Bit7B(24);
            case CpuidFeature.PCOMMIT:
                return Bit7B(22);
            case CpuidFeature.FXSR:
                return Bit1D(24);
            case CpuidFeature.MSR:
                return Bit1D(5);
            case CpuidFeature.TSC:
                return Bit1D(4);
            case CpuidFeature.SEP:
                return Bit1D(11);
            case CpuidFeature.MMX:
                return Bit1D(23);
            case CpuidFeature.SSE:
                return Bit1D(25);
            case CpuidFeature.SSE2:
                return Bit1D(26);
            case CpuidFeature.SSE3:
                return Bit1C(0);
            case CpuidFeature.SSSE3:
                return Bit1C(9);
            case CpuidFeature.SSE4_1:
                return Bit1C(19);
            case CpuidFeature.SSE4_2:
                return Bit1C(20);
            case CpuidFeature.SSE4A:
                return BitX1C(6);
            case CpuidFeature.PCLMULQDQ:
                return Bit1C(1);
            case CpuidFeature.AES:
                return Bit1C(25);
            case CpuidFeature.MONITOR:
                return Bit1C(3);
            case CpuidFeature.MOVBE:
                return Bit1C(22);
            case CpuidFeature.POPCNT:
                return Bit1C(23);
            case CpuidFeature.RDRAND:
                return Bit1C(30);
            case CpuidFeature.RDSEED:
                return Bit7B(18);
            case CpuidFeature.XSAVE:
                return Bit1C(26);
            case CpuidFeature.XSAVEOPT:
                return (FindCpuid(0xD, 1).Eax & 1) != 0;
            case CpuidFeature.XSAVEC:
                return (FindCpuid(0xD, 1).Eax & 2) != 0;
            case CpuidFeature.XSAVES:
                return (FindCpuid(0xD, 1).Eax & 8) != 0;
            case CpuidFeature.AVX:
                return Bit1C(28);
            case CpuidFeature.AVX2:
                return Bit7B(5);
            case CpuidFeature.FMA:
                return Bit1C(12);
            case CpuidFeature.F16C:
                return Bit1C(29);
            case CpuidFeature.BMI1:
                return Bit7B(3);
            case CpuidFeature.BMI2:
                return Bit7B(8);
            case CpuidFeature.LZCNT:
                return BitX1C(5);
            case CpuidFeature.ADX:
                return Bit7B(19);
            case CpuidFeature.SHA:
                return Bit7B(29);
            case CpuidFeature.GFNI:
                return Bit7C(8);
            case CpuidFeature.VAES:
                return Bit7C(9);
            case CpuidFeature.VPCLMULQDQ:
                return Bit7C(10);
            case CpuidFeature.FSGSBASE:
                return Bit7B(0);
            case CpuidFeature.INVPCID:
                return Bit7B(10);
            case CpuidFeature.SMAP:
                return Bit7B(20);
            case CpuidFeature.PKU:
                return Bit7C(3);
            case CpuidFeature.RDPID:
                return Bit7C(22);
            case CpuidFeature.RDTSCP:
                return BitX1D(27);
            case CpuidFeature.SYSCALL:
                return BitX1D(11);
            case CpuidFeature.PREFETCHW:
                // AMD64 APM 3, PREFETCHW: there with 3DNowPrefetch, with 3DNow! or with long mode. Linux relies on it.
                return BitX1C(8) || BitX1D(31) || BitX1D(29);
            case CpuidFeature.WBNOINVD:
                return ((FindCpuid(0x80000008, 0).Ebx >> 9) & 1) != 0;
            default:
                return false;
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;

namespace Vmm.X86;

/// <summary>
/// Model-specific registers: what Linux, the BSDs, illumos, SeaBIOS and OVMF touch on an AMD-like processor. Unknown ones
/// raise #GP(0), so that an operating system sees what is not there.
/// </summary>
internal static unsafe class Msrs
{
    public const uint Tsc = 0x10;
    public const uint ApicBase = 0x1B;
    public const uint TscAdjust = 0x3B;
    public const uint SpecCtrl = 0x48;
    public const uint PredCmd = 0x49;
    public const uint PatchLevel = 0x8B;
    public const uint MtrrCap = 0xFE;
    public const uint SysenterCs = 0x174;
    public const uint SysenterEsp = 0x175;
    public const uint SysenterEip = 0x176;
    public const uint McgCap = 0x179;
    public const uint McgStatus = 0x17A;
    public const uint McgCtl = 0x17B;
    public const uint MiscEnable = 0x1A0;
    public const uint DebugCtl = 0x1D9;
    public const uint Pat = 0x277;
    public const uint MtrrDefType = 0x2FF;
    public const uint TscDeadline = 0x6E0;
    public const uint Xss = 0xDA0;
    public const uint Efer = 0xC0000080;
    public const uint Star = 0xC0000081;
    public const uint Lstar = 0xC0000082;
    public const uint Cstar = 0xC0000083;
    public const uint SfMask = 0xC0000084;
    public const uint FsBase = 0xC0000100;
    public const uint GsBase = 0xC0000101;
    public const uint KernelGsBase = 0xC0000102;
    public const uint TscAux = 0xC0000103;

    private const int McBanks = 10;
    private const ulong McgCapValue = 0x100 | McBanks;

    // 8 variable ranges, fixed ranges, write-combining.
    private const ulong MtrrCapValue = 0x508;

    /// <summary>What a snapshot holds beyond the fields of CpuState.</summary>
    public static IReadOnlyList<uint> Saved { get; } = BuildSaved();

    /// <summary>RDMSR; false means #GP(0).</summary>
    public static bool TryRead(SoftVcpu vcpu, uint index, out ulong value)
    {
        CpuContext* cpu = vcpu.Context;
        ulong* slot = Slot(cpu, index);
        if (slot != null)
        {
            value = *slot;
            return true;
        }

        switch (index)
        {
            case Tsc:
                value = vcpu.ReadTsc();
                return true;
            case Efer:
                value = cpu->Efer;
                return true;
            case FsBase:
                value = CpuContext.Segment(cpu, Seg.Fs)->Base;
                return true;
            case GsBase:
                value = CpuContext.Segment(cpu, Seg.Gs)->Base;
                return true;
            case MtrrCap:
                value = MtrrCapValue;
                return true;
            case McgCap:
                value = McgCapValue;
                return true;
            case PatchLevel:
                value = 0x01000065;
                return true;
            case 0x17:          // IA32_PLATFORM_ID
            case 0x2A:          // EBL_CR_POWERON
            case 0xCD:          // FSB_FREQ
            case 0x1DB:         // last branch and exception records: never recorded
            case 0x1DC:
            case 0x1DD:
            case 0x1DE:
            case 0xC0010055:    // INT_PENDING
            case 0xC0010058:    // MMIO_CONF_BASE
            case 0xC0010114:    // VM_CR
            case 0xC001001F:    // NB_CFG
            case 0xC0010112:    // SMM address
            case 0xC0010113:
            case 0xC0010111:
            case 0xC0010140:    // OSVW: no errata
            case 0xC0010141:
            case 0xC0011020:    // LS_CFG
            case 0xC0011021:    // IC_CFG
            case 0xC0011022:    // DC_CFG
            case 0xC0011023:    // BU_CFG
            case 0xC001102A:    // BU_CFG2
            case 0xC001001A:    // TOP_MEM
            case 0xC001001D:    // TOP_MEM2
            case >= 0xC0010000 and <= 0xC0010007:   // four event selectors and counters that never count
                value = 0;
                return true;
            default:
                return vcpu.InterruptPort.TryReadMsr(index, out value);
        }
    }

    /// <summary>WRMSR; false means #GP(0).</summary>
    public static bool TryWrite(SoftVcpu vcpu, uint index, ulong value)
    {
        CpuContext* cpu = vcpu.Context;
        if (index is >= Efer and <= SfMask)
        {
            cpu->Calls.Ready = 0;
        }

        switch (index)
        {
            case Lstar:
            case Cstar:
            case KernelGsBase:
            case SysenterEsp:
            case SysenterEip:
                if (!Paging.IsCanonicalRegister(cpu, value))
                {
                    return false;
                }

                break;
            case TscAux:
                value &= 0xFFFFFFFF;
                break;
            case SfMask:
                value &= 0xFFFFFFFF;
                break;
            case Pat:
                if (!IsPat(value))
                {
                    return false;
                }

                break;
            case MtrrDefType:
                if ((value & ~0xCFFUL) != 0 || !IsMemoryType(value & 0xFF))
                {
                    return false;
                }

                break;
            case >= 0x200 and <= 0x20F:
                // PHYSBASE: type and page-aligned base; PHYSMASK: valid bit and mask.
                ulong reserved = ~cpu->PhysicalMask & ~0xFFFUL;
                reserved |= (index & 1) == 0 ? 0xF00UL : 0x7FF;
                if ((value & reserved) != 0 || ((index & 1) == 0 && !IsMemoryType(value & 0xFF)))
                {
                    return false;
                }

                break;
            case 0x250 or 0x258 or 0x259 or (>= 0x268 and <= 0x26F):
                for (int i = 0; i < 8; i++)
                {
                    if (!IsMemoryType((value >> (8 * i)) & 0xFF))
                    {
                        return false;
                    }
                }

                break;
            case SpecCtrl:
                if ((value & ~0x7UL) != 0)
                {
                    return false;
                }

                break;
            case PredCmd:
                return (cpu->Features & CpuFeature.Ibpb) != 0 && (value & ~1UL) == 0;
            case DebugCtl:
                value &= 0x43;
                break;
            case >= 0x400 and < 0x400 + (McBanks * 4):
                // CTL takes all zeroes or all ones; STATUS takes 0 unless HWCR.McStatusWrEn is set (APM 2 9.3.2).
                bool statusOpen = (cpu->Msr.HwCr & (1 << 18)) != 0;
                if (((index & 3) == 0 && value != 0 && (value | (1 << 10)) != ulong.MaxValue) ||
                    ((index & 3) == 1 && value != 0 && !statusOpen))
                {
                    return false;
                }

                break;
            case Xss:
                if (value != 0)
                {
                    return false;
                }

                break;
            case Tsc:
                ulong delta = value - vcpu.ReadTsc();
                cpu->Msr.TscAdjust += delta;
                vcpu.MoveTsc(delta);
                return true;
            case TscAdjust:
                vcpu.MoveTsc(value - cpu->Msr.TscAdjust);
                cpu->Msr.TscAdjust = value;
                return true;
            case Efer:
                return TryWriteEfer(cpu, value);
            case FsBase:
            case GsBase:
                if (!Paging.IsCanonicalRegister(cpu, value))
                {
                    return false;
                }

                SegmentRegister* segment = CpuContext.Segment(cpu, index == FsBase ? Seg.Fs : Seg.Gs);
                segment->Base = value;
                segment->EffectiveBase = value;
                return true;
            case PatchLevel:
            case 0x79:          // BIOS_UPDT_TRIG
            case 0x17:
            case 0x2A:
            case 0xC0010020:    // PATCH_LOADER
            case 0xC0010055:
            case 0xC0010058:
            case 0xC0010112:
            case 0xC0010113:
            case 0xC0010114:
            case 0xC001001F:
            case 0xC0010140:
            case 0xC0010141:
            case 0xC0011020:
            case 0xC0011021:
            case 0xC0011022:
            case 0xC0011023:
            case 0xC001102A:
            case 0xC001001A:
            case 0xC001001D:
            case >= 0xC0010000 and <= 0xC0010007:
                return true;
            case MtrrCap:
            case McgCap:
                return false;
            default:
                break;
        }

        ulong* slot = Slot(cpu, index);
        if (slot != null)
        {
            *slot = value;
            return true;
        }

        if (!vcpu.InterruptPort.TryWriteMsr(index, value))
        {
            return false;
        }

        if (index == ApicBase)
        {
            vcpu.UpdateApicPage();
            Paging.FlushAll(cpu);
        }

        return true;
    }

    /// <summary>For saving: like RDMSR without the refusals that depend on CPUID.</summary>
    public static bool TryReadSaved(SoftVcpu vcpu, uint index, out ulong value)
    {
        if (index != Tsc)
        {
            return TryRead(vcpu, index, out value);
        }

        value = vcpu.ReadTscAtRest();
        return true;
    }

    /// <summary>For restoring: plain storage, the TSC as a value now, others without checks.</summary>
    public static void WriteSaved(SoftVcpu vcpu, uint index, ulong value)
    {
        CpuContext* cpu = vcpu.Context;
        ulong* slot = Slot(cpu, index);
        if (slot != null)
        {
            *slot = value;
        }
        else if (index == Tsc)
        {
            vcpu.MoveTsc(value - vcpu.ReadTscAtRest());
        }
        else if (index == TscAdjust)
        {
            cpu->Msr.TscAdjust = value;
        }
        else if (index == TscDeadline)
        {
            vcpu.InterruptPort.TryWriteMsr(index, value);
        }
    }

    /// <summary>MSRs that are plain storage.</summary>
    private static ulong* Slot(CpuContext* cpu, uint index)
    {
        switch (index)
        {
            case SysenterCs:
                return &cpu->Msr.SysenterCs;
            case SysenterEsp:
                return &cpu->Msr.SysenterEsp;
            case SysenterEip:
                return &cpu->Msr.SysenterEip;
            case Star:
                return &cpu->Msr.Star;
            case Lstar:
                return &cpu->Msr.Lstar;
            case Cstar:
                return &cpu->Msr.Cstar;
            case SfMask:
                return &cpu->Msr.SfMask;
            case KernelGsBase:
                return &cpu->Msr.KernelGsBase;
            case TscAux:
                return &cpu->Msr.TscAux;
            case TscAdjust:
                return &cpu->Msr.TscAdjust;
            case Pat:
                return &cpu->Msr.Pat;
            case MiscEnable:
                return &cpu->Msr.MiscEnable;
            case MtrrDefType:
                return &cpu->Msr.MtrrDefType;
            case DebugCtl:
                return &cpu->Msr.DebugCtl;
            case SpecCtrl:
                return (cpu->Features & CpuFeature.SpecCtrl) != 0 ? &cpu->Msr.SpecCtrl : null;
            case Xss:
                return (cpu->Features & CpuFeature.Xsaves) != 0 ? &cpu->Msr.Xss : null;
            case McgStatus:
                return &cpu->Msr.McgStatus;
            case McgCtl:
                return &cpu->Msr.McgCtl;
            case 0x250:
                return &cpu->Msr.MtrrFix64K;
            case 0x258:
            case 0x259:
                return &cpu->Msr.MtrrFix16K[index - 0x258];
            case >= 0x268 and <= 0x26F:
                return &cpu->Msr.MtrrFix4K[index - 0x268];
            case >= 0x200 and <= 0x20F:
                return &cpu->Msr.MtrrVar[index - 0x200];
            case >= 0x400 and < 0x400 + (McBanks * 4):
                return &cpu->Msr.Mc[index - 0x400];
            case 0xC0010010:
                return &cpu->Msr.SysCfg;
            case 0xC0010015:
                return &cpu->Msr.HwCr;
            case 0xC0011029:
                return &cpu->Msr.DeCfg;
            case 0xC0010117:
                return &cpu->Msr.HsavePa;
            default:
                return null;
        }
    }

    private static bool TryWriteEfer(CpuContext* cpu, ulong value)
    {
        ulong allowed = CpuidTable.EferBits(cpu->Features) | global::Vmm.X86.Efer.Lma;
        if ((value & ~allowed) != 0)
        {
            return false;
        }

        bool paging = (cpu->Cr0 & Cr0.Pg) != 0;
        if (paging && ((value ^ cpu->Efer) & global::Vmm.X86.Efer.Lme) != 0)
        {
            return false;
        }

        // LMA is read-only.
        value = (value & ~global::Vmm.X86.Efer.Lma) | (cpu->Efer & global::Vmm.X86.Efer.Lma);
        bool flush = ((value ^ cpu->Efer) & global::Vmm.X86.Efer.Nxe) != 0;
        cpu->Efer = value;
        if (flush)
        {
            Paging.FlushAll(cpu);
        }

        return true;
    }

    private static bool IsMemoryType(ulong type) => type is 0 or 1 or 4 or 5 or 6;

    private static bool IsPat(ulong value)
    {
        for (int i = 0; i < 8; i++)
        {
            if (((value >> (8 * i)) & 0xFF) is not (0 or 1 or 4 or 5 or 6 or 7))
            {
                return false;
            }
        }

        return true;
    }

    private static List<uint> BuildSaved()
    {
        List<uint> saved =
        [
            Tsc, TscAdjust, SpecCtrl, SysenterCs, SysenterEsp, SysenterEip, McgStatus, McgCtl, MiscEnable, DebugCtl,
            Pat, MtrrDefType, 0x250, 0x258, 0x259, TscDeadline, Star, Lstar, Cstar, SfMask, KernelGsBase, TscAux,
            0xC0010010, 0xC0010015, 0xC0011029, 0xC0010117,
        ];
        for (uint i = 0; i < 16; i++)
        {
            saved.Add(0x200 + i);
        }

        for (uint i = 0; i < 8; i++)
        {
            saved.Add(0x268 + i);
        }

        for (uint i = 0; i < McBanks * 4; i++)
        {
            saved.Add(0x400 + i);
        }

        return saved;
    }
}

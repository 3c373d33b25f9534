// SPDX-License-Identifier: BSD-2-Clause

namespace Vmm.X86;

/// <summary>Values derived from control registers, RFLAGS and segments, kept up to date at every change of these.</summary>
internal static unsafe class Modes
{
    private const uint FlatLimit = 0xFFFFFFFF;

    /// <summary>Recomputes everything derived. Call after CR0, CR4, EFER, VM, AC, CPL, CS, SS or data segments changed.</summary>
    public static void Update(CpuContext* cpu)
    {
        SegmentRegister* cs = CpuContext.Segment(cpu, Seg.Cs);
        SegmentRegister* ss = CpuContext.Segment(cpu, Seg.Ss);
        if ((cpu->Cr0 & Cr0.Pe) == 0)
        {
            cpu->Mode = ProcessorMode.Real;
        }
        else if ((cpu->RflagsSystem & Rflags.Vm) != 0)
        {
            cpu->Mode = ProcessorMode.Virtual8086;
        }
        else if ((cpu->Efer & Efer.Lma) == 0)
        {
            cpu->Mode = ProcessorMode.Protected;
        }
        else
        {
            cpu->Mode = (cs->Rights & Segmentation.LongBit) != 0 ? ProcessorMode.Long : ProcessorMode.Compatibility;
        }

        bool isLong = cpu->Mode == ProcessorMode.Long;
        for (int i = 0; i < 6; i++)
        {
            SegmentRegister* segment = CpuContext.Segment(cpu, i);
            segment->EffectiveBase = isLong && i < Seg.Fs ? 0 : segment->Base;
        }

        bool big = (ss->Rights & Segmentation.DefaultBit) != 0;
        uint key = 0;
        if (isLong)
        {
            cpu->RipMask = ulong.MaxValue;
            cpu->StackMask = ulong.MaxValue;
            cpu->StackFlat = 1;
            key = 2 | BlockKey.Flat;
            key |= (cpu->Cr4 & Cr4.La57) != 0 ? BlockKey.La57 : 0;
        }
        else
        {
            cpu->RipMask = 0xFFFFFFFF;
            cpu->StackMask = big ? 0xFFFFFFFFUL : 0xFFFF;
            cpu->StackFlat = IsFlat(ss, true) ? 1 : 0;
            key = (cs->Rights & Segmentation.DefaultBit) != 0 ? 1U : 0;
            key |= big ? BlockKey.Stack32 : 0;
            bool flat = IsFlat(cs, false) && cpu->StackFlat != 0 &&
                IsFlat(CpuContext.Segment(cpu, Seg.Ds), true) && IsFlat(CpuContext.Segment(cpu, Seg.Es), true);
            key |= flat ? BlockKey.Flat : 0;
        }

        key |= cpu->Cpl == 3 ? BlockKey.User : 0;
        cpu->ModeKey = key;
        UpdateTlb(cpu);
    }

    /// <summary>Chooses the TLB after CPL or EFLAGS.AC changed.</summary>
    public static void UpdateTlb(CpuContext* cpu)
    {
        MmuMode mode = Paging.AlignmentChecked(cpu) ? MmuMode.Empty : Paging.DataMode(cpu);
        cpu->Tlb = cpu->Tlbs + ((int)mode * TlbEntry.Count);
        Asids.SelectTag(cpu);
        cpu->ModeKey = (cpu->ModeKey & ~BlockKey.Ac) | (mode >= MmuMode.SupervisorAc ? BlockKey.Ac : 0);
    }

    private static bool IsFlat(SegmentRegister* segment, bool writable)
    {
        uint rights = segment->Rights;
        if (segment->Base != 0 || segment->Limit != FlatLimit || (rights & Segmentation.UnusableBit) != 0)
        {
            return false;
        }

        bool code = (rights & Segmentation.CodeBit) != 0;
        bool readWrite = (rights & Segmentation.ReadWriteBit) != 0;
        bool expandDown = !code && (rights & Segmentation.DirectionBit) != 0;
        return !expandDown && readWrite && (!writable || !code);
    }
}

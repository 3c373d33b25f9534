// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.X86;

/// <summary>Writes to CR0, CR3 and CR4 with their checks and effects (SDM 3A 2.5); false after #GP(0).</summary>
internal static unsafe class ControlRegisters
{
    private const ulong KnownCr0 = Cr0.Pe | Cr0.Mp | Cr0.Em | Cr0.Ts | Cr0.Et | Cr0.Ne | Cr0.Wp | Cr0.Am | Cr0.Nw |
        Cr0.Cd | Cr0.Pg;

    public static bool WriteCr0(CpuContext* cpu, ulong value)
    {
        if (value >> 32 != 0 ||
            ((value & Cr0.Pg) != 0 && (value & Cr0.Pe) == 0) ||
            ((value & Cr0.Nw) != 0 && (value & Cr0.Cd) == 0))
        {
            return Refuse(cpu);
        }

        value = (value & KnownCr0) | Cr0.Et;
        ulong changed = value ^ cpu->Cr0;
        bool enable = (changed & value & Cr0.Pg) != 0;
        bool disable = (changed & cpu->Cr0 & Cr0.Pg) != 0;
        if (enable && (cpu->Efer & Efer.Lme) != 0)
        {
            SegmentRegister* cs = CpuContext.Segment(cpu, Seg.Cs);
            if ((cpu->Cr4 & Cr4.Pae) == 0 || (cs->Rights & Segmentation.LongBit) != 0)
            {
                return Refuse(cpu);
            }

            cpu->Efer |= Efer.Lma;
        }
        else if (disable)
        {
            if (cpu->Mode == ProcessorMode.Long || (cpu->Cr4 & Cr4.PcidE) != 0)
            {
                return Refuse(cpu);
            }

            cpu->Efer &= ~Efer.Lma;
        }

        if ((changed & (Cr0.Pg | Cr0.Cd | Cr0.Nw)) != 0 && !Paging.LoadPdptes(cpu, cpu->Cr3, cpu->Cr4, value))
        {
            if (enable)
            {
                cpu->Efer &= ~Efer.Lma;
            }

            return Refuse(cpu);
        }

        cpu->Cr0 = value;
        if ((changed & (Cr0.Pg | Cr0.Wp | Cr0.Pe)) != 0)
        {
            Paging.FlushAll(cpu);
        }

        if ((changed & Cr0.Pe) != 0)
        {
            // Real mode runs at level 0 whatever RPL was loaded before.
            cpu->Cpl = 0;
        }

        Modes.Update(cpu);
        return true;
    }

    public static bool WriteCr3(CpuContext* cpu, ulong value)
    {
        bool keep = false;
        if ((cpu->Cr4 & Cr4.PcidE) != 0)
        {
            keep = value >> 63 != 0;
            value &= ~(1UL << 63);
        }

        if (cpu->Mode == ProcessorMode.Long && (value & ~cpu->PhysicalMask) != 0)
        {
            return Refuse(cpu);
        }

        if (!Paging.LoadPdptes(cpu, value, cpu->Cr4, cpu->Cr0))
        {
            return Refuse(cpu);
        }

        cpu->Cr3 = value;
        Asids.Switch(cpu, Asids.CurrentPcid(cpu), keep);
        return true;
    }

    /// <summary>CR4 bits that this processor's CPUID allows.</summary>
    public static ulong AllowedCr4(CpuContext* cpu)
    {
        ulong features = cpu->Features;
        ulong allowed = Cr4.Tsd | Cr4.De | Cr4.Pse | Cr4.Pae | Cr4.Mce | Cr4.Pge | Cr4.Pce | Cr4.OsFxsr | Cr4.OsXmmExcpt;
        allowed |= (features & CpuFeature.Vme) != 0 ? Cr4.Vme | Cr4.Pvi : 0;
        allowed |= (features & CpuFeature.Umip) != 0 ? Cr4.Umip : 0;
        allowed |= (features & CpuFeature.La57) != 0 ? Cr4.La57 : 0;
        allowed |= (features & CpuFeature.FsGsBase) != 0 ? Cr4.FsGsBase : 0;
        allowed |= (features & CpuFeature.Pcid) != 0 ? Cr4.PcidE : 0;
        allowed |= (features & CpuFeature.Xsave) != 0 ? Cr4.OsXsave : 0;
        allowed |= (features & CpuFeature.Smep) != 0 ? Cr4.Smep : 0;
        allowed |= (features & CpuFeature.Smap) != 0 ? Cr4.Smap : 0;
        allowed |= (features & CpuFeature.Pku) != 0 ? Cr4.Pke : 0;
        return allowed;
    }

    public static bool WriteCr4(CpuContext* cpu, ulong value)
    {
        ulong changed = value ^ cpu->Cr4;
        bool isLong = Segmentation.IsLongActive(cpu);
        if ((value & ~AllowedCr4(cpu)) != 0 ||
            (isLong && ((value & Cr4.Pae) == 0 || (changed & Cr4.La57) != 0)) ||
            ((changed & value & Cr4.PcidE) != 0 && (!isLong || (cpu->Cr3 & 0xFFF) != 0)))
        {
            return Refuse(cpu);
        }

        const ulong translation = Cr4.Pse | Cr4.Pae | Cr4.Pge | Cr4.PcidE | Cr4.Smep | Cr4.Smap | Cr4.Pke | Cr4.La57;
        const ulong reload = Cr4.Pse | Cr4.Pae | Cr4.Pge | Cr4.Smep;
        if ((changed & reload) != 0 && !Paging.LoadPdptes(cpu, cpu->Cr3, value, cpu->Cr0))
        {
            return Refuse(cpu);
        }

        cpu->Cr4 = value;
        SoftVcpu.ForgetTsc(cpu);
        cpu->Calls.Ready = 0;
        if ((changed & translation) != 0)
        {
            Paging.FlushAll(cpu);
        }

        Modes.Update(cpu);
        return true;
    }

    private static bool Refuse(CpuContext* cpu)
    {
        Faults.Gp(cpu);
        return false;
    }
}

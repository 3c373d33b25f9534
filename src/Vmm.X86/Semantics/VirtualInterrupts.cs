// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.X86;

/// <summary>
/// The virtual interrupt flag (SDM 3B 21.3 and 21.4): where IOPL does not let level 3 change IF, CR4.VME gives a
/// virtual-8086 task VIF instead, and CR4.PVI does so for CLI and STI of other code. VIP says that the system holds an
/// interrupt back for the task; setting VIF then faults, so that the system can deliver it. CR4.VME also lets a bitmap in
/// the TSS send INT n straight to the task's own handlers.
/// </summary>
internal static unsafe class VirtualInterrupts
{
    private const uint IoMapBaseOffset = 0x66;
    private const uint BitmapBytes = 32;

    /// <summary>VIF stands for IF at level 3. The caller has found that IOPL is below 3.</summary>
    public static bool AreOn(CpuContext* cpu) =>
        cpu->Cpl == 3 && (cpu->Cr4 & (cpu->Mode == ProcessorMode.Virtual8086 ? Cr4.Vme : Cr4.Pvi)) != 0;

    /// <summary>The flags as such a task sees them when it pushes them: VIF in IF's place, and IOPL 3.</summary>
    public static ulong Image(ulong flags) =>
        (flags & ~Rflags.If) | ((flags & Rflags.Vif) != 0 ? Rflags.If : 0) | Rflags.Iopl;

    /// <summary>
    /// Takes IF of flags that such a task pops into VIF. False, with nothing changed, when it must be #GP(0): a trap flag,
    /// or an interrupt that waits.
    /// </summary>
    public static bool TryLoad(CpuContext* cpu, ulong flags)
    {
        if ((flags & Rflags.Tf) != 0 || ((flags & Rflags.If) != 0 && (cpu->RflagsSystem & Rflags.Vip) != 0))
        {
            return false;
        }

        cpu->RflagsSystem = (cpu->RflagsSystem & ~Rflags.Vif) | ((flags & Rflags.If) != 0 ? Rflags.Vif : 0);
        return true;
    }

    /// <summary>
    /// Reads the redirection bit of a software interrupt: in the 32 bytes below the TSS's I/O permission bitmap, 0 sends
    /// it to the task. False after raising a fault; the bitmap must lie inside the TSS.
    /// </summary>
    public static bool Redirects(CpuContext* cpu, byte vector, out bool redirects)
    {
        redirects = false;
        SegmentRegister* tr = CpuContext.Segment(cpu, Seg.Tr);
        if (tr->Unusable || tr->Limit < IoMapBaseOffset + 1)
        {
            Faults.Gp(cpu);
            return false;
        }

        if (!Paging.ReadSystem(cpu, tr->Base + IoMapBaseOffset, out ushort ioMap))
        {
            return false;
        }

        uint at = ioMap - BitmapBytes + ((uint)vector >> 3);
        if (ioMap < BitmapBytes || at > tr->Limit)
        {
            Faults.Gp(cpu);
            return false;
        }

        if (!Paging.ReadSystem(cpu, tr->Base + at, out byte bits))
        {
            return false;
        }

        redirects = (bits & (1 << (vector & 7))) == 0;
        return true;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using Vmm.Core;

namespace Vmm.X86;

/// <summary>
/// The leaf of CPUID that was read last, for generated code. Leaves that follow a register (1, 7 and 0xD: CR4, XCR0, the
/// APIC's base) are never here, so that only a new table ends it.
/// </summary>
internal unsafe struct LastCpuid
{
    /// <summary>Where the registers start.</summary>
    public const int RegistersOffset = sizeof(ulong);

    /// <summary>EAX and, in the high half, ECX in front of the instruction.</summary>
    private ulong _leaf;

    /// <summary>EAX, EBX, ECX and EDX behind it.</summary>
    private fixed uint _registers[4];

    /// <summary>Takes a leaf.</summary>
    public void Set(uint function, uint index, in CpuidEntry entry)
    {
        _leaf = function | ((ulong)index << 32);
        _registers[0] = entry.Eax;
        _registers[1] = entry.Ebx;
        _registers[2] = entry.Ecx;
        _registers[3] = entry.Edx;
    }

    /// <summary>Takes a leaf that no table has: each value of the two registers is some leaf.</summary>
    public void Forget() => Set(uint.MaxValue, uint.MaxValue, default);
}

/// <summary>
/// What generated code needs for SYSCALL and SYSRET in line (Translator.System.cs), computed by the handler when it has
/// executed one of them: the frequent case of a 64-bit kernel. <see cref="Ready"/> goes back to 0 when a register changes
/// that the rest depends on (EFER, STAR, SFMASK, CR0, CR4).
/// </summary>
internal unsafe struct FastCalls
{
    /// <summary>1 when the rest may be used.</summary>
    public ulong Ready;

    /// <summary>Bits of RflagsSystem that SYSCALL leaves.</summary>
    public ulong KeepSystem;

    /// <summary>Bits of FlagImage that SYSCALL leaves.</summary>
    public ulong KeepImage;

    /// <summary>Selectors that SYSCALL loads.</summary>
    public ulong KernelCs;
    public ulong KernelSs;

    /// <summary>Selectors that SYSRET to 64-bit code loads.</summary>
    public ulong UserCs;
    public ulong UserSs;

    /// <summary>TLBs of the two levels.</summary>
    public TlbEntry* KernelTlb;
    public TlbEntry* UserTlb;

    /// <summary>Mode keys behind them, without <see cref="BlockKey.La57"/>.</summary>
    public const uint KernelKey = 2 | BlockKey.Flat;
    public const uint UserKey = KernelKey | BlockKey.User;

    /// <summary>Limit and rights of flat segments as one word (SegmentRegister).</summary>
    public const ulong KernelCode = Limit | (0xA09BUL << 32);
    public const ulong KernelData = Limit | (0xC093UL << 32);
    public const ulong UserCode = Limit | (0xA0FBUL << 32);
    public const ulong UserData = Limit | (0xC0F3UL << 32);

    private const ulong Limit = 0xFFFFFFFF;

    /// <summary>Makes the values of the present registers ready, if they are of the frequent kind.</summary>
    public static void Prepare(CpuContext* cpu)
    {
        ulong mask = cpu->Msr.SfMask;

        // Without TF no trap can follow; without AC the supervisor's TLB is the first; with global pages the branch tag
        // at level 0 is the supervisor's.
        const ulong cleared = Rflags.Tf | Rflags.Ac;
        if ((mask & cleared) != cleared || (cpu->Efer & (Efer.Sce | Efer.Lma)) != (Efer.Sce | Efer.Lma) ||
            (cpu->Cr4 & Cr4.Pge) == 0 || !Paging.IsCanonical(cpu, cpu->Msr.Lstar))
        {
            cpu->Calls.Ready = 0;
            return;
        }

        ulong star = cpu->Msr.Star;
        ulong image = ((mask & 0xD5) << 8) | ((mask >> 11) & 1);
        cpu->Calls = new FastCalls
        {
            Ready = 1,
            KeepSystem = ~(mask | Rflags.Rf) | Rflags.Fixed,
            KeepImage = ~image,
            KernelCs = (star >> 32) & 0xFFFC,
            KernelSs = (((star >> 32) & 0xFFFC) + 8) & 0xFFFC,
            UserCs = ((((star >> 48) + 16) & 0xFFFF) & 0xFFFC) | 3,
            UserSs = ((((star >> 48) + 8) & 0xFFFF) & 0xFFFC) | 3,
            KernelTlb = cpu->Tlbs + ((int)MmuMode.Supervisor * TlbEntry.Count),
            UserTlb = cpu->Tlbs + ((int)MmuMode.User * TlbEntry.Count),
        };
    }
}

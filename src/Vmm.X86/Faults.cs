// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;

namespace Vmm.X86;

/// <summary>Exception vectors (SDM 3A table 6-1).</summary>
internal static class Vector
{
    public const byte DivideError = 0;
    public const byte Debug = 1;
    public const byte Nmi = 2;
    public const byte Breakpoint = 3;
    public const byte Overflow = 4;
    public const byte BoundRange = 5;
    public const byte InvalidOpcode = 6;
    public const byte DeviceNotAvailable = 7;
    public const byte DoubleFault = 8;
    public const byte InvalidTss = 10;
    public const byte SegmentNotPresent = 11;
    public const byte StackFault = 12;
    public const byte GeneralProtection = 13;
    public const byte PageFault = 14;
    public const byte X87 = 16;
    public const byte AlignmentCheck = 17;
    public const byte MachineCheck = 18;
    public const byte Simd = 19;
}

/// <summary>
/// How handlers raise exceptions: <c>return Faults.Ud(cpu);</c>. The fault is stored in the context and delivered by the
/// dispatch loop with RIP at the faulting instruction; a handler that raises must not have changed anything.
/// </summary>
internal static unsafe class Faults
{
    /// <summary>#DE.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Status De(CpuContext* cpu) => Raise(cpu, Vector.DivideError);

    /// <summary>#UD.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Status Ud(CpuContext* cpu) => Raise(cpu, Vector.InvalidOpcode);

    /// <summary>#NM.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Status Nm(CpuContext* cpu) => Raise(cpu, Vector.DeviceNotAvailable);

    /// <summary>#MF.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Status Mf(CpuContext* cpu) => Raise(cpu, Vector.X87);

    /// <summary>#XM; #UD instead when CR4.OSXMMEXCPT is clear (SDM 1 11.5.1).</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Status Xm(CpuContext* cpu) =>
        Raise(cpu, (cpu->Cr4 & Cr4.OsXmmExcpt) != 0 ? Vector.Simd : Vector.InvalidOpcode);

    /// <summary>#GP(error code).</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Status Gp(CpuContext* cpu, uint errorCode = 0) => Raise(cpu, Vector.GeneralProtection, errorCode);

    /// <summary>#SS(error code).</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Status Ss(CpuContext* cpu, uint errorCode = 0) => Raise(cpu, Vector.StackFault, errorCode);

    /// <summary>#NP(error code).</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Status Np(CpuContext* cpu, uint errorCode) => Raise(cpu, Vector.SegmentNotPresent, errorCode);

    /// <summary>#TS(error code).</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Status Ts(CpuContext* cpu, uint errorCode) => Raise(cpu, Vector.InvalidTss, errorCode);

    /// <summary>#AC(0).</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Status Ac(CpuContext* cpu) => Raise(cpu, Vector.AlignmentCheck, 0);

    /// <summary>#PF; CR2 is written at delivery.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Status Pf(CpuContext* cpu, ulong linear, uint errorCode)
    {
        Raise(cpu, Vector.PageFault, errorCode);
        cpu->Fault.Address = linear;
        return Status.Fault;
    }

    /// <summary>A non-canonical address in the stack segment is #SS(0).</summary>
    public static void NonCanonicalIsStack(CpuContext* cpu)
    {
        if (cpu->Fault.NonCanonical)
        {
            Raise(cpu, Vector.StackFault, 0);
        }
    }

    /// <summary>An exception without an error code.</summary>
    public static Status Raise(CpuContext* cpu, byte vector)
    {
        cpu->Fault.Vector = vector;
        cpu->Fault.HasErrorCode = false;
        cpu->Fault.ErrorCode = 0;
        cpu->Fault.IsTrap = false;
        cpu->Fault.NonCanonical = false;
        return Status.Fault;
    }

    /// <summary>An exception with an error code.</summary>
    public static Status Raise(CpuContext* cpu, byte vector, uint errorCode)
    {
        cpu->Fault.Vector = vector;
        cpu->Fault.HasErrorCode = true;
        cpu->Fault.ErrorCode = errorCode;
        cpu->Fault.IsTrap = false;
        cpu->Fault.NonCanonical = false;
        return Status.Fault;
    }
}

/// <summary>CR0 bits.</summary>
internal static class Cr0
{
    public const ulong Pe = 1UL << 0;
    public const ulong Mp = 1UL << 1;
    public const ulong Em = 1UL << 2;
    public const ulong Ts = 1UL << 3;
    public const ulong Et = 1UL << 4;
    public const ulong Ne = 1UL << 5;
    public const ulong Wp = 1UL << 16;
    public const ulong Am = 1UL << 18;
    public const ulong Nw = 1UL << 29;
    public const ulong Cd = 1UL << 30;
    public const ulong Pg = 1UL << 31;
}

/// <summary>CR4 bits.</summary>
internal static class Cr4
{
    public const ulong Vme = 1UL << 0;
    public const ulong Pvi = 1UL << 1;
    public const ulong Tsd = 1UL << 2;
    public const ulong De = 1UL << 3;
    public const ulong Pse = 1UL << 4;
    public const ulong Pae = 1UL << 5;
    public const ulong Mce = 1UL << 6;
    public const ulong Pge = 1UL << 7;
    public const ulong Pce = 1UL << 8;
    public const ulong OsFxsr = 1UL << 9;
    public const ulong OsXmmExcpt = 1UL << 10;
    public const ulong Umip = 1UL << 11;
    public const ulong La57 = 1UL << 12;
    public const ulong FsGsBase = 1UL << 16;
    public const ulong PcidE = 1UL << 17;
    public const ulong OsXsave = 1UL << 18;
    public const ulong Smep = 1UL << 20;
    public const ulong Smap = 1UL << 21;
    public const ulong Pke = 1UL << 22;
}

/// <summary>EFER bits.</summary>
internal static class Efer
{
    public const ulong Sce = 1UL << 0;
    public const ulong Lme = 1UL << 8;
    public const ulong Lma = 1UL << 10;
    public const ulong Nxe = 1UL << 11;
    public const ulong Svme = 1UL << 12;
    public const ulong Ffxsr = 1UL << 14;
    public const ulong AutoIbrs = 1UL << 21;
}

/// <summary>RFLAGS bits.</summary>
internal static class Rflags
{
    public const ulong Cf = 1UL << 0;
    public const ulong Fixed = 1UL << 1;
    public const ulong Pf = 1UL << 2;
    public const ulong Af = 1UL << 4;
    public const ulong Zf = 1UL << 6;
    public const ulong Sf = 1UL << 7;
    public const ulong Tf = 1UL << 8;
    public const ulong If = 1UL << 9;
    public const ulong Df = 1UL << 10;
    public const ulong Of = 1UL << 11;
    public const ulong Iopl = 3UL << 12;
    public const ulong Nt = 1UL << 14;
    public const ulong Rf = 1UL << 16;
    public const ulong Vm = 1UL << 17;
    public const ulong Ac = 1UL << 18;
    public const ulong Vif = 1UL << 19;
    public const ulong Vip = 1UL << 20;
    public const ulong Id = 1UL << 21;

    /// <summary>CF PF AF ZF SF OF.</summary>
    public const ulong Arithmetic = Cf | Pf | Af | Zf | Sf | Of;
}

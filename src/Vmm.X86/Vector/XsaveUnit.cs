// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.CompilerServices;
using Iced.Intel;
using Vmm.Core;

namespace Vmm.X86;

// FXSAVE, FXRSTOR and the XSAVE family (SDM 1 chapters 10.5 and 13). All of them check the whole memory image for access
// before anything changes, so that a page fault finds either nothing done or everything (the manual allows partial
// stores; operating systems rely on restarting, which both allow).
//
// XSAVEOPT and XSAVES use the init optimisation and not the modified optimisation. FXSAVE of a 64-bit guest's FIP and FDP
// without REX.W stores their low halves and zero selectors (see X87.cs).

/// <summary>State save and restore instructions, XGETBV and XSETBV.</summary>
internal static unsafe class XsaveUnit
{
    /// <summary>MXCSR bits that exist: everything but AMD's misaligned-exception mask.</summary>
    public const uint MxcsrMask = 0xFFFF;

    private const ulong Compacted = 1UL << 63;
    private const int AreaBytes = CpuState.PkruOffset + 64;

    /// <summary>Binds, or answers false.</summary>
    public static bool Bind(in Instruction instruction, Insn* insn)
    {
        delegate*<CpuContext*, Insn*, Status> handler = instruction.Mnemonic switch
        {
            Mnemonic.Fxsave or Mnemonic.Fxsave64 => &Fxsave,
            Mnemonic.Fxrstor or Mnemonic.Fxrstor64 => &Fxrstor,
            Mnemonic.Xsave or Mnemonic.Xsave64 => &Xsave,
            Mnemonic.Xsaveopt or Mnemonic.Xsaveopt64 => &Xsaveopt,
            Mnemonic.Xsavec or Mnemonic.Xsavec64 => &Xsavec,
            Mnemonic.Xsaves or Mnemonic.Xsaves64 => &Xsaves,
            Mnemonic.Xrstor or Mnemonic.Xrstor64 => &Xrstor,
            Mnemonic.Xrstors or Mnemonic.Xrstors64 => &Xrstors,
            Mnemonic.Xgetbv => &Xgetbv,
            Mnemonic.Xsetbv => &Xsetbv,
            _ => null,
        };
        insn->Handler = handler;
        return handler != null;
    }

    /// <summary>True for the instructions that save or load what XCR0 names.</summary>
    public static bool MovesComponents(Code code) => code.Mnemonic() is Mnemonic.Xsave or Mnemonic.Xsave64
        or Mnemonic.Xsaveopt or Mnemonic.Xsaveopt64 or Mnemonic.Xsavec or Mnemonic.Xsavec64 or Mnemonic.Xsaves
        or Mnemonic.Xsaves64 or Mnemonic.Xrstor or Mnemonic.Xrstor64 or Mnemonic.Xrstors or Mnemonic.Xrstors64;

    private static bool IsWide(Insn* insn) => (Code)insn->Code is Code.Fxsave64_m512byte or Code.Fxrstor64_m512byte
        or Code.Xsave64_mem or Code.Xsaveopt64_mem or Code.Xsavec64_mem or Code.Xsaves64_mem or Code.Xrstor64_mem
        or Code.Xrstors64_mem;

    private static int XmmBytes(Insn* insn) => (insn->Flags & InsnFlags.Long) != 0 ? 256 : 128;

    private static Status Fxsave(CpuContext* cpu, Insn* insn)
    {
        if ((cpu->Cr0 & (Cr0.Em | Cr0.Ts)) != 0)
        {
            return Faults.Nm(cpu);
        }

        if (!Mem.Address(cpu, insn, 512, write: true, out ulong linear))
        {
            return Status.Fault;
        }

        if ((linear & 15) != 0)
        {
            return VectorUnit.Misaligned(cpu, linear);
        }

        byte* image = stackalloc byte[XsaveLayout.LegacyEnd];
        WriteX87(cpu, image, IsWide(insn));
        // SAFETY: image has LegacyEnd (512) bytes; MXCSR and its mask lie at 24 and 28.
        *(uint*)(image + XsaveLayout.Mxcsr) = cpu->Mxcsr;
        *(uint*)(image + XsaveLayout.MxcsrMask) = MxcsrMask;
        int xmm = XmmBytes(insn);
        Unsafe.CopyBlockUnaligned(image + XsaveLayout.Xmm, cpu->Xsave + XsaveLayout.Xmm, (uint)xmm);
        return Mem.ProbeWrite(cpu, linear, 512) && Mem.WriteBytes(cpu, linear, image, XsaveLayout.Xmm + xmm)
            ? Status.Next
            : Status.Fault;
    }

    private static Status Fxrstor(CpuContext* cpu, Insn* insn)
    {
        if ((cpu->Cr0 & (Cr0.Em | Cr0.Ts)) != 0)
        {
            return Faults.Nm(cpu);
        }

        if (!Mem.Address(cpu, insn, 512, write: false, out ulong linear))
        {
            return Status.Fault;
        }

        if ((linear & 15) != 0)
        {
            return VectorUnit.Misaligned(cpu, linear);
        }

        byte* image = stackalloc byte[512];
        if (!Mem.ReadBytes(cpu, linear, image, 512))
        {
            return Status.Fault;
        }

        // SAFETY: image has at least the 512 bytes of the legacy area.
        uint mxcsr = *(uint*)(image + XsaveLayout.Mxcsr);
        if ((mxcsr & ~MxcsrMask) != 0)
        {
            return Faults.Gp(cpu);
        }

        ReadX87(cpu, image, IsWide(insn));
        cpu->Mxcsr = mxcsr;
        Unsafe.CopyBlockUnaligned(cpu->Xsave + XsaveLayout.Xmm, image + XsaveLayout.Xmm, (uint)XmmBytes(insn));
        return Status.Next;
    }

    private static Status Xsave(CpuContext* cpu, Insn* insn) => SaveStandard(cpu, insn, optimise: false);

    private static Status Xsaveopt(CpuContext* cpu, Insn* insn) => SaveStandard(cpu, insn, optimise: true);

    private static Status Xsavec(CpuContext* cpu, Insn* insn) => SaveCompacted(cpu, insn, cpu->Xcr0);

    private static Status Xsaves(CpuContext* cpu, Insn* insn)
    {
        if ((cpu->Cr4 & Cr4.OsXsave) == 0)
        {
            return Faults.Ud(cpu);
        }

        return cpu->Cpl != 0 ? Faults.Gp(cpu) : SaveCompacted(cpu, insn, cpu->Xcr0 | cpu->Msr.Xss);
    }

    private static Status Xrstor(CpuContext* cpu, Insn* insn) => Restore(cpu, insn, cpu->Xcr0, supervisor: false);

    private static Status Xrstors(CpuContext* cpu, Insn* insn)
    {
        if ((cpu->Cr4 & Cr4.OsXsave) == 0)
        {
            return Faults.Ud(cpu);
        }

        return cpu->Cpl != 0 ? Faults.Gp(cpu) : Restore(cpu, insn, cpu->Xcr0 | cpu->Msr.Xss, supervisor: true);
    }

    private static ulong Requested(CpuContext* cpu) => ((ulong)(uint)cpu->Rdx << 32) | (uint)cpu->Rax;

    // #UD, #NM and #GP for alignment, and the linear address.
    private static bool Begin(CpuContext* cpu, Insn* insn, bool write, out ulong linear)
    {
        linear = 0;
        if ((cpu->Cr4 & Cr4.OsXsave) == 0)
        {
            Faults.Ud(cpu);
            return false;
        }

        if ((cpu->Cr0 & Cr0.Ts) != 0)
        {
            Faults.Nm(cpu);
            return false;
        }

        if (!Mem.Address(cpu, insn, XsaveLayout.HeaderEnd, write, out linear))
        {
            return false;
        }

        if ((linear & 63) != 0)
        {
            VectorUnit.Misaligned(cpu, linear);
            return false;
        }

        return true;
    }

    private static Status SaveStandard(CpuContext* cpu, Insn* insn, bool optimise)
    {
        if (!Begin(cpu, insn, write: true, out ulong linear))
        {
            return Status.Fault;
        }

        ulong components = Requested(cpu) & cpu->Xcr0;
        ulong inUse = InUse(cpu, components);
        ulong saved = optimise ? components & inUse : components;
        int length = (saved & XsaveLayout.PkruBit) != 0 ? CpuState.PkruOffset + 8
            : (saved & XsaveLayout.AvxBit) != 0 ? XsaveLayout.YmmHigh + 256 : XsaveLayout.HeaderEnd;
        byte* image = stackalloc byte[XsaveLayout.Xmm];
        if (!Mem.ProbeWrite(cpu, linear, length) ||
            !Mem.Read(cpu, linear + XsaveLayout.XstateBv, out ulong old))
        {
            return Status.Fault;
        }

        bool done = true;
        if ((saved & XsaveLayout.X87Bit) != 0)
        {
            WriteX87(cpu, image, IsWide(insn));
            done = Mem.WriteBytes(cpu, linear, image, 24) &&
                Mem.WriteBytes(cpu, linear + XsaveLayout.St, image + XsaveLayout.St, 128);
        }

        if ((saved & (XsaveLayout.SseBit | XsaveLayout.AvxBit)) != 0)
        {
            done = done && Mem.Write(cpu, linear + XsaveLayout.Mxcsr, cpu->Mxcsr | ((ulong)MxcsrMask << 32));
        }

        int half = XmmBytes(insn);
        if ((saved & XsaveLayout.SseBit) != 0)
        {
            done = done && Mem.WriteBytes(cpu, linear + XsaveLayout.Xmm, cpu->Xsave + XsaveLayout.Xmm, half);
        }

        if ((saved & XsaveLayout.AvxBit) != 0)
        {
            done = done && Mem.WriteBytes(
                cpu, linear + XsaveLayout.YmmHigh, cpu->Xsave + XsaveLayout.YmmHigh, half);
        }

        if ((saved & XsaveLayout.PkruBit) != 0)
        {
            done = done && Mem.Write(cpu, linear + CpuState.PkruOffset, (ulong)cpu->Pkru);
        }

        done = done && Mem.Write(cpu, linear + XsaveLayout.XstateBv, (old & ~components) | (inUse & components));
        return done ? Status.Next : Status.Fault;
    }

    private static Status SaveCompacted(CpuContext* cpu, Insn* insn, ulong allowed)
    {
        if (!Begin(cpu, insn, write: true, out ulong linear))
        {
            return Status.Fault;
        }

        ulong components = Requested(cpu) & allowed;
        ulong saved = components & InUse(cpu, components);
        int length = XsaveLayout.HeaderEnd;
        int avxAt = length;
        length += (components & XsaveLayout.AvxBit) != 0 ? 256 : 0;
        int pkruAt = length;
        length += (components & XsaveLayout.PkruBit) != 0 ? 8 : 0;
        byte* image = stackalloc byte[XsaveLayout.Xmm];
        if (!Mem.ProbeWrite(cpu, linear, length))
        {
            return Status.Fault;
        }

        bool done = true;
        int half = XmmBytes(insn);
        if ((saved & XsaveLayout.X87Bit) != 0)
        {
            WriteX87(cpu, image, IsWide(insn));
            done = Mem.WriteBytes(cpu, linear, image, 24) &&
                Mem.WriteBytes(cpu, linear + XsaveLayout.St, image + XsaveLayout.St, 128);
        }

        if ((saved & XsaveLayout.SseBit) != 0)
        {
            done = done && Mem.Write(cpu, linear + XsaveLayout.Mxcsr, cpu->Mxcsr | ((ulong)MxcsrMask << 32)) &&
                Mem.WriteBytes(cpu, linear + XsaveLayout.Xmm, cpu->Xsave + XsaveLayout.Xmm, half);
        }

        if ((saved & XsaveLayout.AvxBit) != 0)
        {
            done = done && Mem.WriteBytes(cpu, linear + (uint)avxAt, cpu->Xsave + XsaveLayout.YmmHigh, half);
        }

        if ((saved & XsaveLayout.PkruBit) != 0)
        {
            done = done && Mem.Write(cpu, linear + (uint)pkruAt, (ulong)cpu->Pkru);
        }

        done = done && Mem.Write(cpu, linear + XsaveLayout.XstateBv, saved) &&
            Mem.Write(cpu, linear + XsaveLayout.XcompBv, components | Compacted);
        return done ? Status.Next : Status.Fault;
    }

    private static Status Restore(CpuContext* cpu, Insn* insn, ulong allowed, bool supervisor)
    {
        if (!Begin(cpu, insn, write: false, out ulong linear))
        {
            return Status.Fault;
        }

        byte* image = stackalloc byte[AreaBytes];
        if (!Mem.ReadBytes(cpu, linear, image, XsaveLayout.HeaderEnd))
        {
            return Status.Fault;
        }

        // SAFETY: image has AreaBytes, which is larger than the header that was read into it.
        ulong present = *(ulong*)(image + XsaveLayout.XstateBv);
        ulong format = *(ulong*)(image + XsaveLayout.XcompBv);
        bool isCompacted = (format & Compacted) != 0;
        if (!IsHeaderValid(image, present, format, allowed, supervisor))
        {
            return Faults.Gp(cpu);
        }

        ulong components = Requested(cpu) & allowed;
        ulong loaded = components & present;
        ulong where = isCompacted ? format : XsaveLayout.AvxBit | XsaveLayout.PkruBit;
        int avxAt = XsaveLayout.YmmHigh;
        int pkruAt = !isCompacted ? CpuState.PkruOffset
            : XsaveLayout.HeaderEnd + ((where & XsaveLayout.AvxBit) != 0 ? 256 : 0);
        int length = (loaded & XsaveLayout.PkruBit) != 0 ? pkruAt + 8
            : (loaded & XsaveLayout.AvxBit) != 0 ? avxAt + 256 : XsaveLayout.HeaderEnd;
        if (length > XsaveLayout.HeaderEnd && !Mem.ReadBytes(
            cpu, linear + XsaveLayout.HeaderEnd, image + XsaveLayout.HeaderEnd, length - XsaveLayout.HeaderEnd))
        {
            return Status.Fault;
        }

        // SAFETY: image has at least the 512 bytes of the legacy area.
        uint mxcsr = *(uint*)(image + XsaveLayout.Mxcsr);
        bool loadsMxcsr = isCompacted
            ? (loaded & XsaveLayout.SseBit) != 0
            : (components & (XsaveLayout.SseBit | XsaveLayout.AvxBit)) != 0;
        if (loadsMxcsr && (mxcsr & ~MxcsrMask) != 0)
        {
            return Faults.Gp(cpu);
        }

        Commit(cpu, insn, image, components, loaded, avxAt, pkruAt);
        if (loadsMxcsr)
        {
            cpu->Mxcsr = mxcsr;
        }
        else if ((components & XsaveLayout.SseBit) != 0)
        {
            cpu->Mxcsr = XsaveLayout.MxcsrInit;
        }

        return Status.Next;
    }

    private static void Commit(
        CpuContext* cpu, Insn* insn, byte* image, ulong components, ulong loaded, int avxAt, int pkruAt)
    {
        uint half = (uint)XmmBytes(insn);
        if ((loaded & XsaveLayout.X87Bit) != 0)
        {
            ReadX87(cpu, image, IsWide(insn));
        }
        else if ((components & XsaveLayout.X87Bit) != 0)
        {
            XsaveState.InitialX87(cpu);
        }

        if ((loaded & XsaveLayout.SseBit) != 0)
        {
            Unsafe.CopyBlockUnaligned(cpu->Xsave + XsaveLayout.Xmm, image + XsaveLayout.Xmm, half);
        }
        else if ((components & XsaveLayout.SseBit) != 0)
        {
            Unsafe.InitBlockUnaligned(cpu->Xsave + XsaveLayout.Xmm, 0, half);
        }

        if ((loaded & XsaveLayout.AvxBit) != 0)
        {
            Unsafe.CopyBlockUnaligned(cpu->Xsave + XsaveLayout.YmmHigh, image + avxAt, half);
        }
        else if ((components & XsaveLayout.AvxBit) != 0)
        {
            Unsafe.InitBlockUnaligned(cpu->Xsave + XsaveLayout.YmmHigh, 0, half);
        }

        if ((components & XsaveLayout.PkruBit) != 0)
        {
            // SAFETY: pkruAt is Pkru or a place below it, and image has Pkru + 64 bytes.
            uint pkru = (loaded & XsaveLayout.PkruBit) != 0 ? *(uint*)(image + pkruAt) : 0;
            SetPkru(cpu, pkru);
        }
    }

    // SDM 1 13.8 and 13.12: malformed headers raise #GP.
    private static bool IsHeaderValid(byte* image, ulong present, ulong format, ulong allowed, bool supervisor)
    {
        bool isCompacted = (format & Compacted) != 0;
        int from = isCompacted ? XsaveLayout.XcompBv + 8 : XsaveLayout.XcompBv;
        int to = isCompacted ? XsaveLayout.HeaderEnd : XsaveLayout.XcompBv + 16;
        if (new ReadOnlySpan<byte>(image + from, to - from).IndexOfAnyExcept((byte)0) >= 0)
        {
            return false;
        }

        if (!isCompacted)
        {
            return !supervisor && (present & ~allowed) == 0;
        }

        ulong layout = format & ~Compacted;
        return (layout & ~allowed) == 0 && (present & ~layout) == 0;
    }

    private static ulong InUse(CpuContext* cpu, ulong components)
    {
        ulong inUse = XsaveState.InUse(cpu) | (cpu->Pkru != 0 ? XsaveLayout.PkruBit : 0);
        return inUse & components;
    }

    private static void SetPkru(CpuContext* cpu, uint value)
    {
        if (cpu->Pkru != value)
        {
            cpu->Pkru = value;
            Paging.FlushAll(cpu);
        }
    }

    private static Status Xgetbv(CpuContext* cpu, Insn* insn)
    {
        if ((cpu->Cr4 & Cr4.OsXsave) == 0)
        {
            return Faults.Ud(cpu);
        }

        uint index = (uint)cpu->Rcx;
        if (index > 1)
        {
            return Faults.Gp(cpu);
        }

        ulong value = index == 0 ? cpu->Xcr0 : InUse(cpu, cpu->Xcr0);
        cpu->Rax = (uint)value;
        cpu->Rdx = value >> 32;
        return Status.Next;
    }

    private static Status Xsetbv(CpuContext* cpu, Insn* insn)
    {
        if ((cpu->Cr4 & Cr4.OsXsave) == 0)
        {
            return Faults.Ud(cpu);
        }

        ulong value = Requested(cpu);
        bool avxWithoutSse = (value & (XsaveLayout.SseBit | XsaveLayout.AvxBit)) == XsaveLayout.AvxBit;
        if (cpu->Cpl != 0 || (uint)cpu->Rcx != 0 || (value & XsaveLayout.X87Bit) == 0 || avxWithoutSse ||
            (value & ~XsaveState.Supported) != 0)
        {
            return Faults.Gp(cpu);
        }

        cpu->Xcr0 = value;
        return Insn.EndAndLook(cpu, insn);
    }

    private static void WriteX87(CpuContext* cpu, byte* image, bool wide)
    {
        Unsafe.CopyBlockUnaligned(image, cpu->Xsave, XsaveLayout.Xmm);
        image[5] = 0;
        if (!wide)
        {
            // SAFETY: callers give at least the 512 bytes of the legacy area.
            *(ulong*)(image + XsaveLayout.Fip) = (uint)cpu->Fip;
            *(ulong*)(image + XsaveLayout.Fdp) = (uint)cpu->Fdp;
        }
    }

    private static void ReadX87(CpuContext* cpu, byte* image, bool wide)
    {
        // SAFETY: callers give at least the 512 bytes of the legacy area; i is below 8, and a slot of either image
        // has 16 bytes.
        cpu->Fcw = (ushort)((*(ushort*)image & 0x1F7F) | 0x40);
        cpu->Fsw = *(ushort*)(image + XsaveLayout.Fsw);
        cpu->Ftw = image[XsaveLayout.Ftw];
        cpu->Fop = (ushort)(*(ushort*)(image + XsaveLayout.Fop) & 0x7FF);
        cpu->Fip = wide ? *(ulong*)(image + XsaveLayout.Fip) : *(uint*)(image + XsaveLayout.Fip);
        cpu->Fdp = wide ? *(ulong*)(image + XsaveLayout.Fdp) : *(uint*)(image + XsaveLayout.Fdp);
        X87.UpdateSummary(cpu);
        for (int i = 0; i < 8; i++)
        {
            var to = (ulong*)(cpu->Xsave + XsaveLayout.St + (16 * i));
            var from = (ulong*)(image + XsaveLayout.St + (16 * i));
            to[0] = from[0];
            to[1] = (ushort)from[1];
        }
    }
}

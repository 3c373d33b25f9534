// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.X86;

// FXSAVE, FXRSTOR and the XSAVE family over the area in the context (SDM 1 chapter 13). Components: x87, SSE, AVX, PKRU.
// XSAVES and XRSTORS are not offered. The modified optimisation of XSAVEOPT is not used: everything in use is written.

/// <summary>FXSAVE and XSAVE groups.</summary>
internal static unsafe class XsaveGroup
{
    private const int LegacyXmm = 160;
    private const uint MxcsrMask = 0x0000FFFF;

    private static bool FpuAvailable(CpuContext* cpu)
    {
        if ((cpu->Cr0 & (Cr0.Ts | Cr0.Em)) == 0)
        {
            return true;
        }

        Faults.Nm(cpu);
        return false;
    }

    public static Status Fxsave(CpuContext* cpu, Insn* insn)
    {
        if (!FpuAvailable(cpu) || !Mem.Address(cpu, insn, 512, true, out ulong linear))
        {
            return Status.Fault;
        }

        if ((linear & 15) != 0)
        {
            return Faults.Gp(cpu);
        }

        byte* image = stackalloc byte[512];
        Buffer.MemoryCopy(cpu->Xsave, image, 512, 512);
        *(uint*)(image + 28) = MxcsrMask;
        int length = LegacyXmm + (cpu->Mode == ProcessorMode.Long ? 256 : 128);
        return Mem.WriteBytes(cpu, linear, image, length) ? Status.Next : Status.Fault;
    }

    public static Status Fxrstor(CpuContext* cpu, Insn* insn)
    {
        if (!FpuAvailable(cpu) || !Mem.Address(cpu, insn, 512, false, out ulong linear))
        {
            return Status.Fault;
        }

        if ((linear & 15) != 0)
        {
            return Faults.Gp(cpu);
        }

        byte* image = stackalloc byte[512];
        if (!Mem.ReadBytes(cpu, linear, image, 512))
        {
            return Status.Fault;
        }

        if ((*(uint*)(image + 24) & ~MxcsrMask) != 0)
        {
            return Faults.Gp(cpu);
        }

        Buffer.MemoryCopy(image, cpu->Xsave, 24, 24);
        cpu->Mxcsr = *(uint*)(image + 24);
        int xmm = cpu->Mode == ProcessorMode.Long ? 256 : 128;
        Buffer.MemoryCopy(image + 32, cpu->Xsave + 32, 128 + xmm, 128 + xmm);
        FixX87(cpu);
        return Status.Next;
    }

    // The upper bytes of the 80-bit slots and reserved bytes read as zero.
    private static void FixX87(CpuContext* cpu)
    {
        for (int i = 0; i < 8; i++)
        {
            byte* slot = cpu->Xsave + 32 + (i * 16);
            *(ushort*)(slot + 10) = 0;
            *(uint*)(slot + 12) = 0;
        }

        cpu->Xsave[5] = 0;
        cpu->Fcw = (ushort)((cpu->Fcw & 0x1F3F) | 0x40);
    }

    private static bool Prepare(CpuContext* cpu, Insn* insn, bool write, out ulong linear, out ulong mask)
    {
        linear = 0;
        mask = 0;
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

        mask = ((uint)cpu->Rax | (cpu->Rdx << 32)) & cpu->Xcr0;
        if (!Mem.Address(cpu, insn, 576, write, out linear))
        {
            return false;
        }

        if ((linear & 63) != 0)
        {
            Faults.Gp(cpu);
            return false;
        }

        return true;
    }

    private static ulong InUse(CpuContext* cpu) =>
        XsaveState.InUse(cpu) | (cpu->Pkru != 0 ? XsaveState.Pkru : 0);

    public static Status Xsave(CpuContext* cpu, Insn* insn) => Save(cpu, insn, false, false);

    public static Status Xsaveopt(CpuContext* cpu, Insn* insn) => Save(cpu, insn, true, false);

    public static Status Xsavec(CpuContext* cpu, Insn* insn) => Save(cpu, insn, true, true);

    private static Status Save(CpuContext* cpu, Insn* insn, bool skipInitial, bool compact)
    {
        if (!Prepare(cpu, insn, true, out ulong linear, out ulong mask))
        {
            return Status.Fault;
        }

        ulong inUse = InUse(cpu);
        ulong components = skipInitial ? mask & inUse : mask;
        int avxOffset = XsaveState.AvxOffset;
        int pkruOffset = compact ? XsaveState.AvxOffset + ((mask & XsaveState.Avx) != 0 ? 256 : 0) : SoftVcpu.PkruOffset;

        ulong header = 0;
        if (!Mem.ReadForWrite(cpu, linear + 512, (byte*)&header, 8))
        {
            return Status.Fault;
        }

        // MXCSR belongs to SSE and AVX together.
        bool legacyMxcsr = (components & XsaveState.Sse) != 0 || (mask & (XsaveState.Sse | XsaveState.Avx)) != 0;
        bool done = true;
        if ((components & XsaveState.X87) != 0)
        {
            done &= Mem.WriteBytes(cpu, linear, cpu->Xsave, 24);
            done = done && Mem.WriteBytes(cpu, linear + 32, cpu->Xsave + 32, 128);
        }

        if (done && legacyMxcsr && (!compact || (components & XsaveState.Sse) != 0))
        {
            uint* pair = stackalloc uint[2];
            pair[0] = cpu->Mxcsr;
            pair[1] = MxcsrMask;
            done = Mem.WriteBytes(cpu, linear + 24, (byte*)pair, 8);
        }

        int registers = cpu->Mode == ProcessorMode.Long ? 256 : 128;
        if (done && (components & XsaveState.Sse) != 0)
        {
            done = Mem.WriteBytes(cpu, linear + LegacyXmm, cpu->Xsave + LegacyXmm, registers);
        }

        if (done && (components & XsaveState.Avx) != 0)
        {
            done = Mem.WriteBytes(cpu, linear + (uint)avxOffset, cpu->Xsave + XsaveState.AvxOffset, registers);
        }

        if (done && (components & XsaveState.Pkru) != 0)
        {
            ulong value = cpu->Pkru;
            done = Mem.WriteBytes(cpu, linear + (uint)pkruOffset, (byte*)&value, 8);
        }

        if (!done)
        {
            return Status.Fault;
        }

        if (compact)
        {
            ulong* words = stackalloc ulong[8];
            new Span<ulong>(words, 8).Clear();
            words[0] = inUse & mask;
            words[1] = mask | (1UL << 63);
            return Mem.WriteBytes(cpu, linear + 512, (byte*)words, 16) ? Status.Next : Status.Fault;
        }

        header = (header & ~mask) | (inUse & mask);
        return Mem.WriteBytes(cpu, linear + 512, (byte*)&header, 8) ? Status.Next : Status.Fault;
    }

    public static Status Xrstor(CpuContext* cpu, Insn* insn)
    {
        if (!Prepare(cpu, insn, false, out ulong linear, out ulong mask))
        {
            return Status.Fault;
        }

        ulong* header = stackalloc ulong[8];
        byte* image = stackalloc byte[576];
        if (!Mem.ReadBytes(cpu, linear, image, 576))
        {
            return Status.Fault;
        }

        Buffer.MemoryCopy(image + 512, header, 64, 64);
        ulong present = header[0];
        bool compact = header[1] >> 63 != 0;
        ulong format = header[1] & ~(1UL << 63);
        bool bad;
        if (compact)
        {
            bad = (cpu->Features & CpuFeature.Xsavec) == 0 || (format & ~cpu->Xcr0) != 0 || (present & ~format) != 0;
        }
        else
        {
            bad = header[1] != 0 || (present & ~cpu->Xcr0) != 0;
        }

        for (int i = 2; i < 8; i++)
        {
            // Standard form checks bytes 23:8 only.
            bad |= (compact || i == 2) && header[i] != 0;
        }

        bool loadMxcsr = compact
            ? (mask & present & XsaveState.Sse) != 0
            : (mask & (XsaveState.Sse | XsaveState.Avx)) != 0;
        uint mxcsr = *(uint*)(image + 24);
        bad |= loadMxcsr && (mxcsr & ~MxcsrMask) != 0;
        if (bad)
        {
            return Faults.Gp(cpu);
        }

        int registers = cpu->Mode == ProcessorMode.Long ? 256 : 128;
        byte* upper = stackalloc byte[256];
        ulong pkru = 0;
        if ((mask & present & XsaveState.Avx) != 0 &&
            !Mem.ReadBytes(cpu, linear + XsaveState.AvxOffset, upper, registers))
        {
            return Status.Fault;
        }

        if ((mask & present & XsaveState.Pkru) != 0)
        {
            int offset = compact
                ? XsaveState.AvxOffset + ((format & XsaveState.Avx) != 0 ? 256 : 0)
                : SoftVcpu.PkruOffset;
            if (!Mem.ReadBytes(cpu, linear + (uint)offset, (byte*)&pkru, 8))
            {
                return Status.Fault;
            }
        }

        if ((mask & XsaveState.X87) != 0)
        {
            if ((present & XsaveState.X87) != 0)
            {
                Buffer.MemoryCopy(image, cpu->Xsave, 24, 24);
                Buffer.MemoryCopy(image + 32, cpu->Xsave + 32, 128, 128);
                FixX87(cpu);
            }
            else
            {
                XsaveState.InitialX87(cpu);
            }
        }

        if ((mask & XsaveState.Sse) != 0)
        {
            var into = new Span<byte>(cpu->Xsave + LegacyXmm, registers);
            if ((present & XsaveState.Sse) != 0)
            {
                new ReadOnlySpan<byte>(image + LegacyXmm, registers).CopyTo(into);
            }
            else
            {
                into.Clear();
            }
        }

        if (loadMxcsr)
        {
            cpu->Mxcsr = mxcsr;
        }
        else if (compact && (mask & XsaveState.Sse) != 0)
        {
            cpu->Mxcsr = 0x1F80;
        }

        if ((mask & XsaveState.Avx) != 0)
        {
            var into = new Span<byte>(cpu->Xsave + XsaveState.AvxOffset, registers);
            if ((present & XsaveState.Avx) != 0)
            {
                new ReadOnlySpan<byte>(upper, registers).CopyTo(into);
            }
            else
            {
                into.Clear();
            }
        }

        if ((mask & XsaveState.Pkru) != 0)
        {
            SystemGroup.SetPkru(cpu, (uint)pkru);
            return Insn.EndAndLook(cpu, insn);
        }

        return Status.Next;
    }
}

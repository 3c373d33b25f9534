// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;

namespace Vmm.X86;

// MMX registers are the significands of the x87 registers by physical number. The FXSAVE image lists x87 registers by
// stack position, and every MMX instruction sets TOP to 0, after which both orders agree: MMn is the slot of ST(n).
// Entering MMX therefore rotates the image by TOP once, marks all registers valid, and from then on costs nothing.
// Writing an MMX register sets its exponent and sign to ones (SDM 1 9.6.2); the thunk does that.

/// <summary>MMX instructions.</summary>
internal static unsafe class Mmx
{
    private const int TopMask = 0x3800;

    /// <summary>Chooses the handler.</summary>
    public static void Bind(Insn* insn, Thunk* thunk, bool usesXmm)
    {
        insn->Flags = usesXmm ? (byte)(insn->Flags | UsesXmmFlag) : insn->Flags;
        insn->Handler = thunk->MemoryOperand < 0 ? &Register : thunk->IsStore ? &Store : &Load;
    }

    /// <summary>Also needs CR4.OSFXSR (SDM 2A, CVTPI2PS and others). A bit that InsnFlags leaves free.</summary>
    private const byte UsesXmmFlag = 128;

    /// <summary>MMX state is usable and no x87 exception is pending; otherwise raises.</summary>
    public static bool Ready(CpuContext* cpu, Insn* insn, out Status status)
    {
        if ((cpu->Cr0 & (Cr0.Em | Cr0.Ts)) != 0)
        {
            status = (cpu->Cr0 & Cr0.Em) != 0 ? Faults.Ud(cpu) : Faults.Nm(cpu);
            return false;
        }

        return !X87.HasPending(cpu, insn, out status);
    }

    /// <summary>Makes the register file MMX: TOP 0, all registers valid.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Enter(CpuContext* cpu)
    {
        if ((cpu->Fsw & TopMask) != 0)
        {
            X87.RotateToTop(cpu, 0);
        }

        cpu->Ftw = 0xFF;
    }

    /// <summary>EMMS.</summary>
    public static Status Emms(CpuContext* cpu, Insn* insn)
    {
        if (!Ready(cpu, insn, out Status status))
        {
            return status;
        }

        Enter(cpu);
        cpu->Ftw = 0;
        return Status.Next;
    }

    private static Status Register(CpuContext* cpu, Insn* insn)
    {
        if (!Allowed(cpu, insn, out Status status))
        {
            return status;
        }

        // SAFETY: R0 and R1 are offsets of registers in the context.
        byte* c = (byte*)cpu;
        Enter(cpu);
        return Finish(cpu, insn, c + insn->R0, c + insn->R1);
    }

    private static Status Load(CpuContext* cpu, Insn* insn)
    {
        if (!Allowed(cpu, insn, out Status status))
        {
            return status;
        }

        // SAFETY: the binder put a thunk of the cache into Aux, which outlives all blocks; what it is given has the
        // bytes that its form reads or writes: registers of the context, or memory of MemoryBytes.
        var thunk = (Thunk*)insn->Aux;
        byte* memory = VectorUnit.ReadOperand(cpu, insn, thunk);
        if (memory == null)
        {
            return Status.Fault;
        }

        Enter(cpu);
        return Finish(cpu, insn, (byte*)cpu + insn->R0, memory);
    }

    private static Status Store(CpuContext* cpu, Insn* insn)
    {
        if (!Allowed(cpu, insn, out Status status))
        {
            return status;
        }

        // SAFETY: the binder put a thunk of the cache into Aux, which outlives all blocks; what it is given has the
        // bytes that its form reads or writes: registers of the context, or memory of MemoryBytes.
        var thunk = (Thunk*)insn->Aux;
        int size = thunk->MemoryBytes;
        if (!Mem.Address(cpu, insn, (uint)size, write: true, out ulong linear) ||
            !Mem.ProbeWrite(cpu, linear, size))
        {
            return Status.Fault;
        }

        Enter(cpu);
        byte* memory = VectorScratch.Of(cpu)->Memory;
        thunk->Fast(memory, (byte*)cpu + insn->R1, null, null, cpu);
        return Mem.WriteBytes(cpu, linear, memory, size) ? Status.Next : Status.Fault;
    }

    private static bool Allowed(CpuContext* cpu, Insn* insn, out Status status)
    {
        if ((insn->Flags & UsesXmmFlag) != 0 && !VectorUnit.SseReady(cpu))
        {
            status = VectorUnit.SseNotReady(cpu);
            return false;
        }

        return Ready(cpu, insn, out status);
    }

    // An instruction that ends in #XM has made the transition to MMX all the same, as on real processors.
    private static Status Finish(CpuContext* cpu, Insn* insn, void* p0, void* p1)
    {
        // SAFETY: the binder put a thunk of the cache into Aux, which outlives all blocks; what it is given has the
        // bytes that its form reads or writes: registers of the context, or memory of MemoryBytes.
        var thunk = (Thunk*)insn->Aux;
        if (thunk->Careful == null)
        {
            thunk->Fast(p0, p1, null, null, cpu);
            return Status.Next;
        }

        return VectorUnit.RunFloat(cpu, thunk, p0, p1, null, null);
    }
}

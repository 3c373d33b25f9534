// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;

namespace Vmm.X86;

// Jumps, calls, returns, software interrupts. Near branches: the record's Immediate is the target relative to BlockRip
// and AddressMask is what the new RIP is masked with (operand size). SegmentCheck in the flags asks for the CS limit.

/// <summary>Jcc.</summary>
internal static unsafe class Jcc<TCond>
    where TCond : struct, ICondition
{
    public static Status Run(CpuContext* cpu, Insn* insn)
    {
        if (!TCond.Test(cpu))
        {
            cpu->Rip = Insn.NextAddress(cpu, insn);
            return Status.NotTaken;
        }

        return ControlTransfer.Branch(cpu, insn);
    }
}

/// <summary>Near and far transfers.</summary>
internal static unsafe partial class ControlTransfer
{
    /// <summary>Terminator of blocks that end without a jump: its record's address is where to go on.</summary>
    public static Status EndOfBlock(CpuContext* cpu, Insn* insn)
    {
        cpu->Rip = Insn.Address(cpu, insn);
        cpu->InstructionCount--;
        return Status.NotTaken;
    }

    /// <summary>JMP rel, and a taken conditional branch.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Status Branch(CpuContext* cpu, Insn* insn)
    {
        ulong target = (cpu->BlockRip + insn->Immediate) & insn->AddressMask;
        if ((insn->Flags & InsnFlags.SegmentCheck) != 0 && target > CpuContext.Segment(cpu, Seg.Cs)->Limit)
        {
            return Faults.Gp(cpu);
        }

        cpu->Rip = target;
        return Status.Taken;
    }

    /// <summary>JMP rel.</summary>
    public static Status Jmp(CpuContext* cpu, Insn* insn) => Branch(cpu, insn);

    /// <summary>LOOP, LOOPE, LOOPNE: R0 is the counter's offset, OperandSize its size, R1 0/1/2 the condition.</summary>
    public static Status Loop(CpuContext* cpu, Insn* insn)
    {
        ulong count = (cpu->Rcx - 1) & Strings.Mask(insn);
        bool taken = count != 0;
        if (insn->R1 == 1)
        {
            taken &= Flags.Zero(cpu);
        }
        else if (insn->R1 == 2)
        {
            taken &= !Flags.Zero(cpu);
        }

        Status status;
        if (taken)
        {
            status = Branch(cpu, insn);
            if (status == Status.Fault)
            {
                return status;
            }
        }
        else
        {
            cpu->Rip = Insn.NextAddress(cpu, insn);
            status = Status.NotTaken;
        }

        Strings.Set(cpu, insn, Reg.Rcx, count);
        return status;
    }

    /// <summary>JCXZ, JECXZ, JRCXZ.</summary>
    public static Status Jcxz(CpuContext* cpu, Insn* insn)
    {
        if (Strings.Count(cpu, insn) == 0)
        {
            return Branch(cpu, insn);
        }

        cpu->Rip = Insn.NextAddress(cpu, insn);
        return Status.NotTaken;
    }

    /// <summary>Checks a computed near target; raises #GP(0).</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool CheckNear(CpuContext* cpu, ulong target)
    {
        bool ok = cpu->Mode == ProcessorMode.Long
            ? Paging.IsCanonical(cpu, target)
            : target <= CpuContext.Segment(cpu, Seg.Cs)->Limit;
        if (!ok)
        {
            Faults.Gp(cpu);
        }

        return ok;
    }

    /// <summary>PUSHA/POPA and friends are here because they are stack groups.</summary>
    public static Status Leave<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong offset = cpu->Rbp & cpu->StackMask;
        if (!Stack.Read<T>(cpu, offset, out ulong value))
        {
            return Status.Fault;
        }

        Stack.SetPointer(cpu, (offset + (uint)sizeof(T)) & cpu->StackMask);
        Reg.Set<T>(cpu, Reg.Rbp, value);
        return Status.Next;
    }
}

/// <summary>CALL rel: T is the operand size.</summary>
internal readonly unsafe struct CallRel : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong target = (cpu->BlockRip + insn->Immediate) & insn->AddressMask;
        if ((insn->Flags & InsnFlags.SegmentCheck) != 0 && target > CpuContext.Segment(cpu, Seg.Cs)->Limit)
        {
            return Faults.Gp(cpu);
        }

        if (!Stack.Push<T>(cpu, Insn.NextAddress(cpu, insn)))
        {
            return Status.Fault;
        }

        cpu->Rip = target;
        return Status.Taken;
    }
}

/// <summary>CALL r/m.</summary>
internal readonly unsafe struct CallIndirect : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Reg.LoadEither<T>(cpu, insn, insn->R0, out ulong target))
        {
            return Status.Fault;
        }

        if (!ControlTransfer.CheckNear(cpu, target))
        {
            // What pushing would raise comes first.
            FaultInfo fault = cpu->Fault;
            bool canPush = cpu->Mode != ProcessorMode.Long ||
                Mem.ProbeWrite(cpu, cpu->Rsp - (uint)sizeof(T), sizeof(T));
            cpu->Fault = canPush ? fault : cpu->Fault;
            return Status.Fault;
        }

        if (!Stack.Push<T>(cpu, Insn.NextAddress(cpu, insn)))
        {
            return Status.Fault;
        }

        cpu->Rip = target;
        return Status.Jump;
    }
}

/// <summary>JMP r/m.</summary>
internal readonly unsafe struct JmpIndirect : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Reg.LoadEither<T>(cpu, insn, insn->R0, out ulong target))
        {
            return Status.Fault;
        }

        if (!ControlTransfer.CheckNear(cpu, target))
        {
            return Status.Fault;
        }

        cpu->Rip = target;
        return Status.Jump;
    }
}

/// <summary>RET and RET imm16.</summary>
internal readonly unsafe struct RetNear : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Stack.Peek<T>(cpu, 0, out ulong target) || !ControlTransfer.CheckNear(cpu, target))
        {
            return Status.Fault;
        }

        Stack.Drop(cpu, (uint)sizeof(T) + insn->Immediate);
        cpu->Rip = target;
        return Status.Jump;
    }
}

/// <summary>PUSH: the register is in R0.</summary>
internal readonly unsafe struct PushForm<TSource> : IForm
    where TSource : struct, ISource
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged =>
        TSource.Get<T>(cpu, insn, out ulong value) && Stack.Push<T>(cpu, value) ? Status.Next : Status.Fault;
}

internal readonly unsafe struct PopR : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Stack.Peek<T>(cpu, 0, out ulong value))
        {
            return Status.Fault;
        }

        // POP RSP: the popped value wins over the increment.
        Stack.Drop(cpu, (uint)sizeof(T));
        Reg.Set<T>(cpu, insn->R0, value);
        return Status.Next;
    }
}

/// <summary>POP mem: an RSP base is used after the increment.</summary>
internal readonly unsafe struct PopM : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Stack.Peek<T>(cpu, 0, out ulong value))
        {
            return Status.Fault;
        }

        ulong rsp = cpu->Rsp;
        Stack.Drop(cpu, (uint)sizeof(T));
        if (!Reg.StoreOperand<T>(cpu, insn, value))
        {
            cpu->Rsp = rsp;
            return Status.Fault;
        }

        return Status.Next;
    }
}

/// <summary>PUSH of a segment register (index in R0).</summary>
internal readonly unsafe struct PushSeg : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        // Zero-extended, as AMD's processors do; Intel's write the low word of a doubleword only (SDM 2B, PUSH).
        ulong selector = CpuContext.Segment(cpu, insn->R0)->Selector;
        return Stack.Push<T>(cpu, selector) ? Status.Next : Status.Fault;
    }
}

/// <summary>POP of a segment register.</summary>
internal readonly unsafe struct PopSeg : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Stack.Peek<ushort>(cpu, 0, out ulong selector) ||
            !Segmentation.Load(cpu, insn->R0, (uint)selector))
        {
            return Status.Fault;
        }

        // The size of the old stack segment counts.
        Stack.Drop(cpu, (uint)sizeof(T));
        if (insn->R0 == Seg.Ss)
        {
            cpu->Shadow = 2;
        }

        Modes.Update(cpu);
        return Insn.EndAndLook(cpu, insn);
    }
}

internal readonly unsafe struct PushA : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong rsp = cpu->Rsp;
        for (int i = 0; i < 8; i++)
        {
            ulong value = i == 4 ? rsp : cpu->Gpr[i];
            ulong offset = (rsp - ((uint)(i + 1) * (uint)sizeof(T))) & cpu->StackMask;
            if (!Stack.Write<T>(cpu, offset, value))
            {
                return Status.Fault;
            }
        }

        Stack.SetPointer(cpu, (rsp - (8 * (uint)sizeof(T))) & cpu->StackMask);
        return Status.Next;
    }
}

internal readonly unsafe struct PopA : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong* values = stackalloc ulong[8];

        // In the order of addresses, which decides what a page fault reports.
        for (int i = 7; i >= 0; i--)
        {
            if (!Stack.Peek<T>(cpu, (uint)(7 - i) * (uint)sizeof(T), out values[i]))
            {
                return Status.Fault;
            }
        }

        Stack.Drop(cpu, 8 * (uint)sizeof(T));
        for (int i = 0; i < 8; i++)
        {
            if (i != 4)
            {
                Reg.Set<T>(cpu, i * 8, values[i]);
            }
        }

        return Status.Next;
    }
}

/// <summary>ENTER: size in Immediate, nesting level in Aux.</summary>
internal readonly unsafe struct EnterForm : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        int level = (int)(ulong)insn->Aux & 31;
        var size = (uint)sizeof(T);
        ulong sp = (cpu->Rsp - size) & cpu->StackMask;
        if (!Stack.Write<T>(cpu, sp, Reg.Get<T>(cpu, Reg.Rbp)))
        {
            return Status.Fault;
        }

        ulong frame = sp;
        ulong rbp = cpu->Rbp;
        if (level > 0)
        {
            for (int i = 1; i < level; i++)
            {
                rbp = (rbp & ~cpu->StackMask) | ((rbp - size) & cpu->StackMask);
                sp = (sp - size) & cpu->StackMask;
                if (!Stack.Read<T>(cpu, rbp & cpu->StackMask, out ulong link) || !Stack.Write<T>(cpu, sp, link))
                {
                    return Status.Fault;
                }
            }

            sp = (sp - size) & cpu->StackMask;
            if (!Stack.Write<T>(cpu, sp, (cpu->Rsp & ~cpu->StackMask) | frame))
            {
                return Status.Fault;
            }
        }

        sp = (sp - insn->Immediate) & cpu->StackMask;

        // The new top must be writable (SDM 2A, ENTER).
        if (!Segmentation.StackLinear(cpu, sp, size, true, out ulong linear) ||
            !Mem.ProbeWrite(cpu, linear, sizeof(T)))
        {
            return Status.Fault;
        }

        Reg.Set<T>(cpu, Reg.Rbp, (cpu->Rsp & ~cpu->StackMask) | frame);
        Stack.SetPointer(cpu, sp);
        return Status.Next;
    }
}

internal readonly unsafe struct LeaveForm : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged => ControlTransfer.Leave<T>(cpu, insn);
}

/// <summary>BOUND.</summary>
internal readonly unsafe struct BoundForm : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Mem.Address(cpu, insn, 2 * (uint)sizeof(T), false, out ulong linear) ||
            !Mem.Read(cpu, linear, out T low) || !Mem.Read(cpu, linear + (uint)sizeof(T), out T high))
        {
            return Status.Fault;
        }

        var index = (long)Flags.SignExtend<T>(Reg.Get<T>(cpu, insn->R0));
        var lower = (long)Flags.SignExtend<T>(Reg.Load<T>((byte*)&low));
        var upper = (long)Flags.SignExtend<T>(Reg.Load<T>((byte*)&high));
        return index < lower || index > upper ? Faults.Raise(cpu, Vector.BoundRange) : Status.Next;
    }
}

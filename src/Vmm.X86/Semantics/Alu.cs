// SPDX-License-Identifier: BSD-2-Clause

namespace Vmm.X86;

// ALU operations (IBinary) and the operand forms that they combine with.

internal readonly unsafe struct OpAdd : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => left + right;

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged => Flags.Add<T>(cpu, left, right, result);
}

internal readonly unsafe struct OpAdc : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => left + right + Flags.CarryBit(cpu);

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged => Flags.Add<T>(cpu, left, right, result);
}

internal readonly unsafe struct OpSub : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => left - right;

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged => Flags.Sub<T>(cpu, left, right, result);
}

internal readonly unsafe struct OpSbb : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => left - right - Flags.CarryBit(cpu);

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged => Flags.Sub<T>(cpu, left, right, result);
}

internal readonly unsafe struct OpAnd : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => left & right;

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged => Flags.Logic<T>(cpu, result);
}

internal readonly unsafe struct OpOr : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => left | right;

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged => Flags.Logic<T>(cpu, result);
}

internal readonly unsafe struct OpXor : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => left ^ right;

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged => Flags.Logic<T>(cpu, result);
}

internal readonly unsafe struct OpInc : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => left + 1;

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged
    {
        ulong carry = cpu->FlagCarry;
        Flags.Add<T>(cpu, left, 1, result);
        Flags.KeepCarry(cpu, carry);
    }
}

internal readonly unsafe struct OpDec : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => left - 1;

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged
    {
        ulong carry = cpu->FlagCarry;
        Flags.Sub<T>(cpu, left, 1, result);
        Flags.KeepCarry(cpu, carry);
    }
}

internal readonly unsafe struct OpNeg : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => 0 - left;

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged => Flags.Sub<T>(cpu, 0, left, result);
}

internal readonly unsafe struct OpNot : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => ~left;

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged
    {
    }
}

// Shifts and rotates: the right operand is the count, unmasked. Overflow for counts above 1 is undefined; the formulas
// are those of count 1, as processors do it.
internal readonly unsafe struct OpShl : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged
    {
        int count = Shift.Count<T>(right);
        return left << count;
    }

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged
    {
        int count = Shift.Count<T>(right);
        if (count == 0)
        {
            return;
        }

        int bits = 8 * sizeof(T);
        bool carry = count <= bits && ((left >> (bits - count)) & 1) != 0;
        Flags.Result<T>(cpu, result, carry, count == 1 && carry != Shift.Top<T>(result));
    }
}

internal readonly unsafe struct OpShr : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => left >> Shift.Count<T>(right);

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged
    {
        int count = Shift.Count<T>(right);
        if (count == 0)
        {
            return;
        }

        bool carry = ((left >> (count - 1)) & 1) != 0;
        Flags.Result<T>(cpu, result, carry, count == 1 && Shift.Top<T>(left));
    }
}

internal readonly unsafe struct OpSar : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => (ulong)((long)Flags.SignExtend<T>(left) >> Shift.Count<T>(right));

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged
    {
        int count = Shift.Count<T>(right);
        if (count == 0)
        {
            return;
        }

        bool carry = (((long)Flags.SignExtend<T>(left) >> (count - 1)) & 1) != 0;
        Flags.Result<T>(cpu, result, carry, false);
    }
}

internal readonly unsafe struct OpRol : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged
    {
        int bits = 8 * sizeof(T);
        int count = Shift.Count<T>(right) & (bits - 1);
        return count == 0 ? left : (left << count) | (left >> (bits - count));
    }

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged
    {
        int count = Shift.Count<T>(right);
        if (count != 0)
        {
            bool carry = (result & 1) != 0;
            Flags.SetCarryOverflow(cpu, carry, count == 1 && carry != Shift.Top<T>(result));
        }
    }
}

internal readonly unsafe struct OpRor : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged
    {
        int bits = 8 * sizeof(T);
        int count = Shift.Count<T>(right) & (bits - 1);
        return count == 0 ? left : (left >> count) | (left << (bits - count));
    }

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged
    {
        int count = Shift.Count<T>(right);
        if (count != 0)
        {
            bool carry = Shift.Top<T>(result);
            Flags.SetCarryOverflow(cpu, carry, count == 1 && carry != Shift.Top<T>(result << 1));
        }
    }
}

internal readonly unsafe struct OpRcl : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged
    {
        int bits = 8 * sizeof(T);
        int count = Shift.Count<T>(right) % (bits + 1);
        if (count == 0)
        {
            return left;
        }

        ulong carry = Flags.CarryBit(cpu) << (count - 1);
        ulong high = count == 64 ? 0 : left << count;
        ulong low = count == 1 ? 0 : left >> (bits + 1 - count);
        return high | carry | low;
    }

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged
    {
        int bits = 8 * sizeof(T);
        int rounds = Shift.Count<T>(right);
        int count = rounds % (bits + 1);
        if (rounds != 0)
        {
            bool carry = count == 0 ? Flags.Carry(cpu) : ((left >> (bits - count)) & 1) != 0;
            Flags.SetCarryOverflow(cpu, carry, rounds == 1 && carry != Shift.Top<T>(result));
        }
    }
}

internal readonly unsafe struct OpRcr : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged
    {
        int bits = 8 * sizeof(T);
        int count = Shift.Count<T>(right) % (bits + 1);
        if (count == 0)
        {
            return left;
        }

        ulong carry = Flags.CarryBit(cpu) << (bits - count);
        ulong low = count == 64 ? 0 : left >> count;
        ulong high = count == 1 ? 0 : left << (bits + 1 - count);
        return high | carry | low;
    }

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged
    {
        int bits = 8 * sizeof(T);
        int rounds = Shift.Count<T>(right);
        int count = rounds % (bits + 1);
        if (rounds != 0)
        {
            bool carry = count == 0 ? Flags.Carry(cpu) : ((left >> (count - 1)) & 1) != 0;
            Flags.SetCarryOverflow(cpu, carry, rounds == 1 && Shift.Top<T>(result) != Shift.Top<T>(result << 1));
        }
    }
}

// Bit operations on a bit number that is already reduced to the operand.
internal readonly unsafe struct OpBts : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => left | (1UL << (int)right);

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged => Flags.SetCarry(cpu, ((left >> (int)right) & 1) != 0);
}

internal readonly unsafe struct OpBtr : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => left & ~(1UL << (int)right);

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged => Flags.SetCarry(cpu, ((left >> (int)right) & 1) != 0);
}

internal readonly unsafe struct OpBtc : IBinary
{
    public static ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged => left ^ (1UL << (int)right);

    public static void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged => Flags.SetCarry(cpu, ((left >> (int)right) & 1) != 0);
}

internal static unsafe class Shift
{
    public static int Count<T>(ulong right)
        where T : unmanaged => (int)right & (sizeof(T) == 8 ? 63 : 31);

    public static bool Top<T>(ulong value)
        where T : unmanaged => ((value >> ((8 * sizeof(T)) - 1)) & 1) != 0;
}

/// <summary>reg op= source.</summary>
internal readonly unsafe struct AluR<TOp, TSource> : IForm
    where TOp : struct, IBinary
    where TSource : struct, ISource
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!TSource.Get<T>(cpu, insn, out ulong right))
        {
            return Status.Fault;
        }

        ulong left = Reg.Get<T>(cpu, insn->R0);
        ulong result = Reg.Truncate<T>(TOp.Compute<T>(cpu, left, right));
        Reg.Set<T>(cpu, insn->R0, result);
        TOp.SetFlags<T>(cpu, left, right, result);
        return Status.Next;
    }
}

/// <summary>mem op= reg or immediate (unary operations and shifts by CL included: R1 is the register).</summary>
internal readonly unsafe struct AluM<TOp, TSource> : IForm
    where TOp : struct, IBinary
    where TSource : struct, ISource
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        return Mem.Address(cpu, insn, (uint)sizeof(T), true, out ulong linear) &&
            TSource.Get<T>(cpu, insn, out ulong right)
            ? Modify.Plain<TOp, T>(cpu, linear, right)
            : Status.Fault;
    }
}

/// <summary>lock mem op= reg or immediate.</summary>
internal readonly unsafe struct LockM<TOp, TSource> : IForm
    where TOp : struct, IBinary
    where TSource : struct, ISource
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        return Mem.Address(cpu, insn, (uint)sizeof(T), true, out ulong linear) &&
            TSource.Get<T>(cpu, insn, out ulong right)
            ? Modify.Locked<TOp, T>(cpu, linear, right)
            : Status.Fault;
    }
}

/// <summary>Flags of left op right (CMP, TEST).</summary>
internal readonly unsafe struct CompareForm<TOp, TLeft, TRight> : IForm
    where TOp : struct, IBinary
    where TLeft : struct, ISource
    where TRight : struct, ISource
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!TLeft.Get<T>(cpu, insn, out ulong left) || !TRight.Get<T>(cpu, insn, out ulong right))
        {
            return Status.Fault;
        }

        TOp.SetFlags<T>(cpu, left, right, Reg.Truncate<T>(TOp.Compute<T>(cpu, left, right)));
        return Status.Next;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Numerics;

namespace Vmm.X86;

// Data movement, multiplication, division, bit fields and the rest of the general instruction set.

/// <summary>reg = source.</summary>
internal readonly unsafe struct MovR<TSource> : IForm
    where TSource : struct, ISource
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!TSource.Get<T>(cpu, insn, out ulong value))
        {
            return Status.Fault;
        }

        Reg.Set<T>(cpu, insn->R0, value);
        return Status.Next;
    }
}

/// <summary>mem = reg or immediate.</summary>
internal readonly unsafe struct MovM<TSource> : IForm
    where TSource : struct, ISource
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged =>
        TSource.Get<T>(cpu, insn, out ulong value) && Reg.StoreOperand<T>(cpu, insn, value)
            ? Status.Next
            : Status.Fault;
}

internal readonly unsafe struct LeaForm : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        Reg.Set<T>(cpu, insn->R0, Mem.Offset(cpu, insn));
        return Status.Next;
    }
}

/// <summary>MOVZX/MOVSX/MOVSXD: T is the destination; the source's type is an argument.</summary>
internal readonly unsafe struct ExtendForm<TFrom, TSigned, TSource> : IForm
    where TFrom : unmanaged
    where TSigned : struct
    where TSource : struct, ISource
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!TSource.Get<TFrom>(cpu, insn, out ulong value))
        {
            return Status.Fault;
        }

        Reg.Set<T>(cpu, insn->R0, typeof(TSigned) == typeof(SignedTag) ? Flags.SignExtend<TFrom>(value) : value);
        return Status.Next;
    }
}

internal readonly struct SignedTag;

internal readonly struct UnsignedTag;

internal readonly unsafe struct CmovR<TCond> : IForm
    where TCond : struct, ICondition
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        // A 32-bit destination loses its upper half either way.
        int from = TCond.Test(cpu) ? insn->R1 : insn->R0;
        Reg.Set<T>(cpu, insn->R0, Reg.Get<T>(cpu, from));
        return Status.Next;
    }
}

internal readonly unsafe struct CmovM<TCond> : IForm
    where TCond : struct, ICondition
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Reg.LoadOperand<T>(cpu, insn, out ulong value))
        {
            return Status.Fault;
        }

        Reg.Set<T>(cpu, insn->R0, TCond.Test(cpu) ? value : Reg.Get<T>(cpu, insn->R0));
        return Status.Next;
    }
}

internal readonly unsafe struct XchgRR : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong left = Reg.Get<T>(cpu, insn->R0);
        ulong right = Reg.Get<T>(cpu, insn->R1);
        Reg.Set<T>(cpu, insn->R0, right);
        Reg.Set<T>(cpu, insn->R1, left);
        return Status.Next;
    }
}

/// <summary>XCHG with memory is always locked. The register is R1.</summary>
internal readonly unsafe struct XchgMR : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Mem.Address(cpu, insn, (uint)sizeof(T), true, out ulong linear))
        {
            return Status.Fault;
        }

        ulong value = Reg.Get<T>(cpu, insn->R1);
        byte* pointer = Mem.AtomicPointer(cpu, linear, (uint)sizeof(T), out bool fault);
        if (pointer != null)
        {
            Reg.Set<T>(cpu, insn->R1, Reg.Exchange<T>(pointer, value));
            return Status.Next;
        }

        if (fault)
        {
            return Status.Fault;
        }

        Mem.LockSplit(cpu);
        ulong old = 0;
        bool done = Mem.ReadForWrite(cpu, linear, (byte*)&old, sizeof(T)) &&
            Mem.WriteBytes(cpu, linear, (byte*)&value, sizeof(T));
        Mem.UnlockSplit(cpu);
        if (!done)
        {
            return Status.Fault;
        }

        Reg.Set<T>(cpu, insn->R1, old);
        return Status.Next;
    }
}

internal readonly unsafe struct XaddRR : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong left = Reg.Get<T>(cpu, insn->R0);
        ulong right = Reg.Get<T>(cpu, insn->R1);
        ulong result = Reg.Truncate<T>(left + right);
        Reg.Set<T>(cpu, insn->R1, left);
        Reg.Set<T>(cpu, insn->R0, result);
        Flags.Add<T>(cpu, left, right, result);
        return Status.Next;
    }
}

/// <summary>XADD mem, reg, with or without LOCK: the host's atomic serves both.</summary>
internal readonly unsafe struct XaddMR : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Mem.Address(cpu, insn, (uint)sizeof(T), true, out ulong linear))
        {
            return Status.Fault;
        }

        if (Modify.Locked<OpAdd, T>(cpu, linear, Reg.Get<T>(cpu, insn->R1), out ulong left) == Status.Fault)
        {
            return Status.Fault;
        }

        Reg.Set<T>(cpu, insn->R1, left);
        return Status.Next;
    }
}

internal readonly unsafe struct CmpxchgRR : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong left = Reg.Get<T>(cpu, insn->R0);
        ulong accumulator = Reg.Get<T>(cpu, Reg.Rax);
        ulong source = Reg.Get<T>(cpu, insn->R1);
        if (left == accumulator)
        {
            Reg.Set<T>(cpu, insn->R0, source);
        }
        else
        {
            Reg.Set<T>(cpu, Reg.Rax, left);
        }

        Flags.Sub<T>(cpu, accumulator, left, Reg.Truncate<T>(accumulator - left));
        return Status.Next;
    }
}

/// <summary>CMPXCHG mem, reg, with or without LOCK.</summary>
internal readonly unsafe struct CmpxchgMR : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong accumulator = Reg.Get<T>(cpu, Reg.Rax);
        if (!Mem.Address(cpu, insn, (uint)sizeof(T), true, out ulong linear) ||
            !Exchange.Compare<T>(cpu, linear, Reg.Get<T>(cpu, insn->R1), accumulator, out ulong left))
        {
            return Status.Fault;
        }

        if (left != accumulator)
        {
            Reg.Set<T>(cpu, Reg.Rax, left);
        }

        Flags.Sub<T>(cpu, accumulator, left, Reg.Truncate<T>(accumulator - left));
        return Status.Next;
    }
}

/// <summary>BT reg, reg/imm: bit number in Immediate when R1 is the zero quadword.</summary>
internal readonly unsafe struct BtRR : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        int bit = (int)(Reg.Get<T>(cpu, insn->R1) | insn->Immediate) & ((8 * sizeof(T)) - 1);
        Flags.SetCarry(cpu, ((Reg.Get<T>(cpu, insn->R0) >> bit) & 1) != 0);
        return Status.Next;
    }
}

internal readonly unsafe struct BtxRR<TOp> : IForm
    where TOp : struct, IBinary
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong bit = (Reg.Get<T>(cpu, insn->R1) | insn->Immediate) & ((8UL * (uint)sizeof(T)) - 1);
        ulong left = Reg.Get<T>(cpu, insn->R0);
        Reg.Set<T>(cpu, insn->R0, TOp.Compute<T>(cpu, left, bit));
        TOp.SetFlags<T>(cpu, left, bit, 0);
        return Status.Next;
    }
}

/// <summary>Bit-string addressing: a register bit number reaches beyond the operand.</summary>
internal static unsafe class BitString
{
    public static bool Address<T>(CpuContext* cpu, Insn* insn, bool write, out ulong linear, out ulong bit)
        where T : unmanaged
    {
        bit = insn->Immediate & ((8UL * (uint)sizeof(T)) - 1);
        ulong offset = Mem.Offset(cpu, insn);
        if (insn->R1 != CpuContext.ZeroOffset)
        {
            long number = (long)Flags.SignExtend<T>(Reg.Get<T>(cpu, insn->R1));
            bit = (ulong)number & ((8UL * (uint)sizeof(T)) - 1);
            int shift = sizeof(T) == 2 ? 4 : sizeof(T) == 4 ? 5 : 6;
            offset = (offset + ((ulong)(number >> shift) * (uint)sizeof(T))) & insn->AddressMask;
        }

        if ((insn->Flags & InsnFlags.SegmentCheck) == 0)
        {
            // SAFETY: the binder sets SegmentBase to a base of the context's segment registers or to its zero word.
            linear = offset + *(ulong*)((byte*)cpu + insn->SegmentBase);
            return true;
        }

        return Segmentation.Linear(cpu, insn->Segment, offset, (uint)sizeof(T), write, out linear);
    }
}

internal readonly unsafe struct BtM : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!BitString.Address<T>(cpu, insn, false, out ulong linear, out ulong bit) ||
            !Mem.Read(cpu, linear, out T raw))
        {
            return Status.Fault;
        }

        Flags.SetCarry(cpu, ((Reg.Load<T>((byte*)&raw) >> (int)bit) & 1) != 0);
        return Status.Next;
    }
}

internal readonly unsafe struct BtxM<TOp> : IForm
    where TOp : struct, IBinary
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!BitString.Address<T>(cpu, insn, true, out ulong linear, out ulong bit))
        {
            return Status.Fault;
        }

        return (insn->Flags & InsnFlags.Lock) != 0
            ? Modify.Locked<TOp, T>(cpu, linear, bit)
            : Modify.Plain<TOp, T>(cpu, linear, bit);
    }
}

/// <summary>Bit scans and counts of reg or mem: the operation is a type.</summary>
internal unsafe interface IScan
{
    static abstract void Run<T>(CpuContext* cpu, int destination, ulong source)
        where T : unmanaged;
}

internal readonly unsafe struct Scan<TOp, TSource> : IForm
    where TOp : struct, IScan
    where TSource : struct, ISource
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!TSource.Get<T>(cpu, insn, out ulong value))
        {
            return Status.Fault;
        }

        TOp.Run<T>(cpu, insn->R0, value);
        return Status.Next;
    }
}

internal readonly unsafe struct ScanBsf : IScan
{
    public static void Run<T>(CpuContext* cpu, int destination, ulong source)
        where T : unmanaged
    {
        Flags.SetArithmetic(cpu, source == 0 ? Rflags.Zf : 0);
        if (source != 0)
        {
            Reg.Set<T>(cpu, destination, (ulong)BitOperations.TrailingZeroCount(source));
        }
    }
}

internal readonly unsafe struct ScanBsr : IScan
{
    public static void Run<T>(CpuContext* cpu, int destination, ulong source)
        where T : unmanaged
    {
        Flags.SetArithmetic(cpu, source == 0 ? Rflags.Zf : 0);
        if (source != 0)
        {
            Reg.Set<T>(cpu, destination, (ulong)BitOperations.Log2(source));
        }
    }
}

internal readonly unsafe struct ScanTzcnt : IScan
{
    public static void Run<T>(CpuContext* cpu, int destination, ulong source)
        where T : unmanaged
    {
        ulong count = source == 0 ? 8UL * (uint)sizeof(T) : (ulong)BitOperations.TrailingZeroCount(source);
        Reg.Set<T>(cpu, destination, count);
        Flags.SetArithmetic(cpu, (source == 0 ? Rflags.Cf : 0) | (count == 0 ? Rflags.Zf : 0));
    }
}

internal readonly unsafe struct ScanLzcnt : IScan
{
    public static void Run<T>(CpuContext* cpu, int destination, ulong source)
        where T : unmanaged
    {
        ulong count = (ulong)BitOperations.LeadingZeroCount(source) - (64 - (8UL * (uint)sizeof(T)));
        Reg.Set<T>(cpu, destination, count);
        Flags.SetArithmetic(cpu, (source == 0 ? Rflags.Cf : 0) | (count == 0 ? Rflags.Zf : 0));
    }
}

internal readonly unsafe struct ScanPopcnt : IScan
{
    public static void Run<T>(CpuContext* cpu, int destination, ulong source)
        where T : unmanaged
    {
        ulong count = (ulong)BitOperations.PopCount(source);
        Reg.Set<T>(cpu, destination, count);
        Flags.SetArithmetic(cpu, source == 0 ? Rflags.Zf : 0);
    }
}

/// <summary>BLSI, BLSR, BLSMSK: the destination is the VEX operand, R0.</summary>
internal readonly unsafe struct ScanBlsi : IScan
{
    public static void Run<T>(CpuContext* cpu, int destination, ulong source)
        where T : unmanaged
    {
        ulong result = source & (0 - source);
        Reg.Set<T>(cpu, destination, result);
        Flags.Result<T>(cpu, Reg.Truncate<T>(result), source != 0, false);
        Flags.ClearParity(cpu);
    }
}

internal readonly unsafe struct ScanBlsr : IScan
{
    public static void Run<T>(CpuContext* cpu, int destination, ulong source)
        where T : unmanaged
    {
        ulong result = source & (source - 1);
        Reg.Set<T>(cpu, destination, result);
        Flags.Result<T>(cpu, Reg.Truncate<T>(result), source == 0, false);
        Flags.ClearParity(cpu);
    }
}

internal readonly unsafe struct ScanBlsmsk : IScan
{
    public static void Run<T>(CpuContext* cpu, int destination, ulong source)
        where T : unmanaged
    {
        ulong result = Reg.Truncate<T>(source ^ (source - 1));
        Reg.Set<T>(cpu, destination, result);
        Flags.Result<T>(cpu, result, source == 0, false);
        Flags.ClearParity(cpu);
    }
}

/// <summary>One-operand MUL and IMUL.</summary>
internal static unsafe class Multiply
{
    public static void Unsigned<T>(CpuContext* cpu, ulong right)
        where T : unmanaged
    {
        ulong left = Reg.Get<T>(cpu, Reg.Rax);
        ulong low;
        ulong high;
        if (sizeof(T) == 8)
        {
            high = Math.BigMul(left, right, out low);
        }
        else
        {
            ulong product = left * right;
            low = Reg.Truncate<T>(product);
            high = product >> (8 * sizeof(T));
        }

        Store<T>(cpu, low, high);
        Flags.Product(cpu, high != 0);
    }

    public static void Signed<T>(CpuContext* cpu, ulong right)
        where T : unmanaged
    {
        long left = (long)Flags.SignExtend<T>(Reg.Get<T>(cpu, Reg.Rax));
        long other = (long)Flags.SignExtend<T>(right);
        ulong low;
        ulong high;
        bool overflow;
        if (sizeof(T) == 8)
        {
            high = (ulong)Math.BigMul(left, other, out long lowSigned);
            low = (ulong)lowSigned;
            overflow = (long)high != lowSigned >> 63;
        }
        else
        {
            long product = left * other;
            low = Reg.Truncate<T>((ulong)product);
            high = (ulong)(product >> (8 * sizeof(T)));
            overflow = (long)Flags.SignExtend<T>(low) != product;
        }

        Store<T>(cpu, low, high);
        Flags.Product(cpu, overflow);
    }

    /// <summary>Two- and three-operand IMUL.</summary>
    public static ulong Truncated<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged
    {
        long a = (long)Flags.SignExtend<T>(left);
        long b = (long)Flags.SignExtend<T>(right);
        ulong low;
        bool overflow;
        if (sizeof(T) == 8)
        {
            long high = Math.BigMul(a, b, out long lowSigned);
            low = (ulong)lowSigned;
            overflow = high != lowSigned >> 63;
        }
        else
        {
            long product = a * b;
            low = Reg.Truncate<T>((ulong)product);
            overflow = (long)Flags.SignExtend<T>(low) != product;
        }

        Flags.Product(cpu, overflow);
        return low;
    }

    private static void Store<T>(CpuContext* cpu, ulong low, ulong high)
        where T : unmanaged
    {
        if (sizeof(T) == 1)
        {
            Reg.Set<ushort>(cpu, Reg.Rax, low | (high << 8));
            return;
        }

        Reg.Set<T>(cpu, Reg.Rax, low);
        Reg.Set<T>(cpu, Reg.Rdx, high);
    }
}

/// <summary>MUL, IMUL, DIV and IDIV of the accumulator by an operand.</summary>
internal unsafe interface IAccumulate
{
    static abstract Status Run<T>(CpuContext* cpu, ulong right)
        where T : unmanaged;
}

internal readonly unsafe struct Accumulate<TOp, TSource> : IForm
    where TOp : struct, IAccumulate
    where TSource : struct, ISource
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged =>
        TSource.Get<T>(cpu, insn, out ulong right) ? TOp.Run<T>(cpu, right) : Status.Fault;
}

internal readonly unsafe struct OpMul : IAccumulate
{
    public static Status Run<T>(CpuContext* cpu, ulong right)
        where T : unmanaged
    {
        Multiply.Unsigned<T>(cpu, right);
        return Status.Next;
    }
}

internal readonly unsafe struct OpImul : IAccumulate
{
    public static Status Run<T>(CpuContext* cpu, ulong right)
        where T : unmanaged
    {
        Multiply.Signed<T>(cpu, right);
        return Status.Next;
    }
}

/// <summary>IMUL with two or three operands.</summary>
internal readonly unsafe struct ImulInto<TLeft, TRight> : IForm
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

        Reg.Set<T>(cpu, insn->R0, Multiply.Truncated<T>(cpu, left, right));
        return Status.Next;
    }
}

/// <summary>DIV and IDIV.</summary>
internal static unsafe class Divide
{
    public static Status Unsigned<T>(CpuContext* cpu, ulong divisor)
        where T : unmanaged
    {
        if (divisor == 0)
        {
            return Faults.De(cpu);
        }

        ulong quotient;
        ulong remainder;
        if (sizeof(T) == 8)
        {
            if (cpu->Rdx == 0)
            {
                (quotient, remainder) = Math.DivRem(cpu->Rax, divisor);
            }
            else
            {
                if (cpu->Rdx >= divisor)
                {
                    return Faults.De(cpu);
                }

                var dividend = new UInt128(cpu->Rdx, cpu->Rax);
                UInt128 wide = dividend / divisor;
                quotient = (ulong)wide;
                remainder = cpu->Rax - (quotient * divisor);
            }
        }
        else
        {
            ulong dividend = sizeof(T) == 1
                ? Reg.Get<ushort>(cpu, Reg.Rax)
                : Reg.Get<T>(cpu, Reg.Rax) | (Reg.Get<T>(cpu, Reg.Rdx) << (8 * sizeof(T)));
            (quotient, remainder) = Math.DivRem(dividend, divisor);
            if (quotient != Reg.Truncate<T>(quotient))
            {
                return Faults.De(cpu);
            }
        }

        Store<T>(cpu, quotient, remainder);
        return Status.Next;
    }

    public static Status Signed<T>(CpuContext* cpu, ulong divisorBits)
        where T : unmanaged
    {
        long divisor = (long)Flags.SignExtend<T>(divisorBits);
        if (divisor == 0)
        {
            return Faults.De(cpu);
        }

        long quotient;
        long remainder;
        if (sizeof(T) == 8)
        {
            var dividend = (Int128)new UInt128(cpu->Rdx, cpu->Rax);
            if ((long)cpu->Rdx == (long)cpu->Rax >> 63 && divisor != -1)
            {
                (quotient, remainder) = Math.DivRem((long)cpu->Rax, divisor);
            }
            else
            {
                bool negative = Int128.IsNegative(dividend) != (divisor < 0);
                UInt128 magnitude = Int128.IsNegative(dividend) ? (UInt128)(-dividend) : (UInt128)dividend;
                ulong by = divisor < 0 ? 0UL - (ulong)divisor : (ulong)divisor;
                if ((ulong)(magnitude >> 64) >= by)
                {
                    return Faults.De(cpu);
                }

                var unsigned = (ulong)(magnitude / by);
                if (negative ? unsigned > 1UL << 63 : unsigned >= 1UL << 63)
                {
                    return Faults.De(cpu);
                }

                quotient = negative ? (long)(0 - unsigned) : (long)unsigned;
                remainder = (long)(cpu->Rax - (ulong)(quotient * divisor));
            }
        }
        else
        {
            long dividend = sizeof(T) == 1
                ? (short)Reg.Get<ushort>(cpu, Reg.Rax)
                : sizeof(T) == 2
                    ? (int)(Reg.Get<T>(cpu, Reg.Rax) | (Reg.Get<T>(cpu, Reg.Rdx) << 16))
                    : (long)(Reg.Get<T>(cpu, Reg.Rax) | (Reg.Get<T>(cpu, Reg.Rdx) << 32));
            if (divisor == -1 && dividend == long.MinValue)
            {
                return Faults.De(cpu);
            }

            (quotient, remainder) = Math.DivRem(dividend, divisor);
            if ((long)Flags.SignExtend<T>((ulong)quotient) != quotient)
            {
                return Faults.De(cpu);
            }
        }

        Store<T>(cpu, (ulong)quotient, (ulong)remainder);
        return Status.Next;
    }

    private static void Store<T>(CpuContext* cpu, ulong quotient, ulong remainder)
        where T : unmanaged
    {
        if (sizeof(T) == 1)
        {
            Reg.Set<ushort>(cpu, Reg.Rax, (byte)quotient | ((ulong)(byte)remainder << 8));
            return;
        }

        Reg.Set<T>(cpu, Reg.Rax, quotient);
        Reg.Set<T>(cpu, Reg.Rdx, remainder);
    }
}

internal readonly unsafe struct OpDiv : IAccumulate
{
    public static Status Run<T>(CpuContext* cpu, ulong right)
        where T : unmanaged => Divide.Unsigned<T>(cpu, right);
}

internal readonly unsafe struct OpIdiv : IAccumulate
{
    public static Status Run<T>(CpuContext* cpu, ulong right)
        where T : unmanaged => Divide.Signed<T>(cpu, right);
}

/// <summary>SHLD/SHRD with the count in Immediate, or CL when Aux is set. R1 is the second operand.</summary>
internal readonly unsafe struct DoubleShift<TLeft> : IForm
    where TLeft : struct
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        bool isLeft = typeof(TLeft) == typeof(SignedTag);
        int bits = 8 * sizeof(T);
        int count = (insn->Aux != null ? (int)cpu->Rcx : (int)insn->Immediate) & (sizeof(T) == 8 ? 63 : 31);
        bool memory = (insn->Flags & InsnFlags.HasMemory) != 0;
        ulong linear = 0;
        ulong left = 0;
        if (memory)
        {
            if (!Mem.Address(cpu, insn, (uint)sizeof(T), true, out linear) ||
                !Mem.ReadForWrite(cpu, linear, (byte*)&left, sizeof(T)))
            {
                return Status.Fault;
            }
        }
        else
        {
            left = Reg.Get<T>(cpu, insn->R0);
        }

        if (count == 0)
        {
            if (!memory)
            {
                Reg.Set<T>(cpu, insn->R0, left);
            }

            return Status.Next;
        }

        ulong right = Reg.Get<T>(cpu, insn->R1);
        ulong result;
        bool carry;
        if (sizeof(T) == 2)
        {
            // Counts above 16 are undefined; processors shift the 48-bit string dest:src:dest.
            ulong triple = isLeft
                ? (left << 32) | (right << 16) | left
                : (left << 32) | (right << 16) | left;
            if (isLeft)
            {
                result = (triple >> (32 - count)) & 0xFFFF;
                carry = ((triple >> (48 - count)) & 1) != 0;
            }
            else
            {
                result = (triple >> count) & 0xFFFF;
                carry = ((triple >> (count - 1)) & 1) != 0;
            }
        }
        else if (isLeft)
        {
            result = Reg.Truncate<T>((left << count) | (right >> (bits - count)));
            carry = ((left >> (bits - count)) & 1) != 0;
        }
        else
        {
            result = Reg.Truncate<T>((left >> count) | (right << (bits - count)));
            carry = ((left >> (count - 1)) & 1) != 0;
        }

        if (memory)
        {
            if (!Mem.WriteBytes(cpu, linear, (byte*)&result, sizeof(T)))
            {
                return Status.Fault;
            }
        }
        else
        {
            Reg.Set<T>(cpu, insn->R0, result);
        }

        Flags.Result<T>(cpu, result, carry, count == 1 && Shift.Top<T>(result) != Shift.Top<T>(left));
        return Status.Next;
    }
}

internal readonly unsafe struct BswapR : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong value = Reg.Get<T>(cpu, insn->R0);
        if (sizeof(T) == 8)
        {
            value = BinaryPrimitives.ReverseEndianness(value);
        }
        else if (sizeof(T) == 4)
        {
            value = BinaryPrimitives.ReverseEndianness((uint)value);
        }
        else
        {
            // BSWAP r16 is undefined; processors clear the register's low word.
            value = 0;
        }

        Reg.Set<T>(cpu, insn->R0, value);
        return Status.Next;
    }
}

internal readonly unsafe struct MovbeRM : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Reg.LoadOperand<T>(cpu, insn, out ulong value))
        {
            return Status.Fault;
        }

        Reg.Set<T>(cpu, insn->R0, BinaryPrimitives.ReverseEndianness(value) >> (64 - (8 * sizeof(T))));
        return Status.Next;
    }
}

internal readonly unsafe struct MovbeMR : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong value = Reg.Get<T>(cpu, insn->R1);
        value = BinaryPrimitives.ReverseEndianness(value) >> (64 - (8 * sizeof(T)));
        return Reg.StoreOperand<T>(cpu, insn, value) ? Status.Next : Status.Fault;
    }
}

internal readonly unsafe struct SetccForm<TCond> : IForm
    where TCond : struct, ICondition
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong value = TCond.Test(cpu) ? 1UL : 0;
        if ((insn->Flags & InsnFlags.HasMemory) != 0)
        {
            return Reg.StoreOperand<T>(cpu, insn, value) ? Status.Next : Status.Fault;
        }

        Reg.Set<T>(cpu, insn->R0, value);
        return Status.Next;
    }
}

/// <summary>Three-operand BMI forms whose source is reg (R1) or mem and whose control is reg R2.</summary>
internal unsafe interface ITernary
{
    static abstract ulong Run<T>(CpuContext* cpu, ulong source, ulong control)
        where T : unmanaged;
}

/// <summary>dest = op(reg/mem, reg): BEXTR, BZHI, SHLX, SHRX, SARX.</summary>
internal readonly unsafe struct SourceThenControl<TOp> : IForm
    where TOp : struct, ITernary
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Reg.LoadEither<T>(cpu, insn, insn->R1, out ulong source))
        {
            return Status.Fault;
        }

        Reg.Set<T>(cpu, insn->R0, TOp.Run<T>(cpu, source, Reg.Get<T>(cpu, insn->R2)));
        return Status.Next;
    }
}

/// <summary>dest = op(reg R1, reg/mem): ANDN, PDEP, PEXT. The last operand is R2 or memory.</summary>
internal readonly unsafe struct ControlThenSource<TOp> : IForm
    where TOp : struct, ITernary
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Reg.LoadEither<T>(cpu, insn, insn->R2, out ulong last))
        {
            return Status.Fault;
        }

        Reg.Set<T>(cpu, insn->R0, TOp.Run<T>(cpu, Reg.Get<T>(cpu, insn->R1), last));
        return Status.Next;
    }
}

internal readonly unsafe struct OpAndn : ITernary
{
    public static ulong Run<T>(CpuContext* cpu, ulong source, ulong control)
        where T : unmanaged
    {
        ulong result = ~source & control;
        Flags.Logic<T>(cpu, result);
        Flags.ClearParity(cpu);
        return result;
    }
}

internal readonly unsafe struct OpBextr : ITernary
{
    public static ulong Run<T>(CpuContext* cpu, ulong source, ulong control)
        where T : unmanaged
    {
        int start = (int)control & 0xFF;
        int length = (int)(control >> 8) & 0xFF;
        ulong result = start >= 64 ? 0 : source >> start;
        if (length < 64)
        {
            result &= (1UL << length) - 1;
        }

        result = Reg.Truncate<T>(result);
        Flags.SetArithmetic(cpu, result == 0 ? Rflags.Zf : 0);
        return result;
    }
}

internal readonly unsafe struct OpBzhi : ITernary
{
    public static ulong Run<T>(CpuContext* cpu, ulong source, ulong control)
        where T : unmanaged
    {
        int bits = 8 * sizeof(T);
        int index = (int)control & 0xFF;
        ulong result = index < bits ? source & ((1UL << index) - 1) : source;
        Flags.Result<T>(cpu, result, index >= bits, false);
        Flags.ClearParity(cpu);
        return result;
    }
}

internal readonly unsafe struct OpShlx : ITernary
{
    public static ulong Run<T>(CpuContext* cpu, ulong source, ulong control)
        where T : unmanaged => source << Shift.Count<T>(control);
}

internal readonly unsafe struct OpShrx : ITernary
{
    public static ulong Run<T>(CpuContext* cpu, ulong source, ulong control)
        where T : unmanaged => source >> Shift.Count<T>(control);
}

internal readonly unsafe struct OpSarx : ITernary
{
    public static ulong Run<T>(CpuContext* cpu, ulong source, ulong control)
        where T : unmanaged => (ulong)((long)Flags.SignExtend<T>(source) >> Shift.Count<T>(control));
}

internal readonly unsafe struct OpPdep : ITernary
{
    public static ulong Run<T>(CpuContext* cpu, ulong source, ulong control)
        where T : unmanaged
    {
        ulong result = 0;
        while (control != 0)
        {
            ulong bit = control & (0 - control);
            result |= (source & 1) != 0 ? bit : 0;
            source >>= 1;
            control ^= bit;
        }

        return result;
    }
}

internal readonly unsafe struct OpPext : ITernary
{
    public static ulong Run<T>(CpuContext* cpu, ulong source, ulong control)
        where T : unmanaged
    {
        ulong result = 0;
        int at = 0;
        while (control != 0)
        {
            ulong bit = control & (0 - control);
            result |= (source & bit) != 0 ? 1UL << at : 0;
            at++;
            control ^= bit;
        }

        return result;
    }
}

/// <summary>RORX: source R1 or mem, count in Immediate.</summary>
internal readonly unsafe struct RorxForm : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Reg.LoadEither<T>(cpu, insn, insn->R1, out ulong source))
        {
            return Status.Fault;
        }

        ulong result = sizeof(T) == 8
            ? BitOperations.RotateRight(source, (int)insn->Immediate)
            : BitOperations.RotateRight((uint)source, (int)insn->Immediate);
        Reg.Set<T>(cpu, insn->R0, result);
        return Status.Next;
    }
}

/// <summary>MULX: high into R0, low into R1, source R2 or mem, other factor RDX; no flags.</summary>
internal readonly unsafe struct MulxForm : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Reg.LoadEither<T>(cpu, insn, insn->R2, out ulong source))
        {
            return Status.Fault;
        }

        ulong high;
        ulong low;
        if (sizeof(T) == 8)
        {
            high = Math.BigMul(cpu->Rdx, source, out low);
        }
        else
        {
            ulong product = (ulong)(uint)cpu->Rdx * source;
            high = product >> 32;
            low = (uint)product;
        }

        Reg.Set<T>(cpu, insn->R1, low);
        Reg.Set<T>(cpu, insn->R0, high);
        return Status.Next;
    }
}

/// <summary>ADCX and ADOX.</summary>
internal readonly unsafe struct AdxForm<TCarry> : IForm
    where TCarry : struct
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Reg.LoadEither<T>(cpu, insn, insn->R1, out ulong right))
        {
            return Status.Fault;
        }

        bool useCarry = typeof(TCarry) == typeof(UnsignedTag);
        bool carry = Flags.Carry(cpu);
        bool overflow = Flags.Overflow(cpu);
        ulong left = Reg.Get<T>(cpu, insn->R0);
        ulong result = Reg.Truncate<T>(left + right + ((useCarry ? carry : overflow) ? 1UL : 0));
        ulong carries = (left & right) | ((left | right) & ~result);
        bool carryOut = ((carries >> ((8 * sizeof(T)) - 1)) & 1) != 0;
        Reg.Set<T>(cpu, insn->R0, result);
        Flags.SetCarryOverflow(cpu, useCarry ? carryOut : carry, useCarry ? overflow : carryOut);
        return Status.Next;
    }
}

/// <summary>CRC32: T is the source; the destination is 32 bits, or 64 with REX.W (OperandSize 8).</summary>
internal readonly unsafe struct Crc32Form : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Reg.LoadEither<T>(cpu, insn, insn->R1, out ulong source))
        {
            return Status.Fault;
        }

        var crc = (uint)Reg.Get<uint>(cpu, insn->R0);
        crc = sizeof(T) switch
        {
            1 => BitOperations.Crc32C(crc, (byte)source),
            2 => BitOperations.Crc32C(crc, (ushort)source),
            4 => BitOperations.Crc32C(crc, (uint)source),
            _ => BitOperations.Crc32C(crc, source),
        };
        Reg.Set<ulong>(cpu, insn->R0, crc);
        return Status.Next;
    }
}

/// <summary>Instructions of one shape.</summary>
internal static unsafe class Misc
{
    public static Status Nop(CpuContext* cpu, Insn* insn) => Status.Next;

    /// <summary>PAUSE: a hint to let other vCPUs of a crowded host run.</summary>
    public static Status Pause(CpuContext* cpu, Insn* insn)
    {
        SoftVcpu.From(cpu).OnPause();
        return Status.Next;
    }

    public static Status MFence(CpuContext* cpu, Insn* insn)
    {
        System.Threading.Interlocked.MemoryBarrier();
        return Status.Next;
    }

    public static Status Ud(CpuContext* cpu, Insn* insn) => Faults.Ud(cpu);

    public static Status GpFault(CpuContext* cpu, Insn* insn) => Faults.Gp(cpu);

    public static Status Cbw(CpuContext* cpu, Insn* insn)
    {
        Reg.Set<ushort>(cpu, Reg.Rax, (ulong)(sbyte)cpu->Rax);
        return Status.Next;
    }

    public static Status Cwde(CpuContext* cpu, Insn* insn)
    {
        Reg.Set<uint>(cpu, Reg.Rax, (ulong)(short)cpu->Rax);
        return Status.Next;
    }

    public static Status Cdqe(CpuContext* cpu, Insn* insn)
    {
        cpu->Rax = (ulong)(int)cpu->Rax;
        return Status.Next;
    }

    public static Status Cwd(CpuContext* cpu, Insn* insn)
    {
        Reg.Set<ushort>(cpu, Reg.Rdx, (ulong)((short)cpu->Rax >> 15));
        return Status.Next;
    }

    public static Status Cdq(CpuContext* cpu, Insn* insn)
    {
        Reg.Set<uint>(cpu, Reg.Rdx, (ulong)((int)cpu->Rax >> 31));
        return Status.Next;
    }

    public static Status Cqo(CpuContext* cpu, Insn* insn)
    {
        cpu->Rdx = (ulong)((long)cpu->Rax >> 63);
        return Status.Next;
    }

    public static Status Lahf(CpuContext* cpu, Insn* insn)
    {
        // SAFETY: AH is byte 1 of RAX in the context.
        *((byte*)cpu + Reg.Rax + 1) = (byte)((Flags.GetArithmetic(cpu) & 0xD5) | 2);
        return Status.Next;
    }

    public static Status Sahf(CpuContext* cpu, Insn* insn)
    {
        ulong overflow = Flags.GetArithmetic(cpu) & Rflags.Of;
        // SAFETY: AH, as above.
        Flags.SetArithmetic(cpu, (*((byte*)cpu + Reg.Rax + 1) & 0xD5UL) | overflow);
        return Status.Next;
    }

    public static Status Clc(CpuContext* cpu, Insn* insn)
    {
        Flags.SetCarry(cpu, false);
        return Status.Next;
    }

    public static Status Stc(CpuContext* cpu, Insn* insn)
    {
        Flags.SetCarry(cpu, true);
        return Status.Next;
    }

    public static Status Cmc(CpuContext* cpu, Insn* insn)
    {
        Flags.SetCarry(cpu, !Flags.Carry(cpu));
        return Status.Next;
    }

    public static Status Cld(CpuContext* cpu, Insn* insn)
    {
        cpu->RflagsSystem &= ~Rflags.Df;
        return Status.Next;
    }

    public static Status Std(CpuContext* cpu, Insn* insn)
    {
        cpu->RflagsSystem |= Rflags.Df;
        return Status.Next;
    }

    public static Status Salc(CpuContext* cpu, Insn* insn)
    {
        Reg.Set<byte>(cpu, Reg.Rax, Flags.Carry(cpu) ? 0xFFUL : 0);
        return Status.Next;
    }

    /// <summary>XLATB: the record's memory operand is [rBX + AL].</summary>
    public static Status Xlat(CpuContext* cpu, Insn* insn)
    {
        ulong offset = (Reg.Get<ulong>(cpu, insn->Base) + (byte)cpu->Rax) & insn->AddressMask;
        // SAFETY: SegmentBase is an offset in the context that the binder set.
        ulong linear = offset + *(ulong*)((byte*)cpu + insn->SegmentBase);
        if (((insn->Flags & InsnFlags.SegmentCheck) != 0 &&
            !Segmentation.Linear(cpu, insn->Segment, offset, 1, false, out linear)) ||
            !Mem.Read(cpu, linear, out byte value))
        {
            return Status.Fault;
        }

        Reg.Set<byte>(cpu, Reg.Rax, value);
        return Status.Next;
    }

    public static Status Cmpxchg8b(CpuContext* cpu, Insn* insn)
    {
        if (!Mem.Address(cpu, insn, 8, true, out ulong linear))
        {
            return Status.Fault;
        }

        ulong expected = (uint)cpu->Rax | (cpu->Rdx << 32);
        ulong desired = (uint)cpu->Rbx | (cpu->Rcx << 32);
        if (!Exchange.Compare<ulong>(cpu, linear, desired, expected, out ulong seen))
        {
            return Status.Fault;
        }

        ulong flags = Flags.GetArithmetic(cpu) & ~Rflags.Zf;
        if (seen == expected)
        {
            flags |= Rflags.Zf;
        }
        else
        {
            cpu->Rax = (uint)seen;
            cpu->Rdx = seen >> 32;
        }

        Flags.SetArithmetic(cpu, flags);
        return Status.Next;
    }

    public static Status Cmpxchg16b(CpuContext* cpu, Insn* insn)
    {
        if (cpu->Shared->CompareExchange16 == 0)
        {
            return Faults.Ud(cpu);
        }

        if (!Mem.Address(cpu, insn, 16, true, out ulong linear))
        {
            return Status.Fault;
        }

        if ((linear & 15) != 0)
        {
            return Faults.Gp(cpu);
        }

        UInt128 expected = new(cpu->Rdx, cpu->Rax);
        UInt128 desired = new(cpu->Rcx, cpu->Rbx);
        byte* pointer = Mem.AtomicPointer(cpu, linear, 16, out bool fault);
        if (fault)
        {
            return Status.Fault;
        }

        UInt128 seen = default;
        if (pointer != null)
        {
            seen = Wide.CompareExchange(cpu, pointer, desired, expected);
        }
        else
        {
            Mem.LockSplit(cpu);
            bool done = Mem.ReadForWrite(cpu, linear, (byte*)&seen, 16);
            UInt128 stored = seen == expected ? desired : seen;
            done = done && Mem.WriteBytes(cpu, linear, (byte*)&stored, 16);
            Mem.UnlockSplit(cpu);
            if (!done)
            {
                return Status.Fault;
            }
        }

        ulong flags = Flags.GetArithmetic(cpu) & ~Rflags.Zf;
        if (seen == expected)
        {
            flags |= Rflags.Zf;
        }
        else
        {
            cpu->Rax = (ulong)seen;
            cpu->Rdx = (ulong)(seen >> 64);
        }

        Flags.SetArithmetic(cpu, flags);
        return Status.Next;
    }

    public static Status Daa(CpuContext* cpu, Insn* insn) => Decimal(cpu, false);

    public static Status Das(CpuContext* cpu, Insn* insn) => Decimal(cpu, true);

    public static Status Aaa(CpuContext* cpu, Insn* insn) => Ascii(cpu, false);

    public static Status Aas(CpuContext* cpu, Insn* insn) => Ascii(cpu, true);

    public static Status Aam(CpuContext* cpu, Insn* insn)
    {
        var by = (uint)(byte)insn->Immediate;
        if (by == 0)
        {
            return Faults.De(cpu);
        }

        var al = (uint)(byte)cpu->Rax;
        Reg.Set<ushort>(cpu, Reg.Rax, ((al / by) << 8) | (al % by));
        Flags.Logic<byte>(cpu, al % by);
        return Status.Next;
    }

    public static Status Aad(CpuContext* cpu, Insn* insn)
    {
        ulong ah = (cpu->Rax >> 8) & 0xFF;
        ulong al = (byte)(cpu->Rax + (ah * (byte)insn->Immediate));
        Reg.Set<ushort>(cpu, Reg.Rax, al);
        Flags.Logic<byte>(cpu, al);
        return Status.Next;
    }

    private static Status Decimal(CpuContext* cpu, bool subtract)
    {
        ulong flags = Flags.GetArithmetic(cpu);
        var al = (uint)(byte)cpu->Rax;
        uint old = al;
        bool carry = (flags & Rflags.Cf) != 0;
        bool adjust = (al & 0xF) > 9 || (flags & Rflags.Af) != 0;
        bool carryOut = false;
        if (adjust)
        {
            uint changed = subtract ? al - 6 : al + 6;
            carryOut = carry || changed > 0xFF;
            al = changed & 0xFF;
        }

        if (old > 0x99 || carry)
        {
            al = (subtract ? al - 0x60 : al + 0x60) & 0xFF;
            carryOut = true;
        }
        else if (!subtract)
        {
            carryOut = false;
        }

        Reg.Set<byte>(cpu, Reg.Rax, al);
        Flags.Logic<byte>(cpu, al);
        ulong now = Flags.GetArithmetic(cpu);
        Flags.SetArithmetic(cpu, now | (carryOut ? Rflags.Cf : 0) | (adjust ? Rflags.Af : 0));
        return Status.Next;
    }

    private static Status Ascii(CpuContext* cpu, bool subtract)
    {
        ulong flags = Flags.GetArithmetic(cpu);
        ulong ax = (ushort)cpu->Rax;
        bool adjust = (ax & 0xF) > 9 || (flags & Rflags.Af) != 0;
        if (adjust)
        {
            // AMD and later Intel processors carry from AL into AH.
            ax = subtract ? ax - 0x106 : ax + 0x106;
        }

        Reg.Set<ushort>(cpu, Reg.Rax, ax & 0xFF0F);
        Flags.SetArithmetic(
            cpu, (flags & ~(Rflags.Cf | Rflags.Af)) | (adjust ? Rflags.Cf | Rflags.Af : 0));
        return Status.Next;
    }
}

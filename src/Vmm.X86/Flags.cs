// SPDX-License-Identifier: BSD-2-Clause
using System.Numerics;
using System.Runtime.CompilerServices;

namespace Vmm.X86;

// Arithmetic flags are kept as three words and computed on demand:
//   FlagResult  the result, sign-extended to 64 bits:   ZF = (FlagResult == 0)
//   FlagDelta   xor-ed in for SF and PF:                SF = bit 63, PF = even parity of bits 7:0 of (Result ^ Delta)
//   FlagCarry   carry-out vector of the adder:          CF = bit 63, OF = bit 63 ^ bit 62, AF = bit 3
// The carry-out vector of an n-bit operation is shifted left so that the carry out of the top bit is bit 63 and the one
// into it is bit 62; the carry out of bit 3 stays where it is. Delta is 0 after every ALU operation and differs only
// when flags are loaded as a whole (POPF, SAHF, rotates, instructions run natively) or PF is cleared.
//
// Flags that the architecture leaves undefined are clear, except that division and bit tests leave what was there. A
// translator that must agree with this makes them so (Translator.ClearUndefined).

/// <summary>Lazy arithmetic flags. T is byte, ushort, uint or ulong.</summary>
internal static unsafe class Flags
{
    /// <summary>The complete RFLAGS.</summary>
    public static ulong Get(CpuContext* cpu) => cpu->RflagsSystem | GetArithmetic(cpu);

    /// <summary>CF PF AF ZF SF OF at their places in RFLAGS.</summary>
    public static ulong GetArithmetic(CpuContext* cpu)
    {
        ulong carry = cpu->FlagCarry;
        ulong mixed = cpu->FlagResult ^ cpu->FlagDelta;
        ulong value = carry >> 63;
        value |= ((carry ^ (carry << 1)) >> 63) << 11;
        value |= (carry & 8) << 1;
        value |= (mixed >> 63) << 7;
        value |= (ulong)(~BitOperations.PopCount((uint)(byte)mixed) & 1) << 2;
        value |= cpu->FlagResult == 0 ? Rflags.Zf : 0;
        return value;
    }

    /// <summary>Sets CF PF AF ZF SF OF from an RFLAGS image; other bits of it are ignored.</summary>
    public static void SetArithmetic(CpuContext* cpu, ulong rflags)
    {
        ulong cf = rflags & 1;
        ulong of = (rflags >> 11) & 1;
        cpu->FlagCarry = (cf << 63) | ((cf ^ of) << 62) | ((rflags >> 1) & 8);
        cpu->FlagResult = (rflags & Rflags.Zf) != 0 ? 0UL : 0x100;
        cpu->FlagDelta = ((rflags & Rflags.Sf) << 56) | (((rflags >> 2) & 1) ^ 1);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Carry(CpuContext* cpu) => (long)cpu->FlagCarry < 0;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong CarryBit(CpuContext* cpu) => cpu->FlagCarry >> 63;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Zero(CpuContext* cpu) => cpu->FlagResult == 0;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Sign(CpuContext* cpu) => (long)(cpu->FlagResult ^ cpu->FlagDelta) < 0;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Overflow(CpuContext* cpu) => (long)(cpu->FlagCarry ^ (cpu->FlagCarry << 1)) < 0;

    public static bool Parity(CpuContext* cpu) =>
        (BitOperations.PopCount((uint)(byte)(cpu->FlagResult ^ cpu->FlagDelta)) & 1) == 0;

    /// <summary>SF != OF.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Less(CpuContext* cpu) =>
        (long)(cpu->FlagCarry ^ (cpu->FlagCarry << 1) ^ cpu->FlagResult ^ cpu->FlagDelta) < 0;

    /// <summary>Sets CF alone.</summary>
    public static void SetCarry(CpuContext* cpu, bool value)
    {
        // OF is stored relative to CF, so both bits flip together.
        if (Carry(cpu) != value)
        {
            cpu->FlagCarry ^= 3UL << 62;
        }
    }

    /// <summary>MUL and IMUL: CF and OF.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Product(CpuContext* cpu, bool overflows) =>
        SetArithmetic(cpu, overflows ? Rflags.Cf | Rflags.Of : 0);

    /// <summary>Clears PF behind Logic or Result.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void ClearParity(CpuContext* cpu) => cpu->FlagDelta = (uint)~BitOperations.PopCount((byte)cpu->FlagResult) & 1;

    /// <summary>Sets CF and OF, leaves the others: rotates.</summary>
    public static void SetCarryOverflow(CpuContext* cpu, bool carry, bool overflow) =>
        cpu->FlagCarry = (cpu->FlagCarry & 8) | (carry ? 1UL << 63 : 0) | (carry != overflow ? 1UL << 62 : 0);

    /// <summary>After an addition or subtraction of 1 whose CF must not change: INC, DEC.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void KeepCarry(CpuContext* cpu, ulong before)
    {
        ulong now = cpu->FlagCarry;
        ulong overflow = (now ^ (now << 1)) & (1UL << 63);
        ulong carry = before & (1UL << 63);
        cpu->FlagCarry = carry | ((carry ^ overflow) >> 1) | (now & 8);
    }

    /// <summary>Sets ZF PF SF from a result, and clears CF, OF and AF: AND, OR, XOR, TEST.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Logic<T>(CpuContext* cpu, ulong result)
        where T : unmanaged
    {
        cpu->FlagResult = SignExtend<T>(result);
        cpu->FlagCarry = 0;
        cpu->FlagDelta = 0;
    }

    /// <summary>ADD and ADC: operands and result zero-extended.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Add<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged
    {
        cpu->FlagResult = SignExtend<T>(result);
        cpu->FlagCarry = Place<T>((left & right) | ((left | right) & ~result));
        cpu->FlagDelta = 0;
    }

    /// <summary>SUB, SBB, CMP and NEG: operands and result zero-extended.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Sub<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged
    {
        cpu->FlagResult = SignExtend<T>(result);
        cpu->FlagCarry = Place<T>((~left & right) | ((~left | right) & result));
        cpu->FlagDelta = 0;
    }

    /// <summary>Result flags as given, with CF and OF stated and AF clear: shifts, multiplications.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Result<T>(CpuContext* cpu, ulong result, bool carry, bool overflow)
        where T : unmanaged
    {
        cpu->FlagResult = SignExtend<T>(result);
        cpu->FlagCarry = (carry ? 1UL << 63 : 0) | (carry != overflow ? 1UL << 62 : 0);
        cpu->FlagDelta = 0;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong SignExtend<T>(ulong value)
        where T : unmanaged
    {
        if (sizeof(T) == 1)
        {
            return (ulong)(long)(sbyte)value;
        }

        if (sizeof(T) == 2)
        {
            return (ulong)(long)(short)value;
        }

        return sizeof(T) == 4 ? (ulong)(long)(int)value : value;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static ulong Place<T>(ulong carries)
        where T : unmanaged =>
        sizeof(T) == 8 ? carries : (carries << (64 - (8 * sizeof(T)))) | (carries & 8);
}

// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;
using System.Threading;

namespace Vmm.X86;

// Instruction forms are structures with one static generic method, instantiated per operand size; the binder takes the
// address of the instance. Because every type argument is a value type, each instance is compiled to its own code and
// size tests fold away. Values travel as zero-extended ulong.

/// <summary>An instruction form for operands of sizeof(T) bytes.</summary>
internal unsafe interface IForm
{
    /// <summary>Executes it.</summary>
    static abstract Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged;
}

/// <summary>A condition code.</summary>
internal unsafe interface ICondition
{
    static abstract bool Test(CpuContext* cpu);
}

/// <summary>A two-operand operation; unary ones ignore the second.</summary>
internal unsafe interface IBinary
{
    /// <summary>The result; bits above the size may be anything. Changes nothing.</summary>
    static abstract ulong Compute<T>(CpuContext* cpu, ulong left, ulong right)
        where T : unmanaged;

    /// <summary>Sets the flags after the result has been stored; <paramref name="result"/> is zero-extended.</summary>
    static abstract void SetFlags<T>(CpuContext* cpu, ulong left, ulong right, ulong result)
        where T : unmanaged;
}

/// <summary>Where a form takes its last operand from.</summary>
internal unsafe interface ISource
{
    /// <summary>The operand, zero-extended; false after a fault.</summary>
    static abstract bool Get<T>(CpuContext* cpu, Insn* insn, out ulong value)
        where T : unmanaged;
}

/// <summary>The register in R0.</summary>
internal readonly unsafe struct FromR0 : ISource
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Get<T>(CpuContext* cpu, Insn* insn, out ulong value)
        where T : unmanaged
    {
        value = Reg.Get<T>(cpu, insn->R0);
        return true;
    }
}

/// <summary>The register in R1.</summary>
internal readonly unsafe struct FromR1 : ISource
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Get<T>(CpuContext* cpu, Insn* insn, out ulong value)
        where T : unmanaged
    {
        value = Reg.Get<T>(cpu, insn->R1);
        return true;
    }
}

/// <summary>The immediate.</summary>
internal readonly unsafe struct FromImmediate : ISource
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Get<T>(CpuContext* cpu, Insn* insn, out ulong value)
        where T : unmanaged
    {
        value = Reg.Truncate<T>(insn->Immediate);
        return true;
    }
}

/// <summary>The memory operand.</summary>
internal readonly unsafe struct FromMemory : ISource
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Get<T>(CpuContext* cpu, Insn* insn, out ulong value)
        where T : unmanaged => Reg.LoadOperand<T>(cpu, insn, out value);
}

/// <summary>Picks the instance of a form for an operand size.</summary>
internal static unsafe class Forms
{
    /// <summary>1, 2, 4 or 8 bytes.</summary>
    public static delegate*<CpuContext*, Insn*, Status> Pick<TForm>(int size)
        where TForm : struct, IForm => size switch
        {
            1 => &Invoke<TForm, byte>,
            2 => &Invoke<TForm, ushort>,
            4 => &Invoke<TForm, uint>,
            _ => &Invoke<TForm, ulong>,
        };

    private static Status Invoke<TForm, T>(CpuContext* cpu, Insn* insn)
        where TForm : struct, IForm
        where T : unmanaged =>
        TForm.Run<T>(cpu, insn);
}

/// <summary>General registers by byte offset.</summary>
internal static unsafe class Reg
{
    public const int Rax = 0;
    public const int Rcx = 8;
    public const int Rdx = 16;
    public const int Rbx = 24;
    public const int Rsp = 32;
    public const int Rbp = 40;
    public const int Rsi = 48;
    public const int Rdi = 56;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Get<T>(CpuContext* cpu, int offset)
        // SAFETY: offsets of registers come from the binder, which made them from register numbers: inside the
        // context, with 8 bytes behind each (vectors: 16).
        where T : unmanaged => Load<T>((byte*)cpu + offset);

    /// <summary>Writes; 32-bit writes clear the upper half, smaller ones leave the rest.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Set<T>(CpuContext* cpu, int offset, ulong value)
        where T : unmanaged
    {
        // SAFETY: as in Get.
        byte* at = (byte*)cpu + offset;
        if (sizeof(T) == 1)
        {
            *at = (byte)value;
        }
        else if (sizeof(T) == 2)
        {
            *(ushort*)at = (ushort)value;
        }
        else if (sizeof(T) == 4)
        {
            *(ulong*)at = (uint)value;
        }
        else
        {
            *(ulong*)at = value;
        }
    }

    /// <summary>Writes R0 with the record's operand size: 2, 4 or 8.</summary>
    public static void SetSized(CpuContext* cpu, Insn* insn, ulong value)
    {
        switch (insn->OperandSize)
        {
            case 2:
                Set<ushort>(cpu, insn->R0, value);
                break;
            case 4:
                Set<uint>(cpu, insn->R0, value);
                break;
            default:
                Set<ulong>(cpu, insn->R0, value);
                break;
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Load<T>(byte* at)
        where T : unmanaged
    {
        // SAFETY: the caller's address has sizeof(T) bytes: a register of the context, or host memory that the TLB
        // gave for this size; x86 takes any alignment.
        if (sizeof(T) == 1)
        {
            return *at;
        }

        if (sizeof(T) == 2)
        {
            return *(ushort*)at;
        }

        return sizeof(T) == 4 ? *(uint*)at : *(ulong*)at;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store<T>(byte* at, ulong value)
        where T : unmanaged
    {
        // SAFETY: the caller's address has sizeof(T) bytes: a register of the context, or host memory that the TLB
        // gave for this size; x86 takes any alignment.
        if (sizeof(T) == 1)
        {
            *at = (byte)value;
        }
        else if (sizeof(T) == 2)
        {
            *(ushort*)at = (ushort)value;
        }
        else if (sizeof(T) == 4)
        {
            *(uint*)at = (uint)value;
        }
        else
        {
            *(ulong*)at = value;
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Truncate<T>(ulong value)
        where T : unmanaged
    {
        if (sizeof(T) == 1)
        {
            return (byte)value;
        }

        if (sizeof(T) == 2)
        {
            return (ushort)value;
        }

        return sizeof(T) == 4 ? (uint)value : value;
    }

    /// <summary>Loads a memory operand of the record.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool LoadOperand<T>(CpuContext* cpu, Insn* insn, out ulong value)
        where T : unmanaged
    {
        if (Mem.Address(cpu, insn, (uint)sizeof(T), false, out ulong linear) &&
            Mem.Read(cpu, linear, out T raw))
        {
            value = Load<T>((byte*)&raw);
            return true;
        }

        value = 0;
        return false;
    }

    /// <summary>Loads the record's memory operand, or the register that is in its place.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool LoadEither<T>(CpuContext* cpu, Insn* insn, int register, out ulong value)
        where T : unmanaged
    {
        if ((insn->Flags & InsnFlags.HasMemory) != 0)
        {
            return LoadOperand<T>(cpu, insn, out value);
        }

        value = Get<T>(cpu, register);
        return true;
    }

    /// <summary>Stores to the memory operand of the record.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool StoreOperand<T>(CpuContext* cpu, Insn* insn, ulong value)
        where T : unmanaged
    {
        if (!Mem.Address(cpu, insn, (uint)sizeof(T), true, out ulong linear))
        {
            return false;
        }

        byte* pointer = Mem.WritePointer(cpu, linear, (uint)sizeof(T));
        if (pointer != null)
        {
            Store<T>(pointer, value);
            return true;
        }

        return Mem.WriteBytes(cpu, linear, (byte*)&value, sizeof(T));
    }

    /// <summary>Compare-exchange on host memory of the operand's size; answers the old value.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong CompareExchange<T>(byte* at, ulong value, ulong expected)
        where T : unmanaged
    {
        // SAFETY: at is guest RAM that the TLB or a probe gave for sizeof(T) bytes; the host's locked instructions are atomic
        // at any alignment.
        if (sizeof(T) == 1)
        {
            return Interlocked.CompareExchange(ref *at, (byte)value, (byte)expected);
        }

        if (sizeof(T) == 2)
        {
            return Interlocked.CompareExchange(ref *(ushort*)at, (ushort)value, (ushort)expected);
        }

        return sizeof(T) == 4
            ? Interlocked.CompareExchange(ref *(uint*)at, (uint)value, (uint)expected)
            : Interlocked.CompareExchange(ref *(ulong*)at, value, expected);
    }

    /// <summary>Exchange on host memory.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Exchange<T>(byte* at, ulong value)
        where T : unmanaged
    {
        // SAFETY: as in CompareExchange.
        if (sizeof(T) == 1)
        {
            return Interlocked.Exchange(ref *at, (byte)value);
        }

        if (sizeof(T) == 2)
        {
            return Interlocked.Exchange(ref *(ushort*)at, (ushort)value);
        }

        return sizeof(T) == 4
            ? Interlocked.Exchange(ref *(uint*)at, (uint)value)
            : Interlocked.Exchange(ref *(ulong*)at, value);
    }
}

/// <summary>Read-modify-write of memory operands, plain and locked.</summary>
internal static unsafe class Modify
{
    /// <summary>Plain.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Status Plain<TOp, T>(CpuContext* cpu, ulong linear, ulong right)
        where TOp : struct, IBinary
        where T : unmanaged
    {
        byte* pointer = Mem.WritePointer(cpu, linear, (uint)sizeof(T));
        if (pointer == null)
        {
            return Slow<TOp, T>(cpu, linear, right, out _);
        }

        ulong left = Reg.Load<T>(pointer);
        ulong result = Reg.Truncate<T>(TOp.Compute<T>(cpu, left, right));
        Reg.Store<T>(pointer, result);
        TOp.SetFlags<T>(cpu, left, right, result);
        return Status.Next;
    }

    /// <summary>With LOCK.</summary>
    public static Status Locked<TOp, T>(CpuContext* cpu, ulong linear, ulong right)
        where TOp : struct, IBinary
        where T : unmanaged => Locked<TOp, T>(cpu, linear, right, out _);

    /// <summary>With LOCK; answers what was there before.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Status Locked<TOp, T>(CpuContext* cpu, ulong linear, ulong right, out ulong left)
        where TOp : struct, IBinary
        where T : unmanaged
    {
        byte* pointer = Mem.AtomicPointer(cpu, linear, (uint)sizeof(T), out bool fault);
        if (pointer == null)
        {
            left = 0;
            if (fault)
            {
                return Status.Fault;
            }

            Mem.LockSplit(cpu);
            Status status = Slow<TOp, T>(cpu, linear, right, out left);
            Mem.UnlockSplit(cpu);
            return status;
        }

        left = Reg.Load<T>(pointer);
        while (true)
        {
            ulong result = Reg.Truncate<T>(TOp.Compute<T>(cpu, left, right));
            ulong seen = Reg.CompareExchange<T>(pointer, result, left);
            if (seen == left)
            {
                TOp.SetFlags<T>(cpu, left, right, result);
                return Status.Next;
            }

            left = seen;
        }
    }

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static Status Slow<TOp, T>(CpuContext* cpu, ulong linear, ulong right, out ulong left)
        where TOp : struct, IBinary
        where T : unmanaged
    {
        ulong old = 0;
        bool done = Mem.ReadForWrite(cpu, linear, (byte*)&old, sizeof(T));
        left = old;
        if (!done)
        {
            return Status.Fault;
        }

        ulong result = Reg.Truncate<T>(TOp.Compute<T>(cpu, left, right));
        if (!Mem.WriteBytes(cpu, linear, (byte*)&result, sizeof(T)))
        {
            return Status.Fault;
        }

        TOp.SetFlags<T>(cpu, left, right, result);
        return Status.Next;
    }
}

/// <summary>CMPXCHG and CMPXCHG8B of memory, with or without LOCK.</summary>
internal static unsafe class Exchange
{
    /// <summary>False after a fault. The destination is always written (SDM 2A).</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Compare<T>(CpuContext* cpu, ulong linear, ulong desired, ulong expected, out ulong seen)
        where T : unmanaged
    {
        byte* pointer = Mem.AtomicPointer(cpu, linear, (uint)sizeof(T), out bool fault);
        if (pointer != null)
        {
            seen = Reg.CompareExchange<T>(pointer, desired, expected);
            return true;
        }

        seen = 0;
        return !fault && Slow(cpu, linear, desired, expected, out seen, sizeof(T));
    }

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static bool Slow(CpuContext* cpu, ulong linear, ulong desired, ulong expected, out ulong seen, int size)
    {
        Mem.LockSplit(cpu);
        ulong old = 0;
        bool done = Mem.ReadForWrite(cpu, linear, (byte*)&old, size);
        ulong stored = old == expected ? desired : old;
        done = done && Mem.WriteBytes(cpu, linear, (byte*)&stored, size);
        Mem.UnlockSplit(cpu);
        seen = old;
        return done;
    }
}

/// <summary>The stack.</summary>
internal static unsafe class Stack
{
    /// <summary>Pushes; false after a fault, with RSP unchanged.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Push<T>(CpuContext* cpu, ulong value)
        where T : unmanaged
    {
        ulong offset = (cpu->Rsp - (uint)sizeof(T)) & cpu->StackMask;
        if (!Write<T>(cpu, offset, value))
        {
            return false;
        }

        SetPointer(cpu, offset);
        return true;
    }

    /// <summary>Reads the top of the stack without popping.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Peek<T>(CpuContext* cpu, ulong distance, out ulong value)
        where T : unmanaged => Read<T>(cpu, (cpu->Rsp + distance) & cpu->StackMask, out value);

    /// <summary>Drops bytes.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Drop(CpuContext* cpu, ulong bytes) => SetPointer(cpu, (cpu->Rsp + bytes) & cpu->StackMask);

    /// <summary>Sets SP, ESP or RSP, whichever the stack segment uses.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void SetPointer(CpuContext* cpu, ulong offset) =>
        cpu->Rsp = (cpu->Rsp & ~cpu->StackMask) | offset;

    /// <summary>Writes at a stack offset that is already masked.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Write<T>(CpuContext* cpu, ulong offset, ulong value)
        where T : unmanaged
    {
        if (!Segmentation.StackLinear(cpu, offset, (uint)sizeof(T), true, out ulong linear))
        {
            return false;
        }

        byte* pointer = Mem.WritePointer(cpu, linear, (uint)sizeof(T));
        if (pointer != null)
        {
            Reg.Store<T>(pointer, value);
            return true;
        }

        return WriteSlow(cpu, linear, value, sizeof(T));
    }

    /// <summary>Reads at a stack offset that is already masked.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Read<T>(CpuContext* cpu, ulong offset, out ulong value)
        where T : unmanaged
    {
        value = 0;
        if (!Segmentation.StackLinear(cpu, offset, (uint)sizeof(T), false, out ulong linear))
        {
            return false;
        }

        byte* pointer = Mem.ReadPointer(cpu, linear, (uint)sizeof(T));
        if (pointer != null)
        {
            value = Reg.Load<T>(pointer);
            return true;
        }

        return ReadSlow(cpu, linear, out value, sizeof(T));
    }

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static bool WriteSlow(CpuContext* cpu, ulong linear, ulong value, int size)
    {
        if (Mem.WriteBytes(cpu, linear, (byte*)&value, size))
        {
            return true;
        }

        Faults.NonCanonicalIsStack(cpu);
        return false;
    }

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static bool ReadSlow(CpuContext* cpu, ulong linear, out ulong value, int size)
    {
        ulong buffer = 0;
        bool done = Mem.ReadBytes(cpu, linear, (byte*)&buffer, size);
        value = buffer;
        if (!done)
        {
            Faults.NonCanonicalIsStack(cpu);
        }

        return done;
    }
}

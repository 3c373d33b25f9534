// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.CompilerServices;

namespace Vmm.X86;

// String instructions. Each iteration is complete before the next begins, so that a fault or an interrupt leaves the
// registers at the element that comes next. A repeated instruction does a bounded batch and then asks to be executed
// again (RIP stays at it), which is where interrupts are taken.
//
// REP MOVS and REP STOS go forward a page at a time through host pointers when neither operand crosses a page or leaves
// RAM; what is left over goes element by element.

/// <summary>Shared parts of the string instructions.</summary>
internal static unsafe class Strings
{
    /// <summary>Elements that one execution may do before interrupts are looked at.</summary>
    public const ulong Batch = 65536;

    /// <summary>Elements of a slow loop before interrupts are looked at.</summary>
    public const ulong SlowBatch = 1024;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Count(CpuContext* cpu, Insn* insn) => cpu->Rcx & Mask(insn);

    public static ulong Mask(Insn* insn) => insn->AddressSize switch
    {
        2 => 0xFFFF,
        4 => 0xFFFFFFFF,
        _ => ulong.MaxValue,
    };

    /// <summary>Writes a count or index register with the address size's rule for the upper part.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Set(CpuContext* cpu, Insn* insn, int register, ulong value)
    {
        if (insn->AddressSize == 8)
        {
            Reg.Set<ulong>(cpu, register, value);
        }
        else if (insn->AddressSize == 4)
        {
            Reg.Set<uint>(cpu, register, value);
        }
        else
        {
            Reg.Set<ushort>(cpu, register, value);
        }
    }

    public static bool Linear(
        CpuContext* cpu, Insn* insn, int segment, ulong offset, uint size, bool write, out ulong linear)
    {
        if ((insn->Flags & InsnFlags.SegmentCheck) == 0)
        {
            linear = offset + CpuContext.Segment(cpu, segment)->EffectiveBase;
            return true;
        }

        return Segmentation.Linear(cpu, segment, offset, size, write, out linear);
    }

    public static bool IsRepeated(Insn* insn) => (insn->Flags & (InsnFlags.Rep | InsnFlags.Repne)) != 0;

    /// <summary>
    /// How many elements of <paramref name="size"/> lie in the page from this offset on, upwards, without leaving the
    /// segment's checks; 0 when the slow path must decide.
    /// </summary>
    public static ulong InPage(ulong linear, uint size)
    {
        ulong left = 4096 - (linear & Mem.PageOffset);
        return left / size;
    }

    /// <summary>Elements to do at most: one at a time while single-stepping or watching.</summary>
    public static ulong Budget(CpuContext* cpu, ulong normal) =>
        (cpu->RflagsSystem & Rflags.Tf) != 0 || (cpu->Dr7 & 0xFF) != 0 ? 1 : normal;

    /// <summary>What an index register moves by, in the direction of DF.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Step<T>(CpuContext* cpu)
        where T : unmanaged =>
        (cpu->RflagsSystem & Rflags.Df) != 0 ? 0UL - (uint)sizeof(T) : (uint)sizeof(T);

    /// <summary>Ends a batch: the instruction continues when the count is not exhausted.</summary>
    public static Status Again(CpuContext* cpu, Insn* insn)
    {
        if (Count(cpu, insn) == 0)
        {
            return Status.Next;
        }

        cpu->Rip = Insn.Address(cpu, insn);
        return Status.Look;
    }
}

/// <summary>One element of a string instruction.</summary>
internal unsafe interface IStringOperation
{
    /// <summary>Its repetition ends by the zero flag, too.</summary>
    static abstract bool Compares { get; }

    /// <summary>Does one element; false after a fault, with nothing changed.</summary>
    static abstract bool One<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged;
}

/// <summary>An element, or many at once.</summary>
internal unsafe interface IBulkString
{
    /// <inheritdoc cref="IStringOperation.One"/>
    static abstract bool One<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged;

    /// <summary>How many of <paramref name="count"/> elements it has done; 0 when only <see cref="One"/> can tell.</summary>
    static abstract ulong Fast<T>(CpuContext* cpu, Insn* insn, ulong count)
        where T : unmanaged;
}

/// <summary>LODS, SCAS, CMPS, repeated or not.</summary>
internal readonly unsafe struct StringForm<TOp> : IForm
    where TOp : struct, IStringOperation
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Strings.IsRepeated(insn))
        {
            return TOp.One<T>(cpu, insn) ? Status.Next : Status.Fault;
        }

        bool untilEqual = (insn->Flags & InsnFlags.Repne) != 0;
        ulong count = Strings.Count(cpu, insn);
        ulong budget = Strings.Budget(cpu, Strings.SlowBatch);
        for (ulong i = 0; i < budget && count != 0; i++)
        {
            if (!TOp.One<T>(cpu, insn))
            {
                return Status.Fault;
            }

            count--;
            Strings.Set(cpu, insn, Reg.Rcx, count);
            if (TOp.Compares && Flags.Zero(cpu) == untilEqual)
            {
                return Status.Next;
            }
        }

        return Strings.Again(cpu, insn);
    }
}

/// <summary>MOVS and STOS, repeated or not.</summary>
internal readonly unsafe struct BulkForm<TOp> : IForm
    where TOp : struct, IBulkString
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Strings.IsRepeated(insn))
        {
            return TOp.One<T>(cpu, insn) ? Status.Next : Status.Fault;
        }

        ulong count = Strings.Count(cpu, insn);
        ulong budget = Strings.Budget(cpu, Strings.Batch);
        while (count != 0 && budget != 0)
        {
            ulong done = TOp.Fast<T>(cpu, insn, Math.Min(count, budget));
            if (done == 0)
            {
                if (!TOp.One<T>(cpu, insn))
                {
                    return Status.Fault;
                }

                done = 1;
                budget -= Math.Min(budget, 64);
            }
            else
            {
                budget -= done;
            }

            count -= done;
            Strings.Set(cpu, insn, Reg.Rcx, count);
        }

        return Strings.Again(cpu, insn);
    }
}

internal readonly unsafe struct Movs : IBulkString
{
    public static bool One<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong mask = Strings.Mask(insn);
        if (!Strings.Linear(cpu, insn, insn->Segment, cpu->Rsi & mask, (uint)sizeof(T), false, out ulong from) ||
            !Mem.Read(cpu, from, out T value) ||
            !Strings.Linear(cpu, insn, Seg.Es, cpu->Rdi & mask, (uint)sizeof(T), true, out ulong to) ||
            !Mem.Write(cpu, to, value))
        {
            return false;
        }

        ulong step = Strings.Step<T>(cpu);
        Strings.Set(cpu, insn, Reg.Rsi, cpu->Rsi + step);
        Strings.Set(cpu, insn, Reg.Rdi, cpu->Rdi + step);
        return true;
    }

    public static ulong Fast<T>(CpuContext* cpu, Insn* insn, ulong count)
        where T : unmanaged
    {
        if ((cpu->RflagsSystem & Rflags.Df) != 0 || insn->AddressSize == 2)
        {
            return 0;
        }

        ulong mask = Strings.Mask(insn);
        ulong source = cpu->Rsi & mask;
        ulong target = cpu->Rdi & mask;
        ulong from = source + CpuContext.Segment(cpu, insn->Segment)->EffectiveBase;
        ulong to = target + CpuContext.Segment(cpu, Seg.Es)->EffectiveBase;
        ulong number = Math.Min(count, Math.Min(Strings.InPage(from, (uint)sizeof(T)), Strings.InPage(to, (uint)sizeof(T))));
        if (number < 2)
        {
            return 0;
        }

        var bytes = (uint)(number * (uint)sizeof(T));
        if ((insn->Flags & InsnFlags.SegmentCheck) != 0 &&
            (!Segmentation.Inside(cpu, insn->Segment, source, bytes, false, out from) ||
            !Segmentation.Inside(cpu, Seg.Es, target, bytes, true, out to)))
        {
            return 0;
        }

        byte* read = Mem.ReadPointer(cpu, from, bytes);
        byte* write = Mem.WritePointer(cpu, to, bytes);
        if (read == null || write == null)
        {
            return 0;
        }

        // Overlap upwards replicates: "rep movsb" with the target just behind the source is a fill idiom.
        if (write > read && write < read + bytes)
        {
            for (uint i = 0; i < number; i++)
            {
                // SAFETY: both pointers were given for "bytes" bytes, which are number elements inside one page each.
                ((T*)write)[i] = ((T*)read)[i];
            }
        }
        else
        {
            Buffer.MemoryCopy(read, write, bytes, bytes);
        }

        Strings.Set(cpu, insn, Reg.Rsi, source + bytes);
        Strings.Set(cpu, insn, Reg.Rdi, target + bytes);
        return number;
    }
}

internal readonly unsafe struct Stos : IBulkString
{
    public static bool One<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong value = cpu->Rax;
        if (!Strings.Linear(
                cpu, insn, Seg.Es, cpu->Rdi & Strings.Mask(insn), (uint)sizeof(T), true, out ulong to) ||
            !Mem.Write(cpu, to, *(T*)&value))
        {
            return false;
        }

        ulong step = Strings.Step<T>(cpu);
        Strings.Set(cpu, insn, Reg.Rdi, cpu->Rdi + step);
        return true;
    }

    public static ulong Fast<T>(CpuContext* cpu, Insn* insn, ulong count)
        where T : unmanaged
    {
        if ((cpu->RflagsSystem & Rflags.Df) != 0 || insn->AddressSize == 2)
        {
            return 0;
        }

        ulong target = cpu->Rdi & Strings.Mask(insn);
        ulong to = target + CpuContext.Segment(cpu, Seg.Es)->EffectiveBase;
        ulong number = Math.Min(count, Strings.InPage(to, (uint)sizeof(T)));
        if (number < 2)
        {
            return 0;
        }

        var bytes = (uint)(number * (uint)sizeof(T));
        if ((insn->Flags & InsnFlags.SegmentCheck) != 0 &&
            !Segmentation.Inside(cpu, Seg.Es, target, bytes, true, out to))
        {
            return 0;
        }

        byte* write = Mem.WritePointer(cpu, to, bytes);
        if (write == null)
        {
            return 0;
        }

        ulong value = cpu->Rax;
        new Span<T>(write, (int)number).Fill(*(T*)&value);
        Strings.Set(cpu, insn, Reg.Rdi, target + bytes);
        return number;
    }
}

internal readonly unsafe struct Lods : IStringOperation
{
    public static bool Compares => false;

    public static bool One<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Strings.Linear(
                cpu, insn, insn->Segment, cpu->Rsi & Strings.Mask(insn), (uint)sizeof(T), false, out ulong from) ||
            !Mem.Read(cpu, from, out T value))
        {
            return false;
        }

        ulong step = Strings.Step<T>(cpu);
        Reg.Set<T>(cpu, Reg.Rax, Reg.Load<T>((byte*)&value));
        Strings.Set(cpu, insn, Reg.Rsi, cpu->Rsi + step);
        return true;
    }
}

internal readonly unsafe struct Scas : IStringOperation
{
    public static bool Compares => true;

    public static bool One<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Strings.Linear(
                cpu, insn, Seg.Es, cpu->Rdi & Strings.Mask(insn), (uint)sizeof(T), false, out ulong from) ||
            !Mem.Read(cpu, from, out T raw))
        {
            return false;
        }

        ulong step = Strings.Step<T>(cpu);
        ulong left = Reg.Get<T>(cpu, Reg.Rax);
        ulong right = Reg.Load<T>((byte*)&raw);
        Flags.Sub<T>(cpu, left, right, Reg.Truncate<T>(left - right));
        Strings.Set(cpu, insn, Reg.Rdi, cpu->Rdi + step);
        return true;
    }
}

internal readonly unsafe struct Cmps : IStringOperation
{
    public static bool Compares => true;

    public static bool One<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        ulong mask = Strings.Mask(insn);
        if (!Strings.Linear(cpu, insn, insn->Segment, cpu->Rsi & mask, (uint)sizeof(T), false, out ulong first) ||
            !Mem.Read(cpu, first, out T one) ||
            !Strings.Linear(cpu, insn, Seg.Es, cpu->Rdi & mask, (uint)sizeof(T), false, out ulong second) ||
            !Mem.Read(cpu, second, out T two))
        {
            return false;
        }

        ulong step = Strings.Step<T>(cpu);
        ulong left = Reg.Load<T>((byte*)&one);
        ulong right = Reg.Load<T>((byte*)&two);
        Flags.Sub<T>(cpu, left, right, Reg.Truncate<T>(left - right));
        Strings.Set(cpu, insn, Reg.Rsi, cpu->Rsi + step);
        Strings.Set(cpu, insn, Reg.Rdi, cpu->Rdi + step);
        return true;
    }
}

internal readonly unsafe struct InsForm : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        bool repeated = Strings.IsRepeated(insn);
        ulong count = repeated ? Strings.Count(cpu, insn) : 1;

        // The permission is checked even for a count of zero.
        if (!PortIo.Allowed(cpu, (ushort)cpu->Rdx, sizeof(T)))
        {
            return Status.Fault;
        }

        if (count == 0)
        {
            return Status.Next;
        }

        ulong budget = Strings.Budget(cpu, Strings.SlowBatch);
        for (ulong i = 0; i < budget && count != 0; i++)
        {
            ulong offset = cpu->Rdi & Strings.Mask(insn);

            // The store is checked before the port is read, whose effect cannot be undone.
            if (!Strings.Linear(cpu, insn, Seg.Es, offset, (uint)sizeof(T), true, out ulong to) ||
                !Mem.ProbeWrite(cpu, to, sizeof(T)))
            {
                return Status.Fault;
            }

            uint value = PortIo.Read(cpu, (ushort)cpu->Rdx, sizeof(T));
            if (!Mem.WriteBytes(cpu, to, (byte*)&value, sizeof(T)))
            {
                return Status.Fault;
            }

            ulong step = Strings.Step<T>(cpu);
            Strings.Set(cpu, insn, Reg.Rdi, cpu->Rdi + step);
            count--;
            if (repeated)
            {
                Strings.Set(cpu, insn, Reg.Rcx, count);
            }
        }

        return repeated ? Strings.Again(cpu, insn) : Status.Next;
    }
}

internal readonly unsafe struct OutsForm : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        bool repeated = Strings.IsRepeated(insn);
        ulong count = repeated ? Strings.Count(cpu, insn) : 1;

        // The permission is checked even for a count of zero.
        if (!PortIo.Allowed(cpu, (ushort)cpu->Rdx, sizeof(T)))
        {
            return Status.Fault;
        }

        if (count == 0)
        {
            return Status.Next;
        }

        ulong budget = Strings.Budget(cpu, Strings.SlowBatch);
        for (ulong i = 0; i < budget && count != 0; i++)
        {
            ulong offset = cpu->Rsi & Strings.Mask(insn);
            if (!Strings.Linear(cpu, insn, insn->Segment, offset, (uint)sizeof(T), false, out ulong from) ||
                !Mem.Read(cpu, from, out T value))
            {
                return Status.Fault;
            }

            PortIo.Write(cpu, (ushort)cpu->Rdx, sizeof(T), (uint)Reg.Load<T>((byte*)&value));
            ulong step = Strings.Step<T>(cpu);
            Strings.Set(cpu, insn, Reg.Rsi, cpu->Rsi + step);
            count--;
            if (repeated)
            {
                Strings.Set(cpu, insn, Reg.Rcx, count);
            }
        }

        return repeated ? Strings.Again(cpu, insn) : Status.Next;
    }
}

/// <summary>IN and OUT.</summary>
internal static unsafe class PortIo
{
    /// <summary>CPL against IOPL, then the permission bitmap; false after #GP(0).</summary>
    public static bool Allowed(CpuContext* cpu, uint port, int width)
    {
        if (cpu->Mode == ProcessorMode.Real)
        {
            return true;
        }

        if (cpu->Mode != ProcessorMode.Virtual8086 && cpu->Cpl <= (int)((cpu->RflagsSystem >> 12) & 3))
        {
            return true;
        }

        if (!Tasks.PortAllowed(cpu, port, width, out bool allowed))
        {
            return false;
        }

        if (!allowed)
        {
            Faults.Gp(cpu);
        }

        return allowed;
    }

    public static uint Read(CpuContext* cpu, uint port, int width)
    {
        Breakpoints.Io(cpu, port, width);
        return DevicePort.ReadPort(cpu, port, width);
    }

    public static void Write(CpuContext* cpu, uint port, int width, uint value)
    {
        Breakpoints.Io(cpu, port, width);
        DevicePort.WritePort(cpu, port, width, value);
    }
}

/// <summary>IN: port in Immediate, or DX when R1 is set.</summary>
internal readonly unsafe struct InForm : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        uint port = insn->R1 != 0 ? (ushort)cpu->Rdx : (uint)(byte)insn->Immediate;
        if (!PortIo.Allowed(cpu, port, sizeof(T)))
        {
            return Status.Fault;
        }

        Reg.Set<T>(cpu, Reg.Rax, PortIo.Read(cpu, port, sizeof(T)));
        return Insn.EndAndLook(cpu, insn);
    }
}

/// <summary>OUT.</summary>
internal readonly unsafe struct OutForm : IForm
{
    public static Status Run<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        uint port = insn->R1 != 0 ? (ushort)cpu->Rdx : (uint)(byte)insn->Immediate;
        if (!PortIo.Allowed(cpu, port, sizeof(T)))
        {
            return Status.Fault;
        }

        PortIo.Write(cpu, port, sizeof(T), (uint)Reg.Get<T>(cpu, Reg.Rax));
        return Insn.EndAndLook(cpu, insn);
    }
}

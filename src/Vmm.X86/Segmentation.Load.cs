// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.X86;

/// <summary>A segment or gate descriptor as read from a table.</summary>
internal struct Descriptor
{
    /// <summary>First eight bytes.</summary>
    public ulong Low;

    /// <summary>Second eight bytes of 16-byte system descriptors in long mode.</summary>
    public ulong High;

    /// <summary>Linear address of the descriptor.</summary>
    public ulong At;

    /// <summary>Rights in SegmentRegister's layout.</summary>
    public readonly uint Rights => (uint)(Low >> 40) & 0xF0FF;

    public readonly uint Type => (uint)(Low >> 40) & 0xF;

    public readonly bool IsSystem => (Low & (1UL << 44)) == 0;

    public readonly bool IsCode => (Low & (3UL << 43)) == 3UL << 43;

    public readonly bool IsConforming => (Low & (1UL << 42)) != 0;

    public readonly bool IsReadWrite => (Low & (1UL << 41)) != 0;

    public readonly bool IsPresent => (Low & (1UL << 47)) != 0;

    public readonly bool IsLongCode => (Low & (1UL << 53)) != 0;

    public readonly bool IsDefault32 => (Low & (1UL << 54)) != 0;

    public readonly int Dpl => (int)(Low >> 45) & 3;

    public readonly ulong Base => ((Low >> 16) & 0xFFFFFF) | ((Low >> 32) & 0xFF000000);

    public readonly uint Limit
    {
        get
        {
            var limit = (uint)((Low & 0xFFFF) | ((Low >> 32) & 0xF0000));
            return (Low & (1UL << 55)) != 0 ? (limit << 12) | 0xFFF : limit;
        }
    }

    /// <summary>Gates: target selector.</summary>
    public readonly ushort GateSelector => (ushort)(Low >> 16);

    /// <summary>Gates: 32-bit target offset.</summary>
    public readonly uint GateOffset => (uint)((Low & 0xFFFF) | ((Low >> 32) & 0xFFFF0000));

    /// <summary>Call gates: parameters to copy.</summary>
    public readonly int GateParameters => (int)(Low >> 32) & 0x1F;
}

internal static unsafe partial class Segmentation
{
    /// <summary>Reads a descriptor; false after raising <paramref name="vector"/> with the selector.</summary>
    public static bool Fetch(CpuContext* cpu, uint selector, byte vector, out Descriptor descriptor)
    {
        descriptor = default;
        ulong table;
        uint limit;
        if ((selector & 4) != 0)
        {
            SegmentRegister* ldt = CpuContext.Segment(cpu, Seg.Ldtr);
            if (ldt->Unusable)
            {
                Raise(cpu, vector, selector);
                return false;
            }

            table = ldt->Base;
            limit = ldt->Limit;
        }
        else
        {
            table = cpu->GdtBase;
            limit = cpu->GdtLimit;
        }

        if ((selector | 7) > limit)
        {
            Raise(cpu, vector, selector);
            return false;
        }

        descriptor.At = table + (selector & 0xFFF8);
        return Paging.ReadSystem(cpu, descriptor.At, out descriptor.Low);
    }

    /// <summary>Reads the second half of a 16-byte system descriptor.</summary>
    public static bool FetchHigh(CpuContext* cpu, uint selector, byte vector, ref Descriptor descriptor)
    {
        uint limit = (selector & 4) != 0 ? CpuContext.Segment(cpu, Seg.Ldtr)->Limit : cpu->GdtLimit;
        if ((selector | 7) + 8 > limit)
        {
            Raise(cpu, vector, selector);
            return false;
        }

        if (!Paging.ReadSystem(cpu, descriptor.At + 8, out descriptor.High))
        {
            return false;
        }

        // The type field of the second half must be 0 (SDM 3A 3.5.2).
        if ((descriptor.High & 0x1F00_00000000) != 0)
        {
            Raise(cpu, vector, selector);
            return false;
        }

        return true;
    }

    /// <summary>A selector fault: error code with the RPL removed and the EXT bit of a delivery in progress.</summary>
    public static Status Raise(CpuContext* cpu, byte vector, uint selector) =>
        Faults.Raise(cpu, vector, (selector & 0xFFFC) | (uint)cpu->ExternalBit);

    /// <summary>Sets the accessed bit in memory.</summary>
    public static bool MarkAccessed(CpuContext* cpu, ref Descriptor descriptor)
    {
        if ((descriptor.Low & (1UL << 40)) != 0)
        {
            return true;
        }

        descriptor.Low |= 1UL << 40;
        return Paging.WriteSystem(cpu, descriptor.At + 5, (byte)(descriptor.Low >> 40));
    }

    /// <summary>Fills a register from a descriptor.</summary>
    public static void Assign(CpuContext* cpu, int index, uint selector, in Descriptor descriptor)
    {
        SegmentRegister* segment = CpuContext.Segment(cpu, index);
        segment->Selector = (ushort)selector;
        segment->Base = descriptor.Base;
        segment->EffectiveBase = descriptor.Base;
        segment->Limit = descriptor.Limit;
        segment->Rights = descriptor.Rights;
    }

    /// <summary>Fills a register as real mode (limit and rights stay) or virtual-8086 mode does.</summary>
    public static void AssignReal(CpuContext* cpu, int index, uint selector)
    {
        SegmentRegister* segment = CpuContext.Segment(cpu, index);
        segment->Selector = (ushort)selector;
        segment->Base = (ulong)(selector & 0xFFFF) << 4;
        segment->EffectiveBase = segment->Base;
        if (cpu->Mode == ProcessorMode.Virtual8086)
        {
            segment->Limit = 0xFFFF;
            segment->Rights = 0xF3;
        }
        else
        {
            segment->Rights &= ~UnusableBit;
            if (index == Seg.Cs)
            {
                // CS becomes writable and readable data-like: 16-bit, present, DPL 0; the limit stays.
                segment->Rights = 0x93;
            }
        }
    }

    /// <summary>Loads a null selector into ES, DS, FS, GS (or SS in 64-bit mode): base and limit are cleared.</summary>
    public static void AssignNull(CpuContext* cpu, int index, uint selector)
    {
        SegmentRegister* segment = CpuContext.Segment(cpu, index);
        *segment = default;
        segment->Selector = (ushort)selector;
        segment->Rights = UnusableBit;
        if (index == Seg.Ss)
        {
            // SS of 64-bit mode: the DPL follows the CPL.
            segment->Rights |= DefaultBit | PresentBit | 0x13 | ((uint)(selector & 3) << 5);
            segment->Limit = 0xFFFFFFFF;
        }
    }

    /// <summary>MOV, POP and LxS into ES, SS, DS, FS or GS. The caller updates the mode.</summary>
    public static bool Load(CpuContext* cpu, int index, uint selector)
    {
        selector &= 0xFFFF;
        if (cpu->Mode <= ProcessorMode.Virtual8086)
        {
            AssignReal(cpu, index, selector);
            return true;
        }

        if ((selector & 0xFFFC) == 0)
        {
            if (index == Seg.Ss && (cpu->Mode != ProcessorMode.Long || cpu->Cpl == 3 || (selector & 3) != cpu->Cpl))
            {
                Faults.Gp(cpu);
                return false;
            }

            AssignNull(cpu, index, selector);
            return true;
        }

        if (!Fetch(cpu, selector, Vector.GeneralProtection, out Descriptor descriptor))
        {
            return false;
        }

        int rpl = (int)selector & 3;
        if (index == Seg.Ss)
        {
            if (rpl != cpu->Cpl || descriptor.IsSystem || descriptor.IsCode || !descriptor.IsReadWrite ||
                descriptor.Dpl != cpu->Cpl)
            {
                Raise(cpu, Vector.GeneralProtection, selector);
                return false;
            }

            if (!descriptor.IsPresent)
            {
                Raise(cpu, Vector.StackFault, selector);
                return false;
            }
        }
        else
        {
            bool bad = descriptor.IsSystem || (descriptor.IsCode && !descriptor.IsReadWrite);
            if (!descriptor.IsCode || !descriptor.IsConforming)
            {
                bad |= rpl > descriptor.Dpl || cpu->Cpl > descriptor.Dpl;
            }

            if (!Accept(cpu, selector, descriptor, bad))
            {
                return false;
            }
        }

        if (!MarkAccessed(cpu, ref descriptor))
        {
            return false;
        }

        Assign(cpu, index, selector, descriptor);
        return true;
    }

    /// <summary>
    /// Checks a code descriptor for a transfer that stays at the current privilege level (far JMP and CALL).
    /// </summary>
    public static bool CheckCode(CpuContext* cpu, uint selector, in Descriptor descriptor)
    {
        int rpl = (int)selector & 3;
        bool bad = descriptor.IsSystem || !descriptor.IsCode;
        bad |= descriptor.IsConforming
            ? descriptor.Dpl > cpu->Cpl
            : rpl > cpu->Cpl || descriptor.Dpl != cpu->Cpl;
        bad |= IsLongActive(cpu) && descriptor.IsLongCode && descriptor.IsDefault32;
        return Accept(cpu, selector, descriptor, bad);
    }

    /// <summary>Fetches what may stand in the GDT only: TSS and LDT. #GP(selector) otherwise.</summary>
    public static bool FetchGlobal(CpuContext* cpu, uint selector, out Descriptor descriptor)
    {
        if ((selector & 4) == 0)
        {
            return Fetch(cpu, selector, Vector.GeneralProtection, out descriptor);
        }

        descriptor = default;
        Raise(cpu, Vector.GeneralProtection, selector);
        return false;
    }

    /// <summary>
    /// Fetches the segment behind a call, interrupt or trap gate: code, not less privileged, and 64-bit code in long mode.
    /// That it is present is asked later (<see cref="Accept"/>), because #GP goes first.
    /// </summary>
    public static bool FetchGateCode(CpuContext* cpu, uint selector, out Descriptor code)
    {
        code = default;
        if ((selector & 0xFFFC) == 0)
        {
            Raise(cpu, Vector.GeneralProtection, 0);
            return false;
        }

        if (!Fetch(cpu, selector, Vector.GeneralProtection, out code))
        {
            return false;
        }

        bool bad = code.IsSystem || !code.IsCode || code.Dpl > cpu->Cpl ||
            (IsLongActive(cpu) && (!code.IsLongCode || code.IsDefault32));
        if (bad)
        {
            Raise(cpu, Vector.GeneralProtection, selector);
        }

        return !bad;
    }

    /// <summary>What checks of a descriptor end with: #GP(selector) when it is bad, #NP(selector) when it is not present.</summary>
    public static bool Accept(CpuContext* cpu, uint selector, in Descriptor descriptor, bool bad)
    {
        if (bad)
        {
            Raise(cpu, Vector.GeneralProtection, selector);
            return false;
        }

        if (!descriptor.IsPresent)
        {
            Raise(cpu, Vector.SegmentNotPresent, selector);
            return false;
        }

        return true;
    }

    /// <summary>True when an instruction pointer is valid in a code segment; raises #GP(0) otherwise.</summary>
    public static bool CheckTarget(CpuContext* cpu, in Descriptor code, ulong target)
    {
        bool ok = IsLongActive(cpu) && code.IsLongCode
            ? Paging.IsCanonical(cpu, target)
            : target <= code.Limit;
        if (!ok)
        {
            Faults.Raise(cpu, Vector.GeneralProtection, (uint)cpu->ExternalBit);
        }

        return ok;
    }

    /// <summary>Loads CS from a checked descriptor, with the RPL set to the new privilege level.</summary>
    public static bool AssignCode(CpuContext* cpu, uint selector, ref Descriptor descriptor, int cpl)
    {
        if (!MarkAccessed(cpu, ref descriptor))
        {
            return false;
        }

        Assign(cpu, Seg.Cs, (selector & 0xFFFC) | (uint)cpl, descriptor);
        cpu->Cpl = cpl;
        return true;
    }

    /// <summary>EFER.LMA.</summary>
    public static bool IsLongActive(CpuContext* cpu) => (cpu->Efer & Efer.Lma) != 0;

    /// <summary>
    /// After a return to an outer level: data segments that the new level may not hold become null (SDM 2B, RET).
    /// </summary>
    public static void DropPrivileged(CpuContext* cpu, int index)
    {
        SegmentRegister* segment = CpuContext.Segment(cpu, index);
        if (segment->Unusable)
        {
            return;
        }

        bool conformingCode = (segment->Rights & (CodeBit | DirectionBit)) == (CodeBit | DirectionBit);
        if (!conformingCode && segment->Dpl < cpu->Cpl)
        {
            // The base stays: in 64-bit mode FS and GS go on addressing with it.
            segment->Selector = 0;
            segment->Rights |= UnusableBit;
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;

namespace Vmm.X86;

/// <summary>Segments: limit and type checks, stack addressing (SDM 3A chapters 3 and 5).</summary>
internal static unsafe partial class Segmentation
{
    /// <summary>Bit 16 of SegmentRegister.Rights: no descriptor loaded.</summary>
    public const uint UnusableBit = 1U << 16;

    /// <summary>Accessed (data and code).</summary>
    public const uint AccessedBit = 1;

    /// <summary>Writable data, readable code.</summary>
    public const uint ReadWriteBit = 2;

    /// <summary>Expand-down data, conforming code.</summary>
    public const uint DirectionBit = 4;

    /// <summary>Code.</summary>
    public const uint CodeBit = 8;

    /// <summary>S: code or data rather than a system descriptor.</summary>
    public const uint CodeDataBit = 0x10;

    /// <summary>P.</summary>
    public const uint PresentBit = 0x80;

    /// <summary>L: 64-bit code.</summary>
    public const uint LongBit = 1U << 13;

    /// <summary>D/B.</summary>
    public const uint DefaultBit = 1U << 14;

    /// <summary>G.</summary>
    public const uint GranularityBit = 1U << 15;

    /// <summary>Linear address of an operand outside 64-bit mode, with all checks; false after #GP(0) or #SS(0).</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static bool Linear(CpuContext* cpu, int index, ulong offset, uint size, bool write, out ulong linear)
    {
        SegmentRegister* segment = CpuContext.Segment(cpu, index);
        linear = (segment->Base + offset) & 0xFFFFFFFF;
        uint rights = segment->Rights;
        bool ok = (rights & UnusableBit) == 0;
        bool expandDown = (rights & (CodeBit | DirectionBit)) == DirectionBit;
        if (cpu->Mode > ProcessorMode.Virtual8086)
        {
            if (write)
            {
                ok &= (rights & (CodeBit | ReadWriteBit)) == ReadWriteBit;
            }
            else
            {
                ok &= (rights & (CodeBit | ReadWriteBit)) != CodeBit;
            }
        }

        ulong last = offset + size - 1;
        if (expandDown)
        {
            ulong top = (rights & DefaultBit) != 0 ? 0xFFFFFFFF : 0xFFFF;
            ok &= offset > segment->Limit && last <= top;
        }
        else
        {
            ok &= last <= segment->Limit;
        }

        if (ok)
        {
            return true;
        }

        if (index == Seg.Ss)
        {
            Faults.Ss(cpu);
        }
        else
        {
            Faults.Gp(cpu);
        }

        return false;
    }

    /// <summary>Like Linear, but raises nothing: for fast paths that fall back when false.</summary>
    public static bool Inside(CpuContext* cpu, int index, ulong offset, uint size, bool write, out ulong linear)
    {
        FaultInfo kept = cpu->Fault;
        bool inside = Linear(cpu, index, offset, size, write, out linear);
        cpu->Fault = kept;
        return inside && linear + size <= 0x1_0000_0000;
    }

    /// <summary>Linear address of a stack slot at an offset that is already masked with StackMask.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool StackLinear(CpuContext* cpu, ulong offset, uint size, bool write, out ulong linear)
    {
        if (cpu->StackFlat != 0)
        {
            linear = offset;
            return true;
        }

        return Linear(cpu, Seg.Ss, offset, size, write, out linear);
    }
}

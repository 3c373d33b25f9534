// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.X86;

/// <summary>128-bit compare-exchange on guest memory.</summary>
internal static unsafe class Wide
{
    /// <summary>
    /// CMPXCHG16B. The runtime offers no 128-bit atomic: the operation excludes other 128-bit operations of the VM and
    /// replaces the halves with 64-bit compare-exchanges.
    /// </summary>
    public static UInt128 CompareExchange(CpuContext* cpu, byte* at, UInt128 desired, UInt128 expected)
    {
        Mem.LockSplit(cpu);
        UInt128 seen = new(*(ulong*)(at + 8), *(ulong*)at);
        if (seen == expected)
        {
            *(ulong*)at = (ulong)desired;
            *(ulong*)(at + 8) = (ulong)(desired >> 64);
        }

        Mem.UnlockSplit(cpu);
        return seen;
    }
}

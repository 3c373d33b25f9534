// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;

namespace Vmm.X86;

/// <summary>
/// Numbers that address spaces have in TLB tags. A flush gives the address space a new number; when the numbers run
/// out, everything is wiped and they start again.
/// </summary>
internal static unsafe class Asids
{
    /// <summary>Entries of CpuContext.PcidAsids.</summary>
    public const int Pcids = 4096;

    private const uint Last = 4095;

    /// <summary>Loads the translations of a PCID; <paramref name="keep"/> when those from before may be used.</summary>
    public static void Switch(CpuContext* cpu, uint pcid, bool keep)
    {
        uint asid = cpu->PcidAsids[pcid];
        if (!keep || asid == 0)
        {
            asid = Allocate(cpu);
            cpu->PcidAsids[pcid] = (ushort)asid;
        }

        if (cpu->TlbAsid != asid)
        {
            cpu->TlbAsid = asid;
            Sites.Drop(cpu);
        }
    }

    /// <summary>Forgets the translations of a PCID other than the current one.</summary>
    public static void Forget(CpuContext* cpu, uint pcid) => cpu->PcidAsids[pcid] = 0;

    /// <summary>Forgets everything, global pages included.</summary>
    public static void Reset(CpuContext* cpu)
    {
        Unsafe.InitBlock(cpu->PcidAsids, 0, Pcids * sizeof(ushort));
        Switch(cpu, CurrentPcid(cpu), false);
    }

    /// <summary>PCID of CR3, 0 when CR4.PCIDE is clear.</summary>
    public static uint CurrentPcid(CpuContext* cpu) =>
        (cpu->Cr4 & Cr4.PcidE) != 0 ? (uint)cpu->Cr3 & 0xFFF : 0;

    private static uint Allocate(CpuContext* cpu)
    {
        if (cpu->LastAsid == Last)
        {
            Unsafe.InitBlock(cpu->Tlbs, 0, (uint)(sizeof(TlbEntry) * TlbEntry.Count * TlbEntry.Tables));
            Unsafe.InitBlock(cpu->PcidAsids, 0, Pcids * sizeof(ushort));
            cpu->Blocks.ForgetAll();
            cpu->LastAsid = 0;
            Sites.Drop(cpu);
        }

        return ++cpu->LastAsid;
    }
}

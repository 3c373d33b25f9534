// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;

namespace Vmm.X86;

/// <summary>
/// Numbers in TLB tags. Each address space has one, and a flush gives it a new one. The supervisor's TLB has a number of its
/// own that stays the same across address spaces: nearly all that it holds is global (the kernel), and the entries that are
/// not are listed and removed when the address space changes. When the numbers run out, everything is wiped and they start
/// again.
/// </summary>
internal static unsafe class Asids
{
    /// <summary>Entries of CpuContext.PcidAsids.</summary>
    public const int Pcids = 4096;

    /// <summary>Entries of CpuContext.PrivateSlots.</summary>
    public const int MaxPrivate = 64;

    private const uint Last = 4095;

    /// <summary>Loads the translations of a PCID; <paramref name="keep"/> when those from before may be used.</summary>
    public static void Switch(CpuContext* cpu, uint pcid, bool keep)
    {
        ulong asid = cpu->PcidAsids[pcid];
        if (!keep || asid == 0)
        {
            asid = Allocate(cpu);
            cpu->PcidAsids[pcid] = (ushort)asid;
        }

        if (cpu->SpaceAsid != asid)
        {
            cpu->SpaceAsid = asid;
            cpu->SpaceSwitches++;
            ForgetPrivate(cpu);
        }

        SelectTag(cpu);
    }

    /// <summary>Forgets the translations of a PCID other than the current one.</summary>
    public static void Forget(CpuContext* cpu, uint pcid) => cpu->PcidAsids[pcid] = 0;

    /// <summary>Forgets everything, global pages included.</summary>
    public static void Reset(CpuContext* cpu)
    {
        Unsafe.InitBlock(cpu->PcidAsids, 0, Pcids * sizeof(ushort));
        cpu->GlobalAsid = Allocate(cpu);
        cpu->PrivateCount = 0;
        Switch(cpu, CurrentPcid(cpu), false);
    }

    /// <summary>PCID of CR3, 0 when CR4.PCIDE is clear.</summary>
    public static uint CurrentPcid(CpuContext* cpu) =>
        (cpu->Cr4 & Cr4.PcidE) != 0 ? (uint)cpu->Cr3 & 0xFFF : 0;

    /// <summary>The number in valid tags of a mode's TLB.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Of(CpuContext* cpu, MmuMode mode) =>
        mode == MmuMode.Supervisor ? cpu->GlobalAsid : cpu->SpaceAsid;

    /// <summary>Makes CpuContext.TlbAsid fit CpuContext.Tlb.</summary>
    public static void SelectTag(CpuContext* cpu) =>
        cpu->TlbAsid = cpu->Tlb == cpu->Tlbs ? cpu->GlobalAsid : cpu->SpaceAsid;

    /// <summary>Notes an entry of the supervisor's TLB that belongs to the present address space alone.</summary>
    public static void AddPrivate(CpuContext* cpu, uint slot)
    {
        if (cpu->PrivateCount < MaxPrivate)
        {
            cpu->PrivateSlots[cpu->PrivateCount] = (ushort)slot;
        }

        cpu->PrivateCount = cpu->PrivateCount <= MaxPrivate ? cpu->PrivateCount + 1 : cpu->PrivateCount;
    }

    // The address space has changed: what the supervisor's TLB and the sites hold of the old one goes.
    private static void ForgetPrivate(CpuContext* cpu)
    {
        if (cpu->PrivateCount == 0)
        {
            Sites.DropSpace(cpu);
            return;
        }

        if (cpu->PrivateCount > MaxPrivate)
        {
            cpu->GlobalAsid = Allocate(cpu);
        }
        else
        {
            for (int i = 0; i < cpu->PrivateCount; i++)
            {
                // SAFETY: AddPrivate noted the index of an entry of the first table.
                cpu->Tlbs[cpu->PrivateSlots[i]].ReadTag = 0;
                cpu->Tlbs[cpu->PrivateSlots[i]].WriteTag = 0;
            }
        }

        cpu->PrivateCount = 0;
        Sites.Drop(cpu);
    }

    private static uint Allocate(CpuContext* cpu)
    {
        if (cpu->LastAsid == Last)
        {
            Unsafe.InitBlock(cpu->Tlbs, 0, (uint)(sizeof(TlbEntry) * TlbEntry.Count * TlbEntry.Tables));
            Unsafe.InitBlock(cpu->PcidAsids, 0, Pcids * sizeof(ushort));
            cpu->Blocks.ForgetAll();
            Sites.Drop(cpu);
            cpu->PrivateCount = 0;

            // Both numbers in use are of the old count.
            cpu->GlobalAsid = 1;
            cpu->SpaceAsid = 2;
            cpu->PcidAsids[CurrentPcid(cpu)] = 2;
            cpu->LastAsid = 2;
            SelectTag(cpu);
        }

        return ++cpu->LastAsid;
    }
}

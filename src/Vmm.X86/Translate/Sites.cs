// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.InteropServices;

namespace Vmm.X86;

// Sites: translations that places in generated code keep for themselves, so that an access which stays in one page is
// checked by a subtraction and a comparison instead of a look into the TLB:
//
//     lea T1, [ea]; sub T1, gs:[Low]; cmp T1, gs:[Limit]; jae cold
//     mov T1, gs:[Addend]
//
// A site says that linear addresses from Low on, Limit of them, may be accessed at linear + Addend by accesses of the
// site's class; an empty one has Limit 0, which no address is below. Cold code asks the TLB and, when that knows the page,
// fills the site, with as many neighbouring pages as the TLB has that lie side by side in the host, too
// (CodeStubs.FillSite); otherwise the handler executes the instruction.
//
// Where T0 is wanted for something else, or several operands are checked together (Translator.Groups.cs), the last
// instruction is add T1, gs:[HostLow] instead: T1 is then where the operand is in the host.
//
// Classes. A site belongs to a privilege mode, is for loads or for stores, and for operands of up to 8, 32 or 128 bytes
// (Limit leaves room for the longest). Each class has a ring of sites; places take the next one when they are translated,
// so that places of one loop have different ones. Operands on the stack share the first of their ring.
//
// A place whose addresses wander from page to page misses its site all the time, and mispredicts the branch. FillSite
// notices, the helper notes it for the instruction (Block.TlbInsns), and the block is translated anew with a look into the
// TLB in that place. At levels 0 to 2 all operands that are not on the stack are looked up there from the beginning:
//
//     lea T1, [ea]; shr T1, 12-5; and T1, entries      the entry of the first byte's page
//     lea T0, [ea + size - 1]; and T0, -4096; or T0, asid
//     cmp T0, gs:[T1 + tag]; jne slow                   the last byte's page: a crossing never matches
//     mov T1, gs:[T1 + addend]                          (a store looks at the page's flags before)
//
// Page flags. A store must not go past the flags of its page (dirty bits, decoded code). Sites for stores therefore exist
// only for pages of the main memory whose flags are exactly "written"; nobody but vCPUs takes such flags away there, by
// decoding code from the page, and then every vCPU empties its sites for stores before the new block counts as settled
// (SoftVcpu.Decode.cs, BlockCache.cs). Memory whose dirty flags somebody clears while the guest runs (a display's, a slot
// with a dirty log) gets none: stores look at the flags each time.
//
// Flushes. Whatever removes a translation from the TLB empties the sites as well, all of them: the journal names those
// that are filled, and few are, since code runs in few places between two flushes. So the rule for the TLB (Tlb.cs) holds
// for sites: they never outlive a flush, a change of address space or of memory slots.

/// <summary>A translation cached for a place in generated code.</summary>
[StructLayout(LayoutKind.Explicit, Size = Sites.EntryBytes)]
internal struct SiteEntry
{
    public const int LowOffset = 0;
    public const int LimitOffset = 8;
    public const int AddendOffset = 16;
    public const int HostLowOffset = 24;

    [FieldOffset(LowOffset)]
    public ulong Low;

    [FieldOffset(LimitOffset)]
    public ulong Limit;

    /// <summary>Host address minus linear address.</summary>
    [FieldOffset(AddendOffset)]
    public ulong Addend;

    /// <summary>Host address of Low: Low + Addend.</summary>
    [FieldOffset(HostLowOffset)]
    public ulong HostLow;
}

/// <summary>How a site does; apart from the sites, so that two of those fill a cache line.</summary>
[StructLayout(LayoutKind.Explicit, Size = Sites.CounterBytes)]
internal struct SiteCounter
{
    public const int MissesOffset = 0;
    public const int SinceOffset = 4;

    /// <summary>Accesses that the site did not have the page for.</summary>
    [FieldOffset(MissesOffset)]
    public uint Misses;

    /// <summary>Low half of the host's time stamp when Misses was last a multiple of Sites.MissesOfThrash.</summary>
    [FieldOffset(SinceOffset)]
    public uint Since;
}

/// <summary>Layout and flushing of the sites behind a context.</summary>
internal static unsafe class Sites
{
    /// <summary>Bytes of a <see cref="SiteEntry"/>; a power of two.</summary>
    public const int EntryBytes = 32;

    /// <summary>Bytes of a <see cref="SiteCounter"/>; a power of two.</summary>
    public const int CounterBytes = 8;

    /// <summary>How far an offset among the sites is shifted for that of the site's counter among the counters.</summary>
    public const int CounterShift = 2;

    /// <summary>Sites of a class with operands up to 8 bytes.</summary>
    public const int ShortRing = 512;

    /// <summary>Sites of a class with operands up to 32 bytes.</summary>
    public const int LongRing = 64;

    /// <summary>Sites of a class with groups of operands.</summary>
    public const int GroupRing = 256;

    /// <summary>Longest short operand.</summary>
    public const int ShortBytes = 8;

    /// <summary>Longest operand.</summary>
    public const int LongBytes = 32;

    /// <summary>Longest span of a group of operands.</summary>
    public const int GroupBytes = 128;

    /// <summary>Classes by length: short, long, group.</summary>
    public const int Lengths = 3;

    /// <summary>Privilege modes that have sites: all but the one whose TLB is empty.</summary>
    public const int Modes = 3;

    /// <summary>Classes with rings: privilege modes, loads and stores, lengths.</summary>
    public const int Classes = Modes * 2 * Lengths;

    /// <summary>One of so many misses of a filled site (a power of two) fills it anew.</summary>
    public const int MissesOfFill = 4;

    /// <summary>So many misses (a power of two) are looked at together.</summary>
    public const int MissesOfThrash = 64;

    /// <summary>With fewer of the host's cycles than this from miss to miss, a site does not pay.</summary>
    public const int CyclesOfThrash = 150;

    /// <summary>One of so many misses tries to grow (a power of two).</summary>
    public const int MissesOfGrowth = 16;

    /// <summary>Neighbouring pages that a fill tries on each side.</summary>
    public const int Growth = 16;

    /// <summary>All sites of a mode.</summary>
    public const int CountOfMode = 2 * (ShortRing + LongRing + GroupRing);

    /// <summary>All sites.</summary>
    public const int Count = Modes * CountOfMode;

    /// <summary>Number of a class, less than <see cref="Classes"/>.</summary>
    public static int Class(MmuMode mode, bool write, int size) =>
        (((int)mode * 2) + (write ? 1 : 0)) * Lengths + (size > LongBytes ? 2 : size > ShortBytes ? 1 : 0);

    /// <summary>The privilege mode of a class.</summary>
    public static int ModeOf(int kind) => kind / (2 * Lengths);

    /// <summary>A class' sites are for stores.</summary>
    public static bool IsStore(int kind) => (kind / Lengths & 1) != 0;

    /// <summary>Most bytes that a class' operands have.</summary>
    public static int BytesOf(int kind) => (kind % Lengths) switch
    {
        0 => ShortBytes,
        1 => LongBytes,
        _ => GroupBytes,
    };

    /// <summary>Offset of a site in the context, by class and number.</summary>
    public static int Offset(int kind, int number)
    {
        int first = kind / Lengths * (CountOfMode / 2);
        int inRing = (kind % Lengths) switch
        {
            0 => number & (ShortRing - 1),
            1 => ShortRing + (number & (LongRing - 1)),
            _ => ShortRing + LongRing + (number & (GroupRing - 1)),
        };
        return CpuContext.SitesOffset + ((first + inRing) * EntryBytes);
    }

    /// <summary>Empties all sites.</summary>
    // SAFETY: here and below: a journal holds offsets that the translator computed by Offset and FillSite entered once for
    // each site that went from empty to filled, so it has at most CountOfMode entries.
    public static void Drop(CpuContext* cpu)
    {
        for (int mode = 0; mode < Modes; mode++)
        {
            Drop(cpu, mode);
        }
    }

    /// <summary>Empties the sites of modes whose TLB belongs to one address space.</summary>
    public static void DropSpace(CpuContext* cpu)
    {
        Drop(cpu, (int)MmuMode.User);
        Drop(cpu, (int)MmuMode.SupervisorAc);
    }

    /// <summary>Empties the sites for stores: a page's flags are not "written" any more.</summary>
    public static void DropStores(CpuContext* cpu)
    {
        for (int mode = 0; mode < Modes; mode++)
        {
            int* journal = Journal(cpu, mode);
            for (int i = cpu->SiteCounts[mode] - 1; i >= 0; i--)
            {
                int half = (journal[i] - CpuContext.SitesOffset) / (CountOfMode / 2 * EntryBytes);
                if ((half & 1) != 0)
                {
                    ((SiteEntry*)((byte*)cpu + journal[i]))->Limit = 0;
                    journal[i] = journal[--cpu->SiteCounts[mode]];
                }
            }
        }
    }

    /// <summary>Empties the sites of a linear page.</summary>
    public static void DropPage(CpuContext* cpu, ulong linear)
    {
        // Of user pages, the supervisor's sites have at most what its TLB has: private entries.
        int first = (long)linear >= 0 && cpu->PrivateCount == 0 ? (int)MmuMode.User : 0;
        for (int mode = first; mode < Modes; mode++)
        {
            int* journal = Journal(cpu, mode);
            for (int i = cpu->SiteCounts[mode] - 1; i >= 0; i--)
            {
                var site = (SiteEntry*)((byte*)cpu + journal[i]);
                if ((linear & ~Mem.PageOffset) - site->Low < site->Limit + GroupBytes)
                {
                    site->Limit = 0;
                    journal[i] = journal[--cpu->SiteCounts[mode]];
                }
            }
        }
    }

    /// <summary>
    /// States where the flags of the main memory lie: of the largest slot that can be written and has no dirty log.
    /// </summary>
    // SAFETY: the table is the one that the VM has at the moment; a change of slots flushes and comes here again.
    public static void FindMainMemory(CpuContext* cpu)
    {
        SlotTable* table = cpu->Shared->Slots;
        cpu->SiteFlagsLow = 0;
        cpu->SiteFlagsLength = 0;
        for (int i = 0; i < table->Count; i++)
        {
            SlotInfo* slot = SlotTable.At(table, i);
            if (!slot->ReadOnly && !slot->LogDirty && slot->Length >> 12 > cpu->SiteFlagsLength)
            {
                cpu->SiteFlagsLow = (ulong)slot->PageFlags;
                cpu->SiteFlagsLength = slot->Length >> 12;
            }
        }
    }

    private static int* Journal(CpuContext* cpu, int mode) =>
        (int*)((byte*)cpu + CpuContext.SiteJournalOffset) + (mode * CountOfMode);

    private static SiteCounter* Counter(CpuContext* cpu, int site) =>
        (SiteCounter*)((byte*)cpu + CpuContext.SiteCountersOffset + ((site - CpuContext.SitesOffset) >> CounterShift));

    private static void Drop(CpuContext* cpu, int mode)
    {
        int* journal = Journal(cpu, mode);
        for (int i = 0; i < cpu->SiteCounts[mode]; i++)
        {
            var site = (SiteEntry*)((byte*)cpu + journal[i]);
            site->Limit = 0;
            Counter(cpu, journal[i])->Misses = 0;
        }

        cpu->SiteCounts[mode] = 0;
    }
}

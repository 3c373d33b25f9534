// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Threading;
using Vmm.Memory;

namespace Vmm.X86;

// The decoded-block cache of one vCPU. Blocks live in an arena of unmanaged memory that is only ever appended to; when it
// is full everything is forgotten at once. Two indices lead to a block:
//   the hash    (guest-physical address, mode key): survives every change of address space,
//   the jumps   (linear address, address space, mode key): what an indirect or cross-page jump asks first. It is laid
//               out as rows of 64 entries per page so that INVLPG clears two rows.
// Blocks link to each other directly where both lie in one page (then the link is independent of the address space).
//
// Staleness. A block remembers the generation of its page's CodeInfo; entering it compares. Whoever writes to a page
// whose PageFlags has Code set, and hits a granule with code, clears the marks and then counts the generation up.
// Decoding marks first, then reads generation and bytes, then checks that the marks are still there.
//
// A store on another vCPU may have looked at the flags before we set Code and land after we read the bytes. Such a
// block must not live for ever: with more than one vCPU it starts as "young", which makes every entry compare its
// bytes with memory, until all vCPUs have passed a dispatch since.

/// <summary>Mode bits that decoded code depends on.</summary>
internal static class BlockKey
{
    /// <summary>0: 16-bit, 1: 32-bit, 2: 64-bit code.</summary>
    public const uint SizeMask = 3;

    /// <summary>SS.B: 32-bit stack pointer (outside 64-bit mode).</summary>
    public const uint Stack32 = 4;

    /// <summary>ES, DS, SS and CS have base 0 and no effective limit.</summary>
    public const uint Flat = 8;

    /// <summary>One instruction per block.</summary>
    public const uint Single = 16;

    /// <summary>CPL 3.</summary>
    public const uint User = 32;

    /// <summary>EFLAGS.AC acts: SMAP is overridden at CPL 0 to 2, alignment is checked at CPL 3.</summary>
    public const uint Ac = 64;

    /// <summary>64-bit code with CR4.LA57: addresses are canonical by 57 bits.</summary>
    public const uint La57 = 128;
}

/// <summary>A decoded basic block.</summary>
internal unsafe struct Block
{
    /// <summary>Generation of a block whose bytes are compared at every entry.</summary>
    public const int Young = -1;

    /// <summary>Generation of a block that must not be used any more.</summary>
    public const int Dead = -2;

    public int Generation;

    /// <summary>Records without the terminator.</summary>
    public int Count;

    /// <summary>Points at the page's CodeInfo.Generation.</summary>
    public int* PageGeneration;

    /// <summary>Unused; so that a Status indexes the links.</summary>
    public Block* Link0;

    /// <summary>Successor for <see cref="Status.Taken"/>.</summary>
    public Block* Link1;

    /// <summary>Successor for <see cref="Status.NotTaken"/>.</summary>
    public Block* Link2;

    public Insn* First;
    public ulong Physical;
    public uint Key;

    /// <summary>Guest code bytes.</summary>
    public int Bytes;

    /// <summary>The page's generation when the bytes were read (for young blocks).</summary>
    public int DecodedGeneration;

    /// <summary>
    /// 1 when it holds an instruction that crosses into another page, which is its only one. The interpreter enters it
    /// through the jump cache or the hash only; generated code of it looks itself (Translate/Translator.Branches.cs).
    /// </summary>
    public int Crosses;

    /// <summary>Page of the crossing instruction's tail.</summary>
    public ulong Physical2;
    public int Generation2;
    public int* PageGeneration2;
    public Block* HashNext;

    /// <summary>Copy of the guest's bytes.</summary>
    public byte* Source;

    /// <summary>VmShared.Epoch when it was decoded.</summary>
    public long Epoch;

    /// <summary>Generated code that expects the guest's flags in the host's; null when there is none.</summary>
    public byte* EntryHostFlags;

    /// <summary>Generated code that expects the guest's flags in FlagImage; null when there is none.</summary>
    public byte* EntryFlagImage;

    /// <summary>Next block with generated code in the same page.</summary>
    public Block* NextNative;

    /// <summary>Next block with generated code that crosses into the same page.</summary>
    public Block* NextTail;

    /// <summary>Where generated code compares what <see cref="CodeCache.LinkFar"/> states; null unless it crosses.</summary>
    public byte* TailSite;

    /// <summary>Exit record of the block's own address.</summary>
    public int SelfExit;

    /// <summary>Times that the interpreter ran it.</summary>
    public int Hits;

    /// <summary>Bit n: the n-th instruction's operand wanders from page to page (Translate/Sites.cs).</summary>
    public uint TlbInsns;

    /// <summary>Arithmetic flags that the block reads before it writes them, with bit 8 set; 0: not known yet.</summary>
    public int FlagsIn;
}

/// <summary>A jump-cache entry.</summary>
internal unsafe struct JumpEntry
{
    public ulong Linear;

    /// <summary>Address space in the high half, mode key in the low.</summary>
    public ulong Context;
    public Block* Target;
    public ulong Unused;
}

/// <summary>What an entry of the indirect-branch cache is for (Translate/Translator.Branches.cs).</summary>
[StructLayout(LayoutKind.Explicit, Size = SizeBytes)]
internal struct BranchKey
{
    public const int SizeBytes = 16;
    public const int LinearOffset = 0;
    public const int ContextOffset = 8;

    /// <summary>Linear address of the code.</summary>
    [FieldOffset(LinearOffset)]
    public ulong Linear;

    /// <summary>The quadword of CpuContext.Request and BranchTag while nothing is requested; 0 when the entry is empty.</summary>
    [FieldOffset(ContextOffset)]
    public ulong Context;
}

/// <summary>What an entry of the indirect-branch cache leads to.</summary>
[StructLayout(LayoutKind.Explicit, Size = SizeBytes)]
internal unsafe struct BranchTarget
{
    public const int SizeBytes = 16;
    public const int CodeOffset = 0;
    public const int PageOffset = 8;

    /// <summary>Entry for flags in the image.</summary>
    [FieldOffset(CodeOffset)]
    public byte* Code;

    /// <summary>What CodeBase becomes: the linear page.</summary>
    [FieldOffset(PageOffset)]
    public ulong Page;
}

/// <summary>A linked branch to another page (CodeCache.LinkFar), in a list of those whose pages hash alike.</summary>
internal unsafe struct FarLink
{
    /// <summary>Where it starts.</summary>
    public byte* Site;

    /// <summary>The linear page that it goes to.</summary>
    public ulong Page;

    /// <summary>Number of the next one, from 1; 0 at the end.</summary>
    public int Next;
}

/// <summary>Unmanaged part of the cache, embedded in the context.</summary>
internal unsafe struct BlockCache
{
    public const int Rows = 128;
    public const int RowEntries = 64;
    public const int Buckets = 1 << BucketBits;
    private const int BucketBits = 18;

    /// <summary>Records take so many times the bytes of their code.</summary>
    public const int BytesOfCodeByte = 3;

    public JumpEntry* Jumps;
    public Block** Hash;
    public byte* Arena;
    public long ArenaBytes;
    public long Used;

    /// <summary>Blocks decoded, for statistics.</summary>
    public long Decoded;

    /// <summary>Times that the arena filled up.</summary>
    public long Overflows;

    /// <summary>Entries of the indirect-branch cache (Translate/Translator.Branches.cs).</summary>
    public const int Branches = 1 << 16;

    /// <summary>Entries that the addresses of one page can have: a window of the table.</summary>
    public const int BranchWindow = 1 << 11;

    /// <summary>Entries behind those that have what was displaced, for each window.</summary>
    public const int BranchSeconds = 64;

    /// <summary>All entries.</summary>
    public const int BranchEntries = Branches + (Branches / BranchWindow * BranchSeconds);

    /// <summary>Direct branches to other pages that may be linked at a time.</summary>
    public const int MaxFarLinks = 1 << 16;

    /// <summary>Lists of them, by page.</summary>
    public const int FarLists = 1 << 10;

    /// <summary>The indirect-branch cache: what its entries are for.</summary>
    public BranchKey* BranchKeys;

    /// <summary>The indirect-branch cache: what its entries lead to.</summary>
    public BranchTarget* BranchTargets;

    /// <summary>Linked branches to other pages.</summary>
    public FarLink* FarLinks;

    /// <summary>Numbers, from 1, of the first link of each list.</summary>
    public int* FarHeads;

    /// <summary>Words of <see cref="BranchPages"/>.</summary>
    public const int BranchPageWords = 1024;

    /// <summary>Links that have been taken since all were dropped.</summary>
    public int FarCount;

    /// <summary>Number of the first of those that are free again.</summary>
    public int FarFree;

    /// <summary>Bit n: the indirect-branch cache or a linked branch may lead to a page that hashes to n.</summary>
    public ulong* BranchPages;

    /// <summary>Times that everything was dropped: generated code that belongs to another count is gone.</summary>
    public long Clears;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public readonly JumpEntry* JumpSlot(ulong linear)
    {
        ulong row = (linear >> 12) ^ (linear >> 19);
        ulong column = linear ^ (linear >> 6);
        return Jumps + (((row & (Rows - 1)) * RowEntries) + (column & (RowEntries - 1)));
    }

    /// <summary>Which entry of the indirect-branch cache a linear address has.</summary>
    public static int BranchSlot(ulong linear) => (int)(((linear >> 11) ^ linear) >> 1) & (Branches - 1);

    /// <summary>The second place of what had such an entry (CodeStubs.BranchMiss).</summary>
    public static int SecondSlot(int slot) =>
        Branches + (slot / BranchWindow * BranchSeconds) + (slot & (BranchSeconds - 1));

    /// <summary>Drops jump-cache entries of a page and of instructions that cross into it.</summary>
    public void ForgetPage(ulong linear)
    {
        ForgetRow(linear);
        ForgetRow(linear - 4096);
        int bit = BranchPage(linear);
        if (((BranchPages[bit >> 6] >> (bit & 63)) & 1) == 0)
        {
            return;
        }

        // SAFETY: a window is a power of two of entries, and so is the table.
        BranchKey* key = BranchKeys + (BranchSlot(linear) & ~(BranchWindow - 1));
        ForgetKeys(key, BranchWindow, linear);
        ForgetKeys(BranchKeys + SecondSlot((int)(key - BranchKeys)), BranchSeconds, linear);
        int* at = &FarHeads[bit & (FarLists - 1)];
        while (*at != 0)
        {
            int number = *at;
            FarLink* link = FarLinks + (number - 1);
            if (((link->Page ^ linear) & ~Mem.PageOffset) != 0)
            {
                at = &link->Next;
                continue;
            }

            CodeCache.UnlinkFar(link->Site);
            *at = link->Next;
            link->Next = FarFree;
            FarFree = number;
        }
    }

    /// <summary>Lists a branch that is being linked; forgets all others when there is no room.</summary>
    public void AddFar(byte* site, ulong page)
    {
        if (FarFree == 0 && FarCount == MaxFarLinks)
        {
            UnlinkFar();
        }

        int number = FarFree != 0 ? FarFree : ++FarCount;
        FarLink* link = FarLinks + (number - 1);
        FarFree = FarFree != 0 ? link->Next : 0;
        ref int head = ref FarHeads[BranchPage(page) & (FarLists - 1)];
        *link = new FarLink { Site = site, Page = page, Next = head };
        head = number;
    }

    private static void ForgetKeys(BranchKey* key, int count, ulong linear)
    {
        // SAFETY: ForgetPage gives a window of the table, or the places behind it for what the window displaced.
        for (int i = 0; i < count; i++, key++)
        {
            if (((key->Linear ^ linear) & ~Mem.PageOffset) == 0)
            {
                key->Context = 0;
            }
        }
    }

    /// <summary>Drops the indirect-branch cache and the links to other pages.</summary>
    public void ForgetBranches()
    {
        Unsafe.InitBlock(BranchKeys, 0, BranchEntries * BranchKey.SizeBytes);
        Unsafe.InitBlock(BranchPages, 0, BranchPageWords * sizeof(ulong));
        UnlinkFar();
    }

    /// <summary>Notes that a branch may lead to a linear address.</summary>
    public void AddBranchPage(ulong linear)
    {
        int bit = BranchPage(linear);
        BranchPages[bit >> 6] |= 1UL << (bit & 63);
    }

    /// <summary>Lets branches to other pages ask the dispatcher again.</summary>
    public void UnlinkFar()
    {
        // Free ones, too: their sites do not lead anywhere, or are listed again.
        for (int i = 0; i < FarCount; i++)
        {
            CodeCache.UnlinkFar(FarLinks[i].Site);
        }

        Unsafe.InitBlock(FarHeads, 0, FarLists * sizeof(int));
        FarCount = 0;
        FarFree = 0;
    }

    // A page's bit in the filter.
    private static int BranchPage(ulong linear) => (int)(((linear >> 12) * 0x9E3779B97F4A7C15) >> 48);

    /// <summary>Drops the jump cache.</summary>
    public void ForgetAll()
    {
        Unsafe.InitBlock(Jumps, 0, (uint)(sizeof(JumpEntry) * Rows * RowEntries));
        ForgetBranches();
    }

    /// <summary>Drops all blocks. Not while one is running.</summary>
    public void Clear()
    {
        ForgetAll();
        // SAFETY: the vCPU allocated Hash with Buckets entries and frees it after the last Run.
        NativeMemory.Clear(Hash, (nuint)(Buckets * sizeof(Block*)));
        Used = 0;
        Clears++;
    }

    /// <summary>Takes aligned memory from the arena; null when it is full.</summary>
    public byte* Allocate(long bytes)
    {
        bytes = (bytes + 63) & ~63L;
        if (Used + bytes > ArenaBytes)
        {
            return null;
        }

        byte* at = Arena + Used;
        Used += bytes;
        return at;
    }

    public readonly Block* Lookup(ulong physical, uint key)
    {
        Block* block = Hash[Bucket(physical, key)];
        while (block != null && (block->Physical != physical || block->Key != key))
        {
            block = block->HashNext;
        }

        return block;
    }

    public readonly void Insert(Block* block)
    {
        Block** bucket = &Hash[Bucket(block->Physical, block->Key)];
        Block** at = bucket;
        while (*at != null)
        {
            // Replaces a stale block of the same name.
            if ((*at)->Physical == block->Physical && (*at)->Key == block->Key)
            {
                *at = (*at)->HashNext;
                break;
            }

            at = &(*at)->HashNext;
        }

        block->HashNext = *bucket;
        *bucket = block;
    }

    private static uint Bucket(ulong physical, uint key)
    {
        ulong mixed = (physical + key) * 0x9E3779B97F4A7C15;
        return (uint)(mixed >> (64 - BucketBits));
    }

    private readonly void ForgetRow(ulong linear)
    {
        ulong row = ((linear >> 12) ^ (linear >> 19)) & (Rows - 1);
        Unsafe.InitBlock(Jumps + (row * RowEntries), 0, (uint)(sizeof(JumpEntry) * RowEntries));
    }
}

/// <summary>Marks and invalidates code in host pages.</summary>
internal static unsafe class CodePages
{
    /// <summary>The bookkeeping of a host page; never null, shared with pages that hash alike.</summary>
    public static CodeInfo* Info(VmShared* shared, byte* host)
    {
        ulong page = (ulong)host >> 12;
        return shared->Code + ((page ^ (page >> 16)) & (VmShared.CodeEntries - 1));
    }

    /// <summary>Granules of the bytes within the page.</summary>
    public static long Mask(byte* host, int length)
    {
        int first = (int)((ulong)host & 0xFFF) >> 6;
        int last = ((int)((ulong)host & 0xFFF) + length - 1) >> 6;
        last = last > 63 ? 63 : last;
        ulong mask = ulong.MaxValue << first;
        mask &= ulong.MaxValue >> (63 - last);
        return (long)mask;
    }

    /// <summary>
    /// Called before (vCPUs) or after (devices) a write to a page whose Code flag is set.
    /// <paramref name="cpu"/> is the writing vCPU.
    /// </summary>
    public static void Invalidate(CpuContext* cpu, byte* host, byte* flags, int length)
    {
        CodeInfo* info = Info(cpu->Shared, host);
        if (!Invalidate(cpu->Shared, info, host, flags, length))
        {
            return;
        }

        Block* block = cpu->CurrentBlock;
        if (block != null &&
            (block->PageGeneration == &info->Generation || block->PageGeneration2 == &info->Generation))
        {
            Stop(block);
        }
    }

    /// <summary>The same for writers that are no vCPU.</summary>
    public static bool Invalidate(VmShared* shared, CodeInfo* info, byte* host, byte* flags, int length)
    {
        if ((Volatile.Read(ref info->Granules) & Mask(host, length)) == 0)
        {
            return false;
        }

        AtomicByte.And(flags, (byte)~PageFlags.Code);
        Interlocked.Exchange(ref info->Granules, 0);
        Interlocked.Increment(ref info->Generation);
        info->Hits++;
        Announce(shared, (int)(info - shared->Code));
        return true;
    }

    // Generated code does not compare generations: every vCPU is told, and cuts off what lies in the page.
    private static void Announce(VmShared* shared, int index)
    {
        var spin = default(SpinWait);
        while (Interlocked.CompareExchange(ref shared->CodeWriteGate, 1, 0) != 0)
        {
            spin.SpinOnce();
        }

        shared->CodeWriteRing[shared->CodeWrites & (VmShared.RingEntries - 1)] = index;
        Volatile.Write(ref shared->CodeWrites, shared->CodeWrites + 1);
        Volatile.Write(ref shared->CodeWriteGate, 0);
        int count = Math.Min(Volatile.Read(ref shared->Vcpus), VmShared.MaxVcpus);
        for (int i = 0; i < count; i++)
        {
            var cpu = (CpuContext*)Volatile.Read(ref shared->Contexts[i]);
            if (cpu != null)
            {
                Interlocked.Or(ref cpu->Request, RequestBits.Code);
            }
        }
    }

    // The running block was overwritten: what follows the running instruction must be fetched again.
    private static void Stop(Block* block)
    {
        block->Generation = Block.Dead;
        for (int i = 0; i < block->Count; i++)
        {
            (block->First + i)->Handler = &ControlTransfer.EndOfBlock;
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;

namespace Vmm.X86;

// The translated code of one vCPU: an arena of code memory (written through one alias, run through another), the stubs
// at its start, the exit records, and the index from host pages to the blocks that lie in them.
//
// Life of code. Blocks are appended; when the arena is full everything is forgotten, together with the decoded blocks
// that point into it (BlockCache.Clear). Only the vCPU's own thread writes code, and only while it is not inside it, so
// that no other thread ever executes bytes that change; a processor sees its own stores to code through any alias before
// the next branch to them, because such hits are detected by physical address.
//
// Cutting. When the bytes of a page with code change, both entries of each of its blocks are overwritten by a jump to
// an exit of the block's own address. Jumps into the block and entries of the indirect-branch cache need not be found:
// they land there and ask the dispatcher, which then lets the dead entry forward to its successor.
//
// Exit records say where generated code wanted to go: an offset from CodeBase, and the place of the jump that the
// dispatcher may let point to the target once it is translated.

/// <summary>What leaves a block.</summary>
internal enum ExitKindOfCode
{
    /// <summary>A direct branch in the page: Site is patched to the target.</summary>
    Direct,

    /// <summary>An entry of a dead block: forwards to its successor.</summary>
    Stale,

    /// <summary>A computed or cross-page target in Rip that the indirect-branch cache did not have.</summary>
    Indirect,

    /// <summary>A request was seen: Rip is the offset, nothing to patch.</summary>
    Poll,

    /// <summary>A direct branch to another page: Site is its start, with the layout of <see cref="FarBranch"/>.</summary>
    Far,

    /// <summary>The entry of a block that crosses into another page, where that is not known to be the same: nothing to patch.</summary>
    Tail,
}

/// <summary>
/// Code of a direct branch to another page. It may jump to its target directly while the same page of linear addresses
/// is running in the same address space and mode, and nobody has asked for attention:
///
///     jmp exit                   unlinked; a NOP when linked; "jmp probe" where the target's mapping is not lasting
///     mov T0, gs:[CodeBase]; xor T0, gs:[Request and BranchTag]
///     mov T1, imm64; cmp T0, T1; jne probe
///     mov T0, imm64; mov gs:[CodeBase], T0; jmp target
///     exit: mov T0, record; jmp ExitFlagImage
///     probe:
///
/// Addresses of 48 bits leave the tag's bits alone, so that the exclusive or is different wherever page or tag is. Those of
/// 57 bits do not: code with CR4.LA57 compares the tag by itself, in front of all that.
///
///     cmp word gs:[BranchTag], imm16; jne probe
///
/// A block with an instruction that crosses into another page starts with the same, in front of its own body: the other
/// page is the second one's, CodeBase stays, and instead of a probe there is the exit.
/// </summary>
internal static class FarBranch
{
    /// <summary>Offset, in front of the branch, of the tag that it expects with CR4.LA57.</summary>
    public const int Tag = -6 - sizeof(ushort);

    /// <summary>Offset of the expected page and tag.</summary>
    public const int Expected = 5 + 9 + 9 + 2;

    /// <summary>Offset of the target's page.</summary>
    public const int Page = Expected + 8 + 3 + 6 + 2;

    /// <summary>Offset behind the jump to the target.</summary>
    public const int Exit = Page + 8 + 9 + 5;

    /// <summary>Offset of the probe.</summary>
    public const int Probe = Exit + 11;
}

/// <summary>One way out of a block.</summary>
internal unsafe struct ExitRecord
{
    /// <summary>
    /// Behind the rel32 of the jump to patch (writable alias), or null. Of a block's own exit: the two pieces of code
    /// that its dead entries jump to.
    /// </summary>
    public byte* Site;

    /// <summary>The block left.</summary>
    public Block* Source;

    /// <summary>Where to go, from CodeBase; for computed targets the offset of the branch's record in the arena.</summary>
    public int Offset;

    /// <summary>
    /// Of an indirect branch: what to add to RSP to undo it when its target turns out not to be canonical. Of a poll: the
    /// block's instructions behind it.
    /// </summary>
    public short Undo;

    /// <summary><see cref="ExitKindOfCode"/>.</summary>
    public byte Kind;

    /// <summary>1 when the host's flags are the guest's at the site.</summary>
    public byte HostFlags;
}

/// <summary>Code memory, stubs, exits and page index of one vCPU.</summary>
internal sealed unsafe class CodeCache : IDisposable
{
    /// <summary>No block takes more than this.</summary>
    public const int BlockBytes = 32 << 10;

    /// <summary>Length of each of the two exits of a dead block.</summary>
    public const int StaleBytes = 11;

    private const byte JumpOpcode = 0xE9;
    private const int BytesOfExit = 64;
    private readonly ThunkCache _owner;
    private readonly int _lengthBytes;
    private readonly int _firstCold;
    private readonly int _maxExits;
    private readonly byte* _write;
    private readonly Block** _pages;
    private readonly Block** _tails;
    private readonly int _firstBlock;
    private int _used;
    private int _cold;
    private int _exits;

    private CodeCache(ThunkCache owner, byte* write, int lengthBytes, long executeDelta)
    {
        _owner = owner;
        _write = write;
        _lengthBytes = lengthBytes;
        _firstCold = lengthBytes / 2;
        _maxExits = lengthBytes / BytesOfExit;
        ExecuteDelta = executeDelta;
        Exits = (ExitRecord*)NativeMemory.Alloc((nuint)_maxExits, (nuint)sizeof(ExitRecord));
        _pages = (Block**)NativeMemory.AllocZeroed(VmShared.CodeEntries, (nuint)sizeof(Block*));
        _tails = (Block**)NativeMemory.AllocZeroed(VmShared.CodeEntries, (nuint)sizeof(Block*));
        var emitter = new Emitter(write);
        Stubs = new CodeStubs(ref emitter, executeDelta);
        _firstBlock = (int)(emitter.At - write + 63) & ~63;
        _used = _firstBlock;
        _cold = _firstCold;
    }

    /// <summary>Executable address minus writable address.</summary>
    public long ExecuteDelta { get; }

    /// <summary>The routines that all blocks use.</summary>
    public CodeStubs Stubs { get; }

    /// <summary>Exit records.</summary>
    public ExitRecord* Exits { get; }

    /// <summary>Bytes of code written since the last reset.</summary>
    public int UsedBytes => _used + _cold - _firstCold;

    /// <summary>Where the next block's cold code goes. Away from the rest, so that code which runs lies close together.</summary>
    public byte* NextCold => _write + _cold;

    /// <summary>The count of BlockCache.Clears that the code belongs to.</summary>
    public long Clears { get; private set; }

    /// <summary>Where the next block goes, or null when the arena or the exits are used up.</summary>
    public byte* Next => _firstCold - _used < BlockBytes || _lengthBytes - _cold < BlockBytes || _maxExits - _exits < 256
        ? null
        : _write + _used;

    /// <summary>Makes one; null when no arena is left.</summary>
    public static CodeCache? TryCreate(ThunkCache thunks, int lengthBytes) =>
        thunks.TryTakeArena(lengthBytes, out byte* write, out long delta)
            ? new CodeCache(thunks, write, lengthBytes, delta)
            : null;

    /// <summary>Forgets all code.</summary>
    public void Reset(long clears)
    {
        Clears = clears;
        _used = _firstBlock;
        _cold = _firstCold;
        _exits = 0;
        NativeMemory.Clear(_pages, (nuint)(VmShared.CodeEntries * sizeof(Block*)));
        NativeMemory.Clear(_tails, (nuint)(VmShared.CodeEntries * sizeof(Block*)));
    }

    /// <summary>Reserves an exit record.</summary>
    public int AddExit(ExitKindOfCode kind, Block* source, int offset, byte* site, bool hostFlags, short undo = 0)
    {
        Exits[_exits] = new ExitRecord
        {
            Kind = (byte)kind,
            Source = source,
            Offset = offset,
            Site = site,
            HostFlags = hostFlags ? (byte)1 : (byte)0,
            Undo = undo,
        };
        return _exits++;
    }

    /// <summary>Accepts what was written at <see cref="Next"/> and <see cref="NextCold"/>.</summary>
    public void Publish(CpuContext* cpu, Block* block, byte* end, byte* coldEnd)
    {
        _used = (int)(end - _write + 15) & ~15;
        _cold = (int)(coldEnd - _write + 3) & ~3;
        ref Block* head = ref _pages[PageIndex(cpu, block->PageGeneration)];
        block->NextNative = head;
        head = block;
        if (block->Crosses != 0)
        {
            ref Block* tail = ref _tails[PageIndex(cpu, block->PageGeneration2)];
            block->NextTail = tail;
            tail = block;
        }
    }

    /// <summary>
    /// Cuts off the blocks of a page (a CodeInfo's index), and those that cross into it, that are older than its generation.
    /// </summary>
    public void Cut(CpuContext* cpu, int index)
    {
        Cut(cpu, index, null);
        Block* block = _tails[index];
        while (block != null)
        {
            Block* next = block->NextTail;
            if (block->Generation2 != *block->PageGeneration2)
            {
                Retire(cpu, block);
            }

            block = next;
        }
    }

    /// <summary>Cuts off one block, so that it is translated again.</summary>
    public void Retire(CpuContext* cpu, Block* block) => Cut(cpu, PageIndex(cpu, block->PageGeneration), block);

    /// <summary>Lets a branch to another page go to its target directly, in the present address space and mode.</summary>
    /// <param name="cpu">Its context.</param>
    /// <param name="site">Start of the branch.</param>
    /// <param name="from">CodeBase at the branch.</param>
    /// <param name="page">The page whose mapping ends it: CodeBase at the target.</param>
    /// <param name="target">The target's entry.</param>
    // SAFETY: the layout is FarBranch's, and the thread that executes this code is here and not there.
    public void LinkFar(CpuContext* cpu, byte* site, ulong from, ulong page, byte* target)
    {
        // One that led to another page stays listed with that, too: to be unlinked in vain does no harm.
        if (*site == JumpOpcode || *(ulong*)(site + FarBranch.Page) != page)
        {
            cpu->Blocks.AddFar(site, page);
        }

        ushort tag = SoftVcpu.Tag(cpu);
        *(ulong*)(site + FarBranch.Expected) = from ^ ((ulong)tag << 48);
        *(ulong*)(site + FarBranch.Page) = page;
        if ((cpu->ModeKey & BlockKey.La57) != 0)
        {
            *(ushort*)(site + FarBranch.Tag) = tag;
        }

        byte* jump = site + FarBranch.Exit;
        *(int*)(jump - 4) = (int)(target - ExecuteDelta - jump);
        var emitter = new Emitter(site);
        emitter.Nop5();
    }

    /// <summary>What <see cref="LinkFar"/> would state is stated.</summary>
    public static bool IsLinked(CpuContext* cpu, byte* site, ulong from, ulong page)
    {
        ushort tag = SoftVcpu.Tag(cpu);
        return *site != JumpOpcode && *(ulong*)(site + FarBranch.Expected) == (from ^ ((ulong)tag << 48)) &&
            *(ulong*)(site + FarBranch.Page) == page &&
            ((cpu->ModeKey & BlockKey.La57) == 0 || *(ushort*)(site + FarBranch.Tag) == tag);
    }

    /// <summary>Lets a branch to another page ask the dispatcher.</summary>
    public static void UnlinkFar(byte* site)
    {
        var emitter = new Emitter(site);
        emitter.Jump(site + FarBranch.Exit);
    }

    /// <summary>Lets a branch to another page always probe the indirect-branch cache.</summary>
    public static void ProbeFar(byte* site)
    {
        if (*(int*)(site + 1) == FarBranch.Probe - 5)
        {
            return;
        }

        var emitter = new Emitter(site);
        emitter.Jump(site + FarBranch.Probe);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        NativeMemory.Free(Exits);
        NativeMemory.Free(_pages);
        NativeMemory.Free(_tails);
        _owner.ReturnArena(_write, _lengthBytes);
    }

    // One block of a page, or (null) all that are stale.
    private void Cut(CpuContext* cpu, int index, Block* which)
    {
        Block** at = &_pages[index];
        while (*at != null)
        {
            Block* block = *at;
            if (which != null ? block != which : block->Generation == *block->PageGeneration)
            {
                at = &block->NextNative;
                continue;
            }

            *at = block->NextNative;
            Detach(cpu, block);
        }
    }

    private void Detach(CpuContext* cpu, Block* block)
    {
        if (block->Crosses != 0)
        {
            Block** at = &_tails[PageIndex(cpu, block->PageGeneration2)];
            while (*at != block)
            {
                at = &(*at)->NextTail;
            }

            *at = block->NextTail;
        }

        byte* stale = Exits[block->SelfExit].Site;
        PatchEntry(block->EntryHostFlags, stale);
        PatchEntry(block->EntryFlagImage, stale + StaleBytes);
        block->EntryHostFlags = null;
        block->EntryFlagImage = null;
    }

    // The number of the CodeInfo whose generation it is.
    private static int PageIndex(CpuContext* cpu, int* generation)
    {
        var info = (CodeInfo*)((byte*)generation - (nint)sizeof(long));
        return (int)(info - cpu->Shared->Code);
    }

    // SAFETY: an entry is followed by at least five bytes of its own block (Translator.Entries pads), and the thread that
    // executes this code is here and not there.
    private void PatchEntry(byte* entry, byte* target)
    {
        var emitter = new Emitter(entry - ExecuteDelta);
        emitter.Jump(target);
    }
}

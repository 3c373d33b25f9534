// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using Iced.Intel;

namespace Vmm.X86;

// Theory of the translator (src/adr/0007-translator.md has the measurements behind it).
//
// A decoded block of 64-bit code becomes one piece of host code. Guest and host share the instruction set, so most
// instructions are encoded again with their registers renamed (CodeStubs.cs has the map); only what touches memory, RSP
// or RIP is rewritten. What is not known calls the interpreter's handler for the record, with the whole state in the
// context: every instruction therefore works, and the interpreter stays the one definition of what instructions do.
//
// Memory. An access is checked inline against the same TLB that the interpreter uses. When the check fails, the handler
// executes the instruction: it walks the page tables, fills the TLB, raises the fault, reaches the device or crosses the
// page. Exceptions are exact because nothing of the instruction has happened and all registers are in their places.
//
// Flags. The guest's arithmetic flags are the host's. A check destroys them, so the translator knows at every point
// where they are (host, FlagImage, both) and which are live, and saves them to FlagImage only where a later reader
// exists. A block has two entries, for flags in the host's register and for flags in the image. Flags are taken as live
// at the end of a block unless the successors are known, lie in the same page (so that they die together with this
// block) and overwrite them. The one inexactness: a fault or an interrupt in the middle of a block at a point where
// flags are dead reports stale arithmetic flags, which nothing reads after the return.
//
// Position. Code is found by physical address, so a block does not know its linear address: CodeBase holds the page's,
// and RIP-relative operands, return addresses and exits add their offset. Jumps inside the page are linked directly;
// all others probe the indirect-branch cache by (linear address, address space, mode).
//
// Interrupts. Backward jumps poll Request at a point where flags are dead; a probe of the indirect-branch cache polls
// for nothing (CpuContext.BranchTag). Straight code does not poll.
//
// Files: Translator (flags, liveness, cold code), .Traces (what is translated together), .Memory (operands and checks),
// .Groups (checks for several), .Integer, .System, .Branches.

/// <summary>Makes host code from decoded blocks. One for each vCPU; used by its thread only.</summary>
internal sealed unsafe partial class Translator
{
    private const int MaxInsns = 64;
    private const uint All = TraitsTable.AllFlags;

    private readonly CodeCache _cache;
    private readonly TraitsTable _traitsTable;
    private readonly ByteReader _reader = new();
    private readonly Decoder _decoder;
    private readonly ByteWriter _writer = new();
    private readonly Encoder _encoder;
    private readonly Instruction[] _insns = new Instruction[MaxInsns];
    private readonly InsnTraits[] _traits = new InsnTraits[MaxInsns];
    private readonly uint[] _live = new uint[MaxInsns + 1];

    // _live without what only a fault or an interrupt in front of the instruction would show.
    private readonly uint[] _needed = new uint[MaxInsns + 1];
    private readonly SlowSite[] _slow = new SlowSite[MaxInsns * 16];
    private readonly SiteMiss[] _misses = new SiteMiss[MaxInsns * 6];
    private readonly ColdExit[] _cold = new ColdExit[8 + (4 * MaxInsns)];

    private Emitter _e;
    private CpuContext* _cpu;
    private Block* _block;
    private int _count;
    private int _at;
    private int _poll;
    private int _slowCount;
    private int _missCount;
    private int _coldCount;
    private bool _inHost;
    private bool _inImage;
    private int _slowGroup = -1;

    // The register of the context that T0 holds as well; -1 for none. Every change is stored at once.
    private int _held;

    public Translator(CodeCache cache, TraitsTable traits)
    {
        _cache = cache;
        _traitsTable = traits;
        _decoder = Decoder.Create(64, _reader, DecoderOptions.None);
        _encoder = Encoder.Create(64, _writer);
    }

    /// <summary>Blocks translated.</summary>
    public long Blocks { get; private set; }

    /// <summary>Guest instructions translated.</summary>
    public long Instructions { get; private set; }

    /// <summary>Bytes of host code made of them.</summary>
    public long HostBytes { get; private set; }

    /// <summary>Memory operands that are checked against a site.</summary>
    public long SitePlaces { get; private set; }

    /// <summary>Memory operands that are looked up in the TLB.</summary>
    public long TlbPlaces { get; private set; }

    /// <summary>Gets a line for each block (Linux perf's map of generated code); null for none.</summary>
    public TextWriter? PerfMap { get; init; }

    /// <summary>Generated code counts its checks (AccessCount).</summary>
    public bool CountsAccesses { get; init; }

    /// <summary>Of those, how many go to the interpreter's handlers.</summary>
    public long HandlerSites { get; private set; }

    /// <summary>Guest instructions that go to handlers, by Iced code; for statistics.</summary>
    public int[] HandlerCodes { get; } = new int[8192];

    /// <summary>For tests: a code that is treated as if Iced could not encode it. INVALID for none.</summary>
    public Code Unencodable { get; set; }

    /// <summary>Translates a block and enters it into the cache.</summary>
    /// <returns>False when the arena is full: everything must be dropped first.</returns>
    public bool Translate(CpuContext* cpu, Block* block)
    {
        byte* start = _cache.Next;
        if (start == null)
        {
            return false;
        }

        _cpu = cpu;
        _block = block;
        ReadTrace();
        LookAtSites();
        uint liveOut = LiveOut();
        Liveness(liveOut);
        block->FlagsIn = (int)_live[0] | 0x100;
        _groupFailed = false;
        Body(start);
        if (_groupFailed)
        {
            // An instruction in a group needs its handler after all.
            Body(start);
        }

        byte* end = _e.At;
        _e = new Emitter(_cache.NextCold);
        Cold();
        HostBytes += end - start + (_e.At - _cache.NextCold);
        WritePerfMap(start, end);
        _cache.Publish(cpu, block, end, _e.At);
        Blocks++;
        Instructions += _count;
        return true;
    }

    // tools/perf/Documentation/jit-interface.txt: start and size in hexadecimal, then a name. Hot code only.
    private void WritePerfMap(byte* start, byte* end)
    {
        if (PerfMap is { } map)
        {
            lock (map)
            {
                string mode = (_block->Key & BlockKey.User) != 0 ? "user" : "kernel";
                ulong address = (ulong)(start + _cache.ExecuteDelta);
                map.WriteLine($"{address:x} {end - start:x} guest-{mode}-{_block->Physical:x}");
            }
        }
    }

    // _live[i]: flags that are read, from in front of instruction i on, before they are written.
    private void Liveness(uint liveOut)
    {
        _live[_count] = liveOut;
        for (int i = _count - 1; i >= 0; i--)
        {
            _needed[i] = Before(_live[i + 1] | LeavesWith(i), _insns[i], _traits[i]);
            _live[i] = IsExact && (i == 0 || MayLeave(i)) ? All : _needed[i];
        }
    }

    // The VM is deterministic: the flags in the image are right wherever generated code can be left.
    private bool IsExact => _cpu->CountsBlocks == 2;

    // The block runs with addresses of 57 bits.
    private bool IsLa57 => (_block->Key & BlockKey.La57) != 0;

    // Code of the instruction can fault, call a handler or leave.
    private bool MayLeave(int i) => _traits[i].Kind switch
    {
        InsnKind.Nop or InsnKind.Lea or InsnKind.MoveFromSegment or InsnKind.Rdpid or InsnKind.Jcc or InsnKind.Jmp => false,
        InsnKind.Pass or InsnKind.Vector => HasMemory(_insns[i]),
        _ => true,
    };

    // Flags that are read where an instruction inside a trace leaves it.
    private uint LeavesWith(int i) => _ways[i] switch
    {
        Way.FallsThrough => FlagsAt((long)_insns[i].NearBranchTarget),
        Way.IsTaken => FlagsAt(OffsetBehind(i)),
        _ => 0,
    };

    private static uint Before(uint after, in Instruction instruction, in InsnTraits traits)
    {
        if (traits.Kind == InsnKind.Handler)
        {
            return All;
        }

        uint kills = MayKeepFlags(instruction) ? 0U : traits.Writes;
        return (after & ~kills) | traits.Reads;
    }

    // Shifts and rotates by 0 leave the flags.
    private static bool MayKeepFlags(in Instruction instruction)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Shl or Mnemonic.Sal or Mnemonic.Shr or Mnemonic.Sar or Mnemonic.Rol or Mnemonic.Ror
                or Mnemonic.Rcl or Mnemonic.Rcr or Mnemonic.Shld or Mnemonic.Shrd:
                int last = instruction.OpCount - 1;
                return instruction.GetOpKind(last) == OpKind.Register || (instruction.Immediate8 & 0x1F) == 0;
            default:
                return false;
        }
    }

    private uint LiveOut()
    {
        if (_count == 0 || IsExact)
        {
            return All;
        }

        ref Instruction last = ref _insns[_count - 1];
        int end = EndOffset;
        switch (_traits[_count - 1].Kind)
        {
            case InsnKind.Jcc:
                return FlagsAt((long)last.NearBranchTarget) | FlagsAt(end);
            case InsnKind.Jmp or InsnKind.Call:
                return FlagsAt((long)last.NearBranchTarget);
            case InsnKind.CallIndirect or InsnKind.JmpIndirect or InsnKind.Ret or InsnKind.Handler
                or InsnKind.Syscall or InsnKind.Sysret or InsnKind.Ac:
                return All;
            default:
                return FlagsAt(end);
        }
    }

    // Flags that the block at an offset from this one's start reads, as far as it is decoded and in this page.
    private uint FlagsAt(long offset, int depth = 0)
    {
        long inPage = (long)(_block->Physical & Mem.PageOffset) + offset;
        if (inPage is < 0 or > 4095 || depth > 2)
        {
            return All;
        }

        if (offset == 0)
        {
            // A loop back to this very block: it needs what it passes on, which the other successor decides.
            return SelfReads();
        }

        Block* target = _cpu->Blocks.Lookup((_block->Physical & ~Mem.PageOffset) + (ulong)inPage, _block->Key);
        if (target == null || target->Crosses != 0 || target->Generation != *target->PageGeneration ||
            target->PageGeneration != _block->PageGeneration)
        {
            return All;
        }

        if (target->FlagsIn == 0)
        {
            target->FlagsIn = (int)Reads(target) | 0x100;
        }

        return (uint)target->FlagsIn & All;
    }

    private uint SelfReads()
    {
        uint live = 0;
        for (int i = _count - 1; i >= 0; i--)
        {
            live = Before(live | LeavesWith(i), _insns[i], _traits[i]);
        }

        return live;
    }

    // What a block reads when all flags are live at its end.
    private uint Reads(Block* block)
    {
        uint written = 0;
        uint read = 0;
        for (int i = 0; i < block->Count; i++)
        {
            Insn* record = block->First + i;
            _reader.Set(block->Source + record->Offset, record->Length);
            _decoder.IP = record->Offset;
            _decoder.Decode(out Instruction instruction);
            InsnTraits traits = _traitsTable.Of(instruction);
            if (instruction.IsInvalid || traits.Kind == InsnKind.Handler)
            {
                break;
            }

            read |= traits.Reads & ~written;
            written |= MayKeepFlags(instruction) ? 0U : traits.Writes;
            if (written == All)
            {
                return read;
            }
        }

        return read | (All & ~written);
    }

    private int EndOffset => _endOffset;

    private int PageOffset => (int)(_block->Physical & Mem.PageOffset);

    private void Body(byte* start)
    {
        _e = new Emitter(start);
        _slowCount = 0;
        _missCount = 0;
        _coldCount = 0;
        _groupCount = 0;
        _groupLast = -1;
        _rspDelta = 0;
        _held = -1;
        _extension = default;
        Entries();
        int poll = PollPoint();
        _poll = poll;
        for (int i = 0; i < _count; i++)
        {
            _at = i;
            if (i == poll)
            {
                FlushRsp();
                EmitPoll();
            }

            EmitOne();
            FollowExtension(i);
            if (i == _groupLast)
            {
                ref GroupCopy group = ref _groups[_groupCount - 1];
                group.Resume = (nint)_e.At;
                group.EndsInHost = _inHost;
                group.EndsInImage = _inImage;
                group.Held = _held;
            }
        }

        _at = _count;
        _groupLast = -1;
        InsnKind last = _count == 0 ? InsnKind.Nop : _traits[_count - 1].Kind;
        if (last < InsnKind.Jcc)
        {
            ExitTo(EndOffset);
        }
    }

    // Both entries, with room to be cut off, and the check that vector registers are there.
    private void Entries()
    {
        bool vectors = false;
        bool x87 = false;
        int level = 0;
        for (int i = 0; i < _count; i++)
        {
            if (_traits[i].Kind == InsnKind.Vector)
            {
                vectors = true;
                level = Math.Max(level, _traits[i].VectorLevel);
            }

            x87 |= _traits[i].Kind == InsnKind.X87;
        }

        byte* host = _e.At;
        byte* image;
        if (_live[0] == 0)
        {
            _e.Nop5();
            image = _e.At;
            _inHost = false;
            _inImage = false;
        }
        else if (vectors || x87 || IsExact || _block->Crosses != 0 || StartsInImage())
        {
            CodeStubs.SaveFlags(ref _e, Host.T1);
            image = _e.At;
            _inHost = false;
            _inImage = true;
        }
        else
        {
            // Image first: it falls into the other.
            image = _e.At;
            CodeStubs.LoadFlags(ref _e, Host.T1);
            host = _e.At;
            _inHost = true;
            _inImage = false;
        }

        _block->EntryHostFlags = host + _cache.ExecuteDelta;
        _block->EntryFlagImage = image + _cache.ExecuteDelta;
        byte* body = _e.At;
        if (_block->Crosses != 0)
        {
            // The entry may be overwritten on its own.
            _e.Nop5();
            EmitTailCheck();
        }

        if (_cpu->CountsBlocks != 0)
        {
            // The whole block; who leaves it early takes back the rest (SoftVcpu.Translate.cs). LEA keeps the flags.
            _e.Load(Host.T0, HostMemory.Context(Offsets.InstructionCount));
            _e.Lea(Host.T0, new HostMemory(Host.T0, _count));
            _e.Store(HostMemory.Context(Offsets.InstructionCount), Host.T0);
            if (IsExact)
            {
                _e.Alu(AluOp.Cmp, Host.T0, HostMemory.Context(Offsets.CountLimit));
                _cold[_coldCount++] = new ColdExit
                {
                    Jump = _e.JumpIf(HostCondition.Above),
                    Kind = ColdKind.Poll,
                    Level = _count,
                };
            }
        }

        if (vectors)
        {
            _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.VectorsLoaded), level);
            _cold[_coldCount++] = new ColdExit
            {
                Jump = _e.JumpIf(HostCondition.Below),
                Kind = ColdKind.Vectors,
                Level = level,
                Back = (nint)_e.At,
            };
        }

        if (x87)
        {
            _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.X87Loaded), 1);
            _cold[_coldCount++] = new ColdExit
            {
                Jump = _e.JumpIf(HostCondition.Below),
                Kind = ColdKind.Vectors,
                Level = 0,
                Back = (nint)_e.At,
            };
        }

        // The first five bytes may be overwritten: nothing may jump between them.
        while (_e.At - body < 5 && _count != 0 && _traits[0].Kind is InsnKind.Nop)
        {
            _e.Byte(0x90);
        }
    }

    // What comes first: something that destroys host flags while they are live, or something that reads them?
    private bool StartsInImage()
    {
        for (int i = 0; i < _count; i++)
        {
            if (_live[i] == 0)
            {
                return false;
            }

            if (Destroys(i))
            {
                return true;
            }

            if (_traits[i].Reads != 0 || _traits[i].Writes != 0)
            {
                return false;
            }
        }

        return false;
    }

    private bool Destroys(int i)
    {
        switch (_traits[i].Kind)
        {
            case InsnKind.Pass or InsnKind.Vector or InsnKind.X87 or InsnKind.Jmp or InsnKind.Jcc:
                return HasMemory(_insns[i]);
            case InsnKind.Lea or InsnKind.Nop or InsnKind.MoveFromSegment:
                return false;
            default:
                return true;
        }
    }

    private static bool HasMemory(in Instruction instruction)
    {
        for (int i = 0; i < instruction.OpCount; i++)
        {
            if (instruction.GetOpKind(i) == OpKind.Memory)
            {
                return true;
            }
        }

        return false;
    }

    // Before something that destroys the host's flags: saves them when somebody will want them.
    private void FreeFlags()
    {
        if (_live[_at] != 0 && !_inImage)
        {
            SaveFlags();
            _inImage = true;
        }

        _inHost = false;
    }

    // Inside a group, T1 is taken.
    private void SaveFlags()
    {
        CodeStubs.SaveFlags(ref _e, InGroup ? Host.T0 : Host.T1);
        _held = InGroup ? -1 : _held;
    }

    // Before something that reads flags, or writes only some of those that are live behind it.
    private void NeedFlags(int scratch)
    {
        if (!_inHost && _needed[_at] != 0)
        {
            CodeStubs.LoadFlags(ref _e, scratch);
            _held = scratch == Host.T0 ? -1 : _held;
            _inHost = true;
        }
    }

    // After an instruction that has written flags in the host.
    private void WroteFlags()
    {
        _inHost = true;
        _inImage = false;
    }

    private void SlowJump(byte* jump)
    {
        _slow[_slowCount++] = new SlowSite { Jump = jump, Insn = _at, Group = _slowGroup };
    }

    private void EmitHandlerCall(int index)
    {
        // SAFETY: records and blocks lie in the arena, which is smaller than 2 GiB: only their distance is used.
        uint block = (uint)((byte*)BlockOf(index) - _cpu->Blocks.Arena);
        if (_isTrace)
        {
            block |= HandlerArgument.InTrace;
            _e.StoreImmediate32(HostMemory.Context(Offsets.TraceHead), (int)((byte*)_block - _cpu->Blocks.Arena));
        }

        _e.MoveImmediate(Host.T0, (uint)((byte*)Record(index) - _cpu->Blocks.Arena));
        _e.MoveImmediate(Host.T1, block);
        _e.Call(_cache.Stubs.Handler);
    }

    // An instruction, and where its slow paths come back to.
    private void EmitOne()
    {
        int slow = _slowCount;
        int miss = _missCount;
        EmitInsn();
        for (; slow < _slowCount; slow++)
        {
            _slow[slow].Resume = (nint)_e.At;
            _slow[slow].Held = _held;
        }

        for (; miss < _missCount; miss++)
        {
            _misses[miss].Resume = (nint)_e.At;
            _misses[miss].Held = _held;
        }
    }

    // Out-of-line code: slow paths, exits, the dead block's own exits.
    private void Cold()
    {
        int cold = 0;
        int miss = 0;
        EmitColdAndMisses(ref cold, ref miss);
        for (int i = 0; i < _groupCount; i++)
        {
            EmitCopy(i);
        }

        EmitColdAndMisses(ref cold, ref miss);
        for (int i = 0; i < _slowCount; i++)
        {
            if (_slow[i].Jump == null)
            {
                continue;
            }

            SlowSite slow = _slow[i];
            for (int j = i; j < _slowCount; j++)
            {
                if (_slow[j].Resume == slow.Resume && _slow[j].Insn == slow.Insn && _slow[j].Jump != null)
                {
                    _e.Land(_slow[j].Jump);
                    _slow[j].Jump = null;
                }
            }

            EmitHandlerCall(slow.Insn);
            if (slow.Held >= 0)
            {
                _e.Load(Host.T0, Slot(slow.Held));
            }

            _e.Jump((byte*)slow.Resume);
        }

        byte* stale = _e.At;
        int exit = _cache.AddExit(ExitKindOfCode.Stale, _block, PageOffset, stale, false);
        _block->SelfExit = exit;
        for (int i = 0; i < 2; i++)
        {
            _e.MoveImmediate(Host.T0, (uint)exit);
            _e.Jump(i == 0 ? _cache.Stubs.ExitHostFlags : _cache.Stubs.ExitFlagImage);
        }
    }

    private void EmitColdAndMisses(ref int cold, ref int miss)
    {
        for (; cold < _coldCount; cold++)
        {
            EmitCold(ref _cold[cold]);
        }

        for (; miss < _missCount; miss++)
        {
            EmitMiss(ref _misses[miss]);
        }
    }

    /// <summary>A state of the emission to come back to.</summary>
    private struct EmitMark
    {
        public byte* At;
        public int SlowCount;
        public int MissCount;
        public bool InHost;
        public bool InImage;
    }

    /// <summary>A jump to a slow path.</summary>
    private struct SlowSite
    {
        public byte* Jump;
        public int Insn;

        /// <summary>Of a group's check: which group; otherwise -1.</summary>
        public int Group;

        /// <summary>Where to go on, and the register of the context that T0 holds there.</summary>
        public nint Resume;
        public int Held;
    }

    private enum ColdKind
    {
        Vectors,
        Exit,
        Poll,
        Far,
    }

    /// <summary>Code that is emitted behind the block.</summary>
    private struct ColdExit
    {
        public byte* Jump;
        public ColdKind Kind;
        public int Level;
        public nint Back;
        public int Offset;
        public bool InHost;
        public bool InImage;
        public bool IsBackward;
    }

    private sealed class ByteReader : CodeReader
    {
        private byte* _at;
        private byte* _end;

        public void Set(byte* bytes, int length)
        {
            _at = bytes;
            _end = bytes + length;
        }

        public override int ReadByte() => _at < _end ? *_at++ : -1;
    }

    private sealed class ByteWriter : CodeWriter
    {
        public byte[] Bytes { get; } = new byte[32];

        public int Length { get; set; }

        public override void WriteByte(byte value) => Bytes[Length++ & 31] = value;
    }
}

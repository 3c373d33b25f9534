// SPDX-License-Identifier: BSD-2-Clause
using System;
using Iced.Intel;

namespace Vmm.X86;

// Traces. What is translated together is a block of user code and what usually runs behind it: blocks that it falls into,
// behind conditional jumps that lead forward, or jumps forward to. A trace that ends with a conditional jump back to its
// start is repeated. So jumps between those blocks and most polls go away, flags are known to be dead more often, and
// groups of operands (Translator.Groups.cs) reach over several rounds of a loop.
//
// All blocks of a trace are decoded already, lie in one page and have one mode, so that they are cut off together. Each
// instruction keeps its own record and block for its handler. A conditional jump inside has one direction in line and
// leaves in the other. Jumps that lead back only end a trace; so every loop still passes a poll (PollPoint).

// SAFETY: records and blocks lie in the vCPU's block arena, which is dropped as a whole and never while a block is being
// translated; indices stay below MaxInsns, because blocks that do not fit are not appended.
internal sealed unsafe partial class Translator
{
    private const int MaxTrace = 32;
    private const int MaxSegments = 4;
    private const int MaxRounds = 4;

    private readonly nint[] _records = new nint[MaxInsns + 1];
    private readonly nint[] _blocks = new nint[MaxInsns + 1];
    private readonly Way[] _ways = new Way[MaxInsns + 1];
    private readonly nint[] _segments = new nint[MaxSegments];
    private int _endOffset;

    // More than one block is translated together.
    private bool _isTrace;

    /// <summary>How an instruction inside a trace goes on.</summary>
    private enum Way : byte
    {
        /// <summary>It is the last, or no jump.</summary>
        Plain,

        /// <summary>A jump to what follows here, which needs no code.</summary>
        Joined,

        /// <summary>A conditional jump that leaves when it is taken.</summary>
        FallsThrough,

        /// <summary>A conditional jump that leaves when it is not taken.</summary>
        IsTaken,
    }

    // The trace ends with a conditional jump to its start.
    private bool IsLoop =>
        _count != 0 && _traits[_count - 1].Kind == InsnKind.Jcc && _insns[_count - 1].NearBranchTarget == 0;

    private Insn* Record(int index) => (Insn*)_records[index];

    private Block* BlockOf(int index) => (Block*)_blocks[index];

    // Offset from the trace's start of what lies behind an instruction.
    private int OffsetBehind(int index) => OffsetOf(index) + Record(index)->Length;

    private int OffsetOf(int index) =>
        Record(index)->Offset + (int)(BlockOf(index)->Physical - _block->Physical);

    private bool Wanders(int index) => ((BlockOf(index)->TlbInsns >> (int)(Record(index) - BlockOf(index)->First)) & 1) != 0;

    // Reads the block and what goes with it.
    private void ReadTrace()
    {
        _count = 0;
        _isTrace = false;
        Append(_block);
        if (_cpu->CountsBlocks != 0 || (_block->Key & BlockKey.User) == 0 || _block->Crosses != 0)
        {
            return;
        }

        int segments = 1;
        _segments[0] = (nint)_block;
        while (segments < MaxSegments && Next(out Way way) is var next && next != null &&
            _count + next->Count <= MaxTrace && !_segments.AsSpan(0, segments).Contains((nint)next))
        {
            _ways[_count - 1] = way;
            _segments[segments++] = (nint)next;
            Append(next);
        }

        _isTrace = segments > 1;
        int round = _count;
        if (IsLoop)
        {
            for (int rounds = 1; rounds < MaxRounds && _count + round <= MaxTrace; rounds++)
            {
                _ways[_count - 1] = Way.IsTaken;
                for (int i = 0; i < segments; i++)
                {
                    Append((Block*)_segments[i]);
                }

                Array.Copy(_ways, 0, _ways, _count - round, round - 1);
            }
        }
    }

    private void Append(Block* block)
    {
        long delta = (long)(block->Physical - _block->Physical);
        for (int i = 0; i < block->Count; i++, _count++)
        {
            Insn* record = block->First + i;
            _reader.Set(block->Source + record->Offset, record->Length);
            _decoder.IP = (ulong)(record->Offset + delta);
            _decoder.Decode(out _insns[_count]);
            _traits[_count] = _traitsTable.Of(_insns[_count]);
            if (_insns[_count].IsInvalid)
            {
                _traits[_count] = new InsnTraits { Kind = InsnKind.Handler, Reads = TraitsTable.AllFlags };
            }

            _records[_count] = (nint)record;
            _blocks[_count] = (nint)block;
            _ways[_count] = Way.Plain;
        }

        _endOffset = block->First[block->Count].Offset + (int)delta;
    }

    // The block that goes behind the trace so far; null for none.
    private Block* Next(out Way way)
    {
        way = Way.Plain;
        ref Instruction last = ref _insns[_count == 0 ? 0 : _count - 1];
        switch (_count == 0 ? InsnKind.Handler : _traits[_count - 1].Kind)
        {
            case InsnKind.Jcc when (long)last.NearBranchTarget >= _endOffset:
                Block* taken = Known((long)last.NearBranchTarget);
                Block* other = Known(_endOffset);
                way = Heat(taken) > Heat(other) ? Way.IsTaken : Way.FallsThrough;
                return way == Way.IsTaken ? taken : other;
            case InsnKind.Jmp when (long)last.NearBranchTarget >= _endOffset:
                way = Way.Joined;
                return Known((long)last.NearBranchTarget);
            case InsnKind.Handler or >= InsnKind.Jcc:
                return null;
            default:
                return Known(_endOffset);
        }
    }

    // A block of this page that has run before.
    private Block* Known(long offset)
    {
        Block* block = IsInPage(offset) ? _cpu->Blocks.Lookup(_block->Physical + (ulong)offset, _block->Key) : null;
        return Heat(block) > 1 && block->Crosses == 0 && block->Count != 0 && block->Generation >= 0 &&
            block->Generation == *block->PageGeneration && block->PageGeneration == _block->PageGeneration
            ? block
            : null;
    }

    private static int Heat(Block* block) =>
        block == null ? 0 : block->EntryFlagImage != null ? int.MaxValue : block->Hits;
}

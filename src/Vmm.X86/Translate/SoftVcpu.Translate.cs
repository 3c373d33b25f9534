// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.ExceptionServices;
using System.Runtime.InteropServices;
using System.Threading;

namespace Vmm.X86;

// The dispatcher's side of translated code: when a block is hot it is translated; entering it, connecting its exits,
// cutting it off. Generated code is entered by a plain unmanaged call: the thread is in preemptive mode, so a garbage
// collection never waits for guest code. Helpers are UnmanagedCallersOnly and let nothing escape.
public sealed unsafe partial class SoftVcpu
{
    private CodeCache? _code;
    private Translator? _translator;
    private TraitsTable? _traits;
    private ExceptionDispatchInfo? _failure;
    private int _exit = -1;
    private bool _wantsBranch;

    /// <summary>Executions by the interpreter before a block is translated; 1 translates at once.</summary>
    internal int TranslateAfter { get; set; } = 6;

    /// <summary>Times that generated code was entered; for statistics.</summary>
    internal long Dispatches { get; private set; }

    /// <summary>Ways out of generated code: by ExitKindOfCode, then handlers that left, then instructions to interpret.</summary>
    internal long[] Leavings { get; } = new long[ReasonInterpret + 1];

    /// <summary>Blocks that the interpreter executed while the vCPU translates.</summary>
    internal long Interpreted { get; private set; }

    /// <summary>Of those, blocks of an instruction that crosses a page.</summary>
    internal long InterpretedCrossing { get; private set; }

    internal const int ReasonHandler = (int)ExitKindOfCode.Tail + 1;
    internal const int ReasonInterpret = ReasonHandler + 1;

    /// <summary>Null when everything is interpreted.</summary>
    internal Translator? Translator => _translator;

    private void OpenTranslator()
    {
        if (!Vm.Translate || Vm.Thunks is null || !OperatingSystem.IsLinux())
        {
            return;
        }

        _code = CodeCache.TryCreate(Vm.Thunks, Vm.ArenaBytes);
        if (_code is not null)
        {
            _traits = new TraitsTable(this);
            _translator = new Translator(_code, _traits)
            {
                PerfMap = Vm.PerfMap,
                CountsAccesses = Vm.CountAccesses,
            };
            _cpu->CountsBlocks = Vm.Deterministic ? 2 : Vm.CountInstructions ? 1 : 0;
            _cpu->Helper = (nint)(delegate* unmanaged<CpuContext*, ulong, ulong, ulong>)&ExecuteRecord;
        }
    }

    private void CloseTranslator() => _code?.Dispose();

    // GS belongs to the thread: Run may be called on any.
    private void EnterThread(CpuContext* cpu)
    {
        if (_code is not null && _code.Stubs.SetGs(cpu) != 0)
        {
            // A host without this service: everything is interpreted.
            _translator = null;
        }
    }

    // Counts an execution by the interpreter; true when the block has generated code now.
    private bool Heat(CpuContext* cpu, Block* block)
    {
        if (_translator is null)
        {
            return false;
        }

        Interpreted++;
        InterpretedCrossing += block->Crosses;
        if (++block->Hits < TranslateAfter)
        {
            return false;
        }

        block->Hits = 0;
        if ((block->Key & (BlockKey.SizeMask | BlockKey.Single)) != 2 ||
            block->PageGeneration == null || block->Generation < 0 || block->Generation != *block->PageGeneration ||
            (block->Crosses != 0 && block->Generation2 != *block->PageGeneration2))
        {
            return false;
        }

        if (_code!.Clears != cpu->Blocks.Clears)
        {
            _code.Reset(cpu->Blocks.Clears);
        }

        if (!_translator.Translate(cpu, block))
        {
            // Full: start again from nothing.
            cpu->BlocksStale = 1;
            Interlocked.Or(ref cpu->Request, RequestBits.Look);
            return false;
        }

        return true;
    }

    // Whether generated code may be entered of a block that the dispatcher has just found, and so knows to be what RIP
    // leads to. One that crosses into another page has to take that for granted until its mapping changes.
    private bool MayEnter(CpuContext* cpu, Block* block)
    {
        if (block->Crosses == 0 || LinkTail(cpu, block))
        {
            return true;
        }

        Interpreted++;
        InterpretedCrossing++;
        return false;
    }

    // False when it is not to be had: the second page is not global while branches have the kernel's tag, or its tables no
    // longer say what the jump cache says (which is the guest's business until INVLPG, but not to be made to last).
    private bool LinkTail(CpuContext* cpu, Block* block)
    {
        ulong from = cpu->Rip & ~Mem.PageOffset;
        ulong tail = from + 4096;
        byte* site = block->TailSite;
        if (CodeCache.IsLinked(cpu, site, from, tail))
        {
            return true;
        }

        if (!IsLasting(cpu, tail, block->Physical2))
        {
            return false;
        }

        cpu->Blocks.AddBranchPage(tail);
        _code!.LinkFar(cpu, site, from, tail, site + FarBranch.Probe + _code.ExecuteDelta);
        return true;
    }

    // Runs generated code from a block on. Next: the interpreter goes on at insn of the current block.
    private Status RunTranslated(CpuContext* cpu, Block* block, Insn** insn)
    {
        cpu->CodeBase = cpu->Rip & ~Mem.PageOffset;
        Prepare(cpu);
        ulong flags = Flags.GetArithmetic(cpu);
        cpu->FlagImage = ((flags & 0xD5) << 8) | (flags >> 11);
        Dispatches++;
        ulong code = _code!.Stubs.Enter(cpu, block->EntryFlagImage);
        _exit = -1;
        if (code == ExitCode.Status)
        {
            Leavings[ReasonHandler]++;
            if (_failure is not null)
            {
                ExceptionDispatchInfo failure = _failure;
                _failure = null;
                failure.Throw();
            }

            // SAFETY: generated code puts only offsets here that the translator wrote into it, of records in the arena; when
            // the arena is emptied, all generated code goes with it. The same holds for every ExitInfo in this file.
            *insn = (Insn*)(cpu->Blocks.Arena + (cpu->ExitInfo >> 8));
            CountLast(cpu, cpu->CurrentBlock, *insn);
            return (Status)(cpu->ExitInfo & 0xFF);
        }

        SetFlags(cpu);
        if (code == ExitCode.Interpret)
        {
            Leavings[ReasonInterpret]++;
            *insn = (Insn*)(cpu->Blocks.Arena + (uint)cpu->ExitInfo);
            cpu->CurrentBlock = (Block*)(cpu->Blocks.Arena + (cpu->ExitInfo >> 32));
            cpu->BlockRip = cpu->CodeBase + (cpu->CurrentBlock->Physical & Mem.PageOffset);
            cpu->Rip = cpu->BlockRip;
            cpu->InstructionCount -= Uncounted(cpu, cpu->CurrentBlock, *insn);
            return Status.Next;
        }

        ExitRecord* exit = _code.Exits + cpu->ExitInfo;
        cpu->CurrentBlock = exit->Source;
        Leavings[exit->Kind]++;
        if (exit->Kind == (byte)ExitKindOfCode.Indirect)
        {
            if (exit->Offset >= 0 && !Paging.IsCanonical(cpu, cpu->Rip))
            {
                // The branch itself faults.
                return Refault(cpu, exit, insn);
            }
        }
        else
        {
            cpu->Rip = cpu->CodeBase + (ulong)exit->Offset;
            if (exit->Kind == (byte)ExitKindOfCode.Poll && cpu->CountsBlocks != 0)
            {
                cpu->InstructionCount -= (ulong)exit->Undo;
            }
        }

        _exit = (int)cpu->ExitInfo;
        return Status.Jump;
    }

    // A computed target that is not canonical: undoes the branch and lets the interpreter raise what it raises.
    private Status Refault(CpuContext* cpu, ExitRecord* exit, Insn** insn)
    {
        cpu->Rsp += (ulong)exit->Undo;
        *insn = (Insn*)(cpu->Blocks.Arena + exit->Offset);
        cpu->InstructionCount -= Uncounted(cpu, exit->Source, *insn);
        cpu->BlockRip = cpu->CodeBase + (exit->Source->Physical & Mem.PageOffset);
        cpu->Rip = cpu->BlockRip;
        return Status.Next;
    }

    // Lets the exit that was taken last lead to a block directly.
    private void Connect(CpuContext* cpu, Block* next)
    {
        int index = _exit;
        _exit = -1;
        if (next->EntryFlagImage == null || _code!.Clears != cpu->Blocks.Clears)
        {
            return;
        }

        ExitRecord* exit = _code.Exits + index;
        switch ((ExitKindOfCode)exit->Kind)
        {
            case ExitKindOfCode.Indirect:
                InsertBranch(cpu, next);
                break;
            case ExitKindOfCode.Far:
                if (InsertBranch(cpu, next))
                {
                    _code.LinkFar(cpu, exit->Site, cpu->CodeBase, cpu->Rip & ~Mem.PageOffset, next->EntryFlagImage);
                }
                else
                {
                    CodeCache.ProbeFar(exit->Site);
                }

                break;
            case ExitKindOfCode.Direct when IsSamePlace(exit, next):
                byte* target = exit->HostFlags != 0 ? next->EntryHostFlags : next->EntryFlagImage;
                *(int*)(exit->Site - 4) = (int)(target - _code.ExecuteDelta - exit->Site);
                break;
            case ExitKindOfCode.Stale when IsSamePlace(exit, next):
                var emitter = new Emitter(exit->Site);
                emitter.Jump(next->EntryHostFlags - _code.ExecuteDelta);
                emitter.At = exit->Site + CodeCache.StaleBytes;
                emitter.Jump(next->EntryFlagImage - _code.ExecuteDelta);
                break;
            default:
                break;
        }
    }

    private static bool IsSamePlace(ExitRecord* exit, Block* next) =>
        next->Physical == (exit->Source->Physical & ~Mem.PageOffset) + (ulong)exit->Offset &&
        next->Key == exit->Source->Key && exit->Offset is >= 0 and <= 4095;

    private static bool InsertBranch(CpuContext* cpu, Block* next)
    {
        ulong linear = cpu->Rip;
        if (!IsLasting(cpu, linear, next->Physical))
        {
            return false;
        }

        // SAFETY: BranchSlot and SecondSlot stay inside the tables.
        int slot = BlockCache.BranchSlot(linear);
        ulong context = (ulong)Tag(cpu) << 48;
        BranchKey* key = cpu->Blocks.BranchKeys + slot;
        if (key->Context != 0 && (key->Linear != linear || key->Context != context))
        {
            int second = BlockCache.SecondSlot(slot);
            cpu->Blocks.BranchKeys[second] = *key;
            cpu->Blocks.BranchTargets[second] = cpu->Blocks.BranchTargets[slot];
        }

        *key = new BranchKey { Linear = linear, Context = context };
        cpu->Blocks.BranchTargets[slot] = new BranchTarget
        {
            Code = next->EntryFlagImage,
            Page = linear & ~Mem.PageOffset,
        };
        cpu->Blocks.AddBranchPage(linear);
        return true;
    }

    // Whether code may take for granted, under the present tag, that a page is where a block was found. The kernel's branches
    // are the same in every address space where its pages are global: they have the tag of the supervisor's TLB. Those to
    // pages that are not global are not kept then; nor those to a page that is global by now, but elsewhere: the address
    // space's own, older translation may be used until it is left, and no longer.
    private static bool IsLasting(CpuContext* cpu, ulong linear, ulong physical) =>
        !IsShared(cpu) || (Paging.Translate(cpu, linear, Access.Execute, MmuMode.Supervisor, out Translation page) &&
            page.IsGlobal && page.Physical == physical);

    private static bool IsShared(CpuContext* cpu) =>
        (cpu->ModeKey & BlockKey.User) == 0 && (cpu->Cr4 & Cr4.Pge) != 0;

    /// <summary>What BranchTag has beside the address space's number at level 3.</summary>
    internal const int UserTag = 0x1000;

    /// <summary>The same with EFLAGS.AC.</summary>
    internal const int AcTag = 0x2000;

    /// <summary>The branch tag of the present address space and mode.</summary>
    internal static ushort Tag(CpuContext* cpu)
    {
        uint tag = (uint)(IsShared(cpu) ? cpu->GlobalAsid : cpu->SpaceAsid);
        tag |= (cpu->ModeKey & BlockKey.User) != 0 ? (uint)UserTag : 0;
        tag |= (cpu->ModeKey & BlockKey.Ac) != 0 ? (uint)AcTag : 0;
        return (ushort)tag;
    }

    // What generated code takes for granted until a handler runs.
    private static void Prepare(CpuContext* cpu)
    {
        cpu->BranchTag = Tag(cpu);
        const uint AllMasks = 0x1F80;
        bool ready = (cpu->Mxcsr & AllMasks) == AllMasks && VectorUnit.SseReady(cpu);
        cpu->VectorsReady = !ready ? 0 : VectorUnit.AvxReady(cpu) ? 2 : 1;

        // All exceptions masked and none pending: nothing in the guest's x87 code can trap.
        bool x87 = (cpu->Cr0 & (Cr0.Em | Cr0.Ts)) == 0 && (cpu->Fcw & 0x3F) == 0x3F && (cpu->Fsw & 0x80) == 0;
        cpu->X87Ready = x87 ? 1 : 0;
        cpu->XstateBv |= 7;
        *(&cpu->XstateBv + 1) = 0;
    }

    private static void SetFlags(CpuContext* cpu)
    {
        ulong image = cpu->FlagImage;
        Flags.SetArithmetic(cpu, ((image >> 8) & 0xD5) | ((image & 1) << 11));
    }

    // Code pages were written: cuts off what was translated from them.
    private void CutOverwrittenCode(CpuContext* cpu)
    {
        long seen = cpu->SeenCodeWrites;
        long now = Volatile.Read(ref cpu->Shared->CodeWrites);
        cpu->SeenCodeWrites = now;
        if (_code is null || _code.Clears != cpu->Blocks.Clears)
        {
            return;
        }

        if (now - seen > VmShared.RingEntries / 2)
        {
            cpu->BlocksStale = 1;
            return;
        }

        for (; seen < now; seen++)
        {
            _code.Cut(cpu, cpu->Shared->CodeWriteRing[seen & (VmShared.RingEntries - 1)]);
        }
    }

    // The function behind CodeStubs.Handler; answers a HandlerResult.
    [UnmanagedCallersOnly]
    private static ulong ExecuteRecord(CpuContext* cpu, ulong recordOffset, ulong blockOffset)
    {
        var insn = (Insn*)(cpu->Blocks.Arena + recordOffset);
        var block = (Block*)(cpu->Blocks.Arena + (blockOffset & ~(ulong)HandlerArgument.InTrace));
        Block* head = (blockOffset & HandlerArgument.InTrace) != 0 ? (Block*)(cpu->Blocks.Arena + cpu->TraceHead) : block;
        Status status;
        try
        {
            SetFlags(cpu);
            cpu->CurrentBlock = block;
            cpu->BlockRip = cpu->CodeBase + (block->Physical & Mem.PageOffset);
            if (cpu->Thrashing != 0)
            {
                cpu->Thrashing = 0;
                uint bit = 1U << (int)(insn - block->First);
                if ((block->TlbInsns & bit) == 0)
                {
                    // Some forms have a site whatever happens: making those anew would not end.
                    block->TlbInsns |= bit;
                    Retire(cpu, block, head);
                }
            }

            cpu->HandlerCalls[insn->Code]++;

            // The handler, and a device behind it, sees the count of what was executed before.
            ulong rest = Uncounted(cpu, block, insn);
            cpu->InstructionCount -= rest;
            status = insn->Handler(cpu, insn);
            cpu->InstructionCount += rest;
            if (status == Status.Next)
            {
                int loaded = cpu->VectorsLoaded;
                Prepare(cpu);
                if (Volatile.Read(ref cpu->Request) == 0 && cpu->ModeKey == block->Key &&
                    loaded <= cpu->VectorsReady && cpu->X87Loaded <= cpu->X87Ready)
                {
                    ulong flags = Flags.GetArithmetic(cpu);
                    cpu->FlagImage = ((flags & 0xD5) << 8) | (flags >> 11);
                    return HandlerResult.Next;
                }

                cpu->Rip = Insn.NextAddress(cpu, insn);
                status = Status.Look;
            }
            else if (status == Status.Fault)
            {
                status = From(cpu).DeliverHere(cpu, insn);
            }

            if (status <= Status.Look && GoOn(cpu))
            {
                CountLast(cpu, block, insn);
                return HandlerResult.Jump;
            }
        }
        catch (Exception error)
        {
            From(cpu)._failure = ExceptionDispatchInfo.Capture(error);
            status = Status.Look;
        }

        cpu->ExitInfo = (recordOffset << 8) | (uint)status;
        return HandlerResult.Leave;
    }

    // A block's code is to be made anew, alone and in the trace that met it.
    private static void Retire(CpuContext* cpu, Block* block, Block* head)
    {
        CodeCache code = From(cpu)._code!;
        code.Retire(cpu, block);
        if (head != block)
        {
            code.Retire(cpu, head);
        }
    }

    // What a block has counted in advance of an instruction and all behind it; 0 where blocks do not count.
    private static ulong Uncounted(CpuContext* cpu, Block* block, Insn* insn) =>
        cpu->CountsBlocks == 0 ? 0 : (ulong)(block->Count - (insn - block->First));

    // Makes the count right for a block that ends with an instruction other than its last.
    private static void CountLast(CpuContext* cpu, Block* block, Insn* insn)
    {
        cpu->InstructionCount -= Uncounted(cpu, block, insn);
        cpu->InstructionCount++;
    }

    // Delivers the fault of an instruction in generated code.
    private Status DeliverHere(CpuContext* cpu, Insn* insn)
    {
        _last = insn;
        PrepareFault(cpu);
        cpu->PendingDebug = 0;
        return Interrupts.DeliverFault(cpu) ? Status.Look : Status.Shutdown;
    }

    // After a change of place, mode or translations: goes on in generated code when nothing waits for the outer round
    // (RunOnce, ServeEvents) and the indirect-branch cache knows the place.
    private static bool GoOn(CpuContext* cpu)
    {
        const ulong watched = 0xFF;
        if ((Volatile.Read(ref cpu->Request) | cpu->Shadow | cpu->NmiPending | cpu->BlocksStale) != 0 ||
            cpu->PendingDebug != 0 || cpu->Mode != ProcessorMode.Long || !Paging.IsCanonical(cpu, cpu->Rip) || (cpu->Dr7 & watched) != 0 ||
            cpu->Activity != (int)Core.ActivityState.Running || (cpu->RflagsSystem & Rflags.Tf) != 0 ||
            (cpu->InterruptHint != 0 && (cpu->RflagsSystem & Rflags.If) != 0))
        {
            return false;
        }

        From(cpu)._softwareInterrupt = false;
        Prepare(cpu);
        // SAFETY: BranchSlot stays inside the tables; targets are entries of blocks of the present arena, or of dead ones,
        // which forward.
        int slot = BlockCache.BranchSlot(cpu->Rip);
        if (!IsBranch(cpu, slot) && !IsBranch(cpu, slot = BlockCache.SecondSlot(slot)))
        {
            From(cpu)._wantsBranch = true;
            return false;
        }

        cpu->RflagsSystem &= ~Rflags.Rf;
        cpu->CodeBase = cpu->Rip & ~Mem.PageOffset;
        ulong flags = Flags.GetArithmetic(cpu);
        cpu->FlagImage = ((flags & 0xD5) << 8) | (flags >> 11);
        cpu->ExitInfo = (ulong)cpu->Blocks.BranchTargets[slot].Code;
        return true;
    }

    // Whether an entry of the indirect-branch cache is RIP's.
    private static bool IsBranch(CpuContext* cpu, int slot)
    {
        BranchKey* key = cpu->Blocks.BranchKeys + slot;
        return key->Linear == cpu->Rip && key->Context == (ulong)cpu->BranchTag << 48;
    }

    // The block at RIP was looked for in vain by GoOn: the next time it is there.
    private void RememberBranch(CpuContext* cpu, Block* block)
    {
        _wantsBranch = false;
        if (block->EntryFlagImage != null && _code!.Clears == cpu->Blocks.Clears)
        {
            InsertBranch(cpu, block);
        }
    }
}

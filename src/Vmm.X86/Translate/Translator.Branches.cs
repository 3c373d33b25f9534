// SPDX-License-Identifier: BSD-2-Clause
using Iced.Intel;

namespace Vmm.X86;

// Ways out of a block. Inside the page: a jump that the dispatcher links to its target. To a known place in another page:
// a jump that is linked, too, but looks first whether the same code page runs in the same address space (FarBranch); an
// invalidation of translations unlinks those. Otherwise a probe of the indirect-branch cache, two tables of (linear
// address, quadword of Request and BranchTag while nothing is requested) and (entry for flags in the image, page):
//
//     T0 = target; T1 = (T0 ^ T0 >> 11) & (entries - 1) << 1
//     cmp T0, keys[T1].Linear; jne miss; T0 = [Request, BranchTag]; cmp T0, keys[T1].Context; jne other
//     CodeBase = targets[T1].Page; jmp targets[T1].Code
//     other: T0 = keys[T1].Linear; miss: Rip = T0
//
// Whoever takes an entry moves what was there to its second place (BlockCache.SecondSlot), where all misses look once more
// (CodeStubs.BranchMiss): two targets of a loop may have the same entry, and two processes have the same program.
//
// Tables hold canonical addresses only, so what the guest takes from memory or a register for RET and JMP needs no other
// look: what is not canonical misses, and the dispatcher lets the branch fault. CALL looks before it pushes. A pending
// request makes every probe miss.
internal sealed unsafe partial class Translator
{
    private bool IsInPage(long offset) => PageOffset + offset is >= 0 and <= 4095;

    private void EmitPoll()
    {
        _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.Request), 0);
        _cold[_coldCount++] = new ColdExit
        {
            Jump = _e.JumpIf(HostCondition.NotEqual),
            Kind = ColdKind.Poll,
            Offset = OffsetOf(_at),
            Level = _count - _at,
        };
        _inHost = false;
    }

    // Where the trace polls for the jumps in it that lead back: the first place where flags are dead; -1 for none, or when
    // such a jump comes before.
    private int PollPoint()
    {
        int first = 0;
        while (first < _count && !LeadsBack(first))
        {
            first++;
        }

        for (int i = 0; i <= first && first < _count; i++)
        {
            if (_live[i] == 0)
            {
                return i;
            }
        }

        return -1;
    }

    // An instruction that jumps back, out of the trace.
    private bool LeadsBack(int i) => _ways[i] is Way.Plain or Way.FallsThrough &&
        _traits[i].Kind is InsnKind.Jcc or InsnKind.Jmp && IsBackward((long)_insns[i].NearBranchTarget, i);

    private bool IsBackward(long offset, int i) =>
        offset < (i < _count ? OffsetBehind(i) : EndOffset) && IsInPage(offset);

    private void EmitJcc(in Instruction instruction)
    {
        FlushRsp();
        NeedFlags(InGroup ? Host.T0 : Host.T1);
        int condition = (int)instruction.ConditionCode - (int)ConditionCode.o;
        if (_ways[_at] == Way.IsTaken)
        {
            LeaveIf(condition ^ 1, OffsetBehind(_at));
            return;
        }

        LeaveIf(condition, (long)instruction.NearBranchTarget);
        if (_ways[_at] == Way.Plain)
        {
            ExitTo(EndOffset);
        }
    }

    // Leaves the trace on a condition.
    private void LeaveIf(int condition, long target)
    {
        bool pollsHere = IsBackward(target, _at) && _poll < 0;
        _cold[_coldCount++] = new ColdExit
        {
            Jump = _e.JumpIf(condition),
            Kind = IsInPage(target) && !pollsHere ? ColdKind.Exit : ColdKind.Far,
            Offset = (int)target,
            InHost = _inHost,
            InImage = _inImage,
            IsBackward = pollsHere,
        };
    }

    // Goes to an offset from the block's start, from the hot path.
    private void ExitTo(long offset)
    {
        if (!IsInPage(offset))
        {
            if (offset != (int)offset || offset is > 0x7FFF0000 or < -0x7FFF0000)
            {
                CallHandler();
                return;
            }

            FreeFlagsForExit();
            EmitFarBranch((int)offset);
            return;
        }

        if (IsBackward(offset, _at) && _poll < 0)
        {
            FreeFlagsForExit();
            _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.Request), 0);
            _cold[_coldCount++] = new ColdExit
            {
                Jump = _e.JumpIf(HostCondition.NotEqual),
                Kind = ColdKind.Poll,
                Offset = (int)offset,
            };
            _inHost = false;
        }

        byte* jump = _e.JumpForward();
        _cold[_coldCount++] = new ColdExit
        {
            Jump = jump,
            Kind = ColdKind.Exit,
            Offset = (int)offset,
            InHost = _inHost,
            InImage = _inImage,
        };
    }

    // Behind the last instruction, what is live is what the successors read; a probe does not know them.
    private void FreeFlagsForExit()
    {
        if (!_inImage && _inHost)
        {
            SaveFlags();
            _inImage = true;
        }

        _inHost = false;
    }

    // A direct branch to another page, with the flags in the image. Layout: FarBranch.
    private void EmitFarBranch(int offset)
    {
        byte* site = EmitFarCheck(out byte* otherTag, out byte* other);
        _e.Store(HostMemory.Context(Offsets.CodeBase), Host.T0);
        _e.JumpForward();
        CodeCache.UnlinkFar(site);
        int exit = _cache.AddExit(ExitKindOfCode.Far, _block, PageOffset + offset, site, false);
        _e.MoveImmediate(Host.T0, (uint)exit);
        _e.Jump(_cache.Stubs.ExitFlagImage);
        LandFarCheck(otherTag, other);
        _e.Load(Host.T0, HostMemory.Context(Offsets.CodeBase));
        _e.AluImmediate(AluOp.Add, Host.T0, offset + PageOffset);
        EmitBranchProbe(exit);
    }

    // In front of the body of a block that crosses into another page, with the flags in the image. Layout: FarBranch.
    private void EmitTailCheck()
    {
        byte* site = EmitFarCheck(out byte* otherTag, out byte* other);
        _block->TailSite = site;

        // As long as the store that stands here in a branch.
        _e.Load(Host.T0, HostMemory.Context(Offsets.CodeBase));
        byte* body = _e.JumpForward();
        CodeCache.UnlinkFar(site);
        LandFarCheck(otherTag, other);
        int exit = _cache.AddExit(ExitKindOfCode.Tail, _block, PageOffset, site, false);
        _e.MoveImmediate(Host.T0, (uint)exit);
        _e.Jump(_cache.Stubs.ExitFlagImage);
        _e.Land(body);
    }

    // The part of the layout in front of the change of CodeBase.
    private byte* EmitFarCheck(out byte* otherTag, out byte* other)
    {
        otherTag = null;
        if (IsLa57)
        {
            _e.CompareWord(HostMemory.Context(Offsets.BranchTag), SoftVcpu.Tag(_cpu));
            otherTag = _e.JumpIf(HostCondition.NotEqual);
        }

        byte* site = _e.At;
        _e.JumpForward();
        _e.Load(Host.T0, HostMemory.Context(Offsets.CodeBase));
        _e.Alu(AluOp.Xor, Host.T0, HostMemory.Context(Offsets.Request));
        _e.MoveImmediate64(Host.T1, 0);
        _e.Alu(AluOp.Cmp, Host.T0, Host.T1);
        other = _e.JumpIf(HostCondition.NotEqual);
        _e.MoveImmediate64(Host.T0, 0);
        return site;
    }

    private void LandFarCheck(byte* otherTag, byte* other)
    {
        _e.Land(other);
        if (otherTag != null)
        {
            _e.Land(otherTag);
        }
    }

    // A branch to a computed address, or one (record -1) whose target the translator knows to be as good as canonical;
    // record: the instruction that faults when the target is not.
    private void EmitBranchProbe(int record, short undoRsp)
    {
        // SAFETY: a distance inside the arena, as in EmitHandlerCall.
        int offset = record < 0 ? -1 : (int)((byte*)Record(record) - _cpu->Blocks.Arena);
        EmitBranchProbe(_cache.AddExit(ExitKindOfCode.Indirect, BlockOf(_count - 1), offset, null, false, undoRsp));
    }

    // Goes to the linear address in T0.
    private void EmitBranchProbe(int exit)
    {
        CountAccess(AccessCount.BranchProbes);
        _e.Move(Host.T1, Host.T0);
        _e.Shift(5, Host.T1, 11);
        _e.Alu32(AluOp.Xor, Host.T1, Host.T0);
        _e.AluImmediate(AluOp.And, Host.T1, (BlockCache.Branches - 1) << 1, wide: false);
        _e.Alu(AluOp.Cmp, Host.T0, BranchTable(CpuContext.BranchKeysOffset + BranchKey.LinearOffset));
        byte* miss = _e.JumpIf(HostCondition.NotEqual);
        _e.Load(Host.T0, HostMemory.Context(Offsets.Request));
        _e.Alu(AluOp.Cmp, Host.T0, BranchTable(CpuContext.BranchKeysOffset + BranchKey.ContextOffset));
        byte* other = _e.JumpIf(HostCondition.NotEqual);
        _e.Load(Host.T0, BranchTable(CpuContext.BranchTargetsOffset + BranchTarget.PageOffset));
        _e.Store(HostMemory.Context(Offsets.CodeBase), Host.T0);
        _e.JumpMemory(BranchTable(CpuContext.BranchTargetsOffset + BranchTarget.CodeOffset));
        _e.Land(other);
        _e.Load(Host.T0, BranchTable(CpuContext.BranchKeysOffset + BranchKey.LinearOffset));
        _e.Land(miss);
        CountAccess(AccessCount.BranchMisses);
        _e.Store(HostMemory.Context(Offsets.Rip), Host.T0);
        _e.MoveImmediate(Host.T0, (uint)exit);
        _e.Jump(_cache.Stubs.BranchMiss);
    }

    private static HostMemory BranchTable(int offset) => CodeStubs.BranchTable(offset);

    private void EmitJmpIndirect(in Instruction instruction)
    {
        if (!LoadTarget(instruction))
        {
            CallHandler();
            return;
        }

        EmitBranchProbe(_at, 0);
    }

    // T0 = the operand of an indirect branch.
    private bool LoadTarget(in Instruction instruction)
    {
        if (instruction.Op0Kind == OpKind.Memory)
        {
            if (!IsAddressable(instruction))
            {
                return false;
            }

            FreeFlagsForExit();
            HostMemory operand = Check(instruction, 8, write: false, 1, needsT0: false);
            _e.Load(Host.T0, operand);
            return true;
        }

        FreeFlagsForExit();
        int number = Number(instruction.Op0Register);
        if (IsSpilled(number))
        {
            _e.Load(Host.T0, Slot(number));
        }
        else
        {
            _e.Move(Host.T0, HostOf(number));
        }

        return true;
    }

    private void PushReturnAddress()
    {
        CheckPush();
        _e.Load(Host.T0, HostMemory.Context(Offsets.CodeBase));
        _e.Lea(Host.T0, new HostMemory(Host.T0, EndOffset + PageOffset));
        StorePushed(Host.T0);
    }

    private void EmitCall(in Instruction instruction)
    {
        // What is called in this page may be known not to read flags.
        long target = (long)instruction.NearBranchTarget;
        if (_live[_at] != 0)
        {
            FreeFlagsForExit();
        }

        PushReturnAddress();
        FlushRsp();
        if (!IsInPage(target))
        {
            EmitFarBranch((int)target);
            return;
        }

        byte* jump = _e.JumpForward();
        _cold[_coldCount++] = new ColdExit
        {
            Jump = jump,
            Kind = ColdKind.Exit,
            Offset = (int)target,
            InImage = true,
        };
    }

    // To the handler when bits 63:47 (63:56 with CR4.LA57) of an address are not equal. Destroys the scratch register.
    private void SlowJumpUnlessCanonical(int address, int scratch)
    {
        int copies = IsLa57 ? 7 : 16;
        _e.Move(scratch, address);
        _e.Shift(4, scratch, copies);
        _e.Shift(7, scratch, copies);
        _e.Alu(AluOp.Cmp, scratch, address);
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
    }

    private void EmitCallIndirect(in Instruction instruction)
    {
        if (!LoadTarget(instruction))
        {
            CallHandler();
            return;
        }

        // A target that is not canonical faults before anything is pushed.
        SlowJumpUnlessCanonical(Host.T0, Host.T1);

        // The target waits in Rip.
        _e.Store(HostMemory.Context(Offsets.Rip), Host.T0);
        PushReturnAddress();
        _e.Load(Host.T0, HostMemory.Context(Offsets.Rip));
        EmitBranchProbe(-1, 0);
    }

    private void EmitRet(in Instruction instruction)
    {
        FreeFlagsForExit();
        int drop = 8 + (instruction.Code == Code.Retnq_imm16 ? instruction.Immediate16 : 0);
        HostMemory top = CheckPop();
        _e.Load(Host.T0, top);
        MoveRsp(drop);
        FlushRsp();
        EmitBranchProbe(_at, (short)-drop);
    }

    private void EmitCold(ref ColdExit cold)
    {
        _e.Land(cold.Jump);
        switch (cold.Kind)
        {
            case ColdKind.Vectors:
                _e.Call(cold.Level == 0 ? _cache.Stubs.LoadX87 : _cache.Stubs.LoadVectors);
                _e.JumpIf(HostCondition.AboveOrEqual, (byte*)cold.Back);
                _e.MoveImmediate(Host.T0, (uint)((byte*)_block->First - _cpu->Blocks.Arena));
                _e.MoveImmediate(Host.T1, (uint)((byte*)_block - _cpu->Blocks.Arena));
                _e.Jump(_cache.Stubs.Interpret);
                break;
            case ColdKind.Poll:
                int poll = _cache.AddExit(
                    ExitKindOfCode.Poll, _block, PageOffset + cold.Offset, null, false, (short)cold.Level);
                _e.MoveImmediate(Host.T0, (uint)poll);
                _e.Jump(_cache.Stubs.ExitFlagImage);
                break;
            case ColdKind.Far:
                _inHost = cold.InHost;
                _inImage = cold.InImage;
                if (cold.IsBackward)
                {
                    FreeFlagsForExit();
                    _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.Request), 0);
                    byte* quiet = _e.JumpIf(HostCondition.Equal);
                    int exit = _cache.AddExit(ExitKindOfCode.Poll, _block, PageOffset + cold.Offset, null, false);
                    _e.MoveImmediate(Host.T0, (uint)exit);
                    _e.Jump(_cache.Stubs.ExitFlagImage);
                    _e.Land(quiet);
                    byte* jump = _e.JumpForward();
                    var inner = new ColdExit
                    {
                        Jump = jump,
                        Kind = ColdKind.Exit,
                        Offset = cold.Offset,
                        InImage = true,
                    };
                    EmitCold(ref inner);
                    break;
                }

                FreeFlagsForExit();
                EmitFarBranch(cold.Offset);
                break;
            default:
                bool inHost = cold.InHost || !cold.InImage;
                int direct = _cache.AddExit(
                    ExitKindOfCode.Direct, _block, PageOffset + cold.Offset, cold.Jump, inHost);
                _e.MoveImmediate(Host.T0, (uint)direct);
                _e.Jump(inHost ? _cache.Stubs.ExitHostFlags : _cache.Stubs.ExitFlagImage);
                break;
        }
    }
}

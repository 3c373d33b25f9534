// SPDX-License-Identifier: BSD-2-Clause
using Iced.Intel;

namespace Vmm.X86;

// Instructions that stay in line: those that pass through with other registers, LEA, division and the stack.
internal sealed unsafe partial class Translator
{
    private void EmitInsn()
    {
        ref Instruction instruction = ref _insns[_at];
        InsnKind kind = _traits[_at].Kind;
        bool keepsHeld = kind is InsnKind.Pass or InsnKind.Vector or InsnKind.X87 or InsnKind.Nop or InsnKind.Lea
            or InsnKind.Push or InsnKind.PushImmediate or InsnKind.Pop or InsnKind.Jcc or InsnKind.Jmp;
        _held = keepsHeld ? _held : -1;
        if (!InGroup)
        {
            OpenGroup();
        }
        else if (_rspDelta != 0 && ReadsRsp(instruction))
        {
            FlushRsp();
        }

        EmitInsn(instruction, kind);
        _held = keepsHeld ? _held : -1;
        if (_at == _groupLast)
        {
            FlushRsp();
        }
    }

    private void EmitInsn(in Instruction instruction, InsnKind kind)
    {
        switch (kind)
        {
            case InsnKind.Pass:
            case InsnKind.Vector:
            case InsnKind.X87:
                OrHandler(Mark(), TryPass(instruction));
                break;
            case InsnKind.Nop:
                break;
            case InsnKind.Lea:
                EmitLea(instruction);
                break;
            case InsnKind.Pushf:
                EmitPushf();
                break;
            case InsnKind.Cli:
                EmitCli();
                break;
            case InsnKind.Sti:
                EmitSti();
                break;
            case InsnKind.MoveFromSegment:
                EmitMoveFromSegment(instruction);
                break;
            case InsnKind.Swapgs:
                EmitSwapgs();
                break;
            case InsnKind.Rdpkru:
                EmitRdpkru();
                break;
            case InsnKind.Cpuid:
                EmitCpuid();
                break;
            case InsnKind.Direction:
                EmitDirection(instruction);
                break;
            case InsnKind.MoveFromControl:
                EmitMoveFromControl(instruction);
                break;
            case InsnKind.String:
                EmitString(instruction);
                break;
            case InsnKind.BitString:
                OrHandler(Mark(), TryBitString(instruction));
                break;
            case InsnKind.PopMemory:
                OrHandler(Mark(), TryPopMemory(instruction));
                break;
            case InsnKind.Ac:
                EmitAc(instruction.Mnemonic == Mnemonic.Stac);
                break;
            case InsnKind.Syscall:
                EmitSyscall();
                break;
            case InsnKind.Sysret:
                EmitSysret();
                break;
            case InsnKind.Rdtsc:
                EmitRdtsc(instruction);
                break;
            case InsnKind.Rdpid:
                EmitRdpid(instruction);
                break;
            case InsnKind.Div:
            case InsnKind.Idiv:
                OrHandler(Mark(), TryDivide(instruction, kind == InsnKind.Idiv));
                break;
            case InsnKind.Push:
                EmitPush(instruction);
                break;
            case InsnKind.PushImmediate:
                EmitPushImmediate(instruction);
                break;
            case InsnKind.Pop:
                EmitPop(instruction);
                break;
            case InsnKind.Leave:
                EmitLeave();
                break;
            case InsnKind.Jcc:
                EmitJcc(instruction);
                break;
            case InsnKind.Jmp:
                if (_ways[_at] == Way.Plain)
                {
                    ExitTo((long)instruction.NearBranchTarget);
                }

                break;
            case InsnKind.JmpIndirect:
                EmitJmpIndirect(instruction);
                break;
            case InsnKind.Call:
                EmitCall(instruction);
                break;
            case InsnKind.CallIndirect:
                EmitCallIndirect(instruction);
                break;
            case InsnKind.Ret:
                EmitRet(instruction);
                break;
            default:
                CallHandler();
                break;
        }
    }

    // Where code, flags and slow paths stand, to come back to.
    private EmitMark Mark() => new()
    {
        At = _e.At,
        SlowCount = _slowCount,
        MissCount = _missCount,
        InHost = _inHost,
        InImage = _inImage,
    };

    // Takes back what an attempt has emitted that turned out not to be possible, and calls the handler.
    private void OrHandler(in EmitMark mark, bool isDone)
    {
        if (isDone)
        {
            return;
        }

        _e.At = mark.At;
        _slowCount = mark.SlowCount;
        _missCount = mark.MissCount;
        _inHost = mark.InHost;
        _inImage = mark.InImage;
        CallHandler();
    }

    // The interpreter's handler executes the instruction. Flags are everywhere afterwards.
    private void CallHandler()
    {
        // Inside a group this is no way out: T1 would be lost.
        _groupFailed |= InGroup;
        _held = -1;
        FreeFlags();
        EmitHandlerCall(_at);
        _inHost = true;
        _inImage = true;
        HandlerSites++;
        HandlerCodes[(int)_insns[_at].Code]++;
    }

    // Of the whole register: Iced counts byte registers differently.
    private static int Number(Register register) => register.GetFullRegister() - Register.RAX;

    private static bool IsSpilled(Register register) =>
        register.IsGPR() && !IsHighByte(register) && IsSpilled(Number(register));

    private static bool IsHighByte(Register register) => register is >= Register.AH and <= Register.BH;

    // A register of the size of another one.
    private static Register Like(Register original, int host) => original.GetSize() switch
    {
        8 => Register.RAX + host,
        4 => Register.EAX + host,
        2 => Register.AX + host,
        _ => host < 4 ? Register.AL + host : Register.SPL + (host - 4),
    };

    private static Register Full(int host) => Register.RAX + host;

    private bool TryPass(in Instruction original)
    {
        Instruction instruction = original;
        ref InsnTraits traits = ref _traits[_at];
        int memory = -1;
        int spilled0 = -1;
        int spilled1 = -1;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            OpKind kind = instruction.GetOpKind(i);
            if (kind == OpKind.Memory)
            {
                memory = i;
            }
            else if (kind == OpKind.Register && IsSpilled(instruction.GetOpRegister(i)))
            {
                int number = Number(instruction.GetOpRegister(i));
                if (spilled0 < 0 || spilled0 == number)
                {
                    spilled0 = number;
                }
                else if (spilled1 < 0 || spilled1 == number)
                {
                    spilled1 = number;
                }
                else
                {
                    return false;
                }
            }
        }

        if (memory >= 0 && (spilled1 >= 0 || !IsAddressable(instruction)))
        {
            return false;
        }

        if (spilled1 >= 0 && spilled1 == _held)
        {
            (spilled0, spilled1) = (spilled1, spilled0);
        }

        int loads = 0;
        int stores = 0;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            if (instruction.GetOpKind(i) == OpKind.Register && IsSpilled(instruction.GetOpRegister(i)))
            {
                Register register = instruction.GetOpRegister(i);
                int access = (traits.Access >> (2 * i)) & 3;
                int bit = Number(register) == spilled0 ? 1 : 2;
                loads |= (access & 1) != 0 || register.GetSize() < 4 ? bit : 0;
                stores |= (access & 2) != 0 ? bit : 0;
            }
        }

        // What is only written can share T1 with the address.
        bool isMember = IsMember;
        int first = memory < 0 || isMember || (loads & 1) != 0 ? Host.T0 : Host.T1;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            Register register = instruction.GetOpKind(i) == OpKind.Register ? instruction.GetOpRegister(i) : Register.None;
            if (!register.IsGPR() || IsHighByte(register))
            {
                continue;
            }

            int number = Number(register);
            if (IsSpilled(number))
            {
                instruction.SetOpRegister(i, Like(register, number == spilled0 ? first : Host.T1));
            }
            else if (number == Host.Rsp)
            {
                instruction.SetOpRegister(i, Like(register, Host.GuestRsp));
            }
        }

        bool touches = (traits.Reads | traits.Writes) != 0;
        if (isMember)
        {
            SetMemory(ref instruction, MemberOperand);
        }
        else if (memory >= 0)
        {
            bool restores = touches && _needed[_at] != 0;
            int access = (traits.Access >> (2 * memory)) & 3;
            bool isVector = traits.Kind == InsnKind.Vector;
            int size = isVector ? traits.MemoryBytes : original.MemorySize.GetSize();
            bool locks = original.HasLockPrefix || original.Mnemonic is Mnemonic.Xchg or Mnemonic.Cmpxchg16b;
            if (size is 0 or > 32 || access == 0)
            {
                return false;
            }

            FreeFlags();
            HostMemory operand = Check(
                original, size, (access & 2) != 0, isVector ? traits.Alignment : locks ? size : 1,
                needsT0: restores || (loads & 1) != 0, isStore: access == 2);
            SetMemory(ref instruction, operand);
        }

        if (touches)
        {
            NeedFlags(memory >= 0 || InGroup ? Host.T0 : Host.T1);
        }

        if ((loads & 1) != 0)
        {
            Hold(spilled0);
        }

        if ((loads & 2) != 0)
        {
            _e.Load(Host.T1, Slot(spilled1));
        }

        if (!Encode(instruction))
        {
            return false;
        }

        if ((stores & 1) != 0)
        {
            _e.Store(Slot(spilled0), first);
            _held = first == Host.T0 ? spilled0 : _held == spilled0 ? -1 : _held;
        }

        if ((stores & 2) != 0)
        {
            _e.Store(Slot(spilled1), Host.T1);
        }

        if (traits.Writes != 0)
        {
            WroteFlags();
            ClearUndefined();
        }

        return true;
    }

    // Behind an instruction of a deterministic VM: saves flags, with those clear that the architecture leaves undefined, if
    // anybody may see them.
    private void ClearUndefined()
    {
        uint undefined = _traits[_at].Undefined & _live[_at + 1];
        if (undefined == 0)
        {
            return;
        }

        CodeStubs.SaveFlags(ref _e, InGroup ? Host.T0 : Host.T1, Image((RflagsBits)undefined));
        _held = InGroup ? -1 : _held;
        _inHost = false;
        _inImage = true;
    }

    // Iced's bits as FlagImage has them: OF in bit 0, the low byte of RFLAGS above.
    private static int Image(RflagsBits flags)
    {
        int image = (flags & RflagsBits.OF) != 0 ? 1 : 0;
        image |= (flags & RflagsBits.CF) != 0 ? (int)Rflags.Cf << 8 : 0;
        image |= (flags & RflagsBits.PF) != 0 ? (int)Rflags.Pf << 8 : 0;
        image |= (flags & RflagsBits.AF) != 0 ? (int)Rflags.Af << 8 : 0;
        image |= (flags & RflagsBits.ZF) != 0 ? (int)Rflags.Zf << 8 : 0;
        image |= (flags & RflagsBits.SF) != 0 ? (int)Rflags.Sf << 8 : 0;
        return image;
    }

    private static void SetMemory(ref Instruction instruction, in HostMemory operand)
    {
        instruction.MemoryBase = operand.Base < 0 ? Register.None : Full(operand.Base);
        instruction.MemoryIndex = operand.Index < 0 ? Register.None : Full(operand.Index);
        instruction.MemoryIndexScale = 1 << operand.Scale;
        instruction.MemoryDisplacement64 = (ulong)operand.Displacement;
        instruction.MemoryDisplSize = operand.Displacement == 0 ? 0
            : operand.Displacement == (sbyte)operand.Displacement ? 1 : 8;
        instruction.SegmentPrefix = Register.None;
    }

    // Emits a guest instruction with other operands; false, with nothing emitted, for a form that Iced cannot encode.
    private bool Encode(in Instruction instruction)
    {
        _writer.Length = 0;
        if (instruction.Code == Unencodable || !_encoder.TryEncode(instruction, 0, out _, out _))
        {
            return false;
        }

        // SAFETY: the emitter copies Length bytes of this array while it is pinned.
        fixed (byte* bytes = _writer.Bytes)
        {
            _e.Bytes(bytes, _writer.Length);
        }

        return true;
    }

    private void EmitLea(in Instruction instruction)
    {
        // Flags survive where the address needs no addition of two spilled registers, and no 16 bits are written.
        Register start = instruction.MemoryBase;
        Register index = instruction.MemoryIndex;
        bool adds = index != Register.None && IsSpilled(Number(index)) &&
            start != Register.None && start.IsGPR() && IsSpilled(Number(start));
        if (!IsAddressable(instruction))
        {
            CallHandler();
            return;
        }

        if (adds)
        {
            FreeFlags();
        }

        HostMemory form = LinearOf(instruction, withSegment: false);
        Register target = instruction.Op0Register;
        int number = Number(target);
        int host = IsSpilled(number) ? Host.T0 : HostOf(number);
        if (target.GetSize() == 8)
        {
            _e.Lea(host, form);
        }
        else if (target.GetSize() == 4)
        {
            _e.Lea32(host, form);
        }
        else
        {
            CallHandler();
            return;
        }

        if (IsSpilled(number))
        {
            _e.Store(Slot(number), host);
            _held = number;
        }
    }

    // DIV and IDIV, after a check that the quotient fits; what does not pass it raises #DE in the handler.
    private bool TryDivide(in Instruction original, bool isSigned)
    {
        Instruction instruction = original;
        bool isMemory = original.Op0Kind == OpKind.Memory;
        int size = isMemory ? original.MemorySize.GetSize() : original.Op0Register.GetSize();
        if (size < 4 || (isMemory && !IsAddressable(original)))
        {
            return false;
        }

        FreeFlags();
        int divisor;
        if (isMemory)
        {
            HostMemory operand = Check(original, size, write: false, 1, needsT0: false);
            divisor = Host.T1;
            if (size == 8)
            {
                _e.Load(divisor, operand);
            }
            else
            {
                _e.Load32(divisor, operand);
            }

            instruction.Op0Kind = OpKind.Register;
            instruction.Code = (size, isSigned) switch
            {
                (8, false) => Code.Div_rm64,
                (8, true) => Code.Idiv_rm64,
                (_, false) => Code.Div_rm32,
                _ => Code.Idiv_rm32,
            };
        }
        else
        {
            int number = Number(original.Op0Register);
            divisor = IsSpilled(number) ? Host.T1 : HostOf(number);
            if (IsSpilled(number))
            {
                _e.Load(divisor, Slot(number));
            }
        }

        instruction.Op0Register = size == 8 ? Register.RAX + divisor : Register.EAX + divisor;
        instruction.SegmentPrefix = Register.None;
        if (!isSigned)
        {
            if (size == 8)
            {
                _e.Alu(AluOp.Cmp, Host.Rdx, divisor);
            }
            else
            {
                _e.Alu32(AluOp.Cmp, Host.Rdx, divisor);
            }

            SlowJump(_e.JumpIf(HostCondition.AboveOrEqual));
        }
        else
        {
            // In line only when RDX is RAX's sign and the divisor neither 0 nor -1.
            _e.Move(Host.T0, Host.Rax);
            if (size == 4)
            {
                _e.Shift(4, Host.T0, 32);
            }

            _e.Shift(7, Host.T0, 63);
            if (size == 8)
            {
                _e.Alu(AluOp.Cmp, Host.T0, Host.Rdx);
                SlowJump(_e.JumpIf(HostCondition.NotEqual));
                _e.Lea(Host.T0, new HostMemory(divisor, 1));
            }
            else
            {
                _e.Alu32(AluOp.Cmp, Host.T0, Host.Rdx);
                SlowJump(_e.JumpIf(HostCondition.NotEqual));
                _e.Lea32(Host.T0, new HostMemory(divisor, 1));
            }

            _e.AluImmediate(AluOp.Cmp, Host.T0, 1);
            SlowJump(_e.JumpIf(HostCondition.BelowOrEqual));
        }

        if (!Encode(instruction))
        {
            return false;
        }

        // Where they count as unchanged they are in the image still.
        if (_traits[_at].Writes != 0)
        {
            WroteFlags();
        }

        return true;
    }

    private void EmitPush(in Instruction instruction)
    {
        if (instruction.Op0Kind == OpKind.Memory)
        {
            // Load first; the value waits in T0 while the stack is checked.
            if (!IsAddressable(instruction))
            {
                CallHandler();
                return;
            }

            FreeFlags();
            HostMemory source = Check(instruction, 8, write: false, 1, needsT0: false);
            _held = -1;
            _e.Load(Host.T0, source);
            Probe(new HostMemory(Host.GuestRsp, -8), 8, write: true, 1);
            StorePushed(Host.T0);
            return;
        }

        int number = Number(instruction.Op0Register);
        CheckPush();
        int host = IsSpilled(number) ? Host.T0 : HostOf(number);
        if (IsSpilled(number))
        {
            Hold(number);
        }

        StorePushed(host);
    }

    // Checks the stack for PUSH and CALL, if that is not done.
    private void CheckPush()
    {
        if (!IsMember)
        {
            FreeFlags();
            CheckWord(new HostMemory(Host.GuestRsp, -8), write: true);
        }
    }

    // Checks a quadword of the stack, where T0 may be lost. Frames that lie across two scattered pages may take the
    // stack's site from each other all the time; such places look into the TLB, as others do.
    private void CheckWord(in HostMemory form, bool write)
    {
        if (DataMode != MmuMode.Empty && Wanders(_at))
        {
            ProbeTlb(form, sizeof(ulong), write, 1);
        }
        else
        {
            Probe(form, sizeof(ulong), write, 1);
        }
    }

    // Checks the stack for POP and RET, if that is not done; answers where the top is.
    private HostMemory CheckPop()
    {
        if (IsMember)
        {
            return MemberOperand;
        }

        FreeFlags();
        CheckWord(new HostMemory(Host.GuestRsp, 0), write: false);
        return new HostMemory(Host.GuestRsp, Host.T1, 0, 0);
    }

    // RSP += by, at once or later.
    private void MoveRsp(int by)
    {
        if (IsMember)
        {
            _rspDelta += by;
        }
        else
        {
            _e.Lea(Host.GuestRsp, new HostMemory(Host.GuestRsp, by));
        }
    }

    private HostMemory Pushed => IsMember ? MemberOperand : new HostMemory(Host.GuestRsp, Host.T1, 0, -8);

    private void StorePushed(int host)
    {
        _e.Store(Pushed, host);
        MoveRsp(-8);
    }

    private void EmitPushImmediate(in Instruction instruction)
    {
        CheckPush();
        _e.StoreImmediate(Pushed, (int)(long)instruction.GetImmediate(0));
        MoveRsp(-8);
    }

    private void EmitPop(in Instruction instruction)
    {
        int number = Number(instruction.Op0Register);
        HostMemory top = CheckPop();
        if (number == Host.Rsp)
        {
            // What is popped replaces the incremented RSP. Never in a group: its base changes.
            _e.Load(Host.GuestRsp, top);
            return;
        }

        int host = IsSpilled(number) ? Host.T0 : number;
        _e.Load(host, top);
        MoveRsp(8);
        if (IsSpilled(number))
        {
            _e.Store(Slot(number), host);
            _held = number;
        }
    }

    private void EmitLeave()
    {
        FreeFlags();
        CheckWord(new HostMemory(Host.Rbp, 0), write: false);
        _e.Load(Host.T1, new HostMemory(Host.Rbp, Host.T1, 0, 0));
        _e.Lea(Host.GuestRsp, new HostMemory(Host.Rbp, 8));
        _e.Move(Host.Rbp, Host.T1);
    }
}

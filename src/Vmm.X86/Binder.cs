// SPDX-License-Identifier: BSD-2-Clause
using System;
using Iced.Intel;

namespace Vmm.X86;

/// <summary>
/// From Iced's Instruction to a record: operands into offsets, then the handler by mnemonic and operand kinds.
/// </summary>
internal static unsafe class Binder
{
    /// <summary>Fills a record. True when the block must end behind the instruction.</summary>
    public static bool Bind(SoftVcpu vcpu, in Instruction instruction, ReadOnlySpan<byte> bytes, Insn* insn, uint key)
    {
        *insn = default;
        insn->Code = (ushort)instruction.Code;
        insn->Base = CpuContext.ZeroOffset;
        insn->Index = CpuContext.ZeroOffset;
        insn->SegmentBase = CpuContext.ZeroOffset;
        insn->Segment = Seg.Ds;
        bool isLong = (key & BlockKey.SizeMask) == 2;
        insn->Flags |= instruction.HasLockPrefix ? InsnFlags.Lock : (byte)0;
        insn->Flags |= instruction.HasRepPrefix ? InsnFlags.Rep : (byte)0;
        insn->Flags |= instruction.HasRepnePrefix ? InsnFlags.Repne : (byte)0;
        insn->Flags |= isLong ? InsnFlags.Long : (byte)0;
        insn->AddressSize = isLong ? (byte)8 : (key & BlockKey.SizeMask) == 1 ? (byte)4 : (byte)2;
        insn->AddressMask = Mask(insn->AddressSize);
        Operands(instruction, insn, key);
        insn->Handler = &Misc.Ud;
        bool isHidden = !vcpu.IsOffered(instruction.Code) && !HasOlderMeaning(instruction.Mnemonic);
        if (isHidden || (vcpu.RefusesComponents && XsaveUnit.MovesComponents(instruction.Code)))
        {
            return true;
        }

        if (!Choose(vcpu, instruction, insn, key) && !Vectors.TryBind(vcpu, instruction, bytes, insn))
        {
            insn->Handler = &Misc.Ud;
            return true;
        }

        return instruction.FlowControl != FlowControl.Next || EndsBlock(instruction.Mnemonic);
    }

    // A processor without TZCNT, LZCNT or WBNOINVD ignores their prefix and executes BSF, BSR or WBINVD (SDM 2B TZCNT, 2A
    // LZCNT, 2D WBNOINVD). Kernels rely on it: they scan with REP BSF wherever zero cannot occur.
    private static bool HasOlderMeaning(Mnemonic mnemonic) =>
        mnemonic is Mnemonic.Tzcnt or Mnemonic.Lzcnt or Mnemonic.Wbnoinvd || IsNopOfOld(mnemonic);

    // Codes that were given to CET and MPX out of the reserved NOPs (0F 1A, 1B and 1E) do nothing on a processor without them
    // (SDM 2B RDSSP, SDM 1 Appendix E). Xen and unwinders ask RDSSP for a shadow stack without asking CPUID.
    private static bool IsNopOfOld(Mnemonic mnemonic) =>
        mnemonic is Mnemonic.Rdsspd or Mnemonic.Rdsspq or Mnemonic.Bndmk or Mnemonic.Bndcl or Mnemonic.Bndcu
            or Mnemonic.Bndcn or Mnemonic.Bndmov or Mnemonic.Bndldx or Mnemonic.Bndstx;

    /// <summary>Byte offset of a general register, number of any other.</summary>
    public static ushort Offset(Register register)
    {
        if (register is >= Register.AH and <= Register.BH)
        {
            return (ushort)(((register - Register.AH) * 8) + 1);
        }

        if (register is >= Register.AL and <= Register.BL)
        {
            return (ushort)((register - Register.AL) * 8);
        }

        if (register is >= Register.SPL and <= Register.R15L)
        {
            return (ushort)((register - Register.SPL + 4) * 8);
        }

        return register.IsGPR() ? (ushort)(register.GetNumber() * 8) : (ushort)register.GetNumber();
    }

    private static ulong Mask(int size) => size switch
    {
        2 => 0xFFFF,
        4 => 0xFFFFFFFF,
        _ => ulong.MaxValue,
    };

    private static void Operands(in Instruction instruction, Insn* insn, uint key)
    {
        int size = 0;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            switch (instruction.GetOpKind(i))
            {
                case OpKind.Register:
                    Register register = instruction.GetOpRegister(i);
                    ushort offset = Offset(register);
                    if (i == 0)
                    {
                        insn->R0 = offset;
                        size = register.GetSize();
                    }
                    else if (i == 1)
                    {
                        insn->R1 = offset;
                    }
                    else if (i == 2)
                    {
                        insn->R2 = offset;
                    }

                    break;
                case OpKind.Memory:
                    insn->Flags |= InsnFlags.HasMemory;
                    insn->Flags |= i == 0 ? InsnFlags.MemoryFirst : (byte)0;
                    Memory(instruction, insn, key);
                    insn->MemorySize = (ushort)instruction.MemorySize.GetSize();
                    size = i == 0 ? insn->MemorySize : size;
                    break;
                case OpKind.Immediate8:
                case OpKind.Immediate16:
                case OpKind.Immediate32:
                case OpKind.Immediate64:
                case OpKind.Immediate8to16:
                case OpKind.Immediate8to32:
                case OpKind.Immediate8to64:
                case OpKind.Immediate32to64:
                    insn->Immediate = instruction.GetImmediate(i);
                    break;
                case OpKind.Immediate8_2nd:
                    // SAFETY: Aux holds a number here; no handler of these instructions follows it.
                    insn->Aux = (void*)(ulong)instruction.Immediate8_2nd;
                    break;
                case OpKind.NearBranch16:
                case OpKind.NearBranch32:
                case OpKind.NearBranch64:
                    insn->Immediate = instruction.NearBranchTarget;
                    break;
                case OpKind.FarBranch16:
                    insn->Immediate = instruction.FarBranch16;
                    // SAFETY: a number, as above.
                    insn->Aux = (void*)(ulong)instruction.FarBranchSelector;
                    size = 2;
                    break;
                case OpKind.FarBranch32:
                    insn->Immediate = instruction.FarBranch32;
                    // SAFETY: a number, as above.
                    insn->Aux = (void*)(ulong)instruction.FarBranchSelector;
                    size = 4;
                    break;
                case OpKind.MemorySegSI:
                case OpKind.MemoryESDI:
                case OpKind.MemorySegDI:
                    StringOperand(instruction, insn, key, 2);
                    size = instruction.MemorySize.GetSize();
                    break;
                case OpKind.MemorySegESI:
                case OpKind.MemoryESEDI:
                case OpKind.MemorySegEDI:
                    StringOperand(instruction, insn, key, 4);
                    size = instruction.MemorySize.GetSize();
                    break;
                case OpKind.MemorySegRSI:
                case OpKind.MemoryESRDI:
                case OpKind.MemorySegRDI:
                    StringOperand(instruction, insn, key, 8);
                    size = instruction.MemorySize.GetSize();
                    break;
                default:
                    break;
            }
        }

        insn->OperandSize = (byte)Math.Min(size, 64);
    }

    private static void StringOperand(in Instruction instruction, Insn* insn, uint key, int addressSize)
    {
        insn->AddressSize = (byte)addressSize;
        insn->AddressMask = Mask(addressSize);
        Register segment = instruction.MemorySegment;
        insn->Segment = segment is >= Register.ES and <= Register.GS ? (byte)(segment - Register.ES) : (byte)Seg.Ds;
        SegmentUse(insn, key);
    }

    private static void SegmentUse(Insn* insn, uint key)
    {
        bool isLong = (key & BlockKey.SizeMask) == 2;
        bool flat = (key & BlockKey.Flat) != 0;
        bool special = insn->Segment >= Seg.Fs;
        if (special)
        {
            insn->SegmentBase = (ushort)(CpuContext.SegmentsOffset + (insn->Segment * sizeof(SegmentRegister)) + 8);
        }

        if (!isLong && (!flat || special))
        {
            insn->Flags |= InsnFlags.SegmentCheck;
        }
    }

    private static void Memory(in Instruction instruction, Insn* insn, uint key)
    {
        Register start = instruction.MemoryBase;
        Register index = instruction.MemoryIndex;
        insn->Displacement = instruction.MemoryDisplacement64;
        int size;
        if (start == Register.RIP || start == Register.EIP)
        {
            insn->Base = CpuContext.BlockRipOffset;
            size = start == Register.RIP ? 8 : 4;
        }
        else if (start != Register.None)
        {
            insn->Base = Offset(start);
            size = start.GetSize();
        }
        else if (index != Register.None && index.IsGPR())
        {
            size = index.GetSize();
        }
        else
        {
            int displacement = instruction.MemoryDisplSize;
            size = displacement is 2 or 4 or 8 ? displacement : insn->AddressSize;
        }

        if (index != Register.None && index.IsGPR())
        {
            insn->Index = Offset(index);
        }

        insn->Scale = instruction.MemoryIndexScale switch
        {
            2 => 1,
            4 => 2,
            8 => 3,
            _ => 0,
        };
        insn->AddressSize = (byte)size;
        insn->AddressMask = Mask(size);
        Register segment = instruction.MemorySegment;
        insn->Segment = segment is >= Register.ES and <= Register.GS ? (byte)(segment - Register.ES) : (byte)Seg.Ds;
        SegmentUse(insn, key);
    }

    private static bool EndsBlock(Mnemonic mnemonic) => mnemonic switch
    {
        // They change the block's key.
        Mnemonic.Stac or Mnemonic.Clac => true,
        Mnemonic.Hlt or Mnemonic.Wrmsr or Mnemonic.Lmsw or Mnemonic.Invlpg or Mnemonic.Invpcid or Mnemonic.Xsetbv or
            Mnemonic.Mwait or Mnemonic.In or Mnemonic.Out => true,
        _ => false,
    };

    private static delegate*<CpuContext*, Insn*, Status> Alu<TOp>(in Instruction instruction, Insn* insn)
        where TOp : struct, IBinary
    {
        int size = insn->OperandSize;
        bool locked = (insn->Flags & InsnFlags.Lock) != 0;
        if ((insn->Flags & InsnFlags.MemoryFirst) != 0)
        {
            bool register = instruction.OpCount > 1 && instruction.Op1Kind == OpKind.Register;
            if (register)
            {
                return locked ? Forms.Pick<LockM<TOp, FromR1>>(size) : Forms.Pick<AluM<TOp, FromR1>>(size);
            }

            return locked ? Forms.Pick<LockM<TOp, FromImmediate>>(size) : Forms.Pick<AluM<TOp, FromImmediate>>(size);
        }

        if (instruction.OpCount < 2)
        {
            return Forms.Pick<AluR<TOp, FromImmediate>>(size);
        }

        return instruction.Op1Kind switch
        {
            OpKind.Register => Forms.Pick<AluR<TOp, FromR1>>(size),
            OpKind.Memory => Forms.Pick<AluR<TOp, FromMemory>>(size),
            _ => Forms.Pick<AluR<TOp, FromImmediate>>(size),
        };
    }

    private static delegate*<CpuContext*, Insn*, Status> Compare<TOp>(in Instruction instruction, Insn* insn)
        where TOp : struct, IBinary
    {
        int size = insn->OperandSize;
        if ((insn->Flags & InsnFlags.MemoryFirst) != 0)
        {
            return instruction.Op1Kind == OpKind.Register
                ? Forms.Pick<CompareForm<TOp, FromMemory, FromR1>>(size)
                : Forms.Pick<CompareForm<TOp, FromMemory, FromImmediate>>(size);
        }

        return instruction.Op1Kind switch
        {
            OpKind.Register => Forms.Pick<CompareForm<TOp, FromR0, FromR1>>(size),
            OpKind.Memory => Forms.Pick<CompareForm<TOp, FromR0, FromMemory>>(size),
            _ => Forms.Pick<CompareForm<TOp, FromR0, FromImmediate>>(size),
        };
    }

    private static delegate*<CpuContext*, Insn*, Status> RegisterOrMemory<TRegister, TMemory>(Insn* insn, int size)
        where TRegister : struct, IForm
        where TMemory : struct, IForm =>
        (insn->Flags & InsnFlags.HasMemory) != 0 ? Forms.Pick<TMemory>(size) : Forms.Pick<TRegister>(size);

    private static delegate*<CpuContext*, Insn*, Status> Mov(in Instruction instruction, Insn* insn)
    {
        OpKind first = instruction.Op0Kind;
        OpKind second = instruction.Op1Kind;
        int size = insn->OperandSize;
        if (first == OpKind.Register)
        {
            Register target = instruction.Op0Register;
            if (target.IsSegmentRegister())
            {
                return target == Register.CS ? &Misc.Ud : &SystemGroup.MovToSegment;
            }

            if (target.IsCR())
            {
                return &SystemGroup.MovToControl;
            }

            if (target.IsDR())
            {
                return &SystemGroup.MovToDebug;
            }

            if (!target.IsGPR())
            {
                return &Misc.Ud;
            }

            if (second == OpKind.Register)
            {
                Register source = instruction.Op1Register;
                if (source.IsSegmentRegister())
                {
                    return &SystemGroup.MovFromSegment;
                }

                if (source.IsCR())
                {
                    return &SystemGroup.MovFromControl;
                }

                if (source.IsDR())
                {
                    return &SystemGroup.MovFromDebug;
                }

                return source.IsGPR() ? Forms.Pick<MovR<FromR1>>(size) : &Misc.Ud;
            }

            return second == OpKind.Memory ? Forms.Pick<MovR<FromMemory>>(size) : Forms.Pick<MovR<FromImmediate>>(size);
        }

        if (second == OpKind.Register)
        {
            return instruction.Op1Register.IsSegmentRegister() ? &SystemGroup.MovFromSegment : Forms.Pick<MovM<FromR1>>(size);
        }

        return Forms.Pick<MovM<FromImmediate>>(size);
    }

    private static delegate*<CpuContext*, Insn*, Status> Extend<TSigned>(in Instruction instruction, Insn* insn)
        where TSigned : struct
    {
        int from = instruction.Op1Kind == OpKind.Register ? instruction.Op1Register.GetSize() : insn->MemorySize;
        int size = insn->OperandSize;
        return from switch
        {
            1 => RegisterOrMemory<ExtendForm<byte, TSigned, FromR1>, ExtendForm<byte, TSigned, FromMemory>>(insn, size),
            2 => RegisterOrMemory<ExtendForm<ushort, TSigned, FromR1>, ExtendForm<ushort, TSigned, FromMemory>>(insn, size),
            _ => RegisterOrMemory<ExtendForm<uint, TSigned, FromR1>, ExtendForm<uint, TSigned, FromMemory>>(insn, size),
        };
    }

    // Jcc, SETcc or CMOVcc by condition code.
    private static delegate*<CpuContext*, Insn*, Status> Conditional(in Instruction instruction, Insn* insn, int kind) =>
        instruction.ConditionCode switch
        {
            ConditionCode.o => One<CondO>(insn, kind),
            ConditionCode.no => One<CondNo>(insn, kind),
            ConditionCode.b => One<CondB>(insn, kind),
            ConditionCode.ae => One<CondAe>(insn, kind),
            ConditionCode.e => One<CondE>(insn, kind),
            ConditionCode.ne => One<CondNe>(insn, kind),
            ConditionCode.be => One<CondBe>(insn, kind),
            ConditionCode.a => One<CondA>(insn, kind),
            ConditionCode.s => One<CondS>(insn, kind),
            ConditionCode.ns => One<CondNs>(insn, kind),
            ConditionCode.p => One<CondP>(insn, kind),
            ConditionCode.np => One<CondNp>(insn, kind),
            ConditionCode.l => One<CondL>(insn, kind),
            ConditionCode.ge => One<CondGe>(insn, kind),
            ConditionCode.le => One<CondLe>(insn, kind),
            ConditionCode.g => One<CondG>(insn, kind),
            _ => &Misc.Ud,
        };

    private static delegate*<CpuContext*, Insn*, Status> One<TCond>(Insn* insn, int kind)
        where TCond : struct, ICondition => kind switch
        {
            0 => &Jcc<TCond>.Run,
            1 => Forms.Pick<SetccForm<TCond>>(1),
            _ => RegisterOrMemory<CmovR<TCond>, CmovM<TCond>>(insn, insn->OperandSize),
        };

    // Size of a stack operand: of the operand where Iced states one.
    private static int StackSize(in Instruction instruction) => Math.Abs(instruction.StackPointerIncrement) switch
    {
        2 => 2,
        4 => 4,
        _ => 8,
    };

    private static void Branch(in Instruction instruction, Insn* insn, uint key)
    {
        insn->AddressMask = instruction.Op0Kind switch
        {
            OpKind.NearBranch16 => 0xFFFF,
            OpKind.NearBranch32 => 0xFFFFFFFF,
            _ => ulong.MaxValue,
        };
        if ((key & (BlockKey.Flat | BlockKey.SizeMask)) != (BlockKey.Flat | 2) && (key & BlockKey.Flat) == 0)
        {
            insn->Flags |= InsnFlags.SegmentCheck;
        }
    }

    private static bool Choose(SoftVcpu vcpu, in Instruction instruction, Insn* insn, uint key)
    {
        int size = insn->OperandSize;
        bool memory = (insn->Flags & InsnFlags.HasMemory) != 0;
        if (instruction.IsJccShortOrNear)
        {
            Branch(instruction, insn, key);
            insn->Handler = Conditional(instruction, insn, 0);
            return true;
        }

        switch (instruction.Mnemonic)
        {
            case Mnemonic.Mov:
                insn->Handler = Mov(instruction, insn);
                return true;
            case Mnemonic.Movnti:
                insn->Handler = Forms.Pick<MovM<FromR1>>(size);
                return true;
            case Mnemonic.Lea:
                insn->Handler = Forms.Pick<LeaForm>(size);
                return true;
            case Mnemonic.Movzx:
                insn->Handler = Extend<UnsignedTag>(instruction, insn);
                return true;
            case Mnemonic.Movsx:
            case Mnemonic.Movsxd:
                insn->Handler = Extend<SignedTag>(instruction, insn);
                return true;
            case Mnemonic.Add:
                insn->Handler = Alu<OpAdd>(instruction, insn);
                return true;
            case Mnemonic.Adc:
                insn->Handler = Alu<OpAdc>(instruction, insn);
                return true;
            case Mnemonic.Sub:
                insn->Handler = Alu<OpSub>(instruction, insn);
                return true;
            case Mnemonic.Sbb:
                insn->Handler = Alu<OpSbb>(instruction, insn);
                return true;
            case Mnemonic.And:
                insn->Handler = Alu<OpAnd>(instruction, insn);
                return true;
            case Mnemonic.Or:
                insn->Handler = Alu<OpOr>(instruction, insn);
                return true;
            case Mnemonic.Xor:
                insn->Handler = Alu<OpXor>(instruction, insn);
                return true;
            case Mnemonic.Cmp:
                insn->Handler = Compare<OpSub>(instruction, insn);
                return true;
            case Mnemonic.Test:
                insn->Handler = Compare<OpAnd>(instruction, insn);
                return true;
            case Mnemonic.Inc:
                insn->Handler = Alu<OpInc>(instruction, insn);
                return true;
            case Mnemonic.Dec:
                insn->Handler = Alu<OpDec>(instruction, insn);
                return true;
            case Mnemonic.Neg:
                insn->Handler = Alu<OpNeg>(instruction, insn);
                return true;
            case Mnemonic.Not:
                insn->Handler = Alu<OpNot>(instruction, insn);
                return true;
            case Mnemonic.Shl:
            case Mnemonic.Sal:
                insn->Handler = Alu<OpShl>(instruction, insn);
                return true;
            case Mnemonic.Shr:
                insn->Handler = Alu<OpShr>(instruction, insn);
                return true;
            case Mnemonic.Sar:
                insn->Handler = Alu<OpSar>(instruction, insn);
                return true;
            case Mnemonic.Rol:
                insn->Handler = Alu<OpRol>(instruction, insn);
                return true;
            case Mnemonic.Ror:
                insn->Handler = Alu<OpRor>(instruction, insn);
                return true;
            case Mnemonic.Rcl:
                insn->Handler = Alu<OpRcl>(instruction, insn);
                return true;
            case Mnemonic.Rcr:
                insn->Handler = Alu<OpRcr>(instruction, insn);
                return true;
            case Mnemonic.Shld:
            case Mnemonic.Shrd:
                if (instruction.Op2Kind == OpKind.Register)
                {
                    // SAFETY: a flag, which the handler compares with null and never follows.
                    insn->Aux = (void*)1;
                }

                insn->Handler = instruction.Mnemonic == Mnemonic.Shld
                    ? Forms.Pick<DoubleShift<SignedTag>>(size)
                    : Forms.Pick<DoubleShift<UnsignedTag>>(size);
                return true;
            case Mnemonic.Xchg:
                if (memory)
                {
                    // The register may be either operand.
                    if ((insn->Flags & InsnFlags.MemoryFirst) == 0)
                    {
                        insn->R1 = insn->R0;
                    }

                    insn->Handler = Forms.Pick<XchgMR>(size);
                    return true;
                }

                insn->Handler = Forms.Pick<XchgRR>(size);
                return true;
            case Mnemonic.Xadd:
                insn->Handler = RegisterOrMemory<XaddRR, XaddMR>(insn, size);
                return true;
            case Mnemonic.Cmpxchg:
                insn->Handler = RegisterOrMemory<CmpxchgRR, CmpxchgMR>(insn, size);
                return true;
            case Mnemonic.Cmpxchg8b:
                insn->Handler = &Misc.Cmpxchg8b;
                return true;
            case Mnemonic.Cmpxchg16b:
                insn->Handler = &Misc.Cmpxchg16b;
                return true;
            case Mnemonic.Bt:
                BitNumber(instruction, insn);
                insn->Handler = RegisterOrMemory<BtRR, BtM>(insn, size);
                return true;
            case Mnemonic.Bts:
                BitNumber(instruction, insn);
                insn->Handler = RegisterOrMemory<BtxRR<OpBts>, BtxM<OpBts>>(insn, size);
                return true;
            case Mnemonic.Btr:
                BitNumber(instruction, insn);
                insn->Handler = RegisterOrMemory<BtxRR<OpBtr>, BtxM<OpBtr>>(insn, size);
                return true;
            case Mnemonic.Btc:
                BitNumber(instruction, insn);
                insn->Handler = RegisterOrMemory<BtxRR<OpBtc>, BtxM<OpBtc>>(insn, size);
                return true;
            case Mnemonic.Bsf:
                insn->Handler = RegisterOrMemory<Scan<ScanBsf, FromR1>, Scan<ScanBsf, FromMemory>>(insn, size);
                return true;
            case Mnemonic.Bsr:
                insn->Handler = RegisterOrMemory<Scan<ScanBsr, FromR1>, Scan<ScanBsr, FromMemory>>(insn, size);
                return true;
            case Mnemonic.Tzcnt:
                insn->Handler = vcpu.IsOffered(instruction.Code)
                    ? RegisterOrMemory<Scan<ScanTzcnt, FromR1>, Scan<ScanTzcnt, FromMemory>>(insn, size)
                    : RegisterOrMemory<Scan<ScanBsf, FromR1>, Scan<ScanBsf, FromMemory>>(insn, size);
                return true;
            case Mnemonic.Lzcnt:
                insn->Handler = vcpu.IsOffered(instruction.Code)
                    ? RegisterOrMemory<Scan<ScanLzcnt, FromR1>, Scan<ScanLzcnt, FromMemory>>(insn, size)
                    : RegisterOrMemory<Scan<ScanBsr, FromR1>, Scan<ScanBsr, FromMemory>>(insn, size);
                return true;
            case Mnemonic.Popcnt:
                insn->Handler = RegisterOrMemory<Scan<ScanPopcnt, FromR1>, Scan<ScanPopcnt, FromMemory>>(insn, size);
                return true;
            case Mnemonic.Blsi:
                insn->Handler = RegisterOrMemory<Scan<ScanBlsi, FromR1>, Scan<ScanBlsi, FromMemory>>(insn, size);
                return true;
            case Mnemonic.Blsr:
                insn->Handler = RegisterOrMemory<Scan<ScanBlsr, FromR1>, Scan<ScanBlsr, FromMemory>>(insn, size);
                return true;
            case Mnemonic.Blsmsk:
                insn->Handler = RegisterOrMemory<Scan<ScanBlsmsk, FromR1>, Scan<ScanBlsmsk, FromMemory>>(insn, size);
                return true;
            case Mnemonic.Andn:
                insn->Handler = Forms.Pick<ControlThenSource<OpAndn>>(size);
                return true;
            case Mnemonic.Pdep:
                insn->Handler = Forms.Pick<ControlThenSource<OpPdep>>(size);
                return true;
            case Mnemonic.Pext:
                insn->Handler = Forms.Pick<ControlThenSource<OpPext>>(size);
                return true;
            case Mnemonic.Bextr when instruction.Op2Kind == OpKind.Register:
                insn->Handler = Forms.Pick<SourceThenControl<OpBextr>>(size);
                return true;
            case Mnemonic.Bzhi:
                insn->Handler = Forms.Pick<SourceThenControl<OpBzhi>>(size);
                return true;
            case Mnemonic.Shlx:
                insn->Handler = Forms.Pick<SourceThenControl<OpShlx>>(size);
                return true;
            case Mnemonic.Shrx:
                insn->Handler = Forms.Pick<SourceThenControl<OpShrx>>(size);
                return true;
            case Mnemonic.Sarx:
                insn->Handler = Forms.Pick<SourceThenControl<OpSarx>>(size);
                return true;
            case Mnemonic.Rorx:
                insn->Handler = Forms.Pick<RorxForm>(size);
                return true;
            case Mnemonic.Mulx:
                insn->Handler = Forms.Pick<MulxForm>(size);
                return true;
            case Mnemonic.Adcx:
                insn->Handler = Forms.Pick<AdxForm<UnsignedTag>>(size);
                return true;
            case Mnemonic.Adox:
                insn->Handler = Forms.Pick<AdxForm<SignedTag>>(size);
                return true;
            case Mnemonic.Crc32:
                insn->Handler = Forms.Pick<Crc32Form>(
                    memory ? insn->MemorySize : instruction.Op1Register.GetSize());
                return true;
            case Mnemonic.Movbe:
                insn->Handler = (insn->Flags & InsnFlags.MemoryFirst) != 0
                    ? Forms.Pick<MovbeMR>(size)
                    : Forms.Pick<MovbeRM>(size);
                return true;
            case Mnemonic.Bswap:
                insn->Handler = Forms.Pick<BswapR>(size);
                return true;
            case Mnemonic.Mul:
                insn->Handler = RegisterOrMemory<Accumulate<OpMul, FromR0>, Accumulate<OpMul, FromMemory>>(insn, size);
                return true;
            case Mnemonic.Imul:
                insn->Handler = instruction.OpCount switch
                {
                    1 => RegisterOrMemory<Accumulate<OpImul, FromR0>, Accumulate<OpImul, FromMemory>>(insn, size),
                    2 => RegisterOrMemory<ImulInto<FromR0, FromR1>, ImulInto<FromR0, FromMemory>>(insn, size),
                    _ => RegisterOrMemory<ImulInto<FromR1, FromImmediate>, ImulInto<FromMemory, FromImmediate>>(insn, size),
                };
                return true;
            case Mnemonic.Div:
                insn->Handler = RegisterOrMemory<Accumulate<OpDiv, FromR0>, Accumulate<OpDiv, FromMemory>>(insn, size);
                return true;
            case Mnemonic.Idiv:
                insn->Handler = RegisterOrMemory<Accumulate<OpIdiv, FromR0>, Accumulate<OpIdiv, FromMemory>>(insn, size);
                return true;
            case Mnemonic.Cbw:
                insn->Handler = &Misc.Cbw;
                return true;
            case Mnemonic.Cwde:
                insn->Handler = &Misc.Cwde;
                return true;
            case Mnemonic.Cdqe:
                insn->Handler = &Misc.Cdqe;
                return true;
            case Mnemonic.Cwd:
                insn->Handler = &Misc.Cwd;
                return true;
            case Mnemonic.Cdq:
                insn->Handler = &Misc.Cdq;
                return true;
            case Mnemonic.Cqo:
                insn->Handler = &Misc.Cqo;
                return true;
            case Mnemonic.Lahf:
                insn->Handler = &Misc.Lahf;
                return true;
            case Mnemonic.Sahf:
                insn->Handler = &Misc.Sahf;
                return true;
            case Mnemonic.Clc:
                insn->Handler = &Misc.Clc;
                return true;
            case Mnemonic.Stc:
                insn->Handler = &Misc.Stc;
                return true;
            case Mnemonic.Cmc:
                insn->Handler = &Misc.Cmc;
                return true;
            case Mnemonic.Cld:
                insn->Handler = &Misc.Cld;
                return true;
            case Mnemonic.Std:
                insn->Handler = &Misc.Std;
                return true;
            case Mnemonic.Salc:
                insn->Handler = &Misc.Salc;
                return true;
            case Mnemonic.Xlatb:
                insn->Handler = &Misc.Xlat;
                insn->Flags |= InsnFlags.HasMemory;
                Memory(instruction, insn, key);
                insn->Base = Reg.Rbx;
                insn->Index = CpuContext.ZeroOffset;
                insn->Displacement = 0;
                return true;
            case Mnemonic.Daa:
                insn->Handler = &Misc.Daa;
                return true;
            case Mnemonic.Das:
                insn->Handler = &Misc.Das;
                return true;
            case Mnemonic.Aaa:
                insn->Handler = &Misc.Aaa;
                return true;
            case Mnemonic.Aas:
                insn->Handler = &Misc.Aas;
                return true;
            case Mnemonic.Aam:
                insn->Handler = &Misc.Aam;
                return true;
            case Mnemonic.Aad:
                insn->Handler = &Misc.Aad;
                return true;
            case Mnemonic.Nop:
            case Mnemonic.Reservednop:
                // 0F 0D is PREFETCH, which wants memory on AMD's processors.
                bool isPrefetch = instruction.Code is Code.Reservednop_rm16_r16_0F0D
                    or Code.Reservednop_rm32_r32_0F0D or Code.Reservednop_rm64_r64_0F0D;
                insn->Handler = isPrefetch && (insn->Flags & InsnFlags.HasMemory) == 0 ? &Misc.Ud : &Misc.Nop;
                return true;
            case Mnemonic.Endbr32:
            case Mnemonic.Endbr64:
            case Mnemonic.Prefetch:
            case Mnemonic.Prefetchw:
            case Mnemonic.Prefetchwt1:
            case Mnemonic.Cldemote:
            case Mnemonic.Prefetchit0:
            case Mnemonic.Prefetchit1:
            case Mnemonic.Prefetchnta:
            case Mnemonic.Prefetcht0:
            case Mnemonic.Prefetcht1:
            case Mnemonic.Prefetcht2:
            case var nop when IsNopOfOld(nop):
            case Mnemonic.Lfence:
            case Mnemonic.Sfence:
                insn->Handler = &Misc.Nop;
                return true;
            case Mnemonic.Mfence:
                insn->Handler = &Misc.MFence;
                return true;
            case Mnemonic.Pause:
                insn->Handler = &Misc.Pause;
                return true;
            case Mnemonic.Push:
                BindPush(instruction, insn);
                return true;
            case Mnemonic.Pop:
                BindPop(instruction, insn);
                return true;
            case Mnemonic.Pusha:
                insn->Handler = Forms.Pick<PushA>(2);
                return true;
            case Mnemonic.Pushad:
                insn->Handler = Forms.Pick<PushA>(4);
                return true;
            case Mnemonic.Popa:
                insn->Handler = Forms.Pick<PopA>(2);
                return true;
            case Mnemonic.Popad:
                insn->Handler = Forms.Pick<PopA>(4);
                return true;
            case Mnemonic.Pushf:
            case Mnemonic.Pushfd:
            case Mnemonic.Pushfq:
                insn->OperandSize = (byte)StackSize(instruction);
                insn->Handler = &SystemGroup.Pushf;
                return true;
            case Mnemonic.Popf:
            case Mnemonic.Popfd:
            case Mnemonic.Popfq:
                insn->OperandSize = (byte)StackSize(instruction);
                insn->Handler = &SystemGroup.Popf;
                return true;
            case Mnemonic.Enter:
                insn->Handler = Forms.Pick<EnterForm>(EnterSize(instruction));
                return true;
            case Mnemonic.Leave:
                insn->Handler = Forms.Pick<LeaveForm>(LeaveSize(instruction));
                return true;
            case Mnemonic.Bound:
                insn->Handler = Forms.Pick<BoundForm>(size);
                return true;
            case Mnemonic.Jmp:
                BindJmp(instruction, insn, key);
                return true;
            case Mnemonic.Call:
                BindCall(instruction, insn, key);
                return true;
            case Mnemonic.Ret:
                insn->Handler = Forms.Pick<RetNear>(NearReturnSize(instruction));
                return true;
            case Mnemonic.Retf:
                insn->OperandSize = (byte)FarSize(instruction);
                insn->Handler = &FarTransfer.RetFar;
                return true;
            case Mnemonic.Iret:
                insn->OperandSize = 2;
                insn->Handler = &FarTransfer.Iret;
                return true;
            case Mnemonic.Iretd:
                insn->OperandSize = 4;
                insn->Handler = &FarTransfer.Iret;
                return true;
            case Mnemonic.Iretq:
                insn->OperandSize = 8;
                insn->Handler = &FarTransfer.Iret;
                return true;
            case Mnemonic.Loop:
                BindLoop(instruction, insn, key, 0);
                return true;
            case Mnemonic.Loope:
                BindLoop(instruction, insn, key, 1);
                return true;
            case Mnemonic.Loopne:
                BindLoop(instruction, insn, key, 2);
                return true;
            case Mnemonic.Jcxz:
                Branch(instruction, insn, key);
                insn->AddressSize = 2;
                insn->Handler = &ControlTransfer.Jcxz;
                return true;
            case Mnemonic.Jecxz:
                Branch(instruction, insn, key);
                insn->AddressSize = 4;
                insn->Handler = &ControlTransfer.Jcxz;
                return true;
            case Mnemonic.Jrcxz:
                Branch(instruction, insn, key);
                insn->AddressSize = 8;
                insn->Handler = &ControlTransfer.Jcxz;
                return true;
            case Mnemonic.Int:
                insn->Handler = &FarTransfer.Int;
                return true;
            case Mnemonic.Int3:
                insn->Handler = &FarTransfer.Int3;
                return true;
            case Mnemonic.Int1:
                insn->Handler = &FarTransfer.Int1;
                return true;
            case Mnemonic.Into:
                insn->Handler = &FarTransfer.Into;
                return true;
            case Mnemonic.Lds:
                BindFarLoad(instruction, insn, Seg.Ds);
                return true;
            case Mnemonic.Les:
                BindFarLoad(instruction, insn, Seg.Es);
                return true;
            case Mnemonic.Lss:
                BindFarLoad(instruction, insn, Seg.Ss);
                return true;
            case Mnemonic.Lfs:
                BindFarLoad(instruction, insn, Seg.Fs);
                return true;
            case Mnemonic.Lgs:
                BindFarLoad(instruction, insn, Seg.Gs);
                return true;
            case Mnemonic.Movsb:
            case Mnemonic.Movsw:
            case Mnemonic.Movsd when IsString(instruction):
            case Mnemonic.Movsq:
                insn->Handler = Forms.Pick<BulkForm<Movs>>(size);
                return true;
            case Mnemonic.Stosb:
            case Mnemonic.Stosw:
            case Mnemonic.Stosd:
            case Mnemonic.Stosq:
                insn->Handler = Forms.Pick<BulkForm<Stos>>(size);
                return true;
            case Mnemonic.Lodsb:
            case Mnemonic.Lodsw:
            case Mnemonic.Lodsd:
            case Mnemonic.Lodsq:
                insn->Handler = Forms.Pick<StringForm<Lods>>(size);
                return true;
            case Mnemonic.Scasb:
            case Mnemonic.Scasw:
            case Mnemonic.Scasd:
            case Mnemonic.Scasq:
                insn->Handler = Forms.Pick<StringForm<Scas>>(size);
                return true;
            case Mnemonic.Cmpsb:
            case Mnemonic.Cmpsw:
            case Mnemonic.Cmpsd when IsString(instruction):
            case Mnemonic.Cmpsq:
                insn->Handler = Forms.Pick<StringForm<Cmps>>(size);
                return true;
            case Mnemonic.Insb:
            case Mnemonic.Insw:
            case Mnemonic.Insd:
                insn->Handler = Forms.Pick<InsForm>(size);
                return true;
            case Mnemonic.Outsb:
            case Mnemonic.Outsw:
            case Mnemonic.Outsd:
                insn->Handler = Forms.Pick<OutsForm>(size);
                return true;
            case Mnemonic.In:
                insn->R1 = instruction.Op1Kind == OpKind.Register ? (ushort)1 : (ushort)0;
                insn->Handler = Forms.Pick<InForm>(instruction.Op0Register.GetSize());
                return true;
            case Mnemonic.Out:
                insn->R1 = instruction.Op0Kind == OpKind.Register ? (ushort)1 : (ushort)0;
                insn->Handler = Forms.Pick<OutForm>(instruction.Op1Register.GetSize());
                return true;
            default:
                break;
        }

        string name = instruction.Mnemonic.ToString();
        if (instruction.ConditionCode != ConditionCode.None && name.StartsWith("Set", StringComparison.Ordinal))
        {
            insn->Handler = Conditional(instruction, insn, 1);
            return true;
        }

        if (instruction.ConditionCode != ConditionCode.None && name.StartsWith("Cmov", StringComparison.Ordinal))
        {
            insn->Handler = Conditional(instruction, insn, 2);
            return true;
        }

        return SystemBinder.Choose(vcpu, instruction, insn);
    }

    private static bool IsString(in Instruction instruction) => instruction.IsStringInstruction;

    private static void BitNumber(in Instruction instruction, Insn* insn)
    {
        if (instruction.Op1Kind != OpKind.Register)
        {
            insn->R1 = CpuContext.ZeroOffset;
        }
    }

    private static void BindPush(in Instruction instruction, Insn* insn)
    {
        int size = StackSize(instruction);
        switch (instruction.Op0Kind)
        {
            case OpKind.Register when instruction.Op0Register.IsSegmentRegister():
                insn->Handler = Forms.Pick<PushSeg>(size);
                break;
            case OpKind.Register:
                insn->Handler = Forms.Pick<PushForm<FromR0>>(size);
                break;
            case OpKind.Memory:
                insn->Handler = Forms.Pick<PushForm<FromMemory>>(size);
                break;
            default:
                insn->Handler = Forms.Pick<PushForm<FromImmediate>>(size);
                break;
        }
    }

    private static void BindPop(in Instruction instruction, Insn* insn)
    {
        int size = StackSize(instruction);
        switch (instruction.Op0Kind)
        {
            case OpKind.Register when instruction.Op0Register.IsSegmentRegister():
                insn->Handler = instruction.Op0Register == Register.CS ? &Misc.Ud : Forms.Pick<PopSeg>(size);
                break;
            case OpKind.Register:
                insn->Handler = Forms.Pick<PopR>(size);
                break;
            default:
                insn->Handler = Forms.Pick<PopM>(size);
                break;
        }
    }

    private static int EnterSize(in Instruction instruction) => instruction.Code switch
    {
        Code.Enterw_imm16_imm8 => 2,
        Code.Enterd_imm16_imm8 => 4,
        _ => 8,
    };

    private static int LeaveSize(in Instruction instruction) => instruction.Code switch
    {
        Code.Leavew => 2,
        Code.Leaved => 4,
        _ => 8,
    };

    private static int NearReturnSize(in Instruction instruction) => instruction.Code switch
    {
        Code.Retnw or Code.Retnw_imm16 => 2,
        Code.Retnd or Code.Retnd_imm16 => 4,
        _ => 8,
    };

    private static int FarSize(in Instruction instruction) => instruction.Code switch
    {
        Code.Retfw or Code.Retfw_imm16 => 2,
        Code.Retfd or Code.Retfd_imm16 => 4,
        _ => 8,
    };

    private static void BindJmp(in Instruction instruction, Insn* insn, uint key)
    {
        switch (instruction.Code)
        {
            case Code.Jmp_ptr1616:
            case Code.Jmp_ptr1632:
                insn->Handler = &FarTransfer.JmpDirect;
                break;
            case Code.Jmp_m1616:
                insn->OperandSize = 2;
                insn->Handler = &FarTransfer.JmpIndirect;
                break;
            case Code.Jmp_m1632:
                insn->OperandSize = 4;
                insn->Handler = &FarTransfer.JmpIndirect;
                break;
            case Code.Jmp_m1664:
                insn->OperandSize = 8;
                insn->Handler = &FarTransfer.JmpIndirect;
                break;
            case Code.Jmp_rm16:
            case Code.Jmp_rm32:
            case Code.Jmp_rm64:
                insn->Handler = Forms.Pick<JmpIndirect>(insn->OperandSize);
                break;
            default:
                Branch(instruction, insn, key);
                insn->Handler = &ControlTransfer.Jmp;
                break;
        }
    }

    private static void BindCall(in Instruction instruction, Insn* insn, uint key)
    {
        switch (instruction.Code)
        {
            case Code.Call_ptr1616:
            case Code.Call_ptr1632:
                insn->Handler = &FarTransfer.CallDirect;
                break;
            case Code.Call_m1616:
                insn->OperandSize = 2;
                insn->Handler = &FarTransfer.CallIndirect;
                break;
            case Code.Call_m1632:
                insn->OperandSize = 4;
                insn->Handler = &FarTransfer.CallIndirect;
                break;
            case Code.Call_m1664:
                insn->OperandSize = 8;
                insn->Handler = &FarTransfer.CallIndirect;
                break;
            case Code.Call_rm16:
            case Code.Call_rm32:
            case Code.Call_rm64:
                insn->Handler = Forms.Pick<CallIndirect>(insn->OperandSize);
                break;
            default:
                Branch(instruction, insn, key);
                insn->Handler = Forms.Pick<CallRel>(instruction.Op0Kind switch
                {
                    OpKind.NearBranch16 => 2,
                    OpKind.NearBranch32 => 4,
                    _ => 8,
                });
                break;
        }
    }

    private static void BindLoop(in Instruction instruction, Insn* insn, uint key, ushort condition)
    {
        insn->R1 = condition;
        insn->AddressSize = instruction.Code switch
        {
            Code.Loop_rel8_16_CX or Code.Loop_rel8_32_CX or Code.Loope_rel8_16_CX or Code.Loope_rel8_32_CX or
                Code.Loopne_rel8_16_CX or Code.Loopne_rel8_32_CX => 2,
            Code.Loop_rel8_16_RCX or Code.Loop_rel8_64_RCX or Code.Loope_rel8_16_RCX or Code.Loope_rel8_64_RCX or
                Code.Loopne_rel8_16_RCX or Code.Loopne_rel8_64_RCX => 8,
            _ => 4,
        };
        Branch(instruction, insn, key);
        insn->Handler = &ControlTransfer.Loop;
    }

    private static void BindFarLoad(in Instruction instruction, Insn* insn, ushort segment)
    {
        insn->OperandSize = (byte)instruction.Op0Register.GetSize();
        insn->R1 = segment;
        insn->Handler = &FarTransfer.LoadFar;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.Intrinsics.X86;
using Iced.Intel;

namespace Vmm.X86;

/// <summary>How the translator treats an instruction.</summary>
internal enum InsnKind : byte
{
    /// <summary>Not looked at yet.</summary>
    Unknown,

    /// <summary>The interpreter's handler executes it.</summary>
    Handler,

    /// <summary>The host executes it with other registers and a checked operand.</summary>
    Pass,

    /// <summary>The same, needs the guest's vector registers.</summary>
    Vector,

    /// <summary>The same, needs the guest's x87 state.</summary>
    X87,

    /// <summary>Nothing to do.</summary>
    Nop,
    Lea,
    Pushf,
    Cli,
    Sti,
    MoveFromSegment,
    Swapgs,
    Rdtsc,
    Rdpid,
    Rdpkru,
    Cpuid,
    Direction,
    MoveFromControl,
    String,
    BitString,
    PopMemory,
    Div,
    Idiv,
    Push,
    PushImmediate,
    Pop,
    Leave,
    Jcc,
    Jmp,
    JmpIndirect,
    Call,
    CallIndirect,
    Ret,
    Syscall,
    Sysret,
    Ac,
}

/// <summary>What the translator knows of an Iced code.</summary>
internal struct InsnTraits
{
    public InsnKind Kind;

    /// <summary>RflagsBits of the six arithmetic flags that are read.</summary>
    public byte Reads;

    /// <summary>Those that are written, cleared, set or left undefined.</summary>
    public byte Writes;

    /// <summary>In a deterministic VM: those that code must clear, because processors differ in them.</summary>
    public byte Undefined;

    /// <summary>Two bits an operand: 1 read, 2 written.</summary>
    public ushort Access;

    /// <summary>Bytes of a vector instruction's memory operand, and what it must be aligned to.</summary>
    public byte MemoryBytes;
    public byte Alignment;

    /// <summary>VectorsLoaded that it needs.</summary>
    public byte VectorLevel;
}

/// <summary>Classifies instructions, once for each Iced code with and without a memory operand.</summary>
internal sealed unsafe class TraitsTable
{
    /// <summary>OF SF ZF AF CF PF in Iced's bits.</summary>
    public const byte AllFlags = (byte)(RflagsBits.OF | RflagsBits.SF | RflagsBits.ZF | RflagsBits.AF | RflagsBits.CF |
        RflagsBits.PF);

    private static readonly int s_leaf1 = X86Base.CpuId(1, 0).Ecx;
    private static readonly int s_leaf7 = X86Base.CpuId(7, 0).Ebx;
    private static readonly int s_leaf81 = X86Base.CpuId(unchecked((int)0x80000001), 0).Ecx;

    private readonly InsnTraits[] _table = new InsnTraits[16384];
    private readonly InstructionInfoFactory _info = new();
    private readonly SoftVcpu _vcpu;

    public TraitsTable(SoftVcpu vcpu) => _vcpu = vcpu;

    /// <summary>Forgets everything: CPUID changed.</summary>
    public void Clear() => Array.Clear(_table);

    /// <summary>Traits of an instruction in 64-bit code.</summary>
    public InsnTraits Of(in Instruction instruction)
    {
        int hasMemory = 0;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            hasMemory |= instruction.GetOpKind(i) == OpKind.Memory ? 1 : 0;
        }

        ref InsnTraits cached = ref _table[((int)instruction.Code * 2) + hasMemory];
        if (cached.Kind == InsnKind.Unknown)
        {
            cached = Classify(instruction);
        }

        // Flags depend on the operands: a shift by 0 leaves them.
        InsnTraits traits = cached;
        if (traits.Kind != InsnKind.Handler)
        {
            traits.Reads = (byte)((byte)instruction.RflagsRead & AllFlags);
            traits.Reads = traits.Kind is InsnKind.Pushf or InsnKind.Syscall ? AllFlags : traits.Reads;
            traits.Writes = (byte)((byte)instruction.RflagsModified & AllFlags);

            // Undefined by the book (SDM 2B, MOV), unchanged by processors and by the interpreter.
            traits.Writes = traits.Kind == InsnKind.MoveFromControl ? (byte)0 : traits.Writes;
            if (_vcpu.Vm.Deterministic)
            {
                Settle(instruction, ref traits);
            }
        }

        return traits;
    }

    // Flags are what the interpreter makes of them (Flags.cs). All processors clear AF in logical operations, and leave all
    // flags but CF as they are in bit tests.
    private static void Settle(in Instruction instruction, ref InsnTraits traits)
    {
        if (traits.Kind is InsnKind.Div or InsnKind.Idiv)
        {
            traits.Writes = 0;
            return;
        }

        traits.Undefined = instruction.Mnemonic is Mnemonic.And or Mnemonic.Or or Mnemonic.Xor or Mnemonic.Test
            or Mnemonic.Bt or Mnemonic.Bts or Mnemonic.Btr or Mnemonic.Btc
            ? (byte)0
            : (byte)((byte)instruction.RflagsUndefined & AllFlags);
        int size = instruction.OpCount == 0 ? 0 : instruction.Op0Kind == OpKind.Register
            ? instruction.Op0Register.GetSize()
            : instruction.MemorySize.GetSize();

        // Whether a shift by CL writes flags is not known here. What is left has values of its own for some counts.
        bool isUnsettled = (instruction.Op1Kind == OpKind.Register && instruction.Op1Register == Register.CL &&
                traits.Undefined != 0) ||
            instruction.Mnemonic is Mnemonic.Shld or Mnemonic.Shrd ||
            (size < 4 && instruction.Mnemonic is Mnemonic.Rcl or Mnemonic.Rcr);
        if (traits.Kind == InsnKind.X87 || isUnsettled)
        {
            // The interpreter keeps the last instruction's and operand's address of the x87 unit, too.
            traits = new InsnTraits { Kind = InsnKind.Handler, Reads = AllFlags };
        }
    }

    private InsnTraits Classify(Instruction instruction)
    {
        var traits = new InsnTraits { Kind = InsnKind.Handler, Reads = AllFlags };
        if (!_vcpu.IsOffered(instruction.Code) || !HostHas(instruction.Code))
        {
            return traits;
        }

        traits.Kind = KindOf(instruction, ref traits);
        if (traits.Kind == InsnKind.Handler)
        {
            return traits;
        }

        // Iced calls XOR r,r a pure write: ask about two different registers.
        if (instruction.OpCount > 1 && instruction.Op0Kind == OpKind.Register &&
            instruction.Op1Kind == OpKind.Register && instruction.Op0Register == instruction.Op1Register)
        {
            Register other = instruction.Op0Register;
            instruction.Op1Register = other.GetNumber() == 0 ? other + 1 : other - 1;
        }

        if (instruction.OpCount > 2 && instruction.Op1Kind == OpKind.Register &&
            instruction.Op2Kind == OpKind.Register && instruction.Op1Register == instruction.Op2Register)
        {
            Register other = instruction.Op1Register;
            instruction.Op2Register = other.GetNumber() == 0 ? other + 1 : other - 1;
        }

        InstructionInfo info = _info.GetInfo(instruction);
        for (int i = 0; i < instruction.OpCount && i < 5; i++)
        {
            int access = info.GetOpAccess(i) switch
            {
                OpAccess.Read or OpAccess.CondRead => 1,
                OpAccess.Write => 2,
                OpAccess.None or OpAccess.NoMemAccess => 0,
                _ => 3,
            };
            traits.Access |= (ushort)(access << (2 * i));
        }

        return traits;
    }

    // The guest is offered some instructions that the interpreter executes without the host's help.
    private static bool HostHas(Code code)
    {
        foreach (CpuidFeature feature in code.CpuidFeatures())
        {
            bool has = feature switch
            {
                CpuidFeature.BMI1 => (s_leaf7 & (1 << 3)) != 0,
                CpuidFeature.BMI2 => (s_leaf7 & (1 << 8)) != 0,
                CpuidFeature.ADX => (s_leaf7 & (1 << 19)) != 0,
                CpuidFeature.LZCNT => (s_leaf81 & (1 << 5)) != 0,
                CpuidFeature.POPCNT => (s_leaf1 & (1 << 23)) != 0,
                CpuidFeature.MOVBE => (s_leaf1 & (1 << 22)) != 0,
                CpuidFeature.SSE4_2 => (s_leaf1 & (1 << 20)) != 0,
                _ => true,
            };
            if (!has)
            {
                return false;
            }
        }

        return true;
    }

    private InsnKind KindOf(in Instruction instruction, ref InsnTraits traits)
    {
        switch (instruction.Code)
        {
            case Code.Push_r64:
            case Code.Push_rm64:
                return InsnKind.Push;
            case Code.Pushq_imm32:
            case Code.Pushq_imm8:
                return InsnKind.PushImmediate;
            case Code.Pop_r64:
                return InsnKind.Pop;
            case Code.Pushfq:
                return InsnKind.Pushf;
            case Code.Cli:
                return InsnKind.Cli;
            case Code.Sti:
                return InsnKind.Sti;
            case Code.Swapgs:
                return InsnKind.Swapgs;
            case Code.Rdtsc:
            case Code.Rdtscp:
                return InsnKind.Rdtsc;
            case Code.Cpuid:
                return InsnKind.Cpuid;
            case Code.Rdpkru:
                return InsnKind.Rdpkru;
            case Code.Cld:
            case Code.Std:
                return InsnKind.Direction;
            case Code.Stac:
            case Code.Clac:
                return InsnKind.Ac;
            case Code.Mov_r64_cr:
                return InsnKind.MoveFromControl;
            case Code.Movsb_m8_m8 or Code.Movsw_m16_m16 or Code.Movsd_m32_m32 or Code.Movsq_m64_m64
                or Code.Stosb_m8_AL or Code.Stosw_m16_AX or Code.Stosd_m32_EAX or Code.Stosq_m64_RAX:
                return InsnKind.String;
            case Code.Pop_rm64 when instruction.Op0Kind == OpKind.Memory:
                return InsnKind.PopMemory;
            case Code.Syscall:
                return InsnKind.Syscall;
            case Code.Sysretq:
                return InsnKind.Sysret;
            case Code.Rdpid_r64:
                return InsnKind.Rdpid;
            case Code.Mov_r32m16_Sreg or Code.Mov_r64m16_Sreg when instruction.Op0Kind == OpKind.Register:
                return InsnKind.MoveFromSegment;
            case Code.Leaveq:
                return InsnKind.Leave;
            case Code.Jmp_rel8_64:
            case Code.Jmp_rel32_64:
                return InsnKind.Jmp;
            case Code.Jmp_rm64:
                return InsnKind.JmpIndirect;
            case Code.Call_rel32_64:
                return InsnKind.Call;
            case Code.Call_rm64:
                return InsnKind.CallIndirect;
            case Code.Retnq:
            case Code.Retnq_imm16:
                return InsnKind.Ret;
            default:
                break;
        }

        if (instruction.IsJccShortOrNear)
        {
            return instruction.Op0Kind == OpKind.NearBranch64 ? InsnKind.Jcc : InsnKind.Handler;
        }

        for (int i = 0; i < instruction.OpCount; i++)
        {
            OpKind kind = instruction.GetOpKind(i);
            if (kind is not (OpKind.Register or OpKind.Memory or OpKind.Immediate8 or OpKind.Immediate16
                or OpKind.Immediate32 or OpKind.Immediate64 or OpKind.Immediate8to16 or OpKind.Immediate8to32
                or OpKind.Immediate8to64 or OpKind.Immediate32to64))
            {
                return InsnKind.Handler;
            }
        }

        switch (instruction.Mnemonic)
        {
            case Mnemonic.Mov:
                return IsGeneral(instruction) ? InsnKind.Pass : InsnKind.Handler;
            case Mnemonic.Lea:
                return InsnKind.Lea;
            case Mnemonic.Nop:
            case Mnemonic.Endbr64:
            case Mnemonic.Prefetcht0:
            case Mnemonic.Prefetcht1:
            case Mnemonic.Prefetcht2:
            case Mnemonic.Prefetchnta:
                return InsnKind.Nop;
            case Mnemonic.Prefetchw:
                return instruction.Op0Kind == OpKind.Memory ? InsnKind.Nop : InsnKind.Handler;
            case Mnemonic.Div:
                return InsnKind.Div;
            case Mnemonic.Idiv:
                return InsnKind.Idiv;
            case Mnemonic.Bt:
            case Mnemonic.Bts:
            case Mnemonic.Btr:
            case Mnemonic.Btc:
                // A register bit number reaches beyond the operand in memory.
                return instruction.Op0Kind == OpKind.Memory && instruction.Op1Kind == OpKind.Register
                    ? InsnKind.BitString
                    : InsnKind.Pass;
            case Mnemonic.Add or Mnemonic.Or or Mnemonic.Adc or Mnemonic.Sbb or Mnemonic.And or Mnemonic.Sub
                or Mnemonic.Xor or Mnemonic.Cmp or Mnemonic.Test or Mnemonic.Inc or Mnemonic.Dec or Mnemonic.Neg
                or Mnemonic.Not or Mnemonic.Movzx or Mnemonic.Movsx or Mnemonic.Movsxd or Mnemonic.Imul or Mnemonic.Mul
                or Mnemonic.Shl or Mnemonic.Sal or Mnemonic.Shr or Mnemonic.Sar or Mnemonic.Rol or Mnemonic.Ror
                or Mnemonic.Rcl or Mnemonic.Rcr or Mnemonic.Shld or Mnemonic.Shrd or Mnemonic.Bsf or Mnemonic.Bsr
                or Mnemonic.Lzcnt or Mnemonic.Tzcnt or Mnemonic.Popcnt or Mnemonic.Bswap or Mnemonic.Xchg
                or Mnemonic.Xadd or Mnemonic.Cmpxchg or Mnemonic.Cbw or Mnemonic.Cwde or Mnemonic.Cdqe or Mnemonic.Cwd
                or Mnemonic.Cdq or Mnemonic.Cqo or Mnemonic.Lahf or Mnemonic.Sahf or Mnemonic.Clc or Mnemonic.Stc
                or Mnemonic.Cmc or Mnemonic.Movbe or Mnemonic.Andn or Mnemonic.Bextr or Mnemonic.Blsi or Mnemonic.Blsr
                or Mnemonic.Blsmsk or Mnemonic.Bzhi or Mnemonic.Mulx or Mnemonic.Pdep or Mnemonic.Pext or Mnemonic.Rorx
                or Mnemonic.Sarx or Mnemonic.Shlx or Mnemonic.Shrx or Mnemonic.Adcx or Mnemonic.Adox or Mnemonic.Crc32
                or Mnemonic.Movnti or Mnemonic.Lfence or Mnemonic.Sfence or Mnemonic.Mfence or Mnemonic.Cmpxchg16b
                or Mnemonic.Cmpxchg8b:
                return InsnKind.Pass;
            default:
                break;
        }

        if (instruction.IsJccShortOrNear || instruction.ConditionCode != ConditionCode.None)
        {
            string name = instruction.Mnemonic.ToString();
            return name.StartsWith("Set", StringComparison.Ordinal) || name.StartsWith("Cmov", StringComparison.Ordinal)
                ? InsnKind.Pass
                : InsnKind.Handler;
        }

        return SimdTraits.IsX87(instruction) ? X87Kind(instruction) : VectorKind(instruction, ref traits);
    }

    // Computation, loads and stores; what loads, stores or resets the environment is the interpreter's.
    private static InsnKind X87Kind(in Instruction instruction)
    {
        for (int i = 0; i < instruction.OpCount; i++)
        {
            bool isStack = instruction.GetOpKind(i) == OpKind.Register &&
                instruction.GetOpRegister(i) is >= Register.ST0 and <= Register.ST7;
            if (!isStack && instruction.GetOpKind(i) != OpKind.Memory)
            {
                return InsnKind.Handler;
            }
        }

        switch (instruction.Mnemonic)
        {
            case Mnemonic.Fld or Mnemonic.Fild or Mnemonic.Fst or Mnemonic.Fstp or Mnemonic.Fist or Mnemonic.Fistp
                or Mnemonic.Fisttp or Mnemonic.Fld1 or Mnemonic.Fldz or Mnemonic.Fldpi or Mnemonic.Fldl2e
                or Mnemonic.Fldl2t or Mnemonic.Fldlg2 or Mnemonic.Fldln2 or Mnemonic.Fxch or Mnemonic.Fchs
                or Mnemonic.Fabs or Mnemonic.Fadd or Mnemonic.Faddp or Mnemonic.Fiadd or Mnemonic.Fsub
                or Mnemonic.Fsubp or Mnemonic.Fisub or Mnemonic.Fsubr or Mnemonic.Fsubrp or Mnemonic.Fisubr
                or Mnemonic.Fmul or Mnemonic.Fmulp or Mnemonic.Fimul or Mnemonic.Fdiv or Mnemonic.Fdivp
                or Mnemonic.Fidiv or Mnemonic.Fdivr or Mnemonic.Fdivrp or Mnemonic.Fidivr or Mnemonic.Fsqrt
                or Mnemonic.Frndint or Mnemonic.Fscale or Mnemonic.Fprem or Mnemonic.Fprem1 or Mnemonic.Fxtract
                or Mnemonic.Fcom or Mnemonic.Fcomp or Mnemonic.Fcompp or Mnemonic.Ficom or Mnemonic.Ficomp
                or Mnemonic.Fucom or Mnemonic.Fucomp or Mnemonic.Fucompp or Mnemonic.Fcomi or Mnemonic.Fcomip
                or Mnemonic.Fucomi or Mnemonic.Fucomip or Mnemonic.Ftst or Mnemonic.Fxam or Mnemonic.Fsin
                or Mnemonic.Fcos or Mnemonic.Fsincos or Mnemonic.Fptan or Mnemonic.Fpatan or Mnemonic.F2xm1
                or Mnemonic.Fyl2x or Mnemonic.Fyl2xp1:
                return InsnKind.X87;
            default:
                return InsnKind.Handler;
        }
    }

    private static bool IsGeneral(in Instruction instruction)
    {
        for (int i = 0; i < 2; i++)
        {
            if (instruction.GetOpKind(i) == OpKind.Register && !instruction.GetOpRegister(i).IsGPR())
            {
                return false;
            }
        }

        return true;
    }

    private InsnKind VectorKind(in Instruction instruction, ref InsnTraits traits)
    {
        bool isVex = instruction.OpCode.Encoding == EncodingKind.VEX;
        traits.VectorLevel = isVex ? (byte)2 : (byte)1;
        if (instruction.Mnemonic is Mnemonic.Vzeroupper or Mnemonic.Vzeroall)
        {
            return InsnKind.Vector;
        }

        bool hasVector = instruction.Mnemonic is Mnemonic.Cvtss2si or Mnemonic.Cvttss2si or Mnemonic.Cvtsd2si
            or Mnemonic.Cvttsd2si or Mnemonic.Vcvtss2si or Mnemonic.Vcvttss2si or Mnemonic.Vcvtsd2si
            or Mnemonic.Vcvttsd2si;
        bool hasMemory = false;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            hasMemory |= instruction.GetOpKind(i) == OpKind.Memory;
            if (instruction.GetOpKind(i) == OpKind.Register)
            {
                Register register = instruction.GetOpRegister(i);
                hasVector |= register.IsXMM() || register.IsYMM();
                if (!register.IsXMM() && !register.IsYMM() && !register.IsGPR())
                {
                    return InsnKind.Handler;
                }
            }
        }

        if (!hasVector || instruction.IsVsib || instruction.OpCode.Encoding is not (EncodingKind.Legacy or EncodingKind.VEX))
        {
            return InsnKind.Handler;
        }

        // Conditional accesses, and those that enter the MMX state.
        string name = instruction.Mnemonic.ToString();
        if (name.Contains("maskmov", StringComparison.OrdinalIgnoreCase) ||
            instruction.Mnemonic is Mnemonic.Cvtpi2ps or Mnemonic.Cvtpi2pd)
        {
            return InsnKind.Handler;
        }

        ThunkCache? thunks = _vcpu.Vm.Thunks;
        Thunk* thunk = thunks is null ? null : thunks.Get(instruction);
        if (thunk == null)
        {
            return InsnKind.Handler;
        }

        if (hasMemory)
        {
            traits.MemoryBytes = (byte)thunk->MemoryBytes;
            bool isLoose = instruction.Mnemonic is Mnemonic.Movups or Mnemonic.Movupd or Mnemonic.Movdqu or Mnemonic.Lddqu;
            traits.Alignment = isLoose ? (byte)1 : (byte)Math.Max(thunk->Alignment, thunk->HostAlignment);
            if (traits.MemoryBytes is 0 or > 32)
            {
                return InsnKind.Handler;
            }
        }

        return InsnKind.Vector;
    }
}

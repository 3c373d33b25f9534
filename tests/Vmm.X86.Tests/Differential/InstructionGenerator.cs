// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Iced.Intel;

namespace Vmm.X86.Tests.Differential;

/// <summary>A memory operand whose address the state generator steers into the data arena.</summary>
internal readonly record struct SteeredOperand(
    Register Base, Register Index, int Scale, ulong Displacement, int SizeBytes, bool UsesGs, bool IsVsib);

/// <summary>One generated instruction.</summary>
internal sealed record GeneratedInstruction(Instruction Instruction, byte[] Bytes, SteeredOperand? Memory);

/// <summary>
/// Draws random instructions of one <see cref="Code"/>: operands from Iced's operand kinds, encoded by Iced. Nothing
/// is drawn that would let a program harm the process it runs in: system calls, far transfers, segment loads, writes
/// to FS.base; nor what cannot be compared: time, random numbers, identification, and what Linux emulates (UMIP).
/// </summary>
internal sealed class InstructionGenerator
{
    private readonly Random _random;
    private readonly int _bitness;
    private readonly BufferWriter _writer = new();
    private readonly Encoder _encoder;

    public InstructionGenerator(Random random, int bitness)
    {
        _random = random;
        _bitness = bitness;
        _encoder = Encoder.Create(bitness, _writer);
    }

    private static readonly HashSet<Mnemonic> s_excluded =
    [
        // Leave the program, or reach the kernel.
        Mnemonic.Syscall, Mnemonic.Sysenter, Mnemonic.Sysexit, Mnemonic.Sysret, Mnemonic.Sysretq, Mnemonic.Sysexitq,
        Mnemonic.Int, Mnemonic.Int1, Mnemonic.Int3, Mnemonic.Iret, Mnemonic.Iretd, Mnemonic.Iretq,
        Mnemonic.Retf, Mnemonic.Vmcall, Mnemonic.Vmmcall, Mnemonic.Xbegin, Mnemonic.Xabort, Mnemonic.Xend,
        Mnemonic.Xtest, Mnemonic.Rsm, Mnemonic.Jmpe,

        // Segment state of the process.
        Mnemonic.Lds, Mnemonic.Les, Mnemonic.Lfs, Mnemonic.Lgs, Mnemonic.Lss, Mnemonic.Wrfsbase, Mnemonic.Wrgsbase,
        Mnemonic.Rdfsbase, Mnemonic.Lar, Mnemonic.Lsl, Mnemonic.Verr, Mnemonic.Verw, Mnemonic.Arpl,

        // Linux answers these itself where UMIP is on.
        Mnemonic.Sgdt, Mnemonic.Sidt, Mnemonic.Sldt, Mnemonic.Str, Mnemonic.Smsw,

        // Not reproducible.
        Mnemonic.Rdtsc, Mnemonic.Rdtscp, Mnemonic.Rdrand, Mnemonic.Rdseed, Mnemonic.Cpuid, Mnemonic.Rdpmc,
        Mnemonic.Rdpid, Mnemonic.Rdpru, Mnemonic.Xgetbv, Mnemonic.Rdpkru, Mnemonic.Wrpkru, Mnemonic.Mwait,
        Mnemonic.Monitor, Mnemonic.Monitorx, Mnemonic.Mwaitx, Mnemonic.Clzero, Mnemonic.Umwait, Mnemonic.Umonitor,
        Mnemonic.Tpause,

        // Have tests of their own (their images hold what the host's and the guest's processor may differ in).
        Mnemonic.Xsave, Mnemonic.Xsave64, Mnemonic.Xsavec, Mnemonic.Xsavec64, Mnemonic.Xsaveopt, Mnemonic.Xsaveopt64,
        Mnemonic.Xsaves, Mnemonic.Xsaves64, Mnemonic.Xrstor, Mnemonic.Xrstor64, Mnemonic.Xrstors, Mnemonic.Xrstors64,
    ];

    private static readonly HashSet<CpuidFeature> s_features =
    [
        CpuidFeature.INTEL8086, CpuidFeature.INTEL186, CpuidFeature.INTEL286, CpuidFeature.INTEL386,
        CpuidFeature.INTEL486, CpuidFeature.X64, CpuidFeature.ADX, CpuidFeature.AES, CpuidFeature.AVX,
        CpuidFeature.AVX2, CpuidFeature.BMI1, CpuidFeature.BMI2, CpuidFeature.CLFLUSHOPT, CpuidFeature.CLFSH,
        CpuidFeature.CLWB, CpuidFeature.CMOV, CpuidFeature.CMPXCHG16B, CpuidFeature.CPUID, CpuidFeature.CX8,
        CpuidFeature.F16C, CpuidFeature.FMA, CpuidFeature.FPU, CpuidFeature.FPU287, CpuidFeature.FPU387,
        CpuidFeature.FSGSBASE, CpuidFeature.FXSR, CpuidFeature.GFNI, CpuidFeature.LZCNT, CpuidFeature.MMX,
        CpuidFeature.MOVBE, CpuidFeature.MSR, CpuidFeature.MULTIBYTENOP, CpuidFeature.PAUSE, CpuidFeature.PCLMULQDQ,
        CpuidFeature.POPCNT, CpuidFeature.PREFETCHW, CpuidFeature.SHA, CpuidFeature.SSE, CpuidFeature.SSE2,
        CpuidFeature.SSE3, CpuidFeature.SSE4_1, CpuidFeature.SSE4_2, CpuidFeature.SSSE3, CpuidFeature.VAES,
        CpuidFeature.VPCLMULQDQ, CpuidFeature.RDPMC,
    ];

    /// <summary>Codes that can be drawn in this mode, in a fixed order.</summary>
    public List<Code> Codes()
    {
        var codes = new List<Code>();
        foreach (Code code in Enum.GetValues<Code>())
        {
            if (IsDrawn(code))
            {
                codes.Add(code);
            }
        }

        return codes;
    }

    private bool IsDrawn(Code code)
    {
        OpCodeInfo info = code.ToOpCode();
        if (!info.IsInstruction || info.Fwait || info.Encoding is not (EncodingKind.Legacy or EncodingKind.VEX)
            || !(_bitness == 64 ? info.Mode64 && info.LongMode : info.Mode32 && info.CompatibilityMode)
            || s_excluded.Contains(code.Mnemonic()))
        {
            return false;
        }

        // Makers differ in whether an operand size prefix counts for near branches in 64-bit mode, and UD0 has or has not
        // a ModRM byte: Iced decodes another code than was encoded.
        bool isAmbiguous = code is Code.Movsxd_r16_rm16 or Code.Retnw or Code.Retnw_imm16 or Code.Call_rm16 or Code.Jmp_rm16;
        if (code == Code.Ud0 || (_bitness == 64 && isAmbiguous))
        {
            return false;
        }

        foreach (CpuidFeature feature in code.CpuidFeatures())
        {
            if (!s_features.Contains(feature))
            {
                return false;
            }
        }

        FlowControl flow = code.FlowControl();
        if (flow is FlowControl.Interrupt or FlowControl.XbeginXabortXend || code.IsCallFar() || code.IsJmpFar()
            || code.IsCallFarIndirect() || code.IsJmpFarIndirect())
        {
            return false;
        }

        for (int i = 0; i < info.OpCount; i++)
        {
            OpCodeOperandKind kind = info.GetOpKind(i);
            bool loadsSegment = kind is OpCodeOperandKind.seg_reg or OpCodeOperandKind.fs or OpCodeOperandKind.gs
                or OpCodeOperandKind.ds or OpCodeOperandKind.es or OpCodeOperandKind.ss;
            if ((loadsSegment && i == 0 && code.Mnemonic() is Mnemonic.Mov or Mnemonic.Pop && loadsSegment)
                || kind is OpCodeOperandKind.tr_reg or OpCodeOperandKind.br16_1 or OpCodeOperandKind.br16_2
                    or OpCodeOperandKind.brdisp_2 or OpCodeOperandKind.brdisp_4)
            {
                return false;
            }
        }

        return true;
    }

    /// <summary>Draws an instruction, or null when the drawn operands have no encoding.</summary>
    /// <param name="code">Which.</param>
    /// <param name="rip">Where it will lie.</param>
    /// <param name="branchTarget">Where near branches go.</param>
    public GeneratedInstruction? TryDraw(Code code, ulong rip, ulong branchTarget)
    {
        OpCodeInfo info = code.ToOpCode();
        var instruction = default(Instruction);
        instruction.Code = code;
        SteeredOperand? memory = null;
        for (int i = 0; i < info.OpCount; i++)
        {
            if (!SetOperand(ref instruction, info, i, branchTarget, ref memory))
            {
                return null;
            }
        }

        bool hasMemory = memory is not null;
        bool countsInCl = code is Code.Shld_rm16_r16_CL or Code.Shrd_rm16_r16_CL;
        if (countsInCl && hasMemory && (memory!.Value.Base.GetNumber() == 1 || memory.Value.Index.GetNumber() == 1))
        {
            return null;
        }

        if (hasMemory && info.CanUseLockPrefix && instruction.Op0Kind == OpKind.Memory)
        {
            instruction.HasLockPrefix = _random.Next(2) == 0;
        }

        if (info.CanUseRepPrefix && instruction.IsStringInstruction)
        {
            instruction.HasRepPrefix = _random.Next(2) == 0;
        }

        if (info.CanUseRepnePrefix && instruction.IsStringInstruction && !instruction.HasRepPrefix)
        {
            instruction.HasRepnePrefix = _random.Next(2) == 0;
        }

        _writer.Clear();
        if (!_encoder.TryEncode(instruction, rip, out _, out _))
        {
            return null;
        }

        byte[] bytes = _writer.ToArray();
        var decoder = Decoder.Create(_bitness, bytes);
        decoder.IP = rip;
        decoder.Decode(out Instruction decoded);
        return decoded.Length != bytes.Length ? null : new GeneratedInstruction(decoded, bytes, memory);
    }

    private bool SetOperand(
        ref Instruction ins, OpCodeInfo info, int index, ulong branchTarget, ref SteeredOperand? memory)
    {
        OpCodeOperandKind kind = info.GetOpKind(index);
        switch (kind)
        {
            case OpCodeOperandKind.r8_or_mem:
                return RegisterOrMemory(ref ins, index, Gpr8(), ref memory);
            case OpCodeOperandKind.r16_or_mem:
                return RegisterOrMemory(ref ins, index, Gpr(Register.AX), ref memory);
            case OpCodeOperandKind.r32_or_mem:
                return RegisterOrMemory(ref ins, index, Gpr(Register.EAX), ref memory);
            case OpCodeOperandKind.r64_or_mem:
                return RegisterOrMemory(ref ins, index, Gpr(Register.RAX), ref memory);
            case OpCodeOperandKind.mm_or_mem:
                return RegisterOrMemory(ref ins, index, Register.MM0 + _random.Next(8), ref memory);
            case OpCodeOperandKind.xmm_or_mem:
                return RegisterOrMemory(ref ins, index, Vector(Register.XMM0), ref memory);
            case OpCodeOperandKind.ymm_or_mem:
                return RegisterOrMemory(ref ins, index, Vector(Register.YMM0), ref memory);
            case OpCodeOperandKind.mem:
                return Memory(ref ins, index, ref memory, Register.None);
            case OpCodeOperandKind.mem_vsib32x:
            case OpCodeOperandKind.mem_vsib64x:
                return Memory(ref ins, index, ref memory, Vector(Register.XMM0));
            case OpCodeOperandKind.mem_vsib32y:
            case OpCodeOperandKind.mem_vsib64y:
                return Memory(ref ins, index, ref memory, Vector(Register.YMM0));
            case OpCodeOperandKind.mem_offs:
                return MemoryOffset(ref ins, index, ref memory);
            case OpCodeOperandKind.r8_reg or OpCodeOperandKind.r8_opcode:
                return SetRegister(ref ins, index, Gpr8());
            case OpCodeOperandKind.r16_reg or OpCodeOperandKind.r16_rm or OpCodeOperandKind.r16_opcode
                or OpCodeOperandKind.r16_reg_mem:
                return SetRegister(ref ins, index, Gpr(Register.AX));
            case OpCodeOperandKind.r32_reg or OpCodeOperandKind.r32_rm or OpCodeOperandKind.r32_opcode
                or OpCodeOperandKind.r32_vvvv or OpCodeOperandKind.r32_reg_mem:
                return SetRegister(ref ins, index, Gpr(Register.EAX));
            case OpCodeOperandKind.r64_reg or OpCodeOperandKind.r64_rm or OpCodeOperandKind.r64_opcode
                or OpCodeOperandKind.r64_vvvv or OpCodeOperandKind.r64_reg_mem:
                return SetRegister(ref ins, index, Gpr(Register.RAX));
            case OpCodeOperandKind.mm_reg or OpCodeOperandKind.mm_rm:
                return SetRegister(ref ins, index, Register.MM0 + _random.Next(8));
            case OpCodeOperandKind.xmm_reg or OpCodeOperandKind.xmm_rm or OpCodeOperandKind.xmm_vvvv
                or OpCodeOperandKind.xmm_is4 or OpCodeOperandKind.xmm_is5:
                return SetRegister(ref ins, index, Vector(Register.XMM0));
            case OpCodeOperandKind.ymm_reg or OpCodeOperandKind.ymm_rm or OpCodeOperandKind.ymm_vvvv
                or OpCodeOperandKind.ymm_is4 or OpCodeOperandKind.ymm_is5:
                return SetRegister(ref ins, index, Vector(Register.YMM0));
            case OpCodeOperandKind.seg_reg:
                return SetRegister(ref ins, index, Register.ES + _random.Next(6));
            case OpCodeOperandKind.cr_reg:
                return SetRegister(ref ins, index, Register.CR0);
            case OpCodeOperandKind.dr_reg:
                return SetRegister(ref ins, index, Register.DR0);
            case OpCodeOperandKind.es:
                return SetRegister(ref ins, index, Register.ES);
            case OpCodeOperandKind.cs:
                return SetRegister(ref ins, index, Register.CS);
            case OpCodeOperandKind.ss:
                return SetRegister(ref ins, index, Register.SS);
            case OpCodeOperandKind.ds:
                return SetRegister(ref ins, index, Register.DS);
            case OpCodeOperandKind.fs:
                return SetRegister(ref ins, index, Register.FS);
            case OpCodeOperandKind.gs:
                return SetRegister(ref ins, index, Register.GS);
            case OpCodeOperandKind.al:
                return SetRegister(ref ins, index, Register.AL);
            case OpCodeOperandKind.cl:
                return SetRegister(ref ins, index, Register.CL);
            case OpCodeOperandKind.ax:
                return SetRegister(ref ins, index, Register.AX);
            case OpCodeOperandKind.dx:
                return SetRegister(ref ins, index, Register.DX);
            case OpCodeOperandKind.eax:
                return SetRegister(ref ins, index, Register.EAX);
            case OpCodeOperandKind.rax:
                return SetRegister(ref ins, index, Register.RAX);
            case OpCodeOperandKind.st0:
                return SetRegister(ref ins, index, Register.ST0);
            case OpCodeOperandKind.sti_opcode:
                return SetRegister(ref ins, index, Register.ST0 + _random.Next(8));
            case OpCodeOperandKind.imm8:
                ins.SetOpKind(index, OpKind.Immediate8);
                SetImmediate8(ref ins, index);
                return true;
            case OpCodeOperandKind.imm4_m2z:
                ins.SetOpKind(index, OpKind.Immediate8);
                ins.Immediate8 = (byte)_random.Next(4);
                return true;
            case OpCodeOperandKind.imm8_const_1:
                ins.SetOpKind(index, OpKind.Immediate8);
                ins.Immediate8 = 1;
                return true;
            case OpCodeOperandKind.imm8sex16:
                ins.SetOpKind(index, OpKind.Immediate8to16);
                ins.Immediate8to16 = (sbyte)Interesting();
                return true;
            case OpCodeOperandKind.imm8sex32:
                ins.SetOpKind(index, OpKind.Immediate8to32);
                ins.Immediate8to32 = (sbyte)Interesting();
                return true;
            case OpCodeOperandKind.imm8sex64:
                ins.SetOpKind(index, OpKind.Immediate8to64);
                ins.Immediate8to64 = (sbyte)Interesting();
                return true;
            case OpCodeOperandKind.imm16:
                ins.SetOpKind(index, OpKind.Immediate16);
                ins.Immediate16 = (ushort)(ins.Mnemonic == Mnemonic.Enter ? _random.Next(256) : (int)Interesting());
                return true;
            case OpCodeOperandKind.imm32:
                ins.SetOpKind(index, OpKind.Immediate32);
                ins.Immediate32 = (uint)Interesting();
                return true;
            case OpCodeOperandKind.imm32sex64:
                ins.SetOpKind(index, OpKind.Immediate32to64);
                ins.Immediate32to64 = (int)Interesting();
                return true;
            case OpCodeOperandKind.imm64:
                ins.SetOpKind(index, OpKind.Immediate64);
                ins.Immediate64 = Interesting();
                return true;
            case OpCodeOperandKind.br64_1 or OpCodeOperandKind.br64_4:
                ins.SetOpKind(index, OpKind.NearBranch64);
                ins.NearBranch64 = branchTarget;
                return true;
            case OpCodeOperandKind.br32_1 or OpCodeOperandKind.br32_4:
                ins.SetOpKind(index, OpKind.NearBranch32);
                ins.NearBranch32 = (uint)branchTarget;
                return true;
            case OpCodeOperandKind.seg_rSI:
                return StringOperand(ref ins, index, OpKind.MemorySegRSI, OpKind.MemorySegESI);
            case OpCodeOperandKind.es_rDI:
                return StringOperand(ref ins, index, OpKind.MemoryESRDI, OpKind.MemoryESEDI);
            case OpCodeOperandKind.seg_rDI:
                return StringOperand(ref ins, index, OpKind.MemorySegRDI, OpKind.MemorySegEDI);
            case OpCodeOperandKind.seg_rBX_al:
                bool wide = _bitness == 64 && _random.Next(8) != 0;
                ins.SetOpKind(index, OpKind.Memory);
                ins.MemoryBase = wide ? Register.RBX : Register.EBX;
                ins.MemoryIndex = Register.AL;
                ins.MemoryIndexScale = 1;
                memory = new SteeredOperand(ins.MemoryBase, Register.None, 1, 0, 256, false, false);
                return true;
            default:
                return false;
        }
    }

    private bool StringOperand(ref Instruction ins, int index, OpKind wide, OpKind narrow)
    {
        // Both operands of MOVS and CMPS have one address size: the first one decides.
        bool useNarrow = _bitness == 32 || (index == 0
            ? _random.Next(8) == 0
            : ins.Op0Kind is OpKind.MemoryESEDI or OpKind.MemorySegESI or OpKind.MemorySegEDI);
        ins.SetOpKind(index, useNarrow ? narrow : wide);
        return true;
    }

    private void SetImmediate8(ref Instruction ins, int index)
    {
        byte value = (byte)(_random.Next(4) == 0 ? Interesting() : (ulong)_random.Next(256));
        if (ins.Mnemonic == Mnemonic.Enter)
        {
            ins.SetOpKind(index, OpKind.Immediate8_2nd);
            ins.Immediate8_2nd = (byte)(value & 7);
        }
        else
        {
            bool isDoubleShift = ins.Mnemonic is Mnemonic.Shld or Mnemonic.Shrd;
            ins.Immediate8 = isDoubleShift ? (byte)(value & ~0x10) : value;
        }
    }

    private static bool SetRegister(ref Instruction ins, int index, Register register)
    {
        ins.SetOpKind(index, OpKind.Register);
        ins.SetOpRegister(index, register);
        return true;
    }

    private bool RegisterOrMemory(ref Instruction ins, int index, Register register, ref SteeredOperand? memory) =>
        _random.Next(2) == 0 ? SetRegister(ref ins, index, register) : Memory(ref ins, index, ref memory, 0);

    private bool MemoryOffset(ref Instruction ins, int index, ref SteeredOperand? memory)
    {
        ins.SetOpKind(index, OpKind.Memory);
        ulong address = NativeCpu.DataBase + (uint)_random.Next((int)NativeCpu.DataBytes - 16);
        ins.MemoryDisplacement64 = address;
        ins.MemoryDisplSize = _bitness == 64 ? 8 : 4;
        memory = new SteeredOperand(0, 0, 1, address, 8, false, false);
        return true;
    }

    private bool Memory(ref Instruction ins, int index, ref SteeredOperand? memory, Register vsib)
    {
        ins.SetOpKind(index, OpKind.Memory);
        bool wide = _bitness == 64 && _random.Next(8) != 0;
        Register first = wide ? Register.RAX : Register.EAX;
        bool isVsib = vsib != Register.None;
        int size = ins.Code.ToOpCode().MemorySize.GetSize();
        bool gs = _bitness == 64 && _random.Next(16) == 0;
        int shape = isVsib ? 2 + _random.Next(2) : _random.Next(8);
        if (_bitness == 64 && shape == 0)
        {
            uint target = NativeCpu.DataBase + (uint)_random.Next((int)NativeCpu.DataBytes - 64);
            target &= _random.Next(2) == 0 ? ~31u : ~0u;
            ins.MemoryBase = Register.RIP;
            ins.MemoryDisplacement64 = target;
            ins.MemoryDisplSize = 8;
            memory = new SteeredOperand(0, 0, 1, target, size, false, false);
            return true;
        }

        if (shape == 1)
        {
            uint target = NativeCpu.DataBase + (uint)_random.Next((int)NativeCpu.DataBytes - 64);
            target &= _random.Next(2) == 0 ? ~31u : ~0u;
            ins.MemoryDisplacement64 = target;
            ins.MemoryDisplSize = _bitness == 64 ? 8 : 4;
            memory = new SteeredOperand(0, 0, 1, target, size, false, false);
            return true;
        }

        Register baseRegister = first + _random.Next(_bitness == 64 ? 16 : 8);
        Register indexRegister = Register.None;
        int scale = 1;
        if (isVsib)
        {
            indexRegister = vsib;
            scale = 1 << _random.Next(4);
        }
        else if (shape >= 5)
        {
            indexRegister = first + _random.Next(_bitness == 64 ? 16 : 8);
            scale = 1 << _random.Next(4);
            if (indexRegister == Register.RSP || indexRegister == Register.ESP || indexRegister == baseRegister)
            {
                return false;
            }
        }

        int displacement = _random.Next(3) switch
        {
            0 => 0,
            1 => (sbyte)_random.Next(256),
            _ => _random.Next(-0x10000, 0x10000),
        };
        ins.MemoryBase = baseRegister;
        ins.MemoryIndex = indexRegister;
        ins.MemoryIndexScale = scale;
        ulong displacementBits = wide ? (ulong)(long)displacement : (uint)displacement;
        ins.MemoryDisplacement64 = displacementBits;
        ins.MemoryDisplSize = displacement == 0 && baseRegister is not (Register.RBP or Register.EBP
            or Register.R13 or Register.R13D) ? 0 : displacement is >= -128 and < 128 ? 1 : _bitness == 64 && wide ? 8 : 4;
        if (gs)
        {
            ins.SegmentPrefix = Register.GS;
        }

        memory = new SteeredOperand(baseRegister, indexRegister, scale, displacementBits, size, gs, isVsib);
        return true;
    }

    private Register Gpr8()
    {
        if (_bitness == 32)
        {
            return Register.AL + _random.Next(8);
        }

        // AL CL DL BL AH CH DH BH SPL BPL SIL DIL R8L...: Iced's order.
        return Register.AL + _random.Next(20);
    }

    private Register Gpr(Register first)
    {
        int number = _random.Next(_bitness == 64 ? 16 : 8);
        return first + (number == 4 && _random.Next(8) != 0 ? 0 : number);
    }

    private Register Vector(Register first) => first + _random.Next(_bitness == 64 ? 16 : 8);

    private ulong Interesting() => _random.Next(4) switch
    {
        0 => (ulong)_random.Next(0, 3),
        1 => unchecked(0UL - (ulong)_random.Next(1, 3)),
        2 => 1UL << _random.Next(64),
        _ => (ulong)_random.NextInt64(),
    };

    private sealed class BufferWriter : CodeWriter
    {
        private readonly byte[] _buffer = new byte[32];
        private int _length;

        public override void WriteByte(byte value) => _buffer[_length++] = value;

        public void Clear() => _length = 0;

        public byte[] ToArray() => _buffer.AsSpan(0, _length).ToArray();
    }
}

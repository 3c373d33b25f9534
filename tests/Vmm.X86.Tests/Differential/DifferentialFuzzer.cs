// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Text;
using Iced.Intel;

namespace Vmm.X86.Tests.Differential;

/// <summary>What one fuzzing run did.</summary>
internal sealed class FuzzReport
{
    public long Executions { get; set; }

    public long Faults { get; set; }

    public Dictionary<Code, long> PerCode { get; } = [];

    /// <summary>Codes that were to be drawn and never executed to the end or to a fault.</summary>
    public List<Code> Never { get; } = [];

    /// <summary>First difference of each code, at most <see cref="DifferentialFuzzer.MaxDifferences"/>.</summary>
    public Dictionary<Code, string> Differences { get; } = [];

    public long DifferenceCount { get; set; }
}

/// <summary>
/// Runs the same programs on the host processor and on the software processor and compares everything that is defined:
/// general registers, flags, RIP, exception vector, error code and fault address, x87, SSE and AVX state, memory.
/// </summary>
internal sealed unsafe class DifferentialFuzzer : IDisposable
{
    /// <summary>How many differing codes are kept in full.</summary>
    public const int MaxDifferences = 400;

    private const int StatesPerProgram = 8;
    private const int Slots = (int)NativeCpu.CodeBytes / ProgramGenerator.SlotBytes;

    private readonly NativeCpu _native = new();
    private readonly SoftGuest _guest;
    private readonly NativeImage[] _result = new NativeImage[1];
    private readonly byte[] _before = new byte[NativeCpu.DataBytes];
    private readonly bool _is32Bit;
    private readonly bool _isTranslated;

    public DifferentialFuzzer(bool is32Bit, bool translate)
    {
        _is32Bit = is32Bit;
        _isTranslated = translate;
        _guest = new SoftGuest(_native.Exit64, _native.Exit32, translate);
    }

    /// <summary>Only codes that this accepts are drawn as a program's first instruction.</summary>
    public Func<Code, bool>? Filter { get; init; }

    /// <summary>Runs until a number of executions is reached.</summary>
    public FuzzReport Run(int seed, long executions)
    {
        var programs = new ProgramGenerator(seed, _is32Bit);
        var states = new StateGenerator((ulong)seed * 0x1234567);
        var random = new Random(seed);
        var report = new FuzzReport();
        var codes = new List<Code>();
        foreach (Code code in programs.Codes)
        {
            if (Filter is null || Filter(code))
            {
                codes.Add(code);
                report.PerCode[code] = 0;
            }
        }

        var batch = new List<TestProgram>();
        int next = 0;
        while (report.Executions < executions)
        {
            batch.Clear();
            ulong rip = NativeCpu.CodeBase;
            for (int slot = 0; slot < Slots; slot++, rip += ProgramGenerator.SlotBytes)
            {
                Code code = codes[next++ % codes.Count];
                TestProgram? program = programs.TryDraw(code, rip, random.Next(3) == 0 ? 1 + random.Next(4) : 1);
                if (program is not null)
                {
                    batch.Add(program);
                    _native.WriteProgram(rip, program.Bytes, _is32Bit);
                }
            }

            _guest.CopyCode();
            _guest.CodeChanged();
            foreach (TestProgram program in batch)
            {
                for (int i = 0; i < StatesPerProgram && report.Executions < executions; i++)
                {
                    Execute(program, ref states, report);
                }
            }
        }

        foreach ((Code code, long count) in report.PerCode)
        {
            if (count == 0)
            {
                report.Never.Add(code);
            }
        }

        return report;
    }

    public void Dispose()
    {
        _guest.Dispose();
        _native.Dispose();
    }

    private void Execute(TestProgram program, ref StateGenerator states, FuzzReport report)
    {
        if (report.Executions % StatesPerProgram == 0)
        {
            states.FillData(NativeCpu.Data);
        }

        states.Fill(_native.Input, program.Instructions, program.End, _is32Bit);
        _native.Input->Rip = program.Rip;
        ClearMisalignedMask(program);
        NativeCpu.Data.CopyTo(_before);
        NativeCpu.Data.CopyTo(_guest.Data);
        _native.Run(_is32Bit);
        fixed (NativeImage* result = _result)
        {
            bool cameBack = _guest.Run(_native.Input, result, _is32Bit);
            report.Executions++;
            report.Faults += _native.Output->Vector == NativeImage.NoFault ? 0 : 1;
            foreach (GeneratedInstruction item in program.Instructions)
            {
                Code code = item.Instruction.Code;
                report.PerCode[code] = report.PerCode.GetValueOrDefault(code) + 1;
            }

            if (!cameBack)
            {
                throw new InvalidOperationException($"the software processor did not come back from {program}: {_guest.Detail}");
            }

            HideMxcsrMask(program);
            var differences = new Comparison(_native.Input, _native.Output, result, program, _is32Bit, _isTranslated);
            if (!differences.AreEqual(NativeCpu.Data, _guest.Data))
            {
                report.DifferenceCount++;
                Code first = program.Instructions[0].Instruction.Code;
                if (report.Differences.Count < MaxDifferences && !report.Differences.ContainsKey(first))
                {
                    report.Differences[first] = differences.Describe(NativeCpu.Data, _guest.Data, _before);
                }
            }
        }
    }

    // The guest's MXCSR has no bit 17 (AMD's misaligned-exception mask), and FXSAVE's mask field says so.
    private void HideMxcsrMask(TestProgram program)
    {
        foreach (GeneratedInstruction item in program.Instructions)
        {
            if (item.Instruction.Mnemonic is Mnemonic.Fxsave or Mnemonic.Fxsave64
                && TryFind(item.Instruction, 30, out int at))
            {
                NativeCpu.Data[at] = _guest.Data[at];
            }
        }
    }

    // For the same reason an image with that bit is not offered to instructions that load MXCSR.
    private void ClearMisalignedMask(TestProgram program)
    {
        foreach (GeneratedInstruction item in program.Instructions)
        {
            int offset = item.Instruction.Mnemonic switch
            {
                Mnemonic.Ldmxcsr or Mnemonic.Vldmxcsr => 2,
                Mnemonic.Fxrstor or Mnemonic.Fxrstor64 => 26,
                _ => -1,
            };
            if (offset >= 0 && TryFind(item.Instruction, offset, out int at))
            {
                NativeCpu.Data[at] &= 0xFD;
            }
        }
    }

    private bool TryFind(in Instruction instruction, int offset, out int at)
    {
        ulong address = instruction.GetVirtualAddress(0, 0, (register, _, _) => register switch
        {
            Register.GS => NativeCpu.GsBase,
            _ when register.IsGPR32() => (uint)_native.Input->Gpr[register.GetNumber()],
            _ when register.IsGPR64() => _native.Input->Gpr[register.GetNumber()],
            _ => 0,
        });
        at = (int)(address - NativeCpu.DataBase) + offset;
        return (uint)at < NativeCpu.DataBytes;
    }

    private readonly ref struct Comparison
    {
        private readonly NativeImage* _input;
        private readonly NativeImage* _native;
        private readonly NativeImage* _soft;
        private readonly TestProgram _program;
        private readonly ulong _flags;
        private readonly int _registers;

        public Comparison(
            NativeImage* input, NativeImage* native, NativeImage* soft, TestProgram program, bool is32Bit,
            bool isTranslated)
        {
            _input = input;
            _native = native;
            _soft = soft;
            _program = program;
            _registers = is32Bit ? 8 : 16;

            // RF is set in the image of most faults and not in that of a program's end.
            const ulong Compared = 0x254FD5;
            _flags = Compared & ~program.UndefinedFlags;

            // Translated code does not keep flags that are overwritten behind the instruction that faults.
            _flags &= isTranslated && native->Vector != NativeImage.NoFault ? ~Rflags.Arithmetic : ulong.MaxValue;
        }

        public bool AreEqual(ReadOnlySpan<byte> nativeData, ReadOnlySpan<byte> softData)
        {
            for (int i = 0; i < _registers; i++)
            {
                if (Gpr(_native, i) != Gpr(_soft, i))
                {
                    return false;
                }
            }

            // An address that segment base and wrap-around make canonical only just: processors differ.
            bool isBorder = _native->Vector == 13 && _soft->Vector == 14 && (long)_soft->Cr2 < 0;
            if ((_native->Vector != _soft->Vector && !isBorder) || ((_native->Rflags ^ _soft->Rflags) & _flags) != 0)
            {
                return false;
            }

            if (_native->Vector != NativeImage.NoFault && !isBorder && !SameFault())
            {
                return false;
            }

            return SameVectors() && nativeData.SequenceEqual(softData);
        }

        public string Describe(ReadOnlySpan<byte> nativeData, ReadOnlySpan<byte> softData, ReadOnlySpan<byte> before)
        {
            var text = new StringBuilder();
            text.Append(_program.ToString());
            if (_native->Vector != _soft->Vector)
            {
                text.Append($"\n    vector {Name(_native->Vector)} != {Name(_soft->Vector)}");
            }
            else if (_native->Vector != NativeImage.NoFault)
            {
                text.Append($"\n    both fault {_native->Vector}");
                text.Append($" rip {_native->Rip:x}/{_soft->Rip:x} error {_native->ErrorCode:x}/{_soft->ErrorCode:x}");
                text.Append($" cr2 {_native->Cr2:x}/{_soft->Cr2:x}");
            }

            if (((_native->Rflags ^ _soft->Rflags) & _flags) != 0)
            {
                text.Append($"\n    flags {_input->Rflags:x} -> {_native->Rflags & _flags:x} != ");
                text.Append($"{_soft->Rflags & _flags:x}");
            }

            for (int i = 0; i < _registers; i++)
            {
                if (Gpr(_native, i) != Gpr(_soft, i))
                {
                    text.Append($"\n    gpr{i} {Gpr(_input, i):x} -> {Gpr(_native, i):x} != {Gpr(_soft, i):x}");
                }
            }

            DescribeBytes(text, "xsave", _input->Xsave, _native->Xsave, _soft->Xsave, XsaveEnd);
            fixed (byte* b = before)
            fixed (byte* n = nativeData)
            fixed (byte* s = softData)
            {
                DescribeBytes(text, "data", b, n, s, (int)NativeCpu.DataBytes);
            }

            text.Append($"\n    in: flags {_input->Rflags:x} gpr");
            for (int i = 0; i < _registers; i++)
            {
                text.Append($" {Gpr(_input, i):x}");
            }

            text.Append($" fcw {*(ushort*)_input->Xsave:x} fsw {*(ushort*)(_input->Xsave + 2):x}");
            text.Append($" ftw {_input->Xsave[4]:x} mxcsr {*(uint*)(_input->Xsave + 24):x}");
            return text.ToString();
        }

        private const int XsaveEnd = NativeImage.XsaveBytes;

        private static string Name(ulong vector) =>
            vector == NativeImage.NoFault ? "none" : vector.ToString(System.Globalization.CultureInfo.InvariantCulture);

        private ulong Gpr(NativeImage* image, int i) => _registers == 8 ? (uint)image->Gpr[i] : image->Gpr[i];

        private bool SameFault()
        {
            // Linux sets the protection bit in what it reports for addresses of the kernel's half.
            bool isKernel = (long)_native->Cr2 < 0 || _native->Cr2 - SoftGuest.KernelBase < SoftGuest.KernelBytes;
            ulong hidden = _native->Vector == 14 && isKernel ? 1UL : 0;
            return _native->Rip == _soft->Rip && (_native->ErrorCode | hidden) == (_soft->ErrorCode | hidden) &&
                (_native->Vector != 14 || _native->Cr2 - _soft->Cr2 + Slack() <= 2 * Slack());
        }

        // Instructions that move more than a register touch memory in an order of their own: any of their bytes will do.
        private ulong Slack()
        {
            Instruction last = _program.Instructions[^1].Instruction;
            foreach (GeneratedInstruction item in _program.Instructions)
            {
                last = item.Instruction.IP == _native->Rip ? item.Instruction : last;
            }

            return last.MemorySize is MemorySize.FpuEnv14 or MemorySize.FpuEnv28 or MemorySize.FpuState94
                or MemorySize.FpuState108 or MemorySize.Fxsave_512Byte or MemorySize.Fxsave64_512Byte ||
                last.Mnemonic is Mnemonic.Maskmovdqu or Mnemonic.Vmaskmovdqu or Mnemonic.Maskmovq
                    ? 512UL
                    : 0;
        }

        private bool SameVectors()
        {
            for (int i = 0; i < XsaveEnd; i += 8)
            {
                ulong mask = i == 24 ? Mask(i) & ~HiddenPrecision() : Mask(i);
                if (((*(ulong*)(_native->Xsave + i) ^ *(ulong*)(_soft->Xsave + i)) & mask) != 0)
                {
                    return false;
                }
            }

            return true;
        }

        // PE beside an unmasked overflow or underflow: see VectorUnit.RunCareful.
        private ulong HiddenPrecision()
        {
            uint mxcsr = *(uint*)(_native->Xsave + 24);
            uint unmasked = mxcsr & ~(mxcsr >> 7) & 0x18;

            // Dot products compute in steps and stop at the first that raises something.
            bool hasSteps = Array.Exists(
                [.. _program.Instructions], item => item.Instruction.Mnemonic is Mnemonic.Dpps or Mnemonic.Dppd
                    or Mnemonic.Vdpps or Mnemonic.Vdppd);
            ulong hidden = unmasked != 0 ? 0x20UL : 0;
            return _native->Vector != 19 ? 0 : hasSteps ? 0x3F : hidden;
        }

        // FOP, FIP and FDP differ between makers of processors and are tested on their own; MXCSR_MASK, the bytes above an
        // x87 register's 80 bits, the area for software and the header are not state.
        private static ulong Mask(int offset) => offset switch
        {
            0 => 0x0000_00FF_FFFF_FFFF,
            8 or 16 => 0,
            24 => 0xFFFF_FFFF,
            >= 32 and < 160 => (offset & 8) == 0 ? ulong.MaxValue : 0xFFFF,
            >= 160 and < 416 => ulong.MaxValue,
            >= 576 => ulong.MaxValue,
            _ => 0,
        };

        private static void DescribeBytes(
            StringBuilder text, string what, byte* before, byte* native, byte* soft, int length)
        {
            int shown = 0;
            for (int i = 0; i < length && shown < 6; i += 8)
            {
                ulong mask = what == "xsave" ? Mask(i) : ulong.MaxValue;
                ulong n = *(ulong*)(native + i) & mask;
                ulong s = *(ulong*)(soft + i) & mask;
                if (n != s)
                {
                    text.Append($"\n    {what}+{i} {*(ulong*)(before + i) & mask:x} -> {n:x} != {s:x}");
                    shown++;
                }
            }
        }
    }
}

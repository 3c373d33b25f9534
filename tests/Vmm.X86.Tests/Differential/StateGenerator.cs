// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Iced.Intel;

namespace Vmm.X86.Tests.Differential;

/// <summary>A small deterministic generator (splitmix64): the state filler draws hundreds of words per execution.</summary>
internal struct Draw
{
    private ulong _state;

    public Draw(ulong seed) => _state = seed;

    public ulong Next()
    {
        ulong z = _state += 0x9E3779B97F4A7C15;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }

    public int Next(int limit) => (int)((uint)Next() * (ulong)limit >> 32);

    public bool OneIn(int n) => Next(n) == 0;
}

/// <summary>
/// Fills registers and memory with values that make instructions interesting (extremes, NaNs, denormals, infinities,
/// unnormal x87 operands, partly masked exceptions) and steers memory operands into the arena.
/// </summary>
internal unsafe struct StateGenerator
{
    private static readonly uint[] s_singles =
    [
        0, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x7F800001, 0x7FA00000,
        0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0x4F000000, 0xCF000000, 0x5F000000, 0x3F000000, 0x40490FDB,
        0x4EFFFFFF, 0x33800000, 0x47000000, 0x37000000, 0x477FF000,
    ];

    private static readonly ulong[] s_doubles =
    [
        0, 0x8000000000000000, 0x3FF0000000000000, 0xBFF0000000000000, 0x7FF0000000000000, 0xFFF0000000000000,
        0x7FF8000000000000, 0xFFF8000000000001, 0x7FF0000000000001, 0x7FF4000000000000, 1, 0x800FFFFFFFFFFFFF,
        0x0010000000000000, 0x7FEFFFFFFFFFFFFF, 0x41E0000000000000, 0xC1E0000000000000, 0x43E0000000000000,
        0x3FE0000000000000, 0x400921FB54442D18, 0x41DFFFFFFFC00000, 0x3810000000000000, 0x47EFFFFFE0000000,
        0x36A0000000000000,
    ];

    private static readonly ushort[] s_exponents =
        [0, 1, 2, 0x3FFF, 0x3FFE, 0x4000, 0x7FFF, 0x7FFE, 0x3C01, 0x43FE, 0x3F81, 0x407E, 0x401E, 0x403E, 0x3BCD];

    private static readonly ulong[] s_significands =
        [0, 1, 1UL << 63, 3UL << 62, ulong.MaxValue, (1UL << 63) | 1, 1UL << 62, 0x8000000000000400, 0xA000000000000001];

    private Draw _draw;

    public StateGenerator(ulong seed) => _draw = new Draw(seed);

    /// <summary>Fills the arena.</summary>
    public void FillData(Span<byte> data)
    {
        fixed (byte* bytes = data)
        {
            var words = (ulong*)bytes;
            for (int i = 0; i < data.Length / 8; i++)
            {
                words[i] = Lane();
            }
        }
    }

    /// <summary>Fills all registers but RIP.</summary>
    public void Fill(NativeImage* image, IReadOnlyList<GeneratedInstruction> program, ulong target, bool is32Bit)
    {
        for (int i = 0; i < 16; i++)
        {
            image->Gpr[i] = is32Bit ? (uint)Integer() : Integer();
        }

        image->Gpr[4] = NativeCpu.DataBase + 0x800 + (ulong)(_draw.Next(0x80) * 8) + (_draw.OneIn(16) ? 3UL : 0);
        const ulong Arithmetic = 0x8D5;
        image->Rflags = (_draw.Next() & Arithmetic) | 0x202 | (_draw.OneIn(4) ? 0x400UL : 0)
            | (_draw.OneIn(24) ? 0x40000UL : 0);
        FillVector(image);
        foreach (GeneratedInstruction item in program)
        {
            Steer(image, item, target, is32Bit);
        }

        if (is32Bit)
        {
            for (int i = 0; i < 8; i++)
            {
                image->Gpr[i] = (uint)image->Gpr[i];
            }

            for (int i = 8; i < 16; i++)
            {
                image->Gpr[i] = 0;
            }
        }
    }

    private void FillVector(NativeImage* image)
    {
        byte* x = image->Xsave;
        new Span<byte>(x, NativeImage.XsaveBytes).Clear();
        ushort fcw = (ushort)(0x40 | (_draw.Next() & 0xF00) | (_draw.OneIn(6) ? _draw.Next() & 0x3F : 0x3F));
        bool flagged = _draw.OneIn(3);
        ushort fsw = (ushort)(_draw.Next() & (flagged ? 0x7F7Fu : 0x7F00));
        if ((fsw & ~fcw & 0x3F) != 0)
        {
            if (_draw.OneIn(2))
            {
                fsw |= 0x8080;
            }
            else
            {
                fsw &= 0x7F00;
            }
        }

        *(ushort*)x = fcw;
        *(ushort*)(x + 2) = fsw;
        int some = _draw.OneIn(2) ? 0xFF : 0x0F << ((fsw >> 11) & 7);
        x[4] = (byte)(_draw.OneIn(3) ? _draw.Next(256) : some);
        uint mxcsr = (uint)(_draw.OneIn(4) ? _draw.Next() & 0xE040 : _draw.Next() & 0x6000);
        mxcsr |= (uint)(_draw.OneIn(6) ? _draw.Next() & 0x1F80 : 0x1F80);
        mxcsr |= (uint)(_draw.OneIn(3) ? _draw.Next() & 0x3F : 0);
        *(uint*)(x + 24) = mxcsr;
        for (int i = 0; i < 8; i++)
        {
            *(ulong*)(x + 32 + (16 * i)) = _draw.OneIn(3) ? Lane() : _draw.OneIn(3) ? Pick(s_significands)
                : _draw.Next() | (1UL << 63);
            ulong exponent = _draw.OneIn(2) ? (ulong)(0x3FFF + _draw.Next(140) - 70)
                : _draw.OneIn(8) ? _draw.Next() : s_exponents[_draw.Next(s_exponents.Length)];
            *(ushort*)(x + 40 + (16 * i)) = (ushort)(exponent | (_draw.OneIn(2) ? 0x8000u : 0));
        }

        for (int i = 0; i < 32; i++)
        {
            ((ulong*)(x + 160))[i] = Lane();
            ((ulong*)(x + 576))[i] = Lane();
        }

        *(ulong*)(x + 512) = 7;
    }

    private void Steer(NativeImage* image, GeneratedInstruction item, ulong target, bool is32Bit)
    {
        Instruction ins = item.Instruction;
        switch (ins.Mnemonic)
        {
            case Mnemonic.Ret:
                {
                    ulong top = image->Gpr[4] & ~7UL;
                    image->Gpr[4] = top;
                    WriteStack(top, target, is32Bit);
                    return;
                }

            case Mnemonic.Jmp or Mnemonic.Call when ins.OpCount == 1 && ins.Op0Kind == OpKind.Register:
                if (ins.Op0Register.GetSize() >= 4 && ins.Op0Register.GetNumber() != 4)
                {
                    image->Gpr[ins.Op0Register.GetNumber()] = target;
                }

                return;
            case Mnemonic.Leave:
                image->Gpr[5] = NativeCpu.DataBase + 0x900 + (ulong)(_draw.Next(64) * 8);
                return;
            case Mnemonic.Enter:
                image->Gpr[5] = NativeCpu.DataBase + 0xC00 + (ulong)(_draw.Next(64) * 8);
                return;
            case Mnemonic.Maskmovdqu or Mnemonic.Vmaskmovdqu or Mnemonic.Maskmovq:
                image->Gpr[7] = DataAddress(16);
                return;
        }

        if (ins.Mnemonic is Mnemonic.Shld or Mnemonic.Shrd)
        {
            // A count above the operand's size has undefined results.
            image->Gpr[1] &= ~0x10UL;
        }

        if (ins.IsStringInstruction)
        {
            image->Gpr[6] = DataAddress(128);
            image->Gpr[7] = DataAddress(128);
            if (ins.HasRepPrefix || ins.HasRepnePrefix)
            {
                image->Gpr[1] = (ulong)_draw.Next(20);
            }

            return;
        }

        if (ins.Mnemonic is Mnemonic.Bt or Mnemonic.Bts or Mnemonic.Btr or Mnemonic.Btc
            && ins.Op0Kind == OpKind.Memory && ins.Op1Kind == OpKind.Register)
        {
            ulong bit = (ulong)(long)_draw.Next(2000) - 1000;
            Register register = ins.Op1Register;
            ref ulong gpr = ref image->Gpr[register.GetNumber()];
            gpr = register.GetSize() == 2 ? (gpr & ~0xFFFFUL) | (bit & 0xFFFF) : bit;
        }

        if (item.Memory is not { } memory)
        {
            return;
        }

        int size = Math.Max(memory.SizeBytes, 1);
        ulong wanted = DataAddress(size);
        bool needsAlignment = size >= 16 && !_draw.OneIn(8);
        if (needsAlignment)
        {
            wanted &= ~63UL;
        }
        else if (!_draw.OneIn(3))
        {
            wanted &= ~(ulong)(Math.Min(size, 16) - 1 & 0xF);
        }

        if (ins.OpCount == 1 && ins.Mnemonic is Mnemonic.Jmp or Mnemonic.Call)
        {
            WriteStack(wanted, target, is32Bit);
        }

        wanted -= memory.UsesGs ? NativeCpu.GsBase : 0;
        if (memory.IsVsib)
        {
            SteerVsib(image, memory, ref wanted);
        }
        else if (memory.Index != Register.None && memory.Base != Register.None)
        {
            ulong index = image->Gpr[memory.Index.GetNumber()];
            wanted -= index * (ulong)memory.Scale;
        }

        if (memory.Base != Register.None)
        {
            wanted -= memory.Displacement;
            bool narrow = memory.Base.GetSize() == 4;
            image->Gpr[memory.Base.GetNumber()] = narrow ? (uint)wanted | (_draw.Next() << 32) : wanted;
        }
    }

    private void SteerVsib(NativeImage* image, in SteeredOperand memory, ref ulong wanted)
    {
        int number = memory.Index.GetNumber();
        for (int half = 0; half < 2; half++)
        {
            var lanes = (uint*)(image->Xsave + (half == 0 ? 160 : 576) + (16 * number));
            for (int i = 0; i < 4; i++)
            {
                // As a quadword index every other lane is an upper half: small positive or sign extension.
                lanes[i] = (uint)(_draw.Next(33) - 16);
                if ((i & 1) != 0 && _draw.OneIn(2))
                {
                    lanes[i] = (int)lanes[i - 1] < 0 ? uint.MaxValue : 0;
                }
            }
        }

        wanted = NativeCpu.DataBase + 0x400 + (ulong)_draw.Next(256) - (memory.UsesGs ? NativeCpu.GsBase : 0);
    }

    private static void WriteStack(ulong at, ulong value, bool is32Bit)
    {
        if (at < NativeCpu.DataBase || at > NativeCpu.DataBase + NativeCpu.DataBytes - 8)
        {
            return;
        }

        if (is32Bit)
        {
            *(uint*)at = (uint)value;
        }
        else
        {
            *(ulong*)at = value;
        }
    }

    private ulong DataAddress(int size)
    {
        // Mostly inside, sometimes across the page border in the middle, rarely across the end.
        int limit = (int)NativeCpu.DataBytes;
        int at = _draw.Next(24) switch
        {
            0 => limit - _draw.Next(size + 8),
            1 or 2 => (limit / 2) - _draw.Next(size + 1),
            _ => 256 + _draw.Next(limit - 512 - Math.Min(size, 1024)),
        };
        return NativeCpu.DataBase + (ulong)at;
    }

    private ulong Integer() => _draw.Next(8) switch
    {
        0 => (ulong)_draw.Next(4),
        1 => 0UL - (ulong)_draw.Next(4),
        2 => 1UL << _draw.Next(64),
        3 => (1UL << _draw.Next(64)) - 1,
        4 => (ulong)_draw.Next(256),
        5 => 0x8000000080008080UL >> (8 * _draw.Next(8)),
        _ => _draw.Next(),
    };

    private ulong Lane() => _draw.Next(8) switch
    {
        0 or 1 => s_doubles[_draw.Next(s_doubles.Length)],
        2 or 3 => s_singles[_draw.Next(s_singles.Length)] | ((ulong)s_singles[_draw.Next(s_singles.Length)] << 32),
        4 => Integer(),
        5 => BitConverter.DoubleToUInt64Bits((_draw.Next(2000) - 1000) / 8.0),
        6 => BitConverter.SingleToUInt32Bits((_draw.Next(2000) - 1000) / 8f)
            | ((ulong)BitConverter.SingleToUInt32Bits(_draw.Next(70000)) << 32),
        _ => _draw.Next(),
    };

    private ulong Pick(ulong[] values) => values[_draw.Next(values.Length)];
}

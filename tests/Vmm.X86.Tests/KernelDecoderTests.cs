// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Runtime.CompilerServices;
using FluentAssertions;
using Iced.Intel;
using Vmm.TestKit;

namespace Vmm.X86.Tests;

/// <summary>The decoder of the kernel module (kmod/core/vmk_decode.c) against Iced's view of the same bytes. What it
/// decodes at all, it must decode like Iced: a wrong length or operand there would corrupt a guest.</summary>
public sealed class KernelDecoderTests
{
    private const int NoRegister = 255;
    private const int RipRegister = 254;

    private static readonly Mnemonic[] s_alu =
        [Mnemonic.Add, Mnemonic.Or, Mnemonic.Adc, Mnemonic.Sbb, Mnemonic.And, Mnemonic.Sub, Mnemonic.Xor, Mnemonic.Cmp];

    private static readonly Mnemonic[] s_bit = [Mnemonic.Bt, Mnemonic.Bts, Mnemonic.Btr, Mnemonic.Btc];

    private static readonly Mnemonic[] s_stos = [Mnemonic.Stosb, Mnemonic.Stosw, Mnemonic.Stosd, Mnemonic.Stosq];
    private static readonly Mnemonic[] s_movs = [Mnemonic.Movsb, Mnemonic.Movsw, Mnemonic.Movsd, Mnemonic.Movsq];
    private static readonly Mnemonic[] s_lods = [Mnemonic.Lodsb, Mnemonic.Lodsw, Mnemonic.Lodsd, Mnemonic.Lodsq];

    [CompilerFact("stdint.h")]
    public void KernelDecoder_OnGeneratedBytes_AgreesWithIced()
    {
        var wrong = new List<string>();
        int compared = 0;
        foreach (string line in List().Split('\n', StringSplitOptions.RemoveEmptyEntries))
        {
            compared++;
            if (Difference(line) is { } difference && wrong.Count < 20)
            {
                wrong.Add($"{line}: {difference}");
            }
        }

        wrong.Should().BeEmpty();
        compared.Should().Be(90000);
    }

    private static string? Difference(string line)
    {
        string[] words = line.Split(' ');
        long[] number = Array.ConvertAll(words[2..], word => long.Parse(word, CultureInfo.InvariantCulture));
        int bits = int.Parse(words[0], CultureInfo.InvariantCulture);
        var decoder = Decoder.Create(bits, Convert.FromHexString(words[1]), DecoderOptions.NoInvalidCheck);
        decoder.Decode(out Instruction instruction);
        (long length, long op, long alu, long size, long @base, long index, long scale, long displacement) =
            (number[0], number[1], number[2], number[3], number[4], number[5], number[6], number[7]);
        // Of instructions without an operand of its own the kernel knows the length alone, and asks for it only after
        // the processor has taken one for valid.
        return op == 0 && instruction.IsInvalid ? null
            : instruction.Length != length ? $"Iced's length is {instruction.Length}"
            : !Names(op, alu, instruction.Mnemonic) ? $"Iced sees {instruction}"
            : op == 0 || size == 0 || IsString(op) ? null
            : instruction.MemorySize.GetSize() != size ? $"Iced's operand has {instruction.MemorySize.GetSize()} bytes"
            : Number(instruction.MemoryBase) != @base ? $"Iced's base is {instruction.MemoryBase}"
            : Number(instruction.MemoryIndex) != index ? $"Iced's index is {instruction.MemoryIndex}"
            : index != NoRegister && instruction.MemoryIndexScale != 1 << (int)scale
                ? $"Iced scales by {instruction.MemoryIndexScale}"
            : Wrap(Displacement(instruction), instruction) != Wrap(displacement, instruction)
                ? $"Iced's displacement is {Displacement(instruction):x}"
            : null;
    }

    private static bool IsString(long op) => op is >= 6 and <= 10;

    /// <summary>The numbers of enum vmk_op in kmod/core/vmk_decode.h.</summary>
    private static bool Names(long op, long alu, Mnemonic mnemonic) => op switch
    {
        0 => true,
        1 => mnemonic is Mnemonic.Mov or Mnemonic.Movnti,
        2 or 3 => mnemonic == Mnemonic.Mov,
        4 => mnemonic == Mnemonic.Movzx,
        5 => mnemonic is Mnemonic.Movsx or Mnemonic.Movsxd,
        6 => Array.IndexOf(s_stos, mnemonic) >= 0,
        7 => Array.IndexOf(s_movs, mnemonic) >= 0,
        8 => Array.IndexOf(s_lods, mnemonic) >= 0,
        9 => mnemonic is Mnemonic.Insb or Mnemonic.Insw or Mnemonic.Insd,
        10 => mnemonic is Mnemonic.Outsb or Mnemonic.Outsw or Mnemonic.Outsd,
        11 or 12 or 13 => mnemonic == s_alu[alu],
        14 or 15 => mnemonic == Mnemonic.Test,
        16 => mnemonic == Mnemonic.Xchg,
        17 => mnemonic == Mnemonic.Not,
        18 => mnemonic == Mnemonic.Neg,
        19 => mnemonic == Mnemonic.Inc,
        20 => mnemonic == Mnemonic.Dec,
        21 => mnemonic == s_bit[alu],
        22 => mnemonic == Mnemonic.Mov,
        23 => mnemonic == Mnemonic.Lmsw,
        24 => mnemonic == Mnemonic.Clts,
        _ => false,
    };

    private static long Number(Register register) => register switch
    {
        Register.None => NoRegister,
        Register.RIP or Register.EIP => RipRegister,
        _ => register.GetNumber(),
    };

    private static long Displacement(in Instruction instruction)
    {
        ulong value = instruction.MemoryDisplacement64;
        return (long)(instruction.IsIPRelativeMemoryOperand ? value - (ulong)instruction.Length : value);
    }

    /// <summary>An address wraps at its own size, so a displacement may be signed or not.</summary>
    private static long Wrap(long value, in Instruction instruction)
    {
        int size = instruction.MemoryBase != Register.None ? instruction.MemoryBase.GetSize()
            : instruction.MemoryIndex != Register.None ? instruction.MemoryIndex.GetSize()
            : instruction.MemoryDisplSize == 2 ? 2
            : instruction.MemoryDisplSize == 8 ? 8 : 4;
        return size switch { 2 => (ushort)value, 4 => (uint)value, _ => value };
    }

    private static string List([CallerFilePath] string here = "")
    {
        string top = Path.Combine(Path.GetDirectoryName(here)!, "..", "..");
        string directory = Directory.CreateTempSubdirectory("vmm-decode-").FullName;
        try
        {
            string program = Path.Combine(directory, "decode_list");
            CProgram.Execute("cc", "-O1", "-Wall", "-Wextra", "-Werror", $"-I{top}/kmod/include", $"-I{top}/kmod/core",
                "-o", program, $"{top}/tests/kmod/decode_list.c", $"{top}/kmod/core/vmk_decode.c");
            return CProgram.Execute(program);
        }
        finally
        {
            Directory.Delete(directory, recursive: true);
        }
    }
}

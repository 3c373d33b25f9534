// SPDX-License-Identifier: BSD-2-Clause
using System;
using Iced.Intel;

namespace Vmm.X86;

/// <summary>Properties of SIMD instructions that Iced's tables do not state.</summary>
internal static class SimdTraits
{
    // Mnemonic stems (without the VEX v) whose instructions depend on MXCSR or set its flags: SDM 1 E.4's lists.
    private static readonly string[] s_stems =
    [
        "ADDSS", "ADDSD", "ADDPS", "ADDPD", "SUBSS", "SUBSD", "SUBPS", "SUBPD", "MULSS", "MULSD", "MULPS", "MULPD",
        "DIVSS", "DIVSD", "DIVPS", "DIVPD", "SQRT", "MINSS", "MINSD", "MINPS", "MINPD", "MAXSS", "MAXSD", "MAXPS",
        "MAXPD", "CMPSS", "CMPSD", "CMPPS", "CMPPD", "COMIS", "UCOMIS", "CVT", "ROUND", "DPPS", "DPPD", "HADDP",
        "HSUBP", "ADDSUBP", "FMADD", "FMSUB", "FNMADD", "FNMSUB", "RCPS", "RCPP", "RSQRT",
    ];

    /// <summary>An escape opcode (D8 to DF) or WAIT.</summary>
    public static bool IsX87(in Instruction instruction)
    {
        OpCodeInfo opcode = instruction.OpCode;
        if (opcode.Encoding != EncodingKind.Legacy || opcode.Table != OpCodeTableKind.Normal)
        {
            return false;
        }

        uint first = opcode.OpCodeLength == 2 ? opcode.OpCode >> 8 : opcode.OpCode;
        return first is (>= 0xD8 and <= 0xDF) or 0x9B;
    }

    /// <summary>True when the instruction reads MXCSR's controls or may set its flags.</summary>
    public static bool UsesMxcsr(Mnemonic mnemonic)
    {
        string name = mnemonic.ToString().ToUpperInvariant();
        ReadOnlySpan<char> stem = name[0] == 'V' ? name.AsSpan(1) : name;
        foreach (string candidate in s_stems)
        {
            if (stem.StartsWith(candidate, StringComparison.Ordinal))
            {
                return true;
            }
        }

        return false;
    }
}

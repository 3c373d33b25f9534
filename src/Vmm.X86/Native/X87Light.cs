// SPDX-License-Identifier: BSD-2-Clause
using Iced.Intel;

namespace Vmm.X86;

// Loading and storing the whole x87 state costs hundreds of nanoseconds. Most instructions touch one or two registers, and
// when all exceptions are masked and no stack fault can occur, the rest of the state only has to be kept by hand: the
// light thunk loads those registers on the host's empty stack, runs the instruction under the guest's control word, and
// stores the result and the status word. Moves between registers and of 80-bit operands change no bit and need no FPU.
// X87.cs checks the conditions and falls back to the full thunk.

/// <summary>What a light thunk does with the result.</summary>
internal enum X87Result : byte
{
    /// <summary>There is no light thunk.</summary>
    NotLight,

    /// <summary>Condition codes or EFLAGS only.</summary>
    None,

    /// <summary>Replaces ST(0).</summary>
    Top,

    /// <summary>Replaces ST(i).</summary>
    Other,

    /// <summary>Pushed.</summary>
    Pushed,

    /// <summary>Stored to memory.</summary>
    Memory,
}

/// <summary>The light form of an x87 instruction; part of <see cref="Thunk"/>.</summary>
internal struct X87Light
{
    /// <summary>Where the result goes.</summary>
    public X87Result Result;

    /// <summary>ST(0) is an operand.</summary>
    public bool UsesTop;

    /// <summary>ST(<see cref="Other"/>) is an operand.</summary>
    public bool UsesOther;

    /// <summary>Number of the second register.</summary>
    public byte Other;

    /// <summary>How many registers are popped.</summary>
    public byte Pops;

    /// <summary>Condition code bits of the status word that the instruction defines.</summary>
    public ushort Conditions;

    private const ushort Rounding = 0x200;
    private const ushort AllConditions = 0x4700;

    /// <summary>Classifies.</summary>
    public static X87Light Of(in Instruction instruction)
    {
        X87Light light = default;
        bool hasMemory = false;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            hasMemory |= instruction.GetOpKind(i) == OpKind.Memory;
            if (instruction.GetOpKind(i) == OpKind.Register)
            {
                int number = instruction.GetOpRegister(i) - Register.ST0;
                if (number is > 0 and < 8)
                {
                    light.UsesOther = true;
                    light.Other = (byte)number;
                }
            }
        }

        light.Conditions = Rounding;
        light.UsesTop = true;
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Fadd or Mnemonic.Fsub or Mnemonic.Fsubr or Mnemonic.Fmul or Mnemonic.Fdiv or Mnemonic.Fdivr:
                bool isTop = hasMemory || instruction.Op0Register == Register.ST0;
                light.Result = isTop ? X87Result.Top : X87Result.Other;
                break;
            case Mnemonic.Faddp or Mnemonic.Fsubp or Mnemonic.Fsubrp or Mnemonic.Fmulp or Mnemonic.Fdivp
                or Mnemonic.Fdivrp:
                light.Result = light.UsesOther ? X87Result.Other : X87Result.NotLight;
                light.Pops = 1;
                break;
            case Mnemonic.Fiadd or Mnemonic.Fisub or Mnemonic.Fisubr or Mnemonic.Fimul or Mnemonic.Fidiv
                or Mnemonic.Fidivr or Mnemonic.Fchs or Mnemonic.Fabs or Mnemonic.Fsqrt or Mnemonic.Frndint:
                light.Result = X87Result.Top;
                break;
            case Mnemonic.Fcom or Mnemonic.Fucom or Mnemonic.Ficom or Mnemonic.Ftst or Mnemonic.Fxam:
                light.Result = X87Result.None;
                light.Conditions = AllConditions;
                break;
            case Mnemonic.Fcomp or Mnemonic.Fucomp or Mnemonic.Ficomp:
                light.Result = X87Result.None;
                light.Conditions = AllConditions;
                light.Pops = 1;
                break;
            case Mnemonic.Fcompp or Mnemonic.Fucompp:
                light.Result = X87Result.None;
                light.Conditions = AllConditions;
                light.UsesOther = true;
                light.Other = 1;
                light.Pops = 2;
                break;
            case Mnemonic.Fcomi or Mnemonic.Fucomi:
                light.Result = X87Result.None;
                light.Conditions = 0;
                break;
            case Mnemonic.Fcomip or Mnemonic.Fucomip:
                light.Result = X87Result.None;
                light.Conditions = 0;
                light.Pops = 1;
                break;
            case Mnemonic.Fld when hasMemory && instruction.Code != Code.Fld_m80fp:
            case Mnemonic.Fild or Mnemonic.Fld1 or Mnemonic.Fldz or Mnemonic.Fldpi or Mnemonic.Fldl2e
                or Mnemonic.Fldl2t or Mnemonic.Fldlg2 or Mnemonic.Fldln2:
                light.Result = X87Result.Pushed;
                light.UsesTop = false;
                break;
            case Mnemonic.Fst or Mnemonic.Fist when hasMemory:
                light.Result = X87Result.Memory;
                break;
            case Mnemonic.Fstp or Mnemonic.Fistp or Mnemonic.Fisttp when hasMemory && instruction.Code != Code.Fstp_m80fp:
                light.Result = X87Result.Memory;
                light.Pops = 1;
                break;
        }

        return light;
    }
}

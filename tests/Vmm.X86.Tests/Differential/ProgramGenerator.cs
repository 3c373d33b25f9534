// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Iced.Intel;

namespace Vmm.X86.Tests.Differential;

/// <summary>A test program: one to four instructions, and what of its outcome is defined.</summary>
internal sealed class TestProgram
{
    public required IReadOnlyList<GeneratedInstruction> Instructions { get; init; }

    public required byte[] Bytes { get; init; }

    /// <summary>Arithmetic flags that some instruction leaves undefined.</summary>
    public required ulong UndefinedFlags { get; init; }

    public ulong Rip { get; init; }

    public ulong End => Rip + (ulong)Bytes.Length;

    public override string ToString()
    {
        var lines = new List<string>();
        foreach (GeneratedInstruction item in Instructions)
        {
            lines.Add($"{Convert.ToHexString(item.Bytes)} {item.Instruction} ({item.Instruction.Code})");
        }

        return string.Join("; ", lines);
    }
}

/// <summary>Strings instructions together such that a memory operand's registers are not written before its use.</summary>
internal sealed class ProgramGenerator
{
    /// <summary>Bytes that a program and its final jump may take.</summary>
    public const int SlotBytes = 80;

    private readonly InstructionGenerator _instructions;
    private readonly InstructionInfoFactory _info = new();
    private readonly Random _random;
    private readonly List<Code> _codes;
    private readonly bool _is32Bit;

    public ProgramGenerator(int seed, bool is32Bit)
    {
        _random = new Random(seed);
        _is32Bit = is32Bit;
        _instructions = new InstructionGenerator(_random, is32Bit ? 32 : 64);
        _codes = _instructions.Codes();
    }

    public IReadOnlyList<Code> Codes => _codes;

    /// <summary>Draws a program that starts with <paramref name="first"/>, or null.</summary>
    public TestProgram? TryDraw(Code first, ulong rip, int length)
    {
        var items = new List<GeneratedInstruction>();
        var bytes = new List<byte>();
        var written = new HashSet<Register>();
        ulong undefined = 0;

        // The length is not known yet when a branch is drawn, so branches go to the end of the slot's first half, where
        // the final jump is repeated by padding: simplest is that a branch ends the program and targets its own end.
        for (int i = 0; i < length; i++)
        {
            Code code = i == 0 ? first : _codes[_random.Next(_codes.Count)];
            ulong at = rip + (ulong)bytes.Count;
            GeneratedInstruction? item = DrawOne(code, at);
            if (item is null)
            {
                if (i == 0)
                {
                    return null;
                }

                continue;
            }

            InstructionInfo info = _info.GetInfo(item.Instruction);
            if (i > 0 && !CanFollow(item, info, written, undefined))
            {
                continue;
            }

            items.Add(item);
            bytes.AddRange(item.Bytes);
            undefined |= Flags(item.Instruction.RflagsUndefined);
            if (item.Instruction.Mnemonic is Mnemonic.Rcl or Mnemonic.Rcr or Mnemonic.Rol or Mnemonic.Ror)
            {
                // OF is defined for a count of one alone (SDM 2B, RCL), whatever the count is modulo the size.
                const ulong Overflow = 0x800;
                undefined |= item.Instruction.Op1Kind == OpKind.Immediate8 && item.Instruction.Immediate8 == 1
                    ? 0 : Overflow;
            }
            foreach (UsedRegister used in info.GetUsedRegisters())
            {
                if (used.Access is not (OpAccess.Read or OpAccess.CondRead))
                {
                    written.Add(used.Register.GetFullRegister());
                }
            }

            // The count of a 16-bit double shift is kept below 16 by CL's value, which a follower might steer elsewhere,
            // and what FXSAVE stores differs in MXCSR_MASK, which a follower might read.
            bool standsAlone = item.Instruction.Code is Code.Shld_rm16_r16_CL or Code.Shrd_rm16_r16_CL
                or Code.Fxsave_m512byte or Code.Fxsave64_m512byte;
            if (item.Instruction.FlowControl != FlowControl.Next || standsAlone)
            {
                break;
            }
        }

        return new TestProgram
        {
            Instructions = items,
            Bytes = bytes.ToArray(),
            UndefinedFlags = undefined,
            Rip = rip,
        };
    }

    private GeneratedInstruction? DrawOne(Code code, ulong at)
    {
        // A direct branch goes to the instruction behind it; its length is known after a first encoding.
        GeneratedInstruction? item = _instructions.TryDraw(code, at, at + 8);
        if (item is not null && item.Instruction.OpCount > 0
            && item.Instruction.Op0Kind is OpKind.NearBranch64 or OpKind.NearBranch32)
        {
            item = _instructions.TryDraw(code, at, at + (ulong)item.Bytes.Length);
        }

        return item;
    }

    private static bool CanFollow(
        GeneratedInstruction item, in InstructionInfo info, HashSet<Register> written, ulong undefined)
    {
        if ((Flags(item.Instruction.RflagsRead) & undefined) != 0)
        {
            return false;
        }

        foreach (UsedMemory memory in info.GetUsedMemory())
        {
            if (written.Contains(memory.Base.GetFullRegister()) || written.Contains(memory.Index.GetFullRegister()))
            {
                return false;
            }
        }

        // Counts of string instructions, bit offsets and indirect targets are steered too; POP and friends move RSP.
        Instruction ins = item.Instruction;
        return !ins.IsStringInstruction && ins.FlowControl == FlowControl.Next && !ins.IsStackInstruction
            && ins.Mnemonic is not (Mnemonic.Fxsave or Mnemonic.Fxsave64 or Mnemonic.Fnsave or Mnemonic.Fnstenv
                or Mnemonic.Shld or Mnemonic.Shrd or Mnemonic.Bt or Mnemonic.Bts or Mnemonic.Btr or Mnemonic.Btc or Mnemonic.Enter
                or Mnemonic.Leave or Mnemonic.Maskmovq or Mnemonic.Maskmovdqu or Mnemonic.Vmaskmovdqu);
    }

    private static ulong Flags(RflagsBits bits)
    {
        ulong flags = 0;
        flags |= (bits & RflagsBits.CF) != 0 ? 1UL : 0;
        flags |= (bits & RflagsBits.PF) != 0 ? 4UL : 0;
        flags |= (bits & RflagsBits.AF) != 0 ? 0x10UL : 0;
        flags |= (bits & RflagsBits.ZF) != 0 ? 0x40UL : 0;
        flags |= (bits & RflagsBits.SF) != 0 ? 0x80UL : 0;
        flags |= (bits & RflagsBits.OF) != 0 ? 0x800UL : 0;
        return flags;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.X86;

/// <summary>Jumps, calls and returns.</summary>
internal static unsafe partial class ControlTransfer
{
    /// <summary>Terminator of blocks that end without a jump: its record's address is where to go on.</summary>
    public static Status EndOfBlock(CpuContext* cpu, Insn* insn)
    {
        cpu->Rip = Insn.Address(cpu, insn);
        cpu->InstructionCount--;
        return Status.NotTaken;
    }
}

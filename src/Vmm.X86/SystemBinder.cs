// SPDX-License-Identifier: BSD-2-Clause
using Iced.Intel;

namespace Vmm.X86;

/// <summary>The binder's part for system instructions.</summary>
internal static unsafe class SystemBinder
{
    public static bool Choose(SoftVcpu vcpu, in Instruction instruction, Insn* insn)
    {
        delegate*<CpuContext*, Insn*, Status> handler = Pick(instruction, insn);
        insn->Handler = handler;
        return handler != null;
    }

    private static delegate*<CpuContext*, Insn*, Status> Pick(in Instruction instruction, Insn* insn)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Hlt:
                return &SystemGroup.Hlt;
            case Mnemonic.Cli:
                return &SystemGroup.Cli;
            case Mnemonic.Sti:
                return &SystemGroup.Sti;
            case Mnemonic.Clac:
                return &SystemGroup.Clac;
            case Mnemonic.Stac:
                return &SystemGroup.Stac;
            case Mnemonic.Syscall:
                return &FarTransfer.Syscall;
            case Mnemonic.Sysret:
                insn->OperandSize = 4;
                return &FarTransfer.Sysret;
            case Mnemonic.Sysretq:
                insn->OperandSize = 8;
                return &FarTransfer.Sysret;
            case Mnemonic.Sysenter:
                return &FarTransfer.Sysenter;
            case Mnemonic.Sysexit:
            case Mnemonic.Sysexitq:
                return &FarTransfer.Sysexit;
            case Mnemonic.Cpuid:
                return &SystemGroup.Cpuid;
            case Mnemonic.Rdmsr:
                return &SystemGroup.Rdmsr;
            case Mnemonic.Wrmsr:
                return &SystemGroup.Wrmsr;
            case Mnemonic.Rdtsc:
                return &SystemGroup.Rdtsc;
            case Mnemonic.Rdtscp:
                return &SystemGroup.Rdtscp;
            case Mnemonic.Rdpid:
                return &SystemGroup.Rdpid;
            case Mnemonic.Rdpmc:
                return &SystemGroup.Rdpmc;
            case Mnemonic.Swapgs:
                return &SystemGroup.Swapgs;
            case Mnemonic.Rdfsbase:
                insn->R1 = Seg.Fs;
                return &SystemGroup.ReadBase;
            case Mnemonic.Rdgsbase:
                insn->R1 = Seg.Gs;
                return &SystemGroup.ReadBase;
            case Mnemonic.Wrfsbase:
                insn->R1 = Seg.Fs;
                return &SystemGroup.WriteBase;
            case Mnemonic.Wrgsbase:
                insn->R1 = Seg.Gs;
                return &SystemGroup.WriteBase;
            case Mnemonic.Rdpkru:
                return &SystemGroup.Rdpkru;
            case Mnemonic.Wrpkru:
                return &SystemGroup.Wrpkru;
            case Mnemonic.Lgdt:
                insn->OperandSize = TableSize(instruction);
                return &SystemGroup.Lgdt;
            case Mnemonic.Lidt:
                insn->OperandSize = TableSize(instruction);
                return &SystemGroup.Lidt;
            case Mnemonic.Sgdt:
                return &SystemGroup.Sgdt;
            case Mnemonic.Sidt:
                return &SystemGroup.Sidt;
            case Mnemonic.Lldt:
                return &SystemGroup.Lldt;
            case Mnemonic.Ltr:
                return &SystemGroup.Ltr;
            case Mnemonic.Sldt:
                return &SystemGroup.Sldt;
            case Mnemonic.Str:
                return &SystemGroup.Str;
            case Mnemonic.Smsw:
                return &SystemGroup.Smsw;
            case Mnemonic.Lmsw:
                return &SystemGroup.Lmsw;
            case Mnemonic.Clts:
                return &SystemGroup.Clts;
            case Mnemonic.Invlpg:
                return &SystemGroup.Invlpg;
            case Mnemonic.Invpcid:
                return &SystemGroup.Invpcid;
            case Mnemonic.Invd:
            case Mnemonic.Wbinvd:
            case Mnemonic.Wbnoinvd:
                return &SystemGroup.Wbinvd;
            case Mnemonic.Clflush:
            case Mnemonic.Clflushopt:
            case Mnemonic.Clwb:
                return &SystemGroup.Clflush;
            case Mnemonic.Pcommit:
                // Guest memory is not persistent: there is nothing to commit.
                return &Misc.Nop;
            case Mnemonic.Monitor:
                return &SystemGroup.Monitor;
            case Mnemonic.Mwait:
                return &SystemGroup.Mwait;
            case Mnemonic.Rdrand:
            case Mnemonic.Rdseed:
                return &SystemGroup.Rdrand;
            case Mnemonic.Lar:
                return &SystemGroup.Lar;
            case Mnemonic.Lsl:
                return &SystemGroup.Lsl;
            case Mnemonic.Verr:
                return &SystemGroup.Verr;
            case Mnemonic.Verw:
                return &SystemGroup.Verw;
            case Mnemonic.Arpl:
                return &SystemGroup.Arpl;
            default:
                return null;
        }
    }

    private static byte TableSize(in Instruction instruction) => instruction.Code switch
    {
        Code.Lgdt_m1632_16 or Code.Lidt_m1632_16 => 2,
        Code.Lgdt_m1632 or Code.Lidt_m1632 => 4,
        _ => 8,
    };
}

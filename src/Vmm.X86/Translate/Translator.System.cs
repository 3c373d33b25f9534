// SPDX-License-Identifier: BSD-2-Clause
using Iced.Intel;

namespace Vmm.X86;

// The system instructions that kernels execute all the time: PUSHFQ, CLI, STI (local_irq_save and friends), SYSCALL,
// SYSRET and SWAPGS, STAC and CLAC around copies from and to users, the time stamp counter, reads of control registers.
// They are in line in the frequent case; otherwise the handler decides.
internal sealed unsafe partial class Translator
{
    private void EmitPushf()
    {
        FreeFlagsForExit();
        CollectFlags();
        Probe(new HostMemory(Host.GuestRsp, -8), 8, write: true, 1);
        StorePushed(Host.T0);
    }

    // T0 = RFLAGS without RF and VM, from FlagImage, where AH has SF ZF AF PF CF at their places and AL has OF.
    private void CollectFlags()
    {
        _e.LoadWord(Host.T0, HostMemory.Context(Offsets.FlagImage));
        _e.Move32(Host.T1, Host.T0);
        _e.Shift(5, Host.T0, 8);
        _e.AluImmediate(AluOp.And, Host.T0, 0xD5, wide: false);
        _e.AluImmediate(AluOp.And, Host.T1, 1, wide: false);
        _e.Shift(4, Host.T1, 11);
        _e.Alu(AluOp.Or, Host.T0, Host.T1);
        _e.Alu(AluOp.Or, Host.T0, HostMemory.Context(Offsets.RflagsSystem));
        _e.AluImmediate(AluOp.And, Host.T0, unchecked((int)~(uint)(Rflags.Rf | Rflags.Vm)));
    }

    // What FarTransfer.Syscall does in 64-bit mode, with what FastCalls has prepared. Vector and x87 state stay loaded.
    // Nothing can be due behind it that was not due before it: interrupts are masked or stay as they are, and the probe
    // looks at requests.
    private void EmitSyscall()
    {
        FreeFlagsForExit();
        _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.CallsReady), 0);
        SlowJump(_e.JumpIf(HostCondition.Equal));
        CollectFlags();
        _e.Move(Host.R11, Host.T0);
        _e.Load(Host.T0, HostMemory.Context(Offsets.CodeBase));
        _e.Lea(Host.Rcx, new HostMemory(Host.T0, EndOffset + PageOffset));
        _e.Load(Host.T0, HostMemory.Context(Offsets.RflagsSystem));
        _e.Alu(AluOp.And, Host.T0, HostMemory.Context(Offsets.CallsKeepSystem));
        _e.Store(HostMemory.Context(Offsets.RflagsSystem), Host.T0);
        _e.Load(Host.T0, HostMemory.Context(Offsets.FlagImage));
        _e.Alu(AluOp.And, Host.T0, HostMemory.Context(Offsets.CallsKeepImage));
        _e.Store(HostMemory.Context(Offsets.FlagImage), Host.T0);
        LoadFlat(Seg.Cs, Offsets.CallsKernelCs, FastCalls.KernelCode);
        LoadFlat(Seg.Ss, Offsets.CallsKernelSs, FastCalls.KernelData);
        EnterLevel(0, FastCalls.KernelKey | (_block->Key & BlockKey.La57), Offsets.CallsKernelTlb, Offsets.GlobalAsid);
        _e.StoreWord(HostMemory.Context(Offsets.BranchTag), Host.T0);
        _e.Load(Host.T0, HostMemory.Context(Offsets.Lstar));
        EmitBranchProbe(-1, 0);
    }

    // What FarTransfer.Sysret does in 64-bit mode at level 0. The handler decides when an interrupt may be waiting for
    // IF, when a flag is loaded that stops translated code, and when RCX is not canonical.
    private void EmitSysret()
    {
        if ((_block->Key & BlockKey.User) != 0)
        {
            CallHandler();
            return;
        }

        FreeFlagsForExit();
        _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.CallsReady), 0);
        SlowJump(_e.JumpIf(HostCondition.Equal));
        _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.Cpl), 0);
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.InterruptHint), 0);
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        _e.TestImmediate32(Host.R11, (int)(Rflags.Tf | Rflags.Ac));
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        SlowJumpUnlessCanonical(Host.Rcx, Host.T0);

        const ulong loaded = 0x3FFFFF & ~(Rflags.Rf | Rflags.Vm | Rflags.Arithmetic);
        _e.Move32(Host.T0, Host.R11);
        _e.AluImmediate(AluOp.And, Host.T0, (int)loaded, wide: false);
        _e.AluImmediate(AluOp.Or, Host.T0, (int)Rflags.Fixed, wide: false);
        _e.Store(HostMemory.Context(Offsets.RflagsSystem), Host.T0);
        _e.Move32(Host.T0, Host.R11);
        _e.Move32(Host.T1, Host.R11);
        _e.AluImmediate(AluOp.And, Host.T0, 0xD5, wide: false);
        _e.Shift(4, Host.T0, 8);
        _e.Shift(5, Host.T1, 11);
        _e.AluImmediate(AluOp.And, Host.T1, 1, wide: false);
        _e.Alu(AluOp.Or, Host.T0, Host.T1);
        _e.Store(HostMemory.Context(Offsets.FlagImage), Host.T0);
        LoadFlat(Seg.Cs, Offsets.CallsUserCs, FastCalls.UserCode);
        LoadFlat(Seg.Ss, Offsets.CallsUserSs, FastCalls.UserData);
        EnterLevel(3, FastCalls.UserKey | (_block->Key & BlockKey.La57), Offsets.CallsUserTlb, Offsets.SpaceAsid);
        _e.AluImmediate(AluOp.Or, Host.T0, SoftVcpu.UserTag, wide: false);
        _e.StoreWord(HostMemory.Context(Offsets.BranchTag), Host.T0);
        _e.Move(Host.T0, Host.Rcx);
        EmitBranchProbe(-1, 0);
    }

    // Level, mode key, TLB and its tag, the last two from the context. Leaves the tag in T0.
    private void EnterLevel(int cpl, uint modeKey, int tlb, int asid)
    {
        _e.StoreImmediate32(HostMemory.Context(Offsets.Cpl), cpl);
        _e.StoreImmediate32(HostMemory.Context(Offsets.ModeKey), (int)modeKey);
        _e.Load(Host.T0, HostMemory.Context(tlb));
        _e.Store(HostMemory.Context(Offsets.Tlb), Host.T0);
        _e.Load(Host.T0, HostMemory.Context(asid));
        _e.Store(HostMemory.Context(Offsets.TlbAsid), Host.T0);
    }

    // A segment register with a selector from the context and a flat segment. Destroys T0.
    private void LoadFlat(int segment, int selector, ulong limitAndRights)
    {
        int at = CpuContext.SegmentsOffset + (segment * 32);
        _e.StoreImmediate(HostMemory.Context(at), 0);
        _e.StoreImmediate(HostMemory.Context(at + 8), 0);
        _e.MoveImmediate64(Host.T0, limitAndRights);
        _e.Store(HostMemory.Context(at + 16), Host.T0);
        _e.Load(Host.T0, HostMemory.Context(selector));
        _e.Store(HostMemory.Context(at + 24), Host.T0);
    }

    private void EmitCli()
    {
        FreeFlags();
        _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.Cpl), 0);
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        _e.AluImmediate32(AluOp.And, HostMemory.Context(Offsets.RflagsSystem), ~(int)Rflags.If);
    }

    // In line while the interrupt controllers have nothing to deliver: then nobody can see that STI holds interrupts back
    // for one instruction, provided that no poll comes in between (STI; HLT must not lose a wake-up).
    private void EmitSti()
    {
        if (_at + 1 >= _count || _at + 1 == _poll)
        {
            CallHandler();
            return;
        }

        FreeFlags();
        _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.Cpl), 0);
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.InterruptHint), 0);
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        _e.AluImmediate32(AluOp.Or, HostMemory.Context(Offsets.RflagsSystem), (int)Rflags.If);
    }

    // Level 0 is not part of a block's key, level 3 is: nobody runs 64-bit code at levels 1 and 2, but it must fault there.
    private void EmitSwapgs()
    {
        const int gsBase = CpuContext.SegmentsOffset + (Seg.Gs * 32);
        if ((_block->Key & BlockKey.User) != 0)
        {
            CallHandler();
            return;
        }

        FreeFlags();
        _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.Cpl), 0);
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        _e.Load(Host.T0, HostMemory.Context(gsBase));
        _e.Load(Host.T1, HostMemory.Context(Offsets.KernelGsBase));
        _e.Store(HostMemory.Context(Offsets.KernelGsBase), Host.T0);
        _e.Store(HostMemory.Context(gsBase), Host.T1);
        _e.Store(HostMemory.Context(gsBase + 8), Host.T1);
    }

    // In line while there is a line from the host's counter to the guest's (TscSource.cs); the handler draws the next one,
    // and raises #GP where CR4.TSD forbids the instruction: then there never is one. RDTSCP waits for the instructions in
    // front of it, which LFENCE does for RDTSC.
    private void EmitRdtsc(in Instruction instruction)
    {
        FreeFlags();
        _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.TscLimit), 0, wide: true);
        SlowJump(_e.JumpIf(HostCondition.Equal));
        if (instruction.Code == Code.Rdtscp)
        {
            _e.Byte(0x0F);
            _e.Byte(0xAE);
            _e.Byte(0xE8);
        }

        _e.ReadTsc();
        _e.Shift(4, Host.Rdx, 32);
        _e.Alu(AluOp.Or, Host.Rax, Host.Rdx);
        _e.Alu(AluOp.Sub, Host.Rax, HostMemory.Context(Offsets.TscBase));
        _e.Alu(AluOp.Cmp, Host.Rax, HostMemory.Context(Offsets.TscLimit));
        SlowJump(_e.JumpIf(HostCondition.AboveOrEqual));
        _e.Multiply(Host.Rax, HostMemory.Context(Offsets.TscScale));
        _e.Shift(5, Host.Rax, 32);
        _e.Alu(AluOp.Add, Host.Rax, HostMemory.Context(Offsets.TscValue));
        _e.Move(Host.Rdx, Host.Rax);
        _e.Shift(5, Host.Rdx, 32);
        _e.Move32(Host.Rax, Host.Rax);
        if (instruction.Code == Code.Rdtscp)
        {
            _e.Load32(Host.Rcx, HostMemory.Context(Offsets.TscAux));
        }
    }

    // In line when it is the leaf that the handler executed last, unless that depends on a register (LastCpuid). It
    // serializes: who has seen a number that another vCPU stored behind a change of code must not go on in the old code
    // (SDM 3A 8.1.3), and the request for that was there before the number.
    private void EmitCpuid()
    {
        FreeFlags();
        _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.Request), 0);
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        _e.Move32(Host.T0, Host.Rax);
        _e.Move32(Host.T1, Host.Rcx);
        _e.Shift(4, Host.T1, 32);
        _e.Alu(AluOp.Or, Host.T0, Host.T1);
        _e.Alu(AluOp.Cmp, Host.T0, HostMemory.Context(Offsets.LastCpuid));
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        _e.Load32(Host.Rax, HostMemory.Context(Offsets.LastCpuid + LastCpuid.RegistersOffset));
        _e.Load32(Host.Rbx, HostMemory.Context(Offsets.LastCpuid + LastCpuid.RegistersOffset + 4));
        _e.Load32(Host.Rcx, HostMemory.Context(Offsets.LastCpuid + LastCpuid.RegistersOffset + 8));
        _e.Load32(Host.Rdx, HostMemory.Context(Offsets.LastCpuid + LastCpuid.RegistersOffset + 12));
    }

    private void EmitRdpkru()
    {
        FreeFlags();
        _e.Load32(Host.T0, HostMemory.Context(Offsets.Cr4));
        _e.TestImmediate32(Host.T0, (int)Cr4.Pke);
        SlowJump(_e.JumpIf(HostCondition.Equal));
        _e.Test32(Host.Rcx, Host.Rcx);
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        _e.Load32(Host.Rax, HostMemory.Context(Offsets.Pkru));
        _e.MoveImmediate(Host.Rdx, 0);
    }

    // CLD and STD. The host's direction flag stays clear.
    private void EmitDirection(in Instruction instruction)
    {
        FreeFlags();
        if (instruction.Code == Code.Cld)
        {
            _e.AluImmediate32(AluOp.And, HostMemory.Context(Offsets.RflagsSystem), ~(int)Rflags.Df);
        }
        else
        {
            _e.AluImmediate32(AluOp.Or, HostMemory.Context(Offsets.RflagsSystem), (int)Rflags.Df);
        }
    }

    private void EmitMoveFromControl(in Instruction instruction)
    {
        int offset = instruction.Op1Register switch
        {
            Register.CR0 => Offsets.Cr0,
            Register.CR2 => Offsets.Cr2,
            Register.CR3 => Offsets.Cr3,
            Register.CR4 => Offsets.Cr4,
            _ => 0,
        };
        if ((_block->Key & BlockKey.User) != 0 || offset == 0)
        {
            CallHandler();
            return;
        }

        int number = Number(instruction.Op0Register);
        int host = IsSpilled(number) ? Host.T0 : HostOf(number);
        FreeFlags();
        _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.Cpl), 0);
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        _e.Load(host, HostMemory.Context(offset));
        if (IsSpilled(number))
        {
            _e.Store(Slot(number), host);
        }
    }

    // STAC and CLAC choose between the two TLBs of the supervisor, and so between blocks. Where the block's own key says
    // that the flag is right already (CLAC at the kernel's entries), only the level is looked at. They end blocks.
    private void EmitAc(bool isSet)
    {
        if ((_block->Key & BlockKey.User) != 0)
        {
            CallHandler();
            return;
        }

        FreeFlagsForExit();
        _e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.Cpl), 0);
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        if (isSet == ((_block->Key & BlockKey.Ac) != 0))
        {
            ExitTo(EndOffset);
            return;
        }

        MmuMode mode = isSet ? MmuMode.SupervisorAc : MmuMode.Supervisor;
        _e.AluImmediate32(
            isSet ? AluOp.Or : AluOp.And,
            HostMemory.Context(Offsets.RflagsSystem),
            isSet ? (int)Rflags.Ac : ~(int)Rflags.Ac);
        _e.MoveImmediate64(Host.T0, (ulong)(_cpu->Tlbs + ((int)mode * TlbEntry.Count)));
        _e.Store(HostMemory.Context(Offsets.Tlb), Host.T0);
        _e.Load(Host.T0, HostMemory.Context(isSet ? Offsets.SpaceAsid : Offsets.GlobalAsid));
        _e.Store(HostMemory.Context(Offsets.TlbAsid), Host.T0);
        _e.StoreImmediate32(HostMemory.Context(Offsets.ModeKey), (int)(_block->Key ^ BlockKey.Ac));
        _e.LoadWord(Host.T0, HostMemory.Context(Offsets.BranchTag));
        _e.AluImmediate(AluOp.Xor, Host.T0, SoftVcpu.AcTag, wide: false);
        _e.StoreWord(HostMemory.Context(Offsets.BranchTag), Host.T0);
        _e.Load(Host.T0, HostMemory.Context(Offsets.CodeBase));
        _e.Lea(Host.T0, new HostMemory(Host.T0, EndOffset + PageOffset));
        EmitBranchProbe(-1, 0);
    }

    private void EmitRdpid(in Instruction instruction)
    {
        int number = Number(instruction.Op0Register);
        int host = IsSpilled(number) ? Host.T0 : HostOf(number);
        _e.Load32(host, HostMemory.Context(Offsets.TscAux));
        if (IsSpilled(number))
        {
            _e.Store(Slot(number), host);
        }
    }

    private void EmitMoveFromSegment(in Instruction instruction)
    {
        int segment = instruction.Op1Register - Register.ES;
        int number = Number(instruction.Op0Register);
        int host = IsSpilled(number) ? Host.T0 : HostOf(number);
        _e.LoadWord(host, HostMemory.Context(CpuContext.SegmentsOffset + (segment * 32) + 24));
        if (IsSpilled(number))
        {
            _e.Store(Slot(number), host);
        }
    }
}

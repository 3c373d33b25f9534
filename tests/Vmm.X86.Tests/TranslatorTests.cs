// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using FluentAssertions;
using Iced.Intel;
using Vmm.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests;

/// <summary>Programs that are translated from their first block on.</summary>
public sealed class TranslatorTests
{
    [Fact]
    public void Blocks_OfALoop_AreTranslatedAndRun()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(r13, 0L);
            a.mov(ecx, 100000);
            a.Label(ref loop);
            a.mov(__[0x20000], rcx);
            a.add(r13, __[0x20000]);
            a.dec(ecx);
            a.jne(loop);
            a.push(r13);
            a.pop(rbx);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[13].Should().Be(5000050000);
        vm.State.Gpr[3].Should().Be(5000050000);
        vm.Cpu.Translator!.Blocks.Should().BePositive();
    }

    [Fact]
    public void LongMode_StoreIntoTheRunningLoop_TakesEffectAtOnce()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var again = a.CreateLabel();
            a.mov(ecx, 1000);
            a.xor(eax, eax);
            a.Label(ref again);
            a.add(__dword_ptr[TestVm.CodeAt + 15], 1);
            a.mov(ebx, 0);
            a.add(rax, rbx);
            a.dec(ecx);
            a.jne(again);
            a.hlt();
        });

        // The immediate of MOV EBX lies behind its opcode.
        int at = vm.Memory.Slice((int)TestVm.CodeAt, 64).IndexOf((byte)0xBB) + 1;
        vm.Memory.Slice((int)TestVm.CodeAt, 64).IndexOf(new byte[] { 0x83, 0x04, 0x25 }).Should().Be(at - 9);
        vm.Write32(TestVm.CodeAt + (ulong)at - 6, (uint)(TestVm.CodeAt + (ulong)at));
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[0].Should().Be(500500);
    }

    [Fact]
    public void LongMode_FaultInTranslatedCode_LeavesEverythingBeforeIt()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Write64(TestVm.PageTables + 0x2000 + 8, 0);
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(r14, 0x1FFF00L);
            a.Label(ref loop);
            a.mov(__qword_ptr[r14], r14);
            a.add(r14, 8);
            a.jmp(loop);
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Cr2.Should().Be(0x200000);
        vm.State.Gpr[14].Should().Be(0x200000);
        vm.Read64(0x1FFFF8).Should().Be(0x1FFFF8);
        vm.MarginsAreIntact.Should().BeTrue();
    }

    // Each form is met as "cannot be encoded" after its operand's check, spills and flags have been emitted.
    [Theory]
    [InlineData(Code.Add_r64_rm64)]
    [InlineData(Code.Adc_rm64_imm8)]
    [InlineData(Code.Div_rm64)]
    [InlineData(Code.Imul_r64_rm64_imm8)]
    public void Instruction_ThatCannotBeEncoded_GoesToItsHandler(Code code)
    {
        using var vm = new TestVm();
        vm.Cpu.Translator!.Unencodable = code;
        vm.EnterLong();
        vm.Write64(0x20000, 7);
        vm.Write64(0x20008, 3);
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(r13, 0L);
            a.mov(ecx, 100);
            a.Label(ref loop);
            a.add(r13, __qword_ptr[0x20000]);
            a.cmp(ecx, 50);
            a.adc(__qword_ptr[0x20010], 0);
            a.imul(rax, r13, 3);
            a.mov(edx, 0);
            a.div(__qword_ptr[0x20008]);
            a.mov(rbx, rax);
            a.dec(ecx);
            a.jne(loop);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[13].Should().Be(700);
        vm.State.Gpr[3].Should().Be(700);
        vm.Read64(0x20010).Should().Be(49);
        vm.Cpu.Translator.HandlerCodes[(int)code].Should().BePositive();
    }

    // Bits 63:48 of such an address can be what the indirect-branch cache tags its entries with: 4000h at level 0 with
    // global pages, so that the address less its tag is 0, which empty entries hold.
    [Theory]
    [InlineData(0x4000_0000_0000_0000UL, true)]
    [InlineData(0x4000_0000_0000_0000UL, false)]
    [InlineData(0x8000_0000_0000_0000UL, true)]
    [InlineData(0x0000_8000_0000_0000UL, false)]
    public void LongMode_BranchToANonCanonicalAddress_RaisesGpBeforeIt(ulong target, bool isReturn)
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(rax, target);
            a.push(rax);
            if (isReturn)
            {
                a.ret();
            }
            else
            {
                a.jmp(rax);
            }
        });

        vm.Run().Should().Be(ExitKind.Halted);

        vm.State.Rip.Should().Be(0x92000 + 13 + 1);
        ulong frame = vm.State.Gpr[4];
        vm.Read64(frame + 8).Should().Be(TestVm.CodeAt + 11);
        vm.Read64(frame + 32).Should().Be(TestVm.StackTop - 8);
    }

    [Fact]
    public void Translation_WhenSwitchedOff_LeavesTheInterpreter()
    {
        using var vm = new TestVm(translateAfter: 0);
        vm.Cpu.Translator.Should().BeNull();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(eax, 7);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[0].Should().Be(7);
    }

    [Fact]
    public void GarbageCollections_WhileTranslatedCodeRuns_DoNotWaitForIt()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.Label(ref loop);
            a.inc(rbx);
            a.mov(__[0x20000], rbx);
            a.cpuid();
            a.jmp(loop);
        });
        vm.Cpu.WriteState(vm.State);
        ExitKind kind = ExitKind.Failed;
        var thread = new Thread(() =>
        {
            var exit = default(VcpuExit);
            kind = vm.Cpu.Run(ref exit);
        });
        thread.Start();
        for (int i = 0; i < 200; i++)
        {
            _ = new byte[1 << 16];
            GC.Collect(i % 3);
        }

        vm.Cpu.Kick();
        thread.Join(10_000).Should().BeTrue();
        kind.Should().Be(ExitKind.Interrupted);
        vm.Read64(0x20000).Should().BePositive();
    }
}

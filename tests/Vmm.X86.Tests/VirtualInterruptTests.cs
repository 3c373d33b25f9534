// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Iced.Intel;
using Vmm.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests;

/// <summary>CR4.VME and CR4.PVI (SDM 3B 21.3 and 21.4).</summary>
public sealed class VirtualInterruptTests
{
    private const ulong If = 0x200;
    private const ulong Iopl = 0x3000;
    private const ulong Vif = 0x8_0000;
    private const ulong Vip = 0x10_0000;
    private const ulong GeneralProtectionHandler = 0x92000 + 13 + 1;
    private const uint IoMap = 0x88;

    // A virtual-8086 task at 1000:0000 with a TSS whose bitmaps allow everything; exceptions halt.
    private static void EnterVirtual(TestVm vm, ulong flags, ulong cr4, Action<Assembler> program)
    {
        vm.EnterProtected();
        vm.State.Cr4 |= cr4;
        vm.State.Rflags = 0x20002 | flags;
        vm.State.Tr = new SegmentState { Selector = 0x40, Base = TestVm.TssAt, Limit = 0x200, Rights = 0x8B };
        vm.Write32(TestVm.TssAt + 4, 0x9F000);
        vm.Write32(TestVm.TssAt + 8, 0x10);
        vm.Write16(TestVm.TssAt + 0x66, (ushort)IoMap);
        for (int i = 0; i < 6; i++)
        {
            vm.State.Segments[i] = new SegmentState { Selector = 0x1000, Base = 0x10000, Limit = 0xFFFF, Rights = 0xF3 };
        }

        vm.State.Rip = 0;
        vm.State.Gpr[4] = 0x8000;
        vm.Assemble(0x10000, 16, program);
    }

    // HLT is privileged: the program ends in #GP's handler, which halts at level 0.
    [Fact]
    public void VirtualInterruptFlag_WithVme_StandsForIf()
    {
        using var vm = new TestVm();
        EnterVirtual(vm, If, 1, a =>
        {
            a.sti();
            a.pushf();
            a.pop(bx);
            a.cli();
            a.pushf();
            a.pop(cx);
            a.push(0x0200);
            a.popf();
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Rip.Should().Be(GeneralProtectionHandler);
        (vm.State.Gpr[3] & (If | Iopl)).Should().Be(If | Iopl, "STI sets what PUSHF shows, with IOPL 3");
        (vm.State.Gpr[1] & (If | Iopl)).Should().Be(Iopl);
        uint pushed = vm.Read32(vm.State.Gpr[4] + 12);
        (pushed & (If | Vif | Iopl)).Should().Be(If | Vif, "the real IF and IOPL stay, POPF has set VIF");
    }

    [Theory]
    [InlineData(0UL, 0UL)]
    [InlineData(Vip, 1UL)]
    public void Sti_WithoutVmeOrWithAnInterruptWaiting_Faults(ulong flags, ulong cr4)
    {
        using var vm = new TestVm();
        EnterVirtual(vm, flags, cr4, a =>
        {
            a.sti();
            a.mov(bx, 1);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Rip.Should().Be(GeneralProtectionHandler);
        vm.State.Gpr[3].Should().Be(0);
    }

    // Methods 5 and 6: a clear bit sends INT n to the task's own vector, a set one to the system.
    [Theory]
    [InlineData(0x00, 1)]
    [InlineData(0x02, 0)]
    public void SoftwareInterrupt_WithVme_FollowsTheRedirectionBitmap(int bits, int expected)
    {
        using var vm = new TestVm();
        EnterVirtual(vm, 0, 1, a =>
        {
            a.sti();
            a.@int(0x21);
            a.pushf();
            a.pop(cx);
            a.hlt();
        });
        vm.Memory[(int)(TestVm.TssAt + IoMap - 32 + (0x21 >> 3))] = (byte)bits;
        vm.Write32(0x21 * 4, 0x1000_0100);
        vm.Assemble(0x10100, 16, a =>
        {
            a.inc(bx);
            a.pushf();
            a.pop(dx);
            a.iret();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Rip.Should().Be(GeneralProtectionHandler);
        vm.State.Gpr[3].Should().Be((ulong)expected);
        if (expected != 0)
        {
            (vm.State.Gpr[2] & If).Should().Be(0, "the handler runs with VIF clear");
            (vm.State.Gpr[1] & If).Should().Be(If, "IRET takes it back");
        }
    }

    [Fact]
    public void Cli_AtLevel3WithPvi_ClearsTheVirtualFlagOnly()
    {
        using var vm = new TestVm();
        vm.EnterLong(3);
        vm.State.Cr4 |= 2;
        vm.State.Rflags = If | Vif | 2;
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.cli();
            a.pushfq();
            a.pop(rbx);
            a.sti();
            a.pushfq();
            a.pop(rcx);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        (vm.State.Gpr[3] & (If | Vif)).Should().Be(If);
        (vm.State.Gpr[1] & (If | Vif)).Should().Be(If | Vif);
    }
}

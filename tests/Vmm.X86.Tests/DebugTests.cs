// SPDX-License-Identifier: BSD-2-Clause
using FluentAssertions;
using Vmm.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests;

/// <summary>Debug exceptions and NMIs at the edges of instructions (SDM 3A 6.7, 6.8, 3B 17.2 and 17.3).</summary>
public sealed class DebugTests
{
    private const ulong Counter = 0x30000;
    private const ulong Watched = 0x31000;

    // The handler of #DB counts, and returns with RF set so that a code breakpoint does not hit twice.
    private static void CountDebugExceptions(TestVm vm)
    {
        const ulong Handler = 0x94000;
        vm.Assemble(Handler, 64, a =>
        {
            a.inc(__dword_ptr[Counter]);
            a.or(__dword_ptr[rsp + 16], 0x10000);
            a.iretq();
        });
        vm.Write64(TestVm.IdtAt + 16, (Handler & 0xFFFF) | (8UL << 16) | (0x8EUL << 40) | ((Handler >> 16) << 48));
    }

    // SDM 3A 6.8.3, 3B 17.2.3: the data breakpoint of MOV SS is held back and becomes part of INT1's #DB.
    [Theory]
    [InlineData(0xF1, 1)]
    [InlineData(0x01CD, 2)]
    public void WatchedMovSs_BeforeInt1_RaisesOneDebugException(int code, uint expected)
    {
        using var vm = new TestVm();
        vm.EnterLong();
        CountDebugExceptions(vm);
        vm.Write16(Watched, 0x10);
        vm.State.Debug[0] = Watched;
        vm.State.Debug[5] = 0x400 | 2 | (0xFUL << 16);
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(ss, __word_ptr[Watched]);
            a.db((byte)code);
            if (code > 0xFF)
            {
                a.db((byte)(code >> 8));
            }

            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.Read32(Counter).Should().Be(expected);
        (vm.State.Debug[4] & 0xF).Should().Be(1);
    }

    // Intel's processors hold a code breakpoint behind MOV SS back (SDM 3A 6.8.3), AMD's do not.
    [Theory]
    [InlineData(true, 1)]
    [InlineData(false, 0)]
    public void CodeBreakpoint_BehindMovSs_FollowsTheVendor(bool isAmd, uint expected)
    {
        using var vm = new TestVm();
        CpuidEntry[] leaves = [.. new SoftHypervisor(null).SupportedCpuid];
        for (int i = 0; i < leaves.Length; i++)
        {
            if (leaves[i].Function == 0 && !isAmd)
            {
                leaves[i] = leaves[i] with { Ebx = 0x756E6547, Edx = 0x49656E69, Ecx = 0x6C65746E };
            }
        }

        vm.Cpu.SetCpuid(leaves);
        vm.EnterLong();
        CountDebugExceptions(vm);
        int at = vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(eax, 0x10);
            a.mov(ss, eax);
        });
        vm.Assemble(TestVm.CodeAt + (uint)at, 64, a =>
        {
            a.xor(eax, eax);
            a.hlt();
        });
        vm.State.Debug[0] = TestVm.CodeAt + (uint)at;
        vm.State.Debug[5] = 0x400 | 2;
        vm.Run().Should().Be(ExitKind.Halted);
        vm.Read32(Counter).Should().Be(expected);
        vm.State.Gpr[0].Should().Be(0);
    }

    // Intel 335252 (5-level paging) 2.2.2: what is loaded into registers may have the processor's 57 bits although
    // CR4.LA57 is clear; an access with it then faults.
    [Theory]
    [InlineData(0xFFAA_AAAA_AAAA_AAAAUL, true, 13)]
    [InlineData(0xFFFF_AAAA_AAAA_AAAAUL, true, 14)]
    [InlineData(0xAAAA_AAAA_AAAA_AAAAUL, false, 13)]
    public void GsBase_WithFiveLevelPaging_IsCheckedForItsWidth(ulong value, bool isAllowed, uint vector)
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(ecx, unchecked((int)0xC0000101));
            a.mov(eax, unchecked((int)value));
            a.mov(edx, unchecked((int)(value >> 32)));
            a.wrmsr();
            a.mov(rbx, __qword_ptr.gs[0]);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Rip.Should().Be(0x92000 + vector + 1);
        vm.State.Segments[5].Base.Should().Be(isAllowed ? value : 0);
    }

    // SDM 3A 6.7.1: while one NMI is handled, one more is remembered, however many come.
    [Fact]
    public void Nmi_ComingOftenWhileBlocked_IsDeliveredOnceMore()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        const ulong Handler = 0x94000;
        vm.Assemble(Handler, 64, a =>
        {
            a.inc(__dword_ptr[Counter]);
            a.@out(0x10, al);
            a.iretq();
        });
        vm.Write64(TestVm.IdtAt + 32, (Handler & 0xFFFF) | (8UL << 16) | (0x8EUL << 40) | ((Handler >> 16) << 48));
        vm.Ports.Map(0x10, new NmiPort(vm));
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.@out(0x10, al);
            a.nop();
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.Read32(Counter).Should().Be(2);
    }

    // The first two writes each ask for an NMI and wake the processor, as a local APIC does.
    private sealed class NmiPort(TestVm vm) : IRegisterWindow
    {
        private int _left = 2;

        public uint Length => 1;

        public ulong Read(uint offset, AccessWidth width) => 0;

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            if (_left-- > 0)
            {
                vm.Port.Nmi = true;
                vm.Port.Waker?.Wake();
            }
        }
    }
}

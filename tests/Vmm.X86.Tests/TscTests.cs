// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using FluentAssertions;
using Vmm.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests;

/// <summary>The time stamp counter, from the clock and from the host's counter (TscSource).</summary>
public sealed class TscTests
{
    private const int Lock = 0x20000;
    private const int Last = 0x20040;
    private const int Backwards = 0x20080;

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    public void Rdtsc_WithAClockOfItsOwn_IsThatClock(int translateAfter)
    {
        using var vm = new TestVm(translateAfter: translateAfter);
        vm.EnterLong();
        vm.State.Msrs[0xC0000103] = 0x1234;
        vm.Clock.NowNs = 0x5_0000_0007;
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(rcx, -1L);
            a.rdtscp();
            a.mov(r8, rax);
            a.mov(r9, rdx);
            a.rdpid(r14);
            a.rdtsc();
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[8].Should().Be(7);
        vm.State.Gpr[9].Should().Be(5);
        vm.State.Gpr[0].Should().Be(7);
        vm.State.Gpr[2].Should().Be(5);
        vm.State.Gpr[1].Should().Be(0x1234);
        vm.State.Gpr[14].Should().Be(0x1234);
    }

    // Two vCPUs, under a lock, compare with what the other has read last, as Linux does when it brings a processor up.
    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    public void Rdtsc_OnTwoVcpus_NeverGoesBackAndFollowsTheClock(int translateAfter)
    {
        const int rounds = 200_000;
        using var vm = new TestVm(vcpus: 2, translateAfter: translateAfter, hostClock: true);
        vm.EnterLong();
        vm.State.Activity = ActivityState.Running;
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var again = a.CreateLabel();
            var taken = a.CreateLabel();
            var forwards = a.CreateLabel();
            a.mov(r15d, rounds);
            a.Label(ref again);
            a.mov(ebx, 1);
            a.xchg(__[Lock], ebx);
            a.test(ebx, ebx);
            a.je(taken);
            a.pause();
            a.jmp(again);
            a.Label(ref taken);
            a.rdtscp();
            a.shl(rdx, 32);
            a.or(rax, rdx);
            a.cmp(rax, __[Last]);
            a.jae(forwards);
            a.inc(__dword_ptr[Backwards]);
            a.Label(ref forwards);
            a.mov(__[Last], rax);
            a.mov(__dword_ptr[Lock], 0);
            a.dec(r15d);
            a.jne(again);
            a.hlt();
        });
        vm.Vcpus[1].WriteState(vm.State);
        var second = new Thread(() =>
        {
            var exit = default(VcpuExit);
            vm.Vcpus[1].Run(ref exit);
        });
        long before = vm.Clock.NowNs;
        second.Start();
        vm.Run().Should().Be(ExitKind.Halted);
        second.Join(60_000).Should().BeTrue();
        long after = vm.Clock.NowNs;
        vm.Read32(Backwards).Should().Be(0);
        long last = (long)vm.Read64(Last);
        last.Should().BeInRange(before, after + TscSource.WindowNs);
        (vm.Vm.Tsc.HasLines || !OperatingSystem.IsLinux()).Should().BeTrue("this host's counter is invariant, or the test shows nothing");
    }

    // The counter agrees with the clock after many lines, and after the guest has moved it.
    [Fact]
    public void Rdtsc_AfterManyLines_IsWhereTheClockIs()
    {
        using var vm = new TestVm(hostClock: true);
        vm.EnterLong();
        vm.Ports.Map(0x80, new KickPort(vm));
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var again = a.CreateLabel();
            var stop = a.CreateLabel();
            a.Label(ref stop);
            a.mov(ebx, 20_000);
            a.Label(ref again);
            a.rdtsc();
            a.dec(ebx);
            a.jne(again);
            a.@out(0x80, al);
            a.mov(ecx, 0x3B);
            a.xor(edx, edx);
            a.mov(eax, 5_000_000);
            a.wrmsr();
            a.mov(r13, 5_000_000L);
            a.jmp(stop);
        });
        vm.Run();
        long worst = 0;
        for (int i = 0; i < 40; i++)
        {
            // Between the two readings of the clock lies the way out of the last RDTSC: try a few times.
            long near = long.MaxValue;
            for (int j = 0; j < 5; j++)
            {
                vm.Continue().Should().Be(ExitKind.Interrupted);
                long now = vm.Clock.NowNs;
                long tsc = (long)((vm.State.Gpr[2] << 32) | (uint)vm.State.Gpr[0]) - (long)vm.State.Gpr[13];
                near = Math.Min(near, Math.Abs(now - tsc));
            }

            worst = Math.Max(worst, near);
        }

        worst.Should().BeLessThan(TscSource.WindowNs);
    }

    [Fact]
    public void Rdtsc_WithTsdAtLevel3_RaisesGpAndLeavesTheRegisters()
    {
        using var vm = new TestVm(hostClock: true);
        vm.EnterLong(3);
        vm.State.Cr4 |= 4;
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(rax, 0x1111_2222_3333L);
            a.mov(rdx, 0x4444_5555_6666L);
            a.rdtsc();
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Rip.Should().Be(0x92000 + 13 + 1);
        vm.State.Gpr[0].Should().Be(0x1111_2222_3333L);
        vm.State.Gpr[2].Should().Be(0x4444_5555_6666L);
    }

    private sealed class KickPort(TestVm vm) : IRegisterWindow
    {
        public uint Length => 1;

        public ulong Read(uint offset, AccessWidth width) => 0;

        public void Write(uint offset, AccessWidth width, ulong value) => vm.Cpu.Kick();
    }
}

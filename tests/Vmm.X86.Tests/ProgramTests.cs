// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using FluentAssertions;
using Vmm.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests;

public sealed class ProgramTests
{
    [Fact]
    public void LongMode_LoopOfAdditions_ComputesSum()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(rax, 0L);
            a.mov(ecx, 1000);
            a.Label(ref loop);
            a.add(rax, rcx);
            a.dec(ecx);
            a.jne(loop);
            a.push(rax);
            a.pop(rbx);
            a.mov(__[0x20000], rbx);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[0].Should().Be(500500);
        vm.Read64(0x20000).Should().Be(500500);
        vm.State.Gpr[4].Should().Be(TestVm.StackTop);
    }

    [Fact]
    public void LongMode_CallAndReturn_KeepsStack()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var function = a.CreateLabel();
            var done = a.CreateLabel();
            a.mov(edi, 15);
            a.call(function);
            a.jmp(done);
            a.Label(ref function);
            a.lea(rax, __[rdi + rdi * 2 + 7]);
            a.ret();
            a.Label(ref done);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[0].Should().Be(52);
    }

    [Fact]
    public void LongMode_PageFault_DeliversErrorAndAddress()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Write64(TestVm.PageTables + 0x2000 + 8, 0);
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(eax, 0x200123);
            a.mov(__byte_ptr[rax], 5);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Cr2.Should().Be(0x200123);
        vm.State.Rip.Should().Be(0x92000 + 14 + 1);
        ulong stack = vm.State.Gpr[4];
        vm.Read64(stack).Should().Be(2);
        vm.Read64(stack + 8).Should().Be(TestVm.CodeAt + 5);
    }

    // A loop that stores into its own page goes round through the outer loop all the time, as iPXE's does that waits for
    // an interrupt; a kick must not be taken away with the request that the store makes.
    [Fact]
    public void Kick_DuringALoopThatWritesItsOwnCode_IsNeverLost()
    {
        using var vm = new TestVm();
        vm.EnterReal();
        vm.Assemble(TestVm.CodeAt, 16, a =>
        {
            var loop = a.CreateLabel();
            a.Label(ref loop);
            a.mov(__byte_ptr.cs[0x30], cl);
            a.jmp(loop);
        });
        vm.Cpu.WriteState(vm.State);
        const int Kicks = 20_000;
        int returned = 0;
        var thread = new Thread(() =>
        {
            var exit = default(VcpuExit);
            while (Volatile.Read(ref returned) < Kicks && vm.Cpu.Run(ref exit) == ExitKind.Interrupted)
            {
                Interlocked.Increment(ref returned);
            }
        });
        thread.Start();
        int served = 0;
        for (; served < Kicks; served++)
        {
            vm.Cpu.Kick();
            if (!SpinWait.SpinUntil(() => Volatile.Read(ref returned) > served, 5_000))
            {
                break;
            }
        }

        // The thread must end before the guest's memory does.
        Volatile.Write(ref returned, Kicks);
        do
        {
            vm.Cpu.Kick();
        }
        while (!thread.Join(100));

        served.Should().Be(Kicks);
    }

    // SDM 2B, TZCNT and 2A, LZCNT: without them, BSF and BSR with a prefix that means nothing.
    [Theory]
    [InlineData(true, 4UL, 56UL)]
    [InlineData(false, 4UL, 7UL)]
    public void Counts_WithoutTheirFeature_AreScans(bool isOffered, ulong trailing, ulong leading)
    {
        using var vm = new TestVm();
        CpuidEntry[] leaves = [.. new SoftHypervisor(null).SupportedCpuid];
        for (int i = 0; i < leaves.Length && !isOffered; i++)
        {
            leaves[i] = leaves[i].Function switch
            {
                7 => leaves[i] with { Ebx = leaves[i].Ebx & ~(1U << 3) },
                0x80000001 => leaves[i] with { Ecx = leaves[i].Ecx & ~(1U << 5) },
                _ => leaves[i],
            };
        }

        vm.Cpu.SetCpuid(leaves);
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(eax, 0x90);
            a.tzcnt(rbx, rax);
            a.lzcnt(rcx, rax);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Rip.Should().Be(TestVm.CodeAt + 16);
        vm.State.Gpr[3].Should().Be(trailing);
        vm.State.Gpr[1].Should().Be(leading);
    }

    // SDM 2B RDSSP: "if CR4.CET = 0 ... NOP". Unwinders put a zero in a register, ask, and go without a shadow stack.
    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    public void CetAndMpx_WithoutTheirFeatures_AreNops(int translateAfter)
    {
        using var vm = new TestVm(translateAfter: translateAfter);
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(ecx, 100);
            a.xor(eax, eax);
            a.mov(esi, 1);
            a.Label(ref loop);
            a.rdsspq(rax);
            a.rdsspd(esi);
            a.bndmk(bnd0, __qword_ptr[rbx + 5]);
            a.bndmov(bnd1, bnd0);
            a.dec(ecx);
            a.jne(loop);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[0].Should().Be(0);
        vm.State.Gpr[6].Should().Be(1);
    }

    [Fact]
    public void RealMode_SoftwareInterrupt_RunsHandlerAndReturns()
    {
        using var vm = new TestVm();
        vm.EnterReal();
        vm.Write16(0x21 * 4, 0x100);
        vm.Write16((0x21 * 4) + 2, 0x1000);
        vm.Assemble(TestVm.CodeAt, 16, a =>
        {
            a.mov(ax, 5);
            a.@int(0x21);
            a.inc(ax);
            a.hlt();
        });
        vm.Assemble(TestVm.CodeAt + 0x100, 16, a =>
        {
            a.add(ax, 0x10);
            a.iret();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        (vm.State.Gpr[0] & 0xFFFF).Should().Be(0x16);
    }

    [Fact]
    public void ProtectedMode_SelfModifyingCode_TakesEffectAtOnce()
    {
        using var vm = new TestVm();
        vm.EnterProtected();
        vm.Assemble(TestVm.CodeAt, 32, a =>
        {
            var patched = a.CreateLabel();
            var again = a.CreateLabel();
            a.mov(ecx, 3);
            a.xor(eax, eax);
            a.Label(ref again);
            a.inc(__byte_ptr[TestVm.CodeAt + 14]);
            a.Label(ref patched);
            a.mov(ebx, 0x10);
            a.add(eax, ebx);
            a.dec(ecx);
            a.jne(again);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[0].Should().Be(0x11 + 0x12 + 0x13);
    }

    [Fact]
    public void LongMode_Interrupt_WakesHaltAndAcknowledges()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.sti();
            a.hlt();
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Rip.Should().Be(TestVm.CodeAt + 2);
        vm.Port.Vectors.Enqueue(0x30);
        vm.Continue().Should().Be(ExitKind.Halted);
        vm.State.Rip.Should().Be(0x92000 + 0x30 + 1);
    }

    [Fact]
    public void Shutdown_WithoutIdt_IsReported()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.State.IdtLimit = 0;
        vm.Assemble(TestVm.CodeAt, 64, a => a.ud2());
        vm.Run().Should().Be(ExitKind.Shutdown);
    }

    // Loads, stores, atomics, strings, vectors, x87, faults and returns from them, software interrupts, ports, device
    // memory, changes of address space: after a first time, which decodes, nothing of it makes garbage.
    [Theory]
    [InlineData(0)]
    [InlineData(2)]
    public void Run_OfAllKindsOfInstructions_AllocatesNothing(int translateAfter)
    {
        const uint Times = 1000;
        using var vm = new TestVm(translateAfter: translateAfter);
        vm.Ports.Map(0x80, new QuietWindow());
        vm.Mmio.Map(0xFEB00000, new QuietWindow());
        vm.EnterLong();

        // The fourth GiB by one page, for the device.
        vm.Write64(TestVm.PageTables + 0x1000 + 24, 0xC0000083);
        Resume(vm, 6, 2);
        Resume(vm, 14, 7);
        Resume(vm, 0x30, 0);
        vm.Write64(TestVm.PageTables + 0x2000 + 8, 0);
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            var function = a.CreateLabel();
            a.mov(ebp, Times);
            a.Label(ref loop);
            a.mov(__[0x20000], rcx);
            a.@lock.add(__qword_ptr[0x20008], rcx);
            a.call(function);
            a.ud2();
            a.mov(edx, __dword_ptr[0x200000]);
            a.@int(0x30);
            a.@out(0x80, al);
            a.mov(eax, 0xFEB00000);
            a.mov(edx, __dword_ptr[rax]);
            a.mov(__dword_ptr[rax], edx);
            a.mov(edi, 0x21000);
            a.mov(ecx, 64);
            a.rep.stosq();
            a.fld1();
            a.fstp(__qword_ptr[0x20010]);
            a.movaps(xmm0, __xmmword_ptr[0x20000]);
            a.addps(xmm0, xmm1);
            a.movaps(__xmmword_ptr[0x20020], xmm0);
            a.xor(eax, eax);
            a.cpuid();
            a.rdtsc();
            a.mov(rax, cr3);
            a.mov(cr3, rax);
            a.invlpg(__[0x20000]);
            a.dec(ebp);
            a.jne(loop);
            a.hlt();
            a.Label(ref function);
            a.lea(rsi, __[rdi + rax]);
            a.ret();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        var exit = default(VcpuExit);
        long executed = vm.Cpu.InstructionsRetired;
        vm.State.Rip = TestVm.CodeAt;
        vm.State.Activity = ActivityState.Running;
        vm.Cpu.WriteState(vm.State);
        long before = GC.GetAllocatedBytesForCurrentThread();
        ExitKind kind = vm.Cpu.Run(ref exit);
        long allocated = GC.GetAllocatedBytesForCurrentThread() - before;

        kind.Should().Be(ExitKind.Halted);
        vm.Cpu.ReadState(vm.State);
        vm.State.Gpr[5].Should().Be(0);
        (vm.Cpu.InstructionsRetired - executed).Should().BeGreaterThan(Times);
        allocated.Should().Be(0);
    }

    // The vector's handler skips the instruction.
    private static void Resume(TestVm vm, int vector, int length)
    {
        ulong handler = 0x94000 + ((ulong)vector * 32);
        vm.Write64(
            TestVm.IdtAt + ((ulong)vector * 16),
            (handler & 0xFFFF) | (8UL << 16) | (0x8EUL << 40) | ((handler >> 16) << 48));
        vm.Assemble(handler, 64, a =>
        {
            if (vector == 14)
            {
                a.add(rsp, 8);
            }

            a.add(__qword_ptr[rsp], length);
            a.iretq();
        });
    }

    private sealed class QuietWindow : IRegisterWindow
    {
        public uint Length => 16;

        public ulong Read(uint offset, AccessWidth width) => 0x5A;

        public void Write(uint offset, AccessWidth width, ulong value)
        {
        }
    }
}

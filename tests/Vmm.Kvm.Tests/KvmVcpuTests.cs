// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Linq;
using System.Threading;
using FluentAssertions;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Kvm.Tests;

/// <summary>Payloads are real-mode code, written out as bytes with their assembly beside them.</summary>
public sealed class KvmVcpuTests
{
    private static readonly byte[] s_spin = [0xEB, 0xFE];   // jmp $

    [KvmFact]
    public void Run_PortWritesAndReads_ReachTheMapWithTheirWidths()
    {
        using var machine = new TestMachine();
        machine.PortLog.OnRead = (offset, width) => offset == 0x40 && width == AccessWidth.Word ? 0xBEEFu : 0;
        machine.Load(
        [
            0xB0, 0x5A,             // mov al, 0x5A
            0xE6, 0x10,             // out 0x10, al
            0xE5, 0x40,             // in ax, 0x40
            0xE7, 0x12,             // out 0x12, ax
            0x66, 0xB8, 0x78, 0x56, 0x34, 0x12,     // mov eax, 0x12345678
            0x66, 0xE7, 0x14,       // out 0x14, eax
            0xF4,                   // hlt
        ]);
        machine.Run().Should().Be(ExitKind.Halted);
        machine.PortLog.Writes.Should().Equal(
            (0x10, AccessWidth.Byte, 0x5AUL), (0x12, AccessWidth.Word, 0xBEEFUL), (0x14, AccessWidth.Dword, 0x12345678UL));
    }

    [KvmFact]
    public void Run_StringPorts_TransferEveryElementInOrder()
    {
        using var machine = new TestMachine();
        uint next = 100;
        machine.PortLog.OnRead = (_, _) => next++;
        machine.Ram.WriteSpan<byte>(0x2000, [1, 2, 3, 4, 5, 6]);
        machine.Load(
        [
            0xFC,                   // cld
            0xBA, 0x20, 0x00,       // mov dx, 0x20
            0xBE, 0x00, 0x20,       // mov si, 0x2000
            0xB9, 0x03, 0x00,       // mov cx, 3
            0xF3, 0x6F,             // rep outsw
            0xBF, 0x00, 0x30,       // mov di, 0x3000
            0xB9, 0x05, 0x00,       // mov cx, 5
            0xF3, 0x6C,             // rep insb
            0xF4,                   // hlt
        ]);
        machine.Run().Should().Be(ExitKind.Halted);
        machine.PortLog.Writes.Should().Equal(
            (0x20, AccessWidth.Word, 0x0201UL), (0x20, AccessWidth.Word, 0x0403UL), (0x20, AccessWidth.Word, 0x0605UL));
        var got = new byte[5];
        machine.Ram.ReadSpan(0x3000, got.AsSpan());
        got.Should().Equal(100, 101, 102, 103, 104);
    }

    [KvmFact]
    public void Run_UnclaimedPortsAndMemory_ReadAsOnes()
    {
        using var machine = new TestMachine();
        machine.Load(
        [
            0xBA, 0x00, 0x80,       // mov dx, 0x8000
            0xEC,                   // in al, dx
            0x88, 0xC4,             // mov ah, al
            0x67, 0xA0, 0x00, 0x00, 0x00, 0x50,     // mov al, [0x50000000]
            0xE7, 0x10,             // out 0x10, ax
            0xF4,                   // hlt
        ]);
        machine.Run().Should().Be(ExitKind.Halted);
        machine.PortLog.Writes.Should().Equal((0x10, AccessWidth.Word, 0xFFFFUL));
    }

    [KvmFact]
    public void Run_MemoryMappedRegisters_SeeOffsetsAndWidths()
    {
        using var machine = new TestMachine();
        machine.MmioLog.OnRead = (offset, width) => offset == 0x24 && width == AccessWidth.Dword ? 0xCAFEF00D : 0;
        machine.Load(
        [
            0x66, 0x67, 0xC7, 0x05, 0x10, 0x00, 0x08, 0x00, 0x44, 0x33, 0x22, 0x11,  // mov dword [0x80010], 0x11223344
            0x66, 0x67, 0xA1, 0x24, 0x00, 0x08, 0x00,       // mov eax, [0x80024]
            0x67, 0xA2, 0x31, 0x00, 0x08, 0x00,             // mov [0x80031], al
            0x66, 0xE7, 0x10,       // out 0x10, eax
            0xF4,                   // hlt
        ]);
        machine.Run().Should().Be(ExitKind.Halted);
        machine.MmioLog.Writes.Should().Equal((0x10, AccessWidth.Dword, 0x11223344UL), (0x31, AccessWidth.Byte, 0x0DUL));
        machine.PortLog.Writes.Should().Equal((0x10, AccessWidth.Dword, 0xCAFEF00DUL));
    }

    [KvmFact]
    public void Run_MmioAcrossTheEndOfRam_SplitsBetweenRamAndRegisters()
    {
        using var machine = new TestMachine();
        machine.Load(
        [
            0x66, 0x67, 0xC7, 0x05, 0xFE, 0xFF, 0x07, 0x00, 0x44, 0x33, 0x22, 0x11,  // mov dword [0x7FFFE], 0x11223344
            0xF4,                   // hlt
        ]);
        machine.Run().Should().Be(ExitKind.Halted);
        machine.Ram.Read<ushort>(0x7FFFE).Should().Be(0x3344);
        ulong value = 0;
        foreach ((uint offset, _, ulong part) in machine.MmioLog.Writes)
        {
            value |= part << (int)(8 * offset);
        }

        value.Should().Be(0x1122);
    }

    [KvmFact]
    public void Run_TripleFault_IsShutdown()
    {
        using var machine = new TestMachine();
        machine.Load([0x0F, 0x0B]);         // ud2, in protected mode without an interrupt table
        var state = new CpuState();
        machine.Cpu.ReadState(state);
        state.Cr0 |= 1;
        state.IdtLimit = 0;
        for (int i = 0; i < 6; i++)
        {
            uint rights = i == 1 ? 0xC09Bu : 0xC093;
            state.Segments[i] = new SegmentState { Selector = 8, Limit = uint.MaxValue, Rights = rights };
        }

        machine.Cpu.WriteState(state);
        machine.Run().Should().Be(ExitKind.Shutdown);
    }

    [KvmFact]
    public void Run_InstructionThatKvmCannotEmulate_AsksForHelpAtThatInstruction()
    {
        using var machine = new TestMachine();
        machine.Load(
        [
            0x90,                   // nop
            0x67, 0xD8, 0x05, 0x00, 0x00, 0x08, 0x00,       // fadd dword [0x80000]: x87 on registers
            0xF4,                   // hlt
        ]);
        machine.Run(out VcpuExit exit).Should().Be(ExitKind.NeedsEmulation);
        var state = new CpuState();
        machine.Cpu.ReadState(state);
        state.Rip.Should().Be(TestMachine.CodeAddress + 1);
        if (exit.InstructionLength > 0)
        {
            (exit.InstructionLow & 0xFF_FFFF).Should().Be(0x05_D8_67);
        }

        // The run loop would execute it; here it is skipped, once by system calls and once through the run page.
        state.Rip += 7;
        machine.Cpu.WriteState(state);
        machine.Run().Should().Be(ExitKind.Halted);
    }

    [KvmFact]
    public void Run_RepeatedEmulation_KeepsStateThroughTheRunPage()
    {
        using var machine = new TestMachine();
        machine.Load(
        [
            0xB9, 0x05, 0x00,       // mov cx, 5
            0x67, 0xD8, 0x05, 0x00, 0x00, 0x08, 0x00,       // again: fadd dword [0x80000]
            0xE2, 0xF7,             // loop again
            0x66, 0xE7, 0x10,       // out 0x10, eax
            0xF4,                   // hlt
        ]);
        var state = new CpuState();
        int times = 0;
        while (machine.Run() == ExitKind.NeedsEmulation)
        {
            machine.Cpu.ReadRegisters(state);
            state.Rip.Should().Be(TestMachine.CodeAddress + 3);
            state.Gpr[1].Should().Be((ulong)(5 - times));
            state.Rip += 7;
            state.Gpr[0] += 0x10001;
            machine.Cpu.WriteRegisters(state);
            machine.Cpu.ReadRegisters(state);
            state.Rip.Should().Be(TestMachine.CodeAddress + 10);
            times++;
        }

        times.Should().Be(5);
        machine.PortLog.Writes.Should().Equal((0x10, AccessWidth.Dword, 0x50005UL));
    }

    [KvmFact]
    public void Kick_WhileTheGuestSpins_EndsRunEachTime()
    {
        using var machine = new TestMachine();
        machine.Load(s_spin);
        using var entered = new SemaphoreSlim(0);
        using var returned = new SemaphoreSlim(0);
        ExitKind last = ExitKind.Failed;
        bool stop = false;
        var thread = new Thread(() =>
        {
            VcpuExit exit = default;
            while (!Volatile.Read(ref stop))
            {
                entered.Release();
                last = machine.Cpu.Run(ref exit);
                returned.Release();
            }
        });
        thread.Start();
        for (int i = 0; i < 100; i++)
        {
            entered.Wait(10_000).Should().BeTrue();
            if (i % 3 == 0)
            {
                Thread.SpinWait(100_000);
            }

            if (i == 99)
            {
                Volatile.Write(ref stop, true);
            }

            machine.Cpu.Kick();
            returned.Wait(10_000).Should().BeTrue();
            last.Should().Be(ExitKind.Interrupted);
        }

        thread.Join(10_000).Should().BeTrue();
    }

    [KvmFact]
    public void Kick_BeforeRun_StopsTheNextRunOnly()
    {
        using var machine = new TestMachine();
        machine.Load([0xB0, 0x01, 0xE6, 0x10, 0xF4]);   // mov al, 1; out 0x10, al; hlt
        machine.Cpu.Kick();
        machine.Cpu.Kick();
        VcpuExit exit = default;
        machine.Cpu.Run(ref exit).Should().Be(ExitKind.Interrupted);
        machine.PortLog.Writes.Should().BeEmpty();
        machine.Cpu.Run(ref exit).Should().Be(ExitKind.Halted);
        machine.PortLog.Writes.Should().HaveCount(1);
    }

    [KvmFact]
    public void Kick_FromADevice_FinishesTheInstructionFirst()
    {
        using var machine = new TestMachine();
        machine.PortLog.OnRead = (_, _) =>
        {
            machine.Cpu.Kick();
            return 0x77;
        };
        machine.Load([0xE4, 0x10, 0xF4]);       // in al, 0x10; hlt
        VcpuExit exit = default;
        machine.Cpu.Run(ref exit).Should().Be(ExitKind.Interrupted);
        var state = new CpuState();
        machine.Cpu.ReadState(state);
        (state.Gpr[0] & 0xFF).Should().Be(0x77);
        state.Rip.Should().Be(TestMachine.CodeAddress + 2);
    }

    [KvmFact]
    public void Run_OnAnotherThread_StillAnswersKicks()
    {
        using var machine = new TestMachine();
        machine.Load(s_spin);
        for (int i = 0; i < 3; i++)
        {
            var kinds = new ExitKind[1];
            var thread = new Thread(() =>
            {
                VcpuExit exit = default;
                kinds[0] = machine.Cpu.Run(ref exit);
            });
            thread.Start();
            thread.Join(20).Should().BeFalse();
            machine.Cpu.Kick();
            thread.Join(10_000).Should().BeTrue();
            kinds[0].Should().Be(ExitKind.Interrupted);
        }
    }

    [KvmFact]
    public void Run_CollectionsMeanwhile_DoNotEndIt()
    {
        using var machine = new TestMachine();
        machine.Load(s_spin);
        int returns = 0;
        var thread = new Thread(() =>
        {
            VcpuExit exit = default;
            machine.Cpu.Run(ref exit);
            Interlocked.Increment(ref returns);
        });
        thread.Start();
        var clock = Stopwatch.StartNew();
        while (clock.ElapsedMilliseconds < 300)
        {
            GC.KeepAlive(new byte[1 << 16]);
            GC.Collect(0);
        }

        Volatile.Read(ref returns).Should().Be(0);
        machine.Cpu.Kick();
        thread.Join(10_000).Should().BeTrue();
    }

    [KvmFact]
    public void Run_ManyExits_AllocatesNothing()
    {
        using var machine = new TestMachine();
        machine.PortLog.Records = false;
        machine.MmioLog.Records = false;
        machine.Load(
        [
            0xB9, 0xE8, 0x03,       // mov cx, 1000
            0xE6, 0x10,             // again: out 0x10, al
            0xE4, 0x11,             // in al, 0x11
            0x67, 0xA2, 0x31, 0x00, 0x08, 0x00,     // mov [0x80031], al
            0xE2, 0xF4,             // loop again
            0xF4,                   // hlt
            0xEB, 0xEE,             // jmp start
        ]);
        machine.Run().Should().Be(ExitKind.Halted);
        VcpuExit exit = default;
        long before = GC.GetAllocatedBytesForCurrentThread();
        ExitKind kind = machine.Cpu.Run(ref exit);
        long after = GC.GetAllocatedBytesForCurrentThread();
        kind.Should().Be(ExitKind.Halted);
        (after - before).Should().Be(0);
    }

    [KvmFact]
    public void Run_RandomCode_NeverThrowsAndAlwaysComesBack()
    {
        var random = new Random(20240229);
        for (int round = 0; round < 40; round++)
        {
            using var machine = new TestMachine();
            machine.PortLog.Records = false;
            var code = new byte[TestMachine.RamBytes];
            random.NextBytes(code);
            machine.Ram.WriteSpan<byte>(0, code);
            using var timer = new Timer(_ => machine.Cpu.Kick(), null, 10, Timeout.Infinite);
            VcpuExit exit = default;
            ExitKind kind = machine.Cpu.Run(ref exit);
            Enum.IsDefined(kind).Should().BeTrue();
            if (kind == ExitKind.Failed)
            {
                exit.Detail.Should().NotBeNullOrEmpty().And.NotContain("\n");
            }
        }
    }

    [KvmFact]
    public void Run_UserIrqchip_DeliversInterruptsWhenTheGuestAllows()
    {
        var port = new FakeInterruptPort();
        using var machine = new TestMachine(port: port);
        machine.SetVector(0x21, 0x1100);
        machine.SetVector(0x22, 0x1110);
        machine.Load(
        [
            0xFA,                   // cli
            0xE6, 0x01,             // out 1, al       (the port raises two vectors here)
            0xE6, 0x02,             // out 2, al
            0xFB,                   // sti
            0x90,                   // nop
            0x90,                   // nop
            0xE6, 0x03,             // out 3, al
            0xF4,                   // hlt
            0xE6, 0x04,             // out 4, al
            0xFA, 0xF4,             // cli; hlt
        ]);
        machine.Load([0xE6, 0x21, 0xCF], 0x1100);   // out 0x21, al; iret
        machine.Load([0xE6, 0x22, 0xCF], 0x1110);   // out 0x22, al; iret
        machine.PortLog.OnWrite = (offset, _) =>
        {
            if (offset == 1)
            {
                port.Raise(0x21);
                port.Raise(0x22);
            }
        };
        machine.Run().Should().Be(ExitKind.Halted);

        // A KVM that emulates guest kernel code notices the open window a few instructions late.
        List<uint> seen = machine.PortLog.Writes.Select(w => w.Offset).ToList();
        seen.Take(2).Should().Equal(1, 2);
        seen.Where(o => o >= 0x20).Should().Equal(0x21, 0x22);
        seen.Should().Contain(3);
        int resumed = 0;
        while (!machine.PortLog.Writes.Any(w => w.Offset == 4))
        {
            resumed++.Should().BeLessThan(2, "one interrupt ends one HLT");
            port.Raise(0x21);
            machine.Run().Should().Be(ExitKind.Halted);
        }

        // HLT with interrupts off: only an NMI wakes.
        int count = machine.PortLog.Writes.Count;
        port.Raise(0x22);
        machine.Run().Should().Be(ExitKind.Halted);
        machine.PortLog.Writes.Should().HaveCount(count);
    }

    [KvmFact]
    public void Run_UserIrqchip_NmiWakesEvenWithInterruptsOff()
    {
        var port = new FakeInterruptPort();
        using var machine = new TestMachine(port: port);
        machine.SetVector(2, 0x1100);
        machine.Load([0xFA, 0xF4, 0xE6, 0x02, 0xF4]);   // cli; hlt; out 2, al; hlt
        machine.Load([0xE6, 0x21, 0xCF], 0x1100);       // out 0x21, al; iret
        machine.Run().Should().Be(ExitKind.Halted);
        port.RaiseNmi();
        machine.Run().Should().Be(ExitKind.Halted);
        machine.PortLog.Writes.Select(w => w.Offset).Should().Equal(0x21, 2);
    }

    [KvmFact]
    public void Run_UserIrqchip_LocalApicPageBelongsToThePort()
    {
        var port = new FakeInterruptPort();
        using var machine = new TestMachine(port: port);
        machine.Load(
        [
            0x66, 0x67, 0xC7, 0x05, 0x80, 0x00, 0xE0, 0xFE, 0x20, 0x00, 0x00, 0x00,     // mov dword [0xFEE00080], 0x20
            0x66, 0x67, 0xA1, 0x30, 0x00, 0xE0, 0xFE,       // mov eax, [0xFEE00030]
            0xE6, 0x10,             // out 0x10, al
            0xF4,                   // hlt
        ]);
        machine.Run().Should().Be(ExitKind.Halted);
        port.Page.Writes.Should().Equal((0x80, AccessWidth.Dword, 0x20UL));
        machine.PortLog.Writes.Should().Equal((0x10, AccessWidth.Byte, 0x30UL));
    }

    [KvmFact]
    public void State_UserIrqchip_TakesCr8FromThePort()
    {
        var port = new FakeInterruptPort { Cr8 = 3 };
        using var machine = new TestMachine(port: port);
        var state = new CpuState();
        machine.Cpu.ReadState(state);
        state.Cr8.Should().Be(3);
        state.Cr8 = 5;
        machine.Cpu.WriteState(state);
        port.Cr8.Should().Be(5);
    }

    [KvmFact]
    public void Run_UserIrqchip_WaitsToBeStarted()
    {
        using var machine = new TestMachine(port: new FakeInterruptPort());
        var port = new FakeInterruptPort { ApicBase = 0xFEE00800 };
        IVcpu second = machine.AddCpu(port);
        machine.Load([0x8C, 0xC8, 0xE7, 0x20, 0xF4], 0x3000);   // mov ax, cs; out 0x20, ax; hlt
        port.RaiseInit();
        port.RaiseStartup(3);
        TestMachine.Run(second, out _).Should().Be(ExitKind.Halted);
        port.HasInit.Should().BeTrue("INIT and start-up IPIs are the run loop's");
        port.HasStartup.Should().BeTrue("INIT and start-up IPIs are the run loop's");

        // What the run loop does with them.
        var state = new CpuState();
        second.ReadState(state);
        state.Activity.Should().Be(ActivityState.WaitForInit);
        state.Segments[1] = state.Segments[1] with { Selector = 0x300, Base = 0x3000 };
        state.Rip = 0;
        state.Activity = ActivityState.Running;
        second.WriteState(state);
        TestMachine.Run(second, out _).Should().Be(ExitKind.Halted);
        machine.PortLog.Writes.Should().Equal((0x20, AccessWidth.Word, 0x300UL));
    }

    [KvmFact]
    public void Run_Halt_SaysWhetherInterruptsAreMasked()
    {
        using var machine = new TestMachine(port: new FakeInterruptPort());
        machine.Load([0xFB, 0xF4]);     // sti; hlt
        machine.Run(out VcpuExit exit).Should().Be(ExitKind.Halted);
        exit.InterruptsMasked.Should().BeFalse();
        using var other = new TestMachine(port: new FakeInterruptPort());
        other.Load([0xFA, 0xF4]);       // cli; hlt
        other.Run(out exit).Should().Be(ExitKind.Halted);
        exit.InterruptsMasked.Should().BeTrue();
    }

    [KvmFact]
    public void WriteState_Halted_StaysWakeableByInterrupts()
    {
        // A processor that was saved in HLT comes to one that has never run.
        var port = new FakeInterruptPort();
        using var machine = new TestMachine(port: port);
        machine.SetVector(0x40, 0x2000);
        machine.Load([0xF4, 0xF4]);                 // what follows the saved HLT: hlt; hlt
        machine.Load([0xE6, 0x10, 0xCF], 0x2000);   // out 0x10, al; iret
        var state = new CpuState();
        machine.Cpu.ReadState(state);
        state.Activity = ActivityState.Halted;
        state.Rflags |= 0x200;
        machine.Cpu.WriteState(state);
        machine.Run(out VcpuExit exit).Should().Be(ExitKind.Halted);
        exit.InterruptsMasked.Should().BeFalse("the state says that interrupts are on");
        port.Raise(0x40);
        machine.Run(out exit).Should().Be(ExitKind.Halted);
        machine.PortLog.Writes.Should().HaveCount(1, "the interrupt ended the halt");
        exit.InterruptsMasked.Should().BeFalse("IRET brought the flag back");

        state.Rflags &= ~0x200UL;
        machine.Cpu.WriteState(state);
        machine.Run(out exit).Should().Be(ExitKind.Halted);
        exit.InterruptsMasked.Should().BeTrue("the state says that they are off");
    }

    [KvmFact]
    public void Dispose_WithAKickOutstanding_LeavesNoSignalBehind()
    {
        for (int i = 0; i < 20; i++)
        {
            using var machine = new TestMachine();
            machine.Load([0xF4]);
            VcpuExit exit = default;
            machine.Cpu.Run(ref exit).Should().Be(ExitKind.Halted);
            machine.Cpu.Kick();
        }

        KickSignal.Drain();
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Linq;
using System.Threading;
using FluentAssertions;
using Vmm.Core;
using Vmm.Host;
using Xunit;

namespace Vmm.Kvm.Tests;

public sealed class KvmVmTests
{
    [KvmFact]
    public void Diagnose_WorkingDevice_SaysSoInOneLine()
    {
        KvmDiagnosis diagnosis = KvmProbe.Diagnose();
        diagnosis.IsUsable.Should().BeTrue();
        diagnosis.Summary.Should().Contain("/dev/kvm").And.NotContain("\n");
    }

    [Fact]
    public void Diagnose_NoDevice_SaysWhatToDo()
    {
        KvmDiagnosis diagnosis = KvmProbe.Diagnose("/dev/no-such-kvm");
        diagnosis.Status.Should().Be(KvmStatus.NoDevice);
        diagnosis.IsUsable.Should().BeFalse();
        diagnosis.Advice.Should().NotBeNullOrEmpty();
    }

    [Fact]
    public void Diagnose_OtherDevice_IsUnusable() =>
        KvmProbe.Diagnose("/dev/null").Status.Should().Be(KvmStatus.Unusable);

    [Fact]
    public void Open_OtherDevice_ThrowsOneLine()
    {
        Action act = () => KvmSystem.Open("/dev/null");
        act.Should().Throw<HypervisorException>().Which.Message.Should().Contain("/dev/null").And.NotContain("\n");
    }

    [KvmFact]
    public void Capabilities_ThisKvm_AreComplete()
    {
        using KvmSystem system = KvmSystem.Open();
        system.Capabilities.MaxMemorySlots.Should().BeGreaterThanOrEqualTo(32);
        system.Capabilities.MaxVcpus.Should().BeGreaterThanOrEqualTo(1);
        system.Capabilities.IrqchipModes.Should().Contain(IrqchipMode.User);
        system.SupportedCpuid.Should().Contain(e => e.Function == 0).And.Contain(e => e.Function == 0x80000001);
        system.SavedMsrs.Should().Contain([0xC0000081, 0xC0000082, 0x277]).And.NotContain([0xC0000080, 0x1B]);
    }

    [KvmReadOnlyMemoryFact]
    public void SetMemorySlot_ReadOnly_SendsWritesToTheMap()
    {
        using var machine = new TestMachine();
        using HostMemory rom = HostMemory.Allocate(4096, hugePages: false);
        rom.Write(0, 0x5Au);
        machine.Vm.SetMemorySlot(1, new MemorySlot(TestMachine.MmioBase, 4096, rom.Address, true, false, 0));
        machine.Load(
        [
            0x67, 0xA0, 0x00, 0x00, 0x08, 0x00,     // mov al, [0x80000]
            0xE6, 0x10,                             // out 0x10, al
            0x67, 0xA2, 0x04, 0x00, 0x08, 0x00,     // mov [0x80004], al
            0xF4,                                   // hlt
        ]);
        machine.Run().Should().Be(ExitKind.Halted);
        machine.PortLog.Writes.Should().Equal((0x10, AccessWidth.Byte, 0x5AUL));
        machine.MmioLog.Writes.Should().Equal((0x4, AccessWidth.Byte, 0x5AUL));
        rom.Read<uint>(4).Should().Be(0);
    }

    [KvmFact]
    public void SetMemorySlot_MovedReplacedAndRemoved_GuestFollows()
    {
        using var machine = new TestMachine();
        using HostMemory one = HostMemory.Allocate(8192, hugePages: false);
        using HostMemory two = HostMemory.Allocate(4096, hugePages: false);
        one.Write(0, (byte)0x11);
        two.Write(0, (byte)0x22);
        machine.Load(
        [
            0x67, 0xA0, 0x00, 0x00, 0x00, 0x10,     // mov al, [0x10000000]
            0xE6, 0x10,                             // out 0x10, al
            0x67, 0xA0, 0x00, 0x00, 0x00, 0x20,     // mov al, [0x20000000]
            0xE6, 0x11,                             // out 0x11, al
            0xF4, 0xEB, 0xED,                       // hlt; jmp start
        ]);
        var map = machine.Vm;
        map.SetMemorySlot(3, new MemorySlot(0x10000000, 8192, one.Address, false, false, 0));
        machine.Run().Should().Be(ExitKind.Halted);
        map.SetMemorySlot(3, new MemorySlot(0x20000000, 8192, one.Address, false, false, 0));
        machine.Run().Should().Be(ExitKind.Halted);
        map.SetMemorySlot(3, new MemorySlot(0x20000000, 4096, two.Address, false, false, 0));
        machine.Run().Should().Be(ExitKind.Halted);
        map.SetMemorySlot(3, default);
        map.SetMemorySlot(3, default);
        machine.Run().Should().Be(ExitKind.Halted);
        machine.PortLog.Writes.Select(w => w.Value).Should()
            .Equal(0x11, 0xFF, 0xFF, 0x11, 0xFF, 0x22, 0xFF, 0xFF);
    }

    [KvmFact]
    public void SetMemorySlot_Overlap_IsRefusedInOneLine()
    {
        using var machine = new TestMachine();
        Action act = () => machine.Vm.SetMemorySlot(
            1, new MemorySlot(0x1000, 4096, machine.Ram.Address, false, false, 0));
        act.Should().Throw<HypervisorException>().Which.Message.Should().Contain("1000").And.NotContain("\n");
    }

    [KvmFact]
    public void ReadDirtyLog_GuestWrites_ReportsAndClearsThem()
    {
        using var machine = new TestMachine();
        var bitmap = new ulong[2];
        machine.Vm.ReadDirtyLog(0, bitmap).Should().BeFalse("slot 0 does not log");
        machine.Vm.SetMemorySlot(0, new MemorySlot(0, TestMachine.RamBytes, machine.Ram.Address, false, true, 0));
        machine.Load(
        [
            0x67, 0xA2, 0x00, 0x50, 0x00, 0x00,     // mov [0x5000], al
            0x67, 0xA2, 0x00, 0x60, 0x04, 0x00,     // mov [0x46000], al
            0xF4,                                   // hlt
        ]);
        machine.Run().Should().Be(ExitKind.Halted);
        machine.Vm.ReadDirtyLog(0, bitmap).Should().BeTrue();
        (bitmap[0] & (1UL << 5)).Should().NotBe(0);
        (bitmap[1] & (1UL << (0x46 - 64))).Should().NotBe(0);
        (bitmap[0] & (1UL << 7)).Should().Be(0);
        machine.Vm.ReadDirtyLog(0, bitmap).Should().BeTrue();
        (bitmap[0] & (1UL << 5)).Should().Be(0);
        bitmap[1].Should().Be(0);
    }

    [KvmDoorbellFact]
    public void TryAddDoorbell_PortWrite_SignalsWithoutReachingTheMap()
    {
        using var machine = new TestMachine();
        using var bell = new EventFd();
        machine.Vm.TryAddDoorbell(0x30, true, AccessWidth.Word, 7, bell.Fd).Should().BeTrue();
        machine.Load(
        [
            0xB8, 0x07, 0x00, 0xE7, 0x30,           // mov ax, 7; out 0x30, ax
            0xB8, 0x08, 0x00, 0xE7, 0x30,           // mov ax, 8; out 0x30, ax
            0xF4,                                   // hlt
            0xB8, 0x07, 0x00, 0xE7, 0x30, 0xF4,     // mov ax, 7; out 0x30, ax; hlt
        ]);
        machine.Run().Should().Be(ExitKind.Halted);
        bell.Drain().Should().BeTrue();
        machine.PortLog.Writes.Select(w => w.Value).Should().Equal(8);
        machine.Vm.RemoveDoorbell(0x30, true, AccessWidth.Word, 7, bell.Fd);
        machine.Run().Should().Be(ExitKind.Halted);
        bell.Drain().Should().BeFalse();
        machine.PortLog.Writes.Select(w => w.Value).Should().Equal(8, 7);
    }

    [KvmTheory]
    [InlineData(IrqchipMode.Kernel)]
    [InlineData(IrqchipMode.Split)]
    public void SendMsi_EdgeMessage_InterruptsTheGuest(IrqchipMode mode)
    {
        using var machine = new TestMachine(mode);
        machine.SetVector(0x31, 0x1100);
        machine.Load(
        [
            0x66, 0x67, 0xC7, 0x05, 0xF0, 0x00, 0xE0, 0xFE, 0xFF, 0x01, 0x00, 0x00,     // enable the local APIC (SVR)
            0xFB,                   // sti
            0xE6, 0x01,             // out 1, al
            0xEB, 0xFE,             // jmp $
        ]);
        machine.Load([0xE6, 0x31, 0xF4], 0x1100);   // out 0x31, al; hlt
        machine.PortLog.OnWrite = (offset, _) =>
        {
            if (offset == 1)
            {
                machine.Vm.SendMsi(0xFEE00000, 0x31);
            }
            else
            {
                machine.Cpu.Kick();
            }
        };
        VcpuExit exit = default;
        machine.Cpu.Run(ref exit).Should().Be(ExitKind.Interrupted);
        machine.PortLog.Writes.Select(w => w.Offset).Should().Equal(1, 0x31);
    }

    [KvmFact]
    public void SendMsi_LevelMessageInSplitMode_ReportsItsEoi()
    {
        var ended = new List<byte>();
        using var machine = new TestMachine(IrqchipMode.Split, onEoi: ended.Add);
        machine.SetVector(0x31, 0x1100);
        machine.SetVector(0x32, 0x1110);
        machine.Load(
        [
            0x66, 0x67, 0xC7, 0x05, 0xF0, 0x00, 0xE0, 0xFE, 0xFF, 0x01, 0x00, 0x00,     // enable the local APIC (SVR)
            0xFB,                   // sti
            0xE6, 0x01,             // out 1, al
            0xE6, 0x02,             // out 2, al
            0xEB, 0xFE,             // jmp $
        ]);
        byte[] handler =
        [
            0x66, 0x67, 0xC7, 0x05, 0xB0, 0x00, 0xE0, 0xFE, 0x00, 0x00, 0x00, 0x00,     // EOI
            0xCF,                   // iret
        ];
        machine.Load(handler, 0x1100);
        machine.Load(handler, 0x1110);
        machine.SetVector(0x32, 0x1110);
        machine.PortLog.OnWrite = (offset, _) =>
        {
            if (offset == 1)
            {
                machine.Vm.SendMsi(0xFEE00000, 0xC000 | 0x31);      // level, assert
            }
            else
            {
                machine.Vm.SendMsi(0xFEE00000, 0x32);               // edge
                machine.Cpu.Kick();
            }
        };
        VcpuExit exit = default;
        machine.Cpu.Run(ref exit).Should().Be(ExitKind.Interrupted);
        using var timer = new Timer(_ => machine.Cpu.Kick(), null, 50, Timeout.Infinite);
        machine.Cpu.Run(ref exit).Should().Be(ExitKind.Interrupted);
        ended.Should().Equal(0x31);
    }

    [KvmTheory]
    [InlineData(0u)]
    [InlineData(2u)]
    [InlineData(5u)]
    public void SetIrqLine_KernelPic_InterruptsTheGuest(uint gsi)
    {
        using var machine = new TestMachine(IrqchipMode.Kernel);
        uint irq = gsi == 2 ? 0 : gsi;
        machine.SetVector((int)(0x20 + irq), 0x1100);
        machine.Load(
        [
            0xB0, 0x11, 0xE6, 0x20, // mov al, 0x11; out 0x20, al    ICW1
            0xB0, 0x20, 0xE6, 0x21, // ICW2: vectors from 0x20
            0xB0, 0x04, 0xE6, 0x21, // ICW3
            0xB0, 0x01, 0xE6, 0x21, // ICW4
            0xB0, 0x00, 0xE6, 0x21, // OCW1: nothing masked
            0xFB,                   // sti
            0xE6, 0x81,             // out 0x81, al
            0xEB, 0xFE,             // jmp $
        ]);
        machine.Load([0xE6, 0x82, 0xFA, 0xF4], 0x1100);     // out 0x82, al; cli; hlt
        machine.PortLog.OnWrite = (offset, _) =>
        {
            if (offset == 0x81)
            {
                machine.Vm.SetIrqLine(gsi, true);
            }
            else
            {
                machine.Vm.SetIrqLine(gsi, false);
                machine.Cpu.Kick();
            }
        };
        VcpuExit exit = default;
        using var watchdog = new Timer(_ => machine.Cpu.Kick(), null, 5000, Timeout.Infinite);
        machine.Cpu.Run(ref exit).Should().Be(ExitKind.Interrupted);
        machine.PortLog.Writes.Select(w => w.Offset).Should().Equal(0x81, 0x82);
    }

    [KvmTheory]
    [InlineData(IrqchipMode.Kernel)]
    [InlineData(IrqchipMode.Split)]
    public void Run_InitAndStartupIpis_StartASecondProcessor(IrqchipMode mode)
    {
        using var machine = new TestMachine(mode);
        IVcpu second = machine.AddCpu();
        machine.Load(
        [
            0x66, 0x67, 0xC7, 0x05, 0xF0, 0x00, 0xE0, 0xFE, 0xFF, 0x01, 0x00, 0x00,     // enable the local APIC (SVR)
            0x66, 0x67, 0xC7, 0x05, 0x10, 0x03, 0xE0, 0xFE, 0x00, 0x00, 0x00, 0x01,     // ICR high: APIC 1
            0x66, 0x67, 0xC7, 0x05, 0x00, 0x03, 0xE0, 0xFE, 0x00, 0x45, 0x00, 0x00,     // ICR low: INIT
            0x66, 0x67, 0xC7, 0x05, 0x00, 0x03, 0xE0, 0xFE, 0x03, 0x46, 0x00, 0x00,     // ICR low: start-up at 0x3000
            0xF4,                   // hlt
        ]);
        machine.Load([0x8C, 0xC8, 0xE7, 0x90, 0xFA, 0xF4], 0x3000);     // mov ax, cs; out 0x90, ax; cli; hlt
        machine.PortLog.OnWrite = (_, _) =>
        {
            machine.Cpu.Kick();
            second.Kick();
        };
        var thread = new Thread(() => TestMachineRunOnce(second));
        thread.Start();
        using var watchdog = new Timer(
            _ =>
            {
                machine.Cpu.Kick();
                second.Kick();
            },
            null,
            5000,
            Timeout.Infinite);
        TestMachineRunOnce(machine.Cpu).Should().Be(ExitKind.Interrupted);
        thread.Join(10_000).Should().BeTrue();
        machine.PortLog.Writes.Should().Equal((0x90, AccessWidth.Word, 0x300UL));
        var state = new CpuState();
        second.ReadState(state);
        state.Activity.Should().BeOneOf(ActivityState.Halted, ActivityState.Running);
    }

    [KvmFact]
    public void CreateVm_UnsupportedMode_ThrowsOneLine()
    {
        using KvmSystem system = KvmSystem.Open(measureSpeed: false);
        Action act = () => system.CreateVm(new VmOptions
        {
            Ports = new AddressMap("io", 0x10000),
            Mmio = new AddressMap("mmio", 0),
            Clock = null!,
            Irqchip = (IrqchipMode)9,
        });
        act.Should().Throw<HypervisorException>().Which.Message.Should().Contain("User");
    }

    [KvmFact]
    public void SaveIrqchip_KernelMode_RoundTrips()
    {
        using var machine = new TestMachine(IrqchipMode.Kernel);
        var writer = new StateWriter("irqchip");
        machine.Vm.SaveIrqchip(writer);
        byte[] saved = writer.ToArray();
        machine.Vm.LoadIrqchip(new StateReader("irqchip", saved));
        var again = new StateWriter("irqchip");
        machine.Vm.SaveIrqchip(again);
        var first = new StateReader("irqchip", saved);
        var second = new StateReader("irqchip", again.ToArray());
        foreach (string chip in new[] { "pic.master", "pic.slave", "ioapic" })
        {
            second.ReadBytes(chip).ToArray().Should().Equal(first.ReadBytes(chip).ToArray());
        }
    }

    private static ExitKind TestMachineRunOnce(IVcpu vcpu)
    {
        VcpuExit exit = default;
        return vcpu.Run(ref exit);
    }
}

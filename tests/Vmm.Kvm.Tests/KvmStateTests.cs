// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using FluentAssertions;
using Vmm.Core;

namespace Vmm.Kvm.Tests;

public sealed class KvmStateTests
{
    [KvmTheory]
    [Xunit.InlineData(IrqchipMode.User)]
    [Xunit.InlineData(IrqchipMode.Split)]
    [Xunit.InlineData(IrqchipMode.Kernel)]
    public void State_WrittenAndRead_RoundTrips(IrqchipMode mode)
    {
        using var machine = new TestMachine(mode);
        CpuState state = MakeLongModeState(machine.Cpu);
        machine.Cpu.WriteState(state);
        var read = new CpuState();
        machine.Cpu.ReadState(read);
        Compare(read, state);

        // And into another VM, through the saved form.
        using var other = new TestMachine(mode);
        var writer = new StateWriter("cpu0");
        read.Save(writer);
        var loaded = new CpuState();
        loaded.Load(new StateReader("cpu0", writer.ToArray()));
        other.Cpu.WriteState(loaded);
        var final = new CpuState();
        other.Cpu.ReadState(final);
        Compare(final, state);
        final.LocalApic.Should().Equal(read.LocalApic);
    }

    [KvmFact]
    public void ReadState_FreshProcessor_IsThePowerOnState()
    {
        using var machine = new TestMachine(IrqchipMode.Kernel);
        IVcpu second = machine.AddCpu();
        var state = new CpuState();
        second.ReadState(state);
        state.Rip.Should().Be(0xFFF0);
        state.Segments[1].Selector.Should().Be(0xF000);
        state.Segments[1].Base.Should().Be(0xFFFF0000);
        state.Cr0.Should().Be(0x60000010);
        state.Activity.Should().Be(ActivityState.WaitForInit);
    }

    [KvmFact]
    public void WriteState_PendingEvents_AreRestored()
    {
        using var machine = new TestMachine();
        var state = new CpuState();
        machine.Cpu.ReadState(state);
        state.StiShadow = true;
        state.NmiBlocked = true;
        state.EventPending = true;
        state.EventType = 0;
        state.EventVector = 0x45;
        machine.Cpu.WriteState(state);
        var read = new CpuState();
        machine.Cpu.ReadState(read);
        // SVM has one bit for both shadows, so MovSsShadow may be set too.
        read.StiShadow.Should().BeTrue();
        read.NmiBlocked.Should().BeTrue();
        read.EventPending.Should().BeTrue();
        read.EventVector.Should().Be(0x45);
        read.EventType.Should().Be(0);
    }

    private static CpuState MakeLongModeState(IVcpu vcpu)
    {
        var state = new CpuState();
        vcpu.ReadState(state);
        for (int i = 0; i < 16; i++)
        {
            state.Gpr[i] = 0x1111111111111111UL * (ulong)i;
        }

        state.Rip = 0x123456;
        state.Rflags = 0x246;
        state.Cr0 = 0x80050033;
        state.Cr2 = 0xDEAD000;
        state.Cr3 = 0x1000;
        state.Cr4 = 0x6F0;
        state.Efer = 0xD01;
        for (int i = 0; i < 6; i++)
        {
            state.Segments[i] = new SegmentState { Selector = 0x10, Limit = uint.MaxValue, Rights = 0xC093 };
        }

        state.Segments[1] = new SegmentState { Selector = 8, Limit = uint.MaxValue, Rights = 0xA09B };
        state.Segments[4] = state.Segments[4] with { Base = 0x7FFF00001000 };
        state.Segments[5] = state.Segments[5] with { Base = 0xFFFF888000000000 };
        state.Tr = new SegmentState { Selector = 0x40, Base = 0xFFFFFE0000003000, Limit = 0x206F, Rights = 0x8B };
        state.Ldtr = new SegmentState { Selector = 0x50, Base = 0xFFFFFE0000008000, Limit = 0x7F, Rights = 0x82 };
        state.GdtBase = 0xFFFFFE0000001000;
        state.GdtLimit = 0x7F;
        state.IdtBase = 0xFFFFFE0000000000;
        state.IdtLimit = 0xFFF;
        state.Msrs[0xC0000081] = 0x0023001000000000;
        state.Msrs[0xC0000082] = 0xFFFFFFFF81A00000;
        state.Msrs[0xC0000102] = 0x7F0000001000;
        state.Msrs[0x174] = 0x10;
        state.Msrs[0x277] = 0x0407050600070106;
        state.Debug[0] = 0x401000;
        state.Debug[5] = 0x402;

        // x87 control word, MXCSR, ST0 and XMM3, with the header that says they are there.
        Array.Clear(state.Xsave);
        BinaryPrimitives.WriteUInt16LittleEndian(state.Xsave, 0x27F);
        BinaryPrimitives.WriteUInt32LittleEndian(state.Xsave.AsSpan(24), 0x1F80);
        state.Xsave[4] = 0x01;
        BinaryPrimitives.WriteUInt64LittleEndian(state.Xsave.AsSpan(32), 0xC90FDAA22168C235);
        BinaryPrimitives.WriteUInt16LittleEndian(state.Xsave.AsSpan(40), 0x4000);
        BinaryPrimitives.WriteUInt64LittleEndian(state.Xsave.AsSpan(160 + 48), 0x0123456789ABCDEF);
        state.Xsave[512] = 3;
        return state;
    }

    private static void Compare(CpuState actual, CpuState expected)
    {
        actual.Gpr.Should().Equal(expected.Gpr);
        actual.Rip.Should().Be(expected.Rip);
        actual.Rflags.Should().Be(expected.Rflags);
        actual.Segments.Should().Equal(expected.Segments);
        actual.Tr.Should().Be(expected.Tr);
        actual.Ldtr.Should().Be(expected.Ldtr);
        (actual.GdtBase, actual.GdtLimit, actual.IdtBase, actual.IdtLimit).Should()
            .Be((expected.GdtBase, expected.GdtLimit, expected.IdtBase, expected.IdtLimit));
        (actual.Cr0, actual.Cr2, actual.Cr3, actual.Cr4, actual.Efer).Should()
            .Be((expected.Cr0, expected.Cr2, expected.Cr3, expected.Cr4, expected.Efer));
        actual.ApicBase.Should().Be(expected.ApicBase);
        actual.Xcr0.Should().Be(expected.Xcr0);
        actual.Debug.Should().Equal(expected.Debug);
        actual.Xsave.AsSpan(0, 416).ToArray().Should().Equal(expected.Xsave.AsSpan(0, 416).ToArray());
        foreach (uint msr in new uint[] { 0xC0000081, 0xC0000082, 0xC0000102, 0x174, 0x277 })
        {
            actual.Msrs[msr].Should().Be(expected.Msrs[msr], "MSR {0:x}", msr);
        }
    }
}

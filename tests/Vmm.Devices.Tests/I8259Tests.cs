// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Legacy;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>Intel 8259A data sheet 231468-003; ELCR: 82371SB §2.5.6.</summary>
public sealed class I8259Tests
{
    private readonly FakeIrqLine _output = new();
    private readonly I8259Pair _pic;

    public I8259Tests()
    {
        _pic = new I8259Pair(_output);
        _pic.Reset();
    }

    private void Init(byte icw4 = 0x01)
    {
        foreach ((IRegisterWindow ports, byte vectors, byte cascade) in
            new[] { (_pic.MasterPorts, (byte)0x20, (byte)4), (_pic.SlavePorts, (byte)0x28, (byte)2) })
        {
            ports.Write(0, AccessWidth.Byte, 0x11);
            ports.Write(1, AccessWidth.Byte, vectors);
            ports.Write(1, AccessWidth.Byte, cascade);
            ports.Write(1, AccessWidth.Byte, icw4);
        }
    }

    private void Eoi(int irq)
    {
        if (irq >= 8)
        {
            _pic.SlavePorts.Write(0, AccessWidth.Byte, 0x20);
        }

        _pic.MasterPorts.Write(0, AccessWidth.Byte, 0x20);
    }

    private static byte Irr(IRegisterWindow ports)
    {
        ports.Write(0, AccessWidth.Byte, 0x0A);
        return (byte)ports.Read(0, AccessWidth.Byte);
    }

    private static byte Isr(IRegisterWindow ports)
    {
        ports.Write(0, AccessWidth.Byte, 0x0B);
        return (byte)ports.Read(0, AccessWidth.Byte);
    }

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(3)]
    [InlineData(4)]
    [InlineData(5)]
    [InlineData(6)]
    [InlineData(7)]
    [InlineData(8)]
    [InlineData(9)]
    [InlineData(10)]
    [InlineData(11)]
    [InlineData(12)]
    [InlineData(13)]
    [InlineData(14)]
    [InlineData(15)]
    public void Input_OnRisingEdge_GivesItsVectorOnce(int irq)
    {
        Init();
        _pic.Input(irq).Set(true);
        _output.Level.Should().BeTrue();
        _pic.Acknowledge().Should().Be((byte)(0x20 + irq));
        _output.Level.Should().BeFalse();
        Isr(irq < 8 ? _pic.MasterPorts : _pic.SlavePorts).Should().Be((byte)(1 << (irq & 7)));
        Eoi(irq);
        _output.Level.Should().BeFalse("an edge requests once");
        Isr(_pic.MasterPorts).Should().Be(0);
        _pic.Input(irq).Set(false);
        _pic.Input(irq).Set(true);
        _output.Level.Should().BeTrue();
    }

    [Theory]
    [InlineData(3)]
    [InlineData(5)]
    [InlineData(9)]
    [InlineData(15)]
    public void LevelInput_UntilDeasserted_RequestsAgainAfterEoi(int irq)
    {
        Init();
        _pic.ElcrPorts.Write((uint)(irq / 8), AccessWidth.Byte, (ulong)(1 << (irq & 7)));
        _pic.Input(irq).Set(true);
        _pic.Acknowledge().Should().Be((byte)(0x20 + irq));
        Eoi(irq);
        _output.Level.Should().BeTrue();
        _pic.Input(irq).Set(false);
        _output.Level.Should().BeFalse();
    }

    [Fact]
    public void Elcr_WhenWritten_KeepsOnlyChoosableInputs()
    {
        _pic.ElcrPorts.Write(0, AccessWidth.Word, 0xFFFF);
        _pic.ElcrPorts.Read(0, AccessWidth.Word).Should().Be(0xDEF8);
    }

    [Fact]
    public void Acknowledge_WhenNothingIsPending_GivesSpuriousVectors()
    {
        Init();
        _pic.Acknowledge().Should().Be(0x27);
        Isr(_pic.MasterPorts).Should().Be(0, "a default IR7 sets no ISR bit");
        _pic.ElcrPorts.Write(1, AccessWidth.Byte, 0x02);
        _pic.Input(9).Set(true);
        _pic.SlavePorts.Write(1, AccessWidth.Byte, 0);
        _pic.Input(9).Set(false);
        _pic.Acknowledge().Should().Be(0x27);
    }

    [Fact]
    public void Priority_OfLowerInput_WaitsForEoi()
    {
        Init();
        _pic.Input(4).Set(true);
        _pic.Acknowledge();
        _pic.Input(5).Set(true);
        _output.Level.Should().BeFalse();
        _pic.Input(1).Set(true);
        _output.Level.Should().BeTrue("IR1 is above IR4 and nests");
        _pic.Acknowledge().Should().Be(0x21);
        Eoi(1);
        _output.Level.Should().BeFalse();
        Eoi(4);
        _pic.Acknowledge().Should().Be(0x25);
    }

    [Fact]
    public void SpecialFullyNested_OnMaster_LetsHigherSlaveRequestsThrough()
    {
        Init(0x11);
        _pic.Input(12).Set(true);
        _pic.Acknowledge().Should().Be(0x2C);
        _pic.Input(9).Set(true);
        _output.Level.Should().BeTrue();
        _pic.Acknowledge().Should().Be(0x29);
    }

    [Fact]
    public void Nested_WithoutSpecialFullyNested_HoldsTheSlave()
    {
        Init();
        _pic.Input(12).Set(true);
        _pic.Acknowledge();
        _pic.Input(9).Set(true);
        _output.Level.Should().BeFalse();
    }

    [Fact]
    public void SpecialMask_WithMaskedInService_LetsLowerThrough()
    {
        Init();
        _pic.Input(3).Set(true);
        _pic.Acknowledge();
        _pic.Input(6).Set(true);
        _pic.MasterPorts.Write(1, AccessWidth.Byte, 0x08);
        _output.Level.Should().BeFalse();
        _pic.MasterPorts.Write(0, AccessWidth.Byte, 0x68);
        _output.Level.Should().BeTrue();
        _pic.Acknowledge().Should().Be(0x26);
    }

    [Fact]
    public void RotateOnEoi_MakesTheServedInputLowest()
    {
        Init();
        _pic.Input(0).Set(true);
        _pic.Acknowledge();
        _pic.MasterPorts.Write(0, AccessWidth.Byte, 0xA0);
        _pic.Input(0).Set(false);
        _pic.Input(0).Set(true);
        _pic.Input(7).Set(true);
        _pic.Acknowledge().Should().Be(0x27);
    }

    [Fact]
    public void SetPriority_AndSpecificEoi_Work()
    {
        Init();
        _pic.MasterPorts.Write(0, AccessWidth.Byte, 0xC4);
        _pic.Input(4).Set(true);
        _pic.Input(5).Set(true);
        _pic.Acknowledge().Should().Be(0x25, "IR5 is highest when IR4 is lowest");
        _pic.MasterPorts.Write(0, AccessWidth.Byte, 0x65);
        _pic.Acknowledge().Should().Be(0x24);
    }

    [Fact]
    public void AutoEoi_LeavesNothingInService()
    {
        Init(0x03);
        _pic.Input(4).Set(true);
        _pic.Acknowledge().Should().Be(0x24);
        Isr(_pic.MasterPorts).Should().Be(0);
    }

    [Fact]
    public void Poll_Read_AcknowledgesAndTells()
    {
        Init();
        _pic.Input(5).Set(true);
        _pic.MasterPorts.Write(0, AccessWidth.Byte, 0x0C);
        _pic.MasterPorts.Read(0, AccessWidth.Byte).Should().Be(0x85);
        Isr(_pic.MasterPorts).Should().Be(0x20);
        _output.Level.Should().BeFalse();
    }

    [Fact]
    public void Mask_WhenCleared_ReleasesTheRequest()
    {
        Init();
        _pic.MasterPorts.Write(1, AccessWidth.Byte, 0xFF);
        _pic.Input(1).Set(true);
        _output.Level.Should().BeFalse();
        Irr(_pic.MasterPorts).Should().Be(2);
        _pic.MasterPorts.Read(1, AccessWidth.Byte).Should().Be(0xFF);
        _pic.MasterPorts.Write(1, AccessWidth.Byte, 0xFD);
        _output.Level.Should().BeTrue();
    }

    [Fact]
    public void State_SavedAndLoaded_IsTheSame()
    {
        Init(0x13);
        _pic.ElcrPorts.Write(0, AccessWidth.Word, 0x0C20);
        _pic.Input(5).Set(true);
        _pic.Input(11).Set(true);
        _pic.Acknowledge();
        var line = new FakeIrqLine();
        var copy = new I8259Pair(line);
        copy.Reset();
        DeviceCheck.Copy(_pic, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(_pic));
        line.Level.Should().Be(_output.Level);
    }

    [Fact]
    public void Ports_UnderRandomAccess_NeverThrow()
    {
        void Stir(Random random)
        {
            int irq = random.Next(16);
            _pic.Input(irq).Set(random.Next(2) == 0);
            if (random.Next(3) == 0)
            {
                _pic.Acknowledge();
            }
        }

        DeviceCheck.Fuzz(_pic.MasterPorts, 1, 20000, Stir);
        DeviceCheck.Fuzz(_pic.SlavePorts, 2, 20000, Stir);
        DeviceCheck.Fuzz(_pic.ElcrPorts, 3, 2000, Stir);
    }
}

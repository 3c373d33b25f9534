// SPDX-License-Identifier: BSD-2-Clause
using System.Linq;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Legacy;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>National PC16550D data sheet.</summary>
public sealed class Uart16550Tests
{
    private readonly ManualClock _clock = new();
    private readonly FakeCharBackend _backend = new();
    private readonly FakeIrqLine _irq = new();
    private readonly Uart16550 _uart;

    public Uart16550Tests()
    {
        _uart = new Uart16550("com1", _backend, _clock, _irq);
        _uart.Reset();
        _uart.Resume();
    }

    private byte Read(uint offset) => (byte)_uart.Read(offset, AccessWidth.Byte);

    private void Write(uint offset, byte value) => _uart.Write(offset, AccessWidth.Byte, value);

    // Table I.
    [Theory]
    [InlineData(1, 0x00)]
    [InlineData(2, 0x01)]
    [InlineData(3, 0x00)]
    [InlineData(4, 0x00)]
    [InlineData(5, 0x60)]
    [InlineData(6, 0xB0)]
    public void Register_AfterReset_HasItsValue(uint offset, byte expected) => Read(offset).Should().Be(expected);

    [Theory]
    [InlineData(1, 0x0F)]
    [InlineData(3, 0xFF)]
    [InlineData(4, 0x1F)]
    [InlineData(7, 0xFF)]
    public void Register_AfterWritingOnes_KeepsItsMask(uint offset, byte expected)
    {
        Write(offset, 0xFF);
        Read(offset).Should().Be(expected);
    }

    [Fact]
    public void Divisor_BehindDlab_IsSeparate()
    {
        Write(3, 0x80);
        Write(0, 0x34);
        Write(1, 0x12);
        Read(0).Should().Be(0x34);
        Read(1).Should().Be(0x12);
        Write(3, 0x03);
        Read(1).Should().Be(0);
        _backend.Output.Should().BeEmpty();
    }

    [Fact]
    public void Thr_WhenWritten_SendsAndInterrupts()
    {
        Write(4, 0x08);
        Write(0, (byte)'a');
        _irq.Level.Should().BeFalse();
        Write(1, 0x02);
        _irq.Level.Should().BeTrue("THR is empty when the interrupt is enabled");
        Read(2).Should().Be(0x02);
        _irq.Level.Should().BeFalse("reading IIR clears it");
        Write(0, (byte)'b');
        _irq.Level.Should().BeTrue();
        _backend.Output.Should().Equal((byte)'a', (byte)'b');
    }

    [Fact]
    public void Interrupt_IsConnectedWhateverOut2Says()
    {
        Write(1, 0x02);
        _irq.Level.Should().BeTrue("systems that grew up on emulators leave OUT2 clear");
        Write(4, 0x08);
        _irq.Level.Should().BeTrue();
    }

    [Fact]
    public void Input_WithoutFifo_TakesOneByte()
    {
        Write(4, 0x08);
        Write(1, 0x01);
        _backend.Type(1, 2, 3).Should().Be(1);
        _irq.Level.Should().BeTrue();
        Read(2).Should().Be(0x04);
        Read(5).Should().Be(0x61);
        int resumed = _backend.Resumed;
        Read(0).Should().Be(1);
        _backend.Resumed.Should().Be(resumed + 1);
        _irq.Level.Should().BeFalse();
        Read(5).Should().Be(0x60);
    }

    [Theory]
    [InlineData(0x01, 1)]
    [InlineData(0x41, 4)]
    [InlineData(0x81, 8)]
    [InlineData(0xC1, 14)]
    public void Fifo_AtItsTriggerLevel_Interrupts(byte fcr, int trigger)
    {
        Write(4, 0x08);
        Write(1, 0x01);
        Write(2, fcr);
        for (int i = 1; i <= trigger; i++)
        {
            _irq.Level.Should().BeFalse();
            _backend.Type((byte)i);
        }

        _irq.Level.Should().BeTrue();
        Read(2).Should().Be(0xC4);
        _backend.Type(Enumerable.Repeat((byte)9, 20).ToArray()).Should().Be(16 - trigger);
    }

    [Fact]
    public void Fifo_BelowTrigger_TimesOutAfterFourCharacters()
    {
        Write(3, 0x80);
        Write(0, 12);
        Write(3, 0x03);
        Write(4, 0x08);
        Write(1, 0x01);
        Write(2, 0xC1);
        _backend.Type(7, 8);
        _irq.Level.Should().BeFalse();
        _clock.Advance(4_100_000);
        _irq.Level.Should().BeFalse("40 bits at 9600 baud are 4.17 ms");
        _clock.Advance(100_000);
        _irq.Level.Should().BeTrue();
        Read(2).Should().Be(0xCC);
        Read(0).Should().Be(7);
        _irq.Level.Should().BeFalse("reading restarts the timeout");
        _clock.Advance(4_200_000);
        Read(2).Should().Be(0xCC);
        Read(0).Should().Be(8);
        Read(2).Should().Be(0xC1);
    }

    [Fact]
    public void Loopback_ReturnsBytesAndModemLines()
    {
        Write(4, 0x10);
        Read(6);
        Write(0, 0x5A);
        _backend.Output.Should().BeEmpty();
        Read(5).Should().Be(0x61);
        Read(0).Should().Be(0x5A);
        _backend.Type(1).Should().Be(0, "the receiver is cut off");
        foreach ((byte mcr, byte msr) in new (byte, byte)[] { (0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80) })
        {
            Write(4, mcr);
            (Read(6) & 0xF0).Should().Be(msr);
        }

        Write(4, 0x10);
        Read(6).Should().Be(0x08);
    }

    [Fact]
    public void ModemStatus_Delta_Interrupts()
    {
        Write(4, 0x18);
        Read(6);
        Write(1, 0x08);
        _irq.Level.Should().BeFalse();
        Write(4, 0x1C);
        _irq.Level.Should().BeFalse("TERI is the trailing edge");
        Write(4, 0x18);
        _irq.Level.Should().BeTrue();
        Read(2).Should().Be(0x00);
        Read(6).Should().Be(0x84);
        _irq.Level.Should().BeFalse();
    }

    [Fact]
    public void Overrun_AndBreak_AreLineErrorsWithTheFirstPriority()
    {
        Write(4, 0x18);
        Write(1, 0x07);
        Write(0, 1);
        Write(0, 2);
        Read(2).Should().Be(0x06);
        Read(5).Should().Be(0x63);
        Read(2).Should().Be(0x04);
        Read(0).Should().Be(2);
        Write(3, 0x43);
        Read(2).Should().Be(0x06);
        Read(5).Should().Be(0x71);
    }

    [Fact]
    public void Fcr_Reset_EmptiesTheFifo()
    {
        Write(2, 0x01);
        _backend.Type(1, 2, 3);
        Write(2, 0x03);
        Read(5).Should().Be(0x60);
        _uart.RoomBytes.Should().Be(16);
        Read(0).Should().Be(0);
    }

    [Fact]
    public void State_SavedAndLoaded_IsTheSame()
    {
        Write(2, 0xC1);
        Write(1, 0x0F);
        Write(4, 0x0B);
        Write(7, 0x77);
        _backend.Type(1, 2, 3);
        Read(0);
        var irq = new FakeIrqLine();
        var copy = new Uart16550("com1", new FakeCharBackend(), _clock, irq);
        DeviceCheck.Copy(_uart, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(_uart));
        irq.Level.Should().Be(_irq.Level);
        copy.Read(0, AccessWidth.Byte).Should().Be(2);
    }

    [Fact]
    public void Ports_UnderRandomAccess_NeverThrow() => DeviceCheck.Fuzz(_uart, 5, 30000, random =>
    {
        _backend.Type((byte)random.Next(256));
        _clock.Advance(random.Next(1_000_000));
    });
}

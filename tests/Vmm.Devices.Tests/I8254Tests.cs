// SPDX-License-Identifier: BSD-2-Clause
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Legacy;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>Intel 8254 data sheet 231164-005.</summary>
public sealed class I8254Tests
{
    private readonly ManualClock _clock = new();
    private readonly FakeIrqLine _irq = new();
    private readonly I8254 _pit;

    public I8254Tests()
    {
        _pit = new I8254(_clock, _irq);
        _pit.Reset();
        _pit.Resume();
    }

    private static long Ticks(long ticks) => ((ticks * 1_000_000_000) + I8254.FrequencyHz - 1) / I8254.FrequencyHz;

    private void Program(int counter, int mode, int count)
    {
        _pit.Write(3, AccessWidth.Byte, (ulong)((counter << 6) | 0x30 | (mode << 1)));
        _pit.Write((uint)counter, AccessWidth.Byte, (ulong)(count & 0xFF));
        _pit.Write((uint)counter, AccessWidth.Byte, (ulong)(count >> 8));
    }

    private int Latched(int counter)
    {
        _pit.Write(3, AccessWidth.Byte, (ulong)(counter << 6));
        int low = (int)_pit.Read((uint)counter, AccessWidth.Byte);
        return low | ((int)_pit.Read((uint)counter, AccessWidth.Byte) << 8);
    }

    private byte Status(int counter)
    {
        _pit.Write(3, AccessWidth.Byte, (ulong)(0xE0 | (2 << counter)));
        return (byte)_pit.Read((uint)counter, AccessWidth.Byte);
    }

    [Fact]
    public void Counter0_AfterReset_TicksAt18Hz()
    {
        _clock.Advance(1_000_000_000);
        _irq.Rises.Should().BeInRange(18, 19);
    }

    [Fact]
    public void Mode2_At100Hz_Interrupts100TimesASecond()
    {
        Program(0, 2, 11932);
        int before = _irq.Rises;
        _clock.Advance(1_000_000_000);
        (_irq.Rises - before).Should().BeInRange(99, 100);
    }

    [Fact]
    public void Mode0_AfterCountPlusOne_RaisesAndStays()
    {
        Program(0, 0, 1000);
        _irq.Level.Should().BeFalse("OUT goes low with the control word");
        _clock.Advance(Ticks(1000));
        _irq.Level.Should().BeFalse();
        _clock.Advance(Ticks(1));
        _irq.Level.Should().BeTrue();
        _clock.Advance(1_000_000_000);
        _irq.Level.Should().BeTrue();
        _clock.ArmedTimers.Should().Be(0);
        Program(0, 0, 10);
        _irq.Level.Should().BeFalse();
    }

    [Fact]
    public void Mode4_AtTerminalCount_StrobesOnce()
    {
        Program(0, 4, 500);
        int before = _irq.Rises;
        _clock.Advance(Ticks(502));
        (_irq.Rises - before).Should().Be(1);
        _clock.Advance(1_000_000_000);
        (_irq.Rises - before).Should().Be(1);
    }

    [Theory]
    [InlineData(0, 1000, 400, 600)]
    [InlineData(2, 1000, 400, 600)]
    [InlineData(2, 1000, 1400, 600)]
    [InlineData(3, 1000, 100, 800)]
    [InlineData(3, 1000, 600, 800)]
    [InlineData(4, 1000, 400, 600)]
    public void Count_WhenLatched_IsWhatTheModeSays(int mode, int count, long ticks, int expected)
    {
        Program(0, mode, count);
        long start = _clock.NowNs;
        _clock.Advance(Ticks(ticks) - (_clock.NowNs - start));
        int value = Latched(0);
        _clock.Advance(Ticks(50));
        value.Should().BeInRange(expected - 2, expected + 2);
    }

    [Fact]
    public void Latch_UntilRead_KeepsItsValue()
    {
        Program(0, 2, 0);
        _pit.Write(3, AccessWidth.Byte, 0);
        _clock.Advance(Ticks(1000));
        _pit.Write(3, AccessWidth.Byte, 0);
        int first = (int)_pit.Read(0, AccessWidth.Byte) | ((int)_pit.Read(0, AccessWidth.Byte) << 8);
        first.Should().Be(0, "the first latch wins; 65536 shows as 0");
        Latched(0).Should().BeInRange(65536 - 1002, 65536 - 998);
    }

    [Fact]
    public void Bcd_Counting_IsDecimal()
    {
        _pit.Write(3, AccessWidth.Byte, 0x35);
        _pit.Write(0, AccessWidth.Byte, 0x00);
        _pit.Write(0, AccessWidth.Byte, 0x20);
        _clock.Advance(Ticks(500));
        Latched(0).Should().BeInRange(0x1498, 0x1502);
    }

    [Fact]
    public void ReadBack_Status_ShowsModeAndOutput()
    {
        Program(2, 3, 1000);
        Status(2).Should().Be(0xB6, "output high, loaded, both bytes, mode 3");
        _pit.Write(3, AccessWidth.Byte, 0xB0);
        Status(2).Should().Be(0x70, "no count yet: NULL COUNT, and OUT is low in mode 0");
    }

    [Fact]
    public void Port61_GatesCounter2AndShowsItsOutput()
    {
        Program(2, 0, 1000);
        _clock.Advance(Ticks(5000));
        (_pit.SpeakerWindow.Read(0, AccessWidth.Byte) & 0x20).Should().Be(0, "the gate is off");
        _pit.SpeakerWindow.Write(0, AccessWidth.Byte, 1);
        _clock.Advance(Ticks(900));
        (_pit.SpeakerWindow.Read(0, AccessWidth.Byte) & 0x21).Should().Be(0x01);
        _pit.SpeakerWindow.Write(0, AccessWidth.Byte, 0);
        _clock.Advance(Ticks(5000));
        _pit.SpeakerWindow.Write(0, AccessWidth.Byte, 3);
        (_pit.SpeakerWindow.Read(0, AccessWidth.Byte) & 0x23).Should().Be(0x03, "the count stood still");
        _clock.Advance(Ticks(102));
        (_pit.SpeakerWindow.Read(0, AccessWidth.Byte) & 0x20).Should().Be(0x20);
    }

    [Fact]
    public void Port61_RefreshBit_Toggles()
    {
        ulong first = _pit.SpeakerWindow.Read(0, AccessWidth.Byte) & 0x10;
        _clock.Advance(15_100);
        (_pit.SpeakerWindow.Read(0, AccessWidth.Byte) & 0x10).Should().NotBe(first);
    }

    [Fact]
    public void Mode2_WithANewCount_FinishesThePeriodFirst()
    {
        Program(0, 2, 10000);
        _clock.Advance(Ticks(4000));
        int before = _irq.Rises;
        _pit.Write(0, AccessWidth.Byte, 0xE8);
        _pit.Write(0, AccessWidth.Byte, 0x03);
        _clock.Advance(Ticks(5990));
        _irq.Rises.Should().Be(before);
        _clock.Advance(Ticks(20));
        _irq.Rises.Should().Be(before + 1);
        _clock.Advance(Ticks(1000));
        _irq.Rises.Should().Be(before + 2);
    }

    [Fact]
    public void Mode3_WithDivisor1_IsThrottled()
    {
        Program(0, 3, 1);
        int before = _irq.Rises;
        _clock.Advance(10_000_000);
        (_irq.Rises - before).Should().BeInRange(100, 201);
    }

    [Fact]
    public void Pause_StopsInterrupts()
    {
        _pit.Pause();
        int before = _irq.Rises;
        _clock.Advance(1_000_000_000);
        _irq.Rises.Should().Be(before);
        _pit.Resume();
        _clock.Advance(60_000_000);
        _irq.Rises.Should().Be(before + 1);
    }

    [Fact]
    public void State_SavedAndLoaded_IsTheSame()
    {
        Program(0, 2, 11932);
        Program(2, 0, 1000);
        _pit.SpeakerWindow.Write(0, AccessWidth.Byte, 3);
        _clock.Advance(Ticks(500));
        _pit.Pause();
        var line = new FakeIrqLine();
        var copy = new I8254(_clock, line);
        copy.Reset();
        DeviceCheck.Copy(_pit, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(_pit));
        copy.Resume();
        _clock.Advance(100_000_000);
        line.Rises.Should().BeInRange(9, 11);
    }

    [Fact]
    public void Ports_UnderRandomAccess_NeverThrow()
    {
        DeviceCheck.Fuzz(_pit, 1, 20000, random => _clock.Advance(random.Next(2000)));
        DeviceCheck.Fuzz(_pit.SpeakerWindow, 2, 2000, random =>
        {
            _pit.Write((uint)random.Next(4), AccessWidth.Byte, (ulong)random.Next(256));
            _clock.Advance(random.Next(3_000_000));
        });
    }
}

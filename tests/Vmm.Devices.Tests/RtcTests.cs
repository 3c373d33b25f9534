// SPDX-License-Identifier: BSD-2-Clause
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Legacy;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>Motorola MC146818A data sheet ADI-856R2.</summary>
public sealed class RtcTests
{
    private readonly ManualClock _clock = new();
    private readonly FakeIrqLine _irq = new();
    private readonly Mc146818 _rtc;

    public RtcTests()
    {
        // Tuesday, 2023-11-14 22:13:20 UTC.
        _clock.UnixStartNs = 1_700_000_000_000_000_000;
        _rtc = new Mc146818(_clock, _irq);
        _rtc.Reset();
        _rtc.Resume();
    }

    private byte Read(int index)
    {
        _rtc.Write(0, AccessWidth.Byte, (ulong)index);
        return (byte)_rtc.Read(1, AccessWidth.Byte);
    }

    private void Write(int index, byte value)
    {
        _rtc.Write(0, AccessWidth.Byte, (ulong)index);
        _rtc.Write(1, AccessWidth.Byte, value);
    }

    [Fact]
    public void Time_InBcd_IsTheCalendar()
    {
        Read(0).Should().Be(0x20);
        Read(2).Should().Be(0x13);
        Read(4).Should().Be(0x22);
        Read(6).Should().Be(3);
        Read(7).Should().Be(0x14);
        Read(8).Should().Be(0x11);
        Read(9).Should().Be(0x23);
        Read(0x32).Should().Be(0x20);
        Read(0x0D).Should().Be(0x80);
    }

    [Fact]
    public void Time_InBinary12Hours_UsesTheUpperBit()
    {
        Write(0x0B, 0x04);
        Read(4).Should().Be(0x8A);
        Read(0).Should().Be(20);
    }

    [Fact]
    public void Time_WhenSet_RunsOnFromThere()
    {
        Write(0x0B, 0x82);
        Write(0, 0x58);
        Write(2, 0x59);
        Write(4, 0x23);
        Write(7, 0x31);
        Write(8, 0x12);
        Write(9, 0x99);
        Write(0x32, 0x19);
        _clock.Advance(5_000_000_000);
        Read(0).Should().Be(0x58, "SET holds the time");
        Write(0x0B, 0x02);
        _clock.Advance(1_600_000_000);
        Read(0).Should().Be(0x00);
        Read(9).Should().Be(0x00);
        Read(0x32).Should().Be(0x20);
        Read(8).Should().Be(0x01);
        Read(6).Should().Be(7, "2000-01-01 was a Saturday");
    }

    [Fact]
    public void RegisterMasks_AreThoseOfTheChip()
    {
        Write(0x0A, 0xFF);
        (Read(0x0A) & 0x7F).Should().Be(0x7F);
        Write(0x0C, 0xFF);
        Write(0x0D, 0x00);
        Read(0x0D).Should().Be(0x80);
        Write(0x0B, 0xFF);
        Read(0x0B).Should().Be(0xEF, "SET clears UIE");
        Write(0x40, 0xA5);
        Read(0x40).Should().Be(0xA5);
    }

    [Fact]
    public void UpdateInProgress_IsSeenBeforeTheSecondChanges()
    {
        (Read(0x0A) & 0x80).Should().Be(0);
        _clock.Advance(998_000_000);
        (Read(0x0A) & 0x80).Should().Be(0x80);
        _clock.Advance(2_000_000);
        (Read(0x0A) & 0x80).Should().Be(0);
        Read(0).Should().Be(0x21);
    }

    [Theory]
    [InlineData(6, 1024)]
    [InlineData(15, 2)]
    [InlineData(3, 8192)]
    [InlineData(1, 256)]
    public void PeriodicInterrupt_ComesAtItsRate(byte rate, int hz)
    {
        Write(0x0A, (byte)(0x20 | rate));
        Write(0x0B, 0x42);
        int seen = 0;
        for (int i = 0; i < hz; i++)
        {
            _clock.Advance((1_000_000_000 / hz) + 1);
            if (_irq.Level)
            {
                seen++;
                (Read(0x0C) & 0xC0).Should().Be(0xC0);
            }

            _irq.Level.Should().BeFalse();
        }

        seen.Should().BeInRange(hz - 1, hz);
    }

    [Fact]
    public void UpdateInterrupt_ComesEachSecondOnceAcknowledged()
    {
        Write(0x0B, 0x12);
        _clock.Advance(1_000_000_000);
        _irq.Level.Should().BeTrue();
        (Read(0x0C) & 0x90).Should().Be(0x90);
        _irq.Level.Should().BeFalse();
        Read(0x0C).Should().Be(0);
        _clock.Advance(1_000_000_000);
        _irq.Level.Should().BeTrue();
    }

    [Theory]
    [InlineData(0x25, 0x13, 0x22, 5)]
    [InlineData(0x00, 0x14, 0xFF, 40)]
    [InlineData(0xFF, 0xFF, 0xFF, 1)]
    public void Alarm_WhenTheTimeMatches_Interrupts(byte second, byte minute, byte hour, int after)
    {
        Write(1, second);
        Write(3, minute);
        Write(5, hour);
        Write(0x0B, 0x22);
        _clock.Advance((after * 1_000_000_000L) - 1);
        _irq.Level.Should().BeFalse();
        _clock.Advance(1);
        _irq.Level.Should().BeTrue();
        (Read(0x0C) & 0xA0).Should().Be(0xA0);
    }

    [Fact]
    public void Flags_WithoutEnables_AreSetForPolling()
    {
        Read(0x0C);
        _clock.Advance(1_100_000_000);
        Read(0x0C).Should().Be(0x50, "PF and UF without IRQF");
        _irq.Rises.Should().Be(0);
        _clock.ArmedTimers.Should().Be(0);
    }

    [Fact]
    public void MemorySize_IsWhereABiosLooks()
    {
        _rtc.SetMemorySize(512UL << 20, 1UL << 32);
        (Read(0x15) | (Read(0x16) << 8)).Should().Be(640);
        (Read(0x34) | (Read(0x35) << 8)).Should().Be((512 - 16) * 16);
        (Read(0x30) | (Read(0x31) << 8)).Should().Be(0xFFFF);
        (Read(0x5B) | (Read(0x5C) << 8) | (Read(0x5D) << 16)).Should().Be(0x10000);
    }

    [Fact]
    public void State_SavedAndLoaded_IsTheSame()
    {
        Write(0x0B, 0x52);
        Write(0x50, 0x99);
        Write(0x0B, 0x82);
        Write(9, 0x10);
        Write(0x0B, 0x42);
        var copy = new Mc146818(_clock, new FakeIrqLine());
        DeviceCheck.Copy(_rtc, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(_rtc));
    }

    [Fact]
    public void Ports_UnderRandomAccess_NeverThrow() => DeviceCheck.Fuzz(_rtc, 5, 30000, random =>
    {
        _rtc.Write(0, AccessWidth.Byte, (ulong)random.Next(16));
        _rtc.Write(1, AccessWidth.Byte, (ulong)random.Next(256));
        _clock.Advance(random.Next(100_000));
    });
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Legacy;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>SDM 3A chapter 11; 82093AA data sheet 290566-001.</summary>
public sealed class ApicTests
{
    private const long TscKhz = 2_000_000;

    private readonly ManualClock _clock = new();
    private readonly ApicBus _bus = new();
    private readonly List<LocalApic> _apics = [];
    private readonly List<Waker> _wakers = [];
    private I8259Pair _pic = null!;

    private void Make(int count)
    {
        _pic = new I8259Pair(new DelegateLine(level => _apics[0].Lint0.Set(level)));
        for (int i = 0; i < count; i++)
        {
            var apic = new LocalApic(
                i, _bus, _clock, TscKhz, ns => (ulong)ns * (ulong)TscKhz / 1_000_000, i == 0 ? _pic : null);
            var waker = new Waker();
            apic.Attach(waker);
            apic.Reset();
            apic.Resume();
            _apics.Add(apic);
            _wakers.Add(waker);
        }
    }

    private void MakeEnabled(int count)
    {
        Make(count);
        for (int i = 0; i < count; i++)
        {
            Write(i, 0x0F0, 0x1FF);
        }
    }

    private uint Read(int apic, uint offset) => (uint)_apics[apic].Registers.Read(offset, AccessWidth.Dword);

    private void Write(int apic, uint offset, uint value) =>
        _apics[apic].Registers.Write(offset, AccessWidth.Dword, value);

    private void Msi(uint destination, uint data, bool logical = false) =>
        _bus.Send(0xFEE0_0000 | (destination << 12) | (logical ? 4u : 0), data);

    // Table 11-1.
    [Theory]
    [InlineData(0x020, 0x0000_0000)]
    [InlineData(0x030, 0x0105_0014)]
    [InlineData(0x080, 0)]
    [InlineData(0x0D0, 0)]
    [InlineData(0x0E0, 0xFFFF_FFFF)]
    [InlineData(0x0F0, 0xFF)]
    [InlineData(0x100, 0)]
    [InlineData(0x180, 0)]
    [InlineData(0x200, 0)]
    [InlineData(0x280, 0)]
    [InlineData(0x300, 0)]
    [InlineData(0x310, 0)]
    [InlineData(0x320, 0x1_0000)]
    [InlineData(0x330, 0x1_0000)]
    [InlineData(0x340, 0x1_0000)]
    [InlineData(0x350, 0x0_0700)]
    [InlineData(0x360, 0x1_0000)]
    [InlineData(0x370, 0x1_0000)]
    [InlineData(0x380, 0)]
    [InlineData(0x390, 0)]
    [InlineData(0x3E0, 0)]
    public void Registers_AfterReset_HavePowerOnValues(uint offset, uint expected)
    {
        Make(1);
        Read(0, offset).Should().Be(expected);
    }

    [Theory]
    [InlineData(0x020, 0u)]
    [InlineData(0x030, 0x0105_0014u)]
    [InlineData(0x080, 0xFFu)]
    [InlineData(0x0D0, 0xFF00_0000u)]
    [InlineData(0x0E0, 0xFFFF_FFFFu)]
    [InlineData(0x0F0, 0x11FFu)]
    [InlineData(0x310, 0xFF00_0000u)]
    [InlineData(0x320, 0x7_00FFu)]
    [InlineData(0x330, 0x1_07FFu)]
    [InlineData(0x340, 0x1_07FFu)]
    [InlineData(0x350, 0x1_A7FFu)]
    [InlineData(0x360, 0x1_A7FFu)]
    [InlineData(0x370, 0x1_00FFu)]
    [InlineData(0x3E0, 0xBu)]
    public void Registers_AfterWritingOnes_KeepTheirMask(uint offset, uint expected)
    {
        MakeEnabled(1);
        Write(0, offset, 0xFFFF_FFFF);
        Read(0, offset).Should().Be(expected);
    }

    [Fact]
    public void Fixed_ThroughIrrAndIsr_ReachesTheProcessorInPriorityOrder()
    {
        MakeEnabled(1);
        Msi(0, 0x31);
        Msi(0, 0x55);
        _wakers[0].Wakes.Should().BePositive();
        _apics[0].HasInterrupt.Should().BeTrue();
        Read(0, 0x210).Should().Be(1u << 0x11);
        _apics[0].Acknowledge().Should().Be(0x55);
        Read(0, 0x120).Should().Be(1u << 0x15);
        Read(0, 0x0A0).Should().Be(0x50, "PPR follows the vector in service");
        _apics[0].HasInterrupt.Should().BeFalse();
        Msi(0, 0x5A);
        _apics[0].HasInterrupt.Should().BeFalse("same class does not nest");
        Write(0, 0x0B0, 0);
        _apics[0].Acknowledge().Should().Be(0x5A);
        Write(0, 0x0B0, 0);
        _apics[0].Acknowledge().Should().Be(0x31);
        Write(0, 0x0B0, 0);
        _apics[0].Acknowledge().Should().Be(-1);
    }

    [Fact]
    public void Tpr_AndCr8_HoldBackLowerClasses()
    {
        MakeEnabled(1);
        Write(0, 0x080, 0x45);
        _apics[0].Cr8.Should().Be(4);
        Msi(0, 0x45);
        _apics[0].HasInterrupt.Should().BeFalse();
        Msi(0, 0x51);
        _apics[0].HasInterrupt.Should().BeTrue();
        _apics[0].Cr8 = 5;
        _apics[0].Acknowledge().Should().Be(-1, "it was deliverable a moment ago");
        _apics[0].Cr8 = 0;
        Read(0, 0x080).Should().Be(0);
        _apics[0].Acknowledge().Should().Be(0x51);
    }

    [Fact]
    public void SoftwareDisabled_Apic_DropsFixedButTakesNmi()
    {
        MakeEnabled(1);
        Write(0, 0x0F0, 0xFF);
        Msi(0, 0x55);
        _apics[0].HasInterrupt.Should().BeFalse();
        Msi(0, 0x400);
        _apics[0].TakeNmi().Should().BeTrue();
        _apics[0].TakeNmi().Should().BeFalse();
        (Read(0, 0x320) & 0x1_0000).Should().Be(0x1_0000);
        Write(0, 0x320, 0x20);
        (Read(0, 0x320) & 0x1_0000).Should().Be(0x1_0000, "LVT stays masked while disabled (11.4.7.2)");
    }

    [Theory]
    [InlineData(0x02, 1)]
    [InlineData(0xFF, 15)]
    [InlineData(0x05, 5)]
    public void LogicalFlat_Destination_MatchesLdrBits(uint set, int expectedMask)
    {
        MakeEnabled(4);
        for (int i = 0; i < 4; i++)
        {
            Write(i, 0x0D0, 1u << (24 + i));
        }

        Msi(set, 0x40, logical: true);
        int mask = 0;
        for (int i = 0; i < 4; i++)
        {
            mask |= _apics[i].HasInterrupt ? 1 << i : 0;
        }

        mask.Should().Be(set == 0x02 ? 2 : expectedMask);
    }

    [Fact]
    public void LogicalCluster_Destination_MatchesClusterAndBits()
    {
        MakeEnabled(3);
        for (int i = 0; i < 3; i++)
        {
            Write(i, 0x0E0, 0x0FFF_FFFF);
        }

        Write(0, 0x0D0, 0x1100_0000);
        Write(1, 0x0D0, 0x1200_0000);
        Write(2, 0x0D0, 0x2100_0000);
        Msi(0x13, 0x40, logical: true);
        _apics[0].HasInterrupt.Should().BeTrue();
        _apics[1].HasInterrupt.Should().BeTrue();
        _apics[2].HasInterrupt.Should().BeFalse();
    }

    [Fact]
    public void LowestPriority_Message_GoesToTheIdlestOfTheSet()
    {
        MakeEnabled(3);
        for (int i = 0; i < 3; i++)
        {
            Write(i, 0x0D0, 1u << (24 + i));
        }

        Write(0, 0x080, 0x80);
        Write(2, 0x080, 0x40);
        Msi(7, 0x161, logical: true);
        _apics[0].HasInterrupt.Should().BeFalse();
        _apics[1].HasInterrupt.Should().BeTrue();
        _apics[2].HasInterrupt.Should().BeFalse();
    }

    [Fact]
    public void Physical_Broadcast_ReachesAll()
    {
        MakeEnabled(3);
        Msi(0xFF, 0x40);
        _apics.Should().OnlyContain(a => a.HasInterrupt);
        Msi(9, 0x41);
        _bus.Unclaimed.Should().Be(1);
    }

    [Theory]
    [InlineData(0x0004_0041u, 1)]
    [InlineData(0x0008_0041u, 7)]
    [InlineData(0x000C_0041u, 6)]
    [InlineData(0x0000_0041u, 4)]
    public void Ipi_ByShorthandOrDestination_ReachesItsTargets(uint low, int expected)
    {
        MakeEnabled(3);
        Write(0, 0x310, 2u << 24);
        Write(0, 0x300, low);
        int mask = 0;
        for (int i = 0; i < 3; i++)
        {
            mask |= _apics[i].HasInterrupt ? 1 << i : 0;
        }

        mask.Should().Be(expected);
        (Read(0, 0x300) & 0x1000).Should().Be(0, "delivery is done at once");
    }

    [Fact]
    public void InitAndStartup_WakeAProcessorOnce()
    {
        MakeEnabled(2);
        Write(0, 0x310, 1u << 24);
        Write(0, 0x300, 0x0000_C500);
        _apics[1].HasInit.Should().BeTrue();
        Write(0, 0x300, 0x0000_8500);
        Write(0, 0x300, 0x0000_4608);
        _apics[1].TakeInit().Should().BeTrue();
        Read(1, 0x0F0).Should().Be(0xFF, "INIT resets the APIC");
        _apics[1].TakeStartup(out byte vector).Should().BeTrue();
        vector.Should().Be(8);
        Write(0, 0x300, 0x0000_4609);
        _apics[1].TakeStartup(out _).Should().BeFalse("a running processor ignores start-up IPIs (11.4.7)");
        _apics[0].HasInit.Should().BeFalse();
    }

    [Fact]
    public void IllegalVectors_SetErrorsAndInterrupt()
    {
        MakeEnabled(2);
        Write(0, 0x370, 0xFE);
        Write(0, 0x300, 0x0004_0005);
        _apics[0].Acknowledge().Should().Be(0xFE);
        Read(0, 0x280).Should().Be(0);
        Write(0, 0x280, 0);
        Read(0, 0x280).Should().Be(0x20);
        Msi(0, 0x07);
        Read(0, 0x3F0);
        Write(0, 0x280, 0);
        Read(0, 0x280).Should().Be(0xC0, "receive illegal vector and illegal register");
        Write(0, 0x280, 0);
        Read(0, 0x280).Should().Be(0);
    }

    [Fact]
    public void OneShotTimer_CountsDownAndFiresOnce()
    {
        MakeEnabled(1);
        Write(0, 0x3E0, 0x3);
        Write(0, 0x320, 0x30);
        Write(0, 0x380, 1000);
        _clock.Advance(8000);
        Read(0, 0x390).Should().Be(500, "divided by 16");
        _apics[0].HasInterrupt.Should().BeFalse();
        _clock.Advance(8000);
        _apics[0].Acknowledge().Should().Be(0x30);
        Read(0, 0x390).Should().Be(0);
        Write(0, 0x0B0, 0);
        _clock.Advance(1_000_000);
        _apics[0].HasInterrupt.Should().BeFalse();
    }

    [Fact]
    public void OneShotTimer_OverBeforeItIsArmed_StillFires()
    {
        var clock = new RestlessClock();
        var apic = new LocalApic(0, new ApicBus(), clock, TscKhz, _ => 0, null);
        apic.Reset();
        apic.Resume();
        apic.Registers.Write(0x0F0, AccessWidth.Dword, 0x1FF);
        apic.Registers.Write(0x320, AccessWidth.Dword, 0x30);
        apic.Registers.Write(0x380, AccessWidth.Dword, 15);
        clock.FireWhatIsDue();
        apic.Acknowledge().Should().Be(0x30);
        apic.Registers.Write(0x0B0, AccessWidth.Dword, 0);
        apic.Pause();
        apic.Resume();
        clock.FireWhatIsDue();
        apic.HasInterrupt.Should().BeFalse("it has fired");
    }

    [Fact]
    public void PeriodicTimer_FiresEachPeriodUntilMaskedOrZero()
    {
        MakeEnabled(1);
        Write(0, 0x3E0, 0xB);
        Write(0, 0x320, 0x2_0030);
        Write(0, 0x380, 1_000_000);
        for (int i = 0; i < 5; i++)
        {
            _clock.Advance(999_999);
            _apics[0].HasInterrupt.Should().BeFalse();
            _clock.Advance(1);
            _apics[0].Acknowledge().Should().Be(0x30);
            Write(0, 0x0B0, 0);
        }

        Write(0, 0x320, 0x3_0030);
        _clock.Advance(2_000_000);
        _apics[0].HasInterrupt.Should().BeFalse();
        Write(0, 0x320, 0x2_0030);
        Write(0, 0x380, 0);
        _clock.Advance(2_000_000);
        _apics[0].HasInterrupt.Should().BeFalse();
        _clock.ArmedTimers.Should().Be(0);
    }

    [Fact]
    public void PeriodicTimer_WithATinyPeriod_IsThrottled()
    {
        MakeEnabled(1);
        Write(0, 0x3E0, 0xB);
        Write(0, 0x320, 0x2_0030);
        Write(0, 0x380, 1);
        int before = _wakers[0].Wakes;
        _clock.Advance(10_000_000);
        (_wakers[0].Wakes - before).Should().BeInRange(100, 201);
    }

    // 11.5.4.1: the deadline is one of the counter, wherever the guest sets that.
    [Theory]
    [InlineData(1000L, 500)]
    [InlineData(-6000L, 4000)]
    [InlineData(2000L, 0)]
    public void TscDeadline_FollowsACounterThatIsSet(long offset, int afterNs)
    {
        MakeEnabled(1);
        Write(0, 0x320, 0x4_0030);
        _clock.Advance(4000);
        _apics[0].TryWriteMsr(0x6E0, 10000);

        _apics[0].SetTscOffset((ulong)offset);

        if (afterNs > 0)
        {
            _clock.Advance(afterNs - 1);
            _apics[0].HasInterrupt.Should().BeFalse();
        }

        _clock.Advance(1);
        _apics[0].Acknowledge().Should().Be(0x30);
    }

    // 11.5.4.1
    [Fact]
    public void TscDeadline_WhenReached_FiresAndClears()
    {
        MakeEnabled(1);
        _apics[0].TryWriteMsr(0x6E0, 5000).Should().BeTrue();
        _apics[0].TryReadMsr(0x6E0, out ulong value).Should().BeTrue();
        value.Should().Be(0, "ignored outside TSC-deadline mode");
        Write(0, 0x320, 0x4_0030);
        _apics[0].TryWriteMsr(0x6E0, 5000);
        _clock.Advance(2499);
        _apics[0].HasInterrupt.Should().BeFalse();
        _clock.Advance(1);
        _apics[0].Acknowledge().Should().Be(0x30);
        _apics[0].TryReadMsr(0x6E0, out value);
        value.Should().Be(0);
        Write(0, 0x0B0, 0);
        _apics[0].TryWriteMsr(0x6E0, 1);
        _apics[0].HasInterrupt.Should().BeTrue("a deadline in the past fires at once");
        Write(0, 0x380, 77);
        Read(0, 0x380).Should().Be(0, "the initial count is ignored in this mode");
    }

    // 11.5.4: the count goes on when the mode changes between one-shot and periodic.
    [Fact]
    public void TimerMode_WhenChanged_KeepsTheCount()
    {
        MakeEnabled(1);
        Write(0, 0x3E0, 0xB);
        Write(0, 0x320, 0x0_0030);
        Write(0, 0x380, 1_000_000);
        _clock.Advance(600_000);
        Write(0, 0x320, 0x2_0030);
        Read(0, 0x390).Should().Be(400_000);
        _clock.Advance(1_500_000);
        Read(0, 0x390).Should().Be(900_000);
        Write(0, 0x320, 0x0_0030);
        Read(0, 0x390).Should().Be(900_000, "the present period ends");
        _clock.Advance(900_000);
        Read(0, 0x390).Should().Be(0);
        Write(0, 0x320, 0x2_0030);
        _clock.Advance(300_000);
        Read(0, 0x390).Should().Be(0, "what has ended starts with the next initial count");
        _clock.ArmedTimers.Should().Be(0);
        Write(0, 0x380, 1_000_000);
        Read(0, 0x390).Should().Be(1_000_000);
    }

    // SDM 3A 6.7.1: one NMI is taken and one more is remembered.
    [Fact]
    public void Nmi_ComingTwice_IsTakenTwice()
    {
        MakeEnabled(1);
        for (int i = 0; i < 5; i++)
        {
            Msi(0, 0x400);
        }

        _apics[0].TakeNmi().Should().BeTrue();
        _apics[0].HasNmi.Should().BeTrue();
        _apics[0].TakeNmi().Should().BeTrue();
        _apics[0].TakeNmi().Should().BeFalse();
    }

    [Fact]
    public void X2Apic_Msrs_ReplaceTheRegisterPage()
    {
        MakeEnabled(3);
        LocalApic apic = _apics[2];
        apic.TryReadMsr(0x802, out _).Should().BeFalse("#GP outside x2APIC mode");
        apic.TryWriteMsr(0x1B, 0xFEE0_0C00).Should().BeTrue();
        apic.IsMemoryMapped.Should().BeFalse();
        apic.TryReadMsr(0x802, out ulong value).Should().BeTrue();
        value.Should().Be(2);
        apic.TryReadMsr(0x80D, out value).Should().BeTrue();
        value.Should().Be(4, "cluster 0, bit 2");
        apic.TryReadMsr(0x80E, out _).Should().BeFalse("there is no DFR");
        apic.TryWriteMsr(0x80D, 1).Should().BeFalse("LDR is read-only");
        apic.TryWriteMsr(0x80B, 1).Should().BeFalse("EOI takes only 0");
        apic.TryWriteMsr(0x808, 0x100).Should().BeFalse("reserved bits");
        apic.TryWriteMsr(0x83F, 0x71).Should().BeTrue();
        apic.Acknowledge().Should().Be(0x71);
        apic.TryWriteMsr(0x80B, 0).Should().BeTrue();
        apic.TryWriteMsr(0x830, 0x0000_0001_0000_0042).Should().BeTrue();
        _apics[1].Acknowledge().Should().Be(0x42);
        Write(1, 0x0B0, 0);
        apic.TryWriteMsr(0x830, 0x0000_0005_0000_0843).Should().BeTrue();
        _apics[0].HasInterrupt.Should().BeFalse("logical destination 5 is for x2APIC processors; 0 has an LDR of 0");
        apic.HasInterrupt.Should().BeTrue();
        apic.TryWriteMsr(0x830, 0xFFFF_FFFF_0000_0044).Should().BeTrue();
        _apics.Should().OnlyContain(a => a.HasInterrupt);
    }

    // Figure 11-27.
    [Theory]
    [InlineData(0xFEE0_0800UL, 0xFEE0_0C00UL, true)]
    [InlineData(0xFEE0_0800UL, 0xFEE0_0000UL, true)]
    [InlineData(0xFEE0_0800UL, 0xFEE0_0400UL, false)]
    [InlineData(0xFEE0_0C00UL, 0xFEE0_0800UL, false)]
    [InlineData(0xFEE0_0C00UL, 0xFEE0_0000UL, true)]
    [InlineData(0xFEE0_0000UL, 0xFEE0_0C00UL, false)]
    [InlineData(0xFEE0_0000UL, 0xFEE0_0800UL, true)]
    [InlineData(0xFEE0_0800UL, 0xFEE0_0A00UL, false)]
    [InlineData(0xFEE0_0800UL, 0x4000_FEE0_0800UL, false)]
    public void ApicBase_Transitions_FollowTheStateDiagram(ulong from, ulong to, bool allowed)
    {
        Make(1);
        _apics[0].ApicBase = from;
        _apics[0].TryWriteMsr(0x1B, to).Should().Be(allowed);
        _apics[0].ApicBase.Should().Be(allowed ? to : from);
    }

    [Fact]
    public void X2Apic_IdentifiersAbove255_AreReachable()
    {
        MakeEnabled(300);
        _apics[0].TryWriteMsr(0x1B, 0xFEE0_0D00);
        _apics[290].TryWriteMsr(0x1B, 0xFEE0_0C00);
        _apics[0].TryWriteMsr(0x830, (290UL << 32) | 0x55);
        _apics[290].Acknowledge().Should().Be(0x55);
        _apics[0].TryWriteMsr(0x830, (0x0012_0004UL << 32) | 0x856);
        _apics[290].HasInterrupt.Should().BeFalse("0x55 is still in service");
        _apics[290].TryWriteMsr(0x80B, 0);
        _apics[290].Acknowledge().Should().Be(0x56);
    }

    [Fact]
    public void ExtendedDestinationId_InAMessage_ReachesHighIdentifiers()
    {
        var bus = new ApicBus { ExtendedDestinationId = true };
        LocalApic apic = null!;
        for (int i = 0; i < 260; i++)
        {
            apic = new LocalApic(i, bus, _clock, TscKhz, _ => 0, null);
        }

        apic.Registers.Write(0xF0, AccessWidth.Dword, 0x1FF);
        bus.Send(0xFEE0_0000 | (3 << 12) | (1 << 5), 0x44);
        apic.HasInterrupt.Should().BeTrue();
    }

    [Fact]
    public void ExtInt_OfThe8259s_GoesThroughLint0()
    {
        Make(1);
        _pic.Reset();
        foreach (byte value in new byte[] { 0x08, 0x04, 0x01 })
        {
            if (value == 0x08)
            {
                _pic.MasterPorts.Write(0, AccessWidth.Byte, 0x11);
            }

            _pic.MasterPorts.Write(1, AccessWidth.Byte, value);
        }

        _pic.Input(0).Set(true);
        _apics[0].HasInterrupt.Should().BeTrue("virtual wire after reset");
        _apics[0].Acknowledge().Should().Be(0x08);
        _apics[0].HasInterrupt.Should().BeFalse();
        _pic.MasterPorts.Write(0, AccessWidth.Byte, 0x20);
        Write(0, 0x350, 0x1_0700);
        _pic.Input(1).Set(true);
        _apics[0].HasInterrupt.Should().BeFalse("LINT0 is masked");
        _apics[0].TryWriteMsr(0x1B, 0xFEE0_0100);
        _apics[0].HasInterrupt.Should().BeTrue("LINT0 is INTR while the APIC is off (11.4.3)");
        _apics[0].Acknowledge().Should().Be(0x09);
    }

    [Fact]
    public void Lint1_AsNmi_IsEdgeTriggered()
    {
        MakeEnabled(1);
        Write(0, 0x360, 0x400);
        _apics[0].Lint1.Set(true);
        _apics[0].TakeNmi().Should().BeTrue();
        _apics[0].Lint1.Set(true);
        _apics[0].HasNmi.Should().BeFalse();
        _apics[0].Lint1.Set(false);
        Write(0, 0x360, 0x1_0400);
        _apics[0].Lint1.Set(true);
        _apics[0].HasNmi.Should().BeFalse();
    }

    [Fact]
    public void LocalApic_SavedAndLoaded_IsTheSame()
    {
        MakeEnabled(1);
        Msi(0, 0xC055);
        _apics[0].Acknowledge();
        Msi(0, 0x31);
        Write(0, 0x320, 0x2_0030);
        Write(0, 0x380, 1_000_000);
        _clock.Advance(400_000);
        _apics[0].Pause();
        var copy = new LocalApic(0, new ApicBus(), _clock, TscKhz, _ => 0, null);
        DeviceCheck.Copy(_apics[0], copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(_apics[0]));
        copy.Registers.Write(0xB0, AccessWidth.Dword, 0);
        copy.Acknowledge().Should().Be(0x31);
        copy.Resume();
        copy.Registers.Write(0xB0, AccessWidth.Dword, 0);
        _clock.Advance(1_700_000);
        copy.Acknowledge().Should().Be(0x30);
    }

    [Fact]
    public void LocalApic_UnderRandomAccess_NeverThrows()
    {
        MakeEnabled(4);
        void Stir(Random random)
        {
            LocalApic apic = _apics[random.Next(4)];
            _bus.Send((ulong)random.NextInt64(), (uint)random.NextInt64());
            apic.TryWriteMsr((uint)random.Next(0x800, 0x840), (ulong)random.NextInt64() & 0xFFFF_FFFF_000F_FFFF);
            apic.TryReadMsr((uint)random.Next(0x800, 0x840), out _);
            apic.TryWriteMsr(0x6E0, (ulong)random.NextInt64());
            if (random.Next(8) == 0)
            {
                apic.TryWriteMsr(0x1B, 0xFEE0_0000 | ((ulong)random.Next(4) << 10));
                apic.Acknowledge();
                apic.TakeInit();
                apic.TakeStartup(out _);
            }

            _clock.Advance(random.Next(1000));
        }

        DeviceCheck.Fuzz(_apics[0].Registers, 1, 30000, Stir);
    }

    // 82093AA §3.2.4: masked after reset; identifier, version and entry masks.
    [Fact]
    public void IoApic_Registers_HaveResetValuesAndMasks()
    {
        var sink = new FakeMsiSink();
        var io = new IoApic(2, sink);
        io.Reset();
        IoRead(io, 0).Should().Be(0x0200_0000);
        IoRead(io, 1).Should().Be(0x0017_0020);
        for (uint i = 0; i < 24; i++)
        {
            IoRead(io, 0x10 + (i * 2)).Should().Be(0x1_0000);
            IoRead(io, 0x11 + (i * 2)).Should().Be(0);
            IoWrite(io, 0x10 + (i * 2), 0xFFFF_FFFF);
            IoWrite(io, 0x11 + (i * 2), 0xFFFF_FFFF);
            IoRead(io, 0x10 + (i * 2)).Should().Be(0x1_AFFF);
            IoRead(io, 0x11 + (i * 2)).Should().Be(0xFF00_0000);
        }

        IoWrite(io, 0x40, 0xFFFF_FFFF);
        IoRead(io, 0x40).Should().Be(0);
    }

    [Theory]
    [InlineData(0)]
    [InlineData(2)]
    [InlineData(9)]
    [InlineData(23)]
    public void IoApic_EdgeInput_SendsPerEdge(int pin)
    {
        var sink = new FakeMsiSink();
        var io = new IoApic(0, sink);
        io.Reset();
        io.Input(pin).Set(true);
        sink.Messages.Should().BeEmpty();
        io.IgnoredEdges.Should().Be(1);
        IoWrite(io, 0x11 + ((uint)pin * 2), 0x0300_0000);
        IoWrite(io, 0x10 + ((uint)pin * 2), 0x0000_0831);
        sink.Messages.Should().BeEmpty("edges while masked are ignored");
        io.Input(pin).Set(false);
        io.Input(pin).Set(true);
        sink.Messages.Should().Equal((0xFEE0_3004UL, 0x31u));
    }

    [Fact]
    public void IoApic_LevelInput_SendsUntilItIsGone()
    {
        MakeEnabled(1);
        var io = new IoApic(0, _bus);
        io.Reset();
        _bus.AddEoiListener(io);
        IoWrite(io, 0x10 + 22, 0x0000_8061);
        io.Input(11).Set(true);
        _apics[0].Acknowledge().Should().Be(0x61);
        IoRead(io, 0x10 + 22).Should().Be(0x0000_C061, "remote IRR is set");
        _apics[0].HasInterrupt.Should().BeFalse();
        Write(0, 0x0B0, 0);
        _apics[0].Acknowledge().Should().Be(0x61, "still asserted");
        io.Input(11).Set(false);
        Write(0, 0x0B0, 0);
        _apics[0].HasInterrupt.Should().BeFalse();
        IoRead(io, 0x10 + 22).Should().Be(0x0000_8061);
        Write(0, 0x0F0, 0x11FF);
        io.Input(11).Set(true);
        _apics[0].Acknowledge();
        Write(0, 0x0B0, 0);
        _apics[0].HasInterrupt.Should().BeFalse("broadcast is suppressed");
        io.Write(0x40, AccessWidth.Dword, 0x61);
        _apics[0].HasInterrupt.Should().BeTrue("the EOI register ends it");
    }

    [Fact]
    public void IoApic_SavedAndLoaded_IsTheSameAndNeverThrows()
    {
        var io = new IoApic(1, new FakeMsiSink());
        io.Reset();
        DeviceCheck.Fuzz(io, 1, 20000, random =>
        {
            io.Write(0, AccessWidth.Dword, (ulong)random.Next(0x48));
            io.Write(0x10, AccessWidth.Dword, (ulong)random.NextInt64() & 0xFFFF_FFFF);
            io.Input(random.Next(24)).Set(random.Next(2) == 0);
            io.EndOfInterrupt((byte)random.Next(256));
        });
        var copy = new IoApic(1, new FakeMsiSink());
        DeviceCheck.Copy(io, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(io));
    }

    private static uint IoRead(IoApic io, uint register)
    {
        io.Write(0, AccessWidth.Dword, register);
        return (uint)io.Read(0x10, AccessWidth.Dword);
    }

    private static void IoWrite(IoApic io, uint register, uint value)
    {
        io.Write(0, AccessWidth.Dword, register);
        io.Write(0x10, AccessWidth.Dword, value);
    }

    private sealed class Waker : ICpuWaker
    {
        public int Wakes { get; private set; }

        public void Wake() => Wakes++;
    }

    /// <summary>A busy host: much time passes between any two looks at the clock.</summary>
    private sealed class RestlessClock : IClock
    {
        private readonly List<Timer> _timers = [];
        private long _nowNs;

        public long NowNs => _nowNs += 50_000;

        public long UnixTimeNs => 0;

        public IGuestTimer CreateTimer(string name, Action onExpire)
        {
            var timer = new Timer(onExpire);
            _timers.Add(timer);
            return timer;
        }

        internal void FireWhatIsDue()
        {
            foreach (Timer timer in _timers)
            {
                if (timer.IsArmed && timer.DeadlineNs <= NowNs)
                {
                    timer.IsArmed = false;
                    timer.OnExpire();
                }
            }
        }

        private sealed class Timer(Action onExpire) : IGuestTimer
        {
            public Action OnExpire { get; } = onExpire;

            public bool IsArmed { get; set; }

            public long DeadlineNs { get; private set; }

            public void ArmAt(long deadlineNs)
            {
                IsArmed = true;
                DeadlineNs = deadlineNs;
            }

            public void Cancel() => IsArmed = false;

            public void Dispose() => Cancel();
        }
    }
}

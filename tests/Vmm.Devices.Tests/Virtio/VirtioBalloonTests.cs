// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Virtio;

public sealed class VirtioBalloonTests : IDisposable, IMemoryReclaimer
{
    private readonly List<(ulong Address, ulong Length)> _released = [];
    private readonly VirtioBalloon _balloon;
    private readonly VirtioRig _rig;

    public VirtioBalloonTests()
    {
        _balloon = new VirtioBalloon(this);
        _rig = new VirtioRig(_balloon);
    }

    public bool TryRelease(ulong guestAddress, ulong lengthBytes)
    {
        _released.Add((guestAddress, lengthBytes));
        return true;
    }

    public void Dispose() => _rig.Dispose();

    [Fact]
    public void Target_IsShownAndAnnounced()
    {
        _rig.Driver.Start(0, 2);
        _balloon.TargetPages = 1000;
        _rig.Driver.ReadConfig(0, AccessWidth.Dword).Should().Be(1000);
        (_rig.Driver.InterruptStatus & 2).Should().Be(2);
        _rig.Driver.WriteConfig(4, AccessWidth.Dword, 400);
        _balloon.ActualPages.Should().Be(400);
    }

    [Fact]
    public void Inflate_ReleasesRunsOfPagesAtOnce()
    {
        _rig.Driver.Start(0, 2);
        byte[] frames = new byte[24];
        uint[] numbers = [12, 10, 11, 500, 0xFFFF_FFFF, 501];
        for (int i = 0; i < numbers.Length; i++)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(frames.AsSpan(4 * i), numbers[i]);
        }

        _rig.Send(0, frames);
        _released.Should().Equal((0xA000UL, 0x3000UL), (0x1F4000UL, 0x2000UL), (0xFFFF_FFFF000UL, 0x1000UL));
        _rig.Send(1, frames);
        _released.Should().HaveCount(3, "deflating releases nothing");
    }

    [Fact]
    public void Statistics_AreReadOnRequest()
    {
        _rig.Driver.Start(2, 3);
        PutStatistic(4, 123456);
        ushort id = _rig.Driver[2].Add(new DriverBuffer(0x200000, 10, false));
        _rig.Driver.Kick(2);
        _balloon.Statistics()[BalloonStatistic.FreeMemory].Should().Be(123456);
        _rig.Driver[2].TryTakeUsed(out _, out _).Should().BeFalse("the buffer is the next question");
        _balloon.RequestStatistics();
        _rig.Driver[2].TryTakeUsed(out ushort used, out _).Should().BeTrue();
        used.Should().Be(id);
        PutStatistic(5, 99);
        _rig.Driver[2].Add(new DriverBuffer(0x200000, 10, false));
        _rig.Driver.Kick(2);
        _balloon.StatisticsCount.Should().Be(2);
        _balloon.Statistics()[BalloonStatistic.TotalMemory].Should().Be(99);
    }

    [Theory]
    [InlineData(0x22UL, 3)]
    [InlineData(0x20UL, 2)]
    public void Reporting_ReleasesTheBuffers(ulong features, int queue)
    {
        _rig.Driver.Start(features, queue + 1);
        _rig.Driver[queue].Add(new DriverBuffer(0x200000, 0x20000, true), new DriverBuffer(0x100010, 0x1000, true));
        _rig.Driver.Kick(queue);
        _rig.Driver[queue].TryTakeUsed(out _, out uint length).Should().BeTrue();
        length.Should().Be(0);
        _released.Should().Equal((0x200000UL, 0x20000UL));
        _balloon.ReportedBytes.Should().Be(0x20000);
    }

    [Fact]
    public void Save_WithHeldStatisticsBuffer_KeepsIt()
    {
        _rig.Driver.Start(2, 3);
        PutStatistic(4, 1);
        ushort id = _rig.Driver[2].Add(new DriverBuffer(0x200000, 10, false));
        _rig.Driver.Kick(2);
        _balloon.TargetPages = 77;
        _rig.Mmio.Pause();
        var balloon = new VirtioBalloon(this);
        using var other = new VirtioRig(balloon, _rig.Ram, resume: false);
        DeviceCheck.Copy(_rig.Mmio, other.Mmio);
        other.Mmio.Resume();
        balloon.TargetPages.Should().Be(77);
        balloon.RequestStatistics();
        _rig.Driver[2].TryTakeUsed(out ushort used, out _).Should().BeTrue();
        used.Should().Be(id);
    }

    private void PutStatistic(ushort tag, ulong value)
    {
        _rig.Ram.WriteNumber(0x200000, 2, tag);
        _rig.Ram.WriteNumber(0x200002, 8, value);
    }
}

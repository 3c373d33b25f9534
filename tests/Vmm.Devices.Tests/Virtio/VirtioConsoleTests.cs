// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Text;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Virtio;

public sealed class VirtioConsoleTests : IDisposable
{
    private readonly FakeCharBackend _terminal = new();
    private readonly FakeCharBackend _agent = new();
    private readonly VirtioRig _rig;

    public VirtioConsoleTests() => _rig = new VirtioRig(MakeModel(_terminal, _agent));

    public void Dispose() => _rig.Dispose();

    [Fact]
    public void Output_OfAnyLength_ReachesTheBackend()
    {
        _rig.Driver.Start(0, 2);
        byte[] text = new byte[10_000];
        new Random(1).NextBytes(text);
        _rig.Send(1, text);
        _terminal.Output.Should().Equal(text);
    }

    [Fact]
    public void Input_WaitsForBuffersAndResumes()
    {
        _terminal.Type(1).Should().Be(0, "nobody listens before DRIVER_OK");
        _rig.Driver.Start(0, 2);
        _terminal.Type(Encoding.ASCII.GetBytes("hello")).Should().Be(5);
        _rig.Offer(0, 2, 3);
        _rig.Take(0).Should().Equal(Encoding.ASCII.GetBytes("hel"));
        _rig.Take(0).Should().Equal(Encoding.ASCII.GetBytes("lo"));
        int before = _terminal.Resumed;
        _terminal.Type(new byte[5000]).Should().Be(4096, "that is the buffer");
        _rig.Offer(0, 1, 4096);
        _rig.Take(0).Should().HaveCount(4096);
        _terminal.Resumed.Should().BeGreaterThan(before);
    }

    [Fact]
    public void Multiport_Handshake_NamesAndOpensPorts()
    {
        _rig.Driver.Start(2, 6);
        _rig.Offer(2, 16, 64);
        Control(0xFFFF_FFFF, 0, 1);
        _rig.Take(2).Should().Equal(0, 0, 0, 0, 1, 0, 1, 0);
        _rig.Take(2).Should().Equal(1, 0, 0, 0, 1, 0, 1, 0);
        Control(0, 3, 1);
        _rig.Take(2).Should().Equal(0, 0, 0, 0, 4, 0, 1, 0);
        _rig.Take(2).Should().Equal(0, 0, 0, 0, 6, 0, 1, 0);
        Control(1, 3, 1);
        _rig.Take(2).Should().Equal([1, 0, 0, 0, 7, 0, 1, 0, .. Encoding.UTF8.GetBytes("org.agent")]);
        _rig.Take(2).Should().Equal(1, 0, 0, 0, 6, 0, 1, 0);
        _rig.Send(5, "x"u8);
        _agent.Output.Should().Equal((byte)'x');
        _rig.Offer(4, 1, 16, 0x310000);
        _agent.Type((byte)'y');
        _rig.Take(4).Should().Equal((byte)'y');
    }

    [Fact]
    public void Control_FromFloodingGuest_IsBounded()
    {
        _rig.Driver.Start(2, 6);
        for (int i = 0; i < 1000; i++)
        {
            Control(1, 3, 1);
        }

        Control(99, 3, 1);
        Control(0, 999, 1);
        _rig.Send(3, [1, 2]);
        ((VirtioConsole)_rig.Mmio.Device.Model).DroppedControl.Should().Be(2000 - 256);
    }

    [Fact]
    public void Resize_ChangesConfigAndTells()
    {
        _rig.Driver.Start(3, 6);
        _rig.Offer(2, 4, 64);
        ((VirtioConsole)_rig.Mmio.Device.Model).Resize(132, 50);
        _rig.Driver.ReadConfig(0, AccessWidth.Word).Should().Be(132);
        _rig.Driver.ReadConfig(2, AccessWidth.Word).Should().Be(50);
        _rig.Take(2).Should().Equal(0, 0, 0, 0, 5, 0, 0, 0, 132, 0, 50, 0);
    }

    [Fact]
    public void EmergencyWrite_NeedsNoQueues()
    {
        _rig.Driver.WriteConfig(8, AccessWidth.Dword, 'P');
        _terminal.Output.Should().Equal((byte)'P');
    }

    [Fact]
    public void Save_Load_KeepsInputAndControlMessages()
    {
        _rig.Driver.Start(2, 6);
        Control(0xFFFF_FFFF, 0, 1);
        _terminal.Type(1, 2, 3);
        _rig.Mmio.Pause();
        using var other = new VirtioRig(MakeModel(new FakeCharBackend(), new FakeCharBackend()), _rig.Ram, resume: false);
        DeviceCheck.Copy(_rig.Mmio, other.Mmio);
        DeviceCheck.StateOf(other.Mmio).Should().Equal(DeviceCheck.StateOf(_rig.Mmio));
        ushort control = _rig.Driver[2].Add(new DriverBuffer(0x300000, 64, true));
        ushort input = _rig.Driver[0].Add(new DriverBuffer(0x301000, 64, true));
        other.Mmio.Resume();
        _rig.Driver[2].TryTakeUsed(out ushort id, out uint length).Should().BeTrue();
        (id, length).Should().Be((control, 8u));
        _rig.Driver[0].TryTakeUsed(out id, out length).Should().BeTrue();
        (id, length).Should().Be((input, 3u));
        _rig.Ram.Bytes.Slice(0x301000, 3).ToArray().Should().Equal(1, 2, 3);
    }

    private static VirtioConsole MakeModel(FakeCharBackend terminal, FakeCharBackend agent) => new(
    [
        new VirtioConsolePort(terminal, IsConsole: true),
        new VirtioConsolePort(agent, "org.agent"),
    ]);

    private void Control(uint id, ushort what, ushort value) => _rig.Send(
        3, [(byte)id, (byte)(id >> 8), (byte)(id >> 16), (byte)(id >> 24), (byte)what, (byte)(what >> 8), (byte)value, 0]);
}

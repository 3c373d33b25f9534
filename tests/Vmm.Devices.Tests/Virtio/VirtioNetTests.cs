// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Virtio;

public sealed class VirtioNetTests : IDisposable
{
    private const ulong Csum = 1UL << 0;
    private const ulong GuestCsum = 1UL << 1;
    private const ulong Mrg = 1UL << 15;
    private const ulong Control = (1UL << 17) | (1UL << 18) | (1UL << 20) | (1UL << 23);
    private const ulong Tso = (1UL << 11) | (1UL << 12);
    private const ulong GuestTso = (1UL << 7) | (1UL << 8);

    private static readonly byte[] s_mac = [0x52, 0x54, 0, 1, 2, 3];

    private readonly FakeNetBackend _net = new();
    private readonly VirtioRig _rig;

    public VirtioNetTests() => _rig = new VirtioRig(new VirtioNet(_net, s_mac));

    public void Dispose() => _rig.Dispose();

    [Fact]
    public void Config_ShowsMacAndLink()
    {
        for (uint i = 0; i < 6; i++)
        {
            _rig.Driver.ReadConfig(i, AccessWidth.Byte).Should().Be(s_mac[i]);
        }

        _rig.Driver.ReadConfig(6, AccessWidth.Word).Should().Be(1);
        _rig.Driver.Start(1UL << 16, 2);
        ((VirtioNet)_rig.Mmio.Device.Model).IsLinkUp = false;
        _rig.Driver.ReadConfig(6, AccessWidth.Word).Should().Be(0);
        (_rig.Driver.InterruptStatus & 2).Should().Be(2);
    }

    [Fact]
    public void Transmit_StripsHeader_AndKeepsOffload()
    {
        _rig.Driver.Start(Csum | Tso, 2);
        byte[] packet = new byte[12 + 100];
        packet[0] = 1;
        packet[1] = 1;
        BinaryPrimitives.WriteUInt16LittleEndian(packet.AsSpan(2), 54);
        BinaryPrimitives.WriteUInt16LittleEndian(packet.AsSpan(4), 1460);
        BinaryPrimitives.WriteUInt16LittleEndian(packet.AsSpan(6), 34);
        BinaryPrimitives.WriteUInt16LittleEndian(packet.AsSpan(8), 16);
        packet.AsSpan(12).Fill(7);
        _rig.Send(1, packet);
        _net.Sent.Should().ContainSingle();
        _net.Sent[0].Frame.Should().HaveCount(100).And.OnlyContain(b => b == 7);
        _net.Sent[0].Offload.Should().Be(new NetOffload(true, 34, 16, 1, 1460, 54));
    }

    [Theory]
    [InlineData(1, 0, 0, 100, 10)]      // checksum field outside
    [InlineData(0, 1, 1460, 0, 0)]      // segmentation without checksum
    [InlineData(1, 1, 0, 34, 16)]       // segments of nothing
    [InlineData(1, 9, 1460, 34, 16)]    // unknown kind
    public void Transmit_NonsenseHeader_IsDropped(byte flags, byte kind, ushort size, ushort start, ushort offset)
    {
        _rig.Driver.Start(Csum | Tso, 2);
        byte[] packet = new byte[12 + 100];
        packet[0] = flags;
        packet[1] = kind;
        BinaryPrimitives.WriteUInt16LittleEndian(packet.AsSpan(4), size);
        BinaryPrimitives.WriteUInt16LittleEndian(packet.AsSpan(6), start);
        BinaryPrimitives.WriteUInt16LittleEndian(packet.AsSpan(8), offset);
        _rig.Send(1, packet);
        _rig.Send(1, new byte[12 + 13]);
        _net.Sent.Should().BeEmpty();
        ((VirtioNet)_rig.Mmio.Device.Model).DroppedTransmit.Should().Be(2);
    }

    [Fact]
    public void Receive_WithoutDriver_IsDropped_WithoutBuffers_IsKept()
    {
        _net.Deliver(new byte[60]).Should().BeTrue();
        _rig.Driver.Start(0, 2);
        _net.Deliver(new byte[60]).Should().BeFalse();
        int before = _net.Resumed;
        _rig.Offer(0, 1, 2048);
        _net.Resumed.Should().Be(before + 1);
        _net.Deliver(new byte[60]).Should().BeTrue();
        byte[] got = _rig.Take(0)!;
        got.Should().HaveCount(72);
        got[10].Should().Be(1, "num_buffers");
    }

    [Fact]
    public void Receive_Mergeable_SpreadsOverBuffers()
    {
        _rig.Driver.Start(Mrg, 2);
        _rig.Offer(0, 4, 512);
        byte[] frame = new byte[1200];
        new Random(2).NextBytes(frame);
        _net.Deliver(frame).Should().BeTrue();
        byte[] first = _rig.Take(0)!;
        first[10].Should().Be(3);
        byte[] all = [.. first.AsSpan(12), .. _rig.Take(0)!, .. _rig.Take(0)!];
        all.Should().Equal(frame);
        _net.Deliver(frame).Should().BeFalse("one buffer is left");
        _rig.Take(0).Should().BeNull("it was put back");
        _net.Deliver(new byte[400]).Should().BeTrue("it still serves a small frame");
    }

    [Fact]
    public void Receive_NotMergeable_TooSmallBuffer_DropsFrameAndKeepsBuffer()
    {
        _rig.Driver.Start(0, 2);
        _rig.Offer(0, 1, 512);
        _net.Deliver(new byte[1000]).Should().BeTrue();
        ((VirtioNet)_rig.Mmio.Device.Model).DroppedReceive.Should().Be(1);
        _net.Deliver(new byte[100]).Should().BeTrue();
        _rig.Take(0).Should().HaveCount(112);
    }

    [Fact]
    public void Receive_LargeSegment_PassesOrIsCutAsNegotiated()
    {
        (byte[] frame, NetOffload offload) = BigTcpFrame(4000, 1000);
        _rig.Driver.Start(Mrg | GuestCsum | GuestTso, 2);
        _net.Receiver.TakesOffload.Should().BeTrue();
        _rig.Offer(0, 8, 8192);
        _net.Deliver(frame, offload).Should().BeTrue();
        byte[] got = _rig.Take(0)!;
        got.Should().HaveCount(12 + frame.Length);
        got[0].Should().Be(1);
        got[1].Should().Be(1);

        var plain = new VirtioRig(new VirtioNet(_net, s_mac));
        using (plain)
        {
            plain.Driver.Start(Mrg, 2);
            _net.Receiver.TakesOffload.Should().BeFalse();
            plain.Offer(0, 8, 2048);
            _net.Deliver(frame, offload).Should().BeTrue();
            uint sequence = 1000;
            for (int i = 0; i < 4; i++)
            {
                byte[] segment = plain.Take(0)!.AsSpan(12).ToArray();
                segment.Should().HaveCount(54 + 1000);
                BinaryPrimitives.ReadUInt32BigEndian(segment.AsSpan(38)).Should().Be(sequence);
                sequence += 1000;
                NetFrames.Checksum(segment.AsSpan(14, 20)).Should().Be(0, "IP header");
                uint pseudo = NetFrames.Sum(segment.AsSpan(26, 8), 6 + 1020);
                NetFrames.Checksum(segment.AsSpan(34), pseudo).Should().Be(0, "TCP");
                (segment[47] & 8).Should().Be(i == 3 ? 8 : 0, "PSH belongs to the last");
            }

            plain.Take(0).Should().BeNull();
        }
    }

    [Fact]
    public void Receive_PartialChecksum_IsCompletedForPlainDriver()
    {
        (byte[] frame, NetOffload offload) = BigTcpFrame(100, 0);
        _rig.Driver.Start(Mrg, 2);
        _rig.Offer(0, 2, 2048);
        _net.Deliver(frame, offload with { SegmentKind = 0 }).Should().BeTrue();
        byte[] got = _rig.Take(0)!.AsSpan(12).ToArray();
        uint pseudo = NetFrames.Sum(got.AsSpan(26, 8), 6 + 120);
        NetFrames.Checksum(got.AsSpan(34), pseudo).Should().Be(0);
    }

    [Fact]
    public void Control_PromiscuousOff_FiltersByMac()
    {
        _rig.Driver.Start(Control, 3);
        _rig.Offer(0, 16, 2048);
        Command(0, 0, 0).Should().Be(0);
        _net.Deliver(FrameTo(9, 9, 9, 9, 9, 9)).Should().BeTrue();
        _rig.Take(0).Should().BeNull("not ours");
        _net.Deliver(FrameTo(s_mac)).Should().BeTrue();
        _rig.Take(0).Should().NotBeNull();
        _net.Deliver(FrameTo(255, 255, 255, 255, 255, 255)).Should().BeTrue();
        _rig.Take(0).Should().NotBeNull();
        _net.Deliver(FrameTo(1, 0, 0x5E, 0, 0, 1)).Should().BeTrue();
        _rig.Take(0).Should().BeNull("multicast not joined");
        Command(1, 0, 1, 0, 0, 0, 8, 8, 8, 8, 8, 8, 1, 0, 0, 0, 1, 0, 0x5E, 0, 0, 1).Should().Be(0);
        _net.Deliver(FrameTo(1, 0, 0x5E, 0, 0, 1)).Should().BeTrue();
        _rig.Take(0).Should().NotBeNull();
        _net.Deliver(FrameTo(8, 8, 8, 8, 8, 8)).Should().BeTrue();
        _rig.Take(0).Should().NotBeNull();
        Command(0, 5, 1).Should().Be(0);
        _net.Deliver(FrameTo(255, 255, 255, 255, 255, 255)).Should().BeTrue();
        _rig.Take(0).Should().BeNull("broadcasts are off");
        Command(1, 1, 2, 2, 2, 2, 2, 2).Should().Be(0);
        _rig.Driver.ReadConfig(0, AccessWidth.Byte).Should().Be(2);
    }

    [Theory]
    [InlineData(new byte[] { 0, 9, 1 })]
    [InlineData(new byte[] { 0, 0 })]
    [InlineData(new byte[] { 1, 0, 255, 255, 255, 255 })]
    [InlineData(new byte[] { 1, 0, 2, 0, 0, 0, 1, 1, 1, 1, 1, 1 })]
    [InlineData(new byte[] { 1, 1, 1 })]
    [InlineData(new byte[] { 4, 0, 1, 0 })]
    [InlineData(new byte[] { 77, 0, 1, 0 })]
    [InlineData(new byte[] { 5 })]
    public void Control_Nonsense_IsRefused(byte[] command)
    {
        _rig.Driver.Start(Control, 3);
        _rig.Call(2, command, 1).Should().Equal(1);
        _rig.Driver.Status.Should().Be(15);
    }

    [Fact]
    public void MultiQueue_ControlQueueMovesAndFlowsSpread()
    {
        using var rig = new VirtioRig(new VirtioNet(_net, s_mac, new VirtioNetOptions { QueuePairs = 4 }));
        rig.Driver.Start((1UL << 22) | Control, 9, 32);
        rig.Driver.ReadConfig(8, AccessWidth.Word).Should().Be(4);
        rig.Call(8, [4, 0, 4, 0], 1).Should().Equal(0);
        for (int i = 0; i < 4; i++)
        {
            rig.Offer(2 * i, 16, 2048, 0x300000 + ((ulong)i * 0x10000));
        }

        for (ushort port = 0; port < 16; port++)
        {
            byte[] frame = new byte[60];
            frame[12] = 8;
            BinaryPrimitives.WriteUInt16BigEndian(frame.AsSpan(36), (ushort)(port * 77));
            _net.Deliver(frame).Should().BeTrue();
        }

        int used = 0;
        for (int i = 0; i < 4; i++)
        {
            used += rig.Take(2 * i) is null ? 0 : 1;
        }

        used.Should().BeGreaterThan(1);
    }

    [Fact]
    public void Features_TsoWithoutChecksum_AreRefused()
    {
        _rig.Driver.Negotiate(Tso).Should().BeFalse();
        _rig.Driver.Negotiate(GuestTso).Should().BeFalse();
        _rig.Driver.Negotiate(1UL << 23).Should().BeFalse();
        _rig.Driver.Negotiate(Csum | Tso).Should().BeTrue();
    }

    [Fact]
    public void Save_Load_KeepsFiltersAndHoldsFrames()
    {
        _rig.Driver.Start(Control | (1UL << 21) | (1UL << 16), 3);
        _rig.Offer(0, 4, 2048);
        Command(0, 0, 0).Should().Be(0);
        _rig.Mmio.Pause();
        _net.Deliver(FrameTo(s_mac)).Should().BeFalse("paused: the network keeps it");
        var net = new FakeNetBackend();
        using var other = new VirtioRig(new VirtioNet(net, s_mac), _rig.Ram, resume: false);
        DeviceCheck.Copy(_rig.Mmio, other.Mmio);
        other.Mmio.Resume();
        net.Resumed.Should().BeGreaterThan(0);
        net.Deliver(FrameTo(9, 9, 9, 9, 9, 9)).Should().BeTrue();
        _rig.Take(0).Should().BeNull("the filter moved along");
        net.Deliver(FrameTo(s_mac)).Should().BeTrue();
        _rig.Take(0).Should().NotBeNull();
        other.Driver.ReadConfig(6, AccessWidth.Word).Should().Be(3, "the guest is asked to announce itself");
    }

    private static byte[] FrameTo(params byte[] mac)
    {
        byte[] frame = new byte[60];
        mac.CopyTo(frame, 0);
        return frame;
    }

    private static (byte[] Frame, NetOffload Offload) BigTcpFrame(int payload, ushort segment)
    {
        byte[] frame = new byte[54 + payload];
        frame[12] = 8;
        frame[14] = 0x45;
        BinaryPrimitives.WriteUInt16BigEndian(frame.AsSpan(16), (ushort)(40 + payload));
        frame[22] = 64;
        frame[23] = 6;
        frame[26] = 10;
        frame[30] = 10;
        frame[33] = 2;
        BinaryPrimitives.WriteUInt32BigEndian(frame.AsSpan(38), 1000);
        frame[46] = 0x50;
        frame[47] = 0x18;
        new Random(3).NextBytes(frame.AsSpan(54));
        uint pseudo = NetFrames.Sum(frame.AsSpan(26, 8), 6 + 20 + (uint)payload);
        BinaryPrimitives.WriteUInt16BigEndian(frame.AsSpan(50), (ushort)pseudo);
        return (frame, new NetOffload(true, 34, 16, 1, segment, 54));
    }

    private byte Command(params byte[] command) => _rig.Call(2, command, 1)[0];
}

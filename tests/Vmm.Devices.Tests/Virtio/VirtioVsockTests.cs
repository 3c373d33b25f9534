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

public sealed class VirtioVsockTests : IDisposable
{
    private const ushort Request = 1, Response = 2, Reset = 3, Shutdown = 4, Data = 5, Update = 6, AskCredit = 7;

    private readonly FakeVsock _host = new();
    private readonly VirtioVsock _model;
    private readonly VirtioRig _rig;

    public VirtioVsockTests()
    {
        _model = new VirtioVsock(7, _host);
        _rig = new VirtioRig(_model);
        _rig.Driver.Start(0, 3);
        _rig.Offer(0, 32, 4096);
    }

    public void Dispose() => _rig.Dispose();

    [Fact]
    public void GuestConnects_ExchangesData_Closes()
    {
        _rig.Driver.ReadConfig(0, AccessWidth.Qword).Should().Be(7);
        Send(Request, 1000, 80);
        Take().Should().Be((Response, 1000, 80, 0));
        Send(Data, 1000, 80, "hello"u8);
        _host.Stream!.Got.Should().Equal("hello"u8.ToArray());
        _host.Stream.Receiver!.OnData("world!"u8).Should().Be(6);
        (ushort op, byte[] data) = TakeData();
        op.Should().Be(Data);
        data.Should().Equal("world!"u8.ToArray());
        Send(Shutdown, 1000, 80, flags: 3);
        Take().Op.Should().Be(Reset);
        _host.Stream.IsDisposed.Should().BeTrue();
        _model.Connections.Should().Be(0);
    }

    [Fact]
    public void GuestConnects_NobodyListens_IsReset()
    {
        _host.Refuse = true;
        Send(Request, 1000, 80);
        Take().Should().Be((Reset, 1000, 80, 0));
        Send(Data, 1, 2, "x"u8);
        Take().Should().Be((Reset, 1, 2, 0), "there is no such connection");
    }

    [Fact]
    public void HostConnects_GuestAccepts()
    {
        uint decided = 99;
        var stream = new FakeStream();
        IVsockReceiver? receiver = _model.Open(5000, stream, port => decided = port);
        receiver.Should().NotBeNull();
        (ushort op, uint guest, uint host, _) = Take();
        (op, guest).Should().Be((Request, 5000u));
        decided.Should().Be(99, "not yet");
        Send(Response, 5000, host);
        decided.Should().Be(host);
        stream.Resumed.Should().Be(1);
        receiver!.OnData("hi"u8).Should().Be(2);
        TakeData().Data.Should().Equal("hi"u8.ToArray());
        receiver.OnEnd(broken: false);
        Take().Op.Should().Be(Shutdown);
        Send(Shutdown, 5000, host, flags: 2);
        Take().Op.Should().Be(Reset);
        _model.Connections.Should().Be(0);
    }

    [Fact]
    public void HostConnects_GuestRefuses()
    {
        uint decided = 99;
        _model.Open(5000, new FakeStream(), port => decided = port);
        Send(Reset, 5000, Take().Host);
        decided.Should().Be(0);
        _model.Connections.Should().Be(0);
    }

    [Fact]
    public void Credit_LimitsBothSides()
    {
        Send(Request, 1000, 80, credit: 10);
        Take();
        _host.Stream!.Receiver!.OnData(new byte[100]).Should().Be(10, "the guest has room for ten");
        TakeData().Data.Should().HaveCount(10);
        int before = _host.Stream.Resumed;
        Send(Update, 1000, 80, credit: 10, forwarded: 10);
        _host.Stream.Resumed.Should().Be(before + 1);

        _host.Stream.Stuck = true;
        for (int i = 0; i < 64; i++)
        {
            Send(Data, 1000, 80, new byte[4096]);
        }

        _model.Connections.Should().Be(1);
        Send(AskCredit, 1000, 80);
        Take().Op.Should().Be(Update);
        Send(Data, 1000, 80, new byte[1]);
        Take().Op.Should().Be(Reset, "it sent more than we said we hold");
        _model.Connections.Should().Be(0);
    }

    [Fact]
    public void SlowHost_GetsEverythingInOrder()
    {
        Send(Request, 1000, 80);
        Take();
        _host.Stream!.Stuck = true;
        Send(Data, 1000, 80, "abc"u8);
        Send(Data, 1000, 80, "def"u8);
        Send(Shutdown, 1000, 80, flags: 2);
        _host.Stream.Got.Should().BeEmpty();
        _host.Stream.IsShut.Should().BeFalse();
        _host.Stream.Stuck = false;
        _host.Stream.Receiver!.OnWritable();
        _host.Stream.Got.Should().Equal("abcdef"u8.ToArray());
        _host.Stream.IsShut.Should().BeTrue("only now");
    }

    [Fact]
    public void NoBuffers_HoldsTheHost_UntilThereAreSome()
    {
        Send(Request, 1000, 80);
        while (_rig.Take(0) is not null)
        {
        }

        for (int i = 0; i < 40; i++)
        {
            _host.Stream!.Receiver!.OnData(new byte[4096 - 44]);
        }

        _host.Stream!.Receiver!.OnData(new byte[10]).Should().Be(0);
        int before = _host.Stream.Resumed;
        while (_rig.Take(0) is not null)
        {
        }

        _rig.Offer(0, 8, 4096);
        _host.Stream.Resumed.Should().Be(before + 1);
        _host.Stream.Receiver.OnData(new byte[10]).Should().Be(10);
    }

    [Theory]
    [InlineData(8UL, 2UL, 1)]
    [InlineData(7UL, 3UL, 1)]
    [InlineData(7UL, 2UL, 2)]
    public void WrongAddressOrType_OpensNothing(ulong from, ulong to, ushort type)
    {
        byte[] packet = Packet(Request, 1, 2, [], 0, 1000, 0);
        BinaryPrimitives.WriteUInt64LittleEndian(packet, from);
        BinaryPrimitives.WriteUInt64LittleEndian(packet.AsSpan(8), to);
        BinaryPrimitives.WriteUInt16LittleEndian(packet.AsSpan(28), type);
        _rig.Send(1, packet);
        _model.Connections.Should().Be(0);
        _rig.Driver.Status.Should().Be(15);
    }

    [Fact]
    public void Load_TellsTheGuestThatConnectionsAreGone()
    {
        Send(Request, 1000, 80);
        _rig.Mmio.Pause();
        var host = new FakeVsock();
        using var other = new VirtioRig(new VirtioVsock(7, host), _rig.Ram, resume: false);
        DeviceCheck.Copy(_rig.Mmio, other.Mmio);
        ushort id = _rig.Driver[2].Add(new DriverBuffer(0x280000, 4, true));
        other.Mmio.Resume();
        _rig.Driver[2].TryTakeUsed(out ushort used, out uint length).Should().BeTrue();
        (used, length).Should().Be((id, 4u));
        _rig.Ram.ReadNumber(0x280000, 4).Should().Be(0, "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
    }

    private static byte[] Packet(
        ushort op, uint guestPort, uint hostPort, ReadOnlySpan<byte> data, uint flags, uint credit, uint forwarded)
    {
        byte[] packet = new byte[44 + data.Length];
        BinaryPrimitives.WriteUInt64LittleEndian(packet, 7);
        BinaryPrimitives.WriteUInt64LittleEndian(packet.AsSpan(8), 2);
        BinaryPrimitives.WriteUInt32LittleEndian(packet.AsSpan(16), guestPort);
        BinaryPrimitives.WriteUInt32LittleEndian(packet.AsSpan(20), hostPort);
        BinaryPrimitives.WriteUInt32LittleEndian(packet.AsSpan(24), (uint)data.Length);
        BinaryPrimitives.WriteUInt16LittleEndian(packet.AsSpan(28), 1);
        BinaryPrimitives.WriteUInt16LittleEndian(packet.AsSpan(30), op);
        BinaryPrimitives.WriteUInt32LittleEndian(packet.AsSpan(32), flags);
        BinaryPrimitives.WriteUInt32LittleEndian(packet.AsSpan(36), credit);
        BinaryPrimitives.WriteUInt32LittleEndian(packet.AsSpan(40), forwarded);
        data.CopyTo(packet.AsSpan(44));
        return packet;
    }

    private void Send(
        ushort op,
        uint guestPort,
        uint hostPort,
        ReadOnlySpan<byte> data = default,
        uint flags = 0,
        uint credit = 1_000_000,
        uint forwarded = 0) =>
        _rig.Send(1, Packet(op, guestPort, hostPort, data, flags, credit, forwarded));

    private (ushort Op, uint Guest, uint Host, int Length) Take()
    {
        byte[] packet = _rig.Take(0) ?? throw new InvalidOperationException("no packet");
        BinaryPrimitives.ReadUInt64LittleEndian(packet).Should().Be(2);
        BinaryPrimitives.ReadUInt64LittleEndian(packet.AsSpan(8)).Should().Be(7);
        return (
            BinaryPrimitives.ReadUInt16LittleEndian(packet.AsSpan(30)),
            BinaryPrimitives.ReadUInt32LittleEndian(packet.AsSpan(20)),
            BinaryPrimitives.ReadUInt32LittleEndian(packet.AsSpan(16)),
            packet.Length - 44);
    }

    private (ushort Op, byte[] Data) TakeData()
    {
        byte[] packet = _rig.Take(0) ?? throw new InvalidOperationException("no packet");
        return (BinaryPrimitives.ReadUInt16LittleEndian(packet.AsSpan(30)), packet.AsSpan(44).ToArray());
    }

    private sealed class FakeVsock : IVsockBackend
    {
        public bool Refuse { get; set; }

        public FakeStream? Stream { get; private set; }

        public void Attach(IVsockAcceptor acceptor)
        {
        }

        public IVsockStream? Connect(uint port, IVsockReceiver receiver)
        {
            Stream = Refuse ? null : new FakeStream { Receiver = receiver };
            return Stream;
        }

        public void Dispose()
        {
        }
    }

    private sealed class FakeStream : IVsockStream
    {
        public IVsockReceiver? Receiver { get; init; }

        public List<byte> Got { get; } = [];

        public bool Stuck { get; set; }

        public bool IsShut { get; private set; }

        public bool IsDisposed { get; private set; }

        public int Resumed { get; private set; }

        public int Write(ReadOnlySpan<byte> bytes)
        {
            if (Stuck)
            {
                return 0;
            }

            int take = Math.Min(bytes.Length, 4);
            foreach (byte value in bytes[..take])
            {
                Got.Add(value);
            }

            return take;
        }

        public void ShutdownWrite() => IsShut = true;

        public void ResumeRead() => Resumed++;

        public void Dispose() => IsDisposed = true;
    }
}

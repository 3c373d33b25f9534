// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Concurrent;
using System.Collections.Generic;
using System.Net;
using System.Threading;
using Vmm.Core;

namespace Vmm.Backends.Tests.Net;

/// <summary>
/// The guest's end of a network: builds frames, and a small TCP that is written apart from the one under test. It can
/// lose frames and refuse them on purpose.
/// </summary>
internal sealed class NetGuest : INetReceiver
{
    private readonly BlockingCollection<byte[]> _frames = [];
    private readonly INetBackend _net;
    private volatile bool _closed;
    private int _arpReplies;
    private int _loseEvery;
    private volatile int _burst;
    private int _count;
    private long _takenBytes;

    public NetGuest(INetBackend net, byte[] mac, string address = "10.0.2.15")
    {
        _net = net;
        MacAddress = mac;
        Address = IPAddress.Parse(address);
        net.Attach(this);
    }

    public byte[] MacAddress { get; }

    public IPAddress Address { get; }

    public byte[] GatewayMac { get; } = [0x52, 0x56, 10, 0, 2, 2];

    public bool TakesOffload { get; set; }

    public int LargestFrame { get; private set; }

    /// <summary>Loses that many of the large frames that come next.</summary>
    public int LoseNext
    {
        set => _burst = value;
    }

    /// <summary>Loses every nth frame, 0 for none.</summary>
    public int LoseEvery
    {
        set => _loseEvery = value;
    }

    public bool TryReceive(ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        if (_closed)
        {
            return false;
        }

        LargestFrame = Math.Max(LargestFrame, frame.Length);
        if (_burst > 0 && frame.Length > 1000)
        {
            _burst--;
            return true;
        }

        if (_loseEvery != 0 && ++_count % _loseEvery == 0)
        {
            return true;
        }

        byte[] copy = frame.ToArray();
        if (!NetFrames.TryCompleteChecksum(copy, offload with { SegmentKind = 0 }))
        {
            throw new InvalidOperationException("bad offload");
        }

        Interlocked.Add(ref _takenBytes, copy.Length);
        _frames.Add(copy);
        if (copy[12] == 8 && copy[13] == 6)
        {
            Interlocked.Increment(ref _arpReplies);
        }

        return true;
    }

    /// <summary>Bytes of all frames that were taken, looked at or not.</summary>
    public long TakenBytes => Interlocked.Read(ref _takenBytes);

    public void CloseWindow() => _closed = true;

    public void OpenWindow()
    {
        _closed = false;
        _net.ResumeReceive();
    }

    /// <summary>The next frame that a test is interested in.</summary>
    public byte[] Wait(Func<byte[], bool> wanted, int timeoutMs = 10_000)
    {
        long end = Environment.TickCount64 + timeoutMs;
        while (Environment.TickCount64 < end)
        {
            if (_frames.TryTake(out byte[]? frame, (int)Math.Max(1, end - Environment.TickCount64)) && wanted(frame))
            {
                return frame;
            }
        }

        throw new TimeoutException("the frame did not come");
    }

    public bool TryTake(int timeoutMs, out byte[] frame)
    {
        bool taken = _frames.TryTake(out byte[]? got, timeoutMs);
        frame = got ?? [];
        return taken;
    }

    /// <summary>
    /// Waits until the network has done all that it does by itself while time stands still: two questions to the gateway,
    /// since the answer to the first may go out ahead of what was waiting.
    /// </summary>
    public void Settle()
    {
        for (int i = 0; i < 2; i++)
        {
            int before = Volatile.Read(ref _arpReplies);
            Send([255, 255, 255, 255, 255, 255], 0x0806, Arp(IPAddress.Parse("10.0.2.2")));
            if (!SpinWait.SpinUntil(() => Volatile.Read(ref _arpReplies) != before, 10_000))
            {
                throw new TimeoutException("the gateway does not answer");
            }
        }
    }

    /// <summary>Asks who has an address (RFC 826).</summary>
    public byte[] Arp(IPAddress target)
    {
        byte[] packet = new byte[28];
        BinaryPrimitives.WriteUInt64BigEndian(packet, 0x0001_0800_0604_0001);
        MacAddress.CopyTo(packet, 8);
        Address.GetAddressBytes().CopyTo(packet, 14);
        target.GetAddressBytes().CopyTo(packet, 24);
        return packet;
    }

    public void SendRaw(byte[] frame) => _net.Send(frame, default);

    public void Send(byte[] toMac, ushort type, ReadOnlySpan<byte> payload)
    {
        byte[] frame = new byte[14 + payload.Length];
        toMac.CopyTo(frame, 0);
        MacAddress.CopyTo(frame, 6);
        BinaryPrimitives.WriteUInt16BigEndian(frame.AsSpan(12), type);
        payload.CopyTo(frame.AsSpan(14));
        _net.Send(frame, default);
    }

    public byte[] Ip(IPAddress to, byte protocol, ReadOnlySpan<byte> payload, IPAddress? from = null, ushort fragment = 0)
    {
        from ??= Address;
        byte[] packet = new byte[20 + payload.Length];
        packet[0] = 0x45;
        BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(2), (ushort)packet.Length);
        BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(4), 77);
        BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(6), fragment);
        packet[8] = 64;
        packet[9] = protocol;
        from.GetAddressBytes().CopyTo(packet, 12);
        to.GetAddressBytes().CopyTo(packet, 16);
        BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(10), NetFrames.Checksum(packet.AsSpan(0, 20)));
        payload.CopyTo(packet.AsSpan(20));
        return packet;
    }

    public static byte[] Udp(ushort from, ushort to, ReadOnlySpan<byte> payload)
    {
        byte[] datagram = new byte[8 + payload.Length];
        BinaryPrimitives.WriteUInt16BigEndian(datagram, from);
        BinaryPrimitives.WriteUInt16BigEndian(datagram.AsSpan(2), to);
        BinaryPrimitives.WriteUInt16BigEndian(datagram.AsSpan(4), (ushort)datagram.Length);
        payload.CopyTo(datagram.AsSpan(8));
        return datagram;
    }

    public void SendUdp(IPAddress to, ushort fromPort, ushort toPort, ReadOnlySpan<byte> payload) =>
        Send(GatewayMac, 0x0800, Ip(to, 17, Udp(fromPort, toPort, payload)));

    public static bool IsIpv4(byte[] frame, byte protocol) =>
        frame.Length >= 34 && frame[12] == 8 && frame[13] == 0 && frame[23] == protocol;

    public static bool IsUdp(byte[] frame, ushort toPort) =>
        IsIpv4(frame, 17) && BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(36)) == toPort;

    /// <summary>Throws when a checksum of an IPv4 frame is wrong.</summary>
    public static void CheckSums(byte[] frame)
    {
        int length = BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(16)) - 20;
        uint pseudo = NetFrames.Sum(frame.AsSpan(26, 8), frame[23] + (uint)length);
        if (NetFrames.Checksum(frame.AsSpan(14, 20)) != 0 || NetFrames.Checksum(frame.AsSpan(34, length), pseudo) != 0)
        {
            throw new InvalidOperationException("bad checksum");
        }
    }
}

/// <summary>A TCP connection of the test's guest.</summary>
internal sealed class GuestTcp
{
    private readonly NetGuest _guest;
    private readonly IPAddress _remote;
    private readonly ushort _port;
    private readonly ushort _remotePort;
    private readonly List<byte> _received = [];
    private uint _seq = 0xFFFF_FF00; // wraps soon
    private uint _ack;
    private uint _acked;
    private int _peerWindow;

    public GuestTcp(NetGuest guest, IPAddress remote, ushort remotePort, ushort port)
    {
        _guest = guest;
        _remote = remote;
        _remotePort = remotePort;
        _port = port;
        _acked = _seq;
    }

    public IReadOnlyList<byte> Received => _received;

    public bool PeerFinished { get; private set; }

    public bool PeerReset { get; private set; }

    /// <summary>Segments of this connection that came.</summary>
    public int SegmentsReceived { get; private set; }

    /// <summary>Bytes that came with a place behind the end of the stream.</summary>
    public int BytesBehindEnd { get; private set; }

    /// <summary>Bytes that the guest would still take.</summary>
    public int Window { get; set; } = 60_000;

    /// <summary>Shift of the window field, agreed at the start.</summary>
    public byte Scale { get; init; }

    public uint UnackedBytes => _seq - _acked;

    public void Connect()
    {
        Segment(2, [], [2, 4, 5, 0xB4, 1, 3, 3, Scale]);
        _seq++;
        WaitUntil(() => _acked == _seq || PeerReset);
        if (!PeerReset)
        {
            Segment(16, []);
        }
    }

    /// <summary>Answers a connection that the host opened: call with the SYN frame.</summary>
    public static GuestTcp Answer(NetGuest guest, byte[] syn)
    {
        var tcp = new GuestTcp(
            guest,
            new IPAddress(syn.AsSpan(26, 4)),
            BinaryPrimitives.ReadUInt16BigEndian(syn.AsSpan(34)),
            BinaryPrimitives.ReadUInt16BigEndian(syn.AsSpan(36)))
        {
            _ack = BinaryPrimitives.ReadUInt32BigEndian(syn.AsSpan(38)) + 1,
        };
        tcp.Segment(2 | 16, [], [2, 4, 5, 0xB4, 1, 3, 3, 0]);
        tcp._seq++;
        tcp.WaitUntil(() => tcp._acked == tcp._seq);
        return tcp;
    }

    public void Write(ReadOnlySpan<byte> data)
    {
        while (data.Length > 0)
        {
            while (UnackedBytes + 1400 > _peerWindow)
            {
                PumpOne(2000);
            }

            int take = Math.Min(1400, data.Length);
            Segment(16 | 8, data[..take]);
            _seq += (uint)take;
            data = data[take..];
        }
    }

    public void WriteOutOfOrder(ReadOnlySpan<byte> data)
    {
        uint seq = _seq;
        int half = data.Length / 2;
        _seq = seq + (uint)half;
        Segment(16, data[half..]);
        _seq = seq;
        Segment(16, data[..half]);
        _seq += (uint)half;
        WaitUntil(() => _acked == _seq);
        Segment(16 | 8, data[half..]);
        _seq += (uint)(data.Length - half);
    }

    public void Finish()
    {
        Segment(1 | 16, []);
        _seq++;
    }

    public void Reset() => Segment(4 | 16, []);

    public void WaitUntil(Func<bool> done, int timeoutMs = 15_000)
    {
        long end = Environment.TickCount64 + timeoutMs;
        while (!done())
        {
            if (Environment.TickCount64 > end)
            {
                throw new TimeoutException($"received {_received.Count}, unacked {UnackedBytes}");
            }

            PumpOne(100);
        }
    }

    /// <summary>Takes all that comes while time stands still.</summary>
    public void Settle()
    {
        _guest.Settle();
        while (PumpOne(0))
        {
        }
    }

    private bool PumpOne(int timeoutMs)
    {
        if (!_guest.TryTake(timeoutMs, out byte[] frame))
        {
            return false;
        }

        if (NetGuest.IsIpv4(frame, 6) && BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(36)) == _port)
        {
            OnSegment(frame);
        }

        return true;
    }

    private void OnSegment(byte[] frame)
    {
        NetGuest.CheckSums(frame);
        SegmentsReceived++;
        int total = BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(16)) + 14;
        byte flags = frame[47];
        uint seq = BinaryPrimitives.ReadUInt32BigEndian(frame.AsSpan(38));
        ReadOnlySpan<byte> payload = frame.AsSpan(34 + ((frame[46] >> 4) * 4), total - 34 - ((frame[46] >> 4) * 4));
        if ((flags & 4) != 0)
        {
            PeerReset = true;
            return;
        }

        if ((flags & 16) != 0)
        {
            _acked = BinaryPrimitives.ReadUInt32BigEndian(frame.AsSpan(42));
            int window = BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(48));
            _peerWindow = (flags & 2) != 0 ? window : window << 7;
        }

        if ((flags & 2) != 0)
        {
            _ack = seq + 1;
            return;
        }

        bool answer = payload.Length > 0 || (flags & 1) != 0;
        if (seq == _ack && !PeerFinished)
        {
            int take = Math.Min(payload.Length, Window);
            foreach (byte value in payload[..take])
            {
                _received.Add(value);
            }

            _ack += (uint)take;
            if ((flags & 1) != 0 && take == payload.Length)
            {
                _ack++;
                PeerFinished = true;
            }
        }

        else if (PeerFinished && (int)(seq + (uint)payload.Length - _ack) > 0)
        {
            BytesBehindEnd += payload.Length;
        }

        if (answer)
        {
            Segment(16, []);
        }
    }

    public void Segment(byte flags, ReadOnlySpan<byte> payload, ReadOnlySpan<byte> options = default)
    {
        byte[] tcp = new byte[20 + options.Length + payload.Length];
        BinaryPrimitives.WriteUInt16BigEndian(tcp, _port);
        BinaryPrimitives.WriteUInt16BigEndian(tcp.AsSpan(2), _remotePort);
        BinaryPrimitives.WriteUInt32BigEndian(tcp.AsSpan(4), _seq);
        BinaryPrimitives.WriteUInt32BigEndian(tcp.AsSpan(8), _ack);
        tcp[12] = (byte)((20 + options.Length) / 4 << 4);
        tcp[13] = flags;
        BinaryPrimitives.WriteUInt16BigEndian(tcp.AsSpan(14), (ushort)Math.Min(Window >> ((flags & 2) != 0 ? 0 : Scale), 65535));
        options.CopyTo(tcp.AsSpan(20));
        payload.CopyTo(tcp.AsSpan(20 + options.Length));
        _guest.Send(_guest.GatewayMac, 0x0800, _guest.Ip(_remote, 6, tcp));
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Threading;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Net;

// Theory. The `user` network is a router in this process: it needs no privilege, no bridge, no daemon, and is the same
// code on the three systems (adr/0005 says why it is not libslirp). To the guest it is one Ethernet neighbour, the
// gateway, with a DHCP server, a DNS server and router advertisements; to the host it is a program with sockets.
//
//   TCP   ends here: TcpFlow speaks TCP with the guest and owns a host socket. Bytes cross, packets do not, so large
//         segments of the guest go into the socket whole and come back as large segments.
//   UDP   is translated: one host socket per guest port (UdpFlow).
//   ICMP  echo is answered for the gateway's own addresses.
//   Other VMs are reached through a VmSwitch; what leaves for it never passes through the router.
//
// Threads and locks. Everything is under _gate. Guest frames arrive in Send on the device's thread: headers are checked,
// data goes straight into the host socket, and nothing is delivered to the device from there. Deliveries happen on the
// loop's thread, which also waits for all sockets: it is woken through an event descriptor when Send left something to
// answer, when the device has buffers again, or when time has passed. Holding _gate while delivering is allowed: a
// device holds no lock while it calls out (Backends.cs), so the order is always _gate, then the device's.
//
// A guest is hostile: every length is checked on a private copy (the device made one), tables are bounded (MaxFlows,
// MaxUdpFlows, MaxControl), and what does not fit is dropped and counted, as on a network.

/// <summary>A NAT with DHCP, DNS and port forwards between a guest and the host's sockets.</summary>
public sealed class UserNetwork : INetBackend
{
    private const int MaxFlows = 4096;
    private const int MaxUdpFlows = 1024;
    private const int MaxControl = 512;
    private const int MaxReassemblies = 16;
    private const int TickMs = 100;
    private const int AdvertiseMs = 60_000;
    private const byte GatewayHost = 2;
    private const byte DnsHost = 3;
    private const byte NeighborSolicit = 135;
    private const byte NeighborAdvert = 136;
    private const byte RouterSolicit = 133;
    private const byte RouterAdvert = 134;

    private readonly Lock _gate = new();
    private readonly UserNetworkOptions _options;
    private readonly PollLoop _loop;
    private readonly bool _ownsLoop;
    private readonly EventFd _wake = new();
    private readonly IPollRegistration _wakeRegistration;
    private readonly TimeProvider _time;
    private readonly ITimer _timer;
    private readonly ITimer _ackTimer;
    private readonly Dictionary<FlowKey, TcpFlow> _flows = [];
    private readonly Dictionary<(NetAddress Guest, ushort Port, bool Aliased), UdpFlow> _udpFlows = [];
    private readonly List<TcpFlow> _dead = [];
    private readonly List<TcpFlow> _walk = [];
    private readonly List<(Socket Socket, IPollRegistration Registration)> _listeners = [];
    private readonly List<UdpForward> _udpForwards = [];
    private readonly Queue<(byte[] Frame, NetOffload Offload)> _control = new();
    private readonly Dictionary<uint, Reassembly> _reassemblies = [];
    private readonly VmSwitch? _switch;
    private readonly NetAddress _network4;
    private readonly NetAddress _gateway4;
    private readonly NetAddress _dns4;
    private readonly NetAddress _gateway6;
    private readonly NetAddress _dns6;
    private readonly NetAddress _linkLocal6;
    private readonly byte[] _scratch = new byte[2048];
    private readonly uint _issBase;
    private readonly int _ackDelayMs;

    private INetReceiver? _receiver;
    private readonly IReadOnlyList<IPAddress> _nameServers;
    private ushort _nextForwardPort = 49152;
    private ushort _nextFragmentId;
    private int _signalled;
    private bool _tick;
    private bool _ackTimerRuns;
    private bool _ackTimeUp;
    private TcpFlow? _routed; // of the frame that is being routed
    private bool _inSend;
    private bool _blocked;
    private bool _disposed;
    private long _dropped;
    private long _advertisedMs;

    /// <summary>Makes a network and listens on its forwarded ports.</summary>
    /// <param name="options">Its layout.</param>
    /// <param name="loop">An event loop to share; null for one of its own.</param>
    /// <exception cref="HostException">A port is taken, or the switch's directory cannot be used.</exception>
    public UserNetwork(UserNetworkOptions options, PollLoop? loop = null)
    {
        ArgumentNullException.ThrowIfNull(options);
        _options = options;
        _network4 = NetAddress.From(options.Network);
        _gateway4 = Host4(GatewayHost);
        _dns4 = Host4(DnsHost);
        if (options.Prefix6 is { } prefix)
        {
            NetAddress prefix6 = NetAddress.From(prefix);
            _gateway6 = new NetAddress(prefix6.Value + GatewayHost, true);
            _dns6 = new NetAddress(prefix6.Value + DnsHost, true);
        }

        _linkLocal6 = NetAddress.From(IPAddress.Parse("fe80::2"));
        GuestMac = Mac.Read(options.GuestMac);
        GatewayMac = 0x5256_0000_0000UL | (uint)_gateway4.Value; // 52:56 and the address, as a local MAC
        GuestAddress = Host4(options.GuestHost);
        Mtu = Math.Clamp(options.Mtu, 576, 65535);
        _ackDelayMs = Math.Clamp(options.AckDelayMs, 1, 500);
        _nameServers = options.NameServers ?? Dns.ReadServers("/etc/resolv.conf");
        Span<byte> seed = stackalloc byte[4];
        HostRandom.Fill(seed);
        _issBase = BinaryPrimitives.ReadUInt32LittleEndian(seed);
        _ownsLoop = loop is null;
        _loop = loop ?? new PollLoop("user-net " + options.HostName);
        _time = options.Time;
        TimeSpan tick = TimeSpan.FromMilliseconds(TickMs);
        _timer = _time.CreateTimer(_ => Tick(), null, tick, tick);
        _ackTimer = _time.CreateTimer(_ => EndAckDelay(), null, Timeout.InfiniteTimeSpan, Timeout.InfiniteTimeSpan);
        _wakeRegistration = _loop.Add(_wake.Handle, PollEvents.Readable, _ => OnWake());
        try
        {
            if (options.SwitchDirectory is { } directory)
            {
                _switch = new VmSwitch(directory, GuestMac, _time, OnSwitchFrame);
                GuestAddress = _switch.Claim(_network4, options.GuestHost, options.HostName);
                _switch.Start(Watch);
            }

            foreach (PortForward forward in options.Forwards)
            {
                Listen(forward);
            }
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public bool CanOffload => true;

    /// <summary>Frames that were damaged or for which there was no room.</summary>
    public long Dropped => Interlocked.Read(ref _dropped);

    /// <summary>Ports that forwards listen on, in the order of the options.</summary>
    public IReadOnlyList<int> ForwardPorts { get; private set; } = [];

    /// <summary>The IPv4 address that DHCP gives the guest.</summary>
    public IPAddress GuestIPv4 => GuestAddress.ToIPAddress();

    internal ulong GuestMac { get; }

    /// <summary>The guest has sent something: its card has a driver.</summary>
    internal bool HasSpoken { get; private set; }

    internal ulong GatewayMac { get; }

    internal int Mtu { get; }

    internal NetAddress GuestAddress { get; }

    internal PacketBuilder Builder { get; } = new();

    /// <summary>Steady time for timeouts of milliseconds.</summary>
    internal long NowMs => Timestamp / (_time.TimestampFrequency / 1000);

    /// <summary>Steady time in the ticks of <see cref="UserNetworkOptions.Time"/>.</summary>
    internal long Timestamp => _time.GetTimestamp();

    internal byte[] DatagramBuffer { get; } = new byte[65536];

    internal bool TakesOffload => _receiver is { TakesOffload: true };

    /// <summary>Data can be delivered now: not from within Send, and the device has buffers.</summary>
    internal bool CanEmit => !_inSend && !_blocked;

    /// <inheritdoc/>
    public void Attach(INetReceiver receiver) => _receiver = receiver;

    /// <inheritdoc/>
    public void ResumeReceive()
    {
        Volatile.Write(ref _blocked, false);
        Wake();
    }

    /// <inheritdoc/>
    public void Send(ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        if (frame.Length < Proto.EthernetBytes)
        {
            return;
        }

        bool work;
        lock (_gate)
        {
            if (_disposed)
            {
                return;
            }

            _inSend = true;
            work = Route(frame, offload);
            _inSend = false;
        }

        if (work)
        {
            Wake();
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        lock (_gate)
        {
            if (_disposed)
            {
                return;
            }

            _disposed = true;
        }

        _timer.Dispose();
        _ackTimer.Dispose();
        _wakeRegistration.Dispose();
        if (_ownsLoop)
        {
            _loop.Dispose();
        }

        foreach (TcpFlow flow in _flows.Values)
        {
            flow.Dispose();
        }

        ReleaseDead();
        foreach (UdpFlow flow in _udpFlows.Values)
        {
            flow.Dispose();
        }

        foreach ((Socket socket, IPollRegistration registration) in _listeners)
        {
            registration.Dispose();
            socket.Dispose();
        }

        foreach (UdpForward forward in _udpForwards)
        {
            forward.Dispose();
        }

        _switch?.Dispose();
        _wake.Dispose();
    }

    /// <summary>Watches a socket; the callback runs on the loop's thread under the gate.</summary>
    internal IPollRegistration Watch(SafeHandle handle, PollEvents interest, Action<PollEvents> onReady) =>
        _loop.Add(handle, interest, events =>
        {
            lock (_gate)
            {
                if (!_disposed)
                {
                    onReady(events);
                    ReleaseDead();
                }
            }
        });

    /// <summary>Delivers the builder's frame, or says that the device has no buffer now.</summary>
    internal bool TryEmit(in NetOffload offload)
    {
        if (!CanEmit || _control.Count > 0 || _receiver is null)
        {
            return false;
        }

        if (_receiver.TryReceive(Builder.Frame, offload))
        {
            return true;
        }

        _blocked = true;
        if (_receiver.TryReceive(Builder.Frame, offload))
        {
            _blocked = false; // buffers came between the two lines
            return true;
        }

        return false;
    }

    /// <summary>Delivers the builder's frame now or later. False when it had to be dropped.</summary>
    internal bool Emit(in NetOffload offload)
    {
        if (TryEmit(offload))
        {
            return true;
        }

        if (_control.Count >= MaxControl)
        {
            Interlocked.Increment(ref _dropped);
            return false;
        }

        _control.Enqueue((Builder.Frame.ToArray(), offload));
        return true;
    }

    /// <summary>Sends a datagram to the guest, in fragments where it is longer than the MTU (IPv4 only).</summary>
    internal void EmitUdp(NetAddress from, ushort fromPort, NetAddress to, ushort toPort, ReadOnlySpan<byte> payload)
    {
        int lengthBytes = Proto.UdpBytes + payload.Length;
        int room = Mtu - (from.IsV6 ? Proto.Ipv6Bytes : Proto.Ipv4Bytes);
        if (lengthBytes > 65535 - Proto.Ipv4Bytes || (lengthBytes > room && from.IsV6))
        {
            Interlocked.Increment(ref _dropped);
            return;
        }

        Span<byte> udp = Builder.StartIp(GuestMac, GatewayMac, from, to, Proto.Udp, lengthBytes);
        BinaryPrimitives.WriteUInt16BigEndian(udp, fromPort);
        BinaryPrimitives.WriteUInt16BigEndian(udp[2..], toPort);
        BinaryPrimitives.WriteUInt16BigEndian(udp[4..], (ushort)lengthBytes);
        payload.CopyTo(udp[Proto.UdpBytes..]);
        Builder.FinishChecksum(Proto.Udp, 6);
        if (lengthBytes <= room)
        {
            Emit(default);
            return;
        }

        byte[] whole = udp.ToArray();
        int piece = room & ~7;
        ushort id = ++_nextFragmentId;
        for (int at = 0; at < whole.Length; at += piece)
        {
            int take = Math.Min(piece, whole.Length - at);
            whole.AsSpan(at, take).CopyTo(Builder.StartIp(GuestMac, GatewayMac, from, to, Proto.Udp, take));
            Builder.SetFragment(id, at, at + take < whole.Length);
            Emit(default);
        }
    }

    internal void FlowClosed(TcpFlow flow)
    {
        _flows.Remove(flow.Key);
        _dead.Add(flow);
        Wake();
    }

    /// <summary>What the guest sees as the source of a datagram.</summary>
    internal (NetAddress Address, ushort Port) ShownAddress(
        IPEndPoint from, (IPEndPoint Real, NetAddress Shown, ushort ShownPort)? alias)
    {
        if (alias is { } known && known.Real.Equals(from))
        {
            return (known.Shown, known.ShownPort);
        }

        NetAddress address = NetAddress.From(from.Address);
        return (IPAddress.IsLoopback(from.Address) ? GatewayFor(address) : address, (ushort)from.Port);
    }

    internal NetAddress GatewayFor(NetAddress peer) => peer.IsV6 ? _gateway6 : _gateway4;

    private NetAddress Host4(byte host) => new(_network4.Value + host, false);

    private void Wake()
    {
        if (Interlocked.Exchange(ref _signalled, 1) == 0)
        {
            try
            {
                _wake.Signal();
            }
            catch (ObjectDisposedException)
            {
                // A device's last call while the network is being taken down.
            }
        }
    }

    private void Tick()
    {
        Volatile.Write(ref _tick, true);
        Wake();
    }

    private void EndAckDelay()
    {
        Volatile.Write(ref _ackTimeUp, true);
        Wake();
    }

    private void OnWake()
    {
        _wake.Drain();
        Volatile.Write(ref _signalled, 0);
        lock (_gate)
        {
            if (_disposed)
            {
                return;
            }

            while (!_blocked && _control.TryPeek(out (byte[] Frame, NetOffload Offload) waiting))
            {
                if (_receiver is null || _receiver.TryReceive(waiting.Frame, waiting.Offload))
                {
                    _control.Dequeue();
                    continue;
                }

                _blocked = true;
                if (_receiver.TryReceive(waiting.Frame, waiting.Offload))
                {
                    _blocked = false;
                    _control.Dequeue();
                }
            }

            bool tick = Volatile.Read(ref _tick);
            Volatile.Write(ref _tick, false);
            long now = NowMs;
            bool ackTimeUp = Volatile.Read(ref _ackTimeUp);
            long ackSince = Timestamp - (_ackDelayMs * _time.TimestampFrequency / 1000);
            bool acksWait = false;
            _walk.Clear();
            _walk.AddRange(_flows.Values);
            foreach (TcpFlow flow in _walk)
            {
                if (tick)
                {
                    flow.OnTick(now);
                }

                if (ackTimeUp)
                {
                    flow.EndAckDelay(ackSince);
                    acksWait |= flow.HasDelayedAck;
                }

                if (flow.NeedsFlush)
                {
                    flow.Flush();
                }
            }

            if (ackTimeUp)
            {
                Volatile.Write(ref _ackTimeUp, false);
                _ackTimerRuns = false;
                if (acksWait)
                {
                    StartAckTimer();
                }
            }

            if (tick)
            {
                Expire(now);
            }

            ReleaseDead();
        }
    }

    private void StartAckTimer()
    {
        if (!_ackTimerRuns)
        {
            _ackTimerRuns = true;
            _ackTimer.Change(TimeSpan.FromMilliseconds(_ackDelayMs), Timeout.InfiniteTimeSpan);
        }
    }

    private void ReleaseDead()
    {
        if (!_loop.IsLoopThread && !_disposed)
        {
            return;
        }

        foreach (TcpFlow flow in _dead)
        {
            flow.Dispose();
        }

        _dead.Clear();
    }

    private void Expire(long now)
    {
        List<(NetAddress Guest, ushort Port, bool Aliased)>? idle = null;
        foreach ((var key, UdpFlow flow) in _udpFlows)
        {
            if (flow.IsIdle(now))
            {
                (idle ??= []).Add(key);
            }
        }

        foreach (var key in idle ?? [])
        {
            _udpFlows.Remove(key, out UdpFlow? flow);
            flow!.Dispose();
        }

        if (_options.Prefix6 is not null && now - _advertisedMs > AdvertiseMs && _receiver is not null)
        {
            Advertise(NetAddress.From(IPAddress.Parse("ff02::1")), 0x3333_0000_0001, now);
        }
    }

    private void OnSwitchFrame(byte[] buffer, int offset, int length, NetOffload offload)
    {
        ReadOnlySpan<byte> frame = buffer.AsSpan(offset, length);
        ulong to = Mac.Read(frame);
        if (_receiver is null || (to != GuestMac && !Mac.IsGroup(to)))
        {
            return;
        }

        if (!_receiver.TryReceive(frame, offload))
        {
            Interlocked.Increment(ref _dropped); // a switch does not wait
        }
    }

    // True when there is something for the loop to do.
    private bool Route(ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        HasSpoken = true;
        ulong to = Mac.Read(frame);
        bool group = Mac.IsGroup(to);
        if (to != GatewayMac && !group)
        {
            _switch?.Send(frame, offload);
            return false;
        }

        bool consumed = false;
        _routed = null;
        ReadOnlySpan<byte> packet = frame[Proto.EthernetBytes..];
        switch (BinaryPrimitives.ReadUInt16BigEndian(frame[12..]))
        {
            case Proto.EtherArp:
                consumed = OnArp(packet);
                break;
            case Proto.EtherIpv4:
                consumed = OnIpv4(packet, group);
                break;
            case Proto.EtherIpv6 when _options.Prefix6 is not null:
                consumed = OnIpv6(packet, group);
                break;
        }

        if (group && !consumed)
        {
            _switch?.Send(frame, offload);
        }

        if (_routed is { HasDelayedAck: true })
        {
            StartAckTimer();
        }

        return _control.Count > 0 || _routed is { NeedsFlush: true };
    }

    // RFC 826. The gateway answers for its own addresses; other VMs answer for theirs.
    private bool OnArp(ReadOnlySpan<byte> packet)
    {
        if (packet.Length < 28 || BinaryPrimitives.ReadUInt64BigEndian(packet) != 0x0001_0800_0604_0001)
        {
            return false;
        }

        NetAddress target = NetAddress.FromV4(packet[24..]);
        if (target != _gateway4 && target != _dns4)
        {
            return false;
        }

        Span<byte> reply = Builder.StartArp(Mac.Read(packet[8..]), GatewayMac);
        BinaryPrimitives.WriteUInt64BigEndian(reply, 0x0001_0800_0604_0002);
        Mac.Write(reply[8..], GatewayMac);
        target.CopyTo(reply[14..]);
        packet.Slice(8, 10).CopyTo(reply[18..]);
        Emit(default);
        return true;
    }

    private bool OnIpv4(ReadOnlySpan<byte> packet, bool group)
    {
        if (packet.Length < Proto.Ipv4Bytes || packet[0] >> 4 != 4)
        {
            return false;
        }

        int headerBytes = (packet[0] & 15) * 4;
        int total = BinaryPrimitives.ReadUInt16BigEndian(packet[2..]);

        // A large segment may be longer than the field can say: then the frame's length counts.
        if (total == 0)
        {
            total = packet.Length;
        }

        if (headerBytes < Proto.Ipv4Bytes || total < headerBytes || total > packet.Length)
        {
            Interlocked.Increment(ref _dropped);
            return false;
        }

        NetAddress source = NetAddress.FromV4(packet[12..]);
        NetAddress destination = NetAddress.FromV4(packet[16..]);
        ReadOnlySpan<byte> payload = packet[headerBytes..total];
        byte protocol = packet[9];
        ushort fragment = BinaryPrimitives.ReadUInt16BigEndian(packet[6..]);
        if ((fragment & 0x3FFF) != 0)
        {
            byte[]? whole = group ? null : Reassemble(packet, payload, fragment);
            if (whole is null)
            {
                return !group;
            }

            OnTransport(source, destination, protocol, whole);
            return true;
        }

        if (group)
        {
            return protocol == Proto.Udp && OnBroadcastUdp(payload);
        }

        OnTransport(source, destination, protocol, payload);
        return true;
    }

    private bool OnIpv6(ReadOnlySpan<byte> packet, bool group)
    {
        if (packet.Length < Proto.Ipv6Bytes || packet[0] >> 4 != 6)
        {
            return false;
        }

        int length = BinaryPrimitives.ReadUInt16BigEndian(packet[4..]);
        if (length == 0 || length > packet.Length - Proto.Ipv6Bytes)
        {
            Interlocked.Increment(ref _dropped);
            return false;
        }

        NetAddress source = NetAddress.FromV6(packet[8..]);
        NetAddress destination = NetAddress.FromV6(packet[24..]);
        ReadOnlySpan<byte> payload = packet.Slice(Proto.Ipv6Bytes, length);
        if (packet[6] == Proto.Icmpv6)
        {
            return OnIcmpv6(source, destination, payload) || !group;
        }

        if (!group)
        {
            OnTransport(source, destination, packet[6], payload);
        }

        return !group;
    }

    private void OnTransport(NetAddress source, NetAddress destination, byte protocol, ReadOnlySpan<byte> payload)
    {
        switch (protocol)
        {
            case Proto.Tcp:
                OnTcp(source, destination, payload);
                break;
            case Proto.Udp:
                OnUdp(source, destination, payload);
                break;
            case Proto.Icmp when !source.IsV6 && payload.Length >= 8 && payload[0] == 8
                && (destination == _gateway4 || destination == _dns4):
                Span<byte> reply = Builder.StartIp(
                    GuestMac, GatewayMac, destination, source, Proto.Icmp, payload.Length);
                payload.CopyTo(reply);
                reply[..4].Clear();
                BinaryPrimitives.WriteUInt16BigEndian(reply[2..], NetFrames.Checksum(reply));
                Emit(default);
                break;
        }
    }

    private void OnTcp(NetAddress source, NetAddress destination, ReadOnlySpan<byte> segment)
    {
        if (segment.Length < Proto.TcpBytes)
        {
            return;
        }

        int headerBytes = (segment[12] >> 4) * 4;
        if (headerBytes < Proto.TcpBytes || headerBytes > segment.Length)
        {
            return;
        }

        var key = new FlowKey(
            source,
            BinaryPrimitives.ReadUInt16BigEndian(segment),
            destination,
            BinaryPrimitives.ReadUInt16BigEndian(segment[2..]));
        if (_flows.TryGetValue(key, out TcpFlow? flow))
        {
            flow.OnSegment(segment);
            _routed = flow;
            return;
        }

        const byte SynAckRst = 2 | 16 | 4;
        if ((segment[13] & SynAckRst) != 2)
        {
            if ((segment[13] & 4) == 0)
            {
                Refuse(key, segment, headerBytes);
            }

            return;
        }

        if (_flows.Count >= MaxFlows || !TryFindTarget(destination, key.RemotePort, out IPEndPoint? target))
        {
            Refuse(key, segment, headerBytes);
            return;
        }

        if (TcpFlow.Open(this, key, target, NextIss(key), segment) is { } opened)
        {
            _flows[key] = opened;
        }
    }

    // RFC 6528: hard to guess, growing with time.
    private uint NextIss(in FlowKey key) =>
        _issBase + (uint)key.GetHashCode() + ((uint)NowMs * 250);

    // A segment without a connection is answered with a reset (RFC 9293 §3.10.7.1).
    private void Refuse(in FlowKey key, ReadOnlySpan<byte> segment, int headerBytes)
    {
        byte flags = segment[13];
        uint length = (uint)(segment.Length - headerBytes) + ((flags & 2) != 0 ? 1u : 0) + ((flags & 1) != 0 ? 1u : 0);
        Span<byte> tcp = Builder.StartIp(
            GuestMac, GatewayMac, key.Remote, key.Guest, Proto.Tcp, Proto.TcpBytes);
        tcp.Clear();
        BinaryPrimitives.WriteUInt16BigEndian(tcp, key.RemotePort);
        BinaryPrimitives.WriteUInt16BigEndian(tcp[2..], key.GuestPort);
        bool hasAck = (flags & 16) != 0;
        BinaryPrimitives.WriteUInt32BigEndian(tcp[4..], hasAck ? BinaryPrimitives.ReadUInt32BigEndian(segment[8..]) : 0);
        if (!hasAck)
        {
            uint seq = BinaryPrimitives.ReadUInt32BigEndian(segment[4..]);
            BinaryPrimitives.WriteUInt32BigEndian(tcp[8..], seq + length);
        }

        tcp[12] = 0x50;
        tcp[13] = hasAck ? (byte)4 : (byte)(4 | 16);
        Builder.FinishChecksum(Proto.Tcp, 16);
        Emit(default);
    }

    // Where a destination of the guest is on the host.
    private bool TryFindTarget(NetAddress destination, ushort port, [System.Diagnostics.CodeAnalysis.NotNullWhen(true)] out IPEndPoint? target)
    {
        target = null;
        bool gateway = destination == _gateway4 || (_options.Prefix6 is not null
            && (destination == _gateway6 || destination == _linkLocal6));
        if (gateway)
        {
            target = _options.HostLoopback && !_options.Isolated
                ? new IPEndPoint(destination.IsV6 ? IPAddress.IPv6Loopback : IPAddress.Loopback, port)
                : null;
            return target is not null;
        }

        if (destination == _dns4 || (_options.Prefix6 is not null && destination == _dns6))
        {
            target = port == Dns.Port && !_options.Isolated ? new IPEndPoint(_nameServers[0], Dns.Port) : null;
            return target is not null;
        }

        IPAddress address = destination.ToIPAddress();
        bool inside = !destination.IsV6 && (destination.Value & ~(UInt128)0xFF) == _network4.Value;
        bool local = destination.IsV6
            ? address.IsIPv6LinkLocal || address.IsIPv6Multicast || destination.Value <= 1
            : IPAddress.IsLoopback(address) || (uint)destination.Value is 0 or >= 0xE000_0000;
        if (_options.Isolated || inside || local)
        {
            return false;
        }

        target = new IPEndPoint(address, port);
        return true;
    }

    private static bool TryReadUdp(
        ReadOnlySpan<byte> datagram, out ushort from, out ushort to, out ReadOnlySpan<byte> payload)
    {
        from = 0;
        to = 0;
        payload = default;
        if (datagram.Length < Proto.UdpBytes)
        {
            return false;
        }

        int length = BinaryPrimitives.ReadUInt16BigEndian(datagram[4..]);
        if (length < Proto.UdpBytes || length > datagram.Length)
        {
            return false;
        }

        from = BinaryPrimitives.ReadUInt16BigEndian(datagram);
        to = BinaryPrimitives.ReadUInt16BigEndian(datagram[2..]);
        payload = datagram[Proto.UdpBytes..length];
        return true;
    }

    private bool OnBroadcastUdp(ReadOnlySpan<byte> datagram)
    {
        if (!TryReadUdp(datagram, out _, out ushort port, out ReadOnlySpan<byte> payload) || port != Dhcp.ServerPort)
        {
            return false;
        }

        OnDhcp(payload, new NetAddress(0xFFFF_FFFF, false));
        return true;
    }

    private void OnDhcp(ReadOnlySpan<byte> payload, NetAddress replyTo)
    {
        var lease = new DhcpLease(
            GuestAddress, _gateway4, _options.Isolated ? null : _gateway4, _dns4, _options.HostName, Mtu);
        int length = Dhcp.Answer(payload, lease, _scratch);
        if (length > 0)
        {
            EmitUdp(_gateway4, Dhcp.ServerPort, replyTo, Dhcp.ClientPort, _scratch.AsSpan(0, length));
        }
    }

    private void OnUdp(NetAddress source, NetAddress destination, ReadOnlySpan<byte> datagram)
    {
        if (!TryReadUdp(datagram, out ushort from, out ushort to, out ReadOnlySpan<byte> payload))
        {
            return;
        }

        bool toDns = destination == _dns4 || (_options.Prefix6 is not null && destination == _dns6);
        if (destination == _gateway4 && to == Dhcp.ServerPort)
        {
            OnDhcp(payload, source);
            return;
        }

        if (toDns && to == Dns.Port && AnswerName(source, from, destination, payload))
        {
            return;
        }

        if (destination == GatewayFor(source))
        {
            foreach (UdpForward forward in _udpForwards)
            {
                if (forward.TryAnswer(from, to, payload))
                {
                    return;
                }
            }
        }

        if (!TryFindTarget(destination, to, out IPEndPoint? target))
        {
            return;
        }

        bool aliased = toDns;
        if (!_udpFlows.TryGetValue((source, from, aliased), out UdpFlow? flow))
        {
            if (_udpFlows.Count >= MaxUdpFlows
                || UdpFlow.Open(this, source, from, target.AddressFamily) is not { } opened)
            {
                Interlocked.Increment(ref _dropped);
                return;
            }

            flow = opened;
            _udpFlows[(source, from, aliased)] = flow;
        }

        if (aliased)
        {
            flow.Alias = (target, destination, to);
        }

        flow.Send(payload, target);
    }

    private bool AnswerName(NetAddress source, ushort from, NetAddress server, ReadOnlySpan<byte> query)
    {
        if (query.Length > 512 || !Dns.TryReadQuestion(query, out string name, out ushort type, out int end))
        {
            return false;
        }

        name = Dns.Bare(name);
        NetAddress address;
        if (name is "gateway" or "host")
        {
            address = type == 28 && _options.Prefix6 is not null ? _gateway6 : _gateway4;
        }
        else if (name.Length > 0 && string.Equals(name, _options.HostName, StringComparison.OrdinalIgnoreCase))
        {
            address = GuestAddress;
        }
        else if (name.Contains('.', StringComparison.Ordinal) || _switch is null || !_switch.TryResolve(name, out address))
        {
            return false;
        }

        int length = Dns.Answer(query, end, type, address, _scratch);
        EmitUdp(server, Dns.Port, source, from, _scratch.AsSpan(0, length));
        return true;
    }

    // Neighbour discovery (RFC 4861) and echo. True when it was for the router.
    private bool OnIcmpv6(NetAddress source, NetAddress destination, ReadOnlySpan<byte> message)
    {
        if (message.Length < 8)
        {
            return false;
        }

        switch (message[0])
        {
            case RouterSolicit:
                Advertise(
                    source.Value == 0 ? NetAddress.From(IPAddress.Parse("ff02::1")) : source,
                    source.Value == 0 ? 0x3333_0000_0001 : GuestMac,
                    NowMs);
                return true;
            case NeighborSolicit when message.Length >= 24:
                NetAddress target = NetAddress.FromV6(message[8..]);
                if (source.Value == 0 || (target != _gateway6 && target != _dns6 && target != _linkLocal6))
                {
                    return false;
                }

                Span<byte> advert = Builder.StartIp(GuestMac, GatewayMac, target, source, Proto.Icmpv6, 32, hops: 255);
                advert.Clear();
                advert[0] = NeighborAdvert;
                advert[4] = 0xE0; // router, solicited, override
                target.CopyTo(advert[8..]);
                advert[24] = 2;
                advert[25] = 1;
                Mac.Write(advert[26..], GatewayMac);
                Builder.FinishChecksum(Proto.Icmpv6, 2);
                Emit(default);
                return true;
            case 128 when destination == _gateway6 || destination == _dns6 || destination == _linkLocal6:
                Span<byte> echo = Builder.StartIp(
                    GuestMac, GatewayMac, destination, source, Proto.Icmpv6, message.Length);
                message.CopyTo(echo);
                echo[0] = 129;
                Builder.FinishChecksum(Proto.Icmpv6, 2);
                Emit(default);
                return true;
            default:
                return false;
        }
    }

    // RFC 4861 §4.2: the prefix is on-link and autonomous; RFC 8106 carries the DNS server.
    private void Advertise(NetAddress to, ulong toMac, long now)
    {
        _advertisedMs = now;
        const int LengthBytes = 16 + 8 + 8 + 32 + 24;
        Span<byte> advert = Builder.StartIp(toMac, GatewayMac, _linkLocal6, to, Proto.Icmpv6, LengthBytes, hops: 255);
        advert.Clear();
        advert[0] = RouterAdvert;
        advert[4] = 64;
        BinaryPrimitives.WriteUInt16BigEndian(advert[6..], _options.Isolated ? (ushort)0 : (ushort)1800);
        Span<byte> option = advert[16..];
        option[0] = 1;
        option[1] = 1;
        Mac.Write(option[2..], GatewayMac);
        option = option[8..];
        option[0] = 5;
        option[1] = 1;
        BinaryPrimitives.WriteUInt32BigEndian(option[4..], (uint)Mtu);
        option = option[8..];
        option[0] = 3;
        option[1] = 4;
        option[2] = 64;
        option[3] = 0xC0;
        BinaryPrimitives.WriteUInt32BigEndian(option[4..], 86400);
        BinaryPrimitives.WriteUInt32BigEndian(option[8..], 14400);
        NetAddress.From(_options.Prefix6!).CopyTo(option[16..]);
        option = option[32..];
        option[0] = 25;
        option[1] = 3;
        BinaryPrimitives.WriteUInt32BigEndian(option[4..], 3600);
        _dns6.CopyTo(option[8..]);
        Builder.FinishChecksum(Proto.Icmpv6, 2);
        Emit(default);
    }

    private byte[]? Reassemble(ReadOnlySpan<byte> packet, ReadOnlySpan<byte> payload, ushort fragment)
    {
        uint key = ((uint)BinaryPrimitives.ReadUInt16BigEndian(packet[4..]) << 8) | packet[9];
        if (!_reassemblies.TryGetValue(key, out Reassembly? assembly))
        {
            if (_reassemblies.Count >= MaxReassemblies)
            {
                _reassemblies.Clear(); // incomplete ones are lost, as their senders must expect
            }

            assembly = new Reassembly();
            _reassemblies[key] = assembly;
        }

        byte[]? whole = assembly.Add((fragment & 0x1FFF) * 8, payload, last: (fragment & 0x2000) == 0);
        if (whole is not null || assembly.IsBroken)
        {
            _reassemblies.Remove(key);
        }

        return whole;
    }

    private void Listen(PortForward forward)
    {
        try
        {
            if (forward.IsUdp)
            {
                var udp = new UdpForward(this, forward);
                _udpForwards.Add(udp);
                udp.Bind();
                ForwardPorts = [.. ForwardPorts, udp.Port];
                return;
            }

            var socket = new Socket(forward.HostAddress.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
            try
            {
                socket.Bind(new IPEndPoint(forward.HostAddress, forward.HostPort));
                socket.Listen(128);
                socket.Blocking = false;
            }
            catch
            {
                socket.Dispose();
                throw;
            }

            _listeners.Add((socket, Watch(socket.SafeHandle, PollEvents.Readable, _ => Accept(socket, forward))));
            ForwardPorts = [.. ForwardPorts, ((IPEndPoint)socket.LocalEndPoint!).Port];
        }
        catch (SocketException e)
        {
            string protocol = forward.IsUdp ? "udp" : "tcp";
            string what = $"forward: {protocol} {new IPEndPoint(forward.HostAddress, forward.HostPort)}: ";
            throw new HostException(what + e.SocketErrorCode switch
            {
                SocketError.AddressAlreadyInUse => "something else on this host listens there; give the forward another host port",
                SocketError.AccessDenied => "this user may not listen there; give the forward a host port of 1024 or above",
                SocketError.AddressNotAvailable => "this host does not have that address",
                _ => e.Message,
            });
        }
    }

    private void Accept(Socket listener, PortForward forward)
    {
        Socket accepted;
        try
        {
            accepted = listener.Accept();
            accepted.Blocking = false;
            accepted.NoDelay = true;
        }
        catch (SocketException)
        {
            return; // gone again, or no descriptors left
        }

        NetAddress guest = forward.GuestAddress is { } address ? NetAddress.From(address) : GuestAddress;
        for (int i = 0; i < 16384 && _flows.Count < MaxFlows; i++)
        {
            ushort port = _nextForwardPort;
            _nextForwardPort = _nextForwardPort == 65535 ? (ushort)49152 : (ushort)(_nextForwardPort + 1);
            var key = new FlowKey(guest, forward.GuestPort, GatewayFor(guest), port);
            if (!_flows.ContainsKey(key))
            {
                _flows[key] = TcpFlow.Accept(this, key, accepted, NextIss(key));
                return;
            }
        }

        accepted.Dispose();
    }

    /// <summary>Fragments of one datagram.</summary>
    private sealed class Reassembly
    {
        private readonly byte[] _data = new byte[65536];
        private readonly bool[] _have = new bool[8192];
        private int _received;
        private int _total = -1;

        public bool IsBroken { get; private set; }

        public byte[]? Add(int offset, ReadOnlySpan<byte> payload, bool last)
        {
            if (offset + payload.Length > _data.Length - Proto.Ipv4Bytes || (!last && payload.Length % 8 != 0)
                || payload.Length == 0 || (last && _total >= 0))
            {
                IsBroken = true;
                return null;
            }

            payload.CopyTo(_data.AsSpan(offset));
            for (int block = offset / 8; block < (offset + payload.Length + 7) / 8; block++)
            {
                _received += _have[block] ? 0 : 1;
                _have[block] = true;
            }

            if (last)
            {
                _total = offset + payload.Length;
            }

            return _total >= 0 && _received == (_total + 7) / 8 ? _data[.._total] : null;
        }
    }
}

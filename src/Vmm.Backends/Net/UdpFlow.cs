// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Net;
using System.Net.Sockets;
using Vmm.Host;

namespace Vmm.Backends.Net;

/// <summary>
/// A UDP port of the guest and the host socket that stands for it. One socket serves all remote addresses of a port, so
/// that what peers learn about the guest's address stays true. All calls under the network's gate.
/// </summary>
internal sealed class UdpFlow : IDisposable
{
    private const int IdleMs = 120_000;
    private const int BurstDatagrams = 32;

    private readonly UserNetwork _network;
    private readonly Socket _socket;
    private readonly SocketAddress _from;
    private IPollRegistration? _registration;
    private long _lastUsedMs;

    private UdpFlow(UserNetwork network, NetAddress guest, ushort guestPort, Socket socket)
    {
        _network = network;
        Guest = guest;
        GuestPort = guestPort;
        _socket = socket;
        _from = new SocketAddress(socket.AddressFamily);
        _lastUsedMs = _network.NowMs;
    }

    public NetAddress Guest { get; }

    public ushort GuestPort { get; }

    /// <summary>What the guest thinks it talks to, when that differs from the host's view (gateway, DNS).</summary>
    public (IPEndPoint Real, NetAddress Shown, ushort ShownPort)? Alias { get; set; }

    public static UdpFlow? Open(UserNetwork network, NetAddress guest, ushort guestPort, AddressFamily family)
    {
        try
        {
            var socket = new Socket(family, SocketType.Dgram, ProtocolType.Udp) { Blocking = false };
            socket.Bind(new IPEndPoint(family == AddressFamily.InterNetwork ? IPAddress.Any : IPAddress.IPv6Any, 0));
            var flow = new UdpFlow(network, guest, guestPort, socket);
            flow._registration = network.Watch(socket.SafeHandle, PollEvents.Readable, flow.OnReady);
            return flow;
        }
        catch (SocketException)
        {
            return null;
        }
    }

    public void Send(ReadOnlySpan<byte> payload, IPEndPoint target)
    {
        _lastUsedMs = _network.NowMs;
        try
        {
            _socket.SendTo(payload, SocketFlags.None, target);
        }
        catch (SocketException)
        {
            // UDP may lose anything; an ICMP error of an earlier datagram also ends here.
        }
    }

    public bool IsIdle(long nowMs) => nowMs - _lastUsedMs > IdleMs;

    public void Dispose()
    {
        _registration?.Dispose();
        _socket.Dispose();
    }

    private void OnReady(PollEvents events)
    {
        byte[] buffer = _network.DatagramBuffer;
        for (int i = 0; i < BurstDatagrams; i++)
        {
            int length;
            try
            {
                if (_socket.Available == 0 && i > 0)
                {
                    return;
                }

                length = _socket.ReceiveFrom(buffer, SocketFlags.None, _from);
            }
            catch (SocketException e) when (e.SocketErrorCode == SocketError.WouldBlock)
            {
                return;
            }
            catch (SocketException)
            {
                continue; // an error that an ICMP message left on the socket
            }

            _lastUsedMs = _network.NowMs;
            var from = (IPEndPoint)new IPEndPoint(
                _socket.AddressFamily == AddressFamily.InterNetwork ? IPAddress.Any : IPAddress.IPv6Any, 0).Create(_from);
            (NetAddress shown, ushort port) = _network.ShownAddress(from, Alias);
            _network.EmitUdp(shown, port, Guest, GuestPort, buffer.AsSpan(0, length));
        }
    }
}

/// <summary>A UDP port of the host that leads to the guest. Each sender gets a port of the gateway.</summary>
internal sealed class UdpForward : IDisposable
{
    private const int MaxPeers = 1024;

    private readonly UserNetwork _network;
    private readonly PortForward _forward;
    private readonly Socket _socket;
    private readonly System.Collections.Generic.Dictionary<IPEndPoint, ushort> _ports = [];
    private readonly System.Collections.Generic.Dictionary<ushort, IPEndPoint> _peers = [];
    private IPollRegistration? _registration;
    private ushort _nextPort = 40000;

    public UdpForward(UserNetwork network, PortForward forward)
    {
        _network = network;
        _forward = forward;
        _socket = new Socket(forward.HostAddress.AddressFamily, SocketType.Dgram, ProtocolType.Udp) { Blocking = false };
    }

    public int Port => ((IPEndPoint)_socket.LocalEndPoint!).Port;

    public void Bind()
    {
        _socket.Bind(new IPEndPoint(_forward.HostAddress, _forward.HostPort));
        _registration = _network.Watch(_socket.SafeHandle, PollEvents.Readable, OnReady);
    }

    /// <summary>An answer of the guest to a port of the gateway.</summary>
    public bool TryAnswer(ushort guestPort, ushort gatewayPort, ReadOnlySpan<byte> payload)
    {
        if (guestPort != _forward.GuestPort || !_peers.TryGetValue(gatewayPort, out IPEndPoint? peer))
        {
            return false;
        }

        try
        {
            _socket.SendTo(payload, SocketFlags.None, peer);
        }
        catch (SocketException)
        {
            // Lost, as UDP may be.
        }

        return true;
    }

    public void Dispose()
    {
        _registration?.Dispose();
        _socket.Dispose();
    }

    private void OnReady(PollEvents events)
    {
        EndPoint from = new IPEndPoint(IPAddress.Any, 0);
        if (_socket.AddressFamily == AddressFamily.InterNetworkV6)
        {
            from = new IPEndPoint(IPAddress.IPv6Any, 0);
        }

        int length;
        try
        {
            length = _socket.ReceiveFrom(_network.DatagramBuffer, SocketFlags.None, ref from);
        }
        catch (SocketException)
        {
            return;
        }

        var peer = (IPEndPoint)from;
        if (!_ports.TryGetValue(peer, out ushort port))
        {
            if (_ports.Count >= MaxPeers)
            {
                _ports.Clear();
                _peers.Clear();
            }

            port = _nextPort;
            _nextPort = _nextPort == 60000 ? (ushort)40000 : (ushort)(_nextPort + 1);
            _ports[peer] = port;
            _peers[port] = peer;
        }

        NetAddress guest = _forward.GuestAddress is { } address ? NetAddress.From(address) : _network.GuestAddress;
        _network.EmitUdp(
            _network.GatewayFor(guest), port, guest, _forward.GuestPort, _network.DatagramBuffer.AsSpan(0, length));
    }
}

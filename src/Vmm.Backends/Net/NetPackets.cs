// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;
using Vmm.Core;

namespace Vmm.Backends.Net;

/// <summary>An IPv4 or IPv6 address as a number.</summary>
internal readonly record struct NetAddress(UInt128 Value, bool IsV6)
{
    public static NetAddress FromV4(ReadOnlySpan<byte> bytes) => new(BinaryPrimitives.ReadUInt32BigEndian(bytes), false);

    public static NetAddress FromV6(ReadOnlySpan<byte> bytes) => new(BinaryPrimitives.ReadUInt128BigEndian(bytes), true);

    public static NetAddress From(IPAddress address)
    {
        Span<byte> bytes = stackalloc byte[16];
        address.TryWriteBytes(bytes, out int length);
        return length == 4 ? FromV4(bytes) : FromV6(bytes);
    }

    public void CopyTo(Span<byte> into)
    {
        if (IsV6)
        {
            BinaryPrimitives.WriteUInt128BigEndian(into, Value);
        }
        else
        {
            BinaryPrimitives.WriteUInt32BigEndian(into, (uint)Value);
        }
    }

    public IPAddress ToIPAddress()
    {
        Span<byte> bytes = stackalloc byte[16];
        CopyTo(bytes);
        return new IPAddress(bytes[..(IsV6 ? 16 : 4)]);
    }

    public AddressFamily Family => IsV6 ? AddressFamily.InterNetworkV6 : AddressFamily.InterNetwork;

    public override string ToString() => ToIPAddress().ToString();
}

/// <summary>The two ends of a flow as the guest sees it.</summary>
internal readonly record struct FlowKey(NetAddress Guest, ushort GuestPort, NetAddress Remote, ushort RemotePort);

/// <summary>A MAC address as a number.</summary>
internal static class Mac
{
    public const ulong Broadcast = 0xFFFF_FFFF_FFFF;

    public static ulong Read(ReadOnlySpan<byte> bytes) =>
        ((ulong)BinaryPrimitives.ReadUInt16BigEndian(bytes) << 32) | BinaryPrimitives.ReadUInt32BigEndian(bytes[2..]);

    public static void Write(Span<byte> into, ulong mac)
    {
        BinaryPrimitives.WriteUInt16BigEndian(into, (ushort)(mac >> 32));
        BinaryPrimitives.WriteUInt32BigEndian(into[2..], (uint)mac);
    }

    public static bool IsGroup(ulong mac) => (mac & (1UL << 40)) != 0;
}

/// <summary>Numbers of Ethernet and IP.</summary>
internal static class Proto
{
    public const ushort EtherIpv4 = 0x0800;
    public const ushort EtherArp = 0x0806;
    public const ushort EtherIpv6 = 0x86DD;
    public const byte Icmp = 1;
    public const byte Tcp = 6;
    public const byte Udp = 17;
    public const byte Icmpv6 = 58;
    public const int EthernetBytes = 14;
    public const int Ipv4Bytes = 20;
    public const int Ipv6Bytes = 40;
    public const int UdpBytes = 8;
    public const int TcpBytes = 20;
}

/// <summary>Assembles one frame for the guest in a reused buffer: headers first, then the caller fills the payload.</summary>
internal sealed class PacketBuilder
{
    private readonly byte[] _buffer = new byte[NetFrames.MaxFrameBytes + 64];
    private ushort _identification;
    private int _ip;
    private int _transport;
    private int _length;
    private bool _isV6;

    /// <summary>The finished frame.</summary>
    public ReadOnlySpan<byte> Frame => _buffer.AsSpan(0, _length);

    /// <summary>Starts an IP packet.</summary>
    /// <returns>Where the transport header and payload go.</returns>
    public Span<byte> StartIp(
        ulong destinationMac, ulong sourceMac, NetAddress source, NetAddress destination, byte protocol, int lengthBytes, byte hops = 64)
    {
        Span<byte> frame = _buffer;
        Mac.Write(frame, destinationMac);
        Mac.Write(frame[6..], sourceMac);
        _ip = Proto.EthernetBytes;
        _isV6 = source.IsV6;
        Span<byte> header = frame[_ip..];
        if (_isV6)
        {
            BinaryPrimitives.WriteUInt16BigEndian(frame[12..], Proto.EtherIpv6);
            BinaryPrimitives.WriteUInt32BigEndian(header, 6u << 28);
            BinaryPrimitives.WriteUInt16BigEndian(header[4..], (ushort)lengthBytes);
            header[6] = protocol;
            header[7] = hops;
            source.CopyTo(header[8..]);
            destination.CopyTo(header[24..]);
            _transport = _ip + Proto.Ipv6Bytes;
        }
        else
        {
            BinaryPrimitives.WriteUInt16BigEndian(frame[12..], Proto.EtherIpv4);
            header[..Proto.Ipv4Bytes].Clear();
            header[0] = 0x45;
            BinaryPrimitives.WriteUInt16BigEndian(header[2..], (ushort)(Proto.Ipv4Bytes + lengthBytes));
            BinaryPrimitives.WriteUInt16BigEndian(header[4..], _identification++);
            header[8] = hops;
            header[9] = protocol;
            source.CopyTo(header[12..]);
            destination.CopyTo(header[16..]);
            BinaryPrimitives.WriteUInt16BigEndian(header[10..], NetFrames.Checksum(header[..Proto.Ipv4Bytes]));
            _transport = _ip + Proto.Ipv4Bytes;
        }

        _length = _transport + lengthBytes;
        return frame[_transport.._length];
    }

    /// <summary>Completes the checksum, whose field is cleared first.</summary>
    public void FinishChecksum(byte protocol, int fieldOffset)
    {
        Span<byte> transport = _buffer.AsSpan(_transport, _length - _transport);
        BinaryPrimitives.WriteUInt16BigEndian(transport[fieldOffset..], 0);
        ushort sum = NetFrames.Checksum(transport, PseudoSum(protocol, transport.Length));
        BinaryPrimitives.WriteUInt16BigEndian(transport[fieldOffset..], sum == 0 ? (ushort)0xFFFF : sum);
    }

    /// <summary>Leaves the checksum, and cutting into segments when <paramref name="mss"/> is not 0, to the receiver.</summary>
    public NetOffload LeaveTcp(int tcpHeaderBytes, int mss)
    {
        Span<byte> transport = _buffer.AsSpan(_transport, _length - _transport);
        BinaryPrimitives.WriteUInt16BigEndian(transport[16..], (ushort)PseudoSum(Proto.Tcp, transport.Length));
        bool large = mss != 0 && transport.Length - tcpHeaderBytes > mss;
        byte kind = !large ? (byte)0 : _isV6 ? (byte)4 : (byte)1;
        return new NetOffload(
            true, (ushort)_transport, 16, kind, large ? (ushort)mss : (ushort)0, (ushort)(_transport + tcpHeaderBytes));
    }

    /// <summary>Makes the IPv4 packet a fragment.</summary>
    public void SetFragment(ushort id, int offsetBytes, bool more)
    {
        Span<byte> header = _buffer.AsSpan(_ip, Proto.Ipv4Bytes);
        BinaryPrimitives.WriteUInt16BigEndian(header[4..], id);
        BinaryPrimitives.WriteUInt16BigEndian(header[6..], (ushort)((offsetBytes / 8) | (more ? 0x2000 : 0)));
        BinaryPrimitives.WriteUInt16BigEndian(header[10..], 0);
        BinaryPrimitives.WriteUInt16BigEndian(header[10..], NetFrames.Checksum(header));
    }

    /// <summary>Starts an ARP packet.</summary>
    public Span<byte> StartArp(ulong destinationMac, ulong sourceMac)
    {
        Span<byte> frame = _buffer;
        Mac.Write(frame, destinationMac);
        Mac.Write(frame[6..], sourceMac);
        BinaryPrimitives.WriteUInt16BigEndian(frame[12..], Proto.EtherArp);
        _length = Proto.EthernetBytes + 28;
        return frame.Slice(Proto.EthernetBytes, 28);
    }

    private uint PseudoSum(byte protocol, int lengthBytes)
    {
        ReadOnlySpan<byte> addresses = _isV6 ? _buffer.AsSpan(_ip + 8, 32) : _buffer.AsSpan(_ip + 12, 8);
        return NetFrames.Sum(addresses, protocol + (uint)(lengthBytes & 0xFFFF) + ((uint)lengthBytes >> 16));
    }
}

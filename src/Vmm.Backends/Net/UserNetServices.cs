// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Net;
using System.Text;

namespace Vmm.Backends.Net;

/// <summary>What DHCP tells the guest.</summary>
internal sealed record DhcpLease(
    NetAddress Address, NetAddress Server, NetAddress? Router, NetAddress Dns, string HostName, int Mtu);

/// <summary>DHCP (RFC 2131) for exactly one client: whatever it asks, it gets its address.</summary>
internal static class Dhcp
{
    public const ushort ServerPort = 67;
    public const ushort ClientPort = 68;
    public const string Domain = "internal";

    private const int HeaderBytes = 240;
    private const uint Magic = 0x6382_5363;
    private const uint LeaseSeconds = 86400;
    private const byte Discover = 1;
    private const byte Offer = 2;
    private const byte Request = 3;
    private const byte Acknowledge = 5;
    private const byte Refuse = 6;
    private const byte Inform = 8;

    /// <summary>Answers a message.</summary>
    /// <returns>Length of the answer, 0 for none.</returns>
    public static int Answer(ReadOnlySpan<byte> request, DhcpLease lease, Span<byte> reply)
    {
        if (request.Length < HeaderBytes || request[0] != 1 || request[1] != 1 || request[2] != 6
            || BinaryPrimitives.ReadUInt32BigEndian(request[236..]) != Magic)
        {
            return 0;
        }

        ParseOptions(request[HeaderBytes..], out byte type, out uint wanted, out uint server);
        byte answer = type switch
        {
            Discover => Offer,
            Request => Acknowledge,
            Inform => Acknowledge,
            _ => 0,
        };
        if (answer == 0 || (type == Request && server != 0 && server != (uint)lease.Server.Value))
        {
            return 0; // not for us
        }

        uint ours = (uint)lease.Address.Value;
        uint current = BinaryPrimitives.ReadUInt32BigEndian(request[12..]);
        if (type == Request && ((wanted != 0 && wanted != ours) || (current != 0 && current != ours)))
        {
            answer = Refuse;
        }

        reply.Clear();
        reply[0] = 2;
        reply[1] = 1;
        reply[2] = 6;
        request.Slice(4, 4).CopyTo(reply[4..]);
        request.Slice(10, 2).CopyTo(reply[10..]);
        if (answer != Refuse)
        {
            request.Slice(12, 4).CopyTo(reply[12..]);
            if (type != Inform)
            {
                BinaryPrimitives.WriteUInt32BigEndian(reply[16..], ours);
            }
        }

        lease.Server.CopyTo(reply[20..]);
        request.Slice(28, 16).CopyTo(reply[28..]);
        BinaryPrimitives.WriteUInt32BigEndian(reply[236..], Magic);
        var options = new OptionWriter(reply[HeaderBytes..]);
        options.Byte(53, answer);
        options.Address(54, lease.Server);
        if (answer != Refuse)
        {
            if (type != Inform)
            {
                options.UInt32(51, LeaseSeconds);
            }

            options.UInt32(1, 0xFFFF_FF00);
            if (lease.Router is { } router)
            {
                options.Address(3, router);
            }

            options.Address(6, lease.Dns);
            options.Text(12, lease.HostName);
            options.Text(15, Domain);
            options.UInt16(26, (ushort)lease.Mtu);
            options.UInt32(28, ours | 0xFF);
        }

        return Math.Max(300, HeaderBytes + options.End());
    }

    private static void ParseOptions(ReadOnlySpan<byte> options, out byte type, out uint wanted, out uint server)
    {
        type = 0;
        wanted = 0;
        server = 0;
        while (options.Length > 0 && options[0] != 255)
        {
            if (options[0] == 0)
            {
                options = options[1..];
                continue;
            }

            if (options.Length < 2 || options.Length - 2 < options[1])
            {
                return;
            }

            ReadOnlySpan<byte> value = options.Slice(2, options[1]);
            switch (options[0])
            {
                case 53 when value.Length == 1:
                    type = value[0];
                    break;
                case 50 when value.Length == 4:
                    wanted = BinaryPrimitives.ReadUInt32BigEndian(value);
                    break;
                case 54 when value.Length == 4:
                    server = BinaryPrimitives.ReadUInt32BigEndian(value);
                    break;
            }

            options = options[(2 + options[1])..];
        }
    }

    private ref struct OptionWriter
    {
        private readonly Span<byte> _into;
        private int _at;

        public OptionWriter(Span<byte> into)
        {
            _into = into;
            _at = 0;
        }

        public void Byte(byte code, byte value)
        {
            Start(code, 1)[0] = value;
        }

        public void UInt16(byte code, ushort value) => BinaryPrimitives.WriteUInt16BigEndian(Start(code, 2), value);

        public void UInt32(byte code, uint value) => BinaryPrimitives.WriteUInt32BigEndian(Start(code, 4), value);

        public void Address(byte code, NetAddress value) => value.CopyTo(Start(code, 4));

        public void Text(byte code, string value)
        {
            if (value.Length is > 0 and < 64)
            {
                Encoding.ASCII.GetBytes(value, Start(code, (byte)value.Length));
            }
        }

        public int End()
        {
            _into[_at++] = 255;
            return _at;
        }

        private Span<byte> Start(byte code, byte length)
        {
            _into[_at] = code;
            _into[_at + 1] = length;
            Span<byte> value = _into.Slice(_at + 2, length);
            _at += 2 + length;
            return value;
        }
    }
}

/// <summary>DNS (RFC 1035): answers for the names of VMs; everything else goes to the host's servers.</summary>
internal static class Dns
{
    public const ushort Port = 53;

    private const ushort TypeA = 1;
    private const ushort TypeAaaa = 28;
    private const ushort ClassIn = 1;
    private const uint TimeToLive = 5;

    /// <summary>Reads the only question of a query.</summary>
    /// <returns>False for anything but a plain query.</returns>
    public static bool TryReadQuestion(ReadOnlySpan<byte> query, out string name, out ushort type, out int end)
    {
        name = "";
        type = 0;
        end = 12;
        if (query.Length < 17 || (query[2] & 0xF8) != 0 || BinaryPrimitives.ReadUInt16BigEndian(query[4..]) != 1)
        {
            return false;
        }

        var text = new StringBuilder();
        while (query[end] != 0)
        {
            int length = query[end];
            if (length > 63 || end + 1 + length + 5 > query.Length || text.Length > 255)
            {
                return false;
            }

            if (text.Length > 0)
            {
                text.Append('.');
            }

            text.Append(Encoding.ASCII.GetString(query.Slice(end + 1, length)));
            end += 1 + length;
        }

        if (end + 5 > query.Length || BinaryPrimitives.ReadUInt16BigEndian(query[(end + 3)..]) != ClassIn)
        {
            return false;
        }

        type = BinaryPrimitives.ReadUInt16BigEndian(query[(end + 1)..]);
        end += 5;
        name = text.ToString().ToLowerInvariant();
        return true;
    }

    /// <summary>Writes the answer for a name that we know; other types than A get an empty answer.</summary>
    public static int Answer(ReadOnlySpan<byte> query, int questionEnd, ushort type, NetAddress address, Span<byte> reply)
    {
        query[..questionEnd].CopyTo(reply);
        reply[2] = (byte)(0x84 | (query[2] & 1));
        reply[3] = 0x80;
        bool answers = type == (address.IsV6 ? TypeAaaa : TypeA);
        BinaryPrimitives.WriteUInt16BigEndian(reply[6..], answers ? (ushort)1 : (ushort)0);
        reply[8..12].Clear();
        int at = questionEnd;
        if (answers)
        {
            int length = address.IsV6 ? 16 : 4;
            BinaryPrimitives.WriteUInt16BigEndian(reply[at..], 0xC00C);
            BinaryPrimitives.WriteUInt16BigEndian(reply[(at + 2)..], type);
            BinaryPrimitives.WriteUInt16BigEndian(reply[(at + 4)..], ClassIn);
            BinaryPrimitives.WriteUInt32BigEndian(reply[(at + 6)..], TimeToLive);
            BinaryPrimitives.WriteUInt16BigEndian(reply[(at + 10)..], (ushort)length);
            address.CopyTo(reply[(at + 12)..]);
            at += 12 + length;
        }

        return at;
    }

    /// <summary>Name servers in resolv.conf's format; the loopback address when there is none.</summary>
    public static IReadOnlyList<IPAddress> ReadServers(string path)
    {
        var servers = new List<IPAddress>();
        try
        {
            foreach (string line in File.ReadLines(path))
            {
                string[] words = line.Split([' ', '\t'], StringSplitOptions.RemoveEmptyEntries);
                if (words.Length >= 2 && string.Equals(words[0], "nameserver", StringComparison.Ordinal)
                    && IPAddress.TryParse(words[1], out IPAddress? address))
                {
                    servers.Add(address);
                }
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // Without the file the resolver's default is a server on this host (resolv.conf(5)).
        }

        return servers.Count > 0 ? servers : [IPAddress.Loopback];
    }

    /// <summary>A name without our domain.</summary>
    public static string Bare(string name)
    {
        string suffix = string.Create(CultureInfo.InvariantCulture, $".{Dhcp.Domain}");
        return name.EndsWith(suffix, StringComparison.Ordinal) ? name[..^suffix.Length] : name;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;

namespace Vmm.Core;

/// <summary>
/// Finishes frames whose sender left work to do (<see cref="NetOffload"/>), for receivers that cannot: partial checksums
/// are completed and large TCP segments cut. Frames come from guests: everything is checked, nothing throws.
/// </summary>
public static class NetFrames
{
    /// <summary>Largest frame with offload: 64 KiB of IP behind an Ethernet header with a VLAN tag.</summary>
    public const int MaxFrameBytes = 65535 + 18;

    private const int EthernetBytes = 14;
    private const int TcpMinimumBytes = 20;
    private const byte TcpFin = 0x01;
    private const byte TcpPush = 0x08;
    private const byte TcpCwr = 0x80;

    /// <summary>Internet checksum (RFC 1071) without the final complement.</summary>
    /// <param name="data">Bytes in network order; an odd last byte counts as the high half.</param>
    /// <param name="initial">Sum so far.</param>
    public static uint Sum(ReadOnlySpan<byte> data, uint initial = 0)
    {
        // Sums of 32-bit halves in 64 bits cannot overflow for any frame; one's complement sums do not depend on the
        // word size or, up to a final swap, on byte order (RFC 1071 §2).
        ulong sum = 0;
        while (data.Length >= 8)
        {
            ulong word = BinaryPrimitives.ReadUInt64BigEndian(data);
            sum += (word >> 32) + (uint)word;
            data = data[8..];
        }

        while (data.Length >= 2)
        {
            sum += BinaryPrimitives.ReadUInt16BigEndian(data);
            data = data[2..];
        }

        if (data.Length == 1)
        {
            sum += (uint)data[0] << 8;
        }

        sum += initial;
        while (sum >> 16 != 0)
        {
            sum = (sum & 0xFFFF) + (sum >> 16);
        }

        return (uint)sum;
    }

    /// <summary>Internet checksum as it stands in a header.</summary>
    public static ushort Checksum(ReadOnlySpan<byte> data, uint initial = 0) => (ushort)~Sum(data, initial);

    /// <summary>Completes a partial checksum: the field holds the pseudo header's sum (VIRTIO 1.2 §5.1.6.2).</summary>
    /// <returns>False when the field lies outside the frame; the frame is then unchanged.</returns>
    public static bool TryCompleteChecksum(Span<byte> frame, in NetOffload offload)
    {
        if (!offload.NeedsChecksum)
        {
            return true;
        }

        int start = offload.ChecksumStart;
        int field = start + offload.ChecksumOffset;
        if (start > frame.Length || field + 2 > frame.Length)
        {
            return false;
        }

        ushort sum = Checksum(frame[start..]);

        // 0 means "none" in UDP; the other zero of one's complement is equivalent everywhere (RFC 768).
        BinaryPrimitives.WriteUInt16BigEndian(frame[field..], sum == 0 ? (ushort)0xFFFF : sum);
        return true;
    }

    /// <summary>Cuts one segment off a large TCP frame.</summary>
    /// <param name="frame">The whole frame.</param>
    /// <param name="offload">What its sender said; <see cref="NetOffload.SegmentKind"/> is not 0.</param>
    /// <param name="position">Payload done so far; start with 0.</param>
    /// <param name="into">Takes the segment with complete checksums.</param>
    /// <param name="lengthBytes">Its length.</param>
    /// <returns>False at the end, or when the headers are damaged.</returns>
    public static bool TryNextSegment(
        ReadOnlySpan<byte> frame, in NetOffload offload, ref int position, Span<byte> into, out int lengthBytes)
    {
        lengthBytes = 0;
        if (!TryParse(frame, offload, out int ip, out bool isV6, out int tcp, out int payload))
        {
            return false;
        }

        int left = frame.Length - payload - position;
        int take = Math.Min(left, offload.SegmentBytes);
        if (left <= 0 || take <= 0 || payload + take > into.Length)
        {
            return false;
        }

        bool last = take == left;
        frame[..payload].CopyTo(into);
        frame.Slice(payload + position, take).CopyTo(into[payload..]);
        lengthBytes = payload + take;
        Span<byte> segment = into[..lengthBytes];
        Span<byte> header = segment[tcp..];
        uint sequence = BinaryPrimitives.ReadUInt32BigEndian(header[4..]) + (uint)position;
        BinaryPrimitives.WriteUInt32BigEndian(header[4..], sequence);
        header[13] = (byte)(header[13] & ~((last ? 0 : TcpFin | TcpPush) | (position == 0 ? 0 : TcpCwr)));
        FinishIp(segment, ip, isV6, (ushort)(position / offload.SegmentBytes));
        FinishTcp(segment, ip, isV6, tcp);
        position += take;
        return true;
    }

    private static bool TryParse(
        ReadOnlySpan<byte> frame, in NetOffload offload, out int ip, out bool isV6, out int tcp, out int payload)
    {
        ip = EthernetBytes;
        isV6 = offload.SegmentKind == 4;
        tcp = offload.ChecksumStart;
        payload = 0;
        if (frame.Length < EthernetBytes + 40 || offload.SegmentBytes == 0)
        {
            return false;
        }

        if (BinaryPrimitives.ReadUInt16BigEndian(frame[12..]) == 0x8100)
        {
            ip += 4;
        }

        int ipBytes = isV6 ? 40 : (frame[ip] & 15) * 4;
        bool version = frame[ip] >> 4 == (isV6 ? 6 : 4);
        if (!version || ipBytes < 20 || tcp < ip + ipBytes || tcp > frame.Length - TcpMinimumBytes)
        {
            return false;
        }

        int tcpBytes = (frame[tcp + 12] >> 4) * 4;
        payload = tcp + tcpBytes;
        return tcpBytes >= TcpMinimumBytes && payload < frame.Length;
    }

    private static void FinishIp(Span<byte> segment, int ip, bool isV6, ushort index)
    {
        Span<byte> header = segment[ip..];
        if (isV6)
        {
            BinaryPrimitives.WriteUInt16BigEndian(header[4..], (ushort)(header.Length - 40));
            return;
        }

        BinaryPrimitives.WriteUInt16BigEndian(header[2..], (ushort)header.Length);
        ushort id = BinaryPrimitives.ReadUInt16BigEndian(header[4..]);
        BinaryPrimitives.WriteUInt16BigEndian(header[4..], (ushort)(id + index));
        header[10] = 0;
        header[11] = 0;
        BinaryPrimitives.WriteUInt16BigEndian(header[10..], Checksum(header[..((header[0] & 15) * 4)]));
    }

    private static void FinishTcp(Span<byte> segment, int ip, bool isV6, int tcp)
    {
        Span<byte> header = segment[tcp..];
        header[16] = 0;
        header[17] = 0;
        ReadOnlySpan<byte> addresses = isV6 ? segment.Slice(ip + 8, 32) : segment.Slice(ip + 12, 8);
        uint pseudo = Sum(addresses, 6 + (uint)header.Length);
        BinaryPrimitives.WriteUInt16BigEndian(header[16..], Checksum(header, pseudo));
    }
}

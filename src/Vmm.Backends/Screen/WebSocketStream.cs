// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.IO;
using System.Security.Cryptography;
using System.Text;

namespace Vmm.Backends.Screen;

/// <summary>
/// The server's end of a WebSocket (RFC 6455) as a byte stream, for VNC clients in web pages. Frames of any size are
/// passed on as they come and not collected. A page of another origin is refused: a browser would otherwise let any web
/// site talk to a server on the loopback address.
/// </summary>
internal sealed class WebSocketStream : Stream
{
    private const int MaxHeaderBytes = 8192;
    private const string Guid = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    private readonly Stream _inner;
    private readonly byte[] _mask = new byte[4];
    private long _left;
    private int _maskAt;
    private bool _ended;

    private WebSocketStream(Stream inner) => _inner = inner;

    public override bool CanRead => true;

    public override bool CanSeek => false;

    public override bool CanWrite => true;

    public override long Length => throw new NotSupportedException();

    public override long Position
    {
        get => throw new NotSupportedException();
        set => throw new NotSupportedException();
    }

    /// <summary>Answers the request that begins on a connection.</summary>
    /// <exception cref="IOException">It is not a WebSocket request, or from a page of another origin.</exception>
    public static WebSocketStream Accept(Stream inner)
    {
        string[] lines = ReadHeader(inner).Split("\r\n");
        string key = Field(lines, "Sec-WebSocket-Key");
        string origin = Field(lines, "Origin");
        if (!lines[0].StartsWith("GET ", StringComparison.Ordinal) || key.Length == 0)
        {
            Refuse(inner, "400 Bad Request");
        }

        if (origin.Length > 0 && !IsSameHost(origin, Field(lines, "Host")))
        {
            Refuse(inner, "403 Forbidden");
        }

#pragma warning disable CA5350 // RFC 6455 §4.2.2 says SHA-1; it protects nothing
        string accept = Convert.ToBase64String(SHA1.HashData(Encoding.ASCII.GetBytes(key + Guid)));
#pragma warning restore CA5350
        var answer = new StringBuilder("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n");
        answer.Append("Sec-WebSocket-Accept: ").Append(accept).Append("\r\n");
        if (Field(lines, "Sec-WebSocket-Protocol").Contains("binary", StringComparison.Ordinal))
        {
            answer.Append("Sec-WebSocket-Protocol: binary\r\n");
        }

        inner.Write(Encoding.ASCII.GetBytes(answer.Append("\r\n").ToString()));
        inner.Flush();
        return new WebSocketStream(inner);
    }

    public override int Read(byte[] buffer, int offset, int count) => Read(buffer.AsSpan(offset, count));

    public override int Read(Span<byte> buffer)
    {
        while (_left == 0)
        {
            if (_ended || !NextFrame())
            {
                return 0;
            }
        }

        int got = _inner.Read(buffer[..(int)Math.Min(buffer.Length, _left)]);
        for (int i = 0; i < got; i++)
        {
            buffer[i] ^= _mask[_maskAt++ & 3];
        }

        _left -= got;
        _ended |= got == 0;
        return got;
    }

    public override void Write(byte[] buffer, int offset, int count) => Write(buffer.AsSpan(offset, count));

    public override void Write(ReadOnlySpan<byte> buffer) => WriteFrame(2, buffer);

    public override void Flush() => _inner.Flush();

    public override long Seek(long offset, SeekOrigin origin) => throw new NotSupportedException();

    public override void SetLength(long value) => throw new NotSupportedException();

    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            _inner.Dispose();
        }

        base.Dispose(disposing);
    }

    private static string ReadHeader(Stream inner)
    {
        byte[] header = new byte[MaxHeaderBytes];
        int length = 0;
        while (length < header.Length)
        {
            // A byte at a time: what follows the header is not ours to take.
            if (inner.Read(header, length, 1) != 1)
            {
                break;
            }

            length++;
            if (header.AsSpan(0, length).EndsWith("\r\n\r\n"u8))
            {
                return Encoding.ASCII.GetString(header, 0, length);
            }
        }

        throw new IOException("no complete HTTP request");
    }

    private static string Field(string[] lines, string name)
    {
        foreach (string line in lines)
        {
            if (line.StartsWith(name, StringComparison.OrdinalIgnoreCase) && line.Length > name.Length
                && line[name.Length] == ':')
            {
                return line[(name.Length + 1)..].Trim();
            }
        }

        return "";
    }

    private static bool IsSameHost(string origin, string host) =>
        Uri.TryCreate(origin, UriKind.Absolute, out Uri? page)
        && Uri.TryCreate("http://" + host, UriKind.Absolute, out Uri? server)
        && string.Equals(page.Host, server.Host, StringComparison.OrdinalIgnoreCase);

    private static void Refuse(Stream inner, string status)
    {
        inner.Write(Encoding.ASCII.GetBytes($"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"));
        throw new IOException($"refused a WebSocket: {status}");
    }

    private bool NextFrame()
    {
        Span<byte> header = stackalloc byte[8];
        if (!TryFill(header[..2]))
        {
            return false;
        }

        int code = header[0] & 0x0F;
        bool isMasked = (header[1] & 0x80) != 0;
        long length = header[1] & 0x7F;
        if (length == 126 && TryFill(header[..2]))
        {
            length = BinaryPrimitives.ReadUInt16BigEndian(header);
        }
        else if (length == 127 && TryFill(header))
        {
            length = BinaryPrimitives.ReadInt64BigEndian(header);
        }

        // RFC 6455 §5.1: a client must mask; control frames are at most 125 bytes (§5.5).
        if (!isMasked || length < 0 || !TryFill(_mask) || (code >= 8 && length > 125))
        {
            return false;
        }

        _maskAt = 0;
        if (code < 8)
        {
            _left = length;
            return true;
        }

        Span<byte> control = stackalloc byte[125];
        control = control[..(int)length];
        if (!TryFill(control))
        {
            return false;
        }

        for (int i = 0; i < control.Length; i++)
        {
            control[i] ^= _mask[i & 3];
        }

        if (code == 9)
        {
            WriteFrame(10, control);
        }
        else if (code == 8)
        {
            WriteFrame(8, control);
            return false;
        }

        return true;
    }

    private bool TryFill(Span<byte> into)
    {
        while (!into.IsEmpty)
        {
            int got = _inner.Read(into);
            if (got == 0)
            {
                _ended = true;
                return false;
            }

            into = into[got..];
        }

        return true;
    }

    // Pongs come from the reading thread, data from the writing one.
    private void WriteFrame(byte code, ReadOnlySpan<byte> data)
    {
        byte[] frame = new byte[10 + data.Length];
        frame[0] = (byte)(0x80 | code);
        int at = 2;
        if (data.Length < 126)
        {
            frame[1] = (byte)data.Length;
        }
        else if (data.Length < 65536)
        {
            frame[1] = 126;
            BinaryPrimitives.WriteUInt16BigEndian(frame.AsSpan(2), (ushort)data.Length);
            at = 4;
        }
        else
        {
            frame[1] = 127;
            BinaryPrimitives.WriteInt64BigEndian(frame.AsSpan(2), data.Length);
            at = 10;
        }

        data.CopyTo(frame.AsSpan(at));
        lock (_inner)
        {
            _inner.Write(frame, 0, at + data.Length);
        }
    }
}

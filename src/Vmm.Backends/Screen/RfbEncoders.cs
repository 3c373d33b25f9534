// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.IO.Compression;
using Vmm.Core;

namespace Vmm.Backends.Screen;

/// <summary>How a client wants pixels (RFB 3.8 §7.4).</summary>
internal readonly record struct RfbPixelFormat(
    int Bits, int Depth, bool IsBigEndian, bool IsTrueColour, int RedMax, int GreenMax, int BlueMax,
    int RedShift, int GreenShift, int BlueShift)
{
    /// <summary>32 bits, 0x00RRGGBB, little-endian: what a frame holds.</summary>
    public static RfbPixelFormat Native { get; } = new(32, 24, false, true, 255, 255, 255, 16, 8, 0);

    public int Bytes => Bits / 8;

    /// <summary>Three bytes per pixel in ZRLE (§7.7.6): 24 bits of colour inside the low or the high three bytes.</summary>
    public bool IsCompact => Bits == 32 && Depth <= 24 && IsTrueColour && (FitsLow || FitsHigh);

    /// <summary>Three bytes R, G, B per pixel in Tight.</summary>
    public bool IsTightCompact => Bits == 32 && Depth == 24 && IsTrueColour && RedMax == 255 && GreenMax == 255 && BlueMax == 255;

    private bool FitsLow => Highest(RedMax, RedShift) <= 24 && Highest(GreenMax, GreenShift) <= 24 && Highest(BlueMax, BlueShift) <= 24;

    private bool FitsHigh => RedShift >= 8 && GreenShift >= 8 && BlueShift >= 8;

    public static RfbPixelFormat Parse(ReadOnlySpan<byte> raw) => new(
        raw[0],
        raw[1],
        raw[2] != 0,
        raw[3] != 0,
        BinaryPrimitives.ReadUInt16BigEndian(raw[4..]),
        BinaryPrimitives.ReadUInt16BigEndian(raw[6..]),
        BinaryPrimitives.ReadUInt16BigEndian(raw[8..]),
        raw[10],
        raw[11],
        raw[12]);

    public bool IsValid => Bits is 8 or 16 or 32 && Depth <= 32 && (!IsTrueColour
        || (RedShift < Bits && GreenShift < Bits && BlueShift < Bits && RedMax > 0 && GreenMax > 0 && BlueMax > 0))
        && (IsTrueColour || Bits == 8);

    public void WriteTo(Span<byte> raw)
    {
        raw.Clear();
        raw[0] = (byte)Bits;
        raw[1] = (byte)Depth;
        raw[2] = IsBigEndian ? (byte)1 : (byte)0;
        raw[3] = IsTrueColour ? (byte)1 : (byte)0;
        BinaryPrimitives.WriteUInt16BigEndian(raw[4..], (ushort)RedMax);
        BinaryPrimitives.WriteUInt16BigEndian(raw[6..], (ushort)GreenMax);
        BinaryPrimitives.WriteUInt16BigEndian(raw[8..], (ushort)BlueMax);
        raw[10] = (byte)RedShift;
        raw[11] = (byte)GreenShift;
        raw[12] = (byte)BlueShift;
    }

    /// <summary>A colour 0x00RRGGBB as the client's pixel value.</summary>
    public uint Convert(uint colour)
    {
        if (this == Native)
        {
            return colour & 0xFF_FFFF;
        }

        uint red = (colour >> 16) & 0xFF;
        uint green = (colour >> 8) & 0xFF;
        uint blue = colour & 0xFF;
        if (!IsTrueColour)
        {
            // The colour map that the server sets: 3 bits red, 3 green, 2 blue.
            return (red >> 5) | ((green >> 5) << 3) | ((blue >> 6) << 6);
        }

        return (((red * (uint)RedMax) + 127) / 255 << RedShift)
            | (((green * (uint)GreenMax) + 127) / 255 << GreenShift)
            | (((blue * (uint)BlueMax) + 127) / 255 << BlueShift);
    }

    public void Put(uint value, Span<byte> into)
    {
        switch (Bits)
        {
            case 8:
                into[0] = (byte)value;
                break;
            case 16 when IsBigEndian:
                BinaryPrimitives.WriteUInt16BigEndian(into, (ushort)value);
                break;
            case 16:
                BinaryPrimitives.WriteUInt16LittleEndian(into, (ushort)value);
                break;
            default:
                if (IsBigEndian)
                {
                    BinaryPrimitives.WriteUInt32BigEndian(into, value);
                }
                else
                {
                    BinaryPrimitives.WriteUInt32LittleEndian(into, value);
                }

                break;
        }
    }

    /// <summary>A pixel in ZRLE: three bytes where that is possible.</summary>
    public int PutCompact(uint value, Span<byte> into)
    {
        if (!IsCompact)
        {
            Put(value, into);
            return Bytes;
        }

        Span<byte> whole = stackalloc byte[4];
        Put(value, whole);
        bool isLow = FitsLow;
        whole.Slice(isLow == IsBigEndian ? 1 : 0, 3).CopyTo(into);
        return 3;
    }

    private static int Highest(int maximum, int shift) => shift + 32 - int.LeadingZeroCount(maximum);
}

/// <summary>Grows; big-endian, as RFB is.</summary>
internal sealed class RfbWriter
{
    private readonly ArrayBufferWriter<byte> _buffer = new(65536);

    public ReadOnlySpan<byte> Written => _buffer.WrittenSpan;

    public void Clear() => _buffer.ResetWrittenCount();

    public void Byte(int value) => _buffer.Write([(byte)value]);

    public void Short(int value)
    {
        BinaryPrimitives.WriteUInt16BigEndian(_buffer.GetSpan(2), (ushort)value);
        _buffer.Advance(2);
    }

    public void Int(int value)
    {
        BinaryPrimitives.WriteInt32BigEndian(_buffer.GetSpan(4), value);
        _buffer.Advance(4);
    }

    public void Bytes(ReadOnlySpan<byte> bytes) => _buffer.Write(bytes);

    public Span<byte> Room(int bytes) => _buffer.GetSpan(bytes)[..bytes];

    public void Advance(int bytes) => _buffer.Advance(bytes);

    public void Rectangle(int x, int y, int width, int height, int encoding)
    {
        Short(x);
        Short(y);
        Short(width);
        Short(height);
        Int(encoding);
    }
}

/// <summary>A zlib stream that lives as long as a connection and is flushed after each use (RFC 1950).</summary>
internal sealed class RfbZlib : IDisposable
{
    private readonly MemoryStream _output = new();
    private readonly ZLibStream _stream;

    public RfbZlib(CompressionLevel level) => _stream = new ZLibStream(_output, level, leaveOpen: true);

    /// <summary>Compresses; the result is valid until the next call.</summary>
    public ReadOnlySpan<byte> Pack(ReadOnlySpan<byte> data)
    {
        _output.SetLength(0);
        _stream.Write(data);
        _stream.Flush();
        return _output.GetBuffer().AsSpan(0, (int)_output.Length);
    }

    public void Dispose()
    {
        _stream.Dispose();
        _output.Dispose();
    }
}

/// <summary>
/// Encodes rectangles of a frame: Raw, ZRLE (RFB 3.8 §7.7.6) and Tight (rfbproto, encoding 7). One per connection, since
/// zlib streams go on from rectangle to rectangle. Used by the connection's sending thread only.
/// </summary>
internal sealed class RfbEncoders : IDisposable
{
    public const int Raw = 0;
    public const int CopyRect = 1;
    public const int Tight = 7;
    public const int Zrle = 16;

    private const int TightMinBytes = 12;
    private const int TightMaxWidth = 2048;
    private const int TightMaxPixels = 65536;

    private readonly RfbZlib _zrle = new(CompressionLevel.Fastest);
    private readonly RfbZlib?[] _tight = new RfbZlib?[4];
    private readonly RfbWriter _tile = new();
    private readonly Dictionary<uint, int> _palette = [];
    private uint[] _pixels = [];

    public RfbPixelFormat Format { get; set; } = RfbPixelFormat.Native;

    /// <summary>JPEG quality 1..100 for Tight, or 0 for lossless.</summary>
    public int JpegQuality { get; set; }

    public void Dispose()
    {
        _zrle.Dispose();
        foreach (RfbZlib? stream in _tight)
        {
            stream?.Dispose();
        }
    }

    /// <summary>How many rectangles <see cref="Encode"/> will write.</summary>
    public static int CountOf(in DisplayRectangle area, int encoding)
    {
        if (encoding != Tight)
        {
            return 1;
        }

        int columns = ((area.Width - 1) / TightMaxWidth) + 1;
        int rows = ((area.Height - 1) / TightRows(area)) + 1;
        return columns * rows;
    }

    /// <summary>Writes a rectangle, header included.</summary>
    public void Encode(RfbWriter to, uint[] frame, int frameWidth, in DisplayRectangle area, int encoding)
    {
        if (encoding != Tight)
        {
            to.Rectangle(area.X, area.Y, area.Width, area.Height, encoding);
            Load(frame, frameWidth, area);
            if (encoding == Zrle)
            {
                EncodeZrle(to, area.Width, area.Height);
            }
            else
            {
                EncodeRaw(to, _pixels.AsSpan(0, area.Width * area.Height));
            }

            return;
        }

        int height = TightRows(area);
        for (int y = 0; y < area.Height; y += height)
        {
            for (int x = 0; x < area.Width; x += TightMaxWidth)
            {
                var part = new DisplayRectangle(
                    area.X + x, area.Y + y, Math.Min(TightMaxWidth, area.Width - x), Math.Min(height, area.Height - y));
                to.Rectangle(part.X, part.Y, part.Width, part.Height, Tight);
                EncodeTight(to, frame, frameWidth, part);
            }
        }
    }

    private static int TightRows(in DisplayRectangle area) =>
        Math.Max(1, TightMaxPixels / Math.Min(area.Width, TightMaxWidth));

    // The rectangle's pixels in the client's values, row by row.
    private void Load(uint[] frame, int frameWidth, in DisplayRectangle area)
    {
        int count = area.Width * area.Height;
        if (_pixels.Length < count)
        {
            _pixels = new uint[count];
        }

        int at = 0;
        for (int y = area.Y; y < area.Y + area.Height; y++)
        {
            ReadOnlySpan<uint> row = frame.AsSpan((y * frameWidth) + area.X, area.Width);
            foreach (uint colour in row)
            {
                _pixels[at++] = Format.Convert(colour);
            }
        }
    }

    private void EncodeRaw(RfbWriter to, ReadOnlySpan<uint> pixels)
    {
        int bytes = Format.Bytes;
        Span<byte> room = to.Room(pixels.Length * bytes);
        for (int i = 0; i < pixels.Length; i++)
        {
            Format.Put(pixels[i], room[(i * bytes)..]);
        }

        to.Advance(pixels.Length * bytes);
    }

    private void EncodeZrle(RfbWriter to, int width, int height)
    {
        _tile.Clear();
        Span<uint> tile = stackalloc uint[64 * 64];
        for (int y = 0; y < height; y += 64)
        {
            for (int x = 0; x < width; x += 64)
            {
                int columns = Math.Min(64, width - x);
                int rows = Math.Min(64, height - y);
                for (int row = 0; row < rows; row++)
                {
                    _pixels.AsSpan(((y + row) * width) + x, columns).CopyTo(tile[(row * columns)..]);
                }

                EncodeTile(tile[..(columns * rows)], columns);
            }
        }

        ReadOnlySpan<byte> packed = _zrle.Pack(_tile.Written);
        to.Int(packed.Length);
        to.Bytes(packed);
    }

    // Solid, packed palette of up to 16 colours, runs, or raw: whichever is shortest.
    private void EncodeTile(ReadOnlySpan<uint> tile, int columns)
    {
        int runs = CountColours(tile, 16);
        int colours = _palette.Count;
        int pixelBytes = Format.IsCompact ? 3 : Format.Bytes;
        if (colours == 1)
        {
            _tile.Byte(1);
            PutCompact(tile[0]);
            return;
        }

        int rawBytes = tile.Length * pixelBytes;
        int runBytes = runs * (pixelBytes + 1);
        if (colours <= 16)
        {
            int bits = colours == 2 ? 1 : colours <= 4 ? 2 : 4;
            int packedBytes = (colours * pixelBytes) + (((columns * bits) + 7) / 8 * (tile.Length / columns));
            if (packedBytes < rawBytes && packedBytes <= runBytes)
            {
                PackPalette(tile, columns, bits);
                return;
            }
        }

        if (runBytes < rawBytes)
        {
            PackRuns(tile);
            return;
        }

        _tile.Byte(0);
        foreach (uint pixel in tile)
        {
            PutCompact(pixel);
        }
    }

    private void PutCompact(uint pixel) => _tile.Advance(Format.PutCompact(pixel, _tile.Room(4)));

    private void PackPalette(ReadOnlySpan<uint> tile, int columns, int bits)
    {
        _tile.Byte(_palette.Count);
        foreach (uint colour in _palette.Keys)
        {
            PutCompact(colour);
        }

        for (int start = 0; start < tile.Length; start += columns)
        {
            int value = 0;
            int used = 0;
            foreach (uint pixel in tile.Slice(start, columns))
            {
                value = (value << bits) | _palette[pixel];
                used += bits;
                if (used == 8)
                {
                    _tile.Byte(value);
                    value = 0;
                    used = 0;
                }
            }

            if (used > 0)
            {
                _tile.Byte(value << (8 - used));
            }
        }
    }

    private void PackRuns(ReadOnlySpan<uint> tile)
    {
        _tile.Byte(128);
        int at = 0;
        while (at < tile.Length)
        {
            uint pixel = tile[at];
            int length = 1;
            while (at + length < tile.Length && tile[at + length] == pixel)
            {
                length++;
            }

            PutCompact(pixel);
            at += length;
            for (length--; length >= 255; length -= 255)
            {
                _tile.Byte(255);
            }

            _tile.Byte(length);
        }
    }

    // Fills the palette with up to `limit` colours and one more; returns the number of runs.
    private int CountColours(ReadOnlySpan<uint> pixels, int limit)
    {
        _palette.Clear();
        int runs = 0;
        uint last = 0;
        for (int i = 0; i < pixels.Length; i++)
        {
            uint pixel = pixels[i];
            if (i > 0 && pixel == last)
            {
                continue;
            }

            last = pixel;
            runs++;
            if (_palette.Count <= limit)
            {
                _ = _palette.TryAdd(pixel, _palette.Count);
            }
        }

        return runs;
    }

    private void EncodeTight(RfbWriter to, uint[] frame, int frameWidth, in DisplayRectangle area)
    {
        Load(frame, frameWidth, area);
        ReadOnlySpan<uint> pixels = _pixels.AsSpan(0, area.Width * area.Height);
        _ = CountColours(pixels, 256);
        int colours = _palette.Count;
        if (colours == 1)
        {
            to.Byte(0x80);
            PutTight(to, pixels[0]);
            return;
        }

        if (JpegQuality > 0 && Format.Bits >= 16 && colours > 256 && pixels.Length >= 256)
        {
            byte[] jpeg = Jpeg.Encode(frame, frameWidth, area, JpegQuality);
            to.Byte(0x90);
            PutLength(to, jpeg.Length);
            to.Bytes(jpeg);
            return;
        }

        _tile.Clear();
        if (colours == 2)
        {
            TightPalette(to, 1);
            PackBits(pixels, area.Width);
            PutPacked(to, 1);
        }
        else if (colours <= 256 && colours * 4 < pixels.Length)
        {
            TightPalette(to, 2);
            foreach (uint pixel in pixels)
            {
                _tile.Byte(_palette[pixel]);
            }

            PutPacked(to, 2);
        }
        else
        {
            // Basic compression, stream 0, no filter.
            to.Byte(0x00);
            foreach (uint pixel in pixels)
            {
                PutTight(_tile, pixel);
            }

            PutPacked(to, 0);
        }
    }

    private void TightPalette(RfbWriter to, int stream)
    {
        to.Byte(0x40 | (stream << 4));
        to.Byte(1);
        to.Byte(_palette.Count - 1);
        foreach (uint colour in _palette.Keys)
        {
            PutTight(to, colour);
        }
    }

    private void PackBits(ReadOnlySpan<uint> pixels, int width)
    {
        for (int start = 0; start < pixels.Length; start += width)
        {
            int value = 0;
            int used = 0;
            foreach (uint pixel in pixels.Slice(start, width))
            {
                value = (value << 1) | _palette[pixel];
                if (++used == 8)
                {
                    _tile.Byte(value);
                    value = 0;
                    used = 0;
                }
            }

            if (used > 0)
            {
                _tile.Byte(value << (8 - used));
            }
        }
    }

    private void PutTight(RfbWriter to, uint pixel)
    {
        Span<byte> room = to.Room(4);
        if (!Format.IsTightCompact)
        {
            Format.Put(pixel, room);
            to.Advance(Format.Bytes);
            return;
        }

        room[0] = (byte)(pixel >> Format.RedShift);
        room[1] = (byte)(pixel >> Format.GreenShift);
        room[2] = (byte)(pixel >> Format.BlueShift);
        to.Advance(3);
    }

    // Less than 12 bytes go as they are.
    private void PutPacked(RfbWriter to, int stream)
    {
        ReadOnlySpan<byte> data = _tile.Written;
        if (data.Length >= TightMinBytes)
        {
            data = (_tight[stream] ??= new RfbZlib(CompressionLevel.Fastest)).Pack(data);
            PutLength(to, data.Length);
        }

        to.Bytes(data);
    }

    private static void PutLength(RfbWriter to, int length)
    {
        if (length < 0x80)
        {
            to.Byte(length);
            return;
        }

        to.Byte((length & 0x7F) | 0x80);
        if (length < 0x4000)
        {
            to.Byte(length >> 7);
            return;
        }

        to.Byte(((length >> 7) & 0x7F) | 0x80);
        to.Byte(length >> 14);
    }
}

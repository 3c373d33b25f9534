// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Text;
using System.Threading;
using Vmm.Core;

namespace Vmm.Backends.Screen;

/// <summary>
/// One connected viewer. The reading thread (which calls <see cref="Run"/>) keeps the viewer's wishes under the gate; the
/// sending thread takes them from there, and alone writes to the stream.
/// </summary>
internal sealed class VncViewer : IDisposable
{
    private const int FrameMs = 33;
    private const int TileWidth = 64;
    private const int TileHeight = 16;
    private const int MaxCutText = 1 << 20;
    private const int EncodingCursor = -239;
    private const int EncodingDesktopSize = -223;
    private const int EncodingExtendedDesktopSize = -308;
    private const int EncodingPointerMotion = -257;
    private const int EncodingExtendedKey = -258;
    private const int EncodingLeds = -261;

    private readonly object _gate = new();
    private readonly VncServer _server;
    private readonly Stream _stream;
    private readonly IDisplaySurface _surface;
    private readonly ScreenInput _input;
    private readonly string _name;
    private readonly DisplayFrame _frame = new();
    private readonly RfbWriter _out = new();
    private readonly RfbEncoders _encoders = new();

    // Under the gate: what the viewer wants.
    private RfbPixelFormat _format = RfbPixelFormat.Native;
    private HashSet<int> _encodings = [];
    private int _encoding = RfbEncoders.Raw;
    private int _quality;
    private bool _isRequested;
    private bool _isFullWanted;
    private bool _isFormatNew;
    private bool _isKeyAnnounced;
    private int _sizeReply = -1;
    private bool _isClosed;

    // The sending thread's: what the viewer shows.
    private uint[] _shown = [];
    private int _width;
    private int _height;
    private KeyboardLeds? _leds;
    private bool? _isAbsolute;
    private DisplayCursor? _cursor;

    // The reading thread's.
    private int _pointerX;
    private int _pointerY;
    private int _pointerMask;

    public VncViewer(VncServer server, Stream stream, IDisplaySurface surface, ScreenInput input, string name)
    {
        _server = server;
        _stream = stream;
        _surface = surface;
        _input = input;
        _name = name;
    }

    /// <summary>Serves until the viewer leaves.</summary>
    public void Run()
    {
        // ClientInit: the wish to be alone is not granted, other viewers stay.
        _ = ReadByte();
        _surface.Refresh(_frame);
        _width = Math.Min(_frame.Width, 65535);
        _height = Math.Min(_frame.Height, 65535);
        _shown = new uint[_width * _height];
        byte[] name = Encoding.UTF8.GetBytes(_name);
        _out.Short(_width);
        _out.Short(_height);
        RfbPixelFormat.Native.WriteTo(_out.Room(16));
        _out.Advance(16);
        _out.Int(name.Length);
        _out.Bytes(name);
        _stream.Write(_out.Written);
        _isFullWanted = true;
        var sender = new Thread(Send) { Name = "vnc-send", IsBackground = true };
        sender.Start();
        try
        {
            while (ReadMessage())
            {
            }
        }
        finally
        {
            Dispose();
            sender.Join();
            _encoders.Dispose();
        }
    }

    public void Dispose()
    {
        lock (_gate)
        {
            if (_isClosed)
            {
                return;
            }

            _isClosed = true;
            Monitor.PulseAll(_gate);
        }

        _stream.Dispose();
        _input.ReleaseAll();
        _server.Leave(this);
    }

    private int ReadByte()
    {
        int value = _stream.ReadByte();
        return value >= 0 ? value : throw new EndOfStreamException();
    }

    private bool ReadMessage()
    {
        int type = _stream.ReadByte();
        Span<byte> raw = stackalloc byte[20];
        switch (type)
        {
            case 0:
                _stream.ReadExactly(raw[..19]);
                return SetFormat(RfbPixelFormat.Parse(raw[3..]));
            case 2:
                _stream.ReadExactly(raw[..3]);
                SetEncodings(BinaryPrimitives.ReadUInt16BigEndian(raw[1..]));
                return true;
            case 3:
                _stream.ReadExactly(raw[..9]);
                lock (_gate)
                {
                    _isRequested = true;
                    _isFullWanted |= raw[0] == 0;
                    Monitor.PulseAll(_gate);
                }

                return true;
            case 4:
                _stream.ReadExactly(raw[..7]);
                _input.Keysym(BinaryPrimitives.ReadUInt32BigEndian(raw[3..]), raw[0] != 0);
                return true;
            case 5:
                _stream.ReadExactly(raw[..5]);
                Point(raw[0], BinaryPrimitives.ReadUInt16BigEndian(raw[1..]), BinaryPrimitives.ReadUInt16BigEndian(raw[3..]));
                return true;
            case 6:
                _stream.ReadExactly(raw[..7]);
                return SkipCutText(BinaryPrimitives.ReadInt32BigEndian(raw[3..]));
            case 251:
                _stream.ReadExactly(raw[..7]);
                return SetSize(raw);
            case 255:
                return ReadQemuMessage(raw);
            default:
                return false;
        }
    }

    private bool SetFormat(in RfbPixelFormat format)
    {
        if (!format.IsValid)
        {
            return false;
        }

        lock (_gate)
        {
            _format = format;
            _isFormatNew = true;
        }

        return true;
    }

    private void SetEncodings(int count)
    {
        var wanted = new HashSet<int>();
        int encoding = -1;
        int quality = 0;
        Span<byte> raw = stackalloc byte[4];
        for (int i = 0; i < count; i++)
        {
            _stream.ReadExactly(raw);
            int value = BinaryPrimitives.ReadInt32BigEndian(raw);
            wanted.Add(value);

            // In order of preference; the first that we have is used.
            if (encoding < 0 && value is RfbEncoders.Raw or RfbEncoders.Tight or RfbEncoders.Zrle)
            {
                encoding = value;
            }

            if (value is >= -32 and <= -23)
            {
                quality = 10 + (10 * (value + 32));
            }
        }

        lock (_gate)
        {
            _encodings = wanted;
            _encoding = Math.Max(encoding, RfbEncoders.Raw);
            _quality = quality;
            _isKeyAnnounced = false;
            Monitor.PulseAll(_gate);
        }
    }

    private bool SkipCutText(int length)
    {
        // A negative length is the extended clipboard, which is not offered; its size is the absolute value.
        if (length is < -MaxCutText or > MaxCutText)
        {
            return false;
        }

        Skip(Math.Abs(length));
        return true;
    }

    private void Skip(int length)
    {
        byte[] waste = new byte[4096];
        while (length > 0)
        {
            int part = Math.Min(length, waste.Length);
            _stream.ReadExactly(waste, 0, part);
            length -= part;
        }
    }

    private bool SetSize(ReadOnlySpan<byte> raw)
    {
        int width = BinaryPrimitives.ReadUInt16BigEndian(raw[1..]);
        int height = BinaryPrimitives.ReadUInt16BigEndian(raw[3..]);
        Skip(raw[5] * 16);
        bool isTold = width > 0 && height > 0 && _surface.RequestSize(width, height);
        lock (_gate)
        {
            // 4: the request was forwarded and may complete later; 1: prohibited.
            _sizeReply = isTold ? 4 : 1;
            Monitor.PulseAll(_gate);
        }

        return true;
    }

    private bool ReadQemuMessage(Span<byte> raw)
    {
        int kind = ReadByte();
        if (kind == 0)
        {
            _stream.ReadExactly(raw[..10]);
            HidKey key = KeyOf(BinaryPrimitives.ReadUInt32BigEndian(raw[6..]));
            bool isPressed = BinaryPrimitives.ReadUInt16BigEndian(raw) != 0;
            if (key == HidKey.None)
            {
                _input.Keysym(BinaryPrimitives.ReadUInt32BigEndian(raw[2..]), isPressed);
            }
            else
            {
                _input.Key(key, isPressed);
            }

            return true;
        }

        if (kind != 1)
        {
            return false;
        }

        // Audio is not offered; its messages are skipped.
        _stream.ReadExactly(raw[..2]);
        if (BinaryPrimitives.ReadUInt16BigEndian(raw) == 2)
        {
            Skip(6);
        }

        return true;
    }

    // Set 1, with the prefix E0 as bit 7 of the code; some clients send E0xx as such.
    private static HidKey KeyOf(uint code) => HidKeys.FromSet1(code switch
    {
        < 0x80 => (int)code,
        < 0x100 => 0xE000 | (int)(code & 0x7F),
        >= 0xE000 and < 0xE080 => (int)code,
        _ => 0,
    });

    private void Point(int mask, int x, int y)
    {
        int previousX = _pointerX;
        int previousY = _pointerY;
        bool isRelative;
        int width;
        int height;
        lock (_gate)
        {
            isRelative = _encodings.Contains(EncodingPointerMotion) && !_input.IsPointerAbsolute;
            width = _width;
            height = _height;
        }

        if (isRelative)
        {
            // Such viewers send movements around the middle of the range.
            previousX = 0x7FFF;
            previousY = 0x7FFF;
        }

        int pressed = mask & ~_pointerMask;
        int wheel = ((pressed >> 3) & 1) - ((pressed >> 4) & 1);
        PointerButtons buttons = ((mask & 1) != 0 ? PointerButtons.Left : 0)
            | ((mask & 2) != 0 ? PointerButtons.Middle : 0)
            | ((mask & 4) != 0 ? PointerButtons.Right : 0)
            | ((mask & 0x80) != 0 ? PointerButtons.Back : 0);
        _pointerMask = mask;
        _pointerX = x;
        _pointerY = y;
        _input.Move(x, y, previousX, previousY, width, height, wheel, buttons);
    }

    private void Send()
    {
        try
        {
            while (true)
            {
                lock (_gate)
                {
                    while (!_isClosed && !_isRequested)
                    {
                        Monitor.Wait(_gate);
                    }

                    if (_isClosed)
                    {
                        return;
                    }
                }

                if (SendUpdate())
                {
                    continue;
                }

                lock (_gate)
                {
                    if (!_isClosed)
                    {
                        Monitor.Wait(_gate, FrameMs);
                    }
                }
            }
        }
        catch (Exception e) when (e is IOException or ObjectDisposedException)
        {
            Dispose();
        }
    }

    // False when there was nothing to say.
    private bool SendUpdate()
    {
        HashSet<int> encodings;
        bool isFull;
        bool isFormatNew;
        bool announceKeys;
        int encoding;
        int sizeReply;
        _surface.Refresh(_frame);
        lock (_gate)
        {
            encodings = _encodings;
            isFull = _isFullWanted;
            isFormatNew = _isFormatNew;
            announceKeys = !_isKeyAnnounced && encodings.Contains(EncodingExtendedKey);
            sizeReply = _sizeReply;
            _sizeReply = -1;
            _isFormatNew = false;
            encoding = _encoding;
            _encoders.Format = _format;
            _encoders.JpegQuality = _quality;
        }

        _out.Clear();
        if (isFormatNew && !_encoders.Format.IsTrueColour)
        {
            PutColourMap();
        }

        _out.Byte(0);
        _out.Byte(0);
        int countAt = _out.Written.Length;
        _out.Short(0);
        int rectangles = 0;
        rectangles += PutSize(encodings, sizeReply, ref isFull);
        rectangles += PutState(encodings, announceKeys);
        rectangles += PutPixels(encodings, encoding, isFull || isFormatNew);
        if (rectangles == 0)
        {
            if (countAt > 2)
            {
                // The colour map alone.
                _stream.Write(_out.Written[..(countAt - 2)]);
            }

            return false;
        }

        lock (_gate)
        {
            _isRequested = false;
            _isFullWanted = false;
            _isKeyAnnounced |= announceKeys;
        }

        byte[] message = _out.Written.ToArray();
        BinaryPrimitives.WriteUInt16BigEndian(message.AsSpan(countAt), (ushort)rectangles);
        _stream.Write(message);
        return true;
    }

    private void PutColourMap()
    {
        _out.Byte(1);
        _out.Byte(0);
        _out.Short(0);
        _out.Short(256);
        for (int i = 0; i < 256; i++)
        {
            _out.Short((i & 7) * 65535 / 7);
            _out.Short(((i >> 3) & 7) * 65535 / 7);
            _out.Short((i >> 6) * 65535 / 3);
        }
    }

    // The size of the screen, when it changed or was asked for.
    private int PutSize(HashSet<int> encodings, int reply, ref bool isFull)
    {
        int width = Math.Min(_frame.Width, 65535);
        int height = Math.Min(_frame.Height, 65535);
        bool hasExtended = encodings.Contains(EncodingExtendedDesktopSize);
        bool hasSize = hasExtended || encodings.Contains(EncodingDesktopSize);
        bool isChanged = width != _width || height != _height;
        if (isChanged && hasSize)
        {
            lock (_gate)
            {
                _width = width;
                _height = height;
            }

            _shown = new uint[width * height];
            isFull = true;
        }

        if (hasExtended && (reply >= 0 || (isChanged && hasSize) || isFull))
        {
            // x: 0 the server's doing, 1 this viewer asked; y: how that went.
            _out.Rectangle(reply >= 0 ? 1 : 0, Math.Max(reply, 0), _width, _height, EncodingExtendedDesktopSize);
            _out.Int(1 << 24);
            _out.Int(0);
            _out.Short(0);
            _out.Short(0);
            _out.Short(_width);
            _out.Short(_height);
            _out.Int(0);
            return 1;
        }

        if (isChanged && hasSize)
        {
            _out.Rectangle(0, 0, _width, _height, EncodingDesktopSize);
            return 1;
        }

        return 0;
    }

    private int PutState(HashSet<int> encodings, bool announceKeys)
    {
        int count = 0;
        if (announceKeys)
        {
            _out.Rectangle(0, 0, _width, _height, EncodingExtendedKey);
            count++;
        }

        KeyboardLeds leds = _input.Leds;
        if (leds != _leds && encodings.Contains(EncodingLeds))
        {
            _leds = leds;
            _out.Rectangle(0, 0, 1, 1, EncodingLeds);
            _out.Byte(
                ((leds & KeyboardLeds.Scroll) != 0 ? 1 : 0) | ((leds & KeyboardLeds.Num) != 0 ? 2 : 0)
                | ((leds & KeyboardLeds.Caps) != 0 ? 4 : 0));
            count++;
        }

        bool isAbsolute = _input.IsPointerAbsolute;
        if (isAbsolute != _isAbsolute && encodings.Contains(EncodingPointerMotion))
        {
            _isAbsolute = isAbsolute;
            _out.Rectangle(isAbsolute ? 1 : 0, 0, _width, _height, EncodingPointerMotion);
            count++;
        }

        DisplayCursor? cursor = _surface.Cursor;
        if (cursor != _cursor && encodings.Contains(EncodingCursor))
        {
            _cursor = cursor;
            PutCursor(cursor);
            count++;
        }

        return count;
    }

    // Pixels, then one bit for each that is not transparent (RFC 6143 §7.8.1).
    private void PutCursor(DisplayCursor? cursor)
    {
        if (cursor is null)
        {
            _out.Rectangle(0, 0, 0, 0, EncodingCursor);
            return;
        }

        _out.Rectangle(cursor.HotX, cursor.HotY, cursor.Width, cursor.Height, EncodingCursor);
        foreach (uint pixel in cursor.Pixels)
        {
            _encoders.Format.Put(_encoders.Format.Convert(pixel), _out.Room(4));
            _out.Advance(_encoders.Format.Bytes);
        }

        for (int y = 0; y < cursor.Height; y++)
        {
            for (int x = 0; x < cursor.Width; x += 8)
            {
                int bits = 0;
                for (int i = 0; i < 8 && x + i < cursor.Width; i++)
                {
                    bits |= cursor.Pixels[(y * cursor.Width) + x + i] >> 31 != 0 ? 0x80 >> i : 0;
                }

                _out.Byte(bits);
            }
        }
    }

    private int PutPixels(HashSet<int> encodings, int encoding, bool isFull)
    {
        // A viewer that cannot follow a change of size sees the part that fits.
        int width = Math.Min(_width, _frame.Width);
        int height = Math.Min(_height, _frame.Height);
        int count = 0;
        if (!isFull && encodings.Contains(RfbEncoders.CopyRect) && _width == _frame.Width && _height == _frame.Height)
        {
            count += PutScroll();
        }

        List<DisplayRectangle> areas = isFull ? [new DisplayRectangle(0, 0, width, height)] : FindChanges(width, height);
        foreach (DisplayRectangle area in areas)
        {
            if (area.Width == 0 || area.Height == 0)
            {
                continue;
            }

            _encoders.Encode(_out, _frame.Pixels, _frame.Width, area, encoding);
            count += RfbEncoders.CountOf(area, encoding);
            for (int y = area.Y; y < area.Y + area.Height; y++)
            {
                _frame.Pixels.AsSpan((y * _frame.Width) + area.X, area.Width).CopyTo(_shown.AsSpan((y * _width) + area.X));
            }
        }

        return count;
    }

    // Tiles that differ from what the viewer shows, merged into rectangles.
    private List<DisplayRectangle> FindChanges(int width, int height)
    {
        var found = new List<DisplayRectangle>();
        if (_frame.Changes.Count == 0)
        {
            return found;
        }

        int firstRow = int.MaxValue;
        int lastRow = -1;
        foreach (DisplayRectangle change in _frame.Changes)
        {
            firstRow = Math.Min(firstRow, change.Y);
            lastRow = Math.Max(lastRow, change.Y + change.Height - 1);
        }

        firstRow = Math.Max(firstRow, 0) / TileHeight * TileHeight;
        lastRow = Math.Min(lastRow, height - 1);
        for (int y = firstRow; y <= lastRow; y += TileHeight)
        {
            int rows = Math.Min(TileHeight, height - y);
            int start = -1;
            for (int x = 0; x < width; x += TileWidth)
            {
                bool differs = Differs(x, y, Math.Min(TileWidth, width - x), rows);
                if (differs && start < 0)
                {
                    start = x;
                }
                else if (!differs && start >= 0)
                {
                    Merge(found, new DisplayRectangle(start, y, x - start, rows));
                    start = -1;
                }
            }

            if (start >= 0)
            {
                Merge(found, new DisplayRectangle(start, y, width - start, rows));
            }
        }

        return found;
    }

    private static void Merge(List<DisplayRectangle> found, in DisplayRectangle next)
    {
        for (int i = found.Count - 1; i >= 0 && i >= found.Count - 64; i--)
        {
            DisplayRectangle above = found[i];
            if (above.X == next.X && above.Width == next.Width && above.Y + above.Height == next.Y)
            {
                found[i] = above with { Height = above.Height + next.Height };
                return;
            }
        }

        found.Add(next);
    }

    private bool Differs(int x, int y, int columns, int rows)
    {
        for (int row = y; row < y + rows; row++)
        {
            ReadOnlySpan<uint> now = _frame.Pixels.AsSpan((row * _frame.Width) + x, columns);
            if (!now.SequenceEqual(_shown.AsSpan((row * _width) + x, columns)))
            {
                return true;
            }
        }

        return false;
    }

    // Text that scrolled up or down by up to 64 rows is copied by the viewer.
    private int PutScroll()
    {
        long changed = 0;
        foreach (DisplayRectangle area in _frame.Changes)
        {
            changed += (long)area.Width * area.Height;
        }

        if (changed < (long)_width * _height / 4 || _height < 128)
        {
            return 0;
        }

        var now = new ulong[_height];
        var before = new ulong[_height];
        int different = 0;
        for (int y = 0; y < _height; y++)
        {
            now[y] = Hash(_frame.Pixels.AsSpan(y * _width, _width));
            before[y] = Hash(_shown.AsSpan(y * _width, _width));
            different += now[y] != before[y] ? 1 : 0;
        }

        int bestShift = 0;
        int bestStart = 0;
        int bestLength = 0;
        for (int shift = -64; shift <= 64; shift++)
        {
            int run = 0;
            for (int y = Math.Max(0, -shift); shift != 0 && y < _height - Math.Max(0, shift); y++)
            {
                run = now[y] == before[y + shift] ? run + 1 : 0;
                if (run > bestLength)
                {
                    bestLength = run;
                    bestShift = shift;
                    bestStart = y - run + 1;
                }
            }
        }

        if (different < 32 || bestLength < Math.Max(32, different / 2))
        {
            return 0;
        }

        for (int y = bestStart; y < bestStart + bestLength; y++)
        {
            // Equal hashes are not yet equal rows.
            if (!_frame.Pixels.AsSpan(y * _width, _width).SequenceEqual(_shown.AsSpan((y + bestShift) * _width, _width)))
            {
                return 0;
            }
        }

        _out.Rectangle(0, bestStart, _width, bestLength, RfbEncoders.CopyRect);
        _out.Short(0);
        _out.Short(bestStart + bestShift);
        Array.Copy(_shown, (bestStart + bestShift) * _width, _shown, bestStart * _width, bestLength * _width);
        return 1;
    }

    private static ulong Hash(ReadOnlySpan<uint> row)
    {
        ulong hash = 14695981039346656037;
        foreach (uint pixel in row)
        {
            hash = (hash ^ pixel) * 1099511628211;
        }

        return hash;
    }
}

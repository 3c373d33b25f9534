// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>
/// GPU (VIRTIO 1.2 §5.7) in two dimensions, one screen. The guest makes resources (pictures on the host), names guest
/// memory as their backing, copies rectangles to the host and says which resource the screen shows. Viewers pull
/// (<see cref="IDisplaySurface"/>): a flush only notes which rectangle is new.
/// </summary>
/// <remarks>
/// All host memory for pictures together is bounded; a guest that wants more is told OUT_OF_MEMORY. Commands run on the
/// worker, viewers on their own threads; one gate covers both. No 3D, no blob resources.
/// </remarks>
public sealed class VirtioGpu : VirtioModel, IDisplaySurface
{
    /// <summary>Largest width and height.</summary>
    public const int MaxEdge = 8192;

    private const ulong FeatureEdid = 1UL << 1;
    private const int HeaderBytes = 24;
    private const int MaxResources = 1024;
    private const int MaxBackingEntries = 16384;
    private const int MaxHistory = 64;
    private const int CursorEdge = 64;
    private const uint FlagFence = 1;
    private const uint EventDisplay = 1;
    private const int ControlQueue = 0;
    private const int Screens = 16;

    private const uint OkNoData = 0x1100;
    private const uint OkDisplayInfo = 0x1101;
    private const uint OkEdid = 0x1104;
    private const uint ErrorUnspecified = 0x1200;
    private const uint ErrorOutOfMemory = 0x1201;
    private const uint ErrorScanout = 0x1202;
    private const uint ErrorResource = 0x1203;
    private const uint ErrorParameter = 0x1205;

    private static readonly ushort[] s_queueSizes = [256, 16];

    private readonly Lock _gate = new();
    private readonly Dictionary<uint, Resource> _resources = [];
    private readonly Queue<(long Serial, DisplayRectangle Area)> _history = new();
    private readonly byte[] _reply = new byte[1056];
    private readonly long _maxBytes;
    private long _usedBytes;
    private int _width;
    private int _height;
    private uint _events;
    private uint _shown;
    private DisplayRectangle _scanout;
    private long _serial = 1;
    private long _oldest = 1;
    private DisplayCursor? _cursor;

    /// <summary>Makes one.</summary>
    /// <param name="width">Size that the guest is told at first.</param>
    /// <param name="height">Size that the guest is told at first.</param>
    /// <param name="maxBytes">Host memory for pictures.</param>
    public VirtioGpu(int width = 1024, int height = 768, long maxBytes = 256L << 20)
    {
        _width = Math.Clamp(width, 16, MaxEdge);
        _height = Math.Clamp(height, 16, MaxEdge);
        _maxBytes = maxBytes;
    }

    private enum Command : uint
    {
        GetDisplayInfo = 0x100,
        ResourceCreate2D = 0x101,
        ResourceUnref = 0x102,
        SetScanout = 0x103,
        ResourceFlush = 0x104,
        TransferToHost2D = 0x105,
        AttachBacking = 0x106,
        DetachBacking = 0x107,
        GetEdid = 0x10A,
        UpdateCursor = 0x300,
        MoveCursor = 0x301,
    }

    /// <inheritdoc/>
    public override VirtioDeviceType Type => VirtioDeviceType.Gpu;

    /// <inheritdoc/>
    public override ulong OfferedFeatures => FeatureEdid;

    /// <inheritdoc/>
    public override ReadOnlySpan<ushort> QueueSizes => s_queueSizes;

    /// <inheritdoc/>
    public override int ConfigBytes => 16;

    /// <summary>Host memory that pictures take.</summary>
    public long UsedBytes
    {
        get
        {
            lock (_gate)
            {
                return _usedBytes;
            }
        }
    }

    /// <inheritdoc/>
    public DisplayCursor? Cursor => Volatile.Read(ref _cursor);

    /// <inheritdoc/>
    public TextScreen? ReadText() => null;

    /// <inheritdoc/>
    public bool RequestSize(int width, int height)
    {
        lock (_gate)
        {
            _width = Math.Clamp(width, 16, MaxEdge);
            _height = Math.Clamp(height, 16, MaxEdge);
            _events |= EventDisplay;
        }

        if (Session is not { } session)
        {
            return false;
        }

        session.ConfigChanged();
        return true;
    }

    /// <inheritdoc/>
    public void Refresh(DisplayFrame frame)
    {
        ArgumentNullException.ThrowIfNull(frame);
        lock (_gate)
        {
            if (!_resources.TryGetValue(_shown, out Resource? resource))
            {
                frame.Begin(_width, _height);
                if (frame.Serial != _serial)
                {
                    Array.Clear(frame.Pixels);
                    frame.Changes.Add(new DisplayRectangle(0, 0, frame.Width, frame.Height));
                }

                frame.Serial = _serial;
                return;
            }

            frame.Begin(_scanout.Width, _scanout.Height);
            if (frame.Serial < _oldest)
            {
                frame.Changes.Add(new DisplayRectangle(0, 0, frame.Width, frame.Height));
            }
            else
            {
                foreach ((long serial, DisplayRectangle area) in _history)
                {
                    if (serial > frame.Serial)
                    {
                        frame.Changes.Add(area);
                    }
                }
            }

            foreach (DisplayRectangle area in frame.Changes)
            {
                resource.CopyTo(frame, area, _scanout.X, _scanout.Y);
            }

            frame.Serial = _serial;
        }
    }

    /// <inheritdoc/>
    public override void ReadConfig(uint offset, Span<byte> into)
    {
        Span<byte> config = stackalloc byte[16];
        config.Clear();
        lock (_gate)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(config, _events);
        }

        BinaryPrimitives.WriteUInt32LittleEndian(config[8..], 1);
        CopyConfig(config, offset, into);
    }

    /// <inheritdoc/>
    public override void WriteConfig(uint offset, ReadOnlySpan<byte> from)
    {
        if (offset == 4 && from.Length == 4)
        {
            lock (_gate)
            {
                _events &= ~BinaryPrimitives.ReadUInt32LittleEndian(from);
            }
        }
    }

    /// <inheritdoc/>
    public override void Reset()
    {
        lock (_gate)
        {
            _resources.Clear();
            _usedBytes = 0;
            _events = 0;
            _shown = 0;
            _cursor = null;
            Everything();
        }
    }

    /// <inheritdoc/>
    public override void Save(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_gate)
        {
            writer.Write("gpu.width", (ulong)_width);
            writer.Write("gpu.height", (ulong)_height);
            writer.Write("gpu.events", _events);
            writer.Write("gpu.shown", _shown);
            writer.Write("gpu.scanout", Pack(_scanout));
            writer.Write("gpu.resources", (ulong)_resources.Count);
            int index = 0;
            foreach ((uint id, Resource resource) in _resources)
            {
                resource.Save(writer, $"gpu.resource{index++}.", id);
            }
        }
    }

    /// <inheritdoc/>
    public override void Load(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_gate)
        {
            _resources.Clear();
            _usedBytes = 0;
            _width = (int)Math.Max(16, reader.ReadBounded("gpu.width", MaxEdge));
            _height = (int)Math.Max(16, reader.ReadBounded("gpu.height", MaxEdge));
            _events = reader.ReadUInt32("gpu.events");
            _shown = reader.ReadUInt32("gpu.shown");
            int count = (int)reader.ReadBounded("gpu.resources", MaxResources);
            for (int i = 0; i < count; i++)
            {
                Resource resource = Resource.Load(reader, $"gpu.resource{i}.", out uint id);
                _usedBytes += resource.Bytes;
                if (_usedBytes > _maxBytes || !_resources.TryAdd(id, resource))
                {
                    throw new StateException($"{reader.Section}.gpu.resource{i}: too much, or twice");
                }
            }

            _scanout = Unpack(reader.ReadUInt64("gpu.scanout"));
            if (_resources.TryGetValue(_shown, out Resource? shown) && !shown.Contains(_scanout))
            {
                throw new StateException($"{reader.Section}.gpu.scanout: outside the picture");
            }

            _cursor = null;
            Everything();
        }
    }

    /// <inheritdoc/>
    protected override void Process(int queue, Virtqueue ring, VirtqueueChain chain)
    {
        ArgumentNullException.ThrowIfNull(ring);
        ArgumentNullException.ThrowIfNull(chain);
        Span<byte> request = stackalloc byte[64];
        request.Clear();
        int length = (int)Math.Min(request.Length, chain.ReadableBytes);
        if (length < HeaderBytes || !chain.TryRead(0, request[..length]))
        {
            ring.Break(VirtqueueFault.BadRequest);
            ring.Push(chain, 0);
            return;
        }

        Array.Clear(_reply);
        int replyBytes = HeaderBytes;
        uint result;
        lock (_gate)
        {
            result = queue == ControlQueue
                ? Control(chain, request, length, ref replyBytes)
                : CursorCommand(request, length);
        }

        BinaryPrimitives.WriteUInt32LittleEndian(_reply, result);
        if ((BinaryPrimitives.ReadUInt32LittleEndian(request[4..]) & FlagFence) != 0)
        {
            // §5.7.6.7: a fence is done when its command is; commands are done in order.
            BinaryPrimitives.WriteUInt32LittleEndian(_reply.AsSpan(4), FlagFence);
            request.Slice(8, 12).CopyTo(_reply.AsSpan(8));
        }

        replyBytes = (int)Math.Min(replyBytes, chain.WritableBytes);
        if (!chain.TryWrite(0, _reply.AsSpan(0, replyBytes)))
        {
            ring.Break(VirtqueueFault.BadAddress);
        }

        ring.Push(chain, (uint)replyBytes);
    }

    private static uint U32(ReadOnlySpan<byte> request, int offset) =>
        BinaryPrimitives.ReadUInt32LittleEndian(request[offset..]);

    private static ulong Pack(in DisplayRectangle area) =>
        (ushort)area.X | ((ulong)(ushort)area.Y << 16) | ((ulong)(ushort)area.Width << 32)
        | ((ulong)(ushort)area.Height << 48);

    private static DisplayRectangle Unpack(ulong packed) =>
        new((ushort)packed, (ushort)(packed >> 16), (ushort)(packed >> 32), (ushort)(packed >> 48));

    // Everything is new to every viewer.
    private void Everything()
    {
        _serial++;
        _oldest = _serial;
        _history.Clear();
    }

    private uint Control(VirtqueueChain chain, ReadOnlySpan<byte> request, int length, ref int replyBytes)
    {
        switch ((Command)U32(request, 0))
        {
            case Command.GetDisplayInfo:
                replyBytes = HeaderBytes + (Screens * 24);
                BinaryPrimitives.WriteInt32LittleEndian(_reply.AsSpan(HeaderBytes + 8), _width);
                BinaryPrimitives.WriteInt32LittleEndian(_reply.AsSpan(HeaderBytes + 12), _height);
                BinaryPrimitives.WriteInt32LittleEndian(_reply.AsSpan(HeaderBytes + 16), 1);
                return OkDisplayInfo;
            case Command.GetEdid when length >= 32:
                if (U32(request, 24) != 0)
                {
                    return ErrorScanout;
                }

                replyBytes = HeaderBytes + 8 + 1024;
                BinaryPrimitives.WriteInt32LittleEndian(_reply.AsSpan(HeaderBytes), Edid.Bytes);
                Edid.Write(_reply.AsSpan(HeaderBytes + 8, Edid.Bytes), _width, _height);
                return OkEdid;
            case Command.ResourceCreate2D when length >= 40:
                return Create(U32(request, 24), U32(request, 28), U32(request, 32), U32(request, 36));
            case Command.ResourceUnref when length >= 32:
                return Unref(U32(request, 24));
            case Command.AttachBacking when length >= 32:
                return Attach(chain, U32(request, 24), U32(request, 28));
            case Command.DetachBacking when length >= 32:
                if (!_resources.TryGetValue(U32(request, 24), out Resource? detached))
                {
                    return ErrorResource;
                }

                detached.Backing = [];
                return OkNoData;
            case Command.SetScanout when length >= 48:
                return SetScanout(request);
            case Command.TransferToHost2D when length >= 56:
                return Transfer(request);
            case Command.ResourceFlush when length >= 48:
                return Flush(request);
            default:
                return ErrorUnspecified;
        }
    }

    private uint Create(uint id, uint format, uint width, uint height)
    {
        if (id == 0 || _resources.ContainsKey(id))
        {
            return ErrorResource;
        }

        if (!Resource.TryChannels(format, out _) || width is 0 or > MaxEdge || height is 0 or > MaxEdge)
        {
            return ErrorParameter;
        }

        long bytes = (long)width * height * 4;
        if (_resources.Count >= MaxResources || bytes > _maxBytes - _usedBytes)
        {
            return ErrorOutOfMemory;
        }

        _usedBytes += bytes;
        _resources.Add(id, new Resource(format, (int)width, (int)height));
        return OkNoData;
    }

    private uint Unref(uint id)
    {
        if (!_resources.Remove(id, out Resource? resource))
        {
            return ErrorResource;
        }

        _usedBytes -= resource.Bytes;
        if (_shown == id)
        {
            _shown = 0;
            Everything();
        }

        return OkNoData;
    }

    private uint Attach(VirtqueueChain chain, uint id, uint count)
    {
        if (!_resources.TryGetValue(id, out Resource? resource))
        {
            return ErrorResource;
        }

        if (count is 0 or > MaxBackingEntries || resource.Backing.Length != 0
            || chain.ReadableBytes < 32 + ((long)count * 16))
        {
            return ErrorParameter;
        }

        byte[] raw = new byte[count * 16];
        if (!chain.TryRead(32, raw))
        {
            return ErrorParameter;
        }

        var backing = new (ulong Address, uint Length)[count];
        for (int i = 0; i < backing.Length; i++)
        {
            backing[i] = (BinaryPrimitives.ReadUInt64LittleEndian(raw.AsSpan(i * 16)), U32(raw, (i * 16) + 8));
        }

        resource.Backing = backing;
        return OkNoData;
    }

    private uint SetScanout(ReadOnlySpan<byte> request)
    {
        uint id = U32(request, 44);
        if (U32(request, 40) != 0)
        {
            return ErrorScanout;
        }

        if (id == 0)
        {
            _shown = 0;
            Everything();
            return OkNoData;
        }

        if (!_resources.TryGetValue(id, out Resource? resource))
        {
            return ErrorResource;
        }

        if (!resource.TryRectangle(request[24..], out DisplayRectangle area) || area.Width == 0 || area.Height == 0)
        {
            return ErrorParameter;
        }

        // A driver that flips between two pictures of the same place changes the whole screen.
        _shown = id;
        _scanout = area;
        Everything();
        return OkNoData;
    }

    private uint Transfer(ReadOnlySpan<byte> request)
    {
        if (!_resources.TryGetValue(U32(request, 48), out Resource? resource))
        {
            return ErrorResource;
        }

        ulong offset = BinaryPrimitives.ReadUInt64LittleEndian(request[40..]);
        return resource.TryRectangle(request[24..], out DisplayRectangle area)
            && resource.TryFill(Session!.Dma, area, offset)
                ? OkNoData
                : ErrorParameter;
    }

    private uint Flush(ReadOnlySpan<byte> request)
    {
        uint id = U32(request, 40);
        if (!_resources.TryGetValue(id, out Resource? resource))
        {
            return ErrorResource;
        }

        if (!resource.TryRectangle(request[24..], out DisplayRectangle area))
        {
            return ErrorParameter;
        }

        if (id != _shown)
        {
            return OkNoData;
        }

        // In coordinates of the screen, cut to it.
        int left = Math.Max(area.X, _scanout.X);
        int top = Math.Max(area.Y, _scanout.Y);
        int right = Math.Min(area.X + area.Width, _scanout.X + _scanout.Width);
        int bottom = Math.Min(area.Y + area.Height, _scanout.Y + _scanout.Height);
        if (right > left && bottom > top)
        {
            _serial++;
            _history.Enqueue((_serial, new DisplayRectangle(left - _scanout.X, top - _scanout.Y, right - left, bottom - top)));
            if (_history.Count > MaxHistory)
            {
                _oldest = _history.Dequeue().Serial;
            }
        }

        return OkNoData;
    }

    // §5.7.6.10. The position is the guest's; viewers draw the pointer where their own is.
    private uint CursorCommand(ReadOnlySpan<byte> request, int length)
    {
        if (length < 56)
        {
            return ErrorUnspecified;
        }

        if ((Command)U32(request, 0) == Command.UpdateCursor)
        {
            uint id = U32(request, 40);
            if (id == 0)
            {
                Volatile.Write(ref _cursor, null);
            }
            else if (_resources.TryGetValue(id, out Resource? resource)
                && resource.Width == CursorEdge && resource.Height == CursorEdge)
            {
                Volatile.Write(ref _cursor, new DisplayCursor
                {
                    Width = CursorEdge,
                    Height = CursorEdge,
                    HotX = (int)Math.Min(U32(request, 44), CursorEdge - 1),
                    HotY = (int)Math.Min(U32(request, 48), CursorEdge - 1),
                    Pixels = resource.ToArgb(),
                });
            }
        }

        return OkNoData;
    }

    /// <summary>A picture on the host and the guest memory that it is filled from.</summary>
    private sealed class Resource
    {
        private readonly byte[] _pixels;
        private readonly uint _format;
        private readonly (int Red, int Green, int Blue, int Alpha) _channels;

        public Resource(uint format, int width, int height)
        {
            _format = format;
            Width = width;
            Height = height;
            _pixels = new byte[width * height * 4];
            TryChannels(format, out _channels);
        }

        public int Width { get; }

        public int Height { get; }

        public long Bytes => _pixels.Length;

        public (ulong Address, uint Length)[] Backing { get; set; } = [];

        // §5.7.6.8: bytes in memory order; alpha -1 where there is none.
        public static bool TryChannels(uint format, out (int Red, int Green, int Blue, int Alpha) channels)
        {
            channels = format switch
            {
                1 => (2, 1, 0, 3),
                2 => (2, 1, 0, -1),
                3 => (1, 2, 3, 0),
                4 => (1, 2, 3, -1),
                67 => (0, 1, 2, 3),
                68 => (3, 2, 1, -1),
                121 => (3, 2, 1, 0),
                134 => (0, 1, 2, -1),
                _ => (-1, -1, -1, -1),
            };
            return channels.Red >= 0;
        }

        public bool TryRectangle(ReadOnlySpan<byte> raw, out DisplayRectangle area)
        {
            uint x = U32(raw, 0);
            uint y = U32(raw, 4);
            uint width = U32(raw, 8);
            uint height = U32(raw, 12);
            bool inside = x <= Width && width <= Width - x && y <= Height && height <= Height - y;
            area = inside ? new DisplayRectangle((int)x, (int)y, (int)width, (int)height) : default;
            return inside;
        }

        public bool Contains(in DisplayRectangle area) =>
            area.X <= Width - area.Width && area.Y <= Height - area.Height && area.Width > 0 && area.Height > 0;

        // §5.7.6.8 TRANSFER_TO_HOST_2D: offset is where the rectangle's first pixel is in the backing.
        public bool TryFill(IDmaPort dma, in DisplayRectangle area, ulong offset)
        {
            ulong total = 0;
            foreach ((_, uint length) in Backing)
            {
                total += length;
            }

            int stride = Width * 4;
            ulong last = area.Height == 0 ? 0 : ((ulong)(area.Height - 1) * (ulong)stride) + ((ulong)area.Width * 4);
            if (offset > total || last > total - offset)
            {
                return false;
            }

            int entry = 0;
            ulong entryStart = 0;
            for (int row = 0; row < area.Height; row++)
            {
                ulong at = offset + ((ulong)row * (ulong)stride);
                Span<byte> into = _pixels.AsSpan(((area.Y + row) * stride) + (area.X * 4), area.Width * 4);
                while (into.Length > 0)
                {
                    // Rows go forward, so the search does too.
                    while (at - entryStart >= Backing[entry].Length)
                    {
                        entryStart += Backing[entry++].Length;
                    }

                    (ulong address, uint length) = Backing[entry];
                    ulong inside = at - entryStart;
                    int take = (int)Math.Min((ulong)into.Length, length - inside);
                    if (!dma.TryRead(address + inside, into[..take]))
                    {
                        return false;
                    }

                    into = into[take..];
                    at += (uint)take;
                }
            }

            return true;
        }

        public void CopyTo(DisplayFrame frame, in DisplayRectangle area, int x, int y)
        {
            for (int row = area.Y; row < area.Y + area.Height; row++)
            {
                ReadOnlySpan<byte> from = _pixels.AsSpan((((y + row) * Width) + x + area.X) * 4, area.Width * 4);
                Span<uint> to = frame.Pixels.AsSpan((row * frame.Width) + area.X, area.Width);
                for (int i = 0; i < to.Length; i++)
                {
                    ReadOnlySpan<byte> pixel = from.Slice(i * 4, 4);
                    to[i] = ((uint)pixel[_channels.Red] << 16) | ((uint)pixel[_channels.Green] << 8) | pixel[_channels.Blue];
                }
            }
        }

        public uint[] ToArgb()
        {
            uint[] argb = new uint[Width * Height];
            for (int i = 0; i < argb.Length; i++)
            {
                ReadOnlySpan<byte> pixel = _pixels.AsSpan(i * 4, 4);
                uint alpha = _channels.Alpha < 0 ? 0xFFu : pixel[_channels.Alpha];
                argb[i] = (alpha << 24) | ((uint)pixel[_channels.Red] << 16) | ((uint)pixel[_channels.Green] << 8)
                    | pixel[_channels.Blue];
            }

            return argb;
        }

        public void Save(StateWriter writer, string prefix, uint id)
        {
            writer.Write(prefix + "id", id);
            writer.Write(prefix + "format", _format);
            writer.Write(prefix + "width", (ulong)Width);
            writer.Write(prefix + "height", (ulong)Height);
            writer.WriteBytes(prefix + "pixels", _pixels);
            byte[] backing = new byte[Backing.Length * 12];
            for (int i = 0; i < Backing.Length; i++)
            {
                BinaryPrimitives.WriteUInt64LittleEndian(backing.AsSpan(i * 12), Backing[i].Address);
                BinaryPrimitives.WriteUInt32LittleEndian(backing.AsSpan((i * 12) + 8), Backing[i].Length);
            }

            writer.WriteBytes(prefix + "backing", backing);
        }

        public static Resource Load(StateReader reader, string prefix, out uint id)
        {
            id = reader.ReadUInt32(prefix + "id");
            uint format = reader.ReadUInt32(prefix + "format");
            int width = (int)reader.ReadBounded(prefix + "width", MaxEdge);
            int height = (int)reader.ReadBounded(prefix + "height", MaxEdge);
            ReadOnlySpan<byte> pixels = reader.ReadBytes(prefix + "pixels");
            if (!TryChannels(format, out _) || pixels.Length != width * height * 4)
            {
                throw new StateException($"{reader.Section}.{prefix}pixels: not a picture of that size");
            }

            var resource = new Resource(format, width, height);
            pixels.CopyTo(resource._pixels);
            ReadOnlySpan<byte> backing = reader.ReadBytes(prefix + "backing");
            resource.Backing = new (ulong Address, uint Length)[Math.Min(backing.Length / 12, MaxBackingEntries)];
            for (int i = 0; i < resource.Backing.Length; i++)
            {
                resource.Backing[i] = (
                    BinaryPrimitives.ReadUInt64LittleEndian(backing[(i * 12)..]), U32(backing, (i * 12) + 8));
            }

            return resource;
        }
    }
}

/// <summary>A monitor's description (VESA E-EDID 1.4) with one preferred size.</summary>
internal static class Edid
{
    /// <summary>Length of the base block.</summary>
    public const int Bytes = 128;

    /// <summary>Writes a block for a size at about 75 Hz.</summary>
    public static void Write(Span<byte> into, int width, int height)
    {
        into.Clear();
        into[1..7].Fill(0xFF);
        BinaryPrimitives.WriteUInt16BigEndian(into[8..], 0x59AD); // "VMM" in five-bit letters
        into[16] = 1;
        into[17] = 36; // 2026
        into[18] = 1;
        into[19] = 4;
        into[20] = 0xA5; // digital, 8 bits, DisplayPort
        into[21] = (byte)Math.Min(255, width * 254 / 10 / 960); // centimetres at 96 dots an inch
        into[22] = (byte)Math.Min(255, height * 254 / 10 / 960);
        into[23] = 120;
        into[24] = 0x06;
        into[38..54].Fill(1);
        Timing(into.Slice(54, 18), Math.Min(width, 4095), Math.Min(height, 4095));
        into[72 + 3] = 0xFC;
        "VMM screen\n  "u8.CopyTo(into[(72 + 5)..]);
        into[90 + 3] = 0x10;
        into[108 + 3] = 0x10;
        byte sum = 0;
        foreach (byte value in into[..127])
        {
            sum += value;
        }

        into[127] = (byte)(256 - sum);
    }

    // A detailed timing with simple blanking.
    private static void Timing(Span<byte> into, int width, int height)
    {
        int horizontalBlank = Math.Min(4095, Math.Max(64, width / 4));
        int verticalBlank = Math.Max(8, height / 32);
        long clock = (long)(width + horizontalBlank) * (height + verticalBlank) * 75 / 10_000;
        BinaryPrimitives.WriteUInt16LittleEndian(into, (ushort)Math.Min(clock, 65535));
        into[2] = (byte)width;
        into[3] = (byte)horizontalBlank;
        into[4] = (byte)((width >> 8 << 4) | (horizontalBlank >> 8));
        into[5] = (byte)height;
        into[6] = (byte)verticalBlank;
        into[7] = (byte)((height >> 8 << 4) | (verticalBlank >> 8));
        into[8] = 16;
        into[9] = 32;
        into[10] = (3 << 4) | 4;
        into[17] = 0x18;
    }
}

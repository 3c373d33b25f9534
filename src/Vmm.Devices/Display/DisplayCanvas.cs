// SPDX-License-Identifier: BSD-2-Clause
using System;
using Vmm.Core;

namespace Vmm.Devices.Display;

/// <summary>
/// The picture of a display card, in tiles of 64 by 16 pixels that each know when they last changed. A card renders rows
/// into it; a viewer's frame takes the tiles that are newer than itself. Not thread-safe: the card's gate protects it.
/// </summary>
public sealed class DisplayCanvas
{
    /// <summary>Most columns or rows.</summary>
    public const int MaximumSize = 8192;

    private const int TileWidth = 64;
    private const int TileHeight = 16;

    private uint[] _pixels = [];
    private long[] _tiles = [];
    private int _tileColumns;
    private long _serial = 1;

    /// <summary>Columns.</summary>
    public int Width { get; private set; }

    /// <summary>Rows.</summary>
    public int Height { get; private set; }

    /// <summary>Sets the size; a change makes everything black and new.</summary>
    /// <returns>True when it changed: everything must be rendered.</returns>
    public bool Resize(int width, int height)
    {
        width = Math.Clamp(width, 1, MaximumSize);
        height = Math.Clamp(height, 1, MaximumSize);
        if (width == Width && height == Height)
        {
            return false;
        }

        Width = width;
        Height = height;
        _pixels = new uint[width * height];
        _tileColumns = (width + TileWidth - 1) / TileWidth;
        _tiles = new long[_tileColumns * ((height + TileHeight - 1) / TileHeight)];
        _serial++;
        Array.Fill(_tiles, _serial);
        return true;
    }

    /// <summary>Begins a round of rendering: what <see cref="SetRow"/> changes from now on is newer than all frames.</summary>
    public void BeginUpdate() => _serial++;

    /// <summary>Replaces a row; tiles without a difference stay old.</summary>
    /// <param name="row">0 to <see cref="Height"/> - 1.</param>
    /// <param name="pixels">At least <see cref="Width"/> pixels, 0x00RRGGBB.</param>
    public void SetRow(int row, ReadOnlySpan<uint> pixels) => SetPixels(0, row, pixels[..Width]);

    /// <summary>Replaces a part of a row; what lies outside is ignored.</summary>
    public void SetPixels(int column, int row, ReadOnlySpan<uint> pixels)
    {
        if ((uint)row >= (uint)Height || (uint)column >= (uint)Width)
        {
            return;
        }

        int end = Math.Min(Width, column + pixels.Length);
        int tileRow = row / TileHeight * _tileColumns;
        while (column < end)
        {
            int stop = Math.Min(end, (column / TileWidth * TileWidth) + TileWidth);
            ReadOnlySpan<uint> from = pixels[..(stop - column)];
            Span<uint> to = _pixels.AsSpan((row * Width) + column, stop - column);
            if (!from.SequenceEqual(to))
            {
                from.CopyTo(to);
                _tiles[tileRow + (column / TileWidth)] = _serial;
            }

            pixels = pixels[(stop - column)..];
            column = stop;
        }
    }

    /// <summary>Makes everything black.</summary>
    public void Blank()
    {
        var black = new uint[Width];
        for (int row = 0; row < Height; row++)
        {
            SetRow(row, black);
        }
    }

    /// <summary>Brings a frame up to date and lists what changed in it.</summary>
    public void CopyTo(DisplayFrame frame)
    {
        ArgumentNullException.ThrowIfNull(frame);
        frame.Begin(Width, Height);
        bool everything = frame.SizeChanged || frame.Serial == 0;
        for (int top = 0; top < Height; top += TileHeight)
        {
            int height = Math.Min(TileHeight, Height - top);
            int first = -1;
            for (int tile = 0; tile <= _tileColumns; tile++)
            {
                bool isNew = tile < _tileColumns &&
                    (everything || _tiles[(top / TileHeight * _tileColumns) + tile] > frame.Serial);
                if (isNew && first < 0)
                {
                    first = tile;
                }
                else if (!isNew && first >= 0)
                {
                    int left = first * TileWidth;
                    int width = Math.Min(tile * TileWidth, Width) - left;
                    Copy(frame, left, top, width, height);
                    if (!everything)
                    {
                        frame.Changes.Add(new DisplayRectangle(left, top, width, height));
                    }

                    first = -1;
                }
            }
        }

        if (everything)
        {
            frame.Changes.Add(new DisplayRectangle(0, 0, Width, Height));
        }

        frame.Serial = _serial;
    }

    private void Copy(DisplayFrame frame, int left, int top, int width, int height)
    {
        for (int row = top; row < top + height; row++)
        {
            _pixels.AsSpan((row * Width) + left, width).CopyTo(frame.Pixels.AsSpan((row * Width) + left));
        }
    }
}

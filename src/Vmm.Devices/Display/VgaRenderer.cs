// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using Vmm.Core;
using Vmm.Memory;

namespace Vmm.Devices.Display;

// Theory. Turns registers and video memory into pixels, a scan line at a time, the way the CRT controller counts:
// a line counter, a row-scan counter inside a character row, and a memory address counter that starts a row at
// "start address + row * offset" and is reset by line compare (split screen). Horizontal doubling (dot clock / 2, and
// 256-color pixels of two clocks) is done in pixels, so a 320x200 mode is a 640x400 picture, as on a monitor.

/// <summary>Draws what a <see cref="VgaState"/> shows. Protected by the card's gate.</summary>
internal sealed class VgaRenderer
{
    private const int PageBytes = RamBlock.PageBytes;

    private readonly VgaState _state;
    private readonly RamBlock _vram;
    private readonly uint[] _row = new uint[DisplayCanvas.MaximumSize + 64];
    private readonly uint[] _colors = new uint[256];
    private readonly uint[] _attributes = new uint[16];
    private readonly byte[] _line = new byte[DisplayCanvas.MaximumSize * 4];
    private readonly byte[] _planes = new byte[256 * 1024];
    private readonly bool[] _dirty;
    private long _drawnVersion = -1;

    public VgaRenderer(VgaState state, RamBlock vram)
    {
        _state = state;
        _vram = vram;
        _dirty = new bool[vram.LengthBytes / PageBytes];
        Canvas.Resize(640, 400);
    }

    public DisplayCanvas Canvas { get; } = new();

    private bool IsGraphics => (_state.Graphics[6] & 1) != 0;

    private int CharacterWidth => !IsGraphics && (_state.Sequencer[1] & 1) == 0 ? 9 : 8;

    private int Columns => _state.Crtc[1] + 1;

    // Vertical display end with its bits 8 and 9 from Overflow.
    private int DisplayLines =>
        (_state.Crtc[0x12] | ((_state.Crtc[7] & 0x02) << 7) | ((_state.Crtc[7] & 0x40) << 3)) + 1;

    private int LineCompare =>
        _state.Crtc[0x18] | ((_state.Crtc[7] & 0x10) << 4) | ((_state.Crtc[9] & 0x40) << 3);

    private int RowLines => (_state.Crtc[9] & 0x1F) + 1;

    private int StartAddress => (_state.Crtc[0x0C] << 8) | _state.Crtc[0x0D];

    // In dwords of video memory per character row; see the card's theory for why the addressing mode does not matter.
    private int RowOffset => _state.Crtc[0x13] * 2;

    /// <summary>Brings the canvas up to date.</summary>
    public void Update()
    {
        Canvas.BeginUpdate();
        bool everything = _drawnVersion != _state.Version;
        _drawnVersion = _state.Version;
        bool anyDirty = CollectDirty();
        if (!everything && !anyDirty)
        {
            return;
        }

        if (_state.IsDispiOn && _state.Dispi[VgaState.DispiXRes] != 0 && _state.Dispi[VgaState.DispiYRes] != 0)
        {
            everything |= Canvas.Resize(_state.Dispi[VgaState.DispiXRes], _state.Dispi[VgaState.DispiYRes]);
            LoadPalette();
            if (!_state.IsScreenOn)
            {
                Canvas.Blank();
            }
            else
            {
                DrawLinear(everything);
            }

            return;
        }

        int doubling = (_state.Sequencer[1] & 8) != 0 ? 2 : 1;
        int width = Columns * CharacterWidth * doubling;
        int height = DisplayLines;
        if (width < 64 || height < 16 || _state.Crtc[0] == 0)
        {
            // Not programmed yet.
            Canvas.Resize(640, 400);
            Canvas.Blank();
            return;
        }

        Canvas.Resize(width, height);
        if (!_state.IsScreenOn)
        {
            Canvas.Blank();
            return;
        }

        LoadPalette();
        _vram.TryRead(0, _planes);
        if (IsGraphics)
        {
            DrawGraphics(doubling);
        }
        else
        {
            DrawText(doubling);
        }
    }

    public TextScreen? ReadText()
    {
        if (IsGraphics || _state.IsDispiOn || _state.Crtc[0] == 0)
        {
            return null;
        }

        int columns = Columns;
        int rows = Math.Clamp(DisplayLines / RowLines, 1, 256);
        byte[] characters = new byte[columns * rows];
        byte[] attributes = new byte[columns * rows];
        byte[] cell = new byte[2];
        for (int row = 0; row < rows; row++)
        {
            for (int column = 0; column < columns; column++)
            {
                int address = (StartAddress + (row * RowOffset) + column) & 0xFFFF;
                _vram.TryRead((uint)address * 4, cell);
                characters[(row * columns) + column] = cell[0];
                attributes[(row * columns) + column] = cell[1];
            }
        }

        int cursor = CursorAddress - StartAddress;
        bool visible = IsCursorOn && cursor >= 0 && RowOffset != 0 && cursor / RowOffset < rows && cursor % RowOffset < columns;
        return new TextScreen
        {
            Columns = columns,
            Rows = rows,
            Characters = characters,
            Attributes = attributes,
            CursorColumn = visible ? cursor % RowOffset : -1,
            CursorRow = visible ? cursor / RowOffset : -1,
        };
    }

    private int CursorAddress => (_state.Crtc[0x0E] << 8) | _state.Crtc[0x0F];

    private bool IsCursorOn => (_state.Crtc[0x0A] & 0x20) == 0;

    private bool CollectDirty()
    {
        bool any = false;
        for (int page = 0; page < _dirty.Length; page++)
        {
            _dirty[page] = _vram.TakeFlags((ulong)page, PageFlags.DirtyDisplay) != PageFlags.None;
            any |= _dirty[page];
        }

        return any;
    }

    private void LoadPalette()
    {
        for (int i = 0; i < 256; i++)
        {
            int at = (i & _state.DacMask) * 3;
            _colors[i] = ((uint)Component(at) << 16) | ((uint)Component(at + 1) << 8) | (uint)Component(at + 2);
        }

        for (int i = 0; i < 16; i++)
        {
            int value = _state.Attribute[i] & 0x3F;
            int select = _state.Attribute[0x14];

            // Attribute mode bit 7: palette bits 5..4 come from color select 1..0.
            if ((_state.Attribute[0x10] & 0x80) != 0)
            {
                value = (value & 0x0F) | ((select & 3) << 4);
            }

            _attributes[i] = _colors[(value | ((select & 0x0C) << 4)) & 0xFF];
        }
    }

    private int Component(int at)
    {
        int value = _state.Palette[at];

        // Six bits to eight so that 63 is 255.
        return _state.Is8BitDac ? value : (value << 2) | (value >> 4);
    }

    private void DrawText(int doubling)
    {
        VgaState s = _state;
        int cellWidth = CharacterWidth;
        int cellLines = RowLines;
        int columns = Columns;
        int height = Canvas.Height;
        int select = s.Sequencer[3];
        int fontA = FontOffset(((select >> 2) & 3) | ((select >> 3) & 4));
        int fontB = FontOffset((select & 3) | ((select >> 2) & 4));
        bool blinkAttribute = (s.Attribute[0x10] & 8) != 0;
        bool lineGraphics = (s.Attribute[0x10] & 4) != 0;
        bool monochrome = (s.Attribute[0x10] & 2) != 0;
        int underline = s.Crtc[0x14] & 0x1F;
        int panning = s.Attribute[0x13] & 0x0F;
        panning = cellWidth == 9 ? (panning >= 8 ? 0 : panning + 1) : panning & 7;
        int cursor = IsCursorOn ? CursorAddress : -1;
        int cursorFirst = s.Crtc[0x0A] & 0x1F;
        int cursorLast = s.Crtc[0x0B] & 0x1F;
        int rowStart = StartAddress;
        int rowScan = s.Crtc[8] & 0x1F;
        int compare = LineCompare;
        for (int y = 0; y < height; y++)
        {
            int x = -panning * doubling;
            for (int column = 0; column <= columns; column++)
            {
                int address = (rowStart + column) & 0xFFFF;
                byte character = _planes[address * 4];
                byte attribute = _planes[(address * 4) + 1];
                int font = (attribute & 8) != 0 ? fontA : fontB;
                int bits = _planes[((font + (character * 32) + (rowScan & 31)) & 0xFFFF) * 4 + 2] << 1;
                if (lineGraphics && (character & 0xE0) == 0xC0)
                {
                    bits |= (bits >> 1) & 1;
                }

                int foreground = fontA != fontB ? attribute & 7 : attribute & 15;
                int background = blinkAttribute ? (attribute >> 4) & 7 : attribute >> 4;
                if (monochrome && (attribute & 7) == 1 && rowScan == underline)
                {
                    bits = 0x1FF;
                }

                if (address == cursor && rowScan >= cursorFirst && rowScan <= cursorLast)
                {
                    bits = 0x1FF;
                }

                uint on = _attributes[foreground];
                uint off = _attributes[background];
                for (int bit = 0; bit < cellWidth; bit++)
                {
                    uint color = (bits & (0x100 >> bit)) != 0 ? on : off;
                    for (int twice = 0; twice < doubling; twice++, x++)
                    {
                        if (x >= 0)
                        {
                            _row[x] = color;
                        }
                    }
                }
            }

            Canvas.SetRow(y, _row);
            if (y == compare)
            {
                rowStart = 0;
                rowScan = 0;
                if ((s.Attribute[0x10] & 0x20) != 0)
                {
                    panning = 0;
                }

                continue;
            }

            if (++rowScan >= cellLines)
            {
                rowScan = 0;
                rowStart += RowOffset;
            }
        }
    }

    // Character map select: maps 0..3 at 0, 16, 32, 48 KiB, maps 4..7 at 8, 24, 40, 56 KiB of plane 2.
    private static int FontOffset(int map) => ((map & 3) * 0x4000) + ((map & 4) != 0 ? 0x2000 : 0);

    private void DrawGraphics(int doubling)
    {
        VgaState s = _state;
        int shift = (s.Graphics[5] >> 5) & 3;
        int columns = Columns;
        int height = Canvas.Height;
        bool doubleScan = (s.Crtc[9] & 0x80) != 0;
        int rowLines = RowLines;
        int rowStart = StartAddress + ((s.Crtc[8] >> 5) & 3);
        int rowScan = s.Crtc[8] & 0x1F;
        int panning = s.Attribute[0x13] & 7;
        int compare = LineCompare;
        bool second = false;
        for (int y = 0; y < height; y++)
        {
            int x = -panning * (shift >= 2 ? 1 : doubling);
            for (int column = 0; column <= columns; column++)
            {
                int at = Address(rowStart + column, rowScan) * 4;
                uint four = MemoryMarshal.Read<uint>(_planes.AsSpan(at));
                if (shift >= 2)
                {
                    x = Put256(four, x, doubling);
                }
                else if (shift == 1)
                {
                    x = PutInterleaved(four, x, doubling);
                }
                else
                {
                    x = PutPlanar(four, x, doubling);
                }
            }

            Canvas.SetRow(y, _row);
            if (y == compare)
            {
                rowStart = 0;
                rowScan = 0;
                second = false;
                if ((s.Attribute[0x10] & 0x20) != 0)
                {
                    panning = 0;
                }

                continue;
            }

            if (doubleScan && !second)
            {
                second = true;
                continue;
            }

            second = false;
            if (++rowScan >= rowLines)
            {
                rowScan = 0;
                rowStart += RowOffset;
            }
        }
    }

    // CRTC mode control bits 0 and 1 clear: row scan bits 0 and 1 take the place of address bits 13 and 14, which makes
    // the two or four banks of CGA and Hercules modes. In word mode these are bits 12 and 13 of our dword address.
    private int Address(int counter, int rowScan)
    {
        byte mode = _state.Crtc[0x17];
        int bank = (mode & 0x40) != 0 ? 13 : 12;
        if ((mode & 1) == 0)
        {
            counter = (counter & ~(1 << bank)) | ((rowScan & 1) << bank);
        }

        if ((mode & 2) == 0)
        {
            counter = (counter & ~(2 << bank)) | (((rowScan >> 1) & 1) << (bank + 1));
        }

        return counter & 0xFFFF;
    }

    // 256 colors: a pixel is a byte and two dots.
    private int Put256(uint four, int x, int doubling)
    {
        for (int i = 0; i < 4; i++)
        {
            uint color = _colors[(byte)(four >> (8 * i))];
            for (int dot = 0; dot < 2 * doubling; dot++, x++)
            {
                if (x >= 0)
                {
                    _row[x] = color;
                }
            }
        }

        return x;
    }

    // CGA: two bits per pixel, four pixels from plane 0 and four from plane 1; planes 2 and 3 add the upper bits.
    private int PutInterleaved(uint four, int x, int doubling)
    {
        int enable = _state.Attribute[0x12] & 15;
        for (int i = 0; i < 8; i++)
        {
            int shift = 6 - (2 * (i & 3));
            int low = (int)(four >> ((i < 4 ? 0 : 8) + shift)) & 3;
            int high = (int)(four >> ((i < 4 ? 16 : 24) + shift)) & 3;
            uint color = _attributes[(low | (high << 2)) & enable];
            for (int dot = 0; dot < doubling; dot++, x++)
            {
                if (x >= 0)
                {
                    _row[x] = color;
                }
            }
        }

        return x;
    }

    private int PutPlanar(uint four, int x, int doubling)
    {
        int enable = _state.Attribute[0x12] & 15;
        for (int bit = 7; bit >= 0; bit--)
        {
            int index = (int)((four >> bit) & 1) | (int)((four >> (bit + 7)) & 2) |
                (int)((four >> (bit + 14)) & 4) | (int)((four >> (bit + 21)) & 8);
            uint color = _attributes[index & enable];
            for (int dot = 0; dot < doubling; dot++, x++)
            {
                if (x >= 0)
                {
                    _row[x] = color;
                }
            }
        }

        return x;
    }

    private void DrawLinear(bool everything)
    {
        ushort[] d = _state.Dispi;
        int width = Canvas.Width;
        int bits = d[VgaState.DispiBpp];
        int virtualWidth = Math.Max(d[VgaState.DispiVirtWidth], d[VgaState.DispiXRes]);
        long lineBytes = bits == 4 ? virtualWidth / 2 : (long)virtualWidth * ((bits + 7) / 8);
        long shownBytes = bits == 4 ? ((width / 8) + 1) * 4 : (long)width * ((bits + 7) / 8);
        long start = d[VgaState.DispiYOffset] * lineBytes;
        start += bits == 4 ? d[VgaState.DispiXOffset] / 8 * 4 : (long)d[VgaState.DispiXOffset] * ((bits + 7) / 8);
        for (int y = 0; y < Canvas.Height; y++)
        {
            long at = start + (y * lineBytes);
            if (at + shownBytes > (long)_vram.LengthBytes)
            {
                // The rest of a screen that runs out of memory is black.
                if (everything)
                {
                    Array.Clear(_row, 0, width);
                    Canvas.SetRow(y, _row);
                }

                continue;
            }

            if (!everything && !IsDirty(at, shownBytes))
            {
                continue;
            }

            DrawLinearRow(at, (int)shownBytes, width, bits);
            Canvas.SetRow(y, _row);
        }
    }

    private void DrawLinearRow(long at, int bytes, int width, int bits)
    {
        Span<byte> line = _line.AsSpan(0, bytes);
        _vram.TryRead((ulong)at, line);
        switch (bits)
        {
            case 4:
                int x = 0;
                for (int i = 0; x < width; i += 4)
                {
                    x = PutPlanar(MemoryMarshal.Read<uint>(line[i..]), x, 1);
                }

                break;
            case 8:
                for (int i = 0; i < width; i++)
                {
                    _row[i] = _colors[line[i]];
                }

                break;
            case 15:
                for (int i = 0; i < width; i++)
                {
                    uint value = (uint)(line[i * 2] | (line[(i * 2) + 1] << 8));
                    _row[i] = (Widen5((value >> 10) & 31) << 16) | (Widen5((value >> 5) & 31) << 8) | Widen5(value & 31);
                }

                break;
            case 16:
                for (int i = 0; i < width; i++)
                {
                    uint value = (uint)(line[i * 2] | (line[(i * 2) + 1] << 8));
                    uint green = (value >> 5) & 63;
                    _row[i] = (Widen5(value >> 11) << 16) | (((green << 2) | (green >> 4)) << 8) | Widen5(value & 31);
                }

                break;
            case 24:
                for (int i = 0; i < width; i++)
                {
                    _row[i] = line[i * 3] | ((uint)line[(i * 3) + 1] << 8) | ((uint)line[(i * 3) + 2] << 16);
                }

                break;
            default:
                line.CopyTo(MemoryMarshal.AsBytes(_row.AsSpan(0, width)));
                for (int i = 0; i < width; i++)
                {
                    _row[i] &= 0xFF_FFFF;
                }

                break;
        }
    }

    private static uint Widen5(uint value) => (value << 3) | (value >> 2);

    private bool IsDirty(long at, long bytes)
    {
        for (long page = at / PageBytes; page <= (at + bytes - 1) / PageBytes; page++)
        {
            if (_dirty[page])
            {
                return true;
            }
        }

        return false;
    }
}

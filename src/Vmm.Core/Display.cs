// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;

namespace Vmm.Core;

// Theory. A screen as the host sees it. A display card implements IDisplaySurface; VNC, screenshots and web pages pull
// from it. Nothing is pushed: a consumer calls Refresh when it wants to show something (a VNC server 30 times a
// second while a client waits, a screenshot once), and the card renders then what the guest changed since. A card that
// nobody looks at costs nothing.
//
// Each consumer has a DisplayFrame of its own: a copy of the picture and a serial that says how new it is. Refresh
// brings it up to date and lists the rectangles that differ from the call before. Several consumers may therefore look
// at one card at different rates. A frame belongs to one thread at a time; a surface may be refreshed from any thread.
//
// Input goes the other way through IKeyboardSink and IPointerSink. Keys are positions, named by their USB HID usage
// (HUT 1.4 §10), not characters: the guest applies its own layout.

/// <summary>A rectangle of pixels.</summary>
/// <param name="X">Left column.</param>
/// <param name="Y">Top row.</param>
/// <param name="Width">Columns.</param>
/// <param name="Height">Rows.</param>
public readonly record struct DisplayRectangle(int X, int Y, int Width, int Height);

/// <summary>One consumer's copy of a screen.</summary>
public sealed class DisplayFrame
{
    /// <summary>Columns; 0 before the first refresh.</summary>
    public int Width { get; private set; }

    /// <summary>Rows.</summary>
    public int Height { get; private set; }

    /// <summary>
    /// Pixels, row by row, <see cref="Width"/> per row: 0x00RRGGBB in host order, which is B, G, R, 0 in memory on
    /// little-endian hosts.
    /// </summary>
    public uint[] Pixels { get; private set; } = [];

    /// <summary>What the last refresh changed; after a change of size one rectangle that covers everything.</summary>
    public List<DisplayRectangle> Changes { get; } = [];

    /// <summary>True when the last refresh changed <see cref="Width"/> or <see cref="Height"/>.</summary>
    public bool SizeChanged { get; private set; }

    /// <summary>For surfaces: how new the copy is; 0 means that it holds nothing.</summary>
    public long Serial { get; set; }

    /// <summary>For surfaces: begins a refresh. Keeps the pixels when the size stays.</summary>
    public void Begin(int width, int height)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(width);
        ArgumentOutOfRangeException.ThrowIfNegative(height);
        Changes.Clear();
        SizeChanged = width != Width || height != Height;
        if (SizeChanged)
        {
            Width = width;
            Height = height;
            Pixels = new uint[checked(width * height)];
            Serial = 0;
        }
    }
}

/// <summary>A screen in a text mode.</summary>
public sealed class TextScreen
{
    /// <summary>Characters per row.</summary>
    public required int Columns { get; init; }

    /// <summary>Rows.</summary>
    public required int Rows { get; init; }

    /// <summary>Code page 437 bytes as the card holds them, row by row.</summary>
    public required byte[] Characters { get; init; }

    /// <summary>VGA attributes, row by row: background in bits 7:4, foreground in bits 3:0.</summary>
    public required byte[] Attributes { get; init; }

    /// <summary>Cursor column, or -1 while it is off or outside.</summary>
    public required int CursorColumn { get; init; }

    /// <summary>Cursor row, or -1.</summary>
    public required int CursorRow { get; init; }

    /// <summary>The text as Unicode lines without trailing blanks.</summary>
    public string[] ToLines()
    {
        var lines = new string[Rows];
        var line = new char[Columns];
        for (int row = 0; row < Rows; row++)
        {
            for (int column = 0; column < Columns; column++)
            {
                line[column] = CodePage437.ToChar(Characters[(row * Columns) + column]);
            }

            lines[row] = new string(line).TrimEnd(' ', '\u00A0');
        }

        return lines;
    }
}

/// <summary>The character set of the PC's font ROM.</summary>
public static class CodePage437
{
    private const string Low = " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼";

    private const string High =
        "⌂ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■ ";

    /// <summary>The Unicode character that a font cell shows.</summary>
    public static char ToChar(byte code) => code < 0x20 ? Low[code] : code < 0x7F ? (char)code : High[code - 0x7F];
}

/// <summary>A pointer that the card draws over the picture (virtio-gpu); VGA has none.</summary>
public sealed class DisplayCursor
{
    /// <summary>Columns.</summary>
    public required int Width { get; init; }

    /// <summary>Rows.</summary>
    public required int Height { get; init; }

    /// <summary>Column of the hot spot.</summary>
    public required int HotX { get; init; }

    /// <summary>Row of the hot spot.</summary>
    public required int HotY { get; init; }

    /// <summary>0xAARRGGBB, row by row, not premultiplied.</summary>
    public required uint[] Pixels { get; init; }
}

/// <summary>A display card as its viewers see it. Any thread.</summary>
public interface IDisplaySurface
{
    /// <summary>Brings a frame up to date. A blank screen is black in the present size; never 0 by 0.</summary>
    void Refresh(DisplayFrame frame);

    /// <summary>The screen as text, or null in graphics modes.</summary>
    TextScreen? ReadText();

    /// <summary>The hardware pointer's shape, or null when there is none or it is hidden; a new object per change.</summary>
    DisplayCursor? Cursor { get; }

    /// <summary>
    /// A viewer would like another size (RFB SetDesktopSize). A card may tell its guest or ignore it.
    /// </summary>
    /// <returns>True when the guest was told.</returns>
    bool RequestSize(int width, int height);
}

/// <summary>Keyboard lights.</summary>
[Flags]
public enum KeyboardLeds : byte
{
    /// <summary>All off.</summary>
    None = 0,

    /// <summary>Num Lock.</summary>
    Num = 1 << 0,

    /// <summary>Caps Lock.</summary>
    Caps = 1 << 1,

    /// <summary>Scroll Lock.</summary>
    Scroll = 1 << 2,
}

/// <summary>A keyboard of the guest. Any thread; never blocks.</summary>
public interface IKeyboardSink
{
    /// <summary>The guest has set it up; with several keyboards the active one with the highest rank gets the keys.</summary>
    bool IsActive { get; }

    /// <summary>The guest's lights.</summary>
    KeyboardLeds Leds { get; }

    /// <summary>A key goes down or up. Keys that a keyboard does not have are ignored; a full queue drops and counts.</summary>
    void Send(HidKey key, bool pressed);
}

/// <summary>Mouse buttons.</summary>
[Flags]
public enum PointerButtons : byte
{
    /// <summary>None held.</summary>
    None = 0,

    /// <summary>Left.</summary>
    Left = 1 << 0,

    /// <summary>Right.</summary>
    Right = 1 << 1,

    /// <summary>Middle.</summary>
    Middle = 1 << 2,

    /// <summary>Back.</summary>
    Back = 1 << 3,

    /// <summary>Forward.</summary>
    Forward = 1 << 4,
}

/// <summary>A movement, a change of buttons, or both.</summary>
/// <param name="X">Absolute devices: 0 (left) to 32767 (right); relative ones: pixels to the right.</param>
/// <param name="Y">Absolute: 0 (top) to 32767 (bottom); relative: pixels down.</param>
/// <param name="Wheel">Detents away from the user (up) since the last event.</param>
/// <param name="Buttons">Buttons that are held now.</param>
public readonly record struct PointerEvent(int X, int Y, int Wheel, PointerButtons Buttons);

/// <summary>A mouse or tablet of the guest. Any thread; never blocks.</summary>
public interface IPointerSink
{
    /// <summary>The guest has set it up. Viewers use an active absolute device, else an active relative one.</summary>
    bool IsActive { get; }

    /// <summary>What <see cref="PointerEvent.X"/> and <see cref="PointerEvent.Y"/> mean.</summary>
    bool IsAbsolute { get; }

    /// <summary>Takes an event; movement that the guest has not fetched yet is merged.</summary>
    void Send(in PointerEvent pointer);
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Vmm.Core;

namespace Vmm.Backends.Screen;

/// <summary>
/// Turns X keysyms, which name characters, into keys, which are places on a keyboard, for a guest whose keyboard has the
/// given layout. Needed for clients without the extended key event, which send characters only.
/// </summary>
public sealed class KeyLayout
{
    // The 48 keys that differ between layouts, in this order; a blank in a row is no character.
    private static readonly HidKey[] s_places =
    [
        HidKey.Grave, HidKey.Digit1, HidKey.Digit2, HidKey.Digit3, HidKey.Digit4, HidKey.Digit5, HidKey.Digit6,
        HidKey.Digit7, HidKey.Digit8, HidKey.Digit9, HidKey.Digit0, HidKey.Minus, HidKey.Equal,
        Letter('q'), Letter('w'), Letter('e'), Letter('r'), Letter('t'), Letter('y'), Letter('u'), Letter('i'),
        Letter('o'), Letter('p'), HidKey.LeftBracket, HidKey.RightBracket,
        Letter('a'), Letter('s'), Letter('d'), Letter('f'), Letter('g'), Letter('h'), Letter('j'), Letter('k'),
        Letter('l'), HidKey.Semicolon, HidKey.Apostrophe, HidKey.Backslash,
        HidKey.NonUsBackslash, Letter('z'), Letter('x'), Letter('c'), Letter('v'), Letter('b'), Letter('n'),
        Letter('m'), HidKey.Comma, HidKey.Period, HidKey.Slash,
    ];

    private static readonly Dictionary<uint, HidKey> s_named = MakeNamed();

    private readonly Dictionary<uint, (HidKey Key, int Level)> _characters = [];

    private KeyLayout(string name, string plain, string shifted, string third)
    {
        Name = name;
        Add(plain, 0);
        Add(shifted, 1);
        Add(third, 2);
    }

    /// <summary>"us", "gb", "de", "fr".</summary>
    public string Name { get; }

    /// <summary>All layouts.</summary>
    public static IReadOnlyList<KeyLayout> All { get; } =
    [
        new("us",
            "`1234567890-=qwertyuiop[]asdfghjkl;'\\ zxcvbnm,./",
            "~!@#$%^&*()_+QWERTYUIOP{}ASDFGHJKL:\"| ZXCVBNM<>?",
            ""),
        new("gb",
            "`1234567890-=qwertyuiop[]asdfghjkl;'#\\zxcvbnm,./",
            "¬!\"£$%^&*()_+QWERTYUIOP{}ASDFGHJKL:@~|ZXCVBNM<>?",
            "¦   €        "),
        new("de",
            "^1234567890ß´qwertzuiopü+asdfghjklöä#<yxcvbnm,.-",
            "°!\"§$%&/()=?`QWERTZUIOPÜ*ASDFGHJKLÖÄ'>YXCVBNM;:_",
            "  ²³   {[]}\\ @ €        ~            |      µ   "),
        new("fr",
            "²&é\"'(-è_çà)=azertyuiop^$qsdfghjklmù*<wxcvbn,;:!",
            " 1234567890°+AZERTYUIOP¨£QSDFGHJKLM%µ>WXCVBN?./§",
            "  ~#{[|`\\^@]}  €        ¤"),
    ];

    /// <summary>A layout by name, or null.</summary>
    public static KeyLayout? Find(string name)
    {
        foreach (KeyLayout layout in All)
        {
            if (string.Equals(layout.Name, name, StringComparison.OrdinalIgnoreCase))
            {
                return layout;
            }
        }

        return null;
    }

    /// <summary>Finds the key that types a keysym.</summary>
    /// <param name="keysym">X11 keysym.</param>
    /// <param name="key">The key.</param>
    /// <param name="level">0 alone, 1 with Shift, 2 with AltGr; -1 when modifiers do not matter.</param>
    /// <returns>False when the layout does not have it.</returns>
    public bool TryFind(uint keysym, out HidKey key, out int level)
    {
        level = -1;
        if (s_named.TryGetValue(keysym, out key))
        {
            return true;
        }

        if (_characters.TryGetValue(CharacterOf(keysym), out (HidKey Key, int Level) place))
        {
            key = place.Key;
            level = place.Level;
            return true;
        }

        key = HidKey.None;
        return false;
    }

    // Latin-1 keysyms are characters; others are characters with a bit set, or have numbers of their own (X11 protocol,
    // appendix A).
    private static uint CharacterOf(uint keysym) => keysym switch
    {
        0x20AC => '€',
        0xFE50 => '`',
        0xFE51 => '´',
        0xFE52 => '^',
        0xFE53 => '~',
        0xFE57 => '¨',
        >= 0x0100_0000 and <= 0x0110_FFFF => keysym - 0x0100_0000,
        _ => keysym,
    };

    private static HidKey Letter(char letter) => (HidKey)(4 + (letter - 'a'));

    private static Dictionary<uint, HidKey> MakeNamed()
    {
        var named = new Dictionary<uint, HidKey>
        {
            [0x20] = HidKey.Space,
            [0xFF08] = HidKey.Backspace,
            [0xFF09] = HidKey.Tab,
            [0xFE20] = HidKey.Tab,
            [0xFF0D] = HidKey.Enter,
            [0xFF13] = HidKey.Pause,
            [0xFF6B] = HidKey.Pause,
            [0xFF14] = HidKey.ScrollLock,
            [0xFF15] = HidKey.PrintScreen,
            [0xFF61] = HidKey.PrintScreen,
            [0xFF1B] = HidKey.Escape,
            [0xFF50] = HidKey.Home,
            [0xFF51] = HidKey.Left,
            [0xFF52] = HidKey.Up,
            [0xFF53] = HidKey.Right,
            [0xFF54] = HidKey.Down,
            [0xFF55] = HidKey.PageUp,
            [0xFF56] = HidKey.PageDown,
            [0xFF57] = HidKey.End,
            [0xFF63] = HidKey.Insert,
            [0xFF67] = HidKey.Application,
            [0xFF7F] = HidKey.NumLock,
            [0xFFFF] = HidKey.Delete,
            [0xFFE1] = HidKey.LeftShift,
            [0xFFE2] = HidKey.RightShift,
            [0xFFE3] = HidKey.LeftControl,
            [0xFFE4] = HidKey.RightControl,
            [0xFFE5] = HidKey.CapsLock,
            [0xFFE7] = HidKey.LeftAlt,
            [0xFFE8] = HidKey.RightAlt,
            [0xFFE9] = HidKey.LeftAlt,
            [0xFFEA] = HidKey.RightAlt,
            [0xFE03] = HidKey.RightAlt,
            [0xFF7E] = HidKey.RightAlt,
            [0xFFEB] = HidKey.LeftGui,
            [0xFFEC] = HidKey.RightGui,
            [0xFF8D] = HidKey.KeypadEnter,
            [0xFF95] = HidKey.Keypad7,
            [0xFF96] = HidKey.Keypad4,
            [0xFF97] = HidKey.Keypad8,
            [0xFF98] = HidKey.Keypad6,
            [0xFF99] = HidKey.Keypad2,
            [0xFF9A] = HidKey.Keypad9,
            [0xFF9B] = HidKey.Keypad3,
            [0xFF9C] = HidKey.Keypad1,
            [0xFF9D] = HidKey.Keypad5,
            [0xFF9E] = HidKey.Keypad0,
            [0xFF9F] = HidKey.KeypadPeriod,
            [0xFFAA] = HidKey.KeypadAsterisk,
            [0xFFAB] = HidKey.KeypadPlus,
            [0xFFAC] = HidKey.KeypadComma,
            [0xFFAD] = HidKey.KeypadMinus,
            [0xFFAE] = HidKey.KeypadPeriod,
            [0xFFAF] = HidKey.KeypadSlash,
            [0xFFB0] = HidKey.Keypad0,
            [0xFFBD] = HidKey.KeypadEqual,
        };
        for (uint i = 0; i < 9; i++)
        {
            named[0xFFB1 + i] = (HidKey)((uint)HidKey.Keypad1 + i);
        }

        for (uint i = 0; i < 12; i++)
        {
            named[0xFFBE + i] = (HidKey)((uint)HidKey.F1 + i);
            named[0xFFCA + i] = (HidKey)((uint)HidKey.F13 + i);
        }

        return named;
    }

    private void Add(string row, int level)
    {
        for (int i = 0; i < row.Length; i++)
        {
            if (row[i] != ' ')
            {
                _ = _characters.TryAdd(row[i], (s_places[i], level));
            }
        }
    }
}

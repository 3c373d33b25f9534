// SPDX-License-Identifier: BSD-2-Clause
using System;
using Vmm.Core;

namespace Vmm.Devices.Input;

/// <summary>What a key of scan code set 3 sends, each on its own ("Set Key Type" of the reference below).</summary>
internal enum KeyType : byte
{
    /// <summary>Its code again and again while it is down; nothing when it comes up.</summary>
    Typematic = 0,

    /// <summary>Its code when it goes down, and a break code when it comes up.</summary>
    MakeBreak = 1,

    /// <summary>Its code once when it goes down.</summary>
    Make = 2,

    /// <summary>Its code again and again while it is down, and a break code when it comes up.</summary>
    TypematicMakeBreak = 3,
}

/// <summary>
/// Scan code set 3 (IBM PS/2 Hardware Interface Technical Reference, "Keyboards (101- and 102-key)", scan code tables
/// set 3): one byte for each key and no prefix but 0xF0 for a break. What a key sends is a property of the key, which a
/// system may change; without that most keys have no break code.
/// </summary>
internal static class ScanCodeSet3
{
    /// <summary>Codes lie below this.</summary>
    public const int Codes = 0x90;

    // By usage of the HID keyboard page, 0x04 (A) to 0x67 (keypad =); 0 is no key of this set.
    private static ReadOnlySpan<byte> Plain =>
    [
        0x1C, 0x32, 0x21, 0x23, 0x24, 0x2B, 0x34, 0x33, 0x43, 0x3B, 0x42, 0x4B, 0x3A, 0x31, 0x44, 0x4D,
        0x15, 0x2D, 0x1B, 0x2C, 0x3C, 0x2A, 0x1D, 0x22, 0x35, 0x1A, 0x16, 0x1E, 0x26, 0x25, 0x2E, 0x36,
        0x3D, 0x3E, 0x46, 0x45, 0x5A, 0x08, 0x66, 0x0D, 0x29, 0x4E, 0x55, 0x54, 0x5B, 0x5C, 0x53, 0x4C,
        0x52, 0x0E, 0x41, 0x49, 0x4A, 0x14, 0x07, 0x0F, 0x17, 0x1F, 0x27, 0x2F, 0x37, 0x3F, 0x47, 0x4F,
        0x56, 0x5E, 0x57, 0x5F, 0x62, 0x67, 0x6E, 0x6F, 0x64, 0x65, 0x6D, 0x6A, 0x61, 0x60, 0x63, 0x76,
        0x77, 0x7E, 0x84, 0x7C, 0x79, 0x69, 0x72, 0x7A, 0x6B, 0x73, 0x74, 0x6C, 0x75, 0x7D, 0x70, 0x71,
        0x13, 0x8D,
    ];

    // 0xE0 (left Control) to 0xE7 (right GUI).
    private static ReadOnlySpan<byte> Modifiers => [0x11, 0x12, 0x19, 0x8B, 0x58, 0x59, 0x39, 0x8C];

    // Keys that start as make and break: Caps Lock, both Shifts, left Control and Alt, and the two that came later.
    private static ReadOnlySpan<byte> BreakKeys => [0x11, 0x12, 0x14, 0x19, 0x59, 0x8B, 0x8C];

    // Keys that start as make only: Escape and the function keys, right Control and Alt, the blocks above the cursor
    // keys and the keypad without its plus.
    private static ReadOnlySpan<byte> MakeKeys =>
    [
        0x08, 0x07, 0x0F, 0x17, 0x1F, 0x27, 0x2F, 0x37, 0x3F, 0x47, 0x4F, 0x56, 0x5E, 0x57, 0x5F, 0x62, 0x67, 0x6E, 0x6F,
        0x65, 0x6D, 0x39, 0x58, 0x76, 0x77, 0x7E, 0x84, 0x79, 0x69, 0x72, 0x7A, 0x6B, 0x73, 0x74, 0x6C, 0x75, 0x7D,
        0x70, 0x71, 0x8D,
    ];

    /// <summary>The code of a key, or 0 when the set does not have it.</summary>
    public static byte CodeOf(HidKey key)
    {
        int usage = (byte)key;
        if (usage >= 0xE0)
        {
            return usage - 0xE0 < Modifiers.Length ? Modifiers[usage - 0xE0] : (byte)0;
        }

        int at = usage - 0x04;
        return at >= 0 && at < Plain.Length ? Plain[at] : (byte)0;
    }

    /// <summary>True for a byte that names a key.</summary>
    public static bool IsKey(byte code) => code != 0 && (Plain.Contains(code) || Modifiers.Contains(code));

    /// <summary>Gives every code the type that it has after a reset.</summary>
    /// <param name="types">By code, of <see cref="Codes"/> bytes.</param>
    public static void SetDefaults(Span<byte> types)
    {
        types.Clear();
        foreach (byte code in BreakKeys)
        {
            types[code] = (byte)KeyType.MakeBreak;
        }

        foreach (byte code in MakeKeys)
        {
            types[code] = (byte)KeyType.Make;
        }
    }
}

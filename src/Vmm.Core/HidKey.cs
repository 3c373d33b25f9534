// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.Core;

/// <summary>Keys by position: usages of the USB HID keyboard page (HUT 1.4 §10).</summary>
public enum HidKey : byte
{
    /// <summary>No key.</summary>
    None = 0,

    /// <summary>Usage 0x04.</summary>
    A = 0x04,

    /// <summary>Usage 0x05.</summary>
    B = 0x05,

    /// <summary>Usage 0x06.</summary>
    C = 0x06,

    /// <summary>Usage 0x07.</summary>
    D = 0x07,

    /// <summary>Usage 0x08.</summary>
    E = 0x08,

    /// <summary>Usage 0x09.</summary>
    F = 0x09,

    /// <summary>Usage 0x0A.</summary>
    G = 0x0A,

    /// <summary>Usage 0x0B.</summary>
    H = 0x0B,

    /// <summary>Usage 0x0C.</summary>
    I = 0x0C,

    /// <summary>Usage 0x0D.</summary>
    J = 0x0D,

    /// <summary>Usage 0x0E.</summary>
    K = 0x0E,

    /// <summary>Usage 0x0F.</summary>
    L = 0x0F,

    /// <summary>Usage 0x10.</summary>
    M = 0x10,

    /// <summary>Usage 0x11.</summary>
    N = 0x11,

    /// <summary>Usage 0x12.</summary>
    O = 0x12,

    /// <summary>Usage 0x13.</summary>
    P = 0x13,

    /// <summary>Usage 0x14.</summary>
    Q = 0x14,

    /// <summary>Usage 0x15.</summary>
    R = 0x15,

    /// <summary>Usage 0x16.</summary>
    S = 0x16,

    /// <summary>Usage 0x17.</summary>
    T = 0x17,

    /// <summary>Usage 0x18.</summary>
    U = 0x18,

    /// <summary>Usage 0x19.</summary>
    V = 0x19,

    /// <summary>Usage 0x1A.</summary>
    W = 0x1A,

    /// <summary>Usage 0x1B.</summary>
    X = 0x1B,

    /// <summary>Usage 0x1C.</summary>
    Y = 0x1C,

    /// <summary>Usage 0x1D.</summary>
    Z = 0x1D,

    /// <summary>Usage 0x1E.</summary>
    Digit1 = 0x1E,

    /// <summary>Usage 0x1F.</summary>
    Digit2 = 0x1F,

    /// <summary>Usage 0x20.</summary>
    Digit3 = 0x20,

    /// <summary>Usage 0x21.</summary>
    Digit4 = 0x21,

    /// <summary>Usage 0x22.</summary>
    Digit5 = 0x22,

    /// <summary>Usage 0x23.</summary>
    Digit6 = 0x23,

    /// <summary>Usage 0x24.</summary>
    Digit7 = 0x24,

    /// <summary>Usage 0x25.</summary>
    Digit8 = 0x25,

    /// <summary>Usage 0x26.</summary>
    Digit9 = 0x26,

    /// <summary>Usage 0x27.</summary>
    Digit0 = 0x27,

    /// <summary>Usage 0x28.</summary>
    Enter = 0x28,

    /// <summary>Usage 0x29.</summary>
    Escape = 0x29,

    /// <summary>Usage 0x2A.</summary>
    Backspace = 0x2A,

    /// <summary>Usage 0x2B.</summary>
    Tab = 0x2B,

    /// <summary>Usage 0x2C.</summary>
    Space = 0x2C,

    /// <summary>Usage 0x2D.</summary>
    Minus = 0x2D,

    /// <summary>Usage 0x2E.</summary>
    Equal = 0x2E,

    /// <summary>Usage 0x2F.</summary>
    LeftBracket = 0x2F,

    /// <summary>Usage 0x30.</summary>
    RightBracket = 0x30,

    /// <summary>Usage 0x31.</summary>
    Backslash = 0x31,

    /// <summary>Usage 0x32.</summary>
    NonUsHash = 0x32,

    /// <summary>Usage 0x33.</summary>
    Semicolon = 0x33,

    /// <summary>Usage 0x34.</summary>
    Apostrophe = 0x34,

    /// <summary>Usage 0x35.</summary>
    Grave = 0x35,

    /// <summary>Usage 0x36.</summary>
    Comma = 0x36,

    /// <summary>Usage 0x37.</summary>
    Period = 0x37,

    /// <summary>Usage 0x38.</summary>
    Slash = 0x38,

    /// <summary>Usage 0x39.</summary>
    CapsLock = 0x39,

    /// <summary>Usage 0x3A.</summary>
    F1 = 0x3A,

    /// <summary>Usage 0x3B.</summary>
    F2 = 0x3B,

    /// <summary>Usage 0x3C.</summary>
    F3 = 0x3C,

    /// <summary>Usage 0x3D.</summary>
    F4 = 0x3D,

    /// <summary>Usage 0x3E.</summary>
    F5 = 0x3E,

    /// <summary>Usage 0x3F.</summary>
    F6 = 0x3F,

    /// <summary>Usage 0x40.</summary>
    F7 = 0x40,

    /// <summary>Usage 0x41.</summary>
    F8 = 0x41,

    /// <summary>Usage 0x42.</summary>
    F9 = 0x42,

    /// <summary>Usage 0x43.</summary>
    F10 = 0x43,

    /// <summary>Usage 0x44.</summary>
    F11 = 0x44,

    /// <summary>Usage 0x45.</summary>
    F12 = 0x45,

    /// <summary>Usage 0x46.</summary>
    PrintScreen = 0x46,

    /// <summary>Usage 0x47.</summary>
    ScrollLock = 0x47,

    /// <summary>Usage 0x48.</summary>
    Pause = 0x48,

    /// <summary>Usage 0x49.</summary>
    Insert = 0x49,

    /// <summary>Usage 0x4A.</summary>
    Home = 0x4A,

    /// <summary>Usage 0x4B.</summary>
    PageUp = 0x4B,

    /// <summary>Usage 0x4C.</summary>
    Delete = 0x4C,

    /// <summary>Usage 0x4D.</summary>
    End = 0x4D,

    /// <summary>Usage 0x4E.</summary>
    PageDown = 0x4E,

    /// <summary>Usage 0x4F.</summary>
    Right = 0x4F,

    /// <summary>Usage 0x50.</summary>
    Left = 0x50,

    /// <summary>Usage 0x51.</summary>
    Down = 0x51,

    /// <summary>Usage 0x52.</summary>
    Up = 0x52,

    /// <summary>Usage 0x53.</summary>
    NumLock = 0x53,

    /// <summary>Usage 0x54.</summary>
    KeypadSlash = 0x54,

    /// <summary>Usage 0x55.</summary>
    KeypadAsterisk = 0x55,

    /// <summary>Usage 0x56.</summary>
    KeypadMinus = 0x56,

    /// <summary>Usage 0x57.</summary>
    KeypadPlus = 0x57,

    /// <summary>Usage 0x58.</summary>
    KeypadEnter = 0x58,

    /// <summary>Usage 0x59.</summary>
    Keypad1 = 0x59,

    /// <summary>Usage 0x5A.</summary>
    Keypad2 = 0x5A,

    /// <summary>Usage 0x5B.</summary>
    Keypad3 = 0x5B,

    /// <summary>Usage 0x5C.</summary>
    Keypad4 = 0x5C,

    /// <summary>Usage 0x5D.</summary>
    Keypad5 = 0x5D,

    /// <summary>Usage 0x5E.</summary>
    Keypad6 = 0x5E,

    /// <summary>Usage 0x5F.</summary>
    Keypad7 = 0x5F,

    /// <summary>Usage 0x60.</summary>
    Keypad8 = 0x60,

    /// <summary>Usage 0x61.</summary>
    Keypad9 = 0x61,

    /// <summary>Usage 0x62.</summary>
    Keypad0 = 0x62,

    /// <summary>Usage 0x63.</summary>
    KeypadPeriod = 0x63,

    /// <summary>Usage 0x64.</summary>
    NonUsBackslash = 0x64,

    /// <summary>Usage 0x65.</summary>
    Application = 0x65,

    /// <summary>Usage 0x66.</summary>
    Power = 0x66,

    /// <summary>Usage 0x67.</summary>
    KeypadEqual = 0x67,

    /// <summary>Usage 0x68.</summary>
    F13 = 0x68,

    /// <summary>Usage 0x69.</summary>
    F14 = 0x69,

    /// <summary>Usage 0x6A.</summary>
    F15 = 0x6A,

    /// <summary>Usage 0x6B.</summary>
    F16 = 0x6B,

    /// <summary>Usage 0x6C.</summary>
    F17 = 0x6C,

    /// <summary>Usage 0x6D.</summary>
    F18 = 0x6D,

    /// <summary>Usage 0x6E.</summary>
    F19 = 0x6E,

    /// <summary>Usage 0x6F.</summary>
    F20 = 0x6F,

    /// <summary>Usage 0x70.</summary>
    F21 = 0x70,

    /// <summary>Usage 0x71.</summary>
    F22 = 0x71,

    /// <summary>Usage 0x72.</summary>
    F23 = 0x72,

    /// <summary>Usage 0x73.</summary>
    F24 = 0x73,

    /// <summary>Usage 0x85.</summary>
    KeypadComma = 0x85,

    /// <summary>Usage 0x87.</summary>
    International1 = 0x87,

    /// <summary>Usage 0x88.</summary>
    International2 = 0x88,

    /// <summary>Usage 0x89.</summary>
    International3 = 0x89,

    /// <summary>Usage 0x8A.</summary>
    International4 = 0x8A,

    /// <summary>Usage 0x8B.</summary>
    International5 = 0x8B,

    /// <summary>Usage 0x90.</summary>
    Language1 = 0x90,

    /// <summary>Usage 0x91.</summary>
    Language2 = 0x91,

    /// <summary>Usage 0x92.</summary>
    Language3 = 0x92,

    /// <summary>Usage 0x93.</summary>
    Language4 = 0x93,

    /// <summary>Usage 0xE0.</summary>
    LeftControl = 0xE0,

    /// <summary>Usage 0xE1.</summary>
    LeftShift = 0xE1,

    /// <summary>Usage 0xE2.</summary>
    LeftAlt = 0xE2,

    /// <summary>Usage 0xE3.</summary>
    LeftGui = 0xE3,

    /// <summary>Usage 0xE4.</summary>
    RightControl = 0xE4,

    /// <summary>Usage 0xE5.</summary>
    RightShift = 0xE5,

    /// <summary>Usage 0xE6.</summary>
    RightAlt = 0xE6,

    /// <summary>Usage 0xE7.</summary>
    RightGui = 0xE7,
}

/// <summary>
/// HID usages and IBM scan code set 1 (the codes that RFB's extended key events and PC keyboards use): one table,
/// USB HID to PS/2 Scan Code Translation Table, Microsoft 1.3a. A code is one byte, or 0xE0 and a byte as 0xE0xx;
/// Pause is 0xE11D.
/// </summary>
public static class HidKeys
{
    /// <summary>The make code in set 1, or 0 for a key that a PC keyboard does not have.</summary>
    public static int ToSet1(HidKey key) => key switch
    {
        HidKey.A => 0x1E,
        HidKey.B => 0x30,
        HidKey.C => 0x2E,
        HidKey.D => 0x20,
        HidKey.E => 0x12,
        HidKey.F => 0x21,
        HidKey.G => 0x22,
        HidKey.H => 0x23,
        HidKey.I => 0x17,
        HidKey.J => 0x24,
        HidKey.K => 0x25,
        HidKey.L => 0x26,
        HidKey.M => 0x32,
        HidKey.N => 0x31,
        HidKey.O => 0x18,
        HidKey.P => 0x19,
        HidKey.Q => 0x10,
        HidKey.R => 0x13,
        HidKey.S => 0x1F,
        HidKey.T => 0x14,
        HidKey.U => 0x16,
        HidKey.V => 0x2F,
        HidKey.W => 0x11,
        HidKey.X => 0x2D,
        HidKey.Y => 0x15,
        HidKey.Z => 0x2C,
        HidKey.Digit1 => 0x02,
        HidKey.Digit2 => 0x03,
        HidKey.Digit3 => 0x04,
        HidKey.Digit4 => 0x05,
        HidKey.Digit5 => 0x06,
        HidKey.Digit6 => 0x07,
        HidKey.Digit7 => 0x08,
        HidKey.Digit8 => 0x09,
        HidKey.Digit9 => 0x0A,
        HidKey.Digit0 => 0x0B,
        HidKey.Enter => 0x1C,
        HidKey.Escape => 0x01,
        HidKey.Backspace => 0x0E,
        HidKey.Tab => 0x0F,
        HidKey.Space => 0x39,
        HidKey.Minus => 0x0C,
        HidKey.Equal => 0x0D,
        HidKey.LeftBracket => 0x1A,
        HidKey.RightBracket => 0x1B,
        HidKey.Backslash => 0x2B,
        HidKey.NonUsHash => 0x2B,
        HidKey.Semicolon => 0x27,
        HidKey.Apostrophe => 0x28,
        HidKey.Grave => 0x29,
        HidKey.Comma => 0x33,
        HidKey.Period => 0x34,
        HidKey.Slash => 0x35,
        HidKey.CapsLock => 0x3A,
        HidKey.F1 => 0x3B,
        HidKey.F2 => 0x3C,
        HidKey.F3 => 0x3D,
        HidKey.F4 => 0x3E,
        HidKey.F5 => 0x3F,
        HidKey.F6 => 0x40,
        HidKey.F7 => 0x41,
        HidKey.F8 => 0x42,
        HidKey.F9 => 0x43,
        HidKey.F10 => 0x44,
        HidKey.F11 => 0x57,
        HidKey.F12 => 0x58,
        HidKey.PrintScreen => 0xE037,
        HidKey.ScrollLock => 0x46,
        HidKey.Pause => 0xE11D,
        HidKey.Insert => 0xE052,
        HidKey.Home => 0xE047,
        HidKey.PageUp => 0xE049,
        HidKey.Delete => 0xE053,
        HidKey.End => 0xE04F,
        HidKey.PageDown => 0xE051,
        HidKey.Right => 0xE04D,
        HidKey.Left => 0xE04B,
        HidKey.Down => 0xE050,
        HidKey.Up => 0xE048,
        HidKey.NumLock => 0x45,
        HidKey.KeypadSlash => 0xE035,
        HidKey.KeypadAsterisk => 0x37,
        HidKey.KeypadMinus => 0x4A,
        HidKey.KeypadPlus => 0x4E,
        HidKey.KeypadEnter => 0xE01C,
        HidKey.Keypad1 => 0x4F,
        HidKey.Keypad2 => 0x50,
        HidKey.Keypad3 => 0x51,
        HidKey.Keypad4 => 0x4B,
        HidKey.Keypad5 => 0x4C,
        HidKey.Keypad6 => 0x4D,
        HidKey.Keypad7 => 0x47,
        HidKey.Keypad8 => 0x48,
        HidKey.Keypad9 => 0x49,
        HidKey.Keypad0 => 0x52,
        HidKey.KeypadPeriod => 0x53,
        HidKey.NonUsBackslash => 0x56,
        HidKey.Application => 0xE05D,
        HidKey.Power => 0xE05E,
        HidKey.KeypadEqual => 0x59,
        HidKey.F13 => 0x64,
        HidKey.F14 => 0x65,
        HidKey.F15 => 0x66,
        HidKey.F16 => 0x67,
        HidKey.F17 => 0x68,
        HidKey.F18 => 0x69,
        HidKey.F19 => 0x6A,
        HidKey.F20 => 0x6B,
        HidKey.F21 => 0x6C,
        HidKey.F22 => 0x6D,
        HidKey.F23 => 0x6E,
        HidKey.F24 => 0x76,
        HidKey.KeypadComma => 0x7E,
        HidKey.International1 => 0x73,
        HidKey.International2 => 0x70,
        HidKey.International3 => 0x7D,
        HidKey.International4 => 0x79,
        HidKey.International5 => 0x7B,
        HidKey.Language1 => 0xF2,
        HidKey.Language2 => 0xF1,
        HidKey.Language3 => 0x78,
        HidKey.Language4 => 0x77,
        HidKey.LeftControl => 0x1D,
        HidKey.LeftShift => 0x2A,
        HidKey.LeftAlt => 0x38,
        HidKey.LeftGui => 0xE05B,
        HidKey.RightControl => 0xE01D,
        HidKey.RightShift => 0x36,
        HidKey.RightAlt => 0xE038,
        HidKey.RightGui => 0xE05C,
        _ => 0,
    };

    /// <summary>The key with a make code in set 1, or <see cref="HidKey.None"/>.</summary>
    public static HidKey FromSet1(int code) => code switch
    {
        0x1E => HidKey.A,
        0x30 => HidKey.B,
        0x2E => HidKey.C,
        0x20 => HidKey.D,
        0x12 => HidKey.E,
        0x21 => HidKey.F,
        0x22 => HidKey.G,
        0x23 => HidKey.H,
        0x17 => HidKey.I,
        0x24 => HidKey.J,
        0x25 => HidKey.K,
        0x26 => HidKey.L,
        0x32 => HidKey.M,
        0x31 => HidKey.N,
        0x18 => HidKey.O,
        0x19 => HidKey.P,
        0x10 => HidKey.Q,
        0x13 => HidKey.R,
        0x1F => HidKey.S,
        0x14 => HidKey.T,
        0x16 => HidKey.U,
        0x2F => HidKey.V,
        0x11 => HidKey.W,
        0x2D => HidKey.X,
        0x15 => HidKey.Y,
        0x2C => HidKey.Z,
        0x02 => HidKey.Digit1,
        0x03 => HidKey.Digit2,
        0x04 => HidKey.Digit3,
        0x05 => HidKey.Digit4,
        0x06 => HidKey.Digit5,
        0x07 => HidKey.Digit6,
        0x08 => HidKey.Digit7,
        0x09 => HidKey.Digit8,
        0x0A => HidKey.Digit9,
        0x0B => HidKey.Digit0,
        0x1C => HidKey.Enter,
        0x01 => HidKey.Escape,
        0x0E => HidKey.Backspace,
        0x0F => HidKey.Tab,
        0x39 => HidKey.Space,
        0x0C => HidKey.Minus,
        0x0D => HidKey.Equal,
        0x1A => HidKey.LeftBracket,
        0x1B => HidKey.RightBracket,
        0x2B => HidKey.Backslash,
        0x27 => HidKey.Semicolon,
        0x28 => HidKey.Apostrophe,
        0x29 => HidKey.Grave,
        0x33 => HidKey.Comma,
        0x34 => HidKey.Period,
        0x35 => HidKey.Slash,
        0x3A => HidKey.CapsLock,
        0x3B => HidKey.F1,
        0x3C => HidKey.F2,
        0x3D => HidKey.F3,
        0x3E => HidKey.F4,
        0x3F => HidKey.F5,
        0x40 => HidKey.F6,
        0x41 => HidKey.F7,
        0x42 => HidKey.F8,
        0x43 => HidKey.F9,
        0x44 => HidKey.F10,
        0x57 => HidKey.F11,
        0x58 => HidKey.F12,
        0xE037 => HidKey.PrintScreen,
        0x46 => HidKey.ScrollLock,
        0xE11D => HidKey.Pause,
        0xE052 => HidKey.Insert,
        0xE047 => HidKey.Home,
        0xE049 => HidKey.PageUp,
        0xE053 => HidKey.Delete,
        0xE04F => HidKey.End,
        0xE051 => HidKey.PageDown,
        0xE04D => HidKey.Right,
        0xE04B => HidKey.Left,
        0xE050 => HidKey.Down,
        0xE048 => HidKey.Up,
        0x45 => HidKey.NumLock,
        0xE035 => HidKey.KeypadSlash,
        0x37 => HidKey.KeypadAsterisk,
        0x4A => HidKey.KeypadMinus,
        0x4E => HidKey.KeypadPlus,
        0xE01C => HidKey.KeypadEnter,
        0x4F => HidKey.Keypad1,
        0x50 => HidKey.Keypad2,
        0x51 => HidKey.Keypad3,
        0x4B => HidKey.Keypad4,
        0x4C => HidKey.Keypad5,
        0x4D => HidKey.Keypad6,
        0x47 => HidKey.Keypad7,
        0x48 => HidKey.Keypad8,
        0x49 => HidKey.Keypad9,
        0x52 => HidKey.Keypad0,
        0x53 => HidKey.KeypadPeriod,
        0x56 => HidKey.NonUsBackslash,
        0xE05D => HidKey.Application,
        0xE05E => HidKey.Power,
        0x59 => HidKey.KeypadEqual,
        0x64 => HidKey.F13,
        0x65 => HidKey.F14,
        0x66 => HidKey.F15,
        0x67 => HidKey.F16,
        0x68 => HidKey.F17,
        0x69 => HidKey.F18,
        0x6A => HidKey.F19,
        0x6B => HidKey.F20,
        0x6C => HidKey.F21,
        0x6D => HidKey.F22,
        0x6E => HidKey.F23,
        0x76 => HidKey.F24,
        0x7E => HidKey.KeypadComma,
        0x73 => HidKey.International1,
        0x70 => HidKey.International2,
        0x7D => HidKey.International3,
        0x79 => HidKey.International4,
        0x7B => HidKey.International5,
        0xF2 => HidKey.Language1,
        0xF1 => HidKey.Language2,
        0x78 => HidKey.Language3,
        0x77 => HidKey.Language4,
        0x1D => HidKey.LeftControl,
        0x2A => HidKey.LeftShift,
        0x38 => HidKey.LeftAlt,
        0xE05B => HidKey.LeftGui,
        0xE01D => HidKey.RightControl,
        0x36 => HidKey.RightShift,
        0xE038 => HidKey.RightAlt,
        0xE05C => HidKey.RightGui,
        0x54 => HidKey.PrintScreen,
        0xE046 => HidKey.Pause,
        _ => HidKey.None,
    };
}

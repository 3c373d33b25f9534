// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;

namespace Vmm.Backends.Screen;

/// <summary>
/// Brings keys and pointer movements of viewers to the guest: to the active keyboard and pointer with the highest rank,
/// tablets before mice. Any thread.
/// </summary>
public sealed class ScreenInput
{
    private readonly Lock _gate = new();
    private readonly IReadOnlyList<IKeyboardSink> _keyboards;
    private readonly IReadOnlyList<IPointerSink> _pointers;
    private readonly KeyLayout _layout;
    private readonly HashSet<HidKey> _down = [];

    /// <summary>Makes a router.</summary>
    /// <param name="keyboards">The guest's keyboards, the preferred one last.</param>
    /// <param name="pointers">The guest's pointers, the preferred one last.</param>
    /// <param name="layout">The layout that the guest's keyboard has.</param>
    public ScreenInput(IReadOnlyList<IKeyboardSink> keyboards, IReadOnlyList<IPointerSink> pointers, KeyLayout layout)
    {
        _keyboards = keyboards;
        _pointers = pointers;
        _layout = layout;
    }

    /// <summary>The lights of the keyboard in use.</summary>
    public KeyboardLeds Leds => Keyboard?.Leds ?? KeyboardLeds.None;

    /// <summary>The pointer in use takes positions rather than movements.</summary>
    public bool IsPointerAbsolute => Pointer?.IsAbsolute ?? true;

    private IKeyboardSink? Keyboard
    {
        get
        {
            for (int i = _keyboards.Count - 1; i >= 0; i--)
            {
                if (_keyboards[i].IsActive)
                {
                    return _keyboards[i];
                }
            }

            return _keyboards.Count > 0 ? _keyboards[0] : null;
        }
    }

    private IPointerSink? Pointer
    {
        get
        {
            IPointerSink? best = null;
            for (int i = _pointers.Count - 1; i >= 0; i--)
            {
                IPointerSink pointer = _pointers[i];
                if (pointer.IsActive && (best is null || (pointer.IsAbsolute && !best.IsAbsolute)))
                {
                    best = pointer;
                }
            }

            return best;
        }
    }

    /// <summary>A key by its place.</summary>
    public void Key(HidKey key, bool isPressed)
    {
        if (key == HidKey.None)
        {
            return;
        }

        lock (_gate)
        {
            Send(key, isPressed);
        }
    }

    /// <summary>
    /// A key by its character. When the modifiers that are held do not fit the guest's layout, Shift or AltGr is pressed
    /// or let go around the key.
    /// </summary>
    public void Keysym(uint keysym, bool isPressed)
    {
        if (!_layout.TryFind(keysym, out HidKey key, out int level))
        {
            return;
        }

        lock (_gate)
        {
            bool hasShift = _down.Contains(HidKey.LeftShift) || _down.Contains(HidKey.RightShift);
            bool hasThird = _down.Contains(HidKey.RightAlt);
            bool isLetter = key is >= (HidKey)0x04 and <= (HidKey)0x1D;
            bool isAdjusted = isPressed && level >= 0 && !(isLetter && level < 2 && IsCapsOn);
            bool wantsShift = level == 1;
            bool wantsThird = level == 2;
            if (!isAdjusted || (hasShift == wantsShift && hasThird == wantsThird))
            {
                Send(key, isPressed);
                return;
            }

            Toggle(hasShift, wantsShift, HidKey.LeftShift, HidKey.RightShift);
            Toggle(hasThird, wantsThird, HidKey.RightAlt, HidKey.RightAlt);
            Send(key, pressed: true);
            Toggle(wantsThird, hasThird, HidKey.RightAlt, HidKey.RightAlt);
            Toggle(wantsShift, hasShift, HidKey.LeftShift, HidKey.RightShift);
        }
    }

    /// <summary>Lets every key go; for a viewer that left.</summary>
    public void ReleaseAll()
    {
        lock (_gate)
        {
            foreach (HidKey key in new List<HidKey>(_down))
            {
                Send(key, pressed: false);
            }
        }
    }

    /// <summary>The pointer moved to a place of the screen.</summary>
    /// <param name="x">Column.</param>
    /// <param name="y">Row.</param>
    /// <param name="previousX">Column before, for relative pointers.</param>
    /// <param name="previousY">Row before.</param>
    /// <param name="width">Columns of the screen.</param>
    /// <param name="height">Rows of the screen.</param>
    /// <param name="wheel">Detents away from the user.</param>
    /// <param name="buttons">Buttons held.</param>
    public void Move(
        int x, int y, int previousX, int previousY, int width, int height, int wheel, PointerButtons buttons)
    {
        if (Pointer is not { } pointer)
        {
            return;
        }

        if (pointer.IsAbsolute)
        {
            pointer.Send(new PointerEvent(Place(x, width), Place(y, height), wheel, buttons));
        }
        else
        {
            pointer.Send(new PointerEvent(x - previousX, y - previousY, wheel, buttons));
        }
    }

    private bool IsCapsOn => (Leds & KeyboardLeds.Caps) != 0;

    private static int Place(int at, int size) => size <= 1 ? 0 : (int)(Math.Clamp(at, 0, size - 1) * 32767L / (size - 1));

    private void Toggle(bool isHeld, bool wanted, HidKey left, HidKey right)
    {
        if (isHeld == wanted)
        {
            return;
        }

        if (wanted)
        {
            Keyboard?.Send(_down.Contains(right) ? right : left, pressed: true);
            return;
        }

        if (_down.Contains(left) || !_down.Contains(right))
        {
            Keyboard?.Send(left, pressed: false);
        }

        if (right != left && _down.Contains(right))
        {
            Keyboard?.Send(right, pressed: false);
        }
    }

    private void Send(HidKey key, bool pressed)
    {
        if (pressed)
        {
            _down.Add(key);
        }
        else
        {
            _down.Remove(key);
        }

        Keyboard?.Send(key, pressed);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Input;

/// <summary>
/// A PS/2 keyboard of 105 keys (PS/2 Hardware Interface Technical Reference, "Keyboards"): scan code sets 1, 2 and
/// 3, lights, and typematic repeat by guest time. Viewers' own repeats are ignored. It shares the controller's gate.
/// </summary>
public sealed class Ps2Keyboard : IKeyboardSink, IDisposable
{
    private const byte Acknowledge = 0xFA;
    private const byte Resend = 0xFE;
    private const int QueueBytes = 256;

    private readonly Lock _gate;
    private readonly Action _pump;
    private readonly IClock _clock;
    private readonly IGuestTimer _repeat;
    private readonly Queue<byte> _queue = new();
    private readonly bool[] _pressed = new bool[256];
    private readonly byte[] _types = new byte[ScanCodeSet3.Codes];
    private byte _pendingCommand;

    // How many bytes at the front of the queue answer commands.
    private int _answers;
    private byte _typematic;
    private byte _lastSent;
    private HidKey _repeating;
    private int _set = 2;
    private bool _scanning;
    private bool _paused = true;
    private long _dropped;
    private volatile KeyboardLeds _leds;

    internal Ps2Keyboard(Lock gate, IClock clock, Action pump)
    {
        _gate = gate;
        _clock = clock;
        _pump = pump;
        _repeat = clock.CreateTimer("ps2-typematic", OnRepeat);
    }

    /// <inheritdoc/>
    public bool IsActive
    {
        get
        {
            lock (_gate)
            {
                return _scanning;
            }
        }
    }

    /// <inheritdoc/>
    public KeyboardLeds Leds => _leds;

    /// <summary>Key events that found the queue full.</summary>
    public long Dropped => Interlocked.Read(ref _dropped);

    /// <inheritdoc/>
    public void Send(HidKey key, bool pressed)
    {
        lock (_gate)
        {
            if (_pressed[(byte)key] == pressed || HidKeys.ToSet1(key) == 0)
            {
                return;
            }

            _pressed[(byte)key] = pressed;
            if (!_scanning)
            {
                return;
            }

            Emit(key, pressed);
            if (pressed && Repeats(key))
            {
                _repeating = key;
                Arm(DelayNs);
            }
            else if (key == _repeating)
            {
                _repeating = HidKey.None;
                _repeat.Cancel();
            }

            _pump();
        }
    }

    /// <inheritdoc/>
    public void Dispose() => _repeat.Dispose();

    // Typematic byte: bits 6..5 delay (250 ms steps), 4..3 exponent and 2..0 mantissa of the period in 1/240 s.
    private long DelayNs => (((_typematic >> 5) & 3) + 1) * 250_000_000L;

    private long PeriodNs => (8L + (_typematic & 7)) * (1 << ((_typematic >> 3) & 3)) * 1_000_000_000 / 240;

    internal void PowerOn()
    {
        Empty();
        Array.Clear(_pressed);
        Defaults();
        _leds = KeyboardLeds.None;
        _pendingCommand = 0;
        _lastSent = 0;
        _scanning = true;
    }

    internal void Pause(bool paused)
    {
        _paused = paused;
        if (paused)
        {
            _repeat.Cancel();
        }
        else if (_repeating != HidKey.None)
        {
            Arm(DelayNs);
        }
    }

    internal bool TryTake(out byte value)
    {
        if (!_queue.TryDequeue(out value))
        {
            return false;
        }

        _answers = Math.Max(0, _answers - 1);

        if (value != Resend)
        {
            _lastSent = value;
        }

        return true;
    }

    internal void Command(byte value)
    {
        byte pending = _pendingCommand;
        _pendingCommand = 0;

        // A byte of 0xED and above is a command even where an argument is due.
        if (pending != 0 && value < 0xED)
        {
            Argument(pending, value);
            return;
        }

        switch (value)
        {
            case 0xED:
            case 0xF0:
            case 0xF3:
                _pendingCommand = value;
                Reply(Acknowledge);
                break;
            case 0xEE:
                Reply(0xEE);
                break;
            case 0xF2:
                Reply(Acknowledge, 0xAB, 0x83);
                break;
            case 0xF4:
                Empty();
                _scanning = true;
                Reply(Acknowledge);
                break;
            case 0xF5:
                Defaults();
                _scanning = false;
                Reply(Acknowledge);
                break;
            case 0xF6:
                Defaults();
                Reply(Acknowledge);
                break;
            case >= 0xF7 and <= 0xFA:
                // Accepted in every set, of consequence in set 3 alone.
                Empty();
                Array.Fill(_types, (byte)TypeOf(value - 0xF7));
                Reply(Acknowledge);
                break;
            case >= 0xFB and <= 0xFD:
                // Codes of keys follow until something else does.
                Empty();
                _pendingCommand = value;
                Reply(Acknowledge);
                break;
            case 0xFE:
                Reply(_lastSent);
                break;
            case 0xFF:
                Empty();
                Defaults();
                _leds = KeyboardLeds.None;
                _scanning = true;
                Reply(Acknowledge, 0xAA);
                break;
            default:
                Reply(Resend);
                break;
        }
    }

    internal void Save(StateWriter writer)
    {
        writer.WriteBytes("kbd.queue", _queue.ToArray());
        Span<byte> pressed = stackalloc byte[256];
        for (int i = 0; i < 256; i++)
        {
            pressed[i] = _pressed[i] ? (byte)1 : (byte)0;
        }

        writer.WriteBytes("kbd.pressed", pressed);
        writer.Write("kbd.pending", (ulong)_pendingCommand);
        writer.Write("kbd.typematic", (ulong)_typematic);
        writer.Write("kbd.lastSent", (ulong)_lastSent);
        writer.Write("kbd.repeating", (ulong)_repeating);
        writer.Write("kbd.set", (ulong)_set);
        writer.Write("kbd.scanning", _scanning);
        writer.Write("kbd.leds", (ulong)_leds);
        writer.WriteBytes("kbd.types", _types);
        writer.Write("kbd.answers", (ulong)_answers);
    }

    // Version 1 knew neither set 3 nor the types of its keys.
    internal void Load(StateReader reader, int version)
    {
        ReadOnlySpan<byte> queue = reader.ReadBytes("kbd.queue");
        if (queue.Length > QueueBytes)
        {
            throw new StateException($"{reader.Section}.kbd.queue: {queue.Length} bytes");
        }

        Empty();
        foreach (byte value in queue)
        {
            _queue.Enqueue(value);
        }

        Span<byte> pressed = stackalloc byte[256];
        reader.ReadBytes("kbd.pressed", pressed);
        for (int i = 0; i < 256; i++)
        {
            _pressed[i] = pressed[i] != 0;
        }

        _pendingCommand = reader.ReadByte("kbd.pending");
        _typematic = reader.ReadByte("kbd.typematic");
        _lastSent = reader.ReadByte("kbd.lastSent");
        _repeating = (HidKey)reader.ReadByte("kbd.repeating");
        _set = Math.Max(1, (int)reader.ReadBounded("kbd.set", version >= 2 ? 3u : 2u));
        _scanning = reader.ReadBoolean("kbd.scanning");
        _leds = (KeyboardLeds)reader.ReadBounded("kbd.leds", 7);
        if (version < 2)
        {
            ScanCodeSet3.SetDefaults(_types);
            return;
        }

        reader.ReadBytes("kbd.types", _types);
        _answers = (int)reader.ReadBounded("kbd.answers", (uint)_queue.Count);
        foreach (ref byte type in _types.AsSpan())
        {
            type &= 3;
        }
    }

    // In the order of the commands 0xF7..0xFA and, for one key, 0xFB..0xFD.
    private static KeyType TypeOf(int order) => order switch
    {
        0 => KeyType.Typematic,
        1 => KeyType.MakeBreak,
        2 => KeyType.Make,
        _ => KeyType.TypematicMakeBreak,
    };

    private bool Repeats(HidKey key)
    {
        if (_set != 3)
        {
            return key != HidKey.Pause;
        }

        byte code = ScanCodeSet3.CodeOf(key);
        return code != 0 && ((KeyType)_types[code] is KeyType.Typematic or KeyType.TypematicMakeBreak);
    }

    private void Argument(byte command, byte value)
    {
        switch (command)
        {
            case 0xED:
                // Bit 0 Scroll, 1 Num, 2 Caps.
                _leds = ((value & 1) != 0 ? KeyboardLeds.Scroll : 0) | ((value & 2) != 0 ? KeyboardLeds.Num : 0) |
                    ((value & 4) != 0 ? KeyboardLeds.Caps : 0);
                Reply(Acknowledge);
                break;
            case 0xF0 when value == 0:
                Reply(Acknowledge, (byte)_set);
                break;
            case 0xF0 when value is >= 1 and <= 3:
                Empty();
                _set = value;
                Reply(Acknowledge);
                break;
            case 0xF3:
                _typematic = (byte)(value & 0x7F);
                Reply(Acknowledge);
                break;
            case >= 0xFB and <= 0xFD when ScanCodeSet3.IsKey(value):
                _types[value] = (byte)TypeOf(command - 0xFB);
                _pendingCommand = command;
                Reply(Acknowledge);
                break;
            default:
                Reply(Resend);
                break;
        }
    }

    private void Defaults()
    {
        _set = 2;
        ScanCodeSet3.SetDefaults(_types);
        _typematic = 0x2B;
        _repeating = HidKey.None;
        _repeat.Cancel();
    }

    private void Reply(params ReadOnlySpan<byte> bytes)
    {
        // Answers go before keys that wait, and behind answers that do. A guest that never reads gets no more of them.
        if (_answers + bytes.Length > QueueBytes / 2)
        {
            Interlocked.Increment(ref _dropped);
            return;
        }

        byte[] waiting = _queue.ToArray();
        int before = _answers;
        Empty();
        Enqueue(waiting.AsSpan(0, before));
        Enqueue(bytes);
        Enqueue(waiting.AsSpan(before));
        _answers = before + bytes.Length;
    }

    private void Enqueue(ReadOnlySpan<byte> bytes)
    {
        foreach (byte value in bytes)
        {
            if (_queue.Count < QueueBytes)
            {
                _queue.Enqueue(value);
            }
        }
    }

    private void Empty()
    {
        _queue.Clear();
        _answers = 0;
    }

    private void Emit(HidKey key, bool pressed)
    {
        Span<byte> bytes = stackalloc byte[8];
        int length = _set == 3 ? EncodeSet3(key, pressed, bytes) : ScanCodes.Encode(key, pressed, _set, bytes);
        if (_queue.Count + length > QueueBytes)
        {
            Interlocked.Increment(ref _dropped);
            return;
        }

        for (int i = 0; i < length; i++)
        {
            _queue.Enqueue(bytes[i]);
        }
    }

    private int EncodeSet3(HidKey key, bool pressed, Span<byte> into)
    {
        byte code = ScanCodeSet3.CodeOf(key);
        if (code == 0)
        {
            return 0;
        }

        if (pressed)
        {
            into[0] = code;
            return 1;
        }

        if ((KeyType)_types[code] is KeyType.Typematic or KeyType.Make)
        {
            return 0;
        }

        into[0] = 0xF0;
        into[1] = code;
        return 2;
    }

    private void Arm(long afterNs)
    {
        if (!_paused)
        {
            _repeat.ArmAt(_clock.NowNs + afterNs);
        }
    }

    private void OnRepeat()
    {
        lock (_gate)
        {
            if (_paused || !_scanning || _repeating == HidKey.None || !_pressed[(byte)_repeating])
            {
                return;
            }

            // A guest that does not fetch gets no backlog of repeats.
            if (_queue.Count == 0)
            {
                Emit(_repeating, pressed: true);
            }

            Arm(PeriodNs);
            _pump();
        }
    }
}

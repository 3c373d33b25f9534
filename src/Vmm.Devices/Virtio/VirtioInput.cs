// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>Kinds of virtio input devices.</summary>
public enum VirtioInputKind
{
    /// <summary>A keyboard with 102 keys and more.</summary>
    Keyboard,

    /// <summary>An absolute pointer.</summary>
    Tablet,

    /// <summary>A relative pointer.</summary>
    Mouse,
}

/// <summary>
/// Input device (VIRTIO 1.2 §5.8): evdev events of Linux in a queue. Events wait in a bounded list until the guest has
/// buffers; movement that waits is merged; when the list is full the newest are lost and counted, but never half of a
/// group that ends with SYN_REPORT.
/// </summary>
public sealed class VirtioInput : VirtioModel, IKeyboardSink, IPointerSink
{
    private const int MaxWaiting = 256;
    private const int EventBytes = 8;
    private const int EventQueue = 0;
    private const int PointerRange = 32767;

    private const ushort TypeSync = 0;
    private const ushort TypeKey = 1;
    private const ushort TypeRelative = 2;
    private const ushort TypeAbsolute = 3;
    private const ushort TypeLed = 0x11;
    private const ushort RelX = 0;
    private const ushort RelY = 1;
    private const ushort RelWheel = 8;

    private static readonly ushort[] s_queueSizes = [64, 64];
    private static readonly ushort[] s_buttons = [0x110, 0x111, 0x112, 0x113, 0x114];
    private static readonly ushort[] s_keys = MakeKeys();

    private readonly Lock _gate = new();
    private readonly List<(ushort Type, ushort Code, uint Value)> _waiting = [];
    private readonly VirtioInputKind _kind;
    private byte _select;
    private byte _subSelect;
    private PointerButtons _buttons;
    private KeyboardLeds _leds;
    private long _dropped;

    /// <summary>Makes one.</summary>
    public VirtioInput(VirtioInputKind kind) => _kind = kind;

    /// <summary>What it is.</summary>
    public VirtioInputKind Kind => _kind;

    private enum ConfigSelect : byte
    {
        Unset = 0,
        Name = 1,
        Serial = 2,
        DeviceIds = 3,
        Properties = 0x10,
        EventBits = 0x11,
        AbsoluteInfo = 0x12,
    }

    /// <inheritdoc/>
    public override VirtioDeviceType Type => VirtioDeviceType.Input;

    /// <inheritdoc/>
    public override ReadOnlySpan<ushort> QueueSizes => s_queueSizes;

    /// <inheritdoc/>
    public override int ConfigBytes => 8 + 128;

    /// <inheritdoc/>
    public bool IsActive => Session is not null;

    /// <inheritdoc/>
    public bool IsAbsolute => _kind == VirtioInputKind.Tablet;

    /// <summary>Events that the guest did not fetch in time.</summary>
    public long Dropped => Interlocked.Read(ref _dropped);

    /// <inheritdoc/>
    public KeyboardLeds Leds
    {
        get
        {
            lock (_gate)
            {
                return _leds;
            }
        }
    }

    /// <inheritdoc/>
    public void Send(HidKey key, bool pressed)
    {
        ushort code = s_keys[(byte)key];
        if (code == 0 || _kind != VirtioInputKind.Keyboard)
        {
            return;
        }

        lock (_gate)
        {
            if (Session is null || !HasRoom(2))
            {
                return;
            }

            _waiting.Add((TypeKey, code, pressed ? 1u : 0));
            _waiting.Add((TypeSync, 0, 0));
        }

        Session?.Kick(EventQueue);
    }

    /// <inheritdoc/>
    public void Send(in PointerEvent pointer)
    {
        if (_kind == VirtioInputKind.Keyboard)
        {
            return;
        }

        lock (_gate)
        {
            if (Session is null)
            {
                return;
            }

            PointerButtons changed = pointer.Buttons ^ _buttons;
            if (changed == PointerButtons.None && pointer.Wheel == 0 && TryMerge(pointer))
            {
                return;
            }

            if (!HasRoom(4 + s_buttons.Length))
            {
                return;
            }

            _buttons = pointer.Buttons;
            AddMotion(pointer);
            if (pointer.Wheel != 0)
            {
                _waiting.Add((TypeRelative, RelWheel, unchecked((uint)pointer.Wheel)));
            }

            for (int i = 0; i < s_buttons.Length; i++)
            {
                var bit = (PointerButtons)(1 << i);
                if ((changed & bit) != 0)
                {
                    _waiting.Add((TypeKey, s_buttons[i], (pointer.Buttons & bit) != 0 ? 1u : 0));
                }
            }

            _waiting.Add((TypeSync, 0, 0));
        }

        Session?.Kick(EventQueue);
    }

    /// <inheritdoc/>
    public override void ReadConfig(uint offset, Span<byte> into)
    {
        Span<byte> config = stackalloc byte[8 + 128];
        config.Clear();
        lock (_gate)
        {
            config[0] = _select;
            config[1] = _subSelect;
            config[2] = (byte)Describe((ConfigSelect)_select, _subSelect, config[8..]);
        }

        CopyConfig(config, offset, into);
    }

    /// <inheritdoc/>
    public override void WriteConfig(uint offset, ReadOnlySpan<byte> from)
    {
        lock (_gate)
        {
            for (int i = 0; i < from.Length; i++)
            {
                if (offset + i == 0)
                {
                    _select = from[i];
                }
                else if (offset + i == 1)
                {
                    _subSelect = from[i];
                }
            }
        }
    }

    /// <inheritdoc/>
    public override bool Notify(int queue, int budget)
    {
        if (queue != EventQueue)
        {
            return base.Notify(queue, budget);
        }

        if (Session?.Queue(EventQueue) is { } ring)
        {
            lock (_gate)
            {
                Deliver(ring);
            }

            ring.Flush();
        }

        return false;
    }

    /// <inheritdoc/>
    public override void Reset()
    {
        lock (_gate)
        {
            _waiting.Clear();
            _select = 0;
            _subSelect = 0;
            _buttons = PointerButtons.None;
            _leds = KeyboardLeds.None;
        }
    }

    /// <inheritdoc/>
    public override void Save(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_gate)
        {
            byte[] events = new byte[_waiting.Count * EventBytes];
            for (int i = 0; i < _waiting.Count; i++)
            {
                Pack(_waiting[i], events.AsSpan(i * EventBytes));
            }

            writer.WriteBytes("input.events", events);
            writer.Write("input.select", _select);
            writer.Write("input.sub-select", _subSelect);
            writer.Write("input.buttons", (ulong)_buttons);
            writer.Write("input.leds", (ulong)_leds);
        }
    }

    /// <inheritdoc/>
    public override void Load(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_gate)
        {
            _waiting.Clear();
            ReadOnlySpan<byte> events = reader.ReadBytes("input.events");
            for (int at = 0; at + EventBytes <= events.Length && _waiting.Count < MaxWaiting; at += EventBytes)
            {
                _waiting.Add((
                    BinaryPrimitives.ReadUInt16LittleEndian(events[at..]),
                    BinaryPrimitives.ReadUInt16LittleEndian(events[(at + 2)..]),
                    BinaryPrimitives.ReadUInt32LittleEndian(events[(at + 4)..])));
            }

            _select = reader.ReadByte("input.select");
            _subSelect = reader.ReadByte("input.sub-select");
            _buttons = (PointerButtons)reader.ReadByte("input.buttons");
            _leds = (KeyboardLeds)reader.ReadByte("input.leds");
        }
    }

    /// <inheritdoc/>
    protected override void Process(int queue, Virtqueue ring, VirtqueueChain chain)
    {
        ArgumentNullException.ThrowIfNull(ring);
        ArgumentNullException.ThrowIfNull(chain);
        Span<byte> raw = stackalloc byte[EventBytes];
        if (chain.TryRead(0, raw) && BinaryPrimitives.ReadUInt16LittleEndian(raw) == TypeLed)
        {
            // LED_NUML, LED_CAPSL and LED_SCROLLL are 0, 1 and 2: the bits of KeyboardLeds.
            ushort code = BinaryPrimitives.ReadUInt16LittleEndian(raw[2..]);
            bool on = BinaryPrimitives.ReadUInt32LittleEndian(raw[4..]) != 0;
            if (code <= 2)
            {
                var led = (KeyboardLeds)(1 << code);
                lock (_gate)
                {
                    _leds = on ? _leds | led : _leds & ~led;
                }
            }
        }

        ring.Push(chain, 0);
    }

    private static void Pack((ushort Type, ushort Code, uint Value) item, Span<byte> into)
    {
        BinaryPrimitives.WriteUInt16LittleEndian(into, item.Type);
        BinaryPrimitives.WriteUInt16LittleEndian(into[2..], item.Code);
        BinaryPrimitives.WriteUInt32LittleEndian(into[4..], item.Value);
    }

    private bool HasRoom(int count)
    {
        if (_waiting.Count + count <= MaxWaiting)
        {
            return true;
        }

        Interlocked.Increment(ref _dropped);
        return false;
    }

    private void AddMotion(in PointerEvent pointer)
    {
        if (_kind == VirtioInputKind.Tablet)
        {
            _waiting.Add((TypeAbsolute, RelX, (uint)Math.Clamp(pointer.X, 0, PointerRange)));
            _waiting.Add((TypeAbsolute, RelY, (uint)Math.Clamp(pointer.Y, 0, PointerRange)));
        }
        else
        {
            _waiting.Add((TypeRelative, RelX, unchecked((uint)pointer.X)));
            _waiting.Add((TypeRelative, RelY, unchecked((uint)pointer.Y)));
        }
    }

    // A group of pure movement at the end of the list takes the new movement up.
    private bool TryMerge(in PointerEvent pointer)
    {
        int at = _waiting.Count - 3;
        ushort type = _kind == VirtioInputKind.Tablet ? TypeAbsolute : TypeRelative;
        bool motion = at >= 0 && _waiting[at].Type == type && _waiting[at].Code == RelX
            && _waiting[at + 1].Type == type && _waiting[at + 1].Code == RelY && _waiting[at + 2].Type == TypeSync
            && (at == 0 || _waiting[at - 1].Type == TypeSync);
        if (!motion)
        {
            return false;
        }

        if (type == TypeAbsolute)
        {
            _waiting.RemoveRange(at, 3);
            AddMotion(pointer);
            _waiting.Add((TypeSync, 0, 0));
        }
        else
        {
            _waiting[at] = (type, RelX, unchecked(_waiting[at].Value + (uint)pointer.X));
            _waiting[at + 1] = (type, RelY, unchecked(_waiting[at + 1].Value + (uint)pointer.Y));
        }

        return true;
    }

    // §5.8.6.1.1: one event a buffer; a group is given as a whole so that a driver never sees half of it.
    private void Deliver(Virtqueue ring)
    {
        Span<byte> raw = stackalloc byte[EventBytes];
        int done = 0;
        while (done < _waiting.Count)
        {
            if (!ring.TryPop(out VirtqueueChain? chain))
            {
                if (ring.EnableNotify())
                {
                    continue;
                }

                break;
            }

            Pack(_waiting[done], raw);
            if (!chain.TryWrite(0, raw))
            {
                ring.Break(VirtqueueFault.BadRequest);
            }

            ring.Push(chain, EventBytes);
            done++;
        }

        _waiting.RemoveRange(0, done);
    }

    // §5.8.5: what the driver selects, as a length and up to 128 bytes.
    private int Describe(ConfigSelect select, byte sub, Span<byte> into)
    {
        switch (select)
        {
            case ConfigSelect.Name:
                return Encoding.ASCII.GetBytes("VMM virtio " + _kind switch
                {
                    VirtioInputKind.Keyboard => "keyboard",
                    VirtioInputKind.Tablet => "tablet",
                    _ => "mouse",
                }, into);
            case ConfigSelect.DeviceIds:
                BinaryPrimitives.WriteUInt16LittleEndian(into, 6); // BUS_VIRTUAL
                BinaryPrimitives.WriteUInt16LittleEndian(into[2..], 0x1AF4);
                BinaryPrimitives.WriteUInt16LittleEndian(into[4..], (ushort)(1 + _kind));
                BinaryPrimitives.WriteUInt16LittleEndian(into[6..], 1);
                return 8;
            case ConfigSelect.EventBits:
                return DescribeEvents(_kind, sub, into);
            case ConfigSelect.AbsoluteInfo when _kind == VirtioInputKind.Tablet && sub <= RelY:
                BinaryPrimitives.WriteUInt32LittleEndian(into[4..], PointerRange);
                return 20;
            default:
                return 0;
        }
    }

    private static int DescribeEvents(VirtioInputKind kind, ushort type, Span<byte> into)
    {
        int length = 0;
        switch (type)
        {
            case TypeKey when kind == VirtioInputKind.Keyboard:
                foreach (ushort key in s_keys)
                {
                    if (key != 0)
                    {
                        length = SetBit(into, key, length);
                    }
                }

                break;
            case TypeKey:
                foreach (ushort button in s_buttons)
                {
                    length = SetBit(into, button, length);
                }

                break;
            case TypeRelative when kind != VirtioInputKind.Keyboard:
                length = SetBit(into, RelWheel, length);
                if (kind == VirtioInputKind.Mouse)
                {
                    length = SetBit(into, RelX, length);
                    length = SetBit(into, RelY, length);
                }

                break;
            case TypeAbsolute when kind == VirtioInputKind.Tablet:
                length = SetBit(into, RelX, length);
                length = SetBit(into, RelY, length);
                break;
            case TypeLed when kind == VirtioInputKind.Keyboard:
                into[0] = 7;
                length = 1;
                break;
        }

        return length;
    }

    private static int SetBit(Span<byte> into, int bit, int length)
    {
        into[bit / 8] |= (byte)(1 << (bit & 7));
        return Math.Max(length, (bit / 8) + 1);
    }

    // USB HID usages (HUT 1.4 §10) to Linux key codes; 0 where there is none.
    private static ushort[] MakeKeys()
    {
        ushort[] keys = new ushort[256];
        ReadOnlySpan<byte> from4 =
        [
            30, 48, 46, 32, 18, 33, 34, 35, 23, 36, 37, 38, 50, 49, 24, 25, 16, 19, 31, 20, 22, 47, 17, 45, 21, 44, // A-Z
            2, 3, 4, 5, 6, 7, 8, 9, 10, 11, // 1-9, 0
            28, 1, 14, 15, 57, 12, 13, 26, 27, 43, 43, 39, 40, 41, 51, 52, 53, 58, // Enter to Caps Lock
            59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 87, 88, // F1-F12
            99, 70, 119, 110, 102, 104, 111, 107, 109, 106, 105, 108, 103, // Print Screen to Up
            69, 98, 55, 74, 78, 96, 79, 80, 81, 75, 76, 77, 71, 72, 73, 82, 83, // keypad
            86, 127, 116, 117, 183, 184, 185, 186, 187, 188, 189, 190, 191, 192, 193, 194, // 102nd to F24
        ];
        for (int i = 0; i < from4.Length; i++)
        {
            keys[4 + i] = from4[i];
        }

        (keys[0x7F], keys[0x80], keys[0x81]) = (113, 115, 114); // mute, volume
        (keys[0x87], keys[0x88], keys[0x89], keys[0x8A], keys[0x8B]) = (89, 93, 124, 92, 94); // Japanese
        (keys[0x90], keys[0x91]) = (122, 123); // Korean
        ReadOnlySpan<byte> modifiers = [29, 42, 56, 125, 97, 54, 100, 126];
        for (int i = 0; i < modifiers.Length; i++)
        {
            keys[0xE0 + i] = modifiers[i];
        }

        return keys;
    }
}

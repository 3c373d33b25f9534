// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Text;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Input;

/// <summary>
/// A full-speed USB device with one HID interface (USB 2.0 chapter 9; HID 1.11) and one interrupt endpoint, 0x81. It
/// answers control requests and hands out input reports; the controller that it is plugged into gives it its gate.
/// </summary>
public abstract class UsbHidDevice
{
    /// <summary>Reports that wait at most; older movement is merged, keys beyond that are dropped and counted.</summary>
    protected const int MaximumReports = 64;

    private readonly byte[] _deviceDescriptor;
    private readonly byte[] _configuration;
    private readonly byte[] _reportDescriptor;
    private readonly string _product;
    private readonly bool _isBoot;
    private readonly Queue<byte[]> _reports = new();
    private Lock _gate = new();
    private Action _onReport = static () => { };
    private byte _configured;
    private byte _idle;
    private byte _protocol = 1;
    private bool _remoteWakeup;
    private bool _halted;
    private long _dropped;

    /// <summary>Makes a device.</summary>
    /// <param name="product">Its name for people.</param>
    /// <param name="productId">Product identifier.</param>
    /// <param name="bootProtocol">0 none, 1 keyboard, 2 mouse.</param>
    /// <param name="reportDescriptor">HID report descriptor.</param>
    /// <param name="reportBytes">Size of an input report.</param>
    private protected UsbHidDevice(
        string product, ushort productId, byte bootProtocol, ReadOnlySpan<byte> reportDescriptor, byte reportBytes)
    {
        _product = product;
        _isBoot = bootProtocol != 0;
        _reportDescriptor = reportDescriptor.ToArray();
        ReportBytes = reportBytes;
        _deviceDescriptor =
        [
            18, 1, 0x00, 0x02, 0, 0, 0, 64, 0x27, 0x06, (byte)productId, (byte)(productId >> 8), 0x00, 0x01, 1, 2, 3, 1,
        ];
        _configuration =
        [
            9, 2, 34, 0, 1, 1, 0, 0xA0, 50,
            9, 4, 0, 0, 1, 3, (byte)(bootProtocol != 0 ? 1 : 0), bootProtocol, 0,
            9, 0x21, 0x11, 0x01, 0, 1, 0x22, (byte)reportDescriptor.Length, (byte)(reportDescriptor.Length >> 8),
            7, 5, 0x81, 3, reportBytes, 0, 4,
        ];
    }

    /// <summary>Size of an input report.</summary>
    public byte ReportBytes { get; }

    /// <summary>The guest has chosen its configuration.</summary>
    public bool IsActive
    {
        get
        {
            lock (_gate)
            {
                return _configured != 0;
            }
        }
    }

    /// <summary>Reports that found the queue full.</summary>
    public long Dropped => Interlocked.Read(ref _dropped);

    internal bool HasReport => _configured != 0 && !_halted && (_reports.Count > 0 || HasMovement);

    /// <summary>The gate of the controller.</summary>
    private protected Lock Gate => _gate;

    /// <summary>The guest asked for the boot protocol.</summary>
    private protected bool IsBootProtocol => _protocol == 0;

    /// <summary>Something is merged and not yet a report.</summary>
    private protected virtual bool HasMovement => false;

    internal void Plug(Lock gate, Action onReport)
    {
        _gate = gate;
        _onReport = onReport;
    }

    internal void BusReset()
    {
        _configured = 0;
        _idle = 0;
        _protocol = 1;
        _remoteWakeup = false;
        _halted = false;
        _reports.Clear();
        OnReset();
    }

    internal byte[] TakeReport() =>
        _reports.TryDequeue(out byte[]? report) ? report : MakeReport();

    /// <summary>A request with data to the host.</summary>
    /// <returns>The data, or null for a stall.</returns>
    internal byte[]? ControlIn(ReadOnlySpan<byte> setup)
    {
        ushort value = (ushort)(setup[2] | (setup[3] << 8));
        return (setup[0], setup[1]) switch
        {
            (0x80, 0) => [(byte)(_remoteWakeup ? 2 : 0), 0],
            (0x81, 0) => [0, 0],
            (0x82, 0) => [(byte)(_halted ? 1 : 0), 0],
            (0x80, 6) => Descriptor(value),
            (0x81, 6) when value >> 8 == 0x22 => _reportDescriptor,
            (0x81, 6) when value >> 8 == 0x21 => _configuration.AsSpan(18, 9).ToArray(),
            (0x80, 8) => [_configured],
            (0x81, 10) => [0],
            (0xA1, 1) => MakeReport(),
            (0xA1, 2) => [_idle],
            (0xA1, 3) when _isBoot => [_protocol],
            _ => null,
        };
    }

    /// <summary>A request with data from the host, or without data.</summary>
    /// <returns>False for a stall.</returns>
    internal bool ControlOut(ReadOnlySpan<byte> setup, ReadOnlySpan<byte> data)
    {
        ushort value = (ushort)(setup[2] | (setup[3] << 8));
        switch (setup[0], setup[1])
        {
            case (0x00, 9) when value <= 1:
                _configured = (byte)value;
                _halted = false;
                return true;
            case (0x00, 1 or 3) when value == 1:
                _remoteWakeup = setup[1] == 3;
                return true;
            case (0x02, 1 or 3) when value == 0:
                _halted = setup[1] == 3 && setup[4] == 0x81;
                return true;
            case (0x00, 5):
                return true;
            case (0x01, 11):
                return value == 0;
            case (0x21, 9):
                return SetReport(data);
            case (0x21, 10):
                _idle = (byte)(value >> 8);
                return true;
            case (0x21, 11) when _isBoot && value <= 1:
                _protocol = (byte)value;
                return true;
            default:
                return false;
        }
    }

    internal void Save(StateWriter writer, string prefix)
    {
        writer.Write(prefix + "configured", (ulong)_configured);
        writer.Write(prefix + "idle", (ulong)_idle);
        writer.Write(prefix + "protocol", (ulong)_protocol);
        writer.Write(prefix + "wakeup", _remoteWakeup);
        writer.Write(prefix + "halted", _halted);
        var bytes = new List<byte>();
        foreach (byte[] report in _reports)
        {
            bytes.AddRange(report);
        }

        writer.WriteBytes(prefix + "reports", bytes.ToArray());
    }

    internal void Load(StateReader reader, string prefix)
    {
        _configured = (byte)reader.ReadBounded(prefix + "configured", 1);
        _idle = reader.ReadByte(prefix + "idle");
        _protocol = (byte)reader.ReadBounded(prefix + "protocol", 1);
        _remoteWakeup = reader.ReadBoolean(prefix + "wakeup");
        _halted = reader.ReadBoolean(prefix + "halted");
        ReadOnlySpan<byte> bytes = reader.ReadBytes(prefix + "reports");
        if (bytes.Length > MaximumReports * ReportBytes || bytes.Length % ReportBytes != 0)
        {
            throw new StateException($"{reader.Section}.{prefix}reports: {bytes.Length} bytes");
        }

        _reports.Clear();
        for (int i = 0; i < bytes.Length; i += ReportBytes)
        {
            _reports.Enqueue(bytes.Slice(i, ReportBytes).ToArray());
        }

        OnReset();
    }

    /// <summary>The present state as a report; clears what was merged.</summary>
    private protected abstract byte[] MakeReport();

    /// <summary>Forgets keys, buttons and movement.</summary>
    private protected abstract void OnReset();

    /// <summary>An output report.</summary>
    private protected virtual bool SetReport(ReadOnlySpan<byte> data) => false;

    /// <summary>Queues the present state as a report. Under the gate.</summary>
    private protected void QueueReport()
    {
        if (_configured == 0)
        {
            return;
        }

        if (_reports.Count >= MaximumReports)
        {
            Interlocked.Increment(ref _dropped);
            return;
        }

        _reports.Enqueue(MakeReport());
        _onReport();
    }

    /// <summary>Something merged is there. Under the gate.</summary>
    private protected void NotifyMovement() => _onReport();

    private byte[]? Descriptor(ushort value)
    {
        switch (value >> 8)
        {
            case 1:
                return _deviceDescriptor;
            case 2:
                return (value & 0xFF) == 0 ? _configuration : null;
            case 3:
                return (value & 0xFF) switch
                {
                    0 => [4, 3, 0x09, 0x04],
                    1 => Text("VMM"),
                    2 => Text(_product),
                    3 => Text("1"),
                    _ => null,
                };
            default:
                // A full-speed device has no device qualifier (USB 2.0 §9.6.2).
                return null;
        }
    }

    private static byte[] Text(string text)
    {
        byte[] unicode = Encoding.Unicode.GetBytes(text);
        return [(byte)(unicode.Length + 2), 3, .. unicode];
    }
}

/// <summary>A USB keyboard with the boot report (HID 1.11 appendix B.1): eight modifiers and six keys.</summary>
public sealed class UsbKeyboard : UsbHidDevice, IKeyboardSink
{
    private readonly List<byte> _keys = [];
    private byte _modifiers;
    private volatile KeyboardLeds _leds;

    /// <summary>Makes a keyboard.</summary>
    public UsbKeyboard()
        : base("USB Keyboard", 0x0002, 1, Descriptor, 8)
    {
    }

    /// <inheritdoc/>
    public KeyboardLeds Leds => _leds;

    private static ReadOnlySpan<byte> Descriptor =>
    [
        0x05, 0x01, 0x09, 0x06, 0xA1, 0x01,
        0x75, 0x01, 0x95, 0x08, 0x05, 0x07, 0x19, 0xE0, 0x29, 0xE7, 0x15, 0x00, 0x25, 0x01, 0x81, 0x02,
        0x95, 0x01, 0x75, 0x08, 0x81, 0x01,
        0x95, 0x05, 0x75, 0x01, 0x05, 0x08, 0x19, 0x01, 0x29, 0x05, 0x91, 0x02,
        0x95, 0x01, 0x75, 0x03, 0x91, 0x01,
        0x95, 0x06, 0x75, 0x08, 0x15, 0x00, 0x26, 0xFF, 0x00, 0x05, 0x07, 0x19, 0x00, 0x2A, 0xFF, 0x00, 0x81, 0x00,
        0xC0,
    ];

    /// <inheritdoc/>
    public void Send(HidKey key, bool pressed)
    {
        lock (Gate)
        {
            byte usage = (byte)key;
            if (usage is >= 0xE0 and <= 0xE7)
            {
                byte bit = (byte)(1 << (usage - 0xE0));
                byte next = (byte)(pressed ? _modifiers | bit : _modifiers & ~bit);
                if (next == _modifiers)
                {
                    return;
                }

                _modifiers = next;
            }
            else
            {
                if (usage < 4 || pressed == _keys.Contains(usage))
                {
                    return;
                }

                if (pressed)
                {
                    _keys.Add(usage);
                }
                else
                {
                    _keys.Remove(usage);
                }
            }

            QueueReport();
        }
    }

    private protected override byte[] MakeReport()
    {
        byte[] report = new byte[8];
        report[0] = _modifiers;

        // More than six keys: the roll-over code everywhere.
        for (int i = 0; i < 6; i++)
        {
            report[2 + i] = _keys.Count > 6 ? (byte)1 : i < _keys.Count ? _keys[i] : (byte)0;
        }

        return report;
    }

    private protected override void OnReset()
    {
        _keys.Clear();
        _modifiers = 0;
        _leds = KeyboardLeds.None;
    }

    private protected override bool SetReport(ReadOnlySpan<byte> data)
    {
        if (data.Length > 0)
        {
            // HID usages 1..3 of the LED page: Num, Caps, Scroll, which is the order of the enumeration.
            _leds = (KeyboardLeds)(data[0] & 7);
        }

        return true;
    }
}

/// <summary>A USB tablet: five buttons, absolute X and Y of 0..32767, and a wheel.</summary>
public sealed class UsbTablet : UsbHidDevice, IPointerSink
{
    private PointerButtons _buttons;
    private int _x;
    private int _y;
    private int _wheel;
    private bool _moved;

    /// <summary>Makes a tablet.</summary>
    public UsbTablet()
        : base("USB Tablet", 0x0001, 0, Descriptor, 6)
    {
    }

    /// <inheritdoc/>
    public bool IsAbsolute => true;

    private static ReadOnlySpan<byte> Descriptor =>
    [
        0x05, 0x01, 0x09, 0x02, 0xA1, 0x01, 0x09, 0x01, 0xA1, 0x00,
        0x05, 0x09, 0x19, 0x01, 0x29, 0x05, 0x15, 0x00, 0x25, 0x01, 0x95, 0x05, 0x75, 0x01, 0x81, 0x02,
        0x95, 0x01, 0x75, 0x03, 0x81, 0x01,
        0x05, 0x01, 0x09, 0x30, 0x09, 0x31, 0x15, 0x00, 0x26, 0xFF, 0x7F, 0x35, 0x00, 0x46, 0xFF, 0x7F,
        0x75, 0x10, 0x95, 0x02, 0x81, 0x02,
        0x05, 0x01, 0x09, 0x38, 0x15, 0x81, 0x25, 0x7F, 0x35, 0x00, 0x45, 0x00, 0x75, 0x08, 0x95, 0x01, 0x81, 0x06,
        0xC0, 0xC0,
    ];

    private protected override bool HasMovement => _moved;

    /// <inheritdoc/>
    public void Send(in PointerEvent pointer)
    {
        lock (Gate)
        {
            _x = Math.Clamp(pointer.X, 0, 0x7FFF);
            _y = Math.Clamp(pointer.Y, 0, 0x7FFF);
            _wheel = Math.Clamp(_wheel + Math.Clamp(pointer.Wheel, -127, 127), -127, 127);
            if (pointer.Buttons != _buttons)
            {
                // Each change of buttons is a report of its own; movement only updates the next one.
                _buttons = pointer.Buttons;
                QueueReport();
                return;
            }

            _moved = true;
            NotifyMovement();
        }
    }

    private protected override byte[] MakeReport()
    {
        int wheel = _wheel;
        _wheel = 0;
        _moved = false;
        return
        [
            (byte)_buttons, (byte)_x, (byte)(_x >> 8), (byte)_y, (byte)(_y >> 8), (byte)wheel,
        ];
    }

    private protected override void OnReset()
    {
        _buttons = PointerButtons.None;
        _wheel = 0;
        _moved = false;
    }
}

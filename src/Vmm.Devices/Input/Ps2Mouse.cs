// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Input;

/// <summary>
/// A PS/2 mouse (PS/2 Hardware Interface Technical Reference, "Mouse") with the wheel and five-button extensions
/// that a guest switches on by its sequences of sample rates (200, 100, 80 and 200, 200, 80). Movement that the guest has
/// not fetched is added up; a packet is made when the link is free. It shares the controller's gate.
/// </summary>
public sealed class Ps2Mouse : IPointerSink
{
    private const byte Acknowledge = 0xFA;
    private const byte Resend = 0xFE;
    private const int MaximumPending = 1 << 16;

    private readonly Lock _gate;
    private readonly Action _pump;
    private readonly Queue<byte> _queue = new();
    private byte _pendingCommand;
    private byte _resolution;
    private byte _rate;
    private byte _id;
    private int _rateHistory;
    private bool _streaming;
    private bool _isRemote;
    private bool _isWrap;
    private bool _scale2;
    private int _dx;
    private int _dy;
    private int _dz;
    private PointerButtons _buttons;
    private PointerButtons _sentButtons;
    private byte _lastSent;

    internal Ps2Mouse(Lock gate, Action pump)
    {
        _gate = gate;
        _pump = pump;
    }

    /// <inheritdoc/>
    public bool IsActive
    {
        get
        {
            lock (_gate)
            {
                return _streaming || _isRemote;
            }
        }
    }

    /// <inheritdoc/>
    public bool IsAbsolute => false;

    /// <inheritdoc/>
    public void Send(in PointerEvent pointer)
    {
        lock (_gate)
        {
            _dx = Math.Clamp(_dx + Math.Clamp(pointer.X, -MaximumPending, MaximumPending), -MaximumPending, MaximumPending);
            _dy = Math.Clamp(_dy - Math.Clamp(pointer.Y, -MaximumPending, MaximumPending), -MaximumPending, MaximumPending);
            _dz = Math.Clamp(_dz - Math.Clamp(pointer.Wheel, -127, 127), -127, 127);
            if (pointer.Buttons != _buttons && _streaming && !_isRemote && _buttons != _sentButtons)
            {
                // A press and its release must not merge: the press goes out first.
                MakePacket();
            }

            _buttons = pointer.Buttons;
            if (!_streaming)
            {
                // Movement while reporting is off is lost, buttons are seen by the next packet.
                _dx = _dy = _dz = 0;
            }

            _pump();
        }
    }

    internal void PowerOn()
    {
        _queue.Clear();
        _buttons = _sentButtons = PointerButtons.None;
        _lastSent = 0;
        Defaults();
    }

    internal bool TryTake(out byte value)
    {
        if (_queue.Count == 0 && _streaming && !_isRemote && !_isWrap &&
            (_dx != 0 || _dy != 0 || (_dz != 0 && _id != 0) || _buttons != _sentButtons))
        {
            MakePacket();
        }

        if (!_queue.TryDequeue(out value))
        {
            return false;
        }

        _lastSent = value;
        return true;
    }

    internal void Command(byte value)
    {
        if (_isWrap && value is not (0xEC or 0xFF))
        {
            Reply(value);
            return;
        }

        byte pending = _pendingCommand;
        _pendingCommand = 0;
        if (pending != 0)
        {
            Argument(pending, value);
            return;
        }

        switch (value)
        {
            case 0xE6:
                _scale2 = false;
                Reply(Acknowledge);
                break;
            case 0xE7:
                _scale2 = true;
                Reply(Acknowledge);
                break;
            case 0xE8:
            case 0xF3:
                _pendingCommand = value;
                Reply(Acknowledge);
                break;
            case 0xE9:
                byte status = (byte)(
                    ((_buttons & PointerButtons.Right) != 0 ? 1 : 0) | ((_buttons & PointerButtons.Middle) != 0 ? 2 : 0) |
                    ((_buttons & PointerButtons.Left) != 0 ? 4 : 0) | (_scale2 ? 0x10 : 0) | (_streaming ? 0x20 : 0) |
                    (_isRemote ? 0x40 : 0));
                Reply(Acknowledge, status, _resolution, _rate);
                break;
            case 0xEA:
                _isRemote = false;
                Reply(Acknowledge);
                break;
            case 0xEB:
                Reply(Acknowledge);
                MakePacket();
                break;
            case 0xEC:
                _isWrap = false;
                Reply(Acknowledge);
                break;
            case 0xEE:
                _isWrap = true;
                Reply(Acknowledge);
                break;
            case 0xF0:
                _isRemote = true;
                Reply(Acknowledge);
                break;
            case 0xF2:
                Reply(Acknowledge, _id);
                break;
            case 0xF4:
                _streaming = true;
                Reply(Acknowledge);
                break;
            case 0xF5:
                _streaming = false;
                Reply(Acknowledge);
                break;
            case 0xF6:
                Defaults();
                Reply(Acknowledge);
                break;
            case 0xFE:
                Reply(_lastSent);
                break;
            case 0xFF:
                Defaults();
                Reply(Acknowledge, 0xAA, 0x00);
                break;
            default:
                Reply(Resend);
                break;
        }
    }

    internal void Save(StateWriter writer)
    {
        writer.WriteBytes("mouse.queue", _queue.ToArray());
        writer.Write("mouse.pending", (ulong)_pendingCommand);
        writer.Write("mouse.resolution", (ulong)_resolution);
        writer.Write("mouse.rate", (ulong)_rate);
        writer.Write("mouse.id", (ulong)_id);
        writer.Write("mouse.rateHistory", (ulong)_rateHistory);
        writer.Write("mouse.streaming", _streaming);
        writer.Write("mouse.remote", _isRemote);
        writer.Write("mouse.wrap", _isWrap);
        writer.Write("mouse.scale2", _scale2);
        writer.Write("mouse.buttons", (ulong)_buttons);
        writer.Write("mouse.sentButtons", (ulong)_sentButtons);
        writer.Write("mouse.lastSent", (ulong)_lastSent);
    }

    internal void Load(StateReader reader)
    {
        ReadOnlySpan<byte> queue = reader.ReadBytes("mouse.queue");
        if (queue.Length > 64)
        {
            throw new StateException($"{reader.Section}.mouse.queue: {queue.Length} bytes");
        }

        _queue.Clear();
        foreach (byte value in queue)
        {
            _queue.Enqueue(value);
        }

        _pendingCommand = reader.ReadByte("mouse.pending");
        _resolution = reader.ReadByte("mouse.resolution");
        _rate = reader.ReadByte("mouse.rate");
        _id = reader.ReadByte("mouse.id");
        _rateHistory = (int)reader.ReadBounded("mouse.rateHistory", 0xFF_FFFF);
        _streaming = reader.ReadBoolean("mouse.streaming");
        _isRemote = reader.ReadBoolean("mouse.remote");
        _isWrap = reader.ReadBoolean("mouse.wrap");
        _scale2 = reader.ReadBoolean("mouse.scale2");
        _buttons = (PointerButtons)reader.ReadBounded("mouse.buttons", 31);
        _sentButtons = (PointerButtons)reader.ReadBounded("mouse.sentButtons", 31);
        _lastSent = reader.ReadByte("mouse.lastSent");
        _dx = _dy = _dz = 0;
    }

    private void Argument(byte command, byte value)
    {
        if (command == 0xE8)
        {
            if (value > 3)
            {
                Reply(Resend);
                return;
            }

            _resolution = value;
            Reply(Acknowledge);
            return;
        }

        if (value is not (10 or 20 or 40 or 60 or 80 or 100 or 200))
        {
            Reply(Resend);
            return;
        }

        _rate = value;
        _rateHistory = ((_rateHistory << 8) | value) & 0xFF_FFFF;
        if (_rateHistory == ((200 << 16) | (100 << 8) | 80))
        {
            _id = 3;
        }
        else if (_rateHistory == ((200 << 16) | (200 << 8) | 80) && _id != 0)
        {
            _id = 4;
        }

        Reply(Acknowledge);
    }

    private void Defaults()
    {
        _queue.Clear();
        _pendingCommand = 0;
        _resolution = 2;
        _rate = 100;
        _id = 0;
        _rateHistory = 0;
        _streaming = false;
        _isRemote = false;
        _isWrap = false;
        _scale2 = false;
        _dx = _dy = _dz = 0;
    }

    // A command empties what was on its way: the host has asked for an answer.
    private void Reply(params ReadOnlySpan<byte> bytes)
    {
        _queue.Clear();
        foreach (byte value in bytes)
        {
            _queue.Enqueue(value);
        }
    }

    private static int Scale(int value)
    {
        int size = Math.Abs(value) switch { 0 => 0, 1 => 1, 2 => 1, 3 => 3, 4 => 6, 5 => 9, _ => 2 * Math.Abs(value) };
        return value < 0 ? -size : size;
    }

    private void MakePacket()
    {
        if (_queue.Count > 32)
        {
            return;
        }

        int limit = _scale2 && !_isRemote ? 127 : 255;
        int dx = Math.Clamp(_dx, -limit, limit);
        int dy = Math.Clamp(_dy, -limit, limit);
        _dx -= dx;
        _dy -= dy;
        if (_scale2 && !_isRemote)
        {
            dx = Scale(dx);
            dy = Scale(dy);
        }

        byte first = (byte)(
            0x08 | ((_buttons & PointerButtons.Left) != 0 ? 1 : 0) | ((_buttons & PointerButtons.Right) != 0 ? 2 : 0) |
            ((_buttons & PointerButtons.Middle) != 0 ? 4 : 0) | (dx < 0 ? 0x10 : 0) | (dy < 0 ? 0x20 : 0));
        _queue.Enqueue(first);
        _queue.Enqueue((byte)dx);
        _queue.Enqueue((byte)dy);
        if (_id == 3)
        {
            int dz = Math.Clamp(_dz, -127, 127);
            _dz -= dz;
            _queue.Enqueue((byte)dz);
        }
        else if (_id == 4)
        {
            int dz = Math.Clamp(_dz, -8, 7);
            _dz -= dz;
            _queue.Enqueue((byte)(
                (dz & 0x0F) | ((_buttons & PointerButtons.Back) != 0 ? 0x10 : 0) |
                ((_buttons & PointerButtons.Forward) != 0 ? 0x20 : 0)));
        }
        else
        {
            _dz = 0;
        }

        _sentButtons = _buttons;
    }
}

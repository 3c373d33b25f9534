// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Legacy;

namespace Vmm.Devices.Input;

// Theory. The keyboard controller of the AT and PS/2 (IBM PS/2 Hardware Interface Technical Reference, "Keyboard and
// Auxiliary Device Controller", 1988): a data port 0x60, a command and status port 0x64, and two serial links, to a
// keyboard and to a mouse. It has one output buffer. A byte gets there from the controller itself (answers to
// commands), from the keyboard, or from the mouse, in that order of preference; while it is full, devices wait. IRQ 1
// or IRQ 12 is asserted while the buffer holds a byte of that origin and the configuration byte enables it; reading
// 0x60 empties the buffer, and the next byte, if any, makes a new edge.
//
// The controller translates the keyboard's scan code set 2 to set 1 while configuration bit 6 is set, as every BIOS
// leaves it. The devices are Ps2Keyboard and Ps2Mouse; all three share one gate.
//
// Links have no speed: a byte that a guest sends is answered before the OUT instruction ends.

/// <summary>Keyboard controller with keyboard and mouse. See the theory at the top of this file.</summary>
public sealed class I8042 : IDevice
{
    /// <summary>Data port.</summary>
    public const ushort DataPort = 0x60;

    /// <summary>Command and status port.</summary>
    public const ushort CommandPort = 0x64;

    private const byte StatusFull = 1 << 0;
    private const byte StatusSystem = 1 << 2;
    private const byte StatusCommand = 1 << 3;
    private const byte StatusUnlocked = 1 << 4;
    private const byte StatusMouse = 1 << 5;

    private const byte ConfigKeyboardIrq = 1 << 0;
    private const byte ConfigMouseIrq = 1 << 1;
    private const byte ConfigSystem = 1 << 2;
    private const byte ConfigKeyboardOff = 1 << 4;
    private const byte ConfigMouseOff = 1 << 5;
    private const byte ConfigTranslate = 1 << 6;

    private readonly Lock _gate = new();
    private readonly IIrqLine _irq1;
    private readonly IIrqLine _irq12;
    private readonly ISystemControl _system;
    private readonly Queue<(byte Value, bool IsMouse)> _answers = new();
    private readonly byte[] _ram = new byte[32];
    private byte _config;
    private byte _command;
    private byte _pendingCommand;
    private byte _outputPort;
    private bool _movedA20;
    private byte _buffer;
    private bool _full;
    private bool _fromMouse;
    private bool _lastWasCommand;
    private bool _breakPrefix;
    private bool _paused = true;

    /// <summary>Makes the controller and its two devices.</summary>
    /// <param name="clock">Guest time, for typematic repeat.</param>
    /// <param name="irq1">Keyboard interrupt.</param>
    /// <param name="irq12">Mouse interrupt.</param>
    /// <param name="system">Asked for resets and told of A20.</param>
    public I8042(IClock clock, IIrqLine irq1, IIrqLine irq12, ISystemControl system)
    {
        _irq1 = irq1;
        _irq12 = irq12;
        _system = system;
        Keyboard = new Ps2Keyboard(_gate, clock, Pump);
        Mouse = new Ps2Mouse(_gate, Pump);
        Data = new PortWindow(this, isCommand: false);
        Command = new PortWindow(this, isCommand: true);
    }

    /// <inheritdoc/>
    public string Id => "i8042";

    /// <inheritdoc/>
    public int StateVersion => 2;

    /// <summary>One port for <see cref="DataPort"/>.</summary>
    public IRegisterWindow Data { get; }

    /// <summary>One port for <see cref="CommandPort"/>.</summary>
    public IRegisterWindow Command { get; }

    /// <summary>The keyboard.</summary>
    public Ps2Keyboard Keyboard { get; }

    /// <summary>The mouse.</summary>
    public Ps2Mouse Mouse { get; }

    /// <inheritdoc/>
    public void Reset()
    {
        lock (_gate)
        {
            Array.Clear(_ram);
            _answers.Clear();

            // What a BIOS finds: everything enabled, translation on. The system flag is set by the self test.
            _config = ConfigKeyboardIrq | ConfigTranslate;
            _command = 0;
            _pendingCommand = 0;
            _outputPort = 0x03;
            _full = false;
            _lastWasCommand = false;
            _breakPrefix = false;
            Keyboard.PowerOn();
            Mouse.PowerOn();
            Drive();
        }
    }

    /// <inheritdoc/>
    public void Pause()
    {
        lock (_gate)
        {
            _paused = true;
            Keyboard.Pause(true);
        }
    }

    /// <inheritdoc/>
    public void Resume()
    {
        lock (_gate)
        {
            _paused = false;
            Keyboard.Pause(false);
            Pump();
        }
    }

    /// <inheritdoc/>
    public void Save(StateWriter writer)
    {
        lock (_gate)
        {
            Span<byte> answers = stackalloc byte[_answers.Count * 2];
            int at = 0;
            foreach ((byte value, bool isMouse) in _answers)
            {
                answers[at++] = value;
                answers[at++] = isMouse ? (byte)1 : (byte)0;
            }

            writer.WriteBytes("answers", answers);
            writer.WriteBytes("ram", _ram);
            writer.Write("config", (ulong)_config);
            writer.Write("command", (ulong)_command);
            writer.Write("pendingCommand", (ulong)_pendingCommand);
            writer.Write("outputPort", (ulong)_outputPort);
            writer.Write("buffer", (ulong)_buffer);
            writer.Write("full", _full);
            writer.Write("fromMouse", _fromMouse);
            writer.Write("lastWasCommand", _lastWasCommand);
            writer.Write("breakPrefix", _breakPrefix);
            Keyboard.Save(writer);
            Mouse.Save(writer);
        }
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        lock (_gate)
        {
            ReadOnlySpan<byte> answers = reader.ReadBytes("answers");
            if (answers.Length > 64 || (answers.Length & 1) != 0)
            {
                throw new StateException($"{Id}.answers: {answers.Length} bytes");
            }

            _answers.Clear();
            for (int i = 0; i < answers.Length; i += 2)
            {
                _answers.Enqueue((answers[i], answers[i + 1] != 0));
            }

            reader.ReadBytes("ram", _ram);
            _config = reader.ReadByte("config");
            _command = reader.ReadByte("command");
            _pendingCommand = reader.ReadByte("pendingCommand");
            _outputPort = reader.ReadByte("outputPort");
            _buffer = reader.ReadByte("buffer");
            _full = reader.ReadBoolean("full");
            _fromMouse = reader.ReadBoolean("fromMouse");
            _lastWasCommand = reader.ReadBoolean("lastWasCommand");
            _breakPrefix = reader.ReadBoolean("breakPrefix");
            Keyboard.Load(reader, version);
            Mouse.Load(reader);
            Drive();
        }
    }

    /// <inheritdoc/>
    public void Dispose() => Keyboard.Dispose();

    private byte ReadData()
    {
        byte value = _buffer;
        if (_full)
        {
            _full = false;
            Drive();
            Pump();
        }

        return value;
    }

    private byte ReadStatus() => (byte)(
        (_full ? StatusFull : 0) | (_full && _fromMouse ? StatusMouse : 0) | StatusUnlocked |
        ((_config & ConfigSystem) != 0 ? StatusSystem : 0) | (_lastWasCommand ? StatusCommand : 0));

    private void WriteData(byte value)
    {
        _lastWasCommand = false;
        byte command = _pendingCommand;
        _pendingCommand = 0;
        switch (command)
        {
            case 0x60:
                _config = (byte)(value & 0x7F);
                break;
            case > 0x60 and < 0x80:
                _ram[command - 0x60] = value;
                break;
            case 0xD1:
                SetOutputPort(value);
                break;
            case 0xD2:
                Answer(value, isMouse: false);
                break;
            case 0xD3:
                Answer(value, isMouse: true);
                break;
            case 0xD4:
                // Sending to a device enables its link.
                _config &= unchecked((byte)~ConfigMouseOff);
                Mouse.Command(value);
                break;
            default:
                _config &= unchecked((byte)~ConfigKeyboardOff);
                Keyboard.Command(value);
                break;
        }

        Drive();
        Pump();
    }

    // Returns true when the processor is to be reset.
    private bool WriteCommand(byte value)
    {
        bool reset = false;
        _lastWasCommand = true;
        _command = value;
        _pendingCommand = 0;
        switch (value)
        {
            case 0x20:
                Answer(_config);
                break;
            case > 0x20 and < 0x40:
                Answer(_ram[value - 0x20]);
                break;
            case >= 0x60 and < 0x80:
            case 0xD1:
            case 0xD2:
            case 0xD3:
            case 0xD4:
                _pendingCommand = value;
                break;
            case 0xA7:
                _config |= ConfigMouseOff;
                break;
            case 0xA8:
                _config &= unchecked((byte)~ConfigMouseOff);
                break;
            case 0xA9:
            case 0xAB:
                // The link works.
                Answer(0x00);
                break;
            case 0xAA:
                _config |= ConfigSystem;
                Answer(0x55);
                break;
            case 0xAD:
                _config |= ConfigKeyboardOff;
                break;
            case 0xAE:
                _config &= unchecked((byte)~ConfigKeyboardOff);
                break;
            case 0xC0:
                Answer(0x80);
                break;
            case 0xD0:
                Answer((byte)((_outputPort & 0x01) | (_system.IsA20Open ? 2 : 0) | (_full && !_fromMouse ? 0x10 : 0) | (_full && _fromMouse ? 0x20 : 0)));
                break;
            case 0xDD:
                SetOutputPort((byte)(_outputPort & ~2));
                break;
            case 0xDF:
                SetOutputPort((byte)(_outputPort | 2));
                break;
            case >= 0xF0:
                // Pulses the output port's low bits that are 0 in the command; bit 0 is the processor's reset.
                reset = (value & 1) == 0;
                break;
            default:
                break;
        }

        Drive();
        Pump();
        return reset;
    }

    private void SetOutputPort(byte value)
    {
        _outputPort = value;
        _movedA20 = true;
    }

    private void Answer(byte value, bool isMouse = false)
    {
        // A guest that never reads cannot make this grow.
        if (_answers.Count < 16)
        {
            _answers.Enqueue((value, isMouse));
        }
    }

    // Under the gate: fills the output buffer if it is empty.
    private void Pump()
    {
        while (!_full && !_paused)
        {
            byte value;
            if (_answers.TryDequeue(out (byte Value, bool IsMouse) answer))
            {
                _buffer = answer.Value;
                _fromMouse = answer.IsMouse;
            }
            else if ((_config & ConfigKeyboardOff) == 0 && Keyboard.TryTake(out value))
            {
                if ((_config & ConfigTranslate) != 0)
                {
                    if (value == 0xF0)
                    {
                        _breakPrefix = true;
                        continue;
                    }

                    value = ScanCodes.Translate(value, _breakPrefix);
                    _breakPrefix = false;
                }

                _buffer = value;
                _fromMouse = false;
            }
            else if ((_config & ConfigMouseOff) == 0 && Mouse.TryTake(out value))
            {
                _buffer = value;
                _fromMouse = true;
            }
            else
            {
                return;
            }

            _full = true;
            Drive();
        }
    }

    private void Drive()
    {
        _irq1.Set(_full && !_fromMouse && (_config & ConfigKeyboardIrq) != 0);
        _irq12.Set(_full && _fromMouse && (_config & ConfigMouseIrq) != 0);
    }

    private sealed class PortWindow : IRegisterWindow
    {
        private readonly I8042 _owner;
        private readonly bool _isCommand;

        public PortWindow(I8042 owner, bool isCommand)
        {
            _owner = owner;
            _isCommand = isCommand;
        }

        public uint Length => 1;

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_owner._gate)
            {
                return _isCommand ? _owner.ReadStatus() : _owner.ReadData();
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            bool reset = false;
            byte after;
            bool movedA20;
            lock (_owner._gate)
            {
                if (_isCommand)
                {
                    reset = _owner.WriteCommand((byte)value);
                }
                else
                {
                    _owner.WriteData((byte)value);
                }

                after = _owner._outputPort;
                movedA20 = _owner._movedA20;
                _owner._movedA20 = false;
                if ((after & 1) == 0)
                {
                    reset = true;
                    _owner._outputPort |= 1;
                }
            }

            if (movedA20)
            {
                _owner._system.SetA20((after & 2) != 0);
            }

            if (reset)
            {
                _owner._system.Request(SystemRequest.ProcessorReset, "the keyboard controller");
            }
        }
    }
}

/// <summary>Scan code sets 1 and 2 (PS/2 Hardware Interface Technical Reference, "Keyboard scan codes").</summary>
internal static class ScanCodes
{
    // Set 2 to set 1 for codes 0x00..0x7F, as the 8042's ROM has it.
    private static ReadOnlySpan<byte> Set2To1 =>
    [
        0xFF, 0x43, 0x41, 0x3F, 0x3D, 0x3B, 0x3C, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3E, 0x0F, 0x29, 0x59,
        0x65, 0x38, 0x2A, 0x70, 0x1D, 0x10, 0x02, 0x5A, 0x66, 0x71, 0x2C, 0x1F, 0x1E, 0x11, 0x03, 0x5B,
        0x67, 0x2E, 0x2D, 0x20, 0x12, 0x05, 0x04, 0x5C, 0x68, 0x39, 0x2F, 0x21, 0x14, 0x13, 0x06, 0x5D,
        0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5E, 0x6A, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5F,
        0x6B, 0x33, 0x25, 0x17, 0x18, 0x0B, 0x0A, 0x60, 0x6C, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0C, 0x61,
        0x6D, 0x73, 0x28, 0x74, 0x1A, 0x0D, 0x62, 0x6E, 0x3A, 0x36, 0x1C, 0x1B, 0x75, 0x2B, 0x63, 0x76,
        0x55, 0x56, 0x77, 0x78, 0x79, 0x7A, 0x0E, 0x7B, 0x7C, 0x4F, 0x7D, 0x4B, 0x47, 0x7E, 0x7F, 0x6F,
        0x52, 0x53, 0x50, 0x4C, 0x4D, 0x48, 0x01, 0x45, 0x57, 0x4E, 0x51, 0x4A, 0x37, 0x49, 0x46, 0x54,
    ];

    /// <summary>What the controller makes of a byte of the keyboard.</summary>
    public static byte Translate(byte value, bool isBreak)
    {
        byte translated = value < 0x80 ? Set2To1[value] : value switch { 0x83 => (byte)0x41, 0x84 => (byte)0x54, _ => value };
        return isBreak && translated < 0x80 ? (byte)(translated | 0x80) : translated;
    }

    /// <summary>The set 2 code of a set 1 code (without prefix), or 0.</summary>
    public static byte ToSet2(byte set1)
    {
        // F7 is the one key of the original keyboard whose code lies outside the table.
        if (set1 == 0x41)
        {
            return 0x83;
        }

        int at = Set2To1.IndexOf(set1);
        return at > 0 ? (byte)at : (byte)0;
    }

    /// <summary>Appends what a keyboard sends for a key.</summary>
    public static int Encode(HidKey key, bool pressed, int set, Span<byte> into)
    {
        int code = HidKeys.ToSet1(key);
        if (code == 0)
        {
            return 0;
        }

        // Pause has no break code and sends both at once; Print Screen brings a shift of its own.
        if (key == HidKey.Pause)
        {
            ReadOnlySpan<byte> pause = set == 1
                ? [0xE1, 0x1D, 0x45, 0xE1, 0x9D, 0xC5]
                : [0xE1, 0x14, 0x77, 0xE1, 0xF0, 0x14, 0xF0, 0x77];
            pause.CopyTo(into);
            return pressed ? pause.Length : 0;
        }

        if (key == HidKey.PrintScreen)
        {
            ReadOnlySpan<byte> print = (set, pressed) switch
            {
                (1, true) => [0xE0, 0x2A, 0xE0, 0x37],
                (1, false) => [0xE0, 0xB7, 0xE0, 0xAA],
                (_, true) => [0xE0, 0x12, 0xE0, 0x7C],
                _ => [0xE0, 0xF0, 0x7C, 0xE0, 0xF0, 0x12],
            };
            print.CopyTo(into);
            return print.Length;
        }

        int length = 0;
        if (code > 0xFF)
        {
            into[length++] = 0xE0;
        }

        // Hangul and Hanja (0xF1, 0xF2) are single codes without break.
        if (code is 0xF1 or 0xF2)
        {
            into[length++] = (byte)code;
            return pressed ? length : 0;
        }

        byte plain = (byte)code;
        if (set == 1)
        {
            into[length++] = (byte)(pressed ? plain : plain | 0x80);
            return length;
        }

        byte set2 = ToSet2(plain);
        if (set2 == 0)
        {
            return 0;
        }

        if (!pressed)
        {
            into[length++] = 0xF0;
        }

        into[length++] = set2;
        return length;
    }
}

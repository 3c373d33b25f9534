// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Legacy;

// Theory. The PC's two DMA controllers (Intel 8237A-5 data sheet, order number 231466) with their page registers:
// channels 0..3 move bytes within a 64 KiB page, channels 4..7 words within 128 KiB; channel 4 is the cascade. Ports:
//
//   00..0F   first controller      C0..DF   second controller, every second port      80..8F   page registers
//
// A device (the floppy controller, a sound card) holds an IsaDmaChannel and asks it to move a buffer in the direction
// that the device needs; the channel moves what the guest programmed, up to the terminal count. There is no bus timing:
// a transfer takes no time, in whatever mode (single, block, demand) the channel is in. A request that meets a masked
// channel is remembered; the device is called back when the guest unmasks it.
//
// Locks: one gate for both controllers. Devices call under their own gate; callbacks are made without ours.

/// <summary>A device's side of an ISA DMA channel.</summary>
public interface IIsaDmaChannel
{
    /// <summary>Called when a channel that refused a request becomes usable; any thread, no lock held.</summary>
    Action? Unmasked { get; set; }

    /// <summary>Moves bytes from the device to memory.</summary>
    /// <param name="data">What the device has.</param>
    /// <param name="terminalCount">The programmed count is used up.</param>
    /// <returns>Bytes moved; 0 while the channel is masked, not programmed or set the other way.</returns>
    int ToMemory(ReadOnlySpan<byte> data, out bool terminalCount);

    /// <summary>Moves bytes from memory to the device.</summary>
    /// <param name="data">What the device has room for.</param>
    /// <param name="terminalCount">The programmed count is used up.</param>
    /// <returns>Bytes moved; 0 while the channel is masked, not programmed or set the other way.</returns>
    int FromMemory(Span<byte> data, out bool terminalCount);
}

/// <summary>Both 8237A controllers and the page registers of a PC.</summary>
public sealed class I8237 : IDevice
{
    private const byte CommandDisable = 1 << 2;
    private const byte ModeDecrement = 1 << 5;
    private const byte ModeAutoInitialize = 1 << 4;

    private readonly Lock _gate = new();
    private readonly IDmaPort _memory;
    private readonly Channel[] _channels = new Channel[8];
    private readonly byte[] _pages = new byte[16];
    private readonly byte[] _command = new byte[2];
    private readonly byte[] _status = new byte[2];
    private readonly bool[] _flipFlop = new bool[2];
    private readonly byte[] _mask = new byte[2];

    /// <summary>Makes the controllers.</summary>
    /// <param name="memory">Guest memory.</param>
    public I8237(IDmaPort memory)
    {
        _memory = memory;
        for (int i = 0; i < _channels.Length; i++)
        {
            _channels[i] = new Channel(this, i);
        }

        First = new ControllerWindow(this, 0);
        Second = new ControllerWindow(this, 1);
        Pages = new PageWindow(this);
        Reset();
    }

    /// <inheritdoc/>
    public string Id => "dma";

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <summary>16 ports at 00h.</summary>
    public IRegisterWindow First { get; }

    /// <summary>32 ports at C0h.</summary>
    public IRegisterWindow Second { get; }

    /// <summary>15 ports at 81h. Port 80h is left to whoever shows power-on codes; its register reads back nowhere.</summary>
    public IRegisterWindow Pages { get; }

    /// <summary>A channel for a device.</summary>
    /// <param name="number">0..3 and 5..7.</param>
    public IIsaDmaChannel this[int number] => _channels[number];

    /// <inheritdoc/>
    public void Reset()
    {
        lock (_gate)
        {
            Array.Clear(_pages);
            foreach (Channel channel in _channels)
            {
                channel.Clear();
            }

            MasterClear(0);
            MasterClear(1);
        }
    }

    /// <inheritdoc/>
    public void Pause()
    {
    }

    /// <inheritdoc/>
    public void Resume()
    {
    }

    /// <inheritdoc/>
    public void Save(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_gate)
        {
            writer.WriteBytes("pages", _pages);
            writer.WriteBytes(
                "control",
                [
                    _command[0], _command[1], _status[0], _status[1], _mask[0], _mask[1],
                    _flipFlop[0] ? (byte)1 : (byte)0, _flipFlop[1] ? (byte)1 : (byte)0,
                ]);
            for (int i = 0; i < _channels.Length; i++)
            {
                Channel channel = _channels[i];
                writer.Write(
                    $"channel{i}",
                    channel.BaseAddress | ((ulong)channel.BaseCount << 16) | ((ulong)channel.Address << 32)
                    | ((ulong)channel.Count << 48));
                writer.Write($"mode{i}", channel.Mode);
                writer.Write($"wanted{i}", channel.IsWanted);
            }
        }
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        Span<byte> control = stackalloc byte[8];
        lock (_gate)
        {
            reader.ReadBytes("pages", _pages);
            reader.ReadBytes("control", control);
            for (int i = 0; i < 2; i++)
            {
                _command[i] = control[i];
                _status[i] = control[2 + i];
                _mask[i] = (byte)(control[4 + i] & 0x0F);
                _flipFlop[i] = control[6 + i] != 0;
            }

            for (int i = 0; i < _channels.Length; i++)
            {
                Channel channel = _channels[i];
                ulong packed = reader.ReadUInt64($"channel{i}");
                channel.BaseAddress = (ushort)packed;
                channel.BaseCount = (ushort)(packed >> 16);
                channel.Address = (ushort)(packed >> 32);
                channel.Count = (ushort)(packed >> 48);
                channel.Mode = reader.ReadByte($"mode{i}");
                channel.IsWanted = reader.ReadBoolean($"wanted{i}");
            }
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
    }

    private byte Read(int chip, int register)
    {
        lock (_gate)
        {
            if (register < 8)
            {
                Channel channel = _channels[(chip * 4) + (register >> 1)];
                ushort value = (register & 1) == 0 ? channel.Address : channel.Count;
                bool isHigh = _flipFlop[chip];
                _flipFlop[chip] = !isHigh;
                return (byte)(isHigh ? value >> 8 : value);
            }

            if (register == 8)
            {
                // Terminal count bits clear when read; request bits show the lines.
                byte value = _status[chip];
                _status[chip] = 0;
                for (int i = 0; i < 4; i++)
                {
                    value |= _channels[(chip * 4) + i].IsWanted ? (byte)(0x10 << i) : (byte)0;
                }

                return value;
            }

            // All mask bits (an extension of the PC's chip sets), else the temporary register.
            return register == 15 ? (byte)(_mask[chip] | 0xF0) : (byte)0;
        }
    }

    private void Write(int chip, int register, byte value)
    {
        Action?[] calls = new Action?[4];
        lock (_gate)
        {
            byte before = _mask[chip];
            byte commandBefore = _command[chip];
            WriteRegister(chip, register, value);
            bool isOff = (_command[chip] & CommandDisable) != 0;
            bool wasOff = (commandBefore & CommandDisable) != 0;
            for (int i = 0; i < 4 && !isOff; i++)
            {
                Channel channel = _channels[(chip * 4) + i];
                bool isOpen = ((_mask[chip] >> i) & 1) == 0;
                bool wasOpen = ((before >> i) & 1) == 0 && !wasOff;
                if (isOpen && !wasOpen && channel.IsWanted)
                {
                    channel.IsWanted = false;
                    calls[i] = channel.Unmasked;
                }
            }
        }

        foreach (Action? call in calls)
        {
            call?.Invoke();
        }
    }

    private void WriteRegister(int chip, int register, byte value)
    {
        if (register < 8)
        {
            Channel channel = _channels[(chip * 4) + (register >> 1)];
            bool isHigh = _flipFlop[chip];
            _flipFlop[chip] = !isHigh;
            if ((register & 1) == 0)
            {
                channel.BaseAddress = Merge(channel.BaseAddress, value, isHigh);
                channel.Address = channel.BaseAddress;
            }
            else
            {
                channel.BaseCount = Merge(channel.BaseCount, value, isHigh);
                channel.Count = channel.BaseCount;
            }

            return;
        }

        byte bit = (byte)(1 << (value & 3));
        switch (register)
        {
            case 8:
                _command[chip] = value;
                break;
            case 10:
                _mask[chip] = (byte)((value & 4) != 0 ? _mask[chip] | bit : _mask[chip] & ~bit);
                break;
            case 11:
                _channels[(chip * 4) + (value & 3)].Mode = value;
                break;
            case 12:
                _flipFlop[chip] = false;
                break;
            case 13:
                MasterClear(chip);
                break;
            case 14:
                _mask[chip] = 0;
                break;
            case 15:
                _mask[chip] = (byte)(value & 0x0F);
                break;
            default:
                // Register 9 requests memory-to-memory transfers, which the PC's wiring does not have.
                break;
        }
    }

    private void MasterClear(int chip)
    {
        _command[chip] = 0;
        _status[chip] = 0;
        _flipFlop[chip] = false;
        _mask[chip] = 0x0F;
    }

    private static ushort Merge(ushort old, byte value, bool isHigh) =>
        isHigh ? (ushort)((old & 0x00FF) | (value << 8)) : (ushort)((old & 0xFF00) | value);

    // Port 81h is channel 2's page, 82h 3, 83h 1, 87h 0; 89h 6, 8Ah 7, 8Bh 5, 8Fh 4 (IBM PC/AT Technical Reference).
    private static int PageIndex(int channel) => channel switch
    {
        0 => 0x7,
        1 => 0x3,
        2 => 0x1,
        3 => 0x2,
        4 => 0xF,
        5 => 0xB,
        6 => 0x9,
        _ => 0xA,
    };

    private int Move(Channel channel, Span<byte> into, ReadOnlySpan<byte> from, out bool terminalCount)
    {
        terminalCount = false;
        int number = channel.Number;
        int chip = number >> 2;
        bool isWrite = !from.IsEmpty;
        lock (_gate)
        {
            int type = (channel.Mode >> 2) & 3;
            bool isOpen = ((_mask[chip] >> (number & 3)) & 1) == 0 && (_command[chip] & CommandDisable) == 0;
            if (!isOpen)
            {
                channel.IsWanted = true;
                return 0;
            }

            // 00 verify, 01 write to memory, 10 read from memory.
            if (type == 3 || (type == 1 && !isWrite) || (type == 2 && isWrite))
            {
                return 0;
            }

            channel.IsWanted = false;
            int unit = number < 4 ? 1 : 2;
            int length = (isWrite ? from.Length : into.Length) / unit * unit;
            long left = (channel.Count + 1L) * unit;
            int moved = (int)Math.Min(length, left);
            if (type != 0)
            {
                Copy(channel, unit, into, from, moved);
            }

            int units = moved / unit;
            bool isDown = (channel.Mode & ModeDecrement) != 0;
            channel.Address = (ushort)(isDown ? channel.Address - units : channel.Address + units);
            channel.Count = (ushort)(channel.Count - units);
            terminalCount = moved == left;
            if (terminalCount)
            {
                _status[chip] |= (byte)(1 << (number & 3));
                if ((channel.Mode & ModeAutoInitialize) != 0)
                {
                    channel.Address = channel.BaseAddress;
                    channel.Count = channel.BaseCount;
                }
                else
                {
                    _mask[chip] |= (byte)(1 << (number & 3));
                }
            }

            return moved;
        }
    }

    private void Copy(Channel channel, int unit, Span<byte> into, ReadOnlySpan<byte> from, int length)
    {
        ulong page = _pages[PageIndex(channel.Number)];
        page = unit == 1 ? page << 16 : (page & 0xFE) << 16;
        bool isDown = (channel.Mode & ModeDecrement) != 0;
        ushort address = channel.Address;
        int at = 0;
        while (at < length)
        {
            // As far as the 16-bit counter runs without wrapping; downwards one unit at a time.
            int run = isDown ? unit : Math.Min(length - at, (0x10000 - address) * unit);
            ulong where = page + ((ulong)address * (uint)unit);
            if (from.IsEmpty)
            {
                Span<byte> part = into.Slice(at, run);
                if (!_memory.TryRead(where, part))
                {
                    part.Fill(0xFF);
                }
            }
            else
            {
                _ = _memory.TryWrite(where, from.Slice(at, run));
            }

            at += run;
            address = (ushort)(isDown ? address - 1 : address + (run / unit));
        }
    }

    private sealed class Channel : IIsaDmaChannel
    {
        private readonly I8237 _owner;

        public Channel(I8237 owner, int number)
        {
            _owner = owner;
            Number = number;
        }

        public int Number { get; }

        public ushort BaseAddress { get; set; }

        public ushort BaseCount { get; set; }

        public ushort Address { get; set; }

        public ushort Count { get; set; }

        public byte Mode { get; set; }

        public bool IsWanted { get; set; }

        public Action? Unmasked { get; set; }

        public int ToMemory(ReadOnlySpan<byte> data, out bool terminalCount)
        {
            terminalCount = false;
            return data.IsEmpty ? 0 : _owner.Move(this, default, data, out terminalCount);
        }

        public int FromMemory(Span<byte> data, out bool terminalCount) => _owner.Move(this, data, default, out terminalCount);

        public void Clear()
        {
            BaseAddress = 0;
            BaseCount = 0;
            Address = 0;
            Count = 0;
            Mode = 0;
            IsWanted = false;
        }
    }

    private sealed class ControllerWindow : IRegisterWindow
    {
        private readonly I8237 _owner;
        private readonly int _chip;

        public ControllerWindow(I8237 owner, int chip)
        {
            _owner = owner;
            _chip = chip;
        }

        public uint Length => _chip == 0 ? 16u : 32u;

        public ulong Read(uint offset, AccessWidth width)
        {
            ulong value = 0;
            for (int i = 0; i < (int)width; i++)
            {
                int at = (int)offset + i;
                byte part = _chip == 1 && (at & 1) != 0 ? (byte)0xFF : _owner.Read(_chip, at >> _chip);
                value |= (ulong)part << (8 * i);
            }

            return value;
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            for (int i = 0; i < (int)width; i++)
            {
                int at = (int)offset + i;
                if (_chip == 0 || (at & 1) == 0)
                {
                    _owner.Write(_chip, at >> _chip, (byte)(value >> (8 * i)));
                }
            }
        }
    }

    private sealed class PageWindow : IRegisterWindow
    {
        private readonly I8237 _owner;

        public PageWindow(I8237 owner) => _owner = owner;

        public uint Length => 15;

        public ulong Read(uint offset, AccessWidth width)
        {
            ulong value = 0;
            lock (_owner._gate)
            {
                for (int i = 0; i < (int)width; i++)
                {
                    value |= (ulong)_owner._pages[offset + 1 + (uint)i] << (8 * i);
                }
            }

            return value;
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            lock (_owner._gate)
            {
                for (int i = 0; i < (int)width; i++)
                {
                    _owner._pages[offset + 1 + (uint)i] = (byte)(value >> (8 * i));
                }
            }
        }
    }
}

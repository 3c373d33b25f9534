// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Legacy;

/// <summary>Told by local APICs that a level-triggered interrupt has ended.</summary>
public interface IEoiListener
{
    /// <summary>Any vCPU thread, no local APIC's gate held.</summary>
    void EndOfInterrupt(byte vector);
}

// Theory. Intel 82093AA I/O APIC (data sheet 290566-001): 24 inputs, each with a 64-bit redirection entry that turns it
// into a message to the local APICs. We report version 0x20 so that guests may end interrupts one by one through the
// EOI register of later chips (ICH9 data sheet §13.5.1).
//
// Level-triggered: a message goes out while the input is asserted and Remote IRR is clear; the EOI clears Remote IRR
// and the input is looked at again. Edge-triggered: a message per rising edge; edges while masked are ignored, as §3.2.4
// says. Polarity is not modelled: every input here is "asserted" or not, and the redirection entry's polarity bit is kept.
//
// The 8259 pair is wired to LINT0 only, not to input 0 as well (MP 1.4 §3.6.2.2 allows either), so an entry with delivery
// mode ExtINT has nothing to stand for and sends nothing. The gate is held while sending (order: device, I/O APIC,
// local APIC).

/// <summary>The I/O APIC. See the theory at the top of this file.</summary>
public sealed class IoApic : IDevice, IRegisterWindow, IEoiListener
{
    /// <summary>Address of the first I/O APIC of a PC.</summary>
    public const ulong DefaultAddress = 0xFEC0_0000;

    private const ulong Masked = 1UL << 16;
    private const ulong Level = 1UL << 15;
    private const ulong RemoteIrr = 1UL << 14;
    private const ulong WritableEntry = 0xFF00_0000_0001_AFFF;
    private const int ExtInt = 7;

    private readonly Lock _gate = new();
    private readonly IMsiSink _sink;
    private readonly ulong[] _entries;
    private readonly bool[] _levels;
    private readonly IIrqLine[] _inputs;
    private readonly byte _initialId;
    private byte _id;
    private byte _select;
    private long _ignoredEdges;

    /// <summary>Makes one.</summary>
    /// <param name="id">APIC identifier 0..15.</param>
    /// <param name="sink">Where messages go.</param>
    /// <param name="pins">Number of inputs, 1..240.</param>
    public IoApic(byte id, IMsiSink sink, int pins = 24)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(pins, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(pins, 240);
        _initialId = (byte)(id & 15);
        _sink = sink;
        _entries = new ulong[pins];
        _levels = new bool[pins];
        _inputs = new IIrqLine[pins];
        Array.Fill(_entries, Masked);
        for (int i = 0; i < pins; i++)
        {
            int pin = i;
            _inputs[i] = new DelegateLine(level => SetInput(pin, level));
        }
    }

    /// <summary>Raised (under the gate) when entries changed; a driver's kernel side may mirror them.</summary>
    public event Action<int, ulong>? EntryChanged;

    /// <inheritdoc/>
    public string Id => "ioapic";

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <inheritdoc/>
    public uint Length => 0x1000;

    /// <summary>Number of inputs.</summary>
    public int Pins => _entries.Length;

    /// <summary>Edges that came while their entry was masked.</summary>
    public long IgnoredEdges => Interlocked.Read(ref _ignoredEdges);

    /// <summary>An input, 0 to <see cref="Pins"/> - 1.</summary>
    public IIrqLine Input(int pin) => _inputs[pin];

    /// <inheritdoc/>
    public void EndOfInterrupt(byte vector)
    {
        lock (_gate)
        {
            for (int i = 0; i < _entries.Length; i++)
            {
                if ((_entries[i] & (RemoteIrr | 0xFF)) == (RemoteIrr | vector))
                {
                    _entries[i] &= ~RemoteIrr;
                    Service(i);
                }
            }
        }
    }

    /// <inheritdoc/>
    public void Reset()
    {
        lock (_gate)
        {
            _id = _initialId;
            _select = 0;
            for (int i = 0; i < _entries.Length; i++)
            {
                _entries[i] = Masked;
                EntryChanged?.Invoke(i, Masked);
            }
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
        lock (_gate)
        {
            writer.Write("id", (ulong)_id);
            writer.Write("select", (ulong)_select);
            for (int i = 0; i < _entries.Length; i++)
            {
                writer.Write($"entry{i}", _entries[i]);
                writer.Write($"level{i}", _levels[i]);
            }
        }
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        lock (_gate)
        {
            _id = (byte)reader.ReadBounded("id", 15);
            _select = reader.ReadByte("select");
            for (int i = 0; i < _entries.Length; i++)
            {
                _entries[i] = reader.ReadUInt64($"entry{i}") & (WritableEntry | RemoteIrr);
                _levels[i] = reader.ReadBoolean($"level{i}");
                EntryChanged?.Invoke(i, _entries[i]);
            }
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
    }

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width)
    {
        lock (_gate)
        {
            uint value = (offset & ~3u) switch
            {
                0x00 => _select,
                0x10 => ReadRegister(),
                _ => 0,
            };
            ulong shifted = value >> (int)(8 * (offset & 3));
            return width >= AccessWidth.Dword ? shifted : shifted & ((1UL << (8 * (int)width)) - 1);
        }
    }

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value)
    {
        if ((offset & 3) != 0)
        {
            return;
        }

        lock (_gate)
        {
            switch (offset)
            {
                case 0x00:
                    _select = (byte)value;
                    return;
                case 0x10 when width >= AccessWidth.Dword:
                    WriteRegister((uint)value);
                    return;
                case 0x40:
                    break;
                default:
                    return;
            }
        }

        EndOfInterrupt((byte)value);
    }

    private uint ReadRegister()
    {
        switch (_select)
        {
            case 0:
            case 2:
                return (uint)_id << 24;
            case 1:
                return 0x20 | ((uint)(_entries.Length - 1) << 16);
        }

        int index = (_select - 0x10) >> 1;
        if (_select < 0x10 || index >= _entries.Length)
        {
            return 0;
        }

        return (uint)(_entries[index] >> ((_select & 1) * 32));
    }

    private void WriteRegister(uint value)
    {
        if (_select == 0)
        {
            _id = (byte)((value >> 24) & 15);
            return;
        }

        int index = (_select - 0x10) >> 1;
        if (_select < 0x10 || index >= _entries.Length)
        {
            return;
        }

        ulong old = _entries[index];
        int shift = (_select & 1) * 32;
        ulong mask = WritableEntry & (0xFFFF_FFFFUL << shift);
        ulong next = (old & ~mask) | (((ulong)value << shift) & mask);
        if ((next & Level) == 0)
        {
            // Remote IRR has no meaning for edge entries; software clears it by switching to edge and back.
            next &= ~RemoteIrr;
        }

        _entries[index] = next;
        EntryChanged?.Invoke(index, next);
        Service(index);
    }

    private void SetInput(int pin, bool level)
    {
        lock (_gate)
        {
            bool rising = level && !_levels[pin];
            _levels[pin] = level;
            if ((_entries[pin] & Level) != 0)
            {
                Service(pin);
            }
            else if (rising)
            {
                if ((_entries[pin] & Masked) != 0)
                {
                    Interlocked.Increment(ref _ignoredEdges);
                }
                else
                {
                    Send(_entries[pin]);
                }
            }
        }
    }

    // Under the gate: sends for a level-triggered entry that is due.
    private void Service(int pin)
    {
        ulong entry = _entries[pin];
        if (_levels[pin] && (entry & (Masked | Level | RemoteIrr)) == Level)
        {
            _entries[pin] |= RemoteIrr;
            Send(entry);
        }
    }

    private void Send(ulong entry)
    {
        uint delivery = (uint)(entry >> 8) & 7;
        uint vector = (byte)entry;
        uint trigger = (entry & Level) != 0 ? 0xC000u : 0;
        if (delivery == ExtInt)
        {
            return;
        }

        uint destination = (uint)(entry >> 56);
        uint logical = (uint)(entry >> 11) & 1;
        _sink.Send(0xFEE0_0000 | (destination << 12) | (logical << 2), vector | (delivery << 8) | trigger);
    }
}

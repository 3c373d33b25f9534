// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Legacy;

// Theory. Intel 8254 programmable interval timer (data sheet 231164-005) at 1193182 Hz, and port 0x61 of the PC, which
// holds the gate and output of counter 2 (speaker).
//
// Nothing counts here. A counter remembers the tick at which it was loaded; its value and its output are functions of
// the ticks since. A counter whose gate is low in modes 0 and 4 remembers how far it had come instead. In modes 2 and
// 3 a new count takes effect at the end of the running period (the chip takes it at the half in mode 3), see Roll.
//
// Counter 0 drives IRQ 0 with one timer per interrupt. In the repeating and strobe modes the rising edge is what
// matters to the PC: the line is pulsed there. In modes 0 and 1 it has the true level. An edge that could not be
// delivered in time is not made up for; edges closer than MinimumPeriodNs are dropped, so that a guest cannot keep the
// host busy with a divisor of 1.

/// <summary>The three counters and port 0x61. See the theory at the top of this file.</summary>
public sealed class I8254 : IDevice, IRegisterWindow
{
    /// <summary>First of the four ports.</summary>
    public const ushort Port = 0x40;

    /// <summary>The speaker port.</summary>
    public const ushort SpeakerPort = 0x61;

    /// <summary>Input clock in Hz.</summary>
    public const long FrequencyHz = 1193182;

    /// <summary>Shortest time between two interrupts.</summary>
    public const long MinimumPeriodNs = 50_000;

    private readonly Lock _gate = new();
    private readonly Counter[] _counters = [new(), new(), new()];
    private readonly IClock _clock;
    private readonly IIrqLine _irq;
    private readonly IGuestTimer _timer;
    private bool _paused = true;
    private bool _speaker;
    private byte _nmiMask;

    /// <summary>Makes the chip.</summary>
    /// <param name="clock">Guest time.</param>
    /// <param name="irq">IRQ 0.</param>
    public I8254(IClock clock, IIrqLine irq)
    {
        ArgumentNullException.ThrowIfNull(clock);
        _clock = clock;
        _irq = irq;
        _timer = clock.CreateTimer("pit", OnTimer);
        SpeakerWindow = new SpeakerPortWindow(this);
    }

    /// <inheritdoc/>
    public string Id => "pit";

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <inheritdoc/>
    public uint Length => 4;

    /// <summary>One port for <see cref="SpeakerPort"/>.</summary>
    public IRegisterWindow SpeakerWindow { get; }

    private long NowTicks => ToTicks(_clock.NowNs);

    /// <inheritdoc/>
    public void Reset()
    {
        lock (_gate)
        {
            // The data sheet leaves modes undefined at power-on; a PC's counters stand in mode 3 with a full count
            // when its BIOS is done, and counter 2 is gated off.
            long now = NowTicks;
            for (int i = 0; i < 3; i++)
            {
                _counters[i] = new Counter { Gate = i != 2, Mode = 3, Access = 3, Start = now, IsLoaded = i != 2 };
            }

            _speaker = false;
            _nmiMask = 0;
            Drive(now);
        }
    }

    /// <inheritdoc/>
    public void Pause()
    {
        lock (_gate)
        {
            _paused = true;
            _timer.Cancel();
        }
    }

    /// <inheritdoc/>
    public void Resume()
    {
        lock (_gate)
        {
            _paused = false;
            Drive(NowTicks);
        }
    }

    /// <inheritdoc/>
    public void Save(StateWriter writer)
    {
        lock (_gate)
        {
            long now = NowTicks;
            for (int i = 0; i < 3; i++)
            {
                _counters[i].Save(writer, $"c{i}.", now);
            }

            writer.Write("speaker", _speaker);
            writer.Write("nmiMask", (ulong)_nmiMask);
        }
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        lock (_gate)
        {
            long now = NowTicks;
            for (int i = 0; i < 3; i++)
            {
                _counters[i].Load(reader, $"c{i}.", now);
            }

            _speaker = reader.ReadBoolean("speaker");
            _nmiMask = (byte)reader.ReadBounded("nmiMask", 0x0C);
            Drive(now);
        }
    }

    /// <inheritdoc/>
    public void Dispose() => _timer.Dispose();

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width)
    {
        lock (_gate)
        {
            ulong value = 0;
            for (int i = 0; i < (int)width; i++)
            {
                uint at = offset + (uint)i;
                ulong part = at < 3 ? _counters[at].Read(NowTicks) : (byte)0xFF;
                value |= part << (8 * i);
            }

            return value;
        }
    }

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value)
    {
        lock (_gate)
        {
            for (int i = 0; i < (int)width; i++)
            {
                WriteByte(offset + (uint)i, (byte)(value >> (8 * i)));
            }
        }
    }

    private static long ToTicks(long ns)
    {
        long seconds = ns / 1_000_000_000;
        return (seconds * FrequencyHz) + ((ns - (seconds * 1_000_000_000)) * FrequencyHz / 1_000_000_000);
    }

    // The first nanosecond at which ToTicks gives at least this tick.
    private static long ToNs(long ticks)
    {
        long seconds = ticks / FrequencyHz;
        long rest = ticks - (seconds * FrequencyHz);
        return (seconds * 1_000_000_000) + (((rest * 1_000_000_000) + FrequencyHz - 1) / FrequencyHz);
    }

    private void WriteByte(uint offset, byte value)
    {
        long now = NowTicks;
        if (offset == 3)
        {
            WriteControl(value, now);
        }
        else
        {
            _counters[offset].Write(value, now);
        }

        // Only counter 0 has a wire; a read-back or a latch of another counter must not disturb its timer.
        if (offset == 0 || (offset == 3 && value >> 6 == 0 && (value & 0x30) != 0))
        {
            Drive(now);
        }
    }

    private void WriteControl(byte value, long now)
    {
        int select = value >> 6;
        if (select < 3)
        {
            _counters[select].Control(value, now);
            return;
        }

        // Read-back command: bits 5 and 4 low mean latch count and latch status; bits 3..1 choose counters.
        for (int i = 0; i < 3; i++)
        {
            if ((value & (2 << i)) != 0)
            {
                if ((value & 0x20) == 0)
                {
                    _counters[i].Latch(now);
                }

                if ((value & 0x10) == 0)
                {
                    _counters[i].LatchStatus(now);
                }
            }
        }
    }

    private void OnTimer()
    {
        lock (_gate)
        {
            if (_paused)
            {
                return;
            }

            long now = NowTicks;
            Counter counter = _counters[0];
            if (counter.Edge >= 0 && now >= counter.Edge)
            {
                if (counter.Mode is not (0 or 1))
                {
                    _irq.Set(false);
                    _irq.Set(true);
                }

                counter.Edge = -1;
                counter.LastEdgeNs = _clock.NowNs;
            }

            Drive(now);
        }
    }

    // Under the gate: sets the line's level where it has one, and arms the timer for the next change.
    private void Drive(long now)
    {
        Counter counter = _counters[0];
        counter.Roll(now);
        if (counter.Mode is 0 or 1)
        {
            _irq.Set(counter.Output(now));
        }
        else if (!counter.IsLoaded)
        {
            _irq.Set(true);
        }

        long next = counter.NextEdge(now);
        counter.Edge = next;
        if (_paused || next < 0)
        {
            _timer.Cancel();
            return;
        }

        long deadline = ToNs(next);
        if (counter.Mode is 2 or 3)
        {
            deadline = Math.Max(deadline, counter.LastEdgeNs + MinimumPeriodNs);
        }

        _timer.ArmAt(deadline);
    }

    private sealed class Counter
    {
        private int _writeHigh;
        private int _low;
        private int _latched = -1;
        private int _latchedHalf;
        private int _readHigh;
        private int _status = -1;
        private int _count = 0x10000;
        private long _held;
        private bool _isCounting = true;
        private int _nextCount = 1;
        private long _nextStart = -1;
        private bool _triggered;

        public int Mode { get; set; }

        public int Access { get; set; }

        public bool Bcd { get; set; }

        public bool Gate { get; set; }

        public bool IsLoaded { get; set; }

        public long Start { get; set; }

        /// <summary>Tick of the edge that the timer is armed for, or -1.</summary>
        public long Edge { get; set; } = -1;

        public long LastEdgeNs { get; set; } = -MinimumPeriodNs;

        private int Half => (_count + 1) / 2;

        public void Control(byte value, long now)
        {
            int access = (value >> 4) & 3;
            if (access == 0)
            {
                Latch(now);
                return;
            }

            int mode = (value >> 1) & 7;
            Mode = mode > 5 ? mode - 4 : mode;
            Bcd = (value & 1) != 0;
            Access = access;
            IsLoaded = false;
            _writeHigh = 0;
            _readHigh = 0;
            _latched = -1;
            _status = -1;
            _nextStart = -1;
            _triggered = false;
            _isCounting = true;
            _held = 0;
            Start = now;
            LastEdgeNs = -MinimumPeriodNs;
        }

        public void Write(byte value, long now)
        {
            switch (Access)
            {
                case 1:
                    Set(value, now);
                    break;
                case 2:
                    Set(value << 8, now);
                    break;
                default:
                    if (_writeHigh == 0)
                    {
                        _low = value;
                        _writeHigh = 1;
                        if (Mode == 0)
                        {
                            // Mode 0: the first byte stops the count.
                            Hold(now);
                            IsLoaded = false;
                        }
                    }
                    else
                    {
                        _writeHigh = 0;
                        Set(_low | (value << 8), now);
                    }

                    break;
            }
        }

        public byte Read(long now)
        {
            if (_status >= 0)
            {
                byte status = (byte)_status;
                _status = -1;
                return status;
            }

            int value;
            if (_latched >= 0)
            {
                value = _latched;
                if (Access == 3 && _latchedHalf == 0)
                {
                    _latchedHalf = 1;
                    return (byte)value;
                }

                _latched = -1;
                return Access == 1 ? (byte)value : (byte)(value >> 8);
            }

            value = Value(now);
            if (Access == 3)
            {
                _readHigh ^= 1;
                return _readHigh == 1 ? (byte)value : (byte)(value >> 8);
            }

            return Access == 1 ? (byte)value : (byte)(value >> 8);
        }

        public void Latch(long now)
        {
            if (_latched < 0)
            {
                _latched = Value(now);
                _latchedHalf = 0;
            }
        }

        public void LatchStatus(long now)
        {
            if (_status < 0)
            {
                _status = (Output(now) ? 0x80 : 0) | (IsLoaded ? 0 : 0x40) | (Access << 4) | (Mode << 1) | (Bcd ? 1 : 0);
            }
        }

        public void SetGate(bool gate, long now)
        {
            if (gate == Gate)
            {
                return;
            }

            Roll(now);
            bool rising = gate;
            switch (Mode)
            {
                case 0:
                case 4:
                    if (rising)
                    {
                        Gate = true;
                        Release(now);
                    }
                    else
                    {
                        Hold(now);
                    }

                    break;
                case 1:
                case 5:
                    if (rising && IsLoaded)
                    {
                        Start = now;
                        _triggered = true;
                        TakeNext(now);
                    }

                    break;
                default:
                    if (rising)
                    {
                        Start = now;
                        TakeNext(now);
                        Release(now);
                        Start = now;
                    }
                    else
                    {
                        Hold(now);
                    }

                    break;
            }

            Gate = gate;
        }

        /// <summary>Makes a count that was written during a period current once that period is over.</summary>
        public void Roll(long now)
        {
            if (_nextStart >= 0 && now >= _nextStart)
            {
                Start = _nextStart;
                _count = _nextCount;
                _nextStart = -1;
            }
        }

        public bool Output(long now)
        {
            Roll(now);
            long ticks = Elapsed(now);
            switch (Mode)
            {
                case 0:
                    return IsLoaded && ticks >= _count + 1;
                case 1:
                    return !_triggered || ticks >= _count;
                case 2:
                    return !IsLoaded || !Gate || ticks % _count != _count - 1;
                case 3:
                    return !IsLoaded || !Gate || ticks % _count < Half;
                case 4:
                    return !IsLoaded || ticks != _count;
                default:
                    return !_triggered || ticks != _count;
            }
        }

        /// <summary>The next tick at which the output of counter 0 changes in a way that its wire shows, or -1.</summary>
        public long NextEdge(long now)
        {
            Roll(now);
            if (!IsLoaded || !_isCounting)
            {
                return -1;
            }

            long ticks = Elapsed(now);
            switch (Mode)
            {
                case 0:
                    return ticks <= _count ? Start + _count + 1 : -1;
                case 2:
                case 3:
                    return Start + (((ticks / _count) + 1) * _count);
                case 4:
                    return ticks <= _count ? Start + _count + 1 : -1;
                default:
                    return -1;
            }
        }

        public void Save(StateWriter writer, string prefix, long now)
        {
            Roll(now);
            writer.Write(prefix + "mode", (ulong)Mode);
            writer.Write(prefix + "access", (ulong)Access);
            writer.Write(prefix + "bcd", Bcd);
            writer.Write(prefix + "gate", Gate);
            writer.Write(prefix + "loaded", IsLoaded);
            writer.Write(prefix + "counting", _isCounting);
            writer.Write(prefix + "elapsed", Elapsed(now));
            writer.Write(prefix + "count", (ulong)_count);
            writer.Write(prefix + "nextCount", (ulong)_nextCount);
            writer.Write(prefix + "nextIn", _nextStart < 0 ? -1L : _nextStart - now);
            writer.Write(prefix + "triggered", _triggered);
            writer.Write(prefix + "writeHigh", (ulong)_writeHigh);
            writer.Write(prefix + "low", (ulong)_low);
            writer.Write(prefix + "latched", (long)_latched);
            writer.Write(prefix + "latchedHalf", (ulong)_latchedHalf);
            writer.Write(prefix + "readHigh", (ulong)_readHigh);
            writer.Write(prefix + "status", (long)_status);
        }

        public void Load(StateReader reader, string prefix, long now)
        {
            Mode = (int)reader.ReadBounded(prefix + "mode", 5);
            Access = (int)Math.Max(1, reader.ReadBounded(prefix + "access", 3));
            Bcd = reader.ReadBoolean(prefix + "bcd");
            Gate = reader.ReadBoolean(prefix + "gate");
            IsLoaded = reader.ReadBoolean(prefix + "loaded");
            _isCounting = reader.ReadBoolean(prefix + "counting");
            long elapsed = (long)reader.ReadBounded(prefix + "elapsed", long.MaxValue / 4);
            _count = (int)Math.Max(1, reader.ReadBounded(prefix + "count", 0x10000));
            _nextCount = (int)Math.Max(1, reader.ReadBounded(prefix + "nextCount", 0x10000));
            long nextIn = reader.ReadInt64(prefix + "nextIn");
            _triggered = reader.ReadBoolean(prefix + "triggered");
            _writeHigh = (int)reader.ReadBounded(prefix + "writeHigh", 1);
            _low = (int)reader.ReadBounded(prefix + "low", 255);
            _latched = (int)Math.Clamp(reader.ReadInt64(prefix + "latched"), -1, 0xFFFF);
            _latchedHalf = (int)reader.ReadBounded(prefix + "latchedHalf", 1);
            _readHigh = (int)reader.ReadBounded(prefix + "readHigh", 1);
            _status = (int)Math.Clamp(reader.ReadInt64(prefix + "status"), -1, 255);
            _held = elapsed;
            Start = now - elapsed;
            _nextStart = nextIn < 0 ? -1 : nextIn > 0x20000 ? long.MaxValue : now + nextIn;
            Edge = -1;
            LastEdgeNs = -MinimumPeriodNs;
        }

        private static int FromBcd(int value) =>
            (value & 0xF) + (((value >> 4) & 0xF) * 10) + (((value >> 8) & 0xF) * 100) + (((value >> 12) & 0xF) * 1000);

        private static int ToBcd(int value) =>
            (value % 10) | ((value / 10 % 10) << 4) | ((value / 100 % 10) << 8) | ((value / 1000 % 10) << 12);

        private long Elapsed(long now) => _isCounting ? Math.Max(0, now - Start) : _held;

        private void Hold(long now)
        {
            if (_isCounting)
            {
                _held = Elapsed(now);
                _isCounting = false;
            }
        }

        private void Release(long now)
        {
            if (!_isCounting)
            {
                _isCounting = true;
                Start = now - _held;
            }
        }

        private void TakeNext(long now)
        {
            if (_nextStart >= 0)
            {
                _count = _nextCount;
                _nextStart = -1;
            }

            Start = now;
        }

        private void Set(int raw, long now)
        {
            int count = Bcd ? FromBcd(raw) : raw;
            if (count == 0)
            {
                count = Bcd ? 10000 : 0x10000;
            }

            // The data sheet forbids a count of 1 in modes 2 and 3; we take it as 2.
            if (Mode is 2 or 3)
            {
                count = Math.Max(count, 2);
            }

            Roll(now);
            bool running = IsLoaded && _isCounting;
            IsLoaded = true;
            if (running && Mode is 2 or 3)
            {
                _nextCount = count;
                _nextStart = Start + (((Elapsed(now) / _count) + 1) * _count);
                return;
            }

            if (Mode is 1 or 5)
            {
                // Takes effect at the next trigger.
                if (_triggered)
                {
                    _nextCount = count;
                    _nextStart = long.MaxValue;
                    return;
                }

                _count = count;
                return;
            }

            _count = count;
            _nextStart = -1;
            Start = now;
            _held = 0;
            _isCounting = Gate;
        }

        private int Value(long now)
        {
            Roll(now);
            long ticks = Elapsed(now);
            long value;
            switch (Mode)
            {
                case 2:
                    value = _count - (ticks % _count);
                    break;
                case 3:
                    // Counts by two; twice per period (data sheet, "Mode 3", even and odd counts).
                    long phase = ticks % _count;
                    phase = phase < Half ? phase : phase - Half;
                    value = (_count & ~1L) - (2 * phase);
                    value = value <= 0 ? 2 : value;
                    break;
                case 1:
                case 5:
                    value = _triggered ? _count - ticks : _count;
                    break;
                default:
                    value = IsLoaded || !_isCounting ? _count - ticks : _count;
                    break;
            }

            if (Bcd)
            {
                return ToBcd((int)(((value % 10000) + 10000) % 10000));
            }

            return (int)(value & 0xFFFF);
        }
    }

    // Port 0x61 (PIIX3 §2.5.5, "NMISC"): bit 0 gate of counter 2, bit 1 speaker, bits 2..3 NMI masks, bit 4 toggles with
    // refresh (15 us), bit 5 output of counter 2; 6..7 are the NMI sources, which a virtual machine does not have.
    private sealed class SpeakerPortWindow : IRegisterWindow
    {
        private readonly I8254 _owner;

        public SpeakerPortWindow(I8254 owner) => _owner = owner;

        public uint Length => 1;

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_owner._gate)
            {
                long now = _owner.NowTicks;
                Counter counter = _owner._counters[2];
                ulong value = (counter.Gate ? 1UL : 0) | (_owner._speaker ? 2UL : 0) | _owner._nmiMask;
                value |= (now / 18 & 1) != 0 ? 0x10UL : 0;
                return value | (counter.Output(now) ? 0x20UL : 0);
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            lock (_owner._gate)
            {
                _owner._counters[2].SetGate((value & 1) != 0, _owner.NowTicks);
                _owner._speaker = (value & 2) != 0;
                _owner._nmiMask = (byte)(value & 0x0C);
            }
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Legacy;

// Theory. Motorola MC146818A real-time clock (data sheet ADI-856R2) with 128 bytes of battery-backed RAM, as the PC has
// it behind ports 0x70 (index; bit 7 masks NMI) and 0x71 (data). Time is the clock's calendar time plus an offset that
// the guest changes by setting the registers; while it sets them (B.SET) they are plain storage.
//
// Flags of register C are worked out when somebody looks: Advance brings them from the last look to now. Timers
// are armed only for interrupts that are enabled, so an idle clock costs nothing. A periodic rate above 8192 Hz is
// taken as 8192 Hz for interrupts that reach the host's timers every time.
//
// The rest of the RAM is for the firmware: memory size, boot order. The machine fills it in; it survives Reset, like
// everything that the battery keeps.

/// <summary>The clock and its RAM. See the theory at the top of this file.</summary>
public sealed class Mc146818 : IDevice, IRegisterWindow
{
    /// <summary>Index port; data is the next.</summary>
    public const ushort Port = 0x70;

    private const int RegA = 0x0A;
    private const int RegB = 0x0B;
    private const int RegC = 0x0C;
    private const int RegD = 0x0D;
    private const int Century = 0x32;

    private const byte AUpdateInProgress = 0x80;
    private const byte BSet = 0x80;
    private const byte BPeriodic = 0x40;
    private const byte BAlarm = 0x20;
    private const byte BUpdate = 0x10;
    private const byte BSquareWave = 0x08;
    private const byte BBinary = 0x04;
    private const byte B24Hours = 0x02;
    private const byte CIrq = 0x80;

    private const long Second = 1_000_000_000;

    // UIP rises 244 us before an update that takes 1984 us (table 6); the time changes at the end.
    private const long UpdateNs = 2_228_000;

    private readonly Lock _gate = new();
    private readonly IClock _clock;
    private readonly IIrqLine _irq;
    private readonly IGuestTimer _periodicTimer;
    private readonly IGuestTimer _secondTimer;
    private readonly byte[] _ram = new byte[128];
    private long _offsetNs;
    private long _lastSecond;
    private long _lastPeriod;
    private byte _index;
    private byte _flags;
    private bool _paused = true;

    /// <summary>Makes the clock.</summary>
    /// <param name="clock">Guest time and the calendar.</param>
    /// <param name="irq">IRQ 8.</param>
    public Mc146818(IClock clock, IIrqLine irq)
    {
        ArgumentNullException.ThrowIfNull(clock);
        _clock = clock;
        _irq = irq;
        _periodicTimer = clock.CreateTimer("rtc-periodic", OnTimer);
        _secondTimer = clock.CreateTimer("rtc-second", OnTimer);
        _ram[RegA] = 0x26;
        _ram[RegB] = B24Hours;
        _lastSecond = NowNs / Second;
        _lastPeriod = NowNs;
        StoreTime();
    }

    /// <inheritdoc/>
    public string Id => "rtc";

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <inheritdoc/>
    public uint Length => 2;

    // The guest's calendar time.
    private long NowNs => Math.Max(0, _clock.UnixTimeNs + _offsetNs);

    private int PeriodTicks
    {
        get
        {
            // Rates 1 and 2 give the periods of 8 and 9 with the 32.768 kHz crystal (table 5).
            int rate = _ram[RegA] & 15;
            return rate == 0 ? 0 : 1 << ((rate <= 2 ? rate + 7 : rate) - 1);
        }
    }

    private bool IsRunning => (_ram[RegB] & BSet) == 0 && (_ram[RegA] & 0x70) == 0x20;

    /// <summary>Puts a value into the battery-backed RAM; for the machine, before it runs.</summary>
    /// <param name="index">0x0E..0x7F.</param>
    /// <param name="value">The value.</param>
    public void SetRam(int index, byte value)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(index, 0x0E);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(index, 0x7F);
        lock (_gate)
        {
            _ram[index] = value;
        }
    }

    /// <summary>
    /// Writes the memory size where a BIOS of the 440FX looks: base (15h), extended up to 64 MiB (17h, 30h), above
    /// 16 MiB (34h), above 4 GiB (5Bh).
    /// </summary>
    public void SetMemorySize(ulong below4GiB, ulong above4GiB)
    {
        ulong extendedKiB = Math.Min((below4GiB - Math.Min(below4GiB, 1UL << 20)) >> 10, 0xFFFF);
        ulong above16 = Math.Min((below4GiB - Math.Min(below4GiB, 16UL << 20)) >> 16, 0xFFFF);
        SetRam16(0x15, 640);
        SetRam16(0x17, (ushort)extendedKiB);
        SetRam16(0x30, (ushort)extendedKiB);
        SetRam16(0x34, (ushort)above16);
        SetRam(0x5B, (byte)(above4GiB >> 16));
        SetRam(0x5C, (byte)(above4GiB >> 24));
        SetRam(0x5D, (byte)(above4GiB >> 32));
    }

    /// <inheritdoc/>
    public void Reset()
    {
        lock (_gate)
        {
            // The RESET pin clears the interrupt enables and flags, and the square wave; time and RAM stay.
            Advance();
            _ram[RegB] &= unchecked((byte)~(BPeriodic | BAlarm | BUpdate | BSquareWave));
            _flags = 0;
            _index = 0;
            Rearm();
        }
    }

    /// <inheritdoc/>
    public void Pause()
    {
        lock (_gate)
        {
            _paused = true;
            _periodicTimer.Cancel();
            _secondTimer.Cancel();
        }
    }

    /// <inheritdoc/>
    public void Resume()
    {
        lock (_gate)
        {
            _paused = false;
            Rearm();
        }
    }

    /// <inheritdoc/>
    public void Save(StateWriter writer)
    {
        lock (_gate)
        {
            Advance();
            if (IsRunning)
            {
                StoreTime();
            }

            writer.WriteBytes("ram", _ram);
            writer.Write("offset", _offsetNs);
            writer.Write("index", (ulong)_index);
            writer.Write("flags", (ulong)_flags);
        }
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        lock (_gate)
        {
            reader.ReadBytes("ram", _ram);
            long offset = reader.ReadInt64("offset");
            const long Limit = 1L << 62;
            _offsetNs = Math.Clamp(offset, -Limit, Limit);
            _index = reader.ReadByte("index");
            _flags = (byte)(reader.ReadByte("flags") & 0x70);
            _ram[RegA] &= 0x7F;
            _lastSecond = NowNs / Second;
            _lastPeriod = NowNs;
            Rearm();
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _periodicTimer.Dispose();
        _secondTimer.Dispose();
    }

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width)
    {
        lock (_gate)
        {
            // The index port is write-only; it reads as ones like an undriven bus.
            ulong value = offset == 0 ? 0xFFUL : ReadRegister(_index & 0x7F);
            return width == AccessWidth.Word ? value | ((ulong)ReadRegister(_index & 0x7F) << 8) : value;
        }
    }

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value)
    {
        lock (_gate)
        {
            if (offset == 0)
            {
                _index = (byte)value;
                if (width == AccessWidth.Word)
                {
                    WriteRegister(_index & 0x7F, (byte)(value >> 8));
                }
            }
            else
            {
                WriteRegister(_index & 0x7F, (byte)value);
            }
        }
    }

    private void SetRam16(int index, ushort value)
    {
        SetRam(index, (byte)value);
        SetRam(index + 1, (byte)(value >> 8));
    }

    private byte ReadRegister(int index)
    {
        switch (index)
        {
            case RegA:
                bool updating = IsRunning && Second - (NowNs % Second) <= UpdateNs;
                return (byte)(_ram[RegA] | (updating ? AUpdateInProgress : 0));
            case RegC:
                // Reading clears all flags and the interrupt.
                Advance();
                byte flags = _flags;
                flags |= (byte)((flags & _ram[RegB] & 0x70) != 0 ? CIrq : 0);
                _flags = 0;
                Rearm();
                return flags;
            case RegD:
                return 0x80;
            case <= 9 or Century:
                if (IsRunning && index is not (1 or 3 or 5))
                {
                    StoreTime();
                }

                return _ram[index];
            default:
                return _ram[index];
        }
    }

    private void WriteRegister(int index, byte value)
    {
        switch (index)
        {
            case 1:
            case 3:
            case 5:
                Advance();
                _ram[index] = value;
                Rearm();
                break;
            case <= 9 or Century:
                Advance();
                if (IsRunning)
                {
                    StoreTime();
                    _ram[index] = value;
                    AdoptTime();
                    Rearm();
                }
                else
                {
                    _ram[index] = value;
                }

                break;
            case RegA:
                Advance();
                ChangeMode(() => _ram[RegA] = (byte)(value & 0x7F));
                break;
            case RegB:
                Advance();
                ChangeMode(() =>
                {
                    // SET inhibits updates and clears the update interrupt enable (data sheet, "Register B").
                    _ram[RegB] = (value & BSet) != 0 ? (byte)(value & ~BUpdate) : value;
                });
                break;
            case RegC:
            case RegD:
                break;
            default:
                _ram[index] = value;
                break;
        }
    }

    // Stops or starts the time around a change of A or B.
    private void ChangeMode(Action change)
    {
        bool was = IsRunning;
        if (was)
        {
            StoreTime();
        }

        change();
        if (IsRunning && !was)
        {
            AdoptTime();
        }

        Rearm();
    }

    private int Encode(int value) => (_ram[RegB] & BBinary) != 0 ? value : (value / 10 * 16) + (value % 10);

    private int Decode(int value) =>
        (_ram[RegB] & BBinary) != 0 ? value : ((value >> 4) * 10) + (value & 15);

    private int EncodeHour(int hour)
    {
        if ((_ram[RegB] & B24Hours) != 0)
        {
            return Encode(hour);
        }

        int twelve = hour % 12 == 0 ? 12 : hour % 12;
        return Encode(twelve) | (hour >= 12 ? 0x80 : 0);
    }

    private int DecodeHour(int value)
    {
        if ((_ram[RegB] & B24Hours) != 0)
        {
            return Decode(value);
        }

        return (Decode(value & 0x7F) % 12) + ((value & 0x80) != 0 ? 12 : 0);
    }

    private void StoreTime()
    {
        DateTimeOffset time = DateTimeOffset.FromUnixTimeSeconds(Math.Min(NowNs / Second, 9_000_000_000));
        _ram[0] = (byte)Encode(time.Second);
        _ram[2] = (byte)Encode(time.Minute);
        _ram[4] = (byte)EncodeHour(time.Hour);
        _ram[6] = (byte)Encode((int)time.DayOfWeek + 1);
        _ram[7] = (byte)Encode(time.Day);
        _ram[8] = (byte)Encode(time.Month);
        _ram[9] = (byte)Encode(time.Year % 100);
        _ram[Century] = (byte)Encode(time.Year / 100);
    }

    // The registers become the time. Values out of range are brought into it; the chip would count on from them.
    private void AdoptTime()
    {
        int century = Decode(_ram[Century]);
        int year = (Math.Clamp(century, 19, 21) * 100) + Math.Clamp(Decode(_ram[9]), 0, 99);
        int month = Math.Clamp(Decode(_ram[8]), 1, 12);
        int day = Math.Clamp(Decode(_ram[7]), 1, DateTime.DaysInMonth(year, month));
        var time = new DateTimeOffset(
            year, month, day, Math.Clamp(DecodeHour(_ram[4]), 0, 23), Math.Clamp(Decode(_ram[2]), 0, 59),
            Math.Clamp(Decode(_ram[0]), 0, 59), TimeSpan.Zero);
        long wanted = Math.Max(0, time.ToUnixTimeSeconds()) * Second;

        // Releasing SET or the divider starts the second half a second later (data sheet, "DV2..0").
        _offsetNs = wanted + (Second / 2) - _clock.UnixTimeNs;
        _lastSecond = NowNs / Second;
        _lastPeriod = NowNs;
    }

    // Brings the flags up to date.
    private void Advance()
    {
        long now = NowNs;
        int ticks = PeriodTicks;
        if (ticks != 0 && (_ram[RegA] & 0x60) != 0x60)
        {
            long period = (long)ticks * Second / 32768;
            if (now / period != _lastPeriod / period)
            {
                _flags |= BPeriodic;
            }
        }

        _lastPeriod = now;
        long second = now / Second;
        if (!IsRunning || second <= _lastSecond)
        {
            _lastSecond = IsRunning ? _lastSecond : second;
            return;
        }

        _flags |= BUpdate;
        long first = Math.Max(_lastSecond + 1, second - 86_400);
        for (long at = first; at <= second; at++)
        {
            if (MatchesAlarm(at))
            {
                _flags |= BAlarm;
                break;
            }
        }

        _lastSecond = second;
    }

    private bool MatchesAlarm(long second)
    {
        int ofDay = (int)(second % 86_400);
        return Matches(_ram[1], Encode(ofDay % 60)) && Matches(_ram[3], Encode(ofDay / 60 % 60)) &&
            Matches(_ram[5], EncodeHour(ofDay / 3600));

        // 11xxxxxx is "don't care" (data sheet, "Alarm").
        static bool Matches(byte alarm, int value) => (alarm & 0xC0) == 0xC0 || alarm == value;
    }

    // Drives the line and arms the timers of enabled interrupts.
    private void Rearm()
    {
        _irq.Set((_flags & _ram[RegB] & 0x70) != 0);
        if (_paused)
        {
            return;
        }

        long now = NowNs;
        long toGuest = _clock.NowNs - now;
        int ticks = PeriodTicks;
        if ((_ram[RegB] & BPeriodic) != 0 && ticks != 0 && (_flags & BPeriodic) == 0)
        {
            long period = (long)ticks * Second / 32768;
            _periodicTimer.ArmAt((((now / period) + 1) * period) + toGuest);
        }
        else
        {
            _periodicTimer.Cancel();
        }

        if (IsRunning && (_ram[RegB] & (BAlarm | BUpdate) & ~_flags) != 0)
        {
            _secondTimer.ArmAt((((now / Second) + 1) * Second) + toGuest);
        }
        else
        {
            _secondTimer.Cancel();
        }
    }

    private void OnTimer()
    {
        lock (_gate)
        {
            if (!_paused)
            {
                Advance();
                Rearm();
            }
        }
    }
}

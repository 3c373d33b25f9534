// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Legacy;

// Theory. High precision event timers (IA-PC HPET specification 1.0a): one 64-bit counter at 100 MHz and up to 32
// comparators. The counter is a function of guest time; each enabled comparator has a guest timer for its next match.
//
// A comparator that lies at most a second behind the counter matches at once: the specification waits for the counter
// to come round, but a guest that wrote it a moment too late would then hang on a slow host.
//
// Legacy replacement (§2.4.7) puts comparators 0 and 1 in the place of the 8254 (IRQ 0) and the RTC (IRQ 8). The chips'
// own outputs therefore come through PitInput and RtcInput, which are cut off in that mode.

/// <summary>The timer block. See the theory at the top of this file.</summary>
public sealed class Hpet : IDevice, IRegisterWindow
{
    /// <summary>Address of the block on a PC.</summary>
    public const ulong DefaultAddress = 0xFED0_0000;

    /// <summary>I/O APIC inputs that comparators can use: 2, 8, 16..23.</summary>
    public const uint RouteMask = 0x00FF_0104;

    private const int UsualTimers = 3;
    private const long TickNs = 10;
    private const ulong PeriodFs = 10_000_000;
    private const long MinimumPeriodNs = 50_000;
    private const ulong LateTicks = 100_000_000;

    private const ulong ConfigEnable = 1 << 0;
    private const ulong ConfigLegacy = 1 << 1;

    private const ulong TimerLevel = 1 << 1;
    private const ulong TimerInterrupt = 1 << 2;
    private const ulong TimerPeriodic = 1 << 3;
    private const ulong TimerValueSet = 1 << 6;
    private const ulong Timer32 = 1 << 8;
    private const ulong TimerFsb = 1 << 14;
    private const ulong TimerWritable = 0x7F4E;

    private readonly Lock _gate = new();
    private readonly IClock _clock;
    private readonly IIrqLine[] _lines;
    private readonly IMsiSink _msi;
    private readonly Comparator[] _timers;
    private readonly LegacyWire _irq0;
    private readonly LegacyWire _irq8;
    private readonly ulong _capabilities;
    private ulong _config;
    private ulong _status;
    private ulong _counter;
    private long _startNs;
    private bool _paused = true;

    /// <summary>Makes the block.</summary>
    /// <param name="clock">Guest time.</param>
    /// <param name="lines">24 wires to the I/O APIC.</param>
    /// <param name="irq0">ISA IRQ 0 (8259 and I/O APIC input 2).</param>
    /// <param name="irq8">ISA IRQ 8.</param>
    /// <param name="msi">For comparators in FSB mode.</param>
    /// <param name="timers">3..32 comparators.</param>
    public Hpet(IClock clock, IIrqLine[] lines, IIrqLine irq0, IIrqLine irq8, IMsiSink msi, int timers = UsualTimers)
    {
        ArgumentNullException.ThrowIfNull(clock);
        ArgumentNullException.ThrowIfNull(lines);
        ArgumentOutOfRangeException.ThrowIfLessThan(timers, 3);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(timers, 32);
        if (lines.Length != 24)
        {
            throw new ArgumentException("24 lines are needed", nameof(lines));
        }

        _clock = clock;
        _lines = lines;
        _msi = msi;
        _irq0 = new LegacyWire(this, irq0);
        _irq8 = new LegacyWire(this, irq8);
        _timers = new Comparator[timers];
        for (int i = 0; i < timers; i++)
        {
            int index = i;
            _timers[i] = new Comparator(clock.CreateTimer($"hpet{i}", () => OnTimer(index)));
        }

        _capabilities = (PeriodFs << 32) | BlockId(timers);
    }

    /// <inheritdoc/>
    public string Id => "hpet";

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <inheritdoc/>
    public uint Length => 0x400;

    /// <summary>
    /// The low half of the capabilities, which the ACPI table shows too: vendor 8086, legacy replacement, 64-bit counter,
    /// revision 1 (§2.3.4).
    /// </summary>
    /// <param name="timers">Number of comparators.</param>
    public static uint BlockId(int timers = UsualTimers) => 0x8086_A001 | ((uint)(timers - 1) << 8);

    /// <summary>The 8254's output goes here instead of to IRQ 0.</summary>
    public IIrqLine PitInput => _irq0.ChipInput;

    /// <summary>The RTC's output goes here instead of to IRQ 8.</summary>
    public IIrqLine RtcInput => _irq8.ChipInput;

    /// <inheritdoc/>
    public void Reset()
    {
        lock (_gate)
        {
            _config = 0;
            _status = 0;
            _counter = 0;
            _irq0.SetLegacy(false);
            _irq8.SetLegacy(false);
            foreach (Comparator timer in _timers)
            {
                timer.Release();
                timer.Config = 0;
                timer.Compare = ulong.MaxValue;
                timer.Period = 0;
                timer.Fsb = 0;
                timer.Clock.Cancel();
            }
        }
    }

    /// <inheritdoc/>
    public void Pause()
    {
        lock (_gate)
        {
            _paused = true;
            foreach (Comparator timer in _timers)
            {
                timer.Clock.Cancel();
            }
        }
    }

    /// <inheritdoc/>
    public void Resume()
    {
        lock (_gate)
        {
            _paused = false;
            ArmAll();
        }
    }

    /// <inheritdoc/>
    public void Save(StateWriter writer)
    {
        lock (_gate)
        {
            writer.Write("timers", (ulong)_timers.Length);
            writer.Write("config", _config);
            writer.Write("status", _status);
            writer.Write("counter", Counter);
            for (int i = 0; i < _timers.Length; i++)
            {
                writer.Write($"t{i}.config", _timers[i].Config);
                writer.Write($"t{i}.compare", _timers[i].Compare);
                writer.Write($"t{i}.period", _timers[i].Period);
                writer.Write($"t{i}.fsb", _timers[i].Fsb);
            }
        }
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        lock (_gate)
        {
            if (reader.ReadUInt64("timers") != (ulong)_timers.Length)
            {
                throw new StateException("hpet.timers: another number of timers");
            }

            _config = reader.ReadBounded("config", 3);
            _status = reader.ReadUInt64("status") & ((1UL << _timers.Length) - 1);
            _counter = reader.ReadUInt64("counter");
            _startNs = _clock.NowNs;
            _irq0.SetLegacy((_config & ConfigLegacy) != 0);
            _irq8.SetLegacy((_config & ConfigLegacy) != 0);
            for (int i = 0; i < _timers.Length; i++)
            {
                _timers[i].Config = reader.ReadUInt64($"t{i}.config") & TimerWritable;
                _timers[i].Compare = reader.ReadUInt64($"t{i}.compare");
                _timers[i].Period = reader.ReadUInt64($"t{i}.period");
                _timers[i].Fsb = reader.ReadUInt64($"t{i}.fsb");
                Drive(i);
            }

            ArmAll();
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        foreach (Comparator timer in _timers)
        {
            timer.Clock.Dispose();
        }
    }

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width)
    {
        lock (_gate)
        {
            // §2.3.1: 32- and 64-bit accesses, aligned. Narrower ones get their part of the register.
            ulong value = ReadRegister(offset & ~7u) >> (int)(8 * (offset & 7));
            return width == AccessWidth.Qword ? value : value & ((1UL << (8 * (int)width)) - 1);
        }
    }

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value)
    {
        if (width < AccessWidth.Dword || (offset & 3) != 0 || (width == AccessWidth.Qword && (offset & 7) != 0))
        {
            return;
        }

        lock (_gate)
        {
            int shift = (int)(8 * (offset & 7));
            ulong mask = width == AccessWidth.Qword ? ulong.MaxValue : 0xFFFF_FFFFUL << shift;
            WriteRegister(offset & ~7u, value << shift, mask);
        }
    }

    private bool IsEnabled => (_config & ConfigEnable) != 0;

    private bool IsLegacy => (_config & ConfigLegacy) != 0;

    private ulong Counter => IsEnabled ? _counter + (ulong)((_clock.NowNs - _startNs) / TickNs) : _counter;

    private ulong ReadRegister(uint offset)
    {
        switch (offset)
        {
            case 0x00:
                return _capabilities;
            case 0x10:
                return _config;
            case 0x20:
                return _status;
            case 0xF0:
                return Counter;
        }

        int index = (int)(offset - 0x100) >> 5;
        if (offset < 0x100 || index >= _timers.Length)
        {
            return 0;
        }

        Comparator timer = _timers[index];
        return (offset & 0x18) switch
        {
            // Periodic and 64-bit capable, FSB delivery possible.
            0x00 => timer.Config | 0x8030 | ((ulong)RouteMask << 32),
            0x08 => (timer.Config & Timer32) != 0 ? (uint)timer.Compare : timer.Compare,
            0x10 => timer.Fsb,
            _ => 0,
        };
    }

    private void WriteRegister(uint offset, ulong value, ulong mask)
    {
        switch (offset)
        {
            case 0x10:
                WriteConfig((_config & ~mask) | (value & mask & 3));
                return;
            case 0x20:
                ulong cleared = value & mask & _status;
                _status &= ~cleared;
                for (int i = 0; i < _timers.Length; i++)
                {
                    if ((cleared & (1UL << i)) != 0)
                    {
                        Drive(i);
                    }
                }

                return;
            case 0xF0:
                // Writable while halted (§2.3.7); we take it at any time, like the chips.
                ulong counter = Counter;
                _counter = (counter & ~mask) | (value & mask);
                _startNs = _clock.NowNs;
                ArmAll();
                return;
        }

        int index = (int)(offset - 0x100) >> 5;
        if (offset < 0x100 || index >= _timers.Length)
        {
            return;
        }

        Comparator timer = _timers[index];
        switch (offset & 0x18)
        {
            case 0x00:
                ulong next = (timer.Config & ~mask) | (value & mask & TimerWritable);
                uint route = (uint)(next >> 9) & 31;
                if ((RouteMask & (1u << (int)route)) == 0)
                {
                    // An input that is not offered does not stick (§2.3.8).
                    next = (next & ~0x3E00UL) | (timer.Config & 0x3E00);
                }

                timer.Config = next;
                if ((next & Timer32) != 0)
                {
                    timer.Compare &= 0xFFFF_FFFF;
                    timer.Period &= 0xFFFF_FFFF;
                }

                if ((next & TimerLevel) == 0)
                {
                    _status &= ~(1UL << index);
                }

                Drive(index);
                break;
            case 0x08:
                bool periodic = (timer.Config & TimerPeriodic) != 0;
                ulong limit = (timer.Config & Timer32) != 0 ? 0xFFFF_FFFF : ulong.MaxValue;
                if (!periodic || (timer.Config & TimerValueSet) != 0)
                {
                    timer.Compare = ((timer.Compare & ~mask) | (value & mask)) & limit;
                }

                if (periodic)
                {
                    timer.Period = ((timer.Period & ~mask) | (value & mask)) & limit;
                }

                timer.Config &= ~TimerValueSet;
                break;
            case 0x10:
                timer.Fsb = (timer.Fsb & ~mask) | (value & mask);
                break;
        }

        Arm(index);
    }

    private void WriteConfig(ulong next)
    {
        bool was = IsEnabled;
        if (was && (next & ConfigEnable) == 0)
        {
            _counter = Counter;
        }
        else if (!was && (next & ConfigEnable) != 0)
        {
            _startNs = _clock.NowNs;
        }

        bool legacyChanged = ((_config ^ next) & ConfigLegacy) != 0;
        _config = next;
        if (legacyChanged)
        {
            _irq0.SetLegacy(IsLegacy);
            _irq8.SetLegacy(IsLegacy);
        }

        for (int i = 0; i < _timers.Length; i++)
        {
            Drive(i);
        }

        ArmAll();
    }

    private void ArmAll()
    {
        for (int i = 0; i < _timers.Length; i++)
        {
            Arm(i);
        }
    }

    private void Arm(int index)
    {
        Comparator timer = _timers[index];
        if (_paused || !IsEnabled || (timer.Config & TimerInterrupt) == 0)
        {
            timer.Clock.Cancel();
            return;
        }

        ulong left = Left(timer);

        // Far matches are cut to about a day and looked at again then.
        left = Math.Min(left, 10_000_000_000_000);
        long deadline = _startNs + (((long)((Counter - _counter) + left)) * TickNs);
        if ((timer.Config & TimerPeriodic) != 0)
        {
            deadline = Math.Max(deadline, timer.LastNs + MinimumPeriodNs);
        }

        timer.Clock.ArmAt(deadline);
    }

    // Ticks to the next match; 0 when it is due or was due less than LateTicks ago.
    private ulong Left(Comparator timer)
    {
        bool is32 = (timer.Config & Timer32) != 0;
        ulong range = is32 ? 0xFFFF_FFFF : ulong.MaxValue;
        ulong behind = (Counter - timer.Compare) & range;
        return behind <= LateTicks ? 0 : (timer.Compare - Counter) & range;
    }

    private void OnTimer(int index)
    {
        lock (_gate)
        {
            Comparator timer = _timers[index];
            if (_paused || !IsEnabled || (timer.Config & TimerInterrupt) == 0)
            {
                return;
            }

            ulong counter = Counter;
            if (Left(timer) != 0)
            {
                Arm(index);
                return;
            }

            bool is32 = (timer.Config & Timer32) != 0;
            ulong behind = (counter - timer.Compare) & (is32 ? 0xFFFF_FFFF : ulong.MaxValue);
            bool periodic = (timer.Config & TimerPeriodic) != 0;
            if (periodic && timer.Period != 0)
            {
                // On to the first match after now; what was missed is lost, as on a machine that was off.
                timer.Compare += ((behind / timer.Period) + 1) * timer.Period;
                timer.Compare &= is32 ? 0xFFFF_FFFF : ulong.MaxValue;
            }

            timer.LastNs = _clock.NowNs;
            Fire(index);
            if (periodic && timer.Period != 0)
            {
                Arm(index);
            }
        }
    }

    private void Fire(int index)
    {
        Comparator timer = _timers[index];
        if ((timer.Config & TimerFsb) != 0)
        {
            _msi.Send(timer.Fsb >> 32, (uint)timer.Fsb);
            return;
        }

        if ((timer.Config & TimerLevel) != 0)
        {
            _status |= 1UL << index;
            Drive(index);
            return;
        }

        IIrqLine line = LineOf(index);
        line.Set(true);
        line.Set(false);
    }

    private IIrqLine LineOf(int index)
    {
        if (IsLegacy && index < 2)
        {
            return index == 0 ? _irq0 : _irq8;
        }

        // Route 0 is where the register starts; nothing is wired there.
        int route = (int)(_timers[index].Config >> 9) & 31;
        return (RouteMask & (1u << route)) != 0 ? _lines[route] : UnconnectedLine.Instance;
    }

    // Brings a level-triggered comparator's wire to what status and routing say.
    private void Drive(int index)
    {
        Comparator timer = _timers[index];
        bool asserted = (_status & (1UL << index)) != 0 &&
            (timer.Config & (TimerLevel | TimerInterrupt | TimerFsb)) == (TimerLevel | TimerInterrupt) && IsEnabled;
        IIrqLine? line = asserted ? LineOf(index) : null;
        if (!ReferenceEquals(line, timer.Driven))
        {
            timer.Release();
            timer.Driven = line;
            line?.Set(true);
        }
    }

    private sealed class Comparator
    {
        public Comparator(IGuestTimer clock) => Clock = clock;

        public IGuestTimer Clock { get; }

        public ulong Config { get; set; }

        public ulong Compare { get; set; } = ulong.MaxValue;

        public ulong Period { get; set; }

        public ulong Fsb { get; set; }

        public long LastNs { get; set; } = -MinimumPeriodNs;

        public IIrqLine? Driven { get; set; }

        public void Release()
        {
            Driven?.Set(false);
            Driven = null;
        }
    }

    // One ISA interrupt that either its chip or a comparator drives.
    private sealed class LegacyWire : IIrqLine
    {
        private readonly Hpet _owner;
        private readonly IIrqLine _target;
        private bool _chip;
        private bool _legacy;

        public LegacyWire(Hpet owner, IIrqLine target)
        {
            _owner = owner;
            _target = target;
            ChipInput = new DelegateLine(SetChip);
        }

        public IIrqLine ChipInput { get; }

        // The comparator's side; under the gate.
        public void Set(bool asserted) => _target.Set(asserted);

        public void SetLegacy(bool legacy)
        {
            if (legacy != _legacy)
            {
                _legacy = legacy;
                _target.Set(!legacy && _chip);
            }
        }

        private void SetChip(bool asserted)
        {
            lock (_owner._gate)
            {
                _chip = asserted;
                if (!_legacy)
                {
                    _target.Set(asserted);
                }
            }
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics.CodeAnalysis;
using System.Threading;

namespace Vmm.TestKit;

/// <summary>
/// The host's time, standing still until a test moves it: what must happen at once is what happens while it stands, however
/// slow the machine is. Timers expire in deadline order on the thread that moves it, and see the time of their deadline.
/// </summary>
public sealed class ManualTime : TimeProvider
{
    private static readonly DateTimeOffset s_calendarStart = new(2026, 1, 1, 0, 0, 0, TimeSpan.Zero);

    private readonly Lock _gate = new();
    private readonly List<ManualTimer> _timers = [];
    private readonly long _start = TimeSpan.FromDays(1).Ticks; // not 0, which some read as "never"
    private long _now = TimeSpan.FromDays(1).Ticks;

    public override long TimestampFrequency => TimeSpan.TicksPerSecond;

    /// <summary>What it has been moved by.</summary>
    public TimeSpan Elapsed => new(GetTimestamp() - _start);

    /// <summary>How many timers wait.</summary>
    public int ArmedTimers
    {
        get
        {
            lock (_gate)
            {
                return _timers.Count;
            }
        }
    }

    public override long GetTimestamp() => Interlocked.Read(ref _now);

    public override DateTimeOffset GetUtcNow() => s_calendarStart + Elapsed;

    public override ITimer CreateTimer(TimerCallback callback, object? state, TimeSpan dueTime, TimeSpan period)
    {
        var timer = new ManualTimer(this, callback, state);
        timer.Change(dueTime, period);
        return timer;
    }

    /// <summary>Moves it; any thread, one at a time.</summary>
    public void Advance(TimeSpan by)
    {
        long end = GetTimestamp() + by.Ticks;
        while (TryTakeNext(end, out ManualTimer? next))
        {
            next.Expire();
        }

        Interlocked.Exchange(ref _now, end);
    }

    private bool TryTakeNext(long end, [NotNullWhen(true)] out ManualTimer? next)
    {
        next = null;
        lock (_gate)
        {
            foreach (ManualTimer timer in _timers)
            {
                if (timer.Deadline <= end && (next is null || timer.Deadline < next.Deadline))
                {
                    next = timer;
                }
            }

            if (next is null)
            {
                return false;
            }

            Interlocked.Exchange(ref _now, Math.Max(GetTimestamp(), next.Deadline));
            next.Rearm();
            return true;
        }
    }

    private sealed class ManualTimer : ITimer
    {
        private readonly ManualTime _owner;
        private readonly TimerCallback _callback;
        private readonly object? _state;
        private TimeSpan _period;

        public ManualTimer(ManualTime owner, TimerCallback callback, object? state)
        {
            _owner = owner;
            _callback = callback;
            _state = state;
        }

        public long Deadline { get; private set; }

        public bool Change(TimeSpan dueTime, TimeSpan period)
        {
            lock (_owner._gate)
            {
                _owner._timers.Remove(this);
                _period = period;
                Deadline = _owner.GetTimestamp() + dueTime.Ticks;
                if (dueTime != Timeout.InfiniteTimeSpan)
                {
                    _owner._timers.Add(this);
                }
            }

            return true;
        }

        public void Expire() => _callback(_state);

        /// <summary>With the owner's gate held.</summary>
        public void Rearm()
        {
            Deadline += _period.Ticks;
            if (_period == Timeout.InfiniteTimeSpan || _period == TimeSpan.Zero)
            {
                _owner._timers.Remove(this);
            }
        }

        public void Dispose()
        {
            lock (_owner._gate)
            {
                _owner._timers.Remove(this);
            }
        }

        public System.Threading.Tasks.ValueTask DisposeAsync()
        {
            Dispose();
            return default;
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;

namespace Vmm.TestKit;

/// <summary>A clock that stands still until a test moves it; timers expire in deadline order while it moves.</summary>
public sealed class ManualClock : IClock
{
    private readonly Lock _gate = new();
    private readonly List<ManualTimer> _timers = [];
    private long _nowNs;

    public long NowNs => Interlocked.Read(ref _nowNs);

    /// <summary>Calendar time at <see cref="NowNs"/> 0.</summary>
    public long UnixStartNs { get; set; } = 1_700_000_000_000_000_000;

    public long UnixTimeNs => UnixStartNs + NowNs;

    /// <summary>How many timers are armed.</summary>
    public int ArmedTimers
    {
        get
        {
            lock (_gate)
            {
                int armed = 0;
                foreach (ManualTimer timer in _timers)
                {
                    armed += timer.IsArmed ? 1 : 0;
                }

                return armed;
            }
        }
    }

    public IGuestTimer CreateTimer(string name, Action onExpire)
    {
        var timer = new ManualTimer(this, onExpire);
        lock (_gate)
        {
            _timers.Add(timer);
        }

        return timer;
    }

    /// <summary>Moves time and runs what expires on the way; each callback sees the time of its deadline.</summary>
    public void Advance(long ns)
    {
        long end = NowNs + ns;
        while (true)
        {
            ManualTimer? next = null;
            lock (_gate)
            {
                foreach (ManualTimer timer in _timers)
                {
                    if (timer.IsArmed && timer.DeadlineNs <= end && (next is null || timer.DeadlineNs < next.DeadlineNs))
                    {
                        next = timer;
                    }
                }

                if (next is null)
                {
                    break;
                }

                next.Cancel();
                Interlocked.Exchange(ref _nowNs, Math.Max(NowNs, next.DeadlineNs));
            }

            next.Expire();
        }

        Interlocked.Exchange(ref _nowNs, end);
    }

    private sealed class ManualTimer : IGuestTimer
    {
        private readonly ManualClock _owner;
        private readonly Action _onExpire;

        public ManualTimer(ManualClock owner, Action onExpire)
        {
            _owner = owner;
            _onExpire = onExpire;
        }

        public bool IsArmed { get; private set; }

        public long DeadlineNs { get; private set; }

        public void ArmAt(long deadlineNs)
        {
            lock (_owner._gate)
            {
                DeadlineNs = deadlineNs;
                IsArmed = true;
            }
        }

        public void Cancel()
        {
            lock (_owner._gate)
            {
                IsArmed = false;
            }
        }

        public void Expire() => _onExpire();

        public void Dispose()
        {
            lock (_owner._gate)
            {
                IsArmed = false;
                _owner._timers.Remove(this);
            }
        }
    }
}

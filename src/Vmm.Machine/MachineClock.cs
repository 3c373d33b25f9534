// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Threading;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Machine;

/// <summary>A clock as the machine drives it.</summary>
internal interface IMachineClock : IClock, IDisposable
{
    /// <summary>Lets time pass.</summary>
    void Resume();

    /// <summary>Stops time. When it returns, no callback is running (unless the caller is one).</summary>
    void Pause();

    /// <summary>Sets guest time after loading a snapshot. Only while paused.</summary>
    void SetNow(long nowNs);
}

/// <summary>
/// Guest time from the host's monotonic clock. It stands still while paused. One thread runs the timers' callbacks, one
/// after another, in order of their deadlines; a machine has a few dozen timers, so they are kept in a plain list.
/// </summary>
internal sealed class MachineClock : IMachineClock
{
    private readonly Lock _gate = new();
    private readonly List<Timer> _armed = [];
    private readonly TimedWait _wait = new();
    private readonly Thread _thread;
    private readonly long _unixEpochNs;
    private long _startTicks;
    private long _baseNs;
    private bool _running;
    private volatile bool _disposed;
    private bool _inCallback;

    /// <summary>Makes a clock that stands at 0.</summary>
    /// <param name="unixTimeNs">Calendar time at guest time 0.</param>
    public MachineClock(long unixTimeNs)
    {
        _unixEpochNs = unixTimeNs;
        _thread = new Thread(Loop) { IsBackground = true, Name = "clock" };
        _thread.Start();
    }

    /// <inheritdoc/>
    public long NowNs
    {
        get
        {
            long start = Volatile.Read(ref _startTicks);
            long since = Volatile.Read(ref _running) ? Elapsed(start) : 0;
            return Volatile.Read(ref _baseNs) + since;
        }
    }

    /// <inheritdoc/>
    public long UnixTimeNs => _unixEpochNs + NowNs;

    /// <inheritdoc/>
    public bool FollowsHost => true;

    /// <inheritdoc/>
    public IGuestTimer CreateTimer(string name, Action onExpire)
    {
        ArgumentNullException.ThrowIfNull(onExpire);
        return new Timer(this, name, onExpire);
    }

    /// <inheritdoc/>
    public void Resume()
    {
        lock (_gate)
        {
            if (!_running)
            {
                _startTicks = Stopwatch.GetTimestamp();
                Volatile.Write(ref _running, true);
            }
        }

        _wait.Wake();
    }

    /// <inheritdoc/>
    public void Pause()
    {
        lock (_gate)
        {
            if (_running)
            {
                long since = Elapsed(_startTicks);
                Volatile.Write(ref _running, false);
                Volatile.Write(ref _baseNs, _baseNs + since);
            }
        }

        if (Thread.CurrentThread != _thread)
        {
            var spin = default(SpinWait);
            while (Volatile.Read(ref _inCallback))
            {
                spin.SpinOnce();
            }
        }
    }

    /// <inheritdoc/>
    public void SetNow(long nowNs)
    {
        lock (_gate)
        {
            Volatile.Write(ref _baseNs, nowNs);
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        if (_disposed)
        {
            return;
        }

        _disposed = true;
        _wait.Wake();
        if (Thread.CurrentThread != _thread)
        {
            _thread.Join();
            _wait.Dispose();
        }
    }

    private static long Elapsed(long startTicks)
    {
        long ticks = Stopwatch.GetTimestamp() - startTicks;
        return Stopwatch.Frequency == 1_000_000_000
            ? ticks
            : (long)((Int128)ticks * 1_000_000_000 / Stopwatch.Frequency);
    }

    private void Loop()
    {
        while (!_disposed)
        {
            Timer? due = null;
            long waitNs = -1;
            lock (_gate)
            {
                if (_running && _armed.Count > 0)
                {
                    Timer first = _armed[0];
                    foreach (Timer timer in _armed)
                    {
                        if (timer.DeadlineNs < first.DeadlineNs)
                        {
                            first = timer;
                        }
                    }

                    waitNs = Math.Max(0, first.DeadlineNs - NowNs);
                    if (waitNs == 0)
                    {
                        due = first;
                        _armed.Remove(first);
                        first.Armed = false;
                        Volatile.Write(ref _inCallback, true);
                    }
                }
            }

            if (due is not null)
            {
                due.OnExpire();
                Volatile.Write(ref _inCallback, false);
            }
            else
            {
                _wait.Wait(waitNs);
            }
        }
    }

    private sealed class Timer(MachineClock clock, string name, Action onExpire) : IGuestTimer
    {
        public Action OnExpire { get; } = onExpire;

        public long DeadlineNs { get; private set; }

        public bool Armed { get; set; }

        public bool IsArmed
        {
            get
            {
                lock (clock._gate)
                {
                    return Armed;
                }
            }
        }

        public void ArmAt(long deadlineNs)
        {
            bool sooner;
            lock (clock._gate)
            {
                sooner = !Armed || deadlineNs < DeadlineNs;
                DeadlineNs = deadlineNs;
                if (!Armed)
                {
                    Armed = true;
                    clock._armed.Add(this);
                }
            }

            if (sooner && Thread.CurrentThread != clock._thread)
            {
                clock._wait.Wake();
            }
        }

        public void Cancel()
        {
            lock (clock._gate)
            {
                if (Armed)
                {
                    Armed = false;
                    clock._armed.Remove(this);
                }
            }
        }

        public void Dispose() => Cancel();

        public override string ToString() => name;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;
using Vmm.X86;

namespace Vmm.Machine;

// Theory of `clock: icount`. Guest time is the number of instructions that the one vCPU has executed, a nanosecond each,
// plus the time that it has slept through. The vCPU's own thread is the only one on which time passes and timers expire:
//
//     the vCPU stops at the instruction count of the next deadline (SoftVcpu.StopAt), the thread runs the callbacks of
//     what is due, in the order of deadlines and of arming, and goes on;
//     HLT with nothing to deliver moves time to the next deadline at once.
//
// So every timer interrupt arrives at the same instruction in every run of the same definition, and the time stamp counter,
// the PIT and the rest show the same values there. The calendar starts at a fixed date unless the definition has one, and
// RDRAND gives a fixed sequence. Not repeatable is what comes from outside: keys, packets, the completion of disk
// transfers, virtio-rng; it arrives when it arrives.

/// <summary>Guest time that an instruction count drives. Now and timers: any thread; the rest as it says.</summary>
internal sealed class InstructionClock : IMachineClock
{
    /// <summary>Calendar time at guest time 0 when the definition says nothing.</summary>
    public static readonly DateTimeOffset Epoch = new(2020, 1, 1, 0, 0, 0, TimeSpan.Zero);

    private readonly Lock _gate = new();
    private readonly List<Timer> _armed = [];
    private readonly long _unixEpochNs;
    private SoftVcpu? _vcpu;
    private long _skippedNs;
    private long _armings;

    /// <summary>Makes a clock that stands at 0 until a vCPU is attached.</summary>
    public InstructionClock(long unixTimeNs) => _unixEpochNs = unixTimeNs;

    /// <inheritdoc/>
    public long NowNs => Volatile.Read(ref _skippedNs) + (_vcpu?.InstructionsRetired ?? 0);

    /// <inheritdoc/>
    public long UnixTimeNs => _unixEpochNs + NowNs;

    /// <summary>The vCPU whose instructions count. Before it runs.</summary>
    public void Attach(SoftVcpu vcpu)
    {
        lock (_gate)
        {
            _vcpu = vcpu;
            SetStop();
        }
    }

    /// <inheritdoc/>
    public IGuestTimer CreateTimer(string name, Action onExpire)
    {
        ArgumentNullException.ThrowIfNull(onExpire);
        return new Timer(this, name, onExpire);
    }

    /// <summary>Runs the callbacks of what is due. On the vCPU's thread, between two runs.</summary>
    public void RunDue()
    {
        while (TakeDue() is { } due)
        {
            due.OnExpire();
        }
    }

    /// <summary>
    /// Moves time to the next deadline and runs what is due there. On the vCPU's thread, which sleeps. False: no timer is
    /// armed, only the outside can wake it.
    /// </summary>
    public bool Skip()
    {
        lock (_gate)
        {
            if (First() is not { } first)
            {
                return false;
            }

            Volatile.Write(ref _skippedNs, _skippedNs + Math.Max(0, first.DeadlineNs - NowNs));
        }

        RunDue();
        return true;
    }

    /// <inheritdoc/>
    public void Resume()
    {
        // Time stands still by itself while the vCPU does.
    }

    /// <inheritdoc/>
    public void Pause()
    {
    }

    /// <inheritdoc/>
    public void SetNow(long nowNs)
    {
        lock (_gate)
        {
            Volatile.Write(ref _skippedNs, nowNs - (_vcpu?.InstructionsRetired ?? 0));
            SetStop();
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        lock (_gate)
        {
            _armed.Clear();
            _vcpu = null;
        }
    }

    private Timer? TakeDue()
    {
        lock (_gate)
        {
            Timer? first = First();
            if (first is null || first.DeadlineNs > NowNs)
            {
                SetStop();
                return null;
            }

            first.Armed = false;
            _armed.Remove(first);
            return first;
        }
    }

    private Timer? First()
    {
        Timer? first = null;
        foreach (Timer timer in _armed)
        {
            bool isSooner = first is null || timer.DeadlineNs < first.DeadlineNs ||
                (timer.DeadlineNs == first.DeadlineNs && timer.Arming < first.Arming);
            first = isSooner ? timer : first;
        }

        return first;
    }

    private void SetStop()
    {
        if (_vcpu is { } vcpu)
        {
            vcpu.StopAt = First() is { } first ? Math.Max(0, first.DeadlineNs - _skippedNs) : long.MaxValue;
        }
    }

    private sealed class Timer(InstructionClock clock, string name, Action onExpire) : IGuestTimer
    {
        public Action OnExpire { get; } = onExpire;

        public long DeadlineNs { get; private set; }

        public long Arming { get; private set; }

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
            lock (clock._gate)
            {
                DeadlineNs = deadlineNs;
                Arming = ++clock._armings;
                if (!Armed)
                {
                    Armed = true;
                    clock._armed.Add(this);
                }

                clock.SetStop();
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
                    clock.SetStop();
                }
            }
        }

        public void Dispose() => Cancel();

        public override string ToString() => name;
    }
}

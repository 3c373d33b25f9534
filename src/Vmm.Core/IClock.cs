// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.Core;

/// <summary>
/// Guest time. It starts at 0 when the machine is made, stands still while the machine is paused, and never goes
/// back. The software CPU can drive it from an instruction count, which makes a run repeatable.
/// </summary>
public interface IClock
{
    /// <summary>Nanoseconds of guest time. Any thread; cheap.</summary>
    long NowNs { get; }

    /// <summary>The calendar time that the guest's RTC shows, in nanoseconds since 1970-01-01 UTC.</summary>
    long UnixTimeNs { get; }

    /// <summary>
    /// True when guest time, while it runs, passes as the host's does: then a vCPU may compute it from the host's time
    /// stamp counter between two readings.
    /// </summary>
    bool FollowsHost => false;

    /// <summary>Makes a timer, not armed. The callback runs on the clock's thread, one at a time; it must not block.</summary>
    /// <param name="name">For diagnostics.</param>
    /// <param name="onExpire">Called once per arming, at or after the deadline.</param>
    IGuestTimer CreateTimer(string name, Action onExpire);
}

/// <summary>A one-shot timer in guest time. Any thread. Dispose cancels.</summary>
public interface IGuestTimer : IDisposable
{
    /// <summary>True between arming and expiry.</summary>
    bool IsArmed { get; }

    /// <summary>Arms or re-arms.</summary>
    /// <param name="deadlineNs">In <see cref="IClock.NowNs"/>; a time in the past expires at once.</param>
    void ArmAt(long deadlineNs);

    /// <summary>Cancels; a callback that is already running may still finish.</summary>
    void Cancel();
}

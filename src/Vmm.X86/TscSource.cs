// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.Intrinsics.X86;
using System.Threading;

namespace Vmm.X86;

// Theory of the guest's time stamp counter.
//
// The guest's TSC is guest time (IClock) at a stated frequency plus the vCPU's offset. To ask the clock each time costs a
// call out of generated code and a system clock's reading. Where the clock follows the host's time and the host's TSC is
// invariant, the counter is computed from the host's TSC instead: for a window of about a millisecond of host ticks, the
// guest's ticks are a straight line over the host's, and RDTSC in generated code is a host RDTSC, a multiplication and an
// addition (Translator.System.cs). Whoever reads behind the end of the window asks the clock again and draws the next line.
//
// Never backwards, on no vCPU. Lines are shared by the vCPUs of a VM; each has a copy that it alone refreshes. Windows
// do not overlap in host ticks, and a line starts where the clock is or where the last one ended, whichever is later. A
// line is drawn a little too flat (1 in 2^16), so that it falls behind the clock, by less than 20 ns in a window, rather
// than running ahead; what has run ahead all the same (the host's clock was slewed, the machine stood still in the
// window) is made good by flatter lines. So the counter agrees with the clock, which the timers of the APIC follow, to
// within a window at worst and some ten nanoseconds as a rule.
//
// Fallback. Without an invariant TSC, without code memory for the RDTSC routine, or with a clock that is not the host's
// (tests, a clock that counts instructions), every reading asks the clock.

/// <summary>A straight line from host ticks to guest ticks. Limit 0: there is none.</summary>
internal struct TscLine
{
    /// <summary>Host ticks at the start.</summary>
    public ulong Base;

    /// <summary>Host ticks behind the start that it serves.</summary>
    public ulong Limit;

    /// <summary>Guest ticks for a host tick, times 2^32.</summary>
    public ulong Scale;

    /// <summary>Guest ticks at the start.</summary>
    public ulong Value;

    /// <summary>Guest ticks at a host tick inside the window.</summary>
    public readonly ulong At(ulong host) => Value + (((host - Base) * Scale) >> 32);
}

/// <summary>Time stamps for the vCPUs of a VM, without their offsets. All members: any thread.</summary>
internal sealed unsafe class TscSource
{
    /// <summary>Nanoseconds that a line serves.</summary>
    public const long WindowNs = 1_000_000;

    // The slope is measured over at least a window and at most this.
    private const long LongestNs = 2_000_000_000;

    // A slope that differs by more than 1 in 2^10 from the last one comes from a machine that stood still in between.
    private const int JumpShift = 10;
    private const int FlatShift = 16;

    // Counters of 10 MHz to 100 GHz, for a guest's of 1 GHz. A product of a window and a slope fits in 64 bits.
    private const ulong LeastSlope = 1UL << 25;
    private const ulong GreatestSlope = 1UL << 39;

    private readonly Lock _gate = new();
    private readonly Core.IClock _clock;
    private readonly ulong _khz;
    private readonly delegate* unmanaged[SuppressGCTransition]<ulong> _read;
    private TscLine _line;
    private ulong _slope;
    private ulong _last;
    private Pair _from;
    private Pair _middle;

    /// <summary>Makes one.</summary>
    /// <param name="clock">Guest time.</param>
    /// <param name="khz">Guest ticks in a millisecond.</param>
    /// <param name="thunks">Takes the routine that reads the host's counter; null: the clock is asked each time.</param>
    public TscSource(Core.IClock clock, long khz, ThunkCache? thunks)
    {
        _clock = clock;
        _khz = (ulong)khz;
        if (thunks is not null && clock.FollowsHost && IsInvariant())
        {
            _read = (delegate* unmanaged[SuppressGCTransition]<ulong>)thunks.AddRoutine(Routine);
        }
    }

    /// <summary>True when lines are drawn.</summary>
    public bool HasLines => _read != null;

    // LFENCE, so that the host does not read ahead of what comes before: ulong routine().
    private static ReadOnlySpan<byte> Routine =>
    [
        0x0F, 0xAE, 0xE8,               // lfence
        0x0F, 0x31,                     // rdtsc
        0x48, 0xC1, 0xE2, 0x20,         // shl rdx, 32
        0x48, 0x09, 0xD0,               // or rax, rdx
        0xC3,                           // ret
    ];

    /// <summary>Guest ticks as the clock has them. While the machine stands still, so do they.</summary>
    public ulong AtClock() => Ticks(_clock.NowNs);

    /// <summary>Guest ticks now.</summary>
    /// <param name="own">The caller's line; replaced when it does not serve any more.</param>
    public ulong Read(ref TscLine own)
    {
        if (_read == null)
        {
            return AtClock();
        }

        ulong host = _read();
        return host - own.Base < own.Limit ? own.At(host) : Refresh(ref own);
    }

    private ulong Refresh(ref TscLine own)
    {
        lock (_gate)
        {
            ulong host = _read();
            if (host - _line.Base < _line.Limit)
            {
                own = _line;
                return own.At(host);
            }

            if (host - _line.Base >= 1UL << 63)
            {
                // A thread that was moved to a processor whose counter is behind: the line starts in its future.
                own = default;
                return Math.Max(_last, _line.Value);
            }

            Pair now = Measure();
            ulong ended = _line.Limit == 0 ? _last : _line.At(_line.Base + _line.Limit);
            ulong clock = Ticks(now.Ns);
            _last = Math.Max(Math.Max(clock, ended), _last);
            _line = Draw(now, _last, _last - clock);
            own = _line;
            return _last;
        }
    }

    // A line from now on, or none when the slope is not known yet.
    private TscLine Draw(in Pair now, ulong value, ulong ahead)
    {
        if (_from.Host == 0 || now.Host <= _from.Host || now.Ns - _from.Ns < WindowNs)
        {
            _from = _from.Host == 0 || now.Host <= _from.Host || now.Ns < _from.Ns ? now : _from;
            return default;
        }

        ulong slope = (ulong)(((UInt128)(Ticks(now.Ns) - Ticks(_from.Ns)) << 32) / (now.Host - _from.Host));
        ulong difference = slope > _slope ? slope - _slope : _slope - slope;
        bool jumped = _slope != 0 && difference > _slope >> JumpShift;
        _slope = slope;
        if (jumped || slope < LeastSlope || slope > GreatestSlope)
        {
            _slope = 0;
            _from = now;
            _middle = default;
            return default;
        }

        if (now.Ns - _from.Ns > LongestNs / 2 && _middle.Host == 0)
        {
            _middle = now;
        }
        else if (now.Ns - _from.Ns > LongestNs)
        {
            _from = _middle;
            _middle = default;
        }

        ulong window = _khz * (WindowNs / 1_000_000);
        slope -= slope >> FlatShift;
        slope -= (ulong)((UInt128)slope * Math.Min(ahead, window / 2) / window);
        return new TscLine
        {
            Base = now.Host,
            Limit = (ulong)(((UInt128)window << 32) / slope),
            Scale = slope,
            Value = value,
        };
    }

    // The clock between two readings of the counter that lie close together; the later one counts, so that a line never
    // runs ahead of the clock by what the measurement takes.
    private Pair Measure()
    {
        Pair best = default;
        ulong distance = ulong.MaxValue;
        for (int i = 0; i < 3; i++)
        {
            ulong before = _read();
            long ns = _clock.NowNs;
            ulong after = _read();
            if (after - before < distance)
            {
                distance = after - before;
                best = new Pair(after, ns);
            }
        }

        return best;
    }

    private ulong Ticks(long ns) => _khz == 1_000_000 ? (ulong)ns : (ulong)((UInt128)(ulong)ns * _khz / 1_000_000);

    // CPUID 8000_0007h EDX bit 8 (APM 3, SDM 3B 18.17.1).
    private static bool IsInvariant()
    {
        const int leaf = unchecked((int)0x80000007);
        return X86Base.IsSupported && (uint)X86Base.CpuId(unchecked((int)0x80000000), 0).Eax >= 0x80000007 &&
            (X86Base.CpuId(leaf, 0).Edx & (1 << 8)) != 0;
    }

    private readonly record struct Pair(ulong Host, long Ns);
}

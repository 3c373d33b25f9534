// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.Backends.Limits;

/// <summary>
/// A rate limit: tokens flow in at a rate up to a burst; who takes more than there are goes into debt and waits until it
/// is paid. Not thread-safe: its owner has a lock.
/// </summary>
public sealed class TokenBucket
{
    private const long NsPerSecond = 1_000_000_000;

    private readonly long _perSecond;
    private readonly long _burst;
    private long _tokens;
    private long _lastNs;
    private long _remainder;

    /// <summary>Makes a full one.</summary>
    /// <param name="perSecond">Tokens a second; 0 means no limit.</param>
    /// <param name="burst">Most tokens that gather while nobody takes any; at least 1.</param>
    /// <param name="nowNs">Present time of any steady clock.</param>
    public TokenBucket(long perSecond, long burst, long nowNs)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(perSecond);
        _perSecond = perSecond;
        _burst = Math.Max(1, burst);
        _tokens = _burst;
        _lastNs = nowNs;
    }

    /// <summary>True when the next request may go.</summary>
    public bool IsOpen(long nowNs)
    {
        Refill(nowNs);
        return _perSecond == 0 || _tokens > 0;
    }

    /// <summary>Takes tokens, into debt if need be.</summary>
    public void Take(long count)
    {
        if (_perSecond != 0)
        {
            _tokens -= count;
        }
    }

    /// <summary>Nanoseconds until <see cref="IsOpen"/> can be true; 0 for now.</summary>
    public long WaitNs(long nowNs)
    {
        if (IsOpen(nowNs))
        {
            return 0;
        }

        Int128 needed = ((Int128)(1 - _tokens) * NsPerSecond) - _remainder;
        return (long)Int128.Min(long.MaxValue, (needed / _perSecond) + 1);
    }

    private void Refill(long nowNs)
    {
        long elapsed = Math.Max(0, nowNs - _lastNs);
        _lastNs = nowNs;
        if (_perSecond == 0)
        {
            return;
        }

        Int128 earned = ((Int128)elapsed * _perSecond) + _remainder;
        Int128 tokens = earned / NsPerSecond;
        if (tokens >= _burst - (Int128)_tokens)
        {
            _tokens = _burst;
            _remainder = 0;
            return;
        }

        _tokens += (long)tokens;
        _remainder = (long)(earned % NsPerSecond);
    }
}

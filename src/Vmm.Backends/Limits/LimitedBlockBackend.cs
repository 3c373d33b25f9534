// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Threading;
using Vmm.Core;

namespace Vmm.Backends.Limits;

/// <summary>
/// A disk with limits on bytes and requests a second. Requests beyond them wait in order; flushes cost a request and no
/// bytes. Drain lets everything go at once: a pause must not take as long as the limit would.
/// </summary>
public sealed class LimitedBlockBackend : IBlockBackend
{
    private readonly Lock _gate = new();
    private readonly IBlockBackend _inner;
    private readonly TokenBucket _bytes;
    private readonly TokenBucket _requests;
    private readonly Queue<BlockRequest> _waiting = new();
    private readonly Timer _timer;

    /// <summary>Makes one around a disk, which it owns. A burst is a tenth of a second's worth.</summary>
    /// <param name="inner">The disk.</param>
    /// <param name="bytesPerSecond">0 for no limit.</param>
    /// <param name="requestsPerSecond">0 for no limit.</param>
    public LimitedBlockBackend(IBlockBackend inner, long bytesPerSecond, int requestsPerSecond)
    {
        _inner = inner;
        _bytes = new TokenBucket(bytesPerSecond, Math.Max(bytesPerSecond / 10, 65536), NowNs());
        _requests = new TokenBucket(requestsPerSecond, Math.Max(requestsPerSecond / 10, 1), NowNs());
        _timer = new Timer(_ => Release(all: false), null, Timeout.Infinite, Timeout.Infinite);
    }

    /// <inheritdoc/>
    public long LengthBytes => _inner.LengthBytes;

    /// <inheritdoc/>
    public int BlockBytes => _inner.BlockBytes;

    /// <inheritdoc/>
    public bool IsReadOnly => _inner.IsReadOnly;

    /// <inheritdoc/>
    public bool CanDiscard => _inner.CanDiscard;

    /// <inheritdoc/>
    public void Submit(BlockRequest request)
    {
        lock (_gate)
        {
            if (_waiting.Count > 0 || !IsOpen())
            {
                _waiting.Enqueue(request);
                Schedule();
                return;
            }

            Take(request);
        }

        _inner.Submit(request);
    }

    /// <inheritdoc/>
    public void Drain()
    {
        Release(all: true);
        _inner.Drain();
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _timer.Dispose();
        Drain();
        _inner.Dispose();
    }

    private static long NowNs() =>
        (long)((Int128)Stopwatch.GetTimestamp() * 1_000_000_000 / Stopwatch.Frequency);

    private bool IsOpen()
    {
        long now = NowNs();
        return _bytes.IsOpen(now) && _requests.IsOpen(now);
    }

    private void Take(BlockRequest request)
    {
        _requests.Take(1);
        _bytes.Take(request.Operation is BlockOperation.Read or BlockOperation.Write ? request.LengthBytes : 0);
    }

    private void Schedule()
    {
        long now = NowNs();
        long waitNs = Math.Max(_bytes.WaitNs(now), _requests.WaitNs(now));
        _timer.Change(Math.Clamp(waitNs / 1_000_000, 1, 10_000), Timeout.Infinite);
    }

    private void Release(bool all)
    {
        for (; ; )
        {
            BlockRequest? request;
            lock (_gate)
            {
                if (_waiting.Count == 0)
                {
                    return;
                }

                if (!all && !IsOpen())
                {
                    Schedule();
                    return;
                }

                request = _waiting.Dequeue();
                Take(request);
            }

            _inner.Submit(request);
        }
    }
}

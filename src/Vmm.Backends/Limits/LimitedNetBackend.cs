// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;

namespace Vmm.Backends.Limits;

/// <summary>
/// A network with a limit on bytes a second in each direction. What the guest sends beyond it waits in a bounded queue,
/// behind which frames are lost, as on a slow link; what it would receive stays with the network behind.
/// </summary>
public sealed class LimitedNetBackend : INetBackend, INetReceiver
{
    private const int MaxWaitingBytes = 512 * 1024;

    private readonly Lock _gate = new();
    private readonly INetBackend _inner;
    private readonly TokenBucket _send;
    private readonly TokenBucket _receive;
    private readonly Queue<(byte[] Frame, NetOffload Offload)> _waiting = new();
    private readonly TimeProvider _time;
    private readonly ITimer _timer;
    private INetReceiver? _receiver;
    private int _waitingBytes;
    private bool _refused;
    private bool _sending;
    private long _dropped;

    /// <summary>Makes one around a network, which it owns. A burst is a tenth of a second's worth, at least 128 KiB.</summary>
    /// <param name="inner">The network.</param>
    /// <param name="bytesPerSecond">In each direction.</param>
    /// <param name="time">What measures and wakes; null for the host's clock.</param>
    public LimitedNetBackend(INetBackend inner, long bytesPerSecond, TimeProvider? time = null)
    {
        ArgumentNullException.ThrowIfNull(inner);
        _inner = inner;
        _time = time ?? TimeProvider.System;
        long burst = Math.Max(bytesPerSecond / 10, 128 * 1024);
        _send = new TokenBucket(bytesPerSecond, burst, NowNs());
        _receive = new TokenBucket(bytesPerSecond, burst, NowNs());
        _timer = _time.CreateTimer(_ => Expire(), null, Timeout.InfiniteTimeSpan, Timeout.InfiniteTimeSpan);
    }

    /// <inheritdoc/>
    public bool CanOffload => _inner.CanOffload;

    /// <inheritdoc/>
    public bool TakesOffload => _receiver is { TakesOffload: true };

    /// <summary>Frames of the guest that were lost to the limit.</summary>
    public long Dropped => Interlocked.Read(ref _dropped);

    /// <inheritdoc/>
    public void Attach(INetReceiver receiver)
    {
        _receiver = receiver;
        _inner.Attach(this);
    }

    /// <inheritdoc/>
    public void ResumeReceive() => _inner.ResumeReceive();

    /// <inheritdoc/>
    public void Send(ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        lock (_gate)
        {
            if (_sending || _waiting.Count > 0 || !_send.IsOpen(NowNs()))
            {
                if (_waitingBytes + frame.Length > MaxWaitingBytes)
                {
                    Interlocked.Increment(ref _dropped);
                    return;
                }

                _waiting.Enqueue((frame.ToArray(), offload));
                _waitingBytes += frame.Length;
                Schedule();
                return;
            }

            _send.Take(frame.Length);
        }

        _inner.Send(frame, offload);
    }

    /// <inheritdoc/>
    public bool TryReceive(ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        lock (_gate)
        {
            if (!_receive.IsOpen(NowNs()))
            {
                _refused = true;
                Schedule();
                return false;
            }
        }

        if (_receiver is not { } receiver || !receiver.TryReceive(frame, offload))
        {
            return _receiver is null;
        }

        lock (_gate)
        {
            _receive.Take(frame.Length);
        }

        return true;
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _timer.Dispose();
        _inner.Dispose();
    }

    private long NowNs() => (long)((Int128)_time.GetTimestamp() * 1_000_000_000 / _time.TimestampFrequency);

    private void Schedule()
    {
        long now = NowNs();
        long waitNs = Math.Max(_waiting.Count > 0 ? _send.WaitNs(now) : 0, _refused ? _receive.WaitNs(now) : 0);
        _timer.Change(TimeSpan.FromMilliseconds(Math.Clamp(waitNs / 1_000_000, 1, 10_000)), Timeout.InfiniteTimeSpan);
    }

    private void Expire()
    {
        bool resume;
        lock (_gate)
        {
            if (_sending)
            {
                return; // another expiry is still at it, and resumes at its end
            }

            _sending = true;
        }

        for (; ; )
        {
            (byte[] Frame, NetOffload Offload) next;
            lock (_gate)
            {
                if (_waiting.Count == 0 || !_send.IsOpen(NowNs()))
                {
                    _sending = false;
                    resume = _refused;
                    _refused = false;
                    if (_waiting.Count > 0)
                    {
                        Schedule();
                    }

                    break;
                }

                next = _waiting.Dequeue();
                _waitingBytes -= next.Frame.Length;
                _send.Take(next.Frame.Length);
            }

            _inner.Send(next.Frame, next.Offload);
        }

        if (resume)
        {
            _inner.ResumeReceive();
        }
    }
}

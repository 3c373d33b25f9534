// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading.Tasks;
using System.Collections.Generic;
using System.Threading;
using FluentAssertions;
using Vmm.Backends.Limits;
using Vmm.Core;
using Xunit;

namespace Vmm.Backends.Tests.Limits;

public sealed class LimitTests
{
    private const long Second = 1_000_000_000;

    [Fact]
    public void Bucket_OverTime_GivesExactlyTheRate()
    {
        var bucket = new TokenBucket(perSecond: 1000, burst: 100, nowNs: 0);
        long now = 0;
        long taken = 0;
        while (now < 10 * Second)
        {
            while (bucket.IsOpen(now))
            {
                bucket.Take(7);
                taken += 7;
            }

            long wait = bucket.WaitNs(now);
            wait.Should().BeGreaterThan(0);
            now += wait;
        }

        taken.Should().BeInRange(10_000, 10_000 + 100 + 14);
    }

    [Fact]
    public void Bucket_LongIdle_KeepsOnlyTheBurst()
    {
        var bucket = new TokenBucket(1000, 50, 0);
        bucket.Take(50);
        bucket.IsOpen(0).Should().BeFalse();
        bucket.IsOpen(1000 * Second).Should().BeTrue();
        bucket.Take(50);
        bucket.IsOpen(1000 * Second).Should().BeFalse();
        bucket.WaitNs(1000 * Second).Should().BeInRange(900_000, 1_100_001);
    }

    [Fact]
    public void Bucket_WithoutLimit_IsAlwaysOpen()
    {
        var bucket = new TokenBucket(0, 0, 0);
        bucket.Take(long.MaxValue);
        bucket.IsOpen(0).Should().BeTrue();
        bucket.WaitNs(0).Should().Be(0);
    }

    [Fact]
    public void Net_BeyondLimit_DelaysThenDrops()
    {
        var time = new ManualTime();
        var inner = new Net();
        using var net = new LimitedNetBackend(inner, 1_000_000, time);
        net.Attach(new Device());
        byte[] frame = new byte[1000];
        for (int i = 0; i < 900; i++)
        {
            net.Send(frame, default);
        }

        const int Burst = (128 * 1024 / 1000) + 1; // a bucket that is not empty lets a whole frame through
        const int Waiting = 512 * 1024 / 1000;
        inner.Sent.Should().Be(Burst, "a burst passes at once");
        net.Dropped.Should().Be(900 - Burst - Waiting, "the queue is bounded");
        for (int ms = 1; ms <= 1000; ms++)
        {
            time.Advance(1);
            inner.Sent.Should().BeInRange(Burst + Math.Min(ms, Waiting) - 2, Burst + Math.Min(ms, Waiting) + 1, "a frame a millisecond");
        }

        inner.Sent.Should().Be(Burst + Waiting, "what waited is not lost");
    }

    [Fact]
    public void Net_ReceivesBeyondLimit_IsHeldAndResumed()
    {
        var time = new ManualTime();
        var inner = new Net();
        using var net = new LimitedNetBackend(inner, 1_000_000, time);
        var device = new Device();
        net.Attach(device);
        byte[] frame = new byte[1000];
        int received = 0;
        for (int ms = 0; ms < 500; ms++)
        {
            while (inner.Receiver!.TryReceive(frame, default))
            {
                received++;
            }

            int resumed = inner.Resumed;
            time.Advance(2);
            inner.Resumed.Should().BeGreaterThan(resumed, "a network that was refused is told when to go on");
        }

        device.Frames.Should().Be(received);
        received.Should().BeInRange(132 + 990, 132 + 1000, "a second's worth and a burst");
    }

    private sealed class Net : INetBackend
    {
        private int _sent;
        private int _resumed;

        public int Sent => Volatile.Read(ref _sent);

        public int Resumed => Volatile.Read(ref _resumed);

        public INetReceiver? Receiver { get; private set; }

        public bool CanOffload => true;

        public void Send(ReadOnlySpan<byte> frame, in NetOffload offload) => Interlocked.Increment(ref _sent);

        public void Attach(INetReceiver receiver) => Receiver = receiver;

        public void ResumeReceive() => Interlocked.Increment(ref _resumed);

        public void Dispose()
        {
        }
    }

    private sealed class Device : INetReceiver
    {
        public int Frames { get; private set; }

        public bool TryReceive(ReadOnlySpan<byte> frame, in NetOffload offload)
        {
            Frames++;
            return true;
        }
    }

    /// <summary>A clock that stands still, and timers that run when it is moved.</summary>
    private sealed class ManualTime : TimeProvider
    {
        private readonly List<ManualTimer> _timers = [];
        private long _nowMs = 5000;

        public override long TimestampFrequency => 1000;

        public override long GetTimestamp() => _nowMs;

        public override ITimer CreateTimer(TimerCallback callback, object? state, TimeSpan dueTime, TimeSpan period)
        {
            var timer = new ManualTimer(this, () => callback(state));
            timer.Change(dueTime, period);
            _timers.Add(timer);
            return timer;
        }

        public void Advance(int milliseconds)
        {
            for (; milliseconds > 0; milliseconds--)
            {
                _nowMs++;
                foreach (ManualTimer timer in _timers)
                {
                    timer.RunIfDue();
                }
            }
        }

        private sealed class ManualTimer(ManualTime time, Action callback) : ITimer
        {
            private long _due = long.MaxValue;

            public bool Change(TimeSpan dueTime, TimeSpan period)
            {
                _due = dueTime < TimeSpan.Zero ? long.MaxValue : time._nowMs + (long)Math.Ceiling(dueTime.TotalMilliseconds);
                return true;
            }

            public void RunIfDue()
            {
                if (time._nowMs >= _due)
                {
                    _due = long.MaxValue;
                    callback();
                }
            }

            public void Dispose() => _due = long.MaxValue;

            public ValueTask DisposeAsync()
            {
                Dispose();
                return ValueTask.CompletedTask;
            }
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
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
    public void Net_BeyondLimit_DelaysThenDrops_AndHoldsReceive()
    {
        var inner = new Net();
        using var net = new LimitedNetBackend(inner, 1_000_000);
        var device = new Device();
        net.Attach(device);
        byte[] frame = new byte[1000];
        for (int i = 0; i < 900; i++)
        {
            net.Send(frame, default);
        }

        inner.Sent.Should().BeInRange(131, 140, "a burst passes at once");
        net.Dropped.Should().BeGreaterThan(100, "the queue is bounded");
        SpinWait.SpinUntil(() => inner.Sent > 300, 10_000).Should().BeTrue();
        int received = 0;
        while (inner.Receiver!.TryReceive(frame, default))
        {
            received++;
        }

        received.Should().BeInRange(131, 200);
        device.Frames.Should().Be(received);
        SpinWait.SpinUntil(() => inner.Resumed > 0, 10_000).Should().BeTrue();
        inner.Receiver.TryReceive(frame, default).Should().BeTrue();
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
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Diagnostics;
using System.Threading;
using FluentAssertions;
using Xunit;

namespace Vmm.Host.Tests;

public sealed class TimedWaitTests : IDisposable
{
    private readonly TimedWait _wait = new();

    public void Dispose() => _wait.Dispose();

    [Fact]
    public void Wait_WokenBefore_ReturnsAtOnceAndOnlyOnce()
    {
        _wait.Wake();
        _wait.Wake();
        _wait.Wait(-1).Should().BeTrue();
        _wait.Wait(1_000_000).Should().BeFalse("two wake-ups count as one");
    }

    [Fact]
    public void Wait_TimeIsUp_TakesThatLong()
    {
        long start = Stopwatch.GetTimestamp();
        _wait.Wait(20_000_000).Should().BeFalse();
        Stopwatch.GetElapsedTime(start).TotalMilliseconds.Should().BeGreaterThan(15);
    }

    [Fact]
    public void Spin_WokenBefore_TakesTheWakeUp()
    {
        _wait.Wake();
        _wait.Spin(0).Should().BeTrue();
        _wait.Wait(1_000_000).Should().BeFalse();
    }

    [Fact]
    public void Spin_NotWoken_LeavesTheNextWakeUpToTheWait()
    {
        _wait.Spin(100_000).Should().BeFalse();
        _wait.Wake();
        _wait.Wait(-1).Should().BeTrue();
    }

    [Fact]
    public void SpinThenWait_ManyWakeUps_LosesNone()
    {
        // Two threads hand a token back and forth; a lost wake-up stops them.
        const int Rounds = 20_000;
        using var other = new TimedWait();
        var thread = new Thread(() =>
        {
            for (int i = 0; i < Rounds; i++)
            {
                Take(other, i);
                _wait.Wake();
            }
        });
        thread.Start();
        for (int i = 0; i < Rounds; i++)
        {
            other.Wake();
            Take(_wait, i);
        }

        thread.Join(10_000).Should().BeTrue();

        static void Take(TimedWait wait, int round)
        {
            if (!wait.Spin(round % 3 * 2000))
            {
                while (!wait.Wait(-1))
                {
                    Thread.Yield(); // a signal ended it
                }
            }
        }
    }
}

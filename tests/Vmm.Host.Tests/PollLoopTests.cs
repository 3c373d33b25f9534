// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using FluentAssertions;
using Xunit;

namespace Vmm.Host.Tests;

public sealed class PollLoopTests
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(10);

    [Fact]
    public void Add_SignalledEvent_RunsTheCallbackOnTheLoopThread()
    {
        using var loop = new PollLoop("test loop");
        using var signal = new EventFd();
        using var called = new ManualResetEventSlim();
        bool onLoop = false;
        using IPollRegistration registration = loop.Add(signal.Handle, PollEvents.Readable, _ =>
        {
            onLoop = loop.IsLoopThread;
            signal.Drain();
            called.Set();
        });
        signal.Signal();
        called.Wait(s_patience).Should().BeTrue();
        onLoop.Should().BeTrue();
    }

    [Fact]
    public void Interest_None_SilencesUntilItIsSetAgain()
    {
        using var loop = new PollLoop("test loop");
        using var signal = new EventFd();
        using var called = new AutoResetEvent(false);
        IPollRegistration? registration = null;
        int calls = 0;
        registration = loop.Add(signal.Handle, PollEvents.None, _ =>
        {
            Interlocked.Increment(ref calls);
            registration!.Interest = PollEvents.None;
            called.Set();
        });
        signal.Signal();
        called.WaitOne(TimeSpan.FromMilliseconds(50)).Should().BeFalse();
        registration.Interest = PollEvents.Readable;
        called.WaitOne(s_patience).Should().BeTrue();
        called.WaitOne(TimeSpan.FromMilliseconds(50)).Should().BeFalse();
        calls.Should().Be(1);
        registration.Dispose();
    }

    [Fact]
    public void Dispose_WhileTheCallbackRuns_WaitsForItsEnd()
    {
        using var loop = new PollLoop("test loop");
        using var signal = new EventFd();
        using var entered = new ManualResetEventSlim();
        using var leave = new ManualResetEventSlim();
        bool finished = false;
        IPollRegistration registration = loop.Add(signal.Handle, PollEvents.Readable, _ =>
        {
            entered.Set();
            leave.Wait(s_patience);
            Volatile.Write(ref finished, true);
        });
        signal.Signal();
        entered.Wait(s_patience).Should().BeTrue();
        var remover = new Thread(registration.Dispose);
        remover.Start();
        remover.Join(50).Should().BeFalse("the callback still runs");
        leave.Set();
        remover.Join(s_patience).Should().BeTrue();
        Volatile.Read(ref finished).Should().BeTrue();
    }

    [Fact]
    public void Dispose_FromInsideTheCallback_DoesNotDeadlock()
    {
        using var loop = new PollLoop("test loop");
        using var signal = new EventFd();
        using var called = new ManualResetEventSlim();
        IPollRegistration? registration = null;
        registration = loop.Add(signal.Handle, PollEvents.None, _ =>
        {
            registration!.Dispose();
            called.Set();
        });
        registration.Interest = PollEvents.Readable;
        signal.Signal();
        called.Wait(s_patience).Should().BeTrue();
    }

    [Fact]
    public void EventFd_Wait_TimesOutAndSeesSignals()
    {
        using var signal = new EventFd();
        signal.Wait(10).Should().BeFalse();
        signal.Signal();
        signal.Signal();
        signal.Wait(-1).Should().BeTrue();
        signal.Drain().Should().BeFalse("signals coalesce");
    }
}

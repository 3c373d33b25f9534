// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Threading;
using Vmm.Host.Native;

namespace Vmm.Host;

// Theory. One thread waits in poll(2) for all descriptors of a VM process that are not disks: terminals, sockets, taps,
// event descriptors. poll is the only readiness call that the three systems share; the handful of descriptors of a VM
// does not need more. Callbacks run on this thread, one at a time, level-triggered; they must not block.
//
// Add, change and remove are allowed from any thread, also from inside a callback. When Dispose of a registration
// returns on another thread, its callback is not running and will not run again, so the caller may close the
// descriptor. (Inside the loop's own callbacks that guarantee comes for free.) Do not dispose a registration while
// holding a lock that its callback takes.

/// <summary>What to wait for, and what happened. POLLIN and its kin; the values are the same on all three systems.</summary>
[Flags]
public enum PollEvents
{
    /// <summary>Nothing: the registration sleeps, but hang-ups are still reported.</summary>
    None = 0,

    /// <summary>Data or a connection waits.</summary>
    Readable = 0x1,

    /// <summary>A write would not block.</summary>
    Writable = 0x4,

    /// <summary>An error is pending (reported always).</summary>
    Error = 0x8,

    /// <summary>The other side hung up (reported always).</summary>
    HangUp = 0x10,

    /// <summary>The descriptor is not open (reported always).</summary>
    Invalid = 0x20,
}

/// <summary>A descriptor in a <see cref="PollLoop"/>; Dispose takes it out.</summary>
public interface IPollRegistration : IDisposable
{
    /// <summary>What to wait for. Setting <see cref="PollEvents.None"/> also silences a permanent hang-up.</summary>
    PollEvents Interest { get; set; }
}

/// <summary>An event loop on its own thread.</summary>
public sealed class PollLoop : IDisposable
{
    private readonly Lock _gate = new();
    private readonly List<Registration> _registrations = [];
    private readonly EventFd _wake = new();
    private readonly ManualResetEventSlim _callbackDone = new(initialState: true);
    private readonly Thread _thread;
    private Registration[] _snapshot = [];
    private Registration? _running;
    private bool _changed;
    private bool _stopping;

    /// <summary>Makes a loop and starts its thread.</summary>
    /// <param name="threadName">The thread's name.</param>
    public PollLoop(string threadName)
    {
        _thread = new Thread(Run) { Name = threadName, IsBackground = true };
        _thread.Start();
    }

    /// <summary>True on the loop's own thread.</summary>
    public bool IsLoopThread => Thread.CurrentThread == _thread;

    /// <summary>Waits for one descriptor on the calling thread.</summary>
    /// <param name="handle">An open descriptor.</param>
    /// <param name="timeoutMs">Milliseconds; -1 waits for ever. A signal may end the wait early.</param>
    /// <returns>True when it is readable, hung up or broken.</returns>
    public static unsafe bool WaitReadable(SafeHandle handle, int timeoutMs)
    {
        using var held = new HeldHandle(handle);
        var poll = new LibC.PollFd { Fd = held.Fd, Events = (short)PollEvents.Readable };

        // SAFETY: one structure on this stack, and the count says one.
        return LibC.poll(&poll, 1, timeoutMs) > 0;
    }

    /// <summary>Adds a descriptor. The caller keeps it open until the registration is disposed.</summary>
    /// <param name="handle">An open descriptor.</param>
    /// <param name="interest">What to wait for.</param>
    /// <param name="onReady">Called on the loop's thread for as long as it is ready.</param>
    public IPollRegistration Add(SafeHandle handle, PollEvents interest, Action<PollEvents> onReady)
    {
        ArgumentNullException.ThrowIfNull(handle);
        var registration = new Registration(this, handle, interest, onReady);
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_stopping, this);
            _registrations.Add(registration);
            _changed = true;
        }

        _wake.Signal();
        return registration;
    }

    /// <summary>Stops the thread. Registrations left over are dropped. Not from inside a callback.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            if (_stopping)
            {
                return;
            }

            _stopping = true;
        }

        _wake.Signal();
        _thread.Join();
        lock (_gate)
        {
            foreach (Registration registration in _registrations)
            {
                registration.Release();
            }

            _registrations.Clear();
        }

        _wake.Dispose();
        _callbackDone.Dispose();
    }

    private void Change()
    {
        lock (_gate)
        {
            if (_stopping)
            {
                return;
            }

            _changed = true;
        }

        if (!IsLoopThread)
        {
            _wake.Signal(); // the loop's own thread looks before it waits again
        }
    }

    private void Remove(Registration registration)
    {
        while (true)
        {
            lock (_gate)
            {
                if (_registrations.Remove(registration))
                {
                    registration.Release();
                    _changed = true;
                    if (!_stopping)
                    {
                        _wake.Signal();
                    }
                }

                if (_running != registration || IsLoopThread)
                {
                    return;
                }
            }

            _callbackDone.Wait();
        }
    }

    private unsafe void Run()
    {
        var polls = new LibC.PollFd[8];
        int count = 0;
        while (true)
        {
            lock (_gate)
            {
                if (_stopping)
                {
                    return;
                }

                if (_changed || count == 0)
                {
                    _changed = false;
                    _snapshot = [.. _registrations];
                    count = _snapshot.Length + 1;
                    if (polls.Length < count)
                    {
                        polls = new LibC.PollFd[count * 2];
                    }

                    polls[0] = new LibC.PollFd { Fd = _wake.Fd, Events = (short)PollEvents.Readable };
                    for (int i = 1; i < count; i++)
                    {
                        PollEvents interest = _snapshot[i - 1].Interest;
                        polls[i].Fd = interest == PollEvents.None ? -1 : _snapshot[i - 1].Fd;
                        polls[i].Events = (short)interest;
                    }
                }
            }

            int ready;

            // SAFETY: the array is pinned and `count` entries of it are initialised.
            fixed (LibC.PollFd* first = polls)
            {
                ready = LibC.poll(first, (nuint)count, -1);
            }

            if (ready <= 0)
            {
                continue;
            }

            if (polls[0].Returned != 0)
            {
                _ = _wake.Drain();
            }

            for (int i = 1; i < count; i++)
            {
                if (polls[i].Returned != 0)
                {
                    Dispatch(_snapshot[i - 1], (PollEvents)polls[i].Returned);
                }
            }
        }
    }

    private void Dispatch(Registration registration, PollEvents events)
    {
        lock (_gate)
        {
            // It may have been removed or put to sleep by an earlier callback of this round.
            if (registration.IsRemoved || registration.Interest == PollEvents.None)
            {
                return;
            }

            _running = registration;
            _callbackDone.Reset();
        }

        try
        {
            registration.OnReady(events);
        }
        finally
        {
            lock (_gate)
            {
                _running = null;
                _callbackDone.Set();
            }
        }
    }

    private sealed class Registration : IPollRegistration
    {
        private readonly PollLoop _loop;
        private readonly SafeHandle _handle;
        private readonly bool _added;
        private volatile PollEvents _interest;

        internal Registration(PollLoop loop, SafeHandle handle, PollEvents interest, Action<PollEvents> onReady)
        {
            _loop = loop;
            _handle = handle;
            _interest = interest;
            OnReady = onReady;
            handle.DangerousAddRef(ref _added);
            Fd = (int)handle.DangerousGetHandle();
        }

        public PollEvents Interest
        {
            get => _interest;
            set
            {
                if (_interest != value)
                {
                    _interest = value;
                    _loop.Change();
                }
            }
        }

        internal int Fd { get; }

        internal Action<PollEvents> OnReady { get; }

        internal bool IsRemoved { get; private set; }

        public void Dispose() => _loop.Remove(this);

        // Called once, under the loop's gate.
        internal void Release()
        {
            IsRemoved = true;
            if (_added)
            {
                _handle.DangerousRelease();
            }
        }
    }
}

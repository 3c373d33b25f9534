// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Diagnostics;
using System.Runtime.InteropServices;
using System.Threading;

namespace Vmm.Host;

/// <summary>
/// A sleep with nanosecond timeouts that any thread can end: what a halted vCPU and the clock's thread wait on (the
/// runtime's own waits round to milliseconds). One waiter at a time. A wake-up that comes before the wait is remembered, so
/// none is lost; several wake-ups count as one.
/// </summary>
public sealed unsafe partial class TimedWait : IDisposable
{
    private const int Idle = 0;
    private const int Waiting = 1;
    private const int Signalled = 2;
    private const short PollIn = 1;

    private int _readFd;
    private int _writeFd;
    private int _state;

    /// <summary>Makes one.</summary>
    /// <exception cref="InvalidOperationException">The process has no descriptors left.</exception>
    public TimedWait()
    {
        int* fds = stackalloc int[2];
        if (pipe(fds) != 0)
        {
            throw new InvalidOperationException($"pipe: errno {Marshal.GetLastPInvokeError()}");
        }

        _readFd = fds[0];
        _writeFd = fds[1];
    }

    /// <summary>Ends the present or else the next wait. Any thread, cheap when nobody waits.</summary>
    public void Wake()
    {
        if (Interlocked.Exchange(ref _state, Signalled) == Waiting)
        {
            byte one = 1;

            // SAFETY: one byte from the stack. A pipe with at most one byte in it never blocks the writer.
            while (write(_writeFd, &one, 1) < 0 && Marshal.GetLastPInvokeError() == Interrupted)
            {
            }
        }
    }

    /// <summary>
    /// Looks for a wake-up for a while without sleeping, giving way to other threads; none of this process's system calls is
    /// needed to end it.
    /// </summary>
    /// <param name="timeoutNs">At most about so long.</param>
    /// <returns>True when it was woken; false leaves a wake-up that comes later to the next wait.</returns>
    public bool Spin(long timeoutNs)
    {
        long end = Stopwatch.GetTimestamp() + (timeoutNs * Stopwatch.Frequency / 1_000_000_000);
        do
        {
            if (Volatile.Read(ref _state) == Signalled)
            {
                Volatile.Write(ref _state, Idle);
                return true;
            }

            Thread.SpinWait(20);
            Thread.Yield();
        }
        while (Stopwatch.GetTimestamp() < end);
        return false;
    }

    /// <summary>Waits.</summary>
    /// <param name="timeoutNs">At most so long; negative means without limit.</param>
    /// <returns>True when it was woken, false when the time was up.</returns>
    public bool Wait(long timeoutNs)
    {
        if (Interlocked.CompareExchange(ref _state, Waiting, Idle) == Signalled)
        {
            Volatile.Write(ref _state, Idle);
            return true;
        }

        var poll = new PollFd { Fd = _readFd, Events = PollIn };
        var limit = new TimeSpec { Seconds = timeoutNs / 1_000_000_000, Nanoseconds = timeoutNs % 1_000_000_000 };

        // SAFETY: both structures live on this stack frame. EINTR counts as a time-out: the caller looks around again.
        _ = ppoll(&poll, 1, timeoutNs < 0 ? null : &limit, null);
        if (Interlocked.Exchange(ref _state, Idle) != Signalled)
        {
            return false;
        }

        // The waker saw Waiting, so its byte is in the pipe or about to be.
        byte drop;
        while (read(_readFd, &drop, 1) < 0 && Marshal.GetLastPInvokeError() == Interrupted)
        {
        }

        return true;
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        if (_readFd != -1)
        {
            _ = close(_readFd);
            _ = close(_writeFd);
            _readFd = -1;
            _writeFd = -1;
        }
    }

    private const int Interrupted = 4;

    [LibraryImport("libc", SetLastError = true)]
    private static partial int pipe(int* fds);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint write(int fd, byte* data, nuint length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint read(int fd, byte* data, nuint length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int close(int fd);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int ppoll(PollFd* fds, nuint count, TimeSpec* timeout, void* signalMask);

    [StructLayout(LayoutKind.Sequential)]
    private struct PollFd
    {
        public int Fd;
        public short Events;
        public short Returned;
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct TimeSpec
    {
        public long Seconds;
        public long Nanoseconds;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using Microsoft.Win32.SafeHandles;
using Vmm.Host.Native;

namespace Vmm.Host;

/// <summary>
/// A descriptor that one side signals and the other polls: eventfd(2), which all three systems have. Signals coalesce.
/// Thread-safe; never blocks.
/// </summary>
public sealed class EventFd : IDisposable
{
    private readonly SafeFileHandle _handle;

    /// <summary>Makes one, not signalled.</summary>
    /// <exception cref="HostException">The system refused.</exception>
    public EventFd()
    {
        OsAbi abi = OsAbi.Current;
        int fd = LibC.eventfd(0, abi.EventFdCloseOnExec | abi.EventFdNonBlocking);
        if (fd < 0)
        {
            throw HostException.Last("eventfd");
        }

        _handle = new SafeFileHandle(fd, ownsHandle: true);
    }

    /// <summary>The descriptor, for poll loops and drivers.</summary>
    public SafeFileHandle Handle => _handle;

    /// <summary>Its number, for drivers; valid until Dispose.</summary>
    public int Fd => (int)_handle.DangerousGetHandle();

    /// <summary>Signals it. A counter that is full is signalled already.</summary>
    public void Signal()
    {
        Span<byte> one = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(one, 1);
        _ = FileIo.WriteStream(_handle, one);
    }

    /// <summary>Takes back all signals so far.</summary>
    /// <returns>False when there were none.</returns>
    public bool Drain()
    {
        Span<byte> count = stackalloc byte[8];
        return FileIo.ReadStream(_handle, count).Bytes == 8;
    }

    /// <summary>Waits until it is signalled and takes the signals back.</summary>
    /// <param name="timeoutMs">Milliseconds; -1 waits for ever.</param>
    /// <returns>False when the time was up first.</returns>
    public bool Wait(int timeoutMs)
    {
        long deadline = timeoutMs < 0 ? long.MaxValue : Environment.TickCount64 + timeoutMs;
        while (!Drain())
        {
            long left = timeoutMs < 0 ? -1 : Math.Max(0, deadline - Environment.TickCount64);
            if (!PollLoop.WaitReadable(_handle, (int)left) && left == 0)
            {
                return Drain();
            }
        }

        return true;
    }

    /// <inheritdoc/>
    public void Dispose() => _handle.Dispose();
}

/// <summary>A pipe; both ends are closed in child processes.</summary>
public sealed class HostPipe : IDisposable
{
    /// <summary>Makes one.</summary>
    /// <exception cref="HostException">The system refused.</exception>
    public unsafe HostPipe()
    {
        // SAFETY: pipe2 writes exactly two ints.
        int* ends = stackalloc int[2];
        if (LibC.pipe2(ends, OsAbi.Current.OpenCloseOnExec) != 0)
        {
            throw HostException.Last("pipe");
        }

        Reader = new SafeFileHandle(ends[0], ownsHandle: true);
        Writer = new SafeFileHandle(ends[1], ownsHandle: true);
    }

    /// <summary>The end to read from.</summary>
    public SafeFileHandle Reader { get; }

    /// <summary>The end to write to.</summary>
    public SafeFileHandle Writer { get; }

    /// <inheritdoc/>
    public void Dispose()
    {
        Reader.Dispose();
        Writer.Dispose();
    }
}

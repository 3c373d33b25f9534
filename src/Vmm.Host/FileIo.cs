// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;
using Vmm.Core;
using Vmm.Host.Native;

namespace Vmm.Host;

// Theory. Calls on descriptors that the base class library does not have: streams scattered to and gathered from guest
// RAM, locks that belong to the open file, devices. Disk images have their own class, BlockFile; plain files are better
// read and written by System.IO.
//
// Guest slices are addresses. Their makers (Vmm.Memory) guarantee that they lie in RAM that lives as long as the
// machine; a kernel call with a bad address would fail with EFAULT, not crash. No call here allocates.

/// <summary>Outcome of a transfer: bytes moved before the end or the error.</summary>
/// <param name="Bytes">How many bytes were moved.</param>
/// <param name="Error">None, or why it stopped early.</param>
public readonly record struct IoResult(long Bytes, Errno Error)
{
    /// <summary>No error; a read may still be short at the end of the file.</summary>
    public bool IsOk => Error == Errno.None;
}

/// <summary>File calls beyond the base class library. Thread-safe.</summary>
public static unsafe class FileIo
{
    /// <summary>Reads once from a stream (tap, socket, pipe); message boundaries are kept.</summary>
    public static IoResult ReadStream(SafeHandle file, ReadOnlySpan<GuestSlice> slices) =>
        Stream(file, slices, isWrite: false);

    /// <summary>Writes once to a stream; message boundaries are kept.</summary>
    public static IoResult WriteStream(SafeHandle file, ReadOnlySpan<GuestSlice> slices) =>
        Stream(file, slices, isWrite: true);

    /// <summary>Reads once from a stream into a buffer. 0 bytes without an error is the end.</summary>
    public static IoResult ReadStream(SafeHandle file, Span<byte> into)
    {
        using var held = new HeldHandle(file);

        // SAFETY: the buffer is pinned for the call and its own length is passed.
        fixed (byte* pointer = into)
        {
            nint count;
            do
            {
                count = LibC.read(held.Fd, pointer, (nuint)into.Length);
            }
            while (count < 0 && LastIsInterrupted());
            return Result(count);
        }
    }

    /// <summary>Writes once to a stream; may write less than everything when the descriptor does not block.</summary>
    public static IoResult WriteStream(SafeHandle file, ReadOnlySpan<byte> from)
    {
        using var held = new HeldHandle(file);

        // SAFETY: the buffer is pinned for the call and its own length is passed.
        fixed (byte* pointer = from)
        {
            nint count;
            do
            {
                count = LibC.write(held.Fd, pointer, (nuint)from.Length);
            }
            while (count < 0 && LastIsInterrupted());
            return Result(count);
        }
    }

    /// <summary>
    /// Locks a whole file against other programs; the lock belongs to the open file and ends with it. Advisory: other
    /// VMMs that lock their images this way (QEMU does) are kept out, others are not.
    /// </summary>
    /// <param name="file">An open file; for an exclusive lock it must be open for writing.</param>
    /// <param name="exclusive">False lets other readers in.</param>
    /// <returns>EAGAIN when someone else holds a lock that is in the way.</returns>
    public static Errno TryLock(SafeHandle file, bool exclusive) => TryLock(file, exclusive, 0, 0);

    /// <summary>
    /// Locks a range, where <see cref="OsAbi.FileLocks"/> has such locks, else the whole file; a length of 0 reaches to
    /// the end, wherever that comes to be.
    /// </summary>
    internal static Errno TryLock(SafeHandle file, bool exclusive, long startBytes, long lengthBytes)
    {
        FileLockAbi locks = OsAbi.Current.FileLocks;
        using var held = new HeldHandle(file);
        int result;
        if (locks.SetLock == 0)
        {
            int operation = exclusive ? LibC.LockExclusive : LibC.LockShared;
            result = LibC.flock(held.Fd, operation | LibC.LockNonBlocking);
        }
        else
        {
            LibC.FileLock request = default;
            request.Type = exclusive ? locks.WriteLock : locks.ReadLock;
            request.Start = startBytes;
            request.Length = lengthBytes;

            // SAFETY: the structure lives on this stack during the call.
            result = LibC.fcntl(held.Fd, locks.SetLock, (nint)(&request));
        }

        // POSIX lets a lock conflict be EACCES as well as EAGAIN.
        Errno error = result == 0 ? Errno.None : Last();
        return error == Errno.EACCES ? Errno.EAGAIN : error;
    }

    /// <summary>Makes reads and writes return EAGAIN instead of waiting, or the reverse.</summary>
    public static Errno SetNonBlocking(SafeHandle file, bool enabled)
    {
        using var held = new HeldHandle(file);
        int flags = LibC.fcntl(held.Fd, LibC.GetFlags, 0);
        if (flags < 0)
        {
            return Last();
        }

        int bit = OsAbi.Current.OpenNonBlocking;
        int wanted = enabled ? flags | bit : flags & ~bit;
        return LibC.fcntl(held.Fd, LibC.SetFlags, wanted) == 0 ? Errno.None : Last();
    }

    /// <summary>Opens a device or file that File.OpenHandle cannot (it insists on seekable or regular files).</summary>
    /// <param name="path">The path.</param>
    /// <param name="writable">Read and write, or read only.</param>
    /// <param name="nonBlocking">Reads and writes return EAGAIN instead of waiting.</param>
    /// <exception cref="HostException">It cannot be opened.</exception>
    public static SafeFileHandle OpenDevice(string path, bool writable = true, bool nonBlocking = false)
    {
        OsAbi abi = OsAbi.Current;
        int flags = (writable ? 2 : 0) | abi.OpenCloseOnExec | abi.OpenNoControllingTerminal;
        int fd;
        do
        {
            fd = LibC.open(path, flags | (nonBlocking ? abi.OpenNonBlocking : 0), 0);
        }
        while (fd < 0 && LastIsInterrupted());
        return fd >= 0 ? new SafeFileHandle(fd, ownsHandle: true) : throw HostException.Last($"open {path}");
    }

    private static IoResult Stream(SafeHandle file, ReadOnlySpan<GuestSlice> slices, bool isWrite)
    {
        // A message must go in one call, so the list is as long as it is; device queues bound it (VIRTIO 1.2 §2.6.4).
        const int Most = 1024;
        if (slices.Length > Most)
        {
            return new IoResult(0, Errno.EINVAL);
        }

        using var held = new HeldHandle(file);
        LibC.IoVector* vectors = stackalloc LibC.IoVector[slices.Length];
        for (int i = 0; i < slices.Length; i++)
        {
            vectors[i].Base = slices[i].HostAddress;
            vectors[i].Length = (nuint)slices[i].LengthBytes;
        }

        nint count;
        do
        {
            count = isWrite
                ? LibC.writev(held.Fd, vectors, slices.Length)
                : LibC.readv(held.Fd, vectors, slices.Length);
        }
        while (count < 0 && LastIsInterrupted());
        return Result(count);
    }

    private static IoResult Result(nint count) =>
        count >= 0 ? new IoResult(count, Errno.None) : new IoResult(0, Last());

    /// <summary>The error of the last call into the C library by this thread.</summary>
    internal static Errno Last() => OsAbi.Current.ToErrno(Marshal.GetLastPInvokeError());

    internal static bool LastIsInterrupted() => Last() == Errno.EINTR;
}

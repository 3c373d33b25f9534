// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;
using Vmm.Core;
using Vmm.Host.Native;

namespace Vmm.Host;

// Theory. File calls that the base class library does not have: scatter and gather straight to and from guest RAM,
// holes, data-only synchronisation and locks that belong to the open file. Everything else (opening, lengths, reads
// into managed buffers) is better done by System.IO.RandomAccess on the same SafeFileHandle.
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
    // The smallest IOV_MAX that POSIX allows; larger lists go in several calls.
    private const int VectorsPerCall = 16;

    /// <summary>Reads at an offset into guest RAM until the slices are full or the file ends.</summary>
    public static IoResult Read(SafeHandle file, ReadOnlySpan<GuestSlice> slices, long offsetBytes) =>
        Transfer(file, slices, offsetBytes, isWrite: false);

    /// <summary>Writes guest RAM at an offset until everything is written.</summary>
    public static IoResult Write(SafeHandle file, ReadOnlySpan<GuestSlice> slices, long offsetBytes) =>
        Transfer(file, slices, offsetBytes, isWrite: true);

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

    /// <summary>Puts everything written so far on stable storage.</summary>
    /// <param name="file">An open file.</param>
    /// <param name="dataOnly">Leave out metadata that is not needed to read the data back (fdatasync).</param>
    public static Errno Synchronize(SafeHandle file, bool dataOnly)
    {
        using var held = new HeldHandle(file);
        int result;
        do
        {
            result = dataOnly ? LibC.fdatasync(held.Fd) : LibC.fsync(held.Fd);
        }
        while (result != 0 && LastIsInterrupted());
        return result == 0 ? Errno.None : Last();
    }

    /// <summary>Reserves space so that later writes in the range cannot fail for want of it.</summary>
    public static Errno Allocate(SafeHandle file, long offsetBytes, long lengthBytes)
    {
        using var held = new HeldHandle(file);
        return OsAbi.Current.ToErrno(LibC.posix_fallocate(held.Fd, offsetBytes, lengthBytes));
    }

    /// <summary>Makes a range read as zeroes and gives its space back; the file's length stays.</summary>
    /// <returns>EOPNOTSUPP where the system or file system cannot; the caller may write zeroes instead.</returns>
    public static Errno PunchHole(SafeHandle file, long offsetBytes, long lengthBytes) =>
        FallocateLinux(file, LibC.FallocPunchHole | LibC.FallocKeepSize, offsetBytes, lengthBytes);

    /// <summary>Makes a range read as zeroes and keeps its space reserved; the file's length stays.</summary>
    /// <returns>EOPNOTSUPP where the system or file system cannot; the caller may write zeroes instead.</returns>
    public static Errno ZeroRange(SafeHandle file, long offsetBytes, long lengthBytes) =>
        FallocateLinux(file, LibC.FallocZeroRange | LibC.FallocKeepSize, offsetBytes, lengthBytes);

    /// <summary>
    /// Locks a whole file against other programs; the lock belongs to the open file and ends with it. Advisory: other
    /// VMMs that lock their images this way (QEMU does) are kept out, others are not.
    /// </summary>
    /// <param name="file">An open file; for an exclusive lock it must be open for writing.</param>
    /// <param name="exclusive">False lets other readers in.</param>
    /// <returns>EAGAIN when someone else holds a lock that is in the way.</returns>
    public static Errno TryLock(SafeHandle file, bool exclusive)
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

    private static Errno FallocateLinux(SafeHandle file, int mode, long offsetBytes, long lengthBytes)
    {
        if (OsAbi.Current.System != HostSystem.Linux)
        {
            return Errno.EOPNOTSUPP;
        }

        using var held = new HeldHandle(file);
        int result;
        do
        {
            result = LibC.fallocate(held.Fd, mode, offsetBytes, lengthBytes);
        }
        while (result != 0 && LastIsInterrupted());
        return result == 0 ? Errno.None : Last();
    }

    private static IoResult Transfer(SafeHandle file, ReadOnlySpan<GuestSlice> slices, long offset, bool isWrite)
    {
        using var held = new HeldHandle(file);
        LibC.IoVector* vectors = stackalloc LibC.IoVector[VectorsPerCall];
        long done = 0;
        int slice = 0;
        int within = 0;
        while (true)
        {
            int count = Fill(vectors, slices, slice, within);
            if (count == 0)
            {
                return new IoResult(done, Errno.None);
            }

            nint moved = isWrite
                ? LibC.pwritev(held.Fd, vectors, count, offset + done)
                : LibC.preadv(held.Fd, vectors, count, offset + done);
            if (moved <= 0)
            {
                if (moved < 0 && LastIsInterrupted())
                {
                    continue;
                }

                return new IoResult(done, moved < 0 ? Last() : isWrite ? Errno.EIO : Errno.None);
            }

            done += moved;
            while (moved > 0)
            {
                int left = slices[slice].LengthBytes - within;
                if (moved < left)
                {
                    within += (int)moved;
                    break;
                }

                moved -= left;
                slice++;
                within = 0;
            }
        }
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

    private static int Fill(LibC.IoVector* vectors, ReadOnlySpan<GuestSlice> slices, int slice, int within)
    {
        int count = 0;
        for (int i = slice; i < slices.Length && count < VectorsPerCall; i++)
        {
            int skip = i == slice ? within : 0;
            if (slices[i].LengthBytes <= skip)
            {
                continue;
            }

            vectors[count].Base = slices[i].HostAddress + skip;
            vectors[count].Length = (nuint)(slices[i].LengthBytes - skip);
            count++;
        }

        return count;
    }

    private static IoResult Result(nint count) =>
        count >= 0 ? new IoResult(count, Errno.None) : new IoResult(0, Last());

    private static Errno Last() => OsAbi.Current.ToErrno(Marshal.GetLastPInvokeError());

    private static bool LastIsInterrupted() => Last() == Errno.EINTR;
}

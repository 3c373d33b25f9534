// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Runtime.InteropServices;
using System.Threading;
using Microsoft.Win32.SafeHandles;
using Vmm.Core;
using Vmm.Host.Native;

namespace Vmm.Host;

// Theory. A file or block device that holds a disk image, with the calls that a disk needs and the base library does
// not offer: vectored I/O straight into guest RAM, data-only sync, hole punching, and a lock that keeps a second
// opener out.
//
// Locking. One VM writing an image that another VM has open destroys it, so every image is locked while it is open:
// writers exclusively, readers shared, the whole file. On Linux and illumos that is an "open file description" lock
// (fcntl F_OFD_SETLK): unlike the older POSIX record lock it is not dropped when some other descriptor of the process
// is closed, and unlike flock it is a byte-range lock on every network file system, so that hosts see each other over
// NFS. FreeBSD has no such lock; its flock goes through the NFS lock protocol as well. QEMU marks its use of an image
// by shared OFD locks on bytes 100 + n (it uses permission n) and 200 + n (it does not let others have permission n),
// and looks for others by testing for an exclusive lock. So a writer of ours, who holds the whole file exclusively,
// keeps QEMU and qemu-img out, and they keep us out. A reader of ours holds, shared, bytes 0..99 against our writers
// and 201 and 203 against QEMU's (permission 1 is writing, 3 resizing), and asks whether anybody holds 101 or 103;
// readers of both kinds get on with each other.
//
// The file is opened by open(2) rather than through the base library, which would take a flock of its own.
//
// Threading: all members may be called from any thread at once. Lengths and offsets are bytes. I/O returns a status
// and never throws; opening throws IOException with a message that names the file.

/// <summary>A host file or block device that holds a disk image.</summary>
public sealed unsafe class BlockFile : IDisposable
{
    private const int MaxVector = 256; // a mebibyte of scattered guest pages in one call
    private const long QemuWriteByte = 101;
    private const long QemuResizeByte = 103;

    private readonly SafeFileHandle _handle;
    private long _ioErrors;
    private int _lastErrno;
    private volatile bool _syncFailed;
    private bool _canReadCached = OsAbi.Current.System == HostSystem.Linux;
    private bool _canPunch = true;
    private bool _canZeroRange = OsAbi.Current.System == HostSystem.Linux;

    private BlockFile(string path, SafeFileHandle handle, bool isReadOnly, bool isDevice)
    {
        Path = path;
        _handle = handle;
        IsReadOnly = isReadOnly;
        IsDevice = isDevice;
    }

    /// <summary>The path it was opened by.</summary>
    public string Path { get; }

    /// <summary>Opened for reading only.</summary>
    public bool IsReadOnly { get; }

    /// <summary>A block (or FreeBSD character) device: its length is fixed.</summary>
    public bool IsDevice { get; }

    /// <summary>The descriptor, for an <see cref="IoUring"/>; closed with this object.</summary>
    public SafeFileHandle Handle => _handle;

    /// <summary>A sync failed, and so does every later one.</summary>
    public bool HasSyncFailed => _syncFailed;

    /// <summary>Failed calls since it was opened.</summary>
    public long IoErrors => Interlocked.Read(ref _ioErrors);

    /// <summary>The last host error in words, or an empty string.</summary>
    public string LastError => _lastErrno == 0 ? "" : Marshal.GetPInvokeErrorMessage(_lastErrno);

    /// <summary>Present length in bytes; 0 when the host cannot tell.</summary>
    public long Length
    {
        get
        {
            using var held = new HeldHandle(_handle);
            long end = LibC.lseek(held.Fd, 0, LibC.SeekEnd);
            if (end <= 0 && IsDevice && OsAbi.Current.System == HostSystem.FreeBsd)
            {
                // DIOCGMEDIASIZE, sys/disk.h: a disk is a character device there, on which lseek reports 0.
                long size = 0;

                // SAFETY: the request writes one off_t, which lives on this stack during the call.
                return LibC.ioctl(held.Fd, 0x40086481, (nint)(&size)) == 0 ? size : 0;
            }

            return Math.Max(end, 0);
        }
    }

    /// <summary>Opens an existing file or device.</summary>
    /// <param name="path">Where.</param>
    /// <param name="readOnly">Open for reading only.</param>
    /// <exception cref="IOException">It does not exist, is no file or device, or may not be opened.</exception>
    public static BlockFile Open(string path, bool readOnly) => OpenCore(path, readOnly, 0);

    /// <summary>Makes a new, empty file that must not exist yet, open for writing, mode 0600.</summary>
    /// <exception cref="IOException">It exists or cannot be made.</exception>
    public static BlockFile Create(string path) =>
        OpenCore(path, readOnly: false, OsAbi.Current.OpenCreate | OsAbi.Current.OpenExclusive);

    /// <summary>
    /// Takes the lock described at the top of this file: against everybody when open for writing, else against writers.
    /// It lasts until <see cref="Dispose"/>.
    /// </summary>
    /// <exception cref="IOException">Somebody else uses the file in a conflicting way.</exception>
    public void Lock()
    {
        FileLockAbi locks = OsAbi.Current.FileLocks;
        Errno error = !IsReadOnly || locks.SetLock == 0
            ? FileIo.TryLock(_handle, exclusive: !IsReadOnly)
            : LockForReading();

        // Any other error: a file system without locks (some FUSE and 9p mounts). There is nobody to arbitrate, go on.
        if (error == Errno.EAGAIN)
        {
            throw new IOException($"{Path}: is in use by another program (it holds a lock on the image)");
        }
    }

    /// <summary>Reads; bytes past the end of the file read as zeroes.</summary>
    public BlockStatus Read(long offset, Span<byte> into)
    {
        // SAFETY: the buffer is pinned for the calls, which get what is left of it.
        fixed (byte* buffer = into)
        {
            BlockStatus status = Transfer(isWrite: false, offset, buffer, into.Length, out int done);
            if (status == BlockStatus.Ok)
            {
                into[done..].Clear();
            }

            return status;
        }
    }

    /// <summary>Writes.</summary>
    public BlockStatus Write(long offset, ReadOnlySpan<byte> from)
    {
        // SAFETY: the buffer is pinned for the calls, which get what is left of it.
        fixed (byte* buffer = from)
        {
            return Transfer(isWrite: true, offset, buffer, from.Length, out _);
        }
    }

    /// <summary>Reads into guest RAM or a buffer; bytes past the end of the file read as zeroes.</summary>
    public BlockStatus Read(long offset, in IoBuffer into)
    {
        if (into.IsMemory)
        {
            return Read(offset, into.Span);
        }

        BlockStatus status = Transfer(isWrite: false, offset, into, out long done);
        if (status == BlockStatus.Ok && done < into.Length)
        {
            into.Slice(done, into.Length - done).Clear();
        }

        return status;
    }

    /// <summary>Writes from guest RAM or a buffer.</summary>
    public BlockStatus Write(long offset, in IoBuffer from) =>
        from.IsMemory ? Write(offset, (ReadOnlySpan<byte>)from.Span) : Transfer(isWrite: true, offset, from, out _);

    /// <summary>Reads into guest RAM what is in the host's page cache. Linux only; never waits for a disk.</summary>
    /// <returns>False when not all of it was there; the buffer is then undefined.</returns>
    public bool TryReadCached(long offset, in IoBuffer into)
    {
        if (!_canReadCached || into.IsMemory)
        {
            return false;
        }

        LibC.IoVector* vector = stackalloc LibC.IoVector[MaxVector];
        int count = into.Describe(0, new Span<LibC.IoVector>(vector, MaxVector), out long covered);
        if (covered != into.Length)
        {
            return false;
        }

        using var held = new HeldHandle(_handle);
        nint got = LibC.preadv2(held.Fd, vector, count, offset, LibC.ReadNoWait);
        if (got < 0 && FileIo.Last() is Errno.EOPNOTSUPP or Errno.EINVAL)
        {
            _canReadCached = false; // a file system without it
        }

        return got == into.Length;
    }

    /// <summary>Notes a failure that an <see cref="IoUring"/> reported, as the calls of this class do.</summary>
    /// <param name="operation">What failed.</param>
    /// <param name="errno">The host's number.</param>
    /// <returns>What to tell the guest.</returns>
    public BlockStatus Fail(RingOperation operation, int errno)
    {
        _syncFailed |= operation == RingOperation.Sync;
        return Failed(errno);
    }

    /// <summary>An <see cref="IoUring"/> result that means "again".</summary>
    public static bool IsTransient(int result) => OsAbi.Current.ToErrno(-result) is Errno.EINTR or Errno.EAGAIN;

    /// <summary>
    /// Everything written before is on stable storage afterwards (fdatasync: data and what is needed to find it). An
    /// error here is final: the host may have dropped the pages that it could not write, so that a second call would
    /// report success for data that is lost. Once it failed it fails for as long as the file is open.
    /// </summary>
    public BlockStatus Sync()
    {
        if (_syncFailed)
        {
            return BlockStatus.IoError;
        }

        using var held = new HeldHandle(_handle);
        while (LibC.fdatasync(held.Fd) != 0)
        {
            if (!FileIo.LastIsInterrupted())
            {
                _syncFailed = true;
                return Failed();
            }
        }

        return BlockStatus.Ok;
    }

    /// <summary>Sets the length of a file; new bytes read as zeroes.</summary>
    public BlockStatus Truncate(long length)
    {
        using var held = new HeldHandle(_handle);
        while (LibC.ftruncate(held.Fd, length) != 0)
        {
            if (!FileIo.LastIsInterrupted())
            {
                return Failed();
            }
        }

        return BlockStatus.Ok;
    }

    /// <summary>Reserves space for a range without changing what it reads as.</summary>
    /// <returns>Refused when the file system cannot.</returns>
    public BlockStatus Reserve(long offset, long length)
    {
        using var held = new HeldHandle(_handle);
        return OsAbi.Current.ToErrno(LibC.posix_fallocate(held.Fd, offset, length)) switch
        {
            Errno.None => BlockStatus.Ok,
            Errno.ENOSPC => BlockStatus.NoSpace,
            _ => BlockStatus.Refused,
        };
    }

    /// <summary>Gives a range back to the host; it reads as zeroes afterwards, the length stays.</summary>
    /// <returns>False when the host cannot do that; nothing changed then.</returns>
    public bool TryPunchHole(long offset, long length)
    {
        if (!_canPunch || length <= 0)
        {
            return length == 0;
        }

        using var held = new HeldHandle(_handle);
        _canPunch = PunchHole(held.Fd, offset, length);
        return _canPunch;
    }

    /// <summary>Makes a range read as zeroes while it stays allocated.</summary>
    /// <returns>False when the host has no call for that; nothing changed then.</returns>
    public bool TryZeroRange(long offset, long length)
    {
        if (!_canZeroRange || length <= 0)
        {
            return length == 0;
        }

        using var held = new HeldHandle(_handle);
        _canZeroRange = LibC.fallocate(held.Fd, LibC.FallocZeroRange | LibC.FallocKeepSize, offset, length) == 0;
        return _canZeroRange;
    }

    /// <summary>Closes the file and drops the lock.</summary>
    public void Dispose() => _handle.Dispose();

    private static BlockFile OpenCore(string path, bool readOnly, int extra)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        if (path.Contains('\0', StringComparison.Ordinal))
        {
            throw new IOException("a path cannot contain a NUL character");
        }

        OsAbi abi = OsAbi.Current;
        int fd;
        do
        {
            // O_NONBLOCK keeps a FIFO from blocking here; it means nothing to files and disks.
            fd = LibC.open(path, (readOnly ? 0 : 2) | abi.OpenCloseOnExec | abi.OpenNonBlocking | extra, 0x180);
        }
        while (fd < 0 && FileIo.LastIsInterrupted());

        if (fd < 0)
        {
            throw new IOException($"{path}: {Marshal.GetLastPInvokeErrorMessage()}");
        }

        var handle = new SafeFileHandle(fd, ownsHandle: true);
        string? refusal = (File.GetAttributes(handle) & FileAttributes.Directory) != 0 ? "is a directory"
            : LibC.lseek(fd, 0, LibC.SeekEnd) < 0 ? "is neither a file nor a disk"
            : null;
        if (refusal is not null)
        {
            handle.Dispose();
            throw new IOException($"{path}: {refusal}");
        }

        bool isDevice = File.ResolveLinkTarget(path, returnFinalTarget: true)?.FullName
            .StartsWith("/dev", StringComparison.Ordinal) ?? path.StartsWith("/dev/", StringComparison.Ordinal);
        isDevice = isDevice && !path.StartsWith("/dev/shm/", StringComparison.Ordinal);
        return new BlockFile(path, handle, readOnly, isDevice);
    }

    private static bool PunchHole(int fd, long offset, long length)
    {
        switch (OsAbi.Current.System)
        {
            case HostSystem.Linux:
                return LibC.fallocate(fd, LibC.FallocPunchHole | LibC.FallocKeepSize, offset, length) == 0;

            case HostSystem.Illumos:
                LibC.FileLock freed = default;
                freed.Start = offset;
                freed.Length = length;

                // SAFETY: the structure lives on this stack during the call.
                return LibC.fcntl(fd, LibC.FreeSpaceIllumos, (nint)(&freed)) == 0;

            default:
                try
                {
                    var range = new LibC.SpaceRange { Offset = offset, Length = length };
                    LibC.SpaceRange rest;

                    // SAFETY: both structures live on this stack during the call.
                    return LibC.fspacectl(fd, LibC.SpaceDeallocate, &range, 0, &rest) == 0;
                }
                catch (EntryPointNotFoundException)
                {
                    return false; // FreeBSD before 14
                }
        }
    }

    // EAGAIN when a writer, ours or QEMU's, is in the way.
    private Errno LockForReading()
    {
        Span<(long Start, long Length)> ours = [(0, 100), (QemuWriteByte + 100, 1), (QemuResizeByte + 100, 1)];
        foreach ((long start, long length) in ours)
        {
            Errno error = FileIo.TryLock(_handle, exclusive: false, start, length);
            if (error != Errno.None)
            {
                return error;
            }
        }

        return IsLockedByQemu(QemuWriteByte) || IsLockedByQemu(QemuResizeByte) ? Errno.EAGAIN : Errno.None;
    }

    private bool IsLockedByQemu(long at)
    {
        FileLockAbi locks = OsAbi.Current.FileLocks;
        LibC.FileLock probe = default;
        probe.Type = locks.WriteLock;
        probe.Start = at;
        probe.Length = 1;
        using var held = new HeldHandle(_handle);

        // Our own kind locks from byte 0 on, so a lock that starts elsewhere is QEMU's.
        // SAFETY: the structure lives on this stack during the call.
        return LibC.fcntl(held.Fd, locks.GetLock, (nint)(&probe)) == 0 && probe.Type != locks.Unlock && probe.Start != 0;
    }

    private BlockStatus Transfer(bool isWrite, long offset, byte* buffer, int length, out int done)
    {
        using var held = new HeldHandle(_handle);
        BlockStatus status = BlockStatus.Ok;
        bool goesOn = true;
        for (done = 0; goesOn && done < length;)
        {
            nuint left = (nuint)(length - done);
            nint moved = isWrite
                ? LibC.pwrite(held.Fd, buffer + done, left, offset + done)
                : LibC.pread(held.Fd, buffer + done, left, offset + done);
            goesOn = GoesOn(isWrite, moved, out status);
            done += (int)Math.Max(moved, 0);
        }

        return status;
    }

    private BlockStatus Transfer(bool isWrite, long offset, in IoBuffer buffer, out long done)
    {
        using var held = new HeldHandle(_handle);
        LibC.IoVector* vector = stackalloc LibC.IoVector[MaxVector];
        BlockStatus status = BlockStatus.Ok;
        bool goesOn = true;
        for (done = 0; goesOn && done < buffer.Length;)
        {
            int count = buffer.Describe(done, new Span<LibC.IoVector>(vector, MaxVector), out _);
            nint moved = isWrite
                ? LibC.pwritev(held.Fd, vector, count, offset + done)
                : LibC.preadv(held.Fd, vector, count, offset + done);
            goesOn = GoesOn(isWrite, moved, out status);
            done += Math.Max(moved, 0);
        }

        return status;
    }

    // Whether a transfer goes on behind a call that returned "moved": a short count and a signal mean another call, the
    // end of the file ends a read well and a write badly.
    private bool GoesOn(bool isWrite, nint moved, out BlockStatus status)
    {
        status = BlockStatus.Ok;
        if (moved > 0 || (moved < 0 && FileIo.LastIsInterrupted()))
        {
            return true;
        }

        if (moved < 0)
        {
            status = Failed();
        }
        else if (isWrite)
        {
            status = Failed(LibC.NoSpace);
        }

        return false;
    }

    private BlockStatus Failed() => Failed(Marshal.GetLastPInvokeError());

    private BlockStatus Failed(int errno)
    {
        _lastErrno = errno;
        Interlocked.Increment(ref _ioErrors);

        // A quota that is used up means the same to a guest as a full disk.
        return OsAbi.Current.ToErrno(errno) is Errno.ENOSPC or Errno.EDQUOT ? BlockStatus.NoSpace : BlockStatus.IoError;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Globalization;
using System.IO;
using System.Runtime.InteropServices;
using System.Threading;
using Microsoft.Win32.SafeHandles;
using Vmm.Core;

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
public sealed partial class BlockFile : IDisposable
{
    private const int MaxVector = 64;
    private const int Eintr = 4;
    private const int Einval = 22;
    private const int Enospc = 28;
    private const int Eopnotsupp = 95; // Linux
    private const int ReadNoWait = 8; // RWF_NOWAIT
    private const int SeekEnd = 2;
    private const long QemuWriteByte = 101;
    private const long QemuResizeByte = 103;

    private static readonly string[] s_illumosNames = ["illumos", "solaris"];
    private static readonly Abi s_abi = Abi.Detect();

    private readonly SafeFileHandle _handle;
    private long _ioErrors;
    private int _lastErrno;
    private volatile bool _syncFailed;
    private bool _canReadCached = OperatingSystem.IsLinux();
    private bool _canPunch = true;
    private bool _canZeroRange = true;

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
            long end = lseek(_handle, 0, SeekEnd);
            if (end <= 0 && IsDevice && OperatingSystem.IsFreeBSD())
            {
                // DIOCGMEDIASIZE, sys/disk.h: a disk is a character device there, on which lseek reports 0.
                return ioctl(_handle, 0x40086481, out long size) == 0 ? size : 0;
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
    public static BlockFile Create(string path) => OpenCore(path, readOnly: false, s_abi.Create | s_abi.Exclusive);

    /// <summary>
    /// Takes the lock described at the top of this file: against everybody when open for writing, else against writers.
    /// It lasts until <see cref="Dispose"/>.
    /// </summary>
    /// <exception cref="IOException">Somebody else uses the file in a conflicting way.</exception>
    public void Lock()
    {
        if (s_abi.UseFlock)
        {
            if (flock(_handle, (IsReadOnly ? 1 : 2) | 4) != 0)
            {
                throw InUse();
            }

            return;
        }

        bool isTaken = IsReadOnly
            ? s_abi.SetLock(_handle, exclusive: false, 0, 100) == 0
                && s_abi.SetLock(_handle, exclusive: false, QemuWriteByte + 100, 1) == 0
                && s_abi.SetLock(_handle, exclusive: false, QemuResizeByte + 100, 1) == 0
            : s_abi.SetLock(_handle, exclusive: true, 0, 0) == 0;
        if (!isTaken)
        {
            int errno = Marshal.GetLastPInvokeError();
            if (errno is 11 or 13)
            {
                throw InUse();
            }

            // A file system without locks (some FUSE and 9p mounts): there is nobody to arbitrate, go on.
            return;
        }

        if (IsReadOnly && (s_abi.IsLockedByOther(_handle, QemuWriteByte)
            || s_abi.IsLockedByOther(_handle, QemuResizeByte)))
        {
            throw InUse();
        }
    }

    /// <summary>Reads; bytes past the end of the file read as zeroes.</summary>
    public BlockStatus Read(long offset, Span<byte> into)
    {
        int done = 0;
        while (done < into.Length)
        {
            nint got = pread(_handle, ref into[done], (nuint)(into.Length - done), offset + done);
            if (got < 0)
            {
                int errno = Marshal.GetLastPInvokeError();
                if (errno == Eintr)
                {
                    continue;
                }

                return Failed(errno);
            }

            if (got == 0)
            {
                into[done..].Clear();
                break;
            }

            done += (int)got;
        }

        return BlockStatus.Ok;
    }

    /// <summary>Writes.</summary>
    public BlockStatus Write(long offset, ReadOnlySpan<byte> from)
    {
        int done = 0;
        while (done < from.Length)
        {
            nint put = pwrite(_handle, in from[done], (nuint)(from.Length - done), offset + done);
            if (put < 0)
            {
                int errno = Marshal.GetLastPInvokeError();
                if (errno == Eintr)
                {
                    continue;
                }

                return Failed(errno);
            }

            if (put == 0)
            {
                return Failed(Enospc);
            }

            done += (int)put;
        }

        return BlockStatus.Ok;
    }

    /// <summary>Reads into guest RAM or a buffer; bytes past the end of the file read as zeroes.</summary>
    public BlockStatus Read(long offset, in IoBuffer into)
    {
        if (into.IsMemory)
        {
            return Read(offset, into.Span);
        }

        Span<IoBuffer.Iovec> vector = stackalloc IoBuffer.Iovec[MaxVector];
        long done = 0;
        while (done < into.Length)
        {
            int count = into.Describe(done, vector, out _);
            nint got = preadv(_handle, ref vector[0], count, offset + done);
            if (got < 0)
            {
                int errno = Marshal.GetLastPInvokeError();
                if (errno == Eintr)
                {
                    continue;
                }

                return Failed(errno);
            }

            if (got == 0)
            {
                into.Slice(done, into.Length - done).Clear();
                break;
            }

            done += got;
        }

        return BlockStatus.Ok;
    }

    /// <summary>Writes from guest RAM or a buffer.</summary>
    public BlockStatus Write(long offset, in IoBuffer from)
    {
        if (from.IsMemory)
        {
            return Write(offset, (ReadOnlySpan<byte>)from.Span);
        }

        Span<IoBuffer.Iovec> vector = stackalloc IoBuffer.Iovec[MaxVector];
        long done = 0;
        while (done < from.Length)
        {
            int count = from.Describe(done, vector, out _);
            nint put = pwritev(_handle, ref vector[0], count, offset + done);
            if (put < 0)
            {
                int errno = Marshal.GetLastPInvokeError();
                if (errno == Eintr)
                {
                    continue;
                }

                return Failed(errno);
            }

            if (put == 0)
            {
                return Failed(Enospc);
            }

            done += put;
        }

        return BlockStatus.Ok;
    }

    /// <summary>Reads into guest RAM what is in the host's page cache. Linux only; never waits for a disk.</summary>
    /// <returns>False when not all of it was there; the buffer is then undefined.</returns>
    public bool TryReadCached(long offset, in IoBuffer into)
    {
        if (!_canReadCached || into.IsMemory)
        {
            return false;
        }

        Span<IoBuffer.Iovec> vector = stackalloc IoBuffer.Iovec[MaxVector];
        int count = into.Describe(0, vector, out long covered);
        if (covered != into.Length)
        {
            return false;
        }

        nint got = preadv2(_handle, ref vector[0], count, offset, ReadNoWait);
        if (got < 0 && Marshal.GetLastPInvokeError() is Eopnotsupp or Einval)
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

    /// <summary>An <see cref="IoUring"/> result that means "again" (EINTR, EAGAIN on Linux).</summary>
    public static bool IsTransient(int result) => result is -Eintr or -11;

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

        while (fdatasync(_handle) != 0)
        {
            int errno = Marshal.GetLastPInvokeError();
            if (errno != Eintr)
            {
                _syncFailed = true;
                return Failed(errno);
            }
        }

        return BlockStatus.Ok;
    }

    /// <summary>Sets the length of a file; new bytes read as zeroes.</summary>
    public BlockStatus Truncate(long length)
    {
        while (ftruncate(_handle, length) != 0)
        {
            int errno = Marshal.GetLastPInvokeError();
            if (errno != Eintr)
            {
                return Failed(errno);
            }
        }

        return BlockStatus.Ok;
    }

    /// <summary>Reserves space for a range without changing what it reads as.</summary>
    /// <returns>Refused when the file system cannot.</returns>
    public BlockStatus Reserve(long offset, long length)
    {
        int errno = posix_fallocate(_handle, offset, length);
        return errno switch
        {
            0 => BlockStatus.Ok,
            Enospc => BlockStatus.NoSpace,
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

        _canPunch = s_abi.PunchHole(_handle, offset, length);
        return _canPunch;
    }

    /// <summary>Makes a range read as zeroes while it stays allocated.</summary>
    /// <returns>False when the host has no call for that; nothing changed then.</returns>
    public bool TryZeroRange(long offset, long length)
    {
        if (!_canZeroRange || !OperatingSystem.IsLinux() || length <= 0)
        {
            return length == 0;
        }

        // FALLOC_FL_KEEP_SIZE | FALLOC_FL_ZERO_RANGE
        _canZeroRange = fallocate(_handle, 0x01 | 0x10, offset, length) == 0;
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

        int fd;
        do
        {
            // O_NONBLOCK keeps a FIFO from blocking here; it means nothing to files and disks.
            fd = open(path, (readOnly ? 0 : 2) | s_abi.CloseOnExec | s_abi.NonBlocking | extra, 0x180);
        }
        while (fd < 0 && Marshal.GetLastPInvokeError() == Eintr);

        if (fd < 0)
        {
            string reason = Marshal.GetPInvokeErrorMessage(Marshal.GetLastPInvokeError());
            throw new IOException(string.Create(CultureInfo.InvariantCulture, $"{path}: {reason}"));
        }

        var handle = new SafeFileHandle(fd, ownsHandle: true);
        bool isDevice = false;
        if ((File.GetAttributes(handle) & FileAttributes.Directory) != 0)
        {
            handle.Dispose();
            throw new IOException($"{path}: is a directory");
        }

        if (lseek(handle, 0, SeekEnd) < 0)
        {
            handle.Dispose();
            throw new IOException($"{path}: is neither a file nor a disk");
        }

        isDevice = File.ResolveLinkTarget(path, returnFinalTarget: true)?.FullName
            .StartsWith("/dev", StringComparison.Ordinal) ?? path.StartsWith("/dev/", StringComparison.Ordinal);
        isDevice = isDevice && !path.StartsWith("/dev/shm/", StringComparison.Ordinal);
        return new BlockFile(path, handle, readOnly, isDevice);
    }

    private BlockStatus Failed(int errno)
    {
        _lastErrno = errno;
        Interlocked.Increment(ref _ioErrors);

        // ENOSPC is 28 everywhere; EDQUOT (122 Linux, 69 FreeBSD, 49 illumos) means the same to a guest.
        return errno is Enospc || errno == s_abi.Edquot ? BlockStatus.NoSpace : BlockStatus.IoError;
    }

    private IOException InUse() =>
        new($"{Path}: is in use by another program (it holds a lock on the image)");

    [LibraryImport("libc", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    private static partial int open(string path, int flags, int mode);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint pread(SafeFileHandle fd, ref byte buffer, nuint count, long offset);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint pwrite(SafeFileHandle fd, in byte buffer, nuint count, long offset);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint preadv(SafeFileHandle fd, ref IoBuffer.Iovec vector, int count, long offset);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint preadv2(SafeFileHandle fd, ref IoBuffer.Iovec vector, int count, long offset, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint pwritev(SafeFileHandle fd, ref IoBuffer.Iovec vector, int count, long offset);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fdatasync(SafeFileHandle fd);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int ftruncate(SafeFileHandle fd, long length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial long lseek(SafeFileHandle fd, long offset, int whence);

    [LibraryImport("libc")]
    private static partial int posix_fallocate(SafeFileHandle fd, long offset, long length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fallocate(SafeFileHandle fd, int mode, long offset, long length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int flock(SafeFileHandle fd, int operation);

    [LibraryImport("libc", SetLastError = true, EntryPoint = "fcntl")]
    private static partial int fcntl(SafeFileHandle fd, int command, ref FlockLinux argument);

    [LibraryImport("libc", SetLastError = true, EntryPoint = "fcntl")]
    private static partial int fcntl(SafeFileHandle fd, int command, ref FlockIllumos argument);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int ioctl(SafeFileHandle fd, ulong request, out long value);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fspacectl(
        SafeFileHandle fd, int command, in SpaceRange range, int flags, out SpaceRange rest);

    /// <summary>What differs between the three hosts; numbers from their headers.</summary>
    private sealed class Abi
    {
        public int CloseOnExec { get; private init; }

        public int NonBlocking { get; private init; }

        public int Create { get; private init; }

        public int Exclusive { get; private init; }

        public int Edquot { get; private init; }

        public bool UseFlock { get; private init; }

        private bool IsIllumos { get; init; }

        public static Abi Detect()
        {
            if (OperatingSystem.IsFreeBSD())
            {
                return new Abi
                {
                    CloseOnExec = 0x100000,
                    NonBlocking = 0x4,
                    Create = 0x200,
                    Exclusive = 0x800,
                    Edquot = 69,
                    UseFlock = true,
                };
            }

            if (Array.Exists(s_illumosNames, OperatingSystem.IsOSPlatform))
            {
                return new Abi
                {
                    CloseOnExec = 0x800000,
                    NonBlocking = 0x80,
                    Create = 0x100,
                    Exclusive = 0x400,
                    Edquot = 49,
                    IsIllumos = true,
                };
            }

            return new Abi
            {
                CloseOnExec = 0x80000,
                NonBlocking = 0x800,
                Create = 0x40,
                Exclusive = 0x80,
                Edquot = 122,
            };
        }

        public int SetLock(SafeFileHandle handle, bool exclusive, long start, long length)
        {
            if (IsIllumos)
            {
                // F_OFD_SETLK 48, F_RDLCK 1, F_WRLCK 2
                var wanted = new FlockIllumos { Type = (short)(exclusive ? 2 : 1), Start = start, Length = length };
                return fcntl(handle, 48, ref wanted);
            }

            // F_OFD_SETLK 37, F_RDLCK 0, F_WRLCK 1
            var flock = new FlockLinux { Type = (short)(exclusive ? 1 : 0), Start = start, Length = length };
            return fcntl(handle, 37, ref flock);
        }

        public bool IsLockedByOther(SafeFileHandle handle, long at)
        {
            if (IsIllumos)
            {
                return false;
            }

            // F_OFD_GETLK 36 with F_WRLCK: F_UNLCK (2) comes back when nothing is in the way. Our own
            // kind locks from byte 0 on, so a lock that starts elsewhere is QEMU's.
            var probe = new FlockLinux { Type = 1, Start = at, Length = 1 };
            return fcntl(handle, 36, ref probe) == 0 && probe.Type != 2 && probe.Start != 0;
        }

        public bool PunchHole(SafeFileHandle handle, long offset, long length)
        {
            if (OperatingSystem.IsLinux())
            {
                // FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
                return fallocate(handle, 0x01 | 0x02, offset, length) == 0;
            }

            if (IsIllumos)
            {
                // F_FREESP 11: frees the range of a regular file.
                var range = new FlockIllumos { Start = offset, Length = length };
                return fcntl(handle, 11, ref range) == 0;
            }

            try
            {
                // SPACECTL_DEALLOC 1, FreeBSD 14.
                return fspacectl(handle, 1, new SpaceRange { Offset = offset, Length = length }, 0, out _) == 0;
            }
            catch (EntryPointNotFoundException)
            {
                return false;
            }
        }
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct FlockLinux
    {
        public short Type;
        public short Whence;
        public long Start;
        public long Length;
        public int Pid;
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct FlockIllumos
    {
        public short Type;
        public short Whence;
        public long Start;
        public long Length;
        public int SystemId;
        public int Pid;
        public long Pad0;
        public long Pad1;
        public long Pad2;
        public long Pad3;
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct SpaceRange
    {
        public long Offset;
        public long Length;
    }
}

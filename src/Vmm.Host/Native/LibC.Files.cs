// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.InteropServices;

namespace Vmm.Host.Native;

internal static unsafe partial class LibC
{
    internal const int LockShared = 1;
    internal const int LockExclusive = 2;
    internal const int LockNonBlocking = 4;
    internal const int GetFlags = 3;
    internal const int SetFlags = 4;
    internal const int FallocKeepSize = 1;
    internal const int FallocPunchHole = 2;
    internal const int FallocZeroRange = 16;
    internal const int SeekEnd = 2;
    internal const int ReadNoWait = 8; // RWF_NOWAIT, Linux
    internal const int FreeSpaceIllumos = 11; // F_FREESP
    internal const int SpaceDeallocate = 1; // SPACECTL_DEALLOC, FreeBSD
    internal const int NoSpace = 28; // ENOSPC everywhere

    [LibraryImport("libc", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int open(string path, int flags, int mode);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int close(int fd);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint read(int fd, byte* buffer, nuint length);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint write(int fd, byte* buffer, nuint length);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint readv(int fd, IoVector* vectors, int count);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint writev(int fd, IoVector* vectors, int count);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint preadv(int fd, IoVector* vectors, int count, long offset);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint pwritev(int fd, IoVector* vectors, int count, long offset);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint preadv2(int fd, IoVector* vectors, int count, long offset, int flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial long lseek(int fd, long offset, int whence);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int fsync(int fd);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int fdatasync(int fd);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int posix_fallocate(int fd, long offset, long length);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int fallocate(int fd, int mode, long offset, long length);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int fcntl(int fd, int command, nint argument);

    // FreeBSD only, so by the name of its file: the linker binds "libc".
    [LibraryImport("libc.so.7", SetLastError = true)]
    internal static partial int fspacectl(int fd, int command, SpaceRange* range, int flags, SpaceRange* rest);

    // illumos only, likewise: STREAMS.
    [LibraryImport("libc.so.1", SetLastError = true)]
    internal static partial int putmsg(int fd, StreamBuffer* control, StreamBuffer* data, int flags);

    [LibraryImport("libc.so.1", SetLastError = true)]
    internal static partial int getmsg(int fd, StreamBuffer* control, StreamBuffer* data, int* flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int flock(int fd, int operation);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int pipe2(int* descriptors, int flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int eventfd(uint initial, int flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int poll(PollFd* descriptors, nuint count, int timeoutMs);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int isatty(int fd);

    /// <summary>struct iovec.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct IoVector
    {
        internal nint Base;
        internal nuint Length;
    }

    /// <summary>struct pollfd.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct PollFd
    {
        internal int Fd;
        internal short Events;
        internal short Returned;
    }

    /// <summary>struct spacectl_range of FreeBSD 14.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct SpaceRange
    {
        internal long Offset;
        internal long Length;
    }

    /// <summary>struct flock of Linux (illumos adds fields behind it).</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct FileLock
    {
        internal short Type;
        internal short Whence;
        internal long Start;
        internal long Length;
        internal int SystemOrPid;
        internal int Pid;
        internal fixed long Padding[4];
    }

    /// <summary>illumos' struct strbuf.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct StreamBuffer
    {
        internal int MaxLength;
        internal int Length;
        internal byte* Address;
    }

    /// <summary>illumos' struct strioctl.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct StreamControl
    {
        internal int Command;
        internal int TimeoutSeconds;
        internal int Length;
        internal byte* Data;
    }
}

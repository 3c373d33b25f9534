// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;

namespace Vmm.Host;

// Theory. The three systems share POSIX, not numbers. Everything that differs and that a call site would otherwise
// have to ask "which OS is this?" for stands in one immutable OsAbi object per system, chosen once. There is no other
// place in the program that looks at the system's name. The values come from the systems' headers (Linux x86-64 uapi
// and glibc, FreeBSD sys/, illumos uts/common/sys); tests/abi compares those of the running system with its C compiler.
//
// A value of 0 in a flag means that the system has no such thing and that leaving it out is right there (for example
// MAP_NORESERVE on FreeBSD, which never reserves).

/// <summary>Systems that the program knows.</summary>
public enum HostSystem
{
    /// <summary>Linux with glibc or musl.</summary>
    Linux,

    /// <summary>FreeBSD 13.2 and later.</summary>
    FreeBsd,

    /// <summary>illumos distributions.</summary>
    Illumos,
}

/// <summary>Where and how a terminal's settings are stored (struct termios begins with four 32-bit flag words).</summary>
/// <param name="ControlCharsOffset">Offset of c_cc.</param>
/// <param name="MinIndex">VMIN.</param>
/// <param name="TimeIndex">VTIME.</param>
/// <param name="RawInputClear">Bits of c_iflag that raw mode clears.</param>
/// <param name="RawOutputClear">Bits of c_oflag that raw mode clears.</param>
/// <param name="RawControlClear">Bits of c_cflag that raw mode clears.</param>
/// <param name="RawControlSet">Bits of c_cflag that raw mode sets.</param>
/// <param name="RawLocalClear">Bits of c_lflag that raw mode clears.</param>
/// <param name="SetNow">TCSANOW.</param>
/// <param name="GetWindowSize">TIOCGWINSZ.</param>
public sealed record TermiosAbi(
    int ControlCharsOffset,
    int MinIndex,
    int TimeIndex,
    uint RawInputClear,
    uint RawOutputClear,
    uint RawControlClear,
    uint RawControlSet,
    uint RawLocalClear,
    int SetNow,
    uint GetWindowSize);

/// <summary>How whole-file locks that belong to an open file description are asked for.</summary>
/// <param name="GetLock">F_OFD_GETLK; 0 where there is none.</param>
/// <param name="SetLock">F_OFD_SETLK; 0 where there is none and flock(2) serves.</param>
/// <param name="ReadLock">F_RDLCK.</param>
/// <param name="WriteLock">F_WRLCK.</param>
/// <param name="Unlock">F_UNLCK.</param>
public sealed record FileLockAbi(int GetLock, int SetLock, short ReadLock, short WriteLock, short Unlock);

/// <summary>The numbers of one operating system. Immutable; see the theory above.</summary>
public sealed class OsAbi
{
    private readonly Dictionary<int, Errno> _errnos;

    private OsAbi(HostSystem system, IReadOnlyList<(int Raw, Errno Error)> errnos)
    {
        System = system;
        _errnos = new Dictionary<int, Errno>
        {
            [0] = Errno.None,
            [1] = Errno.EPERM,
            [2] = Errno.ENOENT,
            [4] = Errno.EINTR,
            [5] = Errno.EIO,
            [6] = Errno.ENXIO,
            [7] = Errno.E2BIG,
            [9] = Errno.EBADF,
            [12] = Errno.ENOMEM,
            [13] = Errno.EACCES,
            [14] = Errno.EFAULT,
            [16] = Errno.EBUSY,
            [17] = Errno.EEXIST,
            [19] = Errno.ENODEV,
            [20] = Errno.ENOTDIR,
            [21] = Errno.EISDIR,
            [22] = Errno.EINVAL,
            [23] = Errno.ENFILE,
            [24] = Errno.EMFILE,
            [25] = Errno.ENOTTY,
            [27] = Errno.EFBIG,
            [28] = Errno.ENOSPC,
            [29] = Errno.ESPIPE,
            [30] = Errno.EROFS,
            [32] = Errno.EPIPE,
            [34] = Errno.ERANGE,
        };
        foreach ((int raw, Errno error) in errnos)
        {
            _errnos[raw] = error;
        }
    }

    /// <summary>Linux on x86-64.</summary>
    public static OsAbi Linux { get; } = new(
        HostSystem.Linux,
        [
            (11, Errno.EAGAIN), (35, Errno.EDEADLK), (38, Errno.ENOSYS), (39, Errno.ENOTEMPTY), (95, Errno.EOPNOTSUPP),
            (98, Errno.EADDRINUSE), (104, Errno.ECONNRESET), (110, Errno.ETIMEDOUT), (111, Errno.ECONNREFUSED),
            (115, Errno.EINPROGRESS), (122, Errno.EDQUOT),
        ])
    {
        MapAnonymous = 0x20,
        MapNoReserve = 0x4000,
        AdviseHugePages = 14,
        AdviseDontFork = 10,
        AdviseDontDump = 16,
        AdviseDiscard = 4,
        AdviseRemove = 9,
        OpenCreate = 0x40,
        OpenExclusive = 0x80,
        OpenTruncate = 0x200,
        OpenNonBlocking = 0x800,
        OpenCloseOnExec = 0x80000,
        OpenNoControllingTerminal = 0x100,
        OpenNoFollow = 0x20000,
        OpenDirectory = 0x10000,
        EventFdCloseOnExec = 0x80000,
        EventFdNonBlocking = 0x800,
        HasMemfd = true,
        FileLocks = new FileLockAbi(36, 37, 0, 1, 2),
        SignalBlock = 0,
        SignalUnblock = 1,
        KickSignal = 37,
        KernelSignalSetBytes = 8,
        IoctlTunnelRequest = 0,
        Termios = new TermiosAbi(17, 6, 5, 0x5EB, 0x1, 0x130, 0x30, 0x804B, 0, 0x5413),
    };

    /// <summary>FreeBSD on amd64.</summary>
    public static OsAbi FreeBsd { get; } = new(
        HostSystem.FreeBsd,
        [
            (35, Errno.EAGAIN), (11, Errno.EDEADLK), (78, Errno.ENOSYS), (66, Errno.ENOTEMPTY), (45, Errno.EOPNOTSUPP),
            (48, Errno.EADDRINUSE), (54, Errno.ECONNRESET), (60, Errno.ETIMEDOUT), (61, Errno.ECONNREFUSED),
            (36, Errno.EINPROGRESS), (69, Errno.EDQUOT),
        ])
    {
        MapAnonymous = 0x1000,
        MapNoReserve = 0,
        AdviseHugePages = 0,
        AdviseDontFork = 0,
        AdviseDontDump = 8,
        AdviseDiscard = 5,
        AdviseRemove = 0,
        OpenCreate = 0x200,
        OpenExclusive = 0x800,
        OpenTruncate = 0x400,
        OpenNonBlocking = 0x4,
        OpenCloseOnExec = 0x100000,
        OpenNoControllingTerminal = 0x8000,
        OpenNoFollow = 0x100,
        OpenDirectory = 0x20000,
        EventFdCloseOnExec = 0x100000,
        EventFdNonBlocking = 0x4,
        HasMemfd = true,
        FileLocks = new FileLockAbi(0, 0, 1, 3, 2),
        SignalBlock = 1,
        SignalUnblock = 2,
        KickSignal = 68,
        KernelSignalSetBytes = 16,
        IoctlTunnelRequest = 0x8010AEFF,
        Termios = new TermiosAbi(16, 16, 17, 0x3EB, 0x1, 0x1300, 0x300, 0x598, 0, 0x40087468),
    };

    /// <summary>illumos on amd64.</summary>
    public static OsAbi Illumos { get; } = new(
        HostSystem.Illumos,
        [
            (11, Errno.EAGAIN), (45, Errno.EDEADLK), (89, Errno.ENOSYS), (93, Errno.ENOTEMPTY), (122, Errno.EOPNOTSUPP),
            (48, Errno.EOPNOTSUPP), (125, Errno.EADDRINUSE), (131, Errno.ECONNRESET), (145, Errno.ETIMEDOUT),
            (146, Errno.ECONNREFUSED), (150, Errno.EINPROGRESS), (49, Errno.EDQUOT),
        ])
    {
        MapAnonymous = 0x100,
        MapNoReserve = 0x40,
        AdviseHugePages = 0,
        AdviseDontFork = 0,
        AdviseDontDump = 0,
        AdviseDiscard = 5,
        AdviseRemove = 0,
        OpenCreate = 0x100,
        OpenExclusive = 0x400,
        OpenTruncate = 0x200,
        OpenNonBlocking = 0x80,
        OpenCloseOnExec = 0x800000,
        OpenNoControllingTerminal = 0x800,
        OpenNoFollow = 0x20000,
        OpenDirectory = 0x1000000,
        EventFdCloseOnExec = 0x80000,
        EventFdNonBlocking = 0x800,
        HasMemfd = false,
        FileLocks = new FileLockAbi(47, 48, 1, 2, 3),
        SignalBlock = 1,
        SignalUnblock = 2,
        KickSignal = 45,
        KernelSignalSetBytes = 16,
        IoctlTunnelRequest = 0,
        Termios = new TermiosAbi(16, 4, 5, 0x5EB, 0x1, 0x130, 0x30, 0x804B, 0x540E, 0x5468),
    };

    /// <summary>The system that this process runs on.</summary>
    /// <exception cref="PlatformNotSupportedException">None of the three.</exception>
    public static OsAbi Current { get; } = Choose();

    /// <summary>Which system.</summary>
    public HostSystem System { get; }

    /// <summary>MAP_ANON.</summary>
    public required int MapAnonymous { get; init; }

    /// <summary>MAP_NORESERVE.</summary>
    public required int MapNoReserve { get; init; }

    /// <summary>MADV_HUGEPAGE.</summary>
    public required int AdviseHugePages { get; init; }

    /// <summary>MADV_DONTFORK.</summary>
    public required int AdviseDontFork { get; init; }

    /// <summary>MADV_DONTDUMP or MADV_NOCORE.</summary>
    public required int AdviseDontDump { get; init; }

    /// <summary>Advice that gives private pages back: MADV_DONTNEED on Linux, MADV_FREE elsewhere.</summary>
    public required int AdviseDiscard { get; init; }

    /// <summary>Advice that gives shared pages back (MADV_REMOVE).</summary>
    public required int AdviseRemove { get; init; }

    /// <summary>O_CREAT.</summary>
    public required int OpenCreate { get; init; }

    /// <summary>O_EXCL.</summary>
    public required int OpenExclusive { get; init; }

    /// <summary>O_TRUNC.</summary>
    public required int OpenTruncate { get; init; }

    /// <summary>O_NONBLOCK.</summary>
    public required int OpenNonBlocking { get; init; }

    /// <summary>O_CLOEXEC.</summary>
    public required int OpenCloseOnExec { get; init; }

    /// <summary>O_NOCTTY.</summary>
    public required int OpenNoControllingTerminal { get; init; }

    /// <summary>O_NOFOLLOW.</summary>
    public required int OpenNoFollow { get; init; }

    /// <summary>O_DIRECTORY.</summary>
    public required int OpenDirectory { get; init; }

    /// <summary>EFD_CLOEXEC.</summary>
    public required int EventFdCloseOnExec { get; init; }

    /// <summary>EFD_NONBLOCK.</summary>
    public required int EventFdNonBlocking { get; init; }

    /// <summary>memfd_create(2) exists.</summary>
    public required bool HasMemfd { get; init; }

    /// <summary>Whole-file locks.</summary>
    public required FileLockAbi FileLocks { get; init; }

    /// <summary>SIG_BLOCK.</summary>
    public required int SignalBlock { get; init; }

    /// <summary>SIG_UNBLOCK.</summary>
    public required int SignalUnblock { get; init; }

    /// <summary>
    /// The real-time signal that takes a vCPU out of guest mode. Not the runtime's own (SIGRTMIN) and not one of the
    /// two or three below SIGRTMIN that C libraries keep.
    /// </summary>
    public required int KickSignal { get; init; }

    /// <summary>Size of the kernel's signal set, as KVM_SET_SIGNAL_MASK wants it.</summary>
    public required int KernelSignalSetBytes { get; init; }

    /// <summary>
    /// Where this is not 0, KVM's requests keep Linux's numbers but travel inside this one request, whose argument is
    /// a pair of 64-bit words (request, argument). FreeBSD's ioctl(2) would otherwise read its own size and direction
    /// bits out of Linux's numbers and copy the wrong bytes.
    /// </summary>
    public required uint IoctlTunnelRequest { get; init; }

    /// <summary>Terminal settings.</summary>
    public required TermiosAbi Termios { get; init; }

    /// <summary>Names a raw error number of this system.</summary>
    public Errno ToErrno(int raw) => _errnos.GetValueOrDefault(raw, Errno.Other);

    private static OsAbi Choose()
    {
        if (OperatingSystem.IsLinux())
        {
            return Linux;
        }

        if (OperatingSystem.IsFreeBSD())
        {
            return FreeBsd;
        }

        return RuntimeInformation.IsOSPlatform(OSPlatform.Create("ILLUMOS"))
            ? Illumos
            : throw new PlatformNotSupportedException("this system is none of Linux, FreeBSD and illumos");
    }
}

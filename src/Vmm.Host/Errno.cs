// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.Host;

/// <summary>
/// System errors under POSIX names, independent of the numbers of one system: 35 is EDEADLK on Linux but EAGAIN on
/// FreeBSD. Raw numbers become this enum at the boundary (<see cref="OsAbi.ToErrno"/>) and appear nowhere else.
/// </summary>
public enum Errno
{
    /// <summary>No error.</summary>
    None = 0,

    /// <summary>An error without a name here; <see cref="HostException.RawErrno"/> has the number.</summary>
    Other,

    /// <summary>Operation not permitted.</summary>
    EPERM,

    /// <summary>No such file or directory.</summary>
    ENOENT,

    /// <summary>Interrupted by a signal.</summary>
    EINTR,

    /// <summary>Input/output error.</summary>
    EIO,

    /// <summary>No such device or address.</summary>
    ENXIO,

    /// <summary>List too long.</summary>
    E2BIG,

    /// <summary>Bad file descriptor.</summary>
    EBADF,

    /// <summary>Try again; would block.</summary>
    EAGAIN,

    /// <summary>Out of memory.</summary>
    ENOMEM,

    /// <summary>Permission denied.</summary>
    EACCES,

    /// <summary>Bad address.</summary>
    EFAULT,

    /// <summary>Device or resource busy.</summary>
    EBUSY,

    /// <summary>File exists.</summary>
    EEXIST,

    /// <summary>No such device.</summary>
    ENODEV,

    /// <summary>Not a directory.</summary>
    ENOTDIR,

    /// <summary>Is a directory.</summary>
    EISDIR,

    /// <summary>Invalid argument.</summary>
    EINVAL,

    /// <summary>Too many open files in the system.</summary>
    ENFILE,

    /// <summary>Too many open files in this process.</summary>
    EMFILE,

    /// <summary>The descriptor does not know the request.</summary>
    ENOTTY,

    /// <summary>File too large.</summary>
    EFBIG,

    /// <summary>No space left on device.</summary>
    ENOSPC,

    /// <summary>Illegal seek.</summary>
    ESPIPE,

    /// <summary>Read-only file system.</summary>
    EROFS,

    /// <summary>Broken pipe.</summary>
    EPIPE,

    /// <summary>Result too large.</summary>
    ERANGE,

    /// <summary>Deadlock avoided.</summary>
    EDEADLK,

    /// <summary>Function not implemented.</summary>
    ENOSYS,

    /// <summary>Directory not empty.</summary>
    ENOTEMPTY,

    /// <summary>Operation not supported.</summary>
    EOPNOTSUPP,

    /// <summary>Address in use.</summary>
    EADDRINUSE,

    /// <summary>Connection reset.</summary>
    ECONNRESET,

    /// <summary>Timed out.</summary>
    ETIMEDOUT,

    /// <summary>Connection refused.</summary>
    ECONNREFUSED,

    /// <summary>Under way.</summary>
    EINPROGRESS,

    /// <summary>Quota exceeded.</summary>
    EDQUOT,
}

// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.InteropServices;

namespace Vmm.Host.Native;

internal static unsafe partial class LibC
{
    [LibraryImport("libc", SetLastError = true)]
    internal static partial int openat(int directory, byte* path, int flags, uint mode);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int fstatat(int directory, byte* path, byte* stat, int flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int fstat(int fd, byte* stat);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int fstatvfs(int fd, ulong* stat);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int mkdirat(int directory, byte* path, uint mode);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int unlinkat(int directory, byte* path, int flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int renameat(int oldDirectory, byte* oldPath, int newDirectory, byte* newPath);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int linkat(int oldDirectory, byte* oldPath, int newDirectory, byte* newPath, int flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int symlinkat(byte* target, int directory, byte* path);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint readlinkat(int directory, byte* path, byte* buffer, nuint length);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int fchownat(int directory, byte* path, uint owner, uint group, int flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int fchmod(int fd, uint mode);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int utimensat(int directory, byte* path, TimeSpec* times, int flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint pread(int fd, byte* buffer, nuint length, long offset);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint pwrite(int fd, byte* buffer, nuint length, long offset);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint fdopendir(int fd);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial byte* readdir(nint directory);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int closedir(nint directory);
}

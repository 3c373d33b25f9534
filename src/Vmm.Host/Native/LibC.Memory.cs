// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.InteropServices;

namespace Vmm.Host.Native;

// Theory. Imports from the C library, one file per group of calls, native names, blittable arguments only. Callers are
// the wrappers of this assembly; nothing outside sees these. `ioctl`, `fcntl` and `open` are variadic in C: calling
// them with fixed arguments is sound on x86-64 (System V passes the first integer arguments in registers either way,
// and AL, the count of vector registers, only matters to callees that read floating-point varargs).

/// <summary>Imports from the C library.</summary>
internal static unsafe partial class LibC
{
    internal const int ProtNone = 0;
    internal const int ProtRead = 1;
    internal const int ProtWrite = 2;
    internal const int MapShared = 1;
    internal const int MapPrivate = 2;
    internal const int MapFixed = 0x10;

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint mmap(nint address, nuint length, int protection, int flags, int fd, long offset);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int munmap(nint address, nuint length);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int mprotect(nint address, nuint length, int protection);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int madvise(nint address, nuint length, int advice);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int memfd_create(byte* name, uint flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int ftruncate(int fd, long length);
}

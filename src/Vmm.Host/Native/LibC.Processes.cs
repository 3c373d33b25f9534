// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.InteropServices;

namespace Vmm.Host.Native;

internal static unsafe partial class LibC
{
    [LibraryImport("libc", SetLastError = true)]
    internal static partial int setsid();

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int kill(int pid, int signal);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int setgid(uint group);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int setuid(uint user);

    [LibraryImport("libc", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int initgroups(string user, uint group);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int prctl(int option, nuint a, nuint b, nuint c, nuint d);

    // Variadic in C; on x86-64 integers travel alike.
    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint syscall(nint number, nint a, nint b, nint c);

    [LibraryImport("libc", EntryPoint = "syscall", SetLastError = true)]
    internal static partial nint syscall4(nint number, nint a, nint b, nint c, nint d);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int execve(byte* path, byte** arguments, byte** environment);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int dup2(int from, int to);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int fchown(int file, uint user, uint group);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int fchmod(int file, int mode);

    // These by the file names of their systems: the linker binds "libc", and the C library of Linux lacks them.
    // FreeBSD: procctl(2).
    [LibraryImport("libc.so.7", SetLastError = true)]
    internal static partial int procctl(int idType, long id, int command, int* data);

    // illumos: priv_str_to_set(3C), setppriv(2).
    [LibraryImport("libc.so.1", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial nint priv_str_to_set(string text, string separator, nint end);

    [LibraryImport("libc.so.1", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int setppriv(int operation, string which, nint set);

    // FreeBSD: cpuset_setaffinity(2). illumos: processor_bind(2).
    [LibraryImport("libc.so.7", SetLastError = true)]
    internal static partial int cpuset_setaffinity(int level, int which, long id, nuint size, ulong* mask);

    [LibraryImport("libc.so.1", SetLastError = true)]
    internal static partial int processor_bind(int idType, int id, int processor, int* old);
}

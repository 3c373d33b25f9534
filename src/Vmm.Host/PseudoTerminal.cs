// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace Vmm.Host;

/// <summary>
/// The master side of a pseudo-terminal whose other side a person opens (`screen /dev/pts/7`). The slave stays open
/// here as well, in raw mode, so that the master does not report a hang-up whenever the last user leaves.
/// </summary>
public sealed unsafe partial class PseudoTerminal : IDisposable
{
    private readonly SafeFileHandle _slave;

    private PseudoTerminal(SafeFileHandle master, SafeFileHandle slave, string path)
    {
        Master = master;
        _slave = slave;
        SlavePath = path;
        MakeRaw(slave);
    }

    /// <summary>The master; reads what users type, writes what they see.</summary>
    public SafeFileHandle Master { get; }

    /// <summary>The path that users open.</summary>
    public string SlavePath { get; }

    /// <summary>Makes a pair.</summary>
    /// <exception cref="IOException">The host has none left.</exception>
    public static PseudoTerminal Open()
    {
        const int ReadWrite = 2;
        int fd = posix_openpt(ReadWrite | OsAbi.Current.OpenNoControllingTerminal);
        if (fd < 0)
        {
            throw new IOException($"pseudo-terminal: {Marshal.GetLastPInvokeErrorMessage()}");
        }

        var master = new SafeFileHandle(fd, ownsHandle: true);
        byte* name = stackalloc byte[256];
        if (grantpt(fd) != 0 || unlockpt(fd) != 0 || ptsname_r(fd, name, 256) != 0)
        {
            string reason = Marshal.GetLastPInvokeErrorMessage();
            master.Dispose();
            throw new IOException($"pseudo-terminal: {reason}");
        }

        string path = Marshal.PtrToStringUTF8((nint)name)!;
        try
        {
            return new PseudoTerminal(master, FileIo.OpenDevice(path), path);
        }
        catch
        {
            master.Dispose();
            throw;
        }
    }

    /// <summary>Closes our hold on the slave: reads and writes of the master then fail once no user has it open.</summary>
    public void HangUp() => _slave.Dispose();

    /// <inheritdoc/>
    public void Dispose()
    {
        _slave.Dispose();
        Master.Dispose();
    }

    private static void MakeRaw(SafeFileHandle slave)
    {
        // No system's struct termios is larger than 256 bytes; cfmakeraw and tcsetattr use their own part.
        byte* settings = stackalloc byte[256];
        int fd = (int)slave.DangerousGetHandle();
        if (tcgetattr(fd, settings) == 0)
        {
            cfmakeraw(settings);
            _ = tcsetattr(fd, OsAbi.Current.Termios.SetNow, settings);
        }
    }

    [LibraryImport("libc", SetLastError = true)]
    private static partial int posix_openpt(int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int grantpt(int fd);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int unlockpt(int fd);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int ptsname_r(int fd, byte* buffer, nuint length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int tcgetattr(int fd, byte* settings);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int tcsetattr(int fd, int actions, byte* settings);

    [LibraryImport("libc")]
    private static partial void cfmakeraw(byte* settings);
}

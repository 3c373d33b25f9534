// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Text;
using Microsoft.Win32.SafeHandles;
using Mono.Unix;
using Vmm.Host.Native;

namespace Vmm.Host;

/// <summary>Owners and groups of files.</summary>
public static class HostFiles
{
    /// <summary>Makes a directory, if it is not there, and gives it away. A link in its place is an error.</summary>
    /// <param name="path">The directory; what is above it is made too.</param>
    /// <param name="user">Owner.</param>
    /// <param name="group">Group.</param>
    /// <param name="mode">Permissions, with the set-group-ID and sticky bits.</param>
    /// <exception cref="HostException">It is something else, or may not be given away.</exception>
    public static void Give(string path, uint user, uint group, int mode)
    {
        System.IO.Directory.CreateDirectory(path);
        Change(path, OsAbi.Current.OpenDirectory, user, group, mode);
    }

    /// <summary>Gives a file away. A link is an error.</summary>
    /// <exception cref="HostException">It is something else, or may not be given away.</exception>
    public static void GiveFile(string path, uint user, uint group, int mode) => Change(path, 0, user, group, mode);

    private static void Change(string path, int flags, uint user, uint group, int mode)
    {
        int number = LibC.open(path, flags | OsAbi.Current.OpenNoFollow | OsAbi.Current.OpenCloseOnExec, 0);
        using var file = new SafeFileHandle(number, ownsHandle: true);
        if (file.IsInvalid || LibC.fchown(number, user, group) != 0 || LibC.fchmod(number, mode) != 0)
        {
            throw HostException.Last(path);
        }
    }

    /// <summary>
    /// Looks for what another user may have put in our way: on the way to a path, a name in a directory that everybody may
    /// write to (/tmp) which belongs neither to this user nor to root. Its owner could swap what lies below.
    /// </summary>
    /// <param name="path">An absolute path; it may be missing.</param>
    /// <returns>The directory or link, or null. Always null for root, who may work in other users' directories.</returns>
    public static string? FindForeign(string path) => HostProcess.IsRoot ? null : FindForeign(path, LibC.geteuid());

    internal static string? FindForeign(string path, uint user)
    {
        for (string at = path; System.IO.Path.GetDirectoryName(at) is { } above; at = above)
        {
            if (TryGetOwner(at, out uint owner) && owner != user && owner != 0
                && (System.IO.File.GetUnixFileMode(above) & System.IO.UnixFileMode.OtherWrite) != 0)
            {
                return at;
            }
        }

        return null;
    }

    // Of a link, not of what it leads to.
    private static unsafe bool TryGetOwner(string path, out uint owner)
    {
        byte* raw = stackalloc byte[FileLayout.StatBytes];
        fixed (byte* name = Encoding.UTF8.GetBytes(path + '\0'))
        {
            // SAFETY: the name is NUL-terminated and the buffer larger than struct stat of the three systems.
            bool known = LibC.fstatat(-1, name, raw, FileLayout.Current.NoFollow) == 0;
            owner = known ? FileLayout.Current.ReadStat(new ReadOnlySpan<byte>(raw, FileLayout.StatBytes)).Uid : 0;
            return known;
        }
    }

    /// <summary>Name of the group that owns a file or device.</summary>
    /// <returns>Null when it cannot be found out. By Mono.Posix, which loads a native helper: not for the start path.</returns>
    public static string? TryGetGroupName(string path)
    {
        try
        {
            return UnixFileSystemInfo.GetFileSystemEntry(path).OwnerGroup.GroupName;
        }
        catch (Exception exception) when (exception is ArgumentException or InvalidOperationException
            or DllNotFoundException or System.IO.IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }
}

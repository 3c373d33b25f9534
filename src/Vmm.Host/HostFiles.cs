// SPDX-License-Identifier: BSD-2-Clause
using System;
using Mono.Unix;

namespace Vmm.Host;

/// <summary>Owners and groups of files, by Mono.Posix: not for the start path, since it loads a native helper.</summary>
public static class HostFiles
{
    /// <summary>Name of the group that owns a file or device.</summary>
    /// <returns>Null when it cannot be found out.</returns>
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

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using Vmm.Host;

namespace Vmm.Machine;

/// <summary>Where the sockets of user-mode switches (<c>network:</c>) lie, which VMs of one user share.</summary>
public static class UserSwitch
{
    /// <summary>The directory of a switch.</summary>
    /// <param name="name">Name of the network.</param>
    public static string DirectoryOf(string name) => Path.Combine(RunDirectory(), "net", name);

    // As Vmm.Fleet's FleetPaths, which this assembly does not see.
    private static string RunDirectory()
    {
        if (Environment.GetEnvironmentVariable("VMM_RUN_DIR") is { Length: > 0 } given)
        {
            return given;
        }

        if (HostProcess.IsRoot)
        {
            return "/var/run/vmm";
        }

        return Environment.GetEnvironmentVariable("XDG_RUNTIME_DIR") is { Length: > 0 } runtime
            ? Path.Combine(runtime, "vmm")
            : Path.Combine(Path.GetTempPath(), "vmm-" + Environment.UserName);
    }
}

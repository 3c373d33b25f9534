// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using Vmm.Host;

namespace Vmm.Fleet;

/// <summary>
/// Where things lie. Root gets the system's directories, everybody else the XDG ones; the environment variables
/// <c>VMM_CONFIG_DIR</c>, <c>VMM_RUN_DIR</c> and <c>VMM_STATE_DIR</c> and the flags of commands move them.
/// </summary>
/// <param name="Definitions">Directory of definitions: what the daemon keeps running.</param>
/// <param name="Run">Sockets, process numbers, definitions that run; empty after a restart of the host.</param>
/// <param name="State">Console logs, leases, NVRAM, snapshots.</param>
public sealed record FleetPaths(string Definitions, string Run, string State)
{
    // struct sockaddr_un: 108 bytes on Linux and illumos, 104 on FreeBSD, with the zero.
    private const int MaxSocketPath = 103;

    private const string Elsewhere =
        "--run-dir and --state-dir, or VMM_RUN_DIR and VMM_STATE_DIR in the environment, name other places";

    /// <summary>Socket of the daemon's HTTP interface.</summary>
    public string DaemonSocket => Path.Combine(Run, "vmmd.sock");

    /// <summary>The daemon's lock; held for as long as it lives.</summary>
    public string DaemonLock => Path.Combine(Run, "vmmd.lock");

    /// <summary>The address of the web page, while there is one.</summary>
    public string WebAddress => Path.Combine(Run, "web");

    /// <summary>The token of the web page.</summary>
    public string WebToken => Path.Combine(State, "web-token");

    /// <summary>The paths of this user on this system.</summary>
    public static FleetPaths Default()
    {
        string definitions;
        string run;
        string state;
        if (HostProcess.IsRoot)
        {
            definitions = OsAbi.Current.System switch
            {
                HostSystem.FreeBsd => "/usr/local/etc/vmm",
                HostSystem.Illumos => "/etc/opt/vmm",
                _ => "/etc/vmm",
            };
            run = "/var/run/vmm";
            state = "/var/db/vmm";
        }
        else
        {
            string home = Variable("HOME") ?? "/tmp";
            definitions = Path.Combine(Variable("XDG_CONFIG_HOME") ?? Path.Combine(home, ".config"), "vmm");
            state = Path.Combine(Variable("XDG_STATE_HOME") ?? Path.Combine(home, ".local", "state"), "vmm");
            run = Variable("XDG_RUNTIME_DIR") is { } runtime
                ? Path.Combine(runtime, "vmm")
                : Path.Combine(Path.GetTempPath(), "vmm-" + Environment.UserName);
        }

        return new FleetPaths(
            Variable("VMM_CONFIG_DIR") ?? definitions,
            Variable("VMM_RUN_DIR") ?? run,
            Variable("VMM_STATE_DIR") ?? state);
    }

    /// <summary>Paths of one VM.</summary>
    public VmPaths Of(string name)
    {
        ArgumentNullException.ThrowIfNull(name);
        return new VmPaths(Path.Combine(Run, name), Path.Combine(State, name));
    }

    /// <summary>Makes a directory that only its owner can look into, with all above it.</summary>
    /// <exception cref="IOException">It cannot be made, or belongs to somebody else.</exception>
    public static void MakePrivate(string directory)
    {
        const UnixFileMode Owner = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute;
        try
        {
            Directory.CreateDirectory(directory, Owner);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            string reason = failure.Message.ReplaceLineEndings(" ").TrimEnd('.');
            throw new IOException($"{directory} cannot be made: {reason}; {Elsewhere}", failure);
        }

        if (HostFiles.FindForeign(Path.GetFullPath(directory)) is { } foreign)
        {
            throw new IOException($"{foreign} belongs to another user, who could take this one's place; {Elsewhere}");
        }
    }

    /// <summary>Checks that a path fits into a socket address.</summary>
    /// <exception cref="IOException">It does not; the message says what to do.</exception>
    public static string CheckSocket(string path)
    {
        ArgumentNullException.ThrowIfNull(path);
        if (System.Text.Encoding.UTF8.GetByteCount(path) > MaxSocketPath)
        {
            throw new IOException($"{path}: longer than the {MaxSocketPath} bytes of a socket's path; move it with VMM_RUN_DIR");
        }

        return path;
    }

    private static string? Variable(string name)
    {
        string? value = Environment.GetEnvironmentVariable(name);
        return string.IsNullOrEmpty(value) ? null : value;
    }
}

/// <summary>Files of one VM.</summary>
/// <param name="Run">Directory of what lives as long as the VM.</param>
/// <param name="State">Directory of what stays.</param>
public sealed record VmPaths(string Run, string State)
{
    /// <summary>Control socket (JSON lines).</summary>
    public string Control => Path.Combine(Run, "control.sock");

    /// <summary>Console socket.</summary>
    public string Console => Path.Combine(Run, "console.sock");

    /// <summary>VNC socket of a VM that has a display and names no address for it.</summary>
    public string Screen => Path.Combine(Run, "vnc.sock");

    /// <summary>Process number; locked while the process lives.</summary>
    public string Pid => Path.Combine(Run, "pid");

    /// <summary>The definition that runs, as canonical YAML.</summary>
    public string Definition => Path.Combine(Run, "definition.yaml");

    /// <summary>How the last run ended.</summary>
    public string Exit => Path.Combine(Run, "exit.json");

    /// <summary>What the user wants, where that differs from the definition: "up" or "down".</summary>
    public string Intent => Path.Combine(Run, "intent");

    /// <summary>Lease: who runs this VM, on which host.</summary>
    public string Lease => Path.Combine(State, "lease");

    /// <summary>Ring of console output.</summary>
    public string ConsoleLog => Path.Combine(State, "console.log");

    /// <summary>Ring of what a port of kind <c>log</c> wrote.</summary>
    /// <param name="port">Such as com2 or console0.</param>
    public string PortLog(string port) => Path.Combine(State, port + ".log");

    /// <summary>Messages of the VM's process.</summary>
    public string ProcessLog => Path.Combine(State, "vmctl.log");
}

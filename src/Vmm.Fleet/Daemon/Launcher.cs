// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using Vmm.Config;
using Vmm.Host;

namespace Vmm.Fleet.Daemon;

// Theory. A VM's process is started through a shell (launch.sh) that puts its limits in place and leaves it behind as nobody's
// child.
//
// Limits: nice and ulimit by the shell; processor and memory by a cgroup of its own where the launcher may make one (Linux,
// cgroup v2) and by rctl on FreeBSD. A limit that cannot be put in place is said in the VM's log and does not keep it from
// starting, except that the shell's own must work.
//
// A daemon that has given up root's rights cannot start a process for another user: then its keeper does it (Keeper).

/// <summary>Starts and ends the processes of VMs. Thread-safe; may block for as long as a shell takes.</summary>
public interface IVmLauncher
{
    /// <summary>Starts a VM's process.</summary>
    /// <returns>Its number.</returns>
    /// <exception cref="IOException">It cannot be started; the message is one line for people.</exception>
    int Launch(MachineSpec spec);

    /// <summary>Ends a VM's process that does not listen, without asking it.</summary>
    void End(string name);
}

/// <summary>Starts VMs as processes of this user, or of another if this one is root.</summary>
public sealed class ShellLauncher : IVmLauncher
{
    private static readonly string s_script = ReadScript();
    private static readonly TimeSpan s_shellPatience = TimeSpan.FromMinutes(1);

    private readonly FleetPaths _paths;
    private readonly string _program;

    /// <summary>Makes one.</summary>
    /// <param name="paths">Where things lie.</param>
    /// <param name="program">The vmctl that is started as <c>_run</c>.</param>
    public ShellLauncher(FleetPaths paths, string program)
    {
        _paths = paths;
        _program = program;
    }

    /// <inheritdoc/>
    public int Launch(MachineSpec spec)
    {
        ArgumentNullException.ThrowIfNull(spec);
        VmPaths vm = _paths.Of(spec.Name);
        FleetPaths.MakePrivate(vm.Run);
        FleetPaths.MakePrivate(vm.State);
        File.Delete(vm.Exit);
        string definition = Path.Combine(vm.Run, "next.yaml");
        VmProcess.WriteWhole(definition, SpecWriter.Write(spec));
        return Start(spec, definition, "077", vm.ProcessLog, []);
    }

    /// <inheritdoc/>
    public void End(string name)
    {
        // Only while the pid file is locked is the number in it the VM's.
        VmPaths vm = _paths.Of(name);
        if (VmProcess.ReadPid(vm) is { } pid && VmProcess.IsAlive(vm))
        {
            HostProcess.TryEnd(pid, force: true);
        }
    }

    /// <summary>Starts the shell and waits until it has put the limits in place.</summary>
    /// <param name="spec">The VM.</param>
    /// <param name="definition">File of its definition.</param>
    /// <param name="umask">In octal.</param>
    /// <param name="log">Standard output and error; empty for this process's own.</param>
    /// <param name="options">More options of <c>_run</c>.</param>
    /// <returns>The number of the VM's process.</returns>
    /// <exception cref="IOException">The shell failed.</exception>
    internal int Start(MachineSpec spec, string definition, string umask, string log, string[] options)
    {
        long memory = spec.Limits.OverheadBytes == 0 ? 0 : spec.MemoryBytes + spec.Limits.OverheadBytes;
        string[] arguments =
        [
            "-c", s_script, "sh", umask, log, Number(spec.Limits.Nice), Number(spec.Limits.OpenFiles),
            Number(spec.Limits.CpuPercent), Number(memory), spec.Name,
            _program, "_run", .. options, "--run-dir", _paths.Run, "--state-dir", _paths.State, definition,
        ];
        // A keeper's own pipes are for its daemon; the shell gets neither.
        var start = new ProcessStartInfo("/bin/sh")
        {
            UseShellExecute = false,
            WorkingDirectory = "/",
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
        };
        foreach (string argument in arguments)
        {
            start.ArgumentList.Add(argument);
        }

        using Process shell = Process.Start(start) ?? throw new IOException("/bin/sh did not start");
        bool hasEnded = shell.WaitForExit(s_shellPatience);
        return hasEnded && shell.ExitCode == 0
            && int.TryParse(shell.StandardOutput.ReadLine(), NumberStyles.None, CultureInfo.InvariantCulture, out int pid)
                ? pid
                : throw new IOException($"its limits cannot be put in place; see {_paths.Of(spec.Name).ProcessLog}");
    }

    private static string ReadScript()
    {
        using Stream stream = typeof(ShellLauncher).Assembly.GetManifestResourceStream("launch.sh")
            ?? throw new InvalidOperationException("launch.sh was not built in");
        using var reader = new StreamReader(stream);
        return reader.ReadToEnd();
    }

    private static string Number(long value) => value.ToString(CultureInfo.InvariantCulture);
}

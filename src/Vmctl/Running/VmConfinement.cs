// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using Vmm.Config;
using Vmm.Fleet;
using Vmm.Host;
using Vmm.Host.Sandbox;
using Vmm.Machine;

namespace Vmctl.Running;

// Theory. What a VM's process may do, in the order in which it gives things up:
//
//   1. its user: `run-as`, or the one that the daemon chose (root only), and with it all groups and capabilities;
//   2. files: those that its definition names, its own two directories, what the system has for everybody (Landlock). For
//      this the process runs itself anew, with --confined, see FileSandbox;
//   3. system calls, when the machine stands and before the guest's first instruction (seccomp; on illumos privileges, on
//      FreeBSD new privileges and tracing).
//
// 3 holds for `vmctl run` too. What a host does not have is left out; `vmctl doctor` says what it has. VMM_SANDBOX=off in the
// environment leaves out 2 and 3, for debuggers and for finding out whether a trouble comes from here.

/// <summary>Confines the process of a VM.</summary>
internal static class VmConfinement
{
    // For everybody, on any system: libraries, firmware, names of hosts, time zones, certificates, what the runtime looks at.
    private static readonly string[] s_programs = ["/usr", "/lib", "/lib64"];

    private static readonly string[] s_readable =
    [
        "/etc/ld.so.cache", "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf", "/etc/localtime",
        "/etc/ssl", "/etc/machine-id", "/etc/os-release", "/proc", "/sys/fs/cgroup", "/sys/devices/system", "/sys/kernel/mm",
    ];

    private static readonly string[] s_devices =
    [
        "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/dev/kvm", "/dev/net/tun", "/dev/ptmx", "/dev/pts", "/dev/tty",
    ];

    private static bool IsOff => Environment.GetEnvironmentVariable("VMM_SANDBOX") is "off";

    /// <summary>Confines this process to its files and runs it anew; returns when that is not possible here.</summary>
    /// <param name="spec">The VM.</param>
    /// <param name="paths">Its directories.</param>
    /// <param name="definition">The file that it stands in.</param>
    /// <param name="arguments">Of the new run; the caller adds the word that keeps it from coming here again.</param>
    internal static void EnterFiles(MachineSpec spec, VmPaths paths, string definition, IReadOnlyList<string> arguments)
    {
        if (IsOff || Environment.ProcessPath is not { } program)
        {
            return;
        }

        FleetPaths.MakePrivate(paths.Run);
        FleetPaths.MakePrivate(paths.State);
        var files = new FileSandbox();
        AllowSystem(files, program);
        files.Allow(definition, FileRights.Read);
        files.Allow(paths.Run, FileRights.Own);
        files.Allow(paths.State, FileRights.Own);
        AllowDefinition(files, spec);
        if (files.TryEnter(out _))
        {
            HostProcess.Execute(program, arguments);
        }
    }

    /// <summary>Gives up all system calls that a VM that stands does not need.</summary>
    internal static void EnterCalls(TextWriter log)
    {
        if (!IsOff && !SystemCallFilter.TryEnter(out string? reason) && !HostProcess.TryGiveUpProcesses())
        {
            log.WriteLine($"vmctl: the VM's process keeps all system calls: {reason}");
        }
    }

    private static void AllowSystem(FileSandbox files, string program)
    {
        files.Allow(Path.GetDirectoryName(program), FileRights.Execute);
        foreach (string path in s_programs)
        {
            files.Allow(path, FileRights.Execute);
        }

        foreach (string path in s_readable)
        {
            files.Allow(path, FileRights.Read);
        }

        foreach (string path in s_devices)
        {
            files.Allow(path, FileRights.Write);
        }
    }

    private static void AllowDefinition(FileSandbox files, MachineSpec spec)
    {
        foreach ((string path, bool isWritten) in BlockFactory.Prepare(spec.Disks))
        {
            files.Allow(path, isWritten ? FileRights.Write : FileRights.Read);
        }

        foreach ((_, string lease) in LeaseSet.OfDisks(spec))
        {
            AllowMade(files, lease);
        }

        string?[] read =
        [
            spec.Boot.Kernel, spec.Boot.Initrd, spec.Boot.Firmware, spec.Display.PasswordFile, spec.Display.TlsCertificate, spec.Display.TlsKey,
            spec.CloudInit?.UserData, spec.CloudInit?.Network,
        ];
        foreach (string? path in read)
        {
            files.Allow(path is not null && Path.IsPathRooted(path) ? path : null, FileRights.Read);
        }

        foreach (BootModuleSpec module in spec.Boot.Modules)
        {
            files.Allow(module.Path, FileRights.Read);
        }

        files.Allow(spec.Boot.Vars, FileRights.Write);
        foreach (ShareSpec share in spec.Shares)
        {
            files.Allow(share.Path, share.ReadOnly ? FileRights.Read : FileRights.Own);
        }

        AllowEnds(files, spec);
    }

    // A rule needs a file that is there. What cannot be made is said by who opens it.
    private static void AllowMade(FileSandbox files, string path)
    {
        try
        {
            File.OpenHandle(path, FileMode.OpenOrCreate, FileAccess.Write, FileShare.ReadWrite).Dispose();
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            return;
        }

        files.Allow(path, FileRights.Write);
    }

    private static void AllowEnds(FileSandbox files, MachineSpec spec)
    {
        var ends = new List<CharSpec>(spec.Serial);
        foreach (ConsoleSpec console in spec.Console)
        {
            ends.Add(console.Backend);
        }

        foreach (CharSpec end in ends)
        {
            if (end is { Kind: CharKind.File, Path: { } file })
            {
                AllowMade(files, file);
            }
            else if (end.Kind == CharKind.Unix)
            {
                files.Allow(Path.GetDirectoryName(end.Path), FileRights.Listen);
            }
        }

        files.Allow(Path.GetDirectoryName(spec.Vsock?.Path), FileRights.Listen);
        files.Allow(Path.GetDirectoryName(spec.Display.VncSocket), FileRights.Listen);
        foreach (NicSpec nic in spec.Nics)
        {
            files.Allow(nic.Backend == NicBackend.Socket ? Path.GetDirectoryName(nic.Target) : null, FileRights.Listen);
            if (nic.Network is { } network)
            {
                string directory = UserSwitch.DirectoryOf(network);
                FleetPaths.MakePrivate(directory);
                files.Allow(directory, FileRights.Own);
            }
        }
    }
}

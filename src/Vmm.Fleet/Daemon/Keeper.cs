// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Text;
using System.Text.Json;
using System.Threading;
using System.Threading.Tasks;
using Vmm.Config;
using Vmm.Host;

namespace Vmm.Fleet.Daemon;

// Theory. A daemon that is started by root splits in two. The keeper stays root and does as little as possible; the daemon
// proper (HTTP, web page, probes, policy) runs as a user of its own, and VMs as another, which owns nothing but their run
// and state directories and what the administrator gives it (disks). Between keeper and daemon there is a pair of pipes
// (the daemon's standard output and input) and three words, one JSON object a line:
//
//   daemon -> keeper   {"launch": NAME}    keeper -> daemon   {"pid": NUMBER} or {"error": TEXT}
//                      {"end": NAME}                          {}
//                                                             {"reload": true}, at any time
//
// The keeper trusts neither the daemon nor a VM. It takes a name only, and reads the definition itself from the definition
// directory, which is root's. It writes into no directory that either of them may change (Run/.keeper is its own; Run and
// State are root's with the sticky bit), follows no link when it hands a directory over, lets the VM's process open its log
// after it has become its user, and has a process ended by a helper that has become the VM's user first, so that the
// number in a pid file, which is the VM's word, can only ever point at that user's processes.

/// <summary>What a keeper is told.</summary>
/// <param name="Paths">Where things lie.</param>
/// <param name="Program">vmctl.</param>
/// <param name="DaemonUser">User of the daemon.</param>
/// <param name="VmUser">User of VMs that name none with <c>run-as</c>.</param>
/// <param name="DaemonArguments">Words after <c>vmctl</c> that start the daemon proper.</param>
public sealed record KeeperOptions(
    FleetPaths Paths, string Program, string DaemonUser, string VmUser, IReadOnlyList<string> DaemonArguments);

/// <summary>The part of the daemon that stays root; see the head of this file.</summary>
public sealed class Keeper
{
    // In octal: 2770, 1771, 0711, 0640.
    private const int SharedMode = 0x5F8;
    private const int StickyMode = 0x3F9;
    private const int PassMode = 0x1C9;
    private const int GroupReads = 0x1A0;
    private const int MaxLineBytes = 1024;

    private readonly KeeperOptions _options;
    private readonly ShellLauncher _launcher;
    private readonly string _definitions;
    private readonly uint _daemonGroup;

    /// <summary>Makes one.</summary>
    /// <exception cref="HostException">A user does not exist.</exception>
    public Keeper(KeeperOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        _options = options;
        _launcher = new ShellLauncher(options.Paths, options.Program);
        _definitions = Path.Combine(options.Paths.Run, ".keeper");
        (_, _daemonGroup) = HostProcess.FindUser(options.DaemonUser);
        _ = HostProcess.FindUser(options.VmUser);
    }

    /// <summary>Runs the daemon until it ends.</summary>
    /// <param name="stopping">Ends the daemon, which then ends this.</param>
    /// <param name="onReloader">Is given what makes the daemon read its definitions again.</param>
    /// <returns>The daemon's exit status.</returns>
    /// <exception cref="IOException">A directory cannot be made, or the daemon cannot be started.</exception>
    public async Task<int> RunAsync(Action<Action> onReloader, CancellationToken stopping)
    {
        ArgumentNullException.ThrowIfNull(onReloader);
        Directory.CreateDirectory(_options.Paths.Definitions);
        HostFiles.Give(_options.Paths.Run, 0, _daemonGroup, StickyMode);
        HostFiles.Give(_options.Paths.State, 0, _daemonGroup, StickyMode);
        HostFiles.Give(_definitions, 0, _daemonGroup, PassMode);
        var start = new ProcessStartInfo(_options.Program, _options.DaemonArguments)
        {
            UseShellExecute = false,
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
        };
        using Process daemon = Process.Start(start) ?? throw new IOException("the daemon did not start");
        await using CancellationTokenRegistration stop = stopping.Register(() => HostProcess.TryEnd(daemon.Id, force: false));
        using StreamWriter toDaemon = daemon.StandardInput;
        var gate = new Lock();
        void Tell(string line)
        {
            try
            {
                lock (gate)
                {
                    toDaemon.WriteLine(line);
                    toDaemon.Flush();
                }
            }
            catch (IOException)
            {
                // It has ended; its status says the rest.
            }
        }

        onReloader(() => Tell("{\"reload\":true}"));
        var lines = new Control.LineReader(daemon.StandardOutput.BaseStream, MaxLineBytes);
        while (await lines.ReadLineAsync(CancellationToken.None).ConfigureAwait(false) is { } line)
        {
            Tell(Answer(line));
        }

        await daemon.WaitForExitAsync(CancellationToken.None).ConfigureAwait(false);
        return daemon.ExitCode;
    }

    private string Answer(string line)
    {
        try
        {
            using JsonDocument document = JsonDocument.Parse(line);
            JsonElement root = document.RootElement;
            if (root.TryGetProperty("launch", out JsonElement launch) && launch.GetString() is { } name)
            {
                return string.Create(CultureInfo.InvariantCulture, $"{{\"pid\":{Launch(name)}}}");
            }

            if (root.TryGetProperty("end", out JsonElement end) && end.GetString() is { } ended)
            {
                End(ended);
            }

            return "{}";
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException or HostException or ConfigException
            or JsonException or InvalidOperationException or System.ComponentModel.Win32Exception)
        {
            return "{\"error\":\"" + JsonEncodedText.Encode(failure.Message.ReplaceLineEndings(" ")) + "\"}";
        }
    }

    private MachineSpec Find(string name)
    {
        if (MachineNames.IsName(name))
        {
            foreach (MachineSpec spec in ConfigFiles.LoadDirectory(_options.Paths.Definitions).Machines)
            {
                if (string.Equals(spec.Name, name, StringComparison.Ordinal))
                {
                    return spec;
                }
            }
        }

        throw new IOException("it is not defined");
    }

    private string UserOf(string name)
    {
        try
        {
            return Find(name).RunAs ?? _options.VmUser;
        }
        catch (Exception gone) when (gone is IOException or ConfigException)
        {
            return _options.VmUser;
        }
    }

    private int Launch(string name)
    {
        MachineSpec spec = Find(name);
        string user = spec.RunAs ?? _options.VmUser;
        (uint id, uint group) = HostProcess.FindUser(user);
        VmPaths vm = _options.Paths.Of(name);
        HostFiles.Give(vm.Run, id, _daemonGroup, SharedMode);
        HostFiles.Give(vm.State, id, _daemonGroup, SharedMode);
        string definition = Path.Combine(_definitions, name + ".yaml");
        VmProcess.WriteWhole(definition, SpecWriter.Write(spec));
        HostFiles.GiveFile(definition, 0, group, GroupReads);
        return _launcher.Start(spec, definition, "007", string.Empty, ["--user", user, "--log", vm.ProcessLog]);
    }

    private void End(string name)
    {
        VmPaths vm = _options.Paths.Of(MachineNames.IsName(name) ? name : throw new IOException("that is no name"));
        if (VmProcess.ReadPid(vm) is not { } pid)
        {
            return;
        }

        var start = new ProcessStartInfo(_options.Program, ["_end", UserOf(name), pid.ToString(CultureInfo.InvariantCulture)])
        {
            UseShellExecute = false,
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
        };
        using Process? helper = Process.Start(start);
        helper?.WaitForExit(5000);
    }
}

/// <summary>The launcher of a daemon that has a keeper: asks it over standard output and input. Thread-safe.</summary>
public sealed class KeptLauncher : IVmLauncher, IDisposable
{
    private readonly Lock _gate = new();
    private readonly Stream _toKeeper;
    private readonly System.Collections.Concurrent.BlockingCollection<string?> _answers = [];

    /// <summary>Makes one and begins to listen.</summary>
    /// <param name="fromKeeper">Standard input.</param>
    /// <param name="toKeeper">Standard output.</param>
    /// <param name="onReload">The keeper was told to have the definitions read.</param>
    /// <param name="onGone">The keeper has ended.</param>
    public KeptLauncher(Stream fromKeeper, Stream toKeeper, Action onReload, Action onGone)
    {
        _toKeeper = toKeeper;
        _ = Task.Run(() => ListenAsync(fromKeeper, onReload, onGone));
    }

    /// <inheritdoc/>
    public int Launch(MachineSpec spec)
    {
        ArgumentNullException.ThrowIfNull(spec);
        using JsonDocument answer = JsonDocument.Parse(Ask("launch", spec.Name));
        return answer.RootElement.TryGetProperty("pid", out JsonElement pid)
            ? pid.GetInt32()
            : throw new IOException(answer.RootElement.TryGetProperty("error", out JsonElement error) ? error.GetString() : "the keeper did not start it");
    }

    /// <inheritdoc/>
    public void End(string name) => Ask("end", name);

    /// <summary>Forgets the keeper's answers; nobody may be asking.</summary>
    public void Dispose() => _answers.Dispose();

    // One question at a time; names need no quoting.
    private string Ask(string word, string name)
    {
        lock (_gate)
        {
            _toKeeper.Write(Encoding.UTF8.GetBytes($"{{\"{word}\":\"{name}\"}}\n"));
            _toKeeper.Flush();
            return _answers.Take() ?? throw new IOException("the keeper has ended");
        }
    }

    private async Task ListenAsync(Stream fromKeeper, Action onReload, Action onGone)
    {
        var lines = new Control.LineReader(fromKeeper, 1 << 16);
        while (await lines.ReadLineAsync(CancellationToken.None).ConfigureAwait(false) is { } line)
        {
            if (line.StartsWith("{\"reload\"", StringComparison.Ordinal))
            {
                onReload();
            }
            else
            {
                _answers.Add(line);
            }
        }

        _answers.Add(null);
        onGone();
    }
}

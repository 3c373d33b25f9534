// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Concurrent;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Text.Json;
using System.Text.RegularExpressions;
using System.Threading;
using System.Threading.Tasks;
using Vmm.Config;
using Vmm.Fleet.Control;
using Vmm.Host;

namespace Vmm.Fleet.Daemon;

// Theory. A VM is a process that does not need its daemon: it is started by a launcher that leaves it behind as nobody's
// child, and it is found again by its run directory. So there is one way to watch a VM,
// whoever started it: a connection to its control socket that ends when the process ends. How it ended stands in
// exit.json; no word there means killed or crashed.

/// <summary>Runs VMs as processes of this host. Thread-safe.</summary>
public sealed class ProcessVmHost : IVmHost
{
    // Less than the supervisor's limit, so that the reason comes from here.
    private static readonly TimeSpan s_answerPatience = Supervisor.StartLimit - TimeSpan.FromSeconds(10);

    // A process without its socket flushes its disks, which may be slow; one that was told to quit by force gets less time.
    private static readonly TimeSpan s_closePatience = TimeSpan.FromMinutes(1);
    private static readonly TimeSpan s_quitPatience = TimeSpan.FromSeconds(10);

    private static readonly TimeSpan s_tcpLinger = TimeSpan.FromSeconds(2);

    private readonly ConcurrentDictionary<string, Watcher> _watchers = new(StringComparer.Ordinal);
    private readonly FleetPaths _paths;
    private readonly IVmLauncher _launcher;
    private readonly Action<string> _log;
    private Supervisor? _supervisor;

    /// <summary>Makes one.</summary>
    /// <param name="paths">Where things lie.</param>
    /// <param name="launcher">Starts and ends processes.</param>
    /// <param name="log">Lines for the daemon's log.</param>
    public ProcessVmHost(FleetPaths paths, IVmLauncher launcher, Action<string> log)
    {
        _paths = paths;
        _launcher = launcher;
        _log = log;
    }

    /// <summary>Says who is told. Once, before anything else.</summary>
    public void Attach(Supervisor supervisor) => _supervisor = supervisor;

    /// <summary>Finds VMs that run already and hands them to the supervisor.</summary>
    public void Adopt()
    {
        if (!Directory.Exists(_paths.Run))
        {
            return;
        }

        foreach (string directory in Directory.EnumerateDirectories(_paths.Run))
        {
            string name = Path.GetFileName(directory);
            VmPaths vm = _paths.Of(name);
            if (!VmProcess.IsAlive(vm))
            {
                continue;
            }

            try
            {
                MachineSpec running = ConfigFiles.LoadMachine(vm.Definition);
                Supervisor.Adopt(running, VmProcess.ReadPid(vm) ?? 0);
                Watch(name, VmProcess.ReadPid(vm) ?? 0, s_answerPatience);
            }
            catch (ConfigException damaged)
            {
                _log($"{name}: runs, but what it runs cannot be read: {damaged.Message}");
            }
        }
    }

    /// <summary>What users wanted before this daemon started.</summary>
    public Dictionary<string, bool> LoadIntents()
    {
        var intents = new Dictionary<string, bool>(StringComparer.Ordinal);
        if (Directory.Exists(_paths.Run))
        {
            foreach (string directory in Directory.EnumerateDirectories(_paths.Run))
            {
                string file = Path.Combine(directory, "intent");
                if (File.Exists(file))
                {
                    intents[Path.GetFileName(directory)] = File.ReadAllText(file).Trim() is "up";
                }
            }
        }

        return intents;
    }

    private Supervisor Supervisor => _supervisor ?? throw new InvalidOperationException("Attach comes first");

    /// <inheritdoc/>
    public void Launch(MachineSpec spec)
    {
        ArgumentNullException.ThrowIfNull(spec);
        string name = spec.Name;
        _ = Task.Run(() =>
        {
            try
            {
                // The word of the run before must not be taken for this one's.
                if (Directory.Exists(_paths.Of(name).Run))
                {
                    File.Delete(_paths.Of(name).Exit);
                }

                int pid = _launcher.Launch(spec);
                Watch(name, pid, s_answerPatience);
            }
            catch (Exception failure) when (failure is IOException or UnauthorizedAccessException or System.ComponentModel.Win32Exception)
            {
                Supervisor.OnEnded(name, new VmExit(4, "error", "cannot be started: " + failure.Message.ReplaceLineEndings(" ")));
            }
        });
    }

    /// <inheritdoc/>
    public void AskToStop(string name) => _ = Task.Run(() => CommandAsync(name, "system_powerdown"));

    /// <inheritdoc/>
    public void End(string name) => _ = Task.Run(async () =>
    {
        if (await CommandAsync(name, "quit").ConfigureAwait(false))
        {
            await WaitGoneAsync(_paths.Of(name), s_quitPatience).ConfigureAwait(false);
        }

        if (VmProcess.IsAlive(_paths.Of(name)))
        {
            _launcher.End(name);
        }
    });

    /// <inheritdoc/>
    public void Probe(MachineSpec spec)
    {
        ArgumentNullException.ThrowIfNull(spec);
        _ = Task.Run(async () =>
        {
            bool healthy = false;
            try
            {
                using var limit = new CancellationTokenSource(spec.Health?.Timeout ?? TimeSpan.FromSeconds(5));
                healthy = await ProbeAsync(spec, limit.Token).ConfigureAwait(false);
            }
            catch (Exception failure) when (failure is SocketException or IOException or OperationCanceledException or RegexMatchTimeoutException)
            {
                // Not healthy, whatever the reason.
            }

            Supervisor.OnProbed(spec.Name, healthy);
        });
    }

    /// <inheritdoc/>
    public void SaveIntent(string name, bool? wanted)
    {
        VmPaths vm = _paths.Of(name);
        try
        {
            if (wanted is { } up)
            {
                FleetPaths.MakePrivate(vm.Run);
                VmProcess.WriteWhole(vm.Intent, up ? "up\n" : "down\n");
            }
            else if (File.Exists(vm.Intent))
            {
                File.Delete(vm.Intent);
            }
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            _log($"{name}: what is wanted cannot be written down: {failure.Message}");
        }
    }

    /// <summary>Executes a command on a VM's control socket.</summary>
    /// <returns>False when the VM does not listen or refused.</returns>
    public async Task<bool> CommandAsync(string name, string command)
    {
        try
        {
            using var limit = new CancellationTokenSource(TimeSpan.FromSeconds(10));
            using ControlClient? client = await ControlClient.TryConnectAsync(_paths.Of(name).Control, limit.Token).ConfigureAwait(false);
            if (client is null)
            {
                return false;
            }

            await client.ExecuteAsync(command, null, limit.Token).ConfigureAwait(false);
            return true;
        }
        catch (Exception failure) when (failure is ControlException or OperationCanceledException)
        {
            _log($"{name}: {command}: {failure.Message}");
            return false;
        }
    }

    /// <summary>The newest report of a running VM; null when it does not answer.</summary>
    public async Task<VmReport?> ReportAsync(string name, CancellationToken cancellation)
    {
        try
        {
            using ControlClient? client = await ControlClient.TryConnectAsync(_paths.Of(name).Control, cancellation).ConfigureAwait(false);
            return client is null ? null : await client.ReportAsync(cancellation).ConfigureAwait(false);
        }
        catch (ControlException)
        {
            return null;
        }
    }

    /// <summary>The screen of a running VM as PNG, or why there is none.</summary>
    public async Task<(byte[]? Png, string? Why)> ScreenAsync(string name, int width, CancellationToken cancellation)
    {
        try
        {
            using ControlClient? client = await ControlClient.TryConnectAsync(_paths.Of(name).Control, cancellation).ConfigureAwait(false);
            if (client is null)
            {
                return (null, "does not answer");
            }

            JsonElement answer = await client.ExecuteAsync("vmm-screen", json => json.WriteNumber("width", width), cancellation).ConfigureAwait(false);
            return (answer.GetProperty("png").GetBytesFromBase64(), null);
        }
        catch (ControlException refused)
        {
            return (null, "gives no picture: " + refused.Message);
        }
        catch (Exception odd) when (odd is FormatException or KeyNotFoundException or InvalidOperationException)
        {
            return (null, "gives no picture");
        }
    }

    /// <summary>What a running VM wrote last to its console; null when it does not answer.</summary>
    public async Task<byte[]?> ConsoleTailAsync(string name, int maximumBytes, CancellationToken cancellation)
    {
        try
        {
            using ControlClient? client = await ControlClient.TryConnectAsync(_paths.Of(name).Control, cancellation).ConfigureAwait(false);
            if (client is null)
            {
                return null;
            }

            JsonElement answer = await client.ExecuteAsync(
                "vmm-console-tail", json => json.WriteNumber("bytes", maximumBytes), cancellation).ConfigureAwait(false);
            return answer.GetProperty("bytes").GetBytesFromBase64();
        }
        catch (Exception odd) when (odd is ControlException or FormatException or KeyNotFoundException or InvalidOperationException)
        {
            return null;
        }
    }

    private void Watch(string name, int pid, TimeSpan patience)
    {
        var watcher = new Watcher();
        if (_watchers.TryAdd(name, watcher))
        {
            _ = Task.Run(() => WatchAsync(name, watcher, pid, patience));
        }
    }

    private async Task WatchAsync(string name, Watcher watcher, int launched, TimeSpan patience)
    {
        VmPaths vm = _paths.Of(name);
        try
        {
            using ControlClient? client = await ConnectAsync(vm, launched, patience).ConfigureAwait(false);
            if (client is not null)
            {
                watcher.WasUp = true;
                Supervisor.OnStarted(name, VmProcess.ReadPid(vm) ?? 0);
                while (await client.Events.WaitToReadAsync().ConfigureAwait(false))
                {
                    client.Events.TryRead(out _);
                }
            }

            // The connection is gone; the process may still be writing its last word, or may never have come up.
            await WaitGoneAsync(vm, s_closePatience).ConfigureAwait(false);
            if (VmProcess.IsAlive(vm) && VmProcess.ReadPid(vm) is { } pid)
            {
                _log($"{name}: process {pid} closed its socket and did not end; ending it");
                _launcher.End(name);
                await WaitGoneAsync(vm, s_quitPatience).ConfigureAwait(false);
            }
        }
        finally
        {
            _watchers.TryRemove(new KeyValuePair<string, Watcher>(name, watcher));
        }

        Supervisor.OnEnded(name, VmExit.Read(vm.Exit) ?? (watcher.WasUp ? VmExit.Vanished : DiedEarly(vm)));
    }

    private static async Task WaitGoneAsync(VmPaths vm, TimeSpan patience)
    {
        long start = Stopwatch.GetTimestamp();
        while (VmProcess.IsAlive(vm) && Stopwatch.GetElapsedTime(start) < patience)
        {
            await Task.Delay(50).ConfigureAwait(false);
        }
    }

    private static VmExit DiedEarly(VmPaths vm)
    {
        string? last = null;
        try
        {
            foreach (string line in File.ReadLines(vm.ProcessLog))
            {
                last = line.Length > 0 ? line : last;
            }
        }
        catch (Exception absent) when (absent is IOException or UnauthorizedAccessException)
        {
            // Then there is nothing to say.
        }

        return last is null ? VmExit.Vanished : new VmExit(4, "error", last);
    }

    private static async Task<ControlClient?> ConnectAsync(VmPaths vm, int launched, TimeSpan patience)
    {
        var watch = Stopwatch.StartNew();
        bool wasAlive = false;
        while (true)
        {
            ControlClient? client = await ControlClient.TryConnectAsync(vm.Control, CancellationToken.None).ConfigureAwait(false);
            if (client is not null)
            {
                return client;
            }

            // First whether the process is there, then whether it holds its directory: it may be about to.
            bool isThere = HostProcess.IsRunning(launched);
            bool isAlive = VmProcess.IsAlive(vm);
            bool hasEnded = (wasAlive && !isAlive) || VmExit.Read(vm.Exit) is not null;
            bool neverCame = !isThere && !isAlive;
            if (hasEnded || neverCame || watch.Elapsed > patience)
            {
                return null;
            }

            wasAlive |= isAlive;
            await Task.Delay(20).ConfigureAwait(false);
        }
    }

    private async Task<bool> ProbeAsync(MachineSpec spec, CancellationToken cancellation)
    {
        HealthSpec health = spec.Health!;
        if (health.Tcp is { } tcp)
        {
            return await ConnectTcpAsync(tcp, health.Timeout, cancellation).ConfigureAwait(false);
        }

        if (health.Console is { } pattern)
        {
            return await MatchConsoleAsync(spec.Name, pattern, cancellation).ConfigureAwait(false);
        }

        return await PingAgentAsync(spec, cancellation).ConfigureAwait(false);
    }

    // A forwarded port of the user-mode network accepts whether or not the guest does, and closes when the guest turns out not
    // to. So a connection counts that stays for a while, or on which something is said.
    private static async Task<bool> ConnectTcpAsync(string target, TimeSpan timeout, CancellationToken cancellation)
    {
        int colon = target.LastIndexOf(':');
        string host = target[..colon].Trim('[', ']');
        IPAddress address = host is "localhost" ? IPAddress.Loopback : IPAddress.Parse(host);
        int port = int.Parse(target.AsSpan(colon + 1), NumberStyles.None, CultureInfo.InvariantCulture);
        using var socket = new Socket(address.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
        await socket.ConnectAsync(new IPEndPoint(address, port), cancellation).ConfigureAwait(false);
        using var linger = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        linger.CancelAfter(timeout / 2 < s_tcpLinger ? timeout / 2 : s_tcpLinger);
        try
        {
            return await socket.ReceiveAsync(new byte[1], linger.Token).ConfigureAwait(false) > 0;
        }
        catch (OperationCanceledException) when (!cancellation.IsCancellationRequested)
        {
            return true;
        }
    }

    // Once the text was seen in this run it stays seen: a login prompt scrolls away.
    private async Task<bool> MatchConsoleAsync(string name, string pattern, CancellationToken cancellation)
    {
        if (_watchers.TryGetValue(name, out Watcher? watcher) && watcher.WasSeen)
        {
            return true;
        }

        using Socket? socket = await UnixSockets.TryConnectAsync(_paths.Of(name).Console, cancellation).ConfigureAwait(false);
        if (socket is null)
        {
            return false;
        }

        await socket.SendAsync("{\"write\": false, \"tail\": 65536}\n"u8.ToArray(), cancellation).ConfigureAwait(false);
        var text = new StringBuilder();
        var regex = new Regex(pattern, RegexOptions.NonBacktracking | RegexOptions.CultureInvariant, TimeSpan.FromSeconds(1));
        var buffer = new byte[16_384];
        while (await socket.ReceiveAsync(buffer, cancellation).ConfigureAwait(false) is > 0 and int count)
        {
            text.Append(Encoding.Latin1.GetString(buffer, 0, count));
            int answer = text.ToString().IndexOf('\n', StringComparison.Ordinal);
            if (answer >= 0 && regex.IsMatch(text.ToString(answer + 1, text.Length - answer - 1)))
            {
                if (watcher is not null)
                {
                    watcher.WasSeen = true;
                }

                return true;
            }

            if (text.Length > 256 << 10)
            {
                text.Remove(answer + 1, text.Length - (64 << 10));
            }
        }

        return false;
    }

    // The guest agent's protocol (qemu-ga) on the port of that name.
    private static async Task<bool> PingAgentAsync(MachineSpec spec, CancellationToken cancellation)
    {
        foreach (ConsoleSpec port in spec.Console)
        {
            if (port is { Name: "org.qemu.guest_agent.0", Backend: { Kind: CharKind.Unix, Path: { } path } })
            {
                using Socket? socket = await UnixSockets.TryConnectAsync(path, cancellation).ConfigureAwait(false);
                if (socket is null)
                {
                    return false;
                }

                await socket.SendAsync("{\"execute\":\"guest-ping\"}\n"u8.ToArray(), cancellation).ConfigureAwait(false);
                var buffer = new byte[256];
                int count = await socket.ReceiveAsync(buffer, cancellation).ConfigureAwait(false);
                return count > 0 && buffer.AsSpan(0, count).IndexOf("\"return\""u8) >= 0;
            }
        }

        return false;
    }

    private sealed class Watcher
    {
        internal bool WasSeen { get; set; }

        internal bool WasUp { get; set; }
    }
}

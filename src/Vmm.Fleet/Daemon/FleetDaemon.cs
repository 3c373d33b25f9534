// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Channels;
using System.Threading.Tasks;
using Microsoft.Win32.SafeHandles;
using Vmm.Config;
using Vmm.Fleet.Web;
using Vmm.Host;

namespace Vmm.Fleet.Daemon;

/// <summary>What the daemon is told when it starts.</summary>
/// <param name="Paths">Where things lie.</param>
/// <param name="Program">The vmctl that is started for each VM.</param>
/// <param name="StopOnExit">Stop the fleet when the daemon is told to end; otherwise VMs go on and are found again.</param>
/// <param name="Web">Where the web page listens; null for none.</param>
public sealed record DaemonOptions(FleetPaths Paths, string Program, bool StopOnExit, IPEndPoint? Web = null)
{
    /// <summary>Starts processes; null: as this user.</summary>
    public IVmLauncher? Launcher { get; init; }
}

/// <summary>
/// Supervises the fleet that the definition directory declares: reads it, looks at it every two seconds, turns the
/// supervisor's crank, serves the HTTP interface, and leaves VMs running when it ends unless told otherwise.
/// </summary>
public sealed class FleetDaemon
{
    private static readonly TimeSpan s_tick = TimeSpan.FromMilliseconds(100);
    private static readonly TimeSpan s_look = TimeSpan.FromSeconds(2);

    private readonly DaemonOptions _options;
    private readonly TextWriter _log;
    private readonly TimeProvider _time = TimeProvider.System;
    private readonly Lock _logGate = new();
    private readonly Lock _loadGate = new();
    private string _signature = string.Empty;
    private IReadOnlyList<Diagnostic> _errors = [];
    private TimeSpan _stopTimeout = new FleetSpec { Machines = [] }.StopTimeout;

    /// <summary>Makes one.</summary>
    /// <param name="options">What it is told.</param>
    /// <param name="log">Lines for the log.</param>
    public FleetDaemon(DaemonOptions options, TextWriter log)
    {
        ArgumentNullException.ThrowIfNull(options);
        _options = options;
        _log = log;
        Host = new ProcessVmHost(options.Paths, options.Launcher ?? new ShellLauncher(options.Paths, options.Program), Say);
        Supervisor = new Supervisor(Host, _time, 2 * Environment.ProcessorCount);
        Host.Attach(Supervisor);
        Events = new EventHub();
        Supervisor.Happened += happened =>
        {
            Events.Publish(happened);
            Say(happened.Detail is null ? $"{happened.Name}: {happened.What}" : $"{happened.Name}: {happened.What}: {happened.Detail}");
        };
    }

    /// <summary>The policy.</summary>
    public Supervisor Supervisor { get; }

    /// <summary>The processes.</summary>
    public ProcessVmHost Host { get; }

    /// <summary>What happens, for whoever listens.</summary>
    public EventHub Events { get; }

    /// <summary>Where things lie.</summary>
    public FleetPaths Paths => _options.Paths;

    /// <summary>What is wrong with the definitions at the moment; the fleet is then as it was before.</summary>
    public IReadOnlyList<Diagnostic> Errors
    {
        get
        {
            lock (_loadGate)
            {
                return _errors;
            }
        }
    }

    /// <summary>How long stopping the whole fleet may take.</summary>
    public TimeSpan StopTimeout
    {
        get
        {
            lock (_loadGate)
            {
                return _stopTimeout;
            }
        }
    }

    /// <summary>Runs until told to end.</summary>
    /// <returns>False when another daemon runs already for this run directory.</returns>
    /// <exception cref="IOException">A directory or the socket cannot be made.</exception>
    public async Task<bool> RunAsync(CancellationToken stopping)
    {
        FleetPaths.MakePrivate(Paths.Run);
        FleetPaths.MakePrivate(Paths.State);
        Directory.CreateDirectory(Paths.Definitions);
        using SafeFileHandle guard = File.OpenHandle(
            Paths.DaemonLock, FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.ReadWrite | FileShare.Delete);
        if (FileIo.TryLock(guard, exclusive: true) == Errno.EAGAIN)
        {
            return false;
        }

        // First what runs, then what should run: otherwise everything that runs would be started again.
        Host.Adopt();
        Load(force: true, Host.LoadIntents());
        await using var server = new HttpServer(this);
        await server.StartAsync(stopping).ConfigureAwait(false);
        await using WebServer? web = await StartWebAsync(stopping).ConfigureAwait(false);
        Say($"ready; definitions in {Paths.Definitions}, socket {Paths.DaemonSocket}");
        await TurnAsync(stopping).ConfigureAwait(false);
        if (_options.StopOnExit)
        {
            await DrainAsync().ConfigureAwait(false);
        }

        Say("ended");
        return true;
    }

    /// <summary>Reads the definitions if they changed.</summary>
    /// <param name="force">Also if they look as before.</param>
    /// <param name="intents">At the start: what users wanted before.</param>
    /// <returns>False when something is wrong with them; <see cref="Errors"/> says what.</returns>
    public bool Load(bool force, IReadOnlyDictionary<string, bool>? intents = null)
    {
        lock (_loadGate)
        {
            string signature = Signature();
            if (!force && string.Equals(signature, _signature, StringComparison.Ordinal))
            {
                return _errors.Count == 0;
            }

            _signature = signature;
            try
            {
                FleetSpec fleet = ConfigFiles.LoadDirectory(Paths.Definitions);
                Supervisor.Declare(fleet, intents);
                _stopTimeout = fleet.StopTimeout;
                _errors = [];
            }
            catch (ConfigException wrong)
            {
                _errors = wrong.Diagnostics;
                foreach (Diagnostic error in _errors)
                {
                    Say($"{error}");
                }

                Say("the fleet stays as it is until the definitions are right");
            }

            return _errors.Count == 0;
        }
    }

    // A port that is taken keeps the page from being there, not the fleet from being kept up.
    private async Task<WebServer?> StartWebAsync(CancellationToken stopping)
    {
        if (_options.Web is not { } endPoint)
        {
            return null;
        }

        var web = new WebServer(this, new WebOptions(endPoint, Paths.WebToken, Paths.WebAddress));
        try
        {
            await web.StartAsync(stopping).ConfigureAwait(false);
        }
        catch (Exception failure) when (failure is IOException or SocketException)
        {
            Say($"no web page on {endPoint}: {failure.Message.ReplaceLineEndings(" ")}");
            await web.DisposeAsync().ConfigureAwait(false);
            return null;
        }

        Say($"web page on {web.Address()}; \"vmctl web\" prints the address with its token");
        if (!WebFiles.HasViewers)
        {
            Say("this vmctl was built without noVNC and xterm.js: the page shows no screens and consoles");
        }

        return web;
    }

    private async Task TurnAsync(CancellationToken stopping)
    {
        using var timer = new PeriodicTimer(s_tick, _time);
        long looked = _time.GetTimestamp();
        try
        {
            while (await timer.WaitForNextTickAsync(stopping).ConfigureAwait(false))
            {
                Supervisor.Tick();
                if (_time.GetElapsedTime(looked) >= s_look)
                {
                    looked = _time.GetTimestamp();
                    Load(force: false);
                }
            }
        }
        catch (OperationCanceledException)
        {
            // Told to end.
        }
    }

    private async Task DrainAsync()
    {
        TimeSpan limit = StopTimeout;
        Say($"stopping the fleet, at most {Quantity.FormatDuration(limit)}");
        Supervisor.Drain(limit);
        using var timer = new PeriodicTimer(s_tick, _time);
        long start = _time.GetTimestamp();
        while (HasProcesses() && _time.GetElapsedTime(start) < limit + TimeSpan.FromSeconds(10))
        {
            await timer.WaitForNextTickAsync().ConfigureAwait(false);
            Supervisor.Tick();
        }
    }

    private bool HasProcesses()
    {
        foreach (VmStatus vm in Supervisor.List())
        {
            if (vm.Phase is VmPhase.Starting or VmPhase.Running or VmPhase.Stopping)
            {
                return true;
            }
        }

        return false;
    }

    // Names, sizes and times of the files: cheap enough to look at every two seconds.
    private string Signature()
    {
        var text = new System.Text.StringBuilder();
        try
        {
            foreach (string file in ConfigFiles.ListDirectory(Paths.Definitions))
            {
                var info = new FileInfo(file);
                text.Append(file).Append('|').Append(info.Length).Append('|').Append(info.LastWriteTimeUtc.Ticks).Append('\n');
            }
        }
        catch (Exception absent) when (absent is ConfigException or IOException)
        {
            text.Append("unreadable");
        }

        return text.ToString();
    }

    private void Say(string message)
    {
        lock (_logGate)
        {
            _log.WriteLine(message);
        }
    }
}

/// <summary>Hands events to any number of listeners; a slow one loses the oldest. Thread-safe.</summary>
public sealed class EventHub
{
    private readonly Lock _gate = new();
    private readonly List<Channel<FleetEvent>> _listeners = [];

    /// <summary>Tells everybody.</summary>
    public void Publish(FleetEvent happened)
    {
        lock (_gate)
        {
            foreach (Channel<FleetEvent> listener in _listeners)
            {
                listener.Writer.TryWrite(happened);
            }
        }
    }

    /// <summary>Events from now on, until cancelled.</summary>
    public async IAsyncEnumerable<FleetEvent> ListenAsync(
        [System.Runtime.CompilerServices.EnumeratorCancellation] CancellationToken cancellation)
    {
        var channel = Channel.CreateBounded<FleetEvent>(new BoundedChannelOptions(1024) { FullMode = BoundedChannelFullMode.DropOldest });
        lock (_gate)
        {
            _listeners.Add(channel);
        }

        try
        {
            await foreach (FleetEvent happened in channel.Reader.ReadAllAsync(cancellation).ConfigureAwait(false))
            {
                yield return happened;
            }
        }
        finally
        {
            lock (_gate)
            {
                _listeners.Remove(channel);
            }
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Runtime.InteropServices;
using System.Threading;
using Vmm.Backends.Char;
using Vmm.Config;
using Vmm.Core;
using Vmm.Fleet;
using Vmm.Fleet.Control;
using Vmm.Machine;

namespace Vmctl.Running;

// Theory. A session is one VM in this process with everything around the machine: its run directory, its lease, the
// control and console sockets, the signals. `vmctl run` and the daemon's `_run` differ only in what stands at the end of
// the console. Order: run directory (is it running already?), leases (is the VM or a disk of it on another host?) before an
// image is opened, sockets when the machine stands, guest code last. At the end the other way round, and exit.json just before the directory is let
// go, so that whoever sees the process gone finds how it ended.

/// <summary>Runs one VM.</summary>
internal sealed class VmSession
{
    private readonly MachineSpec _spec;
    private readonly VmPaths _paths;
    private readonly TextWriter _log;
    private readonly bool _withControl;
    private Machine? _machine;
    private MachineResult? _result;
    private int _quitRequested;

    /// <summary>Makes one.</summary>
    /// <param name="spec">The VM.</param>
    /// <param name="paths">Its files.</param>
    /// <param name="log">Lines for people.</param>
    /// <param name="withControl">False: no run directory, no sockets, no lease.</param>
    internal VmSession(MachineSpec spec, VmPaths paths, TextWriter log, bool withControl)
    {
        _spec = spec;
        _paths = paths;
        _log = log;
        _withControl = withControl;
    }

    /// <summary>File of a saved state to go on from; null to start anew.</summary>
    internal string? RestoreFrom { get; init; }

    /// <summary>Log what the driver has counted at the end.</summary>
    internal bool ReportStatistics { get; init; }

    /// <summary>File that names translated blocks for Linux perf; null for none.</summary>
    internal string? PerfMap { get; init; }

    /// <summary>Ends the VM, now or as soon as there is one. Any thread.</summary>
    internal void Quit()
    {
        Volatile.Write(ref _quitRequested, 1);
        Volatile.Read(ref _machine)?.Stop(MachineResult.For(StopReason.Quit));
    }

    /// <summary>Runs the VM to its end.</summary>
    /// <param name="end">What stands at the end of the console, or null; disposed.</param>
    /// <param name="reportDriver">Say which driver was taken.</param>
    /// <returns>The exit status of <c>vmctl run</c>.</returns>
    internal int Run(ICharBackend? end, bool reportDriver)
    {
        if (!_withControl)
        {
            return RunMachine(end, null, null, reportDriver);
        }

        VmProcess process;
        try
        {
            process = VmProcess.Begin(_paths, _spec);
        }
        catch (LeaseHeldException held)
        {
            throw new CommandException(ExitStatus.WrongState, held.Message);
        }

        using (process)
        {
            int status = ExitStatus.InternalError;
            string? message = null;
            try
            {
#pragma warning disable VSTHRD002 // the process's main thread; nothing waits for it
                LeaseSet leases = LeaseSet.AcquireAsync(
                    _paths, _spec, TimeProvider.System, line => _log.WriteLine("vmctl: " + line), CancellationToken.None).GetAwaiter().GetResult();
                try
                {
                    var console = new CharMultiplexer(new CharLog(_paths.ConsoleLog), end);
                    status = RunMachine(console, console, leases, reportDriver);
                }
                finally
                {
                    leases.DisposeAsync().AsTask().Wait();
                }
#pragma warning restore VSTHRD002
            }
            catch (LeaseHeldException held)
            {
                message = held.Message;
                throw new CommandException(ExitStatus.WrongState, $"\"{_spec.Name}\": {held.Message}");
            }
            finally
            {
                process.End(Describe(status, message));
            }

            return status;
        }
    }

    private VmExit Describe(int status, string? message)
    {
        string reason = _result?.Reason switch
        {
            StopReason.Reset => "reset",
            StopReason.PowerOff => "power-off",
            StopReason.Halt => "halt",
            StopReason.TripleFault => "triple-fault",
            StopReason.DebugExit => "debug-exit",
            StopReason.Quit => "quit",
            _ => "error",
        };
        return new VmExit(status, reason, _result?.Message ?? message ?? (_result is null ? LastLine() : null));
    }

    // What MachineRunner logged last is why it did not get as far as a result.
    private string? LastLine() => (_log as LastLineWriter)?.Last;

    private int RunMachine(ICharBackend? stdio, CharMultiplexer? console, LeaseSet? leases, bool reportDriver)
    {
        var options = new RunOptions
        {
            Stdio = stdio,
            ReportDriver = reportDriver,
            ReportStatistics = ReportStatistics,
            PerfMap = PerfMap,
            LogFile = _withControl ? _paths.PortLog : null,
            OnBuilt = machine => Surround(machine, console, leases),
        };
        try
        {
            return MachineRunner.Run(WithScreen(), options, _log);
        }
        finally
        {
            stdio?.Dispose();
        }
    }

    // The web page shows every screen: one without a place of its own gets a socket in the run directory.
    private MachineSpec WithScreen() => _withControl && _spec.Display is { Vga: not VgaModel.None, VncAddress: null, VncSocket: null }
        ? _spec with { Display = _spec.Display with { VncSocket = _paths.Screen } }
        : _spec;

    private static void Restore(Machine machine, string path)
    {
        try
        {
            using FileStream file = File.OpenRead(path);
            machine.Load(file);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException or StateException)
        {
            throw new CommandException(ExitStatus.Config, $"{path}: {failure.Message.ReplaceLineEndings(" ")}");
        }
    }

    private Companion Surround(Machine machine, CharMultiplexer? console, LeaseSet? leases)
    {
        var companion = new Companion(this, machine);
        try
        {
            leases?.Watch(what =>
                machine.Stop(MachineResult.For(StopReason.Error, $"another host took over the lease of {what}")));
            if (RestoreFrom is not null)
            {
                Restore(machine, RestoreFrom);
            }

            if (console is not null)
            {
                companion.Serve(_paths, new MachineControl(_spec, machine, console), console);
            }

            VmConfinement.EnterCalls(_log);
            Volatile.Write(ref _machine, machine);
            if (Volatile.Read(ref _quitRequested) != 0)
            {
                Quit();
            }

            return companion;
        }
        catch
        {
            companion.Dispose();
            throw;
        }
    }

    /// <summary>What surrounds a machine while it runs.</summary>
    private sealed class Companion : IDisposable
    {
        private readonly List<IDisposable> _signals = [];
        private readonly VmSession _session;
        private readonly Machine _machine;
        private ControlServer? _control;
        private ConsoleServer? _console;
        private readonly Timer _patience;
        private int _terminations;

        internal Companion(VmSession session, Machine machine)
        {
            _session = session;
            _machine = machine;

            // Ctrl-C and a closed terminal end the VM; a termination asks the guest first, as bhyve does, and ends it
            // when the guest does not listen, takes longer than stop-timeout:, or a second one arrives.
            _patience = new Timer(_ => _machine.Stop(MachineResult.For(StopReason.Quit)));
            _signals.Add(PosixSignalRegistration.Create(PosixSignal.SIGINT, OnEnd));
            _signals.Add(PosixSignalRegistration.Create(PosixSignal.SIGHUP, OnEnd));
            _signals.Add(PosixSignalRegistration.Create(PosixSignal.SIGTERM, OnTerminate));
        }

        internal void Serve(VmPaths paths, MachineControl control, CharMultiplexer console)
        {
            _control = new ControlServer(paths.Control, control, TimeProvider.System);
            _console = new ConsoleServer(paths.Console, console);
        }

        public void Dispose()
        {
            _session._result = _machine.Result;
            Volatile.Write(ref _session._machine, null);
            foreach (IDisposable signal in _signals)
            {
                signal.Dispose();
            }

            _patience.Dispose();
            string reason = _machine.Result?.Reason.ToString() ?? "error";
            _control?.Emit("SHUTDOWN", json =>
            {
                json.WriteBoolean("guest", _machine.Result?.Reason is not (StopReason.Quit or StopReason.Error));
                json.WriteString("reason", reason);
            });
#pragma warning disable VSTHRD002 // the end of the process's main thread; nothing waits for it
            _console?.DisposeAsync().AsTask().Wait();
            _control?.DisposeAsync().AsTask().Wait();
#pragma warning restore VSTHRD002
        }

        private void OnEnd(PosixSignalContext context)
        {
            context.Cancel = true;
            _machine.Stop(MachineResult.For(StopReason.Quit));
        }

        private void OnTerminate(PosixSignalContext context)
        {
            context.Cancel = true;
            if (Interlocked.Increment(ref _terminations) == 1 && _machine.PressPowerButton())
            {
                _patience.Change(_session._spec.StopTimeout, Timeout.InfiniteTimeSpan);
            }
            else
            {
                _machine.Stop(MachineResult.For(StopReason.Quit));
            }
        }
    }
}

/// <summary>Passes lines on and keeps the last one.</summary>
internal sealed class LastLineWriter : TextWriter
{
    private readonly System.Text.StringBuilder _line = new();
    private readonly TextWriter _inner;

    internal LastLineWriter(TextWriter inner)
    {
        _inner = inner;
    }

    /// <summary>The last whole line; null before there is one.</summary>
    internal string? Last { get; private set; }

    public override System.Text.Encoding Encoding => _inner.Encoding;

    public override void Write(char value)
    {
        _inner.Write(value);
        if (value == '\n')
        {
            Last = _line.ToString();
            _line.Clear();
        }
        else if (_line.Length < 1000)
        {
            _line.Append(value);
        }
    }

    public override void Flush() => _inner.Flush();
}

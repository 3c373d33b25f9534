// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.CommandLine;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;
using Vmm.Fleet;
using Vmm.Fleet.Daemon;

namespace Vmctl.Commands;

/// <summary><c>vmctl daemon</c>: keeps the fleet as its definitions say, in the foreground.</summary>
internal static class DaemonCommand
{
    internal static Command Create(CommandContext context)
    {
        var stop = new Option<bool>("--stop-on-exit")
        {
            Description = "Stop the fleet when told to end; otherwise VMs go on and the next daemon finds them.",
        };
        var paths = new PathOptions();
        var command = new Command("daemon", "Keep the VMs of the definition directory up; for service managers, stays in the foreground.")
        {
            stop,
        };
        paths.AddTo(command, withDefinitions: true);
        command.SetAction((result, cancellation) => RunAsync(context, paths.Resolve(result), result.GetValue(stop), cancellation));
        return command;
    }

    private static async Task<int> RunAsync(CommandContext context, FleetPaths paths, bool stopOnExit, CancellationToken cancellation)
    {
        using var ending = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        void End(PosixSignalContext signal)
        {
            signal.Cancel = true;
            ending.Cancel();
        }

        using PosixSignalRegistration term = PosixSignalRegistration.Create(PosixSignal.SIGTERM, End);
        using PosixSignalRegistration interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, End);
        string program = Environment.ProcessPath ?? "vmctl";
        var daemon = new FleetDaemon(new DaemonOptions(paths, program, stopOnExit), context.Error);
        using PosixSignalRegistration hangUp = PosixSignalRegistration.Create(PosixSignal.SIGHUP, signal =>
        {
            signal.Cancel = true;
            daemon.Load(force: true);
        });
        if (!await daemon.RunAsync(ending.Token).ConfigureAwait(false))
        {
            throw new CommandException(ExitStatus.WrongState, $"a daemon already runs for {paths.Run}");
        }

        return ExitStatus.Ok;
    }
}

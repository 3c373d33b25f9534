// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.CommandLine;
using System.Net;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;
using Vmm.Fleet.Daemon;

namespace Vmctl.Commands;

/// <summary><c>vmctl daemon</c>: keeps the fleet as its definitions say, in the foreground.</summary>
internal static class DaemonCommand
{
    private const string DefaultWeb = "127.0.0.1:7117";

    internal static Command Create(CommandContext context)
    {
        var stop = new Option<bool>("--stop-on-exit")
        {
            Description = "Stop the fleet when told to end; otherwise VMs go on and the next daemon finds them.",
        };
        var web = new Option<string>("--web")
        {
            Description = $"Serve the web page, on {DefaultWeb} or the address given; \"vmctl web\" prints how to sign in.",
            HelpName = "address",
            Arity = ArgumentArity.ZeroOrOne,
        };
        var plain = new Option<bool>("--web-without-tls")
        {
            Description = "Let --web listen on an address that is not loopback's, although the page has no TLS.",
        };
        var paths = new PathOptions();
        var command = new Command("daemon", "Keep the VMs of the definition directory up; for service managers, stays in the foreground.")
        {
            stop,
            web,
            plain,
        };
        paths.AddTo(command, withDefinitions: true);
        command.SetAction((result, cancellation) =>
        {
            IPEndPoint? page = result.GetResult(web) is null ? null : ParseWeb(result.GetValue(web) ?? DefaultWeb, result.GetValue(plain));
            string program = Environment.ProcessPath ?? "vmctl";
            var options = new DaemonOptions(paths.Resolve(result), program, result.GetValue(stop), page);
            return RunAsync(context, options, cancellation);
        });
        return command;
    }

    private static IPEndPoint ParseWeb(string text, bool withoutTls)
    {
        string address = text.Replace("localhost", "127.0.0.1", StringComparison.Ordinal);
        if (!IPEndPoint.TryParse(address, out IPEndPoint? end) || !address.Contains(':', StringComparison.Ordinal))
        {
            throw new CommandException(ExitStatus.Usage, $"daemon: --web takes an address and port such as {DefaultWeb}, not \"{text}\"");
        }

        return IPAddress.IsLoopback(end.Address) || withoutTls
            ? end
            : throw new CommandException(
                ExitStatus.Usage,
                $"daemon: the web page has no TLS: put a proxy before {DefaultWeb}, or give --web-without-tls to listen on {text}");
    }

    private static async Task<int> RunAsync(CommandContext context, DaemonOptions options, CancellationToken cancellation)
    {
        using var ending = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        void End(PosixSignalContext signal)
        {
            signal.Cancel = true;
            ending.Cancel();
        }

        using PosixSignalRegistration term = PosixSignalRegistration.Create(PosixSignal.SIGTERM, End);
        using PosixSignalRegistration interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, End);
        var daemon = new FleetDaemon(options, context.Error);
        using PosixSignalRegistration hangUp = PosixSignalRegistration.Create(PosixSignal.SIGHUP, signal =>
        {
            signal.Cancel = true;
            daemon.Load(force: true);
        });
        if (!await daemon.RunAsync(ending.Token).ConfigureAwait(false))
        {
            throw new CommandException(ExitStatus.WrongState, $"a daemon already runs for {options.Paths.Run}");
        }

        return ExitStatus.Ok;
    }
}

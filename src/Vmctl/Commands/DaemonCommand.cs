// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.CommandLine;
using System.Net;
using System.Threading;
using System.Threading.Tasks;
using Vmm.Fleet.Daemon;
using Vmm.Host;

namespace Vmctl.Commands;

/// <summary><c>vmctl daemon</c>: keeps the fleet as its definitions say, in the foreground.</summary>
internal static class DaemonCommand
{
    private const string DefaultWeb = "127.0.0.1:7117";
    private const string DefaultUser = "vmm";
    private const string DefaultVmUser = "vmm-guest";

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
        var user = new Option<string>("--user")
        {
            Description = $"When started by root: the user that the daemon becomes; default: {DefaultUser}, if there is one.",
            HelpName = "name",
        };
        var vmUser = new Option<string>("--vm-user")
        {
            Description = $"The user of VMs that name none with run-as; default: {DefaultVmUser}, if there is one, or the daemon's.",
            HelpName = "name",
        };
        var kept = new Option<bool>("--kept") { Hidden = true };
        var paths = new PathOptions();
        var command = new Command("daemon", "Keep the VMs of the definition directory up; for service managers, stays in the foreground.")
        {
            stop,
            web,
            plain,
            user,
            vmUser,
            kept,
        };
        paths.AddTo(command, withDefinitions: true);
        command.SetAction((result, cancellation) =>
        {
            IPEndPoint? page = result.GetResult(web) is null ? null : ParseWeb(result.GetValue(web) ?? DefaultWeb, result.GetValue(plain));
            string program = Environment.ProcessPath ?? "vmctl";
            var options = new DaemonOptions(paths.Resolve(result), program, result.GetValue(stop), page);
            string? daemonUser = UserFor(result.GetValue(user), DefaultUser);
            if (result.GetValue(kept))
            {
                return RunKeptAsync(context, options, daemonUser!, cancellation);
            }

            if (daemonUser is null)
            {
                return RunAsync(context, options, cancellation);
            }

            string machineUser = UserFor(result.GetValue(vmUser), DefaultVmUser) ?? daemonUser;
            return KeepAsync(options, daemonUser, machineUser, cancellation);
        });
        return command;
    }

    // Only root can become somebody else, and only somebody who is there.
    private static string? UserFor(string? asked, string otherwise)
    {
        if (asked is not null && !(HostProcess.IsRoot && HostProcess.UserExists(asked)))
        {
            string why = HostProcess.IsRoot ? $"there is no user \"{asked}\" on this host" : "only root can become another user";
            throw new CommandException(ExitStatus.Usage, $"daemon: {why}");
        }

        return asked ?? (HostProcess.IsRoot && HostProcess.UserExists(otherwise) ? otherwise : null);
    }

    // The part that stays root. SIGTERM and SIGINT end it, SIGHUP reads the definitions again; so with the daemon itself.
    private static async Task<int> KeepAsync(DaemonOptions options, string user, string vmUser, CancellationToken cancellation)
    {
        Action reload = static () => { };
        using var signals = new Interruption(() => reload(), cancellation);
        List<string> words =
        [
            "daemon", "--kept", "--user", user, "--config-dir", options.Paths.Definitions, "--run-dir", options.Paths.Run,
            "--state-dir", options.Paths.State,
        ];
        if (options.StopOnExit)
        {
            words.Add("--stop-on-exit");
        }

        if (options.Web is { } web)
        {
            // Whether it may be another address than loopback's was asked before.
            words.AddRange(["--web", web.ToString(), "--web-without-tls"]);
        }

        var keeper = new Keeper(new KeeperOptions(options.Paths, options.Program, user, vmUser, words));
        return await keeper.RunAsync(given => reload = given, signals.Token).ConfigureAwait(false);
    }

    // The part that is not root: its keeper is at the other end of standard input and output.
    private static async Task<int> RunKeptAsync(CommandContext context, DaemonOptions options, string user, CancellationToken cancellation)
    {
        HostProcess.TryLeaveSession();
        HostProcess.BecomeUser(user);
        HostProcess.TryRefuseNewPrivileges();
        using var ending = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        FleetDaemon? daemon = null;
        using var launcher = new KeptLauncher(
            Console.OpenStandardInput(), Console.OpenStandardOutput(), () => daemon?.Load(force: true), () => ending.Cancel());
        context.Error.WriteLine($"runs as {user}");
        return await RunAsync(context, options with { Launcher = launcher }, ending.Token, made => daemon = made).ConfigureAwait(false);
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

    private static async Task<int> RunAsync(CommandContext context, DaemonOptions options, CancellationToken cancellation, Action<FleetDaemon>? onMade = null)
    {
        var daemon = new FleetDaemon(options, context.Error);
        onMade?.Invoke(daemon);
        using var signals = new Interruption(() => daemon.Load(force: true), cancellation);
        if (!await daemon.RunAsync(signals.Token).ConfigureAwait(false))
        {
            throw new CommandException(ExitStatus.WrongState, $"a daemon already runs for {options.Paths.Run}");
        }

        return ExitStatus.Ok;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.CommandLine;
using System.IO;
using Vmm.Config;
using Vmm.Fleet;
using Vmm.Host;
using Vmctl.Running;

namespace Vmctl.Commands;

/// <summary><c>vmctl run</c>: one VM in the foreground.</summary>
internal static class RunCommand
{
    internal static Command Create(CommandContext context)
    {
        var file = new Argument<string>("file")
        {
            Description = "File of one definition, or FILE#NAME for one of several.",
        };
        var accel = new Option<string>("--accel")
        {
            Description = "Drivers to try in order, instead of the definition's: kvm,soft.",
            HelpName = "list",
        };
        var noControl = new Option<bool>("--no-control")
        {
            Description = "Keep to this terminal: no run directory, no sockets, no lease.",
        };
        var restore = new Option<string>("--restore")
        {
            Description = "Go on from a state that snapshot saved.",
            HelpName = "file",
        };
        var quiet = new Option<bool>("--quiet", "-q") { Description = "Do not say which driver was taken." };
        var stats = new Option<bool>("--stats")
        {
            Description = "At the end, say what the driver has counted (the software processor's blocks, flushes and so on).",
        };
        var perfMap = new Option<bool>("--perf-map")
        {
            Description = "Name translated code in /tmp/perf-PID.map, for Linux perf.",
        };
        var paths = new PathOptions();
        var command = new Command("run", "Run a VM in the foreground, its console on this terminal (\"~.\" ends it).")
        {
            file,
            accel,
            noControl,
            restore,
            quiet,
            stats,
            perfMap,
        };
        paths.AddTo(command, withDefinitions: false);
        command.SetAction(result =>
        {
            MachineSpec spec = ConfigFiles.LoadNamed(result.GetRequiredValue(file));
            if (result.GetValue(accel) is { } list)
            {
                spec = spec with { Accel = ParseAccel(list) };
            }

            IReadOnlyList<Diagnostic> errors = HostCheck.Check(spec);
            if (errors.Count > 0)
            {
                throw new ConfigException(errors);
            }

            return Run(
                context,
                spec,
                paths.Resolve(result),
                !result.GetValue(noControl),
                !result.GetValue(quiet),
                result.GetValue(restore),
                result.GetValue(stats),
                result.GetValue(perfMap));
        });
        return command;
    }

    internal static int Run(
        CommandContext context,
        MachineSpec spec,
        FleetPaths paths,
        bool withControl,
        bool reportDriver,
        string? restore,
        bool reportStatistics = false,
        bool withPerfMap = false)
    {
        VmSession? session = null;
        using var terminal = new TerminalConsole(() => session?.Quit());
        using var log = new LastLineWriter(new RawAwareWriter(context.Error, () => terminal.IsRaw));
        session = new VmSession(spec, paths.Of(spec.Name), log, withControl)
        {
            RestoreFrom = restore,
            ReportStatistics = reportStatistics,
            PerfMap = withPerfMap ? $"/tmp/perf-{Environment.ProcessId}.map" : null,
        };
        try
        {
            int status = session.Run(terminal, reportDriver);
            if (terminal.IsTerminal)
            {
                context.Error.WriteLine();
            }

            return status;
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException or HostException)
        {
            // 1, what other commands end with, would say here that the guest powered off.
            throw new CommandException(ExitStatus.InternalError, $"{spec.Name}: {failure.Message.ReplaceLineEndings(" ")}");
        }
    }

    private static string[] ParseAccel(string list)
    {
        string[] names = list.Split(',', StringSplitOptions.TrimEntries | StringSplitOptions.RemoveEmptyEntries);
        string[] known = ["auto", "kvm", "soft"];
        foreach (string name in names)
        {
            if (Array.IndexOf(known, name) < 0)
            {
                throw new CommandException(
                    ExitStatus.Usage, $"run: --accel takes auto, kvm and soft, not \"{name}\"{Suggestion.Ending(name, known)}");
            }
        }

        return names.Length > 0 ? names : throw new CommandException(ExitStatus.Usage, "run: --accel names no driver");
    }
}

/// <summary><c>vmctl _run</c>: a VM's process as the daemon starts it. Hidden.</summary>
internal static class RunProcessCommand
{
    internal static Command Create(CommandContext context)
    {
        var file = new Argument<string>("file");
        var confined = new Option<bool>("--confined");
        var user = new Option<string>("--user");
        var logFile = new Option<string>("--log");
        var paths = new PathOptions();
        var command = new Command("_run", "A VM's process as the daemon starts it.") { file, confined, user, logFile };
        command.Hidden = true;
        paths.AddTo(command, withDefinitions: false);
        command.SetAction(result =>
        {
            string definition = Path.GetFullPath(result.GetRequiredValue(file));
            MachineSpec spec = ConfigFiles.LoadNamed(definition);
            FleetPaths resolved = paths.Resolve(result);
            if (!result.GetValue(confined))
            {
                HostProcess.TryLeaveSession();
                if ((result.GetValue(user) ?? spec.RunAs) is { } other && HostProcess.IsRoot)
                {
                    HostProcess.BecomeUser(other);
                }

                if (result.GetValue(logFile) is { } path)
                {
                    HostProcess.RedirectOutput(path);
                }

                HostProcess.TryRefuseNewPrivileges();
                VmConfinement.EnterFiles(
                    spec,
                    resolved.Of(spec.Name),
                    definition,
                    ["_run", "--confined", "--run-dir", resolved.Run, "--state-dir", resolved.State, definition]);
            }

            using var log = new LastLineWriter(context.Error);
            return new VmSession(spec, resolved.Of(spec.Name), log, withControl: true).Run(null, reportDriver: true);
        });
        return command;
    }
}

/// <summary><c>vmctl _end USER PID</c>: ends a process with no more rights than its user has. Hidden; for the keeper.</summary>
internal static class EndProcessCommand
{
    internal static Command Create(CommandContext context)
    {
        _ = context;
        var user = new Argument<string>("user");
        var pid = new Argument<int>("pid");
        var command = new Command("_end", "Ends a process as its user.") { user, pid };
        command.Hidden = true;
        command.SetAction(result =>
        {
            HostProcess.BecomeUser(result.GetRequiredValue(user));
            return HostProcess.TryEnd(result.GetRequiredValue(pid), force: true) ? ExitStatus.Ok : ExitStatus.Failed;
        });
        return command;
    }
}

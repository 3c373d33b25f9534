// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.CommandLine;
using System.Diagnostics;
using System.IO;
using System.Text.Json;
using System.Threading;
using System.Threading.Tasks;
using Vmm.Config;
using Vmm.Fleet;
using Vmm.Fleet.Control;

namespace Vmctl.Commands;

/// <summary><c>vmctl start</c>.</summary>
internal static class StartCommand
{
    internal static Command Create(CommandContext context)
    {
        var command = new Command("start", "Start VMs, with everything that they require, and wait until they run.");
        var arguments = new VmArguments(command, several: true, optional: true);
        var all = new Option<bool>("--all", "-a") { Description = "All VMs with autostart." };
        var noWait = new Option<bool>("--no-wait") { Description = "Do not wait until they run." };
        var console = new Option<bool>("--console", "-c") { Description = "Attach to the console." };
        command.Add(all);
        command.Add(noWait);
        command.Add(console);
        command.SetAction(async (result, cancellation) =>
        {
            using FleetAccess fleet = arguments.Open(result);
            string[] names = arguments.All(result);
            if (names.Length == 0 && !result.GetValue(all))
            {
                throw new CommandException(ExitStatus.Usage, "start: name a VM, or give --all for all of them");
            }

            await fleet.NeedDaemonAsync(cancellation).ConfigureAwait(false);
            if (result.GetValue(all))
            {
                names = await AutostartedAsync(fleet, cancellation).ConfigureAwait(false);
            }

            // First all of them, so that the daemon can start them side by side.
            foreach (string name in names)
            {
                await fleet.CallAsync(true, $"/v1/vms/{Uri.EscapeDataString(name)}/start", cancellation).ConfigureAwait(false);
            }

            if (!result.GetValue(noWait))
            {
                using var progress = new ProgressBar(context, "starting");
                for (int i = 0; i < names.Length; i++)
                {
                    progress.Report((double)i / names.Length);
                    await WaitUpAsync(fleet, names[i], cancellation).ConfigureAwait(false);
                }
            }

            return result.GetValue(console) && arguments.All(result) is [string only]
                ? await ConsoleCommand.AttachAsync(context, fleet, only, write: true, force: false, cancellation).ConfigureAwait(false)
                : ExitStatus.Ok;
        });
        return command;
    }

    private static async Task<string[]> AutostartedAsync(FleetAccess fleet, CancellationToken cancellation)
    {
        var names = new List<string>();
        JsonElement answer = await fleet.CallAsync(false, "/v1/vms", cancellation).ConfigureAwait(false);
        foreach (JsonElement vm in answer.GetProperty("vms").EnumerateArray())
        {
            if (vm.GetProperty("autostart").GetBoolean())
            {
                names.Add(vm.GetProperty("name").GetString()!);
            }
        }

        return [.. names];
    }

    internal static async Task WaitUpAsync(FleetAccess fleet, string name, CancellationToken cancellation)
    {
        while (true)
        {
            JsonElement vm = await fleet.CallAsync(false, $"/v1/vms/{Uri.EscapeDataString(name)}", cancellation).ConfigureAwait(false);
            var line = VmLine.Of(vm);
            switch (line.State)
            {
                case "running" or "paused":
                    return;
                case "failed" or "down" or "backoff":
                    throw new CommandException(ExitStatus.Failed, $"\"{name}\" did not start: {line.Note ?? line.LastExit ?? line.State}");
                default:
                    await Task.Delay(50, cancellation).ConfigureAwait(false);
                    break;
            }
        }
    }
}

/// <summary><c>vmctl stop</c>.</summary>
internal static class StopCommand
{
    internal static Command Create(CommandContext context)
    {
        _ = context;
        var command = new Command("stop", "Ask the guests to shut down and wait for it; -f ends them at once.");
        var arguments = new VmArguments(command, several: true, optional: true);
        var all = new Option<bool>("--all", "-a") { Description = "All VMs that run." };
        var force = new Option<bool>("--force", "-f") { Description = "End the VM at once, without asking the guest." };
        var timeout = TimeoutOption();
        command.Add(all);
        command.Add(force);
        command.Add(timeout);
        command.SetAction(async (result, cancellation) =>
        {
            using FleetAccess fleet = arguments.Open(result);
            string[] names = arguments.All(result);
            if (names.Length == 0 && !result.GetValue(all))
            {
                throw new CommandException(ExitStatus.Usage, "stop: name a VM, or give --all for all of them");
            }

            if (result.GetValue(all))
            {
                await StopAllAsync(fleet, result.GetValue(force), Timeout(result, timeout), cancellation).ConfigureAwait(false);
                names = [.. fleet.RunningNames()];
            }

            foreach (string name in names)
            {
                await StopAsync(fleet, name, result.GetValue(force), Timeout(result, timeout), cancellation).ConfigureAwait(false);
            }

            return ExitStatus.Ok;
        });
        return command;
    }

    internal static Option<string> TimeoutOption() => new("--timeout", "-t")
    {
        Description = "How long to wait, such as 30s; default: the definition's stop-timeout.",
        HelpName = "time",
    };

    internal static TimeSpan? Timeout(ParseResult result, Option<string> option)
    {
        if (result.GetValue(option) is not { } text)
        {
            return null;
        }

        return Quantity.TryParseDuration(text, out TimeSpan timeout)
            ? timeout
            : throw new CommandException(ExitStatus.Usage, $"--timeout takes a time such as 30s or 2m, not \"{text}\"");
    }

    internal static async Task StopAsync(FleetAccess fleet, string name, bool force, TimeSpan? timeout, CancellationToken cancellation)
    {
        if (await fleet.HasDaemonAsync(cancellation).ConfigureAwait(false))
        {
            FleetAnswer answer = await fleet.Client.CallAsync(
                true, $"/v1/vms/{Uri.EscapeDataString(name)}/stop{Query(force, timeout)}", cancellation).ConfigureAwait(false);
            if (answer.IsOk)
            {
                return;
            }

            if (answer.Status != 404)
            {
                throw new CommandException(answer.Status == 409 ? ExitStatus.WrongState : ExitStatus.Failed, answer.Error);
            }
        }

        // Not the daemon's: a VM of `vmctl run`.
        using ControlClient client = await fleet.ConnectAsync(name, cancellation).ConfigureAwait(false);
        await client.ExecuteAsync(force ? "quit" : "system_powerdown", null, cancellation).ConfigureAwait(false);
        TimeSpan patience = timeout ?? TimeSpan.FromSeconds(90);
        if (!await WaitCommand.WaitGoneAsync(fleet.Paths.Of(name), patience, cancellation).ConfigureAwait(false))
        {
            throw new CommandException(
                ExitStatus.WrongState, $"\"{name}\" did not stop within {Quantity.FormatDuration(patience)}; vmctl stop -f ends it");
        }
    }

    // The daemon knows in which order; what is not the daemon's is left for after it.
    private static async Task StopAllAsync(FleetAccess fleet, bool force, TimeSpan? timeout, CancellationToken cancellation)
    {
        if (await fleet.HasDaemonAsync(cancellation).ConfigureAwait(false))
        {
            await fleet.CallAsync(true, "/v1/stop" + Query(force, timeout), cancellation).ConfigureAwait(false);
        }
    }

    private static string Query(bool force, TimeSpan? timeout) => (force, timeout) switch
    {
        (true, { } limit) => "?force=true&timeout=" + Uri.EscapeDataString(Quantity.FormatDuration(limit)),
        (true, _) => "?force=true",
        (_, { } limit) => "?timeout=" + Uri.EscapeDataString(Quantity.FormatDuration(limit)),
        _ => string.Empty,
    };
}

/// <summary><c>vmctl restart</c>.</summary>
internal static class RestartCommand
{
    internal static Command Create(CommandContext context)
    {
        _ = context;
        var command = new Command("restart", "Stop VMs and start them again, with the definitions as they are now.");
        var arguments = new VmArguments(command, several: true);
        var force = new Option<bool>("--force", "-f") { Description = "End the VM at once, without asking the guest." };
        var timeout = StopCommand.TimeoutOption();
        command.Add(force);
        command.Add(timeout);
        command.SetAction(async (result, cancellation) =>
        {
            using FleetAccess fleet = arguments.Open(result);
            await fleet.NeedDaemonAsync(cancellation).ConfigureAwait(false);
            foreach (string name in arguments.All(result))
            {
                await StopCommand.StopAsync(
                    fleet, name, result.GetValue(force), StopCommand.Timeout(result, timeout), cancellation).ConfigureAwait(false);
                await fleet.CallAsync(true, $"/v1/vms/{Uri.EscapeDataString(name)}/start", cancellation).ConfigureAwait(false);
                await StartCommand.WaitUpAsync(fleet, name, cancellation).ConfigureAwait(false);
            }

            return ExitStatus.Ok;
        });
        return command;
    }
}

/// <summary><c>vmctl wait</c>: until a VM has ended; the status is the VM's.</summary>
internal static class WaitCommand
{
    internal static Command Create(CommandContext context)
    {
        _ = context;
        var command = new Command("wait", "Wait until a VM has ended; ends with the VM's own status (as run does).");
        var arguments = new VmArguments(command);
        var timeout = new Option<string>("--timeout", "-t") { Description = "Give up after this time, with status 75.", HelpName = "time" };
        command.Add(timeout);
        command.SetAction(async (result, cancellation) =>
        {
            using FleetAccess fleet = arguments.Open(result);
            string name = arguments.One(result);
            TimeSpan patience = StopCommand.Timeout(result, timeout) ?? TimeSpan.FromDays(10_000);
            VmPaths vm = fleet.Paths.Of(name);
            if (!MachineNames.IsName(name) || !VmProcess.IsAlive(vm))
            {
                throw await fleet.NotRunningAsync(name, cancellation).ConfigureAwait(false);
            }

            if (!await WaitGoneAsync(vm, patience, cancellation).ConfigureAwait(false))
            {
                throw new CommandException(ExitStatus.WrongState, $"\"{name}\" still runs after {Quantity.FormatDuration(patience)}");
            }

            return (VmExit.Read(vm.Exit) ?? VmExit.Vanished).Status;
        });
        return command;
    }

    /// <summary>Waits until a VM's process is gone: its socket tells at once, its lock tells for sure.</summary>
    internal static async Task<bool> WaitGoneAsync(VmPaths vm, TimeSpan patience, CancellationToken cancellation)
    {
        long start = Stopwatch.GetTimestamp();
        using ControlClient? client = await ControlClient.TryConnectAsync(vm.Control, cancellation).ConfigureAwait(false);
        while (VmProcess.IsAlive(vm))
        {
            TimeSpan left = patience - Stopwatch.GetElapsedTime(start);
            if (left <= TimeSpan.Zero)
            {
                return false;
            }

            TimeSpan nap = left < TimeSpan.FromSeconds(1) ? left : TimeSpan.FromSeconds(1);
            if (client is { Events.Completion.IsCompleted: false })
            {
                await Task.WhenAny(client.Events.Completion, Task.Delay(nap, cancellation)).ConfigureAwait(false);
                client.Events.TryRead(out _);
            }
            else
            {
                await Task.Delay(20, cancellation).ConfigureAwait(false);
            }

            cancellation.ThrowIfCancellationRequested();
        }

        return true;
    }
}

/// <summary>Commands that are one word to the VM's control socket.</summary>
internal static class ControlCommands
{
    internal static Command Pause(CommandContext context) =>
        Simple(context, "pause", "stop", "Stop a VM's processors and clock; unpause goes on.");

    internal static Command Unpause(CommandContext context) =>
        Simple(context, "unpause", "cont", "Let a paused VM go on.");

    internal static Command Reset(CommandContext context) =>
        Simple(context, "reset", "system_reset", "Press the reset button: the guest is not asked.");

    internal static Command Nmi(CommandContext context) =>
        Simple(context, "nmi", "inject-nmi", "Press the NMI button: a guest that is set up for it writes a dump, or says where it hangs.");

    internal static Command Screenshot(CommandContext context)
    {
        var command = new Command("screenshot", "Write the screen to a PNG file, or as text to standard output.");
        var arguments = new VmArguments(command);
        var file = new Argument<string>("file") { Description = "PNG file.", Arity = ArgumentArity.ZeroOrOne };
        var text = new Option<bool>("--text") { Description = "The text of a screen in text mode." };
        command.Add(file);
        command.Add(text);
        command.SetAction(async (result, cancellation) =>
        {
            using FleetAccess fleet = arguments.Open(result);
            using ControlClient client = await fleet.ConnectAsync(arguments.One(result), cancellation).ConfigureAwait(false);
            if (result.GetValue(text))
            {
                JsonElement answer = await ExecuteAsync(client, "vmm-screen-text", null, cancellation).ConfigureAwait(false);
                await context.Output.WriteAsync(answer.GetProperty("text").GetString()).ConfigureAwait(false);
                return ExitStatus.Ok;
            }

            string path = result.GetValue(file) ?? throw new CommandException(ExitStatus.Usage, "screenshot: name a PNG file, or give --text");
            JsonElement picture = await ExecuteAsync(client, "vmm-screen", null, cancellation).ConfigureAwait(false);
            await File.WriteAllBytesAsync(path, picture.GetProperty("png").GetBytesFromBase64(), cancellation).ConfigureAwait(false);
            return ExitStatus.Ok;
        });
        return command;
    }

    internal static Command Media(CommandContext context)
    {
        var command = new Command("media", "Put a disc image into a VM's CD-ROM drive, or take the disc out.");
        var arguments = new VmArguments(command);
        var drive = new Argument<string>("drive") { Description = "cdrom0, cdrom1: in the order of the definition." };
        var file = new Argument<string>("file") { Description = "Image; left out: eject.", Arity = ArgumentArity.ZeroOrOne };
        var force = new Option<bool>("--force") { Description = "Also when the guest has locked the tray." };
        command.Add(drive);
        command.Add(file);
        command.Add(force);
        command.SetAction(async (result, cancellation) =>
        {
            using FleetAccess fleet = arguments.Open(result);
            using ControlClient client = await fleet.ConnectAsync(arguments.One(result), cancellation).ConfigureAwait(false);
            string? image = result.GetValue(file);
            void Write(Utf8JsonWriter json)
            {
                json.WriteString("device", result.GetValue(drive));
                json.WriteBoolean("force", result.GetValue(force));
                if (image is not null)
                {
                    json.WriteString("filename", Path.GetFullPath(image));
                }
            }

            try
            {
                string word = image is null ? "eject" : "blockdev-change-medium";
                await client.ExecuteAsync(word, Write, cancellation).ConfigureAwait(false);
            }
            catch (ControlException refused)
            {
                throw new CommandException(ExitStatus.Failed, refused.Message);
            }

            return ExitStatus.Ok;
        });
        return command;
    }

    internal static Command Balloon(CommandContext context)
    {
        var command = new Command("balloon", "Say how much memory a VM's guest keeps, or ask it to keep no more than SIZE.");
        var arguments = new VmArguments(command);
        var size = new Argument<string>("size") { Description = "Size, such as 512M.", Arity = ArgumentArity.ZeroOrOne };
        command.Add(size);
        command.SetAction(async (result, cancellation) =>
        {
            using FleetAccess fleet = arguments.Open(result);
            long bytes = 0;
            string? wanted = result.GetValue(size);
            if (wanted is not null && !Quantity.TryParseSize(wanted, out bytes))
            {
                throw new CommandException(ExitStatus.Usage, $"balloon: {wanted} is no size; write 512M or 2G");
            }

            using ControlClient client = await fleet.ConnectAsync(arguments.One(result), cancellation).ConfigureAwait(false);
            try
            {
                if (wanted is not null)
                {
                    await client.ExecuteAsync("balloon", json => json.WriteNumber("value", bytes), cancellation).ConfigureAwait(false);
                    return ExitStatus.Ok;
                }

                JsonElement answer = await client.ExecuteAsync("query-balloon", null, cancellation).ConfigureAwait(false);
                string text = Quantity.FormatSize(answer.GetProperty("actual").GetInt64());
                await context.Output.WriteLineAsync(text).ConfigureAwait(false);
                return ExitStatus.Ok;
            }
            catch (ControlException refused)
            {
                throw new CommandException(ExitStatus.Failed, refused.Message);
            }
        });
        return command;
    }

    private static Command Simple(CommandContext context, string verb, string word, string description)
    {
        _ = context;
        var command = new Command(verb, description);
        var arguments = new VmArguments(command, several: true);
        command.SetAction(async (result, cancellation) =>
        {
            using FleetAccess fleet = arguments.Open(result);
            foreach (string name in arguments.All(result))
            {
                using ControlClient client = await fleet.ConnectAsync(name, cancellation).ConfigureAwait(false);
                await ExecuteAsync(client, word, null, cancellation).ConfigureAwait(false);
            }

            return ExitStatus.Ok;
        });
        return command;
    }

    private static async Task<JsonElement> ExecuteAsync(ControlClient client, string word, string? file, CancellationToken cancellation)
    {
        try
        {
            Action<Utf8JsonWriter>? arguments = file is null ? null : json => json.WriteString("filename", Path.GetFullPath(file));
            return await client.ExecuteAsync(word, arguments, cancellation).ConfigureAwait(false);
        }
        catch (ControlException refused)
        {
            throw new CommandException(ExitStatus.Failed, refused.Message);
        }
    }
}

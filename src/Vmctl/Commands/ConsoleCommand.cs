// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.CommandLine;
using System.IO;
using System.Net.Sockets;
using System.Text;
using System.Text.Json;
using System.Threading;
using System.Threading.Tasks;
using Vmm.Backends.Char;
using Vmm.Config;
using Vmm.Fleet;
using Vmm.Host;

namespace Vmctl.Commands;

/// <summary><c>vmctl console</c>: this terminal as the VM's serial console.</summary>
internal static class ConsoleCommand
{
    internal static Command Create(CommandContext context)
    {
        var command = new Command("console", "Attach to a VM's console (\"~.\" at the start of a line leaves it, \"~?\" lists the escapes).");
        var arguments = new VmArguments(command);
        var watch = new Option<bool>("--watch", "-w") { Description = "Only watch." };
        var force = new Option<bool>("--force", "-f") { Description = "Take the right to type from whoever has it." };
        command.Add(watch);
        command.Add(force);
        command.SetAction(async (result, cancellation) =>
        {
            using FleetAccess fleet = arguments.Open(result);
            return await AttachAsync(
                context, fleet, arguments.One(result), !result.GetValue(watch), result.GetValue(force), cancellation).ConfigureAwait(false);
        });
        return command;
    }

    internal static async Task<int> AttachAsync(
        CommandContext context, FleetAccess fleet, string name, bool write, bool force, CancellationToken cancellation)
    {
        Socket? socket = MachineNames.IsName(name)
            ? await UnixSockets.TryConnectAsync(fleet.Paths.Of(name).Console, cancellation).ConfigureAwait(false)
            : null;
        if (socket is null)
        {
            throw await fleet.NotRunningAsync(name, cancellation).ConfigureAwait(false);
        }

        using (socket)
        {
            string hello = $"{{\"write\": {(write ? "true" : "false")}, \"force\": {(force ? "true" : "false")}}}\n";
            await socket.SendAsync(Encoding.ASCII.GetBytes(hello), cancellation).ConfigureAwait(false);
            bool isWriter = await ReadAnswerAsync(socket, cancellation).ConfigureAwait(false);
            if (write && !isWriter)
            {
                context.Complain($"somebody else types on \"{name}\"; watching (-f takes it over)");
            }

            bool isTerminal = RawTerminal.IsTerminal(0);
            if (isTerminal)
            {
                context.Complain($"console of \"{name}\"; \"~.\" at the start of a line leaves it");
            }

            using RawTerminal? raw = isTerminal ? RawTerminal.Enter(0) : null;
            using var left = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
            Task typing = Task.Run(() => TypeAsync(context, socket, isTerminal, left), CancellationToken.None);
            Task showing = ShowAsync(context, socket, left.Token);
            await Task.WhenAny(showing, WhenCancelledAsync(left.Token)).ConfigureAwait(false);
            _ = typing;
        }

        return ExitStatus.Ok;
    }

    private static async Task WhenCancelledAsync(CancellationToken token)
    {
        var done = new TaskCompletionSource();
        await using CancellationTokenRegistration registration = token.Register(done.SetResult);
        await done.Task.ConfigureAwait(false);
    }

    // Byte by byte up to the line feed: what follows is the console's.
    private static async Task<bool> ReadAnswerAsync(Socket socket, CancellationToken cancellation)
    {
        var line = new StringBuilder();
        var one = new byte[1];
        while (await socket.ReceiveAsync(one, cancellation).ConfigureAwait(false) == 1 && one[0] != '\n' && line.Length < 1000)
        {
            line.Append((char)one[0]);
        }

        try
        {
            using JsonDocument answer = JsonDocument.Parse(line.ToString());
            return answer.RootElement.GetProperty("writer").GetBoolean();
        }
        catch (Exception wrong) when (wrong is JsonException or InvalidOperationException or System.Collections.Generic.KeyNotFoundException)
        {
            throw new CommandException(ExitStatus.Failed, "the VM turned the console away; are there too many watchers?");
        }
    }

    private static async Task ShowAsync(CommandContext context, Socket socket, CancellationToken cancellation)
    {
        await context.Output.FlushAsync(cancellation).ConfigureAwait(false);
        using Stream output = Console.OpenStandardOutput();
        var buffer = new byte[16_384];
        try
        {
            while (await socket.ReceiveAsync(buffer, cancellation).ConfigureAwait(false) is > 0 and int count)
            {
                await output.WriteAsync(buffer.AsMemory(0, count), cancellation).ConfigureAwait(false);
                await output.FlushAsync(cancellation).ConfigureAwait(false);
            }
        }
        catch (Exception end) when (end is SocketException or OperationCanceledException or ObjectDisposedException)
        {
            // The VM ended, or the user left.
        }
    }

    private static async Task TypeAsync(CommandContext context, Socket socket, bool isTerminal, CancellationTokenSource left)
    {
        using Stream input = Console.OpenStandardInput();
        var escape = new ConsoleEscape();
        var typed = new byte[256];
        var kept = new byte[ConsoleEscape.MaxOutput(typed.Length)];
        try
        {
            while (await input.ReadAsync(typed).ConfigureAwait(false) is > 0 and int count)
            {
                if (!isTerminal)
                {
                    await SendAsync(socket, typed.AsMemory(0, count)).ConfigureAwait(false);
                    continue;
                }

                for (int at = 0; at < count;)
                {
                    EscapeAction action = escape.Filter(typed.AsSpan(at, count - at), kept, out int written, out int consumed);
                    at += consumed;
                    await SendAsync(socket, kept.AsMemory(0, written)).ConfigureAwait(false);
                    if (action == EscapeAction.Leave)
                    {
                        await left.CancelAsync().ConfigureAwait(false);
                        return;
                    }

                    if (action == EscapeAction.Help)
                    {
                        context.Error.Write(Encoding.ASCII.GetString(ConsoleEscape.HelpText));
                    }
                }
            }

            if (isTerminal)
            {
                await left.CancelAsync().ConfigureAwait(false);
            }
            else
            {
                socket.Shutdown(SocketShutdown.Send);
            }
        }
        catch (Exception end) when (end is SocketException or IOException or ObjectDisposedException)
        {
            // The VM ended; the other direction notices too.
        }
    }

    private static async Task SendAsync(Socket socket, ReadOnlyMemory<byte> bytes)
    {
        while (!bytes.IsEmpty)
        {
            bytes = bytes[await socket.SendAsync(bytes).ConfigureAwait(false)..];
        }
    }
}

/// <summary><c>vmctl log</c>: the console's output that is always kept.</summary>
internal static class LogCommand
{
    internal static Command Create(CommandContext context)
    {
        var command = new Command("log", "Show what a VM wrote to its console lately (up to 1 MiB), also after it has ended.");
        var arguments = new VmArguments(command);
        var follow = new Option<bool>("--follow", "-F") { Description = "Go on with what it writes from now on." };
        var process = new Option<bool>("--process", "-p") { Description = "The messages of the VM's process instead." };
        var port = new Option<string>("--port", "-s")
        {
            Description = "The log of another port that ends in \"log\": com1 to com4, console0, or firmware.",
            HelpName = "port",
        };
        command.Add(follow);
        command.Add(process);
        command.Add(port);
        command.SetAction(async (result, cancellation) =>
        {
            using FleetAccess fleet = arguments.Open(result);
            string name = arguments.One(result);
            VmPaths vm = fleet.Paths.Of(name);
            string? chosen = result.GetValue(port);
            if (chosen is not null && (!MachineNames.IsName(chosen) || result.GetValue(follow) || result.GetValue(process)))
            {
                throw new CommandException(ExitStatus.Usage, "log: --port takes a name such as com2, and neither --follow nor --process with it");
            }

            string path = result.GetValue(process) ? vm.ProcessLog : chosen is null ? ConsoleLogOf(vm) : vm.PortLog(chosen);
            if (!MachineNames.IsName(name) || !File.Exists(path))
            {
                CommandException reason = await fleet.NotRunningAsync(name, cancellation).ConfigureAwait(false);
                string what = chosen is null ? "log" : $"log of {chosen}";
                throw reason.Status == ExitStatus.NoInput ? reason : new CommandException(ExitStatus.WrongState, $"\"{name}\" has no {what} yet");
            }

            if (result.GetValue(follow) && VmProcess.IsAlive(vm))
            {
                return await ConsoleCommand.AttachAsync(context, fleet, name, write: false, force: false, cancellation).ConfigureAwait(false);
            }

            byte[] text = result.GetValue(process)
                ? await File.ReadAllBytesAsync(path, cancellation).ConfigureAwait(false)
                : CharLog.Read(path);
            await context.Output.FlushAsync(cancellation).ConfigureAwait(false);
            using Stream output = Console.OpenStandardOutput();
            await output.WriteAsync(text, cancellation).ConfigureAwait(false);
            return ExitStatus.Ok;
        });
        return command;
    }

    // A VM whose first port ends in "log" has nothing on the console that people attach to.
    private static string ConsoleLogOf(VmPaths vm)
    {
        bool isEmpty = File.Exists(vm.ConsoleLog) && CharLog.Read(vm.ConsoleLog, 1).Length == 0;
        foreach (string port in isEmpty ? ["com1", "com2", "com3", "com4", "console0"] : Array.Empty<string>())
        {
            if (File.Exists(vm.PortLog(port)))
            {
                return vm.PortLog(port);
            }
        }

        return vm.ConsoleLog;
    }
}

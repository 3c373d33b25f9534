// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.CommandLine;
using System.Diagnostics;
using System.IO;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Microsoft.Win32.SafeHandles;
using Vmm.Config;
using Vmm.Fleet;
using Vmm.Fleet.Control;

namespace Vmctl.Commands;

// Theory. `vmctl send a | ssh host vmctl receive` moves a VM: the stream is a mark, the definition that runs (so that the
// other side builds the same machine), and the machine's own versioned snapshot. Disks are not in it: they lie on storage
// that both sides see, and the lease keeps the two from running at the same time. The sender ends its VM only after the
// whole stream was written, and closes the stream when that VM is gone; the receiver begins at the end of the stream, when
// locks, leases and directories are free. One that finds the stream cut short starts nothing. A signal in the middle
// leaves the VM running where it was. The sender does not learn whether the receiver got going, and no answer could tell
// it in time: the receiver opens the disks when the sender has let go of them, which is when its VM has ended. Who must be
// sure sends to a file, or keeps a copy (`tee`).

/// <summary><c>vmctl send</c>, <c>vmctl receive</c> and <c>vmctl snapshot</c>.</summary>
internal static class TransferCommands
{
    private const int MaxDefinitionBytes = 1 << 20;

    private static readonly TimeSpan s_endPatience = TimeSpan.FromSeconds(30);

    private static ReadOnlySpan<byte> Mark => "vmctl-stream-1\n"u8;

    private static ReadOnlySpan<byte> Finish => "\nvmctl-stream-end\n"u8;

    internal static Command Send(CommandContext context)
    {
        var command = new Command("send", "Write a VM's definition and state to standard output, and end the VM here.");
        var arguments = new VmArguments(command);
        command.SetAction(async (result, cancellation) =>
        {
            if (context.IsOutputTerminal)
            {
                throw new CommandException(ExitStatus.Usage, "send: standard output is a terminal; send to a pipe or a file");
            }

            using FleetAccess fleet = arguments.Open(result);
            VmPaths vm = fleet.Paths.Of(arguments.One(result));
            await WithStateAsync(fleet, arguments.One(result), ends: true, (state, ending) => SendAsync(vm, state, ending), cancellation)
                .ConfigureAwait(false);
            return ExitStatus.Ok;
        });
        return command;
    }

    internal static Command Receive(CommandContext context)
    {
        var command = new Command("receive", "Read a VM from standard input, as send wrote it, and run it in the foreground.");
        var paths = new PathOptions();
        paths.AddTo(command, withDefinitions: false);
        command.SetAction(async (result, cancellation) =>
        {
            FleetPaths where = paths.Resolve(result);
            FleetPaths.MakePrivate(where.State);
            string state = Path.Combine(where.State, $"receive-{Environment.ProcessId}.state");
            try
            {
                using Stream input = Console.OpenStandardInput();
                MachineSpec spec = await ReadAsync(input, state).ConfigureAwait(false);
                return RunCommand.Run(context, spec, where, withControl: true, reportDriver: true, state);
            }
            catch (EndOfStreamException)
            {
                throw new CommandException(ExitStatus.Failed, "receive: the stream ends too early; the VM stays where it was");
            }
            finally
            {
                File.Delete(state);
            }
        });
        return command;
    }

    internal static Command Snapshot(CommandContext context)
    {
        _ = context;
        var command = new Command("snapshot", "Save a VM's state to a file and go on; \"vmctl run --restore\" continues from it.");
        var arguments = new VmArguments(command);
        var file = new Argument<string>("file") { Description = "File for the state.", Arity = ArgumentArity.ExactlyOne };
        var stop = new Option<bool>("--stop") { Description = "End the VM when its state is saved." };
        command.Add(file);
        command.Add(stop);
        command.SetAction(async (result, cancellation) =>
        {
            using FleetAccess fleet = arguments.Open(result);
            string wanted = result.GetRequiredValue(file);
            await WithStateAsync(
                fleet,
                arguments.One(result),
                result.GetValue(stop),
                (state, ending) => MoveAsync(state, wanted, ending),
                cancellation).ConfigureAwait(false);
            return ExitStatus.Ok;
        });
        return command;
    }

    /// <summary>
    /// Holds a VM still, has its state saved, hands the file of the state on, and then ends the VM or lets it go on. When
    /// anything fails, or a signal comes, the VM goes on as before. The VM's process reaches its own directories only, so
    /// the file lies there; it is gone afterwards.
    /// </summary>
    private static async Task WithStateAsync(
        FleetAccess fleet, string name, bool ends, Func<string, CancellationToken, Task> use, CancellationToken cancellation)
    {
        using var interruption = new Interruption(outer: cancellation);
        CancellationToken ending = interruption.Token;
        using ControlClient client = await fleet.ConnectAsync(name, ending).ConfigureAwait(false);
        VmReport before = await client.ReportAsync(ending).ConfigureAwait(false);
        string state = Path.Combine(fleet.Paths.Of(name).State, $"transfer-{Environment.ProcessId}.state");
        bool isDone = false;
        try
        {
            // The answer of this one is waited for in any case: what comes after must find the VM at rest.
            await client.ExecuteAsync("vmm-save", json => json.WriteString("filename", state), CancellationToken.None).ConfigureAwait(false);
            ending.ThrowIfCancellationRequested();
            await use(state, ending).ConfigureAwait(false);
            isDone = true;
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException or ControlException)
        {
            throw new CommandException(ExitStatus.Failed, $"\"{name}\" stays here: {failure.Message.ReplaceLineEndings(" ")}");
        }
        finally
        {
            File.Delete(state);
            string? last = isDone && ends ? "quit" : before.Condition == VmCondition.Running ? "cont" : null;
            if (last is not null)
            {
                await client.ExecuteAsync(last, null, CancellationToken.None).ConfigureAwait(false);
            }

            if (last is "quit")
            {
                await WaitGoneAsync(fleet.Paths.Of(name)).ConfigureAwait(false);
            }
        }
    }

    // Bounded: one that does not go is told by its lease and locks to whoever comes next.
    private static async Task WaitGoneAsync(VmPaths vm)
    {
        long start = Stopwatch.GetTimestamp();
        while (VmProcess.IsAlive(vm) && Stopwatch.GetElapsedTime(start) < s_endPatience)
        {
            await Task.Delay(20, CancellationToken.None).ConfigureAwait(false);
        }
    }

    private static async Task SendAsync(VmPaths vm, string state, CancellationToken ending)
    {
        byte[] definition = await File.ReadAllBytesAsync(vm.Definition, ending).ConfigureAwait(false);
        var head = new byte[Mark.Length + 12];
        Mark.CopyTo(head);
        BinaryPrimitives.WriteInt32LittleEndian(head.AsSpan(Mark.Length), definition.Length);
        BinaryPrimitives.WriteInt64LittleEndian(head.AsSpan(Mark.Length + 4), new FileInfo(state).Length);

        // A write to a full pipe waits for its reader and cannot be called off, so it is left behind when a signal comes.
        await Task.Run(
            () =>
            {
                // The console's own stream swallows EPIPE; here that would lose a VM.
                using var handle = new SafeFileHandle(1, ownsHandle: false);
                using var output = new FileStream(handle, FileAccess.Write, bufferSize: 0);
                output.Write(head);
                output.Write(definition);
                using (FileStream file = File.OpenRead(state))
                {
                    file.CopyTo(output);
                }

                output.Write(Finish);
                output.Flush();
            },
            ending).WaitAsync(ending).ConfigureAwait(false);
    }

    // Whole or not at all, also on another file system.
    private static async Task MoveAsync(string state, string wanted, CancellationToken ending)
    {
        string next = wanted + ".new";
        try
        {
            using (FileStream from = File.OpenRead(state))
            using (FileStream to = File.Create(next))
            {
                await from.CopyToAsync(to, ending).ConfigureAwait(false);
                to.Flush(flushToDisk: true);
            }

            File.Move(next, wanted, overwrite: true);
        }
        catch
        {
            File.Delete(next);
            throw;
        }
    }

    private static async Task<MachineSpec> ReadAsync(Stream input, string state)
    {
        byte[] mark = await ReadExactlyAsync(input, Mark.Length).ConfigureAwait(false);
        if (!mark.AsSpan().SequenceEqual(Mark))
        {
            throw new CommandException(ExitStatus.Config, "receive: standard input is not a stream of vmctl send");
        }

        byte[] head = await ReadExactlyAsync(input, 12).ConfigureAwait(false);
        int length = BinaryPrimitives.ReadInt32LittleEndian(head);
        long stateLength = BinaryPrimitives.ReadInt64LittleEndian(head.AsSpan(4));
        if (length is < 0 or > MaxDefinitionBytes || stateLength < 0)
        {
            throw new CommandException(ExitStatus.Config, "receive: the stream is damaged");
        }

        string text = Encoding.UTF8.GetString(await ReadExactlyAsync(input, length).ConfigureAwait(false));
        FleetSpec fleet = ConfigFiles.Parse(text, "received", "/");
        var buffer = new byte[1 << 20];
        using (FileStream file = File.Create(state))
        {
            for (long left = stateLength; left > 0;)
            {
                int count = await input.ReadAsync(buffer.AsMemory(0, (int)Math.Min(left, buffer.Length))).ConfigureAwait(false);
                if (count == 0)
                {
                    throw new EndOfStreamException();
                }

                await file.WriteAsync(buffer.AsMemory(0, count)).ConfigureAwait(false);
                left -= count;
            }
        }

        byte[] end = await ReadExactlyAsync(input, Finish.Length).ConfigureAwait(false);
        bool isLast = await input.ReadAsync(buffer.AsMemory(0, 1)).ConfigureAwait(false) == 0;
        return isLast && end.AsSpan().SequenceEqual(Finish)
            ? fleet.Machines[0]
            : throw new CommandException(ExitStatus.Config, "receive: the stream is damaged");
    }

    private static async Task<byte[]> ReadExactlyAsync(Stream input, int length)
    {
        var bytes = new byte[length];
        await input.ReadExactlyAsync(bytes).ConfigureAwait(false);
        return bytes;
    }
}

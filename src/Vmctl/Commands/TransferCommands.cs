// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.CommandLine;
using System.IO;
using System.Text;
using System.Threading.Tasks;
using Vmm.Config;
using Vmm.Fleet;
using Vmm.Fleet.Control;

namespace Vmctl.Commands;

// Theory. `vmctl send a | ssh host vmctl receive` moves a VM: the stream is a mark, the definition that runs (so that the
// other side builds the same machine), and the machine's own versioned snapshot. Disks are not in it: they lie on storage
// that both sides see, and the lease keeps the two from running at the same time. The sender ends its VM only after the
// whole stream was written; a receiver that finds the stream cut short starts nothing.

/// <summary><c>vmctl send</c> and <c>vmctl receive</c>.</summary>
internal static class TransferCommands
{
    private const int MaxDefinitionBytes = 1 << 20;

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
            string name = arguments.One(result);
            VmPaths vm = fleet.Paths.Of(name);
            using ControlClient client = await fleet.ConnectAsync(name, cancellation).ConfigureAwait(false);
            string state = Path.Combine(vm.State, "send.state");
            try
            {
                await client.ExecuteAsync("vmm-save", json => json.WriteString("filename", state), cancellation).ConfigureAwait(false);
                byte[] definition = await File.ReadAllBytesAsync(vm.Definition, cancellation).ConfigureAwait(false);
                using Stream output = Console.OpenStandardOutput();
                await output.WriteAsync(Mark.ToArray(), cancellation).ConfigureAwait(false);
                var length = new byte[12];
                BinaryPrimitives.WriteInt32LittleEndian(length, definition.Length);
                BinaryPrimitives.WriteInt64LittleEndian(length.AsSpan(4), new FileInfo(state).Length);
                await output.WriteAsync(length, cancellation).ConfigureAwait(false);
                await output.WriteAsync(definition, cancellation).ConfigureAwait(false);
                using (FileStream file = File.OpenRead(state))
                {
                    await file.CopyToAsync(output, cancellation).ConfigureAwait(false);
                }

                await output.WriteAsync(Finish.ToArray(), cancellation).ConfigureAwait(false);
                await output.FlushAsync(cancellation).ConfigureAwait(false);
            }
            catch (Exception failure) when (failure is IOException or ControlException)
            {
                // It stays here: go on.
                await client.ExecuteAsync("cont", null, cancellation).ConfigureAwait(false);
                throw new CommandException(ExitStatus.Failed, $"\"{name}\" stays here: {failure.Message.ReplaceLineEndings(" ")}");
            }
            finally
            {
                File.Delete(state);
            }

            await client.ExecuteAsync("quit", null, cancellation).ConfigureAwait(false);
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
        return end.AsSpan().SequenceEqual(Finish)
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

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.CommandLine;
using System.Diagnostics;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using Vmm.Config;
using Vmm.Fleet;

namespace Vmctl.Commands;

// Theory. The user's editor works on a copy that lies beside the file, under a name that the daemon does not read, so that
// relative paths mean the same. Only a copy without errors takes the file's place, in one step; a copy with errors stays
// for the user to go on with. The fleet as a whole is checked again by the daemon, which keeps what it has if it is wrong.

/// <summary><c>vmctl edit</c>: the file of a VM's definition in the user's editor, checked before it counts.</summary>
internal static class EditCommand
{
    internal static Command Create(CommandContext context)
    {
        var name = new Argument<string>("name") { Description = "Name of a VM." };
        var command = new Command("edit", "Open the definition of a VM in $VISUAL or $EDITOR, check it, and have the daemon follow it.") { name };
        var paths = new PathOptions();
        paths.AddTo(command, withDefinitions: true);
        command.SetAction(async (result, cancellation) =>
        {
            FleetPaths where = paths.Resolve(result);
            string file = FileOf(where, result.GetRequiredValue(name));
            string copy = Path.Combine(Path.GetDirectoryName(file)!, "." + Path.GetFileName(file) + ".edit");
            bool isKept = File.Exists(copy);
            if (!isKept)
            {
                File.Copy(file, copy);
            }

            await RunEditorAsync(copy, cancellation).ConfigureAwait(false);
            if (await SameAsync(file, copy, cancellation).ConfigureAwait(false))
            {
                File.Delete(copy);
                context.Output.WriteLine("nothing changed");
                return ExitStatus.Ok;
            }

            Check(context, file, copy);
            File.Move(copy, file, overwrite: true);
            using var fleet = new FleetAccess(where);
            if (await fleet.HasDaemonAsync(cancellation).ConfigureAwait(false))
            {
                await fleet.CallAsync(true, "/v1/reload", cancellation).ConfigureAwait(false);
            }

            context.Output.WriteLine($"{file}: changed; a VM that runs uses it after vmctl restart");
            return ExitStatus.Ok;
        });
        return command;
    }

    private static string FileOf(FleetPaths paths, string name)
    {
        System.Collections.Generic.List<string> names = [];
        foreach (MachineSpec spec in Directory.Exists(paths.Definitions) ? ConfigFiles.LoadDirectory(paths.Definitions).Machines : [])
        {
            if (string.Equals(spec.Name, name, StringComparison.Ordinal))
            {
                return Path.GetFullPath(spec.Source.Start.File);
            }

            names.Add(spec.Name);
        }

        throw new CommandException(
            ExitStatus.NoInput, $"no VM called \"{name}\" is defined in {paths.Definitions}{Suggestion.Ending(name, names)}");
    }

    // $VISUAL and $EDITOR may hold options, as with crontab -e: the shell takes them apart.
    private static async Task RunEditorAsync(string file, CancellationToken cancellation)
    {
        string? chosen = Environment.GetEnvironmentVariable("VISUAL");
        chosen = string.IsNullOrEmpty(chosen) ? Environment.GetEnvironmentVariable("EDITOR") : chosen;
        string editor = string.IsNullOrEmpty(chosen) ? "vi" : chosen;
        var start = new ProcessStartInfo("/bin/sh", ["-c", editor + " \"$1\"", "sh", file]) { UseShellExecute = false };
        using Process process = Process.Start(start) ?? throw new IOException("/bin/sh did not start");
        await process.WaitForExitAsync(cancellation).ConfigureAwait(false);
        if (process.ExitCode != 0)
        {
            throw new CommandException(ExitStatus.Failed, $"edit: \"{editor}\" ended with status {process.ExitCode}; nothing was changed");
        }
    }

    private static async Task<bool> SameAsync(string file, string copy, CancellationToken cancellation)
    {
        byte[] before = await File.ReadAllBytesAsync(file, cancellation).ConfigureAwait(false);
        return (await File.ReadAllBytesAsync(copy, cancellation).ConfigureAwait(false)).AsSpan().SequenceEqual(before);
    }

    private static void Check(CommandContext context, string file, string copy)
    {
        try
        {
            ConfigFiles.LoadFile(copy);
        }
        catch (ConfigException wrong)
        {
            foreach (Diagnostic error in wrong.Diagnostics)
            {
                context.Error.WriteLine(error.ToString());
            }

            throw new CommandException(
                ExitStatus.Config, $"{file} stays as it was; \"vmctl edit\" goes on with what you wrote, which is in {copy}");
        }
    }
}

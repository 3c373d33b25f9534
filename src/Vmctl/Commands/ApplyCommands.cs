// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.CommandLine;
using System.IO;
using System.Linq;
using System.Threading;
using System.Threading.Tasks;
using Vmm.Config;
using Vmm.Fleet;

namespace Vmctl.Commands;

/// <summary><c>vmctl apply</c>, <c>diff</c> and <c>reload</c>: from files to the directory that the daemon keeps.</summary>
internal static class ApplyCommands
{
    internal static Command Apply(CommandContext context)
    {
        (Command command, Option<string[]> files, Option<bool> prune, PathOptions paths) = Make(
            "apply", "Bring definitions into the fleet's directory and have the daemon follow them.");
        var dryRun = new Option<bool>("--dry-run", "-n") { Description = "Only say what would change, as diff does." };
        command.Add(dryRun);
        command.SetAction(async (result, cancellation) =>
        {
            FleetPaths where = paths.Resolve(result);
            List<Change> changes = Compare(where, result.GetRequiredValue(files), result.GetValue(prune));
            if (result.GetValue(dryRun))
            {
                return Print(context, changes) ? ExitStatus.Failed : ExitStatus.Ok;
            }

            await WriteAsync(context, where, changes, cancellation).ConfigureAwait(false);
            return ExitStatus.Ok;
        });
        return command;
    }

    internal static Command Diff(CommandContext context)
    {
        (Command command, Option<string[]> files, Option<bool> prune, PathOptions paths) = Make(
            "diff", "Say what apply would change; status 1 when there is something.");
        command.SetAction(result =>
            Print(context, Compare(paths.Resolve(result), result.GetRequiredValue(files), result.GetValue(prune)))
                ? ExitStatus.Failed
                : ExitStatus.Ok);
        return command;
    }

    internal static Command Reload(CommandContext context)
    {
        var command = new Command("reload", "Have the daemon read the definitions now.");
        var paths = new PathOptions();
        paths.AddTo(command, withDefinitions: false);
        command.SetAction(async (result, cancellation) =>
        {
            using var fleet = new FleetAccess(paths.Resolve(result));
            await fleet.NeedDaemonAsync(cancellation).ConfigureAwait(false);
            int count = (await fleet.CallAsync(true, "/v1/reload", cancellation).ConfigureAwait(false)).GetProperty("vms").GetInt32();
            context.Output.WriteLine(count == 1 ? "1 VM" : $"{count} VMs");
            return ExitStatus.Ok;
        });
        return command;
    }

    private static (Command Command, Option<string[]> Files, Option<bool> Prune, PathOptions Paths) Make(string verb, string description)
    {
        var files = new Option<string[]>("--file", "-f")
        {
            Description = "File or directory of definitions; may be given several times.",
            HelpName = "path",
            Required = true,
            AllowMultipleArgumentsPerToken = true,
        };
        var prune = new Option<bool>("--prune") { Description = "Take away definitions that are not in the files." };
        var command = new Command(verb, description) { files, prune };
        var paths = new PathOptions();
        paths.AddTo(command, withDefinitions: true);
        return (command, files, prune, paths);
    }

    private static List<Change> Compare(FleetPaths paths, string[] files, bool prune)
    {
        var wanted = new List<MachineSpec>();
        foreach (string file in files)
        {
            wanted.AddRange((Directory.Exists(file) ? ConfigFiles.LoadDirectory(file) : ConfigFiles.LoadFile(file)).Machines);
        }

        IReadOnlyList<MachineSpec> present = Directory.Exists(paths.Definitions)
            ? ConfigFiles.LoadDirectory(paths.Definitions).Machines
            : [];

        // The result as a whole must be right, not only the new part.
        var kept = present.Where(old => !prune && !wanted.Exists(spec => string.Equals(spec.Name, old.Name, StringComparison.Ordinal)));
        FleetOrder.Sort([.. kept, .. wanted]);

        var changes = new List<Change>();
        foreach (MachineSpec spec in wanted)
        {
            MachineSpec? old = present.FirstOrDefault(other => string.Equals(other.Name, spec.Name, StringComparison.Ordinal));
            if (old is null || !SpecWriter.AreSame(old, spec))
            {
                changes.Add(new Change(spec.Name, old, spec));
            }
        }

        if (prune)
        {
            changes.AddRange(present
                .Where(old => !wanted.Exists(spec => string.Equals(spec.Name, old.Name, StringComparison.Ordinal)))
                .Select(old => new Change(old.Name, old, null)));
        }

        return changes;
    }

    private static bool Print(CommandContext context, List<Change> changes)
    {
        foreach (Change change in changes)
        {
            string[] before = change.Old is null ? [] : SpecWriter.Write(change.Old).Split('\n', StringSplitOptions.RemoveEmptyEntries);
            string[] after = change.New is null ? [] : SpecWriter.Write(change.New).Split('\n', StringSplitOptions.RemoveEmptyEntries);
            string what = change.Old is null ? "new" : change.New is null ? "goes away" : "changes";
            context.Output.WriteLine($"{change.Name}: {what}");
            foreach ((char mark, string line) in LineDiff.Compare(before, after))
            {
                string colour = context.UseColour ? mark switch { '+' => "\u001b[32m", '-' => "\u001b[31m", _ => string.Empty } : string.Empty;
                context.Output.WriteLine(colour.Length == 0 ? $"  {mark} {line}" : $"{colour}  {mark} {line}\u001b[0m");
            }
        }

        return changes.Count > 0;
    }

    private static async Task WriteAsync(CommandContext context, FleetPaths paths, List<Change> changes, CancellationToken cancellation)
    {
        Directory.CreateDirectory(paths.Definitions);
        foreach (Change change in changes)
        {
            // A definition of ours is a file of its own; one that people wrote by hand is theirs to edit.
            string file = Path.Combine(paths.Definitions, change.Name + ".yaml");
            if (change.Old is { Source.Start.File: { Length: > 0 } theirs } && !string.Equals(Path.GetFullPath(theirs), file, StringComparison.Ordinal))
            {
                throw new CommandException(
                    ExitStatus.Failed, $"\"{change.Name}\" is defined in {theirs} together with others; change it there, or take it out first");
            }

            if (change.New is null)
            {
                File.Delete(file);
                context.Output.WriteLine($"{change.Name}: taken away");
                continue;
            }

            VmProcess.WriteWhole(file, SpecWriter.Write(change.New));
            context.Output.WriteLine($"{change.Name}: {(change.Old is null ? "new" : "changed")}");
        }

        if (changes.Count == 0)
        {
            context.Output.WriteLine("nothing to change");
        }

        using var fleet = new FleetAccess(paths);
        if (await fleet.HasDaemonAsync(cancellation).ConfigureAwait(false))
        {
            await fleet.CallAsync(true, "/v1/reload", cancellation).ConfigureAwait(false);
        }
    }

    private sealed record Change(string Name, MachineSpec? Old, MachineSpec? New);
}

/// <summary>The difference of two short texts by their longest common subsequence of lines.</summary>
internal static class LineDiff
{
    /// <summary>Lines with ' ' kept, '-' only in the first, '+' only in the second.</summary>
    internal static IEnumerable<(char Mark, string Line)> Compare(string[] a, string[] b)
    {
        var common = new int[a.Length + 1][];
        for (int i = a.Length; i >= 0; i--)
        {
            common[i] = new int[b.Length + 1];
            for (int j = b.Length - 1; j >= 0 && i < a.Length; j--)
            {
                common[i][j] = string.Equals(a[i], b[j], StringComparison.Ordinal)
                    ? common[i + 1][j + 1] + 1
                    : Math.Max(common[i + 1][j], common[i][j + 1]);
            }
        }

        int x = 0;
        int y = 0;
        while (x < a.Length || y < b.Length)
        {
            if (x < a.Length && y < b.Length && string.Equals(a[x], b[y], StringComparison.Ordinal))
            {
                yield return (' ', a[x++]);
                y++;
            }
            else if (x < a.Length && (y == b.Length || common[x + 1][y] >= common[x][y + 1]))
            {
                yield return ('-', a[x++]);
            }
            else
            {
                yield return ('+', b[y++]);
            }
        }
    }
}

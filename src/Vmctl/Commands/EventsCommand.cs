// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.CommandLine;
using System.Globalization;
using System.Text.Json;
using System.Threading.Tasks;
using Vmm.Config;

namespace Vmctl.Commands;

/// <summary><c>vmctl events</c>: what happens to the fleet, as it happens.</summary>
internal static class EventsCommand
{
    internal static Command Create(CommandContext context)
    {
        var name = new Argument<string>("name") { Description = "Only of this VM.", Arity = ArgumentArity.ZeroOrOne };
        var format = new Option<string>("--output", "-o")
        {
            Description = "table, or json: an object a line.",
            HelpName = "format",
            DefaultValueFactory = _ => "table",
        };
        var command = new Command("events", "Show what happens to the fleet from now on, a line each, until interrupted.") { name, format };
        var paths = new PathOptions();
        paths.AddTo(command, withDefinitions: false);
        command.SetAction(async (result, cancellation) =>
        {
            string shape = result.GetValue(format) ?? "table";
            if (shape is not ("table" or "json"))
            {
                throw new CommandException(
                    ExitStatus.Usage, $"events: --output is table or json, not \"{shape}\"{Suggestion.Ending(shape, ["table", "json"])}");
            }

            using var fleet = new FleetAccess(paths.Resolve(result));
            await fleet.NeedDaemonAsync(cancellation).ConfigureAwait(false);
            string? only = result.GetValue(name);
            if (only is not null && !(await fleet.NamesAsync(cancellation).ConfigureAwait(false)).Contains(only))
            {
                throw await fleet.NotRunningAsync(only, cancellation).ConfigureAwait(false);
            }

            await foreach (string line in fleet.Client.EventsAsync(cancellation).ConfigureAwait(false))
            {
                using JsonDocument happened = JsonDocument.Parse(line);
                string? vm = happened.RootElement.GetProperty("vm").GetString();
                if (only is null || string.Equals(vm, only, StringComparison.Ordinal))
                {
                    context.Output.WriteLine(shape is "json" ? line : Line(happened.RootElement));
                    await context.Output.FlushAsync(cancellation).ConfigureAwait(false);
                }
            }

            throw new CommandException(ExitStatus.Failed, "events: the daemon has ended");
        });
        return command;
    }

    private static string Line(JsonElement happened)
    {
        DateTimeOffset at = happened.GetProperty("at").GetDateTimeOffset().ToLocalTime();
        string detail = happened.TryGetProperty("detail", out JsonElement text) ? ": " + text.GetString() : string.Empty;
        return string.Create(
            CultureInfo.InvariantCulture, $"{at:yyyy-MM-dd HH:mm:ss} {happened.GetProperty("vm")} {happened.GetProperty("what")}{detail}");
    }
}

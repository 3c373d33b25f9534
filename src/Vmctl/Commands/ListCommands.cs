// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.CommandLine;
using System.Globalization;
using System.IO;
using System.Text.Json;
using System.Threading;
using System.Threading.Tasks;
using Vmm.Config;
using Vmm.Fleet;
using Vmm.Fleet.Control;

namespace Vmctl.Commands;

/// <summary>One line about a VM, from the daemon or from the VM itself.</summary>
internal sealed record VmLine
{
    public required string Name { get; init; }

    public required string State { get; init; }

    public string Health { get; init; } = "unknown";

    public bool? Wanted { get; init; }

    public bool Changed { get; init; }

    public int Pid { get; init; }

    public int Cpus { get; init; }

    public long Memory { get; init; }

    public string? Driver { get; init; }

    public double? Uptime { get; init; }

    public double? CpuTime { get; init; }

    public long? Resident { get; init; }

    public int Restarts { get; init; }

    public string? Vnc { get; init; }

    public string? LastExit { get; init; }

    public string? Note { get; init; }

    public string? Definition { get; init; }

    internal static VmLine Of(JsonElement vm) => new()
    {
        Name = Text(vm, "name") ?? "?",
        State = Text(vm, "state") ?? "?",
        Health = Text(vm, "health") ?? "unknown",
        Wanted = Flag(vm, "wanted"),
        Changed = Flag(vm, "changed") ?? false,
        Pid = (int)(Number(vm, "pid") ?? 0),
        Cpus = (int)(Number(vm, "cpus") ?? 0),
        Memory = (long)(Number(vm, "memory") ?? 0),
        Driver = Text(vm, "driver"),
        Uptime = Number(vm, "uptime"),
        CpuTime = Number(vm, "cpu-time"),
        Resident = (long?)Number(vm, "resident"),
        Restarts = (int)(Number(vm, "restarts") ?? 0),
        Vnc = Text(vm, "vnc"),
        LastExit = Text(vm, "last-exit"),
        Note = Text(vm, "note") ?? (Text(vm, "state") is "down" or "failed" ? Text(vm, "last-message") : null),
        Definition = Text(vm, "definition"),
    };

    internal static VmLine Of(VmReport report) => new()
    {
        Name = report.Name,
        State = report.Condition.ToString().ToLowerInvariant(),
        Pid = report.Pid,
        Cpus = report.Cpus,
        Memory = report.MemoryBytes,
        Driver = report.Driver,
        Uptime = report.UptimeSeconds,
        CpuTime = report.CpuSeconds,
        Resident = report.ResidentBytes,
        Vnc = report.Vnc,
    };

    private static string? Text(JsonElement vm, string name) =>
        vm.TryGetProperty(name, out JsonElement value) && value.ValueKind == JsonValueKind.String ? value.GetString() : null;

    private static double? Number(JsonElement vm, string name) =>
        vm.TryGetProperty(name, out JsonElement value) && value.ValueKind == JsonValueKind.Number ? value.GetDouble() : null;

    private static bool? Flag(JsonElement vm, string name) =>
        vm.TryGetProperty(name, out JsonElement value) && value.ValueKind is JsonValueKind.True or JsonValueKind.False ? value.GetBoolean() : null;
}

/// <summary><c>vmctl list</c>.</summary>
internal static class ListCommand
{
    private static readonly string[] s_columns =
    [
        "name", "state", "health", "pid", "cpus", "memory", "driver", "uptime", "cpu-time", "resident", "restarts", "note",
        "wanted", "changed", "last-exit", "vnc",
    ];

    internal static Command Create(CommandContext context)
    {
        var command = new Command("list", "List the VMs of the fleet, or without a daemon those that run.");
        command.Aliases.Add("ls");
        var format = CommonOptions.Output();
        command.Add(format);
        var paths = new PathOptions();
        paths.AddTo(command, withDefinitions: false);
        command.SetAction(async (result, cancellation) =>
        {
            using var fleet = new FleetAccess(paths.Resolve(result));
            (List<VmLine> lines, List<string> errors) = await ReadAsync(fleet, cancellation).ConfigureAwait(false);
            Listing listing = Table(lines);
            listing.Write(context.Output, CommonOptions.Format(result, format), context.UseColour, context.Width);
            foreach (string error in errors)
            {
                context.Complain(error);
            }

            return ExitStatus.Ok;
        });
        return command;
    }

    internal static async Task<(List<VmLine> Lines, List<string> Errors)> ReadAsync(FleetAccess fleet, CancellationToken cancellation)
    {
        var lines = new List<VmLine>();
        var errors = new List<string>();
        var seen = new HashSet<string>(StringComparer.Ordinal);
        if (await fleet.HasDaemonAsync(cancellation).ConfigureAwait(false))
        {
            JsonElement answer = await fleet.CallAsync(false, "/v1/vms", cancellation).ConfigureAwait(false);
            foreach (JsonElement vm in answer.GetProperty("vms").EnumerateArray())
            {
                lines.Add(VmLine.Of(vm));
                seen.Add(lines[^1].Name);
            }

            foreach (JsonElement error in answer.GetProperty("errors").EnumerateArray())
            {
                errors.Add(error.GetString() ?? string.Empty);
            }
        }

        foreach (string name in fleet.RunningNames())
        {
            if (seen.Add(name))
            {
                try
                {
                    using ControlClient client = await fleet.ConnectAsync(name, cancellation).ConfigureAwait(false);
                    lines.Add(VmLine.Of(await client.ReportAsync(cancellation).ConfigureAwait(false)));
                }
                catch (Exception gone) when (gone is ControlException or CommandException)
                {
                    lines.Add(new VmLine { Name = name, State = "starting" });
                }
            }
        }

        return (lines, errors);
    }

    internal static Listing Table(IEnumerable<VmLine> lines)
    {
        var listing = new Listing(s_columns) { Show = Show };
        listing.Hidden.UnionWith(["wanted", "changed", "last-exit", "vnc"]);
        foreach (VmLine vm in lines)
        {
            listing.Add(
                vm.Name, vm.State, vm.Health, vm.Pid == 0 ? null : vm.Pid, vm.Cpus, vm.Memory, vm.Driver, vm.Uptime, vm.CpuTime,
                vm.Resident, vm.Restarts, vm.Changed ? "definition changed; restart to use it" : vm.Note, vm.Wanted, vm.Changed, vm.LastExit, vm.Vnc);
        }

        return listing;
    }

    private static string? Show(string column, object? value) => (column, value) switch
    {
        ("memory", long bytes) => Quantity.FormatSize(bytes),
        ("resident", long bytes) => (bytes >> 20).ToString(CultureInfo.InvariantCulture) + "M",
        ("uptime" or "cpu-time", double seconds) => Span(seconds),
        ("health", "unknown") => "-",
        ("note", null) => string.Empty,
        _ => null,
    };

    internal static string Span(double seconds)
    {
        var span = TimeSpan.FromSeconds(Math.Min(seconds, 1e9));
        return span.TotalDays >= 1 ? string.Create(CultureInfo.InvariantCulture, $"{(int)span.TotalDays}d{span.Hours:00}h")
            : span.TotalHours >= 1 ? string.Create(CultureInfo.InvariantCulture, $"{(int)span.TotalHours}h{span.Minutes:00}m")
            : span.TotalMinutes >= 1 ? string.Create(CultureInfo.InvariantCulture, $"{(int)span.TotalMinutes}m{span.Seconds:00}s")
            : string.Create(CultureInfo.InvariantCulture, $"{span.TotalSeconds:0.0}s");
    }
}

/// <summary><c>vmctl status</c>, also <c>show</c>.</summary>
internal static class StatusCommand
{
    internal static Command Create(CommandContext context)
    {
        var command = new Command("status", "Show one VM in detail, or all of them in a list.");
        command.Aliases.Add("show");
        var arguments = new VmArguments(command, several: false, optional: true);
        var format = CommonOptions.Output();
        var definition = new Option<bool>("--definition", "-d") { Description = "The definition as YAML." };
        command.Add(format);
        command.Add(definition);
        command.SetAction(async (result, cancellation) =>
        {
            using FleetAccess fleet = arguments.Open(result);
            OutputFormat shape = CommonOptions.Format(result, format);
            if (result.GetValue(definition))
            {
                await WriteDefinitionAsync(context, fleet, arguments.All(result), cancellation).ConfigureAwait(false);
                return ExitStatus.Ok;
            }

            (List<VmLine> lines, _) = await ListCommand.ReadAsync(fleet, cancellation).ConfigureAwait(false);
            if (arguments.All(result) is not [string name])
            {
                ListCommand.Table(lines).Write(context.Output, shape, context.UseColour, context.Width);
                return ExitStatus.Ok;
            }

            List<VmLine> found = lines.FindAll(vm => string.Equals(vm.Name, name, StringComparison.Ordinal));
            if (found.Count == 0)
            {
                throw await fleet.NotRunningAsync(name, cancellation).ConfigureAwait(false);
            }

            Listing listing = ListCommand.Table(found);
            if (shape == OutputFormat.Table)
            {
                listing.WriteDetails(context.Output);
            }
            else
            {
                listing.Write(context.Output, shape, colour: false, width: 0);
            }

            return ExitStatus.Ok;
        });
        return command;
    }

    // The daemon's, or of a VM that runs without one what its process was given.
    private static async Task WriteDefinitionAsync(
        CommandContext context, FleetAccess fleet, string[] names, CancellationToken cancellation)
    {
        if (names is not [string name])
        {
            throw new CommandException(ExitStatus.Usage, "status: --definition wants the name of a VM");
        }

        if (await fleet.HasDaemonAsync(cancellation).ConfigureAwait(false))
        {
            FleetAnswer answer = await fleet.Client.CallAsync(
                false, "/v1/vms/" + Uri.EscapeDataString(name), cancellation).ConfigureAwait(false);
            if (answer.IsOk)
            {
                context.Output.Write(answer.Body.GetProperty("definition").GetString());
                return;
            }
        }

        if (!fleet.RunningNames().Contains(name))
        {
            throw await fleet.NotRunningAsync(name, cancellation).ConfigureAwait(false);
        }

        context.Output.Write(await File.ReadAllTextAsync(fleet.Paths.Of(name).Definition, cancellation).ConfigureAwait(false));
    }
}

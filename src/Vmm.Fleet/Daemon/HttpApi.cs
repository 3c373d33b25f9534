// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Text;
using System.Text.Json;
using System.Threading;
using System.Threading.Tasks;
using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Http;
using Microsoft.AspNetCore.Routing;
using Vmm.Config;
using Vmm.Fleet.Control;

namespace Vmm.Fleet.Daemon;

// Theory. The daemon's interface for programs (vmctl is one): HTTP with JSON over a Unix socket that only its owner may
// open, so the file system decides who may do what. Routes are mapped to plain delegates and JSON is written by hand, so
// nothing needs reflection. The document at /openapi.json describes exactly these routes; a test compares the two.

/// <summary>The routes of the daemon's HTTP interface, wherever they are served.</summary>
internal sealed class HttpApi
{
    private const string JsonType = "application/json; charset=utf-8";

    private readonly FleetDaemon _daemon;

    internal HttpApi(FleetDaemon daemon)
    {
        _daemon = daemon;
    }

    internal void Map(IEndpointRouteBuilder routes)
    {
        routes.MapGet("/openapi.json", context => WriteTextAsync(context, JsonType, OpenApi.Document));
        routes.MapGet("/metrics", MetricsAsync);
        routes.MapGet("/v1/version", context => WriteJsonAsync(context, 200, json =>
        {
            json.WriteString("version", typeof(HttpApi).Assembly.GetName().Version?.ToString(3));
            json.WriteNumber("pid", Environment.ProcessId);
            json.WriteString("definitions", _daemon.Paths.Definitions);
        }));
        routes.MapGet("/v1/vms", ListAsync);
        routes.MapGet("/v1/vms/{name}", OfVm(ShowAsync));
        routes.MapGet("/v1/events", EventsAsync);
        routes.MapGet("/v1/vms/{name}/screen", OfVm(ScreenAsync));
        routes.MapGet("/v1/vms/{name}/console", OfVm(ConsoleAsync));
        routes.MapPost("/v1/reload", ReloadAsync);
        routes.MapPost("/v1/stop", StopAllAsync);
        routes.MapPost("/v1/vms/{name}/start", OfVm(StartVmAsync));
        routes.MapPost("/v1/vms/{name}/stop", OfVm(StopVmAsync));
        foreach ((string verb, string command) in new[]
        {
            ("pause", "stop"), ("unpause", "cont"), ("reset", "system_reset"), ("nmi", "inject-nmi"),
        })
        {
            routes.MapPost("/v1/vms/{name}/" + verb, OfVm((context, vm) => ControlAsync(context, vm, command)));
        }
    }

    private async Task ListAsync(HttpContext context)
    {
        IReadOnlyList<VmStatus> vms = _daemon.Supervisor.List();
        Dictionary<string, VmReport> reports = await ReportsAsync(vms, context.RequestAborted).ConfigureAwait(false);
        await WriteJsonAsync(context, 200, json =>
        {
            json.WriteStartArray("vms");
            foreach (VmStatus vm in vms)
            {
                json.WriteStartObject();
                WriteVm(json, vm, reports.GetValueOrDefault(vm.Name));
                json.WriteEndObject();
            }

            json.WriteEndArray();
            json.WriteStartArray("errors");
            foreach (Diagnostic error in _daemon.Errors)
            {
                json.WriteStringValue(error.ToString());
            }

            json.WriteEndArray();
        }).ConfigureAwait(false);
    }

    private async Task ShowAsync(HttpContext context, VmStatus vm)
    {
        VmReport? report = vm.Pid == 0 ? null : await _daemon.Host.ReportAsync(vm.Name, context.RequestAborted).ConfigureAwait(false);
        await WriteJsonAsync(context, 200, json =>
        {
            WriteVm(json, vm, report);
            json.WriteString("definition", SpecWriter.Write(vm.Spec));
        }).ConfigureAwait(false);
    }

    private Task StartVmAsync(HttpContext context, VmStatus vm)
    {
        _daemon.Supervisor.Start(vm.Name);
        return WriteVmAsync(context, vm.Name);
    }

    // ?force=true ends at once; ?timeout=TIME waits for the guest and takes the request back when the time is up.
    private async Task StopVmAsync(HttpContext context, VmStatus vm)
    {
        (bool force, TimeSpan timeout) = HowToStop(context, vm.Spec.StopTimeout);
        _daemon.Supervisor.Stop(vm.Name, force);
        if (await IsStoppedAsync(context, timeout, vm.Name).ConfigureAwait(false))
        {
            await WriteVmAsync(context, vm.Name).ConfigureAwait(false);
            return;
        }

        await WriteErrorAsync(
            context, 409, $"\"{vm.Name}\" did not stop within {Quantity.FormatDuration(timeout)}; vmctl stop -f ends it").ConfigureAwait(false);
    }

    // The same for all of them: dependents first, otherwise side by side; the time is for all together.
    private async Task StopAllAsync(HttpContext context)
    {
        (bool force, TimeSpan timeout) = HowToStop(context, _daemon.StopTimeout);
        _daemon.Supervisor.StopAll(force);
        var names = new List<string>();
        foreach (VmStatus vm in _daemon.Supervisor.List())
        {
            names.Add(vm.Name);
        }

        if (await IsStoppedAsync(context, timeout, [.. names]).ConfigureAwait(false))
        {
            await WriteJsonAsync(context, 200, json => json.WriteNumber("vms", names.Count)).ConfigureAwait(false);
            return;
        }

        names.RemoveAll(name => _daemon.Supervisor.Find(name) is null or { Phase: VmPhase.Down });
        await WriteErrorAsync(
            context,
            409,
            $"{string.Join(", ", names)} did not stop within {Quantity.FormatDuration(timeout)}; vmctl stop -f ends them").ConfigureAwait(false);
    }

    private static (bool Force, TimeSpan Timeout) HowToStop(HttpContext context, TimeSpan usual)
    {
        bool isGiven = Quantity.TryParseDuration(context.Request.Query["timeout"], out TimeSpan given);
        return (context.Request.Query["force"] == "true", isGiven ? given : usual);
    }

    private async Task<bool> IsStoppedAsync(HttpContext context, TimeSpan timeout, params string[] names)
    {
        bool IsUp(string name) => _daemon.Supervisor.Find(name) is { Phase: not VmPhase.Down };
        bool isDown = await _daemon.Supervisor.WaitAsync(
            _ => !Array.Exists(names, IsUp), timeout, context.RequestAborted).ConfigureAwait(false);
        foreach (string name in isDown ? [] : names)
        {
            _daemon.Supervisor.CancelStop(name);
        }

        return isDown;
    }

    private async Task ControlAsync(HttpContext context, VmStatus vm, string command)
    {
        if (vm.Phase != VmPhase.Running)
        {
            await WriteErrorAsync(context, 409, $"\"{vm.Name}\" is {vm.Phase.ToString().ToLowerInvariant()}, not running").ConfigureAwait(false);
            return;
        }

        if (await _daemon.Host.CommandAsync(vm.Name, command).ConfigureAwait(false))
        {
            await WriteVmAsync(context, vm.Name).ConfigureAwait(false);
            return;
        }

        await WriteErrorAsync(context, 500, $"\"{vm.Name}\" did not do it; see its log").ConfigureAwait(false);
    }

    // ?width=N: a picture of about that width, for lists.
    private async Task ScreenAsync(HttpContext context, VmStatus vm)
    {
        (byte[]? png, string? why) = HasProcess(vm)
            ? await _daemon.Host.ScreenAsync(vm.Name, Number(context, "width", 0), context.RequestAborted).ConfigureAwait(false)
            : (null, "is not running");
        await WriteBytesAsync(context, "image/png", png, $"\"{vm.Name}\" {why}").ConfigureAwait(false);
    }

    // ?tail=N: at most that many bytes of what the guest wrote last. Bytes as the guest sent them, escapes and all.
    private async Task ConsoleAsync(HttpContext context, VmStatus vm)
    {
        int tail = Math.Clamp(Number(context, "tail", 4096), 1, 1 << 20);
        byte[]? text = HasProcess(vm)
            ? await _daemon.Host.ConsoleTailAsync(vm.Name, tail, context.RequestAborted).ConfigureAwait(false)
            : null;
        await WriteBytesAsync(context, "application/octet-stream", text, $"\"{vm.Name}\" is not running").ConfigureAwait(false);
    }

    private static bool HasProcess(VmStatus vm) => vm.Phase is VmPhase.Running or VmPhase.Stopping;

    private static int Number(HttpContext context, string name, int otherwise) =>
        int.TryParse(context.Request.Query[name], NumberStyles.None, CultureInfo.InvariantCulture, out int number) ? number : otherwise;

    private static async Task WriteBytesAsync(HttpContext context, string type, byte[]? bytes, string whyNot)
    {
        if (bytes is null)
        {
            await WriteErrorAsync(context, 409, whyNot).ConfigureAwait(false);
            return;
        }

        context.Response.ContentType = type;
        context.Response.Headers.CacheControl = "no-store";
        await context.Response.Body.WriteAsync(bytes, context.RequestAborted).ConfigureAwait(false);
    }

    private async Task ReloadAsync(HttpContext context)
    {
        if (_daemon.Load(force: true))
        {
            await WriteJsonAsync(context, 200, json => json.WriteNumber("vms", _daemon.Supervisor.List().Count)).ConfigureAwait(false);
            return;
        }

        await WriteErrorAsync(context, 422, _daemon.Errors[0].ToString()).ConfigureAwait(false);
    }

    // Server-sent events (WHATWG HTML §9.2): one "data:" line of JSON each.
    private async Task EventsAsync(HttpContext context)
    {
        context.Response.ContentType = "text/event-stream";
        context.Response.Headers.CacheControl = "no-store";
        await context.Response.Body.FlushAsync(context.RequestAborted).ConfigureAwait(false);
        try
        {
            await foreach (FleetEvent happened in _daemon.Events.ListenAsync(context.RequestAborted).ConfigureAwait(false))
            {
                string data = Json(json =>
                {
                    json.WriteString("at", happened.At);
                    json.WriteString("vm", happened.Name);
                    json.WriteString("what", happened.What);
                    if (happened.Detail is not null)
                    {
                        json.WriteString("detail", happened.Detail);
                    }
                });
                await context.Response.WriteAsync($"event: {happened.What}\ndata: {data}\n\n", context.RequestAborted).ConfigureAwait(false);
                await context.Response.Body.FlushAsync(context.RequestAborted).ConfigureAwait(false);
            }
        }
        catch (OperationCanceledException)
        {
            // The listener left.
        }
    }

    // Prometheus text format 0.0.4.
    private async Task MetricsAsync(HttpContext context)
    {
        IReadOnlyList<VmStatus> vms = _daemon.Supervisor.List();
        Dictionary<string, VmReport> reports = await ReportsAsync(vms, context.RequestAborted).ConfigureAwait(false);
        var text = new StringBuilder();
        Family(text, "vmm_vm_up", "gauge", "The VM's process answers.", vms, vm => vm.Phase == VmPhase.Running ? 1 : 0);
        Family(text, "vmm_vm_healthy", "gauge", "The VM's health probe succeeds.", vms, vm => vm.Health == VmHealth.Healthy ? 1 : 0);
        Family(text, "vmm_vm_wanted", "gauge", "The VM is to be up.", vms, vm => vm.Wanted ? 1 : 0);
        Family(text, "vmm_vm_restarts", "gauge", "Restarts within the window of the VM's policy.", vms, vm => vm.Restarts);
        Family(text, "vmm_vm_memory_bytes", "gauge", "Guest memory.", vms, vm => vm.Spec.MemoryBytes);
        Family(text, "vmm_vm_cpu_seconds_total", "counter", "Processor time of the VM's process.", vms,
            vm => reports.TryGetValue(vm.Name, out VmReport? report) ? report.CpuSeconds : null);
        Family(text, "vmm_vm_resident_bytes", "gauge", "Host memory of the VM's process.", vms,
            vm => reports.TryGetValue(vm.Name, out VmReport? report) ? report.ResidentBytes : null);
        Family(text, "vmm_vm_uptime_seconds", "gauge", "Age of the VM's process.", vms,
            vm => reports.TryGetValue(vm.Name, out VmReport? report) ? report.UptimeSeconds : null);
        text.Append("# HELP vmm_definition_errors Errors in the definitions.\n# TYPE vmm_definition_errors gauge\n");
        text.Append(CultureInfo.InvariantCulture, $"vmm_definition_errors {_daemon.Errors.Count}\n");
        await WriteTextAsync(context, "text/plain; version=0.0.4; charset=utf-8", text.ToString()).ConfigureAwait(false);
    }

    private static void Family(
        StringBuilder text, string name, string type, string help, IReadOnlyList<VmStatus> vms, Func<VmStatus, double?> value)
    {
        text.Append(CultureInfo.InvariantCulture, $"# HELP {name} {help}\n# TYPE {name} {type}\n");
        foreach (VmStatus vm in vms)
        {
            if (value(vm) is { } number)
            {
                text.Append(CultureInfo.InvariantCulture, $"{name}{{vm=\"{vm.Name}\"}} {number}\n");
            }
        }
    }

    private async Task<Dictionary<string, VmReport>> ReportsAsync(IReadOnlyList<VmStatus> vms, CancellationToken cancellation)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        limit.CancelAfter(TimeSpan.FromSeconds(2));
        var asked = new List<Task<VmReport?>>();
        foreach (VmStatus vm in vms)
        {
            if (HasProcess(vm))
            {
                asked.Add(_daemon.Host.ReportAsync(vm.Name, limit.Token));
            }
        }

        var reports = new Dictionary<string, VmReport>(StringComparer.Ordinal);
        foreach (Task<VmReport?> task in asked)
        {
            try
            {
                if (await task.ConfigureAwait(false) is { } report)
                {
                    reports[report.Name] = report;
                }
            }
            catch (Exception failure) when (failure is OperationCanceledException or IOException)
            {
                // It does not answer in time; its line is shown without numbers.
            }
        }

        return reports;
    }

    private RequestDelegate OfVm(Func<HttpContext, VmStatus, Task> handle) => context =>
    {
        string name = (string?)context.Request.RouteValues["name"] ?? string.Empty;
        if (_daemon.Supervisor.Find(name) is { } vm)
        {
            return handle(context, vm);
        }

        var names = new List<string>();
        foreach (VmStatus other in _daemon.Supervisor.List())
        {
            names.Add(other.Name);
        }

        return WriteErrorAsync(context, 404, $"no VM is called \"{name}\"{Suggestion.Ending(name, names)}");
    };

    private Task WriteVmAsync(HttpContext context, string name)
    {
        VmStatus? vm = _daemon.Supervisor.Find(name);
        return WriteJsonAsync(context, 200, json =>
        {
            if (vm is not null)
            {
                WriteVm(json, vm, null);
            }
        });
    }

    private static void WriteVm(Utf8JsonWriter json, VmStatus vm, VmReport? report)
    {
        json.WriteString("name", vm.Name);
        bool isPaused = report?.Condition == VmCondition.Paused;
        json.WriteString("state", isPaused ? "paused" : vm.Phase.ToString().ToLowerInvariant());
        json.WriteString("health", vm.Health.ToString().ToLowerInvariant());
        json.WriteBoolean("wanted", vm.Wanted);
        json.WriteBoolean("autostart", vm.Spec.Autostart);
        json.WriteBoolean("changed", vm.Changed);
        json.WriteNumber("pid", vm.Pid);
        json.WriteString("since", vm.Since);
        json.WriteNumber("restarts", vm.Restarts);
        json.WriteNumber("cpus", vm.Spec.Cpus.Count);
        json.WriteNumber("memory", vm.Spec.MemoryBytes);
        if (vm.Spec.Description is not null)
        {
            json.WriteString("description", vm.Spec.Description);
        }

        if (vm.Note is not null)
        {
            json.WriteString("note", vm.Note);
        }

        if (vm.LastExit is { } exit)
        {
            json.WriteString("last-exit", exit.Reason);
            json.WriteNumber("last-status", exit.Status);
            if (exit.Message is not null)
            {
                json.WriteString("last-message", exit.Message);
            }
        }

        if (report is not null)
        {
            json.WriteString("driver", report.Driver);
            json.WriteNumber("uptime", report.UptimeSeconds);
            json.WriteNumber("cpu-time", report.CpuSeconds);
            json.WriteNumber("resident", report.ResidentBytes);
            if (report.Vnc is not null)
            {
                json.WriteString("vnc", report.Vnc);
            }
        }

        json.WriteBoolean("display", (vm.Running ?? vm.Spec).Display.Vga != VgaModel.None);
    }

    private static string Json(Action<Utf8JsonWriter> write)
    {
        using var buffer = new MemoryStream();
        using (var json = new Utf8JsonWriter(buffer))
        {
            json.WriteStartObject();
            write(json);
            json.WriteEndObject();
        }

        return Encoding.UTF8.GetString(buffer.GetBuffer(), 0, (int)buffer.Length);
    }

    internal static Task WriteJsonAsync(HttpContext context, int status, Action<Utf8JsonWriter> write)
    {
        context.Response.StatusCode = status;
        return WriteTextAsync(context, JsonType, Json(write));
    }

    internal static Task WriteErrorAsync(HttpContext context, int status, string message) =>
        WriteJsonAsync(context, status, json => json.WriteString("error", message));

    internal static Task WriteTextAsync(HttpContext context, string type, string text)
    {
        context.Response.ContentType = type;
        return context.Response.WriteAsync(text, context.RequestAborted);
    }
}

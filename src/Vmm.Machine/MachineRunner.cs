// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Net;
using Vmm.Backends.Block;
using Vmm.Config;
using Vmm.Core;
using Vmm.Host;
using Vmm.Machine.Boot;
using Vmm.X86;

namespace Vmm.Machine;

/// <summary>How to run a machine in the foreground.</summary>
public sealed record RunOptions
{
    /// <summary>What <c>stdio</c> means in the definition; null when there is no terminal to give.</summary>
    public ICharBackend? Stdio { get; init; }

    /// <summary>The file of a port's log, by the port's name, for ports that end in <c>log</c>; null keeps them in memory.</summary>
    public Func<string, string>? LogFile { get; init; }

    /// <summary>Says which driver was taken and why, in one line.</summary>
    public bool ReportDriver { get; init; } = true;

    /// <summary>Logs what the driver has counted when the machine has stopped, one line each.</summary>
    public bool ReportStatistics { get; init; }

    /// <summary>File that names the blocks of translated code for Linux perf; null for none.</summary>
    public string? PerfMap { get; init; }

    /// <summary>Handed the machine before it starts; what it returns is disposed after it has stopped.</summary>
    public Func<Machine, IDisposable?>? OnBuilt { get; init; }
}

/// <summary>Builds a machine from a definition, runs it to its end and turns everything into an exit status.</summary>
public static class MachineRunner
{
    /// <summary>EX_NOINPUT: a file that the definition names is missing or unreadable.</summary>
    public const int StatusNoInput = 66;

    /// <summary>EX_UNAVAILABLE: no driver can be used.</summary>
    public const int StatusNoDriver = 69;

    /// <summary>EX_CONFIG: the definition asks for something impossible.</summary>
    public const int StatusConfig = 78;

    /// <summary>A failure of the host or of this program.</summary>
    public const int StatusError = 4;

    /// <summary>Runs.</summary>
    /// <param name="spec">The definition, already validated.</param>
    /// <param name="options">How.</param>
    /// <param name="log">Receives one line per thing that people should know; standard error of vmctl.</param>
    /// <returns>The exit status of <c>vmctl run</c>.</returns>
    public static int Run(MachineSpec spec, RunOptions options, TextWriter log)
    {
        ArgumentNullException.ThrowIfNull(spec);
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(log);
        try
        {
            AccelChoice choice = AccelChooser.Choose(spec.Accel);
            using TextWriter? perfMap = OpenPerfMap(options.PerfMap);
            if (choice.Hypervisor is SoftHypervisor soft)
            {
                soft.Translate = spec.Soft.Translate;
                soft.PerfMap = perfMap;
                soft.CountAccesses = options.ReportStatistics;
            }

            if (options.ReportDriver)
            {
                log.WriteLine($"vmctl: {spec.Name}: runs on {choice.Reason}");
            }

            using Machine machine = MachineBuilder.Build(spec, choice.Hypervisor, options.Stdio, options.LogFile);
            foreach (string remark in Remarks(spec))
            {
                log.WriteLine($"vmctl: {spec.Name}: {remark}");
            }

            foreach (MediaFinding finding in machine.Findings)
            {
                log.WriteLine($"vmctl: {spec.Name}: disks: {finding}; the guest starts all the same");
            }

            using IDisposable? companion = options.OnBuilt?.Invoke(machine);
            MachineResult result = machine.Run();
            foreach (VmStatistic one in options.ReportStatistics ? machine.ReadStatistics() : [])
            {
                string share = one.Of == 0 ? "" : FormattableString.Invariant(
                    $" of {one.Of} ({100.0 * one.Value / one.Of:F2} %)");
                log.WriteLine($"vmctl: {spec.Name}: {one.Name} {one.Value}{share}");
            }

            if (result.Message is not null)
            {
                log.WriteLine($"vmctl: {spec.Name}: {result.Message}");
            }

            return result.ExitStatus;
        }
        catch (BootException e)
        {
            log.WriteLine($"vmctl: {spec.Name}: {e.Message}");
            return e.IsMissingInput ? StatusNoInput : StatusConfig;
        }
        catch (NoDriverException e)
        {
            log.WriteLine($"vmctl: {spec.Name}: {e.Message}");
            return StatusNoDriver;
        }
        catch (Exception e) when (e is HypervisorException or HostException or IOException or UnauthorizedAccessException)
        {
            log.WriteLine($"vmctl: {spec.Name}: {e.Message}");
            return StatusError;
        }
    }

    // What is permitted and probably not meant.
    private static IEnumerable<string> Remarks(MachineSpec spec)
    {
        if (spec.Boot.Kernel is null && spec.Nics.Count == 0 && !spec.Disks.Any(static disk => disk.Path is not null))
        {
            yield return "boot: there is nothing to start from: no kernel, no disk or disc, no network card";
        }

        DisplaySpec display = spec.Display;
        if (display is { VncAddress: { } address, PasswordFile: null } && IPEndPoint.TryParse(address, out IPEndPoint? end)
            && !IPAddress.IsLoopback(end.Address))
        {
            yield return $"display: whoever reaches {address} has the screen and the keyboard: there is no \"password-file\"";
        }
    }

    // The name is known in advance and the directory everybody's: only a file that was not there is written.
    private static StreamWriter? OpenPerfMap(string? path) =>
        path is null ? null : new StreamWriter(new FileStream(path, FileMode.CreateNew, FileAccess.Write)) { AutoFlush = true };
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Threading;
using System.Threading.Tasks;

namespace Vmctl.Tests;

/// <summary>Runs the built program as a user would: the native one when <c>make all</c> made it, else the managed one.</summary>
internal static class VmctlProcess
{
    private static readonly Lazy<string> s_program = new(FindProgram);

    internal static string Root { get; } = FindRoot();

    internal static string Program => s_program.Value;

    internal static Outcome Run(params string[] arguments) => RunIn(Path.GetTempPath(), null, arguments);

    internal static Outcome RunIn(string directory, IReadOnlyDictionary<string, string>? environment, params string[] arguments)
    {
        var start = new ProcessStartInfo(Program)
        {
            UseShellExecute = false,
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            WorkingDirectory = directory,
        };
        foreach (string argument in arguments)
        {
            start.ArgumentList.Add(argument);
        }

        foreach ((string name, string value) in environment ?? new Dictionary<string, string>(StringComparer.Ordinal))
        {
            start.Environment[name] = value;
        }

        using Process process = Process.Start(start)!;
        process.StandardInput.Close();
        Task<string> output = process.StandardOutput.ReadToEndAsync(CancellationToken.None);
        Task<string> error = process.StandardError.ReadToEndAsync(CancellationToken.None);
        if (!process.WaitForExit(60_000))
        {
            process.Kill(entireProcessTree: true);
            throw new TimeoutException("vmctl " + string.Join(' ', arguments) + " did not end");
        }

        return new Outcome(process.ExitCode, output.Result, error.Result);
    }

    private static string FindProgram()
    {
        string? given = Environment.GetEnvironmentVariable("VMCTL");
        if (!string.IsNullOrEmpty(given))
        {
            return given;
        }

        string native = Path.Combine(Root, "out", "bin", "vmctl");
        string managed = Path.Combine(AppContext.BaseDirectory, "vmctl");
        bool isFresh = File.Exists(native) && File.GetLastWriteTimeUtc(native) >= File.GetLastWriteTimeUtc(managed + ".dll");
        return isFresh ? native : managed;
    }

    private static string FindRoot()
    {
        string? at = AppContext.BaseDirectory;
        while (at is not null && !File.Exists(Path.Combine(at, "Vmm.sln")))
        {
            at = Path.GetDirectoryName(at);
        }

        return at ?? throw new InvalidOperationException("not inside the repository");
    }
}

/// <summary>What a run of the program left.</summary>
/// <param name="Status">Exit status.</param>
/// <param name="Output">Standard output.</param>
/// <param name="Error">Standard error.</param>
internal sealed record Outcome(int Status, string Output, string Error);

/// <summary>A directory that is gone after the test.</summary>
internal sealed class TempDirectory : IDisposable
{
    internal TempDirectory()
    {
        Path = Directory.CreateTempSubdirectory("vmctl-test-").FullName;
    }

    internal string Path { get; }

    public void Dispose() => Directory.Delete(Path, recursive: true);

    internal string Write(string name, string text)
    {
        string path = System.IO.Path.Combine(Path, name);
        Directory.CreateDirectory(System.IO.Path.GetDirectoryName(path)!);
        File.WriteAllText(path, text);
        return path;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Diagnostics;
using System.IO;

namespace Vmm.Backends.Tests;

/// <summary>A directory that is removed after the test.</summary>
internal sealed class TempDirectory : IDisposable
{
    private readonly DirectoryInfo _directory = Directory.CreateTempSubdirectory("vmm-test-");

    public string Root => _directory.FullName;

    public string this[string name] => Path.Combine(_directory.FullName, name);

    public void Dispose() => _directory.Delete(recursive: true);

    /// <summary>Runs a program to its end, at most 60 s.</summary>
    public static (int Status, string Output) Run(string program, params string[] arguments)
    {
        var start = new ProcessStartInfo(program, arguments)
        {
            UseShellExecute = false,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        using Process process = Process.Start(start)!;
        System.Threading.Tasks.Task<string> errors = process.StandardError.ReadToEndAsync();
        string output = process.StandardOutput.ReadToEnd();
        if (!process.WaitForExit(60_000))
        {
            process.Kill();
            throw new TimeoutException(program);
        }

        return (process.ExitCode, output + errors.Result);
    }

    /// <summary>Runs qemu-img and expects success.</summary>
    public static string QemuImg(params string[] arguments)
    {
        (int status, string output) = Run("qemu-img", arguments);
        return status == 0
            ? output
            : throw new InvalidOperationException($"qemu-img {string.Join(' ', arguments)}: {status}\n{output}");
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Runtime.CompilerServices;

namespace Vmm.TestKit;

/// <summary>Programs of tests/abi: C that prints what the system's headers define, one `kind name value` a line.</summary>
public static class CProgram
{
    /// <summary>Why no C program that includes a header can be built here, or null when it can.</summary>
    /// <param name="header">A header below /usr/include, and the package that has it on Debian.</param>
    /// <param name="package">The package.</param>
    public static string? Missing(string header, string package)
    {
        bool hasCompiler = Environment.GetEnvironmentVariable("PATH")!.Split(':')
            .Any(folder => File.Exists(Path.Combine(folder, "cc")));
        return !hasCompiler ? "there is no C compiler (cc)"
            : !File.Exists(Path.Combine("/usr/include", header)) ? $"there is no <{header}> (package {package})"
            : null;
    }

    /// <summary>Compiles and runs one; returns "kind name" with its value.</summary>
    /// <param name="source">Its file name in tests/abi.</param>
    /// <exception cref="InvalidOperationException">It does not compile without warnings, or failed.</exception>
    public static SortedDictionary<string, ulong> CompileAndRun(string source)
    {
        string directory = Directory.CreateTempSubdirectory("vmm-abi-").FullName;
        try
        {
            string program = Path.Combine(directory, "program");
            Execute("cc", "-Wall", "-Wextra", "-Werror", "-o", program, Path.Combine(SourceFolder(), source));
            var values = new SortedDictionary<string, ulong>(StringComparer.Ordinal);
            foreach (string line in Execute(program).Split('\n', StringSplitOptions.RemoveEmptyEntries))
            {
                string[] words = line.Split(' ');
                values[$"{words[0]} {words[1]}"] = ulong.Parse(words[2], CultureInfo.InvariantCulture);
            }

            return values;
        }
        finally
        {
            Directory.Delete(directory, recursive: true);
        }
    }

    /// <summary>Runs a program and returns what it printed.</summary>
    /// <param name="program">Its name or path.</param>
    /// <param name="arguments">Its arguments.</param>
    /// <exception cref="InvalidOperationException">Its status was not 0.</exception>
    public static string Execute(string program, params string[] arguments)
    {
        using var process = Process.Start(new ProcessStartInfo(program, arguments)
        {
            RedirectStandardOutput = true,
            UseShellExecute = false,
        })!;
        string text = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        return process.ExitCode == 0 ? text
            : throw new InvalidOperationException($"{program} ended with status {process.ExitCode}");
    }

    private static string SourceFolder([CallerFilePath] string here = "") =>
        Path.Combine(Path.GetDirectoryName(here)!, "..", "abi");
}

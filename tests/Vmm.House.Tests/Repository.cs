// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;

namespace Vmm.House.Tests;

/// <summary>The files of the repository: what git tracks or would track, or, in an unpacked archive, what is there.</summary>
internal static class Repository
{
    private static readonly string[] s_generated = ["bin", "obj", "out", ".git", "TestResults"];
    private static readonly Lazy<IReadOnlyList<string>> s_files = new(List);

    internal static string Root { get; } = FindRoot();

    /// <summary>Paths relative to the root, with slashes.</summary>
    internal static IReadOnlyList<string> Files => s_files.Value;

    internal static string Full(string relative) => Path.Combine(Root, relative);

    internal static string Read(string relative) => File.ReadAllText(Full(relative));

    private static List<string> List()
    {
        List<string> files = FromGit() ?? FromDirectory();
        return files.Where(file => File.Exists(Full(file))).Order(StringComparer.Ordinal).ToList();
    }

    private static List<string>? FromGit()
    {
        if (!Directory.Exists(Full(".git")) && !File.Exists(Full(".git")))
        {
            return null;
        }

        try
        {
            var start = new ProcessStartInfo("git", "ls-files --cached --others --exclude-standard -z")
            {
                WorkingDirectory = Root,
                RedirectStandardOutput = true,
                UseShellExecute = false,
            };
            using Process git = Process.Start(start)!;
            string output = git.StandardOutput.ReadToEnd();
            git.WaitForExit();
            return git.ExitCode == 0 ? output.Split('\0', StringSplitOptions.RemoveEmptyEntries).ToList() : null;
        }
        catch (System.ComponentModel.Win32Exception)
        {
            return null;
        }
    }

    private static List<string> FromDirectory()
    {
        var files = new List<string>();
        var left = new Stack<string>([Root]);
        while (left.TryPop(out string? directory))
        {
            foreach (string child in Directory.EnumerateDirectories(directory))
            {
                if (!s_generated.Contains(Path.GetFileName(child), StringComparer.Ordinal))
                {
                    left.Push(child);
                }
            }

            files.AddRange(Directory.EnumerateFiles(directory).Select(file => Path.GetRelativePath(Root, file)));
        }

        return files;
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

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using Xunit;

namespace Vmm.TestKit;

/// <summary>A test of Linux; reported as skipped, with the reason, elsewhere or where a file that it needs is missing.</summary>
[AttributeUsage(AttributeTargets.Method)]
public sealed class LinuxFactAttribute : FactAttribute
{
    /// <param name="path">What it needs to read; null for nothing.</param>
    public LinuxFactAttribute(string? path = null)
    {
        Path = path;
        Skip = !OperatingSystem.IsLinux() ? "only on Linux" : path is null ? null : WhyNot(path);
    }

    public string? Path { get; }

    private static string? WhyNot(string path)
    {
        try
        {
            File.OpenHandle(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite).Dispose();
            return null;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return e.Message;
        }
    }
}

/// <summary>A theory of Linux.</summary>
[AttributeUsage(AttributeTargets.Method)]
public sealed class LinuxTheoryAttribute : TheoryAttribute
{
    public LinuxTheoryAttribute() => Skip = OperatingSystem.IsLinux() ? null : "only on Linux";
}

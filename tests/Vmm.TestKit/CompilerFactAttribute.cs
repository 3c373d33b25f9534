// SPDX-License-Identifier: BSD-2-Clause
using System;
using Xunit;

namespace Vmm.TestKit;

/// <summary>A test that builds a C program; reported as skipped, with the reason, where that cannot be done.</summary>
[AttributeUsage(AttributeTargets.Method)]
public sealed class CompilerFactAttribute : FactAttribute
{
    /// <param name="header">The header that the program needs, below /usr/include.</param>
    /// <param name="package">The Debian package that has it.</param>
    public CompilerFactAttribute(string header, string package = "libc6-dev")
    {
        Header = header;
        Package = package;
        Skip = CProgram.Missing(header, package);
    }

    public string Header { get; }

    public string Package { get; }
}

/// <summary>A theory that builds a C program.</summary>
[AttributeUsage(AttributeTargets.Method)]
public sealed class CompilerTheoryAttribute : TheoryAttribute
{
    /// <inheritdoc cref="CompilerFactAttribute(string, string)"/>
    public CompilerTheoryAttribute(string header, string package = "libc6-dev")
    {
        Header = header;
        Package = package;
        Skip = CProgram.Missing(header, package);
    }

    public string Header { get; }

    public string Package { get; }
}

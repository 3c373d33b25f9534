// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;

namespace Vmm.Config;

/// <summary>A place in a file of definitions. Lines and columns count from 1.</summary>
/// <param name="File">The file as the user named it.</param>
/// <param name="Line">1-based; 0 when the whole file is meant.</param>
/// <param name="Column">1-based; 0 when the whole file is meant.</param>
public readonly record struct SourcePosition(string File, int Line, int Column)
{
    /// <inheritdoc/>
    public override string ToString()
    {
        return Line == 0 ? File : string.Create(CultureInfo.InvariantCulture, $"{File}:{Line}:{Column}");
    }
}

/// <summary>One thing that is wrong with a definition.</summary>
/// <param name="At">Where.</param>
/// <param name="Message">What, and what to do, in one line.</param>
public readonly record struct Diagnostic(SourcePosition At, string Message)
{
    /// <inheritdoc/>
    public override string ToString() => At + ": " + Message;
}

/// <summary>What kind of failure a <see cref="ConfigException"/> is; decides the exit status.</summary>
public enum ConfigFailure
{
    /// <summary>The definition is wrong (exit status 78).</summary>
    Invalid,

    /// <summary>The file of definitions is not there or cannot be read (exit status 66).</summary>
    NoInput,
}

/// <summary>A definition cannot be used. Carries every error that was found, in file order.</summary>
public sealed class ConfigException : Exception
{
    /// <summary>Makes one.</summary>
    /// <param name="diagnostics">At least one.</param>
    /// <param name="failure">Invalid content or no readable file.</param>
    public ConfigException(IReadOnlyList<Diagnostic> diagnostics, ConfigFailure failure = ConfigFailure.Invalid)
        : base(diagnostics is { Count: > 0 } ? diagnostics[0].ToString() : "invalid definition")
    {
        ArgumentNullException.ThrowIfNull(diagnostics);
        Diagnostics = diagnostics;
        Failure = failure;
    }

    /// <summary>Every error, in file order; never empty.</summary>
    public IReadOnlyList<Diagnostic> Diagnostics { get; }

    /// <summary>What kind of failure it is.</summary>
    public ConfigFailure Failure { get; }

    internal static ConfigException Single(SourcePosition at, string message, ConfigFailure failure = ConfigFailure.Invalid)
    {
        return new ConfigException([new Diagnostic(at, message)], failure);
    }
}

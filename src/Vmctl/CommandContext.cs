// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using Vmm.Host;

namespace Vmctl;

/// <summary>What commands write to. Colour and drawing only where a person looks.</summary>
internal sealed class CommandContext
{
    internal CommandContext(TextWriter output, TextWriter error)
    {
        Output = output;
        Error = error;
    }

    internal TextWriter Output { get; }

    internal TextWriter Error { get; }

    internal bool IsOutputTerminal { get; } = RawTerminal.IsTerminal(1);

    internal bool IsErrorTerminal { get; } = RawTerminal.IsTerminal(2);

    /// <summary>Standard output is a terminal and the user did not ask for no colour (no-color.org).</summary>
    internal bool UseColour => IsOutputTerminal
        && string.IsNullOrEmpty(Environment.GetEnvironmentVariable("NO_COLOR"))
        && Environment.GetEnvironmentVariable("TERM") is not (null or "" or "dumb");

    /// <summary>Columns of the terminal; 0 where output goes elsewhere and need not fit.</summary>
    internal int Width => IsOutputTerminal && RawTerminal.TryGetSize(1, out int columns, out _) ? columns : 0;

    /// <summary>One line on standard error.</summary>
    internal void Complain(string message)
    {
        Output.Flush();
        Error.WriteLine("vmctl: " + message);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.Machine.Boot;

/// <summary>
/// What the user asked to boot cannot be booted. The message is one line that names the file and says what is wrong.
/// </summary>
public sealed class BootException : Exception
{
    /// <summary>Makes one.</summary>
    /// <param name="message">One line for people.</param>
    /// <param name="isMissingInput">The file is missing or unreadable (exit status 66) rather than wrong (78).</param>
    public BootException(string message, bool isMissingInput = false)
        : base(message)
    {
        IsMissingInput = isMissingInput;
    }

    /// <summary>The file is missing or unreadable.</summary>
    public bool IsMissingInput { get; }
}

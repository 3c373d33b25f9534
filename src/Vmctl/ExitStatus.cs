// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmctl;

/// <summary>
/// Exit statuses of all commands but <c>run</c>, whose 0 to 4 say how the guest ended. From sysexits(3); a contract.
/// </summary>
internal static class ExitStatus
{
    internal const int Ok = 0;
    internal const int Failed = 1;

    /// <summary><c>run</c>: host or internal error.</summary>
    internal const int InternalError = 4;
    internal const int Usage = 64;
    internal const int NoInput = 66;
    internal const int WrongState = 75;
    internal const int Config = 78;

    /// <summary>A signal ended a command that first put things back (see <see cref="Interruption"/>); a shell's 128 + SIGINT.</summary>
    internal const int Interrupted = 130;
}

/// <summary>A command ends with a message of one line and a status.</summary>
internal sealed class CommandException : Exception
{
    internal CommandException(int status, string message)
        : base(message)
    {
        Status = status;
    }

    internal int Status { get; }
}

// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.Machine;

/// <summary>Why a machine stopped.</summary>
public enum StopReason
{
    /// <summary>The guest asked for a reset.</summary>
    Reset,

    /// <summary>The guest powered off.</summary>
    PowerOff,

    /// <summary>Every processor halted with interrupts off: nothing can ever happen again.</summary>
    Halt,

    /// <summary>A processor could not even deliver a double fault.</summary>
    TripleFault,

    /// <summary>The host, the driver or this program failed.</summary>
    Error,

    /// <summary>The guest wrote to the debug-exit port.</summary>
    DebugExit,

    /// <summary>Somebody ended it from outside.</summary>
    Quit,
}

/// <summary>How a machine ended.</summary>
/// <param name="Reason">Why.</param>
/// <param name="ExitStatus">What <c>vmctl run</c> exits with: bhyve's numbers, or (value &lt;&lt; 1) | 1 for debug-exit.</param>
/// <param name="Message">One line for people, where there is something to say.</param>
public sealed record MachineResult(StopReason Reason, int ExitStatus, string? Message)
{
    /// <summary>The result with the status that belongs to the reason.</summary>
    public static MachineResult For(StopReason reason, string? message = null) => new(
        reason,
        reason switch
        {
            StopReason.Reset => 0,
            StopReason.PowerOff => 1,
            StopReason.Halt => 2,
            StopReason.TripleFault => 3,
            StopReason.Quit => 1,
            _ => 4,
        },
        message);
}

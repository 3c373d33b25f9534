// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.Devices.Legacy;

/// <summary>What a chip can ask of the machine around it.</summary>
public enum SystemRequest
{
    /// <summary>Hard reset of the whole machine.</summary>
    Reset,

    /// <summary>Reset of the processors only (INIT): keyboard controller pulse, port 0x92.</summary>
    ProcessorReset,

    /// <summary>ACPI S5: switch off.</summary>
    PowerOff,

    /// <summary>ACPI S3: suspend to RAM.</summary>
    SuspendToRam,

    /// <summary>ACPI S4: suspend to disk, then off.</summary>
    Hibernate,

    /// <summary>A watchdog ran out.</summary>
    WatchdogExpired,

    /// <summary>The guest's kernel reported a panic (pvpanic).</summary>
    GuestPanicked,

    /// <summary>The guest's kernel panicked and loaded a crash kernel.</summary>
    GuestCrashLoaded,

    /// <summary>The guest asked for an orderly shutdown through pvpanic.</summary>
    GuestShutdown,
}

/// <summary>
/// The machine as a chip sees it. Called on vCPU or clock threads, never under a chip's gate; must return at once
/// (the machine sets a flag and kicks its vCPUs).
/// </summary>
public interface ISystemControl
{
    /// <summary>Asks for something.</summary>
    /// <param name="request">What.</param>
    /// <param name="source">Who asks, for the log, as in "reset by …": "port 0xCF9".</param>
    void Request(SystemRequest request, string source);

    /// <summary>Ends the VM with a status of the guest's choice (debug-exit port).</summary>
    /// <param name="status">(value &lt;&lt; 1) | 1, at most 255 after truncation by the caller.</param>
    void Exit(int status);

    /// <summary>
    /// The A20 gate. Port 0x92 and the keyboard controller drive the same line: who wrote last decides, and both show what it
    /// is, so that a guest may open by one what it closed by the other.
    /// </summary>
    void SetA20(bool isOpen);

    /// <summary>Whether the gate is open, which it is after a reset. May be asked under a chip's gate.</summary>
    bool IsA20Open { get; }
}

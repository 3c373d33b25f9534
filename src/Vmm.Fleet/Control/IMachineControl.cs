// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Collections.ObjectModel;

namespace Vmm.Fleet.Control;

/// <summary>Condition of a VM as its process sees it.</summary>
public enum VmCondition
{
    /// <summary>Being put together.</summary>
    Starting,

    /// <summary>vCPUs run.</summary>
    Running,

    /// <summary>Stands still and can go on.</summary>
    Paused,

    /// <summary>Has ended.</summary>
    Stopped,
}

/// <summary>What a VM's process says about itself.</summary>
public sealed record VmReport
{
    /// <summary>Name of the VM.</summary>
    public required string Name { get; init; }

    /// <summary>Condition.</summary>
    public required VmCondition Condition { get; init; }

    /// <summary>Driver: "kvm" or "soft"; empty while starting.</summary>
    public string Driver { get; init; } = string.Empty;

    /// <summary>Process number.</summary>
    public int Pid { get; init; }

    /// <summary>Number of vCPUs.</summary>
    public int Cpus { get; init; }

    /// <summary>Guest memory in bytes.</summary>
    public long MemoryBytes { get; init; }

    /// <summary>Seconds since the process started.</summary>
    public double UptimeSeconds { get; init; }

    /// <summary>Processor time that the process used, in seconds.</summary>
    public double CpuSeconds { get; init; }

    /// <summary>Memory of the host that the process holds, guest memory included, in bytes.</summary>
    public long ResidentBytes { get; init; }

    /// <summary>Instructions that the driver could not execute and the software CPU did: how often, by mnemonic.</summary>
    public IReadOnlyDictionary<string, long> Completed { get; init; } = ReadOnlyDictionary<string, long>.Empty;

    /// <summary>Where VNC listens, or null.</summary>
    public string? Vnc { get; init; }
}

/// <summary>
/// A running machine as the control socket needs it; the narrow door between a VM's process and the fleet. Methods may
/// be called from any thread and may block for as long as the machine needs to stop or save. What a machine cannot do
/// throws <see cref="ControlException"/> with one line for people.
/// </summary>
public interface IMachineControl
{
    /// <summary>What it does right now. Cheap.</summary>
    VmReport Report();

    /// <summary>Stops guest time and execution.</summary>
    void Pause();

    /// <summary>Continues.</summary>
    void Unpause();

    /// <summary>Asks the guest to shut down (ACPI).</summary>
    void PressPowerButton();

    /// <summary>Resets the machine as its button would.</summary>
    void Reset();

    /// <summary>Presses the NMI button.</summary>
    void InjectNmi();

    /// <summary>Ends the VM at once.</summary>
    void Quit();

    /// <summary>Writes the screen to a PNG file.</summary>
    void Screenshot(string path);

    /// <summary>The screen as PNG, in memory.</summary>
    /// <param name="width">About how wide; 0 for the screen's own size. A screen is never enlarged.</param>
    byte[] ScreenPng(int width);

    /// <summary>What the guest wrote last to its console.</summary>
    /// <param name="maximumBytes">At most so many bytes.</param>
    byte[] ConsoleTail(int maximumBytes);

    /// <summary>The text of a screen in text mode.</summary>
    string ScreenText();

    /// <summary>Asks the guest to keep no more memory than that, through the balloon.</summary>
    void SetMemory(long memoryBytes);

    /// <summary>Memory that the guest keeps according to its balloon driver, in bytes.</summary>
    long GuestMemory();

    /// <summary>Puts another disc into a CD-ROM drive, or none.</summary>
    /// <param name="drive">"cdrom0", "cdrom1": in the order of the definition.</param>
    /// <param name="path">Absolute path of the image; null takes the disc out.</param>
    /// <param name="force">Also when the guest has locked the tray.</param>
    void ChangeMedium(string drive, string? path, bool force);

    /// <summary>Saves the machine's state to a file; the machine is paused and stays so.</summary>
    void Save(string path);
}

/// <summary>A control command could not be done; the message is one line for people.</summary>
public sealed class ControlException : Exception
{
    /// <summary>Makes one.</summary>
    public ControlException(string message)
        : base(message)
    {
    }

    /// <summary>Makes one with its cause.</summary>
    public ControlException(string message, Exception inner)
        : base(message, inner)
    {
    }
}

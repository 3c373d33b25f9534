// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Diagnostics;
using System.IO;
using Vmm.Backends.Char;
using Vmm.Config;
using Vmm.Core;
using Vmm.Fleet.Control;
using Vmm.Machine;

namespace Vmctl.Running;

/// <summary>A machine as the control socket sees it.</summary>
internal sealed class MachineControl : IMachineControl
{
    private readonly long _start = Stopwatch.GetTimestamp();
    private readonly MachineSpec _spec;
    private readonly Machine _machine;
    private readonly CharMultiplexer _console;

    internal MachineControl(MachineSpec spec, Machine machine, CharMultiplexer console)
    {
        _spec = spec;
        _machine = machine;
        _console = console;
    }

    public VmReport Report() => new()
    {
        Name = _spec.Name,
        Condition = _machine.Result is not null ? VmCondition.Stopped
            : _machine.IsRunning ? VmCondition.Running
            : VmCondition.Paused,
        Driver = _machine.DriverName,
        Pid = Environment.ProcessId,
        Cpus = _machine.CpuCount,
        MemoryBytes = _spec.MemoryBytes,
        UptimeSeconds = Stopwatch.GetElapsedTime(_start).TotalSeconds,
        CpuSeconds = Environment.CpuUsage.TotalTime.TotalSeconds,
        ResidentBytes = Environment.WorkingSet,
        Completed = _machine.CompletedInstructions,
        Vnc = _spec.Display.VncAddress ?? _spec.Display.VncSocket,
    };

    public void Pause() => _machine.Pause();

    public void Unpause() => _machine.Resume();

    public void PressPowerButton() => _machine.PressPowerButton();

    public void Reset() => _machine.Stop(MachineResult.For(StopReason.Reset, "reset by command"));

    public void InjectNmi() => _machine.InjectNmi();

    public void Quit() => _machine.Stop(MachineResult.For(StopReason.Quit));

    public void Screenshot(string path)
    {
        IDisplaySurface display = _machine.Display ?? throw new ControlException("this VM has no display");
        using FileStream file = File.Create(path);
        Vmm.Backends.Screen.Screenshot.WritePng(display, file);
    }

    public byte[] ScreenPng(int width)
    {
        IDisplaySurface display = _machine.Display ?? throw new ControlException("this VM has no display");
        using var png = new MemoryStream();
        Vmm.Backends.Screen.Screenshot.WritePng(display, png, width);
        return png.ToArray();
    }

    public byte[] ConsoleTail(int maximumBytes) => _console.Log.Tail(maximumBytes);

    public string ScreenText()
    {
        IDisplaySurface display = _machine.Display ?? throw new ControlException("this VM has no display");
        string[]? lines = Vmm.Backends.Screen.Screenshot.ReadText(display);
        return lines is null ? throw new ControlException("the screen is in a graphics mode") : string.Join('\n', lines);
    }

    public void SetMemory(long memoryBytes)
    {
        if (!_machine.TrySetMemory(memoryBytes))
        {
            throw new ControlException("this VM has no balloon");
        }
    }

    public long GuestMemory() => _machine.GuestMemoryBytes ?? throw new ControlException("this VM has no balloon");

    public void ChangeMedium(string drive, string? path, bool force)
    {
        if (!_machine.TryChangeMedium(drive, path, force, out string refusal))
        {
            throw new ControlException(refusal);
        }
    }

    public void Save(string path)
    {
        _machine.Pause();
        string next = path + ".new";
        try
        {
            using (FileStream file = File.Create(next))
            {
                _machine.Save(file);
                file.Flush(flushToDisk: true);
            }

            File.Move(next, path, overwrite: true);
        }
        catch
        {
            File.Delete(next);
            throw;
        }
    }
}

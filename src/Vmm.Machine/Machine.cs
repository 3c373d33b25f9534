// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;
using System.IO;
using System.Threading;
using System;
using Vmm.Config;
using Vmm.Backends.Block;
using Vmm.Core;
using Vmm.Devices.Storage;
using Vmm.Devices.Virtio;
using Vmm.Machine.Boot;
using Vmm.Memory;

namespace Vmm.Machine;

// Theory. A Machine is guest memory, address maps, a clock, devices and vCPU threads, put together by MachineBuilder. It is
// always in one of three conditions: paused (no vCPU runs, guest time stands still, devices are paused), running, or
// stopped (has a result; never runs again). Paused is where state may be looked at, saved, loaded and reset.
//
// Order when pausing: vCPUs park, then the clock stops, then devices pause; resuming goes the other way round. Requests to
// stop come from anywhere, often from a vCPU thread in the middle of a port write; they only set the result and wake
// whoever waits in Run, so that nothing is torn down under a caller's feet.
//
// Locks: _control serialises pause, resume, reset and stop among themselves. It is never taken on a vCPU or clock thread.

/// <summary>A virtual machine that has been put together. Thread-safe.</summary>
public sealed class Machine : IVcpuOwner, IDisposable
{
    private readonly Lock _control = new();
    private readonly MachineParts _parts;
    private readonly List<VcpuThread> _threads = [];
    private readonly ManualResetEventSlim _stopped = new(false);
    private MachineResult? _result;
    private int _deadHalts;
    private bool _running;
    private bool _started;
    private bool _disposed;

    internal Machine(MachineParts parts)
    {
        _parts = parts;
        for (int i = 0; i < parts.Vcpus.Count; i++)
        {
            ICpuInterruptPort? port = parts.Ports.Count > i ? parts.Ports[i] : null;
            int? processor = parts.Pin.Count > i ? parts.Pin[i] : null;
            _threads.Add(new VcpuThread(parts.Vcpus[i], port, parts.CpuSignature, processor, this, parts.Clock as InstructionClock));
        }
    }

    /// <summary>Guest memory.</summary>
    public GuestMemory Memory => _parts.Memory;

    /// <summary>A vCPU, for tests.</summary>
    internal IVcpu Vcpu(int index) => _threads[index].Vcpu;

    /// <summary>What was wrong with the disks' partition tables and boot catalogs when they were opened.</summary>
    public IReadOnlyList<MediaFinding> Findings => _parts.Findings;

    /// <summary>The screen, or null when the machine has none.</summary>
    public IDisplaySurface? Display => _parts.Display;

    /// <summary>Guest time.</summary>
    public IClock Clock => _parts.Clock;

    /// <summary>All devices, in the order of their making.</summary>
    public IReadOnlyList<IDevice> Devices => _parts.Devices;

    /// <summary>"kvm" or "soft".</summary>
    public string DriverName => _parts.Hypervisor.Name;

    /// <summary>Number of vCPUs.</summary>
    public int CpuCount => _threads.Count;

    /// <summary>True while vCPUs run.</summary>
    public bool IsRunning => Volatile.Read(ref _running);

    /// <summary>Instructions that the driver could not execute and the software CPU did: how often, by mnemonic. Any thread.</summary>
    public IReadOnlyDictionary<string, long> CompletedInstructions => _parts.Completer.Counts;

    /// <summary>The result once the machine has stopped.</summary>
    public MachineResult? Result => Volatile.Read(ref _result);

    /// <summary>Starts or continues.</summary>
    public void Resume()
    {
        lock (_control)
        {
            if (_running || Result is not null)
            {
                return;
            }

            foreach (IDevice device in _parts.Devices)
            {
                device.Resume();
            }

            _parts.Clock.Resume();
            Volatile.Write(ref _running, true);
            foreach (VcpuThread thread in _threads)
            {
                if (!_started)
                {
                    thread.Start();
                    thread.WaitParked();
                }

                thread.Continue();
            }

            _started = true;
        }
    }

    /// <summary>Stops guest time and execution; when it returns nothing moves any more.</summary>
    public void Pause()
    {
        lock (_control)
        {
            if (!_running)
            {
                return;
            }

            foreach (VcpuThread thread in _threads)
            {
                thread.RequestPause();
            }

            foreach (VcpuThread thread in _threads)
            {
                thread.WaitParked();
            }

            _parts.Clock.Pause();
            foreach (IDevice device in _parts.Devices)
            {
                device.Pause();
            }

            Volatile.Write(ref _running, false);
        }
    }

    /// <summary>Runs until something stops the machine.</summary>
    public MachineResult Run()
    {
        Resume();
        _stopped.Wait();
        return Result!;
    }

    /// <summary>Stops for good. Any thread, also a vCPU's; the first caller's reason counts.</summary>
    public void Stop(MachineResult result)
    {
        if (Interlocked.CompareExchange(ref _result, result, null) is null)
        {
            foreach (VcpuThread thread in _threads)
            {
                thread.RequestPause();
            }

            _stopped.Set();
        }
    }

    /// <summary>Writes the machine's state; it must be paused.</summary>
    /// <param name="stream">Receives the snapshot; need not seek.</param>
    /// <param name="progress">Told bytes of guest memory looked at, and their total.</param>
    /// <exception cref="InvalidOperationException">The machine is running.</exception>
    public void Save(Stream stream, Action<long, long>? progress = null)
    {
        lock (_control)
        {
            RequirePaused();
            Snapshot.Write(SnapshotParts(), stream, progress);
        }
    }

    /// <summary>Reads a state into this machine, which was built from the same definition and is paused.</summary>
    /// <exception cref="StateException">The snapshot is damaged or of another machine; dispose this one.</exception>
    public void Load(Stream stream)
    {
        lock (_control)
        {
            RequirePaused();
            Snapshot.Read(SnapshotParts(), stream);
        }
    }

    /// <summary>Presses the power button: asks the guest to shut down.</summary>
    /// <returns>False when the guest does not listen, so that asking is pointless.</returns>
    public bool PressPowerButton() => _parts.PowerButton?.Invoke() ?? false;

    /// <summary>
    /// Presses the NMI button, which leads to LINT1 of every processor's local APIC; who has not masked it there (Linux: the
    /// first) takes an NMI. A paused machine does when it goes on. Any thread.
    /// </summary>
    public void InjectNmi()
    {
        foreach (IIrqLine pin in _parts.NmiPins)
        {
            pin.Set(true);
            pin.Set(false);
        }

        if (_parts.NmiPins.Count == 0)
        {
            foreach (VcpuThread thread in _threads)
            {
                thread.RequestNmi();
            }
        }
    }

    /// <summary>
    /// Asks the guest to keep no more memory than that; it may take its time, or not do it at all. The balloon returns what
    /// the guest gives up to the host.
    /// </summary>
    /// <param name="memoryBytes">From 0 to the size of the machine's memory; larger values mean all of it.</param>
    /// <returns>False when the machine has no balloon.</returns>
    public bool TrySetMemory(long memoryBytes)
    {
        if (_parts.Balloon is not { } balloon)
        {
            return false;
        }

        long give = Math.Clamp((long)_parts.Layout.MemoryBytes - memoryBytes, 0, (long)_parts.Layout.MemoryBytes);
        balloon.TargetPages = (uint)(give / VirtioBalloon.PageBytes);
        return true;
    }

    /// <summary>Memory that the guest keeps, as it says itself, in bytes; null without a balloon.</summary>
    public long? GuestMemoryBytes => _parts.Balloon is { } balloon
        ? (long)_parts.Layout.MemoryBytes - ((long)balloon.ActualPages * VirtioBalloon.PageBytes)
        : null;

    /// <summary>Puts another disc into a CD-ROM drive, or none. Any thread but a vCPU's or a disk's.</summary>
    /// <param name="drive">"cdrom0" and so on, in the order of the definition.</param>
    /// <param name="path">The image; null takes the disc out.</param>
    /// <param name="force">Also when the guest has locked the tray.</param>
    /// <param name="refusal">One line for people when the answer is false.</param>
    public bool TryChangeMedium(string drive, string? path, bool force, out string refusal)
    {
        lock (_control)
        {
            if (!_parts.Cdroms.TryGetValue(drive, out AtapiCdrom? cdrom))
            {
                refusal = $"this VM has no drive {drive}; it has " +
                    (_parts.Cdroms.Count == 0 ? "no CD-ROM drive" : string.Join(", ", _parts.Cdroms.Keys));
                return false;
            }

            IBlockBackend? medium = null;
            try
            {
                medium = path is null ? null : BlockFactory.Open(new DiskSpec { Path = path, Bus = DiskBus.Cdrom }, drive);
            }
            catch (BootException e)
            {
                refusal = e.Message;
                return false;
            }

            if (!cdrom.TryChangeMedium(medium, force, out IBlockBackend? old))
            {
                medium?.Dispose();
                refusal = $"the guest has locked {drive}, and was asked to let go of the disc; try again, or use --force";
                return false;
            }

            if (medium is not null)
            {
                _parts.Resources.Add(medium);
            }

            if (old is not null)
            {
                _parts.Resources.Remove(old);
                old.Dispose();
            }

            refusal = string.Empty;
            return true;
        }
    }

    /// <summary>What the driver has counted; empty when it counts nothing. Any thread, until the machine is disposed.</summary>
    public IReadOnlyList<VmStatistic> ReadStatistics() => (_parts.Vm as IVmStatistics)?.ReadStatistics() ?? [];

    /// <summary>Reads what the driver logged into the page flags (display, snapshots).</summary>
    public void CollectDirty() => _parts.Slots.CollectDirty();

    /// <inheritdoc/>
    public void Dispose()
    {
        lock (_control)
        {
            if (_disposed)
            {
                return;
            }

            _disposed = true;
        }

        Stop(MachineResult.For(StopReason.Quit));
        foreach (VcpuThread thread in _threads)
        {
            thread.Dispose();
        }

        _parts.Clock.Dispose();
        for (int i = _parts.Devices.Count - 1; i >= 0; i--)
        {
            _parts.Devices[i].Dispose();
        }

        _parts.Vm.Dispose();
        foreach (IDisposable resource in _parts.Resources)
        {
            resource.Dispose();
        }

        _parts.Hypervisor.Dispose();
        _stopped.Dispose();
    }

    private void RequirePaused()
    {
        if (_running)
        {
            throw new InvalidOperationException("the machine is running");
        }
    }

    private SnapshotState SnapshotParts() => new(
        _parts.Vm,
        _parts.Vm.Irqchip,
        _threads,
        _parts.Devices,
        _parts.Blocks,
        _parts.Layout.MemoryBytes,
        _parts.Clock.NowNs,
        _parts.Clock.SetNow);

    /// <inheritdoc/>
    void IVcpuOwner.OnShutdown(VcpuThread thread) => Stop(MachineResult.For(
        StopReason.TripleFault, $"vCPU {thread.Vcpu.Index}: triple fault"));

    /// <inheritdoc/>
    void IVcpuOwner.OnFailed(VcpuThread thread, string message) => Stop(MachineResult.For(
        StopReason.Error, $"vCPU {thread.Vcpu.Index}: {message}"));

    /// <inheritdoc/>
    void IVcpuOwner.OnDeadHalt(VcpuThread thread, bool isDead)
    {
        int dead = isDead ? Interlocked.Increment(ref _deadHalts) : Interlocked.Decrement(ref _deadHalts);
        if (isDead && dead == _threads.Count)
        {
            var state = new CpuState();
            thread.Vcpu.ReadRegisters(state);
            Stop(MachineResult.For(
                StopReason.Halt, $"every vCPU has halted with interrupts off; the last was vCPU {thread.Vcpu.Index}, before 0x{state.Rip:x}"));
        }
    }

    /// <inheritdoc/>
    bool IVcpuOwner.TryComplete(VcpuThread thread, in VcpuExit exit, out string failure) =>
        _parts.Completer.TryComplete(thread.Vcpu, exit, out failure);
}

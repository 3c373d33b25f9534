// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Diagnostics;
using System.Threading;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Machine;

/// <summary>What a vCPU's thread asks of the machine around it. Called on that thread.</summary>
internal interface IVcpuOwner
{
    /// <summary>The processor shut down (triple fault).</summary>
    void OnShutdown(VcpuThread thread);

    /// <summary>The driver failed.</summary>
    void OnFailed(VcpuThread thread, string message);

    /// <summary>The processor sleeps with interrupts masked, or no longer does.</summary>
    void OnDeadHalt(VcpuThread thread, bool isDead);

    /// <summary>Executes one instruction that the driver cannot. False: it cannot be executed here either.</summary>
    bool TryComplete(VcpuThread thread, in VcpuExit exit, out string failure);
}

/// <summary>
/// The loop of one vCPU on a thread of its own: run, sleep through halts, start and stop on INIT and SIPI (when the
/// interrupt controllers are ours), park while the machine is paused. Everything that wakes a vCPU goes through
/// <see cref="Wake"/>, which is cheap and may be called under any lock.
/// </summary>
internal sealed class VcpuThread : ICpuWaker, IDisposable
{
    private const long FirstLookNs = 10_000;
    private const long MaxLookNs = 80_000;

    private readonly IVcpuOwner _owner;
    private readonly InstructionClock? _counter;
    private readonly ICpuInterruptPort? _port;
    private readonly uint _signature;
    private readonly int? _processor;
    private readonly Thread _thread;
    private readonly TimedWait _wait = new();
    private readonly CpuState _state = new();
    private readonly ManualResetEventSlim _parked = new(false);
    private volatile bool _stop;
    private volatile bool _pause = true;
    private volatile bool _sleeping;
    private volatile bool _nmi;
    private ActivityState _activity;
    private long _lookNs;

    /// <summary>Makes a thread that starts parked.</summary>
    /// <param name="vcpu">The processor; owned from now on.</param>
    /// <param name="port">Its interrupt port in User mode.</param>
    /// <param name="signature">CPUID leaf 1's EAX, which EDX holds after reset.</param>
    /// <param name="processor">The host's processor that it stays on; null: any.</param>
    /// <param name="owner">The machine.</param>
    /// <param name="counter">Guest time when this vCPU's instructions drive it.</param>
    public VcpuThread(
        IVcpu vcpu,
        ICpuInterruptPort? port,
        uint signature,
        int? processor,
        IVcpuOwner owner,
        InstructionClock? counter = null)
    {
        _counter = counter;
        Vcpu = vcpu;
        _port = port;
        _signature = signature;
        _processor = processor;
        _owner = owner;
        _thread = new Thread(Loop) { IsBackground = true, Name = $"vcpu{vcpu.Index}" };
        port?.Attach(this);
    }

    /// <summary>The processor. Its state may be read and written while the thread is parked.</summary>
    public IVcpu Vcpu { get; }

    /// <summary>
    /// Running, or waiting for INIT or a start-up IPI; meaningful in User mode while parked. Whether a running processor
    /// has halted is <see cref="Vcpu"/>'s to know, and changes with each interrupt: it is not kept here.
    /// </summary>
    public ActivityState Activity
    {
        get => _activity;
        set => _activity = value is ActivityState.Halted ? ActivityState.Running : value;
    }

    /// <summary>Exits since the start, for statistics.</summary>
    public long Exits { get; private set; }

    /// <summary>Starts the thread; it parks at once.</summary>
    public void Start() => _thread.Start();

    /// <inheritdoc/>
    public void Wake()
    {
        if (!_sleeping)
        {
            Vcpu.Kick();
        }

        _wait.Wake();
    }

    /// <summary>Pulses the NMI pin of a local APIC that the driver has, before the next entry. Any thread.</summary>
    public void RequestNmi()
    {
        _nmi = true;
        Wake();
    }

    /// <summary>Asks the thread to park. Follow with <see cref="WaitParked"/>.</summary>
    public void RequestPause()
    {
        _pause = true;
        Vcpu.Kick();
        _wait.Wake();
    }

    /// <summary>Waits until the thread is parked; returns at once on the thread itself.</summary>
    public void WaitParked()
    {
        if (Thread.CurrentThread != _thread)
        {
            _parked.Wait();
        }
    }

    /// <summary>Lets a parked thread go on.</summary>
    public void Continue()
    {
        _parked.Reset();
        _pause = false;
        _wait.Wake();
    }

    /// <summary>Ends the thread for good.</summary>
    public void RequestStop()
    {
        _stop = true;
        RequestPause();
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        RequestStop();
        if (_thread.IsAlive && Thread.CurrentThread != _thread)
        {
            _thread.Join();
        }

        Vcpu.Dispose();
        _wait.Dispose();
        _parked.Dispose();
    }

    private void Loop()
    {
        if (_processor is { } processor && !HostProcess.TryPinThread(processor))
        {
            _owner.OnFailed(this, $"cannot be pinned: the host has no processor {processor} for it");
        }

        var exit = default(VcpuExit);
        while (!_stop)
        {
            if (_pause)
            {
                Park();
                continue;
            }

            if (_port is not null && !Startup(_port))
            {
                Sleep();
                continue;
            }

            if (_nmi)
            {
                _nmi = false;
                (Vcpu as INmiPin)?.PulseNmi();
            }

            _counter?.RunDue();
            Exits++;
            switch (Vcpu.Run(ref exit))
            {
                case ExitKind.Interrupted:
                case ExitKind.Debug:
                    break;
                case ExitKind.Halted:
                    Halt(exit.InterruptsMasked);
                    break;
                case ExitKind.Shutdown:
                    _owner.OnShutdown(this);
                    break;
                case ExitKind.NeedsEmulation:
                    if (!_owner.TryComplete(this, exit, out string failure))
                    {
                        _owner.OnFailed(this, failure);
                        _pause = true;
                    }

                    break;
                default:
                    _owner.OnFailed(this, exit.Detail ?? $"the driver failed with code {exit.Code}");
                    _pause = true;
                    break;
            }
        }

        _parked.Set();
    }

    private void Park()
    {
        _parked.Set();
        while (_pause && !_stop)
        {
            _wait.Wait(-1);
        }
    }

    private void Halt(bool interruptsMasked)
    {
        if (_port is { HasInterrupt: true } && !interruptsMasked)
        {
            return;
        }

        if (interruptsMasked)
        {
            _owner.OnDeadHalt(this, true);
        }

        // Time that an instruction count drives passes at once.
        while (_counter is not null && !_pause && !_stop && _counter.Skip())
        {
            if (_port is { HasInterrupt: true } or { HasNmi: true } or { HasInit: true })
            {
                if (interruptsMasked)
                {
                    _owner.OnDeadHalt(this, false);
                }

                return;
            }
        }

        Sleep();
        if (interruptsMasked)
        {
            _owner.OnDeadHalt(this, false);
        }
    }

    // Wake() looks at _sleeping without a lock. It is set before the last look at what could be pending, and the wait
    // remembers a wake-up that came in between, so none is lost.
    private void Sleep()
    {
        _sleeping = true;
        if (!_pause && !_stop && !(_lookNs > 0 && _wait.Spin(_lookNs)))
        {
            long start = Stopwatch.GetTimestamp();
            _wait.Wait(-1);
            AdaptLook(Stopwatch.GetTimestamp() - start);
        }

        _sleeping = false;
    }

    // A guest that waits for a disk or an answer is often woken within the time that putting a thread to sleep and waking it
    // takes. Such a guest is looked after for a moment before its thread sleeps, as KVM does in the kernel (halt_poll_ns): a
    // short sleep makes the moment longer, one that was longer than the longest moment ends the habit.
    private void AdaptLook(long sleptTicks)
    {
        long sleptNs = sleptTicks * 1_000_000_000 / Stopwatch.Frequency;
        _lookNs = sleptNs > MaxLookNs || Environment.ProcessorCount == 1 ? 0 : Math.Clamp(_lookNs * 2, FirstLookNs, MaxLookNs);
    }

    // INIT and SIPI (SDM 3A 9.4). Returns false while the processor waits to be started.
    private bool Startup(ICpuInterruptPort port)
    {
        const uint timeStampCounter = 0x10;
        if (port.HasInit && port.TakeInit())
        {
            Vcpu.ReadState(_state);
            _state.Reset(isInit: true, _signature);
            _state.ApicBase = port.ApicBase;

            // It counts on: to write what was read some time ago would set it back.
            _state.Msrs.Remove(timeStampCounter);
            Vcpu.WriteState(_state);
            _activity = Vcpu.Index == 0 ? ActivityState.Running : ActivityState.WaitForStartup;
        }

        if (port.HasStartup && port.TakeStartup(out byte vector) && _activity is ActivityState.WaitForStartup)
        {
            Vcpu.ReadState(_state);
            SegmentState code = _state.Segments[1];
            code.Selector = (ushort)(vector << 8);
            code.Base = (ulong)vector << 12;
            _state.Segments[1] = code;
            _state.Rip = 0;
            _state.Activity = ActivityState.Running;
            _state.Msrs.Remove(timeStampCounter);
            Vcpu.WriteState(_state);
            _activity = ActivityState.Running;
        }

        return _activity is ActivityState.Running;
    }
}

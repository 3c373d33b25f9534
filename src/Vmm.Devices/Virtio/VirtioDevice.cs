// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Numerics;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>Set-up of one queue as the driver sees it.</summary>
public sealed class VirtioQueueSetup
{
    internal VirtioQueueSetup(ushort maxSize)
    {
        MaxSize = maxSize;
        Size = maxSize;
    }

    /// <summary>Largest size; 0 means that there is no such queue.</summary>
    public ushort MaxSize { get; }

    /// <summary>Size that the driver chose.</summary>
    public ushort Size { get; set; }

    /// <summary>Descriptor area.</summary>
    public ulong Descriptors { get; set; }

    /// <summary>Driver area.</summary>
    public ulong Driver { get; set; }

    /// <summary>Device area.</summary>
    public ulong Device { get; set; }

    /// <summary>The driver has enabled it.</summary>
    public bool Enabled { get; internal set; }

    /// <summary>A reset of this queue is under way (VIRTIO_F_RING_RESET).</summary>
    public bool Resetting { get; internal set; }

    internal void Reset()
    {
        Size = MaxSize;
        Descriptors = 0;
        Driver = 0;
        Device = 0;
        Enabled = false;
        Resetting = false;
    }
}

/// <summary>
/// The transport-independent half of a VirtIO device: status, features, queues, worker and saved state (VIRTIO 1.2 §2,
/// §3). Register calls come from vCPU threads under a short lock; model work happens on the worker (see the theory in
/// VirtioDefinitions.cs). Lifecycle calls (Reset, Pause, Resume, Save, Load, Dispose) come from the machine through the
/// transport, one at a time.
/// </summary>
public sealed class VirtioDevice : IDisposable
{
    private const VirtioStatus KnownStatus = VirtioStatus.Acknowledge | VirtioStatus.Driver | VirtioStatus.DriverOk
        | VirtioStatus.FeaturesOk | VirtioStatus.Failed;

    private const int Budget = 256; // chains per call of the worker
    private const int QuickBudget = 16; // chains per doorbell on the thread of a vCPU
    private const int QuickMicroseconds = 40; // about what waking a thread costs both sides
    private const int SlowPauseMs = 5;

    private readonly Lock _gate = new();
    private readonly Lock _runGate = new();
    private readonly IVirtioModel _model;
    private readonly VirtioQueueSetup[] _queues;
    private readonly IWorkSignal _signal;
    private readonly ManualResetEventSlim _parked = new(initialState: true);
    private readonly ManualResetEventSlim _resetDone = new(initialState: true);
    private readonly bool _inline;
    private readonly bool _quick;
    private readonly TimeProvider _time;
    private readonly ulong _offered;

    private IVirtioInterrupts? _interrupts;
    private Thread? _worker;
    private VirtioSession? _session;
    private VirtioStatus _status;
    private ulong _driverFeatures;
    private uint _generation;
    private ulong _pendingQueues;
    private ulong _pendingQueueResets;
    private ulong _pendingQueueStarts;
    private bool _pendingReset;
    private bool _pendingStart;
    private bool _paused = true;
    private bool _running;
    private bool _disposed;
    private long _ruleBreaks;
    private long _slowUntil; // of _time; under the run gate
    private long _served;

    /// <summary>Makes a device around a model, paused and reset.</summary>
    /// <param name="id">Name of the device, also of its worker thread.</param>
    /// <param name="model">Owned.</param>
    /// <param name="dma">Guest memory.</param>
    /// <param name="options">What to offer; defaults when null.</param>
    /// <param name="signal">How the worker sleeps; null for the built-in way. Owned.</param>
    public VirtioDevice(
        string id, IVirtioModel model, IDmaPort dma, VirtioOptions? options = null, IWorkSignal? signal = null)
    {
        ArgumentNullException.ThrowIfNull(model);
        options ??= new VirtioOptions();
        Id = id;
        Dma = dma;
        _model = model;
        _inline = options.Inline;
        _time = options.Time;
        _quick = options.QuickDoorbells && !options.Inline && model.IsQuick;
        _signal = signal ?? new MonitorWorkSignal();
        ReadOnlySpan<ushort> sizes = model.QueueSizes;
        ArgumentOutOfRangeException.ThrowIfGreaterThan(sizes.Length, 64, nameof(model));
        _queues = new VirtioQueueSetup[sizes.Length];
        for (int i = 0; i < sizes.Length; i++)
        {
            _queues[i] = new VirtioQueueSetup(sizes[i]);
        }

        _offered = model.OfferedFeatures | VirtioFeature.Version1
            | (options.Indirect ? VirtioFeature.RingIndirect : 0)
            | (options.EventIndex ? VirtioFeature.RingEventIndex : 0)
            | (options.Packed ? VirtioFeature.RingPacked : 0)
            | (options.InOrder ? VirtioFeature.InOrder : 0)
            | (options.RingReset ? VirtioFeature.RingReset : 0);
    }

    /// <summary>Name.</summary>
    public string Id { get; }

    /// <summary>Guest memory.</summary>
    public IDmaPort Dma { get; }

    /// <summary>The model.</summary>
    public IVirtioModel Model => _model;

    /// <summary>Number of queues.</summary>
    public int QueueCount => _queues.Length;

    /// <summary>Wakes the worker; a machine may tie a doorbell to it.</summary>
    public IWorkSignal Signal => _signal;

    /// <summary>Features for a modern driver.</summary>
    public ulong OfferedFeatures => _offered;

    /// <summary>Features for a legacy driver: 32 bits (§2.2.3, §6.3).</summary>
    public uint LegacyFeatures =>
        (uint)((_offered & ~_model.ModernOnlyFeatures) | VirtioFeature.NotifyOnEmpty | VirtioFeature.AnyLayout);

    /// <summary>What the driver wrote so far.</summary>
    public ulong DriverFeatures
    {
        get
        {
            lock (_gate)
            {
                return _driverFeatures;
            }
        }
    }

    /// <summary>Changes with the configuration space (§2.5.2).</summary>
    public uint ConfigGeneration => Volatile.Read(ref _generation);

    /// <summary>Status register. After a write of 0 it reads as before until the reset is complete.</summary>
    public VirtioStatus Status
    {
        get
        {
            lock (_gate)
            {
                return _status;
            }
        }
    }

    /// <summary>Times that a driver broke a rule of the specification.</summary>
    public long RuleBreaks => Interlocked.Read(ref _ruleBreaks);

    /// <summary>Doorbells that were served on the thread that rang (<see cref="VirtioOptions.QuickDoorbells"/>).</summary>
    public long ServedDoorbells => Interlocked.Read(ref _served);

    /// <summary>Says who turns signals into interrupts. Once, by the transport's constructor.</summary>
    public void Attach(IVirtioInterrupts interrupts) => _interrupts = interrupts;

    /// <summary>Set-up of a queue; null beyond the last.</summary>
    public VirtioQueueSetup? QueueSetup(int index) => (uint)index < (uint)_queues.Length ? _queues[index] : null;

    /// <summary>Reads 32 bits of the offered features (device_feature_select).</summary>
    public uint ReadFeatures(uint select) => select switch
    {
        0 => (uint)_offered,
        1 => (uint)(_offered >> 32),
        _ => 0,
    };

    /// <summary>Writes 32 bits of the driver's features; ignored after FEATURES_OK (§3.1.1).</summary>
    public void WriteDriverFeatures(uint select, uint value)
    {
        lock (_gate)
        {
            if ((_status & (VirtioStatus.FeaturesOk | VirtioStatus.DriverOk)) == 0)
            {
                _driverFeatures = select switch
                {
                    0 => (_driverFeatures & ~0xFFFF_FFFFUL) | value,
                    1 => (_driverFeatures & 0xFFFF_FFFFUL) | ((ulong)value << 32),
                    _ => _driverFeatures,
                };
            }
        }
    }

    /// <summary>Legacy drivers choose with one write and without FEATURES_OK.</summary>
    public void WriteLegacyFeatures(uint value)
    {
        lock (_gate)
        {
            if ((_status & VirtioStatus.DriverOk) == 0)
            {
                _driverFeatures = value & LegacyFeatures;
            }
        }
    }

    /// <summary>Writes the status register. 0 asks for a reset, which the worker performs.</summary>
    public void WriteStatus(byte value)
    {
        lock (_gate)
        {
            if (value == 0)
            {
                if (_status != 0 || _session is not null || _pendingStart)
                {
                    _pendingReset = true;
                    _resetDone.Reset();
                }
                else
                {
                    ResetRegisters();
                    return;
                }
            }
            else if (_pendingReset)
            {
                return;
            }
            else
            {
                AddStatus((VirtioStatus)value & KnownStatus);
            }
        }

        Wake();
    }

    /// <summary>
    /// Waits for a reset under way: for transports whose drivers do not read back the status (virtio-mmio, legacy PCI).
    /// </summary>
    /// <remarks>Gives up while the machine is being paused: the reset then happens when it goes on.</remarks>
    public void WaitForReset()
    {
        while (!_inline && !_resetDone.Wait(millisecondsTimeout: 5))
        {
            lock (_gate)
            {
                if (_paused || _disposed)
                {
                    return;
                }
            }
        }
    }

    /// <summary>The driver enables a queue (queue_enable, QueueReady).</summary>
    public void EnableQueue(int index)
    {
        if (QueueSetup(index) is not { } setup)
        {
            return;
        }

        bool broken;
        lock (_gate)
        {
            if (setup.Enabled || setup.MaxSize == 0 || _pendingReset)
            {
                return;
            }

            broken = !IsValid(setup);
            if (!broken)
            {
                setup.Enabled = true;
                if ((_status & VirtioStatus.DriverOk) != 0)
                {
                    _pendingQueueStarts |= 1UL << index;
                }
            }
        }

        if (broken)
        {
            OnRuleBreak();
        }
        else
        {
            Wake();
        }
    }

    /// <summary>The driver withdraws a queue: before DRIVER_OK at once, afterwards a queue reset (§2.6.1).</summary>
    public void ResetQueue(int index)
    {
        if (QueueSetup(index) is not { } setup)
        {
            return;
        }

        lock (_gate)
        {
            if (_session is null && !_pendingStart)
            {
                setup.Reset();
                return;
            }

            if (!setup.Enabled)
            {
                return;
            }

            setup.Resetting = true;
            _pendingQueueResets |= 1UL << index;
        }

        Wake();
    }

    /// <summary>A doorbell: the driver may have added to a queue.</summary>
    /// <param name="index">The queue; others are ignored.</param>
    /// <param name="legacy">A legacy driver may use the device before DRIVER_OK (§3.1.2).</param>
    public void NotifyQueue(int index, bool legacy = false)
    {
        if ((uint)index >= (uint)_queues.Length)
        {
            return;
        }

        if (legacy)
        {
            lock (_gate)
            {
                if (_session is null && !_pendingReset && _queues[index].Enabled)
                {
                    _pendingStart = true;
                }
            }
        }

        if (!_quick || !TryServe(index))
        {
            KickQueue(index);
        }
    }

    /// <summary>Reads configuration space; bytes beyond its end read as 0.</summary>
    public void ReadConfig(uint offset, Span<byte> into)
    {
        into.Clear();
        if (offset < _model.ConfigBytes)
        {
            _model.ReadConfig(offset, into[..Math.Min(into.Length, _model.ConfigBytes - (int)offset)]);
        }
    }

    /// <summary>Writes configuration space; bytes beyond its end vanish.</summary>
    public void WriteConfig(uint offset, ReadOnlySpan<byte> from)
    {
        if (offset < _model.ConfigBytes)
        {
            _model.WriteConfig(offset, from[..Math.Min(from.Length, _model.ConfigBytes - (int)offset)]);
        }
    }

    /// <summary>The machine resets the device; only while paused.</summary>
    public void Reset()
    {
        lock (_runGate)
        {
            FinishReset();
        }
    }

    /// <summary>Parks the worker with nothing in flight.</summary>
    public void Pause()
    {
        lock (_gate)
        {
            _paused = true;
        }

        if (_worker is null)
        {
            Park();
            return;
        }

        _signal.Set();
        _parked.Wait();
    }

    /// <summary>Starts or continues. Every queue is looked at, since doorbells may have been rung meanwhile.</summary>
    public void Resume()
    {
        lock (_gate)
        {
            _paused = false;
            _parked.Reset();
            if (_session is not null)
            {
                _pendingQueues = AllQueues();
            }

            if (!_inline && _worker is null)
            {
                _worker = new Thread(WorkerMain) { IsBackground = true, Name = "virtio " + Id };
                _worker.Start();
            }
        }

        Wake();
    }

    /// <summary>Writes everything; only while paused.</summary>
    public void Save(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_gate)
        {
            writer.Write("status", (ulong)_status);
            writer.Write("features", _driverFeatures);
            writer.Write("generation", _generation);
            writer.Write("running", _session is not null);
            writer.Write("pending-reset", _pendingReset);
            writer.Write("pending-start", _pendingStart);
            writer.Write("queues", (ulong)_queues.Length);
            for (int i = 0; i < _queues.Length; i++)
            {
                string prefix = $"q{i}.";
                VirtioQueueSetup setup = _queues[i];
                writer.Write(prefix + "size", setup.Size);
                writer.Write(prefix + "desc", setup.Descriptors);
                writer.Write(prefix + "driver", setup.Driver);
                writer.Write(prefix + "device", setup.Device);
                writer.Write(prefix + "enabled", setup.Enabled);
                writer.Write(prefix + "resetting", setup.Resetting);
                Virtqueue? ring = _session?.Queue(i);
                writer.Write(prefix + "live", ring is not null);
                if (ring is not null)
                {
                    writer.Write(prefix + "fault", (ulong)ring.Fault);
                    ring.Save(writer, prefix);
                }
            }
        }

        writer.Write("model-version", (ulong)_model.StateVersion);
        _model.Save(writer);
    }

    /// <summary>Restores everything; only while paused.</summary>
    /// <exception cref="StateException">The state does not fit this device.</exception>
    public void Load(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_runGate)
        {
            FinishReset();
            if (reader.ReadUInt64("queues") != (ulong)_queues.Length)
            {
                throw new StateException($"{reader.Section}: the saved device has another number of queues");
            }

            VirtioSession? session = null;
            lock (_gate)
            {
                _status = (VirtioStatus)reader.ReadByte("status");
                _driverFeatures = reader.ReadUInt64("features");
                _generation = reader.ReadUInt32("generation");
                _pendingReset = reader.ReadBoolean("pending-reset");
                _pendingStart = reader.ReadBoolean("pending-start");
                if ((_driverFeatures & ~(_offered | LegacyFeatures)) != 0)
                {
                    throw new StateException($"{reader.Section}: the guest uses features that this device lacks");
                }

                bool running = reader.ReadBoolean("running");
                var rings = new Virtqueue?[_queues.Length];
                for (int i = 0; i < _queues.Length; i++)
                {
                    rings[i] = LoadQueue(reader, i);
                }

                if (running)
                {
                    session = new VirtioSession(this, _driverFeatures, rings);
                }
            }

            _model.Load(reader, (int)reader.ReadBounded("model-version", int.MaxValue));
            if (session is not null)
            {
                _model.Start(session);
                lock (_gate)
                {
                    _session = session;
                    for (int i = 0; i < _queues.Length; i++)
                    {
                        if (_queues[i].Resetting)
                        {
                            _pendingQueueResets |= 1UL << i;
                        }
                        else if (_queues[i].Enabled && session.Queue(i) is null)
                        {
                            _pendingQueueStarts |= 1UL << i;
                        }
                    }
                }
            }
        }
    }

    /// <summary>Ends the worker, the session and the model.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            if (_disposed)
            {
                return;
            }

            _disposed = true;
        }

        _signal.Set();
        _worker?.Join();
        lock (_runGate)
        {
            EndSession();
        }

        _model.Dispose();
        _signal.Dispose();
        _parked.Dispose();
        _resetDone.Dispose();
    }

    internal void KickQueue(int index)
    {
        Interlocked.Or(ref _pendingQueues, 1UL << index);
        Wake();
    }

    internal void ConfigChanged()
    {
        Interlocked.Increment(ref _generation);
        if (Volatile.Read(ref _session) is not null)
        {
            _interrupts?.SignalConfig();
        }
    }

    private static bool IsAligned(ulong address, uint alignment) => (address & (alignment - 1)) == 0;

    private ulong AllQueues() => _queues.Length == 64 ? ulong.MaxValue : (1UL << _queues.Length) - 1;

    private Virtqueue? LoadQueue(StateReader reader, int index)
    {
        string prefix = $"q{index}.";
        VirtioQueueSetup setup = _queues[index];
        setup.Size = reader.ReadUInt16(prefix + "size"); // whatever the driver wrote; a queue that runs is checked below
        setup.Descriptors = reader.ReadUInt64(prefix + "desc");
        setup.Driver = reader.ReadUInt64(prefix + "driver");
        setup.Device = reader.ReadUInt64(prefix + "device");
        setup.Enabled = reader.ReadBoolean(prefix + "enabled");
        setup.Resetting = reader.ReadBoolean(prefix + "resetting");
        if (!reader.ReadBoolean(prefix + "live"))
        {
            return null;
        }

        if (!IsValid(setup))
        {
            throw new StateException($"{reader.Section}.{prefix}size: no queue runs with this size and place");
        }

        Virtqueue ring = CreateRing(index, setup);
        ring.Load(reader, prefix);
        if (reader.ReadBounded(prefix + "fault", (ulong)VirtqueueFault.BadRequest) != 0)
        {
            ring.Close();
        }

        return ring;
    }

    // §2.7: sizes of split rings are powers of two, tables are aligned; §2.8.10.1 for packed ones.
    private bool IsValid(VirtioQueueSetup setup)
    {
        bool packed = (_driverFeatures & VirtioFeature.RingPacked) != 0;
        return setup.Size > 0 && setup.Size <= setup.MaxSize
            && (packed || BitOperations.IsPow2(setup.Size))
            && IsAligned(setup.Descriptors, 16)
            && IsAligned(setup.Driver, packed ? 4u : 2u)
            && IsAligned(setup.Device, 4);
    }

    private Virtqueue CreateRing(int index, VirtioQueueSetup setup) => Virtqueue.Create(
        index,
        new VirtqueueLayout(setup.Size, setup.Descriptors, setup.Driver, setup.Device),
        _driverFeatures,
        Dma,
        queue => _interrupts?.SignalQueue(queue),
        _ => OnRuleBreak());

    private void AddStatus(VirtioStatus wanted)
    {
        VirtioStatus added = wanted & ~_status;
        if ((added & VirtioStatus.FeaturesOk) != 0 && !AcceptsFeatures(_driverFeatures))
        {
            added &= ~VirtioStatus.FeaturesOk; // §2.2.2: the driver reads back that it was refused
        }

        if ((added & VirtioStatus.DriverOk) != 0)
        {
            bool modern = (_driverFeatures & VirtioFeature.Version1) != 0;
            bool negotiated = ((_status | added) & VirtioStatus.FeaturesOk) != 0;
            if (modern && !negotiated)
            {
                added &= ~VirtioStatus.DriverOk;
            }
            else
            {
                _pendingStart |= _session is null;
            }
        }

        _status |= added;
    }

    private bool AcceptsFeatures(ulong features)
    {
        if ((features & ~_offered) != 0 || (features & VirtioFeature.Version1) == 0)
        {
            return false;
        }

        return _model.AcceptsFeatures(features);
    }

    private void OnRuleBreak()
    {
        Interlocked.Increment(ref _ruleBreaks);
        bool tell;
        lock (_gate)
        {
            _status |= VirtioStatus.NeedsReset;
            tell = (_status & VirtioStatus.DriverOk) != 0;
        }

        if (tell)
        {
            Interlocked.Increment(ref _generation);
            _interrupts?.SignalConfig(); // §2.1.2
        }
    }

    private void Wake()
    {
        if (_inline)
        {
            RunInline();
        }
        else
        {
            _signal.Set();
        }
    }

    // The thread that finds the device idle does the work; others only leave their mark, which that thread sees.
    private void RunInline()
    {
        for (; ; )
        {
            lock (_gate)
            {
                if (_running || _paused || _disposed || !HasWork())
                {
                    return;
                }

                _running = true;
            }

            RunOnce();
            lock (_gate)
            {
                _running = false;
            }
        }
    }

    private bool HasWork() =>
        _pendingReset || _pendingStart || (_session is not null
            && (_pendingQueueResets | _pendingQueueStarts | Volatile.Read(ref _pendingQueues)) != 0);

    private void WorkerMain()
    {
        for (; ; )
        {
            bool pause;
            bool work;
            lock (_gate)
            {
                if (_disposed)
                {
                    return;
                }

                pause = _paused && !_parked.IsSet;
                work = !_paused && HasWork();
            }

            if (pause)
            {
                Park();
            }
            else if (work)
            {
                RunOnce();
            }
            else
            {
                _signal.Wait();

                // A doorbell that is wired to the signal says that some queue has work, not which.
                if (Volatile.Read(ref _pendingQueues) == 0 && Volatile.Read(ref _session) is not null)
                {
                    Interlocked.Or(ref _pendingQueues, AllQueues());
                }
            }
        }
    }

    private void Park()
    {
        lock (_runGate)
        {
            if (_session is not null)
            {
                _model.Quiesce();
            }
        }

        _parked.Set();
    }

    private void RunOnce()
    {
        lock (_runGate)
        {
            bool reset;
            bool start;
            lock (_gate)
            {
                reset = _pendingReset;
                start = _pendingStart && !reset;
            }

            if (reset)
            {
                FinishReset();
                return;
            }

            if (start)
            {
                StartSession();
            }

            if (_session is not { } session)
            {
                return;
            }

            ResetQueues(session);
            StartQueues(session);
            ulong queues = Interlocked.Exchange(ref _pendingQueues, 0);
            while (queues != 0)
            {
                int index = BitOperations.TrailingZeroCount(queues);
                queues &= queues - 1;
                if (session.Queue(index) is not null && _model.Notify(index, Budget))
                {
                    Interlocked.Or(ref _pendingQueues, 1UL << index);
                }
            }
        }
    }

    // In the worker's place, unless it is at work, has something else to do first, or the model has been slow lately.
    private bool TryServe(int index)
    {
        if (!_runGate.TryEnter())
        {
            return false;
        }

        try
        {
            long start = _time.GetTimestamp();
            if (_session is not { } session || session.Queue(index) is null || start < _slowUntil)
            {
                return false;
            }

            lock (_gate)
            {
                if (_paused || _disposed || _pendingReset || _pendingStart || (_pendingQueueResets | _pendingQueueStarts) != 0)
                {
                    return false;
                }
            }

            bool again = _model.Notify(index, QuickBudget);
            long end = _time.GetTimestamp();
            if (end - start > QuickMicroseconds * _time.TimestampFrequency / 1_000_000)
            {
                _slowUntil = end + (SlowPauseMs * _time.TimestampFrequency / 1000);
            }

            Interlocked.Increment(ref _served);
            return !again;
        }
        finally
        {
            _runGate.Exit();
        }
    }

    private void StartSession()
    {
        VirtioSession session;
        lock (_gate)
        {
            _pendingStart = false;
            if (_session is not null)
            {
                return;
            }

            var rings = new Virtqueue?[_queues.Length];
            for (int i = 0; i < rings.Length; i++)
            {
                rings[i] = _queues[i].Enabled ? CreateRing(i, _queues[i]) : null;
            }

            session = new VirtioSession(this, _driverFeatures, rings);
        }

        _model.Start(session);
        Volatile.Write(ref _session, session);
        Interlocked.Or(ref _pendingQueues, AllQueues());
    }

    private void ResetQueues(VirtioSession session)
    {
        ulong resets;
        lock (_gate)
        {
            resets = _pendingQueueResets;
            _pendingQueueResets = 0;
        }

        if (resets == 0)
        {
            return;
        }

        _model.Quiesce();
        for (int i = 0; i < _queues.Length; i++)
        {
            if ((resets & (1UL << i)) == 0)
            {
                continue;
            }

            session.Queue(i)?.Close();
            session.Replace(i, null);
            _model.QueueChanged(i);
            lock (_gate)
            {
                _queues[i].Reset();
            }
        }

        Interlocked.Or(ref _pendingQueues, AllQueues()); // what quiescing put back
    }

    private void StartQueues(VirtioSession session)
    {
        for (int i = 0; i < _queues.Length; i++)
        {
            lock (_gate)
            {
                if ((_pendingQueueStarts & (1UL << i)) == 0)
                {
                    continue;
                }

                _pendingQueueStarts &= ~(1UL << i);
                if (!_queues[i].Enabled || session.Queue(i) is not null)
                {
                    continue;
                }

                session.Replace(i, CreateRing(i, _queues[i]));
            }

            _model.QueueChanged(i);
            Interlocked.Or(ref _pendingQueues, 1UL << i);
        }
    }

    // Under the run gate.
    private void FinishReset()
    {
        EndSession();
        _model.Reset();
        lock (_gate)
        {
            ResetRegisters();
        }

        _resetDone.Set();
    }

    private void EndSession()
    {
        if (_session is not { } session)
        {
            return;
        }

        _model.Quiesce();
        for (int i = 0; i < session.QueueCount; i++)
        {
            session.Queue(i)?.Close();
        }

        _model.Stop();
        Volatile.Write(ref _session, null);
    }

    private void ResetRegisters()
    {
        _status = VirtioStatus.None;
        _driverFeatures = 0;
        _pendingReset = false;
        _pendingStart = false;
        _pendingQueues = 0;
        _pendingQueueResets = 0;
        _pendingQueueStarts = 0;
        foreach (VirtioQueueSetup setup in _queues)
        {
            setup.Reset();
        }
    }

    /// <summary>A worker's sleep without help from the host: a flag and a monitor.</summary>
    private sealed class MonitorWorkSignal : IWorkSignal
    {
        private readonly object _monitor = new();
        private int _set;
        private bool _sleeping;

        public void Set()
        {
            if (Interlocked.Exchange(ref _set, 1) != 0)
            {
                return;
            }

            lock (_monitor)
            {
                if (_sleeping)
                {
                    Monitor.Pulse(_monitor);
                }
            }
        }

        public void Wait()
        {
            if (Interlocked.Exchange(ref _set, 0) != 0)
            {
                return;
            }

            lock (_monitor)
            {
                _sleeping = true;
                while (Volatile.Read(ref _set) == 0)
                {
                    Monitor.Wait(_monitor);
                }

                _sleeping = false;
                Volatile.Write(ref _set, 0);
            }
        }

        public void Dispose()
        {
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>
/// What a kind of VirtIO device does, without its bus. Start, Stop and Notify run on the device's worker, one at a time.
/// Configuration accesses come from vCPU threads at any time. Reset, Save and Load run while nothing else does.
/// </summary>
public interface IVirtioModel : IDisposable
{
    /// <summary>Device type, which a transport turns into identifiers.</summary>
    VirtioDeviceType Type { get; }

    /// <summary>Device-specific features (bits 0-23 and 50-127 of VIRTIO 1.2 §6); constant.</summary>
    ulong OfferedFeatures { get; }

    /// <summary>Features that only a modern driver may take (struct layouts that differ in legacy mode); constant.</summary>
    ulong ModernOnlyFeatures { get; }

    /// <summary>Largest size of each queue, a power of two; constant.</summary>
    ReadOnlySpan<ushort> QueueSizes { get; }

    /// <summary>Size of the configuration space in bytes; constant.</summary>
    int ConfigBytes { get; }

    /// <summary>Version of what <see cref="Save"/> writes.</summary>
    int StateVersion { get; }

    /// <summary>Checks a choice of features that depend on each other.</summary>
    /// <returns>False when the driver may not choose so; FEATURES_OK then stays clear.</returns>
    bool AcceptsFeatures(ulong features);

    /// <summary>Reads configuration; never called beyond <see cref="ConfigBytes"/>.</summary>
    void ReadConfig(uint offset, Span<byte> into);

    /// <summary>Writes configuration; never called beyond <see cref="ConfigBytes"/>.</summary>
    void WriteConfig(uint offset, ReadOnlySpan<byte> from);

    /// <summary>DRIVER_OK (§3.1.1), also after a load. The session is valid until <see cref="Stop"/>.</summary>
    void Start(VirtioSession session);

    /// <summary>A queue was (re-)enabled or reset after DRIVER_OK; the model forgets what it held of it.</summary>
    void QueueChanged(int queue);

    /// <summary>
    /// <see cref="Notify"/> waits for nothing and usually takes microseconds, so that it may run on the thread of the vCPU that
    /// rang the doorbell; constant.
    /// </summary>
    bool IsQuick { get; }

    /// <summary>The driver may have added to a queue. Bounded work.</summary>
    /// <param name="queue">Which.</param>
    /// <param name="budget">Chains to handle at most before others get their turn, 1 or more.</param>
    /// <returns>True when it stopped early and wants to be called again.</returns>
    bool Notify(int queue, int budget);

    /// <summary>
    /// Finishes or gives back every chain that is held, so that none is in flight: for pause, reset and saved state.
    /// Back ends that deliver input find no buffers until <see cref="Notify"/> is called again.
    /// </summary>
    void Quiesce();

    /// <summary>The session ends; called after <see cref="Quiesce"/>.</summary>
    void Stop();

    /// <summary>Back to what the constructor made.</summary>
    void Reset();

    /// <summary>Writes state beyond queues and features.</summary>
    void Save(StateWriter writer);

    /// <summary>Restores it.</summary>
    void Load(StateReader reader, int version);
}

/// <summary>What a model works with between DRIVER_OK and reset. Any thread.</summary>
public sealed class VirtioSession
{
    private readonly VirtioDevice _device;
    private readonly Virtqueue?[] _queues;

    internal VirtioSession(VirtioDevice device, ulong features, Virtqueue?[] queues)
    {
        _device = device;
        _queues = queues;
        Features = features;
    }

    /// <summary>What was negotiated.</summary>
    public ulong Features { get; }

    /// <summary>Guest memory.</summary>
    public IDmaPort Dma => _device.Dma;

    /// <summary>Number of queues, enabled or not.</summary>
    public int QueueCount => _queues.Length;

    /// <summary>True for a driver that speaks VIRTIO 1.0 or later.</summary>
    public bool IsModern => Has(VirtioFeature.Version1);

    /// <summary>A queue, or null while the driver has not enabled it.</summary>
    public Virtqueue? Queue(int index) => (uint)index < (uint)_queues.Length ? _queues[index] : null;

    /// <summary>True when all of these features were negotiated.</summary>
    public bool Has(ulong features) => (Features & features) == features;

    /// <summary>Has <see cref="IVirtioModel.Notify"/> called on the worker.</summary>
    public void Kick(int queue) => _device.KickQueue(queue);

    /// <summary>The configuration space changed: raises the generation and tells the driver.</summary>
    public void ConfigChanged() => _device.ConfigChanged();

    internal void Replace(int index, Virtqueue? queue) => _queues[index] = queue;
}

/// <summary>The common part of models: the notification loop with suppression and a bound, and empty defaults.</summary>
public abstract class VirtioModel : IVirtioModel
{
    private VirtioSession? _session;

    /// <inheritdoc/>
    public abstract VirtioDeviceType Type { get; }

    /// <inheritdoc/>
    public virtual ulong OfferedFeatures => 0;

    /// <inheritdoc/>
    public virtual ulong ModernOnlyFeatures => 0;

    /// <inheritdoc/>
    public abstract ReadOnlySpan<ushort> QueueSizes { get; }

    /// <inheritdoc/>
    public virtual int ConfigBytes => 0;

    /// <inheritdoc/>
    public virtual int StateVersion => 1;

    /// <summary>The running session; null before DRIVER_OK. Any thread, but only the worker may rely on it staying.</summary>
    protected VirtioSession? Session => System.Threading.Volatile.Read(ref _session);

    /// <inheritdoc/>
    public virtual bool AcceptsFeatures(ulong features) => true;

    /// <inheritdoc/>
    public virtual void ReadConfig(uint offset, Span<byte> into) => into.Clear();

    /// <inheritdoc/>
    public virtual void WriteConfig(uint offset, ReadOnlySpan<byte> from)
    {
    }

    /// <inheritdoc/>
    public virtual void Start(VirtioSession session) => System.Threading.Volatile.Write(ref _session, session);

    /// <inheritdoc/>
    public virtual void QueueChanged(int queue)
    {
    }

    /// <inheritdoc/>
    public virtual bool IsQuick => false;

    /// <inheritdoc/>
    public virtual bool Notify(int queue, int budget)
    {
        if (Session?.Queue(queue) is not { } ring)
        {
            return false;
        }

        ring.DisableNotify();
        for (; ; )
        {
            while (budget > 0 && ring.TryPop(out VirtqueueChain? chain))
            {
                budget--;
                Process(queue, ring, chain);
            }

            AfterBatch(queue, ring);
            if (budget == 0)
            {
                return true;
            }

            if (!ring.EnableNotify())
            {
                return false;
            }

            ring.DisableNotify();
        }
    }

    /// <inheritdoc/>
    public virtual void Quiesce()
    {
    }

    /// <inheritdoc/>
    public virtual void Stop() => System.Threading.Volatile.Write(ref _session, null);

    /// <inheritdoc/>
    public virtual void Reset()
    {
    }

    /// <inheritdoc/>
    public virtual void Save(StateWriter writer)
    {
    }

    /// <inheritdoc/>
    public virtual void Load(StateReader reader, int version)
    {
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        Dispose(disposing: true);
        GC.SuppressFinalize(this);
    }

    /// <summary>Handles a chain, which must be pushed now or later.</summary>
    protected virtual void Process(int queue, Virtqueue ring, VirtqueueChain chain)
    {
        ArgumentNullException.ThrowIfNull(ring);
        ring.Push(chain, 0);
    }

    /// <summary>Called when a batch of chains has been handled; tells the driver of what was pushed.</summary>
    protected virtual void AfterBatch(int queue, Virtqueue ring)
    {
        ArgumentNullException.ThrowIfNull(ring);
        ring.Flush();
    }

    /// <summary>Releases back ends that the model owns.</summary>
    protected virtual void Dispose(bool disposing)
    {
    }

    /// <summary>Copies a part of a configuration structure.</summary>
    protected static void CopyConfig(ReadOnlySpan<byte> config, uint offset, Span<byte> into)
    {
        into.Clear();
        if (offset < config.Length)
        {
            ReadOnlySpan<byte> from = config[(int)offset..];
            from[..Math.Min(from.Length, into.Length)].CopyTo(into);
        }
    }
}

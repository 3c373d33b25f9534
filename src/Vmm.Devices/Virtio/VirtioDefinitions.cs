// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.Devices.Virtio;

// Theory. A VirtIO device is three parts, and each is written once:
//
//   model      (IVirtioModel: VirtioBlock, VirtioNet, ...) knows what a request means. It sees queues of descriptor
//              chains and its own configuration space; it does not know what bus it sits on.
//   VirtioDevice  the state machine of VIRTIO 1.2 §2 and §3: status, feature negotiation, queue set-up, reset, saved
//              state, and the worker thread on which all of a model's queue work runs.
//   transport  (VirtioMmio, VirtioPci) turns register accesses into calls on VirtioDevice and its signals into
//              interrupts.
//
// Queues (Virtqueue: SplitVirtqueue, PackedVirtqueue) live in guest memory, which hostile vCPUs change at any time.
// Every field is therefore copied once and then checked on the copy; a chain is a private list of (address, length)
// before a model sees it. A rule that the driver breaks (index out of range, a loop, a writable part before a readable
// one, a ring outside RAM) ends in DEVICE_NEEDS_RESET (§2.1.2) and a counter, never in an exception. Work per
// notification is bounded (a budget of chains), so that one queue cannot starve the others or a reset.
//
// Threads. Register accesses come from vCPU threads and only take VirtioDevice's gate for a few assignments; a doorbell
// sets a bit and wakes the worker. A model's Start, Stop and Notify run on the worker, one at a time. A doorbell that comes
// as a register write (the software CPU) may find the device idle and its model quick: then the ringing thread takes the
// worker's place for a few chains (VirtioDevice.TryServe), which saves waking a thread; a request of 4 KiB that the host has
// in its cache takes less time than that. Whoever calls Notify holds the run gate, so it is still one at a time. A call
// that took long sends the doorbells of the next milliseconds to the worker, beside whom the vCPU goes on. Back ends complete
// requests on their own threads: Virtqueue.Push and Flush may be called from any thread (each queue has a lock that is
// held for ring bookkeeping only). After IVirtioModel.Stop has returned nothing of a session touches guest memory, which
// is why a reset first drains and then reads back as 0 (§4.1.4.3.1), and why saved state holds no request in flight.
//
// What it does not do: VIRTIO_F_ACCESS_PLATFORM (no IOMMU), SR-IOV, notification data, shared memory regions.

/// <summary>Device types (VIRTIO 1.2 §5).</summary>
public enum VirtioDeviceType : ushort
{
    /// <summary>Network card.</summary>
    Net = 1,

    /// <summary>Block device.</summary>
    Block = 2,

    /// <summary>Console.</summary>
    Console = 3,

    /// <summary>Entropy source.</summary>
    Rng = 4,

    /// <summary>Memory balloon.</summary>
    Balloon = 5,

    /// <summary>SCSI host.</summary>
    Scsi = 8,

    /// <summary>9P transport.</summary>
    NineP = 9,

    /// <summary>GPU.</summary>
    Gpu = 16,

    /// <summary>Input.</summary>
    Input = 18,

    /// <summary>Socket.</summary>
    Vsock = 19,
}

/// <summary>Device status bits (VIRTIO 1.2 §2.1).</summary>
[Flags]
public enum VirtioStatus : byte
{
    /// <summary>Reset.</summary>
    None = 0,

    /// <summary>The guest has noticed the device.</summary>
    Acknowledge = 1,

    /// <summary>The guest has a driver for it.</summary>
    Driver = 2,

    /// <summary>The driver is ready; the device runs.</summary>
    DriverOk = 4,

    /// <summary>Feature negotiation is complete.</summary>
    FeaturesOk = 8,

    /// <summary>The device met an error that only a reset ends.</summary>
    NeedsReset = 64,

    /// <summary>The driver has given up.</summary>
    Failed = 128,
}

/// <summary>Feature bits that every device type shares (VIRTIO 1.2 §6).</summary>
public static class VirtioFeature
{
    /// <summary>Legacy: notify even when the ring is empty (§6.3).</summary>
    public const ulong NotifyOnEmpty = 1UL << 24;

    /// <summary>Legacy: descriptors may be laid out in any way (§6.3).</summary>
    public const ulong AnyLayout = 1UL << 27;

    /// <summary>Indirect descriptors.</summary>
    public const ulong RingIndirect = 1UL << 28;

    /// <summary>used_event and avail_event.</summary>
    public const ulong RingEventIndex = 1UL << 29;

    /// <summary>Not a legacy device.</summary>
    public const ulong Version1 = 1UL << 32;

    /// <summary>Packed virtqueues.</summary>
    public const ulong RingPacked = 1UL << 34;

    /// <summary>Buffers are used in the order in which they were made available.</summary>
    public const ulong InOrder = 1UL << 35;

    /// <summary>Queues can be reset one by one.</summary>
    public const ulong RingReset = 1UL << 40;
}

/// <summary>What a transport does for a <see cref="VirtioDevice"/>. Any thread.</summary>
public interface IVirtioInterrupts
{
    /// <summary>Used buffers wait in a queue.</summary>
    void SignalQueue(int queue);

    /// <summary>The configuration changed, or the device needs a reset.</summary>
    void SignalConfig();
}

/// <summary>Puts the worker to sleep and wakes it. A machine with doorbells (ioeventfd) supplies its own.</summary>
public interface IWorkSignal : IDisposable
{
    /// <summary>Wakes the worker, or lets its next <see cref="Wait"/> return at once. Any thread; cheap.</summary>
    void Set();

    /// <summary>Sleeps until <see cref="Set"/>; several calls of it count as one. May also return for no reason.</summary>
    void Wait();
}

/// <summary>
/// A worker's sleep that the driver of virtual processors can end by itself: a guest's doorbell then wakes the worker without
/// passing through the card's registers.
/// </summary>
public interface IDoorbellSignal : IWorkSignal
{
    /// <summary>Says where the doorbells are; what was said before no longer counts. Must not wait for vCPUs.</summary>
    /// <param name="guestAddress">The first one, memory-mapped, written as 16 bits; null for nowhere.</param>
    /// <param name="count">How many.</param>
    /// <param name="strideBytes">Distance between two.</param>
    void Place(ulong? guestAddress, int count, uint strideBytes);
}

/// <summary>How a device offers itself.</summary>
public sealed record VirtioOptions
{
    /// <summary>Offer packed virtqueues.</summary>
    public bool Packed { get; init; }

    /// <summary>Offer VIRTIO_F_IN_ORDER.</summary>
    public bool InOrder { get; init; }

    /// <summary>Offer indirect descriptors.</summary>
    public bool Indirect { get; init; } = true;

    /// <summary>Offer used_event and avail_event.</summary>
    public bool EventIndex { get; init; } = true;

    /// <summary>Offer reset of single queues.</summary>
    public bool RingReset { get; init; } = true;

    /// <summary>
    /// Do queue work on the thread that rings the doorbell while the model is quick (<see cref="IVirtioModel.IsQuick"/>), so
    /// that a small request costs no hand-off between threads. For drivers whose doorbells come to the card's registers.
    /// </summary>
    public bool QuickDoorbells { get; init; }

    /// <summary>What tells quick doorbells from slow ones.</summary>
    public TimeProvider Time { get; init; } = TimeProvider.System;

    /// <summary>
    /// Do queue work on the thread that rings the doorbell instead of a worker: for tests and for machines that must
    /// repeat exactly.
    /// </summary>
    public bool Inline { get; init; }
}

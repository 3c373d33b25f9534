// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Pci;

namespace Vmm.Devices.Net;

/// <summary>
/// What the Ethernet cards that are not VirtIO have in common: a network that they own, a thread that transmits after a
/// write to a doorbell, received frames that come on the network's thread, and the way in which a frame that finds no
/// room waits.
/// </summary>
/// <remarks>
/// Locking: registers and rings are under <see cref="Gate"/>, which is held for one frame at most and never while the
/// network is called; so a network may deliver under a lock of its own. While paused nothing is transmitted and nothing
/// is taken: the network keeps what it has until <see cref="Resume"/>.
///
/// A frame without room: <see cref="Deliver"/> calls <see cref="Stall"/> and says no, and the register that gives the
/// card room again (the card knows which) calls <see cref="TakeStall"/> and then <see cref="ResumeReceive"/>. A card must
/// also leave its driver a reason to look, an interrupt: a driver that has acknowledged everything that it was told
/// of would wait for the card while the card waits for it.
/// </remarks>
public abstract class EthernetCard : PciFunction, INetReceiver
{
    private readonly NicWorker _worker;
    private readonly int _rxHeadroom;
    private bool _rxPaused = true;
    private bool _rxStalled;
    private long _droppedTx;
    private long _droppedRx;

    /// <summary>Makes a card on a network, which it owns. Nothing moves before the first <see cref="Resume"/>.</summary>
    /// <param name="id">Name.</param>
    /// <param name="identity">What PCI shows.</param>
    /// <param name="backend">The network.</param>
    /// <param name="mac">Six bytes.</param>
    /// <param name="rxHeadroom">Bytes that the card puts before a received frame.</param>
    /// <param name="inline">Transmit on the thread that writes the doorbell: for tests.</param>
    private protected EthernetCard(
        string id, in PciIdentity identity, INetBackend backend, ReadOnlySpan<byte> mac, int rxHeadroom, bool inline)
        : base(id, identity)
    {
        ArgumentNullException.ThrowIfNull(backend);
        ArgumentOutOfRangeException.ThrowIfNotEqual(mac.Length, 6, nameof(mac));
        Backend = backend;
        _rxHeadroom = rxHeadroom;
        RxFrame = new byte[rxHeadroom + NetFrames.MaxFrameBytes + 4];
        _worker = new NicWorker("nic " + id, Transmit, inline);
        UseIntx();
        backend.Attach(this);
    }

    /// <summary>Frames of the guest that were malformed or not in its memory.</summary>
    public long DroppedTransmit => Interlocked.Read(ref _droppedTx);

    /// <summary>Frames for the guest that its ring could not carry.</summary>
    public long DroppedReceive => Interlocked.Read(ref _droppedRx);

    /// <summary>Registers and rings.</summary>
    private protected Lock Gate { get; } = new();

    /// <summary>The network; never called under the gate.</summary>
    private protected INetBackend Backend { get; }

    /// <summary>Headroom, the frame that is being received, and room for its FCS.</summary>
    private protected byte[] RxFrame { get; }

    /// <summary>Where the address and the identity of the card are kept. Under the gate.</summary>
    private protected Eeprom93C46 Eeprom { get; } = new();

    /// <inheritdoc/>
    public sealed override void Pause()
    {
        _worker.Pause();
        lock (Gate)
        {
            _rxPaused = true;
        }
    }

    /// <inheritdoc/>
    public sealed override void Resume()
    {
        lock (Gate)
        {
            _rxPaused = false;
        }

        _worker.Resume();
        Backend.ResumeReceive();
    }

    /// <inheritdoc/>
    public bool TryReceive(ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        lock (Gate)
        {
            if (_rxPaused)
            {
                return false;
            }

            if (!Listens || frame.Length < 14 || frame.Length > NetFrames.MaxFrameBytes || !IsWanted(frame))
            {
                return true;
            }

            if (offload.SegmentKind == 0)
            {
                Span<byte> copy = RxFrame.AsSpan(_rxHeadroom, frame.Length);
                frame.CopyTo(copy);
                return !NetFrames.TryCompleteChecksum(copy, offload) || Deliver(frame.Length);
            }

            int position = 0;
            bool first = true;
            while (NetFrames.TryNextSegment(frame, offload, ref position, RxFrame.AsSpan(_rxHeadroom), out int length))
            {
                if (!Deliver(length))
                {
                    if (first)
                    {
                        return false;
                    }

                    DropReceived();
                    return true; // TCP sends the rest again
                }

                first = false;
            }

            return true;
        }
    }

    /// <summary>The driver has switched reception on. Under the gate.</summary>
    private protected abstract bool Listens { get; }

    /// <summary>The card's filters let a frame of at least 14 bytes through. Under the gate.</summary>
    private protected abstract bool IsWanted(ReadOnlySpan<byte> frame);

    /// <summary>
    /// Gives the driver the frame that lies in <see cref="RxFrame"/> behind the headroom. False, after
    /// <see cref="Stall"/>, when there is no room for it now. Under the gate.
    /// </summary>
    private protected abstract bool Deliver(int length);

    /// <summary>Sends what the driver has handed over. On the worker, without the gate.</summary>
    private protected abstract void Transmit();

    /// <summary>Registers as after power-on. Under the gate.</summary>
    private protected abstract void ResetRegisters();

    /// <summary>The driver wrote the doorbell. Not under the gate.</summary>
    private protected void KickTransmit() => _worker.Kick();

    /// <summary>There may be room again. Not under the gate.</summary>
    private protected void ResumeReceive() => Backend.ResumeReceive();

    /// <summary>A frame found no room. Under the gate.</summary>
    private protected void Stall() => _rxStalled = true;

    /// <summary>True once after <see cref="Stall"/>. Under the gate.</summary>
    private protected bool TakeStall()
    {
        bool stalled = _rxStalled;
        _rxStalled = false;
        return stalled;
    }

    private protected void DropReceived() => Interlocked.Increment(ref _droppedRx);

    private protected void DropTransmitted() => Interlocked.Increment(ref _droppedTx);

    /// <inheritdoc/>
    protected sealed override void ResetCard()
    {
        lock (Gate)
        {
            ResetRegisters();
        }
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            _worker.Dispose();
            Backend.Dispose();
        }

        base.Dispose(disposing);
    }
}

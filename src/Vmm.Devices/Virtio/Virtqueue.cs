// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics.CodeAnalysis;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>Why a queue stopped; for logs and counters.</summary>
public enum VirtqueueFault
{
    /// <summary>None.</summary>
    None,

    /// <summary>A ring, table or buffer lies outside RAM.</summary>
    BadAddress,

    /// <summary>An index exceeds its table.</summary>
    BadIndex,

    /// <summary>The available index runs further ahead than the queue is long.</summary>
    BadAvailable,

    /// <summary>A chain is longer than allowed, or a loop.</summary>
    ChainTooLong,

    /// <summary>A readable descriptor follows a writable one (§2.7.4.2).</summary>
    BadOrder,

    /// <summary>An indirect descriptor where none may be, or of a bad length (§2.7.5.3).</summary>
    BadIndirect,

    /// <summary>Ring addresses or sizes that §2.7 or §2.8 forbid.</summary>
    BadRing,

    /// <summary>The model found a request that its section of the specification forbids.</summary>
    BadRequest,
}

/// <summary>
/// One descriptor chain as it was when it was popped: private copies of addresses and lengths. Owned by whoever popped
/// it until <see cref="Virtqueue.Push"/>; one thread at a time.
/// </summary>
public sealed class VirtqueueChain
{
    private readonly IDmaPort _dma;
    private (ulong Address, uint Length)[] _buffers = new (ulong Address, uint Length)[8];
    private int _count;
    private int _readableCount;

    internal VirtqueueChain(IDmaPort dma) => _dma = dma;

    /// <summary>Bytes that the device may read.</summary>
    public long ReadableBytes { get; private set; }

    /// <summary>Bytes that the device may write.</summary>
    public long WritableBytes { get; private set; }

    /// <summary>Descriptors in the chain, without empty ones.</summary>
    public int Count => _count;

    /// <summary>For the model: what it wants to remember about the chain.</summary>
    public object? Tag { get; set; }

    internal ushort Id { get; set; }

    internal int Slots { get; set; }

    internal uint Sequence { get; set; }

    /// <summary>A buffer of the chain, readable ones first.</summary>
    /// <param name="index">Below <see cref="Count"/>.</param>
    public (ulong Address, uint Length, bool Writable) BufferAt(int index)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((uint)index, (uint)_count, nameof(index));
        return (_buffers[index].Address, _buffers[index].Length, index >= _readableCount);
    }

    /// <summary>Copies from the readable part.</summary>
    /// <returns>False when the range exceeds the part or a buffer lies outside RAM.</returns>
    public bool TryRead(long offset, Span<byte> into)
    {
        if (offset < 0 || into.Length > ReadableBytes - offset)
        {
            return false;
        }

        for (int i = 0; i < _readableCount && into.Length > 0; i++)
        {
            (ulong address, uint length) = _buffers[i];
            if (offset >= length)
            {
                offset -= length;
                continue;
            }

            int take = (int)Math.Min(length - offset, into.Length);
            if (!_dma.TryRead(address + (ulong)offset, into[..take]))
            {
                return false;
            }

            into = into[take..];
            offset = 0;
        }

        return true;
    }

    /// <summary>Copies into the writable part.</summary>
    /// <returns>False when the range exceeds the part or a buffer lies outside writable RAM.</returns>
    public bool TryWrite(long offset, ReadOnlySpan<byte> from)
    {
        if (offset < 0 || from.Length > WritableBytes - offset)
        {
            return false;
        }

        for (int i = _readableCount; i < _count && from.Length > 0; i++)
        {
            (ulong address, uint length) = _buffers[i];
            if (offset >= length)
            {
                offset -= length;
                continue;
            }

            int take = (int)Math.Min(length - offset, from.Length);
            if (!_dma.TryWrite(address + (ulong)offset, from[..take]))
            {
                return false;
            }

            from = from[take..];
            offset = 0;
        }

        return true;
    }

    /// <summary>Gets the pieces of RAM that a part of the chain covers, for zero-copy I/O.</summary>
    /// <param name="writable">The writable part; else the readable one.</param>
    /// <param name="offset">Start in that part.</param>
    /// <param name="lengthBytes">Length; must lie inside the part.</param>
    /// <param name="slices">Grown as needed and filled from 0.</param>
    /// <param name="count">How many are filled.</param>
    /// <returns>False when the range exceeds the part or a byte lies outside (writable) RAM.</returns>
    public bool TryGetSlices(bool writable, long offset, long lengthBytes, ref GuestSlice[] slices, out int count)
    {
        count = 0;
        long whole = writable ? WritableBytes : ReadableBytes;
        if (offset < 0 || lengthBytes < 0 || lengthBytes > whole - offset)
        {
            return false;
        }

        int last = writable ? _count : _readableCount;
        for (int i = writable ? _readableCount : 0; i < last && lengthBytes > 0; i++)
        {
            (ulong address, uint length) = _buffers[i];
            if (offset >= length)
            {
                offset -= length;
                continue;
            }

            long take = Math.Min(length - offset, lengthBytes);
            ulong at = address + (ulong)offset;
            lengthBytes -= take;
            offset = 0;
            while (take > 0)
            {
                int want = (int)Math.Min(take, int.MaxValue);
                if (!_dma.TryGetSlice(at, want, writable, out GuestSlice slice) || slice.LengthBytes <= 0)
                {
                    return false;
                }

                if (count == slices.Length)
                {
                    Array.Resize(ref slices, Math.Max(8, slices.Length * 2));
                }

                slices[count++] = slice;
                at += (ulong)slice.LengthBytes;
                take -= slice.LengthBytes;
            }
        }

        return true;
    }

    /// <summary>Marks the start of the writable part as dirty after a back end has filled its slices.</summary>
    public void MarkWritten(long lengthBytes)
    {
        for (int i = _readableCount; i < _count && lengthBytes > 0; i++)
        {
            (ulong address, uint length) = _buffers[i];
            int take = (int)Math.Min(Math.Min(length, lengthBytes), int.MaxValue);
            _dma.MarkWritten(address, take);
            lengthBytes -= take;
        }
    }

    internal void Clear()
    {
        _count = 0;
        _readableCount = 0;
        ReadableBytes = 0;
        WritableBytes = 0;
        Tag = null;
        Slots = 0;
    }

    // False for a readable buffer after a writable one.
    internal bool TryAdd(ulong address, uint length, bool writable)
    {
        if (!writable && _count != _readableCount)
        {
            return false;
        }

        if (length == 0)
        {
            return true;
        }

        if (_count == _buffers.Length)
        {
            Array.Resize(ref _buffers, _buffers.Length * 2);
        }

        _buffers[_count++] = (address, length);
        if (writable)
        {
            WritableBytes += length;
        }
        else
        {
            _readableCount++;
            ReadableBytes += length;
        }

        return true;
    }
}

/// <summary>Where a queue lies and how long it is; what a driver sets up (VIRTIO 1.2 §4.1.4.3).</summary>
/// <param name="Size">Number of entries.</param>
/// <param name="Descriptors">Descriptor table, or the packed ring.</param>
/// <param name="Driver">Available ring, or the driver event suppression structure.</param>
/// <param name="Device">Used ring, or the device event suppression structure.</param>
public readonly record struct VirtqueueLayout(ushort Size, ulong Descriptors, ulong Driver, ulong Device);

/// <summary>
/// The device side of a virtqueue. Any thread; a short lock per call. A queue that met a rule break
/// (<see cref="Fault"/>) hands out nothing more and swallows what is pushed.
/// </summary>
public abstract class Virtqueue
{
    /// <summary>Most descriptors of an indirect table that are accepted.</summary>
    public const int MaxIndirect = 1024;

    private readonly Stack<VirtqueueChain> _free = new();
    private readonly byte[] _indirect = new byte[MaxIndirect * 16];
    private readonly (VirtqueueChain? Chain, uint Written)[] _parked;
    private readonly Action<int> _signal;
    private readonly Action<Virtqueue> _onFault;
    private readonly bool _inOrder;
    private uint _popSequence;
    private uint _pushSequence;
    private bool _closed;

    /// <summary>Makes the common part.</summary>
    protected Virtqueue(
        int index, in VirtqueueLayout layout, ulong features, IDmaPort dma, Action<int> signal, Action<Virtqueue> onFault)
    {
        Index = index;
        Layout = layout;
        Dma = dma;
        _signal = signal;
        _onFault = onFault;
        HasEventIndex = (features & VirtioFeature.RingEventIndex) != 0;
        AllowsIndirect = (features & VirtioFeature.RingIndirect) != 0;
        NotifyOnEmpty = (features & (VirtioFeature.NotifyOnEmpty | VirtioFeature.Version1)) == VirtioFeature.NotifyOnEmpty;
        _inOrder = (features & VirtioFeature.InOrder) != 0;
        _parked = _inOrder ? new (VirtqueueChain? Chain, uint Written)[layout.Size] : [];
    }

    /// <summary>Number of the queue in its device.</summary>
    public int Index { get; }

    /// <summary>Place and size.</summary>
    public VirtqueueLayout Layout { get; }

    /// <summary>What stopped it.</summary>
    public VirtqueueFault Fault { get; private set; }

    /// <summary>Chains that were popped and not yet pushed.</summary>
    public int InFlight => (int)(_popSequence - _pushSequence) - ParkedCount;

    /// <summary>True when popping would find something. A hint: the driver may add at any time.</summary>
    public bool HasAvailable
    {
        get
        {
            lock (Gate)
            {
                return !IsStopped && PeekAvailable();
            }
        }
    }

    /// <summary>Guest memory.</summary>
    protected IDmaPort Dma { get; }

    /// <summary>Guards ring bookkeeping.</summary>
    protected Lock Gate { get; } = new();

    /// <summary>VIRTIO_F_EVENT_IDX was negotiated.</summary>
    protected bool HasEventIndex { get; }

    /// <summary>VIRTIO_F_INDIRECT_DESC was negotiated.</summary>
    protected bool AllowsIndirect { get; }

    /// <summary>Legacy VIRTIO_F_NOTIFY_ON_EMPTY was negotiated.</summary>
    protected bool NotifyOnEmpty { get; }

    /// <summary>Nothing may be read or written any more.</summary>
    protected bool IsStopped => _closed || Fault != VirtqueueFault.None;

    private int ParkedCount { get; set; }

    /// <summary>Makes the kind of queue that was negotiated.</summary>
    public static Virtqueue Create(
        int index, in VirtqueueLayout layout, ulong features, IDmaPort dma, Action<int> signal, Action<Virtqueue> onFault) =>
        (features & VirtioFeature.RingPacked) != 0
            ? new PackedVirtqueue(index, layout, features, dma, signal, onFault)
            : new SplitVirtqueue(index, layout, features, dma, signal, onFault);

    /// <summary>Takes the next chain.</summary>
    public bool TryPop([NotNullWhen(true)] out VirtqueueChain? chain)
    {
        chain = null;
        VirtqueueFault fault;
        lock (Gate)
        {
            if (IsStopped)
            {
                return false;
            }

            // A driver has at most Size chains outstanding; more would be unbounded memory here.
            if (_popSequence - _pushSequence >= Layout.Size)
            {
                if (!PeekAvailable())
                {
                    return false;
                }

                fault = VirtqueueFault.BadAvailable;
                Fault = fault;
            }
            else if (TryPopLocked(out chain, out fault))
            {
                return true;
            }
            else if (fault == VirtqueueFault.None)
            {
                return false;
            }
            else
            {
                Fault = fault;
            }
        }

        _onFault(this);
        return false;
    }

    /// <summary>Puts the chain that was popped last back, as if it had never been taken.</summary>
    public void Unpop(VirtqueueChain chain)
    {
        ArgumentNullException.ThrowIfNull(chain);
        lock (Gate)
        {
            if (chain.Sequence != _popSequence - 1)
            {
                throw new InvalidOperationException("only the chain that was popped last can be put back");
            }

            _popSequence--;
            Untake(chain);
            _free.Push(chain);
        }
    }

    /// <summary>Gives a chain back to the driver. The driver is told at the next <see cref="Flush"/>.</summary>
    /// <param name="chain">From <see cref="TryPop"/>; not to be touched afterwards.</param>
    /// <param name="writtenBytes">Bytes written to its writable part.</param>
    public void Push(VirtqueueChain chain, uint writtenBytes)
    {
        ArgumentNullException.ThrowIfNull(chain);
        VirtqueueFault fault = VirtqueueFault.None;
        lock (Gate)
        {
            if (!_inOrder)
            {
                fault = Give(chain, writtenBytes);
            }
            else
            {
                // §2.7.9 and §2.8.9, in-order use: what completes early waits for what was made available before it.
                _parked[chain.Sequence % (uint)_parked.Length] = (chain, writtenBytes);
                ParkedCount++;
                while (_parked[_pushSequence % (uint)_parked.Length].Chain is { } next && fault == VirtqueueFault.None)
                {
                    uint written = _parked[_pushSequence % (uint)_parked.Length].Written;
                    _parked[_pushSequence % (uint)_parked.Length] = default;
                    ParkedCount--;
                    fault = Give(next, written);
                }
            }

            if (fault != VirtqueueFault.None)
            {
                Fault = fault;
            }
        }

        if (fault != VirtqueueFault.None)
        {
            _onFault(this);
        }
    }

    /// <summary>Interrupts the driver if it asked to be told about what was pushed since the last time.</summary>
    public void Flush()
    {
        bool wanted;
        lock (Gate)
        {
            wanted = !IsStopped && ShouldSignal();
        }

        if (wanted)
        {
            _signal(Index);
        }
    }

    /// <summary><see cref="Push"/> and <see cref="Flush"/>.</summary>
    public void Complete(VirtqueueChain chain, uint writtenBytes)
    {
        Push(chain, writtenBytes);
        Flush();
    }

    /// <summary>Asks the driver not to ring the doorbell (§2.7.10, §2.8.10); it may all the same.</summary>
    public void DisableNotify()
    {
        lock (Gate)
        {
            if (!IsStopped)
            {
                SetNotify(false);
            }
        }
    }

    /// <summary>Asks for doorbells again.</summary>
    /// <returns>True when chains arrived meanwhile that no doorbell will announce.</returns>
    public bool EnableNotify()
    {
        lock (Gate)
        {
            if (IsStopped)
            {
                return false;
            }

            SetNotify(true);
            Interlocked.MemoryBarrier(); // the request must be visible before the ring is looked at again (§2.7.10.1)
            return PeekAvailable();
        }
    }

    /// <summary>The model found that the driver broke a rule: the device needs a reset.</summary>
    public void Break(VirtqueueFault fault)
    {
        lock (Gate)
        {
            if (IsStopped)
            {
                return;
            }

            Fault = fault;
        }

        _onFault(this);
    }

    /// <summary>Ends the queue: nothing touches guest memory through it afterwards.</summary>
    public void Close()
    {
        lock (Gate)
        {
            _closed = true;
        }
    }

    /// <summary>Writes the positions; nothing may be in flight.</summary>
    public abstract void Save(StateWriter writer, string prefix);

    /// <summary>Restores the positions.</summary>
    public abstract void Load(StateReader reader, string prefix);

    /// <summary>Under the gate: fills the next chain. False with no fault means there is none.</summary>
    protected abstract bool TryTake(VirtqueueChain chain, out VirtqueueFault fault);

    /// <summary>Under the gate: takes back the effect of the last <see cref="TryTake"/>.</summary>
    protected abstract void Untake(VirtqueueChain chain);

    /// <summary>Under the gate: writes a used entry.</summary>
    protected abstract VirtqueueFault WriteUsed(VirtqueueChain chain, uint writtenBytes);

    /// <summary>Under the gate: decides about an interrupt for what was used since the last call.</summary>
    protected abstract bool ShouldSignal();

    /// <summary>Under the gate: tells the driver whether doorbells are wanted.</summary>
    protected abstract void SetNotify(bool enabled);

    /// <summary>Under the gate: looks for an available chain.</summary>
    protected abstract bool PeekAvailable();

    /// <summary>Reads an indirect table in one copy and adds its descriptors.</summary>
    protected VirtqueueFault AddIndirect(VirtqueueChain chain, ulong address, uint lengthBytes, bool followNext)
    {
        if (!AllowsIndirect || lengthBytes == 0 || lengthBytes % 16 != 0 || lengthBytes > MaxIndirect * 16)
        {
            return VirtqueueFault.BadIndirect;
        }

        Span<byte> table = _indirect.AsSpan(0, (int)lengthBytes);
        if (!Dma.TryRead(address, table))
        {
            return VirtqueueFault.BadAddress;
        }

        int entries = (int)lengthBytes / 16;
        int index = 0;
        for (int steps = 0; steps < entries; steps++)
        {
            var descriptor = new VirtqueueDescriptor(table.Slice(index * 16, 16), packed: !followNext);
            if (descriptor.IsIndirect)
            {
                return VirtqueueFault.BadIndirect;
            }

            if (!chain.TryAdd(descriptor.Address, descriptor.Length, descriptor.IsWritable))
            {
                return VirtqueueFault.BadOrder;
            }

            if (!followNext)
            {
                index++; // packed: the table is the list, flags say only "writable" (§2.8.7)
            }
            else if (!descriptor.HasNext)
            {
                return VirtqueueFault.None;
            }
            else if (descriptor.Next >= entries)
            {
                return VirtqueueFault.BadIndex;
            }
            else
            {
                index = descriptor.Next;
            }
        }

        return followNext ? VirtqueueFault.ChainTooLong : VirtqueueFault.None;
    }

    private bool TryPopLocked([NotNullWhen(true)] out VirtqueueChain? chain, out VirtqueueFault fault)
    {
        VirtqueueChain candidate = _free.TryPop(out VirtqueueChain? free) ? free : new VirtqueueChain(Dma);
        candidate.Clear();
        if (TryTake(candidate, out fault))
        {
            candidate.Sequence = _popSequence++;
            chain = candidate;
            return true;
        }

        _free.Push(candidate);
        chain = null;
        return false;
    }

    private VirtqueueFault Give(VirtqueueChain chain, uint writtenBytes)
    {
        _pushSequence++;
        VirtqueueFault fault = IsStopped ? VirtqueueFault.None : WriteUsed(chain, writtenBytes);
        chain.Tag = null;
        _free.Push(chain);
        return fault;
    }
}

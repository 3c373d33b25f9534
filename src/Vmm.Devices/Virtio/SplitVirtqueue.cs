// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>A copy of a 16-byte descriptor.</summary>
internal readonly ref struct VirtqueueDescriptor
{
    internal const ushort FlagNext = 1;
    internal const ushort FlagWrite = 2;
    internal const ushort FlagIndirect = 4;

    private readonly ushort _flags;

    // Split (§2.7.5): address, length, flags, next. Packed (§2.8.1): address, length, id, flags.
    internal VirtqueueDescriptor(ReadOnlySpan<byte> raw, bool packed)
    {
        Address = BinaryPrimitives.ReadUInt64LittleEndian(raw);
        Length = BinaryPrimitives.ReadUInt32LittleEndian(raw[8..]);
        ushort third = BinaryPrimitives.ReadUInt16LittleEndian(raw[12..]);
        ushort fourth = BinaryPrimitives.ReadUInt16LittleEndian(raw[14..]);
        _flags = packed ? fourth : third;
        Next = packed ? third : fourth;
    }

    internal ulong Address { get; }

    internal uint Length { get; }

    // Packed: the buffer identifier.
    internal ushort Next { get; }

    internal bool HasNext => (_flags & FlagNext) != 0;

    internal bool IsWritable => (_flags & FlagWrite) != 0;

    internal bool IsIndirect => (_flags & FlagIndirect) != 0;
}

/// <summary>
/// Split virtqueue (VIRTIO 1.2 §2.7): a descriptor table, a ring of heads that the driver makes available, and a ring of
/// heads that the device has used. Indices are 16 bits and wrap freely; the difference to the driver's may never exceed
/// the size.
/// </summary>
public sealed class SplitVirtqueue : Virtqueue
{
    private const ushort AvailNoInterrupt = 1;
    private const ushort UsedNoNotify = 1;

    private ushort _lastAvail;
    private ushort _seenAvail;
    private ushort _usedIndex;
    private int _usedSinceSignal;

    /// <summary>Makes one at position 0.</summary>
    public SplitVirtqueue(
        int index, in VirtqueueLayout layout, ulong features, IDmaPort dma, Action<int> signal, Action<Virtqueue> onFault)
        : base(index, layout, features, dma, signal, onFault)
    {
    }

    private ulong AvailEventAddress => Layout.Device + 4 + (8UL * Layout.Size);

    private ulong UsedEventAddress => Layout.Driver + 4 + (2UL * Layout.Size);

    /// <inheritdoc/>
    public override void Save(StateWriter writer, string prefix)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (Gate)
        {
            writer.Write(prefix + "avail", _lastAvail);
            writer.Write(prefix + "used", _usedIndex);
            writer.Write(prefix + "unsignalled", (long)_usedSinceSignal);
        }
    }

    /// <inheritdoc/>
    public override void Load(StateReader reader, string prefix)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (Gate)
        {
            _lastAvail = reader.ReadUInt16(prefix + "avail");
            _seenAvail = _lastAvail;
            _usedIndex = reader.ReadUInt16(prefix + "used");
            _usedSinceSignal = (int)reader.ReadBounded(prefix + "unsignalled", ushort.MaxValue);
        }
    }

    /// <inheritdoc/>
    protected override bool TryTake(VirtqueueChain chain, out VirtqueueFault fault)
    {
        ArgumentNullException.ThrowIfNull(chain);
        fault = VirtqueueFault.None;
        if (_seenAvail == _lastAvail && !TryRefresh(out fault))
        {
            return false;
        }

        ulong slot = (uint)(_lastAvail % Layout.Size);
        if (!TryRead16(Layout.Driver + 4 + (2 * slot), out ushort head))
        {
            fault = VirtqueueFault.BadAddress;
            return false;
        }

        chain.Id = head;
        fault = Walk(chain, head);
        if (fault != VirtqueueFault.None)
        {
            return false;
        }

        _lastAvail++;
        return true;
    }

    /// <inheritdoc/>
    protected override void Untake(VirtqueueChain chain) => _lastAvail--;

    /// <inheritdoc/>
    protected override VirtqueueFault WriteUsed(VirtqueueChain chain, uint writtenBytes)
    {
        ArgumentNullException.ThrowIfNull(chain);
        Span<byte> entry = stackalloc byte[8];
        BinaryPrimitives.WriteUInt32LittleEndian(entry, chain.Id);
        BinaryPrimitives.WriteUInt32LittleEndian(entry[4..], writtenBytes);
        ulong slot = (uint)(_usedIndex % Layout.Size);
        if (!Dma.TryWrite(Layout.Device + 4 + (8 * slot), entry))
        {
            return VirtqueueFault.BadAddress;
        }

        _usedIndex++;
        _usedSinceSignal = Math.Min(_usedSinceSignal + 1, ushort.MaxValue);
        Volatile.WriteBarrier(); // data and entry before the index (§2.7.8.1)
        return TryWrite16(Layout.Device + 2, _usedIndex) ? VirtqueueFault.None : VirtqueueFault.BadAddress;
    }

    /// <inheritdoc/>
    protected override bool ShouldSignal()
    {
        int added = _usedSinceSignal;
        if (added == 0)
        {
            return false;
        }

        _usedSinceSignal = 0;
        Interlocked.MemoryBarrier(); // the used index must be visible before the driver's wish is read (§2.7.7.2)
        if (NotifyOnEmpty && !PeekAvailable())
        {
            return true;
        }

        if (!HasEventIndex)
        {
            return !TryRead16(Layout.Driver, out ushort flags) || (flags & AvailNoInterrupt) == 0;
        }

        // vring_need_event of §2.7.10: did the index pass used_event?
        return !TryRead16(UsedEventAddress, out ushort wanted)
            || (ushort)(_usedIndex - wanted - 1) < (ushort)added;
    }

    /// <inheritdoc/>
    protected override void SetNotify(bool enabled)
    {
        if (!HasEventIndex)
        {
            TryWrite16(Layout.Device, enabled ? (ushort)0 : UsedNoNotify);
        }
        else if (enabled)
        {
            TryWrite16(AvailEventAddress, _lastAvail);
        }
    }

    /// <inheritdoc/>
    protected override bool PeekAvailable() =>
        _seenAvail != _lastAvail || (TryRead16(Layout.Driver + 2, out ushort index) && index != _lastAvail);

    private bool TryRefresh(out VirtqueueFault fault)
    {
        fault = VirtqueueFault.None;
        if (!TryRead16(Layout.Driver + 2, out ushort index))
        {
            fault = VirtqueueFault.BadAddress;
            return false;
        }

        if ((ushort)(index - _lastAvail) > Layout.Size)
        {
            fault = VirtqueueFault.BadAvailable;
            return false;
        }

        _seenAvail = index;
        Volatile.ReadBarrier(); // the index before what it announces (§2.7.13.3)
        return index != _lastAvail;
    }

    private VirtqueueFault Walk(VirtqueueChain chain, ushort head)
    {
        Span<byte> raw = stackalloc byte[16];
        int index = head;
        for (int steps = 0; steps < Layout.Size; steps++)
        {
            if (index >= Layout.Size)
            {
                return VirtqueueFault.BadIndex;
            }

            if (!Dma.TryRead(Layout.Descriptors + (16UL * (uint)index), raw))
            {
                return VirtqueueFault.BadAddress;
            }

            var descriptor = new VirtqueueDescriptor(raw, packed: false);
            if (descriptor.IsIndirect)
            {
                return descriptor.HasNext
                    ? VirtqueueFault.BadIndirect
                    : AddIndirect(chain, descriptor.Address, descriptor.Length, followNext: true);
            }

            if (!chain.TryAdd(descriptor.Address, descriptor.Length, descriptor.IsWritable))
            {
                return VirtqueueFault.BadOrder;
            }

            if (!descriptor.HasNext)
            {
                return VirtqueueFault.None;
            }

            index = descriptor.Next;
        }

        return VirtqueueFault.ChainTooLong;
    }

    private bool TryRead16(ulong address, out ushort value)
    {
        Span<byte> bytes = stackalloc byte[2];
        bool ok = Dma.TryRead(address, bytes);
        value = BinaryPrimitives.ReadUInt16LittleEndian(bytes);
        return ok;
    }

    private bool TryWrite16(ulong address, ushort value)
    {
        Span<byte> bytes = stackalloc byte[2];
        BinaryPrimitives.WriteUInt16LittleEndian(bytes, value);
        return Dma.TryWrite(address, bytes);
    }
}

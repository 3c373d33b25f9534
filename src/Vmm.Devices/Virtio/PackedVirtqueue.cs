// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>
/// Packed virtqueue (VIRTIO 1.2 §2.8): one ring of descriptors in which both sides overwrite each other's entries. Two
/// flag bits, compared with a wrap counter that flips at each turn, say whose a descriptor is. The identifier of a
/// buffer stands in the last descriptor of its chain and comes back in one used descriptor, after which the device skips
/// as many places as the chain had.
/// </summary>
public sealed class PackedVirtqueue : Virtqueue
{
    private const ushort FlagAvail = 1 << 7;
    private const ushort FlagUsed = 1 << 15;
    private const ushort EventDisable = 1;
    private const ushort EventDescriptor = 2;

    private ushort _next;
    private bool _nextWrap = true;
    private ushort _used;
    private bool _usedWrap = true;
    private int _usedSinceSignal;

    /// <summary>Makes one at position 0, wrap counters 1 (§2.8.1).</summary>
    public PackedVirtqueue(
        int index, in VirtqueueLayout layout, ulong features, IDmaPort dma, Action<int> signal, Action<Virtqueue> onFault)
        : base(index, layout, features, dma, signal, onFault)
    {
    }

    /// <inheritdoc/>
    public override void Save(StateWriter writer, string prefix)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (Gate)
        {
            writer.Write(prefix + "next", _next);
            writer.Write(prefix + "next-wrap", _nextWrap);
            writer.Write(prefix + "used", _used);
            writer.Write(prefix + "used-wrap", _usedWrap);
            writer.Write(prefix + "unsignalled", (long)_usedSinceSignal);
        }
    }

    /// <inheritdoc/>
    public override void Load(StateReader reader, string prefix)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (Gate)
        {
            _next = (ushort)reader.ReadBounded(prefix + "next", Layout.Size - 1UL);
            _nextWrap = reader.ReadBoolean(prefix + "next-wrap");
            _used = (ushort)reader.ReadBounded(prefix + "used", Layout.Size - 1UL);
            _usedWrap = reader.ReadBoolean(prefix + "used-wrap");
            _usedSinceSignal = (int)reader.ReadBounded(prefix + "unsignalled", ushort.MaxValue);
        }
    }

    /// <inheritdoc/>
    protected override bool TryTake(VirtqueueChain chain, out VirtqueueFault fault)
    {
        ArgumentNullException.ThrowIfNull(chain);
        fault = VirtqueueFault.None;
        if (!TryReadFlags(_next, out ushort first))
        {
            fault = VirtqueueFault.BadAddress;
            return false;
        }

        if (!IsAvailable(first, _nextWrap))
        {
            return false;
        }

        Volatile.ReadBarrier(); // the flags before the rest (§2.8.21.3.1)
        Span<byte> raw = stackalloc byte[16];
        int index = _next;
        bool wrap = _nextWrap;
        for (int steps = 1; steps <= Layout.Size; steps++)
        {
            if (!Dma.TryRead(Layout.Descriptors + (16UL * (uint)index), raw))
            {
                fault = VirtqueueFault.BadAddress;
                return false;
            }

            if (++index == Layout.Size)
            {
                index = 0;
                wrap = !wrap;
            }

            var descriptor = new VirtqueueDescriptor(raw, packed: true);
            if (descriptor.IsIndirect)
            {
                // §2.8.7: an indirect descriptor stands alone.
                fault = descriptor.HasNext || steps != 1
                    ? VirtqueueFault.BadIndirect
                    : AddIndirect(chain, descriptor.Address, descriptor.Length, followNext: false);
            }
            else if (!chain.TryAdd(descriptor.Address, descriptor.Length, descriptor.IsWritable))
            {
                fault = VirtqueueFault.BadOrder;
            }

            if (fault != VirtqueueFault.None)
            {
                return false;
            }

            if (!descriptor.HasNext)
            {
                chain.Id = descriptor.Next;
                chain.Slots = steps;
                _next = (ushort)index;
                _nextWrap = wrap;
                return true;
            }
        }

        fault = VirtqueueFault.ChainTooLong;
        return false;
    }

    /// <inheritdoc/>
    protected override void Untake(VirtqueueChain chain)
    {
        ArgumentNullException.ThrowIfNull(chain);
        int index = _next - chain.Slots;
        if (index < 0)
        {
            index += Layout.Size;
            _nextWrap = !_nextWrap;
        }

        _next = (ushort)index;
    }

    /// <inheritdoc/>
    protected override VirtqueueFault WriteUsed(VirtqueueChain chain, uint writtenBytes)
    {
        ArgumentNullException.ThrowIfNull(chain);
        ulong at = Layout.Descriptors + (16UL * _used);
        Span<byte> body = stackalloc byte[6];
        BinaryPrimitives.WriteUInt32LittleEndian(body, writtenBytes);
        BinaryPrimitives.WriteUInt16LittleEndian(body[4..], chain.Id);
        if (!Dma.TryWrite(at + 8, body))
        {
            return VirtqueueFault.BadAddress;
        }

        ushort flags = _usedWrap ? (ushort)(FlagAvail | FlagUsed) : (ushort)0;
        if (writtenBytes != 0)
        {
            flags |= VirtqueueDescriptor.FlagWrite;
        }

        Volatile.WriteBarrier(); // length and id before the flags (§2.8.21.4)
        Span<byte> raw = stackalloc byte[2];
        BinaryPrimitives.WriteUInt16LittleEndian(raw, flags);
        if (!Dma.TryWrite(at + 14, raw))
        {
            return VirtqueueFault.BadAddress;
        }

        int index = _used + chain.Slots;
        if (index >= Layout.Size)
        {
            index -= Layout.Size;
            _usedWrap = !_usedWrap;
        }

        _used = (ushort)index;
        _usedSinceSignal = Math.Min(_usedSinceSignal + chain.Slots, ushort.MaxValue);
        return VirtqueueFault.None;
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
        Interlocked.MemoryBarrier(); // used descriptors before the driver's wish is read (§2.8.14)
        Span<byte> raw = stackalloc byte[4];
        if (!Dma.TryRead(Layout.Driver, raw))
        {
            return true;
        }

        ushort flags = (ushort)(BinaryPrimitives.ReadUInt16LittleEndian(raw[2..]) & 3);
        if (flags == EventDisable)
        {
            return false;
        }

        if (flags != EventDescriptor || !HasEventIndex || added >= Layout.Size)
        {
            return true;
        }

        ushort offsetWrap = BinaryPrimitives.ReadUInt16LittleEndian(raw);
        int wanted = offsetWrap & 0x7FFF;
        if (((offsetWrap & 0x8000) != 0) != _usedWrap)
        {
            wanted -= Layout.Size;
        }

        return (ushort)(_used - wanted - 1) < (ushort)added;
    }

    /// <inheritdoc/>
    protected override void SetNotify(bool enabled)
    {
        Span<byte> raw = stackalloc byte[4];
        ushort offsetWrap = (ushort)(_next | (_nextWrap ? 0x8000 : 0));
        ushort flags = !enabled ? EventDisable : HasEventIndex ? EventDescriptor : (ushort)0;
        BinaryPrimitives.WriteUInt16LittleEndian(raw, offsetWrap);
        BinaryPrimitives.WriteUInt16LittleEndian(raw[2..], flags);
        Dma.TryWrite(Layout.Device, raw);
    }

    /// <inheritdoc/>
    protected override bool PeekAvailable() =>
        TryReadFlags(_next, out ushort flags) && IsAvailable(flags, _nextWrap);

    private static bool IsAvailable(ushort flags, bool wrap) =>
        ((flags & FlagAvail) != 0) == wrap && ((flags & FlagUsed) != 0) != wrap;

    private bool TryReadFlags(ushort index, out ushort flags)
    {
        Span<byte> raw = stackalloc byte[2];
        bool ok = Dma.TryRead(Layout.Descriptors + (16UL * index) + 14, raw);
        flags = BinaryPrimitives.ReadUInt16LittleEndian(raw);
        return ok;
    }
}

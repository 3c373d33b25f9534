// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using Vmm.Core;

namespace Vmm.TestKit;

/// <summary>A buffer of a chain as a driver describes it.</summary>
public readonly record struct DriverBuffer(ulong Address, uint Length, bool DeviceWrites);

/// <summary>
/// The driver side of a virtqueue, split or packed, written from VIRTIO 1.2 §2.7 and §2.8 and independent of the device
/// side's code. One thread.
/// </summary>
public sealed class VirtqueueDriver
{
    private const ushort Next = 1;
    private const ushort Write = 2;
    private const ushort Indirect = 4;
    private const ushort PackedAvail = 1 << 7;
    private const ushort PackedUsed = 1 << 15;

    private readonly TestRam _ram;
    private readonly bool _packed;
    private readonly Stack<ushort> _freeIds = new();
    private readonly Dictionary<ushort, ushort[]> _inFlight = [];
    private ushort _availIndex;
    private ushort _usedSeen;
    private ushort _next;
    private bool _nextWrap = true;
    private bool _usedWrap = true;
    private ushort _packedUsed;
    private int _freePackedSlots;

    /// <summary>Lays a queue out at an address (4 KiB aligned).</summary>
    public VirtqueueDriver(TestRam ram, ulong area, ushort size, bool packed)
    {
        _ram = ram;
        _packed = packed;
        Size = size;
        Descriptors = area;
        Driver = area + (16UL * size);
        Device = (Driver + 6 + (2UL * size) + 4095) & ~4095UL;
        End = (Device + 6 + (8UL * size) + 4095) & ~4095UL;
        _freePackedSlots = size;
        _ram.Bytes[(int)area..(int)End].Clear();
        for (int i = size - 1; i >= 0; i--)
        {
            _freeIds.Push((ushort)i);
        }
    }

    public ushort Size { get; }

    public ulong Descriptors { get; }

    public ulong Driver { get; }

    public ulong Device { get; }

    /// <summary>First free address after the queue.</summary>
    public ulong End { get; }

    /// <summary>The next free-running available index (split).</summary>
    public ushort AvailIndex => _availIndex;

    /// <summary>Chains that the device has not given back.</summary>
    public int InFlight => _inFlight.Count;

    /// <summary>Split: true while the device asks for doorbells (flag only).</summary>
    public bool DeviceWantsNotify =>
        _packed ? (_ram.ReadNumber(Device + 2, 2) & 3) != 1 : (_ram.ReadNumber(Device, 2) & 1) == 0;

    /// <summary>Split: avail_event as the device wrote it.</summary>
    public ushort AvailEvent => (ushort)_ram.ReadNumber(Device + 4 + (8UL * Size), 2);

    /// <summary>Split: asks for an interrupt when the device passes this used index (EVENT_IDX).</summary>
    public void SetUsedEvent(ushort value) => _ram.WriteNumber(Driver + 4 + (2UL * Size), 2, value);

    /// <summary>Split: VIRTQ_AVAIL_F_NO_INTERRUPT. Packed: RING_EVENT_FLAGS.</summary>
    public void SetInterruptFlag(ushort value) => _ram.WriteNumber(_packed ? Driver + 2 : Driver, 2, value);

    /// <summary>Packed: off_wrap of the driver's event suppression.</summary>
    public void SetPackedEvent(ushort offset, bool wrap) =>
        _ram.WriteNumber(Driver, 2, (ulong)(offset | (wrap ? 0x8000 : 0)));

    /// <summary>Makes a chain available.</summary>
    /// <returns>Its identifier, which comes back in <see cref="TryTakeUsed"/>.</returns>
    public ushort Add(params DriverBuffer[] buffers) => _packed ? AddPacked(buffers) : AddSplit(buffers);

    /// <summary>Makes a chain available through an indirect table at an address.</summary>
    public ushort AddIndirect(ulong table, params DriverBuffer[] buffers)
    {
        for (int i = 0; i < buffers.Length; i++)
        {
            ushort flags = buffers[i].DeviceWrites ? Write : (ushort)0;
            if (_packed)
            {
                PutRaw(table + (16UL * (uint)i), buffers[i].Address, buffers[i].Length, 0, flags);
            }
            else
            {
                bool last = i == buffers.Length - 1;
                PutRaw(
                    table + (16UL * (uint)i),
                    buffers[i].Address,
                    buffers[i].Length,
                    last ? flags : (ushort)(flags | Next),
                    (ushort)(last ? 0 : i + 1));
            }
        }

        return PublishIndirect(table, (uint)buffers.Length * 16);
    }

    /// <summary>Makes a chain available whose table the test has written itself.</summary>
    public ushort PublishIndirect(ulong table, uint length)
    {
        ushort id = _freeIds.Pop();
        if (_packed)
        {
            PutPacked([(table, length, Indirect)], id);
        }
        else
        {
            PutRaw(Descriptors + (16UL * id), table, length, Indirect, 0);
            PublishHead(id);
            _inFlight[id] = [id];
        }

        return id;
    }

    /// <summary>Split: puts a head into the available ring as it is, valid or not.</summary>
    public void PublishHead(ushort head)
    {
        _ram.WriteNumber(Driver + 4 + (2UL * (uint)(_availIndex % Size)), 2, head);
        _availIndex++;
        _ram.WriteNumber(Driver + 2, 2, _availIndex);
    }

    /// <summary>Writes a descriptor as it is (split: flags then next; packed: id then flags).</summary>
    public void PutRaw(ulong at, ulong address, uint length, ushort third, ushort fourth)
    {
        _ram.WriteNumber(at, 8, address);
        _ram.WriteNumber(at + 8, 4, length);
        _ram.WriteNumber(at + 12, 2, third);
        _ram.WriteNumber(at + 14, 2, fourth);
    }

    /// <summary>Takes the next used chain.</summary>
    public bool TryTakeUsed(out ushort id, out uint length)
    {
        if (_packed)
        {
            ulong at = Descriptors + (16UL * _packedUsed);
            ushort flags = (ushort)_ram.ReadNumber(at + 14, 2);
            bool avail = (flags & PackedAvail) != 0;
            bool used = (flags & PackedUsed) != 0;
            id = (ushort)_ram.ReadNumber(at + 12, 2);
            length = (uint)_ram.ReadNumber(at + 8, 4);
            if (avail != used || used != _usedWrap)
            {
                return false;
            }

            if (!_inFlight.Remove(id, out ushort[]? slots))
            {
                throw new InvalidOperationException($"the device used buffer {id}, which is not in flight");
            }

            _packedUsed += (ushort)slots.Length;
            if (_packedUsed >= Size)
            {
                _packedUsed -= Size;
                _usedWrap = !_usedWrap;
            }

            _freePackedSlots += slots.Length;
            _freeIds.Push(id);
            return true;
        }

        id = 0;
        length = 0;
        if ((ushort)_ram.ReadNumber(Device + 2, 2) == _usedSeen)
        {
            return false;
        }

        ulong entry = Device + 4 + (8UL * (uint)(_usedSeen % Size));
        id = (ushort)_ram.ReadNumber(entry, 4);
        length = (uint)_ram.ReadNumber(entry + 4, 4);
        _usedSeen++;
        if (!_inFlight.Remove(id, out ushort[]? chain))
        {
            throw new InvalidOperationException($"the device used head {id}, which is not in flight");
        }

        foreach (ushort descriptor in chain)
        {
            _freeIds.Push(descriptor);
        }

        return true;
    }

    /// <summary>Waits for the next used chain of a device that works on its own thread.</summary>
    public (ushort Id, uint Length) WaitUsed(int timeoutMs = 10_000)
    {
        long end = Environment.TickCount64 + timeoutMs;
        while (Environment.TickCount64 < end)
        {
            if (TryTakeUsed(out ushort id, out uint length))
            {
                return (id, length);
            }

            System.Threading.Thread.Yield();
        }

        throw new TimeoutException("no used buffer");
    }

    private ushort AddSplit(DriverBuffer[] buffers)
    {
        var ids = new ushort[buffers.Length];
        for (int i = 0; i < ids.Length; i++)
        {
            ids[i] = _freeIds.Pop();
        }

        for (int i = 0; i < ids.Length; i++)
        {
            bool last = i == ids.Length - 1;
            ushort flags = (ushort)((buffers[i].DeviceWrites ? Write : 0) | (last ? 0 : Next));
            PutRaw(
                Descriptors + (16UL * ids[i]), buffers[i].Address, buffers[i].Length, flags, last ? (ushort)0 : ids[i + 1]);
        }

        _inFlight[ids[0]] = ids;
        PublishHead(ids[0]);
        return ids[0];
    }

    private ushort AddPacked(DriverBuffer[] buffers)
    {
        ushort id = _freeIds.Pop();
        var entries = new (ulong Address, uint Length, ushort Flags)[buffers.Length];
        for (int i = 0; i < buffers.Length; i++)
        {
            bool last = i == buffers.Length - 1;
            entries[i] = (buffers[i].Address, buffers[i].Length,
                (ushort)((buffers[i].DeviceWrites ? Write : 0) | (last ? 0 : Next)));
        }

        PutPacked(entries, id);
        return id;
    }

    private void PutPacked((ulong Address, uint Length, ushort Flags)[] entries, ushort id)
    {
        if (_freePackedSlots < entries.Length)
        {
            throw new InvalidOperationException("the packed ring is full");
        }

        _freePackedSlots -= entries.Length;
        ulong head = Descriptors + (16UL * _next);
        ushort headFlags = 0;
        Span<byte> raw = stackalloc byte[16];
        for (int i = 0; i < entries.Length; i++)
        {
            ushort flags = (ushort)(entries[i].Flags | (_nextWrap ? PackedAvail : PackedUsed));
            BinaryPrimitives.WriteUInt64LittleEndian(raw, entries[i].Address);
            BinaryPrimitives.WriteUInt32LittleEndian(raw[8..], entries[i].Length);
            BinaryPrimitives.WriteUInt16LittleEndian(raw[12..], id);
            BinaryPrimitives.WriteUInt16LittleEndian(raw[14..], flags);
            ulong at = Descriptors + (16UL * _next);
            if (i == 0)
            {
                headFlags = flags;
                _ram.TryWrite(at, raw[..14]);
            }
            else
            {
                _ram.TryWrite(at, raw);
            }

            if (++_next == Size)
            {
                _next = 0;
                _nextWrap = !_nextWrap;
            }
        }

        _ram.WriteNumber(head + 14, 2, headFlags);
        _inFlight[id] = new ushort[entries.Length];
    }
}

/// <summary>Drives a virtio-mmio device as a guest would (VIRTIO 1.2 §4.2.3): negotiation, queues, doorbells.</summary>
public sealed class VirtioMmioDriver
{
    /// <summary>VIRTIO_F_RING_PACKED.</summary>
    public const ulong RingPacked = 1UL << 34;

    /// <summary>VIRTIO_F_VERSION_1.</summary>
    public const ulong Version1 = 1UL << 32;

    private readonly Dictionary<int, VirtqueueDriver> _queues = [];
    private readonly IRegisterWindow _window;
    private readonly TestRam _ram;
    private ulong _free;

    /// <summary>Makes one; queues are allocated upwards from an address.</summary>
    public VirtioMmioDriver(IRegisterWindow window, TestRam ram, ulong queueArea = 0x1000)
    {
        _window = window;
        _ram = ram;
        _free = queueArea;
    }

    public byte Status
    {
        get => (byte)Read(0x70);
        set => Write(0x70, value);
    }

    public ulong Features { get; private set; }

    public uint InterruptStatus => Read(0x60);

    public VirtqueueDriver this[int queue] => _queues[queue];

    public uint Read(uint offset) => (uint)_window.Read(offset, AccessWidth.Dword);

    public void Write(uint offset, uint value) => _window.Write(offset, AccessWidth.Dword, value);

    public ulong ReadConfig(uint offset, AccessWidth width) => _window.Read(0x100 + offset, width);

    public void WriteConfig(uint offset, AccessWidth width, ulong value) => _window.Write(0x100 + offset, width, value);

    public ulong OfferedFeatures()
    {
        Write(0x14, 0);
        ulong low = Read(0x10);
        Write(0x14, 1);
        return low | ((ulong)Read(0x10) << 32);
    }

    /// <summary>Reset to FEATURES_OK. False when the device refused.</summary>
    public bool Negotiate(ulong wanted)
    {
        Status = 0;
        Status = 1;
        Status = 3;
        Features = (OfferedFeatures() & wanted) | Version1;
        Write(0x24, 0);
        Write(0x20, (uint)Features);
        Write(0x24, 1);
        Write(0x20, (uint)(Features >> 32));
        Status = 11;
        return (Status & 8) != 0;
    }

    /// <summary>Lays out and enables a queue.</summary>
    public VirtqueueDriver Enable(int queue, ushort size = 0)
    {
        Write(0x30, (uint)queue);
        uint most = Read(0x34);
        var ring = new VirtqueueDriver(_ram, _free, size == 0 ? (ushort)most : size, (Features & RingPacked) != 0);
        _free = ring.End;
        Point(queue, ring);
        _queues[queue] = ring;
        return ring;
    }

    /// <summary>Tells the device where a queue is and enables it.</summary>
    public void Point(int queue, VirtqueueDriver ring)
    {
        Write(0x30, (uint)queue);
        Write(0x38, ring.Size);
        Write(0x80, (uint)ring.Descriptors);
        Write(0x84, (uint)(ring.Descriptors >> 32));
        Write(0x90, (uint)ring.Driver);
        Write(0x94, (uint)(ring.Driver >> 32));
        Write(0xA0, (uint)ring.Device);
        Write(0xA4, (uint)(ring.Device >> 32));
        Write(0x44, 1);
    }

    /// <summary>Everything: negotiation, all queues, DRIVER_OK.</summary>
    public void Start(ulong wanted, int queues, ushort size = 0)
    {
        if (!Negotiate(wanted))
        {
            throw new InvalidOperationException("the device refused the features");
        }

        for (int i = 0; i < queues; i++)
        {
            Enable(i, size);
        }

        Status = 15;
    }

    /// <summary>First free address after the queues.</summary>
    public ulong FreeAddress => _free;

    public void Kick(int queue) => Write(0x50, (uint)queue);

    public void AcknowledgeInterrupt() => Write(0x64, Read(0x60));
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>One port of a <see cref="VirtioConsole"/>.</summary>
/// <param name="Backend">The stream on the host; owned by the device.</param>
/// <param name="Name">Name that the guest shows under /sys and /dev/virtio-ports; empty for none.</param>
/// <param name="IsConsole">A terminal (hvc0) instead of a plain stream.</param>
public sealed record VirtioConsolePort(ICharBackend Backend, string Name = "", bool IsConsole = false);

/// <summary>
/// Console with several ports (VIRTIO 1.2 §5.3). Output is copied to the back end in bounded pieces. Input waits in a
/// 4 KiB buffer per port until the guest has a buffer for it; the back end is told when there is room again. Control
/// messages wait in a bounded list; a guest that asks faster than it reads loses answers, which are counted.
/// </summary>
public sealed class VirtioConsole : VirtioModel
{
    private const ulong FeatureSize = 1UL << 0;
    private const ulong FeatureMultiport = 1UL << 1;
    private const ulong FeatureEmergencyWrite = 1UL << 2;
    private const ushort QueueEntries = 64;
    private const int InputBytes = 4096;
    private const int MaxChainBytes = 1 << 20;
    private const int MaxControlMessages = 256;
    private const int ControlReceive = 2;
    private const int ControlTransmit = 3;

    private readonly Lock _gate = new();
    private readonly Port[] _ports;
    private readonly ushort[] _queueSizes;
    private readonly byte[] _buffer = new byte[4096];
    private readonly Queue<byte[]> _control = new();
    private ushort _columns;
    private ushort _rows;
    private long _droppedControl;

    /// <summary>Makes one; port 0 should be the console.</summary>
    public VirtioConsole(IReadOnlyList<VirtioConsolePort> ports)
    {
        ArgumentNullException.ThrowIfNull(ports);
        ArgumentOutOfRangeException.ThrowIfZero(ports.Count, nameof(ports));
        ArgumentOutOfRangeException.ThrowIfGreaterThan(ports.Count, 30, nameof(ports));
        _ports = new Port[ports.Count];
        for (int i = 0; i < _ports.Length; i++)
        {
            _ports[i] = new Port(this, i, ports[i]);
            ports[i].Backend.Attach(_ports[i]);
        }

        // §5.3.2: port 0, control, then the other ports.
        _queueSizes = new ushort[2 + (2 * _ports.Length)];
        Array.Fill(_queueSizes, QueueEntries);
    }

    private enum ControlEvent : ushort
    {
        DeviceReady = 0,
        DeviceAdd = 1,
        DeviceRemove = 2,
        PortReady = 3,
        ConsolePort = 4,
        Resize = 5,
        PortOpen = 6,
        PortName = 7,
    }

    /// <inheritdoc/>
    public override VirtioDeviceType Type => VirtioDeviceType.Console;

    /// <inheritdoc/>
    public override ulong OfferedFeatures => FeatureSize | FeatureMultiport | FeatureEmergencyWrite;

    /// <inheritdoc/>
    public override ReadOnlySpan<ushort> QueueSizes => _queueSizes;

    /// <inheritdoc/>
    public override int ConfigBytes => 12;

    /// <summary>Control messages that the guest did not fetch in time.</summary>
    public long DroppedControl => Interlocked.Read(ref _droppedControl);

    /// <summary>The terminal behind port 0 has another size. Any thread.</summary>
    public void Resize(ushort columns, ushort rows)
    {
        lock (_gate)
        {
            _columns = columns;
            _rows = rows;
        }

        if (Session is not { } session)
        {
            return;
        }

        if (session.Has(FeatureMultiport))
        {
            Span<byte> size = stackalloc byte[4];
            BinaryPrimitives.WriteUInt16LittleEndian(size, columns);
            BinaryPrimitives.WriteUInt16LittleEndian(size[2..], rows);
            Tell(0, ControlEvent.Resize, 0, size);
            session.Kick(ControlReceive);
        }

        session.ConfigChanged();
    }

    /// <inheritdoc/>
    public override void ReadConfig(uint offset, Span<byte> into)
    {
        Span<byte> config = stackalloc byte[12];
        config.Clear();
        lock (_gate)
        {
            BinaryPrimitives.WriteUInt16LittleEndian(config, _columns);
            BinaryPrimitives.WriteUInt16LittleEndian(config[2..], _rows);
        }

        BinaryPrimitives.WriteUInt32LittleEndian(config[4..], (uint)_ports.Length);
        CopyConfig(config, offset, into);
    }

    /// <inheritdoc/>
    public override void WriteConfig(uint offset, ReadOnlySpan<byte> from)
    {
        // emerg_wr (§5.3.4): a character from a guest that is too broken to have queues.
        if (offset == 8 && from.Length >= 1)
        {
            _ports[0].Backend.Write(from[..1]);
        }
    }

    /// <inheritdoc/>
    public override bool Notify(int queue, int budget)
    {
        if (Session is not { } session || session.Queue(queue) is not { } ring)
        {
            return false;
        }

        if (queue == ControlReceive)
        {
            DeliverControl(ring);
            return false;
        }

        if ((queue & 1) == 0)
        {
            PortOf(queue)?.Deliver(ring);
            return false;
        }

        return base.Notify(queue, budget);
    }

    /// <inheritdoc/>
    public override void Reset()
    {
        lock (_gate)
        {
            _control.Clear();
            foreach (Port port in _ports)
            {
                port.GuestOpen = false;
            }
        }
    }

    /// <inheritdoc/>
    public override void Save(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_gate)
        {
            writer.Write("con.columns", _columns);
            writer.Write("con.rows", _rows);
            writer.Write("con.control", (ulong)_control.Count);
            int index = 0;
            foreach (byte[] message in _control)
            {
                writer.WriteBytes($"con.control{index++}", message);
            }

            for (int i = 0; i < _ports.Length; i++)
            {
                writer.Write($"con.port{i}.open", _ports[i].GuestOpen);
                writer.WriteBytes($"con.port{i}.input", _ports[i].Pending());
            }
        }
    }

    /// <inheritdoc/>
    public override void Load(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_gate)
        {
            _columns = reader.ReadUInt16("con.columns");
            _rows = reader.ReadUInt16("con.rows");
            _control.Clear();
            int count = (int)reader.ReadBounded("con.control", MaxControlMessages);
            for (int i = 0; i < count; i++)
            {
                _control.Enqueue(reader.ReadBytes($"con.control{i}").ToArray());
            }

            for (int i = 0; i < _ports.Length; i++)
            {
                if (reader.Has($"con.port{i}.open"))
                {
                    _ports[i].GuestOpen = reader.ReadBoolean($"con.port{i}.open");
                    _ports[i].Restore(reader.ReadBytes($"con.port{i}.input"));
                }
            }
        }
    }

    /// <inheritdoc/>
    protected override void Process(int queue, Virtqueue ring, VirtqueueChain chain)
    {
        ArgumentNullException.ThrowIfNull(ring);
        ArgumentNullException.ThrowIfNull(chain);
        if (queue == ControlTransmit)
        {
            HandleControl(chain);
        }
        else if (PortOf(queue) is { } port)
        {
            long total = Math.Min(chain.ReadableBytes, MaxChainBytes);
            for (long done = 0; done < total;)
            {
                Span<byte> part = _buffer.AsSpan(0, (int)Math.Min(_buffer.Length, total - done));
                if (!chain.TryRead(done, part))
                {
                    ring.Break(VirtqueueFault.BadAddress);
                    break;
                }

                port.Backend.Write(part);
                done += part.Length;
            }
        }

        ring.Push(chain, 0);
    }

    /// <inheritdoc/>
    protected override void AfterBatch(int queue, Virtqueue ring)
    {
        base.AfterBatch(queue, ring);
        if (queue == ControlTransmit && Session?.Queue(ControlReceive) is { } answers)
        {
            DeliverControl(answers);
        }
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            foreach (Port port in _ports)
            {
                port.Backend.Dispose();
            }
        }

        base.Dispose(disposing);
    }

    private Port? PortOf(int queue)
    {
        int index = queue < 2 ? 0 : (queue / 2) - 1;
        return queue is 2 or 3 || index >= _ports.Length ? null : _ports[index];
    }

    private static int ReceiveQueueOf(int port) => port == 0 ? 0 : 2 + (2 * port);

    private void HandleControl(VirtqueueChain chain)
    {
        Span<byte> message = stackalloc byte[8];
        if (!chain.TryRead(0, message))
        {
            return;
        }

        uint id = BinaryPrimitives.ReadUInt32LittleEndian(message);
        ushort value = BinaryPrimitives.ReadUInt16LittleEndian(message[6..]);
        switch ((ControlEvent)BinaryPrimitives.ReadUInt16LittleEndian(message[4..]))
        {
            case ControlEvent.DeviceReady when value == 1:
                for (int i = 0; i < _ports.Length; i++)
                {
                    Tell((uint)i, ControlEvent.DeviceAdd, 1, []);
                }

                break;
            case ControlEvent.PortReady when value == 1 && id < _ports.Length:
                Port port = _ports[id];
                if (port.IsConsole)
                {
                    Tell(id, ControlEvent.ConsolePort, 1, []);
                }

                if (port.Name.Length != 0)
                {
                    Tell(id, ControlEvent.PortName, 1, Encoding.UTF8.GetBytes(port.Name));
                }

                Tell(id, ControlEvent.PortOpen, 1, []);
                break;
            case ControlEvent.PortOpen when id < _ports.Length:
                lock (_gate)
                {
                    _ports[id].GuestOpen = value == 1;
                }

                break;
        }
    }

    private void Tell(uint id, ControlEvent what, ushort value, ReadOnlySpan<byte> rest)
    {
        byte[] message = new byte[8 + rest.Length];
        BinaryPrimitives.WriteUInt32LittleEndian(message, id);
        BinaryPrimitives.WriteUInt16LittleEndian(message.AsSpan(4), (ushort)what);
        BinaryPrimitives.WriteUInt16LittleEndian(message.AsSpan(6), value);
        rest.CopyTo(message.AsSpan(8));
        lock (_gate)
        {
            if (_control.Count >= MaxControlMessages)
            {
                Interlocked.Increment(ref _droppedControl);
                return;
            }

            _control.Enqueue(message);
        }
    }

    private void DeliverControl(Virtqueue ring)
    {
        for (; ; )
        {
            byte[]? message;
            lock (_gate)
            {
                _control.TryPeek(out message);
            }

            if (message is null)
            {
                break;
            }

            if (!ring.TryPop(out VirtqueueChain? chain))
            {
                if (ring.EnableNotify())
                {
                    continue;
                }

                break;
            }

            lock (_gate)
            {
                _control.Dequeue();
            }

            int length = (int)Math.Min(message.Length, chain.WritableBytes);
            if (!chain.TryWrite(0, message.AsSpan(0, length)))
            {
                ring.Break(VirtqueueFault.BadAddress);
            }

            ring.Push(chain, (uint)length);
        }

        ring.Flush();
    }

    /// <summary>Input of one port: a ring that the back end fills and the worker empties.</summary>
    private sealed class Port : ICharReceiver
    {
        private readonly Lock _gate = new();
        private readonly byte[] _input = new byte[InputBytes];
        private readonly byte[] _piece = new byte[InputBytes];
        private readonly VirtioConsole _owner;
        private readonly int _index;
        private int _head;
        private int _count;

        public Port(VirtioConsole owner, int index, VirtioConsolePort options)
        {
            _owner = owner;
            _index = index;
            Backend = options.Backend;
            Name = options.Name;
            IsConsole = options.IsConsole;
        }

        public ICharBackend Backend { get; }

        public string Name { get; }

        public bool IsConsole { get; }

        public bool GuestOpen { get; set; }

        public int RoomBytes
        {
            get
            {
                lock (_gate)
                {
                    return _owner.Session is null ? 0 : InputBytes - _count;
                }
            }
        }

        public void Receive(ReadOnlySpan<byte> bytes)
        {
            lock (_gate)
            {
                foreach (byte value in bytes)
                {
                    if (_count == InputBytes)
                    {
                        break;
                    }

                    _input[(_head + _count++) % InputBytes] = value;
                }
            }

            _owner.Session?.Kick(ReceiveQueueOf(_index));
        }

        // On the worker.
        public void Deliver(Virtqueue ring)
        {
            bool moved = false;
            for (; ; )
            {
                int length = Peek();
                if (length == 0)
                {
                    break;
                }

                if (!ring.TryPop(out VirtqueueChain? chain))
                {
                    if (ring.EnableNotify())
                    {
                        continue;
                    }

                    break;
                }

                length = (int)Math.Min(length, chain.WritableBytes);
                if (!chain.TryWrite(0, _piece.AsSpan(0, length)))
                {
                    ring.Break(VirtqueueFault.BadAddress);
                }

                lock (_gate)
                {
                    _head = (_head + length) % InputBytes;
                    _count -= length;
                }

                ring.Push(chain, (uint)length);
                moved = true;
            }

            ring.Flush();
            if (moved || RoomBytes == InputBytes)
            {
                Backend.ResumeInput();
            }
        }

        public byte[] Pending() => _piece.AsSpan(0, Peek()).ToArray();

        public void Restore(ReadOnlySpan<byte> bytes)
        {
            lock (_gate)
            {
                _head = 0;
                _count = Math.Min(bytes.Length, InputBytes);
                bytes[.._count].CopyTo(_input);
            }
        }

        private int Peek()
        {
            lock (_gate)
            {
                for (int i = 0; i < _count; i++)
                {
                    _piece[i] = _input[(_head + i) % InputBytes];
                }

                return _count;
            }
        }
    }
}

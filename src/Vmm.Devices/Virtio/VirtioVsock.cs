// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>
/// Socket device (VIRTIO 1.2 §5.10), stream sockets between the guest and the host (CID 2). Both directions are paced by
/// the credit of §5.10.6.3: the guest may send what our buffer of 256 KiB per connection holds, we send what the guest
/// says it has room for. Connections do not survive a saved state: the guest is told so by an event, as §5.10.6.7 asks.
/// </summary>
/// <remarks>
/// Everything is under one gate. Packets to the guest need buffers of the receive queue; control packets wait in a
/// bounded list, data stays with the back end.
/// </remarks>
public sealed class VirtioVsock : VirtioModel, IVsockAcceptor
{
    private const int HeaderBytes = 44;
    private const uint BufferBytes = 256 * 1024;
    private const int MaxPacketBytes = 64 * 1024;
    private const int MaxConnections = 1024;
    private const int MaxControl = 1024;
    private const ulong HostCid = 2;
    private const ushort TypeStream = 1;
    private const uint FirstHostPort = 1 << 30;
    private const int ReceiveQueue = 0;
    private const int TransmitQueue = 1;
    private const int EventQueue = 2;
    private const uint ShutdownReceive = 1;
    private const uint ShutdownSend = 2;

    private static readonly ushort[] s_queueSizes = [256, 256, 16];

    private readonly Lock _gate = new();
    private readonly Dictionary<(uint Guest, uint Host), Connection> _connections = [];
    private readonly Queue<Packet> _control = new();
    private readonly IVsockBackend _backend;
    private readonly ulong _cid;
    private readonly byte[] _packet = new byte[MaxPacketBytes];
    private readonly byte[] _out = new byte[MaxPacketBytes];
    private bool _open;
    private bool _stalled;
    private bool _tellReset;
    private uint _nextPort = FirstHostPort;
    private long _dropped;

    /// <summary>Makes one.</summary>
    /// <param name="cid">The guest's context identifier, 3 or more.</param>
    /// <param name="backend">The host's side; owned.</param>
    public VirtioVsock(uint cid, IVsockBackend backend)
    {
        ArgumentNullException.ThrowIfNull(backend);
        ArgumentOutOfRangeException.ThrowIfLessThan(cid, 3u);
        _cid = cid;
        _backend = backend;
        backend.Attach(this);
    }

    private enum Operation : ushort
    {
        Request = 1,
        Response = 2,
        Reset = 3,
        Shutdown = 4,
        Data = 5,
        CreditUpdate = 6,
        CreditRequest = 7,
    }

    /// <inheritdoc/>
    public override VirtioDeviceType Type => VirtioDeviceType.Vsock;

    /// <inheritdoc/>
    public override ReadOnlySpan<ushort> QueueSizes => s_queueSizes;

    /// <inheritdoc/>
    public override int ConfigBytes => 8;

    /// <summary>Packets that were malformed or for which there was no room.</summary>
    public long Dropped => Interlocked.Read(ref _dropped);

    /// <summary>Connections at present.</summary>
    public int Connections
    {
        get
        {
            lock (_gate)
            {
                return _connections.Count;
            }
        }
    }

    /// <inheritdoc/>
    public override void ReadConfig(uint offset, Span<byte> into)
    {
        Span<byte> config = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(config, _cid);
        CopyConfig(config, offset, into);
    }

    /// <inheritdoc/>
    public IVsockReceiver? Open(uint guestPort, IVsockStream stream, Action<uint> decided)
    {
        ArgumentNullException.ThrowIfNull(stream);
        ArgumentNullException.ThrowIfNull(decided);
        lock (_gate)
        {
            if (Session is not null && _connections.Count < MaxConnections)
            {
                while (_connections.ContainsKey((guestPort, _nextPort)))
                {
                    _nextPort++;
                }

                var connection = new Connection(this, guestPort, _nextPort++, stream) { Decided = decided };
                _connections.Add((connection.GuestPort, connection.HostPort), connection);
                Tell(connection, Operation.Request, 0);
                Pump();
                return connection;
            }
        }

        stream.Dispose();
        return null;
    }

    /// <inheritdoc/>
    public override void Start(VirtioSession session)
    {
        base.Start(session);
        lock (_gate)
        {
            _open = true;
        }
    }

    /// <inheritdoc/>
    public override bool Notify(int queue, int budget)
    {
        switch (queue)
        {
            case ReceiveQueue:
                List<IVsockStream>? resume = null;
                lock (_gate)
                {
                    Session?.Queue(ReceiveQueue)?.DisableNotify();
                    bool stalled = _stalled || !_open;
                    _open = true;
                    _stalled = false;
                    Pump();
                    if (stalled)
                    {
                        resume = Waiting();
                    }
                }

                Resume(resume);
                return false;
            case EventQueue:
                lock (_gate)
                {
                    TellReset();
                }

                return false;
            default:
                return base.Notify(queue, budget);
        }
    }

    /// <inheritdoc/>
    public override void Quiesce()
    {
        lock (_gate)
        {
            _open = false;
        }
    }

    /// <inheritdoc/>
    public override void Stop()
    {
        base.Stop();
        CloseAll();
    }

    /// <inheritdoc/>
    public override void Reset()
    {
        CloseAll();
        lock (_gate)
        {
            _tellReset = false;
            _stalled = false;
        }
    }

    /// <inheritdoc/>
    public override void Load(StateReader reader, int version)
    {
        CloseAll();
        lock (_gate)
        {
            _tellReset = true;
        }
    }

    /// <inheritdoc/>
    protected override void Process(int queue, Virtqueue ring, VirtqueueChain chain)
    {
        ArgumentNullException.ThrowIfNull(ring);
        ArgumentNullException.ThrowIfNull(chain);
        if (queue == TransmitQueue)
        {
            lock (_gate)
            {
                OnPacket(chain);
                Pump();
            }
        }

        ring.Push(chain, 0);
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            CloseAll();
            _backend.Dispose();
        }

        base.Dispose(disposing);
    }

    private static void Resume(List<IVsockStream>? streams)
    {
        foreach (IVsockStream stream in streams ?? [])
        {
            stream.ResumeRead();
        }
    }

    private List<IVsockStream> Waiting()
    {
        var streams = new List<IVsockStream>();
        foreach (Connection connection in _connections.Values)
        {
            if (connection.WantsResume && connection.Stream is { } stream)
            {
                connection.WantsResume = false;
                streams.Add(stream);
            }
        }

        return streams;
    }

    private void CloseAll()
    {
        var all = new List<Connection>();
        lock (_gate)
        {
            all.AddRange(_connections.Values);
            _connections.Clear();
            _control.Clear();
        }

        foreach (Connection connection in all)
        {
            connection.Stream?.Dispose();
            connection.Decided?.Invoke(0);
        }
    }

    // §5.10.6.
    private void OnPacket(VirtqueueChain chain)
    {
        Span<byte> header = stackalloc byte[HeaderBytes];
        if (!chain.TryRead(0, header)
            || BinaryPrimitives.ReadUInt64LittleEndian(header) != _cid
            || BinaryPrimitives.ReadUInt64LittleEndian(header[8..]) != HostCid)
        {
            Interlocked.Increment(ref _dropped);
            return;
        }

        uint guestPort = BinaryPrimitives.ReadUInt32LittleEndian(header[16..]);
        uint hostPort = BinaryPrimitives.ReadUInt32LittleEndian(header[20..]);
        uint length = BinaryPrimitives.ReadUInt32LittleEndian(header[24..]);
        ushort type = BinaryPrimitives.ReadUInt16LittleEndian(header[28..]);
        var operation = (Operation)BinaryPrimitives.ReadUInt16LittleEndian(header[30..]);
        uint flags = BinaryPrimitives.ReadUInt32LittleEndian(header[32..]);
        _connections.TryGetValue((guestPort, hostPort), out Connection? connection);
        if (type != TypeStream || (connection is null && operation is not (Operation.Request or Operation.Reset)))
        {
            Refuse(guestPort, hostPort, type);
            return;
        }

        if (connection is not null)
        {
            connection.PeerAllocated = BinaryPrimitives.ReadUInt32LittleEndian(header[36..]);
            connection.PeerForwarded = BinaryPrimitives.ReadUInt32LittleEndian(header[40..]);
        }

        switch (operation)
        {
            case Operation.Request when connection is null:
                Accept(guestPort, hostPort, header);
                break;
            case Operation.Response when connection is { Decided: { } decided }:
                connection.Decided = null;
                connection.IsEstablished = true;
                decided(connection.HostPort);
                connection.Stream?.ResumeRead();
                break;
            case Operation.Reset:
                if (connection is not null)
                {
                    Remove(connection);
                }

                break;
            case Operation.Shutdown when connection is not null:
                Shut(connection, flags);
                break;
            case Operation.Data when connection is { IsEstablished: true }:
                OnData(connection, chain, length);
                break;
            case Operation.CreditUpdate when connection is not null:
                ResumeWaiting(connection);
                break;
            case Operation.CreditRequest when connection is not null:
                Tell(connection, Operation.CreditUpdate, 0);
                break;
            default:
                Refuse(guestPort, hostPort, type);
                if (connection is not null)
                {
                    Remove(connection);
                }

                break;
        }

        if (operation == Operation.Data && connection is not null)
        {
            ResumeWaiting(connection);
        }
    }

    private static void ResumeWaiting(Connection connection)
    {
        if (connection.WantsResume && connection.Credit > 0)
        {
            connection.WantsResume = false;
            connection.Stream?.ResumeRead();
        }
    }

    private void Accept(uint guestPort, uint hostPort, ReadOnlySpan<byte> header)
    {
        if (_connections.Count >= MaxConnections)
        {
            Refuse(guestPort, hostPort, TypeStream);
            return;
        }

        var connection = new Connection(this, guestPort, hostPort, null)
        {
            IsEstablished = true,
            PeerAllocated = BinaryPrimitives.ReadUInt32LittleEndian(header[36..]),
            PeerForwarded = BinaryPrimitives.ReadUInt32LittleEndian(header[40..]),
        };
        connection.Stream = _backend.Connect(hostPort, connection);
        if (connection.Stream is not { } stream)
        {
            Refuse(guestPort, hostPort, TypeStream);
            return;
        }

        _connections.Add((guestPort, hostPort), connection);
        Tell(connection, Operation.Response, 0);
        stream.ResumeRead();
    }

    private void OnData(Connection connection, VirtqueueChain chain, uint length)
    {
        // More than we said we hold, or than the buffer carries, is the guest's fault.
        if (length > MaxPacketBytes || length > BufferBytes - connection.Waiting || connection.GuestDone
            || !chain.TryRead(HeaderBytes, _packet.AsSpan(0, (int)length)))
        {
            Interlocked.Increment(ref _dropped);
            Tell(connection, Operation.Reset, 0);
            Remove(connection);
            return;
        }

        connection.Enqueue(_packet.AsSpan(0, (int)length));
        Forward(connection);
    }

    // Guest to host, as far as the stream takes it.
    private void Forward(Connection connection)
    {
        while (connection.Waiting > 0)
        {
            int sent = connection.Stream!.Write(connection.Front);
            if (sent < 0)
            {
                Tell(connection, Operation.Reset, 0);
                Remove(connection);
                return;
            }

            if (sent == 0)
            {
                break;
            }

            connection.Consume(sent);
        }

        // The guest learns about freed room before it runs dry.
        if (connection.Forwarded - connection.ToldForwarded >= BufferBytes / 4)
        {
            Tell(connection, Operation.CreditUpdate, 0);
        }

        if (connection.GuestDone && connection.Waiting == 0 && !connection.HostShut)
        {
            connection.HostShut = true;
            connection.Stream!.ShutdownWrite();
            CloseIfDone(connection);
        }
    }

    private void Shut(Connection connection, uint flags)
    {
        connection.GuestDone |= (flags & ShutdownSend) != 0;
        connection.GuestDeaf |= (flags & ShutdownReceive) != 0;
        if (connection.Stream is not null && connection.GuestDone)
        {
            Forward(connection);
        }

        CloseIfDone(connection);
    }

    // §5.10.6.6.1: when both directions are shut the connection ends with a reset.
    private void CloseIfDone(Connection connection)
    {
        bool toHostDone = connection.GuestDone && connection.Waiting == 0;
        if (toHostDone && (connection.GuestDeaf || connection.HostDone)
            && _connections.ContainsKey((connection.GuestPort, connection.HostPort)))
        {
            Tell(connection, Operation.Reset, 0);
            Remove(connection);
        }
    }

    private void Remove(Connection connection)
    {
        if (_connections.Remove((connection.GuestPort, connection.HostPort)))
        {
            connection.Stream?.Dispose();
            connection.Decided?.Invoke(0);
            connection.Decided = null;
        }
    }

    private void Refuse(uint guestPort, uint hostPort, ushort type) =>
        Add(new Packet(guestPort, hostPort, Operation.Reset, 0, 0, 0, type));

    private void Tell(Connection connection, Operation operation, uint flags)
    {
        connection.ToldForwarded = connection.Forwarded;
        Add(new Packet(
            connection.GuestPort, connection.HostPort, operation, flags, BufferBytes, connection.Forwarded, TypeStream));
    }

    private void Add(in Packet packet)
    {
        if (_control.Count >= MaxControl)
        {
            Interlocked.Increment(ref _dropped);
            return;
        }

        _control.Enqueue(packet);
    }

    // Control packets to the guest, as far as it has buffers.
    private void Pump()
    {
        if (!_open || Session?.Queue(ReceiveQueue) is not { } ring)
        {
            return;
        }

        Span<byte> header = stackalloc byte[HeaderBytes];
        while (_control.TryPeek(out Packet packet))
        {
            if (!TryPop(ring, out VirtqueueChain? chain))
            {
                break;
            }

            _control.Dequeue();
            packet.Write(header, _cid, 0);
            Give(ring, chain, header, []);
        }

        ring.Flush();
    }

    private bool TryPop(Virtqueue ring, [System.Diagnostics.CodeAnalysis.NotNullWhen(true)] out VirtqueueChain? chain)
    {
        if (ring.TryPop(out chain))
        {
            return true;
        }

        _stalled = true;
        if (!ring.EnableNotify() || !ring.TryPop(out chain))
        {
            return false;
        }

        _stalled = false;
        ring.DisableNotify();
        return true;
    }

    private static void Give(Virtqueue ring, VirtqueueChain chain, ReadOnlySpan<byte> header, ReadOnlySpan<byte> data)
    {
        bool ok = chain.TryWrite(0, header) && chain.TryWrite(header.Length, data);
        if (!ok)
        {
            ring.Break(VirtqueueFault.BadRequest); // §5.10.6.4.1: smaller than a header, or outside RAM
        }

        ring.Push(chain, (uint)(header.Length + data.Length));
    }

    private void TellReset()
    {
        if (!_tellReset || Session?.Queue(EventQueue) is not { } ring || !ring.TryPop(out VirtqueueChain? chain))
        {
            return;
        }

        _tellReset = false;
        Span<byte> transportReset = stackalloc byte[4];
        transportReset.Clear();
        chain.TryWrite(0, transportReset);
        ring.Complete(chain, 4);
    }

    // On the back end's thread. Data goes into the guest's buffers at once or not at all.
    private int OnHostData(Connection connection, ReadOnlySpan<byte> bytes)
    {
        int taken = 0;
        lock (_gate)
        {
            if (!_connections.ContainsKey((connection.GuestPort, connection.HostPort)) || connection.GuestDeaf)
            {
                return bytes.Length; // nobody is interested
            }

            Virtqueue? ring = Session?.Queue(ReceiveQueue);
            Span<byte> header = stackalloc byte[HeaderBytes];
            while (taken < bytes.Length && _open && ring is not null && connection.IsEstablished)
            {
                int allowed = (int)Math.Min(connection.Credit, (uint)(bytes.Length - taken));
                if (allowed == 0 || _control.Count > 0 || !TryPop(ring, out VirtqueueChain? chain))
                {
                    break;
                }

                int room = (int)Math.Min(chain.WritableBytes - HeaderBytes, MaxPacketBytes);
                int take = Math.Min(allowed, Math.Max(room, 0));
                connection.Sent += (uint)take;
                connection.ToldForwarded = connection.Forwarded;
                var packet = new Packet(
                    connection.GuestPort, connection.HostPort, Operation.Data, 0, BufferBytes, connection.Forwarded, TypeStream);
                packet.Write(header, _cid, (uint)take);
                Give(ring, chain, header, bytes.Slice(taken, take));
                taken += take;
                if (take == 0)
                {
                    break;
                }
            }

            ring?.Flush();
            connection.WantsResume = taken < bytes.Length;
        }

        return taken;
    }

    private void OnHostWritable(Connection connection)
    {
        lock (_gate)
        {
            if (_connections.ContainsKey((connection.GuestPort, connection.HostPort)))
            {
                Forward(connection);
                Pump();
            }
        }
    }

    private void OnHostEnd(Connection connection, bool broken)
    {
        lock (_gate)
        {
            if (!_connections.ContainsKey((connection.GuestPort, connection.HostPort)))
            {
                return;
            }

            if (broken)
            {
                Tell(connection, Operation.Reset, 0);
                Remove(connection);
            }
            else
            {
                connection.HostDone = true;
                Tell(connection, Operation.Shutdown, ShutdownSend);
                CloseIfDone(connection);
            }

            Pump();
        }
    }

    private readonly record struct Packet(
        uint GuestPort, uint HostPort, Operation Operation, uint Flags, uint Allocated, uint Forwarded, ushort Type)
    {
        public void Write(Span<byte> into, ulong cid, uint length)
        {
            BinaryPrimitives.WriteUInt64LittleEndian(into, HostCid);
            BinaryPrimitives.WriteUInt64LittleEndian(into[8..], cid);
            BinaryPrimitives.WriteUInt32LittleEndian(into[16..], HostPort);
            BinaryPrimitives.WriteUInt32LittleEndian(into[20..], GuestPort);
            BinaryPrimitives.WriteUInt32LittleEndian(into[24..], length);
            BinaryPrimitives.WriteUInt16LittleEndian(into[28..], Type);
            BinaryPrimitives.WriteUInt16LittleEndian(into[30..], (ushort)Operation);
            BinaryPrimitives.WriteUInt32LittleEndian(into[32..], Flags);
            BinaryPrimitives.WriteUInt32LittleEndian(into[36..], Allocated);
            BinaryPrimitives.WriteUInt32LittleEndian(into[40..], Forwarded);
        }
    }

    /// <summary>A stream; its fields are under the device's gate.</summary>
    private sealed class Connection : IVsockReceiver
    {
        private readonly VirtioVsock _owner;
        private byte[] _buffer = [];
        private int _head;

        public Connection(VirtioVsock owner, uint guestPort, uint hostPort, IVsockStream? stream)
        {
            _owner = owner;
            GuestPort = guestPort;
            HostPort = hostPort;
            Stream = stream;
        }

        public uint GuestPort { get; }

        public uint HostPort { get; }

        public IVsockStream? Stream { get; set; }

        public Action<uint>? Decided { get; set; }

        public bool IsEstablished { get; set; }

        public bool GuestDone { get; set; }

        public bool GuestDeaf { get; set; }

        public bool HostDone { get; set; }

        public bool HostShut { get; set; }

        public bool WantsResume { get; set; }

        public uint PeerAllocated { get; set; }

        public uint PeerForwarded { get; set; }

        public uint Sent { get; set; }

        public uint Forwarded { get; private set; }

        public uint ToldForwarded { get; set; }

        public uint Waiting { get; private set; }

        // §5.10.6.3; a guest that shrinks its buffer gets nothing until it has caught up.
        public uint Credit
        {
            get
            {
                uint used = Sent - PeerForwarded;
                return used >= PeerAllocated ? 0 : PeerAllocated - used;
            }
        }

        public ReadOnlySpan<byte> Front
        {
            get
            {
                int length = (int)Math.Min(Waiting, (uint)(_buffer.Length - _head));
                return _buffer.AsSpan(_head, length);
            }
        }

        public void Enqueue(ReadOnlySpan<byte> data)
        {
            if (_buffer.Length == 0)
            {
                _buffer = new byte[BufferBytes];
            }

            int at = (_head + (int)Waiting) % _buffer.Length;
            int first = Math.Min(data.Length, _buffer.Length - at);
            data[..first].CopyTo(_buffer.AsSpan(at));
            data[first..].CopyTo(_buffer);
            Waiting += (uint)data.Length;
        }

        public void Consume(int count)
        {
            _head = (_head + count) % _buffer.Length;
            Waiting -= (uint)count;
            Forwarded += (uint)count;
        }

        public int OnData(ReadOnlySpan<byte> bytes) => _owner.OnHostData(this, bytes);

        public void OnWritable() => _owner.OnHostWritable(this);

        public void OnEnd(bool broken) => _owner.OnHostEnd(this, broken);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>How a virtio network card presents itself.</summary>
public sealed record VirtioNetOptions
{
    /// <summary>Pairs of receive and transmit queues.</summary>
    public int QueuePairs { get; init; } = 1;

    /// <summary>Entries per data queue, a power of two.</summary>
    public ushort QueueSize { get; init; } = 256;

    /// <summary>MTU to tell the guest, 0 for none.</summary>
    public ushort Mtu { get; init; }
}

/// <summary>
/// Network card (VIRTIO 1.2 §5.1). Frames of the guest are handled on the worker: copied once and handed to the back end
/// with the work that the guest left undone (checksum, TCP segmentation). Frames of the back end are written into the
/// guest's buffers on the back end's thread, under the receive gate; while there is no buffer the back end keeps them and
/// is told when buffers come. A frame that the guest did not agree to take unfinished is finished here.
/// </summary>
public sealed class VirtioNet : VirtioModel, INetReceiver
{
    /// <summary>Bytes of a MAC address.</summary>
    public const int MacBytes = 6;

    private const ulong FeatureChecksum = 1UL << 0;
    private const ulong FeatureGuestChecksum = 1UL << 1;
    private const ulong FeatureGuestOffloads = 1UL << 2;
    private const ulong FeatureMtu = 1UL << 3;
    private const ulong FeatureMac = 1UL << 5;
    private const ulong FeatureGuestTso4 = 1UL << 7;
    private const ulong FeatureGuestTso6 = 1UL << 8;
    private const ulong FeatureHostTso4 = 1UL << 11;
    private const ulong FeatureHostTso6 = 1UL << 12;
    private const ulong FeatureMergeable = 1UL << 15;
    private const ulong FeatureStatus = 1UL << 16;
    private const ulong FeatureControl = 1UL << 17;
    private const ulong FeatureControlRx = 1UL << 18;
    private const ulong FeatureControlVlan = 1UL << 19;
    private const ulong FeatureControlRxExtra = 1UL << 20;
    private const ulong FeatureAnnounce = 1UL << 21;
    private const ulong FeatureMultiQueue = 1UL << 22;
    private const ulong FeatureControlMac = 1UL << 23;
    private const ulong GuestOffloadBits = FeatureGuestChecksum | FeatureGuestTso4 | FeatureGuestTso6;

    private const ushort LinkUp = 1;
    private const ushort LinkAnnounce = 2;
    private const byte HeaderNeedsChecksum = 1;
    private const int MaxMacs = 64;
    private const int MaxControlBytes = 8 + (2 * MaxMacs * MacBytes);
    private const byte Ok = 0;
    private const byte Error = 1;
    private const ushort ControlQueueSize = 64;

    private readonly Lock _rxGate = new();
    private readonly Lock _configGate = new();
    private readonly INetBackend _backend;
    private readonly ushort[] _queueSizes;
    private readonly byte[] _permanentMac;
    private readonly byte[] _mac = new byte[MacBytes];
    private readonly byte[] _txFrame = new byte[NetFrames.MaxFrameBytes];
    private readonly byte[] _rxSegment = new byte[NetFrames.MaxFrameBytes];
    private readonly List<VirtqueueChain> _rxChains = [];
    private readonly HashSet<ulong> _unicast = [];
    private readonly HashSet<ulong> _multicast = [];
    private readonly ulong[] _vlans = new ulong[64];
    private readonly ushort _mtu;
    private readonly int _maxPairs;

    // Under the receive gate.
    private ulong _guestOffloads;
    private ushort _pairs = 1;
    private bool _rxOpen;
    private bool _rxStalled;
    private bool _restored;
    private bool _promiscuous = true;
    private bool _allMulticast;
    private bool _allUnicast;
    private bool _noMulticast;
    private bool _noUnicast;
    private bool _noBroadcast;
    private ushort _linkStatus = LinkUp;
    private long _droppedTx;
    private long _droppedRx;

    /// <summary>Makes one over a back end, which it owns.</summary>
    /// <param name="backend">The network.</param>
    /// <param name="mac">Six bytes.</param>
    /// <param name="options">Details.</param>
    public VirtioNet(INetBackend backend, ReadOnlySpan<byte> mac, VirtioNetOptions? options = null)
    {
        ArgumentNullException.ThrowIfNull(backend);
        ArgumentOutOfRangeException.ThrowIfNotEqual(mac.Length, MacBytes, nameof(mac));
        options ??= new VirtioNetOptions();
        _backend = backend;
        _permanentMac = mac.ToArray();
        mac.CopyTo(_mac);
        _mtu = options.Mtu;
        _maxPairs = Math.Clamp(options.QueuePairs, 1, 16);
        _queueSizes = new ushort[(2 * _maxPairs) + 1];
        Array.Fill(_queueSizes, options.QueueSize);
        _queueSizes[^1] = ControlQueueSize;
        OfferedFeatures = FeatureMac | FeatureMergeable | FeatureStatus | FeatureControl | FeatureControlRx
            | FeatureControlVlan | FeatureControlRxExtra | FeatureAnnounce | FeatureControlMac
            | (backend.CanOffload
                ? FeatureChecksum | FeatureHostTso4 | FeatureHostTso6 | GuestOffloadBits | FeatureGuestOffloads
                : 0)
            | (_mtu != 0 ? FeatureMtu : 0)
            | (_maxPairs > 1 ? FeatureMultiQueue : 0);
        backend.Attach(this);
    }

    private enum ControlClass : byte
    {
        Receive = 0,
        Mac = 1,
        Vlan = 2,
        Announce = 3,
        MultiQueue = 4,
        GuestOffloads = 5,
    }

    /// <inheritdoc/>
    public override VirtioDeviceType Type => VirtioDeviceType.Net;

    /// <inheritdoc/>
    public override ulong OfferedFeatures { get; }

    /// <inheritdoc/>
    public override ReadOnlySpan<ushort> QueueSizes => _queueSizes;

    /// <inheritdoc/>
    public override int ConfigBytes => 12;

    /// <summary>Frames of the guest that could not be sent.</summary>
    public long DroppedTransmit => Interlocked.Read(ref _droppedTx);

    /// <summary>Frames for the guest that it could not take.</summary>
    public long DroppedReceive => Interlocked.Read(ref _droppedRx);

    /// <inheritdoc/>
    public bool TakesOffload
    {
        get
        {
            lock (_rxGate)
            {
                return (_guestOffloads & GuestOffloadBits) == GuestOffloadBits;
            }
        }
    }

    /// <summary>Plugs the cable in or out.</summary>
    public bool IsLinkUp
    {
        get
        {
            lock (_configGate)
            {
                return (_linkStatus & LinkUp) != 0;
            }
        }

        set
        {
            lock (_configGate)
            {
                _linkStatus = (ushort)(value ? _linkStatus | LinkUp : _linkStatus & ~LinkUp);
            }

            Session?.ConfigChanged();
        }
    }

    // §5.1.3.1: segmentation needs checksums; most control features need the control queue.
    /// <inheritdoc/>
    public override bool AcceptsFeatures(ulong features)
    {
        const ulong NeedControl = FeatureControlRx | FeatureControlVlan | FeatureAnnounce | FeatureMultiQueue
            | FeatureControlMac | FeatureGuestOffloads;
        bool Has(ulong bits) => (features & bits) != 0;
        return (!Has(FeatureHostTso4 | FeatureHostTso6) || Has(FeatureChecksum))
            && (!Has(FeatureGuestTso4 | FeatureGuestTso6) || Has(FeatureGuestChecksum))
            && (!Has(NeedControl) || Has(FeatureControl))
            && (!Has(FeatureControlRxExtra) || Has(FeatureControlRx));
    }

    /// <inheritdoc/>
    public override void ReadConfig(uint offset, Span<byte> into)
    {
        Span<byte> config = stackalloc byte[12];
        lock (_configGate)
        {
            _mac.CopyTo(config);
            BinaryPrimitives.WriteUInt16LittleEndian(config[6..], _linkStatus);
        }

        BinaryPrimitives.WriteUInt16LittleEndian(config[8..], (ushort)_maxPairs);
        BinaryPrimitives.WriteUInt16LittleEndian(config[10..], _mtu);
        CopyConfig(config, offset, into);
    }

    /// <inheritdoc/>
    public override void WriteConfig(uint offset, ReadOnlySpan<byte> from)
    {
        // Legacy drivers write the MAC address here (§5.1.4.3).
        if (Session is { IsModern: true })
        {
            return;
        }

        lock (_configGate)
        {
            for (int i = 0; i < from.Length && offset + i < MacBytes; i++)
            {
                _mac[offset + i] = from[i];
            }
        }
    }

    /// <inheritdoc/>
    public override void Start(VirtioSession session)
    {
        ArgumentNullException.ThrowIfNull(session);
        lock (_rxGate)
        {
            if (!_restored)
            {
                _guestOffloads = session.Features & GuestOffloadBits;
            }

            _restored = false;
        }

        base.Start(session);
    }

    /// <inheritdoc/>
    public override bool IsQuick => true;

    /// <inheritdoc/>
    public override bool Notify(int queue, int budget)
    {
        if (Session is not { } session)
        {
            return false;
        }

        if (queue == ControlIndex(session) || (queue & 1) != 0)
        {
            return base.Notify(queue, budget);
        }

        // A receive queue got buffers. Doorbells stay off until the back end finds it empty.
        session.Queue(queue)?.DisableNotify();
        bool resume;
        lock (_rxGate)
        {
            resume = _rxStalled || !_rxOpen;
            _rxStalled = false;
            _rxOpen = true;
        }

        if (resume)
        {
            _backend.ResumeReceive();
        }

        return false;
    }

    /// <inheritdoc/>
    public override void Quiesce()
    {
        lock (_rxGate)
        {
            _rxOpen = false;
        }
    }

    /// <inheritdoc/>
    public override void Reset()
    {
        lock (_rxGate)
        {
            _guestOffloads = 0;
            _restored = false;
            _pairs = 1;
            _rxOpen = false;
            _rxStalled = false;
            _promiscuous = true;
            _allMulticast = false;
            _allUnicast = false;
            _noMulticast = false;
            _noUnicast = false;
            _noBroadcast = false;
            _unicast.Clear();
            _multicast.Clear();
            Array.Clear(_vlans);
        }

        lock (_configGate)
        {
            _permanentMac.CopyTo(_mac.AsSpan());
            _linkStatus &= LinkUp;
        }
    }

    /// <inheritdoc/>
    public override void Save(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_configGate)
        {
            writer.WriteBytes("net.mac", _mac);
            writer.Write("net.link", (_linkStatus & LinkUp) != 0);
        }

        lock (_rxGate)
        {
            writer.Write("net.guest-offloads", _guestOffloads);
            writer.Write("net.pairs", _pairs);
            writer.Write("net.modes", PackModes());
            writer.WriteBytes("net.unicast", PackMacs(_unicast));
            writer.WriteBytes("net.multicast", PackMacs(_multicast));
            for (int i = 0; i < _vlans.Length; i++)
            {
                if (_vlans[i] != 0)
                {
                    writer.Write($"net.vlans{i}", _vlans[i]);
                }
            }
        }
    }

    /// <inheritdoc/>
    public override void Load(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_configGate)
        {
            reader.ReadBytes("net.mac", _mac);

            // The guest may have moved: it tells its neighbours when its driver can (§5.1.6.5.4).
            _linkStatus = (ushort)((reader.ReadBoolean("net.link") ? LinkUp : 0) | LinkAnnounce);
        }

        lock (_rxGate)
        {
            _guestOffloads = reader.ReadUInt64("net.guest-offloads") & GuestOffloadBits;
            _restored = true;
            _pairs = (ushort)Math.Max(1, reader.ReadBounded("net.pairs", (ulong)_maxPairs));
            UnpackModes(reader.ReadBounded("net.modes", 63));
            UnpackMacs(reader.ReadBytes("net.unicast"), _unicast);
            UnpackMacs(reader.ReadBytes("net.multicast"), _multicast);
            for (int i = 0; i < _vlans.Length; i++)
            {
                _vlans[i] = reader.Has($"net.vlans{i}") ? reader.ReadUInt64($"net.vlans{i}") : 0;
            }
        }
    }

    /// <inheritdoc/>
    public bool TryReceive(ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        if (Session is not { } session)
        {
            return true; // nobody listens: gone, as on a cable
        }

        lock (_rxGate)
        {
            if (!_rxOpen)
            {
                return false;
            }

            if (frame.Length < 14 || !IsLinkUp || !IsWanted(frame, session))
            {
                return true;
            }

            int pair = _pairs == 1 ? 0 : SelectPair(frame);
            if (session.Queue(2 * pair) is not { } ring)
            {
                return true;
            }

            ulong needed = (offload.NeedsChecksum ? FeatureGuestChecksum : 0) | (offload.SegmentKind switch
            {
                0 => 0,
                1 => FeatureGuestTso4,
                _ => FeatureGuestTso6,
            });
            return (needed & ~_guestOffloads) == 0
                ? Deliver(session, ring, frame, offload)
                : DeliverFinished(session, ring, frame, offload);
        }
    }

    /// <inheritdoc/>
    protected override void Process(int queue, Virtqueue ring, VirtqueueChain chain)
    {
        ArgumentNullException.ThrowIfNull(ring);
        ArgumentNullException.ThrowIfNull(chain);
        if (Session is { } session && queue == ControlIndex(session))
        {
            byte ack = Control(session, chain);
            if (!chain.TryWrite(0, [ack]))
            {
                ring.Break(VirtqueueFault.BadRequest);
            }

            ring.Push(chain, 1);
            return;
        }

        Transmit(chain);
        ring.Push(chain, 0);
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            _backend.Dispose();
        }

        base.Dispose(disposing);
    }

    // §5.1.2: the control queue follows the pairs that the driver can use.
    private int ControlIndex(VirtioSession session) => session.Has(FeatureMultiQueue) ? 2 * _maxPairs : 2;

    // §5.1.6: modern headers always have num_buffers.
    private static int HeaderBytes(VirtioSession session) =>
        session.IsModern || session.Has(FeatureMergeable) ? 12 : 10;

    private static ulong MacKey(ReadOnlySpan<byte> mac) =>
        ((ulong)BinaryPrimitives.ReadUInt16BigEndian(mac) << 32) | BinaryPrimitives.ReadUInt32BigEndian(mac[2..]);

    private static byte[] PackMacs(HashSet<ulong> macs)
    {
        byte[] bytes = new byte[macs.Count * 8];
        int at = 0;
        foreach (ulong mac in macs)
        {
            BinaryPrimitives.WriteUInt64LittleEndian(bytes.AsSpan(at), mac);
            at += 8;
        }

        return bytes;
    }

    private static void UnpackMacs(ReadOnlySpan<byte> bytes, HashSet<ulong> macs)
    {
        macs.Clear();
        for (int at = 0; at + 8 <= bytes.Length && macs.Count < MaxMacs; at += 8)
        {
            macs.Add(BinaryPrimitives.ReadUInt64LittleEndian(bytes[at..]));
        }
    }

    private static int FlowHash(ReadOnlySpan<byte> frame)
    {
        // Addresses and ports of IPv4 or IPv6 without options; anything else goes to pair 0.
        int type = BinaryPrimitives.ReadUInt16BigEndian(frame[12..]);
        ReadOnlySpan<byte> key = type switch
        {
            0x0800 when frame.Length >= 38 => frame.Slice(26, 12),
            0x86DD when frame.Length >= 58 => frame.Slice(22, 36),
            _ => default,
        };
        uint hash = 0;
        for (int i = 0; i + 4 <= key.Length; i += 4)
        {
            hash = (hash ^ BinaryPrimitives.ReadUInt32BigEndian(key[i..])) * 0x9E37_79B1;
        }

        return (int)(hash >> 16);
    }

    private int SelectPair(ReadOnlySpan<byte> frame) => FlowHash(frame) % _pairs;

    private void Transmit(VirtqueueChain chain)
    {
        VirtioSession session = Session!;
        int headerBytes = HeaderBytes(session);
        Span<byte> header = stackalloc byte[12];
        long length = chain.ReadableBytes - headerBytes;
        bool ok = length is >= 14 and <= NetFrames.MaxFrameBytes
            && chain.TryRead(0, header[..headerBytes])
            && chain.TryRead(headerBytes, _txFrame.AsSpan(0, (int)length));
        if (!ok || !IsLinkUp)
        {
            Interlocked.Increment(ref _droppedTx);
            return;
        }

        // §5.1.6.2; what the guest was not offered it cannot ask for.
        byte kind = session.Has(FeatureHostTso4) ? (byte)(header[1] & 0x7F) : (byte)0;
        var offload = new NetOffload(
            (header[0] & HeaderNeedsChecksum) != 0 && session.Has(FeatureChecksum),
            BinaryPrimitives.ReadUInt16LittleEndian(header[6..]),
            BinaryPrimitives.ReadUInt16LittleEndian(header[8..]),
            kind,
            BinaryPrimitives.ReadUInt16LittleEndian(header[4..]),
            BinaryPrimitives.ReadUInt16LittleEndian(header[2..]));
        bool sane = kind is 0 or 1 or 4
            && (kind == 0 || (offload.NeedsChecksum && offload.SegmentBytes != 0))
            && (!offload.NeedsChecksum || offload.ChecksumStart + offload.ChecksumOffset + 2 <= length);
        if (!sane)
        {
            Interlocked.Increment(ref _droppedTx);
            return;
        }

        _backend.Send(_txFrame.AsSpan(0, (int)length), offload);
    }

    // Under the receive gate. The receiver's filters of §5.1.6.5.1 and §5.1.6.5.2.
    private bool IsWanted(ReadOnlySpan<byte> frame, VirtioSession session)
    {
        if (session.Has(FeatureControlVlan) && BinaryPrimitives.ReadUInt16BigEndian(frame[12..]) == 0x8100
            && frame.Length >= 18)
        {
            int vlan = BinaryPrimitives.ReadUInt16BigEndian(frame[14..]) & 0xFFF;
            if ((_vlans[vlan / 64] & (1UL << (vlan & 63))) == 0)
            {
                return false;
            }
        }

        if (_promiscuous)
        {
            return true;
        }

        ulong mac = MacKey(frame);
        if (mac == 0xFFFF_FFFF_FFFF)
        {
            return !_noBroadcast;
        }

        if ((frame[0] & 1) != 0)
        {
            return !_noMulticast && (_allMulticast || _multicast.Contains(mac));
        }

        return !_noUnicast && (_allUnicast || mac == MacKey(_mac) || _unicast.Contains(mac));
    }

    private bool DeliverFinished(VirtioSession session, Virtqueue ring, ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        if (offload.SegmentKind == 0)
        {
            Span<byte> copy = _rxSegment.AsSpan(0, Math.Min(frame.Length, _rxSegment.Length));
            frame[..copy.Length].CopyTo(copy);
            return !NetFrames.TryCompleteChecksum(copy, offload) || Deliver(session, ring, copy, default);
        }

        int position = 0;
        bool first = true;
        while (NetFrames.TryNextSegment(frame, offload, ref position, _rxSegment, out int length))
        {
            if (!Deliver(session, ring, _rxSegment.AsSpan(0, length), default))
            {
                if (first)
                {
                    return false;
                }

                Interlocked.Increment(ref _droppedRx); // the sender retransmits the rest
                return true;
            }

            first = false;
        }

        return true;
    }

    // Under the receive gate. False when there are not enough buffers; the driver will ring when it adds some.
    private bool Deliver(VirtioSession session, Virtqueue ring, ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        int headerBytes = HeaderBytes(session);
        bool mergeable = session.Has(FeatureMergeable);
        long needed = headerBytes + frame.Length;
        long room = 0;
        _rxChains.Clear();
        while (room < needed)
        {
            if (!ring.TryPop(out VirtqueueChain? chain))
            {
                // Ask for a doorbell at the next buffer, then give back what is too little.
                _rxStalled = true;
                if (ring.EnableNotify())
                {
                    _rxStalled = false;
                    ring.DisableNotify();
                    continue;
                }

                PutBack(ring);
                return false;
            }

            _rxChains.Add(chain);
            room += chain.WritableBytes;
            if (chain.WritableBytes == 0 || (!mergeable && room < needed) || _rxChains.Count > ring.Layout.Size / 2)
            {
                // Too small without mergeable buffers: the frame cannot be taken by this driver.
                PutBack(ring);
                Interlocked.Increment(ref _droppedRx);
                return true;
            }
        }

        Span<byte> header = stackalloc byte[12];
        FillHeader(header, offload, (ushort)_rxChains.Count);
        if (!Scatter(header[..headerBytes], frame))
        {
            ring.Break(VirtqueueFault.BadAddress);
        }

        long left = needed;
        foreach (VirtqueueChain chain in _rxChains)
        {
            uint used = (uint)Math.Min(left, chain.WritableBytes);
            left -= used;
            ring.Push(chain, used);
        }

        _rxChains.Clear();
        ring.Flush();
        return true;
    }

    private bool Scatter(ReadOnlySpan<byte> header, ReadOnlySpan<byte> frame)
    {
        bool first = true;
        foreach (VirtqueueChain chain in _rxChains)
        {
            long offset = 0;
            if (first)
            {
                // The header never spans chains: the first one is checked here (§5.1.6.3.2).
                if (!chain.TryWrite(0, header))
                {
                    return false;
                }

                offset = header.Length;
                first = false;
            }

            int take = (int)Math.Min(frame.Length, chain.WritableBytes - offset);
            if (!chain.TryWrite(offset, frame[..take]))
            {
                return false;
            }

            frame = frame[take..];
        }

        return true;
    }

    private void PutBack(Virtqueue ring)
    {
        for (int i = _rxChains.Count - 1; i >= 0; i--)
        {
            ring.Unpop(_rxChains[i]);
        }

        _rxChains.Clear();
    }

    private static void FillHeader(Span<byte> header, in NetOffload offload, ushort buffers)
    {
        header.Clear();
        if (offload.NeedsChecksum)
        {
            header[0] = HeaderNeedsChecksum;
            BinaryPrimitives.WriteUInt16LittleEndian(header[6..], offload.ChecksumStart);
            BinaryPrimitives.WriteUInt16LittleEndian(header[8..], offload.ChecksumOffset);
        }

        header[1] = offload.SegmentKind;
        BinaryPrimitives.WriteUInt16LittleEndian(header[2..], offload.HeaderBytes);
        BinaryPrimitives.WriteUInt16LittleEndian(header[4..], offload.SegmentBytes);
        BinaryPrimitives.WriteUInt16LittleEndian(header[10..], buffers);
    }

    private byte Control(VirtioSession session, VirtqueueChain chain)
    {
        Span<byte> all = stackalloc byte[MaxControlBytes];
        int length = (int)Math.Min(chain.ReadableBytes, MaxControlBytes);
        if (length < 2 || !chain.TryRead(0, all[..length]))
        {
            return Error;
        }

        byte command = all[1];
        Span<byte> data = all[2..length];
        lock (_rxGate)
        {
            return (ControlClass)all[0] switch
            {
                ControlClass.Receive when session.Has(FeatureControlRx) => SetMode(command, data),
                ControlClass.Mac when command == 0 && session.Has(FeatureControlRx) => SetMacTable(data, chain),
                ControlClass.Mac when command == 1 && session.Has(FeatureControlMac) => SetMac(data),
                ControlClass.Vlan when session.Has(FeatureControlVlan) => SetVlan(command, data),
                ControlClass.Announce when command == 0 && session.Has(FeatureAnnounce) => AcknowledgeAnnounce(),
                ControlClass.MultiQueue when command == 0 && session.Has(FeatureMultiQueue) => SetPairs(data),
                ControlClass.GuestOffloads when command == 0 && session.Has(FeatureGuestOffloads) =>
                    SetOffloads(session, data),
                _ => Error,
            };
        }
    }

    private byte SetMode(byte command, ReadOnlySpan<byte> data)
    {
        if (data.Length < 1 || data[0] > 1)
        {
            return Error;
        }

        bool on = data[0] == 1;
        switch (command)
        {
            case 0:
                _promiscuous = on;
                return Ok;
            case 1:
                _allMulticast = on;
                return Ok;
            case 2:
                _allUnicast = on;
                return Ok;
            case 3:
                _noMulticast = on;
                return Ok;
            case 4:
                _noUnicast = on;
                return Ok;
            case 5:
                _noBroadcast = on;
                return Ok;
            default:
                return Error;
        }
    }

    // Two lists, each a count and addresses. A list that is longer than ours means "all of that kind".
    private byte SetMacTable(ReadOnlySpan<byte> data, VirtqueueChain chain)
    {
        if (!TryReadMacs(data, _unicast, out bool allUnicast, out long next))
        {
            return Error;
        }

        Span<byte> second = stackalloc byte[4 + (MaxMacs * MacBytes)];
        long at = 2 + next;
        int length = (int)Math.Clamp(chain.ReadableBytes - at, 0, second.Length);
        if (length < 4 || !chain.TryRead(at, second[..length])
            || !TryReadMacs(second[..length], _multicast, out bool allMulticast, out long end)
            || at + end > chain.ReadableBytes)
        {
            return Error;
        }

        _allUnicast = allUnicast;
        _allMulticast |= allMulticast;
        return Ok;
    }

    private static bool TryReadMacs(ReadOnlySpan<byte> data, HashSet<ulong> into, out bool tooMany, out long next)
    {
        into.Clear();
        tooMany = false;
        next = 0;
        if (data.Length < 4)
        {
            return false;
        }

        uint count = BinaryPrimitives.ReadUInt32LittleEndian(data);
        next = 4 + ((long)count * MacBytes);
        tooMany = count > MaxMacs;
        if (tooMany)
        {
            return true;
        }

        if (next > data.Length)
        {
            return false;
        }

        for (int i = 0; i < count; i++)
        {
            into.Add(MacKey(data.Slice(4 + (i * MacBytes), MacBytes)));
        }

        return true;
    }

    private byte SetMac(ReadOnlySpan<byte> data)
    {
        if (data.Length != MacBytes)
        {
            return Error;
        }

        lock (_configGate)
        {
            data.CopyTo(_mac);
        }

        return Ok;
    }

    private byte SetVlan(byte command, ReadOnlySpan<byte> data)
    {
        if (data.Length != 2 || command > 1)
        {
            return Error;
        }

        int vlan = BinaryPrimitives.ReadUInt16LittleEndian(data);
        if (vlan > 0xFFF)
        {
            return Error;
        }

        ulong bit = 1UL << (vlan & 63);
        _vlans[vlan / 64] = command == 0 ? _vlans[vlan / 64] | bit : _vlans[vlan / 64] & ~bit;
        return Ok;
    }

    private byte AcknowledgeAnnounce()
    {
        lock (_configGate)
        {
            _linkStatus = (ushort)(_linkStatus & ~LinkAnnounce);
        }

        return Ok;
    }

    private byte SetPairs(ReadOnlySpan<byte> data)
    {
        int pairs = data.Length == 2 ? BinaryPrimitives.ReadUInt16LittleEndian(data) : 0;
        if (pairs < 1 || pairs > _maxPairs)
        {
            return Error;
        }

        _pairs = (ushort)pairs;
        return Ok;
    }

    private byte SetOffloads(VirtioSession session, ReadOnlySpan<byte> data)
    {
        if (data.Length != 8)
        {
            return Error;
        }

        ulong offloads = BinaryPrimitives.ReadUInt64LittleEndian(data);
        if ((offloads & ~(session.Features & GuestOffloadBits)) != 0)
        {
            return Error;
        }

        _guestOffloads = offloads;
        return Ok;
    }

    private ulong PackModes() =>
        (_promiscuous ? 1UL : 0) | (_allMulticast ? 2UL : 0) | (_allUnicast ? 4UL : 0)
        | (_noMulticast ? 8UL : 0) | (_noUnicast ? 16UL : 0) | (_noBroadcast ? 32UL : 0);

    private void UnpackModes(ulong modes)
    {
        _promiscuous = (modes & 1) != 0;
        _allMulticast = (modes & 2) != 0;
        _allUnicast = (modes & 4) != 0;
        _noMulticast = (modes & 8) != 0;
        _noUnicast = (modes & 16) != 0;
        _noBroadcast = (modes & 32) != 0;
    }
}

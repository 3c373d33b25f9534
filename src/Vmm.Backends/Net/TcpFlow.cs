// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers;
using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Net;

/// <summary>
/// One TCP connection: this end speaks TCP (RFC 9293) with the guest, the other is a socket of the host. The link to the
/// guest is memory, so there is no congestion control; the guest's window and its receive buffers set the pace. What the
/// guest has not acknowledged stays in a ring and is sent again after a timeout or three duplicate acknowledgements.
/// Segments from the guest that come out of order are dropped and asked for again. All calls under the network's gate.
/// </summary>
internal sealed class TcpFlow : IDisposable
{
    private const byte Fin = 1;
    private const byte Syn = 2;
    private const byte Rst = 4;
    private const byte Psh = 8;
    private const byte Ack = 16;

    private const int FirstRingBytes = 64 * 1024;
    private const int MaxRingBytes = 1024 * 1024;
    private const int PendingBytes = 256 * 1024;
    private const int WindowScale = 7;
    private const int MaxPayload = 65535 - 60 - 60;
    private const int FirstTimeoutMs = 300;
    private const int MaxTimeoutMs = 10_000;
    private const int MaxRetries = 12;
    private const int PromptAcks = 16;

    private readonly UserNetwork _network;
    private readonly FlowKey _key;
    private readonly Socket _socket;
    private readonly uint _iss;
    private IPollRegistration? _registration;
    private PollEvents _interest;
    private State _state;

    // Host to guest. The ring holds what starts at _sndUna.
    private byte[] _ring = [];
    private int _ringHead;
    private int _ringCount;
    private uint _sndUna;
    private uint _sndNxt;
    private uint _sndMax;
    private uint _sndWnd;
    private int _sndScale;
    private bool _scaling;
    private int _mss = 536;
    private int _duplicateAcks;
    private bool _hostEof;
    private bool _finSent;
    private long _timeoutAt;
    private int _timeoutMs = FirstTimeoutMs;
    private bool _recovering;
    private uint _recoverTo;
    private bool _retransmitDue;
    private int _retries;

    // Round-trip time (RFC 6298, Karn's rule): a guest on a busy host takes long to answer, and nothing is gained by
    // sending it everything twice. 0 for _timedSeq's clock means that nothing is being timed.
    private uint _timedSeq;
    private long _timedAt;
    private double _smoothedMs;
    private double _variationMs;
    private int _roundTripMs = FirstTimeoutMs;

    // Guest to host.
    private byte[]? _pending;
    private int _pendingHead;
    private int _pendingCount;
    private uint _rcvNxt;
    private uint _advertisedWindow;
    private bool _guestFin;
    private bool _hostShut;
    private bool _ackPending;

    // Acknowledgements that wait for the host's answer to take them along; see DelayAck.
    private bool _ackDelayed;
    private long _ackDelayedAt; // the network's Timestamp
    private bool _asked;
    private bool _answering;
    private int _promptAcks;

    private TcpFlow(UserNetwork network, in FlowKey key, Socket socket, uint iss)
    {
        _network = network;
        _key = key;
        _socket = socket;
        _iss = iss;
        _sndUna = iss;
        _sndNxt = iss;
        _sndMax = iss;
    }

    private enum State
    {
        Connecting, // the host's connect is under way; the guest waits for SYN ACK
        SynReceived, // SYN ACK sent
        SynSent, // a forwarded connection: SYN sent to the guest
        Established,
        Closed,
    }

    public FlowKey Key => _key;

    public bool NeedsFlush => _ackPending || (_state == State.Established && (_retransmitDue || Unsent > 0 || (_hostEof && !_finSent)));

    /// <summary>An acknowledgement waits for <see cref="EndAckDelay"/> or for data that takes it along.</summary>
    public bool HasDelayedAck => _ackDelayed;

    /// <summary>The guest opens a connection.</summary>
    public static TcpFlow? Open(UserNetwork network, in FlowKey key, IPEndPoint target, uint iss, ReadOnlySpan<byte> segment)
    {
        Socket socket;
        try
        {
            socket = new Socket(target.AddressFamily, SocketType.Stream, ProtocolType.Tcp) { Blocking = false, NoDelay = true };
        }
        catch (SocketException)
        {
            return null; // no descriptors left, or no such address family: the guest tries again
        }

        var flow = new TcpFlow(network, key, socket, iss) { _state = State.Connecting };
        flow.ReadSyn(segment);
        flow._rcvNxt = BinaryPrimitives.ReadUInt32BigEndian(segment[4..]) + 1;
        try
        {
            socket.Connect(target);
        }
        catch (SocketException e) when (e.SocketErrorCode is SocketError.WouldBlock or SocketError.InProgress)
        {
            // The usual case: the poll loop tells when it is done.
        }
        catch (SocketException)
        {
            flow.Refuse();
            return null;
        }

        flow.Watch(PollEvents.Writable);
        return flow;
    }

    /// <summary>The host opens a connection to the guest; the socket does not block.</summary>
    public static TcpFlow Accept(UserNetwork network, in FlowKey key, Socket socket, uint iss)
    {
        var flow = new TcpFlow(network, key, socket, iss) { _state = State.SynSent };
        flow.Watch(PollEvents.None);
        flow.SendSyn(Syn);
        flow.Arm();
        return flow;
    }

    /// <summary>A segment of the guest: TCP header and payload.</summary>
    public void OnSegment(ReadOnlySpan<byte> segment)
    {
        byte flags = segment[13];
        uint seq = BinaryPrimitives.ReadUInt32BigEndian(segment[4..]);
        uint ack = BinaryPrimitives.ReadUInt32BigEndian(segment[8..]);
        ReadOnlySpan<byte> payload = segment[((segment[12] >> 4) * 4)..];
        if ((flags & Rst) != 0)
        {
            if (_state == State.SynSent ? ack == _sndNxt : seq - _rcvNxt <= PendingBytes)
            {
                Abort();
            }

            return;
        }

        if (_state == State.SynSent)
        {
            if ((flags & (Syn | Ack)) == (Syn | Ack) && ack == _sndNxt)
            {
                ReadSyn(segment);
                _rcvNxt = seq + 1;
                _sndUna = ack;
                _sndWnd = BinaryPrimitives.ReadUInt16BigEndian(segment[14..]);
                Establish();
                SendControl(Ack);
            }

            return;
        }

        if ((flags & Syn) != 0)
        {
            if (_state == State.SynReceived)
            {
                SendSyn(Syn | Ack);
            }

            return;
        }

        if (_state == State.Connecting || (flags & Ack) == 0 || _state == State.Closed)
        {
            return;
        }

        if (_state == State.SynReceived)
        {
            if (ack != _sndNxt)
            {
                return;
            }

            _sndUna = ack;
            Establish();
        }

        OnAck(ack, (uint)BinaryPrimitives.ReadUInt16BigEndian(segment[14..]) << _sndScale, payload.Length);
        OnData(seq, payload, (flags & Fin) != 0);
        Pump();

        // An acknowledgement makes room: reading goes on here, since nothing may be left that would bring the loop back.
        UpdateInterest();
        FinishIfDone();
    }

    /// <summary>The socket is ready; on the loop's thread.</summary>
    public void OnReady(PollEvents events)
    {
        switch (_state)
        {
            case State.Connecting:
                FinishConnect();
                return;
            case State.Closed:
                return;
            case State.SynSent:
            case State.SynReceived:
                if ((events & (PollEvents.Error | PollEvents.HangUp)) != 0)
                {
                    Interest(PollEvents.None); // read it when the guest has answered
                }

                return;
        }

        if (_pendingCount > 0 && (events & (PollEvents.Writable | PollEvents.Error | PollEvents.HangUp)) != 0)
        {
            FlushPending();
        }

        if (!_hostEof && (events & (PollEvents.Readable | PollEvents.Error | PollEvents.HangUp)) != 0)
        {
            ReadHost();
        }

        if (_state == State.Established)
        {
            Pump();
            UpdateInterest();
            FinishIfDone();
        }
    }

    /// <summary>Sends what waits: data that found no buffer, and an acknowledgement.</summary>
    public void Flush()
    {
        if (_state is State.Closed)
        {
            return;
        }

        if (_state == State.Established)
        {
            Pump();
            UpdateInterest();
        }

        if (_ackPending)
        {
            SendControl(Ack);
        }

        FinishIfDone();
    }

    /// <summary>Sends an acknowledgement that has waited for too long.</summary>
    /// <param name="since">The network's Timestamp: those that have waited since then or longer.</param>
    public void EndAckDelay(long since)
    {
        if (_ackDelayed && _ackDelayedAt - since <= 0)
        {
            // Nobody answered: the next ones are acknowledged at once, for the guest may be waiting for just that.
            _answering = false;
            _promptAcks = PromptAcks;
            _ackDelayed = false;
            _ackPending = true;
        }
    }

    /// <summary>Time passes.</summary>
    public void OnTick(long nowMs)
    {
        if (_timeoutAt == 0 || nowMs < _timeoutAt || _state == State.Closed)
        {
            return;
        }

        // Who connects to a forwarded port has been accepted by the host already. A guest that never said a word is not up, or
        // has no network: better to say so at once than to keep the connection waiting. (One that was restored and has
        // nothing to say answers the first attempt.)
        bool isNobody = _state == State.SynSent && !_network.HasSpoken;
        if (++_retries > MaxRetries || isNobody)
        {
            Reset();
            return;
        }

        _timeoutMs = Math.Min(_timeoutMs * 2, MaxTimeoutMs);
        _timedAt = 0;
        Arm();
        switch (_state)
        {
            case State.SynSent:
                SendSyn(Syn);
                break;
            case State.SynReceived:
                SendSyn(Syn | Ack);
                break;
            default:
                if (InFlight > 0 && _sndWnd > 0 && _retries > 1)
                {
                    // The first missing segment did not help: everything from there on, since all of it may be lost.
                    _sndNxt = _sndUna;
                    _finSent = false;
                    Pump();
                }
                else
                {
                    Recover();
                }

                break;
        }
    }

    /// <summary>Ends the connection towards both sides.</summary>
    public void Reset()
    {
        if (_state == State.Closed)
        {
            return;
        }

        SendControl(Rst | Ack);
        Abort();
    }

    /// <summary>Closes the socket; on the loop's thread, after the flow was taken out of the table.</summary>
    public void Dispose()
    {
        _registration?.Dispose();
        _socket.Dispose();
        if (_ring.Length != 0)
        {
            ArrayPool<byte>.Shared.Return(_ring);
            _ring = [];
        }

        if (_pending is { } pending)
        {
            ArrayPool<byte>.Shared.Return(pending);
            _pending = null;
        }
    }

    private uint InFlight => _sndNxt - _sndUna;

    // A FIN goes out behind the last byte, so nothing is left then, also when it has been acknowledged.
    private int Unsent => _finSent ? 0 : _ringCount - (int)InFlight;

    private void Watch(PollEvents interest)
    {
        _interest = interest;
        _registration = _network.Watch(_socket.SafeHandle, interest, OnReady);
    }

    private void Interest(PollEvents interest)
    {
        if (interest != _interest && _registration is { } registration)
        {
            _interest = interest;
            registration.Interest = interest;
        }
    }

    private void UpdateInterest()
    {
        if (_state != State.Established)
        {
            return;
        }

        bool read = !_hostEof && _ringCount < MaxRingBytes && Unsent < FirstRingBytes;
        Interest((read ? PollEvents.Readable : PollEvents.None)
            | (_pendingCount > 0 ? PollEvents.Writable : PollEvents.None));
    }

    private void FinishConnect()
    {
        object? error;
        try
        {
            error = _socket.GetSocketOption(SocketOptionLevel.Socket, SocketOptionName.Error);
        }
        catch (SocketException)
        {
            error = -1;
        }

        if (error is not 0)
        {
            Refuse();
            return;
        }

        _state = State.SynReceived;
        Interest(PollEvents.None);
        SendSyn(Syn | Ack);
        Arm();
    }

    private void Refuse()
    {
        SendControl(Rst | Ack);
        Abort();
    }

    private void Abort()
    {
        if (_state != State.Closed)
        {
            _state = State.Closed;
            _timeoutAt = 0;
            try
            {
                // A guest that had said FIN before it reset has its data acknowledged: the host's kernel still delivers it.
                if (!_hostShut)
                {
                    _socket.LingerState = new LingerOption(enable: true, seconds: 0);
                }
            }
            catch (SocketException)
            {
                // The peer was faster.
            }

            _network.FlowClosed(this);
        }
    }

    private void Establish()
    {
        _state = State.Established;
        Disarm();
        UpdateInterest();
    }

    private void FinishIfDone()
    {
        bool toGuestDone = _finSent && InFlight == 0;
        bool toHostDone = _guestFin && _pendingCount == 0;
        if (_state == State.Established && toGuestDone && toHostDone)
        {
            if (_ackPending)
            {
                SendControl(Ack);
            }

            _state = State.Closed;
            _network.FlowClosed(this);
        }
    }

    private void OnAck(uint ack, uint window, int payloadBytes)
    {
        uint acked = ack - _sndUna;
        if (acked > _sndMax - _sndUna)
        {
            _ackPending = true; // for something never sent
            return;
        }

        if (acked == 0)
        {
            bool duplicate = payloadBytes == 0 && InFlight > 0 && window == _sndWnd;
            _sndWnd = window;
            if (duplicate && ++_duplicateAcks == 3)
            {
                Recover();
            }

            return;
        }

        int bytes = (int)Math.Min(acked, (uint)_ringCount);
        if (acked > InFlight)
        {
            // Sent before a timeout made us go back: it did arrive.
            _sndNxt = ack;
            _finSent |= acked > _ringCount;
        }

        if (_timedAt != 0 && (int)(ack - _timedSeq) >= 0)
        {
            Measure(_network.NowMs - _timedAt);
        }

        _ringHead = _ring.Length == 0 ? 0 : (_ringHead + bytes) % _ring.Length;
        _ringCount -= bytes;
        _sndUna = ack;
        _sndWnd = window;
        _duplicateAcks = 0;
        _retries = 0;
        _timeoutMs = _roundTripMs;
        _recovering = _recovering && InFlight > 0 && (int)(_recoverTo - ack) > 0;
        _retransmitDue = _recovering;

        if (InFlight == 0)
        {
            Disarm();
        }
        else
        {
            Arm();
        }
    }

    private void OnData(uint seq, ReadOnlySpan<byte> payload, bool fin)
    {
        if (_state != State.Established || (payload.Length == 0 && !fin))
        {
            // A keep-alive probe is an old sequence number without data.
            _ackPending |= seq != _rcvNxt;
            return;
        }

        int ahead = (int)(seq - _rcvNxt);
        if (ahead > 0 || ahead + payload.Length < 0 || _guestFin)
        {
            _ackPending = true;
            return;
        }

        payload = payload[Math.Min(-ahead, payload.Length)..];
        int taken = WriteHost(payload);
        _rcvNxt += (uint)taken;
        _asked |= taken > 0;
        DelayAck(!fin && taken > 0 && taken == payload.Length && taken < _mss && _pendingCount == 0);
        if (fin && taken == payload.Length && _state == State.Established)
        {
            _rcvNxt++;
            _guestFin = true;
            ShutHost();
        }
    }

    // RFC 9293 §3.8.6.3. Where question and answer alternate, the acknowledgement of a question that came in one small segment
    // goes with the answer: a frame less for the guest to take, and a thread less to wake here. Another segment before the
    // answer, or no answer for a while, ends that.
    private void DelayAck(bool mayWait)
    {
        if (mayWait && _answering && _promptAcks == 0 && !_ackDelayed && !_ackPending)
        {
            _ackDelayed = true;
            _ackDelayedAt = _network.Timestamp;
        }
        else
        {
            _ackDelayed = false;
            _ackPending = true;
        }
    }

    // Straight into the socket; only what it does not take waits here.
    private int WriteHost(ReadOnlySpan<byte> data)
    {
        int sent = 0;
        if (_pendingCount == 0 && data.Length > 0)
        {
            sent = _socket.Send(data, SocketFlags.None, out SocketError error);
            if (error is not (SocketError.Success or SocketError.WouldBlock))
            {
                Reset();
                return 0;
            }

            sent = Math.Max(0, sent);
            data = data[sent..];
        }

        int keep = Math.Min(data.Length, PendingBytes - _pendingCount);
        if (keep > 0)
        {
            _pending ??= ArrayPool<byte>.Shared.Rent(PendingBytes);
            for (int done = 0; done < keep;)
            {
                int at = (_pendingHead + _pendingCount) % PendingBytes;
                int part = Math.Min(keep - done, PendingBytes - at);
                data.Slice(done, part).CopyTo(_pending.AsSpan(at));
                done += part;
                _pendingCount += part;
            }

            UpdateInterest();
        }

        return sent + keep;
    }

    private void FlushPending()
    {
        while (_pendingCount > 0)
        {
            int part = Math.Min(_pendingCount, PendingBytes - _pendingHead);
            int sent = _socket.Send(_pending.AsSpan(_pendingHead, part), SocketFlags.None, out SocketError error);
            if (error == SocketError.WouldBlock)
            {
                break;
            }

            if (error != SocketError.Success)
            {
                Reset();
                return;
            }

            _pendingHead = (_pendingHead + sent) % PendingBytes;
            _pendingCount -= sent;
        }

        // Tell the guest when its window has opened again by a good part.
        _ackPending |= Window() - _advertisedWindow >= PendingBytes / 4;
        if (_ackPending)
        {
            SendControl(Ack);
        }

        ShutHost();
    }

    private void ShutHost()
    {
        if (!_guestFin || _pendingCount != 0 || _hostShut)
        {
            return;
        }

        _hostShut = true;
        try
        {
            _socket.Shutdown(SocketShutdown.Send);
        }
        catch (SocketException)
        {
            // The other side has gone; reading will say so.
        }
    }

    private void ReadHost()
    {
        for (int round = 0; round < 4; round++)
        {
            if (!EnsureRoom())
            {
                return;
            }

            int at = (_ringHead + _ringCount) % _ring.Length;
            int room = Math.Min(_ring.Length - _ringCount, _ring.Length - at);
            int count = _socket.Receive(_ring.AsSpan(at, room), SocketFlags.None, out SocketError error);
            if (error == SocketError.WouldBlock)
            {
                return;
            }

            if (error != SocketError.Success)
            {
                Reset();
                return;
            }

            if (count == 0)
            {
                _hostEof = true;
                return;
            }

            _ringCount += count;
            if (count < room)
            {
                return;
            }
        }
    }

    private bool EnsureRoom()
    {
        if (_ringCount < _ring.Length)
        {
            return true;
        }

        if (_ring.Length >= MaxRingBytes)
        {
            return false;
        }

        byte[] larger = ArrayPool<byte>.Shared.Rent(Math.Max(FirstRingBytes, _ring.Length * 2));
        CopyRing(0, larger.AsSpan(0, _ringCount));
        if (_ring.Length != 0)
        {
            ArrayPool<byte>.Shared.Return(_ring);
        }

        _ring = larger;
        _ringHead = 0;
        return true;
    }

    private void CopyRing(int offset, Span<byte> into)
    {
        if (into.Length == 0)
        {
            return;
        }

        int at = (_ringHead + offset) % _ring.Length;
        int first = Math.Min(into.Length, _ring.Length - at);
        _ring.AsSpan(at, first).CopyTo(into);
        _ring.AsSpan(0, into.Length - first).CopyTo(into[first..]);
    }

    // As much as the guest's window and buffers take; then the end of the stream.
    private void Pump()
    {
        if (_state != State.Established)
        {
            return;
        }

        int most = _network.TakesOffload ? MaxPayload / _mss * _mss : _mss;
        if (!_network.CanEmit)
        {
            return; // on the guest's own thread, or it has no buffers: the loop comes back here
        }

        if (_retransmitDue)
        {
            _retransmitDue = false;
            Retransmit();
        }

        while (Unsent > 0)
        {
            int allowed = (int)Math.Min(int.MaxValue, Math.Max(0, (long)_sndWnd - InFlight));
            int take = Math.Min(Math.Min(Unsent, allowed), most);
            if (take == 0 || (take < _mss && take < Unsent && InFlight > 0))
            {
                break; // the window is closed, or silly to fill (RFC 9293 §3.8.6.2.1)
            }

            if (!SendData(_sndNxt, (int)InFlight, take))
            {
                return;
            }

            Advance((uint)take);
            if (_asked)
            {
                _asked = false;
                _answering = true;
                _promptAcks = Math.Max(0, _promptAcks - 1);
            }
        }

        if (_hostEof && !_finSent && Unsent == 0 && SendControl(Fin | Ack))
        {
            _finSent = true;
            Advance(1);
        }

        if ((InFlight > 0 || Unsent > 0) && _timeoutAt == 0)
        {
            Arm();
        }
    }

    // Sends what is missing first, and from then on what each acknowledgement shows to be missing next, up to what has been
    // sent so far (RFC 6582 §3.2). A card that takes only the beginning of a large frame loses many segments at once:
    // without this each of them would wait for a timeout of its own.
    private void Recover()
    {
        _recovering = true;
        _recoverTo = _sndMax;
        _retransmitDue = true; // on the guest's own thread nothing can be sent: Pump does it, here or on the loop
        Pump();
    }

    private void Retransmit()
    {
        int bytes = (int)Math.Min(Math.Min(_ringCount, InFlight), (uint)_mss);
        if (bytes > 0)
        {
            SendData(_sndUna, 0, bytes);
        }
        else if (_finSent && InFlight > 0)
        {
            SendSegment(_sndNxt - 1, Fin | Ack, [], 0, 0);
        }
        else if (Unsent > 0)
        {
            // Window probe: one byte beyond a closed window (RFC 9293 §3.8.6.1).
            if (SendData(_sndNxt, (int)InFlight, 1))
            {
                Advance(1);
            }
        }
    }

    private void Advance(uint count)
    {
        if (_timedAt == 0 && _sndNxt == _sndMax)
        {
            _timedAt = _network.NowMs;
            _timedSeq = _sndNxt + count;
        }

        _sndNxt += count;
        if ((int)(_sndNxt - _sndMax) > 0)
        {
            _sndMax = _sndNxt;
        }
    }

    private void Arm() => _timeoutAt = _network.NowMs + _timeoutMs;

    private void Disarm()
    {
        _timeoutAt = 0;
        _retries = 0;
        _timeoutMs = _roundTripMs;
    }

    // RFC 6298 §2; the clock's grain is the network's tick, far below the least timeout.
    private void Measure(long milliseconds)
    {
        _timedAt = 0;
        if (_smoothedMs == 0)
        {
            _smoothedMs = milliseconds;
            _variationMs = milliseconds / 2.0;
        }
        else
        {
            _variationMs = (0.75 * _variationMs) + (0.25 * Math.Abs(_smoothedMs - milliseconds));
            _smoothedMs = (0.875 * _smoothedMs) + (0.125 * milliseconds);
        }

        _roundTripMs = Math.Clamp((int)(_smoothedMs + (4 * _variationMs)), FirstTimeoutMs, MaxTimeoutMs);
    }

    private uint Window() => (uint)(PendingBytes - _pendingCount);

    private bool SendData(uint seq, int ringOffset, int lengthBytes)
    {
        bool last = ringOffset + lengthBytes == _ringCount;
        return SendSegment(seq, (byte)(Ack | (last ? Psh : 0)), [], ringOffset, lengthBytes);
    }

    private bool SendControl(int flags) => SendSegment(_sndNxt, (byte)flags, [], 0, 0);

    // The SYN carries our MSS and, unless the guest does not know it, our window scale (RFC 7323 §2.2).
    private void SendSyn(int flags)
    {
        Span<byte> options = stackalloc byte[8];
        int mss = _network.Mtu - (_key.Guest.IsV6 ? 60 : 40);
        options[0] = 2;
        options[1] = 4;
        BinaryPrimitives.WriteUInt16BigEndian(options[2..], (ushort)mss);
        bool scale = flags == Syn || _scaling;
        options[4] = 1;
        options[5] = scale ? (byte)3 : (byte)1;
        options[6] = scale ? (byte)3 : (byte)1;
        options[7] = scale ? (byte)WindowScale : (byte)1;
        SendSegment(_iss, (byte)flags, options, 0, 0);
        _sndNxt = _iss + 1;
        _sndMax = _sndNxt;
    }

    private bool SendSegment(uint seq, byte flags, ReadOnlySpan<byte> options, int ringOffset, int lengthBytes)
    {
        int headerBytes = Proto.TcpBytes + options.Length;
        PacketBuilder builder = _network.Builder;
        Span<byte> tcp = builder.StartIp(
            _network.GuestMac, _network.GatewayMac, _key.Remote, _key.Guest, Proto.Tcp, headerBytes + lengthBytes);
        BinaryPrimitives.WriteUInt16BigEndian(tcp, _key.RemotePort);
        BinaryPrimitives.WriteUInt16BigEndian(tcp[2..], _key.GuestPort);
        BinaryPrimitives.WriteUInt32BigEndian(tcp[4..], seq);
        BinaryPrimitives.WriteUInt32BigEndian(tcp[8..], (flags & Ack) != 0 ? _rcvNxt : 0);
        tcp[12] = (byte)(headerBytes / 4 << 4);
        tcp[13] = flags;
        uint window = Window();
        bool scaled = _scaling && (flags & Syn) == 0;
        BinaryPrimitives.WriteUInt16BigEndian(tcp[14..], (ushort)Math.Min(scaled ? window >> WindowScale : window, 65535));
        BinaryPrimitives.WriteUInt32BigEndian(tcp[16..], 0);
        options.CopyTo(tcp[Proto.TcpBytes..]);
        CopyRing(ringOffset, tcp.Slice(headerBytes, lengthBytes));
        NetOffload offload = default;
        if (_network.TakesOffload)
        {
            offload = builder.LeaveTcp(headerBytes, _mss);
        }
        else
        {
            builder.FinishChecksum(Proto.Tcp, 16);
        }

        bool sent = lengthBytes == 0 ? _network.Emit(offload) : _network.TryEmit(offload);
        if (sent && (flags & Ack) != 0)
        {
            _ackPending = false;
            _ackDelayed = false;
            _advertisedWindow = window;
        }

        return sent;
    }

    private void ReadSyn(ReadOnlySpan<byte> segment)
    {
        int most = _network.Mtu - (_key.Guest.IsV6 ? 60 : 40);
        _mss = Math.Min(536, most);
        _sndScale = 0;
        _scaling = false;
        _sndWnd = BinaryPrimitives.ReadUInt16BigEndian(segment[14..]);
        ReadOnlySpan<byte> options = segment[Proto.TcpBytes..((segment[12] >> 4) * 4)];
        while (options.Length > 0 && options[0] != 0)
        {
            if (options[0] == 1)
            {
                options = options[1..];
                continue;
            }

            if (options.Length < 2 || options[1] < 2 || options[1] > options.Length)
            {
                return;
            }

            if (options[0] == 2 && options[1] == 4)
            {
                _mss = Math.Clamp(BinaryPrimitives.ReadUInt16BigEndian(options[2..]), 64, most);
            }
            else if (options[0] == 3 && options[1] == 3)
            {
                _scaling = true;
                _sndScale = Math.Min(options[2], (byte)14);
            }

            options = options[options[1]..];
        }
    }
}

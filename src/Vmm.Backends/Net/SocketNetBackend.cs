// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.IO;
using System.Net.Sockets;
using System.Threading;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Net;

/// <summary>
/// A cable to another process: a Unix stream socket on which each frame has its length before it, 32 bits, big-endian.
/// That is the convention of QEMU's `-netdev stream` and of passt. If something listens at the path it is connected to,
/// else this end listens and serves one peer at a time. While nobody is there, frames are lost.
/// </summary>
public sealed class SocketNetBackend : INetBackend
{
    private const int LengthBytes = 4;
    private const int MaxQueuedBytes = 1 << 20;

    private readonly Lock _gate = new();
    private readonly PollLoop _loop;
    private readonly string _path;
    private readonly byte[] _in = new byte[LengthBytes + NetFrames.MaxFrameBytes];
    private readonly byte[] _queued = new byte[MaxQueuedBytes];
    private readonly byte[] _length = new byte[LengthBytes];
    private readonly Socket? _listener;
    private readonly IPollRegistration? _listening;
    private Socket? _peer;
    private IPollRegistration? _watched;
    private INetReceiver? _receiver;
    private int _have;
    private int _queuedCount;
    private bool _stalled;
    private long _dropped;

    /// <summary>Connects or listens.</summary>
    /// <exception cref="HostException">Neither is possible; the message says why.</exception>
    public SocketNetBackend(PollLoop loop, string path)
    {
        ArgumentNullException.ThrowIfNull(loop);
        _loop = loop;
        _path = path;
        try
        {
            if (TryConnect() is { } connected)
            {
                SetPeer(connected);
                return;
            }

            File.Delete(path);
            _listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified) { Blocking = false };
            _listener.Bind(new UnixDomainSocketEndPoint(path));
            _listener.Listen(1);
            _listening = loop.Add(_listener.SafeHandle, PollEvents.Readable, _ => Accept());
        }
        catch (Exception e) when (e is SocketException or IOException or UnauthorizedAccessException or ArgumentException)
        {
            _listener?.Dispose();
            throw new HostException($"network socket {path}: {e.Message}");
        }
    }

    /// <inheritdoc/>
    public bool CanOffload => false;

    /// <summary>Frames that found no peer or no room.</summary>
    public long Dropped => Interlocked.Read(ref _dropped);

    /// <inheritdoc/>
    public void Attach(INetReceiver receiver) => Volatile.Write(ref _receiver, receiver);

    /// <inheritdoc/>
    public void ResumeReceive()
    {
        lock (_gate)
        {
            _stalled = false;
            UpdateInterest();
        }
    }

    /// <inheritdoc/>
    public void Send(ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        lock (_gate)
        {
            int whole = LengthBytes + frame.Length;
            if (_peer is not { } peer || whole > MaxQueuedBytes - _queuedCount)
            {
                Interlocked.Increment(ref _dropped);
                return;
            }

            BinaryPrimitives.WriteInt32BigEndian(_length, frame.Length);
            if (_queuedCount == 0)
            {
                // The usual case: both parts straight into the socket.
                int sent = peer.Send(
                    [new ArraySegment<byte>(_length), new ArraySegment<byte>(frame.ToArray())], SocketFlags.None, out SocketError error);
                if (error == SocketError.Success && sent == whole)
                {
                    return;
                }

                if (error is not (SocketError.Success or SocketError.WouldBlock))
                {
                    return; // the loop finds the hang-up
                }

                sent = error == SocketError.Success ? sent : 0;
                Queue(_length.AsSpan(Math.Min(sent, LengthBytes)));
                Queue(frame[Math.Max(0, sent - LengthBytes)..]);
            }
            else
            {
                Queue(_length);
                Queue(frame);
            }

            UpdateInterest();
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _listening?.Dispose();
        IPollRegistration? watched;
        Socket? peer;
        lock (_gate)
        {
            watched = _watched;
            peer = _peer;
            _watched = null;
            _peer = null;
        }

        watched?.Dispose();
        peer?.Dispose();
        if (_listener is not null)
        {
            _listener.Dispose();
            File.Delete(_path);
        }
    }

    private Socket? TryConnect()
    {
        if (!File.Exists(_path))
        {
            return null;
        }

        var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            socket.Connect(new UnixDomainSocketEndPoint(_path));
            socket.Blocking = false;
            return socket;
        }
        catch (SocketException e) when (e.SocketErrorCode == SocketError.ConnectionRefused)
        {
            socket.Dispose();
            return null; // left over from a process that is gone
        }
        catch
        {
            socket.Dispose();
            throw;
        }
    }

    private void Queue(ReadOnlySpan<byte> bytes)
    {
        bytes.CopyTo(_queued.AsSpan(_queuedCount));
        _queuedCount += bytes.Length;
    }

    private void Accept()
    {
        try
        {
            Socket accepted = _listener!.Accept();
            accepted.Blocking = false;
            lock (_gate)
            {
                DropPeer();
                SetPeer(accepted);
            }
        }
        catch (SocketException)
        {
            // Gone again.
        }
    }

    private void SetPeer(Socket peer)
    {
        _peer = peer;
        _have = 0;
        _queuedCount = 0;
        _stalled = false;
        _watched = _loop.Add(peer.SafeHandle, PollEvents.Readable, OnReady);
    }

    // On the loop's thread, under the gate.
    private void DropPeer()
    {
        _watched?.Dispose();
        _peer?.Dispose();
        _watched = null;
        _peer = null;
    }

    private void UpdateInterest()
    {
        if (_watched is { } watched)
        {
            watched.Interest = (_stalled ? PollEvents.None : PollEvents.Readable)
                | (_queuedCount > 0 ? PollEvents.Writable : PollEvents.None);
        }
    }

    private void OnReady(PollEvents events)
    {
        lock (_gate)
        {
            if (_peer is null)
            {
                return;
            }

            if ((events & PollEvents.Writable) != 0)
            {
                int sent = _peer.Send(_queued.AsSpan(0, _queuedCount), SocketFlags.None, out SocketError error);
                if (error == SocketError.Success)
                {
                    _queued.AsSpan(sent, _queuedCount - sent).CopyTo(_queued);
                    _queuedCount -= sent;
                }
            }
        }

        if (_stalled || (events & ~PollEvents.Writable) == PollEvents.None)
        {
            lock (_gate)
            {
                UpdateInterest();
            }

            return;
        }

        if (!Read())
        {
            lock (_gate)
            {
                DropPeer();
            }
        }
    }

    // False when the peer is gone or speaks something else.
    private bool Read()
    {
        for (; ; )
        {
            if (!DeliverWhole(out bool broken))
            {
                return !broken;
            }

            int count = _peer!.Receive(_in.AsSpan(_have), SocketFlags.None, out SocketError error);
            if (error == SocketError.WouldBlock)
            {
                return true;
            }

            if (error != SocketError.Success || count == 0)
            {
                return false;
            }

            _have += count;
        }
    }

    // False to stop reading for now.
    private bool DeliverWhole(out bool broken)
    {
        broken = false;
        int at = 0;
        while (_have - at >= LengthBytes)
        {
            int length = BinaryPrimitives.ReadInt32BigEndian(_in.AsSpan(at));
            if (length is < 0 or > NetFrames.MaxFrameBytes)
            {
                broken = true;
                return false;
            }

            if (_have - at - LengthBytes < length)
            {
                break;
            }

            ReadOnlySpan<byte> frame = _in.AsSpan(at + LengthBytes, length);
            if (length >= Proto.EthernetBytes && _receiver is { } receiver && !receiver.TryReceive(frame, default))
            {
                lock (_gate)
                {
                    _stalled = true;
                }

                if (!receiver.TryReceive(frame, default))
                {
                    Shift(at);
                    lock (_gate)
                    {
                        UpdateInterest();
                    }

                    return false;
                }

                lock (_gate)
                {
                    _stalled = false;
                }
            }

            at += LengthBytes + length;
        }

        Shift(at);
        return true;
    }

    private void Shift(int at)
    {
        _in.AsSpan(at, _have - at).CopyTo(_in);
        _have -= at;
    }
}

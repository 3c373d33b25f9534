// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Net.Sockets;
using System.Text;
using System.Threading;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Net;

/// <summary>
/// A guest's vsock as Unix sockets, in Firecracker's convention. A guest that connects to port P of the host reaches the
/// socket PATH_P. A process of the host connects to PATH, writes "CONNECT P\n", and is connected to port P of the guest
/// once it has read "OK N\n" (N is its own port); a guest that refuses closes the connection.
/// </summary>
public sealed class UnixVsockBackend : IVsockBackend
{
    private const int MaxGreetingBytes = 32;

    private readonly Lock _gate = new();
    private readonly PollLoop _loop;
    private readonly string _path;
    private readonly Socket _listener;
    private readonly IPollRegistration _listening;
    private readonly HashSet<Stream> _streams = [];
    private IVsockAcceptor? _acceptor;

    /// <summary>Listens at a path.</summary>
    /// <exception cref="HostException">The path cannot be used.</exception>
    public UnixVsockBackend(PollLoop loop, string path)
    {
        ArgumentNullException.ThrowIfNull(loop);
        _loop = loop;
        _path = path;
        _listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified) { Blocking = false };
        try
        {
            File.Delete(path);
            _listener.Bind(new UnixDomainSocketEndPoint(path));
            _listener.Listen(16);
        }
        catch (Exception e) when (e is SocketException or IOException or UnauthorizedAccessException or ArgumentException)
        {
            _listener.Dispose();
            throw new HostException($"vsock {path}: {e.Message}");
        }

        _listening = loop.Add(_listener.SafeHandle, PollEvents.Readable, _ => Accept());
    }

    /// <inheritdoc/>
    public void Attach(IVsockAcceptor acceptor) => _acceptor = acceptor;

    /// <inheritdoc/>
    public IVsockStream? Connect(uint port, IVsockReceiver receiver)
    {
        var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified) { Blocking = false };
        try
        {
            // A Unix socket connects at once or not at all.
            socket.Connect(new UnixDomainSocketEndPoint(_path + "_" + port.ToString(CultureInfo.InvariantCulture)));
        }
        catch (Exception e) when (e is SocketException or ArgumentException)
        {
            socket.Dispose();
            return null;
        }

        return Track(new Stream(this, socket, receiver));
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _listening.Dispose();
        _listener.Dispose();
        Stream[] left;
        lock (_gate)
        {
            left = [.. _streams];
        }

        foreach (Stream stream in left)
        {
            stream.Dispose();
        }

        File.Delete(_path);
    }

    private Stream Track(Stream stream)
    {
        lock (_gate)
        {
            _streams.Add(stream);
        }

        return stream;
    }

    private void Accept()
    {
        try
        {
            Socket socket = _listener.Accept();
            socket.Blocking = false;
            Track(new Stream(this, socket, null)).ResumeRead();
        }
        catch (SocketException)
        {
            // Gone again.
        }
    }

    /// <summary>
    /// One connection. The loop's thread reads; any thread writes. No lock is held while the receiver is called.
    /// </summary>
    private sealed class Stream : IVsockStream
    {
        private readonly Lock _gate = new();
        private readonly UnixVsockBackend _owner;
        private readonly Socket _socket;
        private readonly IPollRegistration _registration;
        private readonly byte[] _buffer = new byte[64 * 1024];
        private IVsockReceiver? _receiver;
        private int _start;
        private int _count;
        private bool _reading;
        private bool _writing;
        private bool _ended;
        private bool _disposed;

        public Stream(UnixVsockBackend owner, Socket socket, IVsockReceiver? receiver)
        {
            _owner = owner;
            _socket = socket;
            _receiver = receiver;
            lock (_gate)
            {
                // The loop may report a hang-up before the assignment: it waits at the gate.
                _registration = owner._loop.Add(socket.SafeHandle, PollEvents.None, OnReady);
            }
        }

        public int Write(ReadOnlySpan<byte> bytes)
        {
            lock (_gate)
            {
                if (_disposed)
                {
                    return -1;
                }

                int sent = _socket.Send(bytes, SocketFlags.None, out SocketError error);
                if (error == SocketError.Success && sent > 0)
                {
                    return sent;
                }

                if (error is not (SocketError.Success or SocketError.WouldBlock))
                {
                    return -1;
                }

                _writing = true;
                Update();
                return 0;
            }
        }

        public void ShutdownWrite()
        {
            lock (_gate)
            {
                try
                {
                    if (!_disposed)
                    {
                        _socket.Shutdown(SocketShutdown.Send);
                    }
                }
                catch (SocketException)
                {
                    // The peer has gone; reading says so.
                }
            }
        }

        public void ResumeRead()
        {
            lock (_gate)
            {
                _reading = !_ended;
                Update();
            }
        }

        // The descriptor may be in use by the loop: it is closed there.
        public void Dispose()
        {
            lock (_gate)
            {
                if (_disposed)
                {
                    return;
                }

                _disposed = true;
            }

            lock (_owner._gate)
            {
                _owner._streams.Remove(this);
            }

            ThreadPool.UnsafeQueueUserWorkItem(
                static stream =>
                {
                    stream._registration.Dispose();
                    stream._socket.Dispose();
                },
                this,
                preferLocal: false);
        }

        private void Update()
        {
            if (!_disposed)
            {
                // What is in the buffer is delivered from the loop too: a writable socket calls it at once.
                bool nudge = _writing || (_reading && _count > 0);
                _registration.Interest = (_reading ? PollEvents.Readable : PollEvents.None)
                    | (nudge ? PollEvents.Writable : PollEvents.None);
            }
        }

        private void OnReady(PollEvents events)
        {
            bool write;
            bool read;
            lock (_gate)
            {
                if (_disposed)
                {
                    return;
                }

                write = _writing && (events & (PollEvents.Writable | PollEvents.Error | PollEvents.HangUp)) != 0;
                _writing &= !write;
                read = _reading;
                if (!read && !write)
                {
                    // A hang-up that nobody waits for would spin.
                    _registration.Interest = PollEvents.None;
                    if ((events & PollEvents.HangUp) != 0 && !_ended && _count == 0)
                    {
                        read = true;
                    }
                }
            }

            if (write)
            {
                _receiver?.OnWritable();
            }

            if (read)
            {
                Read();
            }

            lock (_gate)
            {
                Update();
            }
        }

        private void Read()
        {
            if (_count == 0)
            {
                int got = _socket.Receive(_buffer, SocketFlags.None, out SocketError error);
                if (error == SocketError.WouldBlock)
                {
                    return;
                }

                if (error != SocketError.Success || got == 0)
                {
                    End(error != SocketError.Success);
                    return;
                }

                _start = 0;
                _count = got;
            }

            if (_receiver is null && !Greet())
            {
                return;
            }

            int taken = _count == 0 ? 0 : _receiver!.OnData(_buffer.AsSpan(_start, _count));
            _start += taken;
            _count -= taken;
            if (_count > 0)
            {
                lock (_gate)
                {
                    _reading = false;
                }
            }
        }

        private void End(bool broken)
        {
            lock (_gate)
            {
                _ended = true;
                _reading = false;
            }

            if (_receiver is { } receiver)
            {
                receiver.OnEnd(broken);
            }
            else
            {
                Dispose();
            }
        }

        // "CONNECT P\n". False while it is not complete, or was refused.
        private bool Greet()
        {
            int end = _buffer.AsSpan(0, _start + _count).IndexOf((byte)'\n');
            if (end < 0 && _start + _count < MaxGreetingBytes)
            {
                int more = _socket.Receive(_buffer.AsSpan(_start + _count), SocketFlags.None, out SocketError error);
                if (error == SocketError.Success && more > 0)
                {
                    _count += more;
                    return Greet();
                }

                if (error != SocketError.WouldBlock)
                {
                    Dispose();
                }

                return false;
            }

            string line = end < 0 ? "" : Encoding.ASCII.GetString(_buffer, 0, end);
            bool valid = line.StartsWith("CONNECT ", StringComparison.Ordinal)
                && uint.TryParse(line.AsSpan(8), NumberStyles.None, CultureInfo.InvariantCulture, out uint port)
                && TryOpen(port);
            if (!valid)
            {
                Dispose();
                return false;
            }

            _count -= end + 1;
            _start = end + 1;
            return false; // data that came with the greeting waits for the guest's answer
        }

        private bool TryOpen(uint port)
        {
            lock (_gate)
            {
                _reading = false;
            }

            _receiver = _owner._acceptor?.Open(port, this, hostPort =>
            {
                if (hostPort != 0)
                {
                    Write(Encoding.ASCII.GetBytes(string.Create(CultureInfo.InvariantCulture, $"OK {hostPort}\n")));
                }
                else
                {
                    Dispose();
                }
            });
            return _receiver is not null;
        }
    }
}

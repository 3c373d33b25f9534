// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using System.Threading;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Char;

/// <summary>Reads a descriptor on a poll loop for as long as a receiver has room.</summary>
internal sealed class CharInput : IDisposable
{
    private readonly Lock _gate = new();
    private readonly PollLoop _loop;
    private readonly SafeHandle _handle;
    private readonly Action _onEnd;
    private readonly byte[] _buffer = new byte[4096];
    private readonly ICharReceiver _receiver;
    private IPollRegistration? _registration;
    private bool _ended;

    /// <param name="loop">Where to wait.</param>
    /// <param name="handle">What to read; stays open as long as this object.</param>
    /// <param name="receiver">Who takes the bytes.</param>
    /// <param name="onEnd">Called once at end of file or on an error, on the loop's thread.</param>
    public CharInput(PollLoop loop, SafeHandle handle, ICharReceiver receiver, Action onEnd)
    {
        _loop = loop;
        _handle = handle;
        _receiver = receiver;
        _onEnd = onEnd;
    }

    public void Start()
    {
        lock (_gate)
        {
            _registration ??= _loop.Add(_handle, PollEvents.Readable, OnReady);
        }
    }

    public void Resume()
    {
        lock (_gate)
        {
            if (!_ended && _registration is { } registration)
            {
                registration.Interest = PollEvents.Readable;
            }
        }
    }

    public void Dispose()
    {
        IPollRegistration? registration;
        lock (_gate)
        {
            registration = _registration;
            _registration = null;
            _ended = true;
        }

        // Without the gate: the loop may be inside OnReady.
        registration?.Dispose();
    }

    private void OnReady(PollEvents events)
    {
        int room = Math.Min(_receiver.RoomBytes, _buffer.Length);
        if (room <= 0)
        {
            lock (_gate)
            {
                if (_registration is { } registration)
                {
                    registration.Interest = PollEvents.None;
                }
            }

            // Room that appeared meanwhile was announced before we slept.
            if (_receiver.RoomBytes > 0)
            {
                Resume();
            }

            return;
        }

        IoResult result = FileIo.ReadStream(_handle, _buffer.AsSpan(0, room));
        if (result.IsOk && result.Bytes > 0)
        {
            _receiver.Receive(_buffer.AsSpan(0, (int)result.Bytes));
            return;
        }

        if (result.Error is Errno.EAGAIN)
        {
            return;
        }

        lock (_gate)
        {
            _ended = true;
            if (_registration is { } registration)
            {
                registration.Interest = PollEvents.None;
            }
        }

        _onEnd();
    }
}

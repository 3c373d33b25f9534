// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;

namespace Vmm.Backends.Char;

// Theory. A guest writes a serial port a byte at a time, on a vCPU thread, and must never wait for a terminal, a
// socket or a disk. So every character back end that ends in a descriptor has a ring of bytes and a thread that empties
// it with plain blocking writes, many bytes at a time. What does not fit is dropped and counted: a guest that floods
// its console loses output, not time.
//
// Descriptors stay blocking on purpose: O_NONBLOCK belongs to the open file, which the terminal of `vmctl run` shares
// with the user's shell.
//
// Input comes from a PollLoop. A back end reads at most what its receiver has room for and stops watching its
// descriptor while there is none, so that flow control reaches the other side.

/// <summary>A bounded queue of output with a thread that writes it. Any thread.</summary>
internal sealed class CharOutput : IDisposable
{
    public delegate void Sink(ReadOnlySpan<byte> bytes);

    private readonly object _gate = new();
    private readonly byte[] _ring;
    private readonly Sink _sink;
    private readonly Thread _thread;
    private long _head;
    private long _tail;
    private long _written;
    private long _dropped;
    private bool _stopping;

    /// <param name="name">For the thread's name.</param>
    /// <param name="capacityBytes">Size of the queue.</param>
    /// <param name="sink">Writes bytes; may block; must not throw. Called on the queue's thread, without locks.</param>
    public CharOutput(string name, int capacityBytes, Sink sink)
    {
        _ring = new byte[capacityBytes];
        _sink = sink;
        _thread = new Thread(Work) { Name = $"{name}-out", IsBackground = true };
        _thread.Start();
    }

    /// <summary>Bytes that did not fit.</summary>
    public long Dropped => Interlocked.Read(ref _dropped);

    public void Write(ReadOnlySpan<byte> bytes)
    {
        lock (_gate)
        {
            int room = _ring.Length - (int)(_head - _tail);
            if (_stopping || bytes.Length > room)
            {
                int keep = _stopping ? 0 : room;
                Interlocked.Add(ref _dropped, bytes.Length - keep);
                bytes = bytes[..keep];
            }

            if (bytes.IsEmpty)
            {
                return;
            }

            int at = (int)(_head % _ring.Length);
            int first = Math.Min(bytes.Length, _ring.Length - at);
            bytes[..first].CopyTo(_ring.AsSpan(at));
            bytes[first..].CopyTo(_ring);
            bool wasEmpty = _head == _tail;
            _head += bytes.Length;
            if (wasEmpty)
            {
                Monitor.PulseAll(_gate);
            }
        }
    }

    /// <summary>Waits until everything written so far has left, at most a time.</summary>
    public bool Flush(int timeoutMs)
    {
        long deadline = Environment.TickCount64 + timeoutMs;
        lock (_gate)
        {
            long wanted = _head;
            while (_written < wanted)
            {
                long left = deadline - Environment.TickCount64;
                if (left <= 0 || !Monitor.Wait(_gate, (int)left))
                {
                    return false;
                }
            }

            return true;
        }
    }

    /// <summary>Writes what is left and stops; gives up after half a second when the other side does not read.</summary>
    public void Dispose()
    {
        _ = Flush(500);
        lock (_gate)
        {
            _stopping = true;
            Monitor.PulseAll(_gate);
        }

        _ = _thread.Join(500);
    }

    private void Work()
    {
        byte[] chunk = new byte[16384];
        while (true)
        {
            int length;
            lock (_gate)
            {
                while (_head == _tail)
                {
                    if (_stopping)
                    {
                        return;
                    }

                    Monitor.Wait(_gate);
                }

                int at = (int)(_tail % _ring.Length);
                length = (int)Math.Min(Math.Min(_head - _tail, chunk.Length), _ring.Length - at);
                _ring.AsSpan(at, length).CopyTo(chunk);
                _tail += length;
            }

            _sink(chunk.AsSpan(0, length));
            lock (_gate)
            {
                _written = _tail;
                Monitor.PulseAll(_gate);
            }
        }
    }
}

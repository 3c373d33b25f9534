// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;

namespace Vmm.Devices.Net;

/// <summary>
/// A card's transmit thread: guest writes to a doorbell register leave a mark, the thread does the work. It parks while
/// the machine is paused. With <c>inline</c> the work is done by whoever leaves the mark, one at a time, for tests and
/// machines that must repeat exactly.
/// </summary>
internal sealed class NicWorker : IDisposable
{
    private readonly Lock _gate = new();
    private readonly object _monitor = new();
    private readonly Action _work;
    private readonly string _name;
    private readonly bool _inline;
    private Thread? _thread;
    private bool _pending;
    private bool _paused = true;
    private bool _running;
    private bool _disposed;

    /// <summary>Makes one, paused.</summary>
    public NicWorker(string name, Action work, bool inline)
    {
        _name = name;
        _work = work;
        _inline = inline;
    }

    /// <summary>There is something to do. Any thread; not under a lock that the work takes when inline.</summary>
    public void Kick()
    {
        if (_inline)
        {
            RunInline();
            return;
        }

        lock (_monitor)
        {
            _pending = true;
            Monitor.PulseAll(_monitor);
        }
    }

    /// <summary>Returns when no work is under way and none will start.</summary>
    public void Pause()
    {
        lock (_monitor)
        {
            _paused = true;
            while (_running)
            {
                Monitor.Wait(_monitor);
            }
        }
    }

    /// <summary>Starts or continues, with one round of work.</summary>
    public void Resume()
    {
        lock (_monitor)
        {
            _paused = false;
            if (!_inline && _thread is null)
            {
                _thread = new Thread(Main) { IsBackground = true, Name = _name };
                _thread.Start();
            }
        }

        Kick();
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        lock (_monitor)
        {
            _disposed = true;
            Monitor.PulseAll(_monitor);
        }

        _thread?.Join();
    }

    private void RunInline()
    {
        lock (_monitor)
        {
            _pending = true;
            if (_running || _paused || _disposed)
            {
                return;
            }

            _running = true;
        }

        for (; ; )
        {
            lock (_monitor)
            {
                if (!_pending || _paused)
                {
                    _running = false;
                    Monitor.PulseAll(_monitor);
                    return;
                }

                _pending = false;
            }

            lock (_gate)
            {
                _work();
            }
        }
    }

    private void Main()
    {
        for (; ; )
        {
            lock (_monitor)
            {
                while (!_disposed && (_paused || !_pending))
                {
                    Monitor.Wait(_monitor);
                }

                if (_disposed)
                {
                    return;
                }

                _pending = false;
                _running = true;
            }

            _work();
            lock (_monitor)
            {
                _running = false;
                Monitor.PulseAll(_monitor);
            }
        }
    }
}

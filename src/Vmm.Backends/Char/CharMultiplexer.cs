// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;

namespace Vmm.Backends.Char;

/// <summary>Somebody who watches a console: a `vmctl console` session, a web page. Must not block.</summary>
public interface ICharWatcher
{
    /// <summary>Output of the guest. Any thread, one call at a time.</summary>
    void Output(ReadOnlySpan<byte> bytes);

    /// <summary>The guest takes input again after <see cref="CharMultiplexer.Send"/> took less than it was given.</summary>
    void ResumeInput();
}

/// <summary>
/// One serial port for many: the log that is always kept, one end that the definition names (stdio, pty, socket, file or
/// none), and any number of watchers. All of them see the output; input comes from one at a time. That is the named end
/// until a watcher takes over, and again when the watcher leaves; what others type is dropped and counted.
/// </summary>
public sealed class CharMultiplexer : ICharBackend
{
    private readonly Lock _gate = new();
    private readonly Lock _outputGate = new();
    private readonly ICharBackend? _end;
    private ICharWatcher[] _watchers = [];
    private ICharReceiver? _receiver;
    private ICharWatcher? _writer;
    private long _ignored;

    /// <summary>Makes one.</summary>
    /// <param name="log">Kept with everything that the guest writes; disposed with this object.</param>
    /// <param name="end">The end that the definition names, or null; disposed with this object.</param>
    public CharMultiplexer(CharLog log, ICharBackend? end)
    {
        ArgumentNullException.ThrowIfNull(log);
        Log = log;
        _end = end;
    }

    /// <summary>Everything that the guest wrote lately.</summary>
    public CharLog Log { get; }

    /// <summary>Input bytes of those who had no right to write.</summary>
    public long IgnoredInputBytes => Interlocked.Read(ref _ignored);

    /// <inheritdoc/>
    public void Write(ReadOnlySpan<byte> bytes)
    {
        lock (_outputGate)
        {
            Log.Write(bytes);
            _end?.Write(bytes);
            foreach (ICharWatcher watcher in Volatile.Read(ref _watchers))
            {
                watcher.Output(bytes);
            }
        }
    }

    /// <inheritdoc/>
    public void Attach(ICharReceiver receiver)
    {
        lock (_gate)
        {
            _receiver = receiver;
        }

        _end?.Attach(new EndReceiver(this));
    }

    /// <inheritdoc/>
    public void ResumeInput()
    {
        ICharWatcher? writer;
        lock (_gate)
        {
            writer = _writer;
        }

        if (writer is not null)
        {
            writer.ResumeInput();
        }
        else
        {
            _end?.ResumeInput();
        }
    }

    /// <summary>Adds a watcher and shows it the newest output, without a gap to what follows.</summary>
    /// <param name="watcher">Who.</param>
    /// <param name="tailBytes">How much of the past it gets at once.</param>
    public void Watch(ICharWatcher watcher, int tailBytes = 16384)
    {
        ArgumentNullException.ThrowIfNull(watcher);
        lock (_outputGate)
        {
            byte[] tail = Log.Tail(tailBytes);
            if (tail.Length > 0)
            {
                watcher.Output(tail);
            }

            Volatile.Write(ref _watchers, [.. _watchers, watcher]);
        }
    }

    /// <summary>Removes a watcher; the right to write goes back to the named end.</summary>
    public void Leave(ICharWatcher watcher)
    {
        lock (_outputGate)
        {
            Volatile.Write(ref _watchers, Array.FindAll(_watchers, other => other != watcher));
        }

        bool wasWriter;
        lock (_gate)
        {
            wasWriter = _writer == watcher;
            if (wasWriter)
            {
                _writer = null;
            }
        }

        if (wasWriter)
        {
            _end?.ResumeInput();
        }
    }

    /// <summary>Gives a watcher the right to write.</summary>
    /// <param name="watcher">Who.</param>
    /// <param name="force">Also when another watcher has it.</param>
    /// <returns>False when another watcher has it and keeps it.</returns>
    public bool TryTakeInput(ICharWatcher watcher, bool force = false)
    {
        lock (_gate)
        {
            if (_writer is not null && _writer != watcher && !force)
            {
                return false;
            }

            _writer = watcher;
            return true;
        }
    }

    /// <summary>Input from a watcher.</summary>
    /// <returns>How many bytes were taken; the rest is to be sent again after <see cref="ICharWatcher.ResumeInput"/>.
    /// Somebody without the right to write is told that all were taken.</returns>
    public int Send(ICharWatcher watcher, ReadOnlySpan<byte> bytes)
    {
        ICharReceiver? receiver;
        lock (_gate)
        {
            receiver = _writer == watcher ? _receiver : null;
        }

        if (receiver is null)
        {
            Interlocked.Add(ref _ignored, bytes.Length);
            return bytes.Length;
        }

        int take = Math.Min(bytes.Length, receiver.RoomBytes);
        receiver.Receive(bytes[..take]);
        return take;
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _end?.Dispose();
        Log.Dispose();
    }

    private sealed class EndReceiver : ICharReceiver
    {
        private readonly CharMultiplexer _owner;

        public EndReceiver(CharMultiplexer owner) => _owner = owner;

        public int RoomBytes => Target is { } receiver ? receiver.RoomBytes : 4096;

        private ICharReceiver? Target
        {
            get
            {
                lock (_owner._gate)
                {
                    return _owner._writer is null ? _owner._receiver : null;
                }
            }
        }

        public void Receive(ReadOnlySpan<byte> bytes)
        {
            if (Target is { } receiver)
            {
                receiver.Receive(bytes);
            }
            else
            {
                Interlocked.Add(ref _owner._ignored, bytes.Length);
            }
        }
    }
}

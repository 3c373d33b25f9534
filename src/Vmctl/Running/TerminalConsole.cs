// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Text;
using System.Threading;
using Vmm.Backends.Char;
using Vmm.Core;
using Vmm.Host;

namespace Vmctl.Running;

/// <summary>
/// The terminal of <c>vmctl run</c> as the guest's serial console, with cu(1)'s escapes in front of the guest. The
/// terminal is put into raw mode only when the machine takes it, so that whatever fails before is printed as usual.
/// </summary>
internal sealed class TerminalConsole : ICharBackend
{
    private readonly Lock _gate = new();
    private readonly Action _onLeave;
    private PollLoop? _loop;
    private StdioCharBackend? _stdio;
    private EscapeReceiver? _escape;
    private bool _disposed;

    /// <summary>Makes one.</summary>
    /// <param name="onLeave">Called when the user types <c>~.</c>; any thread, must not block.</param>
    internal TerminalConsole(Action onLeave)
    {
        _onLeave = onLeave;
        IsTerminal = RawTerminal.IsTerminal(0);
    }

    /// <summary>Standard input is a terminal.</summary>
    internal bool IsTerminal { get; }

    /// <summary>The terminal is in raw mode: a line feed alone does not return to its start.</summary>
    internal bool IsRaw
    {
        get
        {
            lock (_gate)
            {
                return IsTerminal && _stdio is not null && !_disposed;
            }
        }
    }

    public void Write(ReadOnlySpan<byte> bytes) => Volatile.Read(ref _stdio)?.Write(bytes);

    public void Attach(ICharReceiver receiver)
    {
        lock (_gate)
        {
            if (_disposed)
            {
                return;
            }

            _loop = new PollLoop("terminal");
            _stdio = new StdioCharBackend(_loop);
            _escape = IsTerminal ? new EscapeReceiver(this, receiver) : null;
            _stdio.Attach(_escape ?? receiver);
        }
    }

    public void ResumeInput()
    {
        // Called by the device, perhaps under its lock: what waits for its room is given to it by another thread.
        if (_escape is { HasPending: true } escape)
        {
            ThreadPool.UnsafeQueueUserWorkItem(static waiting => waiting.Flush(), escape, preferLocal: false);
            return;
        }

        Volatile.Read(ref _stdio)?.ResumeInput();
    }

    public void Dispose()
    {
        StdioCharBackend? stdio;
        lock (_gate)
        {
            if (_disposed)
            {
                return;
            }

            _disposed = true;
            stdio = _stdio;
        }

        stdio?.Dispose();
        _loop?.Dispose();
    }

    private sealed class EscapeReceiver : ICharReceiver
    {
        private readonly ConsoleEscape _escape = new();
        private readonly TerminalConsole _owner;
        private readonly ICharReceiver _guest;
        private readonly Lock _gate = new();
        private volatile bool _hasPending;
        private byte _pending;

        internal EscapeReceiver(TerminalConsole owner, ICharReceiver guest)
        {
            _owner = owner;
            _guest = guest;
        }

        /// <summary>A tilde that was held back came out with the next key, and the guest had room for one of the two.</summary>
        internal bool HasPending => _hasPending;

        public int RoomBytes => _hasPending ? 0 : _guest.RoomBytes;

        internal void Flush()
        {
            lock (_gate)
            {
                if (!_hasPending || _guest.RoomBytes == 0)
                {
                    return;
                }

                _hasPending = false;
                _guest.Receive([_pending]);
            }

            _owner.ResumeInput();
        }

        public void Receive(ReadOnlySpan<byte> bytes)
        {
            Span<byte> kept = stackalloc byte[257];
            while (!bytes.IsEmpty)
            {
                ReadOnlySpan<byte> piece = bytes[..Math.Min(bytes.Length, 256)];
                EscapeAction action = _escape.Filter(piece, kept, out int written, out int consumed);
                bytes = bytes[consumed..];
                Deliver(kept[..written]);

                if (action == EscapeAction.Leave)
                {
                    _owner._onLeave();
                    return;
                }

                if (action == EscapeAction.Help)
                {
                    _owner.Write(ConsoleEscape.HelpText);
                }
            }
        }

        private void Deliver(ReadOnlySpan<byte> keys)
        {
            lock (_gate)
            {
                int take = Math.Min(keys.Length, _guest.RoomBytes);
                if (take > 0)
                {
                    _guest.Receive(keys[..take]);
                }

                if (take < keys.Length)
                {
                    _pending = keys[take];
                    _hasPending = true;
                }
            }
        }
    }
}

/// <summary>Writes lines for people to a terminal that may be in raw mode at the moment.</summary>
internal sealed class RawAwareWriter : TextWriter
{
    private readonly TextWriter _inner;
    private readonly Func<bool> _isRaw;

    internal RawAwareWriter(TextWriter inner, Func<bool> isRaw)
    {
        _inner = inner;
        _isRaw = isRaw;
    }

    public override Encoding Encoding => _inner.Encoding;

    public override void Write(char value)
    {
        if (value == '\n' && _isRaw())
        {
            _inner.Write('\r');
        }

        _inner.Write(value);
    }

    public override void Flush() => _inner.Flush();
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Net.Sockets;
using System.Threading;
using Microsoft.Win32.SafeHandles;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Char;

/// <summary>
/// Standard input and output of `vmctl run`. A terminal is put into raw mode, so that every key reaches the receiver, which
/// looks for escapes itself.
/// </summary>
public sealed class StdioCharBackend : ICharBackend
{
    private readonly PollLoop _loop;
    private readonly SafeFileHandle _in = new(0, ownsHandle: false);
    private readonly SafeFileHandle _out = new(1, ownsHandle: false);
    private readonly RawTerminal? _terminal;
    private readonly CharOutput _output;
    private CharInput? _input;

    /// <summary>Takes over standard input and output.</summary>
    /// <param name="loop">Where input is waited for.</param>
    public StdioCharBackend(PollLoop loop)
    {
        _loop = loop;
        if (RawTerminal.IsTerminal(0))
        {
            _terminal = RawTerminal.Enter(0);
        }

        _output = new CharOutput("stdio", 1 << 20, bytes => _ = StreamWriter.WriteAll(_out, bytes));
    }

    /// <summary>Bytes of output that were dropped.</summary>
    public long Dropped => _output.Dropped;

    /// <inheritdoc/>
    public void Write(ReadOnlySpan<byte> bytes) => _output.Write(bytes);

    /// <inheritdoc/>
    public void Attach(ICharReceiver receiver)
    {
        ArgumentNullException.ThrowIfNull(receiver);
        _input = new CharInput(_loop, _in, receiver, () => { });
        _input.Start();
    }

    /// <inheritdoc/>
    public void ResumeInput() => _input?.Resume();

    /// <inheritdoc/>
    public void Dispose()
    {
        _input?.Dispose();
        _output.Dispose();
        _terminal?.Dispose();
        _in.Dispose();
        _out.Dispose();
    }
}

/// <summary>A pseudo-terminal that a person or program opens.</summary>
public sealed class PtyCharBackend : ICharBackend
{
    private readonly PollLoop _loop;
    private readonly PseudoTerminal _pty;
    private readonly CharOutput _output;
    private CharInput? _input;

    /// <summary>Makes a pseudo-terminal.</summary>
    /// <exception cref="IOException">The host has none left.</exception>
    public PtyCharBackend(PollLoop loop)
    {
        _loop = loop;
        _pty = PseudoTerminal.Open();

        // While nobody reads, the writer's thread waits in the kernel and the queue overflows, which is counted.
        _output = new CharOutput("pty", 1 << 16, bytes => _ = StreamWriter.WriteAll(_pty.Master, bytes));
    }

    /// <summary>The path to open.</summary>
    public string Path => _pty.SlavePath;

    /// <inheritdoc/>
    public void Write(ReadOnlySpan<byte> bytes) => _output.Write(bytes);

    /// <inheritdoc/>
    public void Attach(ICharReceiver receiver)
    {
        ArgumentNullException.ThrowIfNull(receiver);
        _input = new CharInput(_loop, _pty.Master, receiver, () => { });
        _input.Start();
    }

    /// <inheritdoc/>
    public void ResumeInput() => _input?.Resume();

    /// <inheritdoc/>
    public void Dispose()
    {
        _input?.Dispose();

        // Closing the other side ends a write that waits for a reader.
        _ = _output.Flush(100);
        _pty.HangUp();
        _output.Dispose();
        _pty.Dispose();
    }
}

/// <summary>Output into a file, appended; no input.</summary>
public sealed class FileCharBackend : ICharBackend
{
    private readonly FileStream _file;
    private readonly CharOutput _output;

    /// <summary>Opens or makes the file.</summary>
    /// <exception cref="IOException">It cannot be opened.</exception>
    public FileCharBackend(string path)
    {
        _file = new FileStream(path, FileMode.Append, FileAccess.Write, FileShare.ReadWrite | FileShare.Delete, 0);
        _output = new CharOutput("file", 1 << 20, Put);
    }

    /// <inheritdoc/>
    public void Write(ReadOnlySpan<byte> bytes) => _output.Write(bytes);

    /// <inheritdoc/>
    public void Attach(ICharReceiver receiver)
    {
    }

    /// <inheritdoc/>
    public void ResumeInput()
    {
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _output.Dispose();
        _file.Dispose();
    }

    private void Put(ReadOnlySpan<byte> bytes)
    {
        try
        {
            _file.Write(bytes);
        }
        catch (IOException)
        {
            // A full disk loses output, not the machine.
        }
    }
}

/// <summary>A Unix socket, mode 0600; one client at a time, a new one replaces the old.</summary>
public sealed class UnixSocketCharBackend : ICharBackend
{
    private readonly Lock _gate = new();
    private readonly PollLoop _loop;
    private readonly string _path;
    private readonly Socket _listener;
    private readonly CharOutput _output;
    private IPollRegistration? _accepting;
    private ICharReceiver? _receiver;
    private Socket? _client;
    private CharInput? _input;
    private bool _disposed;

    /// <summary>Listens. A socket file that nobody serves any more is replaced.</summary>
    /// <exception cref="IOException">The path is taken or cannot be made.</exception>
    public UnixSocketCharBackend(PollLoop loop, string path)
    {
        _loop = loop;
        _path = path;
        _listener = UnixSocketListener.Listen(path);
        _output = new CharOutput("socket", 1 << 18, Put);
        _accepting = loop.Add(_listener.SafeHandle, PollEvents.Readable, OnConnection);
    }

    /// <inheritdoc/>
    public void Write(ReadOnlySpan<byte> bytes) => _output.Write(bytes);

    /// <inheritdoc/>
    public void Attach(ICharReceiver receiver)
    {
        lock (_gate)
        {
            _receiver = receiver;
        }
    }

    /// <inheritdoc/>
    public void ResumeInput()
    {
        lock (_gate)
        {
            _input?.Resume();
        }
    }

    /// <inheritdoc/>
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

        _accepting?.Dispose();
        _accepting = null;
        _output.Dispose();
        DropClient(null);
        _listener.Dispose();
        File.Delete(_path);
    }

    private void OnConnection(PollEvents events)
    {
        Socket client;
        try
        {
            client = _listener.Accept();
        }
        catch (SocketException)
        {
            return;
        }

        client.SendTimeout = 1000;
        DropClient(null);
        lock (_gate)
        {
            _client = client;
            if (_receiver is not null)
            {
                _input = new CharInput(_loop, client.SafeHandle, _receiver, () => DropClient(client));
                _input.Start();
            }
        }
    }

    private void DropClient(Socket? which)
    {
        Socket? client;
        CharInput? input;
        lock (_gate)
        {
            if (which is not null && which != _client)
            {
                return;
            }

            client = _client;
            input = _input;
            _client = null;
            _input = null;
        }

        input?.Dispose();
        client?.Dispose();
    }

    private void Put(ReadOnlySpan<byte> bytes)
    {
        Socket? client;
        lock (_gate)
        {
            client = _client;
        }

        try
        {
            while (client is not null && !bytes.IsEmpty)
            {
                int sent = client.Send(bytes, SocketFlags.None);
                bytes = bytes[sent..];
            }
        }
        catch (SocketException)
        {
            // Gone, or has not read for a second: it can come back.
            DropClient(client);
        }
        catch (ObjectDisposedException)
        {
            // Replaced by another client.
        }
    }
}

/// <summary>Blocking writes to a descriptor.</summary>
internal static class StreamWriter
{
    /// <returns>False when the descriptor takes no more; the rest is lost.</returns>
    public static bool WriteAll(SafeFileHandle handle, ReadOnlySpan<byte> bytes)
    {
        while (!bytes.IsEmpty)
        {
            IoResult result = FileIo.WriteStream(handle, bytes);
            if (!result.IsOk || result.Bytes <= 0)
            {
                return false;
            }

            bytes = bytes[(int)result.Bytes..];
        }

        return true;
    }
}

/// <summary>Makes listening Unix sockets.</summary>
internal static class UnixSocketListener
{
    public static Socket Listen(string path)
    {
        var address = new UnixDomainSocketEndPoint(path);
        var listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            if (File.Exists(path) && IsStale(address))
            {
                File.Delete(path);
            }

            listener.Bind(address);
#pragma warning disable CA1416 // not for Windows: nothing here is
            File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserWrite);
#pragma warning restore CA1416
            listener.Listen(4);
            return listener;
        }
        catch (SocketException e)
        {
            listener.Dispose();
            throw new IOException($"{path}: {e.Message}", e);
        }
    }

    private static bool IsStale(UnixDomainSocketEndPoint address)
    {
        using var probe = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            probe.Connect(address);
            return false;
        }
        catch (SocketException e)
        {
            return e.SocketErrorCode == SocketError.ConnectionRefused;
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Channels;
using System.Threading.Tasks;

namespace Vmm.Fleet;

// Theory. A VM process listens on two Unix sockets, for control and for its console. What both have in common is here:
// clients are bounded in number, what goes to a client lies in a bounded queue that a task of its own empties, so that
// no client can hold up whoever has something to say, and whatever ends a client takes it off the list and closes it.
// What a full queue means differs (a lost event is fatal, lost output is not), so the client decides that itself.

/// <summary>One connection of a <see cref="SocketServer{TClient}"/>.</summary>
public abstract class SocketClient
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(1);

    private readonly Channel<byte[]> _queue;

    /// <summary>Takes over a connection.</summary>
    /// <param name="socket">The connection; closed with this client.</param>
    /// <param name="queued">How many pieces may wait to be sent.</param>
    protected SocketClient(Socket socket, int queued)
    {
        Socket = socket;
        _queue = Channel.CreateBounded<byte[]>(queued);
    }

    /// <summary>The connection, for receiving.</summary>
    protected Socket Socket { get; }

    /// <summary>Ends when everything was sent after the client was closed, or when the connection is gone.</summary>
    protected Task Sending { get; private set; } = Task.CompletedTask;

    /// <summary>Serves the client until it goes. Socket errors and a socket that is closed meanwhile may pass out of it.</summary>
    protected abstract Task ServeAsync();

    /// <summary>Queues a piece to be sent. Any thread; never waits.</summary>
    /// <returns>False when the queue is full or the client closed.</returns>
    protected bool TrySend(byte[] piece) => _queue.Writer.TryWrite(piece);

    /// <summary>Drops the connection, and what is still queued for it.</summary>
    protected void Abandon()
    {
        _queue.Writer.TryComplete();
        Socket.Dispose();
    }

    internal void Start(Action<SocketClient> leave)
    {
        Sending = Task.Run(SendAsync);
        _ = Task.Run(() => LiveAsync(leave));
    }

    internal async Task CloseAsync()
    {
        _queue.Writer.TryComplete();
        await Task.WhenAny(Sending, Task.Delay(s_patience)).ConfigureAwait(false);
        Socket.Dispose();
    }

    private async Task LiveAsync(Action<SocketClient> leave)
    {
        try
        {
            await ServeAsync().ConfigureAwait(false);
        }
        catch (Exception failure) when (failure is SocketException or ObjectDisposedException)
        {
            // The client went away; so do we.
        }
        finally
        {
            leave(this);
            await CloseAsync().ConfigureAwait(false);
        }
    }

    private async Task SendAsync()
    {
        try
        {
            await foreach (byte[] piece in _queue.Reader.ReadAllAsync().ConfigureAwait(false))
            {
                for (int sent = 0; sent < piece.Length;)
                {
                    sent += await Socket.SendAsync(piece.AsMemory(sent)).ConfigureAwait(false);
                }
            }
        }
        catch (Exception failure) when (failure is SocketException or ObjectDisposedException)
        {
            // Gone; the receiving side takes it off the list.
        }
    }
}

/// <summary>Listens on a Unix socket and keeps its clients. Thread-safe.</summary>
/// <typeparam name="TClient">What a connection becomes.</typeparam>
public sealed class SocketServer<TClient> : IAsyncDisposable
    where TClient : SocketClient
{
    private static readonly TimeSpan s_pause = TimeSpan.FromMilliseconds(100);

    private readonly Lock _gate = new();
    private readonly List<TClient> _clients = [];
    private readonly CancellationTokenSource _stopping = new();
    private readonly Func<Socket, TClient> _admit;
    private readonly int _maxClients;
    private readonly string _path;
    private readonly Socket _listener;
    private readonly Task _accepting;

    /// <summary>Starts to listen.</summary>
    /// <param name="path">The socket's path; a stale file there is replaced.</param>
    /// <param name="maxClients">Connections beyond this number are closed at once.</param>
    /// <param name="admit">Makes a client of a connection. Must not block or throw.</param>
    /// <exception cref="IOException">The path is too long or cannot be bound.</exception>
    public SocketServer(string path, int maxClients, Func<Socket, TClient> admit)
    {
        _path = path;
        _maxClients = maxClients;
        _admit = admit;
        _listener = UnixSockets.Listen(path);
        _accepting = AcceptAsync();
    }

    /// <summary>Does something for every client, in the same order for all callers. It must not block.</summary>
    public void ForEach(Action<TClient> act)
    {
        ArgumentNullException.ThrowIfNull(act);
        lock (_gate)
        {
            foreach (TClient client in _clients)
            {
                act(client);
            }
        }
    }

    /// <summary>Closes the socket and removes its file. What was queued for a client is still sent, within a second.</summary>
    public async ValueTask DisposeAsync()
    {
        await _stopping.CancelAsync().ConfigureAwait(false);
        _listener.Dispose();
        await _accepting.ConfigureAwait(false);
        List<TClient> left;
        lock (_gate)
        {
            left = [.. _clients];
        }

        foreach (TClient client in left)
        {
            await client.CloseAsync().ConfigureAwait(false);
        }

        File.Delete(_path);
        _stopping.Dispose();
    }

    private async Task AcceptAsync()
    {
        while (true)
        {
            Socket socket;
            try
            {
                socket = await _listener.AcceptAsync(_stopping.Token).ConfigureAwait(false);
            }
            catch (SocketException) when (!_stopping.IsCancellationRequested)
            {
                // Out of descriptors, or a caller that hung up: the listener itself is sound. Not at full speed, though.
                await Task.Delay(s_pause).ConfigureAwait(false);
                continue;
            }
            catch (Exception failure) when (failure is OperationCanceledException or SocketException or ObjectDisposedException)
            {
                return;
            }

            lock (_gate)
            {
                if (_clients.Count >= _maxClients)
                {
                    socket.Dispose();
                    continue;
                }

                TClient client = _admit(socket);
                _clients.Add(client);
                client.Start(Remove);
            }
        }
    }

    private void Remove(SocketClient client)
    {
        lock (_gate)
        {
            _clients.Remove((TClient)client);
        }
    }
}

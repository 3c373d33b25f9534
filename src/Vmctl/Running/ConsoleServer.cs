// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Net.Sockets;
using System.Text.Json;
using System.Threading;
using System.Threading.Channels;
using System.Threading.Tasks;
using Vmm.Backends.Char;
using Vmm.Fleet;

namespace Vmctl.Running;

// Theory. `vmctl console` attaches here. A client says in one line of JSON what it wants, is answered in one line, and
// from then on the socket carries bytes both ways:
//
//   -> {"write": true, "force": false, "tail": 16384}     <- {"writer": true}
//
// Any number of clients watch; one writes. Who comes second watches, unless it takes the right to write by force, in
// which case the first goes on watching. A client that does not read fast enough loses output (it is told so in the
// stream) and never holds the guest up.

/// <summary>Serves the console socket of one VM.</summary>
internal sealed class ConsoleServer : IAsyncDisposable
{
    private const int MaxClients = 64;
    private const int QueuedPieces = 1024;

    private readonly Lock _gate = new();
    private readonly List<Client> _clients = [];
    private readonly CancellationTokenSource _stopping = new();
    private readonly CharMultiplexer _console;
    private readonly Socket _listener;
    private readonly string _path;
    private readonly Task _accepting;

    /// <summary>Starts to listen.</summary>
    /// <exception cref="IOException">The path cannot be bound.</exception>
    internal ConsoleServer(string path, CharMultiplexer console)
    {
        _path = path;
        _console = console;
        _listener = UnixSockets.Listen(path);
        _accepting = AcceptAsync();
    }

    public async ValueTask DisposeAsync()
    {
        await _stopping.CancelAsync().ConfigureAwait(false);
        _listener.Dispose();
        await _accepting.ConfigureAwait(false);
        List<Client> left;
        lock (_gate)
        {
            left = [.. _clients];
        }

        foreach (Client client in left)
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
            catch (Exception failure) when (failure is OperationCanceledException or SocketException or ObjectDisposedException)
            {
                return;
            }

            lock (_gate)
            {
                if (_clients.Count >= MaxClients)
                {
                    socket.Dispose();
                    continue;
                }

                var client = new Client(this, socket);
                _clients.Add(client);
                client.Start();
            }
        }
    }

    private sealed class Client : ICharWatcher
    {
        private readonly Channel<byte[]> _output = Channel.CreateBounded<byte[]>(QueuedPieces);
        private readonly Channel<bool> _room = Channel.CreateBounded<bool>(
            new BoundedChannelOptions(1) { FullMode = BoundedChannelFullMode.DropWrite });

        private readonly ConsoleServer _server;
        private readonly Socket _socket;
        private bool _dropping;
        private Task _sending = Task.CompletedTask;

        internal Client(ConsoleServer server, Socket socket)
        {
            _server = server;
            _socket = socket;
        }

        public void Output(ReadOnlySpan<byte> bytes)
        {
            if (_dropping && _output.Writer.TryWrite("\r\n[output was dropped: this console reads too slowly]\r\n"u8.ToArray()))
            {
                _dropping = false;
            }

            if (!_dropping && !_output.Writer.TryWrite(bytes.ToArray()))
            {
                _dropping = true;
            }
        }

        public void ResumeInput() => _room.Writer.TryWrite(true);

        internal void Start() => _ = Task.Run(ServeAsync);

        internal async Task CloseAsync()
        {
            _output.Writer.TryComplete();
            await Task.WhenAny(_sending, Task.Delay(1000)).ConfigureAwait(false);
            _socket.Dispose();
        }

        private async Task ServeAsync()
        {
            try
            {
                var buffer = new byte[4096];
                (int filled, int end) = await ReadHelloAsync(buffer).ConfigureAwait(false);
                if (end >= 0)
                {
                    Greet(buffer.AsMemory(0, end));
                    _sending = Task.Run(SendAsync);
                    await ForwardAsync(buffer.AsMemory(end + 1, filled - end - 1)).ConfigureAwait(false);
                    while (await _socket.ReceiveAsync(buffer).ConfigureAwait(false) is > 0 and int count)
                    {
                        await ForwardAsync(buffer.AsMemory(0, count)).ConfigureAwait(false);
                    }

                    // The client has said all it wanted and may still listen.
                    await _sending.ConfigureAwait(false);
                }
            }
            catch (Exception failure) when (failure is SocketException or ObjectDisposedException or JsonException or InvalidOperationException)
            {
                // A client that left, or that did not speak our language.
            }

            _server._console.Leave(this);
            lock (_server._gate)
            {
                _server._clients.Remove(this);
            }

            await CloseAsync().ConfigureAwait(false);
        }

        private async Task<(int Filled, int End)> ReadHelloAsync(byte[] buffer)
        {
            int filled = 0;
            while (filled < buffer.Length)
            {
                int count = await _socket.ReceiveAsync(buffer.AsMemory(filled)).ConfigureAwait(false);
                if (count == 0)
                {
                    return (filled, -1);
                }

                filled += count;
                int end = buffer.AsSpan(0, filled).IndexOf((byte)'\n');
                if (end >= 0)
                {
                    return (filled, end);
                }
            }

            return (filled, -1);
        }

        private void Greet(ReadOnlyMemory<byte> hello)
        {
            using JsonDocument document = JsonDocument.Parse(hello);
            JsonElement root = document.RootElement;
            bool write = root.TryGetProperty("write", out JsonElement wish) && wish.GetBoolean();
            bool force = root.TryGetProperty("force", out JsonElement force1) && force1.GetBoolean();
            int tail = root.TryGetProperty("tail", out JsonElement size) && size.TryGetInt32(out int bytes) ? Math.Clamp(bytes, 0, 1 << 20) : 16384;
            bool isWriter = write && _server._console.TryTakeInput(this, force);
            Output(isWriter ? "{\"writer\": true}\n"u8 : "{\"writer\": false}\n"u8);
            _server._console.Watch(this, tail);
        }

        private async Task ForwardAsync(ReadOnlyMemory<byte> bytes)
        {
            while (!bytes.IsEmpty)
            {
                int taken = _server._console.Send(this, bytes.Span);
                bytes = bytes[taken..];
                if (!bytes.IsEmpty)
                {
                    // The guest's receiver is full. The wait is bounded in case its word of more room came just before.
                    await Task.WhenAny(_room.Reader.WaitToReadAsync().AsTask(), Task.Delay(100)).ConfigureAwait(false);
                    _room.Reader.TryRead(out _);
                }
            }
        }

        private async Task SendAsync()
        {
            try
            {
                await foreach (byte[] piece in _output.Reader.ReadAllAsync().ConfigureAwait(false))
                {
                    for (int sent = 0; sent < piece.Length;)
                    {
                        sent += await _socket.SendAsync(piece.AsMemory(sent)).ConfigureAwait(false);
                    }
                }
            }
            catch (Exception failure) when (failure is SocketException or ObjectDisposedException)
            {
                // Gone; the receiving side cleans up.
            }
        }
    }
}

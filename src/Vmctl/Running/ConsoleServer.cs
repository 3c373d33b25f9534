// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Net.Sockets;
using System.Text.Json;
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

    private readonly SocketServer<Client> _server;

    /// <summary>Starts to listen.</summary>
    /// <exception cref="IOException">The path cannot be bound.</exception>
    internal ConsoleServer(string path, CharMultiplexer console)
    {
        _server = new SocketServer<Client>(path, MaxClients, socket => new Client(console, socket));
    }

    public ValueTask DisposeAsync() => _server.DisposeAsync();

    private sealed class Client : SocketClient, ICharWatcher
    {
        private readonly Channel<bool> _room = Channel.CreateBounded<bool>(
            new BoundedChannelOptions(1) { FullMode = BoundedChannelFullMode.DropWrite });

        private readonly CharMultiplexer _console;
        private bool _dropping;

        internal Client(CharMultiplexer console, Socket socket)
            : base(socket, QueuedPieces)
        {
            _console = console;
        }

        public void Output(ReadOnlySpan<byte> bytes)
        {
            if (_dropping && TrySend("\r\n[output was dropped: this console reads too slowly]\r\n"u8.ToArray()))
            {
                _dropping = false;
            }

            if (!_dropping && !TrySend(bytes.ToArray()))
            {
                _dropping = true;
            }
        }

        public void ResumeInput() => _room.Writer.TryWrite(true);

        protected override async Task ServeAsync()
        {
            try
            {
                var buffer = new byte[4096];
                (int filled, int end) = await ReadHelloAsync(buffer).ConfigureAwait(false);
                if (end < 0)
                {
                    return;
                }

                Greet(buffer.AsMemory(0, end));
                await ForwardAsync(buffer.AsMemory(end + 1, filled - end - 1)).ConfigureAwait(false);
                while (await Socket.ReceiveAsync(buffer).ConfigureAwait(false) is > 0 and int count)
                {
                    await ForwardAsync(buffer.AsMemory(0, count)).ConfigureAwait(false);
                }

                // The client has said all it wanted and may still listen.
                await Sending.ConfigureAwait(false);
            }
            catch (Exception failure) when (failure is JsonException or InvalidOperationException)
            {
                // A client that does not speak our language.
            }
            finally
            {
                _console.Leave(this);
            }
        }

        private async Task<(int Filled, int End)> ReadHelloAsync(byte[] buffer)
        {
            int filled = 0;
            while (filled < buffer.Length)
            {
                int count = await Socket.ReceiveAsync(buffer.AsMemory(filled)).ConfigureAwait(false);
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
            bool isWriter = write && _console.TryTakeInput(this, force);
            Output(isWriter ? "{\"writer\": true}\n"u8 : "{\"writer\": false}\n"u8);
            _console.Watch(this, tail);
        }

        private async Task ForwardAsync(ReadOnlyMemory<byte> bytes)
        {
            while (!bytes.IsEmpty)
            {
                int taken = _console.Send(this, bytes.Span);
                bytes = bytes[taken..];
                if (!bytes.IsEmpty)
                {
                    // The guest's receiver is full. The wait is bounded in case its word of more room came just before.
                    await Task.WhenAny(_room.Reader.WaitToReadAsync().AsTask(), Task.Delay(100)).ConfigureAwait(false);
                    _room.Reader.TryRead(out _);
                }
            }
        }
    }
}

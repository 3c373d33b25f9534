// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers;
using System.IO;
using System.Net.Sockets;
using System.Text;
using System.Text.Json;
using System.Threading;
using System.Threading.Channels;
using System.Threading.Tasks;

namespace Vmm.Fleet.Control;

/// <summary>
/// A connection to a VM's control socket. One command at a time; events that arrive in between are kept for
/// <see cref="Events"/>. Dispose closes it.
/// </summary>
public sealed class ControlClient : IDisposable
{
    /// <summary>
    /// The longest answer that is taken: a picture of a large screen. The VM's process may be in its guest's hands; it must
    /// not fill the memory of who asks it.
    /// </summary>
    public const int MaxLineBytes = 32 << 20;

    private readonly Socket _socket;
    private readonly NetworkStream _stream;
    private readonly LineReader _reader;
    private readonly SemaphoreSlim _turn = new(1, 1);
    private readonly Channel<JsonElement> _answers = Channel.CreateUnbounded<JsonElement>();
    private readonly Channel<string> _events = Channel.CreateBounded<string>(
        new BoundedChannelOptions(256) { FullMode = BoundedChannelFullMode.DropOldest });

    private ControlClient(Socket socket)
    {
        _socket = socket;
        _stream = new NetworkStream(socket, ownsSocket: true);
        _reader = new LineReader(_stream, MaxLineBytes);
    }

    /// <summary>Names of events, oldest first; ends when the connection ends, which is when the VM's process ends.</summary>
    public ChannelReader<string> Events => _events.Reader;

    /// <summary>Connects and negotiates.</summary>
    /// <returns>Null when no VM listens there.</returns>
    /// <exception cref="OperationCanceledException">The token was cancelled.</exception>
    public static async Task<ControlClient?> TryConnectAsync(string path, CancellationToken cancellation)
    {
        Socket? socket = await UnixSockets.TryConnectAsync(path, cancellation).ConfigureAwait(false);
        if (socket is null)
        {
            return null;
        }

        var client = new ControlClient(socket);
        try
        {
            string? greeting = await client._reader.ReadLineAsync(cancellation).ConfigureAwait(false);
            if (greeting is null || !greeting.StartsWith("{\"QMP\"", StringComparison.Ordinal))
            {
                client.Dispose();
                return null;
            }

            _ = Task.Run(client.ReceiveAsync, CancellationToken.None);
            await client.ExecuteAsync("qmp_capabilities", null, cancellation).ConfigureAwait(false);
            return client;
        }
        catch (Exception failure) when (failure is IOException or ControlException)
        {
            client.Dispose();
            return null;
        }
        catch
        {
            client.Dispose();
            throw;
        }
    }

    /// <summary>Executes a command.</summary>
    /// <returns>The value of "return".</returns>
    /// <exception cref="ControlException">The VM refused; or its process ended (the message says so).</exception>
    public async Task<JsonElement> ExecuteAsync(string command, Action<Utf8JsonWriter>? arguments, CancellationToken cancellation)
    {
        var buffer = new ArrayBufferWriter<byte>(128);
        using (var json = new Utf8JsonWriter(buffer))
        {
            json.WriteStartObject();
            json.WriteString("execute", command);
            if (arguments is not null)
            {
                json.WriteStartObject("arguments");
                arguments(json);
                json.WriteEndObject();
            }

            json.WriteEndObject();
        }

        buffer.Write("\n"u8);
        await _turn.WaitAsync(cancellation).ConfigureAwait(false);
        try
        {
            await _stream.WriteAsync(buffer.WrittenMemory, cancellation).ConfigureAwait(false);
            JsonElement answer = await _answers.Reader.ReadAsync(cancellation).ConfigureAwait(false);
            if (answer.TryGetProperty("return", out JsonElement result))
            {
                return result;
            }

            string? why = answer.TryGetProperty("error", out JsonElement error) && error.TryGetProperty("desc", out JsonElement text)
                ? text.GetString()
                : null;
            throw new ControlException(why ?? "the VM gave no reason");
        }
        catch (Exception failure) when (failure is IOException or ChannelClosedException or ObjectDisposedException)
        {
            throw new ControlException("the VM's process has ended", failure);
        }
        finally
        {
            _turn.Release();
        }
    }

    /// <summary>Asks for the VM's report.</summary>
    /// <exception cref="ControlException">Its process ended.</exception>
    public async Task<VmReport> ReportAsync(CancellationToken cancellation)
    {
        JsonElement report = await ExecuteAsync("vmm-status", null, cancellation).ConfigureAwait(false);
        return new VmReport
        {
            Name = Text(report, "name") ?? string.Empty,
            Condition = Text(report, "status") switch
            {
                "running" => VmCondition.Running,
                "paused" => VmCondition.Paused,
                "prelaunch" => VmCondition.Starting,
                _ => VmCondition.Stopped,
            },
            Driver = Text(report, "driver") ?? string.Empty,
            Pid = (int)Number(report, "pid"),
            Cpus = (int)Number(report, "cpus"),
            MemoryBytes = (long)Number(report, "memory"),
            UptimeSeconds = Number(report, "uptime"),
            CpuSeconds = Number(report, "cpu-time"),
            ResidentBytes = (long)Number(report, "resident"),
            Vnc = Text(report, "vnc"),
        };
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _stream.Dispose();
        _socket.Dispose();
        _answers.Writer.TryComplete();
        _events.Writer.TryComplete();
    }

    private static string? Text(JsonElement element, string name) =>
        element.TryGetProperty(name, out JsonElement value) && value.ValueKind == JsonValueKind.String ? value.GetString() : null;

    private static double Number(JsonElement element, string name) =>
        element.TryGetProperty(name, out JsonElement value) && value.ValueKind == JsonValueKind.Number ? value.GetDouble() : 0;

    private async Task ReceiveAsync()
    {
        try
        {
            while (await _reader.ReadLineAsync(CancellationToken.None).ConfigureAwait(false) is { } line)
            {
                using JsonDocument document = JsonDocument.Parse(line);
                JsonElement root = document.RootElement;
                if (root.TryGetProperty("event", out JsonElement name))
                {
                    _events.Writer.TryWrite(name.GetString() ?? string.Empty);
                }
                else
                {
                    _answers.Writer.TryWrite(root.Clone());
                }
            }
        }
        catch (Exception failure) when (failure is IOException or ObjectDisposedException or SocketException or JsonException)
        {
            // The end of the connection, in whatever shape; the channels say so below.
        }

        _answers.Writer.TryComplete();
        _events.Writer.TryComplete();
    }
}

/// <summary>Lines of bytes, ending with a line feed, no longer than a bound. One reader at a time.</summary>
internal sealed class LineReader
{
    private readonly Stream _stream;
    private readonly int _maximumBytes;
    private byte[] _buffer = new byte[4096];
    private int _start;
    private int _end;

    internal LineReader(Stream stream, int maximumBytes)
    {
        _stream = stream;
        _maximumBytes = maximumBytes;
    }

    /// <summary>The next line without its end; null at the end of the stream.</summary>
    /// <exception cref="IOException">A line is too long, or the stream failed.</exception>
    internal async Task<string?> ReadLineAsync(CancellationToken cancellation)
    {
        int searched = _start;
        while (true)
        {
            int feed = _buffer.AsSpan(searched, _end - searched).IndexOf((byte)'\n');
            if (feed >= 0)
            {
                string line = Encoding.UTF8.GetString(_buffer, _start, searched + feed - _start).TrimEnd('\r');
                _start = searched + feed + 1;
                return line;
            }

            if (_end - _start >= _maximumBytes)
            {
                throw new IOException($"a line is longer than {_maximumBytes} bytes");
            }

            searched = MakeRoom();
            int count = await _stream.ReadAsync(_buffer.AsMemory(_end), cancellation).ConfigureAwait(false);
            if (count == 0)
            {
                return null;
            }

            _end += count;
        }
    }

    // Moves what is left to the front, and grows the buffer when it is full; gives where new bytes will stand.
    private int MakeRoom()
    {
        if (_start > 0)
        {
            _buffer.AsSpan(_start, _end - _start).CopyTo(_buffer);
            _end -= _start;
            _start = 0;
        }

        if (_end == _buffer.Length)
        {
            Array.Resize(ref _buffer, Math.Min(_buffer.Length * 2, _maximumBytes));
        }

        return _end;
    }
}

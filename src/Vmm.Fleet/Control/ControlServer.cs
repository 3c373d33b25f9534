// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers;
using System.IO;
using System.Net.Sockets;
using System.Text;
using System.Text.Json;
using System.Threading.Tasks;

namespace Vmm.Fleet.Control;

// Theory. Each VM process listens on a Unix socket and speaks JSON lines in QMP's shape (QEMU's documented protocol), so
// that tools which know QMP find their way: a greeting, then {"execute": NAME, "arguments": {...}, "id": X} answered by
// {"return": ..., "id": X} or {"error": {"class": ..., "desc": ...}, "id": X}; {"event": ...} in between. As in QMP, a
// client first sends qmp_capabilities. The names are QMP's where QMP has the command; ours begin with "vmm-".
//
// Clients are the user's own processes, but a broken one must not hurt the VM: lines are bounded, clients are bounded in
// number (SocketServer), a client that does not read loses its connection, and commands of one client run one after the
// other on the thread pool, never on a vCPU's thread.

/// <summary>Serves the control socket of one VM. Thread-safe.</summary>
public sealed class ControlServer : IAsyncDisposable
{
    /// <summary>Longest line of a client, in bytes.</summary>
    public const int MaxLineBytes = 64 << 10;

    private const int MaxClients = 32;
    private const int QueuedLines = 256;

    private static readonly string[] s_commands =
    [
        "balloon", "blockdev-change-medium", "cont", "eject", "inject-nmi", "qmp_capabilities", "query-balloon", "query-commands", "query-name",
        "query-status", "query-version", "quit", "screendump", "stop", "system_powerdown", "system_reset", "vmm-console-tail", "vmm-save",
        "vmm-screen", "vmm-screen-text", "vmm-status",
    ];

    private readonly IMachineControl _machine;
    private readonly TimeProvider _time;
    private readonly SocketServer<Client> _server;

    /// <summary>Starts to listen.</summary>
    /// <param name="path">The socket's path; a stale file there is replaced.</param>
    /// <param name="machine">What commands act on.</param>
    /// <param name="time">Clock of event time stamps.</param>
    /// <exception cref="IOException">The path is too long or cannot be bound.</exception>
    public ControlServer(string path, IMachineControl machine, TimeProvider time)
    {
        _machine = machine;
        _time = time;
        _server = new SocketServer<Client>(path, MaxClients, socket => new Client(this, socket));
    }

    /// <summary>Tells every client that something happened: SHUTDOWN, STOP, RESUME, RESET, POWERDOWN.</summary>
    /// <param name="name">QMP's name of the event.</param>
    /// <param name="write">Writes the members of "data", or null for none.</param>
    public void Emit(string name, Action<Utf8JsonWriter>? write = null)
    {
        DateTimeOffset now = _time.GetUtcNow();
        byte[] line = JsonLine(json =>
        {
            json.WriteStartObject("timestamp");
            json.WriteNumber("seconds", now.ToUnixTimeSeconds());
            json.WriteNumber("microseconds", now.Ticks % TimeSpan.TicksPerSecond / 10);
            json.WriteEndObject();
            json.WriteString("event", name);
            if (write is not null)
            {
                json.WriteStartObject("data");
                write(json);
                json.WriteEndObject();
            }
        });
        _server.ForEach(client =>
        {
            if (client.IsNegotiated)
            {
                client.Send(line);
            }
        });
    }

    /// <summary>Closes the socket and removes its file. What was queued for clients is still sent, within a second.</summary>
    public ValueTask DisposeAsync() => _server.DisposeAsync();

    private static byte[] JsonLine(Action<Utf8JsonWriter> write)
    {
        var buffer = new ArrayBufferWriter<byte>(256);
        using (var json = new Utf8JsonWriter(buffer))
        {
            json.WriteStartObject();
            write(json);
            json.WriteEndObject();
        }

        buffer.Write("\r\n"u8);
        return buffer.WrittenSpan.ToArray();
    }

    private byte[] Answer(ReadOnlyMemory<byte> line, Client client)
    {
        JsonDocument document;
        try
        {
            document = JsonDocument.Parse(line, new JsonDocumentOptions { MaxDepth = 16 });
        }
        catch (JsonException)
        {
            return Error("GenericError", "not a line of JSON", default);
        }

        using (document)
        {
            JsonElement root = document.RootElement;
            bool isObject = root.ValueKind == JsonValueKind.Object;
            JsonElement id = isObject && root.TryGetProperty("id", out JsonElement given) ? given : default;
            if (!isObject || !root.TryGetProperty("execute", out JsonElement execute) || execute.ValueKind != JsonValueKind.String)
            {
                return Error("GenericError", "expected an object with \"execute\"", id);
            }

            string command = execute.GetString()!;
            JsonElement arguments = root.TryGetProperty("arguments", out JsonElement found) ? found : default;
            if (!client.IsNegotiated && command is not "qmp_capabilities")
            {
                return Error("CommandNotFound", "send qmp_capabilities first", id);
            }

            try
            {
                return Execute(command, arguments, client, id)
                    ?? Error("CommandNotFound", $"The command {command} has not been found", id);
            }
            catch (ControlException failure)
            {
                return Error("GenericError", failure.Message, id);
            }
            catch (Exception failure) when (failure is IOException or UnauthorizedAccessException or InvalidOperationException)
            {
                return Error("GenericError", failure.Message.ReplaceLineEndings(" "), id);
            }
        }
    }

    private byte[]? Execute(string command, JsonElement arguments, Client client, JsonElement id)
    {
        switch (command)
        {
            case "qmp_capabilities":
                client.IsNegotiated = true;
                return Done(id);
            case "query-version":
                return Return(id, json => WriteVersion(json));
            case "query-commands":
                return JsonLine(json =>
                {
                    json.WriteStartArray("return");
                    foreach (string name in s_commands)
                    {
                        json.WriteStartObject();
                        json.WriteString("name", name);
                        json.WriteEndObject();
                    }

                    json.WriteEndArray();
                    WriteId(json, id);
                });
            case "query-name":
                return Return(id, json => json.WriteString("name", _machine.Report().Name));
            case "query-status":
                return Return(id, json => WriteStatus(json, _machine.Report().Condition));
            case "vmm-status":
                return Return(id, json => WriteReport(json, _machine.Report()));
            case "stop":
                _machine.Pause();
                Emit("STOP");
                return Done(id);
            case "cont":
                _machine.Unpause();
                Emit("RESUME");
                return Done(id);
            case "system_powerdown":
                _machine.PressPowerButton();
                Emit("POWERDOWN");
                return Done(id);
            case "system_reset":
                _machine.Reset();
                return Done(id);
            case "inject-nmi":
                _machine.InjectNmi();
                return Done(id);
            case "quit":
                // The answer first: after Quit the process ends on its own schedule.
                client.Send(Done(id));
                _machine.Quit();
                return [];
            case "screendump":
                _machine.Screenshot(Path("filename", arguments));
                return Done(id);
            case "vmm-screen":
                byte[] png = _machine.ScreenPng(Number("width", arguments, 0, 4096));
                return Return(id, json => json.WriteBase64String("png", png));
            case "vmm-console-tail":
                byte[] tail = _machine.ConsoleTail(Number("bytes", arguments, 4096, 1 << 20));
                return Return(id, json => json.WriteBase64String("bytes", tail));
            case "vmm-screen-text":
                string text = _machine.ScreenText();
                return Return(id, json => json.WriteString("text", text));
            case "balloon":
                _machine.SetMemory(Bytes("value", arguments));
                return Done(id);
            case "query-balloon":
                long actual = _machine.GuestMemory();
                return Return(id, json => json.WriteNumber("actual", actual));
            case "blockdev-change-medium":
                _machine.ChangeMedium(Text("device", arguments), Path("filename", arguments), Flag("force", arguments));
                return Done(id);
            case "eject":
                _machine.ChangeMedium(Text("device", arguments), null, Flag("force", arguments));
                return Done(id);
            case "vmm-save":
                _machine.Save(Path("filename", arguments));
                return Done(id);
            default:
                return null;
        }
    }

    private static string Path(string name, JsonElement arguments)
    {
        if (arguments.ValueKind == JsonValueKind.Object && arguments.TryGetProperty(name, out JsonElement value)
            && value.ValueKind == JsonValueKind.String && System.IO.Path.IsPathRooted(value.GetString()))
        {
            return value.GetString()!;
        }

        throw new ControlException($"needs \"{name}\", an absolute path");
    }

    private static string Text(string name, JsonElement arguments) =>
        arguments.ValueKind == JsonValueKind.Object && arguments.TryGetProperty(name, out JsonElement value)
            && value.ValueKind == JsonValueKind.String
            ? value.GetString()!
            : throw new ControlException($"needs \"{name}\", a name");

    private static bool Flag(string name, JsonElement arguments) =>
        arguments.ValueKind == JsonValueKind.Object && arguments.TryGetProperty(name, out JsonElement value)
            && value.ValueKind == JsonValueKind.True;

    private static int Number(string name, JsonElement arguments, int otherwise, int maximum) =>
        arguments.ValueKind == JsonValueKind.Object && arguments.TryGetProperty(name, out JsonElement value)
            && value.ValueKind == JsonValueKind.Number && value.TryGetInt32(out int number) && number >= 0
            ? Math.Min(number, maximum)
            : otherwise;

    private static long Bytes(string name, JsonElement arguments)
    {
        if (arguments.ValueKind == JsonValueKind.Object && arguments.TryGetProperty(name, out JsonElement value)
            && value.ValueKind == JsonValueKind.Number && value.TryGetInt64(out long number) && number >= 0)
        {
            return number;
        }

        throw new ControlException($"needs \"{name}\", a number of bytes");
    }

    private static byte[] Done(JsonElement id) => Return(id, _ => { });

    private static byte[] Return(JsonElement id, Action<Utf8JsonWriter> write) => JsonLine(json =>
    {
        json.WriteStartObject("return");
        write(json);
        json.WriteEndObject();
        WriteId(json, id);
    });

    private static byte[] Error(string kind, string message, JsonElement id) => JsonLine(json =>
    {
        json.WriteStartObject("error");
        json.WriteString("class", kind);
        json.WriteString("desc", message);
        json.WriteEndObject();
        WriteId(json, id);
    });

    private static void WriteId(Utf8JsonWriter json, JsonElement id)
    {
        if (id.ValueKind != JsonValueKind.Undefined)
        {
            json.WritePropertyName("id");
            id.WriteTo(json);
        }
    }

    private static void WriteVersion(Utf8JsonWriter json)
    {
        Version version = typeof(ControlServer).Assembly.GetName().Version ?? new Version(0, 0, 0);
        json.WriteStartObject("vmctl");
        json.WriteNumber("major", version.Major);
        json.WriteNumber("minor", version.Minor);
        json.WriteNumber("micro", version.Build);
        json.WriteEndObject();
        json.WriteString("package", "vmctl");
    }

    private static void WriteStatus(Utf8JsonWriter json, VmCondition condition)
    {
        json.WriteBoolean("running", condition == VmCondition.Running);
        json.WriteString("status", condition switch
        {
            VmCondition.Running => "running",
            VmCondition.Paused => "paused",
            VmCondition.Starting => "prelaunch",
            _ => "shutdown",
        });
    }

    private static void WriteReport(Utf8JsonWriter json, VmReport report)
    {
        json.WriteString("name", report.Name);
        WriteStatus(json, report.Condition);
        json.WriteString("driver", report.Driver);
        json.WriteNumber("pid", report.Pid);
        json.WriteNumber("cpus", report.Cpus);
        json.WriteNumber("memory", report.MemoryBytes);
        json.WriteNumber("uptime", Math.Round(report.UptimeSeconds, 3));
        json.WriteNumber("cpu-time", Math.Round(report.CpuSeconds, 3));
        json.WriteNumber("resident", report.ResidentBytes);
        if (report.Vnc is not null)
        {
            json.WriteString("vnc", report.Vnc);
        }

        if (report.Completed.Count != 0)
        {
            json.WriteStartObject("completed");
            foreach ((string mnemonic, long count) in report.Completed)
            {
                json.WriteNumber(mnemonic, count);
            }

            json.WriteEndObject();
        }
    }

    private sealed class Client : SocketClient
    {
        private readonly ControlServer _server;

        internal Client(ControlServer server, Socket socket)
            : base(socket, QueuedLines)
        {
            _server = server;
        }

        internal bool IsNegotiated { get; set; }

        // A client that lets its queue run full is cut off: it would miss something and not know.
        internal void Send(byte[] line)
        {
            if (line.Length > 0 && !TrySend(line))
            {
                Abandon();
            }
        }

        protected override async Task ServeAsync()
        {
            Send(JsonLine(json =>
            {
                json.WriteStartObject("QMP");
                json.WriteStartObject("version");
                WriteVersion(json);
                json.WriteEndObject();
                json.WriteStartArray("capabilities");
                json.WriteEndArray();
                json.WriteEndObject();
            }));
            var buffer = new byte[MaxLineBytes];
            int filled = 0;
            while (await Socket.ReceiveAsync(buffer.AsMemory(filled)).ConfigureAwait(false) is > 0 and int count)
            {
                filled += count;
                int start = 0;
                for (int end; (end = buffer.AsSpan(start, filled - start).IndexOf((byte)'\n')) >= 0;)
                {
                    ReadOnlyMemory<byte> line = buffer.AsMemory(start, end);
                    start += end + 1;
                    if (!Encoding.UTF8.GetString(line.Span).AsSpan().Trim().IsEmpty)
                    {
                        Send(_server.Answer(line, this));
                    }
                }

                buffer.AsSpan(start, filled - start).CopyTo(buffer);
                filled -= start;
                if (filled == buffer.Length)
                {
                    Send(Error("GenericError", $"a line is longer than {MaxLineBytes} bytes", default));
                    break;
                }
            }
        }
    }
}

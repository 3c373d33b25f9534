// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Net.Sockets;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using FluentAssertions;
using Vmm.Fleet.Control;
using Xunit;

namespace Vmm.Fleet.Tests;

/// <summary>The control socket speaks QMP's dialect and survives its clients.</summary>
public sealed class ControlTests : IAsyncLifetime
{
    private readonly string _directory = Directory.CreateTempSubdirectory("control-").FullName;
    private readonly FakeMachine _machine = new();
    private ControlServer _server = null!;

    private string Path1 => Path.Combine(_directory, "c.sock");

    public Task InitializeAsync()
    {
        _server = new ControlServer(Path1, _machine, TimeProvider.System);
        return Task.CompletedTask;
    }

    public async Task DisposeAsync()
    {
        await _server.DisposeAsync();
        File.Exists(Path1).Should().BeFalse();
        Directory.Delete(_directory, recursive: true);
    }

    [Fact]
    public async Task Session_LooksLikeQmp()
    {
        await using var wire = new Wire(Path1);
        (await wire.Line()).Should().StartWith("{\"QMP\":{\"version\":{\"vmctl\":{\"major\":");
        (await wire.Ask("{\"execute\":\"query-status\",\"id\":1}")).Should()
            .Be("{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"send qmp_capabilities first\"},\"id\":1}");
        (await wire.Ask("{\"execute\":\"qmp_capabilities\",\"id\":\"x\"}")).Should().Be("{\"return\":{},\"id\":\"x\"}");
        (await wire.Ask("{\"execute\":\"query-status\"}")).Should().Be("{\"return\":{\"running\":true,\"status\":\"running\"}}");
        (await wire.Ask("{\"execute\":\"nonsense\"}")).Should()
            .Be("{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"The command nonsense has not been found\"}}");
        (await wire.Ask("{\"execute\":")).Should().Be("{\"error\":{\"class\":\"GenericError\",\"desc\":\"not a line of JSON\"}}");
        (await wire.Ask("[]")).Should().Contain("expected an object");
    }

    [Fact]
    public async Task Commands_ReachTheMachine_AndEventsReachEveryClient()
    {
        using ControlClient client = (await ControlClient.TryConnectAsync(Path1, CancellationToken.None))!;
        using ControlClient watcher = (await ControlClient.TryConnectAsync(Path1, CancellationToken.None))!;

        await client.ExecuteAsync("stop", null, CancellationToken.None);
        await client.ExecuteAsync("cont", null, CancellationToken.None);
        await client.ExecuteAsync("system_powerdown", null, CancellationToken.None);
        await client.ExecuteAsync("balloon", json => json.WriteNumber("value", 32 << 20), CancellationToken.None);
        (await client.ExecuteAsync("query-balloon", null, CancellationToken.None)).GetProperty("actual").GetInt64()
            .Should().Be(48 << 20);
        await client.ExecuteAsync(
            "blockdev-change-medium",
            json =>
            {
                json.WriteString("device", "cdrom0");
                json.WriteString("filename", "/tmp/second.iso");
            },
            CancellationToken.None);
        await client.ExecuteAsync(
            "eject",
            json =>
            {
                json.WriteString("device", "cdrom1");
                json.WriteBoolean("force", true);
            },
            CancellationToken.None);
        await client.ExecuteAsync("inject-nmi", null, CancellationToken.None);
        await client.ExecuteAsync("system_reset", null, CancellationToken.None);
        await client.ExecuteAsync("screendump", json => json.WriteString("filename", "/tmp/x.png"), CancellationToken.None);

        _machine.Calls.Should().Equal("pause", "unpause", "power", "memory 33554432", "medium cdrom0 /tmp/second.iso False",
            "medium cdrom1 - True", "nmi", "reset", "screenshot /tmp/x.png");
        (await watcher.Events.ReadAsync()).Should().Be("STOP");
        (await watcher.Events.ReadAsync()).Should().Be("RESUME");
        (await watcher.Events.ReadAsync()).Should().Be("POWERDOWN");
    }

    [Fact]
    public async Task Refusals_AreOneLine()
    {
        using ControlClient client = (await ControlClient.TryConnectAsync(Path1, CancellationToken.None))!;

        await FluentActions.Awaiting(() => client.ExecuteAsync("screendump", null, CancellationToken.None))
            .Should().ThrowAsync<ControlException>().WithMessage("needs \"filename\", an absolute path");
        await FluentActions.Awaiting(() => client.ExecuteAsync("vmm-screen-text", null, CancellationToken.None))
            .Should().ThrowAsync<ControlException>().WithMessage("this VM has no display");
    }

    [Fact]
    public async Task Report_SurvivesTheWire()
    {
        using ControlClient client = (await ControlClient.TryConnectAsync(Path1, CancellationToken.None))!;

        (await client.ReportAsync(CancellationToken.None)).Should().Be(_machine.Report());
    }

    [Fact]
    public async Task Client_WithAnEndlessLine_IsCutOff_AndOthersGoOn()
    {
        await using var wire = new Wire(Path1);
        await wire.Line();
        await wire.Send(new string('x', ControlServer.MaxLineBytes + 10));

        (await wire.Line()).Should().Contain("longer than");
        (await wire.Line()).Should().BeNull();
        using ControlClient client = (await ControlClient.TryConnectAsync(Path1, CancellationToken.None))!;
        (await client.ReportAsync(CancellationToken.None)).Name.Should().Be("a");
    }

    [Fact]
    public async Task Garbage_OfAllKinds_NeverEndsTheServer()
    {
        var random = new Random(99);
        for (int round = 0; round < 50; round++)
        {
            await using var wire = new Wire(Path1);
            var bytes = new byte[random.Next(1, 2000)];
            random.NextBytes(bytes);
            await wire.SendRaw(bytes);
            await wire.SendRaw("\n{\"execute\": {\"a\": [1,2]}, \"id\": {}}\n{\"execute\":\"qmp_capabilities\",\"arguments\":5}\n"u8.ToArray());
        }

        // Until the server has noticed that the others hung up, it may turn a new one away.
        ControlClient? found = null;
        for (int attempt = 0; attempt < 200 && found is null; attempt++)
        {
            found = await ControlClient.TryConnectAsync(Path1, CancellationToken.None);
            if (found is null)
            {
                await Task.Delay(25);
            }
        }

        using ControlClient client = found!;
        (await client.ReportAsync(CancellationToken.None)).Name.Should().Be("a");
    }

    [Fact]
    public async Task Clients_BeyondTheLimit_AreTurnedAway()
    {
        var wires = new List<Wire>();
        for (int i = 0; i < 40; i++)
        {
            wires.Add(new Wire(Path1));
        }

        int greeted = 0;
        foreach (Wire wire in wires)
        {
            greeted += await wire.Line() is null ? 0 : 1;
        }

        // Only now: who hangs up makes room for one that was not looked at yet.
        foreach (Wire wire in wires)
        {
            await wire.DisposeAsync();
        }

        greeted.Should().Be(32);
    }

    [Fact]
    public async Task Nobody_AtThePath_IsNull()
    {
        (await ControlClient.TryConnectAsync(Path.Combine(_directory, "none"), CancellationToken.None)).Should().BeNull();
        await File.WriteAllTextAsync(Path.Combine(_directory, "file"), "x");
        (await ControlClient.TryConnectAsync(Path.Combine(_directory, "file"), CancellationToken.None)).Should().BeNull();
    }

    [Fact]
    public void Path_TooLongForASocket_SaysWhatToDo()
    {
        Action listen = () => UnixSockets.Listen("/tmp/" + new string('x', 120));

        listen.Should().Throw<IOException>().WithMessage("*move it with VMM_RUN_DIR");
    }

    private sealed class FakeMachine : IMachineControl
    {
        internal List<string> Calls { get; } = [];

        public VmReport Report() => new()
        {
            Name = "a",
            Condition = VmCondition.Running,
            Driver = "soft",
            Pid = 12,
            Cpus = 2,
            MemoryBytes = 64 << 20,
            UptimeSeconds = 1.5,
            CpuSeconds = 0.25,
            ResidentBytes = 1 << 20,
            Vnc = "127.0.0.1:5900",
        };

        public void Pause() => Calls.Add("pause");

        public void Unpause() => Calls.Add("unpause");

        public void PressPowerButton() => Calls.Add("power");

        public void Reset() => Calls.Add("reset");

        public void InjectNmi() => Calls.Add("nmi");

        public void Quit() => Calls.Add("quit");

        public void Screenshot(string path) => Calls.Add("screenshot " + path);

        public byte[] ScreenPng(int width) => [0x89, (byte)'P', (byte)width];

        public byte[] ConsoleTail(int maximumBytes) => "ready\n"u8.ToArray();

        public string ScreenText() => throw new ControlException("this VM has no display");

        public void SetMemory(long memoryBytes) => Calls.Add("memory " + memoryBytes);

        public long GuestMemory() => 48 << 20;

        public void ChangeMedium(string drive, string? path, bool force) =>
            Calls.Add($"medium {drive} {path ?? "-"} {force}");

        public void Save(string path) => Calls.Add("save " + path);
    }

    private sealed class Wire : IAsyncDisposable
    {
        private readonly Socket _socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        private readonly StreamReader _reader;
        private readonly NetworkStream _stream;

        internal Wire(string path)
        {
            _socket.Connect(new UnixDomainSocketEndPoint(path));
            _stream = new NetworkStream(_socket);
            _reader = new StreamReader(_stream);
        }

        public ValueTask DisposeAsync()
        {
            _reader.Dispose();
            _stream.Dispose();
            _socket.Dispose();
            return ValueTask.CompletedTask;
        }

        internal async Task<string?> Line()
        {
            try
            {
                return await _reader.ReadLineAsync().WaitAsync(TimeSpan.FromSeconds(20));
            }
            catch (IOException)
            {
                return null;
            }
        }

        internal Task Send(string line) => SendRaw(Encoding.UTF8.GetBytes(line + "\n"));

        internal async Task SendRaw(byte[] bytes)
        {
            try
            {
                await _stream.WriteAsync(bytes);
            }
            catch (IOException)
            {
                // The server may have hung up already.
            }
        }

        internal async Task<string?> Ask(string line)
        {
            await Send(line);
            return await Line();
        }
    }
}

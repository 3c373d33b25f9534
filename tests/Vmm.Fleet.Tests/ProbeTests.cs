// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using FluentAssertions;
using Vmm.Config;
using Vmm.Fleet.Daemon;
using Xunit;

namespace Vmm.Fleet.Tests;

/// <summary>Health probes against what answers them: sockets of this test in the places of guests.</summary>
public sealed class ProbeTests : IDisposable
{
    private static readonly TimeSpan s_patience = TimeSpan.FromMinutes(1);

    private readonly string _directory = Directory.CreateTempSubdirectory("probe").FullName;
    private readonly FleetPaths _paths;
    private readonly ProcessVmHost _host;
    private readonly Supervisor _fleet;

    public ProbeTests()
    {
        _paths = new FleetPaths(_directory, _directory, _directory);
        _host = new ProcessVmHost(_paths, new NoLauncher(), _ => { });
        _fleet = new Supervisor(_host, TimeProvider.System);
        _host.Attach(_fleet);
    }

    public void Dispose() => Directory.Delete(_directory, recursive: true);

    [Fact]
    public async Task Tcp_ServerThatWaits_IsHealthy()
    {
        using var server = Tcp();
        (await ProbeAsync($"tcp: \"127.0.0.1:{Port(server)}\", timeout: 1h")).Should().Be(VmHealth.Healthy);
    }

    [Fact]
    public async Task Tcp_ServerThatSpeaks_IsHealthyAtOnce()
    {
        using var server = Tcp();
        _ = AnswerAsync(server, "SSH-2.0-x\r\n", close: false);
        (await ProbeAsync($"tcp: \"127.0.0.1:{Port(server)}\", timeout: 1h")).Should().Be(VmHealth.Healthy);
    }

    // What the user-mode network does when nobody in the guest listens.
    [Fact]
    public async Task Tcp_AcceptedAndClosed_IsNotHealthy()
    {
        using var server = Tcp();
        _ = AnswerAsync(server, string.Empty, close: true);
        (await ProbeAsync($"tcp: \"127.0.0.1:{Port(server)}\", timeout: 1h")).Should().Be(VmHealth.Unhealthy);
    }

    [Fact]
    public async Task Tcp_NobodyListens_IsNotHealthy()
    {
        int port;
        using (var server = Tcp())
        {
            port = Port(server);
        }

        (await ProbeAsync($"tcp: \"127.0.0.1:{port}\"")).Should().Be(VmHealth.Unhealthy);
    }

    [Theory]
    [InlineData("{\"return\": {}}\n", VmHealth.Healthy)]
    [InlineData("{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no\"}}\n", VmHealth.Unhealthy)]
    public async Task Agent_IsHealthy_WhenItAnswersThePing(string answer, VmHealth health)
    {
        using var server = Unix("agent");
        Task<string> asked = AnswerAsync(server, answer, close: false);

        (await ProbeAsync("agent: true, timeout: 1h", Agent("agent"))).Should().Be(health);
        (await asked).Should().Be("{\"execute\":\"guest-ping\"}\n");
    }

    [Fact]
    public async Task Agent_ThatIsSilent_IsNotHealthy()
    {
        using var server = Unix("agent");
        (await ProbeAsync("agent: true, timeout: 200ms", Agent("agent"))).Should().Be(VmHealth.Unhealthy);
    }

    [Fact]
    public async Task Agent_WithoutAnybodyAtTheSocket_IsNotHealthy() =>
        (await ProbeAsync("agent: true", Agent("nobody"))).Should().Be(VmHealth.Unhealthy);

    [Theory]
    [InlineData("Debian GNU/Linux 12\r\nweb1 login: ", VmHealth.Healthy)]
    [InlineData("Kernel panic - not syncing", VmHealth.Unhealthy)]
    public async Task Console_IsHealthy_WhenItsTextMatches(string text, VmHealth health)
    {
        Directory.CreateDirectory(_paths.Of("a").Run);
        using var server = Unix(_paths.Of("a").Console);
        Task<string> asked = AnswerAsync(server, "{\"writer\":false}\n" + text, close: true);

        (await ProbeAsync("console: \"[a-z0-9]+ login:\", timeout: 1h")).Should().Be(health);
        (await asked).Should().Contain("\"write\": false", "a probe takes nobody the right to type");
    }

    private static string Agent(string path) => $"console: [{{name: org.qemu.guest_agent.0, backend: \"unix:{path}\"}}]";

    private static Socket Tcp()
    {
        var socket = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        socket.Bind(new IPEndPoint(IPAddress.Loopback, 0));
        socket.Listen();
        return socket;
    }

    private static int Port(Socket socket) => ((IPEndPoint)socket.LocalEndPoint!).Port;

    private Socket Unix(string path)
    {
        var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        socket.Bind(new UnixDomainSocketEndPoint(Path.Combine(_directory, path)));
        socket.Listen();
        return socket;
    }

    private static async Task<string> AnswerAsync(Socket server, string answer, bool close)
    {
        Socket client = await server.AcceptAsync();
        var question = new byte[256];
        int count = server.AddressFamily == AddressFamily.Unix ? await client.ReceiveAsync(question) : 0;
        await client.SendAsync(Encoding.UTF8.GetBytes(answer));
        if (close)
        {
            client.Shutdown(SocketShutdown.Both);
            client.Dispose();
        }

        return Encoding.UTF8.GetString(question, 0, count);
    }

    private async Task<VmHealth> ProbeAsync(string health, string more = "autostart: true")
    {
        string text = $"{{name: a, boot: {{kernel: k}}, health: {{{health}, retries: 1, start-period: 0s}}, {more}}}";
        MachineSpec spec = ConfigFiles.Parse(text, "t.yaml", _directory).Machines[0];
        _fleet.Adopt(spec, 1);
        bool isKnown = await _fleet.WaitAsync(
            fleet => fleet.Find("a") is { Health: VmHealth.Healthy or VmHealth.Unhealthy }, s_patience, CancellationToken.None);
        isKnown.Should().BeTrue("a probe answers");
        return _fleet.Find("a")!.Health;
    }

    private sealed class NoLauncher : IVmLauncher
    {
        public int Launch(MachineSpec spec) => throw new IOException("nothing is started here");

        public void End(string name)
        {
        }
    }
}

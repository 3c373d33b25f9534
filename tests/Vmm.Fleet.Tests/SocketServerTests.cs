// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Tasks;
using FluentAssertions;
using Xunit;

namespace Vmm.Fleet.Tests;

/// <summary>What the control and the console socket have in common.</summary>
public sealed class SocketServerTests : IAsyncLifetime
{
    private const int MaxClients = 2;

    private readonly string _directory = Directory.CreateTempSubdirectory("sockets-").FullName;
    private SocketServer<Echo> _server = null!;

    private string SocketPath => Path.Combine(_directory, "s.sock");

    public Task InitializeAsync()
    {
        _server = new SocketServer<Echo>(SocketPath, MaxClients, socket => new Echo(socket));
        return Task.CompletedTask;
    }

    public async Task DisposeAsync()
    {
        await _server.DisposeAsync();
        Directory.Delete(_directory, recursive: true);
    }

    [Fact]
    public async Task Client_BeyondTheMost_IsClosed_AndAdmittedOnceAnotherHasLeft()
    {
        using Socket first = await AdmittedAsync();
        using Socket second = await AdmittedAsync();
        using (Socket third = await ConnectAsync())
        {
            (await third.ReceiveAsync(new byte[1])).Should().Be(0);
        }

        second.Dispose();
        await WaitForCountAsync(1);

        using Socket fourth = await AdmittedAsync();
        await WaitForCountAsync(2);
    }

    [Fact]
    public async Task Client_WhoseServiceThrows_IsTakenOffTheList()
    {
        using Socket client = await AdmittedAsync();

        await client.SendAsync(new[] { Echo.Fail });

        (await client.ReceiveAsync(new byte[1])).Should().Be(0);
        await WaitForCountAsync(0);
    }

    [Fact]
    public async Task Dispose_SendsWhatIsQueued_ThenClosesAndRemovesTheFile()
    {
        using Socket client = await AdmittedAsync();
        _server.ForEach(one => one.Say(7));

        await _server.DisposeAsync();

        var got = new byte[2];
        (await client.ReceiveAsync(got)).Should().Be(1);
        got[0].Should().Be(7);
        (await client.ReceiveAsync(got)).Should().Be(0);
        File.Exists(SocketPath).Should().BeFalse();
        await InitializeAsync();
    }

    private async Task<Socket> ConnectAsync() =>
        (await UnixSockets.TryConnectAsync(SocketPath, CancellationToken.None))!;

    // One byte there and back: the client is on the list.
    private async Task<Socket> AdmittedAsync()
    {
        Socket socket = await ConnectAsync();
        await socket.SendAsync(new byte[] { 1 });
        (await socket.ReceiveAsync(new byte[1])).Should().Be(1);
        return socket;
    }

    private async Task WaitForCountAsync(int expected)
    {
        for (int tries = 0; ; tries++)
        {
            int count = 0;
            _server.ForEach(_ => count++);
            if (count == expected)
            {
                return;
            }

            tries.Should().BeLessThan(500, $"there should be {expected} clients, not {count}");
            await Task.Delay(10);
        }
    }

    private sealed class Echo : SocketClient
    {
        public const byte Fail = 0xFF;

        public Echo(Socket socket)
            : base(socket, queued: 16)
        {
        }

        public void Say(byte value) => TrySend([value]).Should().BeTrue();

        protected override async Task ServeAsync()
        {
            var buffer = new byte[1];
            while (await Socket.ReceiveAsync(buffer) > 0)
            {
                if (buffer[0] == Fail)
                {
                    throw new FormatException("as a broken client may cause");
                }

                Say(buffer[0]);
            }
        }
    }
}

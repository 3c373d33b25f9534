// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Net.Sockets;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using FluentAssertions;
using Vmm.Backends.Net;
using Vmm.Core;
using Vmm.Host;
using Xunit;

namespace Vmm.Backends.Tests.Net;

public sealed class VsockTests : IDisposable, IVsockAcceptor
{
    private readonly string _path = Path.Combine(Path.GetTempPath(), $"vmm-{Guid.NewGuid():n}.vsock");
    private readonly PollLoop _loop = new("test");
    private readonly UnixVsockBackend _backend;
    private readonly List<Receiver> _accepted = [];
    private uint _answer = 1234;

    public VsockTests()
    {
        _backend = new UnixVsockBackend(_loop, _path);
        _backend.Attach(this);
    }

    public IVsockReceiver? Open(uint guestPort, IVsockStream stream, Action<uint> decided)
    {
        var receiver = new Receiver { Stream = stream, Port = guestPort };
        lock (_accepted)
        {
            _accepted.Add(receiver);
        }

        ThreadPool.QueueUserWorkItem(_ =>
        {
            decided(_answer);
            if (_answer != 0)
            {
                stream.ResumeRead();
            }
        });
        return receiver;
    }

    public void Dispose()
    {
        _backend.Dispose();
        _loop.Dispose();
    }

    [Fact]
    public async Task HostConnects_GreetsAndExchanges()
    {
        using Socket client = await ConnectAsync();
        await client.SendAsync(Encoding.ASCII.GetBytes("CONNECT 52\nearly"));
        (await ReadLineAsync(client)).Should().Be("OK 1234");
        Receiver receiver = _accepted[0];
        receiver.Port.Should().Be(52);
        receiver.WaitFor(5).Should().Equal("early"u8.ToArray());
        receiver.Stream!.Write("answer\n"u8).Should().Be(7);
        (await ReadLineAsync(client)).Should().Be("answer");
        client.Shutdown(SocketShutdown.Send);
        receiver.Ended.Wait(10_000).Should().BeTrue();
        receiver.Stream.Dispose();
        (await client.ReceiveAsync(new byte[1])).Should().Be(0);
    }

    [Theory]
    [InlineData("CONNECT x\n")]
    [InlineData("CONNECT -1\n")]
    [InlineData("HELLO 5\n")]
    [InlineData("0123456789012345678901234567890123456789")]
    public async Task HostConnects_BadGreeting_IsClosed(string greeting)
    {
        using Socket client = await ConnectAsync();
        await client.SendAsync(Encoding.ASCII.GetBytes(greeting));
        await ShouldBeClosedAsync(client);
        _accepted.Should().BeEmpty();
    }

    [Fact]
    public async Task HostConnects_GuestRefuses_IsClosed()
    {
        _answer = 0;
        using Socket client = await ConnectAsync();
        await client.SendAsync("CONNECT 9\n"u8.ToArray());
        await ShouldBeClosedAsync(client);
    }

    [Fact]
    public async Task GuestConnects_ReachesThePortsSocket()
    {
        _backend.Connect(80, new Receiver()).Should().BeNull("nobody listens");
        using var listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        listener.Bind(new UnixDomainSocketEndPoint(_path + "_80"));
        listener.Listen(1);
        var receiver = new Receiver();
        IVsockStream stream = _backend.Connect(80, receiver)!;
        using Socket server = await listener.AcceptAsync();
        stream.Write("ping"u8).Should().Be(4);
        byte[] got = new byte[4];
        await server.ReceiveAsync(got);
        got.Should().Equal("ping"u8.ToArray());
        receiver.Limit = 3;
        stream.ResumeRead();
        await server.SendAsync("abcdefgh"u8.ToArray());
        receiver.WaitFor(3).Should().Equal("abc"u8.ToArray());
        receiver.Limit = 100;
        stream.ResumeRead();
        receiver.WaitFor(8).Should().Equal("abcdefgh"u8.ToArray());
        server.Close();
        receiver.Ended.Wait(10_000).Should().BeTrue();
        stream.Dispose();
        File.Delete(_path + "_80");
    }

    private static async Task ShouldBeClosedAsync(Socket client)
    {
        try
        {
            (await client.ReceiveAsync(new byte[1]).WaitAsync(TimeSpan.FromSeconds(10))).Should().Be(0);
        }
        catch (SocketException e)
        {
            e.SocketErrorCode.Should().Be(SocketError.ConnectionReset);
        }
    }

    private static async Task<string> ReadLineAsync(Socket client)
    {
        var line = new StringBuilder();
        byte[] one = new byte[1];
        while (await client.ReceiveAsync(one).WaitAsync(TimeSpan.FromSeconds(10)) == 1 && one[0] != '\n')
        {
            line.Append((char)one[0]);
        }

        return line.ToString();
    }

    private async Task<Socket> ConnectAsync()
    {
        var client = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        await client.ConnectAsync(new UnixDomainSocketEndPoint(_path));
        return client;
    }

    private sealed class Receiver : IVsockReceiver
    {
        private readonly List<byte> _got = [];

        public IVsockStream? Stream { get; init; }

        public uint Port { get; init; }

        public int Limit { get; set; } = int.MaxValue;

        public ManualResetEventSlim Ended { get; } = new();

        public byte[] WaitFor(int count)
        {
            SpinWait.SpinUntil(
                () =>
                {
                    lock (_got)
                    {
                        return _got.Count >= count;
                    }
                },
                10_000);
            lock (_got)
            {
                return _got.ToArray();
            }
        }

        public int OnData(ReadOnlySpan<byte> bytes)
        {
            lock (_got)
            {
                int take = Math.Min(bytes.Length, Limit - _got.Count);
                foreach (byte value in bytes[..take])
                {
                    _got.Add(value);
                }

                return take;
            }
        }

        public void OnWritable()
        {
        }

        public void OnEnd(bool broken) => Ended.Set();
    }
}

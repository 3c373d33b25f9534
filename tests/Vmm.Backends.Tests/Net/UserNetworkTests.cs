// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using FluentAssertions;
using Vmm.Backends.Net;
using Vmm.Core;
using Vmm.Host;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Backends.Tests.Net;

public sealed class UserNetworkTests : IDisposable
{
    private static readonly byte[] s_mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    private static readonly byte[] s_broadcast = [255, 255, 255, 255, 255, 255];
    private static readonly IPAddress s_gateway = IPAddress.Parse("10.0.2.2");
    private static readonly IPAddress s_dns = IPAddress.Parse("10.0.2.3");

    private readonly List<IDisposable> _open = [];

    public void Dispose()
    {
        _open.Reverse();
        foreach (IDisposable thing in _open)
        {
            thing.Dispose();
        }
    }

    [Fact]
    public void Arp_ForGatewayAndDns_IsAnswered_ForOthersNot()
    {
        NetGuest guest = MakeGuest();
        guest.Send(s_broadcast, 0x0806, guest.Arp(s_gateway));
        byte[] reply = guest.Wait(frame => frame[12] == 8 && frame[13] == 6);
        reply.AsSpan(0, 6).ToArray().Should().Equal(s_mac);
        reply[21].Should().Be(2);
        reply.AsSpan(22, 6).ToArray().Should().Equal(guest.GatewayMac);
        reply.AsSpan(28, 4).ToArray().Should().Equal(10, 0, 2, 2);
        guest.Send(s_broadcast, 0x0806, guest.Arp(IPAddress.Parse("10.0.2.99")));
        guest.Send(s_broadcast, 0x0806, guest.Arp(s_dns));
        guest.Wait(frame => frame[12] == 8 && frame[13] == 6).AsSpan(28, 4).ToArray().Should().Equal(10, 0, 2, 3);
    }

    [Fact]
    public void Dhcp_DiscoverAndRequest_GiveTheLease()
    {
        NetGuest guest = MakeGuest(o => o with { HostName = "web1", Mtu = 1400 });
        byte[] offer = Dhcp(guest, 1, null);
        offer[42 + 242].Should().Be(2, "an offer");
        offer.AsSpan(42 + 16, 4).ToArray().Should().Equal(10, 0, 2, 15);
        Option(offer, 3).Should().Equal(10, 0, 2, 2);
        Option(offer, 6).Should().Equal(10, 0, 2, 3);
        Option(offer, 12).Should().Equal(Encoding.ASCII.GetBytes("web1"));
        Option(offer, 26).Should().Equal(5, 120);
        Dhcp(guest, 3, [10, 0, 2, 15])[42 + 242].Should().Be(5, "an acknowledgement");
        Dhcp(guest, 3, [10, 0, 2, 77])[42 + 242].Should().Be(6, "another address is refused");
    }

    [Fact]
    public void Ping_Gateway_IsAnswered()
    {
        NetGuest guest = MakeGuest();
        byte[] echo = [8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7];
        BinaryPrimitives.WriteUInt16BigEndian(echo.AsSpan(2), NetFrames.Checksum(echo));
        guest.Send(guest.GatewayMac, 0x0800, guest.Ip(s_gateway, 1, echo));
        byte[] reply = guest.Wait(frame => NetGuest.IsIpv4(frame, 1));
        reply[34].Should().Be(0);
        reply.AsSpan(38, 7).ToArray().Should().Equal(1, 2, 3, 4, 5, 6, 7);
        NetFrames.Checksum(reply.AsSpan(34)).Should().Be(0);
    }

    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public async Task Tcp_BothWays_MovesEveryByte(bool offload)
    {
        NetGuest guest = MakeGuest();
        guest.TakesOffload = offload;
        using TcpListener host = Listen();
        byte[] up = RandomBytes(700_000, 1);
        byte[] down = RandomBytes(900_000, 2);
        Task<byte[]> server = ServeAsync(host, down);
        var tcp = new GuestTcp(guest, s_gateway, PortOf(host), 4000);
        await Task.Run(() =>
        {
            tcp.Connect();
            tcp.Write(up);
            tcp.Finish();
            tcp.WaitUntil(() => tcp.PeerFinished);
        });
        (await server).AsSpan().SequenceEqual(up).Should().BeTrue();
        tcp.Received.Should().HaveCount(down.Length);
        ((List<byte>)tcp.Received).ToArray().AsSpan().SequenceEqual(down).Should().BeTrue();
        tcp.PeerReset.Should().BeFalse();
        if (offload)
        {
            guest.LargestFrame.Should().BeGreaterThan(3000, "large segments are the point of offload");
        }
        else
        {
            guest.LargestFrame.Should().BeLessThanOrEqualTo(1514);
        }
    }

    [Fact]
    public async Task Tcp_LostFramesAndFullBuffers_AreMadeUp()
    {
        NetGuest guest = MakeGuest();
        using TcpListener host = Listen();
        byte[] down = RandomBytes(120_000, 3);
        Task<byte[]> server = ServeAsync(host, down);
        var tcp = new GuestTcp(guest, s_gateway, PortOf(host), 4001);
        await Task.Run(() =>
        {
            tcp.Connect();
            guest.LoseEvery = 13;
            tcp.WriteOutOfOrder("abcdefgh"u8);
            tcp.WaitUntil(() => tcp.Received.Count > 20_000, 30_000);
            guest.CloseWindow();
            Thread.Yield();
            guest.OpenWindow();
            tcp.WaitUntil(() => tcp.Received.Count == down.Length, 60_000);
            guest.LoseEvery = 0;
            tcp.Finish();
            tcp.WaitUntil(() => tcp.PeerFinished);
        });
        (await server).Should().Equal(Encoding.ASCII.GetBytes("abcdefgh"));
        ((List<byte>)tcp.Received).ToArray().AsSpan().SequenceEqual(down).Should().BeTrue();
    }

    [Fact]
    public async Task Tcp_WholeBufferUnderWay_GoesOnWhenItIsAcknowledged()
    {
        // All that the network buffers is sent and nothing waits: only the guest's acknowledgement makes it read again.
        NetGuest guest = MakeGuest();
        guest.TakesOffload = true;
        using TcpListener host = Listen();
        byte[] down = RandomBytes(3 << 20, 5);
        Task<byte[]> server = ServeAsync(host, down);
        var tcp = new GuestTcp(guest, s_gateway, PortOf(host), 4010) { Scale = 6, Window = 4 << 20 };
        await Task.Run(() =>
        {
            tcp.Connect();
            SpinWait.SpinUntil(() => guest.TakenBytes > 1 << 20, 10_000).Should().BeTrue();
            tcp.WaitUntil(() => tcp.Received.Count == down.Length);
            tcp.Finish();
            tcp.WaitUntil(() => tcp.PeerFinished);
        });
        await server;
        ((List<byte>)tcp.Received).ToArray().AsSpan().SequenceEqual(down).Should().BeTrue();
    }

    [Fact]
    public async Task Tcp_ManySegmentsLostAtOnce_AreNotWaitedForOneByOne()
    {
        // Each of 300 lost segments with a timeout of its own would take a minute and more.
        NetGuest guest = MakeGuest();
        using TcpListener host = Listen();
        byte[] down = RandomBytes(600_000, 6);
        Task<byte[]> server = ServeAsync(host, down);
        var tcp = new GuestTcp(guest, s_gateway, PortOf(host), 4011) { Scale = 4, Window = 1 << 20 };
        await Task.Run(() =>
        {
            guest.LoseNext = 300;
            tcp.Connect();
            tcp.WaitUntil(() => tcp.Received.Count == down.Length, 20_000);
            tcp.Finish();
            tcp.WaitUntil(() => tcp.PeerFinished);
        });
        await server;
        ((List<byte>)tcp.Received).ToArray().AsSpan().SequenceEqual(down).Should().BeTrue();
    }

    [Fact]
    public async Task Tcp_ZeroWindow_IsProbedAndContinues()
    {
        NetGuest guest = MakeGuest();
        using TcpListener host = Listen();
        byte[] down = RandomBytes(30_000, 4);
        Task<byte[]> server = ServeAsync(host, down);
        var tcp = new GuestTcp(guest, s_gateway, PortOf(host), 4002) { Window = 0 };
        await Task.Run(() =>
        {
            tcp.Connect();
            long end = Environment.TickCount64 + 500;
            tcp.WaitUntil(() => Environment.TickCount64 > end);
            tcp.Received.Count.Should().Be(0);
            tcp.Window = 60_000; // not announced: the probe finds out
            tcp.WaitUntil(() => tcp.Received.Count == down.Length);
            tcp.Finish();
            tcp.WaitUntil(() => tcp.PeerFinished);
        });
        await server;
    }

    [Fact]
    public async Task Tcp_HostEndsFirst_NothingFollowsItsFin()
    {
        NetGuest guest = MakeGuest();
        using TcpListener host = Listen();
        var tcp = new GuestTcp(guest, s_gateway, PortOf(host), 4012);
        await Task.Run(tcp.Connect);
        using Socket accepted = await host.AcceptSocketAsync();
        await accepted.SendAsync("all there is"u8.ToArray());
        accepted.Shutdown(SocketShutdown.Send);
        byte[] rest = RandomBytes(20_000, 7);
        await Task.Run(() =>
        {
            tcp.WaitUntil(() => tcp.PeerFinished);
            tcp.Write(rest);
            tcp.WaitUntil(() => tcp.UnackedBytes == 0);
            tcp.Finish();
            tcp.WaitUntil(() => tcp.UnackedBytes == 0);
        });
        tcp.BytesBehindEnd.Should().Be(0);
        Encoding.ASCII.GetString(((List<byte>)tcp.Received).ToArray()).Should().Be("all there is");
        byte[] got = new byte[rest.Length + 1];
        int count = 0;
        for (int taken; (taken = await accepted.ReceiveAsync(got.AsMemory(count)).AsTask().WaitAsync(TimeSpan.FromSeconds(10))) > 0;)
        {
            count += taken;
        }

        got.AsSpan(0, count).SequenceEqual(rest).Should().BeTrue();
        tcp.PeerReset.Should().BeFalse();
    }

    [Fact]
    public async Task Tcp_QuestionsAndAnswers_TakeOneSegmentEach()
    {
        // RFC 9293 §3.8.6.3: the acknowledgement of a question goes with the answer.
        const int Rounds = 100;
        (GuestTcp tcp, Socket host) = await TalkAsync(ackDelayMs: 500, 4013, new ManualTime());
        using Socket accepted = host;
        await Task.Run(() => Converse(tcp, accepted, 2)); // who has not been answered yet is acknowledged at once
        int before = tcp.SegmentsReceived;
        await Task.Run(() => Converse(tcp, accepted, Rounds));
        (tcp.SegmentsReceived - before).Should().Be(Rounds);
    }

    [Fact]
    public async Task Tcp_QuestionWithoutAnswer_IsAcknowledgedAndTheNextOnesAtOnce()
    {
        var time = new ManualTime();
        (GuestTcp tcp, Socket host) = await TalkAsync(ackDelayMs: 300, 4014, time);
        using Socket accepted = host;
        await Task.Run(() =>
        {
            Converse(tcp, accepted, 3);
            tcp.Write("is anybody there?"u8);
            time.Advance(TimeSpan.FromMilliseconds(299));
            tcp.Settle();
            tcp.UnackedBytes.Should().Be(17, "it waits for an answer");
            time.Advance(TimeSpan.FromMilliseconds(1));
            tcp.WaitUntil(() => tcp.UnackedBytes == 0);
            for (int i = 0; i < 8; i++)
            {
                tcp.Write("hello?"u8);
                tcp.WaitUntil(() => tcp.UnackedBytes == 0); // and time stands still
            }
        });
    }

    [Fact]
    public async Task Tcp_SecondSegmentOfAQuestion_IsAcknowledgedAtOnce()
    {
        (GuestTcp tcp, Socket host) = await TalkAsync(ackDelayMs: 500, 4015, new ManualTime());
        using Socket accepted = host;
        await Task.Run(() =>
        {
            Converse(tcp, accepted, 3);
            tcp.Write("who "u8);
            tcp.Settle();
            tcp.UnackedBytes.Should().Be(4);
            tcp.Write("is there?"u8);
            tcp.WaitUntil(() => tcp.UnackedBytes == 0);
        });
    }

    [Fact]
    public void Tcp_ClosedPort_IsReset()
    {
        NetGuest guest = MakeGuest();
        ushort port;
        using (TcpListener host = Listen())
        {
            port = PortOf(host);
        }

        var tcp = new GuestTcp(guest, s_gateway, port, 4003);
        tcp.Connect();
        tcp.PeerReset.Should().BeTrue();
        var stray = new GuestTcp(guest, s_gateway, port, 4004);
        stray.Segment(16, "hello"u8);
        stray.WaitUntil(() => stray.PeerReset);
    }

    [Fact]
    public async Task Tcp_HostResets_GuestSeesReset()
    {
        NetGuest guest = MakeGuest();
        using TcpListener host = Listen();
        var tcp = new GuestTcp(guest, s_gateway, PortOf(host), 4005);
        await Task.Run(tcp.Connect);
        using (Socket accepted = await host.AcceptSocketAsync())
        {
            accepted.LingerState = new LingerOption(enable: true, seconds: 0);
        }

        await Task.Run(() => tcp.WaitUntil(() => tcp.PeerReset));
    }

    [Fact]
    public async Task Tcp_GuestResets_HostSeesReset()
    {
        NetGuest guest = MakeGuest();
        using TcpListener host = Listen();
        var tcp = new GuestTcp(guest, s_gateway, PortOf(host), 4006);
        await Task.Run(tcp.Connect);
        using Socket accepted = await host.AcceptSocketAsync();
        tcp.Reset();
        Func<Task> read = async () => await accepted.ReceiveAsync(new byte[10]).WaitAsync(TimeSpan.FromSeconds(10));
        (await read.Should().ThrowAsync<SocketException>()).Which.SocketErrorCode.Should().Be(SocketError.ConnectionReset);
    }

    [Fact]
    public async Task Forward_Tcp_ReachesTheGuest()
    {
        (UserNetwork net, NetGuest guest) = Make(o => o with
        {
            Forwards = [new PortForward(false, IPAddress.Loopback, 0, 22)],
        });
        using var client = new TcpClient();
        await client.ConnectAsync(IPAddress.Loopback, net.ForwardPorts[0]);
        byte[] syn = guest.Wait(frame => NetGuest.IsIpv4(frame, 6) && frame[47] == 2);
        BinaryPrimitives.ReadUInt16BigEndian(syn.AsSpan(36)).Should().Be(22);
        syn.AsSpan(26, 4).ToArray().Should().Equal(10, 0, 2, 2);
        GuestTcp tcp = await Task.Run(() => GuestTcp.Answer(guest, syn));
        await client.GetStream().WriteAsync("SSH-2.0-client\n"u8.ToArray());
        await Task.Run(() => tcp.WaitUntil(() => tcp.Received.Count == 15));
        tcp.Write("SSH-2.0-guest\n"u8);
        byte[] answer = new byte[14];
        await client.GetStream().ReadExactlyAsync(answer);
        Encoding.ASCII.GetString(answer).Should().Be("SSH-2.0-guest\n");
    }

    [Fact]
    public async Task Forward_Udp_ReachesTheGuestAndBack()
    {
        (UserNetwork net, NetGuest guest) = Make(o => o with
        {
            Forwards = [new PortForward(true, IPAddress.Loopback, 0, 53)],
        });
        using var client = new UdpClient(0, AddressFamily.InterNetwork);
        await client.SendAsync("question"u8.ToArray(), new IPEndPoint(IPAddress.Loopback, net.ForwardPorts[0]));
        byte[] got = guest.Wait(frame => NetGuest.IsUdp(frame, 53));
        NetGuest.CheckSums(got);
        Encoding.ASCII.GetString(got, 42, 8).Should().Be("question");
        guest.SendUdp(
            new IPAddress(got.AsSpan(26, 4)), 53, BinaryPrimitives.ReadUInt16BigEndian(got.AsSpan(34)), "answer"u8);
        UdpReceiveResult reply = await client.ReceiveAsync().WaitAsync(TimeSpan.FromSeconds(10));
        Encoding.ASCII.GetString(reply.Buffer).Should().Be("answer");
    }

    [Fact]
    public void Forward_PortTaken_SaysSoInOneLineAndWhatToDo()
    {
        using TcpListener host = Listen();
        Action make = () => MakeGuest(o => o with
        {
            Forwards = [new PortForward(false, IPAddress.Loopback, PortOf(host), 22)],
        });
        make.Should().Throw<HostException>().WithMessage(
            $"forward: tcp 127.0.0.1:{PortOf(host)}: something else on this host listens there; give the forward another host port");
    }

    [Fact]
    public async Task Udp_IsTranslatedBothWays_AlsoInFragments()
    {
        NetGuest guest = MakeGuest();
        using var host = new UdpClient(new IPEndPoint(IPAddress.Loopback, 0));
        ushort port = (ushort)((IPEndPoint)host.Client.LocalEndPoint!).Port;
        guest.SendUdp(s_gateway, 5000, port, "ping"u8);
        UdpReceiveResult got = await host.ReceiveAsync().WaitAsync(TimeSpan.FromSeconds(10));
        Encoding.ASCII.GetString(got.Buffer).Should().Be("ping");
        byte[] large = RandomBytes(4000, 5);
        await host.SendAsync(large, got.RemoteEndPoint);
        byte[] assembled = new byte[4008];
        int have = 0;
        while (have < assembled.Length)
        {
            byte[] frame = guest.Wait(f => NetGuest.IsIpv4(f, 17));
            frame.Length.Should().BeLessThanOrEqualTo(1514);
            int offset = (BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(20)) & 0x1FFF) * 8;
            frame.AsSpan(34).CopyTo(assembled.AsSpan(offset));
            have += frame.Length - 34;
        }

        BinaryPrimitives.ReadUInt16BigEndian(assembled).Should().Be(port);
        assembled.AsSpan(8).SequenceEqual(large).Should().BeTrue();

        byte[] datagram = NetGuest.Udp(5000, port, large);
        guest.Send(guest.GatewayMac, 0x0800, guest.Ip(s_gateway, 17, datagram.AsSpan(1480), fragment: 185));
        guest.Send(guest.GatewayMac, 0x0800, guest.Ip(s_gateway, 17, datagram.AsSpan(0, 1480), fragment: 0x2000));
        got = await host.ReceiveAsync().WaitAsync(TimeSpan.FromSeconds(10));
        got.Buffer.AsSpan().SequenceEqual(large).Should().BeTrue();
    }

    [Fact]
    public void Dns_OwnNamesAreAnswered_OthersNot()
    {
        NetGuest guest = MakeGuest(o => o with { HostName = "web1" });
        Query(guest, "web1.internal").AsSpan(^4).ToArray().Should().Equal(10, 0, 2, 15);
        Query(guest, "gateway").AsSpan(^4).ToArray().Should().Equal(10, 0, 2, 2);

        // The resolver's port is 53, which a test cannot have: what is checked is that an unknown name is not answered
        // by us, and that the flow's answer would carry the DNS server's address (Udp_IsTranslatedBothWays).
        guest.SendUdp(s_dns, 6000, 53, DnsQuery("example.org"));
        Action wait = () => guest.Wait(frame => NetGuest.IsUdp(frame, 6000), 200);
        wait.Should().Throw<TimeoutException>();
    }

    [Fact]
    public void Isolated_HasNoWayOut()
    {
        using TcpListener host = Listen();
        NetGuest guest = MakeGuest(o => o with { Isolated = true });
        var tcp = new GuestTcp(guest, s_gateway, PortOf(host), 4007);
        tcp.Connect();
        tcp.PeerReset.Should().BeTrue();
        byte[] offer = Dhcp(guest, 1, null);
        Option(offer, 3).Should().BeEmpty("there is no router");
    }

    [Fact]
    public void RouterSolicitation_GetsPrefixAndDns()
    {
        NetGuest guest = MakeGuest();
        byte[] packet = Ipv6("fe80::15", "ff02::2", 58, 255, 8);
        packet[40] = 133;
        guest.Send([0x33, 0x33, 0, 0, 0, 2], 0x86DD, packet);
        byte[] advert = guest.Wait(frame => frame[12] == 0x86 && frame[54] == 134);
        advert[21].Should().Be(255);
        uint length = (uint)advert.Length - 54;
        NetFrames.Checksum(advert.AsSpan(54), NetFrames.Sum(advert.AsSpan(22, 32), 58 + length)).Should().Be(0);
        byte[] prefix = IPAddress.Parse("fd76:6d6d::").GetAddressBytes();
        advert.AsSpan(54 + 16 + 8 + 8 + 16, 16).ToArray().Should().Equal(prefix);
    }

    // RFC 8200 §3: the header, with room for the payload behind it.
    private static byte[] Ipv6(string source, string destination, byte nextHeader, byte hopLimit, byte payloadBytes)
    {
        byte[] packet = new byte[40 + payloadBytes];
        packet[0] = 0x60;
        packet[5] = payloadBytes;
        packet[6] = nextHeader;
        packet[7] = hopLimit;
        IPAddress.Parse(source).GetAddressBytes().CopyTo(packet, 8);
        IPAddress.Parse(destination).GetAddressBytes().CopyTo(packet, 24);
        return packet;
    }

    [Loopback6Fact]
    public async Task Tcp6_ToGateway_ReachesLoopback()
    {
        NetGuest guest = MakeGuest();
        using var host = new TcpListener(IPAddress.IPv6Loopback, 0);
        host.Start();
        byte[] packet = Ipv6("fd76:6d6d::15", "fd76:6d6d::2", 6, 64, 20);
        BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(40), 4000);
        BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(42), PortOf(host));
        packet[52] = 0x50;
        packet[53] = 2;
        packet[54] = 255;
        guest.Send(guest.GatewayMac, 0x86DD, packet);
        byte[] reply = guest.Wait(frame => frame[12] == 0x86 && frame[20] == 6);
        reply[67].Should().Be(0x12, "SYN ACK");
        uint length = (uint)reply.Length - 54;
        NetFrames.Checksum(reply.AsSpan(54), NetFrames.Sum(reply.AsSpan(22, 32), 6 + length)).Should().Be(0);
        using Socket accepted = await host.AcceptSocketAsync();
    }

    [Fact]
    public void Switch_TwoVms_ReachEachOtherAndKnowTheirNames()
    {
        string directory = Path.Combine(Path.GetTempPath(), "vmm-switch-" + Guid.NewGuid().ToString("n")[..8]);
        byte[] otherMac = [0x52, 0x54, 0, 0, 0, 9];
        (UserNetwork one, NetGuest a) = Make(o => o with { HostName = "db1", SwitchDirectory = directory });
        (UserNetwork two, NetGuest b) = Make(
            o => o with { HostName = "web1", SwitchDirectory = directory, GuestMac = otherMac }, otherMac);
        one.GuestIPv4.Should().NotBe(two.GuestIPv4);
        Query(b, "db1").AsSpan(^4).ToArray().Should().Equal(one.GuestIPv4.GetAddressBytes());

        a.Send(s_broadcast, 0x0806, a.Arp(two.GuestIPv4));
        b.Wait(frame => frame[13] == 6).AsSpan(6, 6).ToArray().Should().Equal(s_mac);
        b.Send(s_mac, 0x0806, b.Arp(one.GuestIPv4));
        a.Wait(frame => frame[13] == 6).AsSpan(6, 6).ToArray().Should().Equal(otherMac);
        b.Send([2, 2, 2, 2, 2, 2], 0x88B5, new byte[50]);
        Action wait = () => a.Wait(frame => frame[12] == 0x88, 100);
        wait.Should().Throw<TimeoutException>("unicast goes to its owner only");
        one.Dispose();
        Directory.GetFiles(directory).Should().HaveCount(2, "who leaves takes its files along");
        two.Dispose();
        Directory.Delete(directory);
    }

    [Fact]
    public void HostileFrames_Random_NeverThrowAndStayBounded()
    {
        (UserNetwork net, NetGuest guest) = Make(o => o with { Isolated = true, NameServers = [IPAddress.Loopback] });
        var random = new Random(42);
        byte[] frame = new byte[2000];
        for (int i = 0; i < 60_000; i++)
        {
            int length = random.Next(0, i % 50 == 0 ? 2000 : 120);
            random.NextBytes(frame.AsSpan(0, length));
            if (length > 60)
            {
                guest.GatewayMac.CopyTo(frame, 0);
                (frame[12], frame[13]) = random.Next(4) switch
                {
                    0 => ((byte)8, (byte)6),
                    1 => ((byte)0x86, (byte)0xDD),
                    _ => ((byte)8, (byte)0),
                };
                frame[14] = frame[12] == 8 ? (byte)(0x40 | random.Next(4, 8)) : (byte)0x60;
                BinaryPrimitives.WriteUInt16BigEndian(frame.AsSpan(16), (ushort)random.Next(0, length));
                frame[18] = 0;
                BinaryPrimitives.WriteUInt16BigEndian(frame.AsSpan(18), (ushort)random.Next(0, length));
                frame[20] = (byte)(random.Next(8) == 0 ? 58 : frame[20]);
                frame[23] = random.Next(3) switch { 0 => 6, 1 => 17, _ => 1 };
                if (random.Next(2) == 0)
                {
                    IPAddress.Parse("10.0.2.2").GetAddressBytes().CopyTo(frame, 30);
                }
            }

            net.Send(frame.AsSpan(0, length), default);
        }

        while (guest.TryTake(50, out _))
        {
            Thread.Yield();
        }

        guest.Send(s_broadcast, 0x0806, guest.Arp(s_gateway));
        guest.Wait(f => f[12] == 8 && f[13] == 6).Should().NotBeEmpty("it still works");
    }

    private static byte[] RandomBytes(int length, int seed)
    {
        byte[] bytes = new byte[length];
        new Random(seed).NextBytes(bytes);
        return bytes;
    }

    private static ushort PortOf(TcpListener host) => (ushort)((IPEndPoint)host.LocalEndpoint).Port;

    private static TcpListener Listen()
    {
        var host = new TcpListener(IPAddress.Loopback, 0);
        host.Start();
        return host;
    }

    private static async Task<byte[]> ServeAsync(TcpListener host, byte[] send)
    {
        using Socket socket = await host.AcceptSocketAsync();
        using var stream = new NetworkStream(socket);
        Task write = Task.Run(async () => await stream.WriteAsync(send));
        using var got = new MemoryStream();
        await stream.CopyToAsync(got);
        await write;
        return got.ToArray();
    }

    private static byte[] Dhcp(NetGuest guest, byte type, byte[]? wanted)
    {
        byte[] message = new byte[300];
        message[0] = 1;
        message[1] = 1;
        message[2] = 6;
        guest.MacAddress.CopyTo(message, 28);
        BinaryPrimitives.WriteUInt32BigEndian(message.AsSpan(236), 0x63825363);
        byte[] options = [53, 1, type, .. wanted is null ? [] : (byte[])[50, 4, .. wanted], 255];
        options.CopyTo(message, 240);
        guest.Send(s_broadcast, 0x0800, guest.Ip(
            IPAddress.Broadcast, 17, NetGuest.Udp(68, 67, message), IPAddress.Any));
        byte[] reply = guest.Wait(frame => NetGuest.IsUdp(frame, 68));
        NetGuest.CheckSums(reply);
        return reply;
    }

    private static byte[] Option(byte[] frame, byte code)
    {
        for (int at = 42 + 240; frame[at] != 255; at += 2 + frame[at + 1])
        {
            if (frame[at] == code)
            {
                return frame.AsSpan(at + 2, frame[at + 1]).ToArray();
            }
        }

        return [];
    }

    private static byte[] DnsQuery(string name)
    {
        var bytes = new List<byte> { 0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0 };
        foreach (string label in name.Split('.'))
        {
            bytes.Add((byte)label.Length);
            bytes.AddRange(Encoding.ASCII.GetBytes(label));
        }

        bytes.AddRange([0, 0, 1, 0, 1]);
        return bytes.ToArray();
    }

    private static byte[] Query(NetGuest guest, string name)
    {
        guest.SendUdp(s_dns, 6000, 53, DnsQuery(name));
        byte[] reply = guest.Wait(frame => NetGuest.IsUdp(frame, 6000));
        NetGuest.CheckSums(reply);
        reply[42 + 7].Should().Be(1, "one answer");
        return reply;
    }

    // A connection of the guest whose acknowledgements wait so long, and the host's end of it.
    private async Task<(GuestTcp Guest, Socket Host)> TalkAsync(int ackDelayMs, ushort port, TimeProvider time)
    {
        NetGuest guest = MakeGuest(options => options with { AckDelayMs = ackDelayMs, Time = time });
        using TcpListener host = Listen();
        var tcp = new GuestTcp(guest, s_gateway, PortOf(host), port);
        await Task.Run(tcp.Connect);
        Socket accepted = await host.AcceptSocketAsync();
        accepted.NoDelay = true;
        return (tcp, accepted);
    }

    private static void Converse(GuestTcp tcp, Socket host, int rounds)
    {
        byte[] got = new byte[16];
        for (int i = 0; i < rounds; i++)
        {
            int have = tcp.Received.Count;
            tcp.Write("question"u8);
            for (int count = 0; count < 8;)
            {
                count += host.Receive(got);
            }

            host.Send("answer"u8);
            tcp.WaitUntil(() => tcp.Received.Count == have + 6);
        }
    }

    private NetGuest MakeGuest(Func<UserNetworkOptions, UserNetworkOptions>? change = null) => Make(change).Guest;

    private (UserNetwork Net, NetGuest Guest) Make(
        Func<UserNetworkOptions, UserNetworkOptions>? change = null, byte[]? mac = null)
    {
        var options = new UserNetworkOptions { GuestMac = mac ?? s_mac, NameServers = [IPAddress.Parse("127.0.0.1")] };
        var net = new UserNetwork(change is null ? options : change(options));
        _open.Add(net);
        return (net, new NetGuest(net, mac ?? s_mac, net.GuestIPv4.ToString()));
    }

    [AttributeUsage(AttributeTargets.Method)]
    private sealed class Loopback6FactAttribute : FactAttribute
    {
        public Loopback6FactAttribute()
        {
            try
            {
                using var socket = new Socket(AddressFamily.InterNetworkV6, SocketType.Stream, ProtocolType.Tcp);
                socket.Bind(new IPEndPoint(IPAddress.IPv6Loopback, 0));
            }
            catch (SocketException)
            {
                Skip = "this machine has no ::1";
            }
        }
    }
}

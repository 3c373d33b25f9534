// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Diagnostics;
using System.IO;
using System.Net.Sockets;
using FluentAssertions;
using Vmm.Backends.Net;
using Vmm.Host;
using Xunit;

namespace Vmm.Backends.Tests.Net;

public sealed class CableTests
{
    private const string Tap = "vmmtest0";
    private static readonly byte[] s_mac = [0x52, 0x54, 0, 0, 0, 1];

    [Fact]
    public void Socket_TwoEnds_CarryFramesAndReconnect()
    {
        string path = Path.Combine(Path.GetTempPath(), $"vmm-{Guid.NewGuid():n}.sock");
        using var loop = new PollLoop("test");
        using var first = new SocketNetBackend(loop, path);
        var a = new NetGuest(first, s_mac);
        first.Send(new byte[60], default);
        first.Dropped.Should().Be(1, "nobody is there");
        for (int round = 0; round < 2; round++)
        {
            using var second = new SocketNetBackend(loop, path);
            var b = new NetGuest(second, s_mac);
            b.Send([1, 2, 3, 4, 5, 6], 0x0800, new byte[1486]);
            a.Wait(frame => frame.Length == 1500)[0].Should().Be(1);
            a.Send([9, 9, 9, 9, 9, 9], 0x0806, new byte[46]);
            b.Wait(frame => frame.Length == 60)[0].Should().Be(9);
        }
    }

    [Fact]
    public void Socket_SlowReceiver_KeepsEveryFrameInOrder()
    {
        string path = Path.Combine(Path.GetTempPath(), $"vmm-{Guid.NewGuid():n}.sock");
        using var loop = new PollLoop("test");
        using var first = new SocketNetBackend(loop, path);
        var a = new NetGuest(first, s_mac);
        using var second = new SocketNetBackend(loop, path);
        var b = new NetGuest(second, s_mac);
        b.Send(s_mac, 0x0800, new byte[100]);
        a.Wait(frame => frame.Length == 114);
        a.CloseWindow();
        for (int i = 0; i < 200; i++)
        {
            byte[] payload = new byte[1000];
            payload[0] = (byte)i;
            b.Send(s_mac, 0x0800, payload);
        }

        a.TryTake(50, out _).Should().BeFalse();
        a.OpenWindow();
        for (int i = 0; i < 200; i++)
        {
            a.Wait(frame => frame.Length == 1014)[14].Should().Be((byte)i);
        }
    }

    [Fact]
    public void Socket_PeerSpeaksNonsense_IsDropped()
    {
        string path = Path.Combine(Path.GetTempPath(), $"vmm-{Guid.NewGuid():n}.sock");
        using var loop = new PollLoop("test");
        using var net = new SocketNetBackend(loop, path);
        _ = new NetGuest(net, s_mac);
        using var peer = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified) { ReceiveTimeout = 10_000 };
        peer.Connect(new UnixDomainSocketEndPoint(path));
        peer.Send([0xFF, 0xFF, 0xFF, 0xFF, 1, 2, 3]);
        peer.Receive(new byte[10]).Should().Be(0);
    }

    [Fact]
    public void Socket_PathCannotBeUsed_SaysSoInOneLine()
    {
        using var loop = new PollLoop("test");
        Func<IDisposable> make = () => new SocketNetBackend(loop, "/nonexistent/directory/net.sock");
        make.Should().Throw<HostException>().Which.Message.Should().StartWith("network socket /nonexistent/directory/net.sock: ")
            .And.NotContain("\n");
    }

    [Theory]
    [InlineData("no/such")]
    [InlineData("a-name-that-is-too-long-for-it")]
    public void Tap_BadName_IsRefused(string name)
    {
        using var loop = new PollLoop("test");
        Func<IDisposable> make = () => new TapNetBackend(loop, name);
        make.Should().Throw<HostException>().Which.Message.Should().Contain("not a name of an interface");
    }

    [Tap(isMissing: true)]
    public void Tap_WithoutTheRightToMakeOne_SaysWhatToDo()
    {
        using var loop = new PollLoop("test");
        Func<IDisposable> make = () => new TapNetBackend(loop, Tap);
        make.Should().Throw<HostException>().Which.Message.Should()
            .StartWith("tap " + Tap).And.ContainAny("ip tuntap add mode tap user NAME", "No such file");
    }

    [Tap]
    public void Tap_FramesReachTheHostsStackAndBack()
    {
        using var loop = new PollLoop("test");
        using var tap = new TapNetBackend(loop, Tap);
        var guest = new NetGuest(tap, s_mac, "198.18.77.2");
        Ip($"addr add 198.18.77.1/24 dev {Tap}").Should().BeTrue();
        Ip($"link set {Tap} up").Should().BeTrue();
        byte[] arp = new byte[28];
        byte[] head = [0, 1, 8, 0, 6, 4, 0, 1];
        head.CopyTo(arp, 0);
        s_mac.CopyTo(arp, 8);
        byte[] addresses = [198, 18, 77, 2, 0, 0, 0, 0, 0, 0, 198, 18, 77, 1];
        addresses.CopyTo(arp, 14);
        guest.Send([255, 255, 255, 255, 255, 255], 0x0806, arp);
        guest.Wait(frame => frame[12] == 8 && frame[13] == 6 && frame[21] == 2)
            .AsSpan(28, 4).ToArray().Should().Equal(198, 18, 77, 1);
    }

    private static bool Ip(string arguments)
    {
        try
        {
            var start = new ProcessStartInfo("ip", arguments) { RedirectStandardError = true, UseShellExecute = false };
            using Process process = Process.Start(start)!;
            return process.WaitForExit(10_000) && process.ExitCode == 0;
        }
        catch (System.ComponentModel.Win32Exception)
        {
            return false;
        }
    }

    /// <summary>A test of taps: needs the right to make and address one, or, with <c>isMissing</c>, its absence.</summary>
    [AttributeUsage(AttributeTargets.Method)]
    private sealed class TapAttribute : FactAttribute
    {
        private static readonly string? s_whyNot = FindOut();

        public TapAttribute(bool isMissing = false)
        {
            IsMissing = isMissing;
            Skip = !isMissing ? s_whyNot : s_whyNot is null ? "taps can be made here" : null;
        }

        public bool IsMissing { get; }

        private static string? FindOut()
        {
            try
            {
                using var loop = new PollLoop("probe");
                using var tap = new TapNetBackend(loop, Tap);
                return Ip($"addr add 198.18.77.1/24 dev {Tap}") ? null : "ip does not give the tap an address";
            }
            catch (HostException e)
            {
                return e.Message;
            }
        }
    }
}

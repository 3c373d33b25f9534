// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Net.Sockets;
using System.Text;
using System.Threading;
using FluentAssertions;
using Vmm.Backends.Char;
using Vmm.Core;
using Vmm.Host;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Backends.Tests.Char;

public sealed class CharBackendTests : IDisposable
{
    private readonly TempDirectory _temp = new();
    private readonly PollLoop _loop = new("test");

    public void Dispose()
    {
        _loop.Dispose();
        _temp.Dispose();
    }

    [Fact]
    public void UnixSocket_ClientTypesAndReads_BothWays()
    {
        using var backend = new UnixSocketCharBackend(_loop, _temp["s"]);
        var receiver = new Receiver(100);
        backend.Attach(receiver);
        using Socket client = Connect(_temp["s"]);
        client.Send("hello"u8.ToArray());
        receiver.WaitFor("hello");
        backend.Write("world"u8);
        ReadText(client, 5).Should().Be("world");
    }

    [Fact]
    public void UnixSocket_SecondClient_ReplacesTheFirst()
    {
        using var backend = new UnixSocketCharBackend(_loop, _temp["s"]);
        var receiver = new Receiver(100);
        backend.Attach(receiver);
        using Socket first = Connect(_temp["s"]);
        first.Send("1"u8.ToArray());
        receiver.WaitFor("1");
        using Socket second = Connect(_temp["s"]);
        second.Send("2"u8.ToArray());
        receiver.WaitFor("12");
        backend.Write("x"u8);
        ReadText(second, 1).Should().Be("x");
        first.Receive(new byte[1]).Should().Be(0, "it was hung up");
    }

    [Fact]
    public void UnixSocket_LeftOverFile_IsReplaced_AndLiveOneIsNot()
    {
        using (var dead = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified))
        {
            dead.Bind(new UnixDomainSocketEndPoint(_temp["dead"]));
        }

        File.WriteAllText(_temp["plain"], "x");
        using var live = new UnixSocketCharBackend(_loop, _temp["s"]);
        Action again = () => new UnixSocketCharBackend(_loop, _temp["s"]).Dispose();
        again.Should().Throw<IOException>().WithMessage($"{_temp["s"]}*");
        using var second = new UnixSocketCharBackend(_loop, _temp["dead"]);
        using Socket client = Connect(_temp["dead"]);
        client.Connected.Should().BeTrue();
    }

    [Fact]
    public void Input_WithoutRoom_WaitsAndLosesNothing()
    {
        using var backend = new UnixSocketCharBackend(_loop, _temp["s"]);
        var receiver = new Receiver(4);
        backend.Attach(receiver);
        using Socket client = Connect(_temp["s"]);
        client.Send("abcdefghij"u8.ToArray());
        receiver.WaitFor("abcd");
        receiver.AddRoom(3);
        backend.ResumeInput();
        receiver.WaitFor("abcdefg");
        receiver.AddRoom(100);
        backend.ResumeInput();
        receiver.WaitFor("abcdefghij");
    }

    [Fact]
    public void Pty_UserOpensIt_EveryByteArrivesUnchanged()
    {
        using var backend = new PtyCharBackend(_loop);
        var receiver = new Receiver(1000);
        backend.Attach(receiver);
        byte[] all = new byte[255];
        for (int i = 0; i < all.Length; i++)
        {
            all[i] = (byte)(i + 1);
        }

        using var user = new FileStream(backend.Path, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite, 0);
        user.Write(all);
        receiver.WaitFor(all);
        backend.Write(all);
        byte[] back = new byte[all.Length];
        user.ReadExactly(back);
        back.Should().Equal(all);
    }

    [Fact]
    public void Pty_NobodyReads_WriterNeverBlocks()
    {
        using var backend = new PtyCharBackend(_loop);
        byte[] block = new byte[65536];
        for (int i = 0; i < 20; i++)
        {
            backend.Write(block);
        }
    }

    [Fact]
    public void File_TwoRuns_Append()
    {
        for (int i = 0; i < 2; i++)
        {
            using var backend = new FileCharBackend(_temp["out"]);
            backend.Write("line\n"u8);
        }

        File.ReadAllText(_temp["out"]).Should().Be("line\nline\n");
    }

    [Fact]
    public void Log_MoreThanItHolds_KeepsTheNewest()
    {
        var random = new Random(1);
        var all = new List<byte>();
        for (int run = 0; run < 4; run++)
        {
            using var log = new CharLog(_temp["log"], 1000);
            log.TotalBytes.Should().Be(all.Count);
            for (int i = 0; i < 20; i++)
            {
                byte[] piece = new byte[random.Next(150)];
                random.NextBytes(piece);
                log.Write(piece);
                all.AddRange(piece);
            }

            log.Tail().Should().Equal(all.GetRange(Math.Max(0, all.Count - 1000), Math.Min(1000, all.Count)));
            log.Tail(10).Should().Equal(all.GetRange(all.Count - 10, 10));
        }

        CharLog.Read(_temp["log"]).Should().Equal(all.GetRange(all.Count - 1000, 1000));
        CharLog.Read(_temp["log"], 7).Should().Equal(all.GetRange(all.Count - 7, 7));
    }

    [Fact]
    public void Log_FileOfAnotherKind_IsRefusedToReaders()
    {
        File.WriteAllText(_temp["x"], new string('x', 5000));
        Action read = () => CharLog.Read(_temp["x"]);
        read.Should().Throw<IOException>().WithMessage("*not a console log*");
    }

    [Fact]
    public void Multiplexer_WatchersSeeThePastAndOneWrites()
    {
        var end = new FakeCharBackend();
        using var mux = new CharMultiplexer(new CharLog(null), end);
        var guest = new Receiver(1000);
        mux.Attach(guest);
        mux.Write("past "u8);
        var first = new Watcher();
        mux.Watch(first);
        mux.Write("present"u8);
        first.Text.Should().Be("past present");
        Encoding.ASCII.GetString(end.Output).Should().Be("past present");

        end.Type("end"u8.ToArray());
        mux.Send(first, "no"u8).Should().Be(2);
        mux.IgnoredInputBytes.Should().Be(2);
        mux.TryTakeInput(first).Should().BeTrue();
        var second = new Watcher();
        mux.Watch(second);
        mux.TryTakeInput(second).Should().BeFalse();
        mux.Send(first, "yes"u8).Should().Be(3);
        end.Type("lost"u8.ToArray());
        guest.WaitFor("endyes");
        mux.Leave(first);
        end.Type("back"u8.ToArray());
        guest.WaitFor("endyesback");
        mux.Write("!"u8);
        first.Text.Should().Be("past present");
        second.Text.Should().Be("past present!");
    }

    private static Socket Connect(string path)
    {
        var client = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified) { ReceiveTimeout = 10_000 };
        client.Connect(new UnixDomainSocketEndPoint(path));
        return client;
    }

    private static string ReadText(Socket socket, int length)
    {
        byte[] buffer = new byte[length];
        int got = 0;
        while (got < length)
        {
            got += socket.Receive(buffer, got, length - got, SocketFlags.None);
        }

        return Encoding.ASCII.GetString(buffer);
    }

    private sealed class Watcher : ICharWatcher
    {
        public string Text { get; private set; } = "";

        public void Output(ReadOnlySpan<byte> bytes) => Text += Encoding.ASCII.GetString(bytes);

        public void ResumeInput()
        {
        }
    }

    private sealed class Receiver : ICharReceiver
    {
        private readonly object _gate = new();
        private readonly List<byte> _got = [];
        private int _room;

        public Receiver(int room) => _room = room;

        public int RoomBytes
        {
            get
            {
                lock (_gate)
                {
                    return _room;
                }
            }
        }

        public void AddRoom(int bytes)
        {
            lock (_gate)
            {
                _room += bytes;
            }
        }

        public void Receive(ReadOnlySpan<byte> bytes)
        {
            lock (_gate)
            {
                bytes.Length.Should().BeLessThanOrEqualTo(_room);
                _room -= bytes.Length;
                _got.AddRange(bytes);
                Monitor.PulseAll(_gate);
            }
        }

        public void WaitFor(string text) => WaitFor(Encoding.ASCII.GetBytes(text));

        public void WaitFor(byte[] bytes)
        {
            lock (_gate)
            {
                while (_got.Count < bytes.Length && Monitor.Wait(_gate, 10_000))
                {
                }

                _got.Should().Equal(bytes);
            }
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Text;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Virtio;
using Vmm.Host;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Machine.Tests.Virtio;

/// <summary>The 9P device over a real directory, spoken to byte by byte (9P2000.L).</summary>
public sealed class Virtio9PTests : IDisposable
{
    private const ulong RequestAt = 0x100000;
    private const ulong ReplyAt = 0x180000;
    private const int ErrorNotFound = 2, ErrorDenied = 13, ErrorInvalid = 22, ErrorReadOnly = 30, ErrorLoop = 40, ErrorNotDirectory = 20;

    private readonly string _outside = Directory.CreateTempSubdirectory("vmm-9p-").FullName;
    private readonly string _root;
    private readonly TestRam _ram = new(4 << 20);
    private readonly List<VirtioMmio> _devices = [];
    private VirtioMmioDriver _driver;

    public Virtio9PTests()
    {
        _root = Path.Combine(_outside, "share");
        Directory.CreateDirectory(_root);
        File.WriteAllText(Path.Combine(_outside, "secret"), "not for guests");
        File.WriteAllText(Path.Combine(_root, "hello.txt"), "hello, guest");
        _driver = Start(isReadOnly: false);
    }

    public void Dispose()
    {
        foreach (VirtioMmio device in _devices)
        {
            device.Dispose();
        }

        Directory.Delete(_outside, recursive: true);
    }

    [Fact]
    public void MountTag_IsShown()
    {
        _driver.ReadConfig(0, AccessWidth.Word).Should().Be(4);
        _driver.ReadConfig(2, AccessWidth.Dword).Should().Be(BinaryPrimitives.ReadUInt32LittleEndian("data"u8));
    }

    [Fact]
    public void File_ReadWriteCreateListRemove()
    {
        Attach();
        Walk(0, 1, "hello.txt").Should().Be(0);
        Call(12, U32(1), U32(0)).Type.Should().Be(13);
        byte[] read = Call(116, U32(1), U64(7), U32(100)).Body;
        Encoding.ASCII.GetString(read.AsSpan(4)).Should().Be("guest");
        Call(120, U32(1)).Type.Should().Be(121);

        Walk(0, 2).Should().Be(0);
        Call(14, U32(2), Name("new"), U32(0x42), U32(0x1A4), U32(0)).Type.Should().Be(15);
        byte[] data = new byte[100_000];
        new Random(1).NextBytes(data);
        BinaryPrimitives.ReadInt32LittleEndian(Call(118, U32(2), U64(5), U32(100_000), data).Body).Should().Be(100_000);
        Call(50, U32(2), U32(0)).Type.Should().Be(51);
        File.ReadAllBytes(Path.Combine(_root, "new")).AsSpan(5).SequenceEqual(data).Should().BeTrue();
        byte[] attributes = Call(24, U32(2), U64(0x7FF)).Body;
        BinaryPrimitives.ReadUInt32LittleEndian(attributes.AsSpan(8 + 13)).Should().Be(0x81A4);
        BinaryPrimitives.ReadUInt64LittleEndian(attributes.AsSpan(8 + 13 + 12 + 16)).Should().Be(100_005);
        ((long)BinaryPrimitives.ReadUInt64LittleEndian(attributes.AsSpan(8 + 13 + 12 + 40 + 16))).Should()
            .BeCloseTo(DateTimeOffset.UtcNow.ToUnixTimeSeconds(), 100);

        Walk(0, 3).Should().Be(0);
        Call(12, U32(3), U32(0x10000)).Type.Should().Be(13);
        Names(Call(40, U32(3), U64(0), U32(4000)).Body).Should().BeEquivalentTo(".", "..", "hello.txt", "new");
        Call(122, U32(2)).Type.Should().Be(123);
        File.Exists(Path.Combine(_root, "new")).Should().BeFalse();
    }

    [Fact]
    public void Directory_LongListing_ContinuesAtItsOffset()
    {
        for (int i = 0; i < 300; i++)
        {
            File.WriteAllText(Path.Combine(_root, $"file-{i:d3}"), "");
        }

        Attach();
        Walk(0, 1).Should().Be(0);
        Call(12, U32(1), U32(0x10000)).Type.Should().Be(13);
        var names = new HashSet<string>();
        ulong offset = 0;
        for (; ; )
        {
            byte[] body = Call(40, U32(1), U64(offset), U32(1000)).Body;
            List<string> part = Names(body);
            if (part.Count == 0)
            {
                break;
            }

            part.ForEach(name => names.Add(name).Should().BeTrue());
            offset += (ulong)part.Count;
        }

        names.Should().HaveCount(303);
    }

    [Fact]
    public void TreeOperations_DoWhatTheySay()
    {
        Attach();
        Call(72, U32(0), Name("dir"), U32(0x1ED), U32(0)).Type.Should().Be(73);
        Call(16, U32(0), Name("link"), Name("../secret"), U32(0)).Type.Should().Be(17);
        new FileInfo(Path.Combine(_root, "link")).LinkTarget.Should().Be("../secret");
        Walk(0, 1, "link").Should().Be(0, "a link can be looked at");
        byte[] target = Call(22, U32(1)).Body;
        Encoding.ASCII.GetString(target.AsSpan(2)).Should().Be("../secret", "the guest resolves it in its own tree");
        Walk(0, 2, "hello.txt").Should().Be(0);
        Walk(0, 3, "dir").Should().Be(0);
        Call(70, U32(3), U32(2), Name("hard")).Type.Should().Be(71);
        File.ReadAllText(Path.Combine(_root, "dir/hard")).Should().Be("hello, guest");
        Walk(0, 4, "dir", "hard").Should().Be(0);
        Call(74, U32(0), Name("dir"), U32(0), Name("moved")).Type.Should().Be(75);
        Call(24, U32(4), U64(0x7FF)).Type.Should().Be(25, "the fid moved along");
        Call(76, U32(3), Name("hard"), U32(0)).Type.Should().Be(77);
        Call(76, U32(0), Name("moved"), U32(0x200)).Type.Should().Be(77);
        Directory.Exists(Path.Combine(_root, "moved")).Should().BeFalse();
        Call(26, U32(2), U32(1 | 8 | 0x20 | 0x100), U32(0xDFF), U32(0), U32(0), U64(5), U64(0), U64(0), U64(1_000_000), U64(0))
            .Type.Should().Be(27);
        string hello = Path.Combine(_root, "hello.txt");
        File.ReadAllText(hello).Should().Be("hello");
        ((int)File.GetUnixFileMode(hello)).Should().Be(0x1FF, "no set-user-id and no set-group-id");
        new DateTimeOffset(File.GetLastWriteTimeUtc(hello)).ToUnixTimeSeconds().Should().Be(1_000_000);
        Call(8, U32(0)).Type.Should().Be(9);
    }

    [Fact]
    public void Containment_NoWayOut()
    {
        File.CreateSymbolicLink(Path.Combine(_root, "up"), "..");
        File.CreateSymbolicLink(Path.Combine(_root, "abs"), Path.Combine(_outside, "secret"));
        Attach();

        // ".." of the root is the root.
        Walk(0, 1, "..", "..", "hello.txt").Should().Be(0);
        Walk(0, 2, "..", "secret").Should().Be(0, "the first name was walked");
        Call(24, U32(2), U64(0x7FF)).Error.Should().Be(9, "and the walk ended there");

        // A directory behind a link is not entered; a link is not opened.
        Walk(0, 3, "up", "secret").Should().Be(0);
        Call(24, U32(3), U64(0x7FF)).Error.Should().Be(9);
        Walk(0, 4, "abs").Should().Be(0);
        Call(12, U32(4), U32(0)).Error.Should().Be(ErrorDenied);
        Call(26, U32(4), U32(8), U32(0), U32(0), U32(0), U64(0), U64(0), U64(0), U64(0), U64(0)).Error.Should().Be(ErrorDenied);
        Walk(0, 5, "up").Should().Be(0);
        Call(14, U32(5), Name("made"), U32(0x41), U32(0x1A4), U32(0)).Error.Should().BeOneOf(ErrorLoop, ErrorNotDirectory);
        foreach (string bad in (string[])["../secret", "a/b", "", ".", "..", "x\0y"])
        {
            Call(72, U32(0), Name(bad), U32(0x1ED), U32(0)).Error.Should().Be(ErrorInvalid);
            Call(76, U32(0), Name(bad), U32(0)).Error.Should().Be(ErrorInvalid);
            Call(74, U32(0), Name("hello.txt"), U32(0), Name(bad)).Error.Should().Be(ErrorInvalid);
        }

        // A name that becomes a link between looking and using: the walk is done again, from the root, each time.
        Directory.CreateDirectory(Path.Combine(_root, "d"));
        Walk(0, 6, "d").Should().Be(0);
        Directory.Delete(Path.Combine(_root, "d"));
        File.CreateSymbolicLink(Path.Combine(_root, "d"), "..");
        Call(14, U32(6), Name("made"), U32(0x41), U32(0x1A4), U32(0)).Error.Should().BeOneOf(ErrorLoop, ErrorNotDirectory);

        // Device files.
        Call(18, U32(0), Name("null"), U32(0x21B6), U32(1), U32(3), U32(0)).Error.Should().Be(1);
        File.Exists(Path.Combine(_outside, "made")).Should().BeFalse();
        File.ReadAllText(Path.Combine(_outside, "secret")).Should().Be("not for guests");
    }

    [Fact]
    public void ReadOnlyShare_RefusesEveryChange()
    {
        _driver = Start(isReadOnly: true);
        Attach();
        Walk(0, 1, "hello.txt").Should().Be(0);
        Call(12, U32(1), U32(2)).Error.Should().Be(ErrorReadOnly);
        Call(12, U32(1), U32(0x200)).Error.Should().Be(ErrorReadOnly);
        Call(14, U32(0), Name("x"), U32(0x41), U32(0x1A4), U32(0)).Error.Should().Be(ErrorReadOnly);
        Call(72, U32(0), Name("x"), U32(0x1ED), U32(0)).Error.Should().Be(ErrorReadOnly);
        Call(76, U32(0), Name("hello.txt"), U32(0)).Error.Should().Be(ErrorReadOnly);
        Call(26, U32(1), U32(1), U32(0x1B6), U32(0), U32(0), U64(0), U64(0), U64(0), U64(0), U64(0)).Error.Should().Be(ErrorReadOnly);
        Call(12, U32(1), U32(0)).Type.Should().Be(13);
    }

    [Fact]
    public void Protocol_BadMessages_GetErrors()
    {
        Call(100, U32(8192), Name("9P2000")).Body.AsSpan(6).ToArray().Should().Equal("unknown"u8.ToArray());
        Attach();
        Call(12, U32(77), U32(0)).Error.Should().Be(9);
        Call(24, U32(0)).Error.Should().Be(ErrorInvalid, "it is too short");
        Call(200).Error.Should().Be(95);
        Call(30, U32(0), U32(5), Name("user.x")).Error.Should().Be(95);
        Walk(0, 5, "missing").Should().Be(-ErrorNotFound);
        var names = new List<byte[]> { U32(0), U32(9), (byte[])[17, 0] };
        Call(110, names.ToArray()).Error.Should().Be(ErrorInvalid);

        // A size that the buffers do not bear out.
        _ram.WriteNumber(RequestAt, 4, 0xFFFF_FFFF);
        _ram.WriteNumber(RequestAt + 4, 1, 24);
        _driver[0].Add(new DriverBuffer(RequestAt, 11, false), new DriverBuffer(ReplyAt, 64, true));
        _driver.Kick(0);
        _driver[0].TryTakeUsed(out _, out _).Should().BeTrue();
        _ram.ReadNumber(ReplyAt + 4, 1).Should().Be(7);
        _driver.Status.Should().Be(15);
    }

    [Fact]
    public void Save_OpenFiles_ContinueInAnother()
    {
        Attach();
        Directory.CreateDirectory(Path.Combine(_root, "sub"));
        File.WriteAllText(Path.Combine(_root, "sub", "f"), "content");
        Walk(0, 1, "sub", "f").Should().Be(0);
        Call(12, U32(1), U32(2)).Type.Should().Be(13);
        Walk(0, 2, "hello.txt").Should().Be(0);
        Call(12, U32(2), U32(0)).Type.Should().Be(13);
        VirtioMmio first = _devices[^1];
        first.Pause();
        File.Delete(Path.Combine(_root, "hello.txt"));
        VirtioMmio second = Make(isReadOnly: false);
        DeviceCheck.Copy(first, second);
        second.Resume();
        var other = new VirtioMmioDriver(second, _ram);
        VirtioMmioDriver old = _driver;
        Encoding.ASCII.GetString(CallOn(other, old[0], 116, U32(1), U64(0), U32(100)).Body.AsSpan(4)).Should().Be("content");
        CallOn(other, old[0], 116, U32(2), U64(0), U32(100)).Error.Should().Be(116, "the file went away meanwhile");
    }

    [Fact]
    public void Messages_Random_NeverThrowAndStayInside()
    {
        Attach();
        var random = new Random(9);
        byte[] body = new byte[200];
        byte[] types = [8, 12, 14, 16, 18, 20, 22, 24, 26, 30, 40, 50, 52, 54, 70, 72, 74, 76, 100, 104, 108, 110, 116, 118, 120, 122];
        for (int i = 0; i < 5000; i++)
        {
            random.NextBytes(body);
            byte[] small = U32((uint)random.Next(4));
            small.CopyTo(body, 0);
            if (random.Next(2) == 0)
            {
                U32((uint)random.Next(4)).CopyTo(body, 4);
                body[8] = (byte)random.Next(3);
                body[9] = 0;
            }

            byte type = types[random.Next(types.Length)];
            Call(type, body.AsSpan(0, random.Next(body.Length)).ToArray()).Type.Should().Be(
                _lastType == 7 ? (byte)7 : (byte)(type + 1));
            if (i % 500 == 0)
            {
                Attach();
            }
        }

        Directory.GetFileSystemEntries(_outside).Should().HaveCount(2);
    }

    private byte _lastType;

    private static byte[] U32(uint value) => BitConverter.GetBytes(value);

    private static byte[] U64(ulong value) => BitConverter.GetBytes(value);

    private static byte[] Name(string name) => [(byte)name.Length, 0, .. Encoding.UTF8.GetBytes(name)];

    private static List<string> Names(byte[] body)
    {
        var names = new List<string>();
        for (int at = 4; at < body.Length;)
        {
            int length = body[at + 22];
            names.Add(Encoding.UTF8.GetString(body, at + 24, length));
            at += 24 + length;
        }

        return names;
    }

    private VirtioMmio Make(bool isReadOnly)
    {
        var model = new Virtio9P(new SharedDirectory(_root, isReadOnly), "data");
        var mmio = new VirtioMmio(
            new VirtioDevice("share0", model, _ram, new VirtioOptions { Inline = true }), new FakeIrqLine());
        mmio.Reset();
        _devices.Add(mmio);
        return mmio;
    }

    private VirtioMmioDriver Start(bool isReadOnly)
    {
        VirtioMmio mmio = Make(isReadOnly);
        mmio.Resume();
        var driver = new VirtioMmioDriver(mmio, _ram);
        driver.Start(1, 1);
        return driver;
    }

    private void Attach()
    {
        Call(100, U32(128 * 1024), Name("9P2000.L")).Type.Should().Be(101);
        Call(104, U32(0), U32(uint.MaxValue), Name("root"), Name("/"), U32(0)).Type.Should().Be(105);
    }

    private int Walk(uint from, uint to, params string[] names)
    {
        var parts = new List<byte[]> { U32(from), U32(to), (byte[])[(byte)names.Length, 0] };
        foreach (string name in names)
        {
            parts.Add(Name(name));
        }

        return -Call(110, parts.ToArray()).Error;
    }

    private (byte Type, byte[] Body, int Error) Call(byte type, params byte[][] parts) =>
        CallOn(_driver, _driver[0], type, parts);

    private (byte Type, byte[] Body, int Error) CallOn(
        VirtioMmioDriver driver, VirtqueueDriver queue, byte type, params byte[][] parts)
    {
        var message = new List<byte> { 0, 0, 0, 0, type, 5, 0 };
        foreach (byte[] part in parts)
        {
            message.AddRange(part);
        }

        byte[] bytes = message.ToArray();
        BitConverter.GetBytes(bytes.Length).CopyTo(bytes, 0);
        bytes.CopyTo(_ram.Bytes[(int)RequestAt..]);
        queue.Add(new DriverBuffer(RequestAt, (uint)bytes.Length, false), new DriverBuffer(ReplyAt, 128 * 1024, true));
        driver.Kick(0);
        queue.TryTakeUsed(out _, out uint used).Should().BeTrue();
        byte[] reply = _ram.Bytes.Slice((int)ReplyAt, (int)used).ToArray();
        BitConverter.ToInt32(reply).Should().Be(reply.Length);
        _lastType = reply[4];
        return (reply[4], reply[7..], reply[4] == 7 ? BitConverter.ToInt32(reply, 7) : 0);
    }
}

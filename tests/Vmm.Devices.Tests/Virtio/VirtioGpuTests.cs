// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Virtio;

public sealed class VirtioGpuTests : IDisposable
{
    private const uint Ok = 0x1100, OutOfMemory = 0x1201, BadScanout = 0x1202, BadResource = 0x1203, BadParameter = 0x1205;
    private const ulong Backing = 0x100000;

    private readonly VirtioGpu _gpu = new(640, 480, 8 << 20);
    private readonly VirtioRig _rig;
    private readonly DisplayFrame _frame = new();

    public VirtioGpuTests()
    {
        _rig = new VirtioRig(_gpu);
        _rig.Driver.Start(2, 2);
    }

    public void Dispose() => _rig.Dispose();

    [Fact]
    public void DisplayInfo_AndEdid_TellTheSize()
    {
        byte[] info = Raw(408, 0, 0x100);
        U32(info, 0).Should().Be(0x1101);
        (U32(info, 32), U32(info, 36), U32(info, 40)).Should().Be((640u, 480u, 1u));
        U32(info, 64).Should().Be(0, "one screen");
        byte[] edid = Raw(1056, 0, 0x10A, 0, 0);
        U32(edid, 0).Should().Be(0x1104);
        U32(edid, 24).Should().Be(128);
        byte sum = 0;
        foreach (byte value in edid.AsSpan(32, 128))
        {
            sum += value;
        }

        sum.Should().Be(0);
        edid.AsSpan(32, 8).ToArray().Should().Equal(0, 255, 255, 255, 255, 255, 255, 0);
        (edid[32 + 56] | ((edid[32 + 58] & 0xF0) << 4)).Should().Be(640);
        _gpu.RequestSize(1920, 1080).Should().BeTrue();
        _rig.Driver.ReadConfig(0, AccessWidth.Dword).Should().Be(1);
        (_rig.Driver.InterruptStatus & 2).Should().Be(2);
        _rig.Driver.WriteConfig(4, AccessWidth.Dword, 1);
        _rig.Driver.ReadConfig(0, AccessWidth.Dword).Should().Be(0);
        U32(Raw(408, 0, 0x100), 32).Should().Be(1920);
    }

    [Fact]
    public void Picture_TransferAndFlush_ReachViewers()
    {
        Show(1, 100, 50);
        _gpu.Refresh(_frame);
        (_frame.Width, _frame.Height).Should().Be((100, 50));
        _frame.Pixels.Should().OnlyContain(p => p == 0);
        Fill(100 * 50, i => 0xFF000000 | (uint)i);
        Call(0x105, 0, 0, 100, 50, 0, 0, 1, 0).Should().Be(Ok);
        _gpu.Refresh(_frame);
        _frame.Changes.Should().BeEmpty("not flushed yet");
        Call(0x104, 10, 20, 5, 2, 1, 0).Should().Be(Ok);
        _gpu.Refresh(_frame);
        _frame.Changes.Should().Equal(new DisplayRectangle(10, 20, 5, 2));
        _frame.Pixels[(20 * 100) + 12].Should().Be((20 * 100) + 12);
        _frame.Pixels[0].Should().Be(0, "only what was flushed is looked at");
        var late = new DisplayFrame();
        _gpu.Refresh(late);
        late.Pixels[4999].Should().Be(4999);
        _gpu.Refresh(_frame);
        _frame.Changes.Should().BeEmpty();
        for (int i = 0; i < 100; i++)
        {
            Call(0x104, 0, 0, 1, 1, 1, 0);
        }

        _gpu.Refresh(_frame);
        _frame.Changes.Should().Equal(new DisplayRectangle(0, 0, 100, 50));
    }

    [Fact]
    public void Transfer_PartOfPictureFromScatteredBacking_LandsInPlace()
    {
        Call(0x101, 1, 1, 16, 16).Should().Be(Ok);

        // Three pieces whose borders cut through rows.
        Call(0x106, 1, 3, (uint)Backing, 0, 100, 0, (uint)Backing + 0x1000, 0, 500, 0, (uint)Backing + 0x2000, 0, 424, 0).Should().Be(Ok);
        for (uint i = 0; i < 1024; i++)
        {
            ulong at = i < 100 ? Backing + i : i < 600 ? Backing + 0x1000 + (i - 100) : Backing + 0x2000 + (i - 600);
            _rig.Ram.Bytes[(int)at] = (byte)((i / 4) + (i % 4));
        }

        Call(0x103, 0, 0, 16, 16, 0, 1).Should().Be(Ok);
        uint offset = ((3 * 16) + 2) * 4;
        Call(0x105, 2, 3, 10, 9, offset, 0, 1, 0).Should().Be(Ok);
        _gpu.Refresh(_frame);
        for (int y = 0; y < 16; y++)
        {
            for (int x = 0; x < 16; x++)
            {
                int n = (y * 16) + x;
                bool inside = x is >= 2 and < 12 && y is >= 3 and < 12;
                uint expected = inside ? ((uint)(byte)(n + 2) << 16) | ((uint)(byte)(n + 1) << 8) | (byte)n : 0;
                _frame.Pixels[n].Should().Be(expected);
            }
        }
    }

    [Fact]
    public void Commands_OutOfRange_AreRefused()
    {
        Call(0x101, 0, 1, 10, 10).Should().Be(BadResource);
        Call(0x101, 1, 77, 10, 10).Should().Be(BadParameter);
        Call(0x101, 1, 1, 0, 10).Should().Be(BadParameter);
        Call(0x101, 1, 1, 8193, 1).Should().Be(BadParameter);
        Call(0x101, 1, 1, 8192, 8192).Should().Be(OutOfMemory);
        Call(0x101, 1, 1, 100, 50).Should().Be(Ok);
        Call(0x101, 1, 1, 100, 50).Should().Be(BadResource, "it exists");
        Call(0x103, 0, 0, 101, 50, 0, 1).Should().Be(BadParameter);
        Call(0x103, 1, 0, 0xFFFFFFFF, 50, 0, 1).Should().Be(BadParameter);
        Call(0x103, 0, 0, 100, 50, 1, 1).Should().Be(BadScanout);
        Call(0x103, 0, 0, 100, 50, 0, 9).Should().Be(BadResource);
        Call(0x105, 0, 0, 100, 50, 0, 0, 1, 0).Should().Be(BadParameter, "no backing");
        Call(0x106, 1, 1, (uint)Backing, 0, 19999, 0).Should().Be(Ok);
        Call(0x105, 0, 0, 100, 50, 0, 0, 1, 0).Should().Be(BadParameter, "one byte short");
        Call(0x105, 0, 0, 100, 49, 0xFFFFFFFF, 0xFFFFFFFF, 1, 0).Should().Be(BadParameter);
        Call(0x106, 1, 1, 0, 0, 1, 0).Should().Be(BadParameter, "it has one");
        Call(0x106, 1, 2, 0, 0, 1, 0).Should().Be(BadParameter, "fewer entries than said");
        Call(0x107, 1, 0).Should().Be(Ok);
        Call(0x106, 1, 1, 0x7FFF_0000, 0, 20000, 0).Should().Be(Ok);
        Call(0x105, 0, 0, 100, 50, 0, 0, 1, 0).Should().Be(BadParameter, "outside RAM");
        Call(0x104, 0, 0, 100, 51, 1, 0).Should().Be(BadParameter);
        Call(0x102, 1, 0).Should().Be(Ok);
        Call(0x102, 1, 0).Should().Be(BadResource);
        Call(0x999).Should().Be(0x1200);
        _gpu.UsedBytes.Should().Be(0);
        _rig.Driver.Status.Should().Be(15);
    }

    [Fact]
    public void Fence_ComesBack()
    {
        byte[] request = new byte[40];
        request[0] = 1;
        request[1] = 1;
        request[4] = 1;
        request[8] = 0x77;
        byte[] reply = _rig.Call(0, request, 24);
        reply[4].Should().Be(1);
        reply[8].Should().Be(0x77);
    }

    [Fact]
    public void Cursor_IsGivenToViewers()
    {
        Call(0x101, 5, 1, 64, 64).Should().Be(Ok);
        Fill(64 * 64, _ => 0x80112233);
        Call(0x106, 5, 1, (uint)Backing, 0, 64 * 64 * 4, 0).Should().Be(Ok);
        Call(0x105, 0, 0, 64, 64, 0, 0, 5, 0).Should().Be(Ok);
        U32(Raw(24, 1, 0x300, 0, 10, 10, 0, 5, 3, 4, 0), 0).Should().Be(Ok);
        DisplayCursor cursor = _gpu.Cursor!;
        (cursor.HotX, cursor.HotY, cursor.Pixels[77]).Should().Be((3, 4, 0x80112233));
        Raw(24, 1, 0x300, 0, 0, 0, 0, 0, 0, 0, 0);
        _gpu.Cursor.Should().BeNull();
    }

    [Fact]
    public void Save_Load_KeepsThePicture()
    {
        Show(3, 40, 30);
        Fill(40 * 30, i => (uint)i);
        Call(0x105, 0, 0, 40, 30, 0, 0, 3, 0).Should().Be(Ok);
        _rig.Mmio.Pause();
        var other = new VirtioGpu(640, 480, 8 << 20);
        using var rig = new VirtioRig(other, _rig.Ram, resume: false);
        DeviceCheck.Copy(_rig.Mmio, rig.Mmio);
        DeviceCheck.StateOf(rig.Mmio).Should().Equal(DeviceCheck.StateOf(_rig.Mmio));
        rig.Mmio.Resume();
        other.Refresh(_frame);
        _frame.Pixels[1199].Should().Be(1199);
        other.UsedBytes.Should().Be(4800);
    }

    [Fact]
    public void Commands_Random_StayBounded()
    {
        var random = new Random(5);
        uint[] commands = [0x100, 0x101, 0x102, 0x103, 0x104, 0x105, 0x106, 0x107, 0x10A];
        for (int i = 0; i < 5000; i++)
        {
            var words = new List<uint>();
            int count = random.Next(14);
            for (int w = 0; w < count; w++)
            {
                words.Add(random.Next(5) == 0 ? (uint)random.Next() : (uint)random.Next(80));
            }

            Call(commands[random.Next(commands.Length)], words.ToArray());
            if (i % 50 == 0)
            {
                _gpu.Refresh(_frame);
            }
        }

        _gpu.UsedBytes.Should().BeLessThanOrEqualTo(8 << 20);
        _rig.Driver.Status.Should().Be(15);
    }

    private static uint U32(byte[] bytes, int at) => BitConverter.ToUInt32(bytes, at);

    private void Show(uint id, uint width, uint height)
    {
        Call(0x101, id, 1, width, height).Should().Be(Ok);
        Call(0x106, id, 1, (uint)Backing, 0, width * height * 4, 0).Should().Be(Ok);
        Call(0x103, 0, 0, width, height, 0, id).Should().Be(Ok);
    }

    private void Fill(int pixels, Func<int, uint> pixel)
    {
        for (int i = 0; i < pixels; i++)
        {
            _rig.Ram.WriteNumber(Backing + (ulong)(i * 4), 4, pixel(i));
        }
    }

    private uint Call(uint command, params uint[] words) => U32(Raw(24, 0, command, words), 0);

    private byte[] Raw(int replyBytes, int queue, uint command, params uint[] words)
    {
        byte[] request = new byte[24 + (words.Length * 4)];
        BitConverter.GetBytes(command).CopyTo(request, 0);
        for (int i = 0; i < words.Length; i++)
        {
            BitConverter.GetBytes(words[i]).CopyTo(request, 24 + (i * 4));
        }

        return _rig.Call(queue, request, replyBytes, 0x200000);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.InteropServices;
using FluentAssertions;
using Vmm.Core;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Memory.Tests;

public sealed class GuestMemoryTests
{
    private static RamBlock Block(string name, int pages) => new(name, new HeapBuffer(pages * 4096), (ulong)pages * 4096);

    [Fact]
    public void Read_AcrossTwoBlocks_JoinsThem()
    {
        var memory = new GuestMemory();
        using RamBlock low = Block("low", 1);
        using RamBlock high = Block("high", 1);
        memory.Map(0, low, 0, 4096);
        memory.Map(4096, high, 0, 4096);
        memory.TryWrite(4094, [1, 2, 3, 4]).Should().BeTrue();
        var bytes = new byte[4];
        memory.TryRead(4094, bytes).Should().BeTrue();
        bytes.Should().Equal(1, 2, 3, 4);
        low.GetFlags(0).Should().Be(PageFlags.Written);
        high.GetFlags(0).Should().Be(PageFlags.Written);
    }

    [Theory]
    [InlineData(8190UL, 4)]
    [InlineData(8192UL, 1)]
    [InlineData(ulong.MaxValue, 2)]
    [InlineData(ulong.MaxValue - 1, 4)]
    public void Access_OutsideRam_FailsWithoutThrowing(ulong address, int length)
    {
        var memory = new GuestMemory();
        using RamBlock block = Block("ram", 2);
        memory.Map(0, block, 0, 8192);
        memory.TryRead(address, new byte[length]).Should().BeFalse();
        memory.TryWrite(address, new byte[length]).Should().BeFalse();
    }

    [Fact]
    public void View_RomOverRam_SplitsAndJoins()
    {
        var memory = new GuestMemory();
        using RamBlock ram = Block("ram", 16);
        using RamBlock rom = Block("rom", 2);
        memory.Map(0, ram, 0, 16 * 4096);
        RamMapping shadow = memory.Map(4 * 4096, rom, 0, 2 * 4096, RamAccess.ReadOnly, priority: 1);
        memory.View.Should().HaveCount(3);
        memory.View[1].ReadOnly.Should().BeTrue();
        memory.TryWrite(4 * 4096, [1]).Should().BeFalse();
        memory.Unmap(shadow);
        memory.View.Should().ContainSingle().Which.LengthBytes.Should().Be(16 * 4096);
    }

    [Fact]
    public void View_Hole_HidesRam()
    {
        var memory = new GuestMemory();
        using RamBlock ram = Block("ram", 4);
        memory.Map(0, ram, 0, 4 * 4096);
        memory.MapHole(4096, 4096, 1);
        memory.TryRead(4096, new byte[1]).Should().BeFalse();
        memory.TryGetSlice(0, 9000, false, out GuestSlice slice).Should().BeTrue();
        slice.LengthBytes.Should().Be(4096);
    }

    [Fact]
    public void Write_ToCodePage_IsReported()
    {
        var memory = new GuestMemory();
        using RamBlock ram = Block("ram", 2);
        memory.Map(0x10000, ram, 0, 2 * 4096);
        ulong reported = 0;
        memory.SetCodeListener((address, _) => reported = address);
        memory.TryWrite(0x11000, [1]);
        reported.Should().Be(0);
        Marshal.WriteByte(ram.PageFlagsAddress + 1, (byte)PageFlags.Code);
        memory.TryWrite(0x11004, [1]);
        reported.Should().Be(0x11004);
        ram.GetFlags(1).Should().Be(PageFlags.Code | PageFlags.Written);
    }

    [Fact]
    public void TakeFlags_ClearsOnlyTheMask()
    {
        using RamBlock ram = Block("ram", 9);
        for (uint page = 0; page < 9; page++)
        {
            ram.MarkWritten(page * 4096, 1);
        }

        ram.TakeFlags(5, PageFlags.DirtyDisplay).Should().Be(PageFlags.DirtyDisplay);
        ram.GetFlags(5).Should().Be(PageFlags.DirtySnapshot);
        ram.GetFlags(4).Should().Be(PageFlags.Written);
        ram.GetFlags(6).Should().Be(PageFlags.Written);
        ram.TakeFlags(5, PageFlags.DirtyDisplay).Should().Be(PageFlags.None);
    }

    [Fact]
    public void Listener_SeesEveryNewView()
    {
        var memory = new GuestMemory();
        using RamBlock ram = Block("ram", 2);
        int calls = 0;
        memory.SetViewListener(_ => calls++);
        memory.Transaction(() =>
        {
            memory.Map(0, ram, 0, 4096);
            memory.Map(0x100000, ram, 4096, 4096);
        });
        calls.Should().Be(2);
        memory.View.Should().HaveCount(2);
    }
}

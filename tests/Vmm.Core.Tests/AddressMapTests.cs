// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using FluentAssertions;
using Xunit;

namespace Vmm.Core.Tests;

public sealed class AddressMapTests
{
    [Fact]
    public void Read_Unclaimed_FloatsHighAndCounts()
    {
        var map = new AddressMap("io", 0x10000);
        map.Read(0x80, AccessWidth.Word).Should().Be(0xFFFF);
        map.Read(0xFFFF, AccessWidth.Dword).Should().Be(0xFFFFFFFF);
        map.UnclaimedReads.Should().Be(2);
    }

    [Fact]
    public void Read_Straddling_SplitsIntoBytes()
    {
        var map = new AddressMap("io", 0x10000);
        map.Map(0x10, new Recorder(2, 0x11));
        map.Read(0x11, AccessWidth.Word).Should().Be(0xFF11);
    }

    [Fact]
    public void Map_Overlap_PriorityWins()
    {
        var map = new AddressMap("mmio", 0);
        map.Map(0x1000, new Recorder(0x1000, 0xAA));
        AddressMapping top = map.Map(0x1800, new Recorder(0x10, 0xBB), priority: 1);
        map.Read(0x17FF, AccessWidth.Byte).Should().Be(0xAA);
        map.Read(0x1800, AccessWidth.Byte).Should().Be(0xBB);
        map.Read(0x1810, AccessWidth.Byte).Should().Be(0xAA);
        map.Unmap(top);
        map.Read(0x1800, AccessWidth.Byte).Should().Be(0xAA);
    }

    [Fact]
    public void Write_PassesRelativeOffset()
    {
        var map = new AddressMap("mmio", 0);
        var recorder = new Recorder(0x100, 0);
        map.Map(0xFEC00000, recorder);
        map.Write(0xFEC00010, AccessWidth.Dword, 0x12345678);
        recorder.Writes.Should().Equal((0x10u, AccessWidth.Dword, 0x12345678UL));
    }

    [Fact]
    public void Map_OutsideLimit_IsRefused()
    {
        var map = new AddressMap("io", 0x10000);
        Action act = () => map.Map(0xFFFF, new Recorder(2, 0));
        act.Should().Throw<ArgumentOutOfRangeException>();
    }

    private sealed class Recorder(uint length, ulong value) : IRegisterWindow
    {
        public List<(uint Offset, AccessWidth Width, ulong Value)> Writes { get; } = [];

        public uint Length => length;

        public ulong Read(uint offset, AccessWidth width) => value;

        public void Write(uint offset, AccessWidth width, ulong value) => Writes.Add((offset, width, value));
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using FluentAssertions;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Host.Tests;

public sealed class HostMemoryTests
{
    [Theory]
    [InlineData(HostMemoryKind.Private)]
    [InlineData(HostMemoryKind.Shared)]
    [InlineData(HostMemoryKind.File)]
    public void Allocate_AnyKind_IsZeroedAndWritableToTheLastByte(HostMemoryKind kind)
    {
        using HostMemory memory = HostMemory.Allocate(8L << 20, kind);
        memory.Read<ulong>(0).Should().Be(0);
        memory.Write((8UL << 20) - 8, 0x1122334455667788UL);
        memory.Read<ulong>((8UL << 20) - 8).Should().Be(0x1122334455667788UL);
        memory.ByteLength.Should().Be(8UL << 20);
        (memory.File is not null).Should().Be(kind == HostMemoryKind.File);
    }

    [Fact]
    public void Allocate_LargeMemory_StartsOnAHugePageBorder()
    {
        using HostMemory memory = HostMemory.Allocate(4L << 20);
        (memory.Address % (2 << 20)).Should().Be(0);
    }

    [Fact]
    public void Allocate_AnyMemory_HasInaccessiblePagesOnBothSides()
    {
        using HostMemory memory = HostMemory.Allocate(4L << 20);
        string before = ProtectionAt(memory.Address - 1);
        string after = ProtectionAt(memory.Address + (4 << 20));
        before.Should().StartWith("---");
        after.Should().StartWith("---");
        ProtectionAt(memory.Address).Should().StartWith("rw-");
    }

    [Theory]
    [InlineData(0)]
    [InlineData(-4096)]
    [InlineData(4097)]
    public void Allocate_OddLength_IsRefused(long length)
    {
        Action act = () => HostMemory.Allocate(length);
        act.Should().Throw<ArgumentOutOfRangeException>();
    }

    [Fact]
    public void Allocate_MoreThanTheAddressSpace_ThrowsOneLine()
    {
        Action act = () => HostMemory.Allocate(1L << 60);
        act.Should().Throw<HostException>().Which.Message.Should().NotContain("\n").And.Contain("reserve");
    }

    [LinuxTheory]
    [InlineData(HostMemoryKind.Private)]
    [InlineData(HostMemoryKind.Shared)]
    [InlineData(HostMemoryKind.File)]
    public void TryDiscard_WrittenPage_ReadsAsZeroesOnLinux(HostMemoryKind kind)
    {
        using HostMemory memory = HostMemory.Allocate(1L << 20, kind, hugePages: false);
        memory.Write(4096, 0xFFUL);
        memory.Write(8192, 0xEEUL);
        memory.TryDiscard(4096, 4096).Should().BeTrue();
        memory.Read<ulong>(4096).Should().Be(0);
        memory.Read<ulong>(8192).Should().Be(0xEE);
    }

    [Fact]
    public void TryDiscard_OutsideTheMemory_IsRefused()
    {
        using HostMemory memory = HostMemory.Allocate(1L << 20);
        Action act = () => memory.TryDiscard(1L << 20, 4096);
        act.Should().Throw<ArgumentOutOfRangeException>();
    }

    // The line of /proc/self/maps that holds an address; a hole counts as inaccessible.
    private static string ProtectionAt(nint address)
    {
        foreach (string line in File.ReadLines("/proc/self/maps"))
        {
            string[] words = line.Split(' ');
            string[] range = words[0].Split('-');
            nint from = (nint)Convert.ToUInt64(range[0], 16);
            nint to = (nint)Convert.ToUInt64(range[1], 16);
            if (address >= from && address < to)
            {
                return words[1];
            }
        }

        return "hole";
    }
}

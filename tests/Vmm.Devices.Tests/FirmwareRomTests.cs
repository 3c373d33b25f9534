// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Vmm.Devices.Display;
using Vmm.Devices.Firmware;
using Vmm.Memory;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>82441FX §3.2.18 (PAM) through guest memory.</summary>
public sealed class FirmwareRomTests : IDisposable
{
    private readonly GuestMemory _memory = new();
    private readonly RamBlock _ram = HeapBuffer.MakeBlock("ram", 2 << 20);
    private readonly RamBlock _rom = HeapBuffer.MakeBlock("bios", 256 << 10);
    private readonly FirmwareRom _firmware;

    public FirmwareRomTests()
    {
        _memory.Map(0, _ram, 0, _ram.LengthBytes);
        _rom.TryWrite(0x2_0000, [0xE0], out _);
        _rom.TryWrite(0x3_FFF0, [0xEA], out _);
        _firmware = new FirmwareRom(_memory, _rom, _ram);
    }

    public void Dispose()
    {
        _ram.Dispose();
        _rom.Dispose();
    }

    private byte? Read(ulong address)
    {
        Span<byte> one = stackalloc byte[1];
        return _memory.TryRead(address, one) ? one[0] : null;
    }

    [Fact]
    public void Image_AtReset_IsBelow4GiBAndBelow1MiB()
    {
        Read(0xFFFF_FFF0).Should().Be(0xEA);
        Read(0xF_FFF0).Should().Be(0xEA);
        Read(0xE_0000).Should().Be(0xE0);
        Read(0xC_0000).Should().BeNull("nothing decodes the option ROM area");
        Read(0xB_FFFF).Should().Be(0);
        _memory.TryWrite(0xF_FFF0, [1]).Should().BeFalse();
    }

    [Fact]
    public void Pam_Settings_ChooseRamOrRom()
    {
        _firmware.Configure(0xF_0000, 0x1_0000, readRam: true, writeRam: true);
        Read(0xF_FFF0).Should().Be(0, "RAM");
        _memory.TryWrite(0xF_FFF0, [0x55]).Should().BeTrue();
        _firmware.Configure(0xF_0000, 0x1_0000, readRam: true, writeRam: false);
        Read(0xF_FFF0).Should().Be(0x55);
        _memory.TryWrite(0xF_FFF0, [0x66]).Should().BeFalse("the shadow is locked");
        Read(0xE_0000).Should().Be(0xE0, "other pieces stay");
        _firmware.Configure(0xF_0000, 0x1_0000, readRam: false, writeRam: false);
        Read(0xF_FFF0).Should().Be(0xEA);
        _firmware.Configure(0xC_4000, 0x4000, readRam: true, writeRam: true);
        Read(0xC_4000).Should().Be(0);
        Read(0xC_8000).Should().BeNull();
        _firmware.Configure(0x9_0000, 0x1_0000, readRam: false, writeRam: false);
        Read(0x9_0000).Should().Be(0, "outside the shadow area nothing happens");
    }

    [Fact]
    public void VideoMemory_FollowsItsBarAndLosesAgainstRam()
    {
        using RamBlock vram = HeapBuffer.MakeBlock("vram", 1 << 20);
        vram.TryWrite(0, [0x77], out _);
        var mapper = new VideoMemoryMapper(_memory, vram);
        mapper.Move(0xE000_0000);
        Read(0xE000_0000).Should().Be(0x77);
        mapper.Move(0x10_0000);
        Read(0xE000_0000).Should().BeNull();
        Read(0x10_0000).Should().Be(0, "RAM is in front");
        mapper.Move(null);
        mapper.Move(0xE100_0000);
        Read(0xE100_0000).Should().Be(0x77);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Firmware;
using Vmm.Devices.Legacy;
using Vmm.Memory;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>Intel 28F128J3 data sheet 290667 (flash); 6300ESB data sheet 300641 chapter 16 (watchdog).</summary>
public sealed class FlashAndWatchdogTests : IFlashStore
{
    private readonly RamBlock _block = HeapBuffer.MakeBlock("flash", 128 << 10);
    private readonly List<(long Offset, int Length)> _stored = [];
    private readonly List<bool> _modes = [];
    private readonly ManualClock _clock = new();
    private readonly PciBench _bench = new();

    void IFlashStore.Write(long offsetBytes, ReadOnlySpan<byte> content) => _stored.Add((offsetBytes, content.Length));

    private FlashChip MakeFlash(bool writable = true)
    {
        _block.TryWrite(0, new byte[] { 0xF0, 0x0F }, out _);
        var chip = new FlashChip("flash0", _block, writable ? this : null, _modes.Add);
        chip.Reset();
        return chip;
    }

    private static byte Read(FlashChip chip, uint at) => (byte)chip.Read(at, AccessWidth.Byte);

    private static void Write(FlashChip chip, uint at, byte value) => chip.Write(at, AccessWidth.Byte, value);

    [Fact]
    public void Flash_InArrayMode_ShowsItsContent()
    {
        FlashChip chip = MakeFlash();
        chip.Read(0, AccessWidth.Word).Should().Be(0x0FF0);
        chip.IsArrayMode.Should().BeTrue();
        Write(chip, 0, 0x70);
        chip.IsArrayMode.Should().BeFalse();
        Read(chip, 0).Should().Be(0x80);
        Write(chip, 0, 0x90);
        Read(chip, 0).Should().Be(0x89);
        Write(chip, 0, 0x98);
        Read(chip, 0x10).Should().Be((byte)'Q');
        Write(chip, 0, 0xFF);
        Read(chip, 0).Should().Be(0xF0);
        _modes.Should().Equal(false, true);
    }

    [Fact]
    public void Flash_Program_ClearsBitsAndErase_SetsThem()
    {
        FlashChip chip = MakeFlash();
        Write(chip, 0, 0x40);
        Write(chip, 0, 0x3C);
        Read(chip, 0).Should().Be(0x80);
        Write(chip, 0, 0xFF);
        Read(chip, 0).Should().Be(0x30);
        _stored.Should().Equal((0L, 4096));
        Write(chip, 4096, 0x20);
        Write(chip, 4096, 0xD0);
        Write(chip, 0, 0xFF);
        Read(chip, 4096).Should().Be(0xFF);
        Read(chip, 8191).Should().Be(0xFF);
        Read(chip, 0).Should().Be(0x30);
        Write(chip, 0, 0x20);
        Write(chip, 0, 0x11);
        Read(chip, 0).Should().Be(0xB0, "an erase that is not confirmed is a sequence error");
        Write(chip, 0, 0x50);
        Write(chip, 0, 0x70);
        Read(chip, 0).Should().Be(0);
    }

    [Fact]
    public void Flash_BufferedProgram_WritesItAll()
    {
        FlashChip chip = MakeFlash();
        Write(chip, 4096, 0x20);
        Write(chip, 4096, 0xD0);
        Write(chip, 4096, 0xE8);
        chip.Write(4096, AccessWidth.Byte, 3);
        for (uint i = 0; i < 4; i++)
        {
            Write(chip, 4098 + i, (byte)(0x10 + i));
        }

        Write(chip, 4096, 0xD0);
        Write(chip, 0, 0xFF);
        chip.Read(4098, AccessWidth.Dword).Should().Be(0x1312_1110);
        Read(chip, 4097).Should().Be(0xFF);
    }

    [Fact]
    public void Flash_WithoutStore_RefusesToChange()
    {
        FlashChip chip = MakeFlash(writable: false);
        Write(chip, 0, 0x40);
        Write(chip, 0, 0x00);
        Read(chip, 0).Should().Be(0x90);
        Write(chip, 0, 0xFF);
        Read(chip, 0).Should().Be(0xF0);
    }

    [Fact]
    public void Flash_SavedAndFuzzed_IsTheSameAndNeverThrows()
    {
        FlashChip chip = MakeFlash();
        DeviceCheck.Fuzz(chip, 1, 20000, random => Write(
            chip, (uint)random.Next(1 << 17), new byte[] { 0x20, 0xD0, 0xE8, 0x40, 0xFF, 0x03 }[random.Next(6)]));
        Write(chip, 0, 0xFF);
        Write(chip, 0, 0xFF);
        Write(chip, 0, 0x90);
        var copy = new FlashChip("flash0", _block, null, null);
        DeviceCheck.Copy(chip, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(chip));
    }

    private I6300Esb MakeWatchdog()
    {
        var card = new I6300Esb(_clock, _bench.System);
        _bench.Plug(card);
        card.Resume();
        return card;
    }

    private void Register(uint offset, uint value)
    {
        ulong bar = _bench.BarAddress(3, 0);
        _bench.Mmio.Write(bar + 12, AccessWidth.Byte, 0x80);
        _bench.Mmio.Write(bar + 12, AccessWidth.Byte, 0x86);
        _bench.Mmio.Write(bar + offset, AccessWidth.Dword, value);
    }

    [Fact]
    public void Watchdog_LeftAlone_InterruptsThenExpires()
    {
        MakeWatchdog();
        Register(0, 1000);
        Register(4, 2000);
        _bench.Write(3, 0x68, 2, AccessWidth.Byte);
        _clock.Advance(990_000_000);
        _bench.IsaLines[11].Level.Should().BeFalse();
        _clock.Advance(10_000_000);
        _bench.IsaLines[11].Level.Should().BeTrue();
        _bench.System.Requests.Should().BeEmpty();
        _clock.Advance(2_000_000_000);
        _bench.System.Requests.Should().Equal((SystemRequest.WatchdogExpired, "i6300esb"));
        _bench.Mmio.Read(_bench.BarAddress(3, 0) + 12, AccessWidth.Word).Should().Be(0x200);
    }

    [Fact]
    public void Watchdog_WhenFed_DoesNotExpire()
    {
        MakeWatchdog();
        Register(0, 1000);
        Register(4, 1000);
        _bench.Write(3, 0x68, 2, AccessWidth.Byte);
        for (int i = 0; i < 20; i++)
        {
            _clock.Advance(900_000_000);
            Register(12, 0x100);
        }

        _bench.System.Requests.Should().BeEmpty();
        _bench.Mmio.Write(_bench.BarAddress(3, 0) + 12, AccessWidth.Dword, 0x100);
        _clock.Advance(3_000_000_000);
        _bench.System.Requests.Should().HaveCount(1, "feeding without unlocking does not count");
    }

    [Fact]
    public void Watchdog_LockBit_CannotBeTakenBack()
    {
        I6300Esb card = MakeWatchdog();
        _bench.Write(3, 0x68, 3, AccessWidth.Byte);
        _bench.Write(3, 0x68, 0, AccessWidth.Byte);
        _bench.Read(3, 0x68, AccessWidth.Byte).Should().Be(3);
        card.IsEnabled.Should().BeTrue();
        _bench.Read(3, 0x00).Should().Be(0x25AB_8086);
        var copy = new I6300Esb(_clock, _bench.System);
        DeviceCheck.Copy(card, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(card));
    }

    [Fact]
    public void PcTestDevice_DrivesLinesAndEchoes()
    {
        FakeIrqLine[] lines = FakeIrqLine.Many(24);
        var device = new PcTestDevice(lines);
        device.Write(14, AccessWidth.Byte, 1);
        lines[14].Level.Should().BeTrue();
        device.Write(14, AccessWidth.Byte, 0);
        lines[14].Level.Should().BeFalse();
        device.EchoPage.Write(8, AccessWidth.Qword, 0x1122_3344_5566_7788);
        device.EchoPage.Read(12, AccessWidth.Dword).Should().Be(0x1122_3344);
        device.EchoPorts.Write(0, AccessWidth.Dword, 5);
        device.EchoPorts.Read(0, AccessWidth.Byte).Should().Be(5);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Legacy;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>Intel 8237A-5 data sheet (231466) as a PC wires two of them; transfers beside the floppy controller's tests.</summary>
public sealed class I8237Tests
{
    private readonly TestRam _ram = new(1 << 18);
    private readonly I8237 _dma;

    public I8237Tests() => _dma = new I8237(_ram);

    private byte First(uint register) => (byte)_dma.First.Read(register, AccessWidth.Byte);

    private void First(uint register, byte value) => _dma.First.Write(register, AccessWidth.Byte, value);

    private byte Second(uint register) => (byte)_dma.Second.Read(register * 2, AccessWidth.Byte);

    private void Second(uint register, byte value) => _dma.Second.Write(register * 2, AccessWidth.Byte, value);

    // "Reset": command, status, request, temporary and the flip-flop are cleared, the mask is set.
    [Fact]
    public void Registers_AfterReset_AreClearedAndMasked()
    {
        _dma.Reset();
        First(8).Should().Be(0);
        Second(8).Should().Be(0);
        First(15).Should().Be(0xFF);
        Second(15).Should().Be(0xFF);
        _dma[0].ToMemory([1], out bool done).Should().Be(0);
        done.Should().BeFalse();
        for (uint port = 0; port < 15; port++)
        {
            _dma.Pages.Read(port, AccessWidth.Byte).Should().Be(0);
        }
    }

    // "Base address and base word count": both halves through the flip-flop, which "clear first/last" resets.
    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void AddressAndCount_OfEachChannel_TakeLowThenHigh(uint channel)
    {
        First(12, 0);
        First(channel * 2, 0x34);
        First(channel * 2, 0x12);
        First((channel * 2) + 1, 0x78);
        First((channel * 2) + 1, 0x56);
        First(channel * 2).Should().Be(0x34);
        First(channel * 2).Should().Be(0x12);
        First((channel * 2) + 1).Should().Be(0x78);
        First(12, 0xFF);
        First((channel * 2) + 1).Should().Be(0x78, "the flip-flop was cleared in between");
        First((channel * 2) + 1).Should().Be(0x56);
        Second(12, 0);
        Second(channel * 2, 0x9A);
        Second(channel * 2).Should().Be(0, "the high half; each controller has its own flip-flop");
        Second(channel * 2).Should().Be(0x9A);
    }

    [Fact]
    public void Masks_SingleAllAndClear_AreSeenInTheMaskRegister()
    {
        First(14, 0);
        First(15).Should().Be(0xF0);
        First(10, 0x06);
        First(15).Should().Be(0xF4);
        First(10, 0x02);
        First(15).Should().Be(0xF0);
        First(15, 0xA5);
        First(15).Should().Be(0xF5, "four bits");
        First(13, 0);
        First(15).Should().Be(0xFF, "master clear masks all");
    }

    // "Mode register", bits 3..2: verify moves nothing, and a direction that the device does not need refuses.
    [Theory]
    [InlineData(0x40, 4, 4, false)]
    [InlineData(0x44, 4, 0, true)]
    [InlineData(0x48, 0, 4, false)]
    [InlineData(0x4C, 0, 0, false)]
    public void TransferType_DecidesWhatMoves(byte mode, int toMemory, int fromMemory, bool changesMemory)
    {
        Program(mode, 0x2000, 0x0FFF);
        _dma[1].ToMemory([1, 2, 3, 4], out _).Should().Be(toMemory);
        (_ram.Bytes[0x2000] == 1).Should().Be(changesMemory);
        _dma[1].FromMemory(new byte[4], out _).Should().Be(fromMemory);
    }

    [Fact]
    public void Status_AtTerminalCount_IsSetUntilRead()
    {
        Program(0x44, 0x100, 1);
        _dma[1].ToMemory([1], out bool done).Should().Be(1);
        done.Should().BeFalse();
        First(8).Should().Be(0);
        _dma[1].ToMemory([2, 3], out done).Should().Be(1);
        done.Should().BeTrue();
        First(8).Should().Be(0x02);
        First(8).Should().Be(0);
        First(12, 0);
        First(3).Should().Be(0xFF, "the count has passed zero");
        First(3).Should().Be(0xFF);
    }

    // A request that meets a mask or the disabled controller shows in the status and is told of when that ends.
    [Fact]
    public void Request_WhileMaskedOrDisabled_IsToldOfAfterwards()
    {
        int calls = 0;
        _dma[1].Unmasked = () => calls++;
        Program(0x44, 0x100, 10);
        First(10, 0x05);
        _dma[1].ToMemory([1], out _).Should().Be(0);
        First(8).Should().Be(0x20);
        First(10, 0x02);
        calls.Should().Be(0, "another channel");
        First(10, 0x01);
        calls.Should().Be(1);
        First(8, 0x04);
        _dma[1].ToMemory([1], out _).Should().Be(0);
        First(8, 0x00);
        calls.Should().Be(2);
        _dma[1].ToMemory([1], out _).Should().Be(1);
    }

    // IBM PC/AT Technical Reference, "DMA page registers".
    [Theory]
    [InlineData(0, 0x87)]
    [InlineData(1, 0x83)]
    [InlineData(2, 0x81)]
    [InlineData(3, 0x82)]
    public void PageRegister_OfEachChannel_IsTheUpperAddress(int channel, uint port)
    {
        First(12, 0);
        First(11, (byte)(0x44 | channel));
        First(((uint)channel * 2) + 0, 0x08);
        First(((uint)channel * 2) + 0, 0x00);
        First(((uint)channel * 2) + 1, 0x00);
        First(((uint)channel * 2) + 1, 0x00);
        _dma.Pages.Write(port - 0x81, AccessWidth.Byte, 2);
        First(10, (byte)channel);
        _dma[channel].ToMemory([0x5A], out _).Should().Be(1);
        _ram.Bytes[0x2_0008].Should().Be(0x5A);
        _dma.Pages.Read(port - 0x81, AccessWidth.Byte).Should().Be(2);
    }

    [Fact]
    public void Transfer_OutsideMemory_ReadsOnesAndWritesNothing()
    {
        Program(0x48, 0, 3);
        _dma.Pages.Write(0x83 - 0x81, AccessWidth.Byte, 0xFF);
        byte[] got = new byte[4];
        _dma[1].FromMemory(got, out _).Should().Be(4);
        got.Should().AllBeEquivalentTo(0xFF);
        Program(0x44, 0, 3);
        _dma.Pages.Write(0x83 - 0x81, AccessWidth.Byte, 0xFF);
        _dma[1].ToMemory([1, 2, 3, 4], out bool done).Should().Be(4);
        done.Should().BeTrue();
    }

    [Fact]
    public void State_SavedAndLoaded_IsTheSameAndNeverThrows()
    {
        Program(0x44, 0x1234, 0x77);
        _dma[1].ToMemory([1, 2], out _);
        First(0, 0x11);
        Second(8, 4);
        var copy = new I8237(_ram);
        DeviceCheck.Copy(_dma, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(_dma));
        copy[1].ToMemory([7], out _).Should().Be(1);
        _ram.Bytes[0x1236].Should().Be(7, "it goes on where the other one was");
        byte[] buffer = new byte[300];
        DeviceCheck.Fuzz(copy.First, 1, 20000, random =>
        {
            int channel = random.Next(4) + (random.Next(2) * 4);
            _ = random.Next(2) == 0 ? copy[channel].ToMemory(buffer.AsSpan(0, random.Next(300)), out _)
                : copy[channel].FromMemory(buffer.AsSpan(0, random.Next(300)), out _);
        });
        DeviceCheck.Fuzz(copy.Second, 2, 5000);
        DeviceCheck.Fuzz(copy.Pages, 3, 5000);
    }

    // Channel 1.
    private void Program(byte mode, ushort address, ushort count)
    {
        First(12, 0);
        First(11, (byte)(mode | 1));
        First(2, (byte)address);
        First(2, (byte)(address >> 8));
        First(3, (byte)count);
        First(3, (byte)(count >> 8));
        First(10, 0x01);
    }
}

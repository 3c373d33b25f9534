// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Globalization;
using System.Linq;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Display;
using Vmm.Devices.Pci;
using Vmm.Memory;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>IBM VGA/XGA Technical Reference; QEMU docs/specs/standard-vga for DISPI and BAR 2.</summary>
public sealed class VgaTests : IDisposable
{
    private const string TextMode =
        "67|03 00 03 00 02|5F 4F 50 82 55 81 BF 1F 00 4F 0D 0E 00 00 00 00 9C 8E 8F 28 1F 96 B9 A3 FF|" +
        "00 00 00 00 00 10 0E 00 FF|00 01 02 03 04 05 14 07 38 39 3A 3B 3C 3D 3E 3F 0C 00 0F 08 00";

    private const string Mode4 =
        "63|03 09 03 00 02|2D 27 28 90 2B 80 BF 1F 00 C1 00 00 00 00 00 00 9C 8E 8F 14 00 96 B9 A2 FF|" +
        "00 00 00 00 00 30 0F 00 FF|00 13 15 17 02 04 06 07 10 11 12 13 14 15 16 17 01 00 03 00 00";

    private const string Mode12 =
        "E3|03 01 0F 00 06|5F 4F 50 82 54 80 0B 3E 00 40 00 00 00 00 00 00 EA 8C DF 28 00 E7 04 E3 FF|" +
        "00 00 00 00 00 00 05 0F FF|00 01 02 03 04 05 14 07 38 39 3A 3B 3C 3D 3E 3F 01 00 0F 00 00";

    private const string Mode13 =
        "63|03 01 0F 00 0E|5F 4F 50 82 54 80 BF 1F 00 41 00 00 00 00 00 00 9C 0E 8F 28 40 96 B9 A3 FF|" +
        "00 00 00 00 00 40 05 0F FF|00 01 02 03 04 05 06 07 08 09 0A 0B 0C 0D 0E 0F 41 00 0F 00 00";

    private readonly ManualClock _clock = new();
    private readonly PciBench _bench = new();
    private readonly RamBlock _vram = HeapBuffer.MakeBlock("vram", 16 << 20);
    private readonly Mapper _mapper = new();
    private readonly DisplayFrame _frame = new();
    private readonly Vga _vga;

    public VgaTests()
    {
        _vga = new Vga(_clock, _vram, _mapper, new byte[] { 0x55, 0xAA, 0 });
        _bench.Plug(_vga, 2);
    }

    public void Dispose() => _vram.Dispose();

    private void Out(uint port, byte value) => _vga.Ports.Write(port - Vga.Port, AccessWidth.Byte, value);

    private byte In(uint port) => (byte)_vga.Ports.Read(port - Vga.Port, AccessWidth.Byte);

    private void Indexed(uint port, byte index, byte value) =>
        _vga.Ports.Write(port - Vga.Port, AccessWidth.Word, (ulong)(index | (value << 8)));

    private byte Indexed(uint port, byte index)
    {
        Out(port, index);
        return In(port + 1);
    }

    private void Poke(uint address, byte value) =>
        _vga.LegacyMemory.Write(address - 0xA0000, AccessWidth.Byte, value);

    private byte Peek(uint address) => (byte)_vga.LegacyMemory.Read(address - 0xA0000, AccessWidth.Byte);

    private void Dispi(ushort index, ushort value)
    {
        _vga.DispiPorts.Write(0, AccessWidth.Word, index);
        _vga.DispiPorts.Write(1, AccessWidth.Word, value);
    }

    private ushort Dispi(ushort index)
    {
        _vga.DispiPorts.Write(0, AccessWidth.Word, index);
        return (ushort)_vga.DispiPorts.Read(1, AccessWidth.Word);
    }

    private static byte[] Hex(string text) =>
        text.Split(' ').Select(b => byte.Parse(b, NumberStyles.HexNumber, CultureInfo.InvariantCulture)).ToArray();

    private void SetMode(string mode)
    {
        byte[][] parts = mode.Split('|').Select(Hex).ToArray();
        Out(0x3C2, parts[0][0]);
        for (int i = 0; i < 5; i++)
        {
            Indexed(0x3C4, (byte)i, parts[1][i]);
        }

        Indexed(0x3D4, 0x11, 0);
        for (int i = 0; i < 25; i++)
        {
            Indexed(0x3D4, (byte)i, parts[2][i]);
        }

        for (int i = 0; i < 9; i++)
        {
            Indexed(0x3CE, (byte)i, parts[3][i]);
        }

        In(0x3DA);
        for (int i = 0; i < 21; i++)
        {
            Out(0x3C0, (byte)i);
            Out(0x3C0, parts[4][i]);
        }

        Out(0x3C0, 0x20);

        // A palette that tells its index: red = index, green = 63 - index, blue = index / 4.
        Out(0x3C8, 0);
        for (int i = 0; i < 256; i++)
        {
            Out(0x3C9, (byte)(i & 63));
            Out(0x3C9, (byte)(63 - (i & 63)));
            Out(0x3C9, (byte)(i >> 2));
        }
    }

    private static uint Color(int index)
    {
        static uint Widen(int value) => (uint)((value << 2) | (value >> 4));
        return (Widen(index & 63) << 16) | (Widen(63 - (index & 63)) << 8) | Widen(index >> 2);
    }

    private uint Pixel(int x, int y) => _frame.Pixels[(y * _frame.Width) + x];

    [Theory]
    [InlineData(0x3C4, new byte[] { 0x03, 0x3D, 0x0F, 0x3F, 0x0E })]
    [InlineData(0x3CE, new byte[] { 0x0F, 0x0F, 0x0F, 0x1F, 0x03, 0x7B, 0x0F, 0x0F, 0xFF })]
    public void IndexedRegisters_AfterWritingOnes_KeepTheirMask(uint port, byte[] masks)
    {
        for (byte i = 0; i < masks.Length; i++)
        {
            Indexed(port, i).Should().Be(0);
            Indexed(port, i, 0xFF);
            Indexed(port, i).Should().Be(masks[i]);
        }
    }

    [Fact]
    public void Crtc_Protection_CoversRegisters0To7ButLineCompare()
    {
        Out(0x3C2, 1);
        Indexed(0x3D4, 7, 0x00);
        Indexed(0x3D4, 0x11, 0x80);
        Indexed(0x3D4, 0, 0x55);
        Indexed(0x3D4, 7, 0xFF);
        Indexed(0x3D4, 0).Should().Be(0);
        Indexed(0x3D4, 7).Should().Be(0x10);
        Indexed(0x3D4, 0x13, 0x55);
        Indexed(0x3D4, 0x13).Should().Be(0x55);
        In(0x3B5).Should().Be(0xFF, "the monochrome ports are off");
    }

    [Fact]
    public void Attribute_FlipFlop_AlternatesAndStatusResetsIt()
    {
        Out(0x3C2, 1);
        In(0x3DA);
        Out(0x3C0, 0x03);
        Out(0x3C0, 0x15);
        Out(0x3C0, 0x03);
        In(0x3C1).Should().Be(0x15);
        In(0x3DA);
        Out(0x3C0, 0x23);
        Out(0x3C0, 0x01);
        Out(0x3C0, 0x03);
        In(0x3C1).Should().Be(0x15, "the palette is locked while the screen is on");
    }

    [Fact]
    public void Dac_ReadsBackWhatWasWritten()
    {
        Out(0x3C8, 0x10);
        foreach (byte value in new byte[] { 1, 2, 3, 0xFF, 5, 6 })
        {
            Out(0x3C9, value);
        }

        Out(0x3C7, 0x10);
        In(0x3C7).Should().Be(3);
        new[] { In(0x3C9), In(0x3C9), In(0x3C9), In(0x3C9) }.Should().Equal(1, 2, 3, 0x3F);
    }

    [Fact]
    public void Status1_Retrace_ComesAndGoes()
    {
        Out(0x3C2, 1);
        bool seen = false;
        bool gone = false;
        for (int i = 0; i < 449; i++)
        {
            _clock.Advance(31_778);
            seen |= (In(0x3DA) & 8) != 0;
            gone |= (In(0x3DA) & 9) == 0;
        }

        seen.Should().BeTrue();
        gone.Should().BeTrue();
    }

    [Fact]
    public void TextMode_ShowsFontColorsAndCursor()
    {
        SetMode(TextMode);

        // The font: 'A' is a vertical bar in columns 0 and 7, loaded as a BIOS does, through plane 2.
        Indexed(0x3C4, 2, 4);
        Indexed(0x3C4, 4, 6);
        Indexed(0x3CE, 5, 0);
        Indexed(0x3CE, 6, 4);
        for (uint line = 0; line < 16; line++)
        {
            Poke(0xA0000 + ('A' * 32) + line, 0x81);
            Poke(0xA0000 + (0xC4 * 32) + line, 0x01);
        }

        Indexed(0x3C4, 2, 3);
        Indexed(0x3C4, 4, 2);
        Indexed(0x3CE, 5, 0x10);
        Indexed(0x3CE, 6, 0x0E);
        Poke(0xB8000, (byte)'A');
        Poke(0xB8001, 0x1E);
        Poke(0xB8002, 0xC4);
        Poke(0xB8003, 0x07);
        Poke(0xB8004, (byte)'A');
        Poke(0xB8005, 0x07);
        Peek(0xB8000).Should().Be((byte)'A');
        Peek(0xB8003).Should().Be(0x07);
        Indexed(0x3D4, 0x0F, 3);

        _vga.Refresh(_frame);
        (_frame.Width, _frame.Height).Should().Be((720, 400));
        Pixel(0, 0).Should().Be(Color(0x3E), "yellow through palette register 14");
        Pixel(1, 0).Should().Be(Color(1));
        Pixel(7, 15).Should().Be(Color(0x3E));
        Pixel(8, 0).Should().Be(Color(1), "the ninth dot is background");
        Pixel(9 + 7, 0).Should().Be(Color(7));
        Pixel(9 + 8, 0).Should().Be(Color(7), "line graphics repeat the eighth dot");
        Pixel(27, 12).Should().Be(Color(0), "above the cursor");
        Pixel(27, 13).Should().Be(Color(0), "attribute 0 draws the cursor in black");

        TextScreen text = _vga.ReadText()!;
        (text.Columns, text.Rows, text.CursorColumn, text.CursorRow).Should().Be((80, 25, 3, 0));
        text.ToLines()[0].Should().Be("A─A");

        Poke(0xB8007, 0x07);
        _vga.Refresh(_frame);
        Pixel(27, 13).Should().Be(Color(7));
        Pixel(27, 12).Should().Be(Color(0));
        _frame.Changes.Should().Equal(new DisplayRectangle(0, 0, 64, 16));
        _vga.Refresh(_frame);
        _frame.Changes.Should().BeEmpty();
    }

    [Fact]
    public void Mode13_ShowsBytesAsDoubledPixels()
    {
        SetMode(Mode13);
        Poke(0xA0000, 0x11);
        Poke(0xA0001, 0x92);
        Poke(0xA0000 + (320 * 199) + 319, 0x33);
        _vga.Refresh(_frame);
        (_frame.Width, _frame.Height).Should().Be((640, 400));
        Pixel(0, 0).Should().Be(Color(0x11));
        Pixel(1, 1).Should().Be(Color(0x11));
        Pixel(2, 0).Should().Be(Color(0x92));
        Pixel(639, 399).Should().Be(Color(0x33));
        _vga.ReadText().Should().BeNull();
    }

    [Fact]
    public void ModeX_WritesPlanesByMapMask()
    {
        SetMode(Mode13);
        Indexed(0x3C4, 4, 0x06);
        Indexed(0x3D4, 0x14, 0x00);
        Indexed(0x3D4, 0x17, 0xE3);
        Indexed(0x3C4, 2, 0x04);
        Poke(0xA0000, 0x21);
        Indexed(0x3C4, 2, 0x0F);
        Poke(0xA0050, 0x22);
        _vga.Refresh(_frame);
        Pixel(4, 0).Should().Be(Color(0x21), "plane 2 is the third pixel");
        Pixel(2, 0).Should().Be(Color(0));
        Pixel(0, 2).Should().Be(Color(0x22), "80 addresses make a line");
        Indexed(0x3D4, 0x0D, 0x50);
        _vga.Refresh(_frame);
        Pixel(0, 0).Should().Be(Color(0x22), "start address");
    }

    [Fact]
    public void SplitScreen_BelowLineCompare_StartsAtZero()
    {
        SetMode(Mode13);
        Poke(0xA0000, 0x44);
        Indexed(0x3D4, 0x0C, 0x20);
        Indexed(0x3D4, 0x18, 199);
        Indexed(0x3D4, 0x07, 0x0F);
        Indexed(0x3D4, 0x09, 0x01);
        _vga.Refresh(_frame);
        Pixel(0, 0).Should().Be(Color(0));
        Pixel(0, 199).Should().Be(Color(0));
        Pixel(0, 200).Should().Be(Color(0x44));
    }

    [Fact]
    public void Mode12_WriteModes_DoWhatTheReferenceSays()
    {
        SetMode(Mode12);

        // Write mode 0 with set/reset on all planes, bit mask 0xF0.
        Indexed(0x3CE, 0, 0x0A);
        Indexed(0x3CE, 1, 0x0F);
        Indexed(0x3CE, 8, 0xF0);
        Peek(0xA0000);
        Poke(0xA0000, 0xFF);
        _vga.Refresh(_frame);
        (_frame.Width, _frame.Height).Should().Be((640, 480));
        Pixel(3, 0).Should().Be(Color(0x3A));
        Pixel(4, 0).Should().Be(Color(0));

        // Write mode 2: the low bits are a color.
        Indexed(0x3CE, 5, 2);
        Indexed(0x3CE, 8, 0x0F);
        Peek(0xA0000);
        Poke(0xA0000, 0x05);
        _vga.Refresh(_frame);
        Pixel(3, 0).Should().Be(Color(0x3A), "the latch keeps the other bits");
        Pixel(4, 0).Should().Be(Color(0x05));

        // Write mode 1 copies latches.
        Indexed(0x3CE, 5, 1);
        Peek(0xA0000);
        Poke(0xA0001, 0x00);
        _vga.Refresh(_frame);
        Pixel(8, 0).Should().Be(Color(0x3A));
        Pixel(12, 0).Should().Be(Color(0x05));

        // Write mode 3: data and bit mask select, set/reset gives the color.
        Indexed(0x3CE, 5, 3);
        Indexed(0x3CE, 8, 0xFF);
        Peek(0xA0002);
        Poke(0xA0002, 0x81);
        _vga.Refresh(_frame);
        Pixel(16, 0).Should().Be(Color(0x3A));
        Pixel(17, 0).Should().Be(Color(0));
        Pixel(23, 0).Should().Be(Color(0x3A));

        // Logic XOR and rotate in mode 0.
        Indexed(0x3CE, 5, 0);
        Indexed(0x3CE, 1, 0);
        Indexed(0x3CE, 3, 0x18 | 4);
        Peek(0xA0002);
        Poke(0xA0002, 0x08);
        _vga.Refresh(_frame);
        Pixel(16, 0).Should().Be(Color(5), "0xA xor 0xF in the rotated bit");

        // Read mode 1 compares colors.
        Indexed(0x3CE, 5, 8);
        Indexed(0x3CE, 2, 0x0A);
        Indexed(0x3CE, 7, 0x0F);
        Peek(0xA0000).Should().Be(0xF0);
    }

    [Fact]
    public void Mode4_HasTwoBanksOfFourColors()
    {
        SetMode(Mode4);
        Poke(0xB8000, 0x1B);
        Poke(0xBA000, 0xFF);
        _vga.Refresh(_frame);
        (_frame.Width, _frame.Height).Should().Be((640, 400));
        Pixel(0, 0).Should().Be(Color(0));
        Pixel(2, 0).Should().Be(Color(0x13));
        Pixel(4, 1).Should().Be(Color(0x15));
        Pixel(6, 0).Should().Be(Color(0x17));
        Pixel(0, 2).Should().Be(Color(0x17), "the second scan line is in the second bank");
        Peek(0xBA000).Should().Be(0xFF);
    }

    [Theory]
    [InlineData(32, 0x00112233u, 0x112233u)]
    [InlineData(24, 0x00112233u, 0x112233u)]
    [InlineData(16, 0xF81Fu, 0xFF00FFu)]
    [InlineData(15, 0x7C1Fu, 0xFF00FFu)]
    public void LinearFrameBuffer_ShowsItsFormat(int bits, uint raw, uint expected)
    {
        Dispi(4, 0);
        Dispi(1, 800);
        Dispi(2, 600);
        Dispi(3, (ushort)bits);
        Dispi(4, 0x41);
        Span<byte> bytes = stackalloc byte[4];
        System.Buffers.Binary.BinaryPrimitives.WriteUInt32LittleEndian(bytes, raw);
        int size = (bits + 7) / 8;
        _vram.TryWrite((ulong)(((800 * 599) + 799) * size), bytes[..size], out _);
        _vga.Refresh(_frame);
        (_frame.Width, _frame.Height).Should().Be((800, 600));
        Pixel(799, 599).Should().Be(expected);
        _vram.TryWrite(0, bytes[..size], out _);
        _vga.Refresh(_frame);
        _frame.Changes.Should().Equal(new DisplayRectangle(0, 0, 64, 16));
        Pixel(0, 0).Should().Be(expected);
    }

    [Fact]
    public void Dispi_At2560x1600_PansInsideAVirtualScreen()
    {
        Dispi(0).Should().Be(0xB0C5);
        Dispi(10).Should().Be(256);
        Dispi(4, 2);
        Dispi(1).Should().Be(2560);
        Dispi(2).Should().Be(1600);
        Dispi(3).Should().Be(32);
        Dispi(4, 0);
        Dispi(1, 2560);
        Dispi(2, 1600);
        Dispi(3, 8);
        Dispi(4, 0x41);
        Dispi(6, 3000);
        Dispi(8, 8);
        Dispi(9, 100);
        Dispi(7).Should().Be((16 << 20) / 3000);
        _vram.TryWrite((100 * 3000) + 8, [0x21], out _);
        Out(0x3C8, 0x21);
        Out(0x3C9, 63);
        Out(0x3C9, 0);
        Out(0x3C9, 0);
        _vga.Refresh(_frame);
        (_frame.Width, _frame.Height).Should().Be((2560, 1600));
        Pixel(0, 0).Should().Be(0xFF0000);
    }

    [Fact]
    public void Dispi_WithBanks_ReachesAllMemoryThroughTheLegacyWindow()
    {
        Out(0x3C2, 0x63);
        Dispi(1, 1024);
        Dispi(2, 768);
        Dispi(3, 8);
        Dispi(4, 1);
        Dispi(5, 3);
        Poke(0xA0010, 0x77);
        Span<byte> one = stackalloc byte[1];
        _vram.TryRead((3 << 16) + 0x10, one);
        one[0].Should().Be(0x77);
        Peek(0xA0010).Should().Be(0x77);
        Dispi(5, 0xFFFF);
        Dispi(5).Should().Be(255);
    }

    [Fact]
    public void Dispi_Enable_ClearsUnlessToldNotTo()
    {
        _vram.TryWrite(0, [1, 2, 3], out _);
        Dispi(4, 0xC1);
        Span<byte> three = stackalloc byte[3];
        _vram.TryRead(0, three);
        three[0].Should().Be(1);
        Dispi(4, 0);
        Dispi(4, 0x41);
        _vram.TryRead(0, three);
        three[0].Should().Be(0);
    }

    [Fact]
    public void Bar2_MirrorsPortsAndDispi()
    {
        ulong bar = _bench.BarAddress(2, 2);
        _bench.Mmio.Read(bar + 0x500, AccessWidth.Word).Should().Be(0xB0C5);
        _bench.Mmio.Write(bar + 0x502, AccessWidth.Word, 1280);
        Dispi(1).Should().Be(1280);
        _bench.Mmio.Write(bar + 0x404, AccessWidth.Word, 0x0F02);
        Indexed(0x3C4, 2).Should().Be(0x0F);
        _mapper.Place.Should().Be(_bench.BarAddress(2, 0));
        _bench.Read(2, 0x08).Should().Be(0x0300_0002);
    }

    [Fact]
    public void TwoViewers_AtDifferentRates_EachSeeAllChanges()
    {
        Dispi(3, 32);
        Dispi(4, 0x41);
        var slow = new DisplayFrame();
        _vga.Refresh(slow);
        _vga.Refresh(_frame);
        _vram.TryWrite(0, [1, 0, 0, 0], out _);
        _vga.Refresh(_frame);
        _vram.TryWrite(640 * 4 * 100, [2, 0, 0, 0], out _);
        _vga.Refresh(_frame);
        _frame.Changes.Should().ContainSingle();
        _vga.Refresh(slow);
        slow.Changes.Should().HaveCount(2);
        slow.Pixels.Should().Equal(_frame.Pixels);
    }

    [Fact]
    public void State_SavedAndLoaded_ShowsTheSame()
    {
        SetMode(Mode13);
        Poke(0xA0005, 0x42);
        _vga.Refresh(_frame);
        var bench = new PciBench();
        var copy = new Vga(_clock, _vram, new Mapper(), new byte[] { 0x55, 0xAA, 0 });
        bench.Bus.Attach(copy, 2);
        copy.Reset();
        DeviceCheck.Copy(_vga, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(_vga));
        var frame = new DisplayFrame();
        copy.Refresh(frame);
        frame.Pixels.Should().Equal(_frame.Pixels);
    }

    [Fact]
    public void Everything_UnderRandomAccess_NeverThrows()
    {
        var random = new Random(11);
        for (int i = 0; i < 400; i++)
        {
            if (i % 4 == 0)
            {
                SetMode(new[] { TextMode, Mode4, Mode12, Mode13 }[random.Next(4)]);
            }

            DeviceCheck.Fuzz(_vga.Ports, i, 60);
            DeviceCheck.Fuzz(_vga.LegacyMemory, i, 60);
            for (int n = 0; n < 4; n++)
            {
                Dispi((ushort)random.Next(12), (ushort)random.Next(0x10000));
            }

            if (random.Next(3) == 0)
            {
                Dispi(3, (ushort)(new[] { 4, 8, 15, 16, 24, 32 })[random.Next(6)]);
                Dispi(1, (ushort)(random.Next(40) * 8));
                Dispi(2, (ushort)random.Next(300));
                Dispi(4, (ushort)random.Next(0x100));
            }

            _vga.Refresh(_frame);
            _vga.ReadText();
        }
    }

    private sealed class Mapper : IRamBarMapper
    {
        public ulong? Place { get; private set; }

        public void Move(ulong? guestAddress) => Place = guestAddress;
    }
}

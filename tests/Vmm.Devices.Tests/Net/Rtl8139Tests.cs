// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Net;
using Vmm.Devices.Pci;
using Vmm.Devices.Tests.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Net;

public sealed class Rtl8139Tests : IDisposable
{
    private const ushort Io = 0xC000;
    private const uint Ring = 0x10000, TxData = 0x40000;

    private static readonly byte[] s_mac = [0x52, 0x54, 0, 1, 2, 3];

    private readonly TestRam _ram = new(1 << 20);
    private readonly AddressMap _ports = new("io", 0x10000);
    private readonly Router _router = new();
    private readonly FakeNetBackend _net = new() { CanOffload = false };
    private readonly Rtl8139 _card;

    public Rtl8139Tests() => _card = Make(_net, _ports, _router);

    public void Dispose() => _card.Dispose();

    [Fact]
    public void Reset_ShowsMacAndChip()
    {
        _card.ReadConfig(0, AccessWidth.Dword).Should().Be(0x8139_10EC);
        for (ushort i = 0; i < 6; i++)
        {
            Read8(i).Should().Be(s_mac[i]);
        }

        (Read32(0x40) & 0x7CC0_0000).Should().Be(0x7400_0000, "RTL8139C");
        (Read8(0x37) & 1).Should().Be(1, "the buffer is empty");
        (Read8(0x58) & 4).Should().Be(0, "the link is up");
    }

    [Fact]
    public void Eeprom_HoldsTheMac()
    {
        Eeprom(0).Should().Be(0x8129);
        Eeprom(7).Should().Be(0x5452);
        Eeprom(9).Should().Be(0x0302);
    }

    [Fact]
    public void Transmit_FourDescriptorsInOrder()
    {
        Start();
        for (uint i = 0; i < 6; i++)
        {
            byte[] frame = Frame([9, 9, 9, 9, 9, 9], 100 + (int)i);
            frame.CopyTo(_ram.Bytes[(int)TxData..]);
            Write32((ushort)(0x20 + (4 * (i % 4))), TxData);
            Write32((ushort)(0x10 + (4 * (i % 4))), 100 + i);
            _net.Sent[^1].Frame.Should().Equal(frame);
            (Read32((ushort)(0x10 + (4 * (i % 4)))) & 0xA000).Should().Be(0xA000, "OWN and TOK");
        }

        _net.Sent.Should().HaveCount(6);
        _router.Level.Should().BeTrue();
        Write16(0x3E, 0xFFFF);
        _router.Level.Should().BeFalse();
        Write32(0x18, 5);
        (Read32(0x18) & (1u << 30)).Should().NotBe(0, "five bytes are no frame");
        _net.Sent.Should().HaveCount(6);
    }

    [Fact]
    public void Receive_RingWrapsAndDriverFollows()
    {
        Start();
        int read = 0;
        for (int i = 0; i < 100; i++)
        {
            byte[] frame = Frame(s_mac, 60 + (i * 13));
            _net.Deliver(frame).Should().BeTrue();
            (Read8(0x37) & 1).Should().Be(0);
            byte[] got = new byte[frame.Length];
            _ram.ReadNumber(Ring + (uint)read, 2).Should().Be(1);
            int length = (int)_ram.ReadNumber(Ring + (uint)read + 2, 2);
            length.Should().Be(frame.Length + 4);
            for (int b = 0; b < got.Length; b++)
            {
                got[b] = _ram.Bytes[(int)Ring + ((read + 4 + b) % 8192)];
            }

            got.Should().Equal(frame);
            read = (read + length + 4 + 3) / 4 * 4 % 8192;
            Write16(0x38, (ushort)(read - 16));
            (Read8(0x37) & 1).Should().Be(1);
        }
    }

    [Fact]
    public void Receive_RingFull_IsHeldUntilRead()
    {
        Start();
        int delivered = 0;
        while (_net.Deliver(Frame(s_mac, 1000)))
        {
            delivered++;
        }

        delivered.Should().Be(8);
        int before = _net.Resumed;
        Write16(0x38, (ushort)(1008 - 16));
        _net.Resumed.Should().Be(before + 1);
        _net.Deliver(Frame(s_mac, 1000)).Should().BeTrue();
    }

    [Fact]
    public void Receive_RingFull_InterruptsADriverThatHasAcknowledgedEverything()
    {
        // A driver that polls with a budget leaves frames in the ring whose interrupt it has acknowledged. The next frame
        // does not fit, so nothing but the overflow tells the driver to go on (data sheet 5.7, RXOVW).
        Start();
        while (Read16(0x3E) != (1 | 0x10))
        {
            _net.Deliver(Frame(s_mac, 1000)).Should().Be(Read16(0x3E) == 1);
        }

        int resumed = _net.Resumed;
        Write16(0x3E, 0xFFFF);
        _router.Level.Should().BeFalse();
        _net.Resumed.Should().Be(resumed + 1, "the waiting frame is tried again when the overflow is acknowledged");
        _net.Deliver(Frame(s_mac, 1000)).Should().BeFalse();
        Read16(0x3E).Should().Be(0x10);
        _router.Level.Should().BeTrue();
        Write16(0x38, (ushort)(1008 - 16));
        _net.Deliver(Frame(s_mac, 1000)).Should().BeTrue("the driver has read one");
    }

    [Fact]
    public void Receive_Filters()
    {
        Start();
        Write32(0x44, 2 | 8);
        Deliver([1, 1, 1, 1, 1, 1]).Should().BeFalse();
        Deliver(s_mac).Should().BeTrue();
        Deliver([255, 255, 255, 255, 255, 255]).Should().BeTrue();
        byte[] group = [1, 0, 0x5E, 0, 0, 1];
        Deliver(group).Should().BeFalse();
        Write32(0x44, 2 | 4);
        Deliver(group).Should().BeFalse("its hash bit is clear");
        Write32(8, 0xFFFF_FFFF);
        Write32(12, 0xFFFF_FFFF);
        Deliver(group).Should().BeTrue();
        Deliver([255, 255, 255, 255, 255, 255]).Should().BeFalse("broadcasts are off");
        Write32(0x44, 1);
        Deliver([1, 1, 1, 1, 1, 1]).Should().BeTrue();
    }

    [Fact]
    public void Save_Load_Continues()
    {
        Start();
        _net.Deliver(Frame(s_mac, 100));
        _card.Pause();
        _net.Deliver(Frame(s_mac, 100)).Should().BeFalse();
        var net = new FakeNetBackend { CanOffload = false };
        var ports = new AddressMap("io", 0x10000);
        using Rtl8139 other = Make(net, ports, new Router(), resume: false);
        DeviceCheck.Copy(_card, other);
        DeviceCheck.StateOf(other).Should().Equal(DeviceCheck.StateOf(_card));
        other.Resume();
        net.Deliver(Frame(s_mac, 200)).Should().BeTrue();
        _ram.ReadNumber(Ring + 108 + 2, 2).Should().Be(204);
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public void Accesses_Random_NeverThrow(int seed)
    {
        _ports.TryFind(Io, out IRegisterWindow window, out _).Should().BeTrue();
        DeviceCheck.Fuzz(window, seed, 30_000, random =>
        {
            if (random.Next(4) == 0)
            {
                _net.Deliver(Frame(s_mac, random.Next(14, 3000)));
            }
        });
        _ports.Write(Io + 0x37, AccessWidth.Byte, 0x10);
        (Read8(0x37) & 0x1C).Should().Be(0);
    }

    private static byte[] Frame(byte[] to, int length)
    {
        byte[] frame = new byte[length];
        new Random(length).NextBytes(frame);
        to.CopyTo(frame, 0);
        return frame;
    }

    private Rtl8139 Make(INetBackend net, AddressMap ports, Router router, bool resume = true)
    {
        var card = new Rtl8139("net0", net, s_mac, inline: true);
        new PciBus(ports, new AddressMap("mmio", 0), _ram, new FakeMsiSink()) { Router = router }.Attach(card, 3);
        card.Reset();
        card.WriteConfig(0x10, AccessWidth.Dword, Io);
        card.WriteConfig(4, AccessWidth.Word, 7);
        if (resume)
        {
            card.Resume();
        }

        return card;
    }

    private bool Deliver(byte[] to)
    {
        Write16(0x3E, 0xFFFF);
        _net.Deliver(Frame(to, 100)).Should().BeTrue();
        return (_ports.Read(Io + 0x3E, AccessWidth.Word) & 1) != 0;
    }

    private void Start()
    {
        Write32(0x30, Ring);
        _ports.Write(Io + 0x37, AccessWidth.Byte, 0x0C);
        Write32(0x44, 0xF);
        Write16(0x3C, 0xFFFF);
        Write32(8, 0);
        Write32(12, 0);
    }

    private ushort Eeprom(uint word)
    {
        _ports.Write(Io + 0x50, AccessWidth.Byte, 0x88);
        uint command = (6u << 6) | word;
        for (int i = 8; i >= 0; i--)
        {
            uint bit = (command >> i & 1) << 1;
            _ports.Write(Io + 0x50, AccessWidth.Byte, 0x88 | bit);
            _ports.Write(Io + 0x50, AccessWidth.Byte, 0x8C | bit);
        }

        ushort value = 0;
        for (int i = 0; i < 16; i++)
        {
            _ports.Write(Io + 0x50, AccessWidth.Byte, 0x88);
            _ports.Write(Io + 0x50, AccessWidth.Byte, 0x8C);
            value = (ushort)((value << 1) | (Read8(0x50) & 1));
        }

        _ports.Write(Io + 0x50, AccessWidth.Byte, 0);
        return value;
    }

    private byte Read8(ushort offset) => (byte)_ports.Read((ulong)(Io + offset), AccessWidth.Byte);

    private ushort Read16(ushort offset) => (ushort)_ports.Read((ulong)(Io + offset), AccessWidth.Word);

    private uint Read32(ushort offset) => (uint)_ports.Read((ulong)(Io + offset), AccessWidth.Dword);

    private void Write16(ushort offset, ushort value) => _ports.Write((ulong)(Io + offset), AccessWidth.Word, value);

    private void Write32(ushort offset, uint value) => _ports.Write((ulong)(Io + offset), AccessWidth.Dword, value);

    private sealed class Router : IPciInterruptRouter
    {
        public bool Level { get; private set; }

        public void SetPirq(int input, bool asserted) => Level = asserted;
    }
}

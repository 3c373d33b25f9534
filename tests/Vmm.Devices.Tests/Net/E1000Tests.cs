// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Net;
using Vmm.Devices.Pci;
using Vmm.Devices.Tests.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Net;

public sealed class E1000Tests : IDisposable
{
    private const ulong Bar = 0xFE00_0000;
    private const ushort IoBar = 0xC000;
    private const ulong RxRing = 0x10000, TxRing = 0x20000, RxBuffers = 0x40000, TxData = 0x80000;

    private static readonly byte[] s_mac = [0x52, 0x54, 0, 0xAA, 0xBB, 0xCC];

    private readonly TestRam _ram = new(1 << 20);
    private readonly AddressMap _ports = new("io", 0x10000);
    private readonly AddressMap _mmio = new("mmio", 0);
    private readonly Router _router = new();
    private readonly FakeNetBackend _net = new() { CanOffload = false };
    private readonly E1000 _card;
    private uint _tail;

    public E1000Tests() => _card = Make(_net, _ports, _mmio, _router);

    public void Dispose() => _card.Dispose();

    [Fact]
    public void Identity_IsThe82540EM()
    {
        _card.ReadConfig(0, AccessWidth.Dword).Should().Be(0x100E_8086);
        Read(0x8).Should().Be(0x783, "full duplex, link up, 1000 Mbit/s");
    }

    [Fact]
    public void Eeprom_ByRegisterAndByWires_HasMacAndSum()
    {
        ushort sum = 0;
        for (uint i = 0; i < 64; i++)
        {
            Write(0x14, (i << 8) | 1);
            uint value = Read(0x14);
            (value & 0x10).Should().Be(0x10);
            ushort word = (ushort)(value >> 16);
            sum += word;
            Microwire(i).Should().Be(word);
            if (i < 3)
            {
                word.Should().Be(BinaryPrimitives.ReadUInt16LittleEndian(s_mac.AsSpan((int)i * 2)));
            }
        }

        sum.Should().Be(0xBABA, "SDM §5.6.35");
    }

    [Fact]
    public void Phy_ThroughMdic_ReportsLink()
    {
        Write(0x20, (2u << 26) | (1u << 21) | (1u << 16));
        (Read(0x20) & 0x1000_0024).Should().Be(0x1000_0024, "ready, link, negotiation complete");
        Write(0x20, (2u << 26) | (2u << 21));
        (Read(0x20) & (1u << 30)).Should().NotBe(0, "there is no PHY 2");
    }

    [Fact]
    public void Receive_DefaultAddress_Arrives()
    {
        StartReceive(8);
        _net.Deliver(Frame(s_mac, 100)).Should().BeTrue();
        (byte status, int length) = Descriptor(0);
        (status & 3).Should().Be(3);
        length.Should().Be(104, "with the FCS");
        _ram.Bytes[(int)RxBuffers].Should().Be(0x52);
        _router.Level.Should().BeTrue();
        (Read(0xC0) & (1u << 7)).Should().NotBe(0);
        _router.Level.Should().BeFalse("reading ICR clears");
        Read(0x4074).Should().Be(1);
        Read(0x4074).Should().Be(0, "statistics clear on reading");
        _net.Deliver(Frame([1, 1, 1, 1, 1, 1], 100)).Should().BeTrue();
        Descriptor(1).Status.Should().Be(0, "not ours");
    }

    [Fact]
    public void Receive_RingFull_IsHeldUntilTailMoves()
    {
        StartReceive(4);
        for (int i = 0; i < 3; i++)
        {
            _net.Deliver(Frame(s_mac, 100)).Should().BeTrue();
        }

        _ = Read(0xC0);
        _net.Deliver(Frame(s_mac, 100)).Should().BeFalse();
        (Read(0xC0) & 0x40).Should().Be(0x40, "RXO: the driver has a reason to look");
        int before = _net.Resumed;
        Write(0x2818, 1);
        _net.Resumed.Should().Be(before + 1);
        _net.Deliver(Frame(s_mac, 100)).Should().BeTrue();
    }

    [Fact]
    public void Receive_LongFrame_SpansDescriptors()
    {
        StartReceive(8, rctlExtra: (1u << 5) | (1u << 26));
        byte[] frame = Frame(s_mac, 5000);
        _net.Deliver(frame).Should().BeTrue();
        Descriptor(0).Should().Be((5, 2048));
        Descriptor(1).Should().Be((5, 2048));
        Descriptor(2).Should().Be((7, 904));
        byte[] got = new byte[5000];
        for (int i = 0; i < 3; i++)
        {
            _ram.Bytes.Slice((int)RxBuffers + (i * 2048), Math.Min(2048, 5000 - (i * 2048))).CopyTo(got.AsSpan(i * 2048));
        }

        got.Should().Equal(frame);
    }

    [Fact]
    public void Receive_MulticastHashAndVlans_Filter()
    {
        StartReceive(16);
        byte[] group = [1, 0, 0x5E, 0, 0x12, 0x34];
        _net.Deliver(Frame(group, 100));
        Descriptor(0).Status.Should().Be(0);
        uint hash = ((0x12u | (0x34u << 8)) >> 4) & 0xFFF;
        Write(0x5200 + ((hash >> 5) * 4), 1u << (int)(hash & 31));
        _net.Deliver(Frame(group, 100));
        (Descriptor(0).Status & 1).Should().Be(1);

        Write(0, Read(0) | (1u << 30));
        Write(0x100, Read(0x100) | (1u << 18));
        byte[] tagged = Frame(s_mac, 100);
        (tagged[12], tagged[13], tagged[14], tagged[15]) = (0x81, 0, 0x20, 5);
        _net.Deliver(tagged);
        Descriptor(1).Status.Should().Be(0, "VLAN 5 is not in the table");
        Write(0x5600, 1 << 5);
        _net.Deliver(tagged);
        (Descriptor(1).Status & 8).Should().Be(8);
        _ram.ReadNumber(RxRing + 16 + 14, 2).Should().Be(0x2005);
        _ram.Bytes[(int)RxBuffers + 2048 + 12].Should().Be(tagged[16], "the tag was taken out");
    }

    [Fact]
    public void Transmit_Legacy_SendsAndReports()
    {
        StartTransmit();
        byte[] frame = Frame([9, 9, 9, 9, 9, 9], 200);
        frame.CopyTo(_ram.Bytes[(int)TxData..]);
        Legacy(TxData, 100, 0);
        Legacy(TxData + 100, 100, 1 | 8);
        Write(0x3818, _tail);
        _net.Sent.Should().ContainSingle();
        _net.Sent[0].Frame.Should().Equal(frame);
        (_ram.Bytes[(int)TxRing + 16 + 12] & 1).Should().Be(1);
        Read(0x3810).Should().Be(2);
        (Read(0xC0) & 3).Should().Be(3);
    }

    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public void Transmit_Segmentation_IsPassedOnOrCut(bool canOffload)
    {
        var net = new FakeNetBackend { CanOffload = canOffload };
        var mmio = new AddressMap("mmio", 0);
        using E1000 card = Make(net, new AddressMap("io", 0x10000), mmio, new Router());
        mmio.Write(Bar + 0x3800, AccessWidth.Dword, TxRing);
        mmio.Write(Bar + 0x3808, AccessWidth.Dword, 256);
        mmio.Write(Bar + 0x400, AccessWidth.Dword, 2);
        byte[] frame = new byte[54 + 2500];
        frame[12] = 8;
        frame[14] = 0x45;
        frame[22] = 64;
        frame[23] = 6;
        (frame[26], frame[30]) = (10, 10);
        frame[46] = 0x50;
        new Random(1).NextBytes(frame.AsSpan(54));
        BinaryPrimitives.WriteUInt16BigEndian(frame.AsSpan(50), (ushort)NetFrames.Sum(frame.AsSpan(26, 8), 6));
        frame.CopyTo(_ram.Bytes[(int)TxData..]);

        // Context: IP 14/24/33, TCP 34/50/0, TSE with IP and TCP, header 54, MSS 1000; then data.
        Put(TxRing, 14u | (24u << 8) | (33u << 16), 34u | (50u << 8), 2500u | (0x27u << 24), (54u << 8) | (1000u << 16));
        Put(TxRing + 16, (uint)TxData, 0, (uint)frame.Length | (1u << 20) | (0x2Du << 24), 3u << 8);
        mmio.Write(Bar + 0x3818, AccessWidth.Dword, 2);
        if (canOffload)
        {
            net.Sent.Should().ContainSingle();
            net.Sent[0].Offload.Should().Be(new NetOffload(true, 34, 16, 1, 1000, 54));
            NetFrames.Checksum(net.Sent[0].Frame.AsSpan(14, 20)).Should().Be(0);
            return;
        }

        net.Sent.Should().HaveCount(3);
        int[] payloads = [1000, 1000, 500];
        for (int i = 0; i < 3; i++)
        {
            byte[] segment = net.Sent[i].Frame;
            segment.Should().HaveCount(54 + payloads[i]);
            NetFrames.Checksum(segment.AsSpan(14, 20)).Should().Be(0);
            uint pseudo = NetFrames.Sum(segment.AsSpan(26, 8), 6 + 20 + (uint)payloads[i]);
            NetFrames.Checksum(segment.AsSpan(34), pseudo).Should().Be(0);
        }
    }

    [Fact]
    public void IoWindow_ReachesRegisters()
    {
        _ports.Write(IoBar, AccessWidth.Dword, 8);
        _ports.Read(IoBar + 4, AccessWidth.Dword).Should().Be(0x783);
        _ports.Write(IoBar, AccessWidth.Dword, 0xFFFF_FFFF);
        _ports.Read(IoBar + 4, AccessWidth.Dword).Should().Be(0);
    }

    [Fact]
    public void Save_MidFrame_Continues()
    {
        StartReceive(8);
        StartTransmit();
        byte[] frame = Frame([9, 9, 9, 9, 9, 9], 200);
        frame.CopyTo(_ram.Bytes[(int)TxData..]);
        Legacy(TxData, 100, 0);
        Write(0x3818, _tail);
        _net.Deliver(Frame(s_mac, 100));
        _card.Pause();
        _net.Deliver(Frame(s_mac, 100)).Should().BeFalse();
        var net = new FakeNetBackend { CanOffload = false };
        var mmio = new AddressMap("mmio", 0);
        using E1000 other = Make(net, new AddressMap("io", 0x10000), mmio, new Router(), resume: false);
        DeviceCheck.Copy(_card, other);
        DeviceCheck.StateOf(other).Should().Equal(DeviceCheck.StateOf(_card));
        other.Resume();
        Legacy(TxData + 100, 100, 1);
        mmio.Write(Bar + 0x3818, AccessWidth.Dword, _tail);
        net.Sent.Should().ContainSingle();
        net.Sent[0].Frame.Should().Equal(frame);
        net.Deliver(Frame(s_mac, 100)).Should().BeTrue();
        (Descriptor(1).Status & 1).Should().Be(1);
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void Accesses_Random_NeverThrow(int seed)
    {
        _mmio.TryFind(Bar, out IRegisterWindow window, out _).Should().BeTrue();
        new Random(seed).NextBytes(_ram.Bytes);
        uint[] hot = [0, 0x10, 0x14, 0x20, 0xC8, 0x100, 0x400, 0x2800, 0x2808, 0x2810, 0x2818, 0x3800, 0x3808, 0x3810, 0x3818];
        DeviceCheck.Fuzz(window, seed, 20_000, random =>
        {
            window.Write(hot[random.Next(hot.Length)], AccessWidth.Dword, (uint)random.Next() >> random.Next(32));
            if (random.Next(4) == 0)
            {
                _net.Deliver(Frame(s_mac, random.Next(14, 3000)));
            }
        });
        Write(0, 1 << 26);
        Read(0x100).Should().Be(0);
    }

    private static byte[] Frame(byte[] to, int length)
    {
        byte[] frame = new byte[length];
        new Random(length).NextBytes(frame);
        to.CopyTo(frame, 0);
        (frame[12], frame[13]) = (8, 0);
        return frame;
    }

    private E1000 Make(INetBackend net, AddressMap ports, AddressMap mmio, Router router, bool resume = true)
    {
        var card = new E1000("net0", net, s_mac, inline: true);
        var bus = new PciBus(ports, mmio, _ram, new FakeMsiSink()) { Router = router };
        bus.Attach(card, 3);
        card.Reset();
        card.WriteConfig(0x10, AccessWidth.Dword, (uint)Bar);
        card.WriteConfig(0x14, AccessWidth.Dword, IoBar);
        card.WriteConfig(4, AccessWidth.Word, 7);
        if (resume)
        {
            card.Resume();
        }

        return card;
    }

    private uint Read(uint offset) => (uint)_mmio.Read(Bar + offset, AccessWidth.Dword);

    private void Write(uint offset, uint value) => _mmio.Write(Bar + offset, AccessWidth.Dword, value);

    private ushort Microwire(uint word)
    {
        Write(0x10, 2);
        uint command = (6u << 6) | word;
        for (int i = 8; i >= 0; i--)
        {
            uint bit = (command >> i & 1) << 2;
            Write(0x10, 2 | bit);
            Write(0x10, 2 | bit | 1);
            Write(0x10, 2 | bit);
        }

        uint value = 0;
        for (int i = 0; i < 16; i++)
        {
            Write(0x10, 3);
            value = (value << 1) | ((Read(0x10) >> 3) & 1);
            Write(0x10, 2);
        }

        Write(0x10, 0);
        return (ushort)value;
    }

    private void StartReceive(uint count, uint rctlExtra = 0)
    {
        _ram.Bytes.Slice((int)RxRing, (int)count * 16).Clear();
        for (uint i = 0; i < count; i++)
        {
            _ram.WriteNumber(RxRing + (i * 16), 8, RxBuffers + (i * 2048));
        }

        Write(0x2800, (uint)RxRing);
        Write(0x2804, 0);
        Write(0x2808, Math.Max(128, count * 16));
        Write(0x2810, 0);
        Write(0x2818, count - 1);
        Write(0xD0, 0x9F);
        Write(0x100, (1u << 1) | (1u << 15) | rctlExtra);
    }

    private void StartTransmit()
    {
        Write(0x3800, (uint)TxRing);
        Write(0x3804, 0);
        Write(0x3808, 256);
        Write(0x3810, 0);
        Write(0x3818, 0);
        Write(0xD0, 0x9F);
        Write(0x400, 2);
    }

    private void Legacy(ulong address, uint length, byte command) =>
        Put(TxRing + (16 * _tail++), (uint)address, 0, length | ((uint)command << 24), 0);

    private void Put(ulong at, uint a, uint b, uint c, uint d)
    {
        _ram.WriteNumber(at, 4, a);
        _ram.WriteNumber(at + 4, 4, b);
        _ram.WriteNumber(at + 8, 4, c);
        _ram.WriteNumber(at + 12, 4, d);
    }

    private (byte Status, int Length) Descriptor(int index)
    {
        int at = (int)RxRing + (index * 16);
        return (_ram.Bytes[at + 12], (int)_ram.ReadNumber((ulong)at + 8, 2));
    }

    private sealed class Router : IPciInterruptRouter
    {
        public bool Level { get; private set; }

        public void SetPirq(int input, bool asserted) => Level = asserted;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Pci;
using Vmm.Devices.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Virtio;

public sealed class VirtioPciTests : IDisposable
{
    private const ulong Bar = 0xFE00_0000;
    private const ulong MsixBar = 0xFD00_0000;
    private const ushort IoBar = 0xC000;
    private const ulong Data = 0x40000;

    private readonly TestRam _ram = new(1 << 20);
    private readonly AddressMap _ports = new("io", 0x10000);
    private readonly AddressMap _mmio = new("mmio", 0);
    private readonly FakeMsiSink _msi = new();
    private readonly Router _router = new();
    private readonly PciBus _bus;
    private readonly VirtioPci _card;

    public VirtioPciTests()
    {
        _bus = new PciBus(_ports, _mmio, _ram, _msi) { Router = _router };
        _card = Make(VirtioPciMode.Transitional);
        _bus.Attach(_card, 3);
        Place(_card);
    }

    public void Dispose() => _card.Dispose();

    [Fact]
    public void Identity_Transitional_IsTheOldOne()
    {
        _card.ReadConfig(0, AccessWidth.Dword).Should().Be(0x1005_1AF4);
        _card.ReadConfig(0x2C, AccessWidth.Dword).Should().Be(0x0004_1AF4);
        _card.ReadConfig(8, AccessWidth.Byte).Should().Be(0);
    }

    [Fact]
    public void Identity_Modern_IsTheNewOneWithoutIoBar()
    {
        using VirtioPci card = Make(VirtioPciMode.Modern);
        card.ReadConfig(0, AccessWidth.Dword).Should().Be(0x1044_1AF4);
        card.ReadConfig(8, AccessWidth.Byte).Should().Be(1);
        card.WriteConfig(0x10, AccessWidth.Dword, 0xFFFF_FFFF);
        card.ReadConfig(0x10, AccessWidth.Dword).Should().Be(0);
    }

    [Fact]
    public void Doorbells_FollowTheBar()
    {
        var signal = new Doorbells();
        using var card = new VirtioPci("rng", new VirtioRng(new Filler()), VirtioPciMode.Transitional, null, signal);
        _bus.Attach(card, 5);
        signal.Places.Should().BeEmpty();
        card.WriteConfig(0x20, AccessWidth.Dword, 0xE000_0000);
        card.WriteConfig(0x24, AccessWidth.Dword, 1);
        card.WriteConfig(4, AccessWidth.Word, 6);
        card.WriteConfig(0x24, AccessWidth.Dword, 0);
        card.WriteConfig(4, AccessWidth.Word, 0);
        signal.Places.Should().Equal((0x1_E000_3000UL, 1, 4u), (0xE000_3000UL, 1, 4u), (null, 1, 4u));
    }

    [Fact]
    public void Capabilities_NameEachStructureOnce()
    {
        var found = new bool[6];
        for (uint at = _card.ReadConfig(0x34, AccessWidth.Byte); at != 0; at = _card.ReadConfig((int)at + 1, AccessWidth.Byte))
        {
            if (_card.ReadConfig((int)at, AccessWidth.Byte) == 9)
            {
                found[_card.ReadConfig((int)at + 3, AccessWidth.Byte)] = true;
            }
        }

        found.Should().Equal(false, true, true, true, true, true);
    }

    [Fact]
    public void ModernDriver_WithMsix_GetsItsVectors()
    {
        EnableMsix(2);
        VirtqueueDriver queue = StartModern(configVector: 0, queueVector: 1);
        queue.Add(new DriverBuffer(Data, 32, true));
        _mmio.Write(Bar + 0x3000, AccessWidth.Word, 0);
        queue.TryTakeUsed(out _, out uint length).Should().BeTrue();
        length.Should().Be(32);
        _ram.Bytes.Slice((int)Data, 32).IndexOfAnyExcept((byte)0x5A).Should().Be(-1);
        _msi.Messages.Should().Equal((0xFEE0_1000UL, 0x41u));
        _router.Level.Should().BeFalse();
        _mmio.Read(Bar + 0x1000, AccessWidth.Byte).Should().Be(0, "ISR is for INTx");
    }

    [Fact]
    public void ModernDriver_WithIntx_SeesIsrThatClearsOnRead()
    {
        VirtqueueDriver queue = StartModern(0xFFFF, 0xFFFF);
        queue.Add(new DriverBuffer(Data, 32, true));
        _mmio.Write(Bar + 0x3000, AccessWidth.Word, 0);
        _router.Level.Should().BeTrue();
        _mmio.Read(Bar + 0x1000, AccessWidth.Byte).Should().Be(1);
        _router.Level.Should().BeFalse();
        _mmio.Read(Bar + 0x1000, AccessWidth.Byte).Should().Be(0);
    }

    [Fact]
    public void Vector_BeyondTable_ReadsBackAsNone()
    {
        Common16(0x10, 7);
        _mmio.Read(Bar + 0x10, AccessWidth.Word).Should().Be(0xFFFF);
        Common16(0x10, 1);
        _mmio.Read(Bar + 0x10, AccessWidth.Word).Should().Be(1);
    }

    [Fact]
    public void Features_NotOffered_KeepFeaturesOkClear()
    {
        _mmio.Write(Bar + 0x14, AccessWidth.Byte, 3);
        WriteFeatures((1UL << 32) | (1UL << 20));
        _mmio.Write(Bar + 0x14, AccessWidth.Byte, 11);
        _mmio.Read(Bar + 0x14, AccessWidth.Byte).Should().Be(3);
    }

    [Fact]
    public void QueueRegisters_RoundTripIn64Bits()
    {
        Common16(0x16, 0);
        _mmio.Write(Bar + 0x20, AccessWidth.Qword, 0x1_2345_6000);
        _mmio.Read(Bar + 0x20, AccessWidth.Qword).Should().Be(0x1_2345_6000);
        _mmio.Read(Bar + 0x24, AccessWidth.Dword).Should().Be(1);
        Common16(0x16, 5);
        _mmio.Read(Bar + 0x18, AccessWidth.Word).Should().Be(0, "no such queue");
        _mmio.Read(Bar + 0x12, AccessWidth.Word).Should().Be(1);
    }

    [Fact]
    public void ConfigurationWindow_ReachesTheBar()
    {
        int at = FindCapability(5);
        _card.WriteConfig(at + 4, AccessWidth.Byte, 4);
        _card.WriteConfig(at + 8, AccessWidth.Dword, 0x14);
        _card.WriteConfig(at + 12, AccessWidth.Dword, 1);
        _card.WriteConfig(at + 16, AccessWidth.Byte, 3);
        _mmio.Read(Bar + 0x14, AccessWidth.Byte).Should().Be(3);
        _card.ReadConfig(at + 16, AccessWidth.Byte).Should().Be(3);
        _card.WriteConfig(at + 8, AccessWidth.Dword, 0xFFFF_FFF0);
        _card.ReadConfig(at + 16, AccessWidth.Dword);
    }

    [Fact]
    public void LegacyDriver_WorksThroughPorts()
    {
        uint offered = (uint)_ports.Read(IoBar, AccessWidth.Dword);
        (offered & (1u << 24)).Should().NotBe(0, "NOTIFY_ON_EMPTY is a legacy feature");
        _ports.Write(IoBar + 18, AccessWidth.Byte, 3);
        _ports.Write(IoBar + 4, AccessWidth.Dword, 0);
        _ports.Write(IoBar + 14, AccessWidth.Word, 0);
        ushort size = (ushort)_ports.Read(IoBar + 12, AccessWidth.Word);
        size.Should().Be(64);
        var queue = new VirtqueueDriver(_ram, 0x4000, size, packed: false);
        _ports.Write(IoBar + 8, AccessWidth.Dword, 4);
        _ports.Read(IoBar + 8, AccessWidth.Dword).Should().Be(4);
        _ports.Write(IoBar + 18, AccessWidth.Byte, 7);
        queue.Add(new DriverBuffer(Data, 16, true));
        _ports.Write(IoBar + 16, AccessWidth.Word, 0);
        queue.TryTakeUsed(out _, out uint length).Should().BeTrue();
        length.Should().Be(16);
        _router.Level.Should().BeTrue();
        _ports.Read(IoBar + 19, AccessWidth.Byte).Should().Be(1);
        _router.Level.Should().BeFalse();
        _ports.Write(IoBar + 18, AccessWidth.Byte, 0);
        _ports.Read(IoBar + 18, AccessWidth.Byte).Should().Be(0);
        _ports.Read(IoBar + 8, AccessWidth.Dword).Should().Be(0);
    }

    [Fact]
    public void LegacyDriver_UsesDeviceBeforeDriverOk_IsServed()
    {
        _ports.Write(IoBar + 18, AccessWidth.Byte, 3);
        var queue = new VirtqueueDriver(_ram, 0x4000, 64, packed: false);
        _ports.Write(IoBar + 8, AccessWidth.Dword, 4);
        queue.Add(new DriverBuffer(Data, 16, true));
        _ports.Write(IoBar + 16, AccessWidth.Word, 0);
        queue.TryTakeUsed(out _, out _).Should().BeTrue();
    }

    [Fact]
    public void BusMasterOff_StopsDma()
    {
        VirtqueueDriver queue = StartModern(0xFFFF, 0xFFFF);
        _card.WriteConfig(4, AccessWidth.Word, 3);
        queue.Add(new DriverBuffer(Data, 32, true));
        _mmio.Write(Bar + 0x3000, AccessWidth.Word, 0);
        queue.TryTakeUsed(out _, out _).Should().BeFalse();
        (_mmio.Read(Bar + 0x14, AccessWidth.Byte) & 0x40).Should().Be(0x40);
    }

    [Fact]
    public void Save_Load_KeepsEverything()
    {
        EnableMsix(2);
        VirtqueueDriver queue = StartModern(0, 1);
        queue.Add(new DriverBuffer(Data, 32, true));
        _mmio.Write(Bar + 0x3000, AccessWidth.Word, 0);
        queue.TryTakeUsed(out _, out _).Should().BeTrue();
        _card.Pause();
        queue.Add(new DriverBuffer(Data, 8, true));
        _mmio.Write(Bar + 0x3000, AccessWidth.Word, 0);

        var mmio = new AddressMap("mmio", 0);
        var msi = new FakeMsiSink();
        var bus = new PciBus(new AddressMap("io", 0x10000), mmio, _ram, msi) { Router = new Router() };
        using VirtioPci other = Make(VirtioPciMode.Transitional, resume: false);
        bus.Attach(other, 3);
        DeviceCheck.Copy(_card, other);
        DeviceCheck.StateOf(other).Should().Equal(DeviceCheck.StateOf(_card));
        other.Resume();
        queue.TryTakeUsed(out _, out uint length).Should().BeTrue();
        length.Should().Be(8);
        msi.Messages.Should().Equal((0xFEE0_1000UL, 0x41u));
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void RegisterAccesses_Random_NeverThrow(int seed)
    {
        _mmio.TryFind(Bar, out IRegisterWindow modern, out _).Should().BeTrue();
        _ports.TryFind(IoBar, out IRegisterWindow legacy, out _).Should().BeTrue();
        new Random(seed).NextBytes(_ram.Bytes);
        DeviceCheck.Fuzz(modern, seed, 20_000, random =>
        {
            // Most random offsets miss the registers: hit them on purpose.
            modern.Write((uint)random.Next(0x3C), AccessWidth.Byte, (uint)random.Next(256));
            modern.Write((uint)random.Next(0xF) * 4, AccessWidth.Dword, (uint)random.Next());
            modern.Write(0x14, AccessWidth.Byte, (uint)(random.Next(2) * 15));
            modern.Write(0x3000, AccessWidth.Word, 0);
        });
        DeviceCheck.Fuzz(legacy, seed, 20_000);
        _mmio.Write(Bar + 0x14, AccessWidth.Byte, 0);
        _mmio.Read(Bar + 0x14, AccessWidth.Byte).Should().Be(0);
    }

    private static VirtioPci Make(VirtioPciMode mode, bool resume = true)
    {
        var card = new VirtioPci(
            "rng", new VirtioRng(new Filler()), mode, new VirtioOptions { Inline = true, Packed = true });
        card.Reset();
        if (resume)
        {
            card.Resume();
        }

        return card;
    }

    private static void Place(VirtioPci card)
    {
        card.WriteConfig(0x10, AccessWidth.Dword, IoBar);
        card.WriteConfig(0x14, AccessWidth.Dword, (uint)MsixBar);
        card.WriteConfig(0x20, AccessWidth.Dword, (uint)Bar);
        card.WriteConfig(0x24, AccessWidth.Dword, 0);
        card.WriteConfig(4, AccessWidth.Word, 7);
    }

    private int FindCapability(uint type)
    {
        for (uint at = _card.ReadConfig(0x34, AccessWidth.Byte); at != 0; at = _card.ReadConfig((int)at + 1, AccessWidth.Byte))
        {
            if (_card.ReadConfig((int)at, AccessWidth.Byte) == 9 && _card.ReadConfig((int)at + 3, AccessWidth.Byte) == type)
            {
                return (int)at;
            }
        }

        throw new InvalidOperationException("no such capability");
    }

    private void EnableMsix(int vectors)
    {
        for (uint i = 0; i < vectors; i++)
        {
            _mmio.Write(MsixBar + (i * 16), AccessWidth.Dword, 0xFEE0_1000);
            _mmio.Write(MsixBar + (i * 16) + 4, AccessWidth.Dword, 0);
            _mmio.Write(MsixBar + (i * 16) + 8, AccessWidth.Dword, 0x40 + i);
            _mmio.Write(MsixBar + (i * 16) + 12, AccessWidth.Dword, 0);
        }

        for (uint at = _card.ReadConfig(0x34, AccessWidth.Byte); at != 0; at = _card.ReadConfig((int)at + 1, AccessWidth.Byte))
        {
            if (_card.ReadConfig((int)at, AccessWidth.Byte) == 0x11)
            {
                _card.WriteConfig((int)at + 2, AccessWidth.Word, 0x8000);
            }
        }
    }

    private void WriteFeatures(ulong features)
    {
        _mmio.Write(Bar + 8, AccessWidth.Dword, 0);
        _mmio.Write(Bar + 12, AccessWidth.Dword, (uint)features);
        _mmio.Write(Bar + 8, AccessWidth.Dword, 1);
        _mmio.Write(Bar + 12, AccessWidth.Dword, features >> 32);
    }

    private void Common16(uint offset, ushort value) => _mmio.Write(Bar + offset, AccessWidth.Word, value);

    private VirtqueueDriver StartModern(ushort configVector, ushort queueVector)
    {
        _mmio.Write(Bar + 0x14, AccessWidth.Byte, 3);
        WriteFeatures(1UL << 32);
        _mmio.Write(Bar + 0x14, AccessWidth.Byte, 11);
        _mmio.Read(Bar + 0x14, AccessWidth.Byte).Should().Be(11);
        Common16(0x10, configVector);
        Common16(0x16, 0);
        Common16(0x18, 16);
        Common16(0x1A, queueVector);
        var queue = new VirtqueueDriver(_ram, 0x1000, 16, packed: false);
        _mmio.Write(Bar + 0x20, AccessWidth.Qword, queue.Descriptors);
        _mmio.Write(Bar + 0x28, AccessWidth.Qword, queue.Driver);
        _mmio.Write(Bar + 0x30, AccessWidth.Qword, queue.Device);
        Common16(0x1C, 1);
        _mmio.Write(Bar + 0x14, AccessWidth.Byte, 15);
        return queue;
    }

    private sealed class Filler : IEntropySource
    {
        public void Fill(Span<byte> into) => into.Fill(0x5A);
    }

    private sealed class Router : IPciInterruptRouter
    {
        public bool Level { get; private set; }

        public void SetPirq(int input, bool asserted) => Level = asserted;
    }

    private sealed class Doorbells : IDoorbellSignal
    {
        public List<(ulong? Address, int Count, uint Stride)> Places { get; } = [];

        public void Place(ulong? guestAddress, int count, uint strideBytes) => Places.Add((guestAddress, count, strideBytes));

        public void Set()
        {
        }

        public void Wait()
        {
        }

        public void Dispose()
        {
        }
    }
}

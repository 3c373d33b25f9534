// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Linq;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Legacy;
using Vmm.Devices.Pci;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>A machine's PCI side in small: maps, RAM, message sink, host bridge and ISA bridge.</summary>
public sealed class PciBench
{
    public PciBench()
    {
        Bus = new PciBus(Ports, Mmio, Ram, Msi);
        Isa = new Piix3IsaBridge(IsaLines);
        Bus.Attach(Isa, 1);
        ConfigPorts = new PciConfigPorts(Bus, System);
        Ports.Map(PciConfigPorts.Port, ConfigPorts);
        Isa.Reset();
    }

    public AddressMap Ports { get; } = new("io", 0x1_0000);

    public AddressMap Mmio { get; } = new("mmio", 1UL << 46);

    public TestRam Ram { get; } = new(1 << 20);

    public FakeMsiSink Msi { get; } = new();

    public FakeIrqLine[] IsaLines { get; } = FakeIrqLine.Many(16);

    public FakeSystem System { get; } = new();

    public PciBus Bus { get; }

    public Piix3IsaBridge Isa { get; }

    public PciConfigPorts ConfigPorts { get; }

    public uint Read(int device, int offset, AccessWidth width = AccessWidth.Dword) =>
        Bus.ReadConfig(device * 8, offset, width);

    public void Write(int device, int offset, uint value, AccessWidth width = AccessWidth.Dword) =>
        Bus.WriteConfig(device * 8, offset, width, value);

    /// <summary>Attaches, resets and enables a card; returns after its BARs have places.</summary>
    public void Plug(PciFunction card, int device = 3)
    {
        Bus.Attach(card, device);
        card.Reset();
        PciAllocator.Assign(Bus, 0xE000_0000, 0xFE00_0000).Should().BeEmpty();
        Write(device, PciConfig.Command, 0x0007, AccessWidth.Word);
    }

    /// <summary>Where the allocator put a BAR.</summary>
    public ulong BarAddress(int device, int index) => Read(device, PciConfig.Bar0 + (4 * index)) & ~0xFu;
}

/// <summary>Records what chips ask of the machine.</summary>
public sealed class FakeSystem : ISystemControl
{
    public System.Collections.Generic.List<(SystemRequest Request, string Source)> Requests { get; } = [];

    public int? ExitStatus { get; private set; }

    public bool IsA20Open { get; private set; } = true;

    public void Request(SystemRequest request, string source) => Requests.Add((request, source));

    public void Exit(int status) => ExitStatus = status;

    public void SetA20(bool isOpen) => IsA20Open = isOpen;
}

/// <summary>Plain storage behind a window.</summary>
public sealed class ArrayWindow : IRegisterWindow
{
    private readonly byte[] _bytes;

    public ArrayWindow(int lengthBytes) => _bytes = new byte[lengthBytes];

    public uint Length => (uint)_bytes.Length;

    public ulong Read(uint offset, AccessWidth width)
    {
        ulong value = 0;
        for (int i = (int)width - 1; i >= 0; i--)
        {
            value = (value << 8) | _bytes[offset + i];
        }

        return value;
    }

    public void Write(uint offset, AccessWidth width, ulong value)
    {
        for (int i = 0; i < (int)width; i++)
        {
            _bytes[offset + i] = (byte)(value >> (8 * i));
        }
    }
}

public sealed class PciTests
{
    private readonly PciBench _bench = new();
    private readonly Card _card = new();

    [Fact]
    public void Header_AfterReset_ShowsIdentityAndNothingEnabled()
    {
        _bench.Bus.Attach(_card, 5);
        _card.Reset();

        _bench.Read(5, 0x00).Should().Be(0x5678_1234);
        _bench.Read(5, 0x04).Should().Be(0x0010_0000, "status says that there are capabilities");
        _bench.Read(5, 0x08).Should().Be(0x0102_0307);
        _bench.Read(5, 0x2C).Should().Be(0x2222_1111);
        _bench.Read(5, PciConfig.InterruptPin, AccessWidth.Byte).Should().Be(1);
    }

    // PCI 3.0 §6.2.2: unimplemented Command bits read as zero; §6.1: identity registers are read-only.
    [Fact]
    public void Header_AfterWritingOnes_KeepsReadOnlyBits()
    {
        _bench.Bus.Attach(_card, 5);
        _card.Reset();
        for (int offset = 0; offset < 0x40; offset += 4)
        {
            _bench.Write(5, offset, 0xFFFF_FFFF);
        }

        _bench.Read(5, 0x00).Should().Be(0x5678_1234);
        (_bench.Read(5, 0x04) & 0xFFFF).Should().Be(0x0547);
        _bench.Read(5, 0x10).Should().Be(0xFFFF_FFE1, "32 bytes of I/O");
        _bench.Read(5, 0x14).Should().Be(0xFFFF_C000, "16 KiB of memory");
        _bench.Read(5, 0x18).Should().Be(0xFFFF_000C, "64 KiB, 64-bit, prefetchable, lower half");
        _bench.Read(5, 0x1C).Should().Be(0xFFFF_FFFF);
        _bench.Read(5, 0x24).Should().Be(0);
        _bench.Read(5, 0x30).Should().Be(0xFFFF_F001, "4 KiB option ROM");
        _bench.Read(5, 0x34).Should().Be(_card.MsiAt == 0x40 ? 0x40u : 0);
    }

    [Fact]
    public void Bars_WhenProgrammed_AppearAndMoveAndVanish()
    {
        _bench.Bus.Attach(_card, 5);
        _card.Reset();
        _bench.Write(5, 0x10, 0xC100);
        _bench.Ports.TryFind(0xC100, out _, out _).Should().BeFalse("decoding is off");
        _bench.Write(5, 0x04, 0x0001, AccessWidth.Word);
        _bench.Ports.Write(0xC104, AccessWidth.Dword, 0x1122_3344);
        _bench.Ports.Read(0xC104, AccessWidth.Word).Should().Be(0x3344);

        _bench.Write(5, 0x10, 0xC200);
        _bench.Ports.TryFind(0xC100, out _, out _).Should().BeFalse();
        _bench.Ports.Read(0xC204, AccessWidth.Dword).Should().Be(0x1122_3344);

        _bench.Write(5, 0x10, 0xFFFF_FFFF);
        _bench.Ports.TryFind(0xC204, out _, out _).Should().BeFalse("sizing");
        _bench.Write(5, 0x10, 0xC200);
        _bench.Write(5, 0x04, 0, AccessWidth.Word);
        _bench.Ports.TryFind(0xC204, out _, out _).Should().BeFalse();
    }

    [Fact]
    public void Bar64_WhenPlacedAbove4GiB_IsMapped()
    {
        _bench.Bus.Attach(_card, 5);
        _card.Reset();
        _bench.Write(5, 0x18, 0x0001_0000);
        _bench.Write(5, 0x1C, 0x12);
        _bench.Write(5, 0x04, 2, AccessWidth.Word);

        _bench.Mmio.TryFind(0x12_0001_0010, out _, out uint offset).Should().BeTrue();
        offset.Should().Be(0x10);
    }

    [Fact]
    public void Bar_OutsideTheMap_StaysHidden()
    {
        _bench.Bus.Attach(_card, 5);
        _card.Reset();
        _bench.Write(5, 0x04, 3, AccessWidth.Word);
        _bench.Write(5, 0x1C, 0x000F_FFFF);
        _bench.Write(5, 0x18, 0x0001_0000);
        _bench.Write(5, 0x1C, 0xFFFF_FFFF);
        _bench.Mmio.TryFind(0x000F_FFFF_0001_0000, out _, out _).Should().BeFalse();
    }

    [Fact]
    public void RamBar_WhenProgrammed_TellsTheMachine()
    {
        var mapper = new Mapper();
        var card = new RamCard(mapper);
        _bench.Bus.Attach(card, 6);
        card.Reset();
        _bench.Write(6, 0x10, 0xE000_0000);
        mapper.Place.Should().BeNull();
        _bench.Write(6, 0x04, 2, AccessWidth.Word);
        mapper.Place.Should().Be(0xE000_0000UL);
        card.Reset();
        mapper.Place.Should().BeNull();
    }

    [Fact]
    public void Rom_WhenEnabled_ShowsTheImage()
    {
        _bench.Bus.Attach(_card, 5);
        _card.Reset();
        _bench.Write(5, 0x04, 2, AccessWidth.Word);
        _bench.Write(5, 0x30, 0xFEB0_0000);
        _bench.Mmio.TryFind(0xFEB0_0000, out _, out _).Should().BeFalse();
        _bench.Write(5, 0x30, 0xFEB0_0001);
        _bench.Mmio.Read(0xFEB0_0000, AccessWidth.Word).Should().Be(0xAA55);
    }

    [Fact]
    public void Dma_WhileBusMasterIsClear_Fails()
    {
        _bench.Bus.Attach(_card, 5);
        _card.Reset();
        byte[] data = [1, 2, 3, 4];
        _card.Port.TryWrite(0x1000, data).Should().BeFalse();
        _card.Port.TryGetSlice(0x1000, 4, true, out _).Should().BeFalse();
        _bench.Write(5, 0x04, 4, AccessWidth.Word);
        _card.Port.TryWrite(0x1000, data).Should().BeTrue();
        _bench.Ram.ReadNumber(0x1000, 4).Should().Be(0x0403_0201);
    }

    [Theory]
    [InlineData(3, 11)]
    [InlineData(4, 11)]
    [InlineData(5, 10)]
    [InlineData(31, 11)]
    public void Intx_WhenRaised_ReachesTheRoutedIsaLine(int device, int irq)
    {
        _bench.Bus.Attach(_card, device);
        _card.Reset();
        _bench.Write(1, 0x60, 0x0B0B_0A0A);
        _card.Pin.Set(true);
        _bench.IsaLines[10].Level.Should().Be(irq == 10);
        _bench.IsaLines[11].Level.Should().Be(irq == 11);
        (_bench.Read(device, 0x06, AccessWidth.Word) & 8).Should().Be(8);
        _card.Pin.Set(false);
        _bench.IsaLines.Any(l => l.Level).Should().BeFalse();
        (_bench.Read(device, 0x06, AccessWidth.Word) & 8).Should().Be(0);
    }

    [Fact]
    public void Intx_WhenDisabledByCommand_LeavesTheWireButNotStatus()
    {
        _bench.Bus.Attach(_card, 3);
        _card.Reset();
        _bench.Write(1, 0x60, 0x0B0B_0A0A);
        _card.Pin.Set(true);
        _bench.Write(3, 0x04, 0x0400, AccessWidth.Word);
        _bench.IsaLines[11].Level.Should().BeFalse();
        (_bench.Read(3, 0x06, AccessWidth.Word) & 8).Should().Be(8);
        _bench.Write(3, 0x04, 0, AccessWidth.Word);
        _bench.IsaLines[11].Level.Should().BeTrue();
    }

    [Fact]
    public void Intx_OfTwoCardsOnOneInput_IsTheirOr()
    {
        var second = new Card();
        _bench.Bus.Attach(_card, 3);
        _bench.Bus.Attach(second, 7);
        _card.Reset();
        second.Reset();
        _bench.Write(1, 0x60, 0x0B0B_0A0A);
        _card.Pin.Set(true);
        second.Pin.Set(true);
        _card.Pin.Set(false);
        _bench.IsaLines[11].Level.Should().BeTrue();
        second.Pin.Set(false);
        _bench.IsaLines[11].Level.Should().BeFalse();
    }

    // PIIX3 §2.2.6: reserved IRQ numbers and bit 7 route nowhere; a route that changes takes the level along.
    [Fact]
    public void Router_WhenRerouted_MovesTheLevel()
    {
        _bench.Isa.SetPirq(0, true);
        _bench.IsaLines.Any(l => l.Level).Should().BeFalse();
        _bench.Write(1, 0x60, 0x05, AccessWidth.Byte);
        _bench.IsaLines[5].Level.Should().BeTrue();
        _bench.Write(1, 0x60, 0x0F, AccessWidth.Byte);
        _bench.IsaLines[5].Level.Should().BeFalse();
        _bench.IsaLines[15].Level.Should().BeTrue();
        _bench.Write(1, 0x60, 0x08, AccessWidth.Byte);
        _bench.IsaLines.Any(l => l.Level).Should().BeFalse();
    }

    [Fact]
    public void Msi_WhenEnabled_SendsAndSilencesIntx()
    {
        _bench.Bus.Attach(_card, 3);
        _card.Reset();
        _bench.Write(1, 0x60, 0x0B0B_0A0A);
        _card.Pin.Set(true);
        _card.SendMsi(1);
        _bench.Msi.Messages.Should().BeEmpty();
        int at = _card.MsiAt;
        _bench.Write(3, 0x04, 4, AccessWidth.Word);
        _bench.Write(3, at + 4, 0xFEE0_1000);
        _bench.Write(3, at + 12, 0x4040, AccessWidth.Word);
        _bench.Write(3, at + 2, 0x0011, AccessWidth.Word);
        _bench.IsaLines[11].Level.Should().BeFalse("MSI replaces INTx (PCI 3.0 §6.8.3.3)");
        _card.SendMsi(1);
        _bench.Msi.Messages.Should().Equal((0xFEE0_1000UL, 0x4041u));
    }

    [Fact]
    public void Msi_WithAnAddressInRam_IsAMemoryWrite()
    {
        _bench.Bus.Attach(_card, 3);
        _card.Reset();
        _bench.Write(3, 0x04, 4, AccessWidth.Word);
        _bench.Write(3, _card.MsiAt + 4, 0x2000);
        _bench.Write(3, _card.MsiAt + 12, 0x1234, AccessWidth.Word);
        _bench.Write(3, _card.MsiAt + 2, 0x0001, AccessWidth.Word);
        _card.SendMsi(0);
        _bench.Ram.ReadNumber(0x2000, 4).Should().Be(0x1234);
    }

    [Fact]
    public void MsiX_MaskedVector_IsPendingUntilUnmasked()
    {
        _bench.Plug(_card);
        ulong table = _bench.BarAddress(3, 4);
        _bench.Mmio.Read(table + 12, AccessWidth.Dword).Should().Be(1, "vectors are masked after reset");
        _bench.Write(3, _card.MsiXAt + 2, 0x8000, AccessWidth.Word);
        _bench.Mmio.Write(table + 16, AccessWidth.Dword, 0xFEE0_0000);
        _bench.Mmio.Write(table + 24, AccessWidth.Dword, 0x51);
        _card.SendMsiX(1);
        _bench.Msi.Messages.Should().BeEmpty();
        _bench.Mmio.Read(table + 2048, AccessWidth.Dword).Should().Be(2);
        _bench.Mmio.Write(table + 28, AccessWidth.Dword, 0);
        _bench.Msi.Messages.Should().Equal((0xFEE0_0000UL, 0x51u));
        _bench.Mmio.Read(table + 2048, AccessWidth.Qword).Should().Be(0);
        _card.SendMsiX(PciMsiX.NoVector);
        _bench.Msi.Messages.Should().HaveCount(1);
    }

    [Fact]
    public void MsiX_FunctionMask_HoldsAllVectors()
    {
        _bench.Plug(_card);
        ulong table = _bench.BarAddress(3, 4);
        _bench.Mmio.Write(table, AccessWidth.Qword, 0xFEE0_0000);
        _bench.Mmio.Write(table + 8, AccessWidth.Qword, 0x61);
        _bench.Write(3, _card.MsiXAt + 2, 0xC000, AccessWidth.Word);
        _card.SendMsiX(0);
        _bench.Msi.Messages.Should().BeEmpty();
        _bench.Write(3, _card.MsiXAt + 2, 0x8000, AccessWidth.Word);
        _bench.Msi.Messages.Should().Equal((0xFEE0_0000UL, 0x61u));
    }

    [Fact]
    public void State_SavedAndLoaded_IsTheSame()
    {
        _bench.Plug(_card);
        ulong table = _bench.BarAddress(3, 4);
        _bench.Mmio.Write(table, AccessWidth.Qword, 0xFEE0_0000);
        _card.Pin.Set(true);
        var other = new PciBench();
        var copy = new Card();
        other.Bus.Attach(copy, 3);
        copy.Reset();
        other.Write(1, 0x60, 0x0B0B_0A0A);
        DeviceCheck.Copy(_card, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(_card));
        other.Mmio.Read(table, AccessWidth.Dword).Should().Be(0xFEE0_0000, "BARs are mapped again");
        other.IsaLines[11].Level.Should().BeTrue("the pin is driven again");
    }

    [Fact]
    public void ConfigPorts_ByMechanismOne_ReachRegisters()
    {
        _bench.Bus.Attach(_card, 5);
        _card.Reset();
        _bench.Ports.Write(0xCF8, AccessWidth.Dword, 0x8000_2800);
        _bench.Ports.Read(0xCF8, AccessWidth.Dword).Should().Be(0x8000_2800);
        _bench.Ports.Read(0xCFC, AccessWidth.Dword).Should().Be(0x5678_1234);
        _bench.Ports.Read(0xCFE, AccessWidth.Word).Should().Be(0x5678);
        _bench.Ports.Write(0xCF8, AccessWidth.Dword, 0x8000_283C);
        _bench.Ports.Write(0xCFC, AccessWidth.Byte, 0x0B);
        _bench.Ports.Read(0xCFC, AccessWidth.Byte).Should().Be(0x0B);
        _bench.Ports.Write(0xCF8, AccessWidth.Dword, 0x8000_F800);
        _bench.Ports.Read(0xCFC, AccessWidth.Dword).Should().Be(0xFFFF_FFFF, "nobody is there");
        _bench.Ports.Write(0xCF8, AccessWidth.Dword, 0x8001_2800);
        _bench.Ports.Read(0xCFC, AccessWidth.Word).Should().Be(0xFFFF, "there is no bus 1");
        _bench.Ports.Write(0xCF8, AccessWidth.Dword, 0x0000_2800);
        _bench.Ports.Read(0xCFC, AccessWidth.Byte).Should().Be(0xFF, "the enable bit is clear");
    }

    // PIIX3 §2.5.4: a reset is made when RCPU (bit 2) goes from 0 to 1.
    [Fact]
    public void ResetPort_OnRisingBit2_AsksForReset()
    {
        _bench.Ports.Write(0xCF9, AccessWidth.Byte, 0x02);
        _bench.System.Requests.Should().BeEmpty();
        _bench.Ports.Read(0xCF9, AccessWidth.Byte).Should().Be(2);
        _bench.Ports.Write(0xCF9, AccessWidth.Byte, 0x06);
        _bench.System.Requests.Should().Equal((SystemRequest.Reset, "port 0xCF9"));
    }

    [Fact]
    public void Pam_WhenWritten_ConfiguresItsPiece()
    {
        var shadow = new Shadow();
        var bridge = new I440Fx(shadow);
        _bench.Bus.Attach(bridge, 0);
        bridge.Reset();
        shadow.Calls.Should().HaveCount(13).And.OnlyContain(c => !c.Read && !c.Write);
        shadow.Calls.Clear();
        _bench.Write(0, 0x59, 0x30, AccessWidth.Byte);
        _bench.Write(0, 0x5F, 0x21, AccessWidth.Byte);
        shadow.Calls.Should().Equal(
            (0xF0000u, 0x10000u, true, true), (0xE8000u, 0x4000u, true, false), (0xEC000u, 0x4000u, false, true));
        _bench.Read(0, 0x00).Should().Be(0x1237_8086);
    }

    [Fact]
    public void Allocator_OnABus_GivesDisjointAlignedPlaces()
    {
        for (int i = 3; i < 20; i++)
        {
            var card = new Card();
            _bench.Bus.Attach(card, i);
            card.Reset();
        }

        PciAllocator.Assign(_bench.Bus, 0xE000_0000, 0xFE00_0000).Should().BeEmpty();
        var places = Enumerable.Range(3, 17).Select(d => _bench.Read(d, 0x14)).ToArray();
        places.Should().OnlyHaveUniqueItems().And.OnlyContain(p => p % 0x4000 == 0 && p >= 0xE000_0000);
        _bench.Read(3, PciConfig.InterruptLine, AccessWidth.Byte).Should().Be(11);
        _bench.Read(1, 0x60).Should().Be(0x0B0B_0A0A);
        PciAllocator.Assign(_bench.Bus, 0xFDFF_0000, 0xFE00_0000).Should().NotBeEmpty();
    }

    [Fact]
    public void ConfigSpace_UnderRandomAccess_NeverThrows()
    {
        _bench.Bus.Attach(_card, 5);
        var ram = new RamCard(new Mapper());
        _bench.Bus.Attach(ram, 6);
        var bridge = new I440Fx(new Shadow());
        _bench.Bus.Attach(bridge, 0);
        var random = new Random(42);
        AccessWidth[] widths = [AccessWidth.Byte, AccessWidth.Word, AccessWidth.Dword];
        for (int i = 0; i < 30000; i++)
        {
            int function = random.Next(4) switch { 0 => 0, 1 => 8, 2 => 40, _ => 48 };
            AccessWidth width = widths[random.Next(3)];
            int offset = random.Next(256 / (int)width) * (int)width;
            _bench.Bus.WriteConfig(function, offset, width, (uint)random.NextInt64());
            _bench.Bus.ReadConfig(function, offset, width);
            if (i % 16 == 0)
            {
                _card.Pin.Set(random.Next(2) == 0);
                _card.SendMsi(random.Next(4));
                _card.SendMsiX(random.Next(5));
            }
        }

        DeviceCheck.Fuzz(_bench.ConfigPorts, 1, 20000);
        DeviceCheck.Fuzz(new PciEcam(_bench.Bus), 2, 20000);
    }

    private sealed class Shadow : IShadowRam
    {
        public System.Collections.Generic.List<(uint Start, uint Length, bool Read, bool Write)> Calls { get; } = [];

        public void Configure(uint start, uint lengthBytes, bool readRam, bool writeRam) =>
            Calls.Add((start, lengthBytes, readRam, writeRam));
    }

    private sealed class Mapper : IRamBarMapper
    {
        public ulong? Place { get; private set; }

        public void Move(ulong? guestAddress) => Place = guestAddress;
    }

    private sealed class RamCard : PciFunction
    {
        public RamCard(IRamBarMapper mapper)
            : base("ram", new PciIdentity(1, 2, 0x03_00_00)) =>
            AddRamBar(0, PciBarKind.Memory32Prefetchable, 1 << 24, mapper);

        public override int StateVersion => 1;

        protected override void ResetCard()
        {
        }

        protected override void SaveCard(StateWriter writer)
        {
        }

        protected override void LoadCard(StateReader reader, int version)
        {
        }
    }

    private sealed class Card : PciFunction
    {
        public Card()
            : base("card", new PciIdentity(0x1234, 0x5678, 0x01_02_03, 7, 0x1111, 0x2222))
        {
            AddBar(0, PciBarKind.Io, new ArrayWindow(20));
            AddBar(1, PciBarKind.Memory32, new ArrayWindow(0x3000));
            AddBar(2, PciBarKind.Memory64Prefetchable, new ArrayWindow(0x10000));
            byte[] rom = new byte[4096];
            rom[0] = 0x55;
            rom[1] = 0xAA;
            AddRom(rom);
            UseIntx();
            UseMsi(4);
            UseMsiX(3, 4);
        }

        public IIrqLine Pin => Intx;

        public IDmaPort Port => Dma;

        public int MsiAt { get; } = 0x40;

        public int MsiXAt { get; } = 0x50;

        public override int StateVersion => 1;

        public void SendMsi(int vector) => Msi!.Send(vector);

        public void SendMsiX(int vector) => MsiX!.Send(vector);

        protected override void ResetCard()
        {
        }

        protected override void SaveCard(StateWriter writer)
        {
        }

        protected override void LoadCard(StateReader reader, int version)
        {
        }
    }
}

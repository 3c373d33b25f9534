// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Text;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Firmware;
using Vmm.Devices.Legacy;
using Vmm.Devices.Pci;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>ACPI power management (82371AB chapter 7), HPET 1.0a, fw_cfg, and the one-byte ports.</summary>
public sealed class SystemTests
{
    private const ushort Pm = AcpiPm.DefaultPort;

    private readonly ManualClock _clock = new();
    private readonly PciBench _bench = new();
    private readonly FakeIrqLine _sci = new();
    private readonly FakeIrqLine[] _lines = FakeIrqLine.Many(24);
    private readonly FakeIrqLine _irq0 = new();
    private readonly FakeIrqLine _irq8 = new();

    private AcpiPm MakePm()
    {
        var pm = new AcpiPm(_clock, _sci, _bench.System);
        _bench.Bus.Attach(pm, 1, 3);
        pm.Reset();
        pm.Resume();
        pm.Enable();
        return pm;
    }

    private ulong Read(uint offset, AccessWidth width = AccessWidth.Word) => _bench.Ports.Read(Pm + offset, width);

    private void Write(uint offset, ulong value, AccessWidth width = AccessWidth.Word) =>
        _bench.Ports.Write(Pm + offset, width, value);

    [Fact]
    public void AcpiPm_BlockBase_FollowsConfiguration()
    {
        AcpiPm pm = MakePm();
        _bench.Ports.TryFind(Pm, out _, out _).Should().BeTrue();
        pm.WriteConfig(0x40, AccessWidth.Dword, 0xFFFF_FFFF);
        pm.ReadConfig(0x40, AccessWidth.Dword).Should().Be(0xFFC1);
        pm.WriteConfig(0x40, AccessWidth.Dword, 0xB000);
        _bench.Ports.TryFind(Pm, out _, out _).Should().BeFalse();
        _bench.Ports.TryFind(0xB03F, out _, out _).Should().BeTrue();
        pm.WriteConfig(0x80, AccessWidth.Byte, 0);
        _bench.Ports.TryFind(0xB000, out _, out _).Should().BeFalse();
        (pm.ReadConfig(0x58, AccessWidth.Dword) & (1 << 25)).Should().NotBe(0, "firmware must not look for SMM");
        _bench.Read(1, PciConfig.HeaderType, AccessWidth.Byte).Should().Be(0x80, "function 0 says there are more");
    }

    [Fact]
    public void PowerButton_WhenEnabled_RaisesSci()
    {
        AcpiPm pm = MakePm();
        pm.PressPowerButton().Should().BeFalse("nobody listens yet");
        _sci.Level.Should().BeFalse();
        Write(0, 0xFFFF);
        Write(2, 0x100);
        _bench.Ports.Map(AcpiPm.ApmPort, pm.ApmWindow);
        _bench.Ports.Write(AcpiPm.ApmPort, AccessWidth.Byte, AcpiPm.AcpiEnable);
        (Read(4) & 1).Should().Be(1);
        pm.ListensToPowerButton.Should().BeTrue();
        pm.PressPowerButton().Should().BeTrue();
        _sci.Level.Should().BeTrue();
        Read(0).Should().Be(0x100);
        Write(0, 0x100);
        _sci.Level.Should().BeFalse();
    }

    [Fact]
    public void Gpe_WhenEnabled_RaisesSci()
    {
        AcpiPm pm = MakePm();
        Write(4, 1);
        Write(14, 0x0004);
        pm.RaiseGpe(2);
        _sci.Level.Should().BeTrue();
        Write(12, 0x0004);
        _sci.Level.Should().BeFalse();
    }

    [Fact]
    public void PmTimer_RunsAt3Point58MHzIn24Bits()
    {
        MakePm();
        _clock.Advance(1_000_000_000);
        Read(8, AccessWidth.Dword).Should().Be(3_579_545);
        _clock.Advance(4_000_000_000);
        Read(8, AccessWidth.Dword).Should().Be((5 * 3_579_545) & 0xFF_FFFF);
    }

    [Fact]
    public void PmTimer_WhenBit23Changes_SetsStatusAndInterrupts()
    {
        MakePm();
        Write(4, 1);
        Write(2, 1);
        _clock.Advance(2_343_484_000);
        _sci.Level.Should().BeFalse();
        _clock.Advance(2_000_000);
        _sci.Level.Should().BeTrue();
        Write(0, 1);
        _sci.Level.Should().BeFalse();
    }

    [Theory]
    [InlineData(AcpiPm.SleepTypeS5, SystemRequest.PowerOff)]
    [InlineData(AcpiPm.SleepTypeS3, SystemRequest.SuspendToRam)]
    [InlineData(AcpiPm.SleepTypeS4, SystemRequest.Hibernate)]
    public void SleepEnable_AsksTheMachine(byte type, SystemRequest request)
    {
        MakePm();
        Write(4, (ulong)(type << 10));
        _bench.System.Requests.Should().BeEmpty();
        Write(4, (ulong)((type << 10) | 0x2001));
        _bench.System.Requests.Should().ContainSingle().Which.Request.Should().Be(request);
        (Read(4) & 0x2000).Should().Be(0, "SLP_EN reads as zero");
    }

    [Fact]
    public void AcpiPm_SavedAndLoaded_IsTheSame()
    {
        AcpiPm pm = MakePm();
        Write(2, 0x121);
        Write(4, 0x0401);
        pm.PressPowerButton();
        var other = new PciBench();
        var sci = new FakeIrqLine();
        var copy = new AcpiPm(_clock, sci, other.System);
        other.Bus.Attach(copy, 1, 3);
        copy.Reset();
        DeviceCheck.Copy(pm, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(pm));
        sci.Level.Should().BeTrue();
        other.Ports.TryFind(Pm, out IRegisterWindow window, out _).Should().BeTrue();
        DeviceCheck.Fuzz(window, 3, 20000, random => _clock.Advance(random.Next(100_000_000)));
        DeviceCheck.Fuzz(copy.ApmWindow, 4, 1000);
    }

    [Fact]
    public void SmallPorts_DoWhatTheySay()
    {
        var system = new FakeSystem();
        new DebugExitPort(system).Write(0, AccessWidth.Byte, 3);
        system.ExitStatus.Should().Be(7);
        var port92 = new Port92(system);
        port92.Reset();
        port92.Read(0, AccessWidth.Byte).Should().Be(2);
        port92.Write(0, AccessWidth.Byte, 0);
        system.IsA20Open.Should().BeFalse();

        // What the keyboard controller did shows here, too.
        system.SetA20(true);
        port92.Read(0, AccessWidth.Byte).Should().Be(2);
        port92.Write(0, AccessWidth.Byte, 0);
        port92.Reset();
        system.IsA20Open.Should().BeTrue();
        port92.Write(0, AccessWidth.Byte, 1);
        system.Requests.Should().Equal((SystemRequest.ProcessorReset, "port 0x92"));
        var post = new PostPort();
        post.Write(0, AccessWidth.Byte, 0x55);
        post.LastCode.Should().Be(0x55);
        var backend = new FakeCharBackend();
        var console = new DebugConsolePort(backend);
        console.Read(0, AccessWidth.Byte).Should().Be(0xE9);
        console.Write(0, AccessWidth.Byte, (byte)'x');
        backend.Output.Should().Equal((byte)'x');
        var panic = new PvPanic(system);
        panic.Write(0, AccessWidth.Byte, 0x81);
        panic.Unknown.Should().Be(1);
        system.Requests.Should().Contain((SystemRequest.GuestPanicked, "pvpanic"));
    }

    private Hpet MakeHpet()
    {
        var hpet = new Hpet(_clock, _lines, _irq0, _irq8, _bench.Msi);
        hpet.Reset();
        hpet.Resume();
        return hpet;
    }

    // HPET 1.0a §2.3.
    [Fact]
    public void Hpet_Registers_HaveResetValuesAndMasks()
    {
        Hpet hpet = MakeHpet();
        hpet.Read(0, AccessWidth.Qword).Should().Be(0x0098_9680_8086_A201);
        hpet.Read(0x10, AccessWidth.Qword).Should().Be(0);
        hpet.Read(0xF0, AccessWidth.Qword).Should().Be(0);
        hpet.Read(0x100, AccessWidth.Qword).Should().Be(0x00FF_0104_0000_8030);
        hpet.Read(0x108, AccessWidth.Qword).Should().Be(ulong.MaxValue);
        hpet.Write(0x10, AccessWidth.Qword, ulong.MaxValue);
        hpet.Read(0x10, AccessWidth.Qword).Should().Be(3);
        hpet.Write(0x100, AccessWidth.Qword, 0x2400);
        hpet.Read(0x100, AccessWidth.Dword).Should().Be(0xA430, "route 18 is offered");
        hpet.Write(0x100, AccessWidth.Qword, 0x0600);
        hpet.Read(0x100, AccessWidth.Dword).Should().Be(0xA430, "route 3 is not");
    }

    [Fact]
    public void Hpet_OneShotLevel_AssertsUntilCleared()
    {
        Hpet hpet = MakeHpet();
        hpet.Write(0x120, AccessWidth.Dword, (20 << 9) | 6);
        hpet.Write(0x128, AccessWidth.Qword, 1000);
        hpet.Write(0x10, AccessWidth.Dword, 1);
        _clock.Advance(9_990);
        _lines[20].Level.Should().BeFalse();
        _clock.Advance(10);
        _lines[20].Level.Should().BeTrue();
        hpet.Read(0xF0, AccessWidth.Qword).Should().Be(1000);
        hpet.Read(0x20, AccessWidth.Dword).Should().Be(2);
        hpet.Write(0x20, AccessWidth.Dword, 2);
        _lines[20].Level.Should().BeFalse();
    }

    [Fact]
    public void Hpet_Periodic_FollowsValueSet()
    {
        Hpet hpet = MakeHpet();
        hpet.Write(0x10, AccessWidth.Dword, 1);
        hpet.Write(0x100, AccessWidth.Dword, (16 << 9) | 0x4C);
        hpet.Write(0x108, AccessWidth.Qword, 100_000);
        hpet.Write(0x108, AccessWidth.Qword, 50_000);
        _clock.Advance(1_000_000);
        _lines[16].Rises.Should().Be(1);
        _clock.Advance(2_000_000);
        _lines[16].Rises.Should().Be(5);
        hpet.Write(0x108, AccessWidth.Dword, 1);
        int before = _lines[16].Rises;
        _clock.Advance(10_000_000);
        (_lines[16].Rises - before).Should().BeInRange(100, 202, "tiny periods are throttled");
    }

    [Fact]
    public void Hpet_LegacyReplacement_TakesTheChipsPlace()
    {
        Hpet hpet = MakeHpet();
        hpet.PitInput.Set(true);
        hpet.RtcInput.Set(true);
        _irq0.Level.Should().BeTrue();
        _irq8.Level.Should().BeTrue();
        hpet.Write(0x10, AccessWidth.Dword, 3);
        _irq0.Level.Should().BeFalse();
        _irq8.Level.Should().BeFalse();
        hpet.PitInput.Set(false);
        hpet.PitInput.Set(true);
        int before = _irq0.Rises;
        hpet.Write(0x100, AccessWidth.Dword, 4);
        hpet.Write(0x108, AccessWidth.Qword, 5000);
        hpet.Write(0x120, AccessWidth.Dword, 4);
        hpet.Write(0x128, AccessWidth.Qword, 6000);
        _clock.Advance(100_000);
        (_irq0.Rises - before).Should().Be(1);
        _irq8.Rises.Should().Be(2);
        hpet.Write(0x10, AccessWidth.Dword, 1);
        _irq0.Level.Should().BeTrue("the 8254's level is back");
    }

    [Fact]
    public void Hpet_Fsb_SendsItsMessage()
    {
        Hpet hpet = MakeHpet();
        hpet.Write(0x110, AccessWidth.Qword, 0xFEE0_1000_0000_0041);
        hpet.Write(0x100, AccessWidth.Dword, 0x4004);
        hpet.Write(0x108, AccessWidth.Qword, 100);
        hpet.Write(0x10, AccessWidth.Dword, 1);
        _clock.Advance(1000);
        _bench.Msi.Messages.Should().Equal((0xFEE0_1000UL, 0x41u));
    }

    [Fact]
    public void Hpet_SavedAndLoaded_IsTheSameAndNeverThrows()
    {
        Hpet hpet = MakeHpet();
        hpet.Write(0x10, AccessWidth.Dword, 1);
        hpet.Write(0x140, AccessWidth.Dword, (17 << 9) | 6);
        hpet.Write(0x148, AccessWidth.Qword, 5000);
        _clock.Advance(10_000);
        var copy = new Hpet(_clock, FakeIrqLine.Many(24), _irq0, _irq8, _bench.Msi);
        DeviceCheck.Copy(hpet, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(hpet));
        DeviceCheck.Fuzz(hpet, 1, 30000, random => _clock.Advance(random.Next(10_000)));
    }

    [Fact]
    public void FwCfg_ByPorts_GivesItemsAndFiles()
    {
        var fw = new FwCfg(_bench.Ram);
        fw.AddNumber(FwCfgKey.CpuCount, 4, 2);
        fw.AddFile("bootorder", "/a\n"u8);
        fw.AddFile("etc/e820", new byte[40]);
        fw.Reset();
        Item(fw, 0, 4).Should().Equal("QEMU"u8.ToArray());
        Item(fw, 1, 4).Should().Equal(3, 0, 0, 0);
        Item(fw, 5, 4).Should().Equal(4, 0, 0, 0);
        byte[] directory = Item(fw, 0x19, 132);
        BinaryPrimitives.ReadInt32BigEndian(directory).Should().Be(2);
        BinaryPrimitives.ReadInt32BigEndian(directory.AsSpan(4)).Should().Be(3);
        BinaryPrimitives.ReadUInt16BigEndian(directory.AsSpan(8)).Should().Be(0x20);
        Encoding.ASCII.GetString(directory, 12, 56).TrimEnd('\0').Should().Be("bootorder");
        Item(fw, 0x20, 5).Should().Equal((byte)'/', (byte)'a', (byte)'\n', 0, 0);
        fw.Read(4, AccessWidth.Qword).Should().Be(0x4746_4320_554D_4551, "\"QEMU CFG\" in memory order");
    }

    [Fact]
    public void FwCfg_ByDma_CopiesSkipsAndWrites()
    {
        byte[]? written = null;
        var fw = new FwCfg(_bench.Ram);
        fw.AddFile("data", "0123456789"u8);
        fw.AddFile("back", new byte[8], bytes => written = bytes);
        Dma(fw, 0x0020_000C, 3, 0).Should().Be(0);
        Dma(fw, 0x0000_0002, 10, 0x2000).Should().Be(0);
        _bench.Ram.Bytes.Slice(0x2000, 10).ToArray().Should().Equal("3456789\0\0\0"u8.ToArray());
        _bench.Ram.WriteNumber(0x3000, 8, 0x1122_3344_5566_7788);
        Dma(fw, 0x0021_0018, 8, 0x3000).Should().Be(0);
        written.Should().Equal(0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11);
        Dma(fw, 0x0020_0018, 4, 0x3000).Should().Be(1, "the file is read-only");
        Dma(fw, 0x0020_000A, 4, 0xFFFF_FFFF_0000).Should().Be(1, "no memory there");
        Dma(fw, 0x0020_000A, 0xFFFF_FFFF, 0x2000).Should().Be(1, "too long");
        fw.BadTransfers.Should().Be(3);
    }

    [Fact]
    public void FwCfg_SavedAndLoaded_IsTheSameAndNeverThrows()
    {
        var fw = new FwCfg(_bench.Ram);
        fw.AddFile("back", new byte[8], _ => { });
        fw.Write(0, AccessWidth.Word, 0x20);
        fw.Read(1, AccessWidth.Byte);
        var copy = new FwCfg(_bench.Ram);
        copy.AddFile("back", new byte[8], _ => { });
        DeviceCheck.Copy(fw, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(fw));
        DeviceCheck.Fuzz(fw, 1, 20000, random => random.NextBytes(_bench.Ram.Bytes[..64]));
    }

    [Fact]
    public void TableLoader_Commands_Are128Bytes()
    {
        var loader = new TableLoader();
        loader.Allocate("etc/acpi/tables", 64, inLowMemory: false);
        loader.AddPointer("etc/acpi/rsdp", "etc/acpi/tables", 16, 4);
        loader.AddChecksum("etc/acpi/rsdp", 8, 0, 20);
        loader.WritePointer("etc/x", 0, 8, "etc/y", 40);
        byte[] script = loader.ToArray();
        script.Should().HaveCount(512);
        script[0].Should().Be(1);
        script[64].Should().Be(1);
        script[128 + 120].Should().Be(4);
        script[256].Should().Be(3);
        script[384 + 124].Should().Be(8);
    }

    private static byte[] Item(FwCfg fw, ushort key, int length)
    {
        fw.Write(0, AccessWidth.Word, key);
        var bytes = new byte[length];
        for (int i = 0; i < length; i++)
        {
            bytes[i] = (byte)fw.Read(1, AccessWidth.Byte);
        }

        return bytes;
    }

    private uint Dma(FwCfg fw, uint control, uint length, ulong address)
    {
        Span<byte> descriptor = _bench.Ram.Bytes.Slice(0x1000, 16);
        BinaryPrimitives.WriteUInt32BigEndian(descriptor, control);
        BinaryPrimitives.WriteUInt32BigEndian(descriptor[4..], length);
        BinaryPrimitives.WriteUInt64BigEndian(descriptor[8..], address);
        fw.Write(4, AccessWidth.Dword, 0);
        fw.Write(8, AccessWidth.Dword, BinaryPrimitives.ReverseEndianness(0x1000u));
        return BinaryPrimitives.ReadUInt32BigEndian(descriptor);
    }
}

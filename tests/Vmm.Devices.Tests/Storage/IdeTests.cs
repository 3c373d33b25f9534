// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Text;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Pci;
using Vmm.Devices.Storage;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Storage;

/// <summary>The PIIX3's channels through their ports, as a guest sees them.</summary>
public sealed class IdeTests
{
    private const int DiskBytes = 4 << 20;
    private const int Busy = 0x80;
    private const int Ready = 0x50;
    private const int Drq = 0x58;
    private readonly Rig _rig = new();

    [Fact]
    public void Identify_Disk_ShowsSizeNamesAndChecksum()
    {
        // ATA/ATAPI-7 vol. 1 §6.17
        _rig.Out(6, 0xA0);
        _rig.Out(7, 0xEC);
        _rig.In(7).Should().Be(Drq);
        byte[] data = _rig.ReadBlock(512);
        _rig.In(7).Should().Be(Ready);
        Word(data, 0).Should().Be(0x0040);
        (Word(data, 60) | (Word(data, 61) << 16)).Should().Be(DiskBytes / 512);
        BinaryPrimitives.ReadInt64LittleEndian(data.AsSpan(200)).Should().Be(DiskBytes / 512);
        Text(data, 10, 20).Should().Be("SN1");
        Text(data, 27, 40).Should().Be("VMM HARDDISK");
        (Word(data, 83) & 0x7400).Should().Be(0x7400, "LBA48, FLUSH CACHE and FLUSH CACHE EXT");
        data[510].Should().Be(0xA5);
        byte sum = 0;
        foreach (byte value in data)
        {
            sum += value;
        }

        sum.Should().Be(0);
    }

    [Fact]
    public void Signatures_AfterSoftwareReset_TellDiskFromCd()
    {
        // vol. 1 §5.21
        _rig.OutControl(4);
        _rig.InControl().Should().Be(Busy);
        _rig.OutControl(0);
        _rig.Registers().Should().Equal(1, 1, 1, 0, 0);
        _rig.In(7).Should().Be(Ready);
        _rig.Secondary = true;
        _rig.OutControl(4);
        _rig.OutControl(0);
        _rig.Registers().Should().Equal(1, 1, 1, 0x14, 0xEB);
    }

    [Fact]
    public void MissingSlave_ReadsStatusZero_AndTakesNoCommands()
    {
        // vol. 2 §9.16.1
        _rig.Out(6, 0xB0);
        _rig.In(7).Should().Be(0);
        _rig.Out(7, 0xEC);
        _rig.In(7).Should().Be(0);
        _rig.Irq14.Level.Should().BeFalse();
    }

    [Fact]
    public void EmptyChannel_ReadsPulledDown_AndKeepsNothing()
    {
        var rig = new Rig(withDrives: false);
        rig.Out(2, 0x55);
        rig.In(2).Should().Be(0x7F);
        rig.In(7).Should().Be(0x7F);
    }

    [Theory]
    [InlineData(0x20, false, 1)]
    [InlineData(0x24, true, 1)]
    [InlineData(0xC4, false, 8)]
    [InlineData(0x29, true, 8)]
    public void PioRead_EveryBlockInterrupts_AndDataIsRight(int command, bool isExtended, int perBlock)
    {
        // vol. 3 §11.4: one interrupt per data request block, none after the last.
        _rig.SetMultiple(8);
        const int lba = 1234;
        const int count = 300;
        if (isExtended)
        {
            _rig.Address48(lba, count);
        }
        else
        {
            _rig.Address28(lba, count & 0xFF);
        }

        int sectors = isExtended ? count : count & 0xFF;
        _rig.Out(7, command);
        _rig.In(7).Should().Be(0xD0);
        int interrupts = 0;
        byte[] all = new byte[sectors * 512];
        for (int at = 0; at < sectors;)
        {
            _rig.Disk.Drain();
            _rig.Irq14.Level.Should().BeTrue();
            interrupts++;
            _rig.In(7).Should().Be(Drq);
            _rig.Irq14.Level.Should().BeFalse("reading Status acknowledges");
            int part = Math.Min(perBlock, sectors - at);
            _rig.ReadBlock(part * 512).CopyTo(all, at * 512);
            at += part;
        }

        _rig.Irq14.Level.Should().BeFalse();
        _rig.In(7).Should().Be(Ready);
        interrupts.Should().Be((sectors + perBlock - 1) / perBlock);
        all.AsSpan().SequenceEqual(_rig.Disk.Bytes.AsSpan(lba * 512, sectors * 512)).Should().BeTrue();
    }

    [Theory]
    [InlineData(0x30, false, 1, false)]
    [InlineData(0x34, true, 1, false)]
    [InlineData(0xC5, false, 8, false)]
    [InlineData(0xCE, true, 8, true)]
    public void PioWrite_DataReachesTheDisk_AndFuaIsAsked(int command, bool isExtended, int perBlock, bool forced)
    {
        // vol. 3 §11.5: no interrupt before the first block, one after each.
        _rig.SetMultiple(8);
        const int lba = 77;
        const int sectors = 200;
        if (isExtended)
        {
            _rig.Address48(lba, sectors);
        }
        else
        {
            _rig.Address28(lba, sectors);
        }

        byte[] data = new byte[sectors * 512];
        new Random(3).NextBytes(data);
        _rig.Out(7, command);
        _rig.Irq14.Level.Should().BeFalse();
        for (int at = 0; at < sectors;)
        {
            _rig.In(7).Should().Be(Drq);
            int part = Math.Min(perBlock, sectors - at);
            _rig.WriteBlock(data.AsSpan(at * 512, part * 512));
            at += part;
            _rig.Disk.Drain();
            _rig.Irq14.Level.Should().BeTrue();
        }

        _rig.In(7).Should().Be(Ready);
        _rig.Disk.Bytes.AsSpan(lba * 512, data.Length).SequenceEqual(data).Should().BeTrue();
        _rig.Disk.Log.Should().OnlyContain(entry => entry.Forced == forced);
    }

    [Fact]
    public void ChsRead_UsesTheGeometryThatTheHostSet()
    {
        _rig.Out(6, 0xA0 | 7);
        _rig.Out(2, 17);
        _rig.Out(7, 0x91);
        _rig.In(7).Should().Be(Ready);

        // Cylinder 3, head 5, sector 9 of 8 heads and 17 sectors.
        _rig.Out(2, 1);
        _rig.Out(3, 9);
        _rig.Out(4, 3);
        _rig.Out(5, 0);
        _rig.Out(6, 0xA0 | 5);
        _rig.Out(7, 0x20);
        _rig.Disk.Drain();
        int lba = (((3 * 8) + 5) * 17) + 9 - 1;
        _rig.ReadBlock(512).AsSpan().SequenceEqual(_rig.Disk.Bytes.AsSpan(lba * 512, 512)).Should().BeTrue();
    }

    [Theory]
    [InlineData(0xC8, false)]
    [InlineData(0x25, true)]
    public void DmaRead_ScattersOverThePrdTable_AndMarksPages(int command, bool isExtended)
    {
        // SFF-8038i §1.2
        _rig.Prd((0x10002, 512), (0x20000, 4096), (0x30000, 0x10000));
        const int lba = 40;
        const int sectors = 137;
        if (isExtended)
        {
            _rig.Address48(lba, sectors);
        }
        else
        {
            _rig.Address28(lba, sectors);
        }

        _rig.Out(7, command);
        _rig.In(7).Should().Be(0xD0);
        _rig.BusMaster(0, 9);
        _rig.BusMasterStatus().Should().Be(1);
        _rig.Disk.Drain();
        _rig.Irq14.Level.Should().BeTrue();
        _rig.BusMasterStatus().Should().Be(4, "interrupt, not active: table and transfer are of one length");
        _rig.In(7).Should().Be(Ready);
        byte[] expected = _rig.Disk.Bytes.AsSpan(lba * 512, sectors * 512).ToArray();
        _rig.Ram.Bytes.Slice(0x10002, 512).SequenceEqual(expected.AsSpan(0, 512)).Should().BeTrue();
        _rig.Ram.Bytes.Slice(0x20000, 4096).SequenceEqual(expected.AsSpan(512, 4096)).Should().BeTrue();
        _rig.Ram.Bytes.Slice(0x30000, expected.Length - 4608).SequenceEqual(expected.AsSpan(4608)).Should().BeTrue();
        _rig.Ram.Marked.Should().Contain((0x20000UL, 4096));
    }

    [Fact]
    public void DmaRead_AnsweredAtOnce_IsDoneWhenTheEngineHasBeenStarted()
    {
        _rig.Disk.AnswersAtOnce = true;
        _rig.Prd((0x20000, 0x4000));
        for (int round = 0; round < 100; round++)
        {
            _rig.Address48(round * 32, 32);
            _rig.Out(7, 0x25);
            _rig.BusMaster(0, 9);
            _rig.BusMasterStatus().Should().Be(4);
            _rig.In(7).Should().Be(Ready);
            _rig.BusMaster(0, 0);
            _rig.BusMaster(2, 4);
            _rig.Ram.Bytes.Slice(0x20000, 0x4000).SequenceEqual(_rig.Disk.Bytes.AsSpan(round * 32 * 512, 0x4000)).Should().BeTrue();
        }

        _rig.Disk.MaxDepth.Should().Be(1);
    }

    [Fact]
    public void DmaWrite_StartedBeforeTheCommand_WorksToo()
    {
        new Random(9).NextBytes(_rig.Ram.Bytes[0x20000..0x22000]);
        _rig.Prd((0x20000, 0x2000));
        _rig.BusMaster(0, 1);
        _rig.Address48(500, 16);
        _rig.Out(7, 0x3D);
        _rig.Disk.Drain();
        _rig.Disk.Bytes.AsSpan(500 * 512, 0x2000).SequenceEqual(_rig.Ram.Bytes.Slice(0x20000, 0x2000)).Should().BeTrue();
        _rig.Disk.Log[^1].Forced.Should().BeTrue("WRITE DMA FUA EXT");
    }

    [Fact]
    public void PrdTable_TooLong_LeavesActiveSet()
    {
        // SFF-8038i §3.1, status bits: Interrupt 1, Active 1
        _rig.Prd((0x20000, 0x4000));
        _rig.Address28(0, 8);
        _rig.Out(7, 0xC8);
        _rig.BusMaster(0, 9);
        _rig.Disk.Drain();
        _rig.BusMasterStatus().Should().Be(5);
        _rig.BusMaster(0, 0);
        _rig.BusMasterStatus().Should().Be(4);
        _rig.BusMaster(2, 4);
        _rig.BusMasterStatus().Should().Be(0);
    }

    [Fact]
    public void PrdTable_TooShort_LeavesTheDriveBusyWithoutInterrupt()
    {
        _rig.Prd((0x20000, 512));
        _rig.Address28(0, 8);
        _rig.Out(7, 0xC8);
        _rig.BusMaster(0, 9);
        _rig.Disk.Drain();
        _rig.BusMasterStatus().Should().Be(0);
        _rig.Irq14.Level.Should().BeFalse();
        _rig.In(7).Should().Be(0xD0);
        _rig.OutControl(4);
        _rig.OutControl(0);
        _rig.In(7).Should().Be(Ready);
    }

    [Fact]
    public void PrdTable_OutsideRam_SetsErrorAndAborts()
    {
        _rig.Prd((0xF000_0000, 4096));
        _rig.Address28(0, 8);
        _rig.Out(7, 0xC8);
        _rig.BusMaster(0, 9);
        _rig.BusMasterStatus().Should().Be(6);
        (_rig.In(7) & 1).Should().Be(1);
    }

    [Fact]
    public void StoppingTheEngine_WhileTheHostWorks_WaitsForIt()
    {
        _rig.Prd((0x20000, 4096));
        _rig.Address28(0, 8);
        _rig.Out(7, 0xC8);
        _rig.BusMaster(0, 9);
        _rig.BusMaster(0, 8);
        _rig.BusMasterStatus().Should().Be(1, "RAM may still be written");
        _rig.Disk.Drain();
        _rig.BusMasterStatus().Should().Be(0);
        _rig.In(7).Should().Be(0xD0, "the drive still wants to move data");
        _rig.BusMaster(0, 9);
        _rig.Disk.Drain();
        _rig.In(7).Should().Be(Ready);
    }

    [Fact]
    public void SoftwareReset_WhileTheHostWorks_EndsAfterIt()
    {
        _rig.Address28(0, 8);
        _rig.Out(7, 0x20);
        _rig.OutControl(4);
        _rig.OutControl(0);
        _rig.InControl().Should().Be(Busy);
        _rig.Disk.Drain();
        _rig.InControl().Should().Be(Ready);
        _rig.Registers().Should().Equal(1, 1, 1, 0, 0);
        _rig.Irq14.Level.Should().BeFalse();
    }

    [Fact]
    public void HostError_OnRead_IsUncorrectableWithTheAddress()
    {
        _rig.Disk.NextStatus = BlockStatus.IoError;
        _rig.Address28(1000, 4);
        _rig.Out(7, 0x20);
        _rig.Disk.Drain();
        _rig.In(7).Should().Be(0x51);
        _rig.Registers().Should().Equal(0x40, 4, 1000 & 0xFF, 1000 >> 8, 0);
    }

    [Fact]
    public void AddressBehindTheEnd_IsNotFound()
    {
        _rig.Address28((DiskBytes / 512) - 1, 2);
        _rig.Out(7, 0x20);
        _rig.In(7).Should().Be(0x51);
        _rig.In(1).Should().Be(0x10);
        _rig.Irq14.Rises.Should().BeGreaterThan(0);
    }

    [Fact]
    public void Flush_AndCacheOff_ReachTheBackend()
    {
        _rig.Out(7, 0xEA);
        _rig.In(7).Should().Be(0xD0);
        _rig.Disk.Drain();
        _rig.In(7).Should().Be(Ready);
        _rig.Out(1, 0x82);
        _rig.Out(7, 0xEF);
        _rig.Disk.Drain();
        _rig.Address28(0, 1);
        _rig.Out(7, 0x30);
        _rig.WriteBlock(new byte[512]);
        _rig.Disk.Drain();
        _rig.Disk.Log.Should().Equal(
            (BlockOperation.Flush, 0L, 0L, false),
            (BlockOperation.Flush, 0L, 0L, false),
            (BlockOperation.Write, 0L, 512L, true));
    }

    [Fact]
    public void Trim_RangesOfTheList_AreDiscarded()
    {
        // ATA8-ACS §7.8
        BinaryPrimitives.WriteUInt64LittleEndian(_rig.Ram.Bytes[0x20000..], (8UL << 48) | 100);
        BinaryPrimitives.WriteUInt64LittleEndian(_rig.Ram.Bytes[0x20008..], (16UL << 48) | 300);
        _rig.Prd((0x20000, 512));
        _rig.Out(1, 1);
        _rig.Address48(0, 1);
        _rig.Out(7, 0x06);
        _rig.BusMaster(0, 1);
        _rig.Disk.Drain();
        _rig.In(7).Should().Be(Ready);
        _rig.Disk.Log.Should().Equal(
            (BlockOperation.Discard, 51200L, 4096L, false), (BlockOperation.Discard, 153600L, 8192L, false));
    }

    [Fact]
    public void NoInterruptEnable_KeepsTheLineLow()
    {
        _rig.OutControl(2);
        _rig.Out(7, 0xEC);
        _rig.Irq14.Level.Should().BeFalse();
        _rig.OutControl(0);
        _rig.Irq14.Level.Should().BeTrue("the interrupt is still pending");
        _rig.In(7);
        _rig.Irq14.Level.Should().BeFalse();
    }

    [Fact]
    public void UnknownCommand_Aborts()
    {
        _rig.Out(7, 0xFF);
        _rig.In(7).Should().Be(0x51);
        _rig.In(1).Should().Be(4);
    }

    [Fact]
    public void Channels_AreOffUntilFirmwareTurnsThemOn()
    {
        // 290550 §2.3.9: IDETIM is 0000h after reset.
        var rig = new Rig(enable: false);
        rig.In(7).Should().Be(0xFF);
        rig.Ide.WriteConfig(0x40, AccessWidth.Word, 0x8000);
        rig.In(7).Should().Be(Ready);
        rig.Secondary = true;
        rig.In(7).Should().Be(0xFF);
    }

    [Fact]
    public void SaveLoad_InTheMiddleOfPioTransfers_Continues()
    {
        _rig.Address28(64, 8);
        _rig.Out(7, 0x20);
        _rig.Disk.Drain();
        byte[] first = _rig.ReadBlock(700);
        var other = new Rig();
        DeviceCheck.Copy(_rig.Ide, other.Ide);
        byte[] rest = other.ReadBlock((8 * 512) - 700);
        byte[] all = [.. first, .. rest];
        all.AsSpan().SequenceEqual(_rig.Disk.Bytes.AsSpan(64 * 512, 8 * 512)).Should().BeTrue();

        other.Address28(10, 2);
        other.Out(7, 0x30);
        byte[] data = new byte[1024];
        new Random(4).NextBytes(data);
        other.WriteBlock(data.AsSpan(0, 600));
        var third = new Rig();
        DeviceCheck.Copy(other.Ide, third.Ide);
        DeviceCheck.StateOf(third.Ide).Should().Equal(DeviceCheck.StateOf(other.Ide));
        third.WriteBlock(data.AsSpan(600));
        third.Disk.Drain();
        third.Disk.Bytes.AsSpan(5120, 1024).SequenceEqual(data).Should().BeTrue();
    }

    [Fact]
    public void Packet_Inquiry_NamesACdRom()
    {
        _rig.Secondary = true;
        _rig.SkipAttention();
        byte[] data = _rig.Packet([0x12, 0, 0, 0, 36, 0, 0, 0, 0, 0, 0, 0]);
        data.Length.Should().Be(36);
        data[0].Should().Be(5);
        data[1].Should().Be(0x80);
        Encoding.ASCII.GetString(data, 8, 8).Should().Be("VMM     ");
    }

    [Theory]
    [InlineData(0xFFFE, 31)]
    [InlineData(2048, 1)]
    [InlineData(1000, 0)]
    public void Packet_Read10Pio_KeepsToTheByteLimit(int limit, int blocksPerBurst)
    {
        // vol. 1 §6.24: byte count limit in LBA mid and high.
        _rig.Secondary = true;
        _rig.SkipAttention();
        byte[] data = _rig.Packet([0x28, 0, 0, 0, 0, 5, 0, 0, 70, 0, 0, 0], limit, out int largest);
        data.AsSpan().SequenceEqual(_rig.Cd.Bytes.AsSpan(5 * 2048, 70 * 2048)).Should().BeTrue();
        largest.Should().Be(blocksPerBurst == 0 ? limit : blocksPerBurst * 2048);
    }

    [Fact]
    public void Packet_Read12Dma_FillsRam()
    {
        _rig.Secondary = true;
        _rig.SkipAttention();
        _rig.Prd((0x20000, 8192));
        _rig.Out(1, 1);
        _rig.Out(7, 0xA0);
        _rig.WriteBlock([0xA8, 0, 0, 0, 0, 9, 0, 0, 0, 4, 0, 0]);
        _rig.BusMaster(0, 9);
        _rig.Cd.Drain();
        _rig.In(7).Should().Be(Ready);
        _rig.In(2).Should().Be(3, "command/data and I/O: status phase");
        _rig.Ram.Bytes.Slice(0x20000, 8192).SequenceEqual(_rig.Cd.Bytes.AsSpan(9 * 2048, 8192)).Should().BeTrue();
    }

    [Fact]
    public void Packet_FirstCommandAfterPowerOn_ReportsIt()
    {
        // MMC-5 §4.1.6.1: unit attention, sense 29h
        _rig.Secondary = true;
        _rig.Packet([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).Should().BeEmpty();
        _rig.In(7).Should().Be(0x51);
        _rig.In(1).Should().Be(0x64);
        byte[] sense = _rig.Packet([3, 0, 0, 0, 18, 0, 0, 0, 0, 0, 0, 0]);
        (sense[2], sense[12], sense[13]).Should().Be((6, 0x29, 0));
        _rig.Packet([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        _rig.In(7).Should().Be(Ready);
    }

    [Fact]
    public void MediumChange_IsAnnounced_AndALockedTrayAsks()
    {
        _rig.Secondary = true;
        _rig.SkipAttention();
        _rig.Packet([0x1E, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        _rig.CdDrive.IsLocked.Should().BeTrue();
        _rig.CdDrive.TryChangeMedium(null, force: false, out _).Should().BeFalse();
        byte[] pollEvent = [0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8, 0, 0, 0];
        _rig.Packet(pollEvent)[4].Should().Be(1, "eject request");
        _rig.Packet(pollEvent)[4].Should().Be(0, "told once");

        _rig.CdDrive.TryChangeMedium(FakeDisk.Random(1 << 20, 8), force: true, out IBlockBackend? old).Should().BeTrue();
        old.Should().Be(_rig.Cd);
        _rig.Packet(pollEvent)[4].Should().Be(2, "new medium");
        _rig.Packet([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        byte[] sense = _rig.Packet([3, 0, 0, 0, 18, 0, 0, 0, 0, 0, 0, 0]);
        (sense[2], sense[12]).Should().Be((6, 0x28));
        byte[] capacity = _rig.Packet([0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        BinaryPrimitives.ReadUInt32BigEndian(capacity).Should().Be((1 << 20) / 2048 - 1);
    }

    [Fact]
    public void Eject_ByTheGuest_OpensTheTray()
    {
        _rig.Secondary = true;
        _rig.SkipAttention();
        _rig.Packet([0x1B, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        _rig.CdDrive.IsTrayOpen.Should().BeTrue();
        _rig.Packet([0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]).Should().BeEmpty();
        byte[] sense = _rig.Packet([3, 0, 0, 0, 18, 0, 0, 0, 0, 0, 0, 0]);
        (sense[2], sense[12], sense[13]).Should().Be((2, 0x3A, 2));
        _rig.Packet([0x1B, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        _rig.CdDrive.IsTrayOpen.Should().BeFalse();
    }

    [Fact]
    public void ReadToc_OneDataTrackAndLeadOut()
    {
        _rig.Secondary = true;
        _rig.SkipAttention();
        byte[] toc = _rig.Packet([0x43, 0, 0, 0, 0, 0, 0, 0, 100, 0, 0, 0]);
        toc.Length.Should().Be(20);
        (toc[2], toc[3], toc[5], toc[14]).Should().Be((1, 1, 0x14, 0xAA));
        BinaryPrimitives.ReadInt32BigEndian(toc.AsSpan(16)).Should().Be((2 << 20) / 2048);
        toc = _rig.Packet([0x43, 2, 0, 0, 0, 0, 0, 0, 100, 0, 0, 0]);
        toc[8..12].Should().Equal(0, 0, 2, 0);
    }

    [Fact]
    public void IdentifyDevice_OnACd_AbortsWithTheSignature()
    {
        _rig.Secondary = true;
        _rig.Out(7, 0xEC);
        (_rig.In(7) & 1).Should().Be(1);
        (_rig.In(4), _rig.In(5)).Should().Be((0x14, 0xEB));
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void RandomAccess_NeverThrows(int seed)
    {
        var random = new Random(seed);
        for (int i = 0; i < 20_000; i++)
        {
            _rig.Secondary = random.Next(2) == 0;
            switch (random.Next(12))
            {
                case 0:
                    int[] commands = [0x20, 0x24, 0x25, 0x30, 0x35, 0xC4, 0xC5, 0xC8, 0xCA, 0xA0, 0xEC, 0xE7, 0x06, 0xEF, 0xB0, 0x08, 0x90];
                    _rig.Out(7, random.Next(4) == 0 ? random.Next(256) : commands[random.Next(commands.Length)]);
                    break;
                case 1:
                    _rig.OutControl(random.Next(20) == 0 ? random.Next(256) : 0);
                    break;
                case 2:
                    _rig.BusMaster(random.Next(8), random.Next(256));
                    break;
                case 3:
                    _ = _rig.In(random.Next(1, 8));
                    break;
                case 4:
                    _rig.Disk.NextStatus = random.Next(10) == 0 ? BlockStatus.IoError : BlockStatus.Ok;
                    _ = random.Next(2) == 0 ? _rig.Disk.Step() : _rig.Cd.Step();
                    break;
                case 5 or 6 or 7:
                    for (int n = random.Next(600); n > 0; n--)
                    {
                        _ = _rig.ReadData(random.Next(2) == 0 ? AccessWidth.Word : AccessWidth.Dword);
                    }

                    break;
                case 8 or 9:
                    for (int n = random.Next(600); n > 0; n--)
                    {
                        _rig.WriteData(AccessWidth.Word, (ulong)random.Next(65536));
                    }

                    break;
                default:
                    _rig.Out(random.Next(1, 7), random.Next(3) == 0 ? random.Next(256) : random.Next(4));
                    break;
            }

            if (i % 5000 == 0)
            {
                _rig.Ide.Pause();
                DeviceCheck.Copy(_rig.Ide, new Rig().Ide);
                _rig.Ide.Resume();
            }
        }
    }

    private static int Word(byte[] data, int index) => BinaryPrimitives.ReadUInt16LittleEndian(data.AsSpan(index * 2));

    private static string Text(byte[] data, int word, int length)
    {
        var text = new StringBuilder();
        for (int i = 0; i < length; i++)
        {
            text.Append((char)data[(word * 2) + (i ^ 1)]);
        }

        return text.ToString().TrimEnd();
    }

    private sealed class Rig
    {
        private const ulong BusMasterBase = 0xC000;
        private readonly AddressMap _ports = new("io", 0x10000);

        public Rig(bool withDrives = true, bool enable = true)
        {
            Disk = FakeDisk.Random(DiskBytes, 1);
            Cd = FakeDisk.Random(2 << 20, 2);
            CdDrive = new AtapiCdrom(Cd, "SN2");
            AtaDevice?[] drives = withDrives
                ? [new AtaDisk(Disk, "SN1"), null, CdDrive, null]
                : [null, null, null, null];
            Ide = new Piix3Ide(drives, Irq14, Irq15, enable);
            var bus = new PciBus(_ports, new AddressMap("mmio", 0), Ram, new FakeMsiSink());
            bus.Attach(Ide, 1, 1);
            Ide.Reset();
            Ide.WriteConfig(0x20, AccessWidth.Dword, (uint)BusMasterBase);
            Ide.WriteConfig(4, AccessWidth.Word, 5);
        }

        public FakeIrqLine Irq14 { get; } = new();

        public FakeIrqLine Irq15 { get; } = new();

        public TestRam Ram { get; } = new(1 << 20);

        public FakeDisk Disk { get; }

        public FakeDisk Cd { get; }

        public AtapiCdrom CdDrive { get; }

        public Piix3Ide Ide { get; }

        public bool Secondary { get; set; }

        private ulong Base => Secondary ? 0x170UL : 0x1F0UL;

        public int In(int register) => (int)_ports.Read(Base + (uint)register, AccessWidth.Byte);

        public void Out(int register, int value) => _ports.Write(Base + (uint)register, AccessWidth.Byte, (ulong)value);

        public int InControl() => (int)_ports.Read(Base + 0x206, AccessWidth.Byte);

        public void OutControl(int value) => _ports.Write(Base + 0x206, AccessWidth.Byte, (ulong)value);

        public int[] Registers() => [In(1), In(2), In(3), In(4), In(5)];

        public ulong ReadData(AccessWidth width) => _ports.Read(Base, width);

        public void WriteData(AccessWidth width, ulong value) => _ports.Write(Base, width, value);

        public byte[] ReadBlock(int length)
        {
            byte[] data = new byte[length];
            for (int i = 0; i < length; i += 2)
            {
                BinaryPrimitives.WriteUInt16LittleEndian(data.AsSpan(i), (ushort)ReadData(AccessWidth.Word));
            }

            return data;
        }

        public void WriteBlock(ReadOnlySpan<byte> data)
        {
            for (int i = 0; i < data.Length; i += 2)
            {
                WriteData(AccessWidth.Word, BinaryPrimitives.ReadUInt16LittleEndian(data[i..]));
            }
        }

        public void Address28(int lba, int count)
        {
            Out(2, count);
            Out(3, lba & 0xFF);
            Out(4, (lba >> 8) & 0xFF);
            Out(5, (lba >> 16) & 0xFF);
            Out(6, 0xE0 | (lba >> 24));
        }

        public void Address48(int lba, int count)
        {
            Out(2, count >> 8);
            Out(2, count & 0xFF);
            Out(3, (lba >> 24) & 0xFF);
            Out(3, lba & 0xFF);
            Out(4, 0);
            Out(4, (lba >> 8) & 0xFF);
            Out(5, 0);
            Out(5, (lba >> 16) & 0xFF);
            Out(6, 0xE0);
        }

        public void SetMultiple(int count)
        {
            Out(6, 0xE0);
            Out(2, count);
            Out(7, 0xC6);
            In(7).Should().Be(Ready);
        }

        public void BusMaster(int register, int value) =>
            _ports.Write(BusMasterBase + (Secondary ? 8u : 0u) + (uint)register, AccessWidth.Byte, (ulong)value);

        public int BusMasterStatus() =>
            (int)_ports.Read(BusMasterBase + (Secondary ? 8u : 0u) + 2, AccessWidth.Byte);

        public void Prd(params (uint Address, int Length)[] entries)
        {
            const uint table = 0x8000;
            for (int i = 0; i < entries.Length; i++)
            {
                Ram.WriteNumber(table + (ulong)(i * 8), 4, entries[i].Address);
                uint flags = (uint)(entries[i].Length & 0xFFFF) | (i == entries.Length - 1 ? 0x8000_0000 : 0);
                Ram.WriteNumber(table + (ulong)(i * 8) + 4, 4, flags);
            }

            _ports.Write(BusMasterBase + (Secondary ? 8u : 0u) + 4, AccessWidth.Dword, table);
        }

        public void SkipAttention() => Packet([3, 0, 0, 0, 18, 0, 0, 0, 0, 0, 0, 0]);

        public byte[] Packet(byte[] packet) => Packet(packet, 0xFFFE, out _);

        public byte[] Packet(byte[] packet, int limit, out int largest)
        {
            Out(6, 0xA0);
            Out(1, 0);
            Out(4, limit & 0xFF);
            Out(5, limit >> 8);
            Out(7, 0xA0);
            In(2).Should().Be(1);
            WriteBlock(packet);
            using var all = new System.IO.MemoryStream();
            largest = 0;
            while (true)
            {
                Cd.Drain();
                int status = In(7);
                if ((status & 8) == 0)
                {
                    return all.ToArray();
                }

                In(2).Should().Be(2);
                int length = In(4) | (In(5) << 8);
                largest = Math.Max(largest, length);
                all.Write(ReadBlock(length));
            }
        }
    }
}

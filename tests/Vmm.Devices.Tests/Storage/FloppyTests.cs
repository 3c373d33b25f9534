// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Legacy;
using Vmm.Devices.Storage;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Storage;

/// <summary>The 82077AA with the 8237A behind it (data sheet 290166).</summary>
public sealed class FloppyTests
{
    private const int Track = 18 * 512;
    private readonly Rig _rig = new(1440 << 10);

    [Fact]
    public void Reset_PollingReportsFourDrives()
    {
        // §6.1 and §5.2.4: four SENSE INTERRUPT STATUS commands after reset.
        var rig = new Rig(1440 << 10, start: false);
        rig.Out(2, 0);
        rig.In(4).Should().Be(0);
        rig.Out(2, 0x0C);
        rig.Irq.Level.Should().BeTrue();
        for (int i = 0; i < 4; i++)
        {
            rig.Command(8).Should().Equal(0xC0 | i, 0);
        }

        rig.Irq.Level.Should().BeFalse();
        rig.Command(8).Should().Equal(0x80);
    }

    [Fact]
    public void Read_WholeCylinderByDma_StopsAtTerminalCount()
    {
        _rig.Seek(5);
        _rig.Dma(toMemory: true, 0x1_2000, 2 * Track);
        _rig.Command(0xE6, 0, 5, 0, 1, 2, 18, 0x1B, 0xFF).Should().Equal(0, 0, 0, 6, 0, 1, 2);
        _rig.Ram.Bytes.Slice(0x1_2000, 2 * Track).SequenceEqual(_rig.Disk.Bytes.AsSpan(10 * Track, 2 * Track)).Should().BeTrue();
        _rig.DmaStatus().Should().Be(4);
    }

    [Fact]
    public void Read_ThreeSectors_EndsBehindTheLast()
    {
        _rig.Dma(toMemory: true, 0x8000, 3 * 512);
        _rig.Command(0xE6, 0, 0, 0, 4, 2, 18, 0x1B, 0xFF).Should().Equal(0, 0, 0, 0, 0, 7, 2);
        _rig.Ram.Bytes.Slice(0x8000, 1536).SequenceEqual(_rig.Disk.Bytes.AsSpan(3 * 512, 1536)).Should().BeTrue();
        _rig.Ram.Bytes[0x8000 + 1536].Should().Be(0, "nothing beyond terminal count");
    }

    [Fact]
    public void Read_LongerThanTheTrack_IsEndOfCylinder()
    {
        // §6.2.2: ST1 EN
        _rig.Dma(toMemory: true, 0x8000, 4 * Track);
        _rig.Command(0x66, 0, 0, 0, 17, 2, 18, 0x1B, 0xFF).Should().Equal(0x40, 0x80, 0, 1, 0, 1, 2);
    }

    [Fact]
    public void Write_PartOfASector_IsFilledWithZeroes()
    {
        // §5.2.3
        byte[] old = _rig.Disk.Bytes.AsSpan(0, Track).ToArray();
        _rig.Ram.Bytes.Slice(0x9000, 700).Fill(0x77);
        _rig.Dma(toMemory: false, 0x9000, 700);
        _rig.Command(0xC5, 0, 0, 0, 2, 2, 18, 0x1B, 0xFF).Should().Equal(0, 0, 0, 0, 0, 4, 2);
        old.AsSpan(512, 700).Fill(0x77);
        old.AsSpan(512 + 700, 324).Clear();
        _rig.Disk.Bytes.AsSpan(0, Track).SequenceEqual(old).Should().BeTrue();
    }

    [Fact]
    public void MaskedChannel_TransferWaitsForTheGuest()
    {
        _rig.Dma(toMemory: true, 0x8000, 512);
        _rig.OutDma(10, 6);
        _rig.Send(0xE6, 0, 0, 0, 1, 2, 18, 0x1B, 0xFF);
        _rig.Disk.Drain();
        _rig.Irq.Level.Should().BeFalse();
        _rig.In(4).Should().Be(0x10);
        _rig.OutDma(10, 2);
        _rig.Irq.Level.Should().BeTrue();
        _rig.Result().Should().Equal(0, 0, 0, 0, 0, 2, 2);
    }

    [Fact]
    public void NonDmaMode_DataComesThroughTheFifo()
    {
        // SPECIFY ND=1 (§5.2.6)
        _rig.Command(3, 0xAF, 0x03).Should().BeEmpty();
        _rig.Send(0x46, 0, 0, 0, 17, 2, 18, 0x1B, 0xFF);
        _rig.In(4).Should().Be(0x10);
        _rig.Disk.Drain();
        _rig.Irq.Level.Should().BeTrue();
        for (int i = 0; i < 1024; i++)
        {
            _rig.In(4).Should().Be(0xF0);
            _rig.In(5).Should().Be(_rig.Disk.Bytes[(16 * 512) + i]);
        }

        _rig.Result().Should().Equal(0x40, 0x80, 0, 1, 0, 1, 2);
        _rig.Send(0x45, 0, 0, 0, 18, 2, 18, 0x1B, 0xFF);
        for (int i = 0; i < 512; i++)
        {
            _rig.In(4).Should().Be(0xB0);
            _rig.Out(5, i & 0xFF);
        }

        _rig.Disk.Drain();
        _rig.Result()[0].Should().Be(0x40);
        _rig.Disk.Bytes[(17 * 512) + 200].Should().Be(200);
    }

    [Theory]
    [InlineData(1440, 0, true)]
    [InlineData(1440, 2, false)]
    [InlineData(720, 0, false)]
    [InlineData(720, 2, true)]
    [InlineData(2880, 3, true)]
    [InlineData(1200, 0, true)]
    [InlineData(360, 1, true)]
    [InlineData(360, 0, false)]
    public void Media_AreReadableAtTheirOwnRateOnly(int kilobytes, int rate, bool isReadable)
    {
        var rig = new Rig(kilobytes << 10);
        rig.Out(7, rate);
        rig.Dma(toMemory: true, 0x8000, 512);
        int[] result = rig.Command(0xE6, 0, 0, 0, 1, 2, 8, 0x1B, 0xFF);
        (result[0] & 0xC0).Should().Be(isReadable ? 0 : 0x40);
        (result[1] & 1).Should().Be(isReadable ? 0 : 1, "missing address mark");
    }

    [Fact]
    public void WriteProtected_IsReportedEverywhere()
    {
        var rig = new Rig(1440 << 10, readOnly: true);
        rig.Dma(toMemory: false, 0x8000, 512);
        int[] result = rig.Command(0xC5, 0, 0, 0, 1, 2, 18, 0x1B, 0xFF);
        (result[0] & 0xC0, result[1]).Should().Be((0x40, 2));
        rig.Command(4, 0).Should().Equal(0x78);
    }

    [Fact]
    public void WrongCylinder_IsNotFound()
    {
        _rig.Seek(3);
        _rig.Dma(toMemory: true, 0x8000, 512);
        int[] result = _rig.Command(0xE6, 0, 4, 0, 1, 2, 18, 0x1B, 0xFF);
        (result[0], result[1], result[2]).Should().Be((0x40, 4, 0x10));
    }

    [Fact]
    public void ImpliedSeek_MovesTheHead()
    {
        // CONFIGURE EIS (§5.2.7)
        _rig.Command(0x13, 0, 0x40, 0);
        _rig.Dma(toMemory: true, 0x8000, 512);
        _rig.Command(0xE6, 4, 7, 1, 1, 2, 18, 0x1B, 0xFF).Should().Equal(4, 0, 0, 7, 1, 2, 2);
        _rig.Ram.Bytes.Slice(0x8000, 512).SequenceEqual(_rig.Disk.Bytes.AsSpan(15 * Track, 512)).Should().BeTrue();
    }

    [Fact]
    public void MissingDrive_RecalibrateIsAnEquipmentCheck()
    {
        _rig.Send(7, 1);
        _rig.Command(8).Should().Equal(0x71, 0);
    }

    [Fact]
    public void DiskChange_StaysUntilASeekWithADisk()
    {
        _rig.Out(2, 0x1C);
        _rig.Seek(1);
        (_rig.In(7) & 0x80).Should().Be(0);
        _rig.Fdc.ChangeMedium(0, null).Should().Be(_rig.Disk);
        (_rig.In(7) & 0x80).Should().Be(0x80);
        _rig.Seek(0);
        (_rig.In(7) & 0x80).Should().Be(0x80, "still no disk");
        _rig.Fdc.ChangeMedium(0, _rig.Disk);
        _rig.Seek(2);
        (_rig.In(7) & 0x80).Should().Be(0);
    }

    [Fact]
    public void Format_FillsTheTrack()
    {
        _rig.Seek(2);
        _rig.Dma(toMemory: false, 0x8000, 72);
        int[] result = _rig.Command(0x4D, 4, 2, 18, 0x54, 0xF6);
        (result[0], result[1]).Should().Be((4, 0));
        _rig.Disk.Bytes.AsSpan(5 * Track, Track).ToArray().Should().AllBeEquivalentTo(0xF6);
    }

    [Fact]
    public void VersionLockAndInvalid_AnswerAsDocumented()
    {
        _rig.Command(0x10).Should().Equal(0x90);
        _rig.Command(0x94).Should().Equal(0x10);
        _rig.Command(0x13, 0, 0x55, 7);
        _rig.Out(4, 0x80);
        _rig.Command(0x0E)[8].Should().Be(0x55, "LOCK keeps CONFIGURE over a software reset");
        _rig.Command(0x14).Should().Equal(0);
        _rig.Command(0x1F).Should().Equal(0x80);
    }

    [Fact]
    public void HostError_IsADataError()
    {
        _rig.Disk.NextStatus = BlockStatus.IoError;
        _rig.Dma(toMemory: true, 0x8000, 512);
        int[] result = _rig.Command(0xE6, 0, 0, 0, 1, 2, 18, 0x1B, 0xFF);
        (result[0], result[1], result[2]).Should().Be((0x40, 0x20, 0x20));
    }

    [Fact]
    public void SaveLoad_InTheMiddleOfNonDmaRead_Continues()
    {
        _rig.Command(3, 0xAF, 0x03);
        _rig.Send(0x46, 0, 0, 0, 1, 2, 18, 0x1B, 0xFF);
        _rig.Disk.Drain();
        for (int i = 0; i < 1000; i++)
        {
            _ = _rig.In(5);
        }

        var other = new Rig(1440 << 10);
        DeviceCheck.Copy(_rig.Fdc, other.Fdc);
        DeviceCheck.Copy(_rig.DmaChip, other.DmaChip);
        DeviceCheck.StateOf(other.Fdc).Should().Equal(DeviceCheck.StateOf(_rig.Fdc));
        DeviceCheck.StateOf(other.DmaChip).Should().Equal(DeviceCheck.StateOf(_rig.DmaChip));
        for (int i = 1000; i < Track; i++)
        {
            other.In(5).Should().Be(_rig.Disk.Bytes[i]);
        }

        other.Result()[1].Should().Be(0x80);
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public void RandomAccess_NeverThrows(int seed)
    {
        var random = new Random(seed);
        for (int i = 0; i < 40_000; i++)
        {
            switch (random.Next(10))
            {
                case 0:
                    _rig.Out(random.Next(6), random.Next(256));
                    break;
                case 1:
                    _rig.Out(2, random.Next(4) == 0 ? random.Next(256) : 0x1C);
                    break;
                case 2:
                    _rig.OutDma(random.Next(16), random.Next(256));
                    break;
                case 3:
                    _ = _rig.In(random.Next(2) == 0 ? 5 : random.Next(8) & 5);
                    break;
                case 4:
                    _rig.Disk.NextStatus = random.Next(10) == 0 ? BlockStatus.IoError : BlockStatus.Ok;
                    _rig.Disk.Step();
                    break;
                case 5:
                    int[] commands = [0xE6, 0x46, 0xC5, 0x4D, 0x0F, 0x07, 0x08, 0x0A, 0x03, 0x16, 0x42];
                    _rig.Out(5, commands[random.Next(commands.Length)]);
                    break;
                default:
                    _rig.Out(5, random.Next(3) == 0 ? random.Next(256) : random.Next(4));
                    break;
            }

            if (i % 5000 == 0)
            {
                _rig.Fdc.Pause();
                DeviceCheck.Copy(_rig.Fdc, new Rig(1440 << 10).Fdc);
            }
        }

        DeviceCheck.Fuzz(_rig.DmaChip.First, seed, 5000);
        DeviceCheck.Fuzz(_rig.DmaChip.Second, seed, 5000);
        DeviceCheck.Fuzz(_rig.DmaChip.Pages, seed, 5000);
    }

    [Fact]
    public void Dma_Decrement_AutoInitialize_AndPageWrap()
    {
        // 231466: mode register; the address counter is 16 bits and does not carry into the page.
        var ram = new TestRam(1 << 18);
        using var dma = new I8237(ram);
        Program(dma, mode: 0x46 | 0x20, page: 1, address: 0x0003, count: 7);
        dma[2].ToMemory([1, 2, 3, 4, 5, 6, 7, 8], out bool done).Should().Be(8);
        done.Should().BeTrue();
        ram.Bytes[0x1_0003].Should().Be(1);
        ram.Bytes[0x1_0000].Should().Be(4);
        ram.Bytes[0x1_FFFF].Should().Be(5);
        ram.Bytes[0x1_FFFC].Should().Be(8);
        dma[2].ToMemory([9], out _).Should().Be(0, "terminal count masks the channel");
        dma.First.Read(8, AccessWidth.Byte).Should().Be(0x44);

        Program(dma, mode: 0x56, page: 2, address: 0x10, count: 3);
        for (int i = 0; i < 3; i++)
        {
            dma[2].ToMemory([1, 2, 3, 4], out done).Should().Be(4);
            done.Should().BeTrue("auto-initialize starts again");
        }

        dma.Second.Write(0x16, AccessWidth.Byte, 0x45);
        dma.Second.Write(0x04, AccessWidth.Byte, 0x00);
        dma.Second.Write(0x04, AccessWidth.Byte, 0x40);
        dma.Second.Write(0x06, AccessWidth.Byte, 0x01);
        dma.Second.Write(0x06, AccessWidth.Byte, 0x00);
        dma.Pages.Write(0x8B - 0x81, AccessWidth.Byte, 0x03);
        dma.Second.Write(0x14, AccessWidth.Byte, 0x01);
        dma[5].ToMemory([0xAA, 0xBB, 0xCC, 0xDD, 0xEE], out done).Should().Be(4, "words");
        ram.Bytes[0x2_8000].Should().Be(0xAA, "address and page count words");
        ram.Bytes[0x2_8003].Should().Be(0xDD);
    }

    private static void Program(I8237 dma, int mode, int page, int address, int count)
    {
        dma.First.Write(12, AccessWidth.Byte, 0);
        dma.First.Write(11, AccessWidth.Byte, (ulong)mode);
        dma.First.Write(4, AccessWidth.Byte, (ulong)(address & 0xFF));
        dma.First.Write(4, AccessWidth.Byte, (ulong)(address >> 8));
        dma.First.Write(5, AccessWidth.Byte, (ulong)(count & 0xFF));
        dma.First.Write(5, AccessWidth.Byte, (ulong)(count >> 8));
        dma.Pages.Write(0, AccessWidth.Byte, (ulong)page);
        dma.First.Write(10, AccessWidth.Byte, 2);
    }

    private sealed class Rig
    {
        public Rig(int bytes, bool readOnly = false, bool start = true)
        {
            Disk = readOnly ? new FakeDisk(bytes) { IsReadOnly = true } : FakeDisk.Random(bytes, 1);
            DmaChip = new I8237(Ram);
            Fdc = new I82077(Disk, null, hasSecond: false, Irq, DmaChip[2]);
            if (start)
            {
                Out(2, 0x0C);
                for (int i = 0; i < 4; i++)
                {
                    Command(8);
                }

                Out(7, 0);
                Command(3, 0xAF, 0x02);
            }
        }

        public FakeIrqLine Irq { get; } = new();

        public TestRam Ram { get; } = new(1 << 18);

        public FakeDisk Disk { get; }

        public I8237 DmaChip { get; }

        public I82077 Fdc { get; }

        public int In(int port) => (int)(port == 7
            ? Fdc.High.Read(0, AccessWidth.Byte)
            : Fdc.Low.Read((uint)Math.Min(port, 5), AccessWidth.Byte));

        public void Out(int port, int value)
        {
            if (port == 7)
            {
                Fdc.High.Write(0, AccessWidth.Byte, (ulong)value);
            }
            else
            {
                Fdc.Low.Write((uint)port, AccessWidth.Byte, (ulong)value);
            }
        }

        public void OutDma(int register, int value) => DmaChip.First.Write((uint)register, AccessWidth.Byte, (ulong)value);

        public int DmaStatus() => (int)DmaChip.First.Read(8, AccessWidth.Byte);

        public void Dma(bool toMemory, int address, int count)
        {
            OutDma(10, 6);
            Program(DmaChip, toMemory ? 0x46 : 0x4A, address >> 16, address & 0xFFFF, count - 1);
        }

        public void Send(params int[] bytes)
        {
            foreach (int value in bytes)
            {
                (In(4) & 0xC0).Should().Be(0x80);
                Out(5, value);
            }
        }

        public int[] Command(params int[] bytes)
        {
            Send(bytes);
            Disk.Drain();
            return Result();
        }

        public int[] Result()
        {
            var result = new List<int>();
            while ((In(4) & 0xD0) == 0xD0)
            {
                result.Add(In(5));
            }

            return [.. result];
        }

        public void Seek(int track)
        {
            Send(0x0F, 0, track);
            Irq.Level.Should().BeTrue();
            Command(8).Should().Equal(0x20, track);
        }
    }
}

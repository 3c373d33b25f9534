// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Storage;
using Vmm.Devices.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Virtio;

/// <summary>virtio-scsi (VIRTIO 1.2 §5.6) with a disk (SBC-3, SPC-4) at target 0 and a CD-ROM drive (MMC-5) at target 1.</summary>
public sealed class VirtioScsiTests : IDisposable
{
    private const ulong Request = 0x70000;
    private const ulong Response = 0x71000;
    private const ulong Data = 0x80000;
    private const int Requests = 2;

    private readonly TestRam _ram = new(1 << 20);
    private readonly FakeBlockBackend _disk = new(1 << 20);
    private readonly FakeBlockBackend _cd = new(64 << 10) { IsReadOnly = true };
    private readonly VirtioMmio _mmio;
    private readonly VirtioMmioDriver _driver;

    public VirtioScsiTests()
    {
        _mmio = Make();
        _driver = new VirtioMmioDriver(_mmio, _ram);
        _driver.Start(0, 3);
        Command(0, [0x00]).Sense.Should().Be(0x062900, "the first command after power-on finds a unit attention");
        Command(1, [0x00]).Sense.Should().Be(0x062900);
    }

    public void Dispose() => _mmio.Dispose();

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void WriteAndRead_MoveData(bool isLong)
    {
        new Random(4).NextBytes(_ram.Bytes.Slice((int)Data, 4096));
        byte[] sent = _ram.Bytes.Slice((int)Data, 4096).ToArray();
        byte[] write = isLong ? [0x8A, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0] : [0x2A, 0, 0, 0, 0, 9, 0, 0, 8, 0];
        Command(0, write, dataOut: 4096).Should().Be((0, 0, 0, 0u));
        _disk.Data.AsSpan(9 * 512, 4096).SequenceEqual(sent).Should().BeTrue();
        _ram.Bytes.Slice((int)Data, 4096).Clear();
        byte[] read = isLong ? [0x88, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0] : [0x28, 0, 0, 0, 0, 9, 0, 0, 8, 0];
        Command(0, read, dataIn: 4096).Should().Be((0, 0, 0, 0u));
        _ram.Bytes.Slice((int)Data, 4096).SequenceEqual(sent).Should().BeTrue();
    }

    [Fact]
    public void Read_ShorterThanItsBuffer_SaysWhatIsLeft()
    {
        Command(0, [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], dataIn: 4096).Residual.Should().Be(4096 - 512);
    }

    [Fact]
    public void Read_LongerThanItsBuffer_IsAnOverrunAndMovesNothing()
    {
        Array.Fill(_disk.Data, (byte)0x77);
        Command(0, [0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0], dataIn: 512).Response.Should().Be(1);
        _ram.Bytes[(int)Data].Should().Be(0);
    }

    [Theory]
    [InlineData(0x28, 2048, 1, 0x052100)]
    [InlineData(0x28, 2047, 2, 0x052100)]
    [InlineData(0x2A, 0xFFFF_FFFF, 1, 0x052100)]
    public void Transfer_BeyondTheEnd_IsRefused(byte code, uint block, byte count, int sense)
    {
        byte[] cdb = [code, 0, 0, 0, 0, 0, 0, 0, count, 0];
        BinaryPrimitives.WriteUInt32BigEndian(cdb.AsSpan(2), block);
        (byte _, byte status, int found, uint _) = Command(
            0, cdb, dataIn: code == 0x28 ? count * 512 : 0, dataOut: code == 0x2A ? count * 512 : 0);
        (status, found).Should().Be((2, sense));
    }

    [Fact]
    public void Inquiry_AndItsPages_DescribeTheDisk()
    {
        Command(0, [0x12, 0, 0, 0, 36, 0], dataIn: 36).Status.Should().Be(0);
        Encoding.ASCII.GetString(_ram.Bytes.Slice((int)Data + 8, 8)).Should().Be("VMM     ");
        Command(0, [0x12, 1, 0x80, 0, 64, 0], dataIn: 64).Status.Should().Be(0);
        Encoding.ASCII.GetString(_ram.Bytes.Slice((int)Data + 4, 6)).Should().Be("DISK-0");
        Command(0, [0x12, 1, 0xB2, 0, 64, 0], dataIn: 64).Status.Should().Be(0);
        (_ram.Bytes[(int)Data + 5] & 0x80).Should().Be(0x80, "UNMAP is supported");
        Command(0, [0x12, 1, 0x77, 0, 64, 0], dataIn: 64).Sense.Should().Be(0x052400);
        Command(0, [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], dataIn: 8).Status.Should().Be(0);
        BinaryPrimitives.ReadUInt32BigEndian(_ram.Bytes[(int)Data..]).Should().Be(2047);
        Command(0, [0x9E, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], dataIn: 32).Status.Should().Be(0);
        BinaryPrimitives.ReadInt64BigEndian(_ram.Bytes[(int)Data..]).Should().Be(2047);
    }

    [Fact]
    public void Unmap_RunsAllItsRanges_AndRefusesBadOnesWhole()
    {
        Span<byte> list = _ram.Bytes.Slice((int)Data, 40);
        list.Clear();
        BinaryPrimitives.WriteUInt16BigEndian(list, 38);
        BinaryPrimitives.WriteUInt16BigEndian(list[2..], 32);
        BinaryPrimitives.WriteInt64BigEndian(list[8..], 16);
        BinaryPrimitives.WriteUInt32BigEndian(list[16..], 8);
        BinaryPrimitives.WriteInt64BigEndian(list[24..], 64);
        BinaryPrimitives.WriteUInt32BigEndian(list[32..], 4);
        Command(0, [0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0], dataOut: 40).Status.Should().Be(0);
        _disk.Log.Should().Equal(
            (BlockOperation.Discard, 16 * 512, 8 * 512, false), (BlockOperation.Discard, 64 * 512, 4 * 512, false));
        BinaryPrimitives.WriteUInt32BigEndian(list[32..], 4000);
        Command(0, [0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0], dataOut: 40).Sense.Should().Be(0x052100);
        _disk.Log.Should().HaveCount(2);
    }

    [Fact]
    public void WriteSame_OfZeroes_Unmaps_AndOfAnythingElseIsRefused()
    {
        _ram.Bytes.Slice((int)Data, 512).Clear();
        byte[] cdb = [0x93, 8, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0];
        Command(0, cdb, dataOut: 512).Status.Should().Be(0);
        _disk.Log[^1].Should().Be((BlockOperation.WriteZeroes, 4 * 512, 2 * 512, false));
        _ram.Bytes[(int)Data + 100] = 1;
        Command(0, cdb, dataOut: 512).Sense.Should().Be(0x052400);
    }

    [Fact]
    public void ModeSelect_SwitchesTheWriteCache()
    {
        Command(0, [0x1A, 0, 8, 0, 64, 0], dataIn: 64).Status.Should().Be(0);
        (_ram.Bytes[(int)Data + 6] & 4).Should().Be(4);
        _ram.Bytes.Slice((int)Data, 24).Clear();
        _ram.Bytes[(int)Data + 4] = 8;
        _ram.Bytes[(int)Data + 5] = 18;
        Command(0, [0x15, 0x10, 0, 0, 24, 0], dataOut: 24).Status.Should().Be(0);
        _disk.Log[^1].Operation.Should().Be(BlockOperation.Flush, "what was cached becomes stable");
        Command(0, [0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0], dataOut: 512).Status.Should().Be(0);
        _disk.Log[^1].Fua.Should().BeTrue();
    }

    [Fact]
    public void Cdrom_ReadsItsBlocks_AndRefusesWrites()
    {
        _cd.Data[2048] = 0x42;
        Command(1, [0x28, 0, 0, 0, 0, 1, 0, 0, 1, 0], dataIn: 2048).Should().Be((0, 0, 0, 0u));
        _ram.Bytes[(int)Data].Should().Be(0x42);
        Command(1, [0x2A, 0, 0, 0, 0, 1, 0, 0, 1, 0], dataOut: 2048).Sense.Should().Be(0x052000);
        Command(1, [0x12, 0, 0, 0, 36, 0], dataIn: 36).Status.Should().Be(0);
        (_ram.Bytes[(int)Data] & 0x1F).Should().Be(5);
    }

    [Fact]
    public void Addresses_OfNothing_AreAnswered()
    {
        Command(2, [0x00]).Response.Should().Be(3, "no such target");
        Command(0, [0x00], lun: 1).Sense.Should().Be(0x052500);
        Command(0, [0x12, 0, 0, 0, 36, 0], dataIn: 36, lun: 1).Status.Should().Be(0);
        _ram.Bytes[(int)Data].Should().Be(0x7F);
        Command(0, [0xA0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0], dataIn: 16).Status.Should().Be(0);
        BinaryPrimitives.ReadUInt32BigEndian(_ram.Bytes[(int)Data..]).Should().Be(8);
    }

    [Theory]
    [InlineData(0u, 0, (byte)0)] // abort task
    [InlineData(5u, 0, (byte)0)] // logical unit reset
    [InlineData(5u, 9, (byte)3)]
    [InlineData(99u, 0, (byte)11)]
    public void TaskManagement_WaitsForWhatIsUnderWay(uint function, int target, byte expected)
    {
        _disk.Hold = true;
        Start(0, [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], 512, 0, 0);
        _driver.Kick(Requests);
        Span<byte> request = _ram.Bytes.Slice(0x72000, 24);
        request.Clear();
        BinaryPrimitives.WriteUInt32LittleEndian(request[4..], function);
        request[8] = 1;
        request[9] = (byte)target;
        _driver[0].Add(new DriverBuffer(0x72000, 24, false), new DriverBuffer(0x73000, 1, true));
        _driver.Kick(0);
        _ram.Bytes[0x73000].Should().Be(expected);
        _disk.Held.Should().Be(expected == 0 ? 0 : 1);
    }

    [Fact]
    public void HostFailure_IsAMediumError()
    {
        _disk.Fail = BlockStatus.IoError;
        Command(0, [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], dataIn: 512).Sense.Should().Be(0x031100);
        Command(0, [0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0], dataOut: 512).Sense.Should().Be(0x030C00);
    }

    [Fact]
    public void Save_WithCommandsInFlight_LosesAndDoublesNothing()
    {
        _disk.Hold = true;
        for (int i = 0; i < 3; i++)
        {
            Start(0, [0x28, 0, 0, 0, 0, (byte)i, 0, 0, 1, 0], 512, 0, 0, i);
        }

        _driver.Kick(Requests);
        _mmio.Pause();
        Start(0, [0x28, 0, 0, 0, 0, 3, 0, 0, 1, 0], 512, 0, 0, 3);
        _driver.Kick(Requests);
        _disk.Hold = false;
        _disk.Log.Clear();
        using VirtioMmio other = Make();
        other.Pause();
        DeviceCheck.Copy(_mmio, other);
        other.Resume();
        int answers = 0;
        while (_driver[Requests].TryTakeUsed(out _, out _))
        {
            answers++;
        }

        answers.Should().Be(4);
        _disk.Log.Should().ContainSingle("only what was not taken before runs in the new device");
    }

    private VirtioMmio Make()
    {
        var units = new List<ScsiUnit> { new ScsiDisk(_disk, "DISK-0"), new ScsiCdrom(new AtapiCdrom(_cd, "CD-0")) };
        var device = new VirtioDevice("scsi", new VirtioScsi(units), _ram, new VirtioOptions { Inline = true });
        var mmio = new VirtioMmio(device, new FakeIrqLine());
        mmio.Resume();
        return mmio;
    }

    private void Start(int target, ReadOnlySpan<byte> cdb, int dataIn, int dataOut, int lun, int slot = 0)
    {
        ulong request = Request + ((ulong)slot * 64);
        ulong response = Response + ((ulong)slot * 128);
        Span<byte> header = _ram.Bytes.Slice((int)request, 51);
        header.Clear();
        header[0] = 1;
        header[1] = (byte)target;
        header[2] = 0x40;
        header[3] = (byte)lun;
        cdb.CopyTo(header[19..]);
        _ram.Bytes.Slice((int)response, 108).Fill(0xEE);
        var chain = new List<DriverBuffer> { new(request, 51, false) };
        if (dataOut > 0)
        {
            chain.Add(new DriverBuffer(Data, (uint)dataOut, false));
        }

        chain.Add(new DriverBuffer(response, 108, true));
        if (dataIn > 0)
        {
            chain.Add(new DriverBuffer(Data, (uint)dataIn, true));
        }

        _driver[Requests].Add([.. chain]);
    }

    private (byte Response, byte Status, int Sense, uint Residual) Command(
        int target, ReadOnlySpan<byte> cdb, int dataIn = 0, int dataOut = 0, int lun = 0)
    {
        Start(target, cdb, dataIn, dataOut, lun);
        _driver.Kick(Requests);
        _driver[Requests].TryTakeUsed(out _, out _).Should().BeTrue();
        Span<byte> answer = _ram.Bytes.Slice((int)Response, 108);
        int length = BinaryPrimitives.ReadInt32LittleEndian(answer);
        int sense = length < 14 ? 0 : ((answer[12 + 2] & 15) << 16) | (answer[12 + 12] << 8) | answer[12 + 13];
        return (answer[11], answer[10], sense, BinaryPrimitives.ReadUInt32LittleEndian(answer[4..]));
    }
}

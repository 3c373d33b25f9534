// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Text;
using System.Threading.Tasks;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Virtio;

public sealed class VirtioBlockTests : IDisposable
{
    private const ulong Data = 0x80000;
    private const ulong Header = 0x70000;
    private const ulong StatusByte = 0x71000;
    private const ulong Everything = ulong.MaxValue;

    private readonly TestRam _ram = new(1 << 20);
    private readonly FakeIrqLine _irq = new();
    private readonly FakeBlockBackend _disk = new(1 << 20);
    private readonly VirtioMmio _mmio;
    private readonly VirtioMmioDriver _driver;

    public VirtioBlockTests()
    {
        (_mmio, _driver) = Make(_disk);
    }

    public void Dispose() => _mmio.Dispose();

    [Theory]
    [InlineData(0UL)]
    [InlineData(VirtioFeature.RingPacked)]
    [InlineData(VirtioFeature.RingPacked | VirtioFeature.InOrder | VirtioFeature.RingEventIndex)]
    public void Write_ThenRead_MovesData(ulong ring)
    {
        _driver.Start(ring | (1UL << 9), 1);
        new Random(1).NextBytes(_ram.Bytes.Slice((int)Data, 8192));
        byte[] sent = _ram.Bytes.Slice((int)Data, 8192).ToArray();
        Request(1, 16, new DriverBuffer(Data, 4096, false), new DriverBuffer(Data + 4096, 4096, false)).Should().Be((0, 1u));
        _disk.Data.AsSpan(16 * 512, 8192).SequenceEqual(sent).Should().BeTrue();
        _ram.Bytes.Slice((int)Data, 8192).Clear();
        Request(0, 16, new DriverBuffer(Data, 8192, true)).Should().Be((0, 8193u));
        _ram.Bytes.Slice((int)Data, 8192).SequenceEqual(sent).Should().BeTrue();
        _irq.Level.Should().BeTrue();
        _driver.InterruptStatus.Should().Be(1);
        _driver.AcknowledgeInterrupt();
        _irq.Level.Should().BeFalse();
        _ram.Marked.Should().Contain((Data, 8192));
    }

    [Fact]
    public void Config_ShowsCapacityAndTopology()
    {
        _driver.ReadConfig(0, AccessWidth.Qword).Should().Be(2048);
        _driver.ReadConfig(20, AccessWidth.Dword).Should().Be(512);
        _driver.ReadConfig(24, AccessWidth.Byte).Should().Be(3, "the host's blocks are 4 KiB");
        _driver.ReadConfig(34, AccessWidth.Word).Should().Be(1);
        _driver.ReadConfig(60, AccessWidth.Dword).Should().Be(0, "beyond the structure");
    }

    [Theory]
    [InlineData(2048UL, 512u)]
    [InlineData(2047UL, 1024u)]
    [InlineData(0x8000_0000_0000_0000UL, 512u)]
    [InlineData(0UL, 100u)]
    public void Read_OutOfRangeOrMisaligned_GivesIoError(ulong sector, uint length)
    {
        _driver.Start(0, 1);
        Request(0, sector, new DriverBuffer(Data, length, true)).Status.Should().Be(1);
        _driver.Status.Should().Be(15, "a bad request is not a broken ring");
    }

    [Fact]
    public void Read_BufferOutsideRam_GivesIoError()
    {
        _driver.Start(0, 1);
        Request(0, 0, new DriverBuffer(0x7FFF_0000, 512, true)).Status.Should().Be(1);
        Request(0, 0, new DriverBuffer((1 << 20) - 256, 512, true)).Status.Should().Be(1);
    }

    [Fact]
    public void Request_Unknown_GivesUnsupported()
    {
        _driver.Start(0, 1);
        Request(77, 0).Status.Should().Be(2);
    }

    [Fact]
    public void Request_WithoutStatusByte_NeedsReset()
    {
        _driver.Start(0, 1);
        _driver[0].Add(new DriverBuffer(Header, 16, false));
        _driver.Kick(0);
        (_driver.Status & 0x40).Should().Be(0x40);
        (_driver.InterruptStatus & 2).Should().Be(2, "§2.1.2: a configuration interrupt tells the driver");
        _driver.Status = 0;
        _driver.Status.Should().Be(0);
        var again = new VirtioMmioDriver(_mmio, _ram);
        again.Start(0, 1);
        again.Status.Should().Be(15);
    }

    [Fact]
    public void GetId_GivesSerial()
    {
        _driver.Start(0, 1);
        Request(8, 0, new DriverBuffer(Data, 20, true)).Should().Be((0, 21u));
        Encoding.ASCII.GetString(_ram.Bytes.Slice((int)Data, 20)).TrimEnd('\0').Should().Be("disk-1");
    }

    [Fact]
    public void Write_WithoutFlushFeatureOrCache_IsForced()
    {
        _driver.Start(0, 1);
        Request(1, 0, new DriverBuffer(Data, 512, false));
        _disk.Log[^1].Fua.Should().BeTrue("the driver cannot flush");
        var again = new VirtioMmioDriver(_mmio, _ram);
        again.Start((1UL << 9) | (1UL << 11), 1);
        RequestOn(again, 1, 0, new DriverBuffer(Data, 512, false));
        _disk.Log[^1].Fua.Should().BeFalse();
        again.WriteConfig(32, AccessWidth.Byte, 0);
        RequestOn(again, 1, 0, new DriverBuffer(Data, 512, false));
        _disk.Log[^1].Fua.Should().BeTrue();
        again.ReadConfig(32, AccessWidth.Byte).Should().Be(0);
        RequestOn(again, 4, 0).Status.Should().Be(0);
        _disk.Log[^1].Operation.Should().Be(BlockOperation.Flush);
    }

    [Fact]
    public void WriteZeroesAndDiscard_RunAllRanges()
    {
        _driver.Start(Everything & ~VirtioFeature.RingPacked, 1);
        Array.Fill(_disk.Data, (byte)0xAA);
        PutRange(0, 8, 4, 1);
        PutRange(1, 100, 1, 0);
        Request(13, 0, new DriverBuffer(Data, 32, false)).Status.Should().Be(0);
        _disk.Data[(8 * 512) - 1].Should().Be(0xAA);
        _disk.Data.AsSpan(8 * 512, 4 * 512).IndexOfAnyExcept((byte)0).Should().Be(-1);
        _disk.Data.AsSpan(100 * 512, 512).IndexOfAnyExcept((byte)0).Should().Be(-1);
        PutRange(0, 2047, 2, 0);
        Request(11, 0, new DriverBuffer(Data, 16, false)).Status.Should().Be(1);
        PutRange(0, 0, 1, 2);
        Request(11, 0, new DriverBuffer(Data, 16, false)).Status.Should().Be(2, "unknown flag");
        Request(11, 0, new DriverBuffer(Data, 15, false)).Status.Should().Be(2);
    }

    [Fact]
    public void ReadOnlyDisk_OffersAndRefusesWrites()
    {
        var disk = new FakeBlockBackend(4096) { IsReadOnly = true };
        (VirtioMmio mmio, VirtioMmioDriver driver) = Make(disk);
        using (mmio)
        {
            (driver.OfferedFeatures() & (1UL << 5)).Should().NotBe(0);
            driver.Start(1UL << 5, 1);
            RequestOn(driver, 1, 0, new DriverBuffer(Data, 512, false)).Status.Should().Be(1);
            RequestOn(driver, 0, 0, new DriverBuffer(Data, 512, true)).Status.Should().Be(0);
        }
    }

    [Fact]
    public void HostFailure_IsReportedAndCounted()
    {
        _driver.Start(0, 1);
        _disk.Fail = BlockStatus.NoSpace;
        Request(1, 0, new DriverBuffer(Data, 512, false)).Status.Should().Be(1);
        ((VirtioBlock)_mmio.Device.Model).HostErrors.Should().Be(1);
    }

    [Fact]
    public void Completions_InAnyOrder_GoToTheirRequests()
    {
        _driver.Start(0, 1);
        _disk.Hold = true;
        for (int i = 0; i < 8; i++)
        {
            _disk.Data[i * 512] = (byte)(i + 1);
            PutHeader(Header + (ulong)(i * 16), 0, (ulong)i);
            _driver[0].Add(
                new DriverBuffer(Header + (ulong)(i * 16), 16, false),
                new DriverBuffer(Data + (ulong)(i * 512), 512, true),
                new DriverBuffer(StatusByte + (ulong)i, 1, true));
        }

        _driver.Kick(0);
        _disk.Held.Should().Be(8);
        _disk.CompleteReversed();
        for (int i = 0; i < 8; i++)
        {
            _driver[0].TryTakeUsed(out _, out uint length).Should().BeTrue();
            length.Should().Be(513);
            _ram.Bytes[(int)Data + (i * 512)].Should().Be((byte)(i + 1));
        }
    }

    [Theory]
    [InlineData(0UL)]
    [InlineData(VirtioFeature.RingPacked)]
    public void Save_WithRequestsInFlight_LosesAndDoublesNothing(ulong ring)
    {
        _driver.Start(ring, 1);
        _disk.Hold = true;
        VirtqueueDriver queue = _driver[0];
        var pending = new HashSet<ushort>();
        for (int i = 0; i < 4; i++)
        {
            pending.Add(Put(queue, i));
        }

        _driver.Kick(0);
        _mmio.Pause();
        _disk.Held.Should().Be(0, "pausing finishes what was taken");
        for (int i = 4; i < 7; i++)
        {
            pending.Add(Put(queue, i)); // added, doorbell rung while paused
        }

        _driver.Kick(0);
        var disk = new FakeBlockBackend(1 << 20);
        (VirtioMmio other, _) = Make(disk, resume: false);
        using (other)
        {
            DeviceCheck.Copy(_mmio, other);
            DeviceCheck.StateOf(other).Should().Equal(DeviceCheck.StateOf(_mmio));
            other.Resume();
            while (queue.TryTakeUsed(out ushort id, out _))
            {
                pending.Remove(id).Should().BeTrue();
            }

            pending.Should().BeEmpty();
            disk.Log.Should().HaveCount(3, "only what had not been taken before runs in the new device");
            other.Read(0x70, AccessWidth.Dword).Should().Be(15);
        }
    }

    [Fact]
    public async Task Worker_ConcurrentDoorbellsAndResets_Survives()
    {
        var ram = new TestRam(1 << 20);
        var disk = new FakeBlockBackend(1 << 20);
        using var mmio = new VirtioMmio(new VirtioDevice("blk", new VirtioBlock(disk), ram), new FakeIrqLine());
        mmio.Resume();
        for (int round = 0; round < 30; round++)
        {
            var driver = new VirtioMmioDriver(mmio, ram);
            driver.Start(VirtioFeature.RingEventIndex, 1, 16);
            for (int i = 0; i < 20; i++)
            {
                await Task.Yield();
                PutHeaderIn(ram, Header, 0, (ulong)i);
                driver[0].Add(
                    new DriverBuffer(Header, 16, false), new DriverBuffer(Data, 512, true), new DriverBuffer(StatusByte, 1, true));
                driver.Kick(0);
                driver[0].WaitUsed().Length.Should().Be(513);
            }

            driver[0].Add(
                new DriverBuffer(Header, 16, false), new DriverBuffer(Data, 512, true), new DriverBuffer(StatusByte, 1, true));
            driver.Kick(0);
            if (round % 3 == 0)
            {
                mmio.Pause();
                mmio.Resume();
            }

            driver.Status = 0;
            driver.Status.Should().Be(0);
        }
    }

    [Fact]
    public void QueueReset_InFlight_DrainsAndAllowsReuse()
    {
        _driver.Start(VirtioFeature.RingReset, 1);
        _disk.Hold = true;
        Put(_driver[0], 0);
        _driver.Kick(0);
        _driver.Write(0x30, 0);
        _driver.Write(0xC0, 1);
        _driver.Read(0xC0).Should().Be(0, "the reset is complete");
        _driver.Read(0x44).Should().Be(0);
        _disk.Held.Should().Be(0);
        _disk.Hold = false;
        _driver.Enable(0, 8);
        _driver.Read(0x44).Should().Be(1);
        Request(0, 0, new DriverBuffer(Data, 512, true)).Status.Should().Be(0);
        _driver.Status.Should().Be(15);
    }

    [Fact]
    public void MultiQueue_EachQueueWorks()
    {
        var model = new VirtioBlock(_disk, new VirtioBlockOptions { Queues = 4 });
        using var mmio = new VirtioMmio(
            new VirtioDevice("blk", model, _ram, new VirtioOptions { Inline = true }), _irq);
        mmio.Resume();
        var driver = new VirtioMmioDriver(mmio, _ram);
        driver.Start(1UL << 12, 4, 32);
        driver.ReadConfig(34, AccessWidth.Word).Should().Be(4);
        for (int i = 0; i < 4; i++)
        {
            Put(driver[i], i);
            driver.Kick(i);
            driver[i].TryTakeUsed(out _, out uint length).Should().BeTrue();
            length.Should().Be(513);
        }
    }

    [Fact]
    public void Growth_ChangesCapacityAndTellsTheDriver()
    {
        _driver.Start(0, 1);
        uint before = _driver.Read(0xFC);
        _disk.Grow(2 << 20);
        ((VirtioBlock)_mmio.Device.Model).CapacityChanged();
        _driver.ReadConfig(0, AccessWidth.Qword).Should().Be(4096);
        _driver.Read(0xFC).Should().NotBe(before);
        (_driver.InterruptStatus & 2).Should().Be(2);
    }

    private (VirtioMmio Mmio, VirtioMmioDriver Driver) Make(FakeBlockBackend disk, bool resume = true)
    {
        var model = new VirtioBlock(disk, new VirtioBlockOptions { Serial = "disk-1" });
        var options = new VirtioOptions { Inline = true, Packed = true, InOrder = true };
        var mmio = new VirtioMmio(new VirtioDevice("blk", model, _ram, options), _irq);
        mmio.Reset();
        if (resume)
        {
            mmio.Resume();
        }

        return (mmio, new VirtioMmioDriver(mmio, _ram));
    }

    private ushort Put(VirtqueueDriver queue, int slot)
    {
        PutHeader(Header + (ulong)(slot * 16), 0, (ulong)slot);
        return queue.Add(
            new DriverBuffer(Header + (ulong)(slot * 16), 16, false),
            new DriverBuffer(Data + (ulong)(slot * 512), 512, true),
            new DriverBuffer(StatusByte + (ulong)slot, 1, true));
    }

    private (byte Status, uint Used) Request(uint type, ulong sector, params DriverBuffer[] data) =>
        RequestOn(_driver, type, sector, data);

    private (byte Status, uint Used) RequestOn(
        VirtioMmioDriver driver, uint type, ulong sector, params DriverBuffer[] data)
    {
        PutHeader(Header, type, sector);
        _ram.Bytes[(int)StatusByte] = 0xEE;
        driver[0].Add([new DriverBuffer(Header, 16, false), .. data, new DriverBuffer(StatusByte, 1, true)]);
        driver.Kick(0);
        driver[0].TryTakeUsed(out _, out uint used).Should().BeTrue();
        return (_ram.Bytes[(int)StatusByte], used);
    }

    private void PutHeader(ulong at, uint type, ulong sector) => PutHeaderIn(_ram, at, type, sector);

    private static void PutHeaderIn(TestRam ram, ulong at, uint type, ulong sector)
    {
        ram.WriteNumber(at, 4, type);
        ram.WriteNumber(at + 4, 4, 0);
        ram.WriteNumber(at + 8, 8, sector);
    }

    private void PutRange(int index, ulong sector, uint sectors, uint flags)
    {
        ulong at = Data + (ulong)(index * 16);
        _ram.WriteNumber(at, 8, sector);
        _ram.WriteNumber(at + 8, 4, sectors);
        _ram.WriteNumber(at + 12, 4, flags);
    }
}

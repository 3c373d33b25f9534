// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Pci;
using Vmm.Devices.Storage;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Storage;

/// <summary>The NVMe controller through registers, queues and doorbells (NVM Express 1.4b).</summary>
public sealed class NvmeTests
{
    private const int DiskBytes = 4 << 20;
    private readonly Rig _rig = new();

    [Fact]
    public void Registers_AfterReset_TellVersionAndCapabilities()
    {
        // §3.1
        var rig = new Rig(enable: false);
        rig.Read64(0).Should().Be(0x0000_0020_2801_03FF);
        rig.Read(8).Should().Be(0x0001_0400);
        rig.Read(0x1C).Should().Be(0);
    }

    [Fact]
    public void Enable_WithUnknownPageSize_IsFatal()
    {
        var rig = new Rig(enable: false);
        rig.Write(0x24, 0x000F_000F);
        rig.Write(0x14, 0x0046_0081);
        rig.Read(0x1C).Should().Be(2, "CFS");
    }

    [Fact]
    public void Identify_ControllerAndNamespace()
    {
        // §5.15
        _rig.Admin(0x06, dword10: 1, prp1: 0x20000).Status.Should().Be(0);
        Span<byte> data = _rig.Ram.Bytes[0x20000..];
        Encoding.ASCII.GetString(data.Slice(4, 20)).TrimEnd().Should().Be("SN1");
        (data[77], data[512], data[513], data[525]).Should().Be((9, 0x66, 0x44, 1));
        _rig.Admin(0x06, dword10: 0, prp1: 0x20000, space: 1).Status.Should().Be(0);
        data = _rig.Ram.Bytes[0x20000..];
        BinaryPrimitives.ReadInt64LittleEndian(data).Should().Be(DiskBytes / 512);
        data[130].Should().Be(9);
        _rig.Admin(0x06, dword10: 0, prp1: 0x20000, space: 7).Status.Should().Be(0x400B);
        _rig.Admin(0x06, dword10: 2, prp1: 0x20000).Status.Should().Be(0);
        _rig.Ram.ReadNumber(0x20000, 4).Should().Be(1);
    }

    [Fact]
    public void Read_ThroughAPrpList_FillsEveryPage()
    {
        // §4.3: the first page is entered at an offset, the list holds the others.
        _rig.MakeQueues();
        const int length = 5 * 4096;
        for (int i = 0; i < 5; i++)
        {
            _rig.Ram.WriteNumber(0x30008 + (ulong)(i * 8), 8, 0x50000 - (ulong)(i * 0x2000));
        }

        ushort id = _rig.Io(0x02, 0x40200, 0x30008, first: 8, blocks: length / 512);
        _rig.Disk.Drain();
        _rig.Completion(1).Should().Be((id, 0U, 0U));
        byte[] expected = _rig.Disk.Bytes.AsSpan(4096, length).ToArray();
        _rig.Ram.Bytes.Slice(0x40200, 0xE00).SequenceEqual(expected.AsSpan(0, 0xE00)).Should().BeTrue();
        for (int i = 0; i < 5; i++)
        {
            int from = 0xE00 + (i * 4096);
            int part = Math.Min(4096, length - from);
            _rig.Ram.Bytes.Slice(0x50000 - (i * 0x2000), part).SequenceEqual(expected.AsSpan(from, part)).Should().BeTrue();
        }

        _rig.Messages.Should().Contain((0xFEE0_1000UL, 0x41U));
    }

    [Fact]
    public void Write_FuaFlushZeroesAndTrim_ReachTheBackend()
    {
        _rig.MakeQueues();
        _rig.Ram.Bytes.Slice(0x40000, 1024).Fill(0x5A);
        _rig.Io(0x01, 0x40000, 0, first: 4, blocks: 2, flags: 0x4000_0000);
        _rig.Io(0x00, 0, 0, 0, 1);
        _rig.Io(0x08, 0, 0, first: 100, blocks: 50, flags: 0x0200_0000);
        _rig.Ram.WriteNumber(0x41004, 4, 16);
        _rig.Ram.WriteNumber(0x41008, 8, 300);
        _rig.Ram.WriteNumber(0x41014, 4, 8);
        _rig.Ram.WriteNumber(0x41018, 8, 500);
        _rig.Command(1, 0x09, 0x41000, 0, 1, dword10: 1, dword11: 4);
        _rig.Disk.Drain();
        for (int i = 0; i < 4; i++)
        {
            _rig.Completion(1).Status.Should().Be(0);
        }

        _rig.Disk.Log.Should().Equal(
            (BlockOperation.Write, 2048L, 1024L, true),
            (BlockOperation.Flush, 0L, 0L, false),
            (BlockOperation.WriteZeroes, 51200L, 25600L, false),
            (BlockOperation.Discard, 153600L, 8192L, false),
            (BlockOperation.Discard, 256000L, 4096L, false));
        _rig.Disk.Bytes[2048].Should().Be(0x5A);
    }

    [Fact]
    public void Commands_AnsweredAtOnce_AreDoneWhenTheDoorbellHasBeenRung()
    {
        _rig.Disk.AnswersAtOnce = true;
        _rig.MakeQueues();
        for (int round = 0; round < 100; round++)
        {
            ushort id = _rig.Io(0x02, 0x40000, 0, first: round * 8, blocks: 8);
            _rig.Completion(1).Should().Be((id, 0U, 0U));
            _rig.Ram.Bytes.Slice(0x40000, 4096).SequenceEqual(_rig.Disk.Bytes.AsSpan(round * 4096, 4096)).Should().BeTrue();
        }

        _rig.Disk.MaxDepth.Should().Be(1);
    }

    [Fact]
    public void TrimOfManyRanges_AnsweredAtOnce_IsALoop()
    {
        _rig.Disk.AnswersAtOnce = true;
        _rig.MakeQueues();
        for (ulong range = 0; range < 256; range++)
        {
            _rig.Ram.WriteNumber(0x41004 + (range * 16), 4, 1);
            _rig.Ram.WriteNumber(0x41008 + (range * 16), 8, range * 2);
        }

        _rig.Command(1, 0x09, 0x41000, 0, 1, dword10: 255, dword11: 4);
        _rig.Completion(1).Status.Should().Be(0);
        _rig.Disk.Log.Should().HaveCount(256);
        _rig.Disk.MaxDepth.Should().Be(1);
    }

    [Fact]
    public void WriteCacheOff_ForcesWrites()
    {
        // §5.21.1.6
        _rig.MakeQueues();
        _rig.Admin(0x09, dword10: 6, dword11: 0).Status.Should().Be(0);
        _rig.Io(0x01, 0x40000, 0, 0, 1);
        _rig.Disk.Drain();
        _rig.Disk.Log[^1].Forced.Should().BeTrue();
    }

    [Theory]
    [InlineData(0x02, 0x40000, 0, DiskBytes / 512, 1, 0x4080)]
    [InlineData(0x02, 0x40001, 0, 0, 1, 0x4013)]
    [InlineData(0x02, 0x40000, 0x50010, 0, 16, 0x4013)]
    [InlineData(0x02, 0x7000_0000, 0, 0, 1, 0x4004)]
    [InlineData(0x02, 0x40000, 0x30000, 0, 8192, 0x4002)]
    [InlineData(0x7F, 0, 0, 0, 1, 0x4001)]
    public void BadCommands_AreAnsweredWithTheRightStatus(int code, long prp1, long prp2, int first, int blocks, int status)
    {
        _rig.MakeQueues();
        _rig.Io((byte)code, (ulong)prp1, (ulong)prp2, first, blocks);
        _rig.Completion(1).Status.Should().Be((uint)status);
        _rig.Disk.Waiting.Should().Be(0);
    }

    [Fact]
    public void PrpListThatPointsToItself_Ends()
    {
        _rig.MakeQueues();
        _rig.Ram.WriteNumber(0x30FF8, 8, 0x30FF8);
        _rig.Io(0x02, 0x40000, 0x30FF8, 0, 64);
        _rig.Completion(1).Status.Should().Be(0x4013);
    }

    [Fact]
    public void FullCompletionQueue_HoldsCommandsBack()
    {
        _rig.MakeQueues(entries: 4);
        for (int i = 0; i < 3; i++)
        {
            _rig.Io(0x00, 0, 0, 0, 1);
        }

        _rig.Disk.Drain();
        _rig.Completion(1, acknowledge: false);
        _rig.Completion(1, acknowledge: false);
        _rig.Completion(1, acknowledge: false);
        _rig.Io(0x00, 0, 0, 0, 1);
        _rig.Disk.Waiting.Should().Be(0, "no room for the answer");
        _rig.Acknowledge(1);
        _rig.Disk.Waiting.Should().Be(1);
        _rig.Disk.Drain();
        _rig.Completion(1).Status.Should().Be(0);
    }

    [Fact]
    public void DeletingAQueue_WaitsForItsCommands()
    {
        // §5.6
        _rig.MakeQueues();
        ushort id = _rig.Io(0x02, 0x40000, 0, 0, 1);
        _rig.Command(0, 0x00, 0, 0, 0, dword10: 1);
        _rig.HasCompletion(0).Should().BeFalse();
        _rig.Disk.Drain();
        _rig.Completion(1).Id.Should().Be(id);
        _rig.Completion(0).Status.Should().Be(0);
        _rig.Admin(0x04, dword10: 1).Status.Should().Be(0);
    }

    [Fact]
    public void DeletingACompletionQueueInUse_IsRefused()
    {
        _rig.MakeQueues();
        _rig.Admin(0x04, dword10: 1).Status.Should().Be(0x410C);
    }

    [Fact]
    public void Disable_WhileTheHostWorks_StaysReadyUntilItEnds()
    {
        // §7.3.2
        _rig.MakeQueues();
        _rig.Io(0x02, 0x40000, 0, 0, 1);
        _rig.Write(0x14, 0x0046_0000);
        _rig.Read(0x1C).Should().Be(1);
        _rig.Disk.Drain();
        _rig.Read(0x1C).Should().Be(0);
        _rig.HasCompletion(1).Should().BeFalse();
        _rig.Write(0x14, 0x0046_0001);
        _rig.Read(0x1C).Should().Be(1);
    }

    [Fact]
    public void Shutdown_IsReportedComplete()
    {
        _rig.Write(0x14, 0x0046_4001);
        (_rig.Read(0x1C) & 0xC).Should().Be(8);
    }

    [Fact]
    public void DoorbellOutOfRange_IsAnAsynchronousEvent()
    {
        // §5.2
        _rig.Command(0, 0x0C, 0, 0, 0);
        _rig.HasCompletion(0).Should().BeFalse();
        _rig.Write(0x1000 + (4 * 2 * 3), 1);
        _rig.Completion(0).Result.Should().Be(0x0001_0000);
    }

    [Fact]
    public void PinInterrupt_StaysUpWhileEntriesWait()
    {
        // §7.5.1.1
        var rig = new Rig(useMessages: false);
        rig.MakeQueues(vector: 0);
        rig.Io(0x00, 0, 0, 0, 1);
        rig.Pin.Level.Should().BeFalse();
        rig.Disk.Drain();
        rig.Pin.Level.Should().BeTrue();
        rig.Write(0x0C, 1);
        rig.Pin.Level.Should().BeFalse();
        rig.Write(0x10, 1);
        rig.Pin.Level.Should().BeTrue();
        rig.Completion(1);
        rig.Pin.Level.Should().BeFalse();
    }

    [Fact]
    public void NumberOfQueues_IsLimited()
    {
        (uint status, uint result) = _rig.Admin(0x09, dword10: 7, dword11: 0x00FF_00FF);
        (status, result).Should().Be((0U, 0x000F_000FU));
        _rig.Admin(0x05, dword10: 0x000F_0000 | 17, dword11: 1, prp1: 0x60000).Status.Should().Be(0x4101);
        _rig.Admin(0x05, dword10: 1, dword11: 1, prp1: 0x60000).Status.Should().Be(0x4102);
        _rig.Admin(0x05, dword10: 0x000F_0001, dword11: 0, prp1: 0x60000).Status.Should().Be(0x4002);
        _rig.Admin(0x01, dword10: 0x000F_0001, dword11: 0x0005_0001, prp1: 0x61000).Status.Should().Be(0x4100);
    }

    [Fact]
    public void SaveLoad_QueuesGoOn()
    {
        _rig.MakeQueues();
        _rig.Io(0x02, 0x40000, 0, 0, 1);
        _rig.Nvme.Pause();
        var other = new Rig();
        _rig.Ram.Bytes.CopyTo(other.Ram.Bytes);
        DeviceCheck.Copy(_rig.Nvme, other.Nvme);
        DeviceCheck.StateOf(other.Nvme).Should().Equal(DeviceCheck.StateOf(_rig.Nvme));
        other.TakeOver(_rig);
        other.Completion(1).Status.Should().Be(0);
        other.Io(0x02, 0x40000, 0, 9, 1);
        other.Disk.Drain();
        other.Completion(1).Status.Should().Be(0);
        other.Ram.Bytes.Slice(0x40000, 512).SequenceEqual(other.Disk.Bytes.AsSpan(9 * 512, 512)).Should().BeTrue();
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public void RandomAccess_NeverThrows(int seed)
    {
        var random = new Random(seed);
        _rig.MakeQueues();
        byte[] codes = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12];
        for (int i = 0; i < 30_000; i++)
        {
            switch (random.Next(8))
            {
                case 0:
                    _rig.Write((uint)(random.Next(16) * 4), (uint)random.NextInt64(1L << 32));
                    break;
                case 1:
                    _rig.Write(0x1000 + (uint)(random.Next(8) * 4), (uint)random.Next(random.Next(2) == 0 ? 16 : 70000));
                    break;
                case 2:
                    _rig.Disk.NextStatus = random.Next(8) == 0 ? BlockStatus.IoError : BlockStatus.Ok;
                    _rig.Disk.Step();
                    break;
                case 3:
                    _ = _rig.Read((uint)(random.Next(32) * 4));
                    break;
                case 4 when random.Next(20) == 0:
                    _rig.Nvme.Reset();
                    _rig.Setup(random.Next(2) == 0);
                    break;
                default:
                    for (int at = 0; at < 64; at += 4)
                    {
                        ulong slot = (ulong)(random.Next(2) == 0 ? 0x10000 : 0x14000) + (ulong)(random.Next(16) * 64);
                        _rig.Ram.WriteNumber(slot, 4, codes[random.Next(codes.Length)] | ((ulong)random.Next(65536) << 16));
                        _rig.Ram.WriteNumber(slot + 4, 4, 1);
                        _rig.Ram.WriteNumber(slot + 24, 8, (ulong)random.Next(1 << 18) & ~3UL);
                        _rig.Ram.WriteNumber(slot + 32, 8, (ulong)random.Next(1 << 18) & ~7UL);
                        _rig.Ram.WriteNumber(slot + 40, 4, (ulong)random.Next(random.Next(2) == 0 ? 32 : 10000));
                        _rig.Ram.WriteNumber(slot + 44, 4, (ulong)random.Next(3));
                        _rig.Ram.WriteNumber(slot + 48, 4, (ulong)random.Next(random.Next(2) == 0 ? 32 : 65536));
                    }

                    break;
            }
        }

        _rig.Nvme.Pause();
        DeviceCheck.Copy(_rig.Nvme, new Rig().Nvme);
    }

    private sealed class Rig
    {
        private const ulong Bar = 0xE000_0000;
        private const ulong TableBar = 0xE100_0000;
        private readonly AddressMap _mmio = new("mmio", 0);
        private readonly FakeMsiSink _msi = new();
        private readonly int[] _tail = new int[2];
        private readonly int[] _head = new int[2];
        private readonly bool[] _phase = [true, true];
        private readonly int[] _entries = [16, 16];
        private readonly bool _useMessages;
        private ushort _nextId = 100;

        public Rig(bool enable = true, bool useMessages = true)
        {
            _useMessages = useMessages;
            Nvme = new Nvme("nvme0", Disk, "SN1");
            var bus = new PciBus(new AddressMap("io", 0x10000), _mmio, Ram, _msi) { Router = new Router(Pin) };
            bus.Attach(Nvme, 5);
            Setup(enable);
        }

        public FakeIrqLine Pin { get; } = new();

        public TestRam Ram { get; } = new(1 << 20);

        public FakeDisk Disk { get; } = FakeDisk.Random(DiskBytes, 1);

        public Nvme Nvme { get; }

        public IReadOnlyList<(ulong Address, uint Data)> Messages => _msi.Messages;

        public void Setup(bool enable)
        {
            Nvme.Reset();
            Nvme.WriteConfig(0x10, AccessWidth.Dword, (uint)Bar);
            Nvme.WriteConfig(0x20, AccessWidth.Dword, (uint)TableBar);
            Nvme.WriteConfig(4, AccessWidth.Word, 6);
            if (_useMessages)
            {
                int at = (int)Nvme.ReadConfig(0x34, AccessWidth.Byte);
                Nvme.WriteConfig(at + 2, AccessWidth.Word, 0x8000);
                for (uint vector = 0; vector < 2; vector++)
                {
                    _mmio.Write(TableBar + (vector * 16), AccessWidth.Dword, 0xFEE0_0000 + (vector << 12));
                    _mmio.Write(TableBar + (vector * 16) + 8, AccessWidth.Dword, 0x40 + vector);
                    _mmio.Write(TableBar + (vector * 16) + 12, AccessWidth.Dword, 0);
                }
            }

            if (enable)
            {
                Write(0x24, 0x000F_000F);
                Write(0x28, 0x10000);
                Write(0x2C, 0);
                Write(0x30, 0x12000);
                Write(0x34, 0);
                Write(0x14, 0x0046_0001);
            }
        }

        public uint Read(uint offset) => (uint)_mmio.Read(Bar + offset, AccessWidth.Dword);

        public ulong Read64(uint offset) => _mmio.Read(Bar + offset, AccessWidth.Qword);

        public void Write(uint offset, uint value) => _mmio.Write(Bar + offset, AccessWidth.Dword, value);

        public void MakeQueues(int entries = 16, int vector = 1)
        {
            _entries[1] = entries;
            uint size = (uint)(entries - 1) << 16;
            Admin(0x05, dword10: size | 1, dword11: ((uint)vector << 16) | 3, prp1: 0x16000).Status.Should().Be(0);
            Admin(0x01, dword10: size | 1, dword11: 0x0001_0001, prp1: 0x14000).Status.Should().Be(0);
        }

        public (uint Status, uint Result) Admin(
            byte code, uint dword10 = 0, uint dword11 = 0, ulong prp1 = 0, uint space = 0)
        {
            ushort id = Command(0, code, prp1, 0, space, dword10, dword11);
            (ushort got, uint status, uint result) = Completion(0);
            got.Should().Be(id);
            return (status, result);
        }

        public ushort Io(byte code, ulong prp1, ulong prp2, int first, int blocks, uint flags = 0) =>
            Command(1, code, prp1, prp2, 1, (uint)first, 0, (uint)(blocks - 1) | flags);

        public ushort Command(
            int queue, byte code, ulong prp1, ulong prp2, uint space, uint dword10 = 0, uint dword11 = 0, uint dword12 = 0)
        {
            ulong at = (queue == 0 ? 0x10000UL : 0x14000UL) + (ulong)(_tail[queue] * 64);
            Ram.Bytes.Slice((int)at, 64).Clear();
            ushort id = _nextId++;
            Ram.WriteNumber(at, 4, code | ((ulong)id << 16));
            Ram.WriteNumber(at + 4, 4, space);
            Ram.WriteNumber(at + 24, 8, prp1);
            Ram.WriteNumber(at + 32, 8, prp2);
            Ram.WriteNumber(at + 40, 4, dword10);
            Ram.WriteNumber(at + 44, 4, dword11);
            Ram.WriteNumber(at + 48, 4, dword12);
            _tail[queue] = (_tail[queue] + 1) % _entries[queue];
            Write(0x1000 + (uint)(queue * 8), (uint)_tail[queue]);
            return id;
        }

        public bool HasCompletion(int queue) => ((Ram.ReadNumber(EntryAt(queue) + 14, 2) & 1) != 0) == _phase[queue];

        public (ushort Id, uint Status, uint Result) Completion(int queue, bool acknowledge = true)
        {
            HasCompletion(queue).Should().BeTrue();
            ulong at = EntryAt(queue);
            var entry = ((ushort)Ram.ReadNumber(at + 12, 2), (uint)Ram.ReadNumber(at + 14, 2) >> 1, (uint)Ram.ReadNumber(at, 4));
            _head[queue]++;
            if (_head[queue] == _entries[queue])
            {
                _head[queue] = 0;
                _phase[queue] = !_phase[queue];
            }

            if (acknowledge)
            {
                Acknowledge(queue);
            }

            return entry;
        }

        public void Acknowledge(int queue) => Write(0x1004 + (uint)(queue * 8), (uint)_head[queue]);

        public void TakeOver(Rig other)
        {
            Array.Copy(other._tail, _tail, 2);
            Array.Copy(other._head, _head, 2);
            Array.Copy(other._phase, _phase, 2);
        }

        private ulong EntryAt(int queue) => (queue == 0 ? 0x12000UL : 0x16000UL) + (ulong)(_head[queue] * 16);

        private sealed class Router : IPciInterruptRouter
        {
            private readonly FakeIrqLine _pin;

            public Router(FakeIrqLine pin) => _pin = pin;

            public void SetPirq(int input, bool asserted) => _pin.Set(asserted);
        }
    }
}

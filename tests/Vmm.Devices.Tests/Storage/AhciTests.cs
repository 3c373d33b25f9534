// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Pci;
using Vmm.Devices.Storage;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Storage;

/// <summary>The AHCI controller through its registers and memory structures (AHCI 1.3.1).</summary>
public sealed class AhciTests
{
    private const int DiskBytes = 4 << 20;
    private readonly Rig _rig = new();

    [Fact]
    public void Capabilities_TellPortsSlotsAndQueuing()
    {
        // §3.1.1
        uint cap = _rig.Hba(0x00);
        (cap & 0x1F).Should().Be(2, "three ports");
        ((cap >> 8) & 0x1F).Should().Be(31, "32 slots");
        (cap & 0xC000_0000).Should().Be(0xC000_0000, "64-bit addresses and NCQ");
        _rig.Hba(0x0C).Should().Be(7);
        _rig.Hba(0x10).Should().Be(0x0001_0301);
        _rig.Hba(0x04).Should().Be(0x8000_0000);
    }

    [Fact]
    public void Ports_AfterReset_ShowSignatures()
    {
        // §10.1.2, §3.3.9
        _rig.Port(0, 0x24).Should().Be(0x0000_0101);
        _rig.Port(1, 0x24).Should().Be(0xEB14_0101);
        _rig.Port(2, 0x24).Should().Be(0xFFFF_FFFF);
        (_rig.Port(0, 0x28) & 0xF).Should().Be(3);
        (_rig.Port(2, 0x28) & 0xF).Should().Be(0);
        _rig.Port(0, 0x20).Should().Be(0x150);
        _rig.Port(2, 0x20).Should().Be(0x7F);
    }

    [Fact]
    public void Identify_EndsWithAPioSetupFis()
    {
        _rig.Start(0);
        _rig.Issue(0, 3, Rig.Fis(0xEC), 0x20000, 512);
        _rig.Port(0, 0x38).Should().Be(0);
        _rig.Port(0, 0x10).Should().Be(2, "PSS and nothing else");
        _rig.Ram.Bytes[Rig.FisBase(0) + 0x20].Should().Be(0x5F);
        _rig.Ram.Bytes[Rig.FisBase(0) + 0x20 + 15].Should().Be(0x50, "E_STATUS");
        _rig.ByteCount(0, 3).Should().Be(512);
        BinaryPrimitives.ReadUInt16LittleEndian(_rig.Ram.Bytes[(0x20000 + 152)..]).Should().Be(0x0106, "word 76: NCQ");
    }

    [Fact]
    public void ReadDma_ScattersAndInterrupts()
    {
        _rig.Start(0);
        _rig.Hba(0x04, 0x8000_0002);
        _rig.Port(0, 0x14, 1);
        _rig.Issue(0, 0, Rig.Fis(0x25, lba: 100, count: 20), (0x20000, 4096), (0x30000, 6144));
        (_rig.Port(0, 0x20) & 0x80).Should().Be(0x80, "busy while the host works");
        _rig.Messages.Should().BeEmpty();
        _rig.Disk.Drain();
        _rig.Port(0, 0x38).Should().Be(0);
        _rig.Hba(0x08).Should().Be(1);
        _rig.Pin.Level.Should().BeTrue();
        byte[] expected = _rig.Disk.Bytes.AsSpan(51200, 10240).ToArray();
        _rig.Ram.Bytes.Slice(0x20000, 4096).SequenceEqual(expected.AsSpan(0, 4096)).Should().BeTrue();
        _rig.Ram.Bytes.Slice(0x30000, 6144).SequenceEqual(expected.AsSpan(4096)).Should().BeTrue();
        _rig.Ram.Marked.Should().Contain((0x30000UL, 6144));
        _rig.ByteCount(0, 0).Should().Be(10240);
        _rig.Port(0, 0x10, 1);
        _rig.Hba(0x08, 1);
        _rig.Pin.Level.Should().BeFalse();
    }

    [Fact]
    public void HbaStatus_ClearedWhileThePortStillHasSomething_StaysSet()
    {
        // §5.6.2: the port's status is cleared first.
        _rig.Start(0);
        _rig.Hba(0x04, 0x8000_0002);
        _rig.Port(0, 0x14, 2);
        _rig.Issue(0, 0, Rig.Fis(0xEC), 0x20000, 512);
        _rig.Hba(0x08, 1);
        _rig.Hba(0x08).Should().Be(1);
        _rig.Pin.Level.Should().BeTrue();
    }

    [Fact]
    public void QueuedCommands_EndInAnyOrder()
    {
        // Serial ATA 2.6 §13.6
        _rig.Start(0);
        for (int tag = 0; tag < 4; tag++)
        {
            _rig.IssueQueued(0, tag, 0x60, 10 * tag, 2, 0x20000 + (tag * 1024));
        }

        _rig.Disk.Waiting.Should().Be(4, "all at once");
        _rig.Port(0, 0x38).Should().Be(0, "the drive has taken them");
        _rig.Port(0, 0x34).Should().Be(0xF);
        (_rig.Port(0, 0x20) & 0x88).Should().Be(0);
        _rig.Disk.Step();
        _rig.Port(0, 0x34).Should().Be(0xE);
        _rig.Port(0, 0x10).Should().Be(8, "SDBS");
        BinaryPrimitives.ReadUInt32LittleEndian(_rig.Ram.Bytes[(Rig.FisBase(0) + 0x5C)..]).Should().Be(1);
        _rig.Disk.Drain();
        _rig.Port(0, 0x34).Should().Be(0);
        for (int tag = 0; tag < 4; tag++)
        {
            _rig.Ram.Bytes.Slice(0x20000 + (tag * 1024), 1024).SequenceEqual(_rig.Disk.Bytes.AsSpan(5120 * tag, 1024))
                .Should().BeTrue();
        }
    }

    [Fact]
    public void QueuedCommands_AnsweredAtOnce_AreDoneWhenTheRegisterIsWritten()
    {
        _rig.Disk.AnswersAtOnce = true;
        _rig.Start(0);
        for (int tag = 0; tag < 32; tag++)
        {
            _rig.IssueQueued(0, tag, 0x60, 10 * tag, 2, 0x20000 + (tag * 1024));
            _rig.Port(0, 0x34).Should().Be(0);
            _rig.Ram.Bytes.Slice(0x20000 + (tag * 1024), 1024).SequenceEqual(_rig.Disk.Bytes.AsSpan(5120 * tag, 1024))
                .Should().BeTrue();
        }

        _rig.Disk.MaxDepth.Should().Be(1);
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void QueuedCommands_OfOneRegisterWrite_ReachTheDiskInOrderOfTheirSlots(bool answersAtOnce)
    {
        _rig.Disk.AnswersAtOnce = answersAtOnce;
        _rig.Start(0);
        for (int tag = 0; tag < 8; tag++)
        {
            _rig.Prepare(0, tag, Rig.QueuedFis(0x60, tag, 100 - (10 * tag), 2), (0x20000 + (tag * 1024), 1024));
        }

        _rig.Port(0, 0x34, 0xFF);
        _rig.Port(0, 0x38, 0xFF);
        _rig.Disk.Drain();
        _rig.Disk.Log.ConvertAll(entry => entry.Offset / 512).Should().Equal(100, 90, 80, 70, 60, 50, 40, 30);
        _rig.Port(0, 0x34).Should().Be(0);
    }

    [Fact]
    public void QueuedWrite_WithFua_IsForced()
    {
        _rig.Start(0);
        _rig.Ram.Bytes.Slice(0x20000, 1024).Fill(0x3C);
        byte[] fis = Rig.QueuedFis(0x61, 5, 40, 2);
        fis[7] |= 0x80;
        _rig.Port(0, 0x34, 1u << 5);
        _rig.Issue(0, 5, fis, 0x20000, 1024);
        _rig.Disk.Drain();
        _rig.Disk.Log.Should().Equal((BlockOperation.Write, 20480L, 1024L, true));
        _rig.Disk.Bytes[20480].Should().Be(0x3C);
    }

    [Fact]
    public void QueuedError_StopsThePort_AndTheLogNamesTheCommand()
    {
        _rig.Start(0);
        _rig.IssueQueued(0, 2, 0x60, 77, 1, 0x20000);
        _rig.Disk.NextStatus = BlockStatus.IoError;
        _rig.Disk.Drain();
        _rig.Disk.NextStatus = BlockStatus.Ok;
        (_rig.Port(0, 0x10) & 0x4000_0000).Should().Be(0x4000_0000, "TFES");
        (_rig.Port(0, 0x20) & 1).Should().Be(1);
        _rig.Port(0, 0x34).Should().Be(4, "still active");
        _rig.Port(0, 0x18, _rig.Port(0, 0x18) & ~1u);
        _rig.Port(0, 0x34).Should().Be(0);
        _rig.Port(0, 0x10, 0xFFFF_FFFF);
        _rig.Start(0);
        _rig.Issue(0, 0, Rig.Fis(0x2F, lba: 0x10, count: 1), 0x20000, 512);
        (_rig.Ram.Bytes[0x20000], _rig.Ram.Bytes[0x20002], _rig.Ram.Bytes[0x20004]).Should().Be((2, 0x51, 77));
    }

    [Fact]
    public void FailedCommand_HaltsUntilSoftwareClearsStart()
    {
        // §6.2.2
        _rig.Start(0);
        _rig.Issue(0, 1, Rig.Fis(0x25, lba: DiskBytes, count: 1), 0x20000, 512);
        _rig.Port(0, 0x38).Should().Be(2, "the slot stays issued");
        (_rig.Port(0, 0x10) & 0x4000_0001).Should().Be(0x4000_0001);
        ((_rig.Port(0, 0x18) >> 8) & 0x1F).Should().Be(1, "CCS names it");
        _rig.Issue(0, 2, Rig.Fis(0xE7));
        _rig.Disk.Waiting.Should().Be(0);
        _rig.Port(0, 0x18, _rig.Port(0, 0x18) & ~1u);
        _rig.Port(0, 0x38).Should().Be(0);
        _rig.Start(0);
        _rig.Issue(0, 2, Rig.Fis(0xE7));
        _rig.Disk.Drain();
        _rig.Port(0, 0x38).Should().Be(0);
    }

    [Fact]
    public void Stop_WhileTheHostWorks_KeepsTheListRunning()
    {
        // §10.3.2: CR clears when the port is idle.
        _rig.Start(0);
        _rig.Issue(0, 0, Rig.Fis(0x25, count: 8), 0x20000, 4096);
        _rig.Port(0, 0x18, _rig.Port(0, 0x18) & ~1u);
        (_rig.Port(0, 0x18) & 0x8000).Should().Be(0x8000);
        _rig.Disk.Drain();
        (_rig.Port(0, 0x18) & 0x8000).Should().Be(0);
        _rig.Port(0, 0x38).Should().Be(0);
        _rig.Port(0, 0x10).Should().Be(0, "nobody is told of a command that was thrown away");
    }

    [Fact]
    public void AdapterReset_WhileTheHostWorks_EndsAfterIt()
    {
        _rig.Start(0);
        _rig.Issue(0, 0, Rig.Fis(0x25, count: 8), 0x20000, 4096);
        _rig.Hba(0x04, 0x8000_0001);
        (_rig.Hba(0x04) & 1).Should().Be(1);
        _rig.Disk.Drain();
        _rig.Hba(0x04).Should().Be(0x8000_0000);
        _rig.Port(0, 0x24).Should().Be(0x0101);
    }

    [Fact]
    public void SoftwareReset_ByControlFis_SendsTheSignature()
    {
        // §10.4.1
        _rig.Start(1);
        byte[] on = Rig.Fis(0);
        on[1] = 0;
        on[15] = 4;
        _rig.Issue(1, 0, on);
        on[15] = 0;
        _rig.Issue(1, 0, on);
        _rig.Port(1, 0x38).Should().Be(0);
        Span<byte> fis = _rig.Ram.Bytes.Slice(Rig.FisBase(1) + 0x40, 20);
        (fis[0], fis[5], fis[6]).Should().Be((0x34, 0x14, 0xEB));
    }

    [Fact]
    public void LinkReset_ComesBackWithAConnectEvent()
    {
        // §10.4.2
        _rig.Port(0, 0x30, 0xFFFF_FFFF);
        _rig.Port(0, 0x2C, 0x301);
        _rig.Port(0, 0x28).Should().Be(0);
        _rig.Port(0, 0x2C, 0x300);
        _rig.Port(0, 0x28).Should().Be(0x123);
        (_rig.Port(0, 0x10) & 0x40).Should().Be(0x40);
        _rig.Port(0, 0x30, 1u << 26);
        (_rig.Port(0, 0x10) & 0x40).Should().Be(0);
    }

    [Fact]
    public void Packet_ReadsTheCd()
    {
        _rig.Start(1);
        _rig.IssuePacket(1, [3, 0, 0, 0, 18, 0, 0, 0, 0, 0, 0, 0], 0x20000, 18);
        _rig.Ram.Bytes[0x20002].Should().Be(6, "unit attention after power-on");
        _rig.IssuePacket(1, [0x28, 0, 0, 0, 0, 3, 0, 0, 2, 0, 0, 0], 0x20000, 4096);
        _rig.Cd.Drain();
        _rig.Ram.Bytes.Slice(0x20000, 4096).SequenceEqual(_rig.Cd.Bytes.AsSpan(6144, 4096)).Should().BeTrue();
        _rig.Port(1, 0x38).Should().Be(0);
        _rig.IssuePacket(1, [0x28, 0, 0xFF, 0, 0, 3, 0, 0, 2, 0, 0, 0], 0x20000, 4096);
        (_rig.Port(1, 0x20) & 0xFF01).Should().Be(0x5401, "illegal request");
    }

    [Fact]
    public void ScatterListOutsideRam_IsABusError()
    {
        _rig.Start(0);
        _rig.Issue(0, 0, Rig.Fis(0x25, count: 1), (0x7000_0000, 512));
        (_rig.Port(0, 0x10) & 0x5000_0000).Should().Be(0x5000_0000);
    }

    [Fact]
    public void ScatterListTooShort_IsAnOverflow()
    {
        _rig.Start(0);
        _rig.Issue(0, 0, Rig.Fis(0x25, count: 8), 0x20000, 512);
        (_rig.Port(0, 0x10) & 0x4100_0000).Should().Be(0x4100_0000);
        _rig.Disk.Waiting.Should().Be(0);
    }

    [Fact]
    public void SaveLoad_KeepsRegistersAndGoesOn()
    {
        _rig.Start(0);
        _rig.Issue(0, 0, Rig.Fis(0x25, count: 8), 0x20000, 4096);
        _rig.Ahci.Pause();
        var other = new Rig();
        DeviceCheck.Copy(_rig.Ahci, other.Ahci);
        DeviceCheck.StateOf(other.Ahci).Should().Equal(DeviceCheck.StateOf(_rig.Ahci));
        other.Port(0, 0x10).Should().Be(1);
        other.Issue(0, 1, Rig.Fis(0x25, count: 8), 0x20000, 4096);
        other.Disk.Drain();
        other.Port(0, 0x38).Should().Be(0);
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public void RandomAccess_NeverThrows(int seed)
    {
        var random = new Random(seed);
        byte[] commands = [0x25, 0x35, 0x60, 0x61, 0xEC, 0xC8, 0x20, 0xA0, 0xE7, 0x2F, 0x06];
        for (int i = 0; i < 20_000; i++)
        {
            int port = random.Next(3);
            switch (random.Next(8))
            {
                case 0:
                    _rig.Port(port, (uint)(random.Next(32) * 4), (uint)random.NextInt64(1L << 32));
                    break;
                case 1:
                    _ = _rig.Port(port, (uint)(random.Next(32) * 4));
                    break;
                case 2:
                    _rig.Hba((uint)(random.Next(16) * 4), (uint)random.Next(16) | 2);
                    break;
                case 3:
                    _rig.Disk.NextStatus = random.Next(8) == 0 ? BlockStatus.IoError : BlockStatus.Ok;
                    _ = random.Next(2) == 0 ? _rig.Disk.Step() : _rig.Cd.Step();
                    break;
                case 4:
                    _rig.Port(port, 0x18, _rig.Port(port, 0x18) & ~1u);
                    _rig.Start(port);
                    break;
                default:
                    byte[] fis = Rig.Fis(commands[random.Next(commands.Length)], random.Next(9000), random.Next(64));
                    fis[random.Next(20)] ^= (byte)(random.Next(4) == 0 ? 1 << random.Next(8) : 0);
                    _rig.Port(port, 0x34, (uint)random.Next(16));
                    _rig.Issue(port, random.Next(32), fis, (0x20000 + random.Next(4096), random.Next(1, 40000)), (0x30000, 4096));
                    break;
            }
        }

        _rig.Ahci.Pause();
        DeviceCheck.Copy(_rig.Ahci, new Rig().Ahci);
    }

    private sealed class Rig
    {
        private const ulong Bar = 0xE000_0000;
        private readonly AddressMap _mmio = new("mmio", 0);
        private readonly FakeMsiSink _msi = new();

        public Rig()
        {
            Ahci = new Ahci("ahci0", new AtaDisk(Disk, "SN1"), new AtapiCdrom(Cd, "SN2"), null);
            var bus = new PciBus(new AddressMap("io", 0x10000), _mmio, Ram, _msi) { Router = new Router(Pin) };
            bus.Attach(Ahci, 4);
            Ahci.Reset();
            Ahci.WriteConfig(0x24, AccessWidth.Dword, (uint)Bar);
            Ahci.WriteConfig(4, AccessWidth.Word, 6);
        }

        public FakeIrqLine Pin { get; } = new();

        public TestRam Ram { get; } = new(1 << 20);

        public FakeDisk Disk { get; } = FakeDisk.Random(DiskBytes, 1);

        public FakeDisk Cd { get; } = FakeDisk.Random(1 << 20, 2);

        public Ahci Ahci { get; }

        public IReadOnlyList<(ulong Address, uint Data)> Messages => _msi.Messages;

        public static byte[] Fis(byte command, int lba = 0, int count = 0)
        {
            byte[] fis = new byte[20];
            fis[0] = 0x27;
            fis[1] = 0x80;
            fis[2] = command;
            fis[4] = (byte)lba;
            fis[5] = (byte)(lba >> 8);
            fis[6] = (byte)(lba >> 16);
            fis[7] = 0x40;
            fis[8] = (byte)(lba >> 24);
            fis[12] = (byte)count;
            fis[13] = (byte)(count >> 8);
            return fis;
        }

        public static byte[] QueuedFis(byte command, int tag, int lba, int count)
        {
            byte[] fis = Fis(command, lba);
            fis[3] = (byte)count;
            fis[11] = (byte)(count >> 8);
            fis[12] = (byte)(tag << 3);
            return fis;
        }

        public static int FisBase(int port) => 0x4000 + (port * 0x100);

        public uint Hba(uint register) => (uint)_mmio.Read(Bar + register, AccessWidth.Dword);

        public void Hba(uint register, uint value) => _mmio.Write(Bar + register, AccessWidth.Dword, value);

        public uint Port(int port, uint register) => Hba(0x100 + ((uint)port * 0x80) + register);

        public void Port(int port, uint register, uint value) => Hba(0x100 + ((uint)port * 0x80) + register, value);

        public void Start(int port)
        {
            Port(port, 0x00, 0x1000u + ((uint)port * 0x400));
            Port(port, 0x04, 0);
            Port(port, 0x08, (uint)FisBase(port));
            Port(port, 0x0C, 0);
            Port(port, 0x18, 0x10);
            Port(port, 0x10, 0xFFFF_FFFF);
            Port(port, 0x18, 0x11);
        }

        public uint ByteCount(int port, int slot) => (uint)Ram.ReadNumber(0x1000UL + ((uint)port * 0x400) + ((uint)slot * 32) + 4, 4);

        public void Issue(int port, int slot, byte[] fis, int address, int length) => Issue(port, slot, fis, (address, length));

        public void Issue(int port, int slot, byte[] fis, params (int Address, int Length)[] pieces)
        {
            Prepare(port, slot, fis, pieces);
            Port(port, 0x38, 1u << slot);
        }

        /// <summary>A command that is not issued yet.</summary>
        public void Prepare(int port, int slot, byte[] fis, params (int Address, int Length)[] pieces)
        {
            ulong header = 0x1000UL + ((uint)port * 0x400) + ((uint)slot * 32);
            ulong table = 0x8000UL + ((uint)slot * 0x200);
            Ram.WriteNumber(header, 4, 5 | ((uint)pieces.Length << 16));
            Ram.WriteNumber(header + 4, 4, 0);
            Ram.WriteNumber(header + 8, 8, table);
            fis.CopyTo(Ram.Bytes[(int)table..]);
            for (int i = 0; i < pieces.Length; i++)
            {
                ulong entry = table + 0x80 + ((uint)i * 16);
                Ram.WriteNumber(entry, 8, (ulong)pieces[i].Address);
                Ram.WriteNumber(entry + 12, 4, (ulong)(pieces[i].Length - 1));
            }
        }

        public void IssueQueued(int port, int tag, byte command, int lba, int count, int address)
        {
            Port(port, 0x34, 1u << tag);
            Issue(port, tag, QueuedFis(command, tag, lba, count), address, count * 512);
        }

        public void IssuePacket(int port, byte[] packet, int address, int length)
        {
            packet.CopyTo(Ram.Bytes[0x8040..]);
            byte[] fis = Fis(0xA0);
            fis[3] = 1;
            Issue(port, 0, fis, address, length);
        }

        private sealed class Router : IPciInterruptRouter
        {
            private readonly FakeIrqLine _pin;

            public Router(FakeIrqLine pin) => _pin = pin;

            public void SetPirq(int input, bool asserted) => _pin.Set(asserted);
        }
    }
}

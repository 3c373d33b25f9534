// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using Vmm.Core;
using Vmm.Devices.Net;
using Vmm.Devices.Pci;
using Vmm.Devices.Tests.Virtio;
using Vmm.Devices.Virtio;
using Vmm.TestKit;

namespace Vmm.Devices.Tests.Fuzz;

/// <summary>
/// What a fuzzed device is given. Three promises are checked: nothing throws, nothing is written to memory that the driver
/// did not name, and the state can be saved at the end and loaded into a device that was just made.
/// </summary>
internal static class FuzzTargets
{
    private const int RamBytes = 1 << 20;
    private const ulong Requests = 0x80000;
    private const ulong Answers = 0xA0000;
    private const ulong Poison = 0xF0000; // never named as writable
    private const int AnswerBytes = 4096;
    private const int MaxSteps = 24;
    private const ulong Bar = 0xE000_0000;
    private const int IoBar = 0xC000;

    private static readonly byte[] s_mac = [0x52, 0x54, 0, 1, 2, 3];

    /// <summary>Runs one input.</summary>
    public static void Run(string name, byte[] input)
    {
        if (name is "e1000" or "rtl8139")
        {
            RunCard(name, input);
        }
        else
        {
            RunModel(name, input);
        }
    }

    /// <summary>Inputs to begin with: what a driver does first.</summary>
    public static IEnumerable<byte[]> Seeds(string name)
    {
        yield return new byte[64];
        var seed = new List<byte>();
        switch (name)
        {
            case "9p":
                // Tversion, Tattach, Twalk to itself, Tlopen, Treaddir.
                Request(seed, 0, 8, "15000000 64 FFFF 00200000 0800 3950323030302E4C");
                Request(seed, 0, 8, "17000000 68 0100 00000000 FFFFFFFF 0000 0000 00000000");
                Request(seed, 0, 8, "11000000 6E 0100 00000000 01000000 0000");
                Request(seed, 0, 8, "0F000000 0C 0100 01000000 00000000");
                Request(seed, 0, 64, "17000000 28 0100 01000000 0000000000000000 00020000");
                break;
            case "block":
                Request(seed, 0, 33, "00000000 00000000 0000000000000000");
                Request(seed, 0, 1, "04000000 00000000 0000000000000000");
                Request(seed, 0, 1, "0B000000 00000000 0000000000000000 0000000000000000 01000000 00000000");
                break;
            case "scsi":
                // INQUIRY, READ CAPACITY, READ(10) on target 0.
                Request(seed, 2, 20, "01000040 00000000 0000000000000000 00 00 00 12000000240000000000000000000000000000000000000000000000 00000000");
                Request(seed, 2, 20, "01000040 00000000 0000000000000000 00 00 00 25000000000000000000000000000000000000000000000000000000 00000000");
                Request(seed, 2, 60, "01000040 00000000 0000000000000000 00 00 00 28000000000000000100000000000000000000000000000000000000 00000000");
                break;
            case "gpu":
                Request(seed, 0, 40, "00010000 00000000 0000000000000000 00000000 00000000");
                Request(seed, 0, 2, "01010000 00000000 0000000000000000 00000000 00000000 01000000 01000000 10000000 10000000");
                Request(seed, 0, 2, "03010000 00000000 0000000000000000 00000000 00000000 00000000 00000000 10000000 10000000 00000000 01000000");
                break;
            case "e1000":
                // Rings at 0x80000 and 0x81000, then reception and transmission on; a descriptor; doorbell; a frame.
                Register(seed, 0x2800, 0x80000);
                Register(seed, 0x2808, 256);
                Register(seed, 0x2818, 15);
                Register(seed, 0x3800, 0x81000);
                Register(seed, 0x3808, 256);
                Register(seed, 0xD0, 0x1FFFF);
                Register(seed, 0x100, 0x8002);
                Register(seed, 0x400, 2);
                Poke(seed, 0x000, "0000 0A00 0000 0000 0000 0000 0000 0000");
                Poke(seed, 0x100, "0000 0A00 0000 0000 4000 000B 0000 0000");
                Register(seed, 0x3818, 1);
                seed.AddRange((byte[])[5, 64, 0]);
                break;
            case "rtl8139":
                Register(seed, 0x37, 0x0C);
                Register(seed, 0x30, 0x80000);
                Register(seed, 0x44, 0x0F);
                Register(seed, 0x3C, 0xFFFF);
                Register(seed, 0x20, 0xA0000);
                Register(seed, 0x10, 100);
                seed.AddRange((byte[])[5, 64, 0]);
                break;
            default:
                for (byte queue = 0; queue < 4; queue++)
                {
                    Request(seed, queue, 16, "00000000 00000000 00000000 00000000");
                }

                break;
        }

        yield return [.. seed];
    }

    // A request of a model: queue, length of the readable part, size of the writable part by 16, then the bytes.
    private static void Request(List<byte> seed, byte queue, byte answer, string hex)
    {
        byte[] bytes = Convert.FromHexString(hex.Replace(" ", "", StringComparison.Ordinal));
        seed.AddRange((byte[])[queue, (byte)bytes.Length, answer]);
        seed.AddRange(bytes);
    }

    // A step of a card: a register written with 32 bits.
    private static void Register(List<byte> seed, ushort offset, uint value)
    {
        byte[] step = new byte[7];
        step[0] = 2 << 3;
        BinaryPrimitives.WriteUInt16LittleEndian(step.AsSpan(1), offset);
        BinaryPrimitives.WriteUInt32LittleEndian(step.AsSpan(3), value);
        seed.AddRange(step);
    }

    private static void Poke(List<byte> seed, ushort offset, string hex)
    {
        seed.AddRange((byte[])[3, (byte)offset, (byte)(offset >> 8)]);
        seed.AddRange(Convert.FromHexString(hex.Replace(" ", "", StringComparison.Ordinal)));
    }

    private static TestRam MakeRam()
    {
        var ram = new TestRam(RamBytes);
        ram.Bytes[(int)Poison..].Fill(0xA5);
        return ram;
    }

    private static void CheckPoison(TestRam ram)
    {
        if (ram.Bytes[(int)Poison..].IndexOfAnyExcept((byte)0xA5) >= 0)
        {
            throw new InvalidOperationException("memory was written that the driver did not name");
        }
    }

    private static VirtioMmio MakeModel(string name, TestRam ram, out IVirtioModel model)
    {
        model = name == "9p" ? new Virtio9P(new MemoryShare(), "data") : VirtioFuzzTests.Make(name);
        return new VirtioMmio(new VirtioDevice("dut", model, ram, new VirtioOptions { Inline = true }), new FakeIrqLine());
    }

    // The rules of rings are kept here, so that requests get through to the model; VirtioFuzzTests breaks them.
    private static void RunModel(string name, ReadOnlySpan<byte> input)
    {
        TestRam ram = MakeRam();
        using VirtioMmio mmio = MakeModel(name, ram, out IVirtioModel model);
        mmio.Reset();
        mmio.Resume();
        var driver = new VirtioMmioDriver(mmio, ram);
        int queues = model.QueueSizes.Length;
        ulong features = driver.OfferedFeatures() & ~VirtioFeature.RingPacked;
        driver.Start(features, queues, 16);
        Span<DriverBuffer> chain = new DriverBuffer[2];
        for (int step = 0; input.Length >= 3 && step < MaxSteps; step++)
        {
            int queue = input[0] % queues;
            int length = Math.Min(input[1], input.Length - 3);
            int answer = Math.Min(AnswerBytes, input[2] * 16);
            input.Slice(3, length).CopyTo(ram.Bytes[(int)Requests..]);
            input = input[(3 + length)..];
            int count = 0;
            if (length > 0)
            {
                chain[count++] = new DriverBuffer(Requests, (uint)length, false);
            }

            if (answer > 0)
            {
                chain[count++] = new DriverBuffer(Answers, (uint)answer, true);
            }

            if (count == 0 || driver[queue].InFlight > 6)
            {
                continue;
            }

            driver[queue].Add(chain[..count].ToArray());
            driver.Kick(queue);
            while (driver[queue].TryTakeUsed(out _, out uint used))
            {
                if (used > AnswerBytes)
                {
                    throw new InvalidOperationException($"{used} bytes written into {answer}");
                }
            }

            if ((driver.Status & 0x40) != 0)
            {
                driver = new VirtioMmioDriver(mmio, ram);
                driver.Start(features, queues, 16);
            }
        }

        mmio.Pause();
        var writer = new StateWriter("dut");
        mmio.Save(writer);
        TestRam otherRam = MakeRam();
        ram.Bytes.CopyTo(otherRam.Bytes);
        using (VirtioMmio other = MakeModel(name, otherRam, out _))
        {
            other.Reset();
            other.Load(new StateReader("dut", writer.ToArray()), other.StateVersion);
            other.Resume();
            other.Pause();
        }

        mmio.Resume();
        CheckPoison(ram);
        CheckPoison(otherRam);
    }

    private static EthernetCard MakeCard(string name, TestRam ram, FakeNetBackend net, AddressMap ports, AddressMap mmio)
    {
        EthernetCard card = name == "e1000"
            ? new E1000("net0", net, s_mac, inline: true)
            : new Rtl8139("net0", net, s_mac, inline: true);
        new PciBus(ports, mmio, ram, new FakeMsiSink()) { Router = new NoRouter() }.Attach(card, 3);
        card.Reset();
        bool isMemoryFirst = name == "e1000";
        card.WriteConfig(isMemoryFirst ? 0x10 : 0x14, AccessWidth.Dword, (uint)Bar);
        card.WriteConfig(isMemoryFirst ? 0x14 : 0x10, AccessWidth.Dword, IoBar);
        card.WriteConfig(4, AccessWidth.Word, 7);
        return card;
    }

    // A card is given steps: registers written and read at every width, descriptors and data poked into memory, frames.
    private static void RunCard(string name, ReadOnlySpan<byte> input)
    {
        TestRam ram = MakeRam();
        var net = new FakeNetBackend { CanOffload = false };
        var ports = new AddressMap("io", 0x10000);
        var mmio = new AddressMap("mmio", 1UL << 32);
        using EthernetCard card = MakeCard(name, ram, net, ports, mmio);
        card.Resume();
        uint registers = name == "e1000" ? 0x20000u : 0x100u;
        for (int step = 0; input.Length >= 3 && step < 4 * MaxSteps; step++)
        {
            byte operation = input[0];
            uint offset = BinaryPrimitives.ReadUInt16LittleEndian(input[1..]);
            input = input[3..];
            var width = (AccessWidth)(1 << ((operation >> 3) & 3));
            switch (operation & 7)
            {
                case 0 or 1:
                    ulong value = ReadNumber(ref input);
                    AddressMap map = (operation & 1) == 0 ? mmio : ports;
                    ulong at = (operation & 1) == 0 ? Bar + (offset % registers) : IoBar + (offset % 256);
                    map.Write(at, width, value);
                    break;
                case 2:
                    mmio.Read(Bar + (offset % registers), width);
                    ports.Read(IoBar + (offset % 256), width);
                    break;
                case 3 or 4:
                    int take = Math.Min(16, input.Length);
                    input[..take].CopyTo(ram.Bytes[(int)(Requests + (offset % 0x8000))..]);
                    input = input[take..];
                    break;
                case 5 or 6:
                    byte[] frame = new byte[14 + (offset % 9000)];
                    frame.AsSpan(0, 6).Fill(0xFF);
                    if ((operation & 8) != 0)
                    {
                        s_mac.CopyTo(frame, 0);
                    }

                    int header = Math.Min(frame.Length - 12, Math.Min(60, input.Length));
                    input[..header].CopyTo(frame.AsSpan(12));
                    input = input[header..];
                    bool isLarge = (operation & 16) != 0;
                    net.Deliver(frame, isLarge ? new NetOffload(true, 34, 16, (byte)(offset % 5), (ushort)(offset % 1500), 54) : default);
                    break;
                default:
                    card.Pause();
                    var state = new StateWriter("net0");
                    card.Save(state);
                    card.Load(new StateReader("net0", state.ToArray()), card.StateVersion);
                    card.Resume();
                    break;
            }
        }

        card.Pause();
        var writer = new StateWriter("net0");
        card.Save(writer);
        using EthernetCard other = MakeCard(
            name, ram, new FakeNetBackend(), new AddressMap("io", 0x10000), new AddressMap("mmio", 1UL << 32));
        other.Load(new StateReader("dut", writer.ToArray()), other.StateVersion);
    }

    private static ulong ReadNumber(ref ReadOnlySpan<byte> input)
    {
        Span<byte> bytes = stackalloc byte[8];
        int take = Math.Min(4, input.Length);
        input[..take].CopyTo(bytes);
        input = input[take..];
        return BinaryPrimitives.ReadUInt64LittleEndian(bytes);
    }

    private sealed class NoRouter : IPciInterruptRouter
    {
        public void SetPirq(int input, bool asserted)
        {
        }
    }
}

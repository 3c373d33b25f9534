// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Storage;
using Vmm.Devices.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Virtio;

/// <summary>
/// A hostile driver against every model: rings, tables and requests of random bytes, weighted so that many are nearly
/// right. Nothing may throw, hang, write outside buffers that the chain made writable, or survive a reset.
/// </summary>
public sealed class VirtioFuzzTests
{
    private const int RamBytes = 1 << 20;
    private const ulong Poison = 0xF0000; // never named as writable

    public static TheoryData<string, bool> Models
    {
        get
        {
            var data = new TheoryData<string, bool>();
            foreach (string model in (string[])["block", "rng", "net", "console", "balloon", "vsock", "input", "gpu", "scsi"])
            {
                data.Add(model, false);
                data.Add(model, true);
            }

            return data;
        }
    }

    [Theory]
    [MemberData(nameof(Models))]
    public void Model_HostileDriver_StaysDefined(string name, bool packed)
    {
        for (int seed = 0; seed < 40; seed++)
        {
            var random = new Random((seed * 977) + name.Length);
            var ram = new TestRam(RamBytes);
            ram.Bytes[(int)Poison..].Fill(0xA5);
            using IVirtioModel model = Make(name);
            using var mmio = new VirtioMmio(
                new VirtioDevice("dut", model, ram, new VirtioOptions { Inline = true, Packed = true }), new FakeIrqLine());
            mmio.Reset();
            mmio.Resume();
            var driver = new VirtioMmioDriver(mmio, ram);
            int queues = model.QueueSizes.Length;
            ulong features = driver.OfferedFeatures() & ~VirtioFeature.RingPacked;
            driver.Start(features | (packed ? VirtioFeature.RingPacked : 0), queues, 8);
            for (int round = 0; round < 150; round++)
            {
                int queue = random.Next(queues);
                Scribble(ram, driver[queue], random, packed);
                driver.Kick(queue);
                if (random.Next(10) == 0)
                {
                    DeviceCheck.Fuzz(mmio, random.Next(), 10);
                }

                if ((driver.Status & 0x40) != 0 || driver.Status == 0)
                {
                    driver = new VirtioMmioDriver(mmio, ram);
                    driver.Start(features | (packed ? VirtioFeature.RingPacked : 0), queues, 8);
                }
            }

            mmio.Pause();
            var writer = new StateWriter("dut");
            mmio.Save(writer);
            mmio.Resume();
            driver.Status = 0;
            driver.Status.Should().Be(0);
            ram.Bytes[(int)Poison..].IndexOfAnyExcept((byte)0xA5).Should().Be(-1, $"{name} seed {seed} wrote where it must not");
        }
    }

    private static void Scribble(TestRam ram, VirtqueueDriver ring, Random random, bool packed)
    {
        // Request bytes: small numbers are likelier to mean something.
        for (ulong at = 0x80000; at < 0x82000; at += 4)
        {
            ram.WriteNumber(at, 4, random.Next(3) == 0 ? (ulong)random.Next(16) : (ulong)random.Next());
        }

        int count = random.Next(1, 9);
        for (int i = 0; i < count; i++)
        {
            ulong address = random.Next(12) == 0
                ? (ulong)random.NextInt64()
                : 0x80000UL + (ulong)random.Next(0x10000);
            uint length = random.Next(8) == 0 ? (uint)random.Next() : (uint)random.Next(0, 5000);

            // Nothing writable reaches the poison.
            length = address < Poison ? (uint)Math.Min(length, Poison - address) : address < RamBytes ? 0 : length;
            ushort flags = (ushort)(random.Next(4) | (random.Next(8) == 0 ? 4 : 0));
            ulong at = ring.Descriptors + (16UL * (uint)random.Next(ring.Size));
            if (packed)
            {
                flags |= (ushort)(random.Next(2) == 0 ? 0x80 : 0x8000);
                ring.PutRaw(at, address, length, (ushort)random.Next(16), flags);
            }
            else
            {
                ring.PutRaw(at, address, length, flags, (ushort)random.Next(random.Next(6) == 0 ? 65536 : ring.Size));
            }
        }

        if (!packed)
        {
            int heads = random.Next(1, 4);
            for (int i = 0; i < heads; i++)
            {
                ring.PublishHead((ushort)random.Next(random.Next(20) == 0 ? 65536 : ring.Size));
            }
        }
    }

    internal static IVirtioModel Make(string name) => name switch
    {
        "block" => new VirtioBlock(new FakeBlockBackend(1 << 18)),
        "rng" => new VirtioRng(new Entropy()),
        "net" => new VirtioNet(new EchoNet(), [2, 0, 0, 0, 0, 1]),
        "console" => new VirtioConsole([new VirtioConsolePort(new FakeCharBackend(), IsConsole: true), new VirtioConsolePort(new FakeCharBackend(), "p")]),
        "balloon" => new VirtioBalloon(new Reclaimer()),
        "vsock" => new VirtioVsock(3, new EchoVsock()),
        "gpu" => new VirtioGpu(maxBytes: 1 << 20),
        "scsi" => new VirtioScsi(
            [new ScsiDisk(new FakeBlockBackend(1 << 18), "d"), new ScsiCdrom(new AtapiCdrom(new FakeBlockBackend(1 << 16), "c"))]),
        _ => new VirtioInput(VirtioInputKind.Tablet),
    };

    private sealed class Entropy : IEntropySource
    {
        public void Fill(Span<byte> into) => into.Fill(1);
    }

    private sealed class Reclaimer : IMemoryReclaimer
    {
        public bool TryRelease(ulong guestAddress, ulong lengthBytes) => (guestAddress | lengthBytes) % 4096 == 0;
    }

    /// <summary>Everything that is sent comes back, later.</summary>
    private sealed class EchoNet : INetBackend
    {
        private INetReceiver? _receiver;

        public bool CanOffload => true;

        public void Send(ReadOnlySpan<byte> frame, in NetOffload offload)
        {
            // Inline, the caller is the only thread there is; a device holds no lock while it calls out.
            _receiver!.TryReceive(frame, offload);
        }

        public void Attach(INetReceiver receiver) => _receiver = receiver;

        public void ResumeReceive() => Thread.Yield();

        public void Dispose()
        {
        }
    }

    private sealed class EchoVsock : IVsockBackend
    {
        public void Attach(IVsockAcceptor acceptor)
        {
        }

        public IVsockStream? Connect(uint port, IVsockReceiver receiver) => port % 2 == 0 ? new Stream() : null;

        public void Dispose()
        {
        }

        private sealed class Stream : IVsockStream
        {
            public int Write(ReadOnlySpan<byte> bytes) => Math.Min(bytes.Length, 100);

            public void ShutdownWrite()
            {
            }

            public void ResumeRead()
            {
            }

            public void Dispose()
            {
            }
        }
    }
}

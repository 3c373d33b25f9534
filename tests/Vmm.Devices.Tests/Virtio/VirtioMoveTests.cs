// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Tests.Fuzz;
using Vmm.Devices.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Virtio;

/// <summary>
/// Every model is moved while its driver works: with its worker running, at any place of a stream of requests, again and
/// again into a device that was just made. Each request comes back once, and in the end none is missing.
/// </summary>
public sealed class VirtioMoveTests
{
    private const int RamBytes = 1 << 20;
    private const int Slots = 8; // of two descriptors each
    private const ulong Requests = 0x80000;
    private const ulong Answers = 0x90000;
    private const int SlotBytes = 1024;
    private const int Moves = 40;

    // A request that the model answers at once, as its specification numbers it; "" for a queue that only writes.
    public static TheoryData<string, int, string, int, bool> Streams
    {
        get
        {
            var data = new TheoryData<string, int, string, int, bool>();
            foreach (bool packed in (bool[])[false, true])
            {
                data.Add("block", 0, "00000000000000000000000000000000", 513, packed); // read a sector
                data.Add("block", 0, "01000000000000000100000000000000" + new string('7', 1024 - 32 - 32), 1, packed); // refused: no whole sector
                data.Add("block", 0, "04000000000000000000000000000000", 1, packed); // flush
                data.Add("rng", 0, "", 64, packed);
                data.Add("net", 1, "000000000000000000000000FFFFFFFFFFFF0200000000010800" + new string('0', 200), 0, packed);
                data.Add("console", 1, "68656C6C6F", 0, packed);
                data.Add("balloon", 0, "0500000006000000", 0, packed);
                data.Add("balloon", 1, "05000000", 0, packed);
                data.Add("gpu", 0, "000100000000000000000000000000000000000000000000", 408, packed);
                data.Add("gpu", 1, "00030000000000000000000000000000000000000000000000000000"
                    + "01000000020000000000000000000000000000000000000000000000", 0, packed);
                data.Add("scsi", 2, "010000400000000000000000000000000000001200000024000000000000000000000000000000000000000000000000000000", 200, packed);
                data.Add("9p", 0, "1500000064FFFF0020000008003950323030302E4C", 100, packed);
                data.Add("vsock", 1, "0300000000000000020000000000000001000000030000000000000001000300000000000000000000000000", 0, packed);
            }

            return data;
        }
    }

    [Theory]
    [MemberData(nameof(Streams))]
    public void Save_AnywhereInAStream_LosesAndDoublesNothing(string name, int queue, string request, int answerBytes, bool packed)
    {
        var random = new Random(name.Length + queue);
        var ram = new TestRam(RamBytes);
        var window = new Switch();
        VirtioMmio device = Make(name, ram, out int queues);
        device.Reset();
        device.Resume();
        window.Target = device;
        var driver = new VirtioMmioDriver(window, ram);
        ulong features = driver.OfferedFeatures() & ~VirtioFeature.RingPacked;
        driver.Start(features | (packed ? VirtioFeature.RingPacked : 0), queues, 16);
        VirtqueueDriver ring = driver[queue];
        byte[] bytes = Convert.FromHexString(request);
        var pending = new HashSet<ushort>();
        int posted = 0;
        int taken = 0;
        try
        {
            for (int move = 0; move < Moves; move++)
            {
                for (int more = random.Next(1, 6); more > 0 && pending.Count < Slots; more--)
                {
                    int slot = posted % Slots * SlotBytes;
                    bytes.CopyTo(ram.Bytes[((int)Requests + slot)..]);
                    var chain = new List<DriverBuffer>();
                    if (bytes.Length > 0)
                    {
                        chain.Add(new DriverBuffer(Requests + (ulong)slot, (uint)bytes.Length, false));
                    }

                    if (answerBytes > 0)
                    {
                        chain.Add(new DriverBuffer(Answers + (ulong)slot, (uint)answerBytes, true));
                    }

                    pending.Add(ring.Add([.. chain])).Should().BeTrue();
                    posted++;
                    if (random.Next(3) == 0)
                    {
                        driver.Kick(queue);
                    }
                }

                driver.Kick(queue);
                for (int spin = random.Next(3); spin > 0; spin--)
                {
                    Thread.Yield();
                }

                taken += Take(ring, pending);
                device.Pause();
                var state = new StateWriter("dut");
                device.Save(state);
                VirtioMmio next = Make(name, ram, out _);
                next.Reset();
                next.Load(new StateReader("dut", state.ToArray()), next.StateVersion);
                device.Dispose();
                device = next;
                window.Target = next;
                next.Resume();
            }

            SpinWait.SpinUntil(() => (taken += Take(ring, pending)) == posted, 30_000).Should().BeTrue("{0} of {1} came back", taken, posted);
            pending.Should().BeEmpty();
            (driver.Status & 0x40).Should().Be(0, "nothing of this breaks a rule");
        }
        finally
        {
            device.Dispose();
        }
    }

    [Fact]
    public void Save_QueueSetUpWrongly_LoadsAsItWas()
    {
        // What a driver writes before it enables a queue is not checked yet; a machine with such a driver can be moved, too.
        var ram = new TestRam(RamBytes);
        using VirtioMmio device = Make("rng", ram, out _);
        device.Reset();
        var driver = new VirtioMmioDriver(device, ram);
        driver.Negotiate(0);
        driver.Write(0x30, 0);
        driver.Write(0x38, 60_000);
        var state = new StateWriter("dut");
        device.Save(state);
        using VirtioMmio other = Make("rng", ram, out _);
        other.Reset();
        other.Load(new StateReader("dut", state.ToArray()), other.StateVersion);
        DeviceCheck.StateOf(other).Should().Equal(DeviceCheck.StateOf(device));
    }

    private static int Take(VirtqueueDriver ring, HashSet<ushort> pending)
    {
        int count = 0;
        for (; ring.TryTakeUsed(out ushort id, out _); count++)
        {
            pending.Remove(id).Should().BeTrue("each comes back once");
        }

        return count;
    }

    private static VirtioMmio Make(string name, TestRam ram, out int queues)
    {
        IVirtioModel model = name == "9p" ? new Virtio9P(new MemoryShare(), "data") : VirtioFuzzTests.Make(name);
        queues = model.QueueSizes.Length;
        return new VirtioMmio(new VirtioDevice("dut", model, ram, new VirtioOptions { Packed = true }), new FakeIrqLine());
    }

    /// <summary>Where the driver's registers are now.</summary>
    private sealed class Switch : IRegisterWindow
    {
        public VirtioMmio Target { get; set; } = null!;

        public uint Length => Target.Length;

        public ulong Read(uint offset, AccessWidth width) => Target.Read(offset, width);

        public void Write(uint offset, AccessWidth width, ulong value) => Target.Write(offset, width, value);
    }
}

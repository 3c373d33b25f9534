// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Virtio;

public sealed class VirtqueueTests
{
    private const ulong Data = 0x40000;

    private readonly TestRam _ram = new(1 << 20);
    private readonly List<int> _signals = [];
    private readonly List<VirtqueueFault> _faults = [];

    public static TheoryData<bool, ulong> Kinds => new()
    {
        { false, VirtioFeature.RingIndirect },
        { false, VirtioFeature.RingIndirect | VirtioFeature.RingEventIndex },
        { false, VirtioFeature.RingIndirect | VirtioFeature.InOrder },
        { true, VirtioFeature.RingIndirect },
        { true, VirtioFeature.RingIndirect | VirtioFeature.RingEventIndex },
        { true, VirtioFeature.RingIndirect | VirtioFeature.InOrder },
    };

    [Theory]
    [MemberData(nameof(Kinds))]
    public void Queue_200000Chains_WrapsAroundWithoutLoss(bool packed, ulong features)
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed, features, 8);
        byte[] bytes = new byte[4];
        for (int i = 0; i < 200_000; i++)
        {
            _ram.WriteNumber(Data, 4, (ulong)i);
            ushort id = driver.Add(new DriverBuffer(Data, 4, false), new DriverBuffer(Data + 16, 4, true));
            bool popped = queue.TryPop(out VirtqueueChain? chain);
            Assert.True(popped && chain!.TryRead(0, bytes) && chain.TryWrite(0, bytes));
            queue.Push(chain!, 4);
            Assert.True(driver.TryTakeUsed(out ushort used, out uint length));
            Assert.Equal((id, 4u), (used, length));
            Assert.Equal((ulong)i, _ram.ReadNumber(Data + 16, 4));
        }

        queue.TryPop(out _).Should().BeFalse();
        _faults.Should().BeEmpty();
    }

    [Theory]
    [MemberData(nameof(Kinds))]
    public void Queue_ChainOfFullSize_IsPopped(bool packed, ulong features)
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed, features, 64);
        var buffers = new DriverBuffer[64];
        for (int i = 0; i < 64; i++)
        {
            buffers[i] = new DriverBuffer(Data + (ulong)(i * 8), 8, i >= 32);
        }

        for (int round = 0; round < 3; round++)
        {
            driver.Add(buffers);
            queue.TryPop(out VirtqueueChain? chain).Should().BeTrue();
            chain!.Count.Should().Be(64);
            chain.ReadableBytes.Should().Be(256);
            chain.WritableBytes.Should().Be(256);
            queue.Push(chain, 256);
            driver.TryTakeUsed(out _, out uint length).Should().BeTrue();
            length.Should().Be(256);
        }
    }

    [Theory]
    [MemberData(nameof(Kinds))]
    public void Queue_IndirectTable_GivesItsBuffersInOrder(bool packed, ulong features)
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed, features, 4);
        var buffers = new DriverBuffer[200];
        for (int i = 0; i < buffers.Length; i++)
        {
            buffers[i] = new DriverBuffer(Data + (ulong)i, 1, i >= 150);
            _ram.Bytes[(int)Data + i] = (byte)i;
        }

        driver.AddIndirect(0x60000, buffers);
        queue.TryPop(out VirtqueueChain? chain).Should().BeTrue();
        byte[] read = new byte[150];
        chain!.TryRead(0, read).Should().BeTrue();
        for (int i = 0; i < read.Length; i++)
        {
            read[i].Should().Be((byte)i);
        }

        chain.WritableBytes.Should().Be(50);
        chain.TryRead(100, new byte[51]).Should().BeFalse("it exceeds the readable part");
        chain.TryWrite(49, new byte[2]).Should().BeFalse("it exceeds the writable part");
        chain.TryWrite(-1, new byte[1]).Should().BeFalse();
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Queue_Unpop_GivesTheSameChainAgain(bool packed)
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed, 0, 4);
        for (int i = 0; i < 21; i++)
        {
            driver.Add(new DriverBuffer(Data, (uint)(10 + i), true), new DriverBuffer(Data, 1, true));
            queue.TryPop(out VirtqueueChain? chain).Should().BeTrue();
            queue.Unpop(chain!);
            queue.InFlight.Should().Be(0);
            queue.TryPop(out chain).Should().BeTrue();
            chain!.WritableBytes.Should().Be(11 + i);
            queue.Push(chain, 0);
            driver.TryTakeUsed(out _, out _).Should().BeTrue();
        }
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Queue_InOrder_HoldsWhatCompletesEarly(bool packed)
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed, VirtioFeature.InOrder, 4);
        ushort first = driver.Add(new DriverBuffer(Data, 1, true));
        ushort second = driver.Add(new DriverBuffer(Data, 2, true));
        queue.TryPop(out VirtqueueChain? one).Should().BeTrue();
        queue.TryPop(out VirtqueueChain? two).Should().BeTrue();
        queue.Push(two!, 2);
        driver.TryTakeUsed(out _, out _).Should().BeFalse();
        queue.Push(one!, 1);
        driver.TryTakeUsed(out ushort id, out uint length).Should().BeTrue();
        (id, length).Should().Be((first, 1u));
        driver.TryTakeUsed(out id, out length).Should().BeTrue();
        (id, length).Should().Be((second, 2u));
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Queue_OutOfOrder_DriverGetsWhatCompletes(bool packed)
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed, 0, 8);
        var chains = new List<VirtqueueChain>();
        var ids = new List<ushort>();
        for (int i = 0; i < 4; i++)
        {
            ids.Add(driver.Add(new DriverBuffer(Data, 1, true), new DriverBuffer(Data, (uint)i + 1, true)));
            queue.TryPop(out VirtqueueChain? chain).Should().BeTrue();
            chains.Add(chain!);
        }

        for (int i = 3; i >= 0; i--)
        {
            queue.Push(chains[i], (uint)i);
            driver.TryTakeUsed(out ushort id, out uint length).Should().BeTrue();
            id.Should().Be(ids[i]);
            length.Should().Be((uint)i);
        }
    }

    // Split: flags is the third word, next the fourth.
    [Theory]
    [InlineData("loop", VirtqueueFault.ChainTooLong)]
    [InlineData("next", VirtqueueFault.BadIndex)]
    [InlineData("head", VirtqueueFault.BadIndex)]
    [InlineData("order", VirtqueueFault.BadOrder)]
    [InlineData("avail", VirtqueueFault.BadAvailable)]
    [InlineData("indirect-next", VirtqueueFault.BadIndirect)]
    [InlineData("indirect-length", VirtqueueFault.BadIndirect)]
    [InlineData("indirect-empty", VirtqueueFault.BadIndirect)]
    [InlineData("indirect-huge", VirtqueueFault.BadIndirect)]
    [InlineData("indirect-nested", VirtqueueFault.BadIndirect)]
    [InlineData("indirect-loop", VirtqueueFault.ChainTooLong)]
    [InlineData("indirect-outside", VirtqueueFault.BadAddress)]
    public void SplitQueue_RuleBreak_StopsWithReason(string kind, VirtqueueFault expected)
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed: false, VirtioFeature.RingIndirect, 8);
        ulong d = driver.Descriptors;
        switch (kind)
        {
            case "loop":
                driver.PutRaw(d, Data, 4, 1, 1);
                driver.PutRaw(d + 16, Data, 4, 1, 0);
                driver.PublishHead(0);
                break;
            case "next":
                driver.PutRaw(d, Data, 4, 1, 8);
                driver.PublishHead(0);
                break;
            case "head":
                driver.PublishHead(8);
                break;
            case "order":
                driver.Add(new DriverBuffer(Data, 4, true), new DriverBuffer(Data, 4, false));
                break;
            case "avail":
                _ram.WriteNumber(driver.Driver + 2, 2, 9);
                break;
            case "indirect-next":
                driver.PutRaw(d, Data, 16, 4 | 1, 1);
                driver.PublishHead(0);
                break;
            case "indirect-length":
                driver.PublishIndirect(Data, 24);
                break;
            case "indirect-empty":
                driver.PublishIndirect(Data, 0);
                break;
            case "indirect-huge":
                driver.PublishIndirect(Data, 16 * (Virtqueue.MaxIndirect + 1));
                break;
            case "indirect-nested":
                driver.PutRaw(Data, Data, 16, 4, 0);
                driver.PublishIndirect(Data, 16);
                break;
            case "indirect-loop":
                driver.PutRaw(Data, Data, 16, 1, 0);
                driver.PublishIndirect(Data, 32);
                break;
            case "indirect-outside":
                driver.PublishIndirect(1 << 20, 16);
                break;
        }

        queue.TryPop(out _).Should().BeFalse();
        queue.Fault.Should().Be(expected);
        _faults.Should().Equal(expected);
        driver.Add(new DriverBuffer(Data, 4, true));
        queue.TryPop(out _).Should().BeFalse("a stopped queue hands out nothing");
        _faults.Should().HaveCount(1);
    }

    // Packed: id is the third word, flags the fourth; available in the first turn means flag 1 << 7 alone.
    [Theory]
    [InlineData("endless", VirtqueueFault.ChainTooLong)]
    [InlineData("order", VirtqueueFault.BadOrder)]
    [InlineData("indirect-next", VirtqueueFault.BadIndirect)]
    [InlineData("indirect-second", VirtqueueFault.BadIndirect)]
    [InlineData("indirect-nested", VirtqueueFault.BadIndirect)]
    [InlineData("indirect-outside", VirtqueueFault.BadAddress)]
    public void PackedQueue_RuleBreak_StopsWithReason(string kind, VirtqueueFault expected)
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed: true, VirtioFeature.RingIndirect, 8);
        ulong d = driver.Descriptors;
        const ushort Available = 1 << 7;
        switch (kind)
        {
            case "endless":
                for (ulong i = 0; i < 8; i++)
                {
                    driver.PutRaw(d + (16 * i), Data, 4, 0, Available | 1);
                }

                break;
            case "order":
                driver.Add(new DriverBuffer(Data, 4, true), new DriverBuffer(Data, 4, false));
                break;
            case "indirect-next":
                driver.PutRaw(d, Data, 16, 0, Available | 4 | 1);
                break;
            case "indirect-second":
                driver.PutRaw(d, Data, 16, 0, Available | 1);
                driver.PutRaw(d + 16, Data, 16, 0, Available | 4);
                break;
            case "indirect-nested":
                driver.PutRaw(Data, Data, 16, 0, 4);
                driver.PublishIndirect(Data, 16);
                break;
            case "indirect-outside":
                driver.PublishIndirect(1 << 20, 16);
                break;
        }

        queue.TryPop(out _).Should().BeFalse();
        queue.Fault.Should().Be(expected);
        _faults.Should().Equal(expected);
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Queue_RingOutsideRam_StopsWithBadAddress(bool packed)
    {
        var layout = new VirtqueueLayout(8, 0x4000_0000, 0x4000_1000, 0x4000_2000);
        Virtqueue queue = Create(layout, packed ? VirtioFeature.RingPacked : 0);
        queue.TryPop(out _).Should().BeFalse();
        _faults.Should().Equal(VirtqueueFault.BadAddress);
        queue.DisableNotify();
        queue.EnableNotify().Should().BeFalse();
        queue.Flush();
    }

    [Fact]
    public void SplitQueue_DriverAddsWithoutTakingUsed_OutstandingChainsAreBounded()
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed: false, 0, 4);
        driver.PutRaw(driver.Descriptors, Data, 4, 2, 0);
        int popped = 0;
        for (int i = 0; i < 100; i++)
        {
            driver.PublishHead(0); // the same head again and again, which no driver may do
            popped += queue.TryPop(out _) ? 1 : 0;
        }

        popped.Should().Be(4);
        queue.Fault.Should().Be(VirtqueueFault.BadAvailable);
    }

    [Fact]
    public void SplitQueue_EventIndex_SignalsOnlyWhenPassed()
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed: false, VirtioFeature.RingEventIndex, 8);
        Round(driver, queue); // used index 1 passes 0
        _signals.Should().HaveCount(1);
        driver.SetUsedEvent(3);
        Round(driver, queue); // used index 2
        Round(driver, queue); // 3
        _signals.Should().HaveCount(1);
        Round(driver, queue); // 4 passes 3
        _signals.Should().HaveCount(2);
        Round(driver, queue);
        _signals.Should().HaveCount(2);
        queue.Flush();
        _signals.Should().HaveCount(2, "nothing was used since");
    }

    [Fact]
    public void PackedQueue_EventDescriptor_SignalsOnlyWhenPassed()
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed: true, VirtioFeature.RingEventIndex, 4);
        driver.SetInterruptFlag(2);
        driver.SetPackedEvent(2, true);
        Round(driver, queue);
        Round(driver, queue);
        _signals.Should().BeEmpty();
        Round(driver, queue); // uses entry 2
        _signals.Should().HaveCount(1);
        driver.SetPackedEvent(1, false);
        Round(driver, queue); // entry 3
        Round(driver, queue); // entry 0 of the next turn
        _signals.Should().HaveCount(1);
        Round(driver, queue); // entry 1
        _signals.Should().HaveCount(2);
        driver.SetInterruptFlag(1);
        Round(driver, queue);
        _signals.Should().HaveCount(2);
    }

    [Fact]
    public void SplitQueue_NoInterruptFlag_KeepsQuiet()
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed: false, 0, 8);
        driver.SetInterruptFlag(1);
        Round(driver, queue);
        _signals.Should().BeEmpty();
        driver.SetInterruptFlag(0);
        Round(driver, queue);
        _signals.Should().Equal(3);
    }

    [Theory]
    [InlineData(false, 0UL)]
    [InlineData(true, 0UL)]
    [InlineData(false, VirtioFeature.RingEventIndex)]
    [InlineData(true, VirtioFeature.RingEventIndex)]
    public void Queue_NotifySuppression_IsVisibleAndFindsLateArrivals(bool packed, ulong features)
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed, features, 8);
        queue.DisableNotify();
        if (packed || features == 0)
        {
            driver.DeviceWantsNotify.Should().BeFalse();
        }

        driver.Add(new DriverBuffer(Data, 4, true));
        queue.EnableNotify().Should().BeTrue("a chain arrived while doorbells were off");
        queue.TryPop(out VirtqueueChain? chain).Should().BeTrue();
        queue.Push(chain!, 0);
        queue.EnableNotify().Should().BeFalse();
        driver.DeviceWantsNotify.Should().BeTrue();
        if (!packed && features != 0)
        {
            driver.AvailEvent.Should().Be(1);
        }
    }

    [Theory]
    [MemberData(nameof(Kinds))]
    public void Queue_SavedMidRing_ContinuesInAnother(bool packed, ulong features)
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed, features, 4);
        for (int i = 0; i < 7; i++)
        {
            Round(driver, queue);
        }

        driver.Add(new DriverBuffer(Data, 9, true));
        var writer = new StateWriter("q");
        queue.Save(writer, "q.");
        Virtqueue other = Create(queue.Layout, features | (packed ? VirtioFeature.RingPacked : 0));
        other.Load(new StateReader("q", writer.ToArray()), "q.");
        other.TryPop(out VirtqueueChain? chain).Should().BeTrue();
        chain!.WritableBytes.Should().Be(9);
        other.Push(chain, 0);
        driver.TryTakeUsed(out _, out _).Should().BeTrue();
        Round(driver, other);
    }

    [Fact]
    public void Queue_Closed_TouchesNothing()
    {
        (VirtqueueDriver driver, Virtqueue queue) = Make(packed: false, 0, 4);
        driver.Add(new DriverBuffer(Data, 4, true));
        queue.TryPop(out VirtqueueChain? chain).Should().BeTrue();
        queue.Close();
        queue.Complete(chain!, 4);
        driver.TryTakeUsed(out _, out _).Should().BeFalse();
        _signals.Should().BeEmpty();
    }

    private static void Round(VirtqueueDriver driver, Virtqueue queue)
    {
        driver.Add(new DriverBuffer(Data, 4, true));
        queue.TryPop(out VirtqueueChain? chain).Should().BeTrue();
        queue.Complete(chain!, 4);
        driver.TryTakeUsed(out _, out _).Should().BeTrue();
    }

    private (VirtqueueDriver Driver, Virtqueue Queue) Make(bool packed, ulong features, ushort size)
    {
        var driver = new VirtqueueDriver(_ram, 0x10000, size, packed);
        var layout = new VirtqueueLayout(size, driver.Descriptors, driver.Driver, driver.Device);
        return (driver, Create(layout, features | (packed ? VirtioFeature.RingPacked : 0)));
    }

    private Virtqueue Create(in VirtqueueLayout layout, ulong features) => Virtqueue.Create(
        3, layout, features | VirtioFeature.Version1, _ram, _signals.Add, queue => _faults.Add(queue.Fault));
}

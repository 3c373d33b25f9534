// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Virtio;

public sealed class VirtioInputTests
{
    [Fact]
    public void Config_DescribesTheDevice()
    {
        using var rig = new VirtioRig(new VirtioInput(VirtioInputKind.Tablet));
        Select(rig, 1, 0).Should().Equal("VMM virtio tablet"u8.ToArray());
        Select(rig, 0x11, 3).Should().Equal(3);
        Select(rig, 0x11, 4).Should().BeEmpty();
        byte[] range = Select(rig, 0x12, 1);
        range.Should().HaveCount(20);
        BinaryPrimitives.ReadUInt32LittleEndian(range.AsSpan(4)).Should().Be(32767);
        Select(rig, 0x12, 9).Should().BeEmpty();
        Select(rig, 99, 1).Should().BeEmpty();
        using var keyboard = new VirtioRig(new VirtioInput(VirtioInputKind.Keyboard));
        byte[] keys = Select(keyboard, 0x11, 1);
        (keys[30 / 8] & (1 << (30 & 7))).Should().NotBe(0, "KEY_A");
        Select(keyboard, 0x11, 0x11).Should().Equal(7);
    }

    [Fact]
    public void Key_BecomesEventAndSync()
    {
        var model = new VirtioInput(VirtioInputKind.Keyboard);
        using var rig = new VirtioRig(model);
        model.Send((HidKey)4, true);
        rig.Driver.Start(0, 2);
        rig.Offer(0, 16, 8);
        Drain(rig).Should().BeEmpty("keys before the driver came are lost");
        model.Send((HidKey)4, true);
        model.Send((HidKey)0xE1, true);
        Drain(rig).Should().Equal((1, 30, 1u), (0, 0, 0u), (1, 42, 1u), (0, 0, 0u));
    }

    [Fact]
    public void Movement_ThatWaits_IsMerged_ButtonsAreNot()
    {
        var model = new VirtioInput(VirtioInputKind.Tablet);
        using var rig = new VirtioRig(model);
        rig.Driver.Start(0, 2);
        for (int i = 0; i < 1000; i++)
        {
            model.Send(new PointerEvent(i, 2 * i, 0, PointerButtons.None));
        }

        model.Send(new PointerEvent(40000, 7, 0, PointerButtons.Left));
        model.Send(new PointerEvent(5, 5, 1, PointerButtons.None));
        rig.Offer(0, 32, 8);
        Drain(rig).Should().Equal(
            (3, 0, 999u), (3, 1, 1998u), (0, 0, 0u),
            (3, 0, 32767u), (3, 1, 7u), (1, 0x110, 1u), (0, 0, 0u),
            (3, 0, 5u), (3, 1, 5u), (2, 8, 1u), (1, 0x110, 0u), (0, 0, 0u));
        model.Dropped.Should().Be(0);
    }

    [Fact]
    public void RelativeMovement_AddsUp()
    {
        var model = new VirtioInput(VirtioInputKind.Mouse);
        using var rig = new VirtioRig(model);
        rig.Driver.Start(0, 2);
        model.Send(new PointerEvent(3, -2, 0, PointerButtons.None));
        model.Send(new PointerEvent(-5, 1, 0, PointerButtons.None));
        rig.Offer(0, 8, 8);
        Drain(rig).Should().Equal((2, 0, 0xFFFF_FFFEu), (2, 1, 0xFFFF_FFFFu), (0, 0, 0u));
    }

    [Fact]
    public void FullList_DropsWholeGroups_SavedOnesContinue()
    {
        var model = new VirtioInput(VirtioInputKind.Keyboard);
        using var rig = new VirtioRig(model);
        rig.Driver.Start(0, 2);
        for (int i = 0; i < 300; i++)
        {
            model.Send((HidKey)4, (i & 1) == 0);
        }

        model.Dropped.Should().Be(300 - 128);
        rig.Send(1, [0x11, 0, 1, 0, 1, 0, 0, 0]);
        model.Leds.Should().Be(KeyboardLeds.Caps);
        rig.Mmio.Pause();
        var other = new VirtioInput(VirtioInputKind.Keyboard);
        using var rig2 = new VirtioRig(other, rig.Ram, resume: false);
        DeviceCheck.Copy(rig.Mmio, rig2.Mmio);
        DeviceCheck.StateOf(rig2.Mmio).Should().Equal(DeviceCheck.StateOf(rig.Mmio));
        rig2.Mmio.Resume();
        other.Leds.Should().Be(KeyboardLeds.Caps);
        rig.Driver[0].Add(new DriverBuffer(0x300000, 8, true));
        rig2.Driver.Kick(0);
        rig.Driver[0].TryTakeUsed(out _, out _).Should().BeTrue();
        rig.Ram.ReadNumber(0x300000, 8).Should().Be(0x1_001E_0001);
    }

    private static byte[] Select(VirtioRig rig, byte select, byte sub)
    {
        rig.Driver.WriteConfig(0, AccessWidth.Byte, select);
        rig.Driver.WriteConfig(1, AccessWidth.Byte, sub);
        byte[] bytes = new byte[rig.Driver.ReadConfig(2, AccessWidth.Byte)];
        for (int i = 0; i < bytes.Length; i++)
        {
            bytes[i] = (byte)rig.Driver.ReadConfig(8 + (uint)i, AccessWidth.Byte);
        }

        return bytes;
    }

    private static List<(int Type, int Code, uint Value)> Drain(VirtioRig rig)
    {
        var events = new List<(int Type, int Code, uint Value)>();
        while (rig.Take(0) is { } raw)
        {
            events.Add((
                BinaryPrimitives.ReadUInt16LittleEndian(raw),
                BinaryPrimitives.ReadUInt16LittleEndian(raw.AsSpan(2)),
                BinaryPrimitives.ReadUInt32LittleEndian(raw.AsSpan(4))));
        }

        return events;
    }
}

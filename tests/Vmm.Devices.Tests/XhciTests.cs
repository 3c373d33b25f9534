// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Text;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Input;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>xHCI 1.1 with a small driver of its own; USB 2.0 chapter 9; HID 1.11.</summary>
public sealed class XhciTests
{
    private const uint Op = 0x40;
    private const uint CommandRing = 0x2000;
    private const uint EventRing = 0x3000;
    private const uint ControlRing = 0x4000;
    private const uint InterruptRing = 0x5000;
    private const uint InputContext = 0x6000;
    private const uint OutputContext = 0x7000;
    private const uint Buffer = 0x8000;

    private readonly ManualClock _clock = new();
    private readonly PciBench _bench = new();
    private readonly UsbTablet _tablet = new();
    private readonly UsbKeyboard _keyboard = new();
    private readonly Xhci _card;
    private readonly ulong _bar;
    private uint _commandAt = CommandRing;
    private uint _controlAt = ControlRing;
    private uint _interruptAt = InterruptRing;
    private uint _eventAt = EventRing;
    private bool _eventCycle = true;

    public XhciTests()
    {
        _card = new Xhci("usb", _clock, _tablet, _keyboard);
        _bench.Plug(_card);
        _bar = _bench.BarAddress(3, 0);
    }

    private uint Read(uint offset) => (uint)_bench.Mmio.Read(_bar + offset, AccessWidth.Dword);

    private void Write(uint offset, uint value) => _bench.Mmio.Write(_bar + offset, AccessWidth.Dword, value);

    private void Trb(ref uint at, ulong parameter, uint status, uint control)
    {
        _bench.Ram.WriteNumber(at, 8, parameter);
        _bench.Ram.WriteNumber(at + 8, 4, status);
        _bench.Ram.WriteNumber(at + 12, 4, control | 1);
        at += 16;
    }

    private (ulong Parameter, uint Status, uint Control)? Event()
    {
        uint control = (uint)_bench.Ram.ReadNumber(_eventAt + 12, 4);
        if (((control & 1) != 0) != _eventCycle)
        {
            return null;
        }

        var result = (_bench.Ram.ReadNumber(_eventAt, 8), (uint)_bench.Ram.ReadNumber(_eventAt + 8, 4), control);
        _eventAt += 16;
        if (_eventAt == EventRing + (32 * 16))
        {
            _eventAt = EventRing;
            _eventCycle = !_eventCycle;
        }

        _bench.Mmio.Write(_bar + 0x1038, AccessWidth.Qword, _eventAt | 8);
        return result;
    }

    private void Start()
    {
        _bench.Ram.WriteNumber(0x1000 + 8, 8, OutputContext);
        _bench.Ram.WriteNumber(0x1800, 8, EventRing);
        _bench.Ram.WriteNumber(0x1808, 4, 32);
        Write(Op + 0x38, 8);
        _bench.Mmio.Write(_bar + Op + 0x30, AccessWidth.Qword, 0x1000);
        _bench.Mmio.Write(_bar + Op + 0x18, AccessWidth.Qword, CommandRing | 1);
        Write(0x1028, 1);
        _bench.Mmio.Write(_bar + 0x1038, AccessWidth.Qword, EventRing);
        _bench.Mmio.Write(_bar + 0x1030, AccessWidth.Qword, 0x1800);
        Write(0x1020, 2);
        Write(Op, 5);
        while (Event() is not null)
        {
        }
    }

    private (uint Code, uint Slot) Command(ulong parameter, uint control)
    {
        Trb(ref _commandAt, parameter, 0, control);
        Write(0x2000, 0);
        (ulong Parameter, uint Status, uint Control) done = Event()!.Value;
        (done.Control >> 10 & 63).Should().Be(33);
        done.Parameter.Should().Be(_commandAt - 16);
        return (done.Status >> 24, done.Control >> 24);
    }

    private void Address(int port)
    {
        Write(Op + 0x400 + ((uint)(port - 1) * 16), 0x210);
        Event()!.Value.Control.Should().Be((34u << 10) | (_eventCycle ? 1u : 0));
        Command(0, 9u << 10).Should().Be((1u, 1u));
        _bench.Ram.WriteNumber(InputContext + 4, 4, 3);
        _bench.Ram.WriteNumber(InputContext + 32, 4, 1u << 27);
        _bench.Ram.WriteNumber(InputContext + 36, 4, (ulong)port << 16);
        _bench.Ram.WriteNumber(InputContext + 68, 4, (64u << 16) | (4 << 3));
        _bench.Ram.WriteNumber(InputContext + 72, 8, ControlRing | 1);
        Command(InputContext, (11u << 10) | (1u << 24)).Code.Should().Be(1);
        (_bench.Ram.ReadNumber(OutputContext + 12, 4) >> 27).Should().Be(2, "addressed");
        (_bench.Ram.ReadNumber(OutputContext + 32, 4) & 7).Should().Be(1, "endpoint 0 runs");
    }

    private (uint Code, byte[] Data) Control(ulong setup, int length)
    {
        bool isIn = (setup & 0x80) != 0;
        Trb(ref _controlAt, setup, 8, (2u << 10) | (1 << 6));
        if (length > 0)
        {
            Trb(ref _controlAt, Buffer, (uint)length, (3u << 10) | (isIn ? 1u << 16 : 0) | (1 << 2));
        }

        Trb(ref _controlAt, 0, 0, (4u << 10) | (1 << 5));
        Write(0x2004, 1);
        uint residual = 0;
        while (Event() is { } done)
        {
            uint code = done.Status >> 24;
            if (code == 13)
            {
                residual = done.Status & 0xFF_FFFF;
                continue;
            }

            return (code, _bench.Ram.Bytes.Slice((int)Buffer, length - (int)residual).ToArray());
        }

        throw new InvalidOperationException("no event");
    }

    private static ulong Setup(byte type, byte request, ushort value, ushort index, ushort length) =>
        type | ((ulong)request << 8) | ((ulong)value << 16) | ((ulong)index << 32) | ((ulong)length << 48);

    private void Configure()
    {
        Control(Setup(0x00, 9, 1, 0, 0), 0).Code.Should().Be(1);
        _bench.Ram.WriteNumber(InputContext + 4, 4, 1 | (1 << 3));
        _bench.Ram.WriteNumber(InputContext + 32, 4, 3u << 27);
        _bench.Ram.WriteNumber(InputContext + 128 + 4, 4, (8u << 16) | (7 << 3));
        _bench.Ram.WriteNumber(InputContext + 128 + 8, 8, InterruptRing | 1);
        Command(InputContext, (12u << 10) | (1u << 24)).Code.Should().Be(1);
        (_bench.Ram.ReadNumber(OutputContext + 12, 4) >> 27).Should().Be(3, "configured");
    }

    private void QueueIn(uint length = 8)
    {
        Trb(ref _interruptAt, Buffer, length, (1u << 10) | (1 << 5));
        Write(0x2004, 3);
    }

    [Fact]
    public void Capabilities_AfterReset_AreThoseOfTheSpecification()
    {
        Read(0).Should().Be(0x0100_0040);
        Read(4).Should().Be(0x0400_0110);
        Read(0x10).Should().Be(0x0008_0001);
        Read(0x20).Should().Be(0x0200_0402);
        Read(0x24).Should().Be(0x2042_5355);
        Read(0x28).Should().Be(0x0000_0201);
        Read(0x38).Should().Be(0x0000_0203);
        Read(Op + 4).Should().Be(1, "halted");
        Read(Op + 0x400).Should().Be(0x0002_06E1, "connected, full speed, powered, polling");
        Read(Op + 0x420).Should().Be(0x0000_02A0, "an empty USB 3 port");
        _bench.Read(3, 0x08).Should().Be(0x0C03_3001);
    }

    [Fact]
    public void Enumeration_OfTheTablet_GivesItsDescriptors()
    {
        Start();
        Address(1);
        (uint code, byte[] device) = Control(Setup(0x80, 6, 0x0100, 0, 64), 64);
        code.Should().Be(1);
        device.Should().HaveCount(18);
        device[1].Should().Be(1);
        byte[] configuration = Control(Setup(0x80, 6, 0x0200, 0, 255), 255).Data;
        configuration.Should().HaveCount(34);
        int reportLength = configuration[25] | (configuration[26] << 8);
        Control(Setup(0x81, 6, 0x2200, 0, 255), 255).Data.Should().HaveCount(reportLength);
        byte[] name = Control(Setup(0x80, 6, 0x0302, 0x409, 255), 255).Data;
        Encoding.Unicode.GetString(name, 2, name.Length - 2).Should().Be("USB Tablet");
        Configure();
        _tablet.IsActive.Should().BeTrue();
        _keyboard.IsActive.Should().BeFalse();
    }

    [Fact]
    public void TabletReports_WaitForABufferAndMergeMovement()
    {
        Start();
        Address(1);
        Configure();
        _tablet.Send(new PointerEvent(100, 200, 0, PointerButtons.None));
        _tablet.Send(new PointerEvent(0x1234, 0x4567, -1, PointerButtons.None));
        Event().Should().BeNull("no buffer yet");
        QueueIn(6);
        (Event()!.Value.Status >> 24).Should().Be(1);
        _bench.Ram.Bytes.Slice((int)Buffer, 6).ToArray().Should().Equal(0, 0x34, 0x12, 0x67, 0x45, 0xFF);
        QueueIn(8);
        Event().Should().BeNull("nothing moved");
        _tablet.Send(new PointerEvent(0x1234, 0x4567, 0, PointerButtons.Left));
        (ulong Parameter, uint Status, uint Control) short6 = Event()!.Value;
        short6.Status.Should().Be((13u << 24) | 2, "six of eight bytes");
        _bench.Ram.Bytes[(int)Buffer].Should().Be(1);
    }

    [Fact]
    public void KeyboardReports_AreBootReportsAndLedsArrive()
    {
        Start();
        Address(2);
        Configure();
        QueueIn();
        QueueIn();
        _keyboard.Send(HidKey.LeftShift, true);
        _keyboard.Send(HidKey.A, true);
        Event().Should().NotBeNull();
        Event().Should().NotBeNull();
        _bench.Ram.Bytes.Slice((int)Buffer, 8).ToArray().Should().Equal(2, 0, 4, 0, 0, 0, 0, 0);
        for (HidKey key = HidKey.B; key <= HidKey.G; key++)
        {
            _keyboard.Send(key, true);
        }

        for (int i = 0; i < 6; i++)
        {
            QueueIn();
            Event().Should().NotBeNull();
        }

        _bench.Ram.Bytes.Slice((int)Buffer, 8).ToArray().Should().Equal(2, 0, 1, 1, 1, 1, 1, 1);
        _bench.Ram.Bytes[(int)Buffer] = 0x02;
        Control(Setup(0x21, 9, 0x0200, 0, 1), 1).Code.Should().Be(1);
        _keyboard.Leds.Should().Be(KeyboardLeds.Caps);
    }

    [Fact]
    public void UnknownRequest_Stalls_UntilTheEndpointIsReset()
    {
        Start();
        Address(1);
        Control(Setup(0x80, 6, 0x0600, 0, 10), 10).Code.Should().Be(6, "a full-speed device has no qualifier");
        (_bench.Ram.ReadNumber(OutputContext + 32, 4) & 7).Should().Be(2, "halted");
        Write(0x2004, 1);
        Event().Should().BeNull();
        Command(_controlAt | 1u, (16u << 10) | (1u << 24) | (1 << 16)).Code.Should().Be(19, "not stopped yet");
        Command(0, (14u << 10) | (1u << 24) | (1 << 16)).Code.Should().Be(1);
        Command(_controlAt | 1u, (16u << 10) | (1u << 24) | (1 << 16)).Code.Should().Be(1);
        Control(Setup(0x80, 8, 0, 0, 1), 1).Data.Should().Equal(0);
    }

    [Fact]
    public void Commands_InTheWrongState_GiveTheirErrors()
    {
        Start();
        Command(0, 23u << 10).Code.Should().Be(1);
        Command(0, (10u << 10) | (3u << 24)).Code.Should().Be(11);
        Command(0, 60u << 10).Code.Should().Be(5);
        for (uint i = 1; i <= 8; i++)
        {
            Command(0, 9u << 10).Should().Be((1u, i));
        }

        Command(0, 9u << 10).Code.Should().Be(9, "CONFIG allows eight");
        Command(InputContext, (12u << 10) | (1u << 24)).Code.Should().Be(19);
        Command(0, (15u << 10) | (1u << 24) | (3 << 16)).Code.Should().Be(12);
    }

    [Fact]
    public void Interrupts_ByWireAndMessage_FollowEventHandlerBusy()
    {
        Start();
        _bench.IsaLines[11].Level.Should().BeTrue("port events at the start");
        Write(0x1020, 3);
        _bench.IsaLines[11].Level.Should().BeFalse();
        ulong table = _bench.BarAddress(3, 2);
        _bench.Mmio.Write(table, AccessWidth.Qword, 0xFEE0_0000);
        _bench.Mmio.Write(table + 8, AccessWidth.Qword, 0x45);
        uint capability = _bench.Read(3, 0x34, AccessWidth.Byte);
        while ((_bench.Read(3, (int)capability) & 0xFF) != 0x11)
        {
            capability = _bench.Read(3, (int)capability + 1, AccessWidth.Byte);
        }

        _bench.Write(3, (int)capability + 2, 0x8000, AccessWidth.Word);
        Command(0, 23u << 10).Code.Should().Be(1);
        _bench.Msi.Messages.Should().NotBeEmpty();
        _bench.IsaLines[11].Level.Should().BeFalse();
    }

    [Fact]
    public void State_SavedAndLoaded_GoesOn()
    {
        Start();
        Address(2);
        Configure();
        _keyboard.Send(HidKey.Z, true);
        var keyboard = new UsbKeyboard();
        var copy = new Xhci("usb", _clock, new UsbTablet(), keyboard);
        var bench = new PciBench();
        bench.Bus.Attach(copy, 3);
        copy.Reset();
        DeviceCheck.Copy(_card, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(_card));
        _bench.Ram.Bytes.CopyTo(bench.Ram.Bytes);
        bench.Ram.WriteNumber(InterruptRing, 8, Buffer);
        bench.Ram.WriteNumber(InterruptRing + 8, 4, 8);
        bench.Ram.WriteNumber(InterruptRing + 12, 4, (1u << 10) | (1 << 5) | 1);
        bench.Mmio.Write(_bar + 0x2004, AccessWidth.Dword, 3);
        bench.Ram.Bytes[(int)Buffer + 2].Should().Be((byte)HidKey.Z);
    }

    [Fact]
    public void HostileRings_CostABoundedTimeAndNeverThrow()
    {
        Start();

        // A link to itself, and a ring of no-ops that leads back without changing the cycle.
        uint at = CommandRing;
        for (int i = 0; i < 4; i++)
        {
            Trb(ref at, 0, 0, 23u << 10);
        }

        Trb(ref at, CommandRing, 0, 6u << 10);
        Write(0x2000, 0);
        _card.DroppedEvents.Should().BePositive("the event ring is small");

        var random = new Random(5);
        for (int i = 0; i < 300; i++)
        {
            random.NextBytes(_bench.Ram.Bytes.Slice(0x1000, 0x8000));
            for (int n = 0; n < 64; n++)
            {
                // Bias towards TRBs that are valid.
                uint place = (uint)(0x2000 + (random.Next(0x600) * 16));
                _bench.Ram.WriteNumber(place, 8, (ulong)(0x1000 + (random.Next(0x800) * 16)));
                _bench.Ram.WriteNumber(place + 12, 4, (uint)random.Next(2) | ((uint)random.Next(24) << 10) | (1u << 24));
            }

            Start();
            Write(Op + 0x400, 0x210);
            DeviceCheck.Fuzz(new BarWindow(_bench, _bar), i, 60);
            for (uint slot = 0; slot < 4; slot++)
            {
                Write(0x2000 + (slot * 4), (uint)random.Next(5));
            }

            _tablet.Send(new PointerEvent(random.Next(), random.Next(), 1, (PointerButtons)random.Next(32)));
            _keyboard.Send((HidKey)random.Next(256), random.Next(2) == 0);
        }
    }

    private sealed class BarWindow : IRegisterWindow
    {
        private readonly PciBench _bench;
        private readonly ulong _bar;

        public BarWindow(PciBench bench, ulong bar)
        {
            _bench = bench;
            _bar = bar;
        }

        public uint Length => 0x4000;

        public ulong Read(uint offset, AccessWidth width) => _bench.Mmio.Read(_bar + offset, width);

        public void Write(uint offset, AccessWidth width, ulong value) => _bench.Mmio.Write(_bar + offset, width, value);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Input;
using Vmm.Devices.Legacy;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>PS/2 Hardware Interface Technical Reference: controller, keyboard and mouse.</summary>
public sealed class I8042Tests
{
    private readonly ManualClock _clock = new();
    private readonly FakeIrqLine _irq1 = new();
    private readonly FakeIrqLine _irq12 = new();
    private readonly FakeSystem _system = new();
    private readonly I8042 _chip;

    public I8042Tests()
    {
        _chip = new I8042(_clock, _irq1, _irq12, _system);
        _chip.Reset();
        _chip.Resume();
    }

    private byte Status => (byte)_chip.Command.Read(0, AccessWidth.Byte);

    private byte Data() => (byte)_chip.Data.Read(0, AccessWidth.Byte);

    private void Command(byte value) => _chip.Command.Write(0, AccessWidth.Byte, value);

    private void Data(byte value) => _chip.Data.Write(0, AccessWidth.Byte, value);

    private byte[] Drain()
    {
        var bytes = new List<byte>();
        while ((Status & 1) != 0 && bytes.Count < 1000)
        {
            bytes.Add(Data());
        }

        return bytes.ToArray();
    }

    private byte[] ToMouse(byte value)
    {
        Command(0xD4);
        Data(value);
        return Drain();
    }

    [Fact]
    public void Status_AfterReset_IsEmpty() => Status.Should().Be(0x10);

    [Theory]
    [InlineData(0xAA, 0x55)]
    [InlineData(0xAB, 0x00)]
    [InlineData(0xA9, 0x00)]
    [InlineData(0xC0, 0x80)]
    [InlineData(0xD0, 0x03)]
    [InlineData(0x20, 0x41)]
    public void Command_WithAnAnswer_GivesIt(byte command, byte answer)
    {
        Command(command);
        (Status & 0x09).Should().Be(0x09, "output full, last write was a command");
        Data().Should().Be(answer);
    }

    [Fact]
    public void ConfigurationByte_WhenWritten_ReadsBack()
    {
        Command(0x60);
        Data(0xFF);
        Command(0x20);
        Data().Should().Be(0x7F);
        Command(0x65);
        Data(0x5A);
        Command(0x25);
        Data().Should().Be(0x5A);
    }

    [Fact]
    public void Keys_WithTranslation_AreSet1AndInterrupt()
    {
        _chip.Keyboard.Send(HidKey.A, true);
        _irq1.Level.Should().BeTrue();
        Data().Should().Be(0x1E);
        _irq1.Level.Should().BeFalse();
        _chip.Keyboard.Send(HidKey.A, false);
        Drain().Should().Equal(0x9E);
        _chip.Keyboard.Send(HidKey.Up, true);
        _chip.Keyboard.Send(HidKey.Up, false);
        Drain().Should().Equal(0xE0, 0x48, 0xE0, 0xC8);
        _irq1.Rises.Should().Be(6);
        _chip.Keyboard.Send(HidKey.Pause, true);
        _chip.Keyboard.Send(HidKey.Pause, false);
        Drain().Should().Equal(0xE1, 0x1D, 0x45, 0xE1, 0x9D, 0xC5);
        _chip.Keyboard.Send(HidKey.PrintScreen, true);
        _chip.Keyboard.Send(HidKey.PrintScreen, false);
        Drain().Should().Equal(0xE0, 0x2A, 0xE0, 0x37, 0xE0, 0xB7, 0xE0, 0xAA);
    }

    [Fact]
    public void Keys_WithoutTranslation_AreTheKeyboardsSet()
    {
        Command(0x60);
        Data(0x01);
        _chip.Keyboard.Send(HidKey.F7, true);
        _chip.Keyboard.Send(HidKey.F7, false);
        _chip.Keyboard.Send(HidKey.Delete, true);
        _chip.Keyboard.Send(HidKey.Delete, false);
        Drain().Should().Equal(0x83, 0xF0, 0x83, 0xE0, 0x71, 0xE0, 0xF0, 0x71);
        Data(0xF0);
        Data(0x01);
        Drain().Should().Equal(0xFA, 0xFA);
        _chip.Keyboard.Send(HidKey.Enter, true);
        _chip.Keyboard.Send(HidKey.Enter, false);
        Drain().Should().Equal(0x1C, 0x9C);
        Data(0xF0);
        Data(0x00);
        Drain().Should().Equal(0xFA, 0xFA, 0x01);
    }

    // Set 2 through the controller's table must give the set 1 code of every key.
    [Fact]
    public void EveryKey_ThroughTheTranslation_IsItsSet1Code()
    {
        int keys = 0;
        foreach (HidKey key in Enum.GetValues<HidKey>())
        {
            int code = HidKeys.ToSet1(key);
            if (code is 0 or 0xF1 or 0xF2 || key is HidKey.Pause or HidKey.PrintScreen)
            {
                continue;
            }

            _chip.Keyboard.Send(key, true);
            byte[] make = Drain();
            _chip.Keyboard.Send(key, false);
            byte[] breakCode = Drain();
            make.Should().Equal(code > 0xFF ? [0xE0, (byte)code] : [(byte)code], "{0}", key);
            breakCode[^1].Should().Be((byte)(code | 0x80), "{0}", key);
            keys++;
        }

        keys.Should().BeGreaterThan(105);
    }

    [Fact]
    public void KeyboardCommands_AreAnsweredAsDocumented()
    {
        Data(0xFF);
        Drain().Should().Equal(0xFA, 0xAA);
        Data(0xF2);
        Drain().Should().Equal(0xFA, 0xAB, 0x41);
        Data(0xEE);
        Drain().Should().Equal(0xEE);
        Data(0xED);
        Data(0x06);
        Drain().Should().Equal(0xFA, 0xFA);
        _chip.Keyboard.Leds.Should().Be(KeyboardLeds.Num | KeyboardLeds.Caps);
        Data(0x12);
        Drain().Should().Equal(0xFE);
        Data(0xF5);
        Drain();
        _chip.Keyboard.IsActive.Should().BeFalse();
        _chip.Keyboard.Send(HidKey.B, true);
        Drain().Should().BeEmpty();
        Data(0xF4);
        Drain().Should().Equal(0xFA);
    }

    [Fact]
    public void Answers_OfCommandsSentWithoutReading_KeepTheirOrder()
    {
        _chip.Keyboard.Send(HidKey.A, true);
        _chip.Keyboard.Send(HidKey.B, true);
        Data(0xF2);
        Data(0xEE);
        Drain().Should().Equal(0x1E, 0xFA, 0xAB, 0x41, 0xEE, 0x30);
        for (int i = 0; i < 10_000; i++)
        {
            Data(0xEE);
        }

        Drain().Length.Should().BeInRange(100, 300);
        Data(0xEE);
        Drain().Should().Equal(0xEE);
    }

    [Fact]
    public void Typematic_RepeatsAfterDelayAtRate()
    {
        Data(0xF3);
        Data(0x00);
        Drain();
        _chip.Keyboard.Send(HidKey.X, true);
        Drain();
        _chip.Keyboard.Send(HidKey.X, true);
        Drain().Should().BeEmpty("a viewer's own repeats are ignored");
        _clock.Advance(249_000_000);
        Drain().Should().BeEmpty();
        int repeats = 0;
        for (int i = 0; i < 1000; i++)
        {
            _clock.Advance(1_000_000);
            repeats += Drain().Length;
        }

        repeats.Should().BeInRange(29, 31, "30 characters a second");
        _chip.Keyboard.Send(HidKey.X, false);
        Drain();
        _clock.Advance(2_000_000_000);
        Drain().Should().BeEmpty();
    }

    // "Scan code set 3": one code a key; break codes and repeats only where the key's type has them.
    [Fact]
    public void Set3_ByDefault_HasBreakCodesOfShiftsAndRepeatsOfLetters()
    {
        SelectSet3();
        Data(0xF0);
        Data(0x00);
        Drain().Should().Equal(0xFA, 0xFA, 0x03);
        Tap(HidKey.A).Should().Equal(0x1C);
        Tap(HidKey.LeftShift).Should().Equal(0x12, 0xF0, 0x12);
        Tap(HidKey.CapsLock).Should().Equal(0x14, 0xF0, 0x14);
        Tap(HidKey.F1).Should().Equal(0x07);
        Tap(HidKey.Delete).Should().Equal(0x64);
        Tap(HidKey.Pause).Should().Equal(0x62);
        Tap(HidKey.PrintScreen).Should().Equal(0x57);
        Repeats(HidKey.A).Should().BePositive();
        Repeats(HidKey.Delete).Should().BePositive();
        Repeats(HidKey.F1).Should().Be(0, "make only");
        Repeats(HidKey.RightControl).Should().Be(0, "make only");
        Repeats(HidKey.LeftControl).Should().Be(0, "make and break");
    }

    [Theory]
    [InlineData(0xF7, false, true)]
    [InlineData(0xF8, true, false)]
    [InlineData(0xF9, false, false)]
    [InlineData(0xFA, true, true)]
    public void Set3_AllKeysOfOneType_BehaveAsIt(byte command, bool breaks, bool repeats)
    {
        SelectSet3();
        Data(command);
        Drain().Should().Equal(0xFA);
        foreach (HidKey key in new[] { HidKey.B, HidKey.RightShift, HidKey.F12, HidKey.Keypad5 })
        {
            Tap(key).Length.Should().Be(breaks ? 3 : 1, "{0}", key);
            (Repeats(key) > 0).Should().Be(repeats, "{0}", key);
        }

        Data(0xF6);
        Drain();
        SelectSet3();
        Tap(HidKey.B).Should().HaveCount(1, "defaults have come back");
        Tap(HidKey.RightShift).Should().HaveCount(3);
    }

    [Fact]
    public void Set3_ListOfKeys_ChangesThemUntilSomethingElseComes()
    {
        SelectSet3();
        Data(0xFC);
        Data(0x1C);
        Data(0x32);
        Drain().Should().Equal(0xFA, 0xFA, 0xFA);
        Data(0x02);
        Drain().Should().Equal(new byte[] { 0xFE }, "no key has this code");
        Tap(HidKey.A).Should().Equal(0x1C, 0xF0, 0x1C);
        Tap(HidKey.B).Should().Equal(0x32, 0xF0, 0x32);
        Tap(HidKey.C).Should().Equal(0x21);
        Data(0xFD);
        Data(0x1C);
        Drain().Should().Equal(0xFA, 0xFA);
        Data(0xEE);
        Drain().Should().Equal(0xEE);
        Tap(HidKey.A).Should().Equal(0x1C);
        Repeats(HidKey.A).Should().Be(0);
        Data(0xFB);
        Data(0x1C);
        Drain();
        Data(0xF4);
        Drain();
        Repeats(HidKey.A).Should().BePositive();
    }

    [Fact]
    public void Set3_EveryKeyOfTheOldKeyboard_HasACodeOfItsOwn()
    {
        SelectSet3();
        var seen = new HashSet<byte>();
        for (HidKey key = HidKey.A; key <= HidKey.Application; key++)
        {
            byte[] bytes = Tap(key);
            bytes.Should().NotBeEmpty("{0}", key);
            seen.Add(bytes[0]).Should().BeTrue("{0}", key);
        }

        for (HidKey key = HidKey.LeftControl; key <= HidKey.RightGui; key++)
        {
            seen.Add(Tap(key)[0]).Should().BeTrue("{0}", key);
        }

        seen.Count.Should().Be(106);
    }

    private void SelectSet3()
    {
        Command(0x60);
        Data(0x01);
        Data(0xF0);
        Data(0x03);
        Drain().Should().Equal(0xFA, 0xFA);
    }

    private byte[] Tap(HidKey key)
    {
        _chip.Keyboard.Send(key, true);
        _chip.Keyboard.Send(key, false);
        return Drain();
    }

    private int Repeats(HidKey key)
    {
        _chip.Keyboard.Send(key, true);
        Drain();
        int repeats = 0;
        for (int i = 0; i < 20; i++)
        {
            _clock.Advance(100_000_000);
            repeats += Drain().Length;
        }

        _chip.Keyboard.Send(key, false);
        Drain();
        return repeats;
    }

    [Fact]
    public void DisabledKeyboard_HoldsItsKeys()
    {
        Command(0xAD);
        _chip.Keyboard.Send(HidKey.A, true);
        (Status & 1).Should().Be(0);
        Command(0xAE);
        Data().Should().Be(0x1E);
    }

    [Fact]
    public void Queue_WhenFull_DropsWholeKeys()
    {
        for (int i = 0; i < 500; i++)
        {
            _chip.Keyboard.Send(HidKey.Home, i % 2 == 0);
        }

        _chip.Keyboard.Dropped.Should().BePositive();
        byte[] codes = Drain();
        codes.Length.Should().BeLessThan(260);
        for (int i = 0; i + 1 < codes.Length; i += 2)
        {
            codes[i].Should().Be(0xE0);
        }
    }

    [Fact]
    public void Mouse_Reset_IdentifiesAndWheelIsUnlocked()
    {
        Command(0xA8);
        ToMouse(0xFF).Should().Equal(0xFA, 0xAA, 0x00);
        ToMouse(0xF2).Should().Equal(0xFA, 0x00);
        foreach (byte rate in new byte[] { 200, 100, 80 })
        {
            ToMouse(0xF3);
            ToMouse(rate).Should().Equal(0xFA);
        }

        ToMouse(0xF2).Should().Equal(0xFA, 0x03);
        foreach (byte rate in new byte[] { 200, 200, 80 })
        {
            ToMouse(0xF3);
            ToMouse(rate);
        }

        ToMouse(0xF2).Should().Equal(0xFA, 0x04);
        ToMouse(0xE9).Should().Equal(0xFA, 0x00, 0x02, 80);
    }

    [Fact]
    public void Mouse_Movement_ComesAsPacketsWithIrq12()
    {
        Command(0x60);
        Data(0x47);
        _chip.Mouse.IsActive.Should().BeFalse();
        ToMouse(0xF4);
        _chip.Mouse.IsActive.Should().BeTrue();
        int before = _irq12.Rises;
        _chip.Mouse.Send(new PointerEvent(5, 3, 0, PointerButtons.Left));
        _irq12.Level.Should().BeTrue();
        (Status & 0x21).Should().Be(0x21);
        Drain().Should().Equal(0x29, 0x05, 0xFD);
        (_irq12.Rises - before).Should().Be(3);
        _chip.Mouse.Send(new PointerEvent(-300, 0, 0, PointerButtons.None));
        Drain().Should().Equal(0x18, 0x01, 0x00, 0x18, 0xD3, 0x00);
    }

    [Fact]
    public void Mouse_PressAndRelease_DoNotMerge()
    {
        ToMouse(0xF4);
        _chip.Mouse.Send(new PointerEvent(1, 0, 0, PointerButtons.None));
        _chip.Mouse.Send(new PointerEvent(0, 0, 0, PointerButtons.Right));
        _chip.Mouse.Send(new PointerEvent(0, 0, 0, PointerButtons.None));
        byte[] bytes = Drain();
        bytes.Should().Equal(0x08, 0x01, 0x00, 0x0A, 0x00, 0x00, 0x08, 0x00, 0x00);
    }

    [Fact]
    public void Mouse_WheelAndExtraButtons_AreInTheFourthByte()
    {
        foreach (byte rate in new byte[] { 200, 100, 80, 200, 200, 80 })
        {
            ToMouse(0xF3);
            ToMouse(rate);
        }

        ToMouse(0xF4);
        _chip.Mouse.Send(new PointerEvent(0, 0, 2, PointerButtons.Forward));
        Drain().Should().Equal(0x08, 0x00, 0x00, 0x2E);
    }

    [Fact]
    public void OutputPort_AndPulses_ControlA20AndReset()
    {
        Command(0xD1);
        Data(0x01);
        _system.IsA20Open.Should().BeFalse();
        Command(0xDF);
        _system.IsA20Open.Should().BeTrue();

        // Port 0x92 drives the same line: the output port shows it, and a command that changes no bit here still counts.
        _system.SetA20(false);
        Command(0xD0);
        Data().Should().Be(0x01);
        Command(0xDF);
        _system.IsA20Open.Should().BeTrue();
        Command(0xD0);
        Data().Should().Be(0x03);
        Command(0xFE);
        _system.Requests.Should().Equal((SystemRequest.ProcessorReset, "the keyboard controller"));
        Command(0xD1);
        Data(0x02);
        _system.Requests.Should().HaveCount(2);
    }

    [Fact]
    public void State_SavedAndLoaded_IsTheSame()
    {
        ToMouse(0xF4);
        Data(0xED);
        Data(0x04);
        _chip.Keyboard.Send(HidKey.Q, true);
        Data(0xF0);
        Data(0x03);
        Data(0xFA);
        Command(0x60);
        var irq = new FakeIrqLine();
        var copy = new I8042(_clock, irq, new FakeIrqLine(), _system);
        copy.Reset();
        DeviceCheck.Copy(_chip, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(_chip));
        irq.Level.Should().BeTrue();
        copy.Keyboard.Leds.Should().Be(KeyboardLeds.Caps);
    }

    [Fact]
    public void Ports_UnderRandomAccess_NeverThrow()
    {
        var random = new Random(3);
        for (int i = 0; i < 50000; i++)
        {
            switch (random.Next(7))
            {
                case 0:
                    Command((byte)random.Next(256));
                    break;
                case 1:
                    Data((byte)random.Next(256));
                    break;
                case 2:
                    Command(0xD4);
                    Data((byte)random.Next(256));
                    break;
                case 3:
                    _chip.Keyboard.Send((HidKey)random.Next(256), random.Next(2) == 0);
                    break;
                case 4:
                    _chip.Mouse.Send(new PointerEvent(
                        random.Next(), random.Next(-999, 999), random.Next(-9, 9), (PointerButtons)random.Next(32)));
                    break;
                case 5:
                    _clock.Advance(random.Next(50_000_000));
                    break;
                default:
                    Data();
                    _ = Status;
                    break;
            }
        }
    }
}

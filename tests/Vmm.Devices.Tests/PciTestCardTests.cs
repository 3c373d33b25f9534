// SPDX-License-Identifier: BSD-2-Clause
using System.Text;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Pci;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>QEMU docs/specs/pci-testdev: the card that kvm-unit-tests measures with.</summary>
public sealed class PciTestCardTests
{
    private readonly PciBench _bench = new();
    private readonly PciTestCard _card = new();

    public PciTestCardTests() => _bench.Plug(_card);

    private IRegisterWindow Window(int bar)
    {
        ulong place = _bench.BarAddress(3, bar);
        AddressMap map = bar == 0 ? _bench.Mmio : _bench.Ports;
        map.TryFind(place, out IRegisterWindow window, out uint offset).Should().BeTrue();
        offset.Should().Be(0);
        return window;
    }

    [Fact]
    public void Identity_IsTheOneThatTheTestsLookFor()
    {
        _bench.Read(3, PciConfig.VendorId).Should().Be(0x0005_1B36);
        (_bench.Read(3, 8) >> 8).Should().Be(0x00FF00);
    }

    [Theory]
    [InlineData(0, 0, 1, "byte", 0xFAUL)]
    [InlineData(0, 1, 2, "word", 0xCAFAUL)]
    [InlineData(0, 2, 4, "dword", 0xFACECAFAUL)]
    [InlineData(1, 0, 1, "byte", 0xFAUL)]
    [InlineData(1, 1, 2, "word", 0xCAFAUL)]
    [InlineData(1, 2, 4, "dword", 0xFACECAFAUL)]
    public void Test_WhenChosen_TellsItselfAndCountsRightWrites(int bar, byte test, int width, string name, ulong data)
    {
        IRegisterWindow window = Window(bar);
        window.Read(1, AccessWidth.Byte).Should().Be(0, "no test is chosen");
        window.Write(0, AccessWidth.Byte, test);
        window.Read(1, AccessWidth.Byte).Should().Be((ulong)width);
        uint target = (uint)window.Read(4, AccessWidth.Dword);
        target.Should().BeInRange(0x10, window.Length - 4);
        ulong wanted = window.Read(8, AccessWidth.Dword);
        wanted.Should().Be(data);
        var text = new StringBuilder();
        for (uint at = 0x10; window.Read(at, AccessWidth.Byte) is var one and not 0; at++)
        {
            text.Append((char)one);
        }

        text.ToString().Should().Be(name);
        for (int i = 0; i < 3; i++)
        {
            window.Write(target, (AccessWidth)width, wanted);
        }

        window.Write(target, (AccessWidth)width, wanted ^ 1);
        window.Write(target, width == 4 ? AccessWidth.Byte : AccessWidth.Dword, wanted);
        window.Read(0x0C, AccessWidth.Dword).Should().Be(3);
        window.Write(0, AccessWidth.Byte, test);
        window.Read(0x0C, AccessWidth.Dword).Should().Be(0, "choosing starts anew");
    }

    [Fact]
    public void Test_ThatDoesNotExist_HasNoWidth()
    {
        IRegisterWindow window = Window(0);
        window.Write(0, AccessWidth.Byte, 3);
        window.Read(1, AccessWidth.Byte).Should().Be(0);
        window.Read(0x10, AccessWidth.Dword).Should().Be(0);
    }

    [Fact]
    public void State_SavedAndLoaded_IsTheSameAndNeverThrows()
    {
        IRegisterWindow window = Window(0);
        window.Write(0, AccessWidth.Byte, 2);
        window.Write((uint)window.Read(4, AccessWidth.Dword), AccessWidth.Dword, window.Read(8, AccessWidth.Dword));
        var copy = new PciTestCard();
        new PciBench().Plug(copy);
        DeviceCheck.Copy(_card, copy);
        DeviceCheck.StateOf(copy).Should().Equal(DeviceCheck.StateOf(_card));
        DeviceCheck.Fuzz(window, 1, 10000);
        DeviceCheck.Fuzz(Window(1), 2, 10000);
        _card.Reset();
    }
}

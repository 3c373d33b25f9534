// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Firmware;
using Vmm.Memory;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>The generation identifier: in memory from the start, another one after a load, and the guest is told.</summary>
public sealed class VmGenIdTests : IDisposable
{
    private readonly RamBlock _page = HeapBuffer.MakeBlock("vmgenid", 4096);
    private int _made;
    private int _events;

    [Fact]
    public void Page_HoldsTheFirstIdentifier()
    {
        VmGenId device = Make();
        device.Resume();
        Read().Should().Be(Identifier(1));
        _events.Should().Be(0);
    }

    [Fact]
    public void Load_ChangesItOnceOnResumeAndRaisesTheEvent()
    {
        VmGenId device = Make();
        var writer = new StateWriter("vmgenid");
        device.Save(writer);
        device.Load(new StateReader("vmgenid", writer.ToArray()), device.StateVersion);
        Read().Should().Be(Identifier(1), "memory is loaded after devices, so that it must wait");
        device.Resume();
        Read().Should().Be(Identifier(2));
        device.Pause();
        device.Resume();
        Read().Should().Be(Identifier(2));
        _events.Should().Be(1);
    }

    public void Dispose() => _page.Dispose();

    private VmGenId Make() => new(_page, () => Identifier(++_made), () => _events++);

    private static Guid Identifier(int number) => new(number, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11);

    private Guid Read()
    {
        Span<byte> bytes = stackalloc byte[16];
        _page.TryRead(0, bytes).Should().BeTrue();
        return new Guid(bytes);
    }
}

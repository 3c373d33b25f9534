// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Linq;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Firmware;
using Vmm.Memory;
using Xunit;

namespace Vmm.Devices.Tests.Firmware;

/// <summary>Files that are made when firmware selects them.</summary>
public sealed class FwCfgComputedTests
{
    private readonly FwCfg _config = new(new GuestMemory());

    [Fact]
    public void ComputedFile_IsMadeAtEachSelectAndFilledUpToItsLength()
    {
        byte[] content = [1, 2];
        _config.AddComputedFile("etc/a", 4, () => content);
        Read(4).Should().Equal(1, 2, 0, 0);
        content = [9, 8, 7, 6, 5];
        Read(6).Should().Equal([9, 8, 7, 6, 0, 0], "what does not fit is cut");
    }

    [Fact]
    public void ComputedFile_HalfReadWhenSaved_GoesOnWithTheSameContent()
    {
        byte value = 1;
        _config.AddComputedFile("etc/a", 2, () => [value, value]);
        Read(1);
        var writer = new StateWriter("fwcfg");
        _config.Save(writer);
        var other = new FwCfg(new GuestMemory());
        value = 2;
        other.AddComputedFile("etc/a", 2, () => [value, value]);
        other.Load(new StateReader("fwcfg", writer.ToArray()), other.StateVersion);
        other.Read(1, AccessWidth.Byte).Should().Be(1);
    }

    [Fact]
    public void AcpiTables_FollowTheMachineAndKeepTheirFiles()
    {
        ushort port = 0x600;
        FwCfgAcpi.AddTo(_config, 4096, () => AcpiTables.Build(new AcpiSpec { Cpus = 1, PmBase = port }));
        byte[] before = Read(16384);
        port = 0xB000;
        byte[] after = Read(16384);
        before.Should().NotEqual(after);
        int fadt = Find(after, "FACP"u8);
        BitConverter.ToUInt32(after, fadt + 56).Should().Be(0xB000);
    }

    private static int Find(byte[] bytes, ReadOnlySpan<byte> what) => bytes.AsSpan().IndexOf(what);

    private byte[] Read(int count)
    {
        _config.Write(0, AccessWidth.Word, FwCfgKey.FirstFile);
        return [.. Enumerable.Range(0, count).Select(_ => (byte)_config.Read(1, AccessWidth.Byte))];
    }
}

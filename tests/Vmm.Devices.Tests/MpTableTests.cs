// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Firmware;
using Vmm.Devices.Pci;
using Vmm.Memory;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>The multiprocessor table (MP specification 1.4 chapter 4).</summary>
public sealed class MpTableTests
{
    [Fact]
    public void Table_IsWellFormedAndRoutesEveryIsaLineOnce()
    {
        var bus = new PciBus(new AddressMap("io", 0x10000), new AddressMap("mmio", 0), new GuestMemory(), new FakeMsiSink());
        byte[] all = MpTable.Build(0xFC000, 3, 0xA00F11, PciAllocator.PirqIrqs, bus);
        Encoding.ASCII.GetString(all, 0, 4).Should().Be("_MP_");
        Sum(all.AsSpan(0, 16)).Should().Be(0);
        BinaryPrimitives.ReadUInt32LittleEndian(all.AsSpan(4)).Should().Be(0xFC010);
        byte[] table = all[16..];
        Encoding.ASCII.GetString(table, 0, 4).Should().Be("PCMP");
        BinaryPrimitives.ReadUInt16LittleEndian(table.AsSpan(4)).Should().Be((ushort)table.Length);
        Sum(table).Should().Be(0);

        int count = 0;
        int cpus = 0;
        var pins = new List<int>();
        for (int at = 44; at < table.Length; at += table[at] == 0 ? 20 : 8)
        {
            count++;
            cpus += table[at] == 0 ? 1 : 0;
            if (table[at] == 3)
            {
                pins.Add(table[at + 7]);
            }
        }

        cpus.Should().Be(3);
        BinaryPrimitives.ReadUInt16LittleEndian(table.AsSpan(34)).Should().Be((ushort)count);
        pins.Should().Equal(2, 1, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15);
    }

    private static byte Sum(ReadOnlySpan<byte> bytes)
    {
        byte sum = 0;
        foreach (byte b in bytes)
        {
            sum += b;
        }

        return sum;
    }
}

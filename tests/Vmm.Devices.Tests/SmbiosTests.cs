// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Linq;
using System.Text;
using FluentAssertions;
using Vmm.Devices.Firmware;
using Xunit;

namespace Vmm.Devices.Tests;

/// <summary>SMBIOS tables (DSP0134 3.6) as a guest parses them.</summary>
public sealed class SmbiosTests
{
    private static readonly Guid s_uuid = new("00112233-4455-6677-8899-aabbccddeeff");

    [Fact]
    public void Anchor_SumsToZeroAndPointsAtTables()
    {
        byte[] placed = Make(1UL << 30, 0).PlaceAt(0xF0000);
        Encoding.ASCII.GetString(placed, 0, 4).Should().Be("_SM_");
        Encoding.ASCII.GetString(placed, 16, 5).Should().Be("_DMI_");
        Sum(placed.AsSpan(0, 31)).Should().Be(0);
        Sum(placed.AsSpan(16, 15)).Should().Be(0);
        BinaryPrimitives.ReadUInt32LittleEndian(placed.AsSpan(24)).Should().Be(0xF0020);
        BinaryPrimitives.ReadUInt16LittleEndian(placed.AsSpan(22)).Should().Be((ushort)(placed.Length - 32));
        List<Structure> all = Parse(placed[32..]);
        BinaryPrimitives.ReadUInt16LittleEndian(placed.AsSpan(28)).Should().Be((ushort)all.Count);
        BinaryPrimitives.ReadUInt16LittleEndian(placed.AsSpan(8)).Should().Be((ushort)all.Max(s => s.TotalBytes));
    }

    [Fact]
    public void Tables_HaveTheRequiredStructuresWithUniqueHandles()
    {
        List<Structure> all = Parse(Make(3UL << 30, 1UL << 30).Tables);
        all.Select(s => s.Type).Should().Equal(0, 1, 3, 4, 4, 16, 17, 19, 19, 32, 127);
        all.Select(s => s.Handle).Should().OnlyHaveUniqueItems();
    }

    [Fact]
    public void System_CarriesUuidWithItsFirstFieldsLittleEndian()
    {
        Structure system = Parse(Make(1UL << 30, 0).Tables).Single(s => s.Type == 1);
        Convert.ToHexString(system.Body.AsSpan(4, 16)).Should().Be("33221100554477668899AABBCCDDEEFF");
        system.Strings.Should().Contain("guest");
    }

    [Fact]
    public void Memory_OfManyGigabytes_IsSeveralDevicesAndExtendedAddresses()
    {
        const ulong High = 6UL << 40;
        List<Structure> all = Parse(Make(3UL << 30, High).Tables);
        all.Count(s => s.Type == 17).Should().Be((int)(((3UL << 30) + High + (16UL << 30) - 1) / (16UL << 30)));
        Structure mapped = all.Last(s => s.Type == 19);
        BinaryPrimitives.ReadUInt32LittleEndian(mapped.Body).Should().Be(uint.MaxValue);
        BinaryPrimitives.ReadUInt64LittleEndian(mapped.Body.AsSpan(11)).Should().Be(1UL << 32);
        BinaryPrimitives.ReadUInt64LittleEndian(mapped.Body.AsSpan(19)).Should().Be((1UL << 32) + High - 1);
    }

    private static Smbios Make(ulong low, ulong high) => Smbios.Build(new SmbiosSpec
    {
        Uuid = s_uuid,
        Name = "guest",
        Version = "1.2",
        Sockets = 2,
        Cores = 2,
        Threads = 4,
        LowBytes = low,
        HighBytes = high,
        HasBios = true,
    });

    private static List<Structure> Parse(byte[] bytes)
    {
        var all = new List<Structure>();
        int at = 0;
        while (at < bytes.Length)
        {
            int start = at;
            byte type = bytes[at];
            int length = bytes[at + 1];
            length.Should().BeGreaterThanOrEqualTo(4);
            ushort handle = BinaryPrimitives.ReadUInt16LittleEndian(bytes.AsSpan(at + 2));
            byte[] body = bytes[(at + 4)..(at + length)];
            at += length;
            var strings = new List<string>();
            while (bytes[at] != 0)
            {
                int end = Array.IndexOf(bytes, (byte)0, at);
                strings.Add(Encoding.ASCII.GetString(bytes, at, end - at));
                at = end + 1;
            }

            at += strings.Count == 0 ? 2 : 1;
            all.Add(new Structure(type, handle, body, strings, at - start));
        }

        return all;
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

    private sealed record Structure(byte Type, ushort Handle, byte[] Body, List<string> Strings, int TotalBytes);
}

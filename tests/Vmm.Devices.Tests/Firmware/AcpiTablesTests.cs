// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Diagnostics;
using System.IO;
using System.Text;
using FluentAssertions;
using Vmm.Devices.Firmware;
using Xunit;

namespace Vmm.Devices.Tests.Firmware;

public sealed class AcpiTablesTests
{
    private static readonly AcpiSpec s_full = new()
    {
        Cpus = 300,
        HasHpet = true,
        HasKeyboardController = true,
        HasFloppy = true,
        SerialPorts = 4,
        PciWindow64Start = 0x8000000000,
        PciWindow64Bytes = 0x1000000000,
    };

    [Fact]
    public void PlaceAt_EveryTable_SumsToZeroAndIsReachable()
    {
        AcpiBlob blob = AcpiTables.Build(s_full);
        byte[] tables = blob.PlaceAt(0xE0040);
        byte[] rsdp = blob.RootPointer(0xE0040);
        Sum(rsdp.AsSpan(0, 20)).Should().Be(0);
        Sum(rsdp).Should().Be(0);
        ulong xsdt = BinaryPrimitives.ReadUInt64LittleEndian(rsdp.AsSpan(24)) - 0xE0040;
        string[] found = new string[3];
        for (int i = 0; i < 3; i++)
        {
            int at = (int)(BinaryPrimitives.ReadUInt64LittleEndian(tables.AsSpan((int)xsdt + 36 + (i * 8))) - 0xE0040);
            int length = BinaryPrimitives.ReadInt32LittleEndian(tables.AsSpan(at + 4));
            Sum(tables.AsSpan(at, length)).Should().Be(0);
            found[i] = Encoding.ASCII.GetString(tables, at, 4);
        }

        found.Should().Equal("FACP", "APIC", "HPET");
    }

    [Theory]
    [InlineData("DSDT")]
    [InlineData("FACP")]
    [InlineData("APIC")]
    [InlineData("HPET")]
    public void Iasl_Disassembles_AndCompilesBack(string signature)
    {
        byte[] tables = AcpiTables.Build(s_full).PlaceAt(0xE0040);
        int at = tables.AsSpan().LastIndexOf(Encoding.ASCII.GetBytes(signature));
        int length = BinaryPrimitives.ReadInt32LittleEndian(tables.AsSpan(at + 4));
        string directory = Directory.CreateTempSubdirectory("vmm-acpi-").FullName;
        try
        {
            string file = Path.Combine(directory, "table.aml");
            File.WriteAllBytes(file, tables.AsSpan(at, length).ToArray());
            Iasl(directory, "-d table.aml").Should().Be(0);
            string source = File.ReadAllText(Path.Combine(directory, "table.dsl"));
            source.Should().NotContain("Unknown").And.NotContain("Invalid");
            Iasl(directory, "-p back table.dsl").Should().Be(0);
        }
        finally
        {
            Directory.Delete(directory, recursive: true);
        }
    }

    [Fact]
    public void Madt_ManyCpus_UsesX2ApicEntriesAbove254()
    {
        byte[] tables = AcpiTables.Build(s_full).PlaceAt(0xE0040);
        int at = tables.AsSpan().IndexOf("APIC"u8);
        int end = at + BinaryPrimitives.ReadInt32LittleEndian(tables.AsSpan(at + 4));
        int small = 0;
        int large = 0;
        for (int entry = at + 44; entry < end; entry += tables[entry + 1])
        {
            small += tables[entry] == 0 ? 1 : 0;
            large += tables[entry] == 9 ? 1 : 0;
        }

        small.Should().Be(255);
        large.Should().Be(45);
    }

    private static int Iasl(string directory, string arguments)
    {
        using Process process = Process.Start(new ProcessStartInfo("iasl", arguments)
        {
            WorkingDirectory = directory,
            UseShellExecute = false,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        })!;
        process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        return process.ExitCode;
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

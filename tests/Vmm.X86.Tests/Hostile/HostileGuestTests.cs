// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using FluentAssertions;
using Xunit;
using Xunit.Abstractions;

namespace Vmm.X86.Tests.Hostile;

/// <summary>
/// Random bytes as code in every mode: no exception leaves Run, and no pointer leaves the guest's memory (an access beside
/// it ends the process). HOSTILE_INSTRUCTIONS asks for that many instructions of each interpreted mode, HOSTILE_ENTRIES
/// for that many entries into translated code, HOSTILE_SEED for others, HOSTILE_REPORT for a line each in that file
/// (tests/fuzz/guest).
/// </summary>
public sealed class HostileGuestTests
{
    private readonly ITestOutputHelper _output;

    public HostileGuestTests(ITestOutputHelper output) => _output = output;

    [Theory]
    [InlineData(HostileMode.Real)]
    [InlineData(HostileMode.Virtual8086)]
    [InlineData(HostileMode.Protected16)]
    [InlineData(HostileMode.Protected32)]
    [InlineData(HostileMode.Paged32)]
    [InlineData(HostileMode.Pae)]
    [InlineData(HostileMode.LongKernel)]
    [InlineData(HostileMode.LongUser)]
    [InlineData(HostileMode.Compatibility)]
    [InlineData(HostileMode.FiveLevel)]
    public void RandomBytes_Interpreted_NeverLeaveTheirGuest(HostileMode mode) =>
        Run(mode, Number("HOSTILE_INSTRUCTIONS", 100_000), 1000, 0, 1);

    [Theory]
    [InlineData(HostileMode.LongKernel, 1)]
    [InlineData(HostileMode.LongUser, 1)]
    [InlineData(HostileMode.Compatibility, 1)]
    [InlineData(HostileMode.FiveLevel, 1)]
    [InlineData(HostileMode.LongKernel, 2)]
    [InlineData(HostileMode.LongUser, 2)]
    public void RandomBytes_Translated_NeverLeaveTheirGuest(HostileMode mode, int vcpus) =>
        Run(mode, 0, Number("HOSTILE_ENTRIES", 20_000), 2, vcpus);

    private static long Number(string name, long otherwise) => long.TryParse(
        Environment.GetEnvironmentVariable(name), CultureInfo.InvariantCulture, out long value) ? value : otherwise;

    private void Run(HostileMode mode, long instructions, long entries, int translateAfter, int vcpus)
    {
        long start = Stopwatch.GetTimestamp();
        int seed = (int)Number("HOSTILE_SEED", 1) + ((int)mode * 1000);
        using var guest = new HostileGuest(mode, seed, translateAfter, vcpus);
        HostileReport report = guest.Run(instructions, entries);
        string kind = translateAfter == 0 ? "interpreted" : "translated";
        string line = string.Create(
            CultureInfo.InvariantCulture,
            $"{mode} {kind} on {vcpus}: {report} in {Stopwatch.GetElapsedTime(start).TotalSeconds:F1} s");
        _output.WriteLine(line);
        if (Environment.GetEnvironmentVariable("HOSTILE_REPORT") is { } path)
        {
            File.AppendAllText(path, line + "\n");
        }

        report.Failure.Should().BeNull();
        report.Entries.Should().BeGreaterThanOrEqualTo(entries);
        report.Instructions.Should().BeGreaterThanOrEqualTo(instructions);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Globalization;
using System.IO;
using System.Linq;
using FluentAssertions;
using Iced.Intel;
using Xunit;
using Xunit.Abstractions;

namespace Vmm.X86.Tests.Differential;

/// <summary>
/// The software processor against the host's. FUZZ_CPU_EXECUTIONS and FUZZ_CPU_SEED make the same tests long
/// (<c>make fuzz-cpu</c>); FUZZ_CPU_ONLY keeps codes whose name contains it.
/// </summary>
[Collection(NativeCollection.Name)]
public sealed class DifferentialTests
{
    private readonly ITestOutputHelper _output;

    public DifferentialTests(ITestOutputHelper output) => _output = output;

    [Theory]
    [InlineData(false, false)]
    [InlineData(false, true)]
    [InlineData(true, false)]
    public void SoftwareProcessor_OnRandomPrograms_DoesWhatTheHostDoes(bool is32Bit, bool translate)
    {
        long executions = Number("FUZZ_CPU_EXECUTIONS", 150_000);
        int seed = (int)Number("FUZZ_CPU_SEED", 1);
        string? only = Environment.GetEnvironmentVariable("FUZZ_CPU_ONLY");
        using var fuzzer = new DifferentialFuzzer(is32Bit, translate)
        {
            Filter = only is null
                ? null
                : code => code.ToString().Contains(only, StringComparison.OrdinalIgnoreCase),
        };

        FuzzReport report = fuzzer.Run(seed, executions);

        Print(report);
        report.Never.Should().BeEmpty();
        report.DifferenceCount.Should().Be(0, "{0}", string.Join('\n', report.Differences.Values.Take(20)));
    }

    private static long Number(string name, long otherwise) => long.TryParse(
        Environment.GetEnvironmentVariable(name), CultureInfo.InvariantCulture, out long value) ? value : otherwise;

    private void Print(FuzzReport report)
    {
        var text = new StringWriter();
        text.WriteLine($"{report.Executions} executions, {report.Faults} with faults, {report.PerCode.Count} codes, " +
            $"{report.Never.Count} never executed, {report.DifferenceCount} differences in " +
            $"{report.Differences.Count} codes");
        long least = report.PerCode.Values.Min();
        text.WriteLine($"executions per code: least {least}, most {report.PerCode.Values.Max()}");
        foreach (string difference in report.Differences.Values)
        {
            text.WriteLine(difference);
        }

        _output.WriteLine(text.ToString());
        string? path = Environment.GetEnvironmentVariable("FUZZ_CPU_REPORT");
        if (path is not null)
        {
            foreach ((Code code, long count) in report.PerCode.OrderBy(pair => pair.Value))
            {
                text.WriteLine($"{count,10} {code}");
            }

            File.AppendAllText(path, text.ToString());
        }
    }
}

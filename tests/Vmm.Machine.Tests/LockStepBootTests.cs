// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Globalization;
using FluentAssertions;
using Vmm.Config;
using Xunit;
using Xunit.Abstractions;

namespace Vmm.Machine.Tests;

/// <summary>
/// Debian's cloud kernel, translated and interpreted, is the same processor and memory at the same instruction counts. By
/// itself the beginning of a boot; tests/guests/lockstep says by LOCKSTEP_* what makes it a whole one.
/// </summary>
public sealed class LockStepBootTests(ITestOutputHelper output)
{
    private const long MemoryBytes = 128 << 20;
    private const long StepNs = 2_000_000;
    private const long WholeStepNs = 10_000_000;
    private const int MemoryEvery = 20;
    private const long EndNs = 200_000_000;
    private const long WholeEndNs = 1_000_000_000_000;

    [CloudKernelTheory]
    [MemberData(nameof(Models))]
    public void DebianKernel_TranslatedAndInterpreted_IsTheSameAtEachStop(string model)
    {
        string? initrd = Variable("INITRD");
        string? says = Variable("SAYS");
        bool isWhole = initrd is not null;
        bool hasEnd = long.TryParse(Variable("END"), CultureInfo.InvariantCulture, out long endNs);
        endNs = hasEnd ? endNs : isWhole ? WholeEndNs : EndNs;
        var spec = new MachineSpec
        {
            Name = "lockstep",
            MemoryBytes = MemoryBytes,
            Cpus = new CpuSpec { Model = model },
            Boot = new BootSpec
            {
                Kernel = Variable("KERNEL") ?? CloudKernelTheoryAttribute.Kernel,
                Initrd = initrd,
                Cmdline = "console=ttyS0 panic=-1 nokaslr",
            },
        };
        LockStep.Outcome outcome = new LockStep(spec, isWhole ? WholeStepNs : StepNs, endNs, MemoryEvery).Run();

        output.WriteLine(string.Create(
            CultureInfo.InvariantCulture,
            $"lock-step: {model}, {outcome.Instructions} instructions in {outcome.Translated[0]} blocks, {outcome.Stops} stops"));
        output.WriteLine(outcome.Text);
        outcome.Difference.Should().BeNull();
        outcome.Translated[0].Should().BeGreaterThan(5000);
        outcome.Translated[1].Should().Be(0);
        outcome.Instructions.Should().BeGreaterThan(100_000_000);
        outcome.Text.Should().Contain("Linux version");
        if (isWhole && !hasEnd)
        {
            outcome.Reason.Should().Be(StopReason.PowerOff);
            outcome.Text.Should().Contain(says);
        }
    }

    /// <summary>The processors that are offered.</summary>
    public static TheoryData<string> Models()
    {
        string models = Variable("MODELS") ?? "x86-64-v3";
        return [.. models.Split(' ', StringSplitOptions.RemoveEmptyEntries)];
    }

    // What tests/guests/lockstep sets; empty is none.
    private static string? Variable(string name) =>
        Environment.GetEnvironmentVariable("LOCKSTEP_" + name) is { Length: > 0 } value ? value : null;
}

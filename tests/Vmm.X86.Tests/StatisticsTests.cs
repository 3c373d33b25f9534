// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using FluentAssertions;
using Vmm.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests;

/// <summary>What the driver says that it has counted agrees with what was executed.</summary>
public sealed class StatisticsTests
{
    [Fact]
    public void Statistics_OfAProgram_CountWhatItDid()
    {
        const int rounds = 100;
        using var map = new StringWriter();
        using var vm = new TestVm(countInstructions: true, perfMap: map);
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(r8d, rounds);
            a.Label(ref loop);
            a.cpuid();
            a.invlpg(__byte_ptr[0x20000]);
            a.mov(rax, __[0x20000]);
            a.push(rax);
            a.pop(rax);
            a.dec(r8d);
            a.jne(loop);
            a.mov(rax, cr3);
            a.mov(cr3, rax);
            a.hlt();
        });
        Dictionary<string, long> before = Read(vm);
        vm.Run().Should().Be(ExitKind.Halted);
        Dictionary<string, long> after = Read(vm);

        long Grown(string name) => after[name] - before.GetValueOrDefault(name);
        Grown("instructions-counted").Should().Be(1 + (rounds * 7) + 3);
        Grown("handler-cpuid").Should().Be(rounds);
        Grown("handler-invlpg").Should().Be(rounds);
        Grown("flushes-of-all").Should().BeGreaterThanOrEqualTo(rounds, "the page is part of a large one");
        Grown("address-space-switches").Should().BePositive();
        Grown("blocks-translated").Should().Be(vm.Cpu.Translator!.Blocks);
        Grown("places-with-site").Should().Be(1, "PUSH and POP are checked together");
        Grown("groups-of-operands").Should().Be(1);
        Grown("places-with-tlb").Should().Be(1, "other operands at level 0 are looked up");
        Grown("host-code-bytes").Should().BeGreaterThan(Grown("instructions-translated"));
        map.ToString().Split('\n', StringSplitOptions.RemoveEmptyEntries)
            .Should().HaveCount((int)vm.Cpu.Translator.Blocks)
            .And.AllSatisfy(line => line.Should().MatchRegex("^[0-9a-f]+ [0-9a-f]+ guest-kernel-[0-9a-f]+$"));
    }

    private static Dictionary<string, long> Read(TestVm vm)
    {
        var all = new Dictionary<string, long>();
        foreach (VmStatistic one in ((IVmStatistics)vm.Vm).ReadStatistics())
        {
            all.Add(one.Name, one.Value);
        }

        return all;
    }
}

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
            a.mov(eax, 1);
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
        Grown("instructions-counted").Should().Be(1 + (rounds * 8) + 3);
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

    [Fact]
    public void Accesses_OfAProgram_AreCountedByTheirClass()
    {
        const int rounds = 100;
        using var vm = new TestVm(countAccesses: true);
        vm.EnterLong(cpl: 3);
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            var routine = a.CreateLabel();
            a.mov(r8d, rounds);
            a.mov(rbx, 0x20000);
            a.mov(rcx, 0x24000);
            a.Label(ref loop);
            a.mov(rax, __qword_ptr[rbx]);
            a.call(routine);
            a.xchg(rbx, rcx);
            a.dec(r8d);
            a.jne(loop);
            a.@int(0x80);
            a.Label(ref routine);
            a.nop();
            a.ret();
        });
        vm.Run();

        Dictionary<string, VmStatistic> all = ReadAll(vm);
        all["hits-user-stack"].Of.Should().Be(2 * rounds, "CALL and RET");
        all["hits-user-stack"].Value.Should().BeInRange((2 * rounds) - 8, 2 * rounds);
        all["hits-user-site"].Of.Should().Be(rounds);
        all["hits-user-site"].Value.Should().BeLessThan(rounds, "the operand goes from page to page");
        all["slow-user-site"].Value.Should().BeLessThan(10, "the TLB has both pages, so that handlers are not needed");
        all["hits-kernel-tlb"].Of.Should().Be(0);
        all["hits-branch"].Of.Should().BeInRange(rounds, rounds + 2, "RET");
        all["hits-branch"].Value.Should().BeInRange(rounds - 2, rounds);
    }

    [Fact]
    public void Accesses_WithoutCounting_AreNotListedAndCostNoCode()
    {
        using var plain = new TestVm();
        using var counting = new TestVm(countAccesses: true);
        long[] bytes = new long[2];
        foreach (TestVm vm in new[] { plain, counting })
        {
            vm.EnterLong();
            vm.Assemble(TestVm.CodeAt, 64, a =>
            {
                a.mov(rax, __qword_ptr[rsp + 0x20]);
                a.hlt();
            });
            vm.Run().Should().Be(ExitKind.Halted);
            bytes[vm == plain ? 0 : 1] = ReadAll(vm)["host-code-bytes"].Value;
        }

        ReadAll(plain).Keys.Should().NotContain(name => name.StartsWith("hits-", StringComparison.Ordinal));
        ReadAll(counting).Keys.Should().Contain("hits-kernel-stack");
        bytes[0].Should().BeLessThan(bytes[1]);
    }

    private static Dictionary<string, VmStatistic> ReadAll(TestVm vm)
    {
        var all = new Dictionary<string, VmStatistic>();
        foreach (VmStatistic one in ((IVmStatistics)vm.Vm).ReadStatistics())
        {
            all.Add(one.Name, one);
        }

        return all;
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

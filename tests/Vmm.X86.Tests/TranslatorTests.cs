// SPDX-License-Identifier: BSD-2-Clause
using FluentAssertions;
using Vmm.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests;

/// <summary>Programs that are translated from their first block on.</summary>
public sealed class TranslatorTests
{
    [Fact]
    public void Blocks_OfALoop_AreTranslatedAndRun()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(r13, 0L);
            a.mov(ecx, 100000);
            a.Label(ref loop);
            a.mov(__[0x20000], rcx);
            a.add(r13, __[0x20000]);
            a.dec(ecx);
            a.jne(loop);
            a.push(r13);
            a.pop(rbx);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[13].Should().Be(5000050000);
        vm.State.Gpr[3].Should().Be(5000050000);
        vm.Cpu.Translator!.Blocks.Should().BePositive();
    }
}

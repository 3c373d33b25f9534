// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Iced.Intel;
using Vmm.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests;

/// <summary>
/// Random programs in two VMs, translated from the first block on and interpreted. Both stop behind each OUT; there the count
/// of instructions, all registers and the memory must be the same.
/// </summary>
public sealed class LockStepTests
{
    private const int Port = 0x80;
    private const int DataAt = 0x40000;
    private const int DataBytes = 0x4000;
    private const int CounterAt = 0x30000;
    private const int Stops = 60;

    private static readonly AssemblerRegister64[] s_registers =
        [rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    [InlineData(4)]
    [InlineData(5)]
    [InlineData(6)]
    [InlineData(7)]
    [InlineData(8)]
    [InlineData(9)]
    [InlineData(10)]
    public void TranslatedProgram_AtEachStop_IsWhereTheInterpreterIs(int seed)
    {
        using TestVm translated = Make(seed, translateAfter: 1);
        using TestVm interpreted = Make(seed, translateAfter: 0);
        ExitKind kind = translated.Run();
        interpreted.Run().Should().Be(kind);
        int stops = 0;
        while (true)
        {
            translated.Cpu.InstructionsRetired.Should().Be(interpreted.Cpu.InstructionsRetired, "stop {0}", stops);
            translated.State.Gpr.Should().Equal(interpreted.State.Gpr, "stop {0}", stops);
            translated.State.Rip.Should().Be(interpreted.State.Rip);
            translated.State.Rflags.Should().Be(interpreted.State.Rflags);
            translated.Memory.SequenceEqual(interpreted.Memory).Should().BeTrue("stop {0}", stops);
            if (kind != ExitKind.Interrupted)
            {
                break;
            }

            stops++;
            kind = translated.Continue();
            interpreted.Continue().Should().Be(kind);
        }

        kind.Should().Be(ExitKind.Halted);
        stops.Should().Be(Stops);
        translated.Cpu.Translator!.Blocks.Should().BePositive();
        translated.MarginsAreIntact.Should().BeTrue();
    }

    private static TestVm Make(int seed, int translateAfter)
    {
        var vm = new TestVm(translateAfter: translateAfter, countInstructions: true);
        vm.Ports.Map(Port, new KickPort(vm));
        // Odd seeds at level 3 (with IOPL 3), where operands have sites; even ones at level 0, where the TLB is asked.
        vm.EnterLong((seed & 1) != 0 ? 3 : 0);
        vm.State.Rflags |= 0x3000;
        var random = new Random(seed);
        for (int i = 0; i < 16; i++)
        {
            vm.State.Gpr[i] = i == 4 ? TestVm.StackTop - 64 : (ulong)random.NextInt64();
        }

        random.NextBytes(vm.Memory.Slice(DataAt, DataBytes));
        vm.Write32(CounterAt, Stops);

        // The program lies across a page's end, so that branches between pages are met.
        ulong at = TestVm.CodeAt + 0x1000 - (ulong)random.Next(40, 400);
        vm.Assemble(at, 64, a => Emit(a, random));
        vm.State.Rip = at;
        return vm;
    }

    private static void Emit(Assembler a, Random random)
    {
        Label outer = a.CreateLabel();
        Label inner = a.CreateLabel();
        Label function = a.CreateLabel();
        Label patched = a.CreateLabel();
        a.Label(ref outer);
        a.mov(__dword_ptr[CounterAt + 8], random.Next(2, 40));
        a.Label(ref inner);
        for (int i = 0; i < random.Next(5, 40); i++)
        {
            One(a, random, function);
        }

        a.dec(__dword_ptr[CounterAt + 8]);
        a.jne(inner);
        for (int i = 0; i < random.Next(5, 60); i++)
        {
            One(a, random, function);
        }

        // MOV R9D, imm32 whose immediate the program changes.
        a.inc(__byte_ptr[patched]);
        a.db(0x41, 0xB9);
        a.Label(ref patched);
        a.dd(random.Next());
        a.cmp(rax, rbx);
        a.@out(Port, al);
        a.dec(__dword_ptr[CounterAt]);
        a.jne(outer);
        a.hlt();
        a.Label(ref function);
        One(a, random, null);
        One(a, random, null);
        a.ret();
    }

    private static void One(Assembler a, Random random, Label? function)
    {
        AssemblerRegister64 x = s_registers[random.Next(s_registers.Length)];
        AssemblerRegister64 y = s_registers[random.Next(s_registers.Length)];
        AssemblerRegister64 z = s_registers[random.Next(s_registers.Length)];
        int offset = DataAt + random.Next(DataBytes - 16);
        switch (random.Next(20))
        {
            case 0:
                a.add(x, y);
                break;
            case 1:
                a.sbb(x, y);
                break;
            case 2:
                a.imul(x, y, random.Next());
                break;
            case 3:
                a.lea(x, __[y + (z * 4) + random.Next(1000)]);
                break;
            case 4:
                a.mov(x, __[offset]);
                break;
            case 5:
                a.mov(__[offset], x);
                break;
            case 6:
                a.adc(__qword_ptr[offset], x);
                break;
            case 7:
                // A place that wanders over pages.
                a.and(y, DataBytes - 16);
                a.xor(x, __qword_ptr[y + DataAt]);
                break;
            case 8:
                a.and(y, DataBytes - 16);
                a.mov(__dword_ptr[y + DataAt], random.Next());
                break;
            case 9:
                a.push(x);
                a.push(__qword_ptr[offset]);
                a.pop(y);
                a.pop(z);
                break;
            case 10 when function is { } target:
                a.call(target);
                break;
            case 11:
                a.cmp(x, y);
                a.cmovb(x, z);
                break;
            case 12:
                Label skip = a.CreateLabel();
                a.test(x, y);
                a.js(skip);
                a.inc(z);
                a.Label(ref skip);
                a.nop();
                break;
            case 13:
                a.shl(x, (byte)random.Next(64));
                break;
            case 14:
                a.cmp(x, y);
                a.pushfq();
                a.pop(x);
                break;
            case 15:
                // A handler's instruction in the middle of a block.
                a.mov(edi, DataAt);
                a.mov(ecx, random.Next(1, 64));
                a.rep.stosb();
                break;
            case 16:
                a.@lock.xadd(__qword_ptr[offset & ~7], x);
                break;
            case 17:
                a.or(y, 1);
                a.mov(edx, 0);
                a.div(y);
                a.cmp(x, y);
                break;
            case 18:
                a.rcr(x, (byte)1);
                break;
            default:
                a.movsx(x, __byte_ptr[offset]);
                break;
        }
    }

    private sealed class KickPort(TestVm vm) : IRegisterWindow
    {
        public uint Length => 1;

        public ulong Read(uint offset, AccessWidth width) => 0;

        public void Write(uint offset, AccessWidth width, ulong value) => vm.Cpu.Kick();
    }
}

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
    [InlineData(11)]
    [InlineData(12)]
    [InlineData(13)]
    [InlineData(14)]
    [InlineData(15)]
    [InlineData(16)]
    [InlineData(17)]
    [InlineData(18)]
    [InlineData(19)]
    [InlineData(20)]
    [InlineData(1021)]
    [InlineData(1022)]
    [InlineData(1023)]
    [InlineData(1024)]
    [InlineData(1025)]
    [InlineData(1026)]
    [InlineData(1027)]
    [InlineData(1028)]
    [InlineData(501)]
    [InlineData(502)]
    [InlineData(503)]
    [InlineData(504)]
    [InlineData(1501)]
    [InlineData(1502)]
    [InlineData(1503)]
    [InlineData(1504)]
    public void TranslatedProgram_AtEachStop_IsWhereTheInterpreterIs(int seed)
    {
        using TestVm translated = Make(seed, translateAfter: 1);
        using TestVm interpreted = Make(seed, translateAfter: 0);
        ExitKind kind = translated.Run();
        interpreted.Run().Should().Be(kind);
        int stops = 0;
        while (true)
        {
            if (Counts(seed))
            {
                translated.Cpu.InstructionsRetired.Should().Be(interpreted.Cpu.InstructionsRetired, "stop {0}", stops);
            }

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

    // By instruction count: in the middle of blocks, of loops and in front of each handler's instruction. All flags, also
    // those that the architecture leaves undefined.
    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    [InlineData(4)]
    [InlineData(5)]
    [InlineData(6)]
    public void TranslatedProgram_StoppedAnywhere_IsWhereTheInterpreterIs(int seed)
    {
        using TestVm translated = Make(seed, translateAfter: 1, deterministic: true, withUndefined: true);
        using TestVm interpreted = Make(seed, translateAfter: 0, deterministic: true, withUndefined: true);
        translated.Cpu.WriteState(translated.State);
        interpreted.Cpu.WriteState(interpreted.State);
        var random = new Random(seed);
        ExitKind kind = ExitKind.Interrupted;
        int stops = 0;
        for (long at = 0; kind != ExitKind.Halted; at += random.Next(1, stops < 200 ? 40 : 4000), stops++)
        {
            kind = RunTo(translated, at);
            RunTo(interpreted, at).Should().Be(kind);
            translated.Cpu.InstructionsRetired.Should().Be(interpreted.Cpu.InstructionsRetired, "stop {0}", stops);
            translated.Cpu.InstructionsRetired.Should().Match(count => kind == ExitKind.Halted || count == at);
            translated.State.Gpr.Should().Equal(interpreted.State.Gpr, "stop {0}", stops);
            translated.State.Rip.Should().Be(interpreted.State.Rip, "stop {0}", stops);
            translated.State.Rflags.Should().Be(interpreted.State.Rflags, "stop {0}", stops);
            translated.Memory.SequenceEqual(interpreted.Memory).Should().BeTrue("stop {0}", stops);
        }

        translated.Cpu.Translator!.Blocks.Should().BePositive();
        stops.Should().BeGreaterThan(200);
    }

    // A store to a controller raises an interrupt in the middle of a block, where flags are about to be overwritten.
    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    public void Interrupt_RaisedByTheProgramItself_IsTakenBehindTheInstructionWithExactFlags(int translateAfter)
    {
        const byte vector = 0x40;
        using var vm = new TestVm(translateAfter: translateAfter, deterministic: true);
        vm.Ports.Map(Port, new ActingPort(() =>
        {
            vm.Port.Vectors.Enqueue(vector);
            vm.Cpu.Kick();
        }));
        vm.EnterLong();
        vm.State.Rflags |= Rflags.If;
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            Label loop = a.CreateLabel();
            a.mov(ecx, 20);
            a.mov(edi, DataAt);
            a.Label(ref loop);
            a.mov(rax, long.MinValue);
            a.add(rax, -1);
            a.mov(ebx, 0x7F);
            a.add(bl, 0x7F);
            a.mov(eax, ecx);
            a.@out(Port, al);
            a.add(rsi, rdi);
            a.dec(ecx);
            a.jne(loop);
            a.hlt();
        });

        // RIP and RFLAGS of each frame, one behind the other.
        vm.Assemble(0x92000 + 0x200, 64, a =>
        {
            a.push(rax);
            a.mov(rax, __[rsp + 8]);
            a.mov(__[rdi], rax);
            a.mov(rax, __[rsp + 24]);
            a.mov(__[rdi + 8], rax);
            a.add(edi, 16);
            a.pop(rax);
            a.iretq();
        });
        const ulong handler = 0x92000 + 0x200;
        vm.Write64(TestVm.IdtAt + (vector * 16), (handler & 0xFFFF) | (8UL << 16) | (0x8EUL << 40) | ((handler >> 16) << 48));
        while (vm.Run() == ExitKind.Interrupted)
        {
            vm.Cpu.ReadState(vm.State);
        }

        vm.State.Gpr[1].Should().Be(0);
        ulong behind = vm.Read64(DataAt);
        for (ulong i = 0; i < 20; i++)
        {
            vm.Read64(DataAt + (i * 16)).Should().Be(behind, "frame {0}", i);

            // 7Fh + 7Fh is FEh: overflow, sign, adjust; odd parity.
            vm.Read64(DataAt + (i * 16) + 8).Should().Be(Rflags.If | Rflags.Fixed | Rflags.Of | Rflags.Sf | Rflags.Af, "frame {0}", i);
        }

        vm.Memory[(int)behind - 2].Should().Be(0xE6, "OUT imm8 is the instruction in front");
        (vm.Cpu.Translator?.Blocks ?? 0).Should().Match(blocks => blocks > 0 == (translateAfter > 0));
    }

    // A timer whose deadline lies inside the block that arms it.
    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    public void StopAt_SetInsideABlock_IsKeptExactly(int translateAfter)
    {
        using var vm = new TestVm(translateAfter: translateAfter, deterministic: true);
        int distance = 0;
        long armed = 0;
        vm.Ports.Map(Port, new ActingPort(() =>
        {
            armed = vm.Cpu.InstructionsRetired;
            vm.Cpu.StopAt = armed + (distance++ & 15);
        }));
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            Label loop = a.CreateLabel();
            a.mov(ecx, 40);
            a.Label(ref loop);
            a.inc(ebx);
            a.@out(Port, al);
            for (int i = 0; i < 20; i++)
            {
                a.inc(rax);
            }

            a.dec(ecx);
            a.jne(loop);
            a.hlt();
        });
        ExitKind kind = vm.Run();
        for (int stop = 0; kind == ExitKind.Interrupted; stop++)
        {
            // The port's own instruction is not retired when it is executed, so that the earliest stop is behind it.
            vm.Cpu.InstructionsRetired.Should().Be(armed + Math.Max(1, stop & 15), "stop {0}", stop);
            vm.Cpu.StopAt = long.MaxValue;
            kind = vm.Continue();
        }

        kind.Should().Be(ExitKind.Halted);
        distance.Should().Be(40);
        vm.Cpu.InstructionsRetired.Should().Be(1 + (40 * 24) + 1);
    }

    // The port of the program interrupts it, too.
    private static ExitKind RunTo(TestVm vm, long at)
    {
        vm.Cpu.StopAt = at;
        ExitKind kind;
        do
        {
            kind = vm.Continue();
        }
        while (kind == ExitKind.Interrupted && vm.Cpu.InstructionsRetired < at);
        return kind;
    }

    // Blocks are translated one by one when they count, and in traces when they do not.
    private static bool Counts(int seed) => seed < 1000;

    private static bool HasFiveLevels(int seed) => seed % 1000 > 500;

    private static TestVm Make(int seed, int translateAfter, bool deterministic = false, bool withUndefined = false)
    {
        var vm = new TestVm(
            translateAfter: translateAfter, countInstructions: Counts(seed), deterministic: deterministic);
        vm.Ports.Map(Port, new KickPort(vm));
        // Odd seeds at level 3 (with IOPL 3), where operands have sites; even ones at level 0, where the TLB is asked.
        vm.EnterLong((seed & 1) != 0 ? 3 : 0, HasFiveLevels(seed));
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
        vm.Assemble(at, 64, a => Emit(a, random, isKernel: (seed & 1) == 0, withUndefined));
        vm.State.Rip = at;
        return vm;
    }

    private static void Emit(Assembler a, Random random, bool isKernel, bool withUndefined)
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
            One(a, random, function, isKernel);
            if (withUndefined)
            {
                OneUndefined(a, random);
            }
        }

        a.dec(__dword_ptr[CounterAt + 8]);
        a.jne(inner);
        for (int i = 0; i < random.Next(5, 60); i++)
        {
            One(a, random, function, isKernel);
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
        One(a, random, null, isKernel);
        One(a, random, null, isKernel);
        a.ret();
    }

    private static void One(Assembler a, Random random, Label? function, bool isKernel)
    {
        AssemblerRegister64 x = s_registers[random.Next(s_registers.Length)];
        AssemblerRegister64 y = s_registers[random.Next(s_registers.Length)];
        AssemblerRegister64 z = s_registers[random.Next(s_registers.Length)];
        int offset = DataAt + random.Next(DataBytes - 16);
        switch (random.Next(30))
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
                AssemblerRegister64 divisor = y == rdx ? rbx : y;
                a.or(divisor, 1);
                a.mov(edx, 0);
                a.div(divisor);
                a.cmp(x, y);
                break;
            case 18:
                // RSP is popped last and kept, as at the end of Linux' system calls.
                a.rcr(x, (byte)1);
                a.push(x);
                a.push(rsp);
                a.pop(rsp);
                a.pop(y);
                break;
            case 20:
            case 21:
                Copy(a, random);
                break;
            case 22:
                a.push(x);
                a.pop(__qword_ptr[offset]);
                a.push(y);
                a.pop(__qword_ptr[rsp - 16 - random.Next(4)]);
                break;
            case 23:
            case 24:
                // Bits before and behind the operand, across pages.
                a.movsx(y, Like16(y));
                BitString(a, random, y);
                break;
            case 25:
                a.mov(eax, random.Next(2));
                a.xor(edx, edx);
                a.@lock.cmpxchg16b(__xmmword_ptr[offset & ~15]);
                a.sete(Like8(x));
                break;
            case 26 when isKernel:
                a.stac();
                a.mov(x, __[offset]);
                a.add(__qword_ptr[offset], y);
                a.clac();
                break;
            case 27 when isKernel:
                a.clac();
                a.mov(x, cr3);
                a.mov(y, cr0);
                a.mov(z, cr4);
                break;
            case 28:
                a.cmp(x, y);
                a.std();
                a.setb(Like8(z));
                a.mov(edi, DataAt + random.Next(64, DataBytes - 8));
                a.mov(ecx, random.Next(1, 8));
                a.rep.stosb();
                a.cld();
                break;
            default:
                a.movsx(x, __byte_ptr[offset]);
                break;
        }
    }

    // Instructions that leave flags undefined, in front of something that shows them all.
    private static void OneUndefined(Assembler a, Random random)
    {
        AssemblerRegister64 x = s_registers[random.Next(s_registers.Length)];
        AssemblerRegister64 y = s_registers[random.Next(s_registers.Length)];
        int offset = DataAt + random.Next(DataBytes - 16);
        switch (random.Next(20))
        {
            case 0:
                a.shl(x, (byte)random.Next(64));
                break;
            case 1:
                a.shr(__dword_ptr[offset], (byte)random.Next(32));
                break;
            case 2:
                a.sar(x, cl);
                break;
            case 3:
                a.rol(x, (byte)random.Next(64));
                break;
            case 4:
                a.ror(__qword_ptr[offset], cl);
                break;
            case 5:
                a.rcl(Like8(x), (byte)random.Next(32));
                break;
            case 6:
                a.rcr(x, (byte)random.Next(64));
                break;
            case 7:
                a.imul(x, y);
                break;
            case 8:
                a.mul(__qword_ptr[offset]);
                break;
            case 9:
                a.bsf(x, y);
                break;
            case 10:
                a.bsr(x, __qword_ptr[offset]);
                break;
            case 11:
                a.shld(x, y, (byte)random.Next(64));
                break;
            case 12:
                a.shrd(__qword_ptr[offset], y, cl);
                break;
            case 13:
                a.bts(x, y);
                break;
            case 14:
                a.and(x, __qword_ptr[offset]);
                break;
            case 15:
                a.tzcnt(x, y);
                a.setc(Like8(y));
                a.lzcnt(x, y);
                break;
            case 16:
                a.blsr(x, y);
                break;
            case 17:
                a.bzhi(x, y, x);
                break;
            case 18:
                a.andn(x, y, x);
                break;
            default:
                a.bextr(x, y, x);
                break;
        }

        switch (random.Next(4))
        {
            case 0:
                a.pushfq();
                a.pop(x);
                break;
            case 1:
                a.mov(x, __[offset]);
                break;
            case 2:
                a.rcl(y, 1);
                break;
            default:
                break;
        }
    }

    private static AssemblerRegister16 Like16(AssemblerRegister64 register) =>
        new(Register.AX + (register.Value - Register.RAX));

    private static AssemblerRegister8 Like8(AssemblerRegister64 register) =>
        new(((Register)register).GetNumber() < 4
            ? Register.AL + (register.Value - Register.RAX)
            : Register.SPL + (register.Value - Register.RSP));

    // Copies and fills inside a page, across pages, over each other, and of nothing.
    private static void Copy(Assembler a, Random random)
    {
        int bytes = random.Next(3) switch { 0 => random.Next(4), 1 => random.Next(100), _ => random.Next(5000) };
        a.mov(edi, DataAt + random.Next(DataBytes - bytes - 8));
        a.mov(esi, DataAt + random.Next(DataBytes - bytes - 8));
        int size = 1 << random.Next(4);
        a.mov(ecx, bytes / size);
        switch (size * (random.Next(2) == 0 ? 1 : 16))
        {
            case 1:
                a.rep.movsb();
                break;
            case 2:
                a.rep.movsw();
                break;
            case 4:
                a.rep.movsd();
                break;
            case 8:
                a.rep.movsq();
                break;
            case 16:
                a.rep.stosb();
                break;
            case 32:
                a.rep.stosw();
                break;
            case 64:
                a.rep.stosd();
                break;
            default:
                a.rep.stosq();
                break;
        }
    }

    private static void BitString(Assembler a, Random random, AssemblerRegister64 number)
    {
        int offset = DataAt + 0x1800 + (random.Next(64) * 8);
        var wide = __qword_ptr[offset];
        var narrow = __dword_ptr[offset];
        var number32 = new AssemblerRegister32(Register.EAX + (number.Value - Register.RAX));
        switch (random.Next(8))
        {
            case 0:
                a.bt(wide, number);
                break;
            case 1:
                a.bt(narrow, number32);
                break;
            case 2:
                a.bts(wide, number);
                break;
            case 3:
                a.@lock.btr(wide, number);
                break;
            case 4:
                a.@lock.bts(narrow, number32);
                break;
            case 5:
                a.btc(narrow, number32);
                break;
            case 6:
                a.btr(__word_ptr[offset], Like16(number));
                break;
            default:
                a.@lock.btc(wide, number);
                break;
        }

        a.setb(__byte_ptr[offset + 9]);
    }

    private sealed class ActingPort(Action act) : IRegisterWindow
    {
        public uint Length => 1;

        public ulong Read(uint offset, AccessWidth width) => 0;

        public void Write(uint offset, AccessWidth width, ulong value) => act();
    }

    private sealed class KickPort(TestVm vm) : IRegisterWindow
    {
        public uint Length => 1;

        public ulong Read(uint offset, AccessWidth width) => 0;

        public void Write(uint offset, AccessWidth width, ulong value) => vm.Cpu.Kick();
    }
}

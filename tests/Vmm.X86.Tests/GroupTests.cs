// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Iced.Intel;
using Vmm.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests;

/// <summary>
/// Random loops full of neighbouring memory operands, pushes and pops, whose data and stack wander over scattered small
/// pages, some of which are not there: translated, they must do what the interpreter does.
/// </summary>
public sealed class GroupTests
{
    private const ulong Window = 0x200000;
    private const int WindowPages = 24;
    private const int ArithmeticFlags = 0x8D5;
    private const ulong SmallPages = 0x88000;
    private const ulong KernelStack = 0x9F000;
    private static readonly AssemblerRegister64[] s_data = [rax, rdx, rsi, r8, r10, r12, r13, r14, r15];

    [Theory]
    [InlineData(3, 0)]
    [InlineData(0, 0)]
    [InlineData(3, 4)]
    [InlineData(0, 4)]
    public void RandomLoops_OfNeighbouringOperands_DoWhatTheInterpreterDoes(int cpl, int holes)
    {
        long groups = 0;
        for (int seed = 0; seed < 80; seed++)
        {
            using var interpreted = new TestVm(translateAfter: 0);
            using var translated = new TestVm(translateAfter: 1 + (seed % 4));
            Prepare(interpreted, seed, cpl, holes);
            Prepare(translated, seed, cpl, holes);

            // A fault whose frame meets a hole becomes a shutdown.
            string because = $"seed {seed}";
            ExitKind exit = interpreted.Run();
            exit.Should().BeOneOf(ExitKind.Halted, ExitKind.Shutdown);
            translated.Run().Should().Be(exit, because);
            translated.State.Rip.Should().Be(interpreted.State.Rip, because);
            translated.State.Cr2.Should().Be(interpreted.State.Cr2, because);
            translated.State.Gpr.Should().Equal(interpreted.State.Gpr, because);
            translated.State.Xsave.AsSpan(160, 256).ToArray()
                .Should().Equal(interpreted.State.Xsave.AsSpan(160, 256).ToArray(), because);

            // A fault may report stale arithmetic flags; the last HLT (#GP) may not.
            const ulong AfterGp = 0x92000 + 13 + 1;
            ulong saved = cpl == 3 ? KernelStack - 24 : Physical(interpreted, interpreted.State.Gpr[4] + 24);
            if (interpreted.State.Rip is > 0x92000 and < 0x93000 and not AfterGp)
            {
                MaskFlags(interpreted, saved);
                MaskFlags(translated, saved);
            }

            translated.Memory.SequenceEqual(interpreted.Memory).Should().BeTrue(because);
            translated.MarginsAreIntact.Should().BeTrue();
            groups += translated.Cpu.Translator!.Groups;
        }

        groups.Should().BeGreaterThan(100);
    }

    // Rounds of a short loop are translated together and share their checks.
    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    [InlineData(7)]
    [InlineData(1000)]
    public void ShortLoop_OfAnyLength_RunsItsRounds(int rounds)
    {
        using var vm = new TestVm(translateAfter: 2);
        vm.EnterLong(3);
        Scatter(vm, new Random(2), 0);
        vm.Memory.Slice(0x100000, WindowPages << 12).Clear();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var outer = a.CreateLabel();
            var loop = a.CreateLabel();
            a.mov(r13d, 20);
            a.Label(ref outer);
            a.mov(rsi, Window + 64);
            a.xor(eax, eax);
            a.xor(edx, edx);
            a.Label(ref loop);
            a.add(__qword_ptr[rsi + (rax * 8)], rax);
            a.add(rdx, __qword_ptr[rsi + (rax * 8)]);
            a.add(rax, 1);
            a.cmp(rax, rounds);
            a.jne(loop);
            a.sub(r13d, 1);
            a.jne(outer);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        long sum = (long)rounds * (rounds - 1) / 2;
        vm.State.Gpr[0].Should().Be((ulong)rounds);
        vm.State.Gpr[2].Should().Be((ulong)(20 * sum));
        vm.Cpu.Translator!.Groups.Should().BePositive();
    }

    // Two arrays, indexed by a 32-bit counter that is extended in each round, up to where it overflows.
    [Theory]
    [InlineData(true, 0x7FFFFFE0U, 60)]
    [InlineData(false, 0xFFFFFFE0U, 60)]
    [InlineData(true, 0x7FFFFE00U, 250)]
    [InlineData(false, 0xFFFFFE00U, 250)]
    [InlineData(true, 0U, 500)]
    [InlineData(false, 0U, 500)]
    [InlineData(true, 0xFFFFFFF0U, 500)]
    public void ExtendedCounter_ThatOverflows_ReachesWhatItReachesAlone(bool isSigned, uint first, int rounds)
    {
        using var interpreted = new TestVm(translateAfter: 0);
        using var translated = new TestVm(translateAfter: 2);
        foreach (TestVm vm in new[] { interpreted, translated })
        {
            vm.EnterLong(3);
            Scatter(vm, new Random(3), 0);
            ulong start = isSigned ? (ulong)(int)first : first;
            vm.State.Gpr[7] = Window + 0x4F80 - start;
            vm.State.Gpr[6] = Window + 0x8100 - start;
            vm.Assemble(TestVm.CodeAt, 64, a =>
            {
                var outer = a.CreateLabel();
                var loop = a.CreateLabel();
                a.mov(r13d, 5);
                a.Label(ref outer);
                a.mov(eax, first);
                a.Label(ref loop);
                if (isSigned)
                {
                    a.movsxd(rcx, eax);
                }
                else
                {
                    a.mov(ecx, eax);
                }

                a.add(eax, 1);
                a.movzx(edx, __byte_ptr[rdi + rcx]);
                a.add(edx, 1);
                a.mov(__byte_ptr[rsi + rcx], dl);
                a.cmp(eax, unchecked((int)(first + (uint)rounds)));
                a.jne(loop);
                a.dec(r13d);
                a.jne(outer);
                a.hlt();
            });
        }

        interpreted.Run().Should().Be(ExitKind.Halted);
        translated.Run().Should().Be(ExitKind.Halted);
        MaskFlags(interpreted, KernelStack - 24);
        MaskFlags(translated, KernelStack - 24);
        translated.State.Rip.Should().Be(interpreted.State.Rip);
        translated.State.Cr2.Should().Be(interpreted.State.Cr2);
        translated.State.Gpr.Should().Equal(interpreted.State.Gpr);
        translated.Memory.SequenceEqual(interpreted.Memory).Should().BeTrue();
        translated.Cpu.Translator!.Groups.Should().BePositive();
    }

    // Operands that stay across two pages which are apart: the group's check can never pass.
    [Fact]
    public void Group_AcrossScatteredPages_NeedsNoHandlers()
    {
        using var vm = new TestVm();
        vm.EnterLong(3);
        Scatter(vm, new Random(1), 0);
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(ecx, 1000);
            a.mov(rbx, Window + 4096 - 8);
            a.mov(__qword_ptr[rbx + 8], 0);
            a.Label(ref loop);
            a.mov(__qword_ptr[rbx], rcx);
            a.add(__qword_ptr[rbx + 8], rcx);
            a.dec(ecx);
            a.jne(loop);
            a.mov(rax, __qword_ptr[rbx + 8]);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[0].Should().Be(500500);
        Calls(vm, Code.Mov_rm64_r64).Should().BeLessThan(20);
    }

    private static unsafe long Calls(TestVm vm, Code code) => vm.Cpu.Context->HandlerCalls[(int)code];

    private static ulong Physical(TestVm vm, ulong linear) => linear - Window < (ulong)WindowPages << 12
        ? (vm.Read64(SmallPages + ((linear - Window) >> 12 << 3)) & ~0xFFFUL) + (linear & 0xFFF)
        : linear & 0x1FFFFF;

    private static void MaskFlags(TestVm vm, ulong at) => vm.Write64(at, vm.Read64(at) & ~(ulong)ArithmeticFlags);

    private static void Prepare(TestVm vm, int seed, int cpl, int holes)
    {
        var random = new Random(seed);
        vm.EnterLong(cpl);
        Scatter(vm, random, holes);
        for (int i = 0; i < 16; i++)
        {
            vm.State.Gpr[i] = (ulong)random.NextInt64();
        }

        vm.State.Gpr[1] = (ulong)random.Next(20, 60);
        vm.State.Gpr[3] = Near(random);
        vm.State.Gpr[4] = Near(random) & ~7UL;
        vm.State.Gpr[5] = Near(random);
        vm.State.Gpr[9] = (ulong)random.Next(16);
        if (random.Next(2) == 0)
        {
            // A base that lives in memory.
            vm.State.Gpr[14] = Near(random);
        }

        vm.Assemble(TestVm.CodeAt, 64, a => Draw(a, random));
    }

    // Most frames of a recursion lie on both sides of a page boundary: places that share a site must not fight for it by
    // being translated anew again and again.
    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void Recursion_AcrossScatteredPages_SettlesDown(int shift)
    {
        const int rounds = 300;
        using var vm = new TestVm(translateAfter: 2);
        vm.EnterLong(3);
        Scatter(vm, new Random(5), 0);
        vm.State.Gpr[4] = Window + 0x4000 + (uint)(16 * (8 + shift));
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var outer = a.CreateLabel();
            var fibonacci = a.CreateLabel();
            var leaf = a.CreateLabel();
            a.mov(r13d, rounds);
            a.Label(ref outer);
            a.mov(edi, 14);
            a.call(fibonacci);
            a.sub(r13d, 1);
            a.jne(outer);
            a.hlt();
            a.Label(ref fibonacci);
            a.cmp(rdi, 2);
            a.jb(leaf);
            a.push(rbx);
            a.lea(rbx, __[rdi - 2]);
            a.dec(rdi);
            a.call(fibonacci);
            a.mov(rdi, rbx);
            a.mov(rbx, rax);
            a.call(fibonacci);
            a.add(rax, rbx);
            a.pop(rbx);
            a.ret();
            a.Label(ref leaf);
            a.mov(rax, rdi);
            a.ret();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[0].Should().Be(377);
        vm.Cpu.Translator!.Blocks.Should().BeLessThan(60);
    }

    // Small pages at random places, in two runs that lie side by side and otherwise apart.
    private static void Scatter(TestVm vm, Random random, int holes)
    {
        const ulong first = 0x100000;
        int[] frames = new int[WindowPages];
        for (int i = 0; i < frames.Length; i++)
        {
            frames[i] = i;
        }

        random.Shuffle(frames.AsSpan(0, frames.Length - 6));
        vm.Write64(TestVm.PageTables + 0x2000 + 8, SmallPages | 7);
        for (int i = 0; i < WindowPages; i++)
        {
            vm.Write64(SmallPages + ((ulong)i * 8), (first + ((ulong)frames[i] << 12)) | 7);
        }

        for (int i = 0; i < holes; i++)
        {
            vm.Write64(SmallPages + ((ulong)random.Next(WindowPages) * 8), 0);
        }

        random.NextBytes(vm.Memory.Slice((int)first, WindowPages << 12));
    }

    private static ulong Near(Random random) =>
        Window + ((ulong)random.Next(4, WindowPages - 4) << 12) + (ulong)random.Next(-300, 300);

    private static void Draw(Assembler a, Random random)
    {
        var loop = a.CreateLabel();
        var function = a.CreateLabel();
        var end = a.CreateLabel();
        AssemblerRegister64 start = random.Next(4) switch
        {
            0 => rbp,
            1 => r14,
            _ => rbx,
        };
        bool isIndexed = random.Next(3) == 0;
        int depth = 0;
        a.mov(r11, rsp);
        if (start == r14)
        {
            a.mov(r14, rbx);
        }

        a.Label(ref loop);
        int length = random.Next(4, 26);
        int changes = random.Next(2, 8);
        a.mov(edi, 3);
        for (int i = 0; i < length; i++)
        {
            if (random.Next(changes) == 0)
            {
                start = random.Next(4) switch
                {
                    0 => rsp,
                    1 => rbp,
                    _ => rbx,
                };
            }

            int displacement = random.Next(-40, 40);
            AssemblerMemoryOperand at = isIndexed && start == rbx
                ? (random.Next(2) == 0 ? __[start + r9 + displacement] : __[start + (r9 * 4) + displacement])
                : __[start + displacement];
            AssemblerRegister64 data = s_data[random.Next(s_data.Length)];
            data = data == start ? rax : data;
            One(a, random, at, data, start, ref depth);
            if (random.Next(5) == 0)
            {
                // A way around the next two.
                var skip = a.CreateLabel();
                a.test(ecx, 1 << random.Next(3));
                if (random.Next(2) == 0)
                {
                    a.je(skip);
                }
                else
                {
                    a.jne(skip);
                }

                One(a, random, at, data, start, ref depth);
                One(a, random, at, data, start, ref depth);
                if (random.Next(4) == 0)
                {
                    a.jmp(skip);
                    a.nop();
                }

                a.Label(ref skip);
            }
        }

        if (random.Next(2) == 0)
        {
            a.call(function);
        }

        a.mov(rsp, r11);
        a.add(rbx, random.Next(-48, 80));
        a.add(r11, random.Next(-4, 6) * 8);
        a.mov(rsp, r11);
        a.dec(ecx);
        a.jne(loop);
        a.jmp(end);
        a.Label(ref function);
        a.push(r13);
        a.push(rbp);
        a.mov(__qword_ptr[rsp - 24], rsi);
        a.sub(rsp, 24);
        a.add(rsi, __qword_ptr[rsp + 8]);
        a.adc(rsi, r13);
        a.add(rsp, 24);
        a.pop(rbp);
        a.pop(r13);
        a.ret();
        a.Label(ref end);
        a.hlt();
    }

    private static void One(
        Assembler a, Random random, in AssemblerMemoryOperand at, AssemblerRegister64 data, AssemblerRegister64 start, ref int depth)
    {
        switch (random.Next(31))
        {
            case 0 or 1 or 2:
                a.mov(at, data);
                break;
            case 3 or 4 or 5:
                a.mov(data, at);
                break;
            case 6:
                a.add(at, data);
                break;
            case 7:
                a.adc(data, at);
                break;
            case 8:
                a.cmp(data, at);
                break;
            case 9:
                a.setc(dl);
                break;
            case 10:
                a.cmovb(data, at);
                break;
            case 11 when start != rsp && start != rbp:
                a.add(start, random.Next(-20, 20));
                break;
            case 12 when start != rsp && start != rbp:
                a.inc(start);
                break;
            case 13 when start != rsp && start != rbp:
                a.lea(start, __[start + random.Next(-20, 20)]);
                break;
            case 14 or 15 or 16:
                a.push(data);
                depth++;
                break;
            case 17 or 18 or 19 when depth > 0:
                a.pop(data);
                depth--;
                break;
            case 20:
                a.lea(rdx, __[rsp + 16]);
                break;
            case 21:
                a.movups(xmm3, at);
                break;
            case 22:
                a.movups(at, xmm3);
                break;
            case 23:
                a.push(0x1234);
                depth++;
                break;
            case 25:
                a.movsxd(r9, edi);
                break;
            case 26:
                a.mov(r9d, edi);
                break;
            case 27 or 28:
                a.add(edi, 1);
                break;
            case 29:
                a.dec(edi);
                break;
            case 24:
                a.sbb(data, s_data[random.Next(s_data.Length)]);
                break;
            default:
                a.movzx(eax, __byte_ptr[at]);
                break;
        }
    }
}

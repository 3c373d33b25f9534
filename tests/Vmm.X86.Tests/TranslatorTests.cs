// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Diagnostics;
using System.Runtime.InteropServices;
using System.Threading;
using FluentAssertions;
using Iced.Intel;
using Vmm.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests;

/// <summary>Programs that are translated from their first block on.</summary>
public sealed class TranslatorTests
{
    // Upper halves are cleared instead of loaded when they are all zero (-1), and kept when one is not.
    [Theory]
    [InlineData(-1)]
    [InlineData(0)]
    [InlineData(7)]
    [InlineData(15)]
    public void UpperHalves_AroundHandlers_AreKept(int register)
    {
        const int xmm = 160;
        const int upper = 576;
        const int headers = 512;
        using var vm = new TestVm();
        vm.EnterLong();
        vm.State.Xsave[headers] = 7;
        for (int i = 0; i < 16; i++)
        {
            vm.State.Xsave[xmm + (16 * i)] = (byte)(i + 1);
        }

        if (register >= 0)
        {
            vm.State.Xsave[upper + (16 * register) + 11] = 0x5A;
        }

        byte[] before = vm.State.Xsave.AsSpan(upper, 256).ToArray();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(ecx, 10);
            a.Label(ref loop);
            a.paddd(xmm0, xmm1);
            a.paddd(xmm15, xmm1);
            a.invlpg(__byte_ptr[0x20000]);
            a.paddd(xmm0, xmm1);
            a.dec(ecx);
            a.jne(loop);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Xsave[xmm].Should().Be(1 + (20 * 2));
        vm.State.Xsave[xmm + (16 * 15)].Should().Be(16 + (10 * 2));
        vm.State.Xsave[xmm + (16 * 9)].Should().Be(10);
        vm.State.Xsave.AsSpan(upper, 256).ToArray().Should().Equal(before);
    }

    private const int CallRounds = 120;

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

    [Fact]
    public void LongMode_StoreIntoTheRunningLoop_TakesEffectAtOnce()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var again = a.CreateLabel();
            a.mov(ecx, 1000);
            a.xor(eax, eax);
            a.Label(ref again);
            a.add(__dword_ptr[TestVm.CodeAt + 15], 1);
            a.mov(ebx, 0);
            a.add(rax, rbx);
            a.dec(ecx);
            a.jne(again);
            a.hlt();
        });

        // The immediate of MOV EBX lies behind its opcode.
        int at = vm.Memory.Slice((int)TestVm.CodeAt, 64).IndexOf((byte)0xBB) + 1;
        vm.Memory.Slice((int)TestVm.CodeAt, 64).IndexOf(new byte[] { 0x83, 0x04, 0x25 }).Should().Be(at - 9);
        vm.Write32(TestVm.CodeAt + (ulong)at - 6, (uint)(TestVm.CodeAt + (ulong)at));
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[0].Should().Be(500500);
    }

    [Fact]
    public void LongMode_FaultInTranslatedCode_LeavesEverythingBeforeIt()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Write64(TestVm.PageTables + 0x2000 + 8, 0);
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(r14, 0x1FFF00L);
            a.Label(ref loop);
            a.mov(__qword_ptr[r14], r14);
            a.add(r14, 8);
            a.jmp(loop);
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Cr2.Should().Be(0x200000);
        vm.State.Gpr[14].Should().Be(0x200000);
        vm.Read64(0x1FFFF8).Should().Be(0x1FFFF8);
        vm.MarginsAreIntact.Should().BeTrue();
    }

    // Each form is met as "cannot be encoded" after its operand's check, spills and flags have been emitted.
    [Theory]
    [InlineData(Code.Add_r64_rm64)]
    [InlineData(Code.Adc_rm64_imm8)]
    [InlineData(Code.Div_rm64)]
    [InlineData(Code.Imul_r64_rm64_imm8)]
    public void Instruction_ThatCannotBeEncoded_GoesToItsHandler(Code code)
    {
        using var vm = new TestVm();
        vm.Cpu.Translator!.Unencodable = code;
        vm.EnterLong();
        vm.Write64(0x20000, 7);
        vm.Write64(0x20008, 3);
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(r13, 0L);
            a.mov(ecx, 100);
            a.Label(ref loop);
            a.add(r13, __qword_ptr[0x20000]);
            a.cmp(ecx, 50);
            a.adc(__qword_ptr[0x20010], 0);
            a.imul(rax, r13, 3);
            a.mov(edx, 0);
            a.div(__qword_ptr[0x20008]);
            a.mov(rbx, rax);
            a.dec(ecx);
            a.jne(loop);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[13].Should().Be(700);
        vm.State.Gpr[3].Should().Be(700);
        vm.Read64(0x20010).Should().Be(49);
        vm.Cpu.Translator.HandlerCodes[(int)code].Should().BePositive();
    }

    // Bits 63:48 of such an address can be what the indirect-branch cache tags its entries with: 4000h at level 0 with
    // global pages, so that the address less its tag is 0, which empty entries hold.
    [Theory]
    [InlineData(0x4000_0000_0000_0000UL, true)]
    [InlineData(0x4000_0000_0000_0000UL, false)]
    [InlineData(0x8000_0000_0000_0000UL, true)]
    [InlineData(0x0000_8000_0000_0000UL, false)]
    public void LongMode_BranchToANonCanonicalAddress_RaisesGpBeforeIt(ulong target, bool isReturn)
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(rax, target);
            a.push(rax);
            if (isReturn)
            {
                a.ret();
            }
            else
            {
                a.jmp(rax);
            }
        });

        vm.Run().Should().Be(ExitKind.Halted);

        vm.State.Rip.Should().Be(0x92000 + 13 + 1);
        ulong frame = vm.State.Gpr[4];
        vm.Read64(frame + 8).Should().Be(TestVm.CodeAt + 11);
        vm.Read64(frame + 32).Should().Be(TestVm.StackTop - 8);
    }

    // Two routines whose addresses have the same entry of the indirect-branch cache: the one that was displaced is found in its
    // second place, and not any more when its page is mapped elsewhere.
    [Fact]
    public void Branches_ToTwoPlacesWithOneEntry_AreBothFoundUntilTheirPagesChange()
    {
        const ulong tables = 0x88000;
        const ulong first = 0x200100;
        const ulong second = 0x220140;
        const int rounds = 100;
        BlockCache.BranchSlot(second).Should().Be(BlockCache.BranchSlot(first));
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Write64(TestVm.PageTables + 0x2000, vm.Read64(TestVm.PageTables + 0x2000) | 0x100);
        vm.Write64(TestVm.PageTables + 0x2000 + 8, tables | 7);
        Write(0x100000 + (first & 0xFFF), 1);
        Write(0x101000 + (second & 0xFFF), 0x100);
        Write(0x102000 + (second & 0xFFF), 0x10000);
        Write(0x103000 + (first & 0xFFF), 0x1000000);
        ulong firstEntry = tables + ((first >> 12) & 0x1FF) * 8;
        ulong secondEntry = tables + ((second >> 12) & 0x1FF) * 8;
        vm.Write64(firstEntry, 0x100107);
        vm.Write64(secondEntry, 0x101107);
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.xor(edx, edx);
            a.mov(rsi, first);
            a.mov(rdi, second);
            for (int phase = 0; phase < 3; phase++)
            {
                var loop = a.CreateLabel();
                a.mov(ecx, rounds);
                a.Label(ref loop);
                a.call(rsi);
                a.call(rdi);
                a.dec(ecx);
                a.jne(loop);
                if (phase < 2)
                {
                    a.mov(__qword_ptr[phase == 0 ? secondEntry : firstEntry], phase == 0 ? 0x102107 : 0x103107);
                    a.invlpg(__byte_ptr[phase == 0 ? rdi : rsi]);
                }
            }

            a.hlt();
        });

        vm.Run().Should().Be(ExitKind.Halted);

        vm.State.Gpr[2].Should().Be(rounds * (2 + 0x100 + 0x20000 + 0x1000000));
        vm.Cpu.Dispatches.Should().BeLessThan(rounds);

        void Write(ulong at, int value) => vm.Assemble(at, 64, a =>
        {
            a.add(rdx, value);
            a.ret();
        });
    }

    // With 57 bits, some of those addresses are canonical: the branch is taken and the fetch faults.
    [Theory]
    [InlineData(0x0000_8000_0000_0000UL, 14, false)]
    [InlineData(0x00FF_8000_0000_0000UL, 14, true)]
    [InlineData(0xFF7F_FFFF_FFFF_F000UL, 14, false)]
    [InlineData(0x0100_0000_0000_0000UL, 13, false)]
    [InlineData(0xFEFF_FFFF_FFFF_F000UL, 13, true)]
    public void FiveLevels_BranchToWhatFourCannotReach_IsTaken(ulong target, int vector, bool isCall)
    {
        using var vm = new TestVm();
        vm.EnterLong(fiveLevel: true);
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(rax, target);
            if (isCall)
            {
                a.call(rax);
            }
            else
            {
                a.jmp(rax);
            }
        });

        vm.Run().Should().Be(ExitKind.Halted);

        vm.State.Rip.Should().Be(0x92000 + (ulong)vector + 1);
        ulong frame = vm.State.Gpr[4];
        bool isTaken = vector == 14;
        vm.Read64(frame + 8).Should().Be(isTaken ? target : TestVm.CodeAt + 10);
        vm.Read64(frame + 32).Should().Be(TestVm.StackTop - (isTaken && isCall ? 8UL : 0));
        vm.Cpu.Translator!.Blocks.Should().BePositive();
    }

    // One page of code runs at one address in the first address space and at 255 in the second. Its jump to the next page
    // is linked in the first; in the second that is another page. One address differs from the first as the spaces' tags do.
    [Fact]
    public void FiveLevels_LinkToAnotherPage_HoldsForItsAddressSpaceOnly()
    {
        const int code = 0x20000;
        const int counters = 0x30000;
        const int rounds = 5;
        const ulong firstSpace = TestVm.PageTables + 0x3000;
        const ulong secondSpace = TestVm.PageTables + 0x4000;
        const ulong tables = TestVm.PageTables + 0x5000;
        using var vm = new TestVm();
        vm.EnterLong(fiveLevel: true);
        vm.State.Cr4 = (vm.State.Cr4 & ~Cr4.Pge) | Cr4.PcidE;
        vm.State.Cr3 = firstSpace | 1;
        vm.Write64(secondSpace, TestVm.PageTables | 7);
        for (uint i = 1; i < 256; i++)
        {
            vm.Write64(secondSpace + (i * 8), tables | 7);
        }

        vm.Write64(tables, (tables + 0x1000) | 7);
        vm.Write64(tables + 0x1000, (tables + 0x2000) | 7);
        vm.Write64(tables + 0x2000, (tables + 0x3000) | 7);
        for (uint i = 0; i < 512; i++)
        {
            vm.Write64(tables + 0x3000 + (i * 8), (i << 12) | 7);
        }

        vm.Write64(tables + 0x3000 + ((code + 0x1000) >> 12 << 3), (code + 0x2000) | 7);
        vm.Assemble(code, 64, a => a.jmp(code + 0x1000));
        for (int i = 0; i < 2; i++)
        {
            vm.Assemble((ulong)(code + 0x1000 + (i * 0x1000)), 64, a =>
            {
                a.inc(__dword_ptr[counters + (i * 4)]);
                a.jmp(rbx);
            });
        }

        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            const ulong keep = 1UL << 63;
            var again = a.CreateLabel();
            var first = a.CreateLabel();
            var firstBack = a.CreateLabel();
            var secondBack = a.CreateLabel();
            a.mov(ecx, 255);
            a.Label(ref again);
            a.mov(rax, keep | firstSpace | 1);
            a.mov(cr3, rax);
            a.mov(eax, code);
            a.mov(edx, rounds);
            a.lea(rbx, __[firstBack]);
            a.Label(ref first);
            a.jmp(rax);
            a.Label(ref firstBack);
            a.dec(edx);
            a.jne(first);
            a.mov(rax, keep | secondSpace | 2);
            a.mov(cr3, rax);
            a.lea(rbx, __[secondBack]);
            a.mov(rax, rcx);
            a.shl(rax, 48);
            a.add(rax, code);
            a.jmp(rax);
            a.Label(ref secondBack);
            a.dec(ecx);
            a.jne(again);
            a.hlt();
        });

        vm.Run().Should().Be(ExitKind.Halted);

        vm.State.Gpr[1].Should().Be(0);
        vm.Read32(counters).Should().Be(255 * rounds);
        vm.Read32(counters + 4).Should().Be(255);
    }

    // The kernel notes all that SYSCALL loads and changes the flags that SYSRET returns with; in some rounds these stop
    // generated code or its short way (AC, TF in a mask that leaves it).
    [Theory]
    [InlineData(0x47700UL, false)]
    [InlineData(0x257FD5UL, false)]
    [InlineData(0x40000UL, false)]
    [InlineData(0UL, false)]
    [InlineData(0x47700UL, true)]
    public void Syscall_AndSysret_DoWhatTheInterpreterDoes(ulong mask, bool fiveLevel)
    {
        using TestVm translated = CallKernel(mask, translateAfter: 1, fiveLevel);
        using TestVm interpreted = CallKernel(mask, translateAfter: 0, fiveLevel);
        translated.Memory.SequenceEqual(interpreted.Memory).Should().BeTrue();
        translated.State.Gpr.Should().Equal(interpreted.State.Gpr);
        translated.State.Rip.Should().Be(interpreted.State.Rip);
        translated.State.Rflags.Should().Be(interpreted.State.Rflags);
        translated.State.Segments.Should().Equal(interpreted.State.Segments);
        translated.Read32(0x30000).Should().Be(0, "all rounds were run");
        translated.Cpu.Translator!.Blocks.Should().BePositive();
        bool isShort = (mask & 0x40100) == 0x40100;
        Calls(translated, "handler-syscall").Should().BeInRange(isShort ? 1 : CallRounds, isShort ? 4 : CallRounds);
        Calls(translated, "handler-sysretq").Should().BeInRange(isShort ? 4 : CallRounds, isShort ? 40 : CallRounds);
    }

    private static long Calls(TestVm vm, string name)
    {
        foreach (VmStatistic one in ((IVmStatistics)vm.Vm).ReadStatistics())
        {
            if (one.Name == name)
            {
                return one.Value;
            }
        }

        return 0;
    }

    private static TestVm CallKernel(ulong mask, int translateAfter, bool fiveLevel)
    {
        const int kernel = 0x12000;
        var vm = new TestVm(translateAfter: translateAfter);
        vm.EnterLong(3, fiveLevel);
        vm.Write32(0x30000, CallRounds);
        vm.State.Msrs[0xC0000081] = (8UL << 32) | (0x1BUL << 48);
        vm.State.Msrs[0xC0000082] = kernel;
        vm.State.Msrs[0xC0000084] = mask;
        vm.State.Rflags = 0x202;
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(edi, 0x30100);
            a.mov(rbx, 0x123456789ABCDEFL);
            a.xor(r13d, r13d);
            a.Label(ref loop);
            a.imul(rbx, rbx, 1103515245);
            a.add(rbx, 12345);
            a.add(r13, rbx);
            a.syscall();
            a.pushfq();
            a.pop(__qword_ptr[rdi]);
            a.mov(eax, cs);
            a.mov(__[rdi + 8], eax);
            a.mov(eax, ss);
            a.mov(__[rdi + 12], eax);
            a.add(rdi, 16);
            a.dec(__dword_ptr[0x30000]);
            a.jne(loop);
            a.hlt();
        });
        vm.Assemble(kernel, 64, a =>
        {
            a.mov(__[rdi], rcx);
            a.mov(__[rdi + 8], r11);
            a.pushfq();
            a.pop(__qword_ptr[rdi + 16]);
            a.mov(eax, cs);
            a.mov(__[rdi + 24], eax);
            a.mov(eax, ss);
            a.mov(__[rdi + 28], eax);
            a.add(rdi, 32);

            // Any flags but TF; AC in one round of eight.
            a.mov(rax, rbx);
            a.shr(rax, 20);
            a.mov(rdx, rax);
            a.and(rax, 0x200ED7);
            a.shr(rdx, 24);
            a.and(edx, 7);
            a.cmp(edx, 1);
            a.sbb(edx, edx);
            a.and(edx, 0x40000);
            a.or(rax, rdx);
            a.mov(r11, rax);
            a.cmp(rax, rbx);
            a.sysretq();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        return vm;
    }

    [Fact]
    public void Translation_WhenSwitchedOff_LeavesTheInterpreter()
    {
        using var vm = new TestVm(translateAfter: 0);
        vm.Cpu.Translator.Should().BeNull();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(eax, 7);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[0].Should().Be(7);
    }

    // Collections, signals and faults of managed code on other threads, while the guest adds up the same numbers in a general
    // and in a vector register: it halts when the sums differ. CPUID calls a handler, which saves and loads them.
    [Fact]
    public void RuntimeTorture_WhileTranslatedCodeRuns_LeavesTheGuestAlone()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            var wrong = a.CreateLabel();
            a.Label(ref loop);
            a.inc(r10);
            a.add(r8, r10);
            a.movq(xmm1, r10);
            a.paddq(xmm9, xmm1);
            a.mov(__[0x20000], r10);
            a.cpuid();
            a.movq(r9, xmm9);
            a.cmp(r8, r9);
            a.jne(wrong);
            a.test(r10d, 0xFF);
            a.jne(loop);
            a.mov(rax, r10);
            a.xor(edx, edx);
            a.mov(ecx, 7);
            a.div(rcx);
            a.jmp(loop);
            a.Label(ref wrong);
            a.hlt();
        });
        vm.Cpu.WriteState(vm.State);
        ExitKind kind = ExitKind.Failed;
        var thread = new Thread(() =>
        {
            var exit = default(VcpuExit);
            kind = vm.Cpu.Run(ref exit);
        });
        int signals = 0;
        using PosixSignalRegistration registration = PosixSignalRegistration.Create(
            PosixSignal.SIGCONT, _ => Interlocked.Increment(ref signals));
        thread.Start();
        int faults = 0;
        string? nothing = vm.Bytes == 0 ? string.Empty : null;
        for (int i = 0; i < 200; i++)
        {
            _ = new byte[1 << 16];
            GC.Collect(i % 3);
            try
            {
                faults += nothing!.Length;
            }
            catch (NullReferenceException)
            {
                faults++;
            }

            if (i % 10 == 0)
            {
                using var kill = Process.Start("/bin/sh", ["-c", $"kill -CONT {Environment.ProcessId}"]);
                kill.WaitForExit();
            }
        }

        faults.Should().Be(200);
        SpinWait.SpinUntil(() => Volatile.Read(ref signals) > 0, 10_000).Should().BeTrue();

        vm.Cpu.Kick();
        thread.Join(10_000).Should().BeTrue();
        kind.Should().Be(ExitKind.Interrupted);
        vm.Read64(0x20000).Should().BePositive();
    }
}

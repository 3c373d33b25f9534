// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Iced.Intel;
using Vmm.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests;

/// <summary>Transfers between tasks and levels, and the system instructions that no unit test of a public suite reaches.</summary>
public sealed class SystemInstructionTests
{
    // A leaf that is read again and again is answered in line; those that follow a register never are.
    [Fact]
    public void Cpuid_InTranslatedCode_FollowsTheTableAndTheRegisters()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(r8d, 40);
            a.mov(rsi, cr4);
            a.Label(ref loop);
            a.mov(eax, 0x80000002);
            a.xor(ecx, ecx);
            a.cpuid();
            a.add(r9, rbx);
            a.mov(eax, 0x80000002);
            a.mov(ecx, 5);
            a.cpuid();
            a.add(r9, rbx);
            a.xor(rsi, 1 << 18);
            a.mov(cr4, rsi);
            a.mov(eax, 1);
            a.cpuid();
            a.shr(ecx, 27);
            a.and(ecx, 1);
            a.add(r10, rcx);
            a.mov(eax, 0x80000002);
            a.mov(ecx, 5);
            a.cpuid();
            a.add(r11, rdx);
            a.dec(r8d);
            a.jne(loop);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        CpuidEntry brand = vm.Cpu.FindCpuid(0x80000002, 0);
        vm.State.Gpr[9].Should().Be(80UL * brand.Ebx);
        vm.State.Gpr[10].Should().Be(20, "OSXSAVE is set in every other round");
        vm.State.Gpr[11].Should().Be(40UL * brand.Edx);
    }

    [Fact]
    public void Cpuid_OfOneLeaf_LeavesTranslatedCodeOnce()
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            var loop = a.CreateLabel();
            a.mov(r8d, 50);
            a.Label(ref loop);
            a.xor(eax, eax);
            a.xor(ecx, ecx);
            a.cpuid();
            a.dec(r8d);
            a.jne(loop);
            a.hlt();
        });
        vm.Run().Should().Be(ExitKind.Halted);
        long calls = 0;
        foreach (VmStatistic one in ((IVmStatistics)vm.Vm).ReadStatistics())
        {
            calls += one.Name == "handler-cpuid" ? one.Value : 0;
        }

        calls.Should().BeLessThan(4);
        vm.State.Gpr[0].Should().Be(vm.Cpu.FindCpuid(0, 0).Eax);
        using var hypervisor = new SoftHypervisor(TestCode.Create());
        CpuidEntry[] table = [.. hypervisor.SupportedCpuid];
        int first = Array.FindIndex(table, static entry => entry.Function == 0);
        table[first] = table[first] with { Ebx = 8 };
        vm.Cpu.SetCpuid(table);
        vm.State.Activity = ActivityState.Running;
        vm.State.Rip = TestVm.CodeAt;
        vm.Run().Should().Be(ExitKind.Halted);
        vm.State.Gpr[3].Should().Be(8, "the table is another");
    }

    private const uint OtherTss = 0x94000;
    private const uint OtherCode = 0x20000;
    private const uint OtherStack = 0x30000;
    private const int FirstTask = 0x40;
    private const int SecondTask = 0x48;
    private const int TaskGate = 0x50;
    private const int CallGate = 0x58;

    // SDM 3A 8.3, table 8-1 and 8-2.
    [Theory]
    [InlineData(SecondTask, true)]
    [InlineData(TaskGate, true)]
    [InlineData(SecondTask, false)]
    [InlineData(TaskGate, false)]
    public void TaskSwitch_AndBack_SavesLinksAndMarks(int selector, bool isCall)
    {
        using TestVm vm = TwoTasks();
        vm.Assemble(TestVm.CodeAt, 32, a =>
        {
            a.mov(ebx, 0x1111);
            a.mov(esi, 0x2222);
            Far(a, selector, isCall);
            a.mov(__dword_ptr[0x40000], ebx);
            a.mov(__dword_ptr[0x40004], esi);
            a.mov(__dword_ptr[0x40008], esp);
            a.str(ax);
            a.mov(__dword_ptr[0x4000C], eax);
            a.hlt();
        });
        vm.Assemble(OtherCode, 32, a =>
        {
            a.mov(__dword_ptr[0x40010], ebx);
            a.pushfd();
            a.pop(eax);
            a.mov(__dword_ptr[0x40014], eax);
            a.mov(__dword_ptr[0x40018], esp);
            a.mov(eax, cr0);
            a.mov(__dword_ptr[0x4001C], eax);
            a.mov(al, __byte_ptr[(uint)TestVm.GdtAt + FirstTask + 5]);
            a.mov(ah, __byte_ptr[(uint)TestVm.GdtAt + SecondTask + 5]);
            a.mov(__word_ptr[0x40020], ax);
            if (isCall)
            {
                a.iretd();
            }
            else
            {
                Far(a, FirstTask, isCall);
            }
        });

        vm.Run().Should().Be(ExitKind.Halted);

        vm.Read32(0x40000).Should().Be(0x1111);
        vm.Read32(0x40004).Should().Be(0x2222);
        vm.Read32(0x40008).Should().Be((uint)TestVm.StackTop);
        (vm.Read32(0x4000C) & 0xFFFF).Should().Be(FirstTask);
        vm.Read32(0x40010).Should().Be(0x3333, "registers come from the new task's segment");
        (vm.Read32(0x40014) & 0x4000).Should().Be(isCall ? 0x4000u : 0, "only CALL nests");
        vm.Read32(0x40018).Should().Be(OtherStack);
        (vm.Read32(0x4001C) & 8).Should().Be(8, "a task switch sets CR0.TS");
        (vm.Read32(0x40020) & 0xFFFF).Should().Be(isCall ? 0x8B8Bu : 0x8B89, "CALL leaves both busy, JMP the new one");
        vm.Memory[(int)TestVm.GdtAt + SecondTask + 5].Should().Be(0x89);
        vm.Memory[(int)TestVm.GdtAt + FirstTask + 5].Should().Be(0x8B);
        (vm.Read32(OtherTss) & 0xFFFF).Should().Be(isCall ? (uint)FirstTask : 0, "the link to the caller");
        vm.State.Tr.Base.Should().Be(TestVm.TssAt);
    }

    [Fact]
    public void TaskSwitch_ToABusyTask_RaisesGpWithItsSelector()
    {
        using TestVm vm = TwoTasks();
        vm.Assemble(TestVm.CodeAt, 32, a => Far(a, FirstTask, true));

        vm.Run().Should().Be(ExitKind.Halted);

        vm.State.Rip.Should().Be(0x92000 + 13 + 1);
        vm.Read32(vm.State.Gpr[4]).Should().Be(FirstTask);
        vm.Read32(vm.State.Gpr[4] + 4).Should().Be((uint)TestVm.CodeAt);
    }

    // SDM 3A 5.8.5: the inner stack gets SS, ESP, the parameters, CS and EIP; RET n drops them on both.
    [Fact]
    public void CallGate_ToAnInnerLevel_SwitchesStacksAndCopiesParameters()
    {
        using TestVm vm = TwoTasks();
        vm.Write64(TestVm.GdtAt + CallGate, Gate(OtherCode, 0x18, 0xEC, 2));
        UserSegments(vm);
        vm.State.Gpr[4] = 0x50000;
        vm.Assemble(TestVm.CodeAt, 32, a =>
        {
            a.push(0x1111);
            a.push(0x2222);
            Far(a, CallGate | 3, true);
            a.mov(ebx, esp);
            a.mov(edx, ss);
            a.@int(0x80);
        });
        vm.Write64(TestVm.IdtAt + (0x80 * 8), Gate(0x92080, 0x18, 0xEE, 0));
        vm.Assemble(OtherCode, 32, a =>
        {
            for (int i = 0; i < 6; i++)
            {
                a.mov(eax, __dword_ptr[esp + (i * 4)]);
                a.mov(__dword_ptr[0x40000 + (i * 4)], eax);
            }

            a.mov(eax, esp);
            a.mov(__dword_ptr[0x40018], eax);
            a.retf(8);
        });

        vm.Run().Should().Be(ExitKind.Halted);

        vm.Read32(0x40000).Should().Be((uint)TestVm.CodeAt + 17);
        vm.Read32(0x40004).Should().Be(0x33);
        vm.Read32(0x40008).Should().Be(0x2222);
        vm.Read32(0x4000C).Should().Be(0x1111);
        vm.Read32(0x40010).Should().Be(0x50000 - 8);
        vm.Read32(0x40014).Should().Be(0x23);
        vm.Read32(0x40018).Should().Be(0x9F000 - 24);
        vm.State.Gpr[3].Should().Be(0x50000);
        (vm.State.Gpr[2] & 0xFFFF).Should().Be(0x23);
    }

    // SDM 2B, SYSENTER and SYSEXIT; AMD's processors have both outside long mode only (APM 3).
    [Fact]
    public void SysenterAndSysexit_In32Bits_ChangeLevelAndSegments()
    {
        using TestVm vm = TwoTasks();
        UserSegments(vm);
        vm.State.Msrs[0x174] = 8;
        vm.State.Msrs[0x175] = 0x60000;
        vm.State.Msrs[0x176] = OtherCode;

        // SYSENTER's selectors follow one another: 08 code, 10 stack, 18 and 20 for the way back.
        vm.State.Gpr[4] = 0x50000;
        vm.Assemble(TestVm.CodeAt, 32, a => a.sysenter());
        vm.Assemble(OtherCode, 32, a =>
        {
            a.mov(__dword_ptr[0x40000], esp);
            a.mov(eax, cs);
            a.mov(__dword_ptr[0x40004], eax);
            a.mov(eax, ss);
            a.mov(__dword_ptr[0x40008], eax);
            a.mov(edx, OtherCode + 0x100);
            a.mov(ecx, 0x51000);
            a.sysexit();
        });
        vm.Write64(TestVm.IdtAt + (0x80 * 8), Gate(0x92080, 0x18, 0xEE, 0));
        vm.Assemble(OtherCode + 0x100, 32, a =>
        {
            a.mov(ebx, esp);
            a.mov(esi, cs);
            a.mov(edi, ss);
            a.@int(0x80);
        });

        vm.Run().Should().Be(ExitKind.Halted);

        vm.Read32(0x40000).Should().Be(0x60000);
        (vm.Read32(0x40004) & 0xFFFF).Should().Be(8);
        (vm.Read32(0x40008) & 0xFFFF).Should().Be(0x10);
        vm.State.Rip.Should().Be(0x92081);
        vm.State.Gpr[3].Should().Be(0x51000);
        (vm.State.Gpr[6] & 0xFFFF).Should().Be(8 + 16 + 3);
        (vm.State.Gpr[7] & 0xFFFF).Should().Be(8 + 24 + 3);
    }

    // SDM 2B, MONITOR and MWAIT: hints here, but with their faults.
    [Theory]
    [InlineData(0, 0u, 0xF4)]
    [InlineData(0, 1u, 13)]
    [InlineData(3, 0u, 6)]
    public void MonitorAndMwait_AreHintsWithFaults(int level, uint extensions, int outcome)
    {
        using var vm = new TestVm();
        vm.EnterLong(level);
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(rax, 0x40000UL);
            a.mov(ecx, extensions);
            a.xor(edx, edx);
            a.monitor();
            a.xor(ecx, ecx);
            a.mwait();
            a.hlt();
        });

        vm.Run().Should().Be(ExitKind.Halted);

        if (outcome == 0xF4)
        {
            vm.State.Rip.Should().BeInRange(TestVm.CodeAt + 20, TestVm.CodeAt + 40);
        }
        else
        {
            vm.State.Rip.Should().Be(0x92001 + (uint)outcome);
        }
    }

    // SDM 2A, INVPCID.
    [Theory]
    [InlineData(0UL, 0UL, true)]
    [InlineData(1UL, 0UL, true)]
    [InlineData(2UL, 0UL, true)]
    [InlineData(3UL, 0UL, true)]
    [InlineData(4UL, 0UL, false)]
    [InlineData(0UL, 1UL, false)]
    [InlineData(1UL, 0x1000UL, false)]
    public void Invpcid_OfAType_DropsTranslationsOrRaisesGp(ulong type, ulong pcid, bool isValid)
    {
        using var vm = new TestVm();
        vm.EnterLong();
        vm.Write64(0x40000, pcid);
        vm.Write64(0x40008, 0x200000);
        vm.Write64(0x200000, 0x11);
        vm.Write64(0x300000, 0x33);

        // 200000h by a table of small pages, so that one entry moves.
        vm.Write64(TestVm.PageTables + 0x2000 + 8, 0x85003);
        vm.Write64(0x85000, 0x200003);
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            a.mov(rbx, __qword_ptr[0x200000]);
            a.mov(__qword_ptr[0x85000], 0x300003);
            a.mov(rax, type);
            a.invpcid(rax, __xmmword_ptr[0x40000]);
            a.mov(rcx, __qword_ptr[0x200000]);
            a.hlt();
        });

        vm.Run().Should().Be(ExitKind.Halted);

        vm.State.Gpr[3].Should().Be(0x11);
        if (isValid)
        {
            vm.State.Gpr[1].Should().Be(0x33);
        }
        else
        {
            vm.State.Rip.Should().Be(0x92000 + 13 + 1);
        }
    }

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    public void DirtyLog_TellsEachWriteOnceAndAgainAfterTheNext(int translateAfter)
    {
        using var vm = new TestVm(translateAfter: translateAfter, logDirty: true);
        vm.EnterLong();
        vm.Assemble(TestVm.CodeAt, 64, a =>
        {
            Label again = a.CreateLabel();
            a.Label(ref again);
            a.mov(__qword_ptr[0x40000], rax);
            a.mov(__qword_ptr[0x200FFC], rax);
            a.mov(rbx, __qword_ptr[0x50000]);
            a.hlt();
            a.jmp(again);
        });
        ulong[] log = new ulong[16];
        vm.Run().Should().Be(ExitKind.Halted);
        Written().Should().BeTrue();
        Has(0x50).Should().BeFalse("it was only read");

        Array.Clear(log);
        Written().Should().BeFalse();

        // The translations are cached by now.
        vm.Port.Nmi = false;
        vm.State.Rip = TestVm.CodeAt;
        vm.State.Activity = ActivityState.Running;
        vm.Run().Should().Be(ExitKind.Halted);
        Written().Should().BeTrue();

        bool Written()
        {
            vm.Vm.ReadDirtyLog(0, log).Should().BeTrue();
            Has(0x200).Should().Be(Has(0x40));
            Has(0x201).Should().Be(Has(0x40));
            return Has(0x40);
        }

        bool Has(int page) => (log[page >> 6] >> (page & 63) & 1) != 0;
    }

    // SDM 3B 18.17.3: a write to either register moves both and the counter; the APIC's deadline timer has to know.
    [Theory]
    [InlineData(0x3Bu, 0x7000u)]
    [InlineData(0x10u, 0x12345678u)]
    public void TimeStampCounter_ThatTheGuestSets_IsToldToTheInterruptPort(uint msr, uint value)
    {
        using var vm = new TestVm();
        vm.EnterProtected();
        vm.Assemble(TestVm.CodeAt, 32, a =>
        {
            a.mov(ecx, msr);
            a.mov(eax, value);
            a.xor(edx, edx);
            a.wrmsr();
            a.mov(ecx, 0x3B);
            a.rdmsr();
            a.hlt();
        });

        vm.Run().Should().Be(ExitKind.Halted);

        ulong adjust = vm.State.Gpr[0] | (vm.State.Gpr[2] << 32);
        adjust.Should().NotBe(0);
        vm.Port.TscOffset.Should().Be(adjust, "the counter started at guest time");
    }

    private static TestVm TwoTasks()
    {
        var vm = new TestVm();
        vm.EnterProtected();
        vm.Write64(TestVm.GdtAt + FirstTask, 0x00008B0000000067 | ((TestVm.TssAt & 0xFFFFFF) << 16));
        vm.Write64(TestVm.GdtAt + SecondTask, 0x0000890000000067 | ((ulong)OtherTss << 16));
        vm.Write64(TestVm.GdtAt + TaskGate, Gate(0, SecondTask, 0x85, 0));
        vm.State.Tr = new SegmentState { Selector = FirstTask, Base = TestVm.TssAt, Limit = 0x67, Rights = 0x8B };
        vm.State.Ldtr = new SegmentState { Rights = 0x10000 };
        vm.Write32(TestVm.TssAt + 4, 0x9F000);
        vm.Write32(TestVm.TssAt + 8, 0x10);
        vm.Write32(OtherTss + 0x20, OtherCode);
        vm.Write32(OtherTss + 0x24, 2);
        vm.Write32(OtherTss + 0x34, 0x3333);
        vm.Write32(OtherTss + 0x38, OtherStack);
        for (uint i = 0; i < 6; i++)
        {
            vm.Write32(OtherTss + 0x48 + (i * 4), i == 1 ? 0x18u : 0x10);
        }

        return vm;
    }

    private static void UserSegments(TestVm vm)
    {
        for (int i = 0; i < 6; i++)
        {
            vm.State.Segments[i] = new SegmentState { Selector = 0x23, Limit = uint.MaxValue, Rights = 0xC0F3 };
        }

        vm.State.Segments[1] = new SegmentState { Selector = 0x33, Limit = uint.MaxValue, Rights = 0xC0FB };
    }

    private static ulong Gate(uint offset, uint selector, uint rights, uint count) =>
        (offset & 0xFFFF) | ((ulong)selector << 16) | ((ulong)count << 32) | ((ulong)rights << 40) |
        ((ulong)(offset >> 16) << 48);

    // CALL or JMP ptr16:32.
    private static void Far(Assembler a, int selector, bool isCall) =>
        a.db(isCall ? (byte)0x9A : (byte)0xEA, 0, 0, 0, 0, (byte)selector, 0);
}

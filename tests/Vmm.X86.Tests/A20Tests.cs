// SPDX-License-Identifier: BSD-2-Clause
using FluentAssertions;
using Iced.Intel;
using Vmm.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests;

/// <summary>The A20 gate: address line 20 of the processors' bus.</summary>
public sealed class A20Tests
{
    private const int GatePort = 0x92;

    [Fact]
    public void RealMode_BehindOneMegabyte_WrapsWhileTheGateIsClosed()
    {
        using TestVm vm = MakeVm();
        vm.EnterReal();
        vm.Memory[0] = 0x11;
        vm.Memory[0x100000] = 0x22;
        vm.Assemble(TestVm.CodeAt, 16, a =>
        {
            a.mov(ax, 0xFFFF);
            a.mov(ds, ax);
            a.mov(bl, __[0x10]);
            Gate(a, false);
            a.mov(bh, __[0x10]);
            a.mov(__byte_ptr[0x11], 0x33);
            Gate(a, true);
            a.mov(cl, __[0x10]);
            a.mov(__byte_ptr[0x12], 0x44);
            a.hlt();
        });

        vm.Run().Should().Be(ExitKind.Halted);

        (vm.State.Gpr[3] & 0xFFFF).Should().Be(0x1122);
        (vm.State.Gpr[1] & 0xFF).Should().Be(0x22);
        vm.Memory[..3].ToArray().Should().Equal(0x11, 0x33, 0);
        vm.Memory.Slice(0x100000, 3).ToArray().Should().Equal(0x22, 0, 0x44);
    }

    [Fact]
    public void Code_BehindOneMegabyte_IsFetchedThroughTheGate()
    {
        using TestVm vm = MakeVm();
        vm.EnterReal();
        vm.Assemble(0x10, 16, Routine(0x11));
        vm.Assemble(0x100010, 16, Routine(0x22));
        vm.Assemble(TestVm.CodeAt, 16, a =>
        {
            // FFFF:0020 is 100010h.
            Label call = a.CreateLabel();
            a.xor(bx, bx);
            foreach (bool isOpen in (bool[])[true, false, true, false])
            {
                Gate(a, isOpen);
                a.call(call);
            }

            a.hlt();
            a.Label(ref call);
            a.db(0xEA, 0x20, 0x00, 0xFF, 0xFF);
        });

        // Where the routines jump back to.
        vm.Assemble(TestVm.CodeAt + 0x200, 16, a => a.ret());

        vm.Run().Should().Be(ExitKind.Halted);

        (vm.State.Gpr[3] & 0xFFFF).Should().Be(0x66);
        (vm.State.Gpr[1] & 0xFFFF).Should().Be(4);
    }

    [Fact]
    public void PageTables_AtAnOddMegabyte_AreReadThroughTheGate()
    {
        using TestVm vm = MakeVm();
        vm.EnterProtected();

        // The directory at 81000h identically by 4 MiB pages; its entry for 4 MiB leads to a table that the gate decides on.
        vm.Write32(0x81000, 0x83);
        vm.Write32(0x81004, 0x182003);
        vm.Write32(0x182000, 0x20003);
        vm.Write32(0x82000, 0x30003);
        vm.Write32(0x20000, 0x11);
        vm.Write32(0x30000, 0x22);
        vm.State.Cr0 |= 0x80000000;
        vm.State.Cr3 = 0x81000;
        vm.State.Cr4 |= 0x10;
        vm.Assemble(TestVm.CodeAt, 32, a =>
        {
            a.mov(ebx, __dword_ptr[0x400000]);
            Gate(a, false);
            a.mov(ecx, __dword_ptr[0x400000]);
            Gate(a, true);
            a.mov(edx, __dword_ptr[0x400000]);
            a.hlt();
        });

        vm.Run().Should().Be(ExitKind.Halted);

        vm.State.Gpr[3].Should().Be(0x11);
        vm.State.Gpr[1].Should().Be(0x22);
        vm.State.Gpr[2].Should().Be(0x11);
    }

    private static System.Action<Assembler> Routine(byte value) => a =>
    {
        a.add(bx, (short)value);
        a.inc(cx);
        a.db(0xEA, 0x00, 0x02, 0x00, 0x10);
    };

    private static void Gate(Assembler a, bool isOpen)
    {
        a.mov(al, (sbyte)(isOpen ? 2 : 0));
        a.@out(0x92, al);
    }

    private static TestVm MakeVm()
    {
        var vm = new TestVm();
        vm.Ports.Map(GatePort, new GateWindow(vm));
        return vm;
    }

    private sealed class GateWindow(TestVm vm) : IRegisterWindow
    {
        public uint Length => 1;

        public ulong Read(uint offset, AccessWidth width) => 0;

        public void Write(uint offset, AccessWidth width, ulong value) => vm.Vm.SetA20((value & 2) != 0);
    }
}

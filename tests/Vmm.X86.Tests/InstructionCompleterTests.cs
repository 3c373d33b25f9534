// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Linq;
using FluentAssertions;
using Vmm.Core;
using Vmm.Host;
using Vmm.Memory;
using Vmm.TestKit;
using Xunit;

namespace Vmm.X86.Tests;

/// <summary>Single instructions for another driver, in 64-bit mode with the first 2 MiB mapped to themselves.</summary>
public sealed class InstructionCompleterTests : IDisposable
{
    private const ulong CodeAddress = 0x1000;
    private const ulong Operand = 0x5000;
    private readonly RamBlock _memory = HeapBuffer.MakeBlock("ram", 1 << 20);
    private readonly CodeMemory _code = CodeMemory.TryCreate(SoftHypervisor.CodeMemoryBytes, out _)!;

    [Fact]
    public void Cmpxchg16b_WithLock_IsExecutedAndNamed()
    {
        Write(Operand, BitConverter.GetBytes(1UL));
        CpuState state = Start([0xF0, 0x48, 0x0F, 0xC7, 0x0F]);
        state.Gpr[0] = 1;
        state.Gpr[3] = 7;

        using InstructionCompleter completer = Make(null);
        completer.Complete(state).Should().Be(CompletionOutcome.Executed);

        completer.LastMnemonic.Should().Be("cmpxchg16b");
        state.Rip.Should().Be(CodeAddress + 5);
        (state.Rflags & 0x40).Should().Be(0x40);
        var stored = new byte[8];
        Read(Operand, stored);
        BitConverter.ToUInt64(stored).Should().Be(7);
    }

    [Fact]
    public void Complete_Again_AllocatesNothing()
    {
        CpuState state = Start([0xF0, 0x48, 0x0F, 0xC7, 0x0F]);
        using InstructionCompleter completer = Make(null);
        completer.Complete(state);
        state.Rip = CodeAddress;
        completer.Complete(state);
        long before = GC.GetAllocatedBytesForCurrentThread();
        for (int i = 0; i < 100; i++)
        {
            state.Rip = CodeAddress;
            completer.Complete(state);
        }

        (GC.GetAllocatedBytesForCurrentThread() - before).Should().Be(0);
    }

    // A hypervisor that does not trap CPUID shows the guest more than it was told to.
    [Fact]
    public void Instruction_ThatCpuidHides_IsExecuted()
    {
        CpuState state = Start([0xF3, 0x0F, 0xB8, 0xC1]);
        state.Gpr[1] = 0xFF;

        using InstructionCompleter completer = Make(entry => entry.Function == 1 ? entry with { Ecx = 0 } : entry);
        completer.Complete(state).Should().Be(CompletionOutcome.Executed);

        completer.LastMnemonic.Should().Be("popcnt");
        state.Gpr[0].Should().Be(8);
    }

    [Fact]
    public void Xsave_OfStateThatIsNotCarried_ChangesNothing()
    {
        CpuState state = Start([0x48, 0x0F, 0xAE, 0x27]);
        state.Xcr0 = 0xE7;
        state.Gpr[0] = 0xE7;
        Write(Operand, Enumerable.Repeat((byte)0x5A, 1024).ToArray());

        using InstructionCompleter completer = Make(null);
        completer.Complete(state).Should().Be(CompletionOutcome.Unsupported);

        var after = new byte[1024];
        Read(Operand, after);
        after.Should().AllBeEquivalentTo((byte)0x5A);
        state.Rip.Should().Be(CodeAddress);
    }

    [Fact]
    public void OtherInstruction_LeavesForeignStateAsItWas()
    {
        CpuState state = Start([0x90]);
        state.Xcr0 = 0xE7;
        BitConverter.TryWriteBytes(state.Xsave.AsSpan(512), 0xE3UL);
        state.Xsave.AsSpan(832, 64).Fill(0xA5);

        using InstructionCompleter completer = Make(null);
        completer.Complete(state).Should().Be(CompletionOutcome.Executed);

        state.Xcr0.Should().Be(0xE7);
        (BitConverter.ToUInt64(state.Xsave, 512) & 0xE0).Should().Be(0xE0);
        state.Xsave[832..896].Should().AllBeEquivalentTo((byte)0xA5);
    }

    // A driver may need this thousands of times a second.
    [Fact]
    public void LastMnemonic_OfAnInstructionSeenBefore_IsNoNewString()
    {
        CpuState state = Start([0x90, 0x90]);
        using InstructionCompleter completer = Make(null);
        completer.Complete(state);
        string first = completer.LastMnemonic;

        completer.Complete(state);

        completer.LastMnemonic.Should().Be("nop").And.BeSameAs(first);
    }

    public void Dispose()
    {
        _memory.Dispose();
        _code.Dispose();
    }

    private void Write(ulong address, byte[] bytes) => _memory.TryWrite(address, bytes, out _).Should().BeTrue();

    private void Read(ulong address, byte[] into) => _memory.TryRead(address, into).Should().BeTrue();

    private CpuState Start(byte[] code)
    {
        Write(CodeAddress, code);
        Write(0x2000, BitConverter.GetBytes(0x3003UL));
        Write(0x3000, BitConverter.GetBytes(0x4003UL));
        Write(0x4000, BitConverter.GetBytes(0x83UL));
        var state = new CpuState
        {
            Cr0 = 0x80050033,
            Cr3 = 0x2000,
            Cr4 = 0x40620,
            Efer = 0xD01,
            Xcr0 = 7,
            Rip = CodeAddress,
            Rflags = 2,
        };
        state.Gpr[7] = Operand;
        for (int i = 0; i < 6; i++)
        {
            state.Segments[i] = new SegmentState { Selector = 8, Limit = uint.MaxValue, Rights = i == 1 ? 0xA09Bu : 0xC093 };
        }

        return state;
    }

    private InstructionCompleter Make(Func<CpuidEntry, CpuidEntry>? change)
    {
        using var hypervisor = new SoftHypervisor(_code);
        IEnumerable<CpuidEntry> cpuid = hypervisor.SupportedCpuid.Select(change ?? (static entry => entry));
        var completer = new InstructionCompleter(
            new VmOptions
            {
                Ports = new AddressMap("io", 0x10000),
                Mmio = new AddressMap("mmio", 0),
                Clock = new Still(),
                Irqchip = IrqchipMode.User,
            },
            cpuid.ToArray(),
            _code);
        completer.SetMemorySlot(0, new MemorySlot(0, 1 << 20, _memory.HostAddress, false, false, _memory.PageFlagsAddress));
        return completer;
    }

    private sealed class Still : IClock
    {
        public long NowNs => 1;

        public long UnixTimeNs => 1;

        public IGuestTimer CreateTimer(string name, Action onExpire) => throw new NotSupportedException();
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using Iced.Intel;
using Vmm.Core;
using Vmm.Host;
using Vmm.TestKit;

namespace Vmm.X86.Tests;

/// <summary>
/// One processor in flat 32-bit protected mode (or real mode) without paging, whose vector instructions are bound and
/// called directly: for what user-level comparison with the host cannot reach, such as CR0 and CR4.
/// </summary>
internal sealed unsafe class VectorBench : IDisposable
{
    private const int RamBytes = 0x10000;
    private readonly CodeMemory _code;
    private readonly SoftHypervisor _hypervisor;
    private readonly IVm _vm;
    private readonly SoftVcpu _vcpu;

    public VectorBench(ulong cr0 = 0x33, ulong cr4 = 0x40600, ulong xcr0 = 7)
    {
        _code = CodeMemory.TryCreate(1 << 20, out string? reason) ?? throw new InvalidOperationException(reason);
        _hypervisor = new SoftHypervisor(_code);
        Ram = (byte*)NativeMemory.AlignedAlloc(RamBytes, 4096);
        NativeMemory.Clear(Ram, RamBytes);
        _vm = _hypervisor.CreateVm(new VmOptions
        {
            Ports = new AddressMap("io", 0x10000),
            Mmio = new AddressMap("mmio", 0),
            Clock = new ManualClock(),
            OnNumericError = () => NumericErrors++,
        });
        _vm.SetMemorySlot(0, new MemorySlot(0, RamBytes, (nint)Ram, false, false, 0));
        _vcpu = (SoftVcpu)_vm.CreateVcpu(0, new QuietInterruptPort());
        var state = new CpuState { Rflags = 2, Cr0 = cr0, Cr4 = cr4, Xcr0 = xcr0, ApicBase = 0xFEE00900 };
        bool isReal = (cr0 & 1) == 0;
        for (int i = 0; i < 6; i++)
        {
            state.Segments[i] = new SegmentState
            {
                Selector = (ushort)(isReal ? 0 : 0x10),
                Limit = isReal ? 0xFFFFu : uint.MaxValue,
                Rights = isReal ? 0x93u : 0xC093,
            };
        }

        state.Segments[1] = state.Segments[1] with { Rights = isReal ? 0x93u : 0xC09B };
        state.Xsave[0] = 0x7F;
        state.Xsave[1] = 3;
        state.Xsave[24] = 0x80;
        state.Xsave[25] = 0x1F;
        state.Xsave[512] = 7;
        _vcpu.WriteState(state);
    }

    public byte* Ram { get; }

    public CpuContext* Cpu => _vcpu.Context;

    /// <summary>How often FERR# was driven.</summary>
    public int NumericErrors { get; private set; }

    /// <summary>The vector that <see cref="Run"/> raised, or -1.</summary>
    public int Vector { get; private set; }

    /// <summary>Executes one instruction; register operands and [disp32] memory operands only.</summary>
    public Status Run(params byte[] code)
    {
        bool isReal = Cpu->Mode <= ProcessorMode.Virtual8086;
        var decoder = Decoder.Create(isReal ? 16 : 32, code);
        decoder.Decode(out Instruction instruction);
        Insn insn = default;
        insn.Code = (ushort)instruction.Code;
        insn.Length = (byte)instruction.Length;
        insn.Base = CpuContext.ZeroOffset;
        insn.Index = CpuContext.ZeroOffset;
        insn.SegmentBase = CpuContext.ZeroOffset;
        insn.AddressMask = uint.MaxValue;
        insn.Displacement = instruction.MemoryDisplacement32;
        Cpu->BlockRip = 0x1234;
        if (!Vectors.TryBind(_vcpu, instruction, code, &insn))
        {
            throw new InvalidOperationException($"not a vector instruction: {instruction}");
        }

        Status status = insn.Handler(Cpu, &insn);
        Vector = status == Status.Fault ? Cpu->Fault.Vector : -1;
        return status;
    }

    public void Dispose()
    {
        _vcpu.Dispose();
        _vm.Dispose();
        _hypervisor.Dispose();
        _code.Dispose();
        NativeMemory.AlignedFree(Ram);
    }
}

/// <summary>An interrupt port that never has anything.</summary>
internal sealed class QuietInterruptPort : ICpuInterruptPort
{
    public bool HasInterrupt => false;

    public bool HasNmi => false;

    public bool HasInit => false;

    public bool HasStartup => false;

    public byte Cr8 { get; set; }

    public ulong ApicBase { get; set; } = 0xFEE00900;

    public bool IsMemoryMapped => false;

    public IRegisterWindow Registers => throw new NotSupportedException();

    public int Acknowledge() => -1;

    public bool TakeNmi() => false;

    public bool TakeInit() => false;

    public bool TakeStartup(out byte vector)
    {
        vector = 0;
        return false;
    }

    public bool TryReadMsr(uint msr, out ulong value)
    {
        value = 0;
        return false;
    }

    public bool TryWriteMsr(uint msr, ulong value) => false;

    public void SetTscOffset(ulong ticks)
    {
    }

    public void Attach(ICpuWaker waker)
    {
    }
}

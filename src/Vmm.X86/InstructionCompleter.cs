// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Iced.Intel;
using Vmm.Core;

namespace Vmm.X86;

/// <summary>What came of <see cref="InstructionCompleter.Complete"/>.</summary>
public enum CompletionOutcome
{
    /// <summary>The instruction is done; the state is the one behind it.</summary>
    Executed,

    /// <summary>
    /// It faults: nothing but CR2, DR6 and accessed bits changed, and the exception stands in the state's Event fields for
    /// the driver to inject.
    /// </summary>
    Exception,

    /// <summary>HLT: the state stands behind it, with the activity set.</summary>
    Halted,

    /// <summary>The processor would shut down.</summary>
    Shutdown,

    /// <summary>
    /// It moves state components that this processor does not carry (AVX-512 and beyond, named by XCR0). Nothing changed:
    /// half a register file saved would be lost data.
    /// </summary>
    Unsupported,
}

/// <summary>
/// Executes single instructions for another driver that cannot (KVM_EXIT_INTERNAL_ERROR with the emulation suberror). It
/// is a software processor of its own over the same memory and address maps, with nothing cached between two calls
/// because the other driver's vCPUs write memory without telling. One thread at a time.
/// <para>
/// What CPUID hides is executed all the same: the guest has run on a host processor that does not ask CPUID either, so an
/// instruction that reaches this class is one that the host would have executed.
/// </para>
/// </summary>
public sealed unsafe class InstructionCompleter : IDisposable
{
    private readonly SoftHypervisor _hypervisor;
    private readonly SoftVm _vm;
    private readonly SoftVcpu _vcpu;
    private readonly Dictionary<Mnemonic, string> _names = []; // what a guest needs completed is a handful

    /// <summary>Makes one.</summary>
    /// <param name="options">The machine's address maps and clock.</param>
    /// <param name="cpuid">What the guest's CPUID shows.</param>
    /// <param name="code">Memory for vector instructions, see <see cref="SoftHypervisor"/>; the caller disposes it.</param>
    /// <param name="interrupts">
    /// The vCPU's interrupt port, or null when its local APIC belongs to the other driver: the APIC page then is like any
    /// other device memory.
    /// </param>
    public InstructionCompleter(
        VmOptions options, IReadOnlyList<CpuidEntry> cpuid, ICodeMemory? code, ICpuInterruptPort? interrupts = null)
    {
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(cpuid);
        _hypervisor = new SoftHypervisor(code);
        _vm = (SoftVm)_hypervisor.CreateVm(options with { Irqchip = IrqchipMode.User });
        _vcpu = (SoftVcpu)_vm.CreateVcpu(0, interrupts ?? new NoPort());
        _vcpu.CachesCode = false;
        _vcpu.OffersAll = true;
        _vcpu.SetCpuid([.. cpuid]);
    }

    /// <summary>What the last <see cref="Complete"/> executed, as assemblers spell it: "cmpxchg16b"; empty when it could not be fetched.</summary>
    public string LastMnemonic { get; private set; } = string.Empty;

    /// <summary>Mirrors <see cref="IVm.SetMemorySlot"/> of the other driver. Not during <see cref="Complete"/>.</summary>
    public void SetMemorySlot(int slot, in MemorySlot memory) => _vm.SetMemorySlot(slot, memory);

    /// <summary>Executes the instruction at RIP.</summary>
    /// <param name="state">In: the vCPU's state. Out: its state afterwards.</param>
    /// <returns>What happened. Never throws on anything that a guest can cause.</returns>
    public CompletionOutcome Complete(CpuState state)
    {
        ArgumentNullException.ThrowIfNull(state);
        CpuContext* cpu = _vcpu.Context;
        ulong foreignXcr0 = state.Xcr0 & ~XsaveState.Supported;
        ulong foreignPresent = BitConverter.ToUInt64(state.Xsave, XsaveLayout.XstateBv) & ~XsaveState.Supported;
        _vcpu.RefusesComponents = foreignXcr0 != 0;
        _vcpu.WriteState(state);
        cpu->CurrentBlock = null;
        DevicePort.Leave(cpu);
        Status status = _vcpu.Step(cpu, out bool faulted);
        DevicePort.Enter(cpu);
        Block* block = cpu->CurrentBlock;
        LastMnemonic = block == null ? string.Empty : Name(((Code)block->First->Code).Mnemonic());
        if (_vcpu.RefusesComponents && block != null && XsaveUnit.MovesComponents((Code)block->First->Code))
        {
            return CompletionOutcome.Unsupported;
        }

        FaultInfo fault = cpu->Fault;
        if (status == Status.Halt)
        {
            cpu->Activity = (int)ActivityState.Halted;
        }

        if (faulted && fault.Vector == Vector.PageFault)
        {
            cpu->Cr2 = fault.Address;
        }
        else if (faulted && fault.Vector == Vector.Debug)
        {
            cpu->Dr6 |= fault.Address;
        }

        // Components that only the other driver knows stay as they are, bytes and presence.
        _vcpu.ReadState(state);
        state.Xcr0 |= foreignXcr0;
        ulong present = BitConverter.ToUInt64(state.Xsave, XsaveLayout.XstateBv) | foreignPresent;
        BitConverter.TryWriteBytes(state.Xsave.AsSpan(XsaveLayout.XstateBv), present);
        if (faulted)
        {
            state.EventPending = true;
            state.EventVector = fault.Vector;
            state.EventType = 3;
            state.EventHasErrorCode = fault.HasErrorCode;
            state.EventErrorCode = fault.ErrorCode;
            return CompletionOutcome.Exception;
        }

        return status switch
        {
            Status.Halt => CompletionOutcome.Halted,
            Status.Shutdown => CompletionOutcome.Shutdown,
            _ => CompletionOutcome.Executed,
        };
    }

    /// <summary>Frees everything; guest memory and the address maps stay the caller's.</summary>
    public void Dispose()
    {
        _vm.Dispose();
        _hypervisor.Dispose();
    }

    private string Name(Mnemonic mnemonic)
    {
        if (!_names.TryGetValue(mnemonic, out string? name))
        {
            name = mnemonic.ToString().ToLowerInvariant();
            _names.Add(mnemonic, name);
        }

        return name;
    }

    // Stands for a local APIC that the other driver owns.
    private sealed class NoPort : ICpuInterruptPort, IRegisterWindow
    {
        public bool HasInterrupt => false;

        public bool HasNmi => false;

        public bool HasInit => false;

        public bool HasStartup => false;

        public byte Cr8 { get; set; }

        public ulong ApicBase { get; set; }

        public bool IsMemoryMapped => false;

        public IRegisterWindow Registers => this;

        public uint Length => 4096;

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
            value = ApicBase;
            return msr == Msrs.ApicBase;
        }

        public bool TryWriteMsr(uint msr, ulong value) => false;

        public void SetTscOffset(ulong ticks)
        {
        }

        public void Attach(ICpuWaker waker)
        {
        }

        public ulong Read(uint offset, AccessWidth width) => ulong.MaxValue;

        public void Write(uint offset, AccessWidth width, ulong value)
        {
        }
    }
}

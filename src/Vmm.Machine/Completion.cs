// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Concurrent;
using System.Collections.Generic;
using Vmm.Core;
using Vmm.Host;
using Vmm.X86;

namespace Vmm.Machine;

// Theory. Where a driver meets an instruction that it cannot execute, the software processor executes that one on the
// vCPU's state and the driver goes on. Each vCPU has its own software processor for this, made when it is first needed:
// most machines never do. It sees the same memory, so it keeps a copy of the slot table and renews it when the machine
// has changed its own; what it reads and writes are only registers, because everything else of the vCPU (time, its local
// APIC) lives on meanwhile.
//
// Called on the vCPU's own thread, so nothing here is locked except the counts, which others read.

/// <summary>Lets the software CPU execute what a driver cannot (the plan's "completion").</summary>
internal sealed class Completion : ICompleter, IDisposable
{
    private readonly MemorySlots _slots;
    private readonly VmOptions _options;
    private readonly Func<int, CpuidEntry[]> _cpuid;
    private readonly IReadOnlyList<ICpuInterruptPort> _ports;
    private readonly Helper?[] _helpers;
    private readonly ConcurrentDictionary<string, long> _counts = new(StringComparer.Ordinal);

    /// <summary>Makes one.</summary>
    /// <param name="slots">The machine's memory.</param>
    /// <param name="options">Its address maps and clock.</param>
    /// <param name="cpuid">What a vCPU's CPUID shows.</param>
    /// <param name="ports">The vCPUs' interrupt ports in User mode; empty otherwise.</param>
    /// <param name="cpus">Number of vCPUs.</param>
    public Completion(
        MemorySlots slots,
        VmOptions options,
        Func<int, CpuidEntry[]> cpuid,
        IReadOnlyList<ICpuInterruptPort> ports,
        int cpus)
    {
        _slots = slots;
        _options = options;
        _cpuid = cpuid;
        _ports = ports;
        _helpers = new Helper?[cpus];
    }

    /// <inheritdoc/>
    public IReadOnlyDictionary<string, long> Counts => _counts;

    /// <inheritdoc/>
    public bool TryComplete(IVcpu vcpu, in VcpuExit exit, out string failure)
    {
        Helper helper = _helpers[vcpu.Index] ??= new Helper(
            _options, _cpuid(vcpu.Index), vcpu.Index < _ports.Count ? _ports[vcpu.Index] : null);
        helper.Follow(_slots.Current);
        CpuState state = helper.State;
        vcpu.ReadRegisters(state);
        ulong rip = state.Rip;
        CompletionOutcome outcome = helper.Completer.Complete(state);
        _counts.AddOrUpdate(helper.Completer.LastMnemonic, 1, static (_, count) => count + 1);
        if (outcome == CompletionOutcome.Shutdown)
        {
            failure = $"the instruction at 0x{rip:x} shuts the processor down";
            return false;
        }

        if (outcome == CompletionOutcome.Unsupported)
        {
            failure = $"{helper.Completer.LastMnemonic} at 0x{rip:x} moves state that the software CPU does not carry (XCR0 is 0x{state.Xcr0:x})";
            return false;
        }

        vcpu.WriteRegisters(state);
        failure = string.Empty;
        return true;
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        foreach (Helper? helper in _helpers)
        {
            helper?.Dispose();
        }
    }

    private sealed class Helper : IDisposable
    {
        private readonly CodeMemory? _code;
        private MemorySlots.Table? _known;
        private int _slotCount;

        internal Helper(VmOptions options, CpuidEntry[] cpuid, ICpuInterruptPort? port)
        {
            _code = CodeMemory.TryCreate(SoftHypervisor.CodeMemoryBytes, out _);
            Completer = new InstructionCompleter(options, cpuid, _code, port);
        }

        internal InstructionCompleter Completer { get; }

        internal CpuState State { get; } = new();

        public void Dispose()
        {
            Completer.Dispose();
            _code?.Dispose();
        }

        internal void Follow(MemorySlots.Table table)
        {
            if (ReferenceEquals(table, _known))
            {
                return;
            }

            for (int i = 0; i < _slotCount; i++)
            {
                Completer.SetMemorySlot(i, default);
            }

            _slotCount = 0;
            foreach (MemorySlot slot in table.Slots)
            {
                Completer.SetMemorySlot(_slotCount++, slot);
            }

            _known = table;
        }
    }
}

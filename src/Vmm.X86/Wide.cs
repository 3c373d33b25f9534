// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.X86;

/// <summary>
/// CMPXCHG16B. The runtime offers no 128-bit atomic, so the host's own instruction runs in a routine of generated code;
/// where the host forbids generated code, CPUID does not offer CMPXCHG16B.
/// </summary>
internal static unsafe class Wide
{
    /// <summary>
    /// void routine(void* at, ulong values[4]): RDI, RSI. The values are expected low, high, desired low, high; the
    /// first two become what memory held.
    /// </summary>
    public static ReadOnlySpan<byte> Routine =>
    [
        0x53,                           // push rbx
        0x48, 0x8B, 0x06,               // mov rax, [rsi]
        0x48, 0x8B, 0x56, 0x08,         // mov rdx, [rsi+8]
        0x48, 0x8B, 0x5E, 0x10,         // mov rbx, [rsi+16]
        0x48, 0x8B, 0x4E, 0x18,         // mov rcx, [rsi+24]
        0xF0, 0x48, 0x0F, 0xC7, 0x0F,   // lock cmpxchg16b [rdi]
        0x48, 0x89, 0x06,               // mov [rsi], rax
        0x48, 0x89, 0x56, 0x08,         // mov [rsi+8], rdx
        0x5B,                           // pop rbx
        0xC3,                           // ret
    ];

    /// <summary>Compares and exchanges; answers what memory held.</summary>
    public static UInt128 CompareExchange(CpuContext* cpu, byte* at, UInt128 desired, UInt128 expected)
    {
        ulong* values = stackalloc ulong[4];
        values[0] = (ulong)expected;
        values[1] = (ulong)(expected >> 64);
        values[2] = (ulong)desired;
        values[3] = (ulong)(desired >> 64);
        var routine = (delegate* unmanaged<byte*, ulong*, void>)cpu->Shared->CompareExchange16;
        routine(at, values);
        return new UInt128(values[1], values[0]);
    }
}

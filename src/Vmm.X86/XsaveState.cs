// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.X86;

/// <summary>The XSAVE-managed state in the context: initial values and the in-use test.</summary>
internal static unsafe class XsaveState
{
    /// <summary>x87.</summary>
    public const ulong X87 = 1;

    /// <summary>XMM registers and MXCSR.</summary>
    public const ulong Sse = 2;

    /// <summary>Upper halves of YMM.</summary>
    public const ulong Avx = 4;

    /// <summary>PKRU.</summary>
    public const ulong Pkru = 1UL << 9;

    /// <summary>What XCR0 may hold.</summary>
    public const ulong Supported = X87 | Sse | Avx | Pkru;

    /// <summary>Offset and size of the upper YMM halves.</summary>
    public const int AvxOffset = 576;

    private const int XmmOffset = 160;

    /// <summary>Writes the initial values of components that <paramref name="present"/> says are initial.</summary>
    public static void Normalise(CpuContext* cpu, ulong present)
    {
        if ((present & X87) == 0)
        {
            InitialX87(cpu);
        }

        if ((present & Sse) == 0)
        {
            new Span<byte>(cpu->Xsave + XmmOffset, 256).Clear();
            if ((present & Avx) == 0)
            {
                cpu->Mxcsr = 0x1F80;
            }
        }

        if ((present & Avx) == 0)
        {
            new Span<byte>(cpu->Xsave + AvxOffset, 256).Clear();
        }

        // What the host's FXRSTOR and LDMXCSR would refuse or trap on must never be in the context.
        cpu->Mxcsr &= 0xFFFF;
        Vmm.X86.X87.UpdateSummary(cpu);
    }

    /// <summary>x87 state as after FNINIT with all registers zero.</summary>
    public static void InitialX87(CpuContext* cpu)
    {
        uint mxcsr = cpu->Mxcsr;
        // SAFETY: MXCSR_MASK lies at 28 of the context's area of 4096 bytes.
        uint mask = *(uint*)(cpu->Xsave + 28);
        new Span<byte>(cpu->Xsave, XmmOffset).Clear();
        cpu->Mxcsr = mxcsr;
        *(uint*)(cpu->Xsave + 28) = mask;
        cpu->Fcw = 0x37F;
    }

    /// <summary>XINUSE: the components that are not in their initial state (of x87, SSE and AVX).</summary>
    public static ulong InUse(CpuContext* cpu)
    {
        ulong inUse = 0;
        var area = new ReadOnlySpan<byte>(cpu->Xsave, 4096);
        bool x87 = cpu->Fcw != 0x37F || area.Slice(2, 22).IndexOfAnyExcept((byte)0) >= 0 ||
            area.Slice(32, 128).IndexOfAnyExcept((byte)0) >= 0;
        inUse |= x87 ? X87 : 0;
        bool sse = cpu->Mxcsr != 0x1F80 || area.Slice(XmmOffset, 256).IndexOfAnyExcept((byte)0) >= 0;
        inUse |= sse ? Sse : 0;
        inUse |= area.Slice(AvxOffset, 256).IndexOfAnyExcept((byte)0) >= 0 ? Avx : 0;
        return inUse;
    }
}

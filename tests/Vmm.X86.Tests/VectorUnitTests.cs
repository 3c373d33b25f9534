// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Xunit;

namespace Vmm.X86.Tests;

/// <summary>System-level behaviour of x87, MMX, SSE and AVX: SDM 3A 2.5, 13.1 and table 6-2; SDM 1 8.1, 8.6, 13.</summary>
public sealed unsafe class VectorUnitTests
{
    private static readonly byte[] s_addps = [0x0F, 0x58, 0xC1];
    private static readonly byte[] s_vaddps = [0xC5, 0xF0, 0x58, 0xC2];
    private static readonly byte[] s_paddb = [0x0F, 0xFC, 0xC1];
    private static readonly byte[] s_fld1 = [0xD9, 0xE8];
    private static readonly byte[] s_fwait = [0x9B];

    // CR0: PE 1, MP 2, EM 4, TS 8, NE 20h. CR4: OSFXSR 200h, OSXSAVE 40000h.
    [Theory]
    [InlineData(0x33UL, 0x40600UL, 7UL, -1, -1, -1, -1, -1)]
    [InlineData(0x3BUL, 0x40600UL, 7UL, 7, 7, 7, 7, 7)] // TS and MP
    [InlineData(0x39UL, 0x40600UL, 7UL, 7, 7, 7, 7, -1)] // TS without MP: WAIT goes on
    [InlineData(0x37UL, 0x40600UL, 7UL, 6, -1, 6, 7, -1)] // EM
    [InlineData(0x33UL, 0x40400UL, 7UL, 6, -1, -1, -1, -1)] // no OSFXSR
    [InlineData(0x33UL, 0x00600UL, 7UL, -1, 6, -1, -1, -1)] // no OSXSAVE
    [InlineData(0x33UL, 0x40600UL, 3UL, -1, 6, -1, -1, -1)] // XCR0 without AVX
    [InlineData(0x32UL, 0x40600UL, 7UL, -1, 6, -1, -1, -1)] // real mode has no VEX
    public void Availability_ByControlRegisters_RaisesWhatTheManualSays(
        ulong cr0, ulong cr4, ulong xcr0, int sse, int avx, int mmx, int x87, int wait)
    {
        using var bench = new VectorBench(cr0, cr4, xcr0);
        Vector(bench, s_addps).Should().Be(sse);
        if ((cr0 & 1) != 0)
        {
            Vector(bench, s_vaddps).Should().Be(avx);
        }

        Vector(bench, s_paddb).Should().Be(mmx);
        Vector(bench, s_fld1).Should().Be(x87);
        Vector(bench, s_fwait).Should().Be(wait);
    }

    [Fact]
    public void PendingX87Exception_WithNe_RaisesMfAtTheNextWaitingInstruction()
    {
        using var bench = new VectorBench();
        bench.Cpu->Fcw = 0x37B; // ZM clear
        bench.Run(0xD9, 0xE8); // fld1
        bench.Run(0xD9, 0xEE); // fldz
        bench.Run(0xDE, 0xF9).Should().Be(Status.Next); // fdivp: 1 / 0
        (bench.Cpu->Fsw & 0x8084).Should().Be(0x8084); // B, ES, ZE
        bench.Cpu->Fip.Should().Be(0x1234);
        bench.Cpu->Fop.Should().Be(0x6F9);

        bench.Run(s_fwait).Should().Be(Status.Fault);
        bench.Vector.Should().Be(16);
        bench.Run(s_paddb).Should().Be(Status.Fault);
        bench.Vector.Should().Be(16);
        bench.Run(0xDF, 0xE0).Should().Be(Status.Next); // fnstsw ax does not wait
        bench.Run(0xDB, 0xE2).Should().Be(Status.Next); // fnclex
        bench.Run(s_fwait).Should().Be(Status.Next);
    }

    [Fact]
    public void PendingX87Exception_WithoutNe_DrivesFerrAndGoesOn()
    {
        using var bench = new VectorBench(cr0: 0x13);
        bench.Cpu->Fcw = 0x37B;
        bench.Run(0xD9, 0xE8);
        bench.Run(0xD9, 0xEE);
        bench.Run(0xDE, 0xF9);
        bench.NumericErrors.Should().Be(0);

        bench.Run(0xD9, 0xE8).Should().Be(Status.Next);

        bench.NumericErrors.Should().Be(1);
        (bench.Cpu->Fsw & 0x8084).Should().Be(0x8084);
        (*(ulong*)(bench.Cpu->Xsave + 32)).Should().Be(1UL << 63);
    }

    [Fact]
    public void Fnstenv_InProtectedAndRealMode_StoresTheModesFormat()
    {
        using var bench = new VectorBench();
        SetPointers(bench);
        bench.Run(0xD9, 0x35, 0x00, 0x10, 0, 0).Should().Be(Status.Next); // fnstenv [1000h]
        var image = (uint*)(bench.Ram + 0x1000);
        image[0].Should().Be(0xFFFF037F);
        image[2].Should().Be(0xFFFFFFFF);
        image[3].Should().Be(0x12345);
        image[4].Should().Be(0x1D9u << 16);
        image[5].Should().Be(0x54321);

        using var real = new VectorBench(cr0: 0x32);
        SetPointers(real);
        real.Run(0xD9, 0x36, 0x00, 0x10).Should().Be(Status.Next); // fnstenv [1000h], 14 bytes
        var words = (ushort*)(real.Ram + 0x1000);
        words[3].Should().Be(0x2345);
        words[4].Should().Be(0x11D9);
        words[5].Should().Be(0x4321);
        words[6].Should().Be(0x5000);

        real.Run(0xD9, 0x26, 0x00, 0x10).Should().Be(Status.Next); // fldenv
        real.Cpu->Fip.Should().Be(0x12345);
        real.Cpu->Fdp.Should().Be(0x54321);
        real.Cpu->Fop.Should().Be(0x1D9);
    }

    [Fact]
    public void MmxAfterX87_SharesRegistersByPhysicalNumber()
    {
        using var bench = new VectorBench();
        bench.Run(0xD9, 0xE8); // fld1: R7, TOP 7
        bench.Run(0x0F, 0x6F, 0xC7).Should().Be(Status.Next); // movq mm0, mm7

        (bench.Cpu->Fsw & 0x3800).Should().Be(0);
        bench.Cpu->Ftw.Should().Be(0xFF);
        var slots = (ulong*)(bench.Cpu->Xsave + 32);
        slots[0].Should().Be(1UL << 63);
        ((ushort)slots[1]).Should().Be(0xFFFF);
        slots[14].Should().Be(1UL << 63);
        ((ushort)slots[15]).Should().Be(0x3FFF);
        bench.Run(0x0F, 0x77); // emms
        bench.Cpu->Ftw.Should().Be(0);
    }

    [Fact]
    public void UnmaskedSimdException_WithoutOsxmmexcpt_RaisesUd()
    {
        foreach (bool isEnabled in new[] { true, false })
        {
            using var bench = new VectorBench(cr4: isEnabled ? 0x40600UL : 0x40200);
            bench.Cpu->Mxcsr = 0x1D80; // ZM clear
            *(uint*)(bench.Cpu->Xsave + 160) = 0x3F800000;
            bench.Run(0xF3, 0x0F, 0x5E, 0xC1).Should().Be(Status.Fault); // divss xmm0, xmm1
            bench.Vector.Should().Be(isEnabled ? 19 : 6);
            (bench.Cpu->Mxcsr & 0x3F).Should().Be(4);
            (*(uint*)(bench.Cpu->Xsave + 160)).Should().Be(0x3F800000);
        }
    }

    [Fact]
    public void ExactTinyResult_WithUnderflowUnmasked_Raises()
    {
        // 2^-126 * 0.5 is denormal and exact: UE only when unmasked (SDM 1 4.9.1.5).
        foreach (bool isMasked in new[] { true, false })
        {
            using var bench = new VectorBench();
            bench.Cpu->Mxcsr = isMasked ? 0x1F80u : 0x1780;
            *(uint*)(bench.Cpu->Xsave + 160) = 0x00800000;
            *(uint*)(bench.Cpu->Xsave + 176) = 0x3F000000;
            bench.Run(0xF3, 0x0F, 0x59, 0xC1); // mulss xmm0, xmm1
            bench.Vector.Should().Be(isMasked ? -1 : 19);
            (bench.Cpu->Mxcsr & 0x3F).Should().Be(isMasked ? 0u : 0x10);
        }
    }

    [Fact]
    public void Ldmxcsr_OfReservedBits_RaisesGp()
    {
        using var bench = new VectorBench();
        *(uint*)(bench.Ram + 0x1000) = 0x21F80;
        bench.Run(0x0F, 0xAE, 0x15, 0x00, 0x10, 0, 0).Should().Be(Status.Fault);
        bench.Vector.Should().Be(13);
        bench.Cpu->Mxcsr.Should().Be(0x1F80);
    }

    private static void SetPointers(VectorBench bench)
    {
        bench.Cpu->Fip = 0x12345;
        bench.Cpu->Fdp = 0x54321;
        bench.Cpu->Fop = 0x1D9;
    }

    private static int Vector(VectorBench bench, byte[] code)
    {
        bench.Run(code);
        return bench.Vector;
    }
}

/// <summary>FXSAVE and the XSAVE family: SDM 1 10.5 and 13.6 to 13.13.</summary>
public sealed unsafe class XsaveUnitTests
{
    private const int At = 0x1000;

    [Fact]
    public void XsaveXrstor_OfAllComponents_RoundTrips()
    {
        using var bench = new VectorBench();
        Fill(bench);
        bench.Cpu->Rax = 7;
        bench.Run(0x0F, 0xAE, 0x25, 0x00, 0x10, 0, 0).Should().Be(Status.Next); // xsave
        (*(ulong*)(bench.Ram + At + 512)).Should().Be(7);
        byte[] saved = new ReadOnlySpan<byte>(bench.Cpu->Xsave, 832).ToArray();
        new Span<byte>(bench.Cpu->Xsave + 32, 800).Clear();
        bench.Run(0x0F, 0xAE, 0x2D, 0x00, 0x10, 0, 0).Should().Be(Status.Next); // xrstor

        new ReadOnlySpan<byte>(bench.Cpu->Xsave, 288).SequenceEqual(saved.AsSpan(0, 288)).Should().BeTrue();
        new ReadOnlySpan<byte>(bench.Cpu->Xsave + 576, 128).SequenceEqual(saved.AsSpan(576, 128)).Should().BeTrue();
    }

    [Fact]
    public void Xsavec_WithAvxInitial_WritesCompactedHeaderOnly()
    {
        using var bench = new VectorBench();
        bench.Cpu->Rax = 6;
        *(ulong*)(bench.Cpu->Xsave + 160) = 5;
        bench.Run(0x0F, 0xC7, 0x25, 0x00, 0x10, 0, 0).Should().Be(Status.Next); // xsavec
        (*(ulong*)(bench.Ram + At + 512)).Should().Be(2); // SSE in use, AVX not
        (*(ulong*)(bench.Ram + At + 520)).Should().Be((1UL << 63) | 6);
        (*(ulong*)(bench.Ram + At + 160)).Should().Be(5);
        (*(uint*)(bench.Ram + At + 24)).Should().Be(0x1F80);
    }

    [Fact]
    public void Xrstor_OfComponentsMarkedInitial_Initialises()
    {
        using var bench = new VectorBench();
        Fill(bench);
        bench.Cpu->Rax = 7;
        *(uint*)(bench.Ram + At + 24) = 0x1F80;
        bench.Run(0x0F, 0xAE, 0x2D, 0x00, 0x10, 0, 0).Should().Be(Status.Next);
        bench.Cpu->Fcw.Should().Be(0x37F);
        (*(ulong*)(bench.Cpu->Xsave + 160)).Should().Be(0);
        (*(ulong*)(bench.Cpu->Xsave + 576)).Should().Be(0);
    }

    [Theory]
    [InlineData(512, 8UL)] // a component that XCR0 lacks
    [InlineData(520, 1UL)] // reserved in the standard format
    [InlineData(528, 1UL)]
    [InlineData(24, 0x10000UL)] // MXCSR
    public void Xrstor_OfABadImage_RaisesGpAndChangesNothing(int offset, ulong value)
    {
        using var bench = new VectorBench();
        Fill(bench);
        bench.Cpu->Rax = 7;
        *(ulong*)(bench.Ram + At + offset) = value;
        byte[] before = new ReadOnlySpan<byte>(bench.Cpu->Xsave, 832).ToArray();
        bench.Run(0x0F, 0xAE, 0x2D, 0x00, 0x10, 0, 0).Should().Be(Status.Fault);
        bench.Vector.Should().Be(13);
        new ReadOnlySpan<byte>(bench.Cpu->Xsave, 832).SequenceEqual(before).Should().BeTrue();
    }

    [Theory]
    [InlineData(7UL, -1)]
    [InlineData(3UL, -1)]
    [InlineData(1UL, -1)]
    [InlineData(5UL, 13)] // AVX without SSE
    [InlineData(6UL, 13)] // no x87
    [InlineData(0x17UL, 13)] // unknown component
    public void Xsetbv_OfAValue_AcceptsWhatTheManualAllows(ulong value, int vector)
    {
        using var bench = new VectorBench();
        bench.Cpu->Rax = value;
        bench.Cpu->Rcx = 0;
        bench.Run(0x0F, 0x01, 0xD1);
        bench.Vector.Should().Be(vector);
        bench.Cpu->Xcr0.Should().Be(vector < 0 ? value : 7);
    }

    [Theory]
    [InlineData(new byte[] { 0x0F, 0xAE, 0x05, 0x08, 0x10, 0, 0 })] // fxsave
    [InlineData(new byte[] { 0x0F, 0xAE, 0x25, 0x20, 0x10, 0, 0 })] // xsave
    [InlineData(new byte[] { 0x0F, 0xC7, 0x25, 0x20, 0x10, 0, 0 })] // xsavec
    public void SaveArea_Misaligned_RaisesGp(byte[] code)
    {
        using var bench = new VectorBench();
        bench.Run(code).Should().Be(Status.Fault);
        bench.Vector.Should().Be(13);
    }

    private static void Fill(VectorBench bench)
    {
        for (int i = 0; i < 8; i++)
        {
            *(ulong*)(bench.Cpu->Xsave + 32 + (16 * i)) = 0x1111111111111111UL * (ulong)(i + 1);
            *(ushort*)(bench.Cpu->Xsave + 40 + (16 * i)) = (ushort)(0x3FFF + i);
            *(ulong*)(bench.Cpu->Xsave + 160 + (16 * i)) = (ulong)i + 100;
            *(ulong*)(bench.Cpu->Xsave + 576 + (16 * i)) = (ulong)i + 200;
        }

        bench.Cpu->Ftw = 0xFF;
    }
}

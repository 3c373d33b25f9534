// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Iced.Intel;
using Xunit;
using Xunit.Abstractions;

namespace Vmm.X86.Tests.Differential;

/// <summary>The oracle itself: registers go in and come out, and faults are caught.</summary>
[Collection(NativeCollection.Name)]
public sealed unsafe class NativeCpuTests
{
    private readonly ITestOutputHelper _output;

    public NativeCpuTests(ITestOutputHelper output) => _output = output;

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Run_OfAnAddition_StoresRegistersAndFlags(bool is32Bit)
    {
        using var cpu = new NativeCpu();
        cpu.WriteProgram(NativeCpu.CodeBase, [0x01, 0xD8], is32Bit); // add eax, ebx
        Prepare(cpu);
        cpu.Input->Gpr[0] = 0xFFFFFFFF;
        cpu.Input->Gpr[3] = 1;

        cpu.Run(is32Bit);

        cpu.Output->Vector.Should().Be(NativeImage.NoFault);
        cpu.Output->Gpr[0].Should().Be(0);
        (cpu.Output->Rflags & 0x8D5).Should().Be(0x55); // CF PF AF ZF
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Run_OfADivisionByZero_ReportsVectorAndRip(bool is32Bit)
    {
        using var cpu = new NativeCpu();
        cpu.WriteProgram(NativeCpu.CodeBase, [0x90, 0xF7, 0xF3], is32Bit); // nop; div ebx
        Prepare(cpu);
        cpu.Input->Gpr[1] = 0x1234;

        cpu.Run(is32Bit);

        cpu.Output->Vector.Should().Be(0);
        cpu.Output->Rip.Should().Be(NativeCpu.CodeBase + 1);
        cpu.Output->Gpr[1].Should().Be(0x1234);
    }

    [Fact]
    public void Run_OfAStoreToNowhere_ReportsThePageFault()
    {
        using var cpu = new NativeCpu();
        cpu.WriteProgram(NativeCpu.CodeBase, [0x89, 0x03], is32Bit: false); // mov [rbx], eax
        Prepare(cpu);
        cpu.Input->Gpr[3] = NativeCpu.DataBase + NativeCpu.DataBytes + 8;

        cpu.Run(is32Bit: false);

        cpu.Output->Vector.Should().Be(14);
        cpu.Output->Cr2.Should().Be(NativeCpu.DataBase + NativeCpu.DataBytes + 8);
        cpu.Output->ErrorCode.Should().Be(6);
    }

    [Fact]
    public void Run_OfAnUnmaskedSimdException_ReportsVectorAndFlags()
    {
        using var cpu = new NativeCpu();
        cpu.WriteProgram(NativeCpu.CodeBase, [0xF2, 0x0F, 0x5E, 0xC1], is32Bit: false); // divsd xmm0, xmm1
        Prepare(cpu);
        *(ulong*)(cpu.Input->Xsave + 160) = BitConverter.DoubleToUInt64Bits(1);
        *(uint*)(cpu.Input->Xsave + 24) = 0x1F80 & ~0x200u; // ZM clear

        cpu.Run(is32Bit: false);

        cpu.Output->Vector.Should().Be(19);
        (*(uint*)(cpu.Output->Xsave + 24) & 0x3F).Should().Be(4);
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Run_OfEveryCodeThatIsDrawn_ComesBack(bool is32Bit)
    {
        using var cpu = new NativeCpu();
        var programs = new ProgramGenerator(1, is32Bit);
        var states = new StateGenerator(1);
        int executed = 0;
        int never = 0;
        foreach (Code code in programs.Codes)
        {
            bool drawn = false;
            for (int i = 0; i < 4; i++)
            {
                ulong rip = NativeCpu.CodeBase + (ulong)(executed * ProgramGenerator.SlotBytes % 0x3F000);
                TestProgram? program = programs.TryDraw(code, rip, 1);
                if (program is null)
                {
                    continue;
                }

                drawn = true;
                states.FillData(NativeCpu.Data);
                states.Fill(cpu.Input, program.Instructions, program.End, is32Bit);
                cpu.WriteProgram(rip, program.Bytes, is32Bit);
                cpu.Input->Rip = rip;
                cpu.Run(is32Bit);
                executed++;
            }

            if (!drawn)
            {
                never++;
                _output.WriteLine($"never drawn: {code}");
            }
        }

        _output.WriteLine($"{programs.Codes.Count} codes, {executed} executions, {never} never drawn");
        executed.Should().BeGreaterThan(programs.Codes.Count * 3);
        never.Should().Be(0);
    }

    private static void Prepare(NativeCpu cpu)
    {
        *cpu.Input = default;
        cpu.Input->Rip = NativeCpu.CodeBase;
        cpu.Input->Rflags = 0x202;
        cpu.Input->Gpr[4] = NativeCpu.DataBase + 0x800;
        *(ushort*)cpu.Input->Xsave = 0x37F;
        *(uint*)(cpu.Input->Xsave + 24) = 0x1F80;
        *(ulong*)(cpu.Input->Xsave + 512) = 7;
    }
}

/// <summary>The native oracle lies at fixed addresses: one at a time in a process.</summary>
[CollectionDefinition(Name, DisableParallelization = true)]
public sealed class NativeCollection
{
    public const string Name = "native";
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Iced.Intel;
using Xunit;

namespace Vmm.X86.Tests;

/// <summary>Every form that the emitter writes, read again by Iced.</summary>
public sealed unsafe class EmitterTests
{
    private static readonly int[] s_registers = [0, 3, 4, 5, 7, 8, 12, 13, 15];
    private static readonly int[] s_displacements = [0, 1, -8, 127, 128, -129, 0x12345];

    private static readonly MasmFormatter s_formatter = new();

    private delegate void Write(ref Emitter emitter, int register, in HostMemory memory);

    [Fact]
    public void MemoryForms_WithEveryAddress_DecodeToTheirOperands()
    {
        Check((ref Emitter e, int r, in HostMemory m) => e.Load(r, m), Mnemonic.Mov, 8, 1);
        Check((ref Emitter e, int r, in HostMemory m) => e.Load32(r, m), Mnemonic.Mov, 4, 1);
        Check((ref Emitter e, int r, in HostMemory m) => e.LoadWord(r, m), Mnemonic.Movzx, 4, 1);
        Check((ref Emitter e, int r, in HostMemory m) => e.Store(m, r), Mnemonic.Mov, 8, 0);
        Check((ref Emitter e, int r, in HostMemory m) => e.Store32(m, r), Mnemonic.Mov, 4, 0);
        Check((ref Emitter e, int r, in HostMemory m) => e.StoreWord(m, r), Mnemonic.Mov, 2, 0);
        Check((ref Emitter e, int r, in HostMemory m) => e.Alu(AluOp.Cmp, r, m), Mnemonic.Cmp, 8, 1);
        Check((ref Emitter e, int r, in HostMemory m) => e.Alu(AluOp.Xor, r, m), Mnemonic.Xor, 8, 1);
        Check((ref Emitter e, int r, in HostMemory m) => e.Alu32(AluOp.Add, r, m), Mnemonic.Add, 4, 1);
    }

    [Fact]
    public void Lea_WithBaseIndexAndScale_DecodesToThem()
    {
        foreach (int index in s_registers)
        {
            if (index == 4)
            {
                continue;
            }

            foreach (int scale in new[] { 0, 1, 2, 3 })
            {
                Instruction instruction = One((ref Emitter e) => e.Lea(9, new HostMemory(13, index, scale, 0x77)));
                instruction.Code.Should().Be(Code.Lea_r64_m);
                instruction.MemoryBase.Should().Be(Register.R13);
                instruction.MemoryIndex.Should().Be(Register.RAX + index);
                instruction.MemoryIndexScale.Should().Be(1 << scale);
                instruction.MemoryDisplacement64.Should().Be(0x77);
            }
        }
    }

    [Theory]
    [InlineData(0UL)]
    [InlineData(0x7FFFFFFFUL)]
    [InlineData(0xFFFFFFFFUL)]
    [InlineData(0xFFFFFFFF80000000UL)]
    [InlineData(0x123456789ABCDEF0UL)]
    public void MoveImmediate_OfAnyValue_LoadsIt(ulong value)
    {
        foreach (int register in s_registers)
        {
            Instruction instruction = One((ref Emitter e) => e.MoveImmediate(register, value));
            instruction.Mnemonic.Should().Be(Mnemonic.Mov);
            instruction.Op0Register.GetFullRegister().Should().Be(Register.RAX + register);
            instruction.GetImmediate(1).Should().Be(value);
        }
    }

    [Fact]
    public void Arithmetic_WithImmediates_DecodesToIt()
    {
        foreach (AluOp op in new[] { AluOp.Add, AluOp.Or, AluOp.And, AluOp.Sub, AluOp.Xor, AluOp.Cmp })
        {
            foreach (int value in new[] { 1, -1, 127, 128, -4096, 0x1FFE0 })
            {
                Instruction instruction = One((ref Emitter e) => e.AluImmediate(op, 14, value));
                instruction.Mnemonic.ToString().Should().Be(op.ToString());
                instruction.Op0Register.Should().Be(Register.R14);
                ((long)instruction.GetImmediate(1)).Should().Be(value);
            }
        }
    }

    [Fact]
    public void OtherForms_DecodeToWhatTheyAreCalled()
    {
        HostMemory field = HostMemory.Context(0x3B8);
        Text((ref Emitter e) => e.Shift(5, 15, 7)).Should().Be("shr r15,7");
        Text((ref Emitter e) => e.Shift(7, 14, 63)).Should().Be("sar r14,3Fh");
        Text((ref Emitter e) => e.TestImmediate32(15, 15)).Should().Be("test r15d,0Fh");
        Text((ref Emitter e) => e.AluImmediate8(AluOp.Cmp, field, 2)).Should().Be("cmp gs:[3B8h],2");
        Text((ref Emitter e) => e.AluImmediate32(AluOp.And, field, ~0x200))
            .Should().Be("and gs:[3B8h],0FFFFFFFFFFFFFDFFh");
        Text((ref Emitter e) => e.CompareByte(new HostMemory(14, 0), 3)).Should().Be("cmp [r14],3");
        Text((ref Emitter e) => e.CompareWord(field, 0x1234)).Should().Be("cmp word ptr gs:[3B8h],1234h");
        Text((ref Emitter e) => e.StoreImmediate(field, -5)).Should().Be("mov gs:[3B8h],0FFFFFFFFFFFFFFFBh");
        Text((ref Emitter e) => e.StoreImmediate32(field, 1)).Should().Be("mov gs:[3B8h],1");
        Text((ref Emitter e) => e.AddAl(0x7F)).Should().Be("add al,7Fh");
        Text((ref Emitter e) => e.SetOverflowAl()).Should().Be("seto al");
        Text((ref Emitter e) => e.Lahf()).Should().Be("lahf");
        Text((ref Emitter e) => e.Sahf()).Should().Be("sahf");
        Text((ref Emitter e) => e.Push(13)).Should().Be("push r13");
        Text((ref Emitter e) => e.Pop(5)).Should().Be("pop rbp");
        Text((ref Emitter e) => e.JumpRegister(14)).Should().Be("jmp r14");
        Text((ref Emitter e) => e.JumpMemory(new HostMemory(-1, 15, 3, 0x42000, true)))
            .Should().Be("jmp gs:[r15*8+42000h]");
        Text((ref Emitter e) => e.CallMemory(field)).Should().Be("call gs:[3B8h]");
        Text((ref Emitter e) => e.MoveVector(9, field, store: true)).Should().Be("movups gs:[3B8h],xmm9");
        Text((ref Emitter e) => e.MoveVector(1, field, store: false)).Should().Be("movups xmm1,gs:[3B8h]");
        Text((ref Emitter e) => e.MoveUpper(9, field, store: true)).Should().Be("vextractf128 gs:[3B8h],ymm9,1");
        Text((ref Emitter e) => e.LoadWide(0, field, or: false)).Should().Be("vmovups ymm0,gs:[3B8h]");
        Text((ref Emitter e) => e.LoadWide(5, field, or: true)).Should().Be("vorps ymm5,ymm5,gs:[3B8h]");
        Text((ref Emitter e) => e.TestWide(3)).Should().Be("vptest ymm3,ymm3");
        Text((ref Emitter e) => e.ZeroUpper()).Should().Be("vzeroupper");
        Text((ref Emitter e) => e.MoveUpper(9, field, store: false)).Should().Be("vinsertf128 ymm9,ymm9,gs:[3B8h],1");
        Text((ref Emitter e) => e.Mxcsr(2, field)).Should().Be("ldmxcsr gs:[3B8h]");
        Text((ref Emitter e) => e.Mxcsr(3, field)).Should().Be("stmxcsr gs:[3B8h]");
        Text((ref Emitter e) => e.Xsave(4, field)).Should().Be("xsave64 gs:[3B8h]");
        Text((ref Emitter e) => e.Xsave(5, field)).Should().Be("xrstor64 gs:[3B8h]");
        Text((ref Emitter e) => e.Nop5()).Should().Be("nop [rax+rax]");
        Text((ref Emitter e) => e.Return()).Should().Be("ret");
    }

    private delegate void WriteOne(ref Emitter emitter);

    private static Instruction One(WriteOne write)
    {
        byte* buffer = stackalloc byte[64];
        var emitter = new Emitter(buffer);
        write(ref emitter);
        int length = (int)(emitter.At - buffer);
        var decoder = Decoder.Create(64, new ReadOnlySpan<byte>(buffer, length).ToArray());
        decoder.Decode(out Instruction instruction);
        instruction.IsInvalid.Should().BeFalse();
        instruction.Length.Should().Be(length);
        return instruction;
    }

    private static string Text(WriteOne write)
    {
        var output = new StringOutput();
        s_formatter.Format(One(write), output);
        string text = output.ToStringAndReset();
        foreach (string size in new[] { "xmmword ptr ", "dword ptr ", "qword ptr ", "byte ptr " })
        {
            text = text.Replace(size, string.Empty, StringComparison.Ordinal);
        }

        return text;
    }

    private static void Check(Write write, Mnemonic mnemonic, int size, int memoryOperand)
    {
        foreach (int register in s_registers)
        {
            foreach (int displacement in s_displacements)
            {
                foreach (int start in s_registers)
                {
                    var memory = new HostMemory(start, displacement);
                    Instruction instruction = One((ref Emitter e) => write(ref e, register, memory));
                    Matches(instruction, mnemonic, size, memoryOperand, register, displacement);
                    instruction.MemoryBase.Should().Be(Register.RAX + start);
                }

                var field = HostMemory.Context(displacement);
                Instruction other = One((ref Emitter e) => write(ref e, register, field));
                Matches(other, mnemonic, size, memoryOperand, register, displacement);
                other.MemorySegment.Should().Be(Register.GS);
                other.MemoryBase.Should().Be(Register.None);
            }
        }
    }

    private static void Matches(
        in Instruction instruction, Mnemonic mnemonic, int size, int memoryOperand, int register, int displacement)
    {
        instruction.Mnemonic.Should().Be(mnemonic);
        instruction.GetOpKind(memoryOperand).Should().Be(OpKind.Memory);
        ((long)instruction.MemoryDisplacement64).Should().Be(displacement);
        Register operand = instruction.GetOpRegister(1 - memoryOperand);
        operand.GetFullRegister().Should().Be(Register.RAX + register);
        operand.GetSize().Should().Be(size);
    }
}

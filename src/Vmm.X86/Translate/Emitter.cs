// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;

namespace Vmm.X86;

// Writes host instructions as bytes at a pointer: no allocation, no table, about 2 ns an instruction. Only the forms
// exist that the translator itself needs (checks, spills, jumps); guest instructions that pass through are re-encoded
// by Iced. EmitterTests decodes every form with Iced again.
//
// SAFETY: room is not checked here: a unit of code (a guest instruction, a stub) is started only with enough room for the
// longest one (CodeCache.UnitBytes), and every store goes to At or to a jump that this emitter wrote before.

/// <summary>Host registers by their number in encodings, and what the translator uses them for.</summary>
internal static class Host
{
    public const int Rax = 0;
    public const int Rcx = 1;
    public const int Rdx = 2;
    public const int Rbx = 3;
    public const int Rsp = 4;
    public const int Rbp = 5;
    public const int Rsi = 6;
    public const int Rdi = 7;
    public const int R8 = 8;
    public const int R9 = 9;
    public const int R10 = 10;
    public const int R11 = 11;
    public const int R12 = 12;
    public const int R13 = 13;
    public const int R14 = 14;
    public const int R15 = 15;

    /// <summary>Holds the guest's RSP: the host's RSP must stay a real stack.</summary>
    public const int GuestRsp = R13;

    /// <summary>First scratch register.</summary>
    public const int T0 = R14;

    /// <summary>Second scratch register.</summary>
    public const int T1 = R15;

    /// <summary>No register.</summary>
    public const int None = -1;
}

/// <summary>A host memory operand: base + index &lt;&lt; scale + displacement, or GS-relative.</summary>
internal readonly struct HostMemory
{
    /// <summary>Base register or <see cref="Host.None"/>.</summary>
    public readonly int Base;

    /// <summary>Index register or <see cref="Host.None"/>.</summary>
    public readonly int Index;

    /// <summary>Shift of the index.</summary>
    public readonly int Scale;

    /// <summary>Displacement.</summary>
    public readonly int Displacement;

    /// <summary>Relative to GS, which is the CpuContext.</summary>
    public readonly bool IsContext;

    public HostMemory(int @base, int displacement)
        : this(@base, Host.None, 0, displacement)
    {
    }

    public HostMemory(int @base, int index, int scale, int displacement, bool isContext = false)
    {
        Base = @base;
        Index = index;
        Scale = scale;
        Displacement = displacement;
        IsContext = isContext;
    }

    /// <summary>A field of the context.</summary>
    public static HostMemory Context(int offset) => new(Host.None, Host.None, 0, offset, true);

    /// <summary>A table entry behind the context, by a byte offset in a register.</summary>
    public static HostMemory Context(int register, int offset) => new(register, Host.None, 0, offset, true);
}

/// <summary>Arithmetic by its number in the opcode (SDM 2A, group 1).</summary>
internal enum AluOp
{
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// <summary>Condition codes as encoded.</summary>
internal static class HostCondition
{
    public const int Overflow = 0;
    public const int Below = 2;
    public const int AboveOrEqual = 3;
    public const int Equal = 4;
    public const int NotEqual = 5;
    public const int BelowOrEqual = 6;
    public const int Above = 7;
    public const int Greater = 15;
}

/// <summary>Writes x86-64 code at a pointer (the writable alias).</summary>
internal unsafe struct Emitter
{
    private const int GsPrefix = 0x65;

    /// <summary>Where the next byte goes.</summary>
    public byte* At;

    /// <summary>Starts writing at an address.</summary>
    public Emitter(byte* at) => At = at;

    /// <summary>MOV to, from; 64 bits.</summary>
    public void Move(int to, int from) => RegisterForm(true, 0x8B, to, from);

    /// <summary>MOV to, from; 32 bits.</summary>
    public void Move32(int to, int from) => RegisterForm(false, 0x8B, to, from);

    /// <summary>MOV to, imm: the shortest form.</summary>
    public void MoveImmediate(int to, ulong value)
    {
        if (value <= uint.MaxValue)
        {
            Rex(false, 0, 0, to);
            Byte(0xB8 | (to & 7));
            Dword((int)value);
        }
        else if ((long)value == (int)value)
        {
            Rex(true, 0, 0, to);
            Byte(0xC7);
            Byte(0xC0 | (to & 7));
            Dword((int)value);
        }
        else
        {
            Rex(true, 0, 0, to);
            Byte(0xB8 | (to & 7));
            *(ulong*)At = value;
            At += 8;
        }
    }

    /// <summary>MOV to, imm64: always ten bytes, so that the value can be changed later.</summary>
    public void MoveImmediate64(int to, ulong value)
    {
        Rex(true, 0, 0, to);
        Byte(0xB8 | (to & 7));
        *(ulong*)At = value;
        At += 8;
    }

    /// <summary>MOV to, memory; 64 bits.</summary>
    public void Load(int to, in HostMemory memory) => MemoryForm(true, 0x8B, to, memory);

    /// <summary>MOV to, memory; 32 bits.</summary>
    public void Load32(int to, in HostMemory memory) => MemoryForm(false, 0x8B, to, memory);

    /// <summary>MOVZX to, word memory.</summary>
    public void LoadWord(int to, in HostMemory memory) => MemoryForm(false, 0x0FB7, to, memory);

    /// <summary>MOV memory, from; 64 bits.</summary>
    public void Store(in HostMemory memory, int from) => MemoryForm(true, 0x89, from, memory);

    /// <summary>MOV memory, from; 32 bits.</summary>
    public void Store32(in HostMemory memory, int from) => MemoryForm(false, 0x89, from, memory);

    /// <summary>MOV word memory, from.</summary>
    public void StoreWord(in HostMemory memory, int from)
    {
        Byte(0x66);
        MemoryForm(false, 0x89, from, memory);
    }

    /// <summary>MOV qword memory, sign-extended imm32.</summary>
    public void StoreImmediate(in HostMemory memory, int value)
    {
        MemoryForm(true, 0xC7, 0, memory);
        Dword(value);
    }

    /// <summary>MOV dword memory, imm32.</summary>
    public void StoreImmediate32(in HostMemory memory, int value)
    {
        MemoryForm(false, 0xC7, 0, memory);
        Dword(value);
    }

    /// <summary>LEA to, memory; 64 bits.</summary>
    public void Lea(int to, in HostMemory memory) => MemoryForm(true, 0x8D, to, memory);

    /// <summary>LEA to, memory; 32 bits.</summary>
    public void Lea32(int to, in HostMemory memory) => MemoryForm(false, 0x8D, to, memory);

    /// <summary>op to, from; 64 bits.</summary>
    public void Alu(AluOp op, int to, int from) => RegisterForm(true, ((int)op << 3) | 3, to, from);

    /// <summary>op to, from; 32 bits.</summary>
    public void Alu32(AluOp op, int to, int from) => RegisterForm(false, ((int)op << 3) | 3, to, from);

    /// <summary>op to, memory; 64 bits.</summary>
    public void Alu(AluOp op, int to, in HostMemory memory) => MemoryForm(true, ((int)op << 3) | 3, to, memory);

    /// <summary>op to, memory; 32 bits.</summary>
    public void Alu32(AluOp op, int to, in HostMemory memory) => MemoryForm(false, ((int)op << 3) | 3, to, memory);

    /// <summary>IMUL to, memory; 64 bits.</summary>
    public void Multiply(int to, in HostMemory memory) => MemoryForm(true, 0x0FAF, to, memory);

    /// <summary>REP MOVS (A4h) or REP STOS (AAh) of elements of a size.</summary>
    public void RepeatedString(int opcode, int size)
    {
        if (size == 2)
        {
            Byte(0x66);
        }

        Byte(0xF3);
        if (size == 8)
        {
            Byte(0x48);
        }

        Byte(size == 1 ? opcode : opcode + 1);
    }

    /// <summary>RDTSC.</summary>
    public void ReadTsc()
    {
        Byte(0x0F);
        Byte(0x31);
    }

    /// <summary>op to, imm.</summary>
    public void AluImmediate(AluOp op, int to, int value, bool wide = true)
    {
        Rex(wide, 0, 0, to);
        bool isShort = value == (sbyte)value;
        Byte(isShort ? 0x83 : 0x81);
        Byte(0xC0 | ((int)op << 3) | (to & 7));
        Immediate(value, isShort);
    }

    /// <summary>op memory, imm8 sign-extended; 32 or 64 bits.</summary>
    public void AluImmediate8(AluOp op, in HostMemory memory, int value, bool wide = false)
    {
        MemoryForm(wide, 0x83, (int)op, memory);
        Byte(value);
    }

    /// <summary>op qword memory, imm32 sign-extended.</summary>
    public void AluImmediate32(AluOp op, in HostMemory memory, int value)
    {
        MemoryForm(true, 0x81, (int)op, memory);
        Dword(value);
    }

    /// <summary>CMP word memory, imm16.</summary>
    public void CompareWord(in HostMemory memory, ushort value)
    {
        Byte(0x66);
        MemoryForm(false, 0x81, 7, memory);
        Byte(value & 0xFF);
        Byte(value >> 8);
    }

    /// <summary>CMP byte memory, imm8.</summary>
    public void CompareByte(in HostMemory memory, int value)
    {
        MemoryForm(false, 0x80, 7, memory);
        Byte(value);
    }

    /// <summary>TEST register, imm32; 32 bits.</summary>
    public void TestImmediate32(int register, int value)
    {
        Rex(false, 0, 0, register);
        Byte(0xF7);
        Byte(0xC0 | (register & 7));
        Dword(value);
    }

    /// <summary>TEST left, right; 32 bits.</summary>
    public void Test32(int left, int right) => RegisterForm(false, 0x85, left, right);

    /// <summary>SHL (4), SHR (5) or SAR (7) register, count; 64 bits.</summary>
    public void Shift(int kind, int register, int count)
    {
        Rex(true, 0, 0, register);
        Byte(0xC1);
        Byte(0xC0 | (kind << 3) | (register & 7));
        Byte(count);
    }

    /// <summary>ADD AL, imm8: with 7Fh, OF becomes AL's bit 0.</summary>
    public void AddAl(int value)
    {
        Byte(0x04);
        Byte(value);
    }

    /// <summary>SETO AL.</summary>
    public void SetOverflowAl()
    {
        Byte(0x0F);
        Byte(0x90);
        Byte(0xC0);
    }

    /// <summary>LAHF.</summary>
    public void Lahf() => Byte(0x9F);

    /// <summary>SAHF.</summary>
    public void Sahf() => Byte(0x9E);

    /// <summary>RET.</summary>
    public void Return() => Byte(0xC3);

    /// <summary>PUSH register.</summary>
    public void Push(int register)
    {
        Rex(false, 0, 0, register);
        Byte(0x50 | (register & 7));
    }

    /// <summary>POP register.</summary>
    public void Pop(int register)
    {
        Rex(false, 0, 0, register);
        Byte(0x58 | (register & 7));
    }

    /// <summary>JMP register.</summary>
    public void JumpRegister(int register)
    {
        Rex(false, 0, 0, register);
        Byte(0xFF);
        Byte(0xE0 | (register & 7));
    }

    /// <summary>JMP memory.</summary>
    public void JumpMemory(in HostMemory memory) => MemoryForm(false, 0xFF, 4, memory);

    /// <summary>CALL memory.</summary>
    public void CallMemory(in HostMemory memory) => MemoryForm(false, 0xFF, 2, memory);

    /// <summary>JMP rel32 to a place in the same alias.</summary>
    public void Jump(byte* target)
    {
        Byte(0xE9);
        Dword((int)(target - (At + 4)));
    }

    /// <summary>CALL rel32 to a place in the same alias.</summary>
    public void Call(byte* target)
    {
        Byte(0xE8);
        Dword((int)(target - (At + 4)));
    }

    /// <summary>JMP rel32 to be landed later; answers the place behind it.</summary>
    public byte* JumpForward()
    {
        Byte(0xE9);
        Dword(0);
        return At;
    }

    /// <summary>Jcc rel32 to be landed later; answers the place behind it.</summary>
    public byte* JumpIf(int condition)
    {
        Byte(0x0F);
        Byte(0x80 | condition);
        Dword(0);
        return At;
    }

    /// <summary>Jcc rel32 to a place in the same alias.</summary>
    public void JumpIf(int condition, byte* target)
    {
        Byte(0x0F);
        Byte(0x80 | condition);
        Dword((int)(target - (At + 4)));
    }

    /// <summary>Lets a forward jump land here.</summary>
    public readonly void Land(byte* jump) => *(int*)(jump - 4) = (int)(At - jump);

    /// <summary>A five-byte NOP.</summary>
    public void Nop5()
    {
        Byte(0x0F);
        Byte(0x1F);
        Byte(0x44);
        Byte(0x00);
        Byte(0x00);
    }

    /// <summary>A vector move: MOVUPS (VEX for 256 bits) between register and memory.</summary>
    public void MoveVector(int register, in HostMemory memory, bool store)
    {
        Prefix(memory);
        Rex(false, register, memory.Index, memory.Base);
        Byte(0x0F);
        Byte(store ? 0x11 : 0x10);
        ModRm(register, memory);
    }

    /// <summary>VEXTRACTF128 memory, register, 1 or VINSERTF128 register, register, memory, 1.</summary>
    public void MoveUpper(int register, in HostMemory memory, bool store)
    {
        Prefix(memory);
        int x = memory.Index > 7 ? 0 : 0x40;
        int b = memory.Base > 7 ? 0 : 0x20;
        Byte(0xC4);
        Byte((register > 7 ? 0 : 0x80) | x | b | 3);
        Byte((store ? 0x78 : (~register & 15) << 3) | 5);
        Byte(store ? 0x19 : 0x18);
        ModRm(register, memory);
        Byte(1);
    }

    /// <summary>VMOVUPS register, memory or VORPS register, register, memory; 256 bits, registers 0 to 7.</summary>
    public void LoadWide(int register, in HostMemory memory, bool or)
    {
        Prefix(memory);
        int x = memory.Index > 7 ? 0 : 0x40;
        int b = memory.Base > 7 ? 0 : 0x20;
        Byte(0xC4);
        Byte(0x80 | x | b | 1);
        Byte((or ? (~register & 15) << 3 : 0x78) | 4);
        Byte(or ? 0x56 : 0x10);
        ModRm(register, memory);
    }

    /// <summary>VPTEST register, register; 256 bits, registers 0 to 7.</summary>
    public void TestWide(int register)
    {
        Byte(0xC4);
        Byte(0xE2);
        Byte(0x7D);
        Byte(0x17);
        Byte(0xC0 | (register << 3) | register);
    }

    /// <summary>VZEROUPPER.</summary>
    public void ZeroUpper()
    {
        Byte(0xC5);
        Byte(0xF8);
        Byte(0x77);
    }

    /// <summary>LDMXCSR (2) or STMXCSR (3).</summary>
    public void Mxcsr(int kind, in HostMemory memory) => MemoryForm(false, 0x0FAE, kind, memory);

    /// <summary>XSAVE64 (4) or XRSTOR64 (5).</summary>
    public void Xsave(int kind, in HostMemory memory) => MemoryForm(true, 0x0FAE, kind, memory);

    /// <summary>Copies bytes.</summary>
    public void Bytes(byte* from, int length)
    {
        Unsafe.CopyBlockUnaligned(At, from, (uint)length);
        At += length;
    }

    /// <summary>One byte.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public void Byte(int value) => *At++ = (byte)value;

    private void RegisterForm(bool wide, int opcode, int reg, int rm)
    {
        Rex(wide, reg, 0, rm);
        Byte(opcode);
        Byte(0xC0 | ((reg & 7) << 3) | (rm & 7));
    }

    // An opcode above 255 has 0F in its high byte.
    private void MemoryForm(bool wide, int opcode, int reg, in HostMemory memory)
    {
        Prefix(memory);
        Rex(wide, reg, memory.Index, memory.Base);
        if (opcode > 0xFF)
        {
            Byte(opcode >> 8);
        }

        Byte(opcode & 0xFF);
        ModRm(reg, memory);
    }

    private void Prefix(in HostMemory memory)
    {
        if (memory.IsContext)
        {
            Byte(GsPrefix);
        }
    }

    private void ModRm(int reg, in HostMemory memory)
    {
        int field = (reg & 7) << 3;
        int displacement = memory.Displacement;
        if (memory.Base < 0)
        {
            // No base: SIB with base 101 and mod 00 takes a 32-bit displacement.
            Byte(0x04 | field);
            Byte((memory.Scale << 6) | (memory.Index < 0 ? 0x20 : (memory.Index & 7) << 3) | 5);
            Dword(displacement);
            return;
        }

        bool isShort = displacement == (sbyte)displacement;
        bool none = displacement == 0 && (memory.Base & 7) != 5;
        int mode = none ? 0 : isShort ? 0x40 : 0x80;
        if (memory.Index >= 0 || (memory.Base & 7) == 4)
        {
            Byte(mode | field | 4);
            Byte((memory.Scale << 6) | (memory.Index < 0 ? 0x20 : (memory.Index & 7) << 3) | (memory.Base & 7));
        }
        else
        {
            Byte(mode | field | (memory.Base & 7));
        }

        if (!none)
        {
            Immediate(displacement, isShort);
        }
    }

    private void Immediate(int value, bool isShort)
    {
        if (isShort)
        {
            Byte(value);
        }
        else
        {
            Dword(value);
        }
    }

    private void Rex(bool wide, int reg, int index, int rm)
    {
        int rex = (wide ? 8 : 0) | (reg > 7 ? 4 : 0) | (index > 7 ? 2 : 0) | (rm > 7 ? 1 : 0);
        if (rex != 0)
        {
            Byte(0x40 | rex);
        }
    }

    private void Dword(int value)
    {
        *(int*)At = value;
        At += 4;
    }
}

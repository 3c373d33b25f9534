// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace Vmm.X86;

// A decoded instruction is a 64-byte record with everything resolved that decoding can resolve: registers are byte
// offsets into CpuContext (AH is RAX's offset + 1), an absent base or index is the offset of the zero quadword,
// RIP-relative operands have BlockRip as base. The binder (Binder.cs) fills it once; handlers never see Iced.
//
// An instruction group is added by a Bind function that the Binder calls for its Iced codes: it gets the Iced
// Instruction, the raw bytes and the record with operands resolved, and sets Handler (and Aux if it needs more room).

/// <summary>What a handler answers.</summary>
internal enum Status
{
    /// <summary>Done; execute the next record.</summary>
    Next = 0,

    /// <summary>A branch was taken: Rip is set; the block's taken link may be used.</summary>
    Taken = 1,

    /// <summary>A branch was not taken or the block ended: Rip is set; the fall-through link may be used.</summary>
    NotTaken = 2,

    /// <summary>Rip is set to a computed address.</summary>
    Jump = 3,

    /// <summary>Rip is set; mode, interrupt flag or translation changed: take the slow path round the loop.</summary>
    Look = 4,

    /// <summary>
    /// Faults.Raise was called and nothing else changed: deliver it with RIP at this instruction.
    /// </summary>
    Fault = 5,

    /// <summary>HLT: Rip is behind it.</summary>
    Halt = 6,

    /// <summary>Triple fault.</summary>
    Shutdown = 7,
}

/// <summary>Bits of <see cref="Insn.Flags"/>.</summary>
internal static class InsnFlags
{
    /// <summary>LOCK prefix (or implied by XCHG with memory).</summary>
    public const byte Lock = 1;

    /// <summary>F3 as REP/REPE.</summary>
    public const byte Rep = 2;

    /// <summary>F2 as REPNE.</summary>
    public const byte Repne = 4;

    /// <summary>Limit and type checks of the segment are needed for the memory operand (not flat).</summary>
    public const byte SegmentCheck = 8;

    /// <summary>64-bit code.</summary>
    public const byte Long = 16;

    /// <summary>Operand 0 (destination) is memory.</summary>
    public const byte MemoryFirst = 32;

    /// <summary>Some operand is memory.</summary>
    public const byte HasMemory = 64;
}

/// <summary>A decoded instruction: one cache line.</summary>
[StructLayout(LayoutKind.Explicit, Size = 64)]
internal unsafe struct Insn
{
    /// <summary>Executes it.</summary>
    [FieldOffset(0)]
    public delegate*<CpuContext*, Insn*, Status> Handler;

    /// <summary>Immediate, sign- or zero-extended as the operation needs; branch target relative to BlockRip.</summary>
    [FieldOffset(8)]
    public ulong Immediate;

    /// <summary>Displacement, sign-extended.</summary>
    [FieldOffset(16)]
    public ulong Displacement;

    /// <summary>What the offset (base + index * scale + displacement) is masked with: 16, 32 or 64 ones.</summary>
    [FieldOffset(24)]
    public ulong AddressMask;

    /// <summary>Byte offset of operand 0's register (when it is one).</summary>
    [FieldOffset(32)]
    public ushort R0;

    /// <summary>Byte offset of operand 1's register.</summary>
    [FieldOffset(34)]
    public ushort R1;

    /// <summary>Byte offset of operand 2's register.</summary>
    [FieldOffset(36)]
    public ushort R2;

    /// <summary>Byte offset of the base register.</summary>
    [FieldOffset(38)]
    public ushort Base;

    /// <summary>Byte offset of the index register.</summary>
    [FieldOffset(40)]
    public ushort Index;

    /// <summary>Byte offset of the segment's EffectiveBase, or of the zero quadword where it is known to be 0.</summary>
    [FieldOffset(42)]
    public ushort SegmentBase;

    /// <summary>Iced's Code.</summary>
    [FieldOffset(44)]
    public ushort Code;

    /// <summary>Byte offset of this instruction from the block's first.</summary>
    [FieldOffset(46)]
    public ushort Offset;

    /// <summary>Length in bytes, 1 to 15.</summary>
    [FieldOffset(48)]
    public byte Length;

    /// <summary><see cref="InsnFlags"/>.</summary>
    [FieldOffset(49)]
    public byte Flags;

    /// <summary>Left shift of the index: 0 to 3.</summary>
    [FieldOffset(50)]
    public byte Scale;

    /// <summary>Segment register of the memory operand (<see cref="Seg"/>).</summary>
    [FieldOffset(51)]
    public byte Segment;

    /// <summary>Operand size in bytes: 1, 2, 4 or 8.</summary>
    [FieldOffset(52)]
    public byte OperandSize;

    /// <summary>Address size in bytes: 2, 4 or 8.</summary>
    [FieldOffset(53)]
    public byte AddressSize;

    /// <summary>Bytes of the memory operand as Iced states it (0 when not fixed).</summary>
    [FieldOffset(54)]
    public ushort MemorySize;

    /// <summary>Free for the group that bound the handler: a thunk's address, a second immediate.</summary>
    [FieldOffset(56)]
    public void* Aux;

    /// <summary>RIP of the instruction.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Address(CpuContext* cpu, Insn* insn) => (cpu->BlockRip + insn->Offset) & cpu->RipMask;

    /// <summary>RIP of the instruction behind it.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong NextAddress(CpuContext* cpu, Insn* insn) =>
        (cpu->BlockRip + insn->Offset + insn->Length) & cpu->RipMask;

    /// <summary>Sets Rip behind the instruction and asks for the slow path.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Status EndAndLook(CpuContext* cpu, Insn* insn)
    {
        cpu->Rip = NextAddress(cpu, insn);
        return Status.Look;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using Iced.Intel;

namespace Vmm.X86;

// Instructions of the vector unit that need no thunk or cannot use one, and the plain moves, which are frequent enough
// to be worth a handler of their own.

/// <summary>Binds the vector unit's instructions that are executed in C#.</summary>
internal static unsafe class SpecialCases
{
    private const int Upper = ThunkCache.UpperHalf;

    /// <summary>Binds, or answers false.</summary>
    public static bool Bind(in Instruction instruction, byte* bytes, Insn* insn, ThunkCache thunks)
    {
        delegate*<CpuContext*, Insn*, Status> handler = Choose(instruction);
        if (handler == null)
        {
            return XsaveUnit.Bind(instruction, insn) || MaskedMemory.Bind(instruction, insn);
        }

        VectorUnit.ResolveRegisters(instruction, insn);
        insn->Handler = handler;
        return true;
    }

    private static delegate*<CpuContext*, Insn*, Status> Choose(in Instruction instruction)
    {
        bool loads = instruction.OpCount > 1 && instruction.Op1Kind == OpKind.Memory;
        bool stores = instruction.OpCount > 0 && instruction.Op0Kind == OpKind.Memory;
        switch (instruction.Code)
        {
            case Code.Movups_xmm_xmmm128 or Code.Movupd_xmm_xmmm128 or Code.Movdqu_xmm_xmmm128
                or Code.Lddqu_xmm_m128:
                return loads ? &Load16 : &Move16;
            case Code.Movaps_xmm_xmmm128 or Code.Movapd_xmm_xmmm128 or Code.Movdqa_xmm_xmmm128
                or Code.Movntdqa_xmm_m128:
                return loads ? &LoadAligned16 : &Move16;
            case Code.Movups_xmmm128_xmm or Code.Movupd_xmmm128_xmm or Code.Movdqu_xmmm128_xmm:
                return stores ? &Store16 : &Move16;
            case Code.Movaps_xmmm128_xmm or Code.Movapd_xmmm128_xmm or Code.Movdqa_xmmm128_xmm
                or Code.Movntps_m128_xmm or Code.Movntpd_m128_xmm or Code.Movntdq_m128_xmm:
                return stores ? &StoreAligned16 : &Move16;
            case Code.Movss_xmm_xmmm32 or Code.Movd_xmm_rm32 when loads:
                return &LoadScalar<uint>;
            case Code.Movsd_xmm_xmmm64 or Code.Movq_xmm_xmmm64 or Code.Movq_xmm_rm64 when loads:
                return &LoadScalar<ulong>;
            case Code.Movss_xmmm32_xmm or Code.Movd_rm32_xmm when stores:
                return &StoreScalar<uint>;
            case Code.Movsd_xmmm64_xmm or Code.Movq_xmmm64_xmm or Code.Movq_rm64_xmm or Code.Movlps_m64_xmm
                or Code.Movlpd_m64_xmm when stores:
                return &StoreScalar<ulong>;
            case Code.Pxor_xmm_xmmm128 or Code.Xorps_xmm_xmmm128 or Code.Xorpd_xmm_xmmm128
                when !loads && instruction.Op0Register == instruction.Op1Register:
                return &Clear16;
            case Code.VEX_Vzeroupper:
                return &Vzeroupper;
            case Code.VEX_Vzeroall:
                return &Vzeroall;
            case Code.Ldmxcsr_m32:
                return &Ldmxcsr<VectorUnit.SseGate>;
            case Code.VEX_Vldmxcsr_m32:
                return &Ldmxcsr<VectorUnit.AvxGate>;
            case Code.Stmxcsr_m32:
                return &Stmxcsr<VectorUnit.SseGate>;
            case Code.VEX_Vstmxcsr_m32:
                return &Stmxcsr<VectorUnit.AvxGate>;
            case Code.Emms:
                return &Mmx.Emms;
            case Code.Movnti_m32_r32:
                return &StoreGeneral<uint>;
            case Code.Movnti_m64_r64:
                return &StoreGeneral<ulong>;
            case Code.Prefetchnta_m8 or Code.Prefetcht0_m8 or Code.Prefetcht1_m8 or Code.Prefetcht2_m8
                or Code.Prefetchw_m8 or Code.Prefetch_m8 or Code.Prefetchwt1_m8:
                return &Nothing;
            case Code.Crc32_r32_rm8 or Code.Crc32_r64_rm8:
                return loads ? &Crc32Memory<byte> : &Crc32Register<byte>;
            case Code.Crc32_r32_rm16:
                return loads ? &Crc32Memory<ushort> : &Crc32Register<ushort>;
            case Code.Crc32_r32_rm32:
                return loads ? &Crc32Memory<uint> : &Crc32Register<uint>;
            case Code.Crc32_r64_rm64:
                return loads ? &Crc32Memory<ulong> : &Crc32Register<ulong>;
            default:
                return null;
        }
    }

    private static Status Nothing(CpuContext* cpu, Insn* insn) => Status.Next;

    private static Status Move16(CpuContext* cpu, Insn* insn)
    {
        if (!VectorUnit.SseReady(cpu))
        {
            return VectorUnit.SseNotReady(cpu);
        }

        // SAFETY: R0 and R1 are offsets of XMM registers in the context: 16 bytes, aligned to 16.
        *(Vector128<byte>*)((byte*)cpu + insn->R0) = *(Vector128<byte>*)((byte*)cpu + insn->R1);
        return Status.Next;
    }

    private static Status Clear16(CpuContext* cpu, Insn* insn)
    {
        if (!VectorUnit.SseReady(cpu))
        {
            return VectorUnit.SseNotReady(cpu);
        }

        // SAFETY: as in Move16.
        *(Vector128<byte>*)((byte*)cpu + insn->R0) = default;
        return Status.Next;
    }

    private static Status Load16(CpuContext* cpu, Insn* insn) => LoadVector(cpu, insn, 0);

    private static Status LoadAligned16(CpuContext* cpu, Insn* insn) => LoadVector(cpu, insn, 15);

    private static Status Store16(CpuContext* cpu, Insn* insn) => StoreVector(cpu, insn, 0);

    private static Status StoreAligned16(CpuContext* cpu, Insn* insn) => StoreVector(cpu, insn, 15);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Status LoadVector(CpuContext* cpu, Insn* insn, uint alignment)
    {
        if (!VectorUnit.SseReady(cpu))
        {
            return VectorUnit.SseNotReady(cpu);
        }

        if (!Mem.Address(cpu, insn, 16, write: false, out ulong linear))
        {
            return Status.Fault;
        }

        if ((linear & alignment) != 0)
        {
            return Faults.Gp(cpu);
        }

        byte* pointer = Mem.ReadPointer(cpu, linear, 16);
        Vector128<byte> value;
        if (pointer != null)
        {
            value = *(Vector128<byte>*)pointer;
        }
        else if (!Mem.ReadBytes(cpu, linear, (byte*)&value, 16))
        {
            return Status.Fault;
        }

        // SAFETY: as in Move16.
        *(Vector128<byte>*)((byte*)cpu + insn->R0) = value;
        return Status.Next;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Status StoreVector(CpuContext* cpu, Insn* insn, uint alignment)
    {
        if (!VectorUnit.SseReady(cpu))
        {
            return VectorUnit.SseNotReady(cpu);
        }

        if (!Mem.Address(cpu, insn, 16, write: true, out ulong linear))
        {
            return Status.Fault;
        }

        if ((linear & alignment) != 0)
        {
            return Faults.Gp(cpu);
        }

        // SAFETY: as in Move16.
        byte* from = (byte*)cpu + insn->R1;
        byte* pointer = Mem.WritePointer(cpu, linear, 16);
        if (pointer != null)
        {
            *(Vector128<byte>*)pointer = *(Vector128<byte>*)from;
            return Status.Next;
        }

        return Mem.WriteBytes(cpu, linear, from, 16) ? Status.Next : Status.Fault;
    }

    // Loads of scalars clear the rest of the XMM register.
    private static Status LoadScalar<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged, IBinaryInteger<T>
    {
        if (!VectorUnit.SseReady(cpu))
        {
            return VectorUnit.SseNotReady(cpu);
        }

        if (!Mem.Address(cpu, insn, (uint)sizeof(T), write: false, out ulong linear) ||
            !Mem.Read(cpu, linear, out T value))
        {
            return Status.Fault;
        }

        // SAFETY: an XMM register of the context is two words.
        var to = (ulong*)((byte*)cpu + insn->R0);
        to[0] = ulong.CreateTruncating(value);
        to[1] = 0;
        return Status.Next;
    }

    private static Status StoreScalar<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!VectorUnit.SseReady(cpu))
        {
            return VectorUnit.SseNotReady(cpu);
        }

        return StoreGeneral<T>(cpu, insn);
    }

    // SAFETY: R1 is the offset of a vector register in the context, of at least sizeof(T) bytes.
    private static Status StoreGeneral<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged =>
        Mem.Address(cpu, insn, (uint)sizeof(T), write: true, out ulong linear) &&
        Mem.Write(cpu, linear, *(T*)((byte*)cpu + insn->R1))
            ? Status.Next
            : Status.Fault;

    private static Status Vzeroupper(CpuContext* cpu, Insn* insn)
    {
        if (!VectorUnit.AvxReady(cpu))
        {
            return VectorUnit.AvxNotReady(cpu);
        }

        // Outside 64-bit mode only registers 0 to 7 are reached.
        uint bytes = (insn->Flags & InsnFlags.Long) != 0 ? 256u : 128u;
        Unsafe.InitBlockUnaligned(cpu->Xsave + XsaveLayout.YmmHigh, 0, bytes);
        return Status.Next;
    }

    private static Status Vzeroall(CpuContext* cpu, Insn* insn)
    {
        Status status = Vzeroupper(cpu, insn);
        if (status == Status.Next)
        {
            uint bytes = (insn->Flags & InsnFlags.Long) != 0 ? 256u : 128u;
            Unsafe.InitBlockUnaligned(cpu->Xsave + XsaveLayout.Xmm, 0, bytes);
        }

        return status;
    }

    private static Status Ldmxcsr<TGate>(CpuContext* cpu, Insn* insn)
        where TGate : struct, VectorUnit.IGate
    {
        if (!TGate.Ready(cpu))
        {
            return TGate.NotReady(cpu);
        }

        if (!Mem.Address(cpu, insn, 4, write: false, out ulong linear) || !Mem.Read(cpu, linear, out uint value))
        {
            return Status.Fault;
        }

        if ((value & ~XsaveUnit.MxcsrMask) != 0)
        {
            return Faults.Gp(cpu);
        }

        cpu->Mxcsr = value;
        return Status.Next;
    }

    private static Status Stmxcsr<TGate>(CpuContext* cpu, Insn* insn)
        where TGate : struct, VectorUnit.IGate
    {
        if (!TGate.Ready(cpu))
        {
            return TGate.NotReady(cpu);
        }

        return Mem.Address(cpu, insn, 4, write: true, out ulong linear) && Mem.Write(cpu, linear, cpu->Mxcsr)
            ? Status.Next
            : Status.Fault;
    }

    private static Status Crc32Register<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        // SAFETY: general registers of the context, of 8 bytes; AH to DH are byte 1 of theirs.
        byte* c = (byte*)cpu;
        var to = (ulong*)(c + insn->R0);
        *to = Crc32(*(uint*)to, *(T*)(c + insn->R1));
        return Status.Next;
    }

    private static Status Crc32Memory<T>(CpuContext* cpu, Insn* insn)
        where T : unmanaged
    {
        if (!Mem.Address(cpu, insn, (uint)sizeof(T), write: false, out ulong linear) ||
            !Mem.Read(cpu, linear, out T value))
        {
            return Status.Fault;
        }

        // SAFETY: a general register of the context.
        var to = (ulong*)((byte*)cpu + insn->R0);
        *to = Crc32(*(uint*)to, value);
        return Status.Next;
    }

    private static uint Crc32<T>(uint crc, T value)
        where T : unmanaged
    {
        if (sizeof(T) == 1)
        {
            return BitOperations.Crc32C(crc, *(byte*)&value);
        }

        if (sizeof(T) == 2)
        {
            return BitOperations.Crc32C(crc, *(ushort*)&value);
        }

        return sizeof(T) == 4 ? BitOperations.Crc32C(crc, *(uint*)&value) : BitOperations.Crc32C(crc, *(ulong*)&value);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;
using Iced.Intel;

namespace Vmm.X86;

// Theory. The vector unit is everything whose state lives in the XSAVE area: x87, MMX, SSE and AVX. Results come from
// native thunks (Native/ThunkCache.cs); what is written here is what a thunk cannot know: whether the guest's system
// registers allow the instruction, where its memory operand is, and which exceptions the guest wants to see.
//
// Order of checks, as processors do it (SDM 3A table 6-2): #UD (CR0.EM, CR4.OSFXSR, CR4.OSXSAVE, XCR0), #NM (CR0.TS),
// pending x87 exception (#MF) for x87 and MMX, then the memory operand (#GP alignment, #SS/#GP, #PF, #AC), then numeric
// exceptions (#XM at once, x87's at the next waiting instruction).
//
// Files: VectorUnit (binding, SSE and AVX), Mmx, X87, XsaveUnit (FXSAVE and the XSAVE family), MaskedMemory (gathers and
// masked moves). The XSAVE area in the context is in standard format; XSTATE_BV there is not maintained while running:
// a component counts as in use when its bytes differ from the initial configuration (XsaveState.InUse), which is one of
// the answers that SDM 1 13.6 allows and needs no bookkeeping per instruction.

/// <summary>Binds and executes SSE and AVX instructions.</summary>
internal static unsafe class VectorUnit
{
    private const ulong EmOrTs = Cr0.Em | Cr0.Ts;
    private const uint AllMasks = 0x1F80;
    private const uint FlushToZero = 0x8000;
    private const uint UnderflowMask = 0x800;

    /// <summary>State for SSE is there.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool SseReady(CpuContext* cpu) => (cpu->Cr0 & EmOrTs) == 0 && (cpu->Cr4 & Cr4.OsFxsr) != 0;

    /// <summary>What an SSE instruction raises when <see cref="SseReady"/> is false.</summary>
    public static Status SseNotReady(CpuContext* cpu) =>
        (cpu->Cr0 & Cr0.Em) != 0 || (cpu->Cr4 & Cr4.OsFxsr) == 0 ? Faults.Ud(cpu) : Faults.Nm(cpu);

    /// <summary>State for AVX is there and the mode has VEX encodings (SDM 2A 2.3.13).</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool AvxReady(CpuContext* cpu) =>
        (cpu->Cr0 & Cr0.Ts) == 0 && (cpu->Cr4 & Cr4.OsXsave) != 0 &&
        (cpu->Xcr0 & (XsaveLayout.SseBit | XsaveLayout.AvxBit)) == (XsaveLayout.SseBit | XsaveLayout.AvxBit) &&
        cpu->Mode >= ProcessorMode.Protected;

    /// <summary>What a VEX instruction raises when <see cref="AvxReady"/> is false.</summary>
    public static Status AvxNotReady(CpuContext* cpu)
    {
        bool enabled = (cpu->Cr4 & Cr4.OsXsave) != 0 && cpu->Mode >= ProcessorMode.Protected &&
            (cpu->Xcr0 & (XsaveLayout.SseBit | XsaveLayout.AvxBit)) == (XsaveLayout.SseBit | XsaveLayout.AvxBit);
        return enabled ? Faults.Nm(cpu) : Faults.Ud(cpu);
    }

    /// <summary>Offset of XMMn in the context.</summary>
    public static int XmmOffset(int number) => CpuContext.XsaveOffset + XsaveLayout.Xmm + (16 * number);

    /// <summary>Puts the constants of the work area in place; call once per context.</summary>
    public static void Initialise(CpuContext* cpu)
    {
        VectorScratch.Of(cpu)->HostMxcsr = VectorScratch.HostMxcsrValue;
        VectorScratch.Of(cpu)->HostFcw = XsaveLayout.FcwInit;
    }

    /// <summary>
    /// Binds an instruction of the vector unit. Operands that are registers and the memory operand are expected to be
    /// resolved as for integer instructions; vector registers are resolved here.
    /// </summary>
    /// <returns>False when the instruction is none of the vector unit's.</returns>
    public static bool Bind(in Instruction instruction, byte* bytes, Insn* insn, ThunkCache thunks)
    {
        Code code = instruction.Code;
        if (SpecialCases.Bind(instruction, bytes, insn, thunks))
        {
            return true;
        }

        if (SimdTraits.IsX87(instruction))
        {
            return X87.Bind(instruction, bytes, insn, thunks);
        }

        bool isVector = false;
        bool isMmx = false;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            if (instruction.GetOpKind(i) == OpKind.Register)
            {
                Register register = instruction.GetOpRegister(i);
                isMmx |= register.IsMM();
                isVector |= register.IsXMM() || register.IsYMM() || register.IsMM();
            }
        }

        // From memory to a general register: no vector register among the operands.
        isVector |= code.Mnemonic() is Mnemonic.Cvtss2si or Mnemonic.Cvttss2si or Mnemonic.Cvtsd2si
            or Mnemonic.Cvttsd2si or Mnemonic.Vcvtss2si or Mnemonic.Vcvttss2si or Mnemonic.Vcvtsd2si
            or Mnemonic.Vcvttsd2si;

        EncodingKind encoding = instruction.OpCode.Encoding;
        if (!isVector || encoding is not (EncodingKind.Legacy or EncodingKind.VEX))
        {
            return false;
        }

        ResolveRegisters(instruction, insn);
        Thunk* thunk = thunks.Get(instruction);
        if (thunk == null)
        {
            insn->Handler = &Undefined;
            return true;
        }

        insn->Aux = thunk;
        if (isMmx)
        {
            Mmx.Bind(insn, thunk, usesXmm: code.Mnemonic() is Mnemonic.Cvtpi2ps or Mnemonic.Cvtps2pi
                or Mnemonic.Cvttps2pi or Mnemonic.Cvtpi2pd or Mnemonic.Cvtpd2pi or Mnemonic.Cvttpd2pi
                or Mnemonic.Movq2dq or Mnemonic.Movdq2q);
        }
        else if (encoding == EncodingKind.VEX)
        {
            BindSimd<AvxGate>(insn, thunk);
        }
        else
        {
            BindSimd<SseGate>(insn, thunk);
        }

        return true;
    }

    /// <summary>Raises #UD.</summary>
    public static Status Undefined(CpuContext* cpu, Insn* insn) => Faults.Ud(cpu);

    /// <summary>Sets R0, R1, R2 and the low 16 bits of Immediate to the offsets of the explicit operands.</summary>
    public static void ResolveRegisters(in Instruction instruction, Insn* insn)
    {
        for (int i = 0; i < instruction.OpCount && i < 4; i++)
        {
            ushort offset = (ushort)(instruction.GetOpKind(i) == OpKind.Register
                ? RegisterOffset(instruction.GetOpRegister(i))
                : 0);
            switch (i)
            {
                case 0:
                    insn->R0 = offset;
                    break;
                case 1:
                    insn->R1 = offset;
                    break;
                case 2:
                    insn->R2 = offset;
                    break;
                default:
                    insn->Immediate = offset;
                    break;
            }
        }
    }

    private static int RegisterOffset(Register register)
    {
        if (register.IsXMM())
        {
            return XmmOffset(register - Register.XMM0);
        }

        if (register.IsYMM())
        {
            return XmmOffset(register - Register.YMM0);
        }

        if (register.IsMM())
        {
            return CpuContext.XsaveOffset + XsaveLayout.St + (16 * (register - Register.MM0));
        }

        if (!register.IsGPR())
        {
            return 0;
        }

        int high = register is >= Register.AH and <= Register.BH ? 1 : 0;
        return (8 * (register.GetFullRegister() - Register.RAX)) + high;
    }

    private static void BindSimd<TGate>(Insn* insn, Thunk* thunk)
        where TGate : struct, IGate
    {
        bool usesMxcsr = thunk->Careful != null;
        if (thunk->MemoryOperand < 0)
        {
            insn->Handler = usesMxcsr ? &FloatRegister<TGate>
                : thunk->WritesFlags ? &FlagsRegister<TGate> : &Register_<TGate>;
        }
        else if (thunk->IsStore)
        {
            insn->Handler = usesMxcsr ? &FloatStore<TGate> : &Store<TGate>;
        }
        else if (usesMxcsr)
        {
            insn->Handler = &FloatLoad<TGate>;
        }
        else
        {
            insn->Handler = thunk->MemoryOperand == 1 && !thunk->WritesFlags ? &Load<TGate> : &LoadAny<TGate>;
        }
    }

    // Registers only, no MXCSR, no flags.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Status Register_<TGate>(CpuContext* cpu, Insn* insn)
        where TGate : struct, IGate
    {
        if (!TGate.Ready(cpu))
        {
            return TGate.NotReady(cpu);
        }

        // SAFETY: R0 to R2 and Immediate are offsets of registers in the context; Aux is a thunk of the cache, which
        // outlives all blocks, for exactly these operands.
        byte* c = (byte*)cpu;
        ((Thunk*)insn->Aux)->Fast(c + insn->R0, c + insn->R1, c + insn->R2, c + (ushort)insn->Immediate, cpu);
        return Status.Next;
    }

    private static Status FlagsRegister<TGate>(CpuContext* cpu, Insn* insn)
        where TGate : struct, IGate
    {
        Status status = Register_<TGate>(cpu, insn);
        if (status == Status.Next)
        {
            Flags.SetArithmetic(cpu, VectorScratch.Of(cpu)->Flags);
        }

        return status;
    }

    // Operand 1 is memory that is read; no MXCSR, no flags: the bulk of SSE code.
    private static Status Load<TGate>(CpuContext* cpu, Insn* insn)
        where TGate : struct, IGate
    {
        if (!TGate.Ready(cpu))
        {
            return TGate.NotReady(cpu);
        }

        // SAFETY: the binder put a thunk of the cache into Aux, which outlives all blocks. It reads and writes
        // registers at their offsets in the context, and memory of MemoryBytes that ReadOperand or the scratch area
        // provides.
        var thunk = (Thunk*)insn->Aux;
        byte* memory = ReadOperand(cpu, insn, thunk);
        if (memory == null)
        {
            return Status.Fault;
        }

        byte* c = (byte*)cpu;
        thunk->Fast(c + insn->R0, memory, c + insn->R2, c + (ushort)insn->Immediate, cpu);
        return Status.Next;
    }

    private static Status LoadAny<TGate>(CpuContext* cpu, Insn* insn)
        where TGate : struct, IGate
    {
        if (!TGate.Ready(cpu))
        {
            return TGate.NotReady(cpu);
        }

        // SAFETY: as in Load.
        var thunk = (Thunk*)insn->Aux;
        byte* memory = ReadOperand(cpu, insn, thunk);
        if (memory == null)
        {
            return Status.Fault;
        }

        byte* c = (byte*)cpu;
        int at = thunk->MemoryOperand;
        thunk->Fast(
            at == 0 ? memory : c + insn->R0, at == 1 ? memory : c + insn->R1, at == 2 ? memory : c + insn->R2,
            at == 3 ? memory : c + (ushort)insn->Immediate, cpu);
        if (thunk->WritesFlags)
        {
            Flags.SetArithmetic(cpu, VectorScratch.Of(cpu)->Flags);
        }

        return Status.Next;
    }

    // Operand 0 is memory that is written; nothing else changes, so a failing store has no side effects.
    private static Status Store<TGate>(CpuContext* cpu, Insn* insn)
        where TGate : struct, IGate
    {
        if (!TGate.Ready(cpu))
        {
            return TGate.NotReady(cpu);
        }

        // SAFETY: as in Load.
        var thunk = (Thunk*)insn->Aux;
        uint size = (uint)thunk->MemoryBytes;
        if (!Mem.Address(cpu, insn, size, write: true, out ulong linear))
        {
            return Status.Fault;
        }

        if ((linear & ((uint)thunk->Alignment - 1)) != 0)
        {
            return Faults.Gp(cpu);
        }

        byte* c = (byte*)cpu;
        byte* memory = Mem.WritePointer(cpu, linear, size);
        if (memory != null)
        {
            thunk->Fast(memory, c + insn->R1, c + insn->R2, c + (ushort)insn->Immediate, cpu);
            return Status.Next;
        }

        memory = VectorScratch.Of(cpu)->Memory;
        thunk->Fast(memory, c + insn->R1, c + insn->R2, c + (ushort)insn->Immediate, cpu);
        return Mem.WriteBytes(cpu, linear, memory, (int)size) ? Status.Next : Status.Fault;
    }

    private static Status FloatRegister<TGate>(CpuContext* cpu, Insn* insn)
        where TGate : struct, IGate
    {
        if (!TGate.Ready(cpu))
        {
            return TGate.NotReady(cpu);
        }

        byte* c = (byte*)cpu;
        return RunFloat(
            cpu, (Thunk*)insn->Aux, c + insn->R0, c + insn->R1, c + insn->R2, c + (ushort)insn->Immediate);
    }

    private static Status FloatLoad<TGate>(CpuContext* cpu, Insn* insn)
        where TGate : struct, IGate
    {
        if (!TGate.Ready(cpu))
        {
            return TGate.NotReady(cpu);
        }

        // SAFETY: as in Load.
        var thunk = (Thunk*)insn->Aux;
        byte* memory = ReadOperand(cpu, insn, thunk);
        if (memory == null)
        {
            return Status.Fault;
        }

        byte* c = (byte*)cpu;
        int at = thunk->MemoryOperand;
        return RunFloat(
            cpu, thunk, at == 0 ? memory : c + insn->R0, at == 1 ? memory : c + insn->R1,
            at == 2 ? memory : c + insn->R2, at == 3 ? memory : c + (ushort)insn->Immediate);
    }

    // VCVTPS2PH to memory: the store must be possible before MXCSR's flags change.
    private static Status FloatStore<TGate>(CpuContext* cpu, Insn* insn)
        where TGate : struct, IGate
    {
        if (!TGate.Ready(cpu))
        {
            return TGate.NotReady(cpu);
        }

        // SAFETY: as in Load.
        var thunk = (Thunk*)insn->Aux;
        int size = thunk->MemoryBytes;
        if (!Mem.Address(cpu, insn, (uint)size, write: true, out ulong linear) ||
            !Mem.ProbeWrite(cpu, linear, size))
        {
            return Status.Fault;
        }

        byte* c = (byte*)cpu;
        byte* memory = VectorScratch.Of(cpu)->Memory;
        Status status = RunFloat(cpu, thunk, memory, c + insn->R1, c + insn->R2, c + (ushort)insn->Immediate);
        return status != Status.Next || Mem.WriteBytes(cpu, linear, memory, size) ? status : Status.Fault;
    }

    /// <summary>
    /// #GP for a misaligned area of FXSAVE and XSAVE, or #AC where that is enabled and not even doublewords are aligned;
    /// one on the stack that is not canonical either raises #SS.
    /// </summary>
    public static Status Misaligned(CpuContext* cpu, ulong linear)
    {
        bool isCanonical = cpu->Mode != ProcessorMode.Long || Paging.IsCanonical(cpu, linear);
        if (isCanonical && (linear & 3) != 0 && Paging.AlignmentChecked(cpu))
        {
            return Faults.Ac(cpu);
        }

        Faults.Gp(cpu);
        cpu->Fault.NonCanonical = !isCanonical;
        return Status.Fault;
    }

    /// <summary>Finds the bytes of a memory operand that is read, or raises and answers null.</summary>
    public static byte* ReadOperand(CpuContext* cpu, Insn* insn, Thunk* thunk)
    {
        uint size = (uint)thunk->MemoryBytes;
        if (!Mem.Address(cpu, insn, size, write: false, out ulong linear))
        {
            return null;
        }

        if ((linear & ((uint)thunk->Alignment - 1)) != 0)
        {
            Faults.Gp(cpu);
            return null;
        }

        byte* memory = Mem.ReadPointer(cpu, linear, size);
        if (memory != null && ((ulong)memory & ((uint)thunk->HostAlignment - 1)) == 0)
        {
            return memory;
        }

        memory = VectorScratch.Of(cpu)->Memory;
        return Mem.ReadBytes(cpu, linear, memory, (int)size) ? memory : null;
    }

    /// <summary>Runs a thunk that uses MXCSR; raises #XM when the guest has an occurring exception unmasked.</summary>
    public static Status RunFloat(CpuContext* cpu, Thunk* thunk, void* p0, void* p1, void* p2, void* p3)
    {
        uint mxcsr = cpu->Mxcsr;
        if ((mxcsr & AllMasks) == AllMasks)
        {
            thunk->Fast(p0, p1, p2, p3, cpu);
        }
        else if (!RunCareful(cpu, thunk, mxcsr, p0, p1, p2, p3))
        {
            return Faults.Xm(cpu);
        }

        if (thunk->WritesFlags)
        {
            Flags.SetArithmetic(cpu, VectorScratch.Of(cpu)->Flags);
        }

        return Status.Next;
    }

    // Runs with everything masked and looks at the flags. One case differs between masked and unmasked: a tiny but exact
    // result sets UE only when underflow is unmasked (SDM 1 4.9.1.5). With flush-to-zero, which an unmasked underflow
    // overrides anyway, every tiny result sets UE: so that is how the run is made, and when it shows UE nothing is
    // committed.
    private static bool RunCareful(
        CpuContext* cpu, Thunk* thunk, uint mxcsr, void* p0, void* p1, void* p2, void* p3)
    {
        const uint Flags = 0x3F;
        const uint PreComputation = 7;
        const uint Underflow = 0x10;
        VectorScratch* scratch = VectorScratch.Of(cpu);
        bool seesTiny = (mxcsr & UnderflowMask) == 0;
        uint control = (mxcsr & ~Flags) | AllMasks;
        scratch->MxcsrIn = seesTiny ? control | FlushToZero : control;
        uint unmasked = (~mxcsr >> 7) & Flags;
        // SAFETY: p1 is the source of VCVTPS2PH where HalfElements is not 0: a register of the context.
        bool isTinyHalf = seesTiny && HasExactTinyHalf(thunk, (byte*)p1, mxcsr);
        scratch->CommitUnless = isTinyHalf ? AllMasks : unmasked;
        uint raised = thunk->Careful(p0, p1, p2, p3, cpu);
        raised = (raised & unmasked) | (isTinyHalf ? Underflow | (scratch->MxcsrOut & unmasked) : 0);
        if (raised == 0)
        {
            cpu->Mxcsr = mxcsr | (scratch->MxcsrOut & Flags);
            return true;
        }

        if (seesTiny)
        {
            // Again without flush-to-zero, never committing, for the precision flag. Where the unmasked exception is an
            // overflow or underflow, processors state whether the result is inexact for an unbounded exponent, which the
            // masked run does not tell: PE may then be set where a processor would leave it (results are unaffected).
            scratch->MxcsrIn = control & ~FlushToZero;
            scratch->CommitUnless = AllMasks;
            thunk->Careful(p0, p1, p2, p3, cpu);
        }

        // An exception before the computation hides those behind it.
        uint flags = (scratch->MxcsrOut & Flags) | (raised & Underflow);
        if ((raised & PreComputation) != 0)
        {
            flags &= PreComputation;
        }

        cpu->Mxcsr = mxcsr | flags;
        return false;
    }

    // Flush-to-zero does not act on conversions to half precision (SDM 2C, VCVTPS2PH), so their exact tiny results are
    // found by looking at the sources: not zero, below 2^-14, a multiple of 2^-24.
    private static bool HasExactTinyHalf(Thunk* thunk, byte* source, uint mxcsr)
    {
        const uint DenormalsAreZero = 0x40;
        for (int i = 0; i < thunk->HalfElements; i++)
        {
            // SAFETY: elements 0 to 3 lie in the XMM part, 4 to 7 at UpperHalf behind it.
            uint bits = *(uint*)(source + (i < 4 ? 4 * i : ThunkCache.UpperHalf + (4 * i) - 16)) & 0x7FFFFFFF;
            int exponent = (int)(bits >> 23) - 127;
            bool isTiny = bits != 0 && exponent < -14 && (bits >= 0x800000 || (mxcsr & DenormalsAreZero) == 0);
            uint significand = (bits & 0x7FFFFF) | 0x800000;
            int fraction = -1 - exponent;
            if (isTiny && fraction <= 23 && (significand & ((1u << fraction) - 1)) == 0)
            {
                return true;
            }
        }

        return false;
    }

    /// <summary>Compile-time choice of the availability check.</summary>
    internal interface IGate
    {
        /// <summary>The instruction may execute.</summary>
        static abstract bool Ready(CpuContext* cpu);

        /// <summary>Raises what stops it.</summary>
        static abstract Status NotReady(CpuContext* cpu);
    }

    internal readonly struct SseGate : IGate
    {
        public static bool Ready(CpuContext* cpu) => SseReady(cpu);

        public static Status NotReady(CpuContext* cpu) => SseNotReady(cpu);
    }

    internal readonly struct AvxGate : IGate
    {
        public static bool Ready(CpuContext* cpu) => AvxReady(cpu);

        public static Status NotReady(CpuContext* cpu) => AvxNotReady(cpu);
    }
}

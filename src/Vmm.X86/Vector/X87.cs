// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using Iced.Intel;

namespace Vmm.X86;

// x87. Exceptions of this unit are deferred: an instruction that raises an unmasked one leaves ES set in the status word,
// and the next *waiting* instruction takes #MF. A thunk therefore runs the guest's instruction under the guest's own
// control word: FXRSTOR, the instruction, FXSAVE (which does not wait), FNINIT. Nothing in it can trap, and masked and
// unmasked responses are both the processor's own.
//
// Instruction and operand pointers cannot come from the thunk, whose addresses are the host's. They are recorded here for
// every non-control instruction: FIP the instruction's offset, FDP the operand's offset, FOP the low 11 opcode bits.
// FCS and FDS are always 0, as on every processor with CPUID.(7,0):EBX[13] set. Intel's current processors update FDP
// only for unmasked exceptions and FOP likewise (CPUID.(7,0):EBX[6]); AMD's save the three in FXSAVE and XSAVE only while
// ES is set, unless CPUID 80000008:EBX[2] is set. Software that can run on both cannot tell.
//
// With CR0.NE clear a pending exception drives FERR#, which chip sets turn into IRQ 13 (SDM 1 D.2.1).

/// <summary>x87 instructions.</summary>
internal static unsafe class X87
{
    private const ushort Exceptions = 0x3F;
    private const ushort ErrorSummary = 0x80;
    private const ushort Busy = 0x8000;
    private const int RoundedUp = 0x200;
    private const ushort TopMask = 0x3800;
    private const int Slots = CpuContext.XsaveOffset + XsaveLayout.St;

    /// <summary>Binds an x87 instruction.</summary>
    public static bool Bind(in Instruction instruction, byte* bytes, Insn* insn, ThunkCache thunks)
    {
        insn->Immediate = Opcode(bytes);
        insn->Handler = Control(instruction.Mnemonic, instruction.Code);
        if (insn->Handler != null)
        {
            return true;
        }

        Thunk* thunk = thunks.Get(instruction);
        if (thunk == null)
        {
            insn->Handler = &VectorUnit.Undefined;
            return true;
        }

        insn->Aux = thunk;
        insn->Handler = thunk->MemoryOperand < 0 ? &Register : thunk->IsStore ? &Store : &Load;
        BindMove(instruction, insn);
        return true;
    }

    /// <summary>
    /// An unmasked exception waits: then the instruction has been dealt with, by #MF or by executing it in spite of the
    /// exception, and <paramref name="status"/> is the handler's answer.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool HasPending(CpuContext* cpu, Insn* insn, out Status status)
    {
        status = Status.Next;
        if ((cpu->Fsw & ~cpu->Fcw & Exceptions) == 0)
        {
            return false;
        }

        status = Pending(cpu, insn);
        return true;
    }

    /// <summary>Rewrites the image for another TOP; the physical registers keep their contents.</summary>
    public static void RotateToTop(CpuContext* cpu, int top)
    {
        int shift = (top - (cpu->Fsw >> 11)) & 7;
        if (shift != 0)
        {
            var old = stackalloc ulong[16];
            // SAFETY: eight slots of 16 bytes at Slots are 16 words.
            var slots = (ulong*)((byte*)cpu + Slots);
            for (int i = 0; i < 16; i++)
            {
                old[i] = slots[i];
            }

            for (int i = 0; i < 8; i++)
            {
                int from = (i + shift) & 7;
                slots[2 * i] = old[2 * from];
                slots[(2 * i) + 1] = old[(2 * from) + 1];
            }
        }

        cpu->Fsw = (ushort)((cpu->Fsw & ~TopMask) | (top << 11));
    }

    /// <summary>Makes ES and B agree with flags and masks, after either was loaded.</summary>
    public static void UpdateSummary(CpuContext* cpu)
    {
        bool pending = (cpu->Fsw & ~cpu->Fcw & Exceptions) != 0;
        cpu->Fsw = (ushort)(pending ? cpu->Fsw | ErrorSummary | Busy : cpu->Fsw & ~(ErrorSummary | Busy));
    }

    /// <summary>FNINIT's state (SDM 2A, FINIT). The registers keep their contents.</summary>
    public static void Initialise(CpuContext* cpu)
    {
        cpu->Fcw = XsaveLayout.FcwInit;
        cpu->Fsw = 0;
        cpu->Ftw = 0;
        cpu->Fop = 0;
        cpu->Fip = 0;
        cpu->Fdp = 0;
    }

    // With CR0.NE clear the instruction runs as under IGNNE#. The pending flags must not reach the host's FPU, where
    // they would trap: they are taken out of the status word for the time of one execution.
    [MethodImpl(MethodImplOptions.NoInlining)]
    private static Status Pending(CpuContext* cpu, Insn* insn)
    {
        if ((cpu->Cr0 & Cr0.Ne) != 0)
        {
            return Faults.Mf(cpu);
        }

        FerrPort.Assert(cpu);
        int flags = cpu->Fsw & Exceptions;
        cpu->Fsw = (ushort)(cpu->Fsw & ~(Exceptions | ErrorSummary | Busy));
        Status status = insn->Handler(cpu, insn);
        cpu->Fsw = (ushort)(cpu->Fsw | flags);
        UpdateSummary(cpu);
        return status;
    }

    private static bool Ready(CpuContext* cpu, Insn* insn, out Status status)
    {
        if ((cpu->Cr0 & (Cr0.Em | Cr0.Ts)) != 0)
        {
            status = Faults.Nm(cpu);
            return false;
        }

        return !HasPending(cpu, insn, out status);
    }

    private static ulong Opcode(byte* bytes)
    {
        // Prefixes do not count: the escape byte is the first of D8 to DF.
        while ((*bytes & 0xF8) != 0xD8)
        {
            if (*bytes == 0x9B)
            {
                return 0;
            }

            bytes++;
        }

        return ((ulong)(bytes[0] & 7) << 8) | bytes[1];
    }

    private static Status Register(CpuContext* cpu, Insn* insn)
    {
        if (!Ready(cpu, insn, out Status status))
        {
            return status;
        }

        // SAFETY: the binder put a thunk of the cache into Aux, which outlives all blocks; its memory operand is
        // staged in the scratch area, which is larger.
        var thunk = (Thunk*)insn->Aux;
        VectorScratch* scratch = VectorScratch.Of(cpu);
        if (RunLight(cpu, thunk, null))
        {
            if (thunk->WritesFlags)
            {
                Flags.SetArithmetic(cpu, scratch->Flags);
            }

            cpu->Fip = Insn.Address(cpu, insn);
            cpu->Fop = (ushort)insn->Immediate;
            return Status.Next;
        }

        bool usesFlags = thunk->ReadsFlags || thunk->WritesFlags;
        if (usesFlags)
        {
            scratch->Flags = Flags.GetArithmetic(cpu) | Rflags.Fixed;
        }

        thunk->Fast(null, null, null, null, cpu);
        if (thunk->WritesFlags)
        {
            Flags.SetArithmetic(cpu, scratch->Flags);
        }

        Commit(cpu, scratch);
        cpu->Fip = Insn.Address(cpu, insn);
        cpu->Fop = (ushort)insn->Immediate;
        return Status.Next;
    }

    private static Status Load(CpuContext* cpu, Insn* insn)
    {
        if (!Ready(cpu, insn, out Status status))
        {
            return status;
        }

        // SAFETY: the binder put a thunk of the cache into Aux, which outlives all blocks; its memory operand is
        // staged in the scratch area, which is larger.
        var thunk = (Thunk*)insn->Aux;
        byte* memory = VectorUnit.ReadOperand(cpu, insn, thunk);
        if (memory == null)
        {
            return Status.Fault;
        }

        if (RunLight(cpu, thunk, memory))
        {
            SetPointers(cpu, insn);
            return Status.Next;
        }

        if (thunk->MemoryOperand == 0)
        {
            thunk->Fast(memory, null, null, null, cpu);
        }
        else
        {
            thunk->Fast(null, memory, null, null, cpu);
        }

        Commit(cpu, VectorScratch.Of(cpu));
        SetPointers(cpu, insn);
        return Status.Next;
    }

    private static Status Store(CpuContext* cpu, Insn* insn)
    {
        if (!Ready(cpu, insn, out Status status))
        {
            return status;
        }

        // SAFETY: the binder put a thunk of the cache into Aux, which outlives all blocks; its memory operand is
        // staged in the scratch area, which is larger.
        var thunk = (Thunk*)insn->Aux;
        int size = thunk->MemoryBytes;
        if (!Mem.Address(cpu, insn, (uint)size, write: true, out ulong linear) ||
            !Mem.ProbeWrite(cpu, linear, size))
        {
            return Status.Fault;
        }

        // An unmasked response other than to inexactness stores nothing; the thunk's processor then leaves the staged
        // bytes alone, and the status word says so.
        const ushort NoStore = 0x1F;
        VectorScratch* scratch = VectorScratch.Of(cpu);
        if (RunLight(cpu, thunk, scratch->Memory))
        {
            SetPointers(cpu, insn);
            return Mem.WriteBytes(cpu, linear, scratch->Memory, size) ? Status.Next : Status.Fault;
        }

        thunk->Fast(scratch->Memory, null, null, null, cpu);
        ushort before = cpu->Fsw;
        // SAFETY: the thunk left an FXSAVE image of 512 bytes there.
        ushort after = *(ushort*)(scratch->X87 + XsaveLayout.Fsw);
        if ((after & ~before & ~cpu->Fcw & NoStore) == 0 && !Mem.WriteBytes(cpu, linear, scratch->Memory, size))
        {
            return Status.Fault;
        }

        Commit(cpu, scratch);
        SetPointers(cpu, insn);
        return Status.Next;
    }

    // Register moves: FXCH, FLD ST(i), FST(P) ST(i).
    private static void BindMove(in Instruction instruction, Insn* insn)
    {
        if (instruction.OpCount == 0 || instruction.Op0Kind != OpKind.Register)
        {
            return;
        }

        int last = instruction.GetOpRegister(instruction.OpCount - 1) - Iced.Intel.Register.ST0;
        int first = instruction.Op0Register - Iced.Intel.Register.ST0;
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Fxch:
                insn->R0 = (ushort)last;
                insn->Handler = &Exchange;
                break;
            case Mnemonic.Fld:
                insn->R0 = (ushort)last;
                insn->Handler = &LoadRegister;
                break;
            case Mnemonic.Fst or Mnemonic.Fstp:
                insn->R0 = (ushort)first;
                insn->R1 = instruction.Mnemonic == Mnemonic.Fstp ? (ushort)1 : (ushort)0;
                insn->Handler = &StoreRegister;
                break;
        }
    }

    private static Status Exchange(CpuContext* cpu, Insn* insn)
    {
        if (!Ready(cpu, insn, out Status status))
        {
            return status;
        }

        int other = insn->R0;
        if (!IsFull(cpu, 0) || !IsFull(cpu, other))
        {
            return Register(cpu, insn);
        }

        Vector128<byte>* slots = SlotsOf(cpu);
        (slots[0], slots[other]) = (slots[other], slots[0]);
        return EndMove(cpu, insn);
    }

    private static Status LoadRegister(CpuContext* cpu, Insn* insn)
    {
        if (!Ready(cpu, insn, out Status status))
        {
            return status;
        }

        if (!IsFull(cpu, insn->R0) || IsFull(cpu, 7))
        {
            return Register(cpu, insn);
        }

        Vector128<byte> value = SlotsOf(cpu)[insn->R0];
        Push(cpu);
        SlotsOf(cpu)[0] = value;
        return EndMove(cpu, insn);
    }

    private static Status StoreRegister(CpuContext* cpu, Insn* insn)
    {
        if (!Ready(cpu, insn, out Status status))
        {
            return status;
        }

        int other = insn->R0;
        if (!IsFull(cpu, 0))
        {
            return Register(cpu, insn);
        }

        SlotsOf(cpu)[other] = SlotsOf(cpu)[0];
        cpu->Ftw |= (byte)(1 << (((cpu->Fsw >> 11) + other) & 7));
        if (insn->R1 != 0)
        {
            Pop(cpu);
        }

        return EndMove(cpu, insn);
    }

    private static Status EndMove(CpuContext* cpu, Insn* insn)
    {
        cpu->Fsw = (ushort)(cpu->Fsw & ~RoundedUp);
        cpu->Fip = Insn.Address(cpu, insn);
        cpu->Fop = (ushort)insn->Immediate;
        return Status.Next;
    }

    // SAFETY: eight slots of 16 bytes, aligned to 16, lie at Slots of the context; callers index 0 to 7.
    private static Vector128<byte>* SlotsOf(CpuContext* cpu) => (Vector128<byte>*)((byte*)cpu + Slots);

    private static bool IsFull(CpuContext* cpu, int register) =>
        (cpu->Ftw & (1 << (((cpu->Fsw >> 11) + register) & 7))) != 0;

    // The register that a push uses was ST(7); the others move up by one.
    private static void Push(CpuContext* cpu)
    {
        Vector128<byte>* slots = SlotsOf(cpu);
        Vector128<byte> last = slots[7];
        for (int i = 7; i > 0; i--)
        {
            slots[i] = slots[i - 1];
        }

        slots[0] = last;
        int top = ((cpu->Fsw >> 11) - 1) & 7;
        cpu->Fsw = (ushort)((cpu->Fsw & ~TopMask) | (top << 11));
        cpu->Ftw |= (byte)(1 << top);
    }

    private static void Pop(CpuContext* cpu)
    {
        Vector128<byte>* slots = SlotsOf(cpu);
        Vector128<byte> first = slots[0];
        for (int i = 0; i < 7; i++)
        {
            slots[i] = slots[i + 1];
        }

        slots[7] = first;
        int top = (cpu->Fsw >> 11) & 7;
        cpu->Ftw = (byte)(cpu->Ftw & ~(1 << top));
        cpu->Fsw = (ushort)((cpu->Fsw & ~TopMask) | (((top + 1) & 7) << 11));
    }

    // Everything masked and no stack fault possible: see Native/X87Light.cs.
    private static bool RunLight(CpuContext* cpu, Thunk* thunk, byte* memory)
    {
        if (thunk->LightEntry == null || (cpu->Fcw & Exceptions) != Exceptions)
        {
            return false;
        }

        X87Light* light = &thunk->Light;
        if ((light->UsesTop && !IsFull(cpu, 0)) || (light->UsesOther && !IsFull(cpu, light->Other)) ||
            (light->Result == X87Result.Pushed && IsFull(cpu, 7)))
        {
            return false;
        }

        Vector128<byte>* slots = SlotsOf(cpu);
        VectorScratch* scratch = VectorScratch.Of(cpu);
        uint status = thunk->LightEntry(slots, slots + light->Other, memory, scratch->X87, cpu);
        if (light->Result == X87Result.Pushed)
        {
            Push(cpu);
            // SAFETY: the thunk stored 10 bytes; slot 0 has 16.
            *(ulong*)slots = *(ulong*)scratch->X87;
            *((ulong*)slots + 1) = *(ushort*)(scratch->X87 + 8);
        }

        for (int i = 0; i < light->Pops; i++)
        {
            Pop(cpu);
        }

        uint defined = light->Conditions;
        cpu->Fsw = (ushort)((cpu->Fsw & ~defined) | (status & (defined | 0x7F)));
        return true;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void SetPointers(CpuContext* cpu, Insn* insn)
    {
        cpu->Fip = Insn.Address(cpu, insn);
        cpu->Fdp = Mem.Offset(cpu, insn);
        cpu->Fop = (ushort)insn->Immediate;
    }

    private static void Commit(CpuContext* cpu, VectorScratch* scratch)
    {
        // FCW, FSW and FTW, then the eight slots.
        // SAFETY: both are FXSAVE images of at least 512 bytes.
        *(uint*)cpu->Xsave = *(uint*)scratch->X87;
        cpu->Ftw = scratch->X87[XsaveLayout.Ftw];
        Unsafe.CopyBlockUnaligned(cpu->Xsave + XsaveLayout.St, scratch->X87 + XsaveLayout.St, 128);
    }

    private static delegate*<CpuContext*, Insn*, Status> Control(Mnemonic mnemonic, Code code) => mnemonic switch
    {
        Mnemonic.Wait => &Wait,
        Mnemonic.Fninit => &Fninit,
        Mnemonic.Fnclex => &Fnclex,
        Mnemonic.Fnstcw => &Fnstcw,
        Mnemonic.Fldcw => &Fldcw,
        Mnemonic.Fnstsw => code == Code.Fnstsw_AX ? &FnstswAx : &FnstswMemory,
        Mnemonic.Fnstenv => &Fnstenv,
        Mnemonic.Fldenv => &Fldenv,
        Mnemonic.Fnsave => &Fnsave,
        Mnemonic.Frstor => &Frstor,

        // 8087 and 287 interrupt and mode control: no operation since the 387.
        Mnemonic.Fneni or Mnemonic.Fndisi or Mnemonic.Fnsetpm or Mnemonic.Frstpm => &Nothing,
        _ => null,
    };

    private static bool NotAvailable(CpuContext* cpu) => (cpu->Cr0 & (Cr0.Em | Cr0.Ts)) != 0;

    private static Status Nothing(CpuContext* cpu, Insn* insn) => NotAvailable(cpu) ? Faults.Nm(cpu) : Status.Next;

    /// <summary>WAIT/FWAIT: #NM only when MP and TS are both set.</summary>
    public static Status Wait(CpuContext* cpu, Insn* insn)
    {
        const ulong Both = Cr0.Mp | Cr0.Ts;
        if ((cpu->Cr0 & Both) == Both)
        {
            return Faults.Nm(cpu);
        }

        HasPending(cpu, insn, out Status status);
        return status;
    }

    private static Status Fninit(CpuContext* cpu, Insn* insn)
    {
        if (NotAvailable(cpu))
        {
            return Faults.Nm(cpu);
        }

        // The image is in stack order: TOP becomes 0 without moving the physical registers.
        RotateToTop(cpu, 0);
        Initialise(cpu);
        return Status.Next;
    }

    private static Status Fnclex(CpuContext* cpu, Insn* insn)
    {
        if (NotAvailable(cpu))
        {
            return Faults.Nm(cpu);
        }

        cpu->Fsw &= 0x7F00;
        return Status.Next;
    }

    private static Status Fnstcw(CpuContext* cpu, Insn* insn) => StoreWord(cpu, insn, cpu->Fcw);

    private static Status FnstswMemory(CpuContext* cpu, Insn* insn) => StoreWord(cpu, insn, cpu->Fsw);

    private static Status StoreWord(CpuContext* cpu, Insn* insn, ushort value)
    {
        if (NotAvailable(cpu))
        {
            return Faults.Nm(cpu);
        }

        return Mem.Address(cpu, insn, 2, write: true, out ulong linear) && Mem.Write(cpu, linear, value)
            ? Status.Next
            : Status.Fault;
    }

    private static Status FnstswAx(CpuContext* cpu, Insn* insn)
    {
        if (NotAvailable(cpu))
        {
            return Faults.Nm(cpu);
        }

        *(ushort*)&cpu->Rax = cpu->Fsw;
        return Status.Next;
    }

    private static Status Fldcw(CpuContext* cpu, Insn* insn)
    {
        if (!Ready(cpu, insn, out Status status))
        {
            return status;
        }

        if (!Mem.Address(cpu, insn, 2, write: false, out ulong linear) || !Mem.Read(cpu, linear, out ushort value))
        {
            return Status.Fault;
        }

        SetControl(cpu, value);
        UpdateSummary(cpu);
        return Status.Next;
    }

    // Bit 6 reads as one; bits 7 and 13 to 15 as zero.
    private static void SetControl(CpuContext* cpu, ushort value) => cpu->Fcw = (ushort)((value & 0x1F7F) | 0x40);

    private static Status Fnstenv(CpuContext* cpu, Insn* insn)
    {
        if (NotAvailable(cpu))
        {
            return Faults.Nm(cpu);
        }

        bool wide = IsWide(insn);
        int size = wide ? 28 : 14;
        byte* image = VectorScratch.Of(cpu)->Memory;
        WriteEnvironment(cpu, image, wide);
        if (!Mem.Address(cpu, insn, (uint)size, write: true, out ulong linear) ||
            !Mem.WriteBytes(cpu, linear, image, size))
        {
            return Status.Fault;
        }

        cpu->Fcw |= Exceptions;
        UpdateSummary(cpu);
        return Status.Next;
    }

    private static Status Fldenv(CpuContext* cpu, Insn* insn)
    {
        if (!Ready(cpu, insn, out Status status))
        {
            return status;
        }

        bool wide = IsWide(insn);
        int size = wide ? 28 : 14;
        byte* image = VectorScratch.Of(cpu)->Memory;
        if (!Mem.Address(cpu, insn, (uint)size, write: false, out ulong linear) ||
            !Mem.ReadBytes(cpu, linear, image, size))
        {
            return Status.Fault;
        }

        ReadEnvironment(cpu, image, wide);
        return Status.Next;
    }

    private static Status Fnsave(CpuContext* cpu, Insn* insn)
    {
        if (NotAvailable(cpu))
        {
            return Faults.Nm(cpu);
        }

        bool wide = IsWide(insn);
        int environment = wide ? 28 : 14;
        int size = environment + 80;
        byte* image = VectorScratch.Of(cpu)->Memory;
        WriteEnvironment(cpu, image, wide);
        for (int i = 0; i < 8; i++)
        {
            Unsafe.CopyBlockUnaligned(image + environment + (10 * i), cpu->Xsave + XsaveLayout.St + (16 * i), 10);
        }

        if (!Mem.Address(cpu, insn, (uint)size, write: true, out ulong linear) ||
            !Mem.WriteBytes(cpu, linear, image, size))
        {
            return Status.Fault;
        }

        return Fninit(cpu, insn);
    }

    private static Status Frstor(CpuContext* cpu, Insn* insn)
    {
        if (!Ready(cpu, insn, out Status status))
        {
            return status;
        }

        bool wide = IsWide(insn);
        int environment = wide ? 28 : 14;
        int size = environment + 80;
        byte* image = VectorScratch.Of(cpu)->Memory;
        if (!Mem.Address(cpu, insn, (uint)size, write: false, out ulong linear) ||
            !Mem.ReadBytes(cpu, linear, image, size))
        {
            return Status.Fault;
        }

        ReadEnvironment(cpu, image, wide);
        for (int i = 0; i < 8; i++)
        {
            byte* slot = cpu->Xsave + XsaveLayout.St + (16 * i);
            // SAFETY: i is below 8 and a slot has 16 bytes.
            *(ulong*)(slot + 8) = 0;
            Unsafe.CopyBlockUnaligned(slot, image + environment + (10 * i), 10);
        }

        return Status.Next;
    }

    private static bool IsWide(Insn* insn) =>
        (Code)insn->Code is Code.Fnstenv_m28byte or Code.Fldenv_m28byte or Code.Fnsave_m108byte
            or Code.Frstor_m108byte;

    // SDM 1 8.1.10: figures 8-9 to 8-12.
    private static void WriteEnvironment(CpuContext* cpu, byte* image, bool wide)
    {
        ushort tags = FullTags(cpu);
        // SAFETY: callers give the scratch area, 128 bytes; an environment is seven words of 4 or 2 bytes.
        bool real = cpu->Mode <= ProcessorMode.Virtual8086;
        uint fip = (uint)cpu->Fip;
        uint fdp = (uint)cpu->Fdp;
        uint fop = cpu->Fop & 0x7FFu;
        if (wide)
        {
            var words = (uint*)image;
            words[0] = cpu->Fcw | 0xFFFF0000;
            words[1] = cpu->Fsw | 0xFFFF0000;
            words[2] = tags | 0xFFFF0000;
            if (real)
            {
                words[3] = (fip & 0xFFFF) | 0xFFFF0000;
                words[4] = ((fip >> 16) << 12) | fop;
                words[5] = (fdp & 0xFFFF) | 0xFFFF0000;
                words[6] = (fdp >> 16) << 12;
            }
            else
            {
                words[3] = fip;
                words[4] = fop << 16;
                words[5] = fdp;
                words[6] = 0xFFFF0000;
            }
        }
        else
        {
            var words = (ushort*)image;
            words[0] = cpu->Fcw;
            words[1] = cpu->Fsw;
            words[2] = tags;
            words[3] = (ushort)fip;
            words[4] = (ushort)(real ? ((fip >> 16) << 12) | fop : 0);
            words[5] = (ushort)fdp;
            words[6] = (ushort)(real ? (fdp >> 16) << 12 : 0);
        }
    }

    private static void ReadEnvironment(CpuContext* cpu, byte* image, bool wide)
    {
        // SAFETY: callers give the scratch area, 128 bytes; an environment is seven words of 4 or 2 bytes.
        bool real = cpu->Mode <= ProcessorMode.Virtual8086;
        int step = wide ? 4 : 2;
        ushort fsw = *(ushort*)(image + step);
        SetControl(cpu, *(ushort*)image);

        // Slots are by stack position and the new TOP renames them: physical registers keep their contents.
        RotateToTop(cpu, (fsw >> 11) & 7);
        cpu->Fsw = fsw;
        cpu->Ftw = AbridgeTags(*(ushort*)(image + (2 * step)));
        UpdateSummary(cpu);
        if (wide)
        {
            var words = (uint*)image;
            cpu->Fip = real ? (words[3] & 0xFFFF) | ((words[4] & 0x0FFFF000) << 4) : words[3];
            cpu->Fop = (ushort)((real ? words[4] : words[4] >> 16) & 0x7FF);
            cpu->Fdp = real ? (words[5] & 0xFFFF) | ((words[6] & 0x0FFFF000) << 4) : words[5];
        }
        else
        {
            var words = (ushort*)image;
            cpu->Fip = real ? words[3] | ((uint)(words[4] & 0xF000) << 4) : words[3];
            cpu->Fop = (ushort)(real ? words[4] & 0x7FF : 0);
            cpu->Fdp = real ? words[5] | ((uint)(words[6] & 0xF000) << 4) : words[5];
        }
    }

    // Tag words count physical registers; the image counts from TOP.
    private static ushort FullTags(CpuContext* cpu)
    {
        int top = (cpu->Fsw >> 11) & 7;
        int tags = 0;
        for (int physical = 0; physical < 8; physical++)
        {
            int tag = 3;
            if ((cpu->Ftw & (1 << physical)) != 0)
            {
                byte* slot = cpu->Xsave + XsaveLayout.St + (16 * ((physical - top) & 7));
                // SAFETY: slots of 16 bytes, of which the number is masked to 0 to 7.
                int exponent = *(ushort*)(slot + 8) & 0x7FFF;
                ulong significand = *(ulong*)slot;
                if (exponent == 0)
                {
                    tag = significand == 0 ? 1 : 2;
                }
                else
                {
                    tag = exponent == 0x7FFF || (long)significand >= 0 ? 2 : 0;
                }
            }

            tags |= tag << (2 * physical);
        }

        return (ushort)tags;
    }

    private static byte AbridgeTags(ushort tags)
    {
        int abridged = 0;
        for (int i = 0; i < 8; i++)
        {
            abridged |= ((tags >> (2 * i)) & 3) != 3 ? 1 << i : 0;
        }

        return (byte)abridged;
    }
}

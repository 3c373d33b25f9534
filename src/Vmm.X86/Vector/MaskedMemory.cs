// SPDX-License-Identifier: BSD-2-Clause
using Iced.Intel;

namespace Vmm.X86;

// Masked moves touch only the elements whose mask bit is set, and fault only for those. Stores check every element before
// the first one is written. Gathers may be interrupted in the middle (SDM 2C, VPGATHERDD): elements already loaded are in
// the destination and their mask elements are cleared, and the instruction restarts with the rest.

/// <summary>VMASKMOV, VPMASKMOV, MASKMOVQ, MASKMOVDQU and AVX2's gathers.</summary>
internal static unsafe class MaskedMemory
{
    private const int Upper = ThunkCache.UpperHalf;

    /// <summary>Binds, or answers false.</summary>
    public static bool Bind(in Instruction instruction, Insn* insn)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Vmaskmovps or Mnemonic.Vmaskmovpd or Mnemonic.Vpmaskmovd or Mnemonic.Vpmaskmovq:
                BindMaskedMove(instruction, insn);
                return true;
            case Mnemonic.Maskmovdqu or Mnemonic.Vmaskmovdqu or Mnemonic.Maskmovq:
                BindByteMasked(instruction, insn);
                return true;
            case Mnemonic.Vpgatherdd or Mnemonic.Vpgatherdq or Mnemonic.Vpgatherqd or Mnemonic.Vpgatherqq
                or Mnemonic.Vgatherdps or Mnemonic.Vgatherdpd or Mnemonic.Vgatherqps or Mnemonic.Vgatherqpd
                when instruction.OpCode.Encoding == EncodingKind.VEX:
                BindGather(instruction, insn);
                return true;
            default:
                return false;
        }
    }

    // OperandSize holds the element size, Immediate the number of elements from here on.
    private static void BindMaskedMove(in Instruction instruction, Insn* insn)
    {
        VectorUnit.ResolveRegisters(instruction, insn);
        bool isQword = instruction.Mnemonic is Mnemonic.Vmaskmovpd or Mnemonic.Vpmaskmovq;
        bool isStore = instruction.Op0Kind == OpKind.Memory;
        Register vector = isStore ? instruction.Op2Register : instruction.Op0Register;
        insn->OperandSize = (byte)(isQword ? 8 : 4);
        insn->Immediate = (vector.IsYMM() ? 32u : 16u) / insn->OperandSize;
        insn->Handler = isStore ? &Vmaskstore : &Vmaskload;
    }

    private static void BindByteMasked(in Instruction instruction, Insn* insn)
    {
        // Operand 0 is the implied [rDI].
        VectorUnit.ResolveRegisters(instruction, insn);
        insn->Base = 8 * 7;
        insn->Index = CpuContext.ZeroOffset;
        insn->Displacement = 0;
        bool isVex = instruction.Mnemonic == Mnemonic.Vmaskmovdqu;
        insn->Handler = instruction.Mnemonic == Mnemonic.Maskmovq ? &Maskmovq : isVex ? &Vmaskmovdqu : &Maskmovdqu;
    }

    private static void BindGather(in Instruction instruction, Insn* insn)
    {
        VectorUnit.ResolveRegisters(instruction, insn);
        int destination = instruction.Op0Register.GetNumber();
        int index = instruction.MemoryIndex.GetNumber();
        int mask = instruction.Op2Register.GetNumber();
        if (destination == index || destination == mask || index == mask)
        {
            insn->Handler = &VectorUnit.Undefined;
            return;
        }

        Mnemonic mnemonic = instruction.Mnemonic;
        bool hasQwordIndex = mnemonic is Mnemonic.Vpgatherqd or Mnemonic.Vpgatherqq or Mnemonic.Vgatherqps
            or Mnemonic.Vgatherqpd;
        bool isQword = mnemonic is Mnemonic.Vpgatherdq or Mnemonic.Vpgatherqq or Mnemonic.Vgatherdpd
            or Mnemonic.Vgatherqpd;
        int indices = (instruction.MemoryIndex.IsYMM() ? 32 : 16) / (hasQwordIndex ? 8 : 4);
        int elements = (instruction.Op0Register.IsYMM() ? 32 : 16) / (isQword ? 8 : 4);
        insn->R1 = (ushort)VectorUnit.XmmOffset(index);
        insn->OperandSize = (byte)(isQword ? 8 : 4);
        insn->Immediate = (uint)(indices < elements ? indices : elements);
        // SAFETY: a flag that Gather compares and never follows.
        insn->Aux = (void*)(nint)(hasQwordIndex ? 1 : 0);
        insn->Index = CpuContext.ZeroOffset;
        insn->Handler = &Vgather;
    }

    private static Status Vmaskload(CpuContext* cpu, Insn* insn) => WithoutAlignmentCheck(cpu, insn, &MaskedLoad);

    private static Status Vmaskstore(CpuContext* cpu, Insn* insn) => WithoutAlignmentCheck(cpu, insn, &MaskedStore);

    private static Status Vgather(CpuContext* cpu, Insn* insn) => WithoutAlignmentCheck(cpu, insn, &Gather);

    // Elements are not subject to #AC (the manuals allow either; processors do not check). The check is in force while
    // the empty TLB is selected, so the user's own stands in for it.
    private static Status WithoutAlignmentCheck(
        CpuContext* cpu, Insn* insn, delegate*<CpuContext*, Insn*, Status> body)
    {
        TlbEntry* selected = cpu->Tlb;
        if (selected == cpu->Tlbs + ((int)MmuMode.Empty * TlbEntry.Count) && Paging.AlignmentChecked(cpu))
        {
            cpu->Tlb = cpu->Tlbs + ((int)MmuMode.User * TlbEntry.Count);
        }

        Status status = body(cpu, insn);
        cpu->Tlb = selected;
        return status;
    }

    // Element addresses in a register: the upper half of a YMM lies elsewhere.
    private static byte* Element(byte* register, int index, int size)
    {
        int at = index * size;
        return register + (at < 16 ? at : at - 16 + Upper);
    }

    private static bool IsSelected(byte* mask, int index, int size) =>
        (sbyte)Element(mask, index, size)[size - 1] < 0;

    private static Status MaskedLoad(CpuContext* cpu, Insn* insn)
    {
        if (!VectorUnit.AvxReady(cpu))
        {
            return VectorUnit.AvxNotReady(cpu);
        }

        int size = insn->OperandSize;
        int count = (int)insn->Immediate;
        // SAFETY: R0 to R2 are offsets of vector registers in the context (VectorUnit.XmmOffset), each with its upper
        // half at Upper; result has the 32 bytes that count elements of size fill at most.
        byte* mask = (byte*)cpu + insn->R1;
        byte* result = stackalloc byte[32];
        for (int i = 0; i < 4; i++)
        {
            ((ulong*)result)[i] = 0;
        }

        for (int i = 0; i < count; i++)
        {
            if (IsSelected(mask, i, size) &&
                (!ElementAddress(cpu, insn, i * size, size, write: false, out ulong linear) ||
                !Mem.ReadBytes(cpu, linear, result + (i * size), size)))
            {
                return Status.Fault;
            }
        }

        var to = (ulong*)((byte*)cpu + insn->R0);
        var high = (ulong*)((byte*)to + Upper);
        to[0] = ((ulong*)result)[0];
        to[1] = ((ulong*)result)[1];
        high[0] = ((ulong*)result)[2];
        high[1] = ((ulong*)result)[3];
        return Status.Next;
    }

    private static Status MaskedStore(CpuContext* cpu, Insn* insn)
    {
        if (!VectorUnit.AvxReady(cpu))
        {
            return VectorUnit.AvxNotReady(cpu);
        }

        int size = insn->OperandSize;
        int count = (int)insn->Immediate;
        // SAFETY: registers of the context, as in MaskedLoad.
        byte* mask = (byte*)cpu + insn->R1;
        byte* from = (byte*)cpu + insn->R2;
        for (int i = 0; i < count; i++)
        {
            if (IsSelected(mask, i, size) &&
                (!ElementAddress(cpu, insn, i * size, size, write: true, out ulong linear) ||
                !Mem.ProbeWrite(cpu, linear, size)))
            {
                return Status.Fault;
            }
        }

        for (int i = 0; i < count; i++)
        {
            if (IsSelected(mask, i, size) &&
                (!ElementAddress(cpu, insn, i * size, size, write: true, out ulong linear) ||
                !Mem.WriteBytes(cpu, linear, Element(from, i, size), size)))
            {
                return Status.Fault;
            }
        }

        return Status.Next;
    }

    private static Status Maskmovdqu(CpuContext* cpu, Insn* insn) =>
        VectorUnit.SseReady(cpu) ? StoreBytes(cpu, insn, 16) : VectorUnit.SseNotReady(cpu);

    private static Status Vmaskmovdqu(CpuContext* cpu, Insn* insn) =>
        VectorUnit.AvxReady(cpu) ? StoreBytes(cpu, insn, 16) : VectorUnit.AvxNotReady(cpu);

    private static Status Maskmovq(CpuContext* cpu, Insn* insn)
    {
        if (!Mmx.Ready(cpu, insn, out Status status))
        {
            return status;
        }

        // The transition to MMX comes first and stays when the store faults, as on the processors we could ask.
        Mmx.Enter(cpu);
        return StoreBytes(cpu, insn, 8);
    }

    // #AC is by quadwords here, whatever is selected.
    private static Status StoreBytes(CpuContext* cpu, Insn* insn, int count)
    {
        if (Paging.AlignmentChecked(cpu) &&
            (!ElementAddress(cpu, insn, 0, count, write: true, out ulong linear) ||
            ((linear & 7) != 0 && Paging.IsCanonical(cpu, linear))))
        {
            return Faults.Ac(cpu);
        }

        return WithoutAlignmentCheck(cpu, insn, count == 8 ? &Store8 : &Store16);
    }

    private static Status Store8(CpuContext* cpu, Insn* insn) => StoreSelected(cpu, insn, 8);

    private static Status Store16(CpuContext* cpu, Insn* insn) => StoreSelected(cpu, insn, 16);

    private static Status StoreSelected(CpuContext* cpu, Insn* insn, int count)
    {
        // SAFETY: registers of the context, as in MaskedLoad; for MASKMOVQ the 8 bytes of an MMX register.
        byte* from = (byte*)cpu + insn->R1;
        byte* mask = (byte*)cpu + insn->R2;

        // These two check all bytes, selected or not (SDM 2B leaves that to the implementation; AMD's do).
        if (!ElementAddress(cpu, insn, 0, count, write: true, out ulong linear) ||
            !Mem.ProbeWrite(cpu, linear, count))
        {
            return Status.Fault;
        }

        for (int i = 0; i < count; i++)
        {
            if ((sbyte)mask[i] < 0 && !Mem.WriteBytes(cpu, linear + (uint)i, from + i, 1))
            {
                return Status.Fault;
            }
        }

        return Status.Next;
    }

    private static Status Gather(CpuContext* cpu, Insn* insn)
    {
        if (!VectorUnit.AvxReady(cpu))
        {
            return VectorUnit.AvxNotReady(cpu);
        }

        int size = insn->OperandSize;
        int count = (int)insn->Immediate;
        bool hasQwordIndex = insn->Aux != null;
        // SAFETY: registers of the context, as in MaskedLoad; Immediate bounds the elements by both registers.
        byte* to = (byte*)cpu + insn->R0;
        byte* index = (byte*)cpu + insn->R1;
        byte* mask = (byte*)cpu + insn->R2;
        for (int i = 0; i < count; i++)
        {
            if (IsSelected(mask, i, size))
            {
                long offset = hasQwordIndex ? *(long*)Element(index, i, 8) : *(int*)Element(index, i, 4);
                if (!ElementAddress(cpu, insn, offset << insn->Scale, size, write: false, out ulong linear) ||
                    !Mem.ReadBytes(cpu, linear, Element(to, i, size), size))
                {
                    return Status.Fault;
                }
            }

            Fill(Element(mask, i, size), size, 0);
        }

        // Elements beyond the count are zeroed in the destination, and the whole mask register ends as zero.
        for (int at = count * size; at < 32; at += size)
        {
            Fill(Element(to, at / size, size), size, 0);
        }

        for (int at = 0; at < 32; at += 8)
        {
            *(ulong*)Element(mask, at / 8, 8) = 0;
        }

        return Status.Next;
    }

    private static void Fill(byte* at, int size, byte value)
    {
        for (int i = 0; i < size; i++)
        {
            at[i] = value;
        }
    }

    private static bool ElementAddress(
        CpuContext* cpu, Insn* insn, long at, int size, bool write, out ulong linear)
    {
        ulong offset = (Mem.Offset(cpu, insn) + (ulong)at) & insn->AddressMask;
        if ((insn->Flags & InsnFlags.SegmentCheck) != 0)
        {
            return Segmentation.Linear(cpu, insn->Segment, offset, (uint)size, write, out linear);
        }

        // SAFETY: SegmentBase is an offset in the context that the binder set.
        linear = offset + *(ulong*)((byte*)cpu + insn->SegmentBase);
        return true;
    }
}

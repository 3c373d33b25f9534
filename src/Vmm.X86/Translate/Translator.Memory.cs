// SPDX-License-Identifier: BSD-2-Clause
using Iced.Intel;

namespace Vmm.X86;

// Memory operands: from a guest operand to a host operand that cannot fault and cannot leave the guest's RAM.
//
// Class T, the software TLB (Tlb.cs), in the table of the block's privilege mode, which is part of the block's key:
//
//     lea T1, [ea]; shr T1, 12-5; and T1, entries      the entry of the first byte's page
//     lea T0, [ea + size - 1]; and T0, -4096; or T0, asid
//     cmp T0, gs:[T1 + tag]; jne slow                   the last byte's page: a crossing never matches
//     mov T1, gs:[T1 + addend]                          host minus linear address
//
// and the operand becomes [ea + T1]. A store looks at the page's flags as well: anything but "written" (code in the
// page, a dirty flag to set) is slow.

// SAFETY: the host address is addend + linear for a linear range inside one page for which an entry exists; entries
// exist only for pages of RAM or ROM that Paging.Fill took from a memory slot, and for writing only for RAM.
internal sealed unsafe partial class Translator
{
    private const int ReadTag = 0;
    private const int WriteTag = 8;
    private const int Addend = 16;
    private const int PageFlagsPointer = 24;

    private static bool IsSpilled(int register) => register >= 13;

    private static HostMemory Slot(int register) => HostMemory.Context(8 * register);

    // Host register of a guest register that is not spilled.
    private static int HostOf(int register) => register == Host.Rsp ? Host.GuestRsp : register;

    // Emits what an operand's linear address needs beyond one host operand; uses T0 only. Destroys flags.
    private HostMemory LinearOf(in Instruction instruction, bool withSegment = true)
    {
        Register start = instruction.MemoryBase;
        Register index = instruction.MemoryIndex;
        int displacement = (int)(long)instruction.MemoryDisplacement64;
        int scale = instruction.MemoryIndexScale switch
        {
            2 => 1,
            4 => 2,
            8 => 3,
            _ => 0,
        };
        int segment = withSegment ? SegmentOf(instruction) : -1;
        HostMemory form;
        if (start is Register.RIP or Register.EIP)
        {
            _e.Load(Host.T0, HostMemory.Context(Offsets.CodeBase));
            form = new HostMemory(Host.T0, displacement + PageOffset);
        }
        else
        {
            int b = start == Register.None ? Host.None : Number(start);
            int i = index == Register.None ? Host.None : Number(index);
            if (i >= 0 && IsSpilled(i))
            {
                _e.Load(Host.T0, Slot(i));
                if (b >= 0 && IsSpilled(b))
                {
                    _e.Lea(Host.T0, new HostMemory(Host.None, Host.T0, scale, displacement));
                    _e.Alu(AluOp.Add, Host.T0, Slot(b));
                    form = new HostMemory(Host.T0, 0);
                }
                else
                {
                    form = new HostMemory(b < 0 ? Host.None : HostOf(b), Host.T0, scale, displacement);
                }
            }
            else if (b >= 0 && IsSpilled(b))
            {
                _e.Load(Host.T0, Slot(b));
                form = new HostMemory(Host.T0, i < 0 ? Host.None : HostOf(i), scale, displacement);
            }
            else
            {
                form = new HostMemory(b < 0 ? Host.None : HostOf(b), i < 0 ? Host.None : HostOf(i), scale, displacement);
            }
        }

        bool is32 = start == Register.EIP || (start != Register.None ? start.GetSize() == 4 :
            index != Register.None ? index.GetSize() == 4 : instruction.MemoryDisplSize == 4 && HasAddressPrefix(instruction));
        if (is32)
        {
            _e.Lea32(Host.T0, form);
            form = new HostMemory(Host.T0, 0);
        }

        if (segment >= 0)
        {
            HostMemory value = HostMemory.Context(CpuContext.SegmentsOffset + (segment * 32) + 8);
            if (form.Base < 0 && form.Index < 0)
            {
                _e.Load(Host.T0, value);
            }
            else
            {
                _e.Lea(Host.T0, form);
                _e.Alu(AluOp.Add, Host.T0, value);
                displacement = 0;
            }

            form = new HostMemory(Host.T0, form.Base < 0 && form.Index < 0 ? displacement : 0);
        }

        return form;
    }

    private bool HasAddressPrefix(in Instruction instruction)
    {
        Insn* record = _block->First + _at;
        return record->AddressSize == 4 && instruction.Length > 0;
    }

    private static int SegmentOf(in Instruction instruction) => instruction.MemorySegment switch
    {
        Register.FS => Seg.Fs,
        Register.GS => Seg.Gs,
        _ => -1,
    };

    // False for forms that the handler must take: displacements beyond 32 bits.
    private static bool IsAddressable(in Instruction instruction)
    {
        long displacement = (long)instruction.MemoryDisplacement64;
        return displacement is >= int.MinValue + 8192 and <= int.MaxValue - 8192;
    }

    // Checks an operand and answers where it is in the host. With compact, the address is in T0 alone and T1 is free.
    private HostMemory Check(in Instruction instruction, int size, bool write, int alignment, bool compact)
    {
        HostMemory form = LinearOf(instruction);
        Probe(form, size, write, alignment);
        if (form.Base == Host.T0 || form.Index == Host.T0)
        {
            // The address went the way of the tag.
            form = LinearOf(instruction);
        }

        if (form.Index < 0 && !compact)
        {
            return form.Base < 0
                ? new HostMemory(Host.T1, form.Displacement)
                : new HostMemory(form.Base, Host.T1, 0, form.Displacement);
        }

        _e.Lea(Host.T0, form);
        if (!compact)
        {
            return new HostMemory(Host.T0, Host.T1, 0, 0);
        }

        _e.Alu(AluOp.Add, Host.T0, Host.T1);
        return new HostMemory(Host.T0, 0);
    }

    // The check proper; leaves the addend in T1 and destroys T0.
    private void Probe(in HostMemory form, int size, bool write, int alignment)
    {
        int table = CpuContext.TlbOffset + (TlbTable * TlbEntry.Count * TlbEntry.SizeBytes);
        _e.Lea(Host.T1, form);
        if (alignment > 1)
        {
            _e.TestImmediate32(Host.T1, alignment - 1);
            SlowJump(_e.JumpIf(HostCondition.NotEqual));
        }

        _e.Shift(5, Host.T1, 7);
        _e.AluImmediate(AluOp.And, Host.T1, (TlbEntry.Count - 1) << 5, wide: false);
        _e.Lea(
            Host.T0, new HostMemory(form.Base, form.Index, form.Scale, form.Displacement + size - 1, form.IsContext));
        _e.AluImmediate(AluOp.And, Host.T0, -4096);
        _e.Alu(AluOp.Or, Host.T0, HostMemory.Context(Offsets.TlbAsid));
        _e.Alu(AluOp.Cmp, Host.T0, HostMemory.Context(Host.T1, table + (write ? WriteTag : ReadTag)));
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        if (write)
        {
            _e.Load(Host.T0, HostMemory.Context(Host.T1, table + PageFlagsPointer));
            _e.CompareByte(new HostMemory(Host.T0, 0), (int)Memory.PageFlags.Written);
            SlowJump(_e.JumpIf(HostCondition.NotEqual));
        }

        _e.Load(Host.T1, HostMemory.Context(Host.T1, table + Addend));
    }

    private int TlbTable => (_block->Key & (BlockKey.User | BlockKey.Ac)) switch
    {
        0 => (int)MmuMode.Supervisor,
        BlockKey.User => (int)MmuMode.User,
        BlockKey.Ac => (int)MmuMode.SupervisorAc,
        _ => (int)MmuMode.Empty,
    };
}

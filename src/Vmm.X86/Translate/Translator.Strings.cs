// SPDX-License-Identifier: BSD-2-Clause
using System.Numerics;
using Iced.Intel;

namespace Vmm.X86;

// REP MOVS and REP STOS inside a page, and bit strings (BT and its relatives with a bit number in a register).
//
// The kernel clears and copies small structures with repeated string instructions: a call of the handler costs more than
// the copy. In line are forward copies that lie in one page at either end; their operands are looked up in the TLB, in
// every mode, because a site names what is behind an operand of fixed size. All the rest is the handler's: it knows faults,
// several pages, devices and backward copies, and leaves the registers at an element.

// SAFETY: the addend of an entry is used for bytes of its page alone: the page of the last byte is what the tag is
// compared with, the entry was found by the first, and both are less than a page apart.
internal sealed unsafe partial class Translator
{
    private const int PageBytes = 4096;

    private void EmitString(in Instruction instruction)
    {
        Insn* record = Record(_at);
        bool isCopy = instruction.Mnemonic is Mnemonic.Movsb or Mnemonic.Movsw or Mnemonic.Movsd or Mnemonic.Movsq;
        int size = instruction.MemorySize.GetSize();
        if (!instruction.HasRepPrefix || record->AddressSize != 8 || DataMode == MmuMode.Empty ||
            (isCopy && SegmentOf(instruction) >= 0))
        {
            CallHandler();
            return;
        }

        FreeFlags();
        _e.Load32(Host.T0, HostMemory.Context(Offsets.RflagsSystem));
        _e.TestImmediate32(Host.T0, (int)Rflags.Df);
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        _e.Lea(Host.T0, new HostMemory(Host.Rcx, -1));
        _e.AluImmediate(AluOp.Cmp, Host.T0, (PageBytes / size) - 1);
        SlowJump(_e.JumpIf(HostCondition.Above));
        ProbeElements(Host.Rdi, size, write: true);
        if (isCopy)
        {
            _e.Store(HostMemory.Context(Offsets.Scratch), Host.T1);
            ProbeElements(Host.Rsi, size, write: false);
            _e.Load(Host.T0, HostMemory.Context(Offsets.Scratch));
            _e.Alu(AluOp.Add, Host.Rsi, Host.T1);
            _e.Alu(AluOp.Add, Host.Rdi, Host.T0);
            _e.RepeatedString(0xA4, size);
            _e.Alu(AluOp.Sub, Host.Rsi, Host.T1);
            _e.Alu(AluOp.Sub, Host.Rdi, Host.T0);
        }
        else
        {
            _e.Alu(AluOp.Add, Host.Rdi, Host.T1);
            _e.RepeatedString(0xAA, size);
            _e.Alu(AluOp.Sub, Host.Rdi, Host.T1);
        }
    }

    // Looks RCX elements from the address in a register on up in the TLB; leaves the addend in T1 and destroys T0.
    private void ProbeElements(int register, int size, bool write)
    {
        TlbPlaces++;
        int table = CpuContext.TlbOffset + ((int)DataMode * TlbEntry.Count * TlbEntry.SizeBytes);
        _e.Move(Host.T1, register);
        LookUp(new HostMemory(register, Host.Rcx, BitOperations.Log2((uint)size), -1), table, write);
    }

    // BT, BTS, BTR, BTC of memory by a register: the word that holds the bit is checked, and the host, which makes the same
    // step from the operand to the word, gets the operand with that word's addend.
    private bool TryBitString(in Instruction original)
    {
        Instruction instruction = original;
        Register number = instruction.Op1Register;
        int size = number.GetSize();
        if (size < 4 || Record(_at)->AddressSize != 8 || DataMode == MmuMode.Empty || !IsAddressable(instruction))
        {
            return false;
        }

        bool write = instruction.Mnemonic != Mnemonic.Bt;
        int bits = Number(number);
        FreeFlags();
        _e.Lea(Host.T0, LinearOf(instruction));
        _e.Store(HostMemory.Context(Offsets.Scratch), Host.T0);
        if (IsSpilled(bits))
        {
            _e.Load(Host.T1, Slot(bits));
        }
        else
        {
            _e.Move(Host.T1, HostOf(bits));
        }

        if (size == 4)
        {
            _e.Shift(4, Host.T1, 32);
            _e.Shift(7, Host.T1, 32 + 5);
        }
        else
        {
            _e.Shift(7, Host.T1, 6);
        }

        _e.Lea(Host.T0, new HostMemory(Host.T0, Host.T1, BitOperations.Log2((uint)size), 0));
        var word = new HostMemory(Host.T0, 0);
        int alignment = original.HasLockPrefix ? size : 1;
        if (Wanders(word))
        {
            ProbeTlb(word, size, write, alignment);
        }
        else
        {
            Probe(word, size, write, alignment);
        }

        _e.Load(Host.T0, HostMemory.Context(Offsets.Scratch));
        _e.Alu(AluOp.Add, Host.T0, Host.T1);
        NeedFlags(Host.T1);
        if (IsSpilled(bits))
        {
            _e.Load(Host.T1, Slot(bits));
        }

        instruction.Op1Register = Like(number, IsSpilled(bits) ? Host.T1 : HostOf(bits));
        SetMemory(ref instruction, new HostMemory(Host.T0, 0));
        if (!Encode(instruction))
        {
            return false;
        }

        WroteFlags();
        return true;
    }

    // POP of memory: the operand is checked first, and its address, for which RSP counts as already incremented, is kept.
    private bool TryPopMemory(in Instruction original)
    {
        Instruction instruction = original;
        if (!IsAddressable(instruction))
        {
            return false;
        }

        if (instruction.MemoryBase == Register.RSP)
        {
            instruction.MemoryDisplacement64 += sizeof(ulong);
        }

        FreeFlags();
        HostMemory operand = Check(instruction, sizeof(ulong), write: true, 1, needsT0: false);
        _e.Lea(Host.T0, operand);
        _e.Store(HostMemory.Context(Offsets.Scratch), Host.T0);
        Probe(new HostMemory(Host.GuestRsp, 0), sizeof(ulong), write: false, 1);
        _e.Load(Host.T1, new HostMemory(Host.GuestRsp, Host.T1, 0, 0));
        _e.Load(Host.T0, HostMemory.Context(Offsets.Scratch));
        _e.Store(new HostMemory(Host.T0, 0), Host.T1);
        _e.Lea(Host.GuestRsp, new HostMemory(Host.GuestRsp, sizeof(ulong)));
        return true;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using Iced.Intel;

namespace Vmm.X86;

// Groups: memory operands of neighbouring instructions that have the same base and index registers, up to constants, are
// checked together. PUSH, POP, CALL and RET take part with RSP as their base. The first instruction of a group checks the
// span of all its operands, which leaves in T1 where the lowest byte is in the host; the members address from T1:
//
//     lea T1, [lowest]; sub T1, gs:[Low]; cmp T1, gs:[Limit]; jae cold; add T1, gs:[HostLow]
//
// Changes of RSP wait until somebody reads it. When the check fails, cold code has the instructions of the group once more,
// each with its own check, and goes on behind the group. So a group whose operands lie in two pages that are not side by
// side in the host, or meet a device or a fault, does what its instructions do alone, a little later.
//
// Between the members there may be instructions that leave T1 alone and change none of the address' registers but by
// constants.
internal sealed unsafe partial class Translator
{
    private const int BaseIsCode = -2;

    private readonly int[] _groupOffsets = new int[MaxInsns];
    private readonly GroupCopy[] _groups = new GroupCopy[MaxInsns];
    private int _groupLast = -1;
    private ulong _groupMembers;
    private int _rspDelta;
    private bool _groupFailed;
    private bool _inCopy;
    private int _groupCount;

    /// <summary>Groups of operands that are checked together.</summary>
    public long Groups { get; private set; }

    // The instruction that is being emitted lies in a group.
    private bool InGroup => _at <= _groupLast;

    // The instruction that is being emitted has its operand checked already.
    private bool IsMember => InGroup && ((_groupMembers >> _at) & 1) != 0;

    // Where a member's operand is.
    private HostMemory MemberOperand => new(Host.T1, _groupOffsets[_at]);

    // Looks whether a group starts at the present instruction, and emits its check.
    private void OpenGroup()
    {
        _groupLast = -1;
        if (DataMode == MmuMode.Empty || _groupFailed || _inCopy || !Operand(_at, out GroupOperand first))
        {
            return;
        }

        int shift = 0;
        int low = first.Displacement;
        int high = first.Displacement + first.Size;
        bool write = first.Write;
        int last = _at;
        ulong members = 1UL << _at;
        _groupOffsets[_at] = first.Displacement;
        for (int i = _at; i + 1 < _count && Passes(i, first, members, ref shift); i++)
        {
            if (!Operand(i + 1, out GroupOperand next))
            {
                continue;
            }

            int at = next.Displacement + shift;
            int newLow = at < low ? at : low;
            int newHigh = at + next.Size > high ? at + next.Size : high;
            if (!next.HasSameBase(first) || newHigh - newLow > Sites.GroupBytes)
            {
                break;
            }

            low = newLow;
            high = newHigh;
            write |= next.Write;
            last = i + 1;
            members |= 1UL << last;
            _groupOffsets[last] = at;
        }

        if (last == _at)
        {
            return;
        }

        for (int i = _at; i <= last; i++)
        {
            _groupOffsets[i] -= low;
        }

        EmitGroupCheck(first, low, high - low, write, last);
        _groupLast = last;
        _groupMembers = members;
        _rspDelta = 0;
        Groups++;
    }

    private void EmitGroupCheck(in GroupOperand first, int low, int span, bool write, int last)
    {
        FreeFlags();
        HostMemory form;
        if (first.IsImplicit)
        {
            form = new HostMemory(Host.GuestRsp, low);
        }
        else
        {
            form = Moved(LinearOf(_insns[_at]), low - first.Displacement);
        }

        _slowGroup = _groupCount;
        _groups[_groupCount++] = new GroupCopy { Head = _at, Last = last, InImage = _inImage };
        if (Wanders(form))
        {
            bool usesT0 = UsesT0(form);
            ProbeTlb(form, span, write, 1);
            form = usesT0 ? Moved(LinearOf(_insns[_at]), low - first.Displacement) : form;
            AddAddress(form);
        }
        else
        {
            Probe(form, span, write, 1, isMerged: true);
        }

        _slowGroup = -1;
    }

    // The instructions of a group one by one, for when its check has failed.
    private void EmitCopy(int index)
    {
        GroupCopy group = _groups[index];
        for (int i = 0; i < _slowCount; i++)
        {
            if (_slow[i].Group == index)
            {
                _e.Land(_slow[i].Jump);
                _slow[i].Jump = null;
            }
        }

        _inCopy = true;
        _inHost = false;
        _inImage = group.InImage;
        _held = -1;
        for (_at = group.Head; _at <= group.Last; _at++)
        {
            if (_at == _poll && _at != group.Head)
            {
                EmitPoll();
            }

            EmitOne();
        }

        // Flags and T0 as the code behind the group expects them.
        _at--;
        if (group.EndsInImage && !_inImage && _inHost)
        {
            SaveFlags();
            _inImage = true;
        }

        if (group.EndsInHost && !_inHost && _inImage)
        {
            CodeStubs.LoadFlags(ref _e, Host.T1);
        }

        if (group.Held >= 0)
        {
            Hold(group.Held);
        }

        _e.Jump((byte*)group.Resume);
        _inCopy = false;
    }

    private static HostMemory Moved(in HostMemory form, int by) =>
        new(form.Base, form.Index, form.Scale, form.Displacement + by);

    // Emits what is to happen to RSP.
    private void FlushRsp()
    {
        if (_rspDelta != 0)
        {
            _e.Lea(Host.GuestRsp, new HostMemory(Host.GuestRsp, _rspDelta));
            _rspDelta = 0;
        }
    }

    private bool ReadsRsp(in Instruction instruction)
    {
        for (int i = 0; i < instruction.OpCount; i++)
        {
            OpKind kind = instruction.GetOpKind(i);
            if ((kind == OpKind.Register && instruction.GetOpRegister(i).GetFullRegister() == Register.RSP) ||
                (kind == OpKind.Memory && instruction.MemoryBase == Register.RSP && !IsMember))
            {
                return true;
            }
        }

        return false;
    }

    // The operand that an instruction could bring into a group.
    private bool Operand(int i, out GroupOperand operand)
    {
        ref Instruction instruction = ref _insns[i];
        ref InsnTraits traits = ref _traits[i];
        operand = new GroupOperand { Base = Host.Rsp, Index = Host.None, Size = 8, IsImplicit = true };
        switch (traits.Kind)
        {
            case InsnKind.Push when instruction.Op0Kind == OpKind.Register:
            case InsnKind.PushImmediate:
            case InsnKind.Call:
                operand.Displacement = -8;
                operand.Write = true;
                return true;
            case InsnKind.Pop when Number(instruction.Op0Register) != Host.Rsp:
            case InsnKind.Ret:
                return true;
            case InsnKind.Pass or InsnKind.Vector or InsnKind.X87:
                return ExplicitOperand(instruction, traits, ref operand);
            default:
                return false;
        }
    }

    private static bool ExplicitOperand(in Instruction instruction, in InsnTraits traits, ref GroupOperand operand)
    {
        int memory = -1;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            memory = instruction.GetOpKind(i) == OpKind.Memory ? i : memory;
        }

        Register start = instruction.MemoryBase;
        Register index = instruction.MemoryIndex;
        bool isVector = traits.Kind == InsnKind.Vector;
        if (memory < 0 || SegmentOf(instruction) >= 0 || instruction.HasLockPrefix ||
            instruction.Mnemonic is Mnemonic.Xchg or Mnemonic.Cmpxchg16b || (isVector && traits.Alignment > 1) ||
            (start == Register.None && index == Register.None) || start == Register.EIP ||
            (start != Register.None && start != Register.RIP && start.GetSize() != 8) ||
            (index != Register.None && index.GetSize() != 8) || SpilledOperands(instruction) > 1)
        {
            return false;
        }

        const long far = 1 << 30;
        long displacement = (long)instruction.MemoryDisplacement64;
        int access = (traits.Access >> (2 * memory)) & 3;
        operand.Size = isVector ? traits.MemoryBytes : instruction.MemorySize.GetSize();
        operand.Base = start == Register.None ? Host.None : start == Register.RIP ? BaseIsCode : Number(start);
        operand.Index = index == Register.None ? Host.None : Number(index);
        operand.Scale = instruction.MemoryIndexScale;
        operand.Displacement = (int)displacement;
        operand.Write = (access & 2) != 0;
        operand.IsImplicit = false;
        return displacement is > -far and < far && access != 0 && operand.Size is > 0 and <= Sites.LongBytes;
    }

    // Different registers among the register operands that live in the context.
    private static int SpilledOperands(in Instruction instruction)
    {
        int seen = 0;
        int count = 0;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            if (instruction.GetOpKind(i) == OpKind.Register && IsSpilled(instruction.GetOpRegister(i)))
            {
                int bit = 1 << Number(instruction.GetOpRegister(i));
                count += (seen & bit) == 0 ? 1 : 0;
                seen |= bit;
            }
        }

        return count;
    }

    // Whether a group may go on behind an instruction; counts what that adds to the address.
    private bool Passes(int i, in GroupOperand key, ulong members, ref int shift)
    {
        ref Instruction instruction = ref _insns[i];
        bool isMember = ((members >> i) & 1) != 0;
        switch (_traits[i].Kind)
        {
            case InsnKind.Nop:
                return true;
            case InsnKind.Jcc or InsnKind.Jmp:
                return _ways[i] != Way.Plain;
            case InsnKind.Push when isMember:
            case InsnKind.PushImmediate when isMember:
                shift -= 8;
                return true;
            case InsnKind.Pop when isMember:
                shift += 8;
                return !key.Uses(instruction.Op0Register);
            case InsnKind.Lea:
                return PassesLea(instruction, key, ref shift);
            case InsnKind.Pass or InsnKind.Vector or InsnKind.X87:
                return (isMember || !HasMemory(instruction)) && SpilledOperands(instruction) <= 1 &&
                    PassesWrites(instruction, _traits[i], key, ref shift);
            default:
                return false;
        }
    }

    private static bool PassesLea(in Instruction instruction, in GroupOperand key, ref int shift)
    {
        Register target = instruction.Op0Register;
        if (!IsAddressable(instruction) || target.GetSize() < 4 ||
            (instruction.MemoryIndex != Register.None && IsSpilled(instruction.MemoryIndex) &&
            IsSpilled(instruction.MemoryBase)))
        {
            return false;
        }

        if (!key.Uses(target))
        {
            return true;
        }

        return target.GetSize() == 8 && instruction.MemoryBase == target && instruction.MemoryIndex == Register.None &&
            key.Move(target, (long)instruction.MemoryDisplacement64, ref shift);
    }

    private static bool PassesWrites(
        in Instruction instruction, in InsnTraits traits, in GroupOperand key, ref int shift)
    {
        if (!WritesOperandsOnly(instruction, traits.Kind))
        {
            return false;
        }

        for (int i = 0; i < instruction.OpCount; i++)
        {
            if (instruction.GetOpKind(i) != OpKind.Register || ((traits.Access >> (2 * i)) & 2) == 0 ||
                !instruction.GetOpRegister(i).IsGPR() || !key.Uses(instruction.GetOpRegister(i)))
            {
                continue;
            }

            long by;
            switch (instruction.Mnemonic)
            {
                case Mnemonic.Inc:
                    by = 1;
                    break;
                case Mnemonic.Dec:
                    by = -1;
                    break;
                case Mnemonic.Add when instruction.Op1Kind is OpKind.Immediate8to64 or OpKind.Immediate32to64:
                    by = (long)instruction.GetImmediate(1);
                    break;
                case Mnemonic.Sub when instruction.Op1Kind is OpKind.Immediate8to64 or OpKind.Immediate32to64:
                    by = -(long)instruction.GetImmediate(1);
                    break;
                default:
                    return false;
            }

            if (instruction.GetOpRegister(i).GetSize() != 8 || !key.Move(instruction.GetOpRegister(i), by, ref shift))
            {
                return false;
            }
        }

        return true;
    }

    // General registers that an instruction writes are all among its operands.
    private static bool WritesOperandsOnly(in Instruction instruction, InsnKind kind)
    {
        switch (kind)
        {
            case InsnKind.X87:
                return true;
            case InsnKind.Vector:
                return instruction.Mnemonic is not (Mnemonic.Pcmpestri or Mnemonic.Pcmpistri or Mnemonic.Vpcmpestri
                    or Mnemonic.Vpcmpistri);
            default:
                break;
        }

        switch (instruction.Mnemonic)
        {
            case Mnemonic.Mov or Mnemonic.Add or Mnemonic.Sub or Mnemonic.And or Mnemonic.Or or Mnemonic.Xor
                or Mnemonic.Adc or Mnemonic.Sbb or Mnemonic.Cmp or Mnemonic.Test or Mnemonic.Inc or Mnemonic.Dec
                or Mnemonic.Neg or Mnemonic.Not or Mnemonic.Movzx or Mnemonic.Movsx or Mnemonic.Movsxd or Mnemonic.Shl
                or Mnemonic.Sal or Mnemonic.Shr or Mnemonic.Sar or Mnemonic.Rol or Mnemonic.Ror or Mnemonic.Bswap
                or Mnemonic.Bt or Mnemonic.Bts or Mnemonic.Btr or Mnemonic.Btc or Mnemonic.Shld or Mnemonic.Shrd:
                return true;
            case Mnemonic.Imul:
                return instruction.OpCount > 1;
            default:
                return instruction.ConditionCode != ConditionCode.None;
        }
    }

    /// <summary>A group whose instructions are needed once more in cold code.</summary>
    private struct GroupCopy
    {
        public int Head;
        public int Last;

        /// <summary>Flags are in their image, at the start; they are not in the host's.</summary>
        public bool InImage;

        /// <summary>Where the code behind the group starts, and what it expects.</summary>
        public nint Resume;
        public bool EndsInHost;
        public bool EndsInImage;
        public int Held;
    }

    /// <summary>A memory operand as groups see it; registers by the guest's numbers.</summary>
    private struct GroupOperand
    {
        public int Base;
        public int Index;
        public int Scale;
        public int Displacement;
        public int Size;
        public bool Write;

        /// <summary>PUSH, POP, CALL and RET.</summary>
        public bool IsImplicit;

        public readonly bool HasSameBase(in GroupOperand other) =>
            Base == other.Base && Index == other.Index && (Index < 0 || Scale == other.Scale);

        public readonly bool Uses(Register register) => Number(register) == Base || Number(register) == Index;

        // Adds what a change of a register by a constant does to the address; false when that is too much.
        public readonly bool Move(Register register, long by, ref int shift)
        {
            long sum = shift;
            sum += Number(register) == Base ? by : 0;
            sum += Number(register) == Index ? by * Scale : 0;
            shift = (int)sum;
            return by is > -Sites.GroupBytes and < Sites.GroupBytes && sum is > -4096 and < 4096;
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System.Numerics;
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
// constants. Where no flag is live at the start and nothing needs T0, a group may have operands of a second address, which
// T0 holds: loops that read one array and write another. An index that is extended from a 32-bit counter in each round
// moves by a constant, too, while the counter is far from an overflow, which the check looks at (CheckExtension).

// SAFETY: generated code addresses at most a group's span from T1, which its check has compared with what the site allows
// (Sites.GroupBytes); pointers here are places in the arena of code that is being emitted.
internal sealed unsafe partial class Translator
{
    private const int BaseIsCode = -2;

    private readonly int[] _groupOffsets = new int[MaxInsns];
    private readonly GroupCopy[] _groups = new GroupCopy[MaxInsns];
    private int _groupLast = -1;
    private ulong _groupMembers;
    private ulong _groupSeconds;
    private Extension _extension;
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
    private HostMemory MemberOperand =>
        new(((_groupSeconds >> _at) & 1) != 0 ? Host.T0 : Host.T1, _groupOffsets[_at]);

    // Looks whether a group starts at the present instruction, and emits its check.
    private void OpenGroup()
    {
        _groupLast = -1;
        if (DataMode == MmuMode.Empty || _groupFailed || _inCopy || !Operand(_at, out GroupOperand first))
        {
            return;
        }

        var one = new Cursor(first, _extension);
        var two = default(Cursor);
        bool hasTwo = false;
        bool canHaveTwo = DataMode == MmuMode.User && _live[_at] == 0 && LeavesT0(_at);
        int last = _at;
        ulong members = 1UL << _at;
        ulong seconds = 0;
        one.Add(first, ref _groupOffsets[_at]);
        for (int i = _at; i + 1 < _count; i++)
        {
            if (!Passes(i, members, ref one) || (hasTwo && !Passes(i, members, ref two)))
            {
                break;
            }

            canHaveTwo &= LeavesT0(i + 1);
            if (hasTwo && !canHaveTwo)
            {
                break;
            }

            if (!Operand(i + 1, out GroupOperand next))
            {
                continue;
            }

            if (next.HasSameBase(one.Key))
            {
                if (!one.Add(next, ref _groupOffsets[i + 1]))
                {
                    break;
                }
            }
            else
            {
                if (!hasTwo && (!canHaveTwo || next.Base == BaseIsCode || Wanders(i + 1) ||
                    !TryReplay(i, members, next, out two)))
                {
                    break;
                }

                hasTwo = true;
                if (!next.HasSameBase(two.Key) || !two.Add(next, ref _groupOffsets[i + 1]))
                {
                    break;
                }

                seconds |= 1UL << (i + 1);
            }

            last = i + 1;
            members |= 1UL << last;
        }

        hasTwo = seconds != 0;
        if (BitOperations.PopCount(members) - (hasTwo ? 1 : 0) < 2)
        {
            return;
        }

        for (int i = _at; i <= last; i++)
        {
            _groupOffsets[i] -= ((seconds >> i) & 1) != 0 ? two.Low : one.Low;
        }

        FreeFlags();
        _slowGroup = _groupCount;
        _groups[_groupCount++] = new GroupCopy { Head = _at, Last = last, InImage = _inImage };
        EmitGroupCheck(one, _insns[_at]);
        if (hasTwo)
        {
            _held = -1;
            int second = BitOperations.TrailingZeroCount(seconds);
            CheckExtension(two);
            HostMemory form = LinearOf(_insns[second]);
            form = Moved(form, two.Low - two.Key.Displacement);
            Probe(form, two.High - two.Low, two.Write, 1, isMerged: true, Host.T0);
        }

        _slowGroup = -1;
        _groupLast = last;
        _groupMembers = members;
        _groupSeconds = seconds;
        _rspDelta = 0;
        Groups++;
    }

    // The address of a second kind of operand, first met behind an instruction, as seen from the group's start.
    private bool TryReplay(int behind, ulong members, in GroupOperand key, out Cursor cursor)
    {
        cursor = new Cursor(key, _extension);
        for (int i = _at; i <= behind; i++)
        {
            if (!Passes(i, members, ref cursor))
            {
                return false;
            }
        }

        return true;
    }

    // T0 is free in this instruction and its way to a member.
    private bool LeavesT0(int i)
    {
        ref Instruction instruction = ref _insns[i];
        switch (_traits[i].Kind)
        {
            case InsnKind.Nop:
                return true;
            case InsnKind.Jcc or InsnKind.Jmp:
                return _ways[i] != Way.Plain;
            case InsnKind.Lea or InsnKind.Pass or InsnKind.Vector or InsnKind.X87:
                return SpilledOperands(instruction) == 0 && !IsSpilled(instruction.MemoryBase) &&
                    !IsSpilled(instruction.MemoryIndex) && (instruction.MemoryBase == Register.None ||
                    (instruction.MemoryBase.IsGPR() && instruction.MemoryBase.GetSize() == 8)) &&
                    (instruction.MemoryIndex == Register.None || instruction.MemoryIndex.GetSize() == 8) &&
                    SegmentOf(instruction) < 0;
            default:
                return false;
        }
    }

    private void EmitGroupCheck(in Cursor cursor, in Instruction instruction)
    {
        CheckExtension(cursor);
        int span = cursor.High - cursor.Low;
        HostMemory form = GroupForm(cursor, instruction);
        if (Wanders(form))
        {
            bool usesT0 = UsesT0(form);
            ProbeTlb(form, span, cursor.Write, 1);
            form = usesT0 ? GroupForm(cursor, instruction) : form;
            AddAddress(form);
        }
        else
        {
            Probe(form, span, cursor.Write, 1, isMerged: true);
        }
    }

    private HostMemory GroupForm(in Cursor cursor, in Instruction instruction) => cursor.Key.IsImplicit
        ? new HostMemory(Host.GuestRsp, cursor.Low)
        : Moved(LinearOf(instruction), cursor.Low - cursor.Key.Displacement);

    // Rounds that extend a 32-bit counter anew stay in step as long as it does not overflow.
    private void CheckExtension(in Cursor cursor)
    {
        if (cursor.NeedsRange)
        {
            const int limit = 0x7FFFFF00;
            int host = HostOf(cursor.Extension.Target);
            _e.AluImmediate(AluOp.Cmp, host, cursor.Extension.IsSigned ? limit : unchecked((int)0xFFFFFF00), wide: false);
            SlowJump(_e.JumpIf(cursor.Extension.IsSigned ? HostCondition.Greater : HostCondition.Above));
        }
    }

    // Keeps _extension up to date: called behind each instruction.
    private void FollowExtension(int i)
    {
        ref Instruction instruction = ref _insns[i];
        InsnKind kind = _traits[i].Kind;
        if (kind is InsnKind.Nop or InsnKind.Jcc or InsnKind.Jmp)
        {
            return;
        }

        if (kind is not (InsnKind.Pass or InsnKind.Vector or InsnKind.X87) || !WritesOperandsOnly(instruction, kind))
        {
            _extension = default;
            return;
        }

        if (Extension.TryRead(instruction, out Extension made))
        {
            _extension = made;
            return;
        }

        for (int operand = 0; operand < instruction.OpCount; operand++)
        {
            if (WritesGpr(instruction, _traits[i], operand))
            {
                int number = Number(instruction.GetOpRegister(operand));
                if (number == _extension.Target || (number == _extension.Source && !IsStep(instruction, out _)))
                {
                    _extension = default;
                }
                else if (number == _extension.Source && IsStep(instruction, out long by))
                {
                    _extension.Ahead += by;
                }
            }
        }
    }

    private static bool WritesGpr(in Instruction instruction, in InsnTraits traits, int operand) =>
        instruction.GetOpKind(operand) == OpKind.Register && ((traits.Access >> (2 * operand)) & 2) != 0 &&
        instruction.GetOpRegister(operand).IsGPR();

    // Adds a constant to a 32- or 64-bit register.
    private static bool IsStep(in Instruction instruction, out long by)
    {
        by = 0;
        if (instruction.Op0Kind != OpKind.Register || instruction.Op0Register.GetSize() < 4)
        {
            return false;
        }

        bool isImmediate = instruction.OpCount > 1 && instruction.Op1Kind is OpKind.Immediate8to64
            or OpKind.Immediate32to64 or OpKind.Immediate8to32 or OpKind.Immediate32;
        long value = !isImmediate ? 0 : instruction.Op1Kind == OpKind.Immediate32
            ? (int)instruction.Immediate32
            : (long)instruction.GetImmediate(1);
        value = instruction.Op0Register.GetSize() == 4 ? (int)value : value;
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Inc:
                by = 1;
                return true;
            case Mnemonic.Dec:
                by = -1;
                return true;
            case Mnemonic.Add when isImmediate:
                by = value;
                break;
            case Mnemonic.Sub when isImmediate:
                by = -value;
                break;
            default:
                return false;
        }

        return by is > -4096 and < 4096;
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
    private bool Passes(int i, ulong members, ref Cursor cursor)
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
                cursor.Shift -= 8;
                return true;
            case InsnKind.Pop when isMember:
                cursor.Shift += 8;
                return !cursor.Uses(instruction.Op0Register);
            case InsnKind.Lea:
                return PassesLea(instruction, ref cursor);
            case InsnKind.Pass or InsnKind.Vector or InsnKind.X87:
                return (isMember || !HasMemory(instruction)) && SpilledOperands(instruction) <= 1 &&
                    PassesWrites(instruction, _traits[i], ref cursor);
            default:
                return false;
        }
    }

    private static bool PassesLea(in Instruction instruction, ref Cursor cursor)
    {
        Register target = instruction.Op0Register;
        if (!IsAddressable(instruction) || target.GetSize() < 4 ||
            (instruction.MemoryIndex != Register.None && IsSpilled(instruction.MemoryIndex) &&
            IsSpilled(instruction.MemoryBase)))
        {
            return false;
        }

        if (!cursor.Uses(target))
        {
            return true;
        }

        return target.GetSize() == 8 && instruction.MemoryBase == target && instruction.MemoryIndex == Register.None &&
            Number(target) != cursor.Extension.Source &&
            cursor.Move(Number(target), (long)instruction.MemoryDisplacement64);
    }

    private static bool PassesWrites(in Instruction instruction, in InsnTraits traits, ref Cursor cursor)
    {
        if (!WritesOperandsOnly(instruction, traits.Kind))
        {
            return false;
        }

        if (Extension.TryRead(instruction, out Extension made) && made.IsLike(cursor.Extension) &&
            cursor.Key.Uses(made.Target))
        {
            return cursor.Renew();
        }

        for (int i = 0; i < instruction.OpCount; i++)
        {
            if (!WritesGpr(instruction, traits, i) || !cursor.Uses(instruction.GetOpRegister(i)))
            {
                continue;
            }

            Register register = instruction.GetOpRegister(i);
            int number = Number(register);
            bool isStep = IsStep(instruction, out long by);
            if (number == cursor.Extension.Source)
            {
                if (!isStep)
                {
                    return false;
                }

                cursor.Extension.Ahead += by;
            }

            if (cursor.Key.Uses(number) && (!isStep || register.GetSize() != 8 || !cursor.Move(number, by)))
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

        public readonly bool Uses(int register) => register == Base || register == Index;

        // How often a register goes into the address.
        public readonly int Factor(int register) =>
            (register == Base ? 1 : 0) + (register == Index ? Scale : 0);
    }

    /// <summary>A 64-bit register that was made from a 32-bit one by sign or zero extension.</summary>
    private struct Extension
    {
        /// <summary>Registers by the guest's numbers; both 0 when there is none.</summary>
        public int Target;
        public int Source;
        public bool IsSigned;

        /// <summary>What was added to the source since.</summary>
        public long Ahead;

        public readonly bool Exists => Target != Source;

        public readonly bool IsLike(in Extension other) =>
            Exists && Target == other.Target && Source == other.Source && IsSigned == other.IsSigned;

        public static bool TryRead(in Instruction instruction, out Extension extension)
        {
            extension = default;
            bool isSigned = instruction.Code == Code.Movsxd_r64_rm32;
            if ((!isSigned && instruction.Code is not (Code.Mov_r32_rm32 or Code.Mov_rm32_r32)) ||
                instruction.Op0Kind != OpKind.Register || instruction.Op1Kind != OpKind.Register)
            {
                return false;
            }

            int target = Number(instruction.Op0Register);
            int source = Number(instruction.Op1Register);
            if (target == source || target == Host.Rsp || source == Host.Rsp || IsSpilled(target) || IsSpilled(source))
            {
                return false;
            }

            extension = new Extension { Target = target, Source = source, IsSigned = isSigned };
            return true;
        }
    }

    /// <summary>Follows the address of a group's operands through its instructions.</summary>
    private struct Cursor
    {
        public GroupOperand Key;

        /// <summary>How the address has changed since the start, and what of that the extended register did.</summary>
        public int Shift;
        public int ExtensionShift;
        public Extension Extension;

        /// <summary>The extended register was renewed: its value at the start must be far from an overflow.</summary>
        public bool NeedsRange;
        public int Low;
        public int High;
        public bool Write;

        public Cursor(in GroupOperand key, in Extension extension)
        {
            this = default;
            Key = key;
            Low = int.MaxValue;
            High = int.MinValue;
            bool helps = extension.Exists && key.Uses(extension.Target) && !key.Uses(extension.Source);
            Extension = helps ? extension : new Extension { Target = -3, Source = -3 };
        }

        public readonly bool Uses(Register register) =>
            Key.Uses(Number(register)) || Number(register) == Extension.Source;

        // Adds what a change of a register by a constant does to the address; false when that is too much.
        public bool Move(int register, long by)
        {
            if (by is <= -Sites.GroupBytes or >= Sites.GroupBytes)
            {
                return false;
            }

            int change = (int)by * Key.Factor(register);
            Shift += change;
            ExtensionShift += register == Extension.Target ? change : 0;
            return Shift is > -4096 and < 4096;
        }

        // The extended register is made from the other one again.
        public bool Renew()
        {
            if (Extension.Ahead is < 0 or >= Sites.GroupBytes)
            {
                return false;
            }

            int now = (int)Extension.Ahead * Key.Factor(Extension.Target);
            Shift += now - ExtensionShift;
            ExtensionShift = now;
            NeedsRange = true;
            return true;
        }

        // Takes an operand into the span; false when that gets too long.
        public bool Add(in GroupOperand operand, ref int offset)
        {
            int at = operand.Displacement + Shift;
            int low = at < Low ? at : Low;
            int high = at + operand.Size > High ? at + operand.Size : High;
            if (high - low > Sites.GroupBytes)
            {
                return false;
            }

            Low = low;
            High = high;
            Write |= operand.Write;
            offset = at;
            return true;
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System.Diagnostics;
using Iced.Intel;

namespace Vmm.X86;

// Memory operands: from a guest operand to a host operand that cannot fault and cannot leave the guest's RAM. The check
// is the one of Sites.cs, in the rings of the block's privilege mode, which is part of the block's key; it leaves in T1
// what is to be added to the linear address, and the operand becomes [ea + T1].

// SAFETY: the host address is addend + linear for a linear range inside one page for which an entry exists; entries
// exist only for pages of RAM or ROM that Paging.Fill took from a memory slot, and for writing only for RAM.
internal sealed unsafe partial class Translator
{
    // So many misses are looked at together, or those of so much time.
    private const ulong MissesOfCrowd = 1024;
    private const double NanosecondsOfCrowd = 20e6;

    // With less time than this from miss to miss, the sites are crowded: one costs about 15 ns.
    private const double NanosecondsOfCrowdedMiss = 1000;

    private readonly int[] _nextSite = new int[Sites.Classes];
    private ulong _missesBefore;
    private long _missesSince = Stopwatch.GetTimestamp();
    private bool _areSitesCrowded;
    private bool _isCrowded;

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
            _held = -1;
            _e.Load(Host.T0, HostMemory.Context(Offsets.CodeBase));
            form = new HostMemory(Host.T0, displacement + PageOffset);
        }
        else
        {
            int b = start == Register.None ? Host.None : Number(start);
            int i = index == Register.None ? Host.None : Number(index);
            if (i >= 0 && IsSpilled(i))
            {
                if (b == _held && scale == 0)
                {
                    (b, i) = (i, b);
                }

                Hold(i);
                if (b >= 0 && IsSpilled(b) && scale == 0)
                {
                    _held = -1;
                    _e.Alu(AluOp.Add, Host.T0, Slot(b));
                    form = new HostMemory(Host.T0, displacement);
                }
                else if (b >= 0 && IsSpilled(b))
                {
                    _held = -1;
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
                Hold(b);
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
            _held = -1;
            _e.Lea32(Host.T0, form);
            form = new HostMemory(Host.T0, 0);
        }

        if (segment >= 0)
        {
            _held = -1;
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
        return Record(_at)->AddressSize == 4 && instruction.Length > 0;
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

    // Makes T0 hold a register that lives in the context, or leaves it at that.
    private void Hold(int register)
    {
        if (_held != register)
        {
            _e.Load(Host.T0, Slot(register));
            _held = register;
        }
    }

    private static bool UsesT0(in HostMemory form) => form.Base == Host.T0 || form.Index == Host.T0;

    // Checks an operand and answers where it is in the host. With needsT0, T0 is not part of that.
    // isStore: it is not read.
    private HostMemory Check(
        in Instruction instruction, int size, bool write, int alignment, bool needsT0, bool isStore = false)
    {
        HostMemory form = LinearOf(instruction);
        if (Wanders(form))
        {
            bool usesT0 = UsesT0(form);
            ProbeTlb(form, size, write, alignment);
            form = usesT0 ? LinearOf(instruction) : form;
            if (needsT0 && (form.Index >= 0 || usesT0))
            {
                AddAddress(form);
                return new HostMemory(Host.T1, 0);
            }

            form = Flat(form);
        }
        else if (form.Index >= 0 ? needsT0 || isStore : needsT0 && UsesT0(form))
        {
            // Who loads may wait for the address, and an addend that is added to it is ready sooner.
            Probe(form, size, write, alignment, isMerged: true);
            return new HostMemory(Host.T1, 0);
        }
        else
        {
            form = Flat(form);
            Probe(form, size, write, alignment);
        }

        return form.Base < 0
            ? new HostMemory(Host.T1, form.Displacement)
            : new HostMemory(form.Base, Host.T1, 0, form.Displacement);
    }

    // A form without an index.
    private HostMemory Flat(in HostMemory form)
    {
        if (form.Index < 0)
        {
            return form;
        }

        _held = -1;
        _e.Lea(Host.T0, form);
        return new HostMemory(Host.T0, 0);
    }

    // T1 = the addend in T1 + what a form addresses. May use T0.
    private void AddAddress(in HostMemory form)
    {
        if (form.Index < 0 && form.Base >= 0)
        {
            _e.Lea(Host.T1, new HostMemory(form.Base, Host.T1, 0, form.Displacement));
            return;
        }

        _held = -1;
        _e.Lea(Host.T0, form);
        _e.Alu(AluOp.Add, Host.T1, Host.T0);
    }

    // The check proper. Leaves in T1 (or T0) the addend or, when merged, where the operand is in the host; the other of
    // the two stays as it is.
    private void Probe(
        in HostMemory form, int size, bool write, int alignment, bool isMerged = false, int target = Host.T1)
    {
        MmuMode mode = DataMode;
        if (mode == MmuMode.Empty)
        {
            SlowJump(_e.JumpForward());
            return;
        }

        SitePlaces += _inCopy ? 0 : 1;
        int kind = Sites.Class(mode, write, size);
        int site = Sites.Offset(kind, IsStack(form) ? 0 : ++_nextSite[kind]);
        Address(form, target);
        if (alignment > 1)
        {
            _e.TestImmediate32(target, alignment - 1);
            SlowJump(_e.JumpIf(HostCondition.NotEqual));
        }

        AccessClass access = (mode == MmuMode.User ? AccessClass.UserSite : AccessClass.KernelSite) -
            (IsStack(form) ? 1 : 0);
        CountAccess(access, AccessCount.Checks);
        _e.Alu(AluOp.Sub, target, HostMemory.Context(site + SiteEntry.LowOffset));
        _e.Alu(AluOp.Cmp, target, HostMemory.Context(site + SiteEntry.LimitOffset));
        byte* other = _e.JumpIf(HostCondition.AboveOrEqual);
        if (isMerged)
        {
            _e.Alu(AluOp.Add, target, HostMemory.Context(site + SiteEntry.HostLowOffset));
        }
        else
        {
            _e.Load(target, HostMemory.Context(site + SiteEntry.AddendOffset));
        }

        _misses[_missCount++] = new SiteMiss
        {
            Jump = other,
            Back = (nint)_e.At,
            Form = form,
            Site = site | ((size - 1) << 24),
            Kind = kind,
            Insn = _at,
            Group = _slowGroup,
            IsMerged = isMerged,
            Target = target,
            Access = access,
        };
    }

    // Whether the sites are crowded: programs that run through so much code that places lose their site to others before
    // they come by again (compilers: a third of all checks) miss all over, and no site of its own accord too fast. Then the
    // TLB serves better; loops keep their sites, which they have for themselves while they run. What has a site already
    // keeps it, so the rate falls as more code is translated.
    private void LookAtSites()
    {
        ulong misses = _cpu->SiteMisses - _missesBefore;
        long now = Stopwatch.GetTimestamp();
        double elapsedNs = Stopwatch.GetElapsedTime(_missesSince, now).TotalNanoseconds;
        if (misses >= MissesOfCrowd || elapsedNs > NanosecondsOfCrowd)
        {
            _areSitesCrowded = misses * NanosecondsOfCrowdedMiss > elapsedNs;
            _missesBefore = _cpu->SiteMisses;
            _missesSince = now;
        }

        _isCrowded = _areSitesCrowded && !IsLoop;
    }

    // Operands on the stack have the same site, since frames lie side by side.
    private static bool IsStack(in HostMemory form) => form.Base == Host.GuestRsp && form.Index < 0;

    // Whether an operand had better be looked up in the TLB than have a site. Kernels go from object to object, and run so
    // many places between two returns to one that sites miss: measured, they cost twice what the TLB does. Stacks stay.
    private bool Wanders(in HostMemory form)
    {
        return DataMode switch
        {
            MmuMode.Empty => false,
            MmuMode.User => Wanders(_at) || (_isCrowded && !IsStack(form)),
            _ => !IsStack(form) || Wanders(_at),
        };
    }

    // The check by the TLB; leaves the addend in T1 and destroys T0.
    private void ProbeTlb(in HostMemory form, int size, bool write, int alignment)
    {
        TlbPlaces += _inCopy ? 0 : 1;
        _held = -1;
        int table = CpuContext.TlbOffset + ((int)DataMode * TlbEntry.Count * TlbEntry.SizeBytes);
        _e.Lea(Host.T1, form);
        if (alignment > 1)
        {
            _e.TestImmediate32(Host.T1, alignment - 1);
            SlowJump(_e.JumpIf(HostCondition.NotEqual));
        }

        AccessClass access = DataMode == MmuMode.User ? AccessClass.UserTlb : AccessClass.KernelTlb;
        CountAccess(access, AccessCount.Checks);
        LookUp(new HostMemory(form.Base, form.Index, form.Scale, form.Displacement + size - 1, form.IsContext), table, write);
        CountAccess(access, AccessCount.Hits);
    }

    // The TLB entry of the address in T1; last is the operand's last byte, which must lie in the same page. Leaves the entry's
    // addend in T1.
    private void LookUp(in HostMemory last, int table, bool write)
    {
        _e.Shift(5, Host.T1, 7);
        _e.AluImmediate(AluOp.And, Host.T1, (TlbEntry.Count - 1) << 5, wide: false);
        _e.Lea(Host.T0, last);
        _e.AluImmediate(AluOp.And, Host.T0, -PageBytes);
        _e.Alu(AluOp.Or, Host.T0, HostMemory.Context(Offsets.TlbAsid));
        _e.Alu(
            AluOp.Cmp, Host.T0, HostMemory.Context(Host.T1, table + (write ? TlbEntry.WriteTagOffset : TlbEntry.ReadTagOffset)));
        SlowJump(_e.JumpIf(HostCondition.NotEqual));
        if (write)
        {
            _e.Load(Host.T0, HostMemory.Context(Host.T1, table + TlbEntry.PageFlagsOffset));
            _e.CompareByte(new HostMemory(Host.T0, 0), (int)Memory.PageFlags.Written);
            SlowJump(_e.JumpIf(HostCondition.NotEqual));
        }

        _e.Load(Host.T1, HostMemory.Context(Host.T1, table + TlbEntry.AddendOffset));
    }

    // One more check of a class, in the mode that counts. Destroys flags, as checks do.
    private void CountAccess(AccessClass access, int what) => CountAccess(((int)access * AccessCount.OfClass) + what);

    private void CountAccess(int counter)
    {
        if (CountsAccesses)
        {
            _e.AluImmediate8(
                AluOp.Add, HostMemory.Context(CpuContext.AccessCountsOffset + (sizeof(ulong) * counter)), 1, wide: true);
        }
    }

    // A register = what a form addresses.
    private void Address(in HostMemory form, int target)
    {
        if (form.Base >= 0 && form.Index < 0 && form.Displacement == 0)
        {
            _e.Move(target, form.Base);
        }
        else
        {
            _e.Lea(target, form);
        }
    }

    // Cold code of a check: the access leaves the site's page.
    private void EmitMiss(ref SiteMiss miss)
    {
        _e.Land(miss.Jump);
        CountAccess(miss.Access, AccessCount.Misses);
        int other = miss.Target == Host.T1 ? Host.T0 : Host.T1;
        Address(miss.Form, miss.Target);
        _e.Push(other);
        if (miss.Target != Host.T0)
        {
            _e.Move(Host.T0, Host.T1);
        }

        _e.MoveImmediate(Host.T1, (uint)miss.Site);
        _e.Call((byte*)_cache.Stubs.FillSite[miss.Kind]);
        if (miss.IsMerged)
        {
            _e.Lea(miss.Target, new HostMemory(Host.T0, Host.T1, 0, 0));
        }

        _e.Pop(other);
        _e.JumpIf(HostCondition.Equal, (byte*)miss.Back);
        CountAccess(miss.Access, AccessCount.Slow);
        _slow[_slowCount++] = new SlowSite
        {
            Jump = _e.JumpForward(),
            Insn = miss.Insn,
            Group = miss.Group,
            Resume = miss.Resume,
            Held = miss.Held,
        };
    }

    private MmuMode DataMode => (_block->Key & (BlockKey.User | BlockKey.Ac)) switch
    {
        0 => MmuMode.Supervisor,
        BlockKey.User => MmuMode.User,
        BlockKey.Ac => MmuMode.SupervisorAc,
        _ => MmuMode.Empty,
    };

    /// <summary>A check whose site did not have the page.</summary>
    private struct SiteMiss
    {
        public byte* Jump;
        public nint Back;
        public HostMemory Form;
        public int Site;
        public int Kind;
        public int Insn;

        /// <summary>Of a group's check: which group; otherwise -1.</summary>
        public int Group;

        /// <summary>Where to go on, and the register of the context that T0 holds there.</summary>
        public nint Resume;
        public int Held;

        /// <summary>T1 becomes the host's address instead of the addend.</summary>
        public bool IsMerged;

        /// <summary>T1, or T0 for the second operand of a group.</summary>
        public int Target;

        /// <summary>For statistics.</summary>
        public AccessClass Access;
    }
}

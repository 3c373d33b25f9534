// SPDX-License-Identifier: BSD-2-Clause
using System.Threading;

namespace Vmm.X86;

// System instructions (SDM 2A-2D, 3A chapter 2). Each checks privilege first, then operands.

/// <summary>System instructions.</summary>
internal static unsafe class SystemGroup
{
    private static bool Privileged(CpuContext* cpu)
    {
        if (cpu->Cpl == 0)
        {
            return true;
        }

        Faults.Gp(cpu);
        return false;
    }

    // SGDT, SIDT, SLDT, STR, SMSW above level 0 with CR4.UMIP.
    private static bool UmipAllows(CpuContext* cpu)
    {
        if (cpu->Cpl == 0 || (cpu->Cr4 & Cr4.Umip) == 0)
        {
            return true;
        }

        Faults.Gp(cpu);
        return false;
    }

    public static Status Hlt(CpuContext* cpu, Insn* insn)
    {
        if (!Privileged(cpu))
        {
            return Status.Fault;
        }

        cpu->Rip = Insn.NextAddress(cpu, insn);
        return Status.Halt;
    }

    public static Status Cli(CpuContext* cpu, Insn* insn)
    {
        if (cpu->Mode != ProcessorMode.Real && cpu->Cpl > (int)((cpu->RflagsSystem >> 12) & 3))
        {
            if (!VirtualInterrupts.AreOn(cpu))
            {
                return Faults.Gp(cpu);
            }

            cpu->RflagsSystem &= ~Rflags.Vif;
            return Status.Next;
        }

        cpu->RflagsSystem &= ~Rflags.If;
        return Status.Next;
    }

    public static Status Sti(CpuContext* cpu, Insn* insn)
    {
        if (cpu->Mode != ProcessorMode.Real && cpu->Cpl > (int)((cpu->RflagsSystem >> 12) & 3))
        {
            if (!VirtualInterrupts.AreOn(cpu) || (cpu->RflagsSystem & Rflags.Vip) != 0)
            {
                return Faults.Gp(cpu);
            }

            cpu->RflagsSystem |= Rflags.Vif;
            return Status.Next;
        }

        if ((cpu->RflagsSystem & Rflags.If) != 0)
        {
            return Status.Next;
        }

        cpu->RflagsSystem |= Rflags.If;
        cpu->Shadow = 1;
        return Insn.EndAndLook(cpu, insn);
    }

    /// <summary>PUSHF: T by OperandSize.</summary>
    public static Status Pushf(CpuContext* cpu, Insn* insn)
    {
        ulong flags = Flags.Get(cpu) & ~(Rflags.Rf | Rflags.Vm);
        if (cpu->Mode == ProcessorMode.Virtual8086 && (flags & Rflags.Iopl) != Rflags.Iopl)
        {
            if (insn->OperandSize != 2 || !VirtualInterrupts.AreOn(cpu))
            {
                return Faults.Gp(cpu);
            }

            flags = VirtualInterrupts.Image(flags);
        }

        bool done = insn->OperandSize switch
        {
            2 => Stack.Push<ushort>(cpu, flags),
            4 => Stack.Push<uint>(cpu, flags),
            _ => Stack.Push<ulong>(cpu, flags),
        };
        return done ? Status.Next : Status.Fault;
    }

    public static Status Popf(CpuContext* cpu, Insn* insn)
    {
        int iopl = (int)((cpu->RflagsSystem >> 12) & 3);
        uint size = insn->OperandSize;
        bool isVirtual = cpu->Mode == ProcessorMode.Virtual8086 && iopl != 3;
        if (isVirtual && (size != 2 || !VirtualInterrupts.AreOn(cpu)))
        {
            return Faults.Gp(cpu);
        }

        ulong flags;
        bool done = size switch
        {
            2 => Stack.Peek<ushort>(cpu, 0, out flags),
            4 => Stack.Peek<uint>(cpu, 0, out flags),
            _ => Stack.Peek<ulong>(cpu, 0, out flags),
        };
        if (!done)
        {
            return Status.Fault;
        }

        if (isVirtual && !VirtualInterrupts.TryLoad(cpu, flags))
        {
            return Faults.Gp(cpu);
        }

        Stack.Drop(cpu, size);
        ulong mask = Rflags.Arithmetic | Rflags.Tf | Rflags.Df | Rflags.Nt;
        mask |= size > 2 ? Rflags.Ac | Rflags.Id : 0;
        if (cpu->Mode == ProcessorMode.Real || (cpu->Mode != ProcessorMode.Virtual8086 && cpu->Cpl == 0))
        {
            mask |= Rflags.If | Rflags.Iopl;
        }
        else if (cpu->Cpl <= iopl)
        {
            mask |= Rflags.If;
        }

        ulong before = cpu->RflagsSystem;
        FarTransfer.SetFlags(cpu, flags, mask);
        cpu->RflagsSystem &= ~Rflags.Rf;
        ulong changed = before ^ cpu->RflagsSystem;
        if ((changed & Rflags.Ac) != 0)
        {
            Modes.UpdateTlb(cpu);
        }

        bool look = (changed & (Rflags.Tf | Rflags.Ac)) != 0 || (changed & cpu->RflagsSystem & Rflags.If) != 0;
        return look ? Insn.EndAndLook(cpu, insn) : Status.Next;
    }

    public static Status Clac(CpuContext* cpu, Insn* insn)
    {
        if (cpu->Cpl != 0)
        {
            return Faults.Ud(cpu);
        }

        cpu->RflagsSystem &= ~Rflags.Ac;
        Modes.UpdateTlb(cpu);
        return Status.Next;
    }

    public static Status Stac(CpuContext* cpu, Insn* insn)
    {
        if (cpu->Cpl != 0)
        {
            return Faults.Ud(cpu);
        }

        cpu->RflagsSystem |= Rflags.Ac;
        Modes.UpdateTlb(cpu);
        return Status.Next;
    }

    /// <summary>MOV Sreg, r/m16: the segment is in R0, the value in R1 or memory.</summary>
    public static Status MovToSegment(CpuContext* cpu, Insn* insn)
    {
        if (!Reg.LoadEither<ushort>(cpu, insn, insn->R1, out ulong selector))
        {
            return Status.Fault;
        }

        if (!Segmentation.Load(cpu, insn->R0, (uint)selector))
        {
            return Status.Fault;
        }

        if (insn->R0 == Seg.Ss)
        {
            cpu->Shadow = 2;
        }

        Modes.Update(cpu);
        return Insn.EndAndLook(cpu, insn);
    }

    /// <summary>MOV r/m, Sreg: memory takes 16 bits.</summary>
    public static Status MovFromSegment(CpuContext* cpu, Insn* insn)
    {
        ulong selector = CpuContext.Segment(cpu, insn->R1)->Selector;
        return StoreWord(cpu, insn, selector);
    }

    private static Status StoreWord(CpuContext* cpu, Insn* insn, ulong value)
    {
        if ((insn->Flags & InsnFlags.HasMemory) != 0)
        {
            return Reg.StoreOperand<ushort>(cpu, insn, value) ? Status.Next : Status.Fault;
        }

        Reg.SetSized(cpu, insn, value);

        return Status.Next;
    }

    public static Status Sldt(CpuContext* cpu, Insn* insn) =>
        cpu->Mode <= ProcessorMode.Virtual8086 ? Faults.Ud(cpu)
            : UmipAllows(cpu) ? StoreWord(cpu, insn, CpuContext.Segment(cpu, Seg.Ldtr)->Selector) : Status.Fault;

    public static Status Str(CpuContext* cpu, Insn* insn) =>
        cpu->Mode <= ProcessorMode.Virtual8086 ? Faults.Ud(cpu)
            : UmipAllows(cpu) ? StoreWord(cpu, insn, CpuContext.Segment(cpu, Seg.Tr)->Selector) : Status.Fault;

    public static Status Smsw(CpuContext* cpu, Insn* insn) =>
        UmipAllows(cpu) ? StoreWord(cpu, insn, cpu->Cr0) : Status.Fault;

    public static Status Lmsw(CpuContext* cpu, Insn* insn)
    {
        if (!Privileged(cpu) || !Reg.LoadEither<ushort>(cpu, insn, insn->R0, out ulong value))
        {
            return Status.Fault;
        }

        // PE can be set but not cleared.
        ulong cr0 = (cpu->Cr0 & ~0xEUL) | (value & 0xF);
        return ControlRegisters.WriteCr0(cpu, cr0) ? Insn.EndAndLook(cpu, insn) : Status.Fault;
    }

    public static Status Lldt(CpuContext* cpu, Insn* insn)
    {
        if (cpu->Mode <= ProcessorMode.Virtual8086)
        {
            return Faults.Ud(cpu);
        }

        if (!Privileged(cpu) || !Reg.LoadEither<ushort>(cpu, insn, insn->R0, out ulong value))
        {
            return Status.Fault;
        }

        var selector = (uint)value;
        SegmentRegister* ldt = CpuContext.Segment(cpu, Seg.Ldtr);
        if ((selector & 0xFFFC) == 0)
        {
            *ldt = default;
            ldt->Selector = (ushort)selector;
            ldt->Rights = Segmentation.UnusableBit;
            return Status.Next;
        }

        if (!SystemDescriptor(cpu, selector, 2, 2, out Descriptor descriptor))
        {
            return Status.Fault;
        }

        Segmentation.Assign(cpu, Seg.Ldtr, selector, descriptor);
        ldt->Base |= descriptor.High << 32;
        return Status.Next;
    }

    public static Status Ltr(CpuContext* cpu, Insn* insn)
    {
        if (cpu->Mode <= ProcessorMode.Virtual8086)
        {
            return Faults.Ud(cpu);
        }

        if (!Privileged(cpu) || !Reg.LoadEither<ushort>(cpu, insn, insn->R0, out ulong value))
        {
            return Status.Fault;
        }

        var selector = (uint)value;
        if ((selector & 0xFFFC) == 0)
        {
            return Faults.Gp(cpu);
        }

        uint narrow = Segmentation.IsLongActive(cpu) ? 9U : 1;
        if (!SystemDescriptor(cpu, selector, 9, narrow, out Descriptor descriptor))
        {
            return Status.Fault;
        }

        descriptor.Low |= 2UL << 40;
        if (!Paging.WriteSystem(cpu, descriptor.At + 5, (byte)(descriptor.Low >> 40)))
        {
            return Status.Fault;
        }

        Segmentation.Assign(cpu, Seg.Tr, selector, descriptor);
        CpuContext.Segment(cpu, Seg.Tr)->Base |= descriptor.High << 32;
        return Status.Next;
    }

    private static bool SystemDescriptor(
        CpuContext* cpu, uint selector, uint type, uint otherType, out Descriptor descriptor)
    {
        if (!Segmentation.FetchGlobal(cpu, selector, out descriptor) ||
            !Segmentation.Accept(
                cpu, selector, descriptor,
                !descriptor.IsSystem || (descriptor.Type != type && descriptor.Type != otherType)))
        {
            return false;
        }

        if (!Segmentation.IsLongActive(cpu))
        {
            return true;
        }

        if (!Segmentation.FetchHigh(cpu, selector, Vector.GeneralProtection, ref descriptor))
        {
            return false;
        }

        if (!Paging.IsCanonicalRegister(cpu, descriptor.Base | (descriptor.High << 32)))
        {
            Segmentation.Raise(cpu, Vector.GeneralProtection, selector);
            return false;
        }

        return true;
    }

    public static Status Sgdt(CpuContext* cpu, Insn* insn) =>
        UmipAllows(cpu) ? StoreTable(cpu, insn, cpu->GdtBase, cpu->GdtLimit) : Status.Fault;

    public static Status Sidt(CpuContext* cpu, Insn* insn) =>
        UmipAllows(cpu) ? StoreTable(cpu, insn, cpu->IdtBase, cpu->IdtLimit) : Status.Fault;

    private static Status StoreTable(CpuContext* cpu, Insn* insn, ulong tableBase, ushort limit)
    {
        int size = cpu->Mode == ProcessorMode.Long ? 10 : 6;
        if (!Mem.Address(cpu, insn, (uint)size, true, out ulong linear))
        {
            return Status.Fault;
        }

        byte* raw = stackalloc byte[10];
        // SAFETY: 2 and 8 bytes are the 10 of raw.
        *(ushort*)raw = limit;
        *(ulong*)(raw + 2) = tableBase;
        return Mem.WriteBytes(cpu, linear, raw, size) ? Status.Next : Status.Fault;
    }

    public static Status Lgdt(CpuContext* cpu, Insn* insn)
    {
        if (!LoadTable(cpu, insn, out ulong tableBase, out ushort limit))
        {
            return Status.Fault;
        }

        cpu->GdtBase = tableBase;
        cpu->GdtLimit = limit;
        return Status.Next;
    }

    public static Status Lidt(CpuContext* cpu, Insn* insn)
    {
        if (!LoadTable(cpu, insn, out ulong tableBase, out ushort limit))
        {
            return Status.Fault;
        }

        cpu->IdtBase = tableBase;
        cpu->IdtLimit = limit;
        return Status.Next;
    }

    private static bool LoadTable(CpuContext* cpu, Insn* insn, out ulong tableBase, out ushort limit)
    {
        tableBase = 0;
        limit = 0;
        int size = cpu->Mode == ProcessorMode.Long ? 10 : 6;
        byte* raw = stackalloc byte[16];
        // SAFETY: raw has 16 bytes; at most 10 are read into it and used.
        *(ulong*)(raw + 2) = 0;
        if (!Privileged(cpu) || !Mem.Address(cpu, insn, (uint)size, false, out ulong linear) ||
            !Mem.ReadBytes(cpu, linear, raw, size))
        {
            return false;
        }

        limit = *(ushort*)raw;
        tableBase = size == 10 ? *(ulong*)(raw + 2) : *(uint*)(raw + 2);
        if (size == 6 && insn->OperandSize == 2)
        {
            tableBase &= 0xFFFFFF;
        }

        if (size == 10 && !Paging.IsCanonicalRegister(cpu, tableBase))
        {
            Faults.Gp(cpu);
            return false;
        }

        return true;
    }

    public static Status Clts(CpuContext* cpu, Insn* insn)
    {
        if (!Privileged(cpu))
        {
            return Status.Fault;
        }

        cpu->Cr0 &= ~Cr0.Ts;
        return Status.Next;
    }

    /// <summary>MOV r, CRn: register in R0, number in R1.</summary>
    public static Status MovFromControl(CpuContext* cpu, Insn* insn)
    {
        if (!Privileged(cpu))
        {
            return Status.Fault;
        }

        ulong value;
        switch (insn->R1)
        {
            case 0:
                value = cpu->Cr0;
                break;
            case 2:
                value = cpu->Cr2;
                break;
            case 3:
                value = cpu->Cr3;
                break;
            case 4:
                value = cpu->Cr4;
                break;
            case 8:
                value = SoftVcpu.From(cpu).InterruptPort.Cr8;
                break;
            default:
                return Faults.Ud(cpu);
        }

        SetWide(cpu, insn->R0, value);
        return Status.Next;
    }

    private static void SetWide(CpuContext* cpu, int register, ulong value)
    {
        if (cpu->Mode == ProcessorMode.Long)
        {
            Reg.Set<ulong>(cpu, register, value);
        }
        else
        {
            Reg.Set<uint>(cpu, register, value);
        }
    }

    /// <summary>MOV CRn, r: number in R0, register in R1.</summary>
    public static Status MovToControl(CpuContext* cpu, Insn* insn)
    {
        if (!Privileged(cpu))
        {
            return Status.Fault;
        }

        ulong value = cpu->Mode == ProcessorMode.Long
            ? Reg.Get<ulong>(cpu, insn->R1)
            : Reg.Get<uint>(cpu, insn->R1);
        switch (insn->R0)
        {
            case 0:
                if (!ControlRegisters.WriteCr0(cpu, value))
                {
                    return Status.Fault;
                }

                break;
            case 2:
                cpu->Cr2 = value;
                break;
            case 3:
                if (!ControlRegisters.WriteCr3(cpu, value))
                {
                    return Status.Fault;
                }

                break;
            case 4:
                if (!ControlRegisters.WriteCr4(cpu, value))
                {
                    return Status.Fault;
                }

                break;
            case 8:
                if ((value & ~15UL) != 0)
                {
                    return Faults.Gp(cpu);
                }

                SoftVcpu.From(cpu).InterruptPort.Cr8 = (byte)value;
                cpu->InterruptHint = 1;
                break;
            default:
                return Faults.Ud(cpu);
        }

        return Insn.EndAndLook(cpu, insn);
    }

    private static bool DebugAccess(CpuContext* cpu, int number)
    {
        if (number is 4 or 5 && (cpu->Cr4 & Cr4.De) != 0)
        {
            Faults.Ud(cpu);
            return false;
        }

        if (!Privileged(cpu))
        {
            return false;
        }

        // DR7.GD: general detect.
        if ((cpu->Dr7 & (1 << 13)) != 0)
        {
            Faults.Raise(cpu, Vector.Debug);
            cpu->Fault.Address = 1 << 13;
            return false;
        }

        return true;
    }

    public static Status MovFromDebug(CpuContext* cpu, Insn* insn)
    {
        if (!DebugAccess(cpu, insn->R1))
        {
            return Status.Fault;
        }

        ulong value = insn->R1 switch
        {
            < 4 => cpu->Dr[insn->R1],
            4 or 6 => cpu->Dr6,
            _ => cpu->Dr7,
        };
        SetWide(cpu, insn->R0, value);
        return Status.Next;
    }

    public static Status MovToDebug(CpuContext* cpu, Insn* insn)
    {
        if (!DebugAccess(cpu, insn->R0))
        {
            return Status.Fault;
        }

        bool isLong = cpu->Mode == ProcessorMode.Long;
        ulong value = isLong ? Reg.Get<ulong>(cpu, insn->R1) : Reg.Get<uint>(cpu, insn->R1);
        switch (insn->R0)
        {
            case < 4:
                cpu->Dr[insn->R0] = value;
                break;
            case 4:
            case 6:
                if (value >> 32 != 0)
                {
                    return Faults.Gp(cpu);
                }

                cpu->Dr6 = (value & 0xE00F) | 0xFFFF0FF0;
                break;
            default:
                if (value >> 32 != 0)
                {
                    return Faults.Gp(cpu);
                }

                cpu->Dr7 = (value & 0xFFFF2BFF) | 0x400;
                break;
        }

        // Watched pages must lose their TLB entries.
        Paging.FlushAll(cpu);
        return Insn.EndAndLook(cpu, insn);
    }

    public static Status Invlpg(CpuContext* cpu, Insn* insn)
    {
        if (!Privileged(cpu))
        {
            return Status.Fault;
        }

        ulong linear = Mem.Offset(cpu, insn) + CpuContext.Segment(cpu, insn->Segment)->EffectiveBase;
        Paging.FlushPage(cpu, cpu->Mode == ProcessorMode.Long ? linear : linear & 0xFFFFFFFF);
        return Insn.EndAndLook(cpu, insn);
    }

    /// <summary>INVPCID: type in register R0.</summary>
    public static Status Invpcid(CpuContext* cpu, Insn* insn)
    {
        if (!Privileged(cpu))
        {
            return Status.Fault;
        }

        ulong type = cpu->Mode == ProcessorMode.Long ? Reg.Get<ulong>(cpu, insn->R0) : Reg.Get<uint>(cpu, insn->R0);
        ulong* raw = stackalloc ulong[2];
        // SAFETY: raw has two words.
        if (!Mem.Address(cpu, insn, 16, false, out ulong linear) || !Mem.ReadBytes(cpu, linear, (byte*)raw, 16))
        {
            return Status.Fault;
        }

        if (type > 3 || (type < 2 && (raw[0] >> 12) != 0))
        {
            return Faults.Gp(cpu);
        }

        if (type < 2 && (raw[0] & 0xFFF) != 0 && (cpu->Cr4 & Cr4.PcidE) == 0)
        {
            return Faults.Gp(cpu);
        }

        if (type == 0 && !Paging.IsCanonicalRegister(cpu, raw[1]))
        {
            return Faults.Gp(cpu);
        }

        var pcid = (uint)raw[0] & 0xFFF;
        if (type == 0)
        {
            // Pages are dropped from all address spaces, which is more than asked for.
            Paging.FlushPage(cpu, raw[1]);
        }
        else if (type == 1)
        {
            Asids.Forget(cpu, pcid);
            if (pcid == Asids.CurrentPcid(cpu))
            {
                Asids.Switch(cpu, pcid, false);
            }
        }
        else
        {
            Paging.FlushAll(cpu);
        }

        return Insn.EndAndLook(cpu, insn);
    }

    /// <summary>INVD, WBINVD, WBNOINVD: there is no cache to write back.</summary>
    public static Status Wbinvd(CpuContext* cpu, Insn* insn) => Privileged(cpu) ? Status.Next : Status.Fault;

    /// <summary>CLFLUSH and relatives: check the address like a load.</summary>
    public static Status Clflush(CpuContext* cpu, Insn* insn) =>
        Mem.Address(cpu, insn, 1, false, out ulong linear) && Mem.Read(cpu, linear, out byte _)
            ? Status.Next
            : Status.Fault;

    public static Status Rdmsr(CpuContext* cpu, Insn* insn)
    {
        if (!Privileged(cpu))
        {
            return Status.Fault;
        }

        DevicePort.Enter(cpu);
        bool known = Msrs.TryRead(SoftVcpu.From(cpu), (uint)cpu->Rcx, out ulong value);
        DevicePort.Leave(cpu);
        if (!known)
        {
            return Faults.Gp(cpu);
        }

        cpu->Rax = (uint)value;
        cpu->Rdx = value >> 32;
        return Status.Next;
    }

    public static Status Wrmsr(CpuContext* cpu, Insn* insn)
    {
        if (!Privileged(cpu))
        {
            return Status.Fault;
        }

        DevicePort.Enter(cpu);
        bool done = Msrs.TryWrite(SoftVcpu.From(cpu), (uint)cpu->Rcx, (uint)cpu->Rax | (cpu->Rdx << 32));
        DevicePort.Leave(cpu);
        if (!done)
        {
            return Faults.Gp(cpu);
        }

        cpu->InterruptHint = 1;
        return Insn.EndAndLook(cpu, insn);
    }

    public static Status Cpuid(CpuContext* cpu, Insn* insn)
    {
        SoftVcpu.From(cpu).Cpuid();
        return Status.Next;
    }

    public static Status Rdtsc(CpuContext* cpu, Insn* insn)
    {
        if (cpu->Cpl != 0 && (cpu->Cr4 & Cr4.Tsd) != 0)
        {
            return Faults.Gp(cpu);
        }

        ulong value = SoftVcpu.From(cpu).ReadTsc();
        cpu->Rax = (uint)value;
        cpu->Rdx = value >> 32;
        return Status.Next;
    }

    public static Status Rdtscp(CpuContext* cpu, Insn* insn)
    {
        Status status = Rdtsc(cpu, insn);
        if (status == Status.Next)
        {
            cpu->Rcx = (uint)cpu->Msr.TscAux;
        }

        return status;
    }

    /// <summary>RDPID: register in R0.</summary>
    public static Status Rdpid(CpuContext* cpu, Insn* insn)
    {
        SetWide(cpu, insn->R0, cpu->Msr.TscAux);
        return Status.Next;
    }

    /// <summary>RDPMC: there are no counters.</summary>
    public static Status Rdpmc(CpuContext* cpu, Insn* insn) => Faults.Gp(cpu);

    public static Status Swapgs(CpuContext* cpu, Insn* insn)
    {
        if (!Privileged(cpu))
        {
            return Status.Fault;
        }

        SegmentRegister* gs = CpuContext.Segment(cpu, Seg.Gs);
        (gs->Base, cpu->Msr.KernelGsBase) = (cpu->Msr.KernelGsBase, gs->Base);
        gs->EffectiveBase = gs->Base;
        return Status.Next;
    }

    /// <summary>RDFSBASE, RDGSBASE: register in R0, segment in R1.</summary>
    public static Status ReadBase(CpuContext* cpu, Insn* insn)
    {
        if ((cpu->Cr4 & Cr4.FsGsBase) == 0)
        {
            return Faults.Ud(cpu);
        }

        ulong value = CpuContext.Segment(cpu, insn->R1)->Base;
        if (insn->OperandSize == 8)
        {
            Reg.Set<ulong>(cpu, insn->R0, value);
        }
        else
        {
            Reg.Set<uint>(cpu, insn->R0, value);
        }

        return Status.Next;
    }

    /// <summary>WRFSBASE, WRGSBASE.</summary>
    public static Status WriteBase(CpuContext* cpu, Insn* insn)
    {
        if ((cpu->Cr4 & Cr4.FsGsBase) == 0)
        {
            return Faults.Ud(cpu);
        }

        ulong value = insn->OperandSize == 8 ? Reg.Get<ulong>(cpu, insn->R0) : Reg.Get<uint>(cpu, insn->R0);
        if (!Paging.IsCanonicalRegister(cpu, value))
        {
            return Faults.Gp(cpu);
        }

        SegmentRegister* segment = CpuContext.Segment(cpu, insn->R1);
        segment->Base = value;
        segment->EffectiveBase = value;
        return Status.Next;
    }

    public static Status Rdpkru(CpuContext* cpu, Insn* insn)
    {
        if ((cpu->Cr4 & Cr4.Pke) == 0)
        {
            return Faults.Ud(cpu);
        }

        if ((uint)cpu->Rcx != 0)
        {
            return Faults.Gp(cpu);
        }

        cpu->Rax = cpu->Pkru;
        cpu->Rdx = 0;
        return Status.Next;
    }

    public static Status Wrpkru(CpuContext* cpu, Insn* insn)
    {
        if ((cpu->Cr4 & Cr4.Pke) == 0)
        {
            return Faults.Ud(cpu);
        }

        if ((uint)cpu->Rcx != 0 || (uint)cpu->Rdx != 0)
        {
            return Faults.Gp(cpu);
        }

        SetPkru(cpu, (uint)cpu->Rax);
        return Status.Next;
    }

    /// <summary>Changes PKRU; cached permissions of user pages are dropped.</summary>
    public static void SetPkru(CpuContext* cpu, uint value)
    {
        if (cpu->Pkru != value)
        {
            cpu->Pkru = value;
            Paging.FlushAll(cpu);
        }
    }

    public static Status Monitor(CpuContext* cpu, Insn* insn)
    {
        if (cpu->Cpl != 0)
        {
            return Faults.Ud(cpu);
        }

        if ((uint)cpu->Rcx != 0)
        {
            return Faults.Gp(cpu);
        }

        ulong offset = cpu->Rax & insn->AddressMask;
        ulong linear = offset + CpuContext.Segment(cpu, insn->Segment)->EffectiveBase;
        return Mem.Read(cpu, linear, out byte _) ? Status.Next : Status.Fault;
    }

    /// <summary>MWAIT: returns at once after giving other threads a chance; a spurious wake-up is allowed.</summary>
    public static Status Mwait(CpuContext* cpu, Insn* insn)
    {
        if (cpu->Cpl != 0)
        {
            return Faults.Ud(cpu);
        }

        if (((uint)cpu->Rcx & ~1U) != 0)
        {
            return Faults.Gp(cpu);
        }

        Thread.Yield();
        return Insn.EndAndLook(cpu, insn);
    }

    /// <summary>RDRAND and RDSEED: register in R0.</summary>
    public static Status Rdrand(CpuContext* cpu, Insn* insn)
    {
        ulong value = SoftVcpu.From(cpu).NextRandom();
        Reg.SetSized(cpu, insn, value);

        Flags.SetArithmetic(cpu, Rflags.Cf);
        return Status.Next;
    }

    // Types of system descriptors that LAR and LSL know, a bit each (SDM 2A, LAR and LSL).
    private const uint LarTypes = 0x1A3E;
    private const uint LarTypesLong = 0x1A04;
    private const uint LslTypes = 0x0A0E;
    private const uint LslTypesLong = 0x0A04;

    /// <summary>LAR: access rights into R0, of what R1 or memory selects.</summary>
    public static Status Lar(CpuContext* cpu, Insn* insn) => Describe(cpu, insn, LarTypes, LarTypesLong, false);

    /// <summary>LSL: the same for limits, which gates do not have.</summary>
    public static Status Lsl(CpuContext* cpu, Insn* insn) => Describe(cpu, insn, LslTypes, LslTypesLong, true);

    private static Status Describe(CpuContext* cpu, Insn* insn, uint types, uint typesLong, bool limit)
    {
        if (!Inspect(cpu, insn, insn->R1, out Descriptor descriptor, out bool found))
        {
            return Status.Fault;
        }

        uint known = Segmentation.IsLongActive(cpu) ? typesLong : types;
        found = found && (!descriptor.IsSystem || ((known >> (int)descriptor.Type) & 1) != 0);
        if (found)
        {
            Reg.SetSized(cpu, insn, limit ? descriptor.Limit : (descriptor.Low >> 32) & 0x00FFFF00);
        }

        SetZero(cpu, found);
        return Status.Next;
    }

    /// <summary>VERR: flags alone.</summary>
    public static Status Verr(CpuContext* cpu, Insn* insn) => Verify(cpu, insn, false);

    /// <summary>VERW.</summary>
    public static Status Verw(CpuContext* cpu, Insn* insn) => Verify(cpu, insn, true);

    private static Status Verify(CpuContext* cpu, Insn* insn, bool write)
    {
        if (!Inspect(cpu, insn, insn->R0, out Descriptor descriptor, out bool found))
        {
            return Status.Fault;
        }

        // Bit 1 of the type: code can be read, data can be written.
        SetZero(
            cpu,
            found && !descriptor.IsSystem &&
            (descriptor.IsCode ? !write && descriptor.IsReadWrite : !write || descriptor.IsReadWrite));
        return Status.Next;
    }

    // False after a fault. A failed look at the descriptor table is an answer, not a fault; page faults are ignored here
    // too, because the table of a running system is present.
    private static bool Inspect(
        CpuContext* cpu, Insn* insn, int register, out Descriptor descriptor, out bool found)
    {
        descriptor = default;
        found = false;
        if (cpu->Mode <= ProcessorMode.Virtual8086)
        {
            Faults.Ud(cpu);
            return false;
        }

        if (!Reg.LoadEither<ushort>(cpu, insn, register, out ulong value))
        {
            return false;
        }

        var selector = (uint)value;
        if ((selector & 0xFFFC) != 0 &&
            Segmentation.Fetch(cpu, selector, Vector.GeneralProtection, out descriptor))
        {
            bool conforming = descriptor.IsCode && descriptor.IsConforming && !descriptor.IsSystem;
            int rpl = (int)selector & 3;
            found = conforming || (descriptor.Dpl >= cpu->Cpl && descriptor.Dpl >= rpl);
        }

        return true;
    }

    private static void SetZero(CpuContext* cpu, bool value)
    {
        ulong flags = Flags.GetArithmetic(cpu) & ~Rflags.Zf;
        Flags.SetArithmetic(cpu, flags | (value ? Rflags.Zf : 0));
    }

    public static Status Arpl(CpuContext* cpu, Insn* insn)
    {
        if (cpu->Mode <= ProcessorMode.Virtual8086)
        {
            return Faults.Ud(cpu);
        }

        bool memory = (insn->Flags & InsnFlags.HasMemory) != 0;
        ulong linear = 0;
        ulong selector = 0;
        if (memory)
        {
            if (!Mem.Address(cpu, insn, 2, true, out linear) || !Mem.ReadForWrite(cpu, linear, (byte*)&selector, 2))
            {
                return Status.Fault;
            }
        }
        else
        {
            selector = Reg.Get<ushort>(cpu, insn->R0);
        }

        ulong rpl = Reg.Get<ushort>(cpu, insn->R1) & 3;
        bool raise = (selector & 3) < rpl;
        if (raise)
        {
            selector = (selector & 0xFFFC) | rpl;
            if (memory)
            {
                if (!Mem.WriteBytes(cpu, linear, (byte*)&selector, 2))
                {
                    return Status.Fault;
                }
            }
            else
            {
                Reg.Set<ushort>(cpu, insn->R0, selector);
            }
        }

        SetZero(cpu, raise);
        return Status.Next;
    }
}

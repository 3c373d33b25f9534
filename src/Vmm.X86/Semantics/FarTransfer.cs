// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.X86;

// Far jumps, calls and returns, call gates, IRET in all forms, software interrupts, SYSCALL and SYSENTER
// (SDM 2A/2B operation sections; AMD where the two differ, since the CPU identifies as AMD's).

/// <summary>Far transfers.</summary>
internal static unsafe class FarTransfer
{
    /// <summary>JMP ptr16:16/32: Immediate is the offset, Aux the selector.</summary>
    public static Status JmpDirect(CpuContext* cpu, Insn* insn) =>
        Jump(cpu, insn, (uint)(ulong)insn->Aux, insn->Immediate);

    /// <summary>JMP m16:16/32/64.</summary>
    public static Status JmpIndirect(CpuContext* cpu, Insn* insn) =>
        LoadPointer(cpu, insn, out uint selector, out ulong offset)
            ? Jump(cpu, insn, selector, offset)
            : Status.Fault;

    /// <summary>CALL ptr16:16/32.</summary>
    public static Status CallDirect(CpuContext* cpu, Insn* insn) =>
        Call(cpu, insn, (uint)(ulong)insn->Aux, insn->Immediate);

    /// <summary>CALL m16:16/32/64.</summary>
    public static Status CallIndirect(CpuContext* cpu, Insn* insn) =>
        LoadPointer(cpu, insn, out uint selector, out ulong offset)
            ? Call(cpu, insn, selector, offset)
            : Status.Fault;

    /// <summary>LDS, LES, LSS, LFS, LGS: the segment's index is in R1.</summary>
    public static Status LoadFar(CpuContext* cpu, Insn* insn)
    {
        if (!LoadPointer(cpu, insn, out uint selector, out ulong offset) ||
            !Segmentation.Load(cpu, insn->R1, selector))
        {
            return Status.Fault;
        }

        Reg.SetSized(cpu, insn, offset);

        Modes.Update(cpu);
        return Insn.EndAndLook(cpu, insn);
    }

    private static bool LoadPointer(CpuContext* cpu, Insn* insn, out uint selector, out ulong offset)
    {
        selector = 0;
        offset = 0;
        uint size = insn->OperandSize;
        if (!Mem.Address(cpu, insn, size + 2, false, out ulong linear))
        {
            return false;
        }

        byte* raw = stackalloc byte[16];
        if (!Mem.ReadBytes(cpu, linear, raw, (int)size + 2))
        {
            return false;
        }

        // SAFETY: raw has 16 bytes and size is 2, 4 or 8: the last byte read is raw[9].
        offset = size == 2 ? *(ushort*)raw : size == 4 ? *(uint*)raw : *(ulong*)raw;
        selector = *(ushort*)(raw + size);
        return true;
    }

    private static Status Finish(CpuContext* cpu, ulong rip)
    {
        cpu->Rip = rip;
        Modes.Update(cpu);
        return Status.Look;
    }

    private static Status Jump(CpuContext* cpu, Insn* insn, uint selector, ulong offset)
    {
        if (cpu->Mode <= ProcessorMode.Virtual8086)
        {
            if (offset > CpuContext.Segment(cpu, Seg.Cs)->Limit)
            {
                return Faults.Gp(cpu);
            }

            Segmentation.AssignReal(cpu, Seg.Cs, selector);
            return Finish(cpu, offset);
        }

        if ((selector & 0xFFFC) == 0)
        {
            return Faults.Gp(cpu);
        }

        if (!Segmentation.Fetch(cpu, selector, Vector.GeneralProtection, out Descriptor descriptor))
        {
            return Status.Fault;
        }

        if (!descriptor.IsSystem)
        {
            return Segmentation.CheckCode(cpu, selector, descriptor) &&
                Segmentation.CheckTarget(cpu, descriptor, offset) &&
                Segmentation.AssignCode(cpu, selector, ref descriptor, cpu->Cpl)
                    ? Finish(cpu, offset)
                    : Status.Fault;
        }

        if (!OpenGate(
            cpu, insn, selector, ref descriptor, TaskSwitch.Jump, out Status status, out uint codeSelector,
            out ulong target, out Descriptor code))
        {
            return status;
        }

        // The jump cannot change the privilege level.
        bool bad = code.IsConforming ? code.Dpl > cpu->Cpl : code.Dpl != cpu->Cpl;
        return Segmentation.Accept(cpu, codeSelector, code, bad) &&
            Segmentation.CheckTarget(cpu, code, target) &&
            Segmentation.AssignCode(cpu, codeSelector, ref code, cpu->Cpl)
                ? Finish(cpu, target)
                : Status.Fault;
    }

    // A system descriptor that JMP or CALL names. True for a call gate, with the segment behind it; otherwise the transfer is
    // done, or has failed, as the status says.
    private static bool OpenGate(
        CpuContext* cpu, Insn* insn, uint selector, ref Descriptor descriptor, TaskSwitch how, out Status status,
        out uint codeSelector, out ulong target, out Descriptor code)
    {
        codeSelector = 0;
        target = 0;
        code = default;
        status = Status.Fault;
        int rpl = (int)selector & 3;
        uint type = descriptor.Type;
        bool known = Segmentation.IsLongActive(cpu) ? type == 12 : type is 1 or 9 or 4 or 5 or 12;
        if (!Segmentation.Accept(
            cpu, selector, descriptor, !known || descriptor.Dpl < cpu->Cpl || descriptor.Dpl < rpl))
        {
            return false;
        }

        switch (type)
        {
            case 1 or 9:
                status = SwitchTask(cpu, insn, selector, descriptor, how);
                return false;
            case 5:
                status = TaskGate(cpu, insn, descriptor.GateSelector, how);
                return false;
            default:
                return GateTarget(cpu, selector, ref descriptor, out codeSelector, out target, out code);
        }
    }

    // Reads what a call gate points at; checks that it is a code segment of the right kind.
    private static bool GateTarget(
        CpuContext* cpu, uint gateSelector, ref Descriptor gate, out uint selector, out ulong target,
        out Descriptor code)
    {
        selector = gate.GateSelector;
        target = gate.GateOffset;
        code = default;
        if (Segmentation.IsLongActive(cpu))
        {
            if (!Segmentation.FetchHigh(cpu, gateSelector, Vector.GeneralProtection, ref gate))
            {
                return false;
            }

            target |= gate.High << 32;
        }
        else if (gate.Type == 4)
        {
            target &= 0xFFFF;
        }

        return Segmentation.FetchGateCode(cpu, selector, out code);
    }

    private static Status SwitchTask(
        CpuContext* cpu, Insn* insn, uint selector, in Descriptor descriptor, TaskSwitch how)
    {
        ulong old = cpu->Rip;
        cpu->Rip = Insn.NextAddress(cpu, insn);
        ulong tr = CpuContext.Segment(cpu, Seg.Tr)->Base;
        if (Tasks.Switch(cpu, selector, descriptor, how, Flags.Get(cpu)))
        {
            return Status.Look;
        }

        if (CpuContext.Segment(cpu, Seg.Tr)->Base == tr)
        {
            cpu->Rip = old;
            return Status.Fault;
        }

        // The switch is done and the fault belongs to the new task's first instruction.
        return Interrupts.DeliverFault(cpu) ? Status.Look : Status.Shutdown;
    }

    private static Status TaskGate(CpuContext* cpu, Insn* insn, uint selector, TaskSwitch how)
    {
        return Segmentation.FetchGlobal(cpu, selector, out Descriptor descriptor) &&
            Segmentation.Accept(cpu, selector, descriptor, !Tasks.IsAvailable(descriptor))
            ? SwitchTask(cpu, insn, selector, descriptor, how)
            : Status.Fault;
    }

    private static Status Call(CpuContext* cpu, Insn* insn, uint selector, ulong offset)
    {
        ulong next = Insn.NextAddress(cpu, insn);
        ulong rsp = cpu->Rsp;
        ushort oldCs = CpuContext.Segment(cpu, Seg.Cs)->Selector;
        if (cpu->Mode <= ProcessorMode.Virtual8086)
        {
            if (offset > CpuContext.Segment(cpu, Seg.Cs)->Limit)
            {
                return Faults.Gp(cpu);
            }

            if (!Push(cpu, oldCs, insn->OperandSize) || !Push(cpu, next, insn->OperandSize))
            {
                cpu->Rsp = rsp;
                return Status.Fault;
            }

            Segmentation.AssignReal(cpu, Seg.Cs, selector);
            return Finish(cpu, offset);
        }

        if ((selector & 0xFFFC) == 0)
        {
            return Faults.Gp(cpu);
        }

        if (!Segmentation.Fetch(cpu, selector, Vector.GeneralProtection, out Descriptor descriptor))
        {
            return Status.Fault;
        }

        if (!descriptor.IsSystem)
        {
            if (!Segmentation.CheckCode(cpu, selector, descriptor) ||
                !Segmentation.CheckTarget(cpu, descriptor, offset) ||
                !Push(cpu, oldCs, insn->OperandSize) || !Push(cpu, next, insn->OperandSize) ||
                !Segmentation.AssignCode(cpu, selector, ref descriptor, cpu->Cpl))
            {
                cpu->Rsp = rsp;
                return Status.Fault;
            }

            return Finish(cpu, offset);
        }

        if (!OpenGate(
            cpu, insn, selector, ref descriptor, TaskSwitch.Call, out Status status, out uint codeSelector,
            out ulong target, out Descriptor code))
        {
            return status;
        }

        if (!Segmentation.Accept(cpu, codeSelector, code, false) || !Segmentation.CheckTarget(cpu, code, target))
        {
            return Status.Fault;
        }

        return Segmentation.IsLongActive(cpu)
            ? CallGateLong(cpu, codeSelector, ref code, target, next)
            : CallGate(cpu, descriptor, codeSelector, ref code, target, next);
    }

    private static Status CallGateLong(
        CpuContext* cpu, uint selector, ref Descriptor code, ulong target, ulong next)
    {
        int cpl = code.IsConforming ? cpu->Cpl : code.Dpl;
        ushort oldCs = CpuContext.Segment(cpu, Seg.Cs)->Selector;
        ushort oldSs = CpuContext.Segment(cpu, Seg.Ss)->Selector;
        ulong rsp = cpu->Rsp;
        bool inner = cpl < cpu->Cpl;
        if (inner && !Tasks.ReadLongStack(cpu, 4 + ((uint)cpl * 8), out rsp))
        {
            return Status.Fault;
        }

        ulong* frame = stackalloc ulong[4];
        frame[0] = next;
        frame[1] = oldCs;
        frame[2] = cpu->Rsp;
        frame[3] = oldSs;
        int count = inner ? 4 : 2;
        rsp -= (ulong)count * 8;
        // SAFETY: frame has four words and count is 2 or 4.
        if (!Paging.WriteSlow(
            cpu, rsp, (byte*)frame, count * 8, cpl == 3 ? MmuMode.User : MmuMode.Supervisor))
        {
            Faults.NonCanonicalIsStack(cpu);
            return Status.Fault;
        }

        if (!Segmentation.AssignCode(cpu, selector, ref code, cpl))
        {
            return Status.Fault;
        }

        if (inner)
        {
            Segmentation.AssignNull(cpu, Seg.Ss, (uint)cpl);
        }

        cpu->Rsp = rsp;
        return Finish(cpu, target);
    }

    private static Status CallGate(
        CpuContext* cpu, in Descriptor gate, uint selector, ref Descriptor code, ulong target, ulong next)
    {
        bool wide = gate.Type == 12;
        int cpl = code.IsConforming ? cpu->Cpl : code.Dpl;
        ushort oldCs = CpuContext.Segment(cpu, Seg.Cs)->Selector;
        SegmentRegister* ss = CpuContext.Segment(cpu, Seg.Ss);
        if (cpl >= cpu->Cpl)
        {
            ulong rsp = cpu->Rsp;
            int size = wide ? 4 : 2;
            if (!Push(cpu, oldCs, size) || !Push(cpu, next, size) ||
                !Segmentation.AssignCode(cpu, selector, ref code, cpu->Cpl))
            {
                cpu->Rsp = rsp;
                return Status.Fault;
            }

            return Finish(cpu, target);
        }

        if (!Tasks.ReadInnerStack(cpu, cpl, out uint stackSelector, out uint pointer) ||
            !Interrupts.CheckInnerStack(cpu, stackSelector, cpl, out Descriptor stackDescriptor))
        {
            return Status.Fault;
        }

        var stack = new Interrupts.NewStack(cpu, cpl);
        stack.Use(stackDescriptor, pointer);
        if (!stack.Push(ss->Selector, wide) || !stack.Push(cpu->Rsp, wide))
        {
            return Status.Fault;
        }

        for (int i = gate.GateParameters - 1; i >= 0; i--)
        {
            ulong value;
            bool read = wide
                ? Stack.Peek<uint>(cpu, (uint)i * 4, out value)
                : Stack.Peek<ushort>(cpu, (uint)i * 2, out value);
            if (!read || !stack.Push(value, wide))
            {
                return Status.Fault;
            }
        }

        if (!stack.Push(oldCs, wide) || !stack.Push(next, wide) ||
            !Segmentation.MarkAccessed(cpu, ref stackDescriptor) ||
            !Segmentation.AssignCode(cpu, selector, ref code, cpl))
        {
            return Status.Fault;
        }

        Segmentation.Assign(cpu, Seg.Ss, (stackSelector & 0xFFFC) | (uint)cpl, stackDescriptor);
        cpu->Rsp = stack.Pointer;
        return Finish(cpu, target);
    }

    private static bool Push(CpuContext* cpu, ulong value, int size) => size switch
    {
        2 => Stack.Push<ushort>(cpu, value),
        4 => Stack.Push<uint>(cpu, value),
        _ => Stack.Push<ulong>(cpu, value),
    };

    private static bool Peek(CpuContext* cpu, int index, int size, out ulong value) => size switch
    {
        2 => Stack.Peek<ushort>(cpu, (uint)index * 2, out value),
        4 => Stack.Peek<uint>(cpu, (uint)index * 4, out value),
        _ => Stack.Peek<ulong>(cpu, (uint)index * 8, out value),
    };

    /// <summary>RETF, RETF imm16.</summary>
    public static Status RetFar(CpuContext* cpu, Insn* insn)
    {
        int size = insn->OperandSize;
        if (!Peek(cpu, 0, size, out ulong target) || !Peek(cpu, 1, size, out ulong selectorWide))
        {
            return Status.Fault;
        }

        var selector = (uint)(ushort)selectorWide;
        ulong release = insn->Immediate;
        if (cpu->Mode <= ProcessorMode.Virtual8086)
        {
            if (target > CpuContext.Segment(cpu, Seg.Cs)->Limit)
            {
                return Faults.Gp(cpu);
            }

            Stack.Drop(cpu, (2 * (uint)size) + release);
            Segmentation.AssignReal(cpu, Seg.Cs, selector);
            return Finish(cpu, target);
        }

        return Return(cpu, size, selector, target, 2, release, false, 0);
    }

    // The common tail of RETF and IRET in protected and long mode. `slots` is how many stack slots precede RSP.
    private static Status Return(
        CpuContext* cpu, int size, uint selector, ulong target, int slots, ulong release, bool isIret, ulong flags)
    {
        if ((selector & 0xFFFC) == 0)
        {
            return Faults.Gp(cpu);
        }

        int rpl = (int)selector & 3;
        if (!Segmentation.Fetch(cpu, selector, Vector.GeneralProtection, out Descriptor code))
        {
            return Status.Fault;
        }

        bool isLong = Segmentation.IsLongActive(cpu);
        bool bad = code.IsSystem || !code.IsCode || rpl < cpu->Cpl;
        bad |= code.IsConforming ? code.Dpl > rpl : code.Dpl != rpl;
        bad |= isLong && code.IsLongCode && code.IsDefault32;
        if (!Segmentation.Accept(cpu, selector, code, bad))
        {
            return Status.Fault;
        }

        bool outer = rpl > cpu->Cpl;
        bool popStack = outer || (isIret && cpu->Mode == ProcessorMode.Long);
        ulong newSp = 0;
        uint stackSelector = 0;
        Descriptor stackDescriptor = default;
        bool nullStack = false;
        if (popStack)
        {
            ulong wideSelector;
            if (release != 0)
            {
                ulong at = ((uint)slots * (uint)size) + release;
                bool read = size == 2
                    ? Stack.Peek<ushort>(cpu, at, out newSp) & Stack.Peek<ushort>(cpu, at + 2, out wideSelector)
                    : size == 4
                        ? Stack.Peek<uint>(cpu, at, out newSp) & Stack.Peek<uint>(cpu, at + 4, out wideSelector)
                        : Stack.Peek<ulong>(cpu, at, out newSp) & Stack.Peek<ulong>(cpu, at + 8, out wideSelector);
                if (!read)
                {
                    return Status.Fault;
                }
            }
            else if (!Peek(cpu, slots, size, out newSp) || !Peek(cpu, slots + 1, size, out wideSelector))
            {
                return Status.Fault;
            }

            stackSelector = (ushort)wideSelector;
            if ((stackSelector & 0xFFFC) == 0)
            {
                // Null is allowed when returning to 64-bit code below level 3.
                if (!isLong || !code.IsLongCode || rpl == 3 || (stackSelector & 3) != rpl)
                {
                    return Faults.Gp(cpu);
                }

                nullStack = true;
            }
            else
            {
                if (!Segmentation.Fetch(cpu, stackSelector, Vector.GeneralProtection, out stackDescriptor))
                {
                    return Status.Fault;
                }

                if ((stackSelector & 3) != rpl || stackDescriptor.Dpl != rpl || stackDescriptor.IsSystem ||
                    stackDescriptor.IsCode || !stackDescriptor.IsReadWrite)
                {
                    return Segmentation.Raise(cpu, Vector.GeneralProtection, stackSelector);
                }

                if (!stackDescriptor.IsPresent)
                {
                    return Segmentation.Raise(cpu, Vector.StackFault, stackSelector);
                }
            }
        }

        if (!Segmentation.CheckTarget(cpu, code, target))
        {
            return Status.Fault;
        }

        int oldCpl = cpu->Cpl;
        if ((popStack && !nullStack && !Segmentation.MarkAccessed(cpu, ref stackDescriptor)) ||
            !Segmentation.MarkAccessed(cpu, ref code))
        {
            return Status.Fault;
        }

        if (!popStack)
        {
            Stack.Drop(cpu, ((uint)slots * (uint)size) + release);
        }

        _ = Segmentation.AssignCode(cpu, selector, ref code, rpl);
        if (isIret)
        {
            SetReturnFlags(cpu, flags, size, oldCpl);
        }

        if (popStack)
        {
            if (nullStack)
            {
                Segmentation.AssignNull(cpu, Seg.Ss, stackSelector);
            }
            else
            {
                Segmentation.Assign(cpu, Seg.Ss, stackSelector, stackDescriptor);
            }

            Modes.Update(cpu);
            newSp += release;
            cpu->Rsp = cpu->Mode == ProcessorMode.Long
                ? newSp
                : (cpu->Rsp & ~cpu->StackMask) | (newSp & cpu->StackMask);
        }

        if (outer)
        {
            Segmentation.DropPrivileged(cpu, Seg.Es);
            Segmentation.DropPrivileged(cpu, Seg.Ds);
            Segmentation.DropPrivileged(cpu, Seg.Fs);
            Segmentation.DropPrivileged(cpu, Seg.Gs);
        }

        return Finish(cpu, target);
    }

    // The bits that IRET and POPF may change depend on the level before the return.
    private static void SetReturnFlags(CpuContext* cpu, ulong flags, int size, int oldCpl)
    {
        ulong mask = Rflags.Arithmetic | Rflags.Tf | Rflags.Df | Rflags.Nt;
        if (size > 2)
        {
            mask |= Rflags.Rf | Rflags.Ac | Rflags.Id;
        }

        if (oldCpl <= (int)((cpu->RflagsSystem >> 12) & 3))
        {
            mask |= Rflags.If;
        }

        if (oldCpl == 0)
        {
            mask |= Rflags.Iopl;
            if (size > 2)
            {
                mask |= Rflags.Vif | Rflags.Vip;
            }
        }

        SetFlags(cpu, flags, mask);
    }

    /// <summary>Replaces the bits of RFLAGS in a mask.</summary>
    public static void SetFlags(CpuContext* cpu, ulong flags, ulong mask)
    {
        ulong merged = (Flags.Get(cpu) & ~mask) | (flags & mask);
        Flags.SetArithmetic(cpu, merged);
        cpu->RflagsSystem = (merged & ~Rflags.Arithmetic) | Rflags.Fixed;
    }

    /// <summary>IRET, IRETD, IRETQ.</summary>
    public static Status Iret(CpuContext* cpu, Insn* insn)
    {
        int size = insn->OperandSize;
        Status status = cpu->Mode switch
        {
            ProcessorMode.Real => IretReal(cpu, size, false),
            ProcessorMode.Virtual8086 => IretReal(cpu, size, true),
            _ => IretProtected(cpu, insn, size),
        };
        if (status == Status.Look)
        {
            cpu->NmiBlocked = 0;
            cpu->Shadow = 0;
        }

        return status;
    }

    private static Status IretReal(CpuContext* cpu, int size, bool isVirtual)
    {
        bool usesVif = isVirtual && (cpu->RflagsSystem & Rflags.Iopl) != Rflags.Iopl;
        if (usesVif && (size != 2 || !VirtualInterrupts.AreOn(cpu)))
        {
            return Faults.Gp(cpu);
        }

        if (!Peek(cpu, 0, size, out ulong target) || !Peek(cpu, 1, size, out ulong selector) ||
            !Peek(cpu, 2, size, out ulong flags))
        {
            return Status.Fault;
        }

        if (target > CpuContext.Segment(cpu, Seg.Cs)->Limit)
        {
            return Faults.Gp(cpu);
        }

        if (usesVif && !VirtualInterrupts.TryLoad(cpu, flags))
        {
            return Faults.Gp(cpu);
        }

        Stack.Drop(cpu, 3 * (uint)size);
        Segmentation.AssignReal(cpu, Seg.Cs, (ushort)selector);
        ulong mask = Rflags.Arithmetic | Rflags.Tf | Rflags.Df | Rflags.Nt;
        mask |= usesVif ? 0 : Rflags.If;
        mask |= size > 2 ? Rflags.Rf | Rflags.Ac | Rflags.Id : 0;
        mask |= isVirtual ? 0 : Rflags.Iopl;
        SetFlags(cpu, flags, mask);
        return Finish(cpu, target);
    }

    private static Status IretProtected(CpuContext* cpu, Insn* insn, int size)
    {
        if ((cpu->RflagsSystem & Rflags.Nt) != 0)
        {
            return Segmentation.IsLongActive(cpu) ? Faults.Gp(cpu) : IretTask(cpu, insn);
        }

        if (!Peek(cpu, 0, size, out ulong target) || !Peek(cpu, 1, size, out ulong selector) ||
            !Peek(cpu, 2, size, out ulong flags))
        {
            return Status.Fault;
        }

        if (size == 4 && (flags & Rflags.Vm) != 0 && cpu->Cpl == 0 && cpu->Mode == ProcessorMode.Protected)
        {
            return IretToVirtual(cpu, target, (ushort)selector, flags);
        }

        return Return(cpu, size, (ushort)selector, target, 3, 0, true, flags);
    }

    private static Status IretToVirtual(CpuContext* cpu, ulong target, uint selector, ulong flags)
    {
        ulong* values = stackalloc ulong[6];
        for (int i = 0; i < 6; i++)
        {
            if (!Stack.Peek<uint>(cpu, 12 + ((uint)i * 4), out values[i]))
            {
                return Status.Fault;
            }
        }

        SetFlags(cpu, flags, 0x3FFFFF & ~Rflags.Fixed);
        cpu->Cpl = 3;
        cpu->Mode = ProcessorMode.Virtual8086;
        Segmentation.AssignReal(cpu, Seg.Cs, selector);
        Segmentation.AssignReal(cpu, Seg.Ss, (ushort)values[1]);
        Segmentation.AssignReal(cpu, Seg.Es, (ushort)values[2]);
        Segmentation.AssignReal(cpu, Seg.Ds, (ushort)values[3]);
        Segmentation.AssignReal(cpu, Seg.Fs, (ushort)values[4]);
        Segmentation.AssignReal(cpu, Seg.Gs, (ushort)values[5]);
        cpu->Rsp = (uint)values[0];
        return Finish(cpu, target & 0xFFFF);
    }

    private static Status IretTask(CpuContext* cpu, Insn* insn)
    {
        SegmentRegister* tr = CpuContext.Segment(cpu, Seg.Tr);
        if (!Paging.ReadSystem(cpu, tr->Base, out ushort link))
        {
            return Status.Fault;
        }

        if ((link & 4) != 0 || (link & 0xFFFC) == 0)
        {
            return Segmentation.Raise(cpu, Vector.InvalidTss, link);
        }

        if (!Segmentation.Fetch(cpu, link, Vector.InvalidTss, out Descriptor descriptor))
        {
            return Status.Fault;
        }

        if (!descriptor.IsSystem || descriptor.Type is not (3 or 11))
        {
            return Segmentation.Raise(cpu, Vector.InvalidTss, link);
        }

        return descriptor.IsPresent
            ? SwitchTask(cpu, insn, link, descriptor, TaskSwitch.Return)
            : Segmentation.Raise(cpu, Vector.SegmentNotPresent, link);
    }

    /// <summary>INT n.</summary>
    public static Status Int(CpuContext* cpu, Insn* insn)
    {
        if (cpu->Mode == ProcessorMode.Virtual8086)
        {
            bool redirects = false;
            if ((cpu->Cr4 & Cr4.Vme) != 0 && !VirtualInterrupts.Redirects(cpu, (byte)insn->Immediate, out redirects))
            {
                return Status.Fault;
            }

            if (redirects)
            {
                return Redirect(cpu, insn);
            }

            if ((cpu->RflagsSystem & Rflags.Iopl) != Rflags.Iopl)
            {
                return Faults.Gp(cpu);
            }
        }

        return Software(cpu, insn, (byte)insn->Immediate, EventKind.Software);
    }

    // INT n of a virtual-8086 task through the task's own vectors at linear address 0, as on an 8086 (SDM 3B 21.3.3, methods
    // 5 and 6).
    private static Status Redirect(CpuContext* cpu, Insn* insn)
    {
        ulong flags = Flags.Get(cpu);
        bool usesVif = (flags & Rflags.Iopl) != Rflags.Iopl;
        ulong rsp = cpu->Rsp;
        if (!Mem.Read(cpu, (ulong)(byte)insn->Immediate * 4, out uint entry))
        {
            return Status.Fault;
        }

        if (!Stack.Push<ushort>(cpu, usesVif ? VirtualInterrupts.Image(flags) : flags) ||
            !Stack.Push<ushort>(cpu, CpuContext.Segment(cpu, Seg.Cs)->Selector) ||
            !Stack.Push<ushort>(cpu, Insn.NextAddress(cpu, insn)))
        {
            cpu->Rsp = rsp;
            return Status.Fault;
        }

        cpu->RflagsSystem &= ~(Rflags.Tf | (usesVif ? Rflags.Vif : Rflags.If));
        Segmentation.AssignReal(cpu, Seg.Cs, entry >> 16);
        SoftVcpu.From(cpu).SuppressTrap();
        return Finish(cpu, entry & 0xFFFF);
    }

    /// <summary>INT3.</summary>
    public static Status Int3(CpuContext* cpu, Insn* insn) =>
        Software(cpu, insn, Vector.Breakpoint, EventKind.Software);

    /// <summary>INT1: a #DB trap without a cause in DR6.</summary>
    public static Status Int1(CpuContext* cpu, Insn* insn)
    {
        Status status = Software(cpu, insn, Vector.Debug, EventKind.Privileged);
        if (status == Status.Look && cpu->PendingDebug != 0)
        {
            // Traps that MOV SS held back are part of this #DB (SDM 3A 6.8.3, 3B 17.2.3), not another one behind it.
            cpu->Dr6 = (cpu->Dr6 & ~0xFUL) | cpu->PendingDebug;
            cpu->PendingDebug = 0;
        }

        return status;
    }

    /// <summary>INTO.</summary>
    public static Status Into(CpuContext* cpu, Insn* insn) => Flags.Overflow(cpu)
        ? Software(cpu, insn, Vector.Overflow, EventKind.Software)
        : Status.Next;

    private static Status Software(CpuContext* cpu, Insn* insn, byte vector, EventKind kind)
    {
        ulong at = Insn.Address(cpu, insn);
        cpu->Rip = Insn.NextAddress(cpu, insn);
        if (Interrupts.Deliver(cpu, vector, kind, false, 0, Flags.Get(cpu)))
        {
            SoftVcpu.From(cpu).SuppressTrap();
            return Status.Look;
        }

        cpu->Rip = at;
        return Status.Fault;
    }

    /// <summary>SYSCALL.</summary>
    public static Status Syscall(CpuContext* cpu, Insn* insn)
    {
        if ((cpu->Efer & Efer.Sce) == 0)
        {
            return Faults.Ud(cpu);
        }

        ulong next = Insn.NextAddress(cpu, insn);
        ulong star = cpu->Msr.Star;
        var selector = (uint)(star >> 32) & 0xFFFC;
        if (Segmentation.IsLongActive(cpu))
        {
            ulong flags = Flags.Get(cpu) & ~Rflags.Rf;
            cpu->Rcx = next;
            cpu->Gpr[11] = flags;
            ulong target = cpu->Mode == ProcessorMode.Long ? cpu->Msr.Lstar : cpu->Msr.Cstar;
            if ((cpu->Msr.SfMask & flags & Rflags.Tf) != 0)
            {
                SoftVcpu.From(cpu).SuppressTrap();
            }

            SetFlags(cpu, flags & ~cpu->Msr.SfMask & ~Rflags.Rf, 0x3FFFFF);
            SetFlat(cpu, Seg.Cs, selector, 0xA09B, 0);
            SetFlat(cpu, Seg.Ss, selector + 8, 0xC093, 0);
            cpu->Cpl = 0;
            FastCalls.Prepare(cpu);
            return Finish(cpu, target);
        }

        if (cpu->Mode != ProcessorMode.Protected)
        {
            return Faults.Ud(cpu);
        }

        Reg.Set<uint>(cpu, Reg.Rcx, next);
        SetFlat(cpu, Seg.Cs, selector, 0xC09B, 0);
        SetFlat(cpu, Seg.Ss, selector + 8, 0xC093, 0);
        cpu->RflagsSystem &= ~(Rflags.Vm | Rflags.If | Rflags.Rf);
        cpu->Cpl = 0;
        return Finish(cpu, (uint)star);
    }

    /// <summary>SYSRET: OperandSize 8 returns to 64-bit code.</summary>
    public static Status Sysret(CpuContext* cpu, Insn* insn)
    {
        if ((cpu->Efer & Efer.Sce) == 0 || cpu->Mode <= ProcessorMode.Virtual8086)
        {
            return Faults.Ud(cpu);
        }

        if (cpu->Cpl != 0)
        {
            return Faults.Gp(cpu);
        }

        var selector = (uint)(cpu->Msr.Star >> 48);
        ulong target;
        if (Segmentation.IsLongActive(cpu))
        {
            if (insn->OperandSize == 8)
            {
                target = cpu->Rcx;
                if (!Paging.IsCanonical(cpu, target))
                {
                    return Faults.Gp(cpu);
                }

                SetFlat(cpu, Seg.Cs, ((selector + 16) & 0xFFFF) | 3, 0xA0FB, 3);
            }
            else
            {
                target = (uint)cpu->Rcx;
                SetFlat(cpu, Seg.Cs, selector | 3, 0xC0FB, 3);
            }

            SetFlags(cpu, cpu->Gpr[11], 0x3FFFFF & ~(Rflags.Rf | Rflags.Vm));
            cpu->RflagsSystem &= ~(Rflags.Rf | Rflags.Vm);

            // A single-step trap follows when TF is set at the end of SYSRET, whatever it was before.
            if ((cpu->RflagsSystem & Rflags.Tf) != 0)
            {
                cpu->PendingDebug |= 0x4000;
            }
            else
            {
                SoftVcpu.From(cpu).SuppressTrap();
            }
        }
        else
        {
            target = (uint)cpu->Rcx;
            SetFlat(cpu, Seg.Cs, selector | 3, 0xC0FB, 3);
            cpu->RflagsSystem |= Rflags.If;
        }

        // AMD loads only the selector of SS; its attributes were those of a flat data segment already, and Linux
        // reloads SS where that matters. The flat attributes are what Intel sets.
        SetFlat(cpu, Seg.Ss, ((selector + 8) & 0xFFFF) | 3, 0xC0F3, 3);
        cpu->Cpl = 3;
        return Finish(cpu, target);
    }

    /// <summary>SYSENTER: AMD has it outside long mode only.</summary>
    public static Status Sysenter(CpuContext* cpu, Insn* insn)
    {
        if (Segmentation.IsLongActive(cpu))
        {
            return Faults.Ud(cpu);
        }

        var selector = (uint)cpu->Msr.SysenterCs & 0xFFFC;
        if (cpu->Mode == ProcessorMode.Real || selector == 0)
        {
            return Faults.Gp(cpu);
        }

        cpu->RflagsSystem &= ~(Rflags.Vm | Rflags.If);
        SetFlat(cpu, Seg.Cs, selector, 0xC09B, 0);
        SetFlat(cpu, Seg.Ss, selector + 8, 0xC093, 0);
        cpu->Cpl = 0;
        cpu->Rsp = (uint)cpu->Msr.SysenterEsp;
        return Finish(cpu, (uint)cpu->Msr.SysenterEip);
    }

    /// <summary>SYSEXIT.</summary>
    public static Status Sysexit(CpuContext* cpu, Insn* insn)
    {
        if (Segmentation.IsLongActive(cpu))
        {
            return Faults.Ud(cpu);
        }

        var selector = (uint)cpu->Msr.SysenterCs & 0xFFFC;
        if (cpu->Mode == ProcessorMode.Real || selector == 0 || cpu->Cpl != 0)
        {
            return Faults.Gp(cpu);
        }

        SetFlat(cpu, Seg.Cs, (selector + 16) | 3, 0xC0FB, 3);
        SetFlat(cpu, Seg.Ss, (selector + 24) | 3, 0xC0F3, 3);
        cpu->Cpl = 3;
        cpu->Rsp = (uint)cpu->Rcx;
        return Finish(cpu, (uint)cpu->Rdx);
    }

    private static void SetFlat(CpuContext* cpu, int index, uint selector, uint rights, int cpl)
    {
        SegmentRegister* segment = CpuContext.Segment(cpu, index);
        segment->Selector = (ushort)((selector & 0xFFFC) | (uint)cpl);
        segment->Base = 0;
        segment->EffectiveBase = 0;
        segment->Limit = 0xFFFFFFFF;
        segment->Rights = rights;
    }
}

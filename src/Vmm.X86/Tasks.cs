// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.X86;

// The task state segment: inner stacks, and hardware task switches of protected mode (SDM 3A chapter 7).

/// <summary>How a task switch began.</summary>
internal enum TaskSwitch
{
    Jump,
    Call,
    Return,
    Interrupt,
}

/// <summary>TSS access and task switches.</summary>
internal static unsafe class Tasks
{
    /// <summary>SS:ESP for an inner level from a 16- or 32-bit TSS.</summary>
    public static bool ReadInnerStack(CpuContext* cpu, int cpl, out uint selector, out uint pointer)
    {
        SegmentRegister* tr = CpuContext.Segment(cpu, Seg.Tr);
        selector = 0;
        pointer = 0;
        bool wide = (tr->Rights & 8) != 0;
        uint at = wide ? 4 + ((uint)cpl * 8) : 2 + ((uint)cpl * 4);
        uint bytes = wide ? 8U : 4;
        if (tr->Unusable || at + bytes - 1 > tr->Limit)
        {
            Segmentation.Raise(cpu, Vector.InvalidTss, tr->Selector);
            return false;
        }

        if (wide)
        {
            if (!Paging.ReadSystem(cpu, tr->Base + at, out pointer) ||
                !Paging.ReadSystem(cpu, tr->Base + at + 4, out ushort stack))
            {
                return false;
            }

            selector = stack;
            return true;
        }

        if (!Paging.ReadSystem(cpu, tr->Base + at, out ushort narrow) ||
            !Paging.ReadSystem(cpu, tr->Base + at + 2, out ushort narrowStack))
        {
            return false;
        }

        pointer = narrow;
        selector = narrowStack;
        return true;
    }

    /// <summary>RSPn or ISTn from a 64-bit TSS.</summary>
    public static bool ReadLongStack(CpuContext* cpu, uint at, out ulong pointer)
    {
        SegmentRegister* tr = CpuContext.Segment(cpu, Seg.Tr);
        pointer = 0;
        if (tr->Unusable || at + 7 > tr->Limit)
        {
            Segmentation.Raise(cpu, Vector.InvalidTss, tr->Selector);
            return false;
        }

        if (!Paging.ReadSystem(cpu, tr->Base + at, out pointer))
        {
            return false;
        }

        if (!Paging.IsCanonical(cpu, pointer))
        {
            Faults.Raise(cpu, Vector.StackFault, (uint)cpu->ExternalBit);
            return false;
        }

        return true;
    }

    /// <summary>IN and OUT below IOPL: the permission bitmap (SDM 1 19.5.2); false means #GP(0).</summary>
    public static bool PortAllowed(CpuContext* cpu, uint port, int width, out bool allowed)
    {
        allowed = false;
        SegmentRegister* tr = CpuContext.Segment(cpu, Seg.Tr);
        if (tr->Unusable || (tr->Rights & 0xD) != 9 || tr->Limit < 103)
        {
            return true;
        }

        if (!Paging.ReadSystem(cpu, tr->Base + 102, out ushort map))
        {
            return false;
        }

        uint at = map + (port >> 3);
        if (at + 1 > tr->Limit)
        {
            return true;
        }

        if (!Paging.ReadSystem(cpu, tr->Base + at, out ushort bits))
        {
            return false;
        }

        allowed = ((bits >> (int)(port & 7)) & ((1 << width) - 1)) == 0;
        return true;
    }

    /// <summary>Through a task gate in the IDT: pushes the error code on the new stack.</summary>
    public static bool SwitchForInterrupt(CpuContext* cpu, uint selector, bool hasError, uint error, ulong flags)
    {
        if (!Segmentation.FetchGlobal(cpu, selector, out Descriptor descriptor) ||
            !Segmentation.Accept(cpu, selector, descriptor, !IsAvailable(descriptor)) ||
            !Switch(cpu, selector, descriptor, TaskSwitch.Interrupt, flags))
        {
            return false;
        }

        bool wide = (CpuContext.Segment(cpu, Seg.Tr)->Rights & 8) != 0;
        return !hasError ||
            (wide ? Stack.Push<uint>(cpu, error) : Stack.Push<ushort>(cpu, error));
    }

    /// <summary>An available 16- or 32-bit TSS.</summary>
    public static bool IsAvailable(in Descriptor descriptor) => descriptor.IsSystem && descriptor.Type is 1 or 9;

    /// <summary>
    /// Switches tasks; RIP in the context is where the old task continues. False after raising. Faults after the commit
    /// point are raised in the new task, as on a processor.
    /// </summary>
    public static bool Switch(
        CpuContext* cpu, uint selector, Descriptor descriptor, TaskSwitch how, ulong flags)
    {
        SegmentRegister* tr = CpuContext.Segment(cpu, Seg.Tr);
        bool newWide = (descriptor.Type & 8) != 0;
        bool oldWide = (tr->Rights & 8) != 0;
        uint minimum = newWide ? 0x67U : 0x2B;
        if (descriptor.Limit < minimum)
        {
            Segmentation.Raise(cpu, Vector.InvalidTss, selector);
            return false;
        }

        ulong oldBase = tr->Base;
        ulong newBase = descriptor.Base;
        ulong oldDescriptor = cpu->GdtBase + (tr->Selector & 0xFFF8U);

        // Everything of the new task is read before anything of the old one is written.
        var next = default(TaskImage);
        if (!Load(cpu, newBase, newWide, ref next) ||
            !ProbeOld(cpu, oldBase, oldWide))
        {
            return false;
        }

        if (how is TaskSwitch.Jump or TaskSwitch.Return)
        {
            if (!Paging.ReadSystem(cpu, oldDescriptor + 4, out uint high) ||
                !Paging.WriteSystem(cpu, oldDescriptor + 4, high & ~0x200U))
            {
                return false;
            }
        }

        if (how == TaskSwitch.Return)
        {
            flags &= ~Rflags.Nt;
        }

        if (!Save(cpu, oldBase, oldWide, flags))
        {
            return false;
        }

        if (how is TaskSwitch.Call or TaskSwitch.Interrupt)
        {
            if (!Paging.WriteSystem(cpu, newBase, tr->Selector))
            {
                return false;
            }
        }

        if (how != TaskSwitch.Return)
        {
            descriptor.Low |= 2UL << 40;
            if (!Paging.WriteSystem(cpu, descriptor.At + 4, (uint)(descriptor.Low >> 32)))
            {
                return false;
            }
        }

        Segmentation.Assign(cpu, Seg.Tr, selector, descriptor);
        tr->Rights |= 2;
        cpu->Cr0 |= Cr0.Ts;
        return Enter(cpu, next, newWide, how);
    }

    private static bool Enter(CpuContext* cpu, in TaskImage next, bool wide, TaskSwitch how)
    {
        // From here on the new task is current: faults belong to it.
        if (wide && (cpu->Cr0 & Cr0.Pg) != 0 && cpu->Cr3 != next.Cr3)
        {
            cpu->Cr3 = next.Cr3;
            Asids.Switch(cpu, Asids.CurrentPcid(cpu), false);
            Paging.LoadPdptes(cpu, cpu->Cr3, cpu->Cr4, cpu->Cr0);
        }

        ulong flags = next.Flags;
        if (how is TaskSwitch.Call or TaskSwitch.Interrupt)
        {
            flags |= Rflags.Nt;
        }

        Flags.SetArithmetic(cpu, flags);
        cpu->RflagsSystem = (flags & 0x3F7700 & ~Rflags.Arithmetic) | Rflags.Fixed;
        cpu->Rip = next.Eip;
        for (int i = 0; i < 8; i++)
        {
            cpu->Gpr[i] = next.Gpr[i];
        }

        cpu->Dr7 &= ~0x155UL;

        // Selectors first, so that a fault shows them; all descriptors invalid until loaded.
        Descriptor none = default;
        for (int i = 0; i < 6; i++)
        {
            Segmentation.Assign(cpu, i, next.Selectors[i], none);
            CpuContext.Segment(cpu, i)->Rights = Segmentation.UnusableBit;
        }

        SegmentRegister* ldt = CpuContext.Segment(cpu, Seg.Ldtr);
        *ldt = default;
        ldt->Selector = next.Ldt;
        ldt->Rights = Segmentation.UnusableBit;
        if ((flags & Rflags.Vm) != 0)
        {
            cpu->Cpl = 3;
            cpu->Mode = ProcessorMode.Virtual8086;
            for (int i = 0; i < 6; i++)
            {
                Segmentation.AssignReal(cpu, i, next.Selectors[i]);
            }

            Modes.Update(cpu);
            return true;
        }

        cpu->Cpl = next.Selectors[Seg.Cs] & 3;
        cpu->Mode = ProcessorMode.Protected;
        if (!LoadLdt(cpu, next.Ldt) || !LoadCode(cpu, next.Selectors[Seg.Cs]) ||
            !LoadStack(cpu, next.Selectors[Seg.Ss]))
        {
            Modes.Update(cpu);
            return false;
        }

        Modes.Update(cpu);
        foreach (int index in (System.ReadOnlySpan<int>)[Seg.Ds, Seg.Es, Seg.Fs, Seg.Gs])
        {
            if (!LoadData(cpu, index, next.Selectors[index]))
            {
                Modes.Update(cpu);
                return false;
            }
        }

        Modes.Update(cpu);
        if (cpu->Rip > CpuContext.Segment(cpu, Seg.Cs)->Limit)
        {
            Faults.Gp(cpu);
            return false;
        }

        // The trap flag of the TSS raises #DB before the first instruction; DR6.BT.
        if (wide && (next.Trap & 1) != 0)
        {
            cpu->PendingDebug |= 0x8000;
        }

        return true;
    }

    private static bool LoadLdt(CpuContext* cpu, uint selector)
    {
        if ((selector & 0xFFFC) == 0)
        {
            return true;
        }

        if ((selector & 4) != 0)
        {
            Segmentation.Raise(cpu, Vector.InvalidTss, selector);
            return false;
        }

        if (!Segmentation.Fetch(cpu, selector, Vector.InvalidTss, out Descriptor descriptor))
        {
            return false;
        }

        if (!descriptor.IsSystem || descriptor.Type != 2 || !descriptor.IsPresent)
        {
            Segmentation.Raise(cpu, Vector.InvalidTss, selector);
            return false;
        }

        Segmentation.Assign(cpu, Seg.Ldtr, selector, descriptor);
        return true;
    }

    private static bool LoadCode(CpuContext* cpu, uint selector)
    {
        if ((selector & 0xFFFC) == 0)
        {
            Segmentation.Raise(cpu, Vector.InvalidTss, selector);
            return false;
        }

        if (!Segmentation.Fetch(cpu, selector, Vector.InvalidTss, out Descriptor descriptor))
        {
            return false;
        }

        int rpl = (int)selector & 3;
        bool bad = descriptor.IsSystem || !descriptor.IsCode;
        bad |= descriptor.IsConforming ? descriptor.Dpl > rpl : descriptor.Dpl != rpl;
        if (bad)
        {
            Segmentation.Raise(cpu, Vector.InvalidTss, selector);
            return false;
        }

        if (!descriptor.IsPresent)
        {
            Segmentation.Raise(cpu, Vector.SegmentNotPresent, selector);
            return false;
        }

        return Segmentation.AssignCode(cpu, selector, ref descriptor, rpl);
    }

    private static bool LoadStack(CpuContext* cpu, uint selector)
    {
        if (!Interrupts.CheckInnerStack(cpu, selector, cpu->Cpl, out Descriptor descriptor) ||
            !Segmentation.MarkAccessed(cpu, ref descriptor))
        {
            return false;
        }

        Segmentation.Assign(cpu, Seg.Ss, selector, descriptor);
        return true;
    }

    private static bool LoadData(CpuContext* cpu, int index, uint selector)
    {
        if (Segmentation.Load(cpu, index, selector))
        {
            return true;
        }

        if (cpu->Fault.Vector == Vector.GeneralProtection)
        {
            cpu->Fault.Vector = Vector.InvalidTss;
        }

        return false;
    }

    private static bool ProbeOld(CpuContext* cpu, ulong at, bool wide) =>
        Paging.ProbeWrite(cpu, at, wide ? 0x60 : 0x2A, MmuMode.Supervisor);

    private static bool Save(CpuContext* cpu, ulong at, bool wide, ulong flags)
    {
        bool done = true;
        if (wide)
        {
            done &= Paging.WriteSystem(cpu, at + 0x20, (uint)cpu->Rip);
            done &= Paging.WriteSystem(cpu, at + 0x24, (uint)flags);
            for (uint i = 0; i < 8; i++)
            {
                done &= Paging.WriteSystem(cpu, at + 0x28 + (i * 4), (uint)cpu->Gpr[(int)i]);
            }

            for (uint i = 0; i < 6; i++)
            {
                done &= Paging.WriteSystem(cpu, at + 0x48 + (i * 4), CpuContext.Segment(cpu, (int)i)->Selector);
            }

            return done;
        }

        done &= Paging.WriteSystem(cpu, at + 0x0E, (ushort)cpu->Rip);
        done &= Paging.WriteSystem(cpu, at + 0x10, (ushort)flags);
        for (uint i = 0; i < 8; i++)
        {
            done &= Paging.WriteSystem(cpu, at + 0x12 + (i * 2), (ushort)cpu->Gpr[(int)i]);
        }

        for (uint i = 0; i < 4; i++)
        {
            done &= Paging.WriteSystem(cpu, at + 0x22 + (i * 2), CpuContext.Segment(cpu, (int)i)->Selector);
        }

        return done;
    }

    private static bool Load(CpuContext* cpu, ulong at, bool wide, ref TaskImage image)
    {
        bool done = true;
        if (wide)
        {
            byte* raw = stackalloc byte[0x68];
            done = Paging.ReadSlow(cpu, at, raw, 0x68, MmuMode.Supervisor);
            // SAFETY: the largest offset read is 0x64, with 2 bytes, of 0x68. After a fault the values are not used.
            image.Cr3 = *(uint*)(raw + 0x1C);
            image.Eip = *(uint*)(raw + 0x20);
            image.Flags = *(uint*)(raw + 0x24);
            for (int i = 0; i < 8; i++)
            {
                image.Gpr[i] = *(uint*)(raw + 0x28 + (i * 4));
            }

            for (int i = 0; i < 6; i++)
            {
                image.Selectors[i] = *(ushort*)(raw + 0x48 + (i * 4));
            }

            image.Ldt = *(ushort*)(raw + 0x60);
            image.Trap = *(ushort*)(raw + 0x64);
            return done;
        }

        byte* narrow = stackalloc byte[0x2C];
        done = Paging.ReadSlow(cpu, at, narrow, 0x2C, MmuMode.Supervisor);
        // SAFETY: the largest offset read is 0x2A, with 2 bytes, of 0x2C.
        image.Eip = *(ushort*)(narrow + 0x0E);
        image.Flags = *(ushort*)(narrow + 0x10);
        for (int i = 0; i < 8; i++)
        {
            image.Gpr[i] = *(ushort*)(narrow + 0x12 + (i * 2)) | 0xFFFF0000U;
        }

        for (int i = 0; i < 4; i++)
        {
            image.Selectors[i] = *(ushort*)(narrow + 0x22 + (i * 2));
        }

        image.Ldt = *(ushort*)(narrow + 0x2A);
        return done;
    }

    private struct TaskImage
    {
        public ulong Cr3;
        public ulong Eip;
        public ulong Flags;
        public fixed uint Gpr[8];
        public fixed ushort Selectors[6];
        public ushort Ldt;
        public ushort Trap;
    }
}

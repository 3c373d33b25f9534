// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.X86;

// Delivery of exceptions and interrupts through the IVT or IDT (SDM 3A chapter 6). Deliver changes nothing when it
// fails: it raises a second fault, and DeliverFault decides by SDM 3A table 6-5 whether that is served alone, becomes a
// double fault, or shuts the processor down.

/// <summary>Where an event comes from.</summary>
internal enum EventKind
{
    /// <summary>Maskable interrupt or NMI.</summary>
    External,

    /// <summary>Fault or trap.</summary>
    Exception,

    /// <summary>INT n, INT3, INTO: gate DPL is checked.</summary>
    Software,

    /// <summary>INT1: like an exception, but its return address is behind the instruction.</summary>
    Privileged,
}

/// <summary>Interrupt and exception delivery.</summary>
internal static unsafe class Interrupts
{
    /// <summary>
    /// Delivers the fault in the context; RIP is the address to return to. False: triple fault.
    /// </summary>
    public static bool DeliverFault(CpuContext* cpu)
    {
        FaultInfo fault = cpu->Fault;
        Record(cpu, fault);
        while (true)
        {
            // Faults return with RF set so that an instruction breakpoint at them does not hit twice.
            ulong flags = Flags.Get(cpu);
            bool setResume = !fault.IsTrap && fault.Vector != Vector.DoubleFault && fault.Vector != Vector.MachineCheck;
            cpu->ExternalBit = 1;
            bool done = Deliver(
                cpu, fault.Vector, EventKind.Exception, fault.HasErrorCode, fault.ErrorCode,
                setResume ? flags | Rflags.Rf : flags);
            cpu->ExternalBit = 0;
            if (done)
            {
                return true;
            }

            FaultInfo second = cpu->Fault;
            Record(cpu, second);
            if (fault.Vector == Vector.DoubleFault)
            {
                return false;
            }

            if (MakesDouble(fault.Vector, second.Vector))
            {
                second = default;
                second.Vector = Vector.DoubleFault;
                second.HasErrorCode = true;
            }

            fault = second;
        }
    }

    /// <summary>Delivers an external interrupt or NMI. False: triple fault.</summary>
    public static bool DeliverExternal(CpuContext* cpu, byte vector)
    {
        cpu->ExternalBit = 1;
        bool done = Deliver(cpu, vector, EventKind.External, false, 0, Flags.Get(cpu));
        cpu->ExternalBit = 0;
        return done || DeliverFault(cpu);
    }

    /// <summary>One attempt; false after raising, with nothing changed.</summary>
    public static bool Deliver(
        CpuContext* cpu, byte vector, EventKind kind, bool hasError, uint error, ulong flags)
    {
        if (kind == EventKind.Software)
        {
            cpu->ExternalBit = 0;
        }

        bool done = cpu->Mode == ProcessorMode.Real
            ? DeliverReal(cpu, vector, flags)
            : Segmentation.IsLongActive(cpu)
                ? DeliverLong(cpu, vector, kind, hasError, error, flags)
                : DeliverProtected(cpu, vector, kind, hasError, error, flags);
        if (done)
        {
            cpu->Shadow = 0;
            Modes.Update(cpu);
        }

        return done;
    }

    private static void Record(CpuContext* cpu, in FaultInfo fault)
    {
        if (fault.Vector == Vector.PageFault)
        {
            cpu->Cr2 = fault.Address;
        }
        else if (fault.Vector == Vector.Debug)
        {
            cpu->Dr6 = (cpu->Dr6 & ~0xFUL) | fault.Address;
            cpu->Dr7 &= ~(1UL << 13);
            cpu->Msr.DebugCtl &= ~1UL;
        }
    }

    private static bool MakesDouble(byte first, byte second)
    {
        if (first == Vector.PageFault)
        {
            return second == Vector.PageFault || IsContributory(second);
        }

        return IsContributory(first) && IsContributory(second);
    }

    private static bool IsContributory(byte vector) => vector is 0 or (>= 10 and <= 13);

    private static bool DeliverReal(CpuContext* cpu, byte vector, ulong flags)
    {
        uint at = (uint)vector * 4;
        if (at + 3 > cpu->IdtLimit)
        {
            Faults.Raise(cpu, Vector.GeneralProtection, ((uint)vector * 8) + 2);
            return false;
        }

        if (!Paging.ReadSystem(cpu, cpu->IdtBase + at, out uint entry))
        {
            return false;
        }

        ulong rsp = cpu->Rsp;
        if (!Stack.Push<ushort>(cpu, flags) ||
            !Stack.Push<ushort>(cpu, CpuContext.Segment(cpu, Seg.Cs)->Selector) ||
            !Stack.Push<ushort>(cpu, cpu->Rip))
        {
            cpu->Rsp = rsp;
            return false;
        }

        Segmentation.AssignReal(cpu, Seg.Cs, entry >> 16);
        cpu->Rip = entry & 0xFFFF;
        cpu->RflagsSystem &= ~(Rflags.If | Rflags.Tf | Rflags.Ac | Rflags.Rf);
        return true;
    }

    private static uint IdtError(CpuContext* cpu, byte vector) => ((uint)vector * 8) + 2 + (uint)cpu->ExternalBit;

    private static bool AcceptGate(CpuContext* cpu, byte vector, EventKind kind, in Descriptor gate, bool known)
    {
        if (!known || (kind == EventKind.Software && gate.Dpl < cpu->Cpl))
        {
            Faults.Raise(cpu, Vector.GeneralProtection, IdtError(cpu, vector));
            return false;
        }

        if (!gate.IsPresent)
        {
            Faults.Raise(cpu, Vector.SegmentNotPresent, IdtError(cpu, vector));
            return false;
        }

        return true;
    }

    private static bool DeliverProtected(
        CpuContext* cpu, byte vector, EventKind kind, bool hasError, uint error, ulong flags)
    {
        uint at = (uint)vector * 8;
        if (at + 7 > cpu->IdtLimit)
        {
            Faults.Raise(cpu, Vector.GeneralProtection, IdtError(cpu, vector));
            return false;
        }

        var gate = default(Descriptor);
        if (!Paging.ReadSystem(cpu, cpu->IdtBase + at, out gate.Low))
        {
            return false;
        }

        uint type = (uint)(gate.Low >> 40) & 0x1F;
        if (!AcceptGate(cpu, vector, kind, gate, type is 5 or 6 or 7 or 0xE or 0xF))
        {
            return false;
        }

        if (type == 5)
        {
            return Tasks.SwitchForInterrupt(cpu, gate.GateSelector, hasError, error, flags);
        }

        uint selector = gate.GateSelector;
        if (!Segmentation.FetchGateCode(cpu, selector, out Descriptor code) ||
            !Segmentation.Accept(cpu, selector, code, false))
        {
            return false;
        }

        bool wide = (type & 8) != 0;
        ulong target = wide ? gate.GateOffset : gate.GateOffset & 0xFFFF;
        bool fromVirtual = cpu->Mode == ProcessorMode.Virtual8086;
        int cpl = code.IsConforming ? cpu->Cpl : code.Dpl;
        if (fromVirtual && (code.IsConforming || code.Dpl != 0))
        {
            Segmentation.Raise(cpu, Vector.GeneralProtection, selector);
            return false;
        }

        if (!Segmentation.CheckTarget(cpu, code, target))
        {
            return false;
        }

        SegmentRegister* ss = CpuContext.Segment(cpu, Seg.Ss);
        Descriptor stackDescriptor = default;
        uint stackSelector = ss->Selector;
        var stack = new NewStack(cpu, cpl);
        if (cpl < cpu->Cpl)
        {
            if (!Tasks.ReadInnerStack(cpu, cpl, out stackSelector, out uint pointer) ||
                !CheckInnerStack(cpu, stackSelector, cpl, out stackDescriptor))
            {
                return false;
            }

            stack.Use(stackDescriptor, pointer);
            if (fromVirtual)
            {
                bool pushed = true;
                for (int i = 0; i < 4 && pushed; i++)
                {
                    // GS, FS, DS, ES.
                    int index = i == 0 ? Seg.Gs : i == 1 ? Seg.Fs : i == 2 ? Seg.Ds : Seg.Es;
                    pushed = stack.Push(CpuContext.Segment(cpu, index)->Selector, wide);
                }

                if (!pushed)
                {
                    return false;
                }
            }

            if (!stack.Push(ss->Selector, wide) || !stack.Push(cpu->Rsp, wide))
            {
                return false;
            }
        }
        else
        {
            stack.UseCurrent();
        }

        if (!stack.Push(flags, wide) || !stack.Push(CpuContext.Segment(cpu, Seg.Cs)->Selector, wide) ||
            !stack.Push(cpu->Rip, wide) || (hasError && !stack.Push(error, wide)))
        {
            return false;
        }

        int oldCpl = cpu->Cpl;
        if (cpl < oldCpl && !Segmentation.MarkAccessed(cpu, ref stackDescriptor))
        {
            return false;
        }

        if (!Segmentation.AssignCode(cpu, selector, ref code, cpl))
        {
            return false;
        }

        if (cpl < oldCpl)
        {
            Segmentation.Assign(cpu, Seg.Ss, (stackSelector & 0xFFFC) | (uint)cpl, stackDescriptor);
            cpu->Rsp = stack.Pointer;
        }
        else
        {
            Stack.SetPointer(cpu, stack.Pointer);
        }

        if (fromVirtual)
        {
            Segmentation.AssignNull(cpu, Seg.Es, 0);
            Segmentation.AssignNull(cpu, Seg.Ds, 0);
            Segmentation.AssignNull(cpu, Seg.Fs, 0);
            Segmentation.AssignNull(cpu, Seg.Gs, 0);
        }

        cpu->Rip = target;
        cpu->RflagsSystem &= ~(Rflags.Tf | Rflags.Nt | Rflags.Rf | Rflags.Vm);
        if ((type & 1) == 0)
        {
            cpu->RflagsSystem &= ~Rflags.If;
        }

        return true;
    }

    /// <summary>Checks the stack segment of an inner level (#TS, #SS).</summary>
    public static bool CheckInnerStack(CpuContext* cpu, uint selector, int cpl, out Descriptor descriptor)
    {
        descriptor = default;
        if ((selector & 0xFFFC) == 0)
        {
            Segmentation.Raise(cpu, Vector.InvalidTss, selector);
            return false;
        }

        if (!Segmentation.Fetch(cpu, selector, Vector.InvalidTss, out descriptor))
        {
            return false;
        }

        if ((selector & 3) != cpl || descriptor.Dpl != cpl || descriptor.IsSystem || descriptor.IsCode ||
            !descriptor.IsReadWrite)
        {
            Segmentation.Raise(cpu, Vector.InvalidTss, selector);
            return false;
        }

        if (!descriptor.IsPresent)
        {
            Segmentation.Raise(cpu, Vector.StackFault, selector);
            return false;
        }

        return true;
    }

    private static bool DeliverLong(
        CpuContext* cpu, byte vector, EventKind kind, bool hasError, uint error, ulong flags)
    {
        uint at = (uint)vector * 16;
        if (at + 15 > cpu->IdtLimit)
        {
            Faults.Raise(cpu, Vector.GeneralProtection, IdtError(cpu, vector));
            return false;
        }

        if (!Paging.ReadSystem(cpu, cpu->IdtBase + at, out ulong low) ||
            !Paging.ReadSystem(cpu, cpu->IdtBase + at + 8, out ulong high))
        {
            return false;
        }

        var gate = new Descriptor { Low = low };
        uint type = (uint)(low >> 40) & 0x1F;
        if (!AcceptGate(cpu, vector, kind, gate, type is 0xE or 0xF))
        {
            return false;
        }

        uint selector = gate.GateSelector;
        ulong target = gate.GateOffset | (high << 32);
        if (!Segmentation.FetchGateCode(cpu, selector, out Descriptor code) ||
            !Segmentation.Accept(cpu, selector, code, false))
        {
            return false;
        }

        int cpl = code.IsConforming ? cpu->Cpl : code.Dpl;
        int ist = (int)(low >> 32) & 7;
        ulong rsp = cpu->Rsp;
        if (ist != 0)
        {
            if (!Tasks.ReadLongStack(cpu, 0x24 + ((uint)(ist - 1) * 8), out rsp))
            {
                return false;
            }
        }
        else if (cpl < cpu->Cpl)
        {
            if (!Tasks.ReadLongStack(cpu, 4 + ((uint)cpl * 8), out rsp))
            {
                return false;
            }
        }

        if (!Paging.IsCanonical(cpu, target))
        {
            Faults.Raise(cpu, Vector.GeneralProtection, (uint)cpu->ExternalBit);
            return false;
        }

        rsp &= ~15UL;
        MmuMode mode = cpl == 3 ? MmuMode.User : MmuMode.Supervisor;
        ulong* frame = stackalloc ulong[6];
        int count = 0;
        if (hasError)
        {
            frame[count++] = error;
        }

        frame[count++] = cpu->Rip;
        frame[count++] = CpuContext.Segment(cpu, Seg.Cs)->Selector;
        frame[count++] = flags;
        frame[count++] = cpu->Rsp;
        frame[count++] = CpuContext.Segment(cpu, Seg.Ss)->Selector;
        rsp -= (ulong)count * 8;
        if (!WriteFrame(cpu, rsp, frame, count, mode))
        {
            return false;
        }

        int oldCpl = cpu->Cpl;
        if (!Segmentation.AssignCode(cpu, selector, ref code, cpl))
        {
            return false;
        }

        if (cpl != oldCpl)
        {
            Segmentation.AssignNull(cpu, Seg.Ss, (uint)cpl);
        }

        cpu->Rsp = rsp;
        cpu->Rip = target;
        cpu->RflagsSystem &= ~(Rflags.Tf | Rflags.Nt | Rflags.Rf | Rflags.Vm);
        if ((type & 1) == 0)
        {
            cpu->RflagsSystem &= ~Rflags.If;
        }

        return true;
    }

    private static bool WriteFrame(CpuContext* cpu, ulong rsp, ulong* frame, int count, MmuMode mode)
    {
        TlbEntry* entry = cpu->Tlbs + ((ulong)mode * TlbEntry.Count) + ((rsp >> 12) & (TlbEntry.Count - 1));
        if (entry->WriteTag == (((rsp + ((ulong)count * 8) - 1) & ~Mem.PageOffset) | Asids.Of(cpu, mode)) &&
            *entry->PageFlags == (byte)Memory.PageFlags.Written)
        {
            // SAFETY: the tag matched for the first and the last byte of the frame, so all of it lies in the one page
            // of guest RAM that Addend maps; a slot goes away only after this vCPU has flushed (SoftVm.Quiesce).
            var at = (ulong*)(entry->Addend + rsp);
            for (int i = 0; i < count; i++)
            {
                at[i] = frame[i];
            }

            return true;
        }

        // SAFETY: callers give a frame of count words on their stack.
        if (Paging.WriteSlow(cpu, rsp, (byte*)frame, count * 8, mode))
        {
            return true;
        }

        if (cpu->Fault.NonCanonical)
        {
            Faults.Raise(cpu, Vector.StackFault, (uint)cpu->ExternalBit);
        }

        return false;
    }

    /// <summary>Pushes on a stack that is not loaded yet; nothing in the context changes.</summary>
    internal ref struct NewStack
    {
        private readonly CpuContext* _cpu;
        private readonly MmuMode _mode;
        private ulong _base;
        private ulong _mask;
        private uint _limit;
        private bool _expandDown;

        public NewStack(CpuContext* cpu, int cpl)
        {
            _cpu = cpu;
            _mode = cpl == 3 ? MmuMode.User : MmuMode.Supervisor;
        }

        /// <summary>Offset of the top.</summary>
        public ulong Pointer { get; private set; }

        /// <summary>The stack of a descriptor.</summary>
        public void Use(in Descriptor descriptor, ulong pointer)
        {
            _base = descriptor.Base;
            _limit = descriptor.Limit;
            _mask = descriptor.IsDefault32 ? 0xFFFFFFFFUL : 0xFFFF;
            _expandDown = (descriptor.Rights & Segmentation.DirectionBit) != 0;
            Pointer = pointer & _mask;
        }

        /// <summary>The stack in SS.</summary>
        public void UseCurrent()
        {
            SegmentRegister* ss = CpuContext.Segment(_cpu, Seg.Ss);
            _base = ss->EffectiveBase;
            _limit = ss->Limit;
            _mask = _cpu->StackMask;
            _expandDown = (ss->Rights & (Segmentation.DirectionBit | Segmentation.CodeBit)) ==
                Segmentation.DirectionBit;
            Pointer = _cpu->Rsp & _mask;
        }

        /// <summary>Pushes 4 or 2 bytes; false after #SS or #PF.</summary>
        public bool Push(ulong value, bool wide)
        {
            uint size = wide ? 4U : 2;
            ulong offset = (Pointer - size) & _mask;
            ulong last = offset + size - 1;
            bool ok = _expandDown ? offset > _limit && last <= _mask : last <= _limit;
            if (!ok)
            {
                Faults.Raise(_cpu, Vector.StackFault, (uint)_cpu->ExternalBit);
                return false;
            }

            ulong linear = (_base + offset) & 0xFFFFFFFF;
            if (!Paging.WriteSlow(_cpu, linear, (byte*)&value, (int)size, _mode))
            {
                return false;
            }

            Pointer = offset;
            return true;
        }
    }
}

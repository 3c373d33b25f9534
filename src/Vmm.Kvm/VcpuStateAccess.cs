// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using Vmm.Core;
using Vmm.Kvm.Abi;

namespace Vmm.Kvm;

// Theory. Moves the architectural state between KVM's structures and CpuState. Each of KVM's getters is a system call,
// some of them slow (KVM_GET_REGS takes 4.8 us on one host), and completing an instruction needs registers, segments
// and events each time. So from the first such exit on, the vCPU asks KVM to leave these three in the run page at every
// exit (KVM_CAP_SYNC_REGS) and hands changes back the same way. The page is current only between an exit that stored
// it and the next Run; at all other times, and on a KVM without that capability, the getters and setters are used.
//
// The order of writing matters: special registers before general ones (mode changes), the local APIC before the MSRs
// (a TSC deadline is armed against its timer mode), the TSC before the deadline, events after everything that could
// raise one.

/// <summary>The state of one vCPU, read and written.</summary>
internal sealed unsafe class VcpuStateAccess
{
    private const uint Unusable = 1 << 16;
    private const uint Present = 1 << 7;
    private const int MxcsrOffset = 24;
    private const int XstateBvOffset = 512;

    private const int PkruBytes = 8;

    private readonly SafeHandle _vcpu;
    private readonly kvm_run* _run;
    private readonly KvmCapabilities _has;
    private readonly List<uint> _msrs;
    private readonly bool _isUserIrqchip;
    private readonly bool _canUseRunPage;

    // KVM_GET_XSAVE's area is laid out as the host's: processors without MPX and AVX-512 keep PKRU elsewhere than CpuState.
    private readonly int _hostPkruOffset;
    private readonly byte[] _lastXsave = new byte[CpuState.XsaveAreaBytes];
    private byte[] _msrBuffer = [];
    private bool _pageIsCurrent;

    internal VcpuStateAccess(
        SafeHandle vcpu, kvm_run* run, KvmCapabilities has, IReadOnlyList<uint> msrs, bool isUserIrqchip, int hostPkruOffset)
    {
        bool isInside = hostPkruOffset >= XstateBvOffset && hostPkruOffset <= CpuState.XsaveAreaBytes - PkruBytes;
        _hostPkruOffset = isInside ? hostPkruOffset : CpuState.PkruOffset;
        _vcpu = vcpu;
        _run = run;
        _has = has;
        _msrs = [.. msrs];
        _isUserIrqchip = isUserIrqchip;
        const ulong Needed = KvmAbi.KVM_SYNC_X86_REGS | KvmAbi.KVM_SYNC_X86_SREGS | KvmAbi.KVM_SYNC_X86_EVENTS;
        _canUseRunPage = (has.SyncRegisters & Needed) == Needed;
    }

    /// <summary>Run is about to enter the guest: what the page holds will be old.</summary>
    internal void ForgetRunPage() => _pageIsCurrent = false;

    /// <summary>After an exit whose handling needs registers: use the page now if it was stored, else from the next on.</summary>
    internal void UseRunPage()
    {
        if (!_canUseRunPage)
        {
            return;
        }

        _pageIsCurrent = _run->kvm_valid_regs != 0;
        _run->kvm_valid_regs =
            KvmAbi.KVM_SYNC_X86_REGS | KvmAbi.KVM_SYNC_X86_SREGS | KvmAbi.KVM_SYNC_X86_EVENTS;
    }

    internal void SetCpuid(ReadOnlySpan<CpuidEntry> entries)
    {
        var buffer = new byte[sizeof(kvm_cpuid2) + (entries.Length * sizeof(kvm_cpuid_entry2))];

        // SAFETY: pinned, and sized for all entries just above.
        fixed (byte* start = buffer)
        {
            ((kvm_cpuid2*)start)->nent = (uint)entries.Length;
            var to = (kvm_cpuid_entry2*)(start + sizeof(kvm_cpuid2));
            foreach (ref readonly CpuidEntry entry in entries)
            {
                to->function = entry.Function;
                to->index = entry.Index;
                to->flags = entry.HasIndex ? KvmAbi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0;
                to->eax = entry.Function == 0x40000001 ? FilterParavirtual(entry.Eax) : entry.Eax;
                to->ebx = entry.Ebx;
                to->ecx = entry.Function == 1 ? FilterFeatures(entry.Ecx) : entry.Ecx;
                to->edx = entry.Edx;
                to++;
            }

            KvmCall.Require(_vcpu, KvmAbi.KVM_SET_CPUID2, (nint)start, "KVM_SET_CPUID2");
        }
    }

    internal void Read(CpuState state)
    {
        if (!_isUserIrqchip)
        {
            // First: it lets a vCPU that got a start-up IPI settle.
            kvm_mp_state activity;
            KvmCall.Require(_vcpu, KvmAbi.KVM_GET_MP_STATE, (nint)(&activity), "KVM_GET_MP_STATE");
            state.Activity = activity.mp_state switch
            {
                KvmAbi.KVM_MP_STATE_UNINITIALIZED => ActivityState.WaitForInit,
                KvmAbi.KVM_MP_STATE_HALTED => ActivityState.Halted,
                KvmAbi.KVM_MP_STATE_INIT_RECEIVED or KvmAbi.KVM_MP_STATE_SIPI_RECEIVED
                    => ActivityState.WaitForStartup,
                _ => ActivityState.Running,
            };
        }

        ReadRegisters(state);
        ReadDebugRegisters(state);
        ReadMsrs(state);
        ReadLocalApic(state);
    }

    internal void Write(CpuState state)
    {
        WriteSpecial(state);

        // XCR0 first: it bounds what the XSAVE area may hold.
        WriteXcrs(state);
        WriteXsave(state);
        WriteLocalApic(state);
        WriteMsrs(state);
        WriteDebugRegisters(state);
        WriteEvents(state);
        var activity = new kvm_mp_state
        {
            mp_state = _isUserIrqchip ? KvmAbi.KVM_MP_STATE_RUNNABLE : (uint)state.Activity,
        };
        KvmCall.Require(_vcpu, KvmAbi.KVM_SET_MP_STATE, (nint)(&activity), "KVM_SET_MP_STATE");
    }

    internal void ReadRegisters(CpuState state)
    {
        ReadXcrs(state);
        ReadXsave(state);
        state.Xsave.CopyTo(_lastXsave, 0);
        if (_pageIsCurrent)
        {
            FromKvm(_run->s.regs, state);
            FromKvm(_run->s.sregs, state);
            FromKvm(_run->s.events, state);
            return;
        }

        kvm_regs regs;
        kvm_sregs sregs;
        kvm_vcpu_events events;
        KvmCall.Require(_vcpu, KvmAbi.KVM_GET_REGS, (nint)(&regs), "KVM_GET_REGS");
        KvmCall.Require(_vcpu, KvmAbi.KVM_GET_SREGS, (nint)(&sregs), "KVM_GET_SREGS");
        KvmCall.Require(_vcpu, KvmAbi.KVM_GET_VCPU_EVENTS, (nint)(&events), "KVM_GET_VCPU_EVENTS");
        FromKvm(regs, state);
        FromKvm(sregs, state);
        FromKvm(events, state);
    }

    internal void WriteRegisters(CpuState state)
    {
        // Most instructions leave the vectors alone.
        if (!state.Xsave.AsSpan().SequenceEqual(_lastXsave))
        {
            WriteXsave(state);
        }

        if (!_pageIsCurrent)
        {
            WriteSpecial(state);
            WriteEvents(state);
            return;
        }

        // Special registers are slow to load and seldom change, so they go back only if they did.
        kvm_sregs sregs = ToSregs(state);
        Unsafe.CopyBlock(sregs.interrupt_bitmap, _run->s.sregs.interrupt_bitmap, 4 * sizeof(ulong));
        if (!Same(&sregs, &_run->s.sregs, sizeof(kvm_sregs)))
        {
            _run->s.sregs = sregs;
            _run->kvm_dirty_regs |= KvmAbi.KVM_SYNC_X86_SREGS;
        }

        _run->s.regs = ToRegs(state);
        _run->s.events = ToEvents(state);
        _run->kvm_dirty_regs |= KvmAbi.KVM_SYNC_X86_REGS | KvmAbi.KVM_SYNC_X86_EVENTS;
    }

    private static bool Same(void* left, void* right, int length) =>
        new ReadOnlySpan<byte>(left, length).SequenceEqual(new ReadOnlySpan<byte>(right, length));

    // Special registers before general ones. By system calls: the page is old from here on, also for its owner.
    private void WriteSpecial(CpuState state)
    {
        _pageIsCurrent = false;
        _run->kvm_dirty_regs = 0;
        kvm_sregs sregs = ToSregs(state);
        kvm_regs regs = ToRegs(state);
        KvmCall.Require(_vcpu, KvmAbi.KVM_SET_SREGS, (nint)(&sregs), "KVM_SET_SREGS");
        KvmCall.Require(_vcpu, KvmAbi.KVM_SET_REGS, (nint)(&regs), "KVM_SET_REGS");
    }

    private void WriteEvents(CpuState state)
    {
        kvm_vcpu_events events = ToEvents(state);
        KvmCall.Require(_vcpu, KvmAbi.KVM_SET_VCPU_EVENTS, (nint)(&events), "KVM_SET_VCPU_EVENTS");
    }

    // In User mode KVM swallows writes to IA32_TSC_DEADLINE and refuses the x2APIC's MSRs: features that cannot work are
    // not shown. (Handing both to the port would need guest time and the guest's TSC to be one clock, and they are not.)
    private uint FilterFeatures(uint ecx)
    {
        const uint X2Apic = 1 << 21;
        const uint TscDeadlineTimer = 1 << 24;
        return _isUserIrqchip ? ecx & ~(X2Apic | TscDeadlineTimer) : ecx;
    }

    // KVM's own offers to its guests (cpuid.rst): those that are made of its local APICs fail without them, and Linux
    // then loses inter-processor interrupts.
    private uint FilterParavirtual(uint eax)
    {
        const uint AsyncPageFault = (1 << 4) | (1 << 10) | (1 << 14);
        const uint EndOfInterrupt = 1 << 6;
        const uint Unhalt = 1 << 7;
        const uint SendIpi = 1 << 11;
        const uint SchedYield = 1 << 13;
        return _isUserIrqchip ? eax & ~(AsyncPageFault | EndOfInterrupt | Unhalt | SendIpi | SchedYield) : eax;
    }

    private static void FromKvm(in kvm_regs regs, CpuState state)
    {
        ulong[] gpr = state.Gpr;
        gpr[0] = regs.rax;
        gpr[1] = regs.rcx;
        gpr[2] = regs.rdx;
        gpr[3] = regs.rbx;
        gpr[4] = regs.rsp;
        gpr[5] = regs.rbp;
        gpr[6] = regs.rsi;
        gpr[7] = regs.rdi;
        gpr[8] = regs.r8;
        gpr[9] = regs.r9;
        gpr[10] = regs.r10;
        gpr[11] = regs.r11;
        gpr[12] = regs.r12;
        gpr[13] = regs.r13;
        gpr[14] = regs.r14;
        gpr[15] = regs.r15;
        state.Rip = regs.rip;
        state.Rflags = regs.rflags;
    }

    private static kvm_regs ToRegs(CpuState state)
    {
        ulong[] gpr = state.Gpr;
        return new kvm_regs
        {
            rax = gpr[0],
            rcx = gpr[1],
            rdx = gpr[2],
            rbx = gpr[3],
            rsp = gpr[4],
            rbp = gpr[5],
            rsi = gpr[6],
            rdi = gpr[7],
            r8 = gpr[8],
            r9 = gpr[9],
            r10 = gpr[10],
            r11 = gpr[11],
            r12 = gpr[12],
            r13 = gpr[13],
            r14 = gpr[14],
            r15 = gpr[15],
            rip = state.Rip,
            rflags = state.Rflags,
        };
    }

    private static void FromKvm(in kvm_sregs sregs, CpuState state)
    {
        state.Segments[0] = FromKvm(sregs.es);
        state.Segments[1] = FromKvm(sregs.cs);
        state.Segments[2] = FromKvm(sregs.ss);
        state.Segments[3] = FromKvm(sregs.ds);
        state.Segments[4] = FromKvm(sregs.fs);
        state.Segments[5] = FromKvm(sregs.gs);
        state.Ldtr = FromKvm(sregs.ldt);
        state.Tr = FromKvm(sregs.tr);
        state.GdtBase = sregs.gdt.@base;
        state.GdtLimit = sregs.gdt.limit;
        state.IdtBase = sregs.idt.@base;
        state.IdtLimit = sregs.idt.limit;
        state.Cr0 = sregs.cr0;
        state.Cr2 = sregs.cr2;
        state.Cr3 = sregs.cr3;
        state.Cr4 = sregs.cr4;
        state.Cr8 = sregs.cr8;
        state.Efer = sregs.efer;
        state.ApicBase = sregs.apic_base;
    }

    private static kvm_sregs ToSregs(CpuState state) => new()
    {
        es = ToKvm(state.Segments[0]),
        cs = ToKvm(state.Segments[1]),
        ss = ToKvm(state.Segments[2]),
        ds = ToKvm(state.Segments[3]),
        fs = ToKvm(state.Segments[4]),
        gs = ToKvm(state.Segments[5]),
        ldt = ToKvm(state.Ldtr),
        tr = ToKvm(state.Tr),
        gdt = new kvm_dtable { @base = state.GdtBase, limit = state.GdtLimit },
        idt = new kvm_dtable { @base = state.IdtBase, limit = state.IdtLimit },
        cr0 = state.Cr0,
        cr2 = state.Cr2,
        cr3 = state.Cr3,
        cr4 = state.Cr4,
        cr8 = state.Cr8,
        efer = state.Efer,
        apic_base = state.ApicBase,
    };

    private static SegmentState FromKvm(in kvm_segment segment)
    {
        uint rights = segment.type & 0xFu;
        rights |= (segment.s & 1u) << 4;
        rights |= (segment.dpl & 3u) << 5;
        rights |= (segment.present & 1u) << 7;
        rights |= (segment.avl & 1u) << 12;
        rights |= (segment.l & 1u) << 13;
        rights |= (segment.db & 1u) << 14;
        rights |= (segment.g & 1u) << 15;
        rights |= segment.unusable != 0 ? Unusable : 0;
        return new SegmentState
        {
            Selector = segment.selector,
            Base = segment.@base,
            Limit = segment.limit,
            Rights = rights,
        };
    }

    private static kvm_segment ToKvm(in SegmentState segment)
    {
        uint rights = segment.Rights;
        bool isUnusable = (rights & Unusable) != 0 || (rights & Present) == 0;
        return new kvm_segment
        {
            @base = segment.Base,
            limit = segment.Limit,
            selector = segment.Selector,
            type = (byte)(rights & 0xF),
            s = (byte)((rights >> 4) & 1),
            dpl = (byte)((rights >> 5) & 3),
            present = isUnusable ? (byte)0 : (byte)1,
            avl = (byte)((rights >> 12) & 1),
            l = (byte)((rights >> 13) & 1),
            db = (byte)((rights >> 14) & 1),
            g = (byte)((rights >> 15) & 1),
            unusable = isUnusable ? (byte)1 : (byte)0,
        };
    }

    // Event kinds as CpuState numbers them.
    private static void FromKvm(in kvm_vcpu_events events, CpuState state)
    {
        state.EventPending = false;
        state.EventVector = 0;
        state.EventType = 0;
        state.EventHasErrorCode = false;
        state.EventErrorCode = 0;
        if (events.exception.injected != 0)
        {
            state.EventPending = true;
            state.EventType = 3;
            state.EventVector = events.exception.nr;
            state.EventHasErrorCode = events.exception.has_error_code != 0;
            state.EventErrorCode = events.exception.error_code;
        }
        else if (events.nmi.injected != 0)
        {
            state.EventPending = true;
            state.EventType = 2;
            state.EventVector = 2;
        }
        else if (events.interrupt.injected != 0)
        {
            state.EventPending = true;
            state.EventType = events.interrupt.soft != 0 ? (byte)4 : (byte)0;
            state.EventVector = events.interrupt.nr;
        }

        state.StiShadow = (events.interrupt.shadow & KvmAbi.KVM_X86_SHADOW_INT_STI) != 0;
        state.MovSsShadow = (events.interrupt.shadow & KvmAbi.KVM_X86_SHADOW_INT_MOV_SS) != 0;
        state.NmiPending = events.nmi.pending != 0;
        state.NmiBlocked = events.nmi.masked != 0;
    }

    private static kvm_vcpu_events ToEvents(CpuState state)
    {
        kvm_vcpu_events events = default;
        if (state.EventPending)
        {
            switch (state.EventType)
            {
                case 2:
                    events.nmi.injected = 1;
                    break;
                case 3:
                    events.exception.injected = 1;
                    events.exception.nr = state.EventVector;
                    events.exception.has_error_code = state.EventHasErrorCode ? (byte)1 : (byte)0;
                    events.exception.error_code = state.EventErrorCode;
                    break;
                default:
                    events.interrupt.injected = 1;
                    events.interrupt.nr = state.EventVector;
                    events.interrupt.soft = state.EventType == 4 ? (byte)1 : (byte)0;
                    break;
            }
        }

        events.interrupt.shadow = (byte)((state.StiShadow ? KvmAbi.KVM_X86_SHADOW_INT_STI : 0)
            | (state.MovSsShadow ? KvmAbi.KVM_X86_SHADOW_INT_MOV_SS : 0));
        events.nmi.pending = state.NmiPending ? (byte)1 : (byte)0;
        events.nmi.masked = state.NmiBlocked ? (byte)1 : (byte)0;
        events.flags = KvmAbi.KVM_VCPUEVENT_VALID_NMI_PENDING | KvmAbi.KVM_VCPUEVENT_VALID_SHADOW;
        return events;
    }

    private void ReadXsave(CpuState state)
    {
        if (_has.Xsave)
        {
            // SAFETY: the area has exactly the 4096 bytes of struct kvm_xsave.
            fixed (byte* area = state.Xsave)
            {
                KvmCall.Require(_vcpu, KvmAbi.KVM_GET_XSAVE, (nint)area, "KVM_GET_XSAVE");
            }

            state.Xsave.AsSpan(_hostPkruOffset, PkruBytes).CopyTo(state.Xsave.AsSpan(CpuState.PkruOffset));

            return;
        }

        kvm_fpu fpu;
        KvmCall.Require(_vcpu, KvmAbi.KVM_GET_FPU, (nint)(&fpu), "KVM_GET_FPU");
        Span<byte> to = state.Xsave;
        to.Clear();
        MemoryMarshal.Write(to, fpu.fcw);
        MemoryMarshal.Write(to[2..], fpu.fsw);
        to[4] = fpu.ftwx;
        MemoryMarshal.Write(to[6..], fpu.last_opcode);
        MemoryMarshal.Write(to[8..], fpu.last_ip);
        MemoryMarshal.Write(to[16..], fpu.last_dp);
        MemoryMarshal.Write(to[MxcsrOffset..], fpu.mxcsr);
        new ReadOnlySpan<byte>(fpu.fpr, 128).CopyTo(to[32..]);
        new ReadOnlySpan<byte>(fpu.xmm, 256).CopyTo(to[160..]);
        to[XstateBvOffset] = 3;
    }

    private void WriteXsave(CpuState state)
    {
        if (_has.Xsave)
        {
            state.Xsave.AsSpan(CpuState.PkruOffset, PkruBytes).CopyTo(state.Xsave.AsSpan(_hostPkruOffset));

            // SAFETY: as above.
            fixed (byte* area = state.Xsave)
            {
                KvmCall.Require(_vcpu, KvmAbi.KVM_SET_XSAVE, (nint)area, "KVM_SET_XSAVE");
            }

            return;
        }

        ReadOnlySpan<byte> from = state.Xsave;
        var fpu = new kvm_fpu
        {
            fcw = MemoryMarshal.Read<ushort>(from),
            fsw = MemoryMarshal.Read<ushort>(from[2..]),
            ftwx = from[4],
            last_opcode = MemoryMarshal.Read<ushort>(from[6..]),
            last_ip = MemoryMarshal.Read<ulong>(from[8..]),
            last_dp = MemoryMarshal.Read<ulong>(from[16..]),
            mxcsr = MemoryMarshal.Read<uint>(from[MxcsrOffset..]),
        };
        from.Slice(32, 128).CopyTo(new Span<byte>(fpu.fpr, 128));
        from.Slice(160, 256).CopyTo(new Span<byte>(fpu.xmm, 256));
        KvmCall.Require(_vcpu, KvmAbi.KVM_SET_FPU, (nint)(&fpu), "KVM_SET_FPU");
    }

    private void ReadXcrs(CpuState state)
    {
        if (!_has.Xcrs)
        {
            state.Xcr0 = 1;
            return;
        }

        kvm_xcrs xcrs;
        KvmCall.Require(_vcpu, KvmAbi.KVM_GET_XCRS, (nint)(&xcrs), "KVM_GET_XCRS");
        var entry = (kvm_xcr*)xcrs.xcrs;
        for (uint i = 0; i < Math.Min(xcrs.nr_xcrs, 16); i++)
        {
            if (entry[i].xcr == 0)
            {
                state.Xcr0 = entry[i].value;
            }
        }
    }

    private void WriteXcrs(CpuState state)
    {
        if (!_has.Xcrs)
        {
            return;
        }

        kvm_xcrs xcrs = default;
        xcrs.nr_xcrs = 1;
        *(kvm_xcr*)xcrs.xcrs = new kvm_xcr { xcr = 0, value = state.Xcr0 };
        KvmCall.Require(_vcpu, KvmAbi.KVM_SET_XCRS, (nint)(&xcrs), "KVM_SET_XCRS");
    }

    private void ReadDebugRegisters(CpuState state)
    {
        if (!_has.DebugRegisters)
        {
            return;
        }

        kvm_debugregs debug;
        KvmCall.Require(_vcpu, KvmAbi.KVM_GET_DEBUGREGS, (nint)(&debug), "KVM_GET_DEBUGREGS");
        for (int i = 0; i < 4; i++)
        {
            state.Debug[i] = debug.db[i];
        }

        state.Debug[4] = debug.dr6;
        state.Debug[5] = debug.dr7;
    }

    private void WriteDebugRegisters(CpuState state)
    {
        if (!_has.DebugRegisters)
        {
            return;
        }

        var debug = new kvm_debugregs { dr6 = state.Debug[4], dr7 = state.Debug[5] };
        for (int i = 0; i < 4; i++)
        {
            debug.db[i] = state.Debug[i];
        }

        KvmCall.Require(_vcpu, KvmAbi.KVM_SET_DEBUGREGS, (nint)(&debug), "KVM_SET_DEBUGREGS");
    }

    private void ReadLocalApic(CpuState state)
    {
        if (_isUserIrqchip)
        {
            state.LocalApic = null;
            return;
        }

        byte[] area = state.LocalApic ??= new byte[sizeof(kvm_lapic_state)];

        // SAFETY: KVM writes 1024 bytes; a buffer of another length was never ours.
        fixed (byte* start = area.AsSpan(0, sizeof(kvm_lapic_state)))
        {
            KvmCall.Require(_vcpu, KvmAbi.KVM_GET_LAPIC, (nint)start, "KVM_GET_LAPIC");
        }
    }

    private void WriteLocalApic(CpuState state)
    {
        if (_isUserIrqchip || state.LocalApic is not { } area)
        {
            return;
        }

        if (area.Length != sizeof(kvm_lapic_state))
        {
            throw new HypervisorException($"kvm: a local APIC state of {area.Length} bytes, expected 1024");
        }

        // SAFETY: KVM reads exactly the 1024 bytes that the check above leaves.
        fixed (byte* start = area)
        {
            KvmCall.Require(_vcpu, KvmAbi.KVM_SET_LAPIC, (nint)start, "KVM_SET_LAPIC");
        }
    }

    private void ReadMsrs(CpuState state)
    {
        while (_msrs.Count > 0)
        {
            int count = _msrs.Count;
            byte[] buffer = MsrBuffer(count);

            // SAFETY: pinned, and sized for `count` entries by MsrBuffer.
            fixed (byte* start = buffer)
            {
                *(kvm_msrs*)start = new kvm_msrs { nmsrs = (uint)count };
                var entries = (kvm_msr_entry*)(start + sizeof(kvm_msrs));
                for (int i = 0; i < count; i++)
                {
                    entries[i] = new kvm_msr_entry { index = _msrs[i] };
                }

                int done = KvmCall.Require(_vcpu, KvmAbi.KVM_GET_MSRS, (nint)start, "KVM_GET_MSRS");
                if (done < count)
                {
                    // KVM lists it but this vCPU (its CPUID) does not have it.
                    _msrs.RemoveAt(done);
                    continue;
                }

                for (int i = 0; i < count; i++)
                {
                    state.Msrs[entries[i].index] = entries[i].data;
                }

                return;
            }
        }
    }

    private void WriteMsrs(CpuState state)
    {
        int count = state.Msrs.Count;
        if (count == 0)
        {
            return;
        }

        byte[] buffer = MsrBuffer(count);

        // SAFETY: pinned, and sized for `count` entries by MsrBuffer.
        fixed (byte* start = buffer)
        {
            var entries = (kvm_msr_entry*)(start + sizeof(kvm_msrs));
            int first = 0;
            int last = count;
            foreach ((uint index, ulong value) in state.Msrs)
            {
                // The deadline compares with the TSC, so it comes last.
                int place = index == Msr.TscDeadline ? --last : first++;
                entries[place] = new kvm_msr_entry { index = index, data = value };
            }

            // KVM stops at the first that it refuses: one that this processor does not have, or a read-only one that
            // keeps its value. Go on behind it.
            int from = 0;
            while (from < count)
            {
                kvm_msr_entry* here = entries + from;
                var header = (kvm_msrs*)((byte*)here - sizeof(kvm_msrs));
                kvm_msrs saved = *header;
                *header = new kvm_msrs { nmsrs = (uint)(count - from) };
                int done = KvmCall.Require(_vcpu, KvmAbi.KVM_SET_MSRS, (nint)header, "KVM_SET_MSRS");
                *header = saved;
                from += done + 1;
            }
        }
    }

    private byte[] MsrBuffer(int count)
    {
        int length = sizeof(kvm_msrs) + (count * sizeof(kvm_msr_entry));
        if (_msrBuffer.Length < length)
        {
            _msrBuffer = new byte[length];
        }

        return _msrBuffer;
    }
}

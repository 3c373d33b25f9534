// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;

namespace Vmm.X86;

// Conversion between CpuContext and CpuState. The XSAVE area is normalised on the way in: components that XSTATE_BV
// calls initial are written out, so that running code never asks.
public sealed unsafe partial class SoftVcpu
{
    private const ulong PkruComponent = 1UL << 9;

    /// <inheritdoc/>
    public void ReadState(CpuState state)
    {
        ArgumentNullException.ThrowIfNull(state);
        CpuContext* cpu = _cpu;
        for (int i = 0; i < 16; i++)
        {
            state.Gpr[i] = cpu->Gpr[i];
        }

        state.Rip = cpu->Rip;
        state.Rflags = Flags.Get(cpu);
        for (int i = 0; i < 6; i++)
        {
            state.Segments[i] = Export(CpuContext.Segment(cpu, i));
        }

        state.Ldtr = Export(CpuContext.Segment(cpu, Seg.Ldtr));
        state.Tr = Export(CpuContext.Segment(cpu, Seg.Tr));
        state.GdtBase = cpu->GdtBase;
        state.GdtLimit = cpu->GdtLimit;
        state.IdtBase = cpu->IdtBase;
        state.IdtLimit = cpu->IdtLimit;
        state.Cr0 = cpu->Cr0;
        state.Cr2 = cpu->Cr2;
        state.Cr3 = cpu->Cr3;
        state.Cr4 = cpu->Cr4;
        state.Cr8 = _interrupts.Cr8;
        state.Efer = cpu->Efer;
        state.ApicBase = _interrupts.ApicBase;
        state.Xcr0 = cpu->Xcr0;
        for (int i = 0; i < 4; i++)
        {
            state.Debug[i] = cpu->Dr[i];
        }

        state.Debug[4] = cpu->Dr6;
        state.Debug[5] = cpu->Dr7;
        new ReadOnlySpan<byte>(cpu->Xsave, CpuState.XsaveAreaBytes).CopyTo(state.Xsave);
        BitConverter.TryWriteBytes(state.Xsave.AsSpan(CpuState.PkruOffset), cpu->Pkru);
        BitConverter.TryWriteBytes(state.Xsave.AsSpan(512), XsaveState.InUse(cpu) | (cpu->Pkru != 0 ? PkruComponent : 0));
        state.Xsave.AsSpan(520, 56).Clear();
        state.Msrs.Clear();
        for (int i = 0; i < Msrs.Saved.Count; i++)
        {
            uint index = Msrs.Saved[i];
            if (Msrs.TryReadSaved(this, index, out ulong value))
            {
                state.Msrs[index] = value;
            }
        }

        state.Activity = (ActivityState)cpu->Activity;
        state.EventPending = false;
        state.StiShadow = (cpu->Shadow & 1) != 0;
        state.MovSsShadow = (cpu->Shadow & 2) != 0;
        state.NmiBlocked = cpu->NmiBlocked != 0;
        state.NmiPending = cpu->NmiPending != 0;
        state.LocalApic = null;
    }

    /// <inheritdoc/>
    public void WriteState(CpuState state)
    {
        ArgumentNullException.ThrowIfNull(state);
        CpuContext* cpu = _cpu;
        for (int i = 0; i < 16; i++)
        {
            cpu->Gpr[i] = state.Gpr[i];
        }

        cpu->Rip = state.Rip;
        cpu->RflagsSystem = (state.Rflags & ~Rflags.Arithmetic & 0x3FFFFF) | Rflags.Fixed;
        Flags.SetArithmetic(cpu, state.Rflags);
        for (int i = 0; i < 6; i++)
        {
            Import(CpuContext.Segment(cpu, i), state.Segments[i]);
        }

        Import(CpuContext.Segment(cpu, Seg.Ldtr), state.Ldtr);
        Import(CpuContext.Segment(cpu, Seg.Tr), state.Tr);
        cpu->GdtBase = state.GdtBase;
        cpu->GdtLimit = state.GdtLimit;
        cpu->IdtBase = state.IdtBase;
        cpu->IdtLimit = state.IdtLimit;
        cpu->Cr0 = state.Cr0 | Cr0.Et;
        cpu->Cr2 = state.Cr2;
        cpu->Cr3 = state.Cr3;
        cpu->Cr4 = state.Cr4;
        cpu->Efer = state.Efer;
        _interrupts.Cr8 = (byte)(state.Cr8 & 15);
        if (_interrupts.ApicBase != state.ApicBase && state.ApicBase != 0)
        {
            _interrupts.ApicBase = state.ApicBase;
        }

        cpu->Xcr0 = (state.Xcr0 & XsaveState.Supported) | 1;
        for (int i = 0; i < 4; i++)
        {
            cpu->Dr[i] = state.Debug[i];
        }

        cpu->Dr6 = state.Debug[4];
        cpu->Dr7 = state.Debug[5];
        state.Xsave.CopyTo(new Span<byte>(cpu->Xsave, CpuState.XsaveAreaBytes));
        ulong present = cpu->XstateBv;
        cpu->Pkru = (present & PkruComponent) != 0 ? BitConverter.ToUInt32(state.Xsave, CpuState.PkruOffset) : 0;
        XsaveState.Normalise(cpu, present);
        for (int i = 0; i < state.Msrs.Count; i++)
        {
            Msrs.WriteSaved(this, state.Msrs.GetKeyAtIndex(i), state.Msrs.GetValueAtIndex(i));
        }

        cpu->Activity = (int)state.Activity;
        cpu->Shadow = (state.StiShadow ? 1 : 0) | (state.MovSsShadow ? 2 : 0);
        cpu->NmiBlocked = state.NmiBlocked ? 1 : 0;
        cpu->NmiPending = state.NmiPending ? 1 : 0;
        cpu->Cpl = (cpu->Cr0 & Cr0.Pe) == 0 ? 0
            : (cpu->RflagsSystem & Rflags.Vm) != 0 ? 3 : CpuContext.Segment(cpu, Seg.Ss)->Dpl;
        cpu->PendingDebug = 0;
        cpu->Delivering = 0;
        cpu->InterruptHint = 1;
        cpu->CurrentBlock = null;
        cpu->Calls.Ready = 0;
        _pending = state.EventPending;
        _pendingVector = state.EventVector;
        _pendingType = state.EventType;
        _pendingHasError = state.EventHasErrorCode;
        _pendingError = state.EventErrorCode;
        UpdateApicPage();
        Paging.FlushAll(cpu);
        Paging.LoadPdptes(cpu, cpu->Cr3, cpu->Cr4, cpu->Cr0);
        Modes.Update(cpu);
        Interlocked.Or(ref cpu->Request, RequestBits.Look);
    }

    internal void UpdateApicPage() =>
        _cpu->ApicPage = _interrupts.IsMemoryMapped ? _interrupts.ApicBase & ~Mem.PageOffset : ulong.MaxValue;

    private static SegmentState Export(SegmentRegister* segment) => new()
    {
        Selector = segment->Selector,
        Base = segment->Base,
        Limit = segment->Limit,
        Rights = segment->Rights,
    };

    private static void Import(SegmentRegister* segment, in SegmentState state)
    {
        segment->Selector = state.Selector;
        segment->Base = state.Base;
        segment->EffectiveBase = state.Base;
        segment->Limit = state.Limit;
        segment->Rights = state.Rights & 0x1F0FF;
    }

    private void PowerOn()
    {
        var state = new CpuState();
        state.Reset(false, CpuidTable.FamilyModelStepping);
        state.ApicBase = _interrupts.ApicBase;
        state.Activity = Index == 0 ? ActivityState.Running : ActivityState.WaitForInit;
        WriteState(state);

        // The TSC counts at the P0 frequency (HWCR.TscFreqSel), and LFENCE serialises (DE_CFG bit 1).
        _cpu->Msr.HwCr = 1 << 24;
        _cpu->Msr.DeCfg = 2;
    }
}

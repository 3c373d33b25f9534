// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Threading;
using Vmm.Core;

namespace Vmm.X86;

// The run loop. Execute is the outer, slow round: requests from other threads, events in the order of SDM 3A table 6-2,
// then a block. RunBlocks is the fast inner loop, which leaves only for faults, mode changes, requests and fetches that
// the caches cannot answer.
public sealed unsafe partial class SoftVcpu
{
    private const int RandomBytes = 4096;
    private readonly byte[] _random = new byte[RandomBytes];
    private int _randomLeft;
    private ulong _sequence;
    private int _pauses;
    private Insn* _last;

    /// <summary>XCR0 bits that CPUID offers.</summary>
    internal ulong AllowedXcr0 { get; private set; } = 3;

    /// <summary>
    /// Run returns Interrupted as soon as so many instructions have been executed; exactly then, unless it is set below the
    /// count or inside the block that runs. For VMs of a deterministic driver. The vCPU's thread, or while it rests.
    /// </summary>
    public long StopAt
    {
        get => (long)_cpu->CountLimit;
        set
        {
            _cpu->CountLimit = (ulong)value;
            if (Vm.Deterministic)
            {
                // The block that runs may have been entered under a later limit.
                Interlocked.Or(ref _cpu->Request, RequestBits.Look);
            }
        }
    }

    /// <summary>Instructions executed so far. Any thread; approximate while running.</summary>
    public long InstructionsRetired => (long)_cpu->InstructionCount;

    /// <inheritdoc/>
    public ExitKind Run(ref VcpuExit exit)
    {
        CpuContext* cpu = _cpu;
        cpu->InterruptHint = 1;
        ForgetTsc(cpu);
        _tsc = default;
        DevicePort.Leave(cpu);
        EnterThread(cpu);
        try
        {
            ExitKind kind = Execute(cpu);
            exit.InterruptsMasked = kind == ExitKind.Halted && (cpu->RflagsSystem & Rflags.If) == 0;
            return kind;
        }
        catch (Exception error)
        {
            // A device or the processor itself is broken: the guest cannot go on, the host can.
            exit.Detail = $"software processor {Index} at {cpu->Rip:x}: {error.GetType().Name}: {error.Message}";
            return ExitKind.Failed;
        }
        finally
        {
            DevicePort.Enter(cpu);
        }
    }

    /// <summary>Executes one instruction, or delivers one pending event. For the completer and tests.</summary>
    internal Status Step(CpuContext* cpu, out bool faulted)
    {
        faulted = false;
        Block* block = FindBlock(cpu, cpu->ModeKey | BlockKey.Single);
        if (block == null)
        {
            faulted = true;
            return Status.Fault;
        }

        Status status = RunBlocks(cpu, block);
        if (status == Status.Fault)
        {
            PrepareFault(cpu);
            faulted = true;
        }

        return status;
    }

    internal void Cpuid()
    {
        CpuContext* cpu = _cpu;
        var function = (uint)cpu->Rax;
        var index = (uint)cpu->Rcx;
        uint basic = FindCpuid(0, 0).Eax;
        uint extended = FindCpuid(0x80000000, 0).Eax;
        uint hypervisor = FindCpuid(0x40000000, 0).Eax;
        bool known = function < 0x40000000 ? function <= basic
            : function < 0x80000000 ? function <= hypervisor : function <= extended;
        CpuidEntry entry = known ? FindCpuid(function, index) : default;
        uint ecx = entry.Ecx;
        uint edx = entry.Edx;
        uint ebx = entry.Ebx;
        if (known && function == 1)
        {
            // OSXSAVE and APIC follow the system registers.
            ecx = (ecx & ~(1U << 27)) | ((cpu->Cr4 & Cr4.OsXsave) != 0 ? 1U << 27 : 0);
            edx = (_interrupts.ApicBase & 0x800) == 0 ? edx & ~(1U << 9) : edx;
        }
        else if (known && function == 7 && index == 0)
        {
            ecx = (ecx & ~(1U << 4)) | ((cpu->Cr4 & Cr4.Pke) != 0 ? 1U << 4 : 0);
        }
        else if (known && function == 0xD && index < 2)
        {
            // EBX: size of the area for the components enabled now.
            uint size = 576;
            if (index == 0)
            {
                size = (cpu->Xcr0 & XsaveState.Avx) != 0 ? 832 : size;
                size = (cpu->Xcr0 & XsaveState.Pkru) != 0 ? CpuState.PkruOffset + 8U : size;
            }
            else
            {
                size += (cpu->Xcr0 & XsaveState.Avx) != 0 ? 256U : 0;
                size += (cpu->Xcr0 & XsaveState.Pkru) != 0 ? 8U : 0;
            }

            ebx = size;
        }

        if (function is not (1 or 7 or 0xD))
        {
            cpu->LastCpuid.Set(function, index, entry);
        }

        cpu->Rax = entry.Eax;
        cpu->Rbx = ebx;
        cpu->Rcx = ecx;
        cpu->Rdx = edx;
    }

    internal void OnPause()
    {
        // A spinning vCPU on a host with fewer processors than vCPUs must let the holder of the lock run.
        if ((++_pauses & 63) == 0 && Vm.Shared->Vcpus > 1)
        {
            Thread.Yield();
        }
    }

    internal ulong NextRandom()
    {
        if (Vm.Deterministic)
        {
            // SplitMix64.
            _sequence += 0x9E3779B97F4A7C15;
            ulong mixed = (_sequence ^ (_sequence >> 30)) * 0xBF58476D1CE4E5B9;
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB;
            return mixed ^ (mixed >> 31);
        }

        if (_randomLeft < 8)
        {
            RandomNumberGenerator.Fill(_random);
            _randomLeft = RandomBytes;
        }

        _randomLeft -= 8;
        return MemoryMarshal.Read<ulong>(_random.AsSpan(_randomLeft));
    }

    private ExitKind Execute(CpuContext* cpu)
    {
        while (true)
        {
            int request = Volatile.Read(ref cpu->Request);
            if (request != 0)
            {
                if ((request & RequestBits.FlushAll) != 0)
                {
                    FlushRequested();
                }

                // What is taken away is what is served: a kick that comes after the read above would be lost otherwise,
                // and with it an interrupt whose line stays up.
                request = Interlocked.And(
                    ref cpu->Request, ~(RequestBits.Look | RequestBits.Kick | RequestBits.Code | RequestBits.Stores));
                if ((request & RequestBits.Stores) != 0)
                {
                    Sites.DropStores(cpu);
                }

                if ((request & RequestBits.Code) != 0)
                {
                    CutOverwrittenCode(cpu);
                }

                if ((request & RequestBits.Kick) != 0)
                {
                    return ExitKind.Interrupted;
                }
            }

            if (cpu->BlocksStale != 0)
            {
                cpu->BlocksStale = 0;
                cpu->CurrentBlock = null;
                cpu->Blocks.Clear();
            }

            if (cpu->Activity is (int)ActivityState.WaitForInit or (int)ActivityState.WaitForStartup)
            {
                return ExitKind.Halted;
            }

            if (cpu->InstructionCount >= cpu->CountLimit)
            {
                return ExitKind.Interrupted;
            }

            if (!ServeEvents(cpu))
            {
                return ExitKind.Shutdown;
            }

            if (cpu->Activity == (int)ActivityState.Halted)
            {
                return ExitKind.Halted;
            }

            if (!RunOnce(cpu))
            {
                return ExitKind.Shutdown;
            }
        }
    }

    // Delivers what is due between two instructions. False: shutdown.
    private bool ServeEvents(CpuContext* cpu)
    {
        if (_pending)
        {
            _pending = false;
            return InjectPending(cpu);
        }

        if (cpu->PendingDebug != 0 && (cpu->Shadow & 2) == 0)
        {
            Faults.Raise(cpu, Vector.Debug);
            cpu->Fault.IsTrap = true;
            cpu->Fault.Address = cpu->PendingDebug;
            cpu->PendingDebug = 0;
            cpu->Activity = (int)ActivityState.Running;
            if (!Interrupts.DeliverFault(cpu))
            {
                return false;
            }
        }

        if (cpu->Shadow != 0)
        {
            return true;
        }

        if (cpu->NmiBlocked != 0)
        {
            // One NMI waits for IRET, however many come (SDM 3A 6.7.1).
            while (_interrupts.HasNmi && _interrupts.TakeNmi())
            {
                cpu->NmiPending = 1;
            }
        }
        else if (cpu->NmiPending != 0 || _interrupts.HasNmi)
        {
            if (cpu->NmiPending != 0 || _interrupts.TakeNmi())
            {
                cpu->NmiPending = 0;
                cpu->Activity = (int)ActivityState.Running;
                cpu->NmiBlocked = 1;
                return Interrupts.DeliverExternal(cpu, Vector.Nmi);
            }
        }

        if (cpu->InterruptHint == 0 || (cpu->RflagsSystem & Rflags.If) == 0)
        {
            return true;
        }

        if (!_interrupts.HasInterrupt)
        {
            cpu->InterruptHint = 0;
            return true;
        }

        int vector = _interrupts.Acknowledge();
        if (vector < 0)
        {
            return true;
        }

        cpu->Activity = (int)ActivityState.Running;
        return Interrupts.DeliverExternal(cpu, (byte)vector);
    }

    private bool InjectPending(CpuContext* cpu)
    {
        cpu->Activity = (int)ActivityState.Running;
        if (_pendingType is 0 or 2)
        {
            cpu->NmiBlocked = _pendingType == 2 ? 1 : cpu->NmiBlocked;
            return Interrupts.DeliverExternal(cpu, _pendingVector);
        }

        if (_pendingType == 4)
        {
            return Interrupts.Deliver(cpu, _pendingVector, EventKind.Software, false, 0, Flags.Get(cpu)) ||
                Interrupts.DeliverFault(cpu);
        }

        cpu->Fault = default;
        cpu->Fault.Vector = _pendingVector;
        cpu->Fault.HasErrorCode = _pendingHasError;
        cpu->Fault.ErrorCode = _pendingError;
        cpu->Fault.Address = _pendingVector == Vector.PageFault ? cpu->Cr2 : 0;
        cpu->Fault.IsTrap = _pendingVector is Vector.Breakpoint or Vector.Overflow;
        return Interrupts.DeliverFault(cpu);
    }

    // Runs blocks until something needs the outer round. False: shutdown.
    private bool RunOnce(CpuContext* cpu)
    {
        int shadow = cpu->Shadow;
        bool trap = (cpu->RflagsSystem & Rflags.Tf) != 0;
        bool watched = (cpu->Dr7 & 0xFF) != 0;
        bool single = trap || watched || shadow != 0 || NearsLimit(cpu);

        // MOV SS holds code breakpoints back on Intel's processors (SDM 3A 6.8.3), not on AMD's.
        bool heldBack = (shadow & 2) != 0 && (cpu->Features & CpuFeature.Amd) == 0;
        if (watched && !heldBack && (cpu->RflagsSystem & Rflags.Rf) == 0)
        {
            ulong linear = CpuContext.Segment(cpu, Seg.Cs)->EffectiveBase + cpu->Rip;
            uint hit = Breakpoints.Instruction(cpu, cpu->Mode == ProcessorMode.Long ? linear : linear & 0xFFFFFFFF);
            if (hit != 0)
            {
                Faults.Raise(cpu, Vector.Debug);
                cpu->Fault.Address = hit;
                return Interrupts.DeliverFault(cpu);
            }
        }

        cpu->Shadow = 0;
        cpu->RflagsSystem &= ~Rflags.Rf;
        Status status;
        Block* block = FindBlock(cpu, cpu->ModeKey | (single ? BlockKey.Single : 0));
        if (block == null)
        {
            return Interrupts.DeliverFault(cpu);
        }

        if (_wantsBranch)
        {
            RememberBranch(cpu, block);
        }

        ulong count = cpu->InstructionCount;
        status = RunBlocks(cpu, block);
        switch (status)
        {
            case Status.Fault:
                PrepareFault(cpu);
                cpu->PendingDebug = 0;
                return Interrupts.DeliverFault(cpu);
            case Status.Shutdown:
                return false;
            case Status.Halt:
                cpu->Activity = (int)ActivityState.Halted;
                break;
            default:
                break;
        }

        // The trap flag counts as it was before the instruction; MOV SS holds the trap back; a software interrupt has
        // cleared TF and is not followed by one.
        if (trap && cpu->InstructionCount != count && (cpu->Shadow & 2) == 0 && !_softwareInterrupt)
        {
            cpu->PendingDebug |= 0x4000;
        }

        _softwareInterrupt = false;
        return true;
    }

    // RIP and #SS for the record that faulted.
    private void PrepareFault(CpuContext* cpu)
    {
        Insn* insn = _last;
        if (cpu->Fault.NonCanonical && (insn->Flags & InsnFlags.HasMemory) != 0 && insn->Segment == Seg.Ss)
        {
            Faults.NonCanonicalIsStack(cpu);
        }

        cpu->Rip = Insn.Address(cpu, insn);
        cpu->InstructionCount--;
    }

    private Status RunBlocks(CpuContext* cpu, Block* block)
    {
        while (true)
        {
            cpu->CurrentBlock = block;
            cpu->BlockRip = cpu->Rip;
            Insn* insn = block->First;
            Status status;
            if ((block->EntryFlagImage != null || Heat(cpu, block)) && MayEnter(cpu, block))
            {
                status = RunTranslated(cpu, block, &insn);
                block = cpu->CurrentBlock;
            }
            else
            {
                status = Status.Next;
                _exit = -1;
            }

            if (status == Status.Next && Vm.Deterministic)
            {
                status = RunExactly(cpu, ref insn);
            }
            else if (status == Status.Next)
            {
                Insn* start = insn;
                while ((status = insn->Handler(cpu, insn)) == Status.Next)
                {
                    insn++;
                }

                cpu->InstructionCount += (ulong)(insn - start) + 1;
            }

            if (status > Status.Jump)
            {
                _last = insn;
                return status;
            }

            if (Volatile.Read(ref cpu->Request) != 0 || (block->Key & BlockKey.Single) != 0 || NearsLimit(cpu))
            {
                return Status.Look;
            }

            if (_exit < 0 && status <= Status.NotTaken)
            {
                Block* linked = (&block->Link0)[(int)status];
                if (linked != null && linked->Generation == *linked->PageGeneration)
                {
                    block = linked;
                    continue;
                }
            }

            ulong linear = cpu->Rip + CpuContext.Segment(cpu, Seg.Cs)->EffectiveBase;
            JumpEntry* entry = cpu->Blocks.JumpSlot(linear);
            Block* next;
            if (entry->Linear == linear && (entry->Context == ((cpu->SpaceAsid << 32) | cpu->ModeKey) ||
                entry->Context == ((cpu->GlobalAsid << 32) | cpu->ModeKey)) &&
                entry->Target->Generation == *entry->Target->PageGeneration && entry->Target->Crosses == 0)
            {
                next = entry->Target;
            }
            else
            {
                long overflows = cpu->Blocks.Overflows;
                next = FindBlock(cpu, cpu->ModeKey);
                if (next == null || cpu->Blocks.Overflows != overflows)
                {
                    // The outer round finds it again, and delivers the fault if there is one.
                    return Status.Look;
                }
            }

            if (_wantsBranch)
            {
                RememberBranch(cpu, next);
            }

            if (_exit >= 0)
            {
                Connect(cpu, next);
            }
            else if (status <= Status.NotTaken && CanLink(cpu, block, next, linear))
            {
                (&block->Link0)[(int)status] = next;
            }

            block = next;
        }
    }

    // The same for a deterministic VM: a handler, and a device behind it, sees the exact count, and what it requests (an
    // interrupt that it raised, a timer that it armed) is served right behind it, as in generated code.
    private static Status RunExactly(CpuContext* cpu, ref Insn* insn)
    {
        Insn* at = insn;
        Status status;
        while (true)
        {
            status = at->Handler(cpu, at);
            cpu->InstructionCount++;
            if (status != Status.Next)
            {
                break;
            }

            at++;
            if (Volatile.Read(ref cpu->Request) != 0)
            {
                cpu->Rip = Insn.Address(cpu, at);
                status = Status.Look;
                break;
            }
        }

        insn = at;
        return status;
    }

    // A block could go beyond the limit: from here on instruction by instruction.
    private static bool NearsLimit(CpuContext* cpu) => cpu->InstructionCount + MaxInsns > cpu->CountLimit;

    // A direct branch inside one page leads to the same block wherever the page is mapped.
    private static bool CanLink(CpuContext* cpu, Block* from, Block* to, ulong linear)
    {
        ulong start = cpu->BlockRip + CpuContext.Segment(cpu, Seg.Cs)->EffectiveBase;
        return ((start ^ linear) >> 12) == 0 && ((from->Physical ^ to->Physical) >> 12) == 0 &&
            (from->Crosses | to->Crosses) == 0 && from->Generation >= 0 && from->Key == to->Key;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Microsoft.Win32.SafeHandles;
using Vmm.Core;
using Vmm.Host;
using Vmm.Kvm.Abi;

namespace Vmm.Kvm;

// Theory. One vCPU is a descriptor and a page shared with the kernel (kvm_run). Run enters the guest and serves what
// needs no decision (ports, registers in memory, interrupt windows) itself until something does.
//
// Completion of I/O. After a port or MMIO exit the kernel finishes the instruction at the *next* KVM_RUN. So Run never
// returns between the exit and that call: a kick that arrives meanwhile has set immediate_exit, and the next KVM_RUN
// finishes the instruction and comes back with EINTR before any further guest code runs. State read after Run
// returned is therefore always that of an instruction border.
//
// Kick. Under a lock that Run's entry and exit share: set immediate_exit, and, if the thread is inside Run, send it the
// private signal (see KickSignal), which is deliverable only inside KVM_RUN. If the kick comes before KVM_RUN, the flag
// stops it; if it comes during guest execution, the signal does. Run takes both back under the same lock, so one kick
// makes exactly one Run return Interrupted and leaves nothing behind.
//
// Interrupts in User mode. Before each entry: deliver NMI; if the guest can take an interrupt (the kernel says so in
// the run page) acknowledge one at the port and queue it, else ask the kernel to come back when it can. KVM leaves the
// activity state to user space in this mode: HLT is remembered here and waited out by the run loop, which also executes
// INIT and start-up IPIs (they kick, so Run comes back for them).
//
// Threads: Run, ReadState, WriteState and SetCpuid by one thread at a time; Kick by any.

/// <summary>A virtual processor of a KVM virtual machine.</summary>
internal sealed unsafe class KvmVcpu : IVcpu, INmiPin
{
    private const ulong InterruptFlag = 1 << 9;

    private readonly Lock _kickGate = new();
    private readonly SafeFileHandle _file;
    private readonly int _fd;
    private readonly HostMapping _mapping;
    private readonly kvm_run* _run;
    private readonly long _runBytes;
    private readonly AddressMap _ports;
    private readonly AddressMap _mmio;
    private readonly ICpuInterruptPort? _port;
    private readonly Action<byte>? _onIoApicEoi;
    private readonly bool _isUserIrqchip;
    private readonly bool _hasImmediateExit;
    private readonly VcpuStateAccess _access;
    private ActivityState _activity;
    private nint _thread;
    private bool _inRun;
    private bool _kicked;
    private bool _disposed;

    internal KvmVcpu(KvmVm vm, SafeFileHandle file, int index, ICpuInterruptPort? port)
    {
        // The mapping comes last of what can fail: a constructor that throws leaves nobody to take it back.
        int hostPkruOffset = HostPkruOffset(vm.System);
        KvmCapabilities probed = vm.System.Probed;
        IReadOnlyList<uint> savedMsrs = vm.System.SavedMsrs;
        Index = index;
        _file = file;
        _fd = (int)file.DangerousGetHandle();
        _runBytes = vm.System.RunPageBytes;
        _mapping = HostMapping.Map(file, _runBytes);
        _run = (kvm_run*)_mapping.Address;
        _ports = vm.Options.Ports;
        _mmio = vm.Options.Mmio;
        _port = port;
        _onIoApicEoi = vm.Options.OnIoApicEoi;
        _isUserIrqchip = vm.Irqchip == IrqchipMode.User;
        _hasImmediateExit = probed.ImmediateExit;
        _activity = index == 0 || !_isUserIrqchip ? ActivityState.Running : ActivityState.WaitForInit;
        _access = new VcpuStateAccess(file, _run, probed, savedMsrs, _isUserIrqchip, hostPkruOffset);
    }

    private static int HostPkruOffset(KvmSystem system)
    {
        foreach (CpuidEntry entry in system.SupportedCpuid)
        {
            if (entry.Function == 0xD && entry.Index == 9)
            {
                return (int)Math.Min(entry.Ebx, int.MaxValue);
            }
        }

        return 0;
    }

    /// <inheritdoc/>
    public int Index { get; }

    /// <inheritdoc/>
    public void SetCpuid(ReadOnlySpan<CpuidEntry> entries) => _access.SetCpuid(entries);

    /// <inheritdoc/>
    public void ReadState(CpuState state)
    {
        ArgumentNullException.ThrowIfNull(state);
        _access.Read(state);
        if (_isUserIrqchip)
        {
            state.Activity = _activity;
        }

        ReadPort(state);
    }

    /// <inheritdoc/>
    public void WriteState(CpuState state)
    {
        ArgumentNullException.ThrowIfNull(state);
        _access.Write(state);
        if (_isUserIrqchip)
        {
            _activity = state.Activity;
            if (_activity == ActivityState.Halted)
            {
                // The run page speaks of the last exit. A processor that comes halted and has not run here has had none,
                // and without this would look as if nothing could wake it.
                _run->if_flag = (state.Rflags & InterruptFlag) != 0 ? (byte)1 : (byte)0;
            }
        }

        WritePort(state);
    }

    /// <inheritdoc/>
    public void ReadRegisters(CpuState state)
    {
        ArgumentNullException.ThrowIfNull(state);
        _access.ReadRegisters(state);
        ReadPort(state);
    }

    /// <inheritdoc/>
    public void WriteRegisters(CpuState state)
    {
        ArgumentNullException.ThrowIfNull(state);
        _access.WriteRegisters(state);
        WritePort(state);
    }

    /// <inheritdoc/>
    public void PulseNmi()
    {
        // KVM_NMI goes past the local APIC, so what the guest has made of the pin is looked up here.
        const ulong apicEnabled = 1 << 11;
        const uint masked = 1 << 16;
        kvm_sregs sregs;
        kvm_lapic_state apic;
        if (Ioctl.InvokeKvm(_fd, KvmAbi.KVM_GET_SREGS, (nint)(&sregs)) < 0
            || Ioctl.InvokeKvm(_fd, KvmAbi.KVM_GET_LAPIC, (nint)(&apic)) < 0)
        {
            return;
        }

        // SAFETY: the register page has 1024 bytes and lives on this stack.
        uint lint1 = *(uint*)((byte*)&apic + 0x360);
        if ((sregs.apic_base & apicEnabled) == 0 || ((lint1 & masked) == 0 && ((lint1 >> 8) & 7) == 4))
        {
            _ = Ioctl.InvokeKvm(_fd, KvmAbi.KVM_NMI, 0);
        }
    }

    /// <inheritdoc/>
    public void Kick()
    {
        lock (_kickGate)
        {
            if (_kicked || _disposed)
            {
                return;
            }

            _kicked = true;
            _run->immediate_exit = 1;
            if (_inRun)
            {
                KickSignal.Send(_thread);
            }
        }
    }

    /// <inheritdoc/>
    public ExitKind Run(ref VcpuExit exit)
    {
        Enter();
        try
        {
            return Loop(ref exit);
        }
        finally
        {
            Leave();
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        lock (_kickGate)
        {
            if (_disposed)
            {
                return;
            }

            _disposed = true;
        }

        _mapping.Dispose();
        _file.Dispose();
    }

    // In User mode the task priority and the APIC's base are the port's.
    private void ReadPort(CpuState state)
    {
        if (_port is not null)
        {
            state.Cr8 = _port.Cr8;
            state.ApicBase = _port.ApicBase;
        }
    }

    private void WritePort(CpuState state)
    {
        if (_port is not null)
        {
            _port.ApicBase = state.ApicBase;
            _port.Cr8 = (byte)state.Cr8;
        }
    }

    private void Enter()
    {
        nint thread = KickSignal.CurrentThread;
        if (thread != _thread)
        {
            MoveToThread(thread);
        }

        lock (_kickGate)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            _inRun = true;
            if (_kicked && !_hasImmediateExit)
            {
                KickSignal.Send(thread);
            }
        }

        _access.ForgetRunPage();
    }

    private void Leave()
    {
        lock (_kickGate)
        {
            _inRun = false;
        }
    }

    // The first Run, or the first on another thread: block the signal here, let KVM unblock it.
    private void MoveToThread(nint thread)
    {
        KickSignal.BlockOnCurrentThread();
        int bytes = OsAbi.Current.KernelSignalSetBytes;
        byte* request = stackalloc byte[sizeof(kvm_signal_mask) + 64];
        ((kvm_signal_mask*)request)->len = (uint)bytes;
        KickSignal.GetMaskWithoutKick(new Span<byte>(request + sizeof(kvm_signal_mask), 64));
        KvmCall.Require(_file, KvmAbi.KVM_SET_SIGNAL_MASK, (nint)request, "KVM_SET_SIGNAL_MASK");
        _thread = thread;
    }

    // An exit that needs no decision is served here and the guest entered again.
    private ExitKind Loop(ref VcpuExit exit)
    {
        while (true)
        {
            if ((EnterGuest(ref exit) ?? ServeExit(ref exit)) is { } ended)
            {
                return ended;
            }
        }
    }

    // Null: the guest left with an exit that the run page describes.
    private ExitKind? EnterGuest(ref VcpuExit exit)
    {
        kvm_run* run = _run;
        while (true)
        {
            ulong cr8 = 0;
            if (_port is not null)
            {
                if (!PrepareUserIrqchip(_port))
                {
                    exit.InterruptsMasked = run->if_flag == 0;
                    return TakeKick() ? ExitKind.Interrupted : ExitKind.Halted;
                }

                cr8 = run->cr8;
            }

            int result = Ioctl.InvokeKvm(_fd, KvmAbi.KVM_RUN, 0);
            if (_port is not null)
            {
                SynchronizePort(_port, cr8);
            }

            if (result >= 0)
            {
                return null;
            }

            Errno error = Ioctl.LastError;
            if (error is not (Errno.EINTR or Errno.EAGAIN))
            {
                return FailRun(ref exit, error, HostException.Describe(Ioctl.LastRawErrno));
            }

            if (TakeKick())
            {
                return ExitKind.Interrupted;
            }
        }
    }

    // Null: served, and the guest goes on.
    private ExitKind? ServeExit(ref VcpuExit exit)
    {
        kvm_run* run = _run;
        switch (run->exit_reason)
        {
            case KvmAbi.KVM_EXIT_IO:
                return ServePort(run) ? null : Fail(ref exit, 0, "KVM described a port access outside its page");
            case KvmAbi.KVM_EXIT_MMIO:
                ServeMmio(run);
                return null;
            case KvmAbi.KVM_EXIT_IRQ_WINDOW_OPEN:
            case KvmAbi.KVM_EXIT_SET_TPR:
            case KvmAbi.KVM_EXIT_TPR_ACCESS:
                return null;
            case KvmAbi.KVM_EXIT_INTR:
                return TakeKick() ? ExitKind.Interrupted : null;
            case KvmAbi.KVM_EXIT_IOAPIC_EOI:
                _onIoApicEoi?.Invoke(run->eoi.vector);
                return null;
            case KvmAbi.KVM_EXIT_HLT:
                _activity = ActivityState.Halted;
                if (_port is not null)
                {
                    return null;
                }

                exit.InterruptsMasked = run->if_flag == 0;
                return ExitKind.Halted;
            case KvmAbi.KVM_EXIT_HYPERCALL:
                run->hypercall.ret = unchecked((ulong)-1000L);   // -KVM_ENOSYS
                return null;
            case KvmAbi.KVM_EXIT_SHUTDOWN:
            case KvmAbi.KVM_EXIT_SYSTEM_EVENT:
                exit.Code = run->exit_reason;
                return ExitKind.Shutdown;
            case KvmAbi.KVM_EXIT_DEBUG:
                return ExitKind.Debug;
            case KvmAbi.KVM_EXIT_INTERNAL_ERROR when run->@internal.suberror == KvmAbi.KVM_INTERNAL_ERROR_EMULATION:
                _access.UseRunPage();
                ReportEmulation(run, ref exit);
                return ExitKind.NeedsEmulation;
            default:
                return FailExit(run, ref exit);
        }
    }

    // Takes back a kick. True when there was one.
    private bool TakeKick()
    {
        if (!Volatile.Read(ref _kicked))
        {
            return false;
        }

        lock (_kickGate)
        {
            _kicked = false;
            _run->immediate_exit = 0;
            KickSignal.Drain();
        }

        return true;
    }

    // Before an entry in User mode. False: nothing to run until the port wakes.
    private bool PrepareUserIrqchip(ICpuInterruptPort port)
    {
        kvm_run* run = _run;
        if (_activity != ActivityState.Running)
        {
            bool wakes = _activity == ActivityState.Halted
                && (port.HasNmi || (run->if_flag != 0 && port.HasInterrupt));
            if (!wakes)
            {
                return false;
            }

            _activity = ActivityState.Running;
        }

        if (port.HasNmi && port.TakeNmi())
        {
            _ = Ioctl.InvokeKvm(_fd, KvmAbi.KVM_NMI, 0);
        }

        bool pending = port.HasInterrupt;
        if (pending && run->ready_for_interrupt_injection != 0 && run->if_flag != 0)
        {
            int vectorNumber = port.Acknowledge();
            if (vectorNumber >= 0)
            {
                var request = new kvm_interrupt { irq = (uint)vectorNumber };
                _ = Ioctl.InvokeKvm(_fd, KvmAbi.KVM_INTERRUPT, (nint)(&request));
                run->ready_for_interrupt_injection = 0;
            }

            pending = port.HasInterrupt;
        }

        run->request_interrupt_window = pending ? (byte)1 : (byte)0;
        run->cr8 = port.Cr8;
        return true;
    }

    // After an exit in User mode: the guest may have written CR8 or IA32_APIC_BASE without an exit of their own.
    private void SynchronizePort(ICpuInterruptPort port, ulong cr8)
    {
        if (_run->cr8 != cr8)
        {
            port.Cr8 = (byte)_run->cr8;
        }

        if (_run->apic_base != port.ApicBase)
        {
            port.ApicBase = _run->apic_base;
        }
    }

    private bool ServePort(kvm_run* run)
    {
        uint size = run->io.size;
        uint count = run->io.count;
        ulong offset = run->io.data_offset;
        if (size is not (1 or 2 or 4) || offset >= (ulong)_runBytes || count > ((ulong)_runBytes - offset) / size)
        {
            return false;
        }

        // SAFETY: offset + size * count lies within the mapping, as checked.
        byte* data = (byte*)run + offset;
        ushort port = run->io.port;
        var width = (AccessWidth)size;
        bool isOut = run->io.direction == KvmAbi.KVM_EXIT_IO_OUT;
        for (uint i = 0; i < count; i++, data += size)
        {
            if (isOut)
            {
                _ports.Write(port, width, Load(data, size));
            }
            else
            {
                Store(data, size, _ports.Read(port, width));
            }
        }

        return true;
    }

    private void ServeMmio(kvm_run* run)
    {
        ulong address = run->mmio.phys_addr;
        uint left = Math.Min(run->mmio.len, 8);
        bool isWrite = run->mmio.is_write != 0;
        byte* data = run->mmio.data;

        // Fragments of an access that crosses a page may have odd lengths; they go in pieces that devices know.
        while (left != 0)
        {
            uint size = left >= 8 ? 8u : left >= 4 ? 4u : left >= 2 ? 2u : 1u;
            if (_port is not null && IsLocalApic(_port, address, size))
            {
                uint offset = (uint)(address & 0xFFF);
                if (isWrite)
                {
                    _port.Registers.Write(offset, (AccessWidth)size, Load(data, size));
                }
                else
                {
                    Store(data, size, _port.Registers.Read(offset, (AccessWidth)size));
                }
            }
            else if (isWrite)
            {
                _mmio.Write(address, (AccessWidth)size, Load(data, size));
            }
            else
            {
                Store(data, size, _mmio.Read(address, (AccessWidth)size));
            }

            address += size;
            data += size;
            left -= size;
        }
    }

    private static bool IsLocalApic(ICpuInterruptPort port, ulong address, uint size)
    {
        const ulong PageMask = 0xFFF;
        return port.IsMemoryMapped && ((address ^ port.ApicBase) & ~PageMask) == 0
            && (address & PageMask) + size <= 0x1000;
    }

    private static void ReportEmulation(kvm_run* run, ref VcpuExit exit)
    {
        exit.Code = KvmAbi.KVM_INTERNAL_ERROR_EMULATION;
        exit.InstructionLow = 0;
        exit.InstructionHigh = 0;
        exit.InstructionLength = 0;
        const ulong HasBytes = KvmAbi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES;

        // ndata counts 64-bit words: the flags, then two that hold the length and 15 bytes.
        if (run->emulation_failure.ndata < 3 || (run->emulation_failure.flags & HasBytes) == 0)
        {
            return;
        }

        int length = Math.Min((int)run->emulation_failure.insn_size, 15);
        byte* bytes = run->emulation_failure.insn_bytes;
        for (int i = 0; i < length; i++)
        {
            if (i < 8)
            {
                exit.InstructionLow |= (ulong)bytes[i] << (8 * i);
            }
            else
            {
                exit.InstructionHigh |= (ulong)bytes[i] << (8 * (i - 8));
            }
        }

        exit.InstructionLength = length;
    }

    private static string DescribeInternalError(kvm_run* run)
    {
        string what = run->@internal.suberror switch
        {
            KvmAbi.KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions at once",
            KvmAbi.KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was being delivered",
            KvmAbi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit that KVM does not know",
            uint other => $"internal error {other}",
        };
        uint count = Math.Min(run->@internal.ndata, 16);
        for (uint i = 0; i < count; i++)
        {
            what += $" {run->@internal.data[i]:x}";
        }

        return what;
    }

    // What the kernel or the processor could not do, in words.
    private static ExitKind FailExit(kvm_run* run, ref VcpuExit exit) => run->exit_reason switch
    {
        KvmAbi.KVM_EXIT_INTERNAL_ERROR => Fail(ref exit, run->@internal.suberror, DescribeInternalError(run)),
        KvmAbi.KVM_EXIT_FAIL_ENTRY => Fail(
            ref exit,
            run->fail_entry.hardware_entry_failure_reason,
            $"the processor refused to enter the guest, reason {run->fail_entry.hardware_entry_failure_reason:x}"),
        KvmAbi.KVM_EXIT_UNKNOWN => Fail(
            ref exit, run->hw.hardware_exit_reason, $"unknown hardware exit {run->hw.hardware_exit_reason:x}"),
        uint other => Fail(ref exit, other, $"exit reason {other} is not known here"),
    };

    private static ExitKind FailRun(ref VcpuExit exit, Errno error, string detail) =>
        Fail(
            ref exit,
            (ulong)error,
            error == Errno.EFAULT
                ? "the guest touched memory that the host could not provide"
                : $"KVM_RUN: {detail}");

    private static ExitKind Fail(ref VcpuExit exit, ulong code, string detail)
    {
        exit.Code = code;
        exit.Detail = "kvm: " + detail;
        return ExitKind.Failed;
    }

    // SAFETY (both): callers pass addresses with `size` bytes left in the run page.
    private static ulong Load(byte* data, uint size) => size switch
    {
        1 => *data,
        2 => *(ushort*)data,
        4 => *(uint*)data,
        _ => *(ulong*)data,
    };

    private static void Store(byte* data, uint size, ulong value)
    {
        switch (size)
        {
            case 1:
                *data = (byte)value;
                break;
            case 2:
                *(ushort*)data = (ushort)value;
                break;
            case 4:
                *(uint*)data = (uint)value;
                break;
            default:
                *(ulong*)data = value;
                break;
        }
    }
}

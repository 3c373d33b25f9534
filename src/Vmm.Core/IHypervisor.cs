// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;

namespace Vmm.Core;

// Theory. This file is the first narrow waist: what a driver of virtual processors is. Two assemblies implement it:
// Vmm.Kvm (a kernel's /dev/kvm) and Vmm.X86 (our own processor). Nothing above asks which one it has, or on which OS.
//
// Port and memory-mapped I/O do not come back through IVcpu.Run: a driver calls the machine's address maps itself, on
// the vCPU's thread, in the middle of the instruction (see adr/0001). What comes back is what the run loop has to
// decide on: halts, resets, kicks, instructions that the driver cannot execute, and failures.
//
// Interrupts. With IrqchipMode.User (and always for the software CPU) each vCPU has an ICpuInterruptPort: its local
// APIC (plus the 8259 pair behind LINT0 on the boot processor). The driver asks it for vectors and forwards APIC
// register, CR8 and MSR accesses to it. With Split or Kernel the driver's kernel side owns the local APICs, the port is
// null, and interrupts enter through IVm.SendMsi (Split and Kernel) and IVm.SetIrqLine (Kernel).
//
// Threads. IHypervisor and IVm: any thread. IVcpu.Run and the state calls: one thread at a time, normally the vCPU's
// own; IVcpu.Kick: any thread. State is read and written only while Run is not executing.

/// <summary>Which half of the interrupt controllers lives in the driver.</summary>
public enum IrqchipMode
{
    /// <summary>All controllers are models of Vmm.Devices.</summary>
    User,

    /// <summary>Local APICs in the driver, I/O APIC and 8259s are models.</summary>
    Split,

    /// <summary>Local APICs, I/O APIC and 8259s in the driver.</summary>
    Kernel,
}

/// <summary>What a driver can do; decided once by probing.</summary>
public sealed record HypervisorCapabilities
{
    /// <summary>Most vCPUs in one VM.</summary>
    public required int MaxVcpus { get; init; }

    /// <summary>Most memory slots; the machine needs at most 32.</summary>
    public required int MaxMemorySlots { get; init; }

    /// <summary>Controllers in the driver that are supported; User always is.</summary>
    public required IReadOnlyList<IrqchipMode> IrqchipModes { get; init; }

    /// <summary>True when memory slots can be read-only (ROM whose writes become MMIO).</summary>
    public bool ReadOnlyMemory { get; init; }

    /// <summary>True when guest code, ring 0 included, runs on the processor or a fast equivalent.</summary>
    public bool FastKernelCode { get; init; } = true;

    /// <summary>
    /// In User mode a guest's accesses to the x2APIC MSRs and to IA32_TSC_DEADLINE reach its <see cref="ICpuInterruptPort"/>.
    /// </summary>
    public bool UserApicMsrs { get; init; }

    /// <summary><see cref="IVm.TryAddDoorbell"/> works.</summary>
    public bool Doorbells { get; init; }

    /// <summary>Frequency of the guest's time stamp counter in kHz.</summary>
    public required long TscKhz { get; init; }
}

/// <summary>Thrown for host-side failures while making or changing a VM; never because of what a guest does.</summary>
public sealed class HypervisorException : Exception
{
    /// <summary>Makes one with a one-line message that says what failed and what to do.</summary>
    public HypervisorException(string message)
        : base(message)
    {
    }

    /// <summary>Makes one with its cause.</summary>
    public HypervisorException(string message, Exception inner)
        : base(message, inner)
    {
    }
}

/// <summary>A driver of virtual processors.</summary>
public interface IHypervisor : IDisposable
{
    /// <summary>As in YAML's <c>accel:</c>: "kvm" or "soft".</summary>
    string Name { get; }

    /// <summary>What it can do.</summary>
    HypervisorCapabilities Capabilities { get; }

    /// <summary>CPUID leaves with every feature that the driver can give a guest.</summary>
    IReadOnlyList<CpuidEntry> SupportedCpuid { get; }

    /// <summary>MSRs that belong to saved state beyond those that have a field in <see cref="CpuState"/>.</summary>
    IReadOnlyList<uint> SavedMsrs { get; }

    /// <summary>Makes an empty VM.</summary>
    /// <exception cref="HypervisorException">The host refused; the message says why.</exception>
    IVm CreateVm(VmOptions options);
}

/// <summary>What a VM needs from the machine around it.</summary>
public sealed record VmOptions
{
    /// <summary>I/O ports.</summary>
    public required AddressMap Ports { get; init; }

    /// <summary>Guest-physical space that is not RAM.</summary>
    public required AddressMap Mmio { get; init; }

    /// <summary>Guest time.</summary>
    public required IClock Clock { get; init; }

    /// <summary>Where the interrupt controllers live.</summary>
    public IrqchipMode Irqchip { get; init; } = IrqchipMode.User;

    /// <summary>Split mode: called on a vCPU thread when a guest ends a level-triggered interrupt (vector).</summary>
    public Action<byte>? OnIoApicEoi { get; init; }

    /// <summary>
    /// FERR# of the processor: an x87 exception is pending while CR0.NE is clear. A PC chip set raises IRQ 13. Called on a
    /// vCPU's thread, repeatedly while the condition lasts; null when nobody listens. Software CPU only.
    /// </summary>
    public Action? OnNumericError { get; init; }

    /// <summary>vCPUs that will be made, if that is known: a driver divides what it has for them.</summary>
    public int? VcpuCount { get; init; }

    /// <summary>Number of I/O APIC pins to reserve routes for.</summary>
    public int IoApicPins { get; init; } = 24;
}

/// <summary>A piece of RAM or ROM in guest-physical space, as a driver maps it.</summary>
/// <param name="GuestAddress">First guest-physical address, a multiple of 4096.</param>
/// <param name="LengthBytes">Length, a multiple of 4096; 0 removes the slot.</param>
/// <param name="HostAddress">Where it lies in this process.</param>
/// <param name="ReadOnly">Guest writes go to the MMIO map instead.</param>
/// <param name="LogDirty">Guest writes are recorded for <see cref="IVm.ReadDirtyLog"/>.</param>
/// <param name="PageFlags">Address of one byte per 4 KiB page of this piece (see Vmm.Memory.PageFlags), 0 for none.</param>
public readonly record struct MemorySlot(
    ulong GuestAddress, ulong LengthBytes, nint HostAddress, bool ReadOnly, bool LogDirty, nint PageFlags);

/// <summary>Where a kernel-side GSI leads (KVM_SET_GSI_ROUTING).</summary>
/// <param name="Gsi">Global system interrupt number.</param>
/// <param name="MsiAddress">Message address.</param>
/// <param name="MsiData">Message data.</param>
public readonly record struct MsiRoute(uint Gsi, ulong MsiAddress, uint MsiData);

/// <summary>One virtual machine of a driver.</summary>
public interface IVm : IDisposable
{
    /// <summary>Where the interrupt controllers live.</summary>
    IrqchipMode Irqchip { get; }

    /// <summary>Sets, moves or removes a memory slot. vCPUs may be running.</summary>
    /// <exception cref="HypervisorException">The host refused.</exception>
    void SetMemorySlot(int slot, in MemorySlot memory);

    /// <summary>Gets and clears which pages a guest has written: bit n of the bitmap is page n of the slot.</summary>
    /// <returns>False when the slot does not log.</returns>
    bool ReadDirtyLog(int slot, Span<ulong> bitmap);

    /// <summary>Makes a vCPU. It starts with the power-on state (SDM 3A 10.1.1).</summary>
    /// <param name="index">0-based; also the local APIC identifier. 0 is the boot processor.</param>
    /// <param name="interrupts">Its interrupt port with <see cref="IrqchipMode.User"/>, otherwise null.</param>
    IVcpu CreateVcpu(int index, ICpuInterruptPort? interrupts);

    /// <summary>Drives a GSI of the driver's own controllers (Kernel). No effect in other modes.</summary>
    void SetIrqLine(uint gsi, bool asserted);

    /// <summary>Sends a message to the driver's local APICs (Split, Kernel). No effect in User mode.</summary>
    void SendMsi(ulong address, uint data);

    /// <summary>
    /// The A20 gate: while it is closed, address line 20 is 0 in all that the processors put on the bus (AT Technical
    /// Reference, "Keyboard controller, output port"). Any thread, vCPUs in a device too; open from the start. Drivers whose
    /// guests run behind the processor's own paging cannot mask a line and leave it open.
    /// </summary>
    void SetA20(bool isOpen);

    /// <summary>
    /// Registers an address whose writes signal <paramref name="eventFd"/> instead of reaching the address map.
    /// </summary>
    /// <returns>False when the driver has no such thing; the address map then gets the writes.</returns>
    bool TryAddDoorbell(ulong address, bool isPort, AccessWidth width, ulong? dataMatch, int eventFd);

    /// <summary>Removes what <see cref="TryAddDoorbell"/> added.</summary>
    void RemoveDoorbell(ulong address, bool isPort, AccessWidth width, ulong? dataMatch, int eventFd);

    /// <summary>Writes the state of controllers that live in the driver; nothing in User mode.</summary>
    void SaveIrqchip(StateWriter writer);

    /// <summary>Restores what <see cref="SaveIrqchip"/> wrote.</summary>
    void LoadIrqchip(StateReader reader);
}

/// <summary>Why <see cref="IVcpu.Run"/> came back.</summary>
public enum ExitKind
{
    /// <summary>A kick, a signal, or simply a moment to look around. Run again.</summary>
    Interrupted,

    /// <summary>HLT with nothing pending (User mode only). Sleep until the interrupt port wakes, then run again.</summary>
    Halted,

    /// <summary>Triple fault, or another shutdown condition of the processor.</summary>
    Shutdown,

    /// <summary>The driver met an instruction that it cannot execute; RIP points at it, see <see cref="VcpuExit"/>.</summary>
    NeedsEmulation,

    /// <summary>A breakpoint or single step asked for by a debugger.</summary>
    Debug,

    /// <summary>The driver failed; <see cref="VcpuExit.Detail"/> says how. The VM cannot go on.</summary>
    Failed,
}

/// <summary>Details of an exit; reused by the run loop so that exits allocate nothing.</summary>
public struct VcpuExit
{
    /// <summary>Driver-specific code (KVM's suberror or hardware entry failure reason).</summary>
    public ulong Code;

    /// <summary>For <see cref="ExitKind.NeedsEmulation"/>: bytes at RIP when the driver gave them (low 8).</summary>
    public ulong InstructionLow;

    /// <summary>The next 7 bytes.</summary>
    public ulong InstructionHigh;

    /// <summary>How many of these bytes are valid; 0 means fetch them from guest memory.</summary>
    public int InstructionLength;

    /// <summary>
    /// For <see cref="ExitKind.Halted"/>: maskable interrupts are off, so that only NMI or INIT can end the halt. Set by the
    /// driver on every such exit.
    /// </summary>
    public bool InterruptsMasked;

    /// <summary>For <see cref="ExitKind.Failed"/>: one line for people.</summary>
    public string? Detail;
}

/// <summary>One virtual processor.</summary>
public interface IVcpu : IDisposable
{
    /// <summary>0-based; also the local APIC identifier.</summary>
    int Index { get; }

    /// <summary>
    /// Runs guest code until something needs the run loop. Never throws on anything that a guest can cause.
    /// </summary>
    ExitKind Run(ref VcpuExit exit);

    /// <summary>Any thread: the current or else the next <see cref="Run"/> returns <see cref="ExitKind.Interrupted"/>.</summary>
    void Kick();

    /// <summary>Sets what CPUID shows. Before the first <see cref="Run"/>.</summary>
    void SetCpuid(ReadOnlySpan<CpuidEntry> entries);

    /// <summary>Copies the architectural state out.</summary>
    void ReadState(CpuState state);

    /// <summary>Replaces the architectural state.</summary>
    void WriteState(CpuState state);

    /// <summary>
    /// Copies out what the execution of an instruction can touch: general and control registers, EFER, RIP, flags,
    /// segments, tables, pending event, shadows, XSAVE area and XCR0. Debug registers, MSRs, activity and a local APIC in
    /// the driver keep what <paramref name="state"/> had: writing those back would undo what happened meanwhile (time, an
    /// interrupt that arrived).
    /// </summary>
    void ReadRegisters(CpuState state) => ReadState(state);

    /// <summary>Replaces what <see cref="ReadRegisters"/> reads and nothing else.</summary>
    void WriteRegisters(CpuState state) => WriteState(state);
}

/// <summary>A vCPU whose local APIC the driver has: modes Split and Kernel. (In User mode the pin is the model's.)</summary>
public interface INmiPin
{
    /// <summary>
    /// Raises LINT1 of the local APIC for a moment (SDM 3A 11.5.1): an NMI, unless the guest has masked the pin or uses it for
    /// something else. On the thread that runs the vCPU, outside <see cref="IVcpu.Run"/>; never throws.
    /// </summary>
    void PulseNmi();
}

/// <summary>One CPUID leaf.</summary>
/// <param name="Function">EAX input.</param>
/// <param name="Index">ECX input, meaningful when <paramref name="HasIndex"/>.</param>
/// <param name="HasIndex">The leaf depends on ECX.</param>
/// <param name="Eax">Output.</param>
/// <param name="Ebx">Output.</param>
/// <param name="Ecx">Output.</param>
/// <param name="Edx">Output.</param>
public readonly record struct CpuidEntry(
    uint Function, uint Index, bool HasIndex, uint Eax, uint Ebx, uint Ecx, uint Edx);

/// <summary>Told when something became pending for a vCPU: sets its request flag, kicks it, wakes its halt.</summary>
public interface ICpuWaker
{
    /// <summary>Any thread, also under a device's lock; must not call back.</summary>
    void Wake();
}

/// <summary>
/// A vCPU's view of its interrupt controllers: local APIC, and the 8259 pair where LINT0 is ExtINT. Implemented by
/// Vmm.Devices. The "has" properties are cheap enough to poll between instructions.
/// </summary>
public interface ICpuInterruptPort
{
    /// <summary>A maskable interrupt could be delivered now (priority above TPR and ISR).</summary>
    bool HasInterrupt { get; }

    /// <summary>An NMI is waiting.</summary>
    bool HasNmi { get; }

    /// <summary>An INIT is waiting.</summary>
    bool HasInit { get; }

    /// <summary>A start-up IPI is waiting.</summary>
    bool HasStartup { get; }

    /// <summary>Interrupt acknowledge: moves the vector into service.</summary>
    /// <returns>The vector, or -1 when nothing is deliverable any more.</returns>
    int Acknowledge();

    /// <summary>Takes a waiting NMI.</summary>
    bool TakeNmi();

    /// <summary>Takes a waiting INIT.</summary>
    bool TakeInit();

    /// <summary>Takes a waiting start-up IPI; it starts at <c>vector &lt;&lt; 12</c>.</summary>
    bool TakeStartup(out byte vector);

    /// <summary>Task priority as CR8 shows it (TPR bits 7:4). SDM 3A 11.8.6.</summary>
    byte Cr8 { get; set; }

    /// <summary>IA32_APIC_BASE. Writes that reserve bits forbid are refused by <see cref="TryWriteMsr"/>.</summary>
    ulong ApicBase { get; set; }

    /// <summary>True while the APIC's registers are at <see cref="ApicBase"/> (enabled and not in x2APIC mode).</summary>
    bool IsMemoryMapped { get; }

    /// <summary>The 4 KiB register page; the driver maps it at <see cref="ApicBase"/> for this vCPU alone.</summary>
    IRegisterWindow Registers { get; }

    /// <summary>IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC range. False means #GP(0).</summary>
    bool TryReadMsr(uint msr, out ulong value);

    /// <summary>See <see cref="TryReadMsr"/>.</summary>
    bool TryWriteMsr(uint msr, ulong value);

    /// <summary>
    /// IA32_TSC is guest time at the stated frequency plus this, modulo 2^64; 0 at first. The driver tells each change, from
    /// the vCPU's thread or while it rests: the guest wrote IA32_TSC or IA32_TSC_ADJUST, or a state was loaded. A TSC
    /// deadline moves in guest time with it (SDM 3A 11.5.4.1).
    /// </summary>
    void SetTscOffset(ulong ticks);

    /// <summary>Says whom to wake; called once by the run loop before anything can become pending.</summary>
    void Attach(ICpuWaker waker);
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;

namespace Vmm.Core;

/// <summary>A segment register with its hidden part (SDM 3A 3.4.3).</summary>
public struct SegmentState : IEquatable<SegmentState>
{
    /// <summary>Visible selector.</summary>
    public ushort Selector;

    /// <summary>Base linear address.</summary>
    public ulong Base;

    /// <summary>Limit in bytes, granularity applied.</summary>
    public uint Limit;

    /// <summary>
    /// Access rights as in a descriptor's bits 55:40 with the limit bits removed: type 3:0, S 4, DPL 6:5, P 7,
    /// AVL 12, L 13, D/B 14, G 15 (the VMX layout, SDM 3C 25.4.1); bit 16 says unusable.
    /// </summary>
    public uint Rights;

    /// <inheritdoc/>
    public readonly bool Equals(SegmentState other) =>
        Selector == other.Selector && Base == other.Base && Limit == other.Limit && Rights == other.Rights;

    /// <inheritdoc/>
    public override readonly bool Equals(object? obj) => obj is SegmentState other && Equals(other);

    /// <inheritdoc/>
    public override readonly int GetHashCode() => HashCode.Combine(Selector, Base, Limit, Rights);

    /// <summary>Equality of all fields.</summary>
    public static bool operator ==(SegmentState left, SegmentState right) => left.Equals(right);

    /// <summary>Inequality.</summary>
    public static bool operator !=(SegmentState left, SegmentState right) => !left.Equals(right);
}

/// <summary>Run state of a processor (KVM_MP_STATE_*).</summary>
public enum ActivityState
{
    /// <summary>Executing.</summary>
    Running = 0,

    /// <summary>An application processor after reset: waits for INIT and SIPI.</summary>
    WaitForInit = 1,

    /// <summary>Got INIT, waits for SIPI.</summary>
    WaitForStartup = 2,

    /// <summary>In HLT.</summary>
    Halted = 3,
}

/// <summary>
/// The architectural state of one processor, in no driver's layout: what a snapshot holds and what moves between
/// drivers. Allocate once and reuse; the arrays keep their identity.
/// </summary>
public sealed class CpuState
{
    /// <summary>Bytes of a standard-format XSAVE area up to AVX-512 and PKRU (SDM 1 13.4): KVM_GET_XSAVE's size.</summary>
    public const int XsaveAreaBytes = 4096;

    /// <summary>
    /// Offset of PKRU in <see cref="Xsave"/>, whatever the host's is: the place of processors with MPX and AVX-512
    /// (SDM 1 13.4.3; CPUID leaf 0DH subleaf 9 tells).
    /// </summary>
    public const int PkruOffset = 2688;

    /// <summary>RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: the encoding's order.</summary>
    public ulong[] Gpr { get; } = new ulong[16];

    /// <summary>Instruction pointer (not CS-relative linear: the register).</summary>
    public ulong Rip { get; set; }

    /// <summary>RFLAGS.</summary>
    public ulong Rflags { get; set; } = 2;

    /// <summary>ES, CS, SS, DS, FS, GS: the encoding's order.</summary>
    public SegmentState[] Segments { get; } = new SegmentState[6];

    /// <summary>Local descriptor table register.</summary>
    public SegmentState Ldtr { get; set; }

    /// <summary>Task register.</summary>
    public SegmentState Tr { get; set; }

    /// <summary>GDTR base.</summary>
    public ulong GdtBase { get; set; }

    /// <summary>GDTR limit.</summary>
    public ushort GdtLimit { get; set; }

    /// <summary>IDTR base.</summary>
    public ulong IdtBase { get; set; }

    /// <summary>IDTR limit.</summary>
    public ushort IdtLimit { get; set; }

    /// <summary>CR0.</summary>
    public ulong Cr0 { get; set; }

    /// <summary>CR2.</summary>
    public ulong Cr2 { get; set; }

    /// <summary>CR3.</summary>
    public ulong Cr3 { get; set; }

    /// <summary>CR4.</summary>
    public ulong Cr4 { get; set; }

    /// <summary>CR8 (task priority, 0 to 15).</summary>
    public ulong Cr8 { get; set; }

    /// <summary>IA32_EFER.</summary>
    public ulong Efer { get; set; }

    /// <summary>IA32_APIC_BASE.</summary>
    public ulong ApicBase { get; set; }

    /// <summary>XCR0.</summary>
    public ulong Xcr0 { get; set; } = 1;

    /// <summary>DR0 to DR3, then DR6 and DR7 at 4 and 5.</summary>
    public ulong[] Debug { get; } = [0, 0, 0, 0, 0xFFFF0FF0, 0x400];

    /// <summary>Standard-format XSAVE area: legacy region, header, components at their standard offsets.</summary>
    public byte[] Xsave { get; } = new byte[XsaveAreaBytes];

    /// <summary>MSRs without a field above, by index: STAR, LSTAR, SYSENTER_*, PAT, TSC, TSC_AUX, MTRRs, ...</summary>
    public SortedList<uint, ulong> Msrs { get; } = [];

    /// <summary>Running, halted or waiting to be started.</summary>
    public ActivityState Activity { get; set; }

    /// <summary>An exception or interrupt is being delivered and must be re-injected.</summary>
    public bool EventPending { get; set; }

    /// <summary>Its vector.</summary>
    public byte EventVector { get; set; }

    /// <summary>Its kind: 0 external interrupt, 2 NMI, 3 exception, 4 software interrupt (SDM 3C 25.8.3).</summary>
    public byte EventType { get; set; }

    /// <summary>It pushes an error code.</summary>
    public bool EventHasErrorCode { get; set; }

    /// <summary>The error code.</summary>
    public uint EventErrorCode { get; set; }

    /// <summary>STI shadow: interrupts are held for one instruction.</summary>
    public bool StiShadow { get; set; }

    /// <summary>MOV SS shadow: interrupts, NMIs and debug traps are held for one instruction.</summary>
    public bool MovSsShadow { get; set; }

    /// <summary>NMIs are blocked until IRET.</summary>
    public bool NmiBlocked { get; set; }

    /// <summary>An NMI waits (User irqchip: inside the driver, already taken from the port).</summary>
    public bool NmiPending { get; set; }

    /// <summary>The local APIC's register page as KVM_GET_LAPIC lays it out, when the driver owns the APIC.</summary>
    public byte[]? LocalApic { get; set; }

    /// <summary>Writes everything under the writer's current section.</summary>
    public void Save(StateWriter writer)
    {
        for (int i = 0; i < 16; i++)
        {
            writer.Write($"gpr{i}", Gpr[i]);
        }

        writer.Write("rip", Rip);
        writer.Write("rflags", Rflags);
        for (int i = 0; i < 6; i++)
        {
            SaveSegment(writer, $"seg{i}", Segments[i]);
        }

        SaveSegment(writer, "ldtr", Ldtr);
        SaveSegment(writer, "tr", Tr);
        writer.Write("gdt.base", GdtBase);
        writer.Write("gdt.limit", GdtLimit);
        writer.Write("idt.base", IdtBase);
        writer.Write("idt.limit", IdtLimit);
        writer.Write("cr0", Cr0);
        writer.Write("cr2", Cr2);
        writer.Write("cr3", Cr3);
        writer.Write("cr4", Cr4);
        writer.Write("cr8", Cr8);
        writer.Write("efer", Efer);
        writer.Write("apicbase", ApicBase);
        writer.Write("xcr0", Xcr0);
        for (int i = 0; i < 6; i++)
        {
            writer.Write($"debug{i}", Debug[i]);
        }

        writer.WriteBytes("xsave", Xsave);
        var msrs = new byte[Msrs.Count * 12];
        int at = 0;
        foreach ((uint index, ulong value) in Msrs)
        {
            System.Buffers.Binary.BinaryPrimitives.WriteUInt32LittleEndian(msrs.AsSpan(at), index);
            System.Buffers.Binary.BinaryPrimitives.WriteUInt64LittleEndian(msrs.AsSpan(at + 4), value);
            at += 12;
        }

        writer.WriteBytes("msrs", msrs);
        writer.Write("activity", (ulong)Activity);
        writer.Write("event.pending", EventPending);
        writer.Write("event.vector", EventVector);
        writer.Write("event.type", EventType);
        writer.Write("event.haserror", EventHasErrorCode);
        writer.Write("event.error", EventErrorCode);
        writer.Write("shadow.sti", StiShadow);
        writer.Write("shadow.movss", MovSsShadow);
        writer.Write("nmi.blocked", NmiBlocked);
        writer.Write("nmi.pending", NmiPending);
        if (LocalApic is not null)
        {
            writer.WriteBytes("lapic", LocalApic);
        }
    }

    /// <summary>Reads what <see cref="Save"/> wrote.</summary>
    /// <exception cref="StateException">A field is missing or malformed.</exception>
    public void Load(StateReader reader)
    {
        for (int i = 0; i < 16; i++)
        {
            Gpr[i] = reader.ReadUInt64($"gpr{i}");
        }

        Rip = reader.ReadUInt64("rip");
        Rflags = reader.ReadUInt64("rflags");
        for (int i = 0; i < 6; i++)
        {
            Segments[i] = LoadSegment(reader, $"seg{i}");
        }

        Ldtr = LoadSegment(reader, "ldtr");
        Tr = LoadSegment(reader, "tr");
        GdtBase = reader.ReadUInt64("gdt.base");
        GdtLimit = (ushort)reader.ReadUInt64("gdt.limit");
        IdtBase = reader.ReadUInt64("idt.base");
        IdtLimit = (ushort)reader.ReadUInt64("idt.limit");
        Cr0 = reader.ReadUInt64("cr0");
        Cr2 = reader.ReadUInt64("cr2");
        Cr3 = reader.ReadUInt64("cr3");
        Cr4 = reader.ReadUInt64("cr4");
        Cr8 = reader.ReadUInt64("cr8");
        Efer = reader.ReadUInt64("efer");
        ApicBase = reader.ReadUInt64("apicbase");
        Xcr0 = reader.ReadUInt64("xcr0");
        for (int i = 0; i < 6; i++)
        {
            Debug[i] = reader.ReadUInt64($"debug{i}");
        }

        ReadOnlySpan<byte> xsave = reader.ReadBytes("xsave");
        if (xsave.Length != XsaveAreaBytes)
        {
            throw new StateException($"cpu state: xsave area has {xsave.Length} bytes, expected {XsaveAreaBytes}");
        }

        xsave.CopyTo(Xsave);
        Msrs.Clear();
        ReadOnlySpan<byte> msrs = reader.ReadBytes("msrs");
        for (int at = 0; at + 12 <= msrs.Length; at += 12)
        {
            uint index = System.Buffers.Binary.BinaryPrimitives.ReadUInt32LittleEndian(msrs[at..]);
            Msrs[index] = System.Buffers.Binary.BinaryPrimitives.ReadUInt64LittleEndian(msrs[(at + 4)..]);
        }

        Activity = (ActivityState)reader.ReadUInt64("activity");
        EventPending = reader.ReadBoolean("event.pending");
        EventVector = (byte)reader.ReadUInt64("event.vector");
        EventType = (byte)reader.ReadUInt64("event.type");
        EventHasErrorCode = reader.ReadBoolean("event.haserror");
        EventErrorCode = (uint)reader.ReadUInt64("event.error");
        StiShadow = reader.ReadBoolean("shadow.sti");
        MovSsShadow = reader.ReadBoolean("shadow.movss");
        NmiBlocked = reader.ReadBoolean("nmi.blocked");
        NmiPending = reader.ReadBoolean("nmi.pending");
        LocalApic = reader.Has("lapic") ? reader.ReadBytes("lapic").ToArray() : null;
    }

    /// <summary>
    /// The state after power-on or INIT (SDM 3A table 10-1). XSAVE area and MSRs are left alone on INIT.
    /// </summary>
    /// <param name="isInit">True for INIT: caches, FPU and MSRs keep their values.</param>
    /// <param name="familyModelStepping">What EDX holds: CPUID leaf 1's EAX.</param>
    public void Reset(bool isInit, uint familyModelStepping)
    {
        Array.Clear(Gpr);
        Gpr[2] = familyModelStepping;
        Rip = 0xFFF0;
        Rflags = 2;
        for (int i = 0; i < 6; i++)
        {
            Segments[i] = new SegmentState { Selector = 0, Base = 0, Limit = 0xFFFF, Rights = 0x93 };
        }

        Segments[1] = new SegmentState { Selector = 0xF000, Base = 0xFFFF0000, Limit = 0xFFFF, Rights = 0x9B };
        Ldtr = new SegmentState { Limit = 0xFFFF, Rights = 0x82 };
        Tr = new SegmentState { Limit = 0xFFFF, Rights = 0x8B };
        GdtBase = 0;
        GdtLimit = 0xFFFF;
        IdtBase = 0;
        IdtLimit = 0xFFFF;
        Cr0 = isInit ? (Cr0 & 0x60000000) | 0x10 : 0x60000010;
        Cr2 = 0;
        Cr3 = 0;
        Cr4 = 0;
        Efer = 0;
        Cr8 = 0;
        Array.Clear(Debug);
        Debug[4] = 0xFFFF0FF0;
        Debug[5] = 0x400;
        EventPending = false;
        StiShadow = false;
        MovSsShadow = false;
        NmiBlocked = false;
        NmiPending = false;
        Activity = ActivityState.Running;
        if (!isInit)
        {
            Xcr0 = 1;
            Array.Clear(Xsave);
            Xsave[0] = 0x7F;        // FCW = 0x037F: FINIT's value, which software cannot tell from reset's 0x0040
            Xsave[1] = 0x03;
            Xsave[24] = 0x80;       // MXCSR = 0x1F80
            Xsave[25] = 0x1F;
            Xsave[512] = 0x03;      // XSTATE_BV: x87 and SSE present
            Msrs.Clear();
            Msrs[0x277] = 0x0007040600070406;   // IA32_PAT
        }
    }

    private static void SaveSegment(StateWriter writer, string name, in SegmentState segment)
    {
        writer.Write(name + ".selector", segment.Selector);
        writer.Write(name + ".base", segment.Base);
        writer.Write(name + ".limit", segment.Limit);
        writer.Write(name + ".rights", segment.Rights);
    }

    private static SegmentState LoadSegment(StateReader reader, string name) => new()
    {
        Selector = (ushort)reader.ReadUInt64(name + ".selector"),
        Base = reader.ReadUInt64(name + ".base"),
        Limit = (uint)reader.ReadUInt64(name + ".limit"),
        Rights = (uint)reader.ReadUInt64(name + ".rights"),
    };
}

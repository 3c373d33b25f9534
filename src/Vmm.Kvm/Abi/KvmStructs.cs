// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.InteropServices;

namespace Vmm.Kvm.Abi;

#pragma warning disable IDE1006 // KVM's own names
#pragma warning disable CS0649  // filled by the kernel

internal struct kvm_regs
{
    internal ulong rax, rbx, rcx, rdx;
    internal ulong rsi, rdi, rsp, rbp;
    internal ulong r8, r9, r10, r11;
    internal ulong r12, r13, r14, r15;
    internal ulong rip, rflags;
}

internal struct kvm_segment
{
    internal ulong @base;
    internal uint limit;
    internal ushort selector;
    internal byte type;
    internal byte present, dpl, db, s, l, g, avl;
    internal byte unusable;
    internal byte padding;
}

internal unsafe struct kvm_dtable
{
    internal ulong @base;
    internal ushort limit;
    internal fixed ushort padding[3];
}

internal unsafe struct kvm_sregs
{
    internal kvm_segment cs, ds, es, fs, gs, ss;
    internal kvm_segment tr, ldt;
    internal kvm_dtable gdt, idt;
    internal ulong cr0, cr2, cr3, cr4, cr8;
    internal ulong efer;
    internal ulong apic_base;
    internal fixed ulong interrupt_bitmap[4];
}

internal unsafe struct kvm_fpu
{
    internal fixed byte fpr[128];
    internal ushort fcw;
    internal ushort fsw;
    internal byte ftwx;
    internal byte pad1;
    internal ushort last_opcode;
    internal ulong last_ip;
    internal ulong last_dp;
    internal fixed byte xmm[256];
    internal uint mxcsr;
    internal uint pad2;
}

internal struct kvm_vcpu_events_exception
{
    internal byte injected;
    internal byte nr;
    internal byte has_error_code;
    internal byte pending;
    internal uint error_code;
}

internal struct kvm_vcpu_events_interrupt
{
    internal byte injected;
    internal byte nr;
    internal byte soft;
    internal byte shadow;
}

internal struct kvm_vcpu_events_nmi
{
    internal byte injected;
    internal byte pending;
    internal byte masked;
    internal byte pad;
}

internal struct kvm_vcpu_events_smi
{
    internal byte smm;
    internal byte pending;
    internal byte smm_inside_nmi;
    internal byte latched_init;
}

/// <summary>The reserved space before the payload has lost a byte to a newer field, so it has no name here.</summary>
[StructLayout(LayoutKind.Explicit, Size = 64)]
internal struct kvm_vcpu_events
{
    [FieldOffset(0)]
    internal kvm_vcpu_events_exception exception;

    [FieldOffset(8)]
    internal kvm_vcpu_events_interrupt interrupt;

    [FieldOffset(12)]
    internal kvm_vcpu_events_nmi nmi;

    [FieldOffset(16)]
    internal uint sipi_vector;

    [FieldOffset(20)]
    internal uint flags;

    [FieldOffset(24)]
    internal kvm_vcpu_events_smi smi;

    [FieldOffset(55)]
    internal byte exception_has_payload;

    [FieldOffset(56)]
    internal ulong exception_payload;
}

internal unsafe struct kvm_debugregs
{
    internal fixed ulong db[4];
    internal ulong dr6;
    internal ulong dr7;
    internal ulong flags;
    internal fixed ulong reserved[9];
}

internal unsafe struct kvm_xsave
{
    internal fixed uint region[1024];
}

internal struct kvm_xcr
{
    internal uint xcr;
    internal uint reserved;
    internal ulong value;
}

internal unsafe struct kvm_xcrs
{
    internal uint nr_xcrs;
    internal uint flags;

    // 16 elements of kvm_xcr, two words each.
    internal fixed ulong xcrs[32];
    internal fixed ulong padding[16];
}

internal unsafe struct kvm_lapic_state
{
    internal fixed byte regs[1024];
}

internal struct kvm_mp_state
{
    internal uint mp_state;
}

internal struct kvm_msr_entry
{
    internal uint index;
    internal uint reserved;
    internal ulong data;
}

/// <summary>Header; entries follow.</summary>
internal struct kvm_msrs
{
    internal uint nmsrs;
    internal uint pad;
}

/// <summary>Header; indices follow.</summary>
internal struct kvm_msr_list
{
    internal uint nmsrs;
}

internal unsafe struct kvm_cpuid_entry2
{
    internal uint function;
    internal uint index;
    internal uint flags;
    internal uint eax, ebx, ecx, edx;
    internal fixed uint padding[3];
}

/// <summary>Header; entries follow.</summary>
internal struct kvm_cpuid2
{
    internal uint nent;
    internal uint padding;
}

/// <summary>Header; the set's bytes follow.</summary>
internal struct kvm_signal_mask
{
    internal uint len;
}

internal struct kvm_interrupt
{
    internal uint irq;
}

internal struct kvm_userspace_memory_region
{
    internal uint slot;
    internal uint flags;
    internal ulong guest_phys_addr;
    internal ulong memory_size;
    internal ulong userspace_addr;
}

internal struct kvm_dirty_log
{
    internal uint slot;
    internal uint padding1;
    internal ulong dirty_bitmap;
}

internal struct kvm_irq_level
{
    internal uint irq;
    internal uint level;
}

internal unsafe struct kvm_irqchip
{
    internal uint chip_id;
    internal uint pad;
    internal fixed byte chip[512];
}

/// <summary>Header; entries follow.</summary>
internal struct kvm_irq_routing
{
    internal uint nr;
    internal uint flags;
}

[StructLayout(LayoutKind.Explicit, Size = 48)]
internal struct kvm_irq_routing_entry
{
    [FieldOffset(0)]
    internal uint gsi;

    [FieldOffset(4)]
    internal uint type;

    [FieldOffset(8)]
    internal uint flags;

    [FieldOffset(12)]
    internal uint pad;

    [FieldOffset(16)]
    internal kvm_irq_routing_irqchip irqchip;

    [FieldOffset(16)]
    internal kvm_irq_routing_msi msi;
}

internal struct kvm_irq_routing_irqchip
{
    internal uint irqchip;
    internal uint pin;
}

internal struct kvm_irq_routing_msi
{
    internal uint address_lo;
    internal uint address_hi;
    internal uint data;
    internal uint pad;
}

internal unsafe struct kvm_msi
{
    internal uint address_lo;
    internal uint address_hi;
    internal uint data;
    internal uint flags;
    internal uint devid;
    internal fixed byte pad[12];
}

internal unsafe struct kvm_ioeventfd
{
    internal ulong datamatch;
    internal ulong addr;
    internal uint len;
    internal int fd;
    internal uint flags;
    internal fixed byte pad[36];
}

internal unsafe struct kvm_clock_data
{
    internal ulong clock;
    internal uint flags;
    internal uint pad0;
    internal ulong realtime;
    internal ulong host_tsc;
    internal fixed uint pad[4];
}

internal unsafe struct kvm_enable_cap
{
    internal uint cap;
    internal uint flags;
    internal fixed ulong args[4];
    internal fixed byte pad[64];
}

internal struct kvm_sync_regs
{
    internal kvm_regs regs;
    internal kvm_sregs sregs;
    internal kvm_vcpu_events events;
}

internal struct kvm_run_hw
{
    internal ulong hardware_exit_reason;
}

internal struct kvm_run_fail_entry
{
    internal ulong hardware_entry_failure_reason;
    internal uint cpu;
}

internal struct kvm_run_io
{
    internal byte direction;
    internal byte size;
    internal ushort port;
    internal uint count;
    internal ulong data_offset;
}

internal unsafe struct kvm_run_mmio
{
    internal ulong phys_addr;
    internal fixed byte data[8];
    internal uint len;
    internal byte is_write;
}

internal unsafe struct kvm_run_hypercall
{
    internal ulong nr;
    internal fixed ulong args[6];
    internal ulong ret;
}

internal unsafe struct kvm_run_internal
{
    internal uint suberror;
    internal uint ndata;
    internal fixed ulong data[16];
}

internal unsafe struct kvm_run_emulation_failure
{
    internal uint suberror;
    internal uint ndata;
    internal ulong flags;
    internal byte insn_size;
    internal fixed byte insn_bytes[15];
}

internal struct kvm_run_system_event
{
    internal uint type;
    internal uint ndata;
}

internal struct kvm_run_eoi
{
    internal byte vector;
}

/// <summary>The page that a vCPU shares with the kernel; PIO data follows on the next page.</summary>
[StructLayout(LayoutKind.Explicit, Size = 2352)]
internal struct kvm_run
{
    [FieldOffset(0)]
    internal byte request_interrupt_window;

    [FieldOffset(1)]
    internal byte immediate_exit;

    [FieldOffset(8)]
    internal uint exit_reason;

    [FieldOffset(12)]
    internal byte ready_for_interrupt_injection;

    [FieldOffset(13)]
    internal byte if_flag;

    [FieldOffset(14)]
    internal ushort flags;

    [FieldOffset(16)]
    internal ulong cr8;

    [FieldOffset(24)]
    internal ulong apic_base;

    [FieldOffset(32)]
    internal kvm_run_hw hw;

    [FieldOffset(32)]
    internal kvm_run_fail_entry fail_entry;

    [FieldOffset(32)]
    internal kvm_run_io io;

    [FieldOffset(32)]
    internal kvm_run_mmio mmio;

    [FieldOffset(32)]
    internal kvm_run_hypercall hypercall;

    [FieldOffset(32)]
    internal kvm_run_internal @internal;

    [FieldOffset(32)]
    internal kvm_run_emulation_failure emulation_failure;

    [FieldOffset(32)]
    internal kvm_run_system_event system_event;

    [FieldOffset(32)]
    internal kvm_run_eoi eoi;

    [FieldOffset(288)]
    internal ulong kvm_valid_regs;

    [FieldOffset(296)]
    internal ulong kvm_dirty_regs;

    [FieldOffset(304)]
    internal kvm_sync_regs s;
}

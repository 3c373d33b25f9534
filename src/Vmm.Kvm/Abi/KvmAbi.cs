// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.Kvm.Abi;

#pragma warning disable IDE1006 // KVM's own names

// Theory. KVM's binary interface, version 12, x86-64, under its own names. Requests are Linux's 32-bit words on every
// system (see OsAbi.IoctlTunnelRequest). The direction bits are part of the name and say nothing: KVM_SET_IRQCHIP is
// encoded as a read. Every number, size and offset in this folder is compared with the C header by tests/abi/kvm_abi.c,
// which the tests of this assembly compile and run; the same test fails when something here is not covered there.

/// <summary>Requests, capabilities and other numbers.</summary>
internal static class KvmAbi
{
    internal const int KVM_API_VERSION = 12;

    // The device.
    internal const uint KVM_GET_API_VERSION = Io | 0x00;
    internal const uint KVM_CREATE_VM = Io | 0x01;
    internal const uint KVM_GET_MSR_INDEX_LIST = ReadWrite | (4 << 16) | Io | 0x02;
    internal const uint KVM_CHECK_EXTENSION = Io | 0x03;
    internal const uint KVM_GET_VCPU_MMAP_SIZE = Io | 0x04;
    internal const uint KVM_GET_SUPPORTED_CPUID = ReadWrite | (8 << 16) | Io | 0x05;

    // A VM.
    internal const uint KVM_CREATE_VCPU = Io | 0x41;
    internal const uint KVM_GET_DIRTY_LOG = Write | (16 << 16) | Io | 0x42;
    internal const uint KVM_SET_USER_MEMORY_REGION = Write | (32 << 16) | Io | 0x46;
    internal const uint KVM_SET_TSS_ADDR = Io | 0x47;
    internal const uint KVM_SET_IDENTITY_MAP_ADDR = Write | (8 << 16) | Io | 0x48;
    internal const uint KVM_CREATE_IRQCHIP = Io | 0x60;
    internal const uint KVM_IRQ_LINE = Write | (8 << 16) | Io | 0x61;
    internal const uint KVM_GET_IRQCHIP = ReadWrite | (520 << 16) | Io | 0x62;
    internal const uint KVM_SET_IRQCHIP = Read | (520u << 16) | Io | 0x63;
    internal const uint KVM_SET_GSI_ROUTING = Write | (8 << 16) | Io | 0x6a;
    internal const uint KVM_IOEVENTFD = Write | (64 << 16) | Io | 0x79;
    internal const uint KVM_SET_CLOCK = Write | (48 << 16) | Io | 0x7b;
    internal const uint KVM_GET_CLOCK = Read | (48u << 16) | Io | 0x7c;
    internal const uint KVM_GET_TSC_KHZ = Io | 0xa3;
    internal const uint KVM_ENABLE_CAP = Write | (104 << 16) | Io | 0xa3;
    internal const uint KVM_SIGNAL_MSI = Write | (32 << 16) | Io | 0xa5;

    // A vCPU.
    internal const uint KVM_RUN = Io | 0x80;
    internal const uint KVM_GET_REGS = Read | (144u << 16) | Io | 0x81;
    internal const uint KVM_SET_REGS = Write | (144 << 16) | Io | 0x82;
    internal const uint KVM_GET_SREGS = Read | (312u << 16) | Io | 0x83;
    internal const uint KVM_SET_SREGS = Write | (312 << 16) | Io | 0x84;
    internal const uint KVM_INTERRUPT = Write | (4 << 16) | Io | 0x86;
    internal const uint KVM_GET_MSRS = ReadWrite | (8 << 16) | Io | 0x88;
    internal const uint KVM_SET_MSRS = Write | (8 << 16) | Io | 0x89;
    internal const uint KVM_SET_SIGNAL_MASK = Write | (4 << 16) | Io | 0x8b;
    internal const uint KVM_GET_FPU = Read | (416u << 16) | Io | 0x8c;
    internal const uint KVM_SET_FPU = Write | (416 << 16) | Io | 0x8d;
    internal const uint KVM_GET_LAPIC = Read | (1024u << 16) | Io | 0x8e;
    internal const uint KVM_SET_LAPIC = Write | (1024 << 16) | Io | 0x8f;
    internal const uint KVM_SET_CPUID2 = Write | (8 << 16) | Io | 0x90;
    internal const uint KVM_GET_MP_STATE = Read | (4u << 16) | Io | 0x98;
    internal const uint KVM_SET_MP_STATE = Write | (4 << 16) | Io | 0x99;
    internal const uint KVM_NMI = Io | 0x9a;
    internal const uint KVM_GET_VCPU_EVENTS = Read | (64u << 16) | Io | 0x9f;
    internal const uint KVM_SET_VCPU_EVENTS = Write | (64 << 16) | Io | 0xa0;
    internal const uint KVM_GET_DEBUGREGS = Read | (128u << 16) | Io | 0xa1;
    internal const uint KVM_SET_DEBUGREGS = Write | (128 << 16) | Io | 0xa2;
    internal const uint KVM_GET_XSAVE = Read | (4096u << 16) | Io | 0xa4;
    internal const uint KVM_SET_XSAVE = Write | (4096 << 16) | Io | 0xa5;
    internal const uint KVM_GET_XCRS = Read | (392u << 16) | Io | 0xa6;
    internal const uint KVM_SET_XCRS = Write | (392 << 16) | Io | 0xa7;

    // Capabilities.
    internal const int KVM_CAP_IRQCHIP = 0;
    internal const int KVM_CAP_USER_MEMORY = 3;
    internal const int KVM_CAP_SET_TSS_ADDR = 4;
    internal const int KVM_CAP_EXT_CPUID = 7;
    internal const int KVM_CAP_NR_VCPUS = 9;
    internal const int KVM_CAP_NR_MEMSLOTS = 10;
    internal const int KVM_CAP_MP_STATE = 14;
    internal const int KVM_CAP_DESTROY_MEMORY_REGION_WORKS = 21;
    internal const int KVM_CAP_IRQ_ROUTING = 25;
    internal const int KVM_CAP_JOIN_MEMORY_REGIONS_WORKS = 30;
    internal const int KVM_CAP_IOEVENTFD = 36;
    internal const int KVM_CAP_SET_IDENTITY_MAP_ADDR = 37;
    internal const int KVM_CAP_ADJUST_CLOCK = 39;
    internal const int KVM_CAP_VCPU_EVENTS = 41;
    internal const int KVM_CAP_DEBUGREGS = 50;
    internal const int KVM_CAP_XSAVE = 55;
    internal const int KVM_CAP_XCRS = 56;
    internal const int KVM_CAP_GET_TSC_KHZ = 61;
    internal const int KVM_CAP_MAX_VCPUS = 66;
    internal const int KVM_CAP_SYNC_REGS = 74;
    internal const int KVM_CAP_SIGNAL_MSI = 77;
    internal const int KVM_CAP_READONLY_MEM = 81;
    internal const int KVM_CAP_ENABLE_CAP_VM = 98;
    internal const int KVM_CAP_SPLIT_IRQCHIP = 121;
    internal const int KVM_CAP_IMMEDIATE_EXIT = 136;
    internal const int KVM_CAP_EXIT_ON_EMULATION_FAILURE = 204;
    internal const int KVM_CAP_VM_TSC_CONTROL = 214;

    // Reasons for leaving KVM_RUN.
    internal const uint KVM_EXIT_UNKNOWN = 0;
    internal const uint KVM_EXIT_IO = 2;
    internal const uint KVM_EXIT_HYPERCALL = 3;
    internal const uint KVM_EXIT_DEBUG = 4;
    internal const uint KVM_EXIT_HLT = 5;
    internal const uint KVM_EXIT_MMIO = 6;
    internal const uint KVM_EXIT_IRQ_WINDOW_OPEN = 7;
    internal const uint KVM_EXIT_SHUTDOWN = 8;
    internal const uint KVM_EXIT_FAIL_ENTRY = 9;
    internal const uint KVM_EXIT_INTR = 10;
    internal const uint KVM_EXIT_SET_TPR = 11;
    internal const uint KVM_EXIT_TPR_ACCESS = 12;
    internal const uint KVM_EXIT_INTERNAL_ERROR = 17;
    internal const uint KVM_EXIT_SYSTEM_EVENT = 24;
    internal const uint KVM_EXIT_IOAPIC_EOI = 26;

    internal const byte KVM_EXIT_IO_IN = 0;
    internal const byte KVM_EXIT_IO_OUT = 1;

    internal const uint KVM_INTERNAL_ERROR_EMULATION = 1;
    internal const uint KVM_INTERNAL_ERROR_SIMUL_EX = 2;
    internal const uint KVM_INTERNAL_ERROR_DELIVERY_EV = 3;
    internal const uint KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4;
    internal const ulong KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1;

    internal const uint KVM_MEM_LOG_DIRTY_PAGES = 1;
    internal const uint KVM_MEM_READONLY = 2;

    internal const uint KVM_IRQCHIP_PIC_MASTER = 0;
    internal const uint KVM_IRQCHIP_PIC_SLAVE = 1;
    internal const uint KVM_IRQCHIP_IOAPIC = 2;

    internal const uint KVM_IRQ_ROUTING_IRQCHIP = 1;
    internal const uint KVM_IRQ_ROUTING_MSI = 2;

    internal const uint KVM_IOEVENTFD_FLAG_DATAMATCH = 1;
    internal const uint KVM_IOEVENTFD_FLAG_PIO = 2;
    internal const uint KVM_IOEVENTFD_FLAG_DEASSIGN = 4;

    internal const ulong KVM_SYNC_X86_REGS = 1;
    internal const ulong KVM_SYNC_X86_SREGS = 2;
    internal const ulong KVM_SYNC_X86_EVENTS = 4;

    internal const uint KVM_MP_STATE_RUNNABLE = 0;
    internal const uint KVM_MP_STATE_UNINITIALIZED = 1;
    internal const uint KVM_MP_STATE_INIT_RECEIVED = 2;
    internal const uint KVM_MP_STATE_HALTED = 3;
    internal const uint KVM_MP_STATE_SIPI_RECEIVED = 4;

    internal const uint KVM_VCPUEVENT_VALID_NMI_PENDING = 1;
    internal const uint KVM_VCPUEVENT_VALID_SHADOW = 4;
    internal const byte KVM_X86_SHADOW_INT_MOV_SS = 1;
    internal const byte KVM_X86_SHADOW_INT_STI = 2;

    internal const uint KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1;


    private const uint Io = 0xAE00;
    private const uint Write = 1u << 30;
    private const uint Read = 2u << 30;
    private const uint ReadWrite = 3u << 30;
}

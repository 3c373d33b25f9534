/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The KVM application binary interface, version 12, x86-64.
 *
 * These are this project's own declarations of the numbers and layouts that
 * the public API document ("The Definitive KVM API Documentation") defines.
 * tests/kmod/abi_test.c compares every structure size, member offset and
 * number below with the host's <linux/kvm.h>, so that neither this file nor
 * a reader has to be trusted.
 *
 * Two facts shape the callers of this file:
 *
 *  - A request is the whole 32-bit word.  0xAEA2 and 0xAEA3 name two different
 *    requests each on one vCPU descriptor; only direction and size tell them
 *    apart.
 *  - The direction bits are part of the name and are not to be believed:
 *    SET_IRQCHIP is encoded as a read, GET_DIRTY_LOG as a write, and the size
 *    of a request that ends in an array covers its header only.
 *
 * Everything is little-endian with natural alignment; there is no 32-bit
 * caller to serve.
 */
#ifndef KVM_ABI_H
#define	KVM_ABI_H

#include "vmk_types.h"

#define	ABI_VERSION		12

/* Linux's request encoding: direction 2 bits, size 14, type 8, number 8. */
#define	ABI_IOC(dir, nr, size)						\
	(((uint32_t)(dir) << 30) | ((uint32_t)(size) << 16) |		\
	    0xAE00U | (uint32_t)(nr))
#define	ABI_IOC_SIZE(request)	((request) >> 16 & 0x3fffU)
#define	ABI_IOC_IN		0x40000000U
#define	ABI_IOC_OUT		0x80000000U
#define	ABI_IO(nr)		ABI_IOC(0, nr, 0)
#define	ABI_IOW(nr, type)	ABI_IOC(1, nr, sizeof(type))
#define	ABI_IOR(nr, type)	ABI_IOC(2, nr, sizeof(type))
#define	ABI_IOWR(nr, type)	ABI_IOC(3, nr, sizeof(type))

/* ---- registers --------------------------------------------------------- */

struct abi_regs {
	uint64_t	rax, rbx, rcx, rdx;
	uint64_t	rsi, rdi, rsp, rbp;
	uint64_t	r8, r9, r10, r11;
	uint64_t	r12, r13, r14, r15;
	uint64_t	rip, rflags;
};

struct abi_segment {
	uint64_t	base;
	uint32_t	limit;		/* in bytes, already scaled by g */
	uint16_t	selector;
	uint8_t		type;
	uint8_t		present, dpl, db, s, l, g, avl;
	uint8_t		unusable;
	uint8_t		padding;
};

struct abi_dtable {
	uint64_t	base;
	uint16_t	limit;
	uint16_t	padding[3];
};

struct abi_sregs {
	struct abi_segment	cs, ds, es, fs, gs, ss;
	struct abi_segment	tr, ldt;
	struct abi_dtable	gdt, idt;
	uint64_t		cr0, cr2, cr3, cr4, cr8;
	uint64_t		efer;
	uint64_t		apic_base;
	uint64_t		interrupt_bitmap[4];
};

struct abi_fpu {
	uint8_t		fpr[8][16];
	uint16_t	fcw;
	uint16_t	fsw;
	uint8_t		ftwx;		/* abridged tag, FXSAVE form */
	uint8_t		pad1;
	uint16_t	last_opcode;
	uint64_t	last_ip;
	uint64_t	last_dp;
	uint8_t		xmm[16][16];
	uint32_t	mxcsr;
	uint32_t	pad2;
};

#define	ABI_XSAVE_SIZE	4096

struct abi_xsave {
	uint32_t	region[ABI_XSAVE_SIZE / 4];
};

#define	ABI_MAX_XCRS	16

struct abi_xcr {
	uint32_t	xcr;
	uint32_t	reserved;
	uint64_t	value;
};

struct abi_xcrs {
	uint32_t	nr_xcrs;
	uint32_t	flags;
	struct abi_xcr	xcrs[ABI_MAX_XCRS];
	uint64_t	padding[16];
};

struct abi_debugregs {
	uint64_t	db[4];
	uint64_t	dr6;
	uint64_t	dr7;
	uint64_t	flags;
	uint64_t	reserved[9];
};

struct abi_msr_entry {
	uint32_t	index;
	uint32_t	reserved;
	uint64_t	data;
};

/* Followed by nmsrs entries. */
struct abi_msrs {
	uint32_t	nmsrs;
	uint32_t	pad;
};

/* Followed by nmsrs 32-bit indices. */
struct abi_msr_list {
	uint32_t	nmsrs;
};

struct abi_cpuid_entry2 {
	uint32_t	function;
	uint32_t	index;
	uint32_t	flags;
	uint32_t	eax, ebx, ecx, edx;
	uint32_t	padding[3];
};

#define	ABI_CPUID_SIGNIFCANT_INDEX	1U

/* Followed by nent entries. */
struct abi_cpuid2 {
	uint32_t	nent;
	uint32_t	padding;
};

struct abi_mp_state {
	uint32_t	mp_state;
};

#define	ABI_MP_RUNNABLE		0
#define	ABI_MP_UNINITIALIZED	1
#define	ABI_MP_INIT_RECEIVED	2
#define	ABI_MP_HALTED		3
#define	ABI_MP_SIPI_RECEIVED	4

struct abi_vcpu_events {
	struct {
		uint8_t		injected;
		uint8_t		nr;
		uint8_t		has_error_code;
		uint8_t		pending;
		uint32_t	error_code;
	} exception;
	struct {
		uint8_t		injected;
		uint8_t		nr;
		uint8_t		soft;
		uint8_t		shadow;
	} interrupt;
	struct {
		uint8_t		injected;
		uint8_t		pending;
		uint8_t		masked;
		uint8_t		pad;
	} nmi;
	uint32_t	sipi_vector;
	uint32_t	flags;
	struct {
		uint8_t		smm;
		uint8_t		pending;
		uint8_t		smm_inside_nmi;
		uint8_t		latched_init;
	} smi;
	struct {
		uint8_t		pending;
	} triple_fault;
	uint8_t		reserved[26];
	uint8_t		exception_has_payload;
	uint64_t	exception_payload;
};

#define	ABI_VCPUEVENT_NMI_PENDING	0x01U
#define	ABI_VCPUEVENT_SIPI_VECTOR	0x02U
#define	ABI_VCPUEVENT_SHADOW		0x04U
#define	ABI_VCPUEVENT_SMM		0x08U
#define	ABI_SHADOW_MOV_SS		0x01
#define	ABI_SHADOW_STI			0x02

/* Followed by len bytes of the host's signal set. */
struct abi_signal_mask {
	uint32_t	len;
};

struct abi_vapic_addr {
	uint64_t	vapic_addr;
};

struct abi_interrupt {
	uint32_t	irq;
};

struct abi_guest_debug {
	uint32_t	control;
	uint32_t	pad;
	uint64_t	debugreg[8];
};

#define	ABI_GUESTDBG_ENABLE		0x00000001U
#define	ABI_GUESTDBG_SINGLESTEP		0x00000002U
#define	ABI_GUESTDBG_USE_SW_BP		0x00010000U

/* ---- memory ------------------------------------------------------------ */

struct abi_memory_region {
	uint32_t	slot;
	uint32_t	flags;
	uint64_t	guest_phys_addr;
	uint64_t	memory_size;
	uint64_t	userspace_addr;
};

#define	ABI_MEM_LOG_DIRTY_PAGES	1U
#define	ABI_MEM_READONLY	2U

struct abi_dirty_log {
	uint32_t	slot;
	uint32_t	padding1;
	uint64_t	dirty_bitmap;	/* user address */
};

/* ---- interrupts and timers --------------------------------------------- */

struct abi_irq_level {
	uint32_t	irq;		/* status on return of _STATUS */
	uint32_t	level;
};

struct abi_pic_state {
	uint8_t		last_irr;
	uint8_t		irr;
	uint8_t		imr;
	uint8_t		isr;
	uint8_t		priority_add;
	uint8_t		irq_base;
	uint8_t		read_reg_select;
	uint8_t		poll;
	uint8_t		special_mask;
	uint8_t		init_state;
	uint8_t		auto_eoi;
	uint8_t		rotate_on_auto_eoi;
	uint8_t		special_fully_nested_mode;
	uint8_t		init4;
	uint8_t		elcr;
	uint8_t		elcr_mask;
};

#define	ABI_IOAPIC_NUM_PINS	24

/*
 * Each redirection entry is kept as the 64-bit word of the 82093AA data
 * sheet, section 3.2.4.
 */
struct abi_ioapic_state {
	uint64_t	base_address;
	uint32_t	ioregsel;
	uint32_t	id;
	uint32_t	irr;
	uint32_t	pad;
	uint64_t	redirtbl[ABI_IOAPIC_NUM_PINS];
};

#define	ABI_IRQCHIP_PIC_MASTER	0
#define	ABI_IRQCHIP_PIC_SLAVE	1
#define	ABI_IRQCHIP_IOAPIC	2

struct abi_irqchip {
	uint32_t	chip_id;
	uint32_t	pad;
	union {
		uint8_t			dummy[512];
		struct abi_pic_state	pic;
		struct abi_ioapic_state	ioapic;
	} chip;
};

#define	ABI_LAPIC_SIZE	0x400

struct abi_lapic_state {
	uint8_t		regs[ABI_LAPIC_SIZE];
};

struct abi_pit_channel_state {
	uint32_t	count;		/* up to 65536 */
	uint16_t	latched_count;
	uint8_t		count_latched;
	uint8_t		status_latched;
	uint8_t		status;
	uint8_t		read_state;
	uint8_t		write_state;
	uint8_t		write_latch;
	uint8_t		rw_mode;
	uint8_t		mode;
	uint8_t		bcd;
	uint8_t		gate;
	int64_t		count_load_time;
};

struct abi_pit_state2 {
	struct abi_pit_channel_state	channels[3];
	uint32_t			flags;
	uint32_t			reserved[9];
};

#define	ABI_PIT_FLAGS_HPET_LEGACY	1U
#define	ABI_PIT_FLAGS_SPEAKER_DATA_ON	2U

struct abi_pit_config {
	uint32_t	flags;
	uint32_t	pad[15];
};

#define	ABI_PIT_SPEAKER_DUMMY	1U

struct abi_reinject_control {
	uint8_t		pit_reinject;
	uint8_t		reserved[31];
};

struct abi_irq_routing_entry {
	uint32_t	gsi;
	uint32_t	type;
	uint32_t	flags;
	uint32_t	pad;
	union {
		struct {
			uint32_t	irqchip;
			uint32_t	pin;
		} irqchip;
		struct {
			uint32_t	address_lo;
			uint32_t	address_hi;
			uint32_t	data;
			uint32_t	pad;
		} msi;
		uint32_t	pad[8];
	} u;
};

#define	ABI_IRQ_ROUTING_IRQCHIP	1
#define	ABI_IRQ_ROUTING_MSI	2

/* Followed by nr entries. */
struct abi_irq_routing {
	uint32_t	nr;
	uint32_t	flags;
};

struct abi_irqfd {
	uint32_t	fd;
	uint32_t	gsi;
	uint32_t	flags;
	uint32_t	resamplefd;
	uint8_t		pad[16];
};

#define	ABI_IRQFD_DEASSIGN	1U
#define	ABI_IRQFD_RESAMPLE	2U

struct abi_ioeventfd {
	uint64_t	datamatch;
	uint64_t	addr;
	uint32_t	len;		/* 0, 1, 2, 4 or 8 */
	int32_t		fd;
	uint32_t	flags;
	uint8_t		pad[36];
};

#define	ABI_IOEVENTFD_DATAMATCH	1U
#define	ABI_IOEVENTFD_PIO	2U
#define	ABI_IOEVENTFD_DEASSIGN	4U

struct abi_msi {
	uint32_t	address_lo;
	uint32_t	address_hi;
	uint32_t	data;
	uint32_t	flags;
	uint32_t	devid;
	uint8_t		pad[12];
};

struct abi_clock_data {
	uint64_t	clock;		/* ns */
	uint32_t	flags;
	uint32_t	pad0;
	uint64_t	realtime;
	uint64_t	host_tsc;
	uint32_t	pad[4];
};

struct abi_coalesced_zone {
	uint64_t	addr;
	uint32_t	size;
	uint32_t	pio;
};

struct abi_coalesced_entry {
	uint64_t	phys_addr;
	uint32_t	len;
	uint32_t	pio;
	uint8_t		data[8];
};

/* Followed by entries up to the end of the page. */
struct abi_coalesced_ring {
	uint32_t	first;		/* next to read, user's */
	uint32_t	last;		/* next to write, ours */
};

#define	ABI_COALESCED_MAX						\
	((VMK_PAGE_SIZE - sizeof(struct abi_coalesced_ring)) /		\
	    sizeof(struct abi_coalesced_entry))

struct abi_enable_cap {
	uint32_t	cap;
	uint32_t	flags;
	uint64_t	args[4];
	uint8_t		pad[64];
};

/* ---- the shared run page ----------------------------------------------- */

#define	ABI_RUN_PAGES		3	/* kvm_run, PIO data, coalesced ring */
#define	ABI_PIO_PAGE		1
#define	ABI_COALESCED_PAGE	2

#define	ABI_EXIT_UNKNOWN		0
#define	ABI_EXIT_IO			2
#define	ABI_EXIT_DEBUG			4
#define	ABI_EXIT_HLT			5
#define	ABI_EXIT_MMIO			6
#define	ABI_EXIT_IRQ_WINDOW_OPEN	7
#define	ABI_EXIT_SHUTDOWN		8
#define	ABI_EXIT_FAIL_ENTRY		9
#define	ABI_EXIT_INTR			10
#define	ABI_EXIT_SET_TPR		11
#define	ABI_EXIT_INTERNAL_ERROR		17
#define	ABI_EXIT_IOAPIC_EOI		26

#define	ABI_EXIT_IO_IN			0
#define	ABI_EXIT_IO_OUT			1

#define	ABI_INTERNAL_EMULATION		1
#define	ABI_INTERNAL_DELIVERY_EV	3
#define	ABI_INTERNAL_UNEXPECTED_EXIT	4
#define	ABI_EMULATION_FLAG_INSN_BYTES	1ULL

struct abi_run {
	uint8_t		request_interrupt_window;	/* user -> us */
	uint8_t		immediate_exit;			/* user -> us */
	uint8_t		padding1[6];
	uint32_t	exit_reason;
	uint8_t		ready_for_interrupt_injection;
	uint8_t		if_flag;
	uint16_t	flags;
	uint64_t	cr8;				/* both ways */
	uint64_t	apic_base;			/* both ways */
	union {
		struct {
			uint64_t	hardware_exit_reason;
		} hw;
		struct {
			uint64_t	hardware_entry_failure_reason;
			uint32_t	cpu;
		} fail_entry;
		struct {
			uint8_t		direction;
			uint8_t		size;		/* 1, 2 or 4 */
			uint16_t	port;
			uint32_t	count;
			uint64_t	data_offset;	/* from the run page */
		} io;
		struct {
			uint32_t	exception;
			uint32_t	pad;
			uint64_t	pc;
			uint64_t	dr6;
			uint64_t	dr7;
		} debug;
		struct {
			uint64_t	phys_addr;
			uint8_t		data[8];
			uint32_t	len;
			uint8_t		is_write;
		} mmio;
		struct {
			uint32_t	suberror;
			uint32_t	ndata;
			uint64_t	data[16];
		} internal;
		struct {
			uint32_t	suberror;
			uint32_t	ndata;
			uint64_t	flags;
			uint8_t		insn_size;
			uint8_t		insn_bytes[15];
		} emulation_failure;
		struct {
			uint8_t		vector;
		} eoi;
		uint8_t		padding[256];
	};
	uint64_t	kvm_valid_regs;
	uint64_t	kvm_dirty_regs;
	uint8_t		sync[2048];
};

/* ---- requests ---------------------------------------------------------- */

/* On /dev/kvm. */
#define	ABI_GET_API_VERSION		ABI_IO(0x00)
#define	ABI_CREATE_VM			ABI_IO(0x01)
#define	ABI_GET_MSR_INDEX_LIST		ABI_IOWR(0x02, struct abi_msr_list)
#define	ABI_CHECK_EXTENSION		ABI_IO(0x03)	/* also on a VM */
#define	ABI_GET_VCPU_MMAP_SIZE		ABI_IO(0x04)
#define	ABI_GET_SUPPORTED_CPUID		ABI_IOWR(0x05, struct abi_cpuid2)

/* On a VM. */
#define	ABI_CREATE_VCPU			ABI_IO(0x41)
#define	ABI_GET_DIRTY_LOG		ABI_IOW(0x42, struct abi_dirty_log)
#define	ABI_SET_USER_MEMORY_REGION	ABI_IOW(0x46, struct abi_memory_region)
#define	ABI_SET_TSS_ADDR		ABI_IO(0x47)
#define	ABI_SET_IDENTITY_MAP_ADDR	ABI_IOW(0x48, uint64_t)
#define	ABI_CREATE_IRQCHIP		ABI_IO(0x60)
#define	ABI_IRQ_LINE			ABI_IOW(0x61, struct abi_irq_level)
#define	ABI_GET_IRQCHIP			ABI_IOWR(0x62, struct abi_irqchip)
#define	ABI_SET_IRQCHIP			ABI_IOR(0x63, struct abi_irqchip)
#define	ABI_IRQ_LINE_STATUS		ABI_IOWR(0x67, struct abi_irq_level)
#define	ABI_REGISTER_COALESCED_MMIO	ABI_IOW(0x67, struct abi_coalesced_zone)
#define	ABI_UNREGISTER_COALESCED_MMIO	ABI_IOW(0x68, struct abi_coalesced_zone)
#define	ABI_SET_GSI_ROUTING		ABI_IOW(0x6a, struct abi_irq_routing)
#define	ABI_REINJECT_CONTROL		ABI_IO(0x71)
#define	ABI_IRQFD			ABI_IOW(0x76, struct abi_irqfd)
#define	ABI_CREATE_PIT2			ABI_IOW(0x77, struct abi_pit_config)
#define	ABI_IOEVENTFD			ABI_IOW(0x79, struct abi_ioeventfd)
#define	ABI_SET_CLOCK			ABI_IOW(0x7b, struct abi_clock_data)
#define	ABI_GET_CLOCK			ABI_IOR(0x7c, struct abi_clock_data)
#define	ABI_GET_PIT2			ABI_IOR(0x9f, struct abi_pit_state2)
#define	ABI_SET_PIT2			ABI_IOW(0xa0, struct abi_pit_state2)
#define	ABI_SET_TSC_KHZ			ABI_IO(0xa2)	/* also on a vCPU */
#define	ABI_GET_TSC_KHZ			ABI_IO(0xa3)	/* also on a vCPU */
#define	ABI_SIGNAL_MSI			ABI_IOW(0xa5, struct abi_msi)

/* On a vCPU. */
#define	ABI_RUN				ABI_IO(0x80)
#define	ABI_GET_REGS			ABI_IOR(0x81, struct abi_regs)
#define	ABI_SET_REGS			ABI_IOW(0x82, struct abi_regs)
#define	ABI_GET_SREGS			ABI_IOR(0x83, struct abi_sregs)
#define	ABI_SET_SREGS			ABI_IOW(0x84, struct abi_sregs)
#define	ABI_INTERRUPT			ABI_IOW(0x86, struct abi_interrupt)
#define	ABI_GET_MSRS			ABI_IOWR(0x88, struct abi_msrs)
#define	ABI_SET_MSRS			ABI_IOW(0x89, struct abi_msrs)
#define	ABI_SET_SIGNAL_MASK		ABI_IOW(0x8b, struct abi_signal_mask)
#define	ABI_GET_FPU			ABI_IOR(0x8c, struct abi_fpu)
#define	ABI_SET_FPU			ABI_IOW(0x8d, struct abi_fpu)
#define	ABI_GET_LAPIC			ABI_IOR(0x8e, struct abi_lapic_state)
#define	ABI_SET_LAPIC			ABI_IOW(0x8f, struct abi_lapic_state)
#define	ABI_SET_CPUID2			ABI_IOW(0x90, struct abi_cpuid2)
#define	ABI_GET_CPUID2			ABI_IOWR(0x91, struct abi_cpuid2)
#define	ABI_SET_VAPIC_ADDR		ABI_IOW(0x93, struct abi_vapic_addr)
#define	ABI_GET_MP_STATE		ABI_IOR(0x98, struct abi_mp_state)
#define	ABI_SET_MP_STATE		ABI_IOW(0x99, struct abi_mp_state)
#define	ABI_NMI				ABI_IO(0x9a)
#define	ABI_SET_GUEST_DEBUG		ABI_IOW(0x9b, struct abi_guest_debug)
#define	ABI_GET_VCPU_EVENTS		ABI_IOR(0x9f, struct abi_vcpu_events)
#define	ABI_SET_VCPU_EVENTS		ABI_IOW(0xa0, struct abi_vcpu_events)
#define	ABI_GET_DEBUGREGS		ABI_IOR(0xa1, struct abi_debugregs)
#define	ABI_SET_DEBUGREGS		ABI_IOW(0xa2, struct abi_debugregs)
#define	ABI_ENABLE_CAP			ABI_IOW(0xa3, struct abi_enable_cap)
#define	ABI_GET_XSAVE			ABI_IOR(0xa4, struct abi_xsave)
#define	ABI_SET_XSAVE			ABI_IOW(0xa5, struct abi_xsave)
#define	ABI_GET_XCRS			ABI_IOR(0xa6, struct abi_xcrs)
#define	ABI_SET_XCRS			ABI_IOW(0xa7, struct abi_xcrs)

/* ---- capabilities ------------------------------------------------------ */

#define	ABI_CAP_IRQCHIP				0
#define	ABI_CAP_HLT				1
#define	ABI_CAP_USER_MEMORY			3
#define	ABI_CAP_SET_TSS_ADDR			4
#define	ABI_CAP_EXT_CPUID			7
#define	ABI_CAP_NR_VCPUS			9
#define	ABI_CAP_NR_MEMSLOTS			10
#define	ABI_CAP_NOP_IO_DELAY			12
#define	ABI_CAP_MP_STATE			14
#define	ABI_CAP_COALESCED_MMIO			15
#define	ABI_CAP_DESTROY_MEMORY_REGION_WORKS	21
#define	ABI_CAP_USER_NMI			22
#define	ABI_CAP_SET_GUEST_DEBUG			23
#define	ABI_CAP_REINJECT_CONTROL		24
#define	ABI_CAP_IRQ_ROUTING			25
#define	ABI_CAP_IRQ_INJECT_STATUS		26
#define	ABI_CAP_JOIN_MEMORY_REGIONS_WORKS	30
#define	ABI_CAP_IRQFD				32
#define	ABI_CAP_PIT2				33
#define	ABI_CAP_PIT_STATE2			35
#define	ABI_CAP_IOEVENTFD			36
#define	ABI_CAP_SET_IDENTITY_MAP_ADDR		37
#define	ABI_CAP_ADJUST_CLOCK			39
#define	ABI_CAP_INTERNAL_ERROR_DATA		40
#define	ABI_CAP_VCPU_EVENTS			41
#define	ABI_CAP_INTR_SHADOW			49
#define	ABI_CAP_DEBUGREGS			50
#define	ABI_CAP_X86_ROBUST_SINGLESTEP		51
#define	ABI_CAP_XSAVE				55
#define	ABI_CAP_XCRS				56
#define	ABI_CAP_GET_TSC_KHZ			61
#define	ABI_CAP_MAX_VCPUS			66
#define	ABI_CAP_TSC_DEADLINE_TIMER		72
#define	ABI_CAP_SIGNAL_MSI			77
#define	ABI_CAP_READONLY_MEM			81
#define	ABI_CAP_ENABLE_CAP_VM			98
#define	ABI_CAP_IOEVENTFD_NO_LENGTH		100
#define	ABI_CAP_CHECK_EXTENSION_VM		105
#define	ABI_CAP_SPLIT_IRQCHIP			121
#define	ABI_CAP_IOEVENTFD_ANY_LENGTH		122
#define	ABI_CAP_MAX_VCPU_ID			128
#define	ABI_CAP_IMMEDIATE_EXIT			136
#define	ABI_CAP_EXIT_ON_EMULATION_FAILURE	204

#endif /* !KVM_ABI_H */

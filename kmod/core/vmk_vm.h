/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_vm.h: the objects of the core and the calls between its files.
 *
 * Ownership.  A machine (struct vmk_vm) owns everything below it: memory
 * slots, vCPUs, interrupt chips, event bindings.  It lives while its own
 * descriptor or that of any of its vCPUs is open (vm->refs counts open
 * descriptors, nothing else).  A vCPU is freed with its machine, never before,
 * so that a timer or an interrupt on its way to a vCPU needs no reference.
 *
 * Locks, outermost first:
 *   vcpu->lock      one thread at a time in a vCPU's ioctls; held in RUN
 *   vm->lock        creation of vCPUs and chips, configuration
 *   vm->mem.lock    slots, pins, nested page tables
 *   spin locks      of the chips and timers (leaf, any context)
 * vm->vcpu[] is written under vm->lock and only ever grows; readers take
 * vmk_vcpu_at(), which pairs with the release store in CREATE_VCPU.
 *
 * Guest mode.  vcpu->in_guest is set before the last look at vcpu->requests
 * and vm->tlb_gen, and cleared after the world switch.  Whoever wants a
 * running vCPU's attention sets a request bit first and then looks at
 * in_guest; both sides have a full barrier in between, so at least one of
 * them sees the other.
 */
#ifndef VMK_VM_H
#define	VMK_VM_H

#include "vmk_types.h"
#include "vmk_os.h"
#include "kvm_abi.h"
#include "vmk_decode.h"

#define	VMK_MAX_VCPUS		64
#define	VMK_BOOT_ID		0	/* the vCPU that starts by itself */
#define	VMK_MAX_SLOTS		512
#define	VMK_MAX_CPUID		256	/* entries of SET_CPUID2 */
#define	VMK_MAX_MSRS		256	/* entries of one GET/SET_MSRS */
#define	VMK_MAX_IOEVENTFD	512
#define	VMK_MAX_COALESCED	64
#define	VMK_XSAVE_SIZE		4096
/* Pages charged (vmk_mem_charge) for what is not guest memory. */
#define	VMK_VM_PAGES		48	/* with chips, routes, doorbells */
#define	VMK_VCPU_PAGES		16
#define	VMK_IRQFD_PAGES		8	/* a host may need a thread for it */

/* ---- architecture constants (SDM volume 3A, APM volume 2) -------------- */

#define	CR0_PE		0x00000001UL
#define	CR0_TS		0x00000008UL
#define	CR0_ET		0x00000010UL
#define	CR0_NE		0x00000020UL
#define	CR0_WP		0x00010000UL
#define	CR0_NW		0x20000000UL
#define	CR0_CD		0x40000000UL
#define	CR0_PG		0x80000000UL
#define	CR0_VALID	0xe005003fUL

#define	CR4_PSE		0x00000010UL
#define	CR4_PAE		0x00000020UL
#define	CR4_MCE		0x00000040UL
#define	CR4_PGE		0x00000080UL
#define	CR4_PCE		0x00000100UL
#define	CR4_OSFXSR	0x00000200UL
#define	CR4_OSXMMEXCPT	0x00000400UL
#define	CR4_UMIP	0x00000800UL
#define	CR4_LA57	0x00001000UL
#define	CR4_VMXE	0x00002000UL
#define	CR4_FSGSBASE	0x00010000UL
#define	CR4_PCIDE	0x00020000UL
#define	CR4_OSXSAVE	0x00040000UL
#define	CR4_SMEP	0x00100000UL
#define	CR4_SMAP	0x00200000UL

#define	EFER_SCE	0x0001UL
#define	EFER_LME	0x0100UL
#define	EFER_LMA	0x0400UL
#define	EFER_NXE	0x0800UL
#define	EFER_SVME	0x1000UL

#define	RFLAGS_CF	0x00000001UL
#define	RFLAGS_FIXED	0x00000002UL	/* bit 1 reads as one */
#define	RFLAGS_PF	0x00000004UL
#define	RFLAGS_AF	0x00000010UL
#define	RFLAGS_ZF	0x00000040UL
#define	RFLAGS_SF	0x00000080UL
#define	RFLAGS_TF	0x00000100UL
#define	RFLAGS_IF	0x00000200UL
#define	RFLAGS_DF	0x00000400UL
#define	RFLAGS_OF	0x00000800UL
#define	RFLAGS_RF	0x00010000UL
#define	RFLAGS_VM	0x00020000UL

enum vmk_exception {
	VMK_DE = 0, VMK_DB = 1, VMK_BP = 3, VMK_OF = 4, VMK_UD = 6, VMK_NM = 7,
	VMK_DF = 8, VMK_TS = 10, VMK_NP = 11, VMK_SS = 12, VMK_GP = 13,
	VMK_PF = 14, VMK_AC = 17, VMK_MC = 18
};

#define	PF_ERR_P	0x01U
#define	PF_ERR_W	0x02U
#define	PF_ERR_U	0x04U
#define	PF_ERR_I	0x10U

/* General registers in the processor's own numbering. */
enum vmk_gpr {
	VMK_RAX, VMK_RCX, VMK_RDX, VMK_RBX, VMK_RSP, VMK_RBP, VMK_RSI, VMK_RDI,
	VMK_R8, VMK_R9, VMK_R10, VMK_R11, VMK_R12, VMK_R13, VMK_R14, VMK_R15,
	VMK_NGPR
};

/* Segment registers in the processor's own numbering, then the tables. */
enum vmk_seg {
	VMK_ES, VMK_CS, VMK_SSEG, VMK_DS, VMK_FS, VMK_GS, VMK_LDTR, VMK_TR,
	VMK_GDTR, VMK_IDTR,
	VMK_NSEG
};

/* Registers that the processor extension keeps for us. */
enum vmk_creg {
	VMK_CR0, VMK_CR2, VMK_CR3, VMK_CR4, VMK_CR8, VMK_EFER, VMK_DR6, VMK_DR7,
	VMK_PAT, VMK_STAR, VMK_LSTAR, VMK_CSTAR, VMK_SFMASK, VMK_KERNEL_GS,
	VMK_SYSENTER_CS, VMK_SYSENTER_ESP, VMK_SYSENTER_EIP,
	VMK_NCREG
};

/* ---- guest memory ------------------------------------------------------ */

/*
 * 512 pages of a slot, aligned in the guest's address space.  pa[] holds a
 * host physical address, or 0 for a page that nobody has touched yet; a
 * whole chunk is pinned by one call where the host can, else page by page.
 */
struct vmk_chunk {
	void		*whole;			/* cookie of the 512 pin */
	void		**single;		/* cookies, or NULL */
	bool		 pinned_whole;
	uint64_t	*pa;			/* one page of addresses */
};

struct vmk_slot {
	uint64_t	 gfn;
	uint64_t	 npages;
	uint64_t	 hva;
	uint32_t	 id;
	uint32_t	 flags;			/* ABI_MEM_* */
	uint64_t	 first_chunk;		/* gfn >> 9 */
	uint64_t	 nchunks;
	struct vmk_chunk *chunk;
	uint64_t	*dirty;			/* one bit a page, or NULL */
};

struct vmk_mem {
	struct vmk_mutex lock;
	struct vmk_slot	*slot[VMK_MAX_SLOTS];	/* by id; NULL is empty */
	struct vmk_slot	*sorted[VMK_MAX_SLOTS];	/* by gfn */
	unsigned int	 nsorted;
	uint64_t	*npt;			/* root table */
	uint64_t	 npt_pa;
	uint64_t	 ntables;		/* table pages, root included */
};

/* ---- vCPU -------------------------------------------------------------- */

/* Bits of vcpu->requests. */
#define	VMK_REQ_EVENT		0x01U	/* look at interrupts again */
#define	VMK_REQ_NMI		0x02U
#define	VMK_REQ_INIT		0x04U
#define	VMK_REQ_SIPI		0x08U
#define	VMK_REQ_EOI		0x10U	/* KVM_EXIT_IOAPIC_EOI is due */
#define	VMK_REQ_TRIPLE		0x20U

struct vmk_segment {
	uint64_t	base;
	uint32_t	limit;
	uint16_t	selector;
	uint16_t	attr;		/* SVM form: type 0-3, S 4, DPL 5-6,
					   P 7, AVL 8, L 9, DB 10, G 11 */
};
#define	SEG_ATTR_TYPE	0x00fU
#define	SEG_ATTR_S	0x010U
#define	SEG_ATTR_DPL(a)	(((a) >> 5) & 3U)
#define	SEG_ATTR_P	0x080U
#define	SEG_ATTR_AVL	0x100U
#define	SEG_ATTR_L	0x200U
#define	SEG_ATTR_DB	0x400U
#define	SEG_ATTR_G	0x800U

struct vmk_event_state {
	bool		exc_pending;	/* to deliver at the next entry */
	bool		exc_injected;	/* delivery was under way */
	uint8_t		exc_vector;
	bool		exc_has_error;
	uint32_t	exc_error;
	bool		irq_injected;
	uint8_t		irq_vector;
	bool		nmi_injected;
	uint8_t		nmi_pending;
	bool		nmi_masked;
};

/* What the next RUN has to finish before it enters the guest. */
enum vmk_pending {
	VMK_PEND_NONE,
	VMK_PEND_PIO_IN,	/* a word of the PIO page into RAX */
	VMK_PEND_INS,		/* words of the PIO page into guest memory */
	VMK_PEND_MMIO_READ,	/* a fragment has been read */
	VMK_PEND_MMIO_WRITE	/* a fragment has been written */
};

/*
 * An instruction under emulation (vmk_emul.c).  An access that user space
 * completes is cut into fragments of at most 8 bytes that lie in one page;
 * no operand here is longer than 8 bytes, so two always suffice.
 */
struct vmk_emul {
	enum vmk_pending pending;
	/* what the processor fetched, for the next decoding alone */
	const uint8_t	*fetched;
	unsigned int	 nfetched;
	struct vmk_insn	 insn;
	uint64_t	 next_rip;
	/* memory operand, and MOVS' source */
	struct {
		uint64_t	gpa;
		uint8_t		len;
	} frag[2];
	uint8_t		 nfrag, cur;
	uint8_t		 data[8];
	/* results that the commit stores */
	bool		 set_reg, set_flags;
	uint64_t	 reg_value, flags;
	uint64_t	 rip;		/* to which pending belongs */
	/* port access */
	uint8_t		 size;
	uint32_t	 count;
};

struct vmk_object {
	enum { VMK_OBJ_VM = 1, VMK_OBJ_VCPU } kind;
};

struct vmk_exit;
struct vmk_lapic;
struct vmk_vm;

struct vmk_vcpu {
	struct vmk_object obj;
	struct vmk_vm	*vm;
	uint32_t	 id;		/* the user's, also the APIC id */
	uint32_t	 index;		/* in vm->vcpu[] */
	struct vmk_mutex lock;
	struct vmk_shared shared;
	struct abi_run	*run;		/* user-writable: fetch once, bound */

	/* Cross-thread. */
	uint32_t	 requests;	/* atomic VMK_REQ_* */
	uint32_t	 in_guest;	/* atomic */
	uint32_t	 cpu;		/* valid while in_guest */
	uint64_t	 entries;	/* atomic; counts entries */
	uint32_t	 sipi_vector;	/* atomic, 1 << 8 | vector */
	struct vmk_waitq waitq;
	struct vmk_lapic *lapic;	/* NULL with a user irqchip */
	uint32_t	 eoi_vector;

	/* State that the thread holding the lock owns. */
	uint64_t	 gpr[VMK_NGPR];
	uint64_t	 rip;
	uint64_t	 rflags;
	uint64_t	 dr[4];
	uint64_t	 xcr0;
	uint64_t	 apic_base;
	uint64_t	 tsc_offset;
	uint64_t	 tsc_adjust;
	uint64_t	 tsc_aux;
	uint64_t	 misc_enable;
	uint64_t	 mtrr_def_type;
	uint64_t	 mtrr_var[16];
	uint64_t	 mtrr_fix[11];
	uint64_t	 mcg_status, mcg_ctl;
	uint64_t	 tlb_gen;	/* vm->tlb_gen that the TLB honours */
	uint32_t	 mp_state;
	struct vmk_event_state ev;
	uint8_t		*xsave;		/* VMK_XSAVE_SIZE, 64-byte aligned */
	struct abi_cpuid_entry2 *cpuid;
	uint32_t	 ncpuid;
	bool		 has_run;
	bool		 want_window;	/* request_interrupt_window */
	bool		 ext_pending;	/* split: from user space's PIC */
	uint8_t		 ext_vector;
	int		 run_error;
	bool		 has_sigmask;
	struct vmk_sigset sigmask;	/* in force during RUN */
	uint32_t	 guest_debug;	/* ABI_GUESTDBG_* */
	bool		 debug_stepped;
	struct vmk_emul	 em;
	void		*arch;		/* struct svm_vcpu, struct vmx_vcpu */
};

/* ---- machine ----------------------------------------------------------- */

enum vmk_irqchip_mode { VMK_IRQCHIP_NONE, VMK_IRQCHIP_SPLIT,
	VMK_IRQCHIP_KERNEL };

struct vmk_ioeventfd {
	uint64_t	 addr, datamatch;
	uint32_t	 len, flags;
	struct vmk_event *ev;
};

struct vmk_irqchip;		/* PIC, I/O APIC, PIT, routing, irqfds */

struct vmk_vm {
	struct vmk_object obj;
	uint64_t	 serial;		/* no other ever has it */
	uint32_t	 refs;			/* atomic, open descriptors */
	struct vmk_mutex lock;
	struct vmk_mm	*mm;
	struct vmk_mem	 mem;
	uint64_t	 tlb_gen;		/* atomic */
	struct vmk_vcpu	*vcpu[VMK_MAX_VCPUS];
	uint32_t	 nvcpus;		/* atomic, only grows */
	enum vmk_irqchip_mode irqchip_mode;
	struct vmk_irqchip *irqchip;		/* vmk_irqchip.h */
	bool		 exit_on_emulation_failure;
	uint64_t	 clock_offset;		/* GET_CLOCK, ns */
	uint64_t	 tsc_base;		/* common zero of guest TSCs */
	struct vmk_mutex io_lock;		/* the two tables below */
	uint32_t	 nioeventfd;		/* atomic */
	struct vmk_ioeventfd *ioeventfd;
	uint32_t	 ncoalesced;		/* atomic */
	struct abi_coalesced_zone coalesced[VMK_MAX_COALESCED];
	struct abi_coalesced_ring *ring;	/* in vcpu 0's shared pages */
};

/* ---- vmk_dev.c --------------------------------------------------------- */

void	vmk_vm_get(struct vmk_vm *);

/* ---- vmk_vcpu.c: any context, any thread ------------------------------- */

static inline __attribute__((__unused__)) struct vmk_vcpu *
vmk_vcpu_at(struct vmk_vm *vm, uint32_t index)
{
	if (index >= __atomic_load_n(&vm->nvcpus, __ATOMIC_ACQUIRE))
		return (NULL);
	return (vm->vcpu[index]);
}

/* Set request bits, then make the vCPU look at them: kick it or wake it. */
void	vmk_vcpu_notify(struct vmk_vcpu *, uint32_t requests);
/* INIT and SIPI as a local APIC delivers them (SDM 3A 8.4.4). */
void	vmk_vcpu_sipi(struct vmk_vcpu *, uint8_t vector);
/* Split irqchip: report an EOI of this vector to user space. */
void	vmk_vcpu_report_eoi(struct vmk_vcpu *, uint8_t vector);

/* ---- vmk_mem.c --------------------------------------------------------- */

/* Against the quota of all machines; false: it is used up. */
bool	vmk_mem_charge(uint64_t pages);
void	vmk_mem_uncharge(uint64_t pages);
int	vmk_mem_init(struct vmk_vm *);
/* Drop all slots; then, after vmk_mm_detach(), the rest. */
void	vmk_mem_fini(struct vmk_vm *);
void	vmk_mem_free(struct vmk_vm *);
int	vmk_mem_set_region(struct vmk_vm *, const struct abi_memory_region *);
int	vmk_mem_get_dirty(struct vmk_vm *, const struct abi_dirty_log *);
/* What became of a nested page fault. */
enum vmk_fault { VMK_FAULT_MAPPED, VMK_FAULT_MMIO, VMK_FAULT_READONLY,
	VMK_FAULT_ERROR };
enum vmk_fault vmk_mem_fault(struct vmk_vm *, uint64_t gpa, bool write,
	    int *error);
/*
 * Copy to or from guest-physical memory; may cross pages.  VMK_ENXIO: not
 * (writable) memory; VMK_EFAULT: the user's mapping is missing; nothing, or
 * a leading part, was copied then.  Writes are seen by the dirty log.
 */
int	vmk_gpa_read(struct vmk_vm *, uint64_t gpa, void *, size_t);
int	vmk_gpa_write(struct vmk_vm *, uint64_t gpa, const void *, size_t);
/* Set bits in a 4- or 8-byte guest word atomically (accessed, dirty). */
int	vmk_gpa_or(struct vmk_vm *, uint64_t gpa, uint32_t bits, bool wide);
/* Make every vCPU forget translations; returns when all have left the guest. */
void	vmk_vm_flush(struct vmk_vm *);
/* Host memory went away (vmk_unmap_fn; arg is the machine). */
void	vmk_mem_unmapped(void *arg, uint64_t hva, uint64_t len);

/* ---- vmk_vcpu.c: creation and state ------------------------------------ */

int	vmk_vcpu_create(struct vmk_vm *, uint32_t id, int *fd);
void	vmk_vcpu_destroy(struct vmk_vcpu *);
void	vmk_vcpu_reset(struct vmk_vcpu *, bool init);
uint64_t vmk_vcpu_cr8(struct vmk_vcpu *);
int	vmk_vcpu_ioctl(struct vmk_vcpu *, uint32_t request, uint64_t arg,
	    int *result);

/* ---- vmk_run.c --------------------------------------------------------- */

int	vmk_vcpu_run(struct vmk_vcpu *);
/* Queue an exception; combines with one under way (SDM 3A table 6-5). */
void	vmk_inject(struct vmk_vcpu *, uint8_t vector, bool has_error,
	    uint32_t error);
void	vmk_inject_gp(struct vmk_vcpu *);
void	vmk_inject_ud(struct vmk_vcpu *);
void	vmk_inject_pf(struct vmk_vcpu *, uint64_t gva, uint32_t error);
/* Fill run->internal and return VMK_RUN_USER. */
enum vmk_next { VMK_RUN_AGAIN, VMK_RUN_USER };
enum vmk_next vmk_exit_emulation(struct vmk_vcpu *, const uint8_t *bytes,
	    unsigned int n);

/* ---- vmk_emul.c -------------------------------------------------------- */

/* Processor mode of the code segment: 16, 32 or 64. */
unsigned int vmk_code_bits(struct vmk_vcpu *);
unsigned int vmk_cpl(struct vmk_vcpu *);
#define	VMK_WALK_WRITE	1U
#define	VMK_WALK_USER	2U
#define	VMK_WALK_FETCH	4U
#define	VMK_WALK_PROBE	8U	/* leave accessed and dirty bits alone */
/*
 * Translate a linear address.  0; VMK_EFAULT with *pf_error set: a page fault
 * for the guest; VMK_ENXIO: the tables are not in memory.
 */
int	vmk_walk(struct vmk_vcpu *, uint64_t gva, unsigned int flags,
	    uint64_t *gpa, uint32_t *pf_error);
/* Arithmetic with flags; pure. */
uint64_t vmk_alu(unsigned int op, uint64_t a, uint64_t b, unsigned int size,
	    uint64_t *flags);
/* Move RIP past the instruction there, whose length nobody told us. */
enum vmk_next vmk_skip(struct vmk_vcpu *);
/* RIP behind an instruction of len bytes, and the step to there. */
uint64_t vmk_rip_after(struct vmk_vcpu *, unsigned int len);
void	vmk_advance(struct vmk_vcpu *, uint64_t next_rip);
enum vmk_next vmk_emul_mmio(struct vmk_vcpu *);
enum vmk_next vmk_emul_cr(struct vmk_vcpu *, const struct vmk_exit *);
enum vmk_next vmk_emul_io(struct vmk_vcpu *, uint16_t port, unsigned int size,
	    bool in, bool string, uint64_t next_rip);
/* Finish what the last exit left to user space. */
enum vmk_next vmk_emul_resume(struct vmk_vcpu *);

/* ---- vmk_io.c ---------------------------------------------------------- */

/* Bindings that take a guest write without a trip to user space. */
bool	vmk_io_write(struct vmk_vm *, bool pio, uint64_t addr, uint32_t len,
	    uint64_t data);
int	vmk_ioeventfd(struct vmk_vm *, const struct abi_ioeventfd *);
int	vmk_coalesced(struct vmk_vm *, const struct abi_coalesced_zone *,
	    bool add);
void	vmk_io_fini(struct vmk_vm *);

/* ---- vmk_cpuid.c ------------------------------------------------------- */

void	vmk_cpuid_init(void);
/* The table for GET_SUPPORTED_CPUID; returns entries, at most max. */
unsigned int vmk_cpuid_supported(struct abi_cpuid_entry2 *, unsigned int max);
void	vmk_cpuid(struct vmk_vcpu *, uint32_t leaf, uint32_t subleaf,
	    uint32_t out[4]);
uint64_t vmk_cr4_supported(void);
uint64_t vmk_xcr0_supported(void);
bool	vmk_xcr0_valid(uint64_t);
uint32_t vmk_xsave_size(uint64_t xcr0);
bool	vmk_canonical(uint64_t);

/* ---- vmk_msr.c --------------------------------------------------------- */

/* host: from KVM_SET_MSRS, not from the guest.  0 or VMK_EINVAL (#GP). */
int	vmk_msr_get(struct vmk_vcpu *, uint32_t msr, uint64_t *, bool host);
int	vmk_msr_set(struct vmk_vcpu *, uint32_t msr, uint64_t, bool host);
const uint32_t *vmk_msr_list(unsigned int *n);
/* Control-register rules shared by MOV to CR, SET_SREGS and WRMSR. */
int	vmk_set_cr0(struct vmk_vcpu *, uint64_t);
int	vmk_set_cr4(struct vmk_vcpu *, uint64_t);
int	vmk_set_xcr0(struct vmk_vcpu *, uint32_t index, uint64_t);

#endif /* !VMK_VM_H */

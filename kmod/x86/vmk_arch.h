/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_arch.h: what the core asks of a processor extension (SVM, VMX, or the
 * scripted processor of the unit tests).
 *
 * One table of functions, chosen once at module load.  A vCPU's general
 * registers, RIP and RFLAGS live in struct vmk_vcpu and are valid there
 * whenever the vCPU is outside the guest; everything else that the extension
 * switches lives with the extension and is reached by get and set.  These
 * are called by the thread that holds vcpu->lock, in or out of a CPU section.
 */
#ifndef VMK_ARCH_H
#define	VMK_ARCH_H

#include "vmk_vm.h"

/* Why the guest was left, in one vocabulary for both extensions. */
enum vmk_exit_kind {
	VMK_X_NONE,		/* host interrupt or NMI, already served */
	VMK_X_ABORTED,		/* not entered: a request or signal first */
	VMK_X_NESTED_FAULT,	/* gpa, write */
	VMK_X_NESTED_WALK,	/* same, while walking the guest's tables */
	VMK_X_IO,
	VMK_X_CPUID,
	VMK_X_RDMSR,
	VMK_X_WRMSR,
	VMK_X_HLT,
	VMK_X_XSETBV,
	VMK_X_CACHE,		/* INVD, WBINVD */
	VMK_X_PAUSE,
	VMK_X_CR_WRITE,		/* CR0, CR4 or CR8; mov_cr */
	VMK_X_HYPERCALL,
	VMK_X_EXCEPTION,	/* vector, error_code */
	VMK_X_IRQ_WINDOW,
	VMK_X_NMI_WINDOW,
	VMK_X_UD,		/* an instruction that no guest may have */
	VMK_X_GP,
	VMK_X_SHUTDOWN,
	VMK_X_INVALID,		/* the processor refused the state */
	VMK_X_UNKNOWN
};

struct vmk_exit {
	enum vmk_exit_kind kind;
	uint64_t	code;		/* the extension's own number */
	uint64_t	info1, info2;
	uint8_t		insn_len;	/* 0: not known */
	uint8_t		ninsn;		/* bytes that the processor fetched */
	const uint8_t	*insn;		/* till the next entry */
	uint64_t	gpa;
	bool		write;
	uint8_t		vector;
	uint32_t	error_code;
	struct {
		uint16_t	port;
		uint8_t		size;
		bool		in, string;
	} io;
	struct {
		bool		valid;	/* a MOV; else to be decoded */
		uint8_t		cr, gpr;
	} mov_cr;
};

/* What to deliver with this entry. */
enum vmk_inject_type { VMK_INJ_NONE, VMK_INJ_IRQ, VMK_INJ_NMI, VMK_INJ_EXC };
struct vmk_entry {
	enum vmk_inject_type inject;
	uint8_t		vector;
	uint32_t	error_code;
	bool		irq_window;	/* exit when IRQs become deliverable */
	bool		nmi_window;	/* exit at IRET */
	bool		cr8_exit;	/* exit at CR8 writes */
	bool		single_step;
	bool		trap_bp;	/* #BP goes to user space */
};

/* Nested page tables: one builder, two encodings. */
struct vmk_pte_format {
	unsigned int	levels;
	uint64_t	table;		/* bits of a non-leaf entry */
	uint64_t	leaf;		/* bits of a readable leaf */
	uint64_t	write;
	uint64_t	large;		/* 0: none (CVE-2018-12207) */
	uint64_t	dirty;
};

struct vmk_arch_ops {
	const char	*name;
	struct vmk_pte_format pte;
	/* VMK_ENODEV or VMK_EBUSY if unusable. */
	int	(*init)(void);
	void	(*fini)(void);
	void	(*resume)(void);
	int	(*vcpu_create)(struct vmk_vcpu *);
	void	(*vcpu_destroy)(struct vmk_vcpu *);
	uint64_t (*get_creg)(struct vmk_vcpu *, enum vmk_creg);
	void	(*set_creg)(struct vmk_vcpu *, enum vmk_creg, uint64_t);
	void	(*get_seg)(struct vmk_vcpu *, enum vmk_seg,
		    struct vmk_segment *);
	void	(*set_seg)(struct vmk_vcpu *, enum vmk_seg,
		    const struct vmk_segment *);
	/* Interrupt shadow, ABI_SHADOW_*. */
	unsigned int (*get_shadow)(struct vmk_vcpu *);
	void	(*set_shadow)(struct vmk_vcpu *, unsigned int);
	/*
	 * Outside a section, before it: read what load() may not sleep for.
	 * NULL if there is nothing.
	 */
	void	(*prepare)(struct vmk_vcpu *);
	/* Load and save FPU and debug registers; bracket a CPU section. */
	void	(*load)(struct vmk_vcpu *);
	void	(*unload)(struct vmk_vcpu *);
	/*
	 * Enter the guest once.  Inside a section, interrupts enabled.
	 * After blocking interrupts it must ask vmk_run_ready() and give
	 * VMK_X_ABORTED if that says no.  On return an event whose delivery
	 * was interrupted is back in vcpu->ev.
	 */
	void	(*enter)(struct vmk_vcpu *, const struct vmk_entry *,
		    struct vmk_exit *);
};

/* The one in use; set by vmk_module_init(). */
extern const struct vmk_arch_ops *vmk_arch;
/* The ones that this build has, in the order to try, NULL at the end. */
extern const struct vmk_arch_ops *const vmk_arch_all[];
extern struct vmk_arch_ops vmk_svm_ops, vmk_vmx_ops;

/*
 * vmk_run.c.  Marks the vCPU as in the guest and says whether it may enter;
 * *flush: guest translations cached under this vCPU must go first.
 * vmk_run_left() after the world switch (also after a refusal).
 */
bool	vmk_run_ready(struct vmk_vcpu *, bool *flush);
void	vmk_run_left(struct vmk_vcpu *);

#endif /* !VMK_ARCH_H */

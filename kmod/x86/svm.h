/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * svm.h: the virtual machine control block (APM 2, appendix B) and exit
 * codes (appendix C).
 */
#ifndef VMK_SVM_H
#define	VMK_SVM_H

#include "vmk_types.h"

/* intercepts[0]: CR accesses; [1]: DR; [2]: exceptions; [3], [4]: others. */
#define	SVM_ICEPT_CR_WRITE(n)	(1U << (16 + (n)))

#define	SVM_I3_INTR		0x00000001U
#define	SVM_I3_NMI		0x00000002U
#define	SVM_I3_SMI		0x00000004U
#define	SVM_I3_INIT		0x00000008U
#define	SVM_I3_VINTR		0x00000010U
#define	SVM_I3_CR0_SEL		0x00000020U
#define	SVM_I3_RDPMC		0x00008000U
#define	SVM_I3_CPUID		0x00040000U
#define	SVM_I3_RSM		0x00080000U
#define	SVM_I3_IRET		0x00100000U
#define	SVM_I3_INVD		0x00400000U
#define	SVM_I3_HLT		0x01000000U
#define	SVM_I3_INVLPGA		0x04000000U
#define	SVM_I3_IO		0x08000000U
#define	SVM_I3_MSR		0x10000000U
#define	SVM_I3_SHUTDOWN		0x80000000U
#define	SVM_I4_VMRUN		0x00000001U
#define	SVM_I4_VMMCALL		0x00000002U
#define	SVM_I4_VMLOAD		0x00000004U
#define	SVM_I4_VMSAVE		0x00000008U
#define	SVM_I4_STGI		0x00000010U
#define	SVM_I4_CLGI		0x00000020U
#define	SVM_I4_SKINIT		0x00000040U
#define	SVM_I4_RDTSCP		0x00000080U
#define	SVM_I4_WBINVD		0x00000200U
#define	SVM_I4_MONITOR		0x00000400U
#define	SVM_I4_MWAIT		0x00000800U
#define	SVM_I4_XSETBV		0x00002000U
#define	SVM_I4_RDPRU		0x00004000U

struct svm_seg {
	uint16_t	selector;
	uint16_t	attr;
	uint32_t	limit;
	uint64_t	base;
};

struct svm_vmcb {
	/* control area */
	uint32_t	icept[5];		/* 000 */
	uint8_t		pad014[0x03c - 0x014];
	uint16_t	pause_threshold;
	uint16_t	pause_count;
	uint64_t	iopm_pa;		/* 040 */
	uint64_t	msrpm_pa;
	uint64_t	tsc_offset;		/* 050 */
	uint32_t	asid;
	uint8_t		tlb_control;
	uint8_t		pad05d[3];
	uint8_t		v_tpr;			/* 060 */
	uint8_t		v_irq;			/* bit 0 V_IRQ */
	uint8_t		v_intr_prio;		/* 0-3 prio, bit 4 V_IGN_TPR */
	uint8_t		v_intr_masking;		/* bit 0 */
	uint8_t		v_intr_vector;
	uint8_t		pad065[3];
	uint64_t	shadow;			/* 068 */
	uint64_t	exitcode;		/* 070 */
	uint64_t	exitinfo1;
	uint64_t	exitinfo2;		/* 080 */
	uint64_t	exitintinfo;
	uint64_t	np_enable;		/* 090 */
	uint8_t		pad098[0x0a8 - 0x098];
	uint64_t	eventinj;		/* 0a8 */
	uint64_t	n_cr3;			/* 0b0 */
	uint64_t	lbr_enable;
	uint32_t	clean;			/* 0c0 */
	uint32_t	pad0c4;
	uint64_t	next_rip;		/* 0c8 */
	uint8_t		insn_len;		/* 0d0 */
	uint8_t		insn[15];
	uint8_t		pad0e0[0x400 - 0x0e0];
	/* state save area */
	struct svm_seg	es, cs, ss, ds, fs, gs, gdtr, ldtr, idtr, tr; /* 400 */
	uint8_t		pad4a0[0x4cb - 0x4a0];
	uint8_t		cpl;			/* 4cb */
	uint8_t		pad4cc[4];
	uint64_t	efer;			/* 4d0 */
	uint8_t		pad4d8[0x548 - 0x4d8];
	uint64_t	cr4;			/* 548 */
	uint64_t	cr3;
	uint64_t	cr0;
	uint64_t	dr7;			/* 560 */
	uint64_t	dr6;
	uint64_t	rflags;			/* 570 */
	uint64_t	rip;
	uint8_t		pad580[0x5d8 - 0x580];
	uint64_t	rsp;			/* 5d8 */
	uint8_t		pad5e0[0x5f8 - 0x5e0];
	uint64_t	rax;			/* 5f8 */
	uint64_t	star;			/* 600 */
	uint64_t	lstar;
	uint64_t	cstar;
	uint64_t	sfmask;
	uint64_t	kernel_gs;		/* 620 */
	uint64_t	sysenter_cs;
	uint64_t	sysenter_esp;
	uint64_t	sysenter_eip;
	uint64_t	cr2;			/* 640 */
	uint8_t		pad648[0x668 - 0x648];
	uint64_t	g_pat;			/* 668 */
	uint64_t	dbgctl;
	uint8_t		pad678[0x1000 - 0x678];
};

#define	SVM_AT(field, off)						\
	_Static_assert(offsetof(struct svm_vmcb, field) == (off), #field)
SVM_AT(iopm_pa, 0x040);
SVM_AT(asid, 0x058);
SVM_AT(v_tpr, 0x060);
SVM_AT(shadow, 0x068);
SVM_AT(exitcode, 0x070);
SVM_AT(np_enable, 0x090);
SVM_AT(eventinj, 0x0a8);
SVM_AT(clean, 0x0c0);
SVM_AT(insn, 0x0d1);
SVM_AT(es, 0x400);
SVM_AT(tr, 0x490);
SVM_AT(cpl, 0x4cb);
SVM_AT(efer, 0x4d0);
SVM_AT(cr4, 0x548);
SVM_AT(rip, 0x578);
SVM_AT(rsp, 0x5d8);
SVM_AT(rax, 0x5f8);
SVM_AT(cr2, 0x640);
SVM_AT(g_pat, 0x668);
_Static_assert(sizeof(struct svm_vmcb) == 0x1000, "VMCB is one page");

#define	SVM_X_CR_WRITE		0x010U
#define	SVM_X_EXC		0x040U
#define	SVM_X_INTR		0x060U
#define	SVM_X_NMI		0x061U
#define	SVM_X_SMI		0x062U
#define	SVM_X_INIT		0x063U
#define	SVM_X_VINTR		0x064U
#define	SVM_X_CR0_SEL		0x065U
#define	SVM_X_RDPMC		0x06fU
#define	SVM_X_CPUID		0x072U
#define	SVM_X_RSM		0x073U
#define	SVM_X_IRET		0x074U
#define	SVM_X_INVD		0x076U
#define	SVM_X_HLT		0x078U
#define	SVM_X_INVLPGA		0x07aU
#define	SVM_X_IO		0x07bU
#define	SVM_X_MSR		0x07cU
#define	SVM_X_SHUTDOWN		0x07fU
#define	SVM_X_VMRUN		0x080U
#define	SVM_X_VMMCALL		0x081U
#define	SVM_X_VMLOAD		0x082U
#define	SVM_X_VMSAVE		0x083U
#define	SVM_X_STGI		0x084U
#define	SVM_X_CLGI		0x085U
#define	SVM_X_SKINIT		0x086U
#define	SVM_X_RDTSCP		0x087U
#define	SVM_X_WBINVD		0x089U
#define	SVM_X_MONITOR		0x08aU
#define	SVM_X_MWAIT		0x08bU
#define	SVM_X_MWAIT_COND	0x08cU
#define	SVM_X_XSETBV		0x08dU
#define	SVM_X_RDPRU		0x08eU
#define	SVM_X_NPF		0x400U
#define	SVM_X_INVALID		(~0ULL)

/* EXITINFO1 of a nested page fault: APM 2 15.25.6. */
#define	SVM_NPF_WRITE		0x002ULL
#define	SVM_NPF_WALK		(1ULL << 33)

/*
 * svm_asm.S: CLGI, load the guest, VMRUN, save the guest, load the host,
 * STGI.  Called with interrupts disabled, returns likewise.  gpr is
 * vcpu->gpr; RAX and RSP travel in the VMCB.
 */
void	svm_enter_guest(uint64_t vmcb_pa, uint64_t *gpr, uint64_t host_pa);

#endif /* !VMK_SVM_H */

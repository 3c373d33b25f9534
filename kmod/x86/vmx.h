/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmx.h: VMCS field numbers (SDM 3D, appendix B), controls (SDM 3C, 25.6 to
 * 25.8), exit reasons (appendix C), and the pure functions of vmx_tables.c.
 */
#ifndef VMK_VMX_H
#define	VMK_VMX_H

#include "vmk_arch.h"

#define	MSR_FEATURE_CONTROL	0x3aU
#define	FEATURE_CONTROL_LOCK	0x1U
#define	FEATURE_CONTROL_VMXON	0x4U		/* outside SMX */
#define	MSR_VMX_BASIC		0x480U
#define	VMX_BASIC_TRUE		(1ULL << 55)
#define	MSR_VMX_CR0_FIXED0	0x486U
#define	MSR_VMX_CR4_FIXED0	0x488U
#define	MSR_VMX_PROCBASED2	0x48bU
#define	MSR_VMX_EPT_VPID	0x48cU
#define	EPT_WALK_4		(1ULL << 6)
#define	EPT_WRITE_BACK		(1ULL << 14)
#define	EPT_PAGE_2M		(1ULL << 16)
#define	EPT_INVEPT		(1ULL << 20)
#define	EPT_AD_BITS		(1ULL << 21)
#define	EPT_INVEPT_SINGLE	(1ULL << 25)
#define	EPT_INVVPID		(1ULL << 32)
#define	EPT_INVVPID_SINGLE	(1ULL << 41)

/* Which capability MSR describes which control word; +0xc for the true one. */
enum vmx_word { VMX_PIN, VMX_PROC, VMX_PROC2, VMX_EXIT, VMX_ENTRY,
	VMX_NWORDS };

#define	PIN_EXTERNAL		(1U << 0)
#define	PIN_NMI			(1U << 3)
#define	PIN_VIRTUAL_NMI		(1U << 5)
#define	PROC_IRQ_WINDOW		(1U << 2)
#define	PROC_TSC_OFFSET		(1U << 3)
#define	PROC_HLT		(1U << 7)
#define	PROC_MWAIT		(1U << 10)
#define	PROC_RDPMC		(1U << 11)
#define	PROC_CR3_LOAD		(1U << 15)
#define	PROC_CR3_STORE		(1U << 16)
#define	PROC_CR8_LOAD		(1U << 19)
#define	PROC_TPR_SHADOW		(1U << 21)
#define	PROC_NMI_WINDOW		(1U << 22)
#define	PROC_IO			(1U << 24)
#define	PROC_MSR_BITMAP		(1U << 28)
#define	PROC_MONITOR		(1U << 29)
#define	PROC_SECONDARY		(1U << 31)
#define	PROC2_EPT		(1U << 1)
#define	PROC2_VPID		(1U << 5)
#define	PROC2_WBINVD		(1U << 6)
#define	PROC2_UNRESTRICTED	(1U << 7)
#define	PROC2_PAUSE_LOOP	(1U << 10)
#define	PROC2_INVPCID		(1U << 12)
#define	EXIT_DEBUG		(1U << 2)
#define	EXIT_HOST64		(1U << 9)
#define	EXIT_SAVE_PAT		(1U << 18)
#define	EXIT_LOAD_PAT		(1U << 19)
#define	EXIT_SAVE_EFER		(1U << 20)
#define	EXIT_LOAD_EFER		(1U << 21)
#define	ENTRY_DEBUG		(1U << 2)
#define	ENTRY_LONG_MODE		(1U << 9)
#define	ENTRY_LOAD_PAT		(1U << 14)
#define	ENTRY_LOAD_EFER		(1U << 15)

/* What we cannot do without, and what we take where it is. */
struct vmx_controls { uint32_t need, want, never; };
extern const struct vmx_controls vmx_controls[VMX_NWORDS];

enum vmx_field {
	F_VPID = 0x0000,
	F_GUEST_ES = 0x0800,		/* + 2 * enum vmk_seg, to TR */
	F_HOST_ES = 0x0c00, F_HOST_CS = 0x0c02, F_HOST_SS = 0x0c04,
	F_HOST_DS = 0x0c06, F_HOST_FS = 0x0c08, F_HOST_GS = 0x0c0a,
	F_HOST_TR = 0x0c0c,
	F_MSR_BITMAP = 0x2004,
	F_EXIT_STORE = 0x2006, F_EXIT_LOAD = 0x2008, F_ENTRY_LOAD = 0x200a,
	F_TSC_OFFSET = 0x2010, F_VIRTUAL_APIC = 0x2012, F_EPTP = 0x201a,
	F_GPA = 0x2400,
	F_LINK = 0x2800, F_DEBUGCTL = 0x2802, F_PAT = 0x2804, F_EFER = 0x2806,
	F_PDPTE0 = 0x280a,
	F_HOST_PAT = 0x2c00, F_HOST_EFER = 0x2c02,
	F_PIN = 0x4000, F_PROC = 0x4002, F_EXC_BITMAP = 0x4004,
	F_PF_MASK = 0x4006, F_PF_MATCH = 0x4008, F_CR3_TARGETS = 0x400a,
	F_EXIT = 0x400c, F_EXIT_STORE_N = 0x400e, F_EXIT_LOAD_N = 0x4010,
	F_ENTRY = 0x4012, F_ENTRY_LOAD_N = 0x4014, F_ENTRY_INFO = 0x4016,
	F_ENTRY_ERROR = 0x4018, F_ENTRY_LEN = 0x401a, F_TPR_THRESHOLD = 0x401c,
	F_PROC2 = 0x401e, F_PLE_GAP = 0x4020, F_PLE_WINDOW = 0x4022,
	F_ERROR = 0x4400, F_REASON = 0x4402, F_INT_INFO = 0x4404,
	F_INT_ERROR = 0x4406, F_VECTORING = 0x4408, F_VECTORING_ERROR = 0x440a,
	F_INSN_LEN = 0x440c,
	F_LIMIT_ES = 0x4800,		/* + 2 * enum vmk_seg, GDTR, IDTR too */
	F_AR_ES = 0x4814, F_INTERRUPTIBILITY = 0x4824, F_ACTIVITY = 0x4826,
	F_SYSENTER_CS = 0x482a, F_HOST_SYSENTER_CS = 0x4c00,
	F_CR0_MASK = 0x6000, F_CR4_MASK = 0x6002, F_CR0_SHADOW = 0x6004,
	F_CR4_SHADOW = 0x6006,
	F_QUALIFICATION = 0x6400,
	F_CR0 = 0x6800, F_CR3 = 0x6802, F_CR4 = 0x6804,
	F_BASE_ES = 0x6806,		/* + 2 * enum vmk_seg, GDTR, IDTR too */
	F_DR7 = 0x681a, F_RSP = 0x681c, F_RIP = 0x681e, F_RFLAGS = 0x6820,
	F_PENDING_DB = 0x6822, F_SYSENTER_ESP = 0x6824,
	F_SYSENTER_EIP = 0x6826,
	F_HOST_CR0 = 0x6c00, F_HOST_CR3 = 0x6c02, F_HOST_CR4 = 0x6c04,
	F_HOST_FS_BASE = 0x6c06, F_HOST_GS_BASE = 0x6c08,
	F_HOST_TR_BASE = 0x6c0a, F_HOST_GDTR = 0x6c0c, F_HOST_IDTR = 0x6c0e,
	F_HOST_SYSENTER_ESP = 0x6c10, F_HOST_SYSENTER_EIP = 0x6c12,
	F_HOST_RSP = 0x6c14,		/* also in vmx_asm.S */
	F_HOST_RIP = 0x6c16
};

#define	INTR_STI		0x1U		/* interruptibility state */
#define	INTR_MOV_SS		0x2U
#define	INTR_NMI		0x8U

#define	INT_NMI_IRET		(1U << 12)	/* SDM 3C 28.2.3 */

#define	REASON_ENTRY_FAILED	(1U << 31)
enum vmx_reason {
	R_EXCEPTION = 0, R_EXTERNAL = 1, R_TRIPLE = 2, R_INIT = 3, R_SIPI = 4,
	R_IRQ_WINDOW = 7, R_NMI_WINDOW = 8, R_TASK = 9, R_CPUID = 10,
	R_GETSEC = 11, R_HLT = 12, R_INVD = 13, R_RDPMC = 15, R_RSM = 17,
	R_VMCALL = 18, R_VMCLEAR = 19, R_VMXON = 27, R_CR = 28, R_IO = 30,
	R_RDMSR = 31, R_WRMSR = 32, R_BAD_STATE = 33, R_BAD_MSR = 34,
	R_MWAIT = 36, R_MONITOR = 39, R_PAUSE = 40, R_MC_ENTRY = 41,
	R_EPT_VIOLATION = 48, R_EPT_MISCONFIG = 49, R_INVEPT = 50,
	R_RDTSCP = 51, R_INVVPID = 53, R_WBINVD = 54, R_XSETBV = 55,
	R_VMFUNC = 59
};

/* What vmx.c read after an exit, for vmx_decode(). */
struct vmx_exit {
	uint32_t	reason, int_info, int_error, insn_len;
	uint64_t	qualification, gpa, rip;
};

/*
 * The value of a control word under a capability MSR: bits 31:0 must be one,
 * bits 63:32 may be (SDM 3D A.3).  False if something needed is missing or
 * something unbearable is forced.
 */
bool	vmx_adjust(const struct vmx_controls *, uint64_t capability,
	    uint32_t *value);
/* Segment attributes, ours (APM) to VMX access rights and back. */
uint32_t vmx_access_rights(const struct vmk_segment *);
uint16_t vmx_attr(uint32_t access_rights);
/* A limit that VM entry takes has its granularity (SDM 3C 27.3.1.2). */
uint32_t vmx_granularity(uint32_t access_rights, uint32_t limit);
void	vmx_decode(const struct vmx_exit *, struct vmk_exit *);

/*
 * vmx_asm.S: VMLAUNCH or VMRESUME.  0: there was an exit; 1: the instruction
 * failed (F_ERROR).  Interrupts disabled.
 */
int	vmx_enter_guest(uint64_t *gpr, int launched);
void	vmx_exited(void);		/* F_HOST_RIP */

#endif /* !VMK_VMX_H */

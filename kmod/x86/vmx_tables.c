/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmx_tables.c: what of VMX is only tables and bits, without an instruction of
 * it, so that tests/kmod/vmx_test.c can run it anywhere.
 */
#include "x86.h"
#include "vmx.h"

/*
 * Required: EPT and unrestricted guest (no vm86, no identity map), virtual
 * NMIs, the TPR shadow, EFER and PAT switched by the processor.  CR3 accesses
 * exit by default and must not: with the true capability MSRs they need not.
 */
const struct vmx_controls vmx_controls[VMX_NWORDS] = {
	[VMX_PIN] = { PIN_EXTERNAL | PIN_NMI | PIN_VIRTUAL_NMI, 0, 0 },
	[VMX_PROC] = { PROC_TSC_OFFSET | PROC_HLT | PROC_MWAIT | PROC_RDPMC |
	    PROC_TPR_SHADOW | PROC_IO | PROC_MSR_BITMAP | PROC_MONITOR |
	    PROC_SECONDARY, 0, PROC_CR3_LOAD | PROC_CR3_STORE |
	    PROC_IRQ_WINDOW | PROC_NMI_WINDOW },
	[VMX_PROC2] = { PROC2_EPT | PROC2_UNRESTRICTED | PROC2_WBINVD,
	    PROC2_VPID | PROC2_PAUSE_LOOP | PROC2_INVPCID, 0 },
	[VMX_EXIT] = { EXIT_DEBUG | EXIT_HOST64 | EXIT_SAVE_PAT |
	    EXIT_LOAD_PAT | EXIT_SAVE_EFER | EXIT_LOAD_EFER, 0, 0 },
	[VMX_ENTRY] = { ENTRY_DEBUG | ENTRY_LOAD_PAT | ENTRY_LOAD_EFER, 0,
	    ENTRY_LONG_MODE },
};

bool
vmx_adjust(const struct vmx_controls *c, uint64_t capability, uint32_t *value)
{
	uint32_t must = (uint32_t)capability;
	uint32_t may = (uint32_t)(capability >> 32);

	*value = ((c->need | c->want) & may) | must;
	return ((c->need & ~*value) == 0 && (c->never & must) == 0);
}

#define	AR_UNUSABLE	0x10000U

/* Bits 0-7 agree; AVL, L, D/B and G sit four bits higher. */
uint32_t
vmx_access_rights(const struct vmk_segment *s)
{
	uint32_t ar = (s->attr & 0xffU) | (uint32_t)(s->attr & 0xf00) << 4;

	if ((s->attr & SEG_ATTR_P) == 0)
		return (ar | AR_UNUSABLE);
	/* What is in use has been accessed; a VMM may not have said so. */
	if ((s->attr & SEG_ATTR_S) != 0)
		ar |= 1;
	return (vmx_granularity(ar, s->limit));
}

uint16_t
vmx_attr(uint32_t ar)
{
	uint16_t attr = (uint16_t)((ar & 0xff) | ((ar >> 4) & 0xf00));

	if ((ar & AR_UNUSABLE) != 0)
		attr &= (uint16_t)~SEG_ATTR_P;
	return (attr);
}

uint32_t
vmx_granularity(uint32_t ar, uint32_t limit)
{
	if ((limit & 0xfff00000U) != 0)
		return (ar | 0x8000U);
	if ((limit & 0xfffU) != 0xfffU)
		return (ar & ~0x8000U);
	return (ar);
}

static enum vmk_exit_kind
simple_kind(uint32_t reason)
{
	switch (reason) {
	/* Blocking by NMI is in the VMCS: the window only says "look again". */
	case R_EXTERNAL: case R_INIT: case R_SIPI: case R_MC_ENTRY:
	case R_NMI_WINDOW:
		return (VMK_X_NONE);
	case R_TRIPLE:
		return (VMK_X_SHUTDOWN);
	case R_IRQ_WINDOW:
		return (VMK_X_IRQ_WINDOW);
	case R_CPUID:
		return (VMK_X_CPUID);
	case R_HLT:
		return (VMK_X_HLT);
	case R_INVD: case R_WBINVD:
		return (VMK_X_CACHE);
	case R_RDPMC:
		return (VMK_X_GP);
	case R_VMCALL:
		return (VMK_X_HYPERCALL);
	case R_RDMSR:
		return (VMK_X_RDMSR);
	case R_WRMSR:
		return (VMK_X_WRMSR);
	case R_PAUSE:
		return (VMK_X_PAUSE);
	case R_XSETBV:
		return (VMK_X_XSETBV);
	case R_GETSEC: case R_RSM: case R_MWAIT: case R_MONITOR:
	case R_INVEPT: case R_RDTSCP: case R_INVVPID: case R_VMFUNC:
		return (VMK_X_UD);
	default:
		break;
	}
	if (reason >= R_VMCLEAR && reason <= R_VMXON)
		return (VMK_X_UD);
	/* Task switches too: the VMM is told. */
	return (VMK_X_UNKNOWN);
}

/* SDM 3C table 28-5. */
static void
decode_io(const struct vmx_exit *v, struct vmk_exit *x)
{
	x->kind = VMK_X_IO;
	x->io.size = (uint8_t)((v->qualification & 7) + 1);
	x->io.in = (v->qualification & 8) != 0;
	x->io.string = (v->qualification & 0x10) != 0;
	x->io.port = (uint16_t)(v->qualification >> 16);
	x->info2 = v->rip + v->insn_len;
	if (x->io.size != 1 && x->io.size != 2 && x->io.size != 4)
		x->kind = VMK_X_UNKNOWN;
}

void
vmx_decode(const struct vmx_exit *v, struct vmk_exit *x)
{
	uint32_t reason = v->reason & 0xffffU;

	x->code = v->reason;
	x->info1 = v->qualification;
	x->info2 = v->gpa;
	if ((v->reason & REASON_ENTRY_FAILED) != 0) {
		x->kind = reason == R_MC_ENTRY ? VMK_X_NONE : VMK_X_INVALID;
		return;
	}
	switch (reason) {
	case R_EXCEPTION:
		x->kind = VMK_X_EXCEPTION;
		x->vector = (uint8_t)v->int_info;
		x->error_code = v->int_error;
		/* The host's handlers have seen these; see vmx_enter(). */
		if ((v->int_info & EVENT_TYPE) == EVENT_NMI ||
		    x->vector == VMK_MC)
			x->kind = VMK_X_NONE;
		return;
	case R_EPT_VIOLATION:
		/* SDM 3C table 28-7: bit 7 linear, bit 8 its final access. */
		x->kind = (v->qualification & 0x180) == 0x80 ?
		    VMK_X_NESTED_WALK : VMK_X_NESTED_FAULT;
		x->gpa = v->gpa;
		x->write = (v->qualification & 2) != 0;
		return;
	case R_IO:
		decode_io(v, x);
		return;
	case R_CR:
		/* SDM 3C table 28-3; CLTS and LMSW are decoded. */
		x->kind = VMK_X_CR_WRITE;
		x->mov_cr.valid = (v->qualification >> 4 & 3) == 0;
		x->mov_cr.cr = v->qualification & 0xf;
		x->mov_cr.gpr = v->qualification >> 8 & 0xf;
		break;
	default:
		x->kind = simple_kind(reason);
		break;
	}
	if (v->insn_len <= VMK_INSN_MAX)
		x->insn_len = (uint8_t)v->insn_len;
}

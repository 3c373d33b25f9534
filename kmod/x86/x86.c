/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * x86.c: FPU and debug registers around a CPU section; events.
 *
 * Theory.  The host has saved its user's FPU state and lets us use the
 * registers until vmk_cpu_exit().  The guest's state is kept in a standard
 * XSAVE area, always with the full set of components that we offer, moved
 * under the host's XCR0; the guest's own XCR0, which may be smaller, is in
 * force only while the guest executes.  So a guest that narrows XCR0 and
 * widens it again finds its registers, and XRSTOR never meets a component
 * that XCR0 lacks.
 *
 * Debug registers 0-3 are not switched by either extension.  The host's are
 * put aside only if the host uses them; DR7 is cleared first so that no
 * breakpoint of the guest's can hit in the host, and no host breakpoint in
 * the guest (APM 2 15.5, SDM 3C 26.3.1).  What the guest left in DR6 would be
 * taken for the cause of the host's next #DB.
 */
#include "x86.h"

#define	DR_READ(n, v)	__asm__ __volatile__("mov %%dr" #n ", %0" : "=r"(v))
#define	DR_WRITE(n, v)	__asm__ __volatile__("mov %0, %%dr" #n : : "r"(v))

#define	DR7_ENABLED	0xffU

static void
xrstor(const uint8_t *area, uint64_t mask)
{
	__asm__ __volatile__("xrstor64 %0" : : "m"(*area),
	    "a"((uint32_t)mask), "d"((uint32_t)(mask >> 32)) : "memory");
}

static void
xsave(uint8_t *area, uint64_t mask)
{
	__asm__ __volatile__("xsave64 %0" : "+m"(*area)
	    : "a"((uint32_t)mask), "d"((uint32_t)(mask >> 32)) : "memory");
}

static void
drs_write(const uint64_t dr[4])
{
	DR_WRITE(0, dr[0]);
	DR_WRITE(1, dr[1]);
	DR_WRITE(2, dr[2]);
	DR_WRITE(3, dr[3]);
}

static void
drs_read(uint64_t dr[4])
{
	DR_READ(0, dr[0]);
	DR_READ(1, dr[1]);
	DR_READ(2, dr[2]);
	DR_READ(3, dr[3]);
}

void
x86_load(struct vmk_vcpu *vcpu, struct x86_host *h, uint64_t *last, bool ibpb)
{
	/* What another guest taught the predictors is not for this one. */
	if (*last != vcpu->vm->serial) {
		if (ibpb && *last != 0)
			wrmsr(MSR_PRED_CMD, PRED_CMD_IBPB);
		*last = vcpu->vm->serial;
	}
	DR_READ(7, h->dr7);
	if ((h->dr7 & DR7_ENABLED) != 0) {
		DR_WRITE(7, 0UL);
		drs_read(h->dr);
	}
	drs_write(vcpu->dr);
	h->xcr0 = xgetbv();
	xrstor(vcpu->xsave, vmk_xcr0_supported());
	if (vcpu->xcr0 != h->xcr0)
		xsetbv(vcpu->xcr0);
}

void
x86_unload(struct vmk_vcpu *vcpu, struct x86_host *h)
{
	/* A section ends at an XSETBV, so this is what was loaded. */
	if (vcpu->xcr0 != h->xcr0)
		xsetbv(h->xcr0);
	xsave(vcpu->xsave, vmk_xcr0_supported());
	drs_read(vcpu->dr);
	DR_WRITE(6, DR6_FIXED);
	if ((h->dr7 & DR7_ENABLED) != 0) {
		drs_write(h->dr);
		DR_WRITE(7, h->dr7);
	}
}

/* Exceptions that push an error code: SDM 3A table 6-1. */
static bool
pushes_error(uint8_t vector)
{
	return (vector == VMK_DF || vector == VMK_AC ||
	    (vector >= VMK_TS && vector <= VMK_PF));
}

uint64_t
x86_event(struct vmk_event_state *ev, const struct vmk_entry *e,
    bool protected_mode)
{
	uint64_t event = EVENT_VALID | e->vector;

	switch (e->inject) {
	case VMK_INJ_IRQ:
		ev->irq_injected = false;
		return (event | EVENT_INTR);
	case VMK_INJ_NMI:
		ev->nmi_injected = false;
		return (event | EVENT_NMI);
	case VMK_INJ_EXC:
		ev->exc_injected = false;
		event |= EVENT_EXC;
		/* VMX refuses what does not fit the vector and the mode. */
		if (protected_mode && pushes_error(e->vector))
			event |= EVENT_ERROR | (uint64_t)e->error_code << 32;
		return (event);
	default:
		return (0);
	}
}

void
x86_take_back(struct vmk_event_state *ev, uint64_t event)
{
	if ((event & EVENT_VALID) == 0)
		return;
	switch (event & EVENT_TYPE) {
	case EVENT_INTR:
		ev->irq_injected = true;
		ev->irq_vector = (uint8_t)event;
		break;
	case EVENT_NMI:
		ev->nmi_injected = true;
		ev->nmi_masked = true;
		break;
	case EVENT_EXC:
		ev->exc_injected = true;
		ev->exc_vector = (uint8_t)event;
		ev->exc_has_error = (event & EVENT_ERROR) != 0;
		ev->exc_error = (uint32_t)(event >> 32);
		break;
	default:		/* INT n, INT3, INTO, INT1 run again */
		break;
	}
}

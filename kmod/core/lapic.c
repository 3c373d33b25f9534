/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * lapic.c: the local APIC (SDM 3A chapter 11, "APIC").
 *
 * Theory.  Registers are kept in the layout of the xAPIC page, which is also
 * the layout of KVM_GET_LAPIC; x2APIC gives the same registers as MSRs.
 * A vector travels IRR -> ISR (vmk_irq_ack) -> nothing (EOI).  PPR is computed
 * when needed from TPR and the highest ISR bit.
 *
 * The timer counts at 1 GHz before the divider, so a count is nanoseconds.
 * One host timer serves all three modes; its callback looks under the lock
 * whether it is still armed, because cancelling does not wait.  A periodic
 * timer never runs faster than MIN_PERIOD_NS, whatever the guest asks, and a
 * count of zero stops it (CVE-2013-6367 divided by it).
 *
 * Level-triggered vectors (TMR set) tell the I/O APIC, or with a split
 * irqchip user space, at EOI.
 */
#include "x86.h"
#include "vmk_chips.h"

#define	R_ID		0x020
#define	R_VERSION	0x030
#define	R_TPR		0x080
#define	R_PPR		0x0a0
#define	R_EOI		0x0b0
#define	R_LDR		0x0d0
#define	R_DFR		0x0e0
#define	R_SVR		0x0f0
#define	R_ISR		0x100
#define	R_TMR		0x180
#define	R_IRR		0x200
#define	R_ESR		0x280
#define	R_ICR		0x300
#define	R_ICR2		0x310
#define	R_LVT_TIMER	0x320
#define	R_LVT_THERMAL	0x330
#define	R_LVT_PMC	0x340
#define	R_LVT_LINT0	0x350
#define	R_LVT_LINT1	0x360
#define	R_LVT_ERROR	0x370
#define	R_TICR		0x380
#define	R_TCCR		0x390
#define	R_TDCR		0x3e0
#define	R_SELF_IPI	0x3f0

#define	LVT_MASKED	0x10000U
#define	LVT_MODE(v)	(((v) >> 8) & 7)
#define	TIMER_PERIODIC	0x20000U
#define	TIMER_DEADLINE	0x40000U
#define	TIMER_MODES	0x60000U
#define	SVR_ENABLED	0x100U

#define	BASE_BSP	0x100ULL
#define	BASE_X2APIC	0x400ULL
#define	BASE_ENABLED	0x800ULL
#define	MSR_APICBASE	0x1bU
#define	MSR_TSC_DEADLINE 0x6e0U
#define	MSR_X2APIC	0x800U

#define	VERSION		0x00050014U	/* six LVT entries */
#define	MIN_PERIOD_NS	100000ULL

struct vmk_lapic {
	struct vmk_spin	 lock;
	struct vmk_vcpu	*vcpu;
	uint32_t	 reg[ABI_LAPIC_SIZE / 4];
	struct vmk_timer timer;
	bool		 armed;
	uint64_t	 deadline;	/* ns, while armed */
	uint64_t	 period;	/* ns, 0: one shot */
	uint64_t	 tsc_deadline;
};

static uint32_t *
reg(struct vmk_lapic *l, uint32_t off)
{
	return (&l->reg[off / 4]);
}

/* Vector bitmaps: 32 bits in every 16 bytes. */
static bool
vec_test(struct vmk_lapic *l, uint32_t base, unsigned int v)
{
	return ((*reg(l, base + v / 32 * 16) >> (v % 32) & 1) != 0);
}

static void
vec_set(struct vmk_lapic *l, uint32_t base, unsigned int v, bool on)
{
	if (on)
		*reg(l, base + v / 32 * 16) |= 1U << (v % 32);
	else
		*reg(l, base + v / 32 * 16) &= ~(1U << (v % 32));
}

static int
vec_highest(struct vmk_lapic *l, uint32_t base)
{
	uint32_t w;
	int i;

	for (i = 7; i >= 0; i--) {
		w = *reg(l, base + (uint32_t)i * 16);
		if (w != 0)
			return (i * 32 + 31 - __builtin_clz(w));
	}
	return (-1);
}

static bool
x2apic(const struct vmk_lapic *l)
{
	return ((l->vcpu->apic_base & BASE_X2APIC) != 0);
}

static bool
hw_enabled(const struct vmk_lapic *l)
{
	return ((l->vcpu->apic_base & BASE_ENABLED) != 0);
}

static bool
enabled(struct vmk_lapic *l)
{
	return (hw_enabled(l) && (*reg(l, R_SVR) & SVR_ENABLED) != 0);
}

/* SDM 3A 11.8.3.1. */
static uint32_t
ppr(struct vmk_lapic *l)
{
	int isr = vec_highest(l, R_ISR);
	uint32_t tpr = *reg(l, R_TPR) & 0xff;

	if (isr < 0 || (tpr >> 4) >= ((uint32_t)isr >> 4))
		return (tpr);
	return ((uint32_t)isr & 0xf0);
}

/* ---- pending and acknowledge ------------------------------------------- */

static int
deliverable(struct vmk_lapic *l)
{
	int v;

	if (!enabled(l))
		return (-1);
	v = vec_highest(l, R_IRR);
	return (v >= 0 && ((uint32_t)v >> 4) > (ppr(l) >> 4) ? v : -1);
}

bool
vmk_lapic_takes_pic(struct vmk_vcpu *vcpu)
{
	struct vmk_lapic *l = vcpu->lapic;
	uint32_t lint0;

	if (!hw_enabled(l))
		return (vcpu->index == 0);
	lint0 = *reg(l, R_LVT_LINT0);
	return ((lint0 & LVT_MASKED) == 0 && LVT_MODE(lint0) == VMK_DM_EXTINT);
}

static bool
pic_waits(struct vmk_vcpu *vcpu)
{
	if (vcpu->vm->irqchip_mode == VMK_IRQCHIP_SPLIT)
		return (vcpu->ext_pending && vmk_lapic_takes_pic(vcpu));
	return (__atomic_load_n(&vcpu->vm->irqchip->pic.output,
	    __ATOMIC_ACQUIRE) && vmk_lapic_takes_pic(vcpu));
}

int
vmk_irq_pending(struct vmk_vcpu *vcpu)
{
	struct vmk_lapic *l = vcpu->lapic;
	uint64_t s;
	int v;

	/* The 8259's vector is known only at the acknowledge. */
	if (pic_waits(vcpu))
		return (256);
	s = vmk_spin_enter(&l->lock);
	v = deliverable(l);
	vmk_spin_exit(&l->lock, s);
	return (v);
}

bool
vmk_irq_blocked_by_tpr(struct vmk_vcpu *vcpu)
{
	struct vmk_lapic *l = vcpu->lapic;
	bool blocked = false;
	uint64_t s;
	int irr, isr;

	s = vmk_spin_enter(&l->lock);
	irr = vec_highest(l, R_IRR);
	isr = vec_highest(l, R_ISR);
	if (enabled(l) && irr >= 0)
		blocked = (irr >> 4) <= (int)((*reg(l, R_TPR) & 0xff) >> 4) &&
		    (irr >> 4) > (isr >> 4);
	vmk_spin_exit(&l->lock, s);
	return (blocked);
}

int
vmk_irq_ack(struct vmk_vcpu *vcpu)
{
	struct vmk_lapic *l = vcpu->lapic;
	uint64_t s;
	int v;

	if (pic_waits(vcpu)) {
		if (vcpu->ext_pending) {
			vcpu->ext_pending = false;
			return (vcpu->ext_vector);
		}
		s = vmk_spin_enter(&vcpu->vm->irqchip->lock);
		v = vmk_pic_ack(vcpu->vm);
		vmk_spin_exit(&vcpu->vm->irqchip->lock, s);
		return (v);
	}
	s = vmk_spin_enter(&l->lock);
	v = deliverable(l);
	if (v >= 0) {
		vec_set(l, R_IRR, (unsigned int)v, false);
		vec_set(l, R_ISR, (unsigned int)v, true);
	}
	vmk_spin_exit(&l->lock, s);
	return (v);
}

/* ---- delivery ---------------------------------------------------------- */

/* SDM 3A 11.6.2: physical and logical destinations. */
static bool
matches(struct vmk_lapic *l, const struct vmk_irq_msg *m)
{
	uint32_t ldr = *reg(l, R_LDR), id = l->vcpu->id;

	if (!hw_enabled(l))
		return (false);
	if (m->dest == 0xff || m->dest == 0xffffffffU)
		return (true);
	if (!m->logical)
		return (m->dest == id);
	if (x2apic(l)) {
		ldr = (id >> 4) << 16 | 1U << (id & 15);
		return ((m->dest >> 16) == (ldr >> 16) &&
		    (m->dest & ldr & 0xffff) != 0);
	}
	ldr >>= 24;
	if ((*reg(l, R_DFR) >> 28) == 0xf)
		return ((ldr & m->dest) != 0);
	return ((ldr >> 4) == (m->dest >> 4) && (ldr & m->dest & 0xf) != 0);
}

/* 1 taken, 0 pending already, -1 refused. */
static int
accept(struct vmk_lapic *l, const struct vmk_irq_msg *m)
{
	uint64_t s;
	int ret = -1;

	switch (m->mode) {
	case VMK_DM_FIXED: case VMK_DM_LOWEST:
		s = vmk_spin_enter(&l->lock);
		/* Vectors 0-15 are illegal (11.5.2). */
		if (enabled(l) && m->vector >= 16) {
			ret = !vec_test(l, R_IRR, m->vector);
			vec_set(l, R_IRR, m->vector, true);
			vec_set(l, R_TMR, m->vector, m->level);
		}
		vmk_spin_exit(&l->lock, s);
		if (ret == 1)
			vmk_vcpu_notify(l->vcpu, VMK_REQ_EVENT);
		return (ret);
	case VMK_DM_NMI:
		vmk_vcpu_notify(l->vcpu, VMK_REQ_NMI);
		return (1);
	case VMK_DM_INIT:
		vmk_vcpu_notify(l->vcpu, VMK_REQ_INIT);
		return (1);
	case VMK_DM_STARTUP:
		vmk_vcpu_sipi(l->vcpu, m->vector);
		return (1);
	default:
		return (-1);
	}
}

/* Lowest priority: the next in turn of those that match and listen. */
static int
deliver_lowest(struct vmk_vm *vm, const struct vmk_irq_msg *m)
{
	uint32_t n = __atomic_load_n(&vm->nvcpus, __ATOMIC_ACQUIRE), i;
	uint32_t start = __atomic_fetch_add(&vm->irqchip->next_lowest, 1,
	    __ATOMIC_RELAXED);
	struct vmk_lapic *l;

	for (i = 0; i < n; i++) {
		l = vm->vcpu[(start + i) % n]->lapic;
		if (l != NULL && matches(l, m) && enabled(l))
			return (accept(l, m));
	}
	return (-1);
}

int
vmk_lapic_deliver(struct vmk_vm *vm, const struct vmk_irq_msg *m)
{
	struct vmk_vcpu *vcpu;
	int ret = -1, r;
	uint32_t i;

	if (m->mode == VMK_DM_LOWEST)
		return (deliver_lowest(vm, m));
	for (i = 0; (vcpu = vmk_vcpu_at(vm, i)) != NULL; i++) {
		if (vcpu->lapic == NULL || !matches(vcpu->lapic, m))
			continue;
		r = accept(vcpu->lapic, m);
		if (r > 0)
			ret = ret > 0 ? ret + r : r;
		else if (r > ret)
			ret = r;
	}
	return (ret);
}

/* Interrupt command: SDM 3A 11.6.1. */
static void
send_ipi(struct vmk_lapic *l, uint32_t lo, uint32_t dest)
{
	struct vmk_irq_msg m = { .dest = dest, .vector = (uint8_t)lo,
		.mode = (lo >> 8) & 7, .logical = (lo >> 11 & 1) != 0 };
	struct vmk_vcpu *vcpu;
	uint32_t i;

	/* INIT level de-assert does nothing on these processors. */
	if (m.mode == VMK_DM_INIT && (lo & 0xc000) == 0x8000)
		return;
	switch (lo >> 18 & 3) {
	case 0:
		(void)vmk_lapic_deliver(l->vcpu->vm, &m);
		return;
	case 1:
		(void)accept(l, &m);
		return;
	default:
		for (i = 0; (vcpu = vmk_vcpu_at(l->vcpu->vm, i)) != NULL; i++)
			if (vcpu->lapic != NULL && hw_enabled(vcpu->lapic) &&
			    ((lo >> 18 & 3) == 2 || vcpu->lapic != l))
				(void)accept(vcpu->lapic, &m);
		return;
	}
}

static void
eoi(struct vmk_lapic *l)
{
	struct vmk_vm *vm = l->vcpu->vm;
	bool level = false;
	uint64_t s;
	int v;

	s = vmk_spin_enter(&l->lock);
	v = vec_highest(l, R_ISR);
	if (v >= 0) {
		vec_set(l, R_ISR, (unsigned int)v, false);
		level = vec_test(l, R_TMR, (unsigned int)v);
	}
	vmk_spin_exit(&l->lock, s);
	if (v < 0)
		return;
	if (level && vm->irqchip_mode == VMK_IRQCHIP_SPLIT) {
		vmk_vcpu_report_eoi(l->vcpu, (uint8_t)v);
	} else if (level) {
		s = vmk_spin_enter(&vm->irqchip->lock);
		vmk_ioapic_eoi(vm, (uint8_t)v);
		vmk_spin_exit(&vm->irqchip->lock, s);
	}
	/* The vCPU itself did this and looks again before it enters. */
}

/* ---- timer ------------------------------------------------------------- */

/* SDM 3A 11.5.4: bits 0, 1 and 3, as a power of two. */
static unsigned int
divide_shift(struct vmk_lapic *l)
{
	uint32_t d = *reg(l, R_TDCR);

	return ((((d & 3) | (d >> 1 & 4)) + 1) & 7);
}

static void
timer_fired(void *arg)
{
	struct vmk_lapic *l = arg;
	struct vmk_irq_msg m = { .mode = VMK_DM_FIXED };
	uint32_t lvt;
	uint64_t s, now = vmk_time_ns();

	s = vmk_spin_enter(&l->lock);
	if (!l->armed || now < l->deadline) {
		/* Cancelled, or armed anew for later. */
		if (l->armed)
			vmk_timer_arm(&l->timer, l->deadline);
		vmk_spin_exit(&l->lock, s);
		return;
	}
	lvt = *reg(l, R_LVT_TIMER);
	if (l->period != 0) {
		l->deadline += l->period;
		if (l->deadline <= now)		/* fell behind: skip */
			l->deadline = now + l->period;
		vmk_timer_arm(&l->timer, l->deadline);
	} else {
		l->armed = false;
		l->tsc_deadline = 0;
	}
	vmk_spin_exit(&l->lock, s);
	m.vector = (uint8_t)lvt;
	if ((lvt & LVT_MASKED) == 0)
		(void)accept(l, &m);
}

/* lapic->lock held for the timer functions below. */
static void
timer_stop(struct vmk_lapic *l)
{
	l->armed = false;
	l->period = 0;
	vmk_timer_cancel(&l->timer);
}

static void
timer_start(struct vmk_lapic *l, uint64_t ns, uint64_t period)
{
	l->armed = true;
	l->period = period;
	l->deadline = vmk_time_ns() + ns;
	vmk_timer_arm(&l->timer, l->deadline);
}

static void
timer_count(struct vmk_lapic *l)
{
	uint64_t ns = (uint64_t)*reg(l, R_TICR) << divide_shift(l);
	uint32_t modes = *reg(l, R_LVT_TIMER) & TIMER_MODES;

	timer_stop(l);
	if (ns == 0 || modes == TIMER_DEADLINE)
		return;
	if (modes == TIMER_PERIODIC) {
		if (ns < MIN_PERIOD_NS)
			ns = MIN_PERIOD_NS;
		timer_start(l, ns, ns);
	} else {
		timer_start(l, ns, 0);
	}
}

static uint64_t
guest_tsc(struct vmk_lapic *l)
{
	return (rdtsc() + l->vcpu->tsc_offset);
}

static void
timer_deadline(struct vmk_lapic *l)
{
	uint64_t now = guest_tsc(l), delta, khz = vmk_tsc_khz();

	timer_stop(l);
	if (l->tsc_deadline == 0)
		return;
	delta = l->tsc_deadline > now ? l->tsc_deadline - now : 0;
	/* About 30 years are as good as never, and cannot overflow. */
	delta = delta / khz > 1000000000000ULL ? 1000000000000000000ULL :
	    delta / khz * 1000000 + delta % khz * 1000000 / khz;
	timer_start(l, delta, 0);
}

void
vmk_lapic_tsc_changed(struct vmk_vcpu *vcpu)
{
	struct vmk_lapic *l = vcpu->lapic;
	uint64_t s = vmk_spin_enter(&l->lock);

	if (l->tsc_deadline != 0)
		timer_deadline(l);
	vmk_spin_exit(&l->lock, s);
}

static uint32_t
timer_current(struct vmk_lapic *l)
{
	uint64_t now = vmk_time_ns(), left;

	if (!l->armed || (*reg(l, R_LVT_TIMER) & TIMER_MODES) ==
	    TIMER_DEADLINE)
		return (0);
	left = l->deadline > now ? l->deadline - now : 0;
	return ((uint32_t)(left >> divide_shift(l)));
}

/* ---- registers --------------------------------------------------------- */

static uint32_t
reg_read(struct vmk_lapic *l, uint32_t off)
{
	uint32_t v;
	uint64_t s = vmk_spin_enter(&l->lock);

	switch (off) {
	case R_ID:
		v = x2apic(l) ? l->vcpu->id : *reg(l, R_ID);
		break;
	case R_LDR:
		v = x2apic(l) ? (l->vcpu->id >> 4) << 16 |
		    1U << (l->vcpu->id & 15) : *reg(l, R_LDR);
		break;
	case R_PPR:
		v = ppr(l);
		break;
	case R_TCCR:
		v = timer_current(l);
		break;
	case R_EOI: case R_SELF_IPI:
		v = 0;
		break;
	default:
		v = *reg(l, off);
		break;
	}
	vmk_spin_exit(&l->lock, s);
	return (v);
}

/* Writable bits of the LVT entries: SDM 3A figure 11-8. */
static uint32_t
lvt_mask(uint32_t off)
{
	switch (off) {
	case R_LVT_TIMER:
		return (0x700ff);
	case R_LVT_LINT0: case R_LVT_LINT1:
		return (0x1a7ff);
	case R_LVT_ERROR:
		return (0x100ff);
	default:
		return (0x107ff);
	}
}

static void
lvt_write(struct vmk_lapic *l, uint32_t off, uint32_t v)
{
	uint32_t old = *reg(l, off);

	v &= lvt_mask(off);
	/* While the APIC is software-disabled, entries stay masked. */
	if ((*reg(l, R_SVR) & SVR_ENABLED) == 0)
		v |= LVT_MASKED;
	*reg(l, off) = v;
	if (off == R_LVT_TIMER && ((old ^ v) & TIMER_MODES) != 0) {
		/* A change of mode disarms (11.5.4.1). */
		timer_stop(l);
		*reg(l, R_TICR) = 0;
		l->tsc_deadline = 0;
	}
}

static void
svr_write(struct vmk_lapic *l, uint32_t v)
{
	uint32_t off;

	*reg(l, R_SVR) = v & 0x3ff;
	if ((v & SVR_ENABLED) == 0)
		for (off = R_LVT_TIMER; off <= R_LVT_ERROR; off += 0x10)
			*reg(l, off) |= LVT_MASKED;
}

/* Registers whose write has an effect beyond this APIC come first. */
static void
reg_write(struct vmk_lapic *l, uint32_t off, uint32_t v)
{
	uint64_t s;

	switch (off) {
	case R_EOI:
		eoi(l);
		return;
	case R_ICR:
		*reg(l, R_ICR) = v & ~0x1000U;
		send_ipi(l, v, *reg(l, R_ICR2) >> 24);
		return;
	default:
		break;
	}
	s = vmk_spin_enter(&l->lock);
	switch (off) {
	case R_TPR:
		*reg(l, R_TPR) = v & 0xff;
		break;
	case R_LDR:
		if (!x2apic(l))
			*reg(l, R_LDR) = v & 0xff000000;
		break;
	case R_DFR:
		if (!x2apic(l))
			*reg(l, R_DFR) = v | 0x0fffffff;
		break;
	case R_SVR:
		svr_write(l, v);
		break;
	case R_ESR:
		*reg(l, R_ESR) = 0;
		break;
	case R_ICR2:
		*reg(l, R_ICR2) = v & 0xff000000;
		break;
	case R_LVT_TIMER: case R_LVT_THERMAL: case R_LVT_PMC:
	case R_LVT_LINT0: case R_LVT_LINT1: case R_LVT_ERROR:
		lvt_write(l, off, v);
		break;
	case R_TICR:
		if ((*reg(l, R_LVT_TIMER) & TIMER_MODES) == TIMER_DEADLINE)
			break;
		*reg(l, R_TICR) = v;
		timer_count(l);
		break;
	case R_TDCR:
		*reg(l, R_TDCR) = v & 0xb;
		if (l->armed && l->tsc_deadline == 0)
			timer_count(l);
		break;
	default:		/* read-only or reserved */
		break;
	}
	vmk_spin_exit(&l->lock, s);
}

bool
vmk_irqchip_mmio(struct vmk_vcpu *vcpu, uint64_t gpa, uint32_t len,
    uint64_t *data, bool write)
{
	struct vmk_lapic *l = vcpu->lapic;
	struct vmk_vm *vm = vcpu->vm;
	uint64_t base = vcpu->apic_base & ~0xfffULL, s;
	uint32_t off, v;

	if (hw_enabled(l) && !x2apic(l) && gpa >= base && gpa - base < 4096) {
		off = (uint32_t)(gpa - base);
		/* Aligned 32-bit accesses only (11.4.1); reads may be parts. */
		if (write) {
			if ((off & 0xf) == 0 && len == 4 &&
			    off < ABI_LAPIC_SIZE)
				reg_write(l, off, (uint32_t)*data);
			return (true);
		}
		v = (off & ~0xfU) < ABI_LAPIC_SIZE ?
		    reg_read(l, off & ~0xfU) : 0;
		*data = (off & 0xf) < 4 ? (uint64_t)v >> (8 * (off & 3)) : 0;
		return (true);
	}
	if (vm->irqchip_mode == VMK_IRQCHIP_KERNEL &&
	    gpa >= VMK_IOAPIC_BASE && gpa - VMK_IOAPIC_BASE < 4096) {
		v = (uint32_t)*data;
		s = vmk_spin_enter(&vm->irqchip->lock);
		vmk_ioapic_mmio(vm, (uint32_t)(gpa - VMK_IOAPIC_BASE), &v,
		    write);
		vmk_spin_exit(&vm->irqchip->lock, s);
		if (!write)
			*data = v;
		(void)len;
		return (true);
	}
	return (false);
}

/* ---- MSRs -------------------------------------------------------------- */

/* SDM 3A 11.12.5: the permitted changes of mode. */
static int
base_write(struct vmk_lapic *l, uint64_t v, bool host)
{
	struct vmk_vcpu *vcpu = l->vcpu;
	uint64_t old = vcpu->apic_base, mode = v & (BASE_X2APIC | BASE_ENABLED);
	uint64_t was = old & (BASE_X2APIC | BASE_ENABLED), s;

	if ((v >> 48) != 0 || (v & 0x2ff) != 0 || mode == BASE_X2APIC)
		return (VMK_EINVAL);
	if (!host) {
		if (was == (BASE_X2APIC | BASE_ENABLED) &&
		    mode == BASE_ENABLED)
			return (VMK_EINVAL);
		if (was == 0 && mode == (BASE_X2APIC | BASE_ENABLED))
			return (VMK_EINVAL);
	}
	s = vmk_spin_enter(&l->lock);
	vcpu->apic_base = v;
	if (mode == 0)
		timer_stop(l);
	vmk_spin_exit(&l->lock, s);
	return (0);
}

static int
x2apic_msr(struct vmk_lapic *l, uint32_t off, uint64_t *data, bool write)
{
	struct vmk_irq_msg self = { .mode = VMK_DM_FIXED };

	if (!x2apic(l) || off >= ABI_LAPIC_SIZE || off == R_DFR ||
	    off == R_ICR2)
		return (VMK_EINVAL);
	if (!write) {
		if (off == R_EOI || off == R_SELF_IPI)
			return (VMK_EINVAL);
		*data = reg_read(l, off);
		if (off == R_ICR)
			*data |= (uint64_t)*reg(l, R_ICR2) << 32;
		return (0);
	}
	switch (off) {
	case R_ICR:
		*reg(l, R_ICR2) = (uint32_t)(*data >> 32);
		*reg(l, R_ICR) = (uint32_t)*data & ~0x1000U;
		send_ipi(l, (uint32_t)*data, (uint32_t)(*data >> 32));
		return (0);
	case R_SELF_IPI:
		self.vector = (uint8_t)*data;
		(void)accept(l, &self);
		return (0);
	case R_ID: case R_VERSION: case R_PPR: case R_LDR: case R_TCCR:
		return (VMK_EINVAL);
	default:
		if ((*data >> 32) != 0 || (off >= R_ISR && off < R_ESR) ||
		    ((off == R_EOI || off == R_ESR) && *data != 0))
			return (VMK_EINVAL);
		reg_write(l, off, (uint32_t)*data);
		return (0);
	}
}

int
vmk_lapic_msr(struct vmk_vcpu *vcpu, uint32_t msr, uint64_t *data, bool write,
    bool host)
{
	struct vmk_lapic *l = vcpu->lapic;
	uint64_t s;

	if (msr == MSR_APICBASE) {
		if (write)
			return (base_write(l, *data, host));
		*data = vcpu->apic_base;
		return (0);
	}
	if (msr == MSR_TSC_DEADLINE) {
		s = vmk_spin_enter(&l->lock);
		if (!write) {
			*data = l->tsc_deadline;
		} else if ((*reg(l, R_LVT_TIMER) & TIMER_MODES) ==
		    TIMER_DEADLINE) {
			l->tsc_deadline = *data;
			timer_deadline(l);
		}
		vmk_spin_exit(&l->lock, s);
		return (0);
	}
	if (msr >= MSR_X2APIC && msr <= 0x8ff)
		return (x2apic_msr(l, (msr - MSR_X2APIC) * 16, data, write));
	return (VMK_ENOENT);
}

void
vmk_lapic_set_cr8(struct vmk_vcpu *vcpu, uint64_t cr8)
{
	struct vmk_lapic *l = vcpu->lapic;
	uint64_t s = vmk_spin_enter(&l->lock);

	*reg(l, R_TPR) = (uint32_t)(cr8 & 0xf) << 4;
	vmk_spin_exit(&l->lock, s);
}

uint64_t
vmk_lapic_get_cr8(struct vmk_vcpu *vcpu)
{
	return (*reg(vcpu->lapic, R_TPR) >> 4 & 0xf);
}

/* ---- life and state ---------------------------------------------------- */

int
vmk_lapic_create(struct vmk_vcpu *vcpu)
{
	struct vmk_lapic *l;

	l = vmk_alloc(sizeof(*l));
	if (l == NULL)
		return (VMK_ENOMEM);
	l->vcpu = vcpu;
	vmk_spin_init(&l->lock, "vmk lapic");
	vmk_timer_init(&l->timer, timer_fired, l);
	vcpu->lapic = l;
	return (0);
}

void
vmk_lapic_destroy(struct vmk_vcpu *vcpu)
{
	struct vmk_lapic *l = vcpu->lapic;
	uint64_t s;

	s = vmk_spin_enter(&l->lock);
	timer_stop(l);
	vmk_spin_exit(&l->lock, s);
	vmk_timer_fini(&l->timer);
	vmk_spin_fini(&l->lock);
	vcpu->lapic = NULL;
	vmk_free(l, sizeof(*l));
}

/* SDM 3A 11.4.7.1. */
void
vmk_lapic_reset(struct vmk_vcpu *vcpu, bool init)
{
	struct vmk_lapic *l = vcpu->lapic;
	bool bsp = vcpu->id == VMK_BOOT_ID;
	uint32_t off;
	uint64_t s;

	s = vmk_spin_enter(&l->lock);
	timer_stop(l);
	memset(l->reg, 0, sizeof(l->reg));
	l->tsc_deadline = 0;
	*reg(l, R_ID) = vcpu->id << 24;
	*reg(l, R_VERSION) = VERSION;
	*reg(l, R_DFR) = 0xffffffff;
	*reg(l, R_SVR) = 0xff;
	for (off = R_LVT_TIMER; off <= R_LVT_ERROR; off += 0x10)
		*reg(l, off) = LVT_MASKED;
	if (!init) {
		vcpu->apic_base = 0xfee00000 | BASE_ENABLED |
		    (bsp ? BASE_BSP : 0);
		/* Virtual wire, as firmware that knows no APIC expects. */
		if (bsp)
			*reg(l, R_LVT_LINT0) = VMK_DM_EXTINT << 8;
	}
	vmk_spin_exit(&l->lock, s);
}

int
vmk_lapic_get(struct vmk_vcpu *vcpu, struct abi_lapic_state *a)
{
	struct vmk_lapic *l = vcpu->lapic;
	uint64_t s = vmk_spin_enter(&l->lock);
	uint32_t v;

	memcpy(a->regs, l->reg, sizeof(a->regs));
	v = ppr(l);
	memcpy(a->regs + R_PPR, &v, 4);
	v = timer_current(l);
	memcpy(a->regs + R_TCCR, &v, 4);
	vmk_spin_exit(&l->lock, s);
	return (0);
}

int
vmk_lapic_set(struct vmk_vcpu *vcpu, const struct abi_lapic_state *a)
{
	struct vmk_lapic *l = vcpu->lapic;
	uint32_t off, left;
	uint64_t s = vmk_spin_enter(&l->lock);

	timer_stop(l);
	memcpy(l->reg, a->regs, sizeof(a->regs));
	*reg(l, R_ID) = vcpu->id << 24;
	*reg(l, R_VERSION) = VERSION;
	*reg(l, R_TPR) &= 0xff;
	*reg(l, R_SVR) &= 0x3ff;
	*reg(l, R_TDCR) &= 0xb;
	for (off = R_LVT_TIMER; off <= R_LVT_ERROR; off += 0x10)
		*reg(l, off) &= lvt_mask(off);
	memcpy(&left, a->regs + R_TCCR, 4);
	timer_count(l);
	/* Go on where the count stood. */
	if (l->armed && left != 0 && left < *reg(l, R_TICR)) {
		l->deadline = vmk_time_ns() +
		    ((uint64_t)left << divide_shift(l));
		vmk_timer_arm(&l->timer, l->deadline);
	}
	vmk_spin_exit(&l->lock, s);
	vmk_vcpu_notify(vcpu, VMK_REQ_EVENT);
	return (0);
}

/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * fake_cpu.c: struct vmk_arch_ops without a processor behind it.  The bits of
 * the nested tables are SVM's, four levels, so that fake_access() checks what
 * the hardware would read.
 */
#include <stdlib.h>

#include "fake_cpu.h"

fake_enter_fn *fake_enter;
static struct vmk_vcpu *last;

int fake_init_error;

static int
fake_init(void)
{
	return (fake_init_error);
}

static void
fake_fini(void)
{
}

static int
fake_vcpu_create(struct vmk_vcpu *vcpu)
{
	vcpu->arch = vmk_alloc(sizeof(struct fake_vcpu));
	if (vcpu->arch == NULL)
		return (VMK_ENOMEM);
	last = vcpu;
	return (0);
}

static void
fake_vcpu_destroy(struct vmk_vcpu *vcpu)
{
	vmk_free(vcpu->arch, sizeof(struct fake_vcpu));
}

static uint64_t
fake_get_creg(struct vmk_vcpu *vcpu, enum vmk_creg r)
{
	return (fake(vcpu)->creg[r]);
}

static void
fake_set_creg(struct vmk_vcpu *vcpu, enum vmk_creg r, uint64_t v)
{
	fake(vcpu)->creg[r] = v;
}

static void
fake_get_seg(struct vmk_vcpu *vcpu, enum vmk_seg n, struct vmk_segment *s)
{
	*s = fake(vcpu)->seg[n];
}

static void
fake_set_seg(struct vmk_vcpu *vcpu, enum vmk_seg n,
    const struct vmk_segment *s)
{
	fake(vcpu)->seg[n] = *s;
}

static unsigned int
fake_get_shadow(struct vmk_vcpu *vcpu)
{
	return (fake(vcpu)->shadow);
}

static void
fake_set_shadow(struct vmk_vcpu *vcpu, unsigned int shadow)
{
	fake(vcpu)->shadow = shadow;
}

static void
fake_load(struct vmk_vcpu *vcpu)
{
	if (fake(vcpu)->loaded)
		abort();
	fake(vcpu)->loaded = true;
}

static void
fake_unload(struct vmk_vcpu *vcpu)
{
	if (!fake(vcpu)->loaded)
		abort();
	fake(vcpu)->loaded = false;
}

static void
fake_do_enter(struct vmk_vcpu *vcpu, const struct vmk_entry *e,
    struct vmk_exit *x)
{
	bool flush = false;

	if (!vmk_run_ready(vcpu, &flush)) {
		vmk_run_left(vcpu);
		x->kind = VMK_X_ABORTED;
		return;
	}
	if (flush)
		fake(vcpu)->flushes++;
	fake(vcpu)->last = *e;
	switch (e->inject) {
	case VMK_INJ_IRQ:
		vcpu->ev.irq_injected = false;
		break;
	case VMK_INJ_NMI:
		vcpu->ev.nmi_injected = false;
		break;
	case VMK_INJ_EXC:
		vcpu->ev.exc_injected = false;
		break;
	default:
		break;
	}
	if (fake_enter != NULL) {
		fake_enter(vcpu, e, x);
	} else {
		x->kind = VMK_X_HLT;
		x->insn_len = 1;
	}
	vmk_run_left(vcpu);
}

static const struct vmk_arch_ops fake_ops = {
	.name = "a scripted processor",
	.pte = {
		.levels = 4,
		.table = 0x27,
		.leaf = 0x25,
		.write = 0x02,
		.large = 0x80,
		.dirty = 0x40,
	},
	.init = fake_init,
	.fini = fake_fini,
	.resume = fake_fini,
	.vcpu_create = fake_vcpu_create,
	.vcpu_destroy = fake_vcpu_destroy,
	.get_creg = fake_get_creg,
	.set_creg = fake_set_creg,
	.get_seg = fake_get_seg,
	.set_seg = fake_set_seg,
	.get_shadow = fake_get_shadow,
	.set_shadow = fake_set_shadow,
	.load = fake_load,
	.unload = fake_unload,
	.enter = fake_do_enter,
};

const struct vmk_arch_ops *const vmk_arch_all[] = { &fake_ops, NULL };

bool
fake_access(struct vmk_vm *vm, uint64_t gpa, bool write, uint64_t *hpa,
    unsigned int *level)
{
	uint64_t *t = vm->mem.npt, *e = NULL, span;
	unsigned int l;
	bool w = true;

	for (l = 4; ; l--) {
		e = &t[(gpa >> (12 + 9 * (l - 1))) & 511];
		if ((*e & 1) == 0 || (*e & 4) == 0)
			return (false);
		w = w && (*e & 2) != 0;
		if (l == 1 || (*e & 0x80) != 0)
			break;
		t = (uint64_t *)(uintptr_t)(*e & 0x000ffffffffff000ULL);
	}
	if (write && !w)
		return (false);
	__atomic_fetch_or(e, write ? 0x60 : 0x20, __ATOMIC_SEQ_CST);
	span = (1ULL << (12 + 9 * (l - 1))) - 1;
	*hpa = (*e & 0x000ffffffffff000ULL & ~span) | (gpa & span);
	*level = l;
	return (true);
}

struct vmk_vcpu *
fake_last_vcpu(void)
{
	return (last);
}

struct vmk_vm *
fake_last_vm(void)
{
	return (last->vm);
}

/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * irq_routing.c: from a GSI to chips and messages; irqfds; the irqchip object.
 *
 * Theory.  A global system interrupt is a number that user space, the PIT and
 * irqfds signal.  The routing table says where it goes: to pins of the 8259s
 * and the I/O APIC, or as a message to local APICs.  The table is replaced as
 * a whole: built and checked aside, swapped in under irqchip->lock, the old
 * one freed after.
 *
 * An irqfd raises its GSI from the eventfd's callback, in any context.  Level
 * pins get a pulse, as there is no resample eventfd.
 */
#include "vmk_chips.h"

/* ---- the table --------------------------------------------------------- */

static void
routing_free(struct vmk_routing *r)
{
	if (r == NULL)
		return;
	if (r->route != NULL)
		vmk_free(r->route, r->n * sizeof(r->route[0]));
	vmk_free(r, sizeof(*r));
}

static int
route_fill(struct vmk_route *r, const struct abi_irq_routing_entry *e,
    bool chips)
{
	if (e->gsi >= VMK_MAX_ROUTES || e->flags != 0)	/* CVE-2012-2137 */
		return (VMK_EINVAL);
	r->gsi = e->gsi;
	r->type = e->type;
	switch (e->type) {
	case ABI_IRQ_ROUTING_IRQCHIP:
		r->chip = e->u.irqchip.irqchip;
		r->pin = e->u.irqchip.pin;
		if (!chips)
			return (VMK_EINVAL);
		if (r->chip == ABI_IRQCHIP_IOAPIC)
			return (r->pin < ABI_IOAPIC_NUM_PINS ? 0 :
			    VMK_EINVAL);
		return (r->chip <= ABI_IRQCHIP_PIC_SLAVE && r->pin < 8 ? 0 :
		    VMK_EINVAL);
	case ABI_IRQ_ROUTING_MSI:
		r->addr = (uint64_t)e->u.msi.address_hi << 32 |
		    e->u.msi.address_lo;
		r->data = e->u.msi.data;
		return (0);
	default:
		return (VMK_EINVAL);
	}
}

static int
routing_build(const struct abi_irq_routing_entry *e, uint32_t n, bool chips,
    struct vmk_routing **out)
{
	struct vmk_routing *r;
	uint32_t i;
	int error = 0;

	r = vmk_alloc(sizeof(*r));
	if (r == NULL)
		return (VMK_ENOMEM);
	for (i = 0; i < VMK_MAX_ROUTES; i++)
		r->head[i] = VMK_NO_ROUTE;
	if (n > 0) {
		r->n = n;
		r->route = vmk_alloc(n * sizeof(r->route[0]));
		if (r->route == NULL)
			error = VMK_ENOMEM;
	}
	for (i = 0; i < n && error == 0; i++) {
		error = route_fill(&r->route[i], &e[i], chips);
		if (error != 0)
			break;
		r->route[i].next = r->head[e[i].gsi];
		r->head[e[i].gsi] = (uint16_t)i;
	}
	if (error != 0) {
		routing_free(r);
		return (error);
	}
	*out = r;
	return (0);
}

int
vmk_irq_set_routing(struct vmk_vm *vm, const struct abi_irq_routing_entry *e,
    uint32_t nr)
{
	struct vmk_irqchip *ic = vm->irqchip;
	struct vmk_routing *new, *old;
	uint64_t s;
	int error;

	error = routing_build(e, nr, vm->irqchip_mode == VMK_IRQCHIP_KERNEL,
	    &new);
	if (error != 0)
		return (error);
	s = vmk_spin_enter(&ic->lock);
	old = ic->routing;
	ic->routing = new;
	vmk_spin_exit(&ic->lock, s);
	routing_free(old);
	return (0);
}

/* ---- raising ----------------------------------------------------------- */

/* SDM 3A 11.11: address and data of a message-signalled interrupt. */
int
vmk_irq_msi(struct vmk_vm *vm, uint64_t addr, uint32_t data)
{
	struct vmk_irq_msg m = {
		.dest = (uint32_t)(addr >> 12 & 0xff),
		.logical = (addr & 4) != 0,
		.level = (data & 0x8000) != 0,
		.mode = data >> 8 & 7,
		.vector = (uint8_t)data,
	};

	return (vmk_lapic_deliver(vm, &m));
}

int
vmk_irq_raise(struct vmk_vm *vm, uint32_t gsi, unsigned int source,
    bool level)
{
	const struct vmk_routing *r = vm->irqchip->routing;
	int ret = -1, one;
	uint16_t i;

	if (gsi >= VMK_MAX_ROUTES)
		return (-1);
	for (i = r->head[gsi]; i != VMK_NO_ROUTE; i = r->route[i].next) {
		const struct vmk_route *to = &r->route[i];

		if (to->type == ABI_IRQ_ROUTING_MSI)
			one = level ? vmk_irq_msi(vm, to->addr, to->data) : 1;
		else if (to->chip == ABI_IRQCHIP_IOAPIC)
			one = vmk_ioapic_set(vm, to->pin, source, level);
		else
			one = vmk_pic_set(vm, to->chip * 8 + to->pin, source,
			    level);
		if (one > ret)
			ret = one;
	}
	return (ret);
}

int
vmk_irq_line(struct vmk_vm *vm, uint32_t gsi, bool level, int *status)
{
	uint64_t s;

	if (gsi >= VMK_MAX_ROUTES)
		return (VMK_EINVAL);
	s = vmk_spin_enter(&vm->irqchip->lock);
	*status = vmk_irq_raise(vm, gsi, VMK_SRC_USER, level);
	vmk_spin_exit(&vm->irqchip->lock, s);
	return (0);
}

bool
vmk_irqchip_pio(struct vmk_vcpu *vcpu, uint16_t port, uint32_t size,
    uint32_t *data, bool write)
{
	struct vmk_vm *vm = vcpu->vm;
	uint64_t s;
	bool done;

	/* The chips have byte registers. */
	if (vm->irqchip_mode != VMK_IRQCHIP_KERNEL || size != 1)
		return (false);
	s = vmk_spin_enter(&vm->irqchip->lock);
	done = vmk_pic_io(vm, port, data, write) ||
	    vmk_pit_io(vm, port, data, write);
	vmk_spin_exit(&vm->irqchip->lock, s);
	return (done);
}

/* ---- irqfd ------------------------------------------------------------- */

static void
irqfd_fired(void *arg)
{
	struct vmk_irqfd *f = arg;
	uint64_t s;

	s = vmk_spin_enter(&f->vm->irqchip->lock);
	(void)vmk_irq_raise(f->vm, f->gsi, VMK_SRC_IRQFD, true);
	(void)vmk_irq_raise(f->vm, f->gsi, VMK_SRC_IRQFD, false);
	vmk_spin_exit(&f->vm->irqchip->lock, s);
}

static void
irqfd_free(struct vmk_irqfd *f)
{
	vmk_event_unlisten(f->ev);
	vmk_event_put(f->ev);
	vmk_free(f, sizeof(*f));
	vmk_mem_uncharge(VMK_IRQFD_PAGES);
}

static int
irqfd_remove(struct vmk_irqchip *ic, const struct vmk_event *ev, uint32_t gsi)
{
	struct vmk_irqfd **p, *f;

	for (p = &ic->irqfds; (f = *p) != NULL; p = &f->next) {
		if (f->gsi != gsi || !vmk_event_same(f->ev, ev))
			continue;
		*p = f->next;
		ic->nirqfds--;
		irqfd_free(f);
		return (0);
	}
	return (VMK_ENOENT);
}

static int
irqfd_add(struct vmk_vm *vm, struct vmk_event *ev, uint32_t gsi)
{
	struct vmk_irqchip *ic = vm->irqchip;
	struct vmk_irqfd *f;
	int error;

	if (ic->nirqfds == VMK_MAX_IRQFD)
		return (VMK_ENOSPC);
	for (f = ic->irqfds; f != NULL; f = f->next)
		if (vmk_event_same(f->ev, ev))
			return (VMK_EBUSY);
	if (!vmk_mem_charge(VMK_IRQFD_PAGES))
		return (VMK_ENOMEM);
	f = vmk_alloc(sizeof(*f));
	if (f == NULL) {
		error = VMK_ENOMEM;
		goto fail;
	}
	f->vm = vm;
	f->ev = ev;
	f->gsi = gsi;
	error = vmk_event_listen(ev, irqfd_fired, f);
	if (error != 0)
		goto fail;
	f->next = ic->irqfds;
	ic->irqfds = f;
	ic->nirqfds++;
	return (0);
fail:
	if (f != NULL)
		vmk_free(f, sizeof(*f));
	vmk_mem_uncharge(VMK_IRQFD_PAGES);
	return (error);
}

int
vmk_irqfd(struct vmk_vm *vm, const struct abi_irqfd *a)
{
	bool add = (a->flags & ABI_IRQFD_DEASSIGN) == 0;
	struct vmk_event *ev;
	int error;

	/* CVE-2017-1000252 */
	if ((a->flags & ~ABI_IRQFD_DEASSIGN) != 0 ||
	    a->gsi >= VMK_MAX_ROUTES || a->fd > 0x7fffffff)
		return (VMK_EINVAL);
	error = vmk_event_get((int)a->fd, &ev);
	if (error != 0)
		return (error);
	error = add ? irqfd_add(vm, ev, a->gsi) :
	    irqfd_remove(vm->irqchip, ev, a->gsi);
	if (!add || error != 0)
		vmk_event_put(ev);
	return (error);
}

/* ---- life -------------------------------------------------------------- */

int
vmk_irqchip_cap(uint64_t cap)
{
	switch (cap) {
	case ABI_CAP_IRQCHIP: case ABI_CAP_PIT2:
	case ABI_CAP_PIT_STATE2: case ABI_CAP_REINJECT_CONTROL:
	case ABI_CAP_IRQ_INJECT_STATUS: case ABI_CAP_IRQFD:
	case ABI_CAP_SIGNAL_MSI: case ABI_CAP_SPLIT_IRQCHIP:
	case ABI_CAP_TSC_DEADLINE_TIMER:
		return (1);
	case ABI_CAP_IRQ_ROUTING:
		return (VMK_MAX_ROUTES);
	default:
		return (0);
	}
}

static int
create(struct vmk_vm *vm, enum vmk_irqchip_mode mode,
    const struct abi_irq_routing_entry *e, uint32_t n)
{
	struct vmk_irqchip *ic;
	int error;

	ic = vmk_alloc(sizeof(*ic));
	if (ic == NULL)
		return (VMK_ENOMEM);
	error = routing_build(e, n, mode == VMK_IRQCHIP_KERNEL, &ic->routing);
	if (error != 0) {
		vmk_free(ic, sizeof(*ic));
		return (error);
	}
	vmk_spin_init(&ic->lock, "vmk irqchip");
	vmk_pic_reset(&ic->pic);
	vmk_ioapic_reset(&ic->ioapic);
	/* Requests that take no lock look at vm->irqchip: publish it last. */
	__atomic_store_n(&vm->irqchip_mode, mode, __ATOMIC_SEQ_CST);
	__atomic_store_n(&vm->irqchip, ic, __ATOMIC_RELEASE);
	return (0);
}

int
vmk_irqchip_create(struct vmk_vm *vm)
{
	struct abi_irq_routing_entry *e;
	size_t size = 2 * ABI_IOAPIC_NUM_PINS * sizeof(e[0]);
	uint32_t n = 0, i;
	int error;

	e = vmk_alloc(size);
	if (e == NULL)
		return (VMK_ENOMEM);
	for (i = 0; i < ABI_IOAPIC_NUM_PINS; i++) {
		e[n].gsi = i;
		e[n].type = ABI_IRQ_ROUTING_IRQCHIP;
		e[n].u.irqchip.irqchip = ABI_IRQCHIP_IOAPIC;
		e[n++].u.irqchip.pin = i;
		if (i > 15)
			continue;
		e[n].gsi = i;
		e[n].type = ABI_IRQ_ROUTING_IRQCHIP;
		e[n].u.irqchip.irqchip = i / 8;
		e[n++].u.irqchip.pin = i % 8;
	}
	error = create(vm, VMK_IRQCHIP_KERNEL, e, n);
	vmk_free(e, size);
	return (error);
}

int
vmk_irqchip_create_split(struct vmk_vm *vm)
{
	return (create(vm, VMK_IRQCHIP_SPLIT, NULL, 0));
}

void
vmk_irqchip_destroy(struct vmk_vm *vm)
{
	struct vmk_irqchip *ic = vm->irqchip;
	struct vmk_irqfd *f;

	while ((f = ic->irqfds) != NULL) {
		ic->irqfds = f->next;
		irqfd_free(f);
	}
	vmk_pit_destroy(vm);
	/* Local APICs live on for a moment, with nothing behind them. */
	routing_free(ic->routing);
	vmk_spin_fini(&ic->lock);
	vm->irqchip = NULL;
	vmk_free(ic, sizeof(*ic));
}

int
vmk_irqchip_state(struct vmk_vm *vm, struct abi_irqchip *a, bool write)
{
	struct vmk_irqchip *ic = vm->irqchip;
	int error = 0;
	uint64_t s;

	s = vmk_spin_enter(&ic->lock);
	if (a->chip_id <= ABI_IRQCHIP_PIC_SLAVE && write)
		vmk_pic_state_set(vm, a->chip_id, &a->chip.pic);
	else if (a->chip_id <= ABI_IRQCHIP_PIC_SLAVE)
		a->chip.pic = ic->pic.chip[a->chip_id];
	else if (a->chip_id != ABI_IRQCHIP_IOAPIC)
		error = VMK_EINVAL;
	else if (write)
		vmk_ioapic_state_set(vm, &a->chip.ioapic);
	else
		vmk_ioapic_state_get(&ic->ioapic, &a->chip.ioapic);
	vmk_spin_exit(&ic->lock, s);
	return (error);
}

/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_io.c: guest writes that need no trip to user space.
 *
 * Theory.  Most writes to a device are either a doorbell, whose value does not
 * matter now, or harmless enough to be looked at later.  KVM_IOEVENTFD binds
 * the first kind to an eventfd; KVM_REGISTER_COALESCED_MMIO lets the second
 * kind collect in a ring that user space drains at its next exit.
 *
 * Both tables are short arrays, searched linearly under io_lock by vCPU
 * threads outside a CPU section.  A machine that uses neither pays one load.
 *
 * The ring lives in pages that user space can write.  Both indices are fetched
 * once and bounded before use (CVE-2019-14821); a nonsensical index counts
 * as a full ring, which sends the write to user space the ordinary way.
 */
#include "vmk_vm.h"

static bool
ioeventfd_match(const struct vmk_ioeventfd *e, bool pio, uint64_t addr,
    uint32_t len, uint64_t data)
{
	if (((e->flags & ABI_IOEVENTFD_PIO) != 0) != pio || e->addr != addr ||
	    (e->len != 0 && e->len != len))
		return (false);
	return ((e->flags & ABI_IOEVENTFD_DATAMATCH) == 0 ||
	    e->datamatch == data);
}

static bool
coalesce(struct vmk_vm *vm, bool pio, uint64_t addr, uint32_t len,
    uint64_t data)
{
	struct abi_coalesced_ring *ring = vm->ring;
	struct abi_coalesced_entry *e;
	uint32_t i, first, last;

	for (i = 0; i < vm->ncoalesced; i++) {
		const struct abi_coalesced_zone *z = &vm->coalesced[i];

		if ((z->pio != 0) == pio && addr >= z->addr &&
		    addr - z->addr < z->size &&
		    len <= z->size - (addr - z->addr))
			break;
	}
	if (i == vm->ncoalesced || ring == NULL)
		return (false);
	first = __atomic_load_n(&ring->first, __ATOMIC_ACQUIRE);
	last = __atomic_load_n(&ring->last, __ATOMIC_RELAXED);
	if (first >= ABI_COALESCED_MAX || last >= ABI_COALESCED_MAX ||
	    (last + 1) % ABI_COALESCED_MAX == first)
		return (false);
	e = (struct abi_coalesced_entry *)(void *)(ring + 1) + last;
	memset(e, 0, sizeof(*e));
	e->phys_addr = addr;
	e->len = len;
	e->pio = pio;
	memcpy(e->data, &data, sizeof(e->data));
	__atomic_store_n(&ring->last, (last + 1) % (uint32_t)ABI_COALESCED_MAX,
	    __ATOMIC_RELEASE);
	return (true);
}

bool
vmk_io_write(struct vmk_vm *vm, bool pio, uint64_t addr, uint32_t len,
    uint64_t data)
{
	uint32_t i;
	bool done = false;

	if (__atomic_load_n(&vm->nioeventfd, __ATOMIC_RELAXED) == 0 &&
	    __atomic_load_n(&vm->ncoalesced, __ATOMIC_RELAXED) == 0)
		return (false);
	vmk_mutex_enter(&vm->io_lock);
	for (i = 0; i < vm->nioeventfd && !done; i++) {
		if (ioeventfd_match(&vm->ioeventfd[i], pio, addr, len, data)) {
			vmk_event_signal(vm->ioeventfd[i].ev);
			done = true;
		}
	}
	if (!done)
		done = coalesce(vm, pio, addr, len, data);
	vmk_mutex_exit(&vm->io_lock);
	return (done);
}

static int
ioeventfd_check(const struct abi_ioeventfd *a)
{
	if ((a->flags & ~(ABI_IOEVENTFD_DATAMATCH | ABI_IOEVENTFD_PIO |
	    ABI_IOEVENTFD_DEASSIGN)) != 0)
		return (VMK_EINVAL);
	if (a->len != 0 && a->len != 1 && a->len != 2 && a->len != 4 &&
	    a->len != 8)
		return (VMK_EINVAL);
	if (a->addr + a->len < a->addr ||
	    (a->len == 0 && (a->flags & ABI_IOEVENTFD_DATAMATCH) != 0))
		return (VMK_EINVAL);
	return (0);
}

static int
ioeventfd_remove(struct vmk_vm *vm, const struct abi_ioeventfd *a,
    const struct vmk_event *ev)
{
	uint32_t want = a->flags & ~ABI_IOEVENTFD_DEASSIGN, i;

	for (i = 0; i < vm->nioeventfd; i++) {
		struct vmk_ioeventfd *e = &vm->ioeventfd[i];

		if (e->addr != a->addr || e->len != a->len ||
		    e->flags != want || !vmk_event_same(e->ev, ev) ||
		    ((want & ABI_IOEVENTFD_DATAMATCH) != 0 &&
		    e->datamatch != a->datamatch))
			continue;
		vmk_event_put(e->ev);
		*e = vm->ioeventfd[vm->nioeventfd - 1];
		__atomic_store_n(&vm->nioeventfd, vm->nioeventfd - 1,
		    __ATOMIC_RELAXED);
		return (0);
	}
	return (VMK_ENOENT);
}

static int
ioeventfd_add(struct vmk_vm *vm, const struct abi_ioeventfd *a,
    struct vmk_event *ev)
{
	struct vmk_ioeventfd *e;
	uint32_t i;

	if (vm->nioeventfd == VMK_MAX_IOEVENTFD)
		return (VMK_ENOSPC);
	/* Two bindings that one write would match. */
	for (i = 0; i < vm->nioeventfd; i++) {
		e = &vm->ioeventfd[i];
		if (e->addr == a->addr &&
		    (e->len == a->len || e->len == 0 || a->len == 0) &&
		    ((e->flags ^ a->flags) & ABI_IOEVENTFD_PIO) == 0 &&
		    ((e->flags & a->flags & ABI_IOEVENTFD_DATAMATCH) == 0 ||
		    e->datamatch == a->datamatch))
			return (VMK_EEXIST);
	}
	e = &vm->ioeventfd[vm->nioeventfd];
	e->addr = a->addr;
	e->len = a->len;
	e->flags = a->flags;
	e->datamatch = a->datamatch;
	e->ev = ev;
	__atomic_store_n(&vm->nioeventfd, vm->nioeventfd + 1,
	    __ATOMIC_RELAXED);
	return (0);
}

/* KVM_IOEVENTFD; vm->lock held. */
int
vmk_ioeventfd(struct vmk_vm *vm, const struct abi_ioeventfd *a)
{
	bool add = (a->flags & ABI_IOEVENTFD_DEASSIGN) == 0;
	struct vmk_event *ev;
	int error;

	error = ioeventfd_check(a);
	if (error != 0)
		return (error);
	if (vm->ioeventfd == NULL) {
		vm->ioeventfd = vmk_alloc(VMK_MAX_IOEVENTFD *
		    sizeof(vm->ioeventfd[0]));
		if (vm->ioeventfd == NULL)
			return (VMK_ENOMEM);
	}
	error = vmk_event_get(a->fd, &ev);
	if (error != 0)
		return (error);
	vmk_mutex_enter(&vm->io_lock);
	error = add ? ioeventfd_add(vm, a, ev) : ioeventfd_remove(vm, a, ev);
	vmk_mutex_exit(&vm->io_lock);
	if (!add || error != 0)
		vmk_event_put(ev);
	return (error);
}

/* KVM_(UN)REGISTER_COALESCED_MMIO; vm->lock held. */
int
vmk_coalesced(struct vmk_vm *vm, const struct abi_coalesced_zone *z, bool add)
{
	uint32_t i, n = 0;
	int error = 0;

	if (z->pio > 1 || z->addr + z->size < z->addr)
		return (VMK_EINVAL);
	vmk_mutex_enter(&vm->io_lock);
	if (add) {
		if (vm->ncoalesced == VMK_MAX_COALESCED)
			error = VMK_ENOSPC;
		else
			vm->coalesced[vm->ncoalesced] = *z;
		n = vm->ncoalesced + (error == 0);
	} else {
		/* Everything inside the given range goes. */
		for (i = 0; i < vm->ncoalesced; i++) {
			const struct abi_coalesced_zone *o =
			    &vm->coalesced[i];

			if (o->pio == z->pio && o->addr >= z->addr &&
			    o->addr - z->addr <= z->size &&
			    o->size <= z->size - (o->addr - z->addr))
				continue;
			vm->coalesced[n++] = *o;
		}
	}
	__atomic_store_n(&vm->ncoalesced, n, __ATOMIC_RELAXED);
	vmk_mutex_exit(&vm->io_lock);
	return (error);
}

void
vmk_io_fini(struct vmk_vm *vm)
{
	uint32_t i;

	for (i = 0; i < vm->nioeventfd; i++)
		vmk_event_put(vm->ioeventfd[i].ev);
	if (vm->ioeventfd != NULL)
		vmk_free(vm->ioeventfd,
		    VMK_MAX_IOEVENTFD * sizeof(vm->ioeventfd[0]));
}

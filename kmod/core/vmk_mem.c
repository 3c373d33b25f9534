/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_mem.c: guest memory: slots, pinned host pages, nested page tables.
 *
 * Theory.  User space describes the guest's memory as slots: a range of
 * guest-physical pages backed by a range of its own virtual memory.  Three
 * structures follow from that, each a cache of the one before:
 *
 *   slot -> chunk -> nested page table
 *
 * A chunk is 512 guest pages aligned in guest-physical space.  When the
 * guest (or the core on its behalf) first touches a page, the chunk around
 * it is pinned: the host wires the user pages and says where they are.  If
 * the user's mapping does not cover the whole chunk, that page alone is
 * pinned.  Pages stay pinned until the slot goes or the host announces
 * that the mapping goes.  This costs the host the freedom to swap them; in
 * exchange the core needs no notifier from the host for correctness.
 * CAP_SYNC_MMU is therefore not offered, and QEMU turns ballooning off.
 *
 * The nested tables hold only translations of pinned pages and may be
 * emptied at any time; the next access fills them again.
 *
 * Invariants:
 *  - An entry of the nested tables refers to a pinned page.
 *  - A page is unpinned only after its entries are gone, every translation
 *    cache has been told (vm->tlb_gen), and every vCPU has been out of the
 *    guest since (vmk_vm_flush): CVE-2021-22543's class.
 *  - Kernel access to guest memory happens under mem.lock, through the pinned
 *    page, and never keeps a pointer: CVE-2019-3016's class.
 *
 * Dirty logging uses the processor's dirty bits.  While a slot logs, it has
 * only 4 KiB leaves; GET_DIRTY_LOG collects and clears their dirty bits and
 * then flushes.  What a vCPU writes between clearing and flushing through a
 * stale translation lands in a page that this very call reports.  The core's
 * own writes go to slot->dirty.
 *
 * Limits: VMK_MAX_SLOT_PAGES a slot, and one quota over all machines to which
 * pinned pages, pages of tables and the bookkeeping of slots are charged, and
 * a fixed sum for each machine, vCPU and irqfd.
 */
#include "vmk_arch.h"

#define	CHUNK_SHIFT	9
#define	CHUNK_PAGES	512U
#define	VMK_MAX_SLOT_PAGES	(1ULL << 26)		/* 256 GiB */
#define	PTE_ADDR	0x000ffffffffff000ULL

/* Pages charged to all machines; atomic. */
static uint64_t quota_used;

bool
vmk_mem_charge(uint64_t n)
{
	uint64_t now;

	now = __atomic_add_fetch(&quota_used, n, __ATOMIC_RELAXED);
	if (now <= vmk_tunables.max_pinned_pages)
		return (true);
	__atomic_sub_fetch(&quota_used, n, __ATOMIC_RELAXED);
	return (false);
}

void
vmk_mem_uncharge(uint64_t n)
{
	__atomic_sub_fetch(&quota_used, n, __ATOMIC_RELAXED);
}

/* Kernel memory that grows with what a user asks for is charged as well. */
static void *
quota_alloc(size_t size)
{
	uint64_t pages = (size + VMK_PAGE_SIZE - 1) >> VMK_PAGE_SHIFT;
	void *p;

	if (!vmk_mem_charge(pages))
		return (NULL);
	p = vmk_alloc(size);
	if (p == NULL)
		vmk_mem_uncharge(pages);
	return (p);
}

static void
quota_free(void *p, size_t size)
{
	vmk_free(p, size);
	vmk_mem_uncharge((size + VMK_PAGE_SIZE - 1) >> VMK_PAGE_SHIFT);
}

uint64_t
vmk_mem_charged(void)
{
	return (__atomic_load_n(&quota_used, __ATOMIC_RELAXED));
}

/* ---- slots ------------------------------------------------------------- */

/* Binary search; mem.lock held. */
static struct vmk_slot *
slot_find(struct vmk_mem *mem, uint64_t gfn)
{
	unsigned int lo = 0, hi = mem->nsorted, mid;
	struct vmk_slot *s;

	while (lo < hi) {
		mid = (lo + hi) / 2;
		s = mem->sorted[mid];
		if (gfn < s->gfn)
			hi = mid;
		else if (gfn - s->gfn >= s->npages)
			lo = mid + 1;
		else
			return (s);
	}
	return (NULL);
}

static void
slot_sort_in(struct vmk_mem *mem, struct vmk_slot *s)
{
	unsigned int i = mem->nsorted;

	while (i > 0 && mem->sorted[i - 1]->gfn > s->gfn) {
		mem->sorted[i] = mem->sorted[i - 1];
		i--;
	}
	mem->sorted[i] = s;
	mem->nsorted++;
}

static void
slot_sort_out(struct vmk_mem *mem, const struct vmk_slot *s)
{
	unsigned int i, j;

	for (i = j = 0; i < mem->nsorted; i++)
		if (mem->sorted[i] != s)
			mem->sorted[j++] = mem->sorted[i];
	mem->nsorted = j;
}

static uint64_t
bitmap_words(uint64_t npages)
{
	return ((npages + 63) / 64);
}

/* ---- pins -------------------------------------------------------------- */

static uint64_t
chunk_first_gfn(const struct vmk_slot *s, uint64_t ci)
{
	return ((s->first_chunk + ci) << CHUNK_SHIFT);
}

static bool
slot_writable(const struct vmk_slot *s)
{
	return ((s->flags & ABI_MEM_READONLY) == 0);
}

/*
 * Give the host address of a guest page, pinning it if it is not.  mem.lock
 * held; the caller's process owns the address space.
 */
static int
slot_page(struct vmk_vm *vm, struct vmk_slot *s, uint64_t gfn, uint64_t *pa)
{
	uint64_t ci = (gfn >> CHUNK_SHIFT) - s->first_chunk, first;
	struct vmk_chunk *c = &s->chunk[ci];
	unsigned int idx = (unsigned int)(gfn & (CHUNK_PAGES - 1));
	uint64_t hva;
	int error;

	if (c->pa != NULL && c->pa[idx] != 0) {
		*pa = c->pa[idx];
		return (0);
	}
	if (!vmk_mm_is_current(vm->mm))
		return (VMK_EIO);
	if (c->pa == NULL) {
		c->pa = quota_alloc(CHUNK_PAGES * sizeof(c->pa[0]));
		if (c->pa == NULL)
			return (VMK_ENOMEM);
		/* The whole chunk, if the slot covers it. */
		first = chunk_first_gfn(s, ci);
		if (first >= s->gfn &&
		    first + CHUNK_PAGES <= s->gfn + s->npages &&
		    vmk_mem_charge(CHUNK_PAGES)) {
			hva = s->hva + ((first - s->gfn) << VMK_PAGE_SHIFT);
			if (vmk_pin(vm->mm, hva, CHUNK_PAGES, slot_writable(s),
			    c->pa, &c->whole) == 0) {
				c->pinned_whole = true;
				*pa = c->pa[idx];
				return (0);
			}
			vmk_mem_uncharge(CHUNK_PAGES);
			memset(c->pa, 0, CHUNK_PAGES * sizeof(c->pa[0]));
		}
	}
	if (c->single == NULL) {
		c->single = quota_alloc(CHUNK_PAGES * sizeof(c->single[0]));
		if (c->single == NULL)
			return (VMK_ENOMEM);
	}
	if (!vmk_mem_charge(1))
		return (VMK_ENOMEM);
	hva = s->hva + ((gfn - s->gfn) << VMK_PAGE_SHIFT);
	error = vmk_pin(vm->mm, hva, 1, slot_writable(s), &c->pa[idx],
	    &c->single[idx]);
	if (error != 0) {
		c->pa[idx] = 0;
		vmk_mem_uncharge(1);
		return (error);
	}
	*pa = c->pa[idx];
	return (0);
}

/* Release a chunk's pins; nothing maps them any more. */
static void
chunk_release(struct vmk_vm *vm, struct vmk_slot *s, uint64_t ci)
{
	struct vmk_chunk *c = &s->chunk[ci];
	uint64_t first = chunk_first_gfn(s, ci);
	unsigned int i;

	if (c->pa == NULL)
		return;
	if (c->pinned_whole) {
		vmk_unpin(vm->mm, c->whole,
		    s->hva + ((first - s->gfn) << VMK_PAGE_SHIFT),
		    CHUNK_PAGES, slot_writable(s), c->pa);
		vmk_mem_uncharge(CHUNK_PAGES);
	} else {
		for (i = 0; i < CHUNK_PAGES; i++) {
			if (c->pa[i] == 0)
				continue;
			vmk_unpin(vm->mm, c->single[i],
			    s->hva + ((first + i - s->gfn) << VMK_PAGE_SHIFT),
			    1, slot_writable(s), &c->pa[i]);
			vmk_mem_uncharge(1);
		}
	}
	quota_free(c->pa, CHUNK_PAGES * sizeof(c->pa[0]));
	if (c->single != NULL)
		quota_free(c->single, CHUNK_PAGES * sizeof(c->single[0]));
	memset(c, 0, sizeof(*c));
}

static void
slot_free(struct vmk_vm *vm, struct vmk_slot *s)
{
	uint64_t i;

	for (i = 0; i < s->nchunks; i++)
		chunk_release(vm, s, i);
	if (s->dirty != NULL)
		quota_free(s->dirty, bitmap_words(s->npages) * 16);
	quota_free(s->chunk, s->nchunks * sizeof(s->chunk[0]));
	quota_free(s, sizeof(*s));
}

/* ---- nested page tables ------------------------------------------------ */

static uint64_t *
table_alloc(struct vmk_mem *mem, uint64_t *pa)
{
	uint64_t *t;

	if (!vmk_mem_charge(1))
		return (NULL);
	t = vmk_pages_alloc(1, pa);
	if (t == NULL) {
		vmk_mem_uncharge(1);
		return (NULL);
	}
	mem->ntables++;
	return (t);
}

static void
table_free(struct vmk_mem *mem, uint64_t *t)
{
	vmk_pages_free(t, 1);
	mem->ntables--;
	vmk_mem_uncharge(1);
}

static bool
pte_present(uint64_t pte)
{
	/* P for NPT, read permission for EPT: bit 0 in both. */
	return ((pte & 1) != 0);
}

static uint64_t *
pte_table(uint64_t pte)
{
	return (vmk_phys_to_virt(pte & PTE_ADDR));
}

static unsigned int
pte_index(uint64_t gfn, unsigned int level)
{
	return ((unsigned int)(gfn >> (9 * (level - 1))) & 511U);
}

/*
 * Entries change under the processor's eyes, which sets accessed and dirty
 * bits in them; stores and exchanges are single.
 */
static void
pte_set(uint64_t *pte, uint64_t val)
{
	__atomic_store_n(pte, val, __ATOMIC_RELEASE);
}

/* Walk to the entry for gfn at the given level, making tables on the way. */
static uint64_t *
pte_make(struct vmk_mem *mem, uint64_t gfn, unsigned int level)
{
	uint64_t *t = mem->npt, *next, pa;
	unsigned int l;

	for (l = vmk_arch->pte.levels; l > level; l--) {
		uint64_t *e = &t[pte_index(gfn, l)];

		if (pte_present(*e)) {
			t = pte_table(*e);
			continue;
		}
		next = table_alloc(mem, &pa);
		if (next == NULL)
			return (NULL);
		pte_set(e, pa | vmk_arch->pte.table);
		t = next;
	}
	return (&t[pte_index(gfn, level)]);
}

static void
mark_dirty(struct vmk_slot *s, uint64_t gfn)
{
	uint64_t rel = gfn - s->gfn;

	if (s->dirty != NULL)
		s->dirty[rel / 64] |= 1ULL << (rel % 64);
}

/*
 * Clear every entry for [gfn, end) of a slot below table t of that level.
 * Dirty bits go to the slot's log, which has only small leaves.  A table that
 * becomes empty is unlinked and put on *gone; the processor may still be
 * walking it, so it is freed after the flush.  Its first word is the link;
 * the address of a table has bit 0 clear, which reads as not present.
 * Returns whether t itself is empty now.
 */
static bool
npt_zap(struct vmk_slot *s, uint64_t *t, unsigned int level, uint64_t gfn,
    uint64_t end, uint64_t **gone)
{
	uint64_t span = 1ULL << (9 * (level - 1)), base, old, *sub;
	unsigned int i;

	base = gfn & ~(span * 512 - 1);
	for (i = pte_index(gfn, level); i < 512; i++) {
		uint64_t from = base + i * span, pte = t[i];

		if (from >= end)
			break;
		if (!pte_present(pte))
			continue;
		if (level == 1 || (pte & vmk_arch->pte.large) != 0) {
			old = __atomic_exchange_n(&t[i], 0, __ATOMIC_SEQ_CST);
			if ((old & vmk_arch->pte.dirty) != 0)
				mark_dirty(s, from);
			continue;
		}
		sub = pte_table(pte);
		if (npt_zap(s, sub, level - 1, gfn > from ? gfn : from,
		    end < from + span ? end : from + span, gone)) {
			pte_set(&t[i], 0);
			sub[0] = (uint64_t)(uintptr_t)*gone;
			*gone = sub;
		}
	}
	for (i = 0; i < 512; i++)
		if (pte_present(t[i]))
			return (false);
	return (true);
}

static void
free_gone(struct vmk_mem *mem, uint64_t *gone)
{
	uint64_t *next;

	for (; gone != NULL; gone = next) {
		next = (uint64_t *)(uintptr_t)gone[0];
		table_free(mem, gone);
	}
}

/* Forget all translations of a slot, everywhere. */
static void
slot_zap(struct vmk_vm *vm, struct vmk_slot *s)
{
	uint64_t *gone = NULL;

	(void)npt_zap(s, vm->mem.npt, vmk_arch->pte.levels, s->gfn,
	    s->gfn + s->npages, &gone);
	vmk_vm_flush(vm);
	free_gone(&vm->mem, gone);
}

/* 512 pages in a row that start on a 2 MiB boundary? */
static bool
chunk_is_large(const struct vmk_chunk *c)
{
	unsigned int i;

	if (!c->pinned_whole || (c->pa[0] & (VMK_PAGE_SIZE * 512 - 1)) != 0)
		return (false);
	for (i = 1; i < CHUNK_PAGES; i++)
		if (c->pa[i] != c->pa[0] + i * VMK_PAGE_SIZE)
			return (false);
	return (true);
}

static int
npt_map(struct vmk_vm *vm, struct vmk_slot *s, uint64_t gfn)
{
	const struct vmk_pte_format *f = &vmk_arch->pte;
	struct vmk_chunk *c;
	uint64_t pa, bits, *pte;
	int error;

	error = slot_page(vm, s, gfn, &pa);
	if (error != 0)
		return (error);
	bits = f->leaf | (slot_writable(s) ? f->write : 0);
	c = &s->chunk[(gfn >> CHUNK_SHIFT) - s->first_chunk];
	if (f->large != 0 && (s->flags & ABI_MEM_LOG_DIRTY_PAGES) == 0 &&
	    chunk_is_large(c)) {
		pte = pte_make(&vm->mem, gfn, 2);
		if (pte == NULL)
			return (VMK_ENOMEM);
		/* A table may be left from when the slot logged. */
		if (!pte_present(*pte)) {
			pte_set(pte, c->pa[0] | bits | f->large);
			return (0);
		}
		if ((*pte & f->large) != 0)
			return (0);
	}
	pte = pte_make(&vm->mem, gfn, 1);
	if (pte == NULL)
		return (VMK_ENOMEM);
	/* Another vCPU may have been faster; keep its dirty bit. */
	if (!pte_present(*pte))
		pte_set(pte, pa | bits);
	return (0);
}

enum vmk_fault
vmk_mem_fault(struct vmk_vm *vm, uint64_t gpa, bool write, int *error)
{
	struct vmk_mem *mem = &vm->mem;
	enum vmk_fault ret;
	struct vmk_slot *s;

	vmk_mutex_enter(&mem->lock);
	s = slot_find(mem, gpa >> VMK_PAGE_SHIFT);
	if (s == NULL) {
		ret = VMK_FAULT_MMIO;
	} else if (write && !slot_writable(s)) {
		ret = VMK_FAULT_READONLY;
	} else {
		*error = npt_map(vm, s, gpa >> VMK_PAGE_SHIFT);
		ret = *error == 0 ? VMK_FAULT_MAPPED : VMK_FAULT_ERROR;
	}
	vmk_mutex_exit(&mem->lock);
	return (ret);
}

/* ---- the core's own access --------------------------------------------- */

/*
 * The kernel address of one guest page, good while mem.lock is held.
 */
static int
guest_page(struct vmk_vm *vm, uint64_t gpa, bool write, uint8_t **va)
{
	uint64_t gfn = gpa >> VMK_PAGE_SHIFT, pa;
	struct vmk_slot *s;
	int error;

	s = slot_find(&vm->mem, gfn);
	if (s == NULL || (write && !slot_writable(s)))
		return (VMK_ENXIO);
	error = slot_page(vm, s, gfn, &pa);
	if (error != 0)
		return (error == VMK_ENOMEM ? VMK_ENOMEM : VMK_EFAULT);
	if (write)
		mark_dirty(s, gfn);
	*va = (uint8_t *)vmk_phys_to_virt(pa) + (gpa & ~VMK_PAGE_MASK);
	return (0);
}

static size_t
page_part(uint64_t gpa, size_t len)
{
	size_t room = VMK_PAGE_SIZE - (gpa & ~VMK_PAGE_MASK);

	return (len < room ? len : room);
}

int
vmk_gpa_read(struct vmk_vm *vm, uint64_t gpa, void *buf, size_t len)
{
	uint8_t *dst = buf, *va;
	int error = 0;
	size_t n;

	vmk_mutex_enter(&vm->mem.lock);
	for (; len > 0; len -= n, gpa += n, dst += n) {
		n = page_part(gpa, len);
		error = guest_page(vm, gpa, false, &va);
		if (error != 0)
			break;
		memcpy(dst, va, n);
	}
	vmk_mutex_exit(&vm->mem.lock);
	return (error);
}

int
vmk_gpa_write(struct vmk_vm *vm, uint64_t gpa, const void *buf, size_t len)
{
	const uint8_t *src = buf;
	uint8_t *va;
	int error = 0;
	size_t n;

	vmk_mutex_enter(&vm->mem.lock);
	for (; len > 0; len -= n, gpa += n, src += n) {
		n = page_part(gpa, len);
		error = guest_page(vm, gpa, true, &va);
		if (error != 0)
			break;
		memcpy(va, src, n);
	}
	vmk_mutex_exit(&vm->mem.lock);
	return (error);
}

int
vmk_gpa_or(struct vmk_vm *vm, uint64_t gpa, uint32_t bits, bool wide)
{
	uint8_t *va;
	int error;

	if ((gpa & (wide ? 7 : 3)) != 0)
		return (VMK_EINVAL);
	vmk_mutex_enter(&vm->mem.lock);
	error = guest_page(vm, gpa, false, &va);
	/*
	 * The flags are in the low half of either entry size.  What has them
	 * already is not written and so not logged.
	 */
	if (error == 0 && (__atomic_load_n((uint32_t *)(void *)va,
	    __ATOMIC_RELAXED) & bits) == bits)
		goto out;
	error = guest_page(vm, gpa, true, &va);
	if (error == 0)
		__atomic_fetch_or((uint32_t *)(void *)va, bits,
		    __ATOMIC_SEQ_CST);
out:
	vmk_mutex_exit(&vm->mem.lock);
	return (error);
}

/* ---- requests ---------------------------------------------------------- */

static int
region_check(const struct abi_memory_region *r)
{
	uint64_t npages = r->memory_size >> VMK_PAGE_SHIFT;

	if (r->slot >= VMK_MAX_SLOTS ||
	    (r->flags & ~(ABI_MEM_LOG_DIRTY_PAGES | ABI_MEM_READONLY)) != 0 ||
	    ((r->memory_size | r->guest_phys_addr | r->userspace_addr) &
	    ~VMK_PAGE_MASK) != 0)
		return (VMK_EINVAL);
	/* No wrap-around in either space; 48 bits of guest address. */
	if (npages > VMK_MAX_SLOT_PAGES ||
	    r->guest_phys_addr >= (1ULL << 48) ||
	    r->guest_phys_addr + r->memory_size > (1ULL << 48) ||
	    r->userspace_addr + r->memory_size < r->userspace_addr ||
	    r->userspace_addr + r->memory_size > (1ULL << 56))
		return (VMK_EINVAL);
	return (0);
}

static struct vmk_slot *
slot_new(const struct abi_memory_region *r)
{
	struct vmk_slot *s;

	s = quota_alloc(sizeof(*s));
	if (s == NULL)
		return (NULL);
	s->id = r->slot;
	s->gfn = r->guest_phys_addr >> VMK_PAGE_SHIFT;
	s->npages = r->memory_size >> VMK_PAGE_SHIFT;
	s->hva = r->userspace_addr;
	s->flags = r->flags;
	s->first_chunk = s->gfn >> CHUNK_SHIFT;
	s->nchunks = ((s->gfn + s->npages - 1) >> CHUNK_SHIFT) -
	    s->first_chunk + 1;
	s->chunk = quota_alloc(s->nchunks * sizeof(s->chunk[0]));
	if (s->chunk == NULL) {
		quota_free(s, sizeof(*s));
		return (NULL);
	}
	if ((s->flags & ABI_MEM_LOG_DIRTY_PAGES) != 0) {
		s->dirty = quota_alloc(bitmap_words(s->npages) * 16);
		if (s->dirty == NULL) {
			quota_free(s->chunk, s->nchunks * sizeof(s->chunk[0]));
			quota_free(s, sizeof(*s));
			return (NULL);
		}
	}
	return (s);
}

static bool
overlaps(const struct vmk_mem *mem, const struct abi_memory_region *r)
{
	uint64_t gfn = r->guest_phys_addr >> VMK_PAGE_SHIFT;
	uint64_t end = gfn + (r->memory_size >> VMK_PAGE_SHIFT);
	const struct vmk_slot *s;
	unsigned int i;

	for (i = 0; i < mem->nsorted; i++) {
		s = mem->sorted[i];
		if (s->id != r->slot && gfn < s->gfn + s->npages &&
		    s->gfn < end)
			return (true);
	}
	return (false);
}

/* Same place, same memory: only logging goes on or off.  mem.lock held. */
static int
slot_reflag(struct vmk_vm *vm, struct vmk_slot *s, uint32_t flags)
{
	uint64_t *dirty = NULL;
	size_t size = bitmap_words(s->npages) * 16;

	if (flags == s->flags)
		return (0);
	if ((flags & ABI_MEM_LOG_DIRTY_PAGES) != 0) {
		dirty = quota_alloc(size);
		if (dirty == NULL)
			return (VMK_ENOMEM);
	}
	/* Leaf sizes and dirty bits start anew. */
	slot_zap(vm, s);
	if (s->dirty != NULL)
		quota_free(s->dirty, size);
	s->dirty = dirty;
	s->flags = flags;
	return (0);
}

/*
 * KVM_SET_USER_MEMORY_REGION, vm->lock held: create, delete (size 0), move,
 * or change flags.  Size and backing of an existing slot are fixed.
 */
int
vmk_mem_set_region(struct vmk_vm *vm, const struct abi_memory_region *r)
{
	struct vmk_mem *mem = &vm->mem;
	struct vmk_slot *old, *new = NULL;
	int error;

	error = region_check(r);
	if (error != 0)
		return (error);
	vmk_mutex_enter(&mem->lock);
	old = mem->slot[r->slot];
	if (r->memory_size == 0) {
		if (old == NULL) {
			error = VMK_EINVAL;
			goto out;
		}
	} else {
		if (old != NULL && (old->hva != r->userspace_addr ||
		    old->npages != r->memory_size >> VMK_PAGE_SHIFT ||
		    ((old->flags ^ r->flags) & ABI_MEM_READONLY) != 0)) {
			error = VMK_EINVAL;
			goto out;
		}
		if (overlaps(mem, r)) {
			error = VMK_EEXIST;
			goto out;
		}
		if (old != NULL &&
		    old->gfn == r->guest_phys_addr >> VMK_PAGE_SHIFT) {
			error = slot_reflag(vm, old, r->flags);
			goto out;
		}
		new = slot_new(r);
		if (new == NULL) {
			error = VMK_ENOMEM;
			goto out;
		}
	}
	if (old != NULL) {
		slot_sort_out(mem, old);
		slot_zap(vm, old);
		slot_free(vm, old);
	}
	mem->slot[r->slot] = new;
	if (new != NULL)
		slot_sort_in(mem, new);
out:
	vmk_mutex_exit(&mem->lock);
	return (error);
}

/* Collect and clear the dirty bits of one chunk's leaves. */
static bool
chunk_harvest(struct vmk_mem *mem, const struct vmk_slot *s, uint64_t ci,
    uint64_t *bitmap)
{
	const struct vmk_pte_format *f = &vmk_arch->pte;
	uint64_t first = chunk_first_gfn(s, ci), *t = mem->npt, pte, rel;
	unsigned int l, i;
	bool any = false;

	for (l = f->levels; l > 1; l--) {
		pte = t[pte_index(first, l)];
		if (!pte_present(pte) || (pte & f->large) != 0)
			return (false);
		t = pte_table(pte);
	}
	for (i = 0; i < CHUNK_PAGES; i++) {
		if (first + i < s->gfn || first + i >= s->gfn + s->npages ||
		    !pte_present(t[i]) || (t[i] & f->dirty) == 0)
			continue;
		__atomic_fetch_and(&t[i], ~f->dirty, __ATOMIC_SEQ_CST);
		rel = first + i - s->gfn;
		bitmap[rel / 64] |= 1ULL << (rel % 64);
		any = true;
	}
	return (any);
}

/*
 * KVM_GET_DIRTY_LOG, vm->lock held.  The bitmap that goes to the user is the
 * second half of slot->dirty, which vm->lock protects, so that no page
 * fault of the caller's happens under mem.lock.
 */
int
vmk_mem_get_dirty(struct vmk_vm *vm, const struct abi_dirty_log *log)
{
	struct vmk_mem *mem = &vm->mem;
	uint64_t words, i, *out;
	struct vmk_slot *s;
	bool any = false;

	if (log->slot >= VMK_MAX_SLOTS)
		return (VMK_EINVAL);
	vmk_mutex_enter(&mem->lock);
	s = mem->slot[log->slot];
	if (s == NULL || s->dirty == NULL) {
		vmk_mutex_exit(&mem->lock);
		return (VMK_ENOENT);
	}
	words = bitmap_words(s->npages);
	out = s->dirty + words;
	memcpy(out, s->dirty, words * 8);
	memset(s->dirty, 0, words * 8);
	for (i = 0; i < s->nchunks; i++)
		any |= chunk_harvest(mem, s, i, out);
	if (any)
		vmk_vm_flush(vm);
	vmk_mutex_exit(&mem->lock);
	return (vmk_copyout(out, log->dirty_bitmap, words * 8));
}

void
vmk_mem_unmapped(void *arg, uint64_t hva, uint64_t len)
{
	struct vmk_vm *vm = arg;
	struct vmk_slot *s;
	unsigned int i;
	uint64_t ci;

	vmk_mutex_enter(&vm->mem.lock);
	for (i = 0; i < vm->mem.nsorted; i++) {
		s = vm->mem.sorted[i];
		if (s->hva + (s->npages << VMK_PAGE_SHIFT) <= hva ||
		    (hva < s->hva && s->hva - hva >= len))
			continue;
		slot_zap(vm, s);
		for (ci = 0; ci < s->nchunks; ci++)
			chunk_release(vm, s, ci);
	}
	vmk_mutex_exit(&vm->mem.lock);
}

int
vmk_mem_init(struct vmk_vm *vm)
{
	struct vmk_mem *mem = &vm->mem;

	vmk_mutex_init(&mem->lock, "vmk mem");
	mem->npt = table_alloc(mem, &mem->npt_pa);
	if (mem->npt == NULL) {
		vmk_mutex_fini(&mem->lock);
		return (VMK_ENOMEM);
	}
	return (0);
}

/* No vCPU can run any more, and vmk_mem_unmapped() may still be called. */
void
vmk_mem_fini(struct vmk_vm *vm)
{
	struct vmk_mem *mem = &vm->mem;
	struct vmk_slot *s;
	unsigned int i;

	vmk_mutex_enter(&mem->lock);
	for (i = 0; i < VMK_MAX_SLOTS; i++) {
		s = mem->slot[i];
		if (s == NULL)
			continue;
		slot_sort_out(mem, s);
		slot_zap(vm, s);
		slot_free(vm, s);
		mem->slot[i] = NULL;
	}
	vmk_mutex_exit(&mem->lock);
}

/* After vmk_mm_detach(). */
void
vmk_mem_free(struct vmk_vm *vm)
{
	table_free(&vm->mem, vm->mem.npt);
	vmk_mutex_fini(&vm->mem.lock);
}

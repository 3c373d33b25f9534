/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * core_test.c: the core on the user-space host with a scripted processor:
 * requests, memory, nested tables, dirty log, emulation, events, errors.
 */
#define	_GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fake_cpu.h"
#include "tap.h"
#include "vmk_user.h"

#define	MB	(1UL << 20)
#define	PTR(p)	((uint64_t)(uintptr_t)(p))

/* ---- a machine with memory at 0 and one vCPU --------------------------- */

struct rig {
	int		 vm, vcpu;
	uint8_t		*ram;
	size_t		 size;
	struct abi_run	*run;
	uint8_t		*pio;
};

static int
set_region(int vm, uint32_t slot, uint64_t gpa, uint64_t size, void *hva,
    uint32_t flags)
{
	struct abi_memory_region r = { slot, flags, gpa, size, PTR(hva) };

	return (user_ioctl(vm, ABI_SET_USER_MEMORY_REGION, PTR(&r)));
}

static void *
user_ram(size_t size)
{
	uint8_t *p = mmap(NULL, size + 2 * MB, PROT_READ | PROT_WRITE,
	    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		abort();
	/* Aligned, so that large leaves are possible. */
	return ((void *)(uintptr_t)((PTR(p) + 2 * MB - 1) & ~(2 * MB - 1)));
}

static void
rig_up(struct rig *r, size_t size)
{
	unsigned int n = 0;

	memset(r, 0, sizeof(*r));
	fake_enter = NULL;
	r->size = size;
	r->ram = user_ram(size);
	r->vm = user_ioctl(USER_DEV_KVM, ABI_CREATE_VM, 0);
	CHECK(r->vm >= 0);
	CHECK_EQ(set_region(r->vm, 0, 0, size, r->ram, 0), 0);
	r->vcpu = user_ioctl(r->vm, ABI_CREATE_VCPU, 0);
	CHECK(r->vcpu >= 0);
	r->run = user_map(r->vcpu, &n);
	CHECK_EQ(n, 3);
	r->pio = (uint8_t *)r->run + VMK_PAGE_SIZE;
}

static void
rig_down(struct rig *r)
{
	user_close(r->vcpu);
	user_close(r->vm);
	munmap(r->ram, r->size);
	CHECK_EQ(user_outstanding(), 0);
	CHECK_EQ(user_pinned(), 0);
	CHECK_EQ(vmk_mem_charged(), 0);
}

/* Flat protected mode, code at 0x1000, no paging. */
static void
flat32(struct rig *r)
{
	struct abi_sregs s;
	struct abi_regs g;

	memset(&g, 0, sizeof(g));
	CHECK_EQ(user_ioctl(r->vcpu, ABI_GET_SREGS, PTR(&s)), 0);
	s.cs.base = 0;
	s.cs.limit = 0xffffffff;
	s.cs.db = s.cs.g = 1;
	s.ds = s.es = s.fs = s.gs = s.ss = s.cs;
	s.ds.type = s.es.type = s.fs.type = s.gs.type = s.ss.type = 3;
	s.cr0 = 0x60000011;
	CHECK_EQ(user_ioctl(r->vcpu, ABI_SET_SREGS, PTR(&s)), 0);
	g.rip = 0x1000;
	g.rflags = 2;
	CHECK_EQ(user_ioctl(r->vcpu, ABI_SET_REGS, PTR(&g)), 0);
}

static int
run(struct rig *r)
{
	return (user_ioctl(r->vcpu, ABI_RUN, 0));
}

/* The next entries give these exits, then HLT. */
static struct vmk_exit script[16];
static unsigned int nscript, iscript;

static void
scripted(struct vmk_vcpu *vcpu, const struct vmk_entry *e, struct vmk_exit *x)
{
	(void)vcpu;
	(void)e;
	if (iscript < nscript) {
		*x = script[iscript++];
		return;
	}
	x->kind = VMK_X_HLT;
	x->insn_len = 1;
}

static void
script_one(struct vmk_exit x)
{
	script[0] = x;
	nscript = 1;
	iscript = 0;
	fake_enter = scripted;
}

/* ---- requests ---------------------------------------------------------- */

static void
test_system(void)
{
	struct { struct abi_cpuid2 h; struct abi_cpuid_entry2 e[256]; } c;
	struct { struct abi_msr_list h; uint32_t i[64]; } l;
	uint32_t n;

	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_GET_API_VERSION, 0), 12);
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_GET_API_VERSION, 1),
	    -VMK_EINVAL);
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_GET_VCPU_MMAP_SIZE, 0), 12288);
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_CREATE_VM, 1), -VMK_EINVAL);
	CHECK_EQ(user_ioctl(USER_DEV_KVM, 0xae9f, 0), -VMK_ENOTTY);
	/* Only all 32 bits name a request. */
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_GET_API_VERSION | 1U << 30, 0),
	    -VMK_ENOTTY);
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_CHECK_EXTENSION,
	    ABI_CAP_USER_MEMORY), 1);
	/* Not offered: SYNC_MMU, SMM, async page faults, nested state. */
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_CHECK_EXTENSION, 16), 0);
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_CHECK_EXTENSION, 117), 0);
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_CHECK_EXTENSION, 59), 0);
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_CHECK_EXTENSION, 157), 0);
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_CHECK_EXTENSION, ~0ULL), 0);
	CHECK(user_ioctl(USER_DEV_KVM, ABI_CHECK_EXTENSION,
	    ABI_CAP_NR_MEMSLOTS) >= 512);

	c.h.nent = 1;
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_GET_SUPPORTED_CPUID, PTR(&c)),
	    -VMK_E2BIG);
	c.h.nent = 256;
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_GET_SUPPORTED_CPUID, PTR(&c)),
	    0);
	CHECK(c.h.nent > 4 && c.h.nent < 256);
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_GET_SUPPORTED_CPUID, 8),
	    -VMK_EFAULT);
	for (n = 0; n < c.h.nent; n++) {
		/* Never SVM, VMX, MONITOR, RDTSCP, PKU, HLE, PMU. */
		if (c.e[n].function == 1)
			CHECK_EQ(c.e[n].ecx & (1U << 5 | 1U << 3), 0);
		if (c.e[n].function == 0x80000001) {
			CHECK_EQ(c.e[n].ecx & 4, 0);
			CHECK_EQ(c.e[n].edx & 1U << 27, 0);
		}
		CHECK(c.e[n].function != 0xa);
		CHECK_EQ(c.e[n].padding[0] | c.e[n].padding[1] |
		    c.e[n].padding[2], 0);
	}
	l.h.nmsrs = 0;
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_GET_MSR_INDEX_LIST, PTR(&l)),
	    -VMK_E2BIG);
	n = l.h.nmsrs;
	CHECK(n > 0 && n <= 64);
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_GET_MSR_INDEX_LIST, PTR(&l)),
	    0);
	CHECK_EQ(l.h.nmsrs, n);
	tap_done("core: /dev/kvm requests and their errors");
}

static void
test_create(void)
{
	struct rig r;
	int fd;

	rig_up(&r, 2 * MB);
	CHECK_EQ(user_ioctl(r.vm, ABI_CREATE_VCPU, 0), -VMK_EEXIST);
	CHECK_EQ(user_ioctl(r.vm, ABI_CREATE_VCPU, VMK_MAX_VCPUS),
	    -VMK_EINVAL);
	CHECK_EQ(user_ioctl(r.vm, ABI_CREATE_VCPU, 0x100000000ULL),
	    -VMK_EINVAL);
	fd = user_ioctl(r.vm, ABI_CREATE_VCPU, 7);
	CHECK(fd >= 0);
	/* An irqchip after a vCPU: CVE-2012-1601. */
	CHECK(user_ioctl(r.vm, ABI_CREATE_IRQCHIP, 0) < 0);
	/* Same 16 bits, other request: SET_DEBUGREGS is not SET_TSC_KHZ. */
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_TSC_KHZ, 0), 0);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_DEBUGREGS, 0), -VMK_EFAULT);
	CHECK(user_ioctl(r.vcpu, ABI_GET_TSC_KHZ, 0) > 0);
	CHECK(user_ioctl(r.vm, ABI_GET_TSC_KHZ, 0) > 0);
	/* vCPU requests on a VM and the reverse. */
	CHECK_EQ(user_ioctl(r.vm, ABI_RUN, 0), -VMK_ENOTTY);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_CREATE_VCPU, 1), -VMK_ENOTTY);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_RUN, 1), -VMK_EINVAL);
	/* Another process's machine. */
	user_switch_mm(1);
	CHECK_EQ(user_ioctl(r.vm, ABI_CREATE_VCPU, 3), -VMK_EIO);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_RUN, 0), -VMK_EIO);
	user_switch_mm(0);
	/* The machine lives while a vCPU is open; closing order is free. */
	user_close(r.vm);
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(vmk_module_fini(), VMK_EBUSY);
	user_close(fd);
	r.vm = -2;
	rig_down(&r);
	tap_done("core: creation order, identity, lifetime");
}

/* Every acquisition of a machine's life fails once; nothing may leak. */
static void
test_failures(void)
{
	struct abi_ioeventfd io = { .addr = 0x5000, .len = 4 };
	uint64_t n;
	bool complete = false;
	uint8_t *ram = user_ram(8 * MB);
	int vm, vcpu, efd = eventfd(0, 0);

	io.fd = efd;
	for (n = 1; n < 200 && !complete; n++) {
		int failed = 0;

		user_fail_at(n);
		vm = user_ioctl(USER_DEV_KVM, ABI_CREATE_VM, 0);
		if (vm < 0) {
			CHECK_EQ(user_outstanding(), 0);
			continue;
		}
		failed |= set_region(vm, 0, 0, 4 * MB, ram, 0) < 0;
		failed |= set_region(vm, 1, 4 * MB, MB, ram + 4 * MB,
		    ABI_MEM_LOG_DIRTY_PAGES) < 0;
		failed |= user_ioctl(vm, ABI_IOEVENTFD, PTR(&io)) < 0;
		vcpu = user_ioctl(vm, ABI_CREATE_VCPU, 0);
		if (vcpu >= 0) {
			struct vmk_vm *m = fake_last_vm();
			uint32_t word = 1;

			failed |= vmk_gpa_write(m, 0x1ffe, &word, 4) != 0;
			failed |= vmk_gpa_read(m, 4 * MB + 5, &word, 4) != 0;
			failed |= user_ioctl(vcpu, ABI_RUN, 0) < 0;
			user_close(vcpu);
		}
		failed |= vcpu < 0;
		user_close(vm);
		CHECK_EQ(user_outstanding(), 0);
		CHECK_EQ(user_pinned(), 0);
		CHECK_EQ(vmk_mem_charged(), 0);
		complete = !failed;
	}
	user_fail_at(0);
	CHECK(complete);
	CHECK(n > 15);
	close(efd);
	munmap(ram, 8 * MB);
	tap_done("core: each allocation fails once, nothing leaks");
}

/* ---- memory ------------------------------------------------------------ */

static void
test_regions(void)
{
	struct rig r;
	uint8_t *more = user_ram(8 * MB);

	rig_up(&r, 4 * MB);
	CHECK_EQ(set_region(r.vm, VMK_MAX_SLOTS, 8 * MB, MB, more, 0),
	    -VMK_EINVAL);
	CHECK_EQ(set_region(r.vm, 1, 8 * MB + 1, MB, more, 0), -VMK_EINVAL);
	CHECK_EQ(set_region(r.vm, 1, 8 * MB, MB, more + 1, 0), -VMK_EINVAL);
	CHECK_EQ(set_region(r.vm, 1, 8 * MB, MB + 1, more, 0), -VMK_EINVAL);
	CHECK_EQ(set_region(r.vm, 1, 8 * MB, MB, more, 4), -VMK_EINVAL);
	/* Wrap-around in either space. */
	CHECK_EQ(set_region(r.vm, 1, ~0xfffULL, 2 * MB, more, 0), -VMK_EINVAL);
	CHECK_EQ(set_region(r.vm, 1, 8 * MB, ~0xfffULL, more, 0), -VMK_EINVAL);
	CHECK_EQ(set_region(r.vm, 1, 8 * MB, MB, (void *)~0xfffULL, 0),
	    -VMK_EINVAL);
	/* Overlap, at both ends and inside. */
	CHECK_EQ(set_region(r.vm, 1, 4 * MB - 4096, MB, more, 0), -VMK_EEXIST);
	CHECK_EQ(set_region(r.vm, 1, MB, MB, more, 0), -VMK_EEXIST);
	CHECK_EQ(set_region(r.vm, 1, 4 * MB, MB, more, 0), 0);
	/* Deleting what is not there; changing size or backing. */
	CHECK_EQ(set_region(r.vm, 2, 0, 0, NULL, 0), -VMK_EINVAL);
	CHECK_EQ(set_region(r.vm, 1, 4 * MB, 2 * MB, more, 0), -VMK_EINVAL);
	CHECK_EQ(set_region(r.vm, 1, 4 * MB, MB, more + MB, 0), -VMK_EINVAL);
	/* Move, then delete, then again. */
	CHECK_EQ(set_region(r.vm, 1, 16 * MB, MB, more, 0), 0);
	CHECK_EQ(set_region(r.vm, 2, 4 * MB, MB, more + MB, 0), 0);
	CHECK_EQ(set_region(r.vm, 1, 0, 0, NULL, 0), 0);
	CHECK_EQ(set_region(r.vm, 1, 16 * MB, 2 * MB, more, 0), 0);
	rig_down(&r);
	munmap(more, 8 * MB);
	tap_done("memory: slots: limits, overlap, move, delete");
}

static void
test_nested_tables(void)
{
	struct vmk_vm *vm;
	struct rig r;
	unsigned int level, i;
	uint64_t hpa, gpa, before;
	int error = 0;
	uint8_t *odd;

	rig_up(&r, 8 * MB);
	vm = fake_last_vm();
	CHECK(!fake_access(vm, 3 * MB, false, &hpa, &level));
	CHECK_EQ(vmk_mem_fault(vm, 3 * MB + 0x123, true, &error),
	    VMK_FAULT_MAPPED);
	/* Aligned and contiguous: one large leaf, both halves right. */
	CHECK(fake_access(vm, 3 * MB + 0x123, true, &hpa, &level));
	CHECK_EQ(level, 2);
	CHECK_EQ(hpa, PTR(r.ram) + 3 * MB + 0x123);
	CHECK(fake_access(vm, 2 * MB, false, &hpa, &level));
	CHECK(!fake_access(vm, 4 * MB, false, &hpa, &level));
	CHECK_EQ(user_pinned(), 512);

	/* A slot whose alignments differ gets small leaves. */
	odd = user_ram(4 * MB);
	CHECK_EQ(set_region(r.vm, 1, 64 * MB + 4096, 2 * MB, odd, 0), 0);
	for (i = 0; i < 512; i++) {
		gpa = 64 * MB + 4096 + i * 4096UL;
		CHECK_EQ(vmk_mem_fault(vm, gpa, false, &error),
		    VMK_FAULT_MAPPED);
		CHECK(fake_access(vm, gpa + 8, true, &hpa, &level));
		CHECK_EQ(level, 1);
		CHECK_EQ(hpa, PTR(odd) + i * 4096UL + 8);
	}
	CHECK(!fake_access(vm, 64 * MB, false, &hpa, &level));
	CHECK(!fake_access(vm, 64 * MB + 4096 + 2 * MB, false, &hpa, &level));

	/* Read-only: reads map, writes are MMIO. */
	CHECK_EQ(set_region(r.vm, 2, 128 * MB, MB, odd + 2 * MB,
	    ABI_MEM_READONLY), 0);
	CHECK_EQ(vmk_mem_fault(vm, 128 * MB, true, &error),
	    VMK_FAULT_READONLY);
	CHECK_EQ(vmk_mem_fault(vm, 128 * MB, false, &error), VMK_FAULT_MAPPED);
	CHECK(fake_access(vm, 128 * MB, false, &hpa, &level));
	CHECK(!fake_access(vm, 128 * MB, true, &hpa, &level));
	CHECK_EQ(vmk_gpa_write(vm, 128 * MB, &hpa, 8), VMK_ENXIO);
	CHECK_EQ(vmk_mem_fault(vm, 256 * MB, false, &error), VMK_FAULT_MMIO);

	/* Deleting a slot takes its leaves, tables and pins away. */
	before = vm->mem.ntables;
	CHECK_EQ(set_region(r.vm, 1, 0, 0, NULL, 0), 0);
	CHECK(!fake_access(vm, 64 * MB + 8192, false, &hpa, &level));
	CHECK(vm->mem.ntables < before);
	CHECK(fake_access(vm, 3 * MB, false, &hpa, &level));
	/* The last page of 48 bits. */
	CHECK_EQ(set_region(r.vm, 1, (1ULL << 48) - MB, MB, odd, 0), 0);
	CHECK_EQ(vmk_mem_fault(vm, (1ULL << 48) - 1, true, &error),
	    VMK_FAULT_MAPPED);
	CHECK(fake_access(vm, (1ULL << 48) - 1, true, &hpa, &level));
	CHECK_EQ(hpa, PTR(odd) + MB - 1);
	rig_down(&r);
	munmap(odd, 4 * MB);
	tap_done("memory: nested tables: leaves, rights, zap");
}

static void
test_holes(void)
{
	struct vmk_vm *vm;
	struct rig r;
	int error = 0;
	uint64_t v = 5, old = vmk_tunables.max_pinned_pages;

	rig_up(&r, 8 * MB);
	vm = fake_last_vm();
	/* A hole in the user's mapping: its chunk is pinned page by page. */
	munmap(r.ram + 2 * MB + 8192, 4096);
	CHECK_EQ(vmk_mem_fault(vm, 2 * MB, true, &error), VMK_FAULT_MAPPED);
	CHECK_EQ(user_pinned(), 1);
	CHECK_EQ(vmk_mem_fault(vm, 2 * MB + 8192, true, &error),
	    VMK_FAULT_ERROR);
	CHECK_EQ(error, VMK_EFAULT);
	CHECK_EQ(vmk_gpa_read(vm, 2 * MB + 8190, &v, 8), VMK_EFAULT);
	CHECK_EQ(vmk_gpa_write(vm, 2 * MB + 4092, &v, 4), 0);
	CHECK_EQ(user_pinned(), 2);
	/* The quota: no room for a chunk, then none for a page. */
	vmk_tunables.max_pinned_pages = vmk_mem_charged() + 10;
	CHECK_EQ(vmk_mem_fault(vm, 4 * MB, true, &error), VMK_FAULT_MAPPED);
	CHECK_EQ(user_pinned(), 3);
	vmk_tunables.max_pinned_pages = vmk_mem_charged();
	CHECK_EQ(vmk_mem_fault(vm, 4 * MB + 4096, true, &error),
	    VMK_FAULT_ERROR);
	CHECK_EQ(error, VMK_ENOMEM);
	/* Machines and vCPUs are charged too. */
	CHECK_EQ(user_ioctl(USER_DEV_KVM, ABI_CREATE_VM, 0), -VMK_ENOMEM);
	CHECK_EQ(user_ioctl(r.vm, ABI_CREATE_VCPU, 1), -VMK_ENOMEM);
	vmk_tunables.max_pinned_pages = old;
	/* The host takes the memory away. */
	user_unmap(PTR(r.ram), 3 * MB);
	CHECK_EQ(user_pinned(), 0);
	user_unmap(0, ~0ULL);
	rig_down(&r);
	tap_done("memory: holes, quota, unmap by the host");
}

static void
test_dirty_log(void)
{
	struct abi_dirty_log log = { .slot = 1 };
	uint64_t map[8], hpa, kicks;
	unsigned int level;
	struct vmk_vm *vm;
	struct rig r;
	uint8_t *ram2 = user_ram(4 * MB);
	int error = 0;

	rig_up(&r, 2 * MB);
	vm = fake_last_vm();
	log.dirty_bitmap = PTR(map);
	CHECK_EQ(set_region(r.vm, 1, 4 * MB, 400 * 4096, ram2, 0), 0);
	CHECK_EQ(user_ioctl(r.vm, ABI_GET_DIRTY_LOG, PTR(&log)), -VMK_ENOENT);
	CHECK_EQ(vmk_mem_fault(vm, 4 * MB, true, &error), VMK_FAULT_MAPPED);
	CHECK_EQ(set_region(r.vm, 1, 4 * MB, 400 * 4096, ram2,
	    ABI_MEM_LOG_DIRTY_PAGES), 0);
	/* Logging starts with no leaves, so that none is large or dirty. */
	CHECK(!fake_access(vm, 4 * MB, true, &hpa, &level));
	CHECK_EQ(vmk_mem_fault(vm, 4 * MB + 3 * 4096, true, &error), 0);
	CHECK(fake_access(vm, 4 * MB + 3 * 4096, true, &hpa, &level));
	CHECK_EQ(level, 1);
	CHECK_EQ(vmk_mem_fault(vm, 4 * MB + 5 * 4096, false, &error), 0);
	CHECK(fake_access(vm, 4 * MB + 5 * 4096, false, &hpa, &level));
	/* The core's own writes count. */
	CHECK_EQ(vmk_gpa_write(vm, 4 * MB + 399 * 4096UL, "x", 1), 0);
	kicks = vm->tlb_gen;
	memset(map, 0xff, sizeof(map));
	CHECK_EQ(user_ioctl(r.vm, ABI_GET_DIRTY_LOG, PTR(&log)), 0);
	CHECK_EQ(map[0], 8);
	CHECK_EQ(map[1], 0);
	CHECK_EQ(map[6], 1ULL << (399 - 384));
	CHECK_EQ(map[7], ~0ULL);	/* beyond the bitmap: untouched */
	CHECK(vm->tlb_gen > kicks);
	CHECK_EQ(user_ioctl(r.vm, ABI_GET_DIRTY_LOG, PTR(&log)), 0);
	CHECK_EQ(map[0] | map[6], 0);
	/* The same page again. */
	CHECK(fake_access(vm, 4 * MB + 3 * 4096, true, &hpa, &level));
	CHECK_EQ(user_ioctl(r.vm, ABI_GET_DIRTY_LOG, PTR(&log)), 0);
	CHECK_EQ(map[0], 8);
	/* What was written before the host takes the memory away counts. */
	CHECK(fake_access(vm, 4 * MB + 3 * 4096, true, &hpa, &level));
	user_unmap(PTR(ram2), 4096);
	CHECK(!fake_access(vm, 4 * MB + 3 * 4096, true, &hpa, &level));
	CHECK_EQ(user_ioctl(r.vm, ABI_GET_DIRTY_LOG, PTR(&log)), 0);
	CHECK_EQ(map[0], 8);
	/* An accessed bit that is set already is not written again. */
	CHECK_EQ(vmk_gpa_or(vm, 4 * MB + 4096, 0x20, true), 0);
	CHECK_EQ(user_ioctl(r.vm, ABI_GET_DIRTY_LOG, PTR(&log)), 0);
	CHECK_EQ(map[0], 2);
	CHECK_EQ(vmk_gpa_or(vm, 4 * MB + 4096, 0x20, true), 0);
	CHECK_EQ(user_ioctl(r.vm, ABI_GET_DIRTY_LOG, PTR(&log)), 0);
	CHECK_EQ(map[0], 0);
	log.slot = VMK_MAX_SLOTS;
	CHECK_EQ(user_ioctl(r.vm, ABI_GET_DIRTY_LOG, PTR(&log)), -VMK_EINVAL);
	log.slot = 1;
	log.dirty_bitmap = 8;
	CHECK_EQ(user_ioctl(r.vm, ABI_GET_DIRTY_LOG, PTR(&log)), -VMK_EFAULT);
	rig_down(&r);
	munmap(ram2, 4 * MB);
	tap_done("memory: dirty log");
}

/* ---- emulation --------------------------------------------------------- */

#define	DEV	0x10000000UL		/* no memory there */

static struct vmk_exit
nested(uint64_t gpa, bool write)
{
	struct vmk_exit x = { .kind = VMK_X_NESTED_FAULT, .gpa = gpa,
		.write = write };

	return (x);
}

static void
code(struct rig *r, const void *bytes, size_t n)
{
	memcpy(r->ram + 0x1000, bytes, n);
}

static void
get(struct rig *r, struct abi_regs *g)
{
	CHECK_EQ(user_ioctl(r->vcpu, ABI_GET_REGS, PTR(g)), 0);
}

static void
put(struct rig *r, const struct abi_regs *g)
{
	CHECK_EQ(user_ioctl(r->vcpu, ABI_SET_REGS, PTR(g)), 0);
}

static void
test_mmio(void)
{
	struct abi_regs g;
	struct vmk_exit x;
	struct rig r;

	rig_up(&r, 2 * MB);
	flat32(&r);
	/* mov %ecx, 0x8(%ebx) */
	code(&r, "\x89\x4b\x08", 3);
	get(&r, &g);
	g.rbx = DEV;
	g.rcx = 0x11223344;
	put(&r, &g);
	script_one(nested(DEV + 8, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_MMIO);
	CHECK_EQ(r.run->mmio.phys_addr, DEV + 8);
	CHECK_EQ(r.run->mmio.len, 4);
	CHECK_EQ(r.run->mmio.is_write, 1);
	CHECK_EQ(memcmp(r.run->mmio.data, "\x44\x33\x22\x11\0\0\0\0", 8), 0);
	/* A write has committed when user space sees it. */
	get(&r, &g);
	CHECK_EQ(g.rip, 0x1003);
	fake_enter = NULL;
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_HLT);

	/* Bytes that the processor fetched go before those in memory... */
	code(&r, "\x0f\x0b", 2);
	g.rip = 0x1000;
	put(&r, &g);
	x = nested(DEV + 8, true);
	x.insn = (const uint8_t *)"\x89\x4b\x08";
	x.ninsn = 3;
	script_one(x);
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_MMIO);
	CHECK_EQ(r.run->mmio.phys_addr, DEV + 8);
	/* ...unless they are cut off, and for that one exit alone. */
	code(&r, "\x89\x4b\x10", 3);
	put(&r, &g);
	x.ninsn = 2;
	script_one(x);
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->mmio.phys_addr, DEV + 16);
	put(&r, &g);
	script_one(nested(DEV + 16, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->mmio.phys_addr, DEV + 16);

	/* movsbl (%ebx), %edx: the read completes in the next RUN. */
	code(&r, "\x0f\xbe\x13", 3);
	get(&r, &g);
	g.rip = 0x1000;
	g.rdx = ~0ULL;
	put(&r, &g);
	script_one(nested(DEV, false));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_MMIO);
	CHECK_EQ(r.run->mmio.is_write, 0);
	CHECK_EQ(r.run->mmio.len, 1);
	r.run->mmio.data[0] = 0x80;
	/* Lengths come from the core, not from the page. */
	r.run->mmio.len = 8;
	r.run->mmio.phys_addr = 0;
	r.run->immediate_exit = 1;
	CHECK_EQ(run(&r), -VMK_EINTR);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_INTR);
	r.run->immediate_exit = 0;
	get(&r, &g);
	CHECK_EQ(g.rdx, 0xffffff80);
	CHECK_EQ(g.rip, 0x1003);

	/* orb $0x21, (%ebx): read, then write, flags. */
	code(&r, "\x80\x0b\x21", 3);
	g.rip = 0x1000;
	put(&r, &g);
	script_one(nested(DEV, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->mmio.is_write, 0);
	r.run->mmio.data[0] = 0xc0;
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_MMIO);
	CHECK_EQ(r.run->mmio.is_write, 1);
	CHECK_EQ(r.run->mmio.data[0], 0xe1);
	get(&r, &g);
	CHECK_EQ(g.rip, 0x1003);
	CHECK_EQ(g.rflags & (RFLAGS_SF | RFLAGS_ZF | RFLAGS_CF), RFLAGS_SF);

	/* A word across a page boundary: two fragments. */
	code(&r, "\x89\x0b", 2);
	g.rip = 0x1000;
	g.rbx = DEV + 0xffd;
	g.rcx = 0x44332211;
	put(&r, &g);
	script_one(nested(DEV + 0xffd, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->mmio.phys_addr, DEV + 0xffd);
	CHECK_EQ(r.run->mmio.len, 3);
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_MMIO);
	CHECK_EQ(r.run->mmio.phys_addr, DEV + 0x1000);
	CHECK_EQ(r.run->mmio.len, 1);
	CHECK_EQ(r.run->mmio.data[0], 0x44);

	/* A reset between exit and RUN drops the pending read. */
	code(&r, "\x8b\x13", 2);
	g.rip = 0x1000;
	put(&r, &g);
	script_one(nested(DEV + 0xffd, false));
	CHECK_EQ(run(&r), 0);
	g.rip = 0x1234;
	g.rdx = 7;
	put(&r, &g);
	fake_enter = NULL;
	CHECK_EQ(run(&r), 0);
	get(&r, &g);
	CHECK_EQ(g.rdx, 7);
	CHECK_EQ(g.rip, 0x1235);
	rig_down(&r);
	tap_done("emulate: MMIO reads, writes, fragments, completion");
}

static void
test_mmio_strings(void)
{
	struct abi_regs g;
	struct rig r;
	unsigned int i;

	rig_up(&r, 2 * MB);
	flat32(&r);
	/* rep movsw from memory to the device. */
	code(&r, "\x66\xf3\xa5", 3);
	memcpy(r.ram + 0x2000, "abcdef", 6);
	get(&r, &g);
	g.rsi = 0x2000;
	g.rdi = DEV;
	g.rcx = 3;
	put(&r, &g);
	for (i = 0; i < 3; i++) {
		script_one(nested(DEV + 2 * i, true));
		CHECK_EQ(run(&r), 0);
		CHECK_EQ(r.run->exit_reason, ABI_EXIT_MMIO);
		CHECK_EQ(r.run->mmio.phys_addr, DEV + 2 * i);
		CHECK_EQ(r.run->mmio.len, 2);
		CHECK_EQ(memcmp(r.run->mmio.data, &"abcdef"[2 * i], 2), 0);
		get(&r, &g);
		CHECK_EQ(g.rcx, 2 - i);
		CHECK_EQ(g.rip, i == 2 ? 0x1003 : 0x1000);
	}
	/* movsb from the device to memory: read, then a store. */
	code(&r, "\xa4", 1);
	g.rip = 0x1000;
	g.rsi = DEV;
	g.rdi = 0x3000;
	g.rflags = 2 | RFLAGS_DF;
	put(&r, &g);
	script_one(nested(DEV, false));
	CHECK_EQ(run(&r), 0);
	r.run->mmio.data[0] = 0x77;
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_HLT);
	CHECK_EQ(r.ram[0x3000], 0x77);
	get(&r, &g);
	CHECK_EQ(g.rsi, DEV - 1);
	CHECK_EQ(g.rdi, 0x2fff);
	/* stosl with RCX 0 does nothing. */
	code(&r, "\xf3\xab", 2);
	g.rip = 0x1000;
	g.rdi = DEV;
	g.rcx = 0;
	put(&r, &g);
	script_one(nested(DEV, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_HLT);
	rig_down(&r);
	tap_done("emulate: string moves to and from devices");
}

static struct vmk_exit
port(uint16_t p, unsigned int size, bool in, bool string, uint64_t next)
{
	struct vmk_exit x = { .kind = VMK_X_IO, .info2 = next };

	x.io.port = p;
	x.io.size = (uint8_t)size;
	x.io.in = in;
	x.io.string = string;
	return (x);
}

static void
test_ports(void)
{
	struct abi_regs g;
	struct rig r;
	unsigned int i;

	rig_up(&r, 2 * MB);
	flat32(&r);
	get(&r, &g);
	g.rax = 0xdeadbeefcafef00dULL;
	put(&r, &g);
	script_one(port(0x3f8, 1, false, false, 0x1001));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_IO);
	CHECK_EQ(r.run->io.direction, ABI_EXIT_IO_OUT);
	CHECK_EQ(r.run->io.port, 0x3f8);
	CHECK_EQ(r.run->io.size, 1);
	CHECK_EQ(r.run->io.count, 1);
	CHECK_EQ(((uint8_t *)r.run)[r.run->io.data_offset], 0x0d);
	get(&r, &g);
	CHECK_EQ(g.rip, 0x1001);

	/* IN of 1, 2 and 4 bytes: the upper half of RAX. */
	for (i = 1; i <= 4; i *= 2) {
		g.rax = ~0ULL;
		g.rip = 0x1000;
		put(&r, &g);
		script_one(port(0x60, i, true, false, 0x1002));
		CHECK_EQ(run(&r), 0);
		CHECK_EQ(r.run->io.direction, ABI_EXIT_IO_IN);
		memset(r.pio, 0, 8);
		r.run->io.size = 200;		/* not ours to believe */
		r.run->io.count = 0xffffffff;
		CHECK_EQ(run(&r), 0);
		get(&r, &g);
		CHECK_EQ(g.rax, i == 1 ? 0xffffffffffffff00ULL :
		    i == 2 ? 0xffffffffffff0000ULL : 0);
		CHECK_EQ(g.rip, 0x1003);	/* IN, then HLT */
	}

	/* rep insb: batches that end at the page. */
	code(&r, "\xf3\x6c", 2);
	g.rip = 0x1000;
	g.rdi = 0x4ff0;
	g.rcx = 0x30;
	g.rflags = 2;
	put(&r, &g);
	script_one(port(0x1f0, 1, true, true, 0));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->io.count, 16);
	for (i = 0; i < 16; i++)
		r.pio[i] = (uint8_t)(i + 1);
	script_one(port(0x1f0, 1, true, true, 0));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->io.count, 32);
	CHECK_EQ(r.ram[0x4ff0], 1);
	CHECK_EQ(r.ram[0x4fff], 16);
	get(&r, &g);
	CHECK_EQ(g.rip, 0x1000);
	CHECK_EQ(g.rcx, 0x20);
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_HLT);
	get(&r, &g);
	CHECK_EQ(g.rcx, 0);
	CHECK_EQ(g.rdi, 0x5020);
	CHECK_EQ(g.rip, 0x1003);

	/* rep outsw, segment override, direction down. */
	code(&r, "\x66\xf3\x64\x6f", 4);
	memcpy(r.ram + 0x2000, "\x01\x02\x03\x04", 4);
	g.rip = 0x1000;
	g.rsi = 0x2002;
	g.rcx = 2;
	g.rflags = 2 | RFLAGS_DF;
	put(&r, &g);
	script_one(port(0x10, 2, false, true, 0));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->io.count, 1);
	CHECK_EQ(memcmp(r.pio, "\x03\x04", 2), 0);
	script_one(port(0x10, 2, false, true, 0));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(memcmp(r.pio, "\x01\x02", 2), 0);
	get(&r, &g);
	CHECK_EQ(g.rip, 0x1004);
	/* The instruction at RIP is not the one that the exit says. */
	code(&r, "\x90", 1);
	g.rip = 0x1000;
	put(&r, &g);
	script_one(port(0x10, 2, false, true, 0));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_INTERNAL_ERROR);
	rig_down(&r);
	tap_done("emulate: ports and port strings");
}

/* Long mode with 4 KiB pages: virtual 0x400000 + n -> page n + 16. */
static void
paging(struct rig *r, uint64_t leaf_bits)
{
	uint64_t *p4 = (uint64_t *)(void *)(r->ram + 0x8000);
	uint64_t *p3 = (uint64_t *)(void *)(r->ram + 0x9000);
	uint64_t *p2 = (uint64_t *)(void *)(r->ram + 0xa000);
	uint64_t *p1 = (uint64_t *)(void *)(r->ram + 0xb000);
	struct abi_sregs s;
	unsigned int i;

	p4[0] = 0x9007;
	p3[0] = 0xa007;
	p2[0] = 0x83 | 4;			/* 2 MiB, identity */
	p2[2] = 0xb007;
	for (i = 0; i < 512; i++)
		p1[i] = (uint64_t)(i + 16) << 12 | leaf_bits;
	CHECK_EQ(user_ioctl(r->vcpu, ABI_GET_SREGS, PTR(&s)), 0);
	s.cr3 = 0x8000;
	s.cr4 = CR4_PAE;
	s.cr0 = 0x80010011;
	s.efer = EFER_LME | EFER_LMA | EFER_NXE;
	s.cs.l = 1;
	s.cs.db = 0;
	CHECK_EQ(user_ioctl(r->vcpu, ABI_SET_SREGS, PTR(&s)), 0);
}

static void
test_walk(void)
{
	struct vmk_vcpu *v;
	struct rig r;
	uint64_t gpa = 0, *p1;
	uint32_t pf = 0;

	rig_up(&r, 2 * MB);
	flat32(&r);
	v = fake_last_vcpu();
	p1 = (uint64_t *)(void *)(r.ram + 0xb000);
	paging(&r, 0x7);
	CHECK_EQ(vmk_walk(v, 0x401234, VMK_WALK_WRITE, &gpa, &pf), 0);
	CHECK_EQ(gpa, 0x11234);
	CHECK_EQ(p1[1] & 0x60, 0x60);		/* accessed and dirty */
	CHECK_EQ(vmk_walk(v, 0x402000, VMK_WALK_PROBE, &gpa, &pf), 0);
	CHECK_EQ(p1[2] & 0x60, 0);
	CHECK_EQ(vmk_walk(v, 0x1fffff, 0, &gpa, &pf), 0);
	CHECK_EQ(gpa, 0x1fffff);
	CHECK_EQ(vmk_walk(v, 0x40000000, VMK_WALK_USER, &gpa, &pf),
	    VMK_EFAULT);
	CHECK_EQ(pf, PF_ERR_U);
	p1[3] &= ~2ULL;				/* read-only */
	CHECK_EQ(vmk_walk(v, 0x403000, VMK_WALK_WRITE, &gpa, &pf),
	    VMK_EFAULT);
	CHECK_EQ(pf, PF_ERR_P | PF_ERR_W);
	CHECK_EQ(vmk_walk(v, 0x403000, 0, &gpa, &pf), 0);
	p1[4] &= ~4ULL;				/* supervisor */
	CHECK_EQ(vmk_walk(v, 0x404000, VMK_WALK_USER, &gpa, &pf),
	    VMK_EFAULT);
	CHECK_EQ(pf, PF_ERR_P | PF_ERR_U);
	p1[5] |= 1ULL << 63;			/* no execute */
	CHECK_EQ(vmk_walk(v, 0x405000, VMK_WALK_FETCH, &gpa, &pf),
	    VMK_EFAULT);
	CHECK_EQ(pf, PF_ERR_P | PF_ERR_I);
	/* SMAP and SMEP. */
	fake(v)->creg[VMK_CR4] |= CR4_SMAP | CR4_SMEP;
	CHECK_EQ(vmk_walk(v, 0x406000, 0, &gpa, &pf), VMK_EFAULT);
	CHECK_EQ(vmk_walk(v, 0x406000, VMK_WALK_FETCH, &gpa, &pf),
	    VMK_EFAULT);
	v->rflags |= 0x40000;
	CHECK_EQ(vmk_walk(v, 0x406000, 0, &gpa, &pf), 0);
	v->rflags = 2;
	/* Tables outside memory. */
	fake(v)->creg[VMK_CR3] = 0x7000000;
	CHECK_EQ(vmk_walk(v, 0x406000, 0, &gpa, &pf), VMK_ENXIO);
	fake(v)->creg[VMK_CR3] = 0x8000;
	fake(v)->creg[VMK_CR4] = CR4_PAE;
	CHECK_EQ(vmk_walk(v, 0x407008, VMK_WALK_PROBE, &gpa, &pf), 0);
	CHECK_EQ(gpa, 0x17008);

	/* 32-bit tables: 4 MiB page with PSE-36, then a 4 KiB one. */
	fake(v)->creg[VMK_EFER] = 0;
	fake(v)->creg[VMK_CR4] = CR4_PSE;
	fake(v)->creg[VMK_CR3] = 0xc000;
	((uint32_t *)(void *)(r.ram + 0xc000))[1] = 0x00c02087;
	((uint32_t *)(void *)(r.ram + 0xc000))[2] = 0xd007;
	((uint32_t *)(void *)(r.ram + 0xd000))[3] = 0x12007;
	CHECK_EQ(vmk_walk(v, 0x00412345, 0, &gpa, &pf), 0);
	CHECK_EQ(gpa, 0x100c12345ULL);
	CHECK_EQ(vmk_walk(v, 0x00803456, VMK_WALK_WRITE, &gpa, &pf), 0);
	CHECK_EQ(gpa, 0x12456);
	/* PAE: the top four entries have no rights of their own. */
	fake(v)->creg[VMK_CR4] = CR4_PAE;
	fake(v)->creg[VMK_CR3] = 0xe020;
	((uint64_t *)(void *)(r.ram + 0xe020))[3] = 0xf001;
	((uint64_t *)(void *)(r.ram + 0xf000))[1] = 0x600087;
	CHECK_EQ(vmk_walk(v, 0xc0212345, VMK_WALK_USER | VMK_WALK_WRITE, &gpa,
	    &pf), 0);
	CHECK_EQ(gpa, 0x612345);
	rig_down(&r);
	tap_done("emulate: page walks of all modes, with rights");
}

static void
test_faults(void)
{
	struct abi_regs g;
	struct abi_sregs s;
	struct vmk_vcpu *v;
	struct rig r;

	rig_up(&r, 2 * MB);
	flat32(&r);
	v = fake_last_vcpu();
	paging(&r, 0x7);
	/* rep outsb from an unmapped page: #PF for the guest. */
	code(&r, "\xf3\x6e", 2);
	get(&r, &g);
	g.rip = 0x1000;
	g.rsi = 0x40000000;
	g.rcx = 1;
	put(&r, &g);
	script_one(port(0x10, 1, false, true, 0));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_HLT);
	CHECK_EQ(fake(v)->last.inject, VMK_INJ_EXC);
	CHECK_EQ(fake(v)->last.vector, VMK_PF);
	CHECK_EQ(fake(v)->last.error_code, 0);
	CHECK_EQ(fake(v)->creg[VMK_CR2], 0x40000000);
	/* Non-canonical: #GP. */
	g.rip = 0x1000;
	g.rsi = 0x8000000000000000ULL;
	put(&r, &g);
	script_one(port(0x10, 1, false, true, 0));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->last.vector, VMK_GP);
	/* insb to a read-only page faults before the device is asked. */
	((uint64_t *)(void *)(r.ram + 0xb000))[1] &= ~2ULL;
	code(&r, "\x6c", 1);
	g.rip = 0x1000;
	g.rdi = 0x401000;
	put(&r, &g);
	script_one(port(0x10, 1, true, true, 0));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_HLT);
	CHECK_EQ(fake(v)->last.vector, VMK_PF);
	CHECK_EQ(fake(v)->last.error_code, PF_ERR_P | PF_ERR_W);
	/* A segment limit. */
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_SREGS, PTR(&s)), 0);
	s.cr0 = 0x11;
	s.cr4 = s.efer = 0;
	s.cs.l = 0;
	s.cs.db = 1;
	s.ds.limit = 0x1fff;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_SREGS, PTR(&s)), 0);
	code(&r, "\x6e", 1);
	g.rip = 0x1000;
	g.rsi = 0x2000;
	put(&r, &g);
	script_one(port(0x10, 1, false, true, 0));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->last.vector, VMK_GP);
	rig_down(&r);
	tap_done("emulate: faults go to the guest, in order");
}

static void
delivery_cut_short(struct vmk_vcpu *vcpu, const struct vmk_entry *e,
    struct vmk_exit *x)
{
	(void)e;
	vcpu->ev.irq_injected = true;
	vcpu->ev.irq_vector = 0x20;
	*x = nested(DEV, true);
}

static void
test_undecodable(void)
{
	struct abi_enable_cap cap = { .cap = ABI_CAP_EXIT_ON_EMULATION_FAILURE,
		.args = { 1 } };
	struct abi_sregs s;
	struct abi_regs g;
	struct vmk_vcpu *v;
	struct rig r;

	rig_up(&r, 2 * MB);
	flat32(&r);
	v = fake_last_vcpu();
	code(&r, "\x0f\xc7\x0b\x90", 4);	/* cmpxchg8b (%ebx) */
	script_one(nested(DEV, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_INTERNAL_ERROR);
	CHECK_EQ(r.run->internal.suberror, ABI_INTERNAL_EMULATION);
	CHECK_EQ(r.run->internal.ndata, 3);
	CHECK_EQ(r.run->emulation_failure.flags, 1);
	CHECK_EQ(r.run->emulation_failure.insn_size, 15);
	CHECK_EQ(memcmp(r.run->emulation_failure.insn_bytes,
	    "\x0f\xc7\x0b\x90", 4), 0);
	/* A user program of the guest's gets #UD: CVE-2014-7842. */
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_SREGS, PTR(&s)), 0);
	s.cs.dpl = s.ss.dpl = 3;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_SREGS, PTR(&s)), 0);
	script_one(nested(DEV, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_HLT);
	CHECK_EQ(fake(v)->last.vector, VMK_UD);
	/* Unless the VMM completes instructions itself. */
	CHECK_EQ(user_ioctl(r.vm, ABI_ENABLE_CAP, PTR(&cap)), 0);
	get(&r, &g);
	g.rip = 0x1000;
	put(&r, &g);
	script_one(nested(DEV, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_INTERNAL_ERROR);
	/* Executing where there is no memory ends at once, no bytes. */
	g.rip = DEV;
	put(&r, &g);
	script_one(nested(DEV, false));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_INTERNAL_ERROR);
	CHECK_EQ(r.run->internal.ndata, 1);
	/* The stack is no memory while an event is being delivered. */
	g.rflags = 0x202;
	put(&r, &g);
	fake_enter = delivery_cut_short;
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_INTERNAL_ERROR);
	CHECK_EQ(r.run->internal.suberror, ABI_INTERNAL_DELIVERY_EV);
	CHECK(v->ev.irq_injected);
	rig_down(&r);
	tap_done("emulate: what is not decoded goes to the VMM");
}

/* ---- events ------------------------------------------------------------ */

static void
test_user_interrupts(void)
{
	struct abi_interrupt irq = { 0x31 };
	struct abi_sregs s;
	struct abi_regs g;
	struct vmk_vcpu *v;
	struct rig r;

	rig_up(&r, 2 * MB);
	flat32(&r);
	v = fake_last_vcpu();
	get(&r, &g);
	g.rflags = 0x202;
	put(&r, &g);
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->ready_for_interrupt_injection, 1);
	CHECK_EQ(r.run->if_flag, 1);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_INTERRUPT, PTR(&irq)), 0);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_INTERRUPT, PTR(&irq)), -VMK_EEXIST);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_SREGS, PTR(&s)), 0);
	CHECK_EQ(s.interrupt_bitmap[0], 1ULL << 0x31);
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->last.inject, VMK_INJ_IRQ);
	CHECK_EQ(fake(v)->last.vector, 0x31);
	/* One that waits for IF is not one whose delivery was cut short. */
	get(&r, &g);
	g.rip = 0x1000;
	g.rflags = 2;
	g.rbx = DEV;
	put(&r, &g);
	code(&r, "\x89\x03", 2);		/* mov %eax, (%rbx) */
	CHECK_EQ(user_ioctl(r.vcpu, ABI_INTERRUPT, PTR(&irq)), 0);
	script_one((struct vmk_exit){ .kind = VMK_X_NESTED_FAULT, .gpa = DEV,
		.write = true });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_MMIO);
	CHECK(v->ev.irq_injected);
	v->ev.irq_injected = false;
	fake_enter = NULL;
	irq.irq = 256;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_INTERRUPT, PTR(&irq)), -VMK_EINVAL);

	/* The window: asked for with IF clear, opens when IF is set. */
	get(&r, &g);
	g.rflags = 2;
	put(&r, &g);
	r.run->request_interrupt_window = 1;
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_HLT);
	CHECK_EQ(r.run->ready_for_interrupt_injection, 0);
	CHECK(fake(v)->last.irq_window);
	g.rflags = 0x202;
	put(&r, &g);
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_IRQ_WINDOW_OPEN);
	r.run->request_interrupt_window = 0;

	/* CR8: in with RUN, out with SET_TPR when lowered. */
	r.run->cr8 = 16;
	CHECK_EQ(run(&r), -VMK_EINVAL);
	r.run->cr8 = 9;
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->cr8, 9);
	paging(&r, 7);
	code(&r, "\x44\x0f\x22\xc0", 4);	/* mov %rax, %cr8 */
	get(&r, &g);
	g.rip = 0x1000;
	g.rax = 3;
	put(&r, &g);
	script_one((struct vmk_exit){ .kind = VMK_X_CR_WRITE });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_SET_TPR);
	CHECK_EQ(r.run->cr8, 3);
	rig_down(&r);
	tap_done("events: interrupts and TPR with a user irqchip");
}

static void
test_exceptions(void)
{
	struct abi_vcpu_events e;
	struct vmk_vcpu *v;
	struct rig r;

	rig_up(&r, 2 * MB);
	flat32(&r);
	v = fake_last_vcpu();
	/* #GP on #GP is #DF; a fault on #DF is a shutdown. */
	vmk_inject_gp(v);
	vmk_inject_gp(v);
	CHECK_EQ(v->ev.exc_vector, VMK_DF);
	vmk_inject_gp(v);
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_SHUTDOWN);
	memset(&v->ev, 0, sizeof(v->ev));
	/* #PF on #GP is serial, #GP on #PF is double, benign never. */
	vmk_inject_gp(v);
	vmk_inject_pf(v, 0x1234, 2);
	CHECK_EQ(v->ev.exc_vector, VMK_PF);
	vmk_inject_gp(v);
	CHECK_EQ(v->ev.exc_vector, VMK_DF);
	memset(&v->ev, 0, sizeof(v->ev));
	vmk_inject_gp(v);
	vmk_inject_ud(v);
	CHECK_EQ(v->ev.exc_vector, VMK_UD);
	memset(&v->ev, 0, sizeof(v->ev));

	/* #AC and #DB come back to the guest; unknown ones end the run. */
	script_one((struct vmk_exit){ .kind = VMK_X_EXCEPTION,
	    .vector = VMK_AC, .error_code = 0x42 });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->last.vector, VMK_AC);
	CHECK_EQ(fake(v)->last.error_code, 0x42);
	script_one((struct vmk_exit){ .kind = VMK_X_EXCEPTION,
	    .vector = VMK_DB });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->last.vector, VMK_DB);
	script_one((struct vmk_exit){ .kind = VMK_X_UNKNOWN, .code = 0x777 });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_INTERNAL_ERROR);
	CHECK_EQ(r.run->internal.suberror, ABI_INTERNAL_UNEXPECTED_EXIT);
	CHECK_EQ(r.run->internal.data[0], 0x777);
	script_one((struct vmk_exit){ .kind = VMK_X_INVALID, .code = ~0ULL });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_FAIL_ENTRY);
	script_one((struct vmk_exit){ .kind = VMK_X_UD });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->last.vector, VMK_UD);

	/* NMI: masked until IRET; state survives a round trip. */
	CHECK_EQ(user_ioctl(r.vcpu, ABI_NMI, 0), 0);
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->last.inject, VMK_INJ_NMI);
	CHECK(v->ev.nmi_masked);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_NMI, 0), 0);
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->last.inject, VMK_INJ_NONE);
	CHECK(fake(v)->last.nmi_window);
	memset(&e, 0xff, sizeof(e));
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_VCPU_EVENTS, PTR(&e)), 0);
	CHECK_EQ(e.nmi.pending, 1);
	CHECK_EQ(e.nmi.masked, 1);
	CHECK_EQ(e.reserved[0] | e.reserved[25], 0);
	memset(&v->ev, 0, sizeof(v->ev));
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_VCPU_EVENTS, PTR(&e)), 0);
	CHECK_EQ(v->ev.nmi_pending, 1);
	CHECK(v->ev.nmi_masked);
	script_one((struct vmk_exit){ .kind = VMK_X_NMI_WINDOW });
	CHECK_EQ(run(&r), 0);
	CHECK(!v->ev.nmi_masked);
	e.exception.injected = 1;
	e.exception.nr = 32;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_VCPU_EVENTS, PTR(&e)),
	    -VMK_EINVAL);
	rig_down(&r);
	tap_done("events: exceptions, double faults, NMI, unknown exits");
}

static uint8_t mask_in_guest;

static void
note_mask(struct vmk_vcpu *vcpu, const struct vmk_entry *e,
    struct vmk_exit *x)
{
	(void)vcpu;
	(void)e;
	mask_in_guest = user_sigmask();
	x->kind = VMK_X_HLT;
	x->insn_len = 1;
}

static void
test_signals(void)
{
	struct { uint32_t len; uint8_t set[8]; } m = { 8, { 0x5a } };
	struct vmk_vcpu *v;
	struct rig r;

	rig_up(&r, 2 * MB);
	flat32(&r);
	v = fake_last_vcpu();
	user_signal_self(true);
	CHECK_EQ(run(&r), -VMK_EINTR);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_INTR);
	CHECK_EQ(v->entries, 0);
	user_signal_self(false);
	r.run->immediate_exit = 1;
	CHECK_EQ(run(&r), -VMK_EINTR);
	CHECK_EQ(v->entries, 0);
	r.run->immediate_exit = 0;
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(v->entries, 1);
	/* A mask for RUN, and the old one back. */
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_SIGNAL_MASK, PTR(&m)), 0);
	fake_enter = note_mask;
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(mask_in_guest, 0x5a);
	CHECK_EQ(user_sigmask(), 0);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_SIGNAL_MASK, 0), 0);
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(mask_in_guest, 0);
	m.len = 200;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_SIGNAL_MASK, PTR(&m)),
	    -VMK_EINVAL);
	rig_down(&r);
	tap_done("run: signals, masks and immediate_exit");
}

/* ---- state ------------------------------------------------------------- */

static void
test_state(void)
{
	struct { struct abi_msrs h; struct abi_msr_entry e[8]; } m;
	struct { struct abi_cpuid2 h; struct abi_cpuid_entry2 e[4]; } c;
	struct abi_regs a, b;
	struct abi_sregs s, s2;
	struct abi_xsave *x = calloc(1, sizeof(*x));
	struct abi_xcrs xc;
	struct abi_fpu f;
	struct abi_debugregs d;
	struct rig r;
	unsigned int i;
	uint64_t msr;

	rig_up(&r, 2 * MB);
	for (i = 0; i < sizeof(a); i++)
		((uint8_t *)&a)[i] = (uint8_t)(i * 7);
	a.rflags = 0x202;
	put(&r, &a);
	get(&r, &b);
	CHECK_EQ(memcmp(&a, &b, sizeof(a)), 0);
	a.rflags = ~0ULL;
	put(&r, &a);
	get(&r, &b);
	CHECK_EQ(b.rflags, 0x3f7fd7);

	flat32(&r);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_SREGS, PTR(&s)), 0);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_SREGS, PTR(&s)), 0);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_SREGS, PTR(&s2)), 0);
	CHECK_EQ(memcmp(&s, &s2, sizeof(s)), 0);
	/* States no processor can be in. */
	s2 = s;
	s2.cr0 = CR0_PG;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_SREGS, PTR(&s2)), -VMK_EINVAL);
	s2 = s;
	s2.cr4 = CR4_VMXE;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_SREGS, PTR(&s2)), -VMK_EINVAL);
	s2 = s;
	s2.efer = EFER_SVME;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_SREGS, PTR(&s2)), -VMK_EINVAL);
	s2 = s;
	s2.efer = EFER_LMA;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_SREGS, PTR(&s2)), -VMK_EINVAL);
	s2 = s;
	s2.gs.base = 0x8000000000000000ULL;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_SREGS, PTR(&s2)), -VMK_EINVAL);
	s2 = s;
	s2.cr8 = 16;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_SREGS, PTR(&s2)), -VMK_EINVAL);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_SREGS, PTR(&s2)), 0);
	CHECK_EQ(memcmp(&s, &s2, sizeof(s)), 0);

	/* MSRs: the result counts what was done before one failed. */
	memset(&m, 0, sizeof(m));
	m.h.nmsrs = 3;
	m.e[0].index = 0xc0000082;
	m.e[0].data = 0xffffffff81000000ULL;
	m.e[1].index = 0xc0000102;
	m.e[1].data = 0x8000000000000000ULL;	/* CVE-2014-3610 */
	m.e[2].index = 0x10;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_MSRS, PTR(&m)), 1);
	m.e[0].data = 0;
	m.h.nmsrs = 1;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_MSRS, PTR(&m)), 1);
	CHECK_EQ(m.e[0].data, 0xffffffff81000000ULL);
	m.h.nmsrs = VMK_MAX_MSRS + 1;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_MSRS, PTR(&m)), -VMK_E2BIG);
	/* Banks and a clock that are not there: QEMU's, not the guest's. */
	m.h.nmsrs = 3;
	m.e[0].index = 0x400;
	m.e[0].data = ~0ULL;
	m.e[1].index = 0x12;
	m.e[1].data = 0;
	m.e[2].index = 0x480;			/* behind the last bank */
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_MSRS, PTR(&m)), 2);
	CHECK_EQ(vmk_msr_get(fake_last_vcpu(), 0x400, &msr, false),
	    VMK_EINVAL);
	CHECK_EQ(vmk_msr_set(fake_last_vcpu(), 0x401, 0, false), VMK_EINVAL);
	CHECK_EQ(vmk_msr_get(fake_last_vcpu(), 0x12, &msr, false), VMK_EINVAL);
	m.h.nmsrs = 2;
	m.e[0].index = 0x277;			/* PAT: a reserved type */
	m.e[0].data = 0x0007040600070402ULL;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_MSRS, PTR(&m)), 0);
	m.e[0].index = 0xc0010114;		/* VM_CR does not exist */
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_MSRS, PTR(&m)), 0);

	/* XSAVE input that XRSTOR would fault on. */
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_XSAVE, PTR(x)), 0);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_XSAVE, PTR(x)), 0);
	((uint8_t *)x)[519] = 0x80;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_XSAVE, PTR(x)), -VMK_EINVAL);
	((uint8_t *)x)[519] = 0;
	((uint8_t *)x)[520] = 1;		/* compacted form */
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_XSAVE, PTR(x)), -VMK_EINVAL);
	((uint8_t *)x)[520] = 0;
	((uint8_t *)x)[26] = 1;			/* MXCSR reserved bit */
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_XSAVE, PTR(x)), -VMK_EINVAL);
	memset(&xc, 0, sizeof(xc));
	xc.nr_xcrs = 1;
	xc.xcrs[0].value = 4;			/* AVX without SSE, x87 */
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_XCRS, PTR(&xc)), -VMK_EINVAL);
	xc.nr_xcrs = 17;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_XCRS, PTR(&xc)), -VMK_EINVAL);
	xc.nr_xcrs = 1;
	xc.xcrs[0].value = 3;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_XCRS, PTR(&xc)), 0);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_XCRS, PTR(&xc)), 0);
	CHECK_EQ(xc.xcrs[0].value, 3);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_FPU, PTR(&f)), 0);
	CHECK_EQ(f.fcw, 0x40);
	f.fcw = 0x37f;
	f.xmm[15][15] = 9;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_FPU, PTR(&f)), 0);
	memset(&f, 0, sizeof(f));
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_FPU, PTR(&f)), 0);
	CHECK_EQ(f.fcw, 0x37f);
	CHECK_EQ(f.xmm[15][15], 9);
	f.mxcsr = 0x10000;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_FPU, PTR(&f)), -VMK_EINVAL);
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_DEBUGREGS, PTR(&d)), 0);
	CHECK_EQ(d.dr7, 0x400);
	d.dr7 = 1ULL << 32;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_DEBUGREGS, PTR(&d)), -VMK_EINVAL);

	/* CPUID: bounded, stored, frozen after the first run. */
	memset(&c, 0, sizeof(c));
	c.h.nent = VMK_MAX_CPUID + 1;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_CPUID2, PTR(&c)), -VMK_E2BIG);
	c.h.nent = 2;
	c.e[0].function = 0x40000000;
	c.e[0].ebx = 0x12345;
	c.e[1].function = 1;
	c.e[1].ecx = 1U << 27;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_CPUID2, PTR(&c)), 0);
	c.h.nent = 1;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_GET_CPUID2, PTR(&c)), -VMK_E2BIG);
	CHECK_EQ(c.h.nent, 2);
	get(&r, &a);
	a.rax = 0x40000000;
	a.rcx = 0;
	put(&r, &a);
	code(&r, "\x0f\xa2", 2);
	script_one((struct vmk_exit){ .kind = VMK_X_CPUID });
	CHECK_EQ(run(&r), 0);
	get(&r, &a);
	CHECK_EQ(a.rbx, 0x12345);
	CHECK_EQ(a.rip, 0x1003);
	/* OSXSAVE follows CR4, whatever was stored. */
	a.rax = 1;
	a.rip = 0x1000;
	put(&r, &a);
	script_one((struct vmk_exit){ .kind = VMK_X_CPUID });
	CHECK_EQ(run(&r), 0);
	get(&r, &a);
	CHECK_EQ(a.rcx, 0);
	c.h.nent = 2;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_CPUID2, PTR(&c)), 0);
	c.e[0].ebx++;
	CHECK_EQ(user_ioctl(r.vcpu, ABI_SET_CPUID2, PTR(&c)), -VMK_EINVAL);
	rig_down(&r);
	free(x);
	tap_done("state: registers, MSRs, FPU, CPUID and their checks");
}

static void
test_msr_exits(void)
{
	struct abi_regs g;
	struct vmk_vcpu *v;
	struct rig r;

	rig_up(&r, 2 * MB);
	flat32(&r);
	v = fake_last_vcpu();
	get(&r, &g);
	g.rcx = 0x12345678;			/* no such MSR */
	put(&r, &g);
	script_one((struct vmk_exit){ .kind = VMK_X_RDMSR, .insn_len = 2 });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->last.vector, VMK_GP);
	g.rcx = 0xc0000080;
	g.rax = EFER_SVME;
	g.rdx = 0;
	put(&r, &g);
	script_one((struct vmk_exit){ .kind = VMK_X_WRMSR, .insn_len = 2 });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->last.vector, VMK_GP);
	g.rax = EFER_NXE | EFER_SCE;
	put(&r, &g);
	fake(v)->last.inject = 0;
	script_one((struct vmk_exit){ .kind = VMK_X_WRMSR, .insn_len = 2 });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->creg[VMK_EFER], EFER_NXE | EFER_SCE);
	CHECK_EQ(fake(v)->last.inject, VMK_INJ_NONE);
	/* TSC: a write moves the offset and TSC_ADJUST with it. */
	g.rcx = 0x10;
	g.rax = 0x1000;
	put(&r, &g);
	script_one((struct vmk_exit){ .kind = VMK_X_WRMSR, .insn_len = 2 });
	CHECK_EQ(run(&r), 0);
	g.rip = 0x1000;
	put(&r, &g);
	script_one((struct vmk_exit){ .kind = VMK_X_RDMSR, .insn_len = 2 });
	CHECK_EQ(run(&r), 0);
	get(&r, &g);
	CHECK(g.rdx == 0 && g.rax >= 0x1000);
	/* XSETBV: only what SUPPORTED_CPUID offers. */
	g.rcx = 0;
	g.rax = 1ULL << 31 | 1;
	g.rdx = 0;
	put(&r, &g);
	script_one((struct vmk_exit){ .kind = VMK_X_XSETBV, .insn_len = 3 });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->last.vector, VMK_GP);
	/* CR0 and CR4 by MOV, the length from the decoder. */
	code(&r, "\x0f\x22\xe0", 3);
	g.rip = 0x1000;
	g.rax = CR4_VMXE;
	put(&r, &g);
	script_one((struct vmk_exit){ .kind = VMK_X_CR_WRITE });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->last.vector, VMK_GP);
	CHECK_EQ(fake(v)->creg[VMK_CR4], 0);
	g.rax = CR4_PAE;
	put(&r, &g);
	script_one((struct vmk_exit){ .kind = VMK_X_CR_WRITE });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->creg[VMK_CR4], CR4_PAE);
	/* Decoded by the processor: nothing is read from memory. */
	code(&r, "\x0f\x0b\x0f\x0b", 4);
	g.rsi = CR4_PSE;
	put(&r, &g);
	script_one((struct vmk_exit){ .kind = VMK_X_CR_WRITE, .insn_len = 3,
		.mov_cr = { true, 4, VMK_RSI } });
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(fake(v)->creg[VMK_CR4], CR4_PSE);
	get(&r, &g);
	CHECK_EQ(g.rip, 0x1004);		/* and the script's HLT */
	rig_down(&r);
	tap_done("state: MSR, XSETBV and CR exits");
}

/* ---- doorbells --------------------------------------------------------- */

static void
test_ioeventfd(void)
{
	struct abi_ioeventfd a = { .addr = DEV, .len = 4, .datamatch = 5,
		.flags = ABI_IOEVENTFD_DATAMATCH };
	struct abi_coalesced_zone z = { DEV + 0x1000, 0x1000, 0 };
	struct abi_coalesced_ring *ring;
	struct abi_regs g;
	uint64_t count = 0;
	struct rig r;
	int efd = eventfd(0, EFD_NONBLOCK);

	rig_up(&r, 2 * MB);
	flat32(&r);
	a.fd = 0;				/* not an eventfd */
	CHECK_EQ(user_ioctl(r.vm, ABI_IOEVENTFD, PTR(&a)), -VMK_EINVAL);
	a.fd = efd;
	a.len = 3;
	CHECK_EQ(user_ioctl(r.vm, ABI_IOEVENTFD, PTR(&a)), -VMK_EINVAL);
	a.len = 4;
	CHECK_EQ(user_ioctl(r.vm, ABI_IOEVENTFD, PTR(&a)), 0);
	CHECK_EQ(user_ioctl(r.vm, ABI_IOEVENTFD, PTR(&a)), -VMK_EEXIST);
	code(&r, "\x89\x0b", 2);
	get(&r, &g);
	g.rbx = DEV;
	g.rcx = 5;
	put(&r, &g);
	script_one(nested(DEV, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_HLT);
	CHECK_EQ(read(efd, &count, 8), 8);
	CHECK_EQ(count, 1);
	g.rcx = 6;				/* another value */
	put(&r, &g);
	script_one(nested(DEV, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_MMIO);
	a.flags |= ABI_IOEVENTFD_DEASSIGN;
	CHECK_EQ(user_ioctl(r.vm, ABI_IOEVENTFD, PTR(&a)), 0);
	CHECK_EQ(user_ioctl(r.vm, ABI_IOEVENTFD, PTR(&a)), -VMK_ENOENT);

	/* Coalesced writes: the indices are user space's to corrupt. */
	CHECK_EQ(user_ioctl(r.vm, ABI_REGISTER_COALESCED_MMIO, PTR(&z)), 0);
	ring = (struct abi_coalesced_ring *)(void *)((uint8_t *)r.run +
	    2 * VMK_PAGE_SIZE);
	g.rbx = DEV + 0x1ffc;
	put(&r, &g);
	script_one(nested(DEV + 0x1ffc, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_HLT);
	CHECK_EQ(ring->last, 1);
	ring->last = 0xffffffff;		/* CVE-2019-14821 */
	put(&r, &g);
	script_one(nested(DEV + 0x1ffc, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_MMIO);
	ring->last = 5;
	ring->first = 6;			/* full */
	put(&r, &g);
	script_one(nested(DEV + 0x1ffc, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_MMIO);
	CHECK_EQ(user_ioctl(r.vm, ABI_UNREGISTER_COALESCED_MMIO, PTR(&z)), 0);
	ring->first = ring->last = 0;
	put(&r, &g);
	script_one(nested(DEV + 0x1ffc, true));
	CHECK_EQ(run(&r), 0);
	CHECK_EQ(r.run->exit_reason, ABI_EXIT_MMIO);
	a.flags = 0;
	CHECK_EQ(user_ioctl(r.vm, ABI_IOEVENTFD, PTR(&a)), 0);
	rig_down(&r);				/* releases the last one */
	close(efd);
	tap_done("doorbells: ioeventfd and coalesced writes");
}

/* ---- two threads ------------------------------------------------------- */

static volatile bool stop_spinning;

/* A guest that runs until it is kicked. */
static void
spinning(struct vmk_vcpu *vcpu, const struct vmk_entry *e, struct vmk_exit *x)
{
	(void)vcpu;
	(void)e;
	while (!stop_spinning && !vmk_must_leave())
		continue;
	x->kind = stop_spinning ? VMK_X_HLT : VMK_X_NONE;
	x->insn_len = 1;
}

/* The generation with which the guest runs; ~0: it does not. */
static uint64_t inside = ~0ULL;

static void
passing(struct vmk_vcpu *vcpu, const struct vmk_entry *e, struct vmk_exit *x)
{
	unsigned int i;

	(void)e;
	__atomic_store_n(&inside, vcpu->tlb_gen, __ATOMIC_SEQ_CST);
	for (i = 0; i < 100; i++)
		__asm__ __volatile__("pause");
	__atomic_store_n(&inside, ~0ULL, __ATOMIC_SEQ_CST);
	x->kind = stop_spinning ? VMK_X_HLT : VMK_X_NONE;
	x->insn_len = 1;
}

static void *
runner(void *arg)
{
	int vcpu = *(int *)arg;

	return ((void *)(intptr_t)user_ioctl(vcpu, ABI_RUN, 0));
}

static void
test_flush(void)
{
	pthread_t t;
	struct vmk_vcpu *v;
	struct rig r;
	uint64_t before;
	void *ret;
	unsigned int i;
	uint8_t *more = user_ram(2 * MB);

	rig_up(&r, 2 * MB);
	flat32(&r);
	v = fake_last_vcpu();
	stop_spinning = false;
	fake_enter = spinning;
	CHECK_EQ(pthread_create(&t, NULL, runner, &r.vcpu), 0);
	while (__atomic_load_n(&v->in_guest, __ATOMIC_SEQ_CST) == 0)
		continue;
	before = fake(v)->flushes;
	for (i = 0; i < 200; i++) {
		CHECK_EQ(set_region(r.vm, 1, 64 * MB, MB, more, 0), 0);
		CHECK_EQ(set_region(r.vm, 1, 0, 0, NULL, 0), 0);
	}
	stop_spinning = true;
	pthread_join(t, &ret);
	CHECK_EQ((intptr_t)ret, 0);
	CHECK(user_kicks() > 0);
	CHECK(fake(v)->flushes > before);
	CHECK_EQ(v->tlb_gen, r.vm >= 0 ? v->vm->tlb_gen : 0);
	rig_down(&r);
	munmap(more, 2 * MB);
	tap_done("run: a flush makes a running vCPU leave");
}

/* However entry and flush meet, nobody runs with what was flushed. */
static void
test_flush_race(void)
{
	unsigned int i, stale = 0;
	struct vmk_vm *vm;
	struct rig r;
	pthread_t t;

	rig_up(&r, 2 * MB);
	flat32(&r);
	vm = fake_last_vm();
	stop_spinning = false;
	fake_enter = passing;
	CHECK_EQ(pthread_create(&t, NULL, runner, &r.vcpu), 0);
	for (i = 0; i < 200000; i++) {
		vmk_vm_flush(vm);
		stale += __atomic_load_n(&inside, __ATOMIC_SEQ_CST) <
		    vm->tlb_gen;
	}
	stop_spinning = true;
	pthread_join(t, NULL);
	CHECK_EQ(stale, 0);
	rig_down(&r);
	tap_done("run: no entry slips past a flush");
}

/* Hosts unload what failed to load; nothing is there to be taken down. */
static void
test_load(void)
{
	fake_init_error = VMK_ENODEV;
	CHECK_EQ(vmk_module_init(), VMK_ENODEV);
	vmk_module_resume();
	CHECK_EQ(vmk_module_fini(), 0);
	fake_init_error = VMK_EBUSY;
	CHECK_EQ(vmk_module_init(), VMK_EBUSY);
	CHECK_EQ(vmk_module_fini(), 0);
	fake_init_error = 0;
	CHECK_EQ(vmk_module_init(), 0);
	CHECK_EQ(vmk_module_fini(), 0);
	CHECK_EQ(vmk_module_fini(), 0);
	vmk_module_resume();
	tap_done("module: unloads after a failed load, and twice");
}

int
main(void)
{
	test_load();
	if (vmk_module_init() != 0)
		return (1);
	test_system();
	test_create();
	test_failures();
	test_regions();
	test_nested_tables();
	test_holes();
	test_dirty_log();
	test_mmio();
	test_mmio_strings();
	test_ports();
	test_walk();
	test_faults();
	test_undecodable();
	test_user_interrupts();
	test_exceptions();
	test_signals();
	test_state();
	test_msr_exits();
	test_ioeventfd();
	test_flush();
	test_flush_race();
	CHECK_EQ(vmk_module_fini(), 0);
	return (tap_failed != 0);
}

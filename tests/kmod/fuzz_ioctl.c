/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * fuzz_ioctl.c [calls [seed]]: mutation fuzzer over the whole request surface.
 *
 * Each step picks a descriptor, a request (mostly a real one, sometimes with
 * a bit flipped) and an argument (a plausible structure with a few bytes
 * mutated, a wild address, a small number), and calls.  RUN meets a processor
 * that leaves the guest for random reasons with random operands, over guest
 * memory full of random code.  A second thread scribbles on the run pages all
 * the time.  Objects are closed and made anew; at the end nothing may be
 * held.  The host aborts on a sleep in the wrong place, the sanitizers on the
 * rest.  Deterministic for one seed except for the second thread.
 */
#define	_GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "fake_cpu.h"
#include "tap.h"
#include "vmk_user.h"

#define	RAM_SIZE	(8UL << 20)
#define	NVCPU		3

static uint64_t seed = 0x9e3779b97f4a7c15ULL;

static uint64_t
rnd(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (seed);
}

static const uint32_t dev_requests[] = { ABI_GET_API_VERSION,
	ABI_GET_MSR_INDEX_LIST, ABI_CHECK_EXTENSION, ABI_GET_VCPU_MMAP_SIZE,
	ABI_GET_SUPPORTED_CPUID, 0xc008ae09,	/* not offered */
	ABI_GET_MSRS };

static const uint32_t vm_requests[] = { ABI_SET_USER_MEMORY_REGION,
	ABI_SET_USER_MEMORY_REGION, ABI_SET_USER_MEMORY_REGION,
	ABI_GET_DIRTY_LOG, ABI_SET_TSS_ADDR, ABI_SET_IDENTITY_MAP_ADDR,
	ABI_CREATE_IRQCHIP, ABI_IRQ_LINE, ABI_GET_IRQCHIP, ABI_SET_IRQCHIP,
	ABI_IRQ_LINE_STATUS,
	ABI_REGISTER_COALESCED_MMIO, ABI_UNREGISTER_COALESCED_MMIO,
	ABI_SET_GSI_ROUTING, ABI_REINJECT_CONTROL, ABI_IRQFD, ABI_CREATE_PIT2,
	ABI_IOEVENTFD, ABI_SET_CLOCK, ABI_GET_CLOCK,
	ABI_GET_PIT2, ABI_SET_PIT2, ABI_SET_TSC_KHZ, ABI_GET_TSC_KHZ,
	ABI_SIGNAL_MSI, ABI_CHECK_EXTENSION, ABI_ENABLE_CAP };

static const uint32_t vcpu_requests[] = { ABI_RUN, ABI_RUN, ABI_RUN, ABI_RUN,
	ABI_RUN, ABI_RUN, ABI_RUN, ABI_GET_REGS, ABI_SET_REGS, ABI_GET_SREGS,
	ABI_SET_SREGS, ABI_INTERRUPT, ABI_GET_MSRS,
	ABI_SET_MSRS, ABI_GET_FPU, ABI_SET_FPU, ABI_GET_LAPIC, ABI_SET_LAPIC,
	ABI_SET_CPUID2, ABI_GET_CPUID2, ABI_GET_MP_STATE, ABI_SET_MP_STATE,
	ABI_NMI, ABI_SET_GUEST_DEBUG, ABI_GET_VCPU_EVENTS,
	ABI_SET_VCPU_EVENTS, ABI_GET_DEBUGREGS, ABI_SET_DEBUGREGS,
	ABI_ENABLE_CAP, ABI_GET_XSAVE, ABI_SET_XSAVE, ABI_GET_XCRS,
	ABI_SET_XCRS, ABI_SET_SIGNAL_MASK,
	ABI_SET_VAPIC_ADDR, ABI_SET_TSC_KHZ, ABI_GET_TSC_KHZ };

static uint8_t *ram;
static int vm = -2, vcpu[NVCPU] = { -2, -2, -2 };
static struct abi_run *runs[NVCPU];
static int efd[2];
static bool stop;

/* ---- the processor ----------------------------------------------------- */

static void
random_exit(struct vmk_vcpu *v, const struct vmk_entry *e, struct vmk_exit *x)
{
	unsigned int i;

	(void)e;
	memset(x, 0, sizeof(*x));
	x->kind = (enum vmk_exit_kind)(rnd() % (VMK_X_UNKNOWN + 1));
	if (x->kind == VMK_X_ABORTED || rnd() % 16 == 0)
		x->kind = VMK_X_HLT;
	x->insn_len = rnd() % 3 == 0 ? (uint8_t)(1 + rnd() % 4) : 0;
	x->info2 = rnd() % 0x4000;
	x->gpa = rnd() % 4 == 0 ? rnd() : rnd() % 2 == 0 ?
	    0xfee00000 + rnd() % 0x2000 : rnd() % (RAM_SIZE * 4);
	x->write = rnd() & 1;
	x->vector = rnd() & 31;
	x->error_code = (uint32_t)rnd();
	x->io.port = rnd() % 2 ? (uint16_t)rnd() : (uint16_t)(0x20 +
	    rnd() % 0x80);
	x->io.size = (uint8_t)(1U << (rnd() % 3));
	x->io.in = rnd() & 1;
	x->io.string = rnd() % 4 == 0;
	/* The guest has been busy. */
	for (i = 0; i < 3; i++)
		v->gpr[rnd() % VMK_NGPR] = rnd() % 2 ? rnd() : rnd() %
		    (RAM_SIZE + 8192);
	if (rnd() % 4 == 0)
		v->gpr[VMK_RCX] = rnd() % 2 ? rnd() % 64 : 0x800 + rnd() % 64;
	v->rip = rnd() % 8 == 0 ? rnd() : rnd() % RAM_SIZE;
	v->rflags = (v->rflags & ~0x700ULL) | (rnd() & 0x700) | 2;
	if (rnd() % 32 == 0) {
		v->ev.irq_injected = true;
		v->ev.irq_vector = (uint8_t)rnd();
	}
	if (rnd() % 8 == 0)
		user_signal_self(true);
}

/* ---- arguments --------------------------------------------------------- */

static uint8_t *buffer;			/* 64 KiB, then an unmapped page */
#define	BUFFER	65536U

static void
mutate(uint8_t *p, size_t n)
{
	unsigned int i, k = (unsigned int)(rnd() % 6);

	for (i = 0; i < k && n > 0; i++) {
		size_t at = rnd() % n;

		switch (rnd() % 4) {
		case 0:
			p[at] ^= (uint8_t)(1U << (rnd() % 8));
			break;
		case 1:
			p[at] = (uint8_t)rnd();
			break;
		case 2:
			p[at] = 0xff;
			break;
		default:
			memset(p + at, rnd() % 2 ? 0 : 0xff,
			    n - at < 8 ? n - at : 8);
			break;
		}
	}
}

static void
plausible(uint32_t request)
{
	struct abi_memory_region *r = (void *)buffer;
	struct abi_ioeventfd *io = (void *)buffer;
	struct abi_irqfd *irq = (void *)buffer;
	struct abi_dirty_log *log = (void *)buffer;
	struct abi_enable_cap *cap = (void *)buffer;
	struct abi_irq_level *line = (void *)buffer;
	uint32_t *word = (void *)buffer, i;
	uint64_t pages;

	switch (request) {
	case ABI_SET_USER_MEMORY_REGION:
		memset(r, 0, sizeof(*r));
		r->slot = (uint32_t)(rnd() % 6);
		r->flags = (uint32_t)(rnd() % 4);
		pages = rnd() % 1200;
		r->guest_phys_addr = (rnd() % 4096) << 12;
		r->memory_size = rnd() % 3 == 0 ? 0 : pages << 12;
		r->userspace_addr = (uint64_t)(uintptr_t)ram +
		    ((rnd() % 600) << 12);
		break;
	case ABI_IOEVENTFD:
		memset(io, 0, sizeof(*io));
		io->fd = efd[rnd() % 2];
		io->addr = rnd() % 64;
		io->len = (uint32_t)(1U << (rnd() % 4));
		io->flags = (uint32_t)(rnd() % 8);
		io->datamatch = rnd() % 4;
		break;
	case ABI_IRQFD:
		memset(irq, 0, sizeof(*irq));
		irq->fd = (uint32_t)efd[rnd() % 2];
		irq->gsi = (uint32_t)(rnd() % 32);
		irq->flags = (uint32_t)(rnd() % 2);
		break;
	case ABI_GET_DIRTY_LOG:
		log->slot = (uint32_t)(rnd() % 6);
		log->dirty_bitmap = (uint64_t)(uintptr_t)buffer + 32768;
		break;
	case ABI_ENABLE_CAP:
		memset(cap, 0, sizeof(*cap));
		cap->cap = rnd() % 2 ? ABI_CAP_SPLIT_IRQCHIP :
		    ABI_CAP_EXIT_ON_EMULATION_FAILURE;
		cap->args[0] = rnd() % 26;
		break;
	case ABI_IRQ_LINE: case ABI_IRQ_LINE_STATUS:
		line->irq = (uint32_t)(rnd() % 32);
		line->level = rnd() & 1;
		break;
	case ABI_GET_MSRS: case ABI_SET_MSRS:
		word[0] = (uint32_t)(rnd() % 8);
		for (i = 0; i < 8; i++) {
			static const uint32_t m[] = { 0x10, 0x1b, 0x3b, 0x174,
				0x277, 0x2ff, 0x200, 0x400, 0x6e0, 0x800,
				0x830, 0xc0000080, 0xc0000082, 0xc0010015 };

			word[2 + 4 * i] = m[rnd() % VMK_ARRAY_LEN(m)] +
			    (uint32_t)(rnd() % 3);
		}
		break;
	case ABI_SET_CPUID2: case ABI_GET_SUPPORTED_CPUID:
	case ABI_GET_CPUID2: case ABI_GET_MSR_INDEX_LIST:
	case ABI_SET_GSI_ROUTING:
		word[0] = (uint32_t)(rnd() % 40);
		word[1] = 0;
		break;
	case ABI_SET_SREGS:
		if (vcpu[0] >= 0)
			user_ioctl(vcpu[0], ABI_GET_SREGS,
			    (uint64_t)(uintptr_t)buffer);
		break;
	default:
		break;
	}
}

static uint64_t
argument(uint32_t request)
{
	size_t size = (request >> 16) & 0x3fff;

	switch (rnd() % 32) {
	case 0:
		return (rnd());
	case 1:
		return (rnd() % 64);
	case 2:				/* runs off the end of the mapping */
		return ((uint64_t)(uintptr_t)buffer + BUFFER - rnd() % 256);
	default:
		break;
	}
	if (request == ABI_RUN || (size == 0 && rnd() % 2))
		return (0);
	if (size == 0)
		return (rnd() % 300);
	plausible(request);
	if (rnd() % 2)
		mutate(buffer, size > 8192 ? 8192 : size + 64);
	return ((uint64_t)(uintptr_t)buffer);
}

/* ---- steps ------------------------------------------------------------- */

static void
close_all(void)
{
	unsigned int i;

	for (i = 0; i < NVCPU; i++) {
		__atomic_store_n(&runs[i], NULL, __ATOMIC_SEQ_CST);
		if (vcpu[i] >= 0)
			user_close(vcpu[i]);
		vcpu[i] = -2;
	}
	if (vm >= 0)
		user_close(vm);
	vm = -2;
}

static void
make_all(void)
{
	struct abi_memory_region r = { 0, 0, 0, RAM_SIZE,
		(uint64_t)(uintptr_t)ram };
	unsigned int i, n;
	struct abi_enable_cap cap = { .cap = ABI_CAP_SPLIT_IRQCHIP,
		.args = { 24 } };

	vm = user_ioctl(USER_DEV_KVM, ABI_CREATE_VM, 0);
	if (vm < 0)
		return;
	(void)user_ioctl(vm, ABI_SET_USER_MEMORY_REGION,
	    (uint64_t)(uintptr_t)&r);
	switch (rnd() % 3) {
	case 0:
		(void)user_ioctl(vm, ABI_CREATE_IRQCHIP, 0);
		break;
	case 1:
		(void)user_ioctl(vm, ABI_ENABLE_CAP,
		    (uint64_t)(uintptr_t)&cap);
		break;
	default:
		break;
	}
	for (i = 0; i < NVCPU; i++) {
		vcpu[i] = user_ioctl(vm, ABI_CREATE_VCPU, i);
		if (vcpu[i] >= 0)
			runs[i] = user_map(vcpu[i], &n);
	}
}

static void
one_step(void)
{
	const uint32_t *list;
	uint32_t request;
	unsigned int n;
	int fd;

	switch (rnd() % 16) {
	case 0:
		fd = USER_DEV_KVM;
		list = dev_requests;
		n = VMK_ARRAY_LEN(dev_requests);
		break;
	case 1: case 2: case 3: case 4: case 5: case 6:
		fd = vm;
		list = vm_requests;
		n = VMK_ARRAY_LEN(vm_requests);
		break;
	default:
		fd = vcpu[rnd() % NVCPU];
		list = vcpu_requests;
		n = VMK_ARRAY_LEN(vcpu_requests);
		break;
	}
	request = list[rnd() % n];
	if (rnd() % 64 == 0)
		request ^= 1U << (rnd() % 32);
	if (request == ABI_CREATE_VM)
		return;
	if (rnd() % 256 == 0)
		user_fail_at(1 + rnd() % 4);
	(void)user_ioctl(fd, request, argument(request));
	user_fail_at(0);
	user_signal_self(false);
}

/* Whatever user space can write, it writes at the worst moment. */
static void *
scribbler(void *arg)
{
	uint64_t s = 12345;

	(void)arg;
	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
		volatile uint8_t *p;
		unsigned int i = (unsigned int)(s >> 60) % NVCPU;

		s = s * 6364136223846793005ULL + 1442695040888963407ULL;
		p = (volatile uint8_t *)__atomic_load_n(&runs[i],
		    __ATOMIC_SEQ_CST);
		if (p != NULL)
			p[(s >> 33) % 64 + (s >> 50) % 3 * VMK_PAGE_SIZE] =
			    (uint8_t)(s >> 40);
		if ((s >> 33) % 64 == 0)
			nanosleep(&(struct timespec){ 0, 1000 }, NULL);
	}
	return (NULL);
}

int
main(int argc, char **argv)
{
	unsigned long calls = argc > 1 ? strtoul(argv[1], NULL, 0) : 200000, i;
	unsigned long entries = 0;
	pthread_t t;
	char name[96];

	if (argc > 2)
		seed ^= strtoul(argv[2], NULL, 0) * 0x9e3779b97f4a7c15ULL;
	if (vmk_module_init() != 0)
		return (1);
	user_never_wait(true);
	fake_enter = random_exit;
	ram = mmap(NULL, RAM_SIZE + BUFFER + VMK_PAGE_SIZE,
	    PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (ram == MAP_FAILED)
		return (1);
	buffer = ram + RAM_SIZE;
	munmap(buffer + BUFFER, VMK_PAGE_SIZE);
	/* Wild addresses must not reach the test's own memory. */
	user_arena(ram, RAM_SIZE + BUFFER);
	/* A hole in guest memory, so that pins fail. */
	munmap(ram + (5UL << 20), VMK_PAGE_SIZE);
	for (i = 0; i < (5UL << 20); i += 8)
		memcpy(ram + i, &(uint64_t){ rnd() }, 8);
	efd[0] = eventfd(0, EFD_NONBLOCK);
	efd[1] = eventfd(0, EFD_NONBLOCK);
	if (pthread_create(&t, NULL, scribbler, NULL) != 0)
		return (1);
	for (i = 0; i < calls; i++) {
		if (i % 4096 == 0) {
			if (vm >= 0 && vcpu[0] >= 0)
				entries += fake_last_vcpu()->entries;
			/*
			 * The scribbler may hold a run page: stop it while
			 * the pages go.
			 */
			stop = true;
			pthread_join(t, NULL);
			close_all();
			CHECK_EQ(user_outstanding(), 0);
			CHECK_EQ(user_pinned(), 0);
			CHECK_EQ(vmk_mem_charged(), 0);
			make_all();
			stop = false;
			if (pthread_create(&t, NULL, scribbler, NULL) != 0)
				return (1);
		}
		one_step();
	}
	stop = true;
	pthread_join(t, NULL);
	close_all();
	CHECK_EQ(user_outstanding(), 0);
	CHECK_EQ(user_pinned(), 0);
	CHECK_EQ(vmk_mem_charged(), 0);
	CHECK(calls < 10000 || entries > 0);
	CHECK_EQ(vmk_module_fini(), 0);
	snprintf(name, sizeof(name), "fuzz: %lu requests, nothing leaks", i);
	tap_done(name);
	return (tap_failed != 0);
}

/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * nested_test.c: payloads on a real /dev/kvm, through <linux/kvm.h> alone, so
 * that the same program tests Linux's driver and ours.
 *
 *   nested_test         TAP lines
 *   nested_test slow    the same, less of what an interpreter is slow at
 *   nested_test NAME... only these tests
 *   nested_test bench   exits per second
 */
#define	_GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tap.h"

#define	RAM	(64UL << 20)
#define	LOAD	0x10000UL
#define	IDT	0x5000UL
#define	HANDLERS 0x40000UL
#define	QUIET	0x18000000UL	/* writes here are not reported */

#define	P(name)	extern const uint8_t pl_##name[], pl_##name##_end[]
P(count); P(ports); P(cpuids); P(prefixed); P(mmio); P(strings); P(msrs);
P(handlers); P(forbidden); P(hypercall); P(irq); P(irq_handler); P(spin);
P(fpu); P(badxcr); P(touch); P(dirty); P(hammer); P(smp); P(triple);
P(db_loop); P(control); P(real); P(mmios); P(halts); P(halts_handler);
P(probe);
#define	LOAD_PAYLOAD(m, name)						\
	load(m, pl_##name, (size_t)(pl_##name##_end - pl_##name))

struct machine {
	int		 kvm, vm, nvcpu, vcpu[8];
	struct kvm_run	*run[8];
	uint8_t		*ram;
	uint32_t	 words[64];
	unsigned int	 nwords;
};

static bool slow;

static bool
xioctl(int fd, unsigned long request, void *arg, int line)
{
	if (ioctl(fd, request, arg) >= 0)
		return (true);
	printf("# line %d: request %#lx: %s\n", line, request,
	    strerror(errno));
	tap_bad++;
	return (false);
}
#define	X(fd, request, arg)	xioctl(fd, request, (void *)(arg), __LINE__)

static void
map_slot(struct machine *m, unsigned int slot, uint64_t gpa, uint64_t size,
    void *p, unsigned int flags)
{
	struct kvm_userspace_memory_region r = { slot, flags, gpa, size,
		(uint64_t)p };

	X(m->vm, KVM_SET_USER_MEMORY_REGION, &r);
}

static void
add_vcpu(struct machine *m)
{
	struct kvm_cpuid2 *c;
	int i = m->nvcpu++;
	size_t size = (size_t)ioctl(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);

	m->vcpu[i] = ioctl(m->vm, KVM_CREATE_VCPU, i);
	m->run[i] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED,
	    m->vcpu[i], 0);
	CHECK(m->vcpu[i] >= 0 && m->run[i] != MAP_FAILED);
	c = calloc(1, sizeof(*c) + 256 * sizeof(c->entries[0]));
	c->nent = 256;
	X(m->kvm, KVM_GET_SUPPORTED_CPUID, c);
	X(m->vcpu[i], KVM_SET_CPUID2, c);
	free(c);
}

/* Identity-mapped long mode, exceptions to the handlers. */
static void
long_mode(struct machine *m, int i)
{
	uint64_t *p4 = (uint64_t *)(m->ram + 0x1000);
	uint64_t *p3 = (uint64_t *)(m->ram + 0x2000);
	uint64_t *p2 = (uint64_t *)(m->ram + 0x3000);
	struct kvm_segment cs = { .limit = 0xffffffff, .selector = 8,
		.present = 1, .type = 11, .s = 1, .l = 1, .g = 1 }, ds;
	struct kvm_sregs s;
	struct kvm_regs g = { .rip = LOAD, .rflags = 2,
		.rsp = 0x20000 - (uint64_t)i * 0x1000 };
	/*
	 * Bochs 2.7 leaves the host's interrupts masked in a guest that is
	 * entered with IF clear, until the guest sets it.
	 */
	const uint64_t enabled = slow ? 0x200 : 0;
	uint64_t gdt[3] = { 0, 0x00209b0000000000, 0x00cf93000000ffff };
	unsigned int v;

	g.rflags |= enabled;
	p4[0] = 0x2007;
	p3[0] = 0x3007;
	for (v = 0; v < 512; v++)
		p2[v] = (uint64_t)v << 21 | 0x87;
	memcpy(m->ram + 0x4000, gdt, sizeof(gdt));
	memcpy(m->ram + HANDLERS, pl_handlers,
	    (size_t)(pl_handlers_end - pl_handlers));
	for (v = 0; v < 20; v++) {
		uint64_t at = HANDLERS + v * 64;

		uint64_t gate[2] = { (at & 0xffff) | 8 << 16 |
		    0x8e00ULL << 32 | (at >> 16 & 0xffff) << 48, at >> 32 };
		memcpy(m->ram + IDT + v * 16, gate, 16);
	}
	X(m->vcpu[i], KVM_GET_SREGS, &s);
	s.cr3 = 0x1000;
	s.cr4 = 0x20;
	s.cr0 = 0x80050033;
	s.efer = 0x500;
	ds = cs;
	ds.type = 3;
	ds.l = 0;
	ds.db = 1;
	ds.selector = 16;
	s.cs = cs;
	s.ds = s.es = s.fs = s.gs = s.ss = ds;
	s.gdt.base = 0x4000;
	s.gdt.limit = 23;
	s.idt.base = IDT;
	s.idt.limit = 0xfff;
	X(m->vcpu[i], KVM_SET_SREGS, &s);
	X(m->vcpu[i], KVM_SET_REGS, &g);
}

static void
up_with(struct machine *m, int nvcpu, bool irqchip)
{
	memset(m, 0, sizeof(*m));
	m->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	m->vm = ioctl(m->kvm, KVM_CREATE_VM, 0);
	CHECK(m->kvm >= 0 && m->vm >= 0);
	X(m->vm, KVM_SET_TSS_ADDR, 0xfffbd000);
	if (irqchip)
		X(m->vm, KVM_CREATE_IRQCHIP, 0);
	m->ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE,
	    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	map_slot(m, 0, 0, RAM, m->ram, 0);
	while (m->nvcpu < nvcpu) {
		add_vcpu(m);
		long_mode(m, m->nvcpu - 1);
	}
}

static void
up(struct machine *m, int nvcpu)
{
	up_with(m, nvcpu, false);
}

static void
down(struct machine *m)
{
	size_t size = (size_t)ioctl(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	int i;

	for (i = 0; i < m->nvcpu; i++) {
		munmap(m->run[i], size);
		close(m->vcpu[i]);
	}
	close(m->vm);
	close(m->kvm);
	munmap(m->ram, RAM);
}

static void
load(struct machine *m, const uint8_t *p, size_t n)
{
	memcpy(m->ram + LOAD, p, n);
}

/* Run, collecting the words written to port 0x10; other exits return. */
static int
run(struct machine *m, int i)
{
	struct kvm_run *r = m->run[i];

	for (;;) {
		if (ioctl(m->vcpu[i], KVM_RUN, 0) < 0)
			return (-errno);
		if (r->exit_reason == KVM_EXIT_IO && r->io.port == 0x10 &&
		    r->io.direction == KVM_EXIT_IO_OUT) {
			if (m->nwords < 64)
				memcpy(&m->words[m->nwords++], (uint8_t *)r +
				    r->io.data_offset, 4);
			continue;
		}
		if ((r->exit_reason == KVM_EXIT_IO && r->io.port == 0x11) ||
		    (r->exit_reason == KVM_EXIT_MMIO &&
		    r->mmio.phys_addr == QUIET))
			continue;
		return ((int)r->exit_reason);
	}
}

/* A handler behind the payload, and its gate. */
static void
set_gate(struct machine *m, unsigned int vector, const uint8_t *p, size_t n)
{
	uint64_t at = LOAD + 0x800, gate[2] = { (at & 0xffff) | 8 << 16 |
		0x8e00ULL << 32 | (at >> 16 & 0xffff) << 48, 0 };

	memcpy(m->ram + at, p, n);
	memcpy(m->ram + IDT + vector * 16, gate, 16);
}

static void
set_rbx(struct machine *m, int i, uint64_t v)
{
	struct kvm_regs g;

	X(m->vcpu[i], KVM_GET_REGS, &g);
	g.rbx = v;
	X(m->vcpu[i], KVM_SET_REGS, &g);
}

/* ---- tests ------------------------------------------------------------- */

static void
test_basic(void)
{
	struct machine m;
	struct kvm_regs g;

	up(&m, 1);
	LOAD_PAYLOAD(&m, count);
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	CHECK_EQ(m.nwords, 1);
	CHECK_EQ(m.words[0], 100000);
	X(m.vcpu[0], KVM_GET_REGS, &g);
	CHECK_EQ(g.rcx, 0);
	CHECK_EQ(g.rip, LOAD + (uint64_t)(pl_count_end - pl_count));
	down(&m);
	tap_done("guest: a loop in long mode, a port, HLT");
}

static double
now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return ((double)t.tv_sec + (double)t.tv_nsec * 1e-9);
}

/* A long loop that nothing may disturb, and as many exits as a boot has. */
static void
test_probe(void)
{
	unsigned int exits = slow ? 5000 : 100000;
	struct machine m;
	double t[3];

	up(&m, 1);
	LOAD_PAYLOAD(&m, probe);
	set_rbx(&m, 0, exits);
	t[0] = now();
	CHECK_EQ(ioctl(m.vcpu[0], KVM_RUN, 0), 0);
	CHECK_EQ(m.run[0]->exit_reason, KVM_EXIT_IO);
	t[1] = now();
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	t[2] = now();
	CHECK_EQ(m.words[0], 0x600d);
	printf("# 1000000 turns %.2f s, %u exits %.2f s\n", t[1] - t[0], exits,
	    t[2] - t[1]);
	down(&m);
	tap_done("guest: a million turns, many exits");
}

static void
test_real(void)
{
	struct machine m;
	struct kvm_sregs s;
	struct kvm_regs g = { .rip = 0, .rflags = 2, .rsp = 0x8000 };

	up(&m, 0);
	add_vcpu(&m);
	LOAD_PAYLOAD(&m, real);
	/* The hole at 640 KiB. */
	map_slot(&m, 0, 0, 0, NULL, 0);
	map_slot(&m, 0, 0, 0xa0000, m.ram, 0);
	X(m.vcpu[0], KVM_GET_SREGS, &s);
	CHECK_EQ(s.cs.base, 0xffff0000);
	CHECK_EQ(s.cs.selector, 0xf000);
	s.cs.base = LOAD;
	s.cs.selector = LOAD >> 4;
	X(m.vcpu[0], KVM_SET_SREGS, &s);
	X(m.vcpu[0], KVM_SET_REGS, &g);
	CHECK_EQ(run(&m, 0), KVM_EXIT_MMIO);
	CHECK_EQ(m.run[0]->mmio.phys_addr, 0xb8000);
	CHECK_EQ(m.run[0]->mmio.is_write, 1);
	CHECK_EQ(m.run[0]->mmio.len, 2);
	CHECK_EQ(m.run[0]->mmio.data[0], 0x41);
	CHECK_EQ(run(&m, 0), KVM_EXIT_MMIO);
	CHECK_EQ(m.run[0]->mmio.is_write, 0);
	m.run[0]->mmio.data[0] = 0x99;
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	CHECK_EQ(m.words[0], 0x12345678);
	CHECK_EQ(m.words[1], 0);
	CHECK_EQ(m.words[2], 0x99);
	down(&m);
	tap_done("guest: real mode, text memory through exits");
}

static void
test_mmio(void)
{
	uint64_t base = 0x10000000;
	struct machine m;
	struct kvm_run *r;
	unsigned int i;

	up(&m, 1);
	r = m.run[0];
	/* Map the device's page in the guest's tables. */
	LOAD_PAYLOAD(&m, mmio);
	set_rbx(&m, 0, base);
	CHECK_EQ(run(&m, 0), KVM_EXIT_MMIO);
	CHECK_EQ(r->mmio.phys_addr, base + 8);
	CHECK_EQ(memcmp(r->mmio.data, "\x44\x33\x22\x11", 4), 0);
	CHECK_EQ(run(&m, 0), KVM_EXIT_MMIO);
	CHECK(!r->mmio.is_write && r->mmio.len == 1);
	r->mmio.data[0] = 0x80;
	CHECK_EQ(run(&m, 0), KVM_EXIT_MMIO);	/* OR: read */
	CHECK(!r->mmio.is_write);
	r->mmio.data[0] = 0xc0;
	CHECK_EQ(run(&m, 0), KVM_EXIT_MMIO);	/* OR: write */
	CHECK(r->mmio.is_write && r->mmio.data[0] == 0xe1);
	CHECK_EQ(run(&m, 0), KVM_EXIT_MMIO);	/* XCHG */
	CHECK_EQ(r->mmio.phys_addr, base + 4);
	memcpy(r->mmio.data, "\x0d\xf0\xfe\xca", 4);
	CHECK_EQ(run(&m, 0), KVM_EXIT_MMIO);
	CHECK(r->mmio.is_write && r->mmio.data[0] == 0x55);
	for (i = 0; i < 3; i++) {
		CHECK_EQ(run(&m, 0), KVM_EXIT_MMIO);
		CHECK_EQ(r->mmio.phys_addr, base + 16 + 2 * i);
		CHECK_EQ(r->mmio.len, 2);
	}
	CHECK_EQ(run(&m, 0), KVM_EXIT_MMIO);
	CHECK_EQ(r->mmio.phys_addr, base + 0xffc);
	CHECK_EQ(r->mmio.len, 4);
	CHECK_EQ(run(&m, 0), KVM_EXIT_MMIO);
	CHECK_EQ(r->mmio.phys_addr, base + 0x1000);
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	CHECK_EQ(m.nwords, 3);
	CHECK_EQ(m.words[0], 0xffffff80);
	CHECK_EQ(m.words[1], 0xcafef00d);
	CHECK_EQ(m.words[2], 0);
	down(&m);
	tap_done("guest: MMIO loads, stores, read-modify-write, strings");
}

static void
test_strings(void)
{
	struct machine m;
	struct kvm_run *r;
	uint8_t next = 1, want = 1;
	unsigned int i, total = 0;
	int why;

	up(&m, 1);
	r = m.run[0];
	LOAD_PAYLOAD(&m, strings);
	while ((why = run(&m, 0)) == KVM_EXIT_IO) {
		uint8_t *d = (uint8_t *)r + r->io.data_offset;

		CHECK_EQ(r->io.size, 1);
		for (i = 0; i < r->io.count; i++) {
			if (r->io.direction == KVM_EXIT_IO_IN)
				d[i] = next++;
			else if (d[i] == want)
				want++, total++;
		}
	}
	CHECK_EQ(why, KVM_EXIT_HLT);
	CHECK_EQ(total, 64);
	CHECK_EQ(m.words[0], 0x30ff0 + 64);
	CHECK_EQ(m.ram[0x31000], 17);
	down(&m);
	tap_done("guest: INS and OUTS across a page");
}

static void
test_cpuid_msr(void)
{
	struct machine m;
	struct kvm_sregs s;

	up(&m, 1);
	LOAD_PAYLOAD(&m, prefixed);
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	CHECK_EQ(m.words[0], 0x4b4d564b);
	CHECK_EQ(m.words[1], 0x4b4d564b);
	m.nwords = 0;
	long_mode(&m, 0);
	LOAD_PAYLOAD(&m, msrs);
	{
		struct kvm_regs g;

		X(m.vcpu[0], KVM_GET_REGS, &g);
		g.r15 = 2;
		X(m.vcpu[0], KVM_SET_REGS, &g);
	}
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	CHECK_EQ(m.nwords, 4);
	CHECK_EQ(m.words[0], 0x12345678);
	CHECK_EQ(m.words[1], 0x500);		/* no SVME */
	CHECK_EQ(m.words[2], 0xabcdef);
	CHECK_EQ(m.words[3] & 0xffff, 0x100 | 13);
	X(m.vcpu[0], KVM_GET_SREGS, &s);
	CHECK_EQ(s.gs.base, 0x9000);
	CHECK_EQ(s.efer, 0x500);
	down(&m);
	tap_done("guest: CPUID with prefixes, MSRs, #GP");
}

/* VMCALL is Intel's hypercall and VMMCALL AMD's; the other one is #UD. */
static void
use_vmcall(struct machine *m)
{
	uint8_t *p = m->ram + LOAD;

	while (p[0] != 0x0f || p[1] != 0x01 || p[2] != 0xd9)
		p++;
	p[2] = 0xc1;
}

static void
test_forbidden(void)
{
	bool intel = __builtin_cpu_is("intel") != 0;
	struct machine m;
	unsigned int i, n = intel ? 12 : 13;

	up(&m, 1);
	LOAD_PAYLOAD(&m, forbidden);
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	CHECK_EQ(m.nwords, n);
	for (i = 0; i < n - 2; i++)
		CHECK_EQ(m.words[i] & 0xffff, 0x106);
	CHECK_EQ(m.words[n - 2] & 0xffff, 0x10d);
	for (i = 0; i < m.nwords && tap_bad != 0; i++)
		printf("# at %#x: %#x\n", m.words[i] >> 16,
		    m.words[i] & 0xffff);
	CHECK_EQ(m.words[n - 1], 0xdead);
	m.nwords = 0;
	long_mode(&m, 0);
	LOAD_PAYLOAD(&m, hypercall);
	if (intel)
		use_vmcall(&m);
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	CHECK_EQ(m.words[0], (uint32_t)-1000);
	m.nwords = 0;
	long_mode(&m, 0);
	LOAD_PAYLOAD(&m, control);
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	CHECK_EQ(m.words[0], 0);
	CHECK_EQ(m.words[1] & 0xffff, 0x10d);
	down(&m);
	tap_done("guest: SVM's instructions, PMC, VMXE are refused");
}

static void
test_irq(void)
{
	struct kvm_interrupt irq = { 0x31 };
	struct machine m;
	struct kvm_run *r;

	up(&m, 1);
	r = m.run[0];
	LOAD_PAYLOAD(&m, irq);
	set_gate(&m, 0x31, pl_irq_handler,
	    (size_t)(pl_irq_handler_end - pl_irq_handler));
	/* IF is clear: the window opens after STI's shadow. */
	r->request_interrupt_window = 1;
	CHECK_EQ(run(&m, 0), KVM_EXIT_IRQ_WINDOW_OPEN);
	CHECK_EQ(r->ready_for_interrupt_injection, 1);
	CHECK_EQ(r->if_flag, 1);
	r->request_interrupt_window = 0;
	X(m.vcpu[0], KVM_INTERRUPT, &irq);
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	CHECK_EQ(m.words[0], 0x31);
	down(&m);
	tap_done("guest: interrupt window and injection");
}

static void
test_fpu(void)
{
	struct machine m;
	unsigned int exits;

	up(&m, 1);
	LOAD_PAYLOAD(&m, fpu);
	/* The host uses the same registers between the exits. */
	for (exits = 0; exits < 2000; exits++) {
		struct kvm_run *r = m.run[0];
		volatile double d = 1.5;

		if (ioctl(m.vcpu[0], KVM_RUN, 0) < 0)
			break;
		d = d * 2.5 + 1;
		__asm__ __volatile__("pcmpeqd %%xmm0, %%xmm0\n\t"
		    "pcmpeqd %%xmm15, %%xmm15\n\tfninit" : : : "xmm0",
		    "xmm15");
		if (r->exit_reason != KVM_EXIT_IO)
			break;
		if (r->io.port == 0x10)
			memcpy(&m.words[m.nwords++], (uint8_t *)r +
			    r->io.data_offset, 4);
		if (m.nwords > 8)
			break;
	}
	CHECK_EQ(exits, 1002);
	CHECK_EQ(m.run[0]->exit_reason, KVM_EXIT_HLT);
	CHECK_EQ(m.words[0], 0x4000);		/* pi equals pi */
	CHECK_EQ(m.words[1], 1000);
	m.nwords = 0;
	long_mode(&m, 0);
	LOAD_PAYLOAD(&m, badxcr);
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	CHECK_EQ(m.words[0] & 0xffff, 0x10d);
	down(&m);
	tap_done("guest: FPU and SSE state across exits, XSETBV");
}

static void
test_memory(void)
{
	struct kvm_dirty_log log = { .slot = 1 };
	uint64_t map[16] = { 0 };
	struct machine m;
	uint8_t *extra;
	unsigned int i, bad = 0;

	up(&m, 1);
	LOAD_PAYLOAD(&m, touch);
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	for (i = 0x100000; i < 0x1000000; i += 4096)
		bad += m.ram[i] != 0x5a;
	CHECK_EQ(bad, 0);
	/* Dirty log, with the processor's own writes. */
	extra = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE,
	    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	map_slot(&m, 1, RAM, 1 << 20, extra, KVM_MEM_LOG_DIRTY_PAGES);
	long_mode(&m, 0);
	LOAD_PAYLOAD(&m, dirty);
	set_rbx(&m, 0, RAM);
	log.dirty_bitmap = map;
	CHECK_EQ(ioctl(m.vcpu[0], KVM_RUN, 0), 0);
	CHECK_EQ(m.run[0]->exit_reason, KVM_EXIT_IO);
	X(m.vm, KVM_GET_DIRTY_LOG, &log);
	CHECK_EQ(map[0], 1 << 3 | 1 << 5);
	CHECK_EQ(map[3], 1 << (200 - 192));
	CHECK_EQ(ioctl(m.vcpu[0], KVM_RUN, 0), 0);
	X(m.vm, KVM_GET_DIRTY_LOG, &log);
	CHECK_EQ(map[0], 1 << 5);
	CHECK_EQ(map[3], 0);
	CHECK_EQ(extra[5 * 4096], 2);
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	/* Read-only memory: reads work, a write is an exit. */
	map_slot(&m, 1, 0, 0, NULL, 0);
	map_slot(&m, 1, RAM, 1 << 20, extra, KVM_MEM_READONLY);
	long_mode(&m, 0);
	set_rbx(&m, 0, RAM);
	CHECK_EQ(run(&m, 0), KVM_EXIT_MMIO);
	CHECK_EQ(m.run[0]->mmio.phys_addr, RAM + 3 * 4096);
	CHECK_EQ(m.run[0]->mmio.is_write, 1);
	CHECK_EQ(extra[3 * 4096], 1);
	down(&m);
	munmap(extra, 1 << 20);
	tap_done("guest: memory on demand, dirty log, read-only slot");
}

static void
test_triple(void)
{
	struct machine m;
	struct kvm_regs g;

	up(&m, 1);
	LOAD_PAYLOAD(&m, triple);
	CHECK_EQ(run(&m, 0), KVM_EXIT_SHUTDOWN);
	/* Execution outside memory ends, it does not loop. */
	long_mode(&m, 0);
	X(m.vcpu[0], KVM_GET_REGS, &g);
	g.rip = 0x20000000;
	X(m.vcpu[0], KVM_SET_REGS, &g);
	CHECK_EQ(run(&m, 0), KVM_EXIT_INTERNAL_ERROR);
	CHECK_EQ(m.run[0]->internal.suberror, KVM_INTERNAL_ERROR_EMULATION);
	down(&m);
	tap_done("guest: triple fault, execution outside memory");
}

/* ---- threads and signals ----------------------------------------------- */

struct thread {
	struct machine	*m;
	int		 i, result;
	pthread_t	 id;
};

static void *
thread_run(void *arg)
{
	struct thread *t = arg;

	t->result = run(t->m, t->i);
	return (NULL);
}

/* A signal between two RUNs must not get lost. */
static volatile struct kvm_run *signal_run;

static void
on_signal(int sig)
{
	(void)sig;
	if (signal_run != NULL)
		signal_run->immediate_exit = 1;
}

static void
test_kick(void)
{
	struct timespec ms = { 0, 50000000 };
	struct machine m;
	struct thread t;
	unsigned int i;

	up(&m, 1);
	LOAD_PAYLOAD(&m, spin);
	for (i = 0; i < 5; i++) {
		t = (struct thread){ .m = &m };
		pthread_create(&t.id, NULL, thread_run, &t);
		nanosleep(&ms, NULL);
		pthread_kill(t.id, SIGUSR1);
		pthread_join(t.id, NULL);
		CHECK_EQ(t.result, -EINTR);
		CHECK_EQ(m.run[0]->exit_reason, KVM_EXIT_INTR);
	}
	m.run[0]->immediate_exit = 1;
	CHECK_EQ(run(&m, 0), -EINTR);
	m.run[0]->immediate_exit = 0;
	/* #DB without end: the host stays in control. */
	LOAD_PAYLOAD(&m, db_loop);
	long_mode(&m, 0);
	signal_run = m.run[0];
	t = (struct thread){ .m = &m };
	pthread_create(&t.id, NULL, thread_run, &t);
	nanosleep(&ms, NULL);
	pthread_kill(t.id, SIGUSR1);
	pthread_join(t.id, NULL);
	signal_run = NULL;
	CHECK_EQ(t.result, -EINTR);
	CHECK(m.nwords > 0 && (m.words[0] & 0xffff) == 0x101);
	down(&m);
	tap_done("guest: a signal ends a spinning vCPU, #DB loop");
}

static void
test_smp(void)
{
	struct thread t[4];
	struct machine m;
	int i;

	up(&m, 4);
	LOAD_PAYLOAD(&m, smp);
	for (i = 0; i < 4; i++) {
		t[i] = (struct thread){ .m = &m, .i = i };
		pthread_create(&t[i].id, NULL, thread_run, &t[i]);
	}
	for (i = 0; i < 4; i++) {
		pthread_join(t[i].id, NULL);
		CHECK_EQ(t[i].result, KVM_EXIT_HLT);
	}
	CHECK_EQ(*(uint32_t *)(m.ram + 0x7000), 400000);
	down(&m);
	tap_done("guest: four vCPUs share a counter");
}

static int
compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return ((x > y) - (x < y));
}

/*
 * Wake a vCPU n times that sleeps in the kernel's HLT, by an MSI, and give the
 * median time until its handler ran; it has gap_ns to fall asleep.
 */
static double
wake(unsigned int n, long gap_ns)
{
	struct kvm_msi msi = { .address_lo = 0xfee00000, .data = 0x31 };
	struct timespec gap = { 0, gap_ns };
	volatile uint32_t *count;
	double *took, median, t;
	struct machine m;
	struct thread th;
	unsigned int i;

	up_with(&m, 1, true);
	LOAD_PAYLOAD(&m, halts);
	set_gate(&m, 0x31, pl_halts_handler,
	    (size_t)(pl_halts_handler_end - pl_halts_handler));
	set_rbx(&m, 0, n);
	count = (volatile uint32_t *)(void *)(m.ram + 0x7000);
	took = calloc(n, sizeof(*took));
	th = (struct thread){ .m = &m };
	pthread_create(&th.id, NULL, thread_run, &th);
	while (count[1] == 0)
		nanosleep(&gap, NULL);
	for (i = 0; i < n; i++) {
		nanosleep(&gap, NULL);
		t = now();
		CHECK_EQ(ioctl(m.vm, KVM_SIGNAL_MSI, &msi), 1);
		while (*count == i && now() - t < 10)
			;
		took[i] = now() - t;
		if (*count == i)
			break;
	}
	if (i < n) {
		struct kvm_regs g;

		/* It still runs, or sleeps: a signal ends either. */
		m.run[0]->immediate_exit = 1;
		pthread_kill(th.id, SIGUSR1);
		pthread_join(th.id, NULL);
		X(m.vcpu[0], KVM_GET_REGS, &g);
		printf("# the %uth is lost: at %#llx, flags %#llx, word %#x\n",
		    i, g.rip, g.rflags, m.words[0]);
		tap_bad++;
		down(&m);
		return (1);
	}
	CHECK_EQ(*count, n);
	pthread_join(th.id, NULL);
	CHECK_EQ(th.result, KVM_EXIT_IO);
	CHECK_EQ(m.run[0]->io.port, 0x12);
	qsort(took, n, sizeof(*took), compare);
	median = took[n / 2];
	free(took);
	down(&m);
	return (median);
}

static void
test_wake(void)
{
	printf("# asleep in HLT, woken in %.0f us\n", 1e6 * wake(100, 1000000));
	tap_done("guest: an MSI ends HLT, a hundred times");
}

/* A slot goes while a vCPU is writing to it: the writes stop. */
static void
test_zap(void)
{
	struct timespec ms = { 0, 30000000 };
	volatile uint32_t *extra;
	struct machine m;
	struct thread t;
	uint32_t seen;
	unsigned int i;

	up(&m, 1);
	extra = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE,
	    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	LOAD_PAYLOAD(&m, hammer);
	for (i = 0; i < 10; i++) {
		map_slot(&m, 1, RAM, 1 << 20, (void *)extra, 0);
		long_mode(&m, 0);
		set_rbx(&m, 0, RAM + 4096);
		t = (struct thread){ .m = &m };
		pthread_create(&t.id, NULL, thread_run, &t);
		nanosleep(&ms, NULL);
		map_slot(&m, 1, 0, 0, NULL, 0);
		seen = extra[1024];
		pthread_join(t.id, NULL);
		CHECK_EQ(t.result, KVM_EXIT_MMIO);
		CHECK_EQ(extra[1024], seen);
	}
	CHECK(seen > 0);
	down(&m);
	munmap((void *)extra, 1 << 20);
	tap_done("guest: deleting a slot stops a running writer");
}

/* ---- death ------------------------------------------------------------- */

static long
pinned_pages(void)
{
	unsigned long a = 0, r = 0, v;
	char name[64];
	FILE *f;

	/* The counters are kept per processor; fold them first. */
	f = fopen("/proc/sys/vm/stat_refresh", "w");
	if (f != NULL) {
		fputs("1", f);
		fclose(f);
	}
	f = fopen("/proc/vmstat", "r");
	while (f != NULL && fscanf(f, "%63s %lu", name, &v) == 2) {
		if (strcmp(name, "nr_foll_pin_acquired") == 0)
			a = v;
		if (strcmp(name, "nr_foll_pin_released") == 0)
			r = v;
	}
	if (f != NULL)
		fclose(f);
	return ((long)(a - r));
}

static void
add_irqfd(struct machine *m)
{
	struct kvm_irqfd irqfd = { .fd = (uint32_t)eventfd(0, EFD_CLOEXEC),
		.gsi = 5 };

	X(m->vm, KVM_IRQFD, &irqfd);
	close((int)irqfd.fd);
}

/* Killed while creating, running, exiting, deleting: nothing stays. */
static void
test_kill(void)
{
	long before = pinned_pages();
	unsigned int i;
	int status;
	pid_t pid;

	for (i = 0; i < 24; i++) {
		struct timespec t = { 0, 1000000L * (1 + i * 4) };

		pid = fork();
		if (pid == 0) {
			struct machine m;
			struct thread th;

			if (freopen("/dev/null", "w", stdout) == NULL)
				_exit(1);
			for (;;) {
				/* 3: HLT and the wait for SIPI, irqfd too. */
				up_with(&m, 2, i % 4 == 3);
				if (i % 4 == 0)
					LOAD_PAYLOAD(&m, spin);
				else if (i % 4 == 1)
					LOAD_PAYLOAD(&m, ports);
				else if (i % 4 == 2)
					LOAD_PAYLOAD(&m, touch);
				else
					LOAD_PAYLOAD(&m, halts);
				if (i % 4 == 3)
					add_irqfd(&m);
				set_rbx(&m, 0, 0xffffffff);
				set_rbx(&m, 1, 0xffffffff);
				th = (struct thread){ .m = &m, .i = 1 };
				pthread_create(&th.id, NULL, thread_run, &th);
				run(&m, 0);
				pthread_join(th.id, NULL);
				down(&m);
			}
		}
		nanosleep(&t, NULL);
		kill(pid, SIGKILL);
		CHECK_EQ(waitpid(pid, &status, 0), pid);
		CHECK(WIFSIGNALED(status));
	}
	CHECK_EQ(pinned_pages() - before, 0);
	tap_done("host: kill -9 in every state leaves no page pinned");
}

/* ---- measuring --------------------------------------------------------- */

static void
bench_one(const char *name, const uint8_t *p, const uint8_t *end,
    unsigned int n)
{
	struct machine m;
	double t;

	up(&m, 1);
	load(&m, p, (size_t)(end - p));
	set_rbx(&m, 0, n);
	t = now();
	CHECK_EQ(run(&m, 0), KVM_EXIT_HLT);
	printf("bench %s %.0f\n", name, n / (now() - t));
	down(&m);
}

static const struct test {
	const char	*name;
	void		(*run)(void);
} tests[] = {
	{ "basic", test_basic },
	{ "probe", test_probe },
	{ "real", test_real },
	{ "mmio", test_mmio },
	{ "strings", test_strings },
	{ "cpuid_msr", test_cpuid_msr },
	{ "forbidden", test_forbidden },
	{ "irq", test_irq },
	{ "fpu", test_fpu },
	{ "memory", test_memory },
	{ "triple", test_triple },
	{ "kick", test_kick },
	{ "smp", test_smp },
	{ "wake", test_wake },
	{ "zap", test_zap },
	{ "kill", test_kill },
	{ NULL, NULL }
};

static bool
named(const char *name, int argc, char **argv)
{
	while (--argc > 0)
		if (strcmp(argv[argc], name) == 0)
			return (true);
	return (false);
}

int
main(int argc, char **argv)
{
	struct sigaction sa = { .sa_handler = on_signal };
	const struct test *t;
	int i;

	sigaction(SIGUSR1, &sa, NULL);
	setbuf(stdout, NULL);
	if (argc > 1 && strcmp(argv[1], "bench") == 0) {
		bench_one("cpuid", pl_cpuids, pl_cpuids_end, 30000);
		bench_one("port", pl_ports, pl_ports_end, 30000);
		bench_one("mmio", pl_mmios, pl_mmios_end, 10000);
		printf("bench hlt-wakeup %.0f\n", 1 / wake(300, 1000000));
		return (tap_bad != 0);
	}
	for (i = 1; i < argc; i++)
		slow |= strcmp(argv[i], "slow") == 0;
	for (t = tests; t->name != NULL; t++)
		if (argc - slow == 1 || named(t->name, argc, argv))
			t->run();
	return (tap_failed != 0);
}

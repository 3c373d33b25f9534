/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * glue_test.c: os/illumos/kvm_illumos.c over the small DDI of this folder,
 * with the core above it and a scripted processor below.
 */
#include "kvm_sys.h"
#include <pthread.h>

#define	VMK_HOST_TYPES
#include "vmk_os.h"
#include "../fake_cpu.h"
#include "../tap.h"

#define	PAGES	2048UL
#define	DEVICE	(PAGES - 1)		/* ddi.c: not ordinary memory */

static uint8_t *user;
static dev_info_t dip;

static void
load(void)
{
	CHECK_EQ(_init(), 0);
	CHECK_EQ(fake_driver->devo_attach(&dip, DDI_ATTACH), DDI_SUCCESS);
}

/* Nothing of the glue's is left. */
static void
unload(void)
{
	CHECK_EQ(fake_driver->devo_detach(&dip, DDI_DETACH), DDI_SUCCESS);
	CHECK_EQ(dip.nodes, 0);
	CHECK_EQ(fake_outstanding, 0);
	CHECK_EQ(fake_locked, 0);
	CHECK_EQ(fake_preempt, 0);
	CHECK_EQ(fake_fpu, 0);
	CHECK_EQ(_fini(), 0);
}

struct machine { int kvm, vm, vcpu; struct abi_run *run; };

static void
machine(struct machine *m, size_t npages)
{
	struct abi_memory_region r = { .memory_size = npages * PAGESIZE,
		.userspace_addr = (uint64_t)(uintptr_t)user };
	void *va = NULL;

	m->kvm = fake_open();
	m->vm = fake_ioctl(m->kvm, ABI_CREATE_VM, NULL);
	CHECK(m->vm >= 0);
	CHECK_EQ(fake_ioctl(m->vm, ABI_SET_USER_MEMORY_REGION, &r), 0);
	m->vcpu = fake_ioctl(m->vm, ABI_CREATE_VCPU, NULL);
	CHECK(m->vcpu >= 0);
	CHECK_EQ(fake_mmap(m->vcpu, 3 * PAGESIZE, PROT_READ | PROT_WRITE,
	    MAP_SHARED, &va), 0);
	m->run = va;
}

static void
machine_close(struct machine *m)
{
	fake_munmap(m->vcpu);
	fake_close(m->vcpu);
	fake_close(m->vm);
	fake_close(m->kvm);
}

static void
test_load(void)
{
	int fd;

	load();
	CHECK_EQ(dip.nodes, 1);
	CHECK_EQ(dip.nprops, 2);
	CHECK_EQ(fake_driver->devo_attach(&dip, DDI_ATTACH), DDI_FAILURE);
	CHECK_EQ(fake_driver->devo_attach(&dip, DDI_RESUME), DDI_SUCCESS);
	CHECK_EQ(fake_driver->devo_detach(&dip, DDI_SUSPEND), DDI_SUCCESS);
	fd = fake_open();
	CHECK_EQ(fake_ioctl(fd, ABI_GET_API_VERSION, NULL), 12);
	CHECK_EQ(fake_ioctl(fd, 0xae99, NULL), -ENOTTY);
	fake_close(fd);
	unload();
	tap_done("attach, requests of /dev/kvm, detach");
}

static int
call_open(minor_t minor, int otyp, cred_t *cr)
{
	dev_t dev = makedevice(42, minor);

	return (fake_driver->devo_cb_ops->cb_open(&dev, FREAD, otyp, cr));
}

static void
test_access(void)
{
	struct machine m;
	cred_t zone = { 7 };
	int result;
	minor_t minor;

	load();
	machine(&m, 8);
	minor = getminor(getf(m.vm)->f_vnode->v_rdev);
	CHECK(minor != 0);
	CHECK_EQ(call_open(0, OTYP_CHR, &fake_cred), 0);
	CHECK_EQ(call_open(0, OTYP_CHR + 1, &fake_cred), EINVAL);
	CHECK_EQ(call_open(0, OTYP_CHR, &zone), EPERM);
	/* mknod(2) gives nobody a way into a machine. */
	CHECK_EQ(call_open(minor, OTYP_CHR, &fake_cred), ENXIO);
	CHECK_EQ(call_open(200, OTYP_CHR, &fake_cred), ENXIO);
	CHECK_EQ(getf(m.vm)->flags, FD_CLOEXEC);
	CHECK_EQ(fake_driver->devo_cb_ops->cb_ioctl(makedevice(42, 0),
	    ABI_GET_API_VERSION, 0, DDI_MODEL_ILP32, &fake_cred, &result),
	    ENOTSUP);
	CHECK_EQ(fake_driver->devo_detach(&dip, DDI_DETACH), DDI_FAILURE);
	machine_close(&m);
	unload();
	tap_done("zones, foreign minors, 32-bit callers, detach while in use");
}

static void
test_descriptors(void)
{
	int kvm, vm;

	load();
	kvm = fake_open();
	fake_falloc_fails = true;
	CHECK_EQ(fake_ioctl(kvm, ABI_CREATE_VM, NULL), -EMFILE);
	fake_falloc_fails = false;
	vm = fake_ioctl(kvm, ABI_CREATE_VM, NULL);
	fake_falloc_fails = true;
	CHECK_EQ(fake_ioctl(vm, ABI_CREATE_VCPU, NULL), -EMFILE);
	fake_falloc_fails = false;
	fake_callback_fails = 1;
	CHECK_EQ(fake_ioctl(kvm, ABI_CREATE_VM, NULL), -ENOMEM);
	fake_close(vm);
	fake_close(kvm);
	unload();
	tap_done("a descriptor or a callback that cannot be had");
}

static void
test_mmap(void)
{
	struct machine m;
	void *va;

	load();
	machine(&m, 8);
	CHECK_EQ(fake_mmap(m.vcpu, 3 * PAGESIZE, PROT_READ, MAP_PRIVATE, &va),
	    EINVAL);
	CHECK_EQ(fake_mmap(m.vcpu, 3 * PAGESIZE, PROT_READ | PROT_EXEC,
	    MAP_SHARED, &va), EINVAL);
	CHECK_EQ(fake_mmap(m.vcpu, 4 * PAGESIZE, PROT_READ, MAP_SHARED, &va),
	    EINVAL);
	CHECK_EQ(fake_mmap(m.vm, PAGESIZE, PROT_READ, MAP_SHARED, &va),
	    ENODEV);
	CHECK_EQ(fake_mmap(m.kvm, PAGESIZE, PROT_READ, MAP_SHARED, &va),
	    ENODEV);
	/* HLT by the scripted processor; the user irqchip reports it. */
	CHECK_EQ(fake_ioctl(m.vcpu, ABI_RUN, NULL), 0);
	CHECK_EQ(m.run->exit_reason, ABI_EXIT_HLT);
	m.run->immediate_exit = 1;
	CHECK_EQ(fake_ioctl(m.vcpu, ABI_RUN, NULL), -EINTR);
	machine_close(&m);
	unload();
	tap_done("the run page is mapped shared, bounded, never executable");
}

static void
touch(unsigned long page, int want)
{
	uint8_t b = 1;

	CHECK_EQ(vmk_gpa_write(fake_last_vm(), page * PAGESIZE, &b, 1), want);
}

static void
test_pins(void)
{
	struct abi_memory_region gone = { .slot = 0 };
	struct machine m;
	int shadow;

	for (shadow = 0; shadow < 2; shadow++) {
		fake_no_shadow = shadow != 0;
		load();
		machine(&m, PAGES);
		touch(3, 0);
		CHECK(fake_locked >= 1);
		touch(DEVICE, VMK_EFAULT);
		/* munmap: the callbacks give the pages back first. */
		fake_as_event(p0.p_as, AS_UNMAP_EVENT, user, PAGES * PAGESIZE);
		CHECK_EQ(fake_locked, 0);
		touch(3, 0);
		CHECK(fake_locked >= 1);
		CHECK_EQ(fake_ioctl(m.vm, ABI_SET_USER_MEMORY_REGION, &gone),
		    0);
		CHECK_EQ(fake_locked, 0);
		machine_close(&m);
		unload();
	}
	fake_no_shadow = false;
	load();
	machine(&m, PAGES);
	fake_callback_fails = 1;
	touch(3, 0);		/* the whole chunk fails, one page is taken */
	CHECK_EQ(fake_locked, 1);
	machine_close(&m);
	unload();
	tap_done("pins: munmap, deleted slots, device memory, no callback");
}

static void
test_exit(void)
{
	struct machine m;

	load();
	machine(&m, 64);
	touch(3, 0);
	fake_as_event(p0.p_as, AS_FREE_EVENT, NULL, 0);
	CHECK_EQ(fake_locked, 0);
	CHECK_EQ(fake_ioctl(m.vcpu, ABI_RUN, NULL), -EIO);
	machine_close(&m);
	unload();
	tap_done("the address space goes before the machine");
}

static bool race_over;

static void *
racer(void *arg)
{
	(void)arg;
	while (!__atomic_load_n(&race_over, __ATOMIC_SEQ_CST))
		fake_as_event(p0.p_as, AS_UNMAP_EVENT, user,
		    PAGES * PAGESIZE);
	return (NULL);
}

static void
test_race(void)
{
	struct abi_memory_region r = { .memory_size = 64 * PAGESIZE,
		.userspace_addr = (uint64_t)(uintptr_t)user }, gone = { 0 };
	struct machine m;
	pthread_t id;
	int i;

	load();
	machine(&m, 64);
	race_over = false;
	pthread_create(&id, NULL, racer, NULL);
	for (i = 0; i < 3000; i++) {
		touch((unsigned long)i % 64, 0);
		touch((unsigned long)(i + 7) % 64, 0);
		CHECK_EQ(fake_ioctl(m.vm, ABI_SET_USER_MEMORY_REGION, &gone),
		    0);
		CHECK_EQ(fake_ioctl(m.vm, ABI_SET_USER_MEMORY_REGION, &r), 0);
	}
	/* Close with callbacks on their way. */
	machine_close(&m);
	__atomic_store_n(&race_over, true, __ATOMIC_SEQ_CST);
	pthread_join(id, NULL);
	unload();
	tap_done("munmap against deleted slots and close");
}

static unsigned int fired;

static void
fire(void *arg)
{
	(void)arg;
	__atomic_add_fetch(&fired, 1, __ATOMIC_SEQ_CST);
}

static void
test_events(void)
{
	struct vmk_event *ev = NULL, *same = NULL;
	int fd, kvm, i;

	load();
	fd = fake_eventfd();
	kvm = fake_open();
	CHECK_EQ(vmk_event_get(kvm, &ev), VMK_EINVAL);
	CHECK_EQ(vmk_event_get(99, &ev), EBADF);
	CHECK_EQ(vmk_event_get(fd, &ev), 0);
	CHECK_EQ(vmk_event_get(fd, &same), 0);
	CHECK(vmk_event_same(ev, same));
	vmk_event_put(same);
	fake_close(fd);			/* the event keeps the file */
	vmk_event_signal(ev);
	CHECK_EQ(fake_eventfd_count(fd), 1);
	fired = 0;
	CHECK_EQ(vmk_event_listen(ev, fire, NULL), 0);
	for (i = 0; i < 3; i++) {
		while (__atomic_load_n(&fired, __ATOMIC_SEQ_CST) !=
		    (unsigned int)i + 1)
			sched_yield();
		if (i < 2)
			vmk_event_signal(ev);
	}
	vmk_event_unlisten(ev);
	CHECK_EQ(fired, 3);
	vmk_event_put(ev);
	fake_close(kvm);
	unload();
	tap_done("eventfds: signal, listen, stop");
}

static bool ready;

static bool
is_ready(void *arg)
{
	(void)arg;
	return (__atomic_load_n(&ready, __ATOMIC_SEQ_CST));
}

static void *
waker(void *arg)
{
	__atomic_store_n(&ready, true, __ATOMIC_SEQ_CST);
	vmk_wake(arg);
	return (NULL);
}

static void
test_waits(void)
{
	struct vmk_sigset set = { { 0 } }, old;
	struct vmk_mutex mu;
	struct vmk_waitq q;
	struct vmk_timer t;
	pthread_t id;

	load();
	vmk_mutex_init(&mu, "test");
	vmk_mutex_enter(&mu);
	curthread->signalled = true;
	CHECK_EQ(vmk_mutex_enter_sig(&mu), VMK_EINTR);
	curthread->signalled = false;
	vmk_mutex_exit(&mu);
	CHECK_EQ(vmk_mutex_enter_sig(&mu), 0);
	vmk_mutex_exit(&mu);
	vmk_mutex_fini(&mu);

	vmk_waitq_init(&q, "test");
	curthread->signalled = true;
	CHECK_EQ(vmk_wait_sig(&q, is_ready, NULL), VMK_EINTR);
	curthread->signalled = false;
	pthread_create(&id, NULL, waker, &q);
	CHECK_EQ(vmk_wait_sig(&q, is_ready, NULL), 0);
	pthread_join(id, NULL);
	vmk_waitq_fini(&q);

	fired = 0;
	vmk_timer_init(&t, fire, NULL);
	fake_fire();
	CHECK_EQ(fired, 0);
	vmk_timer_arm(&t, 0);		/* the past means now */
	fake_fire();
	fake_fire();			/* one shot */
	CHECK_EQ(fired, 1);
	vmk_timer_arm(&t, ~0ULL);
	fake_fire();
	vmk_timer_arm(&t, 0);
	vmk_timer_cancel(&t);
	fake_fire();
	CHECK_EQ(fired, 1);
	vmk_timer_fini(&t);

	set.bytes[0] = 6;
	curthread->t_hold.w[0] = 9;
	CHECK(!vmk_sigset_ok(8));
	CHECK(vmk_sigset_ok(16));
	vmk_sigmask_swap(&set, &old);
	CHECK_EQ(curthread->t_hold.w[0], 6);
	vmk_sigmask_restore(&old);
	CHECK_EQ(curthread->t_hold.w[0], 9);
	curthread->t_hold.w[0] = 0;

	CHECK_EQ(vmk_yield(), 0);
	CPU->cpu_runrun = 1;
	CHECK(vmk_must_leave());
	CHECK_EQ(vmk_yield(), 0);
	CHECK(!vmk_must_leave());
	curthread->t_astflag = 1;
	CHECK_EQ(vmk_yield(), VMK_EINTR);
	curthread->t_astflag = 0;
	unload();
	tap_done("locks, waits, timers, signal masks, what ends a run");
}

static void
count_cpu(void *arg)
{
	++*(int *)arg;
}

static void
test_hma(void)
{
	const struct vmk_hv *hv;
	struct vmk_hv_tag tag = { { 0 } };
	uint32_t asid = 0;
	int cpus = 0;

	load();
	CHECK(vmk_hv_claim() == NULL);
	fake_hma = true;
	hv = vmk_hv_claim();
	CHECK(hv != NULL);
	CHECK_EQ(hv->asid(&tag, true, true, &asid), 3);
	CHECK_EQ(asid, 1);
	CHECK_EQ(hv->asid(&tag, false, false, &asid), 0);
	vmk_cpu_enter();
	CHECK(hv->sibling_enter());
	hv->sibling_leave();
	fake_smt = 0;
	CHECK(!hv->sibling_enter() && !vmk_must_leave());
	fake_smt = -1;
	CHECK(!hv->sibling_enter() && vmk_must_leave());
	fake_smt = 1;
	vmk_cpu_exit();
	CHECK_EQ(vmk_yield(), 0);
	CHECK(!vmk_must_leave());
	vmk_hv_release();
	fake_hma = false;
	vmk_cpu_each(count_cpu, &cpus);
	CHECK_EQ(cpus, 1);
	unload();
	tap_done("HMA where it serves, sibling threads, left alone where not");
}

int
main(void)
{
	mutex_enter(&cpu_lock);		/* both static locks work */
	mutex_exit(&cpu_lock);
	user = aligned_alloc(512 * PAGESIZE, PAGES * PAGESIZE);
	memset(user, 0, PAGES * PAGESIZE);
	fake_user_memory(user, PAGES * PAGESIZE);
	test_load();
	test_access();
	test_descriptors();
	test_mmap();
	test_pins();
	test_exit();
	test_race();
	test_events();
	test_waits();
	test_hma();
	free(user);
	printf("1..%d\n", tap_number);
	return (tap_failed != 0);
}

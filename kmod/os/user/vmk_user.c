/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_user.c: vmk_os.h in a process, for tests of the core.
 *
 * Theory.  A physical address is the virtual address, user memory is the
 * process's own, a processor is a thread.  The host is stricter than a kernel:
 * it aborts when the core sleeps inside a CPU section or under a spin lock,
 * it counts everything that the core acquires, and it can make any single
 * acquisition fail.  Copies of user memory go through the kernel
 * (process_vm_readv), so that a wild pointer is VMK_EFAULT and not a crash.
 */
#define	_GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "vmk_user.h"

#define	NCPUS	8
#define	NFDS	4096

struct vmk_tunables vmk_tunables = { .max_pinned_pages = 1 << 20,
	.max_vms = 64 };

static _Thread_local bool	in_section, signalled;
static bool			never_wait;
static _Thread_local int	spins;
static _Thread_local unsigned int my_cpu = ~0U;
static _Thread_local int	my_mm;
static unsigned int		next_cpu;
static uint32_t			kicked[NCPUS];
static uint64_t			outstanding, pinned, fail_at, nkicks;

static void
must_not_sleep(const char *what)
{
	if (in_section || spins != 0) {
		fprintf(stderr, "vmk_user: %s in a %s\n", what,
		    in_section ? "CPU section" : "spin lock");
		abort();
	}
}

static void
hold(uint64_t n)
{
	__atomic_add_fetch(&outstanding, n, __ATOMIC_RELAXED);
}

static void
let_go(uint64_t n)
{
	__atomic_sub_fetch(&outstanding, n, __ATOMIC_RELAXED);
}

static bool
should_fail(void)
{
	uint64_t old = __atomic_load_n(&fail_at, __ATOMIC_RELAXED);

	while (old != 0) {
		if (__atomic_compare_exchange_n(&fail_at, &old, old - 1, false,
		    __ATOMIC_RELAXED, __ATOMIC_RELAXED))
			return (old == 1);
	}
	return (false);
}

void
user_fail_at(uint64_t n)
{
	__atomic_store_n(&fail_at, n, __ATOMIC_RELAXED);
}

uint64_t
user_outstanding(void)
{
	return (__atomic_load_n(&outstanding, __ATOMIC_RELAXED));
}

uint64_t
user_pinned(void)
{
	return (__atomic_load_n(&pinned, __ATOMIC_RELAXED));
}

uint64_t
user_kicks(void)
{
	return (__atomic_load_n(&nkicks, __ATOMIC_RELAXED));
}

/* ---- memory ------------------------------------------------------------ */

void *
vmk_alloc(size_t size)
{
	void *p;

	must_not_sleep("vmk_alloc");
	if (should_fail())
		return (NULL);
	p = calloc(1, size);
	if (p != NULL)
		hold(size);
	return (p);
}

void
vmk_free(void *p, size_t size)
{
	must_not_sleep("vmk_free");
	let_go(size);
	free(p);
}

void *
vmk_pages_alloc(unsigned int npages, uint64_t *pa)
{
	void *p;

	must_not_sleep("vmk_pages_alloc");
	if (should_fail())
		return (NULL);
	p = aligned_alloc(VMK_PAGE_SIZE * npages, VMK_PAGE_SIZE * npages);
	if (p == NULL)
		return (NULL);
	memset(p, 0, VMK_PAGE_SIZE * npages);
	*pa = (uint64_t)(uintptr_t)p;
	hold(npages);
	return (p);
}

void
vmk_pages_free(void *va, unsigned int npages)
{
	must_not_sleep("vmk_pages_free");
	let_go(npages);
	free(va);
}

void *
vmk_phys_to_virt(uint64_t pa)
{
	return ((void *)(uintptr_t)pa);
}

int
vmk_shared_alloc(struct vmk_shared *s, unsigned int npages)
{
	if (should_fail())
		return (VMK_ENOMEM);
	s->va = mmap(NULL, npages * VMK_PAGE_SIZE, PROT_READ | PROT_WRITE,
	    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (s->va == MAP_FAILED)
		return (VMK_ENOMEM);
	s->npages = npages;
	hold(1);
	return (0);
}

void
vmk_shared_free(struct vmk_shared *s)
{
	munmap(s->va, s->npages * VMK_PAGE_SIZE);
	s->va = NULL;
	let_go(1);
}

static uint64_t arena_lo, arena_hi = ~0ULL;

void
user_arena(const void *base, size_t len)
{
	arena_lo = (uint64_t)(uintptr_t)base;
	arena_hi = arena_lo + len;
}

/* One byte or more between us and "user" addresses of the same process. */
static int
cross(void *ours, uint64_t uaddr, size_t len, bool write)
{
	struct iovec l = { ours, len }, r = { (void *)(uintptr_t)uaddr, len };
	ssize_t n;

	must_not_sleep("a copy");
	if (len == 0)
		return (0);
	if (uaddr < arena_lo || uaddr >= arena_hi || len > arena_hi - uaddr)
		return (VMK_EFAULT);
	n = write ? process_vm_writev(getpid(), &l, 1, &r, 1, 0) :
	    process_vm_readv(getpid(), &l, 1, &r, 1, 0);
	return (n == (ssize_t)len ? 0 : VMK_EFAULT);
}

int
vmk_copyin(uint64_t uaddr, void *dst, size_t len)
{
	return (cross(dst, uaddr, len, false));
}

int
vmk_copyout(const void *src, uint64_t uaddr, size_t len)
{
	return (cross((void *)(uintptr_t)src, uaddr, len, true));
}

/* ---- user memory ------------------------------------------------------- */

struct vmk_mm {
	struct vmk_mm	*next;
	int		 id;
	vmk_unmap_fn	*unmap;
	void		*arg;
};

static pthread_mutex_t	mm_lock = PTHREAD_MUTEX_INITIALIZER;
static struct vmk_mm	*mm_list;

struct vmk_mm *
vmk_mm_attach(vmk_unmap_fn *unmap, void *arg)
{
	struct vmk_mm *mm;

	if (should_fail() || (mm = calloc(1, sizeof(*mm))) == NULL)
		return (NULL);
	mm->id = my_mm;
	mm->unmap = unmap;
	mm->arg = arg;
	pthread_mutex_lock(&mm_lock);
	mm->next = mm_list;
	mm_list = mm;
	pthread_mutex_unlock(&mm_lock);
	hold(1);
	return (mm);
}

void
vmk_mm_detach(struct vmk_mm *mm)
{
	struct vmk_mm **p;

	must_not_sleep("vmk_mm_detach");
	pthread_mutex_lock(&mm_lock);
	for (p = &mm_list; *p != mm; p = &(*p)->next)
		continue;
	*p = mm->next;
	pthread_mutex_unlock(&mm_lock);
	free(mm);
	let_go(1);
}

bool
vmk_mm_is_current(const struct vmk_mm *mm)
{
	return (mm->id == my_mm);
}

void
user_switch_mm(int id)
{
	my_mm = id;
}

void
user_unmap(uint64_t hva, uint64_t len)
{
	struct vmk_mm *mm;

	pthread_mutex_lock(&mm_lock);
	for (mm = mm_list; mm != NULL; mm = mm->next)
		mm->unmap(mm->arg, hva, len);
	pthread_mutex_unlock(&mm_lock);
}

int
vmk_pin(struct vmk_mm *mm, uint64_t hva, unsigned int npages, bool write,
    uint64_t *pa, void **cookie)
{
	unsigned int i;
	uint8_t byte;

	(void)mm;
	must_not_sleep("vmk_pin");
	if (should_fail())
		return (VMK_ENOMEM);
	for (i = 0; i < npages; i++) {
		uint64_t at = hva + i * VMK_PAGE_SIZE;

		if (cross(&byte, at, 1, false) != 0 ||
		    (write && cross(&byte, at, 1, true) != 0))
			return (VMK_EFAULT);
		pa[i] = at;
	}
	/* The cookie proves that unpin gets what pin gave. */
	*cookie = (void *)(uintptr_t)(hva ^ npages);
	__atomic_add_fetch(&pinned, npages, __ATOMIC_RELAXED);
	hold(npages);
	return (0);
}

void
vmk_unpin(struct vmk_mm *mm, void *cookie, uint64_t hva, unsigned int npages,
    bool write, const uint64_t *pa)
{
	(void)mm;
	(void)write;
	must_not_sleep("vmk_unpin");
	if (cookie != (void *)(uintptr_t)(hva ^ npages) || pa[0] != hva) {
		fprintf(stderr, "vmk_user: unpin of something not pinned\n");
		abort();
	}
	__atomic_sub_fetch(&pinned, npages, __ATOMIC_RELAXED);
	let_go(npages);
}

/* ---- locks ------------------------------------------------------------- */

#define	FITS(inner, outer)						\
	_Static_assert(sizeof(inner) <= sizeof(struct outer), #outer)
FITS(pthread_mutex_t, vmk_mutex);
FITS(pthread_spinlock_t, vmk_spin);

struct waitq {
	pthread_mutex_t	m;
	pthread_cond_t	c;
};
FITS(struct waitq, vmk_waitq);

void
vmk_mutex_init(struct vmk_mutex *m, const char *name)
{
	(void)name;
	pthread_mutex_init((pthread_mutex_t *)m, NULL);
	hold(1);
}

void
vmk_mutex_fini(struct vmk_mutex *m)
{
	if (pthread_mutex_destroy((pthread_mutex_t *)m) != 0)
		abort();
	let_go(1);
}

void
vmk_mutex_enter(struct vmk_mutex *m)
{
	must_not_sleep("vmk_mutex_enter");
	pthread_mutex_lock((pthread_mutex_t *)m);
}

int
vmk_mutex_enter_sig(struct vmk_mutex *m)
{
	vmk_mutex_enter(m);
	return (0);
}

void
vmk_mutex_exit(struct vmk_mutex *m)
{
	pthread_mutex_unlock((pthread_mutex_t *)m);
}

void
vmk_spin_init(struct vmk_spin *s, const char *name)
{
	(void)name;
	pthread_spin_init((pthread_spinlock_t *)s, PTHREAD_PROCESS_PRIVATE);
	hold(1);
}

void
vmk_spin_fini(struct vmk_spin *s)
{
	pthread_spin_destroy((pthread_spinlock_t *)s);
	let_go(1);
}

uint64_t
vmk_spin_enter(struct vmk_spin *s)
{
	pthread_spin_lock((pthread_spinlock_t *)s);
	spins++;
	return (0x5a);
}

void
vmk_spin_exit(struct vmk_spin *s, uint64_t saved)
{
	if (saved != 0x5a || spins-- == 0)
		abort();
	pthread_spin_unlock((pthread_spinlock_t *)s);
}

void
vmk_waitq_init(struct vmk_waitq *q, const char *name)
{
	struct waitq *w = (struct waitq *)q;

	(void)name;
	pthread_mutex_init(&w->m, NULL);
	pthread_cond_init(&w->c, NULL);
	hold(1);
}

void
vmk_waitq_fini(struct vmk_waitq *q)
{
	struct waitq *w = (struct waitq *)q;

	pthread_cond_destroy(&w->c);
	pthread_mutex_destroy(&w->m);
	let_go(1);
}

int
vmk_wait_sig(struct vmk_waitq *q, bool (*cond)(void *), void *arg)
{
	struct waitq *w = (struct waitq *)q;
	bool ready = false;

	must_not_sleep("vmk_wait_sig");
	pthread_mutex_lock(&w->m);
	while (!signalled && !(ready = cond(arg)) && !never_wait)
		pthread_cond_wait(&w->c, &w->m);
	pthread_mutex_unlock(&w->m);
	return (ready ? 0 : VMK_EINTR);
}

void
vmk_wake(struct vmk_waitq *q)
{
	struct waitq *w = (struct waitq *)q;

	pthread_mutex_lock(&w->m);
	pthread_cond_broadcast(&w->c);
	pthread_mutex_unlock(&w->m);
}

/* ---- processors -------------------------------------------------------- */

void
vmk_cpu_enter(void)
{
	must_not_sleep("vmk_cpu_enter");
	if (my_cpu == ~0U)
		my_cpu = __atomic_fetch_add(&next_cpu, 1, __ATOMIC_RELAXED) %
		    NCPUS;
	in_section = true;
}

void
vmk_cpu_exit(void)
{
	in_section = false;
}

unsigned int
vmk_cpu_id(void)
{
	if (!in_section)
		abort();
	return (my_cpu);
}

unsigned int
vmk_ncpus(void)
{
	return (NCPUS);
}

void
vmk_cpu_kick(unsigned int cpu)
{
	if (cpu >= NCPUS)
		abort();
	__atomic_add_fetch(&nkicks, 1, __ATOMIC_RELAXED);
	__atomic_store_n(&kicked[cpu], 1, __ATOMIC_SEQ_CST);
}

void
vmk_cpu_each(void (*fn)(void *), void *arg)
{
	fn(arg);
}

bool
vmk_must_leave(void)
{
	if (!in_section)
		abort();
	return (signalled ||
	    __atomic_exchange_n(&kicked[my_cpu], 0, __ATOMIC_SEQ_CST) != 0);
}

int
vmk_yield(void)
{
	must_not_sleep("vmk_yield");
	sched_yield();
	return (signalled ? VMK_EINTR : 0);
}

void
user_never_wait(bool on)
{
	never_wait = on;
}

void
user_signal_self(bool pending)
{
	signalled = pending;
}

const struct vmk_hv *
vmk_hv_claim(void)
{
	return (NULL);
}

void
vmk_hv_release(void)
{
}

/* ---- signals ----------------------------------------------------------- */

static _Thread_local struct vmk_sigset sigmask;

bool
vmk_sigset_ok(uint32_t len)
{
	return (len == 8);
}

void
vmk_sigmask_swap(const struct vmk_sigset *set, struct vmk_sigset *old)
{
	*old = sigmask;
	sigmask = *set;
}

void
vmk_sigmask_restore(const struct vmk_sigset *old)
{
	sigmask = *old;
}

uint8_t
user_sigmask(void)
{
	return (sigmask.bytes[0]);
}

/* ---- time -------------------------------------------------------------- */

static uint64_t
clock_ns(clockid_t id)
{
	struct timespec t;

	clock_gettime(id, &t);
	return ((uint64_t)t.tv_sec * 1000000000ULL + (uint64_t)t.tv_nsec);
}

uint64_t
vmk_time_ns(void)
{
	return (clock_ns(CLOCK_MONOTONIC));
}

uint32_t
vmk_tsc_khz(void)
{
	return (2000000);
}

/*
 * Timers: one thread, a list of armed timers.  t_running is the one whose
 * function runs; vmk_timer_fini() waits while it is its own.
 */
struct timer {
	struct timer	*next;
	void		(*fn)(void *);
	void		*arg;
	uint64_t	 deadline;
	bool		 armed;
};
FITS(struct timer, vmk_timer);

static pthread_mutex_t	t_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t	t_wake = PTHREAD_COND_INITIALIZER;
static pthread_cond_t	t_done = PTHREAD_COND_INITIALIZER;
static struct timer	*t_list, *t_running;
static bool		 t_started;

static void *
timer_thread(void *arg)
{
	struct timer *t, *first;
	struct timespec ts;
	uint64_t now;

	(void)arg;
	pthread_mutex_lock(&t_lock);
	for (;;) {
		first = NULL;
		for (t = t_list; t != NULL; t = t->next)
			if (t->armed && (first == NULL ||
			    t->deadline < first->deadline))
				first = t;
		now = clock_ns(CLOCK_MONOTONIC);
		if (first == NULL) {
			pthread_cond_wait(&t_wake, &t_lock);
		} else if (first->deadline > now) {
			now = clock_ns(CLOCK_REALTIME) +
			    (first->deadline - now);
			ts.tv_sec = (time_t)(now / 1000000000ULL);
			ts.tv_nsec = (long)(now % 1000000000ULL);
			pthread_cond_timedwait(&t_wake, &t_lock, &ts);
		} else {
			first->armed = false;
			t_running = first;
			pthread_mutex_unlock(&t_lock);
			spins++;	/* any context: no sleeping */
			first->fn(first->arg);
			spins--;
			pthread_mutex_lock(&t_lock);
			t_running = NULL;
			pthread_cond_broadcast(&t_done);
		}
	}
	return (NULL);
}

void
vmk_timer_init(struct vmk_timer *vt, void (*fn)(void *), void *arg)
{
	struct timer *t = (struct timer *)vt;
	pthread_t id;

	memset(t, 0, sizeof(*t));
	t->fn = fn;
	t->arg = arg;
	pthread_mutex_lock(&t_lock);
	t->next = t_list;
	t_list = t;
	if (!t_started) {
		t_started = true;
		if (pthread_create(&id, NULL, timer_thread, NULL) != 0)
			abort();
		pthread_detach(id);
	}
	pthread_mutex_unlock(&t_lock);
	hold(1);
}

void
vmk_timer_fini(struct vmk_timer *vt)
{
	struct timer *t = (struct timer *)vt, **p;

	must_not_sleep("vmk_timer_fini");
	pthread_mutex_lock(&t_lock);
	t->armed = false;
	while (t_running == t) {
		pthread_cond_wait(&t_done, &t_lock);
		t->armed = false;
	}
	for (p = &t_list; *p != t; p = &(*p)->next)
		continue;
	*p = t->next;
	pthread_mutex_unlock(&t_lock);
	let_go(1);
}

void
vmk_timer_arm(struct vmk_timer *vt, uint64_t deadline_ns)
{
	struct timer *t = (struct timer *)vt;

	pthread_mutex_lock(&t_lock);
	t->deadline = deadline_ns;
	t->armed = true;
	pthread_cond_signal(&t_wake);
	pthread_mutex_unlock(&t_lock);
}

void
vmk_timer_cancel(struct vmk_timer *vt)
{
	pthread_mutex_lock(&t_lock);
	((struct timer *)vt)->armed = false;
	pthread_mutex_unlock(&t_lock);
}

/* ---- descriptors ------------------------------------------------------- */

static pthread_mutex_t fd_lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
	bool			used, closing;
	struct vmk_object	*obj;
	unsigned int		users;
} fds[NFDS];

int
vmk_fd_prepare(struct vmk_fd_ticket *t, const char *name)
{
	int i;

	(void)name;
	must_not_sleep("vmk_fd_prepare");
	if (should_fail())
		return (VMK_ENFILE);
	pthread_mutex_lock(&fd_lock);
	for (i = 0; i < NFDS && fds[i].used; i++)
		continue;
	if (i < NFDS)
		fds[i].used = true;
	pthread_mutex_unlock(&fd_lock);
	if (i == NFDS)
		return (VMK_ENFILE);
	t->fd = i;
	hold(1);
	return (0);
}

void
vmk_fd_commit(struct vmk_fd_ticket *t, struct vmk_object *obj)
{
	pthread_mutex_lock(&fd_lock);
	fds[t->fd].obj = obj;
	pthread_mutex_unlock(&fd_lock);
}

static struct vmk_object *
fd_get(int fd)
{
	struct vmk_object *obj = NULL;

	if (fd < 0 || fd >= NFDS)
		return (NULL);
	pthread_mutex_lock(&fd_lock);
	if (fds[fd].used && !fds[fd].closing && fds[fd].obj != NULL) {
		obj = fds[fd].obj;
		fds[fd].users++;
	}
	pthread_mutex_unlock(&fd_lock);
	return (obj);
}

/* The last user of a closed descriptor releases the object. */
static void
fd_put(int fd, bool closing)
{
	struct vmk_object *obj = NULL;

	pthread_mutex_lock(&fd_lock);
	fds[fd].closing |= closing;
	if (--fds[fd].users == 0 && fds[fd].closing) {
		obj = fds[fd].obj;
		fds[fd].obj = NULL;
		fds[fd].closing = fds[fd].used = false;
	}
	pthread_mutex_unlock(&fd_lock);
	if (obj != NULL) {
		vmk_object_release(obj);
		let_go(1);
	}
}

int
user_ioctl(int fd, uint32_t request, uint64_t arg)
{
	struct vmk_object *obj = NULL;
	int result = 0, error;

	if (fd != USER_DEV_KVM && (obj = fd_get(fd)) == NULL)
		return (-9);				/* EBADF */
	error = vmk_object_ioctl(obj, request, arg, &result);
	if (in_section || spins != 0) {
		fprintf(stderr, "vmk_user: request %#x left a section\n",
		    request);
		abort();
	}
	if (obj != NULL)
		fd_put(fd, false);
	return (error != 0 ? -error : result);
}

void
user_close(int fd)
{
	if (fd_get(fd) != NULL)
		fd_put(fd, true);
}

void *
user_map(int fd, unsigned int *npages)
{
	struct vmk_object *obj = fd_get(fd);
	struct vmk_shared *s;
	void *va = NULL;

	if (obj == NULL)
		return (NULL);
	s = vmk_object_shared(obj);
	if (s != NULL) {
		va = s->va;
		*npages = s->npages;
	}
	fd_put(fd, false);
	return (va);
}

/* ---- eventfd ----------------------------------------------------------- */

struct vmk_event {
	int		 fd, stop[2];
	int		 number;		/* the user's, for "same" */
	pthread_t	 thread;
	bool		 listening;
	void		(*fn)(void *);
	void		*arg;
};

int
vmk_event_get(int fd, struct vmk_event **out)
{
	char link[64], path[64];
	struct vmk_event *ev;
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	n = readlink(path, link, sizeof(link) - 1);
	if (n < 0)
		return (9);				/* EBADF */
	link[n] = '\0';
	if (strcmp(link, "anon_inode:[eventfd]") != 0)
		return (VMK_EINVAL);
	if (should_fail() || (ev = calloc(1, sizeof(*ev))) == NULL)
		return (VMK_ENOMEM);
	ev->fd = dup(fd);
	if (ev->fd < 0) {
		free(ev);
		return (VMK_ENFILE);
	}
	ev->number = fd;
	*out = ev;
	hold(1);
	return (0);
}

void
vmk_event_put(struct vmk_event *ev)
{
	if (ev->listening)
		abort();
	close(ev->fd);
	free(ev);
	let_go(1);
}

bool
vmk_event_same(const struct vmk_event *a, const struct vmk_event *b)
{
	return (a->number == b->number);
}

void
vmk_event_signal(struct vmk_event *ev)
{
	uint64_t one = 1;

	if (write(ev->fd, &one, sizeof(one)) != sizeof(one))
		return;			/* counter full: already signalled */
}

static void *
event_thread(void *arg)
{
	struct vmk_event *ev = arg;
	struct pollfd p[2] = { { ev->fd, POLLIN, 0 },
		{ ev->stop[0], POLLIN, 0 } };
	uint64_t count;

	for (;;) {
		if (poll(p, 2, -1) < 0)
			continue;
		if (p[1].revents != 0)
			return (NULL);
		if (read(ev->fd, &count, sizeof(count)) != sizeof(count))
			continue;
		spins++;
		ev->fn(ev->arg);
		spins--;
	}
}

int
vmk_event_listen(struct vmk_event *ev, void (*fn)(void *), void *arg)
{
	ev->fn = fn;
	ev->arg = arg;
	/* Not an eventfd: the fuzzer would bind it to something. */
	if (pipe(ev->stop) != 0)
		return (VMK_ENFILE);
	if (pthread_create(&ev->thread, NULL, event_thread, ev) != 0) {
		close(ev->stop[0]);
		close(ev->stop[1]);
		return (VMK_ENOMEM);
	}
	ev->listening = true;
	return (0);
}

void
vmk_event_unlisten(struct vmk_event *ev)
{
	must_not_sleep("vmk_event_unlisten");
	close(ev->stop[1]);
	pthread_join(ev->thread, NULL);
	close(ev->stop[0]);
	ev->listening = false;
}

void
vmk_log(const char *fmt, ...)
{
	va_list ap;

	printf("# ");
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
}

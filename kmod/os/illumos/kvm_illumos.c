/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * kvm_illumos.c: vmk_os.h on illumos, i86pc.
 *
 * Theory.
 *
 * Descriptors.  illumos has no anonymous files with ioctls of their own, so
 * each machine and vCPU is a minor of this driver.  vmk_fd_prepare() makes
 * one, opens it through a special vnode of its own and reserves a descriptor;
 * nothing is visible before setf() in vmk_fd_commit().  open(9E) accepts such
 * a minor from the thread that is making it and from nobody else, so a device
 * node made with mknod(2) reaches no one's machine.  close(9E) comes when the
 * last descriptor and the last mapping are gone.
 *
 * Requests.  ioctl(2) passes Linux's numbers through unchanged.
 *
 * Guest memory.  as_pagelock() makes munmap, mprotect and exit wait for the
 * lock, so every pin has an address-space callback that gives the memory back
 * first.  A callback and a release from our side can meet; then the callback
 * frees the pin.  One more callback a machine tells when the
 * whole address space goes.
 *
 * Spin locks are at DISP_LEVEL, the highest level from which a thread can
 * still be woken.  Timers are cyclics at low level with an infinite interval.
 *
 * Processors.  When the hypervisor multiplexor (HMA) serves this processor it
 * owns the extension and the ASIDs, shared with bhyve.  When it does not (it
 * wants next-RIP saving, which QEMU's TCG lacks) no other hypervisor can be
 * active, and the core manages SVM itself.
 */
#include "kvm_sys.h"

#define	VMK_HOST_TYPES
#include "vmk_os.h"

#define	FITS(inner, outer)						\
	_Static_assert(sizeof (inner) <= sizeof (struct outer), #outer)

#define	KVM_MINORS	65536		/* machines and vCPUs at a time */

struct vmk_tunables vmk_tunables;

static dev_info_t *kvm_dip;
static major_t kvm_major, kvm_eventfd_major;
static void *kvm_minors;		/* struct minor by number */
static id_space_t *kvm_ids;

/*
 * A machine or vCPU; obj is NULL until commit.
 */
struct minor {
	struct vmk_object *obj;
	kthread_t *opener;		/* may open it; NULL: nobody */
};

/* ---- memory ------------------------------------------------------------ */

void *
vmk_alloc(size_t size)
{
	return (kmem_zalloc(size, KM_SLEEP));
}

void
vmk_free(void *p, size_t size)
{
	kmem_free(p, size);
}

/*
 * Pages are known by their address in the kernel's map of all memory; their
 * address in the heap is kept to free them.
 */
struct pages {
	avl_node_t link;
	uintptr_t kpm;
	void *heap;
};

static kmutex_t pages_lock;
static avl_tree_t pages_tree;

static int
pages_compare(const void *va, const void *vb)
{
	const struct pages *a = va, *b = vb;

	return (a->kpm < b->kpm ? -1 : a->kpm > b->kpm);
}

extern void *contig_alloc(size_t, ddi_dma_attr_t *, uintptr_t, int);
extern void contig_free(void *, size_t);

static void *
heap_alloc(size_t size)
{
	ddi_dma_attr_t attr = {
		.dma_attr_version = DMA_ATTR_V0,
		.dma_attr_addr_hi = UINT64_MAX,
		.dma_attr_count_max = UINT64_MAX,
		.dma_attr_align = size,
		.dma_attr_burstsizes = 1,
		.dma_attr_minxfer = 1,
		.dma_attr_maxxfer = UINT64_MAX,
		.dma_attr_seg = UINT64_MAX,
		.dma_attr_sgllen = 1,
		.dma_attr_granular = 1,
	};
	void *p;

	if (size == PAGESIZE)
		return (kmem_zalloc(size, KM_SLEEP));
	p = contig_alloc(size, &attr, size, 1);
	if (p != NULL)
		bzero(p, size);
	return (p);
}

static void
heap_free(void *p, size_t size)
{
	if (size == PAGESIZE)
		kmem_free(p, size);
	else
		contig_free(p, size);
}

void *
vmk_pages_alloc(unsigned int npages, uint64_t *pa)
{
	struct pages *g;
	pfn_t pfn;
	void *heap;

	heap = heap_alloc(ptob(npages));
	if (heap == NULL)
		return (NULL);
	pfn = hat_getpfnum(kas.a_hat, heap);
	g = kmem_zalloc(sizeof (*g), KM_SLEEP);
	g->heap = heap;
	g->kpm = (uintptr_t)hat_kpm_pfn2va(pfn);
	mutex_enter(&pages_lock);
	avl_add(&pages_tree, g);
	mutex_exit(&pages_lock);
	*pa = ptob((uint64_t)pfn);
	return ((void *)g->kpm);
}

void
vmk_pages_free(void *va, unsigned int npages)
{
	struct pages find, *g;

	find.kpm = (uintptr_t)va;
	mutex_enter(&pages_lock);
	g = avl_find(&pages_tree, &find, NULL);
	VERIFY(g != NULL);
	avl_remove(&pages_tree, g);
	mutex_exit(&pages_lock);
	heap_free(g->heap, ptob(npages));
	kmem_free(g, sizeof (*g));
}

void *
vmk_phys_to_virt(uint64_t pa)
{
	return (hat_kpm_pfn2va((pfn_t)btop(pa)));
}

int
vmk_shared_alloc(struct vmk_shared *s, unsigned int npages)
{
	ddi_umem_cookie_t cookie;

	s->va = ddi_umem_alloc(ptob(npages), DDI_UMEM_SLEEP, &cookie);
	if (s->va == NULL)
		return (VMK_ENOMEM);
	bzero(s->va, ptob(npages));
	s->npages = npages;
	s->os = cookie;
	return (0);
}

void
vmk_shared_free(struct vmk_shared *s)
{
	ddi_umem_free(s->os);
	s->va = NULL;
}

int
vmk_copyin(uint64_t uaddr, void *dst, size_t len)
{
	return (copyin((void *)(uintptr_t)uaddr, dst, len) == 0 ?
	    0 : VMK_EFAULT);
}

int
vmk_copyout(const void *src, uint64_t uaddr, size_t len)
{
	return (copyout(src, (void *)(uintptr_t)uaddr, len) == 0 ?
	    0 : VMK_EFAULT);
}

/* ---- user memory ------------------------------------------------------- */

struct vmk_mm {
	kmutex_t lock;
	kcondvar_t cv;
	struct as *as;
	boolean_t dead;		/* the address space is going or gone */
	boolean_t detached;	/* the machine is going */
	boolean_t called;	/* mm_gone() has finished */
	uint_t late;		/* released pins with a callback under way */
	vmk_unmap_fn *unmap;
	void *arg;
};

struct pin {
	struct vmk_mm *mm;
	struct page **pages;
	caddr_t addr;
	size_t len;
	enum seg_rw rw;
	boolean_t late;
};

static void
mm_gone(struct as *as, void *arg, uint_t event)
{
	struct vmk_mm *mm = arg;

	_NOTE(ARGUNUSED(event));
	mutex_enter(&mm->lock);
	if (!mm->detached) {
		mm->dead = B_TRUE;
		mutex_exit(&mm->lock);
		mm->unmap(mm->arg, 0, UINT64_MAX);
		(void) as_delete_callback(as, mm);
		mutex_enter(&mm->lock);
	}
	mm->called = B_TRUE;
	cv_broadcast(&mm->cv);
	mutex_exit(&mm->lock);
}

struct vmk_mm *
vmk_mm_attach(vmk_unmap_fn *unmap, void *arg)
{
	struct vmk_mm *mm;

	mm = kmem_zalloc(sizeof (*mm), KM_SLEEP);
	mutex_init(&mm->lock, NULL, MUTEX_DEFAULT, NULL);
	cv_init(&mm->cv, NULL, CV_DEFAULT, NULL);
	mm->as = curproc->p_as;
	mm->unmap = unmap;
	mm->arg = arg;
	if (as_add_callback(mm->as, (void (*)())mm_gone, mm, AS_FREE_EVENT,
	    0, (size_t)-1, KM_SLEEP) != 0) {
		cv_destroy(&mm->cv);
		mutex_destroy(&mm->lock);
		kmem_free(mm, sizeof (*mm));
		return (NULL);
	}
	return (mm);
}

void
vmk_mm_detach(struct vmk_mm *mm)
{
	mutex_enter(&mm->lock);
	/* While mm->lock is held and dead is false the space cannot go. */
	if (!mm->dead) {
		mm->detached = B_TRUE;
		if (as_delete_callback(mm->as, mm) == AS_CALLBACK_DELETED)
			mm->called = B_TRUE;
	}
	while (!mm->called || mm->late != 0)
		cv_wait(&mm->cv, &mm->lock);
	mutex_exit(&mm->lock);
	cv_destroy(&mm->cv);
	mutex_destroy(&mm->lock);
	kmem_free(mm, sizeof (*mm));
}

bool
vmk_mm_is_current(const struct vmk_mm *mm)
{
	return (curproc->p_as == mm->as && !mm->dead);
}

static void
pin_unlock(struct pin *p)
{
	as_pageunlock(p->mm->as, p->pages, p->addr, p->len, p->rw);
}

/*
 * The range of a pin is about to change.  unmap() comes back here through
 * vmk_unpin(), unless someone else released this pin meanwhile.
 */
static void
pin_gone(struct as *as, void *arg, uint_t event)
{
	struct pin *p = arg;
	struct vmk_mm *mm = p->mm;

	_NOTE(ARGUNUSED(as, event));
	mm->unmap(mm->arg, (uint64_t)(uintptr_t)p->addr, p->len);
	mutex_enter(&mm->lock);
	while (!p->late)
		cv_wait(&mm->cv, &mm->lock);
	kmem_free(p, sizeof (*p));
	mm->late--;
	cv_broadcast(&mm->cv);
	mutex_exit(&mm->lock);
}

/* The physical addresses of a locked range; false: not ordinary memory. */
static boolean_t
pin_addresses(struct pin *p, uint64_t *pa)
{
	uint_t i, n = (uint_t)btop(p->len);
	pfn_t pfn;

	for (i = 0; i < n; i++) {
		if (p->pages != NULL)
			pfn = page_pptonum(p->pages[i]);
		else
			pfn = hat_getpfnum(p->mm->as->a_hat,
			    p->addr + ptob((size_t)i));
		if (pfn == PFN_INVALID || page_numtopp_nolock(pfn) == NULL)
			return (B_FALSE);
		pa[i] = ptob((uint64_t)pfn);
	}
	return (B_TRUE);
}

int
vmk_pin(struct vmk_mm *mm, uint64_t hva, unsigned int npages, bool write,
    uint64_t *pa, void **cookie)
{
	struct pin *p;

	*cookie = NULL;
	if (!vmk_mm_is_current(mm))
		return (VMK_EFAULT);
	p = kmem_zalloc(sizeof (*p), KM_SLEEP);
	p->mm = mm;
	p->addr = (caddr_t)(uintptr_t)hva;
	p->len = ptob((size_t)npages);
	p->rw = write ? S_WRITE : S_READ;
	if (as_pagelock(mm->as, &p->pages, p->addr, p->len, p->rw) != 0) {
		kmem_free(p, sizeof (*p));
		return (VMK_EFAULT);
	}
	if (!pin_addresses(p, pa) ||
	    as_add_callback(mm->as, (void (*)())pin_gone, p, AS_ALL_EVENT,
	    p->addr, p->len, KM_SLEEP) != 0) {
		pin_unlock(p);
		kmem_free(p, sizeof (*p));
		return (VMK_EFAULT);
	}
	*cookie = p;
	return (0);
}

void
vmk_unpin(struct vmk_mm *mm, void *cookie, uint64_t hva, unsigned int npages,
    bool write, const uint64_t *pa)
{
	struct pin *p = cookie;

	_NOTE(ARGUNUSED(hva, npages, write, pa));
	pin_unlock(p);
	if (as_delete_callback(mm->as, p) == AS_CALLBACK_DELETED) {
		kmem_free(p, sizeof (*p));
		return;
	}
	/* pin_gone() runs, perhaps below us on this stack, and frees it. */
	mutex_enter(&mm->lock);
	mm->late++;
	p->late = B_TRUE;
	cv_broadcast(&mm->cv);
	mutex_exit(&mm->lock);
}

/* ---- locks ------------------------------------------------------------- */

FITS(kmutex_t, vmk_spin);

/*
 * illumos has no mutex that a signal can interrupt; this one is a flag, and
 * waits for it can be.
 */
struct siglock {
	kmutex_t lock;
	kcondvar_t cv;
	kthread_t *owner;
};
FITS(struct siglock, vmk_mutex);

void
vmk_mutex_init(struct vmk_mutex *vm, const char *name)
{
	struct siglock *m = (struct siglock *)vm;

	_NOTE(ARGUNUSED(name));
	mutex_init(&m->lock, NULL, MUTEX_DEFAULT, NULL);
	cv_init(&m->cv, NULL, CV_DEFAULT, NULL);
	m->owner = NULL;
}

void
vmk_mutex_fini(struct vmk_mutex *vm)
{
	struct siglock *m = (struct siglock *)vm;

	ASSERT(m->owner == NULL);
	cv_destroy(&m->cv);
	mutex_destroy(&m->lock);
}

void
vmk_mutex_enter(struct vmk_mutex *vm)
{
	struct siglock *m = (struct siglock *)vm;

	mutex_enter(&m->lock);
	while (m->owner != NULL)
		cv_wait(&m->cv, &m->lock);
	m->owner = curthread;
	mutex_exit(&m->lock);
}

int
vmk_mutex_enter_sig(struct vmk_mutex *vm)
{
	struct siglock *m = (struct siglock *)vm;

	mutex_enter(&m->lock);
	while (m->owner != NULL) {
		if (cv_wait_sig(&m->cv, &m->lock) == 0) {
			mutex_exit(&m->lock);
			return (VMK_EINTR);
		}
	}
	m->owner = curthread;
	mutex_exit(&m->lock);
	return (0);
}

void
vmk_mutex_exit(struct vmk_mutex *vm)
{
	struct siglock *m = (struct siglock *)vm;

	mutex_enter(&m->lock);
	ASSERT(m->owner == curthread);
	m->owner = NULL;
	cv_signal(&m->cv);
	mutex_exit(&m->lock);
}

static void
spin_init(kmutex_t *m)
{
	mutex_init(m, NULL, MUTEX_SPIN, (void *)(uintptr_t)
	    ipltospl(DISP_LEVEL));
}

void
vmk_spin_init(struct vmk_spin *s, const char *name)
{
	_NOTE(ARGUNUSED(name));
	spin_init((kmutex_t *)s);
}

void
vmk_spin_fini(struct vmk_spin *s)
{
	mutex_destroy((kmutex_t *)s);
}

uint64_t
vmk_spin_enter(struct vmk_spin *s)
{
	mutex_enter((kmutex_t *)s);
	return (0);
}

void
vmk_spin_exit(struct vmk_spin *s, uint64_t saved)
{
	_NOTE(ARGUNUSED(saved));
	mutex_exit((kmutex_t *)s);
}

/*
 * The condition is looked at without the lock, which the waker may want while
 * it holds locks that the condition takes; gen closes the gap.
 */
struct waitq {
	kmutex_t lock;
	kcondvar_t cv;
	uint64_t gen;
};
FITS(struct waitq, vmk_waitq);

void
vmk_waitq_init(struct vmk_waitq *vw, const char *name)
{
	struct waitq *w = (struct waitq *)vw;

	_NOTE(ARGUNUSED(name));
	spin_init(&w->lock);
	cv_init(&w->cv, NULL, CV_DEFAULT, NULL);
	w->gen = 0;
}

void
vmk_waitq_fini(struct vmk_waitq *vw)
{
	struct waitq *w = (struct waitq *)vw;

	cv_destroy(&w->cv);
	mutex_destroy(&w->lock);
}

int
vmk_wait_sig(struct vmk_waitq *vw, bool (*cond)(void *), void *arg)
{
	struct waitq *w = (struct waitq *)vw;
	uint64_t gen;
	int left = 1;

	while (left != 0) {
		mutex_enter(&w->lock);
		gen = w->gen;
		mutex_exit(&w->lock);
		if (cond(arg))
			return (0);
		mutex_enter(&w->lock);
		while (w->gen == gen && left != 0)
			left = cv_wait_sig(&w->cv, &w->lock);
		mutex_exit(&w->lock);
	}
	return (VMK_EINTR);
}

void
vmk_wake(struct vmk_waitq *vw)
{
	struct waitq *w = (struct waitq *)vw;

	mutex_enter(&w->lock);
	w->gen++;
	cv_broadcast(&w->cv);
	mutex_exit(&w->lock);
}

/* ---- processors -------------------------------------------------------- */

/* The dispatcher keeps vCPU threads of different zones off one core. */
void
vmk_cpu_enter(void)
{
	if ((curthread->t_schedflag & TS_VCPU) == 0)
		smt_mark_as_vcpu();
	kpreempt_disable();
	kernel_fpu_begin(NULL, KFPU_NO_STATE);
}

void
vmk_cpu_exit(void)
{
	kernel_fpu_end(NULL, KFPU_NO_STATE);
	kpreempt_enable();
}

unsigned int
vmk_cpu_id(void)
{
	return ((unsigned int)CPU->cpu_id);
}

unsigned int
vmk_ncpus(void)
{
	return ((unsigned int)max_ncpus);
}

void
vmk_cpu_kick(unsigned int cpu)
{
	poke_cpu((int)cpu);
}

static int
each(xc_arg_t fn, xc_arg_t arg, xc_arg_t unused)
{
	ulong_t flags = intr_clear();

	_NOTE(ARGUNUSED(unused));
	((void (*)(void *))fn)((void *)arg);
	intr_restore(flags);
	return (0);
}

void
vmk_cpu_each(void (*fn)(void *), void *arg)
{
	cpuset_t set;

	mutex_enter(&cpu_lock);
	cpuset_zero(&set);
	for (cpu_t *c = cpu_active; c != NULL; ) {
		cpuset_add(&set, (uint_t)c->cpu_id);
		c = c->cpu_next_onln;
		if (c == cpu_active)
			break;
	}
	kpreempt_disable();
	xc_sync((xc_arg_t)fn, (xc_arg_t)arg, 0, CPUSET2BV(set), each);
	kpreempt_enable();
	mutex_exit(&cpu_lock);
}

bool
vmk_must_leave(void)
{
	return (curthread->t_astflag != 0 || CPU->cpu_runrun != 0 ||
	    CPU->cpu_kprunrun != 0);
}

/* What an AST asks for is done on the way back to user mode. */
int
vmk_yield(void)
{
	if (curthread->t_astflag != 0 || ISSIG(curthread, JUSTLOOKING))
		return (VMK_EINTR);
	if (CPU->cpu_runrun != 0)
		preempt();
	return (0);
}

static hma_reg_t *kvm_hma;

static uint8_t
hv_asid(struct vmk_hv_tag *tag, bool by_asid, bool flush, uint32_t *asid)
{
	hma_svm_asid_t *h = (hma_svm_asid_t *)tag;
	uint8_t tlb;

	tlb = hma_svm_asid_update(h, by_asid ? B_TRUE : B_FALSE,
	    flush ? B_TRUE : B_FALSE);
	*asid = h->hsa_asid;
	return (tlb);
}
FITS(hma_svm_asid_t, vmk_hv_tag);

/* -1: a vCPU on the sibling has precedence; let the dispatcher move us. */
static bool
hv_sibling_enter(void)
{
	int got = smt_acquire();

	if (got < 0)
		CPU->cpu_runrun = 1;
	return (got == 1);
}

static const struct vmk_hv kvm_hv = {
	.asid = hv_asid,
	.vpid_alloc = hma_vmx_vpid_alloc,
	.vpid_free = hma_vmx_vpid_free,
	.sibling_enter = hv_sibling_enter,
	.sibling_leave = smt_release,
};

const struct vmk_hv *
vmk_hv_claim(void)
{
	kvm_hma = hma_register("kvm");
	return (kvm_hma != NULL ? &kvm_hv : NULL);
}

void
vmk_hv_release(void)
{
	hma_unregister(kvm_hma);
	kvm_hma = NULL;
}

/* ---- signals ----------------------------------------------------------- */

FITS(sigset_t, vmk_sigset);
FITS(k_sigset_t, vmk_sigset);

bool
vmk_sigset_ok(uint32_t len)
{
	return (len == sizeof (sigset_t));
}

static void
set_hold(const k_sigset_t *new, k_sigset_t *old)
{
	kthread_t *t = curthread;
	proc_t *p = ttoproc(t);

	mutex_enter(&p->p_lock);
	schedctl_finish_sigblock(t);
	if (old != NULL)
		*old = t->t_hold;
	t->t_hold = *new;
	if (sigcheck(p, t))
		t->t_sig_check = 1;
	mutex_exit(&p->p_lock);
}

void
vmk_sigmask_swap(const struct vmk_sigset *set, struct vmk_sigset *old)
{
	sigset_t user;
	k_sigset_t new, was;

	bcopy(set->bytes, &user, sizeof (user));
	sigutok(&user, &new);
	set_hold(&new, &was);
	bcopy(&was, old->bytes, sizeof (was));
}

void
vmk_sigmask_restore(const struct vmk_sigset *old)
{
	k_sigset_t was;

	bcopy(old->bytes, &was, sizeof (was));
	set_hold(&was, NULL);
}

/* ---- time -------------------------------------------------------------- */

uint64_t
vmk_time_ns(void)
{
	return ((uint64_t)gethrtime());
}

uint32_t
vmk_tsc_khz(void)
{
	return ((uint32_t)(unscalehrtime(NANOSEC) / 1000));
}

struct timer {
	cyclic_id_t id;
	void (*fn)(void *);
	void *arg;
};
FITS(struct timer, vmk_timer);

static void
timer_fired(void *arg)
{
	struct timer *t = arg;

	t->fn(t->arg);
}

void
vmk_timer_init(struct vmk_timer *vt, void (*fn)(void *), void *arg)
{
	struct timer *t = (struct timer *)vt;
	cyc_handler_t handler;
	cyc_time_t when;

	t->fn = fn;
	t->arg = arg;
	bzero(&handler, sizeof (handler));
	handler.cyh_func = timer_fired;
	handler.cyh_arg = t;
	handler.cyh_level = CY_LOW_LEVEL;
	when.cyt_when = CY_INFINITY;
	when.cyt_interval = CY_INFINITY;
	mutex_enter(&cpu_lock);
	t->id = cyclic_add(&handler, &when);
	mutex_exit(&cpu_lock);
}

void
vmk_timer_fini(struct vmk_timer *vt)
{
	mutex_enter(&cpu_lock);
	cyclic_remove(((struct timer *)vt)->id);
	mutex_exit(&cpu_lock);
}

void
vmk_timer_arm(struct vmk_timer *vt, uint64_t deadline_ns)
{
	hrtime_t when = deadline_ns < (uint64_t)CY_INFINITY ?
	    (hrtime_t)deadline_ns : CY_INFINITY;

	(void) cyclic_reprogram(((struct timer *)vt)->id, when);
}

void
vmk_timer_cancel(struct vmk_timer *vt)
{
	(void) cyclic_reprogram(((struct timer *)vt)->id, CY_INFINITY);
}

/* ---- descriptors ------------------------------------------------------- */

static struct minor *
minor_of(dev_t dev)
{
	return (ddi_get_soft_state(kvm_minors, (int)getminor(dev)));
}

static void
minor_free(minor_t n)
{
	ddi_soft_state_free(kvm_minors, (int)n);
	id_free(kvm_ids, (id_t)n);
}

int
vmk_fd_prepare(struct vmk_fd_ticket *t, const char *name)
{
	struct minor *m;
	vnode_t *vp;
	file_t *fp;
	id_t n;
	int error;

	_NOTE(ARGUNUSED(name));
	n = id_alloc_nosleep(kvm_ids);
	if (n == -1)
		return (VMK_ENFILE);
	if (ddi_soft_state_zalloc(kvm_minors, n) != DDI_SUCCESS) {
		id_free(kvm_ids, n);
		return (VMK_ENOMEM);
	}
	m = ddi_get_soft_state(kvm_minors, n);
	m->opener = curthread;
	vp = makespecvp(makedevice(kvm_major, (minor_t)n), VCHR);
	error = VOP_OPEN(&vp, FREAD | FWRITE, CRED(), NULL);
	m->opener = NULL;
	if (error != 0) {
		VN_RELE(vp);
		minor_free((minor_t)n);
		return (error);
	}
	error = falloc(vp, FREAD | FWRITE, &fp, &t->fd);
	if (error != 0) {
		(void) VOP_CLOSE(vp, FREAD | FWRITE, 1, 0, CRED(), NULL);
		VN_RELE(vp);
		return (error);
	}
	mutex_exit(&fp->f_tlock);
	t->os = fp;
	return (0);
}

void
vmk_fd_commit(struct vmk_fd_ticket *t, struct vmk_object *obj)
{
	file_t *fp = t->os;

	minor_of(fp->f_vnode->v_rdev)->obj = obj;
	membar_producer();
	setf(t->fd, fp);
	f_setfd(t->fd, FD_CLOEXEC);
}

/* ---- eventfd ----------------------------------------------------------- */

/*
 * Nobody is called back when an eventfd is written, so a listener is a thread
 * that reads.  Stopping it writes 1; user space may read that away, so it is
 * written until the thread has gone.
 */
struct vmk_event {
	file_t *fp;
	kmutex_t lock;
	kcondvar_t cv;
	kt_did_t listener;
	boolean_t stop, gone;
	void (*fn)(void *);
	void *arg;
};

int
vmk_event_get(int fd, struct vmk_event **out)
{
	struct vmk_event *ev;
	file_t *fp;

	fp = getf(fd);
	if (fp == NULL)
		return (EBADF);
	if (fp->f_vnode->v_type != VCHR ||
	    getmajor(fp->f_vnode->v_rdev) != kvm_eventfd_major) {
		releasef(fd);
		return (VMK_EINVAL);
	}
	mutex_enter(&fp->f_tlock);
	fp->f_count++;
	mutex_exit(&fp->f_tlock);
	releasef(fd);
	ev = kmem_zalloc(sizeof (*ev), KM_SLEEP);
	mutex_init(&ev->lock, NULL, MUTEX_DEFAULT, NULL);
	cv_init(&ev->cv, NULL, CV_DEFAULT, NULL);
	ev->fp = fp;
	*out = ev;
	return (0);
}

void
vmk_event_put(struct vmk_event *ev)
{
	(void) closef(ev->fp);
	cv_destroy(&ev->cv);
	mutex_destroy(&ev->lock);
	kmem_free(ev, sizeof (*ev));
}

bool
vmk_event_same(const struct vmk_event *a, const struct vmk_event *b)
{
	return (a->fp->f_vnode->v_rdev == b->fp->f_vnode->v_rdev);
}

static int
event_rw(struct vmk_event *ev, uint64_t *value, boolean_t write)
{
	iovec_t iov;
	uio_t uio;

	iov.iov_base = (caddr_t)value;
	iov.iov_len = sizeof (*value);
	bzero(&uio, sizeof (uio));
	uio.uio_iov = &iov;
	uio.uio_iovcnt = 1;
	uio.uio_resid = sizeof (*value);
	uio.uio_segflg = UIO_SYSSPACE;
	uio.uio_fmode = write ? FWRITE | FNONBLOCK : FREAD;
	uio.uio_llimit = MAXOFFSET_T;
	if (write)
		return (VOP_WRITE(ev->fp->f_vnode, &uio, 0, kcred, NULL));
	return (VOP_READ(ev->fp->f_vnode, &uio, 0, kcred, NULL));
}

void
vmk_event_signal(struct vmk_event *ev)
{
	uint64_t one = 1;

	(void) event_rw(ev, &one, B_TRUE);
}

static void
event_listener(void *arg)
{
	struct vmk_event *ev = arg;
	boolean_t stop;
	uint64_t count;
	int error;

	do {
		error = event_rw(ev, &count, B_FALSE);
		mutex_enter(&ev->lock);
		stop = ev->stop;
		mutex_exit(&ev->lock);
		if (error == 0 && !stop)
			ev->fn(ev->arg);
	} while (!stop);
	mutex_enter(&ev->lock);
	ev->gone = B_TRUE;
	cv_broadcast(&ev->cv);
	mutex_exit(&ev->lock);
	thread_exit();
}

int
vmk_event_listen(struct vmk_event *ev, void (*fn)(void *), void *arg)
{
	kthread_t *t;

	ev->fn = fn;
	ev->arg = arg;
	ev->stop = ev->gone = B_FALSE;
	t = thread_create(NULL, 0, event_listener, ev, 0, &p0, TS_RUN,
	    minclsyspri);
	ev->listener = t->t_did;
	return (0);
}

void
vmk_event_unlisten(struct vmk_event *ev)
{
	mutex_enter(&ev->lock);
	ev->stop = B_TRUE;
	while (!ev->gone) {
		mutex_exit(&ev->lock);
		vmk_event_signal(ev);
		mutex_enter(&ev->lock);
		if (!ev->gone)
			(void) cv_reltimedwait(&ev->cv, &ev->lock,
			    drv_usectohz(20000), TR_CLOCK_TICK);
	}
	mutex_exit(&ev->lock);
	/* Its text must not go before it has. */
	thread_join(ev->listener);
}

/* ---- other ------------------------------------------------------------- */

void
vmk_log(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vcmn_err(CE_CONT, fmt, ap);
	va_end(ap);
}

/* ---- the driver -------------------------------------------------------- */

static int
kvm_open(dev_t *devp, int flag, int otyp, cred_t *cr)
{
	struct minor *m;

	_NOTE(ARGUNUSED(flag));
	if (otyp != OTYP_CHR)
		return (EINVAL);
	if (crgetzoneid(cr) != GLOBAL_ZONEID)
		return (EPERM);
	if (getminor(*devp) == 0)
		return (0);
	m = minor_of(*devp);
	return (m != NULL && m->opener == curthread ? 0 : ENXIO);
}

static int
kvm_close(dev_t dev, int flag, int otyp, cred_t *cr)
{
	minor_t n = getminor(dev);
	struct vmk_object *obj;

	_NOTE(ARGUNUSED(flag, otyp, cr));
	if (n == 0)
		return (0);
	obj = minor_of(dev)->obj;
	if (obj != NULL)
		vmk_object_release(obj);
	minor_free(n);
	return (0);
}

static int
kvm_ioctl(dev_t dev, int cmd, intptr_t arg, int mode, cred_t *cr, int *rvalp)
{
	struct vmk_object *obj = NULL;

	_NOTE(ARGUNUSED(cr));
	if ((mode & FKIOCTL) != 0 ||
	    ddi_model_convert_from((uint_t)mode & FMODELS) == DDI_MODEL_ILP32)
		return (ENOTSUP);
	if (getminor(dev) != 0) {
		obj = minor_of(dev)->obj;
		if (obj == NULL)
			return (ENXIO);
	}
	return (vmk_object_ioctl(obj, (uint32_t)cmd, (uint64_t)arg, rvalp));
}

static struct vmk_shared *
shared_of(dev_t dev)
{
	struct vmk_object *obj;

	if (getminor(dev) == 0)
		return (NULL);
	obj = minor_of(dev)->obj;
	return (obj != NULL ? vmk_object_shared(obj) : NULL);
}

static int
kvm_segmap(dev_t dev, off_t off, struct as *as, caddr_t *addrp, off_t len,
    unsigned int prot, unsigned int maxprot, unsigned int flags, cred_t *cr)
{
	struct vmk_shared *s = shared_of(dev);

	if (s == NULL)
		return (ENODEV);
	if ((flags & MAP_TYPE) != MAP_SHARED || (prot & PROT_EXEC) != 0 ||
	    off < 0 || len <= 0 || (size_t)off > ptob(s->npages) ||
	    (size_t)len > ptob(s->npages) - (size_t)off)
		return (EINVAL);
	return (ddi_devmap_segmap(dev, off, (ddi_as_handle_t)as, addrp, len,
	    prot, maxprot & ~PROT_EXEC, flags, cr));
}

static int
kvm_devmap(dev_t dev, devmap_cookie_t dhp, offset_t off, size_t len,
    size_t *maplen, uint_t model)
{
	struct vmk_shared *s = shared_of(dev);
	int error;

	_NOTE(ARGUNUSED(model));
	if (s == NULL)
		return (ENODEV);
	if (off < 0 || (size_t)off > ptob(s->npages) ||
	    len > ptob(s->npages) - (size_t)off)
		return (EINVAL);
	error = devmap_umem_setup(dhp, kvm_dip, NULL, s->os, off, len,
	    PROT_READ | PROT_WRITE | PROT_USER, DEVMAP_DEFAULTS, NULL);
	if (error == 0)
		*maplen = len;
	return (error);
}

static int
kvm_info(dev_info_t *dip, ddi_info_cmd_t cmd, void *arg, void **result)
{
	_NOTE(ARGUNUSED(dip, arg));
	switch (cmd) {
	case DDI_INFO_DEVT2DEVINFO:
		*result = kvm_dip;
		return (kvm_dip != NULL ? DDI_SUCCESS : DDI_FAILURE);
	case DDI_INFO_DEVT2INSTANCE:
		*result = NULL;
		return (DDI_SUCCESS);
	default:
		return (DDI_FAILURE);
	}
}

static void
tunables(dev_info_t *dip)
{
	int n;

	n = ddi_prop_get_int(DDI_DEV_T_ANY, dip, DDI_PROP_DONTPASS,
	    "max-pinned-pages", 0);
	vmk_tunables.max_pinned_pages = n > 0 ? (uint64_t)n :
	    (uint64_t)physmem / 8 * 7;
	n = ddi_prop_get_int(DDI_DEV_T_ANY, dip, DDI_PROP_DONTPASS,
	    "max-vms", 0);
	vmk_tunables.max_vms = n > 0 ? (uint32_t)n : 256;
}

static void
teardown(void)
{
	if (kvm_ids != NULL)
		id_space_destroy(kvm_ids);
	kvm_ids = NULL;
	if (kvm_minors != NULL)
		ddi_soft_state_fini(&kvm_minors);
	avl_destroy(&pages_tree);
	mutex_destroy(&pages_lock);
}

static int
kvm_attach(dev_info_t *dip, ddi_attach_cmd_t cmd)
{
	if (cmd == DDI_RESUME) {
		vmk_module_resume();
		return (DDI_SUCCESS);
	}
	if (cmd != DDI_ATTACH || kvm_dip != NULL)
		return (DDI_FAILURE);
	mutex_init(&pages_lock, NULL, MUTEX_DEFAULT, NULL);
	avl_create(&pages_tree, pages_compare, sizeof (struct pages),
	    offsetof(struct pages, link));
	if (ddi_soft_state_init(&kvm_minors, sizeof (struct minor), 8) != 0) {
		teardown();
		return (DDI_FAILURE);
	}
	kvm_ids = id_space_create("kvm_minors", 1, KVM_MINORS);
	kvm_major = ddi_driver_major(dip);
	kvm_eventfd_major = ddi_name_to_major("eventfd");
	tunables(dip);
	if (vmk_module_init() != 0) {
		cmn_err(CE_NOTE, "!kvm: no usable processor extension");
		teardown();
		return (DDI_FAILURE);
	}
	if (ddi_create_minor_node(dip, "kvm", S_IFCHR, 0, DDI_PSEUDO, 0) !=
	    DDI_SUCCESS) {
		(void) vmk_module_fini();
		teardown();
		return (DDI_FAILURE);
	}
	kvm_dip = dip;
	ddi_report_dev(dip);
	return (DDI_SUCCESS);
}

static int
kvm_detach(dev_info_t *dip, ddi_detach_cmd_t cmd)
{
	if (cmd == DDI_SUSPEND)
		return (DDI_SUCCESS);
	if (cmd != DDI_DETACH || vmk_module_fini() != 0)
		return (DDI_FAILURE);
	ddi_remove_minor_node(dip, NULL);
	kvm_dip = NULL;
	teardown();
	return (DDI_SUCCESS);
}

static struct cb_ops kvm_cb_ops = {
	.cb_open = kvm_open,
	.cb_close = kvm_close,
	.cb_strategy = nodev,
	.cb_print = nodev,
	.cb_dump = nodev,
	.cb_read = nodev,
	.cb_write = nodev,
	.cb_ioctl = kvm_ioctl,
	.cb_devmap = kvm_devmap,
	.cb_mmap = nodev,
	.cb_segmap = kvm_segmap,
	.cb_chpoll = nochpoll,
	.cb_prop_op = ddi_prop_op,
	.cb_flag = D_NEW | D_MP | D_64BIT | D_DEVMAP,
	.cb_rev = CB_REV,
	.cb_aread = nodev,
	.cb_awrite = nodev,
};

static struct dev_ops kvm_dev_ops = {
	.devo_rev = DEVO_REV,
	.devo_getinfo = kvm_info,
	.devo_identify = nulldev,
	.devo_probe = nulldev,
	.devo_attach = kvm_attach,
	.devo_detach = kvm_detach,
	.devo_reset = nodev,
	.devo_cb_ops = &kvm_cb_ops,
	.devo_power = ddi_power,
	.devo_quiesce = ddi_quiesce_not_needed,
};

static struct modldrv kvm_modldrv = {
	&mod_driverops, "virtual machines with Linux's KVM ABI", &kvm_dev_ops
};

static struct modlinkage kvm_modlinkage = {
	MODREV_1, { &kvm_modldrv, NULL }
};

int
_init(void)
{
	return (mod_install(&kvm_modlinkage));
}

int
_fini(void)
{
	return (mod_remove(&kvm_modlinkage));
}

int
_info(struct modinfo *modinfop)
{
	return (mod_info(&kvm_modlinkage, modinfop));
}

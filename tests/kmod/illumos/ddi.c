/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * ddi.c: the functions of kvm_sys.h in a process.  A physical address is the
 * virtual one.  Everything that the glue takes is counted in
 * fake_outstanding; as events wait for their callbacks as the kernel does.
 */
#define	_GNU_SOURCE
#include "kvm_sys.h"
#undef	sigset_t
#include <pthread.h>
#include <stdio.h>

struct dev_ops *fake_driver;
long fake_outstanding, fake_locked;
bool fake_falloc_fails, fake_no_shadow, fake_hma;
int fake_callback_fails;
int fake_preempt, fake_fpu, fake_pokes;
struct as kas;
cred_t fake_cred;
cpu_t fake_cpu0 = { .cpu_next_onln = &fake_cpu0 }, *cpu_active = &fake_cpu0;
int mod_driverops;

static void
hold(long n)
{
	__atomic_add_fetch(&fake_outstanding, n, __ATOMIC_SEQ_CST);
}

/* ---- locks and threads ------------------------------------------------- */

struct fake_mutex { pthread_mutex_t m; };
struct fake_cv { pthread_cond_t c; };

static struct fake_mutex p0_mutex = { PTHREAD_MUTEX_INITIALIZER },
	cpu_mutex = { PTHREAD_MUTEX_INITIALIZER };
kmutex_t cpu_lock = { &cpu_mutex };
static struct as first_as;
proc_t p0 = { .p_lock = { &p0_mutex }, .p_as = &first_as };

void
mutex_init(kmutex_t *m, char *name, int type, void *arg)
{
	(void)name; (void)type; (void)arg;
	m->p = calloc(1, sizeof(*m->p));
	pthread_mutex_init(&m->p->m, NULL);
	hold(1);
}

void
mutex_destroy(kmutex_t *m)
{
	if (pthread_mutex_destroy(&m->p->m) != 0)
		abort();
	free(m->p);
	hold(-1);
}

void
mutex_enter(kmutex_t *m)
{
	pthread_mutex_lock(&m->p->m);
}

void
mutex_exit(kmutex_t *m)
{
	pthread_mutex_unlock(&m->p->m);
}

void
cv_init(kcondvar_t *c, char *name, int type, void *arg)
{
	(void)name; (void)type; (void)arg;
	c->p = calloc(1, sizeof(*c->p));
	pthread_cond_init(&c->p->c, NULL);
	hold(1);
}

void
cv_destroy(kcondvar_t *c)
{
	pthread_cond_destroy(&c->p->c);
	free(c->p);
	hold(-1);
}

void
cv_wait(kcondvar_t *c, kmutex_t *m)
{
	pthread_cond_wait(&c->p->c, &m->p->m);
}

long
cv_reltimedwait(kcondvar_t *c, kmutex_t *m, long us, int res)
{
	struct timespec ts;

	(void)res;
	clock_gettime(CLOCK_REALTIME, &ts);
	ts.tv_nsec += us * 1000;
	ts.tv_sec += ts.tv_nsec / NANOSEC;
	ts.tv_nsec %= NANOSEC;
	return (pthread_cond_timedwait(&c->p->c, &m->p->m, &ts) == 0 ? 1 : -1);
}

int
cv_wait_sig(kcondvar_t *c, kmutex_t *m)
{
	if (!curthread->signalled)
		(void)cv_reltimedwait(c, m, 2000, 0);
	return (!curthread->signalled);
}

void
cv_signal(kcondvar_t *c)
{
	pthread_cond_signal(&c->p->c);
}

void
cv_broadcast(kcondvar_t *c)
{
	pthread_cond_broadcast(&c->p->c);
}

kthread_t *
fake_thread(void)
{
	static _Thread_local kthread_t self;

	if (self.t_procp == NULL)
		self.t_procp = &p0;
	return (&self);
}

struct start { void (*fn)(void *); void *arg; };

static void *
started(void *arg)
{
	struct start s = *(struct start *)arg;

	free(arg);
	s.fn(s.arg);
	return (NULL);
}

kthread_t *
thread_create(void *stk, size_t len, void (*fn)(void *), void *arg, size_t n,
    proc_t *p, int state, int pri)
{
	static kthread_t made;
	struct start *s = malloc(sizeof(*s));
	pthread_t id;

	(void)stk; (void)len; (void)n; (void)p; (void)state; (void)pri;
	s->fn = fn;
	s->arg = arg;
	if (pthread_create(&id, NULL, started, s) != 0)
		abort();
	hold(1);
	made.t_did = (kt_did_t)id;
	return (&made);
}

void
thread_exit(void)
{
	pthread_exit(NULL);
}

void
thread_join(kt_did_t id)
{
	pthread_join((pthread_t)id, NULL);
	hold(-1);
}

void
xc_sync(xc_arg_t a, xc_arg_t b, xc_arg_t c, unsigned long *set,
    int (*fn)(xc_arg_t, xc_arg_t, xc_arg_t))
{
	if (set[0] != 1)
		abort();
	(void)fn(a, b, c);
}

/* ---- memory ------------------------------------------------------------ */

void *
kmem_zalloc(size_t size, int flag)
{
	void *p;

	(void)flag;
	hold((long)size);
	if (size % PAGESIZE != 0)
		return (calloc(1, size));
	p = aligned_alloc(PAGESIZE, size);
	return (memset(p, 0, size));
}

void
kmem_free(void *p, size_t size)
{
	hold(-(long)size);
	free(p);
}

void	*contig_alloc(size_t, ddi_dma_attr_t *, uintptr_t, int);
void	contig_free(void *, size_t);

void *
contig_alloc(size_t size, ddi_dma_attr_t *attr, uintptr_t align, int sleep)
{
	(void)sleep;
	if (attr->dma_attr_sgllen != 1)
		abort();
	hold((long)size);
	return (aligned_alloc(align, size));
}

void
contig_free(void *p, size_t size)
{
	kmem_free(p, size);
}

static avl_node_t *
node_of(avl_tree_t *t, void *o)
{
	return ((avl_node_t *)((char *)o + t->offset));
}

void
avl_create(avl_tree_t *t, int (*compare)(const void *, const void *),
    size_t size, size_t offset)
{
	(void)size;
	t->head = NULL;
	t->compare = compare;
	t->offset = offset;
}

void
avl_destroy(avl_tree_t *t)
{
	if (t->head != NULL)
		abort();
}

void
avl_add(avl_tree_t *t, void *o)
{
	node_of(t, o)->next = t->head;
	t->head = node_of(t, o);
}

void
avl_remove(avl_tree_t *t, void *o)
{
	avl_node_t **p = &t->head;

	while (*p != node_of(t, o))
		p = &(*p)->next;
	*p = (*p)->next;
}

void *
avl_find(avl_tree_t *t, const void *key, void *where)
{
	avl_node_t *n;

	(void)where;
	for (n = t->head; n != NULL; n = n->next)
		if (t->compare(key, (char *)n - t->offset) == 0)
			return ((char *)n - t->offset);
	return (NULL);
}

struct umem { void *va; size_t size; int maps; };

void *
ddi_umem_alloc(size_t size, int flag, ddi_umem_cookie_t *cookie)
{
	(void)flag;
	*cookie = kmem_zalloc(sizeof(**cookie), 0);
	(*cookie)->size = size;
	(*cookie)->va = kmem_zalloc(size, 0);
	return ((*cookie)->va);
}

void
ddi_umem_free(ddi_umem_cookie_t cookie)
{
	if (cookie->maps != 0)
		abort();		/* the snode would not have closed */
	kmem_free(cookie->va, cookie->size);
	kmem_free(cookie, sizeof(*cookie));
}

static uintptr_t user_lo, user_hi;

void
fake_user_memory(void *p, size_t len)
{
	user_lo = (uintptr_t)p;
	user_hi = user_lo + len;
}

static bool
is_user(const void *p, size_t len)
{
	uintptr_t a = (uintptr_t)p;

	return (a >= user_lo && a < user_hi && len <= user_hi - a);
}

/* Arguments of requests come from the test itself, so any address but 0. */
int
copyin(const void *from, void *to, size_t len)
{
	if (from == NULL)
		return (-1);
	memcpy(to, from, len);
	return (0);
}

int
copyout(const void *from, void *to, size_t len)
{
	return (copyin(from, to, len));
}

/* ---- address spaces ---------------------------------------------------- */

struct as_callback {
	struct as_callback *next;
	void (*fn)(struct as *, void *, unsigned int);
	void *arg;
	unsigned int events;
	uintptr_t lo, hi;
	bool called, deleted;
};

static pthread_mutex_t as_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t as_cv = PTHREAD_COND_INITIALIZER;

int
as_pagelock(struct as *as, struct page ***pages, char *addr, size_t len,
    enum seg_rw rw)
{
	size_t i;

	(void)as; (void)rw;
	if (!is_user(addr, len))
		return (EFAULT);
	*pages = NULL;
	if (!fake_no_shadow) {
		*pages = kmem_zalloc(len / PAGESIZE * sizeof(**pages), 0);
		for (i = 0; i < len / PAGESIZE; i++)
			(*pages)[i] = (struct page *)(addr + i * PAGESIZE);
	}
	__atomic_add_fetch(&fake_locked, (long)(len / PAGESIZE),
	    __ATOMIC_SEQ_CST);
	return (0);
}

void
as_pageunlock(struct as *as, struct page **pages, char *addr, size_t len,
    enum seg_rw rw)
{
	(void)as; (void)addr; (void)rw;
	if (pages != NULL)
		kmem_free(pages, len / PAGESIZE * sizeof(*pages));
	__atomic_sub_fetch(&fake_locked, (long)(len / PAGESIZE),
	    __ATOMIC_SEQ_CST);
}

int
as_add_callback(struct as *as, void (*fn)(), void *arg, unsigned int events,
    char *addr, size_t len, int flag)
{
	struct as_callback *c;

	(void)flag;
	if (fake_callback_fails != 0 && --fake_callback_fails == 0)
		return (ENOMEM);
	c = kmem_zalloc(sizeof(*c), 0);
	c->fn = (void (*)(struct as *, void *, unsigned int))fn;
	c->arg = arg;
	c->events = events;
	c->lo = (uintptr_t)addr;
	c->hi = len == (size_t)-1 ? UINTPTR_MAX : c->lo + len;
	pthread_mutex_lock(&as_lock);
	c->next = as->callbacks;
	as->callbacks = c;
	pthread_mutex_unlock(&as_lock);
	return (0);
}

static void
unlink_callback(struct as *as, struct as_callback *c)
{
	struct as_callback **p;

	for (p = &as->callbacks; *p != c; p = &(*p)->next)
		continue;
	*p = c->next;
	kmem_free(c, sizeof(*c));
}

unsigned int
as_delete_callback(struct as *as, void *arg)
{
	struct as_callback *c;
	unsigned int rc = AS_CALLBACK_NOTFOUND;

	pthread_mutex_lock(&as_lock);
	for (c = as->callbacks; c != NULL && c->arg != arg; c = c->next)
		continue;
	if (c != NULL && c->called) {
		c->deleted = true;
		pthread_cond_broadcast(&as_cv);
		rc = AS_CALLBACK_DELETE_DEFERRED;
	} else if (c != NULL) {
		unlink_callback(as, c);
		rc = AS_CALLBACK_DELETED;
	}
	pthread_mutex_unlock(&as_lock);
	return (rc);
}

void
fake_as_event(struct as *as, unsigned int event, void *addr, size_t len)
{
	uintptr_t lo = (uintptr_t)addr, hi = lo + len;
	struct as_callback *c;

	pthread_mutex_lock(&as_lock);
	for (;;) {
		for (c = as->callbacks; c != NULL; c = c->next)
			if (!c->called && (c->events & event) != 0 &&
			    (event == AS_FREE_EVENT ||
			    (lo < c->hi && hi > c->lo)))
				break;
		if (c == NULL)
			break;
		c->called = true;
		pthread_mutex_unlock(&as_lock);
		c->fn(as, c->arg, event);
		pthread_mutex_lock(&as_lock);
		while (!c->deleted)
			pthread_cond_wait(&as_cv, &as_lock);
		unlink_callback(as, c);
	}
	pthread_mutex_unlock(&as_lock);
}

pfn_t
hat_getpfnum(void *hat, void *va)
{
	(void)hat;
	return ((uintptr_t)va / PAGESIZE);
}

void *
hat_kpm_pfn2va(pfn_t pfn)
{
	return ((void *)(pfn * PAGESIZE));
}

pfn_t
page_pptonum(struct page *p)
{
	return ((uintptr_t)p / PAGESIZE);
}

/* The last page of user memory is a device's. */
struct page *
page_numtopp_nolock(pfn_t pfn)
{
	return (pfn == user_hi / PAGESIZE - 1 ? NULL : (struct page *)1);
}

/* ---- HMA, time --------------------------------------------------------- */

hma_reg_t *
hma_register(const char *name)
{
	(void)name;
	if (!fake_hma)
		return (NULL);
	hold(1);
	return ((hma_reg_t *)&fake_hma);
}

void
hma_unregister(hma_reg_t *r)
{
	if (r != (hma_reg_t *)&fake_hma)
		abort();
	hold(-1);
}

uint8_t
hma_svm_asid_update(hma_svm_asid_t *a, boolean_t by_asid, boolean_t flush)
{
	a->hsa_asid++;
	return (flush ? (by_asid ? 3 : 1) : 0);
}

uint16_t
hma_vmx_vpid_alloc(void)
{
	return (5);
}

void
hma_vmx_vpid_free(uint16_t v)
{
	(void)v;
}

int fake_smt = 1;

void
smt_mark_as_vcpu(void)
{
	curthread->t_schedflag |= TS_VCPU;
}

/* As its assertions have it. */
int
smt_acquire(void)
{
	if ((curthread->t_schedflag & TS_VCPU) == 0 || fake_preempt < 1)
		abort();
	return (fake_smt);
}

void
smt_release(void)
{
}

#define	NCYCLIC	64
static struct { cyc_handler_t h; hrtime_t when; bool used; } cyclics[NCYCLIC];

cyclic_id_t
cyclic_add(cyc_handler_t *h, cyc_time_t *t)
{
	cyclic_id_t i;

	for (i = 1; cyclics[i].used; i++)
		continue;
	cyclics[i].h = *h;
	cyclics[i].when = t->cyt_when;
	cyclics[i].used = true;
	hold(1);
	return (i);
}

void
cyclic_remove(cyclic_id_t i)
{
	cyclics[i].used = false;
	hold(-1);
}

int
cyclic_reprogram(cyclic_id_t i, hrtime_t when)
{
	cyclics[i].when = when;
	return (1);
}

void
fake_fire(void)
{
	hrtime_t now = gethrtime();
	int i;

	for (i = 0; i < NCYCLIC; i++) {
		if (!cyclics[i].used || cyclics[i].when > now)
			continue;
		cyclics[i].when = CY_INFINITY;
		cyclics[i].h.cyh_func(cyclics[i].h.cyh_arg);
	}
}

hrtime_t
gethrtime(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (ts.tv_sec * NANOSEC + ts.tv_nsec);
}

/* ---- vnodes and files -------------------------------------------------- */

#define	NFILES	256
static file_t *files[NFILES];
static bool reserved[NFILES];
static struct { pthread_mutex_t m; pthread_cond_t c; uint64_t n; } efd = {
	PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0 };

vnode_t *
makespecvp(dev_t dev, int type)
{
	vnode_t *vp = kmem_zalloc(sizeof(*vp), 0);

	vp->v_type = type;
	vp->v_rdev = dev;
	vp->refs = 1;
	return (vp);
}

void
VN_RELE(vnode_t *vp)
{
	if (--vp->refs == 0)
		kmem_free(vp, sizeof(*vp));
}

int
VOP_OPEN(vnode_t **vpp, int flag, cred_t *cr, void *ct)
{
	(void)ct;
	return (fake_driver->devo_cb_ops->cb_open(&(*vpp)->v_rdev, flag,
	    OTYP_CHR, cr));
}

int
VOP_CLOSE(vnode_t *vp, int flag, int count, int64_t off, cred_t *cr, void *ct)
{
	(void)off; (void)ct;
	if (count != 1 || getmajor(vp->v_rdev) != 42)
		return (0);
	return (fake_driver->devo_cb_ops->cb_close(vp->v_rdev, flag, OTYP_CHR,
	    cr));
}

int
VOP_READ(vnode_t *vp, uio_t *uio, int flag, cred_t *cr, void *ct)
{
	(void)vp; (void)flag; (void)cr; (void)ct;
	if ((uio->uio_fmode & FNONBLOCK) != 0)
		abort();
	pthread_mutex_lock(&efd.m);
	while (efd.n == 0)
		pthread_cond_wait(&efd.c, &efd.m);
	*(uint64_t *)(void *)uio->uio_iov->iov_base = efd.n;
	efd.n = 0;
	pthread_mutex_unlock(&efd.m);
	return (0);
}

int
VOP_WRITE(vnode_t *vp, uio_t *uio, int flag, cred_t *cr, void *ct)
{
	(void)vp; (void)flag; (void)cr; (void)ct;
	pthread_mutex_lock(&efd.m);
	efd.n += *(uint64_t *)(void *)uio->uio_iov->iov_base;
	pthread_cond_broadcast(&efd.c);
	pthread_mutex_unlock(&efd.m);
	return (0);
}

/* A descriptor is reserved and the file locked, as in the kernel. */
int
falloc(vnode_t *vp, int flag, file_t **fpp, int *fdp)
{
	file_t *fp;
	int fd;

	(void)flag;
	if (fake_falloc_fails)
		return (EMFILE);
	for (fd = 3; reserved[fd]; fd++)
		continue;
	reserved[fd] = true;
	fp = kmem_zalloc(sizeof(*fp), 0);
	mutex_init(&fp->f_tlock, NULL, MUTEX_DEFAULT, NULL);
	fp->f_vnode = vp;
	fp->f_count = 1;
	mutex_enter(&fp->f_tlock);
	*fpp = fp;
	*fdp = fd;
	return (0);
}

static void
free_file(file_t *fp)
{
	mutex_destroy(&fp->f_tlock);
	kmem_free(fp, sizeof(*fp));
}

void
setf(int fd, file_t *fp)
{
	files[fd] = fp;
	if (fp == NULL)
		reserved[fd] = false;
}

void
f_setfd(int fd, char flags)
{
	files[fd]->flags = flags;
}

file_t *
getf(int fd)
{
	return (fd < 0 || fd >= NFILES ? NULL : files[fd]);
}

void
releasef(int fd)
{
	(void)fd;
}

int
closef(file_t *fp)
{
	vnode_t *vp = fp->f_vnode;

	if (--fp->f_count > 0)
		return (0);
	free_file(fp);
	(void)VOP_CLOSE(vp, FREAD | FWRITE, 1, 0, &fake_cred, NULL);
	VN_RELE(vp);
	return (0);
}

int
fake_open(void)
{
	vnode_t *vp = makespecvp(makedevice(42, 0), VCHR);
	file_t *fp;
	int fd, error;

	error = VOP_OPEN(&vp, FREAD | FWRITE, &fake_cred, NULL);
	if (error != 0) {
		VN_RELE(vp);
		return (-error);
	}
	(void)falloc(vp, FREAD | FWRITE, &fp, &fd);
	mutex_exit(&fp->f_tlock);
	setf(fd, fp);
	return (fd);
}

int
fake_eventfd(void)
{
	vnode_t *vp = makespecvp(makedevice(77, 1), VCHR);
	file_t *fp;
	int fd;

	(void)falloc(vp, FREAD | FWRITE, &fp, &fd);
	mutex_exit(&fp->f_tlock);
	setf(fd, fp);
	return (fd);
}

uint64_t
fake_eventfd_count(int fd)
{
	(void)fd;
	return (__atomic_load_n(&efd.n, __ATOMIC_SEQ_CST));
}

int
fake_ioctl(int fd, unsigned int request, void *arg)
{
	int result = 0, error;

	error = fake_driver->devo_cb_ops->cb_ioctl(files[fd]->f_vnode->v_rdev,
	    (int)request, (intptr_t)arg, FREAD | FWRITE, &fake_cred, &result);
	return (error != 0 ? -error : result);
}

int
fake_close(int fd)
{
	file_t *fp = files[fd];

	setf(fd, NULL);
	return (closef(fp));
}

static struct devmap mapped[NFILES];

int
ddi_devmap_segmap(dev_t dev, off_t off, ddi_as_handle_t as, caddr_t *addr,
    off_t len, unsigned int prot, unsigned int maxprot, unsigned int flags,
    cred_t *cr)
{
	struct devmap map = { 0 };
	size_t got = 0;
	int error;

	(void)as; (void)flags; (void)cr;
	if ((prot & ~maxprot) != 0 || (maxprot & PROT_EXEC) != 0)
		return (EACCES);
	error = fake_driver->devo_cb_ops->cb_devmap(dev, &map, off,
	    (size_t)len, &got, 0);
	if (error != 0 || got != (size_t)len)
		return (error != 0 ? error : EINVAL);
	*addr = (char *)map.cookie->va + off;
	map.cookie->maps++;
	mapped[getminor(dev) % NFILES] = map;
	return (0);
}

int
devmap_umem_setup(devmap_cookie_t map, dev_info_t *dip, void *ops,
    ddi_umem_cookie_t cookie, offset_t off, size_t len, unsigned int maxprot,
    unsigned int flags, void *attr)
{
	(void)dip; (void)ops; (void)maxprot; (void)flags; (void)attr;
	if (off < 0 || len > cookie->size - (size_t)off)
		return (EINVAL);
	map->cookie = cookie;
	map->len = len;
	return (0);
}

/* A mapping holds the file, as a segment holds the snode. */
int
fake_mmap(int fd, size_t len, unsigned int prot, unsigned int flags, void **va)
{
	file_t *fp = files[fd];
	caddr_t addr = NULL;
	int error;

	error = fake_driver->devo_cb_ops->cb_segmap(fp->f_vnode->v_rdev, 0,
	    curproc->p_as, &addr, (off_t)len, prot,
	    PROT_READ | PROT_WRITE | PROT_EXEC, flags, &fake_cred);
	*va = addr;
	return (error);
}

void
fake_munmap(int fd)
{
	struct devmap *m =
	    &mapped[getminor(files[fd]->f_vnode->v_rdev) % NFILES];

	m->cookie->maps--;
}

/* ---- drivers ----------------------------------------------------------- */

struct soft { size_t size; void *item[NFILES]; };

int
ddi_soft_state_init(void **state, size_t size, size_t n)
{
	struct soft *s = kmem_zalloc(sizeof(*s), 0);

	(void)n;
	s->size = size;
	*state = s;
	return (0);
}

void
ddi_soft_state_fini(void **state)
{
	struct soft *s = *state;
	int i;

	for (i = 0; i < NFILES; i++)
		if (s->item[i] != NULL)
			abort();
	kmem_free(s, sizeof(*s));
	*state = NULL;
}

int
ddi_soft_state_zalloc(void *state, int i)
{
	struct soft *s = state;

	if (s->item[i] != NULL)
		return (DDI_FAILURE);
	s->item[i] = kmem_zalloc(s->size, 0);
	return (DDI_SUCCESS);
}

void
ddi_soft_state_free(void *state, int i)
{
	struct soft *s = state;

	kmem_free(s->item[i], s->size);
	s->item[i] = NULL;
}

void *
ddi_get_soft_state(void *state, int i)
{
	return (i < 0 || i >= NFILES ? NULL : ((struct soft *)state)->item[i]);
}

struct id_space { id_t lo; bool used[NFILES]; };

id_space_t *
id_space_create(const char *name, id_t lo, id_t hi)
{
	id_space_t *s = kmem_zalloc(sizeof(*s), 0);

	(void)name; (void)hi;
	s->lo = lo;
	return (s);
}

void
id_space_destroy(id_space_t *s)
{
	kmem_free(s, sizeof(*s));
}

id_t
id_alloc_nosleep(id_space_t *s)
{
	id_t i;

	for (i = s->lo; i < NFILES; i++) {
		if (!s->used[i]) {
			s->used[i] = true;
			return (i);
		}
	}
	return (-1);
}

void
id_free(id_space_t *s, id_t i)
{
	s->used[i] = false;
}

int
ddi_create_minor_node(dev_info_t *dip, char *name, int type, minor_t minor,
    char *kind, int flag)
{
	(void)name; (void)kind; (void)flag;
	if (type != S_IFCHR || minor != 0)
		return (DDI_FAILURE);
	dip->nodes++;
	return (DDI_SUCCESS);
}

void
ddi_remove_minor_node(dev_info_t *dip, char *name)
{
	(void)name;
	dip->nodes--;
}

int
ddi_prop_get_int(dev_t dev, dev_info_t *dip, unsigned int flags, char *name,
    int none)
{
	(void)dev; (void)flags; (void)name;
	dip->nprops++;
	return (none);
}

void
cmn_err(int level, const char *fmt, ...)
{
	(void)level; (void)fmt;
}

void
vcmn_err(int level, const char *fmt, va_list ap)
{
	(void)level; (void)fmt; (void)ap;
}

int
mod_install(struct modlinkage *l)
{
	fake_driver = ((struct modldrv *)l->linkage[0])->dev_ops;
	return (0);
}

int
mod_remove(struct modlinkage *l)
{
	(void)l;
	fake_driver = NULL;
	return (0);
}

int
mod_info(struct modlinkage *l, struct modinfo *i)
{
	(void)l; (void)i;
	return (1);
}

#define	NOTHING(name)	int name() { return (-1); }
NOTHING(nodev) NOTHING(nulldev) NOTHING(nochpoll) NOTHING(ddi_prop_op)
NOTHING(ddi_power) NOTHING(ddi_quiesce_not_needed)

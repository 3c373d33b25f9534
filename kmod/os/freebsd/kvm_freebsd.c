/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * kvm_freebsd.c: vmk_os.h on FreeBSD 13.2 to 15, amd64.
 *
 * Theory.
 *
 * Descriptors.  Machines and vCPUs are files of their own type (fileops
 * below).  falloc() puts a file into the table that answers EBADF to
 * everything until finit(), which is the commit of vmk_fd_commit().  fileops
 * hold no reference to the module, so unloading asks the core first, which
 * refuses while an object exists.
 *
 * Requests.  Native programs use one ioctl that carries Linux's number
 * (kvm_bsd.h); kvm_linux.ko passes the Linuxulator's through.
 *
 * Guest memory.  Pages are wired one by one (vm_fault_quick_hold_pages), not
 * map entries: a wired entry would make munmap and exit wait for us.  A wired
 * page is neither freed nor paged out, whatever becomes of the mapping.  When
 * the process exits or executes another program its machines lose all pins.
 *
 * Sleeping in HLT.  The waker may hold spin locks, so the sleep queue is used
 * directly; a generation counter closes the gap between the look at the
 * condition and the sleep, because the condition cannot be looked at with the
 * sleep queue's lock held (the waker takes them in the other order).
 *
 * Who else.  vmm.ko and this module both own the processors' extensions.
 * Each declares the other's name as a version of its own, so the linker
 * refuses the second.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/bus.h>
#include <sys/callout.h>
#include <sys/capsicum.h>
#include <sys/conf.h>
#include <sys/eventfd.h>
#include <sys/eventhandler.h>
#include <sys/fcntl.h>
#include <sys/file.h>
#include <sys/filedesc.h>
#include <sys/filio.h>
#include <sys/imgact.h>
#include <sys/kernel.h>
#include <sys/kthread.h>
#include <sys/lock.h>
#include <sys/malloc.h>
#include <sys/mman.h>
#include <sys/module.h>
#include <sys/mutex.h>
#include <sys/proc.h>
#include <sys/queue.h>
#include <sys/rwlock.h>
#include <sys/signalvar.h>
#include <sys/sleepqueue.h>
#include <sys/smp.h>
#include <sys/stat.h>
#include <sys/sx.h>
#include <sys/syscallsubr.h>
#include <sys/sysctl.h>
#include <sys/sysent.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/vmmeter.h>
#include <sys/vnode.h>

#include <vm/vm.h>
#include <vm/vm_param.h>
#include <vm/pmap.h>
#include <vm/vm_extern.h>
#include <vm/vm_map.h>
#include <vm/vm_object.h>
#include <vm/vm_page.h>
#include <vm/vm_pager.h>

#include <machine/clock.h>
#include <machine/fpu.h>
#include <machine/pcb.h>
#include <machine/smp.h>
#if __FreeBSD_version >= 1500000
#include <sys/stdarg.h>
#else
#include <machine/stdarg.h>
#endif
#include <machine/vmparam.h>

#define	VMK_HOST_TYPES
#include "vmk_os.h"
#include "kvm_bsd.h"
#include "kvm_freebsd.h"

#define	FITS(inner, outer)						\
	_Static_assert(sizeof(inner) <= sizeof(struct outer), #outer)

static MALLOC_DEFINE(M_VMK, "kvm", "KVM machines");

static SYSCTL_NODE(_hw, OID_AUTO, kvm, CTLFLAG_RW | CTLFLAG_MPSAFE, NULL,
    "Kernel virtual machines");

struct vmk_tunables vmk_tunables;

SYSCTL_U64(_hw_kvm, OID_AUTO, max_pinned_pages, CTLFLAG_RDTUN,
    &vmk_tunables.max_pinned_pages, 0,
    "Most pages that all machines together may take");
SYSCTL_U32(_hw_kvm, OID_AUTO, max_vms, CTLFLAG_RDTUN,
    &vmk_tunables.max_vms, 0, "Most machines at a time");

static int
sysctl_pinned(SYSCTL_HANDLER_ARGS)
{
	uint64_t n = vmk_mem_charged();

	return (sysctl_handle_64(oidp, &n, 0, req));
}
SYSCTL_PROC(_hw_kvm, OID_AUTO, pinned_pages,
    CTLTYPE_U64 | CTLFLAG_RD | CTLFLAG_MPSAFE, NULL, 0, sysctl_pinned, "QU",
    "Pages charged to machines now");

/* ---- memory ------------------------------------------------------------ */

void *
vmk_alloc(size_t size)
{
	return (malloc(size, M_VMK, M_WAITOK | M_ZERO));
}

void
vmk_free(void *p, size_t size __unused)
{
	free(p, M_VMK);
}

/* Pages are known by their address in the direct map. */
void *
vmk_pages_alloc(unsigned int npages, uint64_t *pa)
{
	vm_page_t m;
	int try;

	for (try = 0; try < 2; try++) {
		if (npages == 1)
			m = vm_page_alloc_noobj(VM_ALLOC_WAITOK |
			    VM_ALLOC_WIRED | VM_ALLOC_ZERO);
		else
			m = vm_page_alloc_noobj_contig(VM_ALLOC_WIRED |
			    VM_ALLOC_ZERO, npages, 0, ~(vm_paddr_t)0,
			    npages * PAGE_SIZE, 0, VM_MEMATTR_DEFAULT);
		if (m != NULL) {
			*pa = VM_PAGE_TO_PHYS(m);
			return ((void *)PHYS_TO_DMAP(*pa));
		}
		(void)vm_page_reclaim_contig(0, npages, 0, ~(vm_paddr_t)0,
		    npages * PAGE_SIZE, 0);
	}
	return (NULL);
}

void
vmk_pages_free(void *va, unsigned int npages)
{
	vm_page_t m = PHYS_TO_VM_PAGE(DMAP_TO_PHYS((vm_offset_t)va));
	unsigned int i;

	for (i = 0; i < npages; i++) {
		vm_page_unwire_noq(&m[i]);
		vm_page_free(&m[i]);
	}
}

void *
vmk_phys_to_virt(uint64_t pa)
{
	return ((void *)PHYS_TO_DMAP(pa));
}

/* Wired pages of an object that any number of processes may map. */
struct shared {
	vm_object_t	object;
	vm_page_t	page[];
};

int
vmk_shared_alloc(struct vmk_shared *s, unsigned int npages)
{
	struct shared *o;
	vm_offset_t kva;
	unsigned int i;

	kva = kva_alloc(ptoa(npages));
	if (kva == 0)
		return (VMK_ENOMEM);
	o = malloc(sizeof(*o) + npages * sizeof(o->page[0]), M_VMK,
	    M_WAITOK | M_ZERO);
	o->object = vm_pager_allocate(OBJT_PHYS, NULL, ptoa(npages),
	    VM_PROT_READ | VM_PROT_WRITE, 0, curthread->td_ucred);
	VM_OBJECT_WLOCK(o->object);
	for (i = 0; i < npages; i++) {
		o->page[i] = vm_page_grab(o->object, i,
		    VM_ALLOC_ZERO | VM_ALLOC_WIRED);
		vm_page_valid(o->page[i]);
		vm_page_xunbusy(o->page[i]);
	}
	VM_OBJECT_WUNLOCK(o->object);
	pmap_qenter(kva, o->page, npages);
	s->va = (uint8_t *)kva;
	s->npages = npages;
	s->os = o;
	return (0);
}

void
vmk_shared_free(struct vmk_shared *s)
{
	struct shared *o = s->os;
	unsigned int i;

	pmap_qremove((vm_offset_t)s->va, s->npages);
	kva_free((vm_offset_t)s->va, ptoa(s->npages));
	VM_OBJECT_WLOCK(o->object);
	for (i = 0; i < s->npages; i++)
		vm_page_unwire_noq(o->page[i]);
	VM_OBJECT_WUNLOCK(o->object);
	/* The last user mapping frees the pages. */
	vm_object_deallocate(o->object);
	free(o, M_VMK);
	s->va = NULL;
}

int
vmk_copyin(uint64_t uaddr, void *dst, size_t len)
{
	return (copyin((const void *)uaddr, dst, len) == 0 ? 0 : VMK_EFAULT);
}

int
vmk_copyout(const void *src, uint64_t uaddr, size_t len)
{
	return (copyout(src, (void *)uaddr, len) == 0 ? 0 : VMK_EFAULT);
}

/* ---- user memory ------------------------------------------------------- */

/*
 * proc and vmspace are compared, never followed; dead says that they may have
 * been freed or given to another program.
 */
struct vmk_mm {
	LIST_ENTRY(vmk_mm) link;
	struct proc	*proc;
	struct vmspace	*vmspace;
	volatile int	 dead;
	vmk_unmap_fn	*unmap;
	void		*arg;
};

static LIST_HEAD(, vmk_mm) mm_list = LIST_HEAD_INITIALIZER(mm_list);
static struct sx mm_lock;
SX_SYSINIT(vmk_mm_lock, &mm_lock, "kvm address spaces");

struct vmk_mm *
vmk_mm_attach(vmk_unmap_fn *unmap, void *arg)
{
	struct vmk_mm *mm;

	mm = malloc(sizeof(*mm), M_VMK, M_WAITOK | M_ZERO);
	mm->proc = curproc;
	mm->vmspace = curproc->p_vmspace;
	mm->unmap = unmap;
	mm->arg = arg;
	sx_xlock(&mm_lock);
	LIST_INSERT_HEAD(&mm_list, mm, link);
	sx_xunlock(&mm_lock);
	return (mm);
}

void
vmk_mm_detach(struct vmk_mm *mm)
{
	sx_xlock(&mm_lock);
	LIST_REMOVE(mm, link);
	sx_xunlock(&mm_lock);
	free(mm, M_VMK);
}

bool
vmk_mm_is_current(const struct vmk_mm *mm)
{
	return (curproc->p_vmspace == mm->vmspace && mm->dead == 0);
}

static void
mm_gone(struct proc *p)
{
	struct vmk_mm *mm;

	sx_slock(&mm_lock);
	LIST_FOREACH(mm, &mm_list, link) {
		if (mm->proc != p || mm->dead != 0)
			continue;
		atomic_store_rel_int(&mm->dead, 1);
		mm->unmap(mm->arg, 0, ~0UL);
	}
	sx_sunlock(&mm_lock);
}

static void
mm_exit(void *arg __unused, struct proc *p)
{
	mm_gone(p);
}

static void
mm_exec(void *arg __unused, struct proc *p, struct image_params *imgp __unused)
{
	mm_gone(p);
}

static void
unwire(vm_page_t m, bool write)
{
	/* It may have been invalidated meanwhile; then it dies with us. */
	if (write && vm_page_all_valid(m))
		vm_page_dirty(m);
	vm_page_unwire(m, PQ_ACTIVE);
}

int
vmk_pin(struct vmk_mm *mm, uint64_t hva, unsigned int npages, bool write,
    uint64_t *pa, void **cookie)
{
	vm_prot_t prot = write ? VM_PROT_READ | VM_PROT_WRITE : VM_PROT_READ;
	vm_page_t *ma;
	unsigned int i;
	int error = 0;

	*cookie = NULL;
	if (!vmk_mm_is_current(mm))
		return (VMK_EFAULT);
	ma = malloc(npages * sizeof(ma[0]), M_VMK, M_WAITOK);
	if (vm_fault_quick_hold_pages(&mm->vmspace->vm_map, hva, ptoa(npages),
	    prot, ma, npages) != (int)npages) {
		free(ma, M_VMK);
		return (VMK_EFAULT);
	}
	for (i = 0; i < npages; i++) {
		/* Device memory and other pages that VM does not manage. */
		if ((ma[i]->flags & PG_FICTITIOUS) != 0 ||
		    (ma[i]->oflags & VPO_UNMANAGED) != 0)
			error = VMK_EFAULT;
		pa[i] = VM_PAGE_TO_PHYS(ma[i]);
	}
	for (i = 0; error != 0 && i < npages; i++)
		vm_page_unwire(ma[i], PQ_ACTIVE);
	free(ma, M_VMK);
	return (error);
}

void
vmk_unpin(struct vmk_mm *mm __unused, void *cookie __unused,
    uint64_t hva __unused, unsigned int npages, bool write, const uint64_t *pa)
{
	unsigned int i;

	for (i = 0; i < npages; i++)
		unwire(PHYS_TO_VM_PAGE(pa[i]), write);
}

/* ---- locks ------------------------------------------------------------- */

FITS(struct sx, vmk_mutex);
FITS(struct mtx, vmk_spin);

void
vmk_mutex_init(struct vmk_mutex *m, const char *name)
{
	sx_init((struct sx *)m, name);
}

void
vmk_mutex_fini(struct vmk_mutex *m)
{
	sx_destroy((struct sx *)m);
}

void
vmk_mutex_enter(struct vmk_mutex *m)
{
	sx_xlock((struct sx *)m);
}

int
vmk_mutex_enter_sig(struct vmk_mutex *m)
{
	return (sx_xlock_sig((struct sx *)m) == 0 ? 0 : VMK_EINTR);
}

void
vmk_mutex_exit(struct vmk_mutex *m)
{
	sx_xunlock((struct sx *)m);
}

void
vmk_spin_init(struct vmk_spin *s, const char *name)
{
	mtx_init((struct mtx *)s, name, NULL, MTX_SPIN | MTX_NOWITNESS);
}

void
vmk_spin_fini(struct vmk_spin *s)
{
	mtx_destroy((struct mtx *)s);
}

uint64_t
vmk_spin_enter(struct vmk_spin *s)
{
	mtx_lock_spin((struct mtx *)s);
	return (0);
}

void
vmk_spin_exit(struct vmk_spin *s, uint64_t saved __unused)
{
	mtx_unlock_spin((struct mtx *)s);
}

struct waitq {
	u_int	gen;
};
FITS(struct waitq, vmk_waitq);

void
vmk_waitq_init(struct vmk_waitq *w, const char *name __unused)
{
	((struct waitq *)w)->gen = 0;
}

void
vmk_waitq_fini(struct vmk_waitq *w __unused)
{
}

int
vmk_wait_sig(struct vmk_waitq *vw, bool (*cond)(void *), void *arg)
{
	struct waitq *w = (struct waitq *)vw;
	u_int gen;

	for (;;) {
		gen = atomic_load_acq_int(&w->gen);
		if (cond(arg))
			return (0);
		sleepq_lock(w);
		if (atomic_load_acq_int(&w->gen) != gen) {
			sleepq_release(w);
			continue;
		}
		sleepq_add(w, NULL, "kvmhlt",
		    SLEEPQ_SLEEP | SLEEPQ_INTERRUPTIBLE, 0);
		if (sleepq_wait_sig(w, 0) != 0)
			return (VMK_EINTR);
	}
}

void
vmk_wake(struct vmk_waitq *vw)
{
	struct waitq *w = (struct waitq *)vw;

	atomic_add_rel_int(&w->gen, 1);
	wakeup(w);
}

/* ---- processors -------------------------------------------------------- */

void
vmk_cpu_enter(void)
{
	fpu_kern_enter(curthread, NULL, FPU_KERN_NOCTX);
}

void
vmk_cpu_exit(void)
{
	fpu_kern_leave(curthread, NULL);
}

unsigned int
vmk_cpu_id(void)
{
	return (curcpu);
}

unsigned int
vmk_ncpus(void)
{
	return (mp_maxid + 1);
}

void
vmk_cpu_kick(unsigned int cpu)
{
	ipi_cpu(cpu, IPI_AST);
}

void
vmk_cpu_each(void (*fn)(void *), void *arg)
{
	smp_rendezvous(smp_no_rendezvous_barrier, fn,
	    smp_no_rendezvous_barrier, arg);
}

/*
 * What a thread owes the kernel.  The scheduler's wish can be met here; the
 * rest only on the way back to user mode, whose ast() takes the flags away.
 */
#ifdef TDAI
static bool
owes_yield(const struct thread *td)
{
	return (td->td_owepreempt != 0 ||
	    (td->td_ast & TDAI(TDA_SCHED)) != 0);
}

static bool
owes_ast(const struct thread *td)
{
	return ((td->td_ast & ~TDAI(TDA_SCHED)) != 0);
}
#else
#define	AST_FLAGS	(TDF_NEEDSIGCHK | TDF_NEEDSUSPCHK | TDF_ALRMPEND | \
			    TDF_PROFPEND | TDF_MACPEND | TDF_KQTICKLED)

static bool
owes_yield(const struct thread *td)
{
	return (td->td_owepreempt != 0 ||
	    (td->td_flags & TDF_NEEDRESCHED) != 0);
}

static bool
owes_ast(const struct thread *td)
{
	return ((td->td_flags & AST_FLAGS) != 0);
}
#endif

bool
vmk_must_leave(void)
{
	return (owes_yield(curthread) || owes_ast(curthread));
}

int
vmk_yield(void)
{
	if (owes_yield(curthread))
		kern_yield(PRI_USER);
	return (owes_ast(curthread) ? VMK_EINTR : 0);
}

/* No multiplexor; vmm.ko is kept out instead. */
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

FITS(sigset_t, vmk_sigset);

static kvm_sigset_fn *sigset_from_linux;

void
kvm_sigset_hook(kvm_sigset_fn *fn)
{
	atomic_store_rel_ptr((volatile uintptr_t *)&sigset_from_linux,
	    (uintptr_t)fn);
}

bool
vmk_sigset_ok(uint32_t len)
{
	if (SV_CURPROC_ABI() == SV_ABI_LINUX)
		return (len == 8 && sigset_from_linux != NULL);
	return (len == sizeof(sigset_t));
}

void
vmk_sigmask_swap(const struct vmk_sigset *set, struct vmk_sigset *old)
{
	kvm_sigset_fn *from_linux = sigset_from_linux;
	sigset_t new, saved;

	if (SV_CURPROC_ABI() == SV_ABI_LINUX && from_linux != NULL)
		from_linux(set->bytes, &new);
	else
		memcpy(&new, set->bytes, sizeof(new));
	kern_sigprocmask(curthread, SIG_SETMASK, &new, &saved, 0);
	memcpy(old->bytes, &saved, sizeof(saved));
}

void
vmk_sigmask_restore(const struct vmk_sigset *old)
{
	sigset_t saved;

	memcpy(&saved, old->bytes, sizeof(saved));
	kern_sigprocmask(curthread, SIG_SETMASK, &saved, NULL, 0);
}

/* ---- time -------------------------------------------------------------- */

uint64_t
vmk_time_ns(void)
{
	return ((uint64_t)sbttons(sbinuptime()));
}

uint32_t
vmk_tsc_khz(void)
{
	return ((uint32_t)(tsc_freq / 1000));
}

struct timer {
	struct callout	 callout;
	void		(*fn)(void *);
	void		*arg;
};
FITS(struct timer, vmk_timer);

void
vmk_timer_init(struct vmk_timer *vt, void (*fn)(void *), void *arg)
{
	struct timer *t = (struct timer *)vt;

	callout_init(&t->callout, 1);
	t->fn = fn;
	t->arg = arg;
}

void
vmk_timer_fini(struct vmk_timer *vt)
{
	callout_drain(&((struct timer *)vt)->callout);
}

void
vmk_timer_arm(struct vmk_timer *vt, uint64_t deadline_ns)
{
	struct timer *t = (struct timer *)vt;

	/* Beyond 36 years the binary fraction would overflow. */
	deadline_ns = MIN(deadline_ns, 1UL << 60);
	callout_reset_sbt(&t->callout, nstosbt(deadline_ns), 0, t->fn, t->arg,
	    C_ABSOLUTE | C_DIRECT_EXEC);
}

void
vmk_timer_cancel(struct vmk_timer *vt)
{
	callout_stop(&((struct timer *)vt)->callout);
}

/* ---- descriptors ------------------------------------------------------- */

static struct cdev *kvm_cdev;
/* Shared: a request of /dev/kvm; exclusive: the module goes. */
static struct sx load_lock;
SX_SYSINIT(vmk_load_lock, &load_lock, "kvm module");
static bool loaded;

static fo_ioctl_t	kvm_fo_ioctl;
static fo_stat_t	kvm_fo_stat;
static fo_close_t	kvm_fo_close;
static fo_fill_kinfo_t	kvm_fo_fill_kinfo;
static fo_mmap_t	kvm_fo_mmap;

static struct fileops kvm_fileops = {
	.fo_read = invfo_rdwr,
	.fo_write = invfo_rdwr,
	.fo_truncate = invfo_truncate,
	.fo_ioctl = kvm_fo_ioctl,
	.fo_poll = invfo_poll,
	.fo_kqfilter = invfo_kqfilter,
	.fo_stat = kvm_fo_stat,
	.fo_close = kvm_fo_close,
	.fo_chmod = invfo_chmod,
	.fo_chown = invfo_chown,
	.fo_sendfile = invfo_sendfile,
	.fo_fill_kinfo = kvm_fo_fill_kinfo,
	.fo_mmap = kvm_fo_mmap,
	.fo_flags = DFLAG_PASSABLE,
};

static int
dispatch(struct vmk_object *obj, uint32_t request, uint64_t arg,
    struct thread *td)
{
	int error, result = 0;

	error = vmk_object_ioctl(obj, request, arg, &result);
	if (error == 0)
		td->td_retval[0] = result;
	return (error);
}

static int
dispatch_dev(uint32_t request, uint64_t arg, struct thread *td)
{
	int error;

	sx_slock(&load_lock);
	error = loaded ? dispatch(NULL, request, arg, td) : ENXIO;
	sx_sunlock(&load_lock);
	return (error);
}

static int
kvm_fo_ioctl(struct file *fp, u_long com, void *data,
    struct ucred *cred __unused, struct thread *td)
{
	const struct kvm_bsd_request *r = data;

	switch (com) {
	case KVM_BSD_REQUEST:
		if (r->request > UINT32_MAX)
			return (ENOTTY);
		return (dispatch(fp->f_data, (uint32_t)r->request, r->arg,
		    td));
	case FIONBIO:
	case FIOASYNC:
		return (0);
	default:
		return (ENOTTY);
	}
}

static int
#if __FreeBSD_version >= 1400000
kvm_fo_stat(struct file *fp __unused, struct stat *sb,
    struct ucred *cred __unused)
#else
kvm_fo_stat(struct file *fp __unused, struct stat *sb,
    struct ucred *cred __unused, struct thread *td __unused)
#endif
{
	bzero(sb, sizeof(*sb));
	sb->st_mode = S_IFCHR | S_IRUSR | S_IWUSR;
	return (0);
}

static int
kvm_fo_close(struct file *fp, struct thread *td __unused)
{
	struct vmk_object *obj = fp->f_data;

	fp->f_ops = &badfileops;
	fp->f_data = NULL;
	vmk_object_release(obj);
	return (0);
}

static int
kvm_fo_fill_kinfo(struct file *fp __unused, struct kinfo_file *kif,
    struct filedesc *fdp __unused)
{
	kif->kf_type = KF_TYPE_UNKNOWN;
	return (0);
}

static int
kvm_fo_mmap(struct file *fp, vm_map_t map, vm_offset_t *addr, vm_size_t size,
    vm_prot_t prot, vm_prot_t cap_maxprot, int flags, vm_ooffset_t foff,
    struct thread *td)
{
	struct vmk_shared *s = vmk_object_shared(fp->f_data);
	vm_prot_t maxprot = cap_maxprot & (VM_PROT_READ | VM_PROT_WRITE);
	vm_object_t object;
	int error;

	if (s == NULL)
		return (ENODEV);
	if ((flags & MAP_SHARED) == 0 || foff < 0 ||
	    foff > (vm_ooffset_t)ptoa(s->npages) ||
	    size > ptoa(s->npages) - (vm_size_t)foff)
		return (EINVAL);
	if ((prot & ~maxprot) != 0)
		return (EACCES);
	object = ((struct shared *)s->os)->object;
	vm_object_reference(object);
	error = vm_mmap_object(map, addr, size, prot, maxprot, flags, object,
	    foff, FALSE, td);
	if (error != 0)
		vm_object_deallocate(object);
	return (error);
}

int
vmk_fd_prepare(struct vmk_fd_ticket *t, const char *name __unused)
{
	struct file *fp;
	int error;

	error = falloc(curthread, &fp, &t->fd, O_CLOEXEC);
	if (error != 0)
		return (error);
	t->os = fp;
	return (0);
}

void
vmk_fd_commit(struct vmk_fd_ticket *t, struct vmk_object *obj)
{
	struct file *fp = t->os;

	finit(fp, FREAD | FWRITE, DTYPE_DEV, obj, &kvm_fileops);
	fdrop(fp, curthread);
}

/* ---- eventfd ----------------------------------------------------------- */

/*
 * FreeBSD calls nobody back when an eventfd is written, so a listener is a
 * thread that reads.  It reads through a file of its own on the same eventfd,
 * because the user's is as a rule non-blocking.  Stopping it writes 1; user
 * space may read that away, so it is written until the kernel knows no thread
 * of that number: then it runs in kthread_exit() and not in our text.
 */
struct vmk_event {
	struct file	*fp;		/* the user's */
	struct file	*mine;		/* the listener's, or NULL */
	void		(*fn)(void *);
	void		*arg;
	struct thread	*listener;	/* what kthread_exit() wakes */
	lwpid_t		 tid;
	volatile u_int	 stop;
};

int
vmk_event_get(int fd, struct vmk_event **out)
{
	struct vmk_event *ev;
	cap_rights_t rights;
	struct file *fp;
	int error;

	error = fget(curthread, fd, cap_rights_init(&rights, CAP_READ,
	    CAP_WRITE), &fp);
	if (error != 0)
		return (error);
	if (fp->f_type != DTYPE_EVENTFD) {
		fdrop(fp, curthread);
		return (VMK_EINVAL);
	}
	ev = malloc(sizeof(*ev), M_VMK, M_WAITOK | M_ZERO);
	ev->fp = fp;
	*out = ev;
	return (0);
}

void
vmk_event_put(struct vmk_event *ev)
{
	fdrop(ev->fp, curthread);
	free(ev, M_VMK);
}

bool
vmk_event_same(const struct vmk_event *a, const struct vmk_event *b)
{
	return (a->fp->f_data == b->fp->f_data);
}

/* A count that stands at its end makes this wait unless O_NONBLOCK is set. */
void
vmk_event_signal(struct vmk_event *ev)
{
	eventfd_t one = 1;
	struct iovec iov = { &one, sizeof(one) };
	struct uio uio = {
		.uio_iov = &iov, .uio_iovcnt = 1, .uio_resid = sizeof(one),
		.uio_segflg = UIO_SYSSPACE, .uio_rw = UIO_WRITE,
		.uio_td = curthread,
	};

	(void)fo_write(ev->fp, &uio, curthread->td_ucred, 0, curthread);
}

static int
event_read(struct file *fp)
{
	eventfd_t count;
	struct iovec iov = { &count, sizeof(count) };
	struct uio uio = {
		.uio_iov = &iov, .uio_iovcnt = 1, .uio_resid = sizeof(count),
		.uio_segflg = UIO_SYSSPACE, .uio_rw = UIO_READ,
		.uio_td = curthread,
	};

	return (fo_read(fp, &uio, curthread->td_ucred, 0, curthread));
}

static void
event_listener(void *arg)
{
	struct vmk_event *ev = arg;
	int error;

	for (;;) {
		error = event_read(ev->mine);
		if (atomic_load_acq_int(&ev->stop) != 0)
			break;
		if (error == 0)
			ev->fn(ev->arg);
	}
	kthread_exit();
}

static bool
listener_lives(const struct vmk_event *ev)
{
	struct thread *td = tdfind(ev->tid, proc0.p_pid);

	if (td != NULL)
		PROC_UNLOCK(td->td_proc);
	return (td != NULL && td == ev->listener);
}

int
vmk_event_listen(struct vmk_event *ev, void (*fn)(void *), void *arg)
{
	struct file *mine;
	int error;

	error = falloc_noinstall(curthread, &mine);
	if (error != 0)
		return (error);
	finit(mine, FREAD | FWRITE, DTYPE_EVENTFD, ev->fp->f_data,
	    ev->fp->f_ops);
	ev->mine = mine;
	ev->fn = fn;
	ev->arg = arg;
	ev->stop = 0;
	error = kthread_add(event_listener, ev, NULL, &ev->listener, 0, 0,
	    "kvm irqfd");
	if (error == 0) {
		/* It lives until it is told to stop. */
		ev->tid = ev->listener->td_tid;
	} else {
		mine->f_ops = &badfileops;
		fdrop(mine, curthread);
		ev->mine = NULL;
	}
	return (error);
}

void
vmk_event_unlisten(struct vmk_event *ev)
{
	atomic_store_rel_int(&ev->stop, 1);
	while (listener_lives(ev)) {
		vmk_event_signal(ev);
		tsleep(ev->listener, 0, "kvmevt", hz / 100 + 1);
	}
	/* The eventfd is the user's; only the file goes. */
	ev->mine->f_ops = &badfileops;
	fdrop(ev->mine, curthread);
	ev->mine = NULL;
}

/* ---- other ------------------------------------------------------------- */

void
vmk_log(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
}

bool
kvm_file_is_ours(struct file *fp)
{
	return (fp->f_ops == &kvm_fileops || (fp->f_type == DTYPE_VNODE &&
	    fp->f_vnode != NULL && fp->f_vnode->v_type == VCHR &&
	    kvm_cdev != NULL && fp->f_vnode->v_rdev == kvm_cdev));
}

int
kvm_file_request(struct file *fp, uint32_t request, uint64_t arg,
    struct thread *td)
{
	if (fp->f_ops == &kvm_fileops)
		return (dispatch(fp->f_data, request, arg, td));
	return (dispatch_dev(request, arg, td));
}

static int
kvm_ioctl(struct cdev *dev __unused, u_long cmd, caddr_t data,
    int fflag __unused, struct thread *td)
{
	const struct kvm_bsd_request *r = (const void *)data;

	if (cmd != KVM_BSD_REQUEST || r->request > UINT32_MAX)
		return (ENOTTY);
	return (dispatch_dev((uint32_t)r->request, r->arg, td));
}

static struct cdevsw kvm_cdevsw = {
	.d_version = D_VERSION,
	.d_name = "kvm",
	.d_ioctl = kvm_ioctl,
};

/* ---- load and unload --------------------------------------------------- */

static eventhandler_tag tag_exit, tag_exec, tag_resume;

static void
resumed(void *arg __unused)
{
	vmk_module_resume();
}

static void
deregister(void)
{
	EVENTHANDLER_DEREGISTER(process_exit, tag_exit);
	EVENTHANDLER_DEREGISTER(process_exec, tag_exec);
	EVENTHANDLER_DEREGISTER(power_resume, tag_resume);
}

static int
kvm_load(void)
{
	struct make_dev_args args;
	int error;

	/* Unless the loader's environment said otherwise. */
	if (vmk_tunables.max_pinned_pages == 0)
		vmk_tunables.max_pinned_pages =
		    (uint64_t)vm_cnt.v_page_count / 8 * 7;
	if (vmk_tunables.max_vms == 0)
		vmk_tunables.max_vms = 256;
	error = vmk_module_init();
	if (error != 0) {
		printf("kvm: no usable processor extension (%d)\n", error);
		return (error);
	}
	tag_exit = EVENTHANDLER_REGISTER(process_exit, mm_exit, NULL,
	    EVENTHANDLER_PRI_ANY);
	tag_exec = EVENTHANDLER_REGISTER(process_exec, mm_exec, NULL,
	    EVENTHANDLER_PRI_ANY);
	tag_resume = EVENTHANDLER_REGISTER(power_resume, resumed, NULL,
	    EVENTHANDLER_PRI_ANY);
	make_dev_args_init(&args);
	args.mda_devsw = &kvm_cdevsw;
	args.mda_uid = UID_ROOT;
	args.mda_gid = GID_WHEEL;
	args.mda_mode = 0660;
	loaded = true;
	error = make_dev_s(&args, &kvm_cdev, "kvm");
	if (error != 0) {
		loaded = false;
		deregister();
		(void)vmk_module_fini();
	}
	return (error);
}

/* The kernel calls this after a kvm_load() that failed, too. */
static int
kvm_unload(void)
{
	int error;

	if (!loaded)
		return (0);
	sx_xlock(&load_lock);
	error = vmk_module_fini();
	loaded = error != 0;
	sx_xunlock(&load_lock);
	if (error != 0)
		return (error);
	destroy_dev(kvm_cdev);
	deregister();
	/*
	 * The thread that closed the last descriptor may still be on its way
	 * out of kvm_fo_close().
	 */
	(void)quiesce_all_cpus("kvmunl", 0);
	return (0);
}

static int
kvm_modevent(module_t mod __unused, int type, void *data __unused)
{
	switch (type) {
	case MOD_LOAD:
		return (kvm_load());
	case MOD_UNLOAD:
		return (kvm_unload());
	case MOD_QUIESCE:
	case MOD_SHUTDOWN:
		return (0);
	default:
		return (EOPNOTSUPP);
	}
}

DEV_MODULE(kvm, kvm_modevent, NULL);
MODULE_VERSION(kvm, 1);
/* vmm.ko's name and version: whoever comes second is refused. */
MODULE_VERSION(vmm, 1);

/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * kvm_linux.c: vmk_os.h on a Linux 6.1 kernel, for tests only.
 *
 * Linux has its own KVM; this glue exists so that the core can be run by real
 * clients (stock QEMU, vmctl) on a host that every test machine can boot.  It
 * registers misc device 10:232 in place of kvm.ko.
 */
#include <linux/anon_inodes.h>
#include <linux/eventfd.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/hrtimer.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/poll.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <linux/wait.h>
#include <asm/io.h>
#include <asm/fpu/api.h>
#include <asm/tsc.h>

#define	VMK_HOST_TYPES
#include "vmk_os.h"

struct vmk_tunables vmk_tunables;

/* ---- memory ------------------------------------------------------------ */

void *
vmk_alloc(size_t size)
{
	return (kvzalloc(size, GFP_KERNEL_ACCOUNT));
}

void
vmk_free(void *p, size_t size)
{
	(void)size;
	kvfree(p);
}

void *
vmk_pages_alloc(unsigned int npages, uint64_t *pa)
{
	void *va;

	va = (void *)__get_free_pages(GFP_KERNEL_ACCOUNT | __GFP_ZERO,
	    get_order(npages * PAGE_SIZE));
	if (va != NULL)
		*pa = __pa(va);
	return (va);
}

void
vmk_pages_free(void *va, unsigned int npages)
{
	free_pages((unsigned long)va, get_order(npages * PAGE_SIZE));
}

void *
vmk_phys_to_virt(uint64_t pa)
{
	return (__va(pa));
}

int
vmk_shared_alloc(struct vmk_shared *s, unsigned int npages)
{
	s->va = vmalloc_user(npages * PAGE_SIZE);
	s->npages = npages;
	return (s->va == NULL ? VMK_ENOMEM : 0);
}

void
vmk_shared_free(struct vmk_shared *s)
{
	vfree(s->va);
	s->va = NULL;
}

int
vmk_copyin(uint64_t uaddr, void *dst, size_t len)
{
	return (copy_from_user(dst, (const void __user *)uaddr, len) == 0 ?
	    0 : VMK_EFAULT);
}

int
vmk_copyout(const void *src, uint64_t uaddr, size_t len)
{
	return (copy_to_user((void __user *)uaddr, src, len) == 0 ?
	    0 : VMK_EFAULT);
}

/* ---- user memory ------------------------------------------------------- */

struct vmk_mm *
vmk_mm_attach(vmk_unmap_fn *unmap, void *arg)
{
	(void)unmap;		/* a FOLL_LONGTERM pin outlives its mapping */
	(void)arg;
	mmgrab(current->mm);
	return ((struct vmk_mm *)current->mm);
}

void
vmk_mm_detach(struct vmk_mm *mm)
{
	mmdrop((struct mm_struct *)mm);
}

bool
vmk_mm_is_current(const struct vmk_mm *mm)
{
	return ((const struct mm_struct *)mm == current->mm);
}

int
vmk_pin(struct vmk_mm *mm, uint64_t hva, unsigned int npages, bool write,
    uint64_t *pa, void **cookie)
{
	struct page **pages;
	int i, n, error = 0;

	(void)mm;
	pages = kmalloc_array(npages, sizeof(pages[0]), GFP_KERNEL);
	if (pages == NULL)
		return (VMK_ENOMEM);
	n = pin_user_pages_fast(hva, npages,
	    (write ? FOLL_WRITE : 0) | FOLL_LONGTERM, pages);
	if (n != (int)npages) {
		if (n > 0)
			unpin_user_pages(pages, n);
		error = VMK_EFAULT;
	} else {
		for (i = 0; i < n; i++)
			pa[i] = page_to_phys(pages[i]);
	}
	kfree(pages);
	*cookie = NULL;
	return (error);
}

void
vmk_unpin(struct vmk_mm *mm, void *cookie, uint64_t hva, unsigned int npages,
    bool write, const uint64_t *pa)
{
	struct page *page;
	unsigned int i;

	(void)mm;
	(void)cookie;
	(void)hva;
	for (i = 0; i < npages; i++) {
		page = pfn_to_page(pa[i] >> PAGE_SHIFT);
		unpin_user_pages_dirty_lock(&page, 1, write);
	}
}

/* ---- locks ------------------------------------------------------------- */

#define	FITS(inner, outer)						\
	static_assert(sizeof(struct inner) <= sizeof(struct outer))

FITS(mutex, vmk_mutex);
static_assert(sizeof(spinlock_t) <= sizeof(struct vmk_spin));
static_assert(sizeof(wait_queue_head_t) <= sizeof(struct vmk_waitq));

void
vmk_mutex_init(struct vmk_mutex *m, const char *name)
{
	(void)name;
	mutex_init((struct mutex *)m);
}

void
vmk_mutex_fini(struct vmk_mutex *m)
{
	mutex_destroy((struct mutex *)m);
}

void
vmk_mutex_enter(struct vmk_mutex *m)
{
	mutex_lock((struct mutex *)m);
}

int
vmk_mutex_enter_sig(struct vmk_mutex *m)
{
	return (mutex_lock_interruptible((struct mutex *)m) == 0 ? 0 :
	    VMK_EINTR);
}

void
vmk_mutex_exit(struct vmk_mutex *m)
{
	mutex_unlock((struct mutex *)m);
}

void
vmk_spin_init(struct vmk_spin *s, const char *name)
{
	(void)name;
	spin_lock_init((spinlock_t *)s);
}

void
vmk_spin_fini(struct vmk_spin *s)
{
	(void)s;
}

uint64_t
vmk_spin_enter(struct vmk_spin *s)
{
	unsigned long flags;

	spin_lock_irqsave((spinlock_t *)s, flags);
	return (flags);
}

void
vmk_spin_exit(struct vmk_spin *s, uint64_t saved)
{
	spin_unlock_irqrestore((spinlock_t *)s, saved);
}

void
vmk_waitq_init(struct vmk_waitq *w, const char *name)
{
	(void)name;
	init_waitqueue_head((wait_queue_head_t *)w);
}

void
vmk_waitq_fini(struct vmk_waitq *w)
{
	(void)w;
}

int
vmk_wait_sig(struct vmk_waitq *w, bool (*cond)(void *), void *arg)
{
	wait_queue_head_t *wq = (wait_queue_head_t *)w;

	return (wait_event_interruptible(*wq, cond(arg)) == 0 ? 0 : VMK_EINTR);
}

void
vmk_wake(struct vmk_waitq *w)
{
	wake_up((wait_queue_head_t *)w);
}

/* ---- processors -------------------------------------------------------- */

/* One interrupt in flight for each processor; a second would say no more. */
struct kick {
	call_single_data_t csd;
	atomic_t busy;
};
static DEFINE_PER_CPU(struct kick, kicks);

static void
kicked(void *arg)
{
	atomic_set_release(&((struct kick *)arg)->busy, 0);
}

void
vmk_cpu_enter(void)
{
	kernel_fpu_begin();
}

void
vmk_cpu_exit(void)
{
	kernel_fpu_end();
}

unsigned int
vmk_cpu_id(void)
{
	return (raw_smp_processor_id());
}

unsigned int
vmk_ncpus(void)
{
	return (nr_cpu_ids);
}

void
vmk_cpu_kick(unsigned int cpu)
{
	struct kick *k = &per_cpu(kicks, cpu);

	if (atomic_xchg(&k->busy, 1) == 0)
		smp_call_function_single_async(cpu, &k->csd);
}

void
vmk_cpu_each(void (*fn)(void *), void *arg)
{
	on_each_cpu(fn, arg, 1);
}

bool
vmk_must_leave(void)
{
	return (need_resched() || signal_pending(current));
}

int
vmk_yield(void)
{
	cond_resched();
	return (signal_pending(current) ? VMK_EINTR : 0);
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

static_assert(sizeof(sigset_t) == 8);

bool
vmk_sigset_ok(uint32_t len)
{
	return (len == sizeof(sigset_t));
}

/*
 * The old mask goes to real_blocked: a signal that only the RUN mask lets
 * through, with the default action, must end RUN and not the process.
 */
void
vmk_sigmask_swap(const struct vmk_sigset *set, struct vmk_sigset *old)
{
	sigset_t new;

	(void)old;
	memcpy(&new, set, sizeof(new));
	sigprocmask(SIG_SETMASK, &new, &current->real_blocked);
}

void
vmk_sigmask_restore(const struct vmk_sigset *old)
{
	(void)old;
	sigprocmask(SIG_SETMASK, &current->real_blocked, NULL);
	sigemptyset(&current->real_blocked);
}

/* ---- time -------------------------------------------------------------- */

uint64_t
vmk_time_ns(void)
{
	return (ktime_get_ns());
}

uint32_t
vmk_tsc_khz(void)
{
	return (tsc_khz);
}

struct timer {
	struct hrtimer hr;
	void (*fn)(void *);
	void *arg;
};
FITS(timer, vmk_timer);

static enum hrtimer_restart
timer_fired(struct hrtimer *hr)
{
	struct timer *t = container_of(hr, struct timer, hr);

	t->fn(t->arg);
	return (HRTIMER_NORESTART);
}

void
vmk_timer_init(struct vmk_timer *vt, void (*fn)(void *), void *arg)
{
	struct timer *t = (struct timer *)vt;

	hrtimer_init(&t->hr, CLOCK_MONOTONIC, HRTIMER_MODE_ABS_HARD);
	t->hr.function = timer_fired;
	t->fn = fn;
	t->arg = arg;
}

void
vmk_timer_fini(struct vmk_timer *vt)
{
	hrtimer_cancel(&((struct timer *)vt)->hr);
}

void
vmk_timer_arm(struct vmk_timer *vt, uint64_t deadline_ns)
{
	if (deadline_ns > KTIME_MAX)
		deadline_ns = KTIME_MAX;
	hrtimer_start(&((struct timer *)vt)->hr, ns_to_ktime(deadline_ns),
	    HRTIMER_MODE_ABS_HARD);
}

void
vmk_timer_cancel(struct vmk_timer *vt)
{
	hrtimer_try_to_cancel(&((struct timer *)vt)->hr);
}

/* ---- descriptors ------------------------------------------------------- */

static long
do_ioctl(struct vmk_object *obj, unsigned int request, unsigned long arg)
{
	int result = 0, error;

	error = vmk_object_ioctl(obj, request, arg, &result);
	return (error != 0 ? -error : result);
}

static long
child_ioctl(struct file *file, unsigned int request, unsigned long arg)
{
	return (do_ioctl(file->private_data, request, arg));
}

static int
child_release(struct inode *inode, struct file *file)
{
	(void)inode;
	if (file->private_data != NULL)
		vmk_object_release(file->private_data);
	return (0);
}

static int
child_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct vmk_shared *s = vmk_object_shared(file->private_data);

	if (s == NULL)
		return (-ENODEV);
	if ((vma->vm_flags & (VM_EXEC | VM_SHARED)) != VM_SHARED)
		return (-EINVAL);
	return (remap_vmalloc_range(vma, s->va, vma->vm_pgoff));
}

static const struct file_operations child_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = child_ioctl,
	.mmap = child_mmap,
	.release = child_release,
	.llseek = noop_llseek,
};

int
vmk_fd_prepare(struct vmk_fd_ticket *t, const char *name)
{
	struct file *file;
	int fd;

	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0)
		return (-fd);
	file = anon_inode_getfile(name, &child_fops, NULL, O_RDWR);
	if (IS_ERR(file)) {
		put_unused_fd(fd);
		return (-PTR_ERR(file));
	}
	t->os = file;
	t->fd = fd;
	return (0);
}

void
vmk_fd_commit(struct vmk_fd_ticket *t, struct vmk_object *obj)
{
	struct file *file = t->os;

	file->private_data = obj;
	fd_install(t->fd, file);
}

/* ---- eventfd ----------------------------------------------------------- */

struct vmk_event {
	struct eventfd_ctx *ctx;
	struct file *file;
	wait_queue_entry_t wait;
	poll_table pt;
	void (*fn)(void *);
	void *arg;
};

int
vmk_event_get(int fd, struct vmk_event **out)
{
	struct vmk_event *ev;

	ev = kzalloc(sizeof(*ev), GFP_KERNEL_ACCOUNT);
	if (ev == NULL)
		return (VMK_ENOMEM);
	ev->file = eventfd_fget(fd);
	if (IS_ERR(ev->file)) {
		int error = -PTR_ERR(ev->file);

		kfree(ev);
		return (error);
	}
	ev->ctx = eventfd_ctx_fileget(ev->file);
	*out = ev;
	return (0);
}

void
vmk_event_put(struct vmk_event *ev)
{
	eventfd_ctx_put(ev->ctx);
	fput(ev->file);
	kfree(ev);
}

bool
vmk_event_same(const struct vmk_event *a, const struct vmk_event *b)
{
	return (a->ctx == b->ctx);
}

void
vmk_event_signal(struct vmk_event *ev)
{
	eventfd_signal(ev->ctx, 1);
}

/* Called with the eventfd's wait-queue lock held, interrupts disabled. */
static int
event_woken(wait_queue_entry_t *wait, unsigned int mode, int sync, void *key)
{
	struct vmk_event *ev = container_of(wait, struct vmk_event, wait);
	u64 count;

	(void)mode;
	(void)sync;
	if ((key_to_poll(key) & EPOLLIN) != 0) {
		eventfd_ctx_do_read(ev->ctx, &count);
		ev->fn(ev->arg);
	}
	return (0);
}

static void
event_queue(struct file *file, wait_queue_head_t *wqh, poll_table *pt)
{
	struct vmk_event *ev = container_of(pt, struct vmk_event, pt);

	(void)file;
	add_wait_queue_priority(wqh, &ev->wait);
}

int
vmk_event_listen(struct vmk_event *ev, void (*fn)(void *), void *arg)
{
	ev->fn = fn;
	ev->arg = arg;
	init_waitqueue_func_entry(&ev->wait, event_woken);
	init_poll_funcptr(&ev->pt, event_queue);
	if ((vfs_poll(ev->file, &ev->pt) & EPOLLIN) != 0)
		fn(arg);
	return (0);
}

void
vmk_event_unlisten(struct vmk_event *ev)
{
	u64 count;

	eventfd_ctx_remove_wait_queue(ev->ctx, &ev->wait, &count);
}

/* ---- other ------------------------------------------------------------- */

void
vmk_log(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vprintk(fmt, ap);
	va_end(ap);
}

static long
dev_ioctl(struct file *file, unsigned int request, unsigned long arg)
{
	(void)file;
	return (do_ioctl(NULL, request, arg));
}

static const struct file_operations dev_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = dev_ioctl,
	.llseek = noop_llseek,
};

static struct miscdevice dev = {
	.minor = KVM_MINOR,
	.name = "kvm",
	.fops = &dev_fops,
	.mode = 0660,
};

static int __init
kvm_linux_init(void)
{
	int error, cpu;

	for_each_possible_cpu(cpu)
		INIT_CSD(&per_cpu(kicks, cpu).csd, kicked,
		    &per_cpu(kicks, cpu));
	vmk_tunables.max_pinned_pages = totalram_pages() / 8 * 7;
	vmk_tunables.max_vms = 64;
	error = vmk_module_init();
	if (error != 0)
		return (-error);
	error = misc_register(&dev);
	if (error != 0)
		vmk_module_fini();
	return (error);
}

static void __exit
kvm_linux_exit(void)
{
	int cpu;

	misc_deregister(&dev);
	vmk_module_fini();
	for_each_possible_cpu(cpu)
		while (atomic_read(&per_cpu(kicks, cpu).busy) != 0)
			cpu_relax();
}

module_init(kvm_linux_init);
module_exit(kvm_linux_exit);
MODULE_DESCRIPTION("KVM ABI test module");
MODULE_LICENSE("Dual BSD/GPL");

/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_os.h: all that the core knows of its host kernel.
 *
 * The core (core/, x86/) is one body of code for FreeBSD, illumos, the Linux
 * test host and the user-space test host.  It calls the functions below and
 * nothing else; each host implements them in os/<host>/.  The interface is
 * drawn around what this module needs, not after any kernel's own API.
 *
 * Contexts.  "Sleepable" means a thread that entered through an ioctl, holding
 * no vmk_spin and outside a vmk_preempt section.  "Any" includes a timer or
 * event callback, which may run with interrupts disabled.  Unless a comment
 * says otherwise a function is for sleepable context.
 *
 * Errors are positive errno values.  Those that the core uses (VMK_E*) have
 * the same numbers in all hosts, as all below 35 have; a host's own are passed
 * through.
 */
#ifndef VMK_OS_H
#define	VMK_OS_H

#include "vmk_types.h"

#define	VMK_ENOENT	2
#define	VMK_EINTR	4
#define	VMK_EIO		5
#define	VMK_ENXIO	6
#define	VMK_E2BIG	7
#define	VMK_ENOMEM	12
#define	VMK_EFAULT	14
#define	VMK_EBUSY	16
#define	VMK_EEXIST	17
#define	VMK_ENODEV	19
#define	VMK_EINVAL	22
#define	VMK_ENFILE	23
#define	VMK_ENOTTY	25
#define	VMK_ENOSPC	28

/* ---- memory ------------------------------------------------------------ */

/* Zeroed memory, or NULL.  size must be bounded by the caller. */
void	*vmk_alloc(size_t size);
void	 vmk_free(void *p, size_t size);

/*
 * npages (a power of two, at most 4) zeroed, physically contiguous pages.
 * *pa receives the physical address.  NULL if there are none.
 */
void	*vmk_pages_alloc(unsigned int npages, uint64_t *pa);
void	 vmk_pages_free(void *va, unsigned int npages);

/*
 * The kernel address of a page from vmk_pages_alloc() or vmk_pin().  Any
 * context; the mapping is permanent (direct map).
 */
void	*vmk_phys_to_virt(uint64_t pa);

/*
 * Pages that user processes can map through the descriptor that owns them
 * (vmk_fd_commit).  They are wired, zeroed and contiguous in kernel virtual
 * space; user mappings may outlive the call to vmk_shared_free().
 */
struct vmk_shared {
	uint8_t		*va;
	unsigned int	 npages;
	void		*os;
};
int	 vmk_shared_alloc(struct vmk_shared *, unsigned int npages);
void	 vmk_shared_free(struct vmk_shared *);

/* Copy to and from the calling process.  0 or VMK_EFAULT. */
int	 vmk_copyin(uint64_t uaddr, void *dst, size_t len);
int	 vmk_copyout(const void *src, uint64_t uaddr, size_t len);

/* ---- user memory that a guest uses ------------------------------------- */

/*
 * An address space.  vmk_mm_attach() names the caller's.  If the host can
 * tell that user memory under a pin is about to be unmapped, it calls
 * unmap(arg, hva, len) first (hva 0, len ~0 when the whole space goes away),
 * in sleepable context; the core then releases every pin in that range.
 * vmk_mm_detach() returns after the last such call has.
 */
struct vmk_mm;
typedef void vmk_unmap_fn(void *arg, uint64_t hva, uint64_t len);

struct vmk_mm *vmk_mm_attach(vmk_unmap_fn *unmap, void *arg);
void	 vmk_mm_detach(struct vmk_mm *);
bool	 vmk_mm_is_current(const struct vmk_mm *);

/*
 * Wire npages user pages (1 or 512) of the current process from hva, which
 * is page aligned, for writing or for reading only, and store their physical
 * addresses.  Only ordinary memory is accepted: device and special mappings
 * fail with VMK_EFAULT.  All or nothing.  *cookie identifies the pin.
 */
int	 vmk_pin(struct vmk_mm *, uint64_t hva, unsigned int npages, bool write,
	    uint64_t *pa, void **cookie);
/*
 * Release a pin.  npages, pa and write are those of vmk_pin(); with write
 * set the pages are marked modified first.  Any thread, also when the process
 * has gone.
 */
void	 vmk_unpin(struct vmk_mm *, void *cookie, uint64_t hva,
	    unsigned int npages, bool write, const uint64_t *pa);

/* ---- locks ------------------------------------------------------------- */

/*
 * The storage is the core's, the contents the host's; a host asserts at
 * compile time that its type fits.
 */
struct vmk_mutex { uint64_t opaque[10]; };	/* sleeping */
struct vmk_spin { uint64_t opaque[6]; };	/* blocks interrupts */
struct vmk_waitq { uint64_t opaque[16]; };

void	 vmk_mutex_init(struct vmk_mutex *, const char *name);
void	 vmk_mutex_fini(struct vmk_mutex *);
void	 vmk_mutex_enter(struct vmk_mutex *);
/* 0, or VMK_EINTR when a signal came first. */
int	 vmk_mutex_enter_sig(struct vmk_mutex *);
void	 vmk_mutex_exit(struct vmk_mutex *);

void	 vmk_spin_init(struct vmk_spin *, const char *name);
void	 vmk_spin_fini(struct vmk_spin *);
/* The returned word goes back to vmk_spin_exit(). */
uint64_t vmk_spin_enter(struct vmk_spin *);
void	 vmk_spin_exit(struct vmk_spin *, uint64_t saved);

/*
 * Sleep until cond(arg) is true or a signal arrives (VMK_EINTR).  cond is
 * called without locks that the waker holds and must not sleep.
 * vmk_wake(): any context, after making the condition true.
 */
void	 vmk_waitq_init(struct vmk_waitq *, const char *name);
void	 vmk_waitq_fini(struct vmk_waitq *);
int	 vmk_wait_sig(struct vmk_waitq *, bool (*cond)(void *), void *arg);
void	 vmk_wake(struct vmk_waitq *);

/* ---- processors -------------------------------------------------------- */

/*
 * A section in which the thread keeps its processor and may use the FPU
 * registers freely: the host has saved whatever user state was in them.
 * Interrupts stay enabled.  Does not nest; no sleeping inside.
 */
void	 vmk_cpu_enter(void);
void	 vmk_cpu_exit(void);
/* Number of this processor, 0 <= id < vmk_ncpus(); inside a section. */
unsigned int vmk_cpu_id(void);
unsigned int vmk_ncpus(void);
/* Any context.  Make that processor take an interrupt soon. */
void	 vmk_cpu_kick(unsigned int cpu);
/* Run fn on every online processor, interrupts disabled, and wait. */
void	 vmk_cpu_each(void (*fn)(void *), void *arg);
/*
 * Has the host something for this thread to do (signal, reschedule) that
 * a guest must be left for?  Inside a section, interrupts disabled.
 */
bool	 vmk_must_leave(void);
/* Outside a section: give up the processor if asked; VMK_EINTR on signal. */
int	 vmk_yield(void);

/*
 * Replace the calling thread's signal mask and put the old one back.  set is
 * what KVM_SET_SIGNAL_MASK brought: len bytes of the caller's own sigset, of
 * a length that vmk_sigset_ok() takes (8 is Linux's).  A signal that the old
 * mask blocks interrupts what sleeps between the two calls, and does nothing
 * else: no handler runs, no default action is taken, it stays pending.
 */
struct vmk_sigset { uint8_t bytes[16]; };
bool	 vmk_sigset_ok(uint32_t len);
void	 vmk_sigmask_swap(const struct vmk_sigset *set, struct vmk_sigset *old);
void	 vmk_sigmask_restore(const struct vmk_sigset *old);

/*
 * A host with a hypervisor multiplexor (illumos) switches SVM or VMX on itself
 * and hands out the tags of guest translations.  NULL: there is none, or it
 * does not serve this processor; then this module does both.  The functions
 * are called with interrupts disabled, vpid_* in sleepable context.
 */
struct vmk_hv_tag { uint64_t opaque[2]; };	/* zero at first */
struct vmk_hv {
	/* SVM.  Gives the VMCB's TLB_CONTROL and the ASID. */
	uint8_t	(*asid)(struct vmk_hv_tag *, bool flush_by_asid, bool flush,
		    uint32_t *asid);
	/* VMX.  0: none left; run without. */
	uint16_t (*vpid_alloc)(void);
	void	(*vpid_free)(uint16_t);
	/* VMX: the sibling hardware thread is ours.  False: try again. */
	bool	(*sibling_enter)(void);
	void	(*sibling_leave)(void);
};
const struct vmk_hv *vmk_hv_claim(void);
void	 vmk_hv_release(void);

/* ---- time -------------------------------------------------------------- */

uint64_t vmk_time_ns(void);		/* monotonic, any context */
uint32_t vmk_tsc_khz(void);

/*
 * One-shot timers.  fn runs in any context, on any processor, never twice at
 * once for one timer, and may re-arm its own timer.  vmk_timer_arm() replaces
 * an earlier deadline (absolute vmk_time_ns(); the past means now).
 * vmk_timer_cancel() does not wait and may be called with a spin lock held,
 * so fn must check under the lock whether it is still wanted;
 * vmk_timer_fini() waits for a running fn and needs sleepable context.
 */
struct vmk_timer { uint64_t opaque[24]; };
void	 vmk_timer_init(struct vmk_timer *, void (*fn)(void *), void *arg);
void	 vmk_timer_fini(struct vmk_timer *);
void	 vmk_timer_arm(struct vmk_timer *, uint64_t deadline_ns);
void	 vmk_timer_cancel(struct vmk_timer *);

/* ---- descriptors ------------------------------------------------------- */

/*
 * A descriptor for a child object is made in two steps, so that user space
 * can never reach an object that is not finished, nor see one disappear
 * after it was reachable (CVE-2019-6974): prepare may fail, commit may not.
 * Prepare is the last step that may fail, so that nothing has to be undone.
 * After commit the host calls vmk_object_ioctl() with that object and
 * vmk_object_release() once, at the last close.
 */
struct vmk_object;
struct vmk_fd_ticket { void *os; int fd; };
int	 vmk_fd_prepare(struct vmk_fd_ticket *, const char *name);
void	 vmk_fd_commit(struct vmk_fd_ticket *, struct vmk_object *);

/* ---- eventfd ----------------------------------------------------------- */

/* VMK_EINVAL if fd is not an eventfd. */
struct vmk_event;
int	 vmk_event_get(int fd, struct vmk_event **);
void	 vmk_event_put(struct vmk_event *);
bool	 vmk_event_same(const struct vmk_event *, const struct vmk_event *);
void	 vmk_event_signal(struct vmk_event *);		/* adds 1 */
/*
 * From now on call fn(arg) (any context) each time the event is signalled,
 * and consume the count.  An event that is already signalled fires at once.
 * vmk_event_unlisten() returns after the last call has finished.
 */
int	 vmk_event_listen(struct vmk_event *, void (*fn)(void *), void *arg);
void	 vmk_event_unlisten(struct vmk_event *);

/* ---- other ------------------------------------------------------------- */

/* One line to the kernel log; the caller limits the rate. */
void	 vmk_log(const char *fmt, ...)
	    __attribute__((__format__(__printf__, 1, 2)));

/* ---- what the core offers to the glue ---------------------------------- */

/* Set by the glue before vmk_module_init(), constant afterwards. */
struct vmk_tunables {
	uint64_t	max_pinned_pages;	/* of all machines together */
	uint32_t	max_vms;
};
extern struct vmk_tunables vmk_tunables;

/* 0, or VMK_ENODEV (no usable SVM/VMX), VMK_EBUSY (someone else uses it). */
int	 vmk_module_init(void);
/* VMK_EBUSY while a VM or vCPU exists.  Also after a failed init, or twice. */
int	 vmk_module_fini(void);
/* Pages charged to all machines now. */
uint64_t vmk_mem_charged(void);
/* After resume from sleep, every processor must be set up again. */
void	 vmk_module_resume(void);

/*
 * request is Linux's full 32-bit number whatever the host; arg its third
 * argument.  Returns 0 with *result >= 0, or an errno.  obj NULL means
 * /dev/kvm itself.
 */
int	 vmk_object_ioctl(struct vmk_object *obj, uint32_t request,
	    uint64_t arg, int *result);
void	 vmk_object_release(struct vmk_object *obj);
/* The pages that mmap at offset 0 gives, or NULL (ENODEV). */
struct vmk_shared *vmk_object_shared(struct vmk_object *obj);

#endif /* !VMK_OS_H */

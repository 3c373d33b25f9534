/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * kvm_sys.h: as much of illumos's DDI and VM interface as the glue uses, for
 * a process.  Stands in for os/illumos/kvm_sys.h; ddi.c has the functions.
 * Written after the manual pages (9E, 9F, 9S) and the names in the headers.
 */
#ifndef KVM_SYS_H
#define	KVM_SYS_H

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/types.h>
#include <time.h>

/* crt1's names. */
#define	_init	kvm_mod_init
#define	_fini	kvm_mod_fini
#define	_info	kvm_mod_info

#define	_NOTE(x)
#define	ASSERT(c)	do { if (!(c)) abort(); } while (0)
#define	VERIFY(c)	ASSERT(c)

typedef enum { B_FALSE, B_TRUE } boolean_t;
typedef unsigned int uint_t;
typedef unsigned long ulong_t;
typedef int fake_id_t;
#define	id_t		fake_id_t
typedef unsigned int major_t, minor_t;
typedef unsigned long pfn_t;
typedef long offset_t_;
#define	offset_t	offset_t_
typedef uintptr_t kt_did_t;
typedef struct timespec timespec_t;
typedef int64_t hrtime_t;
typedef struct { unsigned int w[4]; } fake_sigset_t;
#define	sigset_t	fake_sigset_t
typedef struct { unsigned int w[3]; } k_sigset_t;

#define	PAGESIZE	4096UL
#define	ptob(n)		((n) * PAGESIZE)
#define	btop(n)		((n) / PAGESIZE)
#define	NANOSEC		1000000000L
#define	MAXOFFSET_T	INT64_MAX
#define	DISP_LEVEL	11
#define	ipltospl(n)	(n)

/* Locks: a pointer, as small as illumos's own. */
typedef struct { struct fake_mutex *p; } kmutex_t;
typedef struct { struct fake_cv *p; } kcondvar_t;
enum { MUTEX_DEFAULT, MUTEX_SPIN, CV_DEFAULT, TR_CLOCK_TICK };
void	mutex_init(kmutex_t *, char *, int, void *);
void	mutex_destroy(kmutex_t *);
void	mutex_enter(kmutex_t *);
void	mutex_exit(kmutex_t *);
void	cv_init(kcondvar_t *, char *, int, void *);
void	cv_destroy(kcondvar_t *);
void	cv_wait(kcondvar_t *, kmutex_t *);
int	cv_wait_sig(kcondvar_t *, kmutex_t *);
long	cv_reltimedwait(kcondvar_t *, kmutex_t *, long, int);
void	cv_signal(kcondvar_t *);
void	cv_broadcast(kcondvar_t *);
#define	drv_usectohz(us)	(us)

/* Memory. */
#define	KM_SLEEP	0
void	*kmem_zalloc(size_t, int);
void	kmem_free(void *, size_t);
typedef struct {
	uint64_t dma_attr_addr_hi, dma_attr_count_max, dma_attr_align,
	    dma_attr_maxxfer, dma_attr_seg;
	unsigned int dma_attr_version, dma_attr_burstsizes, dma_attr_minxfer,
	    dma_attr_granular;
	int dma_attr_sgllen;
} ddi_dma_attr_t;
#define	DMA_ATTR_V0	0

typedef struct avl_node { struct avl_node *next; } avl_node_t;
typedef struct {
	avl_node_t *head;
	int (*compare)(const void *, const void *);
	size_t offset;
} avl_tree_t;
void	avl_create(avl_tree_t *, int (*)(const void *, const void *), size_t,
	    size_t);
void	avl_destroy(avl_tree_t *);
void	avl_add(avl_tree_t *, void *);
void	avl_remove(avl_tree_t *, void *);
void	*avl_find(avl_tree_t *, const void *, void *);

typedef struct umem *ddi_umem_cookie_t;
#define	DDI_UMEM_SLEEP	0
void	*ddi_umem_alloc(size_t, int, ddi_umem_cookie_t *);
void	ddi_umem_free(ddi_umem_cookie_t);
int	copyin(const void *, void *, size_t);
int	copyout(const void *, void *, size_t);

/* Address spaces. */
enum seg_rw { S_READ, S_WRITE };
enum { AS_FREE_EVENT = 1, AS_SETPROT_EVENT = 2, AS_UNMAP_EVENT = 4,
	AS_ALL_EVENT = 7 };
enum { AS_CALLBACK_DELETED, AS_CALLBACK_NOTFOUND,
	AS_CALLBACK_DELETE_DEFERRED };
struct page;
struct as { void *a_hat; struct as_callback *callbacks; };
extern struct as kas;
int	as_pagelock(struct as *, struct page ***, char *, size_t,
	    enum seg_rw);
void	as_pageunlock(struct as *, struct page **, char *, size_t,
	    enum seg_rw);
int	as_add_callback(struct as *, void (*)(), void *, unsigned int, char *,
	    size_t, int);
unsigned int as_delete_callback(struct as *, void *);
#define	PFN_INVALID	((pfn_t)-1)
pfn_t	hat_getpfnum(void *, void *);
void	*hat_kpm_pfn2va(pfn_t);
pfn_t	page_pptonum(struct page *);
struct page *page_numtopp_nolock(pfn_t);

/* Threads and processors. */
typedef char *caddr_t_;
#define	caddr_t	caddr_t_
typedef struct cred { int zone; } cred_t;
typedef struct proc { kmutex_t p_lock; struct as *p_as; } proc_t;
typedef struct kthread {
	int t_astflag, t_sig_check, t_schedflag;
	bool signalled;
	k_sigset_t t_hold;
	proc_t *t_procp;
	kt_did_t t_did;
} kthread_t;
kthread_t *fake_thread(void);
#define	curthread	fake_thread()
#define	curproc		(curthread->t_procp)
#define	ttoproc(t)	((t)->t_procp)
extern proc_t p0;
typedef struct cpu {
	int cpu_id, cpu_runrun, cpu_kprunrun;
	struct cpu *cpu_next_onln;
} cpu_t;
extern cpu_t fake_cpu0, *cpu_active;
extern kmutex_t cpu_lock;
#define	CPU		(&fake_cpu0)
#define	max_ncpus	8
extern int fake_preempt, fake_fpu, fake_pokes;
#define	kpreempt_disable()	(fake_preempt++)
#define	kpreempt_enable()	(fake_preempt--)
#define	KFPU_NO_STATE	1
#define	kernel_fpu_begin(s, f)	((void)(s), (void)(f), fake_fpu++)
#define	kernel_fpu_end(s, f)	((void)(s), (void)(f), fake_fpu--)
#define	poke_cpu(n)	((void)(n), fake_pokes++)
#define	preempt()	(CPU->cpu_runrun = 0)
enum { JUSTLOOKING = 1 };
#define	ISSIG(t, why)	((void)(why), (t)->signalled)
typedef uintptr_t xc_arg_t;
typedef struct { unsigned long w[1]; } cpuset_t;
#define	cpuset_zero(s)	((s)->w[0] = 0)
#define	cpuset_add(s, n) ((s)->w[0] |= 1UL << (n))
#define	CPUSET2BV(s)	((s).w)
void	xc_sync(xc_arg_t, xc_arg_t, xc_arg_t, unsigned long *,
	    int (*)(xc_arg_t, xc_arg_t, xc_arg_t));
#define	intr_clear()	0UL
#define	intr_restore(f)	((void)(f))
#define	TS_RUN		2
#define	minclsyspri	60
kthread_t *thread_create(void *, size_t, void (*)(void *), void *, size_t,
	    proc_t *, int, int);
void	thread_exit(void) __attribute__((__noreturn__));
void	thread_join(kt_did_t);
#define	schedctl_finish_sigblock(t) ((void)(t))
#define	sigcheck(p, t)	((void)(p), (t)->t_hold.w[0] == 0)
#define	sigutok(u, k)	((k)->w[0] = (u)->w[0], (k)->w[1] = (u)->w[1], \
			    (k)->w[2] = (u)->w[2])
#define	crgetzoneid(c)	((c)->zone)
#define	GLOBAL_ZONEID	0
#define	membar_producer() __atomic_thread_fence(__ATOMIC_SEQ_CST)

/* HMA. */
typedef struct hma_reg hma_reg_t;
typedef struct { uint64_t hsa_gen; uint32_t hsa_asid; } hma_svm_asid_t;
hma_reg_t *hma_register(const char *);
void	hma_unregister(hma_reg_t *);
uint8_t	hma_svm_asid_update(hma_svm_asid_t *, boolean_t, boolean_t);
uint16_t hma_vmx_vpid_alloc(void);
void	hma_vmx_vpid_free(uint16_t);
#define	TS_VCPU		0x2000
extern int fake_smt;		/* what smt_acquire() gives */
void	smt_mark_as_vcpu(void);
int	smt_acquire(void);
void	smt_release(void);

/* Time. */
typedef uintptr_t cyclic_id_t;
typedef struct { void (*cyh_func)(void *); void *cyh_arg; int cyh_level; }
	cyc_handler_t;
typedef struct { hrtime_t cyt_when, cyt_interval; } cyc_time_t;
#define	CY_INFINITY	INT64_MAX
#define	CY_LOW_LEVEL	0
cyclic_id_t cyclic_add(cyc_handler_t *, cyc_time_t *);
void	cyclic_remove(cyclic_id_t);
int	cyclic_reprogram(cyclic_id_t, hrtime_t);
hrtime_t gethrtime(void);
#define	unscalehrtime(ns) ((uint64_t)(ns) * 2)

/* Vnodes and files. */
enum { VCHR = 4, FREAD = 1, FWRITE = 2, FNONBLOCK = 0x80, FD_CLOEXEC = 1,
	OTYP_CHR = 2, UIO_SYSSPACE = 1, FKIOCTL = 0x80000000U };
#define	FMODELS		0x00f00000U
#define	DDI_MODEL_ILP32	0x00100000U
#define	ddi_model_convert_from(m) (m)
#define	getmajor(d)	((major_t)((d) >> 32))
#define	getminor(d)	((minor_t)(d))
#define	makedevice(a, i) ((dev_t)(a) << 32 | (i))
typedef struct vnode { int v_type; dev_t v_rdev; int refs; void *data; }
	vnode_t;
typedef struct file { vnode_t *f_vnode; kmutex_t f_tlock; int f_count;
	char flags; } file_t;
typedef struct { caddr_t iov_base; size_t iov_len; } iovec_t_;
#define	iovec_t	iovec_t_
typedef struct { iovec_t *uio_iov; int uio_iovcnt, uio_segflg, uio_fmode;
	ssize_t uio_resid; int64_t uio_llimit; } uio_t;
vnode_t	*makespecvp(dev_t, int);
int	VOP_OPEN(vnode_t **, int, cred_t *, void *);
int	VOP_CLOSE(vnode_t *, int, int, int64_t, cred_t *, void *);
int	VOP_READ(vnode_t *, uio_t *, int, cred_t *, void *);
int	VOP_WRITE(vnode_t *, uio_t *, int, cred_t *, void *);
void	VN_RELE(vnode_t *);
extern cred_t fake_cred;
#define	CRED()		(&fake_cred)
#define	kcred		(&fake_cred)
int	falloc(vnode_t *, int, file_t **, int *);
void	setf(int, file_t *);
void	f_setfd(int, char);
file_t	*getf(int);
void	releasef(int);
int	closef(file_t *);

/* Drivers. */
typedef struct dev_info { int nodes; int nprops; } dev_info_t;
typedef struct devmap {
	ddi_umem_cookie_t cookie;
	size_t		 len;
} *devmap_cookie_t;
typedef struct as *ddi_as_handle_t;
typedef enum { DDI_ATTACH, DDI_RESUME } ddi_attach_cmd_t;
typedef enum { DDI_DETACH, DDI_SUSPEND } ddi_detach_cmd_t;
typedef enum { DDI_INFO_DEVT2DEVINFO, DDI_INFO_DEVT2INSTANCE } ddi_info_cmd_t;
enum { DDI_SUCCESS = 0, DDI_FAILURE = -1, DDI_PROP_DONTPASS = 1,
	DEVMAP_DEFAULTS = 0, CE_CONT, CE_NOTE, S_IFCHR_ };
#define	S_IFCHR		0020000
#define	DDI_PSEUDO	"ddi_pseudo"
#define	DDI_DEV_T_ANY	((dev_t)-2)
enum { PROT_READ = 1, PROT_WRITE = 2, PROT_EXEC = 4, PROT_USER = 8,
	MAP_SHARED = 1, MAP_PRIVATE = 2, MAP_TYPE = 15 };
int	ddi_soft_state_init(void **, size_t, size_t);
void	ddi_soft_state_fini(void **);
int	ddi_soft_state_zalloc(void *, int);
void	ddi_soft_state_free(void *, int);
void	*ddi_get_soft_state(void *, int);
typedef struct id_space id_space_t;
id_space_t *id_space_create(const char *, id_t, id_t);
void	id_space_destroy(id_space_t *);
id_t	id_alloc_nosleep(id_space_t *);
void	id_free(id_space_t *, id_t);
int	ddi_create_minor_node(dev_info_t *, char *, int, minor_t, char *, int);
void	ddi_remove_minor_node(dev_info_t *, char *);
#define	ddi_report_dev(d)	((void)(d))
#define	ddi_driver_major(d)	((void)(d), 42U)
#define	ddi_name_to_major(n)	((void)(n), 77U)
int	ddi_prop_get_int(dev_t, dev_info_t *, unsigned int, char *, int);
int	ddi_devmap_segmap(dev_t, off_t, ddi_as_handle_t, caddr_t *, off_t,
	    unsigned int, unsigned int, unsigned int, cred_t *);
int	devmap_umem_setup(devmap_cookie_t, dev_info_t *, void *,
	    ddi_umem_cookie_t, offset_t, size_t, unsigned int, unsigned int,
	    void *);
void	cmn_err(int, const char *, ...);
void	vcmn_err(int, const char *, va_list);
#define	physmem		262144UL

struct cb_ops {
	int (*cb_open)(dev_t *, int, int, cred_t *);
	int (*cb_close)(dev_t, int, int, cred_t *);
	int (*cb_ioctl)(dev_t, int, intptr_t, int, cred_t *, int *);
	int (*cb_devmap)(dev_t, devmap_cookie_t, offset_t, size_t, size_t *,
	    unsigned int);
	int (*cb_segmap)(dev_t, off_t, struct as *, caddr_t *, off_t,
	    unsigned int, unsigned int, unsigned int, cred_t *);
	int (*cb_strategy)(), (*cb_print)(), (*cb_dump)(), (*cb_read)(),
	    (*cb_write)(), (*cb_mmap)(), (*cb_chpoll)(), (*cb_prop_op)(),
	    (*cb_aread)(), (*cb_awrite)();
	int cb_flag, cb_rev;
};
struct dev_ops {
	int devo_rev;
	int (*devo_getinfo)(dev_info_t *, ddi_info_cmd_t, void *, void **);
	int (*devo_attach)(dev_info_t *, ddi_attach_cmd_t);
	int (*devo_detach)(dev_info_t *, ddi_detach_cmd_t);
	int (*devo_identify)(), (*devo_probe)(), (*devo_reset)(),
	    (*devo_power)(), (*devo_quiesce)();
	struct cb_ops *devo_cb_ops;
};
struct modldrv { void *ops; const char *info; struct dev_ops *dev_ops; };
struct modlinkage { int rev; void *linkage[4]; };
struct modinfo;
enum { D_NEW = 0, D_MP = 0x20, D_64BIT = 0x200, D_DEVMAP = 0x100, CB_REV = 1,
	DEVO_REV = 4, MODREV_1 = 1 };
int	nodev(), nulldev(), nochpoll(), ddi_prop_op(), ddi_power(),
	ddi_quiesce_not_needed();
extern int mod_driverops;
int	mod_install(struct modlinkage *);
int	mod_remove(struct modlinkage *);
int	mod_info(struct modlinkage *, struct modinfo *);
int	_init(void);
int	_fini(void);
int	_info(struct modinfo *);

/* ---- the test's side ---------------------------------------------------- */

extern struct dev_ops *fake_driver;	/* between _init and _fini */
extern long fake_outstanding;		/* things that the glue holds */
extern long fake_locked;		/* pages that it has locked */
extern bool fake_falloc_fails, fake_no_shadow, fake_hma;
/* The n-th as_add_callback from now fails (0: none). */
extern int fake_callback_fails;
void	fake_user_memory(void *, size_t);
/* What munmap and exit do before they touch anything. */
void	fake_as_event(struct as *, unsigned int, void *, size_t);
int	fake_open(void);			/* /dev/kvm: a descriptor */
int	fake_ioctl(int fd, unsigned int request, void *arg);
int	fake_close(int fd);
int	fake_mmap(int fd, size_t len, unsigned int prot, unsigned int flags,
	    void **);
void	fake_munmap(int fd);
int	fake_eventfd(void);
uint64_t fake_eventfd_count(int fd);
void	fake_fire(void);			/* cyclics that are due */

#endif /* !KVM_SYS_H */

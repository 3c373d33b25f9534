/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * kvm_linux.c: /dev/kvm for Linux programs under the Linuxulator.
 *
 * A module of its own, so that kvm.ko does not drag in linux64.ko.  It hands
 * ioctl numbers 0xAE00-0xAEFF to the core unchanged, gives /dev/kvm Linux's
 * device number (10:232) and translates the signal set of
 * KVM_SET_SIGNAL_MASK.  mmap and close of the descriptors are kvm.ko's own.
 *
 * The Linuxulator calls a handler with Giant and its list lock held.  Both
 * are dropped around the request: KVM_RUN may last for hours and every vCPU
 * would wait for the others.  That is safe because the caller does not touch
 * the list again after a handler has answered, and because our descriptor
 * keeps a machine, which keeps kvm.ko; this module is kept by `inside'.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/capsicum.h>
#include <sys/conf.h>
#include <sys/file.h>
#include <sys/kernel.h>
#include <sys/lock.h>
#include <sys/module.h>
#include <sys/mutex.h>
#include <sys/proc.h>
#include <sys/signalvar.h>
#include <sys/sx.h>

#include <machine/../linux/linux.h>
#include <machine/../linux/linux_proto.h>
#include <compat/linux/linux_ioctl.h>
#include <compat/linux/linux_util.h>

#include "kvm_freebsd.h"

#define	KVM_LINUX_MAJOR	10
#define	KVM_LINUX_MINOR	232

extern struct sx linux_ioctl_sx;

static volatile u_int inside;		/* threads in kvm_linux_ioctl() */

static int
kvm_linux_ioctl(struct thread *td, struct linux_ioctl_args *args)
{
	cap_rights_t rights;
	struct file *fp;
	int error;

	error = fget(td, args->fd, cap_rights_init_one(&rights, CAP_IOCTL),
	    &fp);
	if (error != 0)
		return (error);
	if (!kvm_file_is_ours(fp)) {
		fdrop(fp, td);
		return (ENOIOCTL);
	}
	atomic_add_int(&inside, 1);
	DROP_GIANT();
	sx_sunlock(&linux_ioctl_sx);
	error = kvm_file_request(fp, (uint32_t)args->cmd,
	    (uint64_t)args->arg, td);
	sx_slock(&linux_ioctl_sx);
	PICKUP_GIANT();
	atomic_subtract_int(&inside, 1);
	fdrop(fp, td);
	return (error);
}

static struct linux_ioctl_handler kvm_linux_handler = {
	kvm_linux_ioctl, 0xae00, 0xaeff
};

static char kvm_name[] = "kvm";
static struct linux_device_handler kvm_linux_device = {
	kvm_name, kvm_name, kvm_name, kvm_name,
	KVM_LINUX_MAJOR, KVM_LINUX_MINOR, 1
};

static void
kvm_linux_sigset(const uint8_t linux_set[8], sigset_t *set)
{
	l_sigset_t lset;

	CTASSERT(sizeof(lset) == 8);
	memcpy(&lset, linux_set, sizeof(lset));
	linux_to_bsd_sigset(&lset, set);
}

static int
kvm_linux_modevent(module_t mod __unused, int type, void *data __unused)
{
	int error;

	switch (type) {
	case MOD_LOAD:
		error = linux_device_register_handler(&kvm_linux_device);
		if (error != 0)
			return (error);
		error = linux_ioctl_register_handler(&kvm_linux_handler);
		if (error != 0) {
			linux_device_unregister_handler(&kvm_linux_device);
			return (error);
		}
		kvm_sigset_hook(kvm_linux_sigset);
		return (0);
	case MOD_QUIESCE:
		return (atomic_load_int(&inside) != 0 ? EBUSY : 0);
	case MOD_UNLOAD:
		/*
		 * After this nobody enters: unregistering takes the list
		 * lock that a caller holds.
		 */
		error = linux_ioctl_unregister_handler(&kvm_linux_handler);
		if (error != 0)
			return (error);
		/* Who is back from a request holds it till the end. */
		sx_xlock(&linux_ioctl_sx);
		error = atomic_load_int(&inside);
		sx_xunlock(&linux_ioctl_sx);
		if (error != 0) {
			(void)linux_ioctl_register_handler(&kvm_linux_handler);
			return (EBUSY);
		}
		kvm_sigset_hook(NULL);
		return (linux_device_unregister_handler(&kvm_linux_device));
	case MOD_SHUTDOWN:
		return (0);
	default:
		return (EOPNOTSUPP);
	}
}

DEV_MODULE(kvm_linux, kvm_linux_modevent, NULL);
MODULE_VERSION(kvm_linux, 1);
MODULE_DEPEND(kvm_linux, kvm, 1, 1, 1);
MODULE_DEPEND(kvm_linux, linux64, 1, 1, 1);
MODULE_DEPEND(kvm_linux, linux_common, 1, 1, 1);

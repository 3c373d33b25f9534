/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * kvm_freebsd.h: what kvm.ko offers to kvm_linux.ko.
 */
#ifndef KVM_FREEBSD_H
#define	KVM_FREEBSD_H

struct file;
struct thread;

/* Does this file belong to /dev/kvm, a machine or a vCPU? */
bool	kvm_file_is_ours(struct file *);
/* A request with Linux's number.  Sets td_retval[0]; gives a BSD errno. */
int	kvm_file_request(struct file *, uint32_t request, uint64_t arg,
	    struct thread *);
/*
 * Set while kvm_linux.ko is loaded: turns the 8-byte signal set of a Linux
 * process into ours.
 */
typedef void kvm_sigset_fn(const uint8_t linux_set[8], sigset_t *);
void	kvm_sigset_hook(kvm_sigset_fn *);

#endif /* !KVM_FREEBSD_H */

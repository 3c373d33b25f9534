/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * kvm_bsd.h: how a native FreeBSD program makes KVM requests.
 *
 * FreeBSD's ioctl(2) refuses numbers without direction bits and copies by the
 * size in the number, and Linux's numbers lie about both.  So there is one
 * native request, which carries Linux's number and argument; everything else
 * about a request is as the KVM API documentation says.  Programs under the
 * Linuxulator make Linux's requests themselves (kvm_linux.ko).
 */
#ifndef KVM_BSD_H
#define	KVM_BSD_H

#include <sys/types.h>
#include <sys/ioccom.h>

struct kvm_bsd_request {
	uint64_t	request;	/* Linux's 32-bit number */
	uint64_t	arg;		/* ioctl's third argument */
};

#define	KVM_BSD_REQUEST	_IOW(0xae, 0xff, struct kvm_bsd_request)

#ifndef _KERNEL
#include <sys/ioctl.h>

static inline int
kvm_ioctl(int fd, unsigned long request, unsigned long arg)
{
	struct kvm_bsd_request r = { request & 0xffffffffUL, arg };

	return (ioctl(fd, KVM_BSD_REQUEST, &r));
}
#endif /* !_KERNEL */

#endif /* !KVM_BSD_H */

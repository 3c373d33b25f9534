/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_user.h: what a test program sees of the user-space host, beside
 * vmk_os.h.  It plays the part of the kernel's descriptor table.
 */
#ifndef VMK_USER_H
#define	VMK_USER_H

#include "vmk_os.h"

/* ioctl(2): the result, or a negative VMK_E*. */
int	 user_ioctl(int fd, uint32_t request, uint64_t arg);
#define	USER_DEV_KVM	(-1)			/* fd of /dev/kvm */
void	 user_close(int fd);
/* mmap(2) of a vCPU's descriptor. */
void	*user_map(int fd, unsigned int *npages);

/* A signal for the calling thread, as kill(2) would leave it pending. */
void	 user_signal_self(bool pending);
/* The first byte of the calling thread's signal mask. */
uint8_t	 user_sigmask(void);
/* A wait that would block is interrupted instead. */
void	 user_never_wait(bool);
/* Pretend to be another process (address space) from now on. */
void	 user_switch_mm(int id);
/* Call every registered unmap callback, as an unmap of that range would. */
void	 user_unmap(uint64_t hva, uint64_t len);

/* Only this range counts as user memory; the rest is VMK_EFAULT. */
void	 user_arena(const void *base, size_t len);

/* The n-th allocation or pin from now fails (0: none). */
void	 user_fail_at(uint64_t n);
/* How many things the core still holds; 0 when everything was released. */
uint64_t user_outstanding(void);
uint64_t user_pinned(void);
uint64_t user_kicks(void);

#endif /* !VMK_USER_H */

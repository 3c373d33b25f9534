/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_host_types.h: what the core takes from a compiler's own headers
 * elsewhere.  FreeBSD's kernel is built with -nostdinc, so its <sys/types.h>
 * gives the types (VMK_TYPES_HEADER in the Makefile).
 */
#ifndef VMK_HOST_TYPES_H
#define	VMK_HOST_TYPES_H

#include <sys/types.h>
#include <sys/stddef.h>
#include <sys/stdint.h>

void	*memcpy(void *, const void *, size_t);
void	*memmove(void *, const void *, size_t);
void	*memset(void *, int, size_t);
int	 memcmp(const void *, const void *, size_t);

#endif /* !VMK_HOST_TYPES_H */

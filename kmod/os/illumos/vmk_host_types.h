/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_host_types.h: what the core takes from a compiler's own headers
 * elsewhere.  The kernel is built with -nostdinc.
 */
#ifndef VMK_HOST_TYPES_H
#define	VMK_HOST_TYPES_H

#include <sys/types.h>
#include <sys/null.h>
#include <sys/stdbool.h>

#ifndef offsetof
#define	offsetof(s, m)	__builtin_offsetof(s, m)
#endif

extern void *memcpy(void *, const void *, size_t);
extern void *memmove(void *, const void *, size_t);
extern void *memset(void *, int, size_t);
extern int memcmp(const void *, const void *, size_t);

#endif /* !VMK_HOST_TYPES_H */

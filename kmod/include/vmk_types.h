/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Fixed-width types and the four memory functions that the core may call.
 *
 * A kernel is a freestanding environment, and the three host kernels disagree
 * on where (and whether) <stdint.h> lives.  The core therefore takes its types
 * from the compiler.  A glue file that has already read its own kernel's
 * headers defines VMK_HOST_TYPES and keeps the host's definitions, which have
 * the same size and representation.  Where kernels are built without the
 * compiler's headers, VMK_TYPES_HEADER names a file of the glue that has the
 * same to offer.
 */
#ifndef VMK_TYPES_H
#define	VMK_TYPES_H

#if !defined(VMK_HOST_TYPES) && defined(VMK_TYPES_HEADER)

#include VMK_TYPES_HEADER

#elif !defined(VMK_HOST_TYPES)

#include <stddef.h>
#include <stdint.h>
#include <stdbool.h>

void	*memcpy(void *restrict, const void *restrict, size_t);
void	*memmove(void *, const void *, size_t);
void	*memset(void *, int, size_t);
int	 memcmp(const void *, const void *, size_t);

#endif

#define	VMK_PAGE_SHIFT	12
#define	VMK_PAGE_SIZE	4096UL
#define	VMK_PAGE_MASK	(~(VMK_PAGE_SIZE - 1))

#define	VMK_ARRAY_LEN(a)	(sizeof(a) / sizeof((a)[0]))

#endif /* !VMK_TYPES_H */

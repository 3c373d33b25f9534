/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * tap.h: one line a test; CHECK notes a failure and goes on.
 */
#ifndef TAP_H
#define	TAP_H

#include <stdio.h>

static int tap_number, tap_bad, tap_failed;

#define	CHECK(c)							\
	do {								\
		if (!(c)) {						\
			printf("# %s:%d: %s\n", __FILE__, __LINE__, #c); \
			tap_bad++;					\
		}							\
	} while (0)

#define	CHECK_EQ(a, b)							\
	do {								\
		long long a_ = (long long)(a), b_ = (long long)(b);	\
		if (a_ != b_) {						\
			printf("# %s:%d: %s is %lld (%#llx), not %s\n",	\
			    __FILE__, __LINE__, #a, a_,			\
			    (unsigned long long)a_, #b);		\
			tap_bad++;					\
		}							\
	} while (0)

static void
tap_done(const char *name)
{
	printf("%sok %d - %s\n", tap_bad != 0 ? "not " : "", ++tap_number,
	    name);
	tap_failed += tap_bad;
	tap_bad = 0;
	fflush(stdout);
}

#endif /* !TAP_H */

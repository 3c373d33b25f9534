/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * fake_cpu.h: a processor whose exits a test writes down.
 */
#ifndef FAKE_CPU_H
#define	FAKE_CPU_H

#include "vmk_arch.h"

/* Called for each entry; fills *x.  NULL: every entry is a HLT exit. */
typedef void fake_enter_fn(struct vmk_vcpu *, const struct vmk_entry *,
    struct vmk_exit *);
extern fake_enter_fn *fake_enter;
extern int fake_init_error;	/* what vmk_module_init() meets */

struct fake_vcpu {
	uint64_t		creg[VMK_NCREG];
	struct vmk_segment	seg[VMK_NSEG];
	unsigned int		shadow;
	bool			loaded;
	uint64_t		flushes;
	struct vmk_entry	last;		/* of the last entry */
};

static inline struct fake_vcpu *
fake(struct vmk_vcpu *vcpu)
{
	return (vcpu->arch);
}

/*
 * Access guest-physical memory as the processor does: through the nested
 * tables, setting accessed and dirty bits.  False: it would fault.
 */
bool	fake_access(struct vmk_vm *, uint64_t gpa, bool write, uint64_t *hpa,
	    unsigned int *level);

/* The objects behind a test's descriptors. */
struct vmk_vm *fake_last_vm(void);
struct vmk_vcpu *fake_last_vcpu(void);

#endif /* !FAKE_CPU_H */

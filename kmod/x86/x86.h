/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * x86.h: processor instructions, and the FPU and debug-register switch around
 * a CPU section (x86.c).
 */
#ifndef VMK_X86_H
#define	VMK_X86_H

#include "vmk_arch.h"

#define	MSR_EFER	0xc0000080U
#define	MSR_PRED_CMD	0x49U
#define	PRED_CMD_IBPB	1U
#define	DR6_FIXED	0xffff0ff0UL

static inline uint64_t
rdmsr(uint32_t msr)
{
	uint32_t lo, hi;

	__asm__ __volatile__("rdmsr" : "=a"(lo), "=d"(hi) : "c"(msr));
	return ((uint64_t)hi << 32 | lo);
}

static inline void
wrmsr(uint32_t msr, uint64_t v)
{
	__asm__ __volatile__("wrmsr" : : "c"(msr), "a"((uint32_t)v),
	    "d"((uint32_t)(v >> 32)) : "memory");
}

static inline uint64_t
rdtsc(void)
{
	uint32_t lo, hi;

	__asm__ __volatile__("rdtsc" : "=a"(lo), "=d"(hi));
	return ((uint64_t)hi << 32 | lo);
}

static inline uint64_t
read_cr4(void)
{
	uint64_t v;

	__asm__ __volatile__("mov %%cr4, %0" : "=r"(v));
	return (v);
}

static inline void
irq_disable(void)
{
	__asm__ __volatile__("cli" : : : "memory");
}

static inline void
irq_enable(void)
{
	__asm__ __volatile__("sti" : : : "memory");
}

static inline void
cpuid(uint32_t leaf, uint32_t sub, uint32_t o[4])
{
	__asm__ __volatile__("cpuid" : "=a"(o[0]), "=b"(o[1]), "=c"(o[2]),
	    "=d"(o[3]) : "a"(leaf), "c"(sub));
}

static inline void
xsetbv(uint64_t v)
{
	__asm__ __volatile__("xsetbv" : : "c"(0), "a"((uint32_t)v),
	    "d"((uint32_t)(v >> 32)));
}

static inline uint64_t
xgetbv(void)
{
	uint32_t lo, hi;

	__asm__ __volatile__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
	return ((uint64_t)hi << 32 | lo);
}

/*
 * An event on its way in or cut short, as EVENTINJ and EXITINTINFO (APM 2
 * 15.7.2, 15.20) and VMX's interruption information (SDM 3C 25.8.3, 25.9.2)
 * all have it; the error code stands in the upper half.
 */
#define	EVENT_VALID	0x80000000U
#define	EVENT_ERROR	0x00000800U
#define	EVENT_TYPE	0x00000700U
#define	EVENT_INTR	0x00000000U
#define	EVENT_NMI	0x00000200U
#define	EVENT_EXC	0x00000300U

/* What to deliver with this entry; it is under way then.  0: nothing. */
uint64_t x86_event(struct vmk_event_state *, const struct vmk_entry *,
	    bool protected_mode);
/* An event whose delivery was cut short is to be delivered again. */
void	x86_take_back(struct vmk_event_state *, uint64_t event);

/* What x86_load() put aside for x86_unload(); per vCPU. */
struct x86_host {
	uint64_t	xcr0;
	uint64_t	dr[4];
	uint64_t	dr7;
};

/*
 * *last is the serial number of the machine that ran on this processor before;
 * with ibpb another one's branch predictions are dropped.
 */
void	x86_load(struct vmk_vcpu *, struct x86_host *, uint64_t *last,
	    bool ibpb);
void	x86_unload(struct vmk_vcpu *, struct x86_host *);

#endif /* !VMK_X86_H */

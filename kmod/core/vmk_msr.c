/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_msr.c: model-specific and control registers.
 *
 * Theory.  Every RDMSR and WRMSR leaves the guest and comes here (the
 * permission maps deny all); what is not in the table below, nor in the two
 * switches behind it, raises #GP.
 * KVM_GET_MSRS and KVM_SET_MSRS use the same functions with host set, which
 * opens what only a VMM may write.
 *
 * A value reaches the processor only after the checks that WRMSR itself would
 * make: canonical addresses (CVE-2014-3610), valid memory types, no reserved
 * bits.  MTRRs are stored for the guest to read back and have no effect:
 * memory is write-back by the nested tables and the guest's PAT.
 *
 * Numbers: SDM 4, APM 2 appendix A.
 */
#include "x86.h"
#include "vmk_irqchip.h"

#define	MSR_TSC			0x10
#define	MSR_KVM_WALL_CLOCK	0x11
#define	MSR_KVM_SYSTEM_TIME	0x12
#define	MSR_PLATFORM_ID		0x17
#define	MSR_APICBASE		0x1b
#define	MSR_TSC_ADJUST		0x3b
#define	MSR_UCODE_REV		0x8b
#define	MSR_MTRRCAP		0xfe
#define	MSR_SYSENTER_CS		0x174
#define	MSR_SYSENTER_ESP	0x175
#define	MSR_SYSENTER_EIP	0x176
#define	MSR_MCG_CAP		0x179
#define	MSR_MCG_STATUS		0x17a
#define	MSR_MCG_CTL		0x17b
#define	MSR_MISC_ENABLE		0x1a0
#define	MSR_DEBUGCTL		0x1d9
#define	MSR_MTRR_VAR		0x200
#define	MSR_MTRR_FIX64K		0x250
#define	MSR_MTRR_FIX16K		0x258
#define	MSR_MTRR_FIX4K		0x268
#define	MSR_PAT			0x277
#define	MSR_MTRR_DEFTYPE	0x2ff
#define	MSR_MC0_CTL		0x400
#define	MSR_TSC_DEADLINE	0x6e0
#define	MSR_X2APIC_FIRST	0x800
#define	MSR_X2APIC_LAST		0x8ff
#define	MSR_STAR		0xc0000081
#define	MSR_LSTAR		0xc0000082
#define	MSR_CSTAR		0xc0000083
#define	MSR_SFMASK		0xc0000084
#define	MSR_FS_BASE		0xc0000100
#define	MSR_GS_BASE		0xc0000101
#define	MSR_KERNEL_GS		0xc0000102
#define	MSR_AMD_SYSCFG		0xc0010010
#define	MSR_AMD_HWCR		0xc0010015
#define	MSR_AMD_NB_CFG		0xc001001f
#define	MSR_AMD_INT_PENDING	0xc0010055
#define	MSR_AMD_MMIO_CFG	0xc0010058
#define	MSR_AMD_DE_CFG		0xc0011029

#define	MTRR_VCNT	8

static const uint32_t msr_list[] = {
	MSR_TSC, MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP,
	MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_SFMASK, MSR_KERNEL_GS, MSR_PAT,
	MSR_TSC_ADJUST, MSR_MISC_ENABLE, MSR_MCG_STATUS, MSR_MCG_CTL
};

const uint32_t *
vmk_msr_list(unsigned int *n)
{
	*n = VMK_ARRAY_LEN(msr_list);
	return (msr_list);
}

/* ---- control registers ------------------------------------------------- */

static bool
cs_is_long(struct vmk_vcpu *vcpu)
{
	struct vmk_segment cs;

	vmk_arch->get_seg(vcpu, VMK_CS, &cs);
	return ((cs.attr & SEG_ATTR_L) != 0);
}

/* MOV to CR0 (SDM 3A 2.5, 9.8.5). */
int
vmk_set_cr0(struct vmk_vcpu *vcpu, uint64_t v)
{
	uint64_t old = vmk_arch->get_creg(vcpu, VMK_CR0);
	uint64_t cr4 = vmk_arch->get_creg(vcpu, VMK_CR4);
	uint64_t efer = vmk_arch->get_creg(vcpu, VMK_EFER);

	if ((v >> 32) != 0)
		return (VMK_EINVAL);
	v = (v & CR0_VALID) | CR0_ET;
	if (((v & CR0_PG) != 0 && (v & CR0_PE) == 0) ||
	    ((v & CR0_NW) != 0 && (v & CR0_CD) == 0))
		return (VMK_EINVAL);
	if ((v & CR0_PG) != 0 && (old & CR0_PG) == 0 &&
	    (efer & EFER_LME) != 0) {
		if ((cr4 & CR4_PAE) == 0 || cs_is_long(vcpu))
			return (VMK_EINVAL);
		efer |= EFER_LMA;
	} else if ((v & CR0_PG) == 0 && (old & CR0_PG) != 0) {
		if ((efer & EFER_LMA) != 0 && vmk_code_bits(vcpu) == 64)
			return (VMK_EINVAL);
		if ((cr4 & CR4_PCIDE) != 0)
			return (VMK_EINVAL);
		efer &= ~EFER_LMA;
	}
	vmk_arch->set_creg(vcpu, VMK_EFER, efer);
	vmk_arch->set_creg(vcpu, VMK_CR0, v);
	/* The guest expects paging changes to take effect at once. */
	vcpu->tlb_gen = 0;
	return (0);
}

int
vmk_set_cr4(struct vmk_vcpu *vcpu, uint64_t v)
{
	uint64_t old = vmk_arch->get_creg(vcpu, VMK_CR4);
	uint64_t efer = vmk_arch->get_creg(vcpu, VMK_EFER);

	if ((v & ~vmk_cr4_supported()) != 0)
		return (VMK_EINVAL);
	if ((efer & EFER_LMA) != 0 && ((v & CR4_PAE) == 0 ||
	    ((v ^ old) & CR4_LA57) != 0))
		return (VMK_EINVAL);
	if ((v & CR4_PCIDE) != 0 && (old & CR4_PCIDE) == 0 &&
	    ((efer & EFER_LMA) == 0 ||
	    (vmk_arch->get_creg(vcpu, VMK_CR3) & 0xfff) != 0))
		return (VMK_EINVAL);
	vmk_arch->set_creg(vcpu, VMK_CR4, v);
	vcpu->tlb_gen = 0;
	return (0);
}

static int
set_efer(struct vmk_vcpu *vcpu, uint64_t v)
{
	uint64_t old = vmk_arch->get_creg(vcpu, VMK_EFER);
	uint64_t cr0 = vmk_arch->get_creg(vcpu, VMK_CR0);

	if ((v & ~(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE)) != 0)
		return (VMK_EINVAL);
	if ((cr0 & CR0_PG) != 0 && ((v ^ old) & EFER_LME) != 0)
		return (VMK_EINVAL);
	vmk_arch->set_creg(vcpu, VMK_EFER,
	    (v & ~EFER_LMA) | (old & EFER_LMA));
	vcpu->tlb_gen = 0;
	return (0);
}

int
vmk_set_xcr0(struct vmk_vcpu *vcpu, uint32_t index, uint64_t v)
{
	if (index != 0 || !vmk_xcr0_valid(v))
		return (VMK_EINVAL);
	vcpu->xcr0 = v;
	return (0);
}

/* ---- the table --------------------------------------------------------- */

static bool
memory_type_ok(unsigned int t)
{
	return (t == 0 || t == 1 || t == 4 || t == 5 || t == 6);
}

/* What may be written. */
enum msr_rule { ANY, NEVER, ADDRESS, LOW_HALF, TYPES, VARIABLE, DEFAULT_TYPE,
	STATUS, ALL_OR_NONE, CLOCK, BANK };

static bool
may_write(enum msr_rule rule, uint32_t msr, uint64_t v, bool host)
{
	uint8_t type;
	unsigned int i;

	switch (rule) {
	case ANY: case LOW_HALF:
		return (true);
	case ADDRESS:
		return (vmk_canonical(v));
	case TYPES:			/* eight of them; in PAT also UC- */
		for (i = 0; i < 8; i++) {
			type = (uint8_t)(v >> (8 * i));
			if (!memory_type_ok(type) &&
			    (msr != MSR_PAT || type != 7))
				return (false);
		}
		return (true);
	case VARIABLE:			/* bases have a type, masks none */
		return ((msr & 1) != 0 || memory_type_ok(v & 0xff));
	case DEFAULT_TYPE:
		return ((v & ~0xcffULL) == 0 && memory_type_ok(v & 0xff));
	case STATUS:			/* a guest may clear it */
		return (host || v == 0);
	case ALL_OR_NONE:
		return (v == 0 || v == ~0ULL);
	case CLOCK:
		return (host && v == 0);
	case BANK:
		return (host);
	default:
		return (false);
	}
}

/*
 * Registers that are only a value: held by the processor extension, in a
 * field of struct vmk_vcpu, or zero whatever is written.  Others have code
 * of their own below.
 */
enum msr_place { IN_CREG, IN_VCPU, IS_ZERO };
static const struct msr {
	uint32_t	first, count;
	enum msr_place	place;
	uint32_t	at;		/* enum vmk_creg, or offset */
	enum msr_rule	rule;
} table[] = {
#define	CREG(msr, r, rule)	{ msr, 1, IN_CREG, r, rule }
#define	VCPU(msr, n, field, rule)					\
	{ msr, n, IN_VCPU, offsetof(struct vmk_vcpu, field), rule }
#define	ZERO(msr, rule)		{ msr, 1, IS_ZERO, 0, rule }
	CREG(MSR_SYSENTER_CS, VMK_SYSENTER_CS, LOW_HALF),
	CREG(MSR_SYSENTER_ESP, VMK_SYSENTER_ESP, ADDRESS),
	CREG(MSR_SYSENTER_EIP, VMK_SYSENTER_EIP, ADDRESS),
	CREG(MSR_STAR, VMK_STAR, ANY),
	CREG(MSR_LSTAR, VMK_LSTAR, ADDRESS),
	CREG(MSR_CSTAR, VMK_CSTAR, ADDRESS),
	CREG(MSR_SFMASK, VMK_SFMASK, LOW_HALF),
	CREG(MSR_KERNEL_GS, VMK_KERNEL_GS, ADDRESS),
	CREG(MSR_PAT, VMK_PAT, TYPES),
	VCPU(MSR_MTRR_VAR, 2 * MTRR_VCNT, mtrr_var, VARIABLE),
	VCPU(MSR_MTRR_FIX64K, 1, mtrr_fix[0], TYPES),
	VCPU(MSR_MTRR_FIX16K, 2, mtrr_fix[1], TYPES),
	VCPU(MSR_MTRR_FIX4K, 8, mtrr_fix[3], TYPES),
	VCPU(MSR_MTRR_DEFTYPE, 1, mtrr_def_type, DEFAULT_TYPE),
	VCPU(MSR_MISC_ENABLE, 1, misc_enable, ANY),
	VCPU(MSR_MCG_STATUS, 1, mcg_status, STATUS),
	VCPU(MSR_MCG_CTL, 1, mcg_ctl, ALL_OR_NONE),
	ZERO(MSR_MCG_CAP, NEVER),		/* no banks */
	ZERO(MSR_PLATFORM_ID, NEVER),
	/* Not there; QEMU 7.2 saves and restores them anyway. */
	ZERO(MSR_KVM_WALL_CLOCK, CLOCK), ZERO(MSR_KVM_SYSTEM_TIME, CLOCK),
	{ MSR_MC0_CTL, 4 * 32, IS_ZERO, 0, BANK },
	/* Writable on hardware. */
	ZERO(MSR_UCODE_REV, ANY), ZERO(MSR_DEBUGCTL, ANY),
	ZERO(MSR_AMD_SYSCFG, ANY), ZERO(MSR_AMD_HWCR, ANY),
	ZERO(MSR_AMD_NB_CFG, ANY), ZERO(MSR_AMD_INT_PENDING, ANY),
	ZERO(MSR_AMD_MMIO_CFG, ANY), ZERO(MSR_AMD_DE_CFG, ANY),
};

static const struct msr *
lookup(uint32_t msr)
{
	unsigned int i;

	for (i = 0; i < VMK_ARRAY_LEN(table); i++)
		if (msr - table[i].first < table[i].count)
			return (&table[i]);
	return (NULL);
}

static uint64_t *
field_of(struct vmk_vcpu *vcpu, const struct msr *m, uint32_t msr)
{
	return ((uint64_t *)(void *)((uint8_t *)vcpu + m->at) +
	    (msr - m->first));
}

/* ---- the two entry points ---------------------------------------------- */

static bool
is_lapic_msr(struct vmk_vcpu *vcpu, uint32_t msr)
{
	return (msr == MSR_TSC_DEADLINE ||
	    (msr >= MSR_X2APIC_FIRST && msr <= MSR_X2APIC_LAST) ||
	    (msr == MSR_APICBASE && vcpu->lapic != NULL));
}

static int
lapic_msr(struct vmk_vcpu *vcpu, uint32_t msr, uint64_t *v, bool write,
    bool host)
{
	return (vcpu->lapic != NULL &&
	    vmk_lapic_msr(vcpu, msr, v, write, host) == 0 ? 0 : VMK_EINVAL);
}

int
vmk_msr_get(struct vmk_vcpu *vcpu, uint32_t msr, uint64_t *v, bool host)
{
	const struct msr *m = lookup(msr);
	struct vmk_segment seg;

	if (m != NULL) {
		*v = m->place == IN_CREG ?
		    vmk_arch->get_creg(vcpu, (enum vmk_creg)m->at) :
		    m->place == IN_VCPU ? *field_of(vcpu, m, msr) : 0;
		return (host || (m->rule != CLOCK && m->rule != BANK) ? 0 :
		    VMK_EINVAL);
	}
	if (is_lapic_msr(vcpu, msr))
		return (lapic_msr(vcpu, msr, v, false, host));
	switch (msr) {
	case MSR_TSC:
		*v = rdtsc() + vcpu->tsc_offset;
		return (0);
	case MSR_TSC_ADJUST:
		*v = vcpu->tsc_adjust;
		return (0);
	case MSR_APICBASE:
		*v = vcpu->apic_base;
		return (0);
	case MSR_EFER:
		*v = vmk_arch->get_creg(vcpu, VMK_EFER);
		return (0);
	case MSR_FS_BASE: case MSR_GS_BASE:
		vmk_arch->get_seg(vcpu, msr == MSR_FS_BASE ? VMK_FS : VMK_GS,
		    &seg);
		*v = seg.base;
		return (0);
	case MSR_MTRRCAP:
		*v = 0x500 | MTRR_VCNT;		/* WC, fixed ranges */
		return (0);
	default:
		return (VMK_EINVAL);
	}
}

/* SDM 3B 17.17.3: a guest's write of one of the two moves the other. */
static int
tsc_write(struct vmk_vcpu *vcpu, uint64_t offset, uint64_t adjust)
{
	vcpu->tsc_adjust = adjust;
	if (offset == vcpu->tsc_offset)
		return (0);
	vcpu->tsc_offset = offset;
	if (vcpu->lapic != NULL)
		vmk_lapic_tsc_changed(vcpu);
	return (0);
}

int
vmk_msr_set(struct vmk_vcpu *vcpu, uint32_t msr, uint64_t v, bool host)
{
	const struct msr *m = lookup(msr);
	struct vmk_segment seg;
	enum vmk_seg n;
	uint64_t moved;

	if (m != NULL) {
		if (!may_write(m->rule, msr, v, host))
			return (VMK_EINVAL);
		if (m->rule == LOW_HALF)
			v = (uint32_t)v;
		if (m->place == IN_CREG)
			vmk_arch->set_creg(vcpu, (enum vmk_creg)m->at, v);
		else if (m->place == IN_VCPU)
			*field_of(vcpu, m, msr) = v;
		return (0);
	}
	if (is_lapic_msr(vcpu, msr))
		return (lapic_msr(vcpu, msr, &v, true, host));
	switch (msr) {
	case MSR_TSC:
		moved = v - rdtsc() - vcpu->tsc_offset;
		return (tsc_write(vcpu, vcpu->tsc_offset + moved,
		    vcpu->tsc_adjust + (host ? 0 : moved)));
	case MSR_TSC_ADJUST:
		moved = v - vcpu->tsc_adjust;
		return (tsc_write(vcpu, vcpu->tsc_offset + (host ? 0 : moved),
		    v));
	case MSR_APICBASE:
		if ((v >> 48) != 0 || (v & 0x6ff) != 0)
			return (VMK_EINVAL);
		vcpu->apic_base = v;
		return (0);
	case MSR_EFER:
		return (set_efer(vcpu, v));
	case MSR_FS_BASE: case MSR_GS_BASE:
		if (!vmk_canonical(v))
			return (VMK_EINVAL);
		n = msr == MSR_FS_BASE ? VMK_FS : VMK_GS;
		vmk_arch->get_seg(vcpu, n, &seg);
		seg.base = v;
		vmk_arch->set_seg(vcpu, n, &seg);
		return (0);
	default:
		return (VMK_EINVAL);
	}
}

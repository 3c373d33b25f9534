/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_msr.c: model-specific and control registers.
 *
 * Theory.  Every RDMSR and WRMSR leaves the guest and comes here (the
 * permission maps deny all); what is not in the switch below raises #GP.
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

/* ---- storage-only registers -------------------------------------------- */

static bool
mtrr_type_ok(unsigned int t)
{
	return (t == 0 || t == 1 || t == 4 || t == 5 || t == 6);
}

static bool
pat_ok(uint64_t v)
{
	unsigned int i;

	for (i = 0; i < 8; i++, v >>= 8)
		if (!mtrr_type_ok(v & 0xff) && (v & 0xff) != 7)
			return (false);
	return (true);
}

/* Find the storage of an MTRR or machine-check bank register. */
static uint64_t *
stored(struct vmk_vcpu *vcpu, uint32_t msr, bool host)
{
	/* A VMM may fill banks that it does not show to the guest. */
	uint32_t banks = host ? 32 : (uint32_t)(vcpu->mcg_cap & 0xff);

	if (msr >= MSR_MTRR_VAR && msr < MSR_MTRR_VAR + 2 * MTRR_VCNT)
		return (&vcpu->mtrr_var[msr - MSR_MTRR_VAR]);
	if (msr == MSR_MTRR_FIX64K)
		return (&vcpu->mtrr_fix[0]);
	if (msr == MSR_MTRR_FIX16K || msr == MSR_MTRR_FIX16K + 1)
		return (&vcpu->mtrr_fix[1 + msr - MSR_MTRR_FIX16K]);
	if (msr >= MSR_MTRR_FIX4K && msr < MSR_MTRR_FIX4K + 8)
		return (&vcpu->mtrr_fix[3 + msr - MSR_MTRR_FIX4K]);
	if (msr >= MSR_MC0_CTL && msr - MSR_MC0_CTL < 4 * banks)
		return (&vcpu->mc_bank[msr - MSR_MC0_CTL]);
	return (NULL);
}

static int
stored_set(struct vmk_vcpu *vcpu, uint32_t msr, uint64_t v, bool host)
{
	uint64_t *p = stored(vcpu, msr, host);
	unsigned int i;

	if (p == NULL)
		return (VMK_EINVAL);
	if (msr >= MSR_MC0_CTL) {
		/* A guest may clear a status, not make one up. */
		if (!host && (msr & 3) != 0 && v != 0)
			return (VMK_EINVAL);
	} else if (msr >= MSR_MTRR_FIX64K) {
		for (i = 0; i < 8; i++)
			if (!mtrr_type_ok((v >> (8 * i)) & 0xff))
				return (VMK_EINVAL);
	} else if ((msr & 1) == 0 && !mtrr_type_ok(v & 0xff)) {
		return (VMK_EINVAL);
	}
	*p = v;
	return (0);
}

/* ---- the two entry points ---------------------------------------------- */

/* Registers that the processor extension holds. */
static int
creg_of(uint32_t msr)
{
	switch (msr) {
	case MSR_SYSENTER_CS:
		return (VMK_SYSENTER_CS);
	case MSR_SYSENTER_ESP:
		return (VMK_SYSENTER_ESP);
	case MSR_SYSENTER_EIP:
		return (VMK_SYSENTER_EIP);
	case MSR_STAR:
		return (VMK_STAR);
	case MSR_LSTAR:
		return (VMK_LSTAR);
	case MSR_CSTAR:
		return (VMK_CSTAR);
	case MSR_SFMASK:
		return (VMK_SFMASK);
	case MSR_KERNEL_GS:
		return (VMK_KERNEL_GS);
	case MSR_PAT:
		return (VMK_PAT);
	default:
		return (-1);
	}
}

static bool
is_lapic_msr(uint32_t msr)
{
	return (msr == MSR_TSC_DEADLINE ||
	    (msr >= MSR_X2APIC_FIRST && msr <= MSR_X2APIC_LAST));
}

int
vmk_msr_get(struct vmk_vcpu *vcpu, uint32_t msr, uint64_t *v, bool host)
{
	struct vmk_segment seg;
	uint64_t *p;
	int r = creg_of(msr);

	if (r >= 0) {
		*v = vmk_arch->get_creg(vcpu, (enum vmk_creg)r);
		return (0);
	}
	if (is_lapic_msr(msr) || (msr == MSR_APICBASE && vcpu->lapic != NULL))
		return (vcpu->lapic != NULL &&
		    vmk_lapic_msr(vcpu, msr, v, false, host) == 0 ?
		    0 : VMK_EINVAL);
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
	case MSR_MTRR_DEFTYPE:
		*v = vcpu->mtrr_def_type;
		return (0);
	case MSR_MISC_ENABLE:
		*v = vcpu->misc_enable;
		return (0);
	case MSR_MCG_CAP:
		*v = vcpu->mcg_cap;
		return (0);
	case MSR_MCG_STATUS:
		*v = vcpu->mcg_status;
		return (0);
	case MSR_MCG_CTL:
		*v = vcpu->mcg_ctl;
		return (0);
	case MSR_KVM_WALL_CLOCK: case MSR_KVM_SYSTEM_TIME:
		/* No such clock; QEMU 7.2 saves and restores it anyway. */
		*v = 0;
		return (host ? 0 : VMK_EINVAL);
	case MSR_PLATFORM_ID: case MSR_UCODE_REV: case MSR_DEBUGCTL:
	case MSR_AMD_SYSCFG: case MSR_AMD_HWCR: case MSR_AMD_NB_CFG:
	case MSR_AMD_INT_PENDING: case MSR_AMD_MMIO_CFG: case MSR_AMD_DE_CFG:
		*v = 0;
		return (0);
	default:
		p = stored(vcpu, msr, host);
		if (p == NULL)
			return (VMK_EINVAL);
		*v = *p;
		return (0);
	}
}

static int
tsc_write(struct vmk_vcpu *vcpu, uint64_t v, bool host)
{
	uint64_t offset = v - rdtsc();

	/* SDM 3B 17.17.3: a guest's write moves TSC_ADJUST along. */
	if (!host)
		vcpu->tsc_adjust += offset - vcpu->tsc_offset;
	vcpu->tsc_offset = offset;
	if (vcpu->lapic != NULL)
		vmk_lapic_tsc_changed(vcpu);
	return (0);
}

static int
creg_write(struct vmk_vcpu *vcpu, enum vmk_creg r, uint64_t v)
{
	switch (r) {
	case VMK_LSTAR: case VMK_CSTAR: case VMK_KERNEL_GS:
	case VMK_SYSENTER_ESP: case VMK_SYSENTER_EIP:
		if (!vmk_canonical(v))
			return (VMK_EINVAL);
		break;
	case VMK_SFMASK: case VMK_SYSENTER_CS:
		v &= 0xffffffffULL;
		break;
	case VMK_PAT:
		if (!pat_ok(v))
			return (VMK_EINVAL);
		break;
	default:
		break;
	}
	vmk_arch->set_creg(vcpu, r, v);
	return (0);
}

int
vmk_msr_set(struct vmk_vcpu *vcpu, uint32_t msr, uint64_t v, bool host)
{
	struct vmk_segment seg;
	int r = creg_of(msr);

	if (r >= 0)
		return (creg_write(vcpu, (enum vmk_creg)r, v));
	if (is_lapic_msr(msr) || (msr == MSR_APICBASE && vcpu->lapic != NULL))
		return (vcpu->lapic != NULL &&
		    vmk_lapic_msr(vcpu, msr, &v, true, host) == 0 ?
		    0 : VMK_EINVAL);
	switch (msr) {
	case MSR_TSC:
		return (tsc_write(vcpu, v, host));
	case MSR_TSC_ADJUST:
		if (!host) {
			vcpu->tsc_offset += v - vcpu->tsc_adjust;
			if (vcpu->lapic != NULL)
				vmk_lapic_tsc_changed(vcpu);
		}
		vcpu->tsc_adjust = v;
		return (0);
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
		r = msr == MSR_FS_BASE ? VMK_FS : VMK_GS;
		vmk_arch->get_seg(vcpu, (enum vmk_seg)r, &seg);
		seg.base = v;
		vmk_arch->set_seg(vcpu, (enum vmk_seg)r, &seg);
		return (0);
	case MSR_MTRR_DEFTYPE:
		if ((v & ~0xcffULL) != 0 || !mtrr_type_ok(v & 0xff))
			return (VMK_EINVAL);
		vcpu->mtrr_def_type = v;
		return (0);
	case MSR_MISC_ENABLE:
		vcpu->misc_enable = v;
		return (0);
	case MSR_MCG_STATUS:
		if (!host && v != 0)
			return (VMK_EINVAL);
		vcpu->mcg_status = v;
		return (0);
	case MSR_MCG_CTL:
		if (v != 0 && v != ~0ULL)
			return (VMK_EINVAL);
		vcpu->mcg_ctl = v;
		return (0);
	case MSR_KVM_WALL_CLOCK: case MSR_KVM_SYSTEM_TIME:
		return (host && v == 0 ? 0 : VMK_EINVAL);
	case MSR_UCODE_REV: case MSR_DEBUGCTL: case MSR_AMD_SYSCFG:
	case MSR_AMD_HWCR: case MSR_AMD_NB_CFG: case MSR_AMD_INT_PENDING:
	case MSR_AMD_MMIO_CFG: case MSR_AMD_DE_CFG:
		/* Writable on hardware; read as zero here. */
		return (0);
	default:
		return (stored_set(vcpu, msr, v, host));
	}
}

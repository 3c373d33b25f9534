/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_cpuid.c: what the guest is told about its processor.
 *
 * Theory.  GET_SUPPORTED_CPUID answers with the host's own leaves, each bit
 * allowed by a mask of features whose state this module switches or which
 * have none.  A feature bit that is not named below is off: hidden features
 * are RDTSCP and RDPID (TSC_AUX is not switched), PKU, XSAVES and CET
 * (IA32_XSS), AMX, SPEC_CTRL, monitors, performance counters, nested
 * virtualization, and everything that a later processor will add.
 *
 * SET_CPUID2 stores what user space wants; the CPUID instruction answers from
 * there.  Bits that follow the guest's own state are computed at each
 * execution: OSXSAVE, the local APIC bit, the size of the XSAVE area.
 *
 * Sources: SDM 2A "CPUID", APM 3 appendix E.
 */
#include "x86.h"

#define	B(n)	(1U << (n))

/*
 * Leaf 1 EDX: everything but PSE-36's neighbours PSN (18), and DS, ACPI,
 * SS, HTT, TM, PBE, which describe a package that the guest is not in.
 */
#define	MASK_1_EDX	(B(0) | B(1) | B(2) | B(3) | B(4) | B(5) | B(6) | \
	B(7) | B(8) | B(9) | B(11) | B(12) | B(13) | B(14) | B(15) | B(16) | \
	B(17) | B(19) | B(23) | B(24) | B(25) | B(26))
/*
 * Leaf 1 ECX: SSE3 PCLMUL SSSE3 FMA CX16 PCID SSE4.1 SSE4.2 MOVBE POPCNT AES
 * XSAVE AVX F16C RDRAND.
 */
#define	MASK_1_ECX	(B(0) | B(1) | B(9) | B(12) | B(13) | B(17) | B(19) | \
	B(20) | B(22) | B(23) | B(25) | B(26) | B(28) | B(29) | B(30))
/*
 * Leaf 7: FSGSBASE BMI1 AVX2 SMEP BMI2 ERMS INVPCID AVX512* RDSEED ADX SMAP
 * CLFLUSHOPT CLWB SHA; UMIP VAES VPCLMUL and the AVX512 extensions, LA57.
 */
#define	MASK_7_EBX	(B(0) | B(3) | B(5) | B(7) | B(8) | B(9) | B(10) | \
	B(16) | B(17) | B(18) | B(19) | B(20) | B(21) | B(23) | B(24) | \
	B(28) | B(29) | B(30) | B(31))
#define	MASK_7_ECX	(B(1) | B(2) | B(6) | B(8) | B(9) | B(10) | B(11) | \
	B(12) | B(14) | B(16))
#define	MASK_7_EDX	(B(2) | B(3) | B(4) | B(8))
/* 8000_0001: LAHF ABM SSE4A MISALIGN 3DNOWPREFETCH, SYSCALL NX 1G LM ... */
#define	MASK_81_ECX	(B(0) | B(5) | B(6) | B(7) | B(8))
#define	MASK_81_EDX	((MASK_1_EDX & 0x0183f3ffU) | B(11) | B(20) | \
	B(22) | B(26) | B(29))
/* 8000_0008 EBX: CLZERO, XSAVEERPTR. */
#define	MASK_88_EBX	(B(0) | B(2))

/* What the host has, read once: CPUID may itself be a costly exit. */
static struct {
	uint64_t	xcr0, cr4;
	uint32_t	xsize[8], xoffset[8];
	bool		la57;
} host;

static void
init_xcr0(const uint32_t leaf1[4])
{
	uint32_t o[4], i;
	uint64_t v;

	if ((leaf1[2] & B(27)) == 0)		/* OSXSAVE */
		return;
	/* x87, SSE, AVX; AVX512 only as a whole. */
	v = xgetbv();
	host.xcr0 = v & 0x7;
	if ((v & 0xe0) == 0xe0)
		host.xcr0 |= 0xe0;
	for (i = 2; i < 8; i++) {
		cpuid(0xd, i, o);
		host.xsize[i] = o[0];
		host.xoffset[i] = o[1];
	}
}

void
vmk_cpuid_init(void)
{
	uint32_t l1[4], l7[4] = { 0 }, max[4];
	uint64_t cr4;

	memset(&host, 0, sizeof(host));
	cpuid(0, 0, max);
	cpuid(1, 0, l1);
	if (max[0] >= 7)
		cpuid(7, 0, l7);
	init_xcr0(l1);
	cr4 = 0x1f | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE | CR4_OSFXSR |
	    CR4_OSXMMEXCPT;
	if (host.xcr0 != 0)
		cr4 |= CR4_OSXSAVE;
	if ((l1[2] & B(17)) != 0)
		cr4 |= CR4_PCIDE;
	if ((l7[1] & B(0)) != 0)
		cr4 |= CR4_FSGSBASE;
	if ((l7[1] & B(7)) != 0)
		cr4 |= CR4_SMEP;
	if ((l7[1] & B(20)) != 0)
		cr4 |= CR4_SMAP;
	if ((l7[2] & B(2)) != 0)
		cr4 |= CR4_UMIP;
	host.la57 = (l7[2] & B(16)) != 0;
	if (host.la57)
		cr4 |= CR4_LA57;
	host.cr4 = cr4;
}

uint64_t
vmk_xcr0_supported(void)
{
	return (host.xcr0);
}

uint64_t
vmk_cr4_supported(void)
{
	return (host.cr4);
}

bool
vmk_canonical(uint64_t a)
{
	unsigned int unused = host.la57 ? 7 : 16;

	return ((uint64_t)((int64_t)(a << unused) >> unused) == a);
}

/* SDM 1, 13.3: the combinations that XSETBV takes. */
bool
vmk_xcr0_valid(uint64_t v)
{
	if ((v & ~host.xcr0) != 0 || (v & 1) == 0)
		return (false);
	if ((v & 4) != 0 && (v & 2) == 0)
		return (false);
	return ((v & 0xe0) == 0 || ((v & 0xe0) == 0xe0 && (v & 4) != 0));
}

/* Bytes of a standard-format area for these components. */
uint32_t
vmk_xsave_size(uint64_t xcr0)
{
	uint32_t size = 576, i;

	for (i = 2; i < 8; i++)
		if ((xcr0 & (1ULL << i)) != 0 &&
		    host.xoffset[i] + host.xsize[i] > size)
			size = host.xoffset[i] + host.xsize[i];
	return (size);
}

struct table {
	struct abi_cpuid_entry2 *e;
	unsigned int n, max;
};

static void
add(struct table *t, uint32_t leaf, uint32_t sub, bool indexed,
    const uint32_t o[4])
{
	struct abi_cpuid_entry2 *e;

	if (t->n < t->max) {
		e = &t->e[t->n];
		memset(e, 0, sizeof(*e));
		e->function = leaf;
		e->index = sub;
		e->flags = indexed ? ABI_CPUID_SIGNIFCANT_INDEX : 0;
		e->eax = o[0];
		e->ebx = o[1];
		e->ecx = o[2];
		e->edx = o[3];
	}
	t->n++;
}

static void
add_xstate(struct table *t)
{
	uint64_t xcr0 = vmk_xcr0_supported();
	uint32_t o[4], i;

	o[0] = (uint32_t)xcr0;
	o[1] = o[2] = vmk_xsave_size(xcr0);
	o[3] = 0;
	add(t, 0xd, 0, true, o);
	/* XSAVEOPT and XGETBV with ECX 1, not XSAVEC or XSAVES. */
	cpuid(0xd, 1, o);
	o[0] &= B(0) | B(2);
	o[1] = o[2] = o[3] = 0;
	add(t, 0xd, 1, true, o);
	for (i = 2; i < 8; i++) {
		if ((xcr0 & (1ULL << i)) == 0)
			continue;
		cpuid(0xd, i, o);
		o[2] = o[3] = 0;
		add(t, 0xd, i, true, o);
	}
}

static void
add_basic(struct table *t, uint32_t max)
{
	uint32_t o[4], leaf, sub;

	for (leaf = 0; leaf <= max; leaf++) {
		cpuid(leaf, 0, o);
		switch (leaf) {
		case 0:
			o[0] = max;
			break;
		case 1:
			o[1] &= 0x0000ff00;		/* CLFLUSH only */
			o[2] = (o[2] & MASK_1_ECX) | B(21) | B(31);
			o[3] &= MASK_1_EDX;
			if (vmk_xcr0_supported() == 0)
				o[2] &= ~(B(26) | B(28));
			break;
		case 2:
			break;
		case 4:
			for (sub = 0; sub < 8; sub++) {
				cpuid(4, sub, o);
				o[0] &= ~0xffffc000U;
				add(t, 4, sub, true, o);
				if ((o[0] & 0x1f) == 0)
					break;
			}
			continue;
		case 7:
			o[0] = 0;
			o[1] &= MASK_7_EBX;
			o[2] &= MASK_7_ECX;
			o[3] &= MASK_7_EDX;
			if ((vmk_xcr0_supported() & 0xe0) == 0) {
				o[1] &= ~(B(16) | B(17) | B(21) | B(28) |
				    B(30) | B(31));
				o[2] &= ~(B(1) | B(6) | B(11) | B(12) | B(14));
				o[3] &= ~(B(2) | B(3) | B(8));
			}
			add(t, 7, 0, true, o);
			continue;
		case 0xd:
			if (vmk_xcr0_supported() != 0)
				add_xstate(t);
			continue;
		default:
			continue;
		}
		add(t, leaf, 0, false, o);
	}
}

static void
add_extended(struct table *t, uint32_t max)
{
	uint32_t o[4], leaf;

	for (leaf = 0x80000000U; leaf <= max; leaf++) {
		cpuid(leaf, 0, o);
		switch (leaf) {
		case 0x80000000U:
			o[0] = max;
			break;
		case 0x80000001U:
			o[1] = 0;
			o[2] &= MASK_81_ECX;
			o[3] &= MASK_81_EDX;
			break;
		case 0x80000002U: case 0x80000003U: case 0x80000004U:
		case 0x80000005U: case 0x80000006U:
			break;
		case 0x80000007U:
			o[0] = o[1] = o[2] = 0;
			o[3] &= B(8);			/* invariant TSC */
			break;
		case 0x80000008U:
			if ((o[0] & 0xff) > 48)
				o[0] = (o[0] & ~0xffU) | 48;
			o[0] &= 0xffff;
			o[1] &= MASK_88_EBX;
			o[2] = o[3] = 0;
			break;
		default:
			continue;
		}
		add(t, leaf, 0, false, o);
	}
}

unsigned int
vmk_cpuid_supported(struct abi_cpuid_entry2 *e, unsigned int max)
{
	/* "KVMKVMKVM": no paravirtual feature follows. */
	static const uint32_t sig[4] = { 0x40000001, 0x4b4d564b, 0x564b4d56,
		0x4d };
	static const uint32_t none[4] = { 0, 0, 0, 0 };
	struct table t = { .e = e, .max = max };
	uint32_t o[4];

	cpuid(0, 0, o);
	add_basic(&t, o[0] < 0xd ? o[0] : 0xd);
	add(&t, 0x40000000, 0, false, sig);
	add(&t, 0x40000001, 0, false, none);
	cpuid(0x80000000U, 0, o);
	if (o[0] >= 0x80000000U)
		add_extended(&t, o[0] < 0x80000008U ? o[0] : 0x80000008U);
	return (t.n);
}

static const struct abi_cpuid_entry2 *
lookup(const struct vmk_vcpu *vcpu, uint32_t leaf, uint32_t sub)
{
	const struct abi_cpuid_entry2 *e;
	uint32_t i;

	for (i = 0; i < vcpu->ncpuid; i++) {
		e = &vcpu->cpuid[i];
		if (e->function == leaf && (e->index == sub ||
		    (e->flags & ABI_CPUID_SIGNIFCANT_INDEX) == 0))
			return (e);
	}
	return (NULL);
}

/* Leaves that user space did not give read as zero (APM 3, E.2). */
void
vmk_cpuid(struct vmk_vcpu *vcpu, uint32_t leaf, uint32_t sub, uint32_t o[4])
{
	const struct abi_cpuid_entry2 *e = lookup(vcpu, leaf, sub);

	if (e == NULL) {
		o[0] = o[1] = o[2] = o[3] = 0;
		return;
	}
	o[0] = e->eax;
	o[1] = e->ebx;
	o[2] = e->ecx;
	o[3] = e->edx;
	if (leaf == 1) {
		o[2] &= ~B(27);
		if ((vmk_arch->get_creg(vcpu, VMK_CR4) & CR4_OSXSAVE) != 0)
			o[2] |= B(27);
		if ((vcpu->apic_base & 0x800) == 0)
			o[3] &= ~B(9);
	} else if (leaf == 0xd && sub == 0) {
		o[1] = vmk_xsave_size(vcpu->xcr0);
	}
}

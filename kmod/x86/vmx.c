/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmx.c: Intel's virtualization (SDM 3C, chapters 24 to 28).
 *
 * Theory.  The guest's state lives in struct vmx_vcpu.  The first entry of a
 * CPU section makes the VMCS current; each entry writes what changed, each
 * exit reads everything back, unload() clears the VMCS.  So it is never active
 * on a processor whose section has ended and may be used on any other next.
 * That costs some fifty VMREADs an exit; in exchange no request from another
 * processor ever has to fetch a VMCS.
 *
 * Fixed for the guest: CR0.NE and CR4.VMXE are one because VMX wants it,
 * CR4.MCE is one so that a machine check cannot shut the machine down, CD and
 * NW are zero.  All of CR4 and these bits of CR0 belong to the host; the guest
 * reads its own values from the shadows, and a change of them exits.
 * Everything else of CR0, paging and long mode included, is the guest's, as
 * unrestricted guest allows.
 *
 * NMIs.  With virtual NMIs the processor tracks blocking from delivery to
 * IRET; vcpu->ev.nmi_masked is copied in and out.
 *
 * SYSCALL's registers are not in the VMCS: entry and exit MSR lists switch
 * them.  GDTR and IDTR limits, LDTR and data segments of the host do not
 * survive an exit and are put back by hand.
 *
 * Translation caches.  Nested translations are tagged by the EPT root: INVEPT
 * when the machine's generation moved or the vCPU came from another
 * processor.  Linear ones are tagged by VPID: INVVPID when we, not the guest,
 * changed what they depend on.
 *
 * Speculation.  VERW before each entry (MDS), the L1 data cache is flushed
 * where the processor does not say that it need not be (L1TF), large leaves
 * are not used where they can crash the processor (CVE-2018-12207).  Sibling
 * threads are the host's affair (struct vmk_hv, or SMT switched off).
 */
#include "x86.h"
#include "vmx.h"

#define	MSR_PAT			0x277U
#define	MSR_SYSENTER_CS		0x174U
#define	MSR_FS_BASE		0xc0000100U
#define	MSR_GS_BASE		0xc0000101U
#define	MSR_ARCH_CAPS		0x10aU
#define	ARCH_CAPS_NO_L1TF	0x9U	/* RDCL_NO, SKIP_L1DFL_VMENTRY */
#define	ARCH_CAPS_NO_MULTIHIT	0x40U
#define	MSR_FLUSH_CMD		0x10bU

#define	CR0_HOST	(CR0_CD | CR0_NW | CR0_NE)
#define	INVALIDATE_ONE	1UL		/* INVEPT and INVVPID, single context */
#define	PENDING_BS	0x4000UL
/*
 * A guest that spins on a lock whose holder does not run: PAUSEs closer than
 * the gap are one loop, and one that lasts for the window exits (SDM 3C
 * 26.1.3; cycles of the TSC).
 */
#define	PLE_GAP		128
#define	PLE_WINDOW	4096

struct vmx_msr { uint32_t index, zero; uint64_t value; };
static const uint32_t switched[] = { 0xc0000081, 0xc0000082, 0xc0000083,
	0xc0000084, 0xc0000102 };	/* STAR to KERNEL_GS, in creg order */
#define	NSWITCHED	VMK_ARRAY_LEN(switched)

struct vmx_cpu {
	uint32_t	*region;	/* for VMXON */
	uint64_t	 region_pa;
	uint32_t	 on_gen;	/* == vmx_gen: VMX is on here */
	uint64_t	 last_vm;	/* x86_load() */
};

/* Bits of vmx_vcpu.dirty. */
#define	DIRTY_SEGS	0x1U
#define	DIRTY_REGS	0x2U
#define	DIRTY_PDPTE	0x4U
#define	DIRTY_ALL	0x7U

struct vmx_vcpu {
	uint32_t	*vmcs;
	uint64_t	 vmcs_pa;
	uint8_t		*vapic;		/* TPR shadow at 0x80 */
	uint64_t	 vapic_pa;
	struct vmx_msr	*msrs;		/* guest's, then at half the host's */
	uint64_t	 msrs_pa;
	uint16_t	 vpid;
	bool		 current;	/* VMCS, on this processor */
	bool		 launched, set_up, flush_linear;
	uint32_t	 dirty;
	uint32_t	 cpu;
	uint64_t	 creg[VMK_NCREG]; /* as the guest sees them */
	struct vmk_segment seg[VMK_NSEG];
	uint64_t	 pdpte[4];
	uint32_t	 interruptibility;
	uint64_t	 pending_db;
	uint32_t	 proc;		/* control word without the windows */
	struct x86_host	 host;
};

static const struct vmk_hv *vmx_hv;
static struct vmx_cpu	*vmx_cpus;
static unsigned int	 vmx_ncpus;
static uint32_t		 vmx_gen, vmx_revision;
static uint32_t		 vmx_word[VMX_NWORDS];
static uint64_t		 vmx_cr0_fixed0, vmx_cr4_fixed0;
static uint8_t		*vmx_msrpm;
static uint64_t		 vmx_msrpm_pa;
static bool		 vmx_ibpb, vmx_flush_l1;
#define	NVPIDS	1024
static uint8_t		 vmx_vpids[NVPIDS];

#define	VMX_MSRS_HALF	(VMK_PAGE_SIZE / 2 / sizeof(struct vmx_msr))

static struct vmx_vcpu *
vmx(struct vmk_vcpu *vcpu)
{
	return (vcpu->arch);
}

/* ---- instructions ------------------------------------------------------ */

static uint64_t
vmread(uint64_t field)
{
	uint64_t v = 0;

	__asm__ __volatile__("vmread %1, %0" : "=r"(v) : "r"(field) : "cc");
	return (v);
}

static void
vmwrite(uint64_t field, uint64_t v)
{
	__asm__ __volatile__("vmwrite %0, %1" : : "r"(v), "r"(field) : "cc");
}

static void
vmclear(uint64_t pa)
{
	__asm__ __volatile__("vmclear %0" : : "m"(pa) : "cc", "memory");
}

static void
vmptrld(uint64_t pa)
{
	__asm__ __volatile__("vmptrld %0" : : "m"(pa) : "cc", "memory");
}

static bool
vmxon(uint64_t pa)
{
	uint8_t failed;

	__asm__ __volatile__("vmxon %1; setna %0" : "=qm"(failed) : "m"(pa) :
	    "cc", "memory");
	return (failed == 0);
}

static void
invalidate(bool ept, uint64_t context)
{
	struct { uint64_t context, zero; } d = { context, 0 };

	if (ept)
		__asm__ __volatile__("invept %0, %1" : : "m"(d),
		    "r"(INVALIDATE_ONE) : "cc", "memory");
	else
		__asm__ __volatile__("invvpid %0, %1" : : "m"(d),
		    "r"(INVALIDATE_ONE) : "cc", "memory");
}

#define	READ_REG(name, v) __asm__ __volatile__("mov %%" name ", %0" : "=r"(v))
#define	READ_SEL(name, v) __asm__ __volatile__("mov %%" name ", %0" : "=rm"(v))

static void
write_cr4(uint64_t v)
{
	__asm__ __volatile__("mov %0, %%cr4" : : "r"(v) : "memory");
}

/* ---- module ------------------------------------------------------------ */

static void
check_unused(void *arg)
{
	if ((read_cr4() & CR4_VMXE) != 0)
		__atomic_store_n((uint32_t *)arg, 1, __ATOMIC_RELAXED);
}

static void
switch_off(void *arg)
{
	struct vmx_cpu *c = &vmx_cpus[vmk_cpu_id()];

	(void)arg;
	if (c->on_gen != vmx_gen || (read_cr4() & CR4_VMXE) == 0)
		return;
	__asm__ __volatile__("vmxoff" : : : "cc");
	write_cr4(read_cr4() & ~CR4_VMXE);
	c->on_gen = 0;
}

/* Interrupts disabled, on the processor that c belongs to. */
static bool
switch_on(struct vmx_cpu *c)
{
	uint64_t fc = rdmsr(MSR_FEATURE_CONTROL);

	if ((fc & FEATURE_CONTROL_LOCK) == 0)
		wrmsr(MSR_FEATURE_CONTROL, fc | FEATURE_CONTROL_LOCK |
		    FEATURE_CONTROL_VMXON);
	else if ((fc & FEATURE_CONTROL_VMXON) == 0)
		return (false);
	c->region[0] = vmx_revision;
	write_cr4(read_cr4() | CR4_VMXE);
	if (!vmxon(c->region_pa)) {
		write_cr4(read_cr4() & ~CR4_VMXE);
		return (false);
	}
	c->on_gen = vmx_gen;
	return (true);
}

static bool
probe_controls(void)
{
	static const uint32_t msr[VMX_NWORDS] = { 0x481, 0x482,
		MSR_VMX_PROCBASED2, 0x483, 0x484 };
	uint64_t cap;
	unsigned int i;

	for (i = 0; i < VMX_NWORDS; i++) {
		cap = rdmsr(i == VMX_PROC2 ? msr[i] : msr[i] + 0xc);
		if (!vmx_adjust(&vmx_controls[i], cap, &vmx_word[i])) {
			vmk_log("kvm: VMX control word %u is %#llx, "
			    "wanted %#x\n", i, (unsigned long long)cap,
			    vmx_controls[i].need);
			return (false);
		}
	}
	cap = rdmsr(MSR_VMX_EPT_VPID);
	if ((cap & EPT_WALK_4) == 0 || (cap & EPT_WRITE_BACK) == 0 ||
	    (cap & EPT_INVEPT) == 0 || (cap & EPT_INVEPT_SINGLE) == 0 ||
	    (cap & EPT_AD_BITS) == 0) {
		vmk_log("kvm: EPT capabilities %#llx do not suffice\n",
		    (unsigned long long)cap);
		return (false);
	}
	if ((cap & EPT_INVVPID) == 0 || (cap & EPT_INVVPID_SINGLE) == 0)
		vmx_word[VMX_PROC2] &= ~PROC2_VPID;
	if ((cap & EPT_PAGE_2M) == 0)
		vmk_vmx_ops.pte.large = 0;
	return (true);
}

static int
probe(void)
{
	uint32_t o[4], busy = 0;
	uint64_t basic, caps = 0, fc;

	cpuid(0, 0, o);
	if (o[0] < 7)
		return (VMK_ENODEV);
	cpuid(1, 0, o);
	if ((o[2] & 0x20) == 0)
		return (VMK_ENODEV);
	fc = rdmsr(MSR_FEATURE_CONTROL);
	basic = rdmsr(MSR_VMX_BASIC);
	if (vmk_xcr0_supported() == 0 || (basic & VMX_BASIC_TRUE) == 0 ||
	    ((fc & FEATURE_CONTROL_LOCK) != 0 &&
	    (fc & FEATURE_CONTROL_VMXON) == 0)) {
		vmk_log("kvm: no VMX: feature control %#llx, basic %#llx, "
		    "XCR0 %#llx\n", (unsigned long long)fc,
		    (unsigned long long)basic,
		    (unsigned long long)vmk_xcr0_supported());
		return (VMK_ENODEV);
	}
	vmx_revision = (uint32_t)basic & 0x7fffffffU;
	vmk_vmx_ops.pte.large = 0x80;
	if (!probe_controls())
		return (VMK_ENODEV);
	vmx_cr0_fixed0 = rdmsr(MSR_VMX_CR0_FIXED0) & ~(CR0_PE | CR0_PG);
	vmx_cr4_fixed0 = rdmsr(MSR_VMX_CR4_FIXED0);
	cpuid(7, 0, o);
	vmx_ibpb = (o[3] & (1U << 26)) != 0;
	if ((o[3] & (1U << 29)) != 0)
		caps = rdmsr(MSR_ARCH_CAPS);
	vmx_flush_l1 = (o[3] & (1U << 28)) != 0 &&
	    (caps & ARCH_CAPS_NO_L1TF) == 0;
	if ((caps & ARCH_CAPS_NO_MULTIHIT) == 0)
		vmk_vmx_ops.pte.large = 0;
	vmx_hv = vmk_hv_claim();
	if (vmx_hv != NULL)
		return (0);
	vmk_cpu_each(check_unused, &busy);
	return (busy != 0 ? VMK_EBUSY : 0);
}

static void
let_go(void)
{
	if (vmx_hv != NULL)
		vmk_hv_release();
	else if (vmx_cpus != NULL)
		vmk_cpu_each(switch_off, NULL);
	vmx_hv = NULL;
}

static void
free_cpus(void)
{
	unsigned int i;

	for (i = 0; vmx_cpus != NULL && i < vmx_ncpus; i++)
		if (vmx_cpus[i].region != NULL)
			vmk_pages_free(vmx_cpus[i].region, 1);
	if (vmx_cpus != NULL)
		vmk_free(vmx_cpus, vmx_ncpus * sizeof(vmx_cpus[0]));
	if (vmx_msrpm != NULL)
		vmk_pages_free(vmx_msrpm, 1);
	vmx_cpus = NULL;
	vmx_msrpm = NULL;
}

/* A bit each for reading and, 2048 bytes on, writing: SDM 3C 25.6.9. */
static void
msr_allow(uint32_t msr)
{
	uint32_t base = msr >= 0xc0000000U ? 0x400 : 0, n = msr & 0x1fff;
	uint8_t bit = (uint8_t)(1U << (n % 8));

	vmx_msrpm[base + n / 8] &= (uint8_t)~bit;
	vmx_msrpm[0x800 + base + n / 8] &= (uint8_t)~bit;
}

static int
vmx_init(void)
{
	static const uint32_t allowed[] = { MSR_SYSENTER_CS, 0x175, 0x176,
		MSR_FS_BASE, MSR_GS_BASE };
	struct vmx_cpu *c;
	unsigned int i;
	int error;

	error = probe();
	if (error != 0)
		return (error);
	vmx_gen = 1;
	vmx_ncpus = vmk_ncpus();
	vmx_cpus = vmk_alloc(vmx_ncpus * sizeof(vmx_cpus[0]));
	vmx_msrpm = vmk_pages_alloc(1, &vmx_msrpm_pa);
	if (vmx_cpus == NULL || vmx_msrpm == NULL)
		goto fail;
	for (i = 0; i < vmx_ncpus; i++) {
		c = &vmx_cpus[i];
		c->region = vmk_pages_alloc(1, &c->region_pa);
		if (c->region == NULL)
			goto fail;
	}
	memset(vmx_msrpm, 0xff, VMK_PAGE_SIZE);
	for (i = 0; i < VMK_ARRAY_LEN(allowed); i++)
		msr_allow(allowed[i]);
	for (i = 0; i < NSWITCHED; i++)
		msr_allow(switched[i]);
	return (0);
fail:
	let_go();
	free_cpus();
	return (VMK_ENOMEM);
}

static void
vmx_fini(void)
{
	let_go();
	free_cpus();
}

static void
vmx_resume(void)
{
	vmx_gen++;
}

/* ---- vCPU -------------------------------------------------------------- */

static uint16_t
vpid_alloc(void)
{
	uint16_t i;

	if ((vmx_word[VMX_PROC2] & PROC2_VPID) == 0)
		return (0);
	if (vmx_hv != NULL)
		return (vmx_hv->vpid_alloc());
	for (i = 1; i < NVPIDS; i++)
		if (__atomic_exchange_n(&vmx_vpids[i], 1, __ATOMIC_ACQ_REL)
		    == 0)
			return (i);
	return (0);
}

static void
vpid_free(uint16_t vpid)
{
	if (vpid == 0)
		return;
	if (vmx_hv != NULL)
		vmx_hv->vpid_free(vpid);
	else
		__atomic_store_n(&vmx_vpids[vpid], 0, __ATOMIC_RELEASE);
}

static void
vmx_vcpu_destroy(struct vmk_vcpu *vcpu)
{
	struct vmx_vcpu *s = vmx(vcpu);

	if (s->vmcs != NULL)
		vmk_pages_free(s->vmcs, 1);
	if (s->vapic != NULL)
		vmk_pages_free(s->vapic, 1);
	if (s->msrs != NULL)
		vmk_pages_free(s->msrs, 1);
	vpid_free(s->vpid);
	vmk_free(s, sizeof(*s));
	vcpu->arch = NULL;
}

static int
vmx_vcpu_create(struct vmk_vcpu *vcpu)
{
	struct vmx_vcpu *s;
	unsigned int i;

	s = vmk_alloc(sizeof(*s));
	if (s == NULL)
		return (VMK_ENOMEM);
	vcpu->arch = s;
	s->vmcs = vmk_pages_alloc(1, &s->vmcs_pa);
	s->vapic = vmk_pages_alloc(1, &s->vapic_pa);
	s->msrs = vmk_pages_alloc(1, &s->msrs_pa);
	if (s->vmcs == NULL || s->vapic == NULL || s->msrs == NULL) {
		vmx_vcpu_destroy(vcpu);
		return (VMK_ENOMEM);
	}
	s->vpid = vpid_alloc();
	s->vmcs[0] = vmx_revision;
	s->cpu = ~0U;
	s->dirty = DIRTY_ALL;
	s->creg[VMK_DR6] = DR6_FIXED;
	s->creg[VMK_DR7] = 0x400;
	for (i = 0; i < NSWITCHED; i++)
		s->msrs[i].index = s->msrs[VMX_MSRS_HALF + i].index =
		    switched[i];
	return (0);
}

static uint64_t
vmx_get_creg(struct vmk_vcpu *vcpu, enum vmk_creg r)
{
	struct vmx_vcpu *s = vmx(vcpu);

	if (r == VMK_CR8)
		return (s->vapic[0x80] >> 4);
	if (r >= VMK_STAR && r <= VMK_KERNEL_GS)
		return (s->msrs[r - VMK_STAR].value);
	return (s->creg[r]);
}

static void
vmx_set_creg(struct vmk_vcpu *vcpu, enum vmk_creg r, uint64_t v)
{
	struct vmx_vcpu *s = vmx(vcpu);

	if (r == VMK_CR8) {
		s->vapic[0x80] = (uint8_t)(v << 4);
		return;
	}
	if (r >= VMK_STAR && r <= VMK_KERNEL_GS) {
		s->msrs[r - VMK_STAR].value = v;
		return;
	}
	s->creg[r] = v;
	s->dirty |= DIRTY_REGS;
	if (r == VMK_CR0 || r == VMK_CR3 || r == VMK_CR4 || r == VMK_EFER) {
		s->flush_linear = true;
		s->dirty |= DIRTY_PDPTE;
	}
}

static void
vmx_get_seg(struct vmk_vcpu *vcpu, enum vmk_seg n, struct vmk_segment *out)
{
	*out = vmx(vcpu)->seg[n];
}

static void
vmx_set_seg(struct vmk_vcpu *vcpu, enum vmk_seg n,
    const struct vmk_segment *in)
{
	vmx(vcpu)->seg[n] = *in;
	vmx(vcpu)->dirty |= DIRTY_SEGS;
}

static unsigned int
vmx_get_shadow(struct vmk_vcpu *vcpu)
{
	uint32_t i = vmx(vcpu)->interruptibility;

	return (((i & INTR_STI) != 0 ? ABI_SHADOW_STI : 0) |
	    ((i & INTR_MOV_SS) != 0 ? ABI_SHADOW_MOV_SS : 0));
}

static void
vmx_set_shadow(struct vmk_vcpu *vcpu, unsigned int shadow)
{
	struct vmx_vcpu *s = vmx(vcpu);

	s->interruptibility &= ~(INTR_STI | INTR_MOV_SS);
	/* Entry takes one of them, and STI's only with IF set. */
	if ((shadow & ABI_SHADOW_MOV_SS) != 0)
		s->interruptibility |= INTR_MOV_SS;
	else if ((shadow & ABI_SHADOW_STI) != 0)
		s->interruptibility |= (vcpu->rflags & RFLAGS_IF) != 0 ?
		    INTR_STI : INTR_MOV_SS;
}

/* The page-directory pointers of PAE paging are part of the VMCS. */
static void
vmx_prepare(struct vmk_vcpu *vcpu)
{
	struct vmx_vcpu *s = vmx(vcpu);
	uint64_t cr3 = s->creg[VMK_CR3] & 0xffffffe0UL;

	if ((s->dirty & DIRTY_PDPTE) == 0)
		return;
	memset(s->pdpte, 0, sizeof(s->pdpte));
	if ((s->creg[VMK_CR0] & CR0_PG) != 0 &&
	    (s->creg[VMK_CR4] & CR4_PAE) != 0 &&
	    (s->creg[VMK_EFER] & EFER_LMA) == 0)
		(void)vmk_gpa_read(vcpu->vm, cr3, s->pdpte, sizeof(s->pdpte));
}

/* ---- VMCS -------------------------------------------------------------- */

/* What never changes for this vCPU. */
static void
write_constants(struct vmk_vcpu *vcpu, struct vmx_vcpu *s)
{
	uint32_t proc2 = vmx_word[VMX_PROC2];

	if (s->vpid == 0)
		proc2 &= ~PROC2_VPID;
	s->proc = vmx_word[VMX_PROC];
	vmwrite(F_PIN, vmx_word[VMX_PIN]);
	vmwrite(F_PROC2, proc2);
	if ((proc2 & PROC2_PAUSE_LOOP) != 0) {
		vmwrite(F_PLE_GAP, PLE_GAP);
		vmwrite(F_PLE_WINDOW, PLE_WINDOW);
	}
	vmwrite(F_EXIT, vmx_word[VMX_EXIT]);
	vmwrite(F_VPID, s->vpid);
	vmwrite(F_EPTP, vcpu->vm->mem.npt_pa | 6 | 3 << 3 | 1 << 6);
	vmwrite(F_MSR_BITMAP, vmx_msrpm_pa);
	vmwrite(F_VIRTUAL_APIC, s->vapic_pa);
	vmwrite(F_TPR_THRESHOLD, 0);
	vmwrite(F_LINK, ~0UL);
	vmwrite(F_PF_MASK, 0);
	vmwrite(F_PF_MATCH, 0);
	vmwrite(F_CR3_TARGETS, 0);
	vmwrite(F_ENTRY_LOAD, s->msrs_pa);
	vmwrite(F_ENTRY_LOAD_N, NSWITCHED);
	vmwrite(F_EXIT_STORE, s->msrs_pa);
	vmwrite(F_EXIT_STORE_N, NSWITCHED);
	vmwrite(F_EXIT_LOAD, s->msrs_pa + VMK_PAGE_SIZE / 2);
	vmwrite(F_EXIT_LOAD_N, NSWITCHED);
	vmwrite(F_CR0_MASK, CR0_HOST);
	vmwrite(F_CR4_MASK, ~0UL);
	vmwrite(F_DEBUGCTL, 0);
	vmwrite(F_ACTIVITY, 0);
	vmwrite(F_HOST_RIP, (uint64_t)(uintptr_t)vmx_exited);
}

struct table_register { uint16_t limit; uint64_t base; }
	__attribute__((__packed__));

/* The host's registers that an exit does not restore by itself. */
struct vmx_saved {
	struct table_register gdtr, idtr;
	uint16_t ldtr, ds, es, fs, gs;
	uint64_t fs_base, gs_base;
};

static uint64_t
tr_base(const struct table_register *gdtr, uint16_t tr)
{
	const uint8_t *d = (const uint8_t *)(uintptr_t)gdtr->base +
	    (tr & 0xfff8U);

	return ((uint64_t)d[2] | (uint64_t)d[3] << 8 | (uint64_t)d[4] << 16 |
	    (uint64_t)d[7] << 24 | (uint64_t)d[8] << 32 |
	    (uint64_t)d[9] << 40 | (uint64_t)d[10] << 48 |
	    (uint64_t)d[11] << 56);
}

/* Host state: read from the processor at each entry (CVE-2014-3690). */
static void
write_host(struct vmx_vcpu *s, struct vmx_saved *h)
{
	struct vmx_msr *m = &s->msrs[VMX_MSRS_HALF];
	uint16_t cs, ss, tr;
	uint64_t v;
	unsigned int i;

	__asm__ __volatile__("sgdt %0" : "=m"(h->gdtr));
	__asm__ __volatile__("sidt %0" : "=m"(h->idtr));
	__asm__ __volatile__("sldt %0" : "=m"(h->ldtr));
	__asm__ __volatile__("str %0" : "=m"(tr));
	READ_SEL("cs", cs);
	READ_SEL("ss", ss);
	READ_SEL("ds", h->ds);
	READ_SEL("es", h->es);
	READ_SEL("fs", h->fs);
	READ_SEL("gs", h->gs);
	h->fs_base = rdmsr(MSR_FS_BASE);
	h->gs_base = rdmsr(MSR_GS_BASE);
	READ_REG("cr0", v);
	vmwrite(F_HOST_CR0, v);
	READ_REG("cr3", v);
	vmwrite(F_HOST_CR3, v);
	vmwrite(F_HOST_CR4, read_cr4());
	vmwrite(F_HOST_CS, cs);
	vmwrite(F_HOST_SS, ss);
	vmwrite(F_HOST_DS, 0);
	vmwrite(F_HOST_ES, 0);
	vmwrite(F_HOST_FS, 0);
	vmwrite(F_HOST_GS, 0);
	vmwrite(F_HOST_TR, tr);
	vmwrite(F_HOST_FS_BASE, h->fs_base);
	vmwrite(F_HOST_GS_BASE, h->gs_base);
	vmwrite(F_HOST_TR_BASE, tr_base(&h->gdtr, tr));
	vmwrite(F_HOST_GDTR, h->gdtr.base);
	vmwrite(F_HOST_IDTR, h->idtr.base);
	vmwrite(F_HOST_SYSENTER_CS, rdmsr(MSR_SYSENTER_CS));
	vmwrite(F_HOST_SYSENTER_ESP, rdmsr(0x175));
	vmwrite(F_HOST_SYSENTER_EIP, rdmsr(0x176));
	vmwrite(F_HOST_PAT, rdmsr(MSR_PAT));
	vmwrite(F_HOST_EFER, rdmsr(MSR_EFER));
	for (i = 0; i < NSWITCHED; i++)
		m[i].value = rdmsr(switched[i]);
}

static void
restore_host(const struct vmx_saved *h)
{
	__asm__ __volatile__("lgdt %0" : : "m"(h->gdtr));
	__asm__ __volatile__("lidt %0" : : "m"(h->idtr));
	if (h->ldtr != 0)
		__asm__ __volatile__("lldt %0" : : "m"(h->ldtr));
	if (h->ds != 0)
		__asm__ __volatile__("mov %0, %%ds" : : "rm"(h->ds));
	if (h->es != 0)
		__asm__ __volatile__("mov %0, %%es" : : "rm"(h->es));
	/* Loading a selector loads a base with it. */
	if (h->fs != 0) {
		__asm__ __volatile__("mov %0, %%fs" : : "rm"(h->fs));
		wrmsr(MSR_FS_BASE, h->fs_base);
	}
	if (h->gs != 0) {
		__asm__ __volatile__("mov %0, %%gs" : : "rm"(h->gs));
		wrmsr(MSR_GS_BASE, h->gs_base);
	}
}

static void
write_segs(const struct vmx_vcpu *s)
{
	const struct vmk_segment *g;
	uint64_t n;

	for (n = 0; n < VMK_NSEG; n++) {
		g = &s->seg[n];
		vmwrite(F_LIMIT_ES + 2 * n, g->limit);
		vmwrite(F_BASE_ES + 2 * n, g->base);
		if (n > VMK_TR)
			continue;
		vmwrite(F_GUEST_ES + 2 * n, g->selector);
		vmwrite(F_AR_ES + 2 * n, vmx_access_rights(g));
	}
}

static void
read_segs(struct vmx_vcpu *s)
{
	struct vmk_segment *g;
	uint64_t n;

	for (n = 0; n < VMK_NSEG; n++) {
		g = &s->seg[n];
		g->limit = (uint32_t)vmread(F_LIMIT_ES + 2 * n);
		g->base = vmread(F_BASE_ES + 2 * n);
		if (n > VMK_TR)
			continue;
		g->selector = (uint16_t)vmread(F_GUEST_ES + 2 * n);
		g->attr = vmx_attr((uint32_t)vmread(F_AR_ES + 2 * n));
	}
}

static void
write_regs(const struct vmx_vcpu *s)
{
	const uint64_t *r = s->creg;

	vmwrite(F_CR0, (r[VMK_CR0] & ~(CR0_CD | CR0_NW)) | vmx_cr0_fixed0);
	vmwrite(F_CR0_SHADOW, r[VMK_CR0]);
	vmwrite(F_CR3, r[VMK_CR3]);
	vmwrite(F_CR4, r[VMK_CR4] | CR4_MCE | vmx_cr4_fixed0);
	vmwrite(F_CR4_SHADOW, r[VMK_CR4]);
	vmwrite(F_EFER, r[VMK_EFER]);
	vmwrite(F_PAT, r[VMK_PAT]);
	vmwrite(F_DR7, r[VMK_DR7]);
	vmwrite(F_SYSENTER_CS, r[VMK_SYSENTER_CS]);
	vmwrite(F_SYSENTER_ESP, r[VMK_SYSENTER_ESP]);
	vmwrite(F_SYSENTER_EIP, r[VMK_SYSENTER_EIP]);
}

static void
read_regs(struct vmx_vcpu *s)
{
	uint64_t *r = s->creg;
	unsigned int i;

	r[VMK_CR0] = (vmread(F_CR0) & ~CR0_HOST) | (r[VMK_CR0] & CR0_HOST);
	r[VMK_CR3] = vmread(F_CR3);
	r[VMK_EFER] = vmread(F_EFER);
	r[VMK_DR7] = vmread(F_DR7);
	r[VMK_SYSENTER_CS] = vmread(F_SYSENTER_CS);
	r[VMK_SYSENTER_ESP] = vmread(F_SYSENTER_ESP);
	r[VMK_SYSENTER_EIP] = vmread(F_SYSENTER_EIP);
	for (i = 0; i < 4; i++)
		s->pdpte[i] = vmread(F_PDPTE0 + 2 * i);
}

static void
write_dirty(struct vmx_vcpu *s)
{
	unsigned int i;

	if ((s->dirty & DIRTY_SEGS) != 0)
		write_segs(s);
	if ((s->dirty & DIRTY_REGS) != 0)
		write_regs(s);
	if ((s->dirty & DIRTY_PDPTE) != 0)
		for (i = 0; i < 4; i++)
			vmwrite(F_PDPTE0 + 2 * i, s->pdpte[i]);
	s->dirty = 0;
}

/* ---- entry ------------------------------------------------------------- */

static void
vmx_load(struct vmk_vcpu *vcpu)
{
	x86_load(vcpu, &vmx(vcpu)->host, &vmx_cpus[vmk_cpu_id()].last_vm,
	    vmx_ibpb);
}

static void
vmx_unload(struct vmk_vcpu *vcpu)
{
	struct vmx_vcpu *s = vmx(vcpu);

	if (s->current)
		vmclear(s->vmcs_pa);
	s->current = false;
	x86_unload(vcpu, &s->host);
}

/* The windows, the event, what belongs to this one entry. */
static void
write_entry(struct vmk_vcpu *vcpu, struct vmx_vcpu *s,
    const struct vmk_entry *e)
{
	struct vmk_event_state *ev = &vcpu->ev;
	uint32_t proc = s->proc;
	uint32_t i = s->interruptibility & (INTR_STI | INTR_MOV_SS);
	uint64_t event, rflags = vcpu->rflags | RFLAGS_FIXED |
	    (e->single_step ? RFLAGS_TF : 0);

	/*
	 * The window opens after IRET, or behind a shadow.  Without an NMI to
	 * deliver, nobody needs to know when IRET runs (e->nmi_window).
	 */
	if (ev->nmi_pending > 0)
		proc |= PROC_NMI_WINDOW;
	if (e->irq_window)
		proc |= PROC_IRQ_WINDOW;
	if (e->cr8_exit)
		proc |= PROC_CR8_LOAD;
	vmwrite(F_PROC, proc);
	/* The guest enters and leaves long mode by itself. */
	vmwrite(F_ENTRY, vmx_word[VMX_ENTRY] |
	    ((s->creg[VMK_EFER] & EFER_LMA) != 0 ? ENTRY_LONG_MODE : 0));
	vmwrite(F_EXC_BITMAP, 1U << VMK_DB | 1U << VMK_AC | 1U << VMK_MC |
	    (e->trap_bp ? 1U << VMK_BP : 0));
	event = x86_event(ev, e, (s->creg[VMK_CR0] & CR0_PE) != 0);
	vmwrite(F_ENTRY_INFO, (uint32_t)event);
	vmwrite(F_ENTRY_ERROR, event >> 32 & 0xffffU);
	/* Delivery of an NMI sets the blocking itself (SDM 3C 27.3.1.5). */
	if (ev->nmi_masked && e->inject != VMK_INJ_NMI)
		i |= INTR_NMI;
	/* A VMM may have cleared IF since. */
	if ((rflags & RFLAGS_IF) == 0)
		i &= ~INTR_STI;
	vmwrite(F_INTERRUPTIBILITY, i);
	if ((rflags & RFLAGS_TF) != 0 && (i & (INTR_STI | INTR_MOV_SS)) != 0)
		s->pending_db |= PENDING_BS;
	vmwrite(F_PENDING_DB, s->pending_db);
	vmwrite(F_TSC_OFFSET, vcpu->tsc_offset);
	vmwrite(F_RSP, vcpu->gpr[VMK_RSP]);
	vmwrite(F_RIP, vcpu->rip);
	vmwrite(F_RFLAGS, rflags);
}

static void
take_back(struct vmk_vcpu *vcpu, enum vmx_field event, enum vmx_field error)
{
	x86_take_back(&vcpu->ev, vmread(event) | vmread(error) << 32);
}

static void
read_exit(struct vmk_vcpu *vcpu, struct vmx_vcpu *s, struct vmx_exit *v)
{
	struct vmk_event_state *ev = &vcpu->ev;

	v->reason = (uint32_t)vmread(F_REASON);
	v->qualification = vmread(F_QUALIFICATION);
	v->int_info = (uint32_t)vmread(F_INT_INFO);
	v->int_error = (uint32_t)vmread(F_INT_ERROR);
	v->insn_len = (uint32_t)vmread(F_INSN_LEN);
	v->gpa = vmread(F_GPA);
	v->rip = vmread(F_RIP);
	if ((v->reason & REASON_ENTRY_FAILED) != 0) {
		take_back(vcpu, F_ENTRY_INFO, F_ENTRY_ERROR);
		return;
	}
	vcpu->rip = v->rip;
	vcpu->gpr[VMK_RSP] = vmread(F_RSP);
	vcpu->rflags = vmread(F_RFLAGS);
	read_regs(s);
	read_segs(s);
	s->pending_db = vmread(F_PENDING_DB);
	s->interruptibility = (uint32_t)vmread(F_INTERRUPTIBILITY);
	ev->nmi_masked = (s->interruptibility & INTR_NMI) != 0;
	take_back(vcpu, F_VECTORING, F_VECTORING_ERROR);
	/* IRET had unblocked NMIs and then faulted: it will run again. */
	if ((vmread(F_VECTORING) & EVENT_VALID) == 0 &&
	    (((v->reason & 0xffff) == R_EXCEPTION &&
	    (v->int_info & INT_NMI_IRET) != 0) ||
	    ((v->reason & 0xffff) == R_EPT_VIOLATION &&
	    (v->qualification & INT_NMI_IRET) != 0)))
		ev->nmi_masked = true;
}

/* #DB: the processor leaves DR6 and DR7 to us (SDM 3C 28.2.1). */
static void
note_debug(struct vmx_vcpu *s, const struct vmx_exit *v)
{
	if ((v->reason & 0xffff) != R_EXCEPTION ||
	    (v->int_info & 0xff) != VMK_DB)
		return;
	s->creg[VMK_DR6] = (s->creg[VMK_DR6] & ~0xfUL) |
	    (v->qualification & 0xe00fUL) | DR6_FIXED;
}

/* NMIs and machine checks end the guest; their handlers are the host's. */
static void
serve_host(const struct vmx_exit *v)
{
	uint32_t reason = v->reason & 0xffff;

	if (reason == R_MC_ENTRY || (reason == R_EXCEPTION &&
	    (v->int_info & 0xff) == VMK_MC))
		__asm__ __volatile__("int $18");
	else if (reason == R_EXCEPTION &&
	    (v->int_info & EVENT_TYPE) == EVENT_NMI)
		__asm__ __volatile__("int $2");
}

static void
make_current(struct vmx_vcpu *s)
{
	if (s->current)
		return;
	if (!s->set_up)
		vmclear(s->vmcs_pa);	/* makes it one */
	vmptrld(s->vmcs_pa);
	s->current = true;
	s->launched = false;
}

static int
enter_current(struct vmk_vcpu *vcpu, struct vmx_vcpu *s,
    const struct vmk_entry *e, bool flush, struct vmx_exit *v)
{
	static const uint16_t zero;
	struct vmx_saved h;
	int failed;

	if (!s->set_up) {
		write_constants(vcpu, s);
		s->set_up = true;
	}
	write_dirty(s);
	write_host(s, &h);
	write_entry(vcpu, s, e);
	if (flush || s->cpu != vcpu->cpu)
		invalidate(true, vcpu->vm->mem.npt_pa | 6 | 3 << 3 | 1 << 6);
	if (s->vpid != 0 && (s->flush_linear || s->cpu != vcpu->cpu))
		invalidate(false, s->vpid);
	s->flush_linear = false;
	s->cpu = vcpu->cpu;
	__asm__ __volatile__("mov %0, %%cr2" : : "r"(s->creg[VMK_CR2]));
	__asm__ __volatile__("mov %0, %%dr6" : : "r"(s->creg[VMK_DR6]));
	if (vmx_flush_l1)
		wrmsr(MSR_FLUSH_CMD, 1);
	__asm__ __volatile__("verw %0" : : "m"(zero) : "cc");

	failed = vmx_enter_guest(vcpu->gpr, s->launched);

	READ_REG("cr2", s->creg[VMK_CR2]);
	READ_REG("dr6", s->creg[VMK_DR6]);
	restore_host(&h);
	if (failed == 0) {
		s->launched = true;
		read_exit(vcpu, s, v);
		note_debug(s, v);
	} else {
		v->qualification = vmread(F_ERROR);
		take_back(vcpu, F_ENTRY_INFO, F_ENTRY_ERROR);
	}
	return (failed);
}

static void
vmx_enter(struct vmk_vcpu *vcpu, const struct vmk_entry *e,
    struct vmk_exit *x)
{
	const struct vmk_hv *hv = vmx_hv;
	struct vmx_vcpu *s = vmx(vcpu);
	struct vmx_cpu *c;
	struct vmx_exit v = { 0 };
	bool flush, own_tf = (vcpu->rflags & RFLAGS_TF) != 0;
	int failed = 1;

	irq_disable();
	if (!vmk_run_ready(vcpu, &flush))
		goto aborted;
	if (hv != NULL && !hv->sibling_enter())
		goto refused;
	c = &vmx_cpus[vcpu->cpu];
	if (hv != NULL || c->on_gen == vmx_gen || switch_on(c)) {
		make_current(s);
		failed = enter_current(vcpu, s, e, flush, &v);
	}
	if (hv != NULL)
		hv->sibling_leave();
	vmk_run_left(vcpu);
	if (failed == 0)
		serve_host(&v);
	irq_enable();

	if (failed != 0) {
		/* A flush that was due may not have happened. */
		s->cpu = ~0U;
		x->kind = VMK_X_INVALID;
		x->code = REASON_ENTRY_FAILED | v.qualification;
		return;
	}
	if (e->single_step && !own_tf)
		vcpu->rflags &= ~RFLAGS_TF;
	vmx_decode(&v, x);
	return;
refused:
	/* Translations may still be stale at the next try. */
	s->cpu = ~0U;
aborted:
	vmk_run_left(vcpu);
	irq_enable();
	x->kind = VMK_X_ABORTED;
}

struct vmk_arch_ops vmk_vmx_ops = {
	.name = "Intel VMX with EPT and unrestricted guest",
	.pte = {
		.levels = 4,
		.table = 0x7,		/* R W X */
		.leaf = 0x75,		/* R X, write-back, ignore PAT */
		.write = 0x2,
		.large = 0x80,
		.dirty = 0x200,
	},
	.init = vmx_init,
	.fini = vmx_fini,
	.resume = vmx_resume,
	.vcpu_create = vmx_vcpu_create,
	.vcpu_destroy = vmx_vcpu_destroy,
	.get_creg = vmx_get_creg,
	.set_creg = vmx_set_creg,
	.get_seg = vmx_get_seg,
	.set_seg = vmx_set_seg,
	.get_shadow = vmx_get_shadow,
	.set_shadow = vmx_set_shadow,
	.prepare = vmx_prepare,
	.load = vmx_load,
	.unload = vmx_unload,
	.enter = vmx_enter,
};

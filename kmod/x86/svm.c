/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * svm.c: AMD's virtualization (APM 2, chapter 15).
 *
 * Theory.  One VMCB per vCPU holds the guest's state that VMRUN switches.
 * What must never differ between guest and host is fixed in it and hidden
 * from the guest: EFER.SVME is one (VMRUN demands it), CR4.MCE is one (a
 * machine check with MCE clear shuts the machine down), CR0.CD and CR0.NW are
 * zero (the guest's caching is the nested tables' and PAT's affair).  The
 * guest's own values of those bits are kept beside and win when the VMM
 * reads them.  A guest that reads CR0 or CR4 itself sees the real bits.
 *
 * The smallest machine is the reference: nested paging and nothing else,
 * which is what QEMU's TCG offers.  Next-RIP saving, decode assists,
 * flush-by-ASID and clean bits are used where present.  Intercepted
 * instructions without a next RIP are decoded for their length.  Of the VMCB
 * only that is called clean which no entry changes: a new ASID, which a vCPU
 * gets when it comes from another processor, makes all of it dirty.
 *
 * Intercepts.  All of SVM's instructions (CVE-2020-7467), #AC and #DB (CVE-
 * 2015-5307, CVE-2015-8104), #MC, every port and every MSR but those that
 * VMLOAD and VMSAVE switch.  The permission maps are one constant each for
 * all machines, so no request can open them (CVE-2020-24718).
 *
 * Translation caches.  An ASID is good on one processor for one generation
 * of that processor's counter.  To flush a guest it gets the next ASID; when
 * these run out everything is flushed and numbering starts again.  Without
 * flush-by-ASID that is still one full flush in nasid flushes.
 *
 * Per-processor state is made at load, switched on at the first entry on that
 * processor, switched off at unload.  Nobody else may use SVM meanwhile, unless
 * the host has a multiplexor (struct vmk_hv), which then owns EFER.SVME, the
 * host save area and the ASIDs.
 */
#include "x86.h"
#include "svm.h"

#define	MSR_VM_CR	0xc0010114U
#define	MSR_VM_HSAVE	0xc0010117U
#define	VM_CR_SVMDIS	0x10U

#define	FEATURE_NP		0x01U
#define	FEATURE_NRIPS		0x08U
#define	FEATURE_CLEAN		0x20U
#define	FEATURE_FLUSHBYASID	0x40U
#define	FEATURE_DECODE		0x80U

/* Permission maps, ASID, nested paging and PAT: APM 2 15.15.3. */
#define	CLEAN_IOPM		0x02U
#define	CLEAN_ASID		0x04U
#define	CLEAN_NP		0x10U
#define	CLEAN_ALWAYS		(CLEAN_IOPM | CLEAN_ASID | CLEAN_NP)

#define	TLB_FLUSH_ALL		1
#define	TLB_FLUSH_GUEST		3

struct svm_cpu {
	void		*hsave;		/* VMRUN's own use */
	void		*host;		/* VMSAVE page */
	uint64_t	 hsave_pa, host_pa;
	uint32_t	 on_gen;	/* == svm_gen: SVME is set here */
	uint64_t	 asid_gen;
	uint32_t	 next_asid;
	uint64_t	 last_vm;	/* x86_load() */
};

struct svm_vcpu {
	struct svm_vmcb	*vmcb;
	uint64_t	 vmcb_pa;
	uint64_t	 cr0_hidden;	/* CD, NW as the guest set them */
	uint64_t	 cr4_hidden;	/* MCE */
	uint32_t	 cpu;
	uint64_t	 asid_gen;
	struct vmk_hv_tag tag;
	struct x86_host	 host;
};

static const struct vmk_hv *svm_hv;	/* NULL: all is ours */
static struct svm_cpu	*svm_cpus;
static unsigned int	 svm_ncpus;
static uint32_t		 svm_gen;
static uint32_t		 svm_nasid;
static uint32_t		 svm_features;
static bool		 svm_ibpb;
static uint8_t		*svm_iopm, *svm_msrpm;
static uint64_t		 svm_iopm_pa, svm_msrpm_pa;

#define	IOPM_PAGES	4	/* 3 used, a power of two allocated */
#define	MSRPM_PAGES	2

static struct svm_vcpu *
svm(struct vmk_vcpu *vcpu)
{
	return (vcpu->arch);
}

/* ---- module ------------------------------------------------------------ */

static void
check_unused(void *arg)
{
	if ((rdmsr(MSR_EFER) & EFER_SVME) != 0)
		__atomic_store_n((uint32_t *)arg, 1, __ATOMIC_RELAXED);
}

static void
switch_off(void *arg)
{
	(void)arg;
	if ((rdmsr(MSR_EFER) & EFER_SVME) == 0)
		return;
	wrmsr(MSR_EFER, rdmsr(MSR_EFER) & ~EFER_SVME);
	wrmsr(MSR_VM_HSAVE, 0);
}

/* Nothing is known of this processor's caches: the next ASID flushes all. */
static void
forget_caches(struct svm_cpu *c)
{
	c->asid_gen++;
	c->next_asid = svm_nasid;
}

/* Interrupts disabled, on the processor that c belongs to. */
static void
switch_on(struct svm_cpu *c)
{
	wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SVME);
	wrmsr(MSR_VM_HSAVE, c->hsave_pa);
	c->on_gen = svm_gen;
	forget_caches(c);
}

static int
probe(void)
{
	uint32_t o[4], busy = 0;

	cpuid(0x80000000U, 0, o);
	if (o[0] < 0x8000000aU)
		return (VMK_ENODEV);
	cpuid(0x80000001U, 0, o);
	if ((o[2] & 4) == 0)
		return (VMK_ENODEV);
	cpuid(0x8000000aU, 0, o);
	svm_nasid = o[1];
	svm_features = o[3];
	if ((svm_features & FEATURE_NP) == 0 || svm_nasid < 2 ||
	    vmk_xcr0_supported() == 0)
		return (VMK_ENODEV);
	if ((rdmsr(MSR_VM_CR) & VM_CR_SVMDIS) != 0)
		return (VMK_ENODEV);
	cpuid(0x80000008U, 0, o);
	svm_ibpb = (o[1] & (1U << 12)) != 0;
	svm_hv = vmk_hv_claim();
	if (svm_hv != NULL)
		return (0);
	vmk_cpu_each(check_unused, &busy);
	return (busy != 0 ? VMK_EBUSY : 0);
}

static void
let_go(void)
{
	if (svm_hv != NULL)
		vmk_hv_release();
	else
		vmk_cpu_each(switch_off, NULL);
	svm_hv = NULL;
}

static void
free_cpus(void)
{
	unsigned int i;

	for (i = 0; svm_cpus != NULL && i < svm_ncpus; i++) {
		if (svm_cpus[i].hsave != NULL)
			vmk_pages_free(svm_cpus[i].hsave, 1);
		if (svm_cpus[i].host != NULL)
			vmk_pages_free(svm_cpus[i].host, 1);
	}
	if (svm_cpus != NULL)
		vmk_free(svm_cpus, svm_ncpus * sizeof(svm_cpus[0]));
	if (svm_iopm != NULL)
		vmk_pages_free(svm_iopm, IOPM_PAGES);
	if (svm_msrpm != NULL)
		vmk_pages_free(svm_msrpm, MSRPM_PAGES);
	svm_cpus = NULL;
	svm_iopm = svm_msrpm = NULL;
}

/* Two bits an MSR, read then write: APM 2 15.11. */
static void
msr_allow(uint32_t msr)
{
	uint32_t base = msr >= 0xc0000000U ? 0x800 : 0, n = msr & 0x1fff;

	svm_msrpm[base + n / 4] &= (uint8_t)~(3U << (2 * (n % 4)));
}

static int
svm_init(void)
{
	static const uint32_t allowed[] = { 0x174, 0x175, 0x176, 0xc0000081,
		0xc0000082, 0xc0000083, 0xc0000084, 0xc0000100, 0xc0000101,
		0xc0000102 };
	struct svm_cpu *c;
	unsigned int i;
	int error;

	error = probe();
	if (error != 0)
		return (error);
	svm_gen = 1;
	svm_ncpus = vmk_ncpus();
	svm_cpus = vmk_alloc(svm_ncpus * sizeof(svm_cpus[0]));
	svm_iopm = vmk_pages_alloc(IOPM_PAGES, &svm_iopm_pa);
	svm_msrpm = vmk_pages_alloc(MSRPM_PAGES, &svm_msrpm_pa);
	if (svm_cpus == NULL || svm_iopm == NULL || svm_msrpm == NULL)
		goto fail;
	for (i = 0; i < svm_ncpus; i++) {
		c = &svm_cpus[i];
		c->hsave = vmk_pages_alloc(1, &c->hsave_pa);
		c->host = vmk_pages_alloc(1, &c->host_pa);
		if (c->hsave == NULL || c->host == NULL)
			goto fail;
	}
	memset(svm_iopm, 0xff, IOPM_PAGES * VMK_PAGE_SIZE);
	memset(svm_msrpm, 0xff, MSRPM_PAGES * VMK_PAGE_SIZE);
	for (i = 0; i < VMK_ARRAY_LEN(allowed); i++)
		msr_allow(allowed[i]);
	return (0);
fail:
	let_go();
	free_cpus();
	return (VMK_ENOMEM);
}

static void
svm_fini(void)
{
	let_go();
	free_cpus();
}

static void
svm_resume(void)
{
	svm_gen++;
}

/* ---- vCPU -------------------------------------------------------------- */

static int
svm_vcpu_create(struct vmk_vcpu *vcpu)
{
	struct svm_vmcb *v;
	struct svm_vcpu *s;

	s = vmk_alloc(sizeof(*s));
	if (s == NULL)
		return (VMK_ENOMEM);
	s->vmcb = vmk_pages_alloc(1, &s->vmcb_pa);
	if (s->vmcb == NULL) {
		vmk_free(s, sizeof(*s));
		return (VMK_ENOMEM);
	}
	vcpu->arch = s;
	v = s->vmcb;
	v->icept[0] = SVM_ICEPT_CR_WRITE(4);
	v->icept[2] = 1U << VMK_DB | 1U << VMK_AC | 1U << VMK_MC;
	v->icept[3] = SVM_I3_INTR | SVM_I3_NMI | SVM_I3_SMI | SVM_I3_INIT |
	    SVM_I3_CR0_SEL | SVM_I3_RDPMC | SVM_I3_CPUID | SVM_I3_RSM |
	    SVM_I3_INVD | SVM_I3_HLT | SVM_I3_INVLPGA | SVM_I3_IO |
	    SVM_I3_MSR | SVM_I3_SHUTDOWN;
	v->icept[4] = SVM_I4_VMRUN | SVM_I4_VMMCALL | SVM_I4_VMLOAD |
	    SVM_I4_VMSAVE | SVM_I4_STGI | SVM_I4_CLGI | SVM_I4_SKINIT |
	    SVM_I4_RDTSCP | SVM_I4_WBINVD | SVM_I4_MONITOR | SVM_I4_MWAIT |
	    SVM_I4_XSETBV | SVM_I4_RDPRU;
	v->iopm_pa = svm_iopm_pa;
	v->msrpm_pa = svm_msrpm_pa;
	v->v_intr_masking = 1;
	v->np_enable = 1;
	v->n_cr3 = vcpu->vm->mem.npt_pa;
	v->efer = EFER_SVME;
	v->cr4 = CR4_MCE;
	return (0);
}

static void
svm_vcpu_destroy(struct vmk_vcpu *vcpu)
{
	vmk_pages_free(svm(vcpu)->vmcb, 1);
	vmk_free(svm(vcpu), sizeof(struct svm_vcpu));
	vcpu->arch = NULL;
}

/* Where the VMCB has those that need no more than that. */
#define	AT(field)	offsetof(struct svm_vmcb, field)
static const uint16_t creg_offset[VMK_NCREG] = {
	[VMK_CR2] = AT(cr2), [VMK_CR3] = AT(cr3), [VMK_DR6] = AT(dr6),
	[VMK_DR7] = AT(dr7), [VMK_PAT] = AT(g_pat), [VMK_STAR] = AT(star),
	[VMK_LSTAR] = AT(lstar), [VMK_CSTAR] = AT(cstar),
	[VMK_SFMASK] = AT(sfmask), [VMK_KERNEL_GS] = AT(kernel_gs),
	[VMK_SYSENTER_CS] = AT(sysenter_cs),
	[VMK_SYSENTER_ESP] = AT(sysenter_esp),
	[VMK_SYSENTER_EIP] = AT(sysenter_eip),
};

static uint64_t *
creg_slot(struct svm_vmcb *v, enum vmk_creg r)
{
	return ((uint64_t *)(void *)((uint8_t *)v + creg_offset[r]));
}

static uint64_t
svm_get_creg(struct vmk_vcpu *vcpu, enum vmk_creg r)
{
	struct svm_vcpu *s = svm(vcpu);
	struct svm_vmcb *v = s->vmcb;

	switch (r) {
	case VMK_CR0:
		return (v->cr0 | s->cr0_hidden);
	case VMK_CR4:
		return ((v->cr4 & ~CR4_MCE) | s->cr4_hidden);
	case VMK_CR8:
		return (v->v_tpr & 0xf);
	case VMK_EFER:
		return (v->efer & ~EFER_SVME);
	default:
		return (*creg_slot(v, r));
	}
}

static void
svm_set_creg(struct vmk_vcpu *vcpu, enum vmk_creg r, uint64_t val)
{
	struct svm_vcpu *s = svm(vcpu);
	struct svm_vmcb *v = s->vmcb;

	switch (r) {
	case VMK_CR0:
		s->cr0_hidden = val & (CR0_CD | CR0_NW);
		v->cr0 = val & ~(CR0_CD | CR0_NW);
		break;
	case VMK_CR4:
		s->cr4_hidden = val & CR4_MCE;
		v->cr4 = val | CR4_MCE;
		break;
	case VMK_CR8:
		v->v_tpr = val & 0xf;
		break;
	case VMK_EFER:
		v->efer = val | EFER_SVME;
		break;
	default:
		if (r == VMK_PAT)
			v->clean &= ~CLEAN_NP;
		*creg_slot(v, r) = val;
		break;
	}
}

/* The VMCB's order is ES CS SS DS FS GS GDTR LDTR IDTR TR. */
static struct svm_seg *
seg_slot(struct svm_vmcb *v, enum vmk_seg n)
{
	switch (n) {
	case VMK_LDTR:
		return (&v->ldtr);
	case VMK_TR:
		return (&v->tr);
	case VMK_GDTR:
		return (&v->gdtr);
	case VMK_IDTR:
		return (&v->idtr);
	default:
		return (&v->es + n);
	}
}

static void
svm_get_seg(struct vmk_vcpu *vcpu, enum vmk_seg n, struct vmk_segment *out)
{
	struct svm_vmcb *v = svm(vcpu)->vmcb;
	const struct svm_seg *s = seg_slot(v, n);

	out->base = s->base;
	out->limit = s->limit;
	out->selector = s->selector;
	out->attr = s->attr;
	/* The privilege level is its own field; SS.DPL follows it. */
	if (n == VMK_SSEG)
		out->attr = (uint16_t)((s->attr & ~0x60U) |
		    ((v->cpl & 3U) << 5));
}

static void
svm_set_seg(struct vmk_vcpu *vcpu, enum vmk_seg n,
    const struct vmk_segment *in)
{
	struct svm_vmcb *v = svm(vcpu)->vmcb;
	struct svm_seg *s = seg_slot(v, n);

	s->base = in->base;
	s->limit = in->limit;
	s->selector = in->selector;
	s->attr = in->attr & 0xfff;
	if (n == VMK_SSEG)
		v->cpl = SEG_ATTR_DPL(in->attr);
}

static unsigned int
svm_get_shadow(struct vmk_vcpu *vcpu)
{
	/* One bit for both kinds. */
	return ((svm(vcpu)->vmcb->shadow & 1) != 0 ? ABI_SHADOW_STI : 0);
}

static void
svm_set_shadow(struct vmk_vcpu *vcpu, unsigned int shadow)
{
	svm(vcpu)->vmcb->shadow = shadow != 0;
}

/* ---- entry ------------------------------------------------------------- */

static void
svm_load(struct vmk_vcpu *vcpu)
{
	x86_load(vcpu, &svm(vcpu)->host, &svm_cpus[vmk_cpu_id()].last_vm,
	    svm_ibpb);
}

static void
svm_unload(struct vmk_vcpu *vcpu)
{
	x86_unload(vcpu, &svm(vcpu)->host);
}

static void
new_asid(struct svm_vcpu *s, struct svm_cpu *c)
{
	s->vmcb->clean = 0;
	s->vmcb->tlb_control = 0;
	if (c->next_asid >= svm_nasid) {
		c->asid_gen++;
		c->next_asid = 1;
		s->vmcb->tlb_control = TLB_FLUSH_ALL;
	}
	s->vmcb->asid = c->next_asid++;
	s->asid_gen = c->asid_gen;
}

static void
choose_asid(struct svm_vcpu *s, struct svm_cpu *c, uint32_t cpu, bool flush)
{
	if (svm_hv != NULL) {
		s->vmcb->tlb_control = svm_hv->asid(&s->tag,
		    (svm_features & FEATURE_FLUSHBYASID) != 0, flush,
		    &s->vmcb->asid);
		return;
	}
	if (s->cpu != cpu || s->asid_gen != c->asid_gen ||
	    s->vmcb->asid == 0) {
		new_asid(s, c);
		s->cpu = cpu;
	} else if (flush) {
		if ((svm_features & FEATURE_FLUSHBYASID) != 0)
			s->vmcb->tlb_control = TLB_FLUSH_GUEST;
		else
			new_asid(s, c);
	} else {
		s->vmcb->tlb_control = 0;
	}
}

static void
set_intercepts(struct svm_vmcb *v, const struct vmk_entry *e)
{
	v->icept[0] = SVM_ICEPT_CR_WRITE(4) |
	    (e->cr8_exit ? SVM_ICEPT_CR_WRITE(8) : 0);
	v->icept[2] = 1U << VMK_DB | 1U << VMK_AC | 1U << VMK_MC |
	    (e->trap_bp ? 1U << VMK_BP : 0);
	v->icept[3] &= ~(SVM_I3_VINTR | SVM_I3_IRET);
	v->v_irq = 0;
	if (e->nmi_window)
		v->icept[3] |= SVM_I3_IRET;
	if (e->irq_window) {
		/*
		 * A virtual interrupt that is never taken: its intercept
		 * fires as soon as the guest could take one (APM 2 15.21.4).
		 */
		v->icept[3] |= SVM_I3_VINTR;
		v->v_irq = 1;
		v->v_intr_prio = 0x1f;		/* highest, ignore TPR */
		v->v_intr_vector = 0;
	}
}

/* Delivery was cut short: keep the event. */
static void
take_back(struct vmk_vcpu *vcpu, uint64_t event)
{
	uint8_t vector = (uint8_t)event;

	/* It had been accepted; QEMU's TCG reports the host's own STI here. */
	if ((event & EVENT_VALID) != 0)
		svm(vcpu)->vmcb->shadow = 0;
	/* INT3 and INTO stand at their instruction; they run again. */
	if ((event & EVENT_TYPE) == EVENT_EXC && (vector == VMK_BP ||
	    vector == VMK_OF))
		return;
	x86_take_back(&vcpu->ev, event);
}

static void
decode_io(struct svm_vmcb *v, struct vmk_exit *x)
{
	uint64_t i = v->exitinfo1;	/* APM 2 15.10.2 */

	x->kind = VMK_X_IO;
	x->io.port = (uint16_t)(i >> 16);
	x->io.in = (i & 1) != 0;
	x->io.string = (i & 4) != 0;
	x->io.size = (i >> 4) & 7;
	if (x->io.size != 1 && x->io.size != 2 && x->io.size != 4)
		x->kind = VMK_X_UNKNOWN;
}

static enum vmk_exit_kind
simple_kind(uint64_t code)
{
	switch (code) {
	case SVM_X_INTR: case SVM_X_NMI: case SVM_X_SMI: case SVM_X_INIT:
		return (VMK_X_NONE);
	case SVM_X_VINTR:
		return (VMK_X_IRQ_WINDOW);
	case SVM_X_IRET:
		return (VMK_X_NMI_WINDOW);
	case SVM_X_CPUID:
		return (VMK_X_CPUID);
	case SVM_X_HLT:
		return (VMK_X_HLT);
	case SVM_X_XSETBV:
		return (VMK_X_XSETBV);
	case SVM_X_INVD: case SVM_X_WBINVD:
		return (VMK_X_CACHE);
	case SVM_X_CR0_SEL: case SVM_X_CR_WRITE + 0: case SVM_X_CR_WRITE + 4:
	case SVM_X_CR_WRITE + 8:
		return (VMK_X_CR_WRITE);
	case SVM_X_VMMCALL:
		return (VMK_X_HYPERCALL);
	case SVM_X_RDPMC:
		return (VMK_X_GP);
	case SVM_X_RSM: case SVM_X_INVLPGA: case SVM_X_VMRUN:
	case SVM_X_VMLOAD: case SVM_X_VMSAVE: case SVM_X_STGI:
	case SVM_X_CLGI: case SVM_X_SKINIT: case SVM_X_RDTSCP:
	case SVM_X_MONITOR: case SVM_X_MWAIT: case SVM_X_MWAIT_COND:
	case SVM_X_RDPRU:
		return (VMK_X_UD);
	case SVM_X_SHUTDOWN:
		return (VMK_X_SHUTDOWN);
	case SVM_X_INVALID:
		return (VMK_X_INVALID);
	default:
		return (VMK_X_UNKNOWN);
	}
}

static void
decode_exit(struct svm_vmcb *v, struct vmk_exit *x)
{
	x->code = v->exitcode;
	x->info1 = v->exitinfo1;
	x->info2 = v->exitinfo2;
	if (v->exitcode == SVM_X_NPF) {
		x->kind = (v->exitinfo1 & SVM_NPF_WALK) != 0 ?
		    VMK_X_NESTED_WALK : VMK_X_NESTED_FAULT;
		x->gpa = v->exitinfo2;
		x->write = (v->exitinfo1 & SVM_NPF_WRITE) != 0;
		if ((svm_features & FEATURE_DECODE) != 0) {
			x->ninsn = v->insn_len & 0xf;	/* APM 2 15.8.4 */
			x->insn = v->insn;
		}
		return;
	}
	if (v->exitcode == SVM_X_IO) {
		decode_io(v, x);
		return;
	}
	if (v->exitcode >= SVM_X_EXC && v->exitcode < SVM_X_EXC + 32) {
		x->kind = VMK_X_EXCEPTION;
		x->vector = (uint8_t)(v->exitcode - SVM_X_EXC);
		x->error_code = (uint32_t)v->exitinfo1;
		/* The host's handler has seen it; see svm_enter(). */
		if (x->vector == VMK_MC)
			x->kind = VMK_X_NONE;
		return;
	}
	if (v->exitcode == SVM_X_MSR)
		x->kind = (v->exitinfo1 & 1) != 0 ? VMK_X_WRMSR : VMK_X_RDMSR;
	else
		x->kind = simple_kind(v->exitcode);
	/* A MOV and its register; CLTS and LMSW have bit 63 clear: 15.8.1. */
	if (x->kind == VMK_X_CR_WRITE && (v->exitinfo1 >> 63) != 0 &&
	    (svm_features & FEATURE_DECODE) != 0) {
		x->mov_cr.valid = true;
		x->mov_cr.cr = v->exitcode == SVM_X_CR0_SEL ? 0 :
		    v->exitcode & 0xf;
		x->mov_cr.gpr = v->exitinfo1 & 0xf;
	}
	if ((svm_features & FEATURE_NRIPS) != 0 && v->next_rip > v->rip &&
	    v->next_rip - v->rip <= VMK_INSN_MAX)
		x->insn_len = (uint8_t)(v->next_rip - v->rip);
}

static void
svm_enter(struct vmk_vcpu *vcpu, const struct vmk_entry *e,
    struct vmk_exit *x)
{
	struct svm_vcpu *s = svm(vcpu);
	struct svm_vmcb *v = s->vmcb;
	struct svm_cpu *c;
	bool flush, own_tf = (vcpu->rflags & RFLAGS_TF) != 0;

	irq_disable();
	if (!vmk_run_ready(vcpu, &flush)) {
		vmk_run_left(vcpu);
		irq_enable();
		x->kind = VMK_X_ABORTED;
		return;
	}
	c = &svm_cpus[vcpu->cpu];
	if (svm_hv == NULL && c->on_gen != svm_gen)
		switch_on(c);
	choose_asid(s, c, vcpu->cpu, flush);
	set_intercepts(v, e);
	v->eventinj = x86_event(&vcpu->ev, e, (v->cr0 & CR0_PE) != 0);
	v->tsc_offset = vcpu->tsc_offset;
	v->rax = vcpu->gpr[VMK_RAX];
	v->rsp = vcpu->gpr[VMK_RSP];
	v->rip = vcpu->rip;
	v->rflags = vcpu->rflags | RFLAGS_FIXED |
	    (e->single_step ? RFLAGS_TF : 0);

	svm_enter_guest(s->vmcb_pa, vcpu->gpr, c->host_pa);

	if (v->exitcode == SVM_X_INVALID) {
		/* Nor whether a flush that was due has happened. */
		vcpu->tlb_gen = 0;
		forget_caches(c);
	}
	vmk_run_left(vcpu);
	if (v->exitcode == SVM_X_EXC + VMK_MC)
		__asm__ __volatile__("int $18");
	irq_enable();

	vcpu->gpr[VMK_RAX] = v->rax;
	vcpu->gpr[VMK_RSP] = v->rsp;
	vcpu->rip = v->rip;
	vcpu->rflags = v->rflags;
	if (e->single_step && !own_tf)
		vcpu->rflags &= ~RFLAGS_TF;
	/* VMRUN did not happen: the event is still to be delivered. */
	take_back(vcpu, v->exitcode == SVM_X_INVALID ? v->eventinj :
	    v->exitintinfo);
	v->eventinj = 0;
	v->clean = svm_hv == NULL && (svm_features & FEATURE_CLEAN) != 0 &&
	    v->exitcode != SVM_X_INVALID ? CLEAN_ALWAYS : 0;
	decode_exit(v, x);
}

static int	svm_ops_init(void);

struct vmk_arch_ops vmk_svm_ops = {
	.name = "AMD SVM with nested paging",
	.pte = {
		.levels = 4,
		.table = 0x27,		/* P W U A */
		.leaf = 0x25,		/* P U A */
		.write = 0x02,
		.large = 0x80,
		.dirty = 0x40,
	},
	.init = svm_ops_init,
	.fini = svm_fini,
	.resume = svm_resume,
	.vcpu_create = svm_vcpu_create,
	.vcpu_destroy = svm_vcpu_destroy,
	.get_creg = svm_get_creg,
	.set_creg = svm_set_creg,
	.get_seg = svm_get_seg,
	.set_seg = svm_set_seg,
	.get_shadow = svm_get_shadow,
	.set_shadow = svm_set_shadow,
	.load = svm_load,
	.unload = svm_unload,
	.enter = svm_enter,
};

static int
svm_ops_init(void)
{
	/* Nested tables have the depth of the host's own (APM 2 15.25.3). */
	vmk_svm_ops.pte.levels = (read_cr4() & CR4_LA57) != 0 ? 5 : 4;
	return (svm_init());
}

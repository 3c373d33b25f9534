/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_vcpu.c: a vCPU's life, and its state for KVM_GET_* and KVM_SET_*.
 *
 * Theory.  A vCPU is built completely, entered into its machine's table and
 * then given a descriptor that was prepared before (CVE-2019-6974).  Each
 * request runs under vcpu->lock, taken interruptibly, which is also held for
 * the whole of KVM_RUN: a second thread's KVM_RUN waits (CVE class "RUN from
 * two threads").
 *
 * What comes from user space is copied once, checked, then applied; a request
 * that fails its checks changes nothing.  The state that can be set is wider
 * than what a processor accepts at an entry; the processor's refusal is
 * KVM_EXIT_FAIL_ENTRY.  It must never be wider than what the host survives:
 * everything that the host itself loads (XSAVE area, debug registers, MSRs)
 * is checked here.  What goes out comes from zeroed structures
 * (CVE-2010-3881).
 */
#include "vmk_arch.h"
#include "vmk_irqchip.h"

static struct vmk_vcpu *
vcpu_by_id(struct vmk_vm *vm, uint32_t id)
{
	struct vmk_vcpu *vcpu;
	uint32_t i;

	for (i = 0; (vcpu = vmk_vcpu_at(vm, i)) != NULL; i++)
		if (vcpu->id == id)
			return (vcpu);
	return (NULL);
}

/* ---- reset ------------------------------------------------------------- */

/* Processor state after RESET or INIT: SDM 3A table 9-1. */
static const uint64_t reset_creg[VMK_DR7 + 1] = {
	[VMK_CR0] = CR0_CD | CR0_NW | CR0_ET,
	[VMK_DR6] = 0xffff0ff0,
	[VMK_DR7] = 0x400,
};

void
vmk_vcpu_reset(struct vmk_vcpu *vcpu, bool init)
{
	struct vmk_segment s;
	unsigned int i;

	memset(vcpu->gpr, 0, sizeof(vcpu->gpr));
	vcpu->gpr[VMK_RDX] = 0x600;
	vcpu->rip = 0xfff0;
	vcpu->rflags = RFLAGS_FIXED;
	memset(&vcpu->ev, 0, sizeof(vcpu->ev));
	vcpu->em.pending = VMK_PEND_NONE;
	vcpu->debug_stepped = vcpu->ext_pending = false;
	vcpu->tlb_gen = 0;
	memset(vcpu->dr, 0, sizeof(vcpu->dr));
	for (i = VMK_CR0; i <= VMK_DR7; i++)
		vmk_arch->set_creg(vcpu, (enum vmk_creg)i, reset_creg[i]);
	vmk_arch->set_shadow(vcpu, 0);

	memset(&s, 0, sizeof(s));
	s.limit = 0xffff;
	s.attr = SEG_ATTR_P | SEG_ATTR_S | 3;
	for (i = VMK_ES; i <= VMK_GS; i++)
		vmk_arch->set_seg(vcpu, (enum vmk_seg)i, &s);
	s.attr = SEG_ATTR_P | 2;
	vmk_arch->set_seg(vcpu, VMK_LDTR, &s);
	s.attr = SEG_ATTR_P | 11;
	vmk_arch->set_seg(vcpu, VMK_TR, &s);
	s.attr = 0;
	vmk_arch->set_seg(vcpu, VMK_GDTR, &s);
	vmk_arch->set_seg(vcpu, VMK_IDTR, &s);
	s.selector = 0xf000;
	s.base = 0xffff0000;
	s.attr = SEG_ATTR_P | SEG_ATTR_S | 11;
	vmk_arch->set_seg(vcpu, VMK_CS, &s);

	if (vcpu->lapic != NULL)
		vmk_lapic_reset(vcpu, init);
	if (init)
		return;
	vcpu->xcr0 = 1;
	/* FCW and MXCSR at their reset values; nothing else in use. */
	memset(vcpu->xsave, 0, VMK_XSAVE_SIZE);
	vcpu->xsave[0] = 0x40;
	vcpu->xsave[24] = 0x80;
	vcpu->xsave[25] = 0x1f;
	vcpu->xsave[512] = 3;
	vcpu->misc_enable = 1;			/* fast strings */
	if (vcpu->lapic == NULL)
		vcpu->apic_base = 0xfee00800 |
		    (vcpu->id == VMK_BOOT_ID ? 0x100 : 0);
	vmk_arch->set_creg(vcpu, VMK_PAT, 0x0007040600070406ULL);
	for (i = VMK_STAR; i <= VMK_SYSENTER_EIP; i++)
		vmk_arch->set_creg(vcpu, (enum vmk_creg)i, 0);
}

/* ---- life -------------------------------------------------------------- */

void
vmk_vcpu_destroy(struct vmk_vcpu *vcpu)
{
	if (vcpu->lapic != NULL)
		vmk_lapic_destroy(vcpu);
	if (vcpu->arch != NULL)
		vmk_arch->vcpu_destroy(vcpu);
	if (vcpu->xsave != NULL)
		vmk_pages_free(vcpu->xsave, 1);
	if (vcpu->shared.va != NULL)
		vmk_shared_free(&vcpu->shared);
	if (vcpu->cpuid != NULL)
		vmk_free(vcpu->cpuid, VMK_MAX_CPUID * sizeof(vcpu->cpuid[0]));
	vmk_waitq_fini(&vcpu->waitq);
	vmk_mutex_fini(&vcpu->lock);
	vmk_free(vcpu, sizeof(*vcpu));
	vmk_mem_uncharge(VMK_VCPU_PAGES);
}

static int
vcpu_build(struct vmk_vm *vm, uint32_t id, struct vmk_vcpu **out)
{
	struct vmk_vcpu *vcpu;
	uint64_t pa;
	int error = VMK_ENOMEM;

	if (!vmk_mem_charge(VMK_VCPU_PAGES))
		return (VMK_ENOMEM);
	vcpu = vmk_alloc(sizeof(*vcpu));
	if (vcpu == NULL) {
		vmk_mem_uncharge(VMK_VCPU_PAGES);
		return (VMK_ENOMEM);
	}
	vcpu->obj.kind = VMK_OBJ_VCPU;
	vcpu->vm = vm;
	vcpu->id = id;
	vmk_mutex_init(&vcpu->lock, "vmk vcpu");
	vmk_waitq_init(&vcpu->waitq, "vmk vcpu");
	vcpu->xsave = vmk_pages_alloc(1, &pa);
	vcpu->cpuid = vmk_alloc(VMK_MAX_CPUID * sizeof(vcpu->cpuid[0]));
	if (vcpu->xsave == NULL || vcpu->cpuid == NULL)
		goto fail;
	error = vmk_shared_alloc(&vcpu->shared, ABI_RUN_PAGES);
	if (error != 0) {
		vcpu->shared.va = NULL;
		goto fail;
	}
	vcpu->run = (struct abi_run *)(void *)vcpu->shared.va;
	error = vmk_arch->vcpu_create(vcpu);
	if (error != 0) {
		vcpu->arch = NULL;
		goto fail;
	}
	if (vm->irqchip_mode != VMK_IRQCHIP_NONE) {
		error = vmk_lapic_create(vcpu);
		if (error != 0) {
			vcpu->lapic = NULL;
			goto fail;
		}
	}
	vmk_vcpu_reset(vcpu, false);
	vcpu->tsc_offset = vm->tsc_base;
	vcpu->mp_state = vcpu->lapic == NULL || id == VMK_BOOT_ID ?
	    ABI_MP_RUNNABLE : ABI_MP_UNINITIALIZED;
	*out = vcpu;
	return (0);
fail:
	vmk_vcpu_destroy(vcpu);
	return (error);
}

/* KVM_CREATE_VCPU; vm->lock held. */
int
vmk_vcpu_create(struct vmk_vm *vm, uint32_t id, int *fd)
{
	struct vmk_fd_ticket ticket;
	struct vmk_vcpu *vcpu;
	int error;

	if (id >= VMK_MAX_VCPUS)			/* CVE-2013-4587 */
		return (VMK_EINVAL);
	if (vcpu_by_id(vm, id) != NULL)
		return (VMK_EEXIST);
	if (vm->nvcpus == VMK_MAX_VCPUS)
		return (VMK_EINVAL);
	error = vcpu_build(vm, id, &vcpu);
	if (error != 0)
		return (error);
	error = vmk_fd_prepare(&ticket, "kvm-vcpu");
	if (error != 0) {
		vmk_vcpu_destroy(vcpu);
		return (error);
	}
	vcpu->index = vm->nvcpus;
	vm->vcpu[vcpu->index] = vcpu;
	if (vcpu->index == 0)
		vm->ring = (struct abi_coalesced_ring *)(void *)
		    (vcpu->shared.va + ABI_COALESCED_PAGE * VMK_PAGE_SIZE);
	vmk_vm_get(vm);
	__atomic_store_n(&vm->nvcpus, vcpu->index + 1, __ATOMIC_RELEASE);
	*fd = ticket.fd;
	vmk_fd_commit(&ticket, &vcpu->obj);
	return (0);
}

/* ---- general and segment registers ------------------------------------- */

uint64_t
vmk_vcpu_cr8(struct vmk_vcpu *vcpu)
{
	return (vcpu->lapic != NULL ? vmk_lapic_get_cr8(vcpu) :
	    vmk_arch->get_creg(vcpu, VMK_CR8));
}

static const uint8_t regs_order[VMK_NGPR] = { VMK_RAX, VMK_RBX, VMK_RCX,
	VMK_RDX, VMK_RSI, VMK_RDI, VMK_RSP, VMK_RBP, VMK_R8, VMK_R9, VMK_R10,
	VMK_R11, VMK_R12, VMK_R13, VMK_R14, VMK_R15 };

static int
get_regs(struct vmk_vcpu *vcpu, struct abi_regs *r)
{
	uint64_t v[VMK_NGPR];
	unsigned int i;

	for (i = 0; i < VMK_NGPR; i++)
		v[i] = vcpu->gpr[regs_order[i]];
	memcpy(r, v, sizeof(v));
	r->rip = vcpu->rip;
	r->rflags = vcpu->rflags;
	return (0);
}

static int
set_regs(struct vmk_vcpu *vcpu, const struct abi_regs *r)
{
	uint64_t v[VMK_NGPR];
	unsigned int i;

	memcpy(v, r, sizeof(v));
	for (i = 0; i < VMK_NGPR; i++)
		vcpu->gpr[regs_order[i]] = v[i];
	vcpu->rip = r->rip;
	/* Reserved bits: SDM 1, 3.4.3. */
	vcpu->rflags = (r->rflags & 0x3f7fd7ULL) | RFLAGS_FIXED;
	vcpu->ev.exc_pending = false;
	return (0);
}

static void
seg_out(struct vmk_vcpu *vcpu, enum vmk_seg n, struct abi_segment *a)
{
	struct vmk_segment s;

	vmk_arch->get_seg(vcpu, n, &s);
	a->base = s.base;
	a->limit = s.limit;
	a->selector = s.selector;
	a->type = s.attr & SEG_ATTR_TYPE;
	a->s = (s.attr & SEG_ATTR_S) != 0;
	a->dpl = SEG_ATTR_DPL(s.attr);
	a->present = (s.attr & SEG_ATTR_P) != 0;
	a->avl = (s.attr & SEG_ATTR_AVL) != 0;
	a->l = (s.attr & SEG_ATTR_L) != 0;
	a->db = (s.attr & SEG_ATTR_DB) != 0;
	a->g = (s.attr & SEG_ATTR_G) != 0;
	a->unusable = !a->present;
}

static void
seg_in(struct vmk_vcpu *vcpu, enum vmk_seg n, const struct abi_segment *a)
{
	struct vmk_segment s;

	s.base = a->base;
	s.limit = a->limit;
	s.selector = a->selector;
	s.attr = (uint16_t)((a->type & SEG_ATTR_TYPE) |
	    (a->s != 0 ? SEG_ATTR_S : 0) | ((a->dpl & 3U) << 5) |
	    (a->present != 0 && a->unusable == 0 ? SEG_ATTR_P : 0) |
	    (a->avl != 0 ? SEG_ATTR_AVL : 0) | (a->l != 0 ? SEG_ATTR_L : 0) |
	    (a->db != 0 ? SEG_ATTR_DB : 0) | (a->g != 0 ? SEG_ATTR_G : 0));
	vmk_arch->set_seg(vcpu, n, &s);
}

static void
table_out(struct vmk_vcpu *vcpu, enum vmk_seg n, struct abi_dtable *a)
{
	struct vmk_segment s;

	vmk_arch->get_seg(vcpu, n, &s);
	a->base = s.base;
	a->limit = (uint16_t)s.limit;
}

static void
table_in(struct vmk_vcpu *vcpu, enum vmk_seg n, const struct abi_dtable *a)
{
	struct vmk_segment s = { .base = a->base, .limit = a->limit };

	vmk_arch->set_seg(vcpu, n, &s);
}

/* The eight segments of struct abi_sregs, in its order. */
static const uint8_t sregs_order[8] = { VMK_CS, VMK_DS, VMK_ES, VMK_FS,
	VMK_GS, VMK_SSEG, VMK_TR, VMK_LDTR };

static int
get_sregs(struct vmk_vcpu *vcpu, struct abi_sregs *a)
{
	struct abi_segment *seg = &a->cs;
	const struct vmk_event_state *ev = &vcpu->ev;
	unsigned int i;

	for (i = 0; i < 8; i++)
		seg_out(vcpu, (enum vmk_seg)sregs_order[i], &seg[i]);
	table_out(vcpu, VMK_GDTR, &a->gdt);
	table_out(vcpu, VMK_IDTR, &a->idt);
	a->cr0 = vmk_arch->get_creg(vcpu, VMK_CR0);
	a->cr2 = vmk_arch->get_creg(vcpu, VMK_CR2);
	a->cr3 = vmk_arch->get_creg(vcpu, VMK_CR3);
	a->cr4 = vmk_arch->get_creg(vcpu, VMK_CR4);
	a->cr8 = vmk_vcpu_cr8(vcpu);
	a->efer = vmk_arch->get_creg(vcpu, VMK_EFER);
	a->apic_base = vcpu->apic_base;
	if (ev->irq_injected)
		a->interrupt_bitmap[ev->irq_vector / 64] |=
		    1ULL << (ev->irq_vector % 64);
	return (0);
}

/* What no processor can be in, refused before anything changes. */
static int
check_sregs(const struct abi_sregs *a)
{
	bool pg = (a->cr0 & CR0_PG) != 0, pae = (a->cr4 & CR4_PAE) != 0;

	if ((a->cr4 & ~vmk_cr4_supported()) != 0 || (a->cr0 >> 32) != 0 ||
	    a->cr8 > 15 || (a->cr3 >> 52) != 0)
		return (VMK_EINVAL);
	if (pg && (a->cr0 & CR0_PE) == 0)
		return (VMK_EINVAL);
	if ((a->cr0 & CR0_NW) != 0 && (a->cr0 & CR0_CD) == 0)
		return (VMK_EINVAL);
	if ((a->efer & ~(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE)) != 0)
		return (VMK_EINVAL);
	if ((a->efer & EFER_LME) != 0 && pg) {
		if (!pae || (a->efer & EFER_LMA) == 0)
			return (VMK_EINVAL);
	} else if ((a->efer & EFER_LMA) != 0 || (!pg && a->cs.l != 0)) {
		return (VMK_EINVAL);
	}
	if (!vmk_canonical(a->fs.base) || !vmk_canonical(a->gs.base) ||
	    !vmk_canonical(a->tr.base) || !vmk_canonical(a->ldt.base) ||
	    !vmk_canonical(a->gdt.base) || !vmk_canonical(a->idt.base))
		return (VMK_EINVAL);
	return (0);
}

static int
set_sregs(struct vmk_vcpu *vcpu, const struct abi_sregs *a)
{
	const struct abi_segment *seg = &a->cs;
	unsigned int i;
	int error;

	error = check_sregs(a);
	if (error == 0)
		error = vmk_msr_set(vcpu, 0x1b, a->apic_base, true);
	if (error != 0)
		return (error);
	for (i = 0; i < 8; i++)
		seg_in(vcpu, (enum vmk_seg)sregs_order[i], &seg[i]);
	table_in(vcpu, VMK_GDTR, &a->gdt);
	table_in(vcpu, VMK_IDTR, &a->idt);
	vmk_arch->set_creg(vcpu, VMK_CR2, a->cr2);
	vmk_arch->set_creg(vcpu, VMK_CR3, a->cr3);
	vmk_arch->set_creg(vcpu, VMK_CR8, a->cr8);
	if (vcpu->lapic != NULL)
		vmk_lapic_set_cr8(vcpu, a->cr8);
	vmk_arch->set_creg(vcpu, VMK_EFER, a->efer);
	vmk_arch->set_creg(vcpu, VMK_CR0, (a->cr0 & CR0_VALID) | CR0_ET);
	vmk_arch->set_creg(vcpu, VMK_CR4, a->cr4);
	vcpu->tlb_gen = 0;
	if (vcpu->lapic == NULL) {
		for (i = 0; i < 256; i++) {
			if ((a->interrupt_bitmap[i / 64] >> (i % 64) & 1) == 0)
				continue;
			vcpu->ev.irq_injected = true;
			vcpu->ev.irq_vector = (uint8_t)i;
			break;
		}
	}
	return (0);
}

/* ---- FPU --------------------------------------------------------------- */

/*
 * The XSAVE area is loaded by the host with XRSTOR, which faults on a bad
 * header (SDM 1, 13.8.1) or on reserved MXCSR bits.
 */
static bool
xsave_ok(const uint8_t *x)
{
	uint64_t bv;
	uint32_t mxcsr;
	unsigned int i;

	memcpy(&bv, x + 512, 8);
	memcpy(&mxcsr, x + 24, 4);
	if ((bv & ~vmk_xcr0_supported()) != 0 || (mxcsr & ~0xffffU) != 0)
		return (false);
	for (i = 520; i < 576; i++)
		if (x[i] != 0)
			return (false);
	return (true);
}

static int
get_xsave(struct vmk_vcpu *vcpu, struct abi_xsave *a)
{
	memcpy(a->region, vcpu->xsave, vmk_xsave_size(vmk_xcr0_supported()));
	return (0);
}

static int
set_xsave(struct vmk_vcpu *vcpu, const struct abi_xsave *a)
{
	if (!xsave_ok((const uint8_t *)a->region))
		return (VMK_EINVAL);
	memcpy(vcpu->xsave, a->region, vmk_xsave_size(vmk_xcr0_supported()));
	return (0);
}

/* Where FXSAVE (SDM 1, table 10-2) has what struct abi_fpu has. */
#define	FPU(at, field)							\
	{ at, offsetof(struct abi_fpu, field),				\
	    sizeof(((struct abi_fpu *)0)->field) }
static const struct { uint16_t at, field, size; } fpu_fields[] = {
	FPU(0, fcw), FPU(2, fsw), FPU(4, ftwx), FPU(6, last_opcode),
	FPU(8, last_ip), FPU(16, last_dp), FPU(24, mxcsr), FPU(32, fpr),
	FPU(160, xmm),
};

static int
get_fpu(struct vmk_vcpu *vcpu, struct abi_fpu *a)
{
	unsigned int i;

	for (i = 0; i < VMK_ARRAY_LEN(fpu_fields); i++)
		memcpy((uint8_t *)a + fpu_fields[i].field,
		    vcpu->xsave + fpu_fields[i].at, fpu_fields[i].size);
	return (0);
}

static int
set_fpu(struct vmk_vcpu *vcpu, const struct abi_fpu *a)
{
	unsigned int i;

	if ((a->mxcsr & ~0xffffU) != 0)
		return (VMK_EINVAL);
	for (i = 0; i < VMK_ARRAY_LEN(fpu_fields); i++)
		memcpy(vcpu->xsave + fpu_fields[i].at,
		    (const uint8_t *)a + fpu_fields[i].field,
		    fpu_fields[i].size);
	vcpu->xsave[512] |= 3;			/* x87 and SSE are in use */
	return (0);
}

static int
get_xcrs(struct vmk_vcpu *vcpu, struct abi_xcrs *a)
{
	a->nr_xcrs = 1;
	a->xcrs[0].value = vcpu->xcr0;
	return (0);
}

static int
set_xcrs(struct vmk_vcpu *vcpu, const struct abi_xcrs *a)
{
	uint32_t i;

	if (a->nr_xcrs > ABI_MAX_XCRS || a->flags != 0)
		return (VMK_EINVAL);
	for (i = 0; i < a->nr_xcrs; i++)
		if (a->xcrs[i].xcr == 0)
			return (vmk_set_xcr0(vcpu, 0, a->xcrs[i].value));
	return (0);
}

/* ---- debug registers and events ---------------------------------------- */

static int
get_debugregs(struct vmk_vcpu *vcpu, struct abi_debugregs *a)
{
	memcpy(a->db, vcpu->dr, sizeof(a->db));
	a->dr6 = vmk_arch->get_creg(vcpu, VMK_DR6);
	a->dr7 = vmk_arch->get_creg(vcpu, VMK_DR7);
	return (0);
}

static int
set_debugregs(struct vmk_vcpu *vcpu, const struct abi_debugregs *a)
{
	if (a->flags != 0 || (a->dr6 >> 32) != 0 || (a->dr7 >> 32) != 0)
		return (VMK_EINVAL);
	memcpy(vcpu->dr, a->db, sizeof(vcpu->dr));
	vmk_arch->set_creg(vcpu, VMK_DR6, a->dr6 | 0xffff0ff0);
	vmk_arch->set_creg(vcpu, VMK_DR7, a->dr7 | 0x400);
	return (0);
}

static int
get_events(struct vmk_vcpu *vcpu, struct abi_vcpu_events *a)
{
	const struct vmk_event_state *ev = &vcpu->ev;

	a->exception.injected = ev->exc_injected || ev->exc_pending;
	a->exception.nr = ev->exc_vector;
	a->exception.has_error_code = ev->exc_has_error;
	a->exception.error_code = ev->exc_error;
	a->interrupt.injected = ev->irq_injected;
	a->interrupt.nr = ev->irq_vector;
	a->interrupt.shadow = (uint8_t)vmk_arch->get_shadow(vcpu);
	a->nmi.injected = ev->nmi_injected;
	a->nmi.pending = ev->nmi_pending != 0 ||
	    (__atomic_load_n(&vcpu->requests, __ATOMIC_SEQ_CST) &
	    VMK_REQ_NMI) != 0;
	a->nmi.masked = ev->nmi_masked;
	a->sipi_vector = __atomic_load_n(&vcpu->sipi_vector,
	    __ATOMIC_SEQ_CST) & 0xff;
	a->flags = ABI_VCPUEVENT_NMI_PENDING | ABI_VCPUEVENT_SHADOW;
	return (0);
}

static int
set_events(struct vmk_vcpu *vcpu, const struct abi_vcpu_events *a)
{
	struct vmk_event_state *ev = &vcpu->ev;

	if ((a->flags & ~(ABI_VCPUEVENT_NMI_PENDING |
	    ABI_VCPUEVENT_SIPI_VECTOR | ABI_VCPUEVENT_SHADOW |
	    ABI_VCPUEVENT_SMM)) != 0)
		return (VMK_EINVAL);
	if ((a->flags & ABI_VCPUEVENT_SMM) != 0 &&
	    (a->smi.smm | a->smi.pending | a->smi.smm_inside_nmi) != 0)
		return (VMK_EINVAL);
	if (a->exception.injected != 0 &&
	    (a->exception.nr > 31 || a->exception.nr == 2))
		return (VMK_EINVAL);
	ev->exc_pending = false;
	ev->exc_injected = a->exception.injected != 0;
	ev->exc_vector = a->exception.nr;
	ev->exc_has_error = a->exception.has_error_code != 0;
	ev->exc_error = a->exception.error_code;
	ev->irq_injected = a->interrupt.injected != 0;
	ev->irq_vector = a->interrupt.nr;
	if ((a->flags & ABI_VCPUEVENT_SHADOW) != 0)
		vmk_arch->set_shadow(vcpu, a->interrupt.shadow & 3U);
	ev->nmi_injected = a->nmi.injected != 0;
	if ((a->flags & ABI_VCPUEVENT_NMI_PENDING) != 0)
		ev->nmi_pending = a->nmi.pending != 0;
	ev->nmi_masked = a->nmi.masked != 0;
	if ((a->flags & ABI_VCPUEVENT_SIPI_VECTOR) != 0)
		__atomic_store_n(&vcpu->sipi_vector, a->sipi_vector & 0xff,
		    __ATOMIC_SEQ_CST);
	return (0);
}

static int
get_mp_state(struct vmk_vcpu *vcpu, struct abi_mp_state *a)
{
	a->mp_state = vcpu->mp_state;
	return (0);
}

static int
set_mp_state(struct vmk_vcpu *vcpu, const struct abi_mp_state *a)
{
	if (vcpu->lapic == NULL && a->mp_state != ABI_MP_RUNNABLE)
		return (VMK_EINVAL);
	switch (a->mp_state) {
	case ABI_MP_RUNNABLE: case ABI_MP_UNINITIALIZED:
	case ABI_MP_INIT_RECEIVED: case ABI_MP_HALTED:
		vcpu->mp_state = a->mp_state;
		return (0);
	case ABI_MP_SIPI_RECEIVED:
		vcpu->mp_state = ABI_MP_INIT_RECEIVED;
		vmk_vcpu_notify(vcpu, VMK_REQ_SIPI);
		return (0);
	default:
		return (VMK_EINVAL);
	}
}

static int
interrupt(struct vmk_vcpu *vcpu, const struct abi_interrupt *a)
{
	if (a->irq > 255)
		return (VMK_EINVAL);
	switch (vcpu->vm->irqchip_mode) {
	case VMK_IRQCHIP_KERNEL:
		return (VMK_ENXIO);
	case VMK_IRQCHIP_SPLIT:
		/* From user space's 8259; the local APIC decides when. */
		if (vcpu->ext_pending)
			return (VMK_EEXIST);
		vcpu->ext_pending = true;
		vcpu->ext_vector = (uint8_t)a->irq;
		return (0);
	default:
		break;
	}
	if (vcpu->ev.irq_injected)
		return (VMK_EEXIST);
	vcpu->ev.irq_injected = true;
	vcpu->ev.irq_vector = (uint8_t)a->irq;
	return (0);
}

static int
set_guest_debug(struct vmk_vcpu *vcpu, const struct abi_guest_debug *a)
{
	/* Hardware breakpoints would need the guest's own virtualized. */
	if ((a->control & ~(ABI_GUESTDBG_ENABLE | ABI_GUESTDBG_SINGLESTEP |
	    ABI_GUESTDBG_USE_SW_BP)) != 0)
		return (VMK_EINVAL);
	vcpu->guest_debug = (a->control & ABI_GUESTDBG_ENABLE) != 0 ?
	    a->control : 0;
	return (0);
}

/* ---- lists of variable length ------------------------------------------ */

static int
set_cpuid2(struct vmk_vcpu *vcpu, uint64_t arg)
{
	struct abi_cpuid_entry2 *new;
	struct abi_cpuid2 h;
	size_t size;
	int error;

	error = vmk_copyin(arg, &h, sizeof(h));
	if (error != 0)
		return (error);
	if (h.nent > VMK_MAX_CPUID)
		return (VMK_E2BIG);
	size = VMK_MAX_CPUID * sizeof(new[0]);
	new = vmk_alloc(size);
	if (new == NULL)
		return (VMK_ENOMEM);
	error = vmk_copyin(arg + sizeof(h), new, h.nent * sizeof(new[0]));
	if (error == 0 && vcpu->has_run && (h.nent != vcpu->ncpuid ||
	    memcmp(new, vcpu->cpuid, h.nent * sizeof(new[0])) != 0))
		error = VMK_EINVAL;
	if (error != 0) {
		vmk_free(new, size);
		return (error);
	}
	vmk_free(vcpu->cpuid, size);
	vcpu->cpuid = new;
	vcpu->ncpuid = h.nent;
	return (0);
}

static int
get_cpuid2(struct vmk_vcpu *vcpu, uint64_t arg)
{
	struct abi_cpuid2 h;
	int error;

	error = vmk_copyin(arg, &h, sizeof(h));
	if (error != 0)
		return (error);
	if (h.nent < vcpu->ncpuid)
		error = VMK_E2BIG;
	else
		error = vmk_copyout(vcpu->cpuid, arg + sizeof(h),
		    vcpu->ncpuid * sizeof(vcpu->cpuid[0]));
	h.nent = vcpu->ncpuid;
	if (error == 0 || error == VMK_E2BIG)
		if (vmk_copyout(&h, arg, sizeof(h)) != 0)
			error = VMK_EFAULT;
	return (error);
}

/* The mask that holds during RUN; without an argument, the thread's own. */
static int
set_signal_mask(struct vmk_vcpu *vcpu, uint64_t arg)
{
	struct abi_signal_mask h;
	struct vmk_sigset set;
	int error;

	if (arg == 0) {
		vcpu->has_sigmask = false;
		return (0);
	}
	error = vmk_copyin(arg, &h, sizeof(h));
	if (error != 0)
		return (error);
	if (h.len > sizeof(set) || !vmk_sigset_ok(h.len))
		return (VMK_EINVAL);
	memset(&set, 0, sizeof(set));
	error = vmk_copyin(arg + sizeof(h), &set, h.len);
	if (error != 0)
		return (error);
	vcpu->sigmask = set;
	vcpu->has_sigmask = true;
	return (0);
}

/* The result of the request is how many were done before one failed. */
static int
msrs(struct vmk_vcpu *vcpu, uint64_t arg, bool write, int *result)
{
	struct abi_msr_entry *e;
	struct abi_msrs h;
	size_t size;
	uint32_t i;
	int error;

	error = vmk_copyin(arg, &h, sizeof(h));
	if (error != 0)
		return (error);
	if (h.nmsrs > VMK_MAX_MSRS)
		return (VMK_E2BIG);
	if (h.nmsrs == 0)
		return (0);
	size = h.nmsrs * sizeof(e[0]);
	e = vmk_alloc(size);
	if (e == NULL)
		return (VMK_ENOMEM);
	error = vmk_copyin(arg + sizeof(h), e, size);
	for (i = 0; error == 0 && i < h.nmsrs; i++)
		if ((write ?
		    vmk_msr_set(vcpu, e[i].index, e[i].data, true) :
		    vmk_msr_get(vcpu, e[i].index, &e[i].data, true)) != 0)
			break;
	if (error == 0 && !write)
		error = vmk_copyout(e, arg + sizeof(h), size);
	if (error == 0)
		*result = (int)i;
	vmk_free(e, size);
	return (error);
}

/* ---- the table --------------------------------------------------------- */

/*
 * Requests whose argument is one structure: the dispatcher copies it in or
 * out, whole, by the size in the table; handlers see kernel memory only.
 */
union vcpu_arg {
	struct abi_regs regs;
	struct abi_sregs sregs;
	struct abi_fpu fpu;
	struct abi_xsave xsave;
	struct abi_xcrs xcrs;
	struct abi_debugregs debugregs;
	struct abi_vcpu_events events;
	struct abi_mp_state mp_state;
	struct abi_interrupt interrupt;
	struct abi_guest_debug guest_debug;
	struct abi_lapic_state lapic;
	struct abi_vapic_addr vapic;
};

static int
lapic_get(struct vmk_vcpu *vcpu, struct abi_lapic_state *a)
{
	return (vcpu->lapic == NULL ? VMK_EINVAL : vmk_lapic_get(vcpu, a));
}

static int
lapic_set(struct vmk_vcpu *vcpu, const struct abi_lapic_state *a)
{
	return (vcpu->lapic == NULL ? VMK_EINVAL : vmk_lapic_set(vcpu, a));
}

/*
 * QEMU names a page for a shadow of the TPR without asking whether there is
 * a use for it (CAP_VAPIC is not offered).  Nothing is ever written there.
 */
static int
set_vapic(struct vmk_vcpu *vcpu, const struct abi_vapic_addr *a)
{
	(void)a;
	return (vcpu->lapic == NULL ? VMK_EINVAL : 0);
}

/*
 * Request, member of the union, handler.  Direction and size in the numbers
 * of these are honest.
 */
#define	STRUCTURED(H)							\
	H(ABI_GET_REGS, regs, get_regs)					\
	H(ABI_SET_REGS, regs, set_regs)					\
	H(ABI_GET_SREGS, sregs, get_sregs)				\
	H(ABI_SET_SREGS, sregs, set_sregs)				\
	H(ABI_GET_FPU, fpu, get_fpu)					\
	H(ABI_SET_FPU, fpu, set_fpu)					\
	H(ABI_GET_XSAVE, xsave, get_xsave)				\
	H(ABI_SET_XSAVE, xsave, set_xsave)				\
	H(ABI_GET_XCRS, xcrs, get_xcrs)					\
	H(ABI_SET_XCRS, xcrs, set_xcrs)					\
	H(ABI_GET_DEBUGREGS, debugregs, get_debugregs)			\
	H(ABI_SET_DEBUGREGS, debugregs, set_debugregs)			\
	H(ABI_GET_VCPU_EVENTS, events, get_events)			\
	H(ABI_SET_VCPU_EVENTS, events, set_events)			\
	H(ABI_GET_MP_STATE, mp_state, get_mp_state)			\
	H(ABI_SET_MP_STATE, mp_state, set_mp_state)			\
	H(ABI_INTERRUPT, interrupt, interrupt)				\
	H(ABI_SET_GUEST_DEBUG, guest_debug, set_guest_debug)		\
	H(ABI_GET_LAPIC, lapic, lapic_get)				\
	H(ABI_SET_LAPIC, lapic, lapic_set)				\
	H(ABI_SET_VAPIC_ADDR, vapic, set_vapic)

#define	H_NAME(req, member, call)	case req:
#define	H_CALL(req, member, call)					\
	case req:							\
		return (call(vcpu, &u->member));

static bool
is_structured(uint32_t request)
{
	switch (request) {
	STRUCTURED(H_NAME)
		return (true);
	default:
		return (false);
	}
}

static int
vcpu_structured(struct vmk_vcpu *vcpu, uint32_t request, union vcpu_arg *u)
{
	switch (request) {
	STRUCTURED(H_CALL)
	default:
		return (VMK_ENOTTY);
	}
}

static int
vcpu_request(struct vmk_vcpu *vcpu, uint32_t request, uint64_t arg,
    int *result)
{
	size_t size = ABI_IOC_SIZE(request);
	union vcpu_arg *u;
	int error = 0;

	if (is_structured(request)) {
		u = vmk_alloc(sizeof(*u));	/* zeroed */
		if (u == NULL)
			return (VMK_ENOMEM);
		if ((request & ABI_IOC_IN) != 0)
			error = vmk_copyin(arg, u, size);
		if (error == 0)
			error = vcpu_structured(vcpu, request, u);
		if (error == 0 && (request & ABI_IOC_OUT) != 0)
			error = vmk_copyout(u, arg, size);
		vmk_free(u, sizeof(*u));
		return (error);
	}
	switch (request) {
	case ABI_RUN:
		return (arg != 0 ? VMK_EINVAL : vmk_vcpu_run(vcpu));
	case ABI_GET_MSRS:
		return (msrs(vcpu, arg, false, result));
	case ABI_SET_MSRS:
		return (msrs(vcpu, arg, true, result));
	case ABI_SET_CPUID2:
		return (set_cpuid2(vcpu, arg));
	case ABI_GET_CPUID2:
		return (get_cpuid2(vcpu, arg));
	case ABI_SET_SIGNAL_MASK:
		return (set_signal_mask(vcpu, arg));
	case ABI_GET_TSC_KHZ:
		*result = (int)vmk_tsc_khz();
		return (0);
	case ABI_SET_TSC_KHZ:
		/* No scaling: only the host's own rate, or 0 for it. */
		return (arg == 0 || arg == vmk_tsc_khz() ? 0 : VMK_EINVAL);
	default:
		return (VMK_ENOTTY);
	}
}

int
vmk_vcpu_ioctl(struct vmk_vcpu *vcpu, uint32_t request, uint64_t arg,
    int *result)
{
	int error;

	/* An NMI may come from another thread while this one is in RUN. */
	if (request == ABI_NMI) {
		vmk_vcpu_notify(vcpu, VMK_REQ_NMI);
		return (0);
	}
	error = vmk_mutex_enter_sig(&vcpu->lock);
	if (error != 0)
		return (error);
	error = vcpu_request(vcpu, request, arg, result);
	vmk_mutex_exit(&vcpu->lock);
	return (error);
}

/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_run.c: KVM_RUN: the loop that enters the guest and serves its exits.
 *
 * Theory.  Two nested loops.  The inner one runs inside a CPU section: no
 * sleeping, the guest's FPU and debug registers loaded.  It enters the guest
 * and serves what needs neither memory nor user space.  The outer loop has
 * left the section: it translates, emulates, sleeps in HLT, and returns to
 * user space.
 *
 * Events.  What is to be delivered waits in vcpu->ev.  An exception is
 * "pending" until chosen for an entry, then "injected"; an entry that
 * delivers it takes the flag away, and the world switch puts it back if
 * delivery was cut short (EXITINTINFO, IDT-vectoring information).  So an
 * event is never lost, also not across a return to user space
 * (KVM_GET_VCPU_EVENTS).
 *
 * Every path ends in one of: enter again, return to user space with an exit
 * reason, return an errno.  An exit that nobody expected is reported as
 * KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON; nothing a guest does panics or
 * loops without a look at vmk_must_leave() (CVE-2015-5307, CVE-2015-8104).
 *
 * The run page is user space's to scribble on: request_interrupt_window,
 * immediate_exit and cr8 are fetched once per RUN.
 */
#include "vmk_arch.h"
#include "vmk_irqchip.h"

/* ---- attention --------------------------------------------------------- */

/*
 * Whoever changes translations moves vm->tlb_gen and then looks at in_guest
 * and entries; here these two are written first and the generation is read
 * last.  So either this entry sees the new generation, or vmk_vm_flush() sees
 * this entry and waits for its end.
 */
bool
vmk_run_ready(struct vmk_vcpu *vcpu, bool *flush)
{
	uint64_t gen;

	vcpu->cpu = vmk_cpu_id();
	__atomic_store_n(&vcpu->in_guest, 1, __ATOMIC_SEQ_CST);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&vcpu->requests, __ATOMIC_SEQ_CST) != 0 ||
	    vmk_must_leave())
		return (false);
	__atomic_add_fetch(&vcpu->entries, 1, __ATOMIC_SEQ_CST);
	gen = __atomic_load_n(&vcpu->vm->tlb_gen, __ATOMIC_SEQ_CST);
	*flush = gen != vcpu->tlb_gen;
	vcpu->tlb_gen = gen;
	return (true);
}

void
vmk_run_left(struct vmk_vcpu *vcpu)
{
	__atomic_store_n(&vcpu->in_guest, 0, __ATOMIC_SEQ_CST);
}

static void
kick(struct vmk_vcpu *vcpu)
{
	if (__atomic_load_n(&vcpu->in_guest, __ATOMIC_SEQ_CST) != 0)
		vmk_cpu_kick(__atomic_load_n(&vcpu->cpu, __ATOMIC_RELAXED));
	vmk_wake(&vcpu->waitq);
}

void
vmk_vcpu_notify(struct vmk_vcpu *vcpu, uint32_t requests)
{
	__atomic_fetch_or(&vcpu->requests, requests, __ATOMIC_SEQ_CST);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	kick(vcpu);
}

void
vmk_vcpu_sipi(struct vmk_vcpu *vcpu, uint8_t vector)
{
	__atomic_store_n(&vcpu->sipi_vector, vector, __ATOMIC_SEQ_CST);
	vmk_vcpu_notify(vcpu, VMK_REQ_SIPI);
}

void
vmk_vcpu_report_eoi(struct vmk_vcpu *vcpu, uint8_t vector)
{
	vcpu->eoi_vector = vector;
	vmk_vcpu_notify(vcpu, VMK_REQ_EOI);
}

/*
 * Translations of before this call are unknown to every vCPU after it.  A
 * vCPU outside the guest compares generations when it enters; one inside is
 * made to leave.
 */
void
vmk_vm_flush(struct vmk_vm *vm)
{
	struct vmk_vcpu *vcpu;
	uint64_t entries;
	uint32_t i;

	__atomic_add_fetch(&vm->tlb_gen, 1, __ATOMIC_SEQ_CST);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	for (i = 0; (vcpu = vmk_vcpu_at(vm, i)) != NULL; i++) {
		entries = __atomic_load_n(&vcpu->entries, __ATOMIC_SEQ_CST);
		while (__atomic_load_n(&vcpu->in_guest, __ATOMIC_SEQ_CST) &&
		    __atomic_load_n(&vcpu->entries, __ATOMIC_SEQ_CST) ==
		    entries) {
			vmk_cpu_kick(__atomic_load_n(&vcpu->cpu,
			    __ATOMIC_RELAXED));
			(void)vmk_yield();
		}
	}
}

/* ---- exceptions -------------------------------------------------------- */

/* SDM 3A table 6-4: 1 contributory, 2 page fault, 0 benign. */
static unsigned int
exception_class(uint8_t vector)
{
	switch (vector) {
	case VMK_DE: case VMK_TS: case VMK_NP: case VMK_SS: case VMK_GP:
		return (1);
	case VMK_PF:
		return (2);
	default:
		return (0);
	}
}

void
vmk_inject(struct vmk_vcpu *vcpu, uint8_t vector, bool has_error,
    uint32_t error)
{
	struct vmk_event_state *ev = &vcpu->ev;
	unsigned int old, new = exception_class(vector);

	if (ev->exc_pending || ev->exc_injected) {
		old = exception_class(ev->exc_vector);
		if (ev->exc_vector == VMK_DF) {
			vmk_vcpu_notify(vcpu, VMK_REQ_TRIPLE);
			return;
		}
		if ((old == 1 && new == 1) || (old == 2 && new != 0)) {
			vector = VMK_DF;
			has_error = true;
			error = 0;
		}
	}
	ev->exc_injected = false;
	ev->exc_pending = true;
	ev->exc_vector = vector;
	/* Real mode pushes no error code (SDM 3A 20.1.4). */
	ev->exc_has_error = has_error &&
	    (vmk_arch->get_creg(vcpu, VMK_CR0) & CR0_PE) != 0;
	ev->exc_error = error;
}

void
vmk_inject_gp(struct vmk_vcpu *vcpu)
{
	vmk_inject(vcpu, VMK_GP, true, 0);
}

void
vmk_inject_ud(struct vmk_vcpu *vcpu)
{
	vmk_inject(vcpu, VMK_UD, false, 0);
}

void
vmk_inject_pf(struct vmk_vcpu *vcpu, uint64_t gva, uint32_t error)
{
	vmk_arch->set_creg(vcpu, VMK_CR2, gva);
	vmk_inject(vcpu, VMK_PF, true, error);
}

/* ---- exits to user space ----------------------------------------------- */

enum vmk_next
vmk_exit_emulation(struct vmk_vcpu *vcpu, const uint8_t *bytes, unsigned int n)
{
	struct abi_run *run = vcpu->run;

	/*
	 * A guest's user program must not be able to stop its machine; only a
	 * VMM that said that it completes instructions sees these
	 * (CVE-2014-7842).
	 */
	if (vmk_cpl(vcpu) != 0 && !vcpu->vm->exit_on_emulation_failure) {
		vmk_inject_ud(vcpu);
		return (VMK_RUN_AGAIN);
	}
	memset(&run->emulation_failure, 0, sizeof(run->emulation_failure));
	run->exit_reason = ABI_EXIT_INTERNAL_ERROR;
	run->emulation_failure.suberror = ABI_INTERNAL_EMULATION;
	run->emulation_failure.ndata = 1;
	if (n > 0) {
		run->emulation_failure.ndata = 3;
		run->emulation_failure.flags = ABI_EMULATION_FLAG_INSN_BYTES;
		run->emulation_failure.insn_size = (uint8_t)n;
		memcpy(run->emulation_failure.insn_bytes, bytes, n);
	}
	return (VMK_RUN_USER);
}

static enum vmk_next
exit_internal(struct vmk_vcpu *vcpu, uint32_t suberror,
    const struct vmk_exit *x)
{
	struct abi_run *run = vcpu->run;

	memset(&run->internal, 0, sizeof(run->internal));
	run->exit_reason = ABI_EXIT_INTERNAL_ERROR;
	run->internal.suberror = suberror;
	run->internal.ndata = 4;
	run->internal.data[0] = x->code;
	run->internal.data[1] = x->info1;
	run->internal.data[2] = x->info2;
	run->internal.data[3] = x->gpa;
	return (VMK_RUN_USER);
}

static enum vmk_next
exit_debug(struct vmk_vcpu *vcpu, uint32_t exception)
{
	struct abi_run *run = vcpu->run;
	struct vmk_segment cs;

	vmk_arch->get_seg(vcpu, VMK_CS, &cs);
	memset(&run->debug, 0, sizeof(run->debug));
	run->exit_reason = ABI_EXIT_DEBUG;
	run->debug.exception = exception;
	run->debug.pc = vcpu->rip + cs.base;
	run->debug.dr6 = vmk_arch->get_creg(vcpu, VMK_DR6);
	run->debug.dr7 = vmk_arch->get_creg(vcpu, VMK_DR7);
	return (VMK_RUN_USER);
}

static enum vmk_next
exit_simple(struct vmk_vcpu *vcpu, uint32_t reason)
{
	vcpu->run->exit_reason = reason;
	return (VMK_RUN_USER);
}

/* ---- choosing what to deliver ------------------------------------------ */

static bool
event_waiting(const struct vmk_event_state *ev)
{
	return (ev->exc_pending || ev->exc_injected || ev->nmi_injected ||
	    ev->irq_injected);
}

static bool
irq_allowed(struct vmk_vcpu *vcpu)
{
	return ((vcpu->rflags & RFLAGS_IF) != 0 &&
	    vmk_arch->get_shadow(vcpu) == 0);
}

/* May user space's 8259, where it has one, deliver now? */
static bool
user_window_open(struct vmk_vcpu *vcpu)
{
	if (event_waiting(&vcpu->ev) || vcpu->ext_pending ||
	    !irq_allowed(vcpu))
		return (false);
	return (vcpu->lapic == NULL || vmk_lapic_takes_pic(vcpu));
}

static void
choose_irq(struct vmk_vcpu *vcpu, struct vmk_entry *e)
{
	struct vmk_event_state *ev = &vcpu->ev;
	int vector;

	if (ev->irq_injected) {
		e->irq_window = e->inject != VMK_INJ_IRQ;
		return;
	}
	/* A window that could not be used would open at every entry. */
	e->irq_window = vcpu->want_window &&
	    (vcpu->lapic == NULL || vmk_lapic_takes_pic(vcpu));
	if (vcpu->lapic == NULL || vmk_irq_pending(vcpu) < 0)
		return;
	if (e->inject != VMK_INJ_NONE || !irq_allowed(vcpu)) {
		e->irq_window = true;
		return;
	}
	vector = vmk_irq_ack(vcpu);
	if (vector < 0)
		return;
	ev->irq_injected = true;
	ev->irq_vector = (uint8_t)vector;
	e->inject = VMK_INJ_IRQ;
	e->vector = ev->irq_vector;
}

/* One event an entry; priorities of SDM 3A table 6-2. */
static void
prepare(struct vmk_vcpu *vcpu, struct vmk_entry *e)
{
	struct vmk_event_state *ev = &vcpu->ev;

	memset(e, 0, sizeof(*e));
	if (ev->exc_pending) {
		ev->exc_pending = false;
		ev->exc_injected = true;
	}
	if (ev->exc_injected) {
		e->inject = VMK_INJ_EXC;
		e->vector = ev->exc_vector;
		e->error_code = ev->exc_error;
	} else if (ev->nmi_injected) {
		e->inject = VMK_INJ_NMI;
		e->vector = 2;
	} else if (ev->irq_injected && irq_allowed(vcpu)) {
		/* A delivery that was cut short had not cleared IF yet. */
		e->inject = VMK_INJ_IRQ;
		e->vector = ev->irq_vector;
	} else if (ev->nmi_pending > 0 && !ev->nmi_masked &&
	    vmk_arch->get_shadow(vcpu) == 0) {
		ev->nmi_pending--;
		ev->nmi_masked = true;
		ev->nmi_injected = true;
		e->inject = VMK_INJ_NMI;
		e->vector = 2;
	}
	choose_irq(vcpu, e);
	if (ev->nmi_pending > 0 && !ev->nmi_masked)
		e->irq_window = true;	/* behind the shadow */
	e->nmi_window = ev->nmi_masked;
	if (vcpu->lapic == NULL)
		e->cr8_exit = true;
	else
		e->cr8_exit = vmk_irq_blocked_by_tpr(vcpu);
	e->single_step = (vcpu->guest_debug & ABI_GUESTDBG_SINGLESTEP) != 0;
	e->trap_bp = (vcpu->guest_debug & ABI_GUESTDBG_USE_SW_BP) != 0;
}

/* ---- serving exits ----------------------------------------------------- */

static enum vmk_next
finish(struct vmk_vcpu *vcpu, const struct vmk_exit *x)
{
	if (x->insn_len == 0)
		return (vmk_skip(vcpu));
	vmk_advance(vcpu, vmk_rip_after(vcpu, x->insn_len));
	return (VMK_RUN_AGAIN);
}

static enum vmk_next
serve_cpuid(struct vmk_vcpu *vcpu, const struct vmk_exit *x)
{
	uint32_t out[4];

	vmk_cpuid(vcpu, (uint32_t)vcpu->gpr[VMK_RAX],
	    (uint32_t)vcpu->gpr[VMK_RCX], out);
	vcpu->gpr[VMK_RAX] = out[0];
	vcpu->gpr[VMK_RBX] = out[1];
	vcpu->gpr[VMK_RCX] = out[2];
	vcpu->gpr[VMK_RDX] = out[3];
	return (finish(vcpu, x));
}

static enum vmk_next
serve_msr(struct vmk_vcpu *vcpu, const struct vmk_exit *x)
{
	uint32_t msr = (uint32_t)vcpu->gpr[VMK_RCX];
	uint64_t v = 0;

	if (x->kind == VMK_X_RDMSR) {
		if (vmk_msr_get(vcpu, msr, &v, false) != 0) {
			vmk_inject_gp(vcpu);
			return (VMK_RUN_AGAIN);
		}
		vcpu->gpr[VMK_RAX] = (uint32_t)v;
		vcpu->gpr[VMK_RDX] = v >> 32;
	} else {
		v = (vcpu->gpr[VMK_RDX] << 32) |
		    (uint32_t)vcpu->gpr[VMK_RAX];
		if (vmk_msr_set(vcpu, msr, v, false) != 0) {
			vmk_inject_gp(vcpu);
			return (VMK_RUN_AGAIN);
		}
	}
	return (finish(vcpu, x));
}

/* Exits that need no sleep.  False: leave the section and serve_slow(). */
static bool
serve_fast(struct vmk_vcpu *vcpu, const struct vmk_exit *x)
{
	switch (x->kind) {
	case VMK_X_NONE:
		return (true);
	case VMK_X_IRQ_WINDOW:
		return (!vcpu->want_window);
	case VMK_X_NMI_WINDOW:
		/*
		 * About to execute IRET, which unblocks NMIs when it is
		 * done; hold the next one off for that instruction.
		 */
		vcpu->ev.nmi_masked = false;
		if (vcpu->ev.nmi_pending > 0)
			vmk_arch->set_shadow(vcpu, ABI_SHADOW_MOV_SS);
		return (true);
	case VMK_X_CPUID:
		if (x->insn_len == 0)
			return (false);
		(void)serve_cpuid(vcpu, x);
		return (true);
	case VMK_X_RDMSR: case VMK_X_WRMSR:
		if (x->insn_len == 0)
			return (false);
		(void)serve_msr(vcpu, x);
		return (true);
	case VMK_X_UD:
		vmk_inject_ud(vcpu);
		return (true);
	case VMK_X_GP:
		vmk_inject_gp(vcpu);
		return (true);
	default:
		return (false);
	}
}

static enum vmk_next
serve_nested_fault(struct vmk_vcpu *vcpu, const struct vmk_exit *x)
{
	int error = 0;

	switch (vmk_mem_fault(vcpu->vm, x->gpa, x->write, &error)) {
	case VMK_FAULT_MAPPED:
		return (VMK_RUN_AGAIN);
	case VMK_FAULT_ERROR:
		vcpu->run_error = error;
		return (VMK_RUN_USER);
	default:
		break;
	}
	/* The guest's tables, or its stack or IDT, are not in memory. */
	if (x->kind == VMK_X_NESTED_WALK)
		return (exit_internal(vcpu, ABI_INTERNAL_EMULATION, x));
	/* An interrupt that still waits for IF was not under way. */
	if (vcpu->ev.exc_injected || vcpu->ev.nmi_injected ||
	    (vcpu->ev.irq_injected && irq_allowed(vcpu)))
		return (exit_internal(vcpu, ABI_INTERNAL_DELIVERY_EV, x));
	return (vmk_emul_mmio(vcpu));
}

static enum vmk_next
serve_exception(struct vmk_vcpu *vcpu, const struct vmk_exit *x)
{
	switch (x->vector) {
	case VMK_DB:
		if ((vcpu->guest_debug & ABI_GUESTDBG_SINGLESTEP) != 0)
			return (exit_debug(vcpu, VMK_DB));
		vmk_inject(vcpu, VMK_DB, false, 0);
		return (VMK_RUN_AGAIN);
	case VMK_BP:			/* intercepted only for this */
		return (exit_debug(vcpu, VMK_BP));
	case VMK_AC:
		vmk_inject(vcpu, VMK_AC, true, x->error_code);
		return (VMK_RUN_AGAIN);
	default:
		return (exit_internal(vcpu, ABI_INTERNAL_UNEXPECTED_EXIT, x));
	}
}

static enum vmk_next
serve_xsetbv(struct vmk_vcpu *vcpu, const struct vmk_exit *x)
{
	uint64_t v = (vcpu->gpr[VMK_RDX] << 32) |
	    (uint32_t)vcpu->gpr[VMK_RAX];

	if (vmk_cpl(vcpu) != 0 ||
	    vmk_set_xcr0(vcpu, (uint32_t)vcpu->gpr[VMK_RCX], v) != 0) {
		vmk_inject_gp(vcpu);
		return (VMK_RUN_AGAIN);
	}
	return (finish(vcpu, x));
}

static enum vmk_next
serve_slow(struct vmk_vcpu *vcpu, const struct vmk_exit *x)
{
	struct abi_run *run = vcpu->run;
	enum vmk_next next;

	vcpu->em.fetched = x->insn;
	vcpu->em.nfetched = x->ninsn;
	switch (x->kind) {
	case VMK_X_NESTED_FAULT: case VMK_X_NESTED_WALK:
		return (serve_nested_fault(vcpu, x));
	case VMK_X_IO:
		return (vmk_emul_io(vcpu, x->io.port, x->io.size, x->io.in,
		    x->io.string, x->info2));
	case VMK_X_CPUID:
		return (serve_cpuid(vcpu, x));
	case VMK_X_RDMSR: case VMK_X_WRMSR:
		return (serve_msr(vcpu, x));
	case VMK_X_HLT:
		next = finish(vcpu, x);
		if (next != VMK_RUN_AGAIN)
			return (next);
		if (vcpu->lapic == NULL)
			return (exit_simple(vcpu, ABI_EXIT_HLT));
		vcpu->mp_state = ABI_MP_HALTED;
		return (VMK_RUN_AGAIN);
	case VMK_X_XSETBV:
		return (serve_xsetbv(vcpu, x));
	case VMK_X_CACHE: case VMK_X_PAUSE:
		return (finish(vcpu, x));
	case VMK_X_CR_WRITE:
		return (vmk_emul_cr(vcpu, x));
	case VMK_X_HYPERCALL:
		/* -KVM_ENOSYS */
		vcpu->gpr[VMK_RAX] = (uint64_t)-1000;
		if (vmk_code_bits(vcpu) != 64)
			vcpu->gpr[VMK_RAX] &= 0xffffffffULL;
		return (finish(vcpu, x));
	case VMK_X_EXCEPTION:
		return (serve_exception(vcpu, x));
	case VMK_X_IRQ_WINDOW:
		/* The loop looks at the window before it enters again. */
		return (VMK_RUN_AGAIN);
	case VMK_X_SHUTDOWN:
		return (exit_simple(vcpu, ABI_EXIT_SHUTDOWN));
	case VMK_X_INVALID:
		memset(&run->fail_entry, 0, sizeof(run->fail_entry));
		run->fail_entry.hardware_entry_failure_reason = x->code;
		run->fail_entry.cpu = vcpu->cpu;
		return (exit_simple(vcpu, ABI_EXIT_FAIL_ENTRY));
	default:
		return (exit_internal(vcpu, ABI_INTERNAL_UNEXPECTED_EXIT, x));
	}
}

/* ---- the loops --------------------------------------------------------- */

/* Enter until something needs sleep or user space; that is in *x. */
static void
run_section(struct vmk_vcpu *vcpu, struct vmk_exit *x)
{
	struct vmk_entry e;
	uint64_t cr8 = 0, now;

	if (vmk_arch->prepare != NULL)
		vmk_arch->prepare(vcpu);
	vmk_cpu_enter();
	vmk_arch->load(vcpu);
	do {
		prepare(vcpu, &e);
		if (vcpu->lapic != NULL) {
			cr8 = vmk_lapic_get_cr8(vcpu);
			vmk_arch->set_creg(vcpu, VMK_CR8, cr8);
		}
		memset(x, 0, sizeof(*x));
		vmk_arch->enter(vcpu, &e, x);
		if (vcpu->lapic != NULL) {
			now = vmk_arch->get_creg(vcpu, VMK_CR8);
			if (now != cr8)
				vmk_lapic_set_cr8(vcpu, now);
		}
	} while (x->kind != VMK_X_ABORTED && serve_fast(vcpu, x));
	vmk_arch->unload(vcpu);
	vmk_cpu_exit();
}

/* INIT resets; a start-up IPI then sets CS:RIP (SDM 3A 8.4.3). */
static void
serve_init_sipi(struct vmk_vcpu *vcpu, uint32_t req)
{
	struct vmk_segment cs;
	uint32_t vector;

	if ((req & VMK_REQ_INIT) != 0) {
		vmk_vcpu_reset(vcpu, true);
		vcpu->mp_state = vcpu->id == VMK_BOOT_ID ?
		    ABI_MP_RUNNABLE : ABI_MP_INIT_RECEIVED;
	}
	if ((req & VMK_REQ_SIPI) != 0 &&
	    vcpu->mp_state == ABI_MP_INIT_RECEIVED) {
		vector = __atomic_load_n(&vcpu->sipi_vector,
		    __ATOMIC_SEQ_CST) & 0xff;
		vmk_arch->get_seg(vcpu, VMK_CS, &cs);
		cs.selector = (uint16_t)(vector << 8);
		cs.base = (uint64_t)vector << 12;
		vmk_arch->set_seg(vcpu, VMK_CS, &cs);
		vcpu->rip = 0;
		vcpu->mp_state = ABI_MP_RUNNABLE;
	}
}

static enum vmk_next
serve_requests(struct vmk_vcpu *vcpu)
{
	uint32_t req;

	req = __atomic_exchange_n(&vcpu->requests, 0, __ATOMIC_SEQ_CST);
	if (req == 0)
		return (VMK_RUN_AGAIN);
	if ((req & (VMK_REQ_INIT | VMK_REQ_SIPI)) != 0)
		serve_init_sipi(vcpu, req);
	if ((req & VMK_REQ_NMI) != 0 && vcpu->ev.nmi_pending < 2)
		vcpu->ev.nmi_pending++;
	if ((req & VMK_REQ_TRIPLE) != 0)
		return (exit_simple(vcpu, ABI_EXIT_SHUTDOWN));
	if ((req & VMK_REQ_EOI) != 0) {
		memset(&vcpu->run->eoi, 0, sizeof(vcpu->run->eoi));
		vcpu->run->eoi.vector = (uint8_t)vcpu->eoi_vector;
		return (exit_simple(vcpu, ABI_EXIT_IOAPIC_EOI));
	}
	return (VMK_RUN_AGAIN);
}

/* Does an event end HLT? */
static bool
ends_halt(struct vmk_vcpu *vcpu)
{
	const struct vmk_event_state *ev = &vcpu->ev;

	if (ev->exc_pending || ev->exc_injected || ev->nmi_injected ||
	    (ev->nmi_pending > 0 && !ev->nmi_masked))
		return (true);
	return ((vcpu->rflags & RFLAGS_IF) != 0 && (ev->irq_injected ||
	    (vcpu->lapic != NULL && vmk_irq_pending(vcpu) >= 0)));
}

/* Does a vCPU that does not execute have a reason to look around? */
static bool
has_reason(void *arg)
{
	struct vmk_vcpu *vcpu = arg;
	uint32_t req = __atomic_load_n(&vcpu->requests, __ATOMIC_SEQ_CST);

	return ((req & ~VMK_REQ_EVENT) != 0 ||
	    (vcpu->mp_state == ABI_MP_HALTED && ends_halt(vcpu)));
}

/* Sleep in HLT or wait for start-up; 0: look around. */
static int
idle(struct vmk_vcpu *vcpu)
{
	int error;

	error = vmk_wait_sig(&vcpu->waitq, has_reason, vcpu);
	if (error == 0 && vcpu->mp_state == ABI_MP_HALTED && ends_halt(vcpu))
		vcpu->mp_state = ABI_MP_RUNNABLE;
	return (error);
}

static int
run_loop(struct vmk_vcpu *vcpu)
{
	struct vmk_exit x;
	int error;

	for (;;) {
		if (serve_requests(vcpu) == VMK_RUN_USER)
			return (0);
		if (vcpu->debug_stepped) {
			vcpu->debug_stepped = false;
			(void)exit_debug(vcpu, VMK_DB);
			return (0);
		}
		if (vcpu->want_window && user_window_open(vcpu)) {
			vcpu->run->exit_reason = ABI_EXIT_IRQ_WINDOW_OPEN;
			return (0);
		}
		if (vcpu->mp_state != ABI_MP_RUNNABLE) {
			error = idle(vcpu);
			if (error != 0)
				return (error);
			continue;
		}
		run_section(vcpu, &x);
		if (x.kind != VMK_X_ABORTED &&
		    serve_slow(vcpu, &x) == VMK_RUN_USER)
			return (vcpu->run_error);
		error = vmk_yield();
		if (error != 0)
			return (error);
	}
}

/* What user space reads after RUN, whatever the reason. */
static void
publish(struct vmk_vcpu *vcpu)
{
	struct abi_run *run = vcpu->run;

	run->if_flag = (vcpu->rflags & RFLAGS_IF) != 0;
	run->flags = 0;
	run->cr8 = vmk_vcpu_cr8(vcpu);
	run->apic_base = vcpu->apic_base;
	run->ready_for_interrupt_injection =
	    vcpu->vm->irqchip_mode == VMK_IRQCHIP_KERNEL ||
	    user_window_open(vcpu);
}

/* KVM_RUN; vcpu->lock held. */
int
vmk_vcpu_run(struct vmk_vcpu *vcpu)
{
	volatile struct abi_run *run = vcpu->run;
	struct vmk_sigset saved;
	uint64_t cr8;
	int error;

	if (!vmk_mm_is_current(vcpu->vm->mm))
		return (VMK_EIO);
	vcpu->want_window = run->request_interrupt_window != 0 &&
	    vcpu->vm->irqchip_mode != VMK_IRQCHIP_KERNEL;
	cr8 = run->cr8;
	if (vcpu->lapic == NULL) {
		if (cr8 > 15)
			return (VMK_EINVAL);
		vmk_arch->set_creg(vcpu, VMK_CR8, cr8);
	}
	vcpu->has_run = true;
	vcpu->run_error = 0;
	vcpu->em.nfetched = 0;
	run->exit_reason = ABI_EXIT_UNKNOWN;
	if (vcpu->has_sigmask)
		vmk_sigmask_swap(&vcpu->sigmask, &saved);
	if (vmk_emul_resume(vcpu) == VMK_RUN_USER)
		error = vcpu->run_error;
	else if (run->immediate_exit != 0)
		error = VMK_EINTR;
	else
		error = run_loop(vcpu);
	if (vcpu->has_sigmask)
		vmk_sigmask_restore(&saved);
	if (error == VMK_EINTR)
		run->exit_reason = ABI_EXIT_INTR;
	publish(vcpu);
	return (error);
}

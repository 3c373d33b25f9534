/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * svm_test.c: what of x86/svm.c needs no processor: exits, events, ASIDs, and
 * which parts of the VMCB are called clean.  The accelerations that QEMU's TCG
 * does not have (decode assists, next RIP, flush by ASID, clean bits) are
 * tested here only.
 */
#include "svm.c"
#include "tap.h"

void
svm_enter_guest(uint64_t vmcb_pa, uint64_t *gpr, uint64_t host_pa)
{
	(void)vmcb_pa;
	(void)gpr;
	(void)host_pa;
}

static struct svm_vmcb vmcb;

static struct vmk_exit
exited(uint64_t code, uint64_t info1, uint64_t info2)
{
	struct vmk_exit x = { 0 };

	vmcb.exitcode = code;
	vmcb.exitinfo1 = info1;
	vmcb.exitinfo2 = info2;
	decode_exit(&vmcb, &x);
	return (x);
}

static void
test_exits(void)
{
	struct vmk_exit x;

	svm_features = FEATURE_NP;
	vmcb.rip = 0x1000;
	vmcb.next_rip = 0x1003;
	x = exited(SVM_X_CPUID, 0, 0);
	CHECK_EQ(x.kind, VMK_X_CPUID);
	CHECK_EQ(x.insn_len, 0);		/* without the feature: junk */
	svm_features |= FEATURE_NRIPS;
	CHECK_EQ(exited(SVM_X_CPUID, 0, 0).insn_len, 3);
	vmcb.next_rip = 0x1010;			/* longer than there are */
	CHECK_EQ(exited(SVM_X_CPUID, 0, 0).insn_len, 0);
	vmcb.next_rip = 0xfff;
	CHECK_EQ(exited(SVM_X_CPUID, 0, 0).insn_len, 0);
	CHECK_EQ(exited(SVM_X_MSR, 1, 0).kind, VMK_X_WRMSR);
	CHECK_EQ(exited(SVM_X_MSR, 0, 0).kind, VMK_X_RDMSR);
	x = exited(SVM_X_IO, 0x3f8 << 16 | 1 << 4 | 1, 0x1002);
	CHECK_EQ(x.kind, VMK_X_IO);
	CHECK(x.io.port == 0x3f8 && x.io.size == 1 && x.io.in && !x.io.string);
	CHECK_EQ(x.info2, 0x1002);
	CHECK_EQ(exited(SVM_X_IO, 3 << 4, 0).kind, VMK_X_UNKNOWN);
	x = exited(SVM_X_EXC + VMK_AC, 0x12, 0);
	CHECK_EQ(x.kind, VMK_X_EXCEPTION);
	CHECK(x.vector == VMK_AC && x.error_code == 0x12);
	CHECK_EQ(exited(SVM_X_EXC + VMK_MC, 0, 0).kind, VMK_X_NONE);
	CHECK_EQ(exited(SVM_X_VMRUN, 0, 0).kind, VMK_X_UD);
	CHECK_EQ(exited(SVM_X_RDPMC, 0, 0).kind, VMK_X_GP);
	CHECK_EQ(exited(SVM_X_INVALID, 0, 0).kind, VMK_X_INVALID);
	CHECK_EQ(exited(0x300, 0, 0).kind, VMK_X_UNKNOWN);
	tap_done("SVM: exits");
}

static void
test_assists(void)
{
	const uint64_t mov = 1ULL << 63;
	struct vmk_exit x;

	svm_features = FEATURE_NP;
	CHECK(!exited(SVM_X_CR_WRITE + 4, mov | 3, 0).mov_cr.valid);
	vmcb.insn_len = 0xff;
	CHECK_EQ(exited(SVM_X_NPF, 0, 0).ninsn, 0);
	svm_features |= FEATURE_DECODE;
	x = exited(SVM_X_CR_WRITE + 4, mov | 11, 0);
	CHECK_EQ(x.kind, VMK_X_CR_WRITE);
	CHECK(x.mov_cr.valid && x.mov_cr.cr == 4 && x.mov_cr.gpr == 11);
	x = exited(SVM_X_CR_WRITE + 8, mov | 2, 0);
	CHECK(x.mov_cr.valid && x.mov_cr.cr == 8 && x.mov_cr.gpr == 2);
	x = exited(SVM_X_CR0_SEL, mov | 7, 0);
	CHECK(x.mov_cr.valid && x.mov_cr.cr == 0 && x.mov_cr.gpr == 7);
	/* CLTS and LMSW are decoded from their bytes. */
	x = exited(SVM_X_CR0_SEL, 0, 0);
	CHECK(x.kind == VMK_X_CR_WRITE && !x.mov_cr.valid);
	/* Other exits have other things in bit 63. */
	CHECK(!exited(SVM_X_IO, mov | 1 << 4, 0).mov_cr.valid);
	x = exited(SVM_X_NPF, SVM_NPF_WRITE, 0xfee00000);
	CHECK(x.kind == VMK_X_NESTED_FAULT && x.write && x.gpa == 0xfee00000);
	CHECK_EQ(x.ninsn, 15);			/* never more */
	CHECK(x.insn == vmcb.insn);
	CHECK_EQ(exited(SVM_X_NPF, SVM_NPF_WALK, 0).kind, VMK_X_NESTED_WALK);
	tap_done("SVM: decode assists");
}

/* A new ASID, a flush or another processor: what the VMCB says of it. */
static void
test_asids(void)
{
	struct svm_cpu cpu[2] = { { .asid_gen = 1, .next_asid = 4 },
		{ .asid_gen = 1, .next_asid = 4 } };
	struct svm_vcpu a = { .vmcb = &vmcb };
	struct vmk_vcpu vcpu = { .arch = &a };

	memset(&vmcb, 0, sizeof(vmcb));
	svm_nasid = 4;
	svm_features = FEATURE_NP | FEATURE_CLEAN;
	vmcb.clean = CLEAN_ALWAYS;
	choose_asid(&a, &cpu[0], 0, false);	/* numbers are used up */
	CHECK_EQ(vmcb.asid, 1);
	CHECK_EQ(vmcb.tlb_control, TLB_FLUSH_ALL);
	CHECK_EQ(vmcb.clean, 0);
	vmcb.clean = CLEAN_ALWAYS;
	choose_asid(&a, &cpu[0], 0, false);	/* nothing changes */
	CHECK_EQ(vmcb.asid, 1);
	CHECK_EQ(vmcb.tlb_control, 0);
	CHECK_EQ(vmcb.clean, CLEAN_ALWAYS);
	choose_asid(&a, &cpu[0], 0, true);
	CHECK_EQ(vmcb.asid, 2);
	CHECK_EQ(vmcb.tlb_control, 0);
	CHECK_EQ(vmcb.clean, 0);
	vmcb.clean = CLEAN_ALWAYS;
	choose_asid(&a, &cpu[1], 1, false);	/* came from another */
	CHECK_EQ(vmcb.asid, 1);
	CHECK_EQ(vmcb.tlb_control, TLB_FLUSH_ALL);
	CHECK_EQ(vmcb.clean, 0);
	vmcb.clean = CLEAN_ALWAYS;
	choose_asid(&a, &cpu[0], 0, false);	/* and back */
	CHECK_EQ(vmcb.asid, 3);
	CHECK_EQ(vmcb.clean, 0);
	choose_asid(&a, &cpu[0], 0, true);	/* round again */
	CHECK_EQ(vmcb.asid, 1);
	CHECK_EQ(vmcb.tlb_control, TLB_FLUSH_ALL);
	svm_features |= FEATURE_FLUSHBYASID;
	vmcb.clean = CLEAN_ALWAYS;
	choose_asid(&a, &cpu[0], 0, true);	/* TLB_CONTROL is not cached */
	CHECK_EQ(vmcb.asid, 1);
	CHECK_EQ(vmcb.tlb_control, TLB_FLUSH_GUEST);
	CHECK_EQ(vmcb.clean, CLEAN_ALWAYS);
	forget_caches(&cpu[0]);			/* as after a resume */
	choose_asid(&a, &cpu[0], 0, false);
	CHECK_EQ(vmcb.tlb_control, TLB_FLUSH_ALL);
	CHECK_EQ(vmcb.clean, 0);
	vmcb.clean = CLEAN_ALWAYS;
	svm_set_creg(&vcpu, VMK_PAT, 6);
	CHECK_EQ(vmcb.clean, CLEAN_ALWAYS & ~CLEAN_NP);
	tap_done("SVM: ASIDs, flushes, clean bits");
}

static void
test_windows(void)
{
	struct vmk_entry e = { .inject = VMK_INJ_EXC, .vector = VMK_PF,
		.error_code = 7 };
	struct svm_vcpu a = { .vmcb = &vmcb };
	struct vmk_vcpu vcpu = { .arch = &a };

	memset(&vmcb, 0, sizeof(vmcb));
	vmcb.shadow = 1;
	take_back(&vcpu, x86_event(&vcpu.ev, &e, true));
	CHECK(vcpu.ev.exc_injected && vcpu.ev.exc_has_error);
	CHECK(vcpu.ev.exc_vector == VMK_PF && vcpu.ev.exc_error == 7);
	CHECK_EQ(vmcb.shadow, 0);
	vcpu.ev.exc_injected = false;
	take_back(&vcpu, EVENT_VALID | EVENT_EXC | VMK_BP);
	CHECK(!vcpu.ev.exc_injected);		/* INT3 runs again */
	take_back(&vcpu, EVENT_EXC | VMK_PF);
	CHECK(!vcpu.ev.exc_injected);		/* not valid */
	take_back(&vcpu, EVENT_VALID | EVENT_NMI | 2);
	CHECK(vcpu.ev.nmi_injected);
	take_back(&vcpu, EVENT_VALID | EVENT_INTR | 0x31);
	CHECK(vcpu.ev.irq_injected && vcpu.ev.irq_vector == 0x31);
	e = (struct vmk_entry){ .cr8_exit = true, .irq_window = true,
		.nmi_window = true, .trap_bp = true };
	set_intercepts(&vmcb, &e);
	CHECK((vmcb.icept[0] & SVM_ICEPT_CR_WRITE(8)) != 0);
	CHECK((vmcb.icept[2] & 1U << VMK_BP) != 0);
	CHECK((vmcb.icept[3] & (SVM_I3_VINTR | SVM_I3_IRET)) ==
	    (SVM_I3_VINTR | SVM_I3_IRET) && vmcb.v_irq == 1);
	e = (struct vmk_entry){ .inject = VMK_INJ_NONE };
	set_intercepts(&vmcb, &e);
	CHECK_EQ(vmcb.icept[0], SVM_ICEPT_CR_WRITE(4));
	CHECK_EQ(vmcb.icept[2], 1U << VMK_DB | 1U << VMK_AC | 1U << VMK_MC);
	CHECK_EQ(vmcb.icept[3] & (SVM_I3_VINTR | SVM_I3_IRET), 0);
	CHECK_EQ(vmcb.v_irq, 0);
	tap_done("SVM: events and windows");
}

int
main(void)
{
	test_exits();
	test_assists();
	test_asids();
	test_windows();
	return (tap_failed != 0);
}

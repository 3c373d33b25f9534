/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmx_test.c: the tables of x86/vmx_tables.c, without a processor.
 */
#include <string.h>

#include "x86.h"
#include "vmx.h"
#include "tap.h"

/* SDM 3D B: bits 14:13 are the width, 11:10 the kind, 9:1 the index. */
enum { W16, W64, W32, NAT };
enum { CONTROL, READ_ONLY, GUEST, HOST };
#define	FIELD(f, width, kind, index)					\
	CHECK_EQ(f, (width) << 13 | (kind) << 10 | (index) << 1)

static void
test_fields(void)
{
	FIELD(F_VPID, W16, CONTROL, 0);
	FIELD(F_GUEST_ES, W16, GUEST, 0);
	FIELD(F_HOST_TR, W16, HOST, 6);
	FIELD(F_MSR_BITMAP, W64, CONTROL, 2);
	FIELD(F_EXIT_STORE, W64, CONTROL, 3);
	FIELD(F_EXIT_LOAD, W64, CONTROL, 4);
	FIELD(F_ENTRY_LOAD, W64, CONTROL, 5);
	FIELD(F_TSC_OFFSET, W64, CONTROL, 8);
	FIELD(F_VIRTUAL_APIC, W64, CONTROL, 9);
	FIELD(F_EPTP, W64, CONTROL, 13);
	FIELD(F_GPA, W64, READ_ONLY, 0);
	FIELD(F_LINK, W64, GUEST, 0);
	FIELD(F_PAT, W64, GUEST, 2);
	FIELD(F_EFER, W64, GUEST, 3);
	FIELD(F_PDPTE0, W64, GUEST, 5);
	FIELD(F_HOST_EFER, W64, HOST, 1);
	FIELD(F_PROC, W32, CONTROL, 1);
	FIELD(F_EXIT, W32, CONTROL, 6);
	FIELD(F_ENTRY, W32, CONTROL, 9);
	FIELD(F_ENTRY_INFO, W32, CONTROL, 11);
	FIELD(F_TPR_THRESHOLD, W32, CONTROL, 14);
	FIELD(F_PROC2, W32, CONTROL, 15);
	FIELD(F_PLE_GAP, W32, CONTROL, 16);
	FIELD(F_PLE_WINDOW, W32, CONTROL, 17);
	FIELD(F_ERROR, W32, READ_ONLY, 0);
	FIELD(F_INSN_LEN, W32, READ_ONLY, 6);
	FIELD(F_LIMIT_ES, W32, GUEST, 0);
	FIELD(F_AR_ES, W32, GUEST, 10);
	FIELD(F_INTERRUPTIBILITY, W32, GUEST, 18);
	FIELD(F_SYSENTER_CS, W32, GUEST, 21);
	FIELD(F_HOST_SYSENTER_CS, W32, HOST, 0);
	FIELD(F_CR4_SHADOW, NAT, CONTROL, 3);
	FIELD(F_QUALIFICATION, NAT, READ_ONLY, 0);
	FIELD(F_BASE_ES, NAT, GUEST, 3);
	FIELD(F_DR7, NAT, GUEST, 13);
	FIELD(F_RFLAGS, NAT, GUEST, 16);
	FIELD(F_SYSENTER_EIP, NAT, GUEST, 19);
	FIELD(F_HOST_TR_BASE, NAT, HOST, 5);
	FIELD(F_HOST_RSP, NAT, HOST, 10);
	/* enum vmk_seg is the VMCS's order, GDTR and IDTR behind TR. */
	CHECK_EQ(F_GUEST_ES + 2 * VMK_TR, 0x080e);
	CHECK_EQ(F_LIMIT_ES + 2 * VMK_GDTR, 0x4810);
	CHECK_EQ(F_BASE_ES + 2 * VMK_IDTR, 0x6818);
	CHECK_EQ(F_AR_ES + 2 * VMK_LDTR, 0x4820);
	tap_done("VMX: field numbers");
}

static uint64_t
cap(uint32_t must, uint32_t may)
{
	return ((uint64_t)may << 32 | must);
}

static void
test_controls(void)
{
	static const uint32_t defaults[VMX_NWORDS] = { 0x16, 0x04006172, 0,
		0x36dff, 0x11ff };	/* SDM 3D A.3 to A.5, true MSRs */
	const struct vmx_controls c = { .need = 2, .want = 4, .never = 8 };
	uint32_t v;
	int i;

	CHECK(vmx_adjust(&c, cap(1, 7), &v));
	CHECK_EQ(v, 7);
	CHECK(vmx_adjust(&c, cap(0, 2), &v));
	CHECK_EQ(v, 2);
	CHECK(!vmx_adjust(&c, cap(0, 4), &v));	/* needed, not offered */
	CHECK(!vmx_adjust(&c, cap(8, 15), &v));	/* unbearable, forced */
	for (i = 0; i < VMX_NWORDS; i++) {
		CHECK(vmx_adjust(&vmx_controls[i], cap(defaults[i] &
		    ~vmx_controls[i].never, ~0U), &v));
		CHECK_EQ(v & vmx_controls[i].never, 0);
	}
	/* A processor without the true MSRs forces CR3 exits. */
	CHECK(!vmx_adjust(&vmx_controls[VMX_PROC], cap(0x0401e172, ~0U), &v));
	/* Nor one without unrestricted guest. */
	CHECK(!vmx_adjust(&vmx_controls[VMX_PROC2], cap(0, 0x7f), &v));
	tap_done("VMX: control words under capability MSRs");
}

static void
test_segments(void)
{
	struct vmk_segment s = { 0 };
	uint32_t attr;

	for (attr = 0; attr < 0x1000; attr++) {
		s.attr = (uint16_t)attr;
		s.limit = (attr & SEG_ATTR_G) != 0 ? 0xffffffffU : 0xffff;
		if ((attr & SEG_ATTR_P) == 0) {
			CHECK((vmx_access_rights(&s) & 0x10000) != 0);
			CHECK_EQ(vmx_attr(vmx_access_rights(&s)), attr);
			continue;
		}
		/* Only the accessed bit may be added. */
		CHECK_EQ(vmx_attr(vmx_access_rights(&s)) | 1, attr | 1);
		CHECK_EQ(vmx_access_rights(&s) & ~0xf0ffU, 0);
	}
	s.attr = 0x29b;				/* 64-bit code */
	s.limit = 0xffff;
	CHECK_EQ(vmx_access_rights(&s), 0x209b);
	CHECK_EQ(vmx_granularity(0, 0x100000), 0x8000);
	CHECK_EQ(vmx_granularity(0x8000, 0x1234), 0);
	CHECK_EQ(vmx_granularity(0x8000, 0xfffff), 0x8000);
	tap_done("VMX: access rights");
}

static struct vmk_exit
decoded(uint32_t reason, uint64_t qualification, uint32_t int_info)
{
	struct vmx_exit v = { .reason = reason, .int_info = int_info,
		.int_error = 0x42, .insn_len = 2, .gpa = 0xfee00020,
		.qualification = qualification, .rip = 0x1000 };
	struct vmk_exit x;

	memset(&x, 0, sizeof(x));
	vmx_decode(&v, &x);
	return (x);
}

static void
test_exits(void)
{
	struct vmk_exit x;
	uint32_t r;

	x = decoded(R_IO, 0x03f80000U | 0x8 | 0, 0);
	CHECK_EQ(x.kind, VMK_X_IO);
	CHECK_EQ(x.io.port, 0x3f8);
	CHECK_EQ(x.io.size, 1);
	CHECK(x.io.in && !x.io.string);
	CHECK_EQ(x.info2, 0x1002);		/* the next instruction */
	CHECK_EQ(decoded(R_IO, 0x10 | 3, 0).io.size, 4);
	CHECK(decoded(R_IO, 0x10 | 3, 0).io.string);
	CHECK_EQ(decoded(R_IO, 2, 0).kind, VMK_X_UNKNOWN);
	x = decoded(R_EPT_VIOLATION, 0x182, 0);
	CHECK_EQ(x.kind, VMK_X_NESTED_FAULT);
	CHECK(x.write);
	CHECK_EQ(x.gpa, 0xfee00020);
	CHECK_EQ(decoded(R_EPT_VIOLATION, 0x81, 0).kind, VMK_X_NESTED_WALK);
	x = decoded(R_EXCEPTION, 0, EVENT_VALID | EVENT_EXC | VMK_AC);
	CHECK_EQ(x.kind, VMK_X_EXCEPTION);
	CHECK_EQ(x.vector, VMK_AC);
	CHECK_EQ(x.error_code, 0x42);
	CHECK_EQ(decoded(R_EXCEPTION, 0, EVENT_VALID | EVENT_NMI | 2).kind,
	    VMK_X_NONE);
	CHECK_EQ(decoded(R_EXCEPTION, 0, EVENT_VALID | EVENT_EXC |
	    VMK_MC).kind, VMK_X_NONE);
	CHECK_EQ(decoded(R_CPUID, 0, 0).insn_len, 2);
	CHECK_EQ(decoded(R_TRIPLE, 0, 0).kind, VMK_X_SHUTDOWN);
	x = decoded(R_CR, 0x904, 0);		/* MOV R9, CR4 */
	CHECK_EQ(x.kind, VMK_X_CR_WRITE);
	CHECK(x.mov_cr.valid && x.mov_cr.cr == 4 && x.mov_cr.gpr == 9);
	CHECK_EQ(x.insn_len, 2);
	CHECK(!decoded(R_CR, 0x14, 0).mov_cr.valid);	/* MOV from CR */
	CHECK(!decoded(R_CR, 0x20, 0).mov_cr.valid);	/* CLTS */
	CHECK(!decoded(R_CR, 0x30, 0).mov_cr.valid);	/* LMSW */
	CHECK_EQ(decoded(R_NMI_WINDOW, 0, 0).kind, VMK_X_NONE);
	/* VMX's own instructions, and those that CPUID does not offer. */
	for (r = R_VMCLEAR; r <= R_VMXON; r++)
		CHECK_EQ(decoded(r, 0, 0).kind, VMK_X_UD);
	CHECK_EQ(decoded(R_INVEPT, 0, 0).kind, VMK_X_UD);
	CHECK_EQ(decoded(R_VMFUNC, 0, 0).kind, VMK_X_UD);
	CHECK_EQ(decoded(REASON_ENTRY_FAILED | R_BAD_STATE, 0, 0).kind,
	    VMK_X_INVALID);
	/* Whatever else there is ends in an error, never in a loop. */
	for (r = 60; r < 0x10000; r++)
		if (decoded(r, 0, 0).kind != VMK_X_UNKNOWN)
			CHECK_EQ(r, -1);
	CHECK_EQ(decoded(R_EPT_MISCONFIG, 0, 0).kind, VMK_X_UNKNOWN);
	CHECK_EQ(decoded(R_TASK, 0, 0).kind, VMK_X_UNKNOWN);
	tap_done("VMX: exits");
}

static void
test_events(void)
{
	struct vmk_entry e = { .inject = VMK_INJ_NONE };
	struct vmk_event_state ev = { 0 };
	int vector;

	CHECK_EQ(x86_event(&ev, &e, true), 0);
	e.inject = VMK_INJ_IRQ;
	e.vector = 0x30;
	ev.irq_injected = true;
	CHECK_EQ(x86_event(&ev, &e, true), 0x80000030U);
	e.inject = VMK_INJ_NMI;
	e.vector = 2;
	ev.nmi_injected = true;
	CHECK_EQ(x86_event(&ev, &e, true), 0x80000202U);
	e.inject = VMK_INJ_EXC;
	e.vector = VMK_PF;
	e.error_code = 7;
	ev.exc_injected = true;
	CHECK_EQ(x86_event(&ev, &e, true), 7ULL << 32 | 0x80000b0eU);
	CHECK(!ev.irq_injected && !ev.nmi_injected && !ev.exc_injected);
	CHECK_EQ(x86_event(&ev, &e, false), 0x8000030eU);
	/* What was injected and cut short comes back as it was. */
	for (vector = 0; vector < 32; vector++) {
		memset(&ev, 0, sizeof(ev));
		e.vector = (uint8_t)vector;
		x86_take_back(&ev, x86_event(&ev, &e, true));
		CHECK(ev.exc_injected);
		CHECK_EQ(ev.exc_vector, vector);
		CHECK_EQ(ev.exc_has_error, vector == 8 || vector == 17 ||
		    (vector >= 10 && vector <= 14));
		CHECK_EQ(ev.exc_error, ev.exc_has_error ? 7 : 0);
	}
	memset(&ev, 0, sizeof(ev));
	x86_take_back(&ev, 0x80000202U);
	CHECK(ev.nmi_injected && ev.nmi_masked);
	memset(&ev, 0, sizeof(ev));
	x86_take_back(&ev, 0x30);		/* not valid */
	x86_take_back(&ev, 0x80000480U);	/* INT 80h runs again */
	x86_take_back(&ev, 0x80000603U);	/* INT3 likewise */
	CHECK(!ev.irq_injected && !ev.exc_injected && !ev.nmi_injected);
	tap_done("events in and back, for both extensions");
}

int
main(void)
{
	test_fields();
	test_controls();
	test_segments();
	test_exits();
	test_events();
	return (tap_failed != 0);
}

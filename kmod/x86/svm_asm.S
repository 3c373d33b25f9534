/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * svm_asm.S: the SVM world switch (APM 2 15.5, 15.17).
 *
 * void svm_enter_guest(uint64_t vmcb_pa, uint64_t *gpr, uint64_t host_pa)
 *
 * Order.  CLGI holds off everything, NMIs included, while segment state is
 * neither the host's nor the guest's.  VMSAVE into the host page puts aside
 * what VMRUN does not: FS, GS, TR, LDTR, KernelGsBase and the SYSCALL and
 * SYSENTER registers; VMLOAD brings it back.  IF is set before VMRUN because
 * with V_INTR_MASKING the host's IF decides whether a physical interrupt ends
 * the guest.  An interrupt that is pending then makes VMRUN return at once.
 *
 * What the guest left in the return stack and in registers does
 * not outlive the exit (vmk_asm.h).
 */
#include "vmk_asm.h"

	.text
	.globl	svm_enter_guest
	.type	svm_enter_guest, @function
svm_enter_guest:
	PUSH_HOST
	pushq	%rsi			/* 8(%rsp) below: gpr */
	pushq	%rdx			/* 0(%rsp): host page */

	clgi
	movq	%rdx, %rax
	vmsave	%rax
	movq	%rdi, %rax
	vmload	%rax
	LOAD_GPRS %rsi
	movq	0x38(%rsi), %rdi
	movq	0x30(%rsi), %rsi
	sti
	vmrun	%rax
	cli

	vmsave	%rax
	movq	0(%rsp), %rax
	vmload	%rax
	movq	8(%rsp), %rax
	SAVE_GPRS %rax
	movq	%rdi, 0x38(%rax)
	FILL_RETURNS
	CLEAR_GPRS
	stgi

	addq	$16, %rsp
	POP_HOST
	ret
	.size	svm_enter_guest, . - svm_enter_guest

	.section .note.GNU-stack,"",@progbits

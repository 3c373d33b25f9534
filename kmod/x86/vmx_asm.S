/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmx_asm.S: the VMX world switch (SDM 3C 27, 28).
 *
 * int vmx_enter_guest(uint64_t *gpr, int launched)
 *
 * The processor switches what is in the VMCS; here are the general registers
 * but RSP.  It comes back at vmx_exited with RSP as it was left, or behind
 * VMLAUNCH or VMRESUME if these failed.  What the guest left in the return
 * stack and in registers does not outlive the exit (vmk_asm.h).
 */
#include "vmk_asm.h"

	.text
	.globl	vmx_enter_guest, vmx_exited
	.type	vmx_enter_guest, @function
	.type	vmx_exited, @function
vmx_enter_guest:
	PUSH_HOST
	pushq	%rdi			/* 0(%rsp): gpr */

	movl	$0x6c14, %eax		/* F_HOST_RSP */
	vmwrite	%rsp, %rax
	testl	%esi, %esi
	movq	0x00(%rdi), %rax
	LOAD_GPRS %rdi
	movq	0x30(%rdi), %rsi
	movq	0x38(%rdi), %rdi
	jnz	1f
	vmlaunch
	jmp	2f
1:	vmresume
2:	movl	$1, %eax
	addq	$8, %rsp
	jmp	3f

vmx_exited:
	xchgq	%rdi, 0(%rsp)		/* gpr; the guest's RDI to the stack */
	movq	%rax, 0x00(%rdi)
	SAVE_GPRS %rdi
	popq	%rax
	movq	%rax, 0x38(%rdi)
	FILL_RETURNS
	xorl	%eax, %eax
3:	CLEAR_GPRS
	POP_HOST
	ret
	.size	vmx_enter_guest, . - vmx_enter_guest

	.section .note.GNU-stack,"",@progbits

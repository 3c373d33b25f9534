/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmx_asm.S: the VMX world switch (SDM 3C 27, 28).
 *
 * int vmx_enter_guest(uint64_t *gpr, int launched)
 *
 * The processor switches what is in the VMCS; here are the general registers
 * but RSP.  It comes back at vmx_exited with RSP as it was left, or behind
 * VMLAUNCH or VMRESUME if these failed.  After an exit, return-stack entries
 * that the guest trained are overwritten before any RET (CVE-2017-5715), and
 * registers that still hold the guest's values are cleared.
 */
	.text
	.globl	vmx_enter_guest, vmx_exited
	.type	vmx_enter_guest, @function
	.type	vmx_exited, @function
vmx_enter_guest:
	pushq	%rbp
	pushq	%rbx
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	pushq	%rdi			/* 0(%rsp): gpr */

	movl	$0x6c14, %eax		/* F_HOST_RSP */
	vmwrite	%rsp, %rax
	testl	%esi, %esi

	/* enum vmk_gpr: rax rcx rdx rbx rsp rbp rsi rdi r8-r15. */
	movq	0x00(%rdi), %rax
	movq	0x08(%rdi), %rcx
	movq	0x10(%rdi), %rdx
	movq	0x18(%rdi), %rbx
	movq	0x28(%rdi), %rbp
	movq	0x30(%rdi), %rsi
	movq	0x40(%rdi), %r8
	movq	0x48(%rdi), %r9
	movq	0x50(%rdi), %r10
	movq	0x58(%rdi), %r11
	movq	0x60(%rdi), %r12
	movq	0x68(%rdi), %r13
	movq	0x70(%rdi), %r14
	movq	0x78(%rdi), %r15
	movq	0x38(%rdi), %rdi
	jnz	1f
	vmlaunch
	jmp	2f
1:	vmresume
2:	movl	$1, %eax
	addq	$8, %rsp
	jmp	6f

vmx_exited:
	xchgq	%rdi, 0(%rsp)		/* gpr; the guest's RDI to the stack */
	movq	%rax, 0x00(%rdi)
	movq	%rcx, 0x08(%rdi)
	movq	%rdx, 0x10(%rdi)
	movq	%rbx, 0x18(%rdi)
	movq	%rbp, 0x28(%rdi)
	movq	%rsi, 0x30(%rdi)
	movq	%r8, 0x40(%rdi)
	movq	%r9, 0x48(%rdi)
	movq	%r10, 0x50(%rdi)
	movq	%r11, 0x58(%rdi)
	movq	%r12, 0x60(%rdi)
	movq	%r13, 0x68(%rdi)
	movq	%r14, 0x70(%rdi)
	movq	%r15, 0x78(%rdi)
	popq	%rax
	movq	%rax, 0x38(%rdi)

	/* 32 calls whose return addresses end in a trap. */
	movl	$16, %eax
3:	call	4f
7:	pause
	lfence
	jmp	7b
4:	call	5f
8:	pause
	lfence
	jmp	8b
5:	decl	%eax
	jnz	3b
	addq	$256, %rsp
	xorl	%eax, %eax
6:	xorl	%ecx, %ecx
	xorl	%edx, %edx
	xorl	%esi, %esi
	xorl	%edi, %edi
	xorl	%r8d, %r8d
	xorl	%r9d, %r9d
	xorl	%r10d, %r10d
	xorl	%r11d, %r11d
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%rbx
	popq	%rbp
	ret
	.size	vmx_enter_guest, . - vmx_enter_guest

	.section .note.GNU-stack,"",@progbits

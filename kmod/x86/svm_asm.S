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
 * After the exit: return-stack entries that the guest trained are overwritten
 * before any RET (CVE-2017-5715), and registers that still hold the
 * guest's values are cleared.
 */
	.text
	.globl	svm_enter_guest
	.type	svm_enter_guest, @function
svm_enter_guest:
	pushq	%rbp
	pushq	%rbx
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	pushq	%rsi			/* 8(%rsp) below: gpr */
	pushq	%rdx			/* 0(%rsp): host page */

	clgi
	movq	%rdx, %rax
	vmsave	%rax
	movq	%rdi, %rax
	vmload	%rax

	/* enum vmk_gpr: rax rcx rdx rbx rsp rbp rsi rdi r8-r15. */
	movq	0x08(%rsi), %rcx
	movq	0x10(%rsi), %rdx
	movq	0x18(%rsi), %rbx
	movq	0x28(%rsi), %rbp
	movq	0x38(%rsi), %rdi
	movq	0x40(%rsi), %r8
	movq	0x48(%rsi), %r9
	movq	0x50(%rsi), %r10
	movq	0x58(%rsi), %r11
	movq	0x60(%rsi), %r12
	movq	0x68(%rsi), %r13
	movq	0x70(%rsi), %r14
	movq	0x78(%rsi), %r15
	movq	0x30(%rsi), %rsi

	sti
	vmrun	%rax
	cli

	vmsave	%rax
	movq	0(%rsp), %rax
	vmload	%rax

	movq	8(%rsp), %rax
	movq	%rcx, 0x08(%rax)
	movq	%rdx, 0x10(%rax)
	movq	%rbx, 0x18(%rax)
	movq	%rbp, 0x28(%rax)
	movq	%rsi, 0x30(%rax)
	movq	%rdi, 0x38(%rax)
	movq	%r8, 0x40(%rax)
	movq	%r9, 0x48(%rax)
	movq	%r10, 0x50(%rax)
	movq	%r11, 0x58(%rax)
	movq	%r12, 0x60(%rax)
	movq	%r13, 0x68(%rax)
	movq	%r14, 0x70(%rax)
	movq	%r15, 0x78(%rax)

	/* 32 calls whose return addresses end in a trap. */
	movl	$16, %eax
1:	call	2f
3:	pause
	lfence
	jmp	3b
2:	call	4f
5:	pause
	lfence
	jmp	5b
4:	decl	%eax
	jnz	1b
	addq	$256, %rsp

	xorl	%ecx, %ecx
	xorl	%edx, %edx
	xorl	%esi, %esi
	xorl	%edi, %edi
	xorl	%r8d, %r8d
	xorl	%r9d, %r9d
	xorl	%r10d, %r10d
	xorl	%r11d, %r11d
	stgi

	addq	$16, %rsp
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%rbx
	popq	%rbp
	ret
	.size	svm_enter_guest, . - svm_enter_guest

	.section .note.GNU-stack,"",@progbits

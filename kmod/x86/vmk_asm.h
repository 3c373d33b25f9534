/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_asm.h: what the two world switches do with general registers.  The
 * guest's are an array in the order of enum vmk_gpr: RAX RCX RDX RBX RSP RBP
 * RSI RDI R8-R15.  RAX, RSP and the register that holds the array's address
 * are the caller's affair.
 */
	.macro	PUSH_HOST
	.irp	r, rbp, rbx, r12, r13, r14, r15
	pushq	%\r
	.endr
	.endm

	.macro	POP_HOST
	.irp	r, r15, r14, r13, r12, rbx, rbp
	popq	%\r
	.endr
	.endm

	.macro	LOAD_GPRS from
	movq	0x08(\from), %rcx
	movq	0x10(\from), %rdx
	movq	0x18(\from), %rbx
	movq	0x28(\from), %rbp
	movq	0x40(\from), %r8
	movq	0x48(\from), %r9
	movq	0x50(\from), %r10
	movq	0x58(\from), %r11
	movq	0x60(\from), %r12
	movq	0x68(\from), %r13
	movq	0x70(\from), %r14
	movq	0x78(\from), %r15
	.endm

	.macro	SAVE_GPRS to
	movq	%rcx, 0x08(\to)
	movq	%rdx, 0x10(\to)
	movq	%rbx, 0x18(\to)
	movq	%rbp, 0x28(\to)
	movq	%rsi, 0x30(\to)
	movq	%r8, 0x40(\to)
	movq	%r9, 0x48(\to)
	movq	%r10, 0x50(\to)
	movq	%r11, 0x58(\to)
	movq	%r12, 0x60(\to)
	movq	%r13, 0x68(\to)
	movq	%r14, 0x70(\to)
	movq	%r15, 0x78(\to)
	.endm

	/*
	 * 32 calls whose return addresses end in a trap, before any RET of
	 * ours could use what the guest trained (CVE-2017-5715).  Takes EAX.
	 */
	.macro	FILL_RETURNS
	movl	$16, %eax
771:	call	773f
772:	pause
	lfence
	jmp	772b
773:	call	775f
774:	pause
	lfence
	jmp	774b
775:	decl	%eax
	jnz	771b
	addq	$256, %rsp
	.endm

	/* What the C code does not get back by POP_HOST. */
	.macro	CLEAR_GPRS
	.irp	r, ecx, edx, esi, edi, r8d, r9d, r10d, r11d
	xorl	%\r, %\r
	.endr
	.endm

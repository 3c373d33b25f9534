/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * payloads.S: guest programs of nested_test.c.  Each is position-independent
 * and is copied to guest-physical 0x10000; 64-bit ones run with the first
 * 64 MiB identity-mapped, IDT at 0x5000, stack at 0x20000.
 *
 * A payload reports by writing 32-bit words to port 0x10 and ends with HLT.
 */
	.section .rodata

	.macro PAYLOAD name
	.globl	pl_\name, pl_\name\()_end
pl_\name:
	.endm
	.macro END name
pl_\name\()_end:
	.endm

/* Report EAX. */
	.macro REPORT
	outl	%eax, $0x10
	.endm

	.code64
PAYLOAD count
	xorl	%eax, %eax
	movl	$100000, %ecx
1:	incl	%eax
	decl	%ecx
	jnz	1b
	REPORT
	hlt
END count

/* EBX port writes, for timing. */
PAYLOAD ports
1:	outb	%al, $0x11
	decl	%ebx
	jnz	1b
	hlt
END ports

/* A million turns, then EBX port writes. */
PAYLOAD probe
	movl	$1000000, %ecx
1:	decl	%ecx
	jnz	1b
	movl	%ecx, %eax
	REPORT
2:	outb	%al, $0x11
	decl	%ebx
	jnz	2b
	movl	$0x600d, %eax
	REPORT
	hlt
END probe

/* HLT with an x2APIC until there were EBX interrupts; then port 0x12. */
PAYLOAD halts
	movl	$0x1b, %ecx
	rdmsr
	orl	$0xc00, %eax
	wrmsr
	movl	$0x80f, %ecx
	movl	$0x1ff, %eax
	xorl	%edx, %edx
	wrmsr
	incl	0x7004				/* ready */
1:	sti
	hlt
	cli
	cmpl	%ebx, 0x7000
	jb	1b
	outb	%al, $0x12
END halts
	.balign	64
PAYLOAD halts_handler
	incl	0x7000
	movl	$0x80b, %ecx			/* EOI */
	xorl	%eax, %eax
	xorl	%edx, %edx
	wrmsr
	iretq
END halts_handler

PAYLOAD mmios
	movl	$0x18000000, %edi
1:	movl	%eax, (%rdi)
	decl	%ebx
	jnz	1b
	hlt
END mmios

PAYLOAD cpuids
1:	xorl	%eax, %eax
	pushq	%rbx
	cpuid
	popq	%rbx
	decl	%ebx
	jnz	1b
	hlt
END cpuids

/* Prefixes on an intercepted instruction: the length must include them. */
PAYLOAD prefixed
	movl	$0x40000000, %eax
	xorl	%ecx, %ecx
	.byte	0x66, 0x2e, 0x0f, 0xa2
	movl	%ebx, %eax
	REPORT
	movl	$0x40000000, %eax
	.byte	0x48, 0x0f, 0xa2
	movl	%ebx, %eax
	REPORT
	hlt
END prefixed

/* MMIO at RBX: store, load with sign, OR, exchange, string store. */
PAYLOAD mmio
	movl	$0x11223344, %ecx
	movl	%ecx, 8(%rbx)
	movsbl	(%rbx), %eax
	REPORT
	orb	$0x21, 1(%rbx)
	movl	$0x5555, %eax
	xchgl	%eax, 4(%rbx)
	REPORT
	leaq	16(%rbx), %rdi
	movl	$3, %ecx
	movw	$0x7777, %ax
	cld
	rep	stosw
	movl	%ecx, %eax
	REPORT
	/* Across a page. */
	movq	$-1, %rax
	movq	%rax, 0xffc(%rbx)
	hlt
END mmio

/* INS and OUTS. */
PAYLOAD strings
	movl	$0x30ff0, %edi
	movl	$0x40, %ecx
	movw	$0x1f0, %dx
	cld
	rep	insb
	movl	$0x30ff0, %esi
	movl	$0x40, %ecx
	movw	$0x1f1, %dx
	rep	outsb
	movl	%esi, %eax
	REPORT
	hlt
END strings

/* MSRs: LSTAR, EFER, FS and GS base, one that does not exist (#GP). */
PAYLOAD msrs
	movl	$0xc0000082, %ecx
	movl	$0x12345678, %eax
	movl	$0xffffffff, %edx
	wrmsr
	xorl	%eax, %eax
	rdmsr
	REPORT
	movl	$0xc0000080, %ecx
	rdmsr
	REPORT
	movl	$0xc0000101, %ecx
	movl	$0x9000, %eax
	xorl	%edx, %edx
	wrmsr
	movl	$0xabcdef, %gs:(0)
	movl	0x9000, %eax
	REPORT
	movl	$0x12345678, %ecx
	rdmsr
	hlt
END msrs

/*
 * Exception handlers: report 0x100 | vector, then return past an instruction
 * whose length is in R15.
 */
	.macro HANDLER vector, error
	.globl	pl_h\vector
	.balign	64
	.if	\error
	addq	$8, %rsp
	.endif
	pushq	%rax
	movl	8(%rsp), %eax			/* low byte of RIP */
	shll	$16, %eax
	andl	$0xff0000, %eax
	orl	$(0x100 | \vector), %eax
	REPORT
	popq	%rax
	addq	%r15, (%rsp)
	iretq
	.endm
	.balign	64
PAYLOAD handlers
	.irp	v, 0, 1, 2, 3, 4, 5, 6, 7
	HANDLER \v, 0
	.endr
	HANDLER 8, 1
	HANDLER 9, 0
	.irp	v, 10, 11, 12, 13, 14
	HANDLER \v, 1
	.endr
	HANDLER 15, 0
	HANDLER 16, 0
	HANDLER 17, 1
	.irp	v, 18, 19
	HANDLER \v, 0
	.endr
	.balign	64
END handlers

/* Everything of SVM's and what else a guest must not have: #UD each. */
PAYLOAD forbidden
	movl	$3, %r15d
	movl	$0x8000, %eax
	vmrun	%rax
	vmload	%rax
	vmsave	%rax
	stgi
	clgi
	invlpga	%rax, %ecx
	skinit	%eax
	/* RDTSCP is intercepted too, but QEMU 7.2's TCG does not look. */
	xorl	%ecx, %ecx
	monitor	%rax, %ecx, %edx
	mwait	%eax, %ecx
	.byte	0x0f, 0x01, 0xc1		/* vmcall: Intel's */
	movl	$2, %r15d
	.byte	0x0f, 0xaa			/* rsm */
	rdpmc					/* #GP */
	movl	$0xdead, %eax
	REPORT
	hlt
END forbidden

PAYLOAD hypercall
	movl	$5, %eax
	vmmcall
	REPORT
	hlt
END hypercall

/* Interrupts: STI, wait; the handler reports RDI's value. */
PAYLOAD irq
	sti
	nop
1:	pause
	cmpl	$0, 0x7000
	je	1b
	movl	0x7000, %eax
	REPORT
	cli
	hlt
END irq
	.balign	64
PAYLOAD irq_handler
	movl	$0x31, 0x7000
	iretq
END irq_handler

/* HLT with interrupts off, on a machine with a user irqchip. */
PAYLOAD spin
1:	jmp	1b
END spin

/* FPU and SSE registers across exits. */
PAYLOAD fpu
	movq	%cr4, %rax
	orl	$0x40600, %eax			/* OSXSAVE OSXMMEXCPT OSFXSR */
	movq	%rax, %cr4
	xorl	%ecx, %ecx
	xgetbv
	movl	$3, %eax
	xorl	%edx, %edx
	xsetbv
	fninit
	fldpi
	movq	$0x123456789abcdef, %rax
	movq	%rax, %xmm0
	movq	%rax, %xmm15
	movl	$1000, %ebx
1:	outb	%al, $0x11
	movq	%xmm0, %rcx
	movq	%xmm15, %rdx
	cmpq	%rcx, %rdx
	jne	2f
	addq	$1, %rcx
	movq	%rcx, %xmm0
	movq	%rcx, %xmm15
	decl	%ebx
	jnz	1b
	fldpi
	fcompp
	fnstsw	%ax
	andl	$0x4500, %eax
	REPORT
	movq	%xmm0, %rax
	subl	$0x89abcdef, %eax
	REPORT
	hlt
2:	movl	$0xbad, %eax
	REPORT
	hlt
END fpu

/* XSETBV with a value that is not offered: #GP. */
PAYLOAD badxcr
	movl	$3, %r15d
	movq	%cr4, %rax
	orl	$0x40000, %eax
	movq	%rax, %cr4
	xorl	%ecx, %ecx
	movl	$0x80000001, %eax
	xorl	%edx, %edx
	xsetbv
	hlt
END badxcr

/* Write one byte in every page from 1 MiB to 16 MiB. */
PAYLOAD touch
	movl	$0x100000, %edi
1:	movb	$0x5a, (%rdi)
	addl	$4096, %edi
	cmpl	$0x1000000, %edi
	jne	1b
	movl	%edi, %eax
	REPORT
	hlt
END touch

/* Write pages 3, 5 and 200 of the slot at RBX, report, do it again. */
PAYLOAD dirty
	movb	$1, 3*4096(%rbx)
	movb	$1, 5*4096(%rbx)
	movb	$1, 200*4096(%rbx)
	movl	$1, %eax
	REPORT
	movb	$2, 5*4096(%rbx)
	movl	$2, %eax
	REPORT
	hlt
END dirty

/* A page of RBX over and over, with a count at 0x7000. */
PAYLOAD hammer
1:	lock incl (%rbx)
	incl	0x7000
	jmp	1b
END hammer

/* Each vCPU adds 100000 to a shared counter. */
PAYLOAD smp
	movl	$100000, %ecx
1:	lock incl 0x7000
	decl	%ecx
	jnz	1b
	hlt
END smp

/* No IDT: a triple fault. */
PAYLOAD triple
	lidt	1f(%rip)
	ud2
1:	.word	0
	.quad	0
END triple

/*
 * A #DB after every instruction, the handler's IRET included.  (A breakpoint
 * on the exception frame itself, CVE-2015-8104, makes QEMU 7.2's TCG abort;
 * core_test plays that one.)
 */
PAYLOAD db_loop
	xorl	%r15d, %r15d
	pushfq
	orl	$0x100, (%rsp)
	popfq
1:	nop
	jmp	1b
END db_loop

/* CR0: set CD, write-back and clear it; TS; CR4.MCE off. */
PAYLOAD control
	movq	%cr0, %rax
	movl	%eax, %ebx
	orl	$0x40000000, %eax
	movq	%rax, %cr0
	wbinvd
	movq	%rbx, %cr0
	movq	%cr4, %rax
	andl	$~0x40, %eax
	movq	%rax, %cr4
	clts
	movq	%cr0, %rax
	andl	$0x60000008, %eax
	REPORT
	movl	$3, %r15d
	movl	$0x2000, %eax			/* VMXE: #GP */
	movq	%rax, %cr4
	hlt
END control

	.code16
/* Real mode at 0x1000:0: segments, string port, 32-bit operands. */
PAYLOAD real
	movw	%cs, %ax
	movw	%ax, %ds
	movl	$0x12345678, %eax
	movl	%eax, 0x100
	movl	%ds:0x100, %eax
	outl	%eax, $0x10
	smsw	%ax
	andl	$1, %eax
	outl	%eax, $0x10
	movw	$0xb800, %ax
	movw	%ax, %es
	movw	$0x0741, %ax
	xorw	%di, %di
	stosw
	movb	%es:2, %al
	movzbl	%al, %eax
	outl	%eax, $0x10
	hlt
END real
	.section .note.GNU-stack,"",@progbits

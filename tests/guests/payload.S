/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The smallest guest: a multiboot image of 32-bit code. It writes "ready" to COM1 and then does what "do=X" on its
 * command line says: b(utton): wait for the power button, then power off (the default); e(cho): the same, and write to
 * COM1 what comes from it; i(dle): sleep for ever; c(rash): triple fault; r(eset); h(alt); p(ower off at once).
 */
	.code32
	.globl _start
	.set FLAGS, 1 << 16
_start:
	.long 0x1BADB002, FLAGS, -(0x1BADB002 + FLAGS)
	.long _start, _start, _end, _end, entry
entry:
	movl	$0x180000, %esp
	movl	16(%ebx), %esi		/* command line */
	movl	$message, %edi
1:	movb	(%edi), %al
	testb	%al, %al
	jz	2f
	movw	$0x3F8, %dx
	outb	%al, %dx
	incl	%edi
	jmp	1b
2:	movb	$'b', %cl
	testl	$4, (%ebx)
	jz	act
3:	movl	(%esi), %eax
	testb	%al, %al
	jz	act
	andl	$0xFFFFFF, %eax
	cmpl	$0x3D6F64, %eax		/* "do=" */
	je	4f
	incl	%esi
	jmp	3b
4:	movb	3(%esi), %cl
act:
	cmpb	$'i', %cl
	je	idle
	cmpb	$'c', %cl
	je	crash
	cmpb	$'r', %cl
	je	reset
	cmpb	$'h', %cl
	je	halt
	cmpb	$'p', %cl
	je	poweroff
button:
	cmpb	$'e', %cl
	jne	6f
	movw	$0x3FD, %dx		/* line status: bit 0 is data ready */
	inb	%dx, %al
	testb	$1, %al
	jz	6f
	movw	$0x3F8, %dx
	inb	%dx, %al
	outb	%al, %dx
6:
	movw	$0x600, %dx		/* PM1 status, ACPI 4.8.3.1.1: bit 8 is the power button */
	inw	%dx, %ax
	testw	$0x100, %ax
	jnz	poweroff
	pause
	jmp	button
poweroff:
	movw	$0x604, %dx		/* PM1 control: SLP_EN with the SLP_TYP of S5 */
	movw	$0x2000, %ax
	outw	%ax, %dx
	jmp	halt
reset:
	movw	$0xCF9, %dx
	movb	$6, %al
	outb	%al, %dx
halt:
	cli
	hlt
	jmp	halt
idle:
	movb	$0xFF, %al
	outb	%al, $0x21
	outb	%al, $0xA1
	sti
5:	hlt
	jmp	5b
crash:
	lidt	nothing
	ud2
	.align 4
nothing:
	.word 0
	.long 0
message:
	.asciz "ready\r\n"
	.align 4096
_end:

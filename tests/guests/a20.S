/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The boot sector of a floppy that opens and closes the A20 gate in every way that a PC knows and writes to COM1 what
 * memory looks like after each: 1 when a megabyte and the bytes behind it differ, 0 when they are the same. Then it ends
 * the VM through the debug-exit port with status 33.
 */
	.code16
	.globl _start
_start:
	cli
	cld
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %ss
	movw	$0x7C00, %sp
	decw	%ax
	movw	%ax, %es
	movw	$message, %si
1:	lodsb
	testb	%al, %al
	jz	2f
	call	put
	jmp	1b
2:	call	show			/* as the BIOS left it */
	movw	$0x2400, %ax		/* INT 15h AX=2400h: close */
	int	$0x15
	call	show
	movw	$0x2402, %ax		/* INT 15h AX=2402h: which is it? */
	int	$0x15
	addb	$'0', %al
	call	put
	movw	$0x2401, %ax		/* INT 15h AX=2401h: open */
	int	$0x15
	call	show
	movb	$0, %al			/* system control port A */
	outb	%al, $0x92
	call	show
	movb	$0xDF, %al		/* keyboard controller, open */
	call	command
	call	show
	movb	$0xDD, %al		/* keyboard controller, close */
	call	command
	call	show
	movb	$2, %al
	outb	%al, $0x92
	call	show
	movb	$0xD1, %al		/* keyboard controller, write the output port */
	call	command
	call	ready
	movb	$0xDD, %al
	outb	%al, $0x60
	call	ready
	call	show
	movb	$0xD1, %al
	call	command
	call	ready
	movb	$0xDF, %al
	outb	%al, $0x60
	call	ready
	call	show
	movb	$'\n', %al
	call	put
	movb	$16, %al
	outb	%al, $0xF4
	hlt

/* 0:500h and FFFFh:510h are one byte while the gate is closed. */
show:
	movb	$0x55, 0x500
	movb	$0xAA, %es:0x510
	cmpb	$0xAA, 0x500
	movb	$'0', %al
	je	put
	incw	%ax
put:
	movw	$0x3F8, %dx
	outb	%al, %dx
	ret

command:
	call	ready
	outb	%al, $0x64
ready:
	pushw	%ax
1:	inb	$0x64, %al
	testb	$2, %al
	jnz	1b
	popw	%ax
	ret

message:
	.asciz "A20 "
	.org	510
	.word	0xAA55

/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The boot sector of a floppy for old software's sake: 16-bit code under a PC BIOS. It writes a line to the screen
 * (INT 10h) and to COM1, then sleeps. Like the systems of its time it knows of no power button.
 */
	.code16
	.globl _start
_start:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %ss
	movw	$0x7C00, %sp
	sti
	cld
	movw	$message, %si
next:
	lodsb
	testb	%al, %al
	jz	sleep
	movw	$0x3F8, %dx
	outb	%al, %dx
	movb	$0x0E, %ah		/* teletype */
	movw	$7, %bx
	int	$0x10
	jmp	next
sleep:
	hlt
	jmp	sleep
message:
	.asciz "The legacy box is ready.\r\n"
	.org	510
	.word	0xAA55

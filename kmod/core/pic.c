/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * pic.c: two cascaded 8259A interrupt controllers (Intel 8259A data sheet,
 * order number 231468), with the ELCR of the PIIX south bridge.
 *
 * Theory.  Each chip has eight request lines, edge- or (ELCR) level-triggered,
 * a mask, and a set of interrupts in service.  The highest request that is
 * not masked and has priority over what is in service drives the output.
 * The slave's output is the master's input 2; the master's output goes to
 * LINT0 of every local APIC, of which the one that takes ExtINT asks for the
 * vector.
 *
 * Priorities rotate: priority_add is the line that has the highest.
 */
#include "vmk_chips.h"

#define	CASCADE	2

static void
chip_reset(struct abi_pic_state *c)
{
	uint8_t elcr = c->elcr, mask = c->elcr_mask;

	memset(c, 0, sizeof(*c));
	c->elcr = elcr;
	c->elcr_mask = mask;
}

void
vmk_pic_reset(struct vmk_pic *p)
{
	memset(p, 0, sizeof(*p));
	/* Lines 0, 1, 2, 8 and 13 are always edge-triggered. */
	p->chip[0].elcr_mask = 0xf8;
	p->chip[1].elcr_mask = 0xde;
}

/* Priority 0 (highest) to 7 of the first line set in mask; 8: none. */
static unsigned int
priority(const struct abi_pic_state *c, uint8_t mask)
{
	unsigned int p;

	for (p = 0; p < 8; p++)
		if ((mask >> ((p + c->priority_add) & 7) & 1) != 0)
			break;
	return (p);
}

/* The line that drives this chip's output, or -1. */
static int
winner(const struct vmk_pic *p, unsigned int n)
{
	const struct abi_pic_state *c = &p->chip[n];
	unsigned int want, busy;
	uint8_t isr = c->isr;

	want = priority(c, c->irr & (uint8_t)~c->imr);
	if (want == 8)
		return (-1);
	/* Special mask: only unmasked lines in service inhibit. */
	if (c->special_mask != 0)
		isr &= (uint8_t)~c->imr;
	/* Fully nested: the slave may interrupt itself through the master. */
	if (c->special_fully_nested_mode != 0 && n == 0)
		isr &= (uint8_t)~(1U << CASCADE);
	busy = priority(c, isr);
	if (want >= busy)
		return (-1);
	return ((int)((want + c->priority_add) & 7));
}

/* 1 newly requested, 0 requested already, -1 masked. */
static int
line_set(struct abi_pic_state *c, unsigned int line, bool level)
{
	uint8_t bit = (uint8_t)(1U << line);
	int ret = 1;

	if ((c->elcr & bit) != 0) {
		if (level) {
			ret = (c->irr & bit) == 0;
			c->irr |= bit;
			c->last_irr |= bit;
		} else {
			c->irr &= (uint8_t)~bit;
			c->last_irr &= (uint8_t)~bit;
		}
	} else if (level) {
		if ((c->last_irr & bit) == 0) {
			ret = (c->irr & bit) == 0;
			c->irr |= bit;
		}
		c->last_irr |= bit;
	} else {
		c->last_irr &= (uint8_t)~bit;
	}
	return ((c->imr & bit) != 0 ? -1 : ret);
}

static void
update(struct vmk_vm *vm)
{
	struct vmk_pic *p = &vm->irqchip->pic;
	struct vmk_vcpu *vcpu;
	bool out;
	uint32_t i;

	if (winner(p, 1) >= 0) {
		/* A pulse, so that the master sees an edge each time. */
		(void)line_set(&p->chip[0], CASCADE, true);
		(void)line_set(&p->chip[0], CASCADE, false);
	}
	out = winner(p, 0) >= 0;
	__atomic_store_n(&p->output, out, __ATOMIC_RELEASE);
	if (!out)
		return;
	for (i = 0; (vcpu = vmk_vcpu_at(vm, i)) != NULL; i++)
		if (vcpu->lapic != NULL && vmk_lapic_takes_pic(vcpu))
			vmk_vcpu_notify(vcpu, VMK_REQ_EVENT);
}

int
vmk_pic_set(struct vmk_vm *vm, unsigned int irq, unsigned int source,
    bool level)
{
	struct vmk_pic *p = &vm->irqchip->pic;
	int ret;

	if (irq > 15)
		return (-1);
	if (level)
		p->line[irq] |= (uint8_t)(1U << source);
	else
		p->line[irq] &= (uint8_t)~(1U << source);
	ret = line_set(&p->chip[irq >> 3], irq & 7, p->line[irq] != 0);
	update(vm);
	return (ret);
}

static void
in_service(struct abi_pic_state *c, unsigned int line)
{
	uint8_t bit = (uint8_t)(1U << line);

	c->isr |= bit;
	if ((c->elcr & bit) == 0)
		c->irr &= (uint8_t)~bit;
	if (c->auto_eoi != 0) {
		if (c->rotate_on_auto_eoi != 0)
			c->priority_add = (line + 1) & 7;
		c->isr &= (uint8_t)~bit;
	}
}

/* Without a request the answer is line 7: a spurious interrupt. */
int
vmk_pic_ack(struct vmk_vm *vm)
{
	struct vmk_pic *p = &vm->irqchip->pic;
	int line = winner(p, 0), sub, vector;

	if (line < 0) {
		vector = p->chip[0].irq_base + 7;
	} else if (line != CASCADE) {
		in_service(&p->chip[0], (unsigned int)line);
		vector = p->chip[0].irq_base + line;
	} else {
		sub = winner(p, 1);
		if (sub >= 0)
			in_service(&p->chip[1], (unsigned int)sub);
		in_service(&p->chip[0], CASCADE);
		vector = p->chip[1].irq_base + (sub >= 0 ? sub : 7);
	}
	update(vm);
	return (vector & 0xff);
}

static void
ocw2(struct abi_pic_state *c, uint8_t v)
{
	unsigned int cmd = v >> 5, line = v & 7, p;

	switch (cmd) {
	case 0: case 4:			/* rotate in automatic EOI mode */
		c->rotate_on_auto_eoi = cmd >> 2;
		break;
	case 1: case 5:			/* non-specific EOI, rotate */
		p = priority(c, c->isr);
		if (p == 8)
			break;
		line = (p + c->priority_add) & 7;
		c->isr &= (uint8_t)~(1U << line);
		if (cmd == 5)
			c->priority_add = (line + 1) & 7;
		break;
	case 3: case 7:			/* specific EOI, rotate */
		c->isr &= (uint8_t)~(1U << line);
		if (cmd == 7)
			c->priority_add = (line + 1) & 7;
		break;
	case 6:				/* set priority */
		c->priority_add = (line + 1) & 7;
		break;
	default:
		break;
	}
}

static void
chip_write(struct abi_pic_state *c, unsigned int a0, uint8_t v)
{
	if (a0 == 0) {
		if ((v & 0x10) != 0) {			/* ICW1 */
			chip_reset(c);
			c->init_state = 1;
			c->init4 = v & 1;
		} else if ((v & 0x08) != 0) {		/* OCW3 */
			if ((v & 0x04) != 0)
				c->poll = 1;
			if ((v & 0x02) != 0)
				c->read_reg_select = v & 1;
			if ((v & 0x40) != 0)
				c->special_mask = v >> 5 & 1;
		} else {
			ocw2(c, v);
		}
		return;
	}
	switch (c->init_state) {
	case 0:
		c->imr = v;				/* OCW1 */
		break;
	case 1:
		c->irq_base = v & 0xf8;			/* ICW2 */
		c->init_state = 2;
		break;
	case 2:						/* ICW3 is fixed */
		c->init_state = c->init4 != 0 ? 3 : 0;
		break;
	default:
		c->special_fully_nested_mode = v >> 4 & 1; /* ICW4 */
		c->auto_eoi = v >> 1 & 1;
		c->init_state = 0;
		break;
	}
}

static uint8_t
chip_read(struct vmk_vm *vm, unsigned int n, unsigned int a0)
{
	struct vmk_pic *p = &vm->irqchip->pic;
	struct abi_pic_state *c = &p->chip[n];
	int line;

	if (c->poll != 0) {
		/* A poll is an acknowledge. */
		c->poll = 0;
		line = winner(p, n);
		if (line < 0)
			return (0);
		in_service(c, (unsigned int)line);
		update(vm);
		return ((uint8_t)(0x80 | line));
	}
	if (a0 != 0)
		return (c->imr);
	return (c->read_reg_select != 0 ? c->isr : c->irr);
}

bool
vmk_pic_io(struct vmk_vm *vm, uint16_t port, uint32_t *v, bool write)
{
	struct vmk_pic *p = &vm->irqchip->pic;
	unsigned int n;

	switch (port) {
	case 0x20: case 0x21: case 0xa0: case 0xa1:
		n = port >> 7;
		if (write) {
			chip_write(&p->chip[n], port & 1, (uint8_t)*v);
			update(vm);
		} else {
			*v = chip_read(vm, n, port & 1);
		}
		return (true);
	case 0x4d0: case 0x4d1:
		n = port & 1;
		if (write)
			p->chip[n].elcr = (uint8_t)*v & p->chip[n].elcr_mask;
		else
			*v = p->chip[n].elcr;
		return (true);
	default:
		return (false);
	}
}

void
vmk_pic_state_set(struct vmk_vm *vm, unsigned int chip,
    const struct abi_pic_state *a)
{
	struct abi_pic_state *c = &vm->irqchip->pic.chip[chip];
	uint8_t mask = c->elcr_mask;

	*c = *a;
	/* What is used as an index or shift stays in range. */
	c->priority_add &= 7;
	c->irq_base &= 0xf8;
	c->init_state &= 3;
	c->elcr_mask = mask;
	c->elcr &= mask;
	update(vm);
}

/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * ioapic.c: the I/O APIC (Intel 82093AA data sheet, order number 290566).
 *
 * Theory.  Twenty-four pins, each with a redirection entry.  An edge pin
 * sends its message when the wire rises; a level pin sends while the wire is
 * high and Remote IRR is clear, sets Remote IRR, and sends again after an
 * EOI that finds the wire still high.  One EOI leads to at most one message
 * a pin, so a wire that is stuck costs the guest its own time only.
 *
 * The register select is checked at each use, not when it is written
 * (CVE-2013-1798).
 */
#include "vmk_chips.h"

#define	E_VECTOR(e)	((uint8_t)(e))
#define	E_MODE(e)	((uint8_t)((e) >> 8 & 7))
#define	E_LOGICAL	0x0800ULL
#define	E_REMOTE_IRR	0x4000ULL		/* read only */
#define	E_LEVEL		0x8000ULL
#define	E_MASKED	0x10000ULL
#define	E_DEST(e)	((uint32_t)((e) >> 56))
#define	E_WRITABLE	0xff0000000001afffULL

#define	VERSION		(0x11U | (ABI_IOAPIC_NUM_PINS - 1) << 16)

void
vmk_ioapic_reset(struct vmk_ioapic *io)
{
	unsigned int i;

	memset(io, 0, sizeof(*io));
	for (i = 0; i < ABI_IOAPIC_NUM_PINS; i++)
		io->redir[i] = E_MASKED;
}

static int
send(struct vmk_vm *vm, unsigned int pin)
{
	uint64_t *e = &vm->irqchip->ioapic.redir[pin];
	struct vmk_irq_msg m = { .dest = E_DEST(*e), .vector = E_VECTOR(*e),
		.mode = E_MODE(*e), .logical = (*e & E_LOGICAL) != 0,
		.level = (*e & E_LEVEL) != 0 };
	int ret;

	ret = vmk_lapic_deliver(vm, &m);
	if (m.level && ret >= 0 && m.mode <= VMK_DM_LOWEST)
		*e |= E_REMOTE_IRR;
	return (ret);
}

int
vmk_ioapic_set(struct vmk_vm *vm, unsigned int pin, unsigned int source,
    bool level)
{
	struct vmk_ioapic *io = &vm->irqchip->ioapic;
	uint8_t old;
	uint64_t e;

	if (pin >= ABI_IOAPIC_NUM_PINS)
		return (-1);
	old = io->line[pin];
	if (level)
		io->line[pin] |= (uint8_t)(1U << source);
	else
		io->line[pin] &= (uint8_t)~(1U << source);
	if (io->line[pin] == 0)
		return (1);
	e = io->redir[pin];
	if ((e & E_MASKED) != 0)
		return (-1);
	if ((e & E_LEVEL) != 0)
		return ((e & E_REMOTE_IRR) != 0 ? 0 : send(vm, pin));
	return (old != 0 ? 0 : send(vm, pin));
}

void
vmk_ioapic_eoi(struct vmk_vm *vm, uint8_t vector)
{
	struct vmk_ioapic *io = &vm->irqchip->ioapic;
	unsigned int i;

	for (i = 0; i < ABI_IOAPIC_NUM_PINS; i++) {
		uint64_t *e = &io->redir[i];

		if ((*e & E_LEVEL) == 0 || E_VECTOR(*e) != vector ||
		    (*e & E_REMOTE_IRR) == 0)
			continue;
		*e &= ~E_REMOTE_IRR;
		if (io->line[i] != 0 && (*e & E_MASKED) == 0)
			(void)send(vm, i);
	}
}

static void
redir_write(struct vmk_vm *vm, unsigned int pin, unsigned int half,
    uint32_t v)
{
	struct vmk_ioapic *io = &vm->irqchip->ioapic;
	uint64_t *e = &io->redir[pin], mask, val;

	mask = half != 0 ? 0xffffffff00000000ULL : 0xffffffffULL;
	val = half != 0 ? (uint64_t)v << 32 : v;
	mask &= E_WRITABLE;
	*e = (*e & ~mask) | (val & mask);
	/* An edge entry has no Remote IRR. */
	if ((*e & E_LEVEL) == 0)
		*e &= ~E_REMOTE_IRR;
	else if ((*e & (E_MASKED | E_REMOTE_IRR)) == 0 && io->line[pin] != 0)
		(void)send(vm, pin);
}

void
vmk_ioapic_mmio(struct vmk_vm *vm, uint32_t offset, uint32_t *v, bool write)
{
	struct vmk_ioapic *io = &vm->irqchip->ioapic;
	uint32_t sel = io->regsel & 0xff, pin = (sel - 0x10) >> 1;

	if ((offset & ~0xfU) == 0) {
		if (write)
			io->regsel = *v & 0xff;
		else
			*v = io->regsel;
		return;
	}
	if ((offset & ~0xfU) != 0x10) {
		*v = write ? *v : 0;
		return;
	}
	switch (sel) {
	case 0: case 2:				/* ID, arbitration ID */
		if (write && sel == 0)
			io->id = *v >> 24 & 0xf;
		else if (!write)
			*v = io->id << 24;
		return;
	case 1:
		if (!write)
			*v = VERSION;
		return;
	default:
		break;
	}
	if (sel < 0x10 || pin >= ABI_IOAPIC_NUM_PINS) {
		*v = write ? *v : 0xffffffff;
		return;
	}
	if (write)
		redir_write(vm, pin, sel & 1, *v);
	else
		*v = (uint32_t)(io->redir[pin] >> ((sel & 1) * 32));
}

void
vmk_ioapic_state_get(struct vmk_ioapic *io, struct abi_ioapic_state *a)
{
	unsigned int i;

	a->base_address = VMK_IOAPIC_BASE;
	a->ioregsel = io->regsel;
	a->id = io->id;
	for (i = 0; i < ABI_IOAPIC_NUM_PINS; i++) {
		a->redirtbl[i] = io->redir[i];
		if (io->line[i] != 0)
			a->irr |= 1U << i;
	}
}

void
vmk_ioapic_state_set(struct vmk_vm *vm, const struct abi_ioapic_state *a)
{
	struct vmk_ioapic *io = &vm->irqchip->ioapic;
	unsigned int i;

	io->regsel = a->ioregsel & 0xff;
	io->id = a->id & 0xf;
	for (i = 0; i < ABI_IOAPIC_NUM_PINS; i++) {
		io->redir[i] = a->redirtbl[i] & (E_WRITABLE | E_REMOTE_IRR);
		io->line[i] = (a->irr >> i & 1) != 0 ? 1U << VMK_SRC_USER : 0;
		if (io->line[i] != 0 && (io->redir[i] & E_LEVEL) != 0 &&
		    (io->redir[i] & (E_MASKED | E_REMOTE_IRR)) == 0)
			(void)send(vm, i);
	}
}

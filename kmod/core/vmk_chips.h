/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_chips.h: what the files of the in-kernel interrupt chips share.
 *
 * Locks.  irqchip->lock covers the 8259s, the I/O APIC, the 8254 and the
 * routing table; lapic->lock one local APIC.  irqchip->lock comes first: a
 * wire or an MSI goes from chip to local APIC.  The way back, an EOI for the
 * I/O APIC, is started after lapic->lock has been dropped.  Both are spin
 * locks: wires move in timer and event callbacks.
 */
#ifndef VMK_CHIPS_H
#define	VMK_CHIPS_H

#include "vmk_irqchip.h"

/* Who drives a wire; a pin is high while any of them drives it. */
#define	VMK_SRC_USER	0
#define	VMK_SRC_PIT	1
#define	VMK_SRC_IRQFD	2

#define	VMK_MAX_IRQFD	512

struct vmk_pic {
	struct abi_pic_state chip[2];		/* master, slave */
	uint8_t		 line[16];		/* sources, a bit each */
	bool		 output;
};

struct vmk_ioapic {
	uint32_t	 regsel;
	uint32_t	 id;
	uint64_t	 redir[ABI_IOAPIC_NUM_PINS];
	uint8_t		 line[ABI_IOAPIC_NUM_PINS];
};

struct vmk_pit;

struct vmk_route {
	uint32_t	 gsi, type;
	uint32_t	 chip, pin;		/* ABI_IRQ_ROUTING_IRQCHIP */
	uint64_t	 addr;			/* ABI_IRQ_ROUTING_MSI */
	uint32_t	 data;
	uint16_t	 next;			/* same GSI; VMK_NO_ROUTE */
};
#define	VMK_NO_ROUTE	0xffffU

struct vmk_routing {
	uint16_t	 head[VMK_MAX_ROUTES];	/* by GSI */
	uint32_t	 n;
	struct vmk_route *route;
};

struct vmk_irqfd {
	struct vmk_irqfd *next;
	struct vmk_vm	*vm;
	struct vmk_event *ev;
	uint32_t	 gsi;
};

struct vmk_irqchip {
	struct vmk_spin	 lock;
	struct vmk_pic	 pic;
	struct vmk_ioapic ioapic;
	struct vmk_pit	*pit;
	struct vmk_routing *routing;
	struct vmk_irqfd *irqfds;		/* vm->lock */
	uint32_t	 nirqfds;
	uint32_t	 next_lowest;		/* where arbitration goes on */
};

/* ---- lapic.c ----------------------------------------------------------- */

/* Delivery modes of ICR, redirection entries and MSI data (SDM 3A 11.5). */
enum vmk_delivery { VMK_DM_FIXED = 0, VMK_DM_LOWEST = 1, VMK_DM_SMI = 2,
	VMK_DM_NMI = 4, VMK_DM_INIT = 5, VMK_DM_STARTUP = 6,
	VMK_DM_EXTINT = 7 };

struct vmk_irq_msg {
	uint32_t	 dest;
	bool		 logical, level;
	uint8_t		 mode;			/* enum vmk_delivery */
	uint8_t		 vector;
};
/*
 * Deliver to every local APIC that matches.  The number that took it; 0 if
 * it was pending already; -1 if nobody matched.
 */
int	vmk_lapic_deliver(struct vmk_vm *, const struct vmk_irq_msg *);

/* ---- pic.c, irqchip->lock held ----------------------------------------- */

void	vmk_pic_reset(struct vmk_pic *);
int	vmk_pic_set(struct vmk_vm *, unsigned int irq, unsigned int source,
	    bool level);
/* INTA: the vector. */
int	vmk_pic_ack(struct vmk_vm *);
bool	vmk_pic_io(struct vmk_vm *, uint16_t port, uint32_t *v, bool write);
void	vmk_pic_state_set(struct vmk_vm *, unsigned int chip,
	    const struct abi_pic_state *);

/* ---- ioapic.c, irqchip->lock held -------------------------------------- */

void	vmk_ioapic_reset(struct vmk_ioapic *);
int	vmk_ioapic_set(struct vmk_vm *, unsigned int pin, unsigned int source,
	    bool level);
void	vmk_ioapic_eoi(struct vmk_vm *, uint8_t vector);
void	vmk_ioapic_mmio(struct vmk_vm *, uint32_t offset, uint32_t *v,
	    bool write);
void	vmk_ioapic_state_get(struct vmk_ioapic *, struct abi_ioapic_state *);
void	vmk_ioapic_state_set(struct vmk_vm *, const struct abi_ioapic_state *);
#define	VMK_IOAPIC_BASE	0xfec00000ULL

/* ---- pit.c, irqchip->lock held ----------------------------------------- */

bool	vmk_pit_io(struct vmk_vm *, uint16_t port, uint32_t *v, bool write);
/* Without the lock, sleepable. */
void	vmk_pit_destroy(struct vmk_vm *);

/* ---- irq_routing.c ----------------------------------------------------- */

/* irqchip->lock held. */
int	vmk_irq_raise(struct vmk_vm *, uint32_t gsi, unsigned int source,
	    bool level);

#endif /* !VMK_CHIPS_H */

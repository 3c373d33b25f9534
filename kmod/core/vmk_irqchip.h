/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_irqchip.h: what the vCPU loop and the ioctl table need of the
 * in-kernel interrupt controllers and timers.
 *
 * Three arrangements exist.  User: no chip here; vcpu->lapic and
 * vm->irqchip are NULL and user space injects with KVM_INTERRUPT.  Split:
 * a local APIC per vCPU and the routing table here, the rest in user space.
 * Kernel: local APICs, I/O APIC, two 8259s, optionally an 8254.
 *
 * struct vmk_lapic and struct vmk_irqchip belong to the implementation
 * (lapic.c, ioapic.c, pic.c, pit.c, irq_routing.c) and are opaque here.  All
 * functions are safe against each other from any context unless marked "vcpu
 * thread" (caller holds vcpu->lock, may sleep) or "config" (caller holds
 * vm->lock, may sleep).  None of them calls user space; errors are VMK_E*.
 * The chips raise a vCPU's attention with vmk_vcpu_notify(VMK_REQ_EVENT).
 */
#ifndef VMK_IRQCHIP_H
#define	VMK_IRQCHIP_H

#include "vmk_vm.h"

/* What KVM_CHECK_EXTENSION says of this part's capabilities; else 0. */
int	vmk_irqchip_cap(uint64_t cap);

/* ---- life -------------------------------------------------------------- */

/*
 * Config.  vm->irqchip_mode is still NONE and there is no vCPU yet (the
 * caller has checked); on success set vm->irqchip and vm->irqchip_mode.
 * The kernel arrangement installs the default routing: GSI 0-15 to both
 * 8259 and I/O APIC pin, 16-23 to the I/O APIC.
 */
int	vmk_irqchip_create(struct vmk_vm *);
int	vmk_irqchip_create_split(struct vmk_vm *);
int	vmk_pit_create(struct vmk_vm *, uint32_t flags);
/* At the machine's end; vm->irqchip may be NULL.  Timers, irqfds are gone. */
void	vmk_irqchip_destroy(struct vmk_vm *);
/* Config.  Sets vcpu->lapic; called only when irqchip_mode is not NONE. */
int	vmk_lapic_create(struct vmk_vcpu *);
void	vmk_lapic_destroy(struct vmk_vcpu *);
/* Vcpu thread.  Power-on state; init: keep the APIC id and base (INIT). */
void	vmk_lapic_reset(struct vmk_vcpu *, bool init);

/* ---- the run loop (vcpu thread, inside a CPU section: no sleeping) ----- */

/*
 * Highest vector that the local APIC would deliver now; 256 if the 8259 (or
 * with a split irqchip user space's, vcpu->ext_pending) waits at LINT0, whose
 * vector only the acknowledge tells; -1 none.  Takes PPR into account, not
 * RFLAGS.IF.
 */
int	vmk_irq_pending(struct vmk_vcpu *);
/*
 * A fixed vector waits but the task priority holds it back: the loop then
 * intercepts CR8 writes.
 */
bool	vmk_irq_blocked_by_tpr(struct vmk_vcpu *);
/* Interrupt acknowledge: take that vector (IRR to ISR, or 8259 INTA). */
int	vmk_irq_ack(struct vmk_vcpu *);
/* Does this vCPU's local APIC let the output of an 8259 through? */
bool	vmk_lapic_takes_pic(struct vmk_vcpu *);
/* Does anything end HLT: as vmk_irq_pending() >= 0, any context. */

/* ---- register access (vcpu thread) ------------------------------------- */

/*
 * Try a guest access against the chips.  True: done, *data holds what a read
 * returned.  len is 1, 2, 4 or 8; the caller splits nothing: an unaligned or
 * odd-sized access to a chip's window is the chip's to define.
 */
bool	vmk_irqchip_mmio(struct vmk_vcpu *, uint64_t gpa, uint32_t len,
	    uint64_t *data, bool write);
bool	vmk_irqchip_pio(struct vmk_vcpu *, uint16_t port, uint32_t size,
	    uint32_t *data, bool write);
/*
 * IA32_APIC_BASE, x2APIC 0x800-0x8ff, IA32_TSC_DEADLINE.  0, VMK_EINVAL
 * (#GP for a guest) or VMK_ENOENT: not one of these.  host: KVM_SET_MSRS.
 */
int	vmk_lapic_msr(struct vmk_vcpu *, uint32_t msr, uint64_t *data,
	    bool write, bool host);
/* Task priority as CR8 sees it, 0-15. */
void	vmk_lapic_set_cr8(struct vmk_vcpu *, uint64_t cr8);
uint64_t vmk_lapic_get_cr8(struct vmk_vcpu *);
/* The guest TSC was moved: recompute a TSC-deadline timer. */
void	vmk_lapic_tsc_changed(struct vmk_vcpu *);

/* ---- interrupts from outside ------------------------------------------- */

/*
 * Level on a GSI from one source (0: user space; irqfds have their own).
 * *status: 1 delivered, 0 coalesced, -1 masked or ignored; a message gives
 * the same.
 */
int	vmk_irq_line(struct vmk_vm *, uint32_t gsi, bool level, int *status);
int	vmk_irq_msi(struct vmk_vm *, uint64_t addr, uint32_t data);
/* Config.  entries are already copied in; nr <= VMK_MAX_ROUTES. */
#define	VMK_MAX_ROUTES	4096
int	vmk_irq_set_routing(struct vmk_vm *,
	    const struct abi_irq_routing_entry *entries, uint32_t nr);
/* Config.  Assign or deassign (flags); vmk_event_* do the listening. */
int	vmk_irqfd(struct vmk_vm *, const struct abi_irqfd *);

/* ---- state for KVM_GET_* and KVM_SET_* --------------------------------- */

int	vmk_lapic_get(struct vmk_vcpu *, struct abi_lapic_state *);
int	vmk_lapic_set(struct vmk_vcpu *, const struct abi_lapic_state *);
/* chip_id is set by the caller and checked here. */
int	vmk_irqchip_state(struct vmk_vm *, struct abi_irqchip *, bool write);
int	vmk_pit_get(struct vmk_vm *, struct abi_pit_state2 *);
int	vmk_pit_set(struct vmk_vm *, const struct abi_pit_state2 *);
int	vmk_pit_reinject(struct vmk_vm *, const struct abi_reinject_control *);

#endif /* !VMK_IRQCHIP_H */

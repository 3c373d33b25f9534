/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_irq_none.c: vmk_irqchip.h for a build without in-kernel chips.
 *
 * Every question is answered "there is none": no chip can be made, so
 * vm->irqchip and vcpu->lapic stay NULL and the other functions are never
 * reached; they refuse all the same.
 */
#include "vmk_irqchip.h"

int
vmk_irqchip_cap(uint32_t cap)
{
	/*
	 * QEMU 7.2 refuses to start without this one, also when it keeps all
	 * chips to itself.  As with Linux, SET_GSI_ROUTING then fails.
	 */
	return (cap == ABI_CAP_IRQ_ROUTING ? VMK_MAX_ROUTES : -1);
}

#define	REFUSE(name, args)	int name args { return (VMK_ENXIO); }
#define	U	__attribute__((__unused__))

REFUSE(vmk_irqchip_create, (U struct vmk_vm *a))
REFUSE(vmk_irqchip_create_split, (U struct vmk_vm *a, U uint32_t b))
REFUSE(vmk_pit_create, (U struct vmk_vm *a, U uint32_t b))
REFUSE(vmk_lapic_create, (U struct vmk_vcpu *a))
REFUSE(vmk_lapic_msr, (U struct vmk_vcpu *a, U uint32_t b, U uint64_t *c,
    U bool d, U bool e))
REFUSE(vmk_irq_line, (U struct vmk_vm *a, U uint32_t b, U bool c, U int *d))
REFUSE(vmk_irq_msi, (U struct vmk_vm *a, U uint64_t b, U uint32_t c,
    U int *d))
REFUSE(vmk_irq_set_routing, (U struct vmk_vm *a,
    U const struct abi_irq_routing_entry *b, U uint32_t c))
REFUSE(vmk_irqfd, (U struct vmk_vm *a, U const struct abi_irqfd *b))
REFUSE(vmk_lapic_get, (U struct vmk_vcpu *a, U struct abi_lapic_state *b))
REFUSE(vmk_lapic_set, (U struct vmk_vcpu *a,
    U const struct abi_lapic_state *b))
REFUSE(vmk_irqchip_get, (U struct vmk_vm *a, U struct abi_irqchip *b))
REFUSE(vmk_irqchip_set, (U struct vmk_vm *a, U const struct abi_irqchip *b))
REFUSE(vmk_pit_get, (U struct vmk_vm *a, U struct abi_pit_state2 *b))
REFUSE(vmk_pit_set, (U struct vmk_vm *a, U const struct abi_pit_state2 *b))
REFUSE(vmk_pit_reinject, (U struct vmk_vm *a,
    U const struct abi_reinject_control *b))

void vmk_irqchip_destroy(U struct vmk_vm *vm) { }
void vmk_lapic_destroy(U struct vmk_vcpu *vcpu) { }
void vmk_lapic_reset(U struct vmk_vcpu *vcpu, U bool init) { }
void vmk_lapic_set_cr8(U struct vmk_vcpu *vcpu, U uint64_t cr8) { }
void vmk_lapic_tsc_changed(U struct vmk_vcpu *vcpu) { }

int
vmk_irq_pending(U struct vmk_vcpu *vcpu)
{
	return (-1);
}

bool
vmk_irq_blocked_by_tpr(U struct vmk_vcpu *vcpu)
{
	return (false);
}

int
vmk_irq_ack(U struct vmk_vcpu *vcpu)
{
	return (-1);
}

bool
vmk_irq_wakes(U struct vmk_vcpu *vcpu)
{
	return (false);
}

bool
vmk_irqchip_mmio(U struct vmk_vcpu *vcpu, U uint64_t gpa, U uint32_t len,
    U uint64_t *data, U bool write)
{
	return (false);
}

bool
vmk_irqchip_pio(U struct vmk_vcpu *vcpu, U uint16_t port, U uint32_t size,
    U uint32_t *data, U bool write)
{
	return (false);
}

uint64_t
vmk_lapic_get_cr8(U struct vmk_vcpu *vcpu)
{
	return (0);
}

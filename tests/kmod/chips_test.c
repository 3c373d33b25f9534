/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * chips_test.c: the in-kernel interrupt chips, register by register, on the
 * user-space host.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "fake_cpu.h"
#include "tap.h"
#include "vmk_irqchip.h"
#include "vmk_user.h"

#define	PTR(p)	((uint64_t)(uintptr_t)(p))
#define	APIC	0xfee00000ULL
#define	IOAPIC	0xfec00000ULL

struct rig {
	int		 vm, fd[4];
	struct vmk_vm	*m;
	struct vmk_vcpu	*v[4];
};

static void
up(struct rig *r, int nvcpu, bool split)
{
	struct abi_enable_cap cap = { .cap = ABI_CAP_SPLIT_IRQCHIP,
		.args = { 24 } };
	int i;

	memset(r, 0, sizeof(*r));
	r->vm = user_ioctl(USER_DEV_KVM, ABI_CREATE_VM, 0);
	CHECK(r->vm >= 0);
	if (split)
		CHECK_EQ(user_ioctl(r->vm, ABI_ENABLE_CAP, PTR(&cap)), 0);
	else
		CHECK_EQ(user_ioctl(r->vm, ABI_CREATE_IRQCHIP, 0), 0);
	for (i = 0; i < nvcpu; i++) {
		r->fd[i] = user_ioctl(r->vm, ABI_CREATE_VCPU, (uint64_t)i);
		CHECK(r->fd[i] >= 0);
		r->v[i] = fake_last_vcpu();
	}
	r->m = fake_last_vm();
}

static void
down(struct rig *r, int nvcpu)
{
	int i;

	for (i = 0; i < nvcpu; i++)
		user_close(r->fd[i]);
	user_close(r->vm);
	CHECK_EQ(user_outstanding(), 0);
}

static uint32_t
apic_read(struct vmk_vcpu *v, uint32_t off)
{
	uint64_t d = 0xdeadbeef;

	CHECK(vmk_irqchip_mmio(v, APIC + off, 4, &d, false));
	return ((uint32_t)d);
}

static void
apic_write(struct vmk_vcpu *v, uint32_t off, uint32_t val)
{
	uint64_t d = val;

	CHECK(vmk_irqchip_mmio(v, APIC + off, 4, &d, true));
}

static uint32_t
io_read(struct vmk_vcpu *v, uint32_t index)
{
	uint64_t d = index;

	CHECK(vmk_irqchip_mmio(v, IOAPIC, 4, &d, true));
	CHECK(vmk_irqchip_mmio(v, IOAPIC + 0x10, 4, &d, false));
	return ((uint32_t)d);
}

static void
io_write(struct vmk_vcpu *v, uint32_t index, uint32_t val)
{
	uint64_t d = index;

	CHECK(vmk_irqchip_mmio(v, IOAPIC, 4, &d, true));
	d = val;
	CHECK(vmk_irqchip_mmio(v, IOAPIC + 0x10, 4, &d, true));
}

static uint8_t
in(struct vmk_vcpu *v, uint16_t port)
{
	uint32_t d = 0;

	CHECK(vmk_irqchip_pio(v, port, 1, &d, false));
	return ((uint8_t)d);
}

static void
out(struct vmk_vcpu *v, uint16_t port, uint8_t val)
{
	uint32_t d = val;

	CHECK(vmk_irqchip_pio(v, port, 1, &d, true));
}

static int
line(struct rig *r, uint32_t gsi, int level)
{
	struct abi_irq_level a = { gsi, (uint32_t)level };

	CHECK_EQ(user_ioctl(r->vm, ABI_IRQ_LINE_STATUS, PTR(&a)), 0);
	return ((int)a.irq);
}

static bool
soon(struct vmk_vcpu *v)
{
	unsigned int i;

	for (i = 0; i < 2000 && vmk_irq_pending(v) < 0; i++)
		nanosleep(&(struct timespec){ 0, 1000000 }, NULL);
	return (vmk_irq_pending(v) >= 0);
}

/* ---- creation ---------------------------------------------------------- */

static void
test_order(void)
{
	struct abi_pit_config pit = { .flags = 1 };
	struct abi_pit_state2 ps;
	struct abi_irqchip chip = { .chip_id = 3 };
	int vm, fd;
	struct rig r;

	vm = user_ioctl(USER_DEV_KVM, ABI_CREATE_VM, 0);
	CHECK_EQ(user_ioctl(vm, ABI_CREATE_PIT2, PTR(&pit)), -VMK_EINVAL);
	CHECK_EQ(user_ioctl(vm, ABI_GET_PIT2, PTR(&ps)), -VMK_ENXIO);
	CHECK_EQ(user_ioctl(vm, ABI_GET_IRQCHIP, PTR(&chip)), -VMK_ENXIO);
	CHECK_EQ(user_ioctl(vm, ABI_IRQ_LINE, PTR(&chip)), -VMK_ENXIO);
	fd = user_ioctl(vm, ABI_CREATE_VCPU, 0);
	CHECK_EQ(user_ioctl(vm, ABI_CREATE_IRQCHIP, 0), -VMK_EINVAL);
	CHECK_EQ(user_ioctl(fd, ABI_GET_LAPIC, PTR(&chip)), -VMK_EINVAL);
	user_close(fd);
	user_close(vm);
	up(&r, 1, false);
	CHECK_EQ(user_ioctl(r.vm, ABI_CREATE_IRQCHIP, 0), -VMK_EEXIST);
	CHECK_EQ(user_ioctl(r.vm, ABI_CREATE_PIT2, PTR(&pit)), 0);
	CHECK_EQ(user_ioctl(r.vm, ABI_CREATE_PIT2, PTR(&pit)), -VMK_EEXIST);
	CHECK_EQ(user_ioctl(r.vm, ABI_GET_IRQCHIP, PTR(&chip)), -VMK_EINVAL);
	down(&r, 1);
	tap_done("chips: order of creation");
}

/* ---- local APIC -------------------------------------------------------- */

static void
test_lapic_registers(void)
{
	static const uint32_t lvt[] = { 0x320, 0x330, 0x340, 0x350, 0x360,
		0x370 };
	static const uint32_t mask[] = { 0x700ff, 0x107ff, 0x107ff, 0x1a7ff,
		0x1a7ff, 0x100ff };
	struct vmk_vcpu *v;
	struct rig r;
	unsigned int i;

	up(&r, 2, false);
	v = r.v[1];
	CHECK_EQ(apic_read(v, 0x20), 1U << 24);
	CHECK_EQ(apic_read(v, 0x30), 0x50014);
	CHECK_EQ(apic_read(v, 0xe0), 0xffffffff);
	CHECK_EQ(apic_read(v, 0xf0), 0xff);
	for (i = 0; i < 6; i++)
		CHECK_EQ(apic_read(v, lvt[i]), 0x10000);
	/* Virtual wire on the boot processor only. */
	CHECK_EQ(apic_read(r.v[0], 0x350), 0x700);
	/* Software-disabled: LVT entries stay masked. */
	apic_write(v, 0x320, 0x30);
	CHECK_EQ(apic_read(v, 0x320), 0x10030);
	apic_write(v, 0xf0, 0xffffffff);
	CHECK_EQ(apic_read(v, 0xf0), 0x3ff);
	for (i = 0; i < 6; i++) {
		apic_write(v, lvt[i], 0xffffffff);
		CHECK_EQ(apic_read(v, lvt[i]), mask[i]);
	}
	apic_write(v, 0x80, 0xfff);
	CHECK_EQ(apic_read(v, 0x80), 0xff);
	CHECK_EQ(vmk_lapic_get_cr8(v), 0xf);
	CHECK_EQ(apic_read(v, 0xa0), 0xff);
	apic_write(v, 0x20, 0x55000000);	/* read-only here */
	CHECK_EQ(apic_read(v, 0x20), 1U << 24);
	CHECK_EQ(apic_read(v, 0x30), 0x50014);
	/* Beyond the registers. */
	CHECK_EQ(apic_read(v, 0x400), 0);
	apic_write(v, 0xff0, 1);
	down(&r, 2);
	tap_done("chips: local APIC: reset values and masks");
}

static void
ipi(struct vmk_vcpu *v, uint32_t dest, uint32_t icr)
{
	apic_write(v, 0x310, dest << 24);
	apic_write(v, 0x300, icr);
}

static void
test_lapic_priority(void)
{
	struct vmk_vcpu *v;
	struct rig r;

	up(&r, 1, false);
	v = r.v[0];
	apic_write(v, 0xf0, 0x1ff);
	ipi(v, 0, 0x40000 | 0x0f);		/* vectors below 16: refused */
	CHECK_EQ(vmk_irq_pending(v), -1);
	ipi(v, 0, 0x40000 | 0x31);
	ipi(v, 0, 0x40000 | 0x52);
	CHECK_EQ(vmk_irq_pending(v), 0x52);
	CHECK_EQ(vmk_irq_ack(v), 0x52);
	CHECK_EQ(apic_read(v, 0xa0), 0x50);
	CHECK_EQ(vmk_irq_pending(v), -1);	/* 0x31 is lower */
	ipi(v, 0, 0x40000 | 0x5f);		/* same class */
	CHECK_EQ(vmk_irq_pending(v), -1);
	ipi(v, 0, 0x40000 | 0x60);
	CHECK_EQ(vmk_irq_ack(v), 0x60);
	apic_write(v, 0xb0, 0);
	CHECK_EQ(vmk_irq_pending(v), -1);
	apic_write(v, 0xb0, 0);
	CHECK_EQ(vmk_irq_ack(v), 0x5f);
	apic_write(v, 0xb0, 0);
	/* TPR holds 0x31 back and says so. */
	vmk_lapic_set_cr8(v, 3);
	CHECK_EQ(vmk_irq_pending(v), -1);
	CHECK(vmk_irq_blocked_by_tpr(v));
	vmk_lapic_set_cr8(v, 2);
	CHECK_EQ(vmk_irq_ack(v), 0x31);
	apic_write(v, 0xb0, 0);
	apic_write(v, 0xb0, 0);			/* nothing in service */
	CHECK_EQ(vmk_irq_pending(v), -1);
	down(&r, 1);
	tap_done("chips: local APIC: IRR, ISR, PPR, EOI");
}

static void
test_ipi(void)
{
	struct rig r;
	int i, n;

	up(&r, 4, false);
	for (i = 0; i < 4; i++) {
		apic_write(r.v[i], 0xf0, 0x1ff);
		apic_write(r.v[i], 0xd0, 1U << (24 + i));
	}
	ipi(r.v[0], 2, 0x41);			/* physical */
	CHECK_EQ(vmk_irq_pending(r.v[2]), 0x41);
	CHECK_EQ(vmk_irq_pending(r.v[1]), -1);
	ipi(r.v[0], 0xa, 0x842);		/* logical, flat: 1 and 3 */
	CHECK_EQ(vmk_irq_pending(r.v[1]), 0x42);
	CHECK_EQ(vmk_irq_pending(r.v[3]), 0x42);
	CHECK_EQ(vmk_irq_pending(r.v[0]), -1);
	ipi(r.v[0], 0, 0xc0043);		/* all but self */
	CHECK_EQ(vmk_irq_pending(r.v[0]), -1);
	CHECK_EQ(vmk_irq_pending(r.v[2]), 0x43);
	ipi(r.v[1], 0, 0x80044);		/* all */
	CHECK_EQ(vmk_irq_pending(r.v[0]), 0x44);
	ipi(r.v[0], 0xff, 0x45);		/* broadcast */
	CHECK_EQ(vmk_irq_pending(r.v[3]), 0x45);
	/* Cluster: 0x11 and 0x12 are two of cluster 1. */
	for (i = 0; i < 4; i++)
		apic_write(r.v[i], 0xe0, 0x0fffffff);
	apic_write(r.v[0], 0xd0, 0x11000000);
	apic_write(r.v[1], 0xd0, 0x12000000);
	apic_write(r.v[2], 0xd0, 0x21000000);
	ipi(r.v[3], 0x11, 0x8e1);
	CHECK_EQ(vmk_irq_pending(r.v[0]), 0xe1);
	CHECK_EQ(vmk_irq_pending(r.v[2]), 0x45);
	/* Lowest priority goes to one. */
	for (i = n = 0; i < 4; i++)
		apic_write(r.v[i], 0xe0, 0xffffffff);
	for (i = 0; i < 4; i++)
		apic_write(r.v[i], 0xd0, 0x01000000);
	ipi(r.v[0], 1, 0x900 | 0xf3);
	for (i = 0; i < 4; i++)
		n += vmk_irq_pending(r.v[i]) == 0xf3;
	CHECK_EQ(n, 1);
	/* INIT, then start-up at 0x9000. */
	CHECK_EQ(r.v[1]->mp_state, ABI_MP_UNINITIALIZED);
	ipi(r.v[0], 1, 0x4500);
	ipi(r.v[0], 1, 0x4609);
	CHECK_EQ(r.v[1]->requests & (VMK_REQ_INIT | VMK_REQ_SIPI),
	    VMK_REQ_INIT | VMK_REQ_SIPI);
	user_never_wait(true);
	CHECK_EQ(user_ioctl(r.fd[1], ABI_RUN, 0), -VMK_EINTR);
	user_never_wait(false);
	CHECK_EQ(fake(r.v[1])->seg[VMK_CS].base, 0x9000);
	CHECK_EQ(fake(r.v[1])->seg[VMK_CS].selector, 0x900);
	down(&r, 4);
	tap_done("chips: inter-processor interrupts, INIT and start-up");
}

static void
test_timer(void)
{
	struct vmk_vcpu *v;
	uint64_t val = 1;
	struct rig r;
	uint32_t a;

	up(&r, 1, false);
	v = r.v[0];
	apic_write(v, 0xf0, 0x1ff);
	apic_write(v, 0x320, 0x51);		/* one shot */
	apic_write(v, 0x3e0, 0xb);		/* divide by 1 */
	apic_write(v, 0x380, 0);		/* zero stops: CVE-2013-6367 */
	CHECK_EQ(apic_read(v, 0x390), 0);
	apic_write(v, 0x380, 5000000);
	CHECK(apic_read(v, 0x390) <= 5000000);
	CHECK(soon(v));
	CHECK_EQ(vmk_irq_ack(v), 0x51);
	apic_write(v, 0xb0, 0);
	CHECK_EQ(apic_read(v, 0x390), 0);
	/* Periodic, with the shortest count there is. */
	apic_write(v, 0x320, 0x20052);
	apic_write(v, 0x380, 1);
	CHECK(soon(v));
	CHECK_EQ(vmk_irq_ack(v), 0x52);
	apic_write(v, 0xb0, 0);
	CHECK(soon(v));
	apic_write(v, 0x380, 0);
	if (vmk_irq_ack(v) >= 0)
		apic_write(v, 0xb0, 0);
	/* Divider of 128: the count is that many times slower. */
	apic_write(v, 0x320, 0x53);
	apic_write(v, 0x3e0, 0xa);
	apic_write(v, 0x380, 0xffffffff);
	a = apic_read(v, 0x390);
	CHECK(a > 0xff000000);
	/* TSC deadline, in the past; reads as zero when done. */
	apic_write(v, 0x320, 0x40054);
	CHECK_EQ(apic_read(v, 0x380), 0);
	CHECK_EQ(vmk_lapic_msr(v, 0x6e0, &val, true, false), 0);
	CHECK(soon(v));
	CHECK_EQ(vmk_irq_ack(v), 0x54);
	CHECK_EQ(vmk_lapic_msr(v, 0x6e0, &val, false, false), 0);
	CHECK_EQ(val, 0);
	val = ~0ULL;				/* never, without overflow */
	CHECK_EQ(vmk_lapic_msr(v, 0x6e0, &val, true, false), 0);
	down(&r, 1);
	tap_done("chips: local APIC timer: three modes, stop, divider");
}

static void
test_x2apic(void)
{
	struct vmk_vcpu *v;
	uint64_t d;
	struct rig r;

	up(&r, 2, false);
	v = r.v[0];
	d = 0;
	CHECK_EQ(vmk_msr_get(v, 0x802, &d, false), VMK_EINVAL);
	d = APIC | 0xd00;
	CHECK_EQ(vmk_msr_set(v, 0x1b, d, false), 0);
	CHECK_EQ(vmk_msr_set(r.v[1], 0x1b, APIC | 0xc00, false), 0);
	CHECK(!vmk_irqchip_mmio(v, APIC, 4, &d, false));
	CHECK_EQ(vmk_msr_get(r.v[1], 0x802, &d, false), 0);
	CHECK_EQ(d, 1);
	CHECK_EQ(vmk_msr_get(r.v[1], 0x80d, &d, false), 0);
	CHECK_EQ(d, 2);
	CHECK_EQ(vmk_msr_set(v, 0x80f, 0x1ff, false), 0);
	CHECK_EQ(vmk_msr_set(r.v[1], 0x80f, 0x1ff, false), 0);
	CHECK_EQ(vmk_msr_set(v, 0x830, 1ULL << 32 | 0x61, false), 0);
	CHECK_EQ(vmk_irq_pending(r.v[1]), 0x61);
	CHECK_EQ(vmk_msr_set(v, 0x83f, 0x62, false), 0);
	CHECK_EQ(vmk_irq_pending(v), 0x62);
	/* #GP: reserved bits, read-only, write-only, no such register. */
	CHECK_EQ(vmk_msr_set(v, 0x80f, 1ULL << 32, false), VMK_EINVAL);
	CHECK_EQ(vmk_msr_set(v, 0x802, 1, false), VMK_EINVAL);
	CHECK_EQ(vmk_msr_set(v, 0x80b, 1, false), VMK_EINVAL);
	CHECK_EQ(vmk_msr_get(v, 0x80b, &d, false), VMK_EINVAL);
	CHECK_EQ(vmk_msr_get(v, 0x80e, &d, false), VMK_EINVAL);
	CHECK_EQ(vmk_msr_get(v, 0x8ff, &d, false), VMK_EINVAL);
	/* Not straight back to xAPIC, not without EN. */
	CHECK_EQ(vmk_msr_set(v, 0x1b, APIC | 0x900, false), VMK_EINVAL);
	CHECK_EQ(vmk_msr_set(v, 0x1b, APIC | 0x500, false), VMK_EINVAL);
	CHECK_EQ(vmk_msr_set(v, 0x1b, APIC | 0x100, false), 0);
	CHECK_EQ(vmk_irq_pending(v), -1);
	down(&r, 2);
	tap_done("chips: x2APIC and changes of mode");
}

/* ---- I/O APIC ---------------------------------------------------------- */

static void
test_ioapic(void)
{
	struct abi_irqchip chip = { .chip_id = ABI_IRQCHIP_IOAPIC };
	struct vmk_vcpu *v;
	struct rig r;
	uint32_t i;

	up(&r, 1, false);
	v = r.v[0];
	apic_write(v, 0xf0, 0x1ff);
	apic_write(v, 0x350, 0x10000);		/* no 8259 */
	CHECK_EQ(io_read(v, 1), 0x170011);
	for (i = 0; i < 24; i++) {
		CHECK_EQ(io_read(v, 0x10 + 2 * i), 0x10000);
		io_write(v, 0x10 + 2 * i, 0xffffffff);
		CHECK_EQ(io_read(v, 0x10 + 2 * i), 0x1afff);
		io_write(v, 0x11 + 2 * i, 0xffffffff);
		CHECK_EQ(io_read(v, 0x11 + 2 * i), 0xff000000);
		io_write(v, 0x10 + 2 * i, 0x10000);
	}
	/* Register numbers beyond the last: CVE-2013-1798. */
	for (i = 0x40; i < 0x100; i++) {
		io_write(v, i, 0x1234);
		CHECK_EQ(io_read(v, i), 0xffffffff);
	}
	/* Edge: one message a rise. */
	io_write(v, 0x10 + 2 * 5, 0x71);
	io_write(v, 0x11 + 2 * 5, 0);
	CHECK_EQ(line(&r, 5, 1), 1);
	CHECK_EQ(vmk_irq_ack(v), 0x71);
	apic_write(v, 0xb0, 0);
	(void)line(&r, 5, 1);
	CHECK_EQ(vmk_irq_pending(v), -1);
	(void)line(&r, 5, 0);
	(void)line(&r, 5, 1);
	CHECK_EQ(vmk_irq_ack(v), 0x71);
	apic_write(v, 0xb0, 0);
	/* Level, the last pin: again after EOI while the wire is high. */
	io_write(v, 0x10 + 2 * 23, 0x8072);
	io_write(v, 0x11 + 2 * 23, 0);
	(void)line(&r, 23, 1);
	CHECK_EQ(vmk_irq_ack(v), 0x72);
	CHECK((io_read(v, 0x10 + 2 * 23) & 0x4000) != 0);
	CHECK_EQ(vmk_irq_pending(v), -1);
	apic_write(v, 0xb0, 0);
	CHECK_EQ(vmk_irq_ack(v), 0x72);
	(void)line(&r, 23, 0);
	apic_write(v, 0xb0, 0);
	CHECK_EQ(vmk_irq_pending(v), -1);
	CHECK_EQ(io_read(v, 0x10 + 2 * 23) & 0x4000, 0);
	/* Masked: nothing; unmasking a high level wire sends. */
	io_write(v, 0x10 + 2 * 23, 0x18072);
	(void)line(&r, 23, 1);
	CHECK_EQ(vmk_irq_pending(v), -1);
	io_write(v, 0x10 + 2 * 23, 0x8072);
	CHECK_EQ(vmk_irq_ack(v), 0x72);
	/* State round trip. */
	CHECK_EQ(user_ioctl(r.vm, ABI_GET_IRQCHIP, PTR(&chip)), 0);
	CHECK_EQ(chip.chip.ioapic.redirtbl[23], 0xc072);
	CHECK_EQ(chip.chip.ioapic.irr >> 23 & 1, 1);
	io_write(v, 0x10 + 2 * 23, 0x10000);
	chip.chip.ioapic.ioregsel = 0xffffffff;
	CHECK_EQ(user_ioctl(r.vm, ABI_SET_IRQCHIP, PTR(&chip)), 0);
	CHECK_EQ(io_read(v, 0x10 + 2 * 23), 0xc072);
	/* A wire that does not exist. */
	CHECK_EQ(line(&r, 24, 1), -1);
	CHECK_EQ(line(&r, 4095, 1), -1);
	down(&r, 1);
	tap_done("chips: I/O APIC: registers, edge and level interrupts");
}

/* ---- 8259 -------------------------------------------------------------- */

static void
pic_init(struct vmk_vcpu *v)
{
	out(v, 0x20, 0x11);
	out(v, 0x21, 0x20);
	out(v, 0x21, 0x04);
	out(v, 0x21, 0x01);
	out(v, 0xa0, 0x11);
	out(v, 0xa1, 0x28);
	out(v, 0xa1, 0x02);
	out(v, 0xa1, 0x01);
	out(v, 0x21, 0x00);
	out(v, 0xa1, 0x00);
}

static void
test_pic(void)
{
	struct abi_irqchip chip = { .chip_id = ABI_IRQCHIP_PIC_SLAVE };
	struct vmk_vcpu *v;
	struct rig r;
	unsigned int i;

	up(&r, 1, false);
	v = r.v[0];
	pic_init(v);
	CHECK_EQ(vmk_irq_pending(v), -1);
	/* Every line, the last of each chip included. */
	for (i = 0; i < 16; i++) {
		if (i == 2)
			continue;
		(void)line(&r, i, 1);
		CHECK_EQ(vmk_irq_pending(v), 256);
		CHECK_EQ(vmk_irq_ack(v), (i < 8 ? 0x20 : 0x28 - 8) + (int)i);
		(void)line(&r, i, 0);
		if (i >= 8)
			out(v, 0xa0, 0x20);
		out(v, 0x20, 0x20);
	}
	/* Priorities: 1 interrupts 3 in service, 5 waits. */
	(void)line(&r, 3, 1);
	CHECK_EQ(vmk_irq_ack(v), 0x23);
	(void)line(&r, 5, 1);
	CHECK_EQ(vmk_irq_pending(v), -1);
	(void)line(&r, 1, 1);
	CHECK_EQ(vmk_irq_ack(v), 0x21);
	out(v, 0x20, 0x0b);			/* read ISR */
	CHECK_EQ(in(v, 0x20), 0x0a);
	out(v, 0x20, 0x20);			/* ends 1, the highest */
	CHECK_EQ(in(v, 0x20), 0x08);
	out(v, 0x20, 0x63);			/* specific EOI of 3 */
	CHECK_EQ(vmk_irq_ack(v), 0x25);
	out(v, 0x20, 0x20);
	(void)line(&r, 1, 0);
	(void)line(&r, 3, 0);
	(void)line(&r, 5, 0);
	/* Rotation: after 4, 5 is the highest and 4 the lowest. */
	out(v, 0x20, 0xc4);
	(void)line(&r, 4, 1);
	(void)line(&r, 5, 1);
	(void)line(&r, 0, 1);
	CHECK_EQ(vmk_irq_ack(v), 0x25);
	out(v, 0x20, 0x20);
	CHECK_EQ(vmk_irq_ack(v), 0x20);
	out(v, 0x20, 0x20);
	CHECK_EQ(vmk_irq_ack(v), 0x24);
	out(v, 0x20, 0x20);
	for (i = 0; i < 8; i++)
		if (i != 2)
			(void)line(&r, i, 0);
	/* Mask; poll; automatic EOI. */
	pic_init(v);
	out(v, 0x21, 0x40);
	CHECK_EQ(in(v, 0x21), 0x40);
	CHECK_EQ(line(&r, 6, 1), -1);
	CHECK_EQ(vmk_irq_pending(v), -1);
	out(v, 0x21, 0);
	out(v, 0x20, 0x0c);
	CHECK_EQ(in(v, 0x20), 0x86);
	out(v, 0x20, 0x20);
	/* Level-triggered by ELCR: asks again while the wire is high. */
	out(v, 0x4d1, 0xff);
	CHECK_EQ(in(v, 0x4d1), 0xde);
	out(v, 0x4d0, 0xff);
	CHECK_EQ(in(v, 0x4d0), 0xf8);
	(void)line(&r, 11, 1);
	CHECK_EQ(vmk_irq_ack(v), 0x2b);
	out(v, 0xa0, 0x20);
	out(v, 0x20, 0x20);
	CHECK_EQ(vmk_irq_ack(v), 0x2b);
	(void)line(&r, 11, 0);
	out(v, 0xa0, 0x20);
	out(v, 0x20, 0x20);
	CHECK_EQ(vmk_irq_pending(v), -1);
	/* A state full of ones stays in range. */
	memset(&chip.chip, 0xff, sizeof(chip.chip));
	CHECK_EQ(user_ioctl(r.vm, ABI_SET_IRQCHIP, PTR(&chip)), 0);
	chip.chip_id = ABI_IRQCHIP_PIC_SLAVE;
	CHECK_EQ(user_ioctl(r.vm, ABI_GET_IRQCHIP, PTR(&chip)), 0);
	CHECK_EQ(chip.chip.pic.priority_add, 7);
	CHECK_EQ(chip.chip.pic.elcr_mask, 0xde);
	(void)vmk_irq_ack(v);
	down(&r, 1);
	tap_done("chips: 8259: every line, priority, rotation, poll, ELCR");
}

/* ---- 8254 -------------------------------------------------------------- */

static void
test_pit(void)
{
	struct abi_pit_config pit = { .flags = 1 };
	struct abi_reinject_control rc = { .pit_reinject = 1 };
	struct abi_pit_state2 ps;
	struct vmk_vcpu *v;
	struct rig r;
	unsigned int a, b;

	up(&r, 1, false);
	v = r.v[0];
	CHECK_EQ(user_ioctl(r.vm, ABI_CREATE_PIT2, PTR(&pit)), 0);
	pic_init(v);
	/* Mode 2, 1193 ticks: about a millisecond. */
	out(v, 0x43, 0x34);
	out(v, 0x40, 0xa9);
	out(v, 0x40, 0x04);
	CHECK(soon(v));
	CHECK_EQ(vmk_irq_ack(v), 0x20);
	out(v, 0x20, 0x20);
	CHECK(soon(v));
	(void)vmk_irq_ack(v);
	out(v, 0x20, 0x20);
	/* The latch holds while the counter goes on. */
	out(v, 0x43, 0x00);
	a = in(v, 0x40);
	a |= (unsigned int)in(v, 0x40) << 8;
	CHECK(a <= 1193);
	/* Read-back of status: mode 2, both bytes. */
	out(v, 0x43, 0xe2);
	CHECK_EQ(in(v, 0x40) & 0x3f, 0x34);
	/* Mode 0 on channel 2 through port 0x61. */
	out(v, 0x43, 0xb0);
	out(v, 0x61, 0x01);
	out(v, 0x42, 0xff);
	out(v, 0x42, 0xff);
	CHECK_EQ(in(v, 0x61) & 0x21, 0x01);
	out(v, 0x43, 0x80);
	a = in(v, 0x42);
	a |= (unsigned int)in(v, 0x42) << 8;
	nanosleep(&(struct timespec){ 0, 2000000 }, NULL);
	out(v, 0x43, 0x80);
	b = in(v, 0x42);
	b |= (unsigned int)in(v, 0x42) << 8;
	CHECK(b < a);
	out(v, 0x42, 0x01);
	out(v, 0x42, 0x00);
	nanosleep(&(struct timespec){ 0, 1000000 }, NULL);
	CHECK_EQ(in(v, 0x61) & 0x20, 0x20);
	/* A count of zero is 65536, also in the state: no divisor of zero. */
	out(v, 0x43, 0x36);
	out(v, 0x40, 0);
	out(v, 0x40, 0);
	CHECK_EQ(user_ioctl(r.vm, ABI_GET_PIT2, PTR(&ps)), 0);
	CHECK_EQ(ps.channels[0].count, 65536);
	CHECK_EQ(ps.channels[0].mode, 3);
	ps.channels[0].count = 0;
	ps.channels[1].mode = 0xff;
	CHECK_EQ(user_ioctl(r.vm, ABI_SET_PIT2, PTR(&ps)), 0);
	(void)in(v, 0x40);
	(void)in(v, 0x41);
	ps.channels[2].count = 65537;
	CHECK_EQ(user_ioctl(r.vm, ABI_SET_PIT2, PTR(&ps)), -VMK_EINVAL);
	CHECK_EQ(user_ioctl(r.vm, ABI_REINJECT_CONTROL, PTR(&rc)), 0);
	down(&r, 1);
	tap_done("chips: 8254: modes, latch, read-back, state");
}

/* ---- routing, MSI, irqfd, split ---------------------------------------- */

static void
test_routing(void)
{
	uint64_t quota = vmk_tunables.max_pinned_pages;
	struct {
		struct abi_irq_routing h;
		struct abi_irq_routing_entry e[2];
	} t = { .h = { .nr = 2 } };
	struct abi_msi msi = { .address_lo = 0xfee00000, .data = 0x81 };
	struct abi_irqfd f = { .gsi = 30 };
	struct vmk_vcpu *v;
	struct rig r;
	uint64_t one = 1;
	int efd = eventfd(0, EFD_NONBLOCK);

	up(&r, 2, false);
	v = r.v[0];
	apic_write(v, 0xf0, 0x1ff);
	CHECK_EQ(user_ioctl(r.vm, ABI_SIGNAL_MSI, PTR(&msi)), 1);
	CHECK_EQ(vmk_irq_ack(v), 0x81);
	apic_write(v, 0xb0, 0);
	msi.address_lo = 0xfee70000;		/* nobody */
	CHECK_EQ(user_ioctl(r.vm, ABI_SIGNAL_MSI, PTR(&msi)), 0);
	t.e[0].gsi = 30;
	t.e[0].type = ABI_IRQ_ROUTING_MSI;
	t.e[0].u.msi.address_lo = 0xfee00000;
	t.e[0].u.msi.data = 0x82;
	t.e[1].gsi = 31;
	t.e[1].type = ABI_IRQ_ROUTING_IRQCHIP;
	t.e[1].u.irqchip.irqchip = ABI_IRQCHIP_IOAPIC;
	t.e[1].u.irqchip.pin = 23;
	CHECK_EQ(user_ioctl(r.vm, ABI_SET_GSI_ROUTING, PTR(&t)), 0);
	CHECK_EQ(line(&r, 30, 1), 1);
	CHECK_EQ(vmk_irq_ack(v), 0x82);
	apic_write(v, 0xb0, 0);
	CHECK_EQ(line(&r, 5, 1), -1);		/* no longer routed */
	/* Refused whole: the old table stays. */
	t.e[1].u.irqchip.pin = 24;
	CHECK_EQ(user_ioctl(r.vm, ABI_SET_GSI_ROUTING, PTR(&t)), -VMK_EINVAL);
	t.e[1].u.irqchip.pin = 0;
	t.e[1].u.irqchip.irqchip = 3;
	CHECK_EQ(user_ioctl(r.vm, ABI_SET_GSI_ROUTING, PTR(&t)), -VMK_EINVAL);
	t.e[1].u.irqchip.irqchip = 2;
	t.e[1].gsi = VMK_MAX_ROUTES;
	CHECK_EQ(user_ioctl(r.vm, ABI_SET_GSI_ROUTING, PTR(&t)), -VMK_EINVAL);
	t.h.nr = VMK_MAX_ROUTES + 1;
	CHECK_EQ(user_ioctl(r.vm, ABI_SET_GSI_ROUTING, PTR(&t)), -VMK_EINVAL);
	CHECK_EQ(line(&r, 30, 1), 1);
	CHECK_EQ(vmk_irq_ack(v), 0x82);
	apic_write(v, 0xb0, 0);
	/* irqfd: a write to the eventfd raises the GSI. */
	f.fd = (uint32_t)efd;
	CHECK_EQ(user_ioctl(r.vm, ABI_IRQFD, PTR(&f)), 0);
	CHECK_EQ(user_ioctl(r.vm, ABI_IRQFD, PTR(&f)), -VMK_EBUSY);
	CHECK_EQ(write(efd, &one, 8), 8);
	CHECK(soon(v));
	CHECK_EQ(vmk_irq_ack(v), 0x82);
	f.gsi = VMK_MAX_ROUTES;
	CHECK_EQ(user_ioctl(r.vm, ABI_IRQFD, PTR(&f)), -VMK_EINVAL);
	f.gsi = 30;
	f.flags = ABI_IRQFD_RESAMPLE;
	CHECK_EQ(user_ioctl(r.vm, ABI_IRQFD, PTR(&f)), -VMK_EINVAL);
	f.flags = ABI_IRQFD_DEASSIGN;
	CHECK_EQ(user_ioctl(r.vm, ABI_IRQFD, PTR(&f)), 0);
	CHECK_EQ(user_ioctl(r.vm, ABI_IRQFD, PTR(&f)), -VMK_ENOENT);
	f.flags = 0;
	vmk_tunables.max_pinned_pages = vmk_mem_charged();
	CHECK_EQ(user_ioctl(r.vm, ABI_IRQFD, PTR(&f)), -VMK_ENOMEM);
	vmk_tunables.max_pinned_pages = quota;
	CHECK_EQ(user_ioctl(r.vm, ABI_IRQFD, PTR(&f)), 0);
	down(&r, 2);				/* takes it along */
	close(efd);
	tap_done("chips: GSI routing, MSI, irqfd");
}

static void
test_split(void)
{
	struct abi_msi msi = { .address_lo = 0xfee00000, .data = 0xc091 };
	struct abi_interrupt irq = { 0x33 };
	struct vmk_vcpu *v;
	struct abi_run *run;
	struct rig r;
	unsigned int n;
	uint64_t d = 0;
	uint32_t b = 0;

	up(&r, 1, true);
	v = r.v[0];
	run = user_map(r.fd[0], &n);
	/* PIC, PIT and I/O APIC are user space's. */
	CHECK(!vmk_irqchip_pio(v, 0x20, 1, &b, false));
	CHECK(!vmk_irqchip_pio(v, 0x40, 1, &b, false));
	CHECK(!vmk_irqchip_mmio(v, IOAPIC, 4, &d, false));
	apic_write(v, 0xf0, 0x1ff);
	/* A level message: its EOI is reported. */
	CHECK_EQ(user_ioctl(r.vm, ABI_SIGNAL_MSI, PTR(&msi)), 1);
	CHECK_EQ(vmk_irq_ack(v), 0x91);
	apic_write(v, 0xb0, 0);
	CHECK_EQ(user_ioctl(r.fd[0], ABI_RUN, 0), 0);
	CHECK_EQ(run->exit_reason, ABI_EXIT_IOAPIC_EOI);
	CHECK_EQ(run->eoi.vector, 0x91);
	/* User space's 8259 through LINT0. */
	CHECK_EQ(user_ioctl(r.fd[0], ABI_INTERRUPT, PTR(&irq)), 0);
	CHECK_EQ(user_ioctl(r.fd[0], ABI_INTERRUPT, PTR(&irq)), -VMK_EEXIST);
	CHECK_EQ(vmk_irq_pending(v), 256);
	apic_write(v, 0x350, 0x10700);
	CHECK_EQ(vmk_irq_pending(v), -1);
	apic_write(v, 0x350, 0x700);
	CHECK_EQ(vmk_irq_ack(v), 0x33);
	down(&r, 1);
	tap_done("chips: split irqchip: EOI exits, external interrupts");
}

/* KVM_GET_LAPIC and back on another machine: the same APIC. */
static void
test_lapic_state(void)
{
	struct abi_lapic_state a, b;
	struct rig r;

	up(&r, 1, false);
	apic_write(r.v[0], 0xf0, 0x1ff);
	apic_write(r.v[0], 0x320, 0x20077);
	apic_write(r.v[0], 0x3e0, 0xb);
	apic_write(r.v[0], 0x380, 0x40000000);
	ipi(r.v[0], 0, 0x40000 | 0x99);
	CHECK_EQ(user_ioctl(r.fd[0], ABI_GET_LAPIC, PTR(&a)), 0);
	down(&r, 1);
	up(&r, 1, false);
	CHECK_EQ(user_ioctl(r.fd[0], ABI_SET_LAPIC, PTR(&a)), 0);
	CHECK_EQ(vmk_irq_pending(r.v[0]), 0x99);
	CHECK_EQ(apic_read(r.v[0], 0x320), 0x20077);
	CHECK(apic_read(r.v[0], 0x390) != 0);
	memset(&a, 0xff, sizeof(a));
	CHECK_EQ(user_ioctl(r.fd[0], ABI_SET_LAPIC, PTR(&a)), 0);
	CHECK_EQ(user_ioctl(r.fd[0], ABI_GET_LAPIC, PTR(&b)), 0);
	CHECK_EQ(apic_read(r.v[0], 0x20), 0);
	CHECK_EQ(apic_read(r.v[0], 0x30), 0x50014);
	down(&r, 1);
	tap_done("chips: local APIC state");
}

/* HLT with something to deliver goes on at once. */
static struct vmk_entry entered;
static unsigned int entries;

static void
halt_then_stop(struct vmk_vcpu *vcpu, const struct vmk_entry *e,
    struct vmk_exit *x)
{
	(void)vcpu;
	entered = *e;
	x->kind = ++entries == 1 ? VMK_X_HLT : VMK_X_SHUTDOWN;
	x->insn_len = 1;
}

static void
test_halt(void)
{
	struct abi_vcpu_events ev;
	struct abi_regs g;
	struct rig r;
	int trap;

	user_never_wait(true);
	fake_enter = halt_then_stop;
	for (trap = 0; trap < 2; trap++) {
		up(&r, 1, false);
		entries = 0;
		memset(&g, 0, sizeof(g));
		g.rflags = trap ? 0x102 : 0x202;
		CHECK_EQ(user_ioctl(r.fd[0], ABI_SET_REGS, PTR(&g)), 0);
		if (!trap) {
			/* Accepted, but it has to wait behind a shadow. */
			CHECK_EQ(user_ioctl(r.fd[0], ABI_GET_VCPU_EVENTS,
			    PTR(&ev)), 0);
			ev.flags = ABI_VCPUEVENT_SHADOW;
			ev.interrupt.injected = 1;
			ev.interrupt.nr = 0x40;
			ev.interrupt.shadow = ABI_SHADOW_STI;
			CHECK_EQ(user_ioctl(r.fd[0], ABI_SET_VCPU_EVENTS,
			    PTR(&ev)), 0);
		}
		CHECK_EQ(user_ioctl(r.fd[0], ABI_RUN, 0), 0);
		CHECK_EQ(entries, 2);
		CHECK_EQ(entered.inject, trap ? VMK_INJ_EXC : VMK_INJ_IRQ);
		CHECK_EQ(entered.vector, trap ? VMK_DB : 0x40);
		down(&r, 1);
	}
	user_never_wait(false);
	tap_done("chips: HLT does not sleep on an event");
}

/* A masked NMI is a reason to look around, not to leave HLT. */
static void
test_masked_nmi(void)
{
	struct abi_vcpu_events ev;
	struct abi_mp_state mp = { ABI_MP_HALTED };
	struct rig r;

	up(&r, 1, false);
	entries = 0;
	CHECK_EQ(user_ioctl(r.fd[0], ABI_GET_VCPU_EVENTS, PTR(&ev)), 0);
	ev.nmi.masked = 1;
	CHECK_EQ(user_ioctl(r.fd[0], ABI_SET_VCPU_EVENTS, PTR(&ev)), 0);
	CHECK_EQ(user_ioctl(r.fd[0], ABI_SET_MP_STATE, PTR(&mp)), 0);
	CHECK_EQ(user_ioctl(r.fd[0], ABI_NMI, 0), 0);
	user_never_wait(true);
	CHECK_EQ(user_ioctl(r.fd[0], ABI_RUN, 0), -VMK_EINTR);
	user_never_wait(false);
	CHECK_EQ(entries, 0);
	CHECK_EQ(user_ioctl(r.fd[0], ABI_GET_MP_STATE, PTR(&mp)), 0);
	CHECK_EQ(mp.mp_state, ABI_MP_HALTED);
	down(&r, 1);
	tap_done("chips: HLT outlasts a masked NMI");
}

int
main(void)
{
	if (vmk_module_init() != 0)
		return (1);
	test_order();
	test_lapic_registers();
	test_lapic_priority();
	test_ipi();
	test_timer();
	test_x2apic();
	test_ioapic();
	test_pic();
	test_pit();
	test_routing();
	test_split();
	test_lapic_state();
	test_halt();
	test_masked_nmi();
	CHECK_EQ(vmk_module_fini(), 0);
	return (tap_failed != 0);
}

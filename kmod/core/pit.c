/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * pit.c: the 8254 interval timer (Intel 8254 data sheet, order 231164).
 *
 * Theory.  Nothing ticks.  A channel remembers when its count was loaded; the
 * counter and the output are computed from the time since.  Channel 0 has a
 * host timer for the next rise of its output, which is GSI 0; it is re-armed
 * from the time at which it should have fired, so that it does not drift.
 * Channel 2 drives port 0x61.  Periods below MIN_PERIOD_NS are stretched.
 *
 * Missed ticks are dropped; KVM_REINJECT_CONTROL may turn reinjection off,
 * which is the only mode that there is, and is accepted when turned on.
 */
#include "vmk_chips.h"

#define	PIT_HZ		1193182ULL
#define	MIN_PERIOD_NS	200000ULL
#define	GSI_TIMER	0

struct channel {
	struct abi_pit_channel_state s;		/* count_load_time: host ns */
};

struct vmk_pit {
	struct vmk_vm	*vm;
	struct channel	 ch[3];
	struct vmk_timer timer;
	bool		 armed;
	bool		 speaker;		/* bit 1 of port 0x61 */
	bool		 own_port61;
	uint32_t	 flags;			/* ABI_PIT_FLAGS_* */
	uint64_t	 deadline;
};

/* Ticks since the count was loaded; 64 bits last for centuries. */
static uint64_t
elapsed(const struct channel *c)
{
	uint64_t ns = vmk_time_ns() - (uint64_t)c->s.count_load_time;

	return (ns / 1000000000ULL * PIT_HZ +
	    ns % 1000000000ULL * PIT_HZ / 1000000000ULL);
}

static uint64_t
ticks_to_ns(uint64_t ticks)
{
	return (ticks / PIT_HZ * 1000000000ULL +
	    ticks % PIT_HZ * 1000000000ULL / PIT_HZ);
}

static unsigned int
mode_of(const struct channel *c)
{
	/* Modes 6 and 7 are 2 and 3. */
	return (c->s.mode > 5 ? c->s.mode & 3U : c->s.mode);
}

static uint16_t
counter(const struct channel *c)
{
	uint64_t t = elapsed(c);
	uint32_t n = c->s.count;

	switch (mode_of(c)) {
	case 2:
		return ((uint16_t)(n - t % n));
	case 3:
		/* Counts by two. */
		return ((uint16_t)(n - 2 * t % n));
	default:
		return ((uint16_t)(n - t));
	}
}

static bool
output(const struct channel *c)
{
	uint64_t t = elapsed(c);
	uint32_t n = c->s.count;

	switch (mode_of(c)) {
	case 0: case 1:
		return (t >= n);
	case 2:
		return (t % n != n - 1);
	case 3:
		return (t % n < (n + 1) / 2);
	default:
		return (t != n);
	}
}

/* ---- channel 0's interrupt --------------------------------------------- */

static uint64_t
period_ns(const struct channel *c)
{
	uint64_t ns = ticks_to_ns(c->s.count);

	return (ns < MIN_PERIOD_NS ? MIN_PERIOD_NS : ns);
}

static bool
periodic(const struct channel *c)
{
	return (mode_of(c) == 2 || mode_of(c) == 3);
}

/* irqchip->lock held. */
static void
timer_start(struct vmk_pit *pit)
{
	struct channel *c = &pit->ch[0];

	vmk_timer_cancel(&pit->timer);
	pit->armed = false;
	/* Modes 1 and 5 wait for a gate that this channel does not have. */
	if (mode_of(c) == 1 || mode_of(c) == 5 ||
	    (pit->flags & ABI_PIT_FLAGS_HPET_LEGACY) != 0)
		return;
	pit->armed = true;
	pit->deadline = (uint64_t)c->s.count_load_time + period_ns(c);
	vmk_timer_arm(&pit->timer, pit->deadline);
}

static void
fired(void *arg)
{
	struct vmk_pit *pit = arg;
	struct vmk_irqchip *ic = pit->vm->irqchip;
	uint64_t s, now = vmk_time_ns(), period;

	s = vmk_spin_enter(&ic->lock);
	if (pit->armed && now >= pit->deadline) {
		(void)vmk_irq_raise(pit->vm, GSI_TIMER, VMK_SRC_PIT, true);
		(void)vmk_irq_raise(pit->vm, GSI_TIMER, VMK_SRC_PIT, false);
		pit->armed = periodic(&pit->ch[0]);
		period = period_ns(&pit->ch[0]);
		pit->deadline += period;
		if (pit->deadline <= now)	/* fell behind: skip */
			pit->deadline = now + period;
	}
	if (pit->armed)
		vmk_timer_arm(&pit->timer, pit->deadline);
	vmk_spin_exit(&ic->lock, s);
}

static void
load(struct vmk_pit *pit, unsigned int n, uint32_t count)
{
	struct channel *c = &pit->ch[n];

	/* Zero stands for 65536, also in what KVM_GET_PIT2 shows. */
	c->s.count = count == 0 ? 0x10000 : count;
	c->s.count_load_time = (int64_t)vmk_time_ns();
	if (n == 0)
		timer_start(pit);
}

/* ---- ports ------------------------------------------------------------- */

static void
latch_status(struct channel *c)
{
	if (c->s.status_latched != 0)
		return;
	c->s.status = (uint8_t)((output(c) ? 0x80 : 0) | c->s.rw_mode << 4 |
	    c->s.mode << 1 | c->s.bcd);
	c->s.status_latched = 1;
}

/* rw_mode: 1 low byte, 2 high byte, 3 low then high. */
static void
latch_count(struct channel *c)
{
	if (c->s.count_latched != 0)
		return;
	c->s.latched_count = counter(c);
	c->s.count_latched = c->s.rw_mode;
}

static void
control(struct vmk_pit *pit, uint8_t v)
{
	unsigned int n = v >> 6, i;
	struct channel *c;

	if (n == 3) {				/* read-back command */
		for (i = 0; i < 3; i++) {
			if ((v >> (i + 1) & 1) == 0)
				continue;
			if ((v & 0x20) == 0)
				latch_count(&pit->ch[i]);
			if ((v & 0x10) == 0)
				latch_status(&pit->ch[i]);
		}
		return;
	}
	c = &pit->ch[n];
	if ((v & 0x30) == 0) {
		latch_count(c);
		return;
	}
	c->s.rw_mode = v >> 4 & 3;
	c->s.read_state = c->s.write_state = c->s.rw_mode;
	c->s.mode = v >> 1 & 7;
	c->s.bcd = v & 1;
	c->s.count_latched = c->s.status_latched = 0;
}

/* The states: 1 low, 2 high, 3 low of a pair, 4 high of a pair. */
static void
count_write(struct vmk_pit *pit, unsigned int n, uint8_t v)
{
	struct channel *c = &pit->ch[n];

	switch (c->s.write_state) {
	case 1:
		load(pit, n, v);
		break;
	case 2:
		load(pit, n, (uint32_t)v << 8);
		break;
	case 3:
		c->s.write_latch = v;
		c->s.write_state = 4;
		break;
	case 4:
		c->s.write_state = 3;
		load(pit, n, c->s.write_latch | (uint32_t)v << 8);
		break;
	default:
		break;
	}
}

static uint8_t
count_read(struct channel *c)
{
	uint16_t v;

	if (c->s.status_latched != 0) {
		c->s.status_latched = 0;
		return (c->s.status);
	}
	if (c->s.count_latched != 0) {
		switch (c->s.count_latched) {
		case 1:
			c->s.count_latched = 0;
			return ((uint8_t)c->s.latched_count);
		case 3:
			c->s.count_latched = 4;
			return ((uint8_t)c->s.latched_count);
		default:
			c->s.count_latched = 0;
			return ((uint8_t)(c->s.latched_count >> 8));
		}
	}
	v = counter(c);
	switch (c->s.read_state) {
	case 2:
		return ((uint8_t)(v >> 8));
	case 3:
		c->s.read_state = 4;
		return ((uint8_t)v);
	case 4:
		c->s.read_state = 3;
		return ((uint8_t)(v >> 8));
	default:
		return ((uint8_t)v);
	}
}

static void
port61(struct vmk_pit *pit, uint32_t *v, bool write)
{
	struct channel *c = &pit->ch[2];

	if (write) {
		/* A rising gate restarts the count. */
		if ((*v & 1) != 0 && c->s.gate == 0)
			c->s.count_load_time = (int64_t)vmk_time_ns();
		c->s.gate = *v & 1;
		pit->speaker = (*v & 2) != 0;
		return;
	}
	/* Bit 4 toggles with the memory refresh, every 15 us. */
	*v = c->s.gate | (pit->speaker ? 2U : 0) |
	    (output(c) && c->s.gate != 0 ? 0x20U : 0) |
	    ((vmk_time_ns() / 15085 & 1) != 0 ? 0x10U : 0);
}

bool
vmk_pit_io(struct vmk_vm *vm, uint16_t port, uint32_t *v, bool write)
{
	struct vmk_pit *pit = vm->irqchip->pit;

	if (pit == NULL)
		return (false);
	switch (port) {
	case 0x40: case 0x41: case 0x42:
		if (write)
			count_write(pit, port & 3, (uint8_t)*v);
		else
			*v = count_read(&pit->ch[port & 3]);
		return (true);
	case 0x43:
		if (write)
			control(pit, (uint8_t)*v);
		else
			*v = 0;
		return (true);
	case 0x61:
		if (!pit->own_port61)
			return (false);
		port61(pit, v, write);
		return (true);
	default:
		return (false);
	}
}

/* ---- life and state ---------------------------------------------------- */

int
vmk_pit_create(struct vmk_vm *vm, uint32_t flags)
{
	struct vmk_irqchip *ic = vm->irqchip;
	struct vmk_pit *pit;
	unsigned int i;
	uint64_t s;

	if ((flags & ~ABI_PIT_SPEAKER_DUMMY) != 0)
		return (VMK_EINVAL);
	if (ic->pit != NULL)
		return (VMK_EEXIST);
	pit = vmk_alloc(sizeof(*pit));
	if (pit == NULL)
		return (VMK_ENOMEM);
	pit->vm = vm;
	pit->own_port61 = (flags & ABI_PIT_SPEAKER_DUMMY) != 0;
	vmk_timer_init(&pit->timer, fired, pit);
	for (i = 0; i < 3; i++) {
		pit->ch[i].s.mode = 3;
		pit->ch[i].s.count = 0x10000;
		pit->ch[i].s.rw_mode = pit->ch[i].s.read_state =
		    pit->ch[i].s.write_state = 3;
		pit->ch[i].s.gate = i != 2;
		pit->ch[i].s.count_load_time = (int64_t)vmk_time_ns();
	}
	s = vmk_spin_enter(&ic->lock);
	ic->pit = pit;
	vmk_spin_exit(&ic->lock, s);
	return (0);
}

void
vmk_pit_destroy(struct vmk_vm *vm)
{
	struct vmk_pit *pit = vm->irqchip->pit;
	uint64_t s;

	if (pit == NULL)
		return;
	s = vmk_spin_enter(&vm->irqchip->lock);
	pit->armed = false;
	vmk_timer_cancel(&pit->timer);
	vmk_spin_exit(&vm->irqchip->lock, s);
	vmk_timer_fini(&pit->timer);
	vm->irqchip->pit = NULL;
	vmk_free(pit, sizeof(*pit));
}

int
vmk_pit_get(struct vmk_vm *vm, struct abi_pit_state2 *a)
{
	struct vmk_pit *pit = vm->irqchip->pit;
	unsigned int i;
	uint64_t s;

	if (pit == NULL)
		return (VMK_ENXIO);
	s = vmk_spin_enter(&vm->irqchip->lock);
	for (i = 0; i < 3; i++)
		a->channels[i] = pit->ch[i].s;
	a->flags = pit->flags |
	    (pit->speaker ? ABI_PIT_FLAGS_SPEAKER_DATA_ON : 0);
	vmk_spin_exit(&vm->irqchip->lock, s);
	return (0);
}

int
vmk_pit_set(struct vmk_vm *vm, const struct abi_pit_state2 *a)
{
	struct vmk_pit *pit = vm->irqchip->pit;
	int64_t now = (int64_t)vmk_time_ns();
	unsigned int i;
	uint64_t s;

	if (pit == NULL)
		return (VMK_ENXIO);
	for (i = 0; i < 3; i++)
		if (a->channels[i].count > 0x10000)
			return (VMK_EINVAL);
	s = vmk_spin_enter(&vm->irqchip->lock);
	for (i = 0; i < 3; i++) {
		struct abi_pit_channel_state *c = &pit->ch[i].s;

		*c = a->channels[i];
		c->mode &= 7;
		if (c->count == 0)
			c->count = 0x10000;
		c->bcd &= 1;
		c->rw_mode &= 3;
		c->gate &= 1;
		/* A time of another boot or host means nothing here. */
		if (c->count_load_time <= 0 || c->count_load_time > now)
			c->count_load_time = now;
	}
	pit->flags = a->flags & ABI_PIT_FLAGS_HPET_LEGACY;
	pit->speaker = (a->flags & ABI_PIT_FLAGS_SPEAKER_DATA_ON) != 0;
	/* The count goes on from its load time; the next tick is ahead. */
	timer_start(pit);
	if (pit->armed && pit->deadline < (uint64_t)now) {
		pit->deadline = (uint64_t)now + period_ns(&pit->ch[0]);
		vmk_timer_arm(&pit->timer, pit->deadline);
	}
	vmk_spin_exit(&vm->irqchip->lock, s);
	return (0);
}

int
vmk_pit_reinject(struct vmk_vm *vm, const struct abi_reinject_control *a)
{
	(void)a;
	return (vm->irqchip->pit == NULL ? VMK_ENXIO : 0);
}

/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_emul.c: instructions that touch devices, carried out in software.
 *
 * Theory.  An access to an address without memory, or to a port, leaves the
 * guest.  Here the instruction is read again, decoded (vmk_decode.c) and
 * executed: operands are translated through the guest's own page tables with
 * the checks that the processor would make, memory operands go to memory, to a
 * chip in the kernel or to user space.
 *
 * A trip to user space ends the RUN request, so an instruction is a small
 * state machine, kept in vcpu->em: read all fragments, compute, write all
 * fragments, commit.  Registers and RIP change at the commit only; what
 * follows the last fragment of a write is nothing, so that a write has
 * committed when user space sees it.  A pending read belongs to the RIP at
 * which it was started: if user space moves the vCPU meanwhile (reset,
 * snapshot), it is dropped.
 *
 * Data that user space returns is fetched once, with lengths from vcpu->em,
 * never from the shared page (CVE-2021-3501).
 *
 * Not done here: whatever vmk_decode() refuses, and code or page tables that
 * are not in memory.  Those end in KVM_EXIT_INTERNAL_ERROR.
 *
 * Paging: SDM 3A chapter 4, APM 2 chapter 5.  Segment checks: SDM 3A 5.3.
 */
#include "vmk_arch.h"
#include "vmk_irqchip.h"

/* ---- modes and registers ----------------------------------------------- */

static uint64_t
creg(struct vmk_vcpu *vcpu, enum vmk_creg r)
{
	return (vmk_arch->get_creg(vcpu, r));
}

unsigned int
vmk_code_bits(struct vmk_vcpu *vcpu)
{
	struct vmk_segment cs;

	vmk_arch->get_seg(vcpu, VMK_CS, &cs);
	if ((creg(vcpu, VMK_EFER) & EFER_LMA) != 0 &&
	    (cs.attr & SEG_ATTR_L) != 0)
		return (64);
	return ((cs.attr & SEG_ATTR_DB) != 0 ? 32 : 16);
}

unsigned int
vmk_cpl(struct vmk_vcpu *vcpu)
{
	struct vmk_segment ss;

	if ((creg(vcpu, VMK_CR0) & CR0_PE) == 0)
		return (0);
	vmk_arch->get_seg(vcpu, VMK_SSEG, &ss);
	return (SEG_ATTR_DPL(ss.attr));
}

static uint64_t
size_mask(unsigned int size)
{
	return (size >= 8 ? ~0ULL : (1ULL << (8 * size)) - 1);
}

static uint64_t
reg_read(struct vmk_vcpu *vcpu, const struct vmk_insn *in)
{
	uint64_t v = vcpu->gpr[in->reg];

	if (in->high8)
		v >>= 8;
	return (v & size_mask(in->opsize));
}

/* A 32-bit result clears the upper half (SDM 1, 3.4.1.1). */
static void
gpr_write(struct vmk_vcpu *vcpu, unsigned int reg, bool high8,
    unsigned int size, uint64_t v)
{
	uint64_t m = size_mask(size);

	if (high8)
		vcpu->gpr[reg] = (vcpu->gpr[reg] & ~0xff00ULL) |
		    ((v & 0xff) << 8);
	else if (size >= 4)
		vcpu->gpr[reg] = v & m;
	else
		vcpu->gpr[reg] = (vcpu->gpr[reg] & ~m) | (v & m);
}

/* ---- paging ------------------------------------------------------------ */

#define	PTE_P	0x001ULL
#define	PTE_W	0x002ULL
#define	PTE_U	0x004ULL
#define	PTE_A	0x020U
#define	PTE_D	0x040U
#define	PTE_PS	0x080ULL
#define	PTE_NX	(1ULL << 63)
#define	PTE_PFN	0x000ffffffffff000ULL

struct walk {
	unsigned int	levels, shift_per_level;
	bool		wide;		/* 8-byte entries */
	uint64_t	root;
};

static void
walk_shape(struct vmk_vcpu *vcpu, uint64_t cr4, struct walk *w)
{
	uint64_t cr3 = creg(vcpu, VMK_CR3);

	if ((creg(vcpu, VMK_EFER) & EFER_LMA) != 0) {
		w->levels = (cr4 & CR4_LA57) != 0 ? 5 : 4;
		w->wide = true;
		w->root = cr3 & PTE_PFN;
	} else if ((cr4 & CR4_PAE) != 0) {
		w->levels = 3;
		w->wide = true;
		w->root = cr3 & 0xffffffe0ULL;
	} else {
		w->levels = 2;
		w->wide = false;
		w->root = cr3 & 0xfffff000ULL;
	}
	w->shift_per_level = w->wide ? 9 : 10;
}

/* May this access use a page with these accumulated rights?  SDM 3A 4.6. */
static bool
walk_allowed(struct vmk_vcpu *vcpu, uint64_t cr4, unsigned int flags,
    uint64_t rights, bool nx)
{
	bool user = (flags & VMK_WALK_USER) != 0;
	bool upage = (rights & PTE_U) != 0;

	if (user && !upage)
		return (false);
	if ((flags & VMK_WALK_FETCH) != 0) {
		if (nx || (!user && upage && (cr4 & CR4_SMEP) != 0))
			return (false);
		return (true);
	}
	if (!user && upage && (cr4 & CR4_SMAP) != 0 &&
	    (vcpu->rflags & 0x40000) == 0)			/* AC */
		return (false);
	if ((flags & VMK_WALK_WRITE) != 0 && (rights & PTE_W) == 0 &&
	    (user || (creg(vcpu, VMK_CR0) & CR0_WP) != 0))
		return (false);
	return (true);
}

int
vmk_walk(struct vmk_vcpu *vcpu, uint64_t gva, unsigned int flags,
    uint64_t *gpa, uint32_t *pf_error)
{
	uint64_t cr4 = creg(vcpu, VMK_CR4), efer = creg(vcpu, VMK_EFER);
	uint64_t rights = PTE_W | PTE_U, pte = 0, pte_gpa[5], span;
	unsigned int level, shift, i, n = 0;
	bool nx = false, nxe = (efer & EFER_NXE) != 0;
	struct walk w;

	if ((creg(vcpu, VMK_CR0) & CR0_PG) == 0) {
		*gpa = gva & 0xffffffffULL;
		return (0);
	}
	*pf_error = ((flags & VMK_WALK_WRITE) != 0 ? PF_ERR_W : 0) |
	    ((flags & VMK_WALK_USER) != 0 ? PF_ERR_U : 0) |
	    ((flags & VMK_WALK_FETCH) != 0 && (nxe || (cr4 & CR4_SMEP) != 0) ?
	    PF_ERR_I : 0);
	walk_shape(vcpu, cr4, &w);
	if (w.levels < 4)
		gva &= 0xffffffffULL;
	for (level = w.levels; ; level--) {
		uint64_t at;
		unsigned int idx;

		shift = VMK_PAGE_SHIFT + w.shift_per_level * (level - 1);
		idx = (unsigned int)(gva >> shift) &
		    ((1U << w.shift_per_level) - 1);
		if (w.levels == 3 && level == 3)
			idx &= 3;
		at = w.root + (uint64_t)idx * (w.wide ? 8 : 4);
		pte = 0;
		if (vmk_gpa_read(vcpu->vm, at, &pte, w.wide ? 8 : 4) != 0)
			return (VMK_ENXIO);
		if ((pte & PTE_P) == 0)
			return (VMK_EFAULT);
		/* The four entries of PAE's top table grant everything. */
		if (w.levels != 3 || level != 3) {
			rights &= pte;
			nx |= nxe && w.wide && (pte & PTE_NX) != 0;
			pte_gpa[n++] = at;
		}
		if (level == 1)
			break;
		if ((pte & PTE_PS) != 0 && (level == 2 ? (w.wide ||
		    (cr4 & CR4_PSE) != 0) : level == 3 && w.levels >= 4))
			break;
		w.root = pte & PTE_PFN;
	}
	*pf_error |= PF_ERR_P;
	if (!walk_allowed(vcpu, cr4, flags, rights, nx))
		return (VMK_EFAULT);
	/* pte_gpa[n - 1] is the leaf.  Tables in ROM stay as they are. */
	for (i = 0; i < n && (flags & VMK_WALK_PROBE) == 0; i++)
		(void)vmk_gpa_or(vcpu->vm, pte_gpa[i], PTE_A |
		    (i == n - 1 && (flags & VMK_WALK_WRITE) != 0 ? PTE_D : 0),
		    w.wide);
	span = (1ULL << shift) - 1;
	*gpa = (pte & PTE_PFN & ~span) | (gva & span);
	if (!w.wide && level == 2)		/* PSE-36 */
		*gpa = (pte & 0xffc00000ULL) | ((pte >> 13 & 0xff) << 32) |
		    (gva & span);
	return (0);
}

/*
 * Segment offset to linear address, with the checks for size bytes.  False:
 * an exception has been queued.
 */
static bool
linear(struct vmk_vcpu *vcpu, enum vmk_seg seg, uint64_t off,
    unsigned int size, bool write, uint64_t *gva)
{
	uint8_t vector = seg == VMK_SSEG ? VMK_SS : VMK_GP;
	struct vmk_segment s;
	uint64_t last, lo, hi;

	vmk_arch->get_seg(vcpu, seg, &s);
	if (vmk_code_bits(vcpu) == 64) {
		*gva = off + (seg == VMK_FS || seg == VMK_GS ? s.base : 0);
		if (vmk_canonical(*gva) && vmk_canonical(*gva + size - 1))
			return (true);
		vmk_inject(vcpu, vector, true, 0);
		return (false);
	}
	off &= 0xffffffffULL;
	last = off + size - 1;
	lo = 0;
	hi = s.limit;
	if ((s.attr & 0x1c) == 0x14) {		/* expand-down data */
		lo = (uint64_t)s.limit + 1;
		hi = (s.attr & SEG_ATTR_DB) != 0 ? 0xffffffffULL : 0xffff;
	}
	if ((s.attr & SEG_ATTR_P) == 0 || off < lo || last > hi)
		goto fault;
	if ((creg(vcpu, VMK_CR0) & CR0_PE) != 0 &&
	    (vcpu->rflags & RFLAGS_VM) == 0) {
		/* Code is never writable, and readable with type bit 1. */
		if (write ? (s.attr & 0xa) != 2 : (s.attr & 0xa) == 8)
			goto fault;
	}
	*gva = (s.base + off) & 0xffffffffULL;
	return (true);
fault:
	vmk_inject(vcpu, vector, true, 0);
	return (false);
}

/* Translate for data at the current privilege; false: #PF queued, or worse. */
enum translated { TR_OK, TR_FAULT, TR_LOST };

static enum translated
translate(struct vmk_vcpu *vcpu, uint64_t gva, bool write, uint64_t *gpa)
{
	unsigned int flags = write ? VMK_WALK_WRITE : 0;
	uint32_t pf = 0;

	if (vmk_cpl(vcpu) == 3)
		flags |= VMK_WALK_USER;
	switch (vmk_walk(vcpu, gva, flags, gpa, &pf)) {
	case 0:
		return (TR_OK);
	case VMK_EFAULT:
		vmk_inject_pf(vcpu, gva, pf);
		return (TR_FAULT);
	default:
		return (TR_LOST);
	}
}

/* Up to 15 bytes at RIP; how many came. */
static unsigned int
fetch(struct vmk_vcpu *vcpu, uint8_t bytes[VMK_INSN_MAX])
{
	unsigned int flags = VMK_WALK_FETCH | VMK_WALK_PROBE, got = 0, n;
	uint64_t gva = vcpu->rip, gpa;
	struct vmk_segment cs;
	uint32_t pf;

	if (vmk_code_bits(vcpu) != 64) {
		vmk_arch->get_seg(vcpu, VMK_CS, &cs);
		gva = (gva + cs.base) & 0xffffffffULL;
	}
	if (vmk_cpl(vcpu) == 3)
		flags |= VMK_WALK_USER;
	while (got < VMK_INSN_MAX) {
		n = VMK_PAGE_SIZE - (unsigned int)(gva & ~VMK_PAGE_MASK);
		if (n > VMK_INSN_MAX - got)
			n = VMK_INSN_MAX - got;
		if (vmk_walk(vcpu, gva, flags, &gpa, &pf) != 0 ||
		    vmk_gpa_read(vcpu->vm, gpa, bytes + got, n) != 0)
			break;
		got += n;
		gva += n;
	}
	return (got);
}

uint64_t
vmk_rip_after(struct vmk_vcpu *vcpu, unsigned int len)
{
	unsigned int bits = vmk_code_bits(vcpu);
	uint64_t rip = vcpu->rip + len;

	return (bits == 64 ? rip : rip & (bits == 32 ? 0xffffffffU : 0xffffU));
}

/* An instruction ends: trap flag and interrupt shadow (SDM 3A 6.8.3, 17.3). */
void
vmk_advance(struct vmk_vcpu *vcpu, uint64_t next_rip)
{
	vcpu->rip = next_rip;
	vcpu->rflags &= ~RFLAGS_RF;
	vmk_arch->set_shadow(vcpu, 0);
	if ((vcpu->guest_debug & ABI_GUESTDBG_SINGLESTEP) != 0) {
		vcpu->debug_stepped = true;
	} else if ((vcpu->rflags & RFLAGS_TF) != 0) {
		vmk_arch->set_creg(vcpu, VMK_DR6,
		    creg(vcpu, VMK_DR6) | 0x4000);		/* BS */
		vmk_inject(vcpu, VMK_DB, false, 0);
	}
}

/* Read and decode; false: *next is what RUN has to do. */
static bool
fetch_decode(struct vmk_vcpu *vcpu, struct vmk_insn *in, enum vmk_next *next)
{
	unsigned int n = vcpu->em.nfetched, bits = vmk_code_bits(vcpu);
	uint8_t bytes[VMK_INSN_MAX];

	vcpu->em.nfetched = 0;
	if (n == 0 || n > VMK_INSN_MAX ||
	    vmk_decode(vcpu->em.fetched, n, bits, in) != 0) {
		n = fetch(vcpu, bytes);
		if (vmk_decode(bytes, n, bits, in) != 0) {
			*next = vmk_exit_emulation(vcpu, bytes, n);
			return (false);
		}
	}
	vcpu->em.next_rip = vmk_rip_after(vcpu, in->len);
	return (true);
}

enum vmk_next
vmk_skip(struct vmk_vcpu *vcpu)
{
	struct vmk_insn in;
	enum vmk_next next = VMK_RUN_AGAIN;

	if (fetch_decode(vcpu, &in, &next))
		vmk_advance(vcpu, vcpu->em.next_rip);
	return (next);
}

/* ---- arithmetic -------------------------------------------------------- */

#define	RFLAGS_ARITH							\
	(RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF)

static uint64_t
flags_szp(uint64_t r, unsigned int size)
{
	uint64_t f = 0;

	r &= size_mask(size);
	if (r == 0)
		f |= RFLAGS_ZF;
	if ((r >> (8 * size - 1) & 1) != 0)
		f |= RFLAGS_SF;
	if ((__builtin_popcountll(r & 0xff) & 1) == 0)
		f |= RFLAGS_PF;
	return (f);
}

/*
 * a op b with the flags of SDM 1, 3.4.3.1.  Pure; *flags holds the old flags
 * and receives the new.
 */
uint64_t
vmk_alu(unsigned int op, uint64_t a, uint64_t b, unsigned int size,
    uint64_t *flags)
{
	uint64_t m = size_mask(size), top = 1ULL << (8 * size - 1), r, f;
	uint64_t carry = *flags & RFLAGS_CF;

	a &= m;
	b &= m;
	switch (op) {
	case VMK_ADD: case VMK_ADC:
		if (op == VMK_ADD)
			carry = 0;
		r = (a + b + carry) & m;
		f = (r < a || (carry != 0 && r == a) ? RFLAGS_CF : 0) |
		    (((a ^ r) & (b ^ r) & top) != 0 ? RFLAGS_OF : 0) |
		    ((a ^ b ^ r) & RFLAGS_AF);
		break;
	case VMK_SUB: case VMK_SBB: case VMK_CMP:
		if (op != VMK_SBB)
			carry = 0;
		r = (a - b - carry) & m;
		f = (a < b || (carry != 0 && a == b) ? RFLAGS_CF : 0) |
		    (((a ^ b) & (a ^ r) & top) != 0 ? RFLAGS_OF : 0) |
		    ((a ^ b ^ r) & RFLAGS_AF);
		break;
	case VMK_OR:
		r = a | b;
		f = 0;
		break;
	case VMK_AND:
		r = a & b;
		f = 0;
		break;
	default:
		r = a ^ b;
		f = 0;
		break;
	}
	*flags = (*flags & ~RFLAGS_ARITH) | f | flags_szp(r, size);
	return (r);
}

/* ---- memory operands --------------------------------------------------- */

static uint64_t
effective(struct vmk_vcpu *vcpu, const struct vmk_insn *in)
{
	uint64_t ea = (uint64_t)in->disp;

	if (in->base != VMK_NOREG)
		ea += vcpu->gpr[in->base];
	if (in->index != VMK_NOREG)
		ea += vcpu->gpr[in->index] << in->scale;
	if (in->riprel)
		ea += vcpu->em.next_rip;
	return (ea & size_mask(in->addrsize));
}

/* Cut an operand into fragments that do not cross a page. */
static enum translated
operand(struct vmk_vcpu *vcpu, enum vmk_seg seg, uint64_t off,
    unsigned int size, bool write)
{
	struct vmk_emul *em = &vcpu->em;
	enum translated tr;
	unsigned int room;
	uint64_t gva;

	em->cur = em->nfrag = 0;
	if (!linear(vcpu, seg, off, size, write, &gva))
		return (TR_FAULT);
	room = VMK_PAGE_SIZE - (unsigned int)(gva & ~VMK_PAGE_MASK);
	tr = translate(vcpu, gva, write, &em->frag[0].gpa);
	if (tr != TR_OK)
		return (tr);
	em->nfrag = 1;
	em->frag[0].len = (uint8_t)size;
	if (size > room) {
		tr = translate(vcpu, gva + room, write, &em->frag[1].gpa);
		if (tr != TR_OK)
			return (tr);
		em->frag[0].len = (uint8_t)room;
		em->frag[1].len = (uint8_t)(size - room);
		em->nfrag = 2;
	}
	return (TR_OK);
}

/* A write of data, or with NULL a read. */
static void
mmio_exit(struct vmk_vcpu *vcpu, uint64_t gpa, const uint8_t *data,
    unsigned int len)
{
	struct abi_run *run = vcpu->run;

	memset(&run->mmio, 0, sizeof(run->mmio));
	run->exit_reason = ABI_EXIT_MMIO;
	run->mmio.phys_addr = gpa;
	run->mmio.len = len;
	run->mmio.is_write = data != NULL;
	if (data != NULL)
		memcpy(run->mmio.data, data, len);
}

/* One fragment to memory, chip or binding; false: it is user space's. */
static bool
fragment(struct vmk_vcpu *vcpu, uint64_t gpa, uint8_t *data, unsigned int len,
    bool write)
{
	uint64_t v = 0;

	if (write ? vmk_gpa_write(vcpu->vm, gpa, data, len) == 0 :
	    vmk_gpa_read(vcpu->vm, gpa, data, len) == 0)
		return (true);
	memcpy(&v, data, write ? len : 0);
	if (vcpu->lapic != NULL &&
	    vmk_irqchip_mmio(vcpu, gpa, len, &v, write)) {
		if (!write)
			memcpy(data, &v, len);
		return (true);
	}
	return (write && vmk_io_write(vcpu->vm, false, gpa, len, v));
}

static enum vmk_next emul_step(struct vmk_vcpu *);

/* Read the fragments from em->cur on; then go on computing. */
static enum vmk_next
emul_read(struct vmk_vcpu *vcpu)
{
	struct vmk_emul *em = &vcpu->em;

	for (; em->cur < em->nfrag; em->cur++) {
		uint8_t *data = em->data + (em->cur > 0 ? em->frag[0].len : 0);

		if (fragment(vcpu, em->frag[em->cur].gpa, data,
		    em->frag[em->cur].len, false))
			continue;
		mmio_exit(vcpu, em->frag[em->cur].gpa, NULL,
		    em->frag[em->cur].len);
		em->pending = VMK_PEND_MMIO_READ;
		em->rip = vcpu->rip;
		return (VMK_RUN_USER);
	}
	return (emul_step(vcpu));
}

/* String instructions: move the pointers, count down, maybe repeat. */
static void
string_commit(struct vmk_vcpu *vcpu, uint32_t n)
{
	const struct vmk_insn *in = &vcpu->em.insn;
	uint64_t step = (uint64_t)n * in->memsize, m = size_mask(in->addrsize);
	uint64_t left = 0;

	if ((vcpu->rflags & RFLAGS_DF) != 0)
		step = -step;
	if (in->op != VMK_OP_STOS && in->op != VMK_OP_INS)
		gpr_write(vcpu, VMK_RSI, false, in->addrsize,
		    vcpu->gpr[VMK_RSI] + step);
	if (in->op != VMK_OP_LODS && in->op != VMK_OP_OUTS)
		gpr_write(vcpu, VMK_RDI, false, in->addrsize,
		    vcpu->gpr[VMK_RDI] + step);
	if (in->rep) {
		left = (vcpu->gpr[VMK_RCX] - n) & m;
		gpr_write(vcpu, VMK_RCX, false, in->addrsize, left);
	}
	if (left == 0)
		vmk_advance(vcpu, vcpu->em.next_rip);
}

static bool
is_string(const struct vmk_insn *in)
{
	return (in->op == VMK_OP_STOS || in->op == VMK_OP_MOVS ||
	    in->op == VMK_OP_LODS);
}

static void
emul_commit(struct vmk_vcpu *vcpu)
{
	struct vmk_emul *em = &vcpu->em;

	em->pending = VMK_PEND_NONE;
	if (em->set_reg)
		gpr_write(vcpu, em->insn.reg, em->insn.high8, em->insn.opsize,
		    em->reg_value);
	if (em->set_flags)
		vcpu->rflags = (vcpu->rflags & ~RFLAGS_ARITH) |
		    (em->flags & RFLAGS_ARITH);
	if (is_string(&em->insn))
		string_commit(vcpu, 1);
	else
		vmk_advance(vcpu, em->next_rip);
}

static enum vmk_next
emul_write(struct vmk_vcpu *vcpu)
{
	struct vmk_emul *em = &vcpu->em;
	uint8_t *data;
	uint64_t gpa;
	unsigned int len;

	while (em->cur < em->nfrag) {
		data = em->data + (em->cur > 0 ? em->frag[0].len : 0);
		gpa = em->frag[em->cur].gpa;
		len = em->frag[em->cur].len;
		em->cur++;
		if (fragment(vcpu, gpa, data, len, true))
			continue;
		mmio_exit(vcpu, gpa, data, len);
		if (em->cur < em->nfrag) {
			em->pending = VMK_PEND_MMIO_WRITE;
			em->rip = vcpu->rip;
		} else {
			emul_commit(vcpu);
		}
		return (VMK_RUN_USER);
	}
	emul_commit(vcpu);
	return (VMK_RUN_AGAIN);
}

static enum vmk_next
emul_lost(struct vmk_vcpu *vcpu)
{
	uint8_t bytes[VMK_INSN_MAX];
	unsigned int n;

	vcpu->em.pending = VMK_PEND_NONE;
	n = fetch(vcpu, bytes);
	return (vmk_exit_emulation(vcpu, bytes, n));
}

/* What an operation does with its operand, and whether flags follow. */
#define	RD	1U
#define	WR	2U
#define	FL	4U
static const uint8_t operation[] = {
	[VMK_OP_MOV_STORE] = WR, [VMK_OP_MOV_LOAD] = RD, [VMK_OP_MOV_IMM] = WR,
	[VMK_OP_MOVZX] = RD, [VMK_OP_MOVSX] = RD, [VMK_OP_STOS] = WR,
	[VMK_OP_MOVS] = RD, [VMK_OP_LODS] = RD, [VMK_OP_ALU_LOAD] = RD | FL,
	[VMK_OP_ALU_STORE] = RD | WR | FL, [VMK_OP_ALU_IMM] = RD | WR | FL,
	[VMK_OP_TEST] = RD | FL, [VMK_OP_TEST_IMM] = RD | FL,
	[VMK_OP_XCHG] = RD | WR, [VMK_OP_NOT] = RD | WR,
	[VMK_OP_NEG] = RD | WR | FL, [VMK_OP_INC] = RD | WR | FL,
	[VMK_OP_DEC] = RD | WR | FL, [VMK_OP_BIT_IMM] = RD | WR | FL,
};

static unsigned int
operand_use(const struct vmk_insn *in)
{
	unsigned int use = in->op < VMK_ARRAY_LEN(operation) ?
	    operation[in->op] : 0;

	/* CMP and BT only look. */
	if (((in->op == VMK_OP_ALU_STORE || in->op == VMK_OP_ALU_IMM) &&
	    in->alu == VMK_CMP) || (in->op == VMK_OP_BIT_IMM && in->alu == 0))
		use &= ~WR;
	return (use);
}

/* MOVS' source is read; the destination is always ES:DI. */
static enum vmk_next
movs_write(struct vmk_vcpu *vcpu)
{
	struct vmk_emul *em = &vcpu->em;
	const struct vmk_insn *in = &em->insn;

	switch (operand(vcpu, VMK_ES, vcpu->gpr[VMK_RDI] &
	    size_mask(in->addrsize), in->memsize, true)) {
	case TR_OK:
		return (emul_write(vcpu));
	case TR_FAULT:
		em->pending = VMK_PEND_NONE;
		return (VMK_RUN_AGAIN);
	default:
		return (emul_lost(vcpu));
	}
}

/* The operand is in em->data: compute, then write back or commit. */
static enum vmk_next
emul_step(struct vmk_vcpu *vcpu)
{
	struct vmk_emul *em = &vcpu->em;
	const struct vmk_insn *in = &em->insn;
	unsigned int use = operand_use(in);
	uint64_t v = 0, bit;

	memcpy(&v, em->data, in->memsize);
	em->flags = vcpu->rflags;
	em->set_flags = (use & FL) != 0;
	switch (in->op) {
	case VMK_OP_MOV_LOAD: case VMK_OP_MOVZX: case VMK_OP_MOVSX:
	case VMK_OP_LODS: case VMK_OP_XCHG:
		em->set_reg = true;
		em->reg_value = in->op == VMK_OP_MOVSX ?
		    (uint64_t)vmk_sign_extend(v, in->memsize) : v;
		if (in->op == VMK_OP_XCHG)
			v = reg_read(vcpu, in);
		break;
	case VMK_OP_MOVS:
		return (movs_write(vcpu));
	case VMK_OP_ALU_LOAD:
		em->reg_value = vmk_alu(in->alu, reg_read(vcpu, in), v,
		    in->memsize, &em->flags);
		em->set_reg = in->alu != VMK_CMP;
		break;
	case VMK_OP_ALU_STORE:
		v = vmk_alu(in->alu, v, reg_read(vcpu, in), in->memsize,
		    &em->flags);
		break;
	case VMK_OP_ALU_IMM: case VMK_OP_NOT: case VMK_OP_INC: case VMK_OP_DEC:
		v = vmk_alu(in->alu, v, in->imm, in->memsize, &em->flags);
		if (in->op == VMK_OP_INC || in->op == VMK_OP_DEC)
			em->flags = (em->flags & ~RFLAGS_CF) |
			    (vcpu->rflags & RFLAGS_CF);
		break;
	case VMK_OP_TEST: case VMK_OP_TEST_IMM:
		(void)vmk_alu(VMK_AND, v, in->op == VMK_OP_TEST_IMM ?
		    in->imm : reg_read(vcpu, in), in->memsize, &em->flags);
		break;
	case VMK_OP_NEG:
		v = vmk_alu(VMK_SUB, 0, v, in->memsize, &em->flags);
		break;
	case VMK_OP_BIT_IMM:
		bit = 1ULL << (in->imm & (8U * in->memsize - 1));
		em->flags = (em->flags & ~RFLAGS_CF) |
		    ((v & bit) != 0 ? RFLAGS_CF : 0);
		v = in->alu == 1 ? v | bit : in->alu == 2 ? v & ~bit : v ^ bit;
		break;
	default:
		return (emul_lost(vcpu));
	}
	if ((use & WR) != 0) {
		memcpy(em->data, &v, in->memsize);
		em->cur = 0;
		return (emul_write(vcpu));
	}
	emul_commit(vcpu);
	return (VMK_RUN_AGAIN);
}

enum vmk_next
vmk_emul_mmio(struct vmk_vcpu *vcpu)
{
	struct vmk_emul *em = &vcpu->em;
	struct vmk_insn *in = &em->insn;
	bool stos;
	enum vmk_next next;
	unsigned int use;
	uint64_t off, v;

	if (!fetch_decode(vcpu, in, &next))
		return (next);
	em->set_reg = em->set_flags = false;
	memset(em->data, 0, sizeof(em->data));
	/* Port strings fault through vmk_emul_io(); the rest has no operand. */
	use = operand_use(in);
	if (!in->mem || use == 0)
		return (emul_lost(vcpu));
	stos = in->op == VMK_OP_STOS;
	if (!is_string(in)) {
		off = effective(vcpu, in);
	} else if (in->rep &&
	    (vcpu->gpr[VMK_RCX] & size_mask(in->addrsize)) == 0) {
		vmk_advance(vcpu, em->next_rip);
		return (VMK_RUN_AGAIN);
	} else {
		off = vcpu->gpr[stos ? VMK_RDI : VMK_RSI] &
		    size_mask(in->addrsize);
	}
	switch (operand(vcpu, stos ? VMK_ES : (enum vmk_seg)in->seg, off,
	    in->memsize, (use & WR) != 0)) {
	case TR_OK:
		break;
	case TR_FAULT:
		return (VMK_RUN_AGAIN);
	default:
		return (emul_lost(vcpu));
	}
	if ((use & RD) != 0)
		return (emul_read(vcpu));
	v = in->op == VMK_OP_MOV_IMM ? in->imm : reg_read(vcpu, in);
	memcpy(em->data, &v, in->memsize);
	return (emul_write(vcpu));
}

/* ---- control registers ------------------------------------------------- */

static enum vmk_next
write_cr8(struct vmk_vcpu *vcpu, uint64_t v)
{
	uint64_t old = creg(vcpu, VMK_CR8);

	if ((v & ~0xfULL) != 0) {
		vmk_inject_gp(vcpu);
		return (VMK_RUN_AGAIN);
	}
	vmk_arch->set_creg(vcpu, VMK_CR8, v);
	vmk_advance(vcpu, vcpu->em.next_rip);
	if (vcpu->lapic != NULL) {
		vmk_lapic_set_cr8(vcpu, v);
		return (VMK_RUN_AGAIN);
	}
	if (v >= old)
		return (VMK_RUN_AGAIN);
	vcpu->run->exit_reason = ABI_EXIT_SET_TPR;
	return (VMK_RUN_USER);
}

/*
 * A write to CR0 that changes more than TS or MP, to CR4, or to CR8.  The
 * processor has checked the privilege before the intercept, and may have
 * decoded a MOV.
 */
enum vmk_next
vmk_emul_cr(struct vmk_vcpu *vcpu, const struct vmk_exit *x)
{
	struct vmk_insn in = { .op = VMK_OP_MOV_TO_CR, .reg = x->mov_cr.cr,
		.rm = x->mov_cr.gpr };
	enum vmk_next next;
	uint64_t v = 0, cr0 = creg(vcpu, VMK_CR0), gva, gpa;
	int error;

	if (x->mov_cr.valid && x->insn_len != 0)
		vcpu->em.next_rip = vmk_rip_after(vcpu, x->insn_len);
	else if (!fetch_decode(vcpu, &in, &next))
		return (next);
	switch (in.op) {
	case VMK_OP_CLTS:
		error = vmk_set_cr0(vcpu, cr0 & ~CR0_TS);
		break;
	case VMK_OP_LMSW:
		if (in.mem) {
			if (!linear(vcpu, (enum vmk_seg)in.seg,
			    effective(vcpu, &in), 2, false, &gva))
				return (VMK_RUN_AGAIN);
			switch (translate(vcpu, gva, false, &gpa)) {
			case TR_OK:
				break;
			case TR_FAULT:
				return (VMK_RUN_AGAIN);
			default:
				return (emul_lost(vcpu));
			}
			if (vmk_gpa_read(vcpu->vm, gpa, &v, 2) != 0)
				return (emul_lost(vcpu));
		} else {
			v = vcpu->gpr[in.rm];
		}
		/* LMSW sets PE, MP, EM and TS, and cannot clear PE. */
		error = vmk_set_cr0(vcpu, (cr0 & ~0xeULL) | (v & 0xf));
		break;
	case VMK_OP_MOV_TO_CR:
		v = vcpu->gpr[in.rm];
		if (vmk_code_bits(vcpu) != 64)
			v &= 0xffffffffULL;
		if (in.reg == 8)
			return (write_cr8(vcpu, v));
		if (in.reg == 0)
			error = vmk_set_cr0(vcpu, v);
		else if (in.reg == 4)
			error = vmk_set_cr4(vcpu, v);
		else
			return (emul_lost(vcpu));
		break;
	default:
		return (emul_lost(vcpu));
	}
	if (error != 0)
		vmk_inject_gp(vcpu);
	else
		vmk_advance(vcpu, vcpu->em.next_rip);
	return (VMK_RUN_AGAIN);
}

/* ---- ports ------------------------------------------------------------- */

static uint8_t *
pio_page(struct vmk_vcpu *vcpu)
{
	return (vcpu->shared.va + ABI_PIO_PAGE * VMK_PAGE_SIZE);
}

static enum vmk_next
pio_exit(struct vmk_vcpu *vcpu, uint16_t port, unsigned int size, bool in,
    uint32_t count)
{
	struct abi_run *run = vcpu->run;

	run->exit_reason = ABI_EXIT_IO;
	run->io.direction = in ? ABI_EXIT_IO_IN : ABI_EXIT_IO_OUT;
	run->io.size = (uint8_t)size;
	run->io.port = port;
	run->io.count = count;
	run->io.data_offset = ABI_PIO_PAGE * VMK_PAGE_SIZE;
	vcpu->em.rip = vcpu->rip;
	vcpu->em.size = (uint8_t)size;
	vcpu->em.count = count;
	return (VMK_RUN_USER);
}

/* How many elements from off on lie in one page and in the segment. */
static uint32_t
string_batch(struct vmk_vcpu *vcpu, enum vmk_seg seg, uint64_t off,
    uint64_t gva, unsigned int size, uint64_t count)
{
	uint64_t n = (VMK_PAGE_SIZE - (gva & ~VMK_PAGE_MASK)) / size, room;
	struct vmk_segment s;

	if ((vcpu->rflags & RFLAGS_DF) != 0)
		return (1);
	if (n > count)
		n = count;
	if (vmk_code_bits(vcpu) != 64) {
		vmk_arch->get_seg(vcpu, seg, &s);
		/* Expand-down segments and offset wrap go one by one. */
		room = s.limit >= off ? (s.limit - off + 1) / size : 1;
		if (n > room)
			n = room;
	}
	if (n > (0x10000 - (off & 0xffff)) / size)
		n = (0x10000 - (off & 0xffff)) / size;
	return (n == 0 ? 1 : (uint32_t)n);
}

/* The guest pages under one batch; two when a single element crosses. */
static enum translated
string_copy(struct vmk_vcpu *vcpu, uint64_t gva, size_t len, bool to_guest)
{
	uint8_t *buf = pio_page(vcpu);
	enum translated tr;
	uint64_t gpa[2];
	size_t n, n0;
	int error;

	n = VMK_PAGE_SIZE - (gva & ~VMK_PAGE_MASK);
	n0 = len < n ? len : n;
	tr = translate(vcpu, gva, to_guest, &gpa[0]);
	if (tr == TR_OK && n0 < len)
		tr = translate(vcpu, gva + n0, to_guest, &gpa[1]);
	if (tr != TR_OK)
		return (tr);
	error = to_guest ? vmk_gpa_write(vcpu->vm, gpa[0], buf, n0) :
	    vmk_gpa_read(vcpu->vm, gpa[0], buf, n0);
	if (error == 0 && n0 < len)
		error = to_guest ?
		    vmk_gpa_write(vcpu->vm, gpa[1], buf + n0, len - n0) :
		    vmk_gpa_read(vcpu->vm, gpa[1], buf + n0, len - n0);
	return (error == 0 ? TR_OK : TR_LOST);
}

static enum vmk_next
string_fault(struct vmk_vcpu *vcpu, enum translated tr)
{
	vcpu->em.pending = VMK_PEND_NONE;
	return (tr == TR_FAULT ? VMK_RUN_AGAIN : emul_lost(vcpu));
}

static enum vmk_next
emul_string_io(struct vmk_vcpu *vcpu, uint16_t port, unsigned int size,
    bool in)
{
	struct vmk_emul *em = &vcpu->em;
	struct vmk_insn *insn = &em->insn;
	uint64_t m, count, off, gva, gpa;
	enum translated tr;
	enum vmk_next next;
	enum vmk_seg seg;
	uint32_t n, v = 0;

	if (!fetch_decode(vcpu, insn, &next))
		return (next);
	if (insn->op != (in ? VMK_OP_INS : VMK_OP_OUTS) ||
	    insn->memsize != size)
		return (emul_lost(vcpu));
	m = size_mask(insn->addrsize);
	count = insn->rep ? vcpu->gpr[VMK_RCX] & m : 1;
	if (count == 0) {
		vmk_advance(vcpu, em->next_rip);
		return (VMK_RUN_AGAIN);
	}
	seg = in ? VMK_ES : (enum vmk_seg)insn->seg;
	off = vcpu->gpr[in ? VMK_RDI : VMK_RSI] & m;
	if (!linear(vcpu, seg, off, size, in, &gva))
		return (VMK_RUN_AGAIN);
	n = string_batch(vcpu, seg, off, gva, size, count);
	if (in) {
		/* Fault before the device is asked, not after. */
		tr = translate(vcpu, gva, true, &gpa);
		if (tr != TR_OK)
			return (string_fault(vcpu, tr));
		if (vcpu->lapic != NULL &&
		    vmk_irqchip_pio(vcpu, port, size, &v, false)) {
			memcpy(pio_page(vcpu), &v, size);
			tr = string_copy(vcpu, gva, size, true);
			if (tr != TR_OK)
				return (string_fault(vcpu, tr));
			string_commit(vcpu, 1);
			return (VMK_RUN_AGAIN);
		}
		em->pending = VMK_PEND_INS;
		return (pio_exit(vcpu, port, size, true, n));
	}
	tr = string_copy(vcpu, gva, (size_t)n * size, false);
	if (tr != TR_OK)
		return (string_fault(vcpu, tr));
	memcpy(&v, pio_page(vcpu), size);
	if (vcpu->lapic != NULL &&
	    vmk_irqchip_pio(vcpu, port, size, &v, true)) {
		string_commit(vcpu, 1);
		return (VMK_RUN_AGAIN);
	}
	string_commit(vcpu, n);
	return (pio_exit(vcpu, port, size, false, n));
}

enum vmk_next
vmk_emul_io(struct vmk_vcpu *vcpu, uint16_t port, unsigned int size, bool in,
    bool string, uint64_t next_rip)
{
	struct vmk_emul *em = &vcpu->em;
	uint32_t v = 0;

	if (string)
		return (emul_string_io(vcpu, port, size, in));
	em->next_rip = next_rip;
	if (in) {
		if (vcpu->lapic != NULL &&
		    vmk_irqchip_pio(vcpu, port, size, &v, false)) {
			gpr_write(vcpu, VMK_RAX, false, size, v);
			vmk_advance(vcpu, next_rip);
			return (VMK_RUN_AGAIN);
		}
		em->pending = VMK_PEND_PIO_IN;
		return (pio_exit(vcpu, port, size, true, 1));
	}
	v = (uint32_t)(vcpu->gpr[VMK_RAX] & size_mask(size));
	vmk_advance(vcpu, next_rip);
	if ((vcpu->lapic != NULL &&
	    vmk_irqchip_pio(vcpu, port, size, &v, true)) ||
	    vmk_io_write(vcpu->vm, true, port, size, v))
		return (VMK_RUN_AGAIN);
	memcpy(pio_page(vcpu), &v, size);
	return (pio_exit(vcpu, port, size, false, 1));
}

/* ---- after user space -------------------------------------------------- */

static enum vmk_next
resume_ins(struct vmk_vcpu *vcpu)
{
	struct vmk_emul *em = &vcpu->em;
	enum translated tr;
	uint64_t gva;

	em->pending = VMK_PEND_NONE;
	if (!linear(vcpu, VMK_ES, vcpu->gpr[VMK_RDI] &
	    size_mask(em->insn.addrsize), em->size, true, &gva))
		return (VMK_RUN_AGAIN);
	tr = string_copy(vcpu, gva, (size_t)em->count * em->size, true);
	if (tr != TR_OK)
		return (string_fault(vcpu, tr));
	string_commit(vcpu, em->count);
	return (VMK_RUN_AGAIN);
}

enum vmk_next
vmk_emul_resume(struct vmk_vcpu *vcpu)
{
	struct vmk_emul *em = &vcpu->em;
	enum vmk_pending what = em->pending;
	uint32_t v = 0;

	em->pending = VMK_PEND_NONE;
	if (what == VMK_PEND_NONE || em->rip != vcpu->rip)
		return (VMK_RUN_AGAIN);
	switch (what) {
	case VMK_PEND_PIO_IN:
		memcpy(&v, pio_page(vcpu), em->size);
		gpr_write(vcpu, VMK_RAX, false, em->size, v);
		vmk_advance(vcpu, em->next_rip);
		return (VMK_RUN_AGAIN);
	case VMK_PEND_INS:
		return (resume_ins(vcpu));
	case VMK_PEND_MMIO_READ:
		memcpy(em->data + (em->cur > 0 ? em->frag[0].len : 0),
		    vcpu->run->mmio.data, em->frag[em->cur].len);
		em->cur++;
		return (emul_read(vcpu));
	case VMK_PEND_MMIO_WRITE:
		return (emul_write(vcpu));
	default:
		return (VMK_RUN_AGAIN);
	}
}

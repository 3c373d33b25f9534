/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_decode.c: instruction decoder.
 *
 * Theory.  The processor tells us that an access failed, not which one.  With
 * nested paging the faulting instruction has to be read again to learn what
 * a device register was to be written with, or where the value that it
 * returns belongs.  Device drivers use a handful of encodings for that: the
 * moves, the string instructions and the arithmetic forms with a memory
 * operand.  Exactly these are decoded, with every prefix, addressing form and
 * operand size that the architecture allows them (SDM volume 2, chapter 2 and
 * appendix A).  Everything else is refused and goes to the VMM together
 * with its bytes (KVM_EXIT_INTERNAL_ERROR), where a complete processor model
 * executes it.  A kernel is a bad place for a large decoder: CVE-2014-0049,
 * CVE-2014-3647, CVE-2017-2583.
 *
 * The decoder also gives the length of the instructions that the world switch
 * intercepts, for processors that do not report the next RIP.
 *
 * Input is at most 15 bytes that were copied once; reads are bounded by n.
 */
#include "vmk_decode.h"
#include "vmk_vm.h"

struct cursor {
	const uint8_t	*p;
	unsigned int	 n, pos;
	bool		 over;		/* ran out of bytes */
};

static uint8_t
next8(struct cursor *c)
{
	if (c->pos >= c->n) {
		c->over = true;
		return (0);
	}
	return (c->p[c->pos++]);
}

static uint64_t
next_n(struct cursor *c, unsigned int size)
{
	uint64_t v = 0;
	unsigned int i;

	for (i = 0; i < size; i++)
		v |= (uint64_t)next8(c) << (8 * i);
	return (v);
}

int64_t
vmk_sign_extend(uint64_t v, unsigned int size)
{
	unsigned int shift = 64 - 8 * size;

	return ((int64_t)(v << shift) >> shift);
}

static uint64_t
immediate(struct cursor *c, unsigned int size)
{
	return ((uint64_t)vmk_sign_extend(next_n(c, size), size));
}

/* Prefixes, collected before the opcode. */
struct prefix {
	bool	opsize, addrsize, rep, lock;
	uint8_t	rex;
	int	seg;		/* -1: none */
};

static const uint8_t rm16_base[8] = { VMK_RBX, VMK_RBX, VMK_RBP, VMK_RBP,
	VMK_RSI, VMK_RDI, VMK_RBP, VMK_RBX };
static const uint8_t rm16_index[8] = { VMK_RSI, VMK_RDI, VMK_RSI, VMK_RDI,
	VMK_NOREG, VMK_NOREG, VMK_NOREG, VMK_NOREG };

/*
 * ModRM, SIB and displacement: SDM 2A tables 2-1 to 2-3, with REX 2.2.1.
 * The default segment is SS when the base is BP or SP, else DS.
 */
static void
modrm(struct cursor *c, const struct prefix *pf, unsigned int bits,
    struct vmk_insn *in)
{
	uint8_t b = next8(c);
	unsigned int mod = b >> 6, rm = b & 7;
	bool stack = false;

	in->reg = (uint8_t)(((b >> 3) & 7) | ((pf->rex & 4) << 1));
	in->base = in->index = VMK_NOREG;
	in->scale = 0;
	if (mod == 3) {
		in->mem = false;
		in->rm = (uint8_t)(rm | ((pf->rex & 1) << 3));
		return;
	}
	in->mem = true;
	if (in->addrsize == 2) {
		if (mod == 0 && rm == 6) {
			in->disp = vmk_sign_extend(next_n(c, 2), 2);
		} else {
			in->base = rm16_base[rm];
			in->index = rm16_index[rm];
			stack = in->base == VMK_RBP;
			if (mod == 1)
				in->disp = vmk_sign_extend(next8(c), 1);
			else if (mod == 2)
				in->disp = vmk_sign_extend(next_n(c, 2), 2);
		}
	} else {
		unsigned int base = rm;

		if (rm == 4) {
			uint8_t sib = next8(c);
			unsigned int idx = ((sib >> 3) & 7) |
			    ((pf->rex & 2U) << 2);

			base = sib & 7;
			if (idx != 4) {
				in->index = (uint8_t)idx;
				in->scale = sib >> 6;
			}
		}
		if (mod == 0 && base == 5) {
			in->disp = vmk_sign_extend(next_n(c, 4), 4);
			in->riprel = rm == 5 && bits == 64;
		} else {
			in->base = (uint8_t)(base | ((pf->rex & 1) << 3));
			stack = in->base == VMK_RSP || in->base == VMK_RBP;
			if (mod == 1)
				in->disp = vmk_sign_extend(next8(c), 1);
			else if (mod == 2)
				in->disp = vmk_sign_extend(next_n(c, 4), 4);
		}
	}
	if (pf->seg < 0 && stack)
		in->seg = VMK_SSEG;
}

/* Without REX, byte registers 4-7 are AH, CH, DH and BH. */
static void
byte_reg(const struct prefix *pf, struct vmk_insn *in)
{
	if (pf->rex == 0 && in->reg >= 4 && in->reg < 8) {
		in->reg -= 4;
		in->high8 = true;
	}
}

static int
two_byte(struct cursor *c, const struct prefix *pf, unsigned int bits,
    struct vmk_insn *in)
{
	uint8_t op = next8(c), b;

	switch (op) {
	case 0x01:
		b = c->pos < c->n ? c->p[c->pos] : 0;
		if (b >= 0xc0 && ((b >> 3) & 7) != 6 && ((b >> 3) & 7) != 4) {
			/* VMCALL, MONITOR, XSETBV, VMRUN..., RDTSCP */
			next8(c);
			in->op = VMK_OP_OTHER;
			return (0);
		}
		modrm(c, pf, bits, in);
		if ((in->reg & 7) != 6)
			return (VMK_EINVAL);
		in->op = VMK_OP_LMSW;
		in->memsize = 2;
		return (0);
	case 0x06:
		in->op = VMK_OP_CLTS;
		return (0);
	case 0x08: case 0x09:			/* INVD, WBINVD */
	case 0x30: case 0x31: case 0x32: case 0x33:	/* MSR, TSC, PMC */
	case 0xa2:				/* CPUID */
		in->op = VMK_OP_OTHER;
		return (0);
	case 0x22:
		/* MOV to CR ignores mod; LOCK gives CR8 outside long mode. */
		b = next8(c);
		in->reg = (uint8_t)(((b >> 3) & 7) | ((pf->rex & 4) << 1));
		if (pf->lock)
			in->reg |= 8;
		in->rm = (uint8_t)((b & 7) | ((pf->rex & 1) << 3));
		in->op = VMK_OP_MOV_TO_CR;
		return (0);
	case 0xb6: case 0xb7: case 0xbe: case 0xbf:
		modrm(c, pf, bits, in);
		in->memsize = (op & 1) != 0 ? 2 : 1;
		in->op = op < 0xb8 ? VMK_OP_MOVZX : VMK_OP_MOVSX;
		return (0);
	case 0xba:
		modrm(c, pf, bits, in);
		if ((in->reg & 7) < 4)
			return (VMK_EINVAL);
		in->alu = (in->reg & 7) - 4;
		in->memsize = in->opsize;
		in->imm = next8(c);
		in->op = VMK_OP_BIT_IMM;
		return (0);
	case 0xc3:				/* MOVNTI */
		modrm(c, pf, bits, in);
		if (!in->mem || pf->opsize || pf->rep)
			return (VMK_EINVAL);
		/* Never 16 bits, not in 16-bit code either. */
		in->opsize = in->opsize == 8 ? 8 : 4;
		in->memsize = in->opsize;
		in->op = VMK_OP_MOV_STORE;
		return (0);
	default:
		return (VMK_EINVAL);
	}
}

static int
one_byte(struct cursor *c, const struct prefix *pf, unsigned int bits,
    uint8_t op, struct vmk_insn *in)
{
	bool byte = (op & 1) == 0;
	unsigned int immsize;

	if (byte)
		in->memsize = in->opsize = 1;
	in->memsize = in->opsize;
	immsize = in->opsize == 8 ? 4 : in->opsize;

	/* 00-3B: eight operations, four r/m forms each. */
	if (op < 0x40 && (op & 7) < 4) {
		modrm(c, pf, bits, in);
		in->alu = op >> 3;
		in->op = (op & 2) != 0 ? VMK_OP_ALU_LOAD : VMK_OP_ALU_STORE;
		if (byte)
			byte_reg(pf, in);
		return (0);
	}
	switch (op) {
	case 0x63:				/* MOVSXD */
		if (bits != 64)
			return (VMK_EINVAL);
		in->opsize = (pf->rex & 8) != 0 ? 8 : pf->opsize ? 2 : 4;
		modrm(c, pf, bits, in);
		in->memsize = in->opsize == 2 ? 2 : 4;
		in->op = VMK_OP_MOVSX;
		return (0);
	case 0x6c: case 0x6d: case 0x6e: case 0x6f:
		if (in->opsize == 8)
			in->opsize = in->memsize = 4;
		in->op = op < 0x6e ? VMK_OP_INS : VMK_OP_OUTS;
		in->mem = true;
		return (0);
	case 0x80: case 0x81: case 0x83:
		modrm(c, pf, bits, in);
		in->alu = in->reg & 7;
		if (op == 0x83)
			immsize = 1;
		in->imm = immediate(c, immsize);
		in->op = VMK_OP_ALU_IMM;
		return (0);
	case 0x84: case 0x85: case 0x86: case 0x87:
	case 0x88: case 0x89: case 0x8a: case 0x8b:
		modrm(c, pf, bits, in);
		if (byte)
			byte_reg(pf, in);
		in->op = op < 0x86 ? VMK_OP_TEST : op < 0x88 ? VMK_OP_XCHG :
		    op < 0x8a ? VMK_OP_MOV_STORE : VMK_OP_MOV_LOAD;
		return (0);
	case 0x90:				/* with F3: PAUSE */
		in->op = VMK_OP_OTHER;
		return (0);
	case 0xa0: case 0xa1: case 0xa2: case 0xa3:	/* moffs */
		in->base = in->index = VMK_NOREG;
		in->disp = (int64_t)next_n(c, in->addrsize);
		in->reg = VMK_RAX;
		in->mem = true;
		in->op = op < 0xa2 ? VMK_OP_MOV_LOAD : VMK_OP_MOV_STORE;
		return (0);
	case 0xa4: case 0xa5:
		in->op = VMK_OP_MOVS;
		in->mem = true;
		return (0);
	case 0xaa: case 0xab:
		in->op = VMK_OP_STOS;
		in->mem = true;
		return (0);
	case 0xac: case 0xad:
		in->op = VMK_OP_LODS;
		in->mem = true;
		return (0);
	case 0xc6: case 0xc7:
		modrm(c, pf, bits, in);
		if ((in->reg & 7) != 0)
			return (VMK_EINVAL);
		in->imm = immediate(c, immsize);
		in->op = VMK_OP_MOV_IMM;
		return (0);
	case 0xe4: case 0xe5: case 0xe6: case 0xe7:
		next8(c);
		in->op = VMK_OP_OTHER;
		return (0);
	case 0xcc: case 0xec: case 0xed: case 0xee: case 0xef: case 0xf4:
		in->op = VMK_OP_OTHER;
		return (0);
	case 0xf6: case 0xf7:
		modrm(c, pf, bits, in);
		switch (in->reg & 7) {
		case 0: case 1:
			in->imm = immediate(c, immsize);
			in->op = VMK_OP_TEST_IMM;
			return (0);
		case 2:
			in->alu = VMK_XOR;
			in->imm = ~0ULL;
			in->op = VMK_OP_NOT;
			return (0);
		case 3:
			in->op = VMK_OP_NEG;
			return (0);
		default:
			return (VMK_EINVAL);
		}
	case 0xfe: case 0xff:
		modrm(c, pf, bits, in);
		if ((in->reg & 7) > 1)
			return (VMK_EINVAL);
		in->alu = (in->reg & 7) == 0 ? VMK_ADD : VMK_SUB;
		in->imm = 1;
		in->op = (in->reg & 7) == 0 ? VMK_OP_INC : VMK_OP_DEC;
		return (0);
	default:
		return (VMK_EINVAL);
	}
}

int
vmk_decode(const uint8_t *bytes, unsigned int n, unsigned int bits,
    struct vmk_insn *in)
{
	struct cursor c = { .p = bytes };
	struct prefix pf = { .seg = -1 };
	uint8_t op;
	int error;

	memset(in, 0, sizeof(*in));
	c.n = n > VMK_INSN_MAX ? VMK_INSN_MAX : n;
	for (;;) {
		op = next8(&c);
		if (c.over)
			break;
		if (bits == 64 && (op & 0xf0) == 0x40) {
			/* REX counts only right before the opcode. */
			pf.rex = op;
			continue;
		}
		if (op == 0x66)
			pf.opsize = true;
		else if (op == 0x67)
			pf.addrsize = true;
		else if (op == 0xf0)
			pf.lock = true;
		else if (op == 0xf2 || op == 0xf3)
			pf.rep = true;
		else if (op == 0x26 || op == 0x2e || op == 0x36 || op == 0x3e)
			pf.seg = bits == 64 ? pf.seg : (op >> 3) & 3;
		else if (op == 0x64 || op == 0x65)
			pf.seg = op & 7;
		else
			break;
		pf.rex = 0;
	}
	/* ES CS SS DS are 0-3 and FS GS 4-5 both here and in enum vmk_seg. */
	in->seg = pf.seg < 0 ? VMK_DS : (uint8_t)pf.seg;
	in->rep = pf.rep;
	in->lock = pf.lock;
	in->base = in->index = VMK_NOREG;
	if (bits == 64) {
		in->opsize = (pf.rex & 8) != 0 ? 8 : pf.opsize ? 2 : 4;
		in->addrsize = pf.addrsize ? 4 : 8;
	} else {
		in->opsize = (bits == 32) != pf.opsize ? 4 : 2;
		in->addrsize = (bits == 32) != pf.addrsize ? 4 : 2;
	}
	in->memsize = in->opsize;
	if (op == 0x0f)
		error = two_byte(&c, &pf, bits, in);
	else
		error = one_byte(&c, &pf, bits, op, in);
	if (c.over)
		return (n >= VMK_INSN_MAX ? VMK_EINVAL : VMK_ENOSPC);
	in->len = (uint8_t)c.pos;
	return (error);
}

/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_decode.h: the instruction subset that the module understands.
 */
#ifndef VMK_DECODE_H
#define	VMK_DECODE_H

#include "vmk_types.h"

#define	VMK_INSN_MAX	15

enum vmk_op {
	VMK_OP_OTHER,		/* length known, no memory operand of ours */
	VMK_OP_MOV_STORE,	/* r/m <- reg */
	VMK_OP_MOV_LOAD,	/* reg <- r/m */
	VMK_OP_MOV_IMM,		/* r/m <- imm */
	VMK_OP_MOVZX,
	VMK_OP_MOVSX,
	VMK_OP_STOS,
	VMK_OP_MOVS,
	VMK_OP_LODS,
	VMK_OP_INS,
	VMK_OP_OUTS,
	VMK_OP_ALU_STORE,	/* r/m <- r/m op reg */
	VMK_OP_ALU_LOAD,	/* reg <- reg op r/m */
	VMK_OP_ALU_IMM,		/* r/m <- r/m op imm */
	VMK_OP_TEST,		/* r/m & reg */
	VMK_OP_TEST_IMM,
	VMK_OP_XCHG,
	VMK_OP_NOT,
	VMK_OP_NEG,
	VMK_OP_INC,
	VMK_OP_DEC,
	VMK_OP_BIT_IMM,		/* BT BTS BTR BTC r/m, imm8: alu 0-3 */
	VMK_OP_MOV_TO_CR,
	VMK_OP_LMSW,
	VMK_OP_CLTS
};

/* ALU operations in the encoding of opcode bits 5-3. */
enum vmk_alu { VMK_ADD, VMK_OR, VMK_ADC, VMK_SBB, VMK_AND, VMK_SUB, VMK_XOR,
	VMK_CMP };

#define	VMK_NOREG	0xffU

struct vmk_insn {
	uint8_t		len;
	uint8_t		op;		/* enum vmk_op */
	uint8_t		alu;
	uint8_t		memsize;	/* bytes of the memory operand */
	uint8_t		opsize;		/* bytes of the register operand */
	uint8_t		addrsize;	/* 2, 4 or 8 */
	bool		rep;		/* F3 or F2 before a string op */
	bool		lock;
	bool		mem;		/* the r/m operand is in memory */
	bool		high8;		/* reg is AH, CH, DH or BH */
	bool		riprel;
	uint8_t		reg;		/* register operand; CR number */
	uint8_t		rm;		/* register r/m when !mem */
	uint8_t		seg;		/* enum vmk_seg */
	uint8_t		base, index, scale;	/* VMK_NOREG: absent */
	int64_t		disp;
	uint64_t	imm;		/* sign-extended to opsize */
};

/*
 * Decode one instruction from n bytes for a 16-, 32- or 64-bit code segment.
 * 0, or VMK_ENOSPC: it goes on after byte n; VMK_EINVAL: not in the subset.
 * Pure; touches nothing but *insn.
 */
int	vmk_decode(const uint8_t *bytes, unsigned int n, unsigned int bits,
	    struct vmk_insn *insn);

int64_t	vmk_sign_extend(uint64_t v, unsigned int size);

#endif /* !VMK_DECODE_H */

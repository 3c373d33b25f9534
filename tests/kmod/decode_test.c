/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * decode_test.c: the decoder against binutils' view of the same bytes.
 *
 * Byte strings are generated (every opcode of one and two bytes with random
 * prefixes and operands), those that the decoder accepts are written out, each
 * followed by NOPs up to 32 bytes, and disassembled by objdump.  The length
 * and the mnemonic must agree.
 */
#include <stdlib.h>
#include <string.h>

#include "decode_samples.h"
#include "tap.h"
#include "vmk_decode.h"
#include "vmk_vm.h"

#define	SLOT	32
#define	MANY	40000

struct sample {
	uint8_t		bytes[VMK_INSN_MAX];
	struct vmk_insn	in;
};

static struct sample *samples;
static unsigned int nsamples;

/* The mnemonics that an operation may be printed with. */
static const char *
mnemonics(const struct vmk_insn *in)
{
	static const char *alu[] = { "add", "or", "adc", "sbb", "and", "sub",
		"xor", "cmp" };
	static const char *bit[] = { "bt", "bts", "btr", "btc" };

	switch (in->op) {
	case VMK_OP_MOV_STORE:
		return ("mov movabs movnti");
	case VMK_OP_MOV_LOAD: case VMK_OP_MOV_IMM:
		return ("mov movabs");
	case VMK_OP_MOVZX:
		return ("movz");
	case VMK_OP_MOVSX:
		return ("movs");
	case VMK_OP_STOS:
		return ("stos");
	case VMK_OP_MOVS:
		return ("movs");
	case VMK_OP_LODS:
		return ("lods");
	case VMK_OP_INS:
		return ("ins");
	case VMK_OP_OUTS:
		return ("outs");
	case VMK_OP_ALU_STORE: case VMK_OP_ALU_LOAD: case VMK_OP_ALU_IMM:
		return (alu[in->alu]);
	case VMK_OP_TEST: case VMK_OP_TEST_IMM:
		return ("test");
	case VMK_OP_XCHG:
		return ("xchg");
	case VMK_OP_NOT:
		return ("not");
	case VMK_OP_NEG:
		return ("neg");
	case VMK_OP_INC:
		return ("inc");
	case VMK_OP_DEC:
		return ("dec");
	case VMK_OP_BIT_IMM:
		return (bit[in->alu]);
	case VMK_OP_MOV_TO_CR:
		return ("mov");
	case VMK_OP_LMSW:
		return ("lmsw");
	case VMK_OP_CLTS:
		return ("clts");
	default:
		return ("");
	}
}

static bool
name_agrees(const char *text, const struct vmk_insn *in)
{
	char list[64], *save = NULL, *w;

	if (in->op == VMK_OP_OTHER)
		return (true);
	snprintf(list, sizeof(list), "%s", mnemonics(in));
	for (w = strtok_r(list, " ", &save); w != NULL;
	    w = strtok_r(NULL, " ", &save)) {
		const char *p = strstr(text, w);

		/* At the start of a word: prefixes are printed before. */
		if (p != NULL && (p == text || p[-1] == ' ' || p[-1] == '\t'))
			return (true);
	}
	return (false);
}

/*
 * A REX prefix that another prefix follows has no effect; objdump prints it
 * as an instruction of its own.
 */
static bool
idle_rex(const uint8_t *b)
{
	static const uint8_t prefixes[] = { 0x66, 0x67, 0xf0, 0xf2, 0xf3,
		0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65 };
	unsigned int i;

	for (i = 0; i < VMK_INSN_MAX - 1; i++) {
		if ((b[i] & 0xf0) == 0x40 && ((b[i + 1] & 0xf0) == 0x40 ||
		    memchr(prefixes, b[i + 1], sizeof(prefixes)) != NULL))
			return (true);
		if ((b[i] & 0xf0) != 0x40 &&
		    memchr(prefixes, b[i], sizeof(prefixes)) == NULL)
			return (false);
	}
	return (false);
}

static void
against_objdump(unsigned int bits)
{
	static const char *machine[] = { "i8086", "i386", "i386:x86-64" };
	char path[] = "/tmp/vmk-decode-XXXXXX", cmd[160], line[512];
	unsigned int i, cur = ~0U, wrong = 0, seen = 0;
	uint8_t b[VMK_INSN_MAX], slot[SLOT];
	struct vmk_insn in;
	FILE *f;
	int fd;

	nsamples = 0;
	for (i = 0; i < MANY * 20 && nsamples < MANY; i++) {
		generate(b);
		if (vmk_decode(b, VMK_INSN_MAX, bits, &in) != 0 ||
		    (bits == 64 && idle_rex(b)))
			continue;
		memcpy(samples[nsamples].bytes, b, sizeof(b));
		samples[nsamples++].in = in;
	}
	fd = mkstemp(path);
	f = fd < 0 ? NULL : fdopen(fd, "wb");
	if (f == NULL) {
		CHECK(f != NULL);
		return;
	}
	for (i = 0; i < nsamples; i++) {
		memset(slot, 0x90, sizeof(slot));
		memcpy(slot, samples[i].bytes, samples[i].in.len);
		fwrite(slot, 1, sizeof(slot), f);
	}
	fclose(f);
	snprintf(cmd, sizeof(cmd), "objdump -D -w --no-show-raw-insn "
	    "-b binary -m %s %s",
	    bits == 16 ? machine[0] : bits == 32 ? machine[1] : machine[2],
	    path);
	f = popen(cmd, "r");
	while (f != NULL && fgets(line, sizeof(line), f) != NULL) {
		char *text = strchr(line, ':');
		unsigned long at = strtoul(line, NULL, 16);

		if (text == NULL || line[0] != ' ')
			continue;
		if (cur != ~0U && cur < nsamples) {
			/* The line after a sample tells its length. */
			if (at - (unsigned long)cur * SLOT !=
			    samples[cur].in.len && wrong++ < 10)
				printf("# %u-bit sample %u: length %u, objdump"
				    " %lu\n", bits, cur, samples[cur].in.len,
				    at - (unsigned long)cur * SLOT);
			cur = ~0U;
		}
		if (at % SLOT != 0 || at / SLOT >= nsamples)
			continue;
		cur = (unsigned int)(at / SLOT);
		seen++;
		if (!name_agrees(text + 2, &samples[cur].in) && wrong++ < 10)
			printf("# %u-bit sample %u: op %u alu %u, objdump%s",
			    bits, cur, samples[cur].in.op, samples[cur].in.alu,
			    text);
		if (strstr(text, "(bad)") != NULL)
			cur = ~0U;
	}
	if (f != NULL)
		pclose(f);
	remove(path);
	printf("# %u-bit: %u instructions compared\n", bits, seen);
	CHECK_EQ(wrong, 0);
	CHECK(seen > nsamples * 9 / 10 && nsamples > MANY / 10);
}

/* Never a read past n, and a truncated instruction asks for more. */
static void
truncation(void)
{
	uint8_t b[VMK_INSN_MAX];
	struct vmk_insn in, part;
	unsigned int i, n;

	for (i = 0; i < 200000; i++) {
		uint8_t *exact;

		generate(b);
		if (vmk_decode(b, VMK_INSN_MAX, 64, &in) != 0)
			continue;
		n = rnd() % in.len;
		exact = malloc(n + 1);
		memcpy(exact, b, n);
		if (vmk_decode(exact, n, 64, &part) != VMK_ENOSPC)
			CHECK(vmk_decode(exact, n, 64, &part) == VMK_ENOSPC);
		free(exact);
		CHECK_EQ(vmk_decode(b, in.len, 64, &part), 0);
		CHECK_EQ(part.len, in.len);
	}
}

static void
operands(void)
{
	static const struct {
		unsigned int bits;
		uint8_t b[12];
		struct vmk_insn w;
	} t[] = {
		/* mov %ecx, 0x10(%rax,%rbx,4) */
		{ 64, { 0x89, 0x4c, 0x98, 0x10 }, { .len = 4,
		    .op = VMK_OP_MOV_STORE, .memsize = 4, .reg = VMK_RCX,
		    .base = VMK_RAX, .index = VMK_RBX, .scale = 2,
		    .disp = 0x10, .seg = VMK_DS } },
		/* mov %ah, -1(%rbp): SS by default, high byte */
		{ 64, { 0x88, 0x65, 0xff }, { .len = 3,
		    .op = VMK_OP_MOV_STORE, .memsize = 1, .reg = VMK_RAX,
		    .high8 = true, .base = VMK_RBP, .index = VMK_NOREG,
		    .disp = -1, .seg = VMK_SSEG } },
		/* with REX the same is SPL, R13 */
		{ 64, { 0x41, 0x88, 0x65, 0xff }, { .len = 4,
		    .op = VMK_OP_MOV_STORE, .memsize = 1, .reg = VMK_RSP,
		    .base = VMK_R13, .index = VMK_NOREG, .disp = -1,
		    .seg = VMK_DS } },
		/* movl $0xffffffff, 0x12345678(%rip): sign-extended later */
		{ 64, { 0xc7, 0x05, 0x78, 0x56, 0x34, 0x12, 0xff, 0xff, 0xff,
		    0xff }, { .len = 10, .op = VMK_OP_MOV_IMM, .memsize = 4,
		    .base = VMK_NOREG, .index = VMK_NOREG, .riprel = true,
		    .disp = 0x12345678, .imm = ~0ULL, .seg = VMK_DS } },
		/* 16-bit: mov [bp+si], al */
		{ 16, { 0x88, 0x02 }, { .len = 2, .op = VMK_OP_MOV_STORE,
		    .memsize = 1, .reg = VMK_RAX, .base = VMK_RBP,
		    .index = VMK_RSI, .seg = VMK_SSEG } },
		/* movabs al, moffs64 with FS */
		{ 64, { 0x64, 0xa0, 8, 7, 6, 5, 4, 3, 2, 1 }, { .len = 10,
		    .op = VMK_OP_MOV_LOAD, .memsize = 1, .reg = VMK_RAX,
		    .base = VMK_NOREG, .index = VMK_NOREG,
		    .disp = 0x0102030405060708, .seg = VMK_FS } },
		/* movzwl (%rdi), %r9d */
		{ 64, { 0x44, 0x0f, 0xb7, 0x0f }, { .len = 4,
		    .op = VMK_OP_MOVZX, .memsize = 2, .reg = VMK_R9,
		    .base = VMK_RDI, .index = VMK_NOREG, .seg = VMK_DS } },
	};
	struct vmk_insn in;
	unsigned int i;

	for (i = 0; i < VMK_ARRAY_LEN(t); i++) {
		CHECK_EQ(vmk_decode(t[i].b, sizeof(t[i].b), t[i].bits, &in), 0);
		CHECK_EQ(in.len, t[i].w.len);
		CHECK_EQ(in.op, t[i].w.op);
		CHECK_EQ(in.memsize, t[i].w.memsize);
		if (in.op != VMK_OP_MOV_IMM)
			CHECK_EQ(in.reg, t[i].w.reg);
		CHECK_EQ(in.high8, t[i].w.high8);
		CHECK_EQ(in.base, t[i].w.base);
		CHECK_EQ(in.index, t[i].w.index);
		CHECK_EQ(in.scale, t[i].w.scale);
		CHECK_EQ(in.disp, t[i].w.disp);
		CHECK_EQ(in.riprel, t[i].w.riprel);
		CHECK_EQ(in.imm, t[i].w.imm);
		CHECK_EQ(in.seg, t[i].w.seg);
	}
}

/* Everything else is refused, so that it reaches the VMM. */
static void
refused(void)
{
	static const uint8_t t[][8] = {
		{ 0x0f, 0xae, 0x00 },		/* fxsave */
		{ 0x0f, 0xc7, 0x08 },		/* cmpxchg8b */
		{ 0x0f, 0xb1, 0x08 },		/* cmpxchg */
		{ 0x0f, 0x11, 0x00 },		/* movups */
		{ 0xc5, 0xf8, 0x10, 0x00 },	/* vmovups */
		{ 0xd9, 0x00 },			/* fld */
		{ 0xff, 0x10 },			/* call *(%rax) */
		{ 0xff, 0x30 },			/* push (%rax) */
		{ 0x8f, 0x00 },			/* pop (%rax) */
		{ 0xf7, 0x20 },			/* mul */
		{ 0xcf },			/* iret */
		{ 0x9a },			/* far call */
	};
	struct vmk_insn in;
	unsigned int i;

	for (i = 0; i < VMK_ARRAY_LEN(t); i++)
		CHECK_EQ(vmk_decode(t[i], sizeof(t[i]), 64, &in), VMK_EINVAL);
}

/* vmk_alu() against the processor's own instructions. */
#define	RUN_ALU(insn, type)						\
	__asm__ __volatile__(						\
	    "pushq %4\n\tpopfq\n\t" insn " %3, %0\n\tpushfq\n\tpopq %1"	\
	    : "=r"(r), "=&r"(f) : "0"((type)a), "r"((type)b), "r"(fl)	\
	    : "cc")

#define	ALU_SIZE(type, size)						\
	do {								\
		type r;							\
									\
		switch (op) {						\
		case VMK_ADD: RUN_ALU("add", type); break;		\
		case VMK_OR: RUN_ALU("or", type); break;		\
		case VMK_ADC: RUN_ALU("adc", type); break;		\
		case VMK_SBB: RUN_ALU("sbb", type); break;		\
		case VMK_AND: RUN_ALU("and", type); break;		\
		case VMK_SUB: RUN_ALU("sub", type); break;		\
		case VMK_XOR: RUN_ALU("xor", type); break;		\
		default: RUN_ALU("cmp", type); r = (type)(a - b); break; \
		}							\
		ours = vmk_alu(op, a, b, size, &of);			\
		/* AF is undefined after logic. */			\
		keep = op == VMK_OR || op == VMK_AND || op == VMK_XOR ?	\
		    0x8c5 : 0x8d5;					\
		if ((type)ours != r || ((of ^ f) & keep) != 0)		\
			wrong++;					\
	} while (0)

static void
arithmetic(void)
{
	static const uint64_t edge[] = { 0, 1, 0x7f, 0x80, 0xff, 0x7fff,
		0x8000, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff,
		0x7fffffffffffffff, 0x8000000000000000, ~0ULL };
	uint64_t a, b, f, fl, of, ours, keep;
	unsigned int i, op, wrong = 0;

	for (i = 0; i < 400000; i++) {
		a = (uint64_t)rnd() << 32 | rnd();
		b = (uint64_t)rnd() << 32 | rnd();
		if (rnd() % 4 == 0)
			a = edge[rnd() % VMK_ARRAY_LEN(edge)];
		if (rnd() % 4 == 0)
			b = edge[rnd() % VMK_ARRAY_LEN(edge)];
		op = rnd() % 8;
		fl = of = 0x202 | (rnd() & 1);
		switch (rnd() % 4) {
		case 0:
			ALU_SIZE(uint8_t, 1);
			break;
		case 1:
			ALU_SIZE(uint16_t, 2);
			break;
		case 2:
			ALU_SIZE(uint32_t, 4);
			break;
		default:
			ALU_SIZE(uint64_t, 8);
			break;
		}
	}
	CHECK_EQ(wrong, 0);
}

int
main(void)
{
	samples = calloc(MANY, sizeof(*samples));
	if (samples == NULL)
		return (1);
	operands();
	tap_done("decode: operands of seven encodings");
	refused();
	tap_done("decode: what is not in the subset is refused");
	truncation();
	tap_done("decode: truncated input never reads on");
	if (system("objdump --version >/dev/null 2>&1") == 0) {
		against_objdump(64);
		tap_done("decode: 64-bit code as objdump sees it");
		against_objdump(32);
		tap_done("decode: 32-bit code as objdump sees it");
		against_objdump(16);
		tap_done("decode: 16-bit code as objdump sees it");
	} else {
		printf("ok %d - decode: against objdump # SKIP no binutils\n",
		    ++tap_number);
	}
	arithmetic();
	tap_done("emulate: arithmetic and flags as the processor's");
	free(samples);
	return (tap_failed != 0);
}

/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * decode_samples.h: byte strings that are often instructions: every opcode of
 * one and two bytes with random prefixes and operands.
 */
#ifndef DECODE_SAMPLES_H
#define	DECODE_SAMPLES_H

#include "vmk_decode.h"

static uint64_t seed = 0x243f6a8885a308d3ULL;

static uint32_t
rnd(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return ((uint32_t)(seed >> 16));
}

static unsigned int
generate(uint8_t b[VMK_INSN_MAX])
{
	static const uint8_t prefixes[] = { 0x66, 0x67, 0xf3, 0x2e, 0x36,
		0x3e, 0x26, 0x64, 0x65 };
	unsigned int n = 0, i;

	for (i = rnd() % 3; i > 0; i--)
		b[n++] = prefixes[rnd() % sizeof(prefixes)];
	if (rnd() % 3 == 0)
		b[n++] = 0x40 | (rnd() & 15);
	if (rnd() % 3 == 0)
		b[n++] = 0x0f;
	while (n < VMK_INSN_MAX)
		b[n++] = (uint8_t)rnd();
	return (n);
}

#endif /* !DECODE_SAMPLES_H */

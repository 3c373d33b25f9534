// SPDX-License-Identifier: BSD-2-Clause
/*
 * A program whose state shows whether it was disturbed: integers, a table in memory, SSE and x87 arithmetic, each step a
 * function of all steps before. "counter" prints a line of it for ever, slowly; "counter FILE" recomputes the lines of a
 * file and says how many are right and in order. Used by tests/hosts/l1-cases to move a guest between drivers.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WORDS 4096
#define ROUNDS 2000

static uint64_t table[WORDS];
static uint64_t hash = 1469598103934665603u;
static double wave = 0.3;
static long double slow = 0.7L;

static void step(void)
{
	for (int i = 0; i < ROUNDS; i++) {
		uint64_t *word = &table[(hash >> 20) % WORDS];
		uint64_t bits;

		wave = 3.99 * wave * (1 - wave);
		slow = 3.97L * slow * (1 - slow);
		memcpy(&bits, &wave, sizeof(bits));
		*word += bits ^ (uint64_t)(slow * 1e15L);
		hash = (hash ^ *word) * 1099511628211u;
	}
}

int main(int argc, char **argv)
{
	char line[64], wanted[64];

	if (argc > 1) {
		FILE *file = fopen(argv[1], "r");
		unsigned right = 0;

		if (file == NULL) {
			return 2;
		}
		/* The guest is killed in the end, perhaps in the middle of a line. */
		while (fgets(line, sizeof(line), file) != NULL && strchr(line, '\n') != NULL) {
			line[strcspn(line, "\r\n")] = '\0';
			if (strncmp(line, "count ", 6) != 0) {
				continue;
			}
			step();
			snprintf(wanted, sizeof(wanted), "count %u %016" PRIx64, right + 1, hash);
			if (strcmp(line, wanted) != 0) {
				printf("line %u is '%s', not '%s'\n", right + 1, line, wanted);
				return 1;
			}
			right++;
		}
		printf("%u\n", right);
		return 0;
	}
	for (unsigned n = 1;; n++) {
		step();
		printf("count %u %016" PRIx64 "\n", n, hash);
		fflush(stdout);
		usleep(20000);
	}
}

/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The least that a client of /dev/kvm can do for a port write: the baseline
 * of the exit path.  Reads a number of exits a batch from each line of its
 * input, runs a batch, prints nanoseconds an exit.  See tests/Vmm.Bench.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#define	MEMORY		(64 << 10)
#define	CODE		0x1000

static void
need(int ok, const char *what)
{
	if (!ok) {
		perror(what);
		exit(69);
	}
}

static double
now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return ((double)t.tv_sec * 1e9 + (double)t.tv_nsec);
}

int
main(void)
{
	/* mov ecx, N; next: out 0x11, al; dec ecx; jnz next; out 0x10, al */
	uint8_t code[] = { 0xb9, 0, 0, 0, 0, 0xe6, 0x11, 0xff, 0xc9, 0x75,
	    0xfa, 0xe6, 0x10 };
	struct kvm_userspace_memory_region region = { .memory_size = MEMORY };
	struct kvm_segment flat = { .limit = 0xffffffff, .selector = 8,
	    .type = 3, .present = 1, .db = 1, .s = 1, .g = 1 };
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	struct kvm_run *run;
	uint8_t *memory;
	char line[32];
	int kvm, vm, vcpu, size;

	need((kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC)) >= 0, "/dev/kvm");
	need((vm = ioctl(kvm, KVM_CREATE_VM, 0)) >= 0, "KVM_CREATE_VM");
	(void)ioctl(vm, KVM_SET_TSS_ADDR, 0xfeffd000);
	memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE,
	    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	need(memory != MAP_FAILED, "mmap");
	region.userspace_addr = (uintptr_t)memory;
	need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0,
	    "KVM_SET_USER_MEMORY_REGION");
	need((vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)) >= 0, "KVM_CREATE_VCPU");
	size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	need(size > 0, "KVM_GET_VCPU_MMAP_SIZE");
	run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED,
	    vcpu, 0);
	need(run != MAP_FAILED, "mmap");
	need(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0, "KVM_GET_SREGS");
	sregs.cr0 |= 1;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
	flat.type = 11;
	sregs.cs = flat;
	need(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0, "KVM_SET_SREGS");

	while (fgets(line, sizeof(line), stdin) != NULL) {
		uint32_t exits = (uint32_t)atoi(line), seen = 0;
		double start = 0;

		memcpy(code + 1, &exits, 4);
		memcpy(memory + CODE, code, sizeof(code));
		memset(&regs, 0, sizeof(regs));
		regs.rip = CODE;
		regs.rflags = 2;
		need(ioctl(vcpu, KVM_SET_REGS, &regs) == 0, "KVM_SET_REGS");
		for (;;) {
			need(ioctl(vcpu, KVM_RUN, 0) == 0, "KVM_RUN");
			if (run->exit_reason != KVM_EXIT_IO) {
				fprintf(stderr, "exit %u\n", run->exit_reason);
				return (69);
			}
			if (run->io.port == 0x10)
				break;
			if (seen++ == 0)
				start = now();
		}
		printf("%.1f\n", (now() - start) / seen);
		fflush(stdout);
	}
	return (0);
}

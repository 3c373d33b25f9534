/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Compares every declaration of kvm_abi.h with the host's <linux/kvm.h>.
 * One TAP line a group; a mismatch is printed with both values.
 */
#include <stdio.h>
#include <sys/ioctl.h>
#include <linux/kvm.h>

#include "kvm_abi.h"

static int bad, number, failed;

static void
same(const char *what, unsigned long ours, unsigned long theirs)
{
	if (ours != theirs) {
		printf("# %s: ours %#lx, <linux/kvm.h> %#lx\n", what, ours,
		    theirs);
		bad++;
	}
}

static void
done(const char *name)
{
	printf("%sok %d - abi: %s\n", bad ? "not " : "", ++number, name);
	failed += bad;
	bad = 0;
}

#define	SIZE(a, k)	same("sizeof " #k, sizeof(struct abi_##a), \
			    sizeof(struct k))
#define	OFF2(a, am, k, km)						\
	do {								\
		same("offset " #k "." #km,				\
		    offsetof(struct abi_##a, am), offsetof(struct k, km)); \
		same("size " #k "." #km,				\
		    sizeof(((struct abi_##a *)0)->am),			\
		    sizeof(((struct k *)0)->km));			\
	} while (0)
#define	OFF(a, k, m)	OFF2(a, m, k, m)
#define	NUM(n)		same(#n, (unsigned int)ABI_##n, (unsigned int)KVM_##n)
#define	NUM2(n, k)	same(#k, (unsigned int)ABI_##n, (unsigned int)k)

static void
registers(void)
{
	SIZE(regs, kvm_regs);
	OFF(regs, kvm_regs, rax); OFF(regs, kvm_regs, rbx);
	OFF(regs, kvm_regs, rcx); OFF(regs, kvm_regs, rdx);
	OFF(regs, kvm_regs, rsi); OFF(regs, kvm_regs, rdi);
	OFF(regs, kvm_regs, rsp); OFF(regs, kvm_regs, rbp);
	OFF(regs, kvm_regs, r8); OFF(regs, kvm_regs, r15);
	OFF(regs, kvm_regs, rip); OFF(regs, kvm_regs, rflags);
	SIZE(segment, kvm_segment);
	OFF(segment, kvm_segment, base); OFF(segment, kvm_segment, limit);
	OFF(segment, kvm_segment, selector); OFF(segment, kvm_segment, type);
	OFF(segment, kvm_segment, present); OFF(segment, kvm_segment, dpl);
	OFF(segment, kvm_segment, db); OFF(segment, kvm_segment, s);
	OFF(segment, kvm_segment, l); OFF(segment, kvm_segment, g);
	OFF(segment, kvm_segment, avl); OFF(segment, kvm_segment, unusable);
	SIZE(dtable, kvm_dtable);
	OFF(dtable, kvm_dtable, base); OFF(dtable, kvm_dtable, limit);
	SIZE(sregs, kvm_sregs);
	OFF(sregs, kvm_sregs, cs); OFF(sregs, kvm_sregs, ds);
	OFF(sregs, kvm_sregs, es); OFF(sregs, kvm_sregs, fs);
	OFF(sregs, kvm_sregs, gs); OFF(sregs, kvm_sregs, ss);
	OFF(sregs, kvm_sregs, tr); OFF(sregs, kvm_sregs, ldt);
	OFF(sregs, kvm_sregs, gdt); OFF(sregs, kvm_sregs, idt);
	OFF(sregs, kvm_sregs, cr0); OFF(sregs, kvm_sregs, cr2);
	OFF(sregs, kvm_sregs, cr3); OFF(sregs, kvm_sregs, cr4);
	OFF(sregs, kvm_sregs, cr8); OFF(sregs, kvm_sregs, efer);
	OFF(sregs, kvm_sregs, apic_base);
	OFF(sregs, kvm_sregs, interrupt_bitmap);
	SIZE(fpu, kvm_fpu);
	OFF(fpu, kvm_fpu, fpr); OFF(fpu, kvm_fpu, fcw);
	OFF(fpu, kvm_fpu, fsw); OFF(fpu, kvm_fpu, ftwx);
	OFF(fpu, kvm_fpu, last_opcode); OFF(fpu, kvm_fpu, last_ip);
	OFF(fpu, kvm_fpu, last_dp); OFF(fpu, kvm_fpu, xmm);
	OFF(fpu, kvm_fpu, mxcsr);
	SIZE(xsave, kvm_xsave);
	SIZE(xcrs, kvm_xcrs); OFF(xcrs, kvm_xcrs, xcrs);
	OFF(xcrs, kvm_xcrs, nr_xcrs); OFF(xcrs, kvm_xcrs, flags);
	SIZE(xcr, kvm_xcr); OFF(xcr, kvm_xcr, value);
	SIZE(debugregs, kvm_debugregs); OFF(debugregs, kvm_debugregs, db);
	OFF(debugregs, kvm_debugregs, dr6); OFF(debugregs, kvm_debugregs, dr7);
	OFF(debugregs, kvm_debugregs, flags);
	SIZE(guest_debug, kvm_guest_debug);
	OFF(guest_debug, kvm_guest_debug, control);
	OFF2(guest_debug, debugreg, kvm_guest_debug, arch.debugreg);
	SIZE(interrupt, kvm_interrupt); SIZE(vapic_addr, kvm_vapic_addr);
	SIZE(mp_state, kvm_mp_state);
	done("registers");
}

static void
events(void)
{
	SIZE(vcpu_events, kvm_vcpu_events);
	OFF(vcpu_events, kvm_vcpu_events, exception.injected);
	OFF(vcpu_events, kvm_vcpu_events, exception.nr);
	OFF(vcpu_events, kvm_vcpu_events, exception.has_error_code);
	OFF(vcpu_events, kvm_vcpu_events, exception.pending);
	OFF(vcpu_events, kvm_vcpu_events, exception.error_code);
	OFF(vcpu_events, kvm_vcpu_events, interrupt.injected);
	OFF(vcpu_events, kvm_vcpu_events, interrupt.nr);
	OFF(vcpu_events, kvm_vcpu_events, interrupt.soft);
	OFF(vcpu_events, kvm_vcpu_events, interrupt.shadow);
	OFF(vcpu_events, kvm_vcpu_events, nmi.injected);
	OFF(vcpu_events, kvm_vcpu_events, nmi.pending);
	OFF(vcpu_events, kvm_vcpu_events, nmi.masked);
	OFF(vcpu_events, kvm_vcpu_events, sipi_vector);
	OFF(vcpu_events, kvm_vcpu_events, flags);
	OFF(vcpu_events, kvm_vcpu_events, smi.latched_init);
	OFF(vcpu_events, kvm_vcpu_events, triple_fault.pending);
	OFF(vcpu_events, kvm_vcpu_events, exception_has_payload);
	OFF(vcpu_events, kvm_vcpu_events, exception_payload);
	NUM2(VCPUEVENT_NMI_PENDING, KVM_VCPUEVENT_VALID_NMI_PENDING);
	NUM2(VCPUEVENT_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SIPI_VECTOR);
	NUM2(VCPUEVENT_SHADOW, KVM_VCPUEVENT_VALID_SHADOW);
	NUM2(VCPUEVENT_SMM, KVM_VCPUEVENT_VALID_SMM);
	NUM2(SHADOW_MOV_SS, KVM_X86_SHADOW_INT_MOV_SS);
	NUM2(SHADOW_STI, KVM_X86_SHADOW_INT_STI);
	NUM2(MP_RUNNABLE, KVM_MP_STATE_RUNNABLE);
	NUM2(MP_UNINITIALIZED, KVM_MP_STATE_UNINITIALIZED);
	NUM2(MP_INIT_RECEIVED, KVM_MP_STATE_INIT_RECEIVED);
	NUM2(MP_HALTED, KVM_MP_STATE_HALTED);
	NUM2(MP_SIPI_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED);
	NUM(GUESTDBG_ENABLE); NUM(GUESTDBG_SINGLESTEP);
	NUM(GUESTDBG_USE_SW_BP);
	done("events");
}

static void
lists(void)
{
	SIZE(msr_entry, kvm_msr_entry);
	OFF(msr_entry, kvm_msr_entry, index);
	OFF(msr_entry, kvm_msr_entry, data);
	same("kvm_msrs.entries", sizeof(struct abi_msrs),
	    offsetof(struct kvm_msrs, entries));
	same("kvm_msr_list.indices", sizeof(struct abi_msr_list),
	    offsetof(struct kvm_msr_list, indices));
	SIZE(cpuid_entry2, kvm_cpuid_entry2);
	OFF(cpuid_entry2, kvm_cpuid_entry2, function);
	OFF(cpuid_entry2, kvm_cpuid_entry2, index);
	OFF(cpuid_entry2, kvm_cpuid_entry2, flags);
	OFF(cpuid_entry2, kvm_cpuid_entry2, eax);
	OFF(cpuid_entry2, kvm_cpuid_entry2, edx);
	same("kvm_cpuid2.entries", sizeof(struct abi_cpuid2),
	    offsetof(struct kvm_cpuid2, entries));
	same("kvm_signal_mask.sigset", sizeof(struct abi_signal_mask),
	    offsetof(struct kvm_signal_mask, sigset));
	NUM2(CPUID_SIGNIFCANT_INDEX, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
	same("kvm_irq_routing.entries", sizeof(struct abi_irq_routing),
	    offsetof(struct kvm_irq_routing, entries));
	SIZE(irq_routing_entry, kvm_irq_routing_entry);
	OFF(irq_routing_entry, kvm_irq_routing_entry, gsi);
	OFF(irq_routing_entry, kvm_irq_routing_entry, type);
	OFF(irq_routing_entry, kvm_irq_routing_entry, flags);
	OFF(irq_routing_entry, kvm_irq_routing_entry, u.irqchip.irqchip);
	OFF(irq_routing_entry, kvm_irq_routing_entry, u.irqchip.pin);
	OFF(irq_routing_entry, kvm_irq_routing_entry, u.msi.address_lo);
	OFF(irq_routing_entry, kvm_irq_routing_entry, u.msi.address_hi);
	OFF(irq_routing_entry, kvm_irq_routing_entry, u.msi.data);
	NUM(IRQ_ROUTING_IRQCHIP); NUM(IRQ_ROUTING_MSI);
	done("variable-length lists");
}

static void
memory(void)
{
	SIZE(memory_region, kvm_userspace_memory_region);
	OFF(memory_region, kvm_userspace_memory_region, slot);
	OFF(memory_region, kvm_userspace_memory_region, flags);
	OFF(memory_region, kvm_userspace_memory_region, guest_phys_addr);
	OFF(memory_region, kvm_userspace_memory_region, memory_size);
	OFF(memory_region, kvm_userspace_memory_region, userspace_addr);
	NUM(MEM_LOG_DIRTY_PAGES); NUM(MEM_READONLY);
	SIZE(dirty_log, kvm_dirty_log);
	OFF(dirty_log, kvm_dirty_log, slot);
	OFF2(dirty_log, dirty_bitmap, kvm_dirty_log, padding2);
	SIZE(coalesced_zone, kvm_coalesced_mmio_zone);
	OFF(coalesced_zone, kvm_coalesced_mmio_zone, addr);
	OFF(coalesced_zone, kvm_coalesced_mmio_zone, size);
	OFF(coalesced_zone, kvm_coalesced_mmio_zone, pio);
	SIZE(coalesced_entry, kvm_coalesced_mmio);
	OFF(coalesced_entry, kvm_coalesced_mmio, phys_addr);
	OFF(coalesced_entry, kvm_coalesced_mmio, len);
	OFF(coalesced_entry, kvm_coalesced_mmio, data);
	same("ring entries", sizeof(struct abi_coalesced_ring),
	    offsetof(struct kvm_coalesced_mmio_ring, coalesced_mmio));
	OFF(coalesced_ring, kvm_coalesced_mmio_ring, first);
	OFF(coalesced_ring, kvm_coalesced_mmio_ring, last);
	same("pio page", ABI_PIO_PAGE, KVM_PIO_PAGE_OFFSET);
	same("ring page", ABI_COALESCED_PAGE, KVM_COALESCED_MMIO_PAGE_OFFSET);
	done("memory");
}

static void
chips(void)
{
	SIZE(irq_level, kvm_irq_level);
	OFF(irq_level, kvm_irq_level, irq);
	OFF(irq_level, kvm_irq_level, level);
	SIZE(pic_state, kvm_pic_state);
	OFF(pic_state, kvm_pic_state, last_irr);
	OFF(pic_state, kvm_pic_state, irr);
	OFF(pic_state, kvm_pic_state, imr);
	OFF(pic_state, kvm_pic_state, isr);
	OFF(pic_state, kvm_pic_state, priority_add);
	OFF(pic_state, kvm_pic_state, irq_base);
	OFF(pic_state, kvm_pic_state, read_reg_select);
	OFF(pic_state, kvm_pic_state, poll);
	OFF(pic_state, kvm_pic_state, special_mask);
	OFF(pic_state, kvm_pic_state, init_state);
	OFF(pic_state, kvm_pic_state, auto_eoi);
	OFF(pic_state, kvm_pic_state, rotate_on_auto_eoi);
	OFF(pic_state, kvm_pic_state, special_fully_nested_mode);
	OFF(pic_state, kvm_pic_state, init4);
	OFF(pic_state, kvm_pic_state, elcr);
	OFF(pic_state, kvm_pic_state, elcr_mask);
	SIZE(ioapic_state, kvm_ioapic_state);
	OFF(ioapic_state, kvm_ioapic_state, base_address);
	OFF(ioapic_state, kvm_ioapic_state, ioregsel);
	OFF(ioapic_state, kvm_ioapic_state, id);
	OFF(ioapic_state, kvm_ioapic_state, irr);
	OFF(ioapic_state, kvm_ioapic_state, redirtbl);
	SIZE(irqchip, kvm_irqchip); OFF(irqchip, kvm_irqchip, chip_id);
	OFF(irqchip, kvm_irqchip, chip.pic);
	OFF(irqchip, kvm_irqchip, chip.ioapic);
	NUM(IRQCHIP_PIC_MASTER); NUM(IRQCHIP_PIC_SLAVE); NUM(IRQCHIP_IOAPIC);
	SIZE(lapic_state, kvm_lapic_state);
	SIZE(pit_channel_state, kvm_pit_channel_state);
	OFF(pit_channel_state, kvm_pit_channel_state, count);
	OFF(pit_channel_state, kvm_pit_channel_state, latched_count);
	OFF(pit_channel_state, kvm_pit_channel_state, count_latched);
	OFF(pit_channel_state, kvm_pit_channel_state, status_latched);
	OFF(pit_channel_state, kvm_pit_channel_state, status);
	OFF(pit_channel_state, kvm_pit_channel_state, read_state);
	OFF(pit_channel_state, kvm_pit_channel_state, write_state);
	OFF(pit_channel_state, kvm_pit_channel_state, write_latch);
	OFF(pit_channel_state, kvm_pit_channel_state, rw_mode);
	OFF(pit_channel_state, kvm_pit_channel_state, mode);
	OFF(pit_channel_state, kvm_pit_channel_state, bcd);
	OFF(pit_channel_state, kvm_pit_channel_state, gate);
	OFF(pit_channel_state, kvm_pit_channel_state, count_load_time);
	SIZE(pit_state2, kvm_pit_state2);
	OFF(pit_state2, kvm_pit_state2, flags);
	SIZE(pit_config, kvm_pit_config);
	NUM(PIT_FLAGS_HPET_LEGACY); NUM(PIT_FLAGS_SPEAKER_DATA_ON);
	NUM(PIT_SPEAKER_DUMMY);
	SIZE(reinject_control, kvm_reinject_control);
	SIZE(irqfd, kvm_irqfd); OFF(irqfd, kvm_irqfd, fd);
	OFF(irqfd, kvm_irqfd, gsi); OFF(irqfd, kvm_irqfd, flags);
	OFF(irqfd, kvm_irqfd, resamplefd);
	NUM2(IRQFD_DEASSIGN, KVM_IRQFD_FLAG_DEASSIGN);
	NUM2(IRQFD_RESAMPLE, KVM_IRQFD_FLAG_RESAMPLE);
	SIZE(ioeventfd, kvm_ioeventfd); OFF(ioeventfd, kvm_ioeventfd, addr);
	OFF(ioeventfd, kvm_ioeventfd, datamatch);
	OFF(ioeventfd, kvm_ioeventfd, len); OFF(ioeventfd, kvm_ioeventfd, fd);
	OFF(ioeventfd, kvm_ioeventfd, flags);
	NUM2(IOEVENTFD_DATAMATCH, KVM_IOEVENTFD_FLAG_DATAMATCH);
	NUM2(IOEVENTFD_PIO, KVM_IOEVENTFD_FLAG_PIO);
	NUM2(IOEVENTFD_DEASSIGN, KVM_IOEVENTFD_FLAG_DEASSIGN);
	SIZE(msi, kvm_msi); OFF(msi, kvm_msi, address_lo);
	OFF(msi, kvm_msi, address_hi); OFF(msi, kvm_msi, data);
	OFF(msi, kvm_msi, flags); OFF(msi, kvm_msi, devid);
	SIZE(clock_data, kvm_clock_data);
	OFF(clock_data, kvm_clock_data, clock);
	OFF(clock_data, kvm_clock_data, flags);
	OFF(clock_data, kvm_clock_data, realtime);
	OFF(clock_data, kvm_clock_data, host_tsc);
	SIZE(enable_cap, kvm_enable_cap); OFF(enable_cap, kvm_enable_cap, cap);
	OFF(enable_cap, kvm_enable_cap, flags);
	OFF(enable_cap, kvm_enable_cap, args);
	done("interrupt chips and timers");
}

static void
run_page(void)
{
	SIZE(run, kvm_run);
	OFF(run, kvm_run, request_interrupt_window);
	OFF(run, kvm_run, immediate_exit); OFF(run, kvm_run, exit_reason);
	OFF(run, kvm_run, ready_for_interrupt_injection);
	OFF(run, kvm_run, if_flag); OFF(run, kvm_run, flags);
	OFF(run, kvm_run, cr8); OFF(run, kvm_run, apic_base);
	OFF(run, kvm_run, hw.hardware_exit_reason);
	OFF(run, kvm_run, fail_entry.hardware_entry_failure_reason);
	OFF(run, kvm_run, fail_entry.cpu);
	OFF(run, kvm_run, io.direction); OFF(run, kvm_run, io.size);
	OFF(run, kvm_run, io.port); OFF(run, kvm_run, io.count);
	OFF(run, kvm_run, io.data_offset);
	OFF2(run, debug.exception, kvm_run, debug.arch.exception);
	OFF2(run, debug.pc, kvm_run, debug.arch.pc);
	OFF2(run, debug.dr6, kvm_run, debug.arch.dr6);
	OFF2(run, debug.dr7, kvm_run, debug.arch.dr7);
	OFF(run, kvm_run, mmio.phys_addr); OFF(run, kvm_run, mmio.data);
	OFF(run, kvm_run, mmio.len); OFF(run, kvm_run, mmio.is_write);
	OFF(run, kvm_run, internal.suberror);
	OFF(run, kvm_run, internal.ndata); OFF(run, kvm_run, internal.data);
	OFF(run, kvm_run, emulation_failure.flags);
	OFF(run, kvm_run, emulation_failure.insn_size);
	OFF(run, kvm_run, emulation_failure.insn_bytes);
	OFF(run, kvm_run, eoi.vector);
	OFF(run, kvm_run, kvm_valid_regs); OFF(run, kvm_run, kvm_dirty_regs);
	OFF2(run, sync, kvm_run, s);
	NUM(EXIT_UNKNOWN); NUM(EXIT_IO); NUM(EXIT_DEBUG);
	NUM(EXIT_HLT); NUM(EXIT_MMIO); NUM(EXIT_IRQ_WINDOW_OPEN);
	NUM(EXIT_SHUTDOWN); NUM(EXIT_FAIL_ENTRY); NUM(EXIT_INTR);
	NUM(EXIT_SET_TPR); NUM(EXIT_INTERNAL_ERROR); NUM(EXIT_IOAPIC_EOI);
	NUM(EXIT_IO_IN); NUM(EXIT_IO_OUT);
	NUM2(INTERNAL_EMULATION, KVM_INTERNAL_ERROR_EMULATION);
	NUM2(INTERNAL_DELIVERY_EV, KVM_INTERNAL_ERROR_DELIVERY_EV);
	NUM2(INTERNAL_UNEXPECTED_EXIT,
	    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON);
	NUM2(EMULATION_FLAG_INSN_BYTES,
	    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
	done("run page and exits");
}

static void
requests(void)
{
	same("version", ABI_VERSION, KVM_API_VERSION);
	NUM(GET_API_VERSION); NUM(CREATE_VM); NUM(GET_MSR_INDEX_LIST);
	NUM(CHECK_EXTENSION); NUM(GET_VCPU_MMAP_SIZE);
	NUM(GET_SUPPORTED_CPUID);
	NUM(CREATE_VCPU); NUM(GET_DIRTY_LOG); NUM(SET_USER_MEMORY_REGION);
	NUM(SET_TSS_ADDR); NUM(SET_IDENTITY_MAP_ADDR); NUM(CREATE_IRQCHIP);
	NUM(IRQ_LINE); NUM(GET_IRQCHIP); NUM(SET_IRQCHIP);
	NUM(IRQ_LINE_STATUS);
	NUM(REGISTER_COALESCED_MMIO); NUM(UNREGISTER_COALESCED_MMIO);
	NUM(SET_GSI_ROUTING); NUM(REINJECT_CONTROL); NUM(IRQFD);
	NUM(CREATE_PIT2); NUM(IOEVENTFD);
	NUM(SET_CLOCK); NUM(GET_CLOCK); NUM(GET_PIT2); NUM(SET_PIT2);
	NUM(SET_TSC_KHZ); NUM(GET_TSC_KHZ); NUM(SIGNAL_MSI); NUM(RUN);
	NUM(GET_REGS); NUM(SET_REGS); NUM(GET_SREGS); NUM(SET_SREGS);
	NUM(INTERRUPT); NUM(GET_MSRS); NUM(SET_MSRS);
	NUM(GET_FPU); NUM(SET_FPU); NUM(GET_LAPIC); NUM(SET_LAPIC);
	NUM(SET_CPUID2); NUM(GET_CPUID2); NUM(SET_VAPIC_ADDR);
	NUM(SET_SIGNAL_MASK); NUM(GET_MP_STATE);
	NUM(SET_MP_STATE); NUM(NMI); NUM(SET_GUEST_DEBUG);
	NUM(GET_VCPU_EVENTS); NUM(SET_VCPU_EVENTS);
	NUM(GET_DEBUGREGS); NUM(SET_DEBUGREGS); NUM(ENABLE_CAP);
	NUM(GET_XSAVE); NUM(SET_XSAVE); NUM(GET_XCRS); NUM(SET_XCRS);
	done("request numbers");
}

static void
capabilities(void)
{
	NUM(CAP_IRQCHIP); NUM(CAP_HLT); NUM(CAP_USER_MEMORY);
	NUM(CAP_SET_TSS_ADDR); NUM(CAP_EXT_CPUID); NUM(CAP_NR_VCPUS);
	NUM(CAP_NR_MEMSLOTS); NUM(CAP_NOP_IO_DELAY);
	NUM(CAP_MP_STATE); NUM(CAP_COALESCED_MMIO);
	NUM(CAP_DESTROY_MEMORY_REGION_WORKS); NUM(CAP_USER_NMI);
	NUM(CAP_SET_GUEST_DEBUG); NUM(CAP_REINJECT_CONTROL);
	NUM(CAP_IRQ_ROUTING); NUM(CAP_IRQ_INJECT_STATUS);
	NUM(CAP_JOIN_MEMORY_REGIONS_WORKS); NUM(CAP_IRQFD);
	NUM(CAP_PIT2); NUM(CAP_PIT_STATE2);
	NUM(CAP_IOEVENTFD); NUM(CAP_SET_IDENTITY_MAP_ADDR);
	NUM(CAP_ADJUST_CLOCK); NUM(CAP_INTERNAL_ERROR_DATA);
	NUM(CAP_VCPU_EVENTS); NUM(CAP_INTR_SHADOW); NUM(CAP_DEBUGREGS);
	NUM(CAP_X86_ROBUST_SINGLESTEP); NUM(CAP_XSAVE);
	NUM(CAP_XCRS); NUM(CAP_GET_TSC_KHZ);
	NUM(CAP_MAX_VCPUS); NUM(CAP_TSC_DEADLINE_TIMER); NUM(CAP_SIGNAL_MSI);
	NUM(CAP_READONLY_MEM); NUM(CAP_ENABLE_CAP_VM);
	NUM(CAP_IOEVENTFD_NO_LENGTH); NUM(CAP_CHECK_EXTENSION_VM);
	NUM(CAP_SPLIT_IRQCHIP); NUM(CAP_IOEVENTFD_ANY_LENGTH);
	NUM(CAP_MAX_VCPU_ID); NUM(CAP_IMMEDIATE_EXIT);
	NUM(CAP_EXIT_ON_EMULATION_FAILURE);
	done("capabilities");
}

int
main(void)
{
	registers();
	events();
	lists();
	memory();
	chips();
	run_page();
	requests();
	capabilities();
	return (failed != 0);
}

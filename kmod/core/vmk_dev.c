/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * vmk_dev.c: the module, /dev/kvm, and machines.
 *
 * Theory.  Every request of every host arrives in vmk_object_ioctl() as
 * Linux's full 32-bit number and a user address.  The object behind the
 * descriptor (none for /dev/kvm) selects one of three switches.  Requests are
 * never recognised by less than all 32 bits, and never copied by what their
 * direction bits claim unless the switch says that they are honest.
 *
 * A machine's requests run under vm->lock except those that deliver
 * interrupts, which may come while another thread configures.  A machine
 * refuses requests of a process other than its creator (EIO): its memory is
 * that process's.
 *
 * Order of creation is enforced, not assumed: an in-kernel irqchip before
 * any vCPU (CVE-2012-1601), a PIT after the irqchip, nothing twice.
 */
#include "x86.h"
#include "vmk_irqchip.h"

const struct vmk_arch_ops *vmk_arch;	/* NULL: not initialized */
static uint32_t nvms;			/* atomic */
static uint64_t last_serial;		/* atomic */

/* ---- module ------------------------------------------------------------ */

int
vmk_module_init(void)
{
	unsigned int i;
	int error = VMK_ENODEV;

	vmk_cpuid_init();
	for (i = 0; vmk_arch_all[i] != NULL; i++) {
		error = vmk_arch_all[i]->init();
		if (error == 0) {
			vmk_arch = vmk_arch_all[i];
			vmk_log("kvm: using %s\n", vmk_arch->name);
			return (0);
		}
		if (error != VMK_ENODEV)
			break;
	}
	return (error);
}

int
vmk_module_fini(void)
{
	if (__atomic_load_n(&nvms, __ATOMIC_SEQ_CST) != 0)
		return (VMK_EBUSY);
	if (vmk_arch != NULL)
		vmk_arch->fini();
	vmk_arch = NULL;
	return (0);
}

void
vmk_module_resume(void)
{
	if (vmk_arch != NULL)
		vmk_arch->resume();
}

/* ---- machine life ------------------------------------------------------ */

void
vmk_vm_get(struct vmk_vm *vm)
{
	__atomic_add_fetch(&vm->refs, 1, __ATOMIC_SEQ_CST);
}

/*
 * The last descriptor is closed: nobody can make a request any more.  First
 * whatever may call us from outside (irqfds, timers, the address space),
 * then the rest.
 */
static void
vm_destroy(struct vmk_vm *vm)
{
	uint32_t i;

	if (vm->irqchip != NULL)
		vmk_irqchip_destroy(vm);
	vmk_io_fini(vm);
	vmk_mem_fini(vm);
	vmk_mm_detach(vm->mm);
	for (i = 0; i < vm->nvcpus; i++)
		vmk_vcpu_destroy(vm->vcpu[i]);
	vmk_mem_free(vm);
	vmk_mutex_fini(&vm->io_lock);
	vmk_mutex_fini(&vm->lock);
	vmk_free(vm, sizeof(*vm));
	vmk_mem_uncharge(VMK_VM_PAGES);
	__atomic_sub_fetch(&nvms, 1, __ATOMIC_SEQ_CST);
}

static void
vm_put(struct vmk_vm *vm)
{
	if (__atomic_sub_fetch(&vm->refs, 1, __ATOMIC_SEQ_CST) == 0)
		vm_destroy(vm);
}

static int
create_vm(uint64_t type, int *fd)
{
	struct vmk_fd_ticket ticket;
	struct vmk_vm *vm;
	int error;

	if (type != 0)
		return (VMK_EINVAL);
	if (__atomic_add_fetch(&nvms, 1, __ATOMIC_SEQ_CST) >
	    vmk_tunables.max_vms) {
		error = VMK_ENFILE;
		goto fail_count;
	}
	error = VMK_ENOMEM;
	if (!vmk_mem_charge(VMK_VM_PAGES))
		goto fail_count;
	vm = vmk_alloc(sizeof(*vm));
	if (vm == NULL)
		goto fail_charge;
	vm->obj.kind = VMK_OBJ_VM;
	vm->serial = __atomic_add_fetch(&last_serial, 1, __ATOMIC_RELAXED);
	vm->refs = 1;
	vm->tlb_gen = 1;
	vm->clock_offset = -vmk_time_ns();
	vm->tsc_base = -rdtsc();
	vmk_mutex_init(&vm->lock, "vmk vm");
	vmk_mutex_init(&vm->io_lock, "vmk io");
	error = vmk_mem_init(vm);
	if (error != 0)
		goto fail_vm;
	vm->mm = vmk_mm_attach(vmk_mem_unmapped, vm);
	if (vm->mm == NULL) {
		error = VMK_ENOMEM;
		goto fail_mem;
	}
	error = vmk_fd_prepare(&ticket, "kvm-vm");
	if (error != 0)
		goto fail_mm;
	*fd = ticket.fd;
	vmk_fd_commit(&ticket, &vm->obj);
	return (0);
fail_mm:
	vmk_mm_detach(vm->mm);
fail_mem:
	vmk_mem_free(vm);
fail_vm:
	vmk_mutex_fini(&vm->io_lock);
	vmk_mutex_fini(&vm->lock);
	vmk_free(vm, sizeof(*vm));
fail_charge:
	vmk_mem_uncharge(VMK_VM_PAGES);
fail_count:
	__atomic_sub_fetch(&nvms, 1, __ATOMIC_SEQ_CST);
	return (error);
}

/* ---- /dev/kvm ---------------------------------------------------------- */

static int
check_extension(uint64_t cap)
{
	switch (cap) {
	case ABI_CAP_HLT: case ABI_CAP_USER_MEMORY: case ABI_CAP_SET_TSS_ADDR:
	case ABI_CAP_EXT_CPUID: case ABI_CAP_NOP_IO_DELAY:
	case ABI_CAP_MP_STATE: case ABI_CAP_DESTROY_MEMORY_REGION_WORKS:
	case ABI_CAP_USER_NMI: case ABI_CAP_SET_GUEST_DEBUG:
	case ABI_CAP_JOIN_MEMORY_REGIONS_WORKS: case ABI_CAP_IOEVENTFD:
	case ABI_CAP_SET_IDENTITY_MAP_ADDR: case ABI_CAP_ADJUST_CLOCK:
	case ABI_CAP_INTERNAL_ERROR_DATA: case ABI_CAP_VCPU_EVENTS:
	case ABI_CAP_INTR_SHADOW: case ABI_CAP_DEBUGREGS:
	case ABI_CAP_X86_ROBUST_SINGLESTEP: case ABI_CAP_XSAVE:
	case ABI_CAP_XCRS: case ABI_CAP_GET_TSC_KHZ: case ABI_CAP_READONLY_MEM:
	case ABI_CAP_ENABLE_CAP_VM: case ABI_CAP_IOEVENTFD_NO_LENGTH:
	case ABI_CAP_CHECK_EXTENSION_VM: case ABI_CAP_IOEVENTFD_ANY_LENGTH:
	case ABI_CAP_IMMEDIATE_EXIT: case ABI_CAP_EXIT_ON_EMULATION_FAILURE:
		return (1);
	case ABI_CAP_COALESCED_MMIO:
		return (ABI_COALESCED_PAGE);
	case ABI_CAP_NR_VCPUS: case ABI_CAP_MAX_VCPUS:
	case ABI_CAP_MAX_VCPU_ID:
		return (VMK_MAX_VCPUS);
	case ABI_CAP_NR_MEMSLOTS:
		return (VMK_MAX_SLOTS);
	default:
		return (vmk_irqchip_cap(cap));
	}
}

static int
supported_cpuid(uint64_t arg)
{
	struct abi_cpuid_entry2 *e;
	struct abi_cpuid2 h;
	size_t size = VMK_MAX_CPUID * sizeof(e[0]);
	unsigned int n;
	int error;

	error = vmk_copyin(arg, &h, sizeof(h));
	if (error != 0)
		return (error);
	e = vmk_alloc(size);
	if (e == NULL)
		return (VMK_ENOMEM);
	n = vmk_cpuid_supported(e, VMK_MAX_CPUID);
	if (n > VMK_MAX_CPUID || h.nent < n) {
		vmk_free(e, size);
		return (VMK_E2BIG);
	}
	h.nent = n;
	error = vmk_copyout(&h, arg, sizeof(h));
	if (error == 0)
		error = vmk_copyout(e, arg + sizeof(h), n * sizeof(e[0]));
	vmk_free(e, size);
	return (error);
}

/* The header always says how many there are, with E2BIG if too many. */
static int
msr_index_list(uint64_t arg)
{
	struct abi_msr_list h;
	const uint32_t *list;
	unsigned int n;
	uint32_t room;
	int error;

	list = vmk_msr_list(&n);
	error = vmk_copyin(arg, &h, sizeof(h));
	if (error != 0)
		return (error);
	room = h.nmsrs;
	h.nmsrs = n;
	error = vmk_copyout(&h, arg, sizeof(h));
	if (error == 0 && room < n)
		return (VMK_E2BIG);
	if (error == 0)
		error = vmk_copyout(list, arg + sizeof(h), n * 4UL);
	return (error);
}

static int
system_ioctl(uint32_t request, uint64_t arg, int *result)
{
	switch (request) {
	case ABI_GET_API_VERSION:
		*result = ABI_VERSION;
		return (arg != 0 ? VMK_EINVAL : 0);
	case ABI_CREATE_VM:
		return (create_vm(arg, result));
	case ABI_CHECK_EXTENSION:
		*result = check_extension(arg);
		return (0);
	case ABI_GET_VCPU_MMAP_SIZE:
		*result = ABI_RUN_PAGES * (int)VMK_PAGE_SIZE;
		return (arg != 0 ? VMK_EINVAL : 0);
	case ABI_GET_SUPPORTED_CPUID:
		return (supported_cpuid(arg));
	case ABI_GET_MSR_INDEX_LIST:
		return (msr_index_list(arg));
	default:
		return (VMK_ENOTTY);
	}
}

/* ---- machine requests -------------------------------------------------- */

static int
get_clock(struct vmk_vm *vm, uint64_t arg)
{
	struct abi_clock_data a;

	memset(&a, 0, sizeof(a));
	a.clock = vmk_time_ns() + vm->clock_offset;
	return (vmk_copyout(&a, arg, sizeof(a)));
}

static int
set_clock(struct vmk_vm *vm, const struct abi_clock_data *a)
{
	if (a->flags != 0)
		return (VMK_EINVAL);
	vm->clock_offset = a->clock - vmk_time_ns();
	return (0);
}

static int
enable_cap(struct vmk_vm *vm, const struct abi_enable_cap *a)
{
	if (a->flags != 0)
		return (VMK_EINVAL);
	switch (a->cap) {
	case ABI_CAP_EXIT_ON_EMULATION_FAILURE:
		if (a->args[0] > 1)
			return (VMK_EINVAL);
		vm->exit_on_emulation_failure = a->args[0] != 0;
		return (0);
	case ABI_CAP_SPLIT_IRQCHIP:
		/* So many I/O APIC pins; user space routes them. */
		if (a->args[0] > VMK_MAX_ROUTES)
			return (VMK_EINVAL);
		if (vm->irqchip_mode != VMK_IRQCHIP_NONE)
			return (VMK_EEXIST);
		if (vm->nvcpus != 0)
			return (VMK_EINVAL);
		return (vmk_irqchip_create_split(vm));
	default:
		return (VMK_EINVAL);
	}
}

static int
create_irqchip(struct vmk_vm *vm)
{
	if (vm->irqchip_mode != VMK_IRQCHIP_NONE)
		return (VMK_EEXIST);
	if (vm->nvcpus != 0)				/* CVE-2012-1601 */
		return (VMK_EINVAL);
	return (vmk_irqchip_create(vm));
}

static int
set_routing(struct vmk_vm *vm, uint64_t arg)
{
	struct abi_irq_routing_entry *e = NULL;
	struct abi_irq_routing h;
	size_t size;
	int error;

	error = vmk_copyin(arg, &h, sizeof(h));
	if (error != 0)
		return (error);
	if (h.nr > VMK_MAX_ROUTES || h.flags != 0)	/* CVE-2012-2137 */
		return (VMK_EINVAL);
	if (vm->irqchip == NULL)
		return (VMK_EINVAL);
	size = h.nr * sizeof(e[0]);
	if (h.nr > 0) {
		e = vmk_alloc(size);
		if (e == NULL)
			return (VMK_ENOMEM);
		error = vmk_copyin(arg + sizeof(h), e, size);
	}
	if (error == 0)
		error = vmk_irq_set_routing(vm, e, h.nr);
	if (e != NULL)
		vmk_free(e, size);
	return (error);
}

static int
get_irqchip(struct vmk_vm *vm, uint64_t arg, struct abi_irqchip *a)
{
	uint32_t chip = a->chip_id;
	int error;

	if (vm->irqchip_mode != VMK_IRQCHIP_KERNEL)
		return (VMK_ENXIO);
	memset(a, 0, sizeof(*a));
	a->chip_id = chip;
	error = vmk_irqchip_state(vm, a, false);
	return (error != 0 ? error : vmk_copyout(a, arg, sizeof(*a)));
}

static int
irq_line(struct vmk_vm *vm, uint64_t arg, bool status)
{
	struct abi_irq_level a;
	int error, st = 0;

	error = vmk_copyin(arg, &a, sizeof(a));
	if (error != 0)
		return (error);
	if (vm->irqchip == NULL)
		return (VMK_ENXIO);
	error = vmk_irq_line(vm, a.irq, a.level != 0, &st);
	if (error == 0 && status) {
		a.irq = (uint32_t)st;
		error = vmk_copyout(&a, arg, sizeof(a));
	}
	return (error);
}

static int
signal_msi(struct vmk_vm *vm, uint64_t arg, int *result)
{
	struct abi_msi a;
	int error;

	error = vmk_copyin(arg, &a, sizeof(a));
	if (error != 0)
		return (error);
	if (vm->irqchip == NULL || a.flags != 0)
		return (VMK_EINVAL);
	*result = vmk_irq_msi(vm, (uint64_t)a.address_hi << 32 | a.address_lo,
	    a.data) > 0;
	return (0);
}

/* Arguments that are copied in before vm->lock is taken. */
union vm_arg {
	struct abi_memory_region region;
	struct abi_dirty_log dirty;
	struct abi_irqchip irqchip;
	struct abi_coalesced_zone zone;
	struct abi_irqfd irqfd;
	struct abi_pit_config pit;
	struct abi_pit_state2 pit_state;	/* zeroed for GET_PIT2 */
	struct abi_ioeventfd ioeventfd;
	struct abi_clock_data clock;
	struct abi_enable_cap cap;
	struct abi_reinject_control reinject;
	uint64_t word;
};

/* How much to copy in; the direction bits do not tell. */
static size_t
vm_arg_size(uint32_t request)
{
	switch (request) {
	case ABI_SET_USER_MEMORY_REGION: case ABI_GET_DIRTY_LOG:
	case ABI_GET_IRQCHIP: case ABI_SET_IRQCHIP:
	case ABI_REGISTER_COALESCED_MMIO: case ABI_UNREGISTER_COALESCED_MMIO:
	case ABI_IRQFD: case ABI_CREATE_PIT2: case ABI_SET_PIT2:
	case ABI_IOEVENTFD: case ABI_SET_CLOCK: case ABI_ENABLE_CAP:
	case ABI_SET_IDENTITY_MAP_ADDR:
		return (ABI_IOC_SIZE(request));
	case ABI_REINJECT_CONTROL:
		return (sizeof(struct abi_reinject_control));
	default:
		return (0);
	}
}

static int
vm_locked(struct vmk_vm *vm, uint32_t request, uint64_t arg, union vm_arg *u,
    int *result)
{
	bool kernel = vm->irqchip_mode == VMK_IRQCHIP_KERNEL;
	int error;

	switch (request) {
	case ABI_CREATE_VCPU:
		return (arg > UINT32_MAX ? VMK_EINVAL :
		    vmk_vcpu_create(vm, (uint32_t)arg, result));
	case ABI_SET_USER_MEMORY_REGION:
		return (vmk_mem_set_region(vm, &u->region));
	case ABI_GET_DIRTY_LOG:
		return (vmk_mem_get_dirty(vm, &u->dirty));
	case ABI_SET_TSS_ADDR: case ABI_SET_IDENTITY_MAP_ADDR:
		/* For processors that cannot run real mode; ours can. */
		return (0);
	case ABI_CREATE_IRQCHIP:
		return (create_irqchip(vm));
	case ABI_GET_IRQCHIP:
		return (get_irqchip(vm, arg, &u->irqchip));
	case ABI_SET_IRQCHIP:
		return (kernel ? vmk_irqchip_state(vm, &u->irqchip, true) :
		    VMK_ENXIO);
	case ABI_CREATE_PIT2:
		return (kernel ? vmk_pit_create(vm, u->pit.flags) :
		    VMK_EINVAL);
	case ABI_GET_PIT2:
		error = kernel ? vmk_pit_get(vm, &u->pit_state) : VMK_ENXIO;
		return (error != 0 ? error :
		    vmk_copyout(&u->pit_state, arg, sizeof(u->pit_state)));
	case ABI_SET_PIT2:
		return (kernel ? vmk_pit_set(vm, &u->pit_state) : VMK_ENXIO);
	case ABI_REINJECT_CONTROL:
		return (kernel ? vmk_pit_reinject(vm, &u->reinject) :
		    VMK_ENXIO);
	case ABI_SET_GSI_ROUTING:
		return (set_routing(vm, arg));
	case ABI_IRQFD:
		return (vm->irqchip == NULL ? VMK_EINVAL :
		    vmk_irqfd(vm, &u->irqfd));
	case ABI_IOEVENTFD:
		return (vmk_ioeventfd(vm, &u->ioeventfd));
	case ABI_REGISTER_COALESCED_MMIO:
		return (vmk_coalesced(vm, &u->zone, true));
	case ABI_UNREGISTER_COALESCED_MMIO:
		return (vmk_coalesced(vm, &u->zone, false));
	case ABI_GET_CLOCK:
		return (get_clock(vm, arg));
	case ABI_SET_CLOCK:
		return (set_clock(vm, &u->clock));
	case ABI_ENABLE_CAP:
		return (enable_cap(vm, &u->cap));
	default:
		return (VMK_ENOTTY);
	}
}

static int
vm_ioctl(struct vmk_vm *vm, uint32_t request, uint64_t arg, int *result)
{
	union vm_arg u;
	size_t size;
	int error;

	switch (request) {
	case ABI_CHECK_EXTENSION:
		*result = check_extension(arg);
		return (0);
	case ABI_GET_TSC_KHZ:
		*result = (int)vmk_tsc_khz();
		return (0);
	case ABI_SET_TSC_KHZ:
		return (arg == 0 || arg == vmk_tsc_khz() ? 0 : VMK_EINVAL);
	case ABI_IRQ_LINE:
		return (irq_line(vm, arg, false));
	case ABI_IRQ_LINE_STATUS:
		return (irq_line(vm, arg, true));
	case ABI_SIGNAL_MSI:
		return (signal_msi(vm, arg, result));
	default:
		break;
	}
	memset(&u, 0, sizeof(u));
	size = vm_arg_size(request);
	if (size > sizeof(u))
		return (VMK_ENOTTY);
	if (size > 0) {
		error = vmk_copyin(arg, &u, size);
		if (error != 0)
			return (error);
	}
	error = vmk_mutex_enter_sig(&vm->lock);
	if (error != 0)
		return (error);
	error = vm_locked(vm, request, arg, &u, result);
	vmk_mutex_exit(&vm->lock);
	return (error);
}

/* ---- what the glue calls ----------------------------------------------- */

static struct vmk_vcpu *
to_vcpu(struct vmk_object *obj)
{
	return ((struct vmk_vcpu *)(void *)((uint8_t *)obj -
	    offsetof(struct vmk_vcpu, obj)));
}

static struct vmk_vm *
to_vm(struct vmk_object *obj)
{
	return ((struct vmk_vm *)(void *)((uint8_t *)obj -
	    offsetof(struct vmk_vm, obj)));
}

int
vmk_object_ioctl(struct vmk_object *obj, uint32_t request, uint64_t arg,
    int *result)
{
	struct vmk_vm *vm;

	*result = 0;
	if (obj == NULL)
		return (system_ioctl(request, arg, result));
	vm = obj->kind == VMK_OBJ_VM ? to_vm(obj) : to_vcpu(obj)->vm;
	if (!vmk_mm_is_current(vm->mm))
		return (VMK_EIO);
	if (obj->kind == VMK_OBJ_VM)
		return (vm_ioctl(vm, request, arg, result));
	return (vmk_vcpu_ioctl(to_vcpu(obj), request, arg, result));
}

void
vmk_object_release(struct vmk_object *obj)
{
	vm_put(obj->kind == VMK_OBJ_VM ? to_vm(obj) : to_vcpu(obj)->vm);
}

struct vmk_shared *
vmk_object_shared(struct vmk_object *obj)
{
	return (obj->kind == VMK_OBJ_VCPU ? &to_vcpu(obj)->shared : NULL);
}

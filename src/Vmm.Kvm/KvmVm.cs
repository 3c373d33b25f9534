// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Microsoft.Win32.SafeHandles;
using Vmm.Core;
using Vmm.Kvm.Abi;

namespace Vmm.Kvm;

// Theory. A VM is a descriptor, its memory slots and, depending on the mode, interrupt controllers in the kernel.
//
// Interrupt routes. A GSI of the kernel leads to pins or to a message.
//   Kernel: GSI n leads to pin n of the 8259 pair (n < 16) and to pin n of the I/O APIC. IRQ 0 is wired to I/O APIC
//   pin 2, as the MADT says on every PC; both 0 and 2 therefore mean that wire, whichever numbering a caller uses.
//   Split: the kernel must know the messages of level-triggered I/O APIC pins to tell us about their EOI. Instead of
//   asking the I/O APIC model to publish its table, SendMsi enters each level-triggered message that it has not seen
//   into a table of a few dozen routes, oldest out first; a message must have left the table for as many
//   reprogrammings as it has places before its EOI could be missed.
//
// Locks: one gate for slots and routes; vCPU threads take it only when a split-mode level interrupt is new.

/// <summary>A virtual machine of the KVM device.</summary>
internal sealed unsafe class KvmVm : IVm
{
    // Where Intel processors without unrestricted guest keep a real-mode TSS and page table of KVM's: below the flash
    // chips, above the local APICs, nowhere near RAM or PCI windows.
    private const long TssAddress = 0xFEFFD000;
    private const ulong IdentityMapAddress = 0xFEFFC000;

    private const uint MsiLevelTriggered = 1 << 15;

    private readonly Lock _gate = new();
    private readonly Dictionary<int, MemorySlot> _slots = [];
    private readonly SafeFileHandle _vm;
    private readonly KvmSystem _system;
    private readonly MsiRoute[] _levelRoutes = [];
    private int _levelRouteCount;
    private int _nextLevelRoute;
    private bool _disposed;

    internal KvmVm(KvmSystem system, VmOptions options)
    {
        _system = system;
        Options = options;
        _vm = new SafeFileHandle(
            KvmCall.Require(system.Device, KvmAbi.KVM_CREATE_VM, 0, "KVM_CREATE_VM"), ownsHandle: true);
        try
        {
            KvmCapabilities has = system.Probed;
            if (has.SetIdentityMap)
            {
                ulong address = IdentityMapAddress;
                KvmCall.Require(_vm, KvmAbi.KVM_SET_IDENTITY_MAP_ADDR, (nint)(&address), "KVM_SET_IDENTITY_MAP_ADDR");
            }

            if (has.SetTssAddress)
            {
                KvmCall.Require(_vm, KvmAbi.KVM_SET_TSS_ADDR, unchecked((nint)TssAddress), "KVM_SET_TSS_ADDR");
            }

            if (has.ExitOnEmulationFailure)
            {
                EnableCapability(KvmAbi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1, "KVM_CAP_EXIT_ON_EMULATION_FAILURE");
            }

            switch (options.Irqchip)
            {
                case IrqchipMode.Kernel:
                    KvmCall.Require(_vm, KvmAbi.KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP");
                    SetKernelRoutes();
                    break;
                case IrqchipMode.Split:
                    _levelRoutes = new MsiRoute[Math.Max(24, options.IoApicPins) * 4];
                    EnableCapability(
                        KvmAbi.KVM_CAP_SPLIT_IRQCHIP, (ulong)_levelRoutes.Length, "KVM_CAP_SPLIT_IRQCHIP");
                    break;
                case IrqchipMode.User:
                    break;
                default:
                    throw new ArgumentOutOfRangeException(nameof(options));
            }
        }
        catch
        {
            _vm.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public IrqchipMode Irqchip => Options.Irqchip;

    internal VmOptions Options { get; }

    internal KvmSystem System => _system;

    /// <inheritdoc/>
    public void SetMemorySlot(int slot, in MemorySlot memory)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(slot);
        if (slot >= _system.Probed.MemorySlots)
        {
            throw new HypervisorException($"kvm: memory slot {slot}: only {_system.Probed.MemorySlots} are supported");
        }

        if (memory.ReadOnly && !_system.Probed.ReadOnlyMemory)
        {
            throw new HypervisorException("kvm: read-only memory slots are not supported here");
        }

        lock (_gate)
        {
            bool exists = _slots.TryGetValue(slot, out MemorySlot old);
            if (memory.LengthBytes == 0)
            {
                if (exists)
                {
                    SetRegion(slot, old with { LengthBytes = 0 });
                    _slots.Remove(slot);
                }

                return;
            }

            // KVM moves a slot and switches its log, but changes neither what stands behind it nor its length nor
            // whether it is read-only: then the guest sees a moment without it.
            if (exists && (old.HostAddress != memory.HostAddress || old.LengthBytes != memory.LengthBytes
                || old.ReadOnly != memory.ReadOnly))
            {
                SetRegion(slot, old with { LengthBytes = 0 });
                _slots.Remove(slot);
            }

            SetRegion(slot, memory);
            _slots[slot] = memory;
        }
    }

    /// <inheritdoc/>
    public bool ReadDirtyLog(int slot, Span<ulong> bitmap)
    {
        lock (_gate)
        {
            if (!_slots.TryGetValue(slot, out MemorySlot memory) || !memory.LogDirty)
            {
                return false;
            }

            int words = checked((int)(((memory.LengthBytes / 4096) + 63) / 64));
            if (bitmap.Length < words)
            {
                throw new ArgumentException($"slot {slot} has {words * 64L} pages to report", nameof(bitmap));
            }

            // SAFETY: the bitmap is pinned and at least as long as the kernel writes (checked above).
            fixed (ulong* bits = bitmap)
            {
                var request = new kvm_dirty_log { slot = (uint)slot, dirty_bitmap = (ulong)bits };
                KvmCall.Require(_vm, KvmAbi.KVM_GET_DIRTY_LOG, (nint)(&request), "KVM_GET_DIRTY_LOG");
            }

            return true;
        }
    }

    /// <inheritdoc/>
    public IVcpu CreateVcpu(int index, ICpuInterruptPort? interrupts)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(index);
        int fd = KvmCall.Require(_vm, KvmAbi.KVM_CREATE_VCPU, index, $"KVM_CREATE_VCPU {index}");
        var file = new SafeFileHandle(fd, ownsHandle: true);
        try
        {
            return new KvmVcpu(this, file, index, Irqchip == IrqchipMode.User ? interrupts : null);
        }
        catch
        {
            file.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public void SetIrqLine(uint gsi, bool asserted)
    {
        if (Irqchip == IrqchipMode.Kernel)
        {
            var request = new kvm_irq_level { irq = gsi, level = asserted ? 1u : 0 };
            _ = KvmCall.Try(_vm, KvmAbi.KVM_IRQ_LINE, (nint)(&request));
        }
    }

    /// <inheritdoc/>
    public void SendMsi(ulong address, uint data)
    {
        if (Irqchip == IrqchipMode.User)
        {
            return;
        }

        if (Irqchip == IrqchipMode.Split && (data & MsiLevelTriggered) != 0)
        {
            EnterLevelRoute(address, data);
        }

        var request = new kvm_msi { address_lo = (uint)address, address_hi = (uint)(address >> 32), data = data };
        _ = KvmCall.Try(_vm, KvmAbi.KVM_SIGNAL_MSI, (nint)(&request));
    }

    /// <inheritdoc/>
    public void SetA20(bool isOpen)
    {
    }

    /// <inheritdoc/>
    public bool TryAddDoorbell(ulong address, bool isPort, AccessWidth width, ulong? dataMatch, int eventFd) =>
        _system.Probed.IoEventFd && Doorbell(address, isPort, width, dataMatch, eventFd, 0);

    /// <inheritdoc/>
    public void RemoveDoorbell(ulong address, bool isPort, AccessWidth width, ulong? dataMatch, int eventFd)
    {
        if (_system.Probed.IoEventFd)
        {
            _ = Doorbell(address, isPort, width, dataMatch, eventFd, KvmAbi.KVM_IOEVENTFD_FLAG_DEASSIGN);
        }
    }

    /// <inheritdoc/>
    public void SaveIrqchip(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        if (_system.Probed.AdjustClock)
        {
            kvm_clock_data clock = default;
            KvmCall.Require(_vm, KvmAbi.KVM_GET_CLOCK, (nint)(&clock), "KVM_GET_CLOCK");
            writer.Write("kvmclock", clock.clock);
        }

        if (Irqchip == IrqchipMode.Kernel)
        {
            SaveChip(writer, "pic.master", KvmAbi.KVM_IRQCHIP_PIC_MASTER);
            SaveChip(writer, "pic.slave", KvmAbi.KVM_IRQCHIP_PIC_SLAVE);
            SaveChip(writer, "ioapic", KvmAbi.KVM_IRQCHIP_IOAPIC);
        }
    }

    /// <inheritdoc/>
    public void LoadIrqchip(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        if (_system.Probed.AdjustClock && reader.Has("kvmclock"))
        {
            var clock = new kvm_clock_data { clock = reader.ReadUInt64("kvmclock") };
            KvmCall.Require(_vm, KvmAbi.KVM_SET_CLOCK, (nint)(&clock), "KVM_SET_CLOCK");
        }

        if (Irqchip == IrqchipMode.Kernel)
        {
            LoadChip(reader, "pic.master", KvmAbi.KVM_IRQCHIP_PIC_MASTER);
            LoadChip(reader, "pic.slave", KvmAbi.KVM_IRQCHIP_PIC_SLAVE);
            LoadChip(reader, "ioapic", KvmAbi.KVM_IRQCHIP_IOAPIC);
        }
    }

    /// <summary>Ends the VM. Dispose its vCPUs first: their descriptors keep it alive.</summary>
    public void Dispose()
    {
        if (!_disposed)
        {
            _disposed = true;
            _vm.Dispose();
        }
    }

    /// <summary>Frequency of the guests' time stamp counters; 0 when this KVM cannot say it for a VM.</summary>
    internal int ReadTscKhz() => Math.Max(0, KvmCall.Try(_vm, KvmAbi.KVM_GET_TSC_KHZ, 0));

    private void EnableCapability(int capability, ulong argument, string name)
    {
        var request = new kvm_enable_cap { cap = (uint)capability };
        request.args[0] = argument;
        KvmCall.Require(_vm, KvmAbi.KVM_ENABLE_CAP, (nint)(&request), "KVM_ENABLE_CAP " + name);
    }

    private void SetRegion(int slot, in MemorySlot memory)
    {
        uint flags = memory.LogDirty ? KvmAbi.KVM_MEM_LOG_DIRTY_PAGES : 0;
        flags |= memory.ReadOnly ? KvmAbi.KVM_MEM_READONLY : 0;
        var region = new kvm_userspace_memory_region
        {
            slot = (uint)slot,
            flags = memory.LengthBytes == 0 ? 0 : flags,
            guest_phys_addr = memory.GuestAddress,
            memory_size = memory.LengthBytes,
            userspace_addr = (ulong)memory.HostAddress,
        };
        if (KvmCall.Try(_vm, KvmAbi.KVM_SET_USER_MEMORY_REGION, (nint)(&region)) < 0)
        {
            throw KvmCall.Failure(
                $"map {memory.LengthBytes} bytes at {memory.GuestAddress:x} (slot {slot}, KVM_SET_USER_MEMORY_REGION)");
        }
    }

    private void SetKernelRoutes()
    {
        const int Pins = 24;
        const int Most = (Pins * 2) + 1;
        byte* buffer = stackalloc byte[sizeof(kvm_irq_routing) + (Most * sizeof(kvm_irq_routing_entry))];
        var header = (kvm_irq_routing*)buffer;
        var entries = (kvm_irq_routing_entry*)(buffer + sizeof(kvm_irq_routing));
        int count = 0;
        for (uint gsi = 0; gsi < Pins; gsi++)
        {
            uint isa = gsi == 2 ? 0 : gsi;
            if (isa < 8)
            {
                entries[count++] = Pin(gsi, KvmAbi.KVM_IRQCHIP_PIC_MASTER, isa);
            }
            else if (isa < 16)
            {
                entries[count++] = Pin(gsi, KvmAbi.KVM_IRQCHIP_PIC_SLAVE, isa - 8);
            }

            entries[count++] = Pin(gsi, KvmAbi.KVM_IRQCHIP_IOAPIC, gsi == 0 ? 2 : gsi);
        }

        *header = new kvm_irq_routing { nr = (uint)count };
        KvmCall.Require(_vm, KvmAbi.KVM_SET_GSI_ROUTING, (nint)buffer, "KVM_SET_GSI_ROUTING");
    }

    private static kvm_irq_routing_entry Pin(uint gsi, uint chip, uint pin) => new()
    {
        gsi = gsi,
        type = KvmAbi.KVM_IRQ_ROUTING_IRQCHIP,
        irqchip = new kvm_irq_routing_irqchip { irqchip = chip, pin = pin },
    };

    private void EnterLevelRoute(ulong address, uint data)
    {
        lock (_gate)
        {
            for (int i = 0; i < _levelRouteCount; i++)
            {
                if (_levelRoutes[i].MsiAddress == address && _levelRoutes[i].MsiData == data)
                {
                    return;
                }
            }

            int place = _nextLevelRoute;
            _levelRoutes[place] = new MsiRoute((uint)place, address, data);
            _nextLevelRoute = (place + 1) % _levelRoutes.Length;
            _levelRouteCount = Math.Max(_levelRouteCount, place + 1);
            PublishLevelRoutes();
        }
    }

    private void PublishLevelRoutes()
    {
        int count = _levelRouteCount;
        var buffer = new byte[sizeof(kvm_irq_routing) + (count * sizeof(kvm_irq_routing_entry))];

        // SAFETY: pinned, and sized for `count` entries just above.
        fixed (byte* start = buffer)
        {
            *(kvm_irq_routing*)start = new kvm_irq_routing { nr = (uint)count };
            var entries = (kvm_irq_routing_entry*)(start + sizeof(kvm_irq_routing));
            for (int i = 0; i < count; i++)
            {
                MsiRoute route = _levelRoutes[i];
                entries[i].gsi = route.Gsi;
                entries[i].type = KvmAbi.KVM_IRQ_ROUTING_MSI;
                entries[i].msi = new kvm_irq_routing_msi
                {
                    address_lo = (uint)route.MsiAddress,
                    address_hi = (uint)(route.MsiAddress >> 32),
                    data = route.MsiData,
                };
            }

            _ = KvmCall.Try(_vm, KvmAbi.KVM_SET_GSI_ROUTING, (nint)start);
        }
    }

    private bool Doorbell(
        ulong address, bool isPort, AccessWidth width, ulong? dataMatch, int eventFd, uint flags)
    {
        flags |= isPort ? KvmAbi.KVM_IOEVENTFD_FLAG_PIO : 0;
        flags |= dataMatch.HasValue ? KvmAbi.KVM_IOEVENTFD_FLAG_DATAMATCH : 0;
        var request = new kvm_ioeventfd
        {
            datamatch = dataMatch.GetValueOrDefault(),
            addr = address,
            len = (uint)width,
            fd = eventFd,
            flags = flags,
        };
        return KvmCall.Try(_vm, KvmAbi.KVM_IOEVENTFD, (nint)(&request)) >= 0;
    }

    private void SaveChip(StateWriter writer, string name, uint chip)
    {
        var state = new kvm_irqchip { chip_id = chip };
        KvmCall.Require(_vm, KvmAbi.KVM_GET_IRQCHIP, (nint)(&state), "KVM_GET_IRQCHIP");
        writer.WriteBytes(name, new ReadOnlySpan<byte>(state.chip, 512));
    }

    private void LoadChip(StateReader reader, string name, uint chip)
    {
        var state = new kvm_irqchip { chip_id = chip };
        reader.ReadBytes(name, new Span<byte>(state.chip, 512));
        KvmCall.Require(_vm, KvmAbi.KVM_SET_IRQCHIP, (nint)(&state), "KVM_SET_IRQCHIP");
    }
}

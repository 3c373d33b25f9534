// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;
using System.Threading;
using Vmm.Config;
using Vmm.Core;
using Vmm.Devices.Firmware;
using Vmm.Devices.Virtio;
using Vmm.Host;
using Vmm.Machine.Boot;

namespace Vmm.Machine;

// Theory. A doorbell is a write of the guest that wakes a device's worker. Where the driver of virtual processors can
// (KVM's ioeventfd), it signals an event descriptor that the worker sleeps on, and the vCPU goes on in the guest: no exit
// to this process, no thread of it between guest and worker. Elsewhere (the software CPU, whose vCPUs are threads of this
// process) the write reaches the card's register window, and the vCPU's thread does the work itself while that is quick;
// otherwise it sets a bit and pulses a monitor.
// One descriptor serves all queues of a card; the worker looks at each, which costs a read of guest memory per queue.
//
// Interrupts go the other way by one system call per message (KVM_SIGNAL_MSI). irqfd would need one too, a write, unless
// the signaller were in the kernel; so there is none here.

// Devices with memory-mapped registers lie in pages above the local APICs and below any firmware, each with a pin of the
// I/O APIC that nothing else uses; ACPI tells the guest (LNRO0005 is the identifier that Linux and others know). There are
// eight such pins. Their one doorbell register takes the number of a queue, which an event descriptor cannot tell, so it
// always comes to the registers.

/// <summary>Makes devices of VirtIO models for one VM, on the bus that its definition asks for.</summary>
internal sealed class VirtioCards
{
    private const uint FirstPage = 0xFEF1_0000;
    private const uint PageBytes = 0x1000;
    private const int FirstPin = 16;
    private const int MaxPlaces = 8;

    private readonly IVm _vm;
    private readonly bool _hasDoorbells;
    private readonly VirtioSpec _spec;
    private readonly AddressMap _mmio;
    private readonly IDmaPort _memory;
    private readonly InterruptWiring _interrupts;
    private readonly List<IAcpiNode> _places = [];
    private IIrqLine[]? _pins;

    /// <summary>Prepares.</summary>
    /// <param name="vm">The driver's VM.</param>
    /// <param name="capabilities">What the driver can.</param>
    /// <param name="spec">What the definition asks for.</param>
    /// <param name="mmio">Where registers are mapped.</param>
    /// <param name="memory">Guest memory.</param>
    /// <param name="interrupts">Pins of the I/O APIC.</param>
    public VirtioCards(
        IVm vm, HypervisorCapabilities capabilities, VirtioSpec spec, AddressMap mmio, IDmaPort memory, InterruptWiring interrupts)
    {
        _vm = vm;
        _hasDoorbells = capabilities.Doorbells;
        _spec = spec;
        _mmio = mmio;
        _memory = memory;
        _interrupts = interrupts;
    }

    /// <summary>The devices that ACPI tells of.</summary>
    public IReadOnlyList<IAcpiNode> Places => _places;

    /// <summary>Makes a device: a PCI card that is to be put on the bus, or one that has its place already.</summary>
    /// <param name="id">Its name.</param>
    /// <param name="model">Owned by the device.</param>
    /// <exception cref="BootException">There is no place left.</exception>
    public IDevice Make(string id, IVirtioModel model)
    {
        if (_spec.Transport == VirtioTransport.Mmio)
        {
            return Place(id, model);
        }

        var options = new VirtioOptions { Packed = _spec.Packed, QuickDoorbells = !_hasDoorbells };
        VirtioPciMode mode = _spec.Transport == VirtioTransport.Legacy ? VirtioPciMode.Legacy : VirtioPciMode.Transitional;
        return new VirtioPci(id, model, mode, options, _hasDoorbells ? new DoorbellSignal(_vm) : null);
    }

    private VirtioMmio Place(string id, IVirtioModel model)
    {
        int index = _places.Count;
        if (index == MaxPlaces)
        {
            throw new BootException($"virtio: transport mmio has room for {MaxPlaces} devices");
        }

        _pins ??= _interrupts.Pins();
        var options = new VirtioOptions { Packed = _spec.Packed, QuickDoorbells = true };
        var device = new VirtioMmio(new VirtioDevice(id, model, _memory, options), _pins[FirstPin + index]);
        var place = new MmioPlace(index, FirstPage + ((uint)index * PageBytes), (uint)(FirstPin + index));
        _mmio.Map(place.Address, device);
        _places.Add(place);
        return device;
    }

    /// <summary>What ACPI says of a device with memory-mapped registers.</summary>
    private sealed record MmioPlace(int Index, uint Address, uint Pin) : IAcpiNode
    {
        public void Describe(Aml systemBus) => systemBus.Device($"VIO{Index}", device => device
            .Name("_HID", "LNRO0005")
            .Name("_UID", (ulong)Index)
            .Name("_CRS", term => term.Resources(r => r.Memory32(Address, 0x200).Interrupts(Pin))));
    }
}

/// <summary>An event descriptor that a guest's doorbells signal.</summary>
internal sealed class DoorbellSignal : IDoorbellSignal
{
    private readonly IVm _vm;
    private readonly EventFd _event = new();
    private readonly List<ulong> _placed = [];
    private int _set;

    /// <summary>Makes one that lies nowhere.</summary>
    /// <exception cref="HostException">No descriptors are left.</exception>
    public DoorbellSignal(IVm vm) => _vm = vm;

    /// <inheritdoc/>
    public void Place(ulong? guestAddress, int count, uint strideBytes)
    {
        foreach (ulong address in _placed)
        {
            _vm.RemoveDoorbell(address, isPort: false, AccessWidth.Word, null, _event.Fd);
        }

        _placed.Clear();
        for (int i = 0; guestAddress is { } start && i < count; i++)
        {
            ulong address = start + ((uint)i * strideBytes);
            if (_vm.TryAddDoorbell(address, isPort: false, AccessWidth.Word, null, _event.Fd))
            {
                _placed.Add(address);
            }
        }
    }

    /// <inheritdoc/>
    public void Set()
    {
        if (Interlocked.Exchange(ref _set, 1) == 0)
        {
            _event.Signal();
        }
    }

    /// <inheritdoc/>
    public void Wait()
    {
        PollLoop.WaitReadable(_event.Handle, -1);

        // In this order: a Set after the first line signals anew.
        Interlocked.Exchange(ref _set, 0);
        _event.Drain();
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        Place(null, 0, 0);
        _event.Dispose();
    }
}

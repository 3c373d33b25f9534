// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Vmm.Backends.Block;
using Vmm.Core;
using Vmm.Devices.Firmware;
using Vmm.Devices.Pci;
using Vmm.Devices.Storage;
using Vmm.Devices.Virtio;
using Vmm.Memory;

namespace Vmm.Machine;

/// <summary>Executes instructions that a driver cannot (the plan's "completion").</summary>
internal interface ICompleter
{
    /// <summary>Executes the instruction at the vCPU's RIP and moves on.</summary>
    /// <returns>False, with a line for people, when it cannot be executed either.</returns>
    bool TryComplete(IVcpu vcpu, in VcpuExit exit, out string failure);

    /// <summary>Which instructions were executed how often, by mnemonic. Any thread.</summary>
    IReadOnlyDictionary<string, long> Counts { get; }
}

/// <summary>What MachineBuilder hands to a Machine.</summary>
internal sealed class MachineParts
{
    /// <summary>The driver; owned.</summary>
    public required IHypervisor Hypervisor { get; init; }

    /// <summary>The driver's VM; owned.</summary>
    public required IVm Vm { get; init; }

    /// <summary>The slots of the VM.</summary>
    public required MemorySlots Slots { get; init; }

    /// <summary>Makes cards of VirtIO models.</summary>
    public required VirtioCards Virtio { get; init; }

    /// <summary>Guest memory.</summary>
    public required GuestMemory Memory { get; init; }

    /// <summary>Where RAM lies.</summary>
    public required MemoryLayout Layout { get; init; }

    /// <summary>Guest time; owned.</summary>
    public required IMachineClock Clock { get; init; }

    /// <summary>Completion.</summary>
    public required ICompleter Completer { get; init; }

    /// <summary>CPUID leaf 1's EAX.</summary>
    public uint CpuSignature { get; init; }

    /// <summary>The host's processor for each vCPU; empty: any.</summary>
    public required IReadOnlyList<int> Pin { get; init; }

    /// <summary>vCPUs; owned by their threads.</summary>
    public List<IVcpu> Vcpus { get; } = [];

    /// <summary>Interrupt ports of the vCPUs; empty unless the local APICs are ours.</summary>
    public List<ICpuInterruptPort> Ports { get; } = [];

    /// <summary>NMI pins of the local APICs that are ours; empty when the driver has them.</summary>
    public List<IIrqLine> NmiPins { get; } = [];

    /// <summary>Devices in the order of their making; owned.</summary>
    public List<IDevice> Devices { get; } = [];

    /// <summary>Memory that a snapshot holds; owned through <see cref="Resources"/>.</summary>
    public List<RamBlock> Blocks { get; } = [];

    /// <summary>RAM blocks and back ends; owned, disposed last.</summary>
    public List<IDisposable> Resources { get; } = [];

    /// <summary>What is wrong with the disks' tables.</summary>
    public List<MediaFinding> Findings { get; } = [];

    /// <summary>What devices add to the ACPI namespace.</summary>
    public List<IAcpiNode> AcpiNodes { get; } = [];

    /// <summary>CD-ROM drives by name, for changing media.</summary>
    public IReadOnlyDictionary<string, AtapiCdrom> Cdroms { get; set; } = new Dictionary<string, AtapiCdrom>(StringComparer.Ordinal);

    /// <summary>What a viewer sees, or null.</summary>
    public IDisplaySurface? Display { get; set; }

    /// <summary>The memory balloon, or null.</summary>
    public VirtioBalloon? Balloon { get; set; }

    /// <summary>Presses the power button; false when the guest does not listen.</summary>
    public Func<bool>? PowerButton { get; set; }

    /// <summary>Adds a device, and puts it on the bus if it is a PCI card: a virtio-mmio device is none.</summary>
    /// <param name="bus">Where to.</param>
    /// <param name="card">The device.</param>
    /// <param name="slot">Its place; null for the next free one.</param>
    public void AddCard(PciBus bus, IDevice card, int? slot = null)
    {
        if (card is PciFunction function)
        {
            if (slot is { } place)
            {
                bus.Attach(function, place);
            }
            else
            {
                bus.AttachNext(function);
            }
        }

        Devices.Add(card);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Virtio;
using Vmm.Host;

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

/// <summary>Makes PCI cards of VirtIO models for one VM.</summary>
internal sealed class VirtioCards
{
    private readonly IVm _vm;
    private readonly bool _hasDoorbells;
    private readonly VirtioOptions _options;

    /// <summary>Prepares.</summary>
    public VirtioCards(IVm vm, HypervisorCapabilities capabilities)
    {
        _vm = vm;
        _hasDoorbells = capabilities.Doorbells;
        _options = new VirtioOptions { QuickDoorbells = !_hasDoorbells };
    }

    /// <summary>Makes a card.</summary>
    /// <param name="id">Its name.</param>
    /// <param name="model">Owned by the card.</param>
    public VirtioPci Make(string id, IVirtioModel model) => new(
        id, model, VirtioPciMode.Transitional, _options, _hasDoorbells ? new DoorbellSignal(_vm) : null);
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

// SPDX-License-Identifier: BSD-2-Clause
using System;
using Vmm.Core;
using Vmm.Memory;

namespace Vmm.Devices.Firmware;

// Theory. "Virtual Machine Generation ID" (Microsoft, 2012): 128 random bits in memory that change whenever the guest may
// go back in time, so that it throws away what must not be used twice (seeds, leases). The guest finds the address
// through an ACPI object and is told of a change by a general-purpose event. Here the bits have a page of their own
// outside of RAM, at a fixed address that the memory map calls reserved, so that firmware and direct boot find the
// same thing; and every load of a saved state counts as going back, also one that only moves a VM.

/// <summary>The device. See the theory at the top of this file.</summary>
public sealed class VmGenId : IDevice, IAcpiNode
{
    /// <summary>Where the page lies: above the local APICs, below any firmware.</summary>
    public const ulong Address = 0xFEF0_0000;

    /// <summary>The general-purpose event that tells of a change.</summary>
    public const int Event = 5;

    private readonly RamBlock _page;
    private readonly Func<Guid> _next;
    private readonly Action _onChanged;
    private bool _loaded;

    /// <summary>Makes the device with its first identifier.</summary>
    /// <param name="page">4 KiB that the machine maps read-only at <see cref="Address"/>.</param>
    /// <param name="next">Makes an identifier.</param>
    /// <param name="onChanged">Raises <see cref="Event"/>.</param>
    public VmGenId(RamBlock page, Func<Guid> next, Action onChanged)
    {
        ArgumentNullException.ThrowIfNull(page);
        ArgumentNullException.ThrowIfNull(next);
        _page = page;
        _next = next;
        _onChanged = onChanged;
        Renew();
    }

    /// <inheritdoc/>
    public string Id => "vmgenid";

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <inheritdoc/>
    public void Describe(Aml systemBus)
    {
        ArgumentNullException.ThrowIfNull(systemBus);
        systemBus.Device("VGEN", device => device
            .Name("_HID", "VMMG0001")
            .Name("_CID", "VM_Gen_Counter")
            .Name("_DDN", "VM_Gen_Counter")
            .Name("ADDR", term => term.Package(2, p => p.Integer(Address).Integer(0))));
        systemBus.Scope("\\_GPE", events => events.Method("_E05", 0, body => body.Notify("\\_SB.VGEN", 0x80)));
    }

    /// <inheritdoc/>
    public void Reset()
    {
    }

    /// <inheritdoc/>
    public void Pause()
    {
    }

    /// <summary>After a load: only now does memory hold what was saved.</summary>
    public void Resume()
    {
        if (_loaded)
        {
            _loaded = false;
            Renew();
            _onChanged();
        }
    }

    /// <inheritdoc/>
    public void Save(StateWriter writer)
    {
        // The page is saved as memory.
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version) => _loaded = true;

    /// <inheritdoc/>
    public void Dispose()
    {
    }

    private void Renew()
    {
        Span<byte> bytes = stackalloc byte[16];
        _next().TryWriteBytes(bytes);
        _ = _page.TryWrite(0, bytes, out _);
    }
}

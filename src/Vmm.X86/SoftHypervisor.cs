// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;
using Vmm.Core;

namespace Vmm.X86;

/// <summary>The software processor as a driver: works on every x86-64 host, needs no privilege.</summary>
public sealed class SoftHypervisor : IHypervisor
{
    /// <summary>Frequency of the guest's TSC: one tick a nanosecond.</summary>
    public const long TscKhz = 1_000_000;

    /// <inheritdoc/>
    public string Name => "soft";

    /// <inheritdoc/>
    public HypervisorCapabilities Capabilities { get; } = new()
    {
        MaxVcpus = 64,
        MaxMemorySlots = SlotTable.MaxSlots,
        IrqchipModes = [IrqchipMode.User],
        ReadOnlyMemory = true,
        FastKernelCode = true,
        TscKhz = TscKhz,
    };

    /// <inheritdoc/>
    public IReadOnlyList<CpuidEntry> SupportedCpuid { get; } = CpuidTable.Build();

    /// <inheritdoc/>
    public IReadOnlyList<uint> SavedMsrs => Msrs.Saved;

    /// <inheritdoc/>
    public IVm CreateVm(VmOptions options)
    {
        System.ArgumentNullException.ThrowIfNull(options);
        return new SoftVm(options, TscKhz);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
    }
}

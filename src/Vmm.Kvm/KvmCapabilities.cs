// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;
using System.Runtime.InteropServices;
using Vmm.Kvm.Abi;

namespace Vmm.Kvm;

/// <summary>What one KVM can do, asked once. Nothing in this assembly looks at versions or at the system's name.</summary>
internal sealed record KvmCapabilities
{
    /// <summary>The capabilities without which nothing works, with the names that messages use.</summary>
    internal static readonly (int Number, string Name)[] Required =
    [
        (KvmAbi.KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"),
        (KvmAbi.KVM_CAP_DESTROY_MEMORY_REGION_WORKS, "KVM_CAP_DESTROY_MEMORY_REGION_WORKS"),
        (KvmAbi.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS, "KVM_CAP_JOIN_MEMORY_REGIONS_WORKS"),
        (KvmAbi.KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID"),
        (KvmAbi.KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE"),
        (KvmAbi.KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS"),
    ];

    internal required int MaxVcpus { get; init; }

    internal required int MemorySlots { get; init; }

    internal required bool Irqchip { get; init; }

    internal required bool SplitIrqchip { get; init; }

    internal required bool SignalMsi { get; init; }

    internal required bool ReadOnlyMemory { get; init; }

    internal required bool IoEventFd { get; init; }

    internal required bool ImmediateExit { get; init; }

    internal required bool SetTssAddress { get; init; }

    internal required bool SetIdentityMap { get; init; }

    internal required bool AdjustClock { get; init; }

    internal required bool DebugRegisters { get; init; }

    internal required bool Xsave { get; init; }

    internal required bool Xcrs { get; init; }

    internal required bool GetTscKhz { get; init; }

    internal required bool VmTscControl { get; init; }

    internal required bool ExitOnEmulationFailure { get; init; }

    internal required ulong SyncRegisters { get; init; }

    /// <summary>Asks a device.</summary>
    internal static KvmCapabilities Probe(SafeHandle device)
    {
        int vcpus = Check(device, KvmAbi.KVM_CAP_MAX_VCPUS);
        if (vcpus <= 0)
        {
            // Older than KVM_CAP_MAX_VCPUS: the recommended number, and where even that is missing, 4 (api.rst).
            vcpus = Check(device, KvmAbi.KVM_CAP_NR_VCPUS);
            vcpus = vcpus > 0 ? vcpus : 4;
        }

        int slots = Check(device, KvmAbi.KVM_CAP_NR_MEMSLOTS);
        bool routing = Check(device, KvmAbi.KVM_CAP_IRQ_ROUTING) > 0;
        bool enableCap = Check(device, KvmAbi.KVM_CAP_ENABLE_CAP_VM) > 0;
        return new KvmCapabilities
        {
            MaxVcpus = vcpus,
            MemorySlots = slots > 0 ? slots : 32,
            Irqchip = routing && Check(device, KvmAbi.KVM_CAP_IRQCHIP) > 0,
            SplitIrqchip = routing && enableCap && Check(device, KvmAbi.KVM_CAP_SPLIT_IRQCHIP) > 0,
            SignalMsi = Check(device, KvmAbi.KVM_CAP_SIGNAL_MSI) > 0,
            ReadOnlyMemory = Check(device, KvmAbi.KVM_CAP_READONLY_MEM) > 0,
            IoEventFd = Check(device, KvmAbi.KVM_CAP_IOEVENTFD) > 0,
            ImmediateExit = Check(device, KvmAbi.KVM_CAP_IMMEDIATE_EXIT) > 0,
            SetTssAddress = Check(device, KvmAbi.KVM_CAP_SET_TSS_ADDR) > 0,
            SetIdentityMap = Check(device, KvmAbi.KVM_CAP_SET_IDENTITY_MAP_ADDR) > 0,
            AdjustClock = Check(device, KvmAbi.KVM_CAP_ADJUST_CLOCK) > 0,
            DebugRegisters = Check(device, KvmAbi.KVM_CAP_DEBUGREGS) > 0,
            Xsave = Check(device, KvmAbi.KVM_CAP_XSAVE) > 0,
            Xcrs = Check(device, KvmAbi.KVM_CAP_XCRS) > 0,
            GetTscKhz = Check(device, KvmAbi.KVM_CAP_GET_TSC_KHZ) > 0,
            VmTscControl = Check(device, KvmAbi.KVM_CAP_VM_TSC_CONTROL) > 0,
            ExitOnEmulationFailure = enableCap && Check(device, KvmAbi.KVM_CAP_EXIT_ON_EMULATION_FAILURE) > 0,
            SyncRegisters = (ulong)System.Math.Max(0, Check(device, KvmAbi.KVM_CAP_SYNC_REGS)),
        };
    }

    /// <summary>Names of required capabilities that a device lacks.</summary>
    internal static List<string> Missing(SafeHandle device)
    {
        var missing = new List<string>();
        foreach ((int number, string name) in Required)
        {
            if (Check(device, number) <= 0)
            {
                missing.Add(name);
            }
        }

        return missing;
    }

    internal static int Check(SafeHandle device, int capability) =>
        KvmCall.Try(device, KvmAbi.KVM_CHECK_EXTENSION, capability);
}

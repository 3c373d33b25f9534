// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Linq;
using Microsoft.Win32.SafeHandles;
using Vmm.Core;
using Vmm.Host;
using Vmm.Kvm.Abi;

namespace Vmm.Kvm;

// Theory. Vmm.Kvm turns a kernel's /dev/kvm into the first waist (IHypervisor). Three descriptors, three classes: the
// device (this one), a VM, a vCPU. The kernel may be Linux or FreeBSD or illumos with the module of this project;
// the numbers are the same and nothing here asks which it is. What a given kernel can do is asked once
// (KvmCapabilities) and every use of something optional has another way.
//
// Rules of the assembly:
// - A guest can cause no exception. Whatever KVM_RUN answers becomes an ExitKind; surprises become Failed with a line.
// - The exit path (KvmVcpu.Run) allocates nothing and takes no lock between two entries of the guest.
// - KVM_RUN is interrupted by signals all the time (the runtime suspends threads for collections with one); EINTR
//   means "go round again" unless a kick was asked for.
// - KVM_RUN must never be marked SuppressGCTransition: it would hold up every collection until the guest exits.
// - The kernel is trusted, the guest is not, and the shared run page is written by the kernel only.

/// <summary>The KVM device of this system.</summary>
public sealed unsafe class KvmSystem : IHypervisor
{
    /// <summary>Where the device is on all three systems.</summary>
    public const string DefaultPath = "/dev/kvm";

    private readonly SafeFileHandle _device;
    private readonly KvmCapabilities _probed;
    private readonly List<CpuidEntry> _cpuid;
    private readonly List<uint> _msrs;
    private bool _disposed;

    private KvmSystem(SafeFileHandle device)
    {
        _device = device;
        _probed = KvmCapabilities.Probe(device);
        RunPageBytes = KvmCall.Require(device, KvmAbi.KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE");
        if (RunPageBytes < sizeof(kvm_run))
        {
            throw new HypervisorException($"kvm: the vCPU area has {RunPageBytes} bytes, less than struct kvm_run");
        }

        _cpuid = KvmTables.ReadSupportedCpuid(device);
        _msrs = KvmTables.ReadSavedMsrs(device);
        bool messages = _probed.SignalMsi;
        var modes = new List<IrqchipMode> { IrqchipMode.User };
        if (_probed.SplitIrqchip && messages)
        {
            modes.Add(IrqchipMode.Split);
        }

        if (_probed.Irqchip && messages)
        {
            modes.Add(IrqchipMode.Kernel);
        }

        Capabilities = new HypervisorCapabilities
        {
            MaxVcpus = _probed.MaxVcpus,
            MaxMemorySlots = _probed.MemorySlots,
            IrqchipModes = modes,
            ReadOnlyMemory = _probed.ReadOnlyMemory,
            Doorbells = _probed.IoEventFd,
            TscKhz = KvmProbe.ReadTscKhz(device, _probed),
        };
    }

    /// <inheritdoc/>
    public string Name => "kvm";

    /// <inheritdoc/>
    public HypervisorCapabilities Capabilities { get; private set; }

    /// <inheritdoc/>
    public IReadOnlyList<CpuidEntry> SupportedCpuid => _cpuid;

    /// <inheritdoc/>
    public IReadOnlyList<uint> SavedMsrs => _msrs;

    internal SafeFileHandle Device => _device;

    internal KvmCapabilities Probed => _probed;

    internal int RunPageBytes { get; }

    /// <summary>Opens the device and asks what it can do.</summary>
    /// <param name="path">The device.</param>
    /// <param name="measureSpeed">
    /// Find out <see cref="HypervisorCapabilities.FastKernelCode"/>: free where the processor has VMX or SVM, otherwise
    /// a loop of a few milliseconds. Without it the answer is an untested true.
    /// </param>
    /// <exception cref="HypervisorException">The device is not usable; <see cref="KvmProbe.Diagnose"/> says more.</exception>
    public static KvmSystem Open(string path = DefaultPath, bool measureSpeed = true)
    {
        SafeFileHandle device;
        try
        {
            device = FileIo.OpenDevice(path);
        }
        catch (HostException exception)
        {
            throw new HypervisorException($"kvm: {exception.Message}", exception);
        }

        try
        {
            int version = KvmCall.Require(device, KvmAbi.KVM_GET_API_VERSION, 0, $"{path} is not a KVM device");
            if (version != KvmAbi.KVM_API_VERSION)
            {
                throw new HypervisorException($"kvm: {path} speaks API version {version}, 12 is needed");
            }

            List<string> missing = KvmCapabilities.Missing(device);
            if (missing.Count > 0)
            {
                throw new HypervisorException($"kvm: {path} lacks {string.Join(", ", missing)}");
            }

            var system = new KvmSystem(device);
            if (measureSpeed && !KvmProbe.ProcessorHasVirtualization)
            {
                double mips = KvmProbe.MeasureKernelMips(system);
                system.Capabilities = system.Capabilities with
                {
                    FastKernelCode = mips >= KvmProbe.FastKernelMips,
                };
            }

            return system;
        }
        catch
        {
            device.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public IVm CreateVm(VmOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        ObjectDisposedException.ThrowIf(_disposed, this);
        if (!Capabilities.IrqchipModes.Contains(options.Irqchip))
        {
            throw new HypervisorException(
                $"kvm: irqchip mode {options.Irqchip} is not supported here; "
                + $"there is {string.Join(", ", Capabilities.IrqchipModes)}");
        }

        return new KvmVm(this, options);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _disposed = true;
        _device.Dispose();
    }
}

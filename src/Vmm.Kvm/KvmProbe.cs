// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics.X86;
using Microsoft.Win32.SafeHandles;
using Vmm.Core;
using Vmm.Host;
using Vmm.Kvm.Abi;

namespace Vmm.Kvm;

/// <summary>What <see cref="KvmProbe.Diagnose"/> found.</summary>
public enum KvmStatus
{
    /// <summary>Works, and guest kernels run on the processor.</summary>
    Fast,

    /// <summary>Works, but guest kernel code is emulated.</summary>
    Slow,

    /// <summary>There is no device.</summary>
    NoDevice,

    /// <summary>There is a device that this user may not open.</summary>
    NoPermission,

    /// <summary>Another program keeps the processor's virtualization, or the device answered something else.</summary>
    Unusable,

    /// <summary>A different interface version.</summary>
    WrongVersion,

    /// <summary>A capability that this program needs is missing.</summary>
    MissingCapability,
}

/// <summary>Whether this system's KVM can be used, and if not, why and what to do.</summary>
/// <param name="Status">The finding.</param>
/// <param name="Summary">One line.</param>
/// <param name="Advice">One line that says what to do; null when there is nothing to do.</param>
public sealed record KvmDiagnosis(KvmStatus Status, string Summary, string? Advice)
{
    /// <summary>A VM can be run on it.</summary>
    public bool IsUsable => Status is KvmStatus.Fast or KvmStatus.Slow;
}

// Theory. Some hosts offer a /dev/kvm without VMX or SVM behind it (KVM-PVM): user code of the guest runs on the
// processor, kernel code is emulated at about 1.4 million instructions a second. It works, but the software CPU beats
// it. No capability tells; so on a processor that shows neither VMX nor SVM, and only there, a short ring-0 loop is
// timed once.

/// <summary>Finds out whether and how well this system's KVM works.</summary>
public static unsafe class KvmProbe
{
    /// <summary>Guest kernel code at or above this speed (million instructions a second) counts as fast.</summary>
    public const double FastKernelMips = 20;

    /// <summary>The processor of this (possibly virtual) machine shows VMX or SVM.</summary>
    public static bool ProcessorHasVirtualization
    {
        get
        {
            if (!X86Base.IsSupported)
            {
                return false;
            }

            const int Vmx = 1 << 5;
            const int Svm = 1 << 2;
            bool hasVmx = (X86Base.CpuId(1, 0).Ecx & Vmx) != 0;
            bool hasExtended = (uint)X86Base.CpuId(unchecked((int)0x80000000), 0).Eax >= 0x80000001;
            return hasVmx || (hasExtended && (X86Base.CpuId(unchecked((int)0x80000001), 0).Ecx & Svm) != 0);
        }
    }

    /// <summary>Examines the device. Takes a few milliseconds; never throws.</summary>
    /// <param name="path">The device.</param>
    public static KvmDiagnosis Diagnose(string path = KvmSystem.DefaultPath)
    {
        SafeFileHandle device;
        try
        {
            device = FileIo.OpenDevice(path);
        }
        catch (HostException exception)
        {
            return DiagnoseOpen(path, exception);
        }

        using (device)
        {
            int version = KvmCall.Try(device, KvmAbi.KVM_GET_API_VERSION, 0);
            if (version < 0)
            {
                return new KvmDiagnosis(
                    KvmStatus.Unusable, $"{path} is not a KVM device ({HostException.Describe(Ioctl.LastRawErrno)})", null);
            }

            if (version != KvmAbi.KVM_API_VERSION)
            {
                return new KvmDiagnosis(
                    KvmStatus.WrongVersion, $"{path} speaks API version {version}; 12 is needed", "use a kernel with API version 12");
            }

            List<string> missing = KvmCapabilities.Missing(device);
            if (missing.Count > 0)
            {
                return new KvmDiagnosis(
                    KvmStatus.MissingCapability, $"{path} lacks {string.Join(", ", missing)}", "use a newer kernel or module");
            }
        }

        try
        {
            using KvmSystem system = KvmSystem.Open(path, measureSpeed: false);
            double mips = MeasureKernelMips(system);
            return mips >= FastKernelMips || ProcessorHasVirtualization
                ? new KvmDiagnosis(KvmStatus.Fast, $"{path} works and runs guest kernels on the processor", null)
                : new KvmDiagnosis(
                    KvmStatus.Slow,
                    $"{path} works, but there is no VMX or SVM behind it: guest kernel code is emulated at "
                    + $"{mips:0.0} MIPS",
                    "`accel: soft` is faster here; for speed enable (nested) virtualization of this machine");
        }
        catch (HypervisorException exception)
        {
            return new KvmDiagnosis(
                KvmStatus.Unusable,
                exception.Message,
                ProcessorHasVirtualization
                    ? "another hypervisor may hold the processor's virtualization"
                    : "the processor shows neither VMX nor SVM: enable virtualization in the firmware or host");
        }
    }

    /// <summary>Times a ring-0 loop without exits in it.</summary>
    /// <returns>Million guest instructions a second.</returns>
    internal static double MeasureKernelMips(KvmSystem system)
    {
        const int Turns = 4000;
        const uint CodeAddress = 0x1000;
        const ushort Port = 0x10;

        // start: mov ecx, Turns; again: dec ecx; jnz again; out Port, al; jmp start
        ReadOnlySpan<byte> code =
            [0xB9, Turns & 0xFF, Turns >> 8, 0, 0, 0xFF, 0xC9, 0x75, 0xFC, 0xE6, (byte)Port, 0xEB, 0xF3];
        using HostMemory memory = HostMemory.Allocate(64 << 10, hugePages: false);
        memory.WriteSpan(CodeAddress, code);
        var stamps = new StampWindow();
        var ports = new AddressMap("io", 0x10000);
        ports.Map(Port, stamps);
        using IVm vm = system.CreateVm(new VmOptions
        {
            Ports = ports,
            Mmio = new AddressMap("mmio", 0),
            Clock = new NoClock(),
        });
        vm.SetMemorySlot(0, new MemorySlot(0, 64 << 10, memory.Address, false, false, 0));
        using IVcpu vcpu = vm.CreateVcpu(0, null);
        stamps.Vcpu = vcpu;
        var state = new CpuState();
        vcpu.ReadState(state);
        state.Cr0 |= 1;
        for (int i = 0; i < 6; i++)
        {
            uint rights = i == 1 ? 0xC09Bu : 0xC093;
            state.Segments[i] = new SegmentState { Selector = 8, Limit = uint.MaxValue, Rights = rights };
        }

        state.Rip = CodeAddress;
        vcpu.WriteState(state);
        VcpuExit exit = default;
        while (!stamps.IsDone && vcpu.Run(ref exit) == ExitKind.Interrupted)
        {
        }

        double seconds = Stopwatch.GetElapsedTime(stamps.First, stamps.Second).TotalSeconds;
        return stamps.IsDone ? Turns * 2 / Math.Max(seconds, 1e-9) / 1e6 : 0;
    }

    /// <summary>Frequency of the time stamp counter that guests see, in kHz; 0 when it cannot be found out.</summary>
    internal static long ReadTscKhz(SafeHandle device, KvmCapabilities has)
    {
        if (!has.GetTscKhz && !has.VmTscControl)
        {
            return 0;
        }

        int fd = KvmCall.Require(device, KvmAbi.KVM_CREATE_VM, 0, "KVM_CREATE_VM");
        using var vm = new SafeFileHandle(fd, ownsHandle: true);
        if (has.VmTscControl)
        {
            int khz = KvmCall.Try(vm, KvmAbi.KVM_GET_TSC_KHZ, 0);
            if (khz > 0)
            {
                return khz;
            }
        }

        fd = KvmCall.Require(vm, KvmAbi.KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU");
        using var vcpu = new SafeFileHandle(fd, ownsHandle: true);
        return Math.Max(0, KvmCall.Try(vcpu, KvmAbi.KVM_GET_TSC_KHZ, 0));
    }

    private static KvmDiagnosis DiagnoseOpen(string path, HostException exception)
    {
        switch (exception.Error)
        {
            case Errno.ENOENT or Errno.ENXIO or Errno.ENODEV:
                string advice = ProcessorHasVirtualization
                    ? "load the kernel module (Linux: modprobe kvm_intel or kvm_amd; FreeBSD and illumos: this project's kvm)"
                    : "the processor shows neither VMX nor SVM: enable virtualization in the firmware or host";
                return new KvmDiagnosis(KvmStatus.NoDevice, $"there is no {path}", advice);
            case Errno.EACCES or Errno.EPERM:
                return new KvmDiagnosis(
                    KvmStatus.NoPermission, $"{path} may not be opened by this user", AdvisePermission(path));
            default:
                return new KvmDiagnosis(KvmStatus.Unusable, exception.Message, null);
        }
    }

    private static string AdvisePermission(string path)
    {
        string? group = HostFiles.TryGetGroupName(path);
        return group is null
            ? $"give your user read and write permission on {path}"
            : $"join the group `{group}` (for example: sudo usermod -aG {group} $USER) and log in again";
    }

    // Notes when the guest first and second came by, then ends the run. The first turn warms everything up.
    private sealed class StampWindow : IRegisterWindow
    {
        private int _count;

        public uint Length => 1;

        internal IVcpu? Vcpu { get; set; }

        internal long First { get; private set; }

        internal long Second { get; private set; }

        internal bool IsDone => _count >= 2;

        public ulong Read(uint offset, AccessWidth width) => 0;

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            switch (_count++)
            {
                case 0:
                    First = Stopwatch.GetTimestamp();
                    break;
                case 1:
                    Second = Stopwatch.GetTimestamp();
                    Vcpu!.Kick();
                    break;
            }
        }
    }

    private sealed class NoClock : IClock
    {
        public long NowNs => 0;

        public long UnixTimeNs => 0;

        public IGuestTimer CreateTimer(string name, Action onExpire) => throw new NotSupportedException();
    }
}

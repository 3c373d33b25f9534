// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Kvm;

/// <summary>Requests to KVM descriptors, with failures as <see cref="HypervisorException"/>.</summary>
internal static class KvmCall
{
    /// <summary>A request that must not fail.</summary>
    /// <param name="file">Device, VM or vCPU.</param>
    /// <param name="request">Linux's number.</param>
    /// <param name="argument">A value or an address.</param>
    /// <param name="name">For the message: KVM's own name of the request.</param>
    internal static int Require(SafeHandle file, uint request, nint argument, string name)
    {
        int result = Try(file, request, argument);
        return result >= 0 ? result : throw Failure(name);
    }

    /// <summary>A request that may fail: -1, and <see cref="Ioctl.LastError"/> says why.</summary>
    internal static int Try(SafeHandle file, uint request, nint argument)
    {
        int result;
        do
        {
            result = Ioctl.InvokeKvm((int)file.DangerousGetHandle(), request, argument);
        }
        while (result < 0 && Ioctl.LastError == Errno.EINTR);
        GC.KeepAlive(file);
        return result;
    }

    /// <summary>What to throw after a failed request.</summary>
    internal static HypervisorException Failure(string name) =>
        new($"kvm: {name}: {HostException.Describe(Ioctl.LastRawErrno)}");
}

// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.InteropServices;
using Vmm.Host.Native;

namespace Vmm.Host;

/// <summary>
/// Device control requests. Two kinds: <see cref="Invoke"/> passes a request of this system as it is;
/// <see cref="InvokeKvm"/> passes a KVM request under Linux's number on every system (see
/// <see cref="OsAbi.IoctlTunnelRequest"/>). Both return what the system returned, -1 with an error.
/// </summary>
public static unsafe class Ioctl
{
    private static readonly uint s_tunnel = OsAbi.Current.IoctlTunnelRequest;

    /// <summary>The raw error number of the last call on this thread that returned -1.</summary>
    public static int LastRawErrno => Marshal.GetLastPInvokeError();

    /// <summary>The error of the last call on this thread that returned -1.</summary>
    public static Errno LastError => OsAbi.Current.ToErrno(Marshal.GetLastPInvokeError());

    /// <summary>ioctl(2). Does not retry on EINTR: for KVM_RUN that is an answer.</summary>
    /// <param name="fd">An open descriptor; the caller keeps it open.</param>
    /// <param name="request">The request as this system numbers it.</param>
    /// <param name="argument">A value, or the address of the request's structure.</param>
    public static int Invoke(int fd, uint request, nint argument) => LibC.ioctl(fd, request, argument);

    /// <summary>A KVM request under Linux's number.</summary>
    /// <param name="fd">A descriptor of the KVM device, of a VM or of a vCPU.</param>
    /// <param name="request">Linux's 32-bit request number.</param>
    /// <param name="argument">A value, or the address of the request's structure.</param>
    public static int InvokeKvm(int fd, uint request, nint argument)
    {
        if (s_tunnel == 0)
        {
            return LibC.ioctl(fd, request, argument);
        }

        // SAFETY: the pair lives on this stack during the call and is 16 bytes, as the tunnel request encodes.
        ulong* pair = stackalloc ulong[2];
        pair[0] = request;
        pair[1] = (ulong)argument;
        return LibC.ioctl(fd, s_tunnel, (nint)pair);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using Vmm.Host.Native;

namespace Vmm.Host;

/// <summary>A shared mapping of a descriptor (a vCPU's run page, a frame buffer). Unmapped when disposed.</summary>
public sealed class HostMapping : SafeBuffer
{
    private readonly nuint _length;

    private HostMapping(nint address, nuint length)
        : base(ownsHandle: true)
    {
        SetHandle(address);
        Initialize(length);
        _length = length;
    }

    /// <summary>Address of the first byte; valid until Dispose.</summary>
    public nint Address => handle;

    /// <summary>Maps the first bytes of a descriptor, readable and writable.</summary>
    /// <param name="file">An open descriptor; it may be closed afterwards.</param>
    /// <param name="lengthBytes">A positive number.</param>
    /// <exception cref="HostException">The system refused.</exception>
    public static HostMapping Map(SafeHandle file, long lengthBytes)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(lengthBytes);
        using var held = new HeldHandle(file);
        nint address = LibC.mmap(
            0, (nuint)lengthBytes, LibC.ProtRead | LibC.ProtWrite, LibC.MapShared, held.Fd, 0);
        return address != -1
            ? new HostMapping(address, (nuint)lengthBytes)
            : throw HostException.Last($"map {lengthBytes} bytes of a descriptor");
    }

    /// <inheritdoc/>
    protected override bool ReleaseHandle() => LibC.munmap(handle, _length) == 0;
}

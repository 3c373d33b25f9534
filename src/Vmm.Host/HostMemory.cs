// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;
using Vmm.Host.Native;

namespace Vmm.Host;

/// <summary>What stands behind a <see cref="HostMemory"/>.</summary>
public enum HostMemoryKind
{
    /// <summary>Anonymous memory of this process: huge pages where the system gives them. The usual choice.</summary>
    Private,

    /// <summary>Anonymous memory that a forked child would share. Huge pages only where the system allows it.</summary>
    Shared,

    /// <summary>An unnamed file in memory (memfd), so that another process can map it too.</summary>
    File,
}

// Theory. Guest RAM is one mapping of this process, with an inaccessible page before and after it, so that a stray
// access of one off-by-one faults instead of hitting a neighbour. Pages are not reserved or touched in advance: a
// guest with 64 GiB costs what it uses. The mapping is kept out of core dumps (it would make them as large as the
// guest) and out of forked children (a kernel driver that holds these pages must not see them copied on write).
//
// HostMemory is a SafeBuffer, so that Vmm.Memory, which may not see this assembly, can own it through the base class
// library's type. It is released when the last holder lets go; the address is then invalid.

/// <summary>A page-aligned, zero-filled piece of this process's memory with guard pages around it.</summary>
public sealed class HostMemory : SafeBuffer
{
    private readonly SafeFileHandle? _file;
    private readonly HostMemoryKind _kind;
    private readonly nuint _length;

    private HostMemory(nint address, nuint length, HostMemoryKind kind, SafeFileHandle? file)
        : base(ownsHandle: true)
    {
        SetHandle(address);
        Initialize(length);
        _length = length;
        _kind = kind;
        _file = file;
    }

    /// <summary>Address of the first byte. Valid until <see cref="SafeHandle.Dispose()"/>.</summary>
    public nint Address => handle;

    /// <summary>Length in bytes; a multiple of the page size.</summary>
    public long LengthBytes => (long)_length;

    /// <summary>The file behind it, for <see cref="HostMemoryKind.File"/>.</summary>
    public SafeFileHandle? File => _file;

    /// <summary>Maps memory.</summary>
    /// <param name="lengthBytes">A positive multiple of the page size.</param>
    /// <param name="kind">What stands behind it.</param>
    /// <param name="hugePages">Ask for huge pages; never fails because of it.</param>
    /// <exception cref="HostException">The system refused (address space, limits, overcommit).</exception>
    /// <exception cref="ArgumentOutOfRangeException">The length is not a positive multiple of the page size.</exception>
    public static unsafe HostMemory Allocate(
        long lengthBytes, HostMemoryKind kind = HostMemoryKind.Private, bool hugePages = true)
    {
        long page = Environment.SystemPageSize;
        if (lengthBytes <= 0 || lengthBytes % page != 0 || lengthBytes > long.MaxValue / 2)
        {
            throw new ArgumentOutOfRangeException(nameof(lengthBytes), lengthBytes, "not a multiple of the page size");
        }

        OsAbi abi = OsAbi.Current;
        nuint length = (nuint)lengthBytes;

        // The reservation is a huge page larger than needed, so that the memory can start on a 2 MiB border: only
        // then can host huge pages back guest huge pages.
        const long HugePage = 2L << 20;
        long slack = hugePages && lengthBytes >= HugePage ? HugePage : page;
        nuint reserved = (nuint)(lengthBytes + slack + page);
        nint area = LibC.mmap(
            0, reserved, LibC.ProtNone, LibC.MapPrivate | abi.MapAnonymous | abi.MapNoReserve, -1, 0);
        if (area == -1)
        {
            throw HostException.Last($"reserve {lengthBytes >> 20} MiB of address space");
        }

        nint address = (nint)((area + page + slack - 1) & ~(slack - 1));
        if (slack == page)
        {
            address = area + (nint)page;
        }

        SafeFileHandle? file = null;
        try
        {
            int fd = -1;
            int flags = LibC.MapFixed;
            if (kind == HostMemoryKind.File)
            {
                file = CreateFile(lengthBytes);
                fd = (int)file.DangerousGetHandle();
                flags |= LibC.MapShared;
            }
            else
            {
                flags |= abi.MapAnonymous | abi.MapNoReserve;
                flags |= kind == HostMemoryKind.Shared ? LibC.MapShared : LibC.MapPrivate;
            }

            if (LibC.mmap(address, length, LibC.ProtRead | LibC.ProtWrite, flags, fd, 0) == -1)
            {
                throw HostException.Last($"map {lengthBytes >> 20} MiB of memory");
            }
        }
        catch
        {
            _ = LibC.munmap(area, reserved);
            file?.Dispose();
            throw;
        }

        // Give back what the alignment did not use; one guard page stays on each side.
        Trim(area, address - (nint)page);
        Trim(address + (nint)length + (nint)page, area + (nint)reserved);

        // Advice: refusals change speed or dump size only.
        Advise(address, length, hugePages ? abi.AdviseHugePages : 0);
        Advise(address, length, abi.AdviseDontFork);
        Advise(address, length, abi.AdviseDontDump);
        return new HostMemory(address, length, kind, file);
    }

    /// <summary>
    /// Gives pages back to the system. On Linux they read as zeroes afterwards; elsewhere as zeroes or as before.
    /// </summary>
    /// <param name="offsetBytes">From the start; a multiple of the page size.</param>
    /// <param name="lengthBytes">A multiple of the page size.</param>
    /// <returns>False when the system has no such thing for this kind of memory.</returns>
    /// <exception cref="ArgumentOutOfRangeException">The range is not inside this memory or not page-aligned.</exception>
    public bool TryDiscard(long offsetBytes, long lengthBytes)
    {
        long page = Environment.SystemPageSize;
        bool inside = offsetBytes >= 0 && lengthBytes >= 0 && offsetBytes <= LengthBytes
            && lengthBytes <= LengthBytes - offsetBytes;
        if (!inside || offsetBytes % page != 0 || lengthBytes % page != 0)
        {
            throw new ArgumentOutOfRangeException(nameof(offsetBytes));
        }

        OsAbi abi = OsAbi.Current;
        int advice = _kind == HostMemoryKind.Private ? abi.AdviseDiscard : abi.AdviseRemove;
        return advice != 0 && LibC.madvise(handle + (nint)offsetBytes, (nuint)lengthBytes, advice) == 0;
    }

    /// <inheritdoc/>
    protected override bool ReleaseHandle()
    {
        nint page = Environment.SystemPageSize;
        _file?.Dispose();
        return LibC.munmap(handle - page, _length + (2 * (nuint)page)) == 0;
    }

    private static unsafe SafeFileHandle CreateFile(long lengthBytes)
    {
        if (!OsAbi.Current.HasMemfd)
        {
            throw new HostException("this system has no memfd_create; shared memory files are not available");
        }

        const uint CloseOnExec = 1;

        // SAFETY: the name is a constant with a terminating zero that lives in the image.
        int fd;
        fixed (byte* name = "vmm-ram\0"u8)
        {
            fd = LibC.memfd_create(name, CloseOnExec);
        }

        if (fd < 0)
        {
            throw HostException.Last("memfd_create");
        }

        var file = new SafeFileHandle(fd, ownsHandle: true);
        if (LibC.ftruncate(fd, lengthBytes) != 0)
        {
            HostException exception = HostException.Last($"size a memory file to {lengthBytes >> 20} MiB");
            file.Dispose();
            throw exception;
        }

        return file;
    }

    private static void Trim(nint from, nint to)
    {
        if (to > from)
        {
            _ = LibC.munmap(from, (nuint)(to - from));
        }
    }

    private static void Advise(nint address, nuint length, int advice)
    {
        if (advice != 0)
        {
            _ = LibC.madvise(address, length, advice);
        }
    }
}

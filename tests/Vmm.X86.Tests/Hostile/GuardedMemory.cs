// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;

namespace Vmm.X86.Tests.Hostile;

/// <summary>
/// Host memory for a guest between pages that nobody may touch: an access on either side ends the process. The guest's own
/// pages can be closed to writing, which proves that nothing writes to ROM either.
/// </summary>
internal sealed unsafe partial class GuardedMemory : IDisposable
{
    private const nint Page = 4096;
    private const nint GuardBytes = 256 << 20;
    private const int None = 0;
    private const int Read = 1;
    private const int ReadWrite = 3;
    private const int PrivateAnonymousNoReserve = 0x4022;
    private readonly nint _mapping;

    public GuardedMemory(int bytes)
    {
        Length = bytes;
        nint padded = Padded;
        _mapping = Map(0, padded + (2 * GuardBytes), None, PrivateAnonymousNoReserve, -1, 0);
        if (_mapping == -1)
        {
            throw new InvalidOperationException("mmap");
        }

        // The end lies at a guard page; the start does when the length is a multiple of a page.
        Address = _mapping + GuardBytes + padded - bytes;
        IsWritable = true;
    }

    public nint Address { get; }

    public int Length { get; }

    public Span<byte> Bytes => new((void*)Address, Length);

    /// <summary>Opens the pages to writing or closes them.</summary>
    public bool IsWritable
    {
        set
        {
            if (Protect(_mapping + GuardBytes, Padded, value ? ReadWrite : Read) != 0)
            {
                throw new InvalidOperationException("mprotect");
            }
        }
    }

    private nint Padded => (Length + Page - 1) & ~(Page - 1);

    public void Dispose() => _ = Unmap(_mapping, Padded + (2 * GuardBytes));

    [LibraryImport("libc", EntryPoint = "mmap", SetLastError = true)]
    private static partial nint Map(nint address, nint length, int protection, int flags, int fd, nint offset);

    [LibraryImport("libc", EntryPoint = "mprotect", SetLastError = true)]
    private static partial int Protect(nint address, nint length, int protection);

    [LibraryImport("libc", EntryPoint = "munmap", SetLastError = true)]
    private static partial int Unmap(nint address, nint length);
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using System.Threading;

namespace Vmm.Memory;

/// <summary>
/// A contiguous piece of host memory that can appear in guest-physical space: main RAM, a ROM image, a frame buffer. It
/// owns the host mapping and one <see cref="PageFlags"/> byte per 4 KiB page. All accesses are bounds-checked copies; no
/// reference or span over guest memory leaves this assembly.
/// </summary>
public sealed unsafe class RamBlock : IDisposable
{
    /// <summary>Bytes in a page.</summary>
    public const int PageBytes = 4096;

    private readonly SafeBuffer _buffer;
    private byte* _base;
    private byte* _flags;
    private int _disposed;

    /// <summary>Takes ownership of a mapping.</summary>
    /// <param name="name">For diagnostics and snapshots: "ram", "bios", "vram".</param>
    /// <param name="memory">Page-aligned host memory, at least <paramref name="lengthBytes"/> long.</param>
    /// <param name="lengthBytes">A multiple of 4096.</param>
    /// <exception cref="ArgumentOutOfRangeException">The length is no multiple of a page or exceeds the mapping.</exception>
    public RamBlock(string name, SafeBuffer memory, ulong lengthBytes)
    {
        ArgumentNullException.ThrowIfNull(memory);
        if (lengthBytes == 0 || lengthBytes % PageBytes != 0 || lengthBytes > memory.ByteLength)
        {
            throw new ArgumentOutOfRangeException(nameof(lengthBytes));
        }

        Name = name;
        LengthBytes = lengthBytes;
        _buffer = memory;
        byte* pointer = null;
        memory.AcquirePointer(ref pointer);
        _base = pointer;
        _flags = (byte*)NativeMemory.AllocZeroed((nuint)(((lengthBytes / PageBytes) + 7) & ~7UL));
    }

    /// <summary>Frees the mapping if the owner forgot.</summary>
    ~RamBlock()
    {
        Free();
    }

    /// <summary>For diagnostics and snapshots.</summary>
    public string Name { get; }

    /// <summary>Length, a multiple of 4096.</summary>
    public ulong LengthBytes { get; }

    /// <summary>Where it lies in this process.</summary>
    public nint HostAddress => (nint)_base;

    /// <summary>The first page's <see cref="PageFlags"/> byte.</summary>
    public nint PageFlagsAddress => (nint)_flags;

    /// <summary>Copies out.</summary>
    /// <returns>False when the range is not inside the block.</returns>
    public bool TryRead(ulong offset, Span<byte> into)
    {
        if (!Contains(offset, (ulong)into.Length))
        {
            return false;
        }

        // SAFETY: Contains checked offset + length against LengthBytes; the mapping lives until Dispose.
        new ReadOnlySpan<byte>(_base + offset, into.Length).CopyTo(into);
        return true;
    }

    /// <summary>Copies in and marks the pages written.</summary>
    /// <param name="offset">Offset in bytes.</param>
    /// <param name="from">The data.</param>
    /// <param name="before">The flags that the pages had; the caller acts on <see cref="PageFlags.Code"/>.</param>
    /// <returns>False when the range is not inside the block.</returns>
    public bool TryWrite(ulong offset, ReadOnlySpan<byte> from, out PageFlags before)
    {
        before = PageFlags.None;
        if (!Contains(offset, (ulong)from.Length))
        {
            return false;
        }

        // SAFETY: Contains checked offset + length against LengthBytes; the mapping lives until Dispose.
        from.CopyTo(new Span<byte>(_base + offset, from.Length));
        before = MarkWritten(offset, (ulong)from.Length);
        return true;
    }

    /// <summary>Sets the dirty bits of the pages of a range; out-of-range parts are ignored.</summary>
    /// <returns>The union of the flags that the pages had before.</returns>
    public PageFlags MarkWritten(ulong offset, ulong lengthBytes)
    {
        if (lengthBytes == 0 || !Contains(offset, lengthBytes))
        {
            return PageFlags.None;
        }

        // The data must be visible before the flags are read: a vCPU that decodes code sets Code first and reads the
        // bytes afterwards, so one of the two sees the other.
        Interlocked.MemoryBarrier();
        ulong last = (offset + lengthBytes - 1) / PageBytes;
        byte seen = 0;
        for (ulong page = offset / PageBytes; page <= last; page++)
        {
            // SAFETY: page < LengthBytes / PageBytes by the check above. The fast path spares a locked operation.
            byte* flag = _flags + page;
            byte old = Volatile.Read(ref *flag);
            seen |= old;
            if ((old & (byte)PageFlags.Written) != (byte)PageFlags.Written)
            {
                Or(page, (byte)PageFlags.Written);
            }
        }

        return (PageFlags)seen;
    }

    /// <summary>Gets one page's flags.</summary>
    public PageFlags GetFlags(ulong page) =>

        // SAFETY: bounds are checked in the same expression.
        page < LengthBytes / PageBytes ? (PageFlags)Volatile.Read(ref _flags[page]) : PageFlags.None;

    /// <summary>Atomically gets and clears some of a page's flags. Clear before reading the page's data.</summary>
    /// <returns>The cleared flags that were set.</returns>
    public PageFlags TakeFlags(ulong page, PageFlags mask)
    {
        if (page >= LengthBytes / PageBytes)
        {
            return PageFlags.None;
        }

        // SAFETY: page was checked against the number of pages.
        byte* flag = _flags + page;
        if ((Volatile.Read(ref *flag) & (byte)mask) == 0)
        {
            return PageFlags.None;
        }

        return (PageFlags)(And(page, (byte)~mask) & (byte)mask);
    }

    /// <summary>Merges a driver's dirty bitmap (bit n = page n from <paramref name="firstPage"/>) into the flags.</summary>
    public void MergeDirty(ulong firstPage, ReadOnlySpan<ulong> bitmap)
    {
        for (int word = 0; word < bitmap.Length; word++)
        {
            ulong bits = bitmap[word];
            while (bits != 0)
            {
                ulong page = firstPage + ((ulong)word * 64) + (ulong)System.Numerics.BitOperations.TrailingZeroCount(bits);
                bits &= bits - 1;
                if (page < LengthBytes / PageBytes)
                {
                    Or(page, (byte)PageFlags.Written);
                }
            }
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        Free();
        GC.SuppressFinalize(this);
    }

    /// <summary>True when the range lies inside the block.</summary>
    public bool Contains(ulong offset, ulong lengthBytes) => offset <= LengthBytes && lengthBytes <= LengthBytes - offset;

    // Interlocked has no byte operations, so these work on the aligned 32-bit word around the byte.
    private byte Or(ulong page, byte bits)
    {
        int shift = (int)(page & 3) * 8;

        // SAFETY: callers checked page; the array is padded to a multiple of 8 bytes.
        return (byte)(Interlocked.Or(ref *(int*)(_flags + (page & ~3UL)), bits << shift) >> shift);
    }

    private byte And(ulong page, byte bits)
    {
        int shift = (int)(page & 3) * 8;

        // SAFETY: callers checked page; the array is padded to a multiple of 8 bytes.
        return (byte)(Interlocked.And(ref *(int*)(_flags + (page & ~3UL)), (bits << shift) | ~(0xFF << shift)) >> shift);
    }

    private void Free()
    {
        if (Interlocked.Exchange(ref _disposed, 1) == 0)
        {
            _base = null;
            NativeMemory.Free(_flags);
            _flags = null;
            _buffer.ReleasePointer();
            _buffer.Dispose();
        }
    }
}

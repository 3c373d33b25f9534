// SPDX-License-Identifier: BSD-2-Clause
using System;
using Vmm.Core;
using Vmm.Host.Native;

namespace Vmm.Host;

/// <summary>
/// The memory side of a disk transfer: pieces of guest RAM, or a buffer of this process. A small value that can be
/// cut without copying, so that an image format can split a request at its own borders. Guest RAM is only ever copied
/// or handed to the kernel; nothing here forms a span over it that outlives one copy.
/// </summary>
public readonly struct IoBuffer
{
    private readonly GuestSlice[]? _slices;
    private readonly int _count;
    private readonly Memory<byte> _memory;
    private readonly long _skip;

    /// <summary>A buffer of this process.</summary>
    public IoBuffer(Memory<byte> memory)
    {
        _slices = null;
        _count = 0;
        _memory = memory;
        _skip = 0;
        Length = memory.Length;
    }

    /// <summary>Pieces of guest RAM; the first <paramref name="count"/> elements count.</summary>
    public IoBuffer(GuestSlice[] slices, int count)
    {
        ArgumentNullException.ThrowIfNull(slices);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(count, slices.Length);
        _slices = slices;
        _count = count;
        _memory = default;
        _skip = 0;
        long length = 0;
        for (int i = 0; i < count; i++)
        {
            length += slices[i].LengthBytes;
        }

        Length = length;
    }

    private IoBuffer(in IoBuffer whole, long skip, long length)
    {
        _slices = whole._slices;
        _count = whole._count;
        _memory = whole._memory;
        _skip = skip;
        Length = length;
    }

    /// <summary>Bytes.</summary>
    public long Length { get; }

    internal bool IsMemory => _slices is null;

    internal Span<byte> Span => _memory.Span.Slice((int)_skip, (int)Length);

    /// <summary>The data of a block request.</summary>
    public static IoBuffer Of(BlockRequest request)
    {
        ArgumentNullException.ThrowIfNull(request);
        return request.SliceCount > 0
            ? new IoBuffer(request.Slices, request.SliceCount)
            : new IoBuffer(request.Buffer);
    }

    /// <summary>A part.</summary>
    /// <exception cref="ArgumentOutOfRangeException">The part is not inside.</exception>
    public IoBuffer Slice(long offset, long length)
    {
        if (offset < 0 || length < 0 || offset > Length || length > Length - offset)
        {
            throw new ArgumentOutOfRangeException(nameof(offset));
        }

        return new IoBuffer(this, _skip + offset, length);
    }

    /// <summary>Fills the buffer from <paramref name="from"/>, which has the same length.</summary>
    public void CopyFrom(ReadOnlySpan<byte> from)
    {
        if (from.Length != Length)
        {
            throw new ArgumentException("lengths differ", nameof(from));
        }

        if (_slices is null)
        {
            from.CopyTo(Span);
            return;
        }

        long at = 0;
        foreach (LibC.IoVector piece in Pieces())
        {
            CopyIn(piece, from.Slice((int)at, (int)piece.Length));
            at += (long)piece.Length;
        }
    }

    /// <summary>Copies the buffer out to <paramref name="into"/>, which has the same length.</summary>
    public void CopyTo(Span<byte> into)
    {
        if (into.Length != Length)
        {
            throw new ArgumentException("lengths differ", nameof(into));
        }

        if (_slices is null)
        {
            Span.CopyTo(into);
            return;
        }

        long at = 0;
        foreach (LibC.IoVector piece in Pieces())
        {
            CopyOut(piece, into.Slice((int)at, (int)piece.Length));
            at += (long)piece.Length;
        }
    }

    /// <summary>Fills the buffer with zeroes.</summary>
    public void Clear()
    {
        if (_slices is null)
        {
            Span.Clear();
            return;
        }

        foreach (LibC.IoVector piece in Pieces())
        {
            ClearPiece(piece);
        }
    }

    /// <summary>Describes the bytes from <paramref name="at"/> on as an I/O vector.</summary>
    /// <returns>How many elements were filled; <paramref name="covered"/> says how many bytes they describe.</returns>
    internal int Describe(long at, Span<LibC.IoVector> vector, out long covered)
    {
        covered = 0;
        int used = 0;
        if (_slices is null)
        {
            return 0;
        }

        long skip = _skip + at;
        long left = Length - at;
        for (int i = 0; i < _count && left > 0 && used < vector.Length; i++)
        {
            GuestSlice slice = _slices[i];
            if (skip >= slice.LengthBytes)
            {
                skip -= slice.LengthBytes;
                continue;
            }

            long take = Math.Min(slice.LengthBytes - skip, left);
            vector[used++] = new LibC.IoVector { Base = slice.HostAddress + (nint)skip, Length = (nuint)take };
            covered += take;
            left -= take;
            skip = 0;
        }

        return used;
    }

    private LibC.IoVector[] Pieces()
    {
        var vector = new LibC.IoVector[_count];
        int used = Describe(0, vector, out _);
        return used == _count ? vector : vector[..used];
    }

    private static unsafe void CopyIn(in LibC.IoVector piece, ReadOnlySpan<byte> from)
    {
        // SAFETY: a GuestSlice names mapped RAM of exactly its length, which outlives every request (IDmaPort).
        from.CopyTo(new Span<byte>((void*)piece.Base, (int)piece.Length));
    }

    private static unsafe void CopyOut(in LibC.IoVector piece, Span<byte> into)
    {
        // SAFETY: a GuestSlice names mapped RAM of exactly its length, which outlives every request (IDmaPort).
        new ReadOnlySpan<byte>((void*)piece.Base, (int)piece.Length).CopyTo(into);
    }

    private static unsafe void ClearPiece(in LibC.IoVector piece)
    {
        // SAFETY: a GuestSlice names mapped RAM of exactly its length, which outlives every request (IDmaPort).
        new Span<byte>((void*)piece.Base, (int)piece.Length).Clear();
    }
}

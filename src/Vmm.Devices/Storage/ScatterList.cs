// SPDX-License-Identifier: BSD-2-Clause
using System;
using Vmm.Core;

namespace Vmm.Devices.Storage;

/// <summary>
/// The guest addresses of one transfer, as a controller found them in its descriptors, and the same as slices of RAM
/// for a back end. Reused from transfer to transfer. Not thread-safe: under the controller's gate.
/// </summary>
internal sealed class ScatterList
{
    // 65536 sectors in pieces of one page, and as many again for pieces that RAM regions cut in two.
    private const int MaxPieces = 32768;

    private (ulong Address, int Length)[] _pieces = new (ulong, int)[16];
    private GuestSlice[] _slices = new GuestSlice[16];
    private int _count;

    /// <summary>Bytes described.</summary>
    public long Length { get; private set; }

    /// <summary>The slices made by <see cref="TryResolve"/>.</summary>
    public GuestSlice[] Slices => _slices;

    /// <summary>How many of <see cref="Slices"/> count.</summary>
    public int SliceCount { get; private set; }

    public void Clear()
    {
        _count = 0;
        Length = 0;
        SliceCount = 0;
    }

    /// <summary>Appends a piece; one that continues the last is merged.</summary>
    /// <returns>False when there are too many.</returns>
    public bool TryAdd(ulong address, int length)
    {
        if (_count > 0)
        {
            ref (ulong Address, int Length) last = ref _pieces[_count - 1];
            if (last.Address + (uint)last.Length == address && last.Length <= int.MaxValue - length)
            {
                last.Length += length;
                Length += length;
                return true;
            }
        }

        if (_count == MaxPieces)
        {
            return false;
        }

        if (_count == _pieces.Length)
        {
            Array.Resize(ref _pieces, _count * 2);
        }

        _pieces[_count++] = (address, length);
        Length += length;
        return true;
    }

    /// <summary>Drops everything after a number of bytes.</summary>
    public void Trim(long length)
    {
        while (_count > 0 && Length > length)
        {
            ref (ulong Address, int Length) last = ref _pieces[_count - 1];
            long excess = Length - length;
            if (excess >= last.Length)
            {
                Length -= last.Length;
                _count--;
            }
            else
            {
                last.Length -= (int)excess;
                Length -= excess;
            }
        }
    }

    /// <summary>Finds the RAM behind the addresses.</summary>
    /// <returns>False when a byte lies outside (writable) RAM.</returns>
    public bool TryResolve(IDmaPort dma, bool forWrite)
    {
        SliceCount = 0;
        for (int i = 0; i < _count; i++)
        {
            (ulong address, int length) = _pieces[i];
            while (length > 0)
            {
                if (SliceCount == MaxPieces * 2 || !dma.TryGetSlice(address, length, forWrite, out GuestSlice slice)
                    || slice.LengthBytes <= 0)
                {
                    return false;
                }

                if (SliceCount == _slices.Length)
                {
                    Array.Resize(ref _slices, SliceCount * 2);
                }

                _slices[SliceCount++] = slice;
                address += (uint)slice.LengthBytes;
                length -= slice.LengthBytes;
            }
        }

        return true;
    }

    /// <summary>Copies bytes to the guest; fewer or more than described is not an error, the smaller counts.</summary>
    public bool TryScatter(IDmaPort dma, ReadOnlySpan<byte> from)
    {
        for (int i = 0; i < _count && !from.IsEmpty; i++)
        {
            int part = Math.Min(_pieces[i].Length, from.Length);
            if (!dma.TryWrite(_pieces[i].Address, from[..part]))
            {
                return false;
            }

            from = from[part..];
        }

        return true;
    }

    /// <summary>Copies bytes from the guest; the smaller of both lengths counts.</summary>
    public bool TryGather(IDmaPort dma, Span<byte> into)
    {
        for (int i = 0; i < _count && !into.IsEmpty; i++)
        {
            int part = Math.Min(_pieces[i].Length, into.Length);
            if (!dma.TryRead(_pieces[i].Address, into[..part]))
            {
                return false;
            }

            into = into[part..];
        }

        return true;
    }

    /// <summary>A back end has filled the slices.</summary>
    public void MarkWritten(IDmaPort dma)
    {
        for (int i = 0; i < _count; i++)
        {
            dma.MarkWritten(_pieces[i].Address, _pieces[i].Length);
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Collections.Immutable;
using System.Threading;
using Vmm.Core;

namespace Vmm.Memory;

// Theory. Guest-physical space is made of blocks of host memory (RamBlock) mapped at addresses: main RAM below and above
// the 4 GiB hole, ROMs, frame buffers in PCI BARs. Mappings may overlap; the one with the higher priority wins, which is
// how a ROM shadows RAM below 1 MiB and how the VGA window covers RAM. A mapping of kind Hole maps nothing: accesses there
// go to the MMIO address map.
//
// From the mappings a flat view is computed: sorted, non-overlapping, immutable, replaced as a whole. Readers take no
// lock. A subscriber (the machine) turns differences between two views into memory slots of the driver, so that a view
// with few ranges means few slots: neighbouring pieces of one block are joined.
//
// Rules for devices: guest memory is shared with hostile vCPUs, so it is copied once and the copy is checked. Nothing
// here throws on a bad guest address. Writes set the pages' dirty flags after the data, and where a page holds decoded
// code of the software CPU they report it through CodeWritten so that stale translations die.

/// <summary>What a guest may do with a mapping.</summary>
public enum RamAccess
{
    /// <summary>Read and write.</summary>
    ReadWrite,

    /// <summary>Reads come from the block, writes go to the MMIO map.</summary>
    ReadOnly,

    /// <summary>Nothing is mapped: reads and writes go to the MMIO map.</summary>
    Hole,
}

/// <summary>The token of a mapping.</summary>
public sealed class RamMapping
{
    internal RamMapping(ulong start, ulong length, RamBlock? block, ulong offset, RamAccess access, int priority, bool log)
    {
        GuestAddress = start;
        LengthBytes = length;
        Block = block;
        Offset = offset;
        Access = access;
        Priority = priority;
        LogDirty = log;
    }

    /// <summary>First guest-physical address.</summary>
    public ulong GuestAddress { get; }

    /// <summary>Length.</summary>
    public ulong LengthBytes { get; }

    /// <summary>The memory; null for a hole.</summary>
    public RamBlock? Block { get; }

    /// <summary>Offset of the first byte in the block.</summary>
    public ulong Offset { get; }

    /// <summary>What a guest may do.</summary>
    public RamAccess Access { get; }

    /// <summary>Higher wins.</summary>
    public int Priority { get; }

    /// <summary>The driver records guest writes.</summary>
    public bool LogDirty { get; }
}

/// <summary>A piece of the flat view.</summary>
/// <param name="GuestAddress">First guest-physical address.</param>
/// <param name="LengthBytes">Length.</param>
/// <param name="Block">The memory.</param>
/// <param name="Offset">Offset of the first byte in the block.</param>
/// <param name="ReadOnly">Guest writes go to the MMIO map.</param>
/// <param name="LogDirty">The driver records guest writes.</param>
public sealed record RamRange(
    ulong GuestAddress, ulong LengthBytes, RamBlock Block, ulong Offset, bool ReadOnly, bool LogDirty);

/// <summary>Guest-physical memory. Look-ups and copies are lock-free and thread-safe; changes are serialised.</summary>
public sealed class GuestMemory : IDmaPort
{
    private readonly Lock _gate = new();
    private readonly List<RamMapping> _mappings = [];
    private RamRange[] _view = [];
    private Action<ImmutableArray<RamRange>>? _viewChanged;
    private Action<ulong, ulong>? _codeWritten;
    private int _transactionDepth;

    /// <summary>The present flat view, sorted by address.</summary>
    public ImmutableArray<RamRange> View => [.. Volatile.Read(ref _view)];

    /// <summary>
    /// Sets who is told of a new view, on the thread that changed it and before the change returns; it is called at once
    /// with the present one.
    /// </summary>
    public void SetViewListener(Action<ImmutableArray<RamRange>> listener)
    {
        lock (_gate)
        {
            _viewChanged = listener;
            listener(View);
        }
    }

    /// <summary>
    /// Sets who is told (guest address, length) when a page that holds decoded code is written by anyone but a vCPU.
    /// </summary>
    public void SetCodeListener(Action<ulong, ulong> listener) => _codeWritten = listener;

    /// <summary>Maps a part of a block. Address, length and offset are multiples of 4096.</summary>
    /// <exception cref="ArgumentOutOfRangeException">The part lies outside the block or is misaligned.</exception>
    public RamMapping Map(
        ulong guestAddress,
        RamBlock block,
        ulong offset,
        ulong lengthBytes,
        RamAccess access = RamAccess.ReadWrite,
        int priority = 0,
        bool logDirty = false)
    {
        ArgumentNullException.ThrowIfNull(block);
        if (!block.Contains(offset, lengthBytes) || offset % RamBlock.PageBytes != 0)
        {
            throw new ArgumentOutOfRangeException(nameof(offset));
        }

        return Add(new RamMapping(guestAddress, lengthBytes, block, offset, access, priority, logDirty));
    }

    /// <summary>Maps a hole: accesses go to the MMIO map although a mapping of lower priority lies there.</summary>
    public RamMapping MapHole(ulong guestAddress, ulong lengthBytes, int priority) =>
        Add(new RamMapping(guestAddress, lengthBytes, null, 0, RamAccess.Hole, priority, false));

    /// <summary>Removes a mapping; unknown ones are ignored.</summary>
    public void Unmap(RamMapping mapping)
    {
        lock (_gate)
        {
            if (_mappings.Remove(mapping))
            {
                Publish();
            }
        }
    }

    /// <summary>Runs several changes with one new view at the end.</summary>
    public void Transaction(Action changes)
    {
        ArgumentNullException.ThrowIfNull(changes);
        lock (_gate)
        {
            _transactionDepth++;
            try
            {
                changes();
            }
            finally
            {
                _transactionDepth--;
                Publish();
            }
        }
    }

    /// <inheritdoc/>
    public bool TryRead(ulong address, Span<byte> into)
    {
        RamRange[] view = Volatile.Read(ref _view);
        while (into.Length > 0)
        {
            if (Find(view, address) is not { } range)
            {
                return false;
            }

            ulong inside = address - range.GuestAddress;
            int count = (int)Math.Min((ulong)into.Length, range.LengthBytes - inside);
            if (!range.Block.TryRead(range.Offset + inside, into[..count]))
            {
                return false;
            }

            into = into[count..];
            address += (uint)count;
        }

        return true;
    }

    /// <inheritdoc/>
    public bool TryWrite(ulong address, ReadOnlySpan<byte> from)
    {
        RamRange[] view = Volatile.Read(ref _view);
        while (from.Length > 0)
        {
            if (Find(view, address) is not { ReadOnly: false } range)
            {
                return false;
            }

            ulong inside = address - range.GuestAddress;
            int count = (int)Math.Min((ulong)from.Length, range.LengthBytes - inside);
            if (!range.Block.TryWrite(range.Offset + inside, from[..count], out PageFlags before))
            {
                return false;
            }

            if ((before & PageFlags.Code) != 0)
            {
                _codeWritten?.Invoke(address, (uint)count);
            }

            from = from[count..];
            address += (uint)count;
        }

        return true;
    }

    /// <inheritdoc/>
    public bool TryGetSlice(ulong address, int lengthBytes, bool forWrite, out GuestSlice slice)
    {
        RamRange[] view = Volatile.Read(ref _view);
        if (lengthBytes <= 0 || Find(view, address) is not { } range || (forWrite && range.ReadOnly))
        {
            slice = default;
            return false;
        }

        ulong inside = address - range.GuestAddress;
        int count = (int)Math.Min((ulong)lengthBytes, range.LengthBytes - inside);
        slice = new GuestSlice(range.Block.HostAddress + (nint)(range.Offset + inside), count);
        return true;
    }

    /// <inheritdoc/>
    public void MarkWritten(ulong address, int lengthBytes)
    {
        RamRange[] view = Volatile.Read(ref _view);
        ulong left = (ulong)Math.Max(lengthBytes, 0);
        while (left > 0 && Find(view, address) is { } range)
        {
            ulong inside = address - range.GuestAddress;
            ulong count = Math.Min(left, range.LengthBytes - inside);
            if ((range.Block.MarkWritten(range.Offset + inside, count) & PageFlags.Code) != 0)
            {
                _codeWritten?.Invoke(address, count);
            }

            left -= count;
            address += count;
        }
    }

    /// <summary>Finds the block behind an address.</summary>
    public bool TryFind(ulong address, out RamRange range)
    {
        RamRange? found = Find(Volatile.Read(ref _view), address);
        range = found!;
        return found is not null;
    }

    private static RamRange? Find(RamRange[] view, ulong address)
    {
        int low = 0;
        int high = view.Length - 1;
        while (low <= high)
        {
            int middle = (low + high) >>> 1;
            RamRange range = view[middle];
            if (address < range.GuestAddress)
            {
                high = middle - 1;
            }
            else if (address - range.GuestAddress >= range.LengthBytes)
            {
                low = middle + 1;
            }
            else
            {
                return range;
            }
        }

        return null;
    }

    private RamMapping Add(RamMapping mapping)
    {
        bool aligned = mapping.GuestAddress % RamBlock.PageBytes == 0 && mapping.LengthBytes % RamBlock.PageBytes == 0;
        if (!aligned || mapping.LengthBytes == 0 || mapping.GuestAddress > ulong.MaxValue - mapping.LengthBytes)
        {
            throw new ArgumentOutOfRangeException(nameof(mapping));
        }

        lock (_gate)
        {
            _mappings.Add(mapping);
            Publish();
        }

        return mapping;
    }

    // Called under the gate. As in AddressMap: cut at all borders, keep the winner, join neighbours.
    private void Publish()
    {
        if (_transactionDepth > 0)
        {
            return;
        }

        var borders = new SortedSet<ulong>();
        foreach (RamMapping mapping in _mappings)
        {
            borders.Add(mapping.GuestAddress);
            borders.Add(mapping.GuestAddress + mapping.LengthBytes);
        }

        var view = new List<RamRange>();
        ulong start = 0;
        bool first = true;
        foreach (ulong border in borders)
        {
            if (!first)
            {
                AddPiece(view, start, border - start);
            }

            start = border;
            first = false;
        }

        Volatile.Write(ref _view, view.ToArray());
        _viewChanged?.Invoke([.. view]);
    }

    private void AddPiece(List<RamRange> view, ulong start, ulong length)
    {
        RamMapping? winner = null;
        foreach (RamMapping mapping in _mappings)
        {
            bool covers = mapping.GuestAddress <= start && start - mapping.GuestAddress < mapping.LengthBytes;
            if (covers && (winner is null || mapping.Priority >= winner.Priority))
            {
                winner = mapping;
            }
        }

        if (winner?.Block is not { } block)
        {
            return;
        }

        ulong offset = winner.Offset + (start - winner.GuestAddress);
        bool readOnly = winner.Access == RamAccess.ReadOnly;
        if (view.Count > 0)
        {
            RamRange last = view[^1];
            if (last.GuestAddress + last.LengthBytes == start && last.Block == block
                && last.Offset + last.LengthBytes == offset && last.ReadOnly == readOnly && last.LogDirty == winner.LogDirty)
            {
                view[^1] = last with { LengthBytes = last.LengthBytes + length };
                return;
            }
        }

        view.Add(new RamRange(start, length, block, offset, readOnly, winner.LogDirty));
    }
}

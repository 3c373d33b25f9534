// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Block.Qcow2;

// Theory. Who owns which cluster of the file: a table of blocks of counts. The rule that keeps a crash harmless is
//
//     the count in the file is never smaller than the number of references in the file.
//
// Counts go up in memory when a cluster is taken and reach the file before anything that refers to the cluster (the
// image's flush sees to the order). Counts go down only after what referred to the cluster has left the file, also by
// way of a flush. So a count block may be written at any time, and what a crash can leave behind is only a cluster
// that nobody uses (a leak). A cluster is not taken again before its count has gone down, so nothing of the old state
// is overwritten while the file may still show it.
//
// Not thread-safe: under the image's metadata lock.

/// <summary>Reference counts and the allocator of clusters.</summary>
internal sealed class Qcow2Refcounts
{
    private readonly BlockFile _file;
    private readonly Qcow2Header _header;
    private readonly Qcow2TableCache _cache;
    private readonly int _order;
    private readonly int _entriesPerBlock;
    private readonly HashSet<long> _metadata;
    private readonly SortedSet<int> _newTableEntries = [];
    private ulong[] _table;
    private long _next;
    private long _highWater;

    public Qcow2Refcounts(BlockFile file, Qcow2Header header, HashSet<long> metadataClusters)
    {
        _file = file;
        _header = header;
        _metadata = metadataClusters;
        _order = header.RefcountOrder;
        _entriesPerBlock = (header.ClusterBytes * 8) >> _order;
        _cache = new Qcow2TableCache(file, header.ClusterBytes);
        _table = ReadTable();
        _highWater = (file.Length + header.ClusterBytes - 1) >> header.ClusterBits;
        _next = 0;
    }

    /// <summary>Clusters from here on were never used in this file: they read as zeroes.</summary>
    public long HighWater => _highWater;

    public int TableEntries => _table.Length;

    public int EntriesPerBlock => _entriesPerBlock;

    public bool IsCrowded => _cache.IsCrowded;

    public IEnumerable<Qcow2Table> Blocks => _cache.Tables;

    public long BlockOffset(int index) => (long)_table[index];

    /// <summary>Allocate only from here on (while counts are being rebuilt).</summary>
    public void AllocateFrom(long cluster) => _next = Math.Max(_next, cluster);

    public ulong Get(long cluster)
    {
        Qcow2Table? block = FindBlock(cluster, out int slot);
        return block is null ? 0 : GetSlot(block, slot);
    }

    /// <summary>Sets a count outright; for repairs and new images.</summary>
    public void Set(long cluster, ulong value)
    {
        Qcow2Table? block = FindBlock(cluster, out int slot);
        if (block is null)
        {
            if (value == 0)
            {
                return;
            }

            block = MakeBlock(cluster, out slot);
        }

        SetSlot(block, slot, value);
    }

    /// <summary>One reference less. A count of zero already is damage that was there before: nothing happens.</summary>
    /// <returns>True when the cluster is free now.</returns>
    public bool Release(long cluster)
    {
        ulong count = Get(cluster);
        if (count == 0)
        {
            return false;
        }

        Set(cluster, count - 1);
        if (count == 1)
        {
            _metadata.Remove(cluster);
            _next = Math.Min(_next, cluster);
        }

        return count == 1;
    }

    /// <summary>Takes a free cluster; its count is 1 afterwards.</summary>
    /// <param name="isFresh">Never used before: reads as zeroes.</param>
    /// <returns>Index of the cluster.</returns>
    public long Allocate(out bool isFresh)
    {
        while (true)
        {
            long cluster = FindFree();
            if (FindBlock(cluster, out _) is null)
            {
                // Takes a cluster for the block itself, perhaps this one: look again.
                _ = MakeBlock(cluster, out _);
                continue;
            }

            Set(cluster, 1);
            isFresh = cluster >= _highWater;
            _highWater = Math.Max(_highWater, cluster + 1);
            _next = cluster + 1;
            return cluster;
        }
    }

    /// <summary>Writes every changed block in place. The caller syncs, then calls <see cref="PublishBlocks"/>.</summary>
    public bool WriteBlocks()
    {
        bool wrote = false;
        foreach (Qcow2Table block in _cache.Tables)
        {
            if (block.IsDirty)
            {
                Check(_file.Write(block.Offset, (ReadOnlySpan<byte>)block.Data));
                block.IsDirty = false;
                wrote = true;
            }
        }

        return wrote;
    }

    /// <summary>Enters new blocks, whose content is stable, into the table in the file. The caller syncs.</summary>
    public void PublishBlocks(int[] entries)
    {
        Span<byte> raw = stackalloc byte[8];
        foreach (int index in entries)
        {
            BinaryPrimitives.WriteUInt64BigEndian(raw, _table[index]);
            Check(_file.Write(_header.RefcountTableOffset + (index * 8L), raw));
        }
    }

    public int[] TakeNewBlocks()
    {
        int[] entries = [.. _newTableEntries];
        _newTableEntries.Clear();
        return entries;
    }

    /// <summary>Takes back what <see cref="TakeNewBlocks"/> gave, after a failure.</summary>
    public void RetainNewBlocks(int[] entries) => _newTableEntries.UnionWith(entries);

    private ulong[] ReadTable()
    {
        long bytes = (long)_header.RefcountTableClusters << _header.ClusterBits;
        long fileBytes = _file.Length;
        byte[] raw = new byte[bytes];
        if (_file.Read(_header.RefcountTableOffset, raw) != BlockStatus.Ok)
        {
            throw new ImageException(
                _file.Path, _header.RefcountTableOffset, $"refcount table cannot be read: {_file.LastError}");
        }

        var table = new ulong[bytes / 8];
        for (int i = 0; i < table.Length; i++)
        {
            ulong entry = BinaryPrimitives.ReadUInt64BigEndian(raw.AsSpan(i * 8));
            if ((entry & (ulong)(_header.ClusterBytes - 1)) != 0 || entry > long.MaxValue)
            {
                throw new ImageException(
                    _file.Path,
                    _header.RefcountTableOffset + (i * 8L),
                    $"refcount block at 0x{entry:x} does not begin at a cluster border");
            }

            table[i] = entry;
            if (entry != 0 && ((long)entry >= fileBytes || !_metadata.Add((long)entry >> _header.ClusterBits)))
            {
                throw new ImageException(
                    _file.Path,
                    _header.RefcountTableOffset + (i * 8L),
                    $"refcount block at 0x{entry:x} is outside the file or overlaps other tables of the image");
            }
        }

        return table;
    }

    private long FindFree()
    {
        long cluster = Math.Max(_next, 1);
        while (true)
        {
            Qcow2Table? block = FindBlock(cluster, out int slot);
            for (; slot < _entriesPerBlock; slot++, cluster++)
            {
                // Metadata that the image knows but does not count is damage: never hand it out.
                if ((block is null || GetSlot(block, slot) == 0) && !_metadata.Contains(cluster))
                {
                    return cluster;
                }
            }
        }
    }

    private Qcow2Table? FindBlock(long cluster, out int slot)
    {
        long index = cluster / _entriesPerBlock;
        slot = (int)(cluster % _entriesPerBlock);
        if (index >= _table.Length || _table[index] == 0)
        {
            return null;
        }

        return _cache.Get((long)_table[index]);
    }

    // A new block describes itself where that is possible: it takes the first cluster that it covers and that is free.
    private Qcow2Table MakeBlock(long cluster, out int slot)
    {
        long index = cluster / _entriesPerBlock;
        slot = (int)(cluster % _entriesPerBlock);
        if (index >= _table.Length)
        {
            GrowTable(index + 1);
            Qcow2Table? made = FindBlock(cluster, out slot);
            if (made is not null)
            {
                return made;
            }
        }

        long place = Math.Max(Math.Max(cluster, _next), 1);
        if (place / _entriesPerBlock != index)
        {
            // The block is made for a cluster behind the allocation front (a repair): put it wherever there is room.
            place = Allocate(out _);
            return Enter(index, place, selfDescribing: false);
        }

        return Enter(index, place, selfDescribing: true);
    }

    private Qcow2Table Enter(long index, long place, bool selfDescribing)
    {
        Qcow2Table block = _cache.Add(place << _header.ClusterBits);
        _table[index] = (ulong)block.Offset;
        _newTableEntries.Add((int)index);
        _metadata.Add(place);
        if (selfDescribing)
        {
            SetSlot(block, (int)(place % _entriesPerBlock), 1);
            _highWater = Math.Max(_highWater, place + 1);
        }

        return block;
    }

    // A larger table goes to new clusters at the end of the file and is made stable before the header points to it.
    // This happens once per doubling, so it syncs on the spot.
    private void GrowTable(long neededEntries)
    {
        int entriesPerCluster = _header.ClusterBytes / 8;
        long wanted = Math.Max(neededEntries + (neededEntries / 2), _table.Length * 2L);
        long start = Math.Max(_next, _highWater);
        long clusters;
        long blocks;
        while (true)
        {
            clusters = ((wanted - 1) / entriesPerCluster) + 1;

            // Blocks that describe the new table and themselves, all of them new, placed right behind it.
            long firstBlock = start / _entriesPerBlock;
            blocks = 1;
            while ((start + clusters + blocks - 1) / _entriesPerBlock - firstBlock + 1 > blocks)
            {
                blocks++;
            }

            if (firstBlock + blocks <= clusters * entriesPerCluster)
            {
                break;
            }

            wanted = firstBlock + blocks + entriesPerCluster;
        }

        if (clusters << _header.ClusterBits > Qcow2Header.MaxRefcountTableBytes && clusters > 1)
        {
            throw new Qcow2Fault(BlockStatus.NoSpace, "the refcount table cannot grow any further");
        }

        ulong[] old = _table;
        var added = new List<long>();
        try
        {
            SwitchTable(start, clusters, blocks, added);
        }
        catch (Qcow2Fault)
        {
            // Nothing in the file refers to the new clusters; at worst some of them stay counted.
            _table = old;
            foreach (long cluster in added)
            {
                _cache.Forget(cluster << _header.ClusterBits);
                _metadata.Remove(cluster);
            }

            throw;
        }
    }

    private void SwitchTable(long start, long clusters, long blocks, List<long> added)
    {
        int oldClusters = _header.RefcountTableClusters;
        long oldFirst = _header.RefcountTableOffset >> _header.ClusterBits;
        var table = new ulong[(clusters << _header.ClusterBits) / 8];
        _table.CopyTo(table, 0);
        _table = table;
        long next = start + clusters;
        long end = start + clusters + blocks;
        _highWater = Math.Max(_highWater, end);
        for (long cluster = start; cluster < end; cluster++)
        {
            long index = cluster / _entriesPerBlock;
            Qcow2Table block;
            if (_table[index] == 0)
            {
                block = _cache.Add(next << _header.ClusterBits);
                _table[index] = (ulong)block.Offset;
                _metadata.Add(next);
                added.Add(next);
                next++;
            }
            else
            {
                block = _cache.Get((long)_table[index]);
            }

            SetSlot(block, (int)(cluster % _entriesPerBlock), 1);
        }

        // Fewer blocks may have been needed than were set aside.
        for (long cluster = next; cluster < end; cluster++)
        {
            Set(cluster, 0);
        }

        _ = WriteBlocks();
        byte[] raw = new byte[table.Length * 8];
        for (int i = 0; i < table.Length; i++)
        {
            BinaryPrimitives.WriteUInt64BigEndian(raw.AsSpan(i * 8), table[i]);
        }

        Check(_file.Write(start << _header.ClusterBits, (ReadOnlySpan<byte>)raw));
        Check(_file.Sync());
        byte[] fields = new byte[12];
        BinaryPrimitives.WriteInt64BigEndian(fields, start << _header.ClusterBits);
        BinaryPrimitives.WriteInt32BigEndian(fields.AsSpan(8), (int)clusters);
        Check(_file.Write(48, (ReadOnlySpan<byte>)fields));
        Check(_file.Sync());
        _header.RefcountTableOffset = start << _header.ClusterBits;
        _header.RefcountTableClusters = (int)clusters;
        _newTableEntries.Clear();
        for (long i = 0; i < clusters; i++)
        {
            _metadata.Add(start + i);
        }

        for (int i = 0; i < oldClusters; i++)
        {
            _metadata.Remove(oldFirst + i);
            _ = Release(oldFirst + i);
        }
    }

    private ulong GetSlot(Qcow2Table block, int slot)
    {
        byte[] data = block.Data;
        switch (_order)
        {
            case 3:
                return data[slot];
            case 4:
                return BinaryPrimitives.ReadUInt16BigEndian(data.AsSpan(slot * 2));
            case 5:
                return BinaryPrimitives.ReadUInt32BigEndian(data.AsSpan(slot * 4));
            case 6:
                return BinaryPrimitives.ReadUInt64BigEndian(data.AsSpan(slot * 8));
            default:
                int width = 1 << _order;
                int bit = slot << _order;
                return (uint)(data[bit >> 3] >> (bit & 7)) & ((1u << width) - 1);
        }
    }

    private void SetSlot(Qcow2Table block, int slot, ulong value)
    {
        byte[] data = block.Data;
        block.IsDirty = true;
        ulong maximum = _order == 6 ? ulong.MaxValue : (1UL << (1 << _order)) - 1;
        if (value > maximum)
        {
            throw new Qcow2Fault(BlockStatus.IoError, $"reference count {value} does not fit {1 << _order} bits");
        }

        switch (_order)
        {
            case 3:
                data[slot] = (byte)value;
                break;
            case 4:
                BinaryPrimitives.WriteUInt16BigEndian(data.AsSpan(slot * 2), (ushort)value);
                break;
            case 5:
                BinaryPrimitives.WriteUInt32BigEndian(data.AsSpan(slot * 4), (uint)value);
                break;
            case 6:
                BinaryPrimitives.WriteUInt64BigEndian(data.AsSpan(slot * 8), value);
                break;
            default:
                int width = 1 << _order;
                int bit = slot << _order;
                int mask = ((1 << width) - 1) << (bit & 7);
                data[bit >> 3] = (byte)((data[bit >> 3] & ~mask) | ((int)value << (bit & 7)));
                break;
        }
    }

    private void Check(BlockStatus status)
    {
        if (status != BlockStatus.Ok)
        {
            throw new Qcow2Fault(status, $"{_file.Path}: {_file.LastError}");
        }
    }
}

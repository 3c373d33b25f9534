// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Block.Qcow2;

/// <summary>A request ran into a host error or damage. Caught at the image's public calls, never leaves the format.</summary>
internal sealed class Qcow2Fault : Exception
{
    public Qcow2Fault(BlockStatus status, string message)
        : base(message) => Status = status;

    public BlockStatus Status { get; }
}

/// <summary>A cluster of metadata in memory, in the image's byte order: an L2 table or a refcount block.</summary>
internal sealed class Qcow2Table
{
    public Qcow2Table(long offset, byte[] data)
    {
        Offset = offset;
        Data = data;
    }

    public long Offset { get; }

    public byte[] Data { get; }

    /// <summary>Differs from the file.</summary>
    public bool IsDirty { get; set; }

    /// <summary>A flush holds a copy that is not in the file yet: must stay in memory.</summary>
    public bool IsPinned { get; set; }

    public LinkedListNode<Qcow2Table>? Node { get; set; }

    public ulong this[int index]
    {
        get => BinaryPrimitives.ReadUInt64BigEndian(Data.AsSpan(index * 8));
        set
        {
            BinaryPrimitives.WriteUInt64BigEndian(Data.AsSpan(index * 8), value);
            IsDirty = true;
        }
    }
}

/// <summary>
/// Metadata clusters by file offset, least recently used first out. Only tables that equal the file are dropped: when
/// there are none, the cache grows beyond its budget until the next flush, which the image forces soon after.
/// Not thread-safe: under the image's metadata lock.
/// </summary>
internal sealed class Qcow2TableCache
{
    private const int BudgetBytes = 8 << 20;
    private readonly Dictionary<long, Qcow2Table> _tables = [];
    private readonly LinkedList<Qcow2Table> _recent = new();
    private readonly BlockFile _file;
    private readonly int _clusterBytes;
    private readonly int _budget;

    public Qcow2TableCache(BlockFile file, int clusterBytes)
    {
        _file = file;
        _clusterBytes = clusterBytes;
        _budget = Math.Max(4, BudgetBytes / clusterBytes);
    }

    /// <summary>Time to flush: most of the budget is dirty.</summary>
    public bool IsCrowded => _tables.Count > _budget + (_budget / 2);

    public IEnumerable<Qcow2Table> Tables => _recent;

    public Qcow2Table Get(long offset)
    {
        if (_tables.TryGetValue(offset, out Qcow2Table? table))
        {
            if (_recent.Last != table.Node)
            {
                _recent.Remove(table.Node!);
                _recent.AddLast(table.Node!);
            }

            return table;
        }

        byte[] data = Evict() ?? new byte[_clusterBytes];
        BlockStatus status = _file.Read(offset, data);
        if (status != BlockStatus.Ok)
        {
            throw new Qcow2Fault(status, $"metadata at 0x{offset:x} cannot be read: {_file.LastError}");
        }

        return Insert(new Qcow2Table(offset, data));
    }

    /// <summary>A table in a new cluster: zeroes, dirty.</summary>
    public Qcow2Table Add(long offset)
    {
        Forget(offset);
        return Insert(new Qcow2Table(offset, new byte[_clusterBytes]) { IsDirty = true });
    }

    public void Forget(long offset)
    {
        if (_tables.Remove(offset, out Qcow2Table? table))
        {
            _recent.Remove(table.Node!);
        }
    }

    private Qcow2Table Insert(Qcow2Table table)
    {
        _tables.Add(table.Offset, table);
        table.Node = _recent.AddLast(table);
        return table;
    }

    private byte[]? Evict()
    {
        byte[]? free = null;
        LinkedListNode<Qcow2Table>? node = _recent.First;
        while (node is not null && _tables.Count >= _budget)
        {
            LinkedListNode<Qcow2Table>? next = node.Next;
            if (!node.Value.IsDirty && !node.Value.IsPinned)
            {
                Forget(node.Value.Offset);
                free = node.Value.Data;
            }

            node = next;
        }

        return free;
    }
}

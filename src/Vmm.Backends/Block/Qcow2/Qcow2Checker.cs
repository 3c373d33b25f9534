// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Block.Qcow2;

/// <summary>What a check of an image found.</summary>
public sealed class Qcow2CheckResult
{
    /// <summary>Clusters with a count larger than their references: lost space, harmless.</summary>
    public long Leaks { get; internal set; }

    /// <summary>Clusters with a count smaller than their references, and wrong COPIED bits. 0 after a repair.</summary>
    public long CountErrors { get; internal set; }

    /// <summary>Entries that point outside the file, to no cluster border, or into other tables. Not repaired.</summary>
    public long Damage { get; internal set; }

    /// <summary>The first damage in words, or an empty string.</summary>
    public string FirstDamage { get; internal set; } = "";

    /// <summary>Where the first damage stands in the file, or -1.</summary>
    public long FirstDamageOffset { get; internal set; } = -1;

    /// <summary>Leaks and count errors were put right.</summary>
    public bool IsRepaired { get; internal set; }

    /// <summary>Clusters of the disk that have a place in the file.</summary>
    public long AllocatedClusters { get; internal set; }
}

/// <summary>
/// Walks everything that an image refers to, counts the references, and compares or rewrites the counts. Memory is
/// proportional to the clusters that are referred to (4 bytes each, in pages); a table is entered once, so that a map
/// that refers to itself ends.
/// </summary>
internal sealed class Qcow2Checker
{
    private const ulong Copied = 1UL << 63;
    private const ulong CompressedBit = 1UL << 62;
    private const ulong OffsetMask = 0x00FF_FFFF_FFFF_FE00;
    private const int PageEntries = 4096;

    private readonly BlockFile _file;
    private readonly Qcow2Header _header;
    private readonly Dictionary<long, uint[]> _pages = [];
    private readonly Qcow2CheckResult _result = new();
    private readonly long _fileClusters;
    private long _last;

    public Qcow2Checker(BlockFile file, Qcow2Header header)
    {
        _file = file;
        _header = header;
        _fileClusters = (file.Length + header.ClusterBytes - 1) >> header.ClusterBits;
    }

    public Qcow2CheckResult Run(bool repair, IProgress<double>? progress, CancellationToken cancellation)
    {
        Count(0, 1);
        CountRange(_header.L1Offset, _header.L1Entries * 8L);
        CountRange(_header.RefcountTableOffset, (long)_header.RefcountTableClusters << _header.ClusterBits);
        var refcounts = new Qcow2Refcounts(_file, _header, []);
        for (int i = 0; i < refcounts.TableEntries; i++)
        {
            if (refcounts.BlockOffset(i) != 0)
            {
                Count(refcounts.BlockOffset(i) >> _header.ClusterBits, 1);
            }
        }

        if (_header.SnapshotCount > 0)
        {
            CountRange(_header.SnapshotsOffset, _header.SnapshotTableBytes);
        }

        foreach (Qcow2Snapshot snapshot in _header.Snapshots)
        {
            CountRange(snapshot.L1Offset, snapshot.L1Entries * 8L);
            Walk(snapshot.L1Offset, snapshot.L1Entries, isActive: false, null, cancellation);
        }

        Walk(_header.L1Offset, _header.L1Entries, isActive: true, progress, cancellation);
        Compare(refcounts, repair && _result.Damage == 0);
        if (repair && _result.Damage == 0)
        {
            RepairFlags(cancellation);
            Finish(refcounts);
        }

        return _result;
    }

    private uint References(long cluster) =>
        _pages.TryGetValue(cluster / PageEntries, out uint[]? page) ? page[cluster % PageEntries] : 0;

    private void Count(long cluster, uint by)
    {
        long index = cluster / PageEntries;
        if (!_pages.TryGetValue(index, out uint[]? page))
        {
            page = new uint[PageEntries];
            _pages.Add(index, page);
        }

        page[cluster % PageEntries] += by;
        _last = Math.Max(_last, cluster);
    }

    private void CountRange(long offset, long length)
    {
        for (long at = offset; at < offset + length; at += _header.ClusterBytes)
        {
            Count(at >> _header.ClusterBits, 1);
        }
    }

    private void Damage(long where, string what)
    {
        if (_result.Damage++ == 0)
        {
            _result.FirstDamage = what;
            _result.FirstDamageOffset = where;
        }
    }

    private void Walk(
        long l1Offset, int entries, bool isActive, IProgress<double>? progress, CancellationToken cancellation)
    {
        ulong[] l1 = Qcow2Image.ReadL1(_file, l1Offset, entries);
        byte[] table = new byte[_header.ClusterBytes];
        var seen = new HashSet<long>();
        for (int i = 0; i < l1.Length; i++)
        {
            cancellation.ThrowIfCancellationRequested();
            progress?.Report((double)i / l1.Length);
            long offset = (long)(l1[i] & OffsetMask);
            long where = l1Offset + (i * 8L);
            if (offset == 0)
            {
                continue;
            }

            if ((offset & (_header.ClusterBytes - 1)) != 0 || offset >> _header.ClusterBits >= _fileClusters)
            {
                Damage(where, $"L2 table at 0x{offset:x} is misaligned or outside the file");
                continue;
            }

            if (!seen.Add(offset))
            {
                Damage(where, $"L2 table at 0x{offset:x} is used twice");
                continue;
            }

            Count(offset >> _header.ClusterBits, 1);
            if (_file.Read(offset, table) != BlockStatus.Ok)
            {
                Damage(offset, $"cannot be read: {_file.LastError}");
                continue;
            }

            WalkTable(table, offset, isActive);
        }
    }

    private void WalkTable(byte[] table, long tableOffset, bool isActive)
    {
        for (int i = 0; i < table.Length; i += 8)
        {
            ulong entry = BinaryPrimitives.ReadUInt64BigEndian(table.AsSpan(i));
            if (entry == 0)
            {
                continue;
            }

            if ((entry & CompressedBit) != 0)
            {
                (long start, int length) = Qcow2Image.CompressedRange(entry, _header.ClusterBits);
                long first = start >> _header.ClusterBits;
                if (first >= _fileClusters || first == 0)
                {
                    Damage(tableOffset + i, $"compressed data at 0x{start:x} is outside the file");
                    continue;
                }

                for (long cluster = first; cluster <= (start + length - 1) >> _header.ClusterBits; cluster++)
                {
                    Count(cluster, 1);
                }
            }
            else
            {
                long offset = (long)(entry & OffsetMask);
                if (offset == 0)
                {
                    continue;
                }

                if ((offset & (_header.ClusterBytes - 1)) != 0 || offset >> _header.ClusterBits >= _fileClusters)
                {
                    Damage(tableOffset + i, $"data cluster at 0x{offset:x} is misaligned or outside the file");
                    continue;
                }

                Count(offset >> _header.ClusterBits, 1);
            }

            if (isActive)
            {
                _result.AllocatedClusters++;
            }
        }
    }

    private void Compare(Qcow2Refcounts refcounts, bool repair)
    {
        // New count blocks must not land on clusters that are in use without being counted.
        long end = Math.Max(_last + 1, _fileClusters);
        if (repair)
        {
            refcounts.AllocateFrom(end);
        }

        long perBlock = refcounts.EntriesPerBlock;
        for (long first = 0; first < end || first / perBlock < refcounts.TableEntries; first += perBlock)
        {
            bool hasBlock = first / perBlock < refcounts.TableEntries
                && refcounts.BlockOffset((int)(first / perBlock)) != 0;
            if (!hasBlock && first >= end)
            {
                continue;
            }

            for (long cluster = first; cluster < first + perBlock; cluster++)
            {
                ulong count = hasBlock ? refcounts.Get(cluster) : 0;
                uint references = References(cluster);
                if (count == references)
                {
                    continue;
                }

                if (count > references)
                {
                    _result.Leaks++;
                }
                else
                {
                    _result.CountErrors++;
                }

                if (repair)
                {
                    refcounts.Set(cluster, references);
                    hasBlock = true;
                }
            }
        }
    }

    private void RepairFlags(CancellationToken cancellation)
    {
        ulong[] l1 = Qcow2Image.ReadL1(_file, _header.L1Offset, _header.L1Entries);
        byte[] table = new byte[_header.ClusterBytes];
        byte[] raw = new byte[8];
        for (int i = 0; i < l1.Length; i++)
        {
            cancellation.ThrowIfCancellationRequested();
            long offset = (long)(l1[i] & OffsetMask);
            if (offset == 0)
            {
                continue;
            }

            bool isShared = References(offset >> _header.ClusterBits) != 1;
            ulong fixedEntry = isShared ? l1[i] & ~Copied : l1[i] | Copied;
            if (fixedEntry != l1[i])
            {
                _result.CountErrors++;
                BinaryPrimitives.WriteUInt64BigEndian(raw, fixedEntry);
                Check(_file.Write(_header.L1Offset + (i * 8L), (ReadOnlySpan<byte>)raw));
            }

            Check(_file.Read(offset, table));
            bool changed = false;
            for (int at = 0; at < table.Length; at += 8)
            {
                ulong entry = BinaryPrimitives.ReadUInt64BigEndian(table.AsSpan(at));
                long data = (long)(entry & OffsetMask);
                if ((entry & CompressedBit) != 0 || data == 0)
                {
                    continue;
                }

                ulong wanted = References(data >> _header.ClusterBits) == 1 ? entry | Copied : entry & ~Copied;
                if (wanted != entry)
                {
                    BinaryPrimitives.WriteUInt64BigEndian(table.AsSpan(at), wanted);
                    changed = true;
                    _result.CountErrors++;
                }
            }

            if (changed)
            {
                Check(_file.Write(offset, (ReadOnlySpan<byte>)table));
            }
        }
    }

    private void Finish(Qcow2Refcounts refcounts)
    {
        try
        {
            _ = refcounts.WriteBlocks();
            Check(_file.Sync());
            refcounts.PublishBlocks(refcounts.TakeNewBlocks());
            Check(_file.Sync());
        }
        catch (Qcow2Fault fault)
        {
            throw new ImageException(_file.Path, -1, $"repair failed: {fault.Message}");
        }

        _result.IsRepaired = true;
        _result.CountErrors = 0;
        _result.Leaks = 0;
    }

    private void Check(BlockStatus status)
    {
        if (status != BlockStatus.Ok)
        {
            throw new ImageException(_file.Path, -1, $"repair failed: {_file.LastError}");
        }
    }
}

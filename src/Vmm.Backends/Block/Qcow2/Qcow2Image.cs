// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Threading;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Block.Qcow2;

// Theory. A qcow2 image maps guest clusters to clusters of its file by two levels of tables: L1, one array, held in
// memory; L2, one cluster each, cached. An entry says: not here (ask the backing image), zeroes, data at an offset, or
// compressed data. The bit COPIED says that the cluster belongs to this map alone and may be overwritten in place.
//
// Order. What a crash, a kill or a power cut leaves in the file must be an image that is whole and holds every write
// that was flushed. Data goes to the file at once; metadata changes in memory and goes out in Flush, in this order:
//
//   1. data of new clusters (already written), reference count blocks; sync
//   2. new entries of the refcount table; sync
//   3. L2 tables; and, when the L1 table changes: sync, L1 entries
//   4. sync
//   5. only then do counts of what was let go of sink (in memory, for the next flush), and may clusters be reused
//
// An L2 entry is set in memory only when its data is in the file, so step 1's sync covers it. Syncs that have nothing
// to separate are left out: overwriting data in place costs one.
//
// Locks. _flushGate: one flush at a time. _inFlight: requests hold it shared while they use clusters of the file;
// letting clusters go takes it exclusively, so that nobody reads or writes a cluster that changed hands. _meta: all
// tables and counts. Order: _flushGate, _inFlight, _meta. Writes that allocate hold _meta while they write their data,
// which keeps two writers from allocating the same guest cluster; writes in place and reads hold it for the look-up.
//
// Hostile images. A table entry may point anywhere. Offsets are checked for alignment and, when they are to be
// written, against the clusters that hold metadata: a guest must not come to write the header of its own image, since
// that names files of the host (the backing file).
//
// What it does not do: encryption, external data files, subclusters (refused by name), persistent bitmaps (their
// auto-clear bit is cleared on the first opening for writing, as the format asks), taking internal snapshots.

/// <summary>A qcow2 image, version 2 or 3.</summary>
public sealed class Qcow2Image : BlockImage
{
    private const ulong Copied = 1UL << 63;
    private const ulong CompressedBit = 1UL << 62;
    private const ulong ZeroBit = 1;
    private const ulong OffsetMask = 0x00FF_FFFF_FFFF_FE00;

    private readonly Lock _flushGate = new();
    private readonly ReaderWriterLockSlim _inFlight = new(LockRecursionPolicy.NoRecursion);
    private readonly Lock _meta = new();
    private readonly BlockFile _file;
    private readonly Qcow2Header _header;
    private readonly BlockImage? _backing;
    private readonly Qcow2TableCache _l2Cache;
    private readonly Qcow2Refcounts _refcounts;
    private readonly HashSet<long> _metadata = [];
    private readonly SortedSet<int> _dirtyL1 = [];
    private readonly ulong[] _l1;
    private readonly int _clusterBits;
    private readonly int _clusterBytes;
    private readonly byte[] _scratch;
    private List<long> _released = [];
    private byte[]? _unpacked;
    private ulong _unpackedEntry;
    private string _lastError = "";
    private long _damage;
    private bool _disposed;

    private Qcow2Image(BlockFile file, Qcow2Header header, BlockImage? backing)
    {
        _file = file;
        _header = header;
        _backing = backing;
        _clusterBits = header.ClusterBits;
        _clusterBytes = header.ClusterBytes;
        _scratch = new byte[_clusterBytes];
        _l2Cache = new Qcow2TableCache(file, _clusterBytes);
        _l1 = ReadL1(file, header.L1Offset, header.L1Entries);
        AddMetadata(0, _clusterBytes);
        AddMetadata(header.L1Offset, header.L1Entries * 8L);
        AddMetadata(header.RefcountTableOffset, (long)header.RefcountTableClusters << _clusterBits);
        if (header.SnapshotCount > 0)
        {
            AddMetadata(header.SnapshotsOffset, header.SnapshotTableBytes);
            foreach (Qcow2Snapshot snapshot in header.Snapshots)
            {
                AddMetadata(snapshot.L1Offset, snapshot.L1Entries * 8L);
            }
        }

        CheckL1();

        _refcounts = new Qcow2Refcounts(file, header, _metadata);
    }

    /// <inheritdoc/>
    public override string Path => _file.Path;

    /// <inheritdoc/>
    public override string Format => "qcow2";

    /// <inheritdoc/>
    public override long LengthBytes => _header.DiskBytes;

    /// <inheritdoc/>
    public override bool IsReadOnly => _file.IsReadOnly;

    /// <inheritdoc/>
    public override bool CanDiscard => !IsReadOnly;

    /// <inheritdoc/>
    public override BlockImage? Backing => _backing;

    /// <inheritdoc/>
    public override string LastError => _lastError;

    /// <summary>Version of the format: 2 or 3.</summary>
    public int Version => _header.Version;

    /// <summary>Cluster size in bytes.</summary>
    public int ClusterBytes => _clusterBytes;

    /// <summary>Requests that ended in damage or a host error.</summary>
    public long DamageCount => Interlocked.Read(ref _damage);

    /// <summary>Snapshots kept inside the image. They can be listed here, not taken or restored.</summary>
    public IReadOnlyList<Qcow2Snapshot> Snapshots => _header.Snapshots;

    /// <summary>The backing file's declared format, or null.</summary>
    public string? BackingFormat => _header.BackingFormat;

    /// <summary>Opens and locks an image and what it is backed by.</summary>
    /// <param name="path">The image.</param>
    /// <param name="readOnly">Open for reading only.</param>
    /// <exception cref="IOException">A file cannot be opened or is in use.</exception>
    /// <exception cref="ImageException">An image is damaged, or uses what is not supported.</exception>
    public static Qcow2Image Open(string path, bool readOnly) => Open(path, readOnly, 0);

    /// <inheritdoc/>
    public override BlockStatus Read(long offset, in IoBuffer into)
    {
        _inFlight.EnterReadLock();
        try
        {
            ReadMapped(offset, into);
            return BlockStatus.Ok;
        }
        catch (Qcow2Fault fault)
        {
            return Fail(fault);
        }
        finally
        {
            _inFlight.ExitReadLock();
        }
    }

    /// <inheritdoc/>
    public override BlockStatus Write(long offset, in IoBuffer from)
    {
        bool isCrowded;
        _inFlight.EnterReadLock();
        try
        {
            long done = 0;
            while (done < from.Length)
            {
                done += WritePart(offset + done, from.Slice(done, from.Length - done));
            }

            isCrowded = IsCrowded();
        }
        catch (Qcow2Fault fault)
        {
            return Fail(fault);
        }
        finally
        {
            _inFlight.ExitReadLock();
        }

        return isCrowded ? Flush() : BlockStatus.Ok;
    }

    /// <inheritdoc/>
    public override BlockStatus Flush()
    {
        if (IsReadOnly)
        {
            return BlockStatus.Ok;
        }

        lock (_flushGate)
        {
            try
            {
                FlushAll();
                return BlockStatus.Ok;
            }
            catch (Qcow2Fault fault)
            {
                return Fail(fault);
            }
        }
    }

    /// <inheritdoc/>
    public override BlockStatus Discard(long offset, long length) =>
        EmptyRange(offset, length, mayUnmap: true, exact: false);

    /// <inheritdoc/>
    public override BlockStatus WriteZeroes(long offset, long length, bool mayUnmap) =>
        EmptyRange(offset, length, mayUnmap, exact: true);

    /// <summary>
    /// Enters a place in the file for every cluster of the disk, so that later writes need no metadata. The data
    /// itself stays a hole. For new images.
    /// </summary>
    internal BlockStatus Preallocate(IProgress<double>? progress, CancellationToken cancellation)
    {
        for (long at = 0; at < LengthBytes; at += _clusterBytes)
        {
            cancellation.ThrowIfCancellationRequested();
            bool isCrowded;
            _inFlight.EnterReadLock();
            try
            {
                lock (_meta)
                {
                    Qcow2Table table = L2ForWrite(at);
                    int index = L2Index(at);
                    if (table[index] == 0)
                    {
                        long cluster = _refcounts.Allocate(out bool isFresh);
                        if (!isFresh)
                        {
                            Array.Clear(_scratch);
                            Check(_file.Write(cluster << _clusterBits, (ReadOnlySpan<byte>)_scratch));
                        }

                        table[index] = (ulong)(cluster << _clusterBits) | Copied;
                    }
                }

                isCrowded = IsCrowded();
            }
            catch (Qcow2Fault fault)
            {
                return Fail(fault);
            }
            finally
            {
                _inFlight.ExitReadLock();
            }

            if (isCrowded && Flush() is var status && status != BlockStatus.Ok)
            {
                return status;
            }

            if ((at & ((256L << _clusterBits) - 1)) == 0)
            {
                progress?.Report((double)at / LengthBytes);
            }
        }

        return Flush();
    }

    internal static Qcow2Image Open(string path, bool readOnly, int depth)
    {
        BlockFile file = BlockFile.Open(path, readOnly);
        BlockImage? backing = null;
        try
        {
            file.Lock();
            Qcow2Header header = Qcow2Header.Read(file);
            if (!readOnly)
            {
                PrepareForWriting(file, header);
            }

            if (header.BackingFile is not null)
            {
                backing = DiskImage.OpenBacking(path, header.BackingFile, header.BackingFormat, depth);
            }

            return new Qcow2Image(file, header, backing);
        }
        catch
        {
            backing?.Dispose();
            file.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (!disposing || _disposed)
        {
            return;
        }

        _disposed = true;

        // Twice: the first makes the new state stable, the second gives back the counts of what it let go of.
        _ = Flush();
        _ = Flush();
        _backing?.Dispose();
        _inFlight.Dispose();
        _file.Dispose();
    }

    private static void PrepareForWriting(BlockFile file, Qcow2Header header)
    {
        if ((header.Incompatible & Qcow2Header.IncompatibleCorrupt) != 0)
        {
            throw new ImageException(
                file.Path, 72, "is marked corrupt; open it read-only, or repair it with `qemu-img check -r all`");
        }

        if ((header.Incompatible & Qcow2Header.IncompatibleDirty) != 0)
        {
            // Written with lazy reference counts and not closed: the counts are worthless until rebuilt.
            Qcow2CheckResult result = new Qcow2Checker(file, header).Run(repair: true, null, CancellationToken.None);
            if (result.Damage > 0)
            {
                throw new ImageException(
                    file.Path, result.FirstDamageOffset, $"was not closed cleanly and cannot be repaired: {result.FirstDamage}");
            }

            header.Incompatible &= ~Qcow2Header.IncompatibleDirty;
            WriteHeaderField(file, 72, header.Incompatible);
        }

        if (header.Autoclear != 0)
        {
            header.Autoclear = 0;
            WriteHeaderField(file, 88, 0);
        }
    }

    private static void WriteHeaderField(BlockFile file, long at, ulong value)
    {
        byte[] raw = new byte[8];
        BinaryPrimitives.WriteUInt64BigEndian(raw, value);
        if (file.Sync() != BlockStatus.Ok || file.Write(at, (ReadOnlySpan<byte>)raw) != BlockStatus.Ok
            || file.Sync() != BlockStatus.Ok)
        {
            throw new ImageException(file.Path, at, $"the header cannot be written: {file.LastError}");
        }
    }

    internal static ulong[] ReadL1(BlockFile file, long offset, int entries)
    {
        byte[] raw = new byte[entries * 8];
        if (file.Read(offset, raw) != BlockStatus.Ok)
        {
            throw new ImageException(file.Path, offset, $"L1 table cannot be read: {file.LastError}");
        }

        var l1 = new ulong[entries];
        for (int i = 0; i < entries; i++)
        {
            l1[i] = BinaryPrimitives.ReadUInt64BigEndian(raw.AsSpan(i * 8));
        }

        return l1;
    }

    // Every table must be a cluster of its own inside the file. Checked once, so that later code may trust the map.
    private void CheckL1()
    {
        long fileBytes = _file.Length;
        for (int i = 0; i < _l1.Length; i++)
        {
            ulong entry = _l1[i];
            long offset = (long)(entry & OffsetMask);
            if (offset == 0)
            {
                continue;
            }

            long where = _header.L1Offset + (i * 8L);
            if ((offset & (_clusterBytes - 1)) != 0 || offset >= fileBytes)
            {
                throw new ImageException(Path, where, $"L2 table at 0x{offset:x} is misaligned or outside the file");
            }

            if (!_metadata.Add(offset >> _clusterBits))
            {
                throw new ImageException(Path, where, $"L2 table at 0x{offset:x} overlaps other tables of the image");
            }
        }
    }

    private void AddMetadata(long offset, long length)
    {
        for (long at = offset; at < offset + length; at += _clusterBytes)
        {
            _metadata.Add(at >> _clusterBits);
        }
    }

    private bool IsCrowded()
    {
        lock (_meta)
        {
            return _l2Cache.IsCrowded || _refcounts.IsCrowded || _released.Count > 65536;
        }
    }

    private int L2Index(long guest) => (int)(guest >> _clusterBits) & (_header.L2EntriesPerTable - 1);

    private int L1Index(long guest) => (int)(guest >> _header.L2CoverBits);

    private int InCluster(long guest) => (int)guest & (_clusterBytes - 1);

    private long MaskedOffset(ulong entry, string what, long where)
    {
        long offset = (long)(entry & OffsetMask);
        if ((offset & (_clusterBytes - 1)) != 0)
        {
            throw Damage($"{what} 0x{offset:x} for disk offset 0x{where:x} is not at a cluster border");
        }

        return offset;
    }

    // Null when nothing is mapped there. Under _meta.
    private Qcow2Table? L2ForRead(long guest)
    {
        long offset = MaskedOffset(_l1[L1Index(guest)], "L2 table", guest);
        return offset == 0 ? null : _l2Cache.Get(offset);
    }

    // Makes or unshares the table. Under _meta.
    private Qcow2Table L2ForWrite(long guest)
    {
        int index = L1Index(guest);
        ulong entry = _l1[index];
        long offset = MaskedOffset(entry, "L2 table", guest);
        if (offset != 0 && (entry & Copied) != 0)
        {
            return _l2Cache.Get(offset);
        }

        Qcow2Table? old = offset == 0 ? null : _l2Cache.Get(offset);
        long cluster = _refcounts.Allocate(out _);
        Qcow2Table table = _l2Cache.Add(cluster << _clusterBits);
        if (old is not null)
        {
            old.Data.CopyTo(table.Data, 0);
            _released.Add(offset >> _clusterBits);
        }

        _metadata.Add(cluster);
        _l1[index] = (ulong)table.Offset | Copied;
        _dirtyL1.Add(index);
        return table;
    }

    private void ReadMapped(long offset, in IoBuffer into)
    {
        long done = 0;
        while (done < into.Length)
        {
            long guest = offset + done;
            long left = into.Length - done;
            Extent extent;
            lock (_meta)
            {
                extent = Look(guest, left);
                if (extent.Kind == ExtentKind.Compressed)
                {
                    into.Slice(done, extent.Length)
                        .CopyFrom(Unpack(extent.Entry).AsSpan(InCluster(guest), (int)extent.Length));
                }
            }

            IoBuffer part = into.Slice(done, extent.Length);
            switch (extent.Kind)
            {
                case ExtentKind.Unallocated:
                    ReadBacking(guest, part);
                    break;
                case ExtentKind.Zero:
                    part.Clear();
                    break;
                case ExtentKind.Data:
                    Check(_file.Read(extent.HostOffset, part));
                    break;
                default:
                    break;
            }

            done += extent.Length;
        }
    }

    // The longest run of one kind from a disk offset on. Under _meta.
    private Extent Look(long guest, long limit)
    {
        Qcow2Table? table = L2ForRead(guest);
        int inCluster = InCluster(guest);
        if (table is null)
        {
            long cover = 1L << _header.L2CoverBits;
            return new Extent(ExtentKind.Unallocated, 0, Math.Min(limit, cover - (guest & (cover - 1))), 0);
        }

        int index = L2Index(guest);
        ulong entry = table[index];
        ExtentKind kind = KindOf(entry);
        long length = _clusterBytes - inCluster;
        if (kind == ExtentKind.Compressed)
        {
            return new Extent(kind, 0, Math.Min(length, limit), entry);
        }

        long host = kind == ExtentKind.Data ? MaskedOffset(entry, "data cluster", guest) : 0;
        if (host >> _clusterBits >= _refcounts.HighWater)
        {
            throw Damage($"data cluster 0x{host:x} for disk offset 0x{guest:x} lies outside the file");
        }

        long expected = host + _clusterBytes;
        while (length < limit && ++index < _header.L2EntriesPerTable)
        {
            ulong next = table[index];
            if (KindOf(next) != kind || (kind == ExtentKind.Data && (long)(next & OffsetMask) != expected))
            {
                break;
            }

            expected += _clusterBytes;
            length += _clusterBytes;
        }

        return new Extent(kind, host + inCluster, Math.Min(length, limit), entry);
    }

    private ExtentKind KindOf(ulong entry)
    {
        if ((entry & CompressedBit) != 0)
        {
            return ExtentKind.Compressed;
        }

        if ((entry & ZeroBit) != 0 && _header.Version >= 3)
        {
            return ExtentKind.Zero;
        }

        return (entry & OffsetMask) != 0 ? ExtentKind.Data : ExtentKind.Unallocated;
    }

    private void ReadBacking(long guest, in IoBuffer into)
    {
        long inside = _backing is null ? 0 : Math.Clamp(_backing.LengthBytes - guest, 0, into.Length);
        if (inside > 0)
        {
            BlockStatus status = _backing!.Read(guest, into.Slice(0, inside));
            if (status != BlockStatus.Ok)
            {
                throw new Qcow2Fault(status, $"backing file: {_backing.LastError}");
            }
        }

        if (inside < into.Length)
        {
            into.Slice(inside, into.Length - inside).Clear();
        }
    }

    // Under _meta. The last cluster is kept: a guest reads it in many small pieces.
    private byte[] Unpack(ulong entry)
    {
        if (_unpacked is not null && _unpackedEntry == entry)
        {
            return _unpacked;
        }

        (long offset, int length) = CompressedRange(entry);
        if (offset >= _file.Length)
        {
            throw Damage($"compressed data at 0x{offset:x} lies outside the file");
        }

        byte[] packed = new byte[length];
        Check(_file.Read(offset, packed));
        byte[] unpacked = new byte[_clusterBytes];
        _unpacked = null;
        if (!Qcow2Compression.TryUnpack(_header.CompressionType, packed, unpacked))
        {
            throw Damage($"compressed data at 0x{offset:x} is damaged");
        }

        _unpacked = unpacked;
        _unpackedEntry = entry;
        return unpacked;
    }

    private (long Offset, int Length) CompressedRange(ulong entry) => CompressedRange(entry, _clusterBits);

    internal static (long Offset, int Length) CompressedRange(ulong entry, int clusterBits)
    {
        int offsetBits = 62 - (clusterBits - 8);
        long offset = (long)(entry & ((1UL << offsetBits) - 1));
        int sectors = (int)((entry >> offsetBits) & ((1UL << (clusterBits - 8)) - 1)) + 1;
        return (offset, (sectors * 512) - (int)(offset & 511));
    }

    // Writes as much as one step can; returns how much.
    private long WritePart(long guest, in IoBuffer from)
    {
        long host;
        long length;
        lock (_meta)
        {
            Qcow2Table? table = L2ForRead(guest);
            ulong entry = table is null ? 0 : table[L2Index(guest)];
            bool inPlace = table is not null && (_l1[L1Index(guest)] & Copied) != 0
                && (entry & Copied) != 0 && KindOf(entry) == ExtentKind.Data;
            if (!inPlace)
            {
                return WriteNew(guest, from);
            }

            int index = L2Index(guest);
            host = MaskedOffset(entry, "data cluster", guest);
            RefuseMetadata(host, guest);
            length = _clusterBytes - InCluster(guest);
            while (length < from.Length && ++index < _header.L2EntriesPerTable)
            {
                ulong next = table![index];
                long expected = host + InCluster(guest) + length;
                if ((next & Copied) == 0 || KindOf(next) != ExtentKind.Data || (long)(next & OffsetMask) != expected)
                {
                    break;
                }

                RefuseMetadata(expected, guest + length);
                length += _clusterBytes;
            }

            length = Math.Min(length, from.Length);
        }

        Check(_file.Write(host + InCluster(guest), from.Slice(0, length)));
        return length;
    }

    // Allocates: either a run of whole clusters, or one cluster in part. Under _meta.
    private long WriteNew(long guest, in IoBuffer from)
    {
        Qcow2Table table = L2ForWrite(guest);
        int index = L2Index(guest);
        if (InCluster(guest) != 0 || from.Length < _clusterBytes)
        {
            long length = Math.Min(_clusterBytes - InCluster(guest), from.Length);
            WriteNewCluster(table, index, guest, from.Slice(0, length));
            return length;
        }

        long first = _refcounts.Allocate(out _);
        int count = 1;
        long wanted = Math.Min(from.Length >> _clusterBits, _header.L2EntriesPerTable - index);
        long spare = -1;
        while (count < wanted && NeedsCluster(table[index + count]))
        {
            long cluster = _refcounts.Allocate(out _);
            if (cluster != first + count)
            {
                spare = cluster;
                break;
            }

            count++;
        }

        if (spare >= 0)
        {
            _ = _refcounts.Release(spare);
        }

        BlockStatus status = _file.Write(first << _clusterBits, from.Slice(0, (long)count << _clusterBits));
        if (status != BlockStatus.Ok)
        {
            for (int i = 0; i < count; i++)
            {
                _ = _refcounts.Release(first + i);
            }

            Check(status);
        }

        for (int i = 0; i < count; i++)
        {
            Replace(table, index + i, (ulong)((first + i) << _clusterBits) | Copied, guest + ((long)i << _clusterBits));
        }

        return (long)count << _clusterBits;
    }

    private bool NeedsCluster(ulong entry) =>
        KindOf(entry) != ExtentKind.Data || (entry & Copied) == 0;

    private void WriteNewCluster(Qcow2Table table, int index, long guest, in IoBuffer from)
    {
        ulong entry = table[index];
        long start = guest - InCluster(guest);
        ExtentKind kind = KindOf(entry);
        long host;
        bool isFresh;
        bool reuses = kind == ExtentKind.Zero && (entry & Copied) != 0 && (entry & OffsetMask) != 0;
        if (reuses)
        {
            host = MaskedOffset(entry, "data cluster", guest);
            RefuseMetadata(host, guest);
            isFresh = false;
        }
        else
        {
            host = _refcounts.Allocate(out isFresh) << _clusterBits;
        }

        try
        {
            bool baseIsZero = kind == ExtentKind.Zero
                || (kind == ExtentKind.Unallocated && (_backing is null || start >= _backing.LengthBytes));
            if (baseIsZero && isFresh)
            {
                Check(_file.Write(host + InCluster(guest), from));
            }
            else
            {
                FillBase(kind, entry, start, baseIsZero);
                from.CopyTo(_scratch.AsSpan(InCluster(guest), (int)from.Length));
                Check(_file.Write(host, (ReadOnlySpan<byte>)_scratch));
            }
        }
        catch (Qcow2Fault)
        {
            if (!reuses)
            {
                _ = _refcounts.Release(host >> _clusterBits);
            }

            throw;
        }

        if (reuses)
        {
            table[index] = (ulong)host | Copied;
        }
        else
        {
            Replace(table, index, (ulong)host | Copied, guest);
        }
    }

    private void FillBase(ExtentKind kind, ulong entry, long start, bool isZero)
    {
        if (isZero)
        {
            Array.Clear(_scratch);
        }
        else if (kind == ExtentKind.Compressed)
        {
            Unpack(entry).CopyTo(_scratch, 0);
        }
        else if (kind == ExtentKind.Data)
        {
            Check(_file.Read(MaskedOffset(entry, "data cluster", start), _scratch));
        }
        else
        {
            ReadBacking(start, new IoBuffer(_scratch));
        }
    }

    // Sets an entry and lets go of what the old one referred to. Under _meta.
    private void Replace(Qcow2Table table, int index, ulong entry, long guest)
    {
        ulong old = table[index];
        table[index] = entry;
        if ((old & CompressedBit) != 0)
        {
            (long offset, int length) = CompressedRange(old);
            for (long cluster = offset >> _clusterBits; cluster <= (offset + length - 1) >> _clusterBits; cluster++)
            {
                _released.Add(cluster);
            }
        }
        else if ((old & OffsetMask) != 0)
        {
            long host = MaskedOffset(old, "data cluster", guest);
            if (!_metadata.Contains(host >> _clusterBits))
            {
                _released.Add(host >> _clusterBits);
            }
        }
    }

    private void RefuseMetadata(long host, long guest)
    {
        if (_metadata.Contains(host >> _clusterBits))
        {
            throw Damage($"data cluster 0x{host:x} for disk offset 0x{guest:x} overlaps the image's own tables");
        }
    }

    private BlockStatus EmptyRange(long offset, long length, bool mayUnmap, bool exact)
    {
        long end = offset + length;
        long first = (offset + _clusterBytes - 1) & -(long)_clusterBytes;

        // The last cluster of the disk may be a short one: it counts as whole when the range reaches the disk's end.
        long last = end == LengthBytes ? (end + _clusterBytes - 1) & -(long)_clusterBytes : end & -(long)_clusterBytes;
        if (first >= last)
        {
            return exact ? base.WriteZeroes(offset, length, mayUnmap) : BlockStatus.Ok;
        }

        if (exact)
        {
            BlockStatus status = BlockStatus.Ok;
            if (first > offset)
            {
                status = base.WriteZeroes(offset, first - offset, mayUnmap);
            }

            if (status == BlockStatus.Ok && last < end)
            {
                status = base.WriteZeroes(last, end - last, mayUnmap);
            }

            if (status != BlockStatus.Ok)
            {
                return status;
            }
        }

        return EmptyClusters(first, last, mayUnmap, exact);
    }

    private BlockStatus EmptyClusters(long first, long last, bool mayUnmap, bool exact)
    {
        for (long guest = first; guest < last;)
        {
            bool needsData = false;
            bool isCrowded;
            _inFlight.EnterReadLock();
            try
            {
                lock (_meta)
                {
                    long cover = 1L << _header.L2CoverBits;
                    bool hidesBacking = _backing is not null && guest < _backing.LengthBytes;
                    if (_l1[L1Index(guest)] == 0 && !hidesBacking)
                    {
                        guest = (guest & -cover) + cover;
                        continue;
                    }

                    if (_header.Version >= 3)
                    {
                        EmptyCluster(guest, mayUnmap, hidesBacking);
                    }
                    else if (!hidesBacking && mayUnmap)
                    {
                        Replace(L2ForWrite(guest), L2Index(guest), 0, guest);
                    }
                    else
                    {
                        // Version 2 has no zero clusters: what must hide the backing file is written.
                        needsData = exact;
                    }
                }

                isCrowded = IsCrowded();
            }
            catch (Qcow2Fault fault)
            {
                return Fail(fault);
            }
            finally
            {
                _inFlight.ExitReadLock();
            }

            BlockStatus status = BlockStatus.Ok;
            if (needsData)
            {
                status = base.WriteZeroes(guest, Math.Min(_clusterBytes, LengthBytes - guest), mayUnmap);
            }
            else if (isCrowded)
            {
                status = Flush();
            }

            if (status != BlockStatus.Ok)
            {
                return status;
            }

            guest += _clusterBytes;
        }

        return BlockStatus.Ok;
    }

    private void EmptyCluster(long guest, bool mayUnmap, bool hidesBacking)
    {
        Qcow2Table table = L2ForWrite(guest);
        int index = L2Index(guest);
        ulong entry = table[index];
        bool keeps = !mayUnmap && KindOf(entry) != ExtentKind.Compressed
            && (entry & OffsetMask) != 0 && (entry & Copied) != 0;
        if (keeps)
        {
            table[index] = entry | ZeroBit;
            return;
        }

        ulong empty = hidesBacking ? ZeroBit : 0;
        if (entry != empty)
        {
            Replace(table, index, empty, guest);
        }
    }

    private void FlushAll()
    {
        bool wroteBlocks;
        int[] newBlocks;
        int[] l1Entries;
        ulong[] l1Values;
        List<long> released;
        var tables = new List<(Qcow2Table Table, byte[] Copy)>();
        lock (_meta)
        {
            long wantedLength = _refcounts.HighWater << _clusterBits;
            if (!_file.IsDevice && _file.Length < wantedLength)
            {
                Check(_file.Truncate(wantedLength));
            }

            wroteBlocks = _refcounts.WriteBlocks();
            newBlocks = _refcounts.TakeNewBlocks();
            foreach (Qcow2Table table in _l2Cache.Tables)
            {
                if (table.IsDirty)
                {
                    tables.Add((table, (byte[])table.Data.Clone()));
                    table.IsDirty = false;
                    table.IsPinned = true;
                }
            }

            l1Entries = [.. _dirtyL1];
            l1Values = Array.ConvertAll(l1Entries, i => _l1[i]);
            _dirtyL1.Clear();
            released = _released;
            _released = [];
        }

        try
        {
            Check(_file.Sync());
            if (newBlocks.Length > 0)
            {
                lock (_meta)
                {
                    _refcounts.PublishBlocks(newBlocks);
                }

                Check(_file.Sync());
            }

            foreach ((Qcow2Table table, byte[] copy) in tables)
            {
                Check(_file.Write(table.Offset, (ReadOnlySpan<byte>)copy));
            }

            if (l1Entries.Length > 0)
            {
                Check(_file.Sync());
                WriteL1(l1Entries, l1Values);
            }

            if (tables.Count > 0 || l1Entries.Length > 0)
            {
                Check(_file.Sync());
            }
        }
        catch (Qcow2Fault)
        {
            Retain(tables, l1Entries, newBlocks, released);
            throw;
        }

        lock (_meta)
        {
            foreach ((Qcow2Table table, _) in tables)
            {
                table.IsPinned = false;
            }
        }

        if (released.Count > 0)
        {
            Release(released);
        }
    }

    private void WriteL1(int[] entries, ulong[] values)
    {
        byte[] raw = new byte[8];
        for (int i = 0; i < entries.Length; i++)
        {
            BinaryPrimitives.WriteUInt64BigEndian(raw, values[i]);
            Check(_file.Write(_header.L1Offset + (entries[i] * 8L), (ReadOnlySpan<byte>)raw));
        }
    }

    // A flush failed half way: everything that may not have reached the file is dirty again.
    private void Retain(List<(Qcow2Table Table, byte[] Copy)> tables, int[] l1, int[] newBlocks, List<long> released)
    {
        lock (_meta)
        {
            foreach ((Qcow2Table table, _) in tables)
            {
                table.IsDirty = true;
                table.IsPinned = false;
            }

            _dirtyL1.UnionWith(l1);
            _refcounts.RetainNewBlocks(newBlocks);
            _released.AddRange(released);
        }
    }

    // What these clusters were referred to by has left the file for good.
    private void Release(List<long> released)
    {
        _inFlight.EnterWriteLock();
        try
        {
            lock (_meta)
            {
                _unpacked = null;
                foreach (long cluster in released)
                {
                    if (_refcounts.Release(cluster))
                    {
                        _l2Cache.Forget(cluster << _clusterBits);
                        _ = _file.TryPunchHole(cluster << _clusterBits, _clusterBytes);
                    }
                }
            }
        }
        finally
        {
            _inFlight.ExitWriteLock();
        }
    }

    private Qcow2Fault Damage(string problem)
    {
        Interlocked.Increment(ref _damage);
        return new Qcow2Fault(BlockStatus.IoError, problem);
    }

    private BlockStatus Fail(Qcow2Fault fault)
    {
        _lastError = $"{Path}: {fault.Message}";
        return fault.Status;
    }

    private void Check(BlockStatus status)
    {
        if (status != BlockStatus.Ok)
        {
            throw new Qcow2Fault(status, _file.LastError);
        }
    }

    private enum ExtentKind
    {
        Unallocated,
        Zero,
        Data,
        Compressed,
    }

    private readonly record struct Extent(ExtentKind Kind, long HostOffset, long Length, ulong Entry);
}

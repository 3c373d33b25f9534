// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Block.Qcow2;

/// <summary>A snapshot kept inside an image.</summary>
/// <param name="Id">Unique identifier.</param>
/// <param name="Name">Name given by the user.</param>
/// <param name="UnixTimeSeconds">When it was taken.</param>
/// <param name="VmStateBytes">Size of the saved machine state, 0 when only the disk was kept.</param>
/// <param name="DiskBytes">Disk size at that time; the present one when the image does not say.</param>
public sealed record Qcow2Snapshot(string Id, string Name, long UnixTimeSeconds, long VmStateBytes, long DiskBytes)
{
    internal long L1Offset { get; init; }

    internal int L1Entries { get; init; }
}

/// <summary>
/// The header of a qcow2 image, checked: every offset is aligned and every size is bounded, so that code which uses it
/// need not check again. Field names and offsets as in the QEMU project's docs/interop/qcow2.
/// </summary>
internal sealed class Qcow2Header
{
    public const uint Magic = 0x514649FB;
    public const ulong IncompatibleDirty = 1 << 0;
    public const ulong IncompatibleCorrupt = 1 << 1;
    public const ulong IncompatibleDataFile = 1 << 2;
    public const ulong IncompatibleCompression = 1 << 3;
    public const ulong IncompatibleExtendedL2 = 1 << 4;
    public const ulong CompatibleLazyRefcounts = 1 << 0;
    public const int MaxL1Bytes = 32 << 20;
    public const int MaxRefcountTableBytes = 8 << 20;
    public const int MaxSnapshots = 65536;
    public const int MaxSnapshotTableBytes = 16 << 20;
    public const uint ExtensionBackingFormat = 0xE2792ACA;
    public const uint ExtensionFeatureNames = 0x6803F857;

    private Qcow2Header()
    {
    }

    public int Version { get; private set; }

    public int ClusterBits { get; private set; }

    public int ClusterBytes => 1 << ClusterBits;

    public long DiskBytes { get; private set; }

    public int L1Entries { get; private set; }

    public long L1Offset { get; private set; }

    public long RefcountTableOffset { get; set; }

    public int RefcountTableClusters { get; set; }

    public int SnapshotCount { get; private set; }

    public long SnapshotsOffset { get; private set; }

    public long SnapshotTableBytes { get; private set; }

    public ulong Incompatible { get; set; }

    public ulong Compatible { get; private set; }

    public ulong Autoclear { get; set; }

    public int RefcountOrder { get; private set; } = 4;

    public int HeaderBytes { get; private set; } = 72;

    /// <summary>0 zlib, 1 zstd.</summary>
    public byte CompressionType { get; private set; }

    public string? BackingFile { get; private set; }

    public string? BackingFormat { get; private set; }

    public IReadOnlyList<Qcow2Snapshot> Snapshots { get; private set; } = [];

    public int L2EntriesPerTable => ClusterBytes / 8;

    /// <summary>log2 of the guest bytes that one L2 table maps.</summary>
    public int L2CoverBits => ClusterBits + ClusterBits - 3;

    /// <exception cref="ImageException">Damaged, hostile or of an unknown kind.</exception>
    public static Qcow2Header Read(BlockFile file)
    {
        var header = new Qcow2Header();
        header.Parse(file);
        return header;
    }

    private void Parse(BlockFile file)
    {
        string path = file.Path;
        long fileBytes = file.Length;
        byte[] raw = new byte[112];
        if (file.Read(0, raw) != BlockStatus.Ok)
        {
            throw new ImageException(path, 0, $"cannot be read: {file.LastError}");
        }

        if (fileBytes < 72 || Be32(raw, 0) != Magic)
        {
            throw new ImageException(path, 0, "is not a qcow2 image (no QFI signature)");
        }

        uint version = Be32(raw, 4);
        if (version is not (2 or 3))
        {
            throw new ImageException(path, 4, $"qcow2 version {version} is unknown; 2 and 3 are known");
        }

        Version = (int)version;
        uint clusterBits = Be32(raw, 20);
        if (clusterBits is < 9 or > 21)
        {
            throw new ImageException(path, 20, $"cluster size 2^{clusterBits} is outside 2^9..2^21");
        }

        ClusterBits = (int)clusterBits;
        ParseFeatures(path, raw);
        ulong size = Be64(raw, 24);
        if (size > long.MaxValue / 2)
        {
            throw new ImageException(path, 24, $"disk size {size} is too large");
        }

        DiskBytes = (long)size;
        if (DiskBytes == 0 || (DiskBytes & 511) != 0)
        {
            throw new ImageException(path, 24, $"disk size {DiskBytes} is not a positive multiple of 512");
        }

        if (Be32(raw, 32) != 0)
        {
            throw new ImageException(path, 32, "is encrypted, which is not supported");
        }

        ParseTables(path, raw, fileBytes);
        ParseExtensions(file);
        ParseBackingFile(file, raw);
        ParseSnapshots(file, fileBytes);
    }

    private void ParseFeatures(string path, byte[] raw)
    {
        if (Version == 2)
        {
            return;
        }

        Incompatible = Be64(raw, 72);
        Compatible = Be64(raw, 80);
        Autoclear = Be64(raw, 88);
        uint order = Be32(raw, 96);
        uint headerBytes = Be32(raw, 100);
        if (headerBytes < 104 || headerBytes > ClusterBytes || (headerBytes & 7) != 0)
        {
            throw new ImageException(path, 100, $"header length {headerBytes} is not in 104..cluster size or not a multiple of 8");
        }

        HeaderBytes = (int)headerBytes;
        if (order > 6)
        {
            throw new ImageException(path, 96, $"reference counts of 2^{order} bits are unknown; at most 64 bits");
        }

        RefcountOrder = (int)order;
        if ((Incompatible & IncompatibleDataFile) != 0)
        {
            throw new ImageException(path, 72, "keeps its data in an external file, which is not supported");
        }

        if ((Incompatible & IncompatibleExtendedL2) != 0)
        {
            throw new ImageException(path, 72, "has extended L2 entries (subclusters), which are not supported");
        }

        ulong unknown = Incompatible & ~(IncompatibleDirty | IncompatibleCorrupt | IncompatibleCompression);
        if (unknown != 0)
        {
            throw new ImageException(path, 72, $"needs unknown incompatible features (bits 0x{unknown:x})");
        }

        if (headerBytes > 104)
        {
            CompressionType = raw[104];
        }

        bool hasBit = (Incompatible & IncompatibleCompression) != 0;
        if (CompressionType > 1 || hasBit != (CompressionType != 0))
        {
            throw new ImageException(path, 104, $"compression type {CompressionType} is unknown or does not match the feature bit");
        }
    }

    private void ParseTables(string path, byte[] raw, long fileBytes)
    {
        long cluster = ClusterBytes;
        uint l1Entries = Be32(raw, 36);
        if (l1Entries > MaxL1Bytes / 8)
        {
            throw new ImageException(path, 36, $"L1 table of {l1Entries} entries is larger than {MaxL1Bytes / 8}");
        }

        long covered = 1L << Math.Min(L2CoverBits, 62);
        long needed = ((DiskBytes - 1) / covered) + 1;
        if (l1Entries < needed)
        {
            throw new ImageException(path, 36, $"L1 table of {l1Entries} entries cannot map a disk of {DiskBytes} bytes");
        }

        L1Entries = (int)l1Entries;
        L1Offset = Table(path, raw, 40, "L1 table", l1Entries * 8L, fileBytes);
        uint clusters = Be32(raw, 56);
        if (clusters == 0 || clusters > MaxRefcountTableBytes / cluster)
        {
            // One cluster is always allowed, however large clusters are.
            if (clusters != 1)
            {
                throw new ImageException(path, 56, $"refcount table of {clusters} clusters is empty or larger than 8 MiB");
            }
        }

        RefcountTableClusters = (int)clusters;
        RefcountTableOffset = Table(path, raw, 48, "refcount table", clusters * cluster, fileBytes);
        uint snapshots = Be32(raw, 60);
        if (snapshots > MaxSnapshots)
        {
            throw new ImageException(path, 60, $"{snapshots} snapshots are more than {MaxSnapshots}");
        }

        SnapshotCount = (int)snapshots;
        SnapshotsOffset = snapshots == 0 ? 0 : Table(path, raw, 64, "snapshot table", 40L * snapshots, fileBytes);
    }

    private long Table(string path, byte[] raw, int at, string what, long lengthBytes, long fileBytes)
    {
        ulong offset = Be64(raw, at);
        if ((offset & (ulong)(ClusterBytes - 1)) != 0 || offset == 0)
        {
            throw new ImageException(path, at, $"{what} at 0x{offset:x} does not begin at a cluster of its own");
        }

        // The last cluster of a file may be cut short: what is missing reads as zeroes.
        if (offset >= (ulong)fileBytes || (ulong)lengthBytes > (ulong)fileBytes - offset + (ulong)ClusterBytes)
        {
            throw new ImageException(path, at, $"{what} at 0x{offset:x}, {lengthBytes} bytes, lies outside the file");
        }

        return (long)offset;
    }

    private void ParseExtensions(BlockFile file)
    {
        // Extensions fill the rest of the first cluster up to the backing file's name (version 2: none before 2.x
        // writers, but the end marker 0 follows there too).
        byte[] cluster = new byte[ClusterBytes];
        if (file.Read(0, cluster) != BlockStatus.Ok)
        {
            throw new ImageException(file.Path, 0, $"cannot be read: {file.LastError}");
        }

        long end = ClusterBytes;
        ulong backing = Be64(cluster, 8);
        if (backing != 0 && backing < (ulong)end)
        {
            end = (long)backing;
        }

        int at = HeaderBytes;
        while (end - at >= 8)
        {
            uint type = Be32(cluster, at);
            uint length = Be32(cluster, at + 4);
            if (type == 0)
            {
                return;
            }

            if (length > end - at - 8)
            {
                throw new ImageException(file.Path, at, $"header extension 0x{type:x8} of {length} bytes does not fit the header");
            }

            if (type == ExtensionBackingFormat)
            {
                BackingFormat = Encoding.UTF8.GetString(cluster, at + 8, (int)length);
            }

            at += 8 + (int)((length + 7) & ~7u);
        }
    }

    private void ParseBackingFile(BlockFile file, byte[] raw)
    {
        ulong offset = Be64(raw, 8);
        uint length = Be32(raw, 16);
        if (offset == 0)
        {
            return;
        }

        if (length is 0 or > 1023)
        {
            throw new ImageException(file.Path, 16, $"backing file name of {length} bytes is not in 1..1023");
        }

        if (offset > (ulong)ClusterBytes - length || offset < (ulong)HeaderBytes)
        {
            throw new ImageException(file.Path, 8, $"backing file name at 0x{offset:x} is outside the first cluster");
        }

        byte[] name = new byte[length];
        if (file.Read((long)offset, name) != BlockStatus.Ok)
        {
            throw new ImageException(file.Path, (long)offset, $"cannot be read: {file.LastError}");
        }

        if (Array.IndexOf(name, (byte)0) >= 0)
        {
            throw new ImageException(file.Path, (long)offset, "backing file name contains a NUL character");
        }

        BackingFile = Encoding.UTF8.GetString(name);
    }

    private void ParseSnapshots(BlockFile file, long fileBytes)
    {
        var snapshots = new List<Qcow2Snapshot>();
        long at = SnapshotsOffset;
        byte[] fixedPart = new byte[40];
        for (int i = 0; i < SnapshotCount; i++)
        {
            if (at > fileBytes - 40 || at - SnapshotsOffset > MaxSnapshotTableBytes)
            {
                throw new ImageException(file.Path, at, $"snapshot {i} of {SnapshotCount} lies outside the file or its table");
            }

            ReadAt(file, at, fixedPart);
            ulong l1Offset = Be64(fixedPart, 0);
            uint l1Entries = Be32(fixedPart, 8);
            int idBytes = BinaryPrimitives.ReadUInt16BigEndian(fixedPart.AsSpan(12));
            int nameBytes = BinaryPrimitives.ReadUInt16BigEndian(fixedPart.AsSpan(14));
            uint extraBytes = Be32(fixedPart, 36);
            if (l1Entries > MaxL1Bytes / 8 || (l1Offset & (ulong)(ClusterBytes - 1)) != 0
                || l1Offset > (ulong)fileBytes || l1Entries * 8L > fileBytes - (long)l1Offset + ClusterBytes)
            {
                throw new ImageException(file.Path, at, $"snapshot {i}: its L1 table is misplaced or too large");
            }

            if (extraBytes > 1024)
            {
                throw new ImageException(file.Path, at + 36, $"snapshot {i}: {extraBytes} bytes of extra data are too many");
            }

            byte[] rest = new byte[(int)extraBytes + idBytes + nameBytes];
            ReadAt(file, at + 40, rest);
            long stateBytes = extraBytes >= 8 ? (long)(Be64(rest, 0) & long.MaxValue) : Be32(fixedPart, 32);
            long diskBytes = extraBytes >= 16 ? (long)(Be64(rest, 8) & long.MaxValue) : DiskBytes;
            snapshots.Add(new Qcow2Snapshot(
                Encoding.UTF8.GetString(rest, (int)extraBytes, idBytes),
                Encoding.UTF8.GetString(rest, (int)extraBytes + idBytes, nameBytes),
                Be32(fixedPart, 16),
                stateBytes,
                diskBytes)
            {
                L1Offset = (long)l1Offset,
                L1Entries = (int)l1Entries,
            });
            at += (40 + rest.Length + 7) & ~7L;
        }

        SnapshotTableBytes = at - SnapshotsOffset;
        Snapshots = snapshots;
    }

    private static void ReadAt(BlockFile file, long at, byte[] into)
    {
        if (file.Read(at, into) != BlockStatus.Ok)
        {
            throw new ImageException(file.Path, at, $"cannot be read: {file.LastError}");
        }
    }

    private static uint Be32(byte[] raw, int at) => BinaryPrimitives.ReadUInt32BigEndian(raw.AsSpan(at));

    private static ulong Be64(byte[] raw, int at) => BinaryPrimitives.ReadUInt64BigEndian(raw.AsSpan(at));
}

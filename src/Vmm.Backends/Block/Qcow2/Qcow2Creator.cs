// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Text;
using System.Threading;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Block.Qcow2;

/// <summary>Lays out new images: header, refcount table, refcount blocks, L1 table, in this order.</summary>
internal static class Qcow2Creator
{
    private static readonly (byte Kind, byte Bit, string Name)[] s_features =
    [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];

    public static void Create(BlockFile file, DiskImageOptions options)
    {
        int clusterBits = options.ClusterBytes == 0 ? 16 : int.Log2(options.ClusterBytes);
        if (clusterBits is < 9 or > 21 || (options.ClusterBytes != 0 && 1 << clusterBits != options.ClusterBytes))
        {
            throw new ImageException(file.Path, -1, $"cluster size {options.ClusterBytes} is not a power of two in 512..2M");
        }

        long cluster = 1L << clusterBits;
        long size = options.LengthBytes;
        int coverBits = clusterBits + clusterBits - 3;
        long l1Entries = ((size - 1) >> coverBits) + 1;
        if (l1Entries * 8 > Qcow2Header.MaxL1Bytes)
        {
            throw new ImageException(
                file.Path, -1, $"a disk of {size} bytes needs larger clusters than {cluster} bytes");
        }

        long l1Clusters = ((l1Entries * 8) + cluster - 1) >> clusterBits;

        // Room in the refcount table for every cluster that the disk can ever take, up to the format's bound.
        long dataClusters = ((size - 1) >> clusterBits) + 1 + l1Entries + l1Clusters + 16;
        long perBlock = cluster / 2;
        long blocksForDisk = (dataClusters / perBlock) + 2;
        blocksForDisk += blocksForDisk / perBlock;
        long tableClusters = Math.Max(1, ((blocksForDisk * 8) + cluster - 1) >> clusterBits);
        tableClusters = Math.Min(tableClusters, Math.Max(1, Qcow2Header.MaxRefcountTableBytes >> clusterBits));

        // Blocks for what stands in the file now, themselves included.
        long blocks = 1;
        while (blocks * perBlock < 1 + tableClusters + blocks + l1Clusters)
        {
            blocks++;
        }

        long used = 1 + tableClusters + blocks + l1Clusters;
        long firstBlock = 1 + tableClusters;
        byte[] raw = new byte[Math.Max(cluster, 8)];
        for (long i = 0; i < blocks; i++)
        {
            Array.Clear(raw);
            for (long slot = 0; slot < perBlock && (i * perBlock) + slot < used; slot++)
            {
                BinaryPrimitives.WriteUInt16BigEndian(raw.AsSpan((int)(slot * 2)), 1);
            }

            Check(file, file.Write((firstBlock + i) << clusterBits, raw.AsSpan(0, (int)cluster)));
        }

        byte[] table = new byte[tableClusters << clusterBits];
        for (int i = 0; i < blocks; i++)
        {
            BinaryPrimitives.WriteInt64BigEndian(table.AsSpan(i * 8), (firstBlock + i) << clusterBits);
        }

        Check(file, file.Write(cluster, (ReadOnlySpan<byte>)table));
        Check(file, file.Truncate(used << clusterBits));
        Check(file, file.Sync());
        byte[] header = Header(file, options, clusterBits);
        BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(36), (int)l1Entries);
        BinaryPrimitives.WriteInt64BigEndian(header.AsSpan(40), (firstBlock + blocks) << clusterBits);
        BinaryPrimitives.WriteInt64BigEndian(header.AsSpan(48), cluster);
        BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(56), (int)tableClusters);

        // The header last: before it, the file is no image.
        Check(file, file.Write(0, (ReadOnlySpan<byte>)header));
        Check(file, file.Sync());
    }

    /// <summary>Fills a new image as far as the options ask; the image is open and locked.</summary>
    public static void Preallocate(
        Qcow2Image image, BlockFile file, DiskImageOptions options, IProgress<double>? progress, CancellationToken cancellation)
    {
        if (options.Preallocation == DiskPreallocation.Off)
        {
            return;
        }

        bool writesData = options.Preallocation == DiskPreallocation.Full;
        Check(image, image.Preallocate(writesData ? null : progress, cancellation));
        if (options.Preallocation == DiskPreallocation.Reserve)
        {
            BlockStatus status = file.Reserve(0, file.Length);
            if (status == BlockStatus.NoSpace)
            {
                throw new ImageException(file.Path, -1, "no space is left for the whole disk");
            }
        }
        else if (writesData)
        {
            DiskImage.WriteAllZeroes(image, progress, cancellation);
        }
    }

    private static byte[] Header(BlockFile file, DiskImageOptions options, int clusterBits)
    {
        byte[] header = new byte[1 << clusterBits];
        BinaryPrimitives.WriteUInt32BigEndian(header, Qcow2Header.Magic);
        BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(4), 3);
        BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(20), clusterBits);
        BinaryPrimitives.WriteInt64BigEndian(header.AsSpan(24), options.LengthBytes);
        BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(96), 4);
        BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(100), 112);
        int at = 112;
        if (options.BackingPath is not null)
        {
            byte[] format = Encoding.UTF8.GetBytes(options.BackingFormat ?? "");
            at = Extension(header, at, Qcow2Header.ExtensionBackingFormat, format);
        }

        if (clusterBits >= 10)
        {
            byte[] names = new byte[s_features.Length * 48];
            for (int i = 0; i < s_features.Length; i++)
            {
                names[i * 48] = s_features[i].Kind;
                names[(i * 48) + 1] = s_features[i].Bit;
                Encoding.ASCII.GetBytes(s_features[i].Name).CopyTo(names, (i * 48) + 2);
            }

            at = Extension(header, at, Qcow2Header.ExtensionFeatureNames, names);
        }

        at += 8;
        if (options.BackingPath is not null)
        {
            byte[] name = Encoding.UTF8.GetBytes(options.BackingPath);
            if (name.Length > 1023 || at + name.Length > header.Length)
            {
                throw new ImageException(file.Path, -1, "the backing file's name is too long");
            }

            name.CopyTo(header, at);
            BinaryPrimitives.WriteInt64BigEndian(header.AsSpan(8), at);
            BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(16), name.Length);
        }

        return header;
    }

    private static int Extension(byte[] header, int at, uint type, byte[] data)
    {
        BinaryPrimitives.WriteUInt32BigEndian(header.AsSpan(at), type);
        BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(at + 4), data.Length);
        data.CopyTo(header, at + 8);
        return at + 8 + ((data.Length + 7) & ~7);
    }

    private static void Check(BlockFile file, BlockStatus status)
    {
        if (status != BlockStatus.Ok)
        {
            throw new ImageException(file.Path, -1, $"cannot be written: {file.LastError}");
        }
    }

    private static void Check(Qcow2Image image, BlockStatus status)
    {
        if (status != BlockStatus.Ok)
        {
            throw new ImageException(image.Path, -1, $"cannot be written: {image.LastError}");
        }
    }
}

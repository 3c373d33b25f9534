// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.IO.Compression;
using ZstdSharp;

namespace Vmm.Backends.Block.Qcow2;

/// <summary>Unpacks compressed clusters: raw deflate (type 0) or zstd (type 1).</summary>
internal static class Qcow2Compression
{
    /// <summary>Unpacks exactly one cluster; what follows in <paramref name="packed"/> belongs to somebody else.</summary>
    /// <returns>False when the data is damaged or too short.</returns>
    public static bool TryUnpack(byte type, byte[] packed, byte[] cluster)
    {
        try
        {
            using var source = new MemoryStream(packed, writable: false);
            using Stream stream = type == 0
                ? new DeflateStream(source, CompressionMode.Decompress)
                : new DecompressionStream(source);
            stream.ReadExactly(cluster);
            return true;
        }
        catch (Exception e) when (e is InvalidDataException or EndOfStreamException or ZstdException)
        {
            return false;
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Block;

// Theory. A disk on the host is built from two layers.
//
//   IBlockBackend   what a controller sees: asynchronous, completions one at a time        ThreadedBlockBackend
//   BlockImage      an image format: synchronous calls on byte ranges, any thread at once  RawImage, Qcow2Image
//
// A format is easier to write, read and test as plain calls; the one thing that needs to be asynchronous, not blocking
// a vCPU, is done once, by a few worker threads for each disk. The layer below, BlockFile, is the host's.
//
// What stability means. A write is stable, that is survives a power cut, when a Flush that began after the write
// completed has completed, or when the write asked for Force Unit Access. Everything else may be lost or kept, sector
// by sector. Killing the VMM loses nothing that was written to the host file, but formats with their own maps
// (qcow2) order their writes so that the weaker promise also holds there.
//
// Images are hostile input: they may have been made by anybody or damaged. A bad header is an ImageException that
// names the file and the offset; damage found later fails the request concerned and is counted.
//
// What this layer does not do: caching of data (the host's page cache does that), throttling, encryption.

/// <summary>An image cannot be used. The message is one line for people and names the file and the offset.</summary>
public sealed class ImageException : Exception
{
    /// <summary>Makes one.</summary>
    /// <param name="path">The image.</param>
    /// <param name="offset">Byte offset of the field concerned, or -1 when none is.</param>
    /// <param name="problem">What is wrong, and what to do where that helps.</param>
    public ImageException(string path, long offset, string problem)
        : base(offset < 0 ? $"{path}: {problem}" : FormattableString.Invariant($"{path}: offset 0x{offset:x}: {problem}"))
    {
        Path = path;
        Offset = offset;
    }

    /// <summary>The image.</summary>
    public string Path { get; }

    /// <summary>Byte offset in the file, or -1.</summary>
    public long Offset { get; }
}

/// <summary>
/// An open disk image: synchronous calls, any thread, any number at once. Ranges are inside the disk and multiples of
/// 512 (the caller has checked). Calls return a status and do not throw.
/// </summary>
public abstract class BlockImage : IDisposable
{
    /// <summary>The file's path.</summary>
    public abstract string Path { get; }

    /// <summary>"raw", "qcow2".</summary>
    public abstract string Format { get; }

    /// <summary>Disk size in bytes, a multiple of 512.</summary>
    public abstract long LengthBytes { get; }

    /// <summary>Preferred I/O size in bytes.</summary>
    public virtual int BlockBytes => 512;

    /// <summary>Writes are refused.</summary>
    public abstract bool IsReadOnly { get; }

    /// <summary>Discard gives space back.</summary>
    public virtual bool CanDiscard => false;

    /// <summary>The image underneath, or null.</summary>
    public virtual BlockImage? Backing => null;

    /// <summary>The last failure in words, or an empty string.</summary>
    public virtual string LastError => "";

    /// <summary>Reads.</summary>
    public abstract BlockStatus Read(long offset, in IoBuffer into);

    /// <summary>Writes.</summary>
    public abstract BlockStatus Write(long offset, in IoBuffer from);

    /// <summary>Makes everything whose call has returned stable.</summary>
    public abstract BlockStatus Flush();

    /// <summary>The content is no longer needed.</summary>
    public virtual BlockStatus Discard(long offset, long length) => BlockStatus.Ok;

    /// <summary>Makes a range read as zeroes.</summary>
    /// <param name="offset">Where.</param>
    /// <param name="length">Bytes.</param>
    /// <param name="mayUnmap">Space may be given back.</param>
    public virtual BlockStatus WriteZeroes(long offset, long length, bool mayUnmap)
    {
        byte[] zeroes = new byte[(int)Math.Min(length, 1 << 20)];
        for (long done = 0; done < length;)
        {
            int part = (int)Math.Min(zeroes.Length, length - done);
            BlockStatus status = Write(offset + done, new IoBuffer(zeroes.AsMemory(0, part)));
            if (status != BlockStatus.Ok)
            {
                return status;
            }

            done += part;
        }

        return BlockStatus.Ok;
    }

    /// <summary>Flushes, best effort, and closes the file and those below it.</summary>
    public void Dispose()
    {
        Dispose(disposing: true);
        GC.SuppressFinalize(this);
    }

    /// <summary>Closes what the image holds.</summary>
    protected abstract void Dispose(bool disposing);
}

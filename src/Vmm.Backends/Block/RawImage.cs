// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Block;

/// <summary>
/// A disk whose bytes are the file's bytes: raw files, block devices, ISO and floppy images. A file that does not end
/// at a sector border is shown with its last sector filled up with zeroes.
/// </summary>
public sealed class RawImage : BlockImage
{
    private readonly BlockFile _file;

    /// <summary>Takes over an open file.</summary>
    /// <param name="file">The file; closed with the image.</param>
    /// <exception cref="ImageException">The file is empty or too large.</exception>
    public RawImage(BlockFile file)
    {
        ArgumentNullException.ThrowIfNull(file);
        _file = file;
        long length = file.Length;
        if (length <= 0)
        {
            throw new ImageException(file.Path, -1, "is empty; a disk needs at least one sector");
        }

        if (length > long.MaxValue - 511)
        {
            throw new ImageException(file.Path, -1, "is too large for a disk");
        }

        LengthBytes = (length + 511) & ~511L;
    }

    /// <inheritdoc/>
    public override string Path => _file.Path;

    /// <inheritdoc/>
    public override string Format => "raw";

    /// <inheritdoc/>
    public override long LengthBytes { get; }

    /// <inheritdoc/>
    public override bool IsReadOnly => _file.IsReadOnly;

    /// <inheritdoc/>
    public override bool CanDiscard => !IsReadOnly;

    /// <inheritdoc/>
    public override string LastError => _file.LastError;

    /// <summary>The file underneath.</summary>
    internal BlockFile File => _file;

    /// <summary>Opens and locks a raw image.</summary>
    /// <exception cref="IOException">The file cannot be opened or is in use.</exception>
    /// <exception cref="ImageException">The file is empty.</exception>
    public static RawImage Open(string path, bool readOnly)
    {
        BlockFile file = BlockFile.Open(path, readOnly);
        try
        {
            file.Lock();
            return new RawImage(file);
        }
        catch
        {
            file.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public override BlockStatus Read(long offset, in IoBuffer into) => _file.Read(offset, into);

    /// <inheritdoc/>
    public override BlockStatus Write(long offset, in IoBuffer from) => _file.Write(offset, from);

    /// <inheritdoc/>
    public override BlockStatus Flush() => IsReadOnly ? BlockStatus.Ok : _file.Sync();

    /// <inheritdoc/>
    public override BlockStatus Discard(long offset, long length)
    {
        // Advice: a host that cannot give space back has done all it can.
        _ = _file.TryPunchHole(offset, length);
        return BlockStatus.Ok;
    }

    /// <inheritdoc/>
    public override BlockStatus WriteZeroes(long offset, long length, bool mayUnmap)
    {
        bool done = mayUnmap && _file.TryPunchHole(offset, length);
        done = done || _file.TryZeroRange(offset, length);
        return done ? BlockStatus.Ok : base.WriteZeroes(offset, length, mayUnmap);
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            _ = Flush();
            _file.Dispose();
        }
    }
}

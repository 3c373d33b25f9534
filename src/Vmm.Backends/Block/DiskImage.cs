// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Threading;
using Vmm.Backends.Block.Qcow2;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Block;

/// <summary>How much of a new disk takes up space from the start.</summary>
public enum DiskPreallocation
{
    /// <summary>Nothing: the file grows as the guest writes.</summary>
    Off,

    /// <summary>qcow2: all tables, so that writes need no metadata; raw: as Off.</summary>
    Metadata,

    /// <summary>The host reserves the space (posix_fallocate).</summary>
    Reserve,

    /// <summary>Zeroes are written to all of it.</summary>
    Full,
}

/// <summary>What a new image is to be.</summary>
public sealed record DiskImageOptions
{
    /// <summary>"raw" or "qcow2".</summary>
    public string Format { get; init; } = "qcow2";

    /// <summary>Disk size in bytes, rounded up to 512; 0 takes the backing image's.</summary>
    public long LengthBytes { get; init; }

    /// <summary>Cluster size in bytes for qcow2, 0 for the usual 64 KiB.</summary>
    public int ClusterBytes { get; init; }

    /// <summary>Backing image (qcow2 only), relative to the new image's directory; null for none.</summary>
    public string? BackingPath { get; init; }

    /// <summary>"raw" or "qcow2"; null decides by the backing image's name as <see cref="DiskImage.Open"/> does.</summary>
    public string? BackingFormat { get; init; }

    /// <summary>Space taken at once.</summary>
    public DiskPreallocation Preallocation { get; init; }
}

/// <summary>
/// Opens and makes images. The format is never guessed from the content alone: a guest can write anything into its raw
/// disk, also the header of a qcow2 image that names a file of the host as its backing file.
/// </summary>
public static class DiskImage
{
    private const int MaxDepth = 32;

    /// <summary>Opens an image and locks it.</summary>
    /// <param name="path">The image.</param>
    /// <param name="readOnly">Open for reading only; several may do that at once.</param>
    /// <param name="format">"raw", "qcow2", or null: qcow2 when the name ends in .qcow2 or .qcow, else raw.</param>
    /// <exception cref="IOException">A file cannot be opened or is in use.</exception>
    /// <exception cref="ImageException">The image is damaged, of another format, or uses what is not supported.</exception>
    public static BlockImage Open(string path, bool readOnly, string? format = null)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        switch (format ?? FormatByName(path))
        {
            case "qcow2":
                return Qcow2Image.Open(path, readOnly);
            case "raw":
                RawImage image = RawImage.Open(path, readOnly);
                if (format is null && HasQcow2Signature(image))
                {
                    image.Dispose();
                    throw new ImageException(
                        path, 0, "looks like a qcow2 image but is not named so; state `format: qcow2` or `format: raw`");
                }

                return image;
            default:
                throw new ImageException(path, -1, $"disk format \"{format}\" is unknown; raw and qcow2 are known");
        }
    }

    /// <summary>The files that an image consists of: itself first, then its chain of backing files.</summary>
    /// <exception cref="IOException">A file cannot be opened or is in use.</exception>
    /// <exception cref="ImageException">As <see cref="Open"/>.</exception>
    public static IReadOnlyList<string> ListFiles(string path, string? format = null)
    {
        using BlockImage image = Open(path, readOnly: true, format);
        var files = new List<string>();
        for (BlockImage? layer = image; layer is not null; layer = layer.Backing)
        {
            files.Add(layer.Path);
        }

        return files;
    }

    /// <summary>Makes a new image; the file must not exist.</summary>
    /// <param name="path">Where.</param>
    /// <param name="options">What.</param>
    /// <param name="progress">Told the part done, 0..1, on the calling thread; may be null.</param>
    /// <param name="cancellation">Stops; the file is removed then, as after an error.</param>
    /// <exception cref="IOException">The file exists or cannot be written.</exception>
    /// <exception cref="ImageException">The options do not fit together.</exception>
    public static void Create(
        string path, DiskImageOptions options, IProgress<double>? progress = null, CancellationToken cancellation = default)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        ArgumentNullException.ThrowIfNull(options);
        options = Complete(path, options);
        using BlockFile file = BlockFile.Create(path);
        try
        {
            file.Lock();
            if (string.Equals(options.Format, "raw", StringComparison.Ordinal))
            {
                CreateRaw(file, options, progress, cancellation);
            }
            else
            {
                Qcow2Creator.Create(file, options);
                if (options.Preallocation != DiskPreallocation.Off)
                {
                    // The image opens the file again; one lock at a time.
                    file.Dispose();
                    using Qcow2Image image = Qcow2Image.Open(path, readOnly: false);
                    using BlockFile second = BlockFile.Open(path, readOnly: false);
                    Qcow2Creator.Preallocate(image, second, options, progress, cancellation);
                }
            }

            progress?.Report(1);
        }
        catch
        {
            File.Delete(path);
            throw;
        }
    }

    /// <summary>Checks a qcow2 image: references, counts, damage. The image must not be in use.</summary>
    /// <param name="path">The image.</param>
    /// <param name="repair">Put counts right; damage is only reported.</param>
    /// <param name="progress">Told the part done, 0..1; may be null.</param>
    /// <param name="cancellation">Stops before anything is repaired.</param>
    /// <exception cref="IOException">The file cannot be opened or is in use.</exception>
    /// <exception cref="ImageException">The header is damaged.</exception>
    public static Qcow2CheckResult CheckQcow2(
        string path, bool repair = false, IProgress<double>? progress = null, CancellationToken cancellation = default)
    {
        using BlockFile file = BlockFile.Open(path, !repair);
        file.Lock();
        return new Qcow2Checker(file, Qcow2Header.Read(file)).Run(repair, progress, cancellation);
    }

    internal static BlockImage OpenBacking(string overlay, string name, string? format, int depth)
    {
        if (depth >= MaxDepth)
        {
            throw new ImageException(overlay, 8, $"the chain of backing files is longer than {MaxDepth}, or a circle");
        }

        string path = ResolveBacking(overlay, name);
        try
        {
            return format switch
            {
                "qcow2" => Qcow2Image.Open(path, readOnly: true, depth + 1),
                "raw" => RawImage.Open(path, readOnly: true),
                null => throw new ImageException(
                    overlay, 8, $"does not say which format its backing file has; `qemu-img rebase -u -F FORMAT -b {name}` does"),
                _ => throw new ImageException(
                    overlay, 8, $"backing file format \"{format}\" is not supported; raw and qcow2 are"),
            };
        }
        catch (IOException e)
        {
            throw new ImageException(overlay, 8, $"backing file: {e.Message}");
        }
    }

    internal static void WriteAllZeroes(BlockImage image, IProgress<double>? progress, CancellationToken cancellation)
    {
        var zeroes = new IoBuffer(new byte[1 << 20]);
        for (long at = 0; at < image.LengthBytes; at += zeroes.Length)
        {
            cancellation.ThrowIfCancellationRequested();
            BlockStatus status = image.Write(at, zeroes.Slice(0, Math.Min(zeroes.Length, image.LengthBytes - at)));
            if (status != BlockStatus.Ok)
            {
                throw new ImageException(image.Path, -1, $"cannot be written: {image.LastError}");
            }

            progress?.Report((double)at / image.LengthBytes);
        }

        if (image.Flush() != BlockStatus.Ok)
        {
            throw new ImageException(image.Path, -1, $"cannot be written: {image.LastError}");
        }
    }

    private static string ResolveBacking(string overlay, string name)
    {
        int colon = name.IndexOf(':', StringComparison.Ordinal);
        int slash = name.IndexOf('/', StringComparison.Ordinal);
        if (name.StartsWith("file:", StringComparison.Ordinal))
        {
            name = name["file:".Length..];
        }
        else if (colon > 0 && (slash < 0 || colon < slash))
        {
            throw new ImageException(overlay, 8, $"backing file \"{name}\" is not a path of this host");
        }

        string directory = Path.GetDirectoryName(Path.GetFullPath(overlay)) ?? "/";
        return Path.GetFullPath(Path.Combine(directory, name));
    }

    private static string FormatByName(string path) =>
        path.EndsWith(".qcow2", StringComparison.OrdinalIgnoreCase) || path.EndsWith(".qcow", StringComparison.OrdinalIgnoreCase)
            ? "qcow2"
            : "raw";

    private static bool HasQcow2Signature(RawImage image)
    {
        byte[] start = new byte[512];
        return image.Read(0, new IoBuffer(start)) == BlockStatus.Ok
            && start.AsSpan().StartsWith("QFI\u00fb"u8[..3]) && start[3] == 0xFB;
    }

    private static DiskImageOptions Complete(string path, DiskImageOptions options)
    {
        if (options.Format is not ("raw" or "qcow2"))
        {
            throw new ImageException(path, -1, $"disk format \"{options.Format}\" is unknown; raw and qcow2 are known");
        }

        long length = options.LengthBytes;
        if (options.BackingPath is not null)
        {
            if (!string.Equals(options.Format, "qcow2", StringComparison.Ordinal))
            {
                throw new ImageException(path, -1, "a raw image cannot have a backing file");
            }

            if (options.Preallocation != DiskPreallocation.Off)
            {
                throw new ImageException(path, -1, "an image with a backing file cannot be preallocated");
            }

            string format = options.BackingFormat ?? FormatByName(options.BackingPath);
            options = options with { BackingFormat = format };
            using BlockImage backing = OpenBacking(path, options.BackingPath, format, 0);
            length = length == 0 ? backing.LengthBytes : length;
        }

        if (length <= 0 || length > 1L << 56)
        {
            throw new ImageException(path, -1, "a disk needs a size of at least 512 bytes and at most 64 PiB");
        }

        return options with { LengthBytes = (length + 511) & ~511L };
    }

    private static void CreateRaw(
        BlockFile file, DiskImageOptions options, IProgress<double>? progress, CancellationToken cancellation)
    {
        if (file.Truncate(options.LengthBytes) != BlockStatus.Ok)
        {
            throw new ImageException(file.Path, -1, $"cannot be made that large: {file.LastError}");
        }

        if (options.Preallocation == DiskPreallocation.Reserve)
        {
            if (file.Reserve(0, options.LengthBytes) != BlockStatus.Ok)
            {
                throw new ImageException(file.Path, -1, "no space could be reserved for the whole disk");
            }
        }
        else if (options.Preallocation == DiskPreallocation.Full)
        {
            byte[] zeroes = new byte[1 << 20];
            for (long at = 0; at < options.LengthBytes; at += zeroes.Length)
            {
                cancellation.ThrowIfCancellationRequested();
                int part = (int)Math.Min(zeroes.Length, options.LengthBytes - at);
                if (file.Write(at, zeroes.AsSpan(0, part)) != BlockStatus.Ok)
                {
                    throw new ImageException(file.Path, -1, $"cannot be written: {file.LastError}");
                }

                progress?.Report((double)at / options.LengthBytes);
            }
        }

        if (file.Sync() != BlockStatus.Ok)
        {
            throw new ImageException(file.Path, -1, $"cannot be written: {file.LastError}");
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using Vmm.Backends.Block;
using Vmm.Config;
using Vmm.Core;
using Vmm.Machine.Boot;

namespace Vmm.Machine;

/// <summary>Opens the images of a definition's disks, and makes those that are to be made.</summary>
public static class BlockFactory
{
    /// <summary>Opens a disk's image; null for an empty drive.</summary>
    /// <param name="spec">The disk.</param>
    /// <param name="name">Its name, for the worker's thread.</param>
    /// <param name="findings">Receives what is wrong with its partition table or boot catalog; may be null.</param>
    /// <exception cref="BootException">It cannot be used.</exception>
    public static IBlockBackend? Open(DiskSpec spec, string name, List<MediaFinding>? findings = null)
    {
        if (spec.Path is null)
        {
            return null;
        }

        string? format = FormatOf(spec);
        bool isReadOnly = spec.ReadOnly || spec.IsCdrom;
        try
        {
            MakeIfMissing(spec, format);
            var options = new BlockBackendOptions
            {
                Cache = spec.Cache switch
                {
                    DiskCache.Writethrough => BlockCacheMode.WriteThrough,
                    DiskCache.Unsafe => BlockCacheMode.Unsafe,
                    _ => BlockCacheMode.WriteBack,
                },
                AllowDiscard = spec.Discard,
                BytesPerSecond = spec.BytesPerSecond,
                RequestsPerSecond = spec.RequestsPerSecond,
            };
            BlockImage image = DiskImage.Open(spec.Path, isReadOnly, format);
            findings?.AddRange(MediaInspector.Inspect(image));
            return RingBlockBackend.Open(image, name, options);
        }
        catch (IOException e)
        {
            throw new BootException($"disks: {e.Message}", isMissingInput: !File.Exists(spec.Path));
        }
        catch (ImageException e)
        {
            throw new BootException($"disks: {e.Message}");
        }
    }

    /// <summary>Makes the images that are to be made, and lists all files that a machine's disks consist of.</summary>
    /// <returns>Path, and whether the machine writes to it. Images that cannot be opened are left to <see cref="Open"/>.</returns>
    public static IReadOnlyList<(string Path, bool IsWritten)> Prepare(IReadOnlyList<DiskSpec> disks)
    {
        var files = new List<(string, bool)>();
        foreach (DiskSpec spec in disks)
        {
            if (spec.Path is null)
            {
                continue;
            }

            files.Add((spec.Path, !spec.ReadOnly && !spec.IsCdrom));
            try
            {
                MakeIfMissing(spec, FormatOf(spec));
                files.AddRange(DiskImage.ListFiles(spec.Path, FormatOf(spec)).Skip(1).Select(static backing => (backing, false)));
            }
            catch (Exception failure) when (failure is IOException or ImageException or UnauthorizedAccessException)
            {
                // Opening it says so, with the definition's place.
            }
        }

        return files;
    }

    private static string? FormatOf(DiskSpec spec) => spec.Format switch
    {
        DiskFormat.Raw => "raw",
        DiskFormat.Qcow2 => "qcow2",
        _ => null,
    };

    private static void MakeIfMissing(DiskSpec spec, string? format)
    {
        if (File.Exists(spec.Path) || (spec.SizeBytes is null && spec.Backing is null))
        {
            return;
        }

        bool isQcow2 = spec.Path!.EndsWith(".qcow2", StringComparison.OrdinalIgnoreCase) || spec.Backing is not null;
        DiskImage.Create(
            spec.Path,
            new DiskImageOptions
            {
                Format = format ?? (isQcow2 ? "qcow2" : "raw"),
                LengthBytes = spec.SizeBytes ?? 0,
                BackingPath = spec.Backing,
            });
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using Vmm.Backends.Block;
using Vmm.Config;
using Vmm.Core;
using Vmm.Machine.Boot;

namespace Vmm.Machine;

/// <summary>Opens the images of a definition's disks, and makes those that are to be made.</summary>
internal static class BlockFactory
{
    /// <summary>Opens a disk's image; null for an empty drive.</summary>
    /// <exception cref="BootException">It cannot be used.</exception>
    public static IBlockBackend? Open(DiskSpec spec, string name)
    {
        if (spec.Path is null)
        {
            return null;
        }

        string? format = spec.Format switch
        {
            DiskFormat.Raw => "raw",
            DiskFormat.Qcow2 => "qcow2",
            _ => null,
        };
        bool isReadOnly = spec.ReadOnly || spec.Bus == DiskBus.Cdrom;
        try
        {
            if (!File.Exists(spec.Path) && (spec.SizeBytes is not null || spec.Backing is not null))
            {
                Create(spec, format);
            }

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
            return new ThreadedBlockBackend(DiskImage.Open(spec.Path, isReadOnly, format), name, options);
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

    private static void Create(DiskSpec spec, string? format)
    {
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

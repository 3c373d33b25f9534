// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;

namespace Vmm.Config;

/// <summary>Compares a definition with the files of this host: what it names must be there and be readable.</summary>
public static class HostCheck
{
    /// <summary>
    /// Checks the files that a definition names. Opens each for reading and closes it again; changes nothing.
    /// </summary>
    /// <returns>What is wrong; empty when nothing is.</returns>
    public static IReadOnlyList<Diagnostic> Check(MachineSpec spec)
    {
        ArgumentNullException.ThrowIfNull(spec);
        var errors = new List<Diagnostic>();
        long kernel = CheckFile(spec, "boot.kernel", spec.Boot.Kernel, errors);
        long initrd = CheckFile(spec, "boot.initrd", spec.Boot.Initrd, errors);
        if (kernel + initrd > spec.MemoryBytes)
        {
            string key = initrd > kernel ? "boot.initrd" : "boot.kernel";
            errors.Add(new Diagnostic(
                spec.Source.Find(key),
                $"kernel and initrd take {Megabytes(kernel + initrd)} MiB; \"memory\" is {Quantity.FormatSize(spec.MemoryBytes)}"));
        }

        if (spec.Boot.Firmware is { } firmware && Path.IsPathRooted(firmware))
        {
            CheckFile(spec, "boot.firmware", firmware, errors);
        }

        for (int i = 0; i < spec.Disks.Count; i++)
        {
            DiskSpec disk = spec.Disks[i];
            bool isMade = disk.SizeBytes is not null || disk.Backing is not null;
            if (disk.Path is null || (isMade && !File.Exists(disk.Path) && !Directory.Exists(disk.Path)))
            {
                CheckFile(spec, $"disks[{i}].backing", disk.Backing, errors);
                continue;
            }

            string key = $"disks[{i}].path";
            if (!File.Exists(disk.Path) && !Directory.Exists(disk.Path))
            {
                errors.Add(new Diagnostic(spec.Source.Find(key), $"{disk.Path}: no such file (give a \"size\" and it is made)"));
                continue;
            }

            CheckFile(spec, key, disk.Path, errors);
        }

        CheckFile(spec, "display.password-file", spec.Display.PasswordFile, errors);
        CheckFile(spec, "display.tls-cert", spec.Display.TlsCertificate, errors);
        CheckFile(spec, "display.tls-key", spec.Display.TlsKey, errors);
        CheckFile(spec, "cloud-init.user-data", spec.CloudInit?.UserData, errors);
        CheckFile(spec, "cloud-init.network", spec.CloudInit?.Network, errors);
        for (int i = 0; i < spec.Shares.Count; i++)
        {
            if (!Directory.Exists(spec.Shares[i].Path))
            {
                errors.Add(new Diagnostic(spec.Source.Find($"shares[{i}].path"), $"{spec.Shares[i].Path}: no such directory"));
            }
        }

        return errors;
    }

    private static long CheckFile(MachineSpec spec, string key, string? path, List<Diagnostic> errors)
    {
        if (path is null)
        {
            return 0;
        }

        string? why;
        try
        {
            if (Directory.Exists(path))
            {
                why = "is a directory, not a file";
            }
            else
            {
                using Microsoft.Win32.SafeHandles.SafeFileHandle handle =
                    File.OpenHandle(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete);
                return RandomAccess.GetLength(handle);
            }
        }
        catch (Exception failure) when (failure is FileNotFoundException or DirectoryNotFoundException)
        {
            why = "no such file";
        }
        catch (UnauthorizedAccessException)
        {
            why = "permission denied";
        }
        catch (NotSupportedException)
        {
            return 0;
        }
        catch (IOException failure)
        {
            why = failure.Message.ReplaceLineEndings(" ");
        }

        errors.Add(new Diagnostic(spec.Source.Find(key), $"{path}: {why}"));
        return 0;
    }

    private static long Megabytes(long bytes) => (bytes + (1 << 20) - 1) >> 20;
}

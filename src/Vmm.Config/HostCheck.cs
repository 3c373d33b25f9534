// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;

namespace Vmm.Config;

/// <summary>
/// Compares a definition with the files of this host: what it names must be there and be readable, and what it makes must
/// have its directory.
/// </summary>
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
        long modules = 0;
        for (int i = 0; i < spec.Boot.Modules.Count; i++)
        {
            modules += CheckFile(spec, $"boot.modules[{i}].path", spec.Boot.Modules[i].Path, errors);
        }

        if (kernel + initrd + modules > spec.MemoryBytes)
        {
            (string key, string what) = modules > 0 ? ("boot.modules", "modules") : ("boot.initrd", "initrd");
            errors.Add(new Diagnostic(
                spec.Source.Find(kernel > initrd + modules ? "boot.kernel" : key),
                $"kernel and {what} take {Megabytes(kernel + initrd + modules)} MiB; "
                    + $"\"memory\" is {Quantity.FormatSize(spec.MemoryBytes)}"));
        }

        if (spec.Boot.Firmware is { } firmware && Path.IsPathRooted(firmware))
        {
            string word = Path.GetFileName(firmware).ToLowerInvariant() switch
            {
                "bios" or "legacy" => "seabios",
                "efi" or "ovmf" => "uefi",
                var other => other,
            };
            string meant = Suggestion.Ending(word, ["seabios", "uefi"]);
            CheckFile(spec, "boot.firmware", firmware, errors, meant);
        }

        for (int i = 0; i < spec.Disks.Count; i++)
        {
            DiskSpec disk = spec.Disks[i];
            bool isMade = disk.SizeBytes is not null || disk.Backing is not null;
            if (disk.Path is null || (isMade && !File.Exists(disk.Path) && !Directory.Exists(disk.Path)))
            {
                CheckFile(spec, $"disks[{i}].backing", disk.Backing, errors);
                CheckPlace(spec, $"disks[{i}].path", disk.Path, errors);
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

        CheckMade(spec, errors);
        return errors;
    }

    // Files and sockets that the VM makes.
    private static void CheckMade(MachineSpec spec, List<Diagnostic> errors)
    {
        CheckPlace(spec, "boot.vars", spec.Boot.Vars, errors);
        for (int i = 0; i < spec.Serial.Count; i++)
        {
            CheckPlace(spec, $"serial[{i}]", spec.Serial[i].Path, errors);
        }

        for (int i = 0; i < spec.Console.Count; i++)
        {
            CheckPlace(spec, $"console[{i}].backend", spec.Console[i].Backend.Path, errors);
        }

        for (int i = 0; i < spec.Nics.Count; i++)
        {
            CheckPlace(spec, $"nics[{i}].backend", spec.Nics[i].Backend == NicBackend.Socket ? spec.Nics[i].Target : null, errors);
        }

        CheckPlace(spec, "vsock.path", spec.Vsock?.Path, errors);
        CheckPlace(spec, "display.vnc", spec.Display.VncSocket, errors);
    }

    private static void CheckPlace(MachineSpec spec, string key, string? path, List<Diagnostic> errors)
    {
        if (path is null)
        {
            return;
        }

        string? folder = Path.GetDirectoryName(path);
        if (Directory.Exists(path))
        {
            errors.Add(new Diagnostic(spec.Source.Find(key), $"{path}: is a directory, not a file"));
        }
        else if (folder is { Length: > 0 } && !Directory.Exists(folder))
        {
            errors.Add(new Diagnostic(spec.Source.Find(key), $"{path}: there is no directory {folder} to make it in"));
        }
    }

    private static long CheckFile(MachineSpec spec, string key, string? path, List<Diagnostic> errors, string whenMissing = "")
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
            why = "no such file" + whenMissing;
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

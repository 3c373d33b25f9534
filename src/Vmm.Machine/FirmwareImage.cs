// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using Vmm.Machine.Boot;

namespace Vmm.Machine;

// Theory. Two families of firmware are known. A BIOS (SeaBIOS) is one ROM that ends at 4 GiB. UEFI (OVMF) is a ROM of code
// that ends there too and, right below it, a flash chip with the variables, which belongs to a VM and lives in a file of
// its own. OVMF comes either as two files (OVMF_CODE.fd and a template OVMF_VARS.fd) or as one with the variables in
// front. Which family a file belongs to is read from it: UEFI images start with a firmware volume (PI 1.7 volume 3
// §3.2.1: "_FVH" at offset 40), and one whose file system is the non-volatile data volume has its variables inside.

/// <summary>A firmware as read from the host.</summary>
/// <param name="Code">What ends at 4 GiB.</param>
/// <param name="Variables">Template of the variable store; null for a BIOS, or when none was found.</param>
/// <param name="IsUefi">It wants a variable store below the code.</param>
internal sealed record FirmwareImage(byte[] Code, byte[]? Variables, bool IsUefi)
{
    private const int MinimumBytes = 0x1_0000;
    private const int MaximumBytes = 16 << 20;

    // EFI_SYSTEM_NV_DATA_FV_GUID, fff12b8d-7696-4c8b-a985-2747075b4f50.
    private static readonly Guid s_variableVolume = new("fff12b8d-7696-4c8b-a985-2747075b4f50");

    private static readonly string[] s_places =
    [
        "/usr/share/seabios", "/usr/local/share/seabios", "/usr/share/qemu", "/usr/local/share/qemu",
        "/opt/local/share/qemu", "/usr/lib/qemu", "/opt/ooce/qemu/share/qemu",
    ];

    // Debian, Fedora, Arch, then what QEMU itself installs (FreeBSD, pkgsrc, OmniOS).
    private static readonly (string Code, string Variables)[] s_uefi =
    [
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
        ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
        ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
        ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
        ("/usr/share/qemu/edk2-x86_64-code.fd", "/usr/share/qemu/edk2-i386-vars.fd"),
        ("/usr/local/share/qemu/edk2-x86_64-code.fd", "/usr/local/share/qemu/edk2-i386-vars.fd"),
        ("/opt/local/share/qemu/edk2-x86_64-code.fd", "/opt/local/share/qemu/edk2-i386-vars.fd"),
        ("/opt/ooce/qemu/share/qemu/edk2-x86_64-code.fd", "/opt/ooce/qemu/share/qemu/edk2-i386-vars.fd"),
    ];

    /// <summary>Finds and reads the firmware that a definition names.</summary>
    /// <param name="name"><c>seabios</c>, <c>uefi</c>, a path; null is <c>seabios</c>.</param>
    /// <exception cref="BootException">It cannot be found, read or used.</exception>
    public static FirmwareImage Load(string? name) => name switch
    {
        null or "seabios" => new FirmwareImage(ReadChecked(FindBios()), null, false),
        "uefi" => LoadUefi(),
        _ => LoadFile(name),
    };

    /// <summary>A VGA BIOS, or nothing when the host has none.</summary>
    public static ReadOnlyMemory<byte> FindVgaBios() =>
        TryFind("vgabios-stdvga.bin") is { } path ? Read(path) : ReadOnlyMemory<byte>.Empty;

    private static FirmwareImage LoadUefi()
    {
        foreach ((string code, string variables) in s_uefi)
        {
            if (File.Exists(code) && File.Exists(variables))
            {
                return new FirmwareImage(ReadChecked(code), Read(variables), true);
            }
        }

        var looked = new List<string>();
        foreach ((string code, _) in s_uefi)
        {
            looked.Add(code);
        }

        throw new BootException(
            $"boot: OVMF is not installed (package ovmf); looked for {string.Join(", ", looked)}", isMissingInput: true);
    }

    private static FirmwareImage LoadFile(string path)
    {
        byte[] image = ReadChecked(path);
        if (!image.AsSpan(40, 4).SequenceEqual("_FVH"u8))
        {
            return new FirmwareImage(image, null, false);
        }

        ulong volume = BinaryPrimitives.ReadUInt64LittleEndian(image.AsSpan(32));
        if (new Guid(image.AsSpan(16, 16)) == s_variableVolume && volume % 4096 == 0 && volume + MinimumBytes <= (ulong)image.Length)
        {
            return new FirmwareImage(image[(int)volume..], image[..(int)volume], true);
        }

        string file = Path.GetFileName(path);
        string beside = file.Replace("CODE", "VARS", StringComparison.Ordinal).Replace("code", "vars", StringComparison.Ordinal);
        string template = Path.Combine(Path.GetDirectoryName(path) ?? ".", beside);
        bool exists = !string.Equals(file, beside, StringComparison.Ordinal) && File.Exists(template);
        return new FirmwareImage(image, exists ? Read(template) : null, true);
    }

    private static string FindBios() => TryFind("bios-256k.bin") ?? TryFind("bios.bin") ?? throw new BootException(
        $"boot: SeaBIOS is not installed (package seabios); looked in {string.Join(", ", s_places)}", isMissingInput: true);

    private static string? TryFind(string name)
    {
        foreach (string place in s_places)
        {
            string path = Path.Combine(place, name);
            if (File.Exists(path))
            {
                return path;
            }
        }

        return null;
    }

    private static byte[] ReadChecked(string path)
    {
        byte[] image = Read(path);
        return image.Length is >= MinimumBytes and <= MaximumBytes && image.Length % 4096 == 0
            ? image
            : throw new BootException($"boot: {path}: firmware is 64 KiB to 16 MiB and a multiple of 4 KiB");
    }

    private static byte[] Read(string path)
    {
        try
        {
            if (new FileInfo(path).Length > MaximumBytes)
            {
                throw new BootException($"boot: {path}: firmware is 64 KiB to 16 MiB and a multiple of 4 KiB");
            }

            return File.ReadAllBytes(path);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new BootException($"boot: {e.Message}", isMissingInput: true);
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Vmm.Config;

namespace Vmm.Fleet.Import;

// Theory. Each importer turns one foreign definition into our YAML text and a list of what it could not carry over: keys
// that mean nothing here, and keys that mean something we do not have. It writes text, not records, and the text goes
// through the same parser as every other definition: what an importer makes is checked like what a person writes. Nothing is
// dropped in silence: every foreign key is either used or listed.

/// <summary>A definition made from a foreign one.</summary>
/// <param name="Name">Name of the VM.</param>
/// <param name="Yaml">The definition.</param>
/// <param name="Lost">What could not be carried over, one line each.</param>
public sealed record ImportedVm(string Name, string Yaml, IReadOnlyList<string> Lost);

/// <summary>Reads definitions of other programs. Pure functions over text; any thread.</summary>
public static class Importer
{
    /// <summary>What can be read.</summary>
    public static IReadOnlyList<string> Formats { get; } = ["vm-bhyve", "vm.conf", "vmadm", "libvirt", "qemu"];

    /// <summary>Reads one file.</summary>
    /// <param name="format">One of <see cref="Formats"/>.</param>
    /// <param name="text">Its text.</param>
    /// <param name="name">Name for formats that carry none: the file's, without its ending.</param>
    /// <exception cref="FormatException">The text is not of that format.</exception>
    public static IReadOnlyList<ImportedVm> Read(string format, string text, string name)
    {
        ArgumentNullException.ThrowIfNull(text);
        return format switch
        {
            "vm-bhyve" => [VmBhyveImport.Read(text, name)],
            "vm.conf" => VmConfImport.Read(text),
            "vmadm" => [VmadmImport.Read(text)],
            "libvirt" => [LibvirtImport.Read(text)],
            "qemu" => [QemuImport.Read(text, name)],
            _ => throw new FormatException($"\"{format}\" cannot be imported; {string.Join(", ", Formats)} can{Suggestion.Ending(format, Formats)}"),
        };
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Security.Cryptography;
using System.Text;
using Vmm.Config;
using Vmm.Devices.Display;
using Vmm.Devices.Firmware;
using Vmm.Devices.Pci;
using Vmm.Machine.Boot;

namespace Vmm.Machine;

/// <summary>
/// The tables by which a guest learns what the machine is. Without firmware they lie in 0xE0000..0xFFFFF, where a guest
/// searches: the ACPI root pointer and tables first, SMBIOS from 0xF0000, the multiprocessor table from 0xFC000.
/// </summary>
internal static class MachineTables
{
    private const uint SmbiosAddress = 0xF_0000;
    private const uint MpAddress = 0xF_C000;

    // Version 5 of RFC 9562 with this as its name space: the same name gives the same identifier on every host.
    private static readonly Guid s_names = new("5b0f6d0e-4a3c-4e1b-9d55-0d3f6c1b7a42");

    /// <summary>The identifier of a VM: as defined, or derived from its name.</summary>
    public static Guid UuidOf(MachineSpec spec)
    {
        if (spec.Uuid is { } given)
        {
            return given;
        }

        byte[] name = Encoding.UTF8.GetBytes(spec.Name);
        byte[] input = new byte[16 + name.Length];
        s_names.TryWriteBytes(input, bigEndian: true, out _);
        name.CopyTo(input, 16);
#pragma warning disable CA5350 // a name-based identifier is defined by SHA-1; nothing is protected by it
        byte[] hash = SHA1.HashData(input);
#pragma warning restore CA5350
        hash[6] = (byte)((hash[6] & 0x0F) | 0x50);
        hash[8] = (byte)((hash[8] & 0x3F) | 0x80);
        return new Guid(hash.AsSpan(0, 16), bigEndian: true);
    }

    /// <summary>SMBIOS tables.</summary>
    public static Smbios MakeSmbios(MachineParts parts, MachineSpec spec) => Smbios.Build(new SmbiosSpec
    {
        Uuid = UuidOf(spec),
        Name = spec.Name,
        Version = typeof(MachineTables).Assembly.GetName().Version?.ToString(3) ?? "0",
        Sockets = spec.Cpus.Sockets,
        Cores = spec.Cpus.Count / spec.Cpus.Sockets / spec.Cpus.Threads,
        Threads = spec.Cpus.Count / spec.Cpus.Sockets,
        CpuSignature = parts.CpuSignature,
        LowBytes = parts.Layout.LowBytes,
        HighBytes = parts.Layout.HighBytes,
        HasBios = spec.Boot.Kernel is not null,
    });

    /// <summary>Writes the tables of a machine without firmware, after its PCI bus was set up.</summary>
    /// <returns>Address of the ACPI root pointer.</returns>
    /// <exception cref="BootException">They do not fit.</exception>
    public static ulong Write(MachineParts parts, MachineSpec spec, PciBus bus)
    {
        AcpiBlob blob = AcpiTables.Build(new AcpiSpec
        {
            Cpus = spec.Cpus.Count,
            SerialPorts = spec.Serial.Count,
            HasHpet = true,
            HasVga = parts.Display is Vga,
            HasKeyboardController = parts.Display is not null,
            Nodes = parts.AcpiNodes,
        });
        const ulong Rsdp = MemoryLayout.TablesStart;
        const ulong Tables = Rsdp + 64;
        byte[] placed = blob.PlaceAt(Tables);
        if ((ulong)placed.Length > SmbiosAddress - Tables)
        {
            throw new BootException("cpus: too many for the ACPI tables");
        }

        parts.Memory.TryWrite(Tables, placed);
        parts.Memory.TryWrite(Rsdp, blob.RootPointer(Tables));
        byte[] smbios = MakeSmbios(parts, spec).PlaceAt(SmbiosAddress);
        byte[] mp = MpTable.Build(MpAddress, spec.Cpus.Count, parts.CpuSignature, PciAllocator.PirqIrqs, bus);
        if (smbios.Length > MpAddress - SmbiosAddress || (ulong)mp.Length > MemoryLayout.TablesEnd - MpAddress)
        {
            throw new BootException("memory: too much for the SMBIOS tables");
        }

        parts.Memory.TryWrite(SmbiosAddress, smbios);
        parts.Memory.TryWrite(MpAddress, mp);
        return Rsdp;
    }
}

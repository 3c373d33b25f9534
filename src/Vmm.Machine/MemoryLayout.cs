// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;

namespace Vmm.Machine;

/// <summary>Kinds of e820 entries (ACPI 6.5 table 15.4).</summary>
public enum E820Kind
{
    /// <summary>Free RAM.</summary>
    Usable = 1,

    /// <summary>Not to be touched.</summary>
    Reserved = 2,

    /// <summary>ACPI tables, free after they were read.</summary>
    AcpiReclaimable = 3,
}

/// <summary>One entry of the memory map that a guest is given.</summary>
/// <param name="Start">Guest-physical address.</param>
/// <param name="LengthBytes">Length.</param>
/// <param name="Kind">What it is.</param>
public readonly record struct E820Entry(ulong Start, ulong LengthBytes, E820Kind Kind);

/// <summary>
/// Where things lie in guest-physical space: an i440fx-like PC. RAM below 3 GiB, a hole for PCI and the interrupt
/// controllers up to 4 GiB, the rest of RAM above it.
/// </summary>
public sealed class MemoryLayout
{
    /// <summary>Where the hole below 4 GiB starts: RAM never lies between this and 4 GiB.</summary>
    public const ulong HoleStart = 0xC000_0000;

    /// <summary>End of the hole.</summary>
    public const ulong HoleEnd = 0x1_0000_0000;

    /// <summary>Start of the legacy video window.</summary>
    public const ulong VideoStart = 0xA_0000;

    /// <summary>End of the legacy video window.</summary>
    public const ulong VideoEnd = 0xC_0000;

    /// <summary>Top of conventional memory; the extended BIOS data area lies above.</summary>
    public const ulong ConventionalEnd = 0x9_FC00;

    /// <summary>Where a machine without firmware puts ACPI, SMBIOS and MP tables.</summary>
    public const ulong TablesStart = 0xE_0000;

    /// <summary>End of the table area.</summary>
    public const ulong TablesEnd = 0x10_0000;

    /// <summary>Computes the layout.</summary>
    /// <param name="memoryBytes">RAM in bytes, a multiple of 4096.</param>
    public MemoryLayout(ulong memoryBytes)
    {
        MemoryBytes = memoryBytes;
        LowBytes = memoryBytes < HoleStart ? memoryBytes : HoleStart;
        HighBytes = memoryBytes - LowBytes;
    }

    /// <summary>All RAM.</summary>
    public ulong MemoryBytes { get; }

    /// <summary>RAM that starts at 0.</summary>
    public ulong LowBytes { get; }

    /// <summary>RAM that starts at 4 GiB.</summary>
    public ulong HighBytes { get; }

    /// <summary>The memory map of a machine without firmware.</summary>
    public IReadOnlyList<E820Entry> DirectBootMap()
    {
        var map = new List<E820Entry>();
        ulong conventional = LowBytes < ConventionalEnd ? LowBytes : ConventionalEnd;
        map.Add(new E820Entry(0, conventional, E820Kind.Usable));
        if (LowBytes > ConventionalEnd)
        {
            map.Add(new E820Entry(ConventionalEnd, VideoStart - ConventionalEnd, E820Kind.Reserved));
            map.Add(new E820Entry(TablesStart, TablesEnd - TablesStart, E820Kind.Reserved));
        }

        if (LowBytes > TablesEnd)
        {
            map.Add(new E820Entry(TablesEnd, LowBytes - TablesEnd, E820Kind.Usable));
        }

        if (HighBytes > 0)
        {
            map.Add(new E820Entry(HoleEnd, HighBytes, E820Kind.Usable));
        }

        return map;
    }
}

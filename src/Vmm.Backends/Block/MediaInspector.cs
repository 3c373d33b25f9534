// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Globalization;
using System.IO.Hashing;
using System.Text;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Block;

// Theory. Firmware that finds a damaged partition table or boot catalog says "No bootable device", or nothing. Whoever
// runs the VM has the file and should be told which byte of it is wrong. So the structures that firmware starts from are
// read once, when a disk is opened:
//
//   GPT         protective MBR, both headers, both arrays of partition entries        UEFI 2.10 §5.2.3, §5.3
//   El Torito   volume descriptors, boot record, boot catalog on a CD or its image    ECMA-119 §8, El Torito 1.0 §2
//
// Findings are told and nothing else follows from them: a disk with one damaged GPT header still starts (there are two),
// and a guest may be about to write a table of its own. The medium is hostile: no size or count from it decides how much
// is read or kept. The most that a call reads is 2 * MaxEntriesBytes and some sectors.
//
// The checksums are CRC-32 as in ISO 3309 (UEFI 2.10 §4.2).
//
// What this does not do: file systems, MBR partitions (they have no redundancy to check), repairs.

/// <summary>One thing that is wrong with a medium.</summary>
/// <param name="Path">The image.</param>
/// <param name="Offset">Byte offset on the disk; in the file too where the image is raw.</param>
/// <param name="Problem">What is wrong there.</param>
public sealed record MediaFinding(string Path, long Offset, string Problem)
{
    /// <summary>One line for people.</summary>
    public override string ToString() =>
        string.Create(CultureInfo.InvariantCulture, $"{Path}: offset 0x{Offset:x}: {Problem}");
}

/// <summary>Looks for damage in what firmware reads first. Any thread; never throws on what is on the medium.</summary>
public sealed class MediaInspector
{
    /// <summary>Findings of one medium that are kept.</summary>
    public const int MaxFindings = 8;

    private const int Sector = 512;
    private const int CdSector = 2048;
    private const int MinHeaderBytes = 92;

    // 128 entries of 128 bytes are usual; a table above this is damage.
    private const int MaxEntriesBytes = 1 << 20;
    private const int MaxDescriptors = 32;
    private const int FirstDescriptor = 16;

    private readonly BlockImage _image;
    private readonly List<MediaFinding> _findings = [];

    private MediaInspector(BlockImage image) => _image = image;

    /// <summary>Inspects a disk or disc.</summary>
    /// <returns>What is wrong; empty for a medium that has none of these structures.</returns>
    public static IReadOnlyList<MediaFinding> Inspect(BlockImage image)
    {
        ArgumentNullException.ThrowIfNull(image);
        var inspector = new MediaInspector(image);
        inspector.InspectGpt();
        inspector.InspectElTorito();
        return inspector._findings;
    }

    private void Add(long offset, string problem)
    {
        if (_findings.Count < MaxFindings)
        {
            _findings.Add(new MediaFinding(_image.Path, offset, problem));
        }
    }

    // False where the disk ends before, or cannot be read: the guest will see that itself.
    private bool TryRead(long offset, int length, out byte[] data)
    {
        data = [];
        if (offset < 0 || offset > _image.LengthBytes - length)
        {
            return false;
        }

        data = new byte[length];
        return _image.Read(offset, new IoBuffer(data)) == BlockStatus.Ok;
    }

    private void InspectGpt()
    {
        if (_image.LengthBytes < 6 * Sector || !TryRead(0, 2 * Sector, out byte[] start))
        {
            return;
        }

        long last = (_image.LengthBytes / Sector) - 1;
        if (!TryRead(last * Sector, Sector, out byte[] end))
        {
            return;
        }

        ReadOnlySpan<byte> mbr = start.AsSpan(0, Sector);
        bool signed = mbr[510] == 0x55 && mbr[511] == 0xAA;
        int protective = ProtectiveEntry(mbr);
        bool hasFirst = HasSignature(start.AsSpan(Sector));
        bool hasSecond = HasSignature(end);

        // Two of the three that there are make a GPT; one alone is a remnant of another use of the disk.
        if ((protective >= 0 ? 1 : 0) + (hasFirst ? 1 : 0) + (hasSecond ? 1 : 0) < 2)
        {
            return;
        }

        if (!signed)
        {
            Add(510, "the protective MBR lacks its signature 55 AA");
        }

        if (protective < 0)
        {
            Add(446, "a GPT disk without a protective partition (type EE) in its MBR");
        }
        else if (BinaryPrimitives.ReadUInt32LittleEndian(mbr[(protective + 8)..]) != 1)
        {
            Add(protective + 8, "the protective partition does not start at sector 1");
        }

        long second = last;
        if (!hasFirst)
        {
            Add(Sector, "the GPT header lacks its signature \"EFI PART\"");
        }
        else if (Header(start.AsSpan(Sector, Sector), 1, out long alternate))
        {
            second = alternate;
        }

        // A disk that was made larger has its second header where the first one says, no longer at the end.
        if (second == last && !hasSecond)
        {
            Add(last * Sector, "the second GPT header lacks its signature \"EFI PART\"");
        }
        else if (TryRead(second * Sector, Sector, out byte[] copy))
        {
            if (!HasSignature(copy))
            {
                Add(second * Sector, "the second GPT header lacks its signature \"EFI PART\"");
            }
            else
            {
                _ = Header(copy, second, out _);
            }
        }
    }

    private static int ProtectiveEntry(ReadOnlySpan<byte> mbr)
    {
        for (int at = 446; at < 510; at += 16)
        {
            if (mbr[at + 4] == 0xEE)
            {
                return at;
            }
        }

        return -1;
    }

    private static bool HasSignature(ReadOnlySpan<byte> header) => header.StartsWith("EFI PART"u8);

    // §5.3.2, in the order in which a reader must check: length, checksum, then what the checksum protects.
    private bool Header(ReadOnlySpan<byte> sector, long number, out long alternate)
    {
        alternate = -1;
        long at = number * Sector;
        uint length = BinaryPrimitives.ReadUInt32LittleEndian(sector[12..]);
        if (length is < MinHeaderBytes or > Sector)
        {
            Add(at + 12, string.Create(CultureInfo.InvariantCulture, $"a GPT header of {length} bytes; 92 to 512 are possible"));
            return false;
        }

        Span<byte> copy = stackalloc byte[Sector];
        sector[..(int)length].CopyTo(copy);
        copy.Slice(16, 4).Clear();
        if (Crc32.HashToUInt32(copy[..(int)length]) != BinaryPrimitives.ReadUInt32LittleEndian(sector[16..]))
        {
            Add(at + 16, "the GPT header does not match its checksum");
            return false;
        }

        if (BinaryPrimitives.ReadInt64LittleEndian(sector[24..]) != number)
        {
            Add(at + 24, "the GPT header says that it lies elsewhere");
            return false;
        }

        long sectors = _image.LengthBytes / Sector;
        long other = BinaryPrimitives.ReadInt64LittleEndian(sector[32..]);
        if (other <= 0 || other >= sectors)
        {
            Add(at + 32, "the other GPT header would lie outside the disk; is the file cut short?");
        }
        else
        {
            alternate = other;
        }

        Entries(sector, at, sectors);
        return alternate >= 0;
    }

    private void Entries(ReadOnlySpan<byte> header, long at, long sectors)
    {
        long first = BinaryPrimitives.ReadInt64LittleEndian(header[40..]);
        long last = BinaryPrimitives.ReadInt64LittleEndian(header[48..]);
        long table = BinaryPrimitives.ReadInt64LittleEndian(header[72..]);
        uint count = BinaryPrimitives.ReadUInt32LittleEndian(header[80..]);
        uint size = BinaryPrimitives.ReadUInt32LittleEndian(header[84..]);
        if (size < 128 || (size & (size - 1)) != 0 || (ulong)size * count is 0 or > MaxEntriesBytes)
        {
            Add(at + 80, string.Create(CultureInfo.InvariantCulture, $"{count} GPT partition entries of {size} bytes"));
            return;
        }

        int length = (int)((((long)size * count) + Sector - 1) / Sector * Sector);
        if (table <= 0 || table > sectors || !TryRead(table * Sector, length, out byte[] entries))
        {
            Add(at + 72, "the GPT partition entries would lie outside the disk");
            return;
        }

        if (Crc32.HashToUInt32(entries.AsSpan(0, (int)(size * count))) != BinaryPrimitives.ReadUInt32LittleEndian(header[88..]))
        {
            Add(table * Sector, "the GPT partition entries do not match their checksum");
            return;
        }

        for (int i = 0; i < count; i++)
        {
            ReadOnlySpan<byte> entry = entries.AsSpan(i * (int)size, 128);
            if (!entry[..16].ContainsAnyExcept((byte)0))
            {
                continue;
            }

            long from = BinaryPrimitives.ReadInt64LittleEndian(entry[32..]);
            long to = BinaryPrimitives.ReadInt64LittleEndian(entry[40..]);
            if (from < first || to > last || from > to)
            {
                Add((table * Sector) + (i * size) + 32, string.Create(
                    CultureInfo.InvariantCulture, $"GPT partition {i + 1} lies outside the usable sectors {first} to {last}"));
            }
        }
    }

    private void InspectElTorito()
    {
        long catalog = 0;
        long record = 0;
        bool isDisc = false;
        for (int i = 0; i < MaxDescriptors; i++)
        {
            long at = (FirstDescriptor + i) * (long)CdSector;
            if (!TryRead(at, CdSector, out byte[] descriptor))
            {
                return;
            }

            // ECMA-119 §8.1: type, "CD001", version.
            if (!descriptor.AsSpan(1, 5).SequenceEqual("CD001"u8))
            {
                // Nothing before it was one either: another kind of disk. Else the set has no end.
                if (isDisc)
                {
                    Add(at + 1, "a volume descriptor without its identifier \"CD001\", before the one that ends the set");
                    break;
                }

                if (i == 0 && TryRead(at + CdSector, CdSector, out byte[] next) && next.AsSpan(1, 5).SequenceEqual("CD001"u8))
                {
                    Add(at + 1, "the first volume descriptor lacks its identifier \"CD001\"");
                    isDisc = true;
                    continue;
                }

                return;
            }

            isDisc = true;
            if (descriptor[0] == 255)
            {
                break;
            }

            switch (descriptor[0])
            {
                case 0:
                    record = at;
                    catalog = BootRecord(descriptor, at);
                    break;
                case 1:
                    PrimaryVolume(descriptor, at);
                    break;
                case 2 or 3:
                    break;
                default:
                    Add(at, string.Create(CultureInfo.InvariantCulture, $"a volume descriptor of unknown type {descriptor[0]}"));
                    break;
            }

            if (i == MaxDescriptors - 1)
            {
                Add(at, "no volume descriptor ends the set");
            }
        }

        if (catalog > 0)
        {
            Catalog(catalog, record);
        }
    }

    // El Torito 1.0 figure 7.
    private long BootRecord(ReadOnlySpan<byte> descriptor, long at)
    {
        ReadOnlySpan<byte> system = "EL TORITO SPECIFICATION"u8;
        if (descriptor[6] != 1)
        {
            Add(at + 6, "a boot record of unknown version");
        }

        if (!descriptor.Slice(7, system.Length).SequenceEqual(system) || descriptor[30..39].ContainsAnyExcept((byte)0))
        {
            Add(at + 7, $"a boot record that is not El Torito's but \"{Readable(descriptor.Slice(7, 32))}\"");
            return 0;
        }

        uint sector = BinaryPrimitives.ReadUInt32LittleEndian(descriptor[0x47..]);
        if (sector <= FirstDescriptor || (sector + 1L) * CdSector > _image.LengthBytes)
        {
            Add(at + 0x47, string.Create(CultureInfo.InvariantCulture, $"the boot catalog would lie at sector {sector}, outside the disc"));
            return 0;
        }

        return sector * (long)CdSector;
    }

    // Numbers stand in both byte orders (ECMA-119 §7.2.3, §7.3.3) and must agree.
    private void PrimaryVolume(ReadOnlySpan<byte> descriptor, long at)
    {
        uint blocks = BinaryPrimitives.ReadUInt32LittleEndian(descriptor[80..]);
        if (blocks != BinaryPrimitives.ReadUInt32BigEndian(descriptor[84..]))
        {
            Add(at + 80, "the volume's size differs between its two byte orders");
        }
        else if (blocks * (long)CdSector > _image.LengthBytes)
        {
            Add(at + 80, string.Create(
                CultureInfo.InvariantCulture, $"the volume has {blocks} blocks, more than the disc; is the file cut short?"));
        }

        ushort block = BinaryPrimitives.ReadUInt16LittleEndian(descriptor[128..]);
        if (block != BinaryPrimitives.ReadUInt16BigEndian(descriptor[130..]) || block is not (512 or 1024 or 2048))
        {
            Add(at + 128, string.Create(CultureInfo.InvariantCulture, $"logical blocks of {block} bytes"));
        }
    }

    // El Torito 1.0 figures 2 to 5: entries of 32 bytes, the validation entry first.
    private void Catalog(long at, long record)
    {
        if (!TryRead(at, CdSector, out byte[] catalog))
        {
            Add(record + 0x47, "the boot catalog cannot be read");
            return;
        }

        ushort sum = 0;
        for (int i = 0; i < 32; i += 2)
        {
            sum += BinaryPrimitives.ReadUInt16LittleEndian(catalog.AsSpan(i));
        }

        if (catalog[0] != 1 || catalog[30] != 0x55 || catalog[31] != 0xAA)
        {
            Add(at, "no boot catalog where the boot record says that it is");
            return;
        }

        if (sum != 0)
        {
            Add(at + 28, "the boot catalog's validation entry does not match its checksum");
        }

        Entry(catalog.AsSpan(32, 32), at + 32);
        int place = 64;
        bool isLast = false;
        while (!isLast && place + 32 <= CdSector && catalog[place] is 0x90 or 0x91)
        {
            isLast = catalog[place] == 0x91;
            int entries = BinaryPrimitives.ReadUInt16LittleEndian(catalog.AsSpan(place + 2));
            long header = at + place;
            place += 32;
            for (int i = 0; i < entries; i++)
            {
                if (place + 32 > CdSector)
                {
                    Add(header + 2, string.Create(
                        CultureInfo.InvariantCulture, $"a section of {entries} boot entries, more than the catalog's sector has"));
                    return;
                }

                Entry(catalog.AsSpan(place, 32), at + place);
                place += 32;

                // Extensions follow their entry (figure 6); bit 5 says that another one comes.
                while (place + 32 <= CdSector && catalog[place] == 0x44)
                {
                    place += 32;
                }
            }
        }

        if (!isLast && place + 32 <= CdSector && catalog[place] != 0)
        {
            Add(at + place, string.Create(
                CultureInfo.InvariantCulture, $"an entry 0x{catalog[place]:x2} in the boot catalog where a section should start"));
        }
    }

    private void Entry(ReadOnlySpan<byte> entry, long at)
    {
        if (entry[0] is not (0x88 or 0x00))
        {
            Add(at, string.Create(CultureInfo.InvariantCulture, $"boot indicator 0x{entry[0]:x2}; 88 and 00 are possible"));
            return;
        }

        if ((entry[1] & 0x0F) > 4)
        {
            Add(at + 1, string.Create(CultureInfo.InvariantCulture, $"boot medium {entry[1] & 0x0F}; 0 to 4 are possible"));
        }

        uint sector = BinaryPrimitives.ReadUInt32LittleEndian(entry[8..]);
        if (entry[0] == 0x88 && (sector == 0 || sector * (long)CdSector >= _image.LengthBytes))
        {
            Add(at + 8, string.Create(CultureInfo.InvariantCulture, $"the boot image would lie at sector {sector}, outside the disc"));
        }
    }

    private static string Readable(ReadOnlySpan<byte> bytes)
    {
        var text = new StringBuilder();
        foreach (byte one in bytes.TrimEnd((byte)0))
        {
            text.Append(one is >= 0x20 and < 0x7F and not (byte)'"' ? (char)one : '?');
        }

        return text.ToString();
    }
}

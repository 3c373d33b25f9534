// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;

namespace Vmm.Backends.CloudInit;

/// <summary>A file of an <see cref="IsoImage"/>.</summary>
/// <param name="Name">Name in Rock Ridge and Joliet: 1 to 64 characters of ASCII, no slash.</param>
/// <param name="Content">Its bytes.</param>
public sealed record IsoFile(string Name, ReadOnlyMemory<byte> Content);

/// <summary>
/// Writes a CD image with one directory: ISO 9660 (ECMA-119) level 1 names for those who know nothing else, Rock Ridge
/// (RRIP 1.09 over SUSP 1.12) for Unix and Joliet for Windows. The same input gives the same bytes.
/// </summary>
/// <remarks>
/// Sectors: 16 primary volume descriptor, 17 Joliet's, 18 terminator, 19 to 22 path tables (little- and big-endian, for
/// each of the two trees), 23 continuation area with Rock Ridge's identification, then the two root directories and the
/// files, which both trees share.
/// </remarks>
public static class IsoImage
{
    /// <summary>Size of a sector.</summary>
    public const int SectorBytes = 2048;

    private const int PrimarySector = 16;
    private const int JolietSector = 17;
    private const int TerminatorSector = 18;
    private const int PathTableSector = 19;
    private const int ContinuationSector = 23;
    private const int RootSector = 24;
    private const int RootRecordBytes = 34;
    private const int PathTableBytes = 10;
    private const uint DirectoryMode = 0x416D; // 040555
    private const uint FileMode = 0x8124; // 0100444

    /// <summary>Makes an image.</summary>
    /// <param name="volume">Volume label, at most 16 characters of ASCII.</param>
    /// <param name="files">At most 100.</param>
    /// <param name="time">Time of everything in it.</param>
    public static byte[] Build(string volume, IReadOnlyList<IsoFile> files, DateTimeOffset time)
    {
        ArgumentNullException.ThrowIfNull(volume);
        ArgumentNullException.ThrowIfNull(files);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(volume.Length, 16, nameof(volume));
        ArgumentOutOfRangeException.ThrowIfGreaterThan(files.Count, 100, nameof(files));
        foreach (IsoFile file in files)
        {
            if (file.Name.Length is 0 or > 64 || !Ascii.IsValid(file.Name) || file.Name.Contains('/', StringComparison.Ordinal))
            {
                throw new ArgumentException($"{file.Name}: not a name for a CD", nameof(files));
            }
        }

        // Directory records must be in order of their names (ECMA-119 §9.3).
        var primary = new List<(string Short, IsoFile File, int Index)>();
        var joliet = new List<(IsoFile File, int Index)>();
        var taken = new HashSet<string>(StringComparer.Ordinal);
        for (int i = 0; i < files.Count; i++)
        {
            primary.Add((ShortName(files[i].Name, taken), files[i], i));
            joliet.Add((files[i], i));
        }

        primary.Sort((a, b) => string.CompareOrdinal(a.Short, b.Short));
        joliet.Sort((a, b) => string.CompareOrdinal(a.File.Name, b.File.Name));

        int primarySectors = 1;
        int jolietSectors = 1;
        var primaryDirectory = new DirectoryWriter(time);
        var jolietDirectory = new DirectoryWriter(time);
        var extents = new int[files.Count];

        // The first pass finds the lengths, the second knows the places.
        for (int pass = 0; pass < 2; pass++)
        {
            int jolietStart = RootSector + primarySectors;
            int next = jolietStart + jolietSectors;
            for (int i = 0; i < files.Count; i++)
            {
                extents[i] = files[i].Content.Length == 0 ? 0 : next;
                next += Sectors(files[i].Content.Length);
            }

            primaryDirectory.Clear();
            primaryDirectory.Add([0], RootSector, primarySectors * SectorBytes, isDirectory: true, RootFields());
            primaryDirectory.Add([1], RootSector, primarySectors * SectorBytes, isDirectory: true, Posix(DirectoryMode, 2));
            foreach ((string name, IsoFile file, int index) in primary)
            {
                byte[] fields = [.. Posix(FileMode, 1), .. AlternateName(file.Name)];
                primaryDirectory.Add(
                    Encoding.ASCII.GetBytes(name), extents[index], file.Content.Length, isDirectory: false, fields);
            }

            jolietDirectory.Clear();
            jolietDirectory.Add([0], jolietStart, jolietSectors * SectorBytes, isDirectory: true, []);
            jolietDirectory.Add([1], jolietStart, jolietSectors * SectorBytes, isDirectory: true, []);
            foreach ((IsoFile file, int index) in joliet)
            {
                jolietDirectory.Add(
                    Encoding.BigEndianUnicode.GetBytes(file.Name), extents[index], file.Content.Length, isDirectory: false, []);
            }

            primarySectors = Sectors(primaryDirectory.Length);
            jolietSectors = Sectors(jolietDirectory.Length);
        }

        int jolietRoot = RootSector + primarySectors;
        int end = jolietRoot + jolietSectors;
        foreach (IsoFile file in files)
        {
            end += Sectors(file.Content.Length);
        }

        byte[] image = new byte[end * SectorBytes];
        WriteDescriptor(Sector(image, PrimarySector), 1, volume, end, PathTableSector, RootSector, primarySectors, time);
        WriteDescriptor(Sector(image, JolietSector), 2, volume, end, PathTableSector + 2, jolietRoot, jolietSectors, time);
        Span<byte> terminator = Sector(image, TerminatorSector);
        terminator[0] = 255;
        "CD001"u8.CopyTo(terminator[1..]);
        terminator[6] = 1;
        WritePathTable(Sector(image, PathTableSector), RootSector, bigEndian: false);
        WritePathTable(Sector(image, PathTableSector + 1), RootSector, bigEndian: true);
        WritePathTable(Sector(image, PathTableSector + 2), jolietRoot, bigEndian: false);
        WritePathTable(Sector(image, PathTableSector + 3), jolietRoot, bigEndian: true);
        Extension().CopyTo(Sector(image, ContinuationSector));
        primaryDirectory.CopyTo(image.AsSpan(RootSector * SectorBytes));
        jolietDirectory.CopyTo(image.AsSpan(jolietRoot * SectorBytes));
        for (int i = 0; i < files.Count; i++)
        {
            files[i].Content.Span.CopyTo(image.AsSpan(extents[i] * SectorBytes));
        }

        return image;
    }

    private static int Sectors(int lengthBytes) => (lengthBytes + SectorBytes - 1) / SectorBytes;

    private static Span<byte> Sector(byte[] image, int number) => image.AsSpan(number * SectorBytes, SectorBytes);

    // Level 1: eight and three characters of A-Z, 0-9 and _.
    private static string ShortName(string name, HashSet<string> taken)
    {
        int dot = name.LastIndexOf('.');
        string stem = Clean(dot > 0 ? name[..dot] : name, 8);
        string extension = dot > 0 ? Clean(name[(dot + 1)..], 3) : "";
        for (int i = 0; ; i++)
        {
            string number = i == 0 ? "" : i.ToString(System.Globalization.CultureInfo.InvariantCulture);
            string candidate = stem[..Math.Min(stem.Length, 8 - number.Length)] + number + "." + extension + ";1";
            if (taken.Add(candidate))
            {
                return candidate;
            }
        }
    }

    private static string Clean(string text, int most)
    {
        var clean = new StringBuilder();
        foreach (char c in text.ToUpperInvariant())
        {
            if (clean.Length < most)
            {
                clean.Append(char.IsAsciiLetterUpper(c) || char.IsAsciiDigit(c) ? c : '_');
            }
        }

        return clean.ToString();
    }

    // ECMA-119 §8.4; the Joliet one is a supplementary descriptor (§8.5) with an escape sequence for UCS-2 level 3.
    private static void WriteDescriptor(
        Span<byte> into, byte type, string volume, int sectors, int pathTable, int root, int rootSectors, DateTimeOffset time)
    {
        bool isJoliet = type == 2;
        into[0] = type;
        "CD001"u8.CopyTo(into[1..]);
        into[6] = 1;
        Text(into.Slice(8, 32), "", isJoliet);
        Text(into.Slice(40, 32), volume, isJoliet);
        Both32(into[80..], (uint)sectors);
        if (isJoliet)
        {
            "%/E"u8.CopyTo(into[88..]);
        }

        Both16(into[120..], 1);
        Both16(into[124..], 1);
        Both16(into[128..], SectorBytes);
        Both32(into[132..], PathTableBytes);
        BinaryPrimitives.WriteUInt32LittleEndian(into[140..], (uint)pathTable);
        BinaryPrimitives.WriteUInt32BigEndian(into[148..], (uint)(pathTable + 1));
        DirectoryWriter.WriteRecord(into.Slice(156, RootRecordBytes), [0], root, rootSectors * SectorBytes, true, [], time);
        for (int at = 190; at < 702; at += 128)
        {
            Text(into.Slice(at, 128), "", isJoliet);
        }

        Text(into.Slice(702, 37), "", isJoliet);
        Text(into.Slice(739, 37), "", isJoliet);
        Text(into.Slice(776, 37), "", isJoliet);
        LongTime(into[813..], time);
        LongTime(into[830..], time);
        LongTime(into[847..], null);
        LongTime(into[864..], null);
        into[881] = 1;
    }

    private static void Text(Span<byte> into, string text, bool isJoliet)
    {
        if (!isJoliet)
        {
            into.Fill((byte)' ');
            Encoding.ASCII.GetBytes(text, into);
            return;
        }

        for (int i = 0; i + 1 < into.Length; i += 2)
        {
            into[i] = 0;
            into[i + 1] = i / 2 < text.Length ? (byte)text[i / 2] : (byte)' ';
        }
    }

    // ECMA-119 §8.4.26.1: sixteen digits and an offset from UTC in quarters of an hour.
    private static void LongTime(Span<byte> into, DateTimeOffset? time)
    {
        string digits = time?.UtcDateTime.ToString("yyyyMMddHHmmssff", System.Globalization.CultureInfo.InvariantCulture)
            ?? "0000000000000000";
        Encoding.ASCII.GetBytes(digits, into);
        into[16] = 0;
    }

    private static void WritePathTable(Span<byte> into, int root, bool bigEndian)
    {
        into[0] = 1;
        if (bigEndian)
        {
            BinaryPrimitives.WriteInt32BigEndian(into[2..], root);
            BinaryPrimitives.WriteUInt16BigEndian(into[6..], 1);
        }
        else
        {
            BinaryPrimitives.WriteInt32LittleEndian(into[2..], root);
            BinaryPrimitives.WriteUInt16LittleEndian(into[6..], 1);
        }
    }

    private static void Both16(Span<byte> into, ushort value)
    {
        BinaryPrimitives.WriteUInt16LittleEndian(into, value);
        BinaryPrimitives.WriteUInt16BigEndian(into[2..], value);
    }

    private static void Both32(Span<byte> into, uint value)
    {
        BinaryPrimitives.WriteUInt32LittleEndian(into, value);
        BinaryPrimitives.WriteUInt32BigEndian(into[4..], value);
    }

    // SUSP 1.12 §5.3 (SP) and §5.1 (CE): the root's own record says that system use fields follow, and where more are.
    private static byte[] RootFields()
    {
        byte[] fields = new byte[7 + 28];
        fields[0] = (byte)'S';
        fields[1] = (byte)'P';
        fields[2] = 7;
        fields[3] = 1;
        fields[4] = 0xBE;
        fields[5] = 0xEF;
        Span<byte> more = fields.AsSpan(7);
        more[0] = (byte)'C';
        more[1] = (byte)'E';
        more[2] = 28;
        more[3] = 1;
        Both32(more[4..], ContinuationSector);
        Both32(more[12..], 0);
        Both32(more[20..], (uint)Extension().Length);
        return [.. fields, .. Posix(DirectoryMode, 2)];
    }

    // SUSP 1.12 §5.5: names the extension.
    private static byte[] Extension()
    {
        const string Id = "RRIP_1991A";
        const string Description = "THE ROCK RIDGE INTERCHANGE PROTOCOL PROVIDES SUPPORT FOR POSIX FILE SYSTEM SEMANTICS";
        const string Source = "SEE PUBLISHER IDENTIFIER IN PRIMARY VOLUME DESCRIPTOR FOR CONTACT INFORMATION.";
        byte[] field = new byte[8 + Id.Length + Description.Length + Source.Length];
        field[0] = (byte)'E';
        field[1] = (byte)'R';
        field[2] = (byte)field.Length;
        field[3] = 1;
        field[4] = (byte)Id.Length;
        field[5] = (byte)Description.Length;
        field[6] = (byte)Source.Length;
        field[7] = 1;
        Encoding.ASCII.GetBytes(Id + Description + Source, field.AsSpan(8));
        return field;
    }

    // RRIP 1.09 §4.1.1: mode, links, owner, group.
    private static byte[] Posix(uint mode, uint links)
    {
        byte[] field = new byte[36];
        field[0] = (byte)'P';
        field[1] = (byte)'X';
        field[2] = 36;
        field[3] = 1;
        Both32(field.AsSpan(4), mode);
        Both32(field.AsSpan(12), links);
        return field;
    }

    // RRIP 1.09 §4.1.4.
    private static byte[] AlternateName(string name)
    {
        byte[] field = new byte[5 + name.Length];
        field[0] = (byte)'N';
        field[1] = (byte)'M';
        field[2] = (byte)field.Length;
        field[3] = 1;
        Encoding.ASCII.GetBytes(name, field.AsSpan(5));
        return field;
    }

    /// <summary>A directory's records; none of them crosses a sector (ECMA-119 §6.8.1.1).</summary>
    private sealed class DirectoryWriter(DateTimeOffset time)
    {
        private readonly List<byte> _bytes = [];

        public int Length => _bytes.Count;

        public void Clear() => _bytes.Clear();

        public void CopyTo(Span<byte> into) => System.Runtime.InteropServices.CollectionsMarshal.AsSpan(_bytes).CopyTo(into);

        public void Add(ReadOnlySpan<byte> name, int extent, int lengthBytes, bool isDirectory, ReadOnlySpan<byte> fields)
        {
            int named = 33 + name.Length + ((name.Length & 1) == 0 ? 1 : 0);
            byte[] record = new byte[(named + fields.Length + 1) & ~1];
            int left = SectorBytes - (_bytes.Count % SectorBytes);
            if (record.Length > left)
            {
                _bytes.AddRange(new byte[left]);
            }

            WriteRecord(record, name, extent, lengthBytes, isDirectory, fields, time);
            _bytes.AddRange(record);
        }

        // ECMA-119 §9.1.
        public static void WriteRecord(
            Span<byte> record,
            ReadOnlySpan<byte> name,
            int extent,
            int lengthBytes,
            bool isDirectory,
            ReadOnlySpan<byte> fields,
            DateTimeOffset time)
        {
            record[0] = (byte)record.Length;
            Both32(record[2..], (uint)extent);
            Both32(record[10..], (uint)lengthBytes);
            DateTime utc = time.UtcDateTime;
            record[18] = (byte)(utc.Year - 1900);
            record[19] = (byte)utc.Month;
            record[20] = (byte)utc.Day;
            record[21] = (byte)utc.Hour;
            record[22] = (byte)utc.Minute;
            record[23] = (byte)utc.Second;
            record[25] = isDirectory ? (byte)2 : (byte)0;
            Both16(record[28..], 1);
            record[32] = (byte)name.Length;
            name.CopyTo(record[33..]);
            int named = 33 + name.Length + ((name.Length & 1) == 0 ? 1 : 0);
            fields.CopyTo(record[Math.Min(named, record.Length)..]);
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using FluentAssertions;
using Vmm.Backends.Block;
using Vmm.Core;
using Vmm.Host;
using Xunit;

namespace Vmm.Backends.Tests.Block;

/// <summary>UEFI 2.10 §5.3 and El Torito 1.0: damage is found, named by its offset, and costs a bounded number of reads.</summary>
public sealed class MediaInspectorTests
{
    private const int Sector = 512;
    private const int Sectors = 256;
    private const int CdSector = 2048;
    private const int CatalogSector = 20;

    [Fact]
    public void Gpt_ThatIsWhole_HasNoFindings() => Inspect(MakeGpt()).Should().BeEmpty();

    [Fact]
    public void ElTorito_ThatIsWhole_HasNoFindings() => Inspect(MakeDisc()).Should().BeEmpty();

    [Fact]
    public void Disk_WithoutTables_HasNoFindings()
    {
        Inspect(new byte[Sector]).Should().BeEmpty();
        Inspect(new byte[Sectors * Sector]).Should().BeEmpty();
        byte[] noise = new byte[128 * 1024];
        new Random(1).NextBytes(noise);
        Inspect(noise).Should().BeEmpty();
    }

    // Every bit of what a checksum covers, in both copies.
    [Fact]
    public void Gpt_WithAnyBitOfHeadersOrEntriesFlipped_IsNamedByOffset()
    {
        byte[] disk = MakeGpt();
        foreach ((int start, int length) in new[]
        {
            (Sector, 92), (2 * Sector, 4 * 128), ((Sectors - 1) * Sector, 92), ((Sectors - 33) * Sector, 4 * 128), (510, 2),
        })
        {
            for (int bit = 0; bit < length * 8; bit++)
            {
                int at = start + (bit / 8);
                disk[at] ^= (byte)(1 << (bit % 8));
                IReadOnlyList<MediaFinding> findings = Inspect(disk);
                disk[at] ^= (byte)(1 << (bit % 8));
                findings.Should().NotBeEmpty("bit {0} at {1:x}", bit % 8, at);
                findings[0].ToString().Should().StartWith("test.img: offset 0x");
                Math.Abs(findings[0].Offset - start).Should().BeLessThan(Sector);
            }
        }
    }

    [Fact]
    public void Gpt_WithHugeCounts_IsRefusedWithoutReadingThem()
    {
        foreach ((uint count, uint size) in new[] { (uint.MaxValue, 128u), (128u, 0x8000_0000u), (0u, 128u), (128u, 100u) })
        {
            byte[] disk = MakeGpt();
            BinaryPrimitives.WriteUInt32LittleEndian(disk.AsSpan(Sector + 80), count);
            BinaryPrimitives.WriteUInt32LittleEndian(disk.AsSpan(Sector + 84), size);
            Sign(disk, 1);
            Inspect(disk).Should().Contain(finding => finding.Offset == Sector + 80);
        }
    }

    [Fact]
    public void Gpt_OfACutFile_SaysSo()
    {
        byte[] disk = MakeGpt().AsSpan(0, 200 * Sector).ToArray();
        Inspect(disk).Should().Contain(finding => finding.Problem.Contains("cut short"));
    }

    [Fact]
    public void Gpt_OnADiskMadeLarger_HasNoFindings()
    {
        byte[] disk = new byte[2 * Sectors * Sector];
        MakeGpt().CopyTo(disk, 0);
        Inspect(disk).Should().BeEmpty();
    }

    // What has redundancy or a single meaning: identifier and version, the boot record's system, the size in both byte
    // orders, the validation entry, the boot indicator.
    [Fact]
    public void ElTorito_WithAnyBitOfItsIdentifiersFlipped_IsNamedByOffset()
    {
        byte[] disc = MakeDisc();
        const int Primary = 16 * CdSector;
        const int Record = 17 * CdSector;
        const int Catalog = CatalogSector * CdSector;
        foreach ((int start, int length) in new[]
        {
            (Primary + 1, 5), (Primary + 80, 8), (Primary + 128, 4), (Record + 1, 38), (Record + 0x48, 3),
            ((18 * CdSector) + 1, 5), (Catalog, 33),
        })
        {
            for (int bit = 0; bit < length * 8; bit++)
            {
                int at = start + (bit / 8);
                disc[at] ^= (byte)(1 << (bit % 8));
                IReadOnlyList<MediaFinding> findings = Inspect(disc);
                disc[at] ^= (byte)(1 << (bit % 8));
                findings.Should().NotBeEmpty("bit {0} at {1:x}", bit % 8, at);
                findings[0].ToString().Should().StartWith("test.img: offset 0x");
            }
        }
    }

    [Fact]
    public void ElTorito_WithAnEndlessCatalog_Ends()
    {
        byte[] disc = MakeDisc();
        Span<byte> catalog = disc.AsSpan(CatalogSector * CdSector, CdSector);
        for (int at = 64; at < CdSector; at += 32)
        {
            catalog[at] = 0x90;
            catalog[at + 2] = catalog[at + 3] = 0xFF;
        }

        Inspect(disc).Should().NotBeEmpty();
        for (int at = 16 * CdSector; at < disc.Length; at += CdSector)
        {
            disc.AsSpan(17 * CdSector, CdSector).CopyTo(disc.AsSpan(at));
        }

        Inspect(disc).Should().HaveCountLessThanOrEqualTo(MediaInspector.MaxFindings);
    }

    [Fact]
    public void RandomFlips_OverBothMedia_NeverThrowAndStayBounded()
    {
        byte[] gpt = MakeGpt();
        byte[] disc = MakeDisc();
        (int, int)[] gptParts = [(446, 66), (Sector, 92), (2 * Sector, 512), ((Sectors - 1) * Sector, 92)];
        (int, int)[] discParts = [(16 * CdSector, 190), (17 * CdSector, 80), (18 * CdSector, 16), (CatalogSector * CdSector, 160)];
        var random = new Random(7);
        for (int round = 0; round < 5_000; round++)
        {
            bool isDisc = round % 2 == 0;
            byte[] medium = (byte[])(isDisc ? disc : gpt).Clone();
            for (int flips = random.Next(1, 12); flips > 0; flips--)
            {
                (int start, int length) = isDisc ? discParts[random.Next(4)] : gptParts[random.Next(4)];
                medium[start + random.Next(length)] ^= (byte)(1 << random.Next(8));
            }

            if (!isDisc && round % 3 == 0)
            {
                // Past the checksum, to what it protects.
                Sign(medium, 1);
                Sign(medium, Sectors - 1);
            }

            foreach (MediaFinding finding in Inspect(medium))
            {
                finding.Offset.Should().BeInRange(0, medium.Length);
            }
        }
    }

    [Fact]
    public void RealMedia_OfOtherPrograms_HaveNoFindings()
    {
        const string Rescue = "/usr/lib/grub-rescue/grub-rescue-cdrom.iso";
        using var temp = new TempDirectory();
        File.Exists(Rescue).Should().BeTrue("the package grub-rescue-pc is installed");
        using (BlockImage rescue = DiskImage.Open(Rescue, readOnly: true))
        {
            MediaInspector.Inspect(rescue).Should().BeEmpty();
        }

        string path = temp["disk.img"];
        File.WriteAllBytes(path, new byte[8 << 20]);
        (int status, string output) = TempDirectory.Run(
            "/bin/sh", "-c", $"printf 'label: gpt\\nsize=1M\\nsize=2M\\n' | sfdisk -q {path}");
        status.Should().Be(0, output);
        using (BlockImage disk = DiskImage.Open(path, readOnly: true))
        {
            MediaInspector.Inspect(disk).Should().BeEmpty();
        }

        byte[] raw = File.ReadAllBytes(path);
        raw[Sector + 56] ^= 0x10;
        File.WriteAllBytes(path, raw);
        using (BlockImage disk = DiskImage.Open(path, readOnly: true))
        {
            MediaInspector.Inspect(disk).Should().ContainSingle()
                .Which.ToString().Should().Be($"{path}: offset 0x210: the GPT header does not match its checksum");
        }
    }

    private static IReadOnlyList<MediaFinding> Inspect(byte[] content)
    {
        using var image = new BytesImage(content);
        IReadOnlyList<MediaFinding> findings = MediaInspector.Inspect(image);
        image.Reads.Should().BeLessThan(64);
        image.BytesRead.Should().BeLessThan(3 << 20);
        findings.Count.Should().BeLessThanOrEqualTo(MediaInspector.MaxFindings);
        return findings;
    }

    private static byte[] MakeGpt()
    {
        byte[] disk = new byte[Sectors * Sector];
        disk[446 + 4] = 0xEE;
        BinaryPrimitives.WriteUInt32LittleEndian(disk.AsSpan(446 + 8), 1);
        BinaryPrimitives.WriteUInt32LittleEndian(disk.AsSpan(446 + 12), Sectors - 1);
        disk[510] = 0x55;
        disk[511] = 0xAA;
        for (int i = 0; i < 2; i++)
        {
            Span<byte> entry = disk.AsSpan((2 * Sector) + (i * 128));
            entry[..32].Fill((byte)(0x11 * (i + 1)));
            BinaryPrimitives.WriteInt64LittleEndian(entry[32..], 40 + (i * 50));
            BinaryPrimitives.WriteInt64LittleEndian(entry[40..], 80 + (i * 50));
        }

        disk.AsSpan(2 * Sector, 32 * Sector).CopyTo(disk.AsSpan((Sectors - 33) * Sector));
        Header(disk, 1, Sectors - 1, 2);
        Header(disk, Sectors - 1, 1, Sectors - 33);
        return disk;
    }

    private static void Header(byte[] disk, int at, int other, int entries)
    {
        Span<byte> header = disk.AsSpan(at * Sector, Sector);
        "EFI PART"u8.CopyTo(header);
        BinaryPrimitives.WriteUInt32LittleEndian(header[8..], 0x10000);
        BinaryPrimitives.WriteUInt32LittleEndian(header[12..], 92);
        BinaryPrimitives.WriteInt64LittleEndian(header[24..], at);
        BinaryPrimitives.WriteInt64LittleEndian(header[32..], other);
        BinaryPrimitives.WriteInt64LittleEndian(header[40..], 34);
        BinaryPrimitives.WriteInt64LittleEndian(header[48..], Sectors - 34);
        header.Slice(56, 16).Fill(0x77);
        BinaryPrimitives.WriteInt64LittleEndian(header[72..], entries);
        BinaryPrimitives.WriteUInt32LittleEndian(header[80..], 128);
        BinaryPrimitives.WriteUInt32LittleEndian(header[84..], 128);
        BinaryPrimitives.WriteUInt32LittleEndian(header[88..], Crc(disk.AsSpan(entries * Sector, 128 * 128)));
        Sign(disk, at);
    }

    private static void Sign(byte[] disk, int at)
    {
        Span<byte> header = disk.AsSpan(at * Sector, 92);
        header.Slice(16, 4).Clear();
        BinaryPrimitives.WriteUInt32LittleEndian(header[16..], Crc(header));
    }

    // Bit by bit, unlike the one that is tested.
    private static uint Crc(ReadOnlySpan<byte> data)
    {
        uint crc = uint.MaxValue;
        foreach (byte one in data)
        {
            crc ^= one;
            for (int i = 0; i < 8; i++)
            {
                crc = (crc >> 1) ^ ((crc & 1) * 0xEDB88320);
            }
        }

        return ~crc;
    }

    private static byte[] MakeDisc()
    {
        const int Blocks = 64;
        byte[] disc = new byte[Blocks * CdSector];
        Span<byte> primary = Descriptor(disc, 16, 1);
        BinaryPrimitives.WriteUInt32LittleEndian(primary[80..], Blocks);
        BinaryPrimitives.WriteUInt32BigEndian(primary[84..], Blocks);
        BinaryPrimitives.WriteUInt16LittleEndian(primary[128..], CdSector);
        BinaryPrimitives.WriteUInt16BigEndian(primary[130..], CdSector);
        Span<byte> record = Descriptor(disc, 17, 0);
        "EL TORITO SPECIFICATION"u8.CopyTo(record[7..]);
        BinaryPrimitives.WriteUInt32LittleEndian(record[0x47..], CatalogSector);
        Descriptor(disc, 18, 255);
        Span<byte> catalog = disc.AsSpan(CatalogSector * CdSector, CdSector);
        catalog[0] = 1;
        "vmm"u8.CopyTo(catalog[4..]);
        catalog[30] = 0x55;
        catalog[31] = 0xAA;
        ushort sum = 0;
        for (int i = 0; i < 32; i += 2)
        {
            sum += BinaryPrimitives.ReadUInt16LittleEndian(catalog[i..]);
        }

        BinaryPrimitives.WriteUInt16LittleEndian(catalog[28..], (ushort)-sum);
        Boot(catalog[32..], 30);
        catalog[64] = 0x91;
        catalog[65] = 0xEF;
        catalog[66] = 1;
        Boot(catalog[96..], 40);
        return disc;
    }

    private static void Boot(Span<byte> entry, uint sector)
    {
        entry[0] = 0x88;
        entry[6] = 4;
        BinaryPrimitives.WriteUInt32LittleEndian(entry[8..], sector);
    }

    private static Span<byte> Descriptor(byte[] disc, int sector, byte type)
    {
        Span<byte> descriptor = disc.AsSpan(sector * CdSector, CdSector);
        descriptor[0] = type;
        "CD001"u8.CopyTo(descriptor[1..]);
        descriptor[6] = 1;
        return descriptor;
    }

    private sealed class BytesImage(byte[] content) : BlockImage
    {
        public int Reads { get; private set; }

        public long BytesRead { get; private set; }

        public override string Path => "test.img";

        public override string Format => "raw";

        public override long LengthBytes => content.Length;

        public override bool IsReadOnly => true;

        public override BlockStatus Read(long offset, in IoBuffer into)
        {
            Reads++;
            BytesRead += into.Length;
            into.CopyFrom(content.AsSpan((int)offset, (int)into.Length));
            return BlockStatus.Ok;
        }

        public override BlockStatus Write(long offset, in IoBuffer from) => BlockStatus.IoError;

        public override BlockStatus Flush() => BlockStatus.Ok;

        protected override void Dispose(bool disposing)
        {
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using Vmm.Core;

namespace Vmm.Host.Native;

/// <summary>Where things lie in struct stat, statvfs and dirent, and the flags of calls that take a directory, by system.</summary>
internal sealed class FileLayout
{
    /// <summary>More than struct stat takes on any of the three systems.</summary>
    public const int StatBytes = 512;

    /// <summary>That of this system.</summary>
    public static FileLayout Current { get; } = Of(OsAbi.Current.System);

    public required int NoFollow { get; init; }

    public required int RemoveDirectory { get; init; }

    public required int OpenAppend { get; init; }

    public required long TimeNow { get; init; }

    public required long TimeOmit { get; init; }

    public required int EntryName { get; init; }

    public required int EntryType { get; init; }

    // dev, ino, nlink, mode, uid, gid, rdev, size, blksize, blocks, atime, mtime, ctime.
    public required int[] StatAt { get; init; }

    public required bool ShortLinks { get; init; }

    public required bool ShortMode { get; init; }

    public required bool ShortBlockBytes { get; init; }

    // Words: frsize, blocks, bfree, bavail, files, ffree.
    public required int[] SpaceAt { get; init; }

    public static FileLayout Of(HostSystem system) => system switch
    {
        HostSystem.Linux => new FileLayout
        {
            NoFollow = 0x100,
            RemoveDirectory = 0x200,
            OpenAppend = 0x400,
            TimeNow = 0x3FFF_FFFF,
            TimeOmit = 0x3FFF_FFFE,
            EntryName = 19,
            EntryType = 18,
            StatAt = [0, 8, 16, 24, 28, 32, 40, 48, 56, 64, 72, 88, 104],
            ShortLinks = false,
            ShortMode = false,
            ShortBlockBytes = false,
            SpaceAt = [1, 2, 3, 4, 5, 6],
        },
        HostSystem.FreeBsd => new FileLayout
        {
            NoFollow = 0x200,
            RemoveDirectory = 0x800,
            OpenAppend = 8,
            TimeNow = -1,
            TimeOmit = -2,
            EntryName = 24,
            EntryType = 18,
            StatAt = [0, 8, 16, 24, 28, 32, 40, 112, 128, 120, 48, 64, 80],
            ShortLinks = false,
            ShortMode = true,
            ShortBlockBytes = true,
            SpaceAt = [8, 2, 1, 0, 5, 4],
        },
        _ => new FileLayout
        {
            NoFollow = 0x1000,
            RemoveDirectory = 1,
            OpenAppend = 8,
            TimeNow = -1,
            TimeOmit = -2,
            EntryName = 18,
            EntryType = -1,
            StatAt = [0, 8, 20, 16, 24, 28, 32, 40, 96, 104, 48, 64, 80],
            ShortLinks = true,
            ShortMode = false,
            ShortBlockBytes = true,
            SpaceAt = [1, 2, 3, 4, 5, 6],
        },
    };

    public SharedStat ReadStat(ReadOnlySpan<byte> raw) => new()
    {
        FileSystem = Word(raw, 0),
        Inode = Word(raw, 1),
        Links = ShortLinks ? Dword(raw, 2) : Word(raw, 2),
        Mode = ShortMode ? BinaryPrimitives.ReadUInt16LittleEndian(raw[StatAt[3]..]) : Dword(raw, 3),
        Uid = Dword(raw, 4),
        Gid = Dword(raw, 5),
        Device = Word(raw, 6),
        SizeBytes = Word(raw, 7),
        BlockBytes = ShortBlockBytes ? Dword(raw, 8) : Word(raw, 8),
        Blocks = Word(raw, 9),
        Accessed = Time(raw, 10),
        Modified = Time(raw, 11),
        Changed = Time(raw, 12),
    };

    public SharedSpace ReadSpace(ReadOnlySpan<ulong> raw) => new()
    {
        BlockBytes = raw[SpaceAt[0]],
        Blocks = raw[SpaceAt[1]],
        FreeBlocks = raw[SpaceAt[2]],
        AvailableBlocks = raw[SpaceAt[3]],
        Files = raw[SpaceAt[4]],
        FreeFiles = raw[SpaceAt[5]],
    };

    private ulong Word(ReadOnlySpan<byte> raw, int field) => BinaryPrimitives.ReadUInt64LittleEndian(raw[StatAt[field]..]);

    private uint Dword(ReadOnlySpan<byte> raw, int field) => BinaryPrimitives.ReadUInt32LittleEndian(raw[StatAt[field]..]);

    private (long Seconds, long Nanoseconds) Time(ReadOnlySpan<byte> raw, int field) => (
        BinaryPrimitives.ReadInt64LittleEndian(raw[StatAt[field]..]),
        BinaryPrimitives.ReadInt64LittleEndian(raw[(StatAt[field] + 8)..]));
}

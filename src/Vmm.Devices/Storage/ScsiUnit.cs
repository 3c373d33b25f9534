// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using Vmm.Core;

namespace Vmm.Devices.Storage;

// Theory. A SCSI logical unit decodes a command descriptor block into a ScsiWork: either it is done with a status and
// sense data, or bytes of the unit go to the guest, or a range of the medium is to be moved or changed. Whoever carries
// the command (virtio-scsi) moves the data and reports the outcome back with Complete, as ATA adapters do with AtaWork.
// A CD-ROM drive is the ATAPI drive of AtapiCdrom.cs: its packets are the same commands (MMC-5).
//
// A unit has no lock: its carrier calls Begin from one thread and Complete under a gate. Sources: SPC-4 (T10 1731-D),
// SBC-3 (T10 1799-D), SAM-5 for status codes. What it does not do: reservations, protection information, task priorities.

/// <summary>Status codes (SAM-5 §5.3.1).</summary>
internal enum ScsiStatus : byte
{
    Good = 0x00,
    CheckCondition = 0x02,
}

/// <summary>Sense key and additional sense code (SPC-4 §4.5.6).</summary>
internal readonly record struct ScsiSense(byte Key, byte Code, byte Qualifier)
{
    public const int FixedBytes = 18;

    public static readonly ScsiSense NotReadable = new(3, 0x11, 0x00);
    public static readonly ScsiSense NotWritable = new(3, 0x0C, 0x00);
    public static readonly ScsiSense NoSpace = new(7, 0x27, 0x07);
    public static readonly ScsiSense UnknownCommand = new(5, 0x20, 0x00);
    public static readonly ScsiSense OutOfRange = new(5, 0x21, 0x00);
    public static readonly ScsiSense InvalidField = new(5, 0x24, 0x00);
    public static readonly ScsiSense NoSuchUnit = new(5, 0x25, 0x00);
    public static readonly ScsiSense InvalidParameter = new(5, 0x26, 0x00);
    public static readonly ScsiSense ReadOnly = new(7, 0x27, 0x00);
    public static readonly ScsiSense PowerOn = new(6, 0x29, 0x00);

    /// <summary>Fixed format (SPC-4 §4.5.3).</summary>
    public void Write(Span<byte> into)
    {
        into[..FixedBytes].Clear();
        into[0] = 0x70;
        into[2] = Key;
        into[7] = FixedBytes - 8;
        into[12] = Code;
        into[13] = Qualifier;
    }
}

/// <summary>What is to be done for a command.</summary>
internal sealed class ScsiWork
{
    /// <summary>Nothing is left to do: <see cref="Status"/> counts.</summary>
    public bool IsDone { get; private init; }

    public ScsiStatus Status { get; private init; }

    public ScsiSense Sense { get; private init; }

    /// <summary>Bytes for the guest; null when the medium is concerned.</summary>
    public byte[]? Reply { get; private init; }

    public BlockOperation Operation { get; private init; }

    /// <summary>The guest's data moves.</summary>
    public bool MovesData => Operation is BlockOperation.Read or BlockOperation.Write;

    public bool ForceUnitAccess { get; private init; }

    public bool MayUnmap { get; private init; }

    /// <summary>Byte ranges of the medium, one after the other.</summary>
    public List<(long Offset, long Length)> Ranges { get; private init; } = [];

    /// <summary>For an ATAPI drive behind: its own notion of the work.</summary>
    public AtaWork Packet { get; private init; }

    public static ScsiWork Good { get; } = new() { IsDone = true };

    public static ScsiWork Check(ScsiSense sense) =>
        new() { IsDone = true, Status = ScsiStatus.CheckCondition, Sense = sense };

    public static ScsiWork Answer(byte[] data, int allocation) =>
        new() { Reply = data.Length <= allocation ? data : data[..allocation] };

    public static ScsiWork Medium(
        BlockOperation operation, long offset, long length, bool force = false, bool unmap = false, AtaWork packet = default) =>
        new()
        {
            Operation = operation,
            Ranges = [(offset, length)],
            ForceUnitAccess = force,
            MayUnmap = unmap,
            Packet = packet,
        };

    public static ScsiWork Medium(BlockOperation operation, List<(long Offset, long Length)> ranges, bool unmap) =>
        new() { Operation = operation, Ranges = ranges, MayUnmap = unmap };
}

/// <summary>A logical unit: a disk or a CD-ROM drive.</summary>
public abstract class ScsiUnit
{
    /// <summary>Most bytes of a parameter list that a unit looks at.</summary>
    internal const int MaxParameterBytes = 4096;

    private protected ScsiUnit()
    {
    }

    /// <summary>What holds the data now; null for an empty drive.</summary>
    internal abstract IBlockBackend? Medium { get; }

    /// <summary>Power-on or reset.</summary>
    internal abstract void PowerOn();

    /// <summary>Decodes a command.</summary>
    /// <param name="cdb">16 bytes, zero-filled.</param>
    /// <param name="parameters">Start of what the guest sends, for commands with a parameter list.</param>
    internal abstract ScsiWork Begin(ReadOnlySpan<byte> cdb, ReadOnlySpan<byte> parameters);

    /// <summary>The medium has answered.</summary>
    internal abstract (ScsiStatus Status, ScsiSense Sense) Complete(ScsiWork work, BlockStatus status);

    internal abstract void Save(StateWriter writer, string prefix);

    internal abstract void Load(StateReader reader, string prefix);
}

/// <summary>A direct-access block device (SBC-3) with 512-byte blocks.</summary>
public sealed class ScsiDisk : ScsiUnit
{
    private const int BlockBytes = 512;
    private const int MaxUnmapRanges = 64;
    private const uint MaxUnmapBlocks = 1 << 21; // 1 GiB
    private const byte CachingPage = 0x08;

    private readonly IBlockBackend _medium;
    private readonly string _serial;
    private bool _attention;
    private bool _isCacheOn = true;

    /// <summary>Makes one.</summary>
    /// <param name="medium">The disk; owned by the caller.</param>
    /// <param name="serial">At most 36 ASCII characters.</param>
    public ScsiDisk(IBlockBackend medium, string serial)
    {
        ArgumentNullException.ThrowIfNull(medium);
        ArgumentNullException.ThrowIfNull(serial);
        _medium = medium;
        _serial = serial.Length > 36 ? serial[..36] : serial;
        _attention = true;
    }

    internal override IBlockBackend Medium => _medium;

    private long Blocks => _medium.LengthBytes / BlockBytes;

    internal override void PowerOn()
    {
        _attention = true;
        _isCacheOn = true;
    }

    internal override ScsiWork Begin(ReadOnlySpan<byte> cdb, ReadOnlySpan<byte> parameters)
    {
        byte code = cdb[0];

        // INQUIRY, REPORT LUNS and REQUEST SENSE do not report a unit attention (SAM-5 §5.14).
        if (_attention && code is not (0x12 or 0xA0 or 0x03))
        {
            _attention = false;
            return ScsiWork.Check(ScsiSense.PowerOn);
        }

        switch (code)
        {
            case 0x00 or 0x1B or 0x1E or 0x2F or 0x8F or 0x34 or 0x90:
                return ScsiWork.Good; // TEST UNIT READY, START STOP, PREVENT, VERIFY, PRE-FETCH
            case 0x03:
                var sense = new byte[ScsiSense.FixedBytes];
                default(ScsiSense).Write(sense);
                return ScsiWork.Answer(sense, cdb[4]);
            case 0x12:
                return Inquiry(cdb);
            case 0x1A:
                return ModeSense(cdb, isLong: false);
            case 0x5A:
                return ModeSense(cdb, isLong: true);
            case 0x15 or 0x55:
                return ModeSelect(code == 0x55, parameters);
            case 0x25:
                return ReadCapacity10();
            case 0x9E when (cdb[1] & 0x1F) == 0x10:
                return ReadCapacity16(BinaryPrimitives.ReadInt32BigEndian(cdb[10..]));
            case 0x08 or 0x0A:
                long short1 = ((cdb[1] & 0x1F) << 16) | (cdb[2] << 8) | cdb[3];
                return Transfer(code == 0x0A, short1, cdb[4] == 0 ? 256 : cdb[4], force: false);
            case 0x28 or 0x2A:
                return Transfer(
                    code == 0x2A,
                    BinaryPrimitives.ReadUInt32BigEndian(cdb[2..]),
                    BinaryPrimitives.ReadUInt16BigEndian(cdb[7..]),
                    (cdb[1] & 8) != 0);
            case 0xA8 or 0xAA:
                return Transfer(
                    code == 0xAA,
                    BinaryPrimitives.ReadUInt32BigEndian(cdb[2..]),
                    BinaryPrimitives.ReadUInt32BigEndian(cdb[6..]),
                    (cdb[1] & 8) != 0);
            case 0x88 or 0x8A:
                return Transfer(
                    code == 0x8A,
                    BinaryPrimitives.ReadInt64BigEndian(cdb[2..]),
                    BinaryPrimitives.ReadUInt32BigEndian(cdb[10..]),
                    (cdb[1] & 8) != 0);
            case 0x35 or 0x91:
                return ScsiWork.Medium(BlockOperation.Flush, 0, 0);
            case 0x41:
                return WriteSame(
                    cdb, BinaryPrimitives.ReadUInt32BigEndian(cdb[2..]), BinaryPrimitives.ReadUInt16BigEndian(cdb[7..]), parameters);
            case 0x93:
                return WriteSame(
                    cdb, BinaryPrimitives.ReadInt64BigEndian(cdb[2..]), BinaryPrimitives.ReadUInt32BigEndian(cdb[10..]), parameters);
            case 0x42:
                return Unmap(parameters);
            default:
                return ScsiWork.Check(ScsiSense.UnknownCommand);
        }
    }

    internal override (ScsiStatus Status, ScsiSense Sense) Complete(ScsiWork work, BlockStatus status) => status switch
    {
        BlockStatus.Ok => (ScsiStatus.Good, default),
        BlockStatus.NoSpace => (ScsiStatus.CheckCondition, ScsiSense.NoSpace),
        _ when work.Operation == BlockOperation.Read => (ScsiStatus.CheckCondition, ScsiSense.NotReadable),
        _ => (ScsiStatus.CheckCondition, ScsiSense.NotWritable),
    };

    internal override void Save(StateWriter writer, string prefix)
    {
        writer.Write(prefix + "attention", _attention);
        writer.Write(prefix + "cache", _isCacheOn);
    }

    internal override void Load(StateReader reader, string prefix)
    {
        _attention = reader.ReadBoolean(prefix + "attention");
        _isCacheOn = reader.ReadBoolean(prefix + "cache");
    }

    private static byte[] Ascii(string text, int length) => Encoding.ASCII.GetBytes(text.PadRight(length)[..length]);

    private bool IsInside(long block, long count) => block >= 0 && count >= 0 && block <= Blocks && count <= Blocks - block;

    private ScsiWork Transfer(bool isWrite, long block, long count, bool force)
    {
        if (!IsInside(block, count))
        {
            return ScsiWork.Check(ScsiSense.OutOfRange);
        }

        if (isWrite && _medium.IsReadOnly)
        {
            return ScsiWork.Check(ScsiSense.ReadOnly);
        }

        return count == 0
            ? ScsiWork.Good
            : ScsiWork.Medium(
                isWrite ? BlockOperation.Write : BlockOperation.Read,
                block * BlockBytes,
                count * BlockBytes,
                isWrite && (force || !_isCacheOn));
    }

    // SBC-3 §5.42: only zeroes, which is what discarding asks for.
    private ScsiWork WriteSame(ReadOnlySpan<byte> cdb, long block, long count, ReadOnlySpan<byte> parameters)
    {
        bool noData = cdb[0] == 0x93 && (cdb[1] & 1) != 0;
        bool zeroes = noData || (parameters.Length >= BlockBytes && !parameters[..BlockBytes].ContainsAnyExcept((byte)0));
        if (!zeroes)
        {
            return ScsiWork.Check(ScsiSense.InvalidField);
        }

        count = count == 0 ? Blocks - block : count;
        if (!IsInside(block, count) || count > MaxUnmapBlocks)
        {
            return ScsiWork.Check(count > MaxUnmapBlocks ? ScsiSense.InvalidField : ScsiSense.OutOfRange);
        }

        if (_medium.IsReadOnly)
        {
            return ScsiWork.Check(ScsiSense.ReadOnly);
        }

        return ScsiWork.Medium(
            BlockOperation.WriteZeroes, block * BlockBytes, count * BlockBytes, unmap: (cdb[1] & 8) != 0);
    }

    // SBC-3 §5.28.
    private ScsiWork Unmap(ReadOnlySpan<byte> parameters)
    {
        if (_medium.IsReadOnly)
        {
            return ScsiWork.Check(ScsiSense.ReadOnly);
        }

        if (parameters.Length < 8)
        {
            return parameters.IsEmpty ? ScsiWork.Good : ScsiWork.Check(ScsiSense.InvalidParameter);
        }

        int length = BinaryPrimitives.ReadUInt16BigEndian(parameters[2..]);
        int count = Math.Min(length, parameters.Length - 8) / 16;
        if (count > MaxUnmapRanges)
        {
            return ScsiWork.Check(ScsiSense.InvalidParameter);
        }

        var ranges = new List<(long Offset, long Length)>(count);
        for (int i = 0; i < count; i++)
        {
            ReadOnlySpan<byte> range = parameters.Slice(8 + (16 * i), 16);
            long block = BinaryPrimitives.ReadInt64BigEndian(range);
            uint blocks = BinaryPrimitives.ReadUInt32BigEndian(range[8..]);
            if (!IsInside(block, blocks) || blocks > MaxUnmapBlocks)
            {
                return ScsiWork.Check(ScsiSense.OutOfRange);
            }

            if (blocks != 0)
            {
                ranges.Add((block * BlockBytes, (long)blocks * BlockBytes));
            }
        }

        return ranges.Count == 0 ? ScsiWork.Good : ScsiWork.Medium(BlockOperation.Discard, ranges, unmap: true);
    }

    private ScsiWork ReadCapacity10()
    {
        var data = new byte[8];
        BinaryPrimitives.WriteUInt32BigEndian(data, (uint)Math.Min(Math.Max(Blocks - 1, 0), uint.MaxValue));
        BinaryPrimitives.WriteUInt32BigEndian(data.AsSpan(4), BlockBytes);
        return ScsiWork.Answer(data, data.Length);
    }

    private ScsiWork ReadCapacity16(int allocation)
    {
        var data = new byte[32];
        int exponent = int.Log2(Math.Max(_medium.BlockBytes, BlockBytes) / BlockBytes);
        BinaryPrimitives.WriteInt64BigEndian(data, Math.Max(Blocks - 1, 0));
        BinaryPrimitives.WriteUInt32BigEndian(data.AsSpan(8), BlockBytes);
        data[13] = (byte)Math.Min(exponent, 15);
        data[14] = _medium.CanDiscard ? (byte)0x80 : (byte)0; // LBPME
        return ScsiWork.Answer(data, Math.Max(allocation, 0));
    }

    private ScsiWork Inquiry(ReadOnlySpan<byte> cdb)
    {
        int allocation = BinaryPrimitives.ReadUInt16BigEndian(cdb[3..]);
        if ((cdb[1] & 1) == 0)
        {
            // SPC-4 §6.4.2.
            var data = new byte[36];
            data[2] = 6;
            data[3] = 2;
            data[4] = 31;
            data[7] = 2; // CMDQUE
            Ascii("VMM", 8).CopyTo(data, 8);
            Ascii("Disk", 16).CopyTo(data, 16);
            Ascii("1.0", 4).CopyTo(data, 32);
            return cdb[2] == 0 ? ScsiWork.Answer(data, allocation) : ScsiWork.Check(ScsiSense.InvalidField);
        }

        byte[]? page = cdb[2] switch
        {
            0x00 => [0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2],
            0x80 => Encoding.ASCII.GetBytes(_serial),
            0x83 => Identification(),
            0xB0 => Limits(),
            0xB1 => Characteristics(),
            0xB2 => [0, _medium.CanDiscard ? (byte)0xE0 : (byte)0x20, _medium.CanDiscard ? (byte)2 : (byte)0, 0],
            _ => null,
        };
        if (page is null)
        {
            return ScsiWork.Check(ScsiSense.InvalidField);
        }

        var whole = new byte[4 + page.Length];
        whole[1] = cdb[2];
        BinaryPrimitives.WriteUInt16BigEndian(whole.AsSpan(2), (ushort)page.Length);
        page.CopyTo(whole, 4);
        return ScsiWork.Answer(whole, allocation);
    }

    // SPC-4 §7.8.6: a vendor-specific designator made of vendor and serial number (T10 vendor identification).
    private byte[] Identification()
    {
        byte[] text = Encoding.ASCII.GetBytes("VMM     " + _serial);
        var page = new byte[4 + text.Length];
        page[0] = 2;
        page[1] = 1;
        page[3] = (byte)text.Length;
        text.CopyTo(page, 4);
        return page;
    }

    // SBC-3 §6.5.3, without the four bytes of header.
    private byte[] Limits()
    {
        var page = new byte[60];
        BinaryPrimitives.WriteUInt16BigEndian(page.AsSpan(2), (ushort)Math.Max(_medium.BlockBytes / BlockBytes, 1));
        if (_medium.CanDiscard)
        {
            BinaryPrimitives.WriteUInt32BigEndian(page.AsSpan(16), MaxUnmapBlocks);
            BinaryPrimitives.WriteUInt32BigEndian(page.AsSpan(20), MaxUnmapRanges);
            BinaryPrimitives.WriteUInt32BigEndian(page.AsSpan(24), (uint)Math.Max(_medium.BlockBytes / BlockBytes, 1));
        }

        BinaryPrimitives.WriteUInt64BigEndian(page.AsSpan(32), MaxUnmapBlocks);
        return page;
    }

    // SBC-3 §6.5.2: medium rotation rate 1 means "does not rotate".
    private static byte[] Characteristics()
    {
        var page = new byte[60];
        page[1] = 1;
        return page;
    }

    private ScsiWork ModeSense(ReadOnlySpan<byte> cdb, bool isLong)
    {
        int page = cdb[2] & 0x3F;
        int control = cdb[2] >> 6;
        int allocation = isLong ? BinaryPrimitives.ReadUInt16BigEndian(cdb[7..]) : cdb[4];
        if (control == 3 || page is not (CachingPage or 0x3F or 0x0A))
        {
            return ScsiWork.Check(control == 3 ? new ScsiSense(5, 0x39, 0) : ScsiSense.InvalidField);
        }

        // SPC-4 §7.5.5; DPOFUA, and write-protected where it is. No block descriptor.
        byte flags = (byte)(0x10 | (_medium.IsReadOnly ? 0x80 : 0));
        var data = new List<byte>();
        if (isLong)
        {
            data.AddRange([0, 0, 0, flags, 0, 0, 0, 0]);
        }
        else
        {
            data.AddRange([0, 0, flags, 0]);
        }

        if (page is CachingPage or 0x3F)
        {
            // SBC-3 §6.4.5: WCE can be changed.
            bool wce = control == 1 || (control == 2 ? true : _isCacheOn);
            data.AddRange([CachingPage, 18, wce ? (byte)4 : (byte)0]);
            data.AddRange(new byte[17]);
        }

        if (page is 0x0A or 0x3F)
        {
            data.AddRange([0x0A, 10]);
            data.AddRange(new byte[10]);
        }

        byte[] all = [.. data];
        if (isLong)
        {
            BinaryPrimitives.WriteUInt16BigEndian(all, (ushort)(all.Length - 2));
        }
        else
        {
            all[0] = (byte)(all.Length - 1);
        }

        return ScsiWork.Answer(all, allocation);
    }

    private ScsiWork ModeSelect(bool isLong, ReadOnlySpan<byte> parameters)
    {
        int header = isLong ? 8 : 4;
        if (parameters.Length < header)
        {
            return parameters.IsEmpty ? ScsiWork.Good : ScsiWork.Check(ScsiSense.InvalidParameter);
        }

        int descriptors = isLong ? BinaryPrimitives.ReadUInt16BigEndian(parameters[6..]) : parameters[3];
        int at = header + descriptors;
        if (parameters.Length < at + 3 || (parameters[at] & 0x3F) != CachingPage)
        {
            return ScsiWork.Check(ScsiSense.InvalidParameter);
        }

        _isCacheOn = (parameters[at + 2] & 4) != 0;
        return _isCacheOn ? ScsiWork.Good : ScsiWork.Medium(BlockOperation.Flush, 0, 0);
    }
}

/// <summary>A CD-ROM drive as a logical unit.</summary>
public sealed class ScsiCdrom : ScsiUnit
{
    private readonly AtaTaskFile _registers = new();

    /// <summary>Makes one around a drive, which also changes its media.</summary>
    public ScsiCdrom(AtapiCdrom drive)
    {
        ArgumentNullException.ThrowIfNull(drive);
        Drive = drive;
    }

    /// <summary>The drive.</summary>
    public AtapiCdrom Drive { get; }

    internal override IBlockBackend? Medium => Drive.Medium;

    internal override void PowerOn() => Drive.PowerOn();

    internal override ScsiWork Begin(ReadOnlySpan<byte> cdb, ReadOnlySpan<byte> parameters)
    {
        _registers.Features = 1; // as one DMA transfer
        AtaWork work = Drive.BeginPacket(cdb, _registers);
        if (work.Phase == AtaPhase.DataIn)
        {
            return work.Memory is { } memory
                ? ScsiWork.Answer(memory, (int)work.Length)
                : ScsiWork.Medium(work.Operation, work.Offset, work.Length, packet: work);
        }

        return (_registers.Status & AtaStatus.Error) != 0 ? ScsiWork.Check(FetchSense()) : ScsiWork.Good;
    }

    internal override (ScsiStatus Status, ScsiSense Sense) Complete(ScsiWork work, BlockStatus status)
    {
        Drive.Complete(_registers, work.Packet, status);
        return status == BlockStatus.Ok ? (ScsiStatus.Good, default) : (ScsiStatus.CheckCondition, FetchSense());
    }

    internal override void Save(StateWriter writer, string prefix) => Drive.SaveDevice(writer, prefix);

    internal override void Load(StateReader reader, string prefix) => Drive.LoadDevice(reader, prefix);

    private ScsiSense FetchSense()
    {
        ReadOnlySpan<byte> request = [0x03, 0, 0, 0, ScsiSense.FixedBytes, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        return Drive.BeginPacket(request, _registers).Memory is { Length: >= 14 } sense
            ? new ScsiSense((byte)(sense[2] & 15), sense[12], sense[13])
            : new ScsiSense(4, 0x44, 0);
    }
}

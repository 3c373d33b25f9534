// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using Vmm.Core;

namespace Vmm.Devices.Storage;

/// <summary>
/// A disk with 512-byte sectors: CHS, LBA28 and LBA48 addressing, PIO, multi-word and Ultra DMA, write cache with FLUSH
/// and FUA, TRIM, and as much SMART as tools ask for. Section numbers refer to ATA/ATAPI-7 vol. 1 unless stated.
/// </summary>
public sealed class AtaDisk : AtaDevice
{
    private const int MaxMultiple = 16;
    private const int TrimEntriesPerSector = 64;
    private readonly IBlockBackend _backend;
    private readonly long _sectors;
    private readonly int _cylinders;
    private int _heads;
    private int _sectorsPerTrack;
    private int _multiple;
    private byte _transferMode;
    private bool _isWriteCacheOn = true;
    private bool _isSmartOn = true;
    private byte[]? _trimList;
    private int _trimAt;

    /// <summary>Makes a disk.</summary>
    /// <param name="backend">The image; owned by the caller.</param>
    /// <param name="serial">At most 20 ASCII characters.</param>
    /// <param name="model">At most 40 ASCII characters.</param>
    public AtaDisk(IBlockBackend backend, string serial, string model = "VMM HARDDISK")
        : base(model, serial, "1.0")
    {
        ArgumentNullException.ThrowIfNull(backend);
        _backend = backend;
        _sectors = backend.LengthBytes / 512;
        _cylinders = (int)Math.Clamp(_sectors / (16 * 63), 1, 16383);
        PowerOn();
    }

    internal override bool IsAtapi => false;

    internal override IBlockBackend Medium => _backend;

    private long Addressable28 => Math.Min(_sectors, 0x0FFF_FFFF);

    internal override void PowerOn()
    {
        _heads = 16;
        _sectorsPerTrack = 63;
        _multiple = MaxMultiple;
        _transferMode = 0x45;
        _isWriteCacheOn = true;
        _isSmartOn = true;
        SoftReset();
    }

    internal override void SoftReset() => _trimList = null;

    internal override AtaWork Begin(AtaTaskFile registers)
    {
        switch (registers.Command)
        {
            case 0x20 or 0x21:
                return Transfer(registers, isExtended: false, AtaPhase.DataIn, isDma: false, 1, forced: false);
            case 0x24:
                return Transfer(registers, isExtended: true, AtaPhase.DataIn, isDma: false, 1, forced: false);
            case 0xC4:
                return Transfer(registers, isExtended: false, AtaPhase.DataIn, isDma: false, _multiple, forced: false);
            case 0x29:
                return Transfer(registers, isExtended: true, AtaPhase.DataIn, isDma: false, _multiple, forced: false);
            case 0xC8 or 0xC9:
                return Transfer(registers, isExtended: false, AtaPhase.DataIn, isDma: true, 1, forced: false);
            case 0x25:
                return Transfer(registers, isExtended: true, AtaPhase.DataIn, isDma: true, 1, forced: false);
            case 0x30 or 0x31:
                return Transfer(registers, isExtended: false, AtaPhase.DataOut, isDma: false, 1, forced: false);
            case 0x34:
                return Transfer(registers, isExtended: true, AtaPhase.DataOut, isDma: false, 1, forced: false);
            case 0xC5:
                return Transfer(registers, isExtended: false, AtaPhase.DataOut, isDma: false, _multiple, forced: false);
            case 0x39:
                return Transfer(registers, isExtended: true, AtaPhase.DataOut, isDma: false, _multiple, forced: false);
            case 0xCE:
                return Transfer(registers, isExtended: true, AtaPhase.DataOut, isDma: false, _multiple, forced: true);
            case 0xCA or 0xCB:
                return Transfer(registers, isExtended: false, AtaPhase.DataOut, isDma: true, 1, forced: false);
            case 0x35:
                return Transfer(registers, isExtended: true, AtaPhase.DataOut, isDma: true, 1, forced: false);
            case 0x3D:
                return Transfer(registers, isExtended: true, AtaPhase.DataOut, isDma: true, 1, forced: true);
            case 0x40 or 0x41:
                return Verify(registers, isExtended: false);
            case 0x42:
                return Verify(registers, isExtended: true);
            case 0x06:
                return BeginTrim(registers);
            default:
                return BeginWithoutMedium(registers);
        }
    }

    /// <summary>The range of a queued command (AHCI: READ and WRITE FPDMA QUEUED, ATA8-ACS §7.24).</summary>
    internal bool TryQueued(long lba, int count, AtaPhase phase, bool forced, out AtaWork work)
    {
        long sectors = count == 0 ? 65536 : count;
        work = default;
        if (lba > _sectors - sectors || (phase == AtaPhase.DataOut && _backend.IsReadOnly))
        {
            return false;
        }

        work = Range(phase, lba, sectors, isDma: true, 1, forced);
        return true;
    }

    internal override AtaWork Complete(AtaTaskFile registers, in AtaWork work, BlockStatus status)
    {
        if (status != BlockStatus.Ok)
        {
            _trimList = null;
            bool isRead = work.Operation == BlockOperation.Read;
            SetAddress(registers, work.Offset / 512);
            return Fail(registers, isRead ? AtaError.Uncorrectable : AtaError.Aborted);
        }

        if (registers.Command == 0x06)
        {
            if (work.Phase == AtaPhase.DataOut)
            {
                _trimList = work.Memory;
                _trimAt = 0;
            }

            return NextTrim(registers);
        }

        if (registers.Command is 0xB0 or 0xEC)
        {
            return Succeed(registers);
        }

        // The address of the last sector that was moved (§6.x "normal outputs"); counts end at 0.
        if (work.Memory is null && work.Length > 0 && work.Operation is BlockOperation.Read or BlockOperation.Write)
        {
            SetAddress(registers, ((work.Offset + work.Length) / 512) - 1);
            registers.Count = 0;
            registers.CountPrevious = 0;
        }

        return Succeed(registers);
    }

    internal override void SaveDevice(StateWriter writer, string prefix)
    {
        writer.Write(prefix + "heads", (ulong)_heads);
        writer.Write(prefix + "spt", (ulong)_sectorsPerTrack);
        writer.Write(prefix + "multiple", (ulong)_multiple);
        writer.Write(prefix + "mode", _transferMode);
        writer.Write(prefix + "cache", _isWriteCacheOn);
        writer.Write(prefix + "smart", _isSmartOn);
    }

    internal override void LoadDevice(StateReader reader, string prefix)
    {
        _heads = (int)Math.Max(1, reader.ReadBounded(prefix + "heads", 16));
        _sectorsPerTrack = (int)Math.Max(1, reader.ReadBounded(prefix + "spt", 255));
        _multiple = (int)reader.ReadBounded(prefix + "multiple", MaxMultiple);
        _transferMode = reader.ReadByte(prefix + "mode");
        _isWriteCacheOn = reader.ReadBoolean(prefix + "cache");
        _isSmartOn = reader.ReadBoolean(prefix + "smart");
        _trimList = null;
    }

    private AtaWork BeginWithoutMedium(AtaTaskFile registers)
    {
        switch (registers.Command)
        {
            case >= 0x10 and <= 0x1F:
                // RECALIBRATE and its step-rate variants (ATA-3 and before).
                registers.LbaLow = registers.IsLba ? (byte)0 : (byte)1;
                registers.LbaMid = 0;
                registers.LbaHigh = 0;
                return Succeed(registers);
            case >= 0x70 and <= 0x7F:
                return TryAddress(registers, isExtended: false, out _)
                    ? Succeed(registers)
                    : Fail(registers, AtaError.IdNotFound);
            case 0x91:
                return InitializeParameters(registers);
            case 0xC6:
                return SetMultiple(registers);
            case 0x27:
                registers.SetLba48(_sectors - 1);
                return Succeed(registers);
            case 0xF8:
                SetAddress28(registers, Addressable28 - 1);
                return Succeed(registers);
            case 0xE7 or 0xEA:
                return new AtaWork { Phase = AtaPhase.Backend, Operation = BlockOperation.Flush };
            case 0xE0 or 0xE1 or 0xE2 or 0xE3 or 0xE6 or 0x94 or 0x95 or 0x96 or 0x97 or 0x99:
                return Succeed(registers);
            case 0xE5 or 0x98:
                registers.Count = 0xFF;
                return Succeed(registers);
            case 0xEC:
                return FromMemory(Identify(), 512);
            case 0xEF:
                return SetFeatures(registers);
            case 0xB0:
                return Smart(registers);
            case 0xA1:
                // IDENTIFY PACKET DEVICE of a disk: the signature tells the host its mistake (§6.18.5).
                SetSignature(registers);
                return Abort(registers);
            default:
                return Abort(registers);
        }
    }

    private static AtaWork FromMemory(byte[] data, int blockBytes) =>
        new() { Phase = AtaPhase.DataIn, Memory = data, Length = data.Length, BlockBytes = blockBytes };

    private static AtaWork Range(AtaPhase phase, long lba, long sectors, bool isDma, int perBlock, bool forced) => new()
    {
        Phase = phase,
        Operation = phase == AtaPhase.DataIn ? BlockOperation.Read : BlockOperation.Write,
        Offset = lba * 512,
        Length = sectors * 512,
        IsDma = isDma,
        BlockBytes = perBlock * 512,
        ForceUnitAccess = forced,
    };

    private AtaWork Transfer(
        AtaTaskFile registers, bool isExtended, AtaPhase phase, bool isDma, int perBlock, bool forced)
    {
        if (perBlock == 0 || (phase == AtaPhase.DataOut && _backend.IsReadOnly))
        {
            return Abort(registers);
        }

        long sectors = SectorCount(registers, isExtended);
        if (!TryAddress(registers, isExtended, out long lba) || lba > _sectors - sectors)
        {
            return Fail(registers, AtaError.IdNotFound);
        }

        // A drive whose write cache is off makes every write stable (SET FEATURES 82h, §6.37.11).
        bool isForced = forced || (phase == AtaPhase.DataOut && !_isWriteCacheOn);
        return Range(phase, lba, sectors, isDma, perBlock, isForced);
    }

    private AtaWork Verify(AtaTaskFile registers, bool isExtended)
    {
        long sectors = SectorCount(registers, isExtended);
        if (!TryAddress(registers, isExtended, out long lba) || lba > _sectors - sectors)
        {
            return Fail(registers, AtaError.IdNotFound);
        }

        SetAddress(registers, lba + sectors - 1);
        return Succeed(registers);
    }

    private static long SectorCount(AtaTaskFile registers, bool isExtended)
    {
        if (isExtended)
        {
            int count = registers.Count | (registers.CountPrevious << 8);
            return count == 0 ? 65536 : count;
        }

        return registers.Count == 0 ? 256 : registers.Count;
    }

    private bool TryAddress(AtaTaskFile registers, bool isExtended, out long lba)
    {
        if (isExtended)
        {
            lba = registers.Lba48;
            return registers.IsLba && lba < _sectors;
        }

        if (registers.IsLba)
        {
            lba = registers.LbaLow | ((long)registers.LbaMid << 8) | ((long)registers.LbaHigh << 16)
                | ((long)(registers.Device & 0x0F) << 24);
            return lba < _sectors;
        }

        int cylinder = registers.LbaMid | (registers.LbaHigh << 8);
        int head = registers.Device & 0x0F;
        int sector = registers.LbaLow;
        lba = ((((long)cylinder * _heads) + head) * _sectorsPerTrack) + sector - 1;
        return sector >= 1 && sector <= _sectorsPerTrack && head < _heads && lba < _sectors;
    }

    private void SetAddress(AtaTaskFile registers, long lba)
    {
        bool isExtended = registers.Command is 0x24 or 0x25 or 0x29 or 0x34 or 0x35 or 0x39 or 0x3D or 0x42 or 0xCE;
        if (isExtended)
        {
            registers.SetLba48(lba);
        }
        else if (registers.IsLba)
        {
            SetAddress28(registers, lba);
        }
        else
        {
            long track = lba / _sectorsPerTrack;
            registers.LbaLow = (byte)((lba % _sectorsPerTrack) + 1);
            registers.Device = (byte)((registers.Device & 0xF0) | (int)(track % _heads));
            registers.LbaMid = (byte)(track / _heads);
            registers.LbaHigh = (byte)((track / _heads) >> 8);
        }
    }

    private static void SetAddress28(AtaTaskFile registers, long lba)
    {
        registers.LbaLow = (byte)lba;
        registers.LbaMid = (byte)(lba >> 8);
        registers.LbaHigh = (byte)(lba >> 16);
        registers.Device = (byte)((registers.Device & 0xF0) | (int)((lba >> 24) & 0x0F));
    }

    // INITIALIZE DEVICE PARAMETERS (ATA-5 §8.16): how CHS addresses are to be read from now on.
    private AtaWork InitializeParameters(AtaTaskFile registers)
    {
        int heads = (registers.Device & 0x0F) + 1;
        int sectors = registers.Count;
        if (sectors == 0)
        {
            return Abort(registers);
        }

        _heads = heads;
        _sectorsPerTrack = sectors;
        return Succeed(registers);
    }

    private AtaWork SetMultiple(AtaTaskFile registers)
    {
        int count = registers.Count;
        if (count > MaxMultiple || (count & (count - 1)) != 0)
        {
            _multiple = 0;
            return Abort(registers);
        }

        _multiple = count;
        return Succeed(registers);
    }

    // SET FEATURES (§6.37).
    private AtaWork SetFeatures(AtaTaskFile registers)
    {
        switch (registers.Features)
        {
            case 0x02:
                _isWriteCacheOn = true;
                return Succeed(registers);
            case 0x82:
                _isWriteCacheOn = false;

                // What the cache holds must be stable before the command ends (§6.37.11).
                return new AtaWork { Phase = AtaPhase.Backend, Operation = BlockOperation.Flush };
            case 0x03:
                return SetTransferMode(registers);
            case 0x05 or 0x85 or 0x42 or 0xC2 or 0xAA or 0x55 or 0x66 or 0xCC or 0x10 or 0x90:
                return Succeed(registers);
            default:
                return Abort(registers);
        }
    }

    private AtaWork SetTransferMode(AtaTaskFile registers)
    {
        byte mode = registers.Count;
        switch (mode >> 3)
        {
            case 0 when mode <= 1:
            case 1 when (mode & 7) <= 4:
                return Succeed(registers);
            case 4 when (mode & 7) <= 2:
            case 8 when (mode & 7) <= 5:
                _transferMode = mode;
                return Succeed(registers);
            default:
                return Abort(registers);
        }
    }

    // SMART (§6.46): on and off, healthy, empty attribute and log pages.
    private AtaWork Smart(AtaTaskFile registers)
    {
        if (registers.LbaMid != 0x4F || registers.LbaHigh != 0xC2)
        {
            return Abort(registers);
        }

        if (!_isSmartOn && registers.Features != 0xD8)
        {
            return Abort(registers);
        }

        switch (registers.Features)
        {
            case 0xD0 or 0xD1:
                {
                    byte[] page = new byte[512];
                    page[0] = 0x10;
                    page[511] = 0xF0;
                    return FromMemory(page, 512);
                }

            case 0xD5 when registers.LbaLow is 0 or 1 or 6:
                {
                    // The log directory, summary error log and self-test log: version 1, no entries.
                    byte[] log = new byte[512 * Math.Max(1, (int)registers.Count)];
                    log[0] = 1;
                    log[511] = registers.LbaLow == 0 ? (byte)0 : (byte)0xFF;
                    return FromMemory(log, 512);
                }

            case 0xD2 or 0xD4:
                return Succeed(registers);
            case 0xD8:
                _isSmartOn = true;
                return Succeed(registers);
            case 0xD9:
                _isSmartOn = false;
                return Succeed(registers);
            case 0xDA:
                registers.LbaMid = 0x4F;
                registers.LbaHigh = 0xC2;
                return Succeed(registers);
            default:
                return Abort(registers);
        }
    }

    // DATA SET MANAGEMENT, TRIM (ATA8-ACS §7.8): a list of up to 8 sectors of 64 ranges each.
    private AtaWork BeginTrim(AtaTaskFile registers)
    {
        int sectors = registers.Count | (registers.CountPrevious << 8);
        if ((registers.Features & 1) == 0 || sectors is 0 or > 8 || _backend.IsReadOnly)
        {
            return Abort(registers);
        }

        return new AtaWork
        {
            Phase = AtaPhase.DataOut,
            Operation = BlockOperation.Discard,
            Memory = new byte[sectors * 512],
            Length = sectors * 512,
            IsDma = true,
            BlockBytes = 512,
        };
    }

    private AtaWork NextTrim(AtaTaskFile registers)
    {
        while (_trimList is { } list && _trimAt < list.Length)
        {
            ulong entry = BinaryPrimitives.ReadUInt64LittleEndian(list.AsSpan(_trimAt));
            _trimAt += 512 / TrimEntriesPerSector;
            long lba = (long)(entry & 0x0000_FFFF_FFFF_FFFF);
            long count = (long)(entry >> 48);
            if (count == 0)
            {
                continue;
            }

            if (lba > _sectors - count)
            {
                _trimList = null;
                return Fail(registers, AtaError.IdNotFound);
            }

            return new AtaWork
            {
                Phase = AtaPhase.Backend,
                Operation = BlockOperation.Discard,
                Offset = lba * 512,
                Length = count * 512,
            };
        }

        _trimList = null;
        return Succeed(registers);
    }

    // IDENTIFY DEVICE (§6.17).
    private byte[] Identify()
    {
        byte[] data = new byte[512];
        PutWord(data, 0, 0x0040);
        PutWord(data, 1, _cylinders);
        PutWord(data, 3, 16);
        PutWord(data, 6, 63);
        PutText(data, 10, 20, Serial);
        PutText(data, 23, 8, Firmware);
        PutText(data, 27, 40, Model);
        PutWord(data, 47, 0x8000 | MaxMultiple);
        PutWord(data, 49, 0x0B00);
        PutWord(data, 50, 0x4000);
        PutWord(data, 51, 0x0200);
        PutWord(data, 53, 7);
        long perCylinder = (long)_heads * _sectorsPerTrack;
        long cylinders = Math.Min(_sectors / perCylinder, 65535);
        long current = cylinders * perCylinder;
        PutWord(data, 54, (int)cylinders);
        PutWord(data, 55, _heads);
        PutWord(data, 56, _sectorsPerTrack);
        PutWord(data, 57, (int)(current & 0xFFFF));
        PutWord(data, 58, (int)(current >> 16));
        PutWord(data, 59, _multiple == 0 ? 0 : 0x0100 | _multiple);
        PutWord(data, 60, (int)(Addressable28 & 0xFFFF));
        PutWord(data, 61, (int)(Addressable28 >> 16));
        bool isUltra = _transferMode >> 3 == 8;
        PutWord(data, 63, 0x07 | (_transferMode >> 3 == 4 ? 0x100 << (_transferMode & 7) : 0));
        PutWord(data, 64, 3);
        PutWord(data, 65, 120);
        PutWord(data, 66, 120);
        PutWord(data, 67, 120);
        PutWord(data, 68, 120);
        PutWord(data, 75, IsSerialAta ? 31 : 0);
        PutWord(data, 76, IsSerialAta ? 0x0106 : 0);
        PutWord(data, 80, 0x01F0);
        PutWord(data, 81, 0x0016);
        PutWord(data, 82, 0x4021);
        PutWord(data, 83, 0x7400);
        PutWord(data, 84, 0x4042);
        PutWord(data, 85, 0x4000 | (_isWriteCacheOn ? 0x20 : 0) | (_isSmartOn ? 1 : 0));
        PutWord(data, 86, 0x3400);
        PutWord(data, 87, 0x4042);
        PutWord(data, 88, 0x3F | (isUltra ? 0x100 << (_transferMode & 7) : 0));
        PutWord(data, 93, IsSerialAta ? 0 : 0x6001);
        for (int i = 0; i < 4; i++)
        {
            PutWord(data, 100 + i, (int)((_sectors >> (16 * i)) & 0xFFFF));
        }

        PutWord(data, 105, 8);
        int physicalLog2 = Math.Clamp(int.Log2(Math.Max(_backend.BlockBytes, 512)) - 9, 0, 3);
        PutWord(data, 106, 0x4000 | (physicalLog2 > 0 ? 0x2000 | physicalLog2 : 0));
        PutWord(data, 169, _backend.CanDiscard ? 1 : 0);
        PutWord(data, 217, 1);
        PutChecksum(data);
        return data;
    }
}

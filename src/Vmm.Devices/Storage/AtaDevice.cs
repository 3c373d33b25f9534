// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Text;
using Vmm.Core;

namespace Vmm.Devices.Storage;

// Theory. ATA drives sit behind two kinds of host adapter: the two channels of the PIIX3, where the guest moves data
// through a port or a bus-master engine, and the ports of an AHCI controller, where every command is a block of memory.
// What a command means is the same behind both, so it is written once, here: an AtaDevice decodes a task file into an
// AtaWork, which says what is to be moved between where and where; the adapter moves it in its own way and reports the
// outcome back with Complete, which fills in the result registers.
//
//   task file --Begin--> AtaWork --(adapter moves data)--> Complete --> task file
//   command packet --BeginPacket--> AtaWork ...            (ATAPI)
//
// A device has no lock: its adapter calls it under its own gate. It never touches guest memory or interrupts.
// Sources: ATA/ATAPI-7 (T13 1532D), ATA8-ACS (T13 1699D) for TRIM, SFF-8020i and MMC-5 for CD-ROM.

/// <summary>Bits of the Status register (ATA/ATAPI-7 vol. 1 §5.14).</summary>
[Flags]
internal enum AtaStatus : byte
{
    None = 0,
    Error = 1 << 0,
    DataRequest = 1 << 3,
    SeekComplete = 1 << 4,
    DeviceFault = 1 << 5,
    Ready = 1 << 6,
    Busy = 1 << 7,
}

/// <summary>Bits of the Error register (ATA/ATAPI-7 vol. 1 §5.9).</summary>
[Flags]
internal enum AtaError : byte
{
    None = 0,
    Aborted = 1 << 2,
    IdNotFound = 1 << 4,
    Uncorrectable = 1 << 6,
    InterfaceCrc = 1 << 7,
}

/// <summary>
/// The registers of one device. Count and the LBA bytes are two deep: a write pushes the old value, so that 48-bit
/// commands find their upper halves (ATA/ATAPI-7 vol. 1 §6.2.1).
/// </summary>
internal sealed class AtaTaskFile
{
    public byte Features { get; set; }

    public byte FeaturesPrevious { get; set; }

    public byte Count { get; set; }

    public byte CountPrevious { get; set; }

    public byte LbaLow { get; set; }

    public byte LbaLowPrevious { get; set; }

    public byte LbaMid { get; set; }

    public byte LbaMidPrevious { get; set; }

    public byte LbaHigh { get; set; }

    public byte LbaHighPrevious { get; set; }

    public byte Device { get; set; }

    public byte Command { get; set; }

    public AtaStatus Status { get; set; }

    public AtaError Error { get; set; }

    public bool IsLba => (Device & 0x40) != 0;

    public void SetLba48(long lba)
    {
        LbaLow = (byte)lba;
        LbaMid = (byte)(lba >> 8);
        LbaHigh = (byte)(lba >> 16);
        LbaLowPrevious = (byte)(lba >> 24);
        LbaMidPrevious = (byte)(lba >> 32);
        LbaHighPrevious = (byte)(lba >> 40);
    }

    public long Lba48 => LbaLow | ((long)LbaMid << 8) | ((long)LbaHigh << 16)
        | ((long)LbaLowPrevious << 24) | ((long)LbaMidPrevious << 32) | ((long)LbaHighPrevious << 40);

    public void Save(StateWriter writer, string prefix)
    {
        writer.WriteBytes(
            prefix + "tf",
            [
                Features, FeaturesPrevious, Count, CountPrevious, LbaLow, LbaLowPrevious, LbaMid, LbaMidPrevious,
                LbaHigh, LbaHighPrevious, Device, Command, (byte)Status, (byte)Error,
            ]);
    }

    public void Load(StateReader reader, string prefix)
    {
        Span<byte> raw = stackalloc byte[14];
        reader.ReadBytes(prefix + "tf", raw);
        Features = raw[0];
        FeaturesPrevious = raw[1];
        Count = raw[2];
        CountPrevious = raw[3];
        LbaLow = raw[4];
        LbaLowPrevious = raw[5];
        LbaMid = raw[6];
        LbaMidPrevious = raw[7];
        LbaHigh = raw[8];
        LbaHighPrevious = raw[9];
        Device = raw[10];
        Command = raw[11];
        Status = (AtaStatus)raw[12];
        Error = (AtaError)raw[13];
    }
}

/// <summary>What an adapter has to do for a command.</summary>
internal enum AtaPhase : byte
{
    /// <summary>Nothing: the result registers are set.</summary>
    Done = 0,

    /// <summary>Move data to the guest.</summary>
    DataIn = 1,

    /// <summary>Move data from the guest.</summary>
    DataOut = 2,

    /// <summary>Ask the back end for something without data.</summary>
    Backend = 3,

    /// <summary>Fetch a command packet of 12 bytes and call BeginPacket.</summary>
    Packet = 4,
}

/// <summary>
/// One command under way. Data is either a range of the disk (<see cref="Memory"/> is null) or bytes of the device.
/// </summary>
internal struct AtaWork
{
    public AtaPhase Phase;
    public bool IsDma;
    public bool IsPacket;
    public bool ForceUnitAccess;

    /// <summary>What the back end is asked for.</summary>
    public BlockOperation Operation;

    /// <summary>Byte range on the medium.</summary>
    public long Offset;

    /// <summary>Bytes to move, or of the range.</summary>
    public long Length;

    /// <summary>Data of the device itself; exactly <see cref="Length"/> bytes count.</summary>
    public byte[]? Memory;

    /// <summary>PIO: bytes per data request block.</summary>
    public int BlockBytes;

    public static AtaWork Done => default;

    public void Save(StateWriter writer, string prefix)
    {
        writer.Write(prefix + "phase", (ulong)Phase);
        writer.Write(prefix + "flags", (IsDma ? 1UL : 0) | (IsPacket ? 2UL : 0) | (ForceUnitAccess ? 4UL : 0));
        writer.Write(prefix + "operation", (ulong)Operation);
        writer.Write(prefix + "offset", Offset);
        writer.Write(prefix + "length", Length);
        writer.Write(prefix + "block", (ulong)BlockBytes);
        writer.WriteBytes(prefix + "memory", Memory is null ? [] : Memory.AsSpan(0, (int)Length));
    }

    public void Load(StateReader reader, string prefix, long mediumBytes)
    {
        Phase = (AtaPhase)reader.ReadBounded(prefix + "phase", (ulong)AtaPhase.Packet);
        ulong flags = reader.ReadBounded(prefix + "flags", 7);
        IsDma = (flags & 1) != 0;
        IsPacket = (flags & 2) != 0;
        ForceUnitAccess = (flags & 4) != 0;
        Operation = (BlockOperation)reader.ReadBounded(prefix + "operation", (ulong)BlockOperation.WriteZeroes);
        Offset = (long)reader.ReadBounded(prefix + "offset", long.MaxValue);
        Length = (long)reader.ReadBounded(prefix + "length", long.MaxValue);
        BlockBytes = (int)reader.ReadBounded(prefix + "block", 65536);
        ReadOnlySpan<byte> memory = reader.ReadBytes(prefix + "memory");
        Memory = memory.IsEmpty ? null : memory.ToArray();
        bool isBad = Memory is null
            ? Length > Math.Max(mediumBytes, 0) || Offset > mediumBytes - Length
            : Memory.Length != Length;
        isBad |= BlockBytes == 0;
        if (isBad && Phase is AtaPhase.DataIn or AtaPhase.DataOut)
        {
            throw new StateException($"{reader.Section}.{prefix}length: {Length} bytes at {Offset} do not fit the medium");
        }
    }
}

/// <summary>A disk or CD-ROM drive behind an ATA port. Not thread-safe: its adapter serialises calls.</summary>
public abstract class AtaDevice
{
    private protected AtaDevice(string model, string serial, string firmware)
    {
        Model = model;
        Serial = serial;
        Firmware = firmware;
    }

    /// <summary>Shown to the guest, at most 40 ASCII characters.</summary>
    public string Model { get; }

    /// <summary>Shown to the guest, at most 20 ASCII characters.</summary>
    public string Serial { get; }

    /// <summary>Shown to the guest, at most 8 ASCII characters.</summary>
    public string Firmware { get; }

    /// <summary>Sits behind an AHCI port: queued commands, no cable to detect.</summary>
    internal bool IsSerialAta { get; set; }

    /// <summary>True for a drive that takes command packets.</summary>
    internal abstract bool IsAtapi { get; }

    /// <summary>The medium, or null while there is none.</summary>
    internal abstract IBlockBackend? Medium { get; }

    /// <summary>Power-on or hardware reset.</summary>
    internal abstract void PowerOn();

    /// <summary>Software reset, or the end of a diagnostic: settings that survive it stay.</summary>
    internal abstract void SoftReset();

    /// <summary>Puts the signature into the registers (ATA/ATAPI-7 vol. 1 §5.21).</summary>
    internal void SetSignature(AtaTaskFile registers)
    {
        registers.Count = 1;
        registers.LbaLow = 1;
        registers.LbaMid = IsAtapi ? (byte)0x14 : (byte)0;
        registers.LbaHigh = IsAtapi ? (byte)0xEB : (byte)0;
        registers.Device &= 0x10;
        registers.Error = (AtaError)1;
        registers.Status = IsAtapi ? AtaStatus.None : AtaStatus.Ready | AtaStatus.SeekComplete;
    }

    /// <summary>Decodes the command in the registers.</summary>
    internal abstract AtaWork Begin(AtaTaskFile registers);

    /// <summary>Decodes a command packet; 12 or 16 bytes.</summary>
    internal virtual AtaWork BeginPacket(ReadOnlySpan<byte> packet, AtaTaskFile registers) => Abort(registers);

    /// <summary>
    /// The adapter has moved the data, or could not. Fills in the result. May ask for more work of the back end (a
    /// TRIM after its list has arrived): then it returns that.
    /// </summary>
    internal abstract AtaWork Complete(AtaTaskFile registers, in AtaWork work, BlockStatus status);

    internal abstract void SaveDevice(StateWriter writer, string prefix);

    internal abstract void LoadDevice(StateReader reader, string prefix);

    private protected static AtaWork Succeed(AtaTaskFile registers)
    {
        registers.Status = AtaStatus.Ready | AtaStatus.SeekComplete;
        registers.Error = AtaError.None;
        return AtaWork.Done;
    }

    private protected static AtaWork Fail(AtaTaskFile registers, AtaError error)
    {
        registers.Status = AtaStatus.Ready | AtaStatus.SeekComplete | AtaStatus.Error;
        registers.Error = error;
        return AtaWork.Done;
    }

    private protected static AtaWork Abort(AtaTaskFile registers) => Fail(registers, AtaError.Aborted);

    /// <summary>Text in IDENTIFY data: two characters per word, the first in the high byte, padded with blanks.</summary>
    private protected static void PutText(Span<byte> identify, int word, int lengthBytes, string text)
    {
        Span<byte> field = identify.Slice(word * 2, lengthBytes);
        field.Fill((byte)' ');
        for (int i = 0; i < Math.Min(text.Length, lengthBytes); i++)
        {
            field[i ^ 1] = text[i] is >= ' ' and <= '~' ? (byte)text[i] : (byte)'?';
        }
    }

    private protected static void PutWord(Span<byte> identify, int word, int value) =>
        BinaryPrimitives.WriteUInt16LittleEndian(identify[(word * 2)..], (ushort)value);

    /// <summary>Word 255: signature A5 and a checksum (ATA/ATAPI-7 §6.17.73).</summary>
    private protected static void PutChecksum(Span<byte> identify)
    {
        identify[510] = 0xA5;
        byte sum = 0;
        foreach (byte value in identify[..511])
        {
            sum += value;
        }

        identify[511] = (byte)-sum;
    }

    private protected static byte[] Ascii(string text, int length) => Encoding.ASCII.GetBytes(text.PadRight(length)[..length]);
}

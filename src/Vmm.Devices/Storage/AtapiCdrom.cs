// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Storage;

/// <summary>
/// A CD/DVD-ROM drive (MMC-5 packet commands over ATA/ATAPI-7): 2048-byte blocks, one session, one data track. Media may
/// be changed at any time from any thread; everything else is called by the adapter under its gate. Section numbers
/// refer to MMC-5 (T10 1675D) unless stated.
/// </summary>
public sealed class AtapiCdrom : AtaDevice
{
    private const int BlockBytes = 2048;
    private const int CdBlocks = 333_000;

    private readonly Lock _mediaGate = new();
    private IBlockBackend? _medium;
    private Sense _sense = Sense.None;
    private Sense _attention = Sense.None;
    private MediaEvent _event = MediaEvent.None;
    private bool _isLocked;
    private bool _isTrayOpen;
    private int _byteLimit = 0xFFFE;

    /// <summary>Makes a drive.</summary>
    /// <param name="medium">What is in it, or null for an empty drive; owned by the caller.</param>
    /// <param name="serial">At most 20 ASCII characters.</param>
    /// <param name="model">At most 40 ASCII characters.</param>
    public AtapiCdrom(IBlockBackend? medium, string serial, string model = "VMM DVD-ROM")
        : base(model, serial, "1.0")
    {
        _medium = medium;
        PowerOn();
    }

    /// <summary>The guest forbade opening the tray.</summary>
    public bool IsLocked
    {
        get
        {
            lock (_mediaGate)
            {
                return _isLocked;
            }
        }
    }

    /// <summary>The tray is open: the guest ejected the medium, which is still there.</summary>
    public bool IsTrayOpen
    {
        get
        {
            lock (_mediaGate)
            {
                return _isTrayOpen;
            }
        }
    }

    internal override bool IsAtapi => true;

    internal override IBlockBackend? Medium
    {
        get
        {
            lock (_mediaGate)
            {
                return _isTrayOpen ? null : _medium;
            }
        }
    }

    private long Blocks => (Medium?.LengthBytes ?? 0) / BlockBytes;

    private bool IsDvd => Blocks > CdBlocks;

    /// <summary>
    /// Puts another medium into the drive, or none. The guest is told by a unit attention and a media event. Any thread
    /// but not from a completion.
    /// </summary>
    /// <param name="medium">The new one, or null.</param>
    /// <param name="force">Also when the guest locked the tray.</param>
    /// <param name="old">What was in it before, idle now; the caller disposes it.</param>
    /// <returns>False when the tray is locked: the guest was asked to let go of the medium, nothing changed.</returns>
    public bool TryChangeMedium(IBlockBackend? medium, bool force, out IBlockBackend? old)
    {
        lock (_mediaGate)
        {
            if (_isLocked && !force)
            {
                _event = MediaEvent.EjectRequest;
                old = null;
                return false;
            }

            old = _medium;
            _medium = medium;
            _isTrayOpen = false;
            _isLocked = false;
            _event = medium is null ? MediaEvent.Removal : MediaEvent.New;
            _attention = Sense.MediumChanged;
        }

        // A read that was under way still uses the old one.
        old?.Drain();
        return true;
    }

    internal override void PowerOn()
    {
        lock (_mediaGate)
        {
            _isLocked = false;
            _isTrayOpen = false;
            _event = MediaEvent.None;
            _sense = Sense.None;
            _attention = Sense.PowerOn;
        }
    }

    internal override void SoftReset()
    {
        // DEVICE RESET and SRST leave sense data and the lock alone (SFF-8020i §5.1).
    }

    internal override AtaWork Begin(AtaTaskFile registers)
    {
        switch (registers.Command)
        {
            case 0xA0:
                return BeginPacketCommand(registers);
            case 0xA1:
                return new AtaWork
                {
                    Phase = AtaPhase.DataIn,
                    Memory = IdentifyPacket(),
                    Length = 512,
                    BlockBytes = 512,
                };
            case 0xEC or 0x20 or 0x21:
                // IDENTIFY DEVICE and READ SECTOR(S) abort with the signature (ATA/ATAPI-7 vol. 1 §6.17.5.2).
                SetSignature(registers);
                return Abort(registers);
            case 0x08:
                // DEVICE RESET (§6.10): the adapter has stopped what was under way.
                SetSignature(registers);
                return AtaWork.Done;
            case 0xEF:
                return registers.Features is 0x03 or 0x02 or 0x82 or 0x66 or 0xCC or 0x5D or 0xDD
                    ? Succeed(registers)
                    : Abort(registers);
            case 0xE0 or 0xE1 or 0xE2 or 0xE3 or 0xE6 or 0xE7 or 0xEA:
                return Succeed(registers);
            case 0xE5:
                registers.Count = 0xFF;
                return Succeed(registers);
            default:
                return Abort(registers);
        }
    }

    internal override AtaWork BeginPacket(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        byte code = packet[0];
        if (TakeAttention(code))
        {
            return Check(registers, _sense);
        }

        if (code != 0x03)
        {
            _sense = Sense.None;
        }

        return code switch
        {
            0x00 => NeedsMedium(registers) ?? Good(registers),
            0x03 => RequestSense(packet, registers),
            0x12 => Inquiry(packet, registers),
            0x1A => ModeSense(packet, registers, isLong: false),
            0x1B => StartStop(packet, registers),
            0x1E => PreventAllow(packet, registers),
            0x25 => ReadCapacity(registers),
            0x28 => Read(Be32(packet, 2), BinaryPrimitives.ReadUInt16BigEndian(packet[7..]), registers),
            0xA8 => Read(Be32(packet, 2), Be32(packet, 6), registers),
            0xBE => ReadCd(Be32(packet, 2), Be24(packet, 6), packet[9], registers),
            0xB9 => ReadCdMsf(packet, registers),
            0x2B => Seek(packet, registers),
            0x2F or 0x35 or 0xBB or 0x4E or 0x55 or 0x15 => NeedsMediumIf(code == 0x2F, registers) ?? Good(registers),
            0x42 => ReadSubChannel(packet, registers),
            0x43 => ReadToc(packet, registers),
            0x44 => ReadHeader(packet, registers),
            0x46 => GetConfiguration(packet, registers),
            0x4A => GetEvent(packet, registers),
            0x51 => ReadDiscInformation(packet, registers),
            0x52 => ReadTrackInformation(packet, registers),
            0x5A => ModeSense(packet, registers, isLong: true),
            0xAD => ReadDvdStructure(packet, registers),
            0xBD => MechanismStatus(packet, registers),
            _ => Check(registers, Sense.UnknownCommand),
        };
    }

    internal override AtaWork Complete(AtaTaskFile registers, in AtaWork work, BlockStatus status)
    {
        if (!work.IsPacket)
        {
            return status == BlockStatus.Ok ? Succeed(registers) : Abort(registers);
        }

        return status == BlockStatus.Ok
            ? Good(registers)
            : Check(registers, Medium is null ? Sense.NoMedium : Sense.ReadError);
    }

    internal override void SaveDevice(StateWriter writer, string prefix)
    {
        lock (_mediaGate)
        {
            writer.Write(prefix + "sense", _sense.Packed);
            writer.Write(prefix + "attention", _attention.Packed);
            writer.Write(prefix + "event", (ulong)_event);
            writer.Write(prefix + "locked", _isLocked);
            writer.Write(prefix + "open", _isTrayOpen);
            writer.Write(prefix + "limit", (ulong)_byteLimit);
        }
    }

    internal override void LoadDevice(StateReader reader, string prefix)
    {
        lock (_mediaGate)
        {
            _sense = Sense.FromPacked(reader.ReadUInt32(prefix + "sense"));
            _attention = Sense.FromPacked(reader.ReadUInt32(prefix + "attention"));
            _event = (MediaEvent)reader.ReadBounded(prefix + "event", (ulong)MediaEvent.Removal);
            _isLocked = reader.ReadBoolean(prefix + "locked");
            _isTrayOpen = reader.ReadBoolean(prefix + "open");
            _byteLimit = (int)Math.Max(2, reader.ReadBounded(prefix + "limit", 0xFFFE));
        }
    }

    // PACKET (ATA/ATAPI-7 vol. 1 §6.24): features bit 0 DMA, bit 1 overlap (not offered); LBA mid and high hold the
    // most bytes that the host takes in one data request block.
    private AtaWork BeginPacketCommand(AtaTaskFile registers)
    {
        if ((registers.Features & 2) != 0)
        {
            return Abort(registers);
        }

        int limit = registers.LbaMid | (registers.LbaHigh << 8);
        limit = limit == 0xFFFF ? 0xFFFE : limit & 0xFFFE;
        _byteLimit = limit == 0 ? 0xFFFE : limit;
        return new AtaWork { Phase = AtaPhase.Packet, IsPacket = true, IsDma = (registers.Features & 1) != 0 };
    }

    private bool TakeAttention(byte code)
    {
        lock (_mediaGate)
        {
            // INQUIRY, REQUEST SENSE, GET CONFIGURATION and GET EVENT STATUS do not report it (§4.1.6.1).
            if (_attention == Sense.None || code is 0x12 or 0x03 or 0x46 or 0x4A)
            {
                return false;
            }

            _sense = _attention;
            _attention = Sense.None;
            return true;
        }
    }

    private static AtaWork Good(AtaTaskFile registers)
    {
        // Interrupt reason: command/data and I/O set mean "status".
        registers.Count = 3;
        return Succeed(registers);
    }

    private AtaWork Check(AtaTaskFile registers, Sense sense)
    {
        _sense = sense;
        registers.Count = 3;
        return Fail(registers, (AtaError)((int)sense.Key << 4) | AtaError.Aborted);
    }

    private AtaWork? NeedsMedium(AtaTaskFile registers) =>
        Medium is null ? Check(registers, IsTrayOpen ? Sense.TrayOpen : Sense.NoMedium) : null;

    private AtaWork? NeedsMediumIf(bool needs, AtaTaskFile registers) => needs ? NeedsMedium(registers) : null;

    private AtaWork Answer(AtaTaskFile registers, byte[] data, int allocation)
    {
        int length = Math.Min(data.Length, allocation);
        return length == 0
            ? Good(registers)
            : new AtaWork
            {
                Phase = AtaPhase.DataIn,
                IsPacket = true,
                IsDma = (registers.Features & 1) != 0,
                Memory = data[..length],
                Length = length,
                BlockBytes = _byteLimit,
            };
    }

    private AtaWork Read(long block, long count, AtaTaskFile registers)
    {
        if (NeedsMedium(registers) is { } refused)
        {
            return refused;
        }

        long blocks = Blocks;
        if (block >= blocks || count > blocks - block)
        {
            return Check(registers, Sense.OutOfRange);
        }

        if (count == 0)
        {
            return Good(registers);
        }

        // A data request block holds whole blocks where the host's limit allows.
        int limit = _byteLimit >= BlockBytes ? _byteLimit / BlockBytes * BlockBytes : _byteLimit;
        return new AtaWork
        {
            Phase = AtaPhase.DataIn,
            IsPacket = true,
            IsDma = (registers.Features & 1) != 0,
            Operation = BlockOperation.Read,
            Offset = block * BlockBytes,
            Length = count * BlockBytes,
            BlockBytes = limit,
        };
    }

    // READ CD (§6.19): user data of mode 1 sectors, which is what data discs hold.
    private AtaWork ReadCd(long block, long count, byte what, AtaTaskFile registers) => (what & 0xF8) switch
    {
        0x00 => NeedsMedium(registers) ?? Good(registers),
        0x10 => Read(block, count, registers),
        _ => Check(registers, Sense.InvalidField),
    };

    private AtaWork ReadCdMsf(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        long first = (((packet[3] * 60L) + packet[4]) * 75) + packet[5] - 150;
        long end = (((packet[6] * 60L) + packet[7]) * 75) + packet[8] - 150;
        return first < 0 || end < first
            ? Check(registers, Sense.InvalidField)
            : ReadCd(first, end - first, packet[9], registers);
    }

    private AtaWork Seek(ReadOnlySpan<byte> packet, AtaTaskFile registers) =>
        NeedsMedium(registers) ?? (Be32(packet, 2) < Blocks ? Good(registers) : Check(registers, Sense.OutOfRange));

    private AtaWork RequestSense(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        byte[] data = new byte[18];
        Sense sense;
        lock (_mediaGate)
        {
            sense = _sense == Sense.None ? _attention : _sense;
            if (_sense == Sense.None)
            {
                _attention = Sense.None;
            }

            _sense = Sense.None;
        }

        data[0] = 0x70;
        data[2] = sense.Key;
        data[7] = 10;
        data[12] = sense.Code;
        data[13] = sense.Qualifier;
        return Answer(registers, data, packet[4]);
    }

    private AtaWork Inquiry(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        int allocation = BinaryPrimitives.ReadUInt16BigEndian(packet[3..]);
        if ((packet[1] & 1) != 0)
        {
            byte[]? page = packet[2] switch
            {
                0x00 => [5, 0, 0, 2, 0x00, 0x83],
                0x83 => VitalIdentification(),
                _ => null,
            };
            return page is null ? Check(registers, Sense.InvalidField) : Answer(registers, page, allocation);
        }

        byte[] data = new byte[36];
        data[0] = 5;
        data[1] = 0x80;
        data[3] = 0x21;
        data[4] = 31;
        Ascii("VMM", 8).CopyTo(data, 8);
        Ascii(Model.StartsWith("VMM ", StringComparison.Ordinal) ? Model[4..] : Model, 16).CopyTo(data, 16);
        Ascii(Firmware, 4).CopyTo(data, 32);
        return Answer(registers, data, allocation);
    }

    private byte[] VitalIdentification()
    {
        byte[] serial = Ascii(Serial, 20);
        byte[] page = new byte[8 + serial.Length];
        page[0] = 5;
        page[1] = 0x83;
        page[3] = (byte)(4 + serial.Length);
        page[4] = 2;
        page[7] = (byte)serial.Length;
        serial.CopyTo(page, 8);
        return page;
    }

    private AtaWork StartStop(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        bool loadEject = (packet[4] & 2) != 0;
        bool start = (packet[4] & 1) != 0;
        if (loadEject)
        {
            lock (_mediaGate)
            {
                if (!start && _isLocked)
                {
                    return Check(registers, Sense.RemovalPrevented);
                }

                if (_isTrayOpen == start)
                {
                    _isTrayOpen = !start;
                    _event = start && _medium is not null ? MediaEvent.New : MediaEvent.Removal;
                    if (start && _medium is not null)
                    {
                        _attention = Sense.MediumChanged;
                    }
                }
            }
        }

        return Good(registers);
    }

    private AtaWork PreventAllow(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        lock (_mediaGate)
        {
            _isLocked = (packet[4] & 1) != 0;
        }

        return Good(registers);
    }

    private AtaWork ReadCapacity(AtaTaskFile registers)
    {
        if (NeedsMedium(registers) is { } refused)
        {
            return refused;
        }

        byte[] data = new byte[8];
        BinaryPrimitives.WriteUInt32BigEndian(data, (uint)Math.Clamp(Blocks - 1, 0, uint.MaxValue));
        BinaryPrimitives.WriteUInt32BigEndian(data.AsSpan(4), BlockBytes);
        return Answer(registers, data, 8);
    }

    // READ TOC/PMA/ATIP (§6.26), formats 0 (TOC), 1 (session) and 2 (full TOC).
    private AtaWork ReadToc(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        if (NeedsMedium(registers) is { } refused)
        {
            return refused;
        }

        bool isMsf = (packet[1] & 2) != 0;
        int format = packet[2] & 0x0F;
        if (format == 0 && packet[9] >> 6 != 0)
        {
            // The format used to stand in the control byte (SFF-8020i); old drivers still put it there.
            format = packet[9] >> 6;
        }

        int allocation = BinaryPrimitives.ReadUInt16BigEndian(packet[7..]);
        int track = packet[6];
        byte[] data;
        switch (format)
        {
            case 0 when track is 0 or 1:
                data = new byte[20];
                data[1] = 18;
                data[2] = 1;
                data[3] = 1;
                data[5] = 0x14;
                data[6] = 1;
                PutAddress(data.AsSpan(8), 0, isMsf);
                data[13] = 0x14;
                data[14] = 0xAA;
                PutAddress(data.AsSpan(16), Blocks, isMsf);
                return Answer(registers, data, allocation);
            case 0 when track == 0xAA:
                data = new byte[12];
                data[1] = 10;
                data[2] = 1;
                data[3] = 1;
                data[5] = 0x14;
                data[6] = 0xAA;
                PutAddress(data.AsSpan(8), Blocks, isMsf);
                return Answer(registers, data, allocation);
            case 1:
                data = new byte[12];
                data[1] = 10;
                data[2] = 1;
                data[3] = 1;
                data[5] = 0x14;
                data[6] = 1;
                PutAddress(data.AsSpan(8), 0, isMsf);
                return Answer(registers, data, allocation);
            case 2:
                return Answer(registers, FullToc(), allocation);
            default:
                return Check(registers, Sense.InvalidField);
        }
    }

    private byte[] FullToc()
    {
        byte[] data = new byte[4 + (4 * 11)];
        data[1] = (byte)(data.Length - 2);
        data[2] = 1;
        data[3] = 1;
        ReadOnlySpan<byte> points = [0xA0, 0xA1, 0xA2, 0x01];
        Span<byte> msf = stackalloc byte[4];
        for (int i = 0; i < points.Length; i++)
        {
            Span<byte> entry = data.AsSpan(4 + (i * 11), 11);
            entry[0] = 1;
            entry[1] = 0x14;
            entry[3] = points[i];
            if (points[i] is 0xA0 or 0xA1)
            {
                entry[8] = 1;
            }
            else
            {
                PutAddress(msf, points[i] == 0xA2 ? Blocks : 0, isMsf: true);
                msf[1..].CopyTo(entry[8..]);
            }
        }

        return data;
    }

    private static void PutAddress(Span<byte> into, long block, bool isMsf)
    {
        if (!isMsf)
        {
            BinaryPrimitives.WriteUInt32BigEndian(into, (uint)block);
            return;
        }

        long frames = block + 150;
        into[0] = 0;
        into[1] = (byte)Math.Min(frames / (60 * 75), 255);
        into[2] = (byte)(frames / 75 % 60);
        into[3] = (byte)(frames % 75);
    }

    private AtaWork ReadSubChannel(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        if (NeedsMedium(registers) is { } refused)
        {
            return refused;
        }

        // Audio status 15h: no current status to return (§6.25).
        byte[] data = new byte[(packet[2] & 0x40) != 0 ? 24 : 4];
        data[1] = 0x15;
        data[3] = (byte)(data.Length - 4);
        if (data.Length > 4)
        {
            data[4] = packet[3];
        }

        return Answer(registers, data, BinaryPrimitives.ReadUInt16BigEndian(packet[7..]));
    }

    private AtaWork ReadHeader(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        if (NeedsMedium(registers) is { } refused)
        {
            return refused;
        }

        long block = Be32(packet, 2);
        if (block >= Blocks)
        {
            return Check(registers, Sense.OutOfRange);
        }

        byte[] data = new byte[8];
        data[0] = 1;
        PutAddress(data.AsSpan(4), block, (packet[1] & 2) != 0);
        return Answer(registers, data, BinaryPrimitives.ReadUInt16BigEndian(packet[7..]));
    }

    // GET CONFIGURATION (§6.5): profile list, core, removable medium, random readable, CD and DVD read.
    private AtaWork GetConfiguration(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        int kind = packet[1] & 3;
        int first = BinaryPrimitives.ReadUInt16BigEndian(packet[2..]);
        bool hasMedium = Medium is not null;
        byte current = hasMedium ? (IsDvd ? (byte)0x10 : (byte)0x08) : (byte)0;
        byte[] data = new byte[256];
        int at = 8;
        data[7] = current;
        byte isCd = current == 0x08 ? (byte)1 : (byte)0;
        byte isDvd = current == 0x10 ? (byte)1 : (byte)0;
        Feature(0x0000, 0, true, [0, 0x10, isDvd, 0, 0, 0x08, isCd, 0]);
        Feature(0x0001, 2, true, [0, 0, 0, 2, 0, 0, 0, 0]);
        Feature(0x0003, 0, true, [0x29, 0, 0, 0]);
        Feature(0x0010, 0, hasMedium, [0, 0, 8, 0, 0, 1, 0, 0]);
        Feature(0x001E, 0, isCd != 0, [0, 0, 0, 0]);
        Feature(0x001F, 0, isDvd != 0, []);
        BinaryPrimitives.WriteInt32BigEndian(data, at - 4);
        return Answer(registers, data[..at], BinaryPrimitives.ReadUInt16BigEndian(packet[7..]));

        void Feature(int code, int version, bool isCurrent, ReadOnlySpan<byte> body)
        {
            bool wanted = kind switch
            {
                0 => code >= first,
                1 => code >= first && isCurrent,
                _ => code == first,
            };
            if (!wanted)
            {
                return;
            }

            bool isPersistent = code is 0x0000 or 0x0001 or 0x0003;
            BinaryPrimitives.WriteUInt16BigEndian(data.AsSpan(at), (ushort)code);
            data[at + 2] = (byte)((version << 2) | (isPersistent ? 2 : 0) | (isCurrent ? 1 : 0));
            data[at + 3] = (byte)body.Length;
            body.CopyTo(data.AsSpan(at + 4));
            at += 4 + body.Length;
        }
    }

    // GET EVENT STATUS NOTIFICATION (§6.6): polled operation, media class only.
    private AtaWork GetEvent(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        if ((packet[1] & 1) == 0)
        {
            return Check(registers, Sense.InvalidField);
        }

        int allocation = BinaryPrimitives.ReadUInt16BigEndian(packet[7..]);
        if ((packet[4] & 0x10) == 0)
        {
            return Answer(registers, [0, 2, 0x80, 0x10], allocation);
        }

        byte[] data = new byte[8];
        lock (_mediaGate)
        {
            data[1] = 6;
            data[2] = 4;
            data[3] = 0x10;
            data[4] = (byte)_event;
            data[5] = (byte)((_isTrayOpen ? 1 : 0) | (_medium is not null && !_isTrayOpen ? 2 : 0));
            if (allocation > 4)
            {
                _event = MediaEvent.None;
            }
        }

        return Answer(registers, data, allocation);
    }

    private AtaWork ReadDiscInformation(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        if (NeedsMedium(registers) is { } refused)
        {
            return refused;
        }

        byte[] data = new byte[34];
        data[1] = 32;
        data[2] = 0x0E;
        data[3] = 1;
        data[4] = 1;
        data[5] = 1;
        data[6] = 1;
        data[7] = 0x20;
        return Answer(registers, data, BinaryPrimitives.ReadUInt16BigEndian(packet[7..]));
    }

    private AtaWork ReadTrackInformation(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        if (NeedsMedium(registers) is { } refused)
        {
            return refused;
        }

        byte[] data = new byte[36];
        data[1] = 34;
        data[2] = 1;
        data[3] = 1;
        data[5] = 4;
        data[6] = 1;
        BinaryPrimitives.WriteUInt32BigEndian(data.AsSpan(24), (uint)Blocks);
        return Answer(registers, data, BinaryPrimitives.ReadUInt16BigEndian(packet[7..]));
    }

    // MODE SENSE (§6.11): error recovery (01h), CD capabilities (2Ah), all (3Fh).
    private AtaWork ModeSense(ReadOnlySpan<byte> packet, AtaTaskFile registers, bool isLong)
    {
        int page = packet[2] & 0x3F;
        int control = packet[2] >> 6;
        if (control == 3)
        {
            return Check(registers, Sense.SavingNotSupported);
        }

        int header = isLong ? 8 : 4;
        byte[] data = new byte[header + 8 + 22];
        int at = header;
        if (page is 0x01 or 0x3F)
        {
            data[at] = 0x01;
            data[at + 1] = 6;
            data[at + 3] = control == 1 ? (byte)0 : (byte)5;
            at += 8;
        }

        if (page is 0x2A or 0x3F)
        {
            PutCapabilities(data.AsSpan(at, 22), control == 1);
            at += 22;
        }

        if (at == header)
        {
            return Check(registers, Sense.InvalidField);
        }

        int allocation;
        if (isLong)
        {
            BinaryPrimitives.WriteUInt16BigEndian(data, (ushort)(at - 2));
            allocation = BinaryPrimitives.ReadUInt16BigEndian(packet[7..]);
        }
        else
        {
            data[0] = (byte)(at - 1);
            allocation = packet[4];
        }

        return Answer(registers, data[..at], allocation);
    }

    private void PutCapabilities(Span<byte> page, bool isChangeable)
    {
        page[0] = 0x2A;
        page[1] = 20;
        if (isChangeable)
        {
            return;
        }

        // Reads CD-R, CD-RW, DVD-ROM; mode 2 forms; tray with eject and lock; 50x.
        page[2] = 0x3B;
        page[4] = 0x70;
        page[6] = (byte)(0x29 | (IsLocked ? 2 : 0));
        BinaryPrimitives.WriteUInt16BigEndian(page[8..], 50 * 176);
        BinaryPrimitives.WriteUInt16BigEndian(page[10..], 2);
        BinaryPrimitives.WriteUInt16BigEndian(page[12..], 512);
        BinaryPrimitives.WriteUInt16BigEndian(page[14..], 50 * 176);
    }

    private AtaWork ReadDvdStructure(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        if (NeedsMedium(registers) is { } refused)
        {
            return refused;
        }

        if (!IsDvd || packet[7] != 0)
        {
            return Check(registers, IsDvd ? Sense.InvalidField : Sense.IncompatibleMedium);
        }

        // Format 00h: physical format information of a single-layer DVD-ROM, data area from 030000h.
        byte[] data = new byte[4 + 2048];
        data[1] = 2048 + 2 - 256 * ((2048 + 2) / 256);
        data[0] = (2048 + 2) / 256;
        data[4] = 0x01;
        data[5] = 0x0F;
        data[6] = 0x01;
        BinaryPrimitives.WriteUInt32BigEndian(data.AsSpan(8), 0x030000);
        BinaryPrimitives.WriteUInt32BigEndian(data.AsSpan(12), (uint)(0x030000 + Blocks - 1));
        return Answer(registers, data, BinaryPrimitives.ReadUInt16BigEndian(packet[8..]));
    }

    private AtaWork MechanismStatus(ReadOnlySpan<byte> packet, AtaTaskFile registers)
    {
        byte[] data = new byte[8];
        data[1] = (byte)(IsTrayOpen ? 0x10 : 0);
        data[5] = 1;
        return Answer(registers, data, BinaryPrimitives.ReadUInt16BigEndian(packet[8..]));
    }

    // IDENTIFY PACKET DEVICE (ATA/ATAPI-7 vol. 1 §6.18).
    private byte[] IdentifyPacket()
    {
        byte[] data = new byte[512];

        // ATAPI, CD-ROM, removable, DRQ within 50 us of PACKET, 12-byte packets.
        PutWord(data, 0, 0x85C0);
        PutText(data, 10, 20, Serial);
        PutText(data, 23, 8, Firmware);
        PutText(data, 27, 40, Model);
        PutWord(data, 49, 0x0B00);
        PutWord(data, 50, 0x4000);
        PutWord(data, 53, 7);
        PutWord(data, 63, 0x0007);
        PutWord(data, 64, 3);
        PutWord(data, 65, 120);
        PutWord(data, 66, 120);
        PutWord(data, 67, 120);
        PutWord(data, 68, 120);
        PutWord(data, 76, IsSerialAta ? 0x0006 : 0);
        PutWord(data, 80, 0x00F0);
        PutWord(data, 82, 0x4210);
        PutWord(data, 83, 0x4000);
        PutWord(data, 84, 0x4000);
        PutWord(data, 85, 0x4210);
        PutWord(data, 86, 0);
        PutWord(data, 87, 0x4000);
        PutWord(data, 88, 0x203F);
        PutWord(data, 93, IsSerialAta ? 0 : 0x6001);
        PutWord(data, 126, 0);
        PutChecksum(data);
        return data;
    }

    private static uint Be32(ReadOnlySpan<byte> packet, int at) => BinaryPrimitives.ReadUInt32BigEndian(packet[at..]);

    private static uint Be24(ReadOnlySpan<byte> packet, int at) =>
        ((uint)packet[at] << 16) | BinaryPrimitives.ReadUInt16BigEndian(packet[(at + 1)..]);

    // Media event codes (§6.6.2.5, table 128).
    private enum MediaEvent : byte
    {
        None = 0,
        EjectRequest = 1,
        New = 2,
        Removal = 3,
    }

    private readonly record struct Sense(byte Key, byte Code, byte Qualifier)
    {
        public static readonly Sense None = new(0, 0, 0);
        public static readonly Sense NoMedium = new(2, 0x3A, 0x01);
        public static readonly Sense TrayOpen = new(2, 0x3A, 0x02);
        public static readonly Sense ReadError = new(3, 0x11, 0);
        public static readonly Sense UnknownCommand = new(5, 0x20, 0);
        public static readonly Sense OutOfRange = new(5, 0x21, 0);
        public static readonly Sense InvalidField = new(5, 0x24, 0);
        public static readonly Sense SavingNotSupported = new(5, 0x39, 0);
        public static readonly Sense IncompatibleMedium = new(5, 0x30, 0x02);
        public static readonly Sense RemovalPrevented = new(5, 0x53, 0x02);
        public static readonly Sense MediumChanged = new(6, 0x28, 0);
        public static readonly Sense PowerOn = new(6, 0x29, 0);

        public ulong Packed => ((ulong)Key << 16) | ((ulong)Code << 8) | Qualifier;

        public static Sense FromPacked(uint value) => new((byte)(value >> 16), (byte)(value >> 8), (byte)value);
    }
}

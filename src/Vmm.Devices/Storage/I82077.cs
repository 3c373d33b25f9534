// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Legacy;

namespace Vmm.Devices.Storage;

// Theory. The floppy disk controller of the PC (Intel 82077AA data sheet, order number 290166) with up to two drives, at
// ports 3F0..3F5 and 3F7, ISA interrupt 6, DMA channel 2.
//
// A command has three phases (§5): the host writes its bytes to the FIFO, data moves by DMA or through the FIFO, the
// host reads the result. Here data moves in one piece: a read fetches everything that the command could ask for (to the
// last sector of the track, or of the cylinder with MT) in one request to the back end and then hands out sectors until
// the DMA controller reports terminal count; a write collects until terminal count and then writes in one request. The
// guest sees command busy without RQM while the host works, as on a turning disk.
//
// Mechanics take no time: a seek is over when its command byte is written. What software can tell apart is kept: data
// rates (a disk is readable at the rate that it was made for only, by which BIOSes tell media apart), disk change,
// write protection, missing sectors, the polling interrupt after reset.
//
// Locks: _gate; requests are submitted without it, the DMA controller is called under it.

/// <summary>Drive types as the PC's CMOS names them.</summary>
public enum FloppyDriveKind : byte
{
    /// <summary>No drive.</summary>
    None = 0,

    /// <summary>5.25" 1.2 MB.</summary>
    Inch5High = 2,

    /// <summary>3.5" 1.44 MB.</summary>
    Inch3High = 4,

    /// <summary>3.5" 2.88 MB.</summary>
    Inch3Extended = 5,
}

/// <summary>The floppy disk controller.</summary>
public sealed class I82077 : IDevice
{
    private const int MaxBytes = 2 * 36 * 512;
    private const byte MsrRequest = 0x80;
    private const byte MsrToHost = 0x40;
    private const byte MsrNonDma = 0x20;
    private const byte MsrBusy = 0x10;
    private const byte DorNotReset = 0x04;
    private const byte DorDmaGate = 0x08;

    // (bytes, tracks, heads, sectors, drive, data rate code of DSR and CCR: 0 500, 1 300, 2 250, 3 1000 kbit/s)
    private static readonly (int Bytes, int Tracks, int Heads, int Sectors, FloppyDriveKind Drive, int Rate)[] s_media =
    [
        (160 << 10, 40, 1, 8, FloppyDriveKind.Inch5High, 1),
        (180 << 10, 40, 1, 9, FloppyDriveKind.Inch5High, 1),
        (320 << 10, 40, 2, 8, FloppyDriveKind.Inch5High, 1),
        (360 << 10, 40, 2, 9, FloppyDriveKind.Inch5High, 1),
        (1200 << 10, 80, 2, 15, FloppyDriveKind.Inch5High, 0),
        (720 << 10, 80, 2, 9, FloppyDriveKind.Inch3High, 2),
        (1440 << 10, 80, 2, 18, FloppyDriveKind.Inch3High, 0),
        (1680 << 10, 80, 2, 21, FloppyDriveKind.Inch3High, 0),
        (1722 << 10, 82, 2, 21, FloppyDriveKind.Inch3High, 0),
        (2880 << 10, 80, 2, 36, FloppyDriveKind.Inch3Extended, 3),
    ];

    private readonly Lock _gate = new();
    private readonly Drive[] _drives;
    private readonly IIrqLine _irq;
    private readonly IIsaDmaChannel _dma;
    private readonly byte[] _command = new byte[9];
    private readonly byte[] _result = new byte[16];
    private byte[] _data = new byte[MaxBytes];
    private Transfer? _transfer;
    private Phase _phase;
    private int _commandLength;
    private int _commandAt;
    private int _resultLength;
    private int _resultAt;
    private int _dataLength;
    private int _dataAt;
    private byte _dor;
    private byte _tape;
    private byte _rate = 2;
    private byte _specify1;
    private byte _specify2;
    private byte _config = 0x20;
    private byte _precompensation;
    private byte _perpendicular;
    private bool _isLocked;
    private bool _interrupt;
    private int _resetSenses;
    private byte _seekStatus;
    private bool _hasSeekStatus;
    private bool _isResetting;

    /// <summary>Makes the controller with two drives.</summary>
    /// <param name="first">Medium of drive A, or null for an empty drive.</param>
    /// <param name="second">Medium of drive B; null with <paramref name="hasSecond"/> false means no drive.</param>
    /// <param name="hasSecond">There is a drive B.</param>
    /// <param name="irq">ISA interrupt 6.</param>
    /// <param name="dma">ISA DMA channel 2.</param>
    public I82077(IBlockBackend? first, IBlockBackend? second, bool hasSecond, IIrqLine irq, IIsaDmaChannel dma)
    {
        ArgumentNullException.ThrowIfNull(dma);
        _irq = irq;
        _dma = dma;
        _drives = [new Drive(isPresent: true, first), new Drive(hasSecond || second is not null, second)];
        Low = new Window(this, 0, 6);
        High = new Window(this, 7, 1);
        dma.Unmasked = OnUnmasked;
        Reset();
    }

    private enum Phase : byte
    {
        Command = 0,
        Busy = 1,
        DataIn = 2,
        DataOut = 3,
        Result = 4,
    }

    /// <inheritdoc/>
    public string Id => "fdc";

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <summary>Six ports at 3F0h.</summary>
    public IRegisterWindow Low { get; }

    /// <summary>One port at 3F7h.</summary>
    public IRegisterWindow High { get; }

    /// <summary>What CMOS register 10h has to say about a drive (0 is A).</summary>
    public FloppyDriveKind KindOf(int drive) => _drives[drive & 1].Kind;

    /// <summary>Puts another medium into a drive, or none; the guest sees the disk change line. Any thread but not from a
    /// completion.</summary>
    /// <param name="drive">0 or 1.</param>
    /// <param name="medium">The new one, or null.</param>
    /// <returns>What was in it, idle now; the caller disposes it.</returns>
    public IBlockBackend? ChangeMedium(int drive, IBlockBackend? medium)
    {
        IBlockBackend? old;
        lock (_gate)
        {
            old = _drives[drive & 1].Medium;
            _drives[drive & 1].Insert(medium);
        }

        old?.Drain();
        return old;
    }

    /// <inheritdoc/>
    public void Reset()
    {
        lock (_gate)
        {
            if (_transfer is { IsUsed: true } transfer)
            {
                transfer.IsAbandoned = true;
                _transfer = null;
                _data = new byte[MaxBytes];
            }

            _dor = 0;
            _tape = 0;
            _rate = 2;
            _isLocked = false;
            _specify1 = 0;
            _specify2 = 0;
            _perpendicular = 0;
            _isResetting = false;
            foreach (Drive drive in _drives)
            {
                drive.Track = 0;
                drive.IsChanged = drive.Medium is not null || drive.IsPresent;
            }

            SoftReset();
            _resetSenses = 0;
            _interrupt = false;
            _irq.Set(false);
        }
    }

    /// <inheritdoc/>
    public void Pause()
    {
        foreach (Drive drive in _drives)
        {
            drive.Medium?.Drain();
        }
    }

    /// <inheritdoc/>
    public void Resume()
    {
    }

    /// <inheritdoc/>
    public void Save(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_gate)
        {
            writer.Write("phase", (ulong)_phase);
            writer.WriteBytes("command", _command);
            writer.Write("command.length", (ulong)_commandLength);
            writer.Write("command.at", (ulong)_commandAt);
            writer.WriteBytes("result", _result.AsSpan(0, _resultLength));
            writer.Write("result.at", (ulong)_resultAt);
            writer.WriteBytes("data", _data.AsSpan(0, _dataLength));
            writer.Write("data.at", (ulong)_dataAt);
            writer.WriteBytes(
                "registers",
                [_dor, _tape, _rate, _specify1, _specify2, _config, _precompensation, _perpendicular, _seekStatus]);
            writer.Write("locked", _isLocked);
            writer.Write("interrupt", _interrupt);
            writer.Write("senses", (ulong)_resetSenses);
            writer.Write("hasSeek", _hasSeekStatus);
            for (int i = 0; i < 2; i++)
            {
                writer.Write($"track{i}", (ulong)_drives[i].Track);
                writer.Write($"changed{i}", _drives[i].IsChanged);
            }
        }
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        Span<byte> registers = stackalloc byte[9];
        lock (_gate)
        {
            var phase = (Phase)reader.ReadBounded("phase", (ulong)Phase.Result);
            reader.ReadBytes("command", _command);
            _commandLength = (int)reader.ReadBounded("command.length", 9);
            _commandAt = (int)reader.ReadBounded("command.at", 8);
            ReadOnlySpan<byte> result = reader.ReadBytes("result");
            ReadOnlySpan<byte> data = reader.ReadBytes("data");
            if (phase == Phase.Busy || result.Length > _result.Length || data.Length > MaxBytes || (data.Length & 511) != 0)
            {
                throw new StateException($"{reader.Section}.phase: the controller's state cannot be resumed");
            }

            _phase = phase;
            result.CopyTo(_result);
            _resultLength = result.Length;
            _resultAt = (int)reader.ReadBounded("result.at", (ulong)result.Length);
            data.CopyTo(_data);
            _dataLength = data.Length;
            _dataAt = (int)reader.ReadBounded("data.at", (ulong)data.Length);
            if ((phase is Phase.DataIn or Phase.DataOut && _dataAt >= _dataLength)
                || (phase == Phase.Result && _resultAt >= _resultLength))
            {
                throw new StateException($"{reader.Section}.phase: {phase} has nothing left to move");
            }

            reader.ReadBytes("registers", registers);
            (_dor, _tape, _rate, _specify1) = (registers[0], registers[1], (byte)(registers[2] & 3), registers[3]);
            (_specify2, _config, _precompensation) = (registers[4], registers[5], registers[6]);
            (_perpendicular, _seekStatus) = (registers[7], registers[8]);
            _isLocked = reader.ReadBoolean("locked");
            _interrupt = reader.ReadBoolean("interrupt");
            _resetSenses = (int)reader.ReadBounded("senses", 4);
            _hasSeekStatus = reader.ReadBoolean("hasSeek");
            for (int i = 0; i < 2; i++)
            {
                _drives[i].Track = (int)reader.ReadBounded($"track{i}", 255);
                _drives[i].IsChanged = reader.ReadBoolean($"changed{i}");
            }

            DriveInterrupt();
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
    }

    private Drive Selected => _drives[_command[1] & 1];

    private bool HasDrive => (_command[1] & 2) == 0 && Selected.IsPresent;

    private bool IsNonDma => (_specify2 & 1) != 0;

    private byte Read(int port)
    {
        Transfer? submit = null;
        byte value;
        lock (_gate)
        {
            value = port switch
            {
                0 => (byte)(_interrupt ? 0x80 : 0),
                1 => (byte)(0xC0 | ((_dor & 1) << 5)),
                2 => _dor,
                3 => _tape,
                4 => ReadMainStatus(),
                5 => ReadFifo(ref submit),
                7 => (byte)(_drives[_dor & 1].IsChanged && (_dor & (0x10 << (_dor & 1))) != 0 ? 0x80 : 0),
                _ => 0xFF,
            };
        }

        submit?.Start();
        return value;
    }

    private void Write(int port, byte value)
    {
        Transfer? submit = null;
        lock (_gate)
        {
            switch (port)
            {
                case 2:
                    WriteDor(value);
                    break;
                case 3:
                    _tape = (byte)(value & 3);
                    break;
                case 4:
                    _rate = (byte)(value & 3);
                    if ((value & 0x80) != 0)
                    {
                        // Software reset, clears itself (§2.1.4).
                        ResetWhenIdle();
                    }

                    break;
                case 5:
                    submit = WriteFifo(value);
                    break;
                case 7:
                    _rate = (byte)(value & 3);
                    break;
                default:
                    break;
            }
        }

        submit?.Start();
    }

    private void WriteDor(byte value)
    {
        bool wasRunning = (_dor & DorNotReset) != 0;
        bool isRunning = (value & DorNotReset) != 0;
        _dor = value;
        if (!isRunning)
        {
            _interrupt = false;
            DriveInterrupt();
        }
        else if (!wasRunning)
        {
            ResetWhenIdle();
        }

        DriveInterrupt();
    }

    private void ResetWhenIdle()
    {
        if (_transfer is { IsUsed: true })
        {
            _isResetting = true;
            return;
        }

        SoftReset();
    }

    // §6.1: registers go to their defaults except those that LOCK keeps; then polling finds four drives that changed.
    private void SoftReset()
    {
        _phase = Phase.Command;
        _commandAt = 0;
        _commandLength = 0;
        _resultLength = 0;
        _resultAt = 0;
        _dataLength = 0;
        _dataAt = 0;
        _hasSeekStatus = false;
        if (!_isLocked)
        {
            _config = 0x20;
            _precompensation = 0;
        }

        _perpendicular &= 0xFC;
        bool isPolling = (_config & 0x10) == 0;
        _resetSenses = isPolling ? 4 : 0;
        if (isPolling)
        {
            RaiseInterrupt();
        }
    }

    private byte ReadMainStatus()
    {
        if ((_dor & DorNotReset) == 0 || _isResetting)
        {
            return 0;
        }

        return _phase switch
        {
            Phase.Command => (byte)(MsrRequest | (_commandAt > 0 ? MsrBusy : 0)),
            Phase.Result => MsrRequest | MsrToHost | MsrBusy,
            Phase.DataIn when IsNonDma => MsrRequest | MsrToHost | MsrNonDma | MsrBusy,
            Phase.DataOut when IsNonDma => MsrRequest | MsrNonDma | MsrBusy,
            _ => MsrBusy,
        };
    }

    private byte ReadFifo(ref Transfer? submit)
    {
        switch (_phase)
        {
            case Phase.Result:
                {
                    ClearInterrupt();
                    byte value = _result[_resultAt++];
                    if (_resultAt >= _resultLength)
                    {
                        _phase = Phase.Command;
                        _commandAt = 0;
                    }

                    return value;
                }

            case Phase.DataIn when IsNonDma:
                {
                    byte value = _data[_dataAt++];
                    if (_dataAt == _dataLength)
                    {
                        // Without DMA nobody signals terminal count: the transfer ends at the end of the track.
                        submit = EndRead(_dataAt, terminalCount: false);
                    }

                    return value;
                }

            default:
                return 0;
        }
    }

    private Transfer? WriteFifo(byte value)
    {
        if ((_dor & DorNotReset) == 0 || _isResetting)
        {
            return null;
        }

        if (_phase == Phase.DataOut && IsNonDma)
        {
            _data[_dataAt++] = value;
            return _dataAt == _dataLength ? EndWrite(terminalCount: false) : null;
        }

        if (_phase != Phase.Command)
        {
            return null;
        }

        if (_commandAt == 0)
        {
            _commandLength = LengthOf(value);
        }

        _command[_commandAt++] = value;
        if (_commandAt < _commandLength)
        {
            return null;
        }

        _commandAt = 0;
        return Execute();
    }

    // Bytes of a command, itself included (§5.1); unknown ones are one byte long.
    private static int LengthOf(byte code)
    {
        switch (code & 0x1F)
        {
            case 0x02 or 0x05 or 0x06 or 0x09 or 0x0C or 0x11 or 0x16 or 0x19 or 0x1D:
                return 9;
            case 0x0D:
                return 6;
            case 0x03 or 0x0F:
                return 3;
            case 0x04 or 0x07 or 0x0A or 0x12:
                return 2;
            case 0x13:
                return 4;
            default:
                return 1;
        }
    }

    private Transfer? Execute()
    {
        byte code = _command[0];
        switch (code & 0x1F)
        {
            case 0x06 or 0x0C:
                return BeginRead(isVerify: false, wholeTrack: false);
            case 0x02:
                return BeginRead(isVerify: false, wholeTrack: true);
            case 0x16:
                return BeginRead(isVerify: true, wholeTrack: false);
            case 0x05 or 0x09:
                return BeginWrite();
            case 0x0D:
                return BeginFormat();
            case 0x03:
                _specify1 = _command[1];
                _specify2 = _command[2];
                return null;
            case 0x04:
                return Answer(DriveStatus());
            case 0x07:
                return SeekTo(0, isRecalibrate: true);
            case 0x08:
                return SenseInterrupt();
            case 0x0A:
                return ReadId();
            case 0x0F:
                return Seek();
            case 0x0E when code == 0x0E:
                return Answer(
                    (byte)_drives[0].Track, (byte)_drives[1].Track, 0, 0, _specify1, _specify2, Selected.LastSector,
                    (byte)((_isLocked ? 0x80 : 0) | (_perpendicular & 0x7F)), _config, _precompensation);
            case 0x10 when code == 0x10:
                return Answer(0x90);
            case 0x12:
                _perpendicular = (byte)((_command[1] & 0x80) != 0 ? _command[1] & 0x3F : (_perpendicular & 0x3C) | (_command[1] & 3));
                return null;
            case 0x13:
                _config = _command[2];
                _precompensation = _command[3];
                return null;
            case 0x14 when (code & 0x7F) == 0x14:
                _isLocked = (code & 0x80) != 0;
                return Answer((byte)(_isLocked ? 0x10 : 0));
            default:
                // Invalid command, also the SCAN commands, which the 82077AA does not have (§5.2.8).
                return Answer(0x80);
        }
    }

    private Transfer? Answer(params ReadOnlySpan<byte> bytes)
    {
        bytes.CopyTo(_result);
        _resultLength = bytes.Length;
        _resultAt = 0;
        _phase = Phase.Result;
        return null;
    }

    // ST3 (§6.2.4).
    private byte DriveStatus()
    {
        Drive drive = Selected;
        int value = (_command[1] & 7) | 0x28;
        value |= HasDrive && drive.Track == 0 ? 0x10 : 0;
        value |= HasDrive && drive.IsWriteProtected ? 0x40 : 0;
        return (byte)value;
    }

    private Transfer? SenseInterrupt()
    {
        ClearInterrupt();
        if (_resetSenses > 0)
        {
            int drive = 4 - _resetSenses;
            _resetSenses--;
            byte track = drive < 2 ? (byte)_drives[drive].Track : (byte)0;
            return Answer((byte)(0xC0 | drive), track);
        }

        if (_hasSeekStatus)
        {
            _hasSeekStatus = false;
            return Answer(_seekStatus, (byte)_drives[_seekStatus & 1].Track);
        }

        return Answer(0x80);
    }

    // SEEK (0F) and RELATIVE SEEK (8F out, CF in).
    private Transfer? Seek()
    {
        int track = _command[2];
        if ((_command[0] & 0x80) != 0)
        {
            track = (_command[0] & 0x40) != 0 ? Selected.Track + track : Selected.Track - track;
        }

        return SeekTo(Math.Clamp(track, 0, 255), isRecalibrate: false);
    }

    private Transfer? SeekTo(int track, bool isRecalibrate)
    {
        int unit = _command[1] & 3;
        _seekStatus = (byte)(0x20 | (isRecalibrate ? unit : _command[1] & 7));
        if (HasDrive)
        {
            Selected.Step(track);
        }
        else if (isRecalibrate)
        {
            // No track 0 after 79 steps: equipment check (§5.2.5).
            _seekStatus |= 0x50;
        }

        _hasSeekStatus = true;
        _resetSenses = 0;
        RaiseInterrupt();
        return null;
    }

    private Transfer? ReadId()
    {
        Drive drive = Selected;
        if (!HasDrive || !drive.CanRead(_rate))
        {
            return Finish(0x40, 0x01, 0, (byte)drive.Track, (byte)((_command[1] >> 2) & 1), 1, 2);
        }

        // The disk turns: another sector passes the head each time.
        drive.LastSector = (byte)(drive.LastSector >= drive.Sectors ? 1 : drive.LastSector + 1);
        int head = (_command[1] >> 2) & 1;
        if (head >= drive.Heads)
        {
            return Finish(0x40, 0x01, 0, (byte)drive.Track, (byte)head, 1, 2);
        }

        return Finish(0, 0, 0, (byte)drive.Track, (byte)head, drive.LastSector, 2);
    }

    private Transfer? BeginRead(bool isVerify, bool wholeTrack)
    {
        if (Locate(wholeTrack, out long offset, out int bytes) is { } status)
        {
            return FinishBad(status);
        }

        _phase = Phase.Busy;
        _dataLength = bytes;
        _dataAt = 0;
        return NewTransfer(isVerify ? Purpose.Verify : Purpose.Read, BlockOperation.Read, offset, bytes);
    }

    private Transfer? BeginWrite()
    {
        if (Locate(wholeTrack: false, out _, out int bytes) is { } status)
        {
            return FinishBad(status);
        }

        if (Selected.IsWriteProtected)
        {
            return FinishBad((0x40, 0x02, 0));
        }

        _dataLength = bytes;
        _dataAt = 0;
        _phase = Phase.DataOut;
        if (IsNonDma)
        {
            RaiseInterrupt();
            return null;
        }

        return PullByDma();
    }

    private Transfer? PullByDma()
    {
        while (_dataAt < _dataLength && (_dor & DorDmaGate) != 0)
        {
            int got = _dma.FromMemory(_data.AsSpan(_dataAt, _dataLength - _dataAt), out bool terminalCount);
            _dataAt += got;
            if (terminalCount)
            {
                return EndWrite(terminalCount: true);
            }

            if (got == 0)
            {
                // Masked: goes on when the guest opens the channel.
                return null;
            }
        }

        return _dataAt == _dataLength ? EndWrite(terminalCount: false) : null;
    }

    private Transfer? EndWrite(bool terminalCount)
    {
        // A sector that was begun is filled up with zeroes (§5.2.3).
        int bytes = (_dataAt + 511) & ~511;
        _data.AsSpan(_dataAt, bytes - _dataAt).Clear();
        if (Locate(wholeTrack: false, out long offset, out int room) is { } status)
        {
            return FinishBad(status);
        }

        bytes = Math.Min(bytes, room);
        if (bytes == 0)
        {
            return FinishGood(0, terminalCount);
        }

        _phase = Phase.Busy;
        Transfer transfer = NewTransfer(Purpose.Write, BlockOperation.Write, offset, bytes);
        transfer.IsTerminalCount = terminalCount;
        return transfer;
    }

    private Transfer? PushByDma()
    {
        while (_dataAt < _dataLength && (_dor & DorDmaGate) != 0)
        {
            int put = _dma.ToMemory(_data.AsSpan(_dataAt, _dataLength - _dataAt), out bool terminalCount);
            _dataAt += put;
            if (terminalCount)
            {
                return EndRead(_dataAt, terminalCount: true);
            }

            if (put == 0)
            {
                return null;
            }
        }

        return _dataAt == _dataLength ? EndRead(_dataAt, terminalCount: false) : null;
    }

    private Transfer? EndRead(int bytes, bool terminalCount) => FinishGood((bytes + 511) / 512, terminalCount);

    // FORMAT TRACK: four bytes per sector (C, H, R, N); sectors are filled with the last byte of the command.
    private Transfer? BeginFormat()
    {
        Drive drive = Selected;
        int head = (_command[1] >> 2) & 1;
        if (!HasDrive || !drive.CanRead(_rate) || head >= drive.Heads || drive.Track >= drive.Tracks)
        {
            return FinishBad((0x40, 0x01, 0));
        }

        if (drive.IsWriteProtected)
        {
            return FinishBad((0x40, 0x02, 0));
        }

        // The identifiers are fetched, since the host waits for it, but the image has its layout already.
        byte[] identifiers = new byte[4 * Math.Max(1, (int)_command[3])];
        _ = _dma.FromMemory(identifiers, out _);
        int bytes = drive.Sectors * 512;
        _data.AsSpan(0, bytes).Fill(_command[5]);
        _phase = Phase.Busy;
        long offset = ((((long)drive.Track * drive.Heads) + head) * drive.Sectors) * 512;
        return NewTransfer(Purpose.Format, BlockOperation.Write, offset, bytes);
    }

    // Where the data of a read or write lies and how far it can go, or the status that says why not.
    private (byte St0, byte St1, byte St2)? Locate(bool wholeTrack, out long offset, out int bytes)
    {
        offset = 0;
        bytes = 0;
        Drive drive = Selected;
        int cylinder = _command[2];
        int head = _command[3];
        int sector = wholeTrack ? 1 : _command[4];
        int last = Math.Min((int)_command[6], drive.Sectors);
        bool isMultiTrack = (_command[0] & 0x80) != 0;
        if (!HasDrive || !drive.CanRead(_rate))
        {
            // No address mark passes the head.
            return (0x40, 0x01, 0);
        }

        if ((_config & 0x40) != 0)
        {
            drive.Step(cylinder);
        }

        if (drive.Track >= drive.Tracks || head > 1 || head >= drive.Heads || head != ((_command[1] >> 2) & 1))
        {
            return (0x40, 0x04, 0);
        }

        if (cylinder != drive.Track)
        {
            return (0x40, 0x04, 0x10);
        }

        if (sector == 0 || sector > last || _command[5] != 2)
        {
            return (0x40, 0x04, 0);
        }

        long first = ((((long)cylinder * drive.Heads) + head) * drive.Sectors) + sector - 1;
        offset = first * 512;
        int sectors = last - sector + 1;
        if (isMultiTrack && head == 0 && drive.Heads == 2 && last == drive.Sectors)
        {
            sectors += drive.Sectors;
        }


        // An image may be shorter than the disk that it stands for.
        bytes = (int)Math.Min(sectors * 512L, drive.Medium!.LengthBytes - offset);
        return bytes > 0 ? null : ((byte)0x40, (byte)0x04, (byte)0);
    }

    private Transfer? FinishBad((byte St0, byte St1, byte St2) status) => Finish(
        status.St0, status.St1, status.St2, _command[2], _command[3], _command[4], _command[5]);

    // The address after the last sector that was moved (§6.2, table 6-2).
    private Transfer? FinishGood(int sectors, bool terminalCount)
    {
        Drive drive = Selected;
        int cylinder = _command[2];
        int head = _command[3];
        int last = Math.Min((int)_command[6], drive.Sectors);
        bool isMultiTrack = (_command[0] & 0x80) != 0;
        int sector = _command[4] + sectors;
        if (isMultiTrack && head == 0 && sectors > last - _command[4] + 1)
        {
            head = 1;
            sector -= last;
        }

        drive.LastSector = (byte)Math.Clamp(sector - 1, 1, 255);
        if (sector > last)
        {
            sector = 1;
            if (isMultiTrack)
            {
                cylinder += head == 1 ? 1 : 0;
                head ^= 1;
            }
            else
            {
                cylinder++;
            }
        }

        // Running to the end of the track without terminal count is "end of cylinder".
        byte st0 = terminalCount ? (byte)0 : (byte)0x40;
        byte st1 = terminalCount ? (byte)0 : (byte)0x80;
        return Finish(st0, st1, 0, (byte)cylinder, (byte)head, (byte)sector, _command[5]);
    }

    private Transfer? Finish(byte st0, byte st1, byte st2, byte cylinder, byte head, byte sector, byte size)
    {
        st0 |= (byte)(_command[1] & 7);
        _ = Answer(st0, st1, st2, cylinder, head, sector, size);
        _dataLength = 0;
        _dataAt = 0;
        RaiseInterrupt();
        return null;
    }

    private Transfer NewTransfer(Purpose purpose, BlockOperation operation, long offset, int bytes)
    {
        Transfer transfer = _transfer is { IsUsed: false } free ? free : new Transfer(this);
        _transfer = transfer;
        transfer.IsUsed = true;
        transfer.IsAbandoned = false;
        transfer.IsTerminalCount = true;
        transfer.Purpose = purpose;
        transfer.Backend = Selected.Medium;
        transfer.Operation = operation;
        transfer.OffsetBytes = offset;
        transfer.LengthBytes = bytes;
        transfer.Buffer = _data.AsMemory(0, bytes);
        return transfer;
    }

    private void OnComplete(Transfer transfer, BlockStatus status)
    {
        lock (_gate)
        {
            transfer.IsUsed = false;
            if (transfer.IsAbandoned)
            {
                return;
            }

            if (_isResetting)
            {
                _isResetting = false;
                SoftReset();
                return;
            }

            if (status != BlockStatus.Ok)
            {
                // Data error in the data field; for writes "not writable" says best that it did not work.
                (byte, byte, byte) why = transfer.Operation == BlockOperation.Read
                    ? ((byte)0x40, (byte)0x20, (byte)0x20)
                    : ((byte)0x40, (byte)0x02, (byte)0);
                _ = FinishBad(why);
                return;
            }

            switch (transfer.Purpose)
            {
                case Purpose.Read:
                    _phase = Phase.DataIn;
                    if (IsNonDma)
                    {
                        RaiseInterrupt();
                    }
                    else
                    {
                        _ = PushByDma();
                    }

                    break;
                case Purpose.Verify:
                    // VERIFY with EC counts sectors; either way nothing moves and terminal count is not needed.
                    _ = FinishGood(_dataLength / 512, terminalCount: true);
                    break;
                case Purpose.Write:
                    _ = FinishGood((int)(transfer.LengthBytes / 512), transfer.IsTerminalCount);
                    break;
                default:
                    _ = Finish(0, 0, 0, (byte)Selected.Track, (byte)((_command[1] >> 2) & 1), 1, _command[2]);
                    break;
            }
        }
    }

    private void OnUnmasked()
    {
        Transfer? submit = null;
        lock (_gate)
        {
            if (!IsNonDma && _phase == Phase.DataIn)
            {
                submit = PushByDma();
            }
            else if (!IsNonDma && _phase == Phase.DataOut)
            {
                submit = PullByDma();
            }
        }

        submit?.Start();
    }

    private void RaiseInterrupt()
    {
        _interrupt = true;
        DriveInterrupt();
    }

    private void ClearInterrupt()
    {
        _interrupt = false;
        DriveInterrupt();
    }

    // The interrupt pin is driven while DMAGATE is on (§2.1.2).
    private void DriveInterrupt() => _irq.Set(_interrupt && (_dor & DorDmaGate) != 0);

    private enum Purpose
    {
        Read,
        Verify,
        Write,
        Format,
    }

    private sealed class Drive
    {
        private int _rateCode;

        public Drive(bool isPresent, IBlockBackend? medium)
        {
            IsPresent = isPresent;
            Kind = isPresent ? FloppyDriveKind.Inch3High : FloppyDriveKind.None;
            Insert(medium);
            if (medium is not null)
            {
                // The drive is one that fits the disk it is made with.
                Kind = MediumOf(medium.LengthBytes).Drive;
            }
        }

        public bool IsPresent { get; }

        public FloppyDriveKind Kind { get; }

        public IBlockBackend? Medium { get; private set; }

        public int Tracks { get; private set; }

        public int Heads { get; private set; } = 2;

        public int Sectors { get; private set; }

        public int Track { get; set; }

        public byte LastSector { get; set; }

        /// <summary>The disk change line: on until the head is stepped with a disk in the drive.</summary>
        public bool IsChanged { get; set; }

        public bool IsWriteProtected => Medium?.IsReadOnly ?? false;

        public void Insert(IBlockBackend? medium)
        {
            Medium = medium;
            IsChanged = true;
            LastSector = 0;
            Tracks = 0;
            Sectors = 0;
            if (medium is not null)
            {
                (_, Tracks, Heads, Sectors, _, _rateCode) = MediumOf(medium.LengthBytes);
            }
        }

        public void Step(int track)
        {
            Track = Math.Min(track, 83);
            if (Medium is not null)
            {
                IsChanged = false;
            }
        }

        // 300 and 250 kbit/s are the same recording at two speeds of rotation.
        public bool CanRead(int rate) =>
            Medium is not null && (rate == _rateCode || (rate is 1 or 2 && _rateCode is 1 or 2));

        private static (int Bytes, int Tracks, int Heads, int Sectors, FloppyDriveKind Drive, int Rate) MediumOf(long bytes)
        {
            foreach ((int Bytes, int Tracks, int Heads, int Sectors, FloppyDriveKind Drive, int Rate) entry in s_media)
            {
                if (entry.Bytes == bytes)
                {
                    return entry;
                }
            }

            // An image of another size: the smallest usual disk that holds it; what is missing cannot be read.
            return bytes <= 1440 << 10 ? s_media[6] : s_media[^1];
        }
    }

    private sealed class Transfer : BlockRequest
    {
        private readonly I82077 _owner;

        public Transfer(I82077 owner) => _owner = owner;

        public bool IsUsed { get; set; }

        public bool IsAbandoned { get; set; }

        public bool IsTerminalCount { get; set; }

        public Purpose Purpose { get; set; }

        public IBlockBackend? Backend { get; set; }

        public void Start()
        {
            if (Backend is { } backend)
            {
                backend.Submit(this);
            }
            else
            {
                Complete(BlockStatus.IoError);
            }
        }

        public override void Complete(BlockStatus status) => _owner.OnComplete(this, status);
    }

    private sealed class Window : IRegisterWindow
    {
        private readonly I82077 _owner;
        private readonly int _first;

        public Window(I82077 owner, int first, uint length)
        {
            _owner = owner;
            _first = first;
            Length = length;
        }

        public uint Length { get; }

        public ulong Read(uint offset, AccessWidth width)
        {
            ulong value = 0;
            for (int i = 0; i < (int)width; i++)
            {
                value |= (ulong)_owner.Read(_first + (int)offset + i) << (8 * i);
            }

            return value;
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            for (int i = 0; i < (int)width; i++)
            {
                _owner.Write(_first + (int)offset + i, (byte)(value >> (8 * i)));
            }
        }
    }
}

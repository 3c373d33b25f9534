// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Storage;

// Theory. One ATA channel of the PIIX3: two drives that share a cable, a task file, a data port and an interrupt, and
// the bus-master engine (PIIX3 data sheet 290550 §2.7; SFF-8038i).
//
// A command goes through these states, all visible in the Status register:
//
//   Idle --command--> (drive decodes) --> Idle with result            no data
//                                     --> Reading  BSY                back end fills the buffer
//                                     --> PioIn    DRQ                guest drains it block by block
//                                     --> PioOut   DRQ                guest fills it block by block
//                                     --> Writing  BSY                back end takes the buffer
//                                     --> DmaWait  BSY                until the engine is started
//                                     --> DmaBusy  BSY                back end works on guest RAM directly
//
// PIO goes through a buffer of 128 sectors, so that the back end sees requests of a useful size. The last block of a
// PIO write is acknowledged when the back end has taken it; with FUA, or the write cache off, when it is stable.
//
// A reset, or the guest stopping the engine, may come while the back end is at work on the guest's memory. Both take
// effect when the request has completed, and the drive is busy until then: nothing is written into RAM that the guest
// has taken back. Only a reset of the whole machine, which comes while everything is paused, forgets requests.
//
// Locks: _gate protects everything. Requests are submitted after it was left. The interrupt wire is driven under it.

/// <summary>One of the two channels of an IDE controller.</summary>
internal sealed class IdeChannel
{
    internal const int BufferBytes = 128 * 512;
    private const byte BusMasterStart = 1;
    private const byte BusMasterToMemory = 8;
    private const byte BusMasterActive = 1;
    private const byte BusMasterError = 2;
    private const byte BusMasterInterrupt = 4;

    private readonly Lock _gate = new();
    private readonly AtaDevice?[] _drives;
    private readonly AtaTaskFile[] _registers = [new(), new()];
    private readonly IIrqLine _irq;
    private readonly IDmaPort _dma;
    private readonly string _prefix;
    private byte[] _buffer = new byte[BufferBytes];
    private Transfer? _transfer;
    private Pending _pending;
    private bool _isStopping;
    private State _state;
    private AtaWork _work;
    private long _done;
    private int _at;
    private int _blockEnd;
    private int _filled;
    private byte _control;
    private byte _selected;
    private bool _interrupt;
    private byte _bmCommand;
    private byte _bmStatus;
    private uint _bmTable;
    private long _ignored;

    public IdeChannel(AtaDevice? first, AtaDevice? second, IIrqLine irq, IDmaPort dma, string prefix)
    {
        _drives = [first, second];
        _irq = irq;
        _dma = dma;
        _prefix = prefix;
        CommandBlock = new CommandWindow(this);
        ControlBlock = new ControlWindow(this);
    }

    private enum State : byte
    {
        Idle = 0,
        Reading = 1,
        PioIn = 2,
        PioOut = 3,
        Writing = 4,
        DmaWait = 5,
        DmaBusy = 6,
        PacketOut = 7,
        Backend = 8,
    }

    private enum Pending : byte
    {
        None,
        SoftReset,
        DeviceReset,
    }

    /// <summary>Eight ports at 1F0h or 170h.</summary>
    public IRegisterWindow CommandBlock { get; }

    /// <summary>The port at 3F6h or 376h.</summary>
    public IRegisterWindow ControlBlock { get; }

    /// <summary>The ports answer: the controller's decode is on.</summary>
    public bool IsDecoded { get; set; }

    /// <summary>Accesses that made no sense in the state that they came in.</summary>
    public long Ignored => Interlocked.Read(ref _ignored);

    private AtaDevice? Drive => _drives[_selected];

    private AtaTaskFile Registers => _registers[_selected];

    private bool IsBusy => _state is State.Reading or State.Writing or State.DmaWait or State.DmaBusy or State.Backend;

    public void Reset()
    {
        lock (_gate)
        {
            _control = 0;
            _bmCommand = 0;
            _bmStatus = 0;
            _bmTable = 0;
            foreach (AtaDevice? drive in _drives)
            {
                drive?.PowerOn();
            }

            Abandon();
            ResetDrives();
        }
    }

    /// <summary>Waits for the back ends. With the vCPUs stopped nothing new is submitted.</summary>
    public void Drain()
    {
        foreach (AtaDevice? drive in _drives)
        {
            drive?.Medium?.Drain();
        }
    }

    public void Save(StateWriter writer)
    {
        lock (_gate)
        {
            writer.Write(_prefix + "state", (ulong)_state);
            writer.Write(_prefix + "done", _done);
            writer.Write(_prefix + "at", (ulong)_at);
            writer.Write(_prefix + "end", (ulong)_blockEnd);
            writer.Write(_prefix + "filled", (ulong)_filled);
            writer.Write(_prefix + "control", _control);
            writer.Write(_prefix + "selected", _selected);
            writer.Write(_prefix + "interrupt", _interrupt);
            writer.Write(_prefix + "bm.command", _bmCommand);
            writer.Write(_prefix + "bm.status", _bmStatus);
            writer.Write(_prefix + "bm.table", _bmTable);
            writer.WriteBytes(_prefix + "buffer", _buffer.AsSpan(0, Math.Max(_filled, _blockEnd)));
            _work.Save(writer, _prefix + "work.");
            for (int i = 0; i < 2; i++)
            {
                _registers[i].Save(writer, $"{_prefix}{i}.");
                _drives[i]?.SaveDevice(writer, $"{_prefix}{i}.");
            }
        }
    }

    public void Load(StateReader reader)
    {
        lock (_gate)
        {
            Abandon();
            _state = (State)reader.ReadBounded(_prefix + "state", (ulong)State.Backend);
            _filled = (int)reader.ReadBounded(_prefix + "filled", BufferBytes);
            _blockEnd = (int)reader.ReadBounded(_prefix + "end", BufferBytes);
            _at = (int)reader.ReadBounded(_prefix + "at", (ulong)_blockEnd);
            _control = reader.ReadByte(_prefix + "control");
            _selected = (byte)reader.ReadBounded(_prefix + "selected", 1);
            _interrupt = reader.ReadBoolean(_prefix + "interrupt");
            _bmCommand = reader.ReadByte(_prefix + "bm.command");
            _bmStatus = reader.ReadByte(_prefix + "bm.status");
            _bmTable = reader.ReadUInt32(_prefix + "bm.table") & ~3u;
            reader.ReadBytes(_prefix + "buffer", _buffer.AsSpan(0, Math.Max(_filled, _blockEnd)));
            for (int i = 0; i < 2; i++)
            {
                _registers[i].Load(reader, $"{_prefix}{i}.");
                _drives[i]?.LoadDevice(reader, $"{_prefix}{i}.");
            }

            _work.Load(reader, _prefix + "work.", Drive?.Medium?.LengthBytes ?? 0);
            _done = (long)reader.ReadBounded(_prefix + "done", (ulong)_work.Length);

            // Nothing is in the hands of a back end in a saved state, and a drive that is gone cannot go on.
            bool isLost = _state is State.Reading or State.Writing or State.DmaBusy or State.Backend
                || (_state != State.Idle && Drive is null)
                || (_state == State.PioIn && _blockEnd > _filled)
                || (_state == State.PioOut && _done + _blockEnd > _work.Length)
                || (_state == State.PacketOut && _blockEnd != 12);
            if (isLost)
            {
                throw new StateException($"{reader.Section}.{_prefix}state: {_state} cannot be resumed");
            }

            DriveInterrupt();
        }
    }

    public byte ReadBusMaster(int offset)
    {
        lock (_gate)
        {
            return offset switch
            {
                0 => _bmCommand,
                2 => _bmStatus,
                >= 4 and < 8 => (byte)(_bmTable >> (8 * (offset - 4))),
                _ => 0,
            };
        }
    }

    public void WriteBusMaster(int offset, byte value)
    {
        Transfer? submit = null;
        lock (_gate)
        {
            switch (offset)
            {
                case 0:
                    submit = WriteBusMasterCommand(value);
                    break;
                case 2:
                    // Drive capable bits are plain storage, Interrupt and Error clear by one, Active is read-only.
                    _bmStatus = (byte)((_bmStatus & BusMasterActive)
                        | (value & 0x60) | (_bmStatus & ~value & (BusMasterInterrupt | BusMasterError)));
                    break;
                case >= 4 and < 8 when (_bmStatus & BusMasterActive) == 0 || _state != State.DmaBusy:
                    int shift = 8 * (offset - 4);
                    _bmTable = (_bmTable & ~(0xFFu << shift)) | ((uint)value << shift);
                    _bmTable &= ~3u;
                    break;
                default:
                    break;
            }
        }

        Submit(submit);
    }

    private Transfer? WriteBusMasterCommand(byte value)
    {
        bool wasStarted = (_bmCommand & BusMasterStart) != 0;
        bool isStarted = (value & BusMasterStart) != 0;
        _bmCommand = (byte)(value & (BusMasterStart | BusMasterToMemory));
        if (wasStarted && !isStarted)
        {
            // Stopping throws a transfer away (SFF-8038i §3.1); the drive still waits for its data. Active stays set
            // until the host's part is over.
            if (_state == State.DmaBusy)
            {
                _isStopping = true;
                return null;
            }

            _bmStatus &= unchecked((byte)~BusMasterActive);
            return null;
        }

        if (!wasStarted && isStarted)
        {
            _bmStatus |= BusMasterActive;
            if (_state == State.DmaWait)
            {
                return StartDma();
            }
        }

        return null;
    }

    private ulong ReadCommandBlock(uint offset, AccessWidth width)
    {
        if (!IsDecoded)
        {
            return ulong.MaxValue >> (64 - (8 * (int)width));
        }

        Transfer? submit = null;
        ulong value;
        lock (_gate)
        {
            if (offset == 0)
            {
                value = ReadData((int)width, ref submit);
            }
            else
            {
                value = 0;
                for (int i = 0; i < (int)width; i++)
                {
                    value |= (ulong)ReadRegister(offset + (uint)i) << (8 * i);
                }
            }
        }

        Submit(submit);
        return value;
    }

    private void WriteCommandBlock(uint offset, AccessWidth width, ulong value)
    {
        if (!IsDecoded)
        {
            return;
        }

        Transfer? submit = null;
        lock (_gate)
        {
            if (offset == 0)
            {
                submit = WriteData((int)width, value);
            }
            else
            {
                for (int i = 0; i < (int)width && submit is null; i++)
                {
                    submit = WriteRegister(offset + (uint)i, (byte)(value >> (8 * i)));
                }
            }
        }

        Submit(submit);
    }

    private byte ReadRegister(uint offset)
    {
        if (_drives[0] is null && _drives[1] is null)
        {
            // An empty cable: DD7 is pulled down, the rest floats high (ATA/ATAPI-7 vol. 2 table 5).
            return 0x7F;
        }

        AtaTaskFile registers = Registers;
        bool isHigh = (_control & 0x80) != 0;
        if (Drive is null)
        {
            // The other drive answers for the missing one, with a status of 0 (vol. 2 §9.16.1).
            registers = _registers[_selected ^ 1];
        }

        switch (offset)
        {
            case 1:
                return (byte)registers.Error;
            case 2:
                return isHigh ? registers.CountPrevious : registers.Count;
            case 3:
                return isHigh ? registers.LbaLowPrevious : registers.LbaLow;
            case 4:
                return isHigh ? registers.LbaMidPrevious : registers.LbaMid;
            case 5:
                return isHigh ? registers.LbaHighPrevious : registers.LbaHigh;
            case 6:
                return (byte)((Registers.Device & 0x4F) | 0xA0 | (_selected << 4));
            case 7:
                if (Drive is not null)
                {
                    _interrupt = false;
                    DriveInterrupt();
                }

                return ReadStatus();
            default:
                return 0xFF;
        }
    }

    private byte ReadStatus()
    {
        if (_drives[0] is null && _drives[1] is null)
        {
            return 0x7F;
        }

        if (Drive is null)
        {
            return 0;
        }

        if ((_control & 4) != 0 || _pending != Pending.None)
        {
            return (byte)AtaStatus.Busy;
        }

        AtaStatus status = Registers.Status & ~(AtaStatus.Busy | AtaStatus.DataRequest);
        if (IsBusy)
        {
            status |= AtaStatus.Busy;
        }
        else if (_state is State.PioIn or State.PioOut or State.PacketOut)
        {
            status |= AtaStatus.DataRequest;
        }

        return (byte)status;
    }

    private Transfer? WriteRegister(uint offset, byte value)
    {
        if (_pending != Pending.None || (IsBusy && !(offset == 7 && value == 0x08)))
        {
            // A busy drive does not take writes (vol. 2 §9.1), DEVICE RESET excepted.
            Interlocked.Increment(ref _ignored);
            return null;
        }

        if (offset != 7)
        {
            // Any write to the command block puts Count and LBA back to their lower halves.
            _control &= 0x7F;
            foreach (AtaTaskFile registers in _registers)
            {
                Latch(registers, offset, value);
            }

            if (offset == 6)
            {
                byte selected = (byte)((value >> 4) & 1);
                if (selected != _selected && (_state is State.PioIn or State.PioOut or State.PacketOut))
                {
                    // Turning to the other drive in the middle of a transfer ends it.
                    GoIdle();
                }

                _selected = selected;
                DriveInterrupt();
            }

            return null;
        }

        _control &= 0x7F;
        return Command(value);
    }

    private static void Latch(AtaTaskFile registers, uint offset, byte value)
    {
        switch (offset)
        {
            case 1:
                registers.FeaturesPrevious = registers.Features;
                registers.Features = value;
                break;
            case 2:
                registers.CountPrevious = registers.Count;
                registers.Count = value;
                break;
            case 3:
                registers.LbaLowPrevious = registers.LbaLow;
                registers.LbaLow = value;
                break;
            case 4:
                registers.LbaMidPrevious = registers.LbaMid;
                registers.LbaMid = value;
                break;
            case 5:
                registers.LbaHighPrevious = registers.LbaHigh;
                registers.LbaHigh = value;
                break;
            default:
                registers.Device = value;
                break;
        }
    }

    private Transfer? Command(byte command)
    {
        if (command == 0x90)
        {
            Diagnose();
            return null;
        }

        AtaDevice? drive = Drive;
        if (drive is null)
        {
            return null;
        }

        if (IsBusy)
        {
            // Only DEVICE RESET comes this far.
            if (drive.IsAtapi)
            {
                ResetWhenIdle(Pending.DeviceReset);
            }

            return null;
        }

        _state = State.Idle;
        _interrupt = false;
        DriveInterrupt();
        Registers.Command = command;
        AtaWork work = drive.Begin(Registers);
        if (command == 0x08 && drive.IsAtapi)
        {
            // DEVICE RESET ends without an interrupt (vol. 1 §6.10).
            GoIdle();
            return null;
        }

        return Begin(work, isFirst: true);
    }

    // EXECUTE DEVICE DIAGNOSTIC (vol. 1 §6.13): both drives; device 0 reports for both.
    private void Diagnose()
    {
        ResetDrives();
        _selected = 0;
        if (_drives[0] is not null || _drives[1] is not null)
        {
            RaiseInterrupt();
        }
    }

    // Under the gate.
    private void ResetWhenIdle(Pending kind)
    {
        if (_transfer is { IsUsed: true })
        {
            _pending = kind;
            return;
        }

        if (kind == Pending.SoftReset)
        {
            ResetDrives();
            return;
        }

        GoIdle();
        Drive!.SetSignature(Registers);
    }

    // Under the gate.
    private void ResetDrives()
    {
        GoIdle();
        _selected = 0;
        _interrupt = false;
        for (int i = 0; i < 2; i++)
        {
            AtaTaskFile registers = _registers[i];
            registers.Device = 0;
            registers.Features = 0;
            if (_drives[i] is { } drive)
            {
                drive.SoftReset();
                drive.SetSignature(registers);
            }
        }

        DriveInterrupt();
    }

    private Transfer? Begin(AtaWork work, bool isFirst)
    {
        _work = work;
        _done = 0;
        _filled = 0;
        _at = 0;
        _blockEnd = 0;
        switch (work.Phase)
        {
            case AtaPhase.Done:
                Finish();
                return null;
            case AtaPhase.Packet:
                // Interrupt reason: a command packet is to be written (vol. 1 §6.24).
                Registers.Count = 1;
                Registers.Status = AtaStatus.Ready;
                _state = State.PacketOut;
                _filled = 12;
                _blockEnd = 12;
                return null;
            case AtaPhase.Backend:
                _state = State.Backend;
                return NewTransfer(work.Operation, work.Offset, work.Length, default, null, work.ForceUnitAccess);
            default:
                break;
        }

        if (work.IsDma)
        {
            _state = State.DmaWait;
            return (_bmCommand & BusMasterStart) != 0 ? StartDma() : null;
        }

        if (work.Phase == AtaPhase.DataIn)
        {
            return Fill();
        }

        StartBlock(raise: !isFirst || work.IsPacket);
        return null;
    }

    // PIO in: gets the next part of the data into the buffer.
    private Transfer? Fill()
    {
        long left = _work.Length - _done;
        if (_work.Memory is { } memory)
        {
            _filled = (int)Math.Min(left, BufferBytes);
            memory.AsSpan((int)_done, _filled).CopyTo(_buffer);
            _done += _filled;
            _at = 0;
            StartBlock(raise: true);
            return null;
        }

        int whole = _work.BlockBytes >= BufferBytes ? BufferBytes : BufferBytes / _work.BlockBytes * _work.BlockBytes;
        whole &= ~511;
        int part = (int)Math.Min(left, whole);
        _state = State.Reading;
        return NewTransfer(BlockOperation.Read, _work.Offset + _done, part, _buffer.AsMemory(0, part), null, forced: false);
    }

    // The guest may move the next data request block.
    private void StartBlock(bool raise)
    {
        if (_work.Phase == AtaPhase.DataIn)
        {
            _state = State.PioIn;
            _blockEnd = Math.Min(_at + _work.BlockBytes, _filled);
        }
        else
        {
            _state = State.PioOut;
            int left = (int)Math.Min(_work.Length - _done - _filled, BufferBytes - _filled);
            _blockEnd = _at + Math.Min(_work.BlockBytes, left);
        }

        AtaTaskFile registers = Registers;
        registers.Status = AtaStatus.Ready | AtaStatus.SeekComplete;
        registers.Error = AtaError.None;
        if (_work.IsPacket)
        {
            // Byte count of this block, and its direction (vol. 1 §6.24.6.2).
            int bytes = _blockEnd - _at;
            registers.LbaMid = (byte)bytes;
            registers.LbaHigh = (byte)(bytes >> 8);
            registers.Count = _work.Phase == AtaPhase.DataIn ? (byte)2 : (byte)0;
        }

        if (raise)
        {
            RaiseInterrupt();
        }
    }

    private ulong ReadData(int width, ref Transfer? submit)
    {
        if (_state != State.PioIn)
        {
            Interlocked.Increment(ref _ignored);
            return ulong.MaxValue >> (64 - (8 * width));
        }

        ulong value = 0;
        int take = Math.Min(width, _blockEnd - _at);
        for (int i = 0; i < take; i++)
        {
            value |= (ulong)_buffer[_at + i] << (8 * i);
        }

        _at += take;
        if (_at < _blockEnd)
        {
            return value;
        }

        if (_at < _filled)
        {
            StartBlock(raise: true);
        }
        else if (_done < _work.Length)
        {
            submit = Fill();
        }
        else if (_work.IsPacket)
        {
            submit = Conclude(BlockStatus.Ok);
        }
        else
        {
            // The last block of a PIO read ends without an interrupt (vol. 3 §11.4).
            _ = Drive!.Complete(Registers, _work, BlockStatus.Ok);
            GoIdle();
        }

        return value;
    }

    private Transfer? WriteData(int width, ulong value)
    {
        if (_state is not (State.PioOut or State.PacketOut))
        {
            Interlocked.Increment(ref _ignored);
            return null;
        }

        int take = Math.Min(width, _blockEnd - _at);
        for (int i = 0; i < take; i++)
        {
            _buffer[_at + i] = (byte)(value >> (8 * i));
        }

        _at += take;
        if (_at < _blockEnd)
        {
            return null;
        }

        if (_state == State.PacketOut)
        {
            return Begin(Drive!.BeginPacket(_buffer.AsSpan(0, 12), Registers), isFirst: false);
        }

        _filled = _at;
        bool isAll = _done + _filled >= _work.Length;
        if (_work.Memory is { } memory)
        {
            _buffer.AsSpan(0, _filled).CopyTo(memory.AsSpan((int)_done));
            _done += _filled;
            _at = 0;
            _filled = 0;
            if (isAll)
            {
                return Conclude(BlockStatus.Ok);
            }
        }
        else if (isAll || _filled + _work.BlockBytes > BufferBytes)
        {
            _state = State.Writing;
            return NewTransfer(
                BlockOperation.Write, _work.Offset + _done, _filled, _buffer.AsMemory(0, _filled), null, _work.ForceUnitAccess);
        }

        StartBlock(raise: true);
        return null;
    }

    // Reads the PRD table (SFF-8038i §1.2) and starts the transfer. BSY stays on if the table is too short: only a
    // reset helps then, as on the chip.
    private Transfer? StartDma()
    {
        var list = new ScatterList();
        uint at = _bmTable;
        Span<byte> raw = stackalloc byte[8];
        long wanted = _work.Length;

        // A table does not cross 64 KiB, so it has at most 8192 entries.
        for (int i = 0; i < 8192 && list.Length < wanted; i++)
        {
            if (!_dma.TryRead(at, raw))
            {
                return FailDma();
            }

            uint address = BinaryPrimitives.ReadUInt32LittleEndian(raw) & ~1u;
            uint count = BinaryPrimitives.ReadUInt32LittleEndian(raw[4..]);
            int length = (int)(count & 0xFFFE);
            if (!list.TryAdd(address, length == 0 ? 65536 : length))
            {
                return FailDma();
            }

            if ((count & 0x8000_0000) != 0)
            {
                break;
            }

            at = (at & 0xFFFF_0000) | ((at + 8) & 0xFFFF);
        }

        if (list.Length < wanted)
        {
            // Interrupt 0, Active 0: the table described less than the drive wants (SFF-8038i §3.1).
            _bmStatus &= unchecked((byte)~BusMasterActive);
            return null;
        }

        bool isLonger = list.Length > wanted;
        list.Trim(wanted);
        bool toMemory = _work.Phase == AtaPhase.DataIn;
        if (((_bmCommand & BusMasterToMemory) != 0) != toMemory)
        {
            return FailDma();
        }

        if (_work.Memory is { } memory)
        {
            Span<byte> data = memory.AsSpan(0, (int)_work.Length);
            bool moved = toMemory ? list.TryScatter(_dma, data) : list.TryGather(_dma, data);
            if (!moved)
            {
                return FailDma();
            }

            EndDma(isLonger);
            return Conclude(BlockStatus.Ok);
        }

        if (!list.TryResolve(_dma, toMemory))
        {
            return FailDma();
        }

        _state = State.DmaBusy;
        Transfer transfer = NewTransfer(
            _work.Operation, _work.Offset, _work.Length, default, list, _work.ForceUnitAccess);
        transfer.IsLonger = isLonger;
        return transfer;
    }

    private Transfer? FailDma()
    {
        _bmStatus = (byte)((_bmStatus & ~BusMasterActive) | BusMasterError);
        return Conclude(BlockStatus.IoError);
    }

    // Active stays set when the table described more than was moved.
    private void EndDma(bool isLonger)
    {
        if (!isLonger)
        {
            _bmStatus &= unchecked((byte)~BusMasterActive);
        }
    }

    private Transfer? Conclude(BlockStatus status)
    {
        AtaWork next = Drive is { } drive ? drive.Complete(Registers, _work, status) : AtaWork.Done;
        return Begin(next, isFirst: false);
    }

    private void Finish()
    {
        GoIdle();
        RaiseInterrupt();
    }

    private void GoIdle()
    {
        _state = State.Idle;
        _work = default;
        _done = 0;
        _at = 0;
        _filled = 0;
        _blockEnd = 0;
    }

    private void RaiseInterrupt()
    {
        _interrupt = true;
        if ((_control & 2) == 0)
        {
            _bmStatus |= BusMasterInterrupt;
        }

        DriveInterrupt();
    }

    private void DriveInterrupt() => _irq.Set(_interrupt && (_control & 2) == 0);

    private Transfer NewTransfer(
        BlockOperation operation, long offset, long length, Memory<byte> buffer, ScatterList? list, bool forced)
    {
        Transfer transfer = _transfer is { IsUsed: false } free ? free : new Transfer(this);
        _transfer = transfer;
        transfer.IsUsed = true;
        transfer.IsAbandoned = false;
        transfer.IsLonger = false;
        transfer.List = list;
        transfer.Backend = Drive?.Medium;
        transfer.Operation = operation;
        transfer.OffsetBytes = offset;
        transfer.LengthBytes = length;
        transfer.ForceUnitAccess = forced;
        transfer.MayUnmap = operation == BlockOperation.Discard;
        transfer.Buffer = buffer;
        transfer.Slices = list?.Slices ?? [];
        transfer.SliceCount = list?.SliceCount ?? 0;
        return transfer;
    }

    // The machine is reset or loaded: what is under way (nothing, if it was paused) belongs to another life.
    private void Abandon()
    {
        _pending = Pending.None;
        _isStopping = false;
        if (_transfer is { IsUsed: true } transfer)
        {
            transfer.IsAbandoned = true;
            _transfer = null;
            _buffer = new byte[BufferBytes];
        }
    }

    private static void Submit(Transfer? transfer)
    {
        if (transfer is not null)
        {
            StorageSubmission submit = default;
            submit.Add(transfer);
            submit.Start();
        }
    }

    // The request that follows, to be started by the caller.
    private Transfer? Take(Transfer transfer, BlockStatus status)
    {
        lock (_gate)
        {
            if (transfer.List is { } list && transfer.Operation == BlockOperation.Read)
            {
                list.MarkWritten(_dma);
            }

            transfer.IsUsed = false;
            if (transfer.IsAbandoned)
            {
                return null;
            }

            if (_pending != Pending.None)
            {
                Pending kind = _pending;
                _pending = Pending.None;
                _isStopping = false;
                _bmStatus &= unchecked((byte)~BusMasterActive);
                ResetWhenIdle(kind);
                return null;
            }

            if (_isStopping)
            {
                _isStopping = false;
                _state = State.DmaWait;
                bool isStarted = (_bmCommand & BusMasterStart) != 0;
                _bmStatus &= isStarted ? (byte)0xFF : unchecked((byte)~BusMasterActive);
                return isStarted ? StartDma() : null;
            }

            return Advance(transfer, status);
        }
    }

    private Transfer? Advance(Transfer transfer, BlockStatus status)
    {
        if (status != BlockStatus.Ok && _state != State.DmaBusy)
        {
            // The address of the failure: the part that was under way.
            _work.Offset += _work.Memory is null ? _done : 0;
            return Conclude(status);
        }

        switch (_state)
        {
            case State.Reading:
                _filled = (int)transfer.LengthBytes;
                _done += _filled;
                _at = 0;
                StartBlock(raise: true);
                return null;
            case State.Writing:
                _done += _filled;
                _filled = 0;
                _at = 0;
                if (_done < _work.Length)
                {
                    StartBlock(raise: true);
                    return null;
                }

                return Conclude(BlockStatus.Ok);
            case State.DmaBusy:
                EndDma(transfer.IsLonger);
                return Conclude(status);
            default:
                return Conclude(status);
        }
    }

    private ulong ReadControlBlock()
    {
        if (!IsDecoded)
        {
            return 0xFF;
        }

        lock (_gate)
        {
            return ReadStatus();
        }
    }

    // Device Control (vol. 1 §5.8): HOB, SRST, nIEN.
    private void WriteControlBlock(byte value)
    {
        if (!IsDecoded)
        {
            return;
        }

        lock (_gate)
        {
            bool wasReset = (_control & 4) != 0;
            bool isReset = (value & 4) != 0;
            _control = (byte)(value & 0x86);
            if (wasReset != isReset)
            {
                ResetWhenIdle(Pending.SoftReset);
            }

            DriveInterrupt();
        }
    }

    private sealed class Transfer : StorageRequest
    {
        private readonly IdeChannel _owner;

        public Transfer(IdeChannel owner) => _owner = owner;

        public bool IsUsed { get; set; }

        public bool IsAbandoned { get; set; }

        public bool IsLonger { get; set; }

        public ScatterList? List { get; set; }

        protected override void Take(BlockStatus status, ref StorageSubmission submit)
        {
            if (_owner.Take(this, status) is { } next)
            {
                submit.Add(next);
            }
        }
    }

    private sealed class CommandWindow : IRegisterWindow
    {
        private readonly IdeChannel _owner;

        public CommandWindow(IdeChannel owner) => _owner = owner;

        public uint Length => 8;

        public ulong Read(uint offset, AccessWidth width) => _owner.ReadCommandBlock(offset, width);

        public void Write(uint offset, AccessWidth width, ulong value) => _owner.WriteCommandBlock(offset, width, value);
    }

    private sealed class ControlWindow : IRegisterWindow
    {
        private readonly IdeChannel _owner;

        public ControlWindow(IdeChannel owner) => _owner = owner;

        public uint Length => 1;

        public ulong Read(uint offset, AccessWidth width) => _owner.ReadControlBlock();

        public void Write(uint offset, AccessWidth width, ulong value) => _owner.WriteControlBlock((byte)value);
    }
}

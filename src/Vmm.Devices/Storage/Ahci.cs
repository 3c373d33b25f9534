// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Pci;

namespace Vmm.Devices.Storage;

// Theory. A SATA host adapter (Serial ATA AHCI 1.3.1): up to six ports, each with a disk or CD-ROM of its own, 32 command
// slots, native command queuing. A command is a header in a list in guest memory, which points to a table with a
// register FIS (the task file), a command packet and a scatter list; results come back as FISes in another area.
//
// The devices are the same AtaDevice objects as behind the PIIX3. A port fetches a command when it is issued: everything
// is copied out of guest memory once and then checked. Commands that are not queued run one at a time, in slot order;
// queued ones (READ and WRITE FPDMA) run all at once, each with a request of its own, and end in any order.
//
// Stopping. Clearing PxCMD.ST, a COMRESET or a reset of the adapter may come while the back ends work on guest memory.
// Each takes effect when the last request has ended: until then PxCMD.CR stays set, the link stays down, or GHC.HR stays
// set, which the specification provides for (§10.3.2, §10.4.2, §10.4.3).
//
// An error stops the port as the specification asks (§6.2.2): nothing is fetched until software has cleared ST.
//
// Locks: one gate for the adapter. Requests are submitted after it was left; interrupts are driven under it.

/// <summary>An AHCI controller.</summary>
public sealed class Ahci : PciFunction
{
    /// <summary>Most ports.</summary>
    public const int MaxPorts = 6;

    internal const int Slots = 32;
    private const uint GhcReset = 1;
    private const uint GhcInterrupts = 2;
    private const uint GhcAhci = 0x8000_0000;

    private readonly Lock _gate = new();
    private readonly AhciPort[] _ports;
    private uint _control = GhcAhci;
    private uint _interrupts;
    private bool _isResetting;
    private bool _line;

    /// <summary>Makes a controller.</summary>
    /// <param name="id">See <see cref="IDevice.Id"/>.</param>
    /// <param name="drives">One for each port, at most six; null where nothing is plugged in.</param>
    public Ahci(string id, params AtaDevice?[] drives)
        : base(id, new PciIdentity(0x8086, 0x2922, 0x01_06_01, 0x02, 0x1AF4, 0x1100))
    {
        ArgumentNullException.ThrowIfNull(drives);
        if (drives.Length is 0 or > MaxPorts)
        {
            throw new ArgumentException("between one and six ports", nameof(drives));
        }

        _ports = new AhciPort[drives.Length];
        for (int i = 0; i < drives.Length; i++)
        {
            _ports[i] = new AhciPort(this, i, drives[i], Dma);
        }

        UseIntx();
        _ = UseMsi();
        AddBar(5, PciBarKind.Memory32, new Window(this));
    }

    /// <inheritdoc/>
    public override int StateVersion => 1;

    /// <summary>Commands that made no sense.</summary>
    public long BadCommands { get; internal set; }

    internal Lock Gate => _gate;

    // Capabilities (§3.1.1): 64-bit addresses, queuing, 32 slots, command list override, 3 Gbit/s, AHCI only.
    private uint Capabilities => 0x8000_0000 | 0x4000_0000 | (1u << 24) | (2u << 20) | (1u << 18)
        | (31u << 8) | (uint)(_ports.Length - 1);

    /// <inheritdoc/>
    public override void Pause()
    {
        // With the vCPUs stopped nothing new is issued; a completion may start the next command, which Drain sees.
        foreach (AhciPort port in _ports)
        {
            port.Drain();
        }
    }

    /// <inheritdoc/>
    protected override void ResetCard()
    {
        lock (_gate)
        {
            foreach (AhciPort port in _ports)
            {
                port.Abandon();
                port.Drive?.PowerOn();
            }

            ResetAdapter();
        }
    }

    /// <inheritdoc/>
    protected override void SaveCard(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_gate)
        {
            writer.Write("control", _control);
            writer.Write("interrupts", _interrupts);
            foreach (AhciPort port in _ports)
            {
                port.Save(writer);
            }
        }
    }

    /// <inheritdoc/>
    protected override void LoadCard(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_gate)
        {
            _control = (reader.ReadUInt32("control") & GhcInterrupts) | GhcAhci;
            _interrupts = reader.ReadUInt32("interrupts");
            _isResetting = false;
            foreach (AhciPort port in _ports)
            {
                port.Abandon();
                port.Load(reader);
            }

            _line = false;
            UpdateInterrupt();
        }
    }

    // Under the gate: a port has something to say, or has nothing more to do.
    internal void PortInterrupt(int port)
    {
        _interrupts |= 1u << port;
        UpdateInterrupt();
    }

    internal void PortIdle()
    {
        if (_isResetting && !Array.Exists(_ports, port => port.IsWorking))
        {
            ResetAdapter();
        }
    }

    internal void UpdateInterrupt()
    {
        bool isOn = (_control & GhcInterrupts) != 0 && _interrupts != 0;
        if (isOn && !_line)
        {
            Msi?.Send();
        }

        _line = isOn;
        Intx.Set(isOn);
    }

    // Under the gate (§10.4.3).
    private void ResetAdapter()
    {
        _isResetting = false;
        _control = GhcAhci;
        _interrupts = 0;
        foreach (AhciPort port in _ports)
        {
            port.Reset();
        }

        _interrupts = 0;
        UpdateInterrupt();
    }

    private uint ReadRegister(uint offset)
    {
        if (offset >= 0x100)
        {
            uint port = (offset - 0x100) >> 7;
            return port < _ports.Length ? _ports[port].Read(offset & 0x7C) : 0;
        }

        return offset switch
        {
            0x00 => Capabilities,
            0x04 => _control | (_isResetting ? GhcReset : 0),
            0x08 => _interrupts,
            0x0C => (1u << _ports.Length) - 1,
            0x10 => 0x0001_0301,
            _ => 0,
        };
    }

    private void WriteRegister(uint offset, uint value, ref StorageSubmission submit)
    {
        if (offset >= 0x100)
        {
            uint port = (offset - 0x100) >> 7;
            if (port < _ports.Length && !_isResetting)
            {
                _ports[port].Write(offset & 0x7C, value, ref submit);
            }

            return;
        }

        switch (offset)
        {
            case 0x04 when (value & GhcReset) != 0:
                _isResetting = true;
                PortIdle();
                break;
            case 0x04:
                bool wasOn = (_control & GhcInterrupts) != 0;
                _control = (value & GhcInterrupts) | GhcAhci;
                _line &= wasOn;
                UpdateInterrupt();
                break;
            case 0x08:
                _interrupts &= ~value;

                // A port whose own status is still set asserts again (§5.6.2); a new message follows from that.
                foreach (AhciPort port in _ports)
                {
                    if (port.WantsInterrupt)
                    {
                        _interrupts |= 1u << port.Number;
                    }
                }

                _line = false;
                UpdateInterrupt();
                break;
            default:
                break;
        }
    }

    private sealed class Window : IRegisterWindow
    {
        private readonly Ahci _owner;

        public Window(Ahci owner) => _owner = owner;

        public uint Length => 0x100 + (MaxPorts * 0x80);

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_owner._gate)
            {
                ulong value = _owner.ReadRegister(offset & ~3u);
                if ((int)width + (offset & 3) > 4)
                {
                    value |= (ulong)_owner.ReadRegister((offset & ~3u) + 4) << 32;
                }

                value >>= (int)(8 * (offset & 3));
                return width == AccessWidth.Qword ? value : value & ((1UL << (8 * (int)width)) - 1);
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            StorageSubmission submit = default;
            lock (_owner._gate)
            {
                if (width == AccessWidth.Qword && (offset & 3) == 0)
                {
                    _owner.WriteRegister(offset, (uint)value, ref submit);
                    _owner.WriteRegister(offset + 4, (uint)(value >> 32), ref submit);
                }
                else if (width == AccessWidth.Dword && (offset & 3) == 0)
                {
                    _owner.WriteRegister(offset, (uint)value, ref submit);
                }

                // Registers are accessed whole (§3); parts are ignored.
            }

            submit.Start();
        }
    }
}

/// <summary>A command slot's request.</summary>
internal sealed class AhciTransfer : StorageRequest
{
    private readonly AhciPort _port;

    public AhciTransfer(AhciPort port, int slot)
    {
        _port = port;
        Slot = slot;
    }

    public int Slot { get; }

    public bool IsUsed { get; set; }

    public bool IsAbandoned { get; set; }

    public bool IsQueued { get; set; }

    public ScatterList List { get; } = new();

    public AtaWork Work { get; set; }

    protected override void Take(BlockStatus status, ref StorageSubmission submit) => _port.Take(this, status, ref submit);
}

/// <summary>One port of an AHCI controller. Everything under the controller's gate.</summary>
internal sealed class AhciPort
{
    private const uint CmdStart = 1 << 0;
    private const uint CmdSpinUp = 1 << 1;
    private const uint CmdPower = 1 << 2;
    private const uint CmdOverride = 1 << 3;
    private const uint CmdReceive = 1 << 4;
    private const uint CmdReceiveRunning = 1 << 14;
    private const uint CmdListRunning = 1 << 15;
    private const uint CmdAtapi = 1 << 24;
    private const uint IsRegisterFis = 1 << 0;
    private const uint IsPioSetup = 1 << 1;
    private const uint IsDeviceBits = 1 << 3;
    private const uint IsConnect = 1 << 6;
    private const uint IsOverflow = 1 << 24;
    private const uint IsHostBusData = 1 << 28;
    private const uint IsTaskFileError = 1 << 30;
    private const uint InterruptMask = 0xFDC0_00FF;

    private readonly Ahci _owner;
    private readonly IDmaPort _dma;
    private readonly AtaTaskFile _registers = new();
    private readonly AhciTransfer?[] _transfers = new AhciTransfer?[Ahci.Slots];
    private readonly byte[] _queueError = new byte[512];
    private ulong _listBase;
    private ulong _fisBase;
    private uint _status;
    private uint _enable;
    private uint _command;
    private uint _signature = 0xFFFF_FFFF;
    private uint _linkStatus;
    private uint _linkControl;
    private uint _linkError;
    private uint _active;
    private uint _issued;
    private uint _running;
    private int _current = -1;
    private bool _isHalted;
    private bool _isLinkReset;
    private bool _inSoftReset;

    public AhciPort(Ahci owner, int number, AtaDevice? drive, IDmaPort dma)
    {
        _owner = owner;
        Number = number;
        Drive = drive;
        _dma = dma;
        if (drive is not null)
        {
            drive.IsSerialAta = true;
        }
    }

    public int Number { get; }

    public AtaDevice? Drive { get; }

    /// <summary>A back end works for this port.</summary>
    public bool IsWorking => _running != 0;

    public bool WantsInterrupt => (_status & _enable) != 0;

    public void Drain() => Drive?.Medium?.Drain();

    /// <summary>Reset of the adapter: nothing is running.</summary>
    public void Reset()
    {
        _listBase = 0;
        _fisBase = 0;
        _status = 0;
        _enable = 0;
        _command = CmdSpinUp | CmdPower | (Drive is { IsAtapi: true } ? CmdAtapi : 0);
        _linkControl = 0;
        _linkError = 0;
        ClearCommands();
        Connect();
    }

    /// <summary>The machine is reset or loaded: forget what back ends still hold.</summary>
    public void Abandon()
    {
        for (int i = 0; i < _transfers.Length; i++)
        {
            if (_transfers[i] is { IsUsed: true } transfer)
            {
                transfer.IsAbandoned = true;
                _transfers[i] = null;
            }
        }

        _running = 0;
        _current = -1;
        _isLinkReset = false;
    }

    public void Save(StateWriter writer)
    {
        string p = $"port{Number}.";
        writer.Write(p + "list", _listBase);
        writer.Write(p + "fis", _fisBase);
        writer.Write(p + "status", _status);
        writer.Write(p + "enable", _enable);
        writer.Write(p + "command", _command);
        writer.Write(p + "signature", _signature);
        writer.Write(p + "link", _linkStatus);
        writer.Write(p + "linkControl", _linkControl);
        writer.Write(p + "linkError", _linkError);
        writer.Write(p + "active", _active);
        writer.Write(p + "issued", _issued);
        writer.Write(p + "halted", _isHalted);
        writer.Write(p + "reset", _inSoftReset);
        writer.WriteBytes(p + "queueError", _queueError);
        _registers.Save(writer, p);
        Drive?.SaveDevice(writer, p + "drive.");
    }

    public void Load(StateReader reader)
    {
        string p = $"port{Number}.";
        _listBase = reader.ReadUInt64(p + "list") & ~0x3FFUL;
        _fisBase = reader.ReadUInt64(p + "fis") & ~0xFFUL;
        _status = reader.ReadUInt32(p + "status");
        _enable = reader.ReadUInt32(p + "enable") & InterruptMask;
        _command = reader.ReadUInt32(p + "command");
        _signature = reader.ReadUInt32(p + "signature");
        _linkStatus = reader.ReadUInt32(p + "link");
        _linkControl = reader.ReadUInt32(p + "linkControl");
        _linkError = reader.ReadUInt32(p + "linkError");
        _active = reader.ReadUInt32(p + "active");
        _issued = reader.ReadUInt32(p + "issued");
        _isHalted = reader.ReadBoolean(p + "halted");
        _inSoftReset = reader.ReadBoolean(p + "reset");
        reader.ReadBytes(p + "queueError", _queueError);
        _registers.Load(reader, p);
        Drive?.LoadDevice(reader, p + "drive.");
    }

    public uint Read(uint offset) => offset switch
    {
        0x00 => (uint)_listBase,
        0x04 => (uint)(_listBase >> 32),
        0x08 => (uint)_fisBase,
        0x0C => (uint)(_fisBase >> 32),
        0x10 => _status,
        0x14 => _enable,
        0x18 => ReadCommand(),
        0x20 => ReadTaskFile(),
        0x24 => _signature,
        0x28 => _linkStatus,
        0x2C => _linkControl,
        0x30 => _linkError,
        0x34 => _active,
        0x38 => _issued,
        _ => 0,
    };

    public void Write(uint offset, uint value, ref StorageSubmission submit)
    {
        switch (offset)
        {
            case 0x00:
                _listBase = (_listBase & 0xFFFF_FFFF_0000_0000) | (value & ~0x3FFu);
                break;
            case 0x04:
                _listBase = (_listBase & 0xFFFF_FFFF) | ((ulong)value << 32);
                break;
            case 0x08:
                _fisBase = (_fisBase & 0xFFFF_FFFF_0000_0000) | (value & ~0xFFu);
                break;
            case 0x0C:
                _fisBase = (_fisBase & 0xFFFF_FFFF) | ((ulong)value << 32);
                break;
            case 0x10:
                _status &= ~value;
                break;
            case 0x14:
                _enable = value & InterruptMask;
                if (WantsInterrupt)
                {
                    _owner.PortInterrupt(Number);
                }

                break;
            case 0x18:
                WriteCommand(value, ref submit);
                break;
            case 0x2C:
                WriteLinkControl(value);
                break;
            case 0x30:
                _linkError &= ~value;
                if ((_linkError & (1u << 26)) == 0)
                {
                    _status &= ~IsConnect;
                }

                break;
            case 0x34:
                // Bits can only be set, and only while the list runs (§3.3.13).
                _active |= (_command & CmdStart) != 0 ? value : 0;
                break;
            case 0x38:
                if ((_command & CmdStart) != 0)
                {
                    _issued |= value;
                    Fetch(ref submit);
                }

                break;
            default:
                break;
        }
    }

    public void Take(AhciTransfer transfer, BlockStatus status, ref StorageSubmission submit)
    {
        lock (_owner.Gate)
        {
            if (transfer.Operation == BlockOperation.Read)
            {
                transfer.List.MarkWritten(_dma);
            }

            transfer.IsUsed = false;
            if (transfer.IsAbandoned)
            {
                return;
            }

            _running &= ~(1u << transfer.Slot);
            bool isOver = _isLinkReset || (_command & CmdStart) == 0;
            if (!isOver && transfer.IsQueued)
            {
                EndQueued(transfer, status);
            }
            else if (!isOver)
            {
                EndOrContinue(transfer, status, ref submit);
            }

            Settle(ref submit);
        }
    }

    private uint ReadCommand()
    {
        uint value = _command;
        value |= (_command & CmdReceive) != 0 ? CmdReceiveRunning : 0;
        value |= (_command & CmdStart) != 0 || IsWorking ? CmdListRunning : 0;
        return value | (uint)(_current < 0 ? 0 : _current << 8);
    }

    private uint ReadTaskFile()
    {
        if (Drive is null || (_linkStatus & 0xF) != 3)
        {
            return 0x7F;
        }

        AtaStatus status = _registers.Status;
        if (_current >= 0 && !_isHalted)
        {
            status |= AtaStatus.Busy;
        }

        return ((uint)_registers.Error << 8) | (uint)status;
    }

    private void WriteCommand(uint value, ref StorageSubmission submit)
    {
        const uint writable = CmdStart | CmdReceive | CmdSpinUp | CmdPower | CmdAtapi | 0x0E00_0000;
        uint before = _command;
        _command = (_command & ~writable) | (value & writable) | CmdSpinUp | CmdPower;
        if ((value & CmdOverride) != 0 && (before & CmdStart) == 0)
        {
            // Command list override: the drive is taken to be ready (§3.3.7).
            _registers.Status &= ~(AtaStatus.Busy | AtaStatus.DataRequest);
        }

        if ((before & CmdReceive) == 0 && (_command & CmdReceive) != 0 && Drive is not null && _linkStatus != 0)
        {
            // The signature that came before there was a place for it.
            PostRegisterFis(raise: false);
        }

        if ((before & CmdStart) != 0 && (_command & CmdStart) == 0 && !IsWorking)
        {
            ClearCommands();
        }
        else if ((before & CmdStart) == 0 && (_command & CmdStart) != 0)
        {
            _isHalted = false;
            Fetch(ref submit);
        }
    }

    // PxSCTL.DET: 1 holds the link in COMRESET, the way back to 0 brings it up (§10.4.2); 4 switches the port off.
    private void WriteLinkControl(uint value)
    {
        uint before = _linkControl & 0xF;
        uint now = value & 0xF;
        _linkControl = value & 0xFFF;
        if (before == now || (_command & CmdStart) != 0)
        {
            return;
        }

        if (now is 1 or 4)
        {
            _linkStatus = 0;
            _isLinkReset = IsWorking;
            if (!IsWorking)
            {
                ClearCommands();
            }
        }
        else if (!IsWorking)
        {
            Connect();
        }
    }

    // Nothing is under way any more: what waited for that happens now.
    private void Settle(ref StorageSubmission submit)
    {
        if (IsWorking)
        {
            return;
        }

        if (_isLinkReset)
        {
            _isLinkReset = false;
            ClearCommands();
            if ((_linkControl & 0xF) == 0)
            {
                Connect();
            }
        }
        else if ((_command & CmdStart) == 0)
        {
            ClearCommands();
        }
        else
        {
            Fetch(ref submit);
        }

        _owner.PortIdle();
    }

    private void ClearCommands()
    {
        _active = 0;
        _issued = 0;
        _current = -1;
        _isHalted = false;
        _inSoftReset = false;
    }

    private void Connect()
    {
        if (Drive is null)
        {
            _linkStatus = 0;
            _signature = 0xFFFF_FFFF;
            return;
        }

        // Active, 3 Gbit/s, device present (§3.3.10).
        _linkStatus = 0x123;
        _linkError |= 1u << 26;
        Drive.SoftReset();
        SendSignature(raise: false);
        Raise(IsConnect);
    }

    private void SendSignature(bool raise)
    {
        _registers.Device = 0;
        Drive!.SetSignature(_registers);
        _signature = ((uint)_registers.LbaHigh << 24) | ((uint)_registers.LbaMid << 16)
            | ((uint)_registers.LbaLow << 8) | _registers.Count;
        PostRegisterFis(raise);
    }

    private void Raise(uint bits)
    {
        _status |= bits;
        if (WantsInterrupt)
        {
            _owner.PortInterrupt(Number);
        }
    }

    // Starts what can be started: queued commands all at once, others one by one.
    private void Fetch(ref StorageSubmission submit)
    {
        while (!_isHalted && _current < 0 && Drive is not null && (_command & CmdStart) != 0 && _linkStatus != 0)
        {
            uint waiting = _issued & ~_running;
            if (waiting == 0)
            {
                return;
            }

            if (!Start(System.Numerics.BitOperations.TrailingZeroCount(waiting), ref submit))
            {
                return;
            }
        }
    }

    // False when the command has to wait.
    private bool Start(int slot, ref StorageSubmission submit)
    {
        Span<byte> header = stackalloc byte[32];
        Span<byte> table = stackalloc byte[0x80];
        ulong tableBase = 0;
        bool isReadable = _dma.TryRead(_listBase + ((ulong)slot * 32), header);
        if (isReadable)
        {
            tableBase = BinaryPrimitives.ReadUInt64LittleEndian(header[8..]) & ~0x7FUL;
            isReadable = _dma.TryRead(tableBase, table);
        }

        uint flags = BinaryPrimitives.ReadUInt32LittleEndian(header);
        if (!isReadable || table[0] != 0x27)
        {
            _owner.BadCommands++;
            Halt(slot, IsHostBusData);
            return true;
        }

        bool isQueued = (table[1] & 0x80) != 0 && table[2] is 0x60 or 0x61;
        if (!isQueued && _running != 0)
        {
            return false;
        }

        AhciTransfer transfer = TransferOf(slot);
        if (!ReadScatterList(transfer.List, tableBase + 0x80, (int)(flags >> 16)))
        {
            _owner.BadCommands++;
            Halt(slot, IsHostBusData);
            return true;
        }

        if (isQueued)
        {
            StartQueued(transfer, table, ref submit);
            return true;
        }

        _current = slot;
        if ((table[1] & 0x80) == 0)
        {
            Control(slot, table[15]);
            return true;
        }

        LoadRegisters(table);
        AtaWork work = _registers.Command == 0x2F && _registers.LbaLow == 0x10 && Drive is AtaDisk
            ? QueueErrorLog()
            : Drive!.Begin(_registers);
        if (work.Phase == AtaPhase.Packet)
        {
            work = Drive!.BeginPacket(table.Slice(0x40, 16), _registers);
        }

        Carry(transfer, work, ref submit);
        return true;
    }

    private AhciTransfer TransferOf(int slot)
    {
        AhciTransfer transfer = _transfers[slot] ??= new AhciTransfer(this, slot);
        transfer.IsQueued = false;
        return transfer;
    }

    private void LoadRegisters(ReadOnlySpan<byte> fis)
    {
        _registers.Command = fis[2];
        _registers.Features = fis[3];
        _registers.LbaLow = fis[4];
        _registers.LbaMid = fis[5];
        _registers.LbaHigh = fis[6];
        _registers.Device = fis[7];
        _registers.LbaLowPrevious = fis[8];
        _registers.LbaMidPrevious = fis[9];
        _registers.LbaHighPrevious = fis[10];
        _registers.FeaturesPrevious = fis[11];
        _registers.Count = fis[12];
        _registers.CountPrevious = fis[13];
    }

    // A FIS without the command bit updates Device Control: SRST on, then off (§10.4.1).
    private void Control(int slot, byte control)
    {
        bool isReset = (control & 4) != 0;
        _issued &= ~(1u << slot);
        _current = -1;
        if (_inSoftReset && !isReset)
        {
            Drive!.SoftReset();
            SendSignature(raise: true);
        }

        _inSoftReset = isReset;
    }

    private bool ReadScatterList(ScatterList list, ulong at, int count)
    {
        list.Clear();
        Span<byte> raw = stackalloc byte[16];
        for (int i = 0; i < count; i++)
        {
            if (!_dma.TryRead(at + ((ulong)i * 16), raw))
            {
                return false;
            }

            ulong address = BinaryPrimitives.ReadUInt64LittleEndian(raw) & ~1UL;
            int length = (int)(BinaryPrimitives.ReadUInt32LittleEndian(raw[12..]) & 0x3F_FFFF) + 1;
            if (!list.TryAdd(address, (length + 1) & ~1))
            {
                return false;
            }
        }

        return true;
    }

    private void Carry(AhciTransfer transfer, in AtaWork work, ref StorageSubmission submit)
    {
        transfer.Work = work;
        switch (work.Phase)
        {
            case AtaPhase.Done:
                End(transfer.Slot, isPioIn: false, 0);
                return;
            case AtaPhase.Backend:
                Submit(transfer, work.Operation, sliceCount: 0, ref submit);
                return;
            default:
                break;
        }

        bool toGuest = work.Phase == AtaPhase.DataIn;
        if (work.Memory is { } memory)
        {
            Span<byte> data = memory.AsSpan(0, (int)work.Length);
            bool moved = toGuest ? transfer.List.TryScatter(_dma, data) : transfer.List.TryGather(_dma, data);
            int count = (int)Math.Min(work.Length, transfer.List.Length);
            EndOrContinue(transfer, moved ? BlockStatus.Ok : BlockStatus.IoError, ref submit, count);
            return;
        }

        if (transfer.List.Length < work.Length)
        {
            Raise(IsOverflow);
            EndOrContinue(transfer, BlockStatus.IoError, ref submit, 0);
            return;
        }

        transfer.List.Trim(work.Length);
        if (!transfer.List.TryResolve(_dma, toGuest))
        {
            Raise(IsHostBusData);
            EndOrContinue(transfer, BlockStatus.IoError, ref submit, 0);
            return;
        }

        Submit(transfer, work.Operation, transfer.List.SliceCount, ref submit);
    }

    private void Submit(AhciTransfer transfer, BlockOperation operation, int sliceCount, ref StorageSubmission submit)
    {
        AtaWork work = transfer.Work;
        transfer.IsUsed = true;
        transfer.IsAbandoned = false;
        transfer.Backend = Drive!.Medium;
        transfer.Operation = operation;
        transfer.OffsetBytes = work.Offset;
        transfer.LengthBytes = work.Length;
        transfer.ForceUnitAccess = work.ForceUnitAccess;
        transfer.MayUnmap = operation == BlockOperation.Discard;
        transfer.Slices = transfer.List.Slices;
        transfer.SliceCount = sliceCount;
        _running |= 1u << transfer.Slot;
        submit.Add(transfer);
    }

    private void EndOrContinue(AhciTransfer transfer, BlockStatus status, ref StorageSubmission submit, int moved = -1)
    {
        AtaWork work = transfer.Work;
        if (moved < 0)
        {
            moved = work.Phase is AtaPhase.DataIn or AtaPhase.DataOut && status == BlockStatus.Ok ? (int)work.Length : 0;
        }

        AtaWork next = Drive!.Complete(_registers, work, status);
        if (next.Phase != AtaPhase.Done)
        {
            Carry(transfer, next, ref submit);
            return;
        }

        bool isPioIn = work.Phase == AtaPhase.DataIn && !work.IsDma && !work.IsPacket;
        End(transfer.Slot, isPioIn, moved);
    }

    // A command that was not queued is over.
    private void End(int slot, bool isPioIn, int moved)
    {
        Span<byte> count = stackalloc byte[4];
        BinaryPrimitives.WriteInt32LittleEndian(count, moved);
        _ = _dma.TryWrite(_listBase + ((ulong)slot * 32) + 4, count);
        _current = -1;
        if ((_registers.Status & AtaStatus.Error) != 0)
        {
            _current = slot;
            _isHalted = true;
            PostRegisterFis(raise: true);
            Raise(IsTaskFileError);
            return;
        }

        _issued &= ~(1u << slot);
        if (isPioIn)
        {
            PostPioSetup(moved);
            Raise(IsPioSetup);
        }
        else
        {
            PostRegisterFis(raise: true);
        }
    }

    private void Halt(int slot, uint why)
    {
        _current = slot;
        _isHalted = true;
        _registers.Status |= AtaStatus.Error;
        Raise(why);
    }

    // READ and WRITE FPDMA QUEUED (Serial ATA 2.6 §13.6): the count is in Features, the tag in Count.
    private void StartQueued(AhciTransfer transfer, ReadOnlySpan<byte> fis, ref StorageSubmission submit)
    {
        int tag = fis[12] >> 3;
        int sectors = fis[3] | (fis[11] << 8);
        long lba = fis[4] | ((long)fis[5] << 8) | ((long)fis[6] << 16)
            | ((long)fis[8] << 24) | ((long)fis[9] << 32) | ((long)fis[10] << 40);
        AtaPhase phase = fis[2] == 0x60 ? AtaPhase.DataIn : AtaPhase.DataOut;
        bool isForced = phase == AtaPhase.DataOut && (fis[7] & 0x80) != 0;
        transfer.IsQueued = true;
        AtaWork work = default;
        bool isGood = tag == transfer.Slot && Drive is AtaDisk disk && disk.TryQueued(lba, sectors, phase, isForced, out work)
            && transfer.List.Length >= work.Length;
        if (isGood)
        {
            transfer.List.Trim(work.Length);
            isGood = transfer.List.TryResolve(_dma, phase == AtaPhase.DataIn);
        }

        transfer.Work = work;

        // The drive took the command: CI clears, SACT tells when it ends.
        _issued &= ~(1u << transfer.Slot);
        if (!isGood)
        {
            _owner.BadCommands++;
            FailQueued(transfer.Slot, AtaError.IdNotFound, lba);
            return;
        }

        _registers.Status = AtaStatus.Ready | AtaStatus.SeekComplete;
        _registers.Error = AtaError.None;
        Submit(transfer, work.Operation, transfer.List.SliceCount, ref submit);
    }

    private void EndQueued(AhciTransfer transfer, BlockStatus status)
    {
        if (status != BlockStatus.Ok)
        {
            FailQueued(transfer.Slot, AtaError.Uncorrectable, transfer.Work.Offset / 512);
            return;
        }

        if (_isHalted)
        {
            return;
        }

        _active &= ~(1u << transfer.Slot);
        PostDeviceBits(1u << transfer.Slot);
        Raise(IsDeviceBits);
    }

    private void FailQueued(int slot, AtaError error, long lba)
    {
        if (_isHalted)
        {
            return;
        }

        _registers.Status = AtaStatus.Ready | AtaStatus.SeekComplete | AtaStatus.Error;
        _registers.Error = error;
        _isHalted = true;
        Array.Clear(_queueError);
        _queueError[0] = (byte)slot;
        _queueError[2] = (byte)_registers.Status;
        _queueError[3] = (byte)error;
        for (int i = 0; i < 3; i++)
        {
            _queueError[4 + i] = (byte)(lba >> (8 * i));
            _queueError[8 + i] = (byte)(lba >> (24 + (8 * i)));
        }

        byte sum = 0;
        foreach (byte value in _queueError.AsSpan(0, 511))
        {
            sum += value;
        }

        _queueError[511] = (byte)-sum;
        PostDeviceBits(0);
        Raise(IsTaskFileError | IsDeviceBits);
    }

    // READ LOG EXT page 10h: which queued command failed (Serial ATA 2.6 §13.7).
    private AtaWork QueueErrorLog()
    {
        _registers.Status = AtaStatus.Ready | AtaStatus.SeekComplete;
        _registers.Error = AtaError.None;
        return new AtaWork
        {
            Phase = AtaPhase.DataIn,
            Memory = (byte[])_queueError.Clone(),
            Length = 512,
            BlockBytes = 512,
        };
    }

    private void PostRegisterFis(bool raise)
    {
        Span<byte> fis = stackalloc byte[20];
        fis.Clear();
        fis[0] = 0x34;
        fis[1] = raise ? (byte)0x40 : (byte)0;
        FillRegisters(fis);
        Post(0x40, fis);
        if (raise)
        {
            Raise(IsRegisterFis);
        }
    }

    private void PostPioSetup(int bytes)
    {
        Span<byte> fis = stackalloc byte[20];
        fis.Clear();
        fis[0] = 0x5F;
        fis[1] = 0x60;
        FillRegisters(fis);
        fis[2] = (byte)(AtaStatus.Ready | AtaStatus.SeekComplete | AtaStatus.DataRequest);
        fis[15] = (byte)_registers.Status;
        fis[16] = (byte)bytes;
        fis[17] = (byte)(bytes >> 8);
        Post(0x20, fis);
    }

    private void PostDeviceBits(uint done)
    {
        Span<byte> fis = stackalloc byte[8];
        fis[0] = 0xA1;
        fis[1] = 0x40;
        fis[2] = (byte)((int)_registers.Status & 0x77);
        fis[3] = (byte)_registers.Error;
        BinaryPrimitives.WriteUInt32LittleEndian(fis[4..], done);
        Post(0x58, fis);
    }

    private void FillRegisters(Span<byte> fis)
    {
        fis[2] = (byte)_registers.Status;
        fis[3] = (byte)_registers.Error;
        fis[4] = _registers.LbaLow;
        fis[5] = _registers.LbaMid;
        fis[6] = _registers.LbaHigh;
        fis[7] = _registers.Device;
        fis[8] = _registers.LbaLowPrevious;
        fis[9] = _registers.LbaMidPrevious;
        fis[10] = _registers.LbaHighPrevious;
        fis[12] = _registers.Count;
        fis[13] = _registers.CountPrevious;
    }

    private void Post(uint offset, ReadOnlySpan<byte> fis)
    {
        if ((_command & CmdReceive) != 0)
        {
            _ = _dma.TryWrite(_fisBase + offset, fis);
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Pci;

namespace Vmm.Devices.Input;

// Theory. A USB 3 host controller (xHCI 1.1, Intel, December 2013; section numbers below are its) with as many USB 2
// root ports as devices are plugged in, and as many empty USB 3 ports, because guests expect both kinds. The guest
// queues work in rings of 16-byte TRBs: a command ring, and a transfer ring per endpoint; answers go into one event
// ring with one interrupter.
//
// A ring is consumed where its doorbell is rung: commands and control transfers are done before the doorbell write
// returns. An interrupt endpoint waits until its device has a report and the ring has a buffer, whichever is later.
//
// A ring is the guest's memory. Each TRB is copied once and then looked at; a doorbell consumes at most MaximumTrbs and
// follows at most a few link TRBs in a row, so that a ring that leads back into itself costs a bounded time (it goes on
// with the next doorbell). Writes to memory that is not there set Host System Error, as a bus would.
//
// Not there: streams, isochronous and bulk endpoints (no device has them), several event segments, power states.

/// <summary>The controller. See the theory at the top of this file.</summary>
public sealed class Xhci : PciFunction
{
    private const uint CapabilityBytes = 0x40;
    private const uint PortBase = CapabilityBytes + 0x400;
    private const uint RuntimeBase = 0x1000;
    private const uint DoorbellBase = 0x2000;
    private const int MaximumSlots = 16;
    private const int MaximumTrbs = 1024;
    private const int MaximumLinks = 4;
    private const int MaximumControlBytes = 4096;

    private const uint CommandRun = 1 << 0;
    private const uint CommandReset = 1 << 1;
    private const uint CommandInterrupts = 1 << 2;
    private const uint StatusHalted = 1 << 0;
    private const uint StatusHostError = 1 << 2;
    private const uint StatusEvent = 1 << 3;
    private const uint StatusPort = 1 << 4;

    private const uint PortConnected = 1 << 0;
    private const uint PortEnabled = 1 << 1;
    private const uint PortReset = 1 << 4;
    private const uint PortPower = 1 << 9;
    private const uint PortLinkWrite = 1 << 16;
    private const uint PortConnectChange = 1 << 17;
    private const uint PortResetChange = 1 << 21;
    private const uint PortChanges = 0x00FE_0000;
    private const uint PortWake = 0x0E00_0000;

    private enum Code : byte
    {
        Success = 1,
        DataBuffer = 2,
        Transaction = 4,
        Trb = 5,
        Stall = 6,
        NoSlots = 9,
        SlotNotEnabled = 11,
        EndpointNotEnabled = 12,
        ShortPacket = 13,
        Parameter = 17,
        ContextState = 19,
        CommandRingStopped = 24,
    }

    private enum EndpointState : byte
    {
        Disabled = 0,
        Running = 1,
        Halted = 2,
        Stopped = 3,
    }

    private readonly Lock _gate = new();
    private readonly IClock _clock;
    private readonly UsbHidDevice[] _devices;
    private readonly uint[] _ports;
    private readonly Slot[] _slots = new Slot[MaximumSlots + 1];
    private uint _command;
    private uint _status;
    private uint _notification;
    private uint _config;
    private ulong _commandRing;
    private bool _commandCycle;
    private bool _commandRunning;
    private ulong _contextArray;
    private uint _management;
    private uint _moderation;
    private uint _segmentCount;
    private ulong _segmentTable;
    private ulong _eventDequeue;
    private ulong _eventBase;
    private uint _eventSize;
    private uint _eventIndex;
    private bool _eventCycle = true;
    private long _startNs;
    private long _droppedEvents;

    /// <summary>Makes a controller with its devices plugged in, the first at port 1.</summary>
    /// <param name="id">"usb".</param>
    /// <param name="clock">Guest time, for the frame counter.</param>
    /// <param name="devices">1..7 devices.</param>
    public Xhci(string id, IClock clock, params UsbHidDevice[] devices)
        : base(id, new PciIdentity(0x1B36, 0x000D, 0x0C_03_30, 0x01, 0x1AF4, 0x1100))
    {
        ArgumentNullException.ThrowIfNull(devices);
        if (devices.Length is 0 or > 7)
        {
            throw new ArgumentException("1 to 7 devices", nameof(devices));
        }

        _clock = clock;
        _devices = devices;
        _ports = new uint[devices.Length * 2];
        for (int i = 0; i < _slots.Length; i++)
        {
            _slots[i] = new Slot();
        }

        AddBar(0, PciBarKind.Memory64, new Window(this));
        UseIntx();
        DefineConfig8(0x60, 0x30, 0);
        DefineConfig8(0x61, 0x20, 0x3F);
        StartCapabilitiesAt(0x70);
        UseMsi();
        UseMsiX(1, 2);
        foreach (UsbHidDevice device in devices)
        {
            device.Plug(_gate, () => OnReport(device));
        }
    }

    /// <inheritdoc/>
    public override int StateVersion => 1;

    /// <summary>Events that found the guest's ring full.</summary>
    public long DroppedEvents => Interlocked.Read(ref _droppedEvents);

    private bool IsRunning => (_command & CommandRun) != 0 && (_status & StatusHostError) == 0;

    /// <inheritdoc/>
    protected override void ResetCard()
    {
        lock (_gate)
        {
            ResetController();
        }
    }

    /// <inheritdoc/>
    protected override void SaveCard(StateWriter writer)
    {
        lock (_gate)
        {
            writer.Write("command", (ulong)_command);
            writer.Write("status", (ulong)_status);
            writer.Write("notification", (ulong)_notification);
            writer.Write("config", (ulong)_config);
            writer.Write("commandRing", _commandRing);
            writer.Write("commandCycle", _commandCycle);
            writer.Write("commandRunning", _commandRunning);
            writer.Write("contextArray", _contextArray);
            writer.Write("management", (ulong)_management);
            writer.Write("moderation", (ulong)_moderation);
            writer.Write("segmentCount", (ulong)_segmentCount);
            writer.Write("segmentTable", _segmentTable);
            writer.Write("eventDequeue", _eventDequeue);
            writer.Write("eventBase", _eventBase);
            writer.Write("eventSize", (ulong)_eventSize);
            writer.Write("eventIndex", (ulong)_eventIndex);
            writer.Write("eventCycle", _eventCycle);
            for (int i = 0; i < _ports.Length; i++)
            {
                writer.Write($"port{i}", (ulong)_ports[i]);
            }

            for (int i = 1; i <= MaximumSlots; i++)
            {
                _slots[i].Save(writer, $"slot{i}.");
            }

            for (int i = 0; i < _devices.Length; i++)
            {
                _devices[i].Save(writer, $"device{i}.");
            }
        }
    }

    /// <inheritdoc/>
    protected override void LoadCard(StateReader reader, int version)
    {
        lock (_gate)
        {
            _command = reader.ReadUInt32("command");
            _status = reader.ReadUInt32("status");
            _notification = reader.ReadUInt32("notification");
            _config = reader.ReadUInt32("config");
            _commandRing = reader.ReadUInt64("commandRing");
            _commandCycle = reader.ReadBoolean("commandCycle");
            _commandRunning = reader.ReadBoolean("commandRunning");
            _contextArray = reader.ReadUInt64("contextArray");
            _management = reader.ReadUInt32("management");
            _moderation = reader.ReadUInt32("moderation");
            _segmentCount = reader.ReadUInt32("segmentCount");
            _segmentTable = reader.ReadUInt64("segmentTable");
            _eventDequeue = reader.ReadUInt64("eventDequeue");
            _eventBase = reader.ReadUInt64("eventBase");
            _eventSize = (uint)reader.ReadBounded("eventSize", 4096);
            _eventIndex = (uint)reader.ReadBounded("eventIndex", _eventSize == 0 ? 0 : _eventSize - 1);
            _eventCycle = reader.ReadBoolean("eventCycle");
            for (int i = 0; i < _ports.Length; i++)
            {
                _ports[i] = reader.ReadUInt32($"port{i}");
            }

            for (int i = 1; i <= MaximumSlots; i++)
            {
                _slots[i].Load(reader, $"slot{i}.", _devices.Length);
            }

            for (int i = 0; i < _devices.Length; i++)
            {
                _devices[i].Load(reader, $"device{i}.");
            }

            _startNs = _clock.NowNs;
        }
    }

    // §4.2, HCRST: registers to their defaults; what is plugged in shows as newly connected.
    private void ResetController()
    {
        _command = 0;
        _status = StatusHalted;
        _notification = 0;
        _config = 0;
        _commandRing = 0;
        _commandCycle = false;
        _commandRunning = false;
        _contextArray = 0;
        _management = 0;
        _moderation = 4000;
        _segmentCount = 0;
        _segmentTable = 0;
        _eventDequeue = 0;
        _eventBase = 0;
        _eventSize = 0;
        _eventIndex = 0;
        _eventCycle = true;
        foreach (Slot slot in _slots)
        {
            slot.Clear();
        }

        for (int i = 0; i < _ports.Length; i++)
        {
            // USB 2: link state Polling until the port is reset, full speed (1). USB 3: RxDetect, nothing there.
            _ports[i] = i < _devices.Length
                ? PortConnected | (7 << 5) | PortPower | (1 << 10) | PortConnectChange
                : (5 << 5) | PortPower;
        }

        foreach (UsbHidDevice device in _devices)
        {
            device.BusReset();
        }

        Intx.Set(false);
    }

    private uint ReadRegister(uint offset)
    {
        uint ports = (uint)_ports.Length;
        uint usb2 = (uint)_devices.Length;
        switch (offset)
        {
            case 0x00:
                return 0x0100_0000 | CapabilityBytes;
            case 0x04:
                return MaximumSlots | (1 << 8) | (ports << 24);
            case 0x08:
                return 0x0F;
            case 0x10:
                // 64-bit addresses, extended capabilities at 0x20.
                return (0x20 / 4 << 16) | 1;
            case 0x14:
                return DoorbellBase;
            case 0x18:
                return RuntimeBase;

            // Supported Protocol capabilities (§7.2): USB 2.0 at ports 1.., USB 3.0 after them.
            case 0x20:
                return 0x0200_0402;
            case 0x24:
            case 0x34:
                return 0x2042_5355;
            case 0x28:
                return 1 | (usb2 << 8);
            case 0x30:
                return 0x0300_0002;
            case 0x38:
                return (usb2 + 1) | ((ports - usb2) << 8);

            case CapabilityBytes + 0x00:
                return _command;
            case CapabilityBytes + 0x04:
                return _status;
            case CapabilityBytes + 0x08:
                return 1;
            case CapabilityBytes + 0x14:
                return _notification;
            case CapabilityBytes + 0x18:
                // The pointer reads as zero; bit 3 says whether the ring runs.
                return _commandRunning ? 8u : 0;
            case CapabilityBytes + 0x30:
                return (uint)_contextArray;
            case CapabilityBytes + 0x34:
                return (uint)(_contextArray >> 32);
            case CapabilityBytes + 0x38:
                return _config;

            case RuntimeBase:
                return IsRunning ? (uint)((_clock.NowNs - _startNs) / 125_000) & 0x3FFF : 0;
            case RuntimeBase + 0x20:
                return _management;
            case RuntimeBase + 0x24:
                return _moderation;
            case RuntimeBase + 0x28:
                return _segmentCount;
            case RuntimeBase + 0x30:
                return (uint)_segmentTable;
            case RuntimeBase + 0x34:
                return (uint)(_segmentTable >> 32);
            case RuntimeBase + 0x38:
                return (uint)_eventDequeue;
            case RuntimeBase + 0x3C:
                return (uint)(_eventDequeue >> 32);
        }

        uint port = (offset - PortBase) / 16;
        return offset >= PortBase && port < ports && (offset & 15) == 0 ? _ports[port] : 0;
    }

    private void WriteRegister(uint offset, uint value)
    {
        switch (offset)
        {
            case CapabilityBytes + 0x00:
                WriteCommand(value);
                return;
            case CapabilityBytes + 0x04:
                _status &= ~(value & (StatusHostError | StatusEvent | StatusPort | (1 << 10)));
                return;
            case CapabilityBytes + 0x14:
                _notification = value & 0xFFFF;
                return;
            case CapabilityBytes + 0x18:
                WriteCommandRing(value);
                return;
            case CapabilityBytes + 0x1C:
                if (!_commandRunning)
                {
                    _commandRing = (_commandRing & 0xFFFF_FFFF) | ((ulong)value << 32);
                }

                return;
            case CapabilityBytes + 0x30:
                _contextArray = (_contextArray & ~0xFFFF_FFFFUL) | (value & ~63u);
                return;
            case CapabilityBytes + 0x34:
                _contextArray = (_contextArray & 0xFFFF_FFFF) | ((ulong)value << 32);
                return;
            case CapabilityBytes + 0x38:
                _config = value & 0xFF;
                return;
            case RuntimeBase + 0x20:
                // Interrupt Pending is write-one-to-clear.
                _management = (value & 2) | (_management & 1 & ~value);
                DriveInterrupt();
                return;
            case RuntimeBase + 0x24:
                _moderation = value;
                return;
            case RuntimeBase + 0x28:
                _segmentCount = value & 0xFFFF;
                return;
            case RuntimeBase + 0x30:
                _segmentTable = (_segmentTable & ~0xFFFF_FFFFUL) | (value & ~63u);
                LoadEventRing();
                return;
            case RuntimeBase + 0x34:
                _segmentTable = (_segmentTable & 0xFFFF_FFFF) | ((ulong)value << 32);
                LoadEventRing();
                return;
            case RuntimeBase + 0x38:
                WriteEventDequeue(value);
                return;
            case RuntimeBase + 0x3C:
                _eventDequeue = (_eventDequeue & 0xFFFF_FFFF) | ((ulong)value << 32);
                return;
        }

        if (offset >= DoorbellBase && offset < DoorbellBase + ((MaximumSlots + 1) * 4))
        {
            RingDoorbell((int)(offset - DoorbellBase) / 4, value);
            return;
        }

        uint port = (offset - PortBase) / 16;
        if (offset >= PortBase && port < _ports.Length && (offset & 15) == 0)
        {
            WritePort((int)port, value);
        }
    }

    private void WriteCommand(uint value)
    {
        if ((value & CommandReset) != 0)
        {
            ResetController();
            return;
        }

        bool was = IsRunning;
        _command = value & 0x0F0D;
        bool now = IsRunning;
        _status = now ? _status & ~StatusHalted : _status | StatusHalted;
        if (now && !was)
        {
            _startNs = _clock.NowNs;
            for (int i = 0; i < _ports.Length; i++)
            {
                if ((_ports[i] & PortChanges) != 0)
                {
                    PostPortEvent(i);
                }
            }
        }
        else if (!now)
        {
            _commandRunning = false;
        }

        DriveInterrupt();
    }

    // §5.4.5: while the ring runs only Stop and Abort have an effect.
    private void WriteCommandRing(uint value)
    {
        if (_commandRunning)
        {
            if ((value & 6) != 0)
            {
                _commandRunning = false;
                Post(_commandRing, (uint)Code.CommandRingStopped << 24, 33u << 10);
            }

            return;
        }

        _commandRing = (_commandRing & ~0xFFFF_FFFFUL) | (value & ~63u);
        _commandCycle = (value & 1) != 0;
    }

    private void WriteEventDequeue(uint value)
    {
        bool busy = (_eventDequeue & 8) != 0 && (value & 8) == 0;
        _eventDequeue = (_eventDequeue & ~0xFFFF_FFFFUL) | (value & ~8u) | (busy ? 8u : 0);

        // Handler done, but there are more events: interrupt again.
        if (!busy && _eventSize != 0 && (_eventDequeue & ~15UL) != _eventBase + (_eventIndex * 16))
        {
            Assert();
        }
    }

    // §4.9.4: the first segment only; a write of the table's address starts the ring.
    private void LoadEventRing()
    {
        Span<byte> entry = stackalloc byte[16];
        _eventIndex = 0;
        _eventCycle = true;
        _eventSize = 0;
        if (_segmentCount == 0 || _segmentTable == 0 || !Dma.TryRead(_segmentTable, entry))
        {
            return;
        }

        _eventBase = BinaryPrimitives.ReadUInt64LittleEndian(entry) & ~63UL;
        uint size = BinaryPrimitives.ReadUInt16LittleEndian(entry[8..]);
        _eventSize = size is >= 16 and <= 4096 ? size : 0;
    }

    private void Post(ulong parameter, uint status, uint control)
    {
        if (_eventSize == 0)
        {
            Interlocked.Increment(ref _droppedEvents);
            return;
        }

        uint next = _eventIndex + 1 == _eventSize ? 0 : _eventIndex + 1;
        if (_eventBase + (next * 16) == (_eventDequeue & ~15UL))
        {
            Interlocked.Increment(ref _droppedEvents);
            return;
        }

        Span<byte> trb = stackalloc byte[16];
        BinaryPrimitives.WriteUInt64LittleEndian(trb, parameter);
        BinaryPrimitives.WriteUInt32LittleEndian(trb[8..], status);
        BinaryPrimitives.WriteUInt32LittleEndian(trb[12..], control | (_eventCycle ? 1u : 0));
        ulong at = _eventBase + (_eventIndex * 16);

        // The cycle bit makes the entry valid: it is written after the rest.
        if (!Dma.TryWrite(at, trb[..12]) || !Dma.TryWrite(at + 12, trb[12..]))
        {
            _status |= StatusHostError | StatusHalted;
            return;
        }

        _eventIndex = next;
        if (next == 0)
        {
            _eventCycle = !_eventCycle;
        }

        if ((_eventDequeue & 8) == 0)
        {
            Assert();
        }
    }

    private void Assert()
    {
        _eventDequeue |= 8;
        _management |= 1;
        _status |= StatusEvent;
        if ((_management & 2) == 0 || (_command & CommandInterrupts) == 0)
        {
            return;
        }

        if (MsiX is { IsEnabled: true })
        {
            // A message clears Interrupt Pending itself (§5.5.2.1).
            _management &= ~1u;
            MsiX.Send(0);
        }
        else if (Msi is { IsEnabled: true })
        {
            _management &= ~1u;
            Msi.Send();
        }
        else
        {
            DriveInterrupt();
        }
    }

    private void DriveInterrupt() => Intx.Set(
        (_management & 3) == 3 && (_command & CommandInterrupts) != 0 &&
        MsiX is not { IsEnabled: true } && Msi is not { IsEnabled: true });

    private void PostPortEvent(int port)
    {
        _status |= StatusPort;
        if (IsRunning)
        {
            Post((ulong)(port + 1) << 24, (uint)Code.Success << 24, 34u << 10);
        }
    }

    private void WritePort(int port, uint value)
    {
        uint old = _ports[port];
        uint next = old & ~(value & PortChanges);
        next = (next & ~PortWake) | (value & PortWake);
        if ((value & PortEnabled) != 0)
        {
            // Writing one disables.
            next &= ~PortEnabled;
        }

        if ((value & PortLinkWrite) != 0 && (next & PortConnected) != 0)
        {
            uint link = (value >> 5) & 15;
            if (link is 0 or 3)
            {
                next = (next & ~(15u << 5)) | (link << 5);
            }
        }

        _ports[port] = next;
        if ((value & PortReset) != 0 && (next & PortConnected) != 0)
        {
            // The reset is done at once: enabled, link in U0.
            _ports[port] = (next & ~(15u << 5)) | PortEnabled | PortResetChange;
            _devices[port].BusReset();
            PostPortEvent(port);
        }
    }

    private void RingDoorbell(int slot, uint value)
    {
        if (!IsRunning)
        {
            return;
        }

        if (slot == 0)
        {
            if ((value & 0xFF) == 0)
            {
                _commandRunning = true;
                RunCommands();
            }

            return;
        }

        int endpoint = (int)(value & 0xFF);
        if (endpoint is < 1 or > 31 || !_slots[slot].IsEnabled)
        {
            return;
        }

        Endpoint ring = _slots[slot].Endpoints[endpoint];
        if (ring.State == EndpointState.Stopped)
        {
            ring.State = EndpointState.Running;
            StoreEndpoint(slot, endpoint);
        }

        Run(slot, endpoint);
    }

    private void OnReport(UsbHidDevice device)
    {
        if (!IsRunning)
        {
            return;
        }

        for (int slot = 1; slot <= MaximumSlots; slot++)
        {
            if (_slots[slot].IsEnabled && _slots[slot].Port > 0 && ReferenceEquals(_devices[_slots[slot].Port - 1], device))
            {
                Run(slot, 3);
            }
        }
    }

    // Reads the next TRB of a ring, following links. False when there is none (or memory is not there).
    private bool TryFetch(ref ulong dequeue, ref bool cycle, out Trb trb)
    {
        Span<byte> bytes = stackalloc byte[16];
        for (int links = 0; links <= MaximumLinks; links++)
        {
            if (!Dma.TryRead(dequeue, bytes))
            {
                break;
            }

            trb = new Trb(
                dequeue,
                BinaryPrimitives.ReadUInt64LittleEndian(bytes),
                BinaryPrimitives.ReadUInt32LittleEndian(bytes[8..]),
                BinaryPrimitives.ReadUInt32LittleEndian(bytes[12..]));
            if (((trb.Control & 1) != 0) != cycle)
            {
                return false;
            }

            if (trb.Type != 6)
            {
                return true;
            }

            dequeue = trb.Parameter & ~15UL;
            if ((trb.Control & 2) != 0)
            {
                cycle = !cycle;
            }
        }

        trb = default;
        return false;
    }

    private void RunCommands()
    {
        for (int i = 0; i < MaximumTrbs && _commandRunning && IsRunning; i++)
        {
            if (!TryFetch(ref _commandRing, ref _commandCycle, out Trb trb))
            {
                return;
            }

            _commandRing += 16;
            int slot = (int)(trb.Control >> 24);
            Code code = Execute(trb, ref slot);
            Post(trb.Address, (uint)code << 24, (33u << 10) | ((uint)slot << 24));
        }
    }

    private Code Execute(in Trb trb, ref int slot)
    {
        if (trb.Type == 23)
        {
            return Code.Success;
        }

        if (trb.Type == 9)
        {
            return EnableSlot(out slot);
        }

        if (trb.Type is < 9 or > 17)
        {
            return Code.Trb;
        }

        if (slot is < 1 or > MaximumSlots || !_slots[slot].IsEnabled)
        {
            return Code.SlotNotEnabled;
        }

        int endpoint = (int)(trb.Control >> 16) & 31;
        switch (trb.Type)
        {
            case 10:
                _slots[slot].Clear();
                return Code.Success;
            case 11:
                return AddressDevice(slot, trb.Parameter & ~15UL, (trb.Control & (1 << 9)) != 0);
            case 12:
                return ConfigureEndpoints(slot, trb.Parameter & ~15UL, (trb.Control & (1 << 9)) != 0);
            case 13:
                return EvaluateContext(slot, trb.Parameter & ~15UL);
            case 14:
                return ChangeEndpoint(slot, endpoint, EndpointState.Halted);
            case 15:
                return ChangeEndpoint(slot, endpoint, EndpointState.Running);
            case 16:
                return SetDequeue(slot, endpoint, trb.Parameter);
            default:
                return ResetDevice(slot);
        }
    }

    private Code EnableSlot(out int slot)
    {
        int limit = (int)Math.Min(_config, MaximumSlots);
        for (slot = 1; slot <= limit; slot++)
        {
            if (!_slots[slot].IsEnabled)
            {
                _slots[slot].Clear();
                _slots[slot].IsEnabled = true;
                return Code.Success;
            }
        }

        slot = 0;
        return Code.NoSlots;
    }

    // The address of a slot's output device context (§6.1).
    private bool TryContext(int slot, out ulong context)
    {
        Span<byte> bytes = stackalloc byte[8];
        context = 0;
        if (!Dma.TryRead(_contextArray + ((ulong)slot * 8), bytes))
        {
            return false;
        }

        context = BinaryPrimitives.ReadUInt64LittleEndian(bytes) & ~63UL;
        return context != 0;
    }

    private Code AddressDevice(int slot, ulong input, bool blockSetAddress)
    {
        Span<byte> context = stackalloc byte[96];
        if (!TryContext(slot, out ulong output) || !Dma.TryRead(input, context))
        {
            return Code.Parameter;
        }

        if ((BinaryPrimitives.ReadUInt32LittleEndian(context[4..]) & 3) != 3)
        {
            return Code.Parameter;
        }

        Span<byte> slotContext = context.Slice(32, 32);
        int port = slotContext[6];
        uint route = BinaryPrimitives.ReadUInt32LittleEndian(slotContext) & 0xF_FFFF;
        if (port < 1 || port > _devices.Length || route != 0)
        {
            return Code.Parameter;
        }

        if ((_ports[port - 1] & PortEnabled) == 0)
        {
            return Code.Transaction;
        }

        Slot target = _slots[slot];
        target.Port = port;
        target.State = blockSetAddress ? (byte)1 : (byte)2;
        BinaryPrimitives.WriteUInt32LittleEndian(
            slotContext[12..], ((uint)target.State << 27) | (blockSetAddress ? 0 : (uint)slot));
        Span<byte> endpointContext = context.Slice(64, 32);
        OpenEndpoint(target.Endpoints[1], endpointContext);
        return Dma.TryWrite(output, slotContext) && Dma.TryWrite(output + 32, endpointContext)
            ? Code.Success
            : Code.Parameter;
    }

    private static void OpenEndpoint(Endpoint endpoint, Span<byte> context)
    {
        endpoint.Clear();
        ulong dequeue = BinaryPrimitives.ReadUInt64LittleEndian(context[8..]);
        endpoint.Dequeue = dequeue & ~15UL;
        endpoint.Cycle = (dequeue & 1) != 0;
        endpoint.State = EndpointState.Running;
        context[0] = (byte)((context[0] & ~7) | (byte)EndpointState.Running);
    }

    private Code ConfigureEndpoints(int slot, ulong input, bool deconfigure)
    {
        Slot target = _slots[slot];
        if (target.State < 2)
        {
            return Code.ContextState;
        }

        Span<byte> control = stackalloc byte[64];
        if (!TryContext(slot, out ulong output) || (!deconfigure && !Dma.TryRead(input, control)))
        {
            return Code.Parameter;
        }

        uint drop = deconfigure ? ~3u : BinaryPrimitives.ReadUInt32LittleEndian(control) & ~3u;
        uint add = deconfigure ? 0 : BinaryPrimitives.ReadUInt32LittleEndian(control[4..]) & ~3u;
        Span<byte> context = stackalloc byte[32];
        for (int i = 2; i < 32; i++)
        {
            if ((drop & (1u << i)) != 0)
            {
                target.Endpoints[i].Clear();
                StoreEndpoint(slot, i);
            }

            if ((add & (1u << i)) == 0)
            {
                continue;
            }

            if (!Dma.TryRead(input + 32 + ((ulong)i * 32), context))
            {
                return Code.Parameter;
            }

            OpenEndpoint(target.Endpoints[i], context);
            if (!Dma.TryWrite(output + ((ulong)i * 32), context))
            {
                return Code.Parameter;
            }
        }

        target.State = deconfigure ? (byte)2 : (byte)3;
        if (!Dma.TryRead(output, context))
        {
            return Code.Parameter;
        }

        // Context entries come from the input; the state is ours.
        uint first = BinaryPrimitives.ReadUInt32LittleEndian(context);
        uint entries = deconfigure ? 1 : BinaryPrimitives.ReadUInt32LittleEndian(control[32..]) >> 27;
        BinaryPrimitives.WriteUInt32LittleEndian(context, (first & 0x07FF_FFFF) | (entries << 27));
        uint last = BinaryPrimitives.ReadUInt32LittleEndian(context[12..]);
        BinaryPrimitives.WriteUInt32LittleEndian(context[12..], (last & 0x07FF_FFFF) | ((uint)target.State << 27));
        return Dma.TryWrite(output, context) ? Code.Success : Code.Parameter;
    }

    // §4.6.7: only the maximum packet size of endpoint 0 and the exit latency can change here.
    private Code EvaluateContext(int slot, ulong input)
    {
        Span<byte> context = stackalloc byte[96];
        Span<byte> current = stackalloc byte[64];
        if (!TryContext(slot, out ulong output) || !Dma.TryRead(input, context) || !Dma.TryRead(output, current))
        {
            return Code.Parameter;
        }

        uint add = BinaryPrimitives.ReadUInt32LittleEndian(context[4..]);
        if ((add & 1) != 0)
        {
            context.Slice(36, 2).CopyTo(current[4..]);
        }

        if ((add & 2) != 0)
        {
            context.Slice(70, 2).CopyTo(current[38..]);
        }

        return Dma.TryWrite(output, current) ? Code.Success : Code.Parameter;
    }

    // Reset Endpoint (from Halted) and Stop Endpoint (from Running): both end in Stopped.
    private Code ChangeEndpoint(int slot, int endpoint, EndpointState from)
    {
        if (endpoint == 0)
        {
            return Code.Trb;
        }

        Endpoint ring = _slots[slot].Endpoints[endpoint];
        if (ring.State == EndpointState.Disabled)
        {
            return Code.EndpointNotEnabled;
        }

        if (ring.State != from)
        {
            return Code.ContextState;
        }

        ring.State = EndpointState.Stopped;
        ring.ResetTransfer();
        StoreEndpoint(slot, endpoint);
        return Code.Success;
    }

    private Code SetDequeue(int slot, int endpoint, ulong pointer)
    {
        if (endpoint == 0)
        {
            return Code.Trb;
        }

        Endpoint ring = _slots[slot].Endpoints[endpoint];
        if (ring.State == EndpointState.Disabled)
        {
            return Code.EndpointNotEnabled;
        }

        if (ring.State != EndpointState.Stopped)
        {
            return Code.ContextState;
        }

        ring.Dequeue = pointer & ~15UL;
        ring.Cycle = (pointer & 1) != 0;
        ring.ResetTransfer();
        StoreEndpoint(slot, endpoint);
        return Code.Success;
    }

    private Code ResetDevice(int slot)
    {
        Slot target = _slots[slot];
        if (target.State < 2 || !TryContext(slot, out ulong output))
        {
            return Code.ContextState;
        }

        for (int i = 2; i < 32; i++)
        {
            target.Endpoints[i].Clear();
            StoreEndpoint(slot, i);
        }

        target.State = 1;
        Span<byte> state = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(state, 1u << 27);
        return Dma.TryWrite(output + 12, state) ? Code.Success : Code.Parameter;
    }

    // Writes an endpoint's state and ring position into its output context.
    private void StoreEndpoint(int slot, int endpoint)
    {
        Span<byte> context = stackalloc byte[16];
        if (!TryContext(slot, out ulong output) || !Dma.TryRead(output + ((ulong)endpoint * 32), context))
        {
            return;
        }

        Endpoint ring = _slots[slot].Endpoints[endpoint];
        context[0] = (byte)((context[0] & ~7) | (byte)ring.State);
        BinaryPrimitives.WriteUInt64LittleEndian(context[8..], ring.Dequeue | (ring.Cycle ? 1UL : 0));
        Dma.TryWrite(output + ((ulong)endpoint * 32), context);
    }

    private void Run(int slot, int endpoint)
    {
        Slot owner = _slots[slot];
        Endpoint ring = owner.Endpoints[endpoint];
        if (owner.Port == 0)
        {
            return;
        }

        UsbHidDevice device = _devices[owner.Port - 1];
        for (int i = 0; i < MaximumTrbs && ring.State == EndpointState.Running && IsRunning; i++)
        {
            // An interrupt endpoint without a report answers NAK: its ring stays where it is.
            if (endpoint != 1 && !ring.InTransfer && (endpoint != 3 || !device.HasReport))
            {
                return;
            }

            if (!TryFetch(ref ring.Dequeue, ref ring.Cycle, out Trb trb))
            {
                return;
            }

            ring.Dequeue += 16;
            if (endpoint == 1)
            {
                RunControl(slot, ring, device, trb);
            }
            else
            {
                RunInterrupt(slot, endpoint, ring, device, trb);
            }
        }
    }

    private void RunInterrupt(int slot, int endpoint, Endpoint ring, UsbHidDevice device, in Trb trb)
    {
        switch (trb.Type)
        {
            case 1:
                if (!ring.InTransfer)
                {
                    ring.Data = device.TakeReport();
                    ring.DataAt = 0;
                    ring.Transferred = 0;
                }

                Code code = MoveIn(ring, trb, out uint residual);
                ring.InTransfer = (trb.Control & (1 << 4)) != 0;
                Complete(slot, endpoint, ring, trb, code, residual);
                break;
            case 7:
                ring.InTransfer = (trb.Control & (1 << 4)) != 0;
                EventData(slot, endpoint, ring, trb, Code.Success);
                break;
            case 8:
                ring.InTransfer = false;
                Complete(slot, endpoint, ring, trb, Code.Success, 0);
                break;
            default:
                Halt(slot, endpoint, ring, trb, Code.Trb, 0);
                break;
        }
    }

    private void RunControl(int slot, Endpoint ring, UsbHidDevice device, in Trb trb)
    {
        switch (trb.Type)
        {
            case 2:
                ring.ResetTransfer();
                BinaryPrimitives.WriteUInt64LittleEndian(ring.Setup, trb.Parameter);
                if (ring.IsIn)
                {
                    byte[]? answer = device.ControlIn(ring.Setup);
                    ring.IsStalled = answer is null;
                    ring.Data = answer is null ? [] : answer.AsSpan(0, Math.Min(answer.Length, ring.RequestLength)).ToArray();
                }

                Complete(slot, 1, ring, trb, Code.Success, 0);
                break;
            case 1:
            case 3:
                if (ring.IsStalled)
                {
                    Halt(slot, 1, ring, trb, Code.Stall, trb.Length);
                    return;
                }

                uint residual;
                Code code = ring.IsIn ? MoveIn(ring, trb, out residual) : MoveOut(ring, trb, out residual);
                Complete(slot, 1, ring, trb, code, residual);
                break;
            case 4:
                bool good = !ring.IsStalled && (ring.IsIn || device.ControlOut(ring.Setup, ring.Data));
                if (!good)
                {
                    Halt(slot, 1, ring, trb, Code.Stall, 0);
                    return;
                }

                Complete(slot, 1, ring, trb, Code.Success, 0);
                ring.ResetTransfer();
                break;
            case 7:
                EventData(slot, 1, ring, trb, Code.Success);
                break;
            case 8:
                Complete(slot, 1, ring, trb, Code.Success, 0);
                break;
            default:
                Halt(slot, 1, ring, trb, Code.Trb, 0);
                break;
        }
    }

    private Code MoveIn(Endpoint ring, in Trb trb, out uint residual)
    {
        int length = (int)Math.Min(trb.Length, (uint)(ring.Data.Length - ring.DataAt));
        residual = trb.Length - (uint)length;
        if (!Dma.TryWrite(trb.Parameter, ring.Data.AsSpan(ring.DataAt, length)))
        {
            return Code.DataBuffer;
        }

        ring.DataAt += length;
        ring.Transferred += (uint)length;
        return residual != 0 ? Code.ShortPacket : Code.Success;
    }

    private Code MoveOut(Endpoint ring, in Trb trb, out uint residual)
    {
        residual = 0;
        int length = (int)Math.Min(trb.Length, MaximumControlBytes);
        if (ring.Data.Length + length > MaximumControlBytes)
        {
            return Code.DataBuffer;
        }

        byte[] data = new byte[ring.Data.Length + length];
        ring.Data.CopyTo(data.AsSpan());
        Span<byte> into = data.AsSpan(ring.Data.Length);
        if ((trb.Control & (1 << 6)) != 0)
        {
            // Immediate data: up to eight bytes in the TRB itself.
            Span<byte> immediate = stackalloc byte[8];
            BinaryPrimitives.WriteUInt64LittleEndian(immediate, trb.Parameter);
            immediate[..Math.Min(8, into.Length)].CopyTo(into);
        }
        else if (!Dma.TryRead(trb.Parameter, into))
        {
            return Code.DataBuffer;
        }

        ring.Data = data;
        ring.Transferred += (uint)length;
        return Code.Success;
    }

    // An event is due with Interrupt On Completion, and with Interrupt on Short Packet for a short one; errors halt.
    private void Complete(int slot, int endpoint, Endpoint ring, in Trb trb, Code code, uint residual)
    {
        if (code == Code.DataBuffer)
        {
            Halt(slot, endpoint, ring, trb, code, residual);
            return;
        }

        bool wanted = (trb.Control & (1 << 5)) != 0 || (code == Code.ShortPacket && (trb.Control & (1 << 2)) != 0);
        if (wanted)
        {
            Post(trb.Address, (residual & 0xFF_FFFF) | ((uint)code << 24), TransferEvent(slot, endpoint));
        }
    }

    private void EventData(int slot, int endpoint, Endpoint ring, in Trb trb, Code code)
    {
        if ((trb.Control & (1 << 5)) != 0)
        {
            uint status = (ring.Transferred & 0xFF_FFFF) | ((uint)code << 24);
            Post(trb.Parameter, status, TransferEvent(slot, endpoint) | 4);
        }

        ring.Transferred = 0;
    }

    private void Halt(int slot, int endpoint, Endpoint ring, in Trb trb, Code code, uint residual)
    {
        ring.State = EndpointState.Halted;
        ring.Dequeue = trb.Address;
        ring.ResetTransfer();
        StoreEndpoint(slot, endpoint);
        Post(trb.Address, (residual & 0xFF_FFFF) | ((uint)code << 24), TransferEvent(slot, endpoint));
    }

    private static uint TransferEvent(int slot, int endpoint) =>
        (32u << 10) | ((uint)endpoint << 16) | ((uint)slot << 24);

    private readonly record struct Trb(ulong Address, ulong Parameter, uint Status, uint Control)
    {
        public int Type => (int)(Control >> 10) & 63;

        public uint Length => Status & 0x1_FFFF;
    }

    private sealed class Endpoint
    {
        // Fields, because a ring's position is advanced by reference.
        public ulong Dequeue;
        public bool Cycle;

        public EndpointState State { get; set; }

        public byte[] Setup { get; } = new byte[8];

        public byte[] Data { get; set; } = [];

        public int DataAt { get; set; }

        public uint Transferred { get; set; }

        public bool IsStalled { get; set; }

        public bool InTransfer { get; set; }

        public bool IsIn => (Setup[0] & 0x80) != 0;

        public int RequestLength => Setup[6] | (Setup[7] << 8);

        public void Clear()
        {
            State = EndpointState.Disabled;
            Dequeue = 0;
            Cycle = false;
            ResetTransfer();
        }

        public void ResetTransfer()
        {
            Array.Clear(Setup);
            Data = [];
            DataAt = 0;
            Transferred = 0;
            IsStalled = false;
            InTransfer = false;
        }
    }

    private sealed class Slot
    {
        public Slot()
        {
            for (int i = 0; i < Endpoints.Length; i++)
            {
                Endpoints[i] = new Endpoint();
            }
        }

        public bool IsEnabled { get; set; }

        public byte State { get; set; }

        public int Port { get; set; }

        public Endpoint[] Endpoints { get; } = new Endpoint[32];

        public void Clear()
        {
            IsEnabled = false;
            State = 0;
            Port = 0;
            foreach (Endpoint endpoint in Endpoints)
            {
                endpoint.Clear();
            }
        }

        public void Save(StateWriter writer, string prefix)
        {
            writer.Write(prefix + "enabled", IsEnabled);
            if (!IsEnabled)
            {
                return;
            }

            writer.Write(prefix + "state", (ulong)State);
            writer.Write(prefix + "port", (ulong)Port);
            for (int i = 1; i < Endpoints.Length; i++)
            {
                Endpoint endpoint = Endpoints[i];
                writer.Write($"{prefix}ep{i}.state", (ulong)endpoint.State);
                if (endpoint.State == EndpointState.Disabled)
                {
                    continue;
                }

                writer.Write($"{prefix}ep{i}.dequeue", endpoint.Dequeue);
                writer.Write($"{prefix}ep{i}.cycle", endpoint.Cycle);
                writer.WriteBytes($"{prefix}ep{i}.setup", endpoint.Setup);
                writer.WriteBytes($"{prefix}ep{i}.data", endpoint.Data);
                writer.Write($"{prefix}ep{i}.at", (ulong)endpoint.DataAt);
                writer.Write($"{prefix}ep{i}.transferred", (ulong)endpoint.Transferred);
                writer.Write($"{prefix}ep{i}.stalled", endpoint.IsStalled);
                writer.Write($"{prefix}ep{i}.inTransfer", endpoint.InTransfer);
            }
        }

        public void Load(StateReader reader, string prefix, int ports)
        {
            Clear();
            IsEnabled = reader.ReadBoolean(prefix + "enabled");
            if (!IsEnabled)
            {
                return;
            }

            State = (byte)reader.ReadBounded(prefix + "state", 3);
            Port = (int)reader.ReadBounded(prefix + "port", (ulong)ports);
            for (int i = 1; i < Endpoints.Length; i++)
            {
                Endpoint endpoint = Endpoints[i];
                endpoint.State = (EndpointState)reader.ReadBounded($"{prefix}ep{i}.state", 3);
                if (endpoint.State == EndpointState.Disabled)
                {
                    continue;
                }

                endpoint.Dequeue = reader.ReadUInt64($"{prefix}ep{i}.dequeue") & ~15UL;
                endpoint.Cycle = reader.ReadBoolean($"{prefix}ep{i}.cycle");
                reader.ReadBytes($"{prefix}ep{i}.setup", endpoint.Setup);
                ReadOnlySpan<byte> data = reader.ReadBytes($"{prefix}ep{i}.data");
                if (data.Length > MaximumControlBytes)
                {
                    throw new StateException($"{reader.Section}.{prefix}ep{i}.data: {data.Length} bytes");
                }

                endpoint.Data = data.ToArray();
                endpoint.DataAt = (int)reader.ReadBounded($"{prefix}ep{i}.at", (ulong)data.Length);
                endpoint.Transferred = reader.ReadUInt32($"{prefix}ep{i}.transferred");
                endpoint.IsStalled = reader.ReadBoolean($"{prefix}ep{i}.stalled");
                endpoint.InTransfer = reader.ReadBoolean($"{prefix}ep{i}.inTransfer");
            }
        }
    }

    // Dword registers; 64-bit accesses are two dwords, low first (§5.1), narrower reads get their part.
    private sealed class Window : IRegisterWindow
    {
        private readonly Xhci _owner;

        public Window(Xhci owner) => _owner = owner;

        public uint Length => 0x4000;

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_owner._gate)
            {
                if (width == AccessWidth.Qword)
                {
                    uint low = _owner.ReadRegister(offset & ~3u);
                    return low | ((ulong)_owner.ReadRegister((offset & ~3u) + 4) << 32);
                }

                ulong value = _owner.ReadRegister(offset & ~3u) >> (int)(8 * (offset & 3));
                return value & ((1UL << (8 * (int)width)) - 1);
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            if (width < AccessWidth.Dword || (offset & 3) != 0)
            {
                return;
            }

            lock (_owner._gate)
            {
                _owner.WriteRegister(offset, (uint)value);
                if (width == AccessWidth.Qword)
                {
                    _owner.WriteRegister(offset + 4, (uint)(value >> 32));
                }
            }
        }
    }
}

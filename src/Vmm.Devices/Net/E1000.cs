// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Pci;

namespace Vmm.Devices.Net;

/// <summary>
/// Intel 82540EM ("PRO/1000 MT Desktop"), by Intel's "PCI/PCI-X Family of Gigabit Ethernet Controllers Software
/// Developer's Manual" (317453), sections named below as SDM. Transmit work runs on the card's own thread after a write
/// to TDT; received frames are written on the network's thread. Both take the gate for each frame only.
/// </summary>
/// <remarks>
/// Not there: interrupt throttling and delays (interrupts come at once), wake-up, flash, big-endian, split headers. The
/// four bytes of FCS that a driver may ask for are zero.
/// </remarks>
public sealed class E1000 : EthernetCard
{
    private const uint RegisterBytes = 0x20000;
    private const int MaxPerRound = 256;

    private const uint InterruptTxDescriptor = 1 << 0;
    private const uint InterruptTxQueueEmpty = 1 << 1;
    private const uint InterruptLink = 1 << 2;
    private const uint InterruptRxLow = 1 << 4;
    private const uint InterruptRxOverrun = 1 << 6;
    private const uint InterruptRxTimer = 1 << 7;
    private const uint InterruptMdio = 1 << 9;

    private const uint ControlLinkUp = 1 << 6;
    private const uint ControlReset = 1 << 26;
    private const uint ControlVlan = 1 << 30;
    private const uint ControlPhyReset = 1u << 31;
    private const uint ControlInitial = 0x0014_0240;

    private const uint ReceiveEnable = 1 << 1;
    private const uint ReceiveUnicastAll = 1 << 3;
    private const uint ReceiveMulticastAll = 1 << 4;
    private const uint ReceiveLong = 1 << 5;
    private const uint ReceiveBroadcast = 1 << 15;
    private const uint ReceiveVlanFilter = 1 << 18;
    private const uint ReceiveStripCrc = 1 << 26;
    private const uint TransmitEnable = 1 << 1;

    private const byte CommandEnd = 1;
    private const byte CommandInsertChecksum = 4;
    private const byte CommandSegment = 4;
    private const byte CommandReport = 8;
    private const byte CommandExtended = 0x20;
    private const byte CommandVlan = 0x40;

    private const int EepromClock = 1;
    private const int EepromSelect = 2;
    private const int EepromDataIn = 4;
    private const int EepromDataOut = 8;

    private readonly uint[] _values = new uint[RegisterBytes / 4];
    private readonly ushort[] _phy = new ushort[32];
    private readonly byte[] _txFrame = new byte[NetFrames.MaxFrameBytes];
    private readonly byte[] _txSegment = new byte[NetFrames.MaxFrameBytes];
    private uint _ioAddress;

    // The frame that is being gathered from descriptors, and the last context descriptor (SDM §3.3.6).
    private int _txLength;
    private bool _txOverrun;
    private uint _context0;
    private uint _context1;
    private uint _context2;
    private uint _context3;
    private byte _txOptions;
    private bool _txSegmented;
    private bool _txIsIp;

    /// <summary>Makes a card on a network, which it owns.</summary>
    /// <param name="id">Name.</param>
    /// <param name="backend">The network.</param>
    /// <param name="mac">Six bytes, stored in the EEPROM.</param>
    /// <param name="inline">Transmit on the thread that writes TDT: for tests.</param>
    public E1000(string id, INetBackend backend, ReadOnlySpan<byte> mac, bool inline = false)
        : base(id, new PciIdentity(0x8086, 0x100E, 0x020000, 3, 0x8086, 0x001E), backend, mac, 0, inline)
    {
        FillEeprom(mac);
        AddBar(0, PciBarKind.Memory32, new MemoryWindow(this));
        AddBar(1, PciBarKind.Io, new IoWindow(this));
        ResetRegisters();
    }

    // Byte offsets of registers (SDM §13.2).
    private enum Reg : uint
    {
        Control = 0x0000,
        Status = 0x0008,
        Eecd = 0x0010,
        Eerd = 0x0014,
        Mdic = 0x0020,
        Icr = 0x00C0,
        Ics = 0x00C8,
        Ims = 0x00D0,
        Imc = 0x00D8,
        Rctl = 0x0100,
        Tctl = 0x0400,
        Pba = 0x1000,
        Rdbal = 0x2800,
        Rdbah = 0x2804,
        Rdlen = 0x2808,
        Rdh = 0x2810,
        Rdt = 0x2818,
        Tdbal = 0x3800,
        Tdbah = 0x3804,
        Tdlen = 0x3808,
        Tdh = 0x3810,
        Tdt = 0x3818,
        StatsFirst = 0x4000,
        GoodReceived = 0x4074,
        GoodTransmitted = 0x4080,
        TotalReceived = 0x40D0,
        TotalTransmitted = 0x40D4,
        StatsLast = 0x4124,
        Mta = 0x5200,
        Ra = 0x5400,
        Vfta = 0x5600,
    }

    /// <inheritdoc/>
    public override int StateVersion => 1;

    private protected override bool Listens =>
        (this[Reg.Rctl] & ReceiveEnable) != 0 && (this[Reg.Control] & ControlLinkUp) != 0;

    /// <inheritdoc/>
    protected override void SaveCard(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (Gate)
        {
            byte[] values = new byte[_values.Length * 4];
            for (int i = 0; i < _values.Length; i++)
            {
                BinaryPrimitives.WriteUInt32LittleEndian(values.AsSpan(i * 4), _values[i]);
            }

            writer.WriteBytes("e1000.registers", values);
            byte[] phy = new byte[64];
            for (int i = 0; i < 32; i++)
            {
                BinaryPrimitives.WriteUInt16LittleEndian(phy.AsSpan(i * 2), _phy[i]);
            }

            writer.WriteBytes("e1000.phy", phy);
            writer.Write("e1000.io-address", _ioAddress);
            Eeprom.Save(writer, "e1000");
            writer.WriteBytes("e1000.tx-frame", _txFrame.AsSpan(0, _txLength));
            writer.Write("e1000.tx-overrun", _txOverrun);
            writer.Write("e1000.context0", _context0);
            writer.Write("e1000.context1", _context1);
            writer.Write("e1000.context2", _context2);
            writer.Write("e1000.context3", _context3);
            writer.Write("e1000.tx-options", _txOptions);
            writer.Write("e1000.tx-segmented", _txSegmented);
            writer.Write("e1000.tx-is-ip", _txIsIp);
        }
    }

    /// <inheritdoc/>
    protected override void LoadCard(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (Gate)
        {
            ReadOnlySpan<byte> values = reader.ReadBytes("e1000.registers");
            if (values.Length != _values.Length * 4)
            {
                throw new StateException($"{reader.Section}.e1000.registers: {values.Length} bytes, expected {_values.Length * 4}");
            }

            for (int i = 0; i < _values.Length; i++)
            {
                _values[i] = BinaryPrimitives.ReadUInt32LittleEndian(values[(i * 4)..]);
            }

            Span<byte> phy = stackalloc byte[64];
            reader.ReadBytes("e1000.phy", phy);
            for (int i = 0; i < 32; i++)
            {
                _phy[i] = BinaryPrimitives.ReadUInt16LittleEndian(phy[(i * 2)..]);
            }

            _ioAddress = reader.ReadUInt32("e1000.io-address");
            Eeprom.Load(reader, "e1000");
            ReadOnlySpan<byte> frame = reader.ReadBytes("e1000.tx-frame");
            _txLength = Math.Min(frame.Length, _txFrame.Length);
            frame[.._txLength].CopyTo(_txFrame);
            _txOverrun = reader.ReadBoolean("e1000.tx-overrun");
            _context0 = reader.ReadUInt32("e1000.context0");
            _context1 = reader.ReadUInt32("e1000.context1");
            _context2 = reader.ReadUInt32("e1000.context2");
            _context3 = reader.ReadUInt32("e1000.context3");
            _txOptions = reader.ReadByte("e1000.tx-options");
            _txSegmented = reader.ReadBoolean("e1000.tx-segmented");
            _txIsIp = reader.ReadBoolean("e1000.tx-is-ip");
            UpdateInterrupt();
        }
    }

    private uint this[Reg register]
    {
        get => _values[(uint)register / 4];
        set => _values[(uint)register / 4] = value;
    }

    private static ulong Ring(uint low, uint high) => ((ulong)high << 32) | (low & ~0xFu);

    // SDM §5.6: address, compatibility, identifiers, and a sum of 0xBABA.
    private void FillEeprom(ReadOnlySpan<byte> mac)
    {
        for (int i = 0; i < 3; i++)
        {
            Eeprom[i] = BinaryPrimitives.ReadUInt16LittleEndian(mac[(2 * i)..]);
        }

        Eeprom[0x0A] = 0x4408;
        Eeprom[0x0B] = 0x001E;
        Eeprom[0x0C] = 0x8086;
        Eeprom[0x0D] = 0x100E;
        Eeprom[0x0E] = 0x8086;
        Eeprom[0x0F] = 0x3040;
        ushort sum = 0;
        for (int i = 0; i < Eeprom93C46.Words - 1; i++)
        {
            sum += Eeprom[i];
        }

        Eeprom[Eeprom93C46.Words - 1] = (ushort)(0xBABA - sum);
    }

    private protected override void ResetRegisters()
    {
        Array.Clear(_values);
        this[Reg.Control] = ControlInitial;
        this[Reg.Pba] = 0x0010_0030;
        this[Reg.Ra] = Eeprom[0] | ((uint)Eeprom[1] << 16);
        _values[((uint)Reg.Ra / 4) + 1] = Eeprom[2] | (1u << 31);
        Eeprom.Deselect();
        _txLength = 0;
        _txOverrun = false;
        _ioAddress = 0;
        ResetPhy();
        UpdateInterrupt();
    }

    // M88E1011, the PHY inside (IEEE 802.3 clause 22): link up at 1 Gbit/s, full duplex.
    private void ResetPhy()
    {
        Array.Clear(_phy);
        _phy[0] = 0x1140;
        _phy[1] = 0x796D;
        _phy[2] = 0x0141;
        _phy[3] = 0x0C20;
        _phy[4] = 0x0DE1;
        _phy[5] = 0x45E1;
        _phy[6] = 0x0001;
        _phy[9] = 0x0E00;
        _phy[10] = 0x3C00;
        _phy[15] = 0x3000;
        _phy[16] = 0x0360;
        _phy[17] = 0xAC08;
        _phy[20] = 0x0D60;
    }

    private void Interrupt(uint cause)
    {
        this[Reg.Icr] |= cause;
        UpdateInterrupt();
    }

    private void UpdateInterrupt() => Intx.Set((this[Reg.Icr] & this[Reg.Ims]) != 0);

    private uint ReadRegister(uint offset)
    {
        lock (Gate)
        {
            var register = (Reg)offset;
            switch (register)
            {
                case Reg.Status:
                    // Full duplex, link as told, 1000 Mbit/s.
                    return 0x0000_0781u | ((this[Reg.Control] & ControlLinkUp) != 0 ? 2u : 0);
                case Reg.Icr:
                    uint causes = this[Reg.Icr];
                    causes |= (causes & this[Reg.Ims]) != 0 ? 1u << 31 : 0;
                    this[Reg.Icr] = 0; // SDM §13.4.17: reading clears
                    UpdateInterrupt();
                    return causes;
                case Reg.Eecd:
                    return (this[Reg.Eecd] & 0x77u) | (Eeprom.DataOut ? (uint)EepromDataOut : 0) | 0x100
                        | ((this[Reg.Eecd] & 0x40) << 1); // a request is granted at once
                case Reg.Ics:
                case Reg.Imc:
                    return 0;
                case >= Reg.StatsFirst and <= Reg.StatsLast:
                    uint count = this[register];
                    this[register] = 0;
                    return count;
                default:
                    return this[register];
            }
        }
    }

    private void WriteRegister(uint offset, uint value)
    {
        bool transmit = false;
        bool resume = false;
        lock (Gate)
        {
            var register = (Reg)offset;
            switch (register)
            {
                case Reg.Control:
                    WriteControl(value);
                    break;
                case Reg.Status:
                case >= Reg.StatsFirst and <= Reg.StatsLast:
                    break;
                case Reg.Eecd:
                    WriteEecd(value);
                    break;
                case Reg.Eerd:
                    if ((value & 1) != 0)
                    {
                        value = (value & 0xFF00) | 0x10 | ((uint)Eeprom[(int)(value >> 8)] << 16);
                    }

                    this[register] = value;
                    break;
                case Reg.Mdic:
                    WriteMdic(value);
                    break;
                case Reg.Icr:
                    this[Reg.Icr] &= ~value;
                    UpdateInterrupt();
                    break;
                case Reg.Ics:
                    Interrupt(value & 0x1FFFF);
                    break;
                case Reg.Ims:
                    this[Reg.Ims] |= value & 0x1FFFF;
                    UpdateInterrupt();
                    break;
                case Reg.Imc:
                    this[Reg.Ims] &= ~value;
                    UpdateInterrupt();
                    break;
                case Reg.Rdlen:
                case Reg.Tdlen:
                    this[register] = value & 0xFFF80;
                    break;
                case Reg.Rdh:
                case Reg.Tdh:
                    this[register] = value & 0xFFFF;
                    break;
                case Reg.Rdt:
                case Reg.Rctl:
                    this[register] = register == Reg.Rdt ? value & 0xFFFF : value;
                    resume = TakeStall() || register == Reg.Rctl;
                    break;
                case Reg.Tdt:
                case Reg.Tctl:
                    this[register] = register == Reg.Tdt ? value & 0xFFFF : value;
                    transmit = true;
                    break;
                default:
                    this[register] = value;
                    break;
            }
        }

        if (transmit)
        {
            KickTransmit();
        }

        if (resume)
        {
            ResumeReceive();
        }
    }

    private void WriteControl(uint value)
    {
        if ((value & ControlReset) != 0)
        {
            ResetRegisters();
            return;
        }

        bool linkWas = (this[Reg.Control] & ControlLinkUp) != 0;
        if ((value & ControlPhyReset) != 0)
        {
            ResetPhy();
        }

        this[Reg.Control] = value & ~ControlPhyReset;
        if (!linkWas && (value & ControlLinkUp) != 0)
        {
            Interrupt(InterruptLink);
        }
    }

    // The wires of the EEPROM (SDM §5.3.1).
    private void WriteEecd(uint value)
    {
        uint before = this[Reg.Eecd];
        this[Reg.Eecd] = value & 0x77;
        if ((value & EepromSelect) == 0)
        {
            Eeprom.Deselect();
        }
        else if ((before & EepromClock) == 0 && (value & EepromClock) != 0)
        {
            Eeprom.Clock((value & EepromDataIn) != 0);
        }
    }

    // SDM §13.4.8: PHY 1; reads of others fail.
    private void WriteMdic(uint value)
    {
        int register = (int)(value >> 16) & 31;
        bool ours = ((value >> 21) & 31) == 1;
        uint result = (value & 0x2FFF_FFFF) | (1u << 28);
        switch ((value >> 26) & 3)
        {
            case 1 when ours:
                // A reset and a new negotiation are done at once.
                _phy[register] = register == 0 ? (ushort)(value & 0x5DFF) : register is 1 or 2 or 3 or 17 ? _phy[register] : (ushort)value;
                if (register == 0 && (value & 0x8000) != 0)
                {
                    ResetPhy();
                }

                break;
            case 2 when ours:
                result = (result & ~0xFFFFu) | _phy[register];
                break;
            default:
                result |= 1u << 30;
                break;
        }

        this[Reg.Mdic] = result;
        if ((value & (1 << 29)) != 0)
        {
            Interrupt(InterruptMdio);
        }
    }

    // On the worker. A bounded round; the rest of a long ring gets another.
    private protected override void Transmit()
    {
        Span<byte> descriptor = stackalloc byte[16];
        uint causes = 0;
        for (int i = 0; ; i++)
        {
            ulong at;
            bool send;
            lock (Gate)
            {
                uint count = this[Reg.Tdlen] / 16;
                uint head = this[Reg.Tdh];
                if ((this[Reg.Tctl] & TransmitEnable) == 0 || head == this[Reg.Tdt] || head >= count
                    || this[Reg.Tdt] >= count)
                {
                    if (causes != 0)
                    {
                        Interrupt(causes | InterruptTxQueueEmpty);
                    }

                    return;
                }

                if (i == MaxPerRound)
                {
                    Interrupt(causes);
                    break;
                }

                at = Ring(this[Reg.Tdbal], this[Reg.Tdbah]) + (16 * head);
                if (!Dma.TryRead(at, descriptor))
                {
                    DropTransmitted();
                    this[Reg.Tdh] = this[Reg.Tdt]; // the ring is not in memory: nothing more can come of it
                    continue;
                }

                send = Gather(descriptor);
            }

            if (send)
            {
                SendFrame();
            }

            lock (Gate)
            {
                byte command = descriptor[11];
                if ((command & CommandReport) != 0)
                {
                    descriptor[12] |= 1; // done
                    Dma.TryWrite(at + 12, descriptor.Slice(12, 1));
                    causes |= InterruptTxDescriptor;
                }

                uint count = this[Reg.Tdlen] / 16;
                this[Reg.Tdh] = this[Reg.Tdh] + 1 >= count ? 0 : this[Reg.Tdh] + 1;
            }
        }

        KickTransmit();
    }

    // Under the gate. True when a frame is complete.
    private bool Gather(Span<byte> descriptor)
    {
        uint low = BinaryPrimitives.ReadUInt32LittleEndian(descriptor[8..]);
        byte command = (byte)(low >> 24);
        bool extended = (command & CommandExtended) != 0;
        if (extended && ((low >> 20) & 15) == 0)
        {
            _context0 = BinaryPrimitives.ReadUInt32LittleEndian(descriptor);
            _context1 = BinaryPrimitives.ReadUInt32LittleEndian(descriptor[4..]);
            _context2 = low;
            _context3 = BinaryPrimitives.ReadUInt32LittleEndian(descriptor[12..]);
            return false;
        }

        int length = (int)(extended ? low & 0xFFFFF : low & 0xFFFF);
        if (_txLength == 0 && !_txOverrun)
        {
            // Options come with the first descriptor of a frame (SDM §3.3.7).
            _txOptions = extended ? descriptor[13] : (byte)0;
            _txSegmented = extended && (command & CommandSegment) != 0;
            _txIsIp = (_context2 >> 25 & 1) != 0;
        }

        ulong address = BinaryPrimitives.ReadUInt64LittleEndian(descriptor);
        if (_txOverrun || length > _txFrame.Length - _txLength
            || !Dma.TryRead(address, _txFrame.AsSpan(_txLength, length)))
        {
            _txOverrun = true;
        }
        else
        {
            _txLength += length;
        }

        if ((command & CommandEnd) == 0)
        {
            return false;
        }

        if (!extended && (command & CommandInsertChecksum) != 0)
        {
            // Legacy checksum: from CSS to the end, stored at CSO (SDM §3.3.3).
            var offload = new NetOffload(true, descriptor[13], (ushort)Math.Max(0, descriptor[10] - descriptor[13]), 0, 0, 0);
            NetFrames.TryCompleteChecksum(_txFrame.AsSpan(0, _txLength), offload);
        }

        if ((command & CommandVlan) != 0 && (this[Reg.Control] & ControlVlan) != 0)
        {
            InsertVlan(BinaryPrimitives.ReadUInt16LittleEndian(descriptor[14..]));
        }

        return true;
    }

    private void InsertVlan(ushort tag)
    {
        if (_txLength < 14 || _txLength + 4 > _txFrame.Length)
        {
            return;
        }

        _txFrame.AsSpan(12, _txLength - 12).CopyTo(_txFrame.AsSpan(16));
        BinaryPrimitives.WriteUInt16BigEndian(_txFrame.AsSpan(12), 0x8100);
        BinaryPrimitives.WriteUInt16BigEndian(_txFrame.AsSpan(14), tag);
        _txLength += 4;
    }

    // On the worker, without the gate: a back end may be called.
    private void SendFrame()
    {
        Span<byte> frame = _txFrame.AsSpan(0, _txLength);
        bool usable = !_txOverrun && frame.Length >= 14;
        NetOffload offload = default;
        if (usable)
        {
            usable = TryFinish(frame, out offload);
        }

        _txLength = 0;
        _txOverrun = false;
        if (!usable)
        {
            DropTransmitted();
            return;
        }

        lock (Gate)
        {
            this[Reg.GoodTransmitted]++;
            this[Reg.TotalTransmitted]++;
        }

        if (Backend.CanOffload || offload == default)
        {
            Backend.Send(frame, offload);
            return;
        }

        if (offload.SegmentKind == 0)
        {
            NetFrames.TryCompleteChecksum(frame, offload);
            Backend.Send(frame, default);
            return;
        }

        int position = 0;
        while (NetFrames.TryNextSegment(frame, offload, ref position, _txSegment, out int length))
        {
            Backend.Send(_txSegment.AsSpan(0, length), default);
        }
    }

    // Turns the context descriptor into what a network understands (SDM §3.3.6, §3.5).
    private bool TryFinish(Span<byte> frame, out NetOffload offload)
    {
        const byte InsertIp = 1;
        const byte InsertTransport = 2;
        offload = default;
        int vlan = BinaryPrimitives.ReadUInt16BigEndian(frame[12..]) == 0x8100 ? 4 : 0;
        int ip = (byte)_context0;
        int ipField = (byte)(_context0 >> 8);
        int transport = (byte)_context1;
        int field = (byte)(_context1 >> 8);
        if (vlan != 0 && ip == 14)
        {
            (ip, ipField, transport, field) = (ip + 4, ipField + 4, transport + 4, field + 4);
        }

        if (_txSegmented)
        {
            int mss = (int)(_context3 >> 16);
            int header = (byte)(_context3 >> 8) + (ip == 18 ? vlan : 0);
            bool sane = mss > 0 && header < frame.Length && ip + 20 <= transport && transport + 20 <= frame.Length
                && field == transport + 16 && frame.Length - ip <= 65535;
            if (!sane)
            {
                return false;
            }

            // The driver leaves the length out of the IP header and of the pseudo header's sum.
            int length = frame.Length - transport;
            if (_txIsIp)
            {
                BinaryPrimitives.WriteUInt16BigEndian(frame[(ip + 2)..], (ushort)(frame.Length - ip));
                frame[ip + 10] = 0;
                frame[ip + 11] = 0;
                BinaryPrimitives.WriteUInt16BigEndian(
                    frame[(ip + 10)..], NetFrames.Checksum(frame.Slice(ip, Math.Min((frame[ip] & 15) * 4, frame.Length - ip))));
            }
            else
            {
                BinaryPrimitives.WriteUInt16BigEndian(frame[(ip + 4)..], (ushort)(frame.Length - ip - 40));
            }

            uint sum = BinaryPrimitives.ReadUInt16BigEndian(frame[field..]);
            BinaryPrimitives.WriteUInt16BigEndian(frame[field..], (ushort)NetFrames.Sum([], sum + (uint)length));
            offload = new NetOffload(
                true, (ushort)transport, 16, _txIsIp ? (byte)1 : (byte)4, (ushort)mss, (ushort)header);
            return true;
        }

        if ((_txOptions & InsertIp) != 0 && ip + 20 <= frame.Length && ipField + 2 <= frame.Length)
        {
            int length = Math.Min((frame[ip] & 15) * 4, frame.Length - ip);
            frame[ipField] = 0;
            frame[ipField + 1] = 0;
            BinaryPrimitives.WriteUInt16BigEndian(frame[ipField..], NetFrames.Checksum(frame.Slice(ip, length)));
        }

        if ((_txOptions & InsertTransport) != 0)
        {
            if (field < transport || field + 2 > frame.Length)
            {
                return false;
            }

            offload = new NetOffload(true, (ushort)transport, (ushort)(field - transport), 0, 0, 0);
        }

        return true;
    }

    // Receive filters: exact addresses, a hash of multicast ones, VLANs.
    private protected override bool IsWanted(ReadOnlySpan<byte> frame)
    {
        uint rctl = this[Reg.Rctl];
        if (frame.Length > 1522 && (rctl & ReceiveLong) == 0)
        {
            return false;
        }

        if ((rctl & ReceiveVlanFilter) != 0 && BinaryPrimitives.ReadUInt16BigEndian(frame[12..]) == 0x8100 && frame.Length >= 16)
        {
            uint vlan = BinaryPrimitives.ReadUInt16BigEndian(frame[14..]) & 0xFFFu;
            if ((_values[((uint)Reg.Vfta / 4) + (vlan >> 5)] & (1u << (int)(vlan & 31))) == 0)
            {
                return false;
            }
        }

        bool group = (frame[0] & 1) != 0;
        if ((rctl & (group ? ReceiveMulticastAll : ReceiveUnicastAll)) != 0)
        {
            return true;
        }

        if (frame[..6].IndexOfAnyExcept((byte)0xFF) < 0)
        {
            return (rctl & ReceiveBroadcast) != 0;
        }

        uint low = BinaryPrimitives.ReadUInt32LittleEndian(frame);
        uint high = BinaryPrimitives.ReadUInt16LittleEndian(frame[4..]);
        uint first = (uint)Reg.Ra / 4;
        for (uint i = 0; i < 16; i++)
        {
            uint entry = _values[first + (2 * i) + 1];
            if (entry >> 31 != 0 && (entry & 0xFFFF) == high && _values[first + (2 * i)] == low)
            {
                return true;
            }
        }

        if (!group)
        {
            return false;
        }

        int shift = ((rctl >> 12) & 3) switch
        {
            0 => 4,
            1 => 3,
            2 => 2,
            _ => 0,
        };
        uint hash = ((uint)(frame[4] | (frame[5] << 8)) >> shift) & 0xFFF;
        return (_values[((uint)Reg.Mta / 4) + (hash >> 5)] & (1u << (int)(hash & 31))) != 0;
    }

    private int BufferBytes()
    {
        uint rctl = this[Reg.Rctl];
        int size = 2048 >> (int)((rctl >> 16) & 3);
        return (rctl & (1 << 25)) != 0 ? size * 16 : size;
    }

    private protected override bool Deliver(int length)
    {
        ushort tag = 0;
        bool tagged = (this[Reg.Control] & ControlVlan) != 0 && length >= 18
            && BinaryPrimitives.ReadUInt16BigEndian(RxFrame.AsSpan(12)) == 0x8100;
        if (tagged)
        {
            tag = BinaryPrimitives.ReadUInt16BigEndian(RxFrame.AsSpan(14));
            RxFrame.AsSpan(16, length - 16).CopyTo(RxFrame.AsSpan(12));
            length -= 4;
        }

        if (length < 60)
        {
            RxFrame.AsSpan(length, 60 - length).Clear();
            length = 60;
        }

        if ((this[Reg.Rctl] & ReceiveStripCrc) == 0)
        {
            RxFrame.AsSpan(length, 4).Clear();
            length += 4;
        }

        uint count = this[Reg.Rdlen] / 16;
        uint head = this[Reg.Rdh];
        uint tail = this[Reg.Rdt];
        int buffer = BufferBytes();
        if (head >= count || tail >= count)
        {
            return true; // no ring: lost
        }

        uint free = tail >= head ? tail - head : count - head + tail;
        if (free * (long)buffer < length)
        {
            Stall();
            Interrupt(InterruptRxOverrun);
            return false;
        }

        Span<byte> descriptor = stackalloc byte[16];
        ulong ring = Ring(this[Reg.Rdbal], this[Reg.Rdbah]);
        for (int done = 0; done < length;)
        {
            int take = Math.Min(buffer, length - done);
            ulong at = ring + (16 * head);
            if (!Dma.TryRead(at, descriptor)
                || !Dma.TryWrite(BinaryPrimitives.ReadUInt64LittleEndian(descriptor), RxFrame.AsSpan(done, take)))
            {
                DropReceived();
            }

            done += take;
            descriptor[8..].Clear();
            BinaryPrimitives.WriteUInt16LittleEndian(descriptor[8..], (ushort)take);

            // Done, end of packet, checksum not looked at, VLAN (SDM §3.2.3.1).
            descriptor[12] = (byte)(1 | (done == length ? 2 : 0) | 4 | (tagged ? 8 : 0));
            BinaryPrimitives.WriteUInt16LittleEndian(descriptor[14..], tag);
            Dma.TryWrite(at + 8, descriptor.Slice(8, 4));
            Dma.TryWrite(at + 14, descriptor.Slice(14, 2));
            Volatile.WriteBarrier(); // everything before the bit that says so
            Dma.TryWrite(at + 12, descriptor.Slice(12, 2));
            head = head + 1 >= count ? 0 : head + 1;
            free--;
        }

        this[Reg.Rdh] = head;
        this[Reg.GoodReceived]++;
        this[Reg.TotalReceived]++;
        int threshold = 1 << (int)(1 + ((this[Reg.Rctl] >> 8) & 3));
        Interrupt(InterruptRxTimer | (free <= count / (uint)threshold ? InterruptRxLow : 0));
        return true;
    }

    private sealed class MemoryWindow : IRegisterWindow
    {
        private readonly E1000 _owner;

        public MemoryWindow(E1000 owner) => _owner = owner;

        public uint Length => RegisterBytes;

        // Registers are 32 bits wide (SDM §13.1); narrower reads get their part, narrower writes are ignored.
        public ulong Read(uint offset, AccessWidth width)
        {
            ulong value = _owner.ReadRegister(offset & ~3u);
            if (width == AccessWidth.Qword)
            {
                return (offset & 3) == 0 && offset + 4 < RegisterBytes
                    ? value | ((ulong)_owner.ReadRegister((offset & ~3u) + 4) << 32)
                    : value;
            }

            ulong mask = (1UL << (8 * (int)width)) - 1;
            return (value >> (int)(8 * (offset & 3))) & mask;
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            if ((offset & 3) != 0 || width < AccessWidth.Dword)
            {
                return;
            }

            _owner.WriteRegister(offset, (uint)value);
            if (width == AccessWidth.Qword)
            {
                _owner.WriteRegister(offset + 4, (uint)(value >> 32));
            }
        }
    }

    // I/O-mapped access: an address register and a data register.
    private sealed class IoWindow : IRegisterWindow
    {
        private readonly E1000 _owner;

        public IoWindow(E1000 owner) => _owner = owner;

        public uint Length => 64;

        public ulong Read(uint offset, AccessWidth width)
        {
            uint address = Volatile.Read(ref _owner._ioAddress);
            uint value = offset switch
            {
                < 4 => address,
                < 8 when address <= RegisterBytes - 4 => _owner.ReadRegister(address & ~3u),
                _ => 0,
            };
            ulong mask = width >= AccessWidth.Dword ? uint.MaxValue : (1UL << (8 * (int)width)) - 1;
            return (value >> (int)(8 * (offset & 3))) & mask;
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            if (width != AccessWidth.Dword)
            {
                return;
            }

            uint address = Volatile.Read(ref _owner._ioAddress);
            if (offset == 0)
            {
                Volatile.Write(ref _owner._ioAddress, (uint)value);
            }
            else if (offset == 4 && address <= RegisterBytes - 4)
            {
                _owner.WriteRegister(address & ~3u, (uint)value);
            }
        }
    }
}

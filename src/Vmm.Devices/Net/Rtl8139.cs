// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using Vmm.Core;
using Vmm.Devices.Pci;

namespace Vmm.Devices.Net;

/// <summary>
/// Realtek RTL8139C, by the "RTL8139C(L) data sheet", sections named below. Four transmit descriptors in registers, one
/// receive buffer that is a ring of bytes. Transmit work runs on the card's thread, received frames are written on the
/// network's.
/// </summary>
/// <remarks>
/// Not there: the C+ mode with descriptor rings (the revision says so, and drivers then use the old mode), wake-up, flash
/// and CardBus. The FCS behind received frames is zero.
/// </remarks>
public sealed class Rtl8139 : EthernetCard
{
    private const int RegisterBytes = 256;
    private const int Descriptors = 4;
    private const int MaxFrameBytes = 1792;
    private const int FrameHeaderBytes = 4;

    private const int Idr = 0x00;
    private const int Mar = 0x08;
    private const int Tsd = 0x10;
    private const int Tsad = 0x20;
    private const int Rbstart = 0x30;
    private const int Cr = 0x37;
    private const int Capr = 0x38;
    private const int Cbr = 0x3A;
    private const int Imr = 0x3C;
    private const int Isr = 0x3E;
    private const int Tcr = 0x40;
    private const int Rcr = 0x44;
    private const int Mpc = 0x4C;
    private const int Eecr = 0x50;
    private const int Config1 = 0x52;
    private const int Msr = 0x58;
    private const int Tsads = 0x60;
    private const int Bmcr = 0x62;
    private const int Bmsr = 0x64;
    private const int Anar = 0x66;
    private const int Anlpar = 0x68;
    private const int Aner = 0x6A;

    private const byte CommandBufferEmpty = 1;
    private const byte CommandTransmit = 4;
    private const byte CommandReceive = 8;
    private const byte CommandReset = 0x10;

    private const ushort InterruptRxOk = 1 << 0;
    private const ushort InterruptTxOk = 1 << 2;
    private const ushort InterruptTxError = 1 << 3;
    private const ushort InterruptRxOverflow = 1 << 4;

    private const uint TxOwn = 1 << 13;
    private const uint TxOk = 1 << 15;
    private const uint TxAborted = 1 << 30;
    private const uint HardwareVersion = 0x7400_0000; // RTL8139C

    private const uint AcceptAll = 1;
    private const uint AcceptOurs = 2;
    private const uint AcceptMulticast = 4;
    private const uint AcceptBroadcast = 8;
    private const uint NoWrap = 1 << 7;

    private readonly byte[] _registers = new byte[RegisterBytes];
    private readonly byte[] _mac = new byte[6];
    private readonly byte[] _txFrame = new byte[MaxFrameBytes];
    private int _next;

    /// <summary>Makes a card on a network, which it owns.</summary>
    /// <param name="id">Name.</param>
    /// <param name="backend">The network.</param>
    /// <param name="mac">Six bytes, stored in the EEPROM.</param>
    /// <param name="inline">Transmit on the thread that writes the descriptor: for tests.</param>
    public Rtl8139(string id, INetBackend backend, ReadOnlySpan<byte> mac, bool inline = false)
        : base(
            id, new PciIdentity(0x10EC, 0x8139, 0x020000, 0x10, 0x10EC, 0x8139), backend, mac, FrameHeaderBytes, inline)
    {
        mac.CopyTo(_mac);
        Eeprom[0] = 0x8129;
        Eeprom[1] = 0x10EC;
        Eeprom[2] = 0x8139;
        for (int i = 0; i < 3; i++)
        {
            Eeprom[7 + i] = BinaryPrimitives.ReadUInt16LittleEndian(mac[(2 * i)..]);
        }

        var window = new Window(this);
        AddBar(0, PciBarKind.Io, window);
        AddBar(1, PciBarKind.Memory32, window);
        ResetRegisters();
    }

    /// <inheritdoc/>
    public override int StateVersion => 1;

    private protected override bool Listens => (_registers[Cr] & CommandReceive) != 0;

    /// <inheritdoc/>
    protected override void SaveCard(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (Gate)
        {
            writer.WriteBytes("rtl.registers", _registers);
            writer.Write("rtl.next", (ulong)_next);
            Eeprom.Save(writer, "rtl");
        }
    }

    /// <inheritdoc/>
    protected override void LoadCard(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (Gate)
        {
            reader.ReadBytes("rtl.registers", _registers);
            _next = (int)reader.ReadBounded("rtl.next", Descriptors - 1);
            Eeprom.Load(reader, "rtl");
            UpdateInterrupt();
        }
    }

    private ushort Get16(int at) => BinaryPrimitives.ReadUInt16LittleEndian(_registers.AsSpan(at));

    private uint Get32(int at) => BinaryPrimitives.ReadUInt32LittleEndian(_registers.AsSpan(at));

    private void Set16(int at, ushort value) => BinaryPrimitives.WriteUInt16LittleEndian(_registers.AsSpan(at), value);

    private void Set32(int at, uint value) => BinaryPrimitives.WriteUInt32LittleEndian(_registers.AsSpan(at), value);

    private protected override void ResetRegisters()
    {
        Array.Clear(_registers);
        _mac.CopyTo(_registers, Idr);
        for (int i = 0; i < Descriptors; i++)
        {
            Set32(Tsd + (4 * i), TxOwn); // the host owns them
        }

        _registers[Cr] = CommandBufferEmpty;
        Set16(Capr, 0xFFF0);
        Set32(Tcr, HardwareVersion);
        _registers[Config1] = 0x0C;
        _registers[Msr] = 0x10; // link up (the bit says "fail"), 100 Mbit/s
        Set16(Bmcr, 0x3100);
        Set16(Bmsr, 0x782D);
        Set16(Anar, 0x05E1);
        Set16(Anlpar, 0x45E1);
        Set16(Aner, 0x0001);
        _next = 0;
        Eeprom.Deselect();
        UpdateInterrupt();
    }

    private void UpdateInterrupt() => Intx.Set((Get16(Isr) & Get16(Imr)) != 0);

    private void Interrupt(ushort cause)
    {
        Set16(Isr, (ushort)(Get16(Isr) | cause));
        UpdateInterrupt();
    }

    private byte ReadByte(int offset)
    {
        switch (offset)
        {
            case Cr:
                return (byte)((_registers[Cr] & ~CommandBufferEmpty) | (IsEmpty ? CommandBufferEmpty : 0));
            case Eecr:
                return (byte)((_registers[Eecr] & 0xCE) | (Eeprom.DataOut ? 1 : 0));
            case Tsads:
            case Tsads + 1:
                return (byte)(Summary() >> (8 * (offset - Tsads)));
            default:
                return _registers[offset];
        }
    }

    // TSAD: OWN, TABT, TUN and TOK of the four descriptors in one word.
    private ushort Summary()
    {
        int summary = 0;
        for (int i = 0; i < Descriptors; i++)
        {
            uint status = Get32(Tsd + (4 * i));
            summary |= (status & TxOwn) != 0 ? 1 << i : 0;
            summary |= (status & TxAborted) != 0 ? 1 << (4 + i) : 0;
            summary |= (status & TxOk) != 0 ? 1 << (12 + i) : 0;
        }

        return (ushort)summary;
    }

    private int BufferBytes => 8192 << (int)((Get32(Rcr) >> 11) & 3);

    // CAPR is what the driver has read, less 16 for a pipeline that we do not have.
    private int ReadOffset => (Get16(Capr) + 16) & 0xFFFF;

    private bool IsEmpty => Get16(Cbr) == ReadOffset % BufferBytes;

    private protected override bool IsWanted(ReadOnlySpan<byte> frame)
    {
        uint rcr = Get32(Rcr);
        if ((rcr & AcceptAll) != 0)
        {
            return true;
        }

        if (frame[..6].IndexOfAnyExcept((byte)0xFF) < 0)
        {
            return (rcr & AcceptBroadcast) != 0;
        }

        if ((frame[0] & 1) == 0)
        {
            return (rcr & AcceptOurs) != 0 && frame[..6].SequenceEqual(_registers.AsSpan(Idr, 6));
        }

        if ((rcr & AcceptMulticast) == 0)
        {
            return false;
        }

        int bit = (int)(Crc(frame[..6]) >> 26);
        return (_registers[Mar + (bit / 8)] & (1 << (bit & 7))) != 0;
    }

    // The Ethernet CRC, most significant bit first, as the hash of multicast addresses.
    private static uint Crc(ReadOnlySpan<byte> bytes)
    {
        uint crc = uint.MaxValue;
        foreach (byte value in bytes)
        {
            for (int bit = 0; bit < 8; bit++)
            {
                bool carry = (crc >> 31 != 0) != ((value >> bit & 1) != 0);
                crc = (crc << 1) ^ (carry ? 0x04C1_1DB7u : 0);
            }
        }

        return crc;
    }

    // A header of status and length goes before the frame, both rounded up to 4.
    private protected override bool Deliver(int length)
    {
        Span<byte> frame = RxFrame.AsSpan(FrameHeaderBytes);
        if (length < 60)
        {
            frame[length..60].Clear();
            length = 60;
        }

        frame.Slice(length, 4).Clear();
        int withCrc = length + 4;
        int whole = (FrameHeaderBytes + withCrc + 3) & ~3;
        int size = BufferBytes;
        int write = Get16(Cbr) % size;
        int read = ReadOffset % size;
        int free = write == read ? size : (read - write + size) % size;
        if (withCrc > MaxFrameBytes || whole >= size)
        {
            DropReceived();
            return true;
        }

        if (free <= whole)
        {
            // With the overflow the driver has a reason to read the ring. Without one it may wait for ever: it has
            // acknowledged the frames that are in it, and no further one comes while they are there.
            Stall();
            Interrupt(InterruptRxOverflow);
            return false;
        }

        BinaryPrimitives.WriteUInt16LittleEndian(RxFrame, 1); // ROK
        BinaryPrimitives.WriteUInt16LittleEndian(RxFrame.AsSpan(2), (ushort)withCrc);
        ulong start = Get32(Rbstart);
        ReadOnlySpan<byte> data = RxFrame.AsSpan(0, FrameHeaderBytes + withCrc);
        bool overrun = (Get32(Rcr) & NoWrap) != 0 && size < 65536; // the driver left room behind the ring
        int first = overrun ? data.Length : Math.Min(data.Length, size - write);
        bool ok = Dma.TryWrite(start + (uint)write, data[..first])
            && (first == data.Length || Dma.TryWrite(start, data[first..]));
        if (!ok)
        {
            DropReceived();
            return true;
        }

        Set16(Cbr, (ushort)((write + whole) % size));
        Interrupt(InterruptRxOk);
        return true;
    }

    private void Write(int offset, int length, uint value)
    {
        bool transmit = false;
        bool resume = false;
        lock (Gate)
        {
            switch (offset)
            {
                case >= Tsd and < Tsd + 16 when length == 4 && (offset & 3) == 0:
                    // Size and threshold are the driver's, the rest ours; clearing OWN hands it over (data sheet 5.2).
                    Set32(offset, value & 0x003F_3FFF);
                    transmit = (value & TxOwn) == 0;
                    break;
                case >= Tsad and < Tsad + 16 when length == 4 && (offset & 3) == 0:
                case Rbstart when length == 4:
                    Set32(offset, value);
                    break;
                case Cr:
                    if ((value & CommandReset) != 0)
                    {
                        byte[] mac = _registers.AsSpan(Idr, 6).ToArray();
                        ResetRegisters();
                        mac.CopyTo(_registers, Idr);
                        break;
                    }

                    _registers[Cr] = (byte)(value & (CommandTransmit | CommandReceive));
                    resume = true;
                    break;
                case Capr when length >= 2:
                    Set16(Capr, (ushort)value);
                    resume = TakeStall();
                    break;
                case Imr when length >= 2:
                    Set16(Imr, (ushort)value);
                    if (length == 4)
                    {
                        Set16(Isr, (ushort)(Get16(Isr) & ~(value >> 16)));
                    }

                    UpdateInterrupt();
                    break;
                case Isr when length >= 2:
                    Set16(Isr, (ushort)(Get16(Isr) & ~value)); // write one to clear
                    UpdateInterrupt();

                    // The frame that waits comes again, as the next one on a wire would: an overflow that is acknowledged
                    // after the last look at the ring is told of once more.
                    resume = TakeStall();
                    break;
                case Tcr when length == 4:
                    Set32(Tcr, (value & 0x0307_07F0) | HardwareVersion);
                    break;
                case Rcr when length == 4:
                    // Filters change while frames flow; another length of the ring starts it anew.
                    if (((Get32(Rcr) ^ value) & (3 << 11)) != 0)
                    {
                        Set16(Cbr, 0);
                        Set16(Capr, 0xFFF0);
                    }

                    Set32(Rcr, value & 0x0F03_FFFF);
                    resume = true;
                    break;
                case Mpc when length == 4:
                    Set32(Mpc, 0);
                    break;
                case Eecr:
                    WriteEecr((byte)value);
                    break;
                case Bmcr when length >= 2:
                    Set16(Bmcr, (ushort)(value & 0x3100)); // a restart of negotiation is done at once
                    break;
                case >= Idr and < Idr + 6:
                case >= Mar and < Mar + 8:
                case Config1:
                case Config1 + 7:
                case Anar:
                    Store(offset, length, value);
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

    private void Store(int offset, int length, uint value)
    {
        for (int i = 0; i < length && offset + i < RegisterBytes; i++)
        {
            _registers[offset + i] = (byte)(value >> (8 * i));
        }
    }

    // 93C46 in programming mode: chip select 3, clock 2, data in 1, data out 0 (data sheet 5.6).
    private void WriteEecr(byte value)
    {
        byte before = _registers[Eecr];
        _registers[Eecr] = (byte)(value & 0xCE);
        if ((value & 0xC8) != 0x88)
        {
            Eeprom.Deselect();
        }
        else if ((before & 4) == 0 && (value & 4) != 0)
        {
            Eeprom.Clock((value & 2) != 0);
        }
    }

    // On the worker: descriptors go round in order.
    private protected override void Transmit()
    {
        for (int i = 0; i < Descriptors; i++)
        {
            int length;
            bool ok;
            int at;
            lock (Gate)
            {
                at = Tsd + (4 * _next);
                uint status = Get32(at);
                if ((_registers[Cr] & CommandTransmit) == 0 || (status & TxOwn) != 0)
                {
                    return;
                }

                length = (int)(status & 0x1FFF);
                ok = length is >= 14 and <= MaxFrameBytes
                    && Dma.TryRead(Get32(Tsad + (4 * _next)), _txFrame.AsSpan(0, length));
            }

            if (ok)
            {
                Backend.Send(_txFrame.AsSpan(0, length), default);
            }

            lock (Gate)
            {
                if (!ok)
                {
                    DropTransmitted();
                }

                Set32(at, Get32(at) | TxOwn | (ok ? TxOk : TxAborted));
                _next = (_next + 1) % Descriptors;
                Interrupt(ok ? InterruptTxOk : InterruptTxError);
            }
        }

        KickTransmit(); // a driver that is as fast as we are
    }

    private sealed class Window : IRegisterWindow
    {
        private readonly Rtl8139 _owner;

        public Window(Rtl8139 owner) => _owner = owner;

        public uint Length => RegisterBytes;

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_owner.Gate)
            {
                ulong value = 0;
                for (int i = (int)width - 1; i >= 0; i--)
                {
                    value = (value << 8) | _owner.ReadByte((int)offset + i);
                }

                return value;
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            if (width == AccessWidth.Qword)
            {
                _owner.Write((int)offset, 4, (uint)value);
                _owner.Write((int)offset + 4, 4, (uint)(value >> 32));
            }
            else
            {
                _owner.Write((int)offset, (int)width, (uint)value);
            }
        }
    }
}

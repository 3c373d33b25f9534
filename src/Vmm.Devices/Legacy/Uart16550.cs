// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Legacy;

// Theory. National PC16550D UART (data sheet of June 1995, section numbers below are its). Output takes no time: a byte
// written to THR is gone at once, so the transmitter is always empty and THRE interrupts follow each write. Input comes
// from the back end as far as there is room; when the guest makes room the back end is told, outside the gate.
//
// The receive FIFO holds a byte and its error bits per entry. Data below the trigger level raises the character timeout
// after four character times of the programmed rate (§8.4.1), by a guest timer.
//
// PC wiring: CTS, DSR and DCD are asserted while something is attached. On a PC, MCR.OUT2 connects the interrupt; here it is
// always connected, as in QEMU and bhyve, because systems that grew up there (xv6) never set it.

/// <summary>A serial port. See the theory at the top of this file.</summary>
public sealed class Uart16550 : IDevice, IRegisterWindow, ICharReceiver
{
    private const uint Rbr = 0;
    private const uint Ier = 1;
    private const uint Iir = 2;
    private const uint Lcr = 3;
    private const uint Mcr = 4;
    private const uint Lsr = 5;
    private const uint Msr = 6;
    private const uint Scr = 7;

    private const byte IerReceive = 1 << 0;
    private const byte IerTransmit = 1 << 1;
    private const byte IerLine = 1 << 2;
    private const byte IerModem = 1 << 3;

    private const byte LcrBreak = 1 << 6;
    private const byte LcrDivisor = 1 << 7;

    private const byte McrDtr = 1 << 0;
    private const byte McrRts = 1 << 1;
    private const byte McrOut1 = 1 << 2;
    private const byte McrOut2 = 1 << 3;
    private const byte McrLoop = 1 << 4;

    private const byte LsrReady = 1 << 0;
    private const byte LsrOverrun = 1 << 1;
    private const byte LsrErrors = 0x1E;
    private const byte LsrBreak = 1 << 4;
    private const byte LsrEmpty = 0x60;
    private const byte LsrFifoError = 1 << 7;

    private const byte MsrCts = 1 << 4;
    private const byte MsrDsr = 1 << 5;
    private const byte MsrRi = 1 << 6;
    private const byte MsrDcd = 1 << 7;

    private const int FifoBytes = 16;

    private readonly Lock _gate = new();
    private readonly ICharBackend _backend;
    private readonly IIrqLine _irq;
    private readonly IClock _clock;
    private readonly IGuestTimer _timeout;
    private readonly ushort[] _fifo = new ushort[FifoBytes];
    private int _first;
    private int _count;
    private byte _ier;
    private byte _lcr;
    private byte _mcr;
    private byte _fcr;
    private byte _scr;
    private byte _msr;
    private byte _lineErrors;
    private ushort _divisor;
    private bool _transmitPending;
    private bool _timedOut;
    private bool _paused = true;
    private long _droppedBytes;

    /// <summary>Makes a port and attaches it to its back end.</summary>
    /// <param name="id">"com1".</param>
    /// <param name="backend">What is at the other end of the cable.</param>
    /// <param name="clock">Guest time, for the character timeout.</param>
    /// <param name="irq">Its interrupt.</param>
    public Uart16550(string id, ICharBackend backend, IClock clock, IIrqLine irq)
    {
        ArgumentNullException.ThrowIfNull(backend);
        ArgumentNullException.ThrowIfNull(clock);
        Id = id;
        _backend = backend;
        _clock = clock;
        _irq = irq;
        _timeout = clock.CreateTimer(id, OnTimeout);
        backend.Attach(this);
    }

    /// <inheritdoc/>
    public string Id { get; }

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <inheritdoc/>
    public uint Length => 8;

    /// <summary>Input that came without room for it.</summary>
    public long DroppedBytes => Interlocked.Read(ref _droppedBytes);

    /// <inheritdoc/>
    public int RoomBytes
    {
        get
        {
            lock (_gate)
            {
                return Room;
            }
        }
    }

    private bool IsFifo => (_fcr & 1) != 0;

    // In loopback the receiver is cut off from the pin (§8.6); a paused machine takes nothing.
    private int Room => _paused || (_mcr & McrLoop) != 0 ? 0 : (IsFifo ? FifoBytes : 1) - _count;

    private int Trigger => !IsFifo ? 1 : (_fcr >> 6) switch { 0 => 1, 1 => 4, 2 => 8, _ => 14 };

    /// <inheritdoc/>
    public void Receive(ReadOnlySpan<byte> bytes)
    {
        lock (_gate)
        {
            int taken = Math.Min(bytes.Length, Room);
            for (int i = 0; i < taken; i++)
            {
                Push(bytes[i]);
            }

            Interlocked.Add(ref _droppedBytes, bytes.Length - taken);
            Update();
        }
    }

    /// <inheritdoc/>
    public void Reset()
    {
        lock (_gate)
        {
            // Table I (§8.0); SCR and the divisor are not affected there, but a machine starts with them at zero / 1.
            _ier = 0;
            _lcr = 0;
            _mcr = 0;
            _fcr = 0;
            _scr = 0;
            _lineErrors = 0;
            _divisor = 1;
            _transmitPending = false;
            ClearReceiver();
            _msr = MsrCts | MsrDsr | MsrDcd;
            Update();
        }
    }

    /// <inheritdoc/>
    public void Pause()
    {
        lock (_gate)
        {
            _paused = true;
            _timeout.Cancel();
        }
    }

    /// <inheritdoc/>
    public void Resume()
    {
        lock (_gate)
        {
            _paused = false;
            ArmTimeout();
        }

        _backend.ResumeInput();
    }

    /// <inheritdoc/>
    public void Save(StateWriter writer)
    {
        lock (_gate)
        {
            Span<byte> fifo = stackalloc byte[_count * 2];
            for (int i = 0; i < _count; i++)
            {
                ushort entry = _fifo[(_first + i) % FifoBytes];
                fifo[i * 2] = (byte)entry;
                fifo[(i * 2) + 1] = (byte)(entry >> 8);
            }

            writer.WriteBytes("fifo", fifo);
            writer.Write("ier", (ulong)_ier);
            writer.Write("lcr", (ulong)_lcr);
            writer.Write("mcr", (ulong)_mcr);
            writer.Write("fcr", (ulong)_fcr);
            writer.Write("scr", (ulong)_scr);
            writer.Write("msr", (ulong)_msr);
            writer.Write("lineErrors", (ulong)_lineErrors);
            writer.Write("divisor", (ulong)_divisor);
            writer.Write("transmitPending", _transmitPending);
            writer.Write("timedOut", _timedOut);
        }
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        ReadOnlySpan<byte> fifo = reader.ReadBytes("fifo");
        if (fifo.Length > FifoBytes * 2 || (fifo.Length & 1) != 0)
        {
            throw new StateException($"{Id}.fifo: {fifo.Length} bytes");
        }

        lock (_gate)
        {
            _first = 0;
            _count = fifo.Length / 2;
            for (int i = 0; i < _count; i++)
            {
                _fifo[i] = (ushort)(fifo[i * 2] | ((fifo[(i * 2) + 1] & LsrErrors) << 8));
            }

            _ier = (byte)(reader.ReadByte("ier") & 0x0F);
            _lcr = reader.ReadByte("lcr");
            _mcr = (byte)(reader.ReadByte("mcr") & 0x1F);
            _fcr = (byte)(reader.ReadByte("fcr") & 0xC9);
            _scr = reader.ReadByte("scr");
            _msr = reader.ReadByte("msr");
            _lineErrors = (byte)(reader.ReadByte("lineErrors") & LsrErrors);
            _divisor = reader.ReadUInt16("divisor");
            _transmitPending = reader.ReadBoolean("transmitPending");
            _timedOut = reader.ReadBoolean("timedOut");
            Update();
        }
    }

    /// <inheritdoc/>
    public void Dispose() => _timeout.Dispose();

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width)
    {
        ulong value = 0;
        for (int i = 0; i < (int)width; i++)
        {
            value |= (ulong)ReadByte(offset + (uint)i) << (8 * i);
        }

        return value;
    }

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value)
    {
        for (int i = 0; i < (int)width; i++)
        {
            WriteByte(offset + (uint)i, (byte)(value >> (8 * i)));
        }
    }

    private byte ReadByte(uint offset)
    {
        byte value;
        bool madeRoom = false;
        lock (_gate)
        {
            switch (offset)
            {
                case Rbr:
                    if ((_lcr & LcrDivisor) != 0)
                    {
                        return (byte)_divisor;
                    }

                    value = 0;
                    if (_count > 0)
                    {
                        value = (byte)_fifo[_first];
                        _first = (_first + 1) % FifoBytes;
                        _count--;
                        _timedOut = false;
                        RevealErrors();
                        ArmTimeout();
                        madeRoom = Room > 0 && (_count == 0 || !IsFifo);
                    }

                    Update();
                    break;
                case Ier:
                    return (_lcr & LcrDivisor) != 0 ? (byte)(_divisor >> 8) : _ier;
                case Iir:
                    value = Identify();
                    if (value == 0x02)
                    {
                        // Reading IIR clears a THRE interrupt that it shows (§8.5).
                        _transmitPending = false;
                        Update();
                    }

                    value |= IsFifo ? (byte)0xC0 : (byte)0;
                    break;
                case Lcr:
                    return _lcr;
                case Mcr:
                    return _mcr;
                case Lsr:
                    value = (byte)(LsrEmpty | _lineErrors | (_count > 0 ? LsrReady : 0) | (HasErrorInFifo() ? LsrFifoError : 0));
                    _lineErrors = 0;
                    Update();
                    break;
                case Msr:
                    value = _msr;
                    _msr &= 0xF0;
                    Update();
                    break;
                default:
                    return _scr;
            }
        }

        if (madeRoom)
        {
            _backend.ResumeInput();
        }

        return value;
    }

    private void WriteByte(uint offset, byte value)
    {
        bool send = false;
        bool resume = false;
        lock (_gate)
        {
            switch (offset)
            {
                case Rbr:
                    if ((_lcr & LcrDivisor) != 0)
                    {
                        _divisor = (ushort)((_divisor & 0xFF00) | value);
                        return;
                    }

                    _transmitPending = true;
                    if ((_mcr & McrLoop) != 0)
                    {
                        Push(value);
                    }
                    else
                    {
                        send = true;
                    }

                    break;
                case Ier:
                    if ((_lcr & LcrDivisor) != 0)
                    {
                        _divisor = (ushort)((_divisor & 0x00FF) | (value << 8));
                        return;
                    }

                    if ((value & ~_ier & IerTransmit) != 0)
                    {
                        // Enabling the interrupt while THR is empty raises it (§8.7).
                        _transmitPending = true;
                    }

                    _ier = (byte)(value & 0x0F);
                    break;
                case Iir:
                    resume = WriteFcr(value);
                    break;
                case Lcr:
                    if ((value & ~_lcr & LcrBreak) != 0 && (_mcr & McrLoop) != 0)
                    {
                        Push((ushort)(LsrBreak << 8));
                    }

                    _lcr = value;
                    break;
                case Mcr:
                    resume = (_mcr & McrLoop) != 0 && (value & McrLoop) == 0;
                    _mcr = (byte)(value & 0x1F);
                    UpdateModem();
                    break;
                case Lsr:
                case Msr:
                    // "Factory testing" (§8.4, §8.8): writes are not intended.
                    return;
                default:
                    _scr = value;
                    return;
            }

            Update();
        }

        if (send)
        {
            _backend.Write([value]);
        }

        if (resume)
        {
            _backend.ResumeInput();
        }
    }

    // §8.5 FCR: bit 0 enables, 1 and 2 clear, 6..7 trigger. Returns true when input has room again.
    private bool WriteFcr(byte value)
    {
        bool changed = ((value ^ _fcr) & 1) != 0;
        if ((value & 1) == 0)
        {
            _fcr = 0;
        }
        else
        {
            _fcr = (byte)(value & 0xC9);
        }

        if (changed || (value & 3) == 3)
        {
            ClearReceiver();
            return true;
        }

        ArmTimeout();
        return false;
    }

    private void ClearReceiver()
    {
        _first = 0;
        _count = 0;
        _timedOut = false;
        _timeout.Cancel();
    }

    private void Push(ushort entry)
    {
        int capacity = IsFifo ? FifoBytes : 1;
        if (_count >= capacity)
        {
            // §8.4: without FIFO the new byte replaces the old; with FIFO it is lost in the shift register.
            _lineErrors |= LsrOverrun;
            if (!IsFifo)
            {
                _fifo[_first] = entry;
            }

            Interlocked.Increment(ref _droppedBytes);
            return;
        }

        _fifo[(_first + _count) % FifoBytes] = entry;
        _count++;
        if (_count == 1)
        {
            RevealErrors();
        }

        ArmTimeout();
    }

    // Errors show in LSR when their byte reaches the top of the FIFO.
    private void RevealErrors()
    {
        if (_count > 0)
        {
            _lineErrors |= (byte)((_fifo[_first] >> 8) & LsrErrors);
            _fifo[_first] &= 0xFF;
        }
    }

    private bool HasErrorInFifo()
    {
        if (!IsFifo)
        {
            return false;
        }

        for (int i = 0; i < _count; i++)
        {
            if (_fifo[(_first + i) % FifoBytes] >> 8 != 0)
            {
                return true;
            }
        }

        return (_lineErrors & ~LsrOverrun) != 0;
    }

    private void ArmTimeout()
    {
        if (_paused || !IsFifo || _count == 0 || _count >= Trigger || _timedOut)
        {
            _timeout.Cancel();
            return;
        }

        // Four characters of about 10 bits at 1.8432 MHz / 16 / divisor, at most 10 ms so that a wild divisor does not
        // look like a dead line.
        long ns = Math.Min(40L * 16 * Math.Max((int)_divisor, 1) * 1_000_000_000 / 1_843_200, 10_000_000);
        _timeout.ArmAt(_clock.NowNs + ns);
    }

    private void OnTimeout()
    {
        lock (_gate)
        {
            if (!_paused && IsFifo && _count > 0)
            {
                _timedOut = true;
                Update();
            }
        }
    }

    // §8.6: loopback connects DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD.
    private void UpdateModem()
    {
        int lines = MsrCts | MsrDsr | MsrDcd;
        if ((_mcr & McrLoop) != 0)
        {
            lines = ((_mcr & McrRts) != 0 ? MsrCts : 0) | ((_mcr & McrDtr) != 0 ? MsrDsr : 0) |
                ((_mcr & McrOut1) != 0 ? MsrRi : 0) | ((_mcr & McrOut2) != 0 ? MsrDcd : 0);
        }

        int changed = (lines ^ _msr) & 0xF0;

        // TERI (bit 2) is set only by the trailing edge of RI; the others by any change.
        int delta = (changed >> 4) & 0x0B;
        if ((changed & MsrRi) != 0 && (lines & MsrRi) == 0)
        {
            delta |= 4;
        }

        _msr = (byte)(lines | (_msr & 0x0F) | delta);
    }

    // Table III: the pending interrupt with the highest priority, or 1.
    private byte Identify()
    {
        if ((_ier & IerLine) != 0 && _lineErrors != 0)
        {
            return 0x06;
        }

        if ((_ier & IerReceive) != 0)
        {
            if (_count >= Trigger)
            {
                return 0x04;
            }

            if (_timedOut && _count > 0)
            {
                return 0x0C;
            }
        }

        if ((_ier & IerTransmit) != 0 && _transmitPending)
        {
            return 0x02;
        }

        return (_ier & IerModem) != 0 && (_msr & 0x0F) != 0 ? (byte)0x00 : (byte)0x01;
    }

    private void Update() => _irq.Set(Identify() != 0x01);
}

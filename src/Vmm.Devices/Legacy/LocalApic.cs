// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Numerics;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Legacy;

// Theory. A local APIC (SDM 3A chapter 11) in xAPIC and x2APIC mode, the interrupt port of one vCPU. Vectors wait in
// IRR, move to ISR when the processor acknowledges them, and leave at EOI. What may be delivered depends on the
// processor priority, which TPR and ISR give. All of that changes under the gate, and after every change Update
// writes what the processor polls into volatile fields, so that "is there something?" costs one read.
//
// The timer counts at 1 GHz (a tick is a nanosecond of guest time) through the divider; in TSC-deadline mode it
// compares with the guest's time stamp counter: a function of guest time, plus an offset that the vCPU's driver tells.
//
// The 8259 pair is behind LINT0. With ExtINT there, its output level is the request and its acknowledge cycle gives the
// vector; it is asked without our gate, because it drives LINT0 under its own. While the APIC is disabled in
// IA32_APIC_BASE, LINT0 and LINT1 are the processor's INTR and NMI pins (11.4.3).
//
// After reset the boot processor's LINT0 is unmasked ExtINT ("virtual wire", MP 1.4 §3.6.2.2) although the SDM says
// masked: there is not always firmware to set it, and KVM's local APICs start in the same state.
//
// Not modelled: SMI, CMCI, the thermal and performance sources (their LVT entries are kept), arbitration IDs.

/// <summary>The local APIC of one vCPU. See the theory at the top of this file.</summary>
public sealed class LocalApic : IDevice, ICpuInterruptPort
{
    private const uint MsrApicBase = 0x1B;
    private const uint MsrTscDeadline = 0x6E0;
    private const uint MsrX2ApicFirst = 0x800;
    private const uint MsrX2ApicLast = 0x8FF;

    private const ulong BaseBoot = 1 << 8;
    private const ulong BaseX2Apic = 1 << 10;
    private const ulong BaseEnable = 1 << 11;
    private const ulong DefaultBase = 0xFEE0_0000;

    // Register numbers: xAPIC offset / 16 = x2APIC MSR - 0x800.
    private const uint RegId = 0x02;
    private const uint RegVersion = 0x03;
    private const uint RegTpr = 0x08;
    private const uint RegApr = 0x09;
    private const uint RegPpr = 0x0A;
    private const uint RegEoi = 0x0B;
    private const uint RegRemoteRead = 0x0C;
    private const uint RegLdr = 0x0D;
    private const uint RegDfr = 0x0E;
    private const uint RegSvr = 0x0F;
    private const uint RegIsr = 0x10;
    private const uint RegTmr = 0x18;
    private const uint RegIrr = 0x20;
    private const uint RegEsr = 0x28;
    private const uint RegIcr = 0x30;
    private const uint RegIcrHigh = 0x31;
    private const uint RegLvtFirst = 0x32;
    private const uint RegLvtLast = 0x37;
    private const uint RegInitialCount = 0x38;
    private const uint RegCurrentCount = 0x39;
    private const uint RegDivide = 0x3E;
    private const uint RegSelfIpi = 0x3F;

    private const int LvtTimer = 0;
    private const int LvtLint0 = 3;
    private const int LvtLint1 = 4;
    private const int LvtError = 5;
    private const uint LvtMasked = 1 << 16;
    private const uint LvtLevel = 1 << 15;
    private const uint LvtRemoteIrr = 1 << 14;

    private const uint SvrEnable = 1 << 8;
    private const uint SvrNoEoiBroadcast = 1 << 12;

    private const uint EsrSendIllegal = 1 << 5;
    private const uint EsrReceiveIllegal = 1 << 6;
    private const uint EsrIllegalRegister = 1 << 7;

    // Version 0x14, six LVT entries, EOI broadcasts can be suppressed (11.4.8).
    private const uint Version = 0x0105_0014;

    // A periodic timer never fires more often than this, whatever a guest programs.
    private const long MinimumPeriodNs = 50_000;

    private static readonly uint[] s_lvtWritable = [0x7_00FF, 0x1_07FF, 0x1_07FF, 0x1_A7FF, 0x1_A7FF, 0x1_00FF];

    private readonly Lock _gate = new();
    private readonly ApicBus _bus;
    private readonly IClock _clock;
    private readonly IGuestTimer _timer;
    private readonly long _tscKhz;
    private readonly Func<long, ulong> _tscAt;
    private readonly IExternalInterruptSource? _pic;
    private readonly uint[] _irr = new uint[8];
    private readonly uint[] _isr = new uint[8];
    private readonly uint[] _tmr = new uint[8];
    private readonly uint[] _lvt = new uint[6];
    private readonly bool _isBoot;
    private ICpuWaker? _waker;

    private ulong _base;
    private uint _tpr;
    private uint _ldr;
    private uint _dfr;
    private uint _svr;
    private uint _esr;
    private uint _esrPending;
    private ulong _icr;
    private uint _divide;
    private uint _initialCount;
    private long _timerStartNs;

    // A one-shot count has run out and its interrupt was raised. The clock alone does not say that: on a busy host the
    // count may be over before the host timer was even armed, and the interrupt must still come.
    private bool _timerExpired;
    private ulong _tscDeadline;
    private ulong _tscOffset; // the vCPU's, which saves and loads it
    private bool _paused = true;
    private bool _lint0;
    private bool _lint1;
    private bool _waitForStartup;
    private byte _startupVector;

    // What the processor polls; written under the gate by Update.
    private volatile int _deliverable = -1;
    private volatile bool _external;

    // One NMI that the processor is about to take and one that waits behind it, as the pin's latch keeps it.
    private const int MostNmis = 2;
    private volatile int _nmis;
    private volatile bool _init;
    private volatile bool _startup;
    private volatile uint _arbitration;
    private volatile bool _softwareEnabled;

    /// <summary>Makes the APIC of one vCPU and registers it on the bus.</summary>
    /// <param name="index">vCPU number and APIC identifier, in order from 0.</param>
    /// <param name="bus">Where IPIs go.</param>
    /// <param name="clock">Guest time.</param>
    /// <param name="tscKhz">Frequency of the guest's time stamp counter in kHz.</param>
    /// <param name="tscAt">The guest's time stamp counter at a guest time in nanoseconds, without the vCPU's offset.</param>
    /// <param name="pic">The 8259 pair, for the processor whose LINT0 it drives; else null.</param>
    public LocalApic(
        int index, ApicBus bus, IClock clock, long tscKhz, Func<long, ulong> tscAt, IExternalInterruptSource? pic)
    {
        ArgumentNullException.ThrowIfNull(bus);
        ArgumentNullException.ThrowIfNull(clock);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(tscKhz);
        Index = index;
        Id = $"lapic{index}";
        _isBoot = index == 0;
        _bus = bus;
        _clock = clock;
        _tscKhz = tscKhz;
        _tscAt = tscAt;
        _pic = pic;
        _timer = clock.CreateTimer(Id, OnTimer);
        Registers = new RegisterPage(this);
        Lint0 = new DelegateLine(SetLint0);
        Lint1 = new DelegateLine(SetLint1);
        ResetRegisters(keepMode: false);
        bus.Register(this);
    }

    /// <summary>vCPU number and APIC identifier.</summary>
    public int Index { get; }

    /// <inheritdoc/>
    public string Id { get; }

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <summary>Local interrupt pin 0: the 8259 pair's output.</summary>
    public IIrqLine Lint0 { get; }

    /// <summary>Local interrupt pin 1: NMI.</summary>
    public IIrqLine Lint1 { get; }

    /// <inheritdoc/>
    public bool HasInterrupt => _external || _deliverable >= 0;

    /// <inheritdoc/>
    public bool HasNmi => _nmis != 0;

    /// <inheritdoc/>
    public bool HasInit => _init;

    /// <inheritdoc/>
    public bool HasStartup => _startup;

    /// <inheritdoc/>
    public IRegisterWindow Registers { get; }

    /// <inheritdoc/>
    public byte Cr8
    {
        get
        {
            lock (_gate)
            {
                return (byte)(_tpr >> 4);
            }
        }

        set
        {
            lock (_gate)
            {
                _tpr = (uint)(value & 15) << 4;
                Update();
            }
        }
    }

    /// <inheritdoc/>
    public ulong ApicBase
    {
        get => Volatile.Read(ref _base);
        set
        {
            lock (_gate)
            {
                SetBase(value);
            }
        }
    }

    /// <inheritdoc/>
    public bool IsMemoryMapped => (Volatile.Read(ref _base) & (BaseEnable | BaseX2Apic)) == BaseEnable;

    internal bool IsSoftwareEnabled => _softwareEnabled;

    internal int ArbitrationPriority => (int)_arbitration;

    private bool IsX2Apic => (_base & BaseX2Apic) != 0;

    /// <inheritdoc/>
    public void Attach(ICpuWaker waker) => _waker = waker;

    /// <inheritdoc/>
    public int Acknowledge()
    {
        lock (_gate)
        {
            if (!_external)
            {
                int vector = _deliverable;
                if (vector >= 0)
                {
                    ClearBit(_irr, vector);
                    SetBit(_isr, vector);
                    Update();
                }

                return vector;
            }
        }

        return _pic?.Acknowledge() ?? -1;
    }

    /// <inheritdoc/>
    public bool TakeNmi()
    {
        lock (_gate)
        {
            bool taken = _nmis != 0;
            _nmis = taken ? _nmis - 1 : 0;
            return taken;
        }
    }

    /// <inheritdoc/>
    public bool TakeInit()
    {
        lock (_gate)
        {
            if (!_init)
            {
                return false;
            }

            // 11.4.7.3: INIT resets everything but the identifier and the mode in IA32_APIC_BASE.
            _init = false;
            bool startup = _startup;
            ResetRegisters(keepMode: true);
            _startup = startup;
            _waitForStartup = (_base & BaseBoot) == 0;
            return true;
        }
    }

    /// <inheritdoc/>
    public bool TakeStartup(out byte vector)
    {
        lock (_gate)
        {
            vector = _startupVector;
            bool taken = _startup && !_init;
            if (taken)
            {
                _startup = false;
                _waitForStartup = false;
            }

            return taken;
        }
    }

    /// <inheritdoc/>
    public void SetTscOffset(ulong ticks)
    {
        lock (_gate)
        {
            _tscOffset = ticks;
            ArmTimer();
        }
    }

    /// <inheritdoc/>
    public void Reset()
    {
        lock (_gate)
        {
            ResetRegisters(keepMode: false);
        }
    }

    /// <inheritdoc/>
    public void Pause()
    {
        lock (_gate)
        {
            _paused = true;
            _timer.Cancel();
        }
    }

    /// <inheritdoc/>
    public void Resume()
    {
        lock (_gate)
        {
            _paused = false;
            ArmTimer();
        }
    }

    /// <inheritdoc/>
    public void Save(StateWriter writer)
    {
        lock (_gate)
        {
            writer.Write("base", _base);
            writer.Write("tpr", (ulong)_tpr);
            writer.Write("ldr", (ulong)_ldr);
            writer.Write("dfr", (ulong)_dfr);
            writer.Write("svr", (ulong)_svr);
            writer.Write("esr", (ulong)_esr);
            writer.Write("esrPending", (ulong)_esrPending);
            writer.Write("icr", _icr);
            writer.Write("divide", (ulong)_divide);
            writer.Write("initialCount", (ulong)_initialCount);
            writer.Write("timerAge", _clock.NowNs - _timerStartNs);
            writer.Write("timerExpired", _timerExpired);
            writer.Write("tscDeadline", _tscDeadline);
            writer.Write("lint0", _lint0);
            writer.Write("lint1", _lint1);
            writer.Write("nmis", (ulong)_nmis);
            writer.Write("init", _init);
            writer.Write("startup", _startup);
            writer.Write("waitForStartup", _waitForStartup);
            writer.Write("startupVector", (ulong)_startupVector);
            SaveWords(writer, "irr", _irr);
            SaveWords(writer, "isr", _isr);
            SaveWords(writer, "tmr", _tmr);
            SaveWords(writer, "lvt", _lvt);
        }
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        lock (_gate)
        {
            _base = reader.ReadUInt64("base");
            _tpr = reader.ReadByte("tpr");
            _ldr = reader.ReadUInt32("ldr");
            _dfr = reader.ReadUInt32("dfr");
            _svr = reader.ReadUInt32("svr") & 0x11FF;
            _esr = reader.ReadUInt32("esr");
            _esrPending = reader.ReadUInt32("esrPending");
            _icr = reader.ReadUInt64("icr");
            _divide = reader.ReadUInt32("divide") & 0xB;
            _initialCount = reader.ReadUInt32("initialCount");
            _timerStartNs = _clock.NowNs - (long)reader.ReadBounded("timerAge", long.MaxValue / 4);
            _timerExpired = reader.Has("timerExpired") && reader.ReadBoolean("timerExpired");
            _tscDeadline = reader.ReadUInt64("tscDeadline");
            _lint0 = reader.ReadBoolean("lint0");
            _lint1 = reader.ReadBoolean("lint1");
            _nmis = Math.Min((int)reader.ReadByte("nmis"), MostNmis);
            _init = reader.ReadBoolean("init");
            _startup = reader.ReadBoolean("startup");
            _waitForStartup = reader.ReadBoolean("waitForStartup");
            _startupVector = reader.ReadByte("startupVector");
            LoadWords(reader, "irr", _irr);
            LoadWords(reader, "isr", _isr);
            LoadWords(reader, "tmr", _tmr);
            LoadWords(reader, "lvt", _lvt);
            for (int i = 0; i < _lvt.Length; i++)
            {
                _lvt[i] &= s_lvtWritable[i] | LvtRemoteIrr;
            }

            Update();
            ArmTimer();
        }
    }

    /// <inheritdoc/>
    public void Dispose() => _timer.Dispose();

    /// <inheritdoc/>
    public bool TryReadMsr(uint msr, out ulong value)
    {
        lock (_gate)
        {
            value = 0;
            switch (msr)
            {
                case MsrApicBase:
                    value = _base;
                    return true;
                case MsrTscDeadline:
                    value = IsTscDeadline ? _tscDeadline : 0;
                    return true;
                case >= MsrX2ApicFirst and <= MsrX2ApicLast when IsX2Apic:
                    uint register = msr - MsrX2ApicFirst;
                    if (register == RegIcr)
                    {
                        value = _icr;
                        return true;
                    }

                    if (!IsRegister(register) ||
                        register is RegApr or RegRemoteRead or RegDfr or RegIcrHigh or RegEoi or RegSelfIpi)
                    {
                        return false;
                    }

                    value = ReadRegister(register);
                    return true;
                default:
                    return false;
            }
        }
    }

    /// <inheritdoc/>
    public bool TryWriteMsr(uint msr, ulong value)
    {
        int ended = -1;
        bool send = false;
        bool valid;
        lock (_gate)
        {
            switch (msr)
            {
                case MsrApicBase:
                    return TryWriteBase(value);
                case MsrTscDeadline:
                    if (IsTscDeadline)
                    {
                        _tscDeadline = value;
                        if (value != 0 && !_paused && TscAt(_clock.NowNs) >= value)
                        {
                            // 11.5.4.1: a deadline that has passed interrupts at once.
                            _timer.Cancel();
                            Expire();
                        }
                        else
                        {
                            ArmTimer();
                        }
                    }

                    return true;
                case >= MsrX2ApicFirst and <= MsrX2ApicLast when IsX2Apic:
                    valid = TryWriteX2(msr - MsrX2ApicFirst, value, ref ended, ref send);
                    break;
                default:
                    return false;
            }
        }

        AfterWrite(ended, send);
        return valid;
    }

    internal bool MatchesLogical(uint destination)
    {
        lock (_gate)
        {
            if (!IsX2Apic)
            {
                uint set = _ldr >> 24;
                destination &= 0xFF;

                // 11.6.2.2: DFR 0xF is flat, 0x0 is clusters; in both a destination of all ones means everybody.
                return destination == 0xFF || ((_dfr >> 28) == 0xF
                    ? (set & destination) != 0
                    : (set >> 4) == (destination >> 4) && (set & destination & 0xF) != 0);
            }

            uint ldr = X2Ldr;
            return (ldr >> 16) == (destination >> 16) && (ldr & destination & 0xFFFF) != 0;
        }
    }

    /// <summary>A message has arrived. Any thread.</summary>
    internal void Accept(ApicDelivery delivery, byte vector, bool level)
    {
        lock (_gate)
        {
            if ((_base & BaseEnable) == 0 && delivery is not (ApicDelivery.Init or ApicDelivery.Startup))
            {
                return;
            }

            AcceptLocked(delivery, vector, level);
        }
    }

    private ulong TscAt(long nowNs) => unchecked(_tscAt(nowNs) + _tscOffset);

    private bool IsTscDeadline => (_lvt[LvtTimer] >> 17) == 2;

    private bool IsPeriodic => (_lvt[LvtTimer] >> 17) == 1;

    private uint X2Ldr => ((uint)Index >> 4 << 16) | (1u << (Index & 15));

    private static void SetBit(uint[] words, int vector) => words[vector >> 5] |= 1u << (vector & 31);

    private static void ClearBit(uint[] words, int vector) => words[vector >> 5] &= ~(1u << (vector & 31));

    private static bool GetBit(uint[] words, int vector) => (words[vector >> 5] & (1u << (vector & 31))) != 0;

    private static int Highest(uint[] words)
    {
        for (int i = 7; i >= 0; i--)
        {
            if (words[i] != 0)
            {
                return (i * 32) + 31 - BitOperations.LeadingZeroCount(words[i]);
            }
        }

        return -1;
    }

    private static void SaveWords(StateWriter writer, string name, uint[] words)
    {
        Span<byte> bytes = stackalloc byte[words.Length * 4];
        for (int i = 0; i < words.Length; i++)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(bytes[(i * 4)..], words[i]);
        }

        writer.WriteBytes(name, bytes);
    }

    private static void LoadWords(StateReader reader, string name, uint[] words)
    {
        Span<byte> bytes = stackalloc byte[words.Length * 4];
        reader.ReadBytes(name, bytes);
        for (int i = 0; i < words.Length; i++)
        {
            words[i] = BinaryPrimitives.ReadUInt32LittleEndian(bytes[(i * 4)..]);
        }
    }

    private static bool IsRegister(uint register) => register switch
    {
        RegId or RegVersion or RegTpr or RegApr or RegPpr or RegEoi or RegRemoteRead => true,
        RegLdr or RegDfr or RegSvr or RegEsr or RegIcr or RegIcrHigh => true,
        >= RegIsr and < RegEsr => true,
        >= RegLvtFirst and <= RegCurrentCount => true,
        RegDivide or RegSelfIpi => true,
        _ => false,
    };

    // Table 11-1: values after power-up; keepMode is INIT.
    private void ResetRegisters(bool keepMode)
    {
        if (!keepMode)
        {
            _base = DefaultBase | BaseEnable | (_isBoot ? BaseBoot : 0);
            _init = false;
            _waitForStartup = !_isBoot;
        }

        Array.Clear(_irr);
        Array.Clear(_isr);
        Array.Clear(_tmr);
        Array.Fill(_lvt, LvtMasked);
        if (_isBoot)
        {
            _lvt[LvtLint0] = (uint)ApicDelivery.ExtInt << 8;
        }

        _tpr = 0;
        _ldr = 0;
        _dfr = 0xFFFF_FFFF;
        _svr = 0xFF;
        _esr = 0;
        _esrPending = 0;
        _icr = 0;
        _divide = 0;
        _initialCount = 0;
        _timerExpired = false;
        _tscDeadline = 0;
        _nmis = 0;
        _startup = false;
        _timer.Cancel();
        Update();
    }

    private bool TryWriteBase(ulong value)
    {
        // Bits 0..7, 9 and those above the physical address width are reserved (11.4.4, we offer 46 bits).
        if ((value & 0x2FF) != 0 || value >> 46 != 0)
        {
            return false;
        }

        ulong from = _base & (BaseEnable | BaseX2Apic);
        ulong to = value & (BaseEnable | BaseX2Apic);

        // Figure 11-27: x2APIC needs the APIC enabled, comes from xAPIC only, and is left only to "disabled".
        if (to == BaseX2Apic ||
            (from == 0 && to == (BaseEnable | BaseX2Apic)) ||
            (from == (BaseEnable | BaseX2Apic) && to == BaseEnable))
        {
            return false;
        }

        SetBase(value);
        return true;
    }

    private void SetBase(ulong value)
    {
        ulong old = _base;
        Volatile.Write(ref _base, value);
        if ((old & BaseEnable) != 0 && (value & BaseEnable) == 0)
        {
            // 11.4.3: disabling loses the state.
            ResetRegisters(keepMode: true);
        }
        else if ((old & BaseX2Apic) == 0 && (value & BaseX2Apic) != 0)
        {
            _icr = 0;
        }

        Update();
    }

    private bool TryWriteX2(uint register, ulong value, ref int ended, ref bool send)
    {
        if (register == RegIcr)
        {
            // Reserved bits 13, 16, 17, 20..31 (figure 11-28). Bit 12 has gone; writes of it are ignored by processors.
            if ((value & 0xFFF3_2000) != 0)
            {
                return false;
            }

            _icr = value & ~(1UL << 12);
            send = true;
            return true;
        }

        if (register == RegSelfIpi)
        {
            if (value > 0xFF)
            {
                return false;
            }

            AcceptLocked(ApicDelivery.Fixed, (byte)value, false);
            return true;
        }

        ulong allowed = register switch
        {
            RegTpr => 0xFF,
            RegEoi or RegEsr => 0,
            RegSvr => 0x11FF,
            RegInitialCount => 0xFFFF_FFFF,
            RegDivide => 0xB,
            >= RegLvtFirst and <= RegLvtLast => s_lvtWritable[LvtIndex(register)] | (1u << 12) | LvtRemoteIrr,
            _ => ulong.MaxValue,
        };
        if (allowed == ulong.MaxValue || (value & ~allowed) != 0)
        {
            return false;
        }

        WriteRegister(register, (uint)value, ref ended, ref send);
        return true;
    }

    // MMIO and MSR order: timer, thermal, performance, LINT0, LINT1, error.
    private static int LvtIndex(uint register) => (int)(register - RegLvtFirst);

    private uint ReadRegister(uint register)
    {
        switch (register)
        {
            case RegId:
                return IsX2Apic ? (uint)Index : (uint)Index << 24;
            case RegVersion:
                return Version;
            case RegTpr:
                return _tpr;
            case RegApr:
            case RegPpr:
                return ProcessorPriority();
            case RegLdr:
                return IsX2Apic ? X2Ldr : _ldr;
            case RegDfr:
                return _dfr;
            case RegSvr:
                return _svr;
            case >= RegIsr and < RegTmr:
                return _isr[register - RegIsr];
            case >= RegTmr and < RegIrr:
                return _tmr[register - RegTmr];
            case >= RegIrr and < RegEsr:
                return _irr[register - RegIrr];
            case RegEsr:
                return _esr;
            case RegIcr:
                return (uint)_icr;
            case RegIcrHigh:
                return (uint)(_icr >> 32);
            case >= RegLvtFirst and <= RegLvtLast:
                return _lvt[LvtIndex(register)];
            case RegInitialCount:
                return _initialCount;
            case RegCurrentCount:
                return CurrentCount();
            case RegDivide:
                return _divide;
            default:
                return 0;
        }
    }

    private void WriteRegister(uint register, uint value, ref int ended, ref bool send)
    {
        switch (register)
        {
            case RegTpr:
                _tpr = value & 0xFF;
                Update();
                break;
            case RegEoi:
                ended = EndOfInterrupt();
                break;
            case RegLdr:
                _ldr = value & 0xFF00_0000;
                break;
            case RegDfr:
                _dfr = value | 0x0FFF_FFFF;
                break;
            case RegSvr:
                _svr = value & 0x11FF;
                if ((_svr & SvrEnable) == 0)
                {
                    // 11.4.7.2: a software-disabled APIC has all LVT entries masked.
                    for (int i = 0; i < _lvt.Length; i++)
                    {
                        _lvt[i] |= LvtMasked;
                    }
                }

                Update();
                break;
            case RegEsr:
                // 11.5.3: a write shows what gathered since the last one.
                _esr = _esrPending;
                _esrPending = 0;
                break;
            case RegIcr:
                _icr = (_icr & 0xFFFF_FFFF_0000_0000) | (value & 0xC_CFFF);
                send = true;
                break;
            case RegIcrHigh:
                _icr = (_icr & 0xFFFF_FFFF) | ((ulong)(value & 0xFF00_0000) << 32);
                break;
            case >= RegLvtFirst and <= RegLvtLast:
                WriteLvt(LvtIndex(register), value);
                break;
            case RegInitialCount:
                if (!IsTscDeadline)
                {
                    _initialCount = value;
                    _timerStartNs = _clock.NowNs;
                    _timerExpired = false;
                    ArmTimer();
                }

                break;
            case RegDivide:
                // A change while counting keeps the current count.
                uint current = CurrentCount();
                _divide = value & 0xB;
                if (current != 0)
                {
                    _timerStartNs = _clock.NowNs - ((long)(_initialCount - current) << DivideShift());
                }

                ArmTimer();
                break;
            case RegId:
            case RegVersion:
            case RegApr:
            case RegPpr:
            case RegRemoteRead:
            case RegCurrentCount:
            case >= RegIsr and < RegEsr:
                break;
            default:
                RaiseError(EsrIllegalRegister);
                break;
        }
    }

    private void WriteLvt(int index, uint value)
    {
        uint old = _lvt[index];
        uint next = (value & s_lvtWritable[index]) | (old & LvtRemoteIrr);
        if ((_svr & SvrEnable) == 0)
        {
            next |= LvtMasked;
        }

        _lvt[index] = next;
        if (index == LvtTimer)
        {
            if (((old ^ next) >> 17 & 3) != 0 && ((old >> 17) == 2 || (next >> 17) == 2))
            {
                // 11.5.4.1: switching to or from TSC-deadline mode disarms the timer.
                _initialCount = 0;
                _tscDeadline = 0;
            }
            else if (((old ^ next) >> 17 & 3) != 0 && _initialCount != 0)
            {
                SwitchCounting(isPeriodic: (next >> 17) == 1);
            }

            ArmTimer();
        }
        else if (index == LvtLint0)
        {
            if ((next & LvtLevel) == 0)
            {
                _lvt[index] &= ~LvtRemoteIrr;
            }

            ServiceLint(LvtLint0, _lint0, false);
        }

        Update();
    }

    // From one-shot to periodic the count goes on, and one that has ended stays at zero until the initial count is
    // written; from periodic to one-shot the present period is the last one.
    private void SwitchCounting(bool isPeriodic)
    {
        long period = (long)_initialCount << DivideShift();
        long age = Math.Max(0, _clock.NowNs - _timerStartNs);
        if (!isPeriodic)
        {
            _timerStartNs += age / period * period;
        }
        else if (age >= period && !_timerExpired)
        {
            _timerExpired = true;
            Expire();
        }
    }

    // The ICR's message goes out without the gate: destinations take theirs, and this APIC may be among them.
    private void SendIpi()
    {
        ulong icr;
        bool x2;
        lock (_gate)
        {
            icr = _icr;
            x2 = IsX2Apic;
        }

        var delivery = (ApicDelivery)((icr >> 8) & 7);
        byte vector = (byte)icr;
        bool level = (icr & (1 << 15)) != 0;
        bool assert = (icr & (1 << 14)) != 0;
        if (delivery == ApicDelivery.Init && level && !assert)
        {
            // INIT level de-assert is not supported since the Pentium 4 (11.6.1).
            return;
        }

        if (delivery is ApicDelivery.Fixed or ApicDelivery.LowestPriority && vector < 16)
        {
            lock (_gate)
            {
                RaiseError(EsrSendIllegal);
            }

            return;
        }

        int shorthand = (int)(icr >> 18) & 3;
        switch (shorthand)
        {
            case 1:
                Accept(delivery == ApicDelivery.LowestPriority ? ApicDelivery.Fixed : delivery, vector, false);
                break;
            case 2:
            case 3:
                _bus.DeliverShorthand(this, shorthand == 2, delivery, vector);
                break;
            default:
                uint destination = x2 ? (uint)(icr >> 32) : (uint)(icr >> 56);
                bool broadcast = destination == (x2 ? 0xFFFF_FFFF : 0xFF);
                _bus.Deliver(destination, (icr & (1 << 11)) != 0, broadcast, delivery, vector, false);
                break;
        }
    }

    private void AfterWrite(int ended, bool send)
    {
        if (ended >= 0)
        {
            _bus.BroadcastEoi((byte)ended);
        }

        if (send)
        {
            SendIpi();
        }
    }

    // Returns the vector whose end the I/O APICs must hear of, or -1.
    private int EndOfInterrupt()
    {
        int vector = Highest(_isr);
        if (vector < 0)
        {
            return -1;
        }

        ClearBit(_isr, vector);
        bool level = GetBit(_tmr, vector);
        Update();
        if (!level)
        {
            return -1;
        }

        if ((_lvt[LvtLint0] & (LvtRemoteIrr | 0xFF)) == (LvtRemoteIrr | (uint)vector))
        {
            _lvt[LvtLint0] &= ~LvtRemoteIrr;
            ServiceLint(LvtLint0, _lint0, false);
        }

        return (_svr & SvrNoEoiBroadcast) != 0 ? -1 : vector;
    }

    private void AcceptLocked(ApicDelivery delivery, byte vector, bool level)
    {
        switch (delivery)
        {
            case ApicDelivery.Fixed:
            case ApicDelivery.LowestPriority:
                if ((_svr & SvrEnable) == 0)
                {
                    return;
                }

                if (vector < 16)
                {
                    RaiseError(EsrReceiveIllegal);
                    return;
                }

                SetBit(_irr, vector);
                if (level)
                {
                    SetBit(_tmr, vector);
                }
                else
                {
                    ClearBit(_tmr, vector);
                }

                Update();
                break;
            case ApicDelivery.Nmi:
                _nmis = Math.Min(_nmis + 1, MostNmis);
                _waker?.Wake();
                break;
            case ApicDelivery.Init:
                _init = true;
                _startup = false;
                _waker?.Wake();
                break;
            case ApicDelivery.Startup:
                if (_waitForStartup || (_init && (_base & BaseBoot) == 0))
                {
                    _startup = true;
                    _startupVector = vector;
                    _waker?.Wake();
                }

                break;
            default:
                break;
        }
    }

    private void SetLint0(bool asserted)
    {
        lock (_gate)
        {
            bool rising = asserted && !_lint0;
            _lint0 = asserted;
            ServiceLint(LvtLint0, asserted, rising);
            Update();
        }
    }

    private void SetLint1(bool asserted)
    {
        lock (_gate)
        {
            bool rising = asserted && !_lint1;
            _lint1 = asserted;
            if ((_base & BaseEnable) == 0)
            {
                if (rising)
                {
                    AcceptLocked(ApicDelivery.Nmi, 0, false);
                }
            }
            else
            {
                ServiceLint(LvtLint1, asserted, rising);
            }
        }
    }

    // Everything but ExtINT, which Update takes from the pin's level.
    private void ServiceLint(int index, bool asserted, bool rising)
    {
        uint lvt = _lvt[index];
        if ((lvt & LvtMasked) != 0 || (_base & BaseEnable) == 0)
        {
            return;
        }

        var delivery = (ApicDelivery)((lvt >> 8) & 7);
        switch (delivery)
        {
            case ApicDelivery.Fixed when (lvt & LvtLevel) != 0 && index == LvtLint0:
                if (asserted && (lvt & LvtRemoteIrr) == 0)
                {
                    _lvt[index] |= LvtRemoteIrr;
                    AcceptLocked(ApicDelivery.Fixed, (byte)lvt, true);
                }

                break;
            case ApicDelivery.Fixed:
            case ApicDelivery.Nmi:
            case ApicDelivery.Init:
                if (rising)
                {
                    AcceptLocked(delivery, (byte)lvt, false);
                }

                break;
            default:
                break;
        }
    }

    private void RaiseError(uint bit)
    {
        bool isNew = (_esrPending & bit) == 0;
        _esrPending |= bit;
        uint lvt = _lvt[LvtError];
        if (isNew && (lvt & LvtMasked) == 0 && (lvt & 0xFF) >= 16)
        {
            AcceptLocked(ApicDelivery.Fixed, (byte)lvt, false);
        }
    }

    // 11.8.3.1: the higher of TPR and the class in service.
    private uint ProcessorPriority()
    {
        int inService = Highest(_isr);
        uint service = inService < 0 ? 0 : (uint)inService & 0xF0;
        return (_tpr & 0xF0) >= service ? _tpr : service;
    }

    // Under the gate, after anything changed: what may the processor take now?
    private void Update()
    {
        uint priority = ProcessorPriority();
        int requested = Highest(_irr);
        bool enabled = (_base & BaseEnable) != 0;
        _deliverable = enabled && requested >= 0 && (uint)(requested & 0xF0) > (priority & 0xF0) ? requested : -1;
        uint lint0 = _lvt[LvtLint0];
        _external = _pic is not null && _lint0 &&
            (!enabled || ((lint0 & LvtMasked) == 0 && ((lint0 >> 8) & 7) == (uint)ApicDelivery.ExtInt));
        _softwareEnabled = enabled && (_svr & SvrEnable) != 0;
        _arbitration = Math.Max(priority & 0xF0, requested < 0 ? 0 : (uint)requested & 0xF0);
        if (_deliverable >= 0 || _external)
        {
            _waker?.Wake();
        }
    }

    // Divide configuration: bits 3, 1, 0 (figure 11-10); 111 is by 1.
    private int DivideShift()
    {
        uint code = (_divide & 3) | ((_divide & 8) >> 1);
        return code == 7 ? 0 : (int)code + 1;
    }

    private uint CurrentCount()
    {
        if (_initialCount == 0 || IsTscDeadline || _timerExpired)
        {
            return 0;
        }

        ulong ticks = (ulong)Math.Max(0, _clock.NowNs - _timerStartNs) >> DivideShift();
        if (IsPeriodic)
        {
            return _initialCount - (uint)(ticks % _initialCount);
        }

        return ticks >= _initialCount ? 0 : _initialCount - (uint)ticks;
    }

    private void ArmTimer()
    {
        if (_paused)
        {
            return;
        }

        if (IsTscDeadline)
        {
            if (_tscDeadline == 0)
            {
                _timer.Cancel();
                return;
            }

            long now = _clock.NowNs;
            ulong tsc = TscAt(now);
            ulong left = _tscDeadline > tsc ? _tscDeadline - tsc : 0;

            // Far deadlines are cut to a day and looked at again then.
            ulong day = (ulong)_tscKhz * 1000 * 86_400;
            left = Math.Min(left, day);
            long ns = (long)(((UInt128)left * 1_000_000 + (ulong)_tscKhz - 1) / (ulong)_tscKhz);
            _timer.ArmAt(now + ns);
            return;
        }

        if (_initialCount == 0 || _timerExpired)
        {
            _timer.Cancel();
            return;
        }

        long period = (long)_initialCount << DivideShift();
        long age = Math.Max(0, _clock.NowNs - _timerStartNs);
        if (IsPeriodic)
        {
            long next = _timerStartNs + (((age / period) + 1) * period);
            _timer.ArmAt(period < MinimumPeriodNs ? Math.Max(next, _clock.NowNs + MinimumPeriodNs) : next);
        }
        else
        {
            _timer.ArmAt(_timerStartNs + period);
        }
    }

    private void OnTimer()
    {
        lock (_gate)
        {
            if (_paused)
            {
                return;
            }

            if (IsTscDeadline)
            {
                if (_tscDeadline == 0)
                {
                    return;
                }

                if (TscAt(_clock.NowNs) < _tscDeadline)
                {
                    ArmTimer();
                    return;
                }
            }
            else if (_initialCount == 0 || _timerExpired || (!IsPeriodic && CurrentCount() != 0))
            {
                // Reprogrammed while this call was on its way.
                ArmTimer();
                return;
            }

            Expire();
            if (IsPeriodic)
            {
                ArmTimer();
            }
        }
    }

    // The timer has reached zero or its deadline: one interrupt, unless it is masked.
    private void Expire()
    {
        if (IsTscDeadline)
        {
            _tscDeadline = 0;
        }
        else if (!IsPeriodic)
        {
            _timerExpired = true;
        }

        uint lvt = _lvt[LvtTimer];
        if ((lvt & LvtMasked) == 0)
        {
            AcceptLocked(ApicDelivery.Fixed, (byte)lvt, false);
        }
    }

    // Registers are 32 bits at multiples of 16 (11.4.1). Software must use aligned dword accesses; parts of a register
    // may be read, and what lies between registers reads as zero.
    private sealed class RegisterPage : IRegisterWindow
    {
        private readonly LocalApic _owner;

        public RegisterPage(LocalApic owner) => _owner = owner;

        public uint Length => 0x1000;

        public ulong Read(uint offset, AccessWidth width)
        {
            uint within = offset & 15;
            uint register = offset >> 4;
            if (within >= 4)
            {
                return 0;
            }

            lock (_owner._gate)
            {
                if (register == RegSelfIpi || !IsRegister(register))
                {
                    _owner.RaiseError(EsrIllegalRegister);
                    return 0;
                }

                ulong value = _owner.ReadRegister(register) >> (int)(8 * within);
                return width >= AccessWidth.Dword ? value : value & ((1UL << (8 * (int)width)) - 1);
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            if ((offset & 15) != 0 || width < AccessWidth.Dword)
            {
                return;
            }

            int ended = -1;
            bool send = false;
            lock (_owner._gate)
            {
                uint register = offset >> 4;
                _owner.WriteRegister(register == RegSelfIpi ? uint.MaxValue : register, (uint)value, ref ended, ref send);
            }

            _owner.AfterWrite(ended, send);
        }
    }
}

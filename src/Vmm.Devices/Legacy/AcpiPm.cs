// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Pci;

namespace Vmm.Devices.Legacy;

// Theory. The power management function of the PIIX4 (82371AB data sheet, order number 290562, chapter 7), which is
// what the 440FX machine of every other VMM has: ACPI PM1 event and control registers, the 3.579545 MHz timer of 24
// bits, a general-purpose event block, and the APM ports 0xB2/0xB3 through which a guest switches to ACPI mode. The
// interrupt is the SCI, IRQ 9, level-triggered.
//
// The register block lies at the port that PMBASE (configuration 0x40) says while PMREGMISC bit 0 is set. There is no
// system management mode: DEVACTB shows APMC_EN set from the start, which firmware takes as "SMM is set up already",
// and writing ACPI_ENABLE to 0xB2 sets SCI_EN directly.
//
// Sleep types: 0 is S5 (off), 1 is S3, 4 is S4; the DSDT's \_Sx objects must say the same.

/// <summary>ACPI power management. See the theory at the top of this file.</summary>
public sealed class AcpiPm : PciFunction
{
    /// <summary>Port where firmware of this family puts the registers, and where direct boot does.</summary>
    public const ushort DefaultPort = 0x600;

    /// <summary>Bytes of the register block.</summary>
    public const uint BlockBytes = 64;

    /// <summary>PM timer frequency in Hz.</summary>
    public const long TimerHz = 3_579_545;

    /// <summary>APM control port (FADT SMI_CMD).</summary>
    public const ushort ApmPort = 0xB2;

    /// <summary>Value for <see cref="ApmPort"/> that enters ACPI mode.</summary>
    public const byte AcpiEnable = 0xF1;

    /// <summary>Value for <see cref="ApmPort"/> that leaves ACPI mode.</summary>
    public const byte AcpiDisable = 0xF0;

    /// <summary>SLP_TYP of S5.</summary>
    public const byte SleepTypeS5 = 0;

    /// <summary>SLP_TYP of S3.</summary>
    public const byte SleepTypeS3 = 1;

    /// <summary>SLP_TYP of S4.</summary>
    public const byte SleepTypeS4 = 4;

    /// <summary>Offset of the PM1 event registers (status, enable).</summary>
    public const uint Pm1Event = 0x00;

    /// <summary>Offset of PM1 control.</summary>
    public const uint Pm1Control = 0x04;

    /// <summary>Offset of the timer.</summary>
    public const uint PmTimer = 0x08;

    /// <summary>Offset of the general-purpose events: 2 bytes status, 2 bytes enable.</summary>
    public const uint Gpe0 = 0x0C;

    private const ushort StatusTimer = 1 << 0;
    private const ushort StatusGlobal = 1 << 5;
    private const ushort StatusPowerButton = 1 << 8;
    private const ushort StatusRtc = 1 << 10;
    private const ushort StatusWake = 1 << 15;
    private const ushort ControlSciEnable = 1 << 0;
    private const ushort ControlSleepEnable = 1 << 13;

    private const int PmBase = 0x40;
    private const int PmRegMisc = 0x80;

    private readonly Lock _gate = new();
    private readonly IClock _clock;
    private readonly IIrqLine _sci;
    private readonly ISystemControl _system;
    private readonly IGuestTimer _timer;
    private readonly Block _block;
    private readonly byte[] _scratch = new byte[BlockBytes];
    private PciBus? _bus;
    private AddressMapping? _mapping;
    private ushort _port;
    private ushort _status;
    private ushort _enable;
    private ushort _control;
    private ushort _gpeStatus;
    private ushort _gpeEnable;
    private byte _apmControl;
    private byte _apmStatus;
    private long _timerEpoch;
    private bool _paused = true;

    /// <summary>Makes the function; it belongs at 00:01.3.</summary>
    /// <param name="clock">Guest time.</param>
    /// <param name="sci">IRQ 9.</param>
    /// <param name="system">Told of sleep and power-off.</param>
    public AcpiPm(IClock clock, IIrqLine sci, ISystemControl system)
        : base("acpi", new PciIdentity(0x8086, 0x7113, 0x06_80_00, 0x03, 0x1AF4, 0x1100))
    {
        ArgumentNullException.ThrowIfNull(clock);
        _clock = clock;
        _sci = sci;
        _system = system;
        _timer = clock.CreateTimer("acpi-pm", OnTimer);
        _block = new Block(this);
        ApmWindow = new Apm(this);
        DefineConfig16(PciConfig.Command, 0, 0x0001);
        DefineConfig16(PciConfig.Status, 0x0280, 0, 0x7800);
        DefineConfig8(PciConfig.InterruptPin, 1, 0);
        DefineConfig8(PciConfig.InterruptLine, 9, 0xFF);
        DefineConfig32(PmBase, 1, 0x0000_FFC0);
        DefineConfig32(0x44, 0, 0xFFFF_FFFF);
        DefineConfig32(0x48, 0, 0xFFFF_FFFF);
        DefineConfig32(0x4C, 0, 0xFFFF_FFFF);
        DefineConfig32(0x50, 0, 0xFFFF_FFFF);
        DefineConfig32(0x54, 0, 0xFFFF_FFFF);
        DefineConfig32(0x58, 0x0200_0000, 0xFFFF_FFFF);
        for (int i = 0x5C; i < 0x80; i += 4)
        {
            DefineConfig32(i, 0, 0xFFFF_FFFF);
        }

        DefineConfig8(PmRegMisc, 0, 0x01);
        DefineConfig32(0x90, 1, 0x0000_FFF0);
        DefineConfig8(0xD2, 0, 0x0F);
        DefineConfig32(0xD4, 0, 0xFFFF_FFFF);
    }

    /// <inheritdoc/>
    public override int StateVersion => 1;

    /// <summary>The two ports at <see cref="ApmPort"/>.</summary>
    public IRegisterWindow ApmWindow { get; }

    /// <summary>Where the registers are: as firmware decided, or <see cref="DefaultPort"/> while it has not.</summary>
    public ushort RegisterPort
    {
        get
        {
            uint port = GetConfig(PmBase, AccessWidth.Dword) & 0xFFC0;
            return (GetConfig(PmRegMisc, AccessWidth.Byte) & 1) != 0 && port != 0 ? (ushort)port : DefaultPort;
        }
    }

    /// <summary>The guest is in ACPI mode and listens to the power button.</summary>
    public bool ListensToPowerButton
    {
        get
        {
            lock (_gate)
            {
                return (_control & ControlSciEnable) != 0 && (_enable & StatusPowerButton) != 0;
            }
        }
    }

    /// <summary>Turns the register block on as firmware would. For machines without firmware, after Reset.</summary>
    public void Enable(ushort port = DefaultPort)
    {
        WriteConfig(PmBase, AccessWidth.Dword, port);
        WriteConfig(PmRegMisc, AccessWidth.Byte, 1);
        WriteConfig(PciConfig.Command, AccessWidth.Word, 1);
    }

    /// <summary>Presses the power button. Any thread.</summary>
    /// <returns>True when the guest listens.</returns>
    public bool PressPowerButton()
    {
        lock (_gate)
        {
            _status |= StatusPowerButton;
            Update();
            return (_control & ControlSciEnable) != 0 && (_enable & StatusPowerButton) != 0;
        }
    }

    /// <summary>Raises a general-purpose event (hot-plug and the like). Any thread.</summary>
    /// <param name="number">0..15.</param>
    public void RaiseGpe(int number)
    {
        lock (_gate)
        {
            _gpeStatus |= (ushort)(1 << (number & 15));
            Update();
        }
    }

    /// <inheritdoc/>
    public override void Pause()
    {
        lock (_gate)
        {
            _paused = true;
            _timer.Cancel();
        }
    }

    /// <inheritdoc/>
    public override void Resume()
    {
        lock (_gate)
        {
            _paused = false;
            Update();
        }
    }

    /// <inheritdoc/>
    protected override void OnAttached(PciBus bus) => _bus = bus;

    /// <inheritdoc/>
    protected override void OnConfigWritten(int offset, int length)
    {
        if (offset < PmBase + 4 || (offset <= PmRegMisc && offset + length > PmRegMisc) || offset < 6)
        {
            Place();
        }
    }

    /// <inheritdoc/>
    protected override void ResetCard()
    {
        lock (_gate)
        {
            _status = 0;
            _enable = 0;
            _control = 0;
            _gpeStatus = 0;
            _gpeEnable = 0;
            _apmControl = 0;
            _apmStatus = 0;
            Array.Clear(_scratch);
            _timerEpoch = Ticks >> 23;
            Update();
        }

        Place();
    }

    /// <inheritdoc/>
    protected override void SaveCard(StateWriter writer)
    {
        lock (_gate)
        {
            Poll();
            writer.Write("status", (ulong)_status);
            writer.Write("enable", (ulong)_enable);
            writer.Write("control", (ulong)_control);
            writer.Write("gpeStatus", (ulong)_gpeStatus);
            writer.Write("gpeEnable", (ulong)_gpeEnable);
            writer.Write("apmControl", (ulong)_apmControl);
            writer.Write("apmStatus", (ulong)_apmStatus);
            writer.WriteBytes("scratch", _scratch);
        }
    }

    /// <inheritdoc/>
    protected override void LoadCard(StateReader reader, int version)
    {
        lock (_gate)
        {
            _status = reader.ReadUInt16("status");
            _enable = reader.ReadUInt16("enable");
            _control = reader.ReadUInt16("control");
            _gpeStatus = reader.ReadUInt16("gpeStatus");
            _gpeEnable = reader.ReadUInt16("gpeEnable");
            _apmControl = reader.ReadByte("apmControl");
            _apmStatus = reader.ReadByte("apmStatus");
            reader.ReadBytes("scratch", _scratch);
            _timerEpoch = Ticks >> 23;
            Update();
        }

        Place();
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        _timer.Dispose();
        if (_mapping is { } mapping)
        {
            _bus?.Ports.Unmap(mapping);
            _mapping = null;
        }

        base.Dispose(disposing);
    }

    private long Ticks
    {
        get
        {
            long now = _clock.NowNs;
            long seconds = now / 1_000_000_000;
            return (seconds * TimerHz) + ((now - (seconds * 1_000_000_000)) * TimerHz / 1_000_000_000);
        }
    }

    private void Place()
    {
        lock (_gate)
        {
            bool enabled = (GetConfig(PmRegMisc, AccessWidth.Byte) & 1) != 0;
            ushort port = enabled ? (ushort)(GetConfig(PmBase, AccessWidth.Dword) & 0xFFC0) : (ushort)0;
            if (port == _port || _bus is null)
            {
                return;
            }

            if (_mapping is { } old)
            {
                _bus.Ports.Unmap(old);
                _mapping = null;
            }

            _port = port;
            if (port != 0)
            {
                _mapping = _bus.Ports.Map(port, _block, BarPriority);
            }
        }
    }

    // Under the gate. TMR_STS is set whenever bit 23 of the timer changes (ACPI 6.4 §4.8.2.1).
    private void Poll()
    {
        long epoch = Ticks >> 23;
        if (epoch != _timerEpoch)
        {
            _timerEpoch = epoch;
            _status |= StatusTimer;
        }
    }

    private void Update()
    {
        Poll();
        bool fixedEvent = (_status & _enable & (StatusTimer | StatusGlobal | StatusPowerButton | StatusRtc)) != 0;
        bool sci = (_control & ControlSciEnable) != 0 && (fixedEvent || (_gpeStatus & _gpeEnable) != 0);
        _sci.Set(sci);
        if (_paused || (_enable & StatusTimer) == 0 || (_status & StatusTimer) != 0)
        {
            _timer.Cancel();
            return;
        }

        long next = (_timerEpoch + 1) << 23;
        long seconds = next / TimerHz;
        long rest = next - (seconds * TimerHz);
        _timer.ArmAt((seconds * 1_000_000_000) + (((rest * 1_000_000_000) + TimerHz - 1) / TimerHz));
    }

    private void OnTimer()
    {
        lock (_gate)
        {
            if (!_paused)
            {
                Update();
            }
        }
    }

    private byte ReadByte(uint offset)
    {
        switch (offset)
        {
            case 0 or 1:
                Poll();
                return (byte)(_status >> (int)(8 * offset));
            case 2 or 3:
                return (byte)(_enable >> (int)(8 * (offset - 2)));
            case 4 or 5:
                return (byte)(_control >> (int)(8 * (offset - 4)));
            case 12 or 13:
                return (byte)(_gpeStatus >> (int)(8 * (offset - 12)));
            case 14 or 15:
                return (byte)(_gpeEnable >> (int)(8 * (offset - 14)));
            case >= 0x28:
                return _scratch[offset];
            default:
                return 0;
        }
    }

    private void WriteByte(uint offset, byte value)
    {
        int shift = (int)(8 * (offset & 1));
        ushort bits = (ushort)(value << shift);
        ushort mask = (ushort)(0xFF << shift);
        switch (offset)
        {
            case 0 or 1:
                Poll();
                _status &= (ushort)~bits;
                break;
            case 2 or 3:
                _enable = (ushort)(((_enable & ~mask) | bits) & (StatusTimer | StatusGlobal | StatusPowerButton | StatusRtc));
                break;
            case 4 or 5:
                _control = (ushort)(((_control & ~mask) | bits) & 0x1C07 & ~4);
                if ((bits & 4) != 0)
                {
                    _status |= StatusGlobal;
                }

                break;
            case 12 or 13:
                _gpeStatus &= (ushort)~bits;
                break;
            case 14 or 15:
                _gpeEnable = (ushort)((_gpeEnable & ~mask) | bits);
                break;
            case >= 0x28:
                _scratch[offset] = value;
                break;
            default:
                break;
        }
    }

    private sealed class Block : IRegisterWindow
    {
        private readonly AcpiPm _owner;

        public Block(AcpiPm owner) => _owner = owner;

        public uint Length => BlockBytes;

        public ulong Read(uint offset, AccessWidth width)
        {
            if (offset is >= PmTimer and < PmTimer + 4)
            {
                ulong ticks = (ulong)_owner.Ticks & 0xFF_FFFF;
                ticks >>= (int)(8 * (offset - PmTimer));
                return width >= AccessWidth.Dword ? ticks : ticks & ((1UL << (8 * (int)width)) - 1);
            }

            lock (_owner._gate)
            {
                ulong value = 0;
                for (int i = 0; i < (int)width; i++)
                {
                    value |= (ulong)_owner.ReadByte(offset + (uint)i) << (8 * i);
                }

                return value;
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            int sleep = -1;
            lock (_owner._gate)
            {
                for (int i = 0; i < (int)width; i++)
                {
                    uint at = offset + (uint)i;
                    byte part = (byte)(value >> (8 * i));
                    _owner.WriteByte(at, part);
                    if (at == Pm1Control + 1 && (part & (ControlSleepEnable >> 8)) != 0)
                    {
                        sleep = (part >> 2) & 7;
                    }
                }

                _owner.Update();
            }

            switch (sleep)
            {
                case SleepTypeS5:
                    _owner._system.Request(SystemRequest.PowerOff, "ACPI S5");
                    break;
                case SleepTypeS3:
                    _owner._system.Request(SystemRequest.SuspendToRam, "ACPI S3");
                    break;
                case SleepTypeS4:
                    _owner._system.Request(SystemRequest.Hibernate, "ACPI S4");
                    break;
                default:
                    break;
            }
        }
    }

    private sealed class Apm : IRegisterWindow
    {
        private readonly AcpiPm _owner;

        public Apm(AcpiPm owner) => _owner = owner;

        public uint Length => 2;

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_owner._gate)
            {
                ulong value = offset == 0 ? _owner._apmControl : _owner._apmStatus;
                return width == AccessWidth.Word ? value | ((ulong)_owner._apmStatus << 8) : value;
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            lock (_owner._gate)
            {
                if (width == AccessWidth.Word)
                {
                    _owner._apmStatus = (byte)(value >> 8);
                }

                if (offset == 1)
                {
                    _owner._apmStatus = (byte)value;
                    return;
                }

                _owner._apmControl = (byte)value;
                if ((byte)value == AcpiEnable)
                {
                    _owner._control |= ControlSciEnable;
                }
                else if ((byte)value == AcpiDisable)
                {
                    _owner._control &= unchecked((ushort)~ControlSciEnable);
                }

                _owner.Update();
            }
        }
    }
}

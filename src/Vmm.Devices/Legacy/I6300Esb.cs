// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Pci;

namespace Vmm.Devices.Legacy;

/// <summary>
/// The watchdog of the Intel 6300ESB (data sheet 300641, chapter 16): two stages of 20 bits on a 33 MHz clock divided by
/// 2^15 or 2^5. The first stage interrupts, the second tells the machine. Registers in BAR 0 are unlocked by writing
/// 0x80, 0x86 to the reload register.
/// </summary>
public sealed class I6300Esb : PciFunction
{
    private const int ConfigRegister = 0x60;
    private const int LockRegister = 0x68;

    private readonly Lock _gate = new();
    private readonly IClock _clock;
    private readonly ISystemControl _system;
    private readonly IGuestTimer _timer;
    private uint _preload1;
    private uint _preload2;
    private int _unlock;
    private int _stage;
    private bool _interrupted;
    private bool _previousReboot;
    private long _deadlineNs;
    private bool _paused = true;

    /// <summary>Makes the watchdog.</summary>
    /// <param name="clock">Guest time.</param>
    /// <param name="system">Told when the second stage runs out.</param>
    public I6300Esb(IClock clock, ISystemControl system)
        : base("watchdog", new PciIdentity(0x8086, 0x25AB, 0x08_80_00))
    {
        ArgumentNullException.ThrowIfNull(clock);
        _clock = clock;
        _system = system;
        _timer = clock.CreateTimer("i6300esb", OnTimer);
        AddBar(0, PciBarKind.Memory32, new Window(this));
        UseIntx();
        DefineConfig16(ConfigRegister, 0, 0x0027);
        DefineConfig8(LockRegister, 0, 0x07);
    }

    /// <inheritdoc/>
    public override int StateVersion => 1;

    /// <summary>The guest has started it.</summary>
    public bool IsEnabled => (GetConfig(LockRegister, AccessWidth.Byte) & 2) != 0;

    private bool IsLocked => (GetConfig(LockRegister, AccessWidth.Byte) & 1) != 0;

    // Configuration bit 2 chooses 1 kHz (2^15) or 1 MHz (2^5) steps; a preload's low bits below the divider are kept.
    private long StageNs(uint preload)
    {
        int shift = (GetConfig(ConfigRegister, AccessWidth.Word) & 4) != 0 ? 5 : 15;
        return Math.Max(1, (long)(((UInt128)preload << shift) * 1_000_000_000 / 33_000_000));
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
            if (_stage != 0)
            {
                _timer.ArmAt(_deadlineNs);
            }
        }
    }

    /// <inheritdoc/>
    protected override void ResetCard()
    {
        lock (_gate)
        {
            _preload1 = _preload2 = 0xF_FFFF;
            _unlock = 0;
            _interrupted = false;
            Stop();
        }
    }

    /// <inheritdoc/>
    protected override void SaveCard(StateWriter writer)
    {
        lock (_gate)
        {
            writer.Write("preload1", (ulong)_preload1);
            writer.Write("preload2", (ulong)_preload2);
            writer.Write("unlock", (ulong)_unlock);
            writer.Write("stage", (ulong)_stage);
            writer.Write("interrupted", _interrupted);
            writer.Write("previousReboot", _previousReboot);
            writer.Write("left", _stage == 0 ? 0 : _deadlineNs - _clock.NowNs);
        }
    }

    /// <inheritdoc/>
    protected override void LoadCard(StateReader reader, int version)
    {
        lock (_gate)
        {
            _preload1 = (uint)reader.ReadBounded("preload1", 0xF_FFFF);
            _preload2 = (uint)reader.ReadBounded("preload2", 0xF_FFFF);
            _unlock = (int)reader.ReadBounded("unlock", 2);
            _stage = (int)reader.ReadBounded("stage", 2);
            _interrupted = reader.ReadBoolean("interrupted");
            _previousReboot = reader.ReadBoolean("previousReboot");
            _deadlineNs = _clock.NowNs + Math.Clamp(reader.ReadInt64("left"), 0, long.MaxValue / 4);
        }
    }

    /// <inheritdoc/>
    protected override void OnConfigWritten(int offset, int length)
    {
        if (offset > LockRegister || offset + length <= LockRegister)
        {
            return;
        }

        lock (_gate)
        {
            bool enabled = (GetConfig(LockRegister, AccessWidth.Byte) & 2) != 0;
            if (enabled && _stage == 0)
            {
                Start(1);
            }
            else if (!enabled && _stage != 0)
            {
                Stop();
            }
        }
    }

    /// <inheritdoc/>
    protected override bool IsConfigLocked(int offset) => offset == LockRegister && IsLocked;

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        _timer.Dispose();
        base.Dispose(disposing);
    }

    private void Start(int stage)
    {
        _stage = stage;
        _deadlineNs = _clock.NowNs + StageNs(stage == 1 ? _preload1 : _preload2);
        if (!_paused)
        {
            _timer.ArmAt(_deadlineNs);
        }
    }

    private void Stop()
    {
        _stage = 0;
        _timer.Cancel();
    }

    private void OnTimer()
    {
        bool expired = false;
        lock (_gate)
        {
            if (_paused || _stage == 0 || _clock.NowNs < _deadlineNs)
            {
                return;
            }

            bool freeRunning = (GetConfig(LockRegister, AccessWidth.Byte) & 4) != 0;
            if (_stage == 1 && !freeRunning)
            {
                _interrupted = true;

                // Configuration bits 1..0: 00 is an interrupt, 11 none.
                if ((GetConfig(ConfigRegister, AccessWidth.Word) & 3) == 0)
                {
                    Intx.Set(true);
                }

                Start(2);
            }
            else
            {
                _previousReboot = true;
                expired = (GetConfig(ConfigRegister, AccessWidth.Word) & 0x20) == 0;
                Stop();
                if (freeRunning)
                {
                    Start(1);
                }
            }
        }

        if (expired)
        {
            _system.Request(SystemRequest.WatchdogExpired, "i6300esb");
        }
    }

    private sealed class Window : IRegisterWindow
    {
        private readonly I6300Esb _owner;

        public Window(I6300Esb owner) => _owner = owner;

        public uint Length => 16;

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_owner._gate)
            {
                return offset switch
                {
                    8 when _owner._interrupted => 1,
                    12 when _owner._previousReboot => 0x200,
                    _ => 0,
                };
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            lock (_owner._gate)
            {
                if (offset == 12 && (byte)value == 0x80)
                {
                    _owner._unlock = 1;
                    return;
                }

                if (offset == 12 && (byte)value == 0x86 && _owner._unlock == 1)
                {
                    _owner._unlock = 2;
                    return;
                }

                if (_owner._unlock != 2)
                {
                    return;
                }

                // Unlocked for one register write.
                _owner._unlock = 0;
                switch (offset)
                {
                    case 0:
                        _owner._preload1 = (uint)value & 0xF_FFFF;
                        break;
                    case 4:
                        _owner._preload2 = (uint)value & 0xF_FFFF;
                        break;
                    case 8 when (value & 1) != 0:
                        _owner._interrupted = false;
                        _owner.Intx.Set(false);
                        break;
                    case 12:
                        if ((value & 0x200) != 0)
                        {
                            _owner._previousReboot = false;
                        }

                        if ((value & 0x100) != 0 && _owner._stage != 0)
                        {
                            _owner._interrupted = false;
                            _owner.Intx.Set(false);
                            _owner.Start(1);
                        }

                        break;
                    default:
                        break;
                }
            }
        }
    }
}

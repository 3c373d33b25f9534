// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Legacy;

// Theory. The ports of a PC that are one byte wide and belong to no chip in particular. None has a timer or an
// interrupt; their state, where they have any, is one byte.

/// <summary>
/// Port 0x92, "system control port A" of the PS/2: bit 0 resets the processor when it rises, bit 1 is the A20 gate.
/// </summary>
public sealed class Port92 : IDevice, IRegisterWindow
{
    /// <summary>Its address.</summary>
    public const ushort Port = 0x92;

    private readonly ISystemControl _system;
    private volatile byte _reset;

    /// <summary>Makes the port.</summary>
    public Port92(ISystemControl system) => _system = system;

    /// <inheritdoc/>
    public string Id => "port92";

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <inheritdoc/>
    public uint Length => 1;

    /// <inheritdoc/>
    public void Reset()
    {
        _reset = 0;
        _system.SetA20(true);
    }

    /// <inheritdoc/>
    public void Pause()
    {
    }

    /// <inheritdoc/>
    public void Resume()
    {
    }

    /// <inheritdoc/>
    public void Save(StateWriter writer) => writer.Write("value", Value);

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        _reset = 0;
        _system.SetA20((reader.ReadByte("value") & 2) != 0);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
    }

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width) => Value;

    private ulong Value => _reset | (_system.IsA20Open ? 2UL : 0);

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value)
    {
        byte old = _reset;
        _reset = (byte)(value & 1);
        _system.SetA20((value & 2) != 0);
        if ((value & 1) != 0 && old == 0)
        {
            _system.Request(SystemRequest.ProcessorReset, "port 0x92");
        }
    }
}

/// <summary>
/// A port for test guests: a byte written ends the VM with status (value &lt;&lt; 1) | 1 (QEMU's isa-debug-exit).
/// </summary>
public sealed class DebugExitPort : IRegisterWindow
{
    private readonly ISystemControl _system;

    /// <summary>Makes the port.</summary>
    public DebugExitPort(ISystemControl system) => _system = system;

    /// <inheritdoc/>
    public uint Length => 4;

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width) => 0;

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value) => _system.Exit((((int)value << 1) | 1) & 0xFF);
}

/// <summary>Port 0x80: POST codes; guests also write it to wait a microsecond. The last code can be asked for.</summary>
public sealed class PostPort : IRegisterWindow
{
    /// <summary>Its address.</summary>
    public const ushort Port = 0x80;

    private volatile byte _last;

    /// <summary>The last code.</summary>
    public byte LastCode => _last;

    /// <inheritdoc/>
    public uint Length => 1;

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width) => _last;

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value) => _last = (byte)value;
}

/// <summary>
/// A debug console: bytes written go to a back end, reads say that it is there (0xE9, as Bochs and SeaBIOS expect).
/// </summary>
public sealed class DebugConsolePort : IRegisterWindow
{
    /// <summary>Where SeaBIOS and OVMF write.</summary>
    public const ushort FirmwarePort = 0x402;

    private readonly ICharBackend _backend;

    /// <summary>Makes the port.</summary>
    public DebugConsolePort(ICharBackend backend) => _backend = backend;

    /// <inheritdoc/>
    public uint Length => 1;

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width) => 0xE9;

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value) => _backend.Write([(byte)value]);
}

/// <summary>
/// pvpanic (QEMU docs/specs/pvpanic): reads show the events that are known, writes report them: bit 0 panicked,
/// bit 1 crash kernel loaded, bit 2 shutdown.
/// </summary>
public sealed class PvPanic : IRegisterWindow
{
    /// <summary>Port of the ISA variant.</summary>
    public const ushort Port = 0x505;

    private const byte Events = 0x07;

    private readonly ISystemControl _system;
    private long _unknown;

    /// <summary>Makes the port.</summary>
    public PvPanic(ISystemControl system) => _system = system;

    /// <summary>Writes of events that are not known.</summary>
    public long Unknown => Interlocked.Read(ref _unknown);

    /// <inheritdoc/>
    public uint Length => 1;

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width) => Events;

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value)
    {
        if ((value & ~(ulong)Events) != 0)
        {
            Interlocked.Increment(ref _unknown);
        }

        if ((value & 1) != 0)
        {
            _system.Request(SystemRequest.GuestPanicked, "pvpanic");
        }
        else if ((value & 2) != 0)
        {
            _system.Request(SystemRequest.GuestCrashLoaded, "pvpanic");
        }
        else if ((value & 4) != 0)
        {
            _system.Request(SystemRequest.GuestShutdown, "pvpanic");
        }
    }
}

/// <summary>
/// The "pc-testdev" of kvm-unit-tests: 24 bytes of ports that drive interrupt lines (0x2000), 8 bytes of ports that
/// read back what was written (0xE0), and 64 KiB of registers that do the same (0xFF000000).
/// </summary>
public sealed class PcTestDevice : IRegisterWindow
{
    /// <summary>First port of the interrupt lines.</summary>
    public const ushort IrqPort = 0x2000;

    /// <summary>First port of the echo registers.</summary>
    public const ushort EchoPort = 0xE0;

    /// <summary>Address of the echo registers in memory.</summary>
    public const ulong EchoAddress = 0xFF00_0000;

    private const int EchoPageBytes = 0x1_0000;

    private readonly IIrqLine[] _lines;

    /// <summary>Makes the device.</summary>
    /// <param name="lines">One wire per global system interrupt, at most 24.</param>
    public PcTestDevice(IIrqLine[] lines)
    {
        ArgumentNullException.ThrowIfNull(lines);
        _lines = lines;
        EchoPorts = new Echo(8);
        EchoPage = new Echo(EchoPageBytes);
    }

    /// <summary>Ports for <see cref="EchoPort"/>.</summary>
    public IRegisterWindow EchoPorts { get; }

    /// <summary>Registers for <see cref="EchoAddress"/>.</summary>
    public IRegisterWindow EchoPage { get; }

    /// <inheritdoc/>
    public uint Length => (uint)_lines.Length;

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width) => 0;

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value) => _lines[offset].Set((value & 0xFF) != 0);

    private sealed class Echo : IRegisterWindow
    {
        private readonly Lock _gate = new();
        private readonly byte[] _bytes;

        public Echo(int length) => _bytes = new byte[length];

        public uint Length => (uint)_bytes.Length;

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_gate)
            {
                ulong value = 0;
                for (uint i = 0; i < (uint)width; i++)
                {
                    value |= (ulong)_bytes[offset + i] << (int)(8 * i);
                }

                return value;
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            lock (_gate)
            {
                for (uint i = 0; i < (uint)width; i++)
                {
                    _bytes[offset + i] = (byte)(value >> (int)(8 * i));
                }
            }
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Legacy;

namespace Vmm.Devices.Pci;

// Theory. One root bus, number 0, as on an i440FX board. The bus knows its functions by device and function number and
// gives them what they reach: the two address maps for BARs, guest memory for DMA, the local APICs for messages, and
// the interrupt router for INTx. Configuration mechanism #1 (PCI 3.0 §3.2.2.3.2) is a pair of ports in front of it; a
// memory-mapped window (ECAM) can stand beside them.
//
// The four INTx pins of 32 devices are wired to four router inputs (PIRQA..PIRQD), shifted by one per device so that
// cards with one pin spread over all: input = (pin - 1 + device - 1) mod 4, which is what SeaBIOS assumes for this board.
// Each input is the OR of its wires.

/// <summary>Where the bus's INTx wires end.</summary>
public interface IPciInterruptRouter
{
    /// <summary>Drives a router input.</summary>
    /// <param name="input">0 (PIRQA) to 3 (PIRQD).</param>
    /// <param name="asserted">OR of all wires on it.</param>
    void SetPirq(int input, bool asserted);
}

/// <summary>The root bus.</summary>
public sealed class PciBus
{
    private readonly PciFunction?[] _functions = new PciFunction?[256];
    private readonly SharedLine[] _pirqs = new SharedLine[4];

    /// <summary>Makes an empty bus.</summary>
    /// <param name="ports">For I/O BARs.</param>
    /// <param name="mmio">For memory BARs.</param>
    /// <param name="memory">Guest memory for DMA.</param>
    /// <param name="msiSink">Takes messages.</param>
    public PciBus(AddressMap ports, AddressMap mmio, IDmaPort memory, IMsiSink msiSink)
    {
        Ports = ports;
        Mmio = mmio;
        Memory = memory;
        MsiSink = msiSink;
        for (int i = 0; i < _pirqs.Length; i++)
        {
            int input = i;
            _pirqs[i] = new SharedLine(new DelegateLine(level => Router?.SetPirq(input, level)));
        }
    }

    /// <summary>I/O ports.</summary>
    public AddressMap Ports { get; }

    /// <summary>Memory-mapped registers.</summary>
    public AddressMap Mmio { get; }

    /// <summary>Guest memory, ungated.</summary>
    public IDmaPort Memory { get; }

    /// <summary>Takes messages.</summary>
    public IMsiSink MsiSink { get; }

    /// <summary>Where INTx ends; set once, before the machine runs (the ISA bridge does).</summary>
    public IPciInterruptRouter? Router { get; set; }

    /// <summary>All functions in bus order.</summary>
    public IEnumerable<PciFunction> Functions
    {
        get
        {
            foreach (PciFunction? function in _functions)
            {
                if (function is not null)
                {
                    yield return function;
                }
            }
        }
    }

    /// <summary>The router input that a pin of a device is wired to.</summary>
    /// <param name="device">0..31.</param>
    /// <param name="pin">1 (INTA#) to 4.</param>
    public static int PirqOf(int device, int pin) => (pin - 1 + device - 1) & 3;

    /// <summary>Puts a function on the bus. Before the machine runs.</summary>
    /// <param name="function">The card.</param>
    /// <param name="device">0..31.</param>
    /// <param name="number">Function 0..7.</param>
    /// <exception cref="InvalidOperationException">The place is taken.</exception>
    public void Attach(PciFunction function, int device, int number = 0)
    {
        ArgumentNullException.ThrowIfNull(function);
        ArgumentOutOfRangeException.ThrowIfNegative(device);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(device, 31);
        ArgumentOutOfRangeException.ThrowIfNegative(number);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(number, 7);
        int index = (device * 8) + number;
        if (_functions[index] is not null)
        {
            throw new InvalidOperationException($"PCI {device:x2}.{number} is taken by {_functions[index]!.Id}");
        }

        _functions[index] = function;
        IIrqLine? wire = function.InterruptPin == 0
            ? null
            : _pirqs[PirqOf(device, function.InterruptPin)].AddInput();
        function.Attach(this, device, number, wire);

        // Every function of a device with several says so (PCI 3.0 §6.2.1 only asks it of function 0).
        bool several = false;
        for (int i = 1; i < 8; i++)
        {
            several |= _functions[(device * 8) + i] is not null;
        }

        if (several)
        {
            for (int i = 0; i < 8; i++)
            {
                _functions[(device * 8) + i]?.SetMultiFunction();
            }
        }
    }

    /// <summary>Puts a function at the first free device number from <paramref name="first"/> on.</summary>
    /// <exception cref="InvalidOperationException">All 32 are taken.</exception>
    public void AttachNext(PciFunction function, int first = 3)
    {
        for (int device = first; device < 32; device++)
        {
            if (IsFree(device))
            {
                Attach(function, device);
                return;
            }
        }

        throw new InvalidOperationException("no free PCI device number");
    }

    /// <summary>The function at a place, or null.</summary>
    public PciFunction? Find(int device, int number) =>
        (uint)device < 32 && (uint)number < 8 ? _functions[(device * 8) + number] : null;

    /// <summary>A configuration read; absent functions read as ones (master abort).</summary>
    /// <param name="deviceFunction">Device number times 8 plus function.</param>
    /// <param name="offset">0..255.</param>
    /// <param name="width">Byte, word or dword.</param>
    public uint ReadConfig(int deviceFunction, int offset, AccessWidth width) =>
        _functions[deviceFunction & 0xFF] is { } function
            ? function.ReadConfig(offset, width)
            : 0xFFFF_FFFF >> (8 * (4 - Math.Min((int)width, 4)));

    /// <summary>A configuration write; absent functions swallow it.</summary>
    public void WriteConfig(int deviceFunction, int offset, AccessWidth width, uint value) =>
        _functions[deviceFunction & 0xFF]?.WriteConfig(offset, width, value);

    private bool IsFree(int device)
    {
        for (int i = 0; i < 8; i++)
        {
            if (_functions[(device * 8) + i] is not null)
            {
                return false;
            }
        }

        return true;
    }
}

/// <summary>
/// Ports 0xCF8..0xCFF: configuration mechanism #1, and the reset control register 0xCF9 that lies inside it (PIIX3
/// data sheet §2.5.4). Only a dword access at 0xCF8 reaches CONFADD (82441FX §3.1.1); byte accesses at 0xCF9 are the
/// reset register, which asks for a reset when bit 2 rises.
/// </summary>
public sealed class PciConfigPorts : IDevice, IRegisterWindow
{
    /// <summary>First port.</summary>
    public const ushort Port = 0xCF8;

    private readonly PciBus _bus;
    private readonly ISystemControl _system;
    private uint _address;
    private byte _resetControl;

    /// <summary>Makes the ports.</summary>
    /// <param name="bus">The root bus.</param>
    /// <param name="system">Asked for resets.</param>
    public PciConfigPorts(PciBus bus, ISystemControl system)
    {
        _bus = bus;
        _system = system;
    }

    /// <inheritdoc/>
    public string Id => "pci-ports";

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <inheritdoc/>
    public uint Length => 8;

    /// <inheritdoc/>
    public void Reset()
    {
        Volatile.Write(ref _address, 0);
        _resetControl = 0;
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
    public void Save(StateWriter writer)
    {
        writer.Write("address", (ulong)_address);
        writer.Write("resetControl", (ulong)_resetControl);
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        _address = reader.ReadUInt32("address") & 0x80FF_FFFC;
        _resetControl = reader.ReadByte("resetControl");
    }

    /// <inheritdoc/>
    public void Dispose()
    {
    }

    // CONFADD is one register of the machine: guests serialise the pair of accesses themselves.

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width)
    {
        if (offset < 4)
        {
            return offset == 0 && width == AccessWidth.Dword ? Volatile.Read(ref _address)
                : offset == 1 && width == AccessWidth.Byte ? _resetControl
                : (1UL << (8 * (int)width)) - 1;
        }

        uint address = Volatile.Read(ref _address);
        if (!Selects(address) || width > AccessWidth.Dword)
        {
            return width > AccessWidth.Dword ? ulong.MaxValue : (1UL << (8 * (int)width)) - 1;
        }

        return _bus.ReadConfig((int)(address >> 8) & 0xFF, (int)((address & 0xFC) + (offset - 4)), width);
    }

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value)
    {
        if (offset < 4)
        {
            if (offset == 0 && width == AccessWidth.Dword)
            {
                Volatile.Write(ref _address, (uint)value & 0x80FF_FFFC);
            }
            else if (offset == 1 && width == AccessWidth.Byte)
            {
                bool rising = (value & 4) != 0 && (_resetControl & 4) == 0;
                _resetControl = (byte)(value & 2);
                if (rising)
                {
                    _system.Request(SystemRequest.Reset, "port 0xCF9");
                }
            }

            return;
        }

        uint address = Volatile.Read(ref _address);
        if (Selects(address) && width <= AccessWidth.Dword)
        {
            _bus.WriteConfig(
                (int)(address >> 8) & 0xFF, (int)((address & 0xFC) + (offset - 4)), width, (uint)value);
        }
    }

    // Enabled, and bus 0: other buses do not exist.
    private static bool Selects(uint address) => (address & 0x80FF_0000) == 0x8000_0000;
}

/// <summary>
/// Memory-mapped configuration space (PCI Express Base 3.0 §7.2.2) for bus 0: 4 KiB per function, of which the first
/// 256 bytes exist. Optional; reported to guests in the MCFG table.
/// </summary>
public sealed class PciEcam : IRegisterWindow
{
    private readonly PciBus _bus;

    /// <summary>Makes the window; the machine maps it at an address of its choice, a multiple of 1 MiB.</summary>
    public PciEcam(PciBus bus) => _bus = bus;

    /// <inheritdoc/>
    public uint Length => 1 << 20;

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width)
    {
        int register = (int)(offset & 0xFFF);
        int function = (int)(offset >> 12);
        if (width == AccessWidth.Qword)
        {
            return Read(offset, AccessWidth.Dword) | (Read(offset + 4, AccessWidth.Dword) << 32);
        }

        return register > 256 - (int)width
            ? (_bus.Find(function >> 3, function & 7) is null ? (1UL << (8 * (int)width)) - 1 : 0)
            : _bus.ReadConfig(function, register, width);
    }

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value)
    {
        int register = (int)(offset & 0xFFF);
        if (width == AccessWidth.Qword)
        {
            Write(offset, AccessWidth.Dword, (uint)value);
            Write(offset + 4, AccessWidth.Dword, value >> 32);
        }
        else if (register <= 256 - (int)width)
        {
            _bus.WriteConfig((int)(offset >> 12), register, width, (uint)value);
        }
    }
}

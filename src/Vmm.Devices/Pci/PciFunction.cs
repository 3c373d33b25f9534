// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Pci;

// Theory. A PCI function is 256 bytes of configuration space in front of up to six register windows (BARs), an
// option ROM, and ways to interrupt: a level wire (INTx), MSI, or MSI-X. Everything that is the same for all cards is
// here; a card derives from PciFunction, declares its parts in its constructor, and implements Reset/Save/Load of what
// is its own.
//
// Configuration space is an array with three masks of the same size: bits that the guest may write, bits that it
// clears by writing one, and the rest, which only the card changes. A card that needs to compute a register overrides
// OnConfigReading, one that acts on writes overrides OnConfigWritten; both are called without the gate.
//
// BARs. A BAR is mapped into the machine's address maps while its Command bit is set and its address is neither 0 nor
// all ones (what a guest writes to size it). Windows of BARs have a lower priority than the fixed chips, so that a BAR
// that a guest moves over an interrupt controller hides behind it. A BAR may also be RAM (a frame buffer): then the
// machine is told where it goes and maps it as a memory slot.
//
// DMA and messages pass only while Bus Master is set (PCI 3.0 §6.2.2); a read then fails like one of unmapped memory.
//
// Locks. The config gate is taken after a card's own gate (a card raises interrupts under its gate) and before the
// interrupt controllers'. Nothing of the card is called under it.

/// <summary>Numbers that tell a guest what a function is (PCI 3.0 §6.2.1).</summary>
/// <param name="VendorId">Offset 0x00.</param>
/// <param name="DeviceId">Offset 0x02.</param>
/// <param name="ClassCode">24 bits: base class, sub-class, programming interface.</param>
/// <param name="Revision">Offset 0x08.</param>
/// <param name="SubsystemVendorId">Offset 0x2C; 0 for none.</param>
/// <param name="SubsystemId">Offset 0x2E.</param>
public readonly record struct PciIdentity(
    ushort VendorId,
    ushort DeviceId,
    uint ClassCode,
    byte Revision = 0,
    ushort SubsystemVendorId = 0,
    ushort SubsystemId = 0);

/// <summary>What a base address register claims.</summary>
public enum PciBarKind
{
    /// <summary>I/O ports.</summary>
    Io,

    /// <summary>Memory below 4 GiB.</summary>
    Memory32,

    /// <summary>Memory below 4 GiB without side effects on reads.</summary>
    Memory32Prefetchable,

    /// <summary>Memory anywhere; takes two BARs.</summary>
    Memory64,

    /// <summary>Memory anywhere without side effects on reads; takes two BARs.</summary>
    Memory64Prefetchable,
}

/// <summary>Where a BAR that is RAM lies; implemented by the machine with a memory slot.</summary>
public interface IRamBarMapper
{
    /// <summary>
    /// Moves the RAM, or takes it out of guest-physical space. Called on a vCPU thread; must not wait for other vCPUs.
    /// </summary>
    /// <param name="guestAddress">The new first address, or null for nowhere.</param>
    void Move(ulong? guestAddress);
}

/// <summary>Offsets in the common header (PCI 3.0 §6.1) and bits of the Command and Status registers.</summary>
public static class PciConfig
{
    /// <summary>Vendor ID, 16 bits.</summary>
    public const int VendorId = 0x00;

    /// <summary>Device ID, 16 bits.</summary>
    public const int DeviceId = 0x02;

    /// <summary>Command, 16 bits.</summary>
    public const int Command = 0x04;

    /// <summary>Status, 16 bits.</summary>
    public const int Status = 0x06;

    /// <summary>Revision, 8 bits; the class code is in the three bytes after it.</summary>
    public const int Revision = 0x08;

    /// <summary>Cache line size, 8 bits.</summary>
    public const int CacheLineSize = 0x0C;

    /// <summary>Latency timer, 8 bits.</summary>
    public const int LatencyTimer = 0x0D;

    /// <summary>Header type, 8 bits; bit 7 says that the device has several functions.</summary>
    public const int HeaderType = 0x0E;

    /// <summary>First base address register.</summary>
    public const int Bar0 = 0x10;

    /// <summary>Subsystem vendor ID, 16 bits.</summary>
    public const int SubsystemVendorId = 0x2C;

    /// <summary>Subsystem ID, 16 bits.</summary>
    public const int SubsystemId = 0x2E;

    /// <summary>Expansion ROM base address.</summary>
    public const int RomBar = 0x30;

    /// <summary>Offset of the first capability, 8 bits.</summary>
    public const int CapabilityPointer = 0x34;

    /// <summary>Interrupt line: a scratch register for software, 8 bits.</summary>
    public const int InterruptLine = 0x3C;

    /// <summary>Interrupt pin: 1 is INTA#, 8 bits.</summary>
    public const int InterruptPin = 0x3D;

    /// <summary>Command: decodes I/O BARs.</summary>
    public const ushort CommandIo = 1 << 0;

    /// <summary>Command: decodes memory BARs.</summary>
    public const ushort CommandMemory = 1 << 1;

    /// <summary>Command: may do DMA and send messages.</summary>
    public const ushort CommandBusMaster = 1 << 2;

    /// <summary>Command: INTx is off.</summary>
    public const ushort CommandInterruptDisable = 1 << 10;

    /// <summary>Status: INTx is asserted (before the disable bit).</summary>
    public const ushort StatusInterrupt = 1 << 3;

    /// <summary>Status: there is a capability list.</summary>
    public const ushort StatusCapabilities = 1 << 4;
}

/// <summary>Base of every PCI card. See the theory at the top of this file.</summary>
public abstract class PciFunction : IDevice
{
    /// <summary>Bytes of conventional configuration space.</summary>
    public const int ConfigBytes = 256;

    /// <summary>Address-map priority of BAR windows: below the fixed chips (0).</summary>
    public const int BarPriority = -1;

    private const int RomIndex = 6;

    private readonly Lock _gate = new();
    private readonly byte[] _config = new byte[ConfigBytes];
    private readonly byte[] _initial = new byte[ConfigBytes];
    private readonly byte[] _writable = new byte[ConfigBytes];
    private readonly byte[] _clearable = new byte[ConfigBytes];
    private readonly Bar?[] _bars = new Bar?[7];
    private readonly GatedDma _dma;
    private readonly IntxLine _intx;
    private int _lastCapability;
    private int _nextCapability = 0x40;
    private PciBus? _bus;
    private IIrqLine? _intxWire;
    private volatile bool _busMaster;
    private bool _intxLevel;
    private bool _intxDriven;

    /// <summary>Makes a function with an empty header; the derived constructor adds BARs and capabilities.</summary>
    /// <param name="id">See <see cref="IDevice.Id"/>.</param>
    /// <param name="identity">Its numbers.</param>
    protected PciFunction(string id, in PciIdentity identity)
    {
        Id = id;
        Identity = identity;
        _dma = new GatedDma(this);
        _intx = new IntxLine(this);
        DefineConfig16(PciConfig.VendorId, identity.VendorId, 0);
        DefineConfig16(PciConfig.DeviceId, identity.DeviceId, 0);
        DefineConfig32(PciConfig.Revision, (identity.ClassCode << 8) | identity.Revision, 0);
        DefineConfig16(PciConfig.SubsystemVendorId, identity.SubsystemVendorId, 0);
        DefineConfig16(PciConfig.SubsystemId, identity.SubsystemId, 0);

        // Bus master, SERR# and parity response are writable on every card; I/O, memory and interrupt disable are
        // added with the parts that they control. Status bits 8 and 11..15 are write-one-to-clear (§6.2.3).
        DefineConfig16(PciConfig.Command, 0, PciConfig.CommandBusMaster | (1 << 6) | (1 << 8));
        DefineConfig16(PciConfig.Status, 0, 0, 0xF900);
        DefineConfig8(PciConfig.CacheLineSize, 0, 0xFF);
        DefineConfig8(PciConfig.LatencyTimer, 0, 0xFF);
        DefineConfig8(PciConfig.InterruptLine, 0, 0xFF);
    }

    /// <inheritdoc/>
    public string Id { get; }

    /// <summary>Its numbers.</summary>
    public PciIdentity Identity { get; }

    /// <inheritdoc/>
    public abstract int StateVersion { get; }

    /// <summary>Device number 0..31 once attached.</summary>
    public int DeviceNumber { get; private set; } = -1;

    /// <summary>Function number 0..7 once attached.</summary>
    public int FunctionNumber { get; private set; } = -1;

    /// <summary>MSI, when the card declared it.</summary>
    public PciMsi? Msi { get; private set; }

    /// <summary>MSI-X, when the card declared it.</summary>
    public PciMsiX? MsiX { get; private set; }

    /// <summary>INTx pin, 1 (INTA#) to 4, or 0 when the card has none.</summary>
    public int InterruptPin => _initial[PciConfig.InterruptPin];

    /// <summary>Guest memory as the card reaches it: nothing while Bus Master is clear.</summary>
    protected IDmaPort Dma => _dma;

    /// <summary>
    /// The card's interrupt pin. Level semantics. It stays off the wire while the guest disabled it or switched to
    /// messages (PCI 3.0 §6.8.3.3), and comes back when that ends. May be driven under the card's gate.
    /// </summary>
    protected IIrqLine Intx => _intx;

    /// <inheritdoc/>
    public void Reset()
    {
        lock (_gate)
        {
            _initial.CopyTo(_config.AsSpan());
            Msi?.Clear();
            MsiX?.Clear();
            _intxLevel = false;
            Refresh();
        }

        ResetCard();
    }

    /// <inheritdoc/>
    public virtual void Pause()
    {
    }

    /// <inheritdoc/>
    public virtual void Resume()
    {
    }

    /// <inheritdoc/>
    public void Save(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_gate)
        {
            writer.WriteBytes("pci.config", _config);
            writer.Write("pci.intx", _intxLevel);
            MsiX?.Save(writer);
        }

        SaveCard(writer);
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        Span<byte> saved = stackalloc byte[ConfigBytes];
        reader.ReadBytes("pci.config", saved);
        bool level = reader.ReadBoolean("pci.intx");
        lock (_gate)
        {
            for (int i = 0; i < ConfigBytes; i++)
            {
                int mask = _writable[i] | _clearable[i];
                _config[i] = (byte)((_initial[i] & ~mask) | (saved[i] & mask));
            }

            MsiX?.Load(reader);
            _intxLevel = level;
            Refresh();
        }

        LoadCard(reader, version);
    }

    /// <summary>Reads configuration space.</summary>
    /// <param name="offset">0..255, a multiple of the width.</param>
    /// <param name="width">Byte, word or dword.</param>
    public uint ReadConfig(int offset, AccessWidth width)
    {
        int length = (int)width;
        if (offset < 0 || offset > ConfigBytes - length || length > 4)
        {
            return 0xFFFF_FFFF >> (8 * (4 - Math.Min(length, 4)));
        }

        OnConfigReading(offset, length);
        uint value = 0;
        lock (_gate)
        {
            for (int i = length - 1; i >= 0; i--)
            {
                value = (value << 8) | _config[offset + i];
            }
        }

        return value;
    }

    /// <summary>Writes configuration space as the guest does.</summary>
    /// <param name="offset">0..255, a multiple of the width.</param>
    /// <param name="width">Byte, word or dword.</param>
    /// <param name="value">The value.</param>
    public void WriteConfig(int offset, AccessWidth width, uint value)
    {
        int length = (int)width;
        if (offset < 0 || offset > ConfigBytes - length || length > 4)
        {
            return;
        }

        for (int i = 0; i < length; i++)
        {
            if (IsConfigLocked(offset + i))
            {
                return;
            }
        }

        lock (_gate)
        {
            for (int i = 0; i < length; i++)
            {
                int at = offset + i;
                byte written = (byte)(value >> (8 * i));
                int next = (_config[at] & ~_writable[at]) | (written & _writable[at]);
                next &= ~(written & _clearable[at]);
                _config[at] = (byte)next;
            }

            Refresh();
        }

        OnConfigWritten(offset, length);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        lock (_gate)
        {
            foreach (Bar? bar in _bars)
            {
                bar?.Place(null, null);
            }
        }

        Dispose(disposing: true);
        GC.SuppressFinalize(this);
    }

    /// <summary>Declares a register BAR. Only in constructors.</summary>
    /// <param name="index">0..5; 64-bit kinds take <paramref name="index"/> + 1 too.</param>
    /// <param name="kind">Where it may lie.</param>
    /// <param name="window">The registers. The size is rounded up to a power of two; what lies beyond floats.</param>
    protected void AddBar(int index, PciBarKind kind, IRegisterWindow window)
    {
        ArgumentNullException.ThrowIfNull(window);
        AddBar(index, kind, window.Length, window, null);
    }

    /// <summary>Declares a BAR that is RAM. Only in constructors.</summary>
    /// <param name="index">0..5; 64-bit kinds take <paramref name="index"/> + 1 too.</param>
    /// <param name="kind">Where it may lie; not I/O.</param>
    /// <param name="lengthBytes">A power of two, at least 4096.</param>
    /// <param name="mapper">Told where it goes.</param>
    protected void AddRamBar(int index, PciBarKind kind, ulong lengthBytes, IRamBarMapper mapper)
    {
        ArgumentNullException.ThrowIfNull(mapper);
        ArgumentOutOfRangeException.ThrowIfEqual(kind, PciBarKind.Io);
        AddBar(index, kind, lengthBytes, null, mapper);
    }

    /// <summary>Gives the card an option ROM (PCI 3.0 §6.3). Only in constructors.</summary>
    /// <param name="image">The image; padded to a power of two of at least 2 KiB. Empty means none.</param>
    protected void AddRom(ReadOnlyMemory<byte> image)
    {
        if (image.IsEmpty)
        {
            return;
        }

        var window = new RomWindow(image);
        uint size = RoundUpToPowerOfTwo(Math.Max(window.Length, 2048u));
        _bars[RomIndex] = new Bar(PciBarKind.Memory32, size, window, null);
        DefineConfig32(PciConfig.RomBar, 0, ~(size - 1) | 1);
        AllowCommand(PciConfig.CommandMemory);
    }

    /// <summary>Gives the card an INTx pin. Only in constructors.</summary>
    /// <param name="pin">1 (INTA#) to 4.</param>
    protected void UseIntx(int pin = 1)
    {
        DefineConfig8(PciConfig.InterruptPin, (byte)pin, 0);
        AllowCommand(PciConfig.CommandInterruptDisable);
    }

    /// <summary>Appends a capability (PCI 3.0 §6.7). Only in constructors.</summary>
    /// <param name="capabilityId">Its identifier.</param>
    /// <param name="body">What follows the two-byte header.</param>
    /// <param name="writable">Bits that a guest may write, same layout; empty for none.</param>
    /// <returns>Offset of the capability's header.</returns>
    protected int AddCapability(byte capabilityId, ReadOnlySpan<byte> body, ReadOnlySpan<byte> writable)
    {
        int at = _nextCapability;
        if (at + 2 + body.Length > ConfigBytes)
        {
            throw new InvalidOperationException($"{Id}: configuration space is full");
        }

        DefineConfig8(at, capabilityId, 0);
        DefineConfig8(at + 1, 0, 0);
        for (int i = 0; i < body.Length; i++)
        {
            DefineConfig8(at + 2 + i, body[i], i < writable.Length ? writable[i] : (byte)0);
        }

        int link = _lastCapability == 0 ? PciConfig.CapabilityPointer : _lastCapability + 1;
        DefineConfig8(link, (byte)at, 0);
        _lastCapability = at;
        _nextCapability = (at + 2 + body.Length + 3) & ~3;
        DefineConfig16(PciConfig.Status, (ushort)(_initial[PciConfig.Status] | PciConfig.StatusCapabilities), 0, 0xF900);
        return at;
    }

    /// <summary>Says where the next capability goes; the default is 0x40. Only in constructors.</summary>
    protected void StartCapabilitiesAt(int offset) => _nextCapability = offset;

    /// <summary>Declares MSI with a 64-bit address (PCI 3.0 §6.8.1). Only in constructors.</summary>
    /// <param name="vectors">1, 2, 4, 8, 16 or 32.</param>
    protected PciMsi UseMsi(int vectors = 1)
    {
        int log2 = int.Log2(vectors);
        ReadOnlySpan<byte> body = [(byte)(0x80 | (log2 << 1)), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        ReadOnlySpan<byte> mask = [0x71, 0, 0xFC, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF];
        int at = AddCapability(0x05, body, mask);
        Msi = new PciMsi(this, at, log2);
        return Msi;
    }

    /// <summary>Declares MSI-X (PCI 3.0 §6.8.2) with table and pending bits in a BAR of its own. Only in constructors.</summary>
    /// <param name="vectors">1..2048.</param>
    /// <param name="barIndex">A free BAR; the table is at its start, the pending bits in its upper half.</param>
    protected PciMsiX UseMsiX(int vectors, int barIndex)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(vectors);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(vectors, 2048);
        uint half = Math.Max(2048u, RoundUpToPowerOfTwo((uint)vectors * 16));
        Span<byte> body = stackalloc byte[10];
        BinaryPrimitives.WriteUInt16LittleEndian(body, (ushort)(vectors - 1));
        BinaryPrimitives.WriteUInt32LittleEndian(body[2..], (uint)barIndex);
        BinaryPrimitives.WriteUInt32LittleEndian(body[6..], half | (uint)barIndex);
        int at = AddCapability(0x11, body, [0, 0xC0]);
        MsiX = new PciMsiX(this, at, vectors, half);
        AddBar(barIndex, PciBarKind.Memory32, MsiX.Window);
        return MsiX;
    }

    /// <summary>Declares registers of the card's own in configuration space. Only in constructors.</summary>
    /// <param name="offset">Where.</param>
    /// <param name="value">Reset value.</param>
    /// <param name="writable">Bits that a guest may write.</param>
    /// <param name="clearable">Bits that a guest clears by writing one.</param>
    protected void DefineConfig8(int offset, byte value, byte writable, byte clearable = 0)
    {
        _initial[offset] = value;
        _config[offset] = value;
        _writable[offset] = writable;
        _clearable[offset] = clearable;
    }

    /// <inheritdoc cref="DefineConfig8"/>
    protected void DefineConfig16(int offset, ushort value, ushort writable, ushort clearable = 0)
    {
        DefineConfig8(offset, (byte)value, (byte)writable, (byte)clearable);
        DefineConfig8(offset + 1, (byte)(value >> 8), (byte)(writable >> 8), (byte)(clearable >> 8));
    }

    /// <inheritdoc cref="DefineConfig8"/>
    protected void DefineConfig32(int offset, uint value, uint writable, uint clearable = 0)
    {
        DefineConfig16(offset, (ushort)value, (ushort)writable, (ushort)clearable);
        DefineConfig16(offset + 2, (ushort)(value >> 16), (ushort)(writable >> 16), (ushort)(clearable >> 16));
    }

    /// <summary>The card changes bits of its own configuration space; masks do not apply. Any thread.</summary>
    protected void SetConfig(int offset, AccessWidth width, uint value)
    {
        lock (_gate)
        {
            for (int i = 0; i < (int)width; i++)
            {
                _config[offset + i] = (byte)(value >> (8 * i));
            }

            Refresh();
        }
    }

    /// <summary>The card reads its own configuration space without <see cref="OnConfigReading"/>. Any thread.</summary>
    protected uint GetConfig(int offset, AccessWidth width)
    {
        lock (_gate)
        {
            uint value = 0;
            for (int i = (int)width - 1; i >= 0; i--)
            {
                value = (value << 8) | _config[offset + i];
            }

            return value;
        }
    }

    /// <summary>Power-on state of the card's own registers; configuration space is done already.</summary>
    protected abstract void ResetCard();

    /// <summary>Writes the card's own state; names must not start with "pci.".</summary>
    protected abstract void SaveCard(StateWriter writer);

    /// <summary>Restores the card's own state.</summary>
    protected abstract void LoadCard(StateReader reader, int version);

    /// <summary>A guest is about to read these bytes: a card may refresh them with <see cref="SetConfig"/>.</summary>
    protected virtual void OnConfigReading(int offset, int length)
    {
    }

    /// <summary>Whether a register of the card refuses writes at the moment (a lock bit).</summary>
    protected virtual bool IsConfigLocked(int offset) => false;

    /// <summary>A guest has written these bytes. Called on its thread, without the gate.</summary>
    protected virtual void OnConfigWritten(int offset, int length)
    {
    }

    /// <summary>Called once when the function is put on a bus.</summary>
    protected virtual void OnAttached(PciBus bus)
    {
    }

    /// <summary>Releases timers and the like.</summary>
    protected virtual void Dispose(bool disposing)
    {
    }

    internal void Attach(PciBus bus, int device, int function, IIrqLine? intxWire)
    {
        _bus = bus;
        _intxWire = intxWire;
        DeviceNumber = device;
        FunctionNumber = function;
        OnAttached(bus);
    }

    internal void SetMultiFunction() => DefineConfig8(
        PciConfig.HeaderType, (byte)(_initial[PciConfig.HeaderType] | 0x80), 0);

    internal void Raise(ulong address, uint data)
    {
        PciBus? bus = _bus;
        if (bus is null || !_busMaster)
        {
            return;
        }

        // A message is a memory write; only the local APICs' range is an interrupt (SDM 3A 11.11.1).
        if ((address & 0xFFFF_FFFF_FFF0_0000) == 0xFEE0_0000)
        {
            bus.MsiSink.Send(address, data);
            return;
        }

        Span<byte> bytes = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(bytes, data);
        bus.Memory.TryWrite(address, bytes);
    }

    /// <summary>BARs in use, for the allocator: index, kind and size.</summary>
    internal IEnumerable<(int Index, PciBarKind Kind, ulong LengthBytes)> Bars()
    {
        for (int i = 0; i < RomIndex; i++)
        {
            if (_bars[i] is { } bar)
            {
                yield return (i, bar.Kind, bar.LengthBytes);
            }
        }
    }

    internal static uint RoundUpToPowerOfTwo(uint value) => System.Numerics.BitOperations.RoundUpToPowerOf2(value);

    private void AddBar(int index, PciBarKind kind, ulong lengthBytes, IRegisterWindow? window, IRamBarMapper? mapper)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(index);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(index, 5);
        bool is64 = kind is PciBarKind.Memory64 or PciBarKind.Memory64Prefetchable;
        if (_bars[index] is not null || (is64 && (index == 5 || _bars[index + 1] is not null)))
        {
            throw new InvalidOperationException($"{Id}: BAR {index} is taken");
        }

        // PCI 3.0 §6.2.5.1: I/O ranges are at least 4 bytes, memory ranges at least 16; we take 4 KiB for memory so
        // that no two cards share a page.
        ulong size = System.Numerics.BitOperations.RoundUpToPowerOf2(
            Math.Max(lengthBytes, kind == PciBarKind.Io ? 4u : 4096u));
        _bars[index] = new Bar(kind, size, window, mapper);
        uint type = kind switch
        {
            PciBarKind.Io => 1,
            PciBarKind.Memory32Prefetchable => 8,
            PciBarKind.Memory64 => 4,
            PciBarKind.Memory64Prefetchable => 12,
            _ => 0,
        };
        ulong mask = ~(size - 1);
        DefineConfig32(PciConfig.Bar0 + (4 * index), type, (uint)mask);
        if (is64)
        {
            DefineConfig32(PciConfig.Bar0 + (4 * index) + 4, 0, (uint)(mask >> 32));
        }

        AllowCommand(kind == PciBarKind.Io ? PciConfig.CommandIo : PciConfig.CommandMemory);
    }

    /// <summary>Makes Command bits writable for resources that are not BARs (VGA's ports). Only in constructors.</summary>
    protected void AllowCommand(ushort bits)
    {
        _writable[PciConfig.Command] |= (byte)bits;
        _writable[PciConfig.Command + 1] |= (byte)(bits >> 8);
    }

    /// <summary>A BAR decodes at another address, or nowhere any more (null). Called under the gate, on a vCPU's thread.</summary>
    protected virtual void OnBarMoved(int index, ulong? guestAddress)
    {
    }

    private uint Config32(int offset) => BinaryPrimitives.ReadUInt32LittleEndian(_config.AsSpan(offset));

    // Under the gate: brings everything that follows from configuration space up to date.
    private void Refresh()
    {
        ushort command = BinaryPrimitives.ReadUInt16LittleEndian(_config.AsSpan(PciConfig.Command));
        _busMaster = (command & PciConfig.CommandBusMaster) != 0;
        Msi?.Update(_config);
        MsiX?.Update(_config);
        if (_bus is { } bus)
        {
            for (int i = 0; i < _bars.Length; i++)
            {
                if (_bars[i] is { } bar && Decode(i, bar, command) is var place && bar.Place(bus, place))
                {
                    OnBarMoved(i, place);
                }
            }
        }

        DriveIntx();
    }

    private ulong? Decode(int index, Bar bar, ushort command)
    {
        int needed = bar.Kind == PciBarKind.Io ? PciConfig.CommandIo : PciConfig.CommandMemory;
        if ((command & needed) == 0)
        {
            return null;
        }

        ulong address;
        ulong limit = 1UL << 32;
        if (index == RomIndex)
        {
            uint rom = Config32(PciConfig.RomBar);
            address = rom & ~1u;
            if ((rom & 1) == 0)
            {
                return null;
            }
        }
        else if (bar.Kind == PciBarKind.Io)
        {
            address = Config32(PciConfig.Bar0 + (4 * index)) & ~3u;
            limit = 0x1_0000;
        }
        else
        {
            address = Config32(PciConfig.Bar0 + (4 * index)) & ~0xFu;
            if (bar.Kind is PciBarKind.Memory64 or PciBarKind.Memory64Prefetchable)
            {
                address |= (ulong)Config32(PciConfig.Bar0 + (4 * index) + 4) << 32;
                limit = 1UL << 52;
            }
        }

        // The topmost place is what a sizing write leaves behind: not a place (limit - size is also excluded for
        // 64-bit BARs whose halves are sized one after the other).
        bool sizing = address + bar.LengthBytes >= limit ||
            (bar.LengthBytes <= uint.MaxValue && (uint)address == (uint)~(bar.LengthBytes - 1));
        return address == 0 || sizing ? null : address;
    }

    private void DriveIntx()
    {
        byte status = (byte)(_config[PciConfig.Status] & ~PciConfig.StatusInterrupt);
        _config[PciConfig.Status] = (byte)(status | (_intxLevel ? PciConfig.StatusInterrupt : 0));
        bool disabled = (_config[PciConfig.Command + 1] & (PciConfig.CommandInterruptDisable >> 8)) != 0;
        bool wire = _intxLevel && !disabled && Msi is not { IsEnabled: true } && MsiX is not { IsEnabled: true };
        if (wire != _intxDriven)
        {
            _intxDriven = wire;
            _intxWire?.Set(wire);
        }
    }

    private sealed class Bar
    {
        private readonly IRegisterWindow? _window;
        private readonly IRamBarMapper? _mapper;
        private AddressMapping? _mapping;
        private PciBus? _bus;
        private ulong? _place;

        public Bar(PciBarKind kind, ulong lengthBytes, IRegisterWindow? window, IRamBarMapper? mapper)
        {
            Kind = kind;
            LengthBytes = lengthBytes;
            _window = window;
            _mapper = mapper;
        }

        public PciBarKind Kind { get; }

        public ulong LengthBytes { get; }

        /// <returns>False when it lies there already.</returns>
        public bool Place(PciBus? bus, ulong? place)
        {
            if (place == _place)
            {
                return false;
            }

            _place = place;
            _mapper?.Move(place);
            if (_window is null)
            {
                return true;
            }

            if (_mapping is { } old)
            {
                Map(_bus!).Unmap(old);
                _mapping = null;
            }

            if (place is { } start && bus is not null)
            {
                AddressMap map = Map(bus);
                if (map.Limit == 0 || start + _window.Length <= map.Limit)
                {
                    _mapping = map.Map(start, _window, BarPriority);
                    _bus = bus;
                }
            }

            return true;
        }

        private AddressMap Map(PciBus bus) => Kind == PciBarKind.Io ? bus.Ports : bus.Mmio;
    }

    private sealed class IntxLine : IIrqLine
    {
        private readonly PciFunction _owner;

        public IntxLine(PciFunction owner) => _owner = owner;

        public void Set(bool asserted)
        {
            lock (_owner._gate)
            {
                if (_owner._intxLevel != asserted)
                {
                    _owner._intxLevel = asserted;
                    _owner.DriveIntx();
                }
            }
        }
    }

    private sealed class GatedDma : IDmaPort
    {
        private readonly PciFunction _owner;

        public GatedDma(PciFunction owner) => _owner = owner;

        private IDmaPort? Memory => _owner._busMaster ? _owner._bus?.Memory : null;

        public bool TryRead(ulong address, Span<byte> into) => Memory?.TryRead(address, into) ?? false;

        public bool TryWrite(ulong address, ReadOnlySpan<byte> from) => Memory?.TryWrite(address, from) ?? false;

        public bool TryGetSlice(ulong address, int lengthBytes, bool forWrite, out GuestSlice slice)
        {
            if (Memory is { } memory)
            {
                return memory.TryGetSlice(address, lengthBytes, forWrite, out slice);
            }

            slice = default;
            return false;
        }

        // Not gated: the data is there already, whatever the guest did to Bus Master meanwhile.
        public void MarkWritten(ulong address, int lengthBytes) => _owner._bus?.Memory.MarkWritten(address, lengthBytes);
    }
}

/// <summary>Read-only bytes as a register window: an option ROM or a firmware image.</summary>
public sealed class RomWindow : IRegisterWindow
{
    private readonly ReadOnlyMemory<byte> _image;

    /// <summary>Makes one; an image is not copied.</summary>
    public RomWindow(ReadOnlyMemory<byte> image)
    {
        _image = image;
        Length = (uint)image.Length;
    }

    /// <inheritdoc/>
    public uint Length { get; }

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width)
    {
        ReadOnlySpan<byte> bytes = _image.Span.Slice((int)offset, (int)width);
        ulong value = 0;
        for (int i = bytes.Length - 1; i >= 0; i--)
        {
            value = (value << 8) | bytes[i];
        }

        return value;
    }

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value)
    {
    }
}

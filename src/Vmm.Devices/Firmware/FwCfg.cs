// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Firmware;

// Theory. The channel between a VMM and its firmware that QEMU defined (docs/specs/fw_cfg): numbered items of bytes, of
// which those from 0x20 on have names that item 0x19 lists. A guest selects an item through port 0x510 and reads it
// byte by byte through 0x511, or has a whole piece copied by DMA (0x514: the big-endian address of a descriptor).
//
// Items are added by the machine before it runs; after that only writable files change, by DMA only, and computed ones:
// their content is made when a guest selects them, because it tells of registers that firmware has written by then (ACPI
// tables). Their length is fixed, for the directory is read first. A guest's
// descriptor is read once and checked; lengths run at most to the end of the item, the rest of a read is zeroes in
// steps of at most 64 KiB, and a length beyond 1 GiB is an error, so that a guest cannot keep the host busy long.

/// <summary>Well-known items.</summary>
public static class FwCfgKey
{
    /// <summary>"QEMU".</summary>
    public const ushort Signature = 0x00;

    /// <summary>Features: bit 0 ports, bit 1 DMA.</summary>
    public const ushort Features = 0x01;

    /// <summary>Machine UUID, 16 bytes.</summary>
    public const ushort Uuid = 0x02;

    /// <summary>RAM size, u64.</summary>
    public const ushort RamSize = 0x03;

    /// <summary>1 without a screen, u16.</summary>
    public const ushort NoGraphic = 0x04;

    /// <summary>Processors, u16.</summary>
    public const ushort CpuCount = 0x05;

    /// <summary>Load address of the kernel, u32.</summary>
    public const ushort KernelAddress = 0x07;

    /// <summary>Bytes of the kernel, u32.</summary>
    public const ushort KernelSize = 0x08;

    /// <summary>Load address of the initrd, u32.</summary>
    public const ushort InitrdAddress = 0x0A;

    /// <summary>Bytes of the initrd, u32.</summary>
    public const ushort InitrdSize = 0x0B;

    /// <summary>1 shows the boot menu, u16.</summary>
    public const ushort BootMenu = 0x0E;

    /// <summary>Most processors, u16.</summary>
    public const ushort MaxCpus = 0x0F;

    /// <summary>The kernel.</summary>
    public const ushort KernelData = 0x11;

    /// <summary>The initrd.</summary>
    public const ushort InitrdData = 0x12;

    /// <summary>Load address of the command line, u32.</summary>
    public const ushort CommandLineAddress = 0x13;

    /// <summary>Bytes of the command line with its NUL, u32.</summary>
    public const ushort CommandLineSize = 0x14;

    /// <summary>The command line.</summary>
    public const ushort CommandLineData = 0x15;

    /// <summary>Load address of the real-mode part, u32.</summary>
    public const ushort SetupAddress = 0x16;

    /// <summary>Bytes of the real-mode part, u32.</summary>
    public const ushort SetupSize = 0x17;

    /// <summary>The real-mode part.</summary>
    public const ushort SetupData = 0x18;

    /// <summary>The list of files.</summary>
    public const ushort FileDirectory = 0x19;

    /// <summary>Key of the first file.</summary>
    public const ushort FirstFile = 0x20;

    /// <summary>1 when IRQ 0 is I/O APIC input 2, u32.</summary>
    public const ushort Irq0Override = 0x8002;
}

/// <summary>The device. See the theory at the top of this file.</summary>
public sealed class FwCfg : IDevice, IRegisterWindow
{
    /// <summary>First port; 12 in all.</summary>
    public const ushort Port = 0x510;

    private const uint DmaError = 1 << 0;
    private const uint DmaRead = 1 << 1;
    private const uint DmaSkip = 1 << 2;
    private const uint DmaSelect = 1 << 3;
    private const uint DmaWrite = 1 << 4;
    private const ulong DmaSignature = 0x5145_4D55_2043_4647;
    private const uint MaximumTransfer = 1 << 30;
    private const int NameBytes = 56;

    private readonly Lock _gate = new();
    private readonly IDmaPort _memory;
    private readonly Dictionary<ushort, Item> _items = [];
    private readonly List<(string Name, ushort Key, Item Item)> _files = [];
    private ushort _selected;
    private uint _offset;
    private uint _dmaHigh;
    private long _badTransfers;

    /// <summary>Makes the device with signature and features.</summary>
    /// <param name="memory">Guest memory, for DMA.</param>
    public FwCfg(IDmaPort memory)
    {
        _memory = memory;
        Add(FwCfgKey.Signature, "QEMU"u8.ToArray());
        AddNumber(FwCfgKey.Features, 3, 4);
    }

    /// <inheritdoc/>
    public string Id => "fwcfg";

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <inheritdoc/>
    public uint Length => 12;

    /// <summary>DMA requests that were refused.</summary>
    public long BadTransfers => Interlocked.Read(ref _badTransfers);

    /// <summary>Sets an item. Before the machine runs.</summary>
    public void Add(ushort key, ReadOnlyMemory<byte> data) => _items[key] = new Item(data.ToArray(), null);

    /// <summary>Sets an item to a little-endian number. Before the machine runs.</summary>
    public void AddNumber(ushort key, ulong value, int lengthBytes)
    {
        byte[] data = new byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(data, value);
        Add(key, data.AsMemory(0, lengthBytes));
    }

    /// <summary>Adds or replaces a file. Before the machine runs.</summary>
    /// <param name="name">At most 55 ASCII characters: "etc/acpi/tables", "bootorder".</param>
    /// <param name="data">Its content; copied.</param>
    /// <param name="onWritten">
    /// Makes it writable: called with the whole content after a guest wrote a part, on its thread, outside the gate.
    /// </param>
    public void AddFile(string name, ReadOnlySpan<byte> data, Action<byte[]>? onWritten = null) =>
        AddItem(name, new Item(data.ToArray(), onWritten));

    private void AddItem(string name, Item item)
    {
        ArgumentException.ThrowIfNullOrEmpty(name);
        if (Encoding.ASCII.GetByteCount(name) >= NameBytes)
        {
            throw new ArgumentException($"fw_cfg file name is too long: {name}", nameof(name));
        }

        int at = _files.FindIndex(f => string.Equals(f.Name, name, StringComparison.Ordinal));
        ushort key = at >= 0 ? _files[at].Key : (ushort)(FwCfgKey.FirstFile + _files.Count);
        if (at >= 0)
        {
            _files[at] = (name, key, item);
        }
        else
        {
            _files.Add((name, key, item));
        }

        _items[key] = item;
        _items[FwCfgKey.FileDirectory] = new Item(MakeDirectory(), null);
    }

    /// <summary>Adds a file whose content is made anew each time that a guest selects it. Before the machine runs.</summary>
    /// <param name="name">As for the other files.</param>
    /// <param name="lengthBytes">Its length; the content is cut or filled up with zeroes.</param>
    /// <param name="content">Makes it, on a vCPU's thread, under the device's gate.</param>
    public void AddComputedFile(string name, int lengthBytes, Func<byte[]> content)
    {
        ArgumentNullException.ThrowIfNull(content);
        AddItem(name, new Item(new byte[lengthBytes], null, content));
    }

    /// <summary>Adds or replaces a file with a little-endian number.</summary>
    public void AddFile(string name, ulong value, int lengthBytes)
    {
        Span<byte> data = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(data, value);
        AddFile(name, data[..lengthBytes]);
    }

    /// <inheritdoc/>
    public void Reset()
    {
        lock (_gate)
        {
            _selected = 0;
            _offset = 0;
            _dmaHigh = 0;
        }
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
        lock (_gate)
        {
            writer.Write("selected", (ulong)_selected);
            writer.Write("offset", (ulong)_offset);
            writer.Write("dmaHigh", (ulong)_dmaHigh);
            foreach ((string name, _, Item item) in _files)
            {
                if (item.Changes)
                {
                    writer.WriteBytes("file." + name, item.Data);
                }
            }
        }
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        lock (_gate)
        {
            _selected = reader.ReadUInt16("selected");
            _offset = reader.ReadUInt32("offset");
            _dmaHigh = reader.ReadUInt32("dmaHigh");
            foreach ((string name, _, Item item) in _files)
            {
                if (item.Changes && reader.Has("file." + name))
                {
                    reader.ReadBytes("file." + name, item.Data);
                    item.OnWritten?.Invoke(item.Data);
                }
            }
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
    }

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width)
    {
        lock (_gate)
        {
            ulong value = 0;
            for (uint i = 0; i < (uint)width; i++)
            {
                uint at = offset + i;
                byte part = 0;
                if (at >= 4)
                {
                    part = (byte)(DmaSignature >> (int)(8 * (7 - (at - 4))));
                }
                else if (at is 0 or 1)
                {
                    // A word read at the data port is a byte read in hardware; the selector itself does not read back.
                    part = offset == 1 && i == 0 ? Next() : (byte)0;
                }

                value |= (ulong)part << (int)(8 * i);
            }

            return value;
        }
    }

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value)
    {
        ulong address;
        lock (_gate)
        {
            switch (offset)
            {
                case 0 when width == AccessWidth.Word:
                    Select((ushort)value);
                    return;
                case 4 when width == AccessWidth.Dword:
                    _dmaHigh = BinaryPrimitives.ReverseEndianness((uint)value);
                    return;
                case 4 when width == AccessWidth.Qword:
                    address = BinaryPrimitives.ReverseEndianness(value);
                    break;
                case 8 when width == AccessWidth.Dword:
                    address = ((ulong)_dmaHigh << 32) | BinaryPrimitives.ReverseEndianness((uint)value);
                    _dmaHigh = 0;
                    break;
                default:
                    return;
            }
        }

        Transfer(address);
    }

    private void Select(ushort key)
    {
        // Bit 14 asks for write mode, which the port interface has not had for years.
        _selected = (ushort)(key & 0xBFFF);
        _offset = 0;
        Compute();
    }

    // Under the gate.
    private void Compute()
    {
        if (_items.TryGetValue(_selected, out Item? item) && item.Compute is { } content)
        {
            byte[] made = content();
            int length = Math.Min(made.Length, item.Data.Length);
            made.AsSpan(0, length).CopyTo(item.Data);
            item.Data.AsSpan(length).Clear();
        }
    }

    private byte Next()
    {
        if (_items.TryGetValue(_selected, out Item? item) && _offset < (uint)item.Data.Length)
        {
            return item.Data[_offset++];
        }

        return 0;
    }

    private void Transfer(ulong descriptor)
    {
        Span<byte> bytes = stackalloc byte[16];
        if (!_memory.TryRead(descriptor, bytes))
        {
            Interlocked.Increment(ref _badTransfers);
            return;
        }

        uint control = BinaryPrimitives.ReadUInt32BigEndian(bytes);
        uint length = BinaryPrimitives.ReadUInt32BigEndian(bytes[4..]);
        ulong address = BinaryPrimitives.ReadUInt64BigEndian(bytes[8..]);
        Item? written = null;
        bool good;
        lock (_gate)
        {
            if ((control & DmaSelect) != 0)
            {
                Select((ushort)(control >> 16));
            }

            good = length <= MaximumTransfer && Move(control, address, length, out written);
        }

        if (!good)
        {
            Interlocked.Increment(ref _badTransfers);
        }

        // Completion: control becomes 0, or only the error bit.
        BinaryPrimitives.WriteUInt32BigEndian(bytes, good ? 0 : DmaError);
        _memory.TryWrite(descriptor, bytes[..4]);
        written?.OnWritten?.Invoke((byte[])written.Data.Clone());
    }

    private bool Move(uint control, ulong address, uint length, out Item? written)
    {
        written = null;
        _items.TryGetValue(_selected, out Item? item);
        byte[] data = item?.Data ?? [];
        uint available = _offset < (uint)data.Length ? Math.Min(length, (uint)data.Length - _offset) : 0;
        if ((control & DmaRead) != 0)
        {
            if (!_memory.TryWrite(address, data.AsSpan((int)Math.Min(_offset, (uint)data.Length), (int)available)) ||
                !WriteZeroes(address + available, length - available))
            {
                return false;
            }

            _offset += available;
        }
        else if ((control & DmaWrite) != 0)
        {
            if (item?.OnWritten is null || available != length)
            {
                return false;
            }

            if (!_memory.TryRead(address, data.AsSpan((int)_offset, (int)length)))
            {
                return false;
            }

            _offset += length;
            written = item;
        }
        else if ((control & DmaSkip) != 0)
        {
            _offset += available;
        }

        return true;
    }

    private bool WriteZeroes(ulong address, uint length)
    {
        if (length == 0)
        {
            return true;
        }

        byte[] zeroes = new byte[Math.Min(length, 65536u)];
        while (length > 0)
        {
            uint now = Math.Min(length, (uint)zeroes.Length);
            if (!_memory.TryWrite(address, zeroes.AsSpan(0, (int)now)))
            {
                return false;
            }

            address += now;
            length -= now;
        }

        return true;
    }

    private byte[] MakeDirectory()
    {
        byte[] directory = new byte[4 + (_files.Count * 64)];
        BinaryPrimitives.WriteInt32BigEndian(directory, _files.Count);
        for (int i = 0; i < _files.Count; i++)
        {
            Span<byte> entry = directory.AsSpan(4 + (i * 64), 64);
            BinaryPrimitives.WriteInt32BigEndian(entry, _files[i].Item.Data.Length);
            BinaryPrimitives.WriteUInt16BigEndian(entry[4..], _files[i].Key);
            Encoding.ASCII.GetBytes(_files[i].Name, entry[8..]);
        }

        return directory;
    }

    private sealed record Item(byte[] Data, Action<byte[]>? OnWritten, Func<byte[]>? Compute = null)
    {
        public bool Changes => OnWritten is not null || Compute is not null;
    }
}

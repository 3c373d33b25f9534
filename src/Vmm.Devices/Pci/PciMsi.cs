// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Pci;

/// <summary>Message-signalled interrupts of a function (PCI 3.0 §6.8.1). Thread-safe.</summary>
public sealed class PciMsi
{
    private readonly PciFunction _owner;
    private readonly int _at;
    private readonly int _maximumLog2;
    private readonly Lock _gate = new();
    private volatile bool _enabled;
    private ulong _address;
    private uint _data;
    private int _log2;

    internal PciMsi(PciFunction owner, int at, int maximumLog2)
    {
        _owner = owner;
        _at = at;
        _maximumLog2 = maximumLog2;
    }

    /// <summary>True while the guest uses MSI; INTx is then off.</summary>
    public bool IsEnabled => _enabled;

    /// <summary>Vectors that the guest allocated.</summary>
    public int Vectors
    {
        get
        {
            lock (_gate)
            {
                return 1 << _log2;
            }
        }
    }

    /// <summary>Sends a message; nothing while MSI is off. May be called under the card's gate.</summary>
    /// <param name="vector">Number below <see cref="Vectors"/>; larger ones wrap.</param>
    public void Send(int vector = 0)
    {
        ulong address;
        uint data;
        lock (_gate)
        {
            if (!_enabled)
            {
                return;
            }

            uint low = (1u << _log2) - 1;
            address = _address;
            data = (_data & ~low) | ((uint)vector & low);
        }

        _owner.Raise(address, data);
    }

    internal void Clear() => _enabled = false;

    internal void Update(ReadOnlySpan<byte> config)
    {
        lock (_gate)
        {
            byte control = config[_at + 2];
            _log2 = Math.Min((control >> 4) & 7, _maximumLog2);
            _address = BinaryPrimitives.ReadUInt64LittleEndian(config[(_at + 4)..]);
            _data = BinaryPrimitives.ReadUInt16LittleEndian(config[(_at + 12)..]);
            _enabled = (control & 1) != 0;
        }
    }
}

/// <summary>
/// MSI-X of a function (PCI 3.0 §6.8.2): a table of messages, one mask bit each, and a pending bit for a message that
/// was masked when it was due. Thread-safe.
/// </summary>
public sealed class PciMsiX
{
    /// <summary>A vector number that means "no interrupt" (VIRTIO 1.2 §4.1.4.3).</summary>
    public const int NoVector = 0xFFFF;

    private const ushort ControlEnable = 1 << 15;
    private const ushort ControlMask = 1 << 14;

    private readonly PciFunction _owner;
    private readonly int _at;
    private readonly uint _pendingOffset;
    private readonly Lock _gate = new();
    private readonly uint[] _table;
    private readonly bool[] _pending;
    private volatile bool _enabled;
    private bool _masked;

    internal PciMsiX(PciFunction owner, int at, int vectors, uint pendingOffset)
    {
        _owner = owner;
        _at = at;
        _pendingOffset = pendingOffset;
        Vectors = vectors;
        _table = new uint[vectors * 4];
        _pending = new bool[vectors];
        Window = new TableWindow(this, pendingOffset * 2);
        Clear();
    }

    /// <summary>Size of the table.</summary>
    public int Vectors { get; }

    /// <summary>True while the guest uses MSI-X; INTx is then off.</summary>
    public bool IsEnabled => _enabled;

    /// <summary>The BAR with table and pending bits.</summary>
    internal IRegisterWindow Window { get; }

    /// <summary>
    /// Sends the message of a vector, or remembers it while masked; nothing while MSI-X is off or for a vector out of
    /// range (such as <see cref="NoVector"/>). May be called under the card's gate.
    /// </summary>
    public void Send(int vector)
    {
        ulong address;
        uint data;
        lock (_gate)
        {
            if (!_enabled || (uint)vector >= (uint)Vectors)
            {
                return;
            }

            if (_masked || (_table[(vector * 4) + 3] & 1) != 0)
            {
                _pending[vector] = true;
                return;
            }

            (address, data) = Message(vector);
        }

        _owner.Raise(address, data);
    }

    internal void Clear()
    {
        lock (_gate)
        {
            Array.Clear(_table);
            Array.Clear(_pending);
            for (int i = 0; i < Vectors; i++)
            {
                _table[(i * 4) + 3] = 1;
            }

            _enabled = false;
            _masked = false;
        }
    }

    internal void Update(ReadOnlySpan<byte> config)
    {
        lock (_gate)
        {
            ushort control = BinaryPrimitives.ReadUInt16LittleEndian(config[(_at + 2)..]);
            _enabled = (control & ControlEnable) != 0;
            _masked = (control & ControlMask) != 0;
            Flush();
        }
    }

    internal void Save(StateWriter writer)
    {
        lock (_gate)
        {
            byte[] table = new byte[_table.Length * 4];
            byte[] pending = new byte[Vectors];
            for (int i = 0; i < _table.Length; i++)
            {
                BinaryPrimitives.WriteUInt32LittleEndian(table.AsSpan(i * 4), _table[i]);
            }

            for (int i = 0; i < Vectors; i++)
            {
                pending[i] = _pending[i] ? (byte)1 : (byte)0;
            }

            writer.WriteBytes("pci.msix.table", table);
            writer.WriteBytes("pci.msix.pending", pending);
        }
    }

    internal void Load(StateReader reader)
    {
        byte[] table = new byte[_table.Length * 4];
        byte[] pending = new byte[Vectors];
        reader.ReadBytes("pci.msix.table", table);
        reader.ReadBytes("pci.msix.pending", pending);
        lock (_gate)
        {
            for (int i = 0; i < _table.Length; i++)
            {
                uint mask = (i & 3) == 3 ? 1 : (i & 3) == 0 ? ~3u : ~0u;
                _table[i] = BinaryPrimitives.ReadUInt32LittleEndian(table.AsSpan(i * 4)) & mask;
            }

            for (int i = 0; i < Vectors; i++)
            {
                _pending[i] = pending[i] != 0;
            }
        }
    }

    private (ulong Address, uint Data) Message(int vector)
    {
        int at = vector * 4;
        return (_table[at] | ((ulong)_table[at + 1] << 32), _table[at + 2]);
    }

    // Under the gate. The sink takes the interrupt controllers' locks, which come later in the order.
    private void Flush()
    {
        if (!_enabled || _masked)
        {
            return;
        }

        for (int i = 0; i < Vectors; i++)
        {
            if (_pending[i] && (_table[(i * 4) + 3] & 1) == 0)
            {
                _pending[i] = false;
                (ulong address, uint data) = Message(i);
                _owner.Raise(address, data);
            }
        }
    }

    private uint ReadDword(uint offset)
    {
        uint index = offset / 4;
        if (index < _table.Length)
        {
            return _table[index];
        }

        if (offset < _pendingOffset)
        {
            return 0;
        }

        uint first = (offset - _pendingOffset) * 8;
        uint bits = 0;
        for (uint i = 0; i < 32; i++)
        {
            if (first + i < Vectors && _pending[first + i])
            {
                bits |= 1u << (int)i;
            }
        }

        return bits;
    }

    private void WriteDword(uint offset, uint value)
    {
        uint index = offset / 4;
        if (index < _table.Length)
        {
            _table[index] = value & ((index & 3) == 3 ? 1 : (index & 3) == 0 ? ~3u : ~0u);
        }
    }

    private sealed class TableWindow : IRegisterWindow
    {
        private readonly PciMsiX _owner;

        public TableWindow(PciMsiX owner, uint length)
        {
            _owner = owner;
            Length = length;
        }

        public uint Length { get; }

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_owner._gate)
            {
                ulong value = _owner.ReadDword(offset & ~3u);
                if (width == AccessWidth.Qword && (offset & 3) == 0)
                {
                    return value | ((ulong)_owner.ReadDword(offset + 4) << 32);
                }

                return (value >> (int)((offset & 3) * 8)) & Mask(width);
            }
        }

        // Software must use full dwords or qwords (§6.8.2); anything else is ignored.
        public void Write(uint offset, AccessWidth width, ulong value)
        {
            if ((offset & 3) != 0 || width < AccessWidth.Dword)
            {
                return;
            }

            lock (_owner._gate)
            {
                _owner.WriteDword(offset, (uint)value);
                if (width == AccessWidth.Qword)
                {
                    _owner.WriteDword(offset + 4, (uint)(value >> 32));
                }

                _owner.Flush();
            }
        }

        private static ulong Mask(AccessWidth width) =>
            width == AccessWidth.Qword ? ulong.MaxValue : (1UL << (8 * (int)width)) - 1;
    }
}

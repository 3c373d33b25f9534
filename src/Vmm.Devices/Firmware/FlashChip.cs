// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;
using Vmm.Memory;

namespace Vmm.Devices.Firmware;

// Theory. A NOR flash chip with Intel's command set (Intel StrataFlash 28F128J3 data sheet, order number 290667; CFI),
// which OVMF uses as its variable store and QEMU calls pflash. Reads in array mode are plain memory: the machine maps
// the block read-only, so that they never come here. Everything else does: writes are commands, and after a command
// that changes what reads show (status, identifier, CFI query) the machine must take the mapping away until the chip is
// back in array mode. It is told by the callback.
//
// Programming and erasing take no time. Content that changed is handed to the store that the machine gave, in whole
// erase blocks, outside the gate, when the chip goes back to array mode: drivers program byte by byte and end with "read
// array". The store makes it durable.
//
// "Clear status" clears bit 7 (ready) too, until the next program or erase. The data sheet keeps it, but OVMF tells
// flash from RAM and ROM by a status of zero (its QemuFlashDetected), as QEMU's pflash shows it.

/// <summary>Keeps a flash chip's content on the host.</summary>
public interface IFlashStore
{
    /// <summary>A piece changed. On a vCPU thread, one at a time; must not block on the disk for long.</summary>
    /// <param name="offsetBytes">Offset in the chip, a multiple of the erase block.</param>
    /// <param name="content">The new bytes.</param>
    void Write(long offsetBytes, ReadOnlySpan<byte> content);
}

/// <summary>A flash chip. See the theory at the top of this file.</summary>
public sealed class FlashChip : IDevice, IRegisterWindow
{
    /// <summary>Bytes that erase together.</summary>
    public const int EraseBlockBytes = 4096;

    private const int WriteBufferBytes = 2048;

    private const byte StatusReady = 0x80;
    private const byte StatusEraseError = 0x20;
    private const byte StatusProgramError = 0x10;

    private enum Mode : byte
    {
        Array = 0,
        Status = 1,
        Identifier = 2,
        Query = 3,
        ProgramData = 4,
        EraseConfirm = 5,
        BufferCount = 6,
        BufferData = 7,
        BufferConfirm = 8,
        LockConfirm = 9,
    }

    private readonly Lock _gate = new();
    private readonly RamBlock _content;
    private readonly IFlashStore? _store;
    private readonly Action<bool>? _onArrayMode;
    private readonly byte[] _buffer = new byte[WriteBufferBytes];
    private readonly byte[] _query;
    private Mode _mode;
    private byte _status = StatusReady;
    private int _bufferLeft;
    private uint _bufferFirst;
    private uint _bufferLast;

    // Bytes that changed since the store was told; empty when first is above last.
    private uint _dirtyFirst = uint.MaxValue;
    private uint _dirtyLast;

    /// <summary>Makes a chip.</summary>
    /// <param name="id">"flash0".</param>
    /// <param name="content">Its bytes; a multiple of <see cref="EraseBlockBytes"/>.</param>
    /// <param name="store">Where changes go; null makes a chip that refuses to program (a ROM that is probed).</param>
    /// <param name="onArrayMode">Told when reads become plain memory (true) or registers (false).</param>
    public FlashChip(string id, RamBlock content, IFlashStore? store, Action<bool>? onArrayMode)
    {
        ArgumentNullException.ThrowIfNull(content);
        if (content.LengthBytes % EraseBlockBytes != 0 || content.LengthBytes > 64 << 20)
        {
            throw new ArgumentException("flash must be whole erase blocks of at most 64 MiB", nameof(content));
        }

        Id = id;
        _content = content;
        _store = store;
        _onArrayMode = onArrayMode;
        _query = MakeQuery((uint)content.LengthBytes);
    }

    /// <inheritdoc/>
    public string Id { get; }

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <inheritdoc/>
    public uint Length => (uint)_content.LengthBytes;

    /// <summary>Reads show the content: the machine may map it.</summary>
    public bool IsArrayMode
    {
        get
        {
            lock (_gate)
            {
                return _mode == Mode.Array;
            }
        }
    }

    /// <inheritdoc/>
    public void Reset()
    {
        lock (_gate)
        {
            _status = StatusReady;
        }

        Switch(Mode.Array);
    }

    /// <inheritdoc/>
    public void Pause() => Persist();

    /// <inheritdoc/>
    public void Resume() => Persist();

    /// <inheritdoc/>
    public void Save(StateWriter writer)
    {
        lock (_gate)
        {
            writer.Write("mode", (ulong)_mode);
            writer.Write("status", (ulong)_status);
            writer.WriteBytes("buffer", _buffer);
            writer.Write("bufferLeft", (ulong)_bufferLeft);
            writer.Write("bufferFirst", (ulong)_bufferFirst);
            writer.Write("bufferLast", (ulong)_bufferLast);
        }
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        Mode mode;
        lock (_gate)
        {
            mode = (Mode)reader.ReadBounded("mode", (ulong)Mode.LockConfirm);
            _status = reader.ReadByte("status");
            reader.ReadBytes("buffer", _buffer);
            _bufferLeft = (int)reader.ReadBounded("bufferLeft", WriteBufferBytes);
            _bufferFirst = (uint)reader.ReadBounded("bufferFirst", Length - 1);
            _bufferLast = (uint)reader.ReadBounded("bufferLast", Length - 1);
            if (_bufferLast < _bufferFirst || _bufferLast - _bufferFirst >= WriteBufferBytes)
            {
                throw new StateException($"{Id}.bufferLast: not inside the write buffer");
            }

            // The snapshot brings other content, after this; the store hears of all of it on Resume.
            MarkDirty(0, Length);
        }

        Switch(mode);
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
                value |= (ulong)ReadByte(offset + i) << (int)(8 * i);
            }

            return value;
        }
    }

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value)
    {
        Mode next;
        lock (_gate)
        {
            next = WriteCommand(offset, width, value);
        }

        if (next == Mode.Array)
        {
            Persist();
        }

        Switch(next);
    }

    // The query table (CFI, JEDEC JESD68.01 §5), one byte per location.
    private static byte[] MakeQuery(uint length)
    {
        byte[] table = new byte[0x40];
        "QRY"u8.CopyTo(table.AsSpan(0x10));
        table[0x13] = 0x01;
        table[0x15] = 0x31;
        table[0x1B] = 0x45;
        table[0x1C] = 0x55;
        table[0x1F] = 0x07;
        table[0x20] = 0x07;
        table[0x21] = 0x0A;
        table[0x23] = 0x04;
        table[0x24] = 0x04;
        table[0x25] = 0x04;
        table[0x27] = (byte)uint.Log2(System.Numerics.BitOperations.RoundUpToPowerOf2(length));
        table[0x28] = 0x02;
        table[0x2A] = 11;
        table[0x2C] = 1;
        uint blocks = (length / EraseBlockBytes) - 1;
        table[0x2D] = (byte)blocks;
        table[0x2E] = (byte)(blocks >> 8);
        table[0x2F] = (byte)(EraseBlockBytes >> 8);
        table[0x30] = EraseBlockBytes >> 16;
        "PRI"u8.CopyTo(table.AsSpan(0x31));
        table[0x34] = (byte)'1';
        table[0x35] = (byte)'0';
        return table;
    }

    private byte ReadByte(uint offset)
    {
        switch (_mode)
        {
            case Mode.Array:
                Span<byte> one = stackalloc byte[1];
                return _content.TryRead(offset, one) ? one[0] : (byte)0xFF;
            case Mode.Identifier:
                // Manufacturer Intel, 28F256J3.
                return (offset & 0xFF) switch { 0 => 0x89, 1 => 0x18, _ => 0 };
            case Mode.Query:
                return (offset & 0xFF) < (uint)_query.Length ? _query[offset & 0xFF] : (byte)0;
            default:
                return _status;
        }
    }

    private Mode WriteCommand(uint offset, AccessWidth width, ulong value)
    {
        byte command = (byte)value;
        switch (_mode)
        {
            case Mode.ProgramData:
                Program(offset, width, value);
                return Mode.Status;
            case Mode.EraseConfirm:
                if (command == 0xD0)
                {
                    Erase(offset);
                    return Mode.Status;
                }

                _status |= StatusEraseError | StatusProgramError;
                return Mode.Status;
            case Mode.LockConfirm:
                return Mode.Status;
            case Mode.BufferCount:
                _bufferLeft = (int)Math.Min((value & 0xFFFF) + 1, WriteBufferBytes);
                _bufferFirst = uint.MaxValue;
                _bufferLast = 0;
                return Mode.BufferData;
            case Mode.BufferData:
                return FillBuffer(offset, width, value);
            case Mode.BufferConfirm:
                if (command == 0xD0)
                {
                    ProgramBuffer();
                }
                else
                {
                    _status |= StatusEraseError | StatusProgramError;
                }

                return Mode.Status;
        }

        switch (command)
        {
            case 0x10:
            case 0x40:
                return Mode.ProgramData;
            case 0x20:
                return Mode.EraseConfirm;
            case 0x50:
                _status = 0;
                return Mode.Array;
            case 0x60:
                return Mode.LockConfirm;
            case 0x70:
                return Mode.Status;
            case 0x90:
                return Mode.Identifier;
            case 0x98:
                return Mode.Query;
            case 0xE8:
                _status |= StatusReady;
                return Mode.BufferCount;
            default:
                // 0xFF and 0xF0 are "read array"; unknown commands end there too.
                return Mode.Array;
        }
    }

    private Mode FillBuffer(uint offset, AccessWidth width, ulong value)
    {
        if (_bufferFirst == uint.MaxValue)
        {
            _bufferFirst = offset;
            Array.Fill(_buffer, (byte)0xFF);
        }

        for (uint i = 0; i < (uint)width; i++)
        {
            uint at = offset + i - _bufferFirst;
            if (offset + i >= _bufferFirst && at < WriteBufferBytes)
            {
                _buffer[at] = (byte)(value >> (int)(8 * i));
                _bufferLast = Math.Max(_bufferLast, offset + i);
            }
            else
            {
                // Outside the buffer's range: a sequence error.
                _status |= StatusProgramError;
            }
        }

        _bufferLeft -= (int)width;
        return _bufferLeft > 0 ? Mode.BufferData : Mode.BufferConfirm;
    }

    private void Program(uint offset, AccessWidth width, ulong value)
    {
        Span<byte> bytes = stackalloc byte[8];
        System.Buffers.Binary.BinaryPrimitives.WriteUInt64LittleEndian(bytes, value);
        ProgramBytes(offset, bytes[..(int)width]);
    }

    private void ProgramBuffer()
    {
        if (_bufferFirst < Length && _bufferLast >= _bufferFirst)
        {
            ProgramBytes(_bufferFirst, _buffer.AsSpan(0, (int)(_bufferLast - _bufferFirst) + 1));
        }
    }

    // Programming only clears bits.
    private void ProgramBytes(uint offset, ReadOnlySpan<byte> bytes)
    {
        Span<byte> old = stackalloc byte[WriteBufferBytes];
        old = old[..bytes.Length];
        _status |= StatusReady;
        if (_store is null || !_content.TryRead(offset, old))
        {
            _status |= StatusProgramError;
            return;
        }

        for (int i = 0; i < bytes.Length; i++)
        {
            old[i] &= bytes[i];
        }

        if (_content.TryWrite(offset, old, out _))
        {
            MarkDirty(offset, (uint)bytes.Length);
        }
    }

    private void Erase(uint offset)
    {
        _status |= StatusReady;
        if (_store is null)
        {
            _status |= StatusEraseError;
            return;
        }

        Span<byte> ones = stackalloc byte[EraseBlockBytes];
        ones.Fill(0xFF);
        uint block = offset & ~(uint)(EraseBlockBytes - 1);
        if (_content.TryWrite(block, ones, out _))
        {
            MarkDirty(block, EraseBlockBytes);
        }
    }

    // Under the gate.
    private void MarkDirty(uint offset, uint length)
    {
        _dirtyFirst = Math.Min(_dirtyFirst, offset);
        _dirtyLast = Math.Max(_dirtyLast, offset + length - 1);
    }

    // Hands what changed to the store, in whole erase blocks.
    private void Persist()
    {
        uint first;
        uint end;
        lock (_gate)
        {
            if (_dirtyFirst > _dirtyLast)
            {
                return;
            }

            first = _dirtyFirst & ~(uint)(EraseBlockBytes - 1);
            end = (_dirtyLast | (EraseBlockBytes - 1)) + 1;
            _dirtyFirst = uint.MaxValue;
            _dirtyLast = 0;
        }

        byte[] bytes = new byte[end - first];
        if (_content.TryRead(first, bytes))
        {
            _store?.Write(first, bytes);
        }
    }

    private void Switch(Mode next)
    {
        bool was;
        bool now = next == Mode.Array;
        lock (_gate)
        {
            was = _mode == Mode.Array;
            _mode = next;
        }

        if (was != now)
        {
            _onArrayMode?.Invoke(now);
        }
    }
}

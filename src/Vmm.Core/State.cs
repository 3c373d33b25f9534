// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Diagnostics.CodeAnalysis;
using System.Text;

namespace Vmm.Core;

// Theory. A device's saved state is a section: an identifier, a version, and named fields. Names make a snapshot
// readable by another build and by people; they cost nothing that matters next to guest memory. There are two field
// kinds: an unsigned 64-bit number and a byte string. A reader looks fields up by name, so that order does not matter
// and a later version may add fields with a default (see StateReader.Has). Struct dumps are never written.
//
// Section layout, little-endian: u16 name length, name (UTF-8), u8 kind (0 number, 1 bytes), then u64 or u32 length and
// bytes; repeated to the section's end. Everything is bounded on reading: a damaged or hostile file ends in a
// StateException that names the section and field, never in another exception or a large allocation.

/// <summary>Saved state is damaged, truncated or of an unknown version. The message is one line for people.</summary>
public sealed class StateException : Exception
{
    /// <summary>Makes one.</summary>
    public StateException(string message)
        : base(message)
    {
    }
}

/// <summary>Collects the named fields of one section.</summary>
public sealed class StateWriter
{
    private readonly ArrayBufferWriter<byte> _stream = new();
    private readonly HashSet<string> _names = [];

    /// <summary>Makes an empty section.</summary>
    /// <param name="section">For messages.</param>
    public StateWriter(string section) => Section = section;

    /// <summary>The section's name.</summary>
    public string Section { get; }

    /// <summary>Writes a number.</summary>
    public void Write(string name, ulong value)
    {
        Header(name, 0);
        Span<byte> bytes = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(bytes, value);
        _stream.Write(bytes);
    }

    /// <summary>Writes a signed number (two's complement).</summary>
    public void Write(string name, long value) => Write(name, unchecked((ulong)value));

    /// <summary>Writes a truth value.</summary>
    public void Write(string name, bool value) => Write(name, value ? 1UL : 0UL);

    /// <summary>Writes a byte string.</summary>
    public void WriteBytes(string name, ReadOnlySpan<byte> value)
    {
        Header(name, 1);
        Span<byte> length = stackalloc byte[4];
        BinaryPrimitives.WriteInt32LittleEndian(length, value.Length);
        _stream.Write(length);
        _stream.Write(value);
    }

    /// <summary>The encoded section.</summary>
    public byte[] ToArray() => _stream.WrittenSpan.ToArray();

    private void Header(string name, byte kind)
    {
        if (!_names.Add(name))
        {
            throw new InvalidOperationException($"state field {Section}.{name} is written twice");
        }

        byte[] encoded = Encoding.UTF8.GetBytes(name);
        Span<byte> length = stackalloc byte[2];
        BinaryPrimitives.WriteUInt16LittleEndian(length, checked((ushort)encoded.Length));
        _stream.Write(length);
        _stream.Write(encoded);
        _stream.Write([kind]);
    }
}

/// <summary>Looks up the named fields of one section.</summary>
public sealed class StateReader
{
    private readonly Dictionary<string, (int At, int Length, bool IsBytes)> _fields = [];
    private readonly byte[] _data;

    /// <summary>Parses a section.</summary>
    /// <exception cref="StateException">The section is malformed.</exception>
    public StateReader(string section, byte[] data)
    {
        Section = section;
        _data = data;
        int at = 0;
        while (at < data.Length)
        {
            if (data.Length - at < 3)
            {
                throw Truncated();
            }

            int nameLength = BinaryPrimitives.ReadUInt16LittleEndian(data.AsSpan(at));
            at += 2;
            if (data.Length - at < nameLength + 1)
            {
                throw Truncated();
            }

            string name = Encoding.UTF8.GetString(data, at, nameLength);
            at += nameLength;
            byte kind = data[at++];
            int length = 8;
            if (kind == 1)
            {
                if (data.Length - at < 4)
                {
                    throw Truncated();
                }

                length = BinaryPrimitives.ReadInt32LittleEndian(data.AsSpan(at));
                at += 4;
            }
            else if (kind != 0)
            {
                throw new StateException($"{section}.{name}: unknown field kind {kind}");
            }

            if (length < 0 || data.Length - at < length)
            {
                throw Truncated();
            }

            if (!_fields.TryAdd(name, (at, length, kind == 1)))
            {
                throw new StateException($"{section}.{name}: field appears twice");
            }

            at += length;
        }
    }

    /// <summary>The section's name.</summary>
    public string Section { get; }

    /// <summary>True when the field is there.</summary>
    public bool Has(string name) => _fields.ContainsKey(name);

    /// <summary>Reads a number.</summary>
    /// <exception cref="StateException">The field is missing or of the other kind.</exception>
    public ulong ReadUInt64(string name)
    {
        (int at, _, bool isBytes) = Find(name);
        if (isBytes)
        {
            throw new StateException($"{Section}.{name}: expected a number");
        }

        return BinaryPrimitives.ReadUInt64LittleEndian(_data.AsSpan(at));
    }

    /// <summary>Reads a signed number.</summary>
    public long ReadInt64(string name) => unchecked((long)ReadUInt64(name));

    /// <summary>Reads a number that must fit 32 bits.</summary>
    public uint ReadUInt32(string name) => (uint)ReadBounded(name, uint.MaxValue);

    /// <summary>Reads a number that must fit 16 bits.</summary>
    public ushort ReadUInt16(string name) => (ushort)ReadBounded(name, ushort.MaxValue);

    /// <summary>Reads a number that must fit 8 bits.</summary>
    public byte ReadByte(string name) => (byte)ReadBounded(name, byte.MaxValue);

    /// <summary>Reads a number that must not exceed a limit (an index, a length).</summary>
    public ulong ReadBounded(string name, ulong maximum)
    {
        ulong value = ReadUInt64(name);
        return value <= maximum
            ? value
            : throw new StateException($"{Section}.{name}: {value} is larger than {maximum}");
    }

    /// <summary>Reads a truth value.</summary>
    public bool ReadBoolean(string name) => ReadBounded(name, 1) != 0;

    /// <summary>Reads a byte string; valid as long as the reader.</summary>
    public ReadOnlySpan<byte> ReadBytes(string name)
    {
        (int at, int length, bool isBytes) = Find(name);
        return isBytes
            ? _data.AsSpan(at, length)
            : throw new StateException($"{Section}.{name}: expected bytes");
    }

    /// <summary>Reads a byte string of exactly the buffer's length.</summary>
    public void ReadBytes(string name, Span<byte> into)
    {
        ReadOnlySpan<byte> bytes = ReadBytes(name);
        if (bytes.Length != into.Length)
        {
            throw new StateException($"{Section}.{name}: {bytes.Length} bytes, expected {into.Length}");
        }

        bytes.CopyTo(into);
    }

    private (int At, int Length, bool IsBytes) Find(string name) =>
        _fields.TryGetValue(name, out (int At, int Length, bool IsBytes) field) ? field : ThrowMissing(name);

    [DoesNotReturn]
    private (int At, int Length, bool IsBytes) ThrowMissing(string name) =>
        throw new StateException($"{Section}.{name}: field is missing");

    private StateException Truncated() => new($"{Section}: state is truncated");
}

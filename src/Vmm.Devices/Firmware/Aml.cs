// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;

namespace Vmm.Devices.Firmware;

/// <summary>
/// Emits ACPI Machine Language (ACPI 6.5 chapter 20): a byte list with one method per grammar production that the machine's
/// tables use. Nested terms are given as callbacks, so that package lengths are known when the outer term is written.
/// </summary>
public sealed class Aml
{
    private readonly List<byte> _bytes = [];

    /// <summary>The encoded terms.</summary>
    public byte[] ToArray() => [.. _bytes];

    /// <summary>Scope (name) { ... } (§20.2.5.1).</summary>
    public Aml Scope(string name, Action<Aml> body) => Block([0x10], name, [], body);

    /// <summary>Device (name) { ... } (§20.2.5.2).</summary>
    public Aml Device(string name, Action<Aml> body) => Block([0x5B, 0x82], name, [], body);

    /// <summary>Method (name, arguments, Serialized?) { ... } (§20.2.5.2).</summary>
    public Aml Method(string name, int arguments, Action<Aml> body, bool serialized = false) =>
        Block([0x14], name, [(byte)(arguments | (serialized ? 8 : 0))], body);

    /// <summary>Name (name, integer).</summary>
    public Aml Name(string name, ulong value) => Named(name).Integer(value);

    /// <summary>Name (name, term).</summary>
    public Aml Name(string name, Action<Aml> term)
    {
        ArgumentNullException.ThrowIfNull(term);
        Named(name);
        term(this);
        return this;
    }

    /// <summary>Name (name, EISAID (id)) (§19.3.4).</summary>
    public Aml NameEisaId(string name, string id) => Named(name).EisaId(id);

    /// <summary>Name (name, "text").</summary>
    public Aml Name(string name, string text) => Named(name).String(text);

    /// <summary>An integer in its shortest form (§20.2.3).</summary>
    public Aml Integer(ulong value)
    {
        switch (value)
        {
            case 0:
                return Raw(0x00);
            case 1:
                return Raw(0x01);
            case <= 0xFF:
                return Raw(0x0A, (byte)value);
            case <= 0xFFFF:
                return Raw(0x0B, (byte)value, (byte)(value >> 8));
            case <= 0xFFFFFFFF:
                Raw(0x0C);
                return Little(value, 4);
            default:
                Raw(0x0E);
                return Little(value, 8);
        }
    }

    /// <summary>A string constant.</summary>
    public Aml String(string text)
    {
        Raw(0x0D);
        _bytes.AddRange(Encoding.ASCII.GetBytes(text));
        return Raw(0);
    }

    /// <summary>A compressed EISA identifier such as PNP0A03.</summary>
    public Aml EisaId(string id)
    {
        ArgumentNullException.ThrowIfNull(id);
        uint value = ((uint)(id[0] - 0x40) << 26) | ((uint)(id[1] - 0x40) << 21) | ((uint)(id[2] - 0x40) << 16)
            | Convert.ToUInt32(id[3..], 16);
        return Integer(BinaryPrimitives.ReverseEndianness(value));
    }

    /// <summary>Package () { ... } with a number of elements.</summary>
    public Aml Package(int count, Action<Aml> elements)
    {
        ArgumentNullException.ThrowIfNull(elements);
        var inner = new Aml();
        inner.Raw((byte)count);
        elements(inner);
        Raw(0x12);
        return Sized(inner._bytes);
    }

    /// <summary>ResourceTemplate () { ... }: a buffer that ends with an end tag (§6.4).</summary>
    public Aml Resources(Action<ResourceTemplate> resources)
    {
        ArgumentNullException.ThrowIfNull(resources);
        var template = new ResourceTemplate();
        resources(template);
        return Buffer(template.ToArray());
    }

    /// <summary>Buffer () { ... }.</summary>
    public Aml Buffer(ReadOnlySpan<byte> bytes)
    {
        var inner = new Aml();
        inner.Integer((ulong)bytes.Length);
        inner.Raw(bytes);
        Raw(0x11);
        return Sized(inner._bytes);
    }

    /// <summary>OperationRegion (name, space, offset, length) (§20.2.5.2). Space 0 memory, 1 I/O, 2 PCI configuration.</summary>
    public Aml OperationRegion(string name, byte space, ulong offset, ulong length)
    {
        Raw(0x5B, 0x80);
        Path(name);
        Raw(space);
        return Integer(offset).Integer(length);
    }

    /// <summary>Field (region, ByteAcc, NoLock, Preserve) with named fields and their widths in bits.</summary>
    public Aml Field(string region, byte accessFlags, params (string Name, int Bits)[] fields)
    {
        ArgumentNullException.ThrowIfNull(fields);
        var inner = new Aml();
        inner.Path(region);
        inner.Raw(accessFlags);
        foreach ((string name, int bits) in fields)
        {
            inner.Segment(name);
            inner.PackageLength(bits, false);
        }

        Raw(0x5B, 0x81);
        return Sized(inner._bytes);
    }

    /// <summary>Return (term).</summary>
    public Aml Return(Action<Aml> term)
    {
        ArgumentNullException.ThrowIfNull(term);
        Raw(0xA4);
        term(this);
        return this;
    }

    /// <summary>A reference by name.</summary>
    public Aml Reference(string name)
    {
        Path(name);
        return this;
    }

    /// <summary>ArgN.</summary>
    public Aml Arg(int index) => Raw((byte)(0x68 + index));

    /// <summary>LocalN.</summary>
    public Aml Local(int index) => Raw((byte)(0x60 + index));

    /// <summary>Store (source, target).</summary>
    public Aml Store(Action<Aml> source, Action<Aml> target) => Operator(0x70, source, target);

    /// <summary>And (left, right, target).</summary>
    public Aml And(Action<Aml> left, Action<Aml> right, Action<Aml>? target = null) => Binary(0x7B, left, right, target);

    /// <summary>Or (left, right, target).</summary>
    public Aml Or(Action<Aml> left, Action<Aml> right, Action<Aml>? target = null) => Binary(0x7D, left, right, target);

    /// <summary>FindSetRightBit-free index to mask: ShiftLeft (left, right, target).</summary>
    public Aml ShiftLeft(Action<Aml> left, Action<Aml> right, Action<Aml>? target = null) => Binary(0x79, left, right, target);

    /// <summary>FindSetRightBit (source, target).</summary>
    public Aml FindSetRightBit(Action<Aml> source, Action<Aml> target) => Operator(0x82, source, target);

    /// <summary>Notify (object, value) (§20.2.5.3).</summary>
    public Aml Notify(string name, ulong value)
    {
        Raw(0x86);
        Path(name);
        return Integer(value);
    }

    /// <summary>Decrement (target).</summary>
    public Aml Decrement(Action<Aml> target)
    {
        ArgumentNullException.ThrowIfNull(target);
        Raw(0x76);
        target(this);
        return this;
    }

    /// <summary>If (predicate) { ... }.</summary>
    public Aml If(Action<Aml> predicate, Action<Aml> body)
    {
        ArgumentNullException.ThrowIfNull(predicate);
        ArgumentNullException.ThrowIfNull(body);
        var inner = new Aml();
        predicate(inner);
        body(inner);
        Raw(0xA0);
        return Sized(inner._bytes);
    }

    /// <summary>CreateDWordField (buffer, index, name).</summary>
    public Aml CreateDwordField(Action<Aml> buffer, ulong index, string name)
    {
        ArgumentNullException.ThrowIfNull(buffer);
        Raw(0x8A);
        buffer(this);
        Integer(index);
        Path(name);
        return this;
    }

    private Aml Binary(byte opcode, Action<Aml> left, Action<Aml> right, Action<Aml>? target)
    {
        Raw(opcode);
        left(this);
        right(this);
        if (target is null)
        {
            return Raw(0);
        }

        target(this);
        return this;
    }

    private Aml Operator(byte opcode, Action<Aml> first, Action<Aml> second)
    {
        Raw(opcode);
        first(this);
        second(this);
        return this;
    }

    private Aml Named(string name)
    {
        Raw(0x08);
        Path(name);
        return this;
    }

    private Aml Block(ReadOnlySpan<byte> opcode, string name, ReadOnlySpan<byte> flags, Action<Aml> body)
    {
        var inner = new Aml();
        inner.Path(name);
        inner.Raw(flags);
        body(inner);
        Raw(opcode);
        return Sized(inner._bytes);
    }

    private Aml Sized(List<byte> inner)
    {
        PackageLength(inner.Count, true);
        _bytes.AddRange(inner);
        return this;
    }

    // §20.2.4: the length counts its own bytes, except in field lists.
    private void PackageLength(int length, bool countsItself)
    {
        int size = 1;
        while (length + (countsItself ? size : 0) >= (size == 1 ? 0x40 : 1 << (4 + (8 * (size - 1)))))
        {
            size++;
        }

        int total = length + (countsItself ? size : 0);
        if (size == 1)
        {
            Raw((byte)total);
            return;
        }

        Raw((byte)(((size - 1) << 6) | (total & 0xF)));
        for (int i = 1; i < size; i++)
        {
            Raw((byte)(total >> (4 + (8 * (i - 1)))));
        }
    }

    // §20.2.2: root and parent prefixes, then one, two or more four-character segments.
    private void Path(string name)
    {
        int at = 0;
        while (at < name.Length && name[at] is '\\' or '^')
        {
            Raw((byte)name[at++]);
        }

        string[] segments = name[at..].Split('.', StringSplitOptions.RemoveEmptyEntries);
        if (segments.Length == 0)
        {
            Raw(0);
            return;
        }

        if (segments.Length == 2)
        {
            Raw(0x2E);
        }
        else if (segments.Length > 2)
        {
            Raw(0x2F, (byte)segments.Length);
        }

        foreach (string segment in segments)
        {
            Segment(segment);
        }
    }

    private void Segment(string name)
    {
        for (int i = 0; i < 4; i++)
        {
            Raw(i < name.Length ? (byte)name[i] : (byte)'_');
        }
    }

    private Aml Little(ulong value, int bytes)
    {
        for (int i = 0; i < bytes; i++)
        {
            Raw((byte)(value >> (8 * i)));
        }

        return this;
    }

    private Aml Raw(params ReadOnlySpan<byte> bytes)
    {
        foreach (byte b in bytes)
        {
            _bytes.Add(b);
        }

        return this;
    }
}

/// <summary>Resource descriptors of a _CRS or _PRS (ACPI 6.5 §6.4).</summary>
public sealed class ResourceTemplate
{
    private readonly List<byte> _bytes = [];

    /// <summary>IO (Decode16, first, first, 1, count) (§6.4.2.5).</summary>
    public ResourceTemplate Io(ushort first, byte count) =>
        Add([0x47, 1, (byte)first, (byte)(first >> 8), (byte)first, (byte)(first >> 8), 1, count]);

    /// <summary>IRQNoFlags: edge, active high, exclusive (§6.4.2.1).</summary>
    public ResourceTemplate Irq(int line) => Add([0x22, (byte)(1 << line), (byte)((1 << line) >> 8)]);

    /// <summary>Interrupt (level, active high, shared) with one or more GSIs (§6.4.3.6).</summary>
    public ResourceTemplate Interrupts(params uint[] gsis)
    {
        ArgumentNullException.ThrowIfNull(gsis);
        int length = 2 + (4 * gsis.Length);
        Add([0x89, (byte)length, (byte)(length >> 8), 0x09, (byte)gsis.Length]);
        foreach (uint gsi in gsis)
        {
            Little(gsi, 4);
        }

        return this;
    }

    /// <summary>DMA, compatibility, no bus master, 8 bits (§6.4.2.2).</summary>
    public ResourceTemplate Dma(int channel) => Add([0x2A, (byte)(1 << channel), 0]);

    /// <summary>Memory32Fixed (ReadWrite) (§6.4.3.4).</summary>
    public ResourceTemplate Memory32(uint start, uint length)
    {
        Add([0x86, 9, 0, 1]);
        Little(start, 4);
        return Little(length, 4);
    }

    /// <summary>WordBusNumber (§6.4.3.5.3): kind 2.</summary>
    public ResourceTemplate BusNumbers(ushort first, ushort last)
    {
        Add([0x88, 13, 0, 2, 0x0C, 0]);
        Little(0, 2).Little(first, 2).Little(last, 2).Little(0, 2);
        return Little((uint)(last - first + 1), 2);
    }

    /// <summary>WordIO, produced by a bridge: kind 1, entire range.</summary>
    public ResourceTemplate IoWindow(ushort first, ushort last)
    {
        Add([0x88, 13, 0, 1, 0x0C, 3]);
        Little(0, 2).Little(first, 2).Little(last, 2).Little(0, 2);
        return Little((uint)(last - first + 1), 2);
    }

    /// <summary>DWordMemory, produced by a bridge: kind 0, not cacheable, read-write.</summary>
    public ResourceTemplate MemoryWindow(uint first, uint last)
    {
        Add([0x87, 23, 0, 0, 0x0C, 1]);
        Little(0, 4).Little(first, 4).Little(last, 4).Little(0, 4);
        return Little(last - first + 1, 4);
    }

    /// <summary>QWordMemory, produced by a bridge.</summary>
    public ResourceTemplate MemoryWindow64(ulong first, ulong last)
    {
        Add([0x8A, 43, 0, 0, 0x0C, 1]);
        Little(0, 8).Little(first, 8).Little(last, 8).Little(0, 8);
        return Little(last - first + 1, 8);
    }

    internal byte[] ToArray() => [.. _bytes, 0x79, 0];

    private ResourceTemplate Little(ulong value, int bytes)
    {
        for (int i = 0; i < bytes; i++)
        {
            _bytes.Add((byte)(value >> (8 * i)));
        }

        return this;
    }

    private ResourceTemplate Add(ReadOnlySpan<byte> bytes)
    {
        foreach (byte b in bytes)
        {
            _bytes.Add(b);
        }

        return this;
    }
}

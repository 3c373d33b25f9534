// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Pci;

/// <summary>
/// The PCI test card of kvm-unit-tests (QEMU docs/specs/pci-testdev): one window in memory and one in ports, each with
/// a header by which the guest chooses a test and learns where to write what; the card counts the writes that come.
/// <code>
/// 0x00 u8  test, write-only: starts the test of that number
/// 0x01 u8  width of the writes: 1, 2 or 4; 0 when there is no such test
/// 0x04 u32 offset at which to write
/// 0x08 u32 what to write
/// 0x0C u32 writes counted
/// 0x10     name of the test, ends with NUL
/// </code>
/// There is one test for each width; a write of another width or value does not count.
/// </summary>
public sealed class PciTestCard : PciFunction
{
    private const uint WindowBytes = 4096;
    private const uint PortBytes = 256;
    private const uint CountOffset = 0x0C;
    private const uint NameOffset = 0x10;
    private const uint TargetOffset = 0x80;
    private const uint Signature = 0xFACE_CAFA;

    private readonly Window _memory = new(WindowBytes);
    private readonly Window _ports = new(PortBytes);

    /// <summary>Makes the card.</summary>
    public PciTestCard()
        : base("testcard", new PciIdentity(0x1B36, 0x0005, 0x00_FF_00))
    {
        AddBar(0, PciBarKind.Memory32, _memory);
        AddBar(1, PciBarKind.Io, _ports);
    }

    /// <inheritdoc/>
    public override int StateVersion => 1;

    /// <inheritdoc/>
    protected override void ResetCard()
    {
        _memory.Select(0xFF);
        _ports.Select(0xFF);
    }

    /// <inheritdoc/>
    protected override void SaveCard(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        (byte test, uint count) = _memory.State;
        writer.Write("memoryTest", (ulong)test);
        writer.Write("memoryCount", (ulong)count);
        (test, count) = _ports.State;
        writer.Write("portTest", (ulong)test);
        writer.Write("portCount", (ulong)count);
    }

    /// <inheritdoc/>
    protected override void LoadCard(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        _memory.State = (reader.ReadByte("memoryTest"), reader.ReadUInt32("memoryCount"));
        _ports.State = (reader.ReadByte("portTest"), reader.ReadUInt32("portCount"));
    }

    private sealed class Window : IRegisterWindow
    {
        private readonly Lock _gate = new();
        private byte _test = 0xFF;
        private uint _count;

        public Window(uint length) => Length = length;

        public uint Length { get; }

        public (byte Test, uint Count) State
        {
            get
            {
                lock (_gate)
                {
                    return (_test, _count);
                }
            }

            set
            {
                lock (_gate)
                {
                    (_test, _count) = value;
                }
            }
        }

        private int WidthBytes => _test < 3 ? 1 << _test : 0;

        public void Select(byte test) => State = (test, 0);

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_gate)
            {
                ulong value = 0;
                for (uint i = 0; i < (uint)width; i++)
                {
                    value |= (ulong)At(offset + i) << (int)(8 * i);
                }

                return value;
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            lock (_gate)
            {
                if (offset == 0 && width == AccessWidth.Byte)
                {
                    (_test, _count) = ((byte)value, 0);
                }
                else if (offset == TargetOffset && (int)width == WidthBytes && value == Data)
                {
                    _count++;
                }
            }
        }

        private uint Data => WidthBytes == 0 ? 0 : Signature & (uint)((1UL << (8 * WidthBytes)) - 1);

        private byte At(uint offset)
        {
            ReadOnlySpan<byte> name = WidthBytes switch
            {
                1 => "byte"u8,
                2 => "word"u8,
                4 => "dword"u8,
                _ => [],
            };
            return offset switch
            {
                1 => (byte)WidthBytes,
                >= 4 and < 8 when WidthBytes != 0 => (byte)(TargetOffset >> (int)(8 * (offset - 4))),
                >= 8 and < CountOffset => (byte)(Data >> (int)(8 * (offset - 8))),
                >= CountOffset and < NameOffset => (byte)(_count >> (int)(8 * (offset - CountOffset))),
                >= NameOffset when offset - NameOffset < name.Length => name[(int)(offset - NameOffset)],
                _ => 0,
            };
        }
    }
}

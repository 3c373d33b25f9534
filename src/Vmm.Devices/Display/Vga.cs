// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Pci;
using Vmm.Memory;

namespace Vmm.Devices.Display;

// Theory. IBM VGA to the register level (IBM VGA/XGA Technical Reference, 1992; register names below are its), with the
// Bochs VBE extensions ("DISPI") for linear frame buffers up to 2560x1600, as PCI device 1234:1111 with the frame
// buffer in BAR 0 and its registers also in BAR 2. That is the card that SeaBIOS's VGA BIOS, OVMF, Linux, the BSDs and
// illumos know from QEMU.
//
// Video memory is one RAM block. The four planes are interleaved: byte p of dword n is plane p at planar address n. The
// processor reaches it two ways: through 0xA0000..0xBFFFF, which this class handles byte by byte with latches and write
// modes, and through BAR 0, which is plain RAM that no code here sees; the block's page flags tell what was written.
// In odd/even and chain-4 mode the card drops the address bits that chose the plane, so that these modes use
// consecutive dwords and the CRT side counts dwords in byte, word and doubleword mode alike. (The chip keeps the bits
// and multiplies on the CRT side: only a program that changes the mode without rewriting memory can tell.)
//
// Nothing is drawn until a viewer asks: Refresh works out from the registers what the screen shows, and renders all of
// it when a register or the palette changed since the last time, else only what written pages touch. Rows go into a
// DisplayCanvas, which finds out what really changed. One gate protects all of it. Cursor and text do not blink: that
// would be traffic twice a second for every viewer of an idle screen.
//
// Not modelled: overscan, horizontal retrace positions, CRT timing other than what status register 1 shows, EGA-only
// registers, feature connector. Vertical frequency is always 70 Hz.

/// <summary>The display card. See the theory at the top of this file. Rendering is in <see cref="VgaRenderer"/>.</summary>
public sealed class Vga : PciFunction, IDisplaySurface
{
    /// <summary>First VGA port; 0x30 in all.</summary>
    public const ushort Port = 0x3B0;

    /// <summary>DISPI index port; data is the next (16 bits).</summary>
    public const ushort DispiPort = 0x1CE;

    /// <summary>First address of the legacy window.</summary>
    public const ulong LegacyAddress = 0xA0000;

    /// <summary>Bytes of the legacy window.</summary>
    public const uint LegacyBytes = 0x20000;

    private const long LineNs = 31_778;
    private const int Lines = 449;

    private readonly Lock _gate = new();
    private readonly IClock _clock;
    private readonly RamBlock _vram;
    private readonly Action? _collectDirty;
    private readonly VgaState _state;
    private readonly VgaRenderer _renderer;
    private uint _latch;

    /// <summary>Makes the card.</summary>
    /// <param name="clock">Guest time, for the retrace bits.</param>
    /// <param name="vram">Video memory: a power of two of at least 1 MiB. The machine saves its content with RAM.</param>
    /// <param name="mapper">Puts it where BAR 0 says.</param>
    /// <param name="rom">The VGA BIOS, or empty.</param>
    /// <param name="collectDirty">
    /// Called before page flags are looked at: merges what a driver has logged. On a viewer's thread, no gate held.
    /// </param>
    public Vga(IClock clock, RamBlock vram, IRamBarMapper mapper, ReadOnlyMemory<byte> rom, Action? collectDirty = null)
        : base("vga", new PciIdentity(0x1234, 0x1111, 0x03_00_00, 0x02, 0x1AF4, 0x1100))
    {
        ArgumentNullException.ThrowIfNull(vram);
        if (!ulong.IsPow2(vram.LengthBytes) || vram.LengthBytes is < (1 << 20) or > (256 << 20))
        {
            throw new ArgumentException("video memory must be a power of two from 1 to 256 MiB", nameof(vram));
        }

        _clock = clock;
        _vram = vram;
        _collectDirty = collectDirty;
        _state = new VgaState(vram.LengthBytes);
        _renderer = new VgaRenderer(_state, vram);
        AddRamBar(0, PciBarKind.Memory32Prefetchable, vram.LengthBytes, mapper);
        AddBar(2, PciBarKind.Memory32, new RegisterBar(this));
        AddRom(rom);

        // Firmware looks for a VGA among the cards that decode ports and memory.
        AllowCommand(PciConfig.CommandIo);
        Ports = new PortWindow(this);
        DispiPorts = new DispiWindow(this);
        LegacyMemory = new LegacyWindow(this);
    }

    /// <inheritdoc/>
    public override int StateVersion => 1;

    /// <summary>48 ports for <see cref="Port"/>.</summary>
    public IRegisterWindow Ports { get; }

    /// <summary>The ports at <see cref="DispiPort"/>.</summary>
    public IRegisterWindow DispiPorts { get; }

    /// <summary>The window for <see cref="LegacyAddress"/>.</summary>
    public IRegisterWindow LegacyMemory { get; }

    /// <inheritdoc/>
    public DisplayCursor? Cursor => null;

    /// <inheritdoc/>
    public void Refresh(DisplayFrame frame)
    {
        ArgumentNullException.ThrowIfNull(frame);
        _collectDirty?.Invoke();
        lock (_gate)
        {
            _renderer.Update();
            _renderer.Canvas.CopyTo(frame);
        }
    }

    /// <inheritdoc/>
    public TextScreen? ReadText()
    {
        lock (_gate)
        {
            return _renderer.ReadText();
        }
    }

    /// <inheritdoc/>
    public bool RequestSize(int width, int height) => false;

    /// <inheritdoc/>
    protected override void ResetCard()
    {
        lock (_gate)
        {
            _state.Reset();
            _latch = 0;
        }
    }

    /// <inheritdoc/>
    protected override void SaveCard(StateWriter writer)
    {
        lock (_gate)
        {
            _state.Save(writer);
            writer.Write("latch", (ulong)_latch);
        }
    }

    /// <inheritdoc/>
    protected override void LoadCard(StateReader reader, int version)
    {
        lock (_gate)
        {
            _state.Load(reader);
            _latch = reader.ReadUInt32("latch");
        }
    }

    private byte Status1()
    {
        // 640x400 at 70 Hz: 449 lines, retrace after line 412 (VGA reference, "Input status register 1").
        long at = _clock.NowNs % (LineNs * Lines);
        long line = at / LineNs;
        bool blank = line >= 400 || at % LineNs > LineNs * 4 / 5;
        return (byte)((blank ? 1 : 0) | (line is >= 412 and < 414 ? 8 : 0));
    }

    private byte ReadPort(uint port)
    {
        lock (_gate)
        {
            VgaState s = _state;
            if (s.IsHidden(port))
            {
                return 0xFF;
            }

            switch (port)
            {
                case 0x3C0:
                    return s.AttributeIsData ? (byte)0 : s.AttributeIndex;
                case 0x3C1:
                    return s.Attribute[s.AttributeIndex & 0x1F];
                case 0x3C2:
                    return 0x10;
                case 0x3C3:
                    return s.Enable;
                case 0x3C4:
                    return s.SequencerIndex;
                case 0x3C5:
                    return s.Sequencer[s.SequencerIndex & 7];
                case 0x3C6:
                    return s.DacMask;
                case 0x3C7:
                    return s.DacState;
                case 0x3C8:
                    return s.DacWriteIndex;
                case 0x3C9:
                    return s.ReadDac();
                case 0x3CA:
                    return s.Feature;
                case 0x3CC:
                    return s.Miscellaneous;
                case 0x3CE:
                    return s.GraphicsIndex;
                case 0x3CF:
                    return s.Graphics[s.GraphicsIndex & 15];
                case 0x3B4:
                case 0x3D4:
                    return s.CrtcIndex;
                case 0x3B5:
                case 0x3D5:
                    return s.Crtc[s.CrtcIndex & 0x3F];
                case 0x3BA:
                case 0x3DA:
                    s.AttributeIsData = false;
                    return Status1();
                default:
                    return 0xFF;
            }
        }
    }

    private void WritePort(uint port, byte value)
    {
        lock (_gate)
        {
            VgaState s = _state;
            if (s.IsHidden(port))
            {
                return;
            }

            switch (port)
            {
                case 0x3C0:
                    s.WriteAttribute(value);
                    break;
                case 0x3C2:
                    s.Miscellaneous = (byte)(value & 0xEF);
                    s.Touch();
                    break;
                case 0x3C3:
                    s.Enable = (byte)(value & 1);
                    break;
                case 0x3C4:
                    s.SequencerIndex = (byte)(value & 7);
                    break;
                case 0x3C5:
                    s.WriteSequencer(value);
                    break;
                case 0x3C6:
                    s.DacMask = value;
                    s.Touch();
                    break;
                case 0x3C7:
                    s.StartDacRead(value);
                    break;
                case 0x3C8:
                    s.StartDacWrite(value);
                    break;
                case 0x3C9:
                    s.WriteDac(value);
                    break;
                case 0x3CE:
                    s.GraphicsIndex = (byte)(value & 15);
                    break;
                case 0x3CF:
                    s.WriteGraphics(value);
                    break;
                case 0x3B4:
                case 0x3D4:
                    s.CrtcIndex = (byte)(value & 0x3F);
                    break;
                case 0x3B5:
                case 0x3D5:
                    s.WriteCrtc(value);
                    break;
                case 0x3BA:
                case 0x3DA:
                    s.Feature = (byte)(value & 3);
                    break;
                default:
                    break;
            }
        }
    }

    private byte ReadLegacy(uint offset)
    {
        VgaState s = _state;
        if (!s.TryDecode(offset, out uint address))
        {
            return 0xFF;
        }

        if (s.IsLinearBank)
        {
            return ReadByte(s.BankBytes + address);
        }

        if (s.IsChain4)
        {
            _latch = ReadDword(address & ~3u);
            return (byte)(_latch >> (int)(8 * (address & 3)));
        }

        int plane = s.Graphics[4] & 3;
        if (s.IsOddEven)
        {
            plane = (plane & 2) | (int)(address & 1);
            address >>= 1;
        }

        _latch = ReadDword(address * 4);
        if ((s.Graphics[5] & 8) == 0)
        {
            return (byte)(_latch >> (8 * plane));
        }

        // Read mode 1: a bit is set where the cared-for planes equal the color compare register.
        uint difference = (_latch ^ VgaState.Expand(s.Graphics[2])) & VgaState.Expand(s.Graphics[7]);
        difference |= difference >> 16;
        return (byte)~(difference | (difference >> 8));
    }

    private void WriteLegacy(uint offset, byte value)
    {
        VgaState s = _state;
        if (!s.TryDecode(offset, out uint address))
        {
            return;
        }

        if (s.IsLinearBank)
        {
            WriteByte(s.BankBytes + address, value);
            return;
        }

        uint planes = VgaState.Expand(s.Sequencer[2]);
        if (s.IsChain4)
        {
            if ((s.Sequencer[2] & (1 << (int)(address & 3))) != 0)
            {
                WriteByte(address, value);
            }

            return;
        }

        if (s.IsOddEven)
        {
            // Even addresses reach planes 0 and 2, odd ones 1 and 3.
            planes &= (address & 1) == 0 ? 0x00FF_00FFu : 0xFF00_FF00u;
            address >>= 1;
        }

        uint old = ReadDword(address * 4);
        uint result = s.Combine(value, _latch);
        WriteDword(address * 4, (old & ~planes) | (result & planes));
    }

    private void ClearIfAsked()
    {
        ulong left = _state.ClearBytes;
        _state.ClearBytes = 0;
        byte[] zeroes = left == 0 ? [] : new byte[65536];
        for (ulong at = 0; at < left; at += (uint)zeroes.Length)
        {
            _vram.TryWrite(at, zeroes.AsSpan(0, (int)Math.Min(left - at, (uint)zeroes.Length)), out _);
        }
    }

    private byte ReadByte(uint offset)
    {
        Span<byte> one = stackalloc byte[1];
        return _vram.TryRead(offset, one) ? one[0] : (byte)0xFF;
    }

    private void WriteByte(uint offset, byte value) => _vram.TryWrite(offset, [value], out _);

    private uint ReadDword(uint offset)
    {
        Span<byte> four = stackalloc byte[4];
        return _vram.TryRead(offset, four) ? MemoryMarshal.Read<uint>(four) : 0;
    }

    private void WriteDword(uint offset, uint value)
    {
        Span<byte> four = stackalloc byte[4];
        MemoryMarshal.Write(four, value);
        _vram.TryWrite(offset, four, out _);
    }

    private sealed class PortWindow : IRegisterWindow
    {
        private readonly Vga _owner;

        public PortWindow(Vga owner) => _owner = owner;

        public uint Length => 0x30;

        // Word writes to index ports set index and data; all wider accesses are split like that.
        public ulong Read(uint offset, AccessWidth width)
        {
            ulong value = 0;
            for (uint i = 0; i < (uint)width; i++)
            {
                value |= (ulong)_owner.ReadPort(Port + offset + i) << (int)(8 * i);
            }

            return value;
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            for (uint i = 0; i < (uint)width; i++)
            {
                _owner.WritePort(Port + offset + i, (byte)(value >> (int)(8 * i)));
            }
        }
    }

    private sealed class DispiWindow : IRegisterWindow
    {
        private readonly Vga _owner;

        public DispiWindow(Vga owner) => _owner = owner;

        public uint Length => 4;

        // Index at 0x1CE, data at 0x1CF and, for guests that cannot do unaligned words, at 0x1D0.
        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_owner._gate)
            {
                ulong value = offset == 0 ? _owner._state.DispiIndex : _owner._state.ReadDispi();
                return width == AccessWidth.Byte ? value & 0xFF : value;
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            lock (_owner._gate)
            {
                if (offset == 0)
                {
                    _owner._state.DispiIndex = (ushort)value;
                }
                else
                {
                    _owner._state.WriteDispi((ushort)value);
                    _owner.ClearIfAsked();
                }
            }
        }
    }

    // BAR 2: VGA ports 0x3C0..0x3DF at 0x400, DISPI registers at 0x500 (QEMU docs/specs/standard-vga).
    private sealed class RegisterBar : IRegisterWindow
    {
        private readonly Vga _owner;

        public RegisterBar(Vga owner) => _owner = owner;

        public uint Length => 0x1000;

        public ulong Read(uint offset, AccessWidth width)
        {
            if (offset is >= 0x500 and < 0x516)
            {
                lock (_owner._gate)
                {
                    ushort value = _owner._state.ReadDispi((offset - 0x500) / 2);
                    return width == AccessWidth.Byte ? (byte)(value >> (int)(8 * (offset & 1))) : value;
                }
            }

            if (offset >= 0x400 && offset + (uint)width <= 0x420)
            {
                return _owner.Ports.Read(offset - 0x400 + 0x10, width);
            }

            return width == AccessWidth.Qword ? ulong.MaxValue : (1UL << (8 * (int)width)) - 1;
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            if (offset is >= 0x500 and < 0x516 && (offset & 1) == 0 && width >= AccessWidth.Word)
            {
                lock (_owner._gate)
                {
                    _owner._state.WriteDispi((offset - 0x500) / 2, (ushort)value);
                    _owner.ClearIfAsked();
                }
            }
            else if (offset >= 0x400 && offset + (uint)width <= 0x420)
            {
                _owner.Ports.Write(offset - 0x400 + 0x10, width, value);
            }
        }
    }

    private sealed class LegacyWindow : IRegisterWindow
    {
        private readonly Vga _owner;

        public LegacyWindow(Vga owner) => _owner = owner;

        public uint Length => LegacyBytes;

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_owner._gate)
            {
                ulong value = 0;
                for (uint i = 0; i < (uint)width; i++)
                {
                    value |= (ulong)_owner.ReadLegacy(offset + i) << (int)(8 * i);
                }

                return value;
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            lock (_owner._gate)
            {
                for (uint i = 0; i < (uint)width; i++)
                {
                    _owner.WriteLegacy(offset + i, (byte)(value >> (int)(8 * i)));
                }
            }
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using Vmm.Core;

namespace Vmm.Devices.Display;

/// <summary>
/// The registers of <see cref="Vga"/> and what follows from them directly. Only masks and side effects of writes are
/// here. Protected by the card's gate.
/// </summary>
internal sealed class VgaState
{
    public const int DispiId = 0;
    public const int DispiXRes = 1;
    public const int DispiYRes = 2;
    public const int DispiBpp = 3;
    public const int DispiEnable = 4;
    public const int DispiBank = 5;
    public const int DispiVirtWidth = 6;
    public const int DispiVirtHeight = 7;
    public const int DispiXOffset = 8;
    public const int DispiYOffset = 9;
    public const int DispiMemory64K = 10;

    public const ushort EnableOn = 0x01;
    public const ushort EnableCaps = 0x02;
    public const ushort Enable8BitDac = 0x20;
    public const ushort EnableLfb = 0x40;
    public const ushort EnableNoClear = 0x80;

    private const ushort MaximumX = 2560;
    private const ushort MaximumY = 1600;
    private const ushort MaximumBpp = 32;

    private readonly ulong _vramBytes;
    private int _dacComponent;
    private byte _dacRed;
    private byte _dacGreen;

    public VgaState(ulong vramBytes)
    {
        _vramBytes = vramBytes;
        Reset();
    }

    /// <summary>Grows with every change that the screen may show.</summary>
    public long Version { get; private set; }

    /// <summary>Bytes of video memory to clear (DISPI enable without NOCLEARMEM); the card does it and sets 0.</summary>
    public ulong ClearBytes { get; set; }

    public byte Miscellaneous { get; set; }

    public byte Feature { get; set; }

    public byte Enable { get; set; }

    public byte SequencerIndex { get; set; }

    public byte GraphicsIndex { get; set; }

    public byte CrtcIndex { get; set; }

    public byte AttributeIndex { get; private set; }

    public bool AttributeIsData { get; set; }

    public byte DacMask { get; set; }

    public byte DacState { get; private set; }

    public byte DacWriteIndex { get; private set; }

    public byte DacReadIndex { get; private set; }

    public ushort DispiIndex { get; set; }

    public byte[] Sequencer { get; } = new byte[8];

    public byte[] Graphics { get; } = new byte[16];

    public byte[] Crtc { get; } = new byte[64];

    public byte[] Attribute { get; } = new byte[32];

    /// <summary>256 entries of red, green, blue as written (6 or 8 bits).</summary>
    public byte[] Palette { get; } = new byte[768];

    public ushort[] Dispi { get; } = new ushort[11];

    /// <summary>The attribute controller shows the screen (palette address source, bit 5 of its index).</summary>
    public bool IsScreenOn => (AttributeIndex & 0x20) != 0 && (Sequencer[1] & 0x20) == 0;

    public bool IsDispiOn => (Dispi[DispiEnable] & EnableOn) != 0;

    public bool IsLinearBank => IsDispiOn && Dispi[DispiBpp] >= 8;

    public uint BankBytes => (uint)Dispi[DispiBank] << 16;

    public bool IsChain4 => (Sequencer[4] & 8) != 0;

    public bool IsOddEven => (Sequencer[4] & 4) == 0;

    public bool Is8BitDac => (Dispi[DispiEnable] & Enable8BitDac) != 0;

    private static ReadOnlySpan<byte> SequencerMask => [0x03, 0x3D, 0x0F, 0x3F, 0x0E, 0x00, 0x00, 0xFF];

    private static ReadOnlySpan<byte> GraphicsMask =>
        [0x0F, 0x0F, 0x0F, 0x1F, 0x03, 0x7B, 0x0F, 0x0F, 0xFF, 0, 0, 0, 0, 0, 0, 0];

    /// <summary>Four bits to four bytes of zeroes or ones.</summary>
    public static uint Expand(int bits) =>
        ((bits & 1) != 0 ? 0xFFu : 0) | ((bits & 2) != 0 ? 0xFF00u : 0) |
        ((bits & 4) != 0 ? 0xFF_0000u : 0) | ((bits & 8) != 0 ? 0xFF00_0000u : 0);

    public void Touch() => Version++;

    public void Reset()
    {
        Array.Clear(Sequencer);
        Array.Clear(Graphics);
        Array.Clear(Crtc);
        Array.Clear(Attribute);
        Array.Clear(Palette);
        Array.Clear(Dispi);
        Miscellaneous = 0;
        Feature = 0;
        Enable = 1;
        SequencerIndex = GraphicsIndex = CrtcIndex = AttributeIndex = 0;
        AttributeIsData = false;
        DacMask = 0xFF;
        DacState = 0;
        DacWriteIndex = DacReadIndex = 0;
        _dacComponent = 0;
        DispiIndex = 0;
        Dispi[DispiId] = 0xB0C5;
        Dispi[DispiXRes] = 640;
        Dispi[DispiYRes] = 480;
        Dispi[DispiBpp] = 8;
        FixDispi();
        Touch();
    }

    /// <summary>Ports of the other of monochrome (3Bx) and color (3Dx), as Miscellaneous bit 0 says.</summary>
    public bool IsHidden(uint port) => (Miscellaneous & 1) != 0
        ? port is >= 0x3B0 and <= 0x3BF
        : port is >= 0x3D0 and <= 0x3DF;

    /// <summary>Whether an offset from 0xA0000 is decoded, and where it leads (Graphics 6 bits 3..2).</summary>
    public bool TryDecode(uint offset, out uint address)
    {
        address = offset;
        switch ((Graphics[6] >> 2) & 3)
        {
            case 0:
                return (Miscellaneous & 2) != 0;
            case 1:
                return offset < 0x10000 && (Miscellaneous & 2) != 0;
            case 2:
                address = offset - 0x10000;
                return offset is >= 0x10000 and < 0x18000 && (Miscellaneous & 2) != 0;
            default:
                address = offset - 0x18000;
                return offset >= 0x18000 && (Miscellaneous & 2) != 0;
        }
    }

    /// <summary>What a processor write puts into the four planes (write modes 0..3).</summary>
    public uint Combine(byte value, uint latch)
    {
        int rotate = Graphics[3] & 7;
        byte rotated = (byte)((value >> rotate) | (value << (8 - rotate)));
        uint bitMask = Graphics[8] * 0x0101_0101u;
        uint setReset = Expand(Graphics[0]);
        uint source;
        switch (Graphics[5] & 3)
        {
            case 1:
                return latch;
            case 2:
                source = Expand(value & 15);
                break;
            case 3:
                bitMask &= rotated * 0x0101_0101u;
                source = setReset;
                break;
            default:
                uint enable = Expand(Graphics[1]);
                source = (rotated * 0x0101_0101u & ~enable) | (setReset & enable);
                break;
        }

        source = ((Graphics[3] >> 3) & 3) switch
        {
            1 => source & latch,
            2 => source | latch,
            3 => source ^ latch,
            _ => source,
        };
        return (source & bitMask) | (latch & ~bitMask);
    }

    public void WriteSequencer(byte value)
    {
        Sequencer[SequencerIndex] = (byte)(value & SequencerMask[SequencerIndex]);
        Touch();
    }

    public void WriteGraphics(byte value)
    {
        Graphics[GraphicsIndex] = (byte)(value & GraphicsMask[GraphicsIndex]);
        Touch();
    }

    public void WriteCrtc(byte value)
    {
        int index = CrtcIndex;
        if (index > 0x18)
        {
            return;
        }

        if (index <= 7 && (Crtc[0x11] & 0x80) != 0)
        {
            // Registers 0..7 are protected, but for line compare bit 8 (Overflow bit 4).
            if (index == 7)
            {
                Crtc[7] = (byte)((Crtc[7] & ~0x10) | (value & 0x10));
                Touch();
            }

            return;
        }

        if (Crtc[index] != value)
        {
            Crtc[index] = value;
            Touch();
        }
    }

    public void WriteAttribute(byte value)
    {
        if (!AttributeIsData)
        {
            AttributeIndex = (byte)(value & 0x3F);
            Touch();
        }
        else
        {
            int index = AttributeIndex & 0x1F;
            byte mask = index switch { < 0x10 => 0x3F, 0x10 => 0xEF, 0x11 => 0xFF, 0x12 => 0x3F, 0x13 or 0x14 => 0x0F, _ => 0 };

            // Palette registers cannot be changed while they are in use.
            if (index >= 0x10 || (AttributeIndex & 0x20) == 0)
            {
                Attribute[index] = (byte)(value & mask);
                Touch();
            }
        }

        AttributeIsData = !AttributeIsData;
    }

    public void StartDacRead(byte index)
    {
        DacReadIndex = index;
        DacState = 3;
        _dacComponent = 0;
    }

    public void StartDacWrite(byte index)
    {
        DacWriteIndex = index;
        DacState = 0;
        _dacComponent = 0;
    }

    public byte ReadDac()
    {
        byte value = Palette[(DacReadIndex * 3) + _dacComponent];
        if (++_dacComponent == 3)
        {
            _dacComponent = 0;
            DacReadIndex++;
        }

        return value;
    }

    public void WriteDac(byte value)
    {
        byte kept = Is8BitDac ? value : (byte)(value & 0x3F);
        switch (_dacComponent)
        {
            case 0:
                _dacRed = kept;
                _dacComponent = 1;
                break;
            case 1:
                _dacGreen = kept;
                _dacComponent = 2;
                break;
            default:
                // The three parts take effect together.
                int at = DacWriteIndex * 3;
                Palette[at] = _dacRed;
                Palette[at + 1] = _dacGreen;
                Palette[at + 2] = kept;
                _dacComponent = 0;
                DacWriteIndex++;
                Touch();
                break;
        }
    }

    public ushort ReadDispi() => ReadDispi(DispiIndex);

    public ushort ReadDispi(uint index)
    {
        if (index == DispiMemory64K)
        {
            return (ushort)(_vramBytes >> 16);
        }

        if (index > DispiMemory64K)
        {
            return 0;
        }

        if ((Dispi[DispiEnable] & EnableCaps) != 0)
        {
            switch (index)
            {
                case DispiXRes:
                    return MaximumX;
                case DispiYRes:
                    return MaximumY;
                case DispiBpp:
                    return MaximumBpp;
            }
        }

        return Dispi[index];
    }

    public void WriteDispi(ushort value) => WriteDispi(DispiIndex, value);

    public void WriteDispi(uint index, ushort value)
    {
        switch (index)
        {
            case DispiId:
                if (value is >= 0xB0C0 and <= 0xB0C5)
                {
                    Dispi[DispiId] = value;
                }

                return;
            case DispiXRes:
                if (value <= MaximumX && (value & 7) == 0)
                {
                    Dispi[DispiXRes] = value;
                }

                break;
            case DispiYRes:
                if (value <= MaximumY)
                {
                    Dispi[DispiYRes] = value;
                }

                break;
            case DispiBpp:
                if (value is 0 or 4 or 8 or 15 or 16 or 24 or 32)
                {
                    Dispi[DispiBpp] = value == 0 ? (ushort)8 : value;
                }

                break;
            case DispiEnable:
                WriteDispiEnable(value);
                break;
            case DispiBank:
                Dispi[DispiBank] = (ushort)Math.Min(value, (uint)(_vramBytes >> 16) - 1);
                break;
            case DispiVirtWidth:
                if (value >= Dispi[DispiXRes])
                {
                    Dispi[DispiVirtWidth] = value;
                }

                break;
            case DispiXOffset:
            case DispiYOffset:
                Dispi[index] = value;
                break;
            default:
                return;
        }

        FixDispi();
        Touch();
    }

    public void Save(StateWriter writer)
    {
        writer.WriteBytes("sequencer", Sequencer);
        writer.WriteBytes("graphics", Graphics);
        writer.WriteBytes("crtc", Crtc);
        writer.WriteBytes("attribute", Attribute);
        writer.WriteBytes("palette", Palette);
        for (int i = 0; i < Dispi.Length; i++)
        {
            writer.Write($"dispi{i}", (ulong)Dispi[i]);
        }

        writer.Write("misc", (ulong)Miscellaneous);
        writer.Write("feature", (ulong)Feature);
        writer.Write("enable", (ulong)Enable);
        writer.Write("sequencerIndex", (ulong)SequencerIndex);
        writer.Write("graphicsIndex", (ulong)GraphicsIndex);
        writer.Write("crtcIndex", (ulong)CrtcIndex);
        writer.Write("attributeIndex", (ulong)AttributeIndex);
        writer.Write("attributeIsData", AttributeIsData);
        writer.Write("dacMask", (ulong)DacMask);
        writer.Write("dacState", (ulong)DacState);
        writer.Write("dacWriteIndex", (ulong)DacWriteIndex);
        writer.Write("dacReadIndex", (ulong)DacReadIndex);
        writer.Write("dacComponent", (ulong)_dacComponent);
        writer.Write("dacRed", (ulong)_dacRed);
        writer.Write("dacGreen", (ulong)_dacGreen);
        writer.Write("dispiIndex", (ulong)DispiIndex);
    }

    public void Load(StateReader reader)
    {
        reader.ReadBytes("sequencer", Sequencer);
        reader.ReadBytes("graphics", Graphics);
        reader.ReadBytes("crtc", Crtc);
        reader.ReadBytes("attribute", Attribute);
        reader.ReadBytes("palette", Palette);
        for (int i = 0; i < Sequencer.Length; i++)
        {
            Sequencer[i] &= SequencerMask[i];
        }

        for (int i = 0; i < Graphics.Length; i++)
        {
            Graphics[i] &= GraphicsMask[i];
        }

        for (int i = 0; i < Dispi.Length; i++)
        {
            Dispi[i] = reader.ReadUInt16($"dispi{i}");
        }

        Dispi[DispiXRes] = Math.Min(Dispi[DispiXRes], MaximumX);
        Dispi[DispiYRes] = Math.Min(Dispi[DispiYRes], MaximumY);
        Dispi[DispiBank] = (ushort)Math.Min(Dispi[DispiBank], (uint)(_vramBytes >> 16) - 1);
        if (Dispi[DispiBpp] is not (4 or 8 or 15 or 16 or 24 or 32))
        {
            throw new StateException($"{reader.Section}.dispi{DispiBpp}: {Dispi[DispiBpp]} bits per pixel");
        }

        Miscellaneous = reader.ReadByte("misc");
        Feature = reader.ReadByte("feature");
        Enable = reader.ReadByte("enable");
        SequencerIndex = (byte)reader.ReadBounded("sequencerIndex", 7);
        GraphicsIndex = (byte)reader.ReadBounded("graphicsIndex", 15);
        CrtcIndex = (byte)reader.ReadBounded("crtcIndex", 63);
        AttributeIndex = (byte)reader.ReadBounded("attributeIndex", 63);
        AttributeIsData = reader.ReadBoolean("attributeIsData");
        DacMask = reader.ReadByte("dacMask");
        DacState = reader.ReadByte("dacState");
        DacWriteIndex = reader.ReadByte("dacWriteIndex");
        DacReadIndex = reader.ReadByte("dacReadIndex");
        _dacComponent = (int)reader.ReadBounded("dacComponent", 2);
        _dacRed = reader.ReadByte("dacRed");
        _dacGreen = reader.ReadByte("dacGreen");
        DispiIndex = reader.ReadUInt16("dispiIndex");
        FixDispi();
        Touch();
    }

    private void WriteDispiEnable(ushort value)
    {
        bool was = IsDispiOn;
        bool was8Bit = Is8BitDac;
        Dispi[DispiEnable] = (ushort)(value & 0xE3);
        if (was8Bit != Is8BitDac)
        {
            for (int i = 0; i < Palette.Length; i++)
            {
                Palette[i] = Is8BitDac ? (byte)(Palette[i] << 2) : (byte)(Palette[i] >> 2);
            }
        }

        if (IsDispiOn && !was)
        {
            Dispi[DispiVirtWidth] = Dispi[DispiXRes];
            Dispi[DispiXOffset] = 0;
            Dispi[DispiYOffset] = 0;
            if ((value & EnableNoClear) == 0)
            {
                ulong bytes = (ulong)Dispi[DispiXRes] * Dispi[DispiYRes] * (Dispi[DispiBpp] + 7u) / 8;
                ClearBytes = Math.Min(bytes, _vramBytes);
            }

            // The registers that a mode set would have written, so that leaving DISPI finds a graphics mode.
            Graphics[6] = (byte)((Graphics[6] & ~0x0C) | 0x05);
            Sequencer[2] |= 0x0F;
            AttributeIndex |= 0x20;
            Sequencer[1] &= unchecked((byte)~0x20);
            if (Dispi[DispiBpp] == 4)
            {
                Graphics[5] &= unchecked((byte)~0x60);
            }
            else
            {
                Sequencer[4] |= 0x08;
                Graphics[5] = (byte)((Graphics[5] & ~0x60) | 0x40);
            }
        }

        if (!IsDispiOn)
        {
            Dispi[DispiBank] = 0;
        }
    }

    // Virtual height is what fits; offsets stay inside it.
    private void FixDispi()
    {
        uint bits = Dispi[DispiBpp] == 15 ? 16u : Dispi[DispiBpp];
        uint width = Math.Max((uint)Dispi[DispiVirtWidth], Dispi[DispiXRes]);
        width = Math.Max(width, 8);
        ulong lineBytes = Math.Max(1UL, width * bits / 8);
        Dispi[DispiVirtHeight] = (ushort)Math.Min(_vramBytes / lineBytes, 0xFFFF);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Numerics;
using Vmm.Core;

namespace Vmm.Backends.Screen;

/// <summary>
/// A baseline JPEG encoder (ITU T.81, JFIF) for the Tight encoding: full-resolution colour, the tables of annex K. Only
/// what a VNC server needs; pictures for people are PNG.
/// </summary>
internal static class Jpeg
{
    private static readonly byte[] s_zigzag =
    [
        0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28,
        35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    ];

    private static readonly byte[] s_luma =
    [
        16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
        18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
    ];

    private static readonly byte[] s_chroma =
    [
        17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99,
        99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
    ];

    private static readonly byte[] s_dcCounts = [0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0];
    private static readonly byte[] s_dcValues = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
    private static readonly byte[] s_acCounts = [0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 0x7D];

    private static readonly byte[] s_acValues =
    [
        0x01, 0x02, 0x03, 0x00, 0x04, 0x11, 0x05, 0x12, 0x21, 0x31, 0x41, 0x06, 0x13, 0x51, 0x61, 0x07, 0x22, 0x71, 0x14, 0x32, 0x81,
        0x91, 0xA1, 0x08, 0x23, 0x42, 0xB1, 0xC1, 0x15, 0x52, 0xD1, 0xF0, 0x24, 0x33, 0x62, 0x72, 0x82, 0x09, 0x0A, 0x16, 0x17, 0x18,
        0x19, 0x1A, 0x25, 0x26, 0x27, 0x28, 0x29, 0x2A, 0x34, 0x35, 0x36, 0x37, 0x38, 0x39, 0x3A, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48,
        0x49, 0x4A, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5A, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6A, 0x73, 0x74, 0x75,
        0x76, 0x77, 0x78, 0x79, 0x7A, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99,
        0x9A, 0xA2, 0xA3, 0xA4, 0xA5, 0xA6, 0xA7, 0xA8, 0xA9, 0xAA, 0xB2, 0xB3, 0xB4, 0xB5, 0xB6, 0xB7, 0xB8, 0xB9, 0xBA, 0xC2, 0xC3,
        0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xD2, 0xD3, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xD9, 0xDA, 0xE1, 0xE2, 0xE3, 0xE4, 0xE5,
        0xE6, 0xE7, 0xE8, 0xE9, 0xEA, 0xF1, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6, 0xF7, 0xF8, 0xF9, 0xFA,
    ];

    private static readonly (ushort Code, byte Length)[] s_dc = MakeCodes(s_dcCounts, s_dcValues);
    private static readonly (ushort Code, byte Length)[] s_ac = MakeCodes(s_acCounts, s_acValues);
    private static readonly float[] s_cosines = MakeCosines();

    /// <summary>Encodes a part of a frame.</summary>
    /// <param name="frame">0x00RRGGBB.</param>
    /// <param name="frameWidth">Pixels per row.</param>
    /// <param name="area">The part.</param>
    /// <param name="quality">1..100.</param>
    public static byte[] Encode(uint[] frame, int frameWidth, in DisplayRectangle area, int quality)
    {
        byte[] luma = Scale(s_luma, quality);
        byte[] chroma = Scale(s_chroma, quality);
        var to = new RfbWriter();
        to.Bytes([0xFF, 0xD8, 0xFF, 0xE0, 0, 16, 0x4A, 0x46, 0x49, 0x46, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0]);
        PutQuantizer(to, 0, luma);
        PutQuantizer(to, 1, chroma);
        to.Bytes([0xFF, 0xC0, 0, 17, 8]);
        to.Short(area.Height);
        to.Short(area.Width);
        to.Bytes([3, 1, 0x11, 0, 2, 0x11, 1, 3, 0x11, 1]);
        PutCodes(to, 0x00, s_dcCounts, s_dcValues);
        PutCodes(to, 0x10, s_acCounts, s_acValues);
        to.Bytes([0xFF, 0xDA, 0, 12, 3, 1, 0, 2, 0, 3, 0, 0, 63, 0]);

        var bits = new BitWriter(to);
        Span<int> previous = stackalloc int[3];
        previous.Clear();
        Span<float> block = stackalloc float[64];
        for (int y = 0; y < area.Height; y += 8)
        {
            for (int x = 0; x < area.Width; x += 8)
            {
                for (int component = 0; component < 3; component++)
                {
                    Load(frame, frameWidth, area, x, y, component, block);
                    Transform(block);
                    EncodeBlock(ref bits, block, component == 0 ? luma : chroma, ref previous[component]);
                }
            }
        }

        bits.Finish();
        to.Bytes([0xFF, 0xD9]);
        return to.Written.ToArray();
    }

    private static void Load(
        uint[] frame, int frameWidth, in DisplayRectangle area, int x, int y, int component, Span<float> block)
    {
        for (int row = 0; row < 8; row++)
        {
            int line = (area.Y + Math.Min(y + row, area.Height - 1)) * frameWidth;
            for (int column = 0; column < 8; column++)
            {
                uint colour = frame[line + area.X + Math.Min(x + column, area.Width - 1)];
                float red = (colour >> 16) & 0xFF;
                float green = (colour >> 8) & 0xFF;
                float blue = colour & 0xFF;
                block[(row * 8) + column] = component switch
                {
                    0 => (0.299f * red) + (0.587f * green) + (0.114f * blue) - 128,
                    1 => (-0.168736f * red) - (0.331264f * green) + (0.5f * blue),
                    _ => (0.5f * red) - (0.418688f * green) - (0.081312f * blue),
                };
            }
        }
    }

    private static void Transform(Span<float> block)
    {
        Span<float> half = stackalloc float[64];
        for (int row = 0; row < 8; row++)
        {
            for (int u = 0; u < 8; u++)
            {
                float sum = 0;
                for (int x = 0; x < 8; x++)
                {
                    sum += block[(row * 8) + x] * s_cosines[(u * 8) + x];
                }

                half[(row * 8) + u] = sum;
            }
        }

        for (int column = 0; column < 8; column++)
        {
            for (int v = 0; v < 8; v++)
            {
                float sum = 0;
                for (int y = 0; y < 8; y++)
                {
                    sum += half[(y * 8) + column] * s_cosines[(v * 8) + y];
                }

                block[(v * 8) + column] = sum;
            }
        }
    }

    private static void EncodeBlock(ref BitWriter bits, ReadOnlySpan<float> block, byte[] table, ref int previous)
    {
        Span<int> values = stackalloc int[64];
        for (int i = 0; i < 64; i++)
        {
            int at = s_zigzag[i];
            values[i] = (int)MathF.Round(block[at] / table[at]);
        }

        int difference = values[0] - previous;
        previous = values[0];
        int size = SizeOf(difference);
        bits.Put(s_dc[size].Code, s_dc[size].Length);
        PutValue(ref bits, difference, size);
        int zeroes = 0;
        for (int i = 1; i < 64; i++)
        {
            if (values[i] == 0)
            {
                zeroes++;
                continue;
            }

            for (; zeroes >= 16; zeroes -= 16)
            {
                bits.Put(s_ac[0xF0].Code, s_ac[0xF0].Length);
            }

            int value = Math.Clamp(values[i], -1023, 1023);
            size = SizeOf(value);
            (ushort code, byte length) = s_ac[(zeroes << 4) | size];
            bits.Put(code, length);
            PutValue(ref bits, value, size);
            zeroes = 0;
        }

        if (zeroes > 0)
        {
            bits.Put(s_ac[0].Code, s_ac[0].Length);
        }
    }

    private static int SizeOf(int value) => 32 - BitOperations.LeadingZeroCount((uint)Math.Abs(value));

    private static void PutValue(ref BitWriter bits, int value, int size)
    {
        if (size > 0)
        {
            bits.Put((value < 0 ? value - 1 : value) & ((1 << size) - 1), size);
        }
    }

    private static byte[] Scale(byte[] table, int quality)
    {
        int scale = quality < 50 ? 5000 / Math.Max(quality, 1) : 200 - (2 * Math.Min(quality, 100));
        byte[] result = new byte[64];
        for (int i = 0; i < 64; i++)
        {
            result[i] = (byte)Math.Clamp(((table[i] * scale) + 50) / 100, 1, 255);
        }

        return result;
    }

    private static void PutQuantizer(RfbWriter to, int id, byte[] table)
    {
        to.Bytes([0xFF, 0xDB, 0, 67, (byte)id]);
        foreach (byte at in s_zigzag)
        {
            to.Byte(table[at]);
        }
    }

    private static void PutCodes(RfbWriter to, int id, byte[] counts, byte[] values)
    {
        to.Bytes([0xFF, 0xC4]);
        to.Short(19 + values.Length);
        to.Byte(id);
        to.Bytes(counts);
        to.Bytes(values);
    }

    private static (ushort Code, byte Length)[] MakeCodes(byte[] counts, byte[] values)
    {
        var codes = new (ushort, byte)[256];
        int code = 0;
        int at = 0;
        for (int length = 1; length <= 16; length++)
        {
            for (int i = 0; i < counts[length - 1]; i++)
            {
                codes[values[at++]] = ((ushort)code++, (byte)length);
            }

            code <<= 1;
        }

        return codes;
    }

    private static float[] MakeCosines()
    {
        var table = new float[64];
        for (int u = 0; u < 8; u++)
        {
            for (int x = 0; x < 8; x++)
            {
                double scale = u == 0 ? Math.Sqrt(0.125) : 0.5;
                table[(u * 8) + x] = (float)(scale * Math.Cos(((2 * x) + 1) * u * Math.PI / 16));
            }
        }

        return table;
    }

    private struct BitWriter
    {
        private readonly RfbWriter _to;
        private uint _value;
        private int _used;

        public BitWriter(RfbWriter to)
        {
            _to = to;
            _value = 0;
            _used = 0;
        }

        public void Put(int code, int length)
        {
            _value = (_value << length) | (uint)code;
            _used += length;
            while (_used >= 8)
            {
                byte next = (byte)(_value >> (_used - 8));
                _to.Byte(next);
                if (next == 0xFF)
                {
                    _to.Byte(0);
                }

                _used -= 8;
            }
        }

        public void Finish()
        {
            if (_used > 0)
            {
                Put((1 << (8 - _used)) - 1, 8 - _used);
            }
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Globalization;
using Vmm.Backends.Block;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Tests.Block;

/// <summary>
/// A reproducible stream of writes, and the child process that carries it out until it is killed. Step n is a function
/// of the seed and n alone, so that the parent knows what each 4 KiB block may hold afterwards.
/// </summary>
internal static class Torture
{
    public const int BlockBytes = 4096;
    public const int Blocks = 4096;

    /// <summary>First block and count of step n; whether it writes zeroes.</summary>
    public static (int Block, int Count, bool IsZero) Step(int seed, int n)
    {
        ulong x = ((ulong)(uint)seed << 32) ^ ((ulong)(uint)n * 0x9E3779B97F4A7C15);
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
        x ^= x >> 31;
        int block = (int)(x % Blocks);
        int count = (x >> 40) % 8 == 0 ? 1 + (int)((x >> 43) % 40) : 1;
        return (block, Math.Min(count, Blocks - block), (x >> 50) % 10 == 0);
    }

    public static void Fill(Span<byte> data, int seed, int n, int firstBlock)
    {
        for (int i = 0; i < data.Length / BlockBytes; i++)
        {
            Span<byte> block = data.Slice(i * BlockBytes, BlockBytes);
            for (int at = 0; at < BlockBytes; at += 16)
            {
                BinaryPrimitives.WriteInt32LittleEndian(block[at..], n + 1);
                BinaryPrimitives.WriteInt32LittleEndian(block[(at + 4)..], firstBlock + i);
                BinaryPrimitives.WriteInt32LittleEndian(block[(at + 8)..], seed);
                BinaryPrimitives.WriteInt32LittleEndian(block[(at + 12)..], at);
            }
        }
    }

    /// <summary>The step that a block holds (0 for zeroes), or -1 when it is torn or foreign.</summary>
    public static int StepOf(ReadOnlySpan<byte> block, int seed, int index)
    {
        if (!block.ContainsAnyExcept((byte)0))
        {
            return 0;
        }

        int step = BinaryPrimitives.ReadInt32LittleEndian(block);
        for (int at = 0; at < BlockBytes; at += 16)
        {
            if (BinaryPrimitives.ReadInt32LittleEndian(block[at..]) != step
                || BinaryPrimitives.ReadInt32LittleEndian(block[(at + 4)..]) != index
                || BinaryPrimitives.ReadInt32LittleEndian(block[(at + 8)..]) != seed
                || BinaryPrimitives.ReadInt32LittleEndian(block[(at + 12)..]) != at)
            {
                return -1;
            }
        }

        return step;
    }

    /// <summary>Writes until killed; says "F n" after each flush that made steps 0..n-1 stable.</summary>
    public static int Run(string path, int seed, int start)
    {
        using BlockImage image = DiskImage.Open(path, readOnly: false);
        byte[] buffer = new byte[BlockBytes * 64];
        for (int n = start; ; n++)
        {
            (int block, int count, bool isZero) = Step(seed, n);
            BlockStatus status;
            if (isZero)
            {
                status = image.WriteZeroes((long)block * BlockBytes, count * BlockBytes, mayUnmap: true);
            }
            else
            {
                Fill(buffer.AsSpan(0, count * BlockBytes), seed, n, block);
                status = image.Write((long)block * BlockBytes, new IoBuffer(buffer.AsMemory(0, count * BlockBytes)));
            }

            if (status == BlockStatus.Ok && n % 23 == 22)
            {
                status = image.Flush();
                Console.Out.WriteLine(string.Create(CultureInfo.InvariantCulture, $"F {n + 1}"));
                Console.Out.Flush();
            }

            if (status != BlockStatus.Ok)
            {
                Console.Error.WriteLine($"{status}: {image.LastError}");
                return 1;
            }
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Linq;
using FluentAssertions;
using Vmm.Core;
using Xunit;

namespace Vmm.Host.Tests;

public sealed class BlockFileTests : IDisposable
{
    private readonly string _path = Path.Combine(Path.GetTempPath(), $"vmm-blockfile-{Guid.NewGuid():N}");
    private readonly HostMemory _memory = HostMemory.Allocate(1L << 20);

    public void Dispose()
    {
        _memory.Dispose();
        File.Delete(_path);
    }

    [Fact]
    public void WriteThenRead_MoreOddSlicesThanACallTakes_MovesEveryByteInOrder()
    {
        using BlockFile file = BlockFile.Create(_path);
        var slices = new GuestSlice[150];
        int at = 0;
        for (int i = 0; i < slices.Length; i++)
        {
            int length = (i * 37) % 200;
            slices[i] = new GuestSlice(_memory.Address + at, length);
            at += length;
        }

        for (int i = 0; i < at; i++)
        {
            _memory.Write((ulong)i, (byte)((i * 7) + (i >> 8)));
        }

        file.Write(1000, new IoBuffer(slices, slices.Length)).Should().Be(BlockStatus.Ok);
        byte[] onDisk = File.ReadAllBytes(_path)[1000..];
        onDisk.Should().Equal(Enumerable.Range(0, at).Select(i => (byte)((i * 7) + (i >> 8))));

        for (int i = 0; i < slices.Length; i++)
        {
            slices[i] = slices[i] with { HostAddress = slices[i].HostAddress + (512 << 10) };
        }

        file.Read(1000, new IoBuffer(slices, slices.Length)).Should().Be(BlockStatus.Ok);
        Enumerable.Range(0, at).Select(i => _memory.Read<byte>((ulong)(i + (512 << 10)))).Should().Equal(onDisk);
    }

    [Fact]
    public void Read_PastTheEnd_IsZeroes()
    {
        File.WriteAllBytes(_path, Enumerable.Repeat((byte)0xAA, 100).ToArray());
        using BlockFile file = BlockFile.Open(_path, readOnly: true);
        for (int i = 0; i < 128; i++)
        {
            _memory.Write((ulong)i, (byte)0x55);
        }

        GuestSlice[] slices = [new(_memory.Address, 64), new(_memory.Address + 64, 64)];
        file.Read(0, new IoBuffer(slices, 2)).Should().Be(BlockStatus.Ok);
        Enumerable.Range(0, 128).Select(i => _memory.Read<byte>((ulong)i))
            .Should().Equal(Enumerable.Range(0, 128).Select(i => (byte)(i < 100 ? 0xAA : 0)));
    }

    [Fact]
    public void Read_BadAddress_IsAnErrorThatCounts()
    {
        File.WriteAllBytes(_path, new byte[100]);
        using BlockFile file = BlockFile.Open(_path, readOnly: true);
        file.Read(0, new IoBuffer([new GuestSlice(4096, 64)], 1)).Should().Be(BlockStatus.IoError);
        file.IoErrors.Should().Be(1);
        file.LastError.Should().NotBeEmpty();
    }

    [Fact]
    public void TryPunchHole_WrittenRange_ReadsAsZeroesAndKeepsTheLength()
    {
        using BlockFile file = BlockFile.Create(_path);
        byte[] data = new byte[16384];
        Array.Fill(data, (byte)0xAA);
        file.Write(0, data).Should().Be(BlockStatus.Ok);
        bool isPunched = file.TryPunchHole(4096, 4096);
        byte[] now = File.ReadAllBytes(_path);
        now.Length.Should().Be(16384);
        now[4095].Should().Be(0xAA);
        now[4096..8192].Should().OnlyContain(b => b == (isPunched ? 0 : 0xAA));
        now[8192].Should().Be(0xAA);
    }

    [Fact]
    public void Lock_WriterAgainstReaderAndWriter_KeepsThemOutUntilItCloses()
    {
        BlockFile writer = BlockFile.Create(_path);
        writer.Lock();
        using BlockFile reader = BlockFile.Open(_path, readOnly: true);
        using BlockFile second = BlockFile.Open(_path, readOnly: false);
        reader.Invoking(file => file.Lock()).Should().Throw<IOException>().WithMessage($"{_path}: is in use*");
        second.Invoking(file => file.Lock()).Should().Throw<IOException>();
        writer.Dispose();
        reader.Lock();
        second.Invoking(file => file.Lock()).Should().Throw<IOException>("a reader is there");
    }

    [Fact]
    public void Lock_TwoReaders_GetOn()
    {
        File.WriteAllBytes(_path, new byte[100]);
        using BlockFile first = BlockFile.Open(_path, readOnly: true);
        using BlockFile second = BlockFile.Open(_path, readOnly: true);
        first.Lock();
        second.Lock();
    }
}

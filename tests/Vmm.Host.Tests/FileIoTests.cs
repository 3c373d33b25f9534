// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Linq;
using FluentAssertions;
using Microsoft.Win32.SafeHandles;
using Vmm.Core;
using Xunit;

namespace Vmm.Host.Tests;

public sealed class FileIoTests : IDisposable
{
    private readonly string _path = Path.Combine(Path.GetTempPath(), $"vmm-fileio-{Guid.NewGuid():N}");
    private readonly HostMemory _memory = HostMemory.Allocate(1L << 20);

    public void Dispose()
    {
        _memory.Dispose();
        File.Delete(_path);
    }

    [Fact]
    public void WriteThenRead_ManyOddSlices_MovesEveryByteInOrder()
    {
        using SafeFileHandle file = Open();
        var slices = new GuestSlice[50];
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

        FileIo.Write(file, slices, 1000).Should().Be(new IoResult(at, Errno.None));
        byte[] onDisk = File.ReadAllBytes(_path)[1000..];
        onDisk.Should().Equal(Enumerable.Range(0, at).Select(i => (byte)((i * 7) + (i >> 8))));

        for (int i = 0; i < slices.Length; i++)
        {
            slices[i] = slices[i] with { HostAddress = slices[i].HostAddress + (512 << 10) };
        }

        FileIo.Read(file, slices, 1000).Should().Be(new IoResult(at, Errno.None));
        Enumerable.Range(0, at).Select(i => _memory.Read<byte>((ulong)(i + (512 << 10)))).Should().Equal(onDisk);
    }

    [Fact]
    public void Read_PastTheEnd_IsShortWithoutError()
    {
        using SafeFileHandle file = Open();
        File.WriteAllBytes(_path, new byte[100]);
        GuestSlice[] slices = [new(_memory.Address, 64), new(_memory.Address + 64, 64)];
        FileIo.Read(file, slices, 0).Should().Be(new IoResult(100, Errno.None));
    }

    [Fact]
    public void Read_BadAddress_ReportsEfault()
    {
        using SafeFileHandle file = Open();
        File.WriteAllBytes(_path, new byte[100]);
        FileIo.Read(file, [new GuestSlice(4096, 64)], 0).Error.Should().Be(Errno.EFAULT);
    }

    [Fact]
    public void PunchHole_WrittenRange_ReadsAsZeroesAndKeepsTheLength()
    {
        using SafeFileHandle file = Open();
        byte[] data = new byte[16384];
        Array.Fill(data, (byte)0xAA);
        RandomAccess.Write(file, data, 0);
        Errno error = FileIo.PunchHole(file, 4096, 4096);
        if (error == Errno.EOPNOTSUPP)
        {
            return;
        }

        error.Should().Be(Errno.None);
        byte[] now = File.ReadAllBytes(_path);
        now.Length.Should().Be(16384);
        now[4095].Should().Be(0xAA);
        now[4096..8192].Should().OnlyContain(b => b == 0);
        now[8192].Should().Be(0xAA);
    }

    [Fact]
    public void TryLock_SecondOpenFile_IsKeptOutUntilTheFirstCloses()
    {
        SafeFileHandle first = Open();
        using SafeFileHandle second = Open();
        FileIo.TryLock(first, exclusive: true).Should().Be(Errno.None);
        FileIo.TryLock(second, exclusive: true).Should().Be(Errno.EAGAIN);
        FileIo.TryLock(second, exclusive: false).Should().Be(Errno.EAGAIN);
        first.Dispose();
        FileIo.TryLock(second, exclusive: true).Should().Be(Errno.None);
    }

    [Fact]
    public void Synchronize_OpenFile_Succeeds()
    {
        using SafeFileHandle file = Open();
        FileIo.Synchronize(file, dataOnly: true).Should().Be(Errno.None);
        FileIo.Synchronize(file, dataOnly: false).Should().Be(Errno.None);
    }

    [Fact]
    public void ReadStream_EmptyNonBlockingPipe_ReportsEagain()
    {
        using var pipe = new HostPipe();
        FileIo.SetNonBlocking(pipe.Reader, true).Should().Be(Errno.None);
        FileIo.ReadStream(pipe.Reader, new byte[4]).Error.Should().Be(Errno.EAGAIN);
        FileIo.WriteStream(pipe.Writer, "abcd"u8).Bytes.Should().Be(4);
        FileIo.ReadStream(pipe.Reader, new byte[4]).Bytes.Should().Be(4);
    }

    [Fact]
    public void OpenDevice_Missing_SaysWhichAndWhy()
    {
        Action act = () => FileIo.OpenDevice("/dev/no-such-device");
        act.Should().Throw<HostException>()
            .Where(e => e.Error == Errno.ENOENT && e.Message.Contains("/dev/no-such-device"));
    }

    private SafeFileHandle Open() => File.OpenHandle(
        _path, FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.ReadWrite | FileShare.Delete);
}

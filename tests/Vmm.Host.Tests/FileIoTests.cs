// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using FluentAssertions;
using Microsoft.Win32.SafeHandles;
using Xunit;

namespace Vmm.Host.Tests;

public sealed class FileIoTests : IDisposable
{
    private readonly string _path = Path.Combine(Path.GetTempPath(), $"vmm-fileio-{Guid.NewGuid():N}");

    public void Dispose() => File.Delete(_path);

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

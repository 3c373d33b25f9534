// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Diagnostics;
using System.Threading;
using FluentAssertions;
using Microsoft.Win32.SafeHandles;
using Xunit;

namespace Vmm.Host.Tests;

public sealed unsafe class RawTerminalTests : IDisposable
{
    // Linux: unlock and number of a new pseudo-terminal (TIOCSPTLCK, TIOCGPTN).
    private const uint UnlockPty = 0x40045431;
    private const uint GetPtyNumber = 0x80045430;

    private readonly SafeFileHandle _master = FileIo.OpenDevice("/dev/ptmx");
    private readonly SafeFileHandle _slave;
    private readonly string _name;

    public RawTerminalTests()
    {
        int zero = 0;
        int number = -1;
        int master = (int)_master.DangerousGetHandle();
        Ioctl.Invoke(master, UnlockPty, (nint)(&zero)).Should().Be(0);
        Ioctl.Invoke(master, GetPtyNumber, (nint)(&number)).Should().Be(0);
        _name = $"/dev/pts/{number}";
        _slave = FileIo.OpenDevice(_name);
    }

    private int SlaveFd => (int)_slave.DangerousGetHandle();

    public void Dispose()
    {
        _slave.Dispose();
        _master.Dispose();
    }

    [Fact]
    public void Enter_ThenDispose_SetsRawModeAndRestores()
    {
        string before = Settings();
        before.Should().Contain(" icanon").And.Contain(" isig");
        using (RawTerminal raw = RawTerminal.Enter(SlaveFd))
        {
            string during = Settings();
            during.Should().Contain("-icanon").And.Contain("-isig").And.Contain("-echo ").And.Contain("-ixon")
                .And.Contain("min = 1");
            raw.IsWatched.Should().BeTrue();
        }

        Settings().Should().Be(before);
    }

    [Fact]
    public void Enter_NotATerminal_Throws()
    {
        using var pipe = new HostPipe();
        int fd = (int)pipe.Reader.DangerousGetHandle();
        Action act = () => RawTerminal.Enter(fd);
        act.Should().Throw<HostException>();
        RawTerminal.IsTerminal(fd).Should().BeFalse();
        RawTerminal.IsTerminal(SlaveFd).Should().BeTrue();
    }

    [Fact]
    public void Watcher_OwnerVanishes_RestoresTheTerminal()
    {
        string before = Settings();
        RawTerminal raw = RawTerminal.Enter(SlaveFd);
        Settings().Should().Contain("-icanon");
        raw.LoseControlForTest();
        var patience = Stopwatch.StartNew();
        while (!string.Equals(Settings(), before, StringComparison.Ordinal) && patience.Elapsed < TimeSpan.FromSeconds(10))
        {
            Thread.Yield();
        }

        Settings().Should().Be(before);
    }

    private string Settings()
    {
        using var stty = Process.Start(new ProcessStartInfo("stty", ["-F", _name, "-a"])
        {
            RedirectStandardOutput = true,
            UseShellExecute = false,
        })!;
        string text = stty.StandardOutput.ReadToEnd();
        stty.WaitForExit();
        return text.ReplaceLineEndings(" ");
    }
}

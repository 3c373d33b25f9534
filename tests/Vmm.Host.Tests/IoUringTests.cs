// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using FluentAssertions;
using Xunit;

namespace Vmm.Host.Tests;

public sealed class IoUringTests
{
    // A restriction that does not hold would be a way around the sandbox.
    [IoUringFact]
    public void Ring_RefusesOperationsThatItWasNotMadeFor()
    {
        using IoUring ring = IoUring.TryOpen(4)!;
        string path = Path.GetTempFileName();
        using var file = File.OpenHandle(path, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite);
        var completions = new RingCompletion[4];
        const RingOperation OpenAt = (RingOperation)18;
        ring.TrySubmit(OpenAt, file, 0, default, 0, 7).Should().BeTrue();
        ring.Wait(completions).Should().Be(1);
        completions[0].Should().Be(new RingCompletion(7, -13), "EACCES");

        ring.TrySubmit(RingOperation.Sync, file, 0, default, 0, 8).Should().BeTrue();
        ring.Wait(completions).Should().Be(1);
        completions[0].Should().Be(new RingCompletion(8, 0));
        File.Delete(path);
    }

    [AttributeUsage(AttributeTargets.Method)]
    private sealed class IoUringFactAttribute : FactAttribute
    {
        public IoUringFactAttribute()
        {
            using IoUring? ring = IoUring.TryOpen(4);
            Skip = ring is null ? "this kernel has no io_uring, and disks have threads" : null;
        }
    }
}

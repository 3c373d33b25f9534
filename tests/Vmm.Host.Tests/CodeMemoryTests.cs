// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Linq;
using FluentAssertions;
using Xunit;

namespace Vmm.Host.Tests;

public sealed unsafe class CodeMemoryTests
{
    [Fact]
    public void Code_WrittenThroughTheWriteAlias_RunsAtTheExecuteAlias()
    {
        using CodeMemory? memory = CodeMemory.TryCreate(64 * 1024, out string? reason);
        reason.Should().BeNull();
        byte[] code = [0x8D, 0x47, 0x2A, 0xC3]; // lea eax, [rdi+42]; ret
        const int At = 0x5000;
        code.CopyTo(new Span<byte>((void*)(memory!.WriteAddress + At), code.Length));

        var entry = (delegate* unmanaged<int, int>)(memory.ExecuteAddress + At);

        entry(58).Should().Be(100);
    }

    [Fact]
    public void Aliases_AsTheKernelListsThem_AreNeverWritableAndExecutable()
    {
        using CodeMemory? memory = CodeMemory.TryCreate(64 * 1024, out _);
        string write = memory!.WriteAddress.ToString("x");
        string execute = memory.ExecuteAddress.ToString("x");

        string[] maps = File.ReadAllLines("/proc/self/maps");

        maps.Single(line => line.StartsWith(write, StringComparison.Ordinal)).Should().Contain(" rw-s ");
        maps.Single(line => line.StartsWith(execute, StringComparison.Ordinal)).Should().Contain(" r-xs ");
    }

    [Fact]
    public void Dispose_CalledTwice_UnmapsOnce()
    {
        CodeMemory? memory = CodeMemory.TryCreate(4096, out _);
        memory!.Dispose();
        memory.Dispose();

        memory.ExecuteAddress.Should().Be(0);
    }
}

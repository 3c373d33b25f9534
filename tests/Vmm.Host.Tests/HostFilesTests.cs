// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using FluentAssertions;
using Xunit;

namespace Vmm.Host.Tests;

/// <summary>Owners of files.</summary>
public sealed class HostFilesTests : IDisposable
{
    private const uint Somebody = 54321;

    // Below /tmp, which everybody may write to.
    private readonly string _directory = Directory.CreateTempSubdirectory("owner-").FullName;

    public void Dispose() => Directory.Delete(_directory, recursive: true);

    [RootFact]
    public void DirectoryOfAnotherUser_BelowOneForEverybody_IsForeign()
    {
        HostFiles.Give(_directory, Somebody, Somebody, 0x1C0);
        string deep = Path.Combine(_directory, "run", "a");

        HostFiles.FindForeign(deep, Somebody + 1).Should().Be(_directory);
        HostFiles.FindForeign(deep, Somebody).Should().BeNull();
        HostFiles.FindForeign(deep).Should().BeNull("root may work in it");
    }

    [Fact]
    public void DirectoryOfRootOrOneself_IsNotForeign()
    {
        HostFiles.FindForeign(Path.Combine(_directory, "run")).Should().BeNull();
        HostFiles.FindForeign("/usr/lib", Somebody).Should().BeNull();
        HostFiles.FindForeign("/", Somebody).Should().BeNull();
    }

    // What is private already may belong to whom it likes.
    [Fact]
    public void DirectoryOfAnotherUser_BelowAPrivateOne_IsNotForeign()
    {
        string inner = Path.Combine(_directory, "inner");
        Directory.CreateDirectory(inner);
        if (HostProcess.IsRoot)
        {
            HostFiles.Give(inner, Somebody, Somebody, 0x1C0);
        }

        string? found = HostFiles.FindForeign(inner, Somebody + 1);

        found.Should().Be(HostProcess.IsRoot ? null : _directory);
    }

    [AttributeUsage(AttributeTargets.Method)]
    private sealed class RootFactAttribute : FactAttribute
    {
        public RootFactAttribute() => Skip = HostProcess.IsRoot ? null : "only root can give a directory to another user";
    }
}

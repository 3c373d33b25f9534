// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Linq;
using FluentAssertions;
using Xunit;

namespace Vmm.Config.Tests;

/// <summary>What a definition names on this host, with the line of the definition that names it.</summary>
public sealed class HostCheckTests : IDisposable
{
    private readonly string _directory = Directory.CreateTempSubdirectory("check-").FullName;

    public HostCheckTests()
    {
        File.WriteAllText(Path.Combine(_directory, "kernel"), "kernel");
        Directory.CreateDirectory(Path.Combine(_directory, "folder"));
    }

    public void Dispose() => Directory.Delete(_directory, recursive: true);

    [Theory]
    [InlineData("serial: [\"file:log\", \"unix:socket\"]")]
    [InlineData("disks: [{path: folder/new.qcow2, size: 1G}]")]
    [InlineData("display: {vga: std, vnc: \"unix:folder/vnc\"}")]
    public void Place_ThatIsThere_IsFine(string line) => Errors(line).Should().BeEmpty();

    [Theory]
    [InlineData("serial: [none, \"file:nowhere/log\"]", "3:16", "nowhere/log: there is no directory ")]
    [InlineData("serial: [\"unix:nowhere/socket\"]", "3:10", "nowhere/socket: there is no directory ")]
    [InlineData("serial: [\"file:folder\"]", "3:10", "folder: is a directory, not a file")]
    [InlineData("disks: [{path: nowhere/new.qcow2, size: 1G}]", "3:16", "nowhere/new.qcow2: there is no directory ")]
    [InlineData("disks: [{path: new.qcow2}]", "3:16", "new.qcow2: no such file (give a \"size\" and it is made)")]
    [InlineData("nics: [{backend: \"socket:nowhere/net\"}]", "3:18", "nowhere/net: there is no directory ")]
    [InlineData("display: {vga: std, vnc: \"unix:nowhere/vnc\"}", "3:26", "nowhere/vnc: there is no directory ")]
    [InlineData("shares: [{path: nowhere, tag: t}]", "3:17", "nowhere: no such directory")]
    public void Place_ThatIsNotThere_IsNamedWithItsLine(string line, string position, string message) =>
        Errors(line).Should().ContainSingle().Which.Should().StartWith($"a.yaml:{position}: ").And.Contain(message);

    [Theory]
    [InlineData("seabio", "seabios")]
    [InlineData("bios", "seabios")]
    [InlineData("OVMF", "uefi")]
    public void Firmware_ByAnotherWord_IsSuggested(string word, string meant)
    {
        MachineSpec spec = ConfigFiles.Parse($"name: a\nboot: {{firmware: {word}}}\n", "a.yaml", _directory).Machines[0];

        HostCheck.Check(spec).Should().ContainSingle().Which.ToString().Should()
            .EndWith($"{word}: no such file; did you mean \"{meant}\"?");
    }

    [Fact]
    public void BootModules_MissingOrTooLarge_AreNamedWithTheirLine()
    {
        using (FileStream large = File.Create(Path.Combine(_directory, "large")))
        {
            large.SetLength(5L << 30);
        }

        const string Definition = """
            name: a
            memory: 4G
            boot:
              kernel: kernel
              modules:
                - kernel
                - {path: nowhere}
                - large
            """;
        MachineSpec spec = ConfigFiles.Parse(Definition, "a.yaml", _directory).Machines[0];

        HostCheck.Check(spec).Select(error => error.ToString()).Should().Equal(
            $"a.yaml:7:14: {_directory}/nowhere: no such file",
            "a.yaml:6:5: kernel and modules take 5121 MiB; \"memory\" is 4G");
    }

    private string[] Errors(string line)
    {
        string definition = $"name: a\nboot: {{kernel: kernel}}\n{line}\n";
        MachineSpec spec = ConfigFiles.Parse(definition, "a.yaml", _directory).Machines[0];
        return [.. HostCheck.Check(spec).Select(error => error.ToString())];
    }
}

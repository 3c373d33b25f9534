// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Linq;
using System.Text.Json;
using FluentAssertions;
using Xunit;

namespace Vmctl.Tests;

/// <summary>The program as its users meet it: words in, status and one line out.</summary>
public sealed class CommandLineTests
{
    [Fact]
    public void NoWords_AreAUsageErrorOfOneLine()
    {
        Outcome outcome = VmctlProcess.Run();

        outcome.Should().Be(new Outcome(64, string.Empty, "vmctl: no command given; \"vmctl help\" lists them\n"));
    }

    [Theory]
    [InlineData("vmctl: no command \"vesion\"; did you mean \"version\"? (\"vmctl help\" lists them)", "vesion")]
    [InlineData("vmctl: \"v\" could be validate, version", "v")]
    [InlineData("vmctl: version: \"x\" is one argument too many (see \"vmctl help version\")", "version", "x")]
    [InlineData("vmctl: version: no option --outpt; did you mean \"--output\"? (see \"vmctl help version\")", "version", "--outpt")]
    [InlineData("vmctl: version: --output is table, json or yaml, not \"jsn\"; did you mean \"json\"? (see \"vmctl help version\")", "version", "-o", "jsn")]
    public void WrongWords_AreAnsweredInOneLine(string line, params string[] arguments)
    {
        VmctlProcess.Run(arguments).Should().Be(new Outcome(64, string.Empty, line + "\n"));
    }

    [Fact]
    public void Verb_CutToAUniquePrefix_IsUnderstood()
    {
        VmctlProcess.Run("vers").Should().Be(VmctlProcess.Run("version"));
    }

    [Fact]
    public void Version_InJson_HasItsFields()
    {
        Outcome outcome = VmctlProcess.Run("version", "-o", "json");

        using JsonDocument json = JsonDocument.Parse(outcome.Output);
        json.RootElement[0].GetProperty("definition").GetInt32().Should().Be(1);
        VmctlProcess.Run("--version").Output.Should().Be("vmctl " + json.RootElement[0].GetProperty("version").GetString() + "\n");
    }

    [Fact]
    public void Help_ListsEveryVerb_AndEachVerbHasHelp()
    {
        string help = VmctlProcess.Run("help").Output;
        var verbs = help[help.IndexOf("Commands:", StringComparison.Ordinal)..].Split('\n').Skip(1)
            .Where(line => line.StartsWith("  ", StringComparison.Ordinal) && line[2] != ' ')
            .Select(line => line.Trim().Split(' ', ',')[0]).ToList();

        verbs.Should().Contain(["validate", "version"]);
        foreach (string verb in verbs)
        {
            Outcome outcome = VmctlProcess.Run("help", verb);
            outcome.Status.Should().Be(0, "help {0}", verb);
            outcome.Output.Should().Contain("Usage:");
            outcome.Error.Should().BeEmpty();
        }
    }
}

public sealed class ValidateTests
{
    [Fact]
    public void Sample_IsValidAsText()
    {
        VmctlProcess.Run("validate", "--text-only", VmctlProcess.Root + "/config/sample.yaml")
            .Should().Be(new Outcome(0, "4 VMs, no errors\n", string.Empty));
    }

    [Fact]
    public void Errors_AreAllShownWithTheirPlaces()
    {
        using var directory = new TempDirectory();
        string file = directory.Write("a.yaml", "name: a\nmemry: 1G\ncpus: 5000\nboot: {kernel: none-here}\n");

        VmctlProcess.Run("validate", file).Should().Be(new Outcome(
            78,
            string.Empty,
            $"{file}:3:7: \"cpus\" is 5000; it must be 1 to 64\n{file}:2:1: unknown key \"memry\"; did you mean \"memory\"?\n"));
    }

    [Fact]
    public void Errors_InJson_CarryLineAndColumn()
    {
        using var directory = new TempDirectory();
        string file = directory.Write("a.yaml", "name: a\ncpus: 0\n");
        Outcome outcome = VmctlProcess.Run("validate", "-o", "json", file);

        outcome.Status.Should().Be(78);
        using JsonDocument json = JsonDocument.Parse(outcome.Output);
        json.RootElement[0].GetProperty("line").GetInt32().Should().Be(2);
        json.RootElement[0].GetProperty("column").GetInt32().Should().Be(7);
        json.RootElement[0].GetProperty("message").GetString().Should().Be("\"cpus\" is 0; it must be 1 to 64");
    }

    public static TheoryData<string, int, string> BadInputs { get; } = new()
    {
        { "boot: {kernel: absent}", 78, "/absent: no such file" },
        { "boot: {kernel: directory}", 78, "/directory: is a directory, not a file" },
        { "boot: {kernel: big, initrd: big}\nmemory: 1M", 78, "kernel and initrd take 2 MiB; \"memory\" is 1M" },
        { "memory: 0", 78, "\"memory\" is 0; it must be 1M to 4T" },
        { "memory: 3", 78, "\"memory\" is 3; it must be 1M to 4T" },
        { "memory: 1P", 78, "\"memory\" is 1P; it must be 1M to 4T" },
        { "cpus: 0", 78, "\"cpus\" is 0; it must be 1 to 64" },
        { "cpus: 5000", 78, "\"cpus\" is 5000; it must be 1 to 64" },
        { "zzz: 1", 78, "unknown key \"zzz\"" },
        { "rng: true\nrng: true", 78, "key \"rng\" is given twice; first on line 2" },
        { "disks: [absent.img]", 78, "/absent.img: no such file (give a \"size\" and it is made)" },
        { "a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
            + "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e]", 78,
            "more than 200000 values once aliases are counted in" },
    };

    [Theory]
    [MemberData(nameof(BadInputs))]
    public void BadInput_GetsOneLineAndLeavesNothingBehind(string text, int status, string message)
    {
        using var directory = new TempDirectory();
        directory.Write("directory/file", "x");
        directory.Write("big", new string('x', 1 << 20));
        string file = directory.Write("a.yaml", "name: a\n" + text + "\n");
        List<string> before = Files(directory);

        Outcome outcome = VmctlProcess.Run("validate", file);

        outcome.Status.Should().Be(status);
        outcome.Output.Should().BeEmpty();
        outcome.Error.Should().Contain(message).And.StartWith(file + ":");
        outcome.Error.Count(c => c == '\n').Should().Be(1);
        Files(directory).Should().Equal(before);
    }

    [Theory]
    [InlineData("/nonexistent.yaml", "no such file or directory")]
    [InlineData("/dev/zero", "is larger than 4 MiB")]
    public void FileOfDefinitions_ThatCannotBeRead_IsSaid(string path, string message)
    {
        Outcome outcome = VmctlProcess.Run("validate", path);

        outcome.Status.Should().BeOneOf(66, 78);
        outcome.Error.Should().Be($"{path}: {message}\n");
    }

    private static List<string> Files(TempDirectory directory) =>
        [.. System.IO.Directory.EnumerateFiles(directory.Path, "*", System.IO.SearchOption.AllDirectories).Order(StringComparer.Ordinal)];
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text.Json;
using System.Xml.Linq;
using FluentAssertions;
using Xunit;

namespace Vmm.House.Tests;

/// <summary>Which assembly may see which, and where pointers are allowed. The plan of the house, as a table.</summary>
public sealed class ArrowTests
{
    // Room -> rooms that it refers to. Exactly these: a missing arrow is as much news as a new one.
    private static readonly Dictionary<string, string[]> s_arrows = new(StringComparer.Ordinal)
    {
        ["Vmm.Core"] = [],
        ["Vmm.Memory"] = ["Vmm.Core"],
        ["Vmm.X86"] = ["Vmm.Core", "Vmm.Memory"],
        ["Vmm.Devices"] = ["Vmm.Core", "Vmm.Memory"],
        ["Vmm.Config"] = ["Vmm.Core"],
        ["Vmm.Host"] = ["Vmm.Core"],
        ["Vmm.Kvm"] = ["Vmm.Core", "Vmm.Host", "Vmm.Memory"],
        ["Vmm.Backends"] = ["Vmm.Core", "Vmm.Host", "Vmm.Memory"],
        ["Vmm.Machine"] =
        [
            "Vmm.Backends", "Vmm.Config", "Vmm.Core", "Vmm.Devices", "Vmm.Host", "Vmm.Kvm", "Vmm.Memory", "Vmm.X86",
        ],
        ["Vmm.Fleet"] = ["Vmm.Config", "Vmm.Core", "Vmm.Host"],
        ["Vmctl"] = ["Vmm.Fleet", "Vmm.Machine"],
    };

    private static readonly string[] s_unsafe = ["Vmm.Host", "Vmm.Kvm", "Vmm.Memory", "Vmm.X86"];

    public static TheoryData<string> SourceProjects { get; } = new(Projects("src/"));

    [Fact]
    public void Rooms_AreThoseOfThePlan()
    {
        Projects("src/").Select(Name).Should().BeEquivalentTo(s_arrows.Keys);
    }

    [Theory]
    [MemberData(nameof(SourceProjects))]
    public void Room_RefersExactlyToWhatThePlanSays(string project)
    {
        References(project).Select(Path.GetFileNameWithoutExtension).Should().BeEquivalentTo(s_arrows[Name(project)]);
    }

    [Theory]
    [MemberData(nameof(SourceProjects))]
    public void Room_AllowsPointersOnlyWhereThePlanDoes(string project)
    {
        AllowsUnsafe(project).Should().Be(s_unsafe.Contains(Name(project), StringComparer.Ordinal));
    }

    [Fact]
    public void Arrows_FormNoCircle()
    {
        var done = new HashSet<string>(StringComparer.Ordinal);
        while (done.Count < s_arrows.Count)
        {
            List<string> next = s_arrows.Keys.Where(room => !done.Contains(room) && Array.TrueForAll(s_arrows[room], done.Contains)).ToList();
            next.Should().NotBeEmpty("{0} wait for each other", string.Join(", ", s_arrows.Keys.Except(done, StringComparer.Ordinal)));
            done.UnionWith(next);
        }
    }

    [Fact]
    public void TestProjects_AllowPointersOnlyBesideRoomsThatDo()
    {
        IEnumerable<string> offenders = Projects("tests/").Where(AllowsUnsafe)
            .Where(project => !s_unsafe.Contains(Name(project).Replace(".Tests", string.Empty, StringComparison.Ordinal), StringComparer.Ordinal));

        offenders.Should().BeEmpty();
    }

    [Fact]
    public void Solution_HoldsEveryProject()
    {
        string solution = Repository.Read("Vmm.sln").Replace('\\', '/');

        Projects(string.Empty).Where(project => !solution.Contains($"\"{project}\"", StringComparison.Ordinal)).Should().BeEmpty();
    }

    [Fact]
    public void SourceProjects_DoNotReferToTests()
    {
        Projects("src/").SelectMany(References).Where(path => path.Contains("tests", StringComparison.Ordinal)).Should().BeEmpty();
    }

    [Fact]
    public void Packages_CarryNoVersionOfTheirOwn()
    {
        IEnumerable<string> offenders = Projects(string.Empty)
            .Where(project => Load(project).Descendants("PackageReference").Any(reference => reference.Attribute("Version") is not null));

        offenders.Should().BeEmpty("versions stand in Directory.Packages.props");
    }

    [Fact]
    public void LockFiles_HoldTheCentralVersions()
    {
        var central = XDocument.Load(Repository.Full("src/Directory.Packages.props")).Descendants("PackageVersion").ToDictionary(
            version => (string)version.Attribute("Include")!, version => (string)version.Attribute("Version")!, StringComparer.Ordinal);
        foreach (string project in Projects(string.Empty))
        {
            string path = Path.GetDirectoryName(project) + "/packages.lock.json";
            using JsonDocument file = JsonDocument.Parse(Repository.Read(path));
            JsonElement packages = file.RootElement.GetProperty("dependencies").GetProperty("net10.0");
            foreach (string package in Load(project).Descendants("PackageReference").Select(reference => (string)reference.Attribute("Include")!))
            {
                packages.TryGetProperty(package, out JsonElement locked).Should().BeTrue("{0} has no {1}; run dotnet restore", path, package);
                locked.GetProperty("resolved").GetString().Should().Be(central[package], "{0} in {1}", package, path);
            }
        }
    }

    private static IEnumerable<string> Projects(string under) => Repository.Files.Where(file =>
        file.EndsWith(".csproj", StringComparison.Ordinal) && file.StartsWith(under, StringComparison.Ordinal));

    private static string Name(string project) => Path.GetFileNameWithoutExtension(project);

    private static XDocument Load(string project) => XDocument.Load(Repository.Full(project));

    private static IEnumerable<string> References(string project) =>
        Load(project).Descendants("ProjectReference").Select(reference => (string)reference.Attribute("Include")!);

    private static bool AllowsUnsafe(string project) =>
        Load(project).Descendants("AllowUnsafeBlocks").Any(flag => bool.Parse(flag.Value));
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text.Json;
using FluentAssertions;
using Xunit;

namespace Vmm.Config.Tests;

/// <summary>Parser, schema and sample know the same keys: three descriptions of one language.</summary>
public sealed class AgreementTests
{
    private static readonly string s_config = Path.Combine(FindRoot(), "config");

    [Fact]
    public void Sample_IsADefinitionWithoutErrors()
    {
        FleetSpec fleet = ConfigFiles.LoadFile(Path.Combine(s_config, "sample.yaml"));

        fleet.Machines.Select(m => m.Name).Should().Equal("web1", "db1", "old", "hurd");
        fleet.StartParallel.Should().Be(2);
        fleet.StartDelay.Should().Be(TimeSpan.FromMilliseconds(500));
        fleet.Machines[1].MemoryBytes.Should().Be(64L << 20);
    }

    [Fact]
    public void Schema_And_Parser_KnowTheSameKeys()
    {
        SchemaKeys().Should().BeEquivalentTo(ParserKeys());
    }

    [Fact]
    public void Sample_ShowsEveryKey()
    {
        string text = File.ReadAllText(Path.Combine(s_config, "sample.yaml"));
        IEnumerable<string> missing = ParserKeys()
            .Select(key => key[(key.LastIndexOfAny(['.', ':']) + 1)..])
            .Where(key => !text.Contains(key + ":", StringComparison.Ordinal));

        missing.Should().BeEmpty();
    }

    [Fact]
    public void Schema_WordLists_AreAcceptedByTheParser()
    {
        using JsonDocument schema = JsonDocument.Parse(File.ReadAllText(Path.Combine(s_config, "vmm.schema.json")));
        JsonElement machine = schema.RootElement.GetProperty("$defs").GetProperty("machine").GetProperty("properties");
        int tried = 0;
        foreach (string key in new[] { "irqchip", "watchdog" })
        {
            foreach (JsonElement word in machine.GetProperty(key).GetProperty("enum").EnumerateArray())
            {
                ConfigFiles.Parse($"name: a\n{key}: {word.GetString()}", "t", "/");
                tried++;
            }
        }

        foreach (JsonElement word in Enum(machine, "disks", "bus"))
        {
            ConfigFiles.Parse($"name: a\ndisks: [{{path: x, bus: {word.GetString()}}}]", "t", "/");
            tried++;
        }

        tried.Should().Be(4 + 4 + 7);
    }

    internal static string FindRoot()
    {
        string? at = AppContext.BaseDirectory;
        while (at is not null && !File.Exists(Path.Combine(at, "Vmm.sln")))
        {
            at = Path.GetDirectoryName(at);
        }

        return at ?? throw new InvalidOperationException("not inside the repository");
    }

    private static JsonElement.ArrayEnumerator Enum(JsonElement machine, string list, string key)
    {
        JsonElement item = machine.GetProperty(list).GetProperty("oneOf")[0].GetProperty("oneOf")[1];
        return item.GetProperty("properties").GetProperty(key).GetProperty("enum").EnumerateArray();
    }

    private static SortedSet<string> ParserKeys()
    {
        var keys = new SortedSet<string>(StringComparer.Ordinal);
        ConfigFiles.ParseUnchecked(File.ReadAllText(Path.Combine(s_config, "sample.yaml")), "sample.yaml", "/", keys);
        return keys;
    }

    private static SortedSet<string> SchemaKeys()
    {
        using JsonDocument schema = JsonDocument.Parse(File.ReadAllText(Path.Combine(s_config, "vmm.schema.json")));
        var keys = new SortedSet<string>(StringComparer.Ordinal);
        JsonElement definitions = schema.RootElement.GetProperty("$defs");
        Walk(definitions, definitions.GetProperty("machine"), string.Empty, keys);
        Walk(definitions, definitions.GetProperty("fleet"), "fleet:", keys);
        return keys;
    }

    // Follows properties, alternatives, items and references; "disks" as a list gives disks[].path.
    private static void Walk(JsonElement definitions, JsonElement node, string path, SortedSet<string> keys)
    {
        const string Definitions = "#/$defs/";
        if (node.TryGetProperty("$ref", out JsonElement reference) && reference.GetString() is { } name && name != Definitions + "machine")
        {
            Walk(definitions, definitions.GetProperty(name[Definitions.Length..]), path, keys);
        }

        if (node.TryGetProperty("oneOf", out JsonElement alternatives))
        {
            foreach (JsonElement alternative in alternatives.EnumerateArray())
            {
                Walk(definitions, alternative, path, keys);
            }
        }

        if (node.TryGetProperty("items", out JsonElement items))
        {
            Walk(definitions, items, path + "[]", keys);
        }

        if (!node.TryGetProperty("properties", out JsonElement properties))
        {
            return;
        }

        // A list may also be given as its only item; its keys are the list's.
        bool isLoneItem = path is "disks" or "nics" or "console" or "shares" or "boot.modules";
        if (isLoneItem)
        {
            return;
        }

        foreach (JsonProperty property in properties.EnumerateObject())
        {
            string key = path.Length == 0 || path[^1] == ':' ? path + property.Name : path + "." + property.Name;
            keys.Add(key);
            Walk(definitions, property.Value, key, keys);
        }
    }
}

public sealed class SpecWriterTests
{
    [Fact]
    public void Sample_WrittenAndReadBack_MeansTheSame()
    {
        string path = Path.Combine(AgreementTests.FindRoot(), "config", "sample.yaml");
        foreach (MachineSpec spec in ConfigFiles.LoadFile(path).Machines)
        {
            string text = SpecWriter.Write(spec);
            MachineSpec again = ConfigFiles.ParseUnchecked(text, "again.yaml", "/elsewhere", null).Machines[0];

            again.Should().BeEquivalentTo(spec, options => options.Excluding(s => s.Source), text);
            SpecWriter.Write(again).Should().Be(text);
        }
    }

    [Fact]
    public void Definitions_ThatDifferInOneValue_AreNotTheSame()
    {
        MachineSpec a = ConfigFiles.Parse("name: a\nmemory: 64M", "t", "/").Machines[0];
        MachineSpec b = ConfigFiles.Parse("memory: 67108864\nname: a", "t", "/").Machines[0];
        MachineSpec c = ConfigFiles.Parse("name: a\nmemory: 65M", "t", "/").Machines[0];

        SpecWriter.AreSame(a, b).Should().BeTrue();
        SpecWriter.AreSame(a, c).Should().BeFalse();
    }

    [Theory]
    [InlineData("plain-word")]
    [InlineData("")]
    [InlineData("true")]
    [InlineData("12")]
    [InlineData(" lead")]
    [InlineData("a: b")]
    [InlineData("a #b")]
    [InlineData("- a")]
    [InlineData("quote\" back\\ \t\n \u0085 \u2028 é ~")]
    [InlineData("[x]")]
    [InlineData("*x")]
    public void Text_QuotedForYaml_ReadsBack(string text)
    {
        YamlTree.Load("k: " + SpecWriter.Quote(text), "t")[0].Entries[0].Value.Text.Should().Be(text);
    }
}

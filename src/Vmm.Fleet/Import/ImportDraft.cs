// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Text;
using Vmm.Config;

namespace Vmm.Fleet.Import;

/// <summary>A definition in the making.</summary>
internal sealed class ImportDraft
{
    private readonly Dictionary<string, string> _lines = new(StringComparer.Ordinal);
    private readonly Dictionary<string, List<string>> _items = new(StringComparer.Ordinal);
    private readonly List<string> _display = [];
    private readonly List<string> _lost = [];

    internal ImportDraft(string name)
    {
        Name = name;
    }

    internal string Name { get; set; }

    internal static string? Take(Dictionary<string, string> keys, string key) => keys.Remove(key, out string? value) ? value : null;

    // A key given twice counts once, the last time.
    internal void Line(string line) => _lines[line[..line.IndexOf(':', StringComparison.Ordinal)]] = line;

    internal void Text(string key, string? value)
    {
        if (value is not null)
        {
            Line($"{key}: {SpecWriter.Quote(value)}");
        }
    }

    internal void Size(string key, string? value)
    {
        if (value is not null)
        {
            Line($"{key}: {value.Trim()}");
        }
    }

    internal void Cpus(string? count, string? sockets, string? threads)
    {
        if (sockets is not null || threads is not null)
        {
            Line($"cpus: {{count: {count ?? "1"}, sockets: {sockets ?? "1"}, threads: {threads ?? "1"}}}");
        }
        else if (count is not null)
        {
            Line("cpus: " + count);
        }
    }

    internal void Display(string member)
    {
        string key = member[..member.IndexOf(':', StringComparison.Ordinal)];
        _display.RemoveAll(other => other.StartsWith(key + ":", StringComparison.Ordinal));
        _display.Add(member);
    }

    internal void Item(string list, string members)
    {
        if (!_items.TryGetValue(list, out List<string>? items))
        {
            _items[list] = items = [];
        }

        items.Add(members);
    }

    internal void Lose(string what)
    {
        if (!_lost.Contains(what))
        {
            _lost.Add(what);
        }
    }

    internal ImportedVm Finish(Dictionary<string, string>? unused)
    {
        foreach (string key in unused?.Keys ?? (IEnumerable<string>)[])
        {
            Lose($"{key}: not known here");
        }

        var name = new StringBuilder();
        foreach (char c in Name)
        {
            name.Append(char.IsAsciiLetterOrDigit(c) || c is '.' or '-' or '_' ? c : '-');
        }

        string clean = name.ToString().TrimStart('.', '-', '_');
        clean = clean.Length == 0 ? "vm" : clean.Length > 64 ? clean[..64] : clean;
        var yaml = new StringBuilder();
        yaml.Append("name: ").Append(SpecWriter.Quote(clean)).Append('\n');
        foreach (string line in _lines.Values)
        {
            yaml.Append(line).Append('\n');
        }

        if (_display.Count > 0)
        {
            yaml.Append("display: {").Append(string.Join(", ", _display)).Append("}\n");
        }

        foreach ((string list, List<string> items) in _items)
        {
            yaml.Append(list).Append(":\n");
            foreach (string item in items)
            {
                yaml.Append("  - {").Append(item).Append("}\n");
            }
        }

        return new ImportedVm(clean, yaml.ToString(), _lost);
    }
}

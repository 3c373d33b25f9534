// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using Vmm.Core;

namespace Vmm.Machine;

/// <summary>A row of config/cpu-models.txt: which feature bits a guest may see.</summary>
internal sealed class CpuModelRow
{
    private readonly Dictionary<(uint Function, uint Index, string Register), uint> _masks;

    internal CpuModelRow(string name, bool isOpen, Dictionary<(uint Function, uint Index, string Register), uint> masks)
    {
        Name = name;
        IsOpen = isOpen;
        _masks = masks;
    }

    /// <summary>As in YAML's <c>model:</c>.</summary>
    public string Name { get; }

    /// <summary>"host" and "max": nothing is masked.</summary>
    public bool IsOpen { get; }

    /// <summary>Masks a leaf. Feature words that the row does not name are hidden unless the row is open.</summary>
    public CpuidEntry Apply(CpuidEntry entry)
    {
        if (IsOpen || !IsFeatureLeaf(entry))
        {
            return entry;
        }

        bool keepEax = !(entry.Function == 7 && entry.Index == 1) && !(entry.Function == 0xD && entry.Index == 1);
        return entry with
        {
            Eax = keepEax ? entry.Eax : entry.Eax & Mask(entry, "eax"),
            Ebx = entry.Function == 1 ? entry.Ebx : entry.Ebx & Mask(entry, "ebx"),
            Ecx = entry.Ecx & Mask(entry, "ecx"),
            Edx = entry.Edx & Mask(entry, "edx"),
        };
    }

    private static bool IsFeatureLeaf(CpuidEntry entry) =>
        entry.Function is 1 or 7 or 0x80000001 || (entry.Function == 0xD && entry.Index == 1);

    private uint Mask(CpuidEntry entry, string register) =>
        _masks.GetValueOrDefault((entry.Function, entry.Index, register));
}

/// <summary>
/// The processor models that a definition can name. The table is config/cpu-models.txt, built into the program: lines of
/// <c>model NAME [: BASE]</c> followed by <c>LEAF[.INDEX] REGISTER MASK</c>; a row starts with the masks of its base.
/// </summary>
internal static class CpuModelTable
{
    private static readonly Lazy<IReadOnlyDictionary<string, CpuModelRow>> s_rows = new(Load);

    /// <summary>All models.</summary>
    public static IReadOnlyDictionary<string, CpuModelRow> Rows => s_rows.Value;

    /// <summary>Parses the table.</summary>
    internal static IReadOnlyDictionary<string, CpuModelRow> Parse(TextReader reader)
    {
        var masks = new Dictionary<string, Dictionary<(uint Function, uint Index, string Register), uint>>(StringComparer.Ordinal);
        string current = string.Empty;
        while (reader.ReadLine() is { } raw)
        {
            string[] words = raw.Split('#')[0].Split((char[]?)null, StringSplitOptions.RemoveEmptyEntries);
            if (words.Length == 0)
            {
                continue;
            }

            if (string.Equals(words[0], "model", StringComparison.Ordinal))
            {
                current = words[1];
                masks[current] = words.Length == 4 ? new(masks[words[3]]) : [];
                continue;
            }

            string[] leaf = words[0].Split('.');
            uint function = uint.Parse(leaf[0], NumberStyles.HexNumber, CultureInfo.InvariantCulture);
            uint index = leaf.Length > 1 ? uint.Parse(leaf[1], NumberStyles.HexNumber, CultureInfo.InvariantCulture) : 0;
            masks[current][(function, index, words[1])] =
                uint.Parse(words[2], NumberStyles.HexNumber, CultureInfo.InvariantCulture);
        }

        var rows = new Dictionary<string, CpuModelRow>(StringComparer.Ordinal)
        {
            ["host"] = new CpuModelRow("host", true, []),
            ["max"] = new CpuModelRow("max", true, []),
        };
        foreach ((string name, Dictionary<(uint Function, uint Index, string Register), uint> row) in masks)
        {
            rows[name] = new CpuModelRow(name, false, row);
        }

        return rows;
    }

    private static IReadOnlyDictionary<string, CpuModelRow> Load()
    {
        using Stream stream = typeof(CpuModelTable).Assembly.GetManifestResourceStream("cpu-models.txt")
            ?? throw new InvalidOperationException("cpu-models.txt is not built in");
        using var reader = new StreamReader(stream);
        return Parse(reader);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;

namespace Vmm.Config;

/// <summary>What one parse collects: errors, places, and (for the test that compares it with schema and sample) keys.</summary>
internal sealed class ParseContext
{
    private const int MaxErrors = 50;
    private readonly List<Diagnostic> _errors;
    private readonly Dictionary<string, SourcePosition> _positions = new(StringComparer.Ordinal);

    internal ParseContext(string baseDirectory, List<Diagnostic> errors, SortedSet<string>? catalog)
    {
        BaseDirectory = baseDirectory;
        Catalog = catalog;
        _errors = errors;
    }

    internal string BaseDirectory { get; }

    /// <summary>Every key that was asked for, list indices left out: <c>disks[].path</c>.</summary>
    internal SortedSet<string>? Catalog { get; }

    internal void Error(SourcePosition at, string message)
    {
        if (_errors.Count < MaxErrors)
        {
            _errors.Add(new Diagnostic(at, message));
        }
    }

    internal void Place(string path, SourcePosition at) => _positions[path] = at;

    internal SourceMap Positions(SourcePosition start) => new(start, _positions);
}

/// <summary>
/// Reads one mapping. The keys that the code asks for are the keys that exist: <see cref="Finish"/> reports every other
/// one, and the same list answers "did you mean". A key cannot be known to the parser and yet be ignored.
/// </summary>
internal sealed class MapReader
{
    private readonly ParseContext _context;
    private readonly Dictionary<string, YamlNode> _values = new(StringComparer.Ordinal);
    private readonly List<(YamlNode Key, YamlNode Value)> _entries;
    private readonly HashSet<string> _asked = new(StringComparer.Ordinal);
    private readonly string _path;

    internal MapReader(ParseContext context, YamlNode node, string path)
    {
        _context = context;
        _path = path;
        At = node.At;
        _entries = node.Entries;
        foreach ((YamlNode key, YamlNode value) in node.Entries)
        {
            _values[key.Text] = value;
        }
    }

    internal SourcePosition At { get; }

    internal ParseContext Context => _context;

    internal string PathOf(string key) => _path.Length == 0 ? key : _path + "." + key;

    /// <summary>The value of a key, or null when the key is absent or empty.</summary>
    internal YamlNode? Take(string key)
    {
        _asked.Add(key);
        _context.Catalog?.Add(Generic(PathOf(key)));
        if (!_values.TryGetValue(key, out YamlNode? node))
        {
            return null;
        }

        _context.Place(PathOf(key), node.At);
        return node.IsNull ? null : node;
    }

    internal bool Has(string key) => _values.TryGetValue(key, out YamlNode? node) && !node.IsNull;

    /// <summary>Reports the keys that nobody asked for.</summary>
    internal void Finish()
    {
        foreach ((YamlNode key, _) in _entries)
        {
            if (!_asked.Contains(key.Text))
            {
                _context.Error(key.At, $"unknown key \"{Printable(key.Text)}\"{Suggestion.Ending(key.Text, _asked)}");
            }
        }
    }

    internal string? Text(string key, int maxLength = 4096)
    {
        return Take(key) is { } node ? TextOf(node, key, maxLength) : null;
    }

    internal string? TextOf(YamlNode node, string what, int maxLength = 4096)
    {
        if (node.Kind != YamlKind.Scalar)
        {
            _context.Error(node.At, $"\"{what}\" takes a text, not a {Noun(node)}");
            return null;
        }

        if (node.Text.Length > maxLength)
        {
            _context.Error(node.At, $"\"{what}\" is longer than {maxLength} characters");
            return null;
        }

        foreach (char c in node.Text)
        {
            if (char.IsControl(c) && c is not ('\n' or '\t'))
            {
                _context.Error(node.At, $"\"{what}\" holds a control character");
                return null;
            }
        }

        return node.Text;
    }

    /// <summary>A path, made absolute; null when absent or wrong.</summary>
    internal string? FilePath(string key)
    {
        return Take(key) is { } node ? FilePathOf(node, TextOf(node, key), key) : null;
    }

    internal string? FilePathOf(YamlNode node, string? text, string what)
    {
        if (text is null)
        {
            return null;
        }

        if (text.Length == 0 || text.Contains('\n', StringComparison.Ordinal))
        {
            _context.Error(node.At, $"\"{what}\" takes the path of a file");
            return null;
        }

        return Path.GetFullPath(Path.Combine(_context.BaseDirectory, text));
    }

    internal bool Flag(string key, bool otherwise)
    {
        return Take(key) is { } node ? FlagOf(node, key) ?? otherwise : otherwise;
    }

    internal bool? FlagOf(YamlNode node, string what)
    {
        if (node.Kind == YamlKind.Scalar)
        {
            switch (node.Text)
            {
                case "true" or "True" or "yes" or "on":
                    return true;
                case "false" or "False" or "no" or "off":
                    return false;
                default:
                    break;
            }
        }

        _context.Error(node.At, $"\"{what}\" takes true or false, not {Quote(node)}");
        return null;
    }

    internal long Integer(string key, long otherwise, long min, long max)
    {
        return Take(key) is { } node ? IntegerOf(node, key, min, max) ?? otherwise : otherwise;
    }

    internal long? IntegerOf(YamlNode node, string what, long min, long max)
    {
        if (node.Kind == YamlKind.Scalar && TryInteger(node.Text, out long value))
        {
            if (value >= min && value <= max)
            {
                return value;
            }

            _context.Error(node.At, string.Create(CultureInfo.InvariantCulture, $"\"{what}\" is {value}; it must be {min} to {max}"));
            return null;
        }

        _context.Error(
            node.At,
            string.Create(CultureInfo.InvariantCulture, $"\"{what}\" takes a number from {min} to {max}, not {Quote(node)}"));
        return null;
    }

    internal long? Size(string key, long min, long max)
    {
        if (Take(key) is not { } node)
        {
            return null;
        }

        if (node.Kind != YamlKind.Scalar || !Quantity.TryParseSize(node.Text, out long bytes))
        {
            _context.Error(node.At, $"\"{key}\" takes a size such as 512M or 4G, not {Quote(node)}");
            return null;
        }

        if (bytes < min || bytes > max)
        {
            _context.Error(
                node.At,
                $"\"{key}\" is {Printable(node.Text)}; it must be {Quantity.FormatSize(min)} to {Quantity.FormatSize(max)}");
            return null;
        }

        return bytes;
    }

    internal TimeSpan Duration(string key, TimeSpan otherwise)
    {
        if (Take(key) is not { } node)
        {
            return otherwise;
        }

        if (node.Kind == YamlKind.Scalar && Quantity.TryParseDuration(node.Text, out TimeSpan duration))
        {
            return duration;
        }

        _context.Error(node.At, $"\"{key}\" takes a time such as 10s, 500ms or 5m, not {Quote(node)}");
        return otherwise;
    }

    /// <summary>One word out of a table.</summary>
    internal T Choice<T>(string key, T otherwise, ReadOnlySpan<(string Word, T Value)> table)
    {
        return Take(key) is { } node ? ChoiceOf(node, key, otherwise, table) : otherwise;
    }

    internal T ChoiceOf<T>(YamlNode node, string what, T otherwise, ReadOnlySpan<(string Word, T Value)> table)
    {
        var words = new List<string>(table.Length);
        foreach ((string word, T value) in table)
        {
            if (node.Kind == YamlKind.Scalar && string.Equals(word, node.Text, StringComparison.Ordinal))
            {
                return value;
            }

            words.Add(word);
        }

        string meant = node.Kind == YamlKind.Scalar ? Suggestion.Ending(node.Text, words) : string.Empty;
        _context.Error(node.At, $"\"{what}\" is {Quote(node)}; it must be one of {string.Join(", ", words)}{meant}");
        return otherwise;
    }

    /// <summary>A list, or a single value as a list of one. Each item comes with its path for <see cref="SourceMap"/>.</summary>
    internal List<(YamlNode Node, string Path)> List(string key, int maxItems)
    {
        var result = new List<(YamlNode, string)>();
        if (Take(key) is not { } node)
        {
            return result;
        }

        string path = PathOf(key);
        if (node.Kind != YamlKind.Sequence)
        {
            result.Add((node, path + "[0]"));
            return result;
        }

        if (node.Items.Count > maxItems)
        {
            _context.Error(node.At, string.Create(CultureInfo.InvariantCulture, $"\"{key}\" has {node.Items.Count} entries; the most is {maxItems}"));
            return result;
        }

        for (int i = 0; i < node.Items.Count; i++)
        {
            string item = string.Create(CultureInfo.InvariantCulture, $"{path}[{i}]");
            _context.Place(item, node.Items[i].At);
            result.Add((node.Items[i], item));
        }

        return result;
    }

    /// <summary>A mapping below this one, or null when absent or not a mapping.</summary>
    internal MapReader? Map(string key, string example)
    {
        if (Take(key) is not { } node)
        {
            return null;
        }

        return MapOf(node, PathOf(key), key, example);
    }

    internal MapReader? MapOf(YamlNode node, string path, string what, string example)
    {
        if (node.Kind == YamlKind.Mapping)
        {
            return new MapReader(_context, node, path);
        }

        _context.Error(node.At, $"\"{what}\" takes keys, for example {example}, not {Quote(node)}");
        return null;
    }

    internal static string Quote(YamlNode node)
    {
        return node.Kind == YamlKind.Scalar ? $"\"{Printable(node.Text)}\"" : "a " + Noun(node);
    }

    // One line, bounded: what a hostile file says ends up on a terminal.
    internal static string Printable(string text)
    {
        string shown = text.Length > 60 ? text[..60] + "..." : text;
        return string.Create(shown.Length, shown, static (span, source) =>
        {
            for (int i = 0; i < span.Length; i++)
            {
                span[i] = char.IsControl(source[i]) ? '?' : source[i];
            }
        });
    }

    private static string Noun(YamlNode node) => node.Kind switch
    {
        YamlKind.Sequence => "list",
        YamlKind.Mapping => "mapping",
        _ => "text",
    };

    private static bool TryInteger(string text, out long value)
    {
        if (text.StartsWith("0x", StringComparison.OrdinalIgnoreCase))
        {
            return long.TryParse(text.AsSpan(2), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out value) && value >= 0;
        }

        return long.TryParse(text, NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture, out value);
    }

    private static string Generic(string path)
    {
        if (!path.Contains('[', StringComparison.Ordinal))
        {
            return path;
        }

        var result = new System.Text.StringBuilder(path.Length);
        bool inside = false;
        foreach (char c in path)
        {
            inside = c == '[' || (inside && c != ']');
            if (!inside || c == '[')
            {
                result.Append(c);
            }
        }

        return result.ToString();
    }
}

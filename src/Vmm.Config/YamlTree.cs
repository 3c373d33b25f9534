// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using YamlDotNet.Core;
using YamlDotNet.Core.Events;

namespace Vmm.Config;

// Theory. YamlDotNet's event parser does the lexing; this file turns its events into a small tree that remembers where
// each node stood. The serializer half of the library is not used: it needs reflection or generated code, and it would
// lose the positions that error messages need.
//
// Files are hostile. Limits, all of them errors with a place: bytes of a file, depth of nesting, and the number of nodes
// a document has when every alias is counted as the copy that it stands for. The last one defuses "billion laughs"
// without expanding anything: an alias shares the node, and each node knows its expanded size. An anchor becomes known
// when its node is complete, so an alias can never contain itself and the tree has no cycles.
//
// Tags are refused except the standard ones: a definition means what it says, not what a constructor would make of it.

/// <summary>Kinds of YAML nodes.</summary>
internal enum YamlKind
{
    Scalar,
    Sequence,
    Mapping,
}

/// <summary>A node with its place.</summary>
internal sealed class YamlNode
{
    internal YamlNode(YamlKind kind, SourcePosition at)
    {
        Kind = kind;
        At = at;
    }

    internal YamlKind Kind { get; }

    internal SourcePosition At { get; }

    /// <summary>Text of a scalar.</summary>
    internal string Text { get; init; } = string.Empty;

    /// <summary>The scalar was written in quotes or as a block, so it is a string whatever it looks like.</summary>
    internal bool IsQuoted { get; init; }

    internal List<YamlNode> Items { get; } = [];

    /// <summary>In file order; keys are unique.</summary>
    internal List<(YamlNode Key, YamlNode Value)> Entries { get; } = [];

    /// <summary>Nodes below and including this one, aliases counted as copies.</summary>
    internal long Size { get; set; } = 1;

    /// <summary>An empty value, <c>~</c> or <c>null</c>.</summary>
    internal bool IsNull => Kind == YamlKind.Scalar && !IsQuoted
        && Text is "" or "~" or "null" or "Null" or "NULL";
}

/// <summary>Reads YAML text into trees.</summary>
internal static class YamlTree
{
    internal const int MaxDepth = 32;
    internal const long MaxNodes = 200_000;

    /// <summary>Reads every document of a file.</summary>
    /// <exception cref="ConfigException">The text is not YAML, or exceeds a limit.</exception>
    internal static List<YamlNode> Load(string text, string file)
    {
        var documents = new List<YamlNode>();
        var scanner = new Scanner(new StringReader(text), skipComments: true);
        try
        {
            var parser = new Parser(scanner);
            parser.Consume<StreamStart>();
            while (!parser.Accept<StreamEnd>(out _))
            {
                parser.Consume<DocumentStart>();
                var loader = new Loader(parser, file);
                documents.Add(loader.ReadNode(0));
                parser.Consume<DocumentEnd>();
            }
        }
        catch (YamlException failure)
        {
            throw ConfigException.Single(Place(file, failure.Start), "not YAML: " + OneLine(failure.Message));
        }
        catch (Exception failure) when (failure is not ConfigException)
        {
            // On some broken texts the library's scanner leaves by an exception of the runtime (InvalidOperation,
            // ArgumentOutOfRange). The text is bounded, so whatever it was, the text is to blame.
            throw ConfigException.Single(Place(file, scanner.CurrentPosition), "not YAML");
        }

        return documents;
    }

    private static SourcePosition Place(string file, Mark mark)
    {
        return new SourcePosition(file, (int)mark.Line, (int)mark.Column);
    }

    // YamlDotNet prefixes some messages with "(Line: 1, Col: 2, ...): "; we print the place ourselves.
    private static string OneLine(string message)
    {
        int end = message.StartsWith("(Line:", StringComparison.Ordinal) ? message.IndexOf("): ", StringComparison.Ordinal) : -1;
        string text = end >= 0 ? message[(end + 3)..] : message;
        return text.ReplaceLineEndings(" ").TrimEnd('.');
    }

    private sealed class Loader
    {
        private readonly Parser _parser;
        private readonly string _file;
        private readonly Dictionary<string, YamlNode> _anchors = new(StringComparer.Ordinal);

        internal Loader(Parser parser, string file)
        {
            _parser = parser;
            _file = file;
        }

        internal YamlNode ReadNode(int depth)
        {
            ParsingEvent next = _parser.Consume<ParsingEvent>();
            SourcePosition at = Place(_file, next.Start);
            if (depth > MaxDepth)
            {
                throw ConfigException.Single(at, $"nested deeper than {MaxDepth} levels");
            }

            if (next is AnchorAlias alias)
            {
                if (_anchors.TryGetValue(alias.Value.Value, out YamlNode? known))
                {
                    return known;
                }

                throw ConfigException.Single(at, $"alias *{alias.Value.Value} has no anchor before it");
            }

            if (next is not NodeEvent start)
            {
                throw ConfigException.Single(at, "expected a value");
            }

            if (!start.Tag.IsEmpty && !start.Tag.IsNonSpecific
                && !start.Tag.Value.StartsWith("tag:yaml.org,2002:", StringComparison.Ordinal))
            {
                throw ConfigException.Single(at, $"tags such as {start.Tag.Value} are not used here");
            }

            YamlNode node = next switch
            {
                Scalar scalar => new YamlNode(YamlKind.Scalar, at)
                {
                    Text = scalar.Value,
                    IsQuoted = scalar.Style is not (ScalarStyle.Plain or ScalarStyle.Any),
                },
                SequenceStart => ReadSequence(at, depth),
                MappingStart => ReadMapping(at, depth),
                _ => throw ConfigException.Single(at, "expected a value"),
            };
            if (!start.Anchor.IsEmpty)
            {
                _anchors[start.Anchor.Value] = node;
            }

            return node;
        }

        private YamlNode ReadSequence(SourcePosition at, int depth)
        {
            var node = new YamlNode(YamlKind.Sequence, at);
            while (!_parser.TryConsume<SequenceEnd>(out _))
            {
                YamlNode item = ReadNode(depth + 1);
                Grow(node, item.Size, at);
                node.Items.Add(item);
            }

            return node;
        }

        private YamlNode ReadMapping(SourcePosition at, int depth)
        {
            var node = new YamlNode(YamlKind.Mapping, at);
            var seen = new Dictionary<string, SourcePosition>(StringComparer.Ordinal);
            List<YamlNode>? merges = null;
            while (!_parser.TryConsume<MappingEnd>(out _))
            {
                YamlNode key = ReadNode(depth + 1);
                if (key.Kind != YamlKind.Scalar)
                {
                    throw ConfigException.Single(key.At, "a key must be a plain word");
                }

                YamlNode value = ReadNode(depth + 1);
                Grow(node, key.Size + value.Size, key.At);
                if (key is { Text: "<<", IsQuoted: false })
                {
                    (merges ??= []).Add(value);
                    continue;
                }

                if (!seen.TryAdd(key.Text, key.At))
                {
                    throw ConfigException.Single(
                        key.At,
                        string.Create(CultureInfo.InvariantCulture, $"key \"{key.Text}\" is given twice; first on line {seen[key.Text].Line}"));
                }

                node.Entries.Add((key, value));
            }

            foreach (YamlNode source in merges ?? [])
            {
                Merge(node, source, seen);
            }

            return node;
        }

        // The merge key: entries of another mapping, or of several, where this one has none of that name.
        private static void Merge(YamlNode node, YamlNode source, Dictionary<string, SourcePosition> seen)
        {
            if (source.Kind == YamlKind.Sequence)
            {
                foreach (YamlNode item in source.Items)
                {
                    if (item.Kind != YamlKind.Mapping)
                    {
                        throw ConfigException.Single(item.At, "\"<<\" takes a mapping or a list of mappings");
                    }

                    Merge(node, item, seen);
                }

                return;
            }

            if (source.Kind != YamlKind.Mapping)
            {
                throw ConfigException.Single(source.At, "\"<<\" takes a mapping or a list of mappings");
            }

            foreach ((YamlNode key, YamlNode value) in source.Entries)
            {
                if (seen.TryAdd(key.Text, key.At))
                {
                    node.Entries.Add((key, value));
                }
            }
        }

        private static void Grow(YamlNode node, long more, SourcePosition at)
        {
            node.Size += more;
            if (node.Size > MaxNodes)
            {
                throw ConfigException.Single(at, $"more than {MaxNodes} values once aliases are counted in");
            }
        }
    }
}

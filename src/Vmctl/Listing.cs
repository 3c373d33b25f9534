// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Text;
using System.Text.Encodings.Web;
using System.Text.Json;

namespace Vmctl;

/// <summary>Formats of a listing (<c>-o</c>).</summary>
internal enum OutputFormat
{
    Table,
    Json,
    Yaml,
}

/// <summary>
/// Rows with named columns, written as a table, JSON or YAML. Values are strings, whole numbers, floating-point numbers,
/// booleans, lists of strings, or null; JSON and YAML carry their types, the table carries words.
/// </summary>
internal sealed class Listing
{
    private readonly string[] _columns;
    private readonly List<object?[]> _rows = [];

    internal Listing(params string[] columns)
    {
        _columns = columns;
    }

    /// <summary>Columns of JSON and YAML that a table leaves out.</summary>
    internal HashSet<string> Hidden { get; } = new(StringComparer.Ordinal);

    /// <summary>How a value looks in the table; null leaves it as it is.</summary>
    internal Func<string, object?, string?>? Show { get; init; }

    internal int Count => _rows.Count;

    internal void Add(params object?[] values)
    {
        if (values.Length != _columns.Length)
        {
            throw new ArgumentException("a row has as many values as there are columns", nameof(values));
        }

        _rows.Add(values);
    }

    internal void Write(TextWriter output, OutputFormat format, bool colour, int width)
    {
        switch (format)
        {
            case OutputFormat.Json:
                WriteJson(output);
                break;
            case OutputFormat.Yaml:
                WriteYaml(output);
                break;
            default:
                WriteTable(output, colour, width);
                break;
        }
    }

    /// <summary>Writes each row as "name: value" lines, for one thing in detail.</summary>
    internal void WriteDetails(TextWriter output)
    {
        int widest = 0;
        foreach (string column in _columns)
        {
            widest = Math.Max(widest, column.Length);
        }

        foreach (object?[] row in _rows)
        {
            for (int i = 0; i < _columns.Length; i++)
            {
                if (row[i] is not null)
                {
                    output.WriteLine((_columns[i] + ":").PadRight(widest + 2) + Cell(i, row[i]));
                }
            }
        }
    }

    /// <summary>Writes findings (what, works, finding, advice) one under the other, for doctor.</summary>
    internal void WriteFindings(TextWriter output, bool colour)
    {
        int widest = 0;
        foreach (object?[] row in _rows)
        {
            widest = Math.Max(widest, Cell(0, row[0]).Length);
        }

        foreach (object?[] row in _rows)
        {
            bool works = row[1] is true;
            string mark = works ? "yes" : "no ";
            string style = works ? "\u001b[32m" : "\u001b[31m";
            output.Write(Cell(0, row[0]).PadRight(widest + 2));
            output.Write(colour ? style + mark + "\u001b[0m" : mark);
            output.WriteLine("  " + Cell(2, row[2]));
            if (row[3] is not null)
            {
                output.WriteLine(new string(' ', widest + 7) + Cell(3, row[3]));
            }
        }
    }

    /// <summary>Quotes a YAML scalar where it would otherwise mean something else.</summary>
    internal static string YamlScalar(object? value)
    {
        if (value is not string text)
        {
            return Plain(value);
        }

        bool plain = text.Length > 0 && !char.IsWhiteSpace(text[0]) && !char.IsWhiteSpace(text[^1])
            && text is not ("true" or "false" or "yes" or "no" or "on" or "off" or "null" or "~")
            && "-?:,[]{}#&*!|>'\"%@`".IndexOf(text[0], StringComparison.Ordinal) < 0
            && !text.Contains(": ", StringComparison.Ordinal) && !text.EndsWith(':')
            && !text.Contains(" #", StringComparison.Ordinal)
            && !double.TryParse(text, NumberStyles.Float, CultureInfo.InvariantCulture, out _)
            && !text.StartsWith("0x", StringComparison.Ordinal);
        foreach (char c in text)
        {
            plain &= !char.IsControl(c);
        }

        return plain ? text : "\"" + JavaScriptEncoder.UnsafeRelaxedJsonEscaping.Encode(text) + "\"";
    }

    private static string Plain(object? value) => value switch
    {
        null => "null",
        bool flag => flag ? "true" : "false",
        double number => Math.Round(number, 3).ToString(CultureInfo.InvariantCulture),
        IFormattable number => number.ToString(null, CultureInfo.InvariantCulture),
        _ => value.ToString() ?? string.Empty,
    };

    private void WriteJson(TextWriter output)
    {
        using var buffer = new MemoryStream();
        var options = new JsonWriterOptions { Indented = true, Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };
        using (var json = new Utf8JsonWriter(buffer, options))
        {
            json.WriteStartArray();
            foreach (object?[] row in _rows)
            {
                json.WriteStartObject();
                for (int i = 0; i < _columns.Length; i++)
                {
                    json.WritePropertyName(_columns[i]);
                    WriteJsonValue(json, row[i]);
                }

                json.WriteEndObject();
            }

            json.WriteEndArray();
        }

        output.WriteLine(Encoding.UTF8.GetString(buffer.GetBuffer(), 0, (int)buffer.Length));
    }

    private static void WriteJsonValue(Utf8JsonWriter json, object? value)
    {
        switch (value)
        {
            case null:
                json.WriteNullValue();
                break;
            case bool flag:
                json.WriteBooleanValue(flag);
                break;
            case int number:
                json.WriteNumberValue(number);
                break;
            case long number:
                json.WriteNumberValue(number);
                break;
            case double number:
                json.WriteNumberValue(Math.Round(number, 3));
                break;
            case IEnumerable<string> list:
                json.WriteStartArray();
                foreach (string item in list)
                {
                    json.WriteStringValue(item);
                }

                json.WriteEndArray();
                break;
            default:
                json.WriteStringValue(value.ToString());
                break;
        }
    }

    private void WriteYaml(TextWriter output)
    {
        if (_rows.Count == 0)
        {
            output.WriteLine("[]");
        }

        foreach (object?[] row in _rows)
        {
            for (int i = 0; i < _columns.Length; i++)
            {
                output.Write(i == 0 ? "- " : "  ");
                output.Write(_columns[i]);
                output.Write(':');
                if (row[i] is IEnumerable<string> list)
                {
                    output.Write(" [");
                    output.Write(string.Join(", ", Quoted(list)));
                    output.WriteLine(']');
                }
                else
                {
                    output.Write(' ');
                    output.WriteLine(YamlScalar(row[i]));
                }
            }
        }
    }

    private static IEnumerable<string> Quoted(IEnumerable<string> list)
    {
        foreach (string item in list)
        {
            yield return "\"" + JavaScriptEncoder.UnsafeRelaxedJsonEscaping.Encode(item) + "\"";
        }
    }

    private void WriteTable(TextWriter output, bool colour, int width)
    {
        var shown = new List<int>();
        for (int i = 0; i < _columns.Length; i++)
        {
            if (!Hidden.Contains(_columns[i]))
            {
                shown.Add(i);
            }
        }

        var widths = new int[_columns.Length];
        foreach (int i in shown)
        {
            widths[i] = _columns[i].Length;
            foreach (object?[] row in _rows)
            {
                widths[i] = Math.Max(widths[i], Cell(i, row[i]).Length);
            }
        }

        WriteLine(output, shown, widths, i => _columns[i].ToUpperInvariant(), null, width, colour ? "\u001b[1m" : string.Empty);
        foreach (object?[] row in _rows)
        {
            WriteLine(output, shown, widths, i => Cell(i, row[i]), row, width, string.Empty);
        }
    }

    private static void WriteLine(
        TextWriter output, List<int> shown, int[] widths, Func<int, string> cell, object?[]? row, int width, string style)
    {
        var line = new StringBuilder();
        for (int n = 0; n < shown.Count; n++)
        {
            int i = shown[n];
            bool isNumber = row?[i] is int or long or double;
            string text = cell(i);
            bool isLast = n == shown.Count - 1;
            string padded = isLast && !isNumber ? text : text.PadRight(widths[i]);
            line.Append(isNumber ? text.PadLeft(widths[i]) : padded);
            line.Append(isLast ? string.Empty : "  ");
        }

        string shownLine = line.ToString().TrimEnd();
        if (width > 0 && shownLine.Length > width)
        {
            shownLine = shownLine[..width];
        }

        output.WriteLine(style.Length == 0 ? shownLine : style + shownLine + "\u001b[0m");
    }

    private string Cell(int column, object? value)
    {
        string? shown = Show?.Invoke(_columns[column], value);
        return shown ?? value switch
        {
            null => "-",
            bool flag => flag ? "yes" : "no",
            IEnumerable<string> list => string.Join(' ', list),
            _ => Clean(Plain(value)),
        };
    }

    // What a definition or a guest says must not steer the terminal.
    private static string Clean(string text)
    {
        foreach (char c in text)
        {
            if (char.IsControl(c))
            {
                return string.Create(text.Length, text, static (span, source) =>
                {
                    for (int i = 0; i < span.Length; i++)
                    {
                        span[i] = char.IsControl(source[i]) ? '?' : source[i];
                    }
                });
            }
        }

        return text;
    }
}

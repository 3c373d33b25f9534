// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Globalization;

namespace Vmm.Config;

/// <summary>Sizes and durations as people write them. Pure functions; any thread.</summary>
public static class Quantity
{
    /// <summary>
    /// Reads a size: digits, an optional fraction, and one of K, M, G, T (binary, either case, optionally followed by
    /// <c>B</c> or <c>iB</c>). A bare number is bytes. The result is a whole number of bytes.
    /// </summary>
    /// <returns>False when it is not a size, is negative, is not whole, or exceeds 2^63-1.</returns>
    public static bool TryParseSize(string? text, out long bytes)
    {
        bytes = 0;
        if (string.IsNullOrWhiteSpace(text))
        {
            return false;
        }

        ReadOnlySpan<char> rest = text.AsSpan().Trim();
        if (rest.EndsWith("iB", StringComparison.Ordinal))
        {
            rest = rest[..^2];
        }
        else if (rest.Length > 1 && (rest[^1] is 'B' or 'b'))
        {
            rest = rest[..^1];
        }

        int shift = 0;
        if (!rest.IsEmpty)
        {
            shift = char.ToUpperInvariant(rest[^1]) switch
            {
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                'P' => 50,
                _ => 0,
            };
            if (shift != 0)
            {
                rest = rest[..^1].TrimEnd();
            }
        }

        const NumberStyles Style = NumberStyles.AllowDecimalPoint;
        if (rest.IsEmpty || !char.IsAsciiDigit(rest[0])
            || !decimal.TryParse(rest, Style, CultureInfo.InvariantCulture, out decimal number))
        {
            return false;
        }

        const decimal Limit = long.MaxValue;
        decimal unit = 1L << shift;
        if (number > Limit / unit)
        {
            return false;
        }

        decimal product = number * unit;
        if (product != decimal.Truncate(product))
        {
            return false;
        }

        bytes = (long)product;
        return true;
    }

    /// <summary>Writes a size with the largest unit that leaves a whole number: <c>1536M</c>.</summary>
    public static string FormatSize(long bytes)
    {
        ReadOnlySpan<char> units = "TGMK";
        for (int i = 0; i < units.Length; i++)
        {
            int shift = 40 - (10 * i);
            if (bytes != 0 && (bytes & ((1L << shift) - 1)) == 0)
            {
                return (bytes >> shift).ToString(CultureInfo.InvariantCulture) + units[i];
            }
        }

        return bytes.ToString(CultureInfo.InvariantCulture);
    }

    /// <summary>Reads a duration: a number with <c>ms</c>, <c>s</c>, <c>m</c>, <c>h</c> or <c>d</c>; a bare number is seconds.</summary>
    /// <returns>False when it is not one or is longer than 366 days.</returns>
    public static bool TryParseDuration(string? text, out TimeSpan duration)
    {
        duration = TimeSpan.Zero;
        if (string.IsNullOrWhiteSpace(text))
        {
            return false;
        }

        ReadOnlySpan<char> rest = text.AsSpan().Trim();
        double unitMs = 1000;
        if (rest.EndsWith("ms", StringComparison.Ordinal))
        {
            rest = rest[..^2];
            unitMs = 1;
        }
        else
        {
            double scale = rest[^1] switch
            {
                's' => 1000,
                'm' => 60_000,
                'h' => 3_600_000,
                'd' => 86_400_000,
                _ => 0,
            };
            if (scale != 0)
            {
                rest = rest[..^1];
                unitMs = scale;
            }
        }

        if (rest.IsEmpty || !char.IsAsciiDigit(rest[0])
            || !double.TryParse(rest, NumberStyles.AllowDecimalPoint, CultureInfo.InvariantCulture, out double number))
        {
            return false;
        }

        double ms = number * unitMs;
        if (!(ms <= TimeSpan.FromDays(366).TotalMilliseconds))
        {
            return false;
        }

        duration = TimeSpan.FromMilliseconds(ms);
        return true;
    }

    /// <summary>Writes a duration so that <see cref="TryParseDuration"/> reads the same value: <c>90s</c>, <c>250ms</c>.</summary>
    public static string FormatDuration(TimeSpan duration)
    {
        long ms = (long)duration.TotalMilliseconds;
        return ms % 1000 == 0
            ? (ms / 1000).ToString(CultureInfo.InvariantCulture) + "s"
            : ms.ToString(CultureInfo.InvariantCulture) + "ms";
    }
}

/// <summary>Finds the known word that an unknown one was probably meant to be.</summary>
public static class Suggestion
{
    /// <summary>The nearest candidate within a third of its length (at least 1 edit), or null.</summary>
    /// <param name="word">What was written.</param>
    /// <param name="candidates">What would have been right.</param>
    public static string? Find(string word, System.Collections.Generic.IEnumerable<string> candidates)
    {
        ArgumentNullException.ThrowIfNull(word);
        ArgumentNullException.ThrowIfNull(candidates);
        if (word.Length is 0 or > 64)
        {
            return null;
        }

        string? best = null;
        int bestDistance = int.MaxValue;
        string normal = Normalise(word);
        foreach (string candidate in candidates)
        {
            int distance = Distance(normal, Normalise(candidate));
            if (distance <= Math.Max(1, candidate.Length / 3) && distance < bestDistance)
            {
                (best, bestDistance) = (candidate, distance);
            }
        }

        return best;
    }

    /// <summary>A ready ending for an error message: <c>; did you mean "x"?</c>, or nothing.</summary>
    public static string Ending(string word, System.Collections.Generic.IEnumerable<string> candidates)
    {
        return Find(word, candidates) is { } found ? $"; did you mean \"{found}\"?" : string.Empty;
    }

    // Spelling variants that are no mistakes of a letter: debug_exit, debugExit, DebugExit -> debugexit.
    private static string Normalise(string text)
    {
        return text.Replace("-", string.Empty, StringComparison.Ordinal)
            .Replace("_", string.Empty, StringComparison.Ordinal)
            .ToLowerInvariant();
    }

    // Optimal string alignment: insert, delete, replace, swap neighbours, each 1.
    private static int Distance(string a, string b)
    {
        var rows = new int[3][];
        for (int i = 0; i < 3; i++)
        {
            rows[i] = new int[b.Length + 1];
        }

        for (int j = 0; j <= b.Length; j++)
        {
            rows[0][j] = j;
        }

        for (int i = 1; i <= a.Length; i++)
        {
            int[] current = rows[i % 3];
            int[] previous = rows[(i + 2) % 3];
            int[] before = rows[(i + 1) % 3];
            current[0] = i;
            for (int j = 1; j <= b.Length; j++)
            {
                int cost = a[i - 1] == b[j - 1] ? 0 : 1;
                int value = Math.Min(Math.Min(current[j - 1] + 1, previous[j] + 1), previous[j - 1] + cost);
                if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                {
                    value = Math.Min(value, before[j - 2] + 1);
                }

                current[j] = value;
            }
        }

        return rows[a.Length % 3][b.Length];
    }
}

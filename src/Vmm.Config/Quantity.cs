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

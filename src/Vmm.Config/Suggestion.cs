// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;

namespace Vmm.Config;

/// <summary>Finds the known word that an unknown one was probably meant to be.</summary>
public static class Suggestion
{
    /// <summary>The nearest candidate within a third of its length (at least 1 edit), or null.</summary>
    /// <param name="word">What was written.</param>
    /// <param name="candidates">What would have been right.</param>
    public static string? Find(string word, IEnumerable<string> candidates)
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
    public static string Ending(string word, IEnumerable<string> candidates)
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

// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;
using System.Text;

namespace Vmm.Fleet.Import;

/// <summary>Words of a shell or of vm.conf: quotes join, # begins a comment, braces stand alone, and = too where asked (vm.conf).</summary>
internal static class ShellWords
{
    internal static List<string> Split(string text, bool splitEquals)
    {
        var words = new List<string>();
        var word = new StringBuilder();
        bool inWord = false;
        char quote = '\0';
        for (int i = 0; i < text.Length; i++)
        {
            char c = text[i];
            if (quote != '\0')
            {
                if (c == quote)
                {
                    quote = '\0';
                }
                else
                {
                    word.Append(c);
                }

                continue;
            }

            switch (c)
            {
                case '"' or '\'':
                    quote = c;
                    inWord = true;
                    continue;
                case '#' when !inWord:
                    while (i < text.Length && text[i] != '\n')
                    {
                        i++;
                    }

                    continue;
                case '=' when splitEquals && inWord:
                    words.Add(word.ToString());
                    words.Add("=");
                    word.Clear();
                    inWord = false;
                    continue;
                case '{' or '}' or '=' when !inWord:
                    words.Add(c.ToString());
                    continue;
                default:
                    break;
            }

            if (char.IsWhiteSpace(c))
            {
                if (inWord)
                {
                    words.Add(word.ToString());
                    word.Clear();
                    inWord = false;
                }

                continue;
            }

            inWord = true;
            word.Append(c);
        }

        if (inWord)
        {
            words.Add(word.ToString());
        }

        return words;
    }
}

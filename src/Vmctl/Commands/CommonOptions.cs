// SPDX-License-Identifier: BSD-2-Clause
using System.CommandLine;
using Vmm.Config;

namespace Vmctl.Commands;

/// <summary>Options that several verbs have.</summary>
internal static class CommonOptions
{
    private static readonly string[] s_formats = ["table", "json", "yaml"];

    /// <summary><c>-o table|json|yaml</c>.</summary>
    internal static Option<string> Output()
    {
        var option = new Option<string>("--output", "-o")
        {
            Description = "table, json or yaml.",
            HelpName = "format",
            DefaultValueFactory = _ => "table",
        };
        option.Validators.Add(result =>
        {
            string word = result.Tokens.Count == 1 ? result.Tokens[0].Value : string.Empty;
            if (result.Tokens.Count != 0 && System.Array.IndexOf(s_formats, word) < 0)
            {
                result.AddError($"--output is table, json or yaml, not \"{word}\"{Suggestion.Ending(word, s_formats)}");
            }
        });
        return option;
    }

    /// <summary>What the user chose.</summary>
    internal static OutputFormat Format(ParseResult result, Option<string> option) => result.GetValue(option) switch
    {
        "json" => OutputFormat.Json,
        "yaml" => OutputFormat.Yaml,
        _ => OutputFormat.Table,
    };
}

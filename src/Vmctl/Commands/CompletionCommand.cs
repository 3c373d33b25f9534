// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.CommandLine;
using System.CommandLine.Help;
using System.Linq;
using System.Text;
using Vmm.Config;

namespace Vmctl.Commands;

// Theory. The scripts are written from the tree of commands, so verbs and options are always those of this vmctl. What
// comes behind a verb is a file, the name of a VM (asked of "vmctl list" when the key is pressed), one of a few words, or
// nothing; the table below says which. tests/usage/suite has each shell complete with its script.

/// <summary><c>vmctl completion</c>: what a shell reads to complete our words.</summary>
internal static class CompletionCommand
{
    private const string ListNames = "vmctl list 2>/dev/null | awk 'NR > 1 { print $1 }'";

    private static readonly string[] s_shells = ["sh", "bash", "zsh", "fish"];
    private static readonly string[] s_withFiles = ["run", "validate", "create", "import", "service", "apply", "diff"];
    private static readonly string[] s_withNothing = ["doctor", "daemon", "list", "web", "reload", "receive", "version"];

    // Verbs and options whose next word is one of a few.
    private static readonly (string Verb, string Words)[] s_verbWords =
    [
        ("completion", "sh bash zsh fish"), ("import", "vm-bhyve vm.conf vmadm libvirt qemu"), ("service", "export"),
    ];

    private static readonly (string Option, string Words)[] s_optionWords =
    [
        ("-o", "table json yaml"), ("--output", "table json yaml"), ("--accel", "auto kvm soft"),
    ];

    internal static Command Create(CommandContext context, Func<RootCommand> tree)
    {
        var shell = new Argument<string>("shell") { Description = "sh, bash, zsh or fish." };
        var command = new Command("completion", "Write a completion script for a shell to standard output.") { shell };
        command.SetAction(result =>
        {
            string name = result.GetRequiredValue(shell);
            List<Command> verbs = [.. tree().Subcommands.Where(verb => !verb.Hidden)];
            context.Output.Write(name switch
            {
                "sh" => Sh(verbs),
                "bash" => Bash(verbs),
                "zsh" => Zsh(verbs),
                "fish" => Fish(verbs),
                _ => throw new CommandException(
                    ExitStatus.Usage, $"completion: \"{name}\" is none of {string.Join(", ", s_shells)}{Suggestion.Ending(name, s_shells)}"),
            });
            return ExitStatus.Ok;
        });
        return command;
    }

    private static string Names(IEnumerable<Command> verbs) => string.Join(' ', verbs.SelectMany(NamesOf));

    private static IEnumerable<string> NamesOf(Command verb) => verb.Aliases.Prepend(verb.Name);

    private static IEnumerable<Option> OptionsOf(Command verb) =>
        verb.Options.Concat(verb.Subcommands.SelectMany(sub => sub.Options))
            .Where(option => !option.Hidden).DistinctBy(option => option.Name, StringComparer.Ordinal);

    private static string OptionNames(Command verb) => string.Join(' ', OptionsOf(verb).Select(option => option.Name).Append("--help"));

    // "a | b) WORD ;;" lines of a case over $verb, for bash and zsh.
    private static string OptionCases(List<Command> verbs, string indent)
    {
        var text = new StringBuilder();
        foreach (Command verb in verbs)
        {
            text.Append($"{indent}{string.Join(" | ", NamesOf(verb))}) options='{OptionNames(verb)}' ;;\n");
        }

        return text.ToString();
    }

    private static string WordCases(IEnumerable<(string Key, string Words)> table, string indent)
    {
        var text = new StringBuilder();
        foreach ((string key, string words) in table)
        {
            text.Append($"{indent}{key}) words='{words}' ;;\n");
        }

        return text.ToString();
    }

    // Of the shells that may be called sh, bash and zsh speak for themselves, and ksh has arrays that it completes from.
    private static string Sh(List<Command> verbs) => $$"""
        # vmctl completion; FreeBSD's sh and dash have none
        if [ -n "${BASH_VERSION-}" ]; then
            eval "$(vmctl completion bash)"
        elif [ -n "${ZSH_VERSION-}" ]; then
            eval "$(vmctl completion zsh)"
        elif [ -n "${KSH_VERSION-}" ]; then
            eval 'set -A complete_vmctl_1 -- {{Names(verbs)}} help'
        fi

        """;

    private static string Bash(List<Command> verbs) => $$"""
        # vmctl completion for bash
        _vmctl() {
            local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} verb=${COMP_WORDS[1]} options='' words=''
            COMPREPLY=()
            if [ "$COMP_CWORD" = 1 ] || { [ "$verb" = help ] && [ "$COMP_CWORD" = 2 ]; }; then
                COMPREPLY=($(compgen -W '{{Names(verbs)}} help --help --version' -- "$cur"))
                return
            fi
            case $prev in
        {{WordCases(s_optionWords, "    ")}}    esac
            case $COMP_CWORD:$verb in
        {{WordCases(s_verbWords.Select(pair => ("2:" + pair.Verb, pair.Words)), "    ")}}    esac
            case $verb in
        {{OptionCases(verbs, "    ")}}    esac
            case $cur in
            -*)
                COMPREPLY=($(compgen -W "$options" -- "$cur"))
                return
                ;;
            esac
            if [ -n "$words" ]; then
                COMPREPLY=($(compgen -W "$words" -- "$cur"))
                return
            fi
            case $verb in
            {{string.Join(" | ", s_withFiles)}})
                compopt -o filenames 2>/dev/null
                COMPREPLY=($(compgen -f -- "$cur"))
                ;;
            {{string.Join(" | ", s_withNothing)}}) ;;
            *) COMPREPLY=($(compgen -W "$({{ListNames}})" -- "$cur")) ;;
            esac
        }
        complete -F _vmctl vmctl

        """;

    private static string Zsh(List<Command> verbs)
    {
        var described = new StringBuilder();
        foreach (Command verb in verbs)
        {
            foreach (string name in NamesOf(verb))
            {
                described.Append($"            '{name}:{verb.Description?.Replace("'", "'\\''", StringComparison.Ordinal)}'\n");
            }
        }

        return $$"""
        #compdef vmctl
        # vmctl completion for zsh: sourced, or as _vmctl in a directory of $fpath
        _vmctl() {
            local verb=${words[2]} options= choice=
            if (( CURRENT == 2 )) || [[ $verb == help && CURRENT -eq 3 ]]; then
                local -a verbs=(
        {{described}}            'help:Show the options of a command.'
                )
                _describe command verbs
                return
            fi
            case ${words[CURRENT-1]} in
        {{WordCases(s_optionWords, "    ").Replace("words=", "choice=", StringComparison.Ordinal)}}    esac
            case $CURRENT:$verb in
        {{WordCases(s_verbWords.Select(pair => ("3:" + pair.Verb, pair.Words)), "    ").Replace("words=", "choice=", StringComparison.Ordinal)}}    esac
            case $verb in
        {{OptionCases(verbs, "    ")}}    esac
            if [[ $PREFIX == -* ]]; then
                compadd -- ${=options}
            elif [[ -n $choice ]]; then
                compadd -- ${=choice}
            else
                case $verb in
                ({{string.Join('|', s_withFiles)}}) _files ;;
                ({{string.Join('|', s_withNothing)}}) ;;
                (*) compadd -- ${(f)"$({{ListNames}})"} ;;
                esac
            fi
        }
        if [[ ${funcstack[1]} == _vmctl ]]; then
            _vmctl "$@"
        else
            compdef _vmctl vmctl
        fi

        """;
    }

    private static string Fish(List<Command> verbs)
    {
        var text = new StringBuilder("# vmctl completion for fish\ncomplete -c vmctl -f\n");
        foreach (Command verb in verbs)
        {
            foreach (string name in NamesOf(verb))
            {
                text.Append($"complete -c vmctl -n __fish_use_subcommand -a {name} -d '{FishText(verb.Description)}'\n");
            }

            foreach (Option option in OptionsOf(verb).Where(option => option is not HelpOption))
            {
                string? letter = option.Aliases.FirstOrDefault(alias => alias.Length == 2);
                text.Append($"complete -c vmctl -n '__fish_seen_subcommand_from {string.Join(' ', NamesOf(verb))}' -l {option.Name[2..]}");
                text.Append(letter is null ? string.Empty : $" -s {letter[1]}");
                string takes = option.Arity.MaximumNumberOfValues > 0 && !IsFlag(option) ? " -r" : string.Empty;
                text.Append(Words(option) is { } words ? $" -x -a '{words}'" : takes);
                text.Append($" -d '{FishText(option.Description)}'\n");
            }
        }

        text.Append($"complete -c vmctl -n '__fish_seen_subcommand_from help' -a '{Names(verbs)}'\n");
        text.Append($"complete -c vmctl -n '__fish_seen_subcommand_from {string.Join(' ', s_withFiles)}' -F\n");
        foreach ((string verb, string words) in s_verbWords)
        {
            text.Append($"complete -c vmctl -n '__fish_seen_subcommand_from {verb}' -a '{words}'\n");
        }

        string others = string.Join(' ', s_withFiles.Concat(s_withNothing).Concat(["help", "completion"]));
        text.Append($"complete -c vmctl -n 'not __fish_use_subcommand; and not __fish_seen_subcommand_from {others}'");
        text.Append(" -a \"(vmctl list 2>/dev/null | tail -n +2 | string split -f 1 ' ')\"\n");
        return text.ToString();
    }

    private static string? Words(Option option) =>
        Array.Find(s_optionWords, pair => string.Equals(pair.Option, option.Name, StringComparison.Ordinal)).Words;

    private static string? FishText(string? text) => text?.Replace("'", "\\'", StringComparison.Ordinal);

    private static bool IsFlag(Option option) => option.ValueType == typeof(bool);
}

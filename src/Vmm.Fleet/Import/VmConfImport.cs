// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using Vmm.Config;

namespace Vmm.Fleet.Import;

/// <summary>OpenBSD vm.conf(5): <c>vm "name" { statements }</c>.</summary>
internal static class VmConfImport
{
    internal static List<ImportedVm> Read(string text)
    {
        var words = new Queue<string>(ShellWords.Split(text, splitEquals: true));
        var macros = new Dictionary<string, string>(StringComparer.Ordinal);
        var result = new List<ImportedVm>();
        var outside = new List<string>();
        while (words.TryDequeue(out string? word))
        {
            if (word is "vm")
            {
                result.Add(ReadOne(words, macros, outside));
                outside = [];
                continue;
            }

            if (words.TryPeek(out string? next) && next is "=")
            {
                words.Dequeue();
                macros["$" + word] = words.TryDequeue(out string? value) ? value : string.Empty;
            }
            else if (word is "switch" or "include" or "local" or "socket" or "staggered")
            {
                outside.Add($"{word}: has no place in a VM's definition");
                SkipStatement(words);
            }
            else
            {
                throw new FormatException($"\"{word}\" is not a statement of vm.conf");
            }
        }

        return result.Count > 0 ? result : throw new FormatException("defines no vm");
    }

    private static void SkipStatement(Queue<string> words)
    {
        int depth = 0;
        while (words.TryPeek(out string? word))
        {
            if (depth == 0 && word is "vm" or "switch" or "include" or "local" or "socket" or "staggered")
            {
                return;
            }

            words.Dequeue();
            depth += word switch { "{" => 1, "}" => -1, _ => 0 };
            if (depth == 0 && word is "}")
            {
                return;
            }
        }
    }

    private static ImportedVm ReadOne(Queue<string> words, Dictionary<string, string> macros, List<string> outside)
    {
        string Next() => words.TryDequeue(out string? word)
            ? macros.GetValueOrDefault(word, word)
            : throw new FormatException("ends in the middle of a vm");
        var vm = new ImportDraft(Next());
        foreach (string line in outside)
        {
            vm.Lose(line);
        }

        if (Next() is not "{")
        {
            throw new FormatException($"vm \"{vm.Name}\" is followed by no \"{{\"");
        }

        for (string word = Next(); word is not "}"; word = Next())
        {
            switch (word)
            {
                case "enable":
                    break;
                case "disable":
                    vm.Line("autostart: false");
                    break;
                case "memory":
                    vm.Size("memory", Next());
                    break;
                case "disk":
                    string disk = Next();
                    string format = string.Empty;
                    if (words.TryPeek(out string? peek) && peek is "format")
                    {
                        words.Dequeue();
                        format = $", format: {Next().Trim('"')}";
                    }

                    vm.Item("disks", $"path: {SpecWriter.Quote(disk)}{format}");
                    break;
                case "cdrom":
                    vm.Item("disks", $"path: {SpecWriter.Quote(Next())}, bus: cdrom");
                    break;
                case "boot":
                    string boot = Next();
                    if (boot is "device")
                    {
                        vm.Line($"boot: {{order: [{Next()}]}}");
                    }
                    else
                    {
                        vm.Line($"boot: {{kernel: {SpecWriter.Quote(boot)}}}");
                    }

                    break;
                case "interfaces":
                    for (int i = int.Parse(Next(), CultureInfo.InvariantCulture); i > 0; i--)
                    {
                        vm.Item("nics", "backend: user");
                    }

                    break;
                case "local":
                    break;
                case "interface":
                    ReadInterface(words, vm, Next);
                    break;
                case "owner":
                    string owner = Next();
                    vm.Text("run-as", owner.Split(':')[0]);
                    break;
                default:
                    vm.Lose($"{word}: not known here");
                    if (words.TryPeek(out string? brace) && brace is "{")
                    {
                        for (string inner = Next(); inner is not "}"; inner = Next())
                        {
                        }
                    }

                    break;
            }
        }

        return vm.Finish(null);
    }

    private static void ReadInterface(Queue<string> words, ImportDraft vm, Func<string> next)
    {
        string backend = "user";
        string extra = string.Empty;
        if (words.TryPeek(out string? tap) && tap.StartsWith("tap", StringComparison.Ordinal))
        {
            backend = "tap:" + next();
        }

        if (words.TryPeek(out string? brace) && brace is "{")
        {
            next();
            for (string word = next(); word is not "}"; word = next())
            {
                switch (word)
                {
                    case "lladdr":
                        extra = $", mac: \"{next()}\"";
                        break;
                    case "switch":
                        vm.Lose($"switch {next()}: became user-mode NAT; for a bridge make a tap on it and write backend: tap:NAME");
                        break;
                    case "group" or "rdomain":
                        vm.Lose($"interface {word} {next()}: not known here");
                        break;
                    default:
                        break;
                }
            }
        }

        vm.Item("nics", $"backend: {SpecWriter.Quote(backend)}{extra}");
    }
}

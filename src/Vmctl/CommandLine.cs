// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.CommandLine;
using System.CommandLine.Help;
using System.CommandLine.Parsing;
using System.IO;
using System.Linq;
using System.Threading.Tasks;
using Vmm.Config;
using Vmm.Host;
using Vmctl.Commands;

namespace Vmctl;

// Theory. System.CommandLine parses options and arguments; what a user sees when something is wrong is ours: one line
// on standard error that says what to do, and a status of sysexits(3). Three things are done before the parser sees the
// words: a verb may be cut to a unique prefix (as with OpenBSD's vmctl), `help VERB` means `VERB --help`, and no words at
// all are a usage error. Hidden verbs (beginning with "_") take no prefixes and appear in no list.
//
// A verb is a class in Commands/ with a static Create(context) and a row in the table below. Exceptions of expected kinds
// end here; anything else is a bug of ours, and says so.

/// <summary>The command line: table of verbs, dispatch, and the last resort for errors.</summary>
internal static class CommandLine
{
    // What other programs call it (virsh, vm-bhyve, OpenBSD's vmctl, vmadm, zadm), and what it is here.
    private static readonly (string[] Words, string Here)[] s_elsewhere =
    [
        (["shutdown", "halt"], "stop"),
        (["poweroff", "kill", "destroy"], "stop -f"),
        (["reboot"], "restart\", or without asking the guest \"vmctl reset"),
        (["suspend"], "pause\", or to keep the state in a file \"vmctl snapshot --stop"),
        (["resume"], "unpause"),
        (["startall"], "start --all"),
        (["stopall"], "stop --all"),
        (["configure"], "edit"),
        (["define", "load", "up"], "apply -f FILE"),
        (["undefine", "delete", "remove", "rm"], "apply --prune\", or take the file out of the definition directory and \"vmctl reload"),
        (["info", "dominfo", "get"], "status"),
        (["dumpxml", "dump"], "status --definition"),
        (["ps", "top", "memstat"], "list"),
        (["attach", "login"], "console"),
        (["vnc", "display", "webvnc"], "status\", which shows the address, or the web page of \"vmctl web"),
        (["migrate"], "send NAME | ssh HOST vmctl receive"),
        (["inject-nmi"], "nmi"),
        (["eject"], "media NAME DRIVE"),
    ];

    /// <summary>Makes the tree of all commands.</summary>
    internal static RootCommand Build(CommandContext context)
    {
        var root = new RootCommand("Runs and looks after virtual machines.")
        {
            RunCommand.Create(context),
            RunProcessCommand.Create(context),
            ValidateCommand.Create(context),
            DoctorCommand.Create(context),
            DaemonCommand.Create(context),
            ListCommand.Create(context),
            StatusCommand.Create(context),
            StartCommand.Create(context),
            StopCommand.Create(context),
            RestartCommand.Create(context),
            ControlCommands.Pause(context),
            ControlCommands.Unpause(context),
            ControlCommands.Reset(context),
            ControlCommands.Nmi(context),
            ControlCommands.Screenshot(context),
            ControlCommands.Balloon(context),
            ControlCommands.Media(context),
            TransferCommands.Snapshot(context),
            ConsoleCommand.Create(context),
            LogCommand.Create(context),
            WaitCommand.Create(context),
            EventsCommand.Create(context),
            WebCommand.Create(context),
            CreateCommand.Create(context),
            EditCommand.Create(context),
            ApplyCommands.Apply(context),
            ApplyCommands.Diff(context),
            ApplyCommands.Reload(context),
            TransferCommands.Send(context),
            TransferCommands.Receive(context),
            ImportCommand.Create(context),
            ServiceCommand.Create(context),
            EndProcessCommand.Create(context),
            CompletionCommand.Create(context, () => Build(context)),
            VersionCommand.Create(context),
        };
        foreach (Option option in root.Options)
        {
            if (option is VersionOption)
            {
                // `vmctl --version` and `vmctl version` say the same.
                option.Action = new VersionCommand.Printer(context);
            }
        }

        return root;
    }

    /// <summary>Runs one command.</summary>
    /// <returns>The exit status.</returns>
    internal static async Task<int> InvokeAsync(string[] arguments, CommandContext context)
    {
        try
        {
            RootCommand root = Build(context);
            string[] words = Expand(root, arguments);
            var configuration = new ParserConfiguration { EnablePosixBundling = true, ResponseFileTokenReplacer = null };
            ParseResult result = root.Parse(words, configuration);
            bool isInformation = result.Action is HelpAction or VersionCommand.Printer;
            if (!isInformation && (result.Errors.Count > 0 || UnknownOption(result) is not null))
            {
                throw Usage(result);
            }

            return await result.InvokeAsync(new InvocationConfiguration
            {
                EnableDefaultExceptionHandler = false,
                Output = context.Output,
                Error = context.Error,
                ProcessTerminationTimeout = null,
            }).ConfigureAwait(false);
        }
        catch (CommandException failure)
        {
            context.Complain(failure.Message);
            return failure.Status;
        }
        catch (ConfigException failure)
        {
            Report(context, failure);
            return failure.Failure == ConfigFailure.NoInput ? ExitStatus.NoInput : ExitStatus.Config;
        }
        catch (IOException failure) when (IsBrokenPipe(failure))
        {
            // The reader of our output went away (`vmctl list | head -1`): nothing to say, and nobody to say it to.
            return ExitStatus.Failed;
        }
        catch (OperationCanceledException)
        {
            return ExitStatus.Interrupted;
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException or HostException)
        {
            context.Complain(failure.Message.ReplaceLineEndings(" "));
            return ExitStatus.Failed;
        }
        finally
        {
            Flush(context);
        }
    }

    /// <summary>The first error of a definition, and how many more there are.</summary>
    internal static void Report(CommandContext context, ConfigException failure)
    {
        string more = failure.Diagnostics.Count switch
        {
            1 => string.Empty,
            2 => " (and 1 more; vmctl validate shows it)",
            _ => $" (and {failure.Diagnostics.Count - 1} more; vmctl validate shows them)",
        };
        context.Complain(failure.Diagnostics[0] + more);
    }

    /// <summary>Replaces a unique prefix of a verb by the verb, and <c>help VERB</c> by <c>VERB --help</c>.</summary>
    internal static string[] Expand(RootCommand root, string[] arguments)
    {
        string[] words = arguments;
        if (words.Length == 0)
        {
            throw new CommandException(ExitStatus.Usage, "no command given; \"vmctl help\" lists them");
        }

        if (words[0] is "help")
        {
            words = words.Length == 1 ? ["--help"] : [.. words[1..], "--help"];
        }

        if (words[0].StartsWith('-') || words[0].StartsWith('_'))
        {
            return words;
        }

        var names = new List<string>();
        foreach (Command command in root.Subcommands.Where(command => !command.Hidden))
        {
            foreach (string name in command.Aliases.Prepend(command.Name))
            {
                if (string.Equals(name, words[0], StringComparison.Ordinal))
                {
                    return words;
                }

                names.Add(name);
            }
        }

        if (words[0].Contains('.', StringComparison.Ordinal) && File.Exists(words[0]))
        {
            throw new CommandException(ExitStatus.Usage, $"no command \"{words[0]}\"; to run the VM in this file: \"vmctl run {words[0]}\"");
        }

        List<string> matches = names.FindAll(name => name.StartsWith(words[0], StringComparison.Ordinal));
        return matches.Count switch
        {
            1 => [matches[0], .. words[1..]],
            0 => throw new CommandException(
                ExitStatus.Usage,
                Array.Find(s_elsewhere, pair => Array.IndexOf(pair.Words, words[0]) >= 0).Here is { } here
                    ? $"no command \"{words[0]}\"; here it is \"vmctl {here}\""
                    : $"no command \"{words[0]}\"{Suggestion.Ending(words[0], names)} (\"vmctl help\" lists them)"),
            _ => throw new CommandException(
                ExitStatus.Usage, $"\"{words[0]}\" could be {string.Join(", ", matches.Order(StringComparer.Ordinal))}"),
        };
    }

    private static CommandException Usage(ParseResult result)
    {
        Command command = result.CommandResult.Command;
        string message;
        if (UnknownOption(result) is { } option)
        {
            message = $"no option {option}{Suggestion.Ending(option, command.Options.Select(one => one.Name))}";
        }
        else if (result.UnmatchedTokens.Count > 0)
        {
            message = $"\"{result.UnmatchedTokens[0]}\" is one argument too many";
        }
        else
        {
            message = MissingWord(result) ?? result.Errors[0].Message.ReplaceLineEndings(" ").TrimEnd('.');
        }

        return new CommandException(
            ExitStatus.Usage,
            command is RootCommand ? $"{message} (see \"vmctl help\")" : $"{command.Name}: {message} (see \"vmctl help {command.Name}\")");
    }

    // The parser takes an option that it does not know for an argument: "stop a --forc" would stop a VM called "--forc".
    // Whoever means a name that begins so says "--" before it, or "./" before a file.
    private static string? UnknownOption(ParseResult result)
    {
        if (result.Tokens.Any(token => token.Type == TokenType.DoubleDash))
        {
            return null;
        }

        IEnumerable<string> arguments = result.CommandResult.Children.OfType<ArgumentResult>()
            .SelectMany(argument => argument.Tokens.Select(token => token.Value));
        return arguments.Concat(result.UnmatchedTokens).FirstOrDefault(word => word.Length > 1 && word[0] == '-' && !char.IsAsciiDigit(word[1]));
    }

    // The parser says that "an argument" is missing; the user wants to know which.
    private static string? MissingWord(ParseResult result)
    {
        foreach (SymbolResult part in result.CommandResult.Children)
        {
            if (part is OptionResult { Tokens.Count: 0, Implicit: false, Option: { Arity.MinimumNumberOfValues: > 0 } option } given)
            {
                return $"{given.IdentifierToken?.Value ?? option.Name} needs a {option.HelpName ?? "value"}";
            }
        }

        foreach (Argument argument in result.CommandResult.Command.Arguments)
        {
            if (argument.Arity.MinimumNumberOfValues > 0 && result.GetResult(argument) is null or { Tokens.Count: 0 })
            {
                return $"a {argument.Name} is missing";
            }
        }

        return null;
    }

    private static bool IsBrokenPipe(IOException failure) =>
        failure.InnerException is System.Net.Sockets.SocketException { SocketErrorCode: System.Net.Sockets.SocketError.Shutdown }
        || failure.HResult == 32 || failure.Message.Contains("Broken pipe", StringComparison.Ordinal);

    private static void Flush(CommandContext context)
    {
        try
        {
            context.Output.Flush();
        }
        catch (IOException)
        {
            // Standard output is gone; the status says the rest.
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System.CommandLine;
using System.CommandLine.Invocation;
using System.Runtime.InteropServices;

namespace Vmctl.Commands;

/// <summary><c>vmctl version</c>.</summary>
internal static class VersionCommand
{
    /// <summary>Version of this program, as its assembly carries it.</summary>
    internal static string Number { get; } = typeof(VersionCommand).Assembly.GetName().Version?.ToString(3) ?? "0";

    internal static Command Create(CommandContext context)
    {
        var format = CommonOptions.Output();
        var command = new Command("version", "Show the versions of the program and of what it writes.") { format };
        command.SetAction(result => Print(context, CommonOptions.Format(result, format)));
        return command;
    }

    private static int Print(CommandContext context, OutputFormat format)
    {
        if (format == OutputFormat.Table)
        {
            context.Output.WriteLine("vmctl " + Number);
            return ExitStatus.Ok;
        }

        var listing = new Listing("version", "definition", "system", "runtime");
        listing.Add(Number, 1, RuntimeInformation.OSDescription, RuntimeInformation.FrameworkDescription);
        listing.Write(context.Output, format, colour: false, width: 0);
        return ExitStatus.Ok;
    }

    /// <summary>What <c>--version</c> does.</summary>
    internal sealed class Printer : SynchronousCommandLineAction
    {
        private readonly CommandContext _context;

        internal Printer(CommandContext context)
        {
            _context = context;
        }

        public override int Invoke(ParseResult parseResult) => Print(_context, OutputFormat.Table);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System.CommandLine;
using System.IO;
using Vmm.Fleet;

namespace Vmctl.Commands;

/// <summary><c>vmctl web</c>: the address of the daemon's web page.</summary>
internal static class WebCommand
{
    internal static Command Create(CommandContext context)
    {
        var command = new Command("web", "Print the address of the daemon's web page, with the token that signs in.");
        var paths = new PathOptions();
        paths.AddTo(command, withDefinitions: false);
        command.SetAction(result =>
        {
            FleetPaths fleet = paths.Resolve(result);
            if (!File.Exists(fleet.WebAddress))
            {
                throw new CommandException(ExitStatus.WrongState, "the daemon serves no web page; start it with \"vmctl daemon --web\"");
            }

            string address = File.ReadAllText(fleet.WebAddress).Trim();
            context.Output.WriteLine($"{address}/#token={File.ReadAllText(fleet.WebToken).Trim()}");
            return ExitStatus.Ok;
        });
        return command;
    }
}

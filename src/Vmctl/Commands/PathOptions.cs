// SPDX-License-Identifier: BSD-2-Clause
using System.CommandLine;
using System.IO;
using Vmm.Fleet;

namespace Vmctl.Commands;

/// <summary>Options that move the directories of the fleet.</summary>
internal sealed class PathOptions
{
    private readonly Option<string> _definitions = new("--config-dir")
    {
        Description = "Directory of definitions.",
        HelpName = "dir",
    };

    private readonly Option<string> _run = new("--run-dir")
    {
        Description = "Directory of sockets and process numbers.",
        HelpName = "dir",
    };

    private readonly Option<string> _state = new("--state-dir")
    {
        Description = "Directory of logs, leases and snapshots.",
        HelpName = "dir",
    };

    internal void AddTo(Command command, bool withDefinitions)
    {
        if (withDefinitions)
        {
            command.Add(_definitions);
        }

        command.Add(_run);
        command.Add(_state);
    }

    internal FleetPaths Resolve(ParseResult result)
    {
        FleetPaths paths = FleetPaths.Default();
        return new FleetPaths(
            Path.GetFullPath(result.GetValue(_definitions) ?? paths.Definitions),
            Path.GetFullPath(result.GetValue(_run) ?? paths.Run),
            Path.GetFullPath(result.GetValue(_state) ?? paths.State));
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.CommandLine;
using System.Diagnostics;
using System.IO;
using System.Text.Json;
using System.Threading;
using System.Threading.Tasks;
using Vmm.Config;
using Vmm.Fleet;
using Vmm.Fleet.Control;

namespace Vmctl.Commands;

/// <summary>
/// The fleet as commands reach it: through the daemon where there is one, and otherwise through the sockets of the VMs
/// that run (also those of <c>vmctl run</c>).
/// </summary>
internal sealed class FleetAccess : IDisposable
{
    private static readonly TimeSpan s_startPatience = TimeSpan.FromSeconds(10);

    private readonly FleetClient _client;

    internal FleetAccess(FleetPaths paths)
    {
        Paths = paths;
        _client = new FleetClient(paths.DaemonSocket);
    }

    internal FleetPaths Paths { get; }

    internal FleetClient Client => _client;

    internal Task<bool> HasDaemonAsync(CancellationToken cancellation) => _client.IsUpAsync(cancellation);

    /// <summary>Calls the daemon and turns what it refuses into the statuses of the contract.</summary>
    internal async Task<JsonElement> CallAsync(bool isPost, string path, CancellationToken cancellation)
    {
        FleetAnswer answer = await _client.CallAsync(isPost, path, cancellation).ConfigureAwait(false);
        if (answer.IsOk)
        {
            return answer.Body;
        }

        throw new CommandException(
            answer.Status switch
            {
                404 => ExitStatus.NoInput,
                409 => ExitStatus.WrongState,
                422 => ExitStatus.Config,
                _ => ExitStatus.Failed,
            },
            answer.Error);
    }

    /// <summary>The daemon, or a line that says how to get one.</summary>
    internal async Task NeedDaemonAsync(CancellationToken cancellation)
    {
        if (!await HasDaemonAsync(cancellation).ConfigureAwait(false))
        {
            throw new CommandException(
                ExitStatus.WrongState,
                $"no daemon listens on {Paths.DaemonSocket}; start one with \"vmctl daemon\", or run one VM with \"vmctl run FILE\"");
        }
    }

    /// <summary>The control socket of a running VM.</summary>
    /// <exception cref="CommandException">There is none: 66 unknown, 75 not running.</exception>
    internal async Task<ControlClient> ConnectAsync(string name, CancellationToken cancellation)
    {
        // One that is just starting has a process and does not listen yet.
        long start = Stopwatch.GetTimestamp();
        while (MachineNames.IsName(name))
        {
            VmPaths vm = Paths.Of(name);
            if (await ControlClient.TryConnectAsync(vm.Control, cancellation).ConfigureAwait(false) is { } client)
            {
                return client;
            }

            if (!VmProcess.IsAlive(vm) || Stopwatch.GetElapsedTime(start) > s_startPatience)
            {
                break;
            }

            await Task.Delay(50, cancellation).ConfigureAwait(false);
        }

        throw await NotRunningAsync(name, cancellation).ConfigureAwait(false);
    }

    /// <summary>Why a VM cannot be reached.</summary>
    internal async Task<CommandException> NotRunningAsync(string name, CancellationToken cancellation)
    {
        List<string> known = await NamesAsync(cancellation).ConfigureAwait(false);
        return known.Contains(name)
            ? new CommandException(ExitStatus.WrongState, $"\"{name}\" is not running")
            : new CommandException(ExitStatus.NoInput, $"no VM is called \"{name}\"{Suggestion.Ending(name, known)}");
    }

    /// <summary>All names that mean something: declared, or running.</summary>
    internal async Task<List<string>> NamesAsync(CancellationToken cancellation)
    {
        var names = new List<string>();
        if (await HasDaemonAsync(cancellation).ConfigureAwait(false))
        {
            JsonElement list = await CallAsync(false, "/v1/vms", cancellation).ConfigureAwait(false);
            foreach (JsonElement vm in list.GetProperty("vms").EnumerateArray())
            {
                names.Add(vm.GetProperty("name").GetString()!);
            }
        }

        foreach (string name in RunningNames())
        {
            if (!names.Contains(name))
            {
                names.Add(name);
            }
        }

        return names;
    }

    /// <summary>Names of VMs whose process is alive, by their run directories.</summary>
    internal List<string> RunningNames()
    {
        var names = new List<string>();
        if (Directory.Exists(Paths.Run))
        {
            foreach (string directory in Directory.EnumerateDirectories(Paths.Run))
            {
                string name = Path.GetFileName(directory);
                if (VmProcess.IsAlive(Paths.Of(name)))
                {
                    names.Add(name);
                }
            }
        }

        names.Sort(StringComparer.Ordinal);
        return names;
    }

    public void Dispose() => _client.Dispose();
}

/// <summary>An argument that names a VM, and the options that move the fleet's directories.</summary>
internal sealed class VmArguments
{
    private readonly PathOptions _paths = new();
    private readonly Argument<string[]>? _names;
    private readonly Argument<string>? _name;

    internal VmArguments(Command command, bool several = false, bool optional = false)
    {
        if (several)
        {
            _names = new Argument<string[]>("name")
            {
                Description = "Names of VMs.",
                Arity = optional ? ArgumentArity.ZeroOrMore : ArgumentArity.OneOrMore,
            };
            command.Add(_names);
        }
        else
        {
            _name = new Argument<string>("name")
            {
                Description = "Name of a VM.",
                Arity = optional ? ArgumentArity.ZeroOrOne : ArgumentArity.ExactlyOne,
            };
            command.Add(_name);
        }

        _paths.AddTo(command, withDefinitions: false);
    }

    internal string[] All(ParseResult result)
    {
        if (_names is not null)
        {
            return result.GetValue(_names) ?? [];
        }

        return result.GetValue(_name!) is { } name ? [name] : [];
    }

    internal string One(ParseResult result) => All(result)[0];

    internal FleetAccess Open(ParseResult result) => new(_paths.Resolve(result));
}

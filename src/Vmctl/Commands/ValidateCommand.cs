// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;
using System.CommandLine;
using System.IO;
using Vmm.Config;

namespace Vmctl.Commands;

/// <summary><c>vmctl validate</c>: reads definitions and says everything that is wrong with them.</summary>
internal static class ValidateCommand
{
    internal static Command Create(CommandContext context)
    {
        var files = new Argument<string[]>("file")
        {
            Description = "File of definitions, or a directory of them.",
            Arity = ArgumentArity.OneOrMore,
        };
        var textOnly = new Option<bool>("--text-only")
        {
            Description = "Do not look for the kernels, disks and other files that definitions name.",
        };
        var format = CommonOptions.Output();
        var command = new Command("validate", "Check definitions and report every error with its line and column.")
        {
            files,
            textOnly,
            format,
        };
        command.SetAction(result => Validate(
            context, result.GetRequiredValue(files), result.GetValue(textOnly), CommonOptions.Format(result, format)));
        return command;
    }

    private static int Validate(CommandContext context, string[] files, bool textOnly, OutputFormat format)
    {
        var errors = new List<Diagnostic>();
        int status = ExitStatus.Ok;
        int machines = 0;
        foreach (string file in files)
        {
            try
            {
                FleetSpec fleet = Directory.Exists(file) ? ConfigFiles.LoadDirectory(file) : ConfigFiles.LoadFile(file);
                machines += fleet.Machines.Count;
                foreach (MachineSpec machine in fleet.Machines)
                {
                    errors.AddRange(textOnly ? [] : HostCheck.Check(machine));
                }
            }
            catch (ConfigException failure)
            {
                errors.AddRange(failure.Diagnostics);
                status = failure.Failure == ConfigFailure.NoInput ? ExitStatus.NoInput : status;
            }
        }

        if (errors.Count > 0 && status == ExitStatus.Ok)
        {
            status = ExitStatus.Config;
        }

        if (format != OutputFormat.Table)
        {
            var listing = new Listing("file", "line", "column", "message");
            foreach (Diagnostic error in errors)
            {
                listing.Add(error.At.File, error.At.Line, error.At.Column, error.Message);
            }

            listing.Write(context.Output, format, colour: false, width: 0);
            return status;
        }

        foreach (Diagnostic error in errors)
        {
            context.Error.WriteLine(error.ToString());
        }

        if (errors.Count == 0)
        {
            context.Output.WriteLine(machines == 1 ? "1 VM, no errors" : $"{machines} VMs, no errors");
        }

        return status;
    }
}

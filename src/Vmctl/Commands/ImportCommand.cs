// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.CommandLine;
using System.IO;
using Vmm.Config;
using Vmm.Fleet;
using Vmm.Fleet.Import;

namespace Vmctl.Commands;

/// <summary><c>vmctl import</c>: definitions of other programs as ours, and a list of what is lost.</summary>
internal static class ImportCommand
{
    private const int MaxFileBytes = 1 << 20;

    internal static Command Create(CommandContext context)
    {
        var format = new Argument<string>("format") { Description = string.Join(", ", Importer.Formats) + "." };
        var file = new Argument<string>("file") { Description = "The foreign definition; for qemu a file with the command line." };
        var output = new Option<string>("--write", "-w")
        {
            Description = "Write NAME.yaml into this directory instead of to standard output.",
            HelpName = "dir",
        };
        var command = new Command("import", "Turn a definition of another program into one of ours; what is lost goes to standard error.")
        {
            format,
            file,
            output,
        };
        command.SetAction(result => Import(
            context, result.GetRequiredValue(format), result.GetRequiredValue(file), result.GetValue(output)));
        return command;
    }

    private static int Import(CommandContext context, string format, string file, string? directory)
    {
        IReadOnlyList<ImportedVm> vms;
        try
        {
            if (File.Exists(file) && new FileInfo(file).Length > MaxFileBytes)
            {
                throw new FormatException("is larger than 1 MiB");
            }

            vms = Importer.Read(format, File.ReadAllText(file), Path.GetFileNameWithoutExtension(file));
        }
        catch (FormatException wrong)
        {
            bool isUsage = !((List<string>)[.. Importer.Formats]).Contains(format);
            throw new CommandException(isUsage ? ExitStatus.Usage : ExitStatus.Config, isUsage ? wrong.Message : $"{file}: {wrong.Message}");
        }
        catch (Exception absent) when (absent is FileNotFoundException or DirectoryNotFoundException or UnauthorizedAccessException)
        {
            throw new CommandException(ExitStatus.NoInput, $"{file}: no such file, or it cannot be read");
        }

        for (int i = 0; i < vms.Count; i++)
        {
            ImportedVm vm = vms[i];
            foreach (string lost in vm.Lost)
            {
                context.Error.WriteLine($"{vm.Name}: {lost}");
            }

            // What an importer makes is judged by the parser like everything else.
            ConfigFiles.Parse(vm.Yaml, $"{vm.Name} (imported)", Path.GetDirectoryName(Path.GetFullPath(file)) ?? "/");
            if (directory is not null)
            {
                VmProcess.WriteWhole(Path.Combine(directory, vm.Name + ".yaml"), vm.Yaml);
                continue;
            }

            context.Output.Write(i > 0 ? "---\n" + vm.Yaml : vm.Yaml);
        }

        return ExitStatus.Ok;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.CommandLine;
using System.IO;
using Vmm.Backends.Block;
using Vmm.Config;

namespace Vmctl.Commands;

/// <summary><c>vmctl create</c>: makes a disk image.</summary>
internal static class CreateCommand
{
    internal static Command Create(CommandContext context)
    {
        var file = new Argument<string>("disk") { Description = "Image file; qcow2: or raw: before it chooses the format, as does its ending." };
        var size = new Option<string>("--size", "-s") { Description = "Size, such as 10G; needed without a backing file.", HelpName = "size" };
        var backing = new Option<string>("--backing", "-b") { Description = "Image that the new one shows until it is written to.", HelpName = "file" };
        var preallocate = new Option<bool>("--preallocate") { Description = "Reserve all of its space on the host now." };
        var command = new Command("create", "Make a disk image.") { file, size, backing, preallocate };
        command.SetAction(result =>
        {
            Make(context, result.GetRequiredValue(file), result.GetValue(size), result.GetValue(backing), result.GetValue(preallocate));
            return ExitStatus.Ok;
        });
        return command;
    }

    private static void Make(CommandContext context, string file, string? size, string? backing, bool preallocate)
    {
        (string format, string path) = file switch
        {
            _ when file.StartsWith("qcow2:", StringComparison.Ordinal) => ("qcow2", file["qcow2:".Length..]),
            _ when file.StartsWith("raw:", StringComparison.Ordinal) => ("raw", file["raw:".Length..]),
            _ when file.EndsWith(".qcow2", StringComparison.Ordinal) || backing is not null => ("qcow2", file),
            _ => ("raw", file),
        };
        long bytes = 0;
        if (size is not null && (!Quantity.TryParseSize(size, out bytes) || bytes < 512 || bytes % 512 != 0))
        {
            throw new CommandException(ExitStatus.Usage, $"create: --size takes a multiple of 512 bytes such as 10G, not \"{size}\"");
        }

        if (size is null && backing is null)
        {
            throw new CommandException(ExitStatus.Usage, "create: give a --size, or a --backing file to take it from");
        }

        if (File.Exists(path) || Directory.Exists(path))
        {
            throw new CommandException(ExitStatus.Failed, $"{path}: is there already");
        }

        var options = new DiskImageOptions
        {
            Format = format,
            LengthBytes = bytes,
            BackingPath = backing,
            Preallocation = preallocate ? DiskPreallocation.Reserve : DiskPreallocation.Off,
        };
        using var progress = new ProgressBar(context, Path.GetFileName(path));
        using var interruption = new Interruption();
        try
        {
            DiskImage.Create(path, options, progress, interruption.Token);
        }
        catch (ImageException wrong)
        {
            throw new CommandException(ExitStatus.Failed, wrong.Message);
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.CommandLine;
using System.IO;
using Vmm.Fleet;
using Vmm.Host;
using Vmm.Kvm;

namespace Vmctl.Commands;

/// <summary><c>vmctl doctor</c>: what works on this host, what does not, why, and what to do.</summary>
internal static class DoctorCommand
{
    internal static Command Create(CommandContext context)
    {
        var format = CommonOptions.Output();
        var command = new Command("doctor", "Say which drivers work on this host and, if one does not, why and what to do.") { format };
        command.SetAction(result => Examine(context, CommonOptions.Format(result, format)));
        return command;
    }

    private static int Examine(CommandContext context, OutputFormat format)
    {
        KvmDiagnosis kvm = KvmProbe.Diagnose();
        string chosen = kvm.Status == KvmStatus.Fast ? "kvm" : "soft";
        var listing = new Listing("what", "works", "finding", "advice");
        listing.Add("kvm", kvm.IsUsable, kvm.Summary, kvm.Advice);
        listing.Add("soft", true, "the software CPU works on every x86-64 host", null);
        listing.Add("accel: auto", true, "takes " + chosen, null);
        AddFirmware(listing);
        AddDirectories(listing, FleetPaths.Default());
        if (format != OutputFormat.Table)
        {
            listing.Write(context.Output, format, colour: false, width: 0);
            return ExitStatus.Ok;
        }

        listing.WriteFindings(context.Output, context.UseColour);
        return ExitStatus.Ok;
    }

    private static void AddFirmware(Listing listing)
    {
        (string Name, string[] Places, string Advice)[] firmware =
        [
            ("seabios", ["/usr/share/seabios/bios-256k.bin", "/usr/local/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin",
                "/usr/local/share/qemu/bios-256k.bin"], Package("seabios", "seabios", "system/qemu")),
            ("uefi", ["/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/local/share/edk2-bhyve/BHYVE_UEFI_CODE.fd",
                "/usr/local/share/qemu/edk2-x86_64-code.fd"], Package("ovmf", "edk2-qemu-x64", "system/qemu")),
        ];
        foreach ((string name, string[] places, string advice) in firmware)
        {
            string? found = Array.Find(places, File.Exists);
            listing.Add(
                "firmware: " + name,
                found is not null,
                found ?? "not in the usual places",
                found is null ? advice + ", or give its path in \"firmware:\"" : null);
        }
    }

    private static string Package(string debian, string freeBsd, string illumos) => OsAbi.Current.System switch
    {
        HostSystem.FreeBsd => "pkg install " + freeBsd,
        HostSystem.Illumos => "pkg install " + illumos,
        _ => "apt-get install " + debian,
    };

    private static void AddDirectories(Listing listing, FleetPaths paths)
    {
        foreach ((string what, string directory) in new[] { ("run directory", paths.Run), ("state directory", paths.State) })
        {
            try
            {
                FleetPaths.MakePrivate(directory);
                FleetPaths.CheckSocket(Path.Combine(directory, new string('x', 16), "control.sock"));
                listing.Add(what, true, directory, null);
            }
            catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
            {
                listing.Add(what, false, failure.Message.ReplaceLineEndings(" "), "move it with VMM_RUN_DIR or VMM_STATE_DIR");
            }
        }
    }
}

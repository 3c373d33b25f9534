// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using Vmm.Config;

namespace Vmm.Fleet.Import;

/// <summary>A command line of qemu-system-x86_64.</summary>
internal static class QemuImport
{
    internal static ImportedVm Read(string text, string name)
    {
        List<string> words = ShellWords.Split(text.Replace("\\\n", " ", StringComparison.Ordinal), splitEquals: false);
        var vm = new ImportDraft(name);
        string? kernel = null;
        string? initrd = null;
        string? append = null;
        for (int i = 0; i < words.Count; i++)
        {
            string word = words[i];
            if (word.Length == 0 || word[0] != '-')
            {
                if (i > 0)
                {
                    vm.Item("disks", $"path: {SpecWriter.Quote(word)}, bus: ide");
                }

                continue;
            }

            string Value() => i + 1 < words.Count ? words[++i] : throw new FormatException($"{word} is followed by nothing");
            switch (word.TrimStart('-'))
            {
                case "name":
                    vm.Name = Value().Split(',')[0].Replace("guest=", string.Empty, StringComparison.Ordinal);
                    break;
                case "m":
                    string memory = Value().Split(',')[0].Replace("size=", string.Empty, StringComparison.Ordinal);
                    vm.Size("memory", char.IsAsciiDigit(memory[^1]) ? memory + "M" : memory);
                    break;
                case "smp":
                    vm.Cpus(Value().Split(',')[0].Replace("cpus=", string.Empty, StringComparison.Ordinal), null, null);
                    break;
                case "enable-kvm":
                    vm.Line("accel: [kvm, soft]");
                    break;
                case "accel":
                    vm.Line(Value().StartsWith("kvm", StringComparison.Ordinal) ? "accel: [kvm, soft]" : "accel: soft");
                    break;
                case "kernel":
                    kernel = Value();
                    break;
                case "initrd":
                    initrd = Value();
                    break;
                case "append":
                    append = Value();
                    break;
                case "hda" or "hdb" or "hdc" or "hdd":
                    vm.Item("disks", $"path: {SpecWriter.Quote(Value())}, bus: ide");
                    break;
                case "fda" or "fdb":
                    vm.Item("disks", $"path: {SpecWriter.Quote(Value())}, bus: floppy");
                    break;
                case "cdrom":
                    vm.Item("disks", $"path: {SpecWriter.Quote(Value())}, bus: cdrom");
                    break;
                case "drive":
                    ReadDrive(Value(), vm);
                    break;
                case "bios":
                    vm.Line($"boot: {{firmware: {SpecWriter.Quote(Value())}}}");
                    break;
                case "nic" or "netdev" or "net":
                    string net = Value();
                    if (net.StartsWith("user", StringComparison.Ordinal))
                    {
                        vm.Item("nics", "backend: user");
                    }
                    else if (net.StartsWith("tap", StringComparison.Ordinal) && Option(net, "ifname") is { } tap)
                    {
                        vm.Item("nics", $"backend: \"tap:{tap}\"");
                    }
                    else if (net is not "none" && !net.StartsWith("nic", StringComparison.Ordinal))
                    {
                        vm.Lose($"{word} {net}: not known here");
                    }

                    break;
                case "vga":
                    vm.Display("vga: " + Value() switch { "vmware" => "vmware", "virtio" => "virtio", "none" => "none", _ => "std" });
                    break;
                case "vnc":
                    string vnc = Value();
                    int colon = vnc.LastIndexOf(':');
                    bool isNumber = int.TryParse(vnc.AsSpan(colon + 1), NumberStyles.None, CultureInfo.InvariantCulture, out int display);
                    vm.Display(isNumber ? $"vnc: \"127.0.0.1:{5900 + display}\"" : $"vnc: {SpecWriter.Quote(vnc)}");
                    break;
                case "rtc":
                    if (Value().Contains("localtime", StringComparison.Ordinal))
                    {
                        vm.Line("clock: {localtime: true}");
                    }

                    break;
                case "uuid":
                    vm.Text("uuid", Value());
                    break;
                case "device" when i + 1 < words.Count && words[i + 1].StartsWith("virtio-rng", StringComparison.Ordinal):
                    Value();
                    vm.Line("rng: true");
                    break;
                case "device" when i + 1 < words.Count && words[i + 1].StartsWith("virtio-balloon", StringComparison.Ordinal):
                    Value();
                    vm.Line("balloon: true");
                    break;
                case "device" when i + 1 < words.Count && words[i + 1].StartsWith("virtio-net", StringComparison.Ordinal):
                    Value();
                    break;
                case "device" when i + 1 < words.Count && words[i + 1].StartsWith("isa-debug-exit", StringComparison.Ordinal):
                    vm.Line("debug-exit: " + (Option(Value(), "iobase") ?? "0x501"));
                    break;
                case "nographic" or "daemonize" or "no-reboot" or "nodefaults":
                    break;
                case "cpu" or "machine" or "M" or "serial" or "display" or "monitor" or "boot" or "usb" or "device" or "object" or "chardev" or "qmp":
                    bool hasValue = i + 1 < words.Count && !words[i + 1].StartsWith('-');
                    string value = hasValue ? Value() : string.Empty;
                    if (word is "-machine" or "-M" && value.Contains("accel=kvm", StringComparison.Ordinal))
                    {
                        vm.Line("accel: [kvm, soft]");
                    }
                    else
                    {
                        vm.Lose($"{word} {value}".TrimEnd() + ": not carried over");
                    }

                    break;
                default:
                    bool valued = i + 1 < words.Count && !words[i + 1].StartsWith('-');
                    vm.Lose($"{word}{(valued ? " " + Value() : string.Empty)}: not known here");
                    break;
            }
        }

        if (kernel is not null)
        {
            vm.Line("boot: {kernel: " + SpecWriter.Quote(kernel)
                + (initrd is null ? string.Empty : ", initrd: " + SpecWriter.Quote(initrd))
                + (append is null ? string.Empty : ", cmdline: " + SpecWriter.Quote(append)) + "}");
        }

        return vm.Finish(null);
    }

    private static void ReadDrive(string options, ImportDraft vm)
    {
        string? file = Option(options, "file");
        string bus = Option(options, "media") is "cdrom" ? "cdrom" : Option(options, "if") switch
        {
            "ide" => "ide",
            "floppy" => "floppy",
            "pflash" => "pflash",
            _ => "virtio",
        };
        if (bus is "pflash")
        {
            vm.Line("boot: {firmware: uefi}");
            vm.Lose($"-drive {options}: the firmware's flash is made by itself");
            return;
        }

        if (file is null)
        {
            vm.Lose($"-drive {options}: has no file");
            return;
        }

        string format = Option(options, "format") is { } given and ("raw" or "qcow2") ? $", format: {given}" : string.Empty;
        vm.Item("disks", $"path: {SpecWriter.Quote(file)}, bus: {bus}{format}");
    }

    private static string? Option(string options, string name)
    {
        foreach (string part in options.Split(','))
        {
            if (part.StartsWith(name + "=", StringComparison.Ordinal))
            {
                return part[(name.Length + 1)..];
            }
        }

        return null;
    }
}

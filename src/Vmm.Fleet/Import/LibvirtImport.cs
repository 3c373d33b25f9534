// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Text;
using System.Xml;
using System.Xml.Linq;
using Vmm.Config;

namespace Vmm.Fleet.Import;

/// <summary>libvirt's domain XML.</summary>
internal static class LibvirtImport
{
    internal static ImportedVm Read(string text)
    {
        XDocument document;
        try
        {
            var settings = new XmlReaderSettings { DtdProcessing = DtdProcessing.Prohibit, MaxCharactersInDocument = 1 << 20 };
            using var reader = XmlReader.Create(new StringReader(text), settings);
            document = XDocument.Load(reader);
        }
        catch (XmlException wrong)
        {
            throw new FormatException("not XML: " + wrong.Message.ReplaceLineEndings(" "), wrong);
        }

        XElement domain = document.Root is { Name.LocalName: "domain" } root ? root : throw new FormatException("not a domain");
        var vm = new ImportDraft((string?)domain.Element("name") ?? "vm");
        foreach (XElement element in domain.Elements())
        {
            switch (element.Name.LocalName)
            {
                case "name" or "currentMemory" or "features" or "on_poweroff" or "on_crash" or "pm" or "metadata" or "title":
                    break;
                case "on_reboot":
                    break;
                case "uuid":
                    vm.Text("uuid", element.Value.Trim());
                    break;
                case "description":
                    vm.Text("description", element.Value.Trim().ReplaceLineEndings(" "));
                    break;
                case "memory":
                    string unit = ((string?)element.Attribute("unit") ?? "KiB")[..1];
                    vm.Size("memory", element.Value.Trim() + (unit is "b" ? string.Empty : unit));
                    break;
                case "vcpu":
                    vm.Cpus(element.Value.Trim(), null, null);
                    break;
                case "os":
                    ReadBoot(element, vm);
                    break;
                case "clock":
                    if ((string?)element.Attribute("offset") is "localtime")
                    {
                        vm.Line("clock: {localtime: true}");
                    }

                    break;
                case "cpu":
                    if ((string?)element.Attribute("mode") is { } mode and not ("host-passthrough" or "host-model"))
                    {
                        vm.Lose($"cpu mode={mode}: see \"model\" of \"cpus\"");
                    }

                    break;
                case "devices":
                    foreach (XElement device in element.Elements())
                    {
                        ReadDevice(device, vm);
                    }

                    break;
                default:
                    vm.Lose($"<{element.Name.LocalName}>: not known here");
                    break;
            }
        }

        return vm.Finish(null);
    }

    private static void ReadBoot(XElement os, ImportDraft vm)
    {
        if (os.Element("kernel") is { } kernel)
        {
            var boot = new StringBuilder("boot: {kernel: " + SpecWriter.Quote(kernel.Value.Trim()));
            boot.Append(os.Element("initrd") is { } initrd ? ", initrd: " + SpecWriter.Quote(initrd.Value.Trim()) : string.Empty);
            boot.Append(os.Element("cmdline") is { } cmdline ? ", cmdline: " + SpecWriter.Quote(cmdline.Value.Trim()) : string.Empty);
            vm.Line(boot.Append('}').ToString());
            return;
        }

        bool uefi = os.Element("loader") is not null || (string?)os.Attribute("firmware") is "efi";
        var order = new List<string>();
        foreach (XElement boot in os.Elements("boot"))
        {
            order.Add((string?)boot.Attribute("dev") switch { "hd" => "disk", "fd" => "floppy", "network" => "net", _ => "cdrom" });
        }

        string orderText = order.Count == 0 ? string.Empty : $", order: [{string.Join(", ", order)}]";
        vm.Line($"boot: {{firmware: {(uefi ? "uefi" : "seabios")}{orderText}}}");
    }

    private static void ReadDevice(XElement device, ImportDraft vm)
    {
        switch (device.Name.LocalName)
        {
            case "disk":
                XElement? source = device.Element("source");
                string? path = (string?)source?.Attribute("file") ?? (string?)source?.Attribute("dev");
                string kind = (string?)device.Attribute("device") ?? "disk";
                string bus = kind switch
                {
                    "cdrom" => "cdrom",
                    "floppy" => "floppy",
                    _ => (string?)device.Element("target")?.Attribute("bus") switch
                    {
                        "ide" => "ide",
                        "sata" => "ahci",
                        "scsi" => "scsi",
                        _ => "virtio",
                    },
                };
                if (path is null && kind is "disk")
                {
                    vm.Lose("<disk>: of a kind that has no file or device");
                    return;
                }

                string format = (string?)device.Element("driver")?.Attribute("type") is { } type and ("raw" or "qcow2") ? $", format: {type}" : string.Empty;
                string readOnly = device.Element("readonly") is not null && kind is "disk" ? ", readonly: true" : string.Empty;
                vm.Item("disks", (path is null ? string.Empty : $"path: {SpecWriter.Quote(path)}, ") + $"bus: {bus}{format}{readOnly}");
                break;
            case "interface":
                string? mac = (string?)device.Element("mac")?.Attribute("address");
                string model = (string?)device.Element("model")?.Attribute("type") switch { "e1000" => "e1000", "rtl8139" => "rtl8139", _ => "virtio" };
                if ((string?)device.Attribute("type") is not "user")
                {
                    vm.Lose("<interface>: its network became user-mode NAT; for a bridge make a tap on it and write backend: tap:NAME");
                }

                vm.Item("nics", $"backend: user, model: {model}" + (mac is null ? string.Empty : $", mac: \"{mac}\""));
                break;
            case "graphics":
                if ((string?)device.Attribute("type") is "vnc")
                {
                    string port = (string?)device.Attribute("port") is { } given and not "-1" ? given : "5900";
                    vm.Display($"vnc: \"127.0.0.1:{port}\"");
                }
                else
                {
                    vm.Lose($"<graphics type={(string?)device.Attribute("type")}>: use VNC");
                }

                break;
            case "video":
                string? card = (string?)device.Element("model")?.Attribute("type");
                vm.Display("vga: " + card switch { "vmvga" => "vmware", "virtio" => "virtio", "none" => "none", _ => "std" });
                break;
            case "rng":
                vm.Line("rng: true");
                break;
            case "memballoon":
                if ((string?)device.Attribute("model") is not "none")
                {
                    vm.Line("balloon: true");
                }

                break;
            case "watchdog":
                vm.Line("watchdog: " + ((string?)device.Attribute("action") is "poweroff" or "shutdown" ? "poweroff" : "reset"));
                break;
            case "emulator" or "controller" or "serial" or "console" or "input" or "channel":
                break;
            default:
                vm.Lose($"<{device.Name.LocalName}>: not known here");
                break;
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Text;
using System.Text.Json;
using System.Xml;
using System.Xml.Linq;
using Vmm.Config;

namespace Vmm.Fleet;

// Theory. Each importer turns one foreign definition into our YAML text and a list of what it could not carry over: keys
// that mean nothing here, and keys that mean something we do not have. It writes text, not records, and the text goes
// through the same parser as every other definition: what an importer makes is checked like what a person writes. Nothing is
// dropped in silence: every foreign key is either used or listed.

/// <summary>A definition made from a foreign one.</summary>
/// <param name="Name">Name of the VM.</param>
/// <param name="Yaml">The definition.</param>
/// <param name="Lost">What could not be carried over, one line each.</param>
public sealed record ImportedVm(string Name, string Yaml, IReadOnlyList<string> Lost);

/// <summary>Reads definitions of other programs. Pure functions over text; any thread.</summary>
public static class Importer
{
    /// <summary>What can be read.</summary>
    public static IReadOnlyList<string> Formats { get; } = ["vm-bhyve", "vm.conf", "vmadm", "libvirt", "qemu"];

    /// <summary>Reads one file.</summary>
    /// <param name="format">One of <see cref="Formats"/>.</param>
    /// <param name="text">Its text.</param>
    /// <param name="name">Name for formats that carry none: the file's, without its ending.</param>
    /// <exception cref="FormatException">The text is not of that format.</exception>
    public static IReadOnlyList<ImportedVm> Read(string format, string text, string name)
    {
        ArgumentNullException.ThrowIfNull(text);
        return format switch
        {
            "vm-bhyve" => [VmBhyve(text, name)],
            "vm.conf" => VmConf(text),
            "vmadm" => [Vmadm(text)],
            "libvirt" => [Libvirt(text)],
            "qemu" => [Qemu(text, name)],
            _ => throw new FormatException($"\"{format}\" cannot be imported; {string.Join(", ", Formats)} can{Suggestion.Ending(format, Formats)}"),
        };
    }

    // vm-bhyve: shell assignments, key="value".
    private static ImportedVm VmBhyve(string text, string name)
    {
        var keys = new Dictionary<string, string>(StringComparer.Ordinal);
        foreach (string raw in text.Split('\n'))
        {
            string line = raw.Trim();
            int equals = line.IndexOf('=', StringComparison.Ordinal);
            if (line.Length == 0 || line[0] == '#')
            {
                continue;
            }

            if (equals <= 0)
            {
                throw new FormatException($"\"{line}\" is not a line of vm-bhyve (key=\"value\")");
            }

            keys[line[..equals].Trim()] = line[(equals + 1)..].Trim().Trim('"', '\'');
        }

        var vm = new Draft(name);
        string loader = Draft.Take(keys, "loader") ?? "bhyveload";
        switch (loader)
        {
            case "uefi" or "uefi-csm" or "uefi-custom":
                vm.Line("boot: {firmware: uefi}");
                break;
            case "grub":
                vm.Lose("loader: grub-bhyve is not needed: the disk boots through SeaBIOS");
                break;
            default:
                vm.Lose($"loader: {loader} is not needed: the disk boots through SeaBIOS (install a boot loader on it)");
                break;
        }

        vm.Cpus(Draft.Take(keys, "cpu"), Draft.Take(keys, "cpu_sockets"), Draft.Take(keys, "cpu_threads"));
        Draft.Take(keys, "cpu_cores");
        vm.Size("memory", Draft.Take(keys, "memory"));
        vm.Text("uuid", Draft.Take(keys, "uuid"));
        if (Draft.Take(keys, "virt_random") is "yes")
        {
            vm.Line("rng: true");
        }

        if (Draft.Take(keys, "utctime") is "no")
        {
            vm.Line("clock: {localtime: true}");
        }

        if (Draft.Take(keys, "graphics") is "yes")
        {
            string port = Draft.Take(keys, "graphics_port") ?? "5900";
            string host = Draft.Take(keys, "graphics_listen") ?? "127.0.0.1";
            vm.Line($"display: {{vga: std, vnc: {SpecWriter.Quote($"{host}:{port}")}}}");
        }

        if (Draft.Take(keys, "xhci_mouse") is "yes")
        {
            vm.Line("input: [ps2, usb-tablet]");
        }

        for (int i = 0; keys.TryGetValue($"disk{i}_name", out string? disk); i++)
        {
            keys.Remove($"disk{i}_name");
            string kind = Draft.Take(keys, $"disk{i}_type") ?? "virtio-blk";
            string device = Draft.Take(keys, $"disk{i}_dev") ?? "file";
            string bus = kind switch { "ahci-hd" => "ahci", "ahci-cd" => "cdrom", "nvme" => "nvme", _ => "virtio" };
            string? size = Draft.Take(keys, $"disk{i}_size");
            if (device is not ("file" or "custom"))
            {
                vm.Lose($"disk{i}_dev: {device} is not known here; give the path of its block device as \"path\"");
            }

            vm.Item("disks", $"path: {SpecWriter.Quote(disk)}, bus: {bus}" + (size is null ? string.Empty : $", size: {size}"));
        }

        for (int i = 0; keys.TryGetValue($"network{i}_type", out string? kind); i++)
        {
            keys.Remove($"network{i}_type");
            string model = kind switch { "e1000" => "e1000", _ => "virtio" };
            string? mac = Draft.Take(keys, $"network{i}_mac");
            string? device = Draft.Take(keys, $"network{i}_device");
            string? vmSwitch = Draft.Take(keys, $"network{i}_switch");
            string backend = device is null ? "user" : "tap:" + device;
            if (vmSwitch is not null && device is null)
            {
                vm.Lose($"network{i}_switch: \"{vmSwitch}\" became user-mode NAT; for a bridge make a tap on it and write backend: tap:NAME");
            }

            vm.Item("nics", $"backend: {SpecWriter.Quote(backend)}, model: {model}" + (mac is null ? string.Empty : $", mac: \"{mac}\""));
        }

        return vm.Finish(keys);
    }

    // OpenBSD vm.conf(5): vm "name" { statements }.
    private static List<ImportedVm> VmConf(string text)
    {
        var words = new Queue<string>(Words(text, splitEquals: true));
        var macros = new Dictionary<string, string>(StringComparer.Ordinal);
        var result = new List<ImportedVm>();
        var outside = new List<string>();
        while (words.TryDequeue(out string? word))
        {
            if (word is "vm")
            {
                result.Add(VmConfOne(words, macros, outside));
                outside = [];
                continue;
            }

            if (words.TryPeek(out string? next) && next is "=")
            {
                words.Dequeue();
                macros["$" + word] = words.TryDequeue(out string? value) ? value : string.Empty;
            }
            else if (word is "switch" or "include" or "local" or "socket" or "staggered")
            {
                outside.Add($"{word}: has no place in a VM's definition");
                SkipStatement(words);
            }
            else
            {
                throw new FormatException($"\"{word}\" is not a statement of vm.conf");
            }
        }

        return result.Count > 0 ? result : throw new FormatException("defines no vm");
    }

    private static void SkipStatement(Queue<string> words)
    {
        int depth = 0;
        while (words.TryPeek(out string? word))
        {
            if (depth == 0 && word is "vm" or "switch" or "include" or "local" or "socket" or "staggered")
            {
                return;
            }

            words.Dequeue();
            depth += word switch { "{" => 1, "}" => -1, _ => 0 };
            if (depth == 0 && word is "}")
            {
                return;
            }
        }
    }

    private static ImportedVm VmConfOne(Queue<string> words, Dictionary<string, string> macros, List<string> outside)
    {
        string Next() => words.TryDequeue(out string? word)
            ? macros.GetValueOrDefault(word, word)
            : throw new FormatException("ends in the middle of a vm");
        var vm = new Draft(Next());
        foreach (string line in outside)
        {
            vm.Lose(line);
        }

        if (Next() is not "{")
        {
            throw new FormatException($"vm \"{vm.Name}\" is followed by no \"{{\"");
        }

        for (string word = Next(); word is not "}"; word = Next())
        {
            switch (word)
            {
                case "enable":
                    break;
                case "disable":
                    vm.Line("autostart: false");
                    break;
                case "memory":
                    vm.Size("memory", Next());
                    break;
                case "disk":
                    string disk = Next();
                    string format = string.Empty;
                    if (words.TryPeek(out string? peek) && peek is "format")
                    {
                        words.Dequeue();
                        format = $", format: {Next().Trim('"')}";
                    }

                    vm.Item("disks", $"path: {SpecWriter.Quote(disk)}{format}");
                    break;
                case "cdrom":
                    vm.Item("disks", $"path: {SpecWriter.Quote(Next())}, bus: cdrom");
                    break;
                case "boot":
                    string boot = Next();
                    if (boot is "device")
                    {
                        vm.Line($"boot: {{order: [{Next()}]}}");
                    }
                    else
                    {
                        vm.Line($"boot: {{kernel: {SpecWriter.Quote(boot)}}}");
                    }

                    break;
                case "interfaces":
                    for (int i = int.Parse(Next(), CultureInfo.InvariantCulture); i > 0; i--)
                    {
                        vm.Item("nics", "backend: user");
                    }

                    break;
                case "local":
                    break;
                case "interface":
                    VmConfInterface(words, vm, Next);
                    break;
                case "owner":
                    string owner = Next();
                    vm.Text("run-as", owner.Split(':')[0]);
                    break;
                default:
                    vm.Lose($"{word}: not known here");
                    if (words.TryPeek(out string? brace) && brace is "{")
                    {
                        for (string inner = Next(); inner is not "}"; inner = Next())
                        {
                        }
                    }

                    break;
            }
        }

        return vm.Finish(null);
    }

    private static void VmConfInterface(Queue<string> words, Draft vm, Func<string> next)
    {
        string backend = "user";
        string extra = string.Empty;
        if (words.TryPeek(out string? tap) && tap.StartsWith("tap", StringComparison.Ordinal))
        {
            backend = "tap:" + next();
        }

        if (words.TryPeek(out string? brace) && brace is "{")
        {
            next();
            for (string word = next(); word is not "}"; word = next())
            {
                switch (word)
                {
                    case "lladdr":
                        extra = $", mac: \"{next()}\"";
                        break;
                    case "switch":
                        vm.Lose($"switch {next()}: became user-mode NAT; for a bridge make a tap on it and write backend: tap:NAME");
                        break;
                    case "group" or "rdomain":
                        vm.Lose($"interface {word} {next()}: not known here");
                        break;
                    default:
                        break;
                }
            }
        }

        vm.Item("nics", $"backend: {SpecWriter.Quote(backend)}{extra}");
    }

    // SmartOS vmadm and zadm: JSON.
    private static ImportedVm Vmadm(string text)
    {
        JsonDocument document;
        try
        {
            document = JsonDocument.Parse(text, new JsonDocumentOptions { AllowTrailingCommas = true, CommentHandling = JsonCommentHandling.Skip });
        }
        catch (JsonException wrong)
        {
            throw new FormatException("not JSON: " + wrong.Message.ReplaceLineEndings(" "), wrong);
        }

        using (document)
        {
            JsonElement root = document.RootElement;
            if (root.ValueKind != JsonValueKind.Object)
            {
                throw new FormatException("not a JSON object");
            }

            string? Value(JsonElement owner, string key) => owner.TryGetProperty(key, out JsonElement value)
                ? value.ValueKind == JsonValueKind.String ? value.GetString() : value.GetRawText()
                : null;
            var vm = new Draft(Value(root, "alias") ?? Value(root, "hostname") ?? Value(root, "zonename") ?? Value(root, "uuid") ?? "vm");
            foreach (JsonProperty property in root.EnumerateObject())
            {
                string raw = property.Value.ValueKind == JsonValueKind.String ? property.Value.GetString()! : property.Value.GetRawText();
                switch (property.Name)
                {
                    case "alias" or "hostname" or "zonename" or "brand":
                        break;
                    case "uuid":
                        vm.Text("uuid", raw);
                        break;
                    case "autoboot":
                        vm.Line($"autostart: {raw}");
                        break;
                    case "vcpus":
                        vm.Cpus(raw, null, null);
                        break;
                    case "ram":
                        vm.Size("memory", long.TryParse(raw, CultureInfo.InvariantCulture, out _) ? raw + "M" : raw);
                        break;
                    case "bootrom":
                        vm.Line(raw.Contains("uefi", StringComparison.OrdinalIgnoreCase) ? "boot: {firmware: uefi}" : "boot: {firmware: seabios}");
                        break;
                    case "vga":
                        vm.Line($"display: {{vga: {(raw is "vmware" or "std" ? raw : "std")}}}");
                        break;
                    case "disks" or "disk" when property.Value.ValueKind == JsonValueKind.Array:
                        foreach (JsonElement disk in property.Value.EnumerateArray())
                        {
                            string? path = Value(disk, "path") ?? Value(disk, "disk_path");
                            string? size = Value(disk, "size") ?? Value(disk, "disk_size");
                            bool isCd = Value(disk, "media") is "cdrom";
                            string bus = isCd ? "cdrom" : Value(disk, "model") switch { "ide" => "ide", "ahci" => "ahci", "nvme" => "nvme", _ => "virtio" };
                            if (path is null)
                            {
                                vm.Lose($"disks: \"{Value(disk, "image_uuid") ?? "a disk"}\" has no path; its zvol is to be named");
                                path = vm.Name + ".raw";
                            }

                            vm.Item("disks", $"path: {SpecWriter.Quote(path)}, bus: {bus}" + (size is null || isCd ? string.Empty
                                : $", size: {(long.TryParse(size, CultureInfo.InvariantCulture, out _) ? size + "M" : size)}"));
                        }

                        break;
                    case "nics" or "net" when property.Value.ValueKind == JsonValueKind.Array:
                        foreach (JsonElement nic in property.Value.EnumerateArray())
                        {
                            string? mac = Value(nic, "mac") ?? Value(nic, "mac_addr");
                            string model = Value(nic, "model") is "e1000" ? "e1000" : "virtio";
                            vm.Item("nics", $"backend: user, model: {model}" + (mac is null ? string.Empty : $", mac: \"{mac}\""));
                            vm.Lose($"nics: {Value(nic, "nic_tag") ?? Value(nic, "physical") ?? "the network"} became user-mode NAT");
                        }

                        break;
                    case "vnc_port":
                        vm.Line($"display: {{vga: std, vnc: \"127.0.0.1:{raw}\"}}");
                        break;
                    default:
                        vm.Lose($"{property.Name}: not known here");
                        break;
                }
            }

            return vm.Finish(null);
        }
    }

    // libvirt's domain XML.
    private static ImportedVm Libvirt(string text)
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
        var vm = new Draft((string?)domain.Element("name") ?? "vm");
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
                    LibvirtBoot(element, vm);
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
                        LibvirtDevice(device, vm);
                    }

                    break;
                default:
                    vm.Lose($"<{element.Name.LocalName}>: not known here");
                    break;
            }
        }

        return vm.Finish(null);
    }

    private static void LibvirtBoot(XElement os, Draft vm)
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

    private static void LibvirtDevice(XElement device, Draft vm)
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

    // A command line of qemu-system-x86_64.
    private static ImportedVm Qemu(string text, string name)
    {
        List<string> words = Words(text.Replace("\\\n", " ", StringComparison.Ordinal), splitEquals: false);
        var vm = new Draft(name);
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
                    QemuDrive(Value(), vm);
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

    private static void QemuDrive(string options, Draft vm)
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

    // Words of a shell or of vm.conf: quotes join, # begins a comment, braces stand alone, and = too where asked (vm.conf).
    private static List<string> Words(string text, bool splitEquals)
    {
        var words = new List<string>();
        var word = new StringBuilder();
        bool inWord = false;
        char quote = '\0';
        for (int i = 0; i < text.Length; i++)
        {
            char c = text[i];
            if (quote != '\0')
            {
                if (c == quote)
                {
                    quote = '\0';
                }
                else
                {
                    word.Append(c);
                }

                continue;
            }

            switch (c)
            {
                case '"' or '\'':
                    quote = c;
                    inWord = true;
                    continue;
                case '#' when !inWord:
                    while (i < text.Length && text[i] != '\n')
                    {
                        i++;
                    }

                    continue;
                case '=' when splitEquals && inWord:
                    words.Add(word.ToString());
                    words.Add("=");
                    word.Clear();
                    inWord = false;
                    continue;
                case '{' or '}' or '=' when !inWord:
                    words.Add(c.ToString());
                    continue;
                default:
                    break;
            }

            if (char.IsWhiteSpace(c))
            {
                if (inWord)
                {
                    words.Add(word.ToString());
                    word.Clear();
                    inWord = false;
                }

                continue;
            }

            inWord = true;
            word.Append(c);
        }

        if (inWord)
        {
            words.Add(word.ToString());
        }

        return words;
    }

    /// <summary>A definition in the making.</summary>
    private sealed class Draft
    {
        private readonly Dictionary<string, string> _lines = new(StringComparer.Ordinal);
        private readonly Dictionary<string, List<string>> _items = new(StringComparer.Ordinal);
        private readonly List<string> _display = [];
        private readonly List<string> _lost = [];

        internal Draft(string name)
        {
            Name = name;
        }

        internal string Name { get; set; }

        internal static string? Take(Dictionary<string, string> keys, string key) => keys.Remove(key, out string? value) ? value : null;

        // A key given twice counts once, the last time.
        internal void Line(string line) => _lines[line[..line.IndexOf(':', StringComparison.Ordinal)]] = line;

        internal void Text(string key, string? value)
        {
            if (value is not null)
            {
                Line($"{key}: {SpecWriter.Quote(value)}");
            }
        }

        internal void Size(string key, string? value)
        {
            if (value is not null)
            {
                Line($"{key}: {value.Trim()}");
            }
        }

        internal void Cpus(string? count, string? sockets, string? threads)
        {
            if (sockets is not null || threads is not null)
            {
                Line($"cpus: {{count: {count ?? "1"}, sockets: {sockets ?? "1"}, threads: {threads ?? "1"}}}");
            }
            else if (count is not null)
            {
                Line("cpus: " + count);
            }
        }

        internal void Display(string member)
        {
            string key = member[..member.IndexOf(':', StringComparison.Ordinal)];
            _display.RemoveAll(other => other.StartsWith(key + ":", StringComparison.Ordinal));
            _display.Add(member);
        }

        internal void Item(string list, string members)
        {
            if (!_items.TryGetValue(list, out List<string>? items))
            {
                _items[list] = items = [];
            }

            items.Add(members);
        }

        internal void Lose(string what)
        {
            if (!_lost.Contains(what))
            {
                _lost.Add(what);
            }
        }

        internal ImportedVm Finish(Dictionary<string, string>? unused)
        {
            foreach (string key in unused?.Keys ?? (IEnumerable<string>)[])
            {
                Lose($"{key}: not known here");
            }

            var name = new StringBuilder();
            foreach (char c in Name)
            {
                name.Append(char.IsAsciiLetterOrDigit(c) || c is '.' or '-' or '_' ? c : '-');
            }

            string clean = name.ToString().TrimStart('.', '-', '_');
            clean = clean.Length == 0 ? "vm" : clean.Length > 64 ? clean[..64] : clean;
            var yaml = new StringBuilder();
            yaml.Append("name: ").Append(SpecWriter.Quote(clean)).Append('\n');
            foreach (string line in _lines.Values)
            {
                yaml.Append(line).Append('\n');
            }

            if (_display.Count > 0)
            {
                yaml.Append("display: {").Append(string.Join(", ", _display)).Append("}\n");
            }

            foreach ((string list, List<string> items) in _items)
            {
                yaml.Append(list).Append(":\n");
                foreach (string item in items)
                {
                    yaml.Append("  - {").Append(item).Append("}\n");
                }
            }

            return new ImportedVm(clean, yaml.ToString(), _lost);
        }
    }
}

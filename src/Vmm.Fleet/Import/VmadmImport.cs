// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Globalization;
using System.Text.Json;
using Vmm.Config;

namespace Vmm.Fleet.Import;

/// <summary>SmartOS vmadm and zadm: JSON.</summary>
internal static class VmadmImport
{
    internal static ImportedVm Read(string text)
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
            var vm = new ImportDraft(Value(root, "alias") ?? Value(root, "hostname") ?? Value(root, "zonename") ?? Value(root, "uuid") ?? "vm");
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
}

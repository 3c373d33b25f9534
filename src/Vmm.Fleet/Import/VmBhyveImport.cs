// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Vmm.Config;

namespace Vmm.Fleet.Import;

/// <summary>vm-bhyve: shell assignments, <c>key="value"</c>.</summary>
internal static class VmBhyveImport
{
    internal static ImportedVm Read(string text, string name)
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

        var vm = new ImportDraft(name);
        string loader = ImportDraft.Take(keys, "loader") ?? "bhyveload";
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

        vm.Cpus(ImportDraft.Take(keys, "cpu"), ImportDraft.Take(keys, "cpu_sockets"), ImportDraft.Take(keys, "cpu_threads"));
        ImportDraft.Take(keys, "cpu_cores");
        vm.Size("memory", ImportDraft.Take(keys, "memory"));
        vm.Text("uuid", ImportDraft.Take(keys, "uuid"));
        if (ImportDraft.Take(keys, "virt_random") is "yes")
        {
            vm.Line("rng: true");
        }

        if (ImportDraft.Take(keys, "utctime") is "no")
        {
            vm.Line("clock: {localtime: true}");
        }

        if (ImportDraft.Take(keys, "graphics") is "yes")
        {
            string port = ImportDraft.Take(keys, "graphics_port") ?? "5900";
            string host = ImportDraft.Take(keys, "graphics_listen") ?? "127.0.0.1";
            vm.Line($"display: {{vga: std, vnc: {SpecWriter.Quote($"{host}:{port}")}}}");
        }

        if (ImportDraft.Take(keys, "xhci_mouse") is "yes")
        {
            vm.Line("input: [ps2, usb-tablet]");
        }

        for (int i = 0; keys.TryGetValue($"disk{i}_name", out string? disk); i++)
        {
            keys.Remove($"disk{i}_name");
            string kind = ImportDraft.Take(keys, $"disk{i}_type") ?? "virtio-blk";
            string device = ImportDraft.Take(keys, $"disk{i}_dev") ?? "file";
            string bus = kind switch { "ahci-hd" => "ahci", "ahci-cd" => "cdrom", "nvme" => "nvme", _ => "virtio" };
            string? size = ImportDraft.Take(keys, $"disk{i}_size");
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
            string? mac = ImportDraft.Take(keys, $"network{i}_mac");
            string? device = ImportDraft.Take(keys, $"network{i}_device");
            string? vmSwitch = ImportDraft.Take(keys, $"network{i}_switch");
            string backend = device is null ? "user" : "tap:" + device;
            if (vmSwitch is not null && device is null)
            {
                vm.Lose($"network{i}_switch: \"{vmSwitch}\" became user-mode NAT; for a bridge make a tap on it and write backend: tap:NAME");
            }

            vm.Item("nics", $"backend: {SpecWriter.Quote(backend)}, model: {model}" + (mac is null ? string.Empty : $", mac: \"{mac}\""));
        }

        return vm.Finish(keys);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.Text;
using Vmm.Config;

namespace Vmm.Fleet.Import;

/// <summary>A command line of qemu-system-x86_64. Options come one after the other; most are followed by their value.</summary>
internal sealed class QemuImport
{
    private readonly List<string> _words;
    private readonly ImportDraft _vm;
    private int _at;
    private string? _kernel;
    private string? _initrd;
    private string? _append;

    private QemuImport(List<string> words, ImportDraft vm)
    {
        _words = words;
        _vm = vm;
    }

    internal static ImportedVm Read(string text, string name)
    {
        List<string> words = ShellWords.Split(text.Replace("\\\n", " ", StringComparison.Ordinal), splitEquals: false);
        var import = new QemuImport(words, new ImportDraft(name));
        for (; import._at < words.Count; import._at++)
        {
            string word = words[import._at];
            if (word.StartsWith('-'))
            {
                import.ReadOption(word);
            }
            else if (import._at > 0)
            {
                import.AddDisk(word, "ide");
            }
        }

        import.WriteBoot();
        return import._vm.Finish(null);
    }

    private void ReadOption(string word)
    {
        switch (word.TrimStart('-'))
        {
            case "name":
                _vm.Name = First(Value()).Replace("guest=", string.Empty, StringComparison.Ordinal);
                break;
            case "m":
                ReadMemory(First(Value()).Replace("size=", string.Empty, StringComparison.Ordinal));
                break;
            case "smp":
                _vm.Cpus(First(Value()).Replace("cpus=", string.Empty, StringComparison.Ordinal), null, null);
                break;
            case "enable-kvm":
                _vm.Line("accel: [kvm, soft]");
                break;
            case "accel":
                _vm.Line(Value().StartsWith("kvm", StringComparison.Ordinal) ? "accel: [kvm, soft]" : "accel: soft");
                break;
            case "kernel":
                _kernel = Value();
                break;
            case "initrd":
                _initrd = Value();
                break;
            case "append":
                _append = Value();
                break;
            case "hda" or "hdb" or "hdc" or "hdd":
                AddDisk(Value(), "ide");
                break;
            case "fda" or "fdb":
                AddDisk(Value(), "floppy");
                break;
            case "cdrom":
                AddDisk(Value(), "cdrom");
                break;
            case "drive":
                ReadDrive(Value());
                break;
            case "bios":
                _vm.Line($"boot: {{firmware: {SpecWriter.Quote(Value())}}}");
                break;
            case "nic" or "netdev" or "net":
                ReadNetwork(word, Value());
                break;
            case "vga":
                _vm.Display("vga: " + Value() switch { "vmware" => "vmware", "virtio" => "virtio", "none" => "none", _ => "std" });
                break;
            case "vnc":
                ReadVnc(Value());
                break;
            case "rtc":
                if (Value().Contains("localtime", StringComparison.Ordinal))
                {
                    _vm.Line("clock: {localtime: true}");
                }

                break;
            case "uuid":
                _vm.Text("uuid", Value());
                break;
            case "device":
                ReadDevice(word, Value());
                break;
            case "nographic" or "daemonize" or "no-reboot" or "nodefaults":
                break;
            case "machine" or "M":
                ReadMachine(word, Value());
                break;
            case "cpu" or "serial" or "display" or "monitor" or "boot" or "usb" or "object" or "chardev" or "qmp":
                Lose(word, "not carried over");
                break;
            default:
                Lose(word, "not known here");
                break;
        }
    }

    private string Value() =>
        _at + 1 < _words.Count ? _words[++_at] : throw new FormatException($"{_words[_at]} is followed by nothing");

    // An option that says nothing here may have a value or none; what starts with a dash is the next option.
    private void Lose(string word, string why)
    {
        bool hasValue = _at + 1 < _words.Count && !_words[_at + 1].StartsWith('-');
        _vm.Lose($"{(hasValue ? $"{word} {Value()}" : word)}: {why}");
    }

    private void ReadMemory(string size)
    {
        if (size.Length == 0)
        {
            throw new FormatException("-m is followed by no size");
        }

        _vm.Size("memory", char.IsAsciiDigit(size[^1]) ? size + "M" : size);
    }

    private void ReadMachine(string word, string value)
    {
        if (value.Contains("accel=kvm", StringComparison.Ordinal))
        {
            _vm.Line("accel: [kvm, soft]");
        }
        else
        {
            _vm.Lose($"{word} {value}: not carried over");
        }
    }

    private void ReadNetwork(string word, string options)
    {
        if (options.StartsWith("user", StringComparison.Ordinal))
        {
            _vm.Item("nics", "backend: user");
        }
        else if (options.StartsWith("tap", StringComparison.Ordinal) && Option(options, "ifname") is { } tap)
        {
            _vm.Item("nics", $"backend: {SpecWriter.Quote("tap:" + tap)}");
        }
        else if (options is not "none" && !options.StartsWith("nic", StringComparison.Ordinal))
        {
            _vm.Lose($"{word} {options}: not known here");
        }
    }

    private void ReadVnc(string address)
    {
        ReadOnlySpan<char> number = address.AsSpan(address.LastIndexOf(':') + 1);
        bool isNumber = ushort.TryParse(number, NumberStyles.None, CultureInfo.InvariantCulture, out ushort display);
        _vm.Display("vnc: " + SpecWriter.Quote(isNumber ? $"127.0.0.1:{5900 + display}" : address));
    }

    private void ReadDevice(string word, string device)
    {
        if (device.StartsWith("virtio-rng", StringComparison.Ordinal))
        {
            _vm.Line("rng: true");
        }
        else if (device.StartsWith("virtio-balloon", StringComparison.Ordinal))
        {
            _vm.Line("balloon: true");
        }
        else if (device.StartsWith("isa-debug-exit", StringComparison.Ordinal))
        {
            _vm.Line("debug-exit: " + (Option(device, "iobase") ?? "0x501"));
        }
        else if (!device.StartsWith("virtio-net", StringComparison.Ordinal))
        {
            _vm.Lose($"{word} {device}: not carried over");
        }
    }

    private void WriteBoot()
    {
        if (_kernel is null)
        {
            return;
        }

        var boot = new StringBuilder("boot: {kernel: " + SpecWriter.Quote(_kernel));
        if (_initrd is not null && _initrd.AsSpan().ContainsAny(',', ' '))
        {
            // Modules of a multiboot kernel: "FILE ARGUMENTS,FILE ARGUMENTS"; the kernel finds the file's name before its arguments.
            var modules = new List<string>();
            foreach (string module in _initrd.Split(',', StringSplitOptions.RemoveEmptyEntries))
            {
                modules.Add($"{{path: {SpecWriter.Quote(module.Split(' ')[0])}, cmdline: {SpecWriter.Quote(module)}}}");
            }

            boot.Append(", modules: [").AppendJoin(", ", modules).Append(']');
        }
        else if (_initrd is not null)
        {
            boot.Append(", initrd: ").Append(SpecWriter.Quote(_initrd));
        }

        boot.Append(_append is null ? string.Empty : ", cmdline: " + SpecWriter.Quote(_append));
        _vm.Line(boot.Append('}').ToString());
    }

    private void AddDisk(string path, string bus) => _vm.Item("disks", $"path: {SpecWriter.Quote(path)}, bus: {bus}");

    private void ReadDrive(string options)
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
            _vm.Line("boot: {firmware: uefi}");
            _vm.Lose($"-drive {options}: the firmware's flash is made by itself");
            return;
        }

        if (file is null)
        {
            _vm.Lose($"-drive {options}: has no file");
            return;
        }

        string format = Option(options, "format") is { } given and ("raw" or "qcow2") ? $", format: {given}" : string.Empty;
        _vm.Item("disks", $"path: {SpecWriter.Quote(file)}, bus: {bus}{format}");
    }

    private static string First(string options) => options.Split(',')[0];

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

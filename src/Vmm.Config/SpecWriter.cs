// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers;
using System.Collections.Generic;
using System.Globalization;
using System.Text;

namespace Vmm.Config;

/// <summary>
/// Writes a definition as YAML that reads back as the same definition: keys in one order, defaults left out, paths as they
/// are in the record (absolute). Two definitions mean the same exactly when their texts are equal. Pure; any thread.
/// </summary>
public static class SpecWriter
{
    private static readonly SearchValues<char> s_special = SearchValues.Create(",[]{}\"\\:#");

    /// <summary>The text of one definition.</summary>
    public static string Write(MachineSpec spec)
    {
        ArgumentNullException.ThrowIfNull(spec);
        var plain = new MachineSpec { Name = spec.Name, Boot = new BootSpec { Firmware = "seabios" } };
        var yaml = new Emitter();
        yaml.Text("name", spec.Name);
        yaml.Text("description", spec.Description);
        yaml.Text("uuid", spec.Uuid?.ToString("D"));
        yaml.Flag("autostart", spec.Autostart, plain.Autostart);
        WriteCpus(yaml, spec.Cpus);
        yaml.Raw("memory", Quantity.FormatSize(spec.MemoryBytes));
        yaml.List("accel", spec.Accel.Count == 1 && spec.Accel[0] is "auto" ? [] : spec.Accel);
        yaml.Word("irqchip", Words.Irqchip, spec.Irqchip, plain.Irqchip);
        if (!spec.Soft.Translate)
        {
            yaml.Raw("soft", "{translate: false}");
        }

        WriteClock(yaml, spec.Clock);
        WriteBoot(yaml, spec.Boot);
        yaml.Maps("disks", spec.Disks, WriteDisk);
        yaml.Maps("nics", spec.Nics, WriteNic);
        if (spec.Serial is not [{ Kind: CharKind.Stdio }])
        {
            yaml.List("serial", Ends(spec.Serial), evenIfEmpty: true);
        }

        yaml.Maps("console", spec.Console, static (map, port) =>
        {
            map.Text("name", port.Name);
            map.Text("backend", End(port.Backend));
        });
        WriteDisplay(yaml, spec);
        WriteInput(yaml, spec.Input);
        yaml.Flag("rng", spec.Rng, false);
        yaml.Flag("balloon", spec.Balloon, false);
        if (spec.Vsock is { } vsock)
        {
            yaml.Map("vsock", map =>
            {
                map.Number("cid", vsock.Cid, null);
                map.Text("path", vsock.Path);
            });
        }

        if (spec.Virtio != plain.Virtio)
        {
            yaml.Map("virtio", map =>
            {
                map.Word("transport", Words.VirtioTransports, spec.Virtio.Transport, plain.Virtio.Transport);
                map.Flag("packed", spec.Virtio.Packed, false);
            });
        }

        yaml.Maps("shares", spec.Shares, static (map, share) =>
        {
            map.Text("path", share.Path);
            map.Text("tag", share.Tag);
            map.Flag("readonly", share.ReadOnly, false);
        });
        yaml.Word("watchdog", Words.Watchdog, spec.Watchdog, plain.Watchdog);
        yaml.Flag("pvpanic", spec.PvPanic, false);
        yaml.Flag("vmgenid", spec.VmGenId, false);
        if (spec.DebugExit is { } port)
        {
            yaml.Raw("debug-exit", "0x" + port.ToString("x", CultureInfo.InvariantCulture));
        }

        yaml.Flag("testdev", spec.TestDevice, false);
        WriteCloudInit(yaml, spec.CloudInit);
        WriteRestart(yaml, spec.Restart, plain.Restart);
        yaml.List("after", spec.After);
        yaml.List("requires", spec.Requires);
        WriteHealth(yaml, spec.Health);
        yaml.Duration("stop-timeout", spec.StopTimeout, plain.StopTimeout);
        yaml.Text("run-as", spec.RunAs);
        yaml.Map("limits", map =>
        {
            map.Number("nice", spec.Limits.Nice, 0);
            map.Number("cpu", spec.Limits.CpuPercent, 0);
            map.Size("overhead", spec.Limits.OverheadBytes);
            map.Number("open-files", spec.Limits.OpenFiles, 0);
        });
        return yaml.ToString();
    }

    /// <summary>True when two definitions mean the same.</summary>
    public static bool AreSame(MachineSpec a, MachineSpec b) =>
        string.Equals(Write(a), Write(b), StringComparison.Ordinal);

    /// <summary>Quotes text for YAML where it would otherwise mean something else.</summary>
    public static string Quote(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        const string Indicators = "-?:,[]{}#&*!|>'\"%@`~=<";
        bool plain = text.Length > 0 && !char.IsWhiteSpace(text[0]) && !char.IsWhiteSpace(text[^1])
            && !Indicators.Contains(text[0], StringComparison.Ordinal) && !char.IsAsciiDigit(text[0]) && text[0] is not ('.' or '+')
            && text.AsSpan().IndexOfAny(s_special) < 0
            && text is not ("true" or "false" or "yes" or "no" or "on" or "off" or "null" or "True" or "False" or "Null" or "NULL");
        foreach (char c in text)
        {
            plain &= !char.IsControl(c) && c < '\u007F';
        }

        if (plain)
        {
            return text;
        }

        var quoted = new StringBuilder("\"");
        foreach (char c in text)
        {
            _ = c switch
            {
                '"' => quoted.Append("\\\""),
                '\\' => quoted.Append("\\\\"),
                '\n' => quoted.Append("\\n"),
                '\t' => quoted.Append("\\t"),
                _ when char.IsControl(c) || c is '\uFEFF' or '\u2028' or '\u2029' =>
                    quoted.Append(CultureInfo.InvariantCulture, $"\\u{(int)c:x4}"),
                _ => quoted.Append(c),
            };
        }

        return quoted.Append('"').ToString();
    }

    private static void WriteCpus(Emitter yaml, CpuSpec cpus)
    {
        if (cpus is { Sockets: 1, Threads: 1, Model: "host", Pin.Count: 0 })
        {
            yaml.Number("cpus", cpus.Count, null);
            return;
        }

        yaml.Map("cpus", map =>
        {
            map.Number("count", cpus.Count, null);
            map.Number("sockets", cpus.Sockets, 1);
            map.Number("threads", cpus.Threads, 1);
            map.Text("model", cpus.Model is "host" ? null : cpus.Model);
            map.RawList("pin", cpus.Pin);
        });
    }

    private static void WriteClock(Emitter yaml, ClockSpec clock)
    {
        yaml.Map("clock", map =>
        {
            map.Word("source", Words.ClockSources, clock.Source, ClockSource.Host);
            map.Flag("localtime", clock.LocalTime, false);
            map.Raw("start", clock.Start?.UtcDateTime.ToString("yyyy-MM-dd'T'HH:mm:ss", CultureInfo.InvariantCulture));
        });
    }

    private static void WriteBoot(Emitter yaml, BootSpec boot)
    {
        yaml.Map("boot", map =>
        {
            map.Text("kernel", boot.Kernel);
            map.Text("initrd", boot.Initrd);
            map.Text("cmdline", boot.Cmdline.Length == 0 ? null : boot.Cmdline);
            map.Maps("modules", boot.Modules, static (inner, module) =>
            {
                inner.Text("path", module.Path);
                inner.Text("cmdline", module.Cmdline.Length == 0 ? null : module.Cmdline);
            });
            map.Text("firmware", boot.Firmware is "seabios" ? null : boot.Firmware);
            map.Text("vars", boot.Vars);
            var order = new List<string>();
            foreach (BootDevice device in boot.Order)
            {
                order.Add(Words.Of(Words.BootDevices, device));
            }

            map.List("order", string.Join(',', order) is "disk,cdrom,floppy,net" ? [] : order);
            map.Flag("menu", boot.Menu, false);
        });
    }

    private static void WriteDisk(Emitter map, DiskSpec disk)
    {
        map.Text("path", disk.Path);
        map.Word("bus", Words.Buses, disk.Bus, DiskBus.Virtio);
        map.Word("media", Words.Media, disk.Media, DiskMedia.Disk);
        map.Number("queues", disk.Queues, 1);
        map.Word("format", Words.Formats, disk.Format, DiskFormat.Auto);
        map.Size("size", disk.SizeBytes ?? 0);
        map.Text("backing", disk.Backing);
        map.Flag("readonly", disk.ReadOnly, disk.IsCdrom);
        map.Word("cache", Words.Caches, disk.Cache, DiskCache.Writeback);
        map.Flag("discard", disk.Discard, true);
        map.Text("serial", disk.Serial);
        map.Size("bytes-per-second", disk.BytesPerSecond);
        map.Number("requests-per-second", disk.RequestsPerSecond, 0);
    }

    private static void WriteNic(Emitter map, NicSpec nic)
    {
        map.Text("backend", nic.Backend switch
        {
            NicBackend.User => "user",
            NicBackend.Tap => "tap:" + nic.Target,
            NicBackend.Socket => "socket:" + nic.Target,
            _ => "none",
        });
        map.Word("model", Words.NicModels, nic.Model, NicModel.Virtio);
        map.Text("mac", nic.Mac is { } mac ? FormatMac(mac) : null);
        var forwards = new List<string>();
        foreach (PortForward forward in nic.Forward)
        {
            string host = forward.HostAddress.AddressFamily == System.Net.Sockets.AddressFamily.InterNetworkV6
                ? $"[{forward.HostAddress}]"
                : forward.HostAddress.ToString();
            string kind = forward.IsUdp ? "udp:" : string.Empty;
            forwards.Add(string.Create(CultureInfo.InvariantCulture, $"{kind}{host}:{forward.HostPort}:{forward.GuestPort}"));
        }

        map.List("forward", forwards);
        map.Text("network", nic.Network);
        map.Number("mtu", nic.Mtu, 0);
        map.Number("queues", nic.Queues, 1);
        map.Size("bytes-per-second", nic.BytesPerSecond);
    }

    /// <summary>A MAC address in the usual form.</summary>
    public static string FormatMac(ulong mac)
    {
        var text = new StringBuilder(17);
        for (int shift = 40; shift >= 0; shift -= 8)
        {
            text.Append(text.Length == 0 ? string.Empty : ":").Append(CultureInfo.InvariantCulture, $"{(mac >> shift) & 0xFF:x2}");
        }

        return text.ToString();
    }

    private static string[] Ends(IReadOnlyList<CharSpec> ends)
    {
        var words = new string[ends.Count];
        for (int i = 0; i < words.Length; i++)
        {
            words[i] = End(ends[i]);
        }

        return words;
    }

    private static string End(CharSpec end) => end.Kind switch
    {
        CharKind.Unix => "unix:" + end.Path,
        CharKind.File => "file:" + end.Path,
        _ => Words.Of(Words.CharKinds, end.Kind),
    };

    private static void WriteDisplay(Emitter yaml, MachineSpec spec)
    {
        DisplaySpec display = spec.Display;
        VgaModel usual = spec.Boot.Kernel is null ? VgaModel.Std : VgaModel.None;
        bool isPlain = display is
        {
            VncAddress: null, VncSocket: null, PasswordFile: null, TlsCertificate: null, TlsKey: null,
            Keyboard: KeyboardName.Us,
        };
        if (isPlain)
        {
            yaml.Word("display", Words.VgaModels, display.Vga, usual);
            return;
        }

        yaml.Map("display", map =>
        {
            map.Text("vga", Words.Of(Words.VgaModels, display.Vga));
            map.Text("vnc", display.VncSocket is { } socket ? "unix:" + socket : display.VncAddress);
            map.Text("password-file", display.PasswordFile);
            map.Text("tls-cert", display.TlsCertificate);
            map.Text("tls-key", display.TlsKey);
            map.Word("keyboard", Words.Keyboards, display.Keyboard, KeyboardName.Us);
        });
    }

    private static void WriteInput(Emitter yaml, IReadOnlyList<InputDevice> input)
    {
        if (input is [InputDevice.Ps2])
        {
            return;
        }

        var words = new List<string>();
        foreach (InputDevice device in input)
        {
            words.Add(Words.Of(Words.InputDevices, device));
        }

        yaml.List("input", words, evenIfEmpty: true);
    }

    private static void WriteCloudInit(Emitter yaml, CloudInitSpec? cloud)
    {
        if (cloud is null)
        {
            return;
        }

        yaml.Map("cloud-init", map =>
        {
            map.Text("hostname", cloud.Hostname);
            map.List("ssh-keys", cloud.SshKeys);
            map.Text("user-data", cloud.UserData);
            map.Text("network", cloud.Network);
        });
    }

    private static void WriteRestart(Emitter yaml, RestartSpec restart, RestartSpec plain)
    {
        if (restart with { Policy = plain.Policy } == plain)
        {
            yaml.Word("restart", Words.Restarts, restart.Policy, plain.Policy);
            return;
        }

        yaml.Map("restart", map =>
        {
            map.Word("policy", Words.Restarts, restart.Policy, plain.Policy);
            map.Duration("backoff", restart.Backoff, plain.Backoff);
            map.Duration("max-backoff", restart.MaxBackoff, plain.MaxBackoff);
            map.Number("limit", restart.Limit, plain.Limit);
            map.Duration("window", restart.Window, plain.Window);
        });
    }

    private static void WriteHealth(Emitter yaml, HealthSpec? health)
    {
        if (health is null)
        {
            return;
        }

        var plain = new HealthSpec();
        yaml.Map("health", map =>
        {
            map.Text("tcp", health.Tcp);
            map.Text("console", health.Console);
            map.Flag("agent", health.Agent, false);
            map.Duration("interval", health.Interval, plain.Interval);
            map.Duration("timeout", health.Timeout, plain.Timeout);
            map.Number("retries", health.Retries, plain.Retries);
            map.Duration("start-period", health.StartPeriod, plain.StartPeriod);
            map.Flag("restart", health.Restart, false);
        });
    }

    /// <summary>Lines of YAML; maps below the top are indented.</summary>
    private sealed class Emitter
    {
        private readonly StringBuilder _text = new();
        private readonly string _indent;

        internal Emitter(string indent = "")
        {
            _indent = indent;
        }

        public override string ToString() => _text.ToString();

        internal void Raw(string key, string? value)
        {
            if (value is not null)
            {
                _text.Append(_indent).Append(key).Append(": ").Append(value).Append('\n');
            }
        }

        internal void Text(string key, string? value) => Raw(key, value is null ? null : Quote(value));

        internal void Flag(string key, bool value, bool otherwise)
        {
            if (value != otherwise)
            {
                Raw(key, value ? "true" : "false");
            }
        }

        internal void Number(string key, long value, long? otherwise)
        {
            if (value != otherwise)
            {
                Raw(key, value.ToString(CultureInfo.InvariantCulture));
            }
        }

        internal void Size(string key, long bytes)
        {
            if (bytes != 0)
            {
                Raw(key, Quantity.FormatSize(bytes));
            }
        }

        internal void Duration(string key, TimeSpan value, TimeSpan otherwise)
        {
            if (value != otherwise)
            {
                Raw(key, Quantity.FormatDuration(value));
            }
        }

        internal void Word<T>(string key, (string Word, T Value)[] table, T value, T otherwise)
            where T : notnull
        {
            if (!EqualityComparer<T>.Default.Equals(value, otherwise))
            {
                Raw(key, Words.Of(table, value));
            }
        }

        internal void List(string key, IReadOnlyList<string> values, bool evenIfEmpty = false)
        {
            if (values.Count == 0 && !evenIfEmpty)
            {
                return;
            }

            var quoted = new List<string>(values.Count);
            foreach (string value in values)
            {
                quoted.Add(Quote(value));
            }

            Raw(key, "[" + string.Join(", ", quoted) + "]");
        }

        internal void RawList(string key, IReadOnlyList<int> values)
        {
            if (values.Count > 0)
            {
                Raw(key, "[" + string.Join(", ", values) + "]");
            }
        }

        internal void Map(string key, Action<Emitter> write)
        {
            var inner = new Emitter(_indent + "  ");
            write(inner);
            if (inner._text.Length > 0)
            {
                _text.Append(_indent).Append(key).Append(":\n").Append(inner._text);
            }
        }

        internal void Maps<T>(string key, IReadOnlyList<T> items, Action<Emitter, T> write)
        {
            if (items.Count == 0)
            {
                return;
            }

            _text.Append(_indent).Append(key).Append(":\n");
            foreach (T item in items)
            {
                var inner = new Emitter(_indent + "    ");
                write(inner, item);
                _text.Append(_indent).Append("  - ");
                if (inner._text.Length == 0)
                {
                    _text.Append("{}\n");
                    continue;
                }

                _text.Append(inner._text.ToString().AsSpan(_indent.Length + 4));
            }
        }
    }
}

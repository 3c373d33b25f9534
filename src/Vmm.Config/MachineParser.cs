// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Net;
using System.Text.RegularExpressions;

namespace Vmm.Config;

/// <summary>Turns one mapping into a <see cref="MachineSpec"/>. Errors go to the context; the result is then not used.</summary>
internal static class MachineParser
{
    private const int MaxDisks = 64;
    private const int MaxCommandLine = 2047;
    private const int MaxNics = 32;

    internal static MachineSpec Parse(ParseContext context, YamlNode node)
    {
        var map = new MapReader(context, node, string.Empty);
        string name = Name(map);
        BootSpec boot = Boot(map);
        var spec = new MachineSpec
        {
            Name = name,
            Description = map.Text("description", 200),
            Uuid = Uuid(map),
            Cpus = Cpus(map),
            MemoryBytes = Memory(map),
            Accel = Accel(map),
            Irqchip = map.Choice("irqchip", IrqchipChoice.Auto, Words.Irqchip),
            Boot = boot,
            Disks = Disks(map),
            Nics = Nics(map),
            Serial = Serial(map),
            Console = Console(map),
            Display = Display(map, boot),
            Input = Input(map),
            Rng = map.Flag("rng", false),
            Balloon = map.Flag("balloon", false),
            Vsock = Vsock(map),
            Virtio = Virtio(map),
            Shares = Shares(map),
            DebugExit = DebugExit(map),
            TestDevice = map.Flag("testdev", false),
            PvPanic = map.Flag("pvpanic", false),
            VmGenId = map.Flag("vmgenid", false),
            Watchdog = map.Choice("watchdog", WatchdogAction.None, Words.Watchdog),
            Soft = Soft(map),
            Clock = Clock(map),
            CloudInit = CloudInit(map, name),
            Autostart = map.Flag("autostart", true),
            Restart = Restart(map),
            After = Names(map, "after"),
            Requires = Names(map, "requires"),
            Health = Health(map),
            StopTimeout = map.Duration("stop-timeout", TimeSpan.FromSeconds(90)),
            RunAs = map.Text("run-as", 64),
            Limits = Limits(map),
            Source = context.Positions(node.At),
        };
        map.Finish();
        return spec;
    }

    internal static bool IsName(string text)
    {
        if (text.Length is 0 or > 64 || !char.IsAsciiLetterOrDigit(text[0]))
        {
            return false;
        }

        foreach (char c in text)
        {
            if (!char.IsAsciiLetterOrDigit(c) && c is not ('.' or '-' or '_'))
            {
                return false;
            }
        }

        return true;
    }

    private static string Name(MapReader map)
    {
        if (map.Take("name") is not { } node)
        {
            map.Context.Error(map.At, "a VM needs a \"name\"");
            return "unnamed";
        }

        string? text = map.TextOf(node, "name");
        if (text is not null && !IsName(text))
        {
            map.Context.Error(
                node.At,
                $"\"{MapReader.Printable(text)}\" is no name: letters, digits, '.', '-', '_', beginning with a letter or digit, at most 64");
        }

        return text ?? "unnamed";
    }

    private static Guid? Uuid(MapReader map)
    {
        if (map.Take("uuid") is not { } node)
        {
            return null;
        }

        if (Guid.TryParseExact(node.Text, "D", out Guid value))
        {
            return value;
        }

        map.Context.Error(node.At, $"\"uuid\" takes a UUID such as 6ba7b810-9dad-11d1-80b4-00c04fd430c8, not {MapReader.Quote(node)}");
        return null;
    }

    private static CpuSpec Cpus(MapReader map)
    {
        if (map.Take("cpus") is not { } node)
        {
            return new CpuSpec();
        }

        if (node.Kind == YamlKind.Scalar)
        {
            return new CpuSpec { Count = (int)(map.IntegerOf(node, "cpus", 1, CpuSpec.MaxCount) ?? 1) };
        }

        if (map.MapOf(node, "cpus", "cpus", "{count: 4, model: host}") is not { } cpus)
        {
            return new CpuSpec();
        }

        int count = (int)cpus.Integer("count", 1, 1, CpuSpec.MaxCount);
        int sockets = (int)cpus.Integer("sockets", 1, 1, CpuSpec.MaxCount);
        int threads = (int)cpus.Integer("threads", 1, 1, 2);
        string model = cpus.Text("model", 64) ?? "host";
        var pin = new List<int>();
        List<(YamlNode Node, string Path)> pins = cpus.List("pin", CpuSpec.MaxCount);
        foreach ((YamlNode item, _) in pins)
        {
            if (cpus.IntegerOf(item, "pin", 0, 4095) is { } processor)
            {
                pin.Add((int)processor);
            }
        }

        if (count % (sockets * threads) != 0)
        {
            map.Context.Error(node.At, string.Create(
                CultureInfo.InvariantCulture,
                $"{count} cpus cannot be spread evenly over {sockets} sockets with {threads} threads a core"));
        }

        if (pins.Count != 0 && pins.Count != count)
        {
            map.Context.Error(pins[0].Node.At, string.Create(
                CultureInfo.InvariantCulture,
                $"\"pin\" names {pins.Count} processors for {count} cpus; give one for each"));
        }

        cpus.Finish();
        return new CpuSpec { Count = count, Sockets = sockets, Threads = threads, Model = model, Pin = pin };
    }

    private static long Memory(MapReader map)
    {
        const long Default = 512L << 20;
        long? bytes = map.Size("memory", MachineSpec.MinMemoryBytes, MachineSpec.MaxMemoryBytes);
        if (bytes is { } given && given % 4096 != 0)
        {
            map.Context.Error(map.Take("memory")!.At, "\"memory\" must be a multiple of 4K");
        }

        return bytes ?? Default;
    }

    private static List<string> Accel(MapReader map)
    {
        var result = new List<string>();
        foreach ((YamlNode item, _) in map.List("accel", 8))
        {
            string word = map.ChoiceOf(item, "accel", string.Empty, Words.Accel);
            if (word.Length == 0)
            {
                continue;
            }

            if (result.Contains(word, StringComparer.Ordinal))
            {
                map.Context.Error(item.At, $"\"{word}\" is named twice");
            }

            result.Add(word);
        }

        if (result.Count == 0)
        {
            result.Add("auto");
        }

        return result;
    }

    private static BootSpec Boot(MapReader map)
    {
        if (map.Map("boot", "{kernel: vmlinuz} or {firmware: seabios}") is not { } boot)
        {
            return new BootSpec { Firmware = "seabios" };
        }

        string? kernel = boot.FilePath("kernel");
        string? initrd = boot.FilePath("initrd");
        string? cmdline = boot.Text("cmdline", MaxCommandLine);
        List<BootModuleSpec> modules = BootModules(boot);
        string? vars = boot.FilePath("vars");
        bool menu = boot.Flag("menu", false);
        string? firmware = null;
        if (boot.Take("firmware") is { } node)
        {
            string? text = boot.TextOf(node, "firmware");
            firmware = text is "seabios" or "uefi" ? text : boot.FilePathOf(node, text, "firmware");
        }

        var order = new List<BootDevice>();
        foreach ((YamlNode item, _) in boot.List("order", 4))
        {
            BootDevice device = boot.ChoiceOf(item, "order", BootDevice.Disk, Words.BootDevices);
            if (order.Contains(device))
            {
                map.Context.Error(item.At, $"{MapReader.Quote(item)} stands twice in \"order\"");
            }

            order.Add(device);
        }

        if (boot.Has("kernel") && boot.Has("firmware"))
        {
            map.Context.Error(boot.At, "\"boot\" has both \"kernel\" and \"firmware\"; keep one");
        }

        if (boot.Has("initrd") && boot.Has("modules"))
        {
            map.Context.Error(boot.Take("initrd")!.At, "\"boot\" has both \"initrd\" and \"modules\"; put the initrd into \"modules\"");
        }

        if (!boot.Has("kernel"))
        {
            foreach (string key in new[] { "initrd", "cmdline", "modules" })
            {
                if (boot.Has(key))
                {
                    map.Context.Error(boot.Take(key)!.At, $"\"{key}\" needs a \"kernel\"");
                }
            }
        }
        else
        {
            foreach (string key in new[] { "order", "menu", "vars" })
            {
                if (boot.Has(key))
                {
                    map.Context.Error(boot.Take(key)!.At, $"\"{key}\" is for firmware; it has no effect with \"kernel\"");
                }
            }
        }

        boot.Finish();
        var result = new BootSpec
        {
            Kernel = kernel,
            Initrd = initrd,
            Cmdline = cmdline ?? string.Empty,
            Modules = modules,
            Firmware = kernel is null ? firmware ?? "seabios" : null,
            Vars = vars,
            Menu = menu,
        };
        return order.Count == 0 ? result : result with { Order = order };
    }

    private static List<BootModuleSpec> BootModules(MapReader boot)
    {
        var result = new List<BootModuleSpec>();
        foreach ((YamlNode item, string path) in boot.List("modules", BootSpec.MaxModules))
        {
            if (item.Kind == YamlKind.Scalar)
            {
                if (boot.FilePathOf(item, boot.TextOf(item, "modules"), "modules") is { } alone)
                {
                    result.Add(new BootModuleSpec { Path = alone });
                }

                continue;
            }

            if (boot.MapOf(item, path, "modules", "{path: ext2fs.static, cmdline: \"ext2fs --readonly\"}") is not { } module)
            {
                continue;
            }

            string? file = module.FilePath("path");
            string? cmdline = module.Text("cmdline", MaxCommandLine);
            if (!module.Has("path"))
            {
                boot.Context.Error(item.At, "a module of \"boot\" needs a \"path\"");
            }

            module.Finish();
            if (file is not null)
            {
                result.Add(new BootModuleSpec { Path = file, Cmdline = cmdline ?? string.Empty });
            }
        }

        return result;
    }

    private static List<DiskSpec> Disks(MapReader map)
    {
        var result = new List<DiskSpec>();
        var paths = new Dictionary<string, string>(StringComparer.Ordinal);
        int floppies = 0;
        int ides = 0;
        foreach ((YamlNode item, string path) in map.List("disks", MaxDisks))
        {
            if (Disk(map, item, path) is not { } disk)
            {
                continue;
            }

            if (disk.Path is not null && !disk.ReadOnly && !paths.TryAdd(disk.Path, path))
            {
                map.Context.Error(item.At, $"{disk.Path} is already written by {paths[disk.Path]}; a second writer would destroy it");
            }

            floppies += disk.Bus == DiskBus.Floppy ? 1 : 0;
            ides += disk.Bus is DiskBus.Ide or DiskBus.Cdrom ? 1 : 0;
            if (floppies > 2)
            {
                map.Context.Error(item.At, "a PC has two floppy drives at most");
                floppies = int.MinValue;
            }

            if (ides > 4)
            {
                map.Context.Error(item.At, "IDE has room for four drives (ide and cdrom together)");
                ides = int.MinValue;
            }

            result.Add(disk);
        }

        return result;
    }

    private static DiskSpec? Disk(MapReader map, YamlNode item, string path)
    {
        if (item.Kind == YamlKind.Scalar)
        {
            return map.FilePathOf(item, map.TextOf(item, "disks"), "disks") is { } file ? new DiskSpec { Path = file } : null;
        }

        if (map.MapOf(item, path, "disks", "{path: disk.qcow2, size: 10G}") is not { } disk)
        {
            return null;
        }

        DiskBus bus = disk.Choice("bus", DiskBus.Virtio, Words.Buses);
        DiskMedia media = disk.Choice("media", DiskMedia.Disk, Words.Media);
        bool isCdrom = bus == DiskBus.Cdrom || media == DiskMedia.Cdrom;
        bool removable = isCdrom || bus == DiskBus.Floppy;
        var result = new DiskSpec
        {
            Path = disk.FilePath("path"),
            Bus = bus,
            Media = media,
            Queues = (int)disk.Integer("queues", 1, 1, 16),
            Format = disk.Choice("format", DiskFormat.Auto, Words.Formats),
            SizeBytes = disk.Size("size", 512, 1L << 60),
            Backing = disk.FilePath("backing"),
            ReadOnly = disk.Flag("readonly", isCdrom),
            Cache = disk.Choice("cache", DiskCache.Writeback, Words.Caches),
            Discard = disk.Flag("discard", true),
            Serial = disk.Text("serial", 20),
            BytesPerSecond = disk.Size("bytes-per-second", 1, long.MaxValue) ?? 0,
            RequestsPerSecond = (int)disk.Integer("requests-per-second", 0, 1, int.MaxValue),
        };
        if (!disk.Has("path") && !removable)
        {
            map.Context.Error(item.At, "a disk needs a \"path\" (only a cdrom or floppy drive may be empty)");
        }

        if (disk.Has("media") && bus != DiskBus.Scsi)
        {
            map.Context.Error(disk.Take("media")!.At, "\"media\" is for bus: scsi; a CD-ROM drive on IDE is bus: cdrom");
        }

        if (disk.Has("queues") && bus != DiskBus.Virtio)
        {
            map.Context.Error(disk.Take("queues")!.At, "\"queues\" is for bus: virtio");
        }

        if (isCdrom && !result.ReadOnly)
        {
            map.Context.Error(item.At, "a cdrom is read-only");
        }

        if (result.SizeBytes % 512 is not (null or 0))
        {
            map.Context.Error(disk.Take("size")!.At, "\"size\" must be a multiple of 512");
        }

        if (result.Backing is not null && result.Format == DiskFormat.Raw)
        {
            map.Context.Error(disk.Take("backing")!.At, "a raw disk has no backing file; use format: qcow2");
        }

        if (result.Serial is { } serial && serial.Any(c => c is < ' ' or > '~'))
        {
            map.Context.Error(disk.Take("serial")!.At, "\"serial\" takes ASCII characters only");
        }

        disk.Finish();
        return result;
    }

    private static List<NicSpec> Nics(MapReader map)
    {
        var result = new List<NicSpec>();
        var macs = new HashSet<ulong>();
        foreach ((YamlNode item, string path) in map.List("nics", MaxNics))
        {
            if (item.Kind == YamlKind.Scalar)
            {
                (NicBackend kind, string? end) = NicTarget(map, item);
                result.Add(new NicSpec { Backend = kind, Target = end });
                continue;
            }

            if (map.MapOf(item, path, "nics", "{backend: user}") is not { } nic)
            {
                continue;
            }

            NicBackend backend = NicBackend.User;
            string? target = null;
            if (nic.Take("backend") is { } node)
            {
                (backend, target) = NicTarget(nic, node);
            }

            ulong? mac = Mac(nic);
            if (mac is { } given && !macs.Add(given))
            {
                map.Context.Error(nic.Take("mac")!.At, "two cards of this VM have the same \"mac\"");
            }

            var spec = new NicSpec
            {
                Backend = backend,
                Target = target,
                Model = nic.Choice("model", NicModel.Virtio, Words.NicModels),
                Mac = mac,
                Forward = Forwards(nic),
                Network = nic.Text("network", 64),
                Mtu = (int)nic.Integer("mtu", 0, 576, 65535),
                Queues = (int)nic.Integer("queues", 1, 1, 16),
                BytesPerSecond = nic.Size("bytes-per-second", 1, long.MaxValue) ?? 0,
            };
            foreach (string key in new[] { "forward", "network" })
            {
                if (backend != NicBackend.User && nic.Has(key))
                {
                    map.Context.Error(nic.Take(key)!.At, $"\"{key}\" is for backend: user");
                }
            }

            if (nic.Has("queues") && spec.Model != NicModel.Virtio)
            {
                map.Context.Error(nic.Take("queues")!.At, "\"queues\" is for model: virtio");
            }

            if (spec.Network is { } network && !IsName(network))
            {
                map.Context.Error(nic.Take("network")!.At, $"\"{network}\" is no name for a network: letters, digits, '.', '-', '_'");
            }

            nic.Finish();
            result.Add(spec);
        }

        return result;
    }

    private static (NicBackend Backend, string? Target) NicTarget(MapReader map, YamlNode node)
    {
        string? text = map.TextOf(node, "backend");
        switch (text)
        {
            case null:
                return (NicBackend.None, null);
            case "user":
                return (NicBackend.User, null);
            case "none":
                return (NicBackend.None, null);
            default:
                break;
        }

        if (After(text, "tap:") is { } tap)
        {
            if (tap.Length is 0 or > 15 || tap.Any(c => !char.IsAsciiLetterOrDigit(c) && c is not ('.' or '-' or '_')))
            {
                map.Context.Error(node.At, "\"tap:\" takes the name of an interface, at most 15 characters");
            }

            return (NicBackend.Tap, tap);
        }

        if (After(text, "socket:") is { } socket)
        {
            return (NicBackend.Socket, map.FilePathOf(node, socket, "socket:"));
        }

        map.Context.Error(
            node.At,
            $"{MapReader.Quote(node)} is no network; it must be user, tap:NAME, socket:PATH or none"
                + Suggestion.Ending(text, ["user", "none", "tap:", "socket:"]));
        return (NicBackend.None, null);
    }

    private static ulong? Mac(MapReader nic)
    {
        if (nic.Take("mac") is not { } node || node is { Kind: YamlKind.Scalar, Text: "auto" })
        {
            return null;
        }

        string[] parts = node.Text.Split(':', '-');
        ulong value = 0;
        bool good = node.Kind == YamlKind.Scalar && parts.Length == 6;
        for (int i = 0; good && i < 6; i++)
        {
            good = parts[i].Length == 2
                && byte.TryParse(parts[i], NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out _);
            value = good ? (value << 8) | byte.Parse(parts[i], NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture) : 0;
        }

        if (!good || value == 0 || ((value >> 40) & 1) != 0)
        {
            string why = good ? "is not the address of one card" : "is not a MAC address such as 52:54:00:12:34:56, or auto";
            nic.Context.Error(node.At, $"{MapReader.Quote(node)} {why}");
            return null;
        }

        return value;
    }

    private static List<PortForward> Forwards(MapReader nic)
    {
        var result = new List<PortForward>();
        foreach ((YamlNode item, _) in nic.List("forward", 256))
        {
            if (item.Kind == YamlKind.Scalar && TryForward(item.Text, out PortForward? forward))
            {
                if (result.Exists(f => f.IsUdp == forward!.IsUdp && f.HostPort == forward.HostPort && f.HostAddress.Equals(forward.HostAddress)))
                {
                    nic.Context.Error(item.At, $"{MapReader.Quote(item)} listens on a port that is already taken above");
                }

                result.Add(forward!);
                continue;
            }

            nic.Context.Error(
                item.At,
                $"{MapReader.Quote(item)} is no forward; write [udp:][ADDRESS:]HOSTPORT:GUESTPORT, for example \"127.0.0.1:2222:22\"");
        }

        return result;
    }

    private static bool TryForward(string text, out PortForward? forward)
    {
        forward = null;
        string rest = text;
        bool udp = false;
        if (After(rest, "udp:") is { } afterUdp)
        {
            (rest, udp) = (afterUdp, true);
        }
        else if (After(rest, "tcp:") is { } afterTcp)
        {
            rest = afterTcp;
        }

        int last = rest.LastIndexOf(':');
        if (last <= 0 || !TryPort(rest[(last + 1)..], out int guestPort))
        {
            return false;
        }

        string left = rest[..last];
        int middle = left.LastIndexOf(':');
        IPAddress address = IPAddress.Loopback;
        if (middle >= 0)
        {
            string host = left[..middle].Trim('[', ']');
            if (host.Length != 0 && !IPAddress.TryParse(host, out IPAddress? parsed))
            {
                return false;
            }
            else if (host.Length != 0)
            {
                address = IPAddress.Parse(host);
            }
        }

        if (!TryPort(left[(middle + 1)..], out int hostPort))
        {
            return false;
        }

        forward = new PortForward(udp, address, hostPort, guestPort);
        return true;
    }

    private static bool TryPort(string text, out int port)
    {
        return int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out port) && port is > 0 and < 65536;
    }

    private static List<CharSpec> Serial(MapReader map)
    {
        var result = new List<CharSpec>();
        int terminals = 0;
        foreach ((YamlNode item, _) in map.List("serial", 4))
        {
            CharSpec? end = CharEnd(map, item, "serial");
            if (end is null)
            {
                continue;
            }

            terminals += end.Kind == CharKind.Stdio ? 1 : 0;
            if (terminals > 1)
            {
                map.Context.Error(item.At, "only one serial port can be on stdio");
            }

            result.Add(end);
        }

        if (!map.Has("serial"))
        {
            result.Add(new CharSpec(CharKind.Stdio));
        }

        return result;
    }

    private static List<ConsoleSpec> Console(MapReader map)
    {
        var result = new List<ConsoleSpec>();
        foreach ((YamlNode item, string path) in map.List("console", 31))
        {
            if (item.Kind == YamlKind.Scalar)
            {
                if (CharEnd(map, item, "console") is { } plain)
                {
                    result.Add(new ConsoleSpec(null, plain));
                }

                continue;
            }

            if (map.MapOf(item, path, "console", "{name: org.example.port, backend: unix:port.sock}") is not { } port)
            {
                continue;
            }

            string? name = port.Text("name", 64);
            CharSpec? end = port.Take("backend") is { } node ? CharEnd(port, node, "backend") : null;
            if (!port.Has("backend"))
            {
                map.Context.Error(item.At, "a console port needs a \"backend\"");
            }

            port.Finish();
            if (end is not null)
            {
                result.Add(new ConsoleSpec(name, end));
            }
        }

        return result;
    }

    private static CharSpec? CharEnd(MapReader map, YamlNode node, string what)
    {
        string? text = map.TextOf(node, what);
        if (text is null)
        {
            return null;
        }

        foreach ((string word, CharKind kind) in Words.CharKinds)
        {
            if (string.Equals(word, text, StringComparison.Ordinal))
            {
                return new CharSpec(kind);
            }
        }

        if (After(text, "unix:") is { } socket)
        {
            return map.FilePathOf(node, socket, "unix:") is { } path ? new CharSpec(CharKind.Unix, path) : null;
        }

        if (After(text, "file:") is { } file)
        {
            return map.FilePathOf(node, file, "file:") is { } path ? new CharSpec(CharKind.File, path) : null;
        }

        map.Context.Error(
            node.At,
            $"\"{what}\" is {MapReader.Quote(node)}; it must be stdio, pty, unix:PATH, file:PATH, log or none"
                + Suggestion.Ending(text, ["stdio", "pty", "unix:", "file:", "log", "none"]));
        return null;
    }

    private static DisplaySpec Display(MapReader map, BootSpec boot)
    {
        VgaModel otherwise = boot.Kernel is null ? VgaModel.Std : VgaModel.None;
        if (map.Take("display") is not { } node)
        {
            return new DisplaySpec { Vga = otherwise };
        }

        if (node.Kind == YamlKind.Scalar)
        {
            return new DisplaySpec { Vga = map.ChoiceOf(node, "display", otherwise, Words.VgaModels) };
        }

        if (map.MapOf(node, "display", "display", "{vga: std, vnc: \"127.0.0.1:5901\"}") is not { } display)
        {
            return new DisplaySpec();
        }

        VgaModel vga = display.Choice("vga", VgaModel.Std, Words.VgaModels);
        string? address = null;
        string? socket = null;
        if (display.Take("vnc") is { } vnc && display.TextOf(vnc, "vnc") is { } text)
        {
            if (After(text, "unix:") is { } path)
            {
                socket = display.FilePathOf(vnc, path, "vnc");
            }
            else if (IsEndpoint(text))
            {
                address = text;
            }
            else if (text is not "none")
            {
                map.Context.Error(vnc.At, $"\"vnc\" takes ADDRESS:PORT or unix:PATH, not {MapReader.Quote(vnc)}");
            }

            if (vga == VgaModel.None && text is not "none")
            {
                map.Context.Error(vnc.At, "\"vnc\" needs a display; \"vga\" is none");
            }
        }

        var result = new DisplaySpec
        {
            Vga = vga,
            VncAddress = address,
            VncSocket = socket,
            PasswordFile = display.FilePath("password-file"),
            TlsCertificate = display.FilePath("tls-cert"),
            TlsKey = display.FilePath("tls-key"),
            Keyboard = display.Choice("keyboard", KeyboardName.Us, Words.Keyboards),
        };
        if ((result.TlsCertificate is null) != (result.TlsKey is null))
        {
            map.Context.Error(node.At, "\"tls-cert\" and \"tls-key\" are given together");
        }

        display.Finish();
        return result;
    }

    // ADDRESS:PORT with a literal address or localhost; names of other hosts would make parsing depend on a resolver.
    private static bool IsEndpoint(string text)
    {
        int colon = text.LastIndexOf(':');
        if (colon <= 0 || !TryPort(text[(colon + 1)..], out _))
        {
            return false;
        }

        string host = text[..colon];
        return host is "localhost" || IPAddress.TryParse(host.Trim('[', ']'), out _);
    }

    private static List<InputDevice> Input(MapReader map)
    {
        var result = new List<InputDevice>();
        foreach ((YamlNode item, _) in map.List("input", 5))
        {
            InputDevice device = map.ChoiceOf(item, "input", InputDevice.Ps2, Words.InputDevices);
            if (result.Contains(device))
            {
                map.Context.Error(item.At, $"{MapReader.Quote(item)} is named twice");
            }

            result.Add(device);
        }

        if (!map.Has("input"))
        {
            result.Add(InputDevice.Ps2);
        }

        return result;
    }

    private static VirtioSpec Virtio(MapReader map)
    {
        if (map.Map("virtio", "{transport: pci, packed: false}") is not { } virtio)
        {
            return new VirtioSpec();
        }

        var spec = new VirtioSpec(
            virtio.Choice("transport", VirtioTransport.Pci, Words.VirtioTransports), virtio.Flag("packed", false));
        virtio.Finish();
        return spec;
    }

    private static VsockSpec? Vsock(MapReader map)
    {
        if (map.Map("vsock", "{cid: 3, path: vsock.sock}") is not { } vsock)
        {
            return null;
        }

        long cid = vsock.Integer("cid", 3, 3, uint.MaxValue - 1L);
        string? path = vsock.FilePath("path");
        if (!vsock.Has("path"))
        {
            map.Context.Error(vsock.At, "\"vsock\" needs a \"path\"");
        }

        vsock.Finish();
        return new VsockSpec((uint)cid, path ?? string.Empty);
    }

    private static List<ShareSpec> Shares(MapReader map)
    {
        var result = new List<ShareSpec>();
        foreach ((YamlNode item, string path) in map.List("shares", 16))
        {
            if (map.MapOf(item, path, "shares", "{path: /srv/data, tag: data}") is not { } share)
            {
                continue;
            }

            string? directory = share.FilePath("path");
            string? tag = share.Text("tag", 31);
            bool readOnly = share.Flag("readonly", false);
            foreach (string key in new[] { "path", "tag" })
            {
                if (!share.Has(key))
                {
                    map.Context.Error(item.At, $"a share needs a \"{key}\"");
                }
            }

            share.Finish();
            if (tag is not null && result.Exists(s => string.Equals(s.Tag, tag, StringComparison.Ordinal)))
            {
                map.Context.Error(item.At, $"two shares have the tag \"{MapReader.Printable(tag)}\"");
            }

            result.Add(new ShareSpec { Path = directory ?? "/", Tag = tag ?? "share", ReadOnly = readOnly });
        }

        return result;
    }

    private static ushort? DebugExit(MapReader map)
    {
        if (map.Take("debug-exit") is not { } node)
        {
            return null;
        }

        return map.IntegerOf(node, "debug-exit", 1, 0xFFFF) is { } port ? (ushort)port : null;
    }

    private static SoftSpec Soft(MapReader map)
    {
        if (map.Map("soft", "{translate: true}") is not { } soft)
        {
            return new SoftSpec();
        }

        var result = new SoftSpec { Translate = soft.Flag("translate", true) };
        soft.Finish();
        return result;
    }

    private static ClockSpec Clock(MapReader map)
    {
        if (map.Take("clock") is not { } node)
        {
            return new ClockSpec();
        }

        if (node.Kind == YamlKind.Scalar)
        {
            return new ClockSpec { Source = map.ChoiceOf(node, "clock", ClockSource.Host, Words.ClockSources) };
        }

        if (map.MapOf(node, "clock", "clock", "{source: host, localtime: true}") is not { } clock)
        {
            return new ClockSpec();
        }

        DateTimeOffset? start = null;
        if (clock.Take("start") is { } at)
        {
            const DateTimeStyles Style = DateTimeStyles.AssumeUniversal | DateTimeStyles.AdjustToUniversal;
            string[] formats = ["yyyy-MM-dd", "yyyy-MM-dd'T'HH:mm:ss", "yyyy-MM-dd'T'HH:mm:ss'Z'", "yyyy-MM-dd HH:mm:ss"];
            if (DateTimeOffset.TryParseExact(at.Text, formats, CultureInfo.InvariantCulture, Style, out DateTimeOffset date))
            {
                start = date;
            }
            else
            {
                map.Context.Error(at.At, $"\"start\" takes a date such as 1999-12-31 or 1999-12-31T23:59:00, not {MapReader.Quote(at)}");
            }
        }

        var result = new ClockSpec
        {
            Source = clock.Choice("source", ClockSource.Host, Words.ClockSources),
            LocalTime = clock.Flag("localtime", false),
            Start = start,
        };
        clock.Finish();
        return result;
    }

    private static CloudInitSpec? CloudInit(MapReader map, string name)
    {
        if (map.Map("cloud-init", "{hostname: web1, ssh-keys: [\"ssh-ed25519 ...\"]}") is not { } cloud)
        {
            return null;
        }

        var keys = new List<string>();
        foreach ((YamlNode item, _) in cloud.List("ssh-keys", 64))
        {
            if (cloud.TextOf(item, "ssh-keys", 16_384) is { } key)
            {
                keys.Add(key);
            }
        }

        string? hostname = cloud.Text("hostname", 253);
        if (hostname is not null && (hostname.Length == 0 || hostname.Any(c => !char.IsAsciiLetterOrDigit(c) && c is not ('.' or '-'))))
        {
            map.Context.Error(cloud.Take("hostname")!.At, "\"hostname\" takes letters, digits, '.' and '-'");
        }

        var result = new CloudInitSpec
        {
            Hostname = hostname ?? name,
            SshKeys = keys,
            UserData = cloud.FilePath("user-data"),
            Network = cloud.FilePath("network"),
        };
        cloud.Finish();
        return result;
    }

    private static RestartSpec Restart(MapReader map)
    {
        if (map.Take("restart") is not { } node)
        {
            return new RestartSpec();
        }

        if (node.Kind == YamlKind.Scalar)
        {
            return new RestartSpec { Policy = map.ChoiceOf(node, "restart", RestartPolicy.OnFailure, Words.Restarts) };
        }

        if (map.MapOf(node, "restart", "restart", "{policy: on-failure, backoff: 1s}") is not { } restart)
        {
            return new RestartSpec();
        }

        var otherwise = new RestartSpec();
        var result = new RestartSpec
        {
            Policy = restart.Choice("policy", otherwise.Policy, Words.Restarts),
            Backoff = restart.Duration("backoff", otherwise.Backoff),
            MaxBackoff = restart.Duration("max-backoff", otherwise.MaxBackoff),
            Limit = (int)restart.Integer("limit", otherwise.Limit, 0, 1000),
            Window = restart.Duration("window", otherwise.Window),
        };
        if (result.MaxBackoff < result.Backoff)
        {
            map.Context.Error(node.At, "\"max-backoff\" is shorter than \"backoff\"");
        }

        restart.Finish();
        return result;
    }

    private static List<string> Names(MapReader map, string key)
    {
        var result = new List<string>();
        foreach ((YamlNode item, _) in map.List(key, 1000))
        {
            if (map.TextOf(item, key) is { } name)
            {
                if (!IsName(name))
                {
                    map.Context.Error(item.At, $"\"{key}\" takes names of VMs, not {MapReader.Quote(item)}");
                }

                result.Add(name);
            }
        }

        return result;
    }

    private static HealthSpec? Health(MapReader map)
    {
        if (map.Map("health", "{tcp: \"127.0.0.1:2222\"}") is not { } health)
        {
            return null;
        }

        var otherwise = new HealthSpec();
        string? tcp = health.Text("tcp", 300);
        if (tcp is not null && !IsEndpoint(tcp))
        {
            map.Context.Error(health.Take("tcp")!.At, "\"tcp\" takes ADDRESS:PORT, for example \"127.0.0.1:2222\"");
        }

        string? console = health.Text("console", 500);
        if (console is not null)
        {
            try
            {
                _ = new Regex(console, RegexOptions.NonBacktracking | RegexOptions.CultureInvariant, TimeSpan.FromSeconds(1));
            }
            catch (Exception wrong) when (wrong is ArgumentException or NotSupportedException)
            {
                map.Context.Error(health.Take("console")!.At, "\"console\" is no regular expression: " + wrong.Message.ReplaceLineEndings(" "));
            }
        }

        var result = new HealthSpec
        {
            Tcp = tcp,
            Console = console,
            Agent = health.Flag("agent", false),
            Interval = health.Duration("interval", otherwise.Interval),
            Timeout = health.Duration("timeout", otherwise.Timeout),
            Retries = (int)health.Integer("retries", otherwise.Retries, 1, 1000),
            StartPeriod = health.Duration("start-period", otherwise.StartPeriod),
            Restart = health.Flag("restart", false),
        };
        int probes = (tcp is null ? 0 : 1) + (console is null ? 0 : 1) + (result.Agent ? 1 : 0);
        if (probes != 1)
        {
            map.Context.Error(health.At, "\"health\" takes one of \"tcp\", \"console\" and \"agent: true\"");
        }

        if (result.Interval < TimeSpan.FromMilliseconds(100))
        {
            map.Context.Error(health.Take("interval")!.At, "\"interval\" must be at least 100ms");
        }

        health.Finish();
        return result;
    }

    private static LimitsSpec Limits(MapReader map)
    {
        if (map.Map("limits", "{nice: 5, cpu: 150}") is not { } limits)
        {
            return new LimitsSpec();
        }

        var result = new LimitsSpec
        {
            Nice = (int)limits.Integer("nice", 0, -20, 19),
            CpuPercent = (int)limits.Integer("cpu", 0, 1, 100 * CpuSpec.MaxCount),
            OverheadBytes = limits.Size("overhead", 16L << 20, 1L << 40) ?? 0,
            OpenFiles = (int)limits.Integer("open-files", 0, 64, 1 << 20),
        };
        limits.Finish();
        return result;
    }

    private static string? After(string text, string prefix)
    {
        return text.StartsWith(prefix, StringComparison.Ordinal) ? text[prefix.Length..] : null;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Net;

namespace Vmm.Config;

// Theory. A MachineSpec is one VM as declared: immutable, complete (every default filled in) and already checked for
// everything that can be judged from the text alone. It is the only thing that the machine, the daemon and the commands
// know of a definition; none of them sees YAML. What needs the host (does the kernel file exist, is the disk locked) is
// judged by ConfigFiles.CheckHost and by the machine itself.
//
// Paths are absolute: relative ones were resolved against the directory of the YAML file. Lists are never null.
// Equality of two definitions is equality of their canonical text (SpecWriter), not of these records: positions differ.

/// <summary>Where the interrupt controllers live (<c>irqchip:</c>).</summary>
public enum IrqchipChoice
{
    /// <summary>The best that the driver offers: kernel, then split, then user.</summary>
    Auto,

    /// <summary>All in the driver.</summary>
    Kernel,

    /// <summary>Local APICs in the driver, the rest are models.</summary>
    Split,

    /// <summary>All are models.</summary>
    User,
}

/// <summary>Processors of a VM (<c>cpus:</c>).</summary>
public sealed record CpuSpec
{
    /// <summary>The most that a definition may ask for.</summary>
    public const int MaxCount = 64;

    /// <summary>Virtual processors, 1 to <see cref="MaxCount"/>.</summary>
    public int Count { get; init; } = 1;

    /// <summary>Sockets that they are spread over; divides <see cref="Count"/>.</summary>
    public int Sockets { get; init; } = 1;

    /// <summary>Threads of a core; divides Count / Sockets.</summary>
    public int Threads { get; init; } = 1;

    /// <summary><c>host</c>, <c>max</c>, or the name of a baseline in config/cpus (checked by the machine).</summary>
    public string Model { get; init; } = "host";

    /// <summary>Host processors that vCPUs run on: entry n is vCPU n's; empty when not pinned.</summary>
    public IReadOnlyList<int> Pin { get; init; } = [];
}

/// <summary>What the VM starts from (<c>boot:</c>): a kernel or firmware, never both.</summary>
public sealed record BootSpec
{
    /// <summary>Most entries of <see cref="Modules"/>.</summary>
    public const int MaxModules = 16;

    /// <summary>Kernel file (bzImage, ELF with a PVH note, multiboot), or null to boot firmware.</summary>
    public string? Kernel { get; init; }

    /// <summary>Initial RAM disk, or null.</summary>
    public string? Initrd { get; init; }

    /// <summary>Kernel command line.</summary>
    public string Cmdline { get; init; } = string.Empty;

    /// <summary>What a multiboot kernel is given beside its command line, in this order; never together with <see cref="Initrd"/>.</summary>
    public IReadOnlyList<BootModuleSpec> Modules { get; init; } = [];

    /// <summary><c>seabios</c>, <c>uefi</c>, or an absolute path; null when <see cref="Kernel"/> is set.</summary>
    public string? Firmware { get; init; }

    /// <summary>File of UEFI variables; null lets the machine keep one in its state directory.</summary>
    public string? Vars { get; init; }

    /// <summary>Kinds of devices in the order that firmware tries them.</summary>
    public IReadOnlyList<BootDevice> Order { get; init; } = [BootDevice.Disk, BootDevice.Cdrom, BootDevice.Floppy, BootDevice.Net];

    /// <summary>Firmware offers its boot menu.</summary>
    public bool Menu { get; init; }
}

/// <summary>A file that is loaded beside a multiboot kernel (<c>boot.modules:</c>).</summary>
public sealed record BootModuleSpec
{
    /// <summary>The file, absolute.</summary>
    public required string Path { get; init; }

    /// <summary>The text that the kernel finds with it, as it stands; empty when it needs none.</summary>
    public string Cmdline { get; init; } = string.Empty;
}

/// <summary>What firmware can boot from.</summary>
public enum BootDevice
{
    /// <summary>Hard disks of any bus.</summary>
    Disk,

    /// <summary>CD-ROM drives.</summary>
    Cdrom,

    /// <summary>Floppy drives.</summary>
    Floppy,

    /// <summary>Network cards with a boot ROM.</summary>
    Net,
}

/// <summary>How a disk is attached (<c>bus:</c>).</summary>
public enum DiskBus
{
    /// <summary>virtio-blk.</summary>
    Virtio,

    /// <summary>IDE (PIIX3).</summary>
    Ide,

    /// <summary>AHCI SATA.</summary>
    Ahci,

    /// <summary>NVMe.</summary>
    Nvme,

    /// <summary>virtio-scsi.</summary>
    Scsi,

    /// <summary>Floppy drive.</summary>
    Floppy,

    /// <summary>ATAPI CD-ROM on IDE.</summary>
    Cdrom,
}

/// <summary>What a drive on virtio-scsi is (<c>media:</c>).</summary>
public enum DiskMedia
{
    /// <summary>A disk.</summary>
    Disk,

    /// <summary>A CD-ROM drive.</summary>
    Cdrom,
}

/// <summary>Format of an image file.</summary>
public enum DiskFormat
{
    /// <summary>Found out from the file's head.</summary>
    Auto,

    /// <summary>Raw bytes, or a block device.</summary>
    Raw,

    /// <summary>QEMU's qcow2.</summary>
    Qcow2,
}

/// <summary>When a guest is told that its write is done.</summary>
public enum DiskCache
{
    /// <summary>When the host has it; flush requests make it stable.</summary>
    Writeback,

    /// <summary>When it is stable.</summary>
    Writethrough,

    /// <summary>As writeback, but flush requests do nothing: data is lost when the host crashes.</summary>
    Unsafe,
}

/// <summary>A drive (an entry of <c>disks:</c>).</summary>
public sealed record DiskSpec
{
    /// <summary>Image file or device; null only for an empty CD-ROM or floppy drive.</summary>
    public string? Path { get; init; }

    /// <summary>How it is attached.</summary>
    public DiskBus Bus { get; init; } = DiskBus.Virtio;

    /// <summary>A disk or a CD-ROM drive; a CD-ROM drive also when <see cref="Bus"/> says so.</summary>
    public DiskMedia Media { get; init; } = DiskMedia.Disk;

    /// <summary>It is a CD-ROM drive, on whatever bus.</summary>
    public bool IsCdrom => Bus == DiskBus.Cdrom || Media == DiskMedia.Cdrom;

    /// <summary>Request queues of a virtio disk.</summary>
    public int Queues { get; init; } = 1;

    /// <summary>Format of the image.</summary>
    public DiskFormat Format { get; init; } = DiskFormat.Auto;

    /// <summary>Size in bytes to create the image with when it does not exist; null: it must exist.</summary>
    public long? SizeBytes { get; init; }

    /// <summary>Backing file for an image that is created; null for none.</summary>
    public string? Backing { get; init; }

    /// <summary>The guest cannot write.</summary>
    public bool ReadOnly { get; init; }

    /// <summary>Write caching.</summary>
    public DiskCache Cache { get; init; } = DiskCache.Writeback;

    /// <summary>The guest's discards free space on the host.</summary>
    public bool Discard { get; init; } = true;

    /// <summary>Serial number shown to the guest (at most 20 ASCII characters), or null.</summary>
    public string? Serial { get; init; }

    /// <summary>Most bytes a second, 0 for no limit.</summary>
    public long BytesPerSecond { get; init; }

    /// <summary>Most requests a second, 0 for no limit.</summary>
    public int RequestsPerSecond { get; init; }
}

/// <summary>What a network card is connected to.</summary>
public enum NicBackend
{
    /// <summary>User-mode NAT; needs no rights.</summary>
    User,

    /// <summary>A TAP interface of the host.</summary>
    Tap,

    /// <summary>A Unix socket shared with another process.</summary>
    Socket,

    /// <summary>Nothing: the link is down.</summary>
    None,
}

/// <summary>Kinds of network cards.</summary>
public enum NicModel
{
    /// <summary>virtio-net.</summary>
    Virtio,

    /// <summary>Intel 82540EM.</summary>
    E1000,

    /// <summary>Realtek 8139C+.</summary>
    Rtl8139,
}

/// <summary>A port of the host that leads into a guest (an entry of <c>forward:</c>).</summary>
/// <param name="IsUdp">UDP instead of TCP.</param>
/// <param name="HostAddress">Address that the host listens on.</param>
/// <param name="HostPort">Port that the host listens on.</param>
/// <param name="GuestPort">Port of the guest.</param>
public sealed record PortForward(bool IsUdp, IPAddress HostAddress, int HostPort, int GuestPort);

/// <summary>A network card (an entry of <c>nics:</c>).</summary>
public sealed record NicSpec
{
    /// <summary>What it is connected to.</summary>
    public NicBackend Backend { get; init; } = NicBackend.User;

    /// <summary>Interface name of <c>tap:NAME</c> or absolute path of <c>socket:PATH</c>; otherwise null.</summary>
    public string? Target { get; init; }

    /// <summary>Kind of card.</summary>
    public NicModel Model { get; init; } = NicModel.Virtio;

    /// <summary>MAC address, 48 bits, first octet highest; null: derived from the VM's name and the card's number.</summary>
    public ulong? Mac { get; init; }

    /// <summary>Ports led into the guest (user back end).</summary>
    public IReadOnlyList<PortForward> Forward { get; init; } = [];

    /// <summary>Name of the user-mode switch that VMs share, or null for a NAT of the VM's own.</summary>
    public string? Network { get; init; }

    /// <summary>Largest payload in bytes, 0 for the default of 1500.</summary>
    public int Mtu { get; init; }

    /// <summary>Pairs of queues of a virtio card.</summary>
    public int Queues { get; init; } = 1;

    /// <summary>Most bytes a second in each direction, 0 for no limit.</summary>
    public long BytesPerSecond { get; init; }
}

/// <summary>Where a character stream ends.</summary>
public enum CharKind
{
    /// <summary>The terminal of <c>vmctl run</c>, or what <c>vmctl console</c> attaches to.</summary>
    Stdio,

    /// <summary>A pseudo-terminal; its name is in the VM's status.</summary>
    Pty,

    /// <summary>A Unix socket that the VM listens on.</summary>
    Unix,

    /// <summary>A file that output is appended to.</summary>
    File,

    /// <summary>The VM's log only.</summary>
    Log,

    /// <summary>Nothing.</summary>
    None,
}

/// <summary>An end of a serial port or virtio console on the host.</summary>
/// <param name="Kind">What it is.</param>
/// <param name="Path">Absolute path for Unix and File, otherwise null.</param>
public sealed record CharSpec(CharKind Kind, string? Path = null);

/// <summary>A port of the virtio console (an entry of <c>console:</c>).</summary>
/// <param name="Name">Port name that the guest sees; null for the console itself.</param>
/// <param name="Backend">Where it ends.</param>
public sealed record ConsoleSpec(string? Name, CharSpec Backend);

/// <summary>Kinds of display cards.</summary>
public enum VgaModel
{
    /// <summary>No display.</summary>
    None,

    /// <summary>VGA with Bochs VBE.</summary>
    Std,

    /// <summary>VMware SVGA II.</summary>
    Vmware,

    /// <summary>virtio-gpu.</summary>
    Virtio,
}

/// <summary>What is printed on the guest's keyboard, for clients that send characters and not keys.</summary>
public enum KeyboardName
{
    /// <summary>American.</summary>
    Us,

    /// <summary>British.</summary>
    Gb,

    /// <summary>German.</summary>
    De,

    /// <summary>French.</summary>
    Fr,
}

/// <summary>The screen (<c>display:</c>).</summary>
public sealed record DisplaySpec
{
    /// <summary>Kind of card.</summary>
    public VgaModel Vga { get; init; } = VgaModel.None;

    /// <summary>Address that VNC listens on, <c>HOST:PORT</c>; null for none.</summary>
    public string? VncAddress { get; init; }

    /// <summary>Unix socket that VNC listens on; null for none.</summary>
    public string? VncSocket { get; init; }

    /// <summary>File whose first line is the VNC password; null for none.</summary>
    public string? PasswordFile { get; init; }

    /// <summary>Certificate (PEM) for VeNCrypt; null for none. Needs <see cref="TlsKey"/>.</summary>
    public string? TlsCertificate { get; init; }

    /// <summary>Private key (PEM) for VeNCrypt.</summary>
    public string? TlsKey { get; init; }

    /// <summary>The guest's keyboard.</summary>
    public KeyboardName Keyboard { get; init; }
}

/// <summary>Keyboards and pointers (entries of <c>input:</c>).</summary>
public enum InputDevice
{
    /// <summary>PS/2 keyboard and mouse.</summary>
    Ps2,

    /// <summary>USB tablet (absolute pointer).</summary>
    UsbTablet,

    /// <summary>USB keyboard.</summary>
    UsbKeyboard,

    /// <summary>virtio tablet.</summary>
    VirtioTablet,

    /// <summary>virtio keyboard.</summary>
    VirtioKeyboard,
}

/// <summary>When the daemon starts a VM again that ended by itself.</summary>
public enum RestartPolicy
{
    /// <summary>Not at all.</summary>
    Never,

    /// <summary>After a reset, a triple fault or an error, not after a power-off or halt.</summary>
    OnFailure,

    /// <summary>Whatever the reason, unless it was stopped by command.</summary>
    Always,
}

/// <summary>Restart with exponential back-off (<c>restart:</c>).</summary>
public sealed record RestartSpec
{
    /// <summary>When.</summary>
    public RestartPolicy Policy { get; init; } = RestartPolicy.OnFailure;

    /// <summary>Wait before the first restart; doubles each time.</summary>
    public TimeSpan Backoff { get; init; } = TimeSpan.FromSeconds(1);

    /// <summary>The longest wait.</summary>
    public TimeSpan MaxBackoff { get; init; } = TimeSpan.FromMinutes(5);

    /// <summary>Restarts within <see cref="Window"/> after which the daemon gives up; 0 for no limit.</summary>
    public int Limit { get; init; } = 5;

    /// <summary>A VM that ran this long has its back-off and count forgotten.</summary>
    public TimeSpan Window { get; init; } = TimeSpan.FromMinutes(10);
}

/// <summary>How the daemon finds out that a VM does its work (<c>health:</c>): exactly one probe.</summary>
public sealed record HealthSpec
{
    /// <summary>TCP address that accepts a connection, <c>HOST:PORT</c>, or null.</summary>
    public string? Tcp { get; init; }

    /// <summary>Regular expression that console output matches once, or null.</summary>
    public string? Console { get; init; }

    /// <summary>The guest agent answers.</summary>
    public bool Agent { get; init; }

    /// <summary>Time between probes.</summary>
    public TimeSpan Interval { get; init; } = TimeSpan.FromSeconds(10);

    /// <summary>Time that one probe may take.</summary>
    public TimeSpan Timeout { get; init; } = TimeSpan.FromSeconds(5);

    /// <summary>Failures in a row that make a healthy VM unhealthy.</summary>
    public int Retries { get; init; } = 3;

    /// <summary>Time after start in which failures do not count.</summary>
    public TimeSpan StartPeriod { get; init; } = TimeSpan.FromMinutes(1);

    /// <summary>An unhealthy VM is ended and started again, as its restart policy says.</summary>
    public bool Restart { get; init; }
}

/// <summary>First-boot data (<c>cloud-init:</c>), attached as a NoCloud seed.</summary>
public sealed record CloudInitSpec
{
    /// <summary>Host name; the VM's name when not given.</summary>
    public required string Hostname { get; init; }

    /// <summary>Public keys, in authorized_keys format.</summary>
    public IReadOnlyList<string> SshKeys { get; init; } = [];

    /// <summary>File of user data, or null.</summary>
    public string? UserData { get; init; }

    /// <summary>File of network configuration, or null.</summary>
    public string? Network { get; init; }
}

/// <summary>The software CPU (<c>soft:</c>).</summary>
public sealed record SoftSpec
{
    /// <summary>Hot code is translated; false keeps everything on the interpreter.</summary>
    public bool Translate { get; init; } = true;
}

/// <summary>Where guest time comes from.</summary>
public enum ClockSource
{
    /// <summary>The host's clock.</summary>
    Host,

    /// <summary>Instructions executed (software CPU only): the same run every time.</summary>
    Icount,
}

/// <summary>Guest time (<c>clock:</c>).</summary>
public sealed record ClockSpec
{
    /// <summary>Source.</summary>
    public ClockSource Source { get; init; } = ClockSource.Host;

    /// <summary>The real-time clock shows local time instead of UTC (DOS, Windows).</summary>
    public bool LocalTime { get; init; }

    /// <summary>Date that the real-time clock starts with; null for now.</summary>
    public DateTimeOffset? Start { get; init; }
}

/// <summary>What an expired watchdog does.</summary>
public enum WatchdogAction
{
    /// <summary>No watchdog in the machine.</summary>
    None,

    /// <summary>Resets the VM.</summary>
    Reset,

    /// <summary>Ends the VM as powered off.</summary>
    Poweroff,

    /// <summary>Pauses the VM.</summary>
    Pause,
}

/// <summary>Bus and interface of virtio devices.</summary>
public enum VirtioTransport
{
    /// <summary>PCI cards for drivers of VirtIO 1.0 and later and of 0.9.5.</summary>
    Pci,

    /// <summary>PCI cards with the interface of VirtIO 0.9.5 only.</summary>
    Legacy,

    /// <summary>Memory-mapped registers that ACPI announces; at most eight devices.</summary>
    Mmio,
}

/// <summary>How virtio devices are offered (<c>virtio:</c>).</summary>
/// <param name="Transport">Bus and interface.</param>
/// <param name="Packed">Offer packed virtqueues.</param>
public sealed record VirtioSpec(VirtioTransport Transport = VirtioTransport.Pci, bool Packed = false);

/// <summary>virtio-vsock (<c>vsock:</c>).</summary>
/// <param name="Cid">Context identifier of the guest, 3 to 2^32-2.</param>
/// <param name="Path">Unix socket: <c>CONNECT port</c> from the host; <c>PATH_port</c> towards it.</param>
public sealed record VsockSpec(uint Cid, string Path);

/// <summary>A directory of the host in the guest over 9P (an entry of <c>shares:</c>).</summary>
public sealed record ShareSpec
{
    /// <summary>Directory on the host.</summary>
    public required string Path { get; init; }

    /// <summary>Mount tag that the guest names, at most 31 bytes.</summary>
    public required string Tag { get; init; }

    /// <summary>The guest cannot write.</summary>
    public bool ReadOnly { get; init; }
}

/// <summary>Limits on a VM's process (<c>limits:</c>), enforced by the daemon where the system can.</summary>
public sealed record LimitsSpec
{
    /// <summary>Nice value, -20 to 19.</summary>
    public int Nice { get; init; }

    /// <summary>Percent of one processor, 0 for no limit.</summary>
    public int CpuPercent { get; init; }

    /// <summary>Bytes that the process may use beyond guest memory, 0 for no limit.</summary>
    public long OverheadBytes { get; init; }

    /// <summary>Descriptors, 0 for the system's default.</summary>
    public int OpenFiles { get; init; }
}

/// <summary>One VM as declared; see the head of this file.</summary>
public sealed record MachineSpec
{
    /// <summary>Smallest memory of a VM.</summary>
    public const long MinMemoryBytes = 1L << 20;

    /// <summary>Largest memory of a VM.</summary>
    public const long MaxMemoryBytes = 4L << 40;

    /// <summary>Name: a letter or digit, then letters, digits, <c>. - _</c>, at most 64 characters.</summary>
    public required string Name { get; init; }

    /// <summary>One line for people, or null.</summary>
    public string? Description { get; init; }

    /// <summary>SMBIOS system identifier; null: derived from the name.</summary>
    public Guid? Uuid { get; init; }

    /// <summary>Processors.</summary>
    public CpuSpec Cpus { get; init; } = new();

    /// <summary>Guest memory in bytes, a multiple of 4096.</summary>
    public long MemoryBytes { get; init; } = 512L << 20;

    /// <summary>Drivers to try in order; <c>auto</c>, <c>kvm</c>, <c>soft</c>.</summary>
    public IReadOnlyList<string> Accel { get; init; } = ["auto"];

    /// <summary>Where the interrupt controllers live.</summary>
    public IrqchipChoice Irqchip { get; init; }

    /// <summary>What it starts from.</summary>
    public required BootSpec Boot { get; init; }

    /// <summary>Drives.</summary>
    public IReadOnlyList<DiskSpec> Disks { get; init; } = [];

    /// <summary>Network cards.</summary>
    public IReadOnlyList<NicSpec> Nics { get; init; } = [];

    /// <summary>Serial ports COM1 to COM4.</summary>
    public IReadOnlyList<CharSpec> Serial { get; init; } = [new(CharKind.Stdio)];

    /// <summary>Ports of a virtio console; empty for none.</summary>
    public IReadOnlyList<ConsoleSpec> Console { get; init; } = [];

    /// <summary>The screen.</summary>
    public DisplaySpec Display { get; init; } = new();

    /// <summary>Keyboards and pointers.</summary>
    public IReadOnlyList<InputDevice> Input { get; init; } = [InputDevice.Ps2];

    /// <summary>virtio-rng.</summary>
    public bool Rng { get; init; }

    /// <summary>virtio-balloon.</summary>
    public bool Balloon { get; init; }

    /// <summary>virtio-vsock, or null.</summary>
    public VsockSpec? Vsock { get; init; }

    /// <summary>How the virtio devices are offered.</summary>
    public VirtioSpec Virtio { get; init; } = new();

    /// <summary>Directories shared over 9P.</summary>
    public IReadOnlyList<ShareSpec> Shares { get; init; } = [];

    /// <summary>I/O port of the debug-exit device, or null.</summary>
    public ushort? DebugExit { get; init; }

    /// <summary>The devices that kvm-unit-tests needs: pc-testdev, pci-testdev, fw_cfg.</summary>
    public bool TestDevice { get; init; }

    /// <summary>pvpanic device.</summary>
    public bool PvPanic { get; init; }

    /// <summary>VM generation identifier device.</summary>
    public bool VmGenId { get; init; }

    /// <summary>Watchdog (i6300ESB).</summary>
    public WatchdogAction Watchdog { get; init; }

    /// <summary>Software CPU.</summary>
    public SoftSpec Soft { get; init; } = new();

    /// <summary>Guest time.</summary>
    public ClockSpec Clock { get; init; } = new();

    /// <summary>First-boot data, or null.</summary>
    public CloudInitSpec? CloudInit { get; init; }

    /// <summary>The daemon starts it by itself.</summary>
    public bool Autostart { get; init; } = true;

    /// <summary>Restart policy.</summary>
    public RestartSpec Restart { get; init; } = new();

    /// <summary>VMs that are started before this one.</summary>
    public IReadOnlyList<string> After { get; init; } = [];

    /// <summary>VMs that are started before this one and must be healthy first.</summary>
    public IReadOnlyList<string> Requires { get; init; } = [];

    /// <summary>Health probe, or null: running is healthy.</summary>
    public HealthSpec? Health { get; init; }

    /// <summary>How long <c>stop</c> waits for the guest before it gives up.</summary>
    public TimeSpan StopTimeout { get; init; } = TimeSpan.FromSeconds(90);

    /// <summary>User that the VM's process runs as when the daemon is root; null for the daemon's choice.</summary>
    public string? RunAs { get; init; }

    /// <summary>Limits on the VM's process.</summary>
    public LimitsSpec Limits { get; init; } = new();

    /// <summary>Where keys stood in the file, for errors that are found later.</summary>
    public SourceMap Source { get; init; } = SourceMap.Empty;
}

/// <summary>Positions of keys, by dotted path: <c>boot.kernel</c>, <c>disks[1].path</c>. Immutable once parsed.</summary>
public sealed class SourceMap
{
    private readonly IReadOnlyDictionary<string, SourcePosition> _positions;

    internal SourceMap(SourcePosition start, IReadOnlyDictionary<string, SourcePosition> positions)
    {
        Start = start;
        _positions = positions;
    }

    /// <summary>For definitions that were not read from a file.</summary>
    public static SourceMap Empty { get; } = new(default, new Dictionary<string, SourcePosition>(StringComparer.Ordinal));

    /// <summary>Where the definition starts.</summary>
    public SourcePosition Start { get; }

    /// <summary>The value of a key, or the nearest key above it, or the start of the definition.</summary>
    public SourcePosition Find(string path)
    {
        ArgumentNullException.ThrowIfNull(path);
        string at = path;
        while (at.Length > 0)
        {
            if (_positions.TryGetValue(at, out SourcePosition found))
            {
                return found;
            }

            int cut = at.LastIndexOfAny(['.', '[']);
            at = cut < 0 ? string.Empty : at[..cut];
        }

        return Start;
    }
}

/// <summary>A set of VMs (a file with <c>vms:</c>, a file of several documents, or a directory).</summary>
public sealed record FleetSpec
{
    /// <summary>The VMs, names unique, in file order.</summary>
    public required IReadOnlyList<MachineSpec> Machines { get; init; }

    /// <summary>Most VMs that are being started at the same time; 0 for no limit, null for what suits the host.</summary>
    public int? StartParallel { get; init; }

    /// <summary>Time between two starts.</summary>
    public TimeSpan StartDelay { get; init; } = TimeSpan.Zero;

    /// <summary>Time that stopping the whole fleet may take.</summary>
    public TimeSpan StopTimeout { get; init; } = TimeSpan.FromMinutes(3);
}

/// <summary>Names of VMs.</summary>
public static class MachineNames
{
    /// <summary>True for a letter or digit followed by letters, digits, <c>. - _</c>, at most 64 in all.</summary>
    public static bool IsName(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        return MachineParser.IsName(text);
    }
}

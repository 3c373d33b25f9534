// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;

namespace Vmm.Config;

/// <summary>The words of the YAML and what they mean; used both to read and to write definitions.</summary>
internal static class Words
{
    internal static readonly (string, IrqchipChoice)[] Irqchip =
    [
        ("auto", IrqchipChoice.Auto),
        ("kernel", IrqchipChoice.Kernel),
        ("split", IrqchipChoice.Split),
        ("user", IrqchipChoice.User),
    ];

    internal static readonly (string, string)[] Accel = [("auto", "auto"), ("kvm", "kvm"), ("soft", "soft")];

    internal static readonly (string, BootDevice)[] BootDevices =
    [
        ("disk", BootDevice.Disk),
        ("cdrom", BootDevice.Cdrom),
        ("floppy", BootDevice.Floppy),
        ("net", BootDevice.Net),
    ];

    internal static readonly (string, DiskBus)[] Buses =
    [
        ("virtio", DiskBus.Virtio),
        ("ide", DiskBus.Ide),
        ("ahci", DiskBus.Ahci),
        ("nvme", DiskBus.Nvme),
        ("scsi", DiskBus.Scsi),
        ("floppy", DiskBus.Floppy),
        ("cdrom", DiskBus.Cdrom),
    ];

    internal static readonly (string, DiskMedia)[] Media = [("disk", DiskMedia.Disk), ("cdrom", DiskMedia.Cdrom)];

    internal static readonly (string, DiskFormat)[] Formats =
    [
        ("auto", DiskFormat.Auto),
        ("raw", DiskFormat.Raw),
        ("qcow2", DiskFormat.Qcow2),
    ];

    internal static readonly (string, DiskCache)[] Caches =
    [
        ("writeback", DiskCache.Writeback),
        ("writethrough", DiskCache.Writethrough),
        ("unsafe", DiskCache.Unsafe),
    ];

    internal static readonly (string, NicModel)[] NicModels =
    [
        ("virtio", NicModel.Virtio),
        ("e1000", NicModel.E1000),
        ("rtl8139", NicModel.Rtl8139),
    ];

    internal static readonly (string, CharKind)[] CharKinds =
    [
        ("stdio", CharKind.Stdio),
        ("pty", CharKind.Pty),
        ("log", CharKind.Log),
        ("none", CharKind.None),
    ];

    internal static readonly (string, VgaModel)[] VgaModels =
    [
        ("none", VgaModel.None),
        ("std", VgaModel.Std),
        ("vmware", VgaModel.Vmware),
        ("virtio", VgaModel.Virtio),
    ];

    internal static readonly (string, KeyboardName)[] Keyboards =
    [
        ("us", KeyboardName.Us),
        ("gb", KeyboardName.Gb),
        ("de", KeyboardName.De),
        ("fr", KeyboardName.Fr),
    ];

    internal static readonly (string, InputDevice)[] InputDevices =
    [
        ("ps2", InputDevice.Ps2),
        ("usb-tablet", InputDevice.UsbTablet),
        ("usb-keyboard", InputDevice.UsbKeyboard),
        ("virtio-tablet", InputDevice.VirtioTablet),
        ("virtio-keyboard", InputDevice.VirtioKeyboard),
    ];

    internal static readonly (string, VirtioTransport)[] VirtioTransports =
    [
        ("pci", VirtioTransport.Pci),
        ("legacy", VirtioTransport.Legacy),
        ("mmio", VirtioTransport.Mmio),
    ];

    internal static readonly (string, WatchdogAction)[] Watchdog =
    [
        ("none", WatchdogAction.None),
        ("reset", WatchdogAction.Reset),
        ("poweroff", WatchdogAction.Poweroff),
        ("pause", WatchdogAction.Pause),
    ];

    internal static readonly (string, ClockSource)[] ClockSources =
    [
        ("host", ClockSource.Host),
        ("icount", ClockSource.Icount),
    ];

    internal static readonly (string, RestartPolicy)[] Restarts =
    [
        ("never", RestartPolicy.Never),
        ("on-failure", RestartPolicy.OnFailure),
        ("always", RestartPolicy.Always),
    ];

    internal static string Of<T>((string Word, T Value)[] table, T value)
        where T : notnull
    {
        foreach ((string word, T candidate) in table)
        {
            if (EqualityComparer<T>.Default.Equals(candidate, value))
            {
                return word;
            }
        }

        throw new ArgumentOutOfRangeException(nameof(value));
    }
}

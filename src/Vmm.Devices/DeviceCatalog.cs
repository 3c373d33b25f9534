// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;

namespace Vmm.Devices;

/// <summary>How a guest reaches a device.</summary>
public enum DeviceBus
{
    /// <summary>Fixed ports or addresses of the board.</summary>
    Board,

    /// <summary>A PCI function.</summary>
    Pci,

    /// <summary>A virtio device behind one of the virtio transports.</summary>
    Virtio,

    /// <summary>A USB device behind the xHCI.</summary>
    Usb,
}

/// <summary>One device model.</summary>
/// <param name="Model">Name of its class.</param>
/// <param name="Bus">How a guest reaches it.</param>
/// <param name="Title">What it is, for people.</param>
/// <param name="Reference">The data sheet or specification that it follows.</param>
public sealed record DeviceEntry(string Model, DeviceBus Bus, string Title, string Reference);

/// <summary>
/// Every device model of this assembly, in one table that can be read and searched. A test compares it with the
/// classes, so that none is forgotten; the machine builder is what makes them.
/// </summary>
public static class DeviceCatalog
{
    /// <summary>All models.</summary>
    public static IReadOnlyList<DeviceEntry> All { get; } =
    [
        new("I8237", DeviceBus.Board, "DMA controllers", "Intel 8237A, 231466"),
        new("I8254", DeviceBus.Board, "interval timer and speaker port", "Intel 8254, 231164-005"),
        new("I8259Pair", DeviceBus.Board, "interrupt controllers", "Intel 8259A, 231468-003"),
        new("IoApic", DeviceBus.Board, "I/O interrupt controller", "Intel 82093AA, 290566-001"),
        new("LocalApic", DeviceBus.Board, "local interrupt controller, one per vCPU", "SDM 3A chapter 11"),
        new("Mc146818", DeviceBus.Board, "real-time clock and CMOS RAM", "Motorola MC146818A, ADI-856R2"),
        new("Hpet", DeviceBus.Board, "high precision event timers", "IA-PC HPET 1.0a"),
        new("Uart16550", DeviceBus.Board, "serial port", "National PC16550D"),
        new("I8042", DeviceBus.Board, "keyboard controller, keyboard and mouse", "IBM PS/2 Hardware Interface Technical Reference"),
        new("I82077", DeviceBus.Board, "floppy controller", "Intel 82077AA, 290166"),
        new("Port92", DeviceBus.Board, "system control port A", "IBM PS/2 Hardware Interface Technical Reference"),
        new("FwCfg", DeviceBus.Board, "firmware configuration", "QEMU docs/specs/fw_cfg"),
        new("VmGenId", DeviceBus.Board, "VM generation identifier", "Microsoft, Virtual Machine Generation ID, 2012"),
        new("FlashChip", DeviceBus.Board, "NOR flash", "Intel 28F128J3, 290667"),
        new("VirtioMmio", DeviceBus.Board, "virtio transport over MMIO", "VIRTIO 1.2 §4.2"),
        new("PciConfigPorts", DeviceBus.Board, "configuration mechanism 1 and reset port", "PCI 3.0 §3.2.2.3.2"),
        new("I440Fx", DeviceBus.Pci, "host bridge", "Intel 82441FX, 290549"),
        new("Piix3IsaBridge", DeviceBus.Pci, "ISA bridge and interrupt router", "Intel 82371SB, 290550"),
        new("Piix3Ide", DeviceBus.Pci, "IDE controller", "Intel 82371SB, 290550"),
        new("AcpiPm", DeviceBus.Pci, "ACPI power management", "Intel 82371AB, 290562"),
        new("Ahci", DeviceBus.Pci, "SATA controller", "AHCI 1.3.1"),
        new("Nvme", DeviceBus.Pci, "NVMe controller", "NVMe 1.4"),
        new("E1000", DeviceBus.Pci, "network card", "Intel 82540EM, 317453"),
        new("Rtl8139", DeviceBus.Pci, "network card", "Realtek RTL8139C(L) data sheet"),
        new("Vga", DeviceBus.Pci, "VGA with Bochs VBE", "IBM VGA/XGA Technical Reference"),
        new("Xhci", DeviceBus.Pci, "USB host controller", "xHCI 1.1"),
        new("I6300Esb", DeviceBus.Pci, "watchdog", "Intel 6300ESB, 300641"),
        new("PciTestCard", DeviceBus.Pci, "test card", "QEMU docs/specs/pci-testdev"),
        new("VirtioPci", DeviceBus.Pci, "virtio transport over PCI", "VIRTIO 1.2 §4.1"),
        new("UsbKeyboard", DeviceBus.Usb, "keyboard", "HID 1.11 appendix B"),
        new("UsbTablet", DeviceBus.Usb, "absolute pointer", "HID 1.11"),
        new("Virtio9P", DeviceBus.Virtio, "shared directory", "9P2000.L"),
        new("VirtioBalloon", DeviceBus.Virtio, "memory balloon", "VIRTIO 1.2 §5.5"),
        new("VirtioBlock", DeviceBus.Virtio, "disk", "VIRTIO 1.2 §5.2"),
        new("VirtioConsole", DeviceBus.Virtio, "console", "VIRTIO 1.2 §5.3"),
        new("VirtioGpu", DeviceBus.Virtio, "display, 2D", "VIRTIO 1.2 §5.7"),
        new("VirtioInput", DeviceBus.Virtio, "keyboard, mouse or tablet", "VIRTIO 1.2 §5.8"),
        new("VirtioNet", DeviceBus.Virtio, "network card", "VIRTIO 1.2 §5.1"),
        new("VirtioRng", DeviceBus.Virtio, "entropy source", "VIRTIO 1.2 §5.4"),
        new("VirtioScsi", DeviceBus.Virtio, "SCSI host adapter", "VIRTIO 1.2 §5.6"),
        new("VirtioVsock", DeviceBus.Virtio, "host sockets", "VIRTIO 1.2 §5.10"),
    ];

    /// <summary>Finds a model by the name of its class.</summary>
    /// <returns>Null when there is none.</returns>
    public static DeviceEntry? Find(string model)
    {
        foreach (DeviceEntry entry in All)
        {
            if (string.Equals(entry.Model, model, StringComparison.Ordinal))
            {
                return entry;
            }
        }

        return null;
    }
}

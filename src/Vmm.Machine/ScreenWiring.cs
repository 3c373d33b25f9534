// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Net;
using System.Security.Cryptography;
using System.Security.Cryptography.X509Certificates;
using Vmm.Backends.Screen;
using Vmm.Config;
using Vmm.Core;
using Vmm.Devices.Display;
using Vmm.Devices.Input;
using Vmm.Devices.Legacy;
using Vmm.Devices.Pci;
using Vmm.Devices.Virtio;
using Vmm.Host;
using Vmm.Machine.Boot;
using Vmm.Memory;

namespace Vmm.Machine;

/// <summary>The display card, keyboard and mouse of a machine, and the VNC server that shows them.</summary>
internal static class ScreenWiring
{
    private const int Slot = 2;
    private const ulong VideoMemoryBytes = 16 << 20;

    /// <summary>Adds keyboard and mouse and the card that the definition asks for.</summary>
    /// <returns>The keyboard controller.</returns>
    /// <exception cref="BootException">The card does not exist yet.</exception>
    public static I8042 Add(
        MachineParts parts,
        MachineSpec spec,
        PciBus bus,
        GuestMemory memory,
        IClock clock,
        ISystemControl system,
        IIrqLine[] isa)
    {
        var keyboard = new I8042(clock, isa[1], isa[12], system);
        parts.Devices.Add(keyboard);
        bus.Ports.Map(I8042.DataPort, keyboard.Data);
        bus.Ports.Map(I8042.CommandPort, keyboard.Command);
        parts.Display = AddCard(parts, spec, bus, memory, clock);
        return keyboard;
    }

    private static IDisplaySurface? AddCard(MachineParts parts, MachineSpec spec, PciBus bus, GuestMemory memory, IClock clock)
    {
        switch (spec.Display.Vga)
        {
            case VgaModel.None:
                return null;
            case VgaModel.Std:
                break;
            case VgaModel.Virtio:
                var gpu = new VirtioGpu();
                IDevice device = parts.Virtio.Make("gpu0", gpu);
                parts.AddCard(bus, device, Slot);
                return gpu;
            default:
                throw new BootException(
                    $"display: vga {spec.Display.Vga.ToString().ToLowerInvariant()} is not supported yet; use std");
        }

        var ram = new RamBlock("vram", HostMemory.Allocate((long)VideoMemoryBytes), VideoMemoryBytes);
        parts.Resources.Add(ram);
        parts.Blocks.Add(ram);
        var card = new Vga(clock, ram, new VideoMemoryMapper(memory, ram), FirmwareImage.FindVgaBios(), () => parts.Slots.CollectDirty());
        parts.AddCard(bus, card, Slot);
        bus.Ports.Map(Vga.Port, card.Ports);
        bus.Ports.Map(Vga.DispiPort, card.DispiPorts);
        bus.Mmio.Map(Vga.LegacyAddress, card.LegacyMemory);
        return card;
    }

    /// <summary>The USB devices that a definition asks for, in its order.</summary>
    public static List<UsbHidDevice> MakeUsb(MachineSpec spec)
    {
        var devices = new List<UsbHidDevice>();
        foreach (InputDevice input in spec.Input)
        {
            if (input == InputDevice.UsbKeyboard)
            {
                devices.Add(new UsbKeyboard());
            }
            else if (input == InputDevice.UsbTablet)
            {
                devices.Add(new UsbTablet());
            }
        }

        return devices;
    }

    /// <summary>Starts the viewers' server; after all keyboards and pointers were made.</summary>
    /// <param name="parts">The machine's parts.</param>
    /// <param name="spec">The definition.</param>
    /// <param name="keyboardController">What <see cref="Add"/> returned; null without a screen.</param>
    /// <param name="inputs">Keyboards and pointers that are models of VirtIO cards.</param>
    /// <param name="usb">Keyboards and tablets on USB.</param>
    /// <exception cref="BootException">The server cannot listen.</exception>
    public static void Serve(
        MachineParts parts,
        MachineSpec spec,
        I8042? keyboardController,
        IReadOnlyList<VirtioInput> inputs,
        IReadOnlyList<UsbHidDevice> usb)
    {
        DisplaySpec display = spec.Display;
        if (parts.Display is not { } surface || (display.VncAddress is null && display.VncSocket is null))
        {
            return;
        }

        List<IKeyboardSink> keyboards = keyboardController is null ? [] : [keyboardController.Keyboard];
        List<IPointerSink> pointers = keyboardController is null ? [] : [keyboardController.Mouse];
        foreach (VirtioInput card in inputs)
        {
            if (card.Kind == VirtioInputKind.Keyboard)
            {
                keyboards.Add(card);
            }
            else
            {
                pointers.Add(card);
            }
        }

        foreach (UsbHidDevice device in usb)
        {
            if (device is IKeyboardSink keyboard)
            {
                keyboards.Add(keyboard);
            }

            if (device is IPointerSink pointer)
            {
                pointers.Add(pointer);
            }
        }

        var input = new ScreenInput(keyboards, pointers, LayoutOf(display.Keyboard));
        try
        {
            var server = new VncServer(surface, input, Options(spec));
            parts.Resources.Insert(0, server);
            if (display.VncSocket is { } path)
            {
                server.ListenUnix(path);
            }
            else
            {
                server.Listen(IPEndPoint.Parse(display.VncAddress!.Replace("localhost", "127.0.0.1", StringComparison.Ordinal)));
            }
        }
        catch (Exception e) when (e is IOException or CryptographicException or UnauthorizedAccessException)
        {
            throw new BootException($"display: {e.Message}");
        }
    }

    private static KeyLayout LayoutOf(KeyboardName name) => KeyLayout.Find(name switch
    {
        KeyboardName.Gb => "gb",
        KeyboardName.De => "de",
        KeyboardName.Fr => "fr",
        _ => "us",
    })!;

    private static VncOptions Options(MachineSpec spec)
    {
        DisplaySpec display = spec.Display;
        return new VncOptions
        {
            Name = spec.Name,
            Password = display.PasswordFile is { } file ? File.ReadAllText(file).Split('\n')[0].TrimEnd('\r') : null,
            Certificate = display.TlsCertificate is { } certificate
                ? X509Certificate2.CreateFromPemFile(certificate, display.TlsKey)
                : null,
        };
    }
}

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
using Vmm.Host;
using Vmm.Machine.Boot;
using Vmm.Memory;

namespace Vmm.Machine;

/// <summary>The display card, keyboard and mouse of a machine, and the VNC server that shows them.</summary>
internal static class ScreenWiring
{
    private const ulong VideoMemoryBytes = 16 << 20;

    /// <summary>Adds keyboard and mouse, the card that the definition asks for, and its viewers' server.</summary>
    /// <exception cref="BootException">The card does not exist yet, or the server cannot listen.</exception>
    public static void Add(
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
        if (AddCard(parts, spec, bus, memory, clock) is { } card)
        {
            parts.Display = card;
            Serve(parts, spec, card, keyboard);
        }
    }

    private static Vga? AddCard(MachineParts parts, MachineSpec spec, PciBus bus, GuestMemory memory, IClock clock)
    {
        switch (spec.Display.Vga)
        {
            case VgaModel.None:
                return null;
            case VgaModel.Std:
                break;
            default:
                throw new BootException(
                    $"display: vga {spec.Display.Vga.ToString().ToLowerInvariant()} is not supported yet; use std");
        }

        var ram = new RamBlock("vram", HostMemory.Allocate((long)VideoMemoryBytes), VideoMemoryBytes);
        parts.Resources.Add(ram);
        parts.Blocks.Add(ram);
        var card = new Vga(clock, ram, new Mapper(memory, ram), FirmwareWiring.FindVgaBios(), () => parts.Slots.CollectDirty());
        bus.Attach(card, 2);
        parts.Devices.Add(card);
        bus.Ports.Map(Vga.Port, card.Ports);
        bus.Ports.Map(Vga.DispiPort, card.DispiPorts);
        bus.Mmio.Map(Vga.LegacyAddress, card.LegacyMemory);
        return card;
    }

    private static void Serve(MachineParts parts, MachineSpec spec, IDisplaySurface surface, I8042 keyboardController)
    {
        DisplaySpec display = spec.Display;
        if (display.VncAddress is null && display.VncSocket is null)
        {
            return;
        }

        var keyboards = new List<IKeyboardSink> { keyboardController.Keyboard };
        var pointers = new List<IPointerSink> { keyboardController.Mouse };
        foreach (IDevice device in parts.Devices)
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

        var input = new ScreenInput(keyboards, pointers, KeyLayout.Find("us")!);
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

    /// <summary>Video memory at the place that the guest gave BAR 0.</summary>
    private sealed class Mapper(GuestMemory memory, RamBlock ram) : IRamBarMapper
    {
        private RamMapping? _mapping;

        public void Move(ulong? guestAddress)
        {
            if (_mapping is { } old)
            {
                memory.Unmap(old);
                _mapping = null;
            }

            if (guestAddress is { } address)
            {
                _mapping = memory.Map(address, ram, 0, ram.LengthBytes, priority: 1, logDirty: true);
            }
        }
    }
}

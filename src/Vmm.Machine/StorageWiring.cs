// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using Vmm.Config;
using Vmm.Core;
using Vmm.Devices.Legacy;
using Vmm.Devices.Pci;
using Vmm.Devices.Storage;
using Vmm.Devices.Virtio;
using Vmm.Machine.Boot;

namespace Vmm.Machine;

/// <summary>
/// Puts the disks of a definition behind their controllers. Disks of one kind keep their order. IDE disks take the places
/// primary master, primary slave, secondary master, secondary slave; CD-ROMs start at the secondary master, where PCs have
/// them. AHCI controllers take six drives each, a virtio-scsi host takes all that name it; every NVMe and virtio disk is a card of
/// its own.
/// </summary>
internal sealed class StorageWiring
{
    /// <summary>CMOS register that tells the BIOS of floppy drives.</summary>
    public const int CmosFloppyTypes = 0x10;

    private static readonly int[] s_cdPlaces = [2, 3, 1, 0];

    private readonly MachineParts _parts;
    private readonly PciBus _bus;
    private readonly AtaDevice?[] _ide = new AtaDevice?[4];
    private readonly List<AtaDevice> _sata = [];
    private readonly List<IBlockBackend?> _floppies = [];
    private readonly List<ScsiUnit> _scsi = [];
    private readonly List<IDevice> _cards = [];

    private StorageWiring(MachineParts parts, PciBus bus)
    {
        _parts = parts;
        _bus = bus;
    }

    /// <summary>CD-ROM drives by name ("cdrom0"), for changing media.</summary>
    public Dictionary<string, AtapiCdrom> Cdroms { get; } = new(StringComparer.Ordinal);

    /// <summary>The floppy controller, or null.</summary>
    public I82077? Floppies { get; private set; }

    /// <summary>Contents of <see cref="CmosFloppyTypes"/>: drive A in the upper half, B in the lower.</summary>
    public byte FloppyTypes => Floppies is null ? (byte)0 : (byte)(((int)Floppies.KindOf(0) << 4) | (int)Floppies.KindOf(1));

    /// <summary>Adds controllers and drives.</summary>
    /// <param name="parts">Where they go.</param>
    /// <param name="spec">The definition.</param>
    /// <param name="bus">The PCI bus; the PIIX3's function 0 is on it already.</param>
    /// <param name="isa">16 ISA interrupt wires.</param>
    /// <exception cref="BootException">An image cannot be used, or there are too many drives of a kind.</exception>
    public static StorageWiring Add(MachineParts parts, MachineSpec spec, PciBus bus, IIrqLine[] isa)
    {
        var wiring = new StorageWiring(parts, bus);
        for (int i = 0; i < spec.Disks.Count; i++)
        {
            wiring.AddDisk(spec.Disks[i], i);
        }

        wiring.AddControllers(isa, hasFirmware: spec.Boot.Kernel is null);
        return wiring;
    }

    /// <summary>Where firmware finds the drives (Open Firmware paths, one a line), kinds in the order asked for.</summary>
    public string BootOrder(IReadOnlyList<BootDevice> order)
    {
        var lines = new List<string>();
        foreach (BootDevice kind in order)
        {
            switch (kind)
            {
                case BootDevice.Disk:
                    AddIde(lines, isCdrom: false);
                    foreach (PciFunction card in _bus.Functions)
                    {
                        AddCard(lines, card);
                    }

                    break;
                case BootDevice.Cdrom:
                    AddIde(lines, isCdrom: true);
                    break;
                case BootDevice.Floppy when Floppies is not null:
                    lines.Add("/pci@i0cf8/isa@1/fdc@03f0/floppy@0");
                    break;
                default:
                    break;
            }
        }

        return string.Join('\n', lines);
    }

    private static void AddCard(List<string> lines, PciFunction card)
    {
        (string Kind, string Tail)? path = card switch
        {
            Ahci => ("pci8086,2922", "/drive@0/disk@0"),
            Nvme => ("pci1b36,10", "/namespace@1,0"),
            _ when card.Identity is { VendorId: 0x1AF4, DeviceId: 0x1001 or 0x1042 } => ("scsi", "/disk@0,0"),
            _ when card.Identity is { VendorId: 0x1AF4, DeviceId: 0x1004 or 0x1048 } => ("scsi", "/channel@0/disk@0,0"),
            _ => null,
        };
        if (path is { } found)
        {
            lines.Add(string.Create(CultureInfo.InvariantCulture, $"/pci@i0cf8/{found.Kind}@{card.DeviceNumber:x}{found.Tail}"));
        }
    }

    private void AddIde(List<string> lines, bool isCdrom)
    {
        for (int i = 0; i < _ide.Length; i++)
        {
            if (_ide[i] is { } drive && drive is AtapiCdrom == isCdrom)
            {
                lines.Add(string.Create(CultureInfo.InvariantCulture, $"/pci@i0cf8/ide@1,1/drive@{i / 2}/disk@{i % 2}"));
            }
        }
    }

    private void AddDisk(DiskSpec spec, int index)
    {
        string name = string.Create(CultureInfo.InvariantCulture, $"disk{index}");
        string serial = spec.Serial ?? string.Create(CultureInfo.InvariantCulture, $"VMM{index:D8}");
        IBlockBackend? backend = BlockFactory.Open(spec, name, _parts.Findings);
        if (backend is not null)
        {
            _parts.Resources.Add(backend);
        }

        switch (spec.Bus)
        {
            case DiskBus.Scsi when spec.IsCdrom:
                var drive = new AtapiCdrom(backend, serial);
                Cdroms.Add(string.Create(CultureInfo.InvariantCulture, $"cdrom{Cdroms.Count}"), drive);
                _scsi.Add(new ScsiCdrom(drive));
                return;
            case DiskBus.Cdrom:
                var cdrom = new AtapiCdrom(backend, serial);
                Cdroms.Add(string.Create(CultureInfo.InvariantCulture, $"cdrom{Cdroms.Count}"), cdrom);
                Place(cdrom, s_cdPlaces);
                return;
            case DiskBus.Floppy:
                _floppies.Add(backend);
                return;
            default:
                break;
        }

        if (backend is null)
        {
            throw new BootException($"disks: a disk on {spec.Bus.ToString().ToLowerInvariant()} needs a path");
        }

        switch (spec.Bus)
        {
            case DiskBus.Ide:
                Place(new AtaDisk(backend, serial), [0, 1, 2, 3]);
                break;
            case DiskBus.Ahci:
                _sata.Add(new AtaDisk(backend, serial));
                break;
            case DiskBus.Virtio:
                var model = new VirtioBlock(backend, new VirtioBlockOptions { Serial = serial, Queues = spec.Queues });
                _cards.Add(_parts.Virtio.Make(name, model));
                break;
            case DiskBus.Scsi:
                _scsi.Add(new ScsiDisk(backend, serial));
                break;
            case DiskBus.Nvme:
                _cards.Add(new Nvme(name, backend, serial));
                break;
            default:
                throw new BootException($"disks: bus {spec.Bus.ToString().ToLowerInvariant()} is not supported yet");
        }
    }

    private void Place(AtaDevice drive, ReadOnlySpan<int> places)
    {
        foreach (int place in places)
        {
            if (_ide[place] is null)
            {
                _ide[place] = drive;
                return;
            }
        }

        throw new BootException("disks: IDE takes at most four drives, CD-ROMs included");
    }

    private void AddControllers(IIrqLine[] isa, bool hasFirmware)
    {
        var dma = new I8237(_bus.Memory);
        _parts.Devices.Add(dma);
        _bus.Ports.Map(0x00, dma.First);
        _bus.Ports.Map(0xC0, dma.Second);
        _bus.Ports.Map(0x81, dma.Pages);
        if (hasFirmware || Array.Exists(_ide, drive => drive is not null))
        {
            // SeaBIOS turns the channels on, OVMF and kernels expect them on, as every virtual PIIX3 has them: OVMF
            // would wait half a minute for each drive that it cannot see.
            var ide = new Piix3Ide(_ide, isa[14], isa[15], isEnabledAtReset: true);
            _bus.Attach(ide, 1, 1);
            _parts.Devices.Add(ide);
        }

        if (_floppies.Count > 2)
        {
            throw new BootException("disks: there are at most two floppy drives");
        }

        if (_floppies.Count > 0)
        {
            IBlockBackend? second = _floppies.Count > 1 ? _floppies[1] : null;
            Floppies = new I82077(_floppies[0], second, _floppies.Count > 1, isa[6], dma[2]);
            _parts.Devices.Add(Floppies);
            _bus.Ports.Map(0x3F0, Floppies.Low);
            _bus.Ports.Map(0x3F7, Floppies.High);
        }

        for (int first = 0; first < _sata.Count; first += Ahci.MaxPorts)
        {
            int count = Math.Min(Ahci.MaxPorts, _sata.Count - first);
            string id = string.Create(CultureInfo.InvariantCulture, $"ahci{first / Ahci.MaxPorts}");
            _cards.Add(new Ahci(id, [.. _sata.GetRange(first, count)]));
        }

        for (int first = 0; first < _scsi.Count; first += VirtioScsi.MaxUnits)
        {
            int count = Math.Min(VirtioScsi.MaxUnits, _scsi.Count - first);
            string id = string.Create(CultureInfo.InvariantCulture, $"scsi{first / VirtioScsi.MaxUnits}");
            _cards.Add(_parts.Virtio.Make(id, new VirtioScsi(_scsi.GetRange(first, count))));
        }

        foreach (IDevice card in _cards)
        {
            _parts.AddCard(_bus, card);
        }
    }
}

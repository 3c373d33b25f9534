// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Text;
using Vmm.Config;
using Vmm.Core;
using Vmm.Devices.Display;
using Vmm.Devices.Firmware;
using Vmm.Devices.Legacy;
using Vmm.Devices.Pci;
using Vmm.Host;
using Vmm.Machine.Boot;
using Vmm.Memory;

namespace Vmm.Machine;

/// <summary>
/// Firmware: its ROM below 4 GiB with the shadow RAM at 0xC0000, the flash chip with UEFI's variables, and what firmware
/// learns through fw_cfg (memory, processors, ACPI tables, boot order).
/// </summary>
internal sealed class FirmwareWiring
{
    private const ulong Top = 1UL << 32;
    private const int CmosCpuCount = 0x5F;
    private const int FlashPriority = 1;

    // Room for what the tables may grow by: a window above 4 GiB in the DSDT.
    private const int TableSlackBytes = 4096;

    private FirmwareWiring(IShadowRam shadow)
    {
        Shadow = shadow;
    }

    /// <summary>Switches the shadow RAM.</summary>
    public IShadowRam Shadow { get; }

    /// <summary>Loads the firmware of a definition and puts it into memory.</summary>
    /// <param name="parts">Takes the ROM's memory and the flash chip.</param>
    /// <param name="spec">The definition.</param>
    /// <param name="memory">Guest memory; the first block of <paramref name="parts"/> is RAM from address 0.</param>
    /// <param name="mmio">Where the flash chip's commands arrive.</param>
    /// <exception cref="BootException">It cannot be found or used.</exception>
    public static FirmwareWiring Load(MachineParts parts, MachineSpec spec, GuestMemory memory, AddressMap mmio)
    {
        FirmwareImage image = FirmwareImage.Load(spec.Boot.Firmware);
        var rom = new RamBlock("firmware", HostMemory.Allocate(image.Code.Length), (ulong)image.Code.Length);
        parts.Resources.Add(rom);
        parts.Blocks.Add(rom);
        _ = rom.TryWrite(0, image.Code, out _);
        var shadow = new FirmwareRom(memory, rom, parts.Blocks[0]);
        if (image.IsUefi)
        {
            string path = spec.Boot.Vars ?? Path.Combine(StateDirectory(), spec.Name, "uefi-vars.fd");
            AddFlash(parts, memory, mmio, VariableStore.Open(path, image.Variables), Top - rom.LengthBytes);
        }
        else if (spec.Boot.Vars is not null)
        {
            throw new BootException("boot: vars: this firmware is a BIOS, which keeps no variables; leave the key out");
        }

        return new FirmwareWiring(shadow);
    }

    // While the chip shows its array it is read-only memory and only writes arrive; otherwise everything does.
    private static void AddFlash(MachineParts parts, GuestMemory memory, AddressMap mmio, VariableStore store, ulong end)
    {
        parts.Resources.Add(store);
        parts.Blocks.Add(store.Content);
        ulong start = end - store.Content.LengthBytes;
        RamMapping? mapping = Map();
        var chip = new FlashChip("uefi-vars", store.Content, store, isArray =>
        {
            if (mapping is { } old)
            {
                memory.Unmap(old);
                mapping = null;
            }

            if (isArray)
            {
                mapping = Map();
            }
        });
        parts.Devices.Add(chip);
        mmio.Map(start, chip);

        RamMapping Map() =>
            memory.Map(start, store.Content, 0, store.Content.LengthBytes, RamAccess.ReadOnly, FlashPriority);
    }

    /// <summary>Tells firmware about the machine.</summary>
    public static void Describe(
        MachineParts parts, MachineSpec spec, MemoryLayout layout, PciBus bus, Mc146818 rtc, StorageWiring storage, AcpiPm pm, Smbios smbios)
    {
        bool hasVga = parts.Display is Vga;
        rtc.SetMemorySize(layout.LowBytes, layout.HighBytes);
        rtc.SetRam(CmosCpuCount, (byte)(spec.Cpus.Count - 1));
        FwCfg config = AddFwCfg(parts, spec, layout, bus);
        config.AddNumber(FwCfgKey.NoGraphic, hasVga ? 0UL : 1UL, 2);
        config.AddNumber(FwCfgKey.BootMenu, spec.Boot.Menu ? 1UL : 0, 2);
        config.AddNumber(FwCfgKey.Irq0Override, 1, 4);
        if (!hasVga && spec.Serial.Count > 0)
        {
            // Without a screen SeaBIOS shows it on COM1 and takes keys from there.
            config.AddFile("etc/sercon-port", 0x3F8, 2);
        }

        config.AddFile("etc/e820", MemoryMap(layout, spec.VmGenId));
        config.AddFile("bootorder", Encoding.ASCII.GetBytes(storage.BootOrder(spec.Boot.Order) + "\0"));
        FwCfgAcpi.AddTo(config, TableSlackBytes, () => AcpiTables.Build(Acpi(parts, spec, layout, bus, storage, pm, hasVga)));
        smbios.AddTo(config);
        config.Add(FwCfgKey.Uuid, UuidBytes(spec));
    }

    /// <summary>Adds fw_cfg with the size of memory and the number of processors, which is what test kernels read.</summary>
    public static FwCfg AddFwCfg(MachineParts parts, MachineSpec spec, MemoryLayout layout, PciBus bus)
    {
        var config = new FwCfg(bus.Memory);
        config.AddNumber(FwCfgKey.RamSize, layout.MemoryBytes, 8);
        config.AddNumber(FwCfgKey.CpuCount, (ulong)spec.Cpus.Count, 2);
        config.AddNumber(FwCfgKey.MaxCpus, (ulong)spec.Cpus.Count, 2);
        parts.Devices.Add(config);
        bus.Ports.Map(FwCfg.Port, config);
        return config;
    }

    // As firmware has set the machine up by now: the port of the power management block, the windows that hold the BARs.
    private static AcpiSpec Acpi(
        MachineParts parts,
        MachineSpec spec,
        MemoryLayout layout,
        PciBus bus,
        StorageWiring storage,
        AcpiPm pm,
        bool hasVga)
    {
        PciApertures found = PciApertures.Find(bus);
        ulong low = found.LowStart >= layout.LowBytes && found.LowStart != 0
            ? Math.Min(found.LowStart, MemoryLayout.HoleStart)
            : MemoryLayout.HoleStart;
        const ulong Unit = 1UL << 30;
        ulong high = found.HighStart & ~(Unit - 1);
        return new AcpiSpec
        {
            Cpus = spec.Cpus.Count,
            SerialPorts = spec.Serial.Count,
            HasHpet = true,
            HasKeyboardController = true,
            HasVga = hasVga,
            HasFloppy = storage.Floppies is not null,
            PmBase = pm.RegisterPort,
            PciWindowStart = (uint)low,
            Nodes = parts.AcpiNodes,
            PciWindow64Start = high,
            PciWindow64Bytes = found.HighEnd == 0 ? 0 : ((found.HighEnd + Unit - 1) & ~(Unit - 1)) - high,
        };
    }

    private static byte[] UuidBytes(MachineSpec spec)
    {
        byte[] bytes = new byte[16];
        MachineTables.UuidOf(spec).TryWriteBytes(bytes, bigEndian: true, out _);
        return bytes;
    }

    // Entries of address, length and type, 20 bytes each.
    private static byte[] MemoryMap(MemoryLayout layout, bool hasGenerationId)
    {
        var entries = new List<E820Entry> { new(0, layout.LowBytes, E820Kind.Usable) };
        if (layout.HighBytes > 0)
        {
            entries.Add(new E820Entry(MemoryLayout.HoleEnd, layout.HighBytes, E820Kind.Usable));
        }

        if (hasGenerationId)
        {
            entries.Add(new E820Entry(VmGenId.Address, RamBlock.PageBytes, E820Kind.Reserved));
        }

        byte[] map = new byte[entries.Count * 20];
        for (int i = 0; i < entries.Count; i++)
        {
            Span<byte> entry = map.AsSpan(i * 20);
            BinaryPrimitives.WriteUInt64LittleEndian(entry, entries[i].Start);
            BinaryPrimitives.WriteUInt64LittleEndian(entry[8..], entries[i].LengthBytes);
            BinaryPrimitives.WriteUInt32LittleEndian(entry[16..], (uint)entries[i].Kind);
        }

        return map;
    }

    // As Vmm.Fleet's FleetPaths, which this assembly does not see.
    private static string StateDirectory()
    {
        if (Environment.GetEnvironmentVariable("VMM_STATE_DIR") is { Length: > 0 } given)
        {
            return given;
        }

        if (HostProcess.IsRoot)
        {
            return "/var/db/vmm";
        }

        string home = Environment.GetEnvironmentVariable("HOME") is { Length: > 0 } value ? value : "/tmp";
        return Environment.GetEnvironmentVariable("XDG_STATE_HOME") is { Length: > 0 } state
            ? Path.Combine(state, "vmm")
            : Path.Combine(home, ".local", "state", "vmm");
    }
}

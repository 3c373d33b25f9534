// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.IO;
using System.Text;
using Vmm.Config;
using Vmm.Devices.Firmware;
using Vmm.Devices.Legacy;
using Vmm.Devices.Pci;
using Vmm.Host;
using Vmm.Machine.Boot;
using Vmm.Memory;

namespace Vmm.Machine;

/// <summary>
/// Firmware: its ROM below 4 GiB, the last 128 KiB of it below 1 MiB, the shadow RAM there as the host bridge's PAM
/// registers say, and what firmware learns through fw_cfg (memory, processors, ACPI tables, boot order).
/// </summary>
internal sealed class FirmwareWiring : IShadowRam
{
    private const ulong Top = 1UL << 32;
    private const uint RomStart = 0xE_0000;
    private const uint ShadowStart = 0xC_0000;
    private const uint ShadowEnd = 0x10_0000;
    private const uint PieceBytes = 0x4000;
    private const int ShadowPriority = 2;
    private const int CmosCpuCount = 0x5F;

    private static readonly string[] s_places =
    [
        "/usr/share/seabios", "/usr/local/share/seabios", "/usr/share/qemu", "/usr/local/share/qemu",
        "/opt/local/share/qemu", "/usr/lib/qemu", "/opt/ooce/qemu/share/qemu",
    ];

    private readonly RamMapping?[] _pieces = new RamMapping?[(ShadowEnd - ShadowStart) / PieceBytes];
    private readonly GuestMemory _memory;
    private readonly RamBlock _ram;
    private readonly RamBlock _rom;

    private FirmwareWiring(GuestMemory memory, RamBlock ram, RamBlock rom)
    {
        _memory = memory;
        _ram = ram;
        _rom = rom;
    }

    /// <summary>Loads the firmware of a definition and puts it into memory.</summary>
    /// <param name="parts">Takes the ROM's memory.</param>
    /// <param name="spec">The definition.</param>
    /// <param name="memory">Guest memory; the first block of <paramref name="parts"/> is RAM from address 0.</param>
    /// <exception cref="BootException">It cannot be found or used.</exception>
    public static FirmwareWiring Load(MachineParts parts, MachineSpec spec, GuestMemory memory)
    {
        if (spec.Boot.Firmware is "uefi")
        {
            throw new BootException("boot: firmware uefi is not supported yet; use seabios");
        }

        string path = spec.Boot.Firmware is null or "seabios" ? Find("bios-256k.bin", "bios.bin") : spec.Boot.Firmware;
        byte[] image = ReadImage(path);
        if (image.Length is < 0x1_0000 or > (16 << 20) || image.Length % RamBlock.PageBytes != 0)
        {
            throw new BootException($"boot: {path}: firmware is 64 KiB to 16 MiB and a multiple of 4 KiB");
        }

        var rom = new RamBlock("firmware", HostMemory.Allocate(image.Length), (ulong)image.Length);
        parts.Resources.Add(rom);
        parts.Blocks.Add(rom);
        _ = rom.TryWrite(0, image, out _);
        _ = memory.Map(Top - rom.LengthBytes, rom, 0, rom.LengthBytes, RamAccess.ReadOnly, priority: 1);
        return new FirmwareWiring(memory, parts.Blocks[0], rom);
    }

    /// <summary>A VGA BIOS, or nothing when the host has none.</summary>
    public static ReadOnlyMemory<byte> FindVgaBios() =>
        TryFind("vgabios-stdvga.bin") is { } path ? ReadImage(path) : ReadOnlyMemory<byte>.Empty;

    /// <inheritdoc/>
    public void Configure(uint start, uint lengthBytes, bool readRam, bool writeRam)
    {
        _memory.Transaction(() =>
        {
            for (uint at = start; at < start + lengthBytes; at += PieceBytes)
            {
                ref RamMapping? piece = ref _pieces[(at - ShadowStart) / PieceBytes];
                if (piece is { } old)
                {
                    _memory.Unmap(old);
                }

                piece = Make(at, readRam, writeRam);
            }
        });
    }

    /// <summary>Tells firmware about the machine.</summary>
    public static void Describe(
        MachineParts parts, MachineSpec spec, MemoryLayout layout, PciBus bus, Mc146818 rtc, StorageWiring storage, bool hasVga)
    {
        rtc.SetMemorySize(layout.LowBytes, layout.HighBytes);
        rtc.SetRam(CmosCpuCount, (byte)(spec.Cpus.Count - 1));
        var config = new FwCfg(bus.Memory);
        config.AddNumber(FwCfgKey.RamSize, layout.MemoryBytes, 8);
        config.AddNumber(FwCfgKey.CpuCount, (ulong)spec.Cpus.Count, 2);
        config.AddNumber(FwCfgKey.MaxCpus, (ulong)spec.Cpus.Count, 2);
        config.AddNumber(FwCfgKey.NoGraphic, hasVga ? 0UL : 1UL, 2);
        config.AddNumber(FwCfgKey.BootMenu, spec.Boot.Menu ? 1UL : 0, 2);
        config.AddNumber(FwCfgKey.Irq0Override, 1, 4);
        config.AddFile("etc/e820", MemoryMap(layout));
        config.AddFile("bootorder", Encoding.ASCII.GetBytes(storage.BootOrder(spec.Boot.Order) + "\0"));
        FwCfgAcpi.AddTo(
            config,
            AcpiTables.Build(new AcpiSpec
            {
                Cpus = spec.Cpus.Count,
                SerialPorts = spec.Serial.Count,
                HasHpet = true,
                HasKeyboardController = true,
                HasVga = hasVga,
                HasFloppy = storage.Floppies is not null,
            }));
        parts.Devices.Add(config);
        bus.Ports.Map(FwCfg.Port, config);
    }

    private RamMapping? Make(uint at, bool readRam, bool writeRam)
    {
        if (readRam)
        {
            return writeRam
                ? null
                : _memory.Map(at, _ram, at, PieceBytes, RamAccess.ReadOnly, ShadowPriority);
        }

        // ROM for reads with RAM for writes does not exist as a slot; firmware sets both bits at once.
        ulong fromTop = ShadowEnd - at;
        return at >= RomStart && fromTop <= _rom.LengthBytes
            ? _memory.Map(at, _rom, _rom.LengthBytes - fromTop, PieceBytes, RamAccess.ReadOnly, ShadowPriority)
            : _memory.MapHole(at, PieceBytes, ShadowPriority);
    }

    // Entries of address, length and type (1 is RAM), 20 bytes each.
    private static byte[] MemoryMap(MemoryLayout layout)
    {
        byte[] map = new byte[layout.HighBytes > 0 ? 40 : 20];
        BinaryPrimitives.WriteUInt64LittleEndian(map.AsSpan(8), layout.LowBytes);
        map[16] = 1;
        if (layout.HighBytes > 0)
        {
            BinaryPrimitives.WriteUInt64LittleEndian(map.AsSpan(20), MemoryLayout.HoleEnd);
            BinaryPrimitives.WriteUInt64LittleEndian(map.AsSpan(28), layout.HighBytes);
            map[36] = 1;
        }

        return map;
    }

    private static string Find(params ReadOnlySpan<string> names)
    {
        foreach (string name in names)
        {
            if (TryFind(name) is { } path)
            {
                return path;
            }
        }

        throw new BootException(
            $"boot: SeaBIOS is not installed (package seabios); looked in {string.Join(", ", s_places)}", isMissingInput: true);
    }

    private static string? TryFind(string name)
    {
        foreach (string place in s_places)
        {
            string path = Path.Combine(place, name);
            if (File.Exists(path))
            {
                return path;
            }
        }

        return null;
    }

    private static byte[] ReadImage(string path)
    {
        try
        {
            return File.ReadAllBytes(path);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new BootException($"boot: {e.Message}", isMissingInput: true);
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Devices.Pci;
using Vmm.Memory;

namespace Vmm.Devices.Firmware;

/// <summary>
/// A firmware image in guest-physical space as an i440FX board has it: the whole of it below 4 GiB, its last 128 KiB also
/// at 0xE0000, and RAM in its place there as far as the PAM registers say. Pieces of 0xC0000..0xDFFFF that are not
/// shadowed are a hole. The "write to RAM, read from ROM" setting loses the writes: firmware copies itself from the
/// image below 4 GiB, so nothing depends on it.
/// </summary>
public sealed class FirmwareRom : IShadowRam
{
    private const uint ShadowStart = 0xC_0000;
    private const uint RomStart = 0xE_0000;
    private const uint ShadowEnd = 0x10_0000;
    private const uint PieceBytes = 0x4000;
    private const int Priority = 1;

    private readonly Lock _gate = new();
    private readonly GuestMemory _memory;
    private readonly RamBlock _rom;
    private readonly RamBlock _ram;
    private readonly RamMapping?[] _pieces = new RamMapping?[(ShadowEnd - ShadowStart) / PieceBytes];

    /// <summary>Maps the image. RAM must be mapped from address 0 with priority 0.</summary>
    /// <param name="memory">Guest memory.</param>
    /// <param name="rom">The image: 64 KiB to 16 MiB, a multiple of 4 KiB.</param>
    /// <param name="ram">The block that is RAM at 0, whose offsets are guest addresses there.</param>
    public FirmwareRom(GuestMemory memory, RamBlock rom, RamBlock ram)
    {
        ArgumentNullException.ThrowIfNull(memory);
        ArgumentNullException.ThrowIfNull(rom);
        ArgumentNullException.ThrowIfNull(ram);
        if (rom.LengthBytes is < 0x1_0000 or > 16 << 20 || rom.LengthBytes % RamBlock.PageBytes != 0)
        {
            throw new ArgumentException("a firmware image has 64 KiB to 16 MiB and is a multiple of 4 KiB", nameof(rom));
        }

        _memory = memory;
        _rom = rom;
        _ram = ram;
        memory.Map((1UL << 32) - rom.LengthBytes, rom, 0, rom.LengthBytes, RamAccess.ReadOnly, Priority);
        Configure(ShadowStart, ShadowEnd - ShadowStart, readRam: false, writeRam: false);
    }

    /// <inheritdoc/>
    public void Configure(uint start, uint lengthBytes, bool readRam, bool writeRam)
    {
        if (start < ShadowStart || start >= ShadowEnd || lengthBytes > ShadowEnd - start)
        {
            return;
        }

        lock (_gate)
        {
            _memory.Transaction(() =>
            {
                for (uint at = start; at < start + lengthBytes; at += PieceBytes)
                {
                    ref RamMapping? piece = ref _pieces[(at - ShadowStart) / PieceBytes];
                    if (piece is not null)
                    {
                        _memory.Unmap(piece);
                    }

                    piece = Place(at, readRam, writeRam);
                }
            });
        }
    }

    private RamMapping? Place(uint at, bool readRam, bool writeRam)
    {
        if (readRam)
        {
            return writeRam ? null : _memory.Map(at, _ram, at, PieceBytes, RamAccess.ReadOnly, Priority);
        }

        ulong fromEnd = ShadowEnd - at;
        return at >= RomStart && fromEnd <= _rom.LengthBytes
            ? _memory.Map(at, _rom, _rom.LengthBytes - fromEnd, PieceBytes, RamAccess.ReadOnly, Priority)
            : _memory.MapHole(at, PieceBytes, Priority);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using Vmm.Core;

namespace Vmm.Devices.Pci;

/// <summary>
/// Decides, for pieces of 0xC0000..0xFFFFF, whether reads and writes go to RAM (shadow) or to what lies behind it
/// (ROM and the bus). Implemented by the machine with memory slots.
/// </summary>
public interface IShadowRam
{
    /// <summary>Called on a vCPU thread; must not wait for other vCPUs.</summary>
    /// <param name="start">First address.</param>
    /// <param name="lengthBytes">0x4000 or 0x10000.</param>
    /// <param name="readRam">Reads come from RAM; otherwise from the firmware ROM.</param>
    /// <param name="writeRam">Writes go to RAM; otherwise they are lost.</param>
    void Configure(uint start, uint lengthBytes, bool readRam, bool writeRam);
}

/// <summary>
/// Host bridge of the Intel 440FX (82441FX data sheet, order number 290549): its PAM registers (§3.2.18) shadow the
/// BIOS area in RAM. The DRAM registers are kept as written; RAM is where the machine put it. SMRAM (§3.2.20) is a
/// register without effect: no processor here has a system management mode that a guest could enter.
/// </summary>
public sealed class I440Fx : PciFunction
{
    private const int Pam0 = 0x59;
    private const int Smram = 0x72;

    private readonly IShadowRam? _shadow;
    private readonly byte[] _applied = new byte[7];

    /// <summary>Makes the bridge; it belongs at 00:00.0.</summary>
    /// <param name="shadow">Told of PAM changes; null when there is no firmware to shadow.</param>
    public I440Fx(IShadowRam? shadow)
        : base("i440fx", new PciIdentity(0x8086, 0x1237, 0x06_00_00, 0x02, 0x1AF4, 0x1100))
    {
        _shadow = shadow;
        DefineConfig16(PciConfig.Command, 0x0006, 0x0140);
        DefineConfig16(PciConfig.Status, 0x0280, 0, 0x7000);
        DefineConfig16(0x50, 0, 0xFFFF);
        DefineConfig8(0x53, 0x80, 0);
        DefineConfig8(0x57, 0x01, 0xFF);
        DefineConfig8(0x58, 0x10, 0xFF);
        for (int i = 0; i < 7; i++)
        {
            DefineConfig8(Pam0 + i, 0, i == 0 ? (byte)0x30 : (byte)0x33);
        }

        for (int i = 0; i < 8; i++)
        {
            DefineConfig8(0x60 + i, 0x01, 0xFF);
        }

        DefineConfig8(0x68, 0, 0xC0);
        DefineConfig8(0x71, 0x1F, 0x1F);
        DefineConfig8(Smram, 0x02, 0x78);
        DefineConfig8(0x93, 0, 0x07);
    }

    /// <inheritdoc/>
    public override int StateVersion => 1;

    /// <inheritdoc/>
    protected override void ResetCard() => Apply(force: true);

    /// <inheritdoc/>
    protected override void SaveCard(StateWriter writer)
    {
    }

    /// <inheritdoc/>
    protected override void LoadCard(StateReader reader, int version) => Apply(force: true);

    /// <inheritdoc/>
    protected override void OnConfigWritten(int offset, int length)
    {
        if (offset < Pam0 + 7 && offset + length > Pam0)
        {
            Apply(force: false);
        }
    }

    // PAM0 has only its upper half (the BIOS segment); PAM1..6 have two 16 KiB pieces each, from 0xC0000 up.
    private void Apply(bool force)
    {
        for (int i = 0; i < 7; i++)
        {
            byte value = (byte)GetConfig(Pam0 + i, AccessWidth.Byte);
            if (!force && _applied[i] == value)
            {
                continue;
            }

            int changed = force ? 0xFF : _applied[i] ^ value;
            _applied[i] = value;
            if (i == 0)
            {
                Configure(0xF_0000, 0x1_0000, value >> 4, changed >> 4);
            }
            else
            {
                uint start = 0xC_0000 + ((uint)(i - 1) * 0x8000);
                Configure(start, 0x4000, value, changed);
                Configure(start + 0x4000, 0x4000, value >> 4, changed >> 4);
            }
        }
    }

    private void Configure(uint start, uint lengthBytes, int attributes, int changed)
    {
        if ((changed & 3) != 0)
        {
            _shadow?.Configure(start, lengthBytes, (attributes & 1) != 0, (attributes & 2) != 0);
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using Vmm.Core;
using Vmm.Devices.Pci;

namespace Vmm.Devices.Storage;

/// <summary>
/// The IDE controller of the PIIX3 (82371SB data sheet 290550 §2.3 and §2.7), function 1 of the chip: two channels at
/// their ISA addresses with ISA interrupts 14 and 15, and a bus-master engine for each.
/// </summary>
public sealed class Piix3Ide : PciFunction
{
    private const int PrimaryTiming = 0x40;
    private const int SecondaryTiming = 0x42;
    private readonly IdeChannel[] _channels;
    private readonly bool _isEnabledAtReset;

    /// <summary>Makes the controller; it belongs at 00:01.1.</summary>
    /// <param name="drives">Primary master and slave, secondary master and slave; null where there is none.</param>
    /// <param name="irq14">ISA interrupt of the primary channel.</param>
    /// <param name="irq15">ISA interrupt of the secondary channel.</param>
    /// <param name="isEnabledAtReset">
    /// The channels answer without firmware having set IDETIM bit 15 (for kernels that are loaded directly; the chip
    /// itself comes up with both off).
    /// </param>
    public Piix3Ide(AtaDevice?[] drives, IIrqLine irq14, IIrqLine irq15, bool isEnabledAtReset = false)
        : base("piix3-ide", new PciIdentity(0x8086, 0x7010, 0x01_01_80, 0x00, 0x1AF4, 0x1100))
    {
        ArgumentNullException.ThrowIfNull(drives);
        if (drives.Length != 4)
        {
            throw new ArgumentException("four places for drives", nameof(drives));
        }

        _isEnabledAtReset = isEnabledAtReset;
        _channels =
        [
            new IdeChannel(drives[0], drives[1], irq14, Dma, "primary."),
            new IdeChannel(drives[2], drives[3], irq15, Dma, "secondary."),
        ];
        DefineConfig16(PciConfig.Status, 0x0280, 0, 0x3800);
        ushort timing = isEnabledAtReset ? (ushort)0x8000 : (ushort)0;
        DefineConfig16(PrimaryTiming, timing, 0xF3FF);
        DefineConfig16(SecondaryTiming, timing, 0xF3FF);
        DefineConfig8(0x44, 0, 0xFF);
        AddBar(4, PciBarKind.Io, new BusMasterWindow(this));
        if (isEnabledAtReset)
        {
            DefineConfig16(PciConfig.Command, PciConfig.CommandIo, PciConfig.CommandIo | PciConfig.CommandBusMaster);
        }
    }

    /// <inheritdoc/>
    public override int StateVersion => 1;

    /// <summary>Guest accesses that made no sense (commands to a busy drive, data without a request).</summary>
    public long IgnoredAccesses => _channels[0].Ignored + _channels[1].Ignored;

    /// <inheritdoc/>
    public override void Pause()
    {
        // With the vCPUs stopped nothing new comes; what is under way is finished.
        foreach (IdeChannel channel in _channels)
        {
            channel.Drain();
        }
    }

    /// <inheritdoc/>
    protected override void ResetCard()
    {
        foreach (IdeChannel channel in _channels)
        {
            channel.Reset();
        }

        Decode();
    }

    /// <inheritdoc/>
    protected override void SaveCard(StateWriter writer)
    {
        foreach (IdeChannel channel in _channels)
        {
            channel.Save(writer);
        }
    }

    /// <inheritdoc/>
    protected override void LoadCard(StateReader reader, int version)
    {
        foreach (IdeChannel channel in _channels)
        {
            channel.Load(reader);
        }

        Decode();
    }

    /// <inheritdoc/>
    protected override void OnConfigWritten(int offset, int length) => Decode();

    /// <inheritdoc/>
    protected override void OnAttached(PciBus bus)
    {
        ArgumentNullException.ThrowIfNull(bus);
        bus.Ports.Map(0x1F0, _channels[0].CommandBlock);
        bus.Ports.Map(0x3F6, _channels[0].ControlBlock);
        bus.Ports.Map(0x170, _channels[1].CommandBlock);
        bus.Ports.Map(0x376, _channels[1].ControlBlock);
    }

    // A channel answers while I/O decode (PCICMD bit 0) and its own enable (IDETIM bit 15) are on (§2.3.3, §2.3.9).
    private void Decode()
    {
        bool isOn = (GetConfig(PciConfig.Command, AccessWidth.Word) & PciConfig.CommandIo) != 0;
        _channels[0].IsDecoded = isOn && (GetConfig(PrimaryTiming, AccessWidth.Word) & 0x8000) != 0;
        _channels[1].IsDecoded = isOn && (GetConfig(SecondaryTiming, AccessWidth.Word) & 0x8000) != 0;
    }

    private sealed class BusMasterWindow : IRegisterWindow
    {
        private readonly Piix3Ide _owner;

        public BusMasterWindow(Piix3Ide owner) => _owner = owner;

        public uint Length => 16;

        public ulong Read(uint offset, AccessWidth width)
        {
            ulong value = 0;
            for (int i = 0; i < (int)width; i++)
            {
                int at = (int)offset + i;
                value |= (ulong)_owner._channels[at >> 3].ReadBusMaster(at & 7) << (8 * i);
            }

            return value;
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            for (int i = 0; i < (int)width; i++)
            {
                int at = (int)offset + i;
                _owner._channels[at >> 3].WriteBusMaster(at & 7, (byte)(value >> (8 * i)));
            }
        }
    }
}

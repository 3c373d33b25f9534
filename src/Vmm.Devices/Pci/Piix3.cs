// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Pci;

/// <summary>
/// The ISA bridge of the PIIX3 (82371SB data sheet, order number 290550), function 0: it routes the four PCI
/// interrupt inputs to ISA interrupts (PIRQRC[A:D], §2.2.6). Its other registers are kept as written: the chips behind
/// them (8259, 8254, DMA, RTC ...) are devices of their own here, at fixed ports.
/// </summary>
public sealed class Piix3IsaBridge : PciFunction, IPciInterruptRouter
{
    private const int PirqRoute = 0x60;
    private const byte RouteDisabled = 0x80;

    // IRQs that the data sheet allows: 3..7, 9..12, 14, 15. Others are reserved and route nowhere.
    private const int AllowedIrqs = 0b1101_1110_1111_1000;

    private readonly Lock _gate = new();
    private readonly IIrqLine[] _isa;
    private readonly bool[] _inputs = new bool[4];
    private readonly int[] _routes = [-1, -1, -1, -1];
    private int _driven;

    /// <summary>Makes the bridge; it belongs at 00:01.0 and must be set as <see cref="PciBus.Router"/>.</summary>
    /// <param name="isaLines">16 ISA interrupt wires.</param>
    public Piix3IsaBridge(IIrqLine[] isaLines)
        : base("piix3-isa", new PciIdentity(0x8086, 0x7000, 0x06_01_00, 0x00, 0x1AF4, 0x1100))
    {
        ArgumentNullException.ThrowIfNull(isaLines);
        if (isaLines.Length != 16)
        {
            throw new ArgumentException("16 ISA lines are needed", nameof(isaLines));
        }

        _isa = isaLines;
        DefineConfig16(PciConfig.Command, 0x0007, 0x0108);
        DefineConfig16(PciConfig.Status, 0x0200, 0, 0x7800);
        DefineConfig8(0x4C, 0x4D, 0x7F);
        DefineConfig16(0x4E, 0x0003, 0x01FF);
        for (int i = 0; i < 4; i++)
        {
            DefineConfig8(PirqRoute + i, RouteDisabled, 0x8F);
        }

        DefineConfig8(0x69, 0x02, 0xFE);
        DefineConfig16(0x6A, 0, 0x8014);
        DefineConfig8(0x70, 0x80, 0xEF);
        DefineConfig8(0x76, 0x0C, 0x8F);
        DefineConfig8(0x77, 0x0C, 0x8F);
        DefineConfig16(0x78, 0x0002, 0xFFFF);
        DefineConfig8(0x80, 0, 0x7F);
        DefineConfig8(0x82, 0, 0x0F);
        DefineConfig8(0xA0, 0x08, 0x1F);
        DefineConfig16(0xA2, 0, 0xFFFF);
        DefineConfig32(0xA4, 0, 0xFFFF_FFFF);
        DefineConfig8(0xA8, 0x0F, 0xFF);
        DefineConfig16(0xAA, 0, 0x00FF);
        DefineConfig8(0xAC, 0, 0xFF);
        DefineConfig8(0xAE, 0, 0xFF);
    }

    /// <inheritdoc/>
    public override int StateVersion => 1;

    /// <inheritdoc/>
    public void SetPirq(int input, bool asserted)
    {
        lock (_gate)
        {
            _inputs[input & 3] = asserted;
            Drive();
        }
    }

    /// <inheritdoc/>
    protected override void ResetCard() => ReadRoutes();

    /// <inheritdoc/>
    protected override void SaveCard(StateWriter writer)
    {
    }

    /// <inheritdoc/>
    protected override void LoadCard(StateReader reader, int version) => ReadRoutes();

    /// <inheritdoc/>
    protected override void OnConfigWritten(int offset, int length)
    {
        if (offset < PirqRoute + 4 && offset + length > PirqRoute)
        {
            ReadRoutes();
        }
    }

    /// <inheritdoc/>
    protected override void OnAttached(PciBus bus) => bus.Router = this;

    private void ReadRoutes()
    {
        lock (_gate)
        {
            for (int i = 0; i < 4; i++)
            {
                byte value = (byte)GetConfig(PirqRoute + i, AccessWidth.Byte);
                int irq = value & 0x0F;
                bool valid = (value & RouteDisabled) == 0 && ((AllowedIrqs >> irq) & 1) != 0;
                _routes[i] = valid ? irq : -1;
            }

            Drive();
        }
    }

    // Under the gate.
    private void Drive()
    {
        int levels = 0;
        for (int i = 0; i < 4; i++)
        {
            if (_inputs[i] && _routes[i] >= 0)
            {
                levels |= 1 << _routes[i];
            }
        }

        int changed = levels ^ _driven;
        _driven = levels;
        for (int irq = 0; changed != 0; irq++, changed >>= 1)
        {
            if ((changed & 1) != 0)
            {
                _isa[irq].Set(((levels >> irq) & 1) != 0);
            }
        }
    }
}

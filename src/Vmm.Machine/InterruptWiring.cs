// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Vmm.Core;
using Vmm.Devices.Legacy;

namespace Vmm.Machine;

// Theory. Where interrupts go depends on which half of the controllers the driver owns, and only this file knows:
//   User    8259 pair, I/O APIC and local APICs are models. ISA line n reaches the 8259s' input n and the I/O APIC's pin n
//           (line 0: pin 2, as the MADT's override says). The 8259s drive LINT0 of the boot processor.
//   Split   local APICs in the driver; the I/O APIC model sends messages to it, and hears of EOIs through the driver.
//   Kernel  everything in the driver; ISA line n is GSI n, which the driver leads to both of its controllers.
// PCI INTx lines arrive on ISA lines through the PIIX3's router; pins 16 to 23 are free.

/// <summary>The interrupt controllers of one machine.</summary>
internal sealed class InterruptWiring : IMsiSink
{
    private const int IsaLines = 16;
    private const int IoApicTimerPin = 2;
    private readonly IVm? _kernelSide;
    private readonly ApicBus? _bus;
    private readonly SharedLine[] _isa = new SharedLine[IsaLines];

    private InterruptWiring(IVm? kernelSide, ApicBus? bus)
    {
        _kernelSide = kernelSide;
        _bus = bus;
    }

    /// <summary>Makes an input of ISA interrupt line 0 to 15; the line is up while any of its inputs is.</summary>
    public IIrqLine Line(int isa) => _isa[isa].AddInput();

    /// <summary>Local APICs in User mode; empty otherwise.</summary>
    public List<LocalApic> LocalApics { get; } = [];

    /// <summary>The controllers that are models, in the order in which they are saved.</summary>
    public List<IDevice> Devices { get; } = [];

    /// <summary>Makes inputs of the I/O APIC's pins 0 to 23, for a device that chooses its pin itself (HPET).</summary>
    public IIrqLine[] Pins()
    {
        var pins = new IIrqLine[24];
        for (int i = 0; i < pins.Length; i++)
        {
            uint gsi = (uint)i;
            pins[i] = i < IsaLines ? Line(i)
                : IoApic is not null ? IoApic.Input(i)
                : new DelegateLine(level => _kernelSide!.SetIrqLine(gsi, level));
        }

        return pins;
    }

    /// <summary>The I/O APIC model, unless the driver has it.</summary>
    public IoApic? IoApic { get; private set; }

    /// <summary>The 8259 pair, unless the driver has it.</summary>
    public I8259Pair? Pic { get; private set; }

    /// <summary>Makes the models that the mode calls for and maps their registers.</summary>
    /// <param name="vm">The driver's VM.</param>
    /// <param name="options">The maps and the clock.</param>
    /// <param name="cpus">Number of vCPUs.</param>
    /// <param name="tscKhz">Frequency of the guest's TSC.</param>
    /// <param name="onEoi">Receives the I/O APIC's end-of-interrupt entry for Split mode.</param>
    public static InterruptWiring Make(IVm vm, VmOptions options, int cpus, long tscKhz, Action<Action<byte>> onEoi)
    {
        if (vm.Irqchip == IrqchipMode.Kernel)
        {
            var kernel = new InterruptWiring(vm, null);
            for (int i = 0; i < IsaLines; i++)
            {
                uint gsi = (uint)i;
                kernel._isa[i] = new SharedLine(new DelegateLine(level => vm.SetIrqLine(gsi, level)));
            }

            return kernel;
        }

        bool user = vm.Irqchip == IrqchipMode.User;
        var bus = user ? new ApicBus() : null;
        var wiring = new InterruptWiring(user ? null : vm, bus);
        IIrqLine? lint0 = null;
        var pic = new I8259Pair(new DelegateLine(level => lint0?.Set(level)));
        wiring.Pic = pic;
        wiring.Devices.Add(pic);
        options.Ports.Map(I8259Pair.MasterPort, pic.MasterPorts);
        options.Ports.Map(I8259Pair.SlavePort, pic.SlavePorts);
        options.Ports.Map(I8259Pair.ElcrPort, pic.ElcrPorts);

        var ioApic = new IoApic(0, wiring, options.IoApicPins);
        wiring.IoApic = ioApic;
        wiring.Devices.Add(ioApic);
        options.Mmio.Map(0xFEC00000, ioApic);
        onEoi(ioApic.EndOfInterrupt);
        if (bus is not null)
        {
            bus.AddEoiListener(ioApic);
            for (int i = 0; i < cpus; i++)
            {
                var apic = new LocalApic(
                    i,
                    bus,
                    options.Clock,
                    tscKhz,
                    nowNs => (ulong)((UInt128)(ulong)Math.Max(0, nowNs) * (ulong)tscKhz / 1_000_000),
                    i == 0 ? pic : null);
                wiring.LocalApics.Add(apic);
                wiring.Devices.Add(apic);
            }

            lint0 = wiring.LocalApics[0].Lint0;
        }

        for (int i = 0; i < IsaLines; i++)
        {
            IIrqLine pin = ioApic.Input(i == 0 ? IoApicTimerPin : i);
            wiring._isa[i] = new SharedLine(i == 2 ? UnconnectedLine.Instance : new FanoutLine(pic.Input(i), pin));
        }

        return wiring;
    }

    /// <inheritdoc/>
    public void Send(ulong address, uint data)
    {
        if (_bus is not null)
        {
            _bus.Send(address, data);
        }
        else
        {
            _kernelSide!.SendMsi(address, data);
        }
    }
}

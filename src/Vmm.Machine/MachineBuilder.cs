// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Vmm.Config;
using Vmm.Core;
using Vmm.Devices.Firmware;
using Vmm.Devices.Input;
using Vmm.Devices.Legacy;
using Vmm.Devices.Pci;
using Vmm.Host;
using Vmm.Machine.Boot;
using Vmm.Memory;
using Vmm.X86;

namespace Vmm.Machine;

// Theory. This is the only file that names concrete parts. It turns a definition into a paused machine, in this order,
// because each step needs the ones before: clock and guest memory, address maps, the driver's VM, interrupt controllers,
// vCPUs with their CPUID, the chips of the PC, PCI and its cards, firmware or a kernel. A failure half-way disposes
// what was made. The machine that comes out has been reset and has its boot state loaded, and nothing runs yet.

/// <summary>Puts a machine together.</summary>
public sealed class MachineBuilder : IDisposable
{
    private static readonly (ushort Port, int Irq)[] s_serialPorts = [(0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3)];

    private readonly MachineSpec _spec;
    private readonly IHypervisor _hypervisor;
    private readonly CharFactory _chars;
    private readonly MemoryLayout _layout;
    private readonly GuestMemory _memory = new();
    private readonly List<RamBlock> _blocks = [];
    private readonly Dictionary<RamBlock, HostMemory> _hostMemory = [];
    private readonly IMachineClock _clock;
    private readonly SystemControl _system;
    private readonly AddressMap _ports = new("io", 0x10000);
    private readonly AddressMap _mmio = new("mmio", 0);
    private MachineParts? _parts;
    private bool _handedOver;

    private MachineBuilder(MachineSpec spec, IHypervisor hypervisor, ICharBackend? stdio, Func<string, string>? logFile)
    {
        _spec = spec;
        _hypervisor = hypervisor;
        _chars = new CharFactory(stdio, logFile);
        _layout = new MemoryLayout((ulong)spec.MemoryBytes & ~0xFFFUL);
        _system = new SystemControl(spec.Watchdog);
        bool counts = spec.Clock.Source == ClockSource.Icount;
        DateTimeOffset start = spec.Clock.Start ?? (counts ? InstructionClock.Epoch : DateTimeOffset.UtcNow);
        TimeSpan zone = spec.Clock.LocalTime ? TimeZoneInfo.Local.GetUtcOffset(start) : TimeSpan.Zero;
        long unixTimeNs = (start + zone - DateTimeOffset.UnixEpoch).Ticks * 100;
        _clock = counts ? new InstructionClock(unixTimeNs) : new MachineClock(unixTimeNs);
    }

    /// <summary>Builds a paused machine.</summary>
    /// <param name="spec">The definition.</param>
    /// <param name="hypervisor">The driver; owned by the machine, disposed also when building fails.</param>
    /// <param name="stdio">What <c>stdio</c> means; null when there is no terminal.</param>
    /// <param name="logFile">The file of a port's log, by the port's name; null keeps logs in memory.</param>
    /// <exception cref="BootException">The definition asks for something that cannot be booted.</exception>
    /// <exception cref="HypervisorException">The driver refused.</exception>
    /// <exception cref="HostException">The host refused memory or a descriptor.</exception>
    public static Machine Build(
        MachineSpec spec, IHypervisor hypervisor, ICharBackend? stdio, Func<string, string>? logFile = null)
    {
        ArgumentNullException.ThrowIfNull(spec);
        ArgumentNullException.ThrowIfNull(hypervisor);
        using var builder = new MachineBuilder(spec, hypervisor, stdio, logFile);
        return builder.Build();
    }

    private Machine Build()
    {
        PrepareCounting();
        AddRam();
        IrqchipMode mode = ChooseIrqchip();
        Action<byte>? endOfInterrupt = null;
        IIrqLine? numericError = null;
        var options = new VmOptions
        {
            Ports = _ports,
            Mmio = _mmio,
            Clock = _clock,
            VcpuCount = _spec.Cpus.Count,
            Irqchip = mode,
            OnIoApicEoi = vector => endOfInterrupt?.Invoke(vector),
            OnNumericError = () =>
            {
                // FERR# arrives as an edge on IRQ 13, as the PIIX3 makes it.
                numericError?.Set(true);
                numericError?.Set(false);
            },
        };
        IVm vm = _hypervisor.CreateVm(options);
        _system.Bind(vm);
        if (vm is Vmm.X86.SoftVm software)
        {
            // Devices that write over decoded code tell the software CPU.
            _memory.SetCodeListener(software.NotifyCodeWritten);
        }

        var slots = new MemorySlots(vm, _hypervisor.Capabilities.MaxMemorySlots);
        InterruptWiring interrupts = InterruptWiring.Make(
            vm, options, _spec.Cpus.Count, _hypervisor.Capabilities.TscKhz, eoi => endOfInterrupt = eoi);
        numericError = interrupts.Line(13);
        var model = new CpuModel(
            _hypervisor.SupportedCpuid,
            FindModel(),
            new CpuTopology(_spec.Cpus.Count, _spec.Cpus.Sockets, _spec.Cpus.Threads),
            mode == IrqchipMode.User,
            _hypervisor.Capabilities.UserApicMsrs,
            MaxPhysicalBits());
        var completion = new Completion(slots, options, model.For, interrupts.LocalApics, _spec.Cpus.Count);
        MachineParts parts = _parts = new MachineParts
        {
            Hypervisor = _hypervisor,
            Vm = vm,
            Virtio = new VirtioCards(vm, _hypervisor.Capabilities, _spec.Virtio, _mmio, _memory, interrupts),
            Slots = slots,
            Memory = _memory,
            Layout = _layout,
            Clock = _clock,
            Completer = completion,
            CpuSignature = model.Signature,
            Pin = _spec.Cpus.Pin,
        };
        parts.Ports.AddRange(interrupts.LocalApics);
        parts.NmiPins.AddRange(interrupts.LocalApics.ConvertAll(static apic => apic.Lint1));
        parts.Devices.AddRange(interrupts.Devices);
        parts.Blocks.AddRange(_blocks);
        parts.Resources.Add(completion);
        parts.Resources.AddRange(_blocks);
        parts.Resources.Add(_chars);
        _memory.SetViewListener(slots.Apply);

        PciBus bus = AddChips(parts, interrupts);
        foreach (IDevice device in parts.Devices)
        {
            device.Reset();
        }

        AddVcpus(parts, interrupts, model);
        Boot(parts, bus);
        var machine = new Machine(parts);
        _system.Bind(machine);
        _handedOver = true;
        return machine;
    }

    private void AddRam()
    {
        HostMemory host = HostMemory.Allocate((long)_layout.MemoryBytes);
        var ram = new RamBlock("ram", host, _layout.MemoryBytes);
        _blocks.Add(ram);
        _hostMemory.Add(ram, host);
        _memory.Map(0, ram, 0, _layout.LowBytes);
        if (_layout.HighBytes > 0)
        {
            _memory.Map(MemoryLayout.HoleEnd, ram, _layout.LowBytes, _layout.HighBytes);
        }

        if (_layout.LowBytes > MemoryLayout.VideoStart)
        {
            _memory.MapHole(MemoryLayout.VideoStart, MemoryLayout.VideoEnd - MemoryLayout.VideoStart, priority: 1);
        }
    }

    private IrqchipMode ChooseIrqchip()
    {
        IReadOnlyList<IrqchipMode> modes = _hypervisor.Capabilities.IrqchipModes;
        IrqchipMode? wanted = _spec.Irqchip switch
        {
            IrqchipChoice.Kernel => IrqchipMode.Kernel,
            IrqchipChoice.Split => IrqchipMode.Split,
            IrqchipChoice.User => IrqchipMode.User,
            _ => null,
        };
        if (wanted is { } mode)
        {
            foreach (IrqchipMode known in modes)
            {
                if (known == mode)
                {
                    return mode;
                }
            }

            throw new BootException(
                $"irqchip: {_hypervisor.Name} has no {mode.ToString().ToLowerInvariant()} irqchip; leave irqchip: out or use auto");
        }

        foreach (IrqchipMode best in (ReadOnlySpan<IrqchipMode>)[IrqchipMode.Kernel, IrqchipMode.Split])
        {
            foreach (IrqchipMode known in modes)
            {
                if (known == best)
                {
                    return best;
                }
            }
        }

        return IrqchipMode.User;
    }

    private CpuModelRow FindModel() => CpuModelTable.Rows.TryGetValue(_spec.Cpus.Model, out CpuModelRow? row)
        ? row
        : throw new BootException(
            $"cpus: model {_spec.Cpus.Model} is not known; there are {string.Join(", ", CpuModelTable.Rows.Keys)}");

    // OVMF maps all of the physical address space, in Debian's build with pages of 2 MiB: 256 MiB of tables for the 46 bits
    // of a server part. It takes 40 bits for QEMU's default and then maps only what RAM and PCI windows need.
    private int MaxPhysicalBits() => _spec.Boot.Kernel is null && _layout.MemoryBytes < 1UL << 38 ? 40 : 52;

    private void AddVcpus(MachineParts parts, InterruptWiring interrupts, CpuModel model)
    {
        if (_spec.Cpus.Count > _hypervisor.Capabilities.MaxVcpus)
        {
            throw new BootException(
                $"cpus: {_hypervisor.Name} runs at most {_hypervisor.Capabilities.MaxVcpus} vCPUs here");
        }

        for (int i = 0; i < _spec.Cpus.Count; i++)
        {
            IVcpu vcpu = parts.Vm.CreateVcpu(i, interrupts.LocalApics.Count > 0 ? interrupts.LocalApics[i] : null);
            parts.Vcpus.Add(vcpu);
            vcpu.SetCpuid(model.For(i));
            if (_clock is InstructionClock counter && vcpu is SoftVcpu software)
            {
                counter.Attach(software);
            }
        }
    }

    // Time that an instruction count drives has one source.
    private void PrepareCounting()
    {
        if (_spec.Clock.Source == ClockSource.Icount)
        {
            if (_hypervisor is not SoftHypervisor software)
            {
                throw new BootException($"clock: {_hypervisor.Name} does not count instructions; icount needs accel: soft");
            }

            if (_spec.Cpus.Count != 1)
            {
                throw new BootException($"clock: icount needs cpus: 1; there are {_spec.Cpus.Count}");
            }

            software.Deterministic = true;
        }
    }

    // The order is that of the parts list, in which devices are reset, saved and described to firmware.
    private PciBus AddChips(MachineParts parts, InterruptWiring interrupts)
    {
        Mc146818 rtc = AddTimers(parts, interrupts);
        Add(parts, new Port92(_system), out Port92 port92);
        _ports.Map(Port92.Port, port92);
        _ports.Map(PostPort.Port, new PostPort());
        AddSerialPorts(parts, interrupts);
        AddTestPorts(interrupts);

        var bus = new PciBus(_ports, _mmio, _memory, interrupts);
        Add(parts, new PciConfigPorts(bus, _system), out PciConfigPorts configPorts);
        _ports.Map(PciConfigPorts.Port, configPorts);
        FirmwareWiring? firmware = _spec.Boot.Kernel is null ? FirmwareWiring.Load(parts, _spec, _memory, _mmio) : null;
        Attach(parts, bus, new I440Fx(firmware?.Shadow), 0);
        var isaLines = new IIrqLine[16];
        for (int i = 0; i < isaLines.Length; i++)
        {
            isaLines[i] = interrupts.Line(i);
        }

        var isaBridge = new Piix3IsaBridge(isaLines);
        Attach(parts, bus, isaBridge, 1);
        bus.Router = isaBridge;
        StorageWiring storage = StorageWiring.Add(parts, _spec, bus, isaLines);
        parts.Cdroms = storage.Cdroms;
        rtc.SetRam(StorageWiring.CmosFloppyTypes, storage.FloppyTypes);
        AcpiPm pm = AddPowerManagement(parts, bus, interrupts);
        I8042? keyboard = null;
        if (firmware is not null || _spec.Display.Vga != VgaModel.None)
        {
            keyboard = ScreenWiring.Add(parts, _spec, bus, _memory, _clock, _system, isaLines);
        }

        AddCards(parts, bus, keyboard);
        if (firmware is not null)
        {
            FirmwareWiring.Describe(parts, _spec, _layout, bus, rtc, storage, pm, MachineTables.MakeSmbios(parts, _spec));
            _ports.Map(DebugConsolePort.FirmwarePort, new DebugConsolePort(_chars.Make("firmware", new CharSpec(CharKind.Log))));
        }
        else if (_spec.TestDevice)
        {
            FirmwareWiring.AddFwCfg(parts, _spec, _layout, bus);
        }

        return bus;
    }

    // The HPET's legacy replacement route takes over the lines of the PIT and the RTC, so both go through it.
    private Mc146818 AddTimers(MachineParts parts, InterruptWiring interrupts)
    {
        Add(parts, new Hpet(_clock, interrupts.Pins(), interrupts.Line(0), interrupts.Line(8), interrupts), out Hpet hpet);
        _mmio.Map(AcpiTables.HpetAddress, hpet);
        Add(parts, new I8254(_clock, hpet.PitInput), out I8254 pit);
        _ports.Map(I8254.Port, pit);
        _ports.Map(I8254.SpeakerPort, pit.SpeakerWindow);
        Add(parts, new Mc146818(_clock, hpet.RtcInput), out Mc146818 rtc);
        _ports.Map(Mc146818.Port, rtc);
        return rtc;
    }

    private void AddSerialPorts(MachineParts parts, InterruptWiring interrupts)
    {
        for (int i = 0; i < _spec.Serial.Count && i < s_serialPorts.Length; i++)
        {
            (ushort port, int irq) = s_serialPorts[i];
            string id = $"com{i + 1}";
            Add(parts, new Uart16550(id, _chars.Make(id, _spec.Serial[i]), _clock, interrupts.Line(irq)), out Uart16550 uart);
            _ports.Map(port, uart);
        }
    }

    private void AddTestPorts(InterruptWiring interrupts)
    {
        if (_spec.DebugExit is { } exitPort)
        {
            _ports.Map(exitPort, new DebugExitPort(_system), priority: 1);
        }

        if (_spec.TestDevice)
        {
            var test = new PcTestDevice(interrupts.Pins());
            _ports.Map(PcTestDevice.IrqPort, test);
            _ports.Map(PcTestDevice.EchoPort, test.EchoPorts);
            _mmio.Map(PcTestDevice.EchoAddress, test.EchoPage);
        }

        if (_spec.PvPanic)
        {
            _ports.Map(PvPanic.Port, new PvPanic(_system));
        }
    }

    private AcpiPm AddPowerManagement(MachineParts parts, PciBus bus, InterruptWiring interrupts)
    {
        var pm = new AcpiPm(_clock, interrupts.Line(9), _system);
        Attach(parts, bus, pm, 1, 3);
        _ports.Map(AcpiPm.ApmPort, pm.ApmWindow);
        parts.PowerButton = pm.PressPowerButton;
        if (_spec.VmGenId)
        {
            AddGenerationId(parts, pm);
        }

        return pm;
    }

    private void AddCards(MachineParts parts, PciBus bus, I8042? keyboard)
    {
        if (_spec.Watchdog != WatchdogAction.None)
        {
            parts.AddCard(bus, new I6300Esb(_clock, _system));
        }

        var cards = new Cards(_spec, _chars, _memory, block => _hostMemory.GetValueOrDefault(block), parts.Virtio);
        parts.Resources.Add(cards);
        foreach (IDevice card in cards.Make())
        {
            parts.AddCard(bus, card);
        }

        parts.AcpiNodes.AddRange(parts.Virtio.Places);
        parts.Balloon = cards.Balloon;
        List<UsbHidDevice> usb = ScreenWiring.MakeUsb(_spec);
        if (usb.Count > 0)
        {
            parts.AddCard(bus, new Xhci("usb", _clock, [.. usb]));
        }

        ScreenWiring.Serve(parts, _spec, keyboard, cards.Inputs, usb);
        if (_spec.TestDevice)
        {
            parts.AddCard(bus, new PciTestCard());
        }
    }

    private void AddGenerationId(MachineParts parts, AcpiPm pm)
    {
        var page = new RamBlock("vmgenid", HostMemory.Allocate(RamBlock.PageBytes), RamBlock.PageBytes);
        parts.Resources.Add(page);
        parts.Blocks.Add(page);
        _ = _memory.Map(VmGenId.Address, page, 0, page.LengthBytes, RamAccess.ReadOnly, priority: 1);
        Add(parts, new VmGenId(page, Guid.NewGuid, () => pm.RaiseGpe(VmGenId.Event)), out VmGenId device);
        parts.AcpiNodes.Add(device);
    }

    private void Boot(MachineParts parts, PciBus bus)
    {
        var state = new CpuState();
        parts.Vcpus[0].ReadState(state);
        if (_spec.Boot.Kernel is { } kernel)
        {
            PciAllocator.Assign(bus, (uint)MemoryLayout.HoleStart, 0xFEC00000);
            ulong rsdp = MachineTables.Write(parts, _spec, bus);
            var request = new DirectBootRequest(kernel, _spec.Boot.Initrd, _spec.Boot.Cmdline) { Modules = _spec.Boot.Modules };
            string protocol = DirectBoot.Load(request, _memory, _layout, rsdp, state);
            if (string.Equals(protocol, DirectBoot.Multiboot, StringComparison.Ordinal))
            {
                BiosRemains.Leave(_memory, _ports);
            }
        }

        parts.Vcpus[0].WriteState(state);
    }

    private static void Add<T>(MachineParts parts, T device, out T same)
        where T : IDevice
    {
        parts.Devices.Add(device);
        same = device;
    }

    private static void Attach(MachineParts parts, PciBus bus, PciFunction function, int device, int number = 0)
    {
        bus.Attach(function, device, number);
        parts.Devices.Add(function);
    }

    /// <summary>Releases what was made when building failed half-way; nothing once the machine exists.</summary>
    public void Dispose()
    {
        if (_handedOver)
        {
            return;
        }

        _handedOver = true;
        foreach (IVcpu vcpu in _parts?.Vcpus ?? [])
        {
            vcpu.Dispose();
        }

        _clock.Dispose();
        foreach (IDevice device in _parts?.Devices ?? [])
        {
            device.Dispose();
        }

        _parts?.Vm.Dispose();
        foreach (RamBlock block in _blocks)
        {
            block.Dispose();
        }

        _chars.Dispose();
        _hypervisor.Dispose();
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Threading;
using FluentAssertions;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Kvm.Tests;

/// <summary>
/// The smallest machine: 512 KiB of RAM at 0, ports that record, memory-mapped registers at 0x80000 that record, and
/// one or more vCPUs that start in real mode at 0x1000 with flat 4 GiB data segments ("unreal mode").
/// </summary>
internal sealed class TestMachine : IDisposable
{
    internal const uint RamBytes = 512 << 10;
    internal const ulong MmioBase = RamBytes;
    internal const uint CodeAddress = 0x1000;

    private readonly List<IVcpu> _vcpus = [];

    internal TestMachine(
        IrqchipMode irqchip = IrqchipMode.User, ICpuInterruptPort? port = null, Action<byte>? onEoi = null)
    {
        System = KvmSystem.Open(measureSpeed: false);
        Ports = new AddressMap("io", 0x10000);
        Mmio = new AddressMap("mmio", 0);
        Ports.Map(0, PortLog);
        Mmio.Map(MmioBase, MmioLog);
        Ram = HostMemory.Allocate(RamBytes, hugePages: false);
        Vm = System.CreateVm(new VmOptions
        {
            Ports = Ports,
            Mmio = Mmio,
            Clock = null!,
            Irqchip = irqchip,
            OnIoApicEoi = onEoi,
        });
        Vm.SetMemorySlot(0, new MemorySlot(0, RamBytes, Ram.Address, false, false, 0));
        Cpu = AddCpu(port);
        Start(Cpu);
    }

    internal KvmSystem System { get; }

    internal IVm Vm { get; }

    internal IVcpu Cpu { get; }

    internal HostMemory Ram { get; }

    internal AddressMap Ports { get; }

    internal AddressMap Mmio { get; }

    internal LogWindow PortLog { get; } = new(0x1000);

    internal LogWindow MmioLog { get; } = new(0x1000);

    public void Dispose()
    {
        foreach (IVcpu vcpu in _vcpus)
        {
            vcpu.Dispose();
        }

        Vm.Dispose();
        Ram.Dispose();
        System.Dispose();
    }

    internal IVcpu AddCpu(ICpuInterruptPort? port = null)
    {
        IVcpu vcpu = Vm.CreateVcpu(_vcpus.Count, port);
        var leaves = new List<CpuidEntry>();
        foreach (CpuidEntry leaf in System.SupportedCpuid)
        {
            // The initial APIC identifier (SDM 2A CPUID, leaf 1).
            leaves.Add(leaf.Function == 1
                ? leaf with { Ebx = (leaf.Ebx & 0x00FFFFFF) | ((uint)_vcpus.Count << 24) }
                : leaf);
        }

        vcpu.SetCpuid(leaves.ToArray());
        _vcpus.Add(vcpu);
        return vcpu;
    }

    /// <summary>Puts code where the first processor starts.</summary>
    internal void Load(ReadOnlySpan<byte> code, uint address = CodeAddress) => Ram.WriteSpan(address, code);

    /// <summary>Points a real-mode interrupt vector at an address below 64 KiB.</summary>
    internal void SetVector(int vector, ushort address) => Ram.Write((ulong)vector * 4, (uint)address);

    internal static void Start(IVcpu vcpu)
    {
        var state = new CpuState();
        vcpu.ReadState(state);
        for (int i = 0; i < 6; i++)
        {
            uint rights = i == 1 ? 0x9Bu : 0x8093;
            uint limit = i == 1 ? 0xFFFFu : uint.MaxValue;
            state.Segments[i] = new SegmentState { Limit = limit, Rights = rights };
        }

        state.Rip = CodeAddress;
        state.Gpr[4] = 0x8000;
        vcpu.WriteState(state);
    }

    /// <summary>Runs the first processor until it needs a decision; fails the test after ten seconds.</summary>
    internal ExitKind Run() => Run(Cpu, out _);

    internal ExitKind Run(out VcpuExit exit) => Run(Cpu, out exit);

    internal static ExitKind Run(IVcpu vcpu, out VcpuExit exit)
    {
        exit = default;
        using var watchdog = new Timer(_ => vcpu.Kick(), null, 10_000, Timeout.Infinite);
        var clock = Stopwatch.StartNew();
        while (true)
        {
            ExitKind kind = vcpu.Run(ref exit);
            if (kind != ExitKind.Interrupted)
            {
                return kind;
            }

            clock.Elapsed.Should().BeLessThan(TimeSpan.FromSeconds(9), "the guest must come to its end");
        }
    }
}

/// <summary>Registers that remember writes and answer reads from a table (default: the low byte of the offset).</summary>
internal sealed class LogWindow : IRegisterWindow
{
    private readonly Lock _gate = new();
    private readonly List<(uint Offset, AccessWidth Width, ulong Value)> _writes = [];

    internal LogWindow(uint length) => Length = length;

    public uint Length { get; }

    internal Func<uint, AccessWidth, ulong>? OnRead { get; set; }

    internal Action<uint, ulong>? OnWrite { get; set; }

    internal bool Records { get; set; } = true;

    internal IReadOnlyList<(uint Offset, AccessWidth Width, ulong Value)> Writes
    {
        get
        {
            lock (_gate)
            {
                return [.. _writes];
            }
        }
    }

    public ulong Read(uint offset, AccessWidth width) => OnRead?.Invoke(offset, width) ?? (offset & 0xFF);

    public void Write(uint offset, AccessWidth width, ulong value)
    {
        if (Records)
        {
            lock (_gate)
            {
                _writes.Add((offset, width, value));
            }
        }

        OnWrite?.Invoke(offset, value);
    }
}

/// <summary>A local APIC reduced to what a test sets.</summary>
internal sealed class FakeInterruptPort : ICpuInterruptPort
{
    private readonly Lock _gate = new();
    private readonly Queue<byte> _vectors = new();
    private int _nmis;
    private int _inits;
    private int _startup = -1;

    internal LogWindow Page { get; } = new(0x1000);

    internal List<(uint Msr, ulong Value)> MsrWrites { get; } = [];

    public bool HasInterrupt => With(() => _vectors.Count > 0);

    public bool HasNmi => With(() => _nmis > 0);

    public bool HasInit => With(() => _inits > 0);

    public bool HasStartup => With(() => _startup >= 0);

    public byte Cr8 { get; set; }

    public ulong ApicBase { get; set; } = 0xFEE00900;

    public bool IsMemoryMapped => true;

    public IRegisterWindow Registers => Page;

    public int Acknowledge() => With(() => _vectors.TryDequeue(out byte vector) ? vector : -1);

    public bool TakeNmi() => With(() => _nmis > 0 && _nmis-- > 0);

    public bool TakeInit() => With(() => _inits > 0 && _inits-- > 0);

    public bool TakeStartup(out byte vector)
    {
        int taken = With(() => (_startup, _startup = -1).Item1);
        vector = (byte)taken;
        return taken >= 0;
    }

    public bool TryReadMsr(uint msr, out ulong value)
    {
        value = msr;
        return msr is >= 0x800 and <= 0x8FF;
    }

    public bool TryWriteMsr(uint msr, ulong value)
    {
        MsrWrites.Add((msr, value));
        return msr is >= 0x800 and <= 0x8FF;
    }

    public void SetTscOffset(ulong ticks)
    {
    }

    public void Attach(ICpuWaker waker)
    {
    }

    internal void Raise(byte vector) => With(() =>
    {
        _vectors.Enqueue(vector);
        return true;
    });

    internal void RaiseNmi() => With(() => _nmis++);

    internal void RaiseInit() => With(() => _inits++);

    internal void RaiseStartup(byte vector) => With(() => _startup = vector);

    private T With<T>(Func<T> action)
    {
        lock (_gate)
        {
            return action();
        }
    }
}

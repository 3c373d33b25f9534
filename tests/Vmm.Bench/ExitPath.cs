// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using Vmm.Core;
using Vmm.Host;
using Vmm.Kvm;

namespace Vmm.Bench;

// Theory. How much does C# cost on the path of an exit? The same guest loop of port writes runs under a bare C loop
// (tests/abi/exitbench.c, a child process that runs a batch whenever it is asked) and under KvmVcpu.Run with the address
// map behind it. Batches alternate, so that whatever else the machine does hits both sides alike; the best batch of
// each side is the cost without disturbance, and their ratio is what is reported.

/// <summary>Nanoseconds for a port write: C# run loop against bare C loop.</summary>
internal static class ExitPath
{
    private const int Rounds = 200;
    private const int ExitsPerBatch = 500;
    private const uint CodeAddress = 0x1000;
    private const ushort CountedPort = 0x11;
    private const ushort EndPort = 0x10;

    internal static void Run(string bareLoop)
    {
        using var child = Process.Start(new ProcessStartInfo(bareLoop)
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            UseShellExecute = false,
        })!;
        using var machine = new LoopMachine(IrqchipMode.User);
        using var withChip = new LoopMachine(IrqchipMode.Kernel);
        var bare = new List<double>();
        var managed = new List<double>();
        var chip = new List<double>();
        for (int round = 0; round < Rounds; round++)
        {
            bare.Add(AskChild(child));
            managed.Add(machine.Batch());
            chip.Add(withChip.Batch());
        }

        child.StandardInput.Close();
        child.WaitForExit();
        bare.Sort();
        managed.Sort();
        chip.Sort();
        Report("exit-path-port-write", managed[0], bare[0]);
        Report("exit-path-port-write-median", managed[Rounds / 2], bare[Rounds / 2]);
        Report("exit-path-port-write-kernel-irqchip", chip[0], bare[0]);
    }

    private static double AskChild(Process child)
    {
        child.StandardInput.Write($"{ExitsPerBatch}\n");
        child.StandardInput.Flush();
        string line = child.StandardOutput.ReadLine() ?? throw new IOException("the bare loop ended");
        return double.Parse(line, CultureInfo.InvariantCulture);
    }

    private static void Report(string name, double value, double baseline) =>
        Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"bench {name} {value:0} ns {baseline:0}"));

    private sealed class LoopMachine : IDisposable, IRegisterWindow
    {
        private readonly KvmSystem _system;
        private readonly HostMemory _memory;
        private readonly IVm _vm;
        private readonly IVcpu _vcpu;
        private long _exits;
        private long _start;
        private double _nanoseconds;

        internal LoopMachine(IrqchipMode mode)
        {
            // again: mov ecx, N; next: out 0x11, al; dec ecx; jnz next; out 0x10, al; jmp again
            ReadOnlySpan<byte> code =
            [
                0xB9, ExitsPerBatch & 0xFF, ExitsPerBatch >> 8, 0, 0, 0xE6, (byte)CountedPort, 0xFF, 0xC9, 0x75, 0xFA,
                0xE6, (byte)EndPort, 0xEB, 0xF1,
            ];
            _system = KvmSystem.Open(measureSpeed: false);
            _memory = HostMemory.Allocate(64 << 10, hugePages: false);
            _memory.WriteSpan(CodeAddress, code);
            var ports = new AddressMap("io", 0x10000);
            ports.Map(EndPort, this);
            _vm = _system.CreateVm(new VmOptions
            {
                Ports = ports,
                Mmio = new AddressMap("mmio", 0),
                Clock = null!,
                Irqchip = mode,
            });
            _vm.SetMemorySlot(0, new MemorySlot(0, 64 << 10, _memory.Address, false, false, 0));
            _vcpu = _vm.CreateVcpu(0, null);
            var state = new CpuState();
            _vcpu.ReadState(state);
            state.Cr0 |= 1;
            for (int i = 0; i < 6; i++)
            {
                uint rights = i == 1 ? 0xC09Bu : 0xC093;
                state.Segments[i] = new SegmentState { Selector = 8, Limit = uint.MaxValue, Rights = rights };
            }

            state.Rip = CodeAddress;
            _vcpu.WriteState(state);
        }

        public uint Length => 2;

        public ulong Read(uint offset, AccessWidth width) => 0;

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            if (offset != 0)
            {
                if (_exits++ == 0)
                {
                    _start = Stopwatch.GetTimestamp();
                }

                return;
            }

            _nanoseconds = Stopwatch.GetElapsedTime(_start).TotalNanoseconds / (_exits == 0 ? 1 : _exits);
            _exits = 0;
            _vcpu.Kick();
        }

        public void Dispose()
        {
            _vcpu.Dispose();
            _vm.Dispose();
            _memory.Dispose();
            _system.Dispose();
        }

        internal double Batch()
        {
            VcpuExit exit = default;
            ExitKind kind = _vcpu.Run(ref exit);
            return kind == ExitKind.Interrupted
                ? _nanoseconds
                : throw new HypervisorException($"the loop ended with {kind}: {exit.Detail}");
        }
    }
}

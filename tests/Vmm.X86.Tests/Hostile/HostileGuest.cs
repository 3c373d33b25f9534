// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Threading;
using Vmm.Core;

namespace Vmm.X86.Tests.Hostile;

/// <summary>What a hostile guest has done.</summary>
internal sealed class HostileReport
{
    /// <summary>Random instructions, without those of endless loops; 0 when code is translated, which counts none.</summary>
    public long Instructions;

    /// <summary>Those of loops that only the watcher ended.</summary>
    public long InLoops;

    /// <summary>How often random code was entered anew.</summary>
    public long Entries;

    /// <summary>How often the guest shut down or stood still and was started again.</summary>
    public long Restarts;

    /// <summary>How often all of memory was filled anew.</summary>
    public long Fills;

    /// <summary>Null, or what went wrong.</summary>
    public string? Failure;

    public override string ToString() =>
        $"{Instructions} instructions, {InLoops} more in endless loops, {Entries} entries, {Restarts} restarts, {Fills} fills";
}

// Theory. Memory is RAM from 0 to the ROMs, one ROM (HostileRom) for each vCPU, and nothing else. All of it, and the page
// flags, lie between guard pages, and ROM cannot be written by this process while the guest runs: a pointer that leaves
// what the guest owns ends the process. A watcher ticks: a vCPU that has not entered random code since the last tick gets
// an NMI, and after three such ticks it is started again. The clock is the number of instructions executed, so a run is
// the same every time but for where the watcher strikes.

/// <summary>Runs random bytes as code.</summary>
internal sealed unsafe class HostileGuest : IDisposable
{
    private const int TickMs = 1;
    private const int Patience = 3;
    private const long LoopAfter = 20_000;
    private const long EntriesPerFill = 20_000;
    private const uint ShortestEntry = 8;
    private readonly Random _random;
    private readonly ICodeMemory? _code;
    private readonly SoftHypervisor _hypervisor;
    private readonly SoftVm _vm;
    private readonly GuardedMemory _ram;
    private readonly GuardedMemory _ramFlags;
    private readonly List<Processor> _processors = [];
    private ulong _noise;

    /// <param name="mode">What it runs in.</param>
    /// <param name="seed">For everything random.</param>
    /// <param name="translateAfter">Executions of a block before it is translated; 0 for never.</param>
    /// <param name="vcpus">One or two, which share RAM.</param>
    public HostileGuest(HostileMode mode, int seed, int translateAfter = 0, int vcpus = 1)
    {
        _random = new Random(seed);
        _noise = ((ulong)seed * 2) + 1;
        _code = TestCode.Create();
        _hypervisor = new SoftHypervisor(_code) { Translate = translateAfter != 0 };
        _vm = (SoftVm)_hypervisor.CreateVm(new VmOptions
        {
            Ports = new AddressMap("io", 0x10000),
            Mmio = new AddressMap("mmio", 0),
            Clock = new RetiredClock(this),
        });
        int ramBytes = 0x100000 - (vcpus * HostileRom.Bytes);
        _ram = new GuardedMemory(ramBytes);
        _ramFlags = new GuardedMemory(ramBytes >> 12);
        _vm.SetMemorySlot(0, new MemorySlot(0, (ulong)ramBytes, _ram.Address, false, false, _ramFlags.Address));
        for (int i = 0; i < vcpus; i++)
        {
            _processors.Add(new Processor(this, i, mode, translateAfter));
        }
    }

    /// <summary>Runs until each vCPU has executed or entered random code so often.</summary>
    public HostileReport Run(long instructions, long entries)
    {
        var report = new HostileReport();
        Fill(report);
        using var watcher = new Timer(_ => Watch(), null, TickMs, TickMs);
        while (report.Failure is null && (report.Instructions < instructions || report.Entries < entries))
        {
            long until = report.Entries + (EntriesPerFill * _processors.Count);
            if (_processors.Count == 1)
            {
                _processors[0].RunUntil(report, until, instructions, entries);
            }
            else
            {
                RunTogether(report, until, instructions, entries);
            }

            Fill(report);
        }

        return report;
    }

    public void Dispose()
    {
        _vm.Dispose();
        _hypervisor.Dispose();
        _code?.Dispose();
        foreach (Processor processor in _processors)
        {
            processor.Dispose();
        }

        _ram.Dispose();
        _ramFlags.Dispose();
    }

    private void RunTogether(HostileReport report, long until, long instructions, long entries)
    {
        var threads = new List<Thread>();
        foreach (Processor processor in _processors)
        {
            var thread = new Thread(() => processor.RunUntil(report, until, instructions, entries));
            thread.Start();
            threads.Add(thread);
        }

        foreach (Thread thread in threads)
        {
            thread.Join();
        }
    }

    private void Watch()
    {
        foreach (Processor processor in _processors)
        {
            processor.Watch();
        }
    }

    // New code, new ROMs, everybody from the start. Every second target begins with bytes that lead to rarer opcodes. Most
    // short jumps lead forward: a loop without an end is left to the watcher, which takes long.
    private void Fill(HostileReport report)
    {
        report.Fills++;
        Span<ulong> words = MemoryMarshal.Cast<byte, ulong>(_ram.Bytes);
        for (int i = 0; i < words.Length; i++)
        {
            _noise ^= _noise << 13;
            _noise ^= _noise >> 7;
            _noise ^= _noise << 17;
            words[i] = _noise;
        }

        Span<byte> bytes = _ram.Bytes;
        for (int i = 0; i < bytes.Length - 1; i++)
        {
            if (bytes[i] is (>= 0x70 and <= 0x7F) or (>= 0xE0 and <= 0xE3) or 0xEB && (bytes[i + 1] & 0x80) != 0 &&
                (bytes[i + 1] & 7) != 0)
            {
                bytes[i + 1] &= 0x7F;
            }
        }

        ReadOnlySpan<ushort> starts =
        [
            0x0F, 0x0F66, 0x0FF3, 0x0FF2, 0x0F48, 0x380F, 0x3A0F, 0xC5, 0xC4, 0x010F, 0x000F, 0xAE0F, 0xC70F, 0xF0, 0x67,
            0x66, 0xD9, 0xDB, 0xDF, 0xF3, 0x48, 0x220F, 0x200F, 0x300F, 0x9A, 0xEA, 0xFF, 0x8E, 0xCF, 0x64, 0x65, 0xC4E2,
        ];
        foreach (Processor processor in _processors)
        {
            processor.Prepare();
            foreach (uint target in processor.Targets)
            {
                if (target < _ram.Length - 16 && _random.Next(2) == 0)
                {
                    ushort start = starts[_random.Next(starts.Length)];
                    _ram.Bytes[(int)target] = (byte)start;
                    if (start > 0xFF)
                    {
                        _ram.Bytes[(int)target + 1] = (byte)(start >> 8);
                    }
                }
            }
        }

        _vm.NotifyCodeWritten(0, 0x100000);
    }

    /// <summary>One vCPU with its ROM.</summary>
    private sealed class Processor : IDisposable
    {
        private readonly HostileGuest _guest;
        private readonly HostileRom _rom;
        private readonly GuardedMemory _memory;
        private readonly GuardedMemory _flags;
        private readonly FakePort _port = new();
        private readonly SoftVcpu _vcpu;
        private readonly Random _random;
        private readonly CpuState _state = new();
        private readonly byte* _notes;
        private ulong _seenByWatcher;
        private ulong _counted;
        private int _quietTicks;
        private long _loopsUntil;
        private long _instructions;
        private int _running;

        public Processor(HostileGuest guest, int index, HostileMode mode, int translateAfter)
        {
            _guest = guest;
            _random = new Random(guest._random.Next());
            _rom = new HostileRom(mode, index, _random);
            _memory = new GuardedMemory(HostileRom.Bytes);
            _flags = new GuardedMemory(HostileRom.Bytes >> 12);
            guest._vm.SetMemorySlot(
                1 + index,
                new MemorySlot(_rom.Base, HostileRom.Bytes, _memory.Address, true, false, _flags.Address));
            _vcpu = (SoftVcpu)guest._vm.CreateVcpu(index, _port);
            _vcpu.SetCpuid([.. guest._hypervisor.SupportedCpuid]);
            _vcpu.TranslateAfter = translateAfter;
            _notes = (byte*)guest._ram.Address + _rom.Notes;
        }

        public List<uint> Targets => _rom.Targets;

        public long Instructions => _vcpu.InstructionsRetired;

        public void Prepare()
        {
            _memory.IsWritable = true;
            _rom.Build().CopyTo(_memory.Bytes);
            _memory.IsWritable = false;
            Start();
        }

        public void RunUntil(HostileReport report, long until, long instructions, long entries)
        {
            var exit = default(VcpuExit);
            int halts = 0;
            Volatile.Write(ref _running, 1);
            while (Volatile.Read(ref report.Entries) < until && report.Failure is null &&
                (report.Entries < entries || report.Instructions < instructions))
            {
                ExitKind kind = _vcpu.Run(ref exit);
                long entered = Account(report);
                switch (kind)
                {
                    case ExitKind.Failed:
                        report.Failure = exit.Detail;
                        break;
                    case ExitKind.Halted when entered != 0 || ++halts < 4:
                        halts = entered != 0 ? 0 : halts;
                        _port.Nmi = true;
                        break;
                    case ExitKind.Interrupted when Volatile.Read(ref _quietTicks) < Patience:
                        break;
                    default:
                        halts = 0;
                        Interlocked.Increment(ref report.Restarts);
                        Start();
                        break;
                }
            }

            Volatile.Write(ref _running, 0);
        }

        // On the watcher's thread.
        public void Watch()
        {
            ulong now = Volatile.Read(ref *(ulong*)_notes);
            if (now != _seenByWatcher || Volatile.Read(ref _running) == 0)
            {
                _seenByWatcher = now;
                Volatile.Write(ref _quietTicks, 0);

                // So that counts are seen, and for its own sake.
                _port.Vectors.Clear();
                _vcpu.Kick();
                return;
            }

            Interlocked.Increment(ref _quietTicks);
            _port.Nmi = true;
            _vcpu.Kick();
        }

        public void Dispose()
        {
            _memory.Dispose();
            _flags.Dispose();
        }

        private void Start()
        {
            _rom.Enter(_state);
            _vcpu.WriteState(_state);
            _port.Nmi = false;
            Volatile.Write(ref _quietTicks, 0);

            // Not much of the guest's own in what the routine goes by.
            *(ulong*)(_notes + 16) = (ulong)_random.NextInt64();
            _loopsUntil = _vcpu.InstructionsRetired;
        }

        // The notes lie in RAM that the guest may have written to: what is not believable is not counted.
        private long Account(HostileReport report)
        {
            long executed = _vcpu.InstructionsRetired;
            ulong count = Volatile.Read(ref *(ulong*)_notes);
            ulong most = _vcpu.Translator is null ? (ulong)(executed - _instructions) / ShortestEntry : 1 << 20;
            ulong entered = _counted > count || count - _counted > most ? 0 : count - _counted;
            _counted = count;
            Interlocked.Add(ref report.Entries, (long)entered);
            if (_vcpu.Translator is not null)
            {
                // Generated code counts nothing.
                return (long)entered;
            }

            long last = *(long*)(_notes + 8);
            last = last < _loopsUntil || last > executed ? _loopsUntil : last;
            long inLoops = executed - last > LoopAfter ? executed - last : 0;
            _loopsUntil = inLoops != 0 ? executed : _loopsUntil;
            report.InLoops += inLoops;
            report.Instructions += Math.Max(
                0, executed - _instructions - inLoops - ((long)entered * _rom.RoutineLength));
            _instructions = executed;
            return (long)entered;
        }
    }

    // The TSC of both vCPUs is what the first has executed.
    private sealed class RetiredClock(HostileGuest guest) : IClock
    {
        public long NowNs => guest._processors.Count == 0 ? 0 : guest._processors[0].Instructions;

        public long UnixTimeNs => 0;

        public IGuestTimer CreateTimer(string name, Action onExpire) => throw new NotSupportedException();
    }
}

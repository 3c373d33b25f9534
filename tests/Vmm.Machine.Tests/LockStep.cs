// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.Text;
using System.Threading;
using Vmm.Config;
using Vmm.Core;
using Vmm.X86;

namespace Vmm.Machine.Tests;

/// <summary>
/// Runs one definition with <c>clock: icount</c> twice at the same time, translated and interpreted. Both stop at the same
/// guest times, one waits there for the other, and their processors and memories are compared. When something differs, both
/// are run again from the beginning and stop more often in the span before it, until the span is a single instruction.
/// </summary>
internal sealed class LockStep
{
    private const int PageBytes = 4096;
    private const int ChunkBytes = 1 << 20;
    private const int StopsPerSpan = 512;
    private const int MaxPages = 64;
    private const int HeaderAt = 512;
    private static readonly TimeSpan s_patience = TimeSpan.FromMinutes(2);

    private readonly MachineSpec _spec;
    private readonly long _stepNs;
    private readonly long _endNs;
    private readonly int _memoryEvery;

    /// <summary>Prepares a comparison.</summary>
    /// <param name="spec">The machine.</param>
    /// <param name="stepNs">Guest time between two stops: as many instructions, where the guest does not sleep.</param>
    /// <param name="endNs">Guest time of the last stop.</param>
    /// <param name="memoryEvery">Memory is compared at each so many stops.</param>
    public LockStep(MachineSpec spec, long stepNs, long endNs, int memoryEvery)
    {
        _spec = spec with { Clock = new ClockSpec { Source = ClockSource.Icount } };
        _stepNs = stepNs;
        _endNs = endNs;
        _memoryEvery = memoryEvery;
    }

    /// <summary>Where they agree, and if they do not everywhere, where they part and in what.</summary>
    /// <param name="Difference">Null, or a line for each pass, from the widest span to the narrowest.</param>
    /// <param name="Instructions">Executed at the last stop at which they agreed.</param>
    /// <param name="Stops">How many stops there were.</param>
    /// <param name="Text">What the interpreted machine wrote.</param>
    /// <param name="Reason">How the translated one ended.</param>
    /// <param name="Translated">Blocks that each of them translated.</param>
    public sealed record Outcome(
        string? Difference, long Instructions, long Stops, string Text, StopReason? Reason, long[] Translated);

    /// <summary>Runs both to their ends or to the last stop.</summary>
    public Outcome Run()
    {
        var first = new Pass(this, 0, _stepNs, _endNs, []);
        Outcome outcome = first.Run();
        if (outcome.Difference is null)
        {
            return outcome;
        }

        var report = new StringBuilder(outcome.Difference);
        long good = first.GoodNs;
        long bad = first.BadNs;
        IReadOnlyList<ulong> pages = first.Pages;
        for (long step = _stepNs; step > 1 && bad > good;)
        {
            step = Math.Max(1, (bad - good) / StopsPerSpan);
            var again = new Pass(this, good, step, bad, pages);
            outcome = again.Run();
            if (outcome.Difference is null)
            {
                // Near a stop instructions are interpreted one by one, also those that generated code gets wrong.
                report.Append(CultureInfo.InvariantCulture, $"\nstops each {step} from {good} on hide it");
                break;
            }

            report.Append('\n').Append(outcome.Difference);
            good = again.GoodNs;
            bad = again.BadNs;
            pages = again.Pages;
        }

        return outcome with { Difference = report.ToString() };
    }

    private static Machine Build(MachineSpec spec, bool translate, ICharBackend stdio)
    {
        IHypervisor soft = AccelChooser.Choose(["soft"]).Hypervisor;
        ((SoftHypervisor)soft).Translate = translate;
        return MachineBuilder.Build(spec, soft, stdio);
    }

    private static List<(string Name, ulong Value)> Fields(CpuState state)
    {
        string[] names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"];
        string[] segments = ["es", "cs", "ss", "ds", "fs", "gs"];
        var fields = new List<(string, ulong)> { ("rip", state.Rip), ("rflags", state.Rflags) };
        for (int i = 0; i < state.Gpr.Length; i++)
        {
            fields.Add((i < names.Length ? names[i] : $"r{i}", state.Gpr[i]));
        }

        for (int i = 0; i < segments.Length; i++)
        {
            Add(fields, segments[i], state.Segments[i]);
        }

        Add(fields, "ldtr", state.Ldtr);
        Add(fields, "tr", state.Tr);
        fields.AddRange(
        [
            ("gdt.base", state.GdtBase), ("gdt.limit", state.GdtLimit),
            ("idt.base", state.IdtBase), ("idt.limit", state.IdtLimit),
            ("cr0", state.Cr0), ("cr2", state.Cr2), ("cr3", state.Cr3), ("cr4", state.Cr4), ("cr8", state.Cr8),
            ("efer", state.Efer), ("apicbase", state.ApicBase), ("xcr0", state.Xcr0),
            ("activity", (ulong)state.Activity), ("shadow.sti", state.StiShadow ? 1UL : 0),
            ("shadow.movss", state.MovSsShadow ? 1UL : 0), ("nmi.blocked", state.NmiBlocked ? 1UL : 0),
            ("nmi.pending", state.NmiPending ? 1UL : 0), ("event.pending", state.EventPending ? 1UL : 0),
        ]);
        for (int i = 0; i < state.Debug.Length; i++)
        {
            fields.Add(($"debug{i}", state.Debug[i]));
        }

        for (int i = 0; i < state.Xsave.Length; i += sizeof(ulong))
        {
            // Which components are in their initial state is for the image's reader to know; all values are in it.
            if (i != HeaderAt)
            {
                fields.Add(($"xsave+{i}", BitConverter.ToUInt64(state.Xsave, i)));
            }
        }

        foreach ((uint index, ulong value) in state.Msrs)
        {
            fields.Add(($"msr {index:x}", value));
        }

        return fields;
    }

    private static void Add(List<(string Name, ulong Value)> fields, string name, in SegmentState segment)
    {
        fields.Add((name, segment.Selector));
        fields.Add(($"{name}.base", segment.Base));
        fields.Add(($"{name}.limit", segment.Limit));
        fields.Add(($"{name}.rights", segment.Rights));
    }

    /// <summary>Both machines, once.</summary>
    private sealed class Pass(LockStep owner, long startNs, long stepNs, long endNs, IReadOnlyList<ulong> pages)
    {
        private readonly Lock _lock = new();
        private readonly Machine?[] _machines = new Machine?[2];
        private readonly CpuState[] _states = [new(), new()];
        private readonly int[] _arrivals = new int[2];
        private readonly byte[] _left = new byte[ChunkBytes];
        private readonly byte[] _right = new byte[ChunkBytes];
        private readonly ManualResetEventSlim[] _go = [new(false), new(false)];
        private volatile bool _hasEnded;
        private string? _difference;
        private long _goodNs;
        private long _goodMemoryNs;
        private long _count;
        private int _stops;
        private long _latestNs;

        public long GoodNs { get; private set; }

        public long BadNs { get; private set; }

        public List<ulong> Pages { get; } = [];

        public Outcome Run()
        {
            Payload.Recorder[] outputs = [new(), new()];
            var results = new MachineResult?[2];
            for (int i = 0; i < 2; i++)
            {
                _machines[i] = Build(owner._spec, translate: i == 0, outputs[i]);
                Arm(i);
            }

            var threads = new Thread[2];
            for (int i = 0; i < 2; i++)
            {
                int side = i;
                threads[i] = new Thread(() =>
                {
                    results[side] = _machines[side]!.Run();
                    _hasEnded = true;
                    _go[1 - side].Set();
                });
                threads[i].Start();
            }

            foreach (Thread thread in threads)
            {
                thread.Join();
            }

            if (_difference is null)
            {
                CompareEnds(outputs, results);
            }

            long[] translated = [Translated(_machines[0]!), Translated(_machines[1]!)];
            foreach (Machine? machine in _machines)
            {
                machine!.Dispose();
            }

            return new Outcome(_difference, _count, _stops, outputs[1].Text, results[0]?.Reason, translated);
        }

        private static long Translated(Machine machine)
        {
            long blocks = 0;
            foreach (VmStatistic statistic in machine.ReadStatistics())
            {
                blocks += statistic.Name.EndsWith("blocks-translated", StringComparison.Ordinal) ? statistic.Value : 0;
            }

            return blocks;
        }

        private void CompareEnds(Payload.Recorder[] outputs, MachineResult?[] results)
        {
            foreach (Machine? machine in _machines)
            {
                machine!.Pause();
            }

            Compare(memory: true, _latestNs);
            if (_difference is null && results[0]?.Reason != results[1]?.Reason)
            {
                _difference = $"translated ended with {results[0]}, interpreted with {results[1]}";
            }

            if (_difference is null && !string.Equals(outputs[0].Text, outputs[1].Text, StringComparison.Ordinal))
            {
                _difference = "the outputs differ";
            }
        }

        private void Arm(int side)
        {
            IGuestTimer? timer = null;
            Machine machine = _machines[side]!;
            _goodNs = startNs;
            _goodMemoryNs = startNs;
            long at = Math.Max(startNs, Math.Min(stepNs, endNs));
            timer = machine.Clock.CreateTimer("lock-step", () =>
            {
                if (Meet(side, at) && at < endNs)
                {
                    at = Math.Min(endNs, at + stepNs);
                    timer!.ArmAt(at);
                }
                else
                {
                    machine.Stop(MachineResult.For(StopReason.Quit, "enough"));
                }
            });
            timer.ArmAt(at);
        }

        // On a vCPU's thread, which stands still: the second to come compares. False: they differ, or one has ended.
        private bool Meet(int side, long at)
        {
            bool isSecond;
            lock (_lock)
            {
                _arrivals[side]++;
                _latestNs = at;
                isSecond = _arrivals[side] <= _arrivals[1 - side];
            }

            if (!isSecond)
            {
                bool came = _go[side].Wait(s_patience);
                _go[side].Reset();
                return came && !_hasEnded && _difference is null;
            }

            Compare(memory: pages.Count > 0 || _stops % owner._memoryEvery == 0, at);
            _stops++;
            _go[1 - side].Set();
            return _difference is null;
        }

        private void Compare(bool memory, long at)
        {
            var left = (SoftVcpu)_machines[0]!.Vcpu(0);
            var right = (SoftVcpu)_machines[1]!.Vcpu(0);
            left.ReadState(_states[0]);
            right.ReadState(_states[1]);
            var text = new StringBuilder();
            Note(text, "count", (ulong)left.InstructionsRetired, (ulong)right.InstructionsRetired);
            List<(string Name, ulong Value)> leftFields = Fields(_states[0]);
            List<(string Name, ulong Value)> rightFields = Fields(_states[1]);
            for (int i = 0; i < Math.Min(leftFields.Count, rightFields.Count); i++)
            {
                Note(text, leftFields[i].Name, leftFields[i].Value, rightFields[i].Value);
            }

            if (leftFields.Count != rightFields.Count)
            {
                Note(text, "fields", (ulong)leftFields.Count, (ulong)rightFields.Count);
            }

            bool inMemoryOnly = text.Length == 0;
            if (memory || !inMemoryOnly)
            {
                CompareMemory(text);
            }

            string place = string.Create(
                CultureInfo.InvariantCulture,
                $"instruction {right.InstructionsRetired} (guest time {at}), rip {_states[1].Rip:x}");
            if (text.Length != 0)
            {
                BadNs = at;
                GoodNs = inMemoryOnly ? _goodMemoryNs : _goodNs;
                _difference = $"translated and interpreted differ at {place}, not yet at {GoodNs}:{text}";
                return;
            }

            _count = right.InstructionsRetired;
            _goodNs = at;
            _goodMemoryNs = memory ? at : _goodMemoryNs;
        }

        private static void Note(StringBuilder text, string name, ulong left, ulong right)
        {
            if (left != right)
            {
                text.Append(CultureInfo.InvariantCulture, $" {name} {left:x} and {right:x};");
            }
        }

        private void CompareMemory(StringBuilder text)
        {
            if (pages.Count > 0)
            {
                foreach (ulong page in pages)
                {
                    CompareRange(text, page, PageBytes);
                }

                return;
            }

            for (ulong at = 0; at < (ulong)owner._spec.MemoryBytes; at += ChunkBytes)
            {
                CompareRange(text, at, ChunkBytes);
            }
        }

        private void CompareRange(StringBuilder text, ulong start, int length)
        {
            Span<byte> left = _left.AsSpan(0, length);
            Span<byte> right = _right.AsSpan(0, length);
            if (!_machines[0]!.Memory.TryRead(start, left) || !_machines[1]!.Memory.TryRead(start, right))
            {
                // The hole of the video memory is in the first of them.
                if (length > PageBytes)
                {
                    for (int i = 0; i < length; i += PageBytes)
                    {
                        CompareRange(text, start + (ulong)i, PageBytes);
                    }
                }

                return;
            }

            if (left.SequenceEqual(right))
            {
                return;
            }

            for (int page = 0; page < length; page += PageBytes)
            {
                int at = left.Slice(page, PageBytes).CommonPrefixLength(right.Slice(page, PageBytes));
                if (at == PageBytes || Pages.Count >= MaxPages)
                {
                    continue;
                }

                Pages.Add(start + (ulong)page);
                int word = page + (at & ~7);
                Note(
                    text,
                    string.Create(CultureInfo.InvariantCulture, $"[{start + (ulong)word:x}]"),
                    BitConverter.ToUInt64(left[word..]),
                    BitConverter.ToUInt64(right[word..]));
            }
        }
    }
}

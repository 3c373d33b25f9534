// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;
using Iced.Intel;
using Vmm.Core;

namespace Vmm.X86;

// What `vmctl run --stats` shows of the software processor. Counting costs next to nothing: generated code counts only in
// its cold paths, so there are misses and no hits.

/// <summary>Adds up the counts of the vCPUs of a VM.</summary>
internal static unsafe class Statistics
{
    /// <summary>Mnemonics that are listed one by one, those with the most calls.</summary>
    public const int Fallbacks = 24;

    /// <summary>Entries of CpuContext.HandlerCalls: one for each Iced code.</summary>
    public const int Codes = 8192;

    /// <summary>Reads all counts of some vCPUs.</summary>
    public static List<VmStatistic> Read(IEnumerable<SoftVcpu> vcpus)
    {
        var all = new List<VmStatistic>();
        var calls = new Dictionary<Mnemonic, long>();
        foreach (SoftVcpu vcpu in vcpus)
        {
            if (!vcpu.IsDisposed)
            {
                Add(all, Of(vcpu));
                AddCalls(vcpu.Context, calls);
            }
        }

        var sorted = new List<KeyValuePair<Mnemonic, long>>(calls);
        sorted.Sort(static (a, b) => b.Value != a.Value ? b.Value.CompareTo(a.Value) : a.Key.CompareTo(b.Key));
        for (int i = 0; i < sorted.Count && i < Fallbacks; i++)
        {
            all.Add(new VmStatistic("handler-" + sorted[i].Key.ToString().ToLowerInvariant(), sorted[i].Value));
        }

        return all;
    }

    // Every vCPU has the same counts in the same order.
    private static void Add(List<VmStatistic> sums, List<VmStatistic> more)
    {
        for (int i = 0; i < more.Count; i++)
        {
            if (i == sums.Count)
            {
                sums.Add(more[i]);
            }
            else
            {
                sums[i] = new VmStatistic(sums[i].Name, sums[i].Value + more[i].Value);
            }
        }
    }

    private static List<VmStatistic> Of(SoftVcpu vcpu)
    {
        CpuContext* cpu = vcpu.Context;
        Translator? translator = vcpu.Translator;
        return
        [
            new("instructions-counted", (long)cpu->InstructionCount),
            new("blocks-decoded", cpu->Blocks.Decoded),
            new("blocks-translated", translator?.Blocks ?? 0),
            new("instructions-translated", translator?.Instructions ?? 0),
            new("host-code-bytes", translator?.HostBytes ?? 0),
            new("places-with-handler", translator?.HandlerSites ?? 0),
            new("places-with-site", translator?.SitePlaces ?? 0),
            new("places-with-tlb", translator?.TlbPlaces ?? 0),
            new("groups-of-operands", translator?.Groups ?? 0),
            new("site-misses", (long)cpu->SiteMisses),
            new("tlb-fills", (long)cpu->TlbFills),
            new("flushes-of-all", cpu->FlushesOfAll),
            new("flushes-of-pages", cpu->FlushesOfPages),
            new("address-space-switches", cpu->SpaceSwitches),
            new("code-arena-resets", cpu->Blocks.Clears),
            new("dispatches", vcpu.Dispatches),
            new("exits-direct", vcpu.Leavings[(int)ExitKindOfCode.Direct]),
            new("exits-stale", vcpu.Leavings[(int)ExitKindOfCode.Stale]),
            new("exits-indirect", vcpu.Leavings[(int)ExitKindOfCode.Indirect]),
            new("exits-poll", vcpu.Leavings[(int)ExitKindOfCode.Poll]),
            new("exits-far", vcpu.Leavings[(int)ExitKindOfCode.Far]),
            new("exits-handler", vcpu.Leavings[SoftVcpu.ReasonHandler]),
            new("exits-interpret", vcpu.Leavings[SoftVcpu.ReasonInterpret]),
            new("blocks-interpreted", vcpu.Interpreted),
            new("blocks-interpreted-crossing", vcpu.InterpretedCrossing),
            new("handler-calls", TotalCalls(cpu)),
        ];
    }

    // SAFETY: here and below: HandlerCalls has Codes entries until the vCPU is disposed, and the caller holds the VM's gate.
    private static long TotalCalls(CpuContext* cpu)
    {
        long total = 0;
        for (int i = 0; i < Codes; i++)
        {
            total += cpu->HandlerCalls[i];
        }

        return total;
    }

    private static void AddCalls(CpuContext* cpu, Dictionary<Mnemonic, long> calls)
    {
        for (int i = 0; i < Codes; i++)
        {
            if (cpu->HandlerCalls[i] != 0)
            {
                Mnemonic mnemonic = ((Code)i).Mnemonic();
                calls[mnemonic] = calls.GetValueOrDefault(mnemonic) + cpu->HandlerCalls[i];
            }
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;
using Iced.Intel;
using Vmm.Core;

namespace Vmm.X86;

// What `vmctl run --stats` shows of the software processor. Generated code always counts in its cold paths, where that
// costs nothing. Hits are counted by instructions that the translator emits only for a VM made with CountAccesses
// (`--stats` does that): without it the code is byte for byte what it would be if nothing were counted.

/// <summary>How a memory operand is checked: the level that the code runs at, and by what.</summary>
internal enum AccessClass
{
    /// <summary>A site for the stack (Sites.cs).</summary>
    UserStack,

    /// <summary>A site of the operand's own; one more than the stack's of the same level.</summary>
    UserSite,

    /// <summary>The TLB.</summary>
    UserTlb,
    KernelStack,
    KernelSite,
    KernelTlb,
}

/// <summary>What lies at CpuContext.AccessCountsOffset: for each class three counts, then two of branches.</summary>
internal static class AccessCount
{
    /// <summary>Checks made. Operands that are checked together count as one.</summary>
    public const int Checks = 0;

    /// <summary>Of a site: checks that it failed.</summary>
    public const int Misses = 1;

    /// <summary>Of a site: those that its filling did not help, so that a handler executed the instruction.</summary>
    public const int Slow = 2;

    /// <summary>Of the TLB: checks that passed.</summary>
    public const int Hits = 1;

    /// <summary>Counts of a class.</summary>
    public const int OfClass = 3;

    /// <summary>Classes.</summary>
    public const int Classes = (int)AccessClass.KernelTlb + 1;

    /// <summary>Look-ups in the indirect-branch cache.</summary>
    public const int BranchProbes = Classes * OfClass;

    /// <summary>Those that did not find the target in its first place, or a request.</summary>
    public const int BranchMisses = BranchProbes + 1;

    /// <summary>All counts.</summary>
    public const int Count = BranchMisses + 1;
}

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
                sums[i] = sums[i] with { Value = sums[i].Value + more[i].Value, Of = sums[i].Of + more[i].Of };
            }
        }
    }

    private static List<VmStatistic> Of(SoftVcpu vcpu)
    {
        CpuContext* cpu = vcpu.Context;
        Translator? translator = vcpu.Translator;
        List<VmStatistic> all =
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
            new("exits-tail", vcpu.Leavings[(int)ExitKindOfCode.Tail]),
            new("exits-handler", vcpu.Leavings[SoftVcpu.ReasonHandler]),
            new("exits-interpret", vcpu.Leavings[SoftVcpu.ReasonInterpret]),
            new("blocks-interpreted", vcpu.Interpreted),
            new("blocks-interpreted-crossing", vcpu.InterpretedCrossing),
            new("handler-calls", TotalCalls(cpu)),
        ];
        if (translator is { CountsAccesses: true })
        {
            AddAccesses(cpu, all);
        }

        return all;
    }

    // SAFETY: the counts lie behind the context, and indices stay below their number.
    private static void AddAccesses(CpuContext* cpu, List<VmStatistic> all)
    {
        var first = (ulong*)((byte*)cpu + CpuContext.AccessCountsOffset);
        for (int i = 0; i < AccessCount.Classes; i++)
        {
            ulong* counts = first + (i * AccessCount.OfClass);
            string name = (AccessClass)i switch
            {
                AccessClass.UserStack => "user-stack",
                AccessClass.UserSite => "user-site",
                AccessClass.UserTlb => "user-tlb",
                AccessClass.KernelStack => "kernel-stack",
                AccessClass.KernelSite => "kernel-site",
                _ => "kernel-tlb",
            };
            var checks = (long)counts[AccessCount.Checks];
            bool isTlb = (AccessClass)i is AccessClass.UserTlb or AccessClass.KernelTlb;
            long hits = isTlb ? (long)counts[AccessCount.Hits] : checks - (long)counts[AccessCount.Misses];
            long slow = isTlb ? checks - hits : (long)counts[AccessCount.Slow];
            all.Add(new VmStatistic("hits-" + name, hits, checks));
            all.Add(new VmStatistic("slow-" + name, slow, checks));
        }

        var probes = (long)first[AccessCount.BranchProbes];
        all.Add(new VmStatistic("hits-branch", probes - (long)first[AccessCount.BranchMisses], probes));
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

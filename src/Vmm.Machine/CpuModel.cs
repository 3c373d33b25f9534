// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Vmm.Core;

namespace Vmm.Machine;

/// <summary>How a VM's processors are arranged.</summary>
/// <param name="Count">vCPUs in all.</param>
/// <param name="Sockets">Packages; divides <paramref name="Count"/>.</param>
/// <param name="Threads">Hardware threads per core; divides the vCPUs of a package.</param>
internal readonly record struct CpuTopology(int Count, int Sockets, int Threads)
{
    /// <summary>vCPUs per package.</summary>
    public int PerSocket => Count / Sockets;

    /// <summary>Bits of the APIC identifier below the package.</summary>
    public int SocketShift => Bits(PerSocket);

    /// <summary>Bits of the APIC identifier below the core.</summary>
    public int CoreShift => Bits(Threads);

    private static int Bits(int count) => count <= 1 ? 0 : 32 - System.Numerics.BitOperations.LeadingZeroCount((uint)count - 1);
}

// Theory. What CPUID shows a guest is computed in three steps: what the driver supports, minus what the chosen model does
// not have, plus what depends on the machine (identifiers, topology, which APIC features our own controllers add). A
// baseline model is a mask over feature words: a guest that was started on it finds the same features on every host
// whose driver has them all, which is what moving a VM needs. "host" and "max" mask nothing.
//
// Leaves that describe the host's caches and topology are rewritten, not passed through: a guest must not see how the
// host is built, and the numbers would be wrong for it. Performance counters (leaf 0xA) are hidden.

/// <summary>Computes the CPUID leaves of each vCPU.</summary>
internal sealed class CpuModel
{
    private const uint Leaf1EcxX2Apic = 1u << 21;
    private const uint Leaf1EcxTscDeadline = 1u << 24;
    private const uint Leaf1EcxOsxsave = 1u << 27;
    private const uint Leaf7EcxLa57 = 1u << 16;
    private const uint Leaf1EcxHypervisor = 1u << 31;
    private const uint Leaf1EdxApic = 1u << 9;
    private const uint Leaf1EdxHtt = 1u << 28;

    private readonly List<CpuidEntry> _base = [];
    private readonly CpuTopology _topology;
    private readonly bool _ownApic;
    private readonly bool _apicMsrs;
    private readonly uint _maxPhysicalBits;

    // Addresses of 57 bits go with 5-level paging, which a model may not have.
    private readonly uint _maxLinearBits = 48;

    /// <summary>Computes the common part.</summary>
    /// <param name="supported">The driver's leaves.</param>
    /// <param name="model">The model's row.</param>
    /// <param name="topology">How vCPUs are arranged.</param>
    /// <param name="ownApic">The local APICs are ours (User mode), which have x2APIC and TSC deadline.</param>
    /// <param name="apicMsrs">With own APICs: the driver passes the MSRs of both on.</param>
    /// <param name="maxPhysicalBits">The most physical address bits that a guest is told of.</param>
    public CpuModel(
        IReadOnlyList<CpuidEntry> supported,
        CpuModelRow model,
        CpuTopology topology,
        bool ownApic,
        bool apicMsrs,
        int maxPhysicalBits = 52)
    {
        _maxPhysicalBits = (uint)maxPhysicalBits;
        _topology = topology;
        _ownApic = ownApic;
        _apicMsrs = apicMsrs;
        foreach (CpuidEntry entry in supported)
        {
            if (entry.Function is 0xB or 0x1F or 0xA || (entry.Function is >= 0x40000000 and <= 0x4FFFFFFF && !model.IsOpen))
            {
                continue;
            }

            _base.Add(model.Apply(entry));
        }

        foreach (CpuidEntry entry in _base)
        {
            if (entry.Function == 1)
            {
                Signature = entry.Eax;
            }
            else if (entry.Function == 7 && entry.Index == 0 && (entry.Ecx & Leaf7EcxLa57) != 0)
            {
                _maxLinearBits = 57;
            }
        }
    }

    /// <summary>CPUID leaf 1's EAX: family, model, stepping.</summary>
    public uint Signature { get; }

    /// <summary>The leaves of one vCPU.</summary>
    public CpuidEntry[] For(int index)
    {
        var entries = new List<CpuidEntry>(_base.Count + 4);
        foreach (CpuidEntry entry in _base)
        {
            entries.Add(Personalise(entry, (uint)index));
        }

        // Extended topology (SDM 2A, CPUID leaf 0BH): thread level, core level, end.
        uint id = (uint)index;
        entries.Add(new CpuidEntry(0xB, 0, true, (uint)_topology.CoreShift, (uint)_topology.Threads, 1 << 8, id));
        entries.Add(new CpuidEntry(0xB, 1, true, (uint)_topology.SocketShift, (uint)_topology.PerSocket, (2 << 8) | 1, id));
        entries.Add(new CpuidEntry(0xB, 2, true, 0, 0, 2, id));
        return [.. entries];
    }

    private CpuidEntry Personalise(CpuidEntry entry, uint id)
    {
        uint perSocket = (uint)_topology.PerSocket;
        uint threads = (uint)_topology.Threads;
        switch (entry.Function)
        {
            case 0:
                return entry with { Eax = Math.Max(entry.Eax, 0xD) };
            case 1:
                uint ecx = (entry.Ecx | Leaf1EcxHypervisor) & ~Leaf1EcxOsxsave;
                if (_ownApic)
                {
                    const uint NeedMsrs = Leaf1EcxX2Apic | Leaf1EcxTscDeadline;
                    ecx = _apicMsrs ? ecx | NeedMsrs : ecx & ~NeedMsrs;
                }

                uint edx = (entry.Edx | Leaf1EdxApic) & ~Leaf1EdxHtt;
                uint ebx = (entry.Ebx & 0xFFFF) | (id << 24) | ((1u << _topology.SocketShift) << 16);
                return entry with { Ebx = ebx, Ecx = ecx, Edx = perSocket > 1 ? edx | Leaf1EdxHtt : edx };
            case 4:
                // Deterministic cache parameters: cores in the package, threads that share the cache.
                uint level = (entry.Eax >> 5) & 7;
                uint sharing = level == 3 ? (1u << _topology.SocketShift) - 1 : threads - 1;
                uint cores = (1u << (_topology.SocketShift - _topology.CoreShift)) - 1;
                return (entry.Eax & 0x1F) == 0
                    ? entry
                    : entry with { Eax = (entry.Eax & 0x3FFF) | (sharing << 14) | (cores << 26) };
            case 0x80000008:
                uint bits = Math.Min(entry.Eax & 0xFF, _maxPhysicalBits);
                uint linear = Math.Min((entry.Eax >> 8) & 0xFF, _maxLinearBits);
                return entry with
                {
                    Eax = (entry.Eax & ~0xFFFFu) | (linear << 8) | bits,
                    Ecx = (entry.Ecx & ~0xF0FFu) | ((uint)_topology.SocketShift << 12) | (perSocket - 1),
                };
            case 0x8000001D:
                uint amdLevel = (entry.Eax >> 5) & 7;
                uint amdSharing = amdLevel == 3 ? perSocket - 1 : threads - 1;
                return (entry.Eax & 0x1F) == 0 ? entry : entry with { Eax = (entry.Eax & 0x3FFF) | (amdSharing << 14) };
            case 0x8000001E:
                uint core = id >> _topology.CoreShift;
                return entry with { Eax = id, Ebx = core | ((threads - 1) << 8), Ecx = id >> _topology.SocketShift };
            default:
                return entry;
        }
    }
}

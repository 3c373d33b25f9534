// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Legacy;

/// <summary>Delivery modes of APIC messages (SDM 3A 11.6.1, 11.11.2).</summary>
public enum ApicDelivery : byte
{
    /// <summary>The vector, to all destinations.</summary>
    Fixed = 0,

    /// <summary>The vector, to the destination that runs at the lowest priority.</summary>
    LowestPriority = 1,

    /// <summary>System management interrupt; there is none here, and messages of this kind are counted and dropped.</summary>
    Smi = 2,

    /// <summary>Non-maskable interrupt.</summary>
    Nmi = 4,

    /// <summary>Processor reset.</summary>
    Init = 5,

    /// <summary>Start-up IPI.</summary>
    Startup = 6,

    /// <summary>As if from an 8259 pair.</summary>
    ExtInt = 7,
}

// Theory. The wire between local APICs, I/O APICs and devices that send messages. It holds the local APICs by
// identifier (dense, 0 to count - 1, so that physical destinations need no search) and works out who is meant:
//
//   physical          the APIC with that identifier; 0xFF (xAPIC, messages) or 0xFFFFFFFF (x2APIC IPIs) means all
//   logical, flat     LDR bits of the message's 8-bit set (SDM 3A 11.6.2.2)
//   logical, cluster  cluster number equal, and LDR bits of the set
//   logical, x2APIC   32 bits: cluster 31:16, set 15:0 (11.12.9)
//
// The matching itself is done by the destination, which knows in which mode it is. Lowest priority takes the matching
// APIC with the lowest processor priority; ties go round. With ExtendedDestinationId a message's address bits 11:5 are
// bits 14:8 of the destination (the 15-bit extension that hypervisors offer in CPUID 0x40000001), so that devices
// reach processors above 255 without interrupt remapping.
//
// No gate of its own: the table is complete before the machine runs.

/// <summary>Routes messages and IPIs to local APICs. See the theory at the top of this file.</summary>
public sealed class ApicBus : IMsiSink
{
    private readonly List<IEoiListener> _eoiListeners = [];
    private LocalApic[] _apics = [];
    private uint _turn;
    private long _unclaimed;

    /// <summary>Message address bits 11:5 extend the destination to 15 bits.</summary>
    public bool ExtendedDestinationId { get; init; }

    /// <summary>Messages that matched no APIC, and SMIs.</summary>
    public long Unclaimed => Interlocked.Read(ref _unclaimed);

    /// <summary>Number of local APICs.</summary>
    public int Count => _apics.Length;

    /// <summary>Adds an I/O APIC. Before the machine runs.</summary>
    public void AddEoiListener(IEoiListener listener) => _eoiListeners.Add(listener);

    /// <inheritdoc/>
    public void Send(ulong address, uint data)
    {
        uint destination = (uint)(address >> 12) & 0xFF;
        bool isBroadcast = destination == 0xFF;
        if (ExtendedDestinationId)
        {
            uint extension = (uint)(address >> 5) & 0x7F;
            destination |= extension << 8;
            isBroadcast &= extension == 0;
        }

        bool logical = (address & 4) != 0;
        var delivery = (ApicDelivery)((data >> 8) & 7);
        if ((address & 8) != 0 && logical && delivery == ApicDelivery.Fixed)
        {
            // Redirection hint: to one of the set (SDM 3A 11.11.1).
            delivery = ApicDelivery.LowestPriority;
        }

        bool level = (data & 0x8000) != 0;
        if (delivery == ApicDelivery.Init && level && (data & 0x4000) == 0)
        {
            return;
        }

        Deliver(destination, logical, isBroadcast, delivery, (byte)data, level);
    }

    internal void Register(LocalApic apic)
    {
        if (apic.Index != _apics.Length)
        {
            throw new ArgumentException("local APICs are made in the order of their identifiers", nameof(apic));
        }

        Array.Resize(ref _apics, _apics.Length + 1);
        _apics[^1] = apic;
    }

    /// <summary>An IPI with a shorthand: 2 all including self, 3 all but self (SDM 3A 11.6.1).</summary>
    internal void DeliverShorthand(LocalApic from, bool includeSelf, ApicDelivery delivery, byte vector)
    {
        foreach (LocalApic apic in _apics)
        {
            if (includeSelf || !ReferenceEquals(apic, from))
            {
                apic.Accept(delivery == ApicDelivery.LowestPriority ? ApicDelivery.Fixed : delivery, vector, false);
            }
        }
    }

    internal void Deliver(
        uint destination, bool logical, bool isBroadcast, ApicDelivery delivery, byte vector, bool level)
    {
        LocalApic[] apics = _apics;
        if (delivery == ApicDelivery.Smi)
        {
            Interlocked.Increment(ref _unclaimed);
            return;
        }

        if (!logical && !isBroadcast)
        {
            if (destination < (uint)apics.Length)
            {
                ApicDelivery one = delivery == ApicDelivery.LowestPriority ? ApicDelivery.Fixed : delivery;
                apics[destination].Accept(one, vector, level);
            }
            else
            {
                Interlocked.Increment(ref _unclaimed);
            }

            return;
        }

        bool anybody = false;
        if (delivery == ApicDelivery.LowestPriority)
        {
            uint first = Interlocked.Increment(ref _turn);
            LocalApic? best = null;
            int bestPriority = int.MaxValue;
            for (uint i = 0; i < apics.Length; i++)
            {
                LocalApic apic = apics[(first + i) % (uint)apics.Length];
                if ((isBroadcast || apic.MatchesLogical(destination)) && apic.IsSoftwareEnabled)
                {
                    int priority = apic.ArbitrationPriority;
                    if (priority < bestPriority)
                    {
                        best = apic;
                        bestPriority = priority;
                    }
                }
            }

            best?.Accept(ApicDelivery.Fixed, vector, level);
            anybody = best is not null;
        }
        else
        {
            foreach (LocalApic apic in apics)
            {
                if (isBroadcast || apic.MatchesLogical(destination))
                {
                    apic.Accept(delivery, vector, level);
                    anybody = true;
                }
            }
        }

        if (!anybody)
        {
            Interlocked.Increment(ref _unclaimed);
        }
    }

    /// <summary>A local APIC ended a level-triggered interrupt; its gate is not held.</summary>
    internal void BroadcastEoi(byte vector)
    {
        foreach (IEoiListener listener in _eoiListeners)
        {
            listener.EndOfInterrupt(vector);
        }
    }
}

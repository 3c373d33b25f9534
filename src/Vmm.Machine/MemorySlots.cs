// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Collections.Immutable;
using System.Threading;
using Vmm.Core;
using Vmm.Memory;

namespace Vmm.Machine;

/// <summary>
/// Keeps a driver's memory slots equal to the flat view of guest memory, with as few changes as possible: a range that is
/// the same in the old and the new view is not touched, so that running vCPUs lose nothing. Slots are removed before
/// others are added because drivers refuse overlaps.
/// </summary>
internal sealed class MemorySlots
{
    private readonly Lock _gate = new();
    private readonly IVm _vm;
    private readonly RamRange?[] _slots;
    private ulong[] _bitmap = [];
    private Table _current = new([]);

    /// <summary>Makes the table of a VM.</summary>
    public MemorySlots(IVm vm, int maxSlots)
    {
        _vm = vm;
        _slots = new RamRange?[Math.Min(maxSlots, 512)];
    }

    /// <summary>The slots as they are; another object after every change. Any thread.</summary>
    public Table Current => Volatile.Read(ref _current);

    /// <summary>Applies a new view.</summary>
    /// <exception cref="HypervisorException">The driver refused, or has too few slots.</exception>
    public void Apply(ImmutableArray<RamRange> view)
    {
        lock (_gate)
        {
            var wanted = new HashSet<RamRange>(view);
            for (int i = 0; i < _slots.Length; i++)
            {
                if (_slots[i] is { } old && !wanted.Remove(old))
                {
                    Collect(i, old);
                    _vm.SetMemorySlot(i, new MemorySlot(old.GuestAddress, 0, 0, false, false, 0));
                    _slots[i] = null;
                }
            }

            foreach (RamRange range in view)
            {
                if (!wanted.Contains(range))
                {
                    continue;
                }

                int free = Array.IndexOf(_slots, null);
                if (free < 0)
                {
                    throw new HypervisorException($"the driver has only {_slots.Length} memory slots");
                }

                _vm.SetMemorySlot(free, ToSlot(range));
                _slots[free] = range;
            }

            var slots = ImmutableArray.CreateBuilder<MemorySlot>();
            foreach (RamRange? range in _slots)
            {
                if (range is not null)
                {
                    slots.Add(ToSlot(range));
                }
            }

            Volatile.Write(ref _current, new Table(slots.ToImmutable()));
        }
    }

    /// <summary>Moves what the driver logged into the blocks' page flags.</summary>
    public void CollectDirty()
    {
        lock (_gate)
        {
            for (int i = 0; i < _slots.Length; i++)
            {
                if (_slots[i] is { LogDirty: true } range)
                {
                    Collect(i, range);
                }
            }
        }
    }

    private static MemorySlot ToSlot(RamRange range) => new(
        range.GuestAddress,
        range.LengthBytes,
        range.Block.HostAddress + (nint)range.Offset,
        range.ReadOnly,
        range.LogDirty,
        range.Block.PageFlagsAddress + (nint)(range.Offset / RamBlock.PageBytes));

    private void Collect(int slot, RamRange range)
    {
        if (!range.LogDirty)
        {
            return;
        }

        int words = (int)((range.LengthBytes / RamBlock.PageBytes) + 63) / 64;
        if (_bitmap.Length < words)
        {
            _bitmap = new ulong[words];
        }

        Span<ulong> bitmap = _bitmap.AsSpan(0, words);
        bitmap.Clear();
        if (_vm.ReadDirtyLog(slot, bitmap))
        {
            range.Block.MergeDirty(range.Offset / RamBlock.PageBytes, bitmap);
        }
    }

    /// <summary>All slots at one moment.</summary>
    /// <param name="Slots">In no particular order.</param>
    internal sealed record Table(ImmutableArray<MemorySlot> Slots);
}

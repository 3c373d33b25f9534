// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;

namespace Vmm.Core;

// Theory. A machine has two address maps: I/O ports (64 KiB) and memory-mapped registers (everything in
// guest-physical space that is not RAM). A map is an immutable sorted array of non-overlapping windows, replaced
// as a whole by Volatile.Write when a device maps or unmaps something. Readers (vCPU threads) take no lock: they
// load the array once and search it. A device that is unmapped may therefore see one more access that was already
// under way; devices accept accesses at any time, so that is harmless.
//
// The map hides three things from devices: absolute addresses (a window sees offsets), accesses that straddle the
// end of a window (they are split into bytes), and accesses that nobody claims (reads float high, writes vanish;
// both are counted). Windows may be stacked: the one with the higher priority wins where they overlap, which is how
// a PCI BAR that a guest moves over another device behaves in a defined way.
//
// It does not serialise devices: each has its own lock.

/// <summary>Access sizes of x86 I/O and memory-mapped I/O. The numeric value is the width in bytes.</summary>
public enum AccessWidth : byte
{
    /// <summary>8 bits.</summary>
    Byte = 1,

    /// <summary>16 bits.</summary>
    Word = 2,

    /// <summary>32 bits.</summary>
    Dword = 4,

    /// <summary>64 bits (memory-mapped only).</summary>
    Qword = 8,
}

/// <summary>
/// A bounded register file. The bus passes relative offsets and never calls with <c>offset + width &gt; Length</c>.
/// May be called from any vCPU thread, also concurrently; never throws on anything a guest can cause.
/// </summary>
public interface IRegisterWindow
{
    /// <summary>Size in bytes; constant over the life of the window.</summary>
    uint Length { get; }

    /// <summary>Reads <paramref name="width"/> bytes, zero-extended, little-endian.</summary>
    /// <param name="offset">Offset in bytes from the window's start.</param>
    /// <param name="width">Width of the access.</param>
    ulong Read(uint offset, AccessWidth width);

    /// <summary>Writes the low <paramref name="width"/> bytes of <paramref name="value"/>.</summary>
    /// <param name="offset">Offset in bytes from the window's start.</param>
    /// <param name="width">Width of the access.</param>
    /// <param name="value">The value; bits above the width are zero.</param>
    void Write(uint offset, AccessWidth width, ulong value);
}

/// <summary>A window at a place in an <see cref="AddressMap"/>; the token that unmaps it.</summary>
public sealed class AddressMapping
{
    internal AddressMapping(ulong start, IRegisterWindow window, int priority, uint windowOffset, ulong length)
    {
        Start = start;
        Window = window;
        Priority = priority;
        WindowOffset = windowOffset;
        Length = length;
    }

    /// <summary>First address.</summary>
    public ulong Start { get; }

    /// <summary>The registers.</summary>
    public IRegisterWindow Window { get; }

    /// <summary>Higher wins where mappings overlap.</summary>
    public int Priority { get; }

    /// <summary>Offset in the window that <see cref="Start"/> corresponds to.</summary>
    public uint WindowOffset { get; }

    /// <summary>Bytes mapped.</summary>
    public ulong Length { get; }
}

/// <summary>Maps addresses to register windows. Thread-safe; look-ups are lock-free.</summary>
public sealed class AddressMap
{
    private readonly Lock _gate = new();
    private readonly List<AddressMapping> _mappings = [];
    private readonly ulong _limit;
    private Range[] _ranges = [];
    private long _unclaimedReads;
    private long _unclaimedWrites;

    /// <summary>Makes an empty map.</summary>
    /// <param name="name">For diagnostics: "io" or "mmio".</param>
    /// <param name="limit">One past the last valid address; 0 means 2^64.</param>
    public AddressMap(string name, ulong limit)
    {
        Name = name;
        _limit = limit;
    }

    /// <summary>For diagnostics.</summary>
    public string Name { get; }

    /// <summary>One past the last valid address; 0 means 2^64.</summary>
    public ulong Limit => _limit;

    /// <summary>Accesses that no window claimed.</summary>
    public long UnclaimedReads => Interlocked.Read(ref _unclaimedReads);

    /// <summary>Accesses that no window claimed.</summary>
    public long UnclaimedWrites => Interlocked.Read(ref _unclaimedWrites);

    /// <summary>Makes a whole window visible at <paramref name="start"/>.</summary>
    /// <exception cref="ArgumentOutOfRangeException">The window does not fit below the map's limit.</exception>
    public AddressMapping Map(ulong start, IRegisterWindow window, int priority = 0)
    {
        ArgumentNullException.ThrowIfNull(window);
        return Map(start, window, 0, window.Length, priority);
    }

    /// <summary>Makes a part of a window visible at <paramref name="start"/>.</summary>
    /// <exception cref="ArgumentOutOfRangeException">The part lies outside the window or the map.</exception>
    public AddressMapping Map(ulong start, IRegisterWindow window, uint windowOffset, uint lengthBytes, int priority = 0)
    {
        ArgumentNullException.ThrowIfNull(window);
        ArgumentOutOfRangeException.ThrowIfZero(lengthBytes);
        if (windowOffset > window.Length || lengthBytes > window.Length - windowOffset)
        {
            throw new ArgumentOutOfRangeException(nameof(lengthBytes));
        }

        ulong last = start + lengthBytes - 1;
        if (last < start || (_limit != 0 && last >= _limit))
        {
            throw new ArgumentOutOfRangeException(nameof(start));
        }

        var mapping = new AddressMapping(start, window, priority, windowOffset, lengthBytes);
        lock (_gate)
        {
            _mappings.Add(mapping);
            Publish();
        }

        return mapping;
    }

    /// <summary>Removes a mapping; unknown ones are ignored so that teardown may run twice.</summary>
    public void Unmap(AddressMapping mapping)
    {
        lock (_gate)
        {
            if (_mappings.Remove(mapping))
            {
                Publish();
            }
        }
    }

    /// <summary>Finds the window at an address.</summary>
    /// <returns>False when nothing is mapped there.</returns>
    public bool TryFind(ulong address, out IRegisterWindow window, out uint offset)
    {
        Range[] ranges = Volatile.Read(ref _ranges);
        int index = Search(ranges, address);
        if (index < 0)
        {
            window = null!;
            offset = 0;
            return false;
        }

        ref readonly Range range = ref ranges[index];
        window = range.Window;
        offset = range.WindowOffset + (uint)(address - range.Start);
        return true;
    }

    /// <summary>Reads; unclaimed bytes read as ones, like a floating bus.</summary>
    public ulong Read(ulong address, AccessWidth width)
    {
        Range[] ranges = Volatile.Read(ref _ranges);
        int index = Search(ranges, address);
        if (index >= 0)
        {
            ref readonly Range range = ref ranges[index];
            ulong left = range.Last - address;
            if (left >= (uint)width - 1UL)
            {
                return range.Window.Read(range.WindowOffset + (uint)(address - range.Start), width);
            }
        }

        return ReadSplit(ranges, address, width);
    }

    /// <summary>Writes; unclaimed bytes vanish.</summary>
    public void Write(ulong address, AccessWidth width, ulong value)
    {
        Range[] ranges = Volatile.Read(ref _ranges);
        int index = Search(ranges, address);
        if (index >= 0)
        {
            ref readonly Range range = ref ranges[index];
            ulong left = range.Last - address;
            if (left >= (uint)width - 1UL)
            {
                range.Window.Write(range.WindowOffset + (uint)(address - range.Start), width, value);
                return;
            }
        }

        WriteSplit(ranges, address, width, value);
    }

    private static int Search(Range[] ranges, ulong address)
    {
        int low = 0;
        int high = ranges.Length - 1;
        while (low <= high)
        {
            int middle = (low + high) >>> 1;
            ref readonly Range range = ref ranges[middle];
            if (address < range.Start)
            {
                high = middle - 1;
            }
            else if (address > range.Last)
            {
                low = middle + 1;
            }
            else
            {
                return middle;
            }
        }

        return -1;
    }

    private ulong ReadSplit(Range[] ranges, ulong address, AccessWidth width)
    {
        ulong value = 0;
        bool unclaimed = false;
        for (int i = 0; i < (int)width; i++)
        {
            ulong at = address + (uint)i;
            int index = _limit == 0 || at < _limit ? Search(ranges, at) : -1;
            ulong part = 0xFF;
            if (index >= 0)
            {
                ref readonly Range range = ref ranges[index];
                part = range.Window.Read(range.WindowOffset + (uint)(at - range.Start), AccessWidth.Byte) & 0xFF;
            }
            else
            {
                unclaimed = true;
            }

            value |= part << (8 * i);
        }

        if (unclaimed)
        {
            Interlocked.Increment(ref _unclaimedReads);
        }

        return value;
    }

    private void WriteSplit(Range[] ranges, ulong address, AccessWidth width, ulong value)
    {
        bool unclaimed = false;
        for (int i = 0; i < (int)width; i++)
        {
            ulong at = address + (uint)i;
            int index = _limit == 0 || at < _limit ? Search(ranges, at) : -1;
            if (index >= 0)
            {
                ref readonly Range range = ref ranges[index];
                range.Window.Write(
                    range.WindowOffset + (uint)(at - range.Start), AccessWidth.Byte, (value >> (8 * i)) & 0xFF);
            }
            else
            {
                unclaimed = true;
            }
        }

        if (unclaimed)
        {
            Interlocked.Increment(ref _unclaimedWrites);
        }
    }

    // Called under the gate. Cuts every mapping at all borders and keeps, per piece, the winner: highest priority,
    // then the newest. Mappings are few (tens) and change rarely, so the quadratic cost does not matter.
    private void Publish()
    {
        var borders = new SortedSet<ulong>();
        foreach (AddressMapping mapping in _mappings)
        {
            borders.Add(mapping.Start);
            ulong end = mapping.Start + mapping.Length;
            if (end != 0)
            {
                borders.Add(end);
            }
        }

        var edges = new ulong[borders.Count];
        borders.CopyTo(edges);
        var pieces = new List<Range>(edges.Length);
        for (int i = 0; i < edges.Length; i++)
        {
            ulong start = edges[i];
            ulong last = i + 1 < edges.Length ? edges[i + 1] - 1 : ulong.MaxValue;
            AddressMapping? winner = null;
            foreach (AddressMapping mapping in _mappings)
            {
                bool covers = mapping.Start <= start && start - mapping.Start < mapping.Length;
                if (covers && (winner is null || mapping.Priority >= winner.Priority))
                {
                    winner = mapping;
                }
            }

            if (winner is not null)
            {
                uint offset = winner.WindowOffset + (uint)(start - winner.Start);
                pieces.Add(new Range(start, last, winner.Window, offset));
            }
        }

        Volatile.Write(ref _ranges, pieces.ToArray());
    }

    private readonly record struct Range(ulong Start, ulong Last, IRegisterWindow Window, uint WindowOffset);
}

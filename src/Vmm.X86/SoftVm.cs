// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Runtime.InteropServices;
using System.Threading;
using Vmm.Core;

namespace Vmm.X86;

/// <summary>A machine of the software processor. See <see cref="IVm"/>.</summary>
public sealed unsafe class SoftVm : IVm, IVmStatistics
{
    private readonly Lock _gate = new();
    private readonly SortedDictionary<int, MemorySlot> _slots = [];
    private readonly Dictionary<int, nint> _ownFlags = [];
    private readonly List<SoftVcpu> _vcpus = [];
    private bool _disposed;

    internal SoftVm(VmOptions options, long tscKhz, ThunkCache? thunks)
    {
        if (options.Irqchip != IrqchipMode.User)
        {
            throw new HypervisorException("the software processor has no interrupt controllers: use irqchip: user");
        }

        Ports = options.Ports;
        Mmio = options.Mmio;
        Clock = options.Clock;
        OnNumericError = options.OnNumericError;
        Thunks = thunks;
        TscKhz = tscKhz;
        Tsc = new TscSource(options.Clock, tscKhz, thunks);
        // SAFETY: these live until Dispose, which stops after the vCPUs, their only users.
        Shared = (VmShared*)NativeMemory.AllocZeroed((nuint)sizeof(VmShared));
        Shared->BusMask = ulong.MaxValue;
        Shared->CompareExchange16 = thunks is null ? 0 : thunks.AddRoutine(Wide.Routine);
        Shared->Code = (CodeInfo*)NativeMemory.AllocZeroed((nuint)sizeof(CodeInfo), VmShared.CodeEntries);
        Shared->Slots = (SlotTable*)NativeMemory.AllocZeroed((nuint)sizeof(SlotTable));
    }

    /// <inheritdoc/>
    public IrqchipMode Irqchip => IrqchipMode.User;

    internal AddressMap Ports { get; }

    internal AddressMap Mmio { get; }

    internal IClock Clock { get; }

    internal Action? OnNumericError { get; }

    /// <summary>Native forms of vector instructions; null when the host forbids generated code.</summary>
    internal ThunkCache? Thunks { get; }

    internal long TscKhz { get; }

    /// <summary>Time stamps of all vCPUs, before their offsets.</summary>
    internal TscSource Tsc { get; }

    /// <summary>Bytes for the translated blocks of each vCPU.</summary>
    internal int ArenaBytes { get; init; }

    /// <summary>vCPUs made from now on translate hot code.</summary>
    internal bool Translate { get; init; }

    /// <summary>Gets a line for each translated block.</summary>
    internal TextWriter? PerfMap { get; init; }

    /// <summary>Translated code counts its checks of memory operands.</summary>
    internal bool CountAccesses { get; init; }

    /// <summary>The same program does the same in each run.</summary>
    internal bool Deterministic { get; init; }

    /// <summary>Translated code counts instructions.</summary>
    internal bool CountInstructions { get; init; }

    internal VmShared* Shared { get; private set; }

    /// <summary>All vCPUs; replaced as a whole.</summary>
    internal SoftVcpu[] Vcpus { get; private set; } = [];

    /// <inheritdoc/>
    public void SetMemorySlot(int slot, in MemorySlot memory)
    {
        if (((memory.GuestAddress | memory.LengthBytes) & 0xFFF) != 0)
        {
            throw new HypervisorException("memory slot is not page-aligned");
        }

        SlotTable* old;
        nint oldFlags = 0;
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            if (_ownFlags.Remove(slot, out oldFlags) && memory.LengthBytes == 0)
            {
                // Freed below, when no vCPU can hold it any more.
            }

            if (memory.LengthBytes == 0)
            {
                _slots.Remove(slot);
            }
            else
            {
                MemorySlot kept = memory;
                if (memory.PageFlags == 0)
                {
                    // SAFETY: a byte for each page, in multiples of 8 for AtomicByte; freed when the slot is gone and
                    // no vCPU caches it.
                    nint own = (nint)NativeMemory.AllocZeroed((nuint)(((memory.LengthBytes >> 12) + 7) & ~7UL));
                    _ownFlags[slot] = own;
                    kept = memory with { PageFlags = own };
                }

                _slots[slot] = kept;
            }

            old = Shared->Slots;
            SlotTable* table = BuildTable();
            Volatile.Write(ref *(nint*)&Shared->Slots, (nint)table);
        }

        Quiesce();
        // SAFETY: every vCPU has flushed what it had from the old table, so nothing points into it or into the flags.
        NativeMemory.Free(old);
        NativeMemory.Free((void*)oldFlags);
    }

    /// <inheritdoc/>
    public IReadOnlyList<VmStatistic> ReadStatistics()
    {
        lock (_gate)
        {
            return Statistics.Read(_vcpus);
        }
    }

    /// <inheritdoc/>
    public bool ReadDirtyLog(int slot, Span<ulong> bitmap)
    {
        lock (_gate)
        {
            if (!_slots.TryGetValue(slot, out MemorySlot memory) || !memory.LogDirty)
            {
                return false;
            }

            bitmap.Clear();
            // SAFETY: the slot's owner keeps a byte for each of its pages; i stays below their number.
            byte* flags = (byte*)memory.PageFlags;
            ulong pages = memory.LengthBytes >> 12;
            for (ulong i = 0; i < pages && i < (ulong)bitmap.Length * 64; i++)
            {
                if ((flags[i] & (byte)Memory.PageFlags.DirtySnapshot) != 0)
                {
                    AtomicByte.And(flags + i, (byte)~Memory.PageFlags.DirtySnapshot);
                    bitmap[(int)(i >> 6)] |= 1UL << (int)(i & 63);
                }
            }

            return true;
        }
    }

    /// <summary>
    /// Tells that somebody other than a vCPU has written to guest memory whose page flags have
    /// <see cref="Memory.PageFlags.Code"/> set. Any thread.
    /// </summary>
    public void NotifyCodeWritten(ulong guestAddress, ulong lengthBytes)
    {
        lock (_gate)
        {
            foreach (MemorySlot slot in _slots.Values)
            {
                ulong first = Math.Max(guestAddress, slot.GuestAddress);
                ulong end = Math.Min(guestAddress + lengthBytes, slot.GuestAddress + slot.LengthBytes);
                while (first < end)
                {
                    ulong offset = first - slot.GuestAddress;
                    int length = (int)Math.Min(end - first, 4096 - (offset & 0xFFF));
                    // SAFETY: first lies in the slot, so offset is below its length, and length ends with the page.
                    byte* host = (byte*)slot.HostAddress + offset;
                    CodePages.Invalidate(
                        Shared, CodePages.Info(Shared, host), host, (byte*)slot.PageFlags + (offset >> 12), length);
                    first += (uint)length;
                }
            }
        }
    }

    /// <inheritdoc/>
    public IVcpu CreateVcpu(int index, ICpuInterruptPort? interrupts)
    {
        ArgumentNullException.ThrowIfNull(interrupts);
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            var vcpu = new SoftVcpu(this, index, interrupts);
            _vcpus.Add(vcpu);
            Vcpus = _vcpus.ToArray();
            if (_vcpus.Count <= VmShared.MaxVcpus)
            {
                Shared->Contexts[_vcpus.Count - 1] = (ulong)vcpu.Context;
            }

            Shared->Vcpus = _vcpus.Count;
            return vcpu;
        }
    }

    /// <inheritdoc/>
    public void SetIrqLine(uint gsi, bool asserted)
    {
    }

    /// <inheritdoc/>
    public void SendMsi(ulong address, uint data)
    {
    }

    /// <inheritdoc/>
    public void SetA20(bool isOpen)
    {
        ulong mask = isOpen ? ulong.MaxValue : ~(1UL << 20);
        lock (_gate)
        {
            if (_disposed || Interlocked.Exchange(ref Shared->BusMask, mask) == mask)
            {
                return;
            }
        }

        // Cached translations hold addresses behind the mask.
        Quiesce();
    }

    /// <inheritdoc/>
    public bool TryAddDoorbell(ulong address, bool isPort, AccessWidth width, ulong? dataMatch, int eventFd) => false;

    /// <inheritdoc/>
    public void RemoveDoorbell(ulong address, bool isPort, AccessWidth width, ulong? dataMatch, int eventFd)
    {
    }

    /// <inheritdoc/>
    public void SaveIrqchip(StateWriter writer)
    {
    }

    /// <inheritdoc/>
    public void LoadIrqchip(StateReader reader)
    {
    }

    /// <summary>Frees everything. No vCPU may be running.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            if (_disposed)
            {
                return;
            }

            _disposed = true;
            foreach (SoftVcpu vcpu in _vcpus)
            {
                vcpu.Dispose();
            }

            foreach (nint flags in _ownFlags.Values)
            {
                // SAFETY: allocated by SetMemorySlot; the vCPUs are disposed.
                NativeMemory.Free((void*)flags);
            }

            NativeMemory.Free(Shared->Slots);
            NativeMemory.Free(Shared->Code);
            NativeMemory.Free(Shared);
            Shared = null;
        }
    }

    private SlotTable* BuildTable()
    {
        var sorted = new List<MemorySlot>(_slots.Values);
        sorted.Sort((a, b) => a.GuestAddress.CompareTo(b.GuestAddress));
        // SAFETY: room for as many entries as the loop writes.
        var table = (SlotTable*)NativeMemory.AllocZeroed(
            (nuint)sizeof(SlotTable) + (nuint)(sorted.Count * sizeof(SlotInfo)));
        table->Count = sorted.Count;
        for (int i = 0; i < sorted.Count; i++)
        {
            *SlotTable.At(table, i) = new SlotInfo
            {
                Start = sorted[i].GuestAddress,
                Length = sorted[i].LengthBytes,
                Host = (byte*)sorted[i].HostAddress,
                PageFlags = (byte*)sorted[i].PageFlags,
                ReadOnly = sorted[i].ReadOnly,
                LogDirty = sorted[i].LogDirty,
            };
        }

        return table;
    }

    /// <summary>A vCPU goes away: nobody may ask it to look any more.</summary>
    internal void Forget(SoftVcpu vcpu)
    {
        lock (_gate)
        {
            for (int i = 0; Shared != null && i < VmShared.MaxVcpus; i++)
            {
                if (Shared->Contexts[i] == (ulong)vcpu.Context)
                {
                    Volatile.Write(ref Shared->Contexts[i], 0);
                }
            }
        }
    }

    // Waits until no vCPU can use what it cached before. A vCPU that is outside Run or in a device counts as safe: it
    // sees the request before it touches guest memory again. The caller may itself be a vCPU in a device.
    private void Quiesce()
    {
        SoftVcpu[] vcpus;
        lock (_gate)
        {
            // A machine that is being taken apart unmaps its cards after its vCPUs have gone.
            vcpus = _vcpus.FindAll(static vcpu => !vcpu.IsDisposed).ToArray();
        }

        foreach (SoftVcpu vcpu in vcpus)
        {
            vcpu.RequestFlush();
        }

        foreach (SoftVcpu vcpu in vcpus)
        {
            var spin = default(SpinWait);
            while (!vcpu.HasFlushed)
            {
                spin.SpinOnce();
            }
        }
    }
}

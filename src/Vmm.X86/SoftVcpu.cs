// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Threading;
using Vmm.Core;

namespace Vmm.X86;

/// <summary>A virtual processor in software. See <see cref="IVcpu"/>.</summary>
public sealed unsafe partial class SoftVcpu : IVcpu
{
    private readonly ICpuInterruptPort _interrupts;
    private CpuidEntry[] _cpuid = [];
    private CpuContext* _cpu;
    private GCHandle _handle;
    private bool _pending;
    private byte _pendingVector;
    private byte _pendingType;
    private bool _pendingHasError;
    private uint _pendingError;
    private TscLine _tsc;

    internal SoftVcpu(SoftVm vm, int index, ICpuInterruptPort interrupts)
    {
        Vm = vm;
        Index = index;
        _interrupts = interrupts;
        _handle = GCHandle.Alloc(this);
        _cpu = (CpuContext*)Allocate<byte>(CpuContext.TotalBytes, 4096);
        _cpu->Self = _cpu;
        _cpu->OwnerHandle = GCHandle.ToIntPtr(_handle);
        _cpu->Shared = vm.Shared;
        _cpu->CountLimit = long.MaxValue;
        VectorUnit.Initialise(_cpu);
        _cpu->Tlbs = (TlbEntry*)((byte*)_cpu + CpuContext.TlbOffset);
        _cpu->Blocks.BranchKeys = (BranchKey*)((byte*)_cpu + CpuContext.BranchKeysOffset);
        _cpu->Blocks.BranchTargets = (BranchTarget*)((byte*)_cpu + CpuContext.BranchTargetsOffset);
        _cpu->Blocks.FarLinks = (FarLink*)NativeMemory.AllocZeroed(BlockCache.MaxFarLinks, (nuint)sizeof(FarLink));
        _cpu->Blocks.FarHeads = Allocate<int>(BlockCache.FarLists, 64);
        _cpu->Blocks.BranchPages = Allocate<ulong>(BlockCache.BranchPageWords, 64);
        _cpu->HandlerCalls = Allocate<long>(Statistics.Codes, 64);
        _cpu->PcidAsids = Allocate<ushort>(Asids.Pcids, 64);
        _cpu->Blocks.Jumps = Allocate<JumpEntry>(BlockCache.Rows * BlockCache.RowEntries, 64);
        _cpu->Blocks.Hash = (Block**)NativeMemory.AllocZeroed(BlockCache.Buckets, (nuint)sizeof(Block*));
        // SAFETY: BlockCache hands out at most so much of it; Dispose frees it with everything else that is allocated here.
        _cpu->Blocks.ArenaBytes = BlockCache.BytesOfCodeByte * (long)vm.ArenaBytes;
        _cpu->Blocks.Arena = (byte*)NativeMemory.AlignedAlloc((nuint)_cpu->Blocks.ArenaBytes, 64);
        _cpu->Safe = 1;
        SetCpuid(CpuidTable.Build(vm.Thunks is not null).ToArray());
        OpenTranslator();
        PowerOn();
    }

    /// <inheritdoc/>
    public int Index { get; }

    internal SoftVm Vm { get; }

    internal CpuContext* Context => _cpu;

    internal ICpuInterruptPort InterruptPort => _interrupts;

    internal bool IsDisposed => _cpu == null;

    internal bool HasFlushed =>
        (Volatile.Read(ref _cpu->Request) & RequestBits.FlushAll) == 0 || Volatile.Read(ref _cpu->Safe) != 0;

    /// <inheritdoc/>
    public void Kick() => Interlocked.Or(ref _cpu->Request, RequestBits.Kick);

    /// <inheritdoc/>
    public void SetCpuid(ReadOnlySpan<CpuidEntry> entries)
    {
        _cpuid = entries.ToArray();
        _cpu->LastCpuid.Forget();
        _cpu->Features = CpuidTable.Features(FindCpuid);
        uint sizes = FindCpuid(0x80000008, 0).Eax;
        int bits = (int)(sizes & 0xFF);
        _cpu->PhysicalBits = bits is >= 32 and <= 52 ? bits : 36;
        _cpu->PhysicalMask = (1UL << _cpu->PhysicalBits) - 1;
        ResetOffered();
        _traits?.Clear();
        Paging.FlushAll(_cpu);
    }

    /// <summary>A CPUID leaf; all zero when there is none.</summary>
    internal CpuidEntry FindCpuid(uint function, uint index)
    {
        foreach (ref readonly CpuidEntry entry in _cpuid.AsSpan())
        {
            if (entry.Function == function && (!entry.HasIndex || entry.Index == index))
            {
                return entry;
            }
        }

        return default;
    }

    /// <summary>The time stamp counter: guest time at the stated frequency plus this vCPU's offset. Its thread only.</summary>
    internal ulong ReadTsc()
    {
        ulong value = Vm.Tsc.Read(ref _tsc) + _cpu->Msr.TscOffset;

        // Generated code goes on with the line where RDTSC is permitted to everybody.
        _cpu->Tsc = _tsc;
        _cpu->Tsc.Value += _cpu->Msr.TscOffset;
        _cpu->Tsc.Limit = (_cpu->Cr4 & Cr4.Tsd) == 0 ? _tsc.Limit : 0;
        return value;
    }

    /// <summary>Adds to the time stamp counter, modulo 2^64. Its thread, or while it rests.</summary>
    internal void MoveTsc(ulong ticks)
    {
        _cpu->Msr.TscOffset = unchecked(_cpu->Msr.TscOffset + ticks);
        ForgetTsc(_cpu);
        _interrupts.SetTscOffset(_cpu->Msr.TscOffset);
    }

    /// <summary>The same by the clock alone: for a machine that stands still.</summary>
    internal ulong ReadTscAtRest() => Vm.Tsc.AtClock() + _cpu->Msr.TscOffset;

    /// <summary>Generated code asks again: offset or permission have changed, or time stood still.</summary>
    internal static void ForgetTsc(CpuContext* cpu) => cpu->Tsc.Limit = 0;

    /// <summary>Frees the state. Not while Run executes.</summary>
    public void Dispose()
    {
        if (_cpu == null)
        {
            return;
        }

        Vm.Forget(this);
        CloseTranslator();

        // SAFETY: all of these come from Allocate or AlignedAlloc in the constructor; SoftVm disposes a vCPU once,
        // when no thread is in Run.
        NativeMemory.AlignedFree(_cpu->HandlerCalls);
        NativeMemory.AlignedFree(_cpu->PcidAsids);
        NativeMemory.AlignedFree(_cpu->Blocks.Jumps);
        NativeMemory.Free(_cpu->Blocks.Hash);
        NativeMemory.Free(_cpu->Blocks.FarLinks);
        NativeMemory.AlignedFree(_cpu->Blocks.FarHeads);
        NativeMemory.AlignedFree(_cpu->Blocks.BranchPages);
        NativeMemory.AlignedFree(_cpu->Blocks.Arena);
        NativeMemory.AlignedFree(_cpu);
        _cpu = null;
        _handle.Free();
    }

    /// <summary>The vCPU that owns a context.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    internal static SoftVcpu From(CpuContext* cpu) =>
        Unsafe.As<SoftVcpu>(GCHandle.FromIntPtr(cpu->OwnerHandle).Target!);

    internal void RequestFlush() => Interlocked.Or(ref _cpu->Request, RequestBits.FlushAll);

    /// <summary>Memory slots changed: forget every host pointer.</summary>
    internal void FlushRequested()
    {
        // Cleared first: a request that comes in between causes one more flush. The slot table's pointer is read
        // anew by every access, so nothing else is cached.
        Interlocked.And(ref _cpu->Request, ~RequestBits.FlushAll);
        Paging.FlushAll(_cpu);
        _cpu->Blocks.ForgetAll();
        _cpu->BlocksStale = 1;
        Interlocked.Or(ref _cpu->Request, RequestBits.Look);
    }

    internal ulong MmioRead(ulong physical, AccessWidth width)
    {
        if ((physical & ~Mem.PageOffset) == _cpu->ApicPage)
        {
            uint offset = (uint)(physical & Mem.PageOffset);
            return _interrupts.Registers.Read(offset, width);
        }

        return Vm.Mmio.Read(physical, width);
    }

    internal void MmioWrite(ulong physical, AccessWidth width, ulong value)
    {
        if ((physical & ~Mem.PageOffset) == _cpu->ApicPage)
        {
            uint offset = (uint)(physical & Mem.PageOffset);
            _interrupts.Registers.Write(offset, width, value);

            // EOI, TPR and self-IPIs may make something deliverable.
            _cpu->InterruptHint = 1;
            Interlocked.Or(ref _cpu->Request, RequestBits.Look);
            return;
        }

        Vm.Mmio.Write(physical, width, value);
    }

    private static T* Allocate<T>(int count, nuint alignment)
        where T : unmanaged
    {
        nuint bytes = (nuint)sizeof(T) * (nuint)count;
        // SAFETY: cleared to its full size, and count elements long, which is the bound that the users' constants
        // state.
        void* memory = NativeMemory.AlignedAlloc(bytes, alignment);
        NativeMemory.Clear(memory, bytes);
        return (T*)memory;
    }
}

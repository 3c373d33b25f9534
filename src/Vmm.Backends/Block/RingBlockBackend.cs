// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Threading;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Block;

// Theory. A raw disk on Linux. Five ways, the shortest that fits:
//
//   a read of what the host has in its page cache is copied at once, on the caller's thread, when the request allows it
//   (RWF_NOWAIT: the kernel gives up where it would have to wait), so that it costs neither a thread nor a switch;
//   a write that need not be stable is a copy into that cache, and is made at once as well. The host may make it wait all
//   the same (too many dirty pages, a part of a page to read first); after one that took long, writes go into the ring
//   for a while, where they wait beside each other;
//   of large transfers with others behind them, as many as there are processors besides the caller's go to threads, since
//   copying them takes longer than waking a thread, and the caller copies the next one meanwhile;
//   other transfers and syncs go into an io_uring, whose completions one thread takes in batches;
//   everything else (buffers of this process, discards, a full ring) goes to the threads of ThreadedBlockBackend, which
//   also serves formats that are not raw, other systems, and hosts that forbid io_uring.
//
// A transfer that comes back short is continued from where it stopped; a read past the end of the file gives zeroes. A
// write with Force Unit Access is a write and then a sync. A sync that failed once fails for good (BlockFile says why).
//
// Locks: _gate guards the table of requests in the ring. The kernel is entered under IoUring's own gate, after _gate.

/// <summary>Serves a raw image with io_uring. Thread-safe.</summary>
public sealed class RingBlockBackend : IBlockBackend
{
    private const int Slots = 256;
    private const int PollMs = 5;
    private const int SlowWriteMs = 1;
    private const int SlowWritePauseMs = 50;
    private const int MaxInlineWriteBytes = 1 << 20;
    private const int MinParallelBytes = 128 << 10;
    private const ulong StopTag = ulong.MaxValue;

    private readonly object _gate = new();
    private readonly Slot[] _slots = new Slot[Slots];
    private readonly Stack<int> _free = new(Slots);
    private readonly ThreadedBlockBackend _threads;
    private readonly IoUring _ring;
    private readonly BlockFile _file;
    private readonly BlockCacheMode _cache;
    private readonly Thread _completer;
    private readonly ManualResetEventSlim _stop = new();
    private readonly int _parallel = Math.Min(Environment.ProcessorCount - 1, 3);
    private bool _stopping;
    private long _slowWriteUntil;
    private long _inlineReads;
    private long _inlineWrites;
    private long _ringRequests;
    private long _parallelRequests;

    private RingBlockBackend(RawImage image, string name, BlockBackendOptions options, IoUring ring)
    {
        _ring = ring;
        _file = image.File;
        _cache = options.Cache;
        _threads = new ThreadedBlockBackend(image, name, options);
        for (int i = Slots - 1; i >= 0; i--)
        {
            _free.Push(i);
        }

        _completer = new Thread(Complete) { Name = name + "-ring", IsBackground = true };
        _completer.Start();
    }

    /// <summary>Reads that were served from the page cache on the caller's thread.</summary>
    public long InlineReads => Interlocked.Read(ref _inlineReads);

    /// <summary>Writes that were copied into the page cache on the caller's thread.</summary>
    public long InlineWrites => Interlocked.Read(ref _inlineWrites);

    /// <summary>Large requests that a thread moved beside the caller.</summary>
    public long ParallelRequests => Interlocked.Read(ref _parallelRequests);

    /// <summary>Requests that went through the ring.</summary>
    public long RingRequests => Interlocked.Read(ref _ringRequests);

    /// <inheritdoc/>
    public long LengthBytes => _threads.LengthBytes;

    /// <inheritdoc/>
    public int BlockBytes => _threads.BlockBytes;

    /// <inheritdoc/>
    public bool IsReadOnly => _threads.IsReadOnly;

    /// <inheritdoc/>
    public bool CanDiscard => _threads.CanDiscard;

    /// <summary>Serves an image in the best way that this host has.</summary>
    /// <param name="image">The image; disposed with the back end.</param>
    /// <param name="name">For thread names: "disk0".</param>
    /// <param name="options">How.</param>
    public static IBlockBackend Open(BlockImage image, string name, BlockBackendOptions options)
    {
        ArgumentNullException.ThrowIfNull(image);
        ArgumentNullException.ThrowIfNull(options);
        bool isLimited = options.BytesPerSecond > 0 || options.RequestsPerSecond > 0;
        return image is RawImage raw && !isLimited && IoUring.TryOpen(Slots) is { } ring
            ? new RingBlockBackend(raw, name, options, ring)
            : new ThreadedBlockBackend(image, name, options);
    }

    /// <inheritdoc/>
    public void Submit(BlockRequest request)
    {
        ArgumentNullException.ThrowIfNull(request);
        if (!Fits(request))
        {
            _threads.Submit(request); // which answers what is wrong, too
            return;
        }

        if (request is { HasFollowers: true, LengthBytes: >= MinParallelBytes, Operation: not BlockOperation.Flush }
            && _threads.Pending < _parallel)
        {
            Interlocked.Increment(ref _parallelRequests);
            _threads.Submit(request);
            return;
        }

        if (request is { Operation: BlockOperation.Read, MayCompleteInline: true }
            && _file.TryReadCached(request.OffsetBytes, IoBuffer.Of(request)))
        {
            Interlocked.Increment(ref _inlineReads);
            request.Complete(BlockStatus.Ok);
            return;
        }

        if (MayWriteInline(request))
        {
            WriteInline(request);
            return;
        }

        int index;
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_stopping, this);
            index = _free.TryPop(out int free) ? free : -1;
            if (index >= 0)
            {
                _slots[index] = new Slot { Request = request, Operation = OperationOf(request) };
            }
        }

        if (index < 0)
        {
            _threads.Submit(request);
        }
        else if (Start(index))
        {
            Interlocked.Increment(ref _ringRequests);
        }
        else
        {
            Free(index);
            _threads.Submit(request);
        }
    }

    /// <inheritdoc/>
    public void Drain()
    {
        lock (_gate)
        {
            while (_free.Count < Slots)
            {
                Monitor.Wait(_gate);
            }
        }

        _threads.Drain();
    }

    /// <summary>Finishes what was submitted, stops, flushes and closes the image.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            if (_stopping)
            {
                return;
            }

            _stopping = true;
        }

        Drain();
        _ = _ring.TrySubmit(RingOperation.Nothing, _file.Handle, 0, default, 0, StopTag);
        _stop.Set();
        _completer.Join();
        _stop.Dispose();
        _ring.Dispose();
        _threads.Dispose();
    }

    private static RingOperation OperationOf(BlockRequest request) => request.Operation switch
    {
        BlockOperation.Read => RingOperation.Read,
        BlockOperation.Write => RingOperation.Write,
        _ => RingOperation.Sync,
    };

    private bool Fits(BlockRequest request)
    {
        if (request.Operation == BlockOperation.Flush)
        {
            return !IsReadOnly && _cache != BlockCacheMode.Unsafe;
        }

        long offset = request.OffsetBytes;
        long length = request.LengthBytes;
        return request.SliceCount > 0
            && (request.Operation == BlockOperation.Read || (request.Operation == BlockOperation.Write && !IsReadOnly))
            && ((offset | length) & 511) == 0 && offset >= 0 && length > 0 && offset <= LengthBytes
            && length <= LengthBytes - offset && IoBuffer.Of(request).Length == length;
    }

    private bool MayWriteInline(BlockRequest request) =>
        request is { Operation: BlockOperation.Write, MayCompleteInline: true, LengthBytes: <= MaxInlineWriteBytes }
        && (_cache == BlockCacheMode.Unsafe || (_cache == BlockCacheMode.WriteBack && !request.ForceUnitAccess))
        && Environment.TickCount64 >= Volatile.Read(ref _slowWriteUntil);

    private void WriteInline(BlockRequest request)
    {
        long start = Stopwatch.GetTimestamp();
        BlockStatus status = _file.Write(request.OffsetBytes, IoBuffer.Of(request));
        if (Stopwatch.GetElapsedTime(start).TotalMilliseconds > SlowWriteMs)
        {
            Volatile.Write(ref _slowWriteUntil, Environment.TickCount64 + SlowWritePauseMs);
        }

        Interlocked.Increment(ref _inlineWrites);
        request.Complete(status);
    }

    private bool Start(int index)
    {
        Slot slot = _slots[index];
        BlockRequest request = slot.Request!;
        IoBuffer data = slot.Operation == RingOperation.Sync ? default : IoBuffer.Of(request);
        return _ring.TrySubmit(slot.Operation, _file.Handle, request.OffsetBytes, data, slot.Done, (ulong)index);
    }

    private void Free(int index)
    {
        lock (_gate)
        {
            _slots[index] = default;
            _free.Push(index);
            if (_free.Count == Slots)
            {
                Monitor.PulseAll(_gate);
            }
        }
    }

    private void Complete()
    {
        Span<RingCompletion> completions = stackalloc RingCompletion[64];
        for (; ; )
        {
            int count = _ring.Wait(completions);
            if (count < 0 && _stop.Wait(PollMs))
            {
                return; // a filter of system calls came down on us: what is under way still completes, and is polled for
            }

            for (int i = 0; i < count; i++)
            {
                if (completions[i].Tag == StopTag)
                {
                    return;
                }

                Advance((int)completions[i].Tag, completions[i].Result);
            }
        }
    }

    // The slot belongs to this thread from its completion on until it is started again.
    private void Advance(int index, int result)
    {
        ref Slot slot = ref _slots[index];
        BlockRequest request = slot.Request!;
        if (BlockFile.IsTransient(result))
        {
            Restart(index);
            return;
        }

        BlockStatus status = BlockStatus.Ok;
        if (result < 0)
        {
            status = _file.Fail(slot.Operation, -result);
        }
        else if (slot.Operation != RingOperation.Sync)
        {
            slot.Done += result;
            if (result == 0 && slot.Operation == RingOperation.Read)
            {
                IoBuffer data = IoBuffer.Of(request);
                data.Slice(slot.Done, data.Length - slot.Done).Clear();
                slot.Done = data.Length;
            }
            else if (result == 0)
            {
                status = BlockStatus.NoSpace;
            }

            if (status == BlockStatus.Ok && slot.Done < request.LengthBytes)
            {
                Restart(index);
                return;
            }

            bool isForced = slot.Operation == RingOperation.Write && _cache != BlockCacheMode.Unsafe
                && (request.ForceUnitAccess || _cache == BlockCacheMode.WriteThrough);
            if (status == BlockStatus.Ok && isForced)
            {
                slot.Operation = RingOperation.Sync;
                Restart(index);
                return;
            }
        }
        else if (_file.HasSyncFailed)
        {
            status = BlockStatus.IoError;
        }

        // First the answer, then the slot: Drain means that everything has been answered.
        request.Complete(status);
        Free(index);
    }

    // The kernel took it once and has room again soon.
    private void Restart(int index)
    {
        while (!Start(index))
        {
            Thread.Yield();
        }
    }

    private struct Slot
    {
        public BlockRequest? Request;
        public RingOperation Operation;
        public long Done;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Block;

// Theory. Requests wait in one queue; a few threads take them, run them on the image and complete them. Submit takes
// only the queue's lock, so it never blocks on a disk. Completions are delivered one at a time under a lock of their
// own: a device sees them as if from one thread. The order of locks is completion lock -> device lock -> queue lock,
// and Submit takes only the last, so a device may submit from inside Complete.
//
// A flush needs no barrier between the threads. It promises stability for what completed before it was submitted, and
// such requests are past their call to the host.
//
// Threads start when the first requests need them, so that an idle CD costs nothing. Pausing a machine is Drain: it
// waits until the count of requests in the queue and in hands is 0.

/// <summary>When a write that has completed is stable.</summary>
public enum BlockCacheMode
{
    /// <summary>After the next flush, or at once with FUA.</summary>
    WriteBack,

    /// <summary>Always.</summary>
    WriteThrough,

    /// <summary>Never: flushes are ignored, which is fast and loses data when the host goes down.</summary>
    Unsafe,
}

/// <summary>How a disk is to be served.</summary>
public sealed record BlockBackendOptions
{
    /// <summary>Most threads, 1..64.</summary>
    public int MaxThreads { get; init; } = 4;

    /// <summary>Stability of writes.</summary>
    public BlockCacheMode Cache { get; init; }

    /// <summary>The guest may give space back; false keeps everything allocated.</summary>
    public bool AllowDiscard { get; init; } = true;

    /// <summary>Most bytes moved in a second, 0 for no limit.</summary>
    public long BytesPerSecond { get; init; }

    /// <summary>Most requests in a second, 0 for no limit.</summary>
    public long RequestsPerSecond { get; init; }
}

/// <summary>Runs an image's synchronous calls on worker threads of its own.</summary>
public sealed class ThreadedBlockBackend : IBlockBackend
{
    // A limit may be exceeded for so long after a quiet time.
    private const long BurstMs = 100;

    private readonly Lock _completionGate = new();
    private readonly object _gate = new();
    private readonly Queue<BlockRequest> _queue = new();
    private readonly List<Thread> _threads = [];
    private readonly BlockBackendOptions _options;
    private readonly ManualResetEventSlim _stop = new();
    private double _busyUntilMs;
    private readonly string _name;
    private int _idle;
    private int _pending;
    private int _draining;
    private bool _stopping;
    private long _failures;

    /// <summary>Starts serving an image.</summary>
    /// <param name="image">The image; disposed with the back end.</param>
    /// <param name="name">For thread names: "disk0".</param>
    /// <param name="options">How; null for the usual way.</param>
    public ThreadedBlockBackend(BlockImage image, string name, BlockBackendOptions? options = null)
    {
        ArgumentNullException.ThrowIfNull(image);
        _options = options ?? new BlockBackendOptions();
        if (_options.MaxThreads is < 1 or > 64 || _options.BytesPerSecond < 0 || _options.RequestsPerSecond < 0)
        {
            throw new ArgumentOutOfRangeException(nameof(options));
        }

        Image = image;
        _name = name;
    }

    /// <summary>The image underneath.</summary>
    public BlockImage Image { get; }

    /// <summary>Requests that were submitted and not yet answered. A hint: it changes at any time.</summary>
    public int Pending => Volatile.Read(ref _pending);

    /// <summary>Requests that ended in an error.</summary>
    public long Failures => Interlocked.Read(ref _failures);

    /// <inheritdoc/>
    public long LengthBytes => Image.LengthBytes;

    /// <inheritdoc/>
    public int BlockBytes => Image.BlockBytes;

    /// <inheritdoc/>
    public bool IsReadOnly => Image.IsReadOnly;

    /// <inheritdoc/>
    public bool CanDiscard => Image.CanDiscard && _options.AllowDiscard;

    /// <inheritdoc/>
    public void Submit(BlockRequest request)
    {
        ArgumentNullException.ThrowIfNull(request);
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_stopping, this);
            _pending++;
            _queue.Enqueue(request);
            if (_idle >= _queue.Count || _threads.Count >= _options.MaxThreads)
            {
                // A single pulse could go to a thread in Drain, which waits on the same monitor.
                if (_draining > 0)
                {
                    Monitor.PulseAll(_gate);
                }
                else
                {
                    Monitor.Pulse(_gate);
                }

                return;
            }

            var thread = new Thread(Work)
            {
                Name = $"{_name}-io{_threads.Count}",
                IsBackground = true,
            };
            _threads.Add(thread);
            thread.Start();
        }
    }

    /// <inheritdoc/>
    public void Drain()
    {
        lock (_gate)
        {
            _draining++;
            while (_pending > 0)
            {
                Monitor.Wait(_gate);
            }

            _draining--;
        }
    }

    /// <summary>Finishes what was submitted, stops the threads, flushes and closes the image.</summary>
    public void Dispose()
    {
        Thread[] threads;
        lock (_gate)
        {
            if (_stopping)
            {
                return;
            }

            _stopping = true;
            _stop.Set();
            threads = [.. _threads];
            Monitor.PulseAll(_gate);
        }

        foreach (Thread thread in threads)
        {
            thread.Join();
        }

        Image.Dispose();
        _stop.Dispose();
    }

    private void Work()
    {
        while (true)
        {
            BlockRequest request;
            lock (_gate)
            {
                while (_queue.Count == 0)
                {
                    if (_stopping)
                    {
                        return;
                    }

                    _idle++;
                    Monitor.Wait(_gate);
                    _idle--;
                }

                request = _queue.Dequeue();
            }

            Throttle(request);
            BlockStatus status = Execute(request);
            if (status != BlockStatus.Ok)
            {
                Interlocked.Increment(ref _failures);
            }

            lock (_completionGate)
            {
                request.Complete(status);
            }

            lock (_gate)
            {
                _pending--;
                if (_pending == 0)
                {
                    Monitor.PulseAll(_gate);
                }
            }
        }
    }

    // Each request takes its share of the limits' time; it starts when those before it have used up theirs.
    private void Throttle(BlockRequest request)
    {
        if (_options is { BytesPerSecond: 0, RequestsPerSecond: 0 } || request.Operation == BlockOperation.Flush)
        {
            return;
        }

        bool movesData = request.Operation is BlockOperation.Read or BlockOperation.Write;
        double cost = 0;
        if (_options.BytesPerSecond > 0 && movesData)
        {
            cost = request.LengthBytes * 1000.0 / _options.BytesPerSecond;
        }

        if (_options.RequestsPerSecond > 0)
        {
            cost = Math.Max(cost, 1000.0 / _options.RequestsPerSecond);
        }

        double wait;
        lock (_gate)
        {
            double now = Environment.TickCount64;
            wait = Math.Max(_busyUntilMs - now, 0);
            _busyUntilMs = Math.Max(_busyUntilMs, now - BurstMs) + cost;
        }

        if (wait >= 1)
        {
            _ = _stop.Wait((int)Math.Min(wait, int.MaxValue));
        }
    }

    private BlockStatus Execute(BlockRequest request)
    {
        long offset = request.OffsetBytes;
        long length = request.LengthBytes;
        if (request.Operation == BlockOperation.Flush)
        {
            return _options.Cache == BlockCacheMode.Unsafe ? BlockStatus.Ok : Image.Flush();
        }

        if (((offset | length) & 511) != 0 || offset < 0 || length < 0 || offset > LengthBytes
            || length > LengthBytes - offset)
        {
            return BlockStatus.Refused;
        }

        if (request.Operation != BlockOperation.Read && IsReadOnly)
        {
            return BlockStatus.Refused;
        }

        if (length == 0)
        {
            return BlockStatus.Ok;
        }

        BlockStatus status;
        switch (request.Operation)
        {
            case BlockOperation.Read:
                {
                    IoBuffer data = IoBuffer.Of(request);
                    return data.Length == length ? Image.Read(offset, data) : BlockStatus.Refused;
                }

            case BlockOperation.Write:
                {
                    IoBuffer data = IoBuffer.Of(request);
                    status = data.Length == length ? Image.Write(offset, data) : BlockStatus.Refused;
                    break;
                }

            case BlockOperation.Discard:
                status = _options.AllowDiscard ? Image.Discard(offset, length) : BlockStatus.Ok;
                break;

            case BlockOperation.WriteZeroes:
                status = Image.WriteZeroes(offset, length, request.MayUnmap && _options.AllowDiscard);
                break;

            default:
                return BlockStatus.Refused;
        }

        bool isForced = _options.Cache == BlockCacheMode.WriteThrough
            || (request.ForceUnitAccess && _options.Cache != BlockCacheMode.Unsafe);
        return status == BlockStatus.Ok && isForced ? Image.Flush() : status;
    }
}

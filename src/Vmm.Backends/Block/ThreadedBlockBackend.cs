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

/// <summary>Runs an image's synchronous calls on worker threads of its own.</summary>
public sealed class ThreadedBlockBackend : IBlockBackend
{
    /// <summary>How many threads a disk gets unless said otherwise.</summary>
    public const int DefaultThreads = 4;

    private readonly Lock _completionGate = new();
    private readonly object _gate = new();
    private readonly Queue<BlockRequest> _queue = new();
    private readonly List<Thread> _threads = [];
    private readonly int _maxThreads;
    private readonly string _name;
    private int _idle;
    private int _pending;
    private int _draining;
    private bool _stopping;
    private long _failures;

    /// <summary>Starts serving an image.</summary>
    /// <param name="image">The image; disposed with the back end.</param>
    /// <param name="name">For thread names: "disk0".</param>
    /// <param name="maxThreads">Most threads, 1..64.</param>
    public ThreadedBlockBackend(BlockImage image, string name, int maxThreads = DefaultThreads)
    {
        ArgumentNullException.ThrowIfNull(image);
        ArgumentOutOfRangeException.ThrowIfLessThan(maxThreads, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(maxThreads, 64);
        Image = image;
        _name = name;
        _maxThreads = maxThreads;
    }

    /// <summary>The image underneath.</summary>
    public BlockImage Image { get; }

    /// <summary>Requests that ended in an error.</summary>
    public long Failures => Interlocked.Read(ref _failures);

    /// <inheritdoc/>
    public long LengthBytes => Image.LengthBytes;

    /// <inheritdoc/>
    public int BlockBytes => Image.BlockBytes;

    /// <inheritdoc/>
    public bool IsReadOnly => Image.IsReadOnly;

    /// <inheritdoc/>
    public bool CanDiscard => Image.CanDiscard;

    /// <inheritdoc/>
    public void Submit(BlockRequest request)
    {
        ArgumentNullException.ThrowIfNull(request);
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_stopping, this);
            _pending++;
            _queue.Enqueue(request);
            if (_idle >= _queue.Count || _threads.Count >= _maxThreads)
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
            threads = [.. _threads];
            Monitor.PulseAll(_gate);
        }

        foreach (Thread thread in threads)
        {
            thread.Join();
        }

        Image.Dispose();
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

    private BlockStatus Execute(BlockRequest request)
    {
        long offset = request.OffsetBytes;
        long length = request.LengthBytes;
        if (request.Operation == BlockOperation.Flush)
        {
            return Image.Flush();
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
                status = Image.Discard(offset, length);
                break;

            case BlockOperation.WriteZeroes:
                status = Image.WriteZeroes(offset, length, request.MayUnmap);
                break;

            default:
                return BlockStatus.Refused;
        }

        return status == BlockStatus.Ok && request.ForceUnitAccess ? Image.Flush() : status;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Threading;
using Vmm.Core;

namespace Vmm.Backends.CloudInit;

/// <summary>A read-only disk in this process's memory, for small images that are made and not stored.</summary>
public sealed class MemoryBlockBackend : IBlockBackend
{
    private readonly Lock _gate = new();
    private readonly Queue<BlockRequest> _queue = new();
    private readonly ManualResetEventSlim _idle = new(initialState: true);
    private readonly byte[] _data;
    private bool _running;

    /// <summary>Makes one.</summary>
    /// <param name="data">Padded to a multiple of 2048.</param>
    public MemoryBlockBackend(byte[] data)
    {
        ArgumentNullException.ThrowIfNull(data);
        _data = new byte[(data.Length + IsoImage.SectorBytes - 1) / IsoImage.SectorBytes * IsoImage.SectorBytes];
        data.CopyTo(_data, 0);
    }

    /// <inheritdoc/>
    public long LengthBytes => _data.Length;

    /// <inheritdoc/>
    public int BlockBytes => IsoImage.SectorBytes;

    /// <inheritdoc/>
    public bool IsReadOnly => true;

    /// <inheritdoc/>
    public bool CanDiscard => false;

    /// <inheritdoc/>
    public void Submit(BlockRequest request)
    {
        lock (_gate)
        {
            _queue.Enqueue(request);
            _idle.Reset();
            if (_running)
            {
                return;
            }

            _running = true;
        }

        ThreadPool.UnsafeQueueUserWorkItem(static disk => disk.Work(), this, preferLocal: false);
    }

    /// <inheritdoc/>
    public void Drain() => _idle.Wait();

    /// <inheritdoc/>
    public void Dispose()
    {
        Drain();
        _idle.Dispose();
    }

    private void Work()
    {
        for (; ; )
        {
            BlockRequest? request;
            lock (_gate)
            {
                if (!_queue.TryDequeue(out request))
                {
                    _running = false;
                    _idle.Set();
                    return;
                }
            }

            request.Complete(Execute(request));
        }
    }

    private BlockStatus Execute(BlockRequest request)
    {
        if (request.Operation == BlockOperation.Flush)
        {
            return BlockStatus.Ok;
        }

        bool inside = request.OffsetBytes >= 0 && request.LengthBytes >= 0
            && request.OffsetBytes <= _data.Length && request.LengthBytes <= _data.Length - request.OffsetBytes;
        if (request.Operation != BlockOperation.Read || !inside)
        {
            return BlockStatus.Refused;
        }

        int at = (int)request.OffsetBytes;
        if (request.SliceCount == 0)
        {
            _data.AsSpan(at, (int)request.LengthBytes).CopyTo(request.Buffer.Span);
            return BlockStatus.Ok;
        }

        int end = at + (int)request.LengthBytes;
        for (int i = 0; i < request.SliceCount && at < end; i++)
        {
            int length = Math.Min(request.Slices[i].LengthBytes, end - at);
            Marshal.Copy(_data, at, request.Slices[i].HostAddress, length);
            at += length;
        }

        return BlockStatus.Ok;
    }
}

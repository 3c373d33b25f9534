// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using Vmm.Core;

namespace Vmm.Devices.Tests.Storage;

/// <summary>A disk in memory whose requests complete when the test says so, or at once on another thread's behalf.</summary>
internal sealed class FakeDisk : IBlockBackend
{
    private readonly Queue<BlockRequest> _queue = new();
    private int _depth;

    public FakeDisk(int lengthBytes) => Bytes = new byte[lengthBytes];

    public byte[] Bytes { get; }

    public List<(BlockOperation Operation, long Offset, long Length, bool Forced)> Log { get; } = [];

    /// <summary>What the next requests end with.</summary>
    public BlockStatus NextStatus { get; set; }

    public int Waiting => _queue.Count;

    /// <summary>Answers inside Submit what may be answered there.</summary>
    public bool AnswersAtOnce { get; set; }

    /// <summary>How deep calls of Submit were in each other at the most.</summary>
    public int MaxDepth { get; private set; }

    public long LengthBytes => Bytes.Length;

    public int BlockBytes => 512;

    public bool IsReadOnly { get; init; }

    public bool CanDiscard => true;

    public bool IsDisposed { get; private set; }

    public static FakeDisk Random(int lengthBytes, int seed)
    {
        var disk = new FakeDisk(lengthBytes);
        new Random(seed).NextBytes(disk.Bytes);
        return disk;
    }

    public void Submit(BlockRequest request)
    {
        lock (_queue)
        {
            _queue.Enqueue(request);
        }

        if (AnswersAtOnce && request.MayCompleteInline)
        {
            _depth++;
            MaxDepth = Math.Max(MaxDepth, _depth);
            _ = Step();
            _depth--;
        }
    }

    /// <summary>Completes one request; false when there is none.</summary>
    public bool Step()
    {
        BlockRequest? request;
        lock (_queue)
        {
            if (!_queue.TryDequeue(out request))
            {
                return false;
            }
        }

        Log.Add((request.Operation, request.OffsetBytes, request.LengthBytes, request.ForceUnitAccess));
        BlockStatus status = NextStatus == BlockStatus.Ok ? Carry(request) : NextStatus;
        request.Complete(status);
        return true;
    }

    public void Drain()
    {
        while (Step())
        {
        }
    }

    public void Dispose() => IsDisposed = true;

    private BlockStatus Carry(BlockRequest request)
    {
        if (request.Operation == BlockOperation.Flush)
        {
            return BlockStatus.Ok;
        }

        long offset = request.OffsetBytes;
        long length = request.LengthBytes;
        if (offset < 0 || length < 0 || ((offset | length) & 511) != 0 || offset > Bytes.Length - length
            || (IsReadOnly && request.Operation != BlockOperation.Read))
        {
            return BlockStatus.Refused;
        }

        Span<byte> range = Bytes.AsSpan((int)offset, (int)length);
        switch (request.Operation)
        {
            case BlockOperation.Read:
            case BlockOperation.Write:
                return Move(request, range);
            default:
                range.Clear();
                return BlockStatus.Ok;
        }
    }

    private static BlockStatus Move(BlockRequest request, Span<byte> range)
    {
        bool isRead = request.Operation == BlockOperation.Read;
        if (request.SliceCount == 0)
        {
            if (request.Buffer.Length != range.Length)
            {
                return BlockStatus.Refused;
            }

            if (isRead)
            {
                range.CopyTo(request.Buffer.Span);
            }
            else
            {
                request.Buffer.Span.CopyTo(range);
            }

            return BlockStatus.Ok;
        }

        byte[] data = range.ToArray();
        int at = 0;
        for (int i = 0; i < request.SliceCount; i++)
        {
            GuestSlice slice = request.Slices[i];
            if (at + slice.LengthBytes > data.Length)
            {
                return BlockStatus.Refused;
            }

            if (isRead)
            {
                Marshal.Copy(data, at, slice.HostAddress, slice.LengthBytes);
            }
            else
            {
                Marshal.Copy(slice.HostAddress, data, at, slice.LengthBytes);
            }

            at += slice.LengthBytes;
        }

        if (at != data.Length)
        {
            return BlockStatus.Refused;
        }

        if (!isRead)
        {
            data.CopyTo(range);
        }

        return BlockStatus.Ok;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Tests.Virtio;

/// <summary>A disk in memory. Requests complete at once on the caller's stack, or when the test says so.</summary>
internal sealed class FakeBlockBackend : IBlockBackend
{
    private readonly Queue<BlockRequest> _held = new();

    public FakeBlockBackend(int lengthBytes) => Data = new byte[lengthBytes];

    public byte[] Data { get; private set; }

    public List<(BlockOperation Operation, long Offset, long Length, bool Fua)> Log { get; } = [];

    public bool Hold { get; set; }

    public BlockStatus? Fail { get; set; }

    public int Held => _held.Count;

    public long LengthBytes => Data.Length;

    public int BlockBytes => 4096;

    public bool IsReadOnly { get; init; }

    public bool CanDiscard => true;

    public void Grow(int lengthBytes)
    {
        byte[] data = Data;
        Array.Resize(ref data, lengthBytes);
        Data = data;
    }

    public void Submit(BlockRequest request)
    {
        lock (_held)
        {
            _held.Enqueue(request);
        }

        if (!Hold)
        {
            Drain();
        }
    }

    public void Drain()
    {
        while (CompleteOne())
        {
            Thread.Yield();
        }
    }

    /// <summary>Completes the newest first, to prove that order does not matter.</summary>
    public void CompleteReversed()
    {
        BlockRequest[] all;
        lock (_held)
        {
            all = _held.ToArray();
            _held.Clear();
        }

        Array.Reverse(all);
        foreach (BlockRequest request in all)
        {
            Run(request);
        }
    }

    public bool CompleteOne()
    {
        BlockRequest? request;
        lock (_held)
        {
            if (!_held.TryDequeue(out request))
            {
                return false;
            }
        }

        Run(request);
        return true;
    }

    public void Dispose()
    {
    }

    private void Run(BlockRequest request)
    {
        Log.Add((request.Operation, request.OffsetBytes, request.LengthBytes, request.ForceUnitAccess));
        if (Fail is { } status)
        {
            request.Complete(status);
            return;
        }

        int at = (int)request.OffsetBytes;
        for (int i = 0; i < request.SliceCount; i++)
        {
            GuestSlice slice = request.Slices[i];
            if (request.Operation == BlockOperation.Read)
            {
                Marshal.Copy(Data, at, slice.HostAddress, slice.LengthBytes);
            }
            else
            {
                Marshal.Copy(slice.HostAddress, Data, at, slice.LengthBytes);
            }

            at += slice.LengthBytes;
        }

        if (request.Operation is BlockOperation.WriteZeroes or BlockOperation.Discard)
        {
            Data.AsSpan((int)request.OffsetBytes, (int)request.LengthBytes).Clear();
        }

        request.Complete(BlockStatus.Ok);
    }
}

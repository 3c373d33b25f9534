// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Storage;

// Theory. A read of 4 KiB that the host has in its page cache takes less time than a hand-off to another thread, so a back
// end may answer it inside Submit, on the thread of the vCPU that wrote the register (BlockRequest.MayCompleteInline). A
// controller's answer often starts the next command, whose answer starts the next: to keep that a loop and not a recursion
// whose depth a guest chooses, an answer that comes inside Submit is held until Submit has returned and is then taken by
// whoever submitted: StorageSubmission is the list of what is to be submitted when the controller's gate has been left, and
// Take, under the gate, may add to it.
//
// A request may be answered by another thread, put back into its controller's pool and submitted again by a third one while
// Submit has not yet returned on the first. Each submission therefore has a number, and only the thread inside Submit is
// believed to answer there.

/// <summary>A request of a storage controller, which takes answers inside Submit in its own time.</summary>
internal abstract class StorageRequest : BlockRequest
{
    private const int MaxInlineBytes = 64 << 10; // more would keep the vCPU from its interrupts

    private int _submitter;
    private int _number;
    private int _answered;
    private BlockStatus _answer;

    /// <summary>Where it goes; null for a medium that is gone. Set before it is added to a <see cref="StorageSubmission"/>.</summary>
    public IBlockBackend? Backend { get; set; }

    /// <summary>What follows in a <see cref="StorageSubmission"/>.</summary>
    internal StorageRequest? Next { get; set; }

    /// <inheritdoc/>
    public sealed override void Complete(BlockStatus status)
    {
        if (Volatile.Read(ref _submitter) == Environment.CurrentManagedThreadId)
        {
            _answer = status;
            _answered = _number;
        }
        else
        {
            StorageSubmission submit = default;
            Take(status, ref submit);
            submit.Start();
        }
    }

    /// <summary>Hands it to the back end; without the controller's gate. It may be in use again before this returns.</summary>
    internal void Submit(ref StorageSubmission rest)
    {
        if (Backend is not { } backend)
        {
            Take(BlockStatus.IoError, ref rest);
            return;
        }

        int thread = Environment.CurrentManagedThreadId;
        int number = ++_number;
        MayCompleteInline = LengthBytes <= MaxInlineBytes;
        Volatile.Write(ref _submitter, thread);
        backend.Submit(this);
        Interlocked.CompareExchange(ref _submitter, 0, thread);
        if (Volatile.Read(ref _answered) == number)
        {
            Take(_answer, ref rest);
        }
    }

    /// <summary>
    /// The back end has answered: ends the request and adds what that starts. On the thread that submitted it or on one of the
    /// back end's, without the controller's gate.
    /// </summary>
    protected abstract void Take(BlockStatus status, ref StorageSubmission submit);
}

/// <summary>
/// Requests in the guest's order that are to be handed to back ends when the controller's gate has been left. A value of the
/// thread that collects it.
/// </summary>
internal struct StorageSubmission
{
    private StorageRequest? _first;
    private StorageRequest? _last;

    /// <summary>Adds one that is in no other.</summary>
    public void Add(StorageRequest request)
    {
        if (_last is { } last)
        {
            last.Next = request;
        }
        else
        {
            _first = request;
        }

        _last = request;
    }

    /// <summary>Submits all of them and, in a loop instead of a recursion, what those start that are answered at once.</summary>
    public void Start()
    {
        while (_first is { } request)
        {
            _first = request.Next;
            if (_first is null)
            {
                _last = null;
            }

            request.Next = null;
            request.Submit(ref this);
        }
    }
}

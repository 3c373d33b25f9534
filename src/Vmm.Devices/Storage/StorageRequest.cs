// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Storage;

// Theory. A read of 4 KiB that the host has in its page cache takes less time than a hand-off to another thread, so a back
// end may answer it inside Submit, on the thread of the vCPU that wrote the register (BlockRequest.MayCompleteInline). A
// controller's answer often starts the next command, whose answer starts the next: to keep that a loop and not a recursion
// whose depth a guest chooses, an answer that comes inside Submit is held until Submit has returned and is then taken by
// whoever submitted.
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
            OnAnswer(status);
        }
    }

    /// <summary>Hands the request to a back end.</summary>
    /// <param name="backend">Where to; null for a medium that is gone.</param>
    /// <param name="status">The answer, if there is one.</param>
    /// <returns>True when it was answered: the caller ends the request. Otherwise it may already be in use again.</returns>
    protected bool SubmitTo(IBlockBackend? backend, out BlockStatus status)
    {
        if (backend is null)
        {
            status = BlockStatus.IoError;
            return true;
        }

        int thread = Environment.CurrentManagedThreadId;
        int number = ++_number;
        MayCompleteInline = LengthBytes <= MaxInlineBytes;
        Volatile.Write(ref _submitter, thread);
        backend.Submit(this);
        Interlocked.CompareExchange(ref _submitter, 0, thread);
        bool isAnswered = Volatile.Read(ref _answered) == number;
        status = isAnswered ? _answer : BlockStatus.Ok;
        return isAnswered;
    }

    /// <summary>The back end answered later; on its thread.</summary>
    protected abstract void OnAnswer(BlockStatus status);
}

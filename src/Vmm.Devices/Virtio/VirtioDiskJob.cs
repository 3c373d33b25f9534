// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>A request to a disk's back end on behalf of a chain of a queue, as virtio-blk and virtio-scsi make them.</summary>
internal abstract class VirtioDiskJob : BlockRequest
{
    /// <summary>Makes one; both models take completions inside Submit.</summary>
    protected VirtioDiskJob() => MayCompleteInline = true;

    /// <summary>The queue; null while the job is in its pool.</summary>
    public Virtqueue? Ring { get; set; }

    /// <summary>The chain that is answered; null while the job is in its pool.</summary>
    public VirtqueueChain? Chain { get; set; }

    /// <summary>Of a request for several ranges: which is under way.</summary>
    public int NextRange { get; set; }
}

/// <summary>Jobs that were used before, so that a request allocates nothing. Any thread.</summary>
/// <param name="make">Makes another one.</param>
internal sealed class VirtioDiskJobs<TJob>(Func<TJob> make)
    where TJob : VirtioDiskJob
{
    private readonly Lock _gate = new();
    private readonly Stack<TJob> _idle = new();

    /// <summary>A job for a chain, without data.</summary>
    public TJob Take(Virtqueue ring, VirtqueueChain chain)
    {
        TJob? job;
        lock (_gate)
        {
            _idle.TryPop(out job);
        }

        job ??= make();
        job.Ring = ring;
        job.Chain = chain;
        job.ForceUnitAccess = false;
        job.MayUnmap = false;
        job.HasFollowers = false;
        job.SliceCount = 0;
        job.NextRange = 0;
        return job;
    }

    /// <summary>Takes a job back whose chain is answered, or about to be.</summary>
    public void Return(TJob job)
    {
        job.Ring = null;
        job.Chain = null;
        lock (_gate)
        {
            _idle.Push(job);
        }
    }
}

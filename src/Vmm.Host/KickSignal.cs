// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using Vmm.Host.Native;

namespace Vmm.Host;

// Theory. A thread in guest mode comes back to user space when a signal that it does not block is pending. Installing
// a C# handler for it is out of the question (it would run managed code at any instruction), and so is the default
// action (it ends the process). So the private signal is blocked for good on the vCPU's thread and unblocked only by
// the driver while the thread is inside KVM_RUN (KVM_SET_SIGNAL_MASK): the driver sees it pending, returns EINTR with the
// mask restored, and the thread takes it off its queue with sigtimedwait. No handler ever runs.
//
// Whoever sends must be sure that the thread has blocked the signal and still lives; Vmm.Kvm holds a lock for that.

/// <summary>The private signal that takes a vCPU thread out of guest mode.</summary>
public static unsafe class KickSignal
{
    // The largest sigset_t among the systems: glibc's 1024 bits.
    private const int SetWords = 16;

    /// <summary>The calling thread, as <see cref="Send"/> wants it.</summary>
    public static nint CurrentThread => LibC.pthread_self();

    /// <summary>Blocks the signal on the calling thread, for good.</summary>
    /// <exception cref="HostException">Cannot happen on a sound system.</exception>
    public static void BlockOnCurrentThread()
    {
        // SAFETY: both sets are the largest sigset_t of the supported systems.
        ulong* set = stackalloc ulong[SetWords];
        Fill(set);
        int error = LibC.pthread_sigmask(OsAbi.Current.SignalBlock, set, null);
        if (error != 0)
        {
            throw new HostException("block the kick signal", error);
        }
    }

    /// <summary>The calling thread's signal mask without the kick signal, as the kernel lays it out.</summary>
    /// <param name="into">At least <see cref="OsAbi.KernelSignalSetBytes"/> bytes.</param>
    public static void GetMaskWithoutKick(Span<byte> into)
    {
        ulong* set = stackalloc ulong[SetWords];
        new Span<ulong>(set, SetWords).Clear();
        int error = LibC.pthread_sigmask(OsAbi.Current.SignalBlock, null, set);
        if (error != 0)
        {
            throw new HostException("read the signal mask", error);
        }

        int bit = OsAbi.Current.KickSignal - 1;
        set[bit / 64] &= ~(1UL << (bit % 64));
        new Span<byte>(set, OsAbi.Current.KernelSignalSetBytes).CopyTo(into);
    }

    /// <summary>Sends the signal to a living thread that has blocked it.</summary>
    public static void Send(nint thread) => _ = LibC.pthread_kill(thread, OsAbi.Current.KickSignal);

    /// <summary>Takes pending kick signals off the calling thread's queue.</summary>
    public static void Drain()
    {
        ulong* set = stackalloc ulong[SetWords];
        Fill(set);
        var zero = default(LibC.TimeSpec);
        while (LibC.sigtimedwait(set, null, &zero) > 0
            || OsAbi.Current.ToErrno(Marshal.GetLastPInvokeError()) == Errno.EINTR)
        {
        }
    }

    private static void Fill(ulong* set)
    {
        new Span<ulong>(set, SetWords).Clear();
        int bit = OsAbi.Current.KickSignal - 1;
        set[bit / 64] = 1UL << (bit % 64);
    }
}

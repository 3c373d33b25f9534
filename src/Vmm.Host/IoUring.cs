// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using System.Threading;
using Microsoft.Win32.SafeHandles;
using Vmm.Host.Native;

namespace Vmm.Host;

// Theory. Linux's io_uring (io_uring_setup(2), io_uring_enter(2)): two rings in memory that this process shares with the
// kernel, one of submissions and one of completions. We write an entry, publish the tail and enter the kernel once for a
// whole batch; completions are read from their ring without a call while there are any.
//
// What is here is the part that a disk needs: vectored reads and writes, and data-only sync, of descriptors and of memory
// that the caller keeps alive until the completion has been taken. A request's I/O vector must stay in place until the
// kernel has read it, which without IORING_SETUP_SQPOLL is before Submit returns.
//
// Locks: submissions are serialised by a gate; completions are taken by one thread. The rings' indices are shared with
// the kernel: tails that we write are published with release, those that we read acquired (io_uring(7)).
//
// A ring could do much more than that, past any filter of system calls (SystemCallFilter.cs allows io_uring_enter only). So
// it is made disabled, restricted to the operations below (io_uring_register(2), IORING_REGISTER_RESTRICTIONS, Linux 5.10),
// and enabled then; a kernel that cannot do that gets no ring.
//
// Not every Linux lets a process use it (sysctl kernel.io_uring_disabled, seccomp in containers): TryOpen says so, and
// disks then have threads. FreeBSD and illumos always have threads: their asynchronous file I/O (aio(4), libaio) is made
// of threads too, in the kernel or in libc, and has no vectored form on illumos.

/// <summary>What a submission does.</summary>
public enum RingOperation : byte
{
    /// <summary>Nothing; completes at once. Wakes the thread that waits.</summary>
    Nothing = 0,

    /// <summary>preadv(2).</summary>
    Read = 1,

    /// <summary>pwritev(2).</summary>
    Write = 2,

    /// <summary>fdatasync(2).</summary>
    Sync = 3,
}

/// <summary>A completion.</summary>
/// <param name="Tag">What the submission carried.</param>
/// <param name="Result">Bytes moved, or a negative errno.</param>
public readonly record struct RingCompletion(ulong Tag, int Result);

/// <summary>An io_uring. Submit: any thread. Wait: one thread.</summary>
public sealed unsafe partial class IoUring : IDisposable
{
    private const int SetupCall = 425;
    private const int EnterCall = 426;
    private const int RegisterCall = 427;
    private const uint SetupDisabled = 1 << 6;
    private const int RegisterRestrictions = 11;
    private const int RegisterEnable = 12;
    private const ushort RestrictOperation = 1;
    private const uint EnterGetEvents = 1;
    private const uint FsyncDataSync = 1;
    private const int EntryBytes = 64;
    private const int CompletionBytes = 16;
    private const long SubmissionRing = 0;
    private const long CompletionRing = 0x8000000;
    private const long Entries = 0x10000000;
    private const int Eintr = 4;
    private const int MaxVectors = 256;

    private readonly Lock _gate = new();
    private readonly SafeFileHandle _ring;
    private readonly int _entries;
    private readonly nint _submissions;
    private readonly nuint _submissionsBytes;
    private readonly nint _completions;
    private readonly nuint _completionsBytes;
    private readonly nint _entryMemory;
    private readonly uint* _submissionTail;
    private readonly uint _submissionMask;
    private readonly uint* _submissionArray;
    private readonly uint* _completionHead;
    private readonly uint* _completionTail;
    private readonly uint _completionMask;
    private readonly byte* _completionEntries;
    private bool _disposed;

    private IoUring(SafeFileHandle ring, in Parameters parameters)
    {
        _ring = ring;
        _entries = (int)parameters.SubmissionEntries;
        _submissionsBytes = parameters.SubmissionArray + (parameters.SubmissionEntries * sizeof(uint));
        _completionsBytes = parameters.CompletionQueue + (parameters.CompletionEntries * CompletionBytes);
        _submissions = Map(_submissionsBytes, SubmissionRing);
        _completions = Map(_completionsBytes, CompletionRing);
        _entryMemory = Map(parameters.SubmissionEntries * EntryBytes, Entries);

        // SAFETY: the kernel gives these offsets for exactly the three mappings just made, which live until Dispose.
        _submissionTail = (uint*)(_submissions + (nint)parameters.SubmissionTail);
        _submissionMask = *(uint*)(_submissions + (nint)parameters.SubmissionMask);
        _submissionArray = (uint*)(_submissions + (nint)parameters.SubmissionArray);
        _completionHead = (uint*)(_completions + (nint)parameters.CompletionHead);
        _completionTail = (uint*)(_completions + (nint)parameters.CompletionTail);
        _completionMask = *(uint*)(_completions + (nint)parameters.CompletionMask);
        _completionEntries = (byte*)(_completions + (nint)parameters.CompletionQueue);
    }

    /// <summary>Makes a ring.</summary>
    /// <param name="entries">Most submissions at once, 1 to 4096; a power of two.</param>
    /// <returns>Null where the host has none or does not allow it.</returns>
    public static IoUring? TryOpen(int entries)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(entries);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(entries, 4096);
        if (OsAbi.Current.System != HostSystem.Linux)
        {
            return null;
        }

        // SAFETY: the kernel reads and writes one io_uring_params, which is on this stack.
        var parameters = new Parameters { Flags = SetupDisabled };
        int fd = (int)syscall(SetupCall, (nint)(uint)entries, (nint)(&parameters), 0, 0, 0, 0);
        if (fd < 0)
        {
            return null;
        }

        var ring = new SafeFileHandle(fd, ownsHandle: true);
        ReadOnlySpan<Restriction> allowed =
        [
            new(RingOperation.Nothing), new(RingOperation.Read), new(RingOperation.Write), new(RingOperation.Sync),
        ];
        try
        {
            // SAFETY: the kernel reads as many restrictions as the span has, during the call only.
            fixed (Restriction* first = allowed)
            {
                if (syscall(RegisterCall, fd, RegisterRestrictions, (nint)first, allowed.Length, 0, 0) != 0
                    || syscall(RegisterCall, fd, RegisterEnable, 0, 0, 0, 0) != 0)
                {
                    ring.Dispose();
                    return null;
                }
            }

            return new IoUring(ring, parameters);
        }
        catch (HostException)
        {
            ring.Dispose();
            return null;
        }
    }

    /// <summary>Starts one request.</summary>
    /// <param name="operation">What.</param>
    /// <param name="file">Open until the completion has been taken.</param>
    /// <param name="offset">Byte offset in the file.</param>
    /// <param name="data">Memory, guest RAM only, that stays mapped until then; ignored for <see cref="RingOperation.Sync"/>.</param>
    /// <param name="done">Bytes of <paramref name="data"/> that were moved before.</param>
    /// <param name="tag">Comes back with the completion.</param>
    /// <returns>False when the kernel has no room now: the caller does it another way.</returns>
    public bool TrySubmit(RingOperation operation, SafeFileHandle file, long offset, in IoBuffer data, long done, ulong tag)
    {
        Span<LibC.IoVector> vector = stackalloc LibC.IoVector[MaxVectors];
        int count = operation is RingOperation.Read or RingOperation.Write ? data.Describe(done, vector, out _) : 0;
        using var held = new HeldHandle(file);

        // SAFETY: the vector lies on this stack; the kernel copies it while it handles the submission, inside Enter.
        fixed (LibC.IoVector* first = vector)
        {
            lock (_gate)
            {
                ObjectDisposedException.ThrowIf(_disposed, this);
                uint tail = *_submissionTail;
                uint slot = tail & _submissionMask;
                var entry = (SubmissionEntry*)(_entryMemory + (nint)(slot * EntryBytes));
                *entry = new SubmissionEntry
                {
                    Operation = (byte)operation,
                    Fd = operation == RingOperation.Nothing ? -1 : held.Fd,
                    Offset = (ulong)(offset + done),
                    Address = (ulong)first,
                    Length = (uint)count,
                    Flags = operation == RingOperation.Sync ? FsyncDataSync : 0,
                    Tag = tag,
                };
                if (operation is RingOperation.Sync or RingOperation.Nothing)
                {
                    entry->Offset = 0;
                    entry->Address = 0;
                }

                _submissionArray[slot] = slot;
                Volatile.Write(ref *_submissionTail, tail + 1);
                if (Enter(1, 0, 0) == 1)
                {
                    return true;
                }

                // Not taken (no memory, or the completion ring is full): take it back, nobody has seen it.
                Volatile.Write(ref *_submissionTail, tail);
                return false;
            }
        }
    }

    /// <summary>Takes completions; waits for the first.</summary>
    /// <param name="into">Filled from 0.</param>
    /// <returns>How many; 0 when the wait was interrupted, -1 when the kernel no longer lets this process wait.</returns>
    public int Wait(Span<RingCompletion> into)
    {
        // SAFETY: both indices and the entries lie in the completion ring's mapping, which lives until Dispose.
        uint head = *_completionHead;
        bool refused = Volatile.Read(ref *_completionTail) == head
            && Enter(0, 1, EnterGetEvents) < 0 && Marshal.GetLastPInvokeError() != Eintr;

        uint tail = Volatile.Read(ref *_completionTail);
        int count = 0;
        while (head != tail && count < into.Length)
        {
            byte* entry = _completionEntries + ((head & _completionMask) * CompletionBytes);
            into[count++] = new RingCompletion(*(ulong*)entry, *(int*)(entry + 8));
            head++;
        }

        Volatile.Write(ref *_completionHead, head);
        return count == 0 && refused ? -1 : count;
    }

    /// <summary>Closes the ring. Nothing may be under way.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            if (_disposed)
            {
                return;
            }

            _disposed = true;
        }

        _ = munmap(_submissions, _submissionsBytes);
        _ = munmap(_completions, _completionsBytes);
        _ = munmap(_entryMemory, (nuint)_entries * EntryBytes);
        _ring.Dispose();
    }

    private nint Map(nuint lengthBytes, long offset)
    {
        using var held = new HeldHandle(_ring);
        nint address = mmap(0, lengthBytes, 3, 0x8001, held.Fd, offset); // PROT_READ|WRITE, MAP_SHARED|POPULATE
        return address == -1 ? throw HostException.Last("map an io_uring") : address;
    }

    private int Enter(uint submit, uint complete, uint flags)
    {
        using var held = new HeldHandle(_ring);
        nint taken;
        do
        {
            taken = syscall(EnterCall, held.Fd, (nint)submit, (nint)complete, (nint)flags, 0, 0);
        }
        while (taken < 0 && submit > 0 && Marshal.GetLastPInvokeError() == Eintr);

        return (int)taken;
    }

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint syscall(nint number, nint a, nint b, nint c, nint d, nint e, nint f);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint mmap(nint address, nuint length, int protection, int flags, int fd, long offset);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int munmap(nint address, nuint length);

    // struct io_uring_params: 10 words, io_sqring_offsets at 40, io_cqring_offsets at 80; 120 bytes.
    [StructLayout(LayoutKind.Explicit, Size = 120)]
    private struct Parameters
    {
        [FieldOffset(0)]
        public uint SubmissionEntries;

        [FieldOffset(4)]
        public uint CompletionEntries;

        [FieldOffset(8)]
        public uint Flags;

        [FieldOffset(44)]
        public uint SubmissionTail;

        [FieldOffset(48)]
        public uint SubmissionMask;

        [FieldOffset(64)]
        public uint SubmissionArray;

        [FieldOffset(80)]
        public uint CompletionHead;

        [FieldOffset(84)]
        public uint CompletionTail;

        [FieldOffset(88)]
        public uint CompletionMask;

        [FieldOffset(100)]
        public uint CompletionQueue;
    }

    // struct io_uring_restriction, 16 bytes.
    [StructLayout(LayoutKind.Explicit, Size = 16)]
    private struct Restriction
    {
        [FieldOffset(0)]
        public ushort Kind;

        [FieldOffset(2)]
        public byte Operation;

        public Restriction(RingOperation operation)
        {
            Kind = RestrictOperation;
            Operation = (byte)operation;
        }
    }

    // struct io_uring_sqe, 64 bytes; what is not named stays 0.
    [StructLayout(LayoutKind.Explicit, Size = EntryBytes)]
    private struct SubmissionEntry
    {
        [FieldOffset(0)]
        public byte Operation;

        [FieldOffset(4)]
        public int Fd;

        [FieldOffset(8)]
        public ulong Offset;

        [FieldOffset(16)]
        public ulong Address;

        [FieldOffset(24)]
        public uint Length;

        [FieldOffset(28)]
        public uint Flags;

        [FieldOffset(32)]
        public ulong Tag;
    }
}

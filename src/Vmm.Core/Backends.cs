// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.Core;

// Theory. The fourth waist: what devices talk to on the host. A device model never sees a file, socket or terminal;
// it is given one of these. Calls into a back end do not block on the outside world; completions and input arrive on a
// thread of the back end's choosing, one at a time per back end, and never while the caller's Submit/Write/Send is on
// the stack (a block request may allow both: BlockRequest.MayCompleteInline). A device takes its own lock inside the
// callback and holds none while it calls out.

/// <summary>Kinds of block requests.</summary>
public enum BlockOperation
{
    /// <summary>Disk to guest.</summary>
    Read,

    /// <summary>Guest to disk.</summary>
    Write,

    /// <summary>Everything completed before it was submitted is on stable storage when this completes.</summary>
    Flush,

    /// <summary>The range's content is no longer needed; may read as anything or zeroes afterwards.</summary>
    Discard,

    /// <summary>The range reads as zeroes afterwards.</summary>
    WriteZeroes,
}

/// <summary>Outcome of a block request.</summary>
public enum BlockStatus
{
    /// <summary>Done.</summary>
    Ok,

    /// <summary>The host reported an error, or the image is damaged there.</summary>
    IoError,

    /// <summary>Out of range, misaligned, or a write to a read-only disk.</summary>
    Refused,

    /// <summary>No space left on the host.</summary>
    NoSpace,
}

/// <summary>
/// One request. The device owns it, fills it, submits it, and may reuse it after <see cref="Complete"/>. Data lies either
/// in <see cref="Slices"/> (guest RAM, zero copy) or in <see cref="Buffer"/> (the device's own memory).
/// </summary>
public abstract class BlockRequest
{
    /// <summary>What to do.</summary>
    public BlockOperation Operation { get; set; }

    /// <summary>Byte offset on the disk; a multiple of 512.</summary>
    public long OffsetBytes { get; set; }

    /// <summary>Length in bytes; equals the data's length for Read and Write.</summary>
    public long LengthBytes { get; set; }

    /// <summary>Write: is on stable storage when it completes (FUA).</summary>
    public bool ForceUnitAccess { get; set; }

    /// <summary>Discard and WriteZeroes: the range may be deallocated.</summary>
    public bool MayUnmap { get; set; }

    /// <summary>
    /// The device takes a completion inside Submit, too, and while another thread completes another request: a back end may
    /// then answer at once what needs no waiting.
    /// </summary>
    public bool MayCompleteInline { get; set; }

    /// <summary>
    /// The guest has put more requests behind this one: a back end that would answer a large one at once may leave it to
    /// another thread and take the next one meanwhile.
    /// </summary>
    public bool HasFollowers { get; set; }

    /// <summary>Guest RAM pieces; the first <see cref="SliceCount"/> are valid.</summary>
    public GuestSlice[] Slices { get; set; } = [];

    /// <summary>How many of <see cref="Slices"/> are valid; 0 means <see cref="Buffer"/> holds the data.</summary>
    public int SliceCount { get; set; }

    /// <summary>The device's own data buffer.</summary>
    public Memory<byte> Buffer { get; set; }

    /// <summary>Called exactly once per submission, on a back-end thread.</summary>
    public abstract void Complete(BlockStatus status);
}

/// <summary>A disk, CD or floppy image on the host.</summary>
public interface IBlockBackend : IDisposable
{
    /// <summary>Size in bytes, a multiple of 512.</summary>
    long LengthBytes { get; }

    /// <summary>Preferred I/O size in bytes (a power of two, at least 512).</summary>
    int BlockBytes { get; }

    /// <summary>Writes are refused.</summary>
    bool IsReadOnly { get; }

    /// <summary>Discard does something useful.</summary>
    bool CanDiscard { get; }

    /// <summary>
    /// Starts a request. Requests may complete in any order; two that overlap have no defined order unless the second
    /// is submitted after the first completed. Never throws for a bad range: completes with Refused.
    /// </summary>
    void Submit(BlockRequest request);

    /// <summary>Waits until everything submitted has completed. For pause and shutdown, not on a vCPU thread.</summary>
    void Drain();
}

/// <summary>The device side of a character stream.</summary>
public interface ICharReceiver
{
    /// <summary>How many bytes it would take now. Any thread.</summary>
    int RoomBytes { get; }

    /// <summary>Takes input; at most <see cref="RoomBytes"/> bytes. Excess is dropped and counted.</summary>
    void Receive(ReadOnlySpan<byte> bytes);
}

/// <summary>A terminal, socket, file or log on the host.</summary>
public interface ICharBackend : IDisposable
{
    /// <summary>Output of the guest. Never blocks; what does not fit the back end's buffer is dropped and counted.</summary>
    void Write(ReadOnlySpan<byte> bytes);

    /// <summary>Says who takes input. Once, before the machine runs.</summary>
    void Attach(ICharReceiver receiver);

    /// <summary>The receiver has room again.</summary>
    void ResumeInput();
}

/// <summary>Checksum and segmentation left to do on a frame (VIRTIO 1.2 §5.1.6).</summary>
/// <param name="NeedsChecksum">A partial checksum stands at <paramref name="ChecksumStart"/> + <paramref name="ChecksumOffset"/>.</param>
/// <param name="ChecksumStart">Where summing starts.</param>
/// <param name="ChecksumOffset">Where the sum goes, from there.</param>
/// <param name="SegmentKind">0 none, 1 TCPv4, 4 TCPv6 (VIRTIO_NET_HDR_GSO_*).</param>
/// <param name="SegmentBytes">Payload per segment.</param>
/// <param name="HeaderBytes">Length of all headers.</param>
public readonly record struct NetOffload(
    bool NeedsChecksum, ushort ChecksumStart, ushort ChecksumOffset, byte SegmentKind, ushort SegmentBytes, ushort HeaderBytes);

/// <summary>The device side of a network link.</summary>
public interface INetReceiver
{
    /// <summary>Takes an Ethernet frame. False when there is no buffer: the back end keeps or drops it.</summary>
    bool TryReceive(ReadOnlySpan<byte> frame, in NetOffload offload);

    /// <summary>
    /// True while frames with partial checksums and large TCP segments are welcome; others are taken too, but at the cost
    /// of finishing them. Any thread; may change when a driver comes or goes.
    /// </summary>
    bool TakesOffload => false;
}

/// <summary>A network on the host.</summary>
public interface INetBackend : IDisposable
{
    /// <summary>It takes and gives frames with partial checksums and TCP segments up to 64 KiB.</summary>
    bool CanOffload { get; }

    /// <summary>Sends an Ethernet frame without FCS. Never blocks; may drop.</summary>
    void Send(ReadOnlySpan<byte> frame, in NetOffload offload);

    /// <summary>Says who takes frames. Once, before the machine runs.</summary>
    void Attach(INetReceiver receiver);

    /// <summary>The receiver has buffers again.</summary>
    void ResumeReceive();
}

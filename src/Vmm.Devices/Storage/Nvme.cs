// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Text;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Pci;

namespace Vmm.Devices.Storage;

// Theory. An NVMe 1.4 controller with one namespace. Software puts 64-byte commands into submission queues in its own
// memory and rings a doorbell; results come back as 16-byte entries in completion queues, with a phase bit that flips
// each time around, and an MSI-X message (or INTx) per completion queue.
//
// Doorbells are the hot path: a write fetches every command up to the new tail, turns reads and writes into one request
// to the back end each, straight into guest memory, and leaves. Completions are posted by the back end's threads.
// When a completion queue is full its submission queues wait; a write to the completion doorbell goes on.
//
// Every command is copied out once and then checked. PRP lists are followed for at most the transfer's length, which is
// bounded by MDTS (2 MiB), so a list that points to itself ends. What a guest gets wrong is answered by a status code
// (§4.6.1); only rubbish in queue registers or doorbells is fatal to the controller (CSTS.CFS) or reported as an
// asynchronous event, as the specification has it.
//
// Disabling the controller or deleting a queue while the host works on guest memory waits: CSTS.RDY stays set until the
// last request has ended; a deletion is answered when the commands of the queue have been.
//
// Locks: one gate. Requests are submitted after it was left; messages are sent under it.
//
// Sections refer to NVM Express 1.4b. Not offered: SGLs, metadata, multiple namespaces, firmware update, reservations.

/// <summary>An NVMe controller with one namespace.</summary>
public sealed class Nvme : PciFunction
{
    /// <summary>Most I/O queue pairs.</summary>
    public const int MaxQueuePairs = 16;

    private const int MaxEntries = 1024;
    private const int MaxEvents = 4;
    private const int MaxInFlight = 1024;
    private const int PageBytes = 4096;
    private const int MaxTransferLog2 = 9;
    private const uint Later = uint.MaxValue;
    private const uint InvalidField = 0x4002;
    private const uint StatusReady = 1;
    private const uint StatusFatal = 2;

    private readonly Lock _gate = new();
    private readonly IBlockBackend _backend;
    private readonly string _serial;
    private readonly SubmissionQueue?[] _submissions = new SubmissionQueue?[MaxQueuePairs + 1];
    private readonly CompletionQueue?[] _completions = new CompletionQueue?[MaxQueuePairs + 1];
    private readonly uint[] _features = new uint[16];
    private readonly ushort[] _events = new ushort[MaxEvents];
    private readonly byte[] _vectorSettings = new byte[MaxQueuePairs + 1];
    private Transfer? _free;
    private int _generation;
    private int _eventCount;
    private uint _pendingEvent;
    private bool _hasPendingEvent;
    private int _inFlight;
    private uint _configuration;
    private uint _status;
    private uint _interruptMask;
    private uint _queueAttributes;
    private ulong _submissionBase;
    private ulong _completionBase;
    private bool _isDisabling;
    private long _badCommands;
    private ulong _bytesRead;
    private ulong _bytesWritten;
    private ulong _reads;
    private ulong _writes;

    /// <summary>Makes a controller.</summary>
    /// <param name="id">See <see cref="IDevice.Id"/>.</param>
    /// <param name="backend">The image; owned by the caller.</param>
    /// <param name="serial">At most 20 ASCII characters.</param>
    public Nvme(string id, IBlockBackend backend, string serial)
        : base(id, new PciIdentity(0x1B36, 0x0010, 0x01_08_02, 0x02, 0x1AF4, 0x1100))
    {
        ArgumentNullException.ThrowIfNull(backend);
        _backend = backend;
        _serial = serial;
        UseIntx();
        AddBar(0, PciBarKind.Memory64, new Window(this));
        _ = UseMsiX(MaxQueuePairs + 1, 4);
    }

    /// <inheritdoc/>
    public override int StateVersion => 1;

    /// <summary>Commands that were answered with an error because the guest got them wrong.</summary>
    public long BadCommands => Interlocked.Read(ref _badCommands);

    // CAP (§3.1.1): 1024 entries, contiguous queues, no timeout problem (20 s), stride 4, NVM command set, 4 KiB pages.
    private static ulong Capabilities => (MaxEntries - 1) | (1UL << 16) | (40UL << 24) | (1UL << 37);

    private bool IsReady => (_status & StatusReady) != 0;

    private long Blocks => _backend.LengthBytes / 512;

    /// <inheritdoc/>
    public override void Pause() => _backend.Drain();

    /// <inheritdoc/>
    protected override void ResetCard()
    {
        lock (_gate)
        {
            AbandonAll();
            ResetController();
            _queueAttributes = 0;
            _submissionBase = 0;
            _completionBase = 0;
            _configuration = 0;
        }
    }

    /// <inheritdoc/>
    protected override void SaveCard(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_gate)
        {
            writer.Write("configuration", _configuration);
            writer.Write("status", _status);
            writer.Write("mask", _interruptMask);
            writer.Write("attributes", _queueAttributes);
            writer.Write("asq", _submissionBase);
            writer.Write("acq", _completionBase);
            writer.Write("event", _pendingEvent);
            writer.Write("hasEvent", _hasPendingEvent);
            writer.Write("events", (ulong)_eventCount);
            for (int i = 0; i < _eventCount; i++)
            {
                writer.Write($"event{i}", _events[i]);
            }

            for (int i = 0; i < _features.Length; i++)
            {
                writer.Write($"feature{i}", _features[i]);
            }

            writer.WriteBytes("vectors", _vectorSettings);
            for (int i = 0; i <= MaxQueuePairs; i++)
            {
                SaveQueues(writer, i);
            }
        }
    }

    /// <inheritdoc/>
    protected override void LoadCard(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_gate)
        {
            AbandonAll();
            ResetController();
            _configuration = reader.ReadUInt32("configuration");
            _status = reader.ReadUInt32("status") & 0xF;
            _interruptMask = reader.ReadUInt32("mask");
            _queueAttributes = reader.ReadUInt32("attributes");
            _submissionBase = reader.ReadUInt64("asq");
            _completionBase = reader.ReadUInt64("acq");
            _pendingEvent = reader.ReadUInt32("event");
            _hasPendingEvent = reader.ReadBoolean("hasEvent");
            _eventCount = (int)reader.ReadBounded("events", MaxEvents);
            for (int i = 0; i < _eventCount; i++)
            {
                _events[i] = reader.ReadUInt16($"event{i}");
            }

            for (int i = 0; i < _features.Length; i++)
            {
                _features[i] = reader.ReadUInt32($"feature{i}");
            }

            reader.ReadBytes("vectors", _vectorSettings);
            for (int i = 0; i <= MaxQueuePairs; i++)
            {
                LoadQueues(reader, i);
            }

            foreach (SubmissionQueue? queue in _submissions)
            {
                if (queue is not null && (_completions[queue.Completion] is null || (queue.Id == 0) != (queue.Completion == 0)))
                {
                    throw new StateException($"{reader.Section}.sq{queue.Id}: its completion queue is missing");
                }
            }

            DriveIntx();
        }
    }

    private void SaveQueues(StateWriter writer, int i)
    {
        if (_submissions[i] is { } submission)
        {
            writer.Write($"sq{i}.base", submission.Base);
            writer.Write($"sq{i}.entries", (ulong)submission.Entries);
            writer.Write($"sq{i}.head", (ulong)submission.Head);
            writer.Write($"sq{i}.tail", (ulong)submission.Tail);
            writer.Write($"sq{i}.cq", (ulong)submission.Completion);
        }

        if (_completions[i] is { } completion)
        {
            writer.Write($"cq{i}.base", completion.Base);
            writer.Write($"cq{i}.entries", (ulong)completion.Entries);
            writer.Write($"cq{i}.head", (ulong)completion.Head);
            writer.Write($"cq{i}.tail", (ulong)completion.Tail);
            writer.Write($"cq{i}.phase", completion.Phase);
            writer.Write($"cq{i}.vector", (ulong)completion.Vector);
            writer.Write($"cq{i}.interrupts", completion.HasInterrupts);
        }
    }

    private void LoadQueues(StateReader reader, int i)
    {
        if (reader.Has($"sq{i}.base"))
        {
            int entries = (int)Math.Max(2, reader.ReadBounded($"sq{i}.entries", 4096));
            ulong last = (ulong)Math.Max(entries - 1, 0);
            _submissions[i] = new SubmissionQueue(
                i, reader.ReadUInt64($"sq{i}.base"), entries, (int)reader.ReadBounded($"sq{i}.cq", MaxQueuePairs))
            {
                Head = (int)reader.ReadBounded($"sq{i}.head", last),
                Tail = (int)reader.ReadBounded($"sq{i}.tail", last),
            };
        }

        if (reader.Has($"cq{i}.base"))
        {
            int entries = (int)Math.Max(2, reader.ReadBounded($"cq{i}.entries", 4096));
            ulong last = (ulong)Math.Max(entries - 1, 0);
            _completions[i] = new CompletionQueue(
                i,
                reader.ReadUInt64($"cq{i}.base"),
                entries,
                (int)reader.ReadBounded($"cq{i}.vector", MaxQueuePairs),
                reader.ReadBoolean($"cq{i}.interrupts"))
            {
                Head = (int)reader.ReadBounded($"cq{i}.head", last),
                Tail = (int)reader.ReadBounded($"cq{i}.tail", last),
                Phase = reader.ReadBoolean($"cq{i}.phase"),
            };
        }
    }

    private uint ReadRegister(uint offset) => offset switch
    {
        0x00 => (uint)Capabilities,
        0x04 => (uint)(Capabilities >> 32),
        0x08 => 0x0001_0400,
        0x0C or 0x10 => _interruptMask,
        0x14 => _configuration,
        0x1C => _status,
        0x24 => _queueAttributes,
        0x28 => (uint)_submissionBase,
        0x2C => (uint)(_submissionBase >> 32),
        0x30 => (uint)_completionBase,
        0x34 => (uint)(_completionBase >> 32),
        _ => 0,
    };

    private void WriteRegister(uint offset, uint value, ref StorageSubmission submit)
    {
        if (offset >= 0x1000)
        {
            WriteDoorbell((int)(offset - 0x1000) / 4, value, ref submit);
            return;
        }

        switch (offset)
        {
            case 0x0C:
                _interruptMask |= value;
                DriveIntx();
                break;
            case 0x10:
                _interruptMask &= ~value;
                DriveIntx();
                break;
            case 0x14:
                WriteConfiguration(value);
                break;
            case 0x24:
                _queueAttributes = value & 0x0FFF_0FFF;
                break;
            case 0x28:
                _submissionBase = (_submissionBase & 0xFFFF_FFFF_0000_0000) | (value & 0xFFFF_F000);
                break;
            case 0x2C:
                _submissionBase = (_submissionBase & 0xFFFF_FFFF) | ((ulong)value << 32);
                break;
            case 0x30:
                _completionBase = (_completionBase & 0xFFFF_FFFF_0000_0000) | (value & 0xFFFF_F000);
                break;
            case 0x34:
                _completionBase = (_completionBase & 0xFFFF_FFFF) | ((ulong)value << 32);
                break;
            default:
                break;
        }
    }

    // CC (§3.1.5): enable, command set, page size, shutdown, entry sizes.
    private void WriteConfiguration(uint value)
    {
        uint before = _configuration;
        _configuration = value & 0x00FF_FFF1;
        if ((value & 1) != 0 && (before & 1) == 0)
        {
            Enable();
        }
        else if ((value & 1) == 0 && (before & 1) != 0)
        {
            _isDisabling = true;
            Settle();
        }

        uint shutdown = (value >> 14) & 3;
        if (shutdown != 0)
        {
            // Shutdown processing complete: what was acknowledged is the back end's to keep (§7.6.2); the write cache
            // is flushed by the software before that.
            _status = (_status & ~0xCu) | (2u << 2);
        }
        else
        {
            _status &= ~0xCu;
        }
    }

    private void Enable()
    {
        int submissionEntries = (int)(_queueAttributes & 0xFFF) + 1;
        int completionEntries = (int)((_queueAttributes >> 16) & 0xFFF) + 1;
        bool isGood = !_isDisabling && ((_configuration >> 7) & 0xF) == 0 && ((_configuration >> 4) & 7) == 0
            && submissionEntries >= 2 && completionEntries >= 2;
        if (!isGood)
        {
            _status |= StatusFatal;
            return;
        }

        _submissions[0] = new SubmissionQueue(0, _submissionBase, submissionEntries, 0);
        _completions[0] = new CompletionQueue(0, _completionBase, completionEntries, 0, hasInterrupts: true);
        _status = StatusReady;
    }

    // What waits for the last request happens when there is none.
    private void Settle()
    {
        if (_isDisabling && _inFlight == 0)
        {
            ResetController();
        }
    }

    // A controller reset (§7.3.2): queues go, the admin queue registers and MSI-X stay.
    private void ResetController()
    {
        Array.Clear(_submissions);
        Array.Clear(_completions);
        Array.Clear(_features);
        Array.Clear(_vectorSettings);
        _features[6] = 1;
        _features[7] = (MaxQueuePairs - 1) | ((MaxQueuePairs - 1) << 16);
        _features[4] = 0x0157;
        _eventCount = 0;
        _hasPendingEvent = false;
        _interruptMask = 0;
        _status = 0;
        _isDisabling = false;
        DriveIntx();
    }

    private void AbandonAll()
    {
        // Requests under way belong to another life: they find another generation when they end.
        _generation++;
        _inFlight = 0;
        _free = null;
    }

    private void WriteDoorbell(int index, uint value, ref StorageSubmission submit)
    {
        int id = index >> 1;
        if (!IsReady || _isDisabling || id > MaxQueuePairs)
        {
            return;
        }

        if ((index & 1) == 0)
        {
            if (_submissions[id] is not { } queue)
            {
                ReportEvent(0x0001_0000, isQueueError: true);
                return;
            }

            if (value >= queue.Entries)
            {
                // Invalid doorbell write value (§5.2.1, error status 01h).
                ReportEvent(0x0001_0100, isQueueError: true);
                return;
            }

            queue.Tail = (int)value;
            Fetch(queue, ref submit);
            return;
        }

        if (_completions[id] is not { } completion)
        {
            ReportEvent(0x0001_0000, isQueueError: true);
            return;
        }

        if (value >= completion.Entries)
        {
            ReportEvent(0x0001_0100, isQueueError: true);
            return;
        }

        completion.Head = (int)value;
        DriveIntx();
        foreach (SubmissionQueue? queue in _submissions)
        {
            if (queue is not null && queue.Completion == id)
            {
                Fetch(queue, ref submit);
            }
        }
    }

    // Takes commands while there is room for their answers.
    private void Fetch(SubmissionQueue queue, ref StorageSubmission submit)
    {
        CompletionQueue completion = _completions[queue.Completion]!;
        Span<byte> command = stackalloc byte[64];
        while (queue.Head != queue.Tail && !queue.IsDeleted && IsReady && !_isDisabling && _inFlight < MaxInFlight)
        {
            int used = (completion.Tail - completion.Head + completion.Entries) % completion.Entries;
            if (used + completion.Reserved >= completion.Entries - 1)
            {
                return;
            }

            if (!Dma.TryRead(queue.Base + ((ulong)queue.Head * 64), command))
            {
                _status |= StatusFatal;
                return;
            }

            queue.Head = queue.Head + 1 == queue.Entries ? 0 : queue.Head + 1;
            ushort commandId = BinaryPrimitives.ReadUInt16LittleEndian(command[2..]);
            if (queue.Id == 0)
            {
                Admin(queue, commandId, command);
            }
            else
            {
                Io(queue, commandId, command, ref submit);
            }
        }
    }

    private void Post(SubmissionQueue queue, ushort commandId, uint status, uint result = 0)
    {
        if (_completions[queue.Completion] is not { } completion)
        {
            return;
        }

        if (status != 0)
        {
            Interlocked.Increment(ref _badCommands);
        }

        Span<byte> entry = stackalloc byte[16];
        BinaryPrimitives.WriteUInt32LittleEndian(entry, result);
        BinaryPrimitives.WriteUInt32LittleEndian(entry[4..], 0);
        BinaryPrimitives.WriteUInt16LittleEndian(entry[8..], (ushort)queue.Head);
        BinaryPrimitives.WriteUInt16LittleEndian(entry[10..], (ushort)queue.Id);
        BinaryPrimitives.WriteUInt16LittleEndian(entry[12..], commandId);
        BinaryPrimitives.WriteUInt16LittleEndian(
            entry[14..], (ushort)((status << 1) | (completion.Phase ? 1u : 0)));
        if (!Dma.TryWrite(completion.Base + ((ulong)completion.Tail * 16), entry))
        {
            _status |= StatusFatal;
            return;
        }

        completion.Tail++;
        if (completion.Tail == completion.Entries)
        {
            completion.Tail = 0;
            completion.Phase = !completion.Phase;
        }

        if (completion.HasInterrupts)
        {
            if (MsiX is { IsEnabled: true } msiX)
            {
                msiX.Send(completion.Vector);
            }
            else
            {
                DriveIntx();
            }
        }
    }

    // The pin is up while a queue with vector 0 holds something that was not taken and the vector is not masked
    // (§7.5.1.1; without MSI-X there is only vector 0).
    private void DriveIntx()
    {
        bool isWanted = false;
        foreach (CompletionQueue? queue in _completions)
        {
            isWanted |= queue is { HasInterrupts: true } && queue.Head != queue.Tail;
        }

        Intx.Set(isWanted && (_interruptMask & 1) == 0 && MsiX is not { IsEnabled: true });
    }

    private void ReportEvent(uint information, bool isQueueError)
    {
        // One outstanding notice: a second of the same kind adds nothing until the first was fetched.
        if (_hasPendingEvent && isQueueError)
        {
            return;
        }

        _pendingEvent = information;
        _hasPendingEvent = true;
        DeliverEvent();
    }

    private void DeliverEvent()
    {
        if (!_hasPendingEvent || _eventCount == 0 || _submissions[0] is not { } admin)
        {
            return;
        }

        CompletionQueue completion = _completions[0]!;
        int used = (completion.Tail - completion.Head + completion.Entries) % completion.Entries;
        if (used >= completion.Entries - 1)
        {
            return;
        }

        _hasPendingEvent = false;
        Post(admin, _events[--_eventCount], 0, _pendingEvent);
    }

    private void Admin(SubmissionQueue queue, ushort id, ReadOnlySpan<byte> command)
    {
        uint result = 0;
        uint status;
        uint dword10 = Dword(command, 10);
        uint dword11 = Dword(command, 11);
        switch (command[0])
        {
            case 0x00:
                status = DeleteSubmissionQueue((int)(dword10 & 0xFFFF), queue, id);
                break;
            case 0x01:
                status = CreateSubmissionQueue(command, dword10, dword11);
                break;
            case 0x02:
                status = GetLogPage(command, dword10);
                break;
            case 0x04:
                status = DeleteCompletionQueue((int)(dword10 & 0xFFFF));
                break;
            case 0x05:
                status = CreateCompletionQueue(command, dword10, dword11);
                break;
            case 0x06:
                status = Identify(command, dword10);
                break;
            case 0x08:
                // Abort (§5.1): best effort; bit 0 says that it was not aborted.
                result = 1;
                status = 0;
                break;
            case 0x09:
                status = SetFeature(command, dword10, dword11, out result);
                break;
            case 0x0A:
                status = GetFeature(command, dword10, out result);
                break;
            case 0x0C:
                if (_eventCount == MaxEvents)
                {
                    // Asynchronous event request limit exceeded.
                    status = 0x105;
                    break;
                }

                _events[_eventCount++] = id;
                DeliverEvent();
                return;
            default:
                status = 0x4001;
                break;
        }

        if (status != Later)
        {
            Post(queue, id, status, result);
        }
    }

    private uint CreateCompletionQueue(ReadOnlySpan<byte> command, uint dword10, uint dword11)
    {
        int id = (int)(dword10 & 0xFFFF);
        int entries = (int)(dword10 >> 16) + 1;
        int vector = (int)(dword11 >> 16);
        ulong address = BinaryPrimitives.ReadUInt64LittleEndian(command[24..]);
        if (id is 0 or > MaxQueuePairs || _completions[id] is not null)
        {
            return 0x4101;
        }

        if (entries is < 2 or > MaxEntries)
        {
            return 0x4102;
        }

        if (vector > MaxQueuePairs)
        {
            return 0x4108;
        }

        if ((dword11 & 1) == 0 || (address & (PageBytes - 1)) != 0)
        {
            return InvalidField;
        }

        _completions[id] = new CompletionQueue(id, address, entries, vector, (dword11 & 2) != 0);
        return 0;
    }

    private uint CreateSubmissionQueue(ReadOnlySpan<byte> command, uint dword10, uint dword11)
    {
        int id = (int)(dword10 & 0xFFFF);
        int entries = (int)(dword10 >> 16) + 1;
        int completion = (int)(dword11 >> 16);
        ulong address = BinaryPrimitives.ReadUInt64LittleEndian(command[24..]);
        if (id is 0 or > MaxQueuePairs || _submissions[id] is not null)
        {
            return 0x4101;
        }

        if (completion is 0 or > MaxQueuePairs || _completions[completion] is null)
        {
            return 0x4100;
        }

        if (entries is < 2 or > MaxEntries)
        {
            return 0x4102;
        }

        if ((dword11 & 1) == 0 || (address & (PageBytes - 1)) != 0)
        {
            return InvalidField;
        }

        _submissions[id] = new SubmissionQueue(id, address, entries, completion);
        return 0;
    }

    private uint DeleteSubmissionQueue(int id, SubmissionQueue admin, ushort commandId)
    {
        if (id is 0 or > MaxQueuePairs || _submissions[id] is not { } queue || queue.IsDeleted)
        {
            return 0x4101;
        }

        queue.IsDeleted = true;
        if (queue.InFlight > 0)
        {
            // Answered when its commands have been (§5.6). The answer's place is kept free meanwhile.
            queue.DeletedBy = commandId;
            _completions[admin.Completion]!.Reserved++;
            return Later;
        }

        _submissions[id] = null;
        return 0;
    }

    private uint DeleteCompletionQueue(int id)
    {
        if (id is 0 or > MaxQueuePairs || _completions[id] is null)
        {
            return 0x4101;
        }

        if (Array.Exists(_submissions, queue => queue is not null && queue.Completion == id))
        {
            return 0x410C;
        }

        _completions[id] = null;
        DriveIntx();
        return 0;
    }

    // Error information, SMART, firmware slot (§5.14): empty but well-formed.
    private uint GetLogPage(ReadOnlySpan<byte> command, uint dword10)
    {
        int page = (int)(dword10 & 0xFF);
        long length = ((long)(dword10 >> 16) + 1 + ((long)(Dword(command, 11) & 0xFFFF) << 16)) * 4;
        ulong offset = Dword(command, 12) | ((ulong)Dword(command, 13) << 32);
        byte[] data;
        switch (page)
        {
            case 0x01:
                data = new byte[64 * 4];
                break;
            case 0x02:
                data = SmartLog();
                break;
            case 0x03:
                data = new byte[512];
                data[0] = 1;
                Encoding.ASCII.GetBytes("1.0     ").CopyTo(data, 8);
                break;
            default:
                return 0x4109;
        }

        if (offset > (ulong)data.Length || (offset & 3) != 0)
        {
            return InvalidField;
        }

        int take = (int)Math.Min(length, data.Length - (long)offset);
        return Send(command, data.AsSpan((int)offset, take));
    }

    private byte[] SmartLog()
    {
        byte[] data = new byte[512];
        BinaryPrimitives.WriteUInt16LittleEndian(data.AsSpan(1), 310);
        data[3] = 100;
        data[4] = 10;
        BinaryPrimitives.WriteUInt64LittleEndian(data.AsSpan(32), (_bytesRead + 511_999) / 512_000);
        BinaryPrimitives.WriteUInt64LittleEndian(data.AsSpan(48), (_bytesWritten + 511_999) / 512_000);
        BinaryPrimitives.WriteUInt64LittleEndian(data.AsSpan(64), _reads);
        BinaryPrimitives.WriteUInt64LittleEndian(data.AsSpan(80), _writes);
        return data;
    }

    // Identify (§5.15): controller, namespace, active namespaces, namespace descriptors.
    private uint Identify(ReadOnlySpan<byte> command, uint dword10)
    {
        uint space = Dword(command, 1);
        byte[] data = new byte[4096];
        switch (dword10 & 0xFF)
        {
            case 0x00:
                if (space is 0 || (space > 1 && space != uint.MaxValue))
                {
                    return 0x400B;
                }

                IdentifyNamespace(data);
                break;
            case 0x01:
                IdentifyController(data);
                break;
            case 0x02:
                if (space >= 0xFFFF_FFFE)
                {
                    return 0x400B;
                }

                BinaryPrimitives.WriteUInt32LittleEndian(data, space == 0 ? 1u : 0u);
                break;
            case 0x03:
                if (space != 1)
                {
                    return 0x400B;
                }

                // One descriptor: an NGUID made of the serial number.
                data[0] = 2;
                data[1] = 16;
                NamespaceGuid().CopyTo(data, 4);
                break;
            default:
                return InvalidField;
        }

        return Send(command, data);
    }

    private byte[] NamespaceGuid()
    {
        byte[] guid = new byte[16];
        byte[] text = Encoding.ASCII.GetBytes(_serial);
        text.AsSpan(0, Math.Min(text.Length, 16)).CopyTo(guid);
        return guid;
    }

    private void IdentifyController(Span<byte> data)
    {
        BinaryPrimitives.WriteUInt16LittleEndian(data, 0x1B36);
        BinaryPrimitives.WriteUInt16LittleEndian(data[2..], 0x1AF4);
        PutText(data.Slice(4, 20), _serial);
        PutText(data.Slice(24, 40), "VMM NVMe");
        PutText(data.Slice(64, 8), "1.0");
        data[72] = 6;
        data[77] = MaxTransferLog2;
        BinaryPrimitives.WriteUInt16LittleEndian(data[78..], 1);
        BinaryPrimitives.WriteUInt32LittleEndian(data[80..], 0x0001_0400);
        data[111] = 1;
        data[258] = 3;
        data[259] = MaxEvents - 1;
        data[260] = 0x03;
        data[261] = 0x04;
        data[262] = 3;
        BinaryPrimitives.WriteUInt16LittleEndian(data[266..], 343);
        BinaryPrimitives.WriteUInt16LittleEndian(data[268..], 373);
        data[512] = 0x66;
        data[513] = 0x44;
        BinaryPrimitives.WriteUInt16LittleEndian(data[514..], MaxInFlight);
        BinaryPrimitives.WriteUInt32LittleEndian(data[516..], 1);

        // Dataset management, write zeroes, verify is not; a volatile write cache; writes of one block are atomic.
        BinaryPrimitives.WriteUInt16LittleEndian(data[520..], (1 << 2) | (1 << 3));
        data[525] = 1;
        Encoding.ASCII.GetBytes($"nqn.2014-08.org.nvmexpress:vmm:{_serial}").CopyTo(data[768..]);
        BinaryPrimitives.WriteUInt16LittleEndian(data[2048..], 2500);
    }

    private void IdentifyNamespace(Span<byte> data)
    {
        BinaryPrimitives.WriteInt64LittleEndian(data, Blocks);
        BinaryPrimitives.WriteInt64LittleEndian(data[8..], Blocks);
        BinaryPrimitives.WriteInt64LittleEndian(data[16..], Blocks);

        // Thin provisioning when discards work; optimal I/O sizes are given.
        data[24] = (byte)((_backend.CanDiscard ? 1 : 0) | (1 << 4));
        data[25] = 0;
        data[26] = 0;
        int optimal = Math.Max(_backend.BlockBytes / 512, 1) - 1;
        for (int at = 64; at <= 72; at += 2)
        {
            BinaryPrimitives.WriteUInt16LittleEndian(data[at..], (ushort)Math.Min(optimal, 65535));
        }

        data[99] = _backend.IsReadOnly ? (byte)1 : (byte)0;
        NamespaceGuid().CopyTo(data[104..]);
        data[130] = 9;
    }

    private static void PutText(Span<byte> field, string text)
    {
        field.Fill((byte)' ');
        for (int i = 0; i < Math.Min(field.Length, text.Length); i++)
        {
            field[i] = text[i] is >= ' ' and <= '~' ? (byte)text[i] : (byte)'?';
        }
    }

    private uint SetFeature(ReadOnlySpan<byte> command, uint dword10, uint dword11, out uint result)
    {
        result = 0;
        int feature = (int)(dword10 & 0xFF);
        if ((dword10 & 0x8000_0000) != 0)
        {
            // Saving is not supported (§5.21, status 0Dh).
            return 0x410D;
        }

        switch (feature)
        {
            case 0x01 or 0x02 or 0x05 or 0x08 or 0x0A or 0x0B:
                _features[feature] = dword11;
                return 0;
            case 0x04:
                _features[feature] = dword11;
                return 0;
            case 0x06:
                _features[feature] = dword11 & 1;
                return 0;
            case 0x07:
                if ((dword11 & 0xFFFF) == 0xFFFF || dword11 >> 16 == 0xFFFF)
                {
                    return InvalidField;
                }

                uint submissions = Math.Min(dword11 & 0xFFFF, MaxQueuePairs - 1);
                uint completions = Math.Min(dword11 >> 16, MaxQueuePairs - 1);
                result = submissions | (completions << 16);
                _features[7] = result;
                return 0;
            case 0x09:
                int vector = (int)(dword11 & 0xFFFF);
                if (vector > MaxQueuePairs)
                {
                    return InvalidField;
                }

                _vectorSettings[vector] = (byte)((dword11 >> 16) & 1);
                return 0;
            default:
                return InvalidField;
        }
    }

    private uint GetFeature(ReadOnlySpan<byte> command, uint dword10, out uint result)
    {
        result = 0;
        int feature = (int)(dword10 & 0xFF);
        int select = (int)((dword10 >> 8) & 7);
        if (feature is not (0x01 or 0x02 or 0x04 or 0x05 or 0x06 or 0x07 or 0x08 or 0x09 or 0x0A or 0x0B))
        {
            return InvalidField;
        }

        if (select == 3)
        {
            // Supported capabilities: changeable, not saveable, not per namespace.
            result = 4;
            return 0;
        }

        if (feature == 0x09)
        {
            int vector = (int)(Dword(command, 11) & 0xFFFF);
            if (vector > MaxQueuePairs)
            {
                return InvalidField;
            }

            result = (uint)vector | ((uint)_vectorSettings[vector] << 16);
            return 0;
        }

        result = _features[feature];
        return 0;
    }

    private void Io(SubmissionQueue queue, ushort id, ReadOnlySpan<byte> command, ref StorageSubmission submit)
    {
        byte code = command[0];
        uint space = Dword(command, 1);
        bool isAll = space == uint.MaxValue && code == 0x00;
        if (space != 1 && !isAll)
        {
            Post(queue, id, 0x400B);
            return;
        }

        Transfer transfer = Rent();
        transfer.Queue = queue;
        transfer.CommandId = id;
        uint status = code switch
        {
            0x00 => PrepareFlush(transfer),
            0x01 or 0x02 => PrepareData(transfer, command, code == 0x02),
            0x08 => PrepareZeroes(transfer, command),
            0x09 => PrepareManagement(transfer, command),
            _ => 0x4001,
        };
        if (status != 0 || transfer.IsNothing)
        {
            transfer.IsNothing = false;
            Return(transfer);
            Post(queue, id, status);
            return;
        }

        _inFlight++;
        queue.InFlight++;
        _completions[queue.Completion]!.Reserved++;
        transfer.Backend = _backend;
        submit.Add(transfer);
    }

    private static uint PrepareFlush(Transfer transfer)
    {
        transfer.Operation = BlockOperation.Flush;
        transfer.OffsetBytes = 0;
        transfer.LengthBytes = 0;
        transfer.SliceCount = 0;
        return 0;
    }

    private bool TryRange(ulong first, long count, out long offset)
    {
        offset = (long)(first * 512);
        return count <= Blocks && first <= (ulong)(Blocks - count);
    }

    private uint PrepareData(Transfer transfer, ReadOnlySpan<byte> command, bool isRead)
    {
        ulong first = Dword(command, 10) | ((ulong)Dword(command, 11) << 32);
        uint dword12 = Dword(command, 12);
        int blocks = (int)(dword12 & 0xFFFF) + 1;
        if (!TryRange(first, blocks, out long offset))
        {
            return 0x4080;
        }

        if (!isRead && _backend.IsReadOnly)
        {
            return 0x4182;
        }

        int length = blocks * 512;
        if ((command[1] & 0xC0) != 0 || length > PageBytes << MaxTransferLog2)
        {
            return InvalidField;
        }

        uint status = ReadPrps(transfer.List, command, length);
        if (status != 0)
        {
            return status;
        }

        if (!transfer.List.TryResolve(Dma, isRead))
        {
            return 0x4004;
        }

        transfer.Operation = isRead ? BlockOperation.Read : BlockOperation.Write;
        transfer.OffsetBytes = offset;
        transfer.LengthBytes = length;
        transfer.Slices = transfer.List.Slices;
        transfer.SliceCount = transfer.List.SliceCount;
        bool isForced = (dword12 & 0x4000_0000) != 0 || (_features[6] & 1) == 0;
        transfer.ForceUnitAccess = !isRead && isForced;
        return 0;
    }

    private uint PrepareZeroes(Transfer transfer, ReadOnlySpan<byte> command)
    {
        ulong first = Dword(command, 10) | ((ulong)Dword(command, 11) << 32);
        uint dword12 = Dword(command, 12);
        long blocks = (dword12 & 0xFFFF) + 1;
        if (!TryRange(first, blocks, out long offset))
        {
            return 0x4080;
        }

        if (_backend.IsReadOnly)
        {
            return 0x4182;
        }

        transfer.Operation = BlockOperation.WriteZeroes;
        transfer.OffsetBytes = offset;
        transfer.LengthBytes = blocks * 512;
        transfer.SliceCount = 0;
        transfer.MayUnmap = (dword12 & 0x0200_0000) != 0;
        transfer.ForceUnitAccess = (dword12 & 0x4000_0000) != 0 || (_features[6] & 1) == 0;
        return 0;
    }

    // Dataset management (§6.7): up to 256 ranges; only deallocation does something.
    private uint PrepareManagement(Transfer transfer, ReadOnlySpan<byte> command)
    {
        int ranges = (int)(Dword(command, 10) & 0xFF) + 1;
        bool isDeallocate = (Dword(command, 11) & 4) != 0;
        if (_backend.IsReadOnly && isDeallocate)
        {
            return 0x4182;
        }

        uint status = ReadPrps(transfer.List, command, ranges * 16);
        if (status != 0)
        {
            return status;
        }

        byte[] raw = new byte[ranges * 16];
        if (!transfer.List.TryGather(Dma, raw))
        {
            return 0x4004;
        }

        for (int i = 0; i < ranges; i++)
        {
            long blocks = BinaryPrimitives.ReadUInt32LittleEndian(raw.AsSpan((i * 16) + 4));
            ulong first = BinaryPrimitives.ReadUInt64LittleEndian(raw.AsSpan((i * 16) + 8));
            if (!TryRange(first, blocks, out _))
            {
                return 0x4080;
            }
        }

        transfer.Ranges = raw;
        transfer.NextRange = 0;
        transfer.IsNothing = !isDeallocate || !NextRange(transfer);
        return 0;
    }

    private static bool NextRange(Transfer transfer)
    {
        while (transfer.Ranges is { } ranges && transfer.NextRange < ranges.Length)
        {
            int at = transfer.NextRange;
            transfer.NextRange += 16;
            long blocks = BinaryPrimitives.ReadUInt32LittleEndian(ranges.AsSpan(at + 4));
            if (blocks > 0)
            {
                transfer.Operation = BlockOperation.Discard;
                transfer.OffsetBytes = BinaryPrimitives.ReadInt64LittleEndian(ranges.AsSpan(at + 8)) * 512;
                transfer.LengthBytes = blocks * 512;
                transfer.SliceCount = 0;
                transfer.MayUnmap = true;
                return true;
            }
        }

        transfer.Ranges = null;
        return false;
    }

    private uint Send(ReadOnlySpan<byte> command, ReadOnlySpan<byte> data)
    {
        var list = new ScatterList();
        uint status = ReadPrps(list, command, data.Length);
        if (status != 0)
        {
            return status;
        }

        return list.TryScatter(Dma, data) ? 0 : 0x4004u;
    }

    // Physical region pages (§4.3): the first may begin inside a page, the second is a page or a list of pages, whose
    // last entry points to the next list when there are more.
    private uint ReadPrps(ScatterList list, ReadOnlySpan<byte> command, int length)
    {
        const uint invalidOffset = 0x4013;
        list.Clear();
        ulong first = BinaryPrimitives.ReadUInt64LittleEndian(command[24..]);
        ulong second = BinaryPrimitives.ReadUInt64LittleEndian(command[32..]);
        if ((first & 3) != 0)
        {
            return invalidOffset;
        }

        int part = (int)Math.Min(length, PageBytes - (long)(first & (PageBytes - 1)));
        _ = list.TryAdd(first, part);
        int left = length - part;
        if (left == 0)
        {
            return 0;
        }

        if (left <= PageBytes)
        {
            if ((second & (PageBytes - 1)) != 0)
            {
                return invalidOffset;
            }

            _ = list.TryAdd(second, left);
            return 0;
        }

        if ((second & 7) != 0)
        {
            return invalidOffset;
        }

        Span<byte> entries = stackalloc byte[PageBytes];
        while (left > 0)
        {
            int room = (int)(PageBytes - (second & (PageBytes - 1))) / 8;
            int needed = (left + PageBytes - 1) / PageBytes;
            int count = Math.Min(room, needed);
            if (!Dma.TryRead(second, entries[..(count * 8)]))
            {
                return 0x4004;
            }

            bool isChained = needed > room;
            int data = isChained ? count - 1 : count;
            for (int i = 0; i < data; i++)
            {
                ulong page = BinaryPrimitives.ReadUInt64LittleEndian(entries[(i * 8)..]);
                if ((page & (PageBytes - 1)) != 0)
                {
                    return invalidOffset;
                }

                int bytes = Math.Min(left, PageBytes);
                _ = list.TryAdd(page, bytes);
                left -= bytes;
            }

            if (isChained)
            {
                ulong next = BinaryPrimitives.ReadUInt64LittleEndian(entries[((count - 1) * 8)..]);

                // A list that begins in the last entry of its page and points on makes no progress.
                if ((next & 7) != 0 || (data == 0 && (next & (PageBytes - 1)) == PageBytes - 8))
                {
                    return invalidOffset;
                }

                second = next;
            }
        }

        return 0;
    }

    private static uint Dword(ReadOnlySpan<byte> command, int index) =>
        BinaryPrimitives.ReadUInt32LittleEndian(command[(index * 4)..]);

    private Transfer Rent()
    {
        Transfer transfer = _free ?? new Transfer(this);
        _free = transfer.NextFree;
        transfer.NextFree = null;
        transfer.Generation = _generation;
        transfer.ForceUnitAccess = false;
        transfer.MayUnmap = false;
        transfer.Ranges = null;
        return transfer;
    }

    private void Return(Transfer transfer)
    {
        transfer.Queue = null;
        transfer.NextFree = _free;
        _free = transfer;
    }

    private void Take(Transfer transfer, BlockStatus status, ref StorageSubmission submit)
    {
        lock (_gate)
        {
            if (transfer.Operation == BlockOperation.Read)
            {
                transfer.List.MarkWritten(Dma);
            }

            if (transfer.Generation != _generation)
            {
                return;
            }

            if (status == BlockStatus.Ok && transfer.Operation == BlockOperation.Discard && NextRange(transfer))
            {
                submit.Add(transfer);
            }
            else
            {
                End(transfer, status, ref submit);
            }
        }
    }

    private void End(Transfer transfer, BlockStatus status, ref StorageSubmission submit)
    {
        SubmissionQueue queue = transfer.Queue!;
        _inFlight--;
        queue.InFlight--;
        CompletionQueue completion = _completions[queue.Completion]!;
        completion.Reserved--;
        if (transfer.Operation == BlockOperation.Read)
        {
            _reads++;
            _bytesRead += (ulong)transfer.LengthBytes;
        }
        else if (transfer.Operation == BlockOperation.Write)
        {
            _writes++;
            _bytesWritten += (ulong)transfer.LengthBytes;
        }

        // Unrecovered read error, write fault, capacity exceeded (§4.6.1.2, §4.6.1.2.1).
        uint code = status switch
        {
            BlockStatus.Ok => 0,
            BlockStatus.NoSpace => 0x0081,
            BlockStatus.Refused => InvalidField,
            _ => transfer.Operation == BlockOperation.Read ? 0x0281u : 0x0280u,
        };
        ushort id = transfer.CommandId;
        Return(transfer);
        if (_isDisabling)
        {
            Settle();
            return;
        }

        Post(queue, id, code);
        if (queue.IsDeleted)
        {
            if (queue.InFlight == 0)
            {
                _submissions[queue.Id] = null;
                _completions[0]!.Reserved--;
                Post(_submissions[0]!, queue.DeletedBy, 0);
            }
        }
        else if (_inFlight == MaxInFlight - 1)
        {
            foreach (SubmissionQueue? waiting in _submissions)
            {
                if (waiting is not null)
                {
                    Fetch(waiting, ref submit);
                }
            }
        }
        else
        {
            Fetch(queue, ref submit);
        }
    }

    private sealed class SubmissionQueue
    {
        public SubmissionQueue(int id, ulong address, int entries, int completion)
        {
            Id = id;
            Base = address;
            Entries = entries;
            Completion = completion;
        }

        public int Id { get; }

        public ulong Base { get; }

        public int Entries { get; }

        public int Completion { get; }

        public int Head { get; set; }

        public int Tail { get; set; }

        public int InFlight { get; set; }

        public bool IsDeleted { get; set; }

        public ushort DeletedBy { get; set; }
    }

    private sealed class CompletionQueue
    {
        public CompletionQueue(int id, ulong address, int entries, int vector, bool hasInterrupts)
        {
            Id = id;
            Base = address;
            Entries = entries;
            Vector = vector;
            HasInterrupts = hasInterrupts;
        }

        public int Id { get; }

        public ulong Base { get; }

        public int Entries { get; }

        public int Vector { get; }

        public bool HasInterrupts { get; }

        public int Head { get; set; }

        public int Tail { get; set; }

        /// <summary>Places that answers under way will need.</summary>
        public int Reserved { get; set; }

        public bool Phase { get; set; } = true;
    }

    private sealed class Transfer : StorageRequest
    {
        private readonly Nvme _owner;

        public Transfer(Nvme owner) => _owner = owner;

        public ScatterList List { get; } = new();

        public Transfer? NextFree { get; set; }

        public SubmissionQueue? Queue { get; set; }

        public ushort CommandId { get; set; }

        public int Generation { get; set; }

        public byte[]? Ranges { get; set; }

        public int NextRange { get; set; }

        /// <summary>Nothing to ask of the back end.</summary>
        public bool IsNothing { get; set; }

        protected override void Take(BlockStatus status, ref StorageSubmission submit) => _owner.Take(this, status, ref submit);
    }

    private sealed class Window : IRegisterWindow
    {
        private readonly Nvme _owner;

        public Window(Nvme owner) => _owner = owner;

        public uint Length => 0x2000;

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_owner._gate)
            {
                uint at = offset & ~3u;
                ulong value = _owner.ReadRegister(at);
                if (at + 4 < Length)
                {
                    value |= (ulong)_owner.ReadRegister(at + 4) << 32;
                }

                value >>= (int)(8 * (offset & 3));
                return width == AccessWidth.Qword ? value : value & ((1UL << (8 * (int)width)) - 1);
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            // Registers are written whole, 64-bit ones also by halves (§3.1).
            if ((offset & 3) != 0 || width < AccessWidth.Dword)
            {
                return;
            }

            StorageSubmission submit = default;
            lock (_owner._gate)
            {
                _owner.WriteRegister(offset, (uint)value, ref submit);
                if (width == AccessWidth.Qword)
                {
                    _owner.WriteRegister(offset + 4, (uint)(value >> 32), ref submit);
                }
            }

            submit.Start();
        }
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>How a virtio disk presents itself.</summary>
public sealed record VirtioBlockOptions
{
    /// <summary>Serial number, at most 20 ASCII characters (§5.2.6.1 VIRTIO_BLK_T_GET_ID).</summary>
    public string Serial { get; init; } = "";

    /// <summary>Number of request queues.</summary>
    public int Queues { get; init; } = 1;

    /// <summary>Entries per queue, a power of two.</summary>
    public ushort QueueSize { get; init; } = 256;

    /// <summary>Logical block size shown to the guest: 512 or 4096.</summary>
    public int LogicalBlockBytes { get; init; } = 512;
}

/// <summary>
/// Block device (VIRTIO 1.2 §5.2). Reads and writes go zero-copy: the back end gets the pieces of guest RAM that the
/// chain names. Requests of all queues are submitted from the worker and complete on the back end's threads, in any
/// order. Without VIRTIO_BLK_F_FLUSH, or with the write cache switched off, each write is forced to stable storage.
/// </summary>
public sealed class VirtioBlock : VirtioModel
{
    private const int HeaderBytes = 16;
    private const int SectorBytes = 512;
    private const int SegmentBytes = 16;
    private const int MaxRangeSegments = 32;
    private const uint MaxRangeSectors = 1 << 21; // 1 GiB per range
    private const int IdBytes = 20;

    private const ulong FeatureSegMax = 1UL << 2;
    private const ulong FeatureGeometry = 1UL << 4;
    private const ulong FeatureReadOnly = 1UL << 5;
    private const ulong FeatureBlockSize = 1UL << 6;
    private const ulong FeatureFlush = 1UL << 9;
    private const ulong FeatureTopology = 1UL << 10;
    private const ulong FeatureConfigWce = 1UL << 11;
    private const ulong FeatureMultiQueue = 1UL << 12;
    private const ulong FeatureDiscard = 1UL << 13;
    private const ulong FeatureWriteZeroes = 1UL << 14;

    private const byte StatusOk = 0;
    private const byte StatusIoError = 1;
    private const byte StatusUnsupported = 2;

    private const int ConfigWriteback = 32;
    private const int MaxUntoldBytes = 256 << 10;
    private const int LargeBytes = 128 << 10; // below that nobody looks whether others follow

    private readonly VirtioDiskJobs<Job> _jobs;
    private readonly IBlockBackend _backend;
    private readonly VirtioBlockOptions _options;
    private readonly ushort[] _queueSizes;
    private readonly byte[] _config = new byte[60];
    private int _inFlight;
    private int _batchThread;
    private long _batchBytes; // of the thread above
    private int _writeback = 1;
    private long _hostErrors;

    /// <summary>Makes one over a back end, which it owns.</summary>
    public VirtioBlock(IBlockBackend backend, VirtioBlockOptions? options = null)
    {
        ArgumentNullException.ThrowIfNull(backend);
        _backend = backend;
        _jobs = new VirtioDiskJobs<Job>(() => new Job(this));
        _options = options ?? new VirtioBlockOptions();
        if (_options.LogicalBlockBytes is not (512 or 4096))
        {
            throw new ArgumentOutOfRangeException(nameof(options));
        }

        _queueSizes = new ushort[Math.Clamp(_options.Queues, 1, 16)];
        Array.Fill(_queueSizes, _options.QueueSize);
        OfferedFeatures = FeatureSegMax | FeatureGeometry | FeatureBlockSize | FeatureFlush | FeatureTopology
            | FeatureConfigWce
            | (_queueSizes.Length > 1 ? FeatureMultiQueue : 0)
            | (backend.IsReadOnly ? FeatureReadOnly : FeatureWriteZeroes)
            | (backend.CanDiscard && !backend.IsReadOnly ? FeatureDiscard : 0);
        FillConfig();
    }

    private enum RequestType : uint
    {
        In = 0,
        Out = 1,
        Flush = 4,
        GetId = 8,
        Discard = 11,
        WriteZeroes = 13,
    }

    /// <inheritdoc/>
    public override VirtioDeviceType Type => VirtioDeviceType.Block;

    /// <inheritdoc/>
    public override ulong OfferedFeatures { get; }

    /// <inheritdoc/>
    public override ulong ModernOnlyFeatures => FeatureMultiQueue | FeatureDiscard | FeatureWriteZeroes;

    /// <inheritdoc/>
    public override ReadOnlySpan<ushort> QueueSizes => _queueSizes;

    /// <inheritdoc/>
    public override int ConfigBytes => _config.Length;

    /// <summary>Requests that the host failed.</summary>
    public long HostErrors => Interlocked.Read(ref _hostErrors);

    /// <summary>The back end changed its size: tells the guest.</summary>
    public void CapacityChanged()
    {
        FillConfig();
        Session?.ConfigChanged();
    }

    /// <inheritdoc/>
    public override void ReadConfig(uint offset, Span<byte> into)
    {
        CopyConfig(_config, offset, into);
        if (offset <= ConfigWriteback && ConfigWriteback - offset < into.Length)
        {
            into[(int)(ConfigWriteback - offset)] = (byte)Volatile.Read(ref _writeback);
        }
    }

    /// <inheritdoc/>
    public override void WriteConfig(uint offset, ReadOnlySpan<byte> from)
    {
        // §5.2.5.1: writeback is the only writable field.
        if (offset == ConfigWriteback && from.Length == 1 && from[0] <= 1)
        {
            Volatile.Write(ref _writeback, from[0]);
        }
    }

    /// <inheritdoc/>
    public override bool IsQuick => true;

    /// <inheritdoc/>
    public override bool Notify(int queue, int budget)
    {
        Volatile.Write(ref _batchThread, Environment.CurrentManagedThreadId);
        _batchBytes = 0;
        bool again = base.Notify(queue, budget);
        Volatile.Write(ref _batchThread, 0);
        return again;
    }

    /// <inheritdoc/>
    public override void Quiesce()
    {
        while (Volatile.Read(ref _inFlight) != 0)
        {
            _backend.Drain();
            Thread.Yield();
        }
    }

    /// <inheritdoc/>
    public override void Reset() => _writeback = 1;

    /// <inheritdoc/>
    public override void Save(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        writer.Write("blk.writeback", (ulong)_writeback);
    }

    /// <inheritdoc/>
    public override void Load(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        _writeback = (int)reader.ReadBounded("blk.writeback", 1);
    }

    /// <inheritdoc/>
    protected override void Process(int queue, Virtqueue ring, VirtqueueChain chain)
    {
        ArgumentNullException.ThrowIfNull(ring);
        ArgumentNullException.ThrowIfNull(chain);
        Span<byte> header = stackalloc byte[HeaderBytes];

        // §5.2.6: a header to read and a status byte to write are the least there is.
        if (!chain.TryRead(0, header) || chain.WritableBytes < 1)
        {
            ring.Break(VirtqueueFault.BadRequest);
            ring.Push(chain, 0);
            return;
        }

        var type = (RequestType)BinaryPrimitives.ReadUInt32LittleEndian(header);
        ulong sector = BinaryPrimitives.ReadUInt64LittleEndian(header[8..]);
        switch (type)
        {
            case RequestType.In:
                StartTransfer(ring, chain, BlockOperation.Read, sector, chain.WritableBytes - 1);
                break;
            case RequestType.Out:
                StartTransfer(ring, chain, BlockOperation.Write, sector, chain.ReadableBytes - HeaderBytes);
                break;
            case RequestType.Flush:
                Job flush = TakeJob(ring, chain, BlockOperation.Flush);
                flush.OffsetBytes = 0;
                flush.LengthBytes = 0;
                Submit(flush);
                break;
            case RequestType.GetId:
                GetId(ring, chain);
                break;
            case RequestType.Discard when (OfferedFeatures & FeatureDiscard) != 0:
                StartRanges(ring, chain, BlockOperation.Discard);
                break;
            case RequestType.WriteZeroes when (OfferedFeatures & FeatureWriteZeroes) != 0:
                StartRanges(ring, chain, BlockOperation.WriteZeroes);
                break;
            default:
                Finish(ring, chain, StatusUnsupported, 0);
                break;
        }
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            _backend.Dispose();
        }

        base.Dispose(disposing);
    }

    // Inside a batch the driver is told of all that was finished at its end, or earlier when that is a lot: it then has
    // something to do while the rest is being copied.
    private void Finish(Virtqueue ring, VirtqueueChain chain, byte status, long dataBytes)
    {
        if (!chain.TryWrite(chain.WritableBytes - 1, [status]))
        {
            ring.Break(VirtqueueFault.BadAddress);
        }

        long movedBytes = chain.ReadableBytes + chain.WritableBytes;
        ring.Push(chain, (uint)Math.Min(dataBytes + 1, uint.MaxValue));
        if (Environment.CurrentManagedThreadId != Volatile.Read(ref _batchThread))
        {
            ring.Flush();
            return;
        }

        _batchBytes += movedBytes;
        if (_batchBytes >= MaxUntoldBytes)
        {
            _batchBytes = 0;
            ring.Flush();
        }
    }

    private void FillConfig()
    {
        Span<byte> config = _config;
        ulong sectors = (ulong)_backend.LengthBytes / SectorBytes;
        int exponent = int.Log2(Math.Max(_backend.BlockBytes, _options.LogicalBlockBytes) / _options.LogicalBlockBytes);
        BinaryPrimitives.WriteUInt64LittleEndian(config, sectors);
        BinaryPrimitives.WriteUInt32LittleEndian(config[12..], Math.Max(1u, (uint)_options.QueueSize - 2));
        BinaryPrimitives.WriteUInt16LittleEndian(config[16..], (ushort)Math.Min(sectors / (16 * 63), 16383));
        config[18] = 16;
        config[19] = 63;
        BinaryPrimitives.WriteUInt32LittleEndian(config[20..], (uint)_options.LogicalBlockBytes);
        config[24] = (byte)exponent;
        BinaryPrimitives.WriteUInt16LittleEndian(config[26..], (ushort)(1 << exponent));
        BinaryPrimitives.WriteUInt16LittleEndian(config[34..], (ushort)_queueSizes.Length);
        BinaryPrimitives.WriteUInt32LittleEndian(config[36..], MaxRangeSectors);
        BinaryPrimitives.WriteUInt32LittleEndian(config[40..], MaxRangeSegments);
        BinaryPrimitives.WriteUInt32LittleEndian(
            config[44..], (uint)(Math.Max(_backend.BlockBytes, _options.LogicalBlockBytes) / SectorBytes));
        BinaryPrimitives.WriteUInt32LittleEndian(config[48..], MaxRangeSectors);
        BinaryPrimitives.WriteUInt32LittleEndian(config[52..], MaxRangeSegments);
        config[56] = 1;
    }

    private void StartTransfer(Virtqueue ring, VirtqueueChain chain, BlockOperation operation, ulong sector, long length)
    {
        bool fits = sector <= (ulong)_backend.LengthBytes / SectorBytes
            && length % SectorBytes == 0
            && length <= _backend.LengthBytes - ((long)sector * SectorBytes);
        if (!fits || (operation == BlockOperation.Write && _backend.IsReadOnly))
        {
            Finish(ring, chain, StatusIoError, 0);
            return;
        }

        if (length == 0)
        {
            Finish(ring, chain, StatusOk, 0);
            return;
        }

        Job job = TakeJob(ring, chain, operation);
        GuestSlice[] slices = job.Slices;
        bool isRead = operation == BlockOperation.Read;
        bool mapped = chain.TryGetSlices(isRead, isRead ? 0 : HeaderBytes, length, ref slices, out int count);
        job.Slices = slices;
        job.SliceCount = count;
        if (!mapped)
        {
            _jobs.Return(job);
            Finish(ring, chain, StatusIoError, 0);
            return;
        }

        job.OffsetBytes = (long)sector * SectorBytes;
        job.LengthBytes = length;
        job.ForceUnitAccess = !isRead && !HasWriteCache();
        job.HasFollowers = length >= LargeBytes && ring.HasAvailable;
        Submit(job);
    }

    private bool HasWriteCache() =>
        Volatile.Read(ref _writeback) != 0 && Session is { } session && session.Has(FeatureFlush);

    private void GetId(Virtqueue ring, VirtqueueChain chain)
    {
        Span<byte> id = stackalloc byte[IdBytes];
        id.Clear();
        string serial = _options.Serial.Length > IdBytes ? _options.Serial[..IdBytes] : _options.Serial;
        Encoding.ASCII.GetBytes(serial, id);
        int length = (int)Math.Min(IdBytes, chain.WritableBytes - 1);
        Finish(ring, chain, chain.TryWrite(0, id[..length]) ? StatusOk : StatusIoError, length);
    }

    // §5.2.6: discard and write-zeroes carry a list of ranges, which run one after the other.
    private void StartRanges(Virtqueue ring, VirtqueueChain chain, BlockOperation operation)
    {
        long length = chain.ReadableBytes - HeaderBytes;
        if (length <= 0 || length % SegmentBytes != 0 || length > MaxRangeSegments * SegmentBytes)
        {
            Finish(ring, chain, StatusUnsupported, 0);
            return;
        }

        Job job = TakeJob(ring, chain, operation);
        Span<byte> raw = stackalloc byte[MaxRangeSegments * SegmentBytes];
        raw = raw[..(int)length];
        byte status = chain.TryRead(HeaderBytes, raw) ? StatusOk : StatusIoError;
        job.Ranges.Clear();
        for (int i = 0; i < raw.Length && status == StatusOk; i += SegmentBytes)
        {
            ulong sector = BinaryPrimitives.ReadUInt64LittleEndian(raw[i..]);
            uint sectors = BinaryPrimitives.ReadUInt32LittleEndian(raw[(i + 8)..]);
            uint flags = BinaryPrimitives.ReadUInt32LittleEndian(raw[(i + 12)..]);
            ulong whole = (ulong)_backend.LengthBytes / SectorBytes;
            if ((flags & ~1u) != 0 || (operation == BlockOperation.Discard && flags != 0))
            {
                status = StatusUnsupported;
            }
            else if (sectors > MaxRangeSectors || sector > whole || sectors > whole - sector)
            {
                status = StatusIoError;
            }
            else if (sectors != 0)
            {
                bool unmap = operation == BlockOperation.Discard || (flags & 1) != 0;
                job.Ranges.Add(((long)sector * SectorBytes, (long)sectors * SectorBytes, unmap));
            }
        }

        if (status != StatusOk || job.Ranges.Count == 0)
        {
            _jobs.Return(job);
            Finish(ring, chain, status, 0);
            return;
        }

        job.NextRange = 0;
        job.LoadRange();
        Submit(job);
    }

    private Job TakeJob(Virtqueue ring, VirtqueueChain chain, BlockOperation operation)
    {
        Job job = _jobs.Take(ring, chain);
        job.Operation = operation;
        return job;
    }

    private void Submit(Job job)
    {
        Interlocked.Increment(ref _inFlight);
        _backend.Submit(job);
    }

    private void OnCompleted(Job job, BlockStatus status)
    {
        if (status == BlockStatus.Ok && job.Operation is BlockOperation.Discard or BlockOperation.WriteZeroes
            && ++job.NextRange < job.Ranges.Count)
        {
            job.LoadRange();
            _backend.Submit(job);
            return;
        }

        if (status is BlockStatus.IoError or BlockStatus.NoSpace)
        {
            Interlocked.Increment(ref _hostErrors);
        }

        Virtqueue ring = job.Ring!;
        VirtqueueChain chain = job.Chain!;
        long read = 0;
        if (job.Operation == BlockOperation.Read)
        {
            read = job.LengthBytes;
            chain.MarkWritten(read); // also after an error: parts may have been written
        }

        _jobs.Return(job);
        Finish(ring, chain, status == BlockStatus.Ok ? StatusOk : StatusIoError, read);
        Interlocked.Decrement(ref _inFlight);
    }

    private sealed class Job(VirtioBlock owner) : VirtioDiskJob
    {
        public List<(long Offset, long Length, bool Unmap)> Ranges { get; } = [];

        public void LoadRange() => (OffsetBytes, LengthBytes, MayUnmap) = Ranges[NextRange];

        public override void Complete(BlockStatus status) => owner.OnCompleted(this, status);
    }
}

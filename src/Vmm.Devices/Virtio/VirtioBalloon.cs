// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>Gives guest memory back to the host; implemented by the machine over its RAM blocks.</summary>
public interface IMemoryReclaimer
{
    /// <summary>
    /// Releases whole pages; they read as zeroes afterwards and take host memory again when touched. Ranges outside RAM
    /// are refused.
    /// </summary>
    /// <param name="guestAddress">A multiple of 4096.</param>
    /// <param name="lengthBytes">A multiple of 4096.</param>
    bool TryRelease(ulong guestAddress, ulong lengthBytes);
}

/// <summary>Statistics that a guest reports (VIRTIO 1.2 §5.5.6.3); the values are the tags.</summary>
public enum BalloonStatistic : ushort
{
    /// <summary>Bytes swapped in.</summary>
    SwapIn = 0,

    /// <summary>Bytes swapped out.</summary>
    SwapOut = 1,

    /// <summary>Major page faults.</summary>
    MajorFaults = 2,

    /// <summary>Minor page faults.</summary>
    MinorFaults = 3,

    /// <summary>Bytes unused for any purpose.</summary>
    FreeMemory = 4,

    /// <summary>Bytes of memory.</summary>
    TotalMemory = 5,

    /// <summary>Bytes available without swapping.</summary>
    AvailableMemory = 6,

    /// <summary>Bytes that can be reclaimed quickly.</summary>
    DiskCaches = 7,

    /// <summary>Huge pages allocated.</summary>
    HugeTlbAllocations = 8,

    /// <summary>Huge page allocations that failed.</summary>
    HugeTlbFailures = 9,
}

/// <summary>
/// Memory balloon (VIRTIO 1.2 §5.5): inflated and reported pages are released on the host, deflated ones come back by
/// being touched. The guest may deflate by itself when it runs out of memory. Statistics arrive when they are asked for:
/// the device keeps the guest's statistics buffer and gives it back as the question.
/// </summary>
public sealed class VirtioBalloon : VirtioModel
{
    /// <summary>Size of a balloon page, whatever the guest's pages are (§5.5.6).</summary>
    public const int PageBytes = 4096;

    private const ulong FeatureStatistics = 1UL << 1;
    private const ulong FeatureDeflateOnOom = 1UL << 2;
    private const ulong FeatureReporting = 1UL << 5;
    private const int PageShift = 12;
    private const int MaxFrames = 4096;
    private const int StatisticBytes = 10;
    private const int InflateQueue = 0;
    private const int DeflateQueue = 1;

    private static readonly ushort[] s_queueSizes = [128, 128, 128, 128];

    private readonly Lock _gate = new();
    private readonly Dictionary<BalloonStatistic, ulong> _statistics = [];
    private readonly IMemoryReclaimer _memory;
    private readonly byte[] _raw = new byte[MaxFrames * 4];
    private readonly uint[] _frames = new uint[MaxFrames];
    private VirtqueueChain? _heldStatistics;
    private uint _target;
    private uint _actual;
    private bool _wantStatistics;
    private long _statisticsCount;
    private long _reportedBytes;

    /// <summary>Makes one.</summary>
    public VirtioBalloon(IMemoryReclaimer memory) => _memory = memory;

    /// <inheritdoc/>
    public override VirtioDeviceType Type => VirtioDeviceType.Balloon;

    /// <inheritdoc/>
    public override ulong OfferedFeatures => FeatureStatistics | FeatureDeflateOnOom | FeatureReporting;

    /// <inheritdoc/>
    public override ReadOnlySpan<ushort> QueueSizes => s_queueSizes;

    /// <inheritdoc/>
    public override int ConfigBytes => 16;

    /// <summary>Pages of 4 KiB that the guest is asked to give up. Any thread.</summary>
    public uint TargetPages
    {
        get => Volatile.Read(ref _target);
        set
        {
            Volatile.Write(ref _target, value);
            Session?.ConfigChanged();
        }
    }

    /// <summary>Pages that the guest says it has given up.</summary>
    public uint ActualPages => Volatile.Read(ref _actual);

    /// <summary>Bytes released by free page reporting so far.</summary>
    public long ReportedBytes => Interlocked.Read(ref _reportedBytes);

    /// <summary>How often statistics have arrived.</summary>
    public long StatisticsCount => Interlocked.Read(ref _statisticsCount);

    /// <summary>Asks the guest for fresh statistics. Any thread.</summary>
    public void RequestStatistics()
    {
        Volatile.Write(ref _wantStatistics, true);
        if (Session is { } session && session.Has(FeatureStatistics))
        {
            session.Kick(2);
        }
    }

    /// <summary>The statistics that arrived last.</summary>
    public IReadOnlyDictionary<BalloonStatistic, ulong> Statistics()
    {
        lock (_gate)
        {
            return new Dictionary<BalloonStatistic, ulong>(_statistics);
        }
    }

    /// <inheritdoc/>
    public override void ReadConfig(uint offset, Span<byte> into)
    {
        Span<byte> config = stackalloc byte[16];
        config.Clear();
        BinaryPrimitives.WriteUInt32LittleEndian(config, TargetPages);
        BinaryPrimitives.WriteUInt32LittleEndian(config[4..], ActualPages);
        CopyConfig(config, offset, into);
    }

    /// <inheritdoc/>
    public override void WriteConfig(uint offset, ReadOnlySpan<byte> from)
    {
        if (offset == 4 && from.Length == 4)
        {
            Volatile.Write(ref _actual, BinaryPrimitives.ReadUInt32LittleEndian(from));
        }
    }

    /// <inheritdoc/>
    public override bool Notify(int queue, int budget)
    {
        if (Session is not { } session || session.Queue(queue) is not { } ring)
        {
            return false;
        }

        if (queue != 2 || !session.Has(FeatureStatistics))
        {
            return base.Notify(queue, budget);
        }

        // One buffer at a time: it is held until somebody wants to know.
        if (_heldStatistics is { } held && Volatile.Read(ref _wantStatistics))
        {
            Volatile.Write(ref _wantStatistics, false);
            _heldStatistics = null;
            ring.Complete(held, 0);
        }

        if (_heldStatistics is null && ring.TryPop(out VirtqueueChain? chain))
        {
            ReadStatistics(chain);
            _heldStatistics = chain;
        }

        return false;
    }

    /// <inheritdoc/>
    public override void QueueChanged(int queue)
    {
        if (queue == 2)
        {
            _heldStatistics = null;
        }
    }

    /// <inheritdoc/>
    public override void Quiesce()
    {
        if (_heldStatistics is { } held && Session?.Queue(2) is { } ring)
        {
            ring.Unpop(held);
        }

        _heldStatistics = null;
    }

    /// <inheritdoc/>
    public override void Reset()
    {
        _actual = 0;
        _wantStatistics = false;
        lock (_gate)
        {
            _statistics.Clear();
        }
    }

    /// <inheritdoc/>
    public override void Save(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        writer.Write("balloon.target", _target);
        writer.Write("balloon.actual", _actual);
        writer.Write("balloon.want-statistics", _wantStatistics);
    }

    /// <inheritdoc/>
    public override void Load(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        _target = reader.ReadUInt32("balloon.target");
        _actual = reader.ReadUInt32("balloon.actual");
        _wantStatistics = reader.ReadBoolean("balloon.want-statistics");
    }

    /// <inheritdoc/>
    protected override void Process(int queue, Virtqueue ring, VirtqueueChain chain)
    {
        ArgumentNullException.ThrowIfNull(ring);
        ArgumentNullException.ThrowIfNull(chain);
        switch (queue)
        {
            case InflateQueue:
                Inflate(ring, chain);
                break;
            case DeflateQueue:
                break;
            default:
                // Queues after the statistics exist only if negotiated; drivers number them without gaps.
                if (Session is { } session && session.Has(FeatureReporting)
                    && queue == (session.Has(FeatureStatistics) ? 3 : 2))
                {
                    Report(chain);
                }

                break;
        }

        ring.Push(chain, 0);
    }

    private void Inflate(Virtqueue ring, VirtqueueChain chain)
    {
        int count = (int)Math.Min(chain.ReadableBytes / 4, MaxFrames);
        if (!chain.TryRead(0, _raw.AsSpan(0, count * 4)))
        {
            ring.Break(VirtqueueFault.BadAddress);
            return;
        }

        for (int i = 0; i < count; i++)
        {
            _frames[i] = BinaryPrimitives.ReadUInt32LittleEndian(_raw.AsSpan(i * 4));
        }

        // Neighbours are released in one call.
        Span<uint> frames = _frames.AsSpan(0, count);
        frames.Sort();
        for (int i = 0; i < count;)
        {
            int end = i + 1;
            while (end < count && frames[end] - frames[i] == (uint)(end - i))
            {
                end++;
            }

            _memory.TryRelease((ulong)frames[i] << PageShift, (ulong)(end - i) << PageShift);
            i = end;
        }
    }

    // §5.5.6.7: the buffers are the free pages themselves, in the guest's own page size.
    private void Report(VirtqueueChain chain)
    {
        for (int i = 0; i < chain.Count; i++)
        {
            (ulong address, uint length, bool writable) = chain.BufferAt(i);
            bool whole = (address | length) % PageBytes == 0;
            if (writable && whole && _memory.TryRelease(address, length))
            {
                Interlocked.Add(ref _reportedBytes, length);
            }
        }
    }

    private void ReadStatistics(VirtqueueChain chain)
    {
        Span<byte> raw = stackalloc byte[StatisticBytes * 32];
        int count = (int)Math.Min(chain.ReadableBytes / StatisticBytes, 32);
        raw = raw[..(count * StatisticBytes)];
        if (!chain.TryRead(0, raw))
        {
            return;
        }

        lock (_gate)
        {
            for (int i = 0; i < raw.Length; i += StatisticBytes)
            {
                var tag = (BalloonStatistic)BinaryPrimitives.ReadUInt16LittleEndian(raw[i..]);
                if (tag <= BalloonStatistic.HugeTlbFailures)
                {
                    _statistics[tag] = BinaryPrimitives.ReadUInt64LittleEndian(raw[(i + 2)..]);
                }
            }
        }

        Interlocked.Increment(ref _statisticsCount);
    }
}

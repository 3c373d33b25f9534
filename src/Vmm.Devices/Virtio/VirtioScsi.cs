// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Globalization;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Storage;

namespace Vmm.Devices.Virtio;

/// <summary>
/// SCSI host (VIRTIO 1.2 §5.6). Each unit is target n, LUN 0. Data moves zero-copy between guest RAM and the unit's back
/// end; a command whose data do not fit the buffers is answered OVERRUN and moves nothing. Task management is done by
/// waiting until what is under way has completed, which every abort and reset allows (SAM-5 §7.1).
/// </summary>
/// <remarks>Commands are decoded on the worker, one at a time; back ends complete them on their own threads.</remarks>
public sealed class VirtioScsi : VirtioModel
{
    /// <summary>Most units behind one host.</summary>
    public const int MaxUnits = 64;

    private const int RequestHeaderBytes = 19;
    private const int ResponseHeaderBytes = 12;
    private const int DefaultCdbBytes = 32;
    private const int DefaultSenseBytes = 96;
    private const int CdbBytes = 16;
    private const int EventBytes = 16;
    private const int ControlQueue = 0;
    private const int EventQueue = 1;

    private const byte ResponseOk = 0;
    private const byte ResponseOverrun = 1;
    private const byte ResponseBadTarget = 3;
    private const byte ResponseFunctionSucceeded = 10;
    private const byte ResponseFunctionRejected = 11;
    private const byte ResponseIncorrectLun = 12;

    private readonly Lock _gate = new();
    private readonly VirtioDiskJobs<Job> _jobs;
    private readonly IReadOnlyList<ScsiUnit> _units;
    private readonly ushort[] _queueSizes;
    private readonly byte[] _parameters = new byte[ScsiUnit.MaxParameterBytes];
    private int _senseBytes = DefaultSenseBytes;
    private int _cdbBytes = DefaultCdbBytes;
    private int _inFlight;

    /// <summary>Makes one.</summary>
    /// <param name="units">Disks and drives; their media belong to the caller.</param>
    /// <param name="queues">Request queues, 1 to 16.</param>
    public VirtioScsi(IReadOnlyList<ScsiUnit> units, int queues = 1)
    {
        ArgumentNullException.ThrowIfNull(units);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(units.Count, MaxUnits, nameof(units));
        _units = units;
        _jobs = new VirtioDiskJobs<Job>(() => new Job(this));
        _queueSizes = new ushort[2 + Math.Clamp(queues, 1, 16)];
        Array.Fill(_queueSizes, (ushort)256);
    }

    private enum ControlType : uint
    {
        TaskManagement = 0,
        NotificationQuery = 1,
        NotificationSubscribe = 2,
    }

    /// <inheritdoc/>
    public override VirtioDeviceType Type => VirtioDeviceType.Scsi;

    /// <inheritdoc/>
    public override ReadOnlySpan<ushort> QueueSizes => _queueSizes;

    /// <inheritdoc/>
    public override int ConfigBytes => 36;

    /// <inheritdoc/>
    public override void ReadConfig(uint offset, Span<byte> into)
    {
        // §5.6.4.
        Span<byte> config = stackalloc byte[36];
        config.Clear();
        BinaryPrimitives.WriteInt32LittleEndian(config, _queueSizes.Length - 2);
        BinaryPrimitives.WriteUInt32LittleEndian(config[4..], 254); // segments: the queue without two headers
        BinaryPrimitives.WriteUInt32LittleEndian(config[8..], 65535); // sectors in a request
        BinaryPrimitives.WriteUInt32LittleEndian(config[12..], 128); // commands per unit
        BinaryPrimitives.WriteUInt32LittleEndian(config[16..], EventBytes);
        BinaryPrimitives.WriteInt32LittleEndian(config[20..], Volatile.Read(ref _senseBytes));
        BinaryPrimitives.WriteInt32LittleEndian(config[24..], Volatile.Read(ref _cdbBytes));
        BinaryPrimitives.WriteUInt16LittleEndian(config[30..], (ushort)Math.Max(_units.Count - 1, 0));
        CopyConfig(config, offset, into);
    }

    /// <inheritdoc/>
    public override void WriteConfig(uint offset, ReadOnlySpan<byte> from)
    {
        if (from.Length != 4)
        {
            return;
        }

        // §5.6.4: the driver may choose the sizes; ours are bounded by what a chain is expected to hold.
        int value = (int)Math.Min(BinaryPrimitives.ReadUInt32LittleEndian(from), 4096);
        switch (offset)
        {
            case 20:
                Volatile.Write(ref _senseBytes, value);
                break;
            case 24:
                Volatile.Write(ref _cdbBytes, Math.Max(value, CdbBytes));
                break;
            default:
                break;
        }
    }

    /// <inheritdoc/>
    public override bool Notify(int queue, int budget) =>
        queue != EventQueue && base.Notify(queue, budget); // events are never sent

    /// <inheritdoc/>
    public override void Quiesce() => Drain();

    /// <inheritdoc/>
    public override void Reset()
    {
        _senseBytes = DefaultSenseBytes;
        _cdbBytes = DefaultCdbBytes;
        foreach (ScsiUnit unit in _units)
        {
            unit.PowerOn();
        }
    }

    /// <inheritdoc/>
    public override void Save(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        writer.Write("scsi.sense", (ulong)_senseBytes);
        writer.Write("scsi.cdb", (ulong)_cdbBytes);
        for (int i = 0; i < _units.Count; i++)
        {
            _units[i].Save(writer, string.Create(CultureInfo.InvariantCulture, $"scsi.unit{i}."));
        }
    }

    /// <inheritdoc/>
    public override void Load(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        _senseBytes = (int)reader.ReadBounded("scsi.sense", 4096);
        _cdbBytes = (int)Math.Max(reader.ReadBounded("scsi.cdb", 4096), CdbBytes);
        for (int i = 0; i < _units.Count; i++)
        {
            _units[i].Load(reader, string.Create(CultureInfo.InvariantCulture, $"scsi.unit{i}."));
        }
    }

    /// <inheritdoc/>
    protected override void Process(int queue, Virtqueue ring, VirtqueueChain chain)
    {
        ArgumentNullException.ThrowIfNull(ring);
        ArgumentNullException.ThrowIfNull(chain);
        if (queue == ControlQueue)
        {
            Control(ring, chain);
        }
        else
        {
            Command(ring, chain);
        }
    }

    // §5.6.6.1: 1, target, a LUN in the flat or peripheral format, zeroes.
    private byte Find(ReadOnlySpan<byte> lun, out ScsiUnit? unit)
    {
        unit = null;
        if (lun[0] != 1 || lun[1] >= _units.Count)
        {
            return ResponseBadTarget;
        }

        if ((((lun[2] & 0x3F) << 8) | lun[3]) != 0)
        {
            return ResponseIncorrectLun;
        }

        unit = _units[lun[1]];
        return ResponseOk;
    }

    // §5.6.6.2.
    private void Control(Virtqueue ring, VirtqueueChain chain)
    {
        Span<byte> request = stackalloc byte[24];
        request.Clear();
        int length = (int)Math.Min(chain.ReadableBytes, request.Length);
        if (length < 4 || !chain.TryRead(0, request[..length]))
        {
            ring.Break(VirtqueueFault.BadRequest);
            ring.Push(chain, 0);
            return;
        }

        Span<byte> answer = stackalloc byte[5];
        answer.Clear();
        int answerBytes;
        if ((ControlType)BinaryPrimitives.ReadUInt32LittleEndian(request) == ControlType.TaskManagement)
        {
            answerBytes = 1;
            answer[0] = length < 16 ? ResponseFunctionRejected
                : ManageTask(BinaryPrimitives.ReadUInt32LittleEndian(request[4..]), request[8..16]);
        }
        else
        {
            answerBytes = 5; // no events are offered, so none are subscribed to
            answer[4] = length < 12 ? ResponseFunctionRejected : Find(request[4..12], out _);
        }

        answerBytes = (int)Math.Min(answerBytes, chain.WritableBytes);
        if (!chain.TryWrite(0, answer[..answerBytes]))
        {
            ring.Break(VirtqueueFault.BadAddress);
        }

        ring.Push(chain, (uint)answerBytes);
    }

    private byte ManageTask(uint function, ReadOnlySpan<byte> lun)
    {
        byte response = Find(lun, out ScsiUnit? unit);
        if (unit is null)
        {
            return response;
        }

        switch (function)
        {
            case 0 or 1 or 2: // abort task, abort task set, clear ACA
                Drain();
                return ResponseOk; // function complete
            case 3:
                Drain();
                return ResponseOk; // clear task set
            case 4 or 5: // target and unit reset
                Drain();
                lock (_gate)
                {
                    unit.PowerOn();
                }

                return ResponseOk;
            case 6 or 7: // query task, query task set: nothing that is known is still there
                return _inFlight == 0 ? ResponseOk : ResponseFunctionSucceeded;
            default:
                return ResponseFunctionRejected;
        }
    }

    private void Drain()
    {
        while (Volatile.Read(ref _inFlight) != 0)
        {
            foreach (ScsiUnit unit in _units)
            {
                unit.Medium?.Drain();
            }

            Thread.Yield();
        }
    }

    // §5.6.6.1: header and CDB, data to the device; status and sense, data to the driver.
    private void Command(Virtqueue ring, VirtqueueChain chain)
    {
        int cdbBytes = Volatile.Read(ref _cdbBytes);
        int senseBytes = Volatile.Read(ref _senseBytes);
        int requestBytes = RequestHeaderBytes + cdbBytes;
        Span<byte> request = stackalloc byte[RequestHeaderBytes + CdbBytes];
        if (chain.ReadableBytes < requestBytes || chain.WritableBytes < ResponseHeaderBytes + senseBytes
            || !chain.TryRead(0, request))
        {
            ring.Break(VirtqueueFault.BadRequest);
            ring.Push(chain, 0);
            return;
        }

        Job job = _jobs.Take(ring, chain);
        job.DataOut = requestBytes;
        job.DataIn = ResponseHeaderBytes + senseBytes;
        job.SenseBytes = senseBytes;
        ReadOnlySpan<byte> cdb = request[RequestHeaderBytes..];
        byte response = Find(request[..8], out ScsiUnit? unit);
        if (cdb[0] == 0xA0 && request[0] == 1 && request[1] < _units.Count)
        {
            ReportLuns(job, BinaryPrimitives.ReadUInt32BigEndian(cdb[6..]));
            return;
        }

        if (unit is null)
        {
            // SPC-4 §6.4.1: INQUIRY of a unit that is not there, behind a target that is.
            if (response == ResponseIncorrectLun && cdb[0] == 0x12)
            {
                var nothing = new byte[36];
                nothing[0] = 0x7F;
                Reply(job, ScsiWork.Answer(nothing, BinaryPrimitives.ReadUInt16BigEndian(cdb[3..])).Reply!);
            }
            else if (response == ResponseIncorrectLun)
            {
                Finish(job, ResponseOk, ScsiStatus.CheckCondition, ScsiSense.NoSuchUnit, 0);
            }
            else
            {
                Finish(job, response, ScsiStatus.Good, default, 0);
            }

            return;
        }

        int sent = (int)Math.Min(chain.ReadableBytes - requestBytes, _parameters.Length);
        Span<byte> parameters = _parameters.AsSpan(0, HasParameters(cdb[0]) ? sent : 0);
        if (!chain.TryRead(requestBytes, parameters))
        {
            Finish(job, ResponseOverrun, ScsiStatus.Good, default, 0);
            return;
        }

        ScsiWork work;
        lock (_gate)
        {
            work = unit.Begin(cdb, parameters);
        }

        job.Unit = unit;
        job.Work = work;
        if (work.IsDone)
        {
            Finish(job, ResponseOk, work.Status, work.Sense, 0);
        }
        else if (work.Reply is { } reply)
        {
            Reply(job, reply);
        }
        else
        {
            StartMedium(job);
        }
    }

    private static bool HasParameters(byte code) => code is 0x15 or 0x55 or 0x41 or 0x93 or 0x42;

    // SPC-4 §6.33.
    private void ReportLuns(Job job, uint allocation)
    {
        var data = new byte[16];
        data[3] = 8; // one unit, number 0
        Reply(job, ScsiWork.Answer(data, (int)Math.Min(allocation, 16)).Reply!);
    }

    private void Reply(Job job, byte[] data)
    {
        VirtqueueChain chain = job.Chain!;
        int count = (int)Math.Min(data.Length, chain.WritableBytes - job.DataIn);
        bool written = chain.TryWrite(job.DataIn, data.AsSpan(0, count));
        Finish(
            job, written && count == data.Length ? ResponseOk : ResponseOverrun, ScsiStatus.Good, default, written ? count : 0);
    }

    private void StartMedium(Job job)
    {
        ScsiWork work = job.Work!;
        if (job.Unit!.Medium is not { } medium)
        {
            Finish(job, ResponseOk, ScsiStatus.CheckCondition, ScsiSense.NotReadable, 0);
            return;
        }

        job.Backend = medium;
        job.Operation = work.Operation;
        job.ForceUnitAccess = work.ForceUnitAccess;
        job.MayUnmap = work.MayUnmap;
        job.SliceCount = 0;
        (job.OffsetBytes, job.LengthBytes) = work.Ranges[0];
        job.NextRange = 1;
        if (work.MovesData)
        {
            bool isRead = work.Operation == BlockOperation.Read;
            GuestSlice[] slices = job.Slices;
            bool mapped = job.Chain!.TryGetSlices(
                isRead, isRead ? job.DataIn : job.DataOut, job.LengthBytes, ref slices, out int count);
            job.Slices = slices;
            job.SliceCount = count;
            if (!mapped)
            {
                Finish(job, ResponseOverrun, ScsiStatus.Good, default, 0);
                return;
            }
        }

        Interlocked.Increment(ref _inFlight);
        medium.Submit(job);
    }

    private void OnCompleted(Job job, BlockStatus status)
    {
        ScsiWork work = job.Work!;
        if (status == BlockStatus.Ok && job.NextRange < work.Ranges.Count)
        {
            (job.OffsetBytes, job.LengthBytes) = work.Ranges[job.NextRange++];
            job.Backend!.Submit(job);
            return;
        }

        ScsiStatus result;
        ScsiSense sense;
        lock (_gate)
        {
            (result, sense) = job.Unit!.Complete(work, status);
        }

        long read = work.Operation == BlockOperation.Read ? job.LengthBytes : 0;
        if (read > 0)
        {
            job.Chain!.MarkWritten(job.DataIn + read); // also after an error: parts may have been written
        }

        Finish(job, ResponseOk, result, sense, work.MovesData && status == BlockStatus.Ok ? job.LengthBytes : 0);
        Interlocked.Decrement(ref _inFlight);
    }

    private void Finish(Job job, byte response, ScsiStatus status, in ScsiSense sense, long movedBytes)
    {
        VirtqueueChain chain = job.Chain!;
        Virtqueue ring = job.Ring!;
        Span<byte> header = stackalloc byte[ResponseHeaderBytes + ScsiSense.FixedBytes];
        header.Clear();
        int senseBytes = status == ScsiStatus.CheckCondition ? Math.Min(ScsiSense.FixedBytes, job.SenseBytes) : 0;
        if (senseBytes > 0)
        {
            sense.Write(header[ResponseHeaderBytes..]);
        }

        bool isRead = chain.WritableBytes > job.DataIn;
        long room = isRead ? chain.WritableBytes - job.DataIn : chain.ReadableBytes - job.DataOut;
        BinaryPrimitives.WriteInt32LittleEndian(header, senseBytes);
        BinaryPrimitives.WriteUInt32LittleEndian(header[4..], (uint)Math.Clamp(room - movedBytes, 0, uint.MaxValue));
        header[10] = (byte)status;
        header[11] = response;
        if (!chain.TryWrite(0, header[..(ResponseHeaderBytes + senseBytes)]))
        {
            ring.Break(VirtqueueFault.BadAddress);
        }

        uint used = (uint)Math.Min(isRead ? job.DataIn + movedBytes : ResponseHeaderBytes + senseBytes, uint.MaxValue);
        ReturnJob(job);
        ring.Complete(chain, used);
    }

    private void ReturnJob(Job job)
    {
        job.Unit = null;
        job.Work = null;
        _jobs.Return(job);
    }

    private sealed class Job(VirtioScsi owner) : VirtioDiskJob
    {
        public ScsiUnit? Unit { get; set; }

        public ScsiWork? Work { get; set; }

        public IBlockBackend? Backend { get; set; }

        public int DataOut { get; set; }

        public int DataIn { get; set; }

        public int SenseBytes { get; set; }

        public override void Complete(BlockStatus status) => owner.OnCompleted(this, status);
    }
}

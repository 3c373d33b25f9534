// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Threading;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Net;

/// <summary>
/// A network card's cable in a tap interface of the host. Frames go out on the device's thread and come in on the loop's;
/// while the device has no buffer one frame is kept and reading stops, so that the host's queue fills and drops.
/// </summary>
public sealed class TapNetBackend : INetBackend
{
    private const int BurstFrames = 64;

    private readonly Lock _sendGate = new();
    private readonly TapDevice _tap;
    private readonly int _headerBytes;
    private readonly byte[] _out = new byte[TapDevice.HeaderBytes + NetFrames.MaxFrameBytes];
    private readonly byte[] _in = new byte[TapDevice.HeaderBytes + NetFrames.MaxFrameBytes];
    private readonly IPollRegistration _registration;
    private INetReceiver? _receiver;
    private int _kept;
    private long _dropped;

    /// <summary>Opens an interface.</summary>
    /// <exception cref="HostException">It cannot be opened; the message says why.</exception>
    public TapNetBackend(PollLoop loop, string name)
    {
        ArgumentNullException.ThrowIfNull(loop);
        _tap = TapDevice.Open(name);
        _headerBytes = _tap.HasHeader ? TapDevice.HeaderBytes : 0;
        _registration = loop.Add(_tap.Handle, PollEvents.None, _ => Read());
    }

    /// <inheritdoc/>
    public bool CanOffload => _tap.HasHeader;

    /// <summary>Frames that the host did not take.</summary>
    public long Dropped => Interlocked.Read(ref _dropped);

    /// <inheritdoc/>
    public void Attach(INetReceiver receiver)
    {
        Volatile.Write(ref _receiver, receiver);
        _registration.Interest = PollEvents.Readable;
    }

    /// <inheritdoc/>
    public void ResumeReceive() => _registration.Interest = PollEvents.Readable;

    /// <inheritdoc/>
    public void Send(ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        if (frame.Length > NetFrames.MaxFrameBytes)
        {
            return;
        }

        lock (_sendGate)
        {
            if (_headerBytes != 0)
            {
                FrameHeader.Write(_out, offload);
            }

            frame.CopyTo(_out.AsSpan(_headerBytes));
            if (!FileIo.WriteStream(_tap.Handle, _out.AsSpan(0, _headerBytes + frame.Length)).IsOk)
            {
                Interlocked.Increment(ref _dropped); // full, or the interface is down
            }
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _registration.Dispose();
        _tap.Dispose();
    }

    private void Read()
    {
        for (int i = 0; i < BurstFrames; i++)
        {
            if (_kept == 0)
            {
                IoResult read = FileIo.ReadStream(_tap.Handle, _in);
                if (!read.IsOk)
                {
                    return;
                }

                _kept = (int)read.Bytes;
            }

            NetOffload offload = default;
            bool sane = _kept >= _headerBytes + Proto.EthernetBytes
                && (_headerBytes == 0 || FrameHeader.TryRead(_in, _kept - _headerBytes, out offload));
            if (sane && !_receiver!.TryReceive(_in.AsSpan(_headerBytes, _kept - _headerBytes), offload))
            {
                _registration.Interest = PollEvents.None;

                // A buffer that came before this line was announced before it too: look once more.
                if (!_receiver.TryReceive(_in.AsSpan(_headerBytes, _kept - _headerBytes), offload))
                {
                    return;
                }

                _registration.Interest = PollEvents.Readable;
            }

            _kept = 0;
        }
    }
}

/// <summary>The header of VIRTIO 1.2 §5.1.6 without its last field, as taps and the switch use it.</summary>
internal static class FrameHeader
{
    public const int Bytes = 12;

    public static void Write(Span<byte> into, in NetOffload offload)
    {
        into[..Bytes].Clear();
        into[0] = offload.NeedsChecksum ? (byte)1 : (byte)0;
        into[1] = offload.SegmentKind;
        BinaryPrimitives.WriteUInt16LittleEndian(into[2..], offload.HeaderBytes);
        BinaryPrimitives.WriteUInt16LittleEndian(into[4..], offload.SegmentBytes);
        BinaryPrimitives.WriteUInt16LittleEndian(into[6..], offload.ChecksumStart);
        BinaryPrimitives.WriteUInt16LittleEndian(into[8..], offload.ChecksumOffset);
    }

    /// <summary>False when the header does not fit a frame of that length.</summary>
    public static bool TryRead(ReadOnlySpan<byte> header, int frameBytes, out NetOffload offload)
    {
        offload = new NetOffload(
            (header[0] & 1) != 0,
            BinaryPrimitives.ReadUInt16LittleEndian(header[6..]),
            BinaryPrimitives.ReadUInt16LittleEndian(header[8..]),
            (byte)(header[1] & 0x7F), // without the ECN bit
            BinaryPrimitives.ReadUInt16LittleEndian(header[4..]),
            BinaryPrimitives.ReadUInt16LittleEndian(header[2..]));
        return offload.SegmentKind is 0 or 1 or 4
            && (!offload.NeedsChecksum || offload.ChecksumStart + offload.ChecksumOffset + 2 <= frameBytes)
            && (offload.SegmentKind == 0 || (offload.NeedsChecksum && offload.SegmentBytes != 0));
    }
}

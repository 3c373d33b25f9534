// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.Devices.Virtio;

/// <summary>Where random bytes come from: the host's generator, or a seeded one when a run must repeat.</summary>
public interface IEntropySource
{
    /// <summary>Fills the buffer. Does not block for long; worker thread.</summary>
    void Fill(Span<byte> into);
}

/// <summary>
/// Entropy device (VIRTIO 1.2 §5.4): one queue of writable buffers. At most 64 KiB of each buffer are filled, which the
/// section allows ("one or more bytes").
/// </summary>
public sealed class VirtioRng : VirtioModel
{
    private const int MaxBytes = 64 * 1024;

    private static readonly ushort[] s_queueSizes = [64];

    private readonly byte[] _buffer = new byte[4096];
    private readonly IEntropySource _source;

    /// <summary>Makes one.</summary>
    public VirtioRng(IEntropySource source) => _source = source;

    /// <inheritdoc/>
    public override VirtioDeviceType Type => VirtioDeviceType.Rng;

    /// <inheritdoc/>
    public override ReadOnlySpan<ushort> QueueSizes => s_queueSizes;

    /// <inheritdoc/>
    protected override void Process(int queue, Virtqueue ring, VirtqueueChain chain)
    {
        ArgumentNullException.ThrowIfNull(ring);
        ArgumentNullException.ThrowIfNull(chain);
        int total = (int)Math.Min(chain.WritableBytes, MaxBytes);
        int done = 0;
        while (done < total)
        {
            Span<byte> part = _buffer.AsSpan(0, Math.Min(_buffer.Length, total - done));
            _source.Fill(part);
            if (!chain.TryWrite(done, part))
            {
                ring.Break(VirtqueueFault.BadAddress);
                break;
            }

            done += part.Length;
        }

        ring.Push(chain, (uint)done);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Vmm.Core;
using Vmm.Devices.Virtio;
using Vmm.TestKit;

namespace Vmm.Devices.Tests.Virtio;

/// <summary>A model behind virtio-mmio with memory and a driver; work is done inline.</summary>
internal sealed class VirtioRig : IDisposable
{
    public VirtioRig(IVirtioModel model, TestRam? ram = null, bool resume = true)
    {
        Ram = ram ?? new TestRam(4 << 20);
        Mmio = new VirtioMmio(
            new VirtioDevice("dut", model, Ram, new VirtioOptions { Inline = true, Packed = true, InOrder = true }), Irq);
        Mmio.Reset();
        if (resume)
        {
            Mmio.Resume();
        }

        Driver = new VirtioMmioDriver(Mmio, Ram);
    }

    public TestRam Ram { get; }

    public FakeIrqLine Irq { get; } = new();

    public VirtioMmio Mmio { get; }

    public VirtioMmioDriver Driver { get; }

    /// <summary>Sends bytes through a queue and waits for them to be used.</summary>
    public void Send(int queue, ReadOnlySpan<byte> bytes, ulong at = 0x200000)
    {
        bytes.CopyTo(Ram.Bytes[(int)at..]);
        Driver[queue].Add(new DriverBuffer(at, (uint)bytes.Length, false));
        Driver.Kick(queue);
        if (!Driver[queue].TryTakeUsed(out _, out _))
        {
            throw new InvalidOperationException("the device did not take the buffer");
        }
    }

    /// <summary>Sends a request with an answer.</summary>
    public byte[] Call(int queue, ReadOnlySpan<byte> request, int answerBytes, ulong at = 0x200000)
    {
        request.CopyTo(Ram.Bytes[(int)at..]);
        ulong answer = at + 0x40000;
        Ram.Bytes.Slice((int)answer, answerBytes).Clear();
        Driver[queue].Add(
            new DriverBuffer(at, (uint)request.Length, false), new DriverBuffer(answer, (uint)answerBytes, true));
        Driver.Kick(queue);
        if (!Driver[queue].TryTakeUsed(out _, out uint length))
        {
            throw new InvalidOperationException("the device did not answer");
        }

        return Ram.Bytes.Slice((int)answer, (int)Math.Min(length, (uint)answerBytes)).ToArray();
    }

    /// <summary>Gives the device buffers to fill.</summary>
    public void Offer(int queue, int count, uint bytes, ulong at = 0x300000)
    {
        for (int i = 0; i < count; i++)
        {
            ulong address = at + ((ulong)i * bytes);
            ushort id = Driver[queue].Add(new DriverBuffer(address, bytes, true));
            _offered[(queue, id)] = address;
        }

        Driver.Kick(queue);
    }

    /// <summary>Takes a filled buffer; null when there is none.</summary>
    public byte[]? Take(int queue)
    {
        if (!Driver[queue].TryTakeUsed(out ushort id, out uint length))
        {
            return null;
        }

        return Ram.Bytes.Slice((int)_offered[(queue, id)], (int)length).ToArray();
    }

    public void Dispose() => Mmio.Dispose();

    private readonly Dictionary<(int Queue, ushort Id), ulong> _offered = [];
}

/// <summary>Records frames and delivers what a test gives it.</summary>
internal sealed class FakeNetBackend : INetBackend
{
    private INetReceiver? _receiver;

    public List<(byte[] Frame, NetOffload Offload)> Sent { get; } = [];

    public int Resumed { get; private set; }

    public bool CanOffload { get; init; } = true;

    public INetReceiver Receiver => _receiver!;

    public void Send(ReadOnlySpan<byte> frame, in NetOffload offload) => Sent.Add((frame.ToArray(), offload));

    public void Attach(INetReceiver receiver) => _receiver = receiver;

    public void ResumeReceive() => Resumed++;

    public bool Deliver(byte[] frame, NetOffload offload = default) => _receiver!.TryReceive(frame, offload);

    public void Dispose()
    {
    }
}

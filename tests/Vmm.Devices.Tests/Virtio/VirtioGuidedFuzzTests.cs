// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Numerics;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Virtio;

// Theory. VirtioFuzzTests breaks the rules of rings; this one keeps them and searches for requests that make a model do
// something new, in libFuzzer's way: inputs that show a behaviour not seen before join a corpus from which later inputs are
// made by small changes. SharpFuzz would count branches, but it rewrites assemblies with a tool of its own that is in no
// package source of this project; so the feedback here is what a driver can see: per request the queue, its length, how
// much was answered, the first bytes of the answer, the device's status and configuration generation. A request type that
// is answered instead of refused, an error code, another answer length are all new behaviours, and each opens the next.
//
// The run is bounded and its seeds are fixed, so that a failure repeats.

/// <summary>Requests that grow towards what a model understands.</summary>
public sealed class VirtioGuidedFuzzTests
{
    private const int RamBytes = 1 << 20;
    private const ulong Requests = 0x80000;
    private const ulong Answers = 0xA0000;
    private const ulong Poison = 0xF0000; // never named as writable
    private const int AnswerBytes = 4096;
    private const int Executions = 1500;
    private const int MaxInputBytes = 600;

    private static readonly byte[] s_interesting = [0, 1, 2, 3, 4, 8, 16, 32, 0x40, 0x7F, 0x80, 0xFE, 0xFF];

    [Theory]
    [InlineData("block")]
    [InlineData("net")]
    [InlineData("console")]
    [InlineData("balloon")]
    [InlineData("vsock")]
    [InlineData("input")]
    [InlineData("gpu")]
    [InlineData("scsi")]
    public void Model_RequestsThatGrow_StaysDefined(string name)
    {
        var random = new Random(name.Length * 7919);
        var seen = new HashSet<Behaviour>();
        var corpus = new List<byte[]>();
        byte[] seed = new byte[64];
        Run(name, seed, seen);
        corpus.Add(seed);
        int atStart = seen.Count;
        for (int i = 0; i < Executions; i++)
        {
            byte[] input = Mutate(corpus, random);
            int before = seen.Count;
            Run(name, input, seen);
            if (seen.Count > before)
            {
                corpus.Add(input);
            }
        }

        corpus.Count.Should().BeGreaterThan(3, "the search found more than it began with");
        seen.Count.Should().BeGreaterThan(atStart);
    }

    private static byte[] Mutate(List<byte[]> corpus, Random random)
    {
        // New inputs are likelier to lead further than old ones.
        byte[] from = corpus[corpus.Count - 1 - (int)(Math.Pow(random.NextDouble(), 2) * corpus.Count)];
        var bytes = new List<byte>(from);
        for (int changes = random.Next(1, 6); changes > 0; changes--)
        {
            int at = random.Next(bytes.Count);
            switch (random.Next(6))
            {
                case 0:
                    bytes[at] ^= (byte)(1 << random.Next(8));
                    break;
                case 1 or 2:
                    bytes[at] = s_interesting[random.Next(s_interesting.Length)];
                    break;
                case 3:
                    bytes[at] = (byte)random.Next(256);
                    break;
                case 4 when bytes.Count < MaxInputBytes:
                    bytes.InsertRange(at, new byte[random.Next(1, 32)]);
                    break;
                default:
                    byte[] other = corpus[random.Next(corpus.Count)];
                    int start = random.Next(other.Length);
                    for (int i = start; i < other.Length && at < bytes.Count; i++, at++)
                    {
                        bytes[at] = other[i];
                    }

                    break;
            }
        }

        return [.. bytes];
    }

    // An input is a list of requests: queue, length of the readable part, size of the writable part, then the bytes.
    private static void Run(string name, ReadOnlySpan<byte> input, HashSet<Behaviour> seen)
    {
        var ram = new TestRam(RamBytes);
        ram.Bytes[(int)Poison..].Fill(0xA5);
        using IVirtioModel model = VirtioFuzzTests.Make(name);
        using var mmio = new VirtioMmio(
            new VirtioDevice("dut", model, ram, new VirtioOptions { Inline = true }), new FakeIrqLine());
        mmio.Reset();
        mmio.Resume();
        var driver = new VirtioMmioDriver(mmio, ram);
        int queues = model.QueueSizes.Length;
        driver.Start(driver.OfferedFeatures() & ~VirtioFeature.RingPacked, queues, 16);
        for (int request = 0; input.Length >= 3 && request < 10; request++)
        {
            int queue = input[0] % queues;
            int length = Math.Min(input[1], input.Length - 3);
            int answer = Math.Min(AnswerBytes, input[2] * 16);
            input.Slice(3, length).CopyTo(ram.Bytes[(int)Requests..]);
            input = input[(3 + length)..];
            ram.Bytes.Slice((int)Answers, AnswerBytes).Clear();
            Span<DriverBuffer> chain = new DriverBuffer[2];
            int count = 0;
            if (length > 0)
            {
                chain[count++] = new DriverBuffer(Requests, (uint)length, false);
            }

            if (answer > 0)
            {
                chain[count++] = new DriverBuffer(Answers, (uint)answer, true);
            }

            if (count == 0 || driver[queue].InFlight > 12)
            {
                continue;
            }

            driver[queue].Add(chain[..count].ToArray());
            driver.Kick(queue);
            uint used = 0;
            int answers = 0;
            while (driver[queue].TryTakeUsed(out _, out uint one))
            {
                used = one;
                answers++;
            }

            used.Should().BeLessThanOrEqualTo(AnswerBytes);
            uint status = driver.Status;
            seen.Add(new Behaviour(
                queue,
                BitOperations.Log2((uint)length + 1),
                BitOperations.Log2(used + 1),
                answers,
                ram.ReadNumber(Answers, 4),
                ram.ReadNumber(Answers + 8, 4),
                status));
            if ((status & 0x40) != 0)
            {
                driver = new VirtioMmioDriver(mmio, ram);
                driver.Start(driver.OfferedFeatures() & ~VirtioFeature.RingPacked, queues, 16);
            }
        }

        mmio.Pause();
        var writer = new StateWriter("dut");
        mmio.Save(writer);
        mmio.Resume();
        ram.Bytes[(int)Poison..].IndexOfAnyExcept((byte)0xA5).Should().Be(-1, "nothing is written outside the chain");
    }

    /// <summary>What a driver sees of one request.</summary>
    private readonly record struct Behaviour(
        int Queue, int LengthLog2, int UsedLog2, int Answers, ulong First, ulong Second, uint Status);
}

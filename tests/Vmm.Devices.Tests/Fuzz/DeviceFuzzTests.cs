// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using FluentAssertions;
using Xunit;
using Xunit.Abstractions;

namespace Vmm.Devices.Tests.Fuzz;

// Theory. Coverage-guided fuzzing in the way of AFL and libFuzzer, in this process (adr/0022 says why): an input that takes
// branches of Vmm.Devices as none before it joins a corpus, from which later inputs are made by small changes. What a target
// does with an input stands in FuzzTargets; it throws when a promise was broken, and then the input is printed.
//
// make test gives each target some hundred inputs with a fixed seed. tests/fuzz/devices gives it minutes: FUZZ_SECONDS is
// how long, FUZZ_SEED other inputs, FUZZ_CORPUS a directory that keeps what was found from one run to the next.

/// <summary>Every device against inputs that grow along its branches.</summary>
public sealed class DeviceFuzzTests(ITestOutputHelper output, DeviceFuzzTests.Shared shared) : IClassFixture<DeviceFuzzTests.Shared>
{
    private const int Executions = 600;
    private const int MaxInputBytes = 1500;

    private static readonly byte[] s_interesting = [0, 1, 2, 3, 4, 8, 16, 32, 0x40, 0x7F, 0x80, 0xFE, 0xFF];

    [Theory]
    [InlineData("block")]
    [InlineData("rng")]
    [InlineData("net")]
    [InlineData("console")]
    [InlineData("balloon")]
    [InlineData("vsock")]
    [InlineData("input")]
    [InlineData("gpu")]
    [InlineData("scsi")]
    [InlineData("9p")]
    [InlineData("e1000")]
    [InlineData("rtl8139")]
    public void Device_InputsAlongItsBranches_KeepsItsPromises(string name)
    {
        InstrumentedDevices devices = shared.Devices;
        devices.Forget();
        int seconds = Setting("FUZZ_SECONDS", 0);
        var random = new Random(Setting("FUZZ_SEED", name.Length * 7919));
        var corpus = new List<byte[]>();
        string? directory = Environment.GetEnvironmentVariable("FUZZ_CORPUS");
        directory = string.IsNullOrEmpty(directory) ? null : Directory.CreateDirectory(Path.Combine(directory, name)).FullName;
        foreach (byte[] seed in FuzzTargets.Seeds(name))
        {
            Try(name, seed);
            corpus.Add(seed);
        }

        foreach (string file in directory is null ? [] : Directory.GetFiles(directory))
        {
            byte[] found = File.ReadAllBytes(file);
            if (found.Length is > 0 and <= MaxInputBytes && Try(name, found))
            {
                corpus.Add(found);
            }
        }

        int seeds = corpus.Count;
        int atStart = devices.Edges;
        long end = Environment.TickCount64 + (seconds * 1000L);
        int runs = 0;
        for (; seconds > 0 ? Environment.TickCount64 < end : runs < Executions; runs++)
        {
            byte[] input = Mutate(corpus, random);
            if (Try(name, input))
            {
                corpus.Add(input);
                if (directory is not null)
                {
                    File.WriteAllBytes(Path.Combine(directory, $"{corpus.Count:d5}-{Environment.ProcessId}"), input);
                }
            }
        }

        output.WriteLine($"{name}: {runs} inputs, {corpus.Count} kept, {atStart} edges by the seeds, {devices.Edges} in the end");
        atStart.Should().BeGreaterThan(50, "the copy with counters is what runs");
        if (directory is null)
        {
            corpus.Count.Should().BeGreaterThan(seeds, "the search finds more than it began with");
        }
    }

    private bool Try(string name, byte[] input)
    {
        shared.Devices.Clear();
        try
        {
            shared.Devices.Run(name, input);
        }
        catch (Exception e)
        {
            throw new InvalidOperationException($"{name}: input {Convert.ToHexString(input)}: {e.Message}", e);
        }

        return shared.Devices.TryLearn();
    }

    private static int Setting(string name, int otherwise) =>
        int.TryParse(Environment.GetEnvironmentVariable(name), CultureInfo.InvariantCulture, out int value) ? value : otherwise;

    private static byte[] Mutate(List<byte[]> corpus, Random random)
    {
        // New inputs are likelier to lead further than old ones.
        byte[] from = corpus[corpus.Count - 1 - (int)(Math.Pow(random.NextDouble(), 2) * corpus.Count)];
        var bytes = new List<byte>(from);
        for (int changes = random.Next(1, 6); changes > 0; changes--)
        {
            int at = random.Next(bytes.Count);
            switch (random.Next(8))
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
                case 5 when bytes.Count > 8:
                    bytes.RemoveRange(at, Math.Min(random.Next(1, 16), bytes.Count - at));
                    break;
                case 6 when bytes.Count < MaxInputBytes:
                    // Another input behind this one: what it set up may be what this one lacked.
                    byte[] tail = corpus[random.Next(corpus.Count)];
                    bytes.AddRange(tail[..Math.Min(tail.Length, MaxInputBytes - bytes.Count)]);
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

            if (bytes.Count == 0)
            {
                bytes.Add(0);
            }
        }

        return [.. bytes];
    }

    /// <summary>The copy is made once.</summary>
    public sealed class Shared : IDisposable
    {
        internal InstrumentedDevices Devices { get; } = new();

        public void Dispose() => Devices.Dispose();
    }
}

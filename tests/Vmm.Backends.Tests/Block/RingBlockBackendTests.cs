// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Runtime.InteropServices;
using System.Threading;
using FluentAssertions;
using Vmm.Backends.Block;
using Vmm.Core;
using Vmm.Host;
using Xunit;

namespace Vmm.Backends.Tests.Block;

/// <summary>
/// A raw disk served by io_uring, where this host has it, against a model in memory. Where it has none the same requests go
/// through threads, so the promises are checked all the same; what only a ring does is asserted where there is one.
/// </summary>
public sealed class RingBlockBackendTests : IDisposable
{
    private const int DiskBytes = 1 << 20;
    private const int MemoryBytes = 1 << 20;

    private readonly TempDirectory _directory = new();
    private readonly HostMemory _memory = HostMemory.Allocate(MemoryBytes);
    private readonly string _path;

    public RingBlockBackendTests()
    {
        _path = _directory["disk.raw"];
        using FileStream file = File.Create(_path);
        file.SetLength(DiskBytes);
    }

    public void Dispose()
    {
        _memory.Dispose();
        _directory.Dispose();
    }

    [Theory]
    [InlineData(BlockCacheMode.WriteBack)]
    [InlineData(BlockCacheMode.WriteThrough)]
    [InlineData(BlockCacheMode.Unsafe)]
    public void RandomRequests_MatchTheModel(BlockCacheMode cache)
    {
        using IBlockBackend disk = Open(cache);
        var random = new Random(11);
        byte[] model = new byte[DiskBytes];
        for (int round = 0; round < 60; round++)
        {
            // A batch of writes that do not overlap, in pieces of odd lengths; then it is read back whole.
            var pending = new List<Request>();
            for (int i = 0; i < 8; i++)
            {
                int sectors = random.Next(1, 64);
                int offset = (i * (DiskBytes / 8)) + (random.Next(0, 128) * 512);
                var request = new Request(mayCompleteInline: random.Next(4) == 0)
                {
                    Operation = BlockOperation.Write,
                    OffsetBytes = offset,
                    LengthBytes = sectors * 512,
                };
                Place(request, i * 65536, random);
                random.NextBytes(model.AsSpan(offset, sectors * 512));
                Copy(request, model.AsSpan(offset, sectors * 512), toMemory: true);
                request.ForceUnitAccess = random.Next(4) == 0;
                pending.Add(request);
                disk.Submit(request);
            }

            pending.ForEach(request => request.Wait().Should().Be(BlockStatus.Ok));
            var flush = new Request { Operation = BlockOperation.Flush };
            disk.Submit(flush);
            flush.Wait().Should().Be(BlockStatus.Ok);
            var read = new Request { Operation = BlockOperation.Read, LengthBytes = DiskBytes / 2 };
            read.OffsetBytes = random.Next(2) * (DiskBytes / 2);
            read.HasFollowers = random.Next(8) == 0;
            Place(read, 0, random);
            disk.Submit(read);
            read.Wait().Should().Be(BlockStatus.Ok);
            byte[] got = new byte[DiskBytes / 2];
            Copy(read, got, toMemory: false);
            got.AsSpan().SequenceEqual(model.AsSpan((int)read.OffsetBytes, got.Length)).Should().BeTrue();
        }

        if (disk is RingBlockBackend ring)
        {
            ring.RingRequests.Should().BeGreaterThan(400);
            (ring.InlineWrites > 0).Should().Be(cache != BlockCacheMode.WriteThrough, "those are stable when they complete");
        }

        disk.Drain();
        File.ReadAllBytes(_path).AsSpan().SequenceEqual(model).Should().BeTrue();
    }

    [RingFact(severalProcessors: true)]
    public void LargeRequests_WithFollowers_RunBesideTheCaller()
    {
        using var ring = (RingBlockBackend)Open(BlockCacheMode.WriteBack);
        var random = new Random(8);
        byte[] data = new byte[256 << 10];
        foreach (BlockOperation operation in (ReadOnlySpan<BlockOperation>)[BlockOperation.Write, BlockOperation.Read])
        {
            var request = new Request(mayCompleteInline: true)
            {
                Operation = operation,
                LengthBytes = data.Length,
                HasFollowers = true,
            };
            Place(request, 0, random);
            if (operation == BlockOperation.Write)
            {
                random.NextBytes(data);
                Copy(request, data, toMemory: true);
            }
            else
            {
                Copy(request, new byte[data.Length], toMemory: true);
            }

            ring.Submit(request);
            request.Wait().Should().Be(BlockStatus.Ok);
            request.Thread.Should().NotBe(Environment.CurrentManagedThreadId);
            byte[] got = new byte[data.Length];
            Copy(request, got, toMemory: false);
            got.AsSpan().SequenceEqual(data).Should().BeTrue();
        }

        ring.ParallelRequests.Should().Be(2);
        var last = new Request(mayCompleteInline: true) { Operation = BlockOperation.Write, LengthBytes = data.Length };
        Place(last, 0, random);
        ring.Submit(last);
        last.Wait().Should().Be(BlockStatus.Ok);
        ring.ParallelRequests.Should().Be(2, "nothing follows it");
    }

    [RingFact]
    public void Read_OfCachedData_CompletesInsideSubmit()
    {
        using var ring = (RingBlockBackend)Open(BlockCacheMode.WriteBack);
        File.ReadAllBytes(_path).Should().HaveCount(DiskBytes, "that fills the page cache");
        var request = new Request(mayCompleteInline: true) { Operation = BlockOperation.Read, LengthBytes = 4096 };
        Place(request, 0, new Random(1));
        ring.Submit(request);
        request.Wait().Should().Be(BlockStatus.Ok);
        ring.InlineReads.Should().BeInRange(0, 1, "a file system may not know how; then the ring does it");
        if (ring.InlineReads == 1)
        {
            request.Thread.Should().Be(Environment.CurrentManagedThreadId);
        }

        var strict = new Request { Operation = BlockOperation.Read, LengthBytes = 4096 };
        Place(strict, 0, new Random(1));
        ring.Submit(strict);
        strict.Wait().Should().Be(BlockStatus.Ok);
        strict.Thread.Should().NotBe(Environment.CurrentManagedThreadId, "it did not allow that");
    }

    [Theory]
    [InlineData(1 << 20, 0)] // 512 KiB at 1 MiB/s
    [InlineData(0, 64)] // 32 requests at 64 a second
    public void Limits_HoldRequestsBack_AndAnswerAll(int bytesPerSecond, int requestsPerSecond)
    {
        // Only the least time is a promise; a busy host may always take longer.
        var options = new BlockBackendOptions { BytesPerSecond = bytesPerSecond, RequestsPerSecond = requestsPerSecond };
        using IBlockBackend disk = RingBlockBackend.Open(RawImage.Open(_path, readOnly: false), "disk0", options);
        var random = new Random(5);
        long start = Environment.TickCount64;
        var requests = new List<Request>();
        for (int i = 0; i < 32; i++)
        {
            var request = new Request(mayCompleteInline: true)
            {
                Operation = i % 2 == 0 ? BlockOperation.Read : BlockOperation.Write,
                OffsetBytes = i * 16384,
                LengthBytes = 16384,
            };
            Place(request, i * 16384, random);
            requests.Add(request);
            disk.Submit(request);
        }

        requests.ForEach(request => request.Wait().Should().Be(BlockStatus.Ok));
        requests.Should().OnlyContain(request => request.Completions == 1);
        (Environment.TickCount64 - start).Should().BeGreaterThan(350, "half a second's worth, less a burst of a tenth");
    }

    [Fact]
    public void Read_PastTheEndOfTheFile_GivesZeroes()
    {
        using (FileStream file = File.OpenWrite(_path))
        {
            file.SetLength(1000); // the disk has 1024 bytes
            file.Write(new byte[] { 1, 2, 3 });
        }

        using IBlockBackend disk = Open(BlockCacheMode.WriteBack);
        var request = new Request { Operation = BlockOperation.Read, LengthBytes = 1024 };
        Place(request, 0, new Random(2));
        Span<byte> bytes = stackalloc byte[1024];
        bytes.Fill(0x99);
        Copy(request, bytes, toMemory: true);
        disk.Submit(request);
        request.Wait().Should().Be(BlockStatus.Ok);
        Copy(request, bytes, toMemory: false);
        bytes[2].Should().Be(3);
        bytes[3..].IndexOfAnyExcept((byte)0).Should().Be(-1);
    }

    [Fact]
    public void Refusals_AreAnsweredNotThrown()
    {
        using IBlockBackend disk = Open(BlockCacheMode.WriteBack);
        foreach ((long offset, long length) in new[] { (DiskBytes, 512L), (-512L, 512L), (1L, 512L), (0L, 100L) })
        {
            var request = new Request { Operation = BlockOperation.Read, OffsetBytes = offset, LengthBytes = length };
            request.Slices = [new GuestSlice(_memory.Address, (int)length)];
            request.SliceCount = 1;
            disk.Submit(request);
            request.Wait().Should().Be(BlockStatus.Refused);
        }
    }

    [Fact]
    public void MoreRequestsThanTheRingHolds_AllComplete()
    {
        using IBlockBackend disk = Open(BlockCacheMode.WriteBack);
        var requests = new List<Request>();
        for (int i = 0; i < 1000; i++)
        {
            var request = new Request { Operation = BlockOperation.Write, OffsetBytes = i % 256 * 4096, LengthBytes = 4096 };
            request.Slices = [new GuestSlice(_memory.Address + (i % 256 * 4096), 4096)];
            request.SliceCount = 1;
            requests.Add(request);
            disk.Submit(request);
        }

        disk.Drain();
        requests.Should().OnlyContain(request => request.Completions == 1);
    }

    private IBlockBackend Open(BlockCacheMode cache) => RingBlockBackend.Open(
        RawImage.Open(_path, readOnly: false), "disk0", new BlockBackendOptions { Cache = cache });

    // Cuts the request's data into pieces of memory.
    private void Place(Request request, int at, Random random)
    {
        var slices = new List<GuestSlice>();
        for (int left = (int)request.LengthBytes; left > 0;)
        {
            int part = slices.Count > 40 ? left : Math.Min(left, random.Next(1, 40000));
            slices.Add(new GuestSlice(_memory.Address + at, part));
            at += part;
            left -= part;
        }

        request.Slices = [.. slices];
        request.SliceCount = slices.Count;
    }

    private static void Copy(Request request, Span<byte> bytes, bool toMemory)
    {
        byte[] part = new byte[bytes.Length];
        foreach (GuestSlice slice in request.Slices)
        {
            if (toMemory)
            {
                bytes[..slice.LengthBytes].CopyTo(part);
                Marshal.Copy(part, 0, slice.HostAddress, slice.LengthBytes);
            }
            else
            {
                Marshal.Copy(slice.HostAddress, part, 0, slice.LengthBytes);
                part.AsSpan(0, slice.LengthBytes).CopyTo(bytes);
            }

            bytes = bytes[slice.LengthBytes..];
        }
    }

    private sealed class Request : BlockRequest
    {
        private readonly ManualResetEventSlim _done = new();
        private BlockStatus _status;
        private int _completions;

        public Request(bool mayCompleteInline = false) => MayCompleteInline = mayCompleteInline;

        public int Thread { get; private set; }

        public int Completions => _completions;

        public BlockStatus Wait()
        {
            _done.Wait(30_000).Should().BeTrue("the request is answered");
            return _status;
        }

        public override void Complete(BlockStatus status)
        {
            Thread = Environment.CurrentManagedThreadId;
            _status = status;
            Interlocked.Increment(ref _completions);
            _done.Set();
        }
    }

    /// <summary>A test of the ring alone; skipped, with the reason, where disks have threads.</summary>
    [AttributeUsage(AttributeTargets.Method)]
    private sealed class RingFactAttribute : FactAttribute
    {
        public RingFactAttribute(bool severalProcessors = false)
        {
            SeveralProcessors = severalProcessors;
            using IoUring? ring = IoUring.TryOpen(4);
            Skip = ring is null ? "this kernel has no io_uring" : severalProcessors && Environment.ProcessorCount == 1 ? "one processor" : null;
        }

        public bool SeveralProcessors { get; }
    }
}

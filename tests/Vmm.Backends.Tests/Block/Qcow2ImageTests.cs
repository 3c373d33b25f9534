// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Threading;
using FluentAssertions;
using Vmm.Backends.Block;
using Vmm.Backends.Block.Qcow2;
using Vmm.Core;
using Vmm.Host;
using Xunit;

namespace Vmm.Backends.Tests.Block;

public sealed class Qcow2ImageTests : IDisposable
{
    private readonly TempDirectory _temp = new();

    public void Dispose() => _temp.Dispose();

    [Theory]
    [InlineData(512, 3 << 20)]
    [InlineData(4096, 20 << 20)]
    [InlineData(65536, 40 << 20)]
    [InlineData(2 << 20, 100 << 20)]
    public void RandomOperations_AgainstModel_ReadBackAndPassQemuCheck(int clusterBytes, int sizeBytes)
    {
        string path = _temp["a.qcow2"];
        DiskImage.Create(path, new DiskImageOptions { LengthBytes = sizeBytes, ClusterBytes = clusterBytes });
        byte[] model = new byte[sizeBytes];
        var random = new Random(clusterBytes);
        for (int session = 0; session < 3; session++)
        {
            using BlockImage image = DiskImage.Open(path, readOnly: false);
            for (int i = 0; i < 150; i++)
            {
                RandomStep(image, model, random, clusterBytes);
            }
        }

        CheckAgainst(path, model);
    }

    [Fact]
    public void Overlay_RandomOperations_LeavesBackingAloneAndPassesQemuCheck()
    {
        const int size = 8 << 20;
        var random = new Random(7);
        byte[] model = new byte[size];
        random.NextBytes(model.AsSpan(0, 5 << 20));
        File.WriteAllBytes(_temp["base.img"], model[..(6 << 20)]);
        byte[] before = File.ReadAllBytes(_temp["base.img"]);
        TempDirectory.QemuImg("create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.img", _temp["mid.qcow2"], "8M");
        DiskImage.Create(
            _temp["top.qcow2"], new DiskImageOptions { BackingPath = "mid.qcow2", ClusterBytes = 4096 });
        using (BlockImage image = DiskImage.Open(_temp["top.qcow2"], readOnly: false))
        {
            image.LengthBytes.Should().Be(size);
            image.Backing!.Backing!.Format.Should().Be("raw");
            for (int i = 0; i < 300; i++)
            {
                RandomStep(image, model, random, 4096);
            }
        }

        CheckAgainst(_temp["top.qcow2"], model);
        File.ReadAllBytes(_temp["base.img"]).Should().Equal(before);
    }

    [Fact]
    public void Version2Overlay_ZeroesAndDiscards_NeverShowBackingData()
    {
        const int size = 2 << 20;
        byte[] model = new byte[size];
        new Random(3).NextBytes(model);
        File.WriteAllBytes(_temp["base.img"], model);
        TempDirectory.QemuImg(
            "create", "-q", "-f", "qcow2", "-o", "compat=0.10", "-F", "raw", "-b", "base.img", _temp["top.qcow2"]);
        using (BlockImage image = DiskImage.Open(_temp["top.qcow2"], readOnly: false))
        {
            image.WriteZeroes(65536, 200_192, mayUnmap: true).Should().Be(BlockStatus.Ok);
            model.AsSpan(65536, 200_192).Clear();
        }

        CheckAgainst(_temp["top.qcow2"], model);
    }

    [Theory]
    [InlineData("zlib")]
    [InlineData("zstd")]
    public void Compressed_WrittenByQemu_ReadsAndIsOverwritten(string type)
    {
        byte[] model = new byte[3 << 20];
        var random = new Random(5);
        for (int i = 0; i < model.Length; i++)
        {
            model[i] = (byte)((i >> 9) + random.Next(3));
        }

        File.WriteAllBytes(_temp["a.img"], model);
        (int status, string output) = TempDirectory.Run(
            "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", $"compression_type={type}",
            _temp["a.img"], _temp["a.qcow2"]);
        status.Should().Be(0, output);
        using (BlockImage image = DiskImage.Open(_temp["a.qcow2"], readOnly: false))
        {
            ReadAll(image).Should().Equal(model);
            for (int i = 0; i < 100; i++)
            {
                RandomStep(image, model, random, 65536);
            }
        }

        CheckAgainst(_temp["a.qcow2"], model);
    }

    [Fact]
    public void InternalSnapshot_WritesAfterwards_KeepTheSnapshotIntact()
    {
        const int size = 4 << 20;
        string path = _temp["a.qcow2"];
        TempDirectory.QemuImg("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "4M");
        byte[] model = new byte[size];
        var random = new Random(11);
        using (BlockImage image = DiskImage.Open(path, readOnly: false))
        {
            for (int i = 0; i < 100; i++)
            {
                RandomStep(image, model, random, 4096);
            }
        }

        byte[] old = (byte[])model.Clone();
        TempDirectory.QemuImg("snapshot", "-c", "before", path);
        using (var image = (Qcow2Image)DiskImage.Open(path, readOnly: false))
        {
            image.Snapshots.Should().ContainSingle().Which.Name.Should().Be("before");
            image.Snapshots[0].DiskBytes.Should().Be(size);
            for (int i = 0; i < 200; i++)
            {
                RandomStep(image, model, random, 4096);
            }
        }

        CheckAgainst(path, model);
        TempDirectory.QemuImg("snapshot", "-a", "before", path);
        CheckAgainst(path, old);
    }

    [Theory]
    [InlineData("refcount_bits=1,cluster_size=512")]
    [InlineData("refcount_bits=2")]
    [InlineData("refcount_bits=8,cluster_size=1024")]
    [InlineData("refcount_bits=32")]
    [InlineData("refcount_bits=64,cluster_size=512")]
    [InlineData("compat=0.10")]
    [InlineData("lazy_refcounts=on")]
    [InlineData("preallocation=metadata")]
    [InlineData("preallocation=falloc,cluster_size=2M")]
    public void QemuImages_OfAllShapes_AreReadAndWritten(string options)
    {
        string path = _temp["a.qcow2"];
        TempDirectory.QemuImg("create", "-q", "-f", "qcow2", "-o", options, path, "5M");
        byte[] model = new byte[5 << 20];
        var random = new Random(1);
        using (BlockImage image = DiskImage.Open(path, readOnly: false))
        {
            for (int i = 0; i < 150; i++)
            {
                RandomStep(image, model, random, 4096);
            }
        }

        CheckAgainst(path, model);
    }

    [Theory]
    [InlineData(DiskPreallocation.Off, 0)]
    [InlineData(DiskPreallocation.Metadata, 0)]
    [InlineData(DiskPreallocation.Reserve, 4096)]
    [InlineData(DiskPreallocation.Full, 512)]
    public void Create_WithPreallocation_PassesQemuCheckAndReportsProgress(DiskPreallocation how, int clusterBytes)
    {
        string path = _temp["a.qcow2"];
        var reports = new List<double>();
        var progress = new ListProgress(reports);
        DiskImage.Create(
            path,
            new DiskImageOptions { LengthBytes = 9 << 20, ClusterBytes = clusterBytes, Preallocation = how },
            progress);
        reports.Should().BeInAscendingOrder().And.EndWith(1);
        CheckAgainst(path, new byte[9 << 20]);
        if (how is DiskPreallocation.Reserve or DiskPreallocation.Full)
        {
            (_, string blocks) = TempDirectory.Run("stat", "-c", "%b", path);
            long.Parse(blocks, CultureInfo.InvariantCulture).Should().BeGreaterThanOrEqualTo((9 << 20) / 512);
        }
    }

    [Fact]
    public void Create_Cancelled_LeavesNoFile()
    {
        using var source = new CancellationTokenSource();
        source.Cancel();
        Action create = () => DiskImage.Create(
            _temp["a.qcow2"],
            new DiskImageOptions { LengthBytes = 9 << 20, Preallocation = DiskPreallocation.Metadata },
            null,
            source.Token);
        create.Should().Throw<OperationCanceledException>();
        File.Exists(_temp["a.qcow2"]).Should().BeFalse();
    }

    [Fact]
    public void ManyThreads_DisjointRanges_LoseNothing()
    {
        const int size = 32 << 20;
        string path = _temp["a.qcow2"];
        DiskImage.Create(path, new DiskImageOptions { LengthBytes = size, ClusterBytes = 4096 });
        byte[] model = new byte[size];
        using (BlockImage image = DiskImage.Open(path, readOnly: false))
        {
            // Interleaved stripes: neighbours share clusters and tables but never bytes.
            var threads = new Thread[4];
            for (int t = 0; t < threads.Length; t++)
            {
                int stripe = t;
                threads[t] = new Thread(() =>
                {
                    var random = new Random(stripe);
                    byte[] data = new byte[1024];
                    for (int i = 0; i < 1500; i++)
                    {
                        int at = (random.Next(size / 4096) * 4096) + (stripe * 1024);
                        random.NextBytes(data);
                        data.CopyTo(model, at);
                        image.Write(at, new IoBuffer(data)).Should().Be(BlockStatus.Ok);
                        if (i % 100 == stripe)
                        {
                            image.Flush().Should().Be(BlockStatus.Ok);
                        }
                    }
                });
                threads[t].Start();
            }

            foreach (Thread thread in threads)
            {
                thread.Join();
            }
        }

        CheckAgainst(path, model);
    }

    [Fact]
    public void Discard_OfEverything_ShrinksTheFile()
    {
        string path = _temp["a.qcow2"];
        DiskImage.Create(path, new DiskImageOptions { LengthBytes = 16 << 20 });
        using (BlockImage image = DiskImage.Open(path, readOnly: false))
        {
            byte[] data = new byte[16 << 20];
            Array.Fill(data, (byte)1);
            image.Write(0, new IoBuffer(data)).Should().Be(BlockStatus.Ok);
            image.Flush();
            image.Discard(0, 16 << 20).Should().Be(BlockStatus.Ok);
        }

        (_, string blocks) = TempDirectory.Run("stat", "-c", "%b", path);
        long.Parse(blocks, CultureInfo.InvariantCulture).Should().BeLessThan((1 << 20) / 512);
        CheckAgainst(path, new byte[16 << 20]);
    }

    [Fact]
    public void DirtyImage_OpenedForWriting_IsRepairedFirst()
    {
        string path = _temp["a.qcow2"];
        byte[] model = new byte[2 << 20];
        TempDirectory.QemuImg("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4096", path, "2M");
        var random = new Random(1);
        using (BlockImage image = DiskImage.Open(path, readOnly: false))
        {
            for (int i = 0; i < 50; i++)
            {
                RandomStep(image, model, random, 4096);
            }
        }

        // What a crash with lazy counts leaves: the dirty bit, and a first count block without any counts.
        byte[] raw = File.ReadAllBytes(path);
        raw[79] |= 1;
        long table = BinaryPrimitives.ReadInt64BigEndian(raw.AsSpan(48));
        long block = BinaryPrimitives.ReadInt64BigEndian(raw.AsSpan((int)table));
        raw.AsSpan((int)block, 4096).Clear();
        File.WriteAllBytes(path, raw);
        using (BlockImage image = DiskImage.Open(path, readOnly: false))
        {
            for (int i = 0; i < 50; i++)
            {
                RandomStep(image, model, random, 4096);
            }
        }

        CheckAgainst(path, model);
    }

    [Fact]
    public void SecondOpener_IsRefused_AndReadersShare()
    {
        string path = _temp["a.qcow2"];
        DiskImage.Create(path, new DiskImageOptions { LengthBytes = 1 << 20 });
        using (BlockImage writer = DiskImage.Open(path, readOnly: false))
        {
            Action again = () => DiskImage.Open(path, readOnly: false).Dispose();
            again.Should().Throw<IOException>().WithMessage($"{path}: is in use*");
            Action reader = () => DiskImage.Open(path, readOnly: true).Dispose();
            reader.Should().Throw<IOException>();
            TempDirectory.Run("qemu-img", "info", path).Status.Should().NotBe(0, "QEMU honours the lock too");
        }

        using BlockImage one = DiskImage.Open(path, readOnly: true);
        using BlockImage two = DiskImage.Open(path, readOnly: true);
        TempDirectory.Run("qemu-img", "info", path).Status.Should().Be(0);
    }

    [Fact]
    public void ImageThatQemuWrites_IsRefusedToReadersAndWriters()
    {
        string path = _temp["a.qcow2"];
        DiskImage.Create(path, new DiskImageOptions { LengthBytes = 1 << 20 });
        var start = new ProcessStartInfo("qemu-io", [path])
        {
            RedirectStandardInput = true,
            UseShellExecute = false,
            RedirectStandardOutput = true,
        };
        using Process qemu = Process.Start(start)!;
        qemu.StandardInput.WriteLine("write 0 4096");
        qemu.StandardInput.Flush();
        _ = qemu.StandardOutput.ReadLine();
        foreach (bool readOnly in new[] { false, true })
        {
            Action open = () => DiskImage.Open(path, readOnly).Dispose();
            open.Should().Throw<IOException>().WithMessage("*in use*");
        }

        qemu.StandardInput.Close();
        qemu.WaitForExit();
    }

    [Fact]
    public void BackingFile_OfUnstatedFormat_IsRefusedByName()
    {
        File.WriteAllBytes(_temp["base.img"], new byte[1 << 20]);
        string path = _temp["a.qcow2"];
        TempDirectory.QemuImg("create", "-q", "-f", "qcow2", path, "1M");
        TempDirectory.QemuImg("rebase", "-u", "-F", "raw", "-b", "base.img", path);
        byte[] raw = File.ReadAllBytes(path);
        int at = raw.AsSpan(0, 512).IndexOf(new byte[] { 0xE2, 0x79, 0x2A, 0xCA });
        raw[at] = 0x11;
        File.WriteAllBytes(path, raw);
        Action open = () => DiskImage.Open(path, readOnly: true);
        open.Should().Throw<ImageException>().WithMessage("*does not say which format*");
    }

    [Fact]
    public void CircleOfBackingFiles_EndsInAnError()
    {
        DiskImage.Create(_temp["a.qcow2"], new DiskImageOptions { LengthBytes = 1 << 20 });
        TempDirectory.QemuImg("rebase", "-u", "-F", "qcow2", "-b", "a.qcow2", _temp["a.qcow2"]);
        Action open = () => DiskImage.Open(_temp["a.qcow2"], readOnly: true);
        open.Should().Throw<ImageException>().WithMessage("*circle*");
    }

    [Theory]
    [InlineData(79, 0x04, "external file")]
    [InlineData(79, 0x10, "extended L2")]
    [InlineData(78, 0x80, "unknown incompatible")]
    [InlineData(35, 1, "encrypted")]
    [InlineData(7, 7, "version")]
    public void UnknownFeature_IsRefusedWithFileAndOffset(int at, byte bits, string words)
    {
        string path = _temp["a.qcow2"];
        DiskImage.Create(path, new DiskImageOptions { LengthBytes = 1 << 20 });
        byte[] raw = File.ReadAllBytes(path);
        raw[at] |= bits;
        File.WriteAllBytes(path, raw);
        Action open = () => DiskImage.Open(path, readOnly: true);
        open.Should().Throw<ImageException>().WithMessage($"{path}: offset 0x*: *{words}*");
    }

    [Fact]
    public void RawDisk_WithQcow2Signature_IsNotOpenedByGuess()
    {
        DiskImage.Create(_temp["a.qcow2"], new DiskImageOptions { LengthBytes = 1 << 20 });
        File.Move(_temp["a.qcow2"], _temp["a.img"]);
        Action open = () => DiskImage.Open(_temp["a.img"], readOnly: true);
        open.Should().Throw<ImageException>().WithMessage("*state `format: qcow2`*");
        using BlockImage raw = DiskImage.Open(_temp["a.img"], readOnly: true, "raw");
        raw.Format.Should().Be("raw");
        using BlockImage cow = DiskImage.Open(_temp["a.img"], readOnly: true, "qcow2");
        cow.Format.Should().Be("qcow2");
    }

    [Fact]
    public void GuestWrite_ToClusterThatIsTheHeader_IsRefused()
    {
        string path = _temp["a.qcow2"];
        DiskImage.Create(path, new DiskImageOptions { LengthBytes = 1 << 20 });
        byte[] data = new byte[4096];
        data[0] = 1;
        using (BlockImage image = DiskImage.Open(path, readOnly: false))
        {
            image.Write(0, new IoBuffer(data)).Should().Be(BlockStatus.Ok);
        }

        // Point the guest's first cluster at the L1 table (a hostile image), which a write would then change.
        byte[] raw = File.ReadAllBytes(path);
        long l1 = BinaryPrimitives.ReadInt64BigEndian(raw.AsSpan(40));
        long l2 = BinaryPrimitives.ReadInt64BigEndian(raw.AsSpan((int)l1)) & 0xFFFFFFFFFFFE00;
        BinaryPrimitives.WriteInt64BigEndian(raw.AsSpan((int)l2), l1 | long.MinValue);
        File.WriteAllBytes(path, raw);
        using (BlockImage image = DiskImage.Open(path, readOnly: false))
        {
            image.Write(0, new IoBuffer(data)).Should().Be(BlockStatus.IoError);
            image.LastError.Should().Contain("overlaps");
        }
    }

    [Fact]
    public void BitFlips_OverAllTables_EndInAnErrorOrAnImage()
    {
        string path = _temp["a.qcow2"];
        TempDirectory.QemuImg("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "4M");
        byte[] model = new byte[4 << 20];
        using (BlockImage image = DiskImage.Open(path, readOnly: false))
        {
            var steps = new Random(2);
            for (int i = 0; i < 40; i++)
            {
                RandomStep(image, model, steps, 4096);
            }
        }

        TempDirectory.QemuImg("snapshot", "-c", "one", path);
        byte[] clean = File.ReadAllBytes(path);
        int[] tables =
        [
            0, (int)BinaryPrimitives.ReadInt64BigEndian(clean.AsSpan(40)),
            (int)BinaryPrimitives.ReadInt64BigEndian(clean.AsSpan(48)),
            (int)BinaryPrimitives.ReadInt64BigEndian(clean.AsSpan(64)),
            (int)(BinaryPrimitives.ReadInt64BigEndian(clean.AsSpan((int)BinaryPrimitives.ReadInt64BigEndian(
                clean.AsSpan(40)))) & 0xFFFFFFFFFFFE00),
        ];
        var random = new Random(99);
        byte[] buffer = new byte[256 * 1024];
        string victim = _temp["b.qcow2"];
        long before = GC.GetTotalAllocatedBytes();
        int refused = 0;
        for (int round = 0; round < 600; round++)
        {
            byte[] raw = (byte[])clean.Clone();
            for (int flips = random.Next(1, 4); flips > 0; flips--)
            {
                int table = tables[random.Next(tables.Length)];
                int at = Math.Min(table + random.Next(random.Next(2) == 0 ? 112 : 600), raw.Length - 1);
                raw[at] ^= (byte)(1 << random.Next(8));
            }

            File.WriteAllBytes(victim, raw);
            try
            {
                using BlockImage image = DiskImage.Open(victim, readOnly: round % 2 == 0);
                long at = random.NextInt64(image.LengthBytes / 512) * 512;
                int length = (int)Math.Min(buffer.Length, image.LengthBytes - at);
                _ = image.Read(at, new IoBuffer(buffer.AsMemory(0, length)));
                if (!image.IsReadOnly)
                {
                    _ = image.Write(at, new IoBuffer(buffer.AsMemory(0, length)));
                    _ = image.Flush();
                }
            }
            catch (ImageException e)
            {
                e.Message.Should().StartWith(victim + ": offset 0x");
                refused++;
            }
        }

        refused.Should().BeInRange(50, 550);
        (GC.GetTotalAllocatedBytes() - before).Should().BeLessThan(600L * (40 << 20), "no allocation by header fields");
    }

    [Fact]
    public void Killed_UnderWriteLoad_KeepsEveryFlushedWrite()
    {
        int rounds = int.Parse(
            Environment.GetEnvironmentVariable("VMM_KILL_ROUNDS") ?? "6", CultureInfo.InvariantCulture);
        string path = _temp["a.qcow2"];
        DiskImage.Create(
            path, new DiskImageOptions { LengthBytes = Torture.Blocks * Torture.BlockBytes, ClusterBytes = 16384 });
        int seed = rounds;
        var random = new Random(seed);
        int next = 0;
        int[] floor = new int[Torture.Blocks];
        for (int round = 0; round < rounds; round++)
        {
            int flushed = RunAndKill(path, seed, next, random.Next(1, 400));
            Verify(path, seed, next, flushed, floor);

            // Steps that may or may not have happened: continue with numbers that were never used.
            next = flushed + 1_000_000;
        }
    }

    private static int RunAndKill(string path, int seed, int start, int milliseconds)
    {
        string assembly = typeof(Torture).Assembly.Location;
        var info = new ProcessStartInfo(
            "dotnet",
            [assembly, "torture", path, seed.ToString(CultureInfo.InvariantCulture), start.ToString(CultureInfo.InvariantCulture)])
        {
            UseShellExecute = false,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        using Process process = Process.Start(info)!;
        int flushed = start;
        string? line = process.StandardOutput.ReadLine();
        long deadline = Environment.TickCount64 + milliseconds;
        while (line is not null)
        {
            flushed = int.Parse(line.AsSpan(2), CultureInfo.InvariantCulture);
            if (Environment.TickCount64 >= deadline)
            {
                process.Kill();
                deadline = long.MaxValue;
            }

            line = process.StandardOutput.ReadLine();
        }

        process.WaitForExit();
        process.StandardError.ReadToEnd().Should().BeEmpty();
        flushed.Should().BeGreaterThan(start);
        return flushed;
    }

    private static void Verify(string path, int seed, int start, int flushed, int[] floor)
    {
        (int status, string output) = TempDirectory.Run("qemu-img", "check", path);
        status.Should().BeOneOf([0, 3], $"only leaks are allowed after a kill:\n{output}");
        int[] last = (int[])floor.Clone();
        var later = new Dictionary<int, HashSet<int>>();
        for (int n = start; n < flushed + 100_000; n++)
        {
            (int block, int count, bool isZero) = Torture.Step(seed, n);
            for (int i = block; i < block + count; i++)
            {
                int value = isZero ? 0 : n + 1;
                if (n < flushed)
                {
                    last[i] = value;
                }
                else
                {
                    later.TryAdd(i, []);
                    later[i].Add(value);
                }
            }
        }

        using BlockImage image = DiskImage.Open(path, readOnly: true);
        byte[] all = ReadAll(image);
        for (int i = 0; i < Torture.Blocks; i++)
        {
            int found = Torture.StepOf(all.AsSpan(i * Torture.BlockBytes, Torture.BlockBytes), seed, i);
            bool isAllowed = found == last[i] || (later.TryGetValue(i, out HashSet<int>? set) && set.Contains(found));
            isAllowed.Should().BeTrue($"block {i} holds step {found} but step {last[i]} was flushed");
            floor[i] = found;
        }
    }

    private static void RandomStep(BlockImage image, byte[] model, Random random, int unit)
    {
        int size = model.Length;
        int at = random.Next(size / 512) * 512;
        int length = Math.Min(size - at, 512 * random.Next(1, random.Next(4) == 0 ? Math.Max(2, unit / 64) : 40));
        if (random.Next(4) == 0)
        {
            at = at / unit * unit;
            length = Math.Min(size - at, unit * random.Next(1, 4));
        }

        switch (random.Next(12))
        {
            case 0:
                image.WriteZeroes(at, length, random.Next(2) == 0).Should().Be(BlockStatus.Ok);
                model.AsSpan(at, length).Clear();
                break;
            case 1:
                image.Flush().Should().Be(BlockStatus.Ok);
                break;
            case 2:
            case 3:
                {
                    byte[] data = new byte[length];
                    image.Read(at, new IoBuffer(data)).Should().Be(BlockStatus.Ok);
                    data.AsSpan().SequenceEqual(model.AsSpan(at, length)).Should().BeTrue($"read at {at}+{length}");
                    break;
                }

            case 4:
                {
                    // What a discarded range reads as is not promised: take over what it does.
                    image.Discard(at, length).Should().Be(BlockStatus.Ok);
                    byte[] data = new byte[length];
                    image.Read(at, new IoBuffer(data)).Should().Be(BlockStatus.Ok);
                    data.CopyTo(model, at);
                    break;
                }

            default:
                {
                    byte[] data = new byte[length];
                    random.NextBytes(data);
                    image.Write(at, new IoBuffer(data)).Should().Be(BlockStatus.Ok, image.LastError);
                    data.CopyTo(model, at);
                    break;
                }
        }
    }

    private static byte[] ReadAll(BlockImage image)
    {
        byte[] all = new byte[image.LengthBytes];
        image.Read(0, new IoBuffer(all)).Should().Be(BlockStatus.Ok, image.LastError);
        return all;
    }

    // Read by us, checked by qemu-img, compared with what qemu-img reads.
    private void CheckAgainst(string path, byte[] model)
    {
        using (BlockImage image = DiskImage.Open(path, readOnly: true))
        {
            ReadAll(image).AsSpan().SequenceEqual(model).Should().BeTrue("our own reading agrees");
        }

        Qcow2CheckResult ours = DiskImage.CheckQcow2(path);
        (ours.Damage, ours.CountErrors, ours.Leaks).Should().Be((0, 0, 0), ours.FirstDamage);
        (int status, string output) = TempDirectory.Run("qemu-img", "check", path);
        status.Should().Be(0, output);
        string raw = _temp["model.img"];
        File.WriteAllBytes(raw, model);
        (status, output) = TempDirectory.Run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, raw);
        status.Should().Be(0, output);
    }

    private sealed class ListProgress(List<double> reports) : IProgress<double>
    {
        public void Report(double value) => reports.Add(value);
    }
}

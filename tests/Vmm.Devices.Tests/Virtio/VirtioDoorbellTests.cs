// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Virtio;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Devices.Tests.Virtio;

/// <summary>Which thread serves a doorbell: VirtioOptions.QuickDoorbells.</summary>
public sealed class VirtioDoorbellTests : IDisposable
{
    private const ulong Data = 0x80000;
    private const ulong Header = 0x70000;
    private const ulong StatusByte = 0x71000;

    private readonly TestRam _ram = new(1 << 20);
    private readonly FakeIrqLine _irq = new();
    private readonly WatchedDisk _disk = new();
    private VirtioDevice? _device;
    private VirtioMmio? _mmio;

    public void Dispose() => _mmio?.Dispose();

    [Fact]
    public void Doorbell_OfAnIdleQuickDevice_IsServedByTheThreadThatRings()
    {
        VirtioMmioDriver driver = Start(quick: true);
        for (int i = 0; i < 10; i++)
        {
            Read(driver);
            IsAnswered(driver).Should().BeTrue("the answer is there when the doorbell returns");
            _disk.ServedBy.Should().Be(Environment.CurrentManagedThreadId);
        }

        _device!.ServedDoorbells.Should().BeGreaterThanOrEqualTo(10);
    }

    [Fact]
    public void Doorbell_WithoutTheOption_IsServedByTheWorker()
    {
        VirtioMmioDriver driver = Start(quick: false);
        Read(driver);
        SpinWait.SpinUntil(() => IsAnswered(driver), 5000).Should().BeTrue();
        _disk.ServedBy.Should().NotBe(Environment.CurrentManagedThreadId);
        _device!.ServedDoorbells.Should().Be(0);
    }

    [Fact]
    public void Doorbell_AfterASlowOne_GoesToTheWorker()
    {
        VirtioMmioDriver driver = Start(quick: true);
        _disk.TakesMs = 20;
        Read(driver);
        IsAnswered(driver).Should().BeTrue();
        _disk.TakesMs = 0;
        Read(driver); // within the pause that a slow one makes: time stands still here
        SpinWait.SpinUntil(() => IsAnswered(driver), 5000).Should().BeTrue();
        _disk.ServedBy.Should().NotBe(Environment.CurrentManagedThreadId);
    }

    [Fact]
    public void Doorbell_WhileTheWorkerIsBusy_IsNotWaitedFor()
    {
        VirtioMmioDriver driver = Start(quick: true);
        _disk.TakesMs = 20;
        Read(driver); // the next ones go to the worker
        IsAnswered(driver).Should().BeTrue();
        _disk.Hold();
        Read(driver);
        SpinWait.SpinUntil(() => _disk.IsBusy, 5000).Should().BeTrue();
        driver.Kick(0); // would not return if it waited for the worker, which is held until the next line
        _disk.LetGo();
        SpinWait.SpinUntil(() => IsAnswered(driver), 5000).Should().BeTrue();
    }

    [Fact]
    public void Doorbell_WhilePaused_IsServedAfterResume()
    {
        VirtioMmioDriver driver = Start(quick: true);
        _mmio!.Pause();
        Read(driver);
        IsAnswered(driver).Should().BeFalse();
        _mmio.Resume();
        SpinWait.SpinUntil(() => IsAnswered(driver), 5000).Should().BeTrue();
    }

    [Fact]
    public void Doorbells_OfTwoThreads_LoseNothing()
    {
        VirtioMmioDriver driver = Start(quick: true);
        int answered = 0;
        for (int round = 0; round < 2000; round++)
        {
            Read(driver, kick: false);
            var other = new Thread(() => driver.Kick(0));
            other.Start();
            driver.Kick(0);
            other.Join();
            answered += SpinWait.SpinUntil(() => IsAnswered(driver), 5000) ? 1 : 0;
        }

        answered.Should().Be(2000);
    }

    private VirtioMmioDriver Start(bool quick)
    {
        _device = new VirtioDevice("blk", new VirtioBlock(_disk), _ram, new VirtioOptions { QuickDoorbells = quick, Time = _disk.Time });
        _mmio = new VirtioMmio(_device, _irq);
        _mmio.Reset();
        _mmio.Resume();
        var driver = new VirtioMmioDriver(_mmio, _ram);
        driver.Start(0, 1);
        Read(driver); // the worker starts the session; what is rung before is its business
        SpinWait.SpinUntil(() => IsAnswered(driver), 5000).Should().BeTrue();

        // It may be on its way out when the answer is there.
        for (int i = 0; quick && _device.ServedDoorbells == 0 && i < 1000; i++)
        {
            Read(driver);
            SpinWait.SpinUntil(() => IsAnswered(driver), 5000).Should().BeTrue();
        }

        return driver;
    }

    private void Read(VirtioMmioDriver driver, bool kick = true)
    {
        _ram.Bytes.Slice((int)Header, 16).Clear();
        _ram.Bytes[(int)StatusByte] = 0xFF;
        driver[0].Add(
            new DriverBuffer(Header, 16, false), new DriverBuffer(Data, 512, true), new DriverBuffer(StatusByte, 1, true));
        if (kick)
        {
            driver.Kick(0);
        }
    }

    private bool IsAnswered(VirtioMmioDriver driver) =>
        driver[0].TryTakeUsed(out _, out _) && _ram.Bytes[(int)StatusByte] == 0;

    /// <summary>Answers inside Submit and remembers on which thread.</summary>
    private sealed class WatchedDisk : IBlockBackend
    {
        private volatile int _servedBy;
        private readonly ManualResetEventSlim _free = new(true);
        private volatile bool _isBusy;

        public int ServedBy => _servedBy;

        public bool IsBusy => _isBusy;

        /// <summary>Stands still unless a request moves it.</summary>
        public ManualTime Time { get; } = new();

        /// <summary>What a request takes of <see cref="Time"/>.</summary>
        public int TakesMs { get; set; }

        public long LengthBytes => 1 << 20;

        public int BlockBytes => 512;

        public bool IsReadOnly => false;

        public bool CanDiscard => false;

        public void Submit(BlockRequest request)
        {
            _servedBy = Environment.CurrentManagedThreadId;
            _isBusy = true;
            Time.Advance(TimeSpan.FromMilliseconds(TakesMs));
            _free.Wait(TimeSpan.FromSeconds(30));
            _isBusy = false;
            request.Complete(BlockStatus.Ok);
        }

        public void Hold() => _free.Reset();

        public void LetGo() => _free.Set();

        public void Drain()
        {
        }

        public void Dispose() => _free.Dispose();
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using FluentAssertions;
using Vmm.Config;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Fleet.Tests;

/// <summary>One VM, one runner; also when hosts die. Time stands still unless a test moves it.</summary>
public sealed class LeaseTests : IDisposable
{
    private static readonly TimeSpan s_ttl = TimeSpan.FromMilliseconds(1500);
    private static readonly TimeSpan s_patience = TimeSpan.FromMinutes(1);
    private readonly ManualTime _time = new();
    private readonly string _directory = Directory.CreateTempSubdirectory("lease-").FullName;

    private string File1 => Path.Combine(_directory, "lease");

    public void Dispose() => Directory.Delete(_directory, recursive: true);

    [Fact]
    public async Task Lease_Held_IsRefusedToOthersOfThisHost()
    {
        await using Lease first = await Take("here");

        LeaseHeldException refused = (await FluentActions.Awaiting(() => Take("here")).Should().ThrowAsync<LeaseHeldException>()).Which;

        refused.Holder!.Pid.Should().Be(Environment.ProcessId);
        refused.Message.Should().Contain($"process {Environment.ProcessId}");
    }

    [Fact]
    public void Disk_ThatIsYetToBeMade_HasItsLeaseBesideItsPath() =>
        DiskLease("new.qcow2").Should().Be(Path.Combine(_directory, "new.qcow2.lease"));

    [Fact]
    public void Disk_UnderSeveralNames_HasOneLease()
    {
        string image = Path.Combine(_directory, "image");
        File.WriteAllText(image, string.Empty);
        File.CreateSymbolicLink(Path.Combine(_directory, "link"), image);
        File.CreateSymbolicLink(Path.Combine(_directory, "again"), "link");

        DiskLease("again").Should().Be(image + ".lease");
        DiskLease("link").Should().Be(image + ".lease");
        DiskLease("image").Should().Be(image + ".lease");
    }

    // One whose image is gone: opening it will say so.
    [Fact]
    public void Disk_BehindADanglingLink_HasItsLeaseAtTheEndOfTheLink()
    {
        File.CreateSymbolicLink(Path.Combine(_directory, "link"), "gone");

        DiskLease("link").Should().Be(Path.Combine(_directory, "gone.lease"));
    }

    private string DiskLease(string path)
    {
        string definition = $"name: a\nboot: {{kernel: k}}\ndisks: [{{path: {path}, size: 1G}}]\n";
        FleetSpec fleet = ConfigFiles.Parse(definition, "a.yaml", _directory);
        return LeaseSet.OfDisks(fleet.Machines[0]).Should().ContainSingle().Which.Lease;
    }

    [Fact]
    public async Task Lease_Released_IsFreeAtOnce_EvenForAnotherHost()
    {
        await (await Take("here")).DisposeAsync();

        await using Lease second = await Take("there").WaitAsync(s_patience);

        _time.Elapsed.Should().Be(TimeSpan.Zero);
    }

    [Fact]
    public async Task Lease_OfADeadProcessOfThisHost_IsTakenAtOnce()
    {
        WriteRecord(new LeaseRecord("here", "id-here", 4711, "mark", 17));

        await using Lease lease = await Take("here").WaitAsync(s_patience);

        _time.Elapsed.Should().Be(TimeSpan.Zero);
    }

    [Fact]
    public async Task Lease_OfADeadHost_IsTakenAfterItsTimeToLive()
    {
        WriteRecord(new LeaseRecord("there", "id-there", 4711, "mark", 17));
        Task<Lease> taking = Take("here");
        for (int i = 0; i < 10; i++)
        {
            Lease.Peek(File1)!.HostId.Should().Be("id-there", "its time is not over");
            await Step(taking, s_ttl / 10);
        }

        _time.Elapsed.Should().Be(s_ttl);
        await using Lease lease = await Pass(taking);

        Lease.Peek(File1)!.HostId.Should().Be("id-here");
    }

    [Fact]
    public async Task Lease_ThatAnotherHostRenews_IsRefused()
    {
        WriteRecord(new LeaseRecord("there", "id-there", 4711, "mark", 17));
        Task<Lease> taking = Take("here");
        await Step(taking, s_ttl / 10);
        WriteRecord(new LeaseRecord("there", "id-there", 4711, "mark", 18));

        LeaseHeldException refused = (await FluentActions.Awaiting(() => Pass(taking)).Should().ThrowAsync<LeaseHeldException>()).Which;

        refused.Message.Should().Be("it is already run by process 4711 on there");
        _time.Elapsed.Should().BeLessThan(s_ttl);
    }

    [Fact]
    public async Task Lease_TakenByAnotherHost_IsNoticedAsLost()
    {
        await using Lease lease = await Take("here");
        WriteRecord(new LeaseRecord("there", "id-there", 1, "other mark", 1));
        _time.Advance(s_ttl / 3);

        await FluentActions.Awaiting(() => Task.Delay(s_patience, lease.Lost)).Should().ThrowAsync<OperationCanceledException>();
    }

    [Fact]
    public async Task Lease_Held_IsRenewed()
    {
        await using Lease lease = await Take("here");
        long before = Lease.Peek(File1)!.Serial;
        _time.Advance(s_ttl / 3);

        SpinWait.SpinUntil(() => Lease.Peek(File1)?.Serial > before, s_patience).Should().BeTrue();
        lease.Lost.IsCancellationRequested.Should().BeFalse();
    }

    [Fact]
    public async Task Lease_WithGarbageInside_IsWatchedLikeADeadHosts()
    {
        await File.WriteAllTextAsync(File1, "{\"host\": 3, ][");

        await using Lease lease = await Pass(Take("here"));

        Lease.Peek(File1)!.HostId.Should().Be("id-here");
        _time.Elapsed.Should().BeGreaterThan(s_ttl);
    }

    private void WriteRecord(LeaseRecord record)
    {
        using var file = File.OpenHandle(File1, FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.ReadWrite | FileShare.Delete);
        Lease.Write(file, record);
    }

    private Task<Lease> Take(string host) => Lease.AcquireAsync(File1, s_ttl, _time, "id-" + host, CancellationToken.None);

    // Moves time until it is settled.
    private async Task<Lease> Pass(Task<Lease> taking)
    {
        while (!taking.IsCompleted)
        {
            await Step(taking, s_ttl / 10);
        }

        return await taking;
    }

    // Moves time by one step, as soon as somebody waits for that.
    private async Task Step(Task<Lease> taking, TimeSpan step)
    {
        SpinWait.SpinUntil(() => taking.IsCompleted || _time.ArmedTimers > 0, s_patience).Should().BeTrue();
        if (!taking.IsCompleted)
        {
            _time.Advance(step);
            await Task.Yield();
        }
    }
}

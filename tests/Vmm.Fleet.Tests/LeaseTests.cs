// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Diagnostics;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using FluentAssertions;
using Vmm.Config;
using Xunit;

namespace Vmm.Fleet.Tests;

/// <summary>One VM, one runner; also when hosts die.</summary>
public sealed class LeaseTests : IDisposable
{
    private static readonly TimeSpan s_ttl = TimeSpan.FromMilliseconds(1500);
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
        var watch = Stopwatch.StartNew();

        await using Lease second = await Take("there");

        watch.Elapsed.Should().BeLessThan(s_ttl / 2);
    }

    [Fact]
    public async Task Lease_OfADeadProcessOfThisHost_IsTakenAtOnce()
    {
        WriteRecord(new LeaseRecord("here", "id-here", 4711, "mark", 17));
        var watch = Stopwatch.StartNew();

        await using Lease lease = await Take("here");

        watch.Elapsed.Should().BeLessThan(s_ttl / 2);
    }

    [Fact]
    public async Task Lease_OfADeadHost_IsTakenAfterItsTimeToLive()
    {
        WriteRecord(new LeaseRecord("there", "id-there", 4711, "mark", 17));
        var watch = Stopwatch.StartNew();

        await using Lease lease = await Take("here");

        watch.Elapsed.Should().BeGreaterThan(s_ttl);
        Lease.Peek(File1)!.HostId.Should().Be("id-here");
    }

    [Fact]
    public async Task Lease_ThatAnotherHostRenews_IsRefused()
    {
        WriteRecord(new LeaseRecord("there", "id-there", 4711, "mark", 17));
        using var stop = new CancellationTokenSource();
        Task renewing = Task.Run(async () =>
        {
            for (long serial = 18; !stop.IsCancellationRequested; serial++)
            {
                WriteRecord(new LeaseRecord("there", "id-there", 4711, "mark", serial));
                await Task.Delay(s_ttl / 4);
            }
        });

        LeaseHeldException refused = (await FluentActions.Awaiting(() => Take("here")).Should().ThrowAsync<LeaseHeldException>()).Which;

        refused.Message.Should().Be("it is already run by process 4711 on there");
        await stop.CancelAsync();
        await renewing;
    }

    [Fact]
    public async Task Lease_TakenByAnotherHost_IsNoticedAsLost()
    {
        await using Lease lease = await Take("here");
        WriteRecord(new LeaseRecord("there", "id-there", 1, "other mark", 1));

        await FluentActions.Awaiting(() => Task.Delay(s_ttl * 3, lease.Lost)).Should().ThrowAsync<OperationCanceledException>();
    }

    [Fact]
    public async Task Lease_Held_IsRenewed()
    {
        await using Lease lease = await Take("here");
        long before = Lease.Peek(File1)!.Serial;
        await Task.Delay(s_ttl);

        Lease.Peek(File1)!.Serial.Should().BeGreaterThan(before);
        lease.Lost.IsCancellationRequested.Should().BeFalse();
    }

    [Fact]
    public async Task Lease_WithGarbageInside_IsWatchedLikeADeadHosts()
    {
        await File.WriteAllTextAsync(File1, "{\"host\": 3, ][");

        await using Lease lease = await Take("here");

        Lease.Peek(File1)!.HostId.Should().Be("id-here");
    }

    private void WriteRecord(LeaseRecord record)
    {
        using var file = File.OpenHandle(File1, FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.ReadWrite | FileShare.Delete);
        Lease.Write(file, record);
    }

    private Task<Lease> Take(string host) => Lease.AcquireAsync(File1, s_ttl, TimeProvider.System, "id-" + host, CancellationToken.None);
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using Vmm.Config;

namespace Vmm.Fleet;

/// <summary>
/// The leases that one VM needs: its own, and one for each image that it writes to, beside the image, so that no two VMs
/// write to one disk, whatever they are called and whichever host they run on. Devices below /dev have none: no file can lie
/// beside them; the lock on the device itself keeps two VMs of one host apart. Thread-safe.
/// </summary>
public sealed class LeaseSet : IAsyncDisposable
{
    private readonly List<(Lease Lease, string What)> _leases = [];
    private readonly List<CancellationTokenRegistration> _watches = [];

    private LeaseSet()
    {
    }

    /// <summary>The lease files of the images that a VM writes to.</summary>
    public static IReadOnlyList<(string Image, string Lease)> OfDisks(MachineSpec spec)
    {
        ArgumentNullException.ThrowIfNull(spec);
        var files = new List<(string, string)>();
        foreach (DiskSpec disk in spec.Disks)
        {
            if (disk.Path is { } path && !disk.ReadOnly && disk.Bus != DiskBus.Cdrom && !path.StartsWith("/dev/", StringComparison.Ordinal))
            {
                // One image may have several names; its lease has one. What is yet to be made has one name (and to ask for
                // the target of what is not there throws).
                var file = new FileInfo(path);
                string image = file.LinkTarget is null ? path : file.ResolveLinkTarget(returnFinalTarget: true)!.FullName;
                files.Add((image, image + ".lease"));
            }
        }

        return files;
    }

    /// <summary>Takes all of them, or none. May wait for a time-to-live when another host held one.</summary>
    /// <param name="paths">The VM's directories.</param>
    /// <param name="spec">The VM.</param>
    /// <param name="time">Clock and timers.</param>
    /// <param name="log">Told of a disk whose directory cannot be written to: it then has only its lock.</param>
    /// <param name="cancellation">Gives up waiting.</param>
    /// <exception cref="LeaseHeldException">Somebody else holds one; the message says which and who.</exception>
    /// <exception cref="IOException">The VM's own lease cannot be made.</exception>
    public static async Task<LeaseSet> AcquireAsync(
        VmPaths paths, MachineSpec spec, TimeProvider time, Action<string> log, CancellationToken cancellation)
    {
        ArgumentNullException.ThrowIfNull(paths);
        ArgumentNullException.ThrowIfNull(log);
        var asked = new List<(Task<Lease> Lease, string? Image)> { (TakeAsync(paths.Lease, time, cancellation), null) };
        foreach ((string image, string lease) in OfDisks(spec))
        {
            asked.Add((TakeAsync(lease, time, cancellation), image));
        }

        var set = new LeaseSet();
        LeaseHeldException? refused = null;
        foreach ((Task<Lease> task, string? image) in asked)
        {
            try
            {
                set._leases.Add((await task.ConfigureAwait(false), image is null ? "this VM" : $"the disk {image}"));
            }
            catch (LeaseHeldException held)
            {
                refused ??= image is null ? held : new LeaseHeldException($"{image}: {held.Message}", held.Holder);
            }
            catch (Exception failure) when (image is not null && failure is IOException or UnauthorizedAccessException)
            {
                log($"{image}: no lease beside it, only its lock: {failure.Message.ReplaceLineEndings(" ")}");
            }
        }

        if (refused is not null)
        {
            await set.DisposeAsync().ConfigureAwait(false);
            throw refused;
        }

        return set;
    }

    /// <summary>Tells when a lease is lost: the VM must end at once. Once, before anything else.</summary>
    /// <param name="lost">Given what the lease was for; any thread.</param>
    public void Watch(Action<string> lost)
    {
        foreach ((Lease lease, string what) in _leases)
        {
            _watches.Add(lease.Lost.Register(() => lost(what)));
        }
    }

    /// <summary>Gives all of them back.</summary>
    public async ValueTask DisposeAsync()
    {
        foreach (CancellationTokenRegistration watch in _watches)
        {
            await watch.DisposeAsync().ConfigureAwait(false);
        }

        foreach ((Lease lease, _) in _leases)
        {
            await lease.DisposeAsync().ConfigureAwait(false);
        }

        _leases.Clear();
    }

    private static Task<Lease> TakeAsync(string path, TimeProvider time, CancellationToken cancellation) =>
        Lease.AcquireAsync(path, Lease.DefaultTimeToLive, time, Lease.LocalHostId, cancellation);
}

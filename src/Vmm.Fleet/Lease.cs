// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers;
using System.Globalization;
using System.IO;
using System.Text;
using System.Text.Json;
using System.Threading;
using System.Threading.Tasks;
using Microsoft.Win32.SafeHandles;
using Vmm.Host;

namespace Vmm.Fleet;

// Theory. A VM whose state directory lies on shared storage must not run on two hosts, also after one of them crashed or
// lost its network. Two mechanisms, because neither is enough:
//
// 1. A lock on the lease file. The kernel drops it when its holder dies, so on one host it tells the truth at once.
//    Over NFS and cluster file systems locks may or may not reach the other host.
// 2. A record in the file that its holder rewrites (a serial number goes up) three times per time-to-live. A taker that
//    finds the record of another host watches it for a whole time-to-live by its own clock; clocks of hosts are never
//    compared. If it moved, the holder lives. If not, the holder is dead, or it has found out itself that it could not
//    write for two thirds of the time-to-live and has ended its VM: that is the fence.
//
// Two takers of one dead lease, where locks do not work, both write; each reads back after a random wait, and the last
// writer wins, since the other one finds a foreign mark.

/// <summary>Who holds a lease.</summary>
/// <param name="Host">Name of the host.</param>
/// <param name="HostId">Identifier of the host's installation.</param>
/// <param name="Pid">Process number there.</param>
/// <param name="Mark">Chosen anew at each taking.</param>
/// <param name="Serial">Goes up with each renewal.</param>
public sealed record LeaseRecord(string Host, string HostId, int Pid, string Mark, long Serial);

/// <summary>Somebody else holds the lease.</summary>
public sealed class LeaseHeldException : Exception
{
    /// <summary>Makes one.</summary>
    /// <param name="message">One line for people.</param>
    /// <param name="holder">Who, when the record is readable.</param>
    public LeaseHeldException(string message, LeaseRecord? holder)
        : base(message)
    {
        Holder = holder;
    }

    /// <summary>Who holds it, if known.</summary>
    public LeaseRecord? Holder { get; }
}

/// <summary>The right to run one VM. Held until disposed or lost; thread-safe.</summary>
public sealed class Lease : IAsyncDisposable
{
    /// <summary>Time after which a lease that is not renewed counts as dead.</summary>
    public static readonly TimeSpan DefaultTimeToLive = TimeSpan.FromSeconds(15);

    private const int MaxRecordBytes = 4096;

    private readonly SafeFileHandle _file;
    private readonly TimeProvider _time;
    private readonly TimeSpan _timeToLive;
    private readonly CancellationTokenSource _lost = new();
    private readonly CancellationTokenSource _released = new();
    private readonly Task _renewing;
    private LeaseRecord _record;

    private Lease(SafeFileHandle file, LeaseRecord record, TimeSpan timeToLive, TimeProvider time)
    {
        _file = file;
        _record = record;
        _timeToLive = timeToLive;
        _time = time;
        _renewing = RenewAsync();
    }

    /// <summary>Cancelled when the lease was lost: whoever runs the VM must end it at once.</summary>
    public CancellationToken Lost => _lost.Token;

    /// <summary>Identifies this host's installation; the same after a restart.</summary>
    public static string LocalHostId { get; } = ReadHostId();

    /// <summary>Takes the lease. May wait for a whole time-to-live when another host held it.</summary>
    /// <param name="path">The lease file; made when it is not there.</param>
    /// <param name="timeToLive">The same for all hosts that share the file.</param>
    /// <param name="time">Clock and timers.</param>
    /// <param name="hostId">This host; <see cref="LocalHostId"/>.</param>
    /// <param name="cancellation">Gives up waiting.</param>
    /// <exception cref="LeaseHeldException">Somebody else holds it.</exception>
    /// <exception cref="IOException">The file cannot be made or written.</exception>
    public static async Task<Lease> AcquireAsync(
        string path, TimeSpan timeToLive, TimeProvider time, string hostId, CancellationToken cancellation)
    {
        ArgumentNullException.ThrowIfNull(path);
        ArgumentNullException.ThrowIfNull(time);
        SafeFileHandle file = File.OpenHandle(
            path, FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.ReadWrite | FileShare.Delete);
        try
        {
            if (FileIo.TryLock(file, exclusive: true) == Errno.EAGAIN)
            {
                throw Held(Read(file));
            }

            LeaseRecord? previous = Read(file);
            bool isForeign = previous is not null && !string.Equals(previous.HostId, hostId, StringComparison.Ordinal);
            if (isForeign)
            {
                await WatchAsync(file, previous!, timeToLive, time, cancellation).ConfigureAwait(false);
            }

            var mine = new LeaseRecord(Environment.MachineName, hostId, Environment.ProcessId, Guid.NewGuid().ToString("N"), 1);
            Write(file, mine);
            if (isForeign)
            {
                TimeSpan settle = timeToLive / 20 * (1 + Random.Shared.NextDouble());
                await Task.Delay(settle, time, cancellation).ConfigureAwait(false);
                if (Read(file) is not { } now || !string.Equals(now.Mark, mine.Mark, StringComparison.Ordinal))
                {
                    throw Held(Read(file));
                }
            }

            return new Lease(file, mine, timeToLive, time);
        }
        catch
        {
            file.Dispose();
            throw;
        }
    }

    /// <summary>Reads who holds a lease, dead or alive; null when nobody does.</summary>
    public static LeaseRecord? Peek(string path)
    {
        try
        {
            using SafeFileHandle file = File.OpenHandle(
                path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete);
            return Read(file);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    /// <summary>Gives the lease back: the next taker does not wait.</summary>
    public async ValueTask DisposeAsync()
    {
        await _released.CancelAsync().ConfigureAwait(false);
        await _renewing.ConfigureAwait(false);
        if (!_lost.IsCancellationRequested && IsMine())
        {
            try
            {
                RandomAccess.SetLength(_file, 0);
            }
            catch (IOException)
            {
                // The next taker waits for a time-to-live; nothing else is wrong.
            }
        }

        _file.Dispose();
        _released.Dispose();
        _lost.Dispose();
    }

    internal static void Write(SafeFileHandle file, LeaseRecord record)
    {
        var buffer = new ArrayBufferWriter<byte>(256);
        using (var json = new Utf8JsonWriter(buffer))
        {
            json.WriteStartObject();
            json.WriteString("host", record.Host);
            json.WriteString("host-id", record.HostId);
            json.WriteNumber("pid", record.Pid);
            json.WriteString("mark", record.Mark);
            json.WriteNumber("serial", record.Serial);
            json.WriteEndObject();
        }

        // One write of a fixed length: a reader never sees half of an old record behind a new one.
        var line = new byte[512];
        line.AsSpan().Fill((byte)' ');
        buffer.WrittenSpan.CopyTo(line);
        line[^1] = (byte)'\n';
        RandomAccess.Write(file, line, 0);
        RandomAccess.FlushToDisk(file);
    }

    private static LeaseRecord? Read(SafeFileHandle file)
    {
        var buffer = new byte[MaxRecordBytes];
        int count = RandomAccess.Read(file, buffer, 0);
        string text = Encoding.UTF8.GetString(buffer, 0, count).Trim();
        if (text.Length == 0)
        {
            return null;
        }

        try
        {
            using JsonDocument document = JsonDocument.Parse(text);
            JsonElement root = document.RootElement;
            return new LeaseRecord(
                root.GetProperty("host").GetString() ?? "?",
                root.GetProperty("host-id").GetString() ?? "?",
                root.GetProperty("pid").GetInt32(),
                root.GetProperty("mark").GetString() ?? "?",
                root.GetProperty("serial").GetInt64());
        }
        catch (Exception damaged) when (damaged is JsonException or System.Collections.Generic.KeyNotFoundException
            or InvalidOperationException or FormatException)
        {
            // Whoever wrote this cannot be asked; treat it as another host's and watch it.
            return new LeaseRecord("unknown host", "?", 0, text.Length > 64 ? text[..64] : text, 0);
        }
    }

    private static LeaseHeldException Held(LeaseRecord? holder)
    {
        string who = holder is null
            ? "by another process"
            : string.Create(CultureInfo.InvariantCulture, $"by process {holder.Pid} on {holder.Host}");
        return new LeaseHeldException("it is already run " + who, holder);
    }

    private static async Task WatchAsync(
        SafeFileHandle file, LeaseRecord previous, TimeSpan timeToLive, TimeProvider time, CancellationToken cancellation)
    {
        long start = time.GetTimestamp();
        while (time.GetElapsedTime(start) < timeToLive)
        {
            await Task.Delay(timeToLive / 10, time, cancellation).ConfigureAwait(false);
            LeaseRecord? now = Read(file);
            if (now is null)
            {
                return;
            }

            if (now != previous)
            {
                throw Held(now);
            }
        }
    }

    private bool IsMine()
    {
        try
        {
            return Read(_file) is { } now && string.Equals(now.Mark, _record.Mark, StringComparison.Ordinal);
        }
        catch (IOException)
        {
            return false;
        }
    }

    private async Task RenewAsync()
    {
        long renewed = _time.GetTimestamp();
        while (true)
        {
            try
            {
                await Task.Delay(_timeToLive / 3, _time, _released.Token).ConfigureAwait(false);
            }
            catch (OperationCanceledException)
            {
                return;
            }

            try
            {
                LeaseRecord? now = Read(_file);
                if (now is not null && !string.Equals(now.Mark, _record.Mark, StringComparison.Ordinal))
                {
                    break;
                }

                _record = _record with { Serial = _record.Serial + 1 };
                Write(_file, _record);
                renewed = _time.GetTimestamp();
            }
            catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
            {
                if (_time.GetElapsedTime(renewed) >= _timeToLive * 2 / 3)
                {
                    break;
                }
            }
        }

        await _lost.CancelAsync().ConfigureAwait(false);
    }

    private static string ReadHostId()
    {
        foreach (string path in new[] { "/etc/machine-id", "/var/lib/dbus/machine-id", "/etc/hostid", "/etc/zones/hostid" })
        {
            try
            {
                string text = File.ReadAllText(path).Trim();
                if (text.Length > 0)
                {
                    return text;
                }
            }
            catch (Exception absent) when (absent is IOException or UnauthorizedAccessException)
            {
                // The next place.
            }
        }

        return "name:" + Environment.MachineName;
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Text.Json;
using System.Threading;
using Microsoft.Win32.SafeHandles;
using Vmm.Config;
using Vmm.Host;

namespace Vmm.Fleet;

/// <summary>How a VM's run ended, as its process wrote it down.</summary>
/// <param name="Status">Exit status of <c>vmctl run</c>: 0 reset, 1 power-off, 2 halt, 3 triple fault, 4 error; others debug-exit.</param>
/// <param name="Reason">One word: reset, power-off, halt, triple-fault, error, debug-exit, quit, killed.</param>
/// <param name="Message">One line for people, or null.</param>
public sealed record VmExit(int Status, string Reason, string? Message)
{
    /// <summary>The process left no word: it was killed, or it crashed.</summary>
    public static VmExit Vanished { get; } = new(4, "killed", "the process ended without a word: killed or crashed");

    /// <summary>Reads what a process wrote; null when there is nothing.</summary>
    public static VmExit? Read(string path)
    {
        try
        {
            using JsonDocument document = JsonDocument.Parse(File.ReadAllBytes(path));
            JsonElement root = document.RootElement;
            return new VmExit(
                root.GetProperty("status").GetInt32(),
                root.GetProperty("reason").GetString() ?? "error",
                root.TryGetProperty("message", out JsonElement message) ? message.GetString() : null);
        }
        catch (Exception absent) when (absent is IOException or UnauthorizedAccessException or JsonException
            or System.Collections.Generic.KeyNotFoundException or InvalidOperationException)
        {
            return null;
        }
    }
}

// Theory. What a VM's process shows of itself to others lies in its run directory, and every part of it tells the truth
// when the process dies at any moment: the pid file is locked by the process (the kernel drops the lock), the control
// socket stops answering, and exit.json is written as the last thing. So a supervisor that starts anew finds its VMs by
// looking, without having been their parent.

/// <summary>The run directory of the VM that this process runs. Made before the machine, disposed after it.</summary>
public sealed class VmProcess : IDisposable
{
    private static readonly TimeSpan s_lookPatience = TimeSpan.FromSeconds(5);

    private readonly VmPaths _paths;
    private readonly SafeFileHandle _pid;

    private VmProcess(VmPaths paths, SafeFileHandle pid)
    {
        _paths = paths;
        _pid = pid;
    }

    /// <summary>Makes the directories and files of a VM and marks it as run by this process.</summary>
    /// <exception cref="LeaseHeldException">A process of this host runs it already.</exception>
    /// <exception cref="IOException">The directories cannot be made.</exception>
    public static VmProcess Begin(VmPaths paths, MachineSpec spec)
    {
        ArgumentNullException.ThrowIfNull(paths);
        FleetPaths.MakePrivate(paths.Run);
        FleetPaths.MakePrivate(paths.State);
        FleetPaths.CheckSocket(paths.Control);
        SafeFileHandle pid = File.OpenHandle(
            paths.Pid, FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.ReadWrite | FileShare.Delete);
        if (!TryHold(pid, paths))
        {
            pid.Dispose();
            string number = ReadPid(paths) is { } other ? string.Create(CultureInfo.InvariantCulture, $" as process {other}") : string.Empty;
            throw new LeaseHeldException($"\"{spec.Name}\" is already running{number}", null);
        }

        RandomAccess.SetLength(pid, 0);
        RandomAccess.Write(pid, System.Text.Encoding.ASCII.GetBytes(string.Create(CultureInfo.InvariantCulture, $"{Environment.ProcessId}\n")), 0);
        File.Delete(paths.Exit);
        WriteWhole(paths.Definition, SpecWriter.Write(spec));
        return new VmProcess(paths, pid);
    }

    // Whoever looks (IsAlive) holds the file for a moment; whoever runs the VM holds it for good and stands in it.
    private static bool TryHold(SafeFileHandle pid, VmPaths paths)
    {
        long start = Stopwatch.GetTimestamp();
        var spin = default(SpinWait);
        while (FileIo.TryLock(pid, exclusive: true) == Errno.EAGAIN)
        {
            bool isRun = ReadPid(paths) is { } other && HostProcess.IsRunning(other);
            if (isRun || Stopwatch.GetElapsedTime(start) > s_lookPatience)
            {
                return false;
            }

            spin.SpinOnce();
        }

        return true;
    }

    /// <summary>True while a process holds the VM's run directory.</summary>
    public static bool IsAlive(VmPaths paths)
    {
        ArgumentNullException.ThrowIfNull(paths);
        try
        {
            using SafeFileHandle pid = File.OpenHandle(
                paths.Pid, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite | FileShare.Delete);
            return FileIo.TryLock(pid, exclusive: false) == Errno.EAGAIN;
        }
        catch (Exception absent) when (absent is IOException or UnauthorizedAccessException)
        {
            return false;
        }
    }

    /// <summary>The process number in the run directory, dead or alive.</summary>
    public static int? ReadPid(VmPaths paths)
    {
        ArgumentNullException.ThrowIfNull(paths);
        try
        {
            string text = File.ReadAllText(paths.Pid).Trim();
            return int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int pid) ? pid : null;
        }
        catch (Exception absent) when (absent is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    /// <summary>Writes down how the run ended; the last thing that the process does.</summary>
    public void End(VmExit exit)
    {
        ArgumentNullException.ThrowIfNull(exit);
        using var buffer = new MemoryStream();
        using (var json = new Utf8JsonWriter(buffer))
        {
            json.WriteStartObject();
            json.WriteNumber("status", exit.Status);
            json.WriteString("reason", exit.Reason);
            if (exit.Message is not null)
            {
                json.WriteString("message", exit.Message);
            }

            json.WriteEndObject();
        }

        WriteWhole(_paths.Exit, System.Text.Encoding.UTF8.GetString(buffer.ToArray()));
    }

    /// <summary>Lets go of the run directory.</summary>
    public void Dispose()
    {
        // Emptied, not deleted: the next process may have opened it already, and a lock counts for the file, not for its name.
        RandomAccess.SetLength(_pid, 0);
        _pid.Dispose();
    }

    /// <summary>Writes a file so that readers see the old one or the new one, never a part.</summary>
    public static void WriteWhole(string path, string text)
    {
        string next = path + ".new";
        File.WriteAllText(next, text);
        File.Move(next, path, overwrite: true);
    }
}

// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Threading;

namespace Vmm.Bench;

// Theory. How long does a user wait before the guest runs, and what does a VM cost beyond its own memory? A guest of a
// few instructions (tests/guests/payload.S) writes "ready" to its serial port as the first thing it does; the time from
// before the process is started to the first byte on vmctl's standard output is therefore an upper bound of process
// start to first KVM_RUN. Memory is read from /proc/PID/smaps of an idle guest: resident pages, without the mapping
// that is the guest's memory, once counted in full (Rss) and once without
// what VMs share (Private_Dirty): programs and libraries are the same pages for all of them.

/// <summary>Start-up time and resident memory of one VM.</summary>
internal static class StartUp
{
    private const int Rounds = 25;
    private const int MemoryBytes = 64 << 20;

    /// <param name="vmctl">The built program.</param>
    /// <param name="payload">The smallest guest, as tests/guests/payload makes it.</param>
    /// <param name="accel">Driver: kvm or soft.</param>
    internal static void Run(string vmctl, string payload, string accel)
    {
        string directory = Directory.CreateTempSubdirectory("vmm-bench").FullName;
        try
        {
            var times = new List<double>();
            string file = Define(directory, payload, accel, "do=p");
            for (int round = 0; round < Rounds; round++)
            {
                long start = Stopwatch.GetTimestamp();
                using Process process = Start(vmctl, file, directory);
                WaitForByte(process);
                times.Add(Stopwatch.GetElapsedTime(start).TotalMilliseconds);
                process.WaitForExit();
            }

            times.Sort();
            Report($"start-to-first-guest-output-{accel}-min", times[0], "ms");
            Report($"start-to-first-guest-output-{accel}-median", times[Rounds / 2], "ms");

            using Process idle = Start(vmctl, Define(directory, payload, accel, "do=i"), directory);
            WaitForByte(idle);
            Thread.Sleep(500);
            (double all, double own) = Memory(idle.Id);
            idle.Kill();
            idle.WaitForExit();
            Report($"resident-beyond-guest-{accel}", all, "MiB");
            Report($"resident-beyond-guest-{accel}-own", own, "MiB");
        }
        finally
        {
            Directory.Delete(directory, recursive: true);
        }
    }

    private static string Define(string directory, string payload, string accel, string action)
    {
        string file = Path.Combine(directory, "start.yaml");
        File.WriteAllText(file, string.Create(CultureInfo.InvariantCulture, $$"""
            name: start
            memory: {{MemoryBytes}}
            accel: {{accel}}
            boot: {kernel: {{Path.GetFullPath(payload)}}, cmdline: "{{action}}"}
            serial: [stdio]

            """));
        return file;
    }

    private static Process Start(string vmctl, string file, string directory)
    {
        var start = new ProcessStartInfo(vmctl)
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            UseShellExecute = false,
        };
        string[] arguments = ["run", "--quiet", "--run-dir", directory + "/run", "--state-dir", directory + "/state", file];
        foreach (string argument in arguments)
        {
            start.ArgumentList.Add(argument);
        }

        return Process.Start(start)!;
    }

    private static void WaitForByte(Process process)
    {
        if (process.StandardOutput.Read() < 0)
        {
            throw new IOException("vmctl: " + process.StandardError.ReadToEnd().Trim());
        }
    }

    // Sizes of smaps are in KiB; the guest's memory is the one mapping of its size.
    private static (double AllMiB, double OwnMiB) Memory(int processId)
    {
        double all = 0, own = 0;
        bool guest = false;
        foreach (string line in File.ReadLines(string.Create(CultureInfo.InvariantCulture, $"/proc/{processId}/smaps")))
        {
            string[] words = line.Split(' ', StringSplitOptions.RemoveEmptyEntries);
            if (words.Length < 3 || words[^1] != "kB")
            {
                continue;
            }

            double kib = double.Parse(words[^2], CultureInfo.InvariantCulture);
            switch (words[0])
            {
                case "Size:":
                    guest = kib * 1024 >= MemoryBytes && kib * 1024 <= MemoryBytes + (4 << 20);
                    break;
                case "Rss:" when !guest:
                    all += kib / 1024;
                    break;
                case "Private_Dirty:" when !guest:
                    own += kib / 1024;
                    break;
                default:
                    break;
            }
        }

        return (all, own);
    }

    private static void Report(string name, double value, string unit) =>
        Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"bench {name} {value:0.0} {unit} -"));
}

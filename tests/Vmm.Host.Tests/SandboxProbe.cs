// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using Vmm.Host.Native;
using Vmm.Host.Sandbox;

namespace Vmm.Host.Tests;

/// <summary>
/// The test program as a program of its own: <c>Vmm.Host.Tests.dll calls|files WHAT ...</c> goes into a sandbox and tries something
/// from inside. Standard output says how it went: "works", or the number of the error. A sandbox cannot be left, so
/// each attempt needs a process.
/// </summary>
internal static class SandboxProbe
{
    private static readonly Dictionary<string, Func<string[], string>> s_attempts = new(StringComparer.Ordinal)
    {
        ["execve"] = _ => Run("/bin/true"),
        ["start"] = _ => Start("/bin/true"),
        ["syscall"] = words => Call(int.Parse(words[0]), words),
        ["threads"] = _ => Threads(),
        ["files"] = _ => Files(Path.GetTempPath()),
        ["sockets"] = _ => Sockets(),
        ["names"] = _ => Dns.GetHostAddresses("localhost").Length > 0 ? "works" : "no address",
        ["code"] = _ => Code(),
        ["kvm"] = _ => Kvm(),
        ["collect"] = _ => Collect(),
        ["read"] = words => File.ReadAllBytes(words[0]).Length >= 0 ? "works" : "nothing",
        ["write"] = words => Write(words[0]),
        ["make"] = words => Files(words[0]),
        ["remove"] = words => Remove(words[0]),
        ["signal"] = words => Call(62, ["62", words[0], "0", "0"]),
        ["nothing"] = _ => "works",
    };

    private static int Main(string[] words)
    {
        try
        {
            switch (words[0])
            {
                case "calls":
                    if (!SystemCallFilter.TryEnter(out string? reason))
                    {
                        Console.WriteLine("no sandbox: " + reason);
                        return 0;
                    }

                    break;
                case "files":
                    // files RULES... -- WHAT...: each rule is RIGHTS=PATH.
                    EnterFiles(words);
                    return 0;
            }

            Console.WriteLine(s_attempts[words[1]](words[2..]));
        }
        catch (Exception refused) when (refused is IOException or UnauthorizedAccessException or SocketException or HostException
            or System.ComponentModel.Win32Exception)
        {
            Console.WriteLine("refused: " + refused.Message);
        }

        return 0;
    }

    private static void EnterFiles(string[] words)
    {
        int end = Array.IndexOf(words, "--");
        var files = new FileSandbox();
        foreach (string rule in words[1..end])
        {
            files.Allow(rule[(rule.IndexOf('=') + 1)..], Enum.Parse<FileRights>(rule[..rule.IndexOf('=')]));
        }

        if (files.TryEnter(out string? reason))
        {
            HostProcess.Execute(Environment.ProcessPath!, [typeof(SandboxProbe).Assembly.Location, "inside", .. words[(end + 1)..]]);
        }

        Console.WriteLine("no sandbox: " + reason);
    }

    private static string Run(string program)
    {
        HostProcess.Execute(program, []);
        return "works";
    }

    private static string Start(string program)
    {
        using var process = System.Diagnostics.Process.Start(program);
        process.WaitForExit();
        return "works";
    }

    // A raw call with up to three numbers: what the filter answers, before the kernel looks at the rest.
    private static string Call(int number, string[] words)
    {
        nint At(int index) => index < words.Length ? (nint)long.Parse(words[index]) : 0;
        return LibC.syscall(number, At(1), At(2), At(3)) >= 0 ? "works" : "error " + Marshal.GetLastPInvokeError();
    }

    private static string Threads()
    {
        int count = 0;
        for (int i = 0; i < 20; i++)
        {
            var thread = new Thread(() => Interlocked.Increment(ref count)) { Name = "probe" + i };
            thread.Start();
            thread.Join();
        }

        using var timer = new ManualResetEventSlim();
        using var later = new Timer(_ => timer.Set(), null, 10, Timeout.Infinite);
        return count == 20 && timer.Wait(10_000) ? "works" : "no threads";
    }

    private static string Files(string directory)
    {
        string path = Path.Combine(directory, "vmm-probe-" + Environment.ProcessId);
        File.WriteAllText(path, "first");
        using (var file = new FileStream(path, FileMode.Open, FileAccess.ReadWrite))
        {
            file.SetLength(1 << 20);
            file.Flush(flushToDisk: true);
        }

        File.Move(path, path + ".new");
        File.Delete(path + ".new");
        return "works";
    }

    private static string Write(string path)
    {
        using var file = new FileStream(path, FileMode.Open, FileAccess.Write);
        file.SetLength(0);
        file.WriteByte(1);
        return "works";
    }

    private static string Remove(string path)
    {
        File.Delete(path);
        return File.Exists(path) ? "still there" : "works";
    }

    private static string Sockets()
    {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        using var client = new TcpClient();
        client.Connect((IPEndPoint)listener.LocalEndpoint);
        using Socket server = listener.AcceptSocket();
        client.Client.Send(Encoding.ASCII.GetBytes("hello"));
        var buffer = new byte[16];
        using var datagram = new UdpClient(new IPEndPoint(IPAddress.Loopback, 0));
        return server.Receive(buffer) == 5 ? "works" : "no data";
    }

    // What the software CPU's thunks and a translator do: write code in one mapping and run it in the other.
    private static unsafe string Code()
    {
        using CodeMemory? code = CodeMemory.TryCreate(4096, out string? reason);
        if (code is null)
        {
            return "refused: " + reason;
        }

        // SAFETY: 6 bytes of 4096; mov eax, 42; ret.
        ((byte*)code.WriteAddress)[0] = 0xB8;
        *(int*)(code.WriteAddress + 1) = 42;
        ((byte*)code.WriteAddress)[5] = 0xC3;
        return ((delegate* unmanaged<int>)code.ExecuteAddress)() == 42 ? "works" : "wrong";
    }

    private static string Kvm()
    {
        using var kvm = File.OpenHandle("/dev/kvm", FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite);
        return LibC.ioctl((int)kvm.DangerousGetHandle(), 0xAE00, 0) == 12 ? "works" : "error " + Marshal.GetLastPInvokeError();
    }

    private static string Collect()
    {
        var kept = new List<byte[]>();
        for (int i = 0; i < 200; i++)
        {
            kept.Add(new byte[100_000]);
        }

        kept.Clear();
        GC.Collect();
        GC.WaitForPendingFinalizers();
        return Environment.WorkingSet > 0 && Environment.CpuUsage.TotalTime > TimeSpan.Zero ? "works" : "no figures";
    }
}
